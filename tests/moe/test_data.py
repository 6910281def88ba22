"""moe.data: nothing lost, nothing twice, resumable, the same whatever the number of hosts."""

import collections
import itertools

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe import data
from moe.sharding import HostShard


def corpus(lengths, *, prompts=None):
    """Documents whose tokens are all different, so that every pair says where it comes from."""
    starts = np.cumsum([0, *lengths])
    return data.documents([list(range(a, b)) for a, b in itertools.pairwise(starts)], prompts=prompts)


def pairs(rows):
    """Every (token, target) that counts, of every row."""
    return [(int(r["tokens"][i]), int(r["targets"][i])) for r in rows for i in np.flatnonzero(r["mask"])]


sizes = st.lists(st.integers(2, 70), min_size=1, max_size=40)


@given(sizes, st.integers(1, 33), st.integers(0, 3))
def test_every_pair_of_every_document_is_in_exactly_one_row(lengths, length, seed):
    rows = data.PackedRows(corpus(lengths), length=length, seed=seed)
    starts = np.cumsum([0, *lengths])
    want = [(t, t + 1) for a, b in itertools.pairwise(starts) for t in range(a, b - 1)]
    assert sorted(pairs([rows[i] for i in range(len(rows))])) == want


@given(sizes, st.integers(1, 33))
def test_segments_hold_one_run_of_one_document_and_padding_is_blank(lengths, length):
    rows = data.PackedRows(corpus(lengths), length=length)
    document = np.repeat(np.arange(len(lengths)), lengths)
    for row in (rows[i] for i in range(len(rows))):
        segments = row["segments"]
        used = segments > 0
        assert (np.diff(used.astype(int)) <= 0).all(), "padding comes last"
        for name in ("tokens", "targets", "positions", "mask"):
            assert not row[name][~used].any()
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            tokens = row["tokens"][here]
            assert (np.diff(tokens) == 1).all()
            assert len(set(document[tokens])) == 1
            assert (row["positions"][here] == np.arange(here.sum())).all()
        assert (np.diff(segments[used]) >= 0).all()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_never_opens_a_row_while_one_has_room(items):
    rows = data.best_fit(items, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(items)))
    assert all(sum(items[i] for i in row) <= 20 for row in rows)
    first = [min(row) for row in rows]
    for number, row in enumerate(rows):  # replay: when row `number` was opened, no earlier one had room for its item
        opened = items[first[number]]
        for earlier in rows[:number]:
            assert sum(items[i] for i in earlier if i < first[number]) + opened > 20
        assert row == sorted(row)


def test_rows_of_short_documents_are_nearly_full():
    lengths = np.random.default_rng(0).integers(8, 30, 4000)
    assert data.PackedRows(corpus(lengths.tolist()), length=128).filled > 0.97


def test_prompts_are_read_and_not_learned():
    rows = data.PackedRows(corpus([6, 9], prompts=[4, 2]), length=32)
    assert sorted(target for _, target in pairs([rows[0]])) == [4, 5, *range(8, 15)]
    assert (rows[0]["segments"] > 0).sum() == 5 + 8, "prompts are still read"


def test_a_prompt_across_the_cut_of_a_long_document_keeps_its_mask():
    rows = data.PackedRows(corpus([20], prompts=[10]), length=4)
    assert sorted(target for _, target in pairs([rows[i] for i in range(len(rows))])) == list(range(10, 20))


def test_padded_rows_are_the_documents_in_order():
    out = data.padded(corpus([3, 5], prompts=[1, 2]), 6)
    np.testing.assert_array_equal(out["tokens"], [[0, 1, 0, 0, 0, 0], [3, 4, 5, 6, 0, 0]])
    np.testing.assert_array_equal(out["targets"], [[1, 2, 0, 0, 0, 0], [4, 5, 6, 7, 0, 0]])
    np.testing.assert_array_equal(out["mask"], [[1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(out["segments"], [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])


def sources():
    rng = np.random.default_rng(1)
    return [
        data.PackedRows(corpus(rng.integers(2, 90, 60).tolist()), length=32, source=0),
        data.PackedRows(corpus(rng.integers(4, 20, 200).tolist()), length=32, source=1),
    ]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_an_epoch_shows_every_row_once_and_the_next_in_another_order():
    rows = sources()[0]
    count = len(rows) - len(rows) % 4
    data_set = data.batches([rows], batch=1, seed=5)
    seen = take(iter(data_set), 2 * len(rows))
    first, second = ([tuple(b["tokens"][0]) for b in half] for half in (seen[: len(rows)], seen[len(rows) :]))
    want = collections.Counter(tuple(rows[i]["tokens"]) for i in range(len(rows)))
    assert collections.Counter(first) == collections.Counter(second) == want
    assert first != second
    assert count > 10


def test_the_mixture_has_the_shares_asked_for():
    seen = take(iter(data.batches(sources(), weights=[0.75, 0.25], batch=8, seed=0)), 100)
    assert np.concatenate([b["source"] for b in seen]).mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("at", [0, 1, 7, 40])
def test_a_restored_iterator_goes_on_with_the_same_batches(at):
    def fresh():
        return iter(data.batches(sources(), weights=[0.6, 0.4], batch=4, seed=2))

    iterator = fresh()
    take(iterator, at)
    state = iterator.get_state()
    want = take(iterator, 20)
    again = fresh()
    take(again, 3)
    again.set_state(state)
    same(take(again, 20), want)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_their_part_of_the_batch_of_one_host(hosts):
    whole = take(iter(data.batches(sources(), batch=8, seed=3)), 6)
    parts = [take(iter(data.batches(sources(), batch=8, seed=3, shard=HostShard(i, hosts))), 6) for i in range(hosts)]
    joined = [{name: np.concatenate([part[i][name] for part in parts]) for name in whole[i]} for i in range(6)]
    same(joined, whole)


def test_seeds_change_the_order():
    one, other = (take(iter(data.batches(sources(), batch=8, seed=seed)), 3) for seed in (0, 1))
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(one, other, strict=True))


def test_rows_in_order_cover_everything_once():
    rows = sources()[0]
    got = list(data.in_order(rows, 7))
    assert all(batch["tokens"].shape == (7, 32) for batch in got)
    stacked = {name: np.concatenate([batch[name] for batch in got]) for name in got[0]}
    for i in range(len(rows)):
        np.testing.assert_array_equal(stacked["tokens"][i], rows[i]["tokens"])
    assert not stacked["mask"][len(rows) :].any()
    assert not stacked["segments"][len(rows) :].any()


def test_it_is_a_grain_dataset():
    assert isinstance(data.batches(sources(), batch=8, seed=0), grain.IterDataset)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.documents([]), "no documents"),
        (lambda: data.documents([[1, 2], [3]]), "document 1 has 1 tokens"),
        (lambda: data.documents([[1, 2]], prompts=[2]), "shorter than the document"),
        (lambda: data.documents([[1, 2]], prompts=[1, 1]), "one length for every document"),
        (lambda: data.best_fit([3, 9], 8), "item 1 of size 9"),
        (lambda: data.PackedRows(corpus([4]), length=0), "row length 0"),
        (lambda: data.padded(corpus([3, 9]), 4), "document 1 has 8 pairs"),
        (lambda: data.batches(sources(), batch=6, seed=0, shard=HostShard(0, 4)), "6 rows does not divide over 4"),
        (lambda: data.batches([], batch=6, seed=0), "no sources"),
        (lambda: data.batches(sources(), weights=[1.0], batch=6, seed=0), "one for each of the 2"),
        (lambda: data.batches(sources(), weights=[1.0, 0.0], batch=6, seed=0), "positive"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(data.DataError, match=message):
        call()
