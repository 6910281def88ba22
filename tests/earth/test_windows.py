"""earth.windows against brute-force loops over the reports, and the promises of the training pipeline."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earth import geometry
from earth.observations import EmptyWindowError, ObservationError, Reports
from earth.protocol import Protocol
from earth.windows import Cycling, Sampling, Stream, StreamConfig, contiguous_folds, dataset, sample, training_times
from moe.sharding import HostShard

EPOCH = 946_684_800  # 2000-01-01 in Unix seconds
VARIABLES = ("2m_temperature", "surface_pressure")


def make_reports(seconds, platform, values=None, *, sensor="station", platforms=3, origin=EPOCH, rng=None) -> Reports:
    """Reports at `seconds` after `origin`; positions wander within a tenth of a degree, values are recognisable."""
    seconds, platform = np.asarray(seconds, np.int64), np.asarray(platform, np.int32)
    order = np.lexsort((seconds, platform))
    n = len(seconds)
    rng = rng or np.random.default_rng(n)
    values = np.arange(2.0 * n).reshape(n, 2) if values is None else np.asarray(values)
    return Reports(
        sensor=sensor,
        variables=VARIABLES,
        platforms=tuple(f"P{i}" for i in range(platforms)),
        platform=platform[order],
        time=origin + seconds[order],
        latitude=20.0 + platform[order] + 0.1 * rng.random(n),
        longitude=120.0 + 0.1 * rng.random(n),
        height=100.0 * platform[order] + rng.random(n),
        values=values[order],
    )


IRREGULAR = st.tuples(
    st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([0, 10 * 365 * 86400]), st.integers(-60, 74 * 60)
)


def irregular(case):
    """(reports, initial time): up to 40 reports at any minute of three days of three platforms, some values missing.

    Half the records lie before 2000, where the seconds are negative. Built in the test, not in the strategy: beartype's
    sampled checks of the reports draw from `random`, which hypothesis forbids while it generates.
    """
    n, seed, before, minutes = case
    rng = np.random.default_rng(seed)
    pairs = np.unique(np.stack([rng.integers(0, 3, n), 60 * rng.integers(0, 72 * 60, n)], 1), axis=0)
    values = np.where(rng.random((len(pairs), 2)) < 0.3, np.nan, rng.normal(size=(len(pairs), 2)))
    origin = EPOCH - before
    reports = make_reports(pairs[:, 1], pairs[:, 0], values, origin=origin, rng=rng)
    return reports, int(origin - EPOCH + 60 * minutes)


FIXED = StreamConfig("station", VARIABLES, slots=(0.0, 1.0, 2.5, 6.0, 24.0), tolerance=1.5, tokens=5)


def latest(reports, platform, after, until):
    """Row of the platform's newest report with after < time <= until, or None: the plain loop."""
    found = None
    for row in range(len(reports)):
        time = reports.time[row] - EPOCH
        if reports.platform[row] == platform and after < time <= until and (found is None or time >= found[1]):
            found = (row, time)
    return None if found is None else found[0]


@given(IRREGULAR)
def test_slots_hold_the_latest_report_and_nothing_later(case):
    reports, t0 = irregular(case)
    got = Stream(reports, FIXED).tokens(t0)
    assert (got["age"] >= 0).all()
    for p in range(3):
        for r, slot in enumerate(FIXED.slots):
            at = t0 - round(slot * 3600)
            row = latest(reports, p, at - FIXED.tolerance * 3600, at)
            if row is None:
                assert not got["mask"][p, r].any()
                assert not got["value"][p, r].any()
                continue
            want = reports.values[row]
            np.testing.assert_array_equal(got["mask"][p, r], np.isfinite(want))
            np.testing.assert_array_equal(got["value"][p, r], np.nan_to_num(want))
            assert got["age"][p, r] == pytest.approx((t0 - (reports.time[row] - EPOCH)) / 3600, abs=1e-5)
            assert slot <= got["age"][p, r] < slot + FIXED.tolerance
        if (reports.platform == p).any():  # the position is one the platform has reported from
            assert got["latitude"][p] in reports.latitude[reports.platform == p].astype(np.float32)
    assert not got["mask"][3:].any()
    assert not got["value"][3:].any()


@given(IRREGULAR, st.randoms(use_true_random=False))
def test_what_comes_after_the_initial_time_cannot_matter(case, random):
    reports, t0 = irregular(case)
    rows = reports.time - EPOCH <= t0
    changed = np.where(rows[:, None], reports.values, np.float32(random.uniform(-9, 9)))
    before, after = (Stream(reports, FIXED, v).tokens(t0) for v in (reports.values, changed))
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


@given(IRREGULAR)
def test_targets_lie_within_half_a_tolerance_of_their_lead(case):
    reports, t0 = irregular(case)
    leads = np.array([0.0, 0.5, 3.0, 12.0])
    got = Stream(reports, FIXED).targets(t0, leads)
    assert got["value"].shape == (4, 5, 2)
    half = FIXED.tolerance * 1800
    for p in range(3):
        for k, lead in enumerate(leads):
            at = t0 + round(lead * 3600)
            row = latest(reports, p, at - half, at + half)
            want = np.full(2, np.nan) if row is None else reports.values[row]
            np.testing.assert_array_equal(got["mask"][k, p], np.isfinite(want))
            np.testing.assert_array_equal(got["value"][k, p], np.nan_to_num(want).astype(np.float32))
    assert not got["mask"][:, 3:].any()


MOVING = StreamConfig("radiosonde", VARIABLES, slots=(0.0,), tolerance=6.0, tokens=4, moving=True)


@given(IRREGULAR)
def test_moving_platforms_give_a_token_a_report(case):
    reports, t0 = irregular(case)
    stream = Stream(reports, MOVING)
    got = stream.tokens(t0)
    inside = (reports.time - EPOCH > t0 - 6 * 3600) & (reports.time - EPOCH <= t0)
    rows = np.flatnonzero(inside)
    seen = got["latitude"] > 0
    assert seen.sum() == min(len(rows), 4)
    assert (got["age"] >= 0).all()
    assert (got["age"] < 6.0).all()
    for i in np.flatnonzero(seen):  # every token is one of the reports, whole
        match = [r for r in rows if np.float32(reports.latitude[r]) == got["latitude"][i]]
        assert any(
            np.array_equal(got["value"][i, 0], np.nan_to_num(reports.values[r]))
            and np.array_equal(got["mask"][i, 0], np.isfinite(reports.values[r]))
            and got["age"][i, 0] == pytest.approx((t0 - reports.time[r] + EPOCH) / 3600, abs=1e-5)
            for r in match
        )
    again = stream.tokens(t0)
    np.testing.assert_array_equal(got["value"], again["value"])
    targets = stream.targets(t0, [0.0, 3.0], queries=50)
    for k, lead in enumerate((0, 3)):
        centre = t0 + lead * 3600
        near = (reports.time - EPOCH > centre - 3 * 3600) & (reports.time - EPOCH <= centre + 3 * 3600)
        assert (targets["latitude"][k] > 0).sum() == near.sum()
        assert targets["mask"][k].sum() == np.isfinite(reports.values[near]).sum()


def test_a_batch_of_times_is_the_loop_over_them(network_record):
    config = StreamConfig("station", VARIABLES, slots=(0.0, 1.0, 24.0), tokens=9)
    stream = Stream(network_record, config)
    times = geometry.seconds(network_record.times)[[30, 100, 555]]
    together, ahead = stream.tokens(times), stream.targets(times, [0.0, 6.0])
    for i, t in enumerate(times):
        for name, value in stream.tokens(t).items():
            np.testing.assert_array_equal(together[name][i], value)
        for name, value in stream.targets(t, [0.0, 6.0]).items():
            np.testing.assert_array_equal(ahead[name][i], value)


def test_window_carries_error_and_view_angle():
    reports = make_reports([0, 3600, 7200], [0, 0, 1])
    errors = np.array([[0.1, 1.0], [0.2, 2.0], [0.3, np.nan]])
    reports = Reports(**{**vars(reports), "error": errors, "view_angle": np.array([1.0, 2.0, 3.0])})
    window = Stream(reports, StreamConfig("station", VARIABLES, slots=(0.0, 1.0), tokens=3)).window(7200 - 1)
    np.testing.assert_allclose(window.error[0], np.array([[0.2, 2.0], [0.1, 1.0]]), rtol=1e-6)
    assert not window.error[1:].any(), "the report of platform 1 comes a second later"
    assert window.view_angle[0] == 2.0


def test_empty_window_is_an_error_that_says_when():
    stream = Stream(make_reports([0], [0]), FIXED)
    with pytest.raises(EmptyWindowError, match=r"25\.5 h before 2000-03-01"):
        stream.window(60 * 86400)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variables": ()}, "no variables"),
        ({"slots": (1.0, 2.0)}, "must rise from 0"),
        ({"slots": (0.0, 6.0, 3.0)}, "must rise from 0"),
        ({"slots": ()}, "must rise from 0"),
        ({"moving": True}, r"slots must be \(0\.0,\)"),
        ({"instruments": (("2m_temperature", "wind"),)}, r"\['wind'\]"),
        ({"tolerance": 0.0}, "tolerance 0"),
        ({"tokens": 0}, "tokens 0"),
    ],
)
def test_stream_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        StreamConfig(**({"sensor": "station", "variables": VARIABLES} | changes))


def test_more_platforms_than_tokens_is_an_error():
    with pytest.raises(ObservationError, match="tokens=3"):
        Stream(make_reports([0, 0, 0], [0, 1, 2]), StreamConfig("station", VARIABLES, tokens=2))


@pytest.mark.parametrize("strata", [(), ((),), ((1.0,), (-3.0,))])
def test_sampling_refuses(strata):
    with pytest.raises(ValueError, match="strata"):
        Sampling(strata)


# --- the pipeline


@pytest.fixture(scope="module")
def streams(network_record):
    config = StreamConfig("station", VARIABLES, slots=(0.0, 3.0), tokens=7)
    return {"station": Stream(network_record, config)}


@pytest.fixture(scope="module")
def times(network_record):
    return geometry.seconds(network_record.times)[30:200]


def batches(streams, times, count, cycling=None, **changes):
    arguments = {"batch": 8, "seed": 3} | changes
    folds = np.arange(len(times)) % 4
    sampling = Sampling(((0.0, 1.0), (3.0, 6.0, 12.0)), cycling=cycling or Cycling())
    it = iter(dataset(streams, times, folds, sampling, **arguments))
    return it, [next(it) for _ in range(count)]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_batches_hold_what_the_streams_say(streams, times):
    _, [first, *_] = batches(streams, times, 1)
    assert set(first["time"]) <= set(times)
    np.testing.assert_array_equal(first["fold"], (first["time"] - times[0]) // 3600 % 4)
    assert (first["leads"] == first["leads"][:1]).all()
    assert first["leads"][0, 0] in (0, 1)
    assert first["leads"][0, 1] in (3, 6, 12)
    same(first, sample(streams, first["time"], first["leads"][0], fold=first["fold"]))


def test_a_resumed_iterator_goes_on_bit_for_bit(streams, times):
    it, _ = batches(streams, times, 5)
    state = it.get_state()
    want = [next(it) for _ in range(30)]  # into the second epoch: 170 times are 21 batches
    fresh, _ = batches(streams, times, 0)
    fresh.set_state(state)
    got = [next(fresh) for _ in range(30)]
    for a, b in zip(want, got, strict=True):
        same(a, b)
    assert {float(b["leads"][0, 1]) for b in want} == {3.0, 6.0, 12.0}


def test_an_epoch_sees_every_time_once_and_epochs_differ(streams, times):
    _, seen = batches(streams, times[:64], 16)
    one, two = (np.concatenate([b["time"] for b in part]) for part in (seen[:8], seen[8:]))
    np.testing.assert_array_equal(np.sort(one), times[:64])
    np.testing.assert_array_equal(np.sort(two), times[:64])
    assert (one != two).any()
    assert (one != np.concatenate([b["time"] for b in batches(streams, times[:64], 8, seed=4)[1]])).any()


def test_hosts_partition_every_batch_and_share_its_leads(streams, times):
    _, whole = batches(streams, times, 4)
    parts = [batches(streams, times, 4, shard=HostShard(i, 2))[1] for i in (0, 1)]
    for step, full in enumerate(whole):
        mine, yours = parts[0][step], parts[1][step]
        assert len(mine["time"]) == len(yours["time"]) == 4
        assert not set(mine["time"]) & set(yours["time"])
        assert set(mine["time"]) | set(yours["time"]) == set(full["time"])
        for other in (yours, full):
            np.testing.assert_array_equal(mine["leads"][0], other["leads"][0])
        same(jax.tree.map(lambda a, b: np.concatenate([a, b]), mine, yours), full)  # the rows keep their order


CHAIN = Cycling(cycles=2, hours=1.5, spin_up=1, rollout=1)


def test_a_chain_adds_the_windows_before_and_the_targets_of_each_step(streams, times):
    it, [first, *_] = batches(streams, times, 3, CHAIN)
    _, [bare, *_] = batches(streams, times, 1)
    assert CHAIN.offsets == (-3.0, -1.5)
    assert CHAIN.steps == (0.0, 1.5, 3.0)  # the first analysis spins up, the last one is rolled out
    assert set(first) - set(bare) == {"windows", "steps"}
    same({k: first[k] for k in bare}, bare)  # what was there before is the same, bit for bit
    got, target = first["windows"]["station"], first["steps"]["station"]
    stream = streams["station"]
    for i, t in enumerate(first["time"]):
        for k, hours in enumerate(CHAIN.offsets):
            for name, value in stream.tokens(int(t) + round(hours * 3600)).items():
                np.testing.assert_array_equal(getattr(got, name)[i, k], value)
        for name, value in stream.targets(int(t), CHAIN.steps).items():
            np.testing.assert_array_equal(getattr(target, name)[i], value)
    state = it.get_state()
    want = [next(it) for _ in range(4)]
    fresh, _ = batches(streams, times, 0, CHAIN)
    fresh.set_state(state)
    for batch in want:
        same(next(fresh), batch)
    parts = [batches(streams, times, 1, CHAIN, shard=HostShard(i, 2))[1][0] for i in (0, 1)]
    same(jax.tree.map(lambda a, b: np.concatenate([a, b]), *parts), first)


def test_a_roll_out_without_cycles_needs_no_earlier_window(streams, times):
    chain = Cycling(rollout=2, hours=3.0)
    assert chain.active
    assert (chain.before, chain.after, chain.steps) == (0.0, 9.0, (3.0, 6.0, 9.0))
    batch = sample(streams, times[:2], [3.0], cycling=chain)
    assert "windows" not in batch
    assert batch["steps"]["station"].value.shape == (2, 3, 7, 2)
    assert (Cycling().before, Cycling().after, Cycling().active) == (0.0, 0.0, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cycles": -1}, "cycles -1"),
        ({"rollout": -2}, "rollout -2"),
        ({"cycles": 1, "hours": 0.0}, "hours 0"),
        ({"cycles": 1, "hours": float("nan")}, "hours nan"),
        ({"cycles": 2, "spin_up": 3}, "between 0 and cycles 2"),
    ],
)
def test_cycling_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        Cycling(**changes)


def test_dataset_refuses(streams, times):
    with pytest.raises(EmptyWindowError, match="no initial time"):
        batches(streams, times[:0], 0)
    with pytest.raises(ValueError, match="8 does not divide over 3 hosts"):
        batches(streams, times, 0, shard=HostShard(0, 3))


def test_folds_are_blocks():
    times = np.arange(0, 100 * 86400, 3600, dtype=np.int32)
    folds = contiguous_folds(times, 4)
    assert set(folds) == {0, 1, 2, 3}
    changes = np.flatnonzero(np.diff(folds))
    np.testing.assert_array_equal(changes + 1, np.array([20, 40, 60, 80]) * 24)


@pytest.mark.parametrize("days", [[(0, 31), (181, 212)], [(0, 23)], [(0, 3)]])
def test_every_fold_gets_a_block_of_a_short_or_broken_record(days):
    times = np.concatenate([np.arange(a * 24, b * 24) for a, b in days]).astype(np.int32) * 3600
    counts = np.bincount(contiguous_folds(times, 4), minlength=4)
    assert counts.min() > 0.1 * len(times)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 3.0]), st.booleans(), st.integers(0, 3), st.integers(0, 2))
def test_training_times_touch_no_protocol_hour(seed, cadence, bounded, cycles, rollout):
    """Every report that a window or target of a sample at a training time can read is itself a training report."""
    chain = Cycling(cycles, 2.0, 0, rollout)
    rng = np.random.default_rng(seed)
    steps = np.arange(0, 40 * 24, cadence) * 3600
    # Half the reports come up to half a step early, so that windows reach between the hours.
    jitter = np.where(rng.random((2, len(steps))) < 0.5, rng.integers(0, int(cadence * 1800), (2, len(steps))), 0)
    jitter[:, 0] = 0
    seconds = (steps - jitter).reshape(-1)
    reports = make_reports(seconds.astype(np.int64), np.repeat([0, 1], len(steps)), platforms=2)
    day = np.datetime64("2000-01-01") + np.sort(rng.choice(np.arange(3, 37), 4, replace=False))
    gap = np.timedelta64(int(rng.integers(7, 30)), "h")
    protocol = Protocol(
        "test",
        test=[(day[0], day[0] + gap)],
        validation=[(day[3], day[3] + np.timedelta64(9, "h"))] if day[3] >= day[0] + gap else [],
        train=[("2000-01-01", day[0])] if bounded else None,
    )
    config = StreamConfig("station", VARIABLES, slots=(0.0, cadence, 12.0), tolerance=cadence, tokens=2)
    foreign = protocol.role(reports.times) != "train"
    stream = Stream(reports, config, np.repeat(foreign[:, None], 2, 1).astype(np.float32))
    got = training_times(
        reports, protocol, span_hours=12.0, longest_lead=6.0, every_hours=cadence, streams={"station": stream},
        cycling=chain,
    )  # fmt: skip
    assert len(got)
    batch = sample({"station": stream}, got, [0.0, 3.0, 6.0], cycling=chain)
    for part in {"tokens", "windows", "targets", "steps"} & set(batch):
        assert not batch[part]["station"].value.any(), part
    again = training_times(
        reports, protocol, span_hours=12.0, longest_lead=6.0, streams={"station": stream}, cycling=chain, candidates=got
    )
    np.testing.assert_array_equal(again, got)
    # And it is not needlessly strict: a time whose whole closed span is clear of the protocol is there.
    reach = int(12 + cadence + chain.before)
    ahead = int(max(6, chain.after) + cadence)
    at = np.arange(0, 40 * 24, cadence) * 3600 + round(
        (12 + chain.before) * 3600
    )  # the grid starts a span after the record
    full = at[(at >= reach * 3600) & (at < (39 * 24 - ahead) * 3600)]
    at = geometry.datetimes(full.astype(np.int32))
    hour = np.timedelta64(3600, "s")
    ok = protocol.clear(at - reach * hour, at + ahead * hour)
    assert set(full[ok].astype(int)) <= set(got.tolist())


@pytest.mark.parametrize("hosts", [1, 2])
def test_partners_share_the_time_of_day(hosts):
    seconds = np.tile(np.arange(0, 240) * 3600, 2)
    reports = make_reports(seconds, np.repeat([0, 1], 240))
    times = (np.arange(24, 200) * 3600).astype(np.int32)
    folds = (times // 86400 % 2).astype(np.int32)
    sampling = Sampling(((0.0, 3.0),), partners=True)
    parts = []
    for host in range(hosts):
        batches = iter(
            dataset(
                {"station": Stream(reports, FIXED)},
                times,
                folds,
                sampling,
                batch=8,
                seed=3,
                shard=HostShard(host, hosts),
            )
        )
        parts.append([next(batches) for _ in range(6)])
    first, found = [], set()
    for k in range(6):
        time = np.concatenate([p[k]["time"] for p in parts])
        np.testing.assert_array_equal(time % 86400, time[::-1] % 86400)
        np.testing.assert_array_equal(np.concatenate([p[k]["fold"] for p in parts]), time // 86400 % 2)
        assert np.isin(time, times).all()
        first += list(time[:4])
        found |= set((time[:4] - time[::-1][:4]) // 86400)
    assert len(found) > 4, "partners come from many days"
    assert len(set(first)) == len(first), "the first half follows the shuffle"
