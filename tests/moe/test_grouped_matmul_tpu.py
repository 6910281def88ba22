"""The TPU kernels in Pallas's TPU interpreter: copies that happen only when awaited, memory of NaN, races detected.

`test_grouped_matmul.py` runs them beside the other implementations; here is what only they have: a table of visits,
copies of their own, several tiles and blocks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from moe.kernels.grouped_matmul import pallas_tpu, reference

# A copy that nobody waits for never happens; a buffer read before it is filled gives NaN.
STRICT = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan")
TOLERANCE = {jnp.dtype("float32"): 2e-5, jnp.dtype("bfloat16"): 3e-2}
ROWS, EXPERTS = 200, 7


def draw(rows, experts, k, n, parts, dtype, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((rows, k), (experts, parts, k, n), (rows, parts, n))
    return [jnp.asarray(rng.normal(size=s) / np.sqrt(s[-1]), dtype) for s in shapes]


def calls(lhs, rhs, grad):
    """name -> (arguments before the sizes, options)"""
    found = {"gmm": (lhs, rhs), "gmm_t": (grad, rhs), "tgmm": (lhs, grad)}
    return found | ({"gated": (lhs, rhs)} if rhs.shape[1] == 2 else {})


def product(module, name, **options):
    function = getattr(module, name)
    return functools.partial(function, **options, **(dict(activation="silu") if name == "gated" else {}))


def check(name, got, args, sizes):
    """Against the dense oracle; rows without an expert are poisoned on the way in and zero on the way out."""
    wanted = np.asarray(product(reference, name)(*args, sizes), np.float32)
    scale = max(1.0, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=0, atol=TOLERANCE[got.dtype] * scale)
    if name != "tgmm":
        assert not np.asarray(got[int(np.sum(sizes)) :], np.float32).any()


def poison(args, sizes):
    return [a.at[int(np.sum(sizes)) :].set(jnp.nan) if len(a) == ROWS else a for a in args]


def shrink(monkeypatch, area=None, **constants):
    """Makes pallas_tpu cut small operands into several pieces."""
    if area is not None:
        monkeypatch.setitem(pallas_tpu._TUNING, 128, dataclasses.replace(pallas_tpu._TUNING[128], area=area))
    for constant, value in constants.items():
        monkeypatch.setattr(pallas_tpu, constant, value)


SIZES = st.lists(
    st.sampled_from([0, 0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 48, 64, 90]), min_size=EXPERTS, max_size=EXPERTS
)


PLAN = jax.jit(
    lambda sizes, **static: pallas_tpu.make_plan(sizes, ROWS, 8, **static)[1],
    static_argnames=("most", "every_group", "pairs"),
)


@settings(max_examples=100)
@given(SIZES, st.sampled_from([1, 2]), st.sampled_from([1, 3, 6]), st.booleans())
@example([0] * EXPERTS, 2, 3, False)
@example([0, 0, 0, ROWS, 0, 0, 0], 2, 6, False)
def test_plan_visits_every_row_once(sizes, pairs, grains, every_group):
    """The chunks of a group cover it without overlap, within `most`; head and valid delimit exactly its rows."""
    unit, sizes, most = 8, np.asarray(sizes), grains * pairs
    stop = np.minimum(np.cumsum(sizes), ROWS)
    start = np.concatenate([[0], stop[:-1]])
    plan = pallas_tpu.Plan.of(EXPERTS, ROWS, unit, most)
    table = np.asarray(PLAN(jnp.asarray(sizes, jnp.int32), most=most, every_group=every_group, pairs=pairs))
    chunks, groups, covered = (table[plan.scalar(name)] for name in ("chunks", "groups", "covered"))
    assert covered == -(-stop[-1] // unit)
    assert groups == (EXPERTS if every_group else np.sum(stop > start))
    begin = table[plan.begin :][: groups + 1]
    assert begin[-1] == chunks <= plan.chunks
    fields = {name: table[plan.field(name) :][: chunks + 1] for name in plan._FIELDS}
    assert fields["units"][0] == 0
    assert fields["ordinal"][0] == -1
    for ordinal in range(groups):
        group = table[plan.group + ordinal]
        rows = []
        for c in range(begin[ordinal], begin[ordinal + 1]):
            first, units, head, valid = (fields[name][c + 1] for name in ("first", "units", "head", "valid"))
            assert fields["ordinal"][c + 1] == ordinal
            assert 0 < units <= most
            assert fields["grains"][c + 1] == -(-units // pairs)
            assert head < unit
            assert (first + units) * unit <= ROWS
            rows += range(first * unit + head, first * unit + min(valid, units * unit))
        assert rows == list(range(start[group], stop[group]))


@pytest.mark.parametrize(("name", "dtype"), [("gated", "bfloat16"), ("gmm_t", "float32"), ("tgmm", "bfloat16")])
def test_any_sizes(name, dtype, monkeypatch):
    """Sizes are data: one compiled program, drawn and adversarial sizes. Two blocks of columns, many chunks a group."""
    shrink(monkeypatch, area=256 * 128)
    options = dict(depth=1) if name == "tgmm" else dict(chunk_rows=48)
    lhs, rhs, grad = draw(ROWS, EXPERTS, 128, 256, 2, dtype)
    args = calls(lhs, rhs, grad)[name]
    function = jax.jit(product(pallas_tpu, name, interpret=True, **options))

    @settings(max_examples=15)
    @given(SIZES.filter(lambda sizes: sum(sizes) <= ROWS))
    @example([0] * EXPERTS)
    @example([ROWS, 0, 0, 0, 0, 0, 0])
    @example([0, 0, 0, 0, 0, 0, 1])
    @example([1, 1, 1, 1, 1, 1, 1])  # seven groups in one tile of rows
    @example([3, 100, 0, 5, 8, 1, ROWS - 117])
    def run(sizes):
        sizes = jnp.asarray(sizes, jnp.int32)
        poisoned = poison(args, sizes)
        check(name, function(*poisoned, sizes), args, sizes)

    run()


@pytest.mark.parametrize(
    ("depth", "sizes", "dtype"),
    [(3, [5, 126, 3, 128, 0, 30, 1], "bfloat16"), (1, [7, 250, 2, 0, 36, 0, 3], "float32")],
)
def test_rows_that_would_begin_a_pass_take_the_place_of_the_head(depth, sizes, dtype):
    """Groups whose rows fit their passes of 128 only without the rows before them, in one chunk and in two."""
    rows = 304
    lhs, _, grad = draw(rows, EXPERTS, 128, 128, 2, dtype)
    sizes = jnp.asarray(sizes, jnp.int32)
    _, table = pallas_tpu.make_plan(sizes, rows, 8, depth * 16, every_group=True, pairs=None, fold=128)
    plan = pallas_tpu.Plan.of(EXPERTS, rows, 8, depth * 16)
    assert np.count_nonzero(table[plan.field("spared") :][: plan.chunks + 1])
    past = [a.at[int(jnp.sum(sizes)) :].set(jnp.nan) for a in (lhs, grad)]
    got = np.asarray(jax.jit(product(pallas_tpu, "tgmm", interpret=STRICT, depth=depth))(*past, sizes), np.float32)
    check("tgmm", jnp.asarray(got, dtype), (lhs, grad), sizes)
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found
    # A NaN in the last row, one of those that moved, stays in its group.
    last = int(sizes[0] + sizes[1]) - 1
    hit = jax.jit(product(pallas_tpu, "tgmm", interpret=True, depth=depth))(
        past[0].at[last].set(jnp.nan), past[1], sizes
    )
    assert np.isnan(hit[1].astype(jnp.float32)).all()
    assert np.isfinite(np.delete(np.asarray(hit, np.float32), 1, 0)).all()


# Small enough that the cut has several pieces along each axis: (K, N, parts), what to shrink.
CUTS = {
    "blocks": ((128, 384, 2), dict(area=256 * 128)),
    "tiles": ((256, 384, 1), dict(WEIGHT_BYTES=256 * 128 * 4, ACCUMULATOR_BYTES=4 * 128 * 128, TILE_AREA=128 * 128)),
}


@pytest.mark.parametrize("cut", ["blocks", pytest.param("tiles", marks=pytest.mark.slow)])
def test_strictly(cut, monkeypatch):
    """Every copy awaited, no memory read before it is written, no race: each product, several chunks, blocks, tiles."""
    (k, n, parts), constants = CUTS[cut]
    shrink(monkeypatch, **constants)
    lhs, rhs, grad = draw(ROWS, EXPERTS, k, n, parts, "float32")
    sizes = jnp.asarray([5, 0, 70, 2, 40, 0, 33], jnp.int32)
    for name, args in calls(lhs, rhs, grad).items():
        options = dict(depth=1) if name == "tgmm" else dict(chunk_rows=32)
        got = jax.jit(product(pallas_tpu, name, interpret=STRICT, **options))(*poison(args, sizes), sizes)
        check(name, got, args, sizes)
        assert interpret_pallas_call.races is not None
        assert not interpret_pallas_call.races.races_found, name


def test_the_strict_interpreter_finds_a_missing_wait(monkeypatch):
    """The test above can fail: a kernel that does not wait for its rows multiplies NaN."""
    copy = pallas_tpu._copy
    monkeypatch.setattr(
        pallas_tpu,
        "_copy",
        lambda *args, **kw: None if args[2] == "wait" and args[1] is not None else copy(*args, **kw),
    )
    lhs, rhs, _ = draw(64, 2, 128, 128, 1, "float32")
    sizes = jnp.asarray([20, 30], jnp.int32)
    got = jax.jit(functools.partial(pallas_tpu.gmm, interpret=STRICT))(lhs, rhs, sizes)
    assert not np.isfinite(np.asarray(got)).all()


@pytest.mark.parametrize("name", ["gmm", "tgmm"])
def test_nan_stays_in_its_group(name):
    """A NaN in a row reaches that row, or that expert's gradient, and nothing else: not the neighbours that share its
    tile of rows.
    """
    lhs, rhs, grad = draw(ROWS, EXPERTS, 128, 128, 1, "float32")
    sizes = jnp.asarray([9, 14, 0, 60, 3, 50, 20], jnp.int32)
    args = calls(lhs, rhs, grad)[name]
    function = jax.jit(product(pallas_tpu, name, interpret=True))
    clean = np.asarray(function(*args, sizes))
    for row, expert in ((8, 0), (9, 1), (22, 1), (83, 4), (86, 5)):
        got = np.asarray(function(lhs.at[row].set(jnp.nan), *args[1:], sizes))
        hit = row if name == "gmm" else expert
        assert np.isnan(got[hit]).all()
        np.testing.assert_array_equal(np.delete(got, hit, 0), np.delete(clean, hit, 0))


@pytest.mark.parametrize(
    ("rows", "experts", "k", "n"), [(1, 1, 1, 1), (5, 2, 3, 130), (0, 2, 8, 8), (8, 2, 0, 8), (8, 2, 8, 0)]
)
def test_odd_and_empty_shapes(rows, experts, k, n):
    lhs, rhs, grad = draw(rows, experts, k, n, 2, "float32")
    sizes = jnp.asarray([rows // 2, *[0] * (experts - 1)], jnp.int32).at[-1].add(rows - rows // 2)
    for name, args in calls(lhs, rhs, grad).items():
        check(name, product(pallas_tpu, name, interpret=True)(*args, sizes), args, sizes)
