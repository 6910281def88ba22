"""The grouped products as Pallas kernels for TPUs (Mosaic). Written for v5e, v5p, v6e.

No TPU was at hand. The kernels are correct in Pallas's TPU interpreter and compile with the real compiler, and their
schedules were read (`python -m tests.benchmarks.tpu_schedule`). **None was ever run or timed on one.**

What a raster of row tiles loses (megablox), it loses between tiles: a tile that several groups share is computed whole
for each. Here no row is computed twice, except to complete a tile of 8 rows in memory:

- The row products (gmm, gmm_t, gated) go through *chunks*: up to 160 rows (v6e: 320) of one group, in an order that a
  small table gives, made by XLA from the sizes. A chunk starts at its group's first tile of 8 rows, wherever that is.
- Straight code exists for every multiple of 16 rows (v6e: 32), all of the contracted axis, and as many columns as keep
  the program short; matrix units wait some 170 cycles to fill and drain it, so chunks of a group are few and even.
- Copies are the kernel's own. Weights of a group come once, up to three groups ahead, so that small groups' weights
  arrive while a large group is computed. The rows of the next chunk come while this one is computed.
- A tile of rows that two groups share is kept (`carry`) and written again by the next group; stores to the same rows
  follow each other. Rows without an expert are filled with zeros at the end.
- tgmm contracts rows, and the matrix units contract 128 at once: a group of n rows costs ceil(n / 128) passes, wherever
  it starts: rows that would begin a pass of their own take the place of those before the group in its first tile.
  That bounds the use of any kernel: 0.816 and 0.815 at 32,768 rows over 128 experts (multinomial, Zipf 0.7), 0.680 at
  half of them. No pass can serve two groups: from sums over both, neither can be had back.

Operands whose K or N is no multiple of 128, or M none of 8, are padded (copied) first.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe.kernels.grouped_matmul.blocked import varying_like
from moe.kernels.grouped_matmul.shapes import ACTIVATIONS

LANES = 128
# Passes of LANES rows that tgmm contracts in one go: 3 take 37,000 bundles (v5e, 2 x 2,048 x 768), and 0.784 of the
# units where 2 take 19,000 and 0.774.
DEPTH = 3
# One group's weights in VMEM (Qwen3-30B-A3B's gate and up: 6.3 MB), and how many groups' are there at once.
WEIGHT_BYTES = 7_000_000
WEIGHT_RING = 4
# float32 sums of tgmm in VMEM, and how many of them one stretch of straight code computes: each waits 320 cycles
# (v5e; one pass of 2 x 2,048 x 768 takes 6,144) to fill and drain the units.
ACCUMULATOR_BYTES = 14_000_000
TILE_AREA = 3_200_000
# VMEM for what Mosaic adds of its own.
VMEM_SLACK = 8 << 20

# None: compiled where lowered for a TPU, interpreted elsewhere.
Interpret = bool | pltpu.InterpretParams | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Offsets of the tables in the one int32 array that a kernel finds in scalar memory.

    Groups that are visited are numbered densely: their `group`, and `begin`, the first chunk (one entry more: the end).
    Of a chunk: `ordinal`, the number of its group; `first`, the unit of rows it starts at; `units`, how many it has;
    `grains`, the same in pairs; `head`, rows of the first unit that precede the group; `valid`, rows from its first to
    the group's end; `spared`, the group's last rows, in unit `spare`, that take the place of the head (`make_plan`'s
    fold). Entry c + 1 of these is chunk c; before the first stands a chunk of nothing.
    """

    experts: int
    chunks: int

    _SCALARS = ("chunks", "groups", "covered")
    _FIELDS = ("ordinal", "first", "units", "grains", "head", "valid", "spare", "spared")

    @classmethod
    def of(cls, experts: int, rows: int, unit: int, most: int) -> "Plan":
        """Room for any sizes: a group's chunks are all but one full, and the rows it shares cost it two units."""
        return cls(experts, rows // (unit * most) + 2 * experts + 1)

    def scalar(self, name: str) -> int:
        return self._SCALARS.index(name)

    @property
    def group(self) -> int:
        return len(self._SCALARS)

    @property
    def begin(self) -> int:
        return self.group + self.experts

    def field(self, name: str) -> int:
        return self.begin + self.experts + 1 + self._FIELDS.index(name) * (self.chunks + 1)


def _unit(dtype: jax.typing.DTypeLike) -> int:
    """Rows that copies start and end at: a tile of the operand in HBM."""
    return 8 if jnp.dtype(dtype).itemsize > 1 else 32


def _grain(dtype: jax.typing.DTypeLike) -> int:
    """Rows that the matrix units take at once."""
    return max(16, _unit(dtype))


def _running_sum(a: jax.Array) -> jax.Array:
    """As jnp.cumsum, in one fusion for the few numbers there are (one per expert)."""
    at = jnp.arange(len(a))
    return jnp.sum(jnp.where(at <= at[:, None], a, 0), 1, dtype=jnp.int32)


def make_plan(
    sizes: jax.Array,
    rows: int,
    unit: int,
    most: int,
    *,
    every_group: bool,
    pairs: int | None,
    fold: int | None = None,
) -> tuple[Plan, jax.Array]:
    """Splits every group into chunks of at most `most` units of `unit` rows.

    Args:
        every_group: groups without rows are visited too.
        pairs: chunks of a group differ as little as sizes in multiples of `pairs` units allow, the last may have fewer;
            None: all but the last have `most`.
        fold: rows of a pass. Where the last unit of a group would begin a pass although its rows fit the place that
            the head leaves, the first chunk takes them there. Their order means nothing to a sum.
    """
    experts = len(sizes)
    plan = Plan.of(experts, rows, unit, most)
    stop = jnp.minimum(_running_sum(sizes), rows)
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), stop[:-1]])
    group = jnp.arange(experts, dtype=jnp.int32)
    groups = jnp.full((), experts, jnp.int32)
    if not every_group:
        full = stop > start
        groups = jnp.sum(full, dtype=jnp.int32)
        here = full & (_running_sum(full.astype(jnp.int32)) - 1 == group[:, None])
        group, start, stop = (jnp.sum(jnp.where(here, x, 0), 1, dtype=jnp.int32) for x in (group, start, stop))
    first = start // unit
    units = jnp.where(stop > start, -(-stop // unit) - first, 0)
    spared = jnp.zeros_like(units)
    if fold is not None:
        passes = -(-(stop - start) // fold)
        spared = jnp.maximum(stop - first * unit - passes * fold, 0)
        units = jnp.minimum(units, passes * (fold // unit))
    chunks = -(-units // most)
    end = _running_sum(chunks)

    chunk = jnp.arange(plan.chunks, dtype=jnp.int32)
    mine = (chunk[:, None] >= end - chunks) & (chunk[:, None] < end)

    def of_group(x):
        return jnp.sum(jnp.where(mine, x, 0), 1, dtype=jnp.int32)

    index = chunk - of_group(end - chunks)
    if pairs is None:
        offset, size = index * most, most
    else:
        grains = -(-units // pairs)
        each = of_group(grains // jnp.maximum(chunks, 1))
        extra = of_group(grains) - each * of_group(chunks)
        offset, size = pairs * (index * each + jnp.minimum(index, extra)), pairs * (each + (index < extra))
    size = jnp.minimum(size, of_group(units) - offset)
    at = of_group(first) + offset
    fields = {
        "ordinal": of_group(jnp.arange(experts, dtype=jnp.int32)),
        "first": at,
        "units": size,
        "grains": -(-size // (pairs or 1)),
        "head": jnp.maximum(of_group(start) - at * unit, 0),
        "valid": of_group(stop) - at * unit,
        "spare": at + of_group(units),
        "spared": jnp.where(index == 0, of_group(spared), 0),
    }
    nothing = {"ordinal": -1}
    covered = jnp.max(-(-stop // unit))
    table = [jnp.stack([end[-1], groups, covered]), group, end - chunks, end[-1:]]
    for name in Plan._FIELDS:
        table += [jnp.full(1, nothing.get(name, 0), jnp.int32), fields[name]]
    return plan, jnp.concatenate(table).astype(jnp.int32)


def _loop(trips, body: Callable[[jax.Array], None], first: jax.Array | int = 0) -> None:
    def step(i, nothing):
        body(i)
        return nothing

    lax.fori_loop(first, trips, step, ())


def _select(value, low: int, high: int, body: Callable[[int], None]) -> None:
    """body(value) with `value`, in [low, high], made static: a tree of branches.

    `lax.switch` lowers to one branch nested in the next; ten of them overflow the stack of Mosaic's layout pass.
    """
    if low == high:
        return body(low)
    middle = low + 2 * (high - low) // 3  # large chunks are the usual ones: fewer branches for them
    lax.cond(
        value <= middle,
        lambda: _select(value, low, middle, body),
        lambda: _select(value, middle + 1, high, body),
    )


def _copy(copy: Callable[..., list], units, action: str, *, exact: bool) -> None:
    """Starts or awaits the copies of `units` units; copy(offset, size) names those of a stretch.

    On a TPU one copy's size may be known at run time only. Interpret mode wants it static: there unit by unit.
    """

    def act(offset, size):
        for one in copy(offset, size):
            getattr(one, action)()

    if exact or isinstance(units, int):
        act(0, units)
    else:
        _loop(units, lambda i: act(i, 1))


def _rows(units: Any, size: Any, unit: int):
    start = units * unit
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, unit), size * unit)


def _lanes(index: Any, width: int):
    return pl.ds(pl.multiple_of(index * width, LANES), width)


def _row_kernel(table, lhs, rhs, out, x, w, y, carry, x_sem, w_sem, y_sem, *, plan, product, tiling, transposed, exact):
    """All chunks of rows, one after the other: lhs [L, M, C], rhs [E, P, K, N] and out [Q, M, W] are in HBM."""
    tile = pl.program_id(0)
    parts, outputs, ring = x.shape[1], y.shape[1], w.shape[0]
    unit, grain, most = tiling.unit, tiling.grain, tiling.most
    body_columns, trips = tiling.body_columns, tiling.trips
    chunks, groups, covered = (table[plan.scalar(name)] for name in ("chunks", "groups", "covered"))

    def field(name, chunk):
        return table[plan.field(name) + 1 + chunk]

    def act(copies, action):
        copy, units = copies
        _copy(copy, units, action, exact=exact)

    def weights(ordinal):
        at = _lanes(tile, tiling.columns)
        group, slot = table[plan.group + ordinal], ordinal & (ring - 1)
        source = (
            rhs.at[group]
            if tiling.tiles == 1
            else rhs.at[(group, slice(None), *(at, slice(None))[:: 1 if transposed else -1])]
        )
        return pltpu.make_async_copy(source, w.at[slot], w_sem.at[slot])

    def fetches(chunk, slot):
        first = field("first", chunk)

        def copy(offset, size):
            rows, there = _rows(first + offset, size, unit), _rows(offset, size, unit)
            return [pltpu.make_async_copy(lhs.at[p, rows], x.at[slot, p, there], x_sem.at[slot]) for p in range(parts)]

        return copy, field("units", chunk)

    def stores(first, units, slot, block):
        at = _lanes(tile * trips + block, body_columns)

        def copy(offset, size):
            rows, there = _rows(first + offset, size, unit), _rows(offset, size, unit)
            return [
                pltpu.make_async_copy(y.at[slot, q, there], out.at[q, rows, at], y_sem.at[slot]) for q in range(outputs)
            ]

        return copy, units

    @pl.when(chunks > 0)
    def _():
        act(fetches(0, 0), "start")

    _loop(jnp.minimum(ring - 1, groups), lambda ordinal: weights(ordinal).start())

    def variant(grains, chunk):
        m = grains * grain
        # Rows in which the group may end.
        open_rows = m if grains == tiling.least else grain
        units, before = field("units", chunk), field("units", chunk - 1)
        slot, ordinal = chunk & 1, field("ordinal", chunk)
        opens = ordinal != field("ordinal", chunk - 1)
        head, valid, first = field("head", chunk), field("valid", chunk), field("first", chunk)

        def block(i):
            y_slot = (chunk * trips + i) & 1
            if trips > 1:
                # The store two blocks ago: it frees the buffer, and whatever this block will overwrite has arrived.
                act(stores(0, jnp.where(i < 2, before, units), y_slot, 0), "wait")

            @pl.when((i == 0) & (chunk + 1 < chunks))
            def _():
                act(fetches(chunk + 1, 1 - slot), "start")

            at = _lanes(i, body_columns)
            row = lax.broadcasted_iota(jnp.int32, (open_rows, body_columns), 0)
            for q, value in enumerate(product(lambda p: x[slot, p, pl.ds(0, m)], w, ordinal & (ring - 1), at)):
                top = jnp.where(row[:unit] < head, carry[q, :, at], value[:unit])
                if open_rows < m:
                    y[y_slot, q, pl.ds(0, m - open_rows)] = value[: m - open_rows].astype(y.dtype)
                    y[y_slot, q, pl.ds(0, unit)] = top.astype(y.dtype)
                    tail = value[m - open_rows :]
                else:
                    tail = jnp.concatenate([top, value[unit:]])
                tail = jnp.where(row < valid - (m - open_rows), tail, 0)
                y[y_slot, q, pl.ds(m - open_rows, open_rows)] = tail.astype(y.dtype)
                # The group's last tile of rows, which the next group may go on writing.
                ends = [tail[k : k + unit] for k in range(0, open_rows, unit)]
                which = (units - 1) - (m - open_rows) // unit
                carry[q, :, at] = functools.reduce(
                    lambda a, k: jnp.where(which == k, ends[k], a), range(1, len(ends)), ends[0]
                )

            # Here, not at the beginning: loads of weights could not be moved across it.
            @pl.when((i == 0) & opens & (ordinal + ring - 1 < groups))
            def _():
                weights(ordinal + ring - 1).start()

            if trips == 1:
                act(stores(0, before, 1 - y_slot, 0), "wait")
            act(stores(first, units, y_slot, i), "start")

        _loop(trips, block)

    def one(chunk):
        ordinal = field("ordinal", chunk)

        @pl.when(ordinal != field("ordinal", chunk - 1))
        def _():
            weights(ordinal).wait()

        act(fetches(chunk, chunk & 1), "wait")
        grains = jnp.maximum(field("grains", chunk), tiling.least)
        _select(grains, tiling.least, most // tiling.pairs, lambda grains: variant(grains, chunk))

    _loop(chunks, one)

    for last in (2, 1) if trips > 1 else (1,):
        act(stores(0, field("units", chunks - 1), (chunks * trips - last) & 1, 0), "wait")
    left = out.shape[1] // unit - covered
    at_once = min(most, out.shape[1] // unit)

    @pl.when(left > 0)
    def _():
        for q in range(outputs):
            y[0, q] = jnp.zeros(y.shape[2:], y.dtype)
        whole = lax.div(left, jnp.int32(at_once))
        rest = left - whole * at_once

        def clear(action):
            def column(i):
                _loop(whole, lambda j: act(stores(covered + j * at_once, at_once, 0, i), action))

                @pl.when(rest > 0)
                def _():
                    act(stores(covered + whole * at_once, rest, 0, i), action)

            _loop(trips, column)

        clear("start")
        clear("wait")


def _divisor(width: int, most: int) -> int:
    """The largest multiple of LANES that divides `width` and is at most `most`; LANES at least."""
    return max([d for d in range(LANES, width + 1, LANES) if width % d == 0 and d <= most], default=LANES)


def _pad_to(a: jax.Array, multiples: dict[int, int]) -> jax.Array:
    pads = [(0, -size % multiples.get(axis, 1)) for axis, size in enumerate(a.shape)]
    return jnp.pad(a, pads) if any(after for _, after in pads) else a


def _launch(call: Callable[..., Callable], interpret, *operands: jax.Array) -> jax.Array:
    if interpret is not None:
        return call(interpret)(*operands)
    return lax.platform_dependent(*operands, tpu=call(False), default=call(True))


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def _gmm_product(x, w, slot, at):
    return [_dot(x(0), w[slot, p, :, at], (1, 0)) for p in range(w.shape[1])]


def _gated_product(x, w, slot, at, *, activation):
    gate, up = _gmm_product(x, w, slot, at)
    return [ACTIVATIONS[activation](gate) * up]


def _gmm_t_product(x, w, slot, at):
    return [functools.reduce(jnp.add, [_dot(x(p), w[slot, p, at, :], (1, 1)) for p in range(w.shape[1])])]


@dataclasses.dataclass(frozen=True)
class RowTiling:
    """How a row product is cut.

    Attributes:
        unit: rows that copies start and end at.
        grain: rows that sizes of straight code go by.
        least: grains of the smallest straight code; fewer rows take as long.
        most: units of the largest chunk.
        columns: of the output whose weights are in VMEM at once; `tiles` of them make the whole.
        body_columns: of those, what one stretch of straight code computes; it runs `trips` times for a chunk.
    """

    unit: int
    grain: int
    least: int
    most: int
    columns: int
    body_columns: int
    tiles: int

    @property
    def trips(self) -> int:
        return self.columns // self.body_columns

    @property
    def pairs(self) -> int:
        return self.grain // self.unit


@dataclasses.dataclass(frozen=True)
class _Tuning:
    """What fits a width of matrix units; any choice computes the same.

    Attributes:
        grain: rows.
        least_rows: as many as one matrix takes to be loaded; fewer cost the same.
        least_rows_transposed: the same where it is transposed (v5e: 32 and 48 rows took as long as 64).
        chunk_rows: of the largest chunk.
        area: C x columns of one stretch of straight code: its length, and with it that of the program. On v5e each
            stretch waits 220 cycles; gate and up in one of 3.1 M instead of two (40,000 bundles instead of 24,000)
            took gmm_t's use from 0.878 to 0.913.
    """

    grain: int
    least_rows: int
    least_rows_transposed: int
    chunk_rows: int
    area: int


_TUNING = {128: _Tuning(16, 32, 64, 160, 3_200_000), 256: _Tuning(32, 128, 128, 320, 3_300_000)}


def _target() -> tuple[_Tuning, int]:
    """(tuning, cores that share a kernel), by the mesh in use (`jax.set_mesh`) or the process's own devices.

    v5e's if neither is a TPU: interpreted, or lowered for one that only the compiler will know. Never decides meaning.
    """
    try:
        info = pltpu.get_tpu_info()
        return _TUNING[info.mxu_column_size], info.num_cores
    except ValueError:
        return _TUNING[128], 1


def row_tiling(
    rows: int,
    inner: int,
    width: int,
    parts: int,
    dtype: jax.typing.DTypeLike,
    *,
    transposed: bool = False,
    chunk_rows: int | None = None,
) -> RowTiling:
    """The cut of [rows, inner] x [parts, inner, width], all padded.

    Args:
        transposed: the weights come as [parts, width, inner].
    """
    tuning, cores = _target()
    unit, itemsize = _unit(dtype), jnp.dtype(dtype).itemsize
    grain = max(tuning.grain, unit)
    # Each core takes tiles of its own.
    columns = _divisor(width, min(max(LANES, width // cores), WEIGHT_BYTES // (parts * inner * itemsize)))
    body_columns = _divisor(columns, tuning.area // (inner * parts))
    grains = -(-min(chunk_rows or tuning.chunk_rows, rows) // grain)
    least_rows = tuning.least_rows_transposed if transposed else tuning.least_rows
    least = min(grains, max(1, least_rows // grain))
    return RowTiling(unit, grain, least, grains * grain // unit, columns, body_columns, width // columns)


def _row_products(name, lhs, rhs, sizes, product, *, transposed, outputs, chunk_rows, interpret) -> jax.Array:
    """lhs [L, M, C], rhs [E, P, K, N] -> [outputs, M, W]; C and W are K and N, or N and K when transposed."""
    lhs, rhs, sizes = (varying_like(a, lhs, rhs, sizes) for a in (lhs, rhs, sizes))
    parts_in, rows, width = len(lhs), lhs.shape[1], rhs.shape[2 if transposed else 3]
    shape = (outputs, rows, width)
    if not math.prod(shape) or not rhs.size:
        return varying_like(jnp.zeros(shape, lhs.dtype), lhs, rhs, sizes)
    unit = _unit(lhs.dtype)
    lhs, rhs = _pad_to(lhs, {1: unit, 2: LANES}), _pad_to(rhs, {2: LANES, 3: LANES})
    parts, (padded_rows, inner), padded_width = rhs.shape[1], lhs.shape[1:], rhs.shape[2 if transposed else 3]
    tiling = row_tiling(
        padded_rows, inner, padded_width, parts, lhs.dtype, transposed=transposed, chunk_rows=chunk_rows
    )
    columns, itemsize = tiling.columns, lhs.dtype.itemsize
    plan, table = make_plan(sizes, rows, unit, tiling.most, every_group=False, pairs=tiling.pairs)
    ring = WEIGHT_RING if len(sizes) > 2 else 2
    block = (parts, columns, inner) if transposed else (parts, inner, columns)
    scratch = [
        pltpu.VMEM((2, parts_in, tiling.most * unit, inner), lhs.dtype),
        pltpu.VMEM((ring, *block), rhs.dtype),
        pltpu.VMEM((2, outputs, tiling.most * unit, tiling.body_columns), lhs.dtype),
        pltpu.VMEM((outputs, unit, columns), jnp.float32),
    ]
    vmem = sum(math.prod(s.shape) * s.dtype.itemsize for s in scratch)
    vmem += 4 * tiling.most * unit * tiling.body_columns * max(parts, outputs)
    flops = 2 * padded_rows * inner * parts * padded_width
    touched = lhs.size * tiling.tiles + rhs.size + outputs * padded_rows * padded_width

    def call(interpret) -> Callable[..., jax.Array]:
        kernel = functools.partial(
            _row_kernel, plan=plan, product=product, tiling=tiling, transposed=transposed, exact=interpret is False
        )

        def run(table, lhs, rhs):
            return pl.pallas_call(
                kernel,
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=1,
                    grid=(tiling.tiles,),
                    in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
                    out_specs=pl.BlockSpec(memory_space=pl.ANY),
                    scratch_shapes=[
                        *scratch,
                        pltpu.SemaphoreType.DMA((2,)),
                        pltpu.SemaphoreType.DMA((ring,)),
                        pltpu.SemaphoreType.DMA((2,)),
                    ],
                ),
                out_shape=jax.ShapeDtypeStruct(
                    (outputs, padded_rows, padded_width), lhs.dtype, manual_axis_type=jax.typeof(lhs).mat
                ),
                compiler_params=pltpu.CompilerParams(
                    dimension_semantics=("parallel",),
                    vmem_limit_bytes=vmem + VMEM_SLACK,
                    disable_bounds_checks=True,
                ),
                cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=touched * itemsize),
                interpret=interpret,
                name=name,
            )(table, lhs, rhs)

        return run

    return _launch(call, interpret, table, lhs, rhs)[:, :rows, :width]


def gmm(
    lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, chunk_rows: int | None = None, interpret: Interpret = None
) -> jax.Array:
    """lhs [M, K], rhs [E, P, K, N] -> [M, P, N]: row m times every part of its expert's matrix."""
    out = _row_products(
        "grouped_matmul",
        *(lhs[None], rhs, sizes, _gmm_product),
        **dict(transposed=False, outputs=rhs.shape[1], chunk_rows=chunk_rows, interpret=interpret),
    )
    return jnp.swapaxes(out, 0, 1)


def gated(
    lhs: jax.Array,
    rhs: jax.Array,
    sizes: jax.Array,
    *,
    activation: str,
    chunk_rows: int | None = None,
    interpret: Interpret = None,
) -> jax.Array:
    """lhs [M, K], rhs [E, 2, K, N] -> [M, N]: act(lhs @ rhs[e, 0]) * (lhs @ rhs[e, 1]), rounded once at the end."""
    product = functools.partial(_gated_product, activation=activation)
    return _row_products(
        "gated_grouped_matmul",
        *(lhs[None], rhs, sizes, product),
        **dict(transposed=False, outputs=1, chunk_rows=chunk_rows, interpret=interpret),
    )[0]


def gmm_t(
    lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, chunk_rows: int | None = None, interpret: Interpret = None
) -> jax.Array:
    """lhs [M, P, N], rhs [E, P, K, N] -> [M, K]: sum over parts of lhs[:, p] @ rhs[e, p].T."""
    return _row_products(
        "grouped_matmul_transposed",
        *(jnp.swapaxes(lhs, 0, 1), rhs, sizes, _gmm_t_product),
        **dict(transposed=True, outputs=1, chunk_rows=chunk_rows, interpret=interpret),
    )[0]


def _tgmm_kernel(table, lhs, grad, out, x, g, x_spare, g_spare, total, sem, *, plan, tiling, exact):
    """One group: lhs [M, K] and grad [P, M, N] in HBM, out [1, P, tk, tn] in VMEM, sums over chunks in total."""
    k_tile, n_tile, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    unit, grain, depth, tile = tiling.unit, tiling.grain, tiling.depth, tiling.tile
    parts, k_columns, n_columns = out.shape[1:]
    count = table[plan.scalar("chunks")]
    begin, end = table[plan.begin + step], table[plan.begin + step + 1]

    def field(name, chunk):
        return table[plan.field(name) + 1 + chunk]

    def act(copies, action):
        copy, units = copies
        _copy(copy, units, action, exact=exact)

    def fetches(chunk, slot):
        first = field("first", chunk)

        def copy(offset, size):
            rows, there = _rows(first + offset, size, unit), _rows(offset, size, unit)
            k_lanes, n_lanes = _lanes(k_tile, k_columns), _lanes(n_tile, n_columns)
            copies = [pltpu.make_async_copy(lhs.at[rows, k_lanes], x.at[slot, there], sem.at[slot])]
            for p in range(parts):
                copies.append(pltpu.make_async_copy(grad.at[p, rows, n_lanes], g.at[slot, p, there], sem.at[slot]))
            return copies

        return copy, field("units", chunk)

    def spare(chunk, slot):
        """The unit whose rows take the place of the head."""
        rows, there = _rows(field("spare", chunk), 1, unit), pl.ds(0, unit)
        k_lanes, n_lanes = _lanes(k_tile, k_columns), _lanes(n_tile, n_columns)
        copies = [pltpu.make_async_copy(lhs.at[rows, k_lanes], x_spare.at[slot, there], sem.at[slot])]
        for p in range(parts):
            copies.append(pltpu.make_async_copy(grad.at[p, rows, n_lanes], g_spare.at[slot, p, there], sem.at[slot]))
        return copies

    def bring(chunk, slot, action):
        act(fetches(chunk, slot), action)

        @pl.when(field("spared", chunk) > 0)
        def _():
            for one in spare(chunk, slot):
                getattr(one, action)()

    @pl.when((step == 0) & (count > 0))
    def _():
        bring(0, 0, "start")

    def replace_head(slot, head, spared):
        for ref, spare_ref, part in ((x, x_spare, ()), *((g, g_spare, (p,)) for p in range(parts))):
            row = lax.broadcasted_iota(jnp.int32, (grain, ref.shape[-1]), 0)
            rows = (slot, *part, pl.ds(0, grain))
            # Through float32: v5 has no 16-bit select.
            value, spare = ref[rows].astype(jnp.float32), spare_ref[(slot, *part)].astype(jnp.float32)
            ref[rows] = jnp.where(row < head, jnp.where(row < spared, spare, 0), value).astype(ref.dtype)

    def keep(rows, first: int, low, high):
        """Zeros the rows (the first has number `first`) outside [low, high), NaN or not; words, as v5 has no 16-bit
        select.
        """
        words = pltpu.bitcast(rows, jnp.uint32)
        packed = len(rows) // len(words)
        row = first + packed * lax.broadcasted_iota(jnp.int32, words.shape, 0)
        bits = 32 // packed
        mask = jnp.zeros(words.shape, jnp.uint32)
        for i in range(packed):
            within = (row + i >= low) & (row + i < high)
            mask |= jnp.where(within, jnp.uint32(((1 << bits) - 1) << (bits * i)), jnp.uint32(0))
        return pltpu.bitcast(words & mask, rows.dtype)

    def multiply(passes: int, slot, first, low, high):
        rows = passes * LANES
        cuts = sorted({0, grain, rows - LANES, rows}) if passes > 1 else [0, rows]

        def kept(ref, where, lanes):
            pieces = []
            for a, b in itertools.pairwise(cuts):
                piece = ref[(slot, *where, pl.ds(a, b - a), lanes)]
                pieces.append(piece if a > 0 and b < rows else keep(piece, a, low, high))
            return jnp.concatenate(pieces) if len(pieces) > 1 else pieces[0]

        def block(part, i, j):
            k_lanes, n_lanes = _lanes(i, tile[0]), _lanes(j, tile[1])
            value = _dot(kept(x, (), k_lanes), kept(g, (part,), n_lanes), (0, 0))
            # Both stores always: one code for all chunks of a group, and half of the slots for stores are left.
            value = value + jnp.where(first, 0, total[part, k_lanes, n_lanes])
            total[part, k_lanes, n_lanes] = value
            out[0, part, k_lanes, n_lanes] = value.astype(out.dtype)

        across = n_columns // tile[1]
        each = k_columns // tile[0] * across
        if each == 1 and tiling.tile_parts == parts:
            for part in range(parts):
                block(part, 0, 0)
            return

        def one(i):
            part, rest = lax.div(i, jnp.int32(each)), lax.rem(i, jnp.int32(each))
            block(part, lax.div(rest, jnp.int32(across)), lax.rem(rest, jnp.int32(across)))

        _loop(parts * each, one)

    def one(chunk):
        slot = chunk & 1
        units, head, valid = field("units", chunk), field("head", chunk), field("valid", chunk)
        spared = field("spared", chunk)
        bring(chunk, slot, "wait")

        @pl.when(chunk + 1 < count)
        def _():
            bring(chunk + 1, 1 - slot, "start")

        @pl.when(spared > 0)
        def _():
            replace_head(slot, head, spared)

        low, high = jnp.where(spared > 0, 0, head), jnp.minimum(valid, units * unit)
        passes = lax.div(units * unit + (LANES - 1), jnp.int32(LANES))
        _select(passes, 1, depth, lambda passes: multiply(passes, slot, chunk == begin, low, high))

    _loop(end, one, begin)

    @pl.when(begin == end)
    def _():
        out[...] = jnp.zeros(out.shape, out.dtype)


@dataclasses.dataclass(frozen=True)
class WeightTiling:
    """How `tgmm` is cut.

    Attributes:
        unit: rows that copies start and end at.
        grain: rows masked at once.
        depth: largest chunk of rows, in passes of LANES: the matrix units contract that many in one go.
        most: units of the largest chunk.
        columns: (of K, of N) whose sums are in VMEM at once.
        tile: (of K, of N) that one stretch of straight code computes.
        tile_parts: parts that it computes.
    """

    unit: int
    grain: int
    depth: int
    most: int
    columns: tuple[int, int]
    tile: tuple[int, int]
    tile_parts: int

    @property
    def trips(self) -> int:
        """Stretches of straight code for one part."""
        return math.prod(self.columns) // math.prod(self.tile)


def weight_tiling(
    rows: int, inner: int, width: int, parts: int, dtype: jax.typing.DTypeLike, *, depth: int = DEPTH
) -> WeightTiling:
    """The cut of [rows, inner].T x [parts, rows, width], all padded."""
    area = ACCUMULATOR_BYTES // (4 * parts)
    share = max(LANES, inner // _target()[1])  # each core takes tiles of its own
    k_columns = _divisor(inner, min(share, max(LANES, area // min(width, 512))))
    n_columns = _divisor(width, max(LANES, area // k_columns))
    tile_n = _divisor(n_columns, 2048)
    depth = min(depth, pl.cdiv(rows, LANES))
    most = min(depth * LANES, rows) // _unit(dtype)
    tile = (_divisor(k_columns, TILE_AREA // tile_n), tile_n)
    fits = tile == (k_columns, n_columns) and parts * k_columns * n_columns <= TILE_AREA
    return WeightTiling(_unit(dtype), _grain(dtype), depth, most, (k_columns, n_columns), tile, parts if fits else 1)


def tgmm(
    lhs: jax.Array,
    grad: jax.Array,
    sizes: jax.Array,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    depth: int = DEPTH,
    interpret: Interpret = None,
) -> jax.Array:
    """lhs [M, K], grad [M, P, N] -> [E, P, K, N]: lhs.T @ grad[:, p] over the rows of each expert; zeros where none."""
    lhs, grad, sizes = (varying_like(a, lhs, grad, sizes) for a in (lhs, grad, sizes))
    dtype = jnp.dtype(dtype or lhs.dtype)
    rows, inner, (parts, width), experts = len(lhs), lhs.shape[1], grad.shape[1:], len(sizes)
    shape = (experts, parts, inner, width)
    if not math.prod(shape) or not rows:
        return varying_like(jnp.zeros(shape, dtype), lhs, grad, sizes)
    unit = _unit(lhs.dtype)
    lhs, grad = _pad_to(lhs, {0: unit, 1: LANES}), _pad_to(jnp.swapaxes(grad, 0, 1), {1: unit, 2: LANES})
    padded_inner, padded_width = lhs.shape[1], grad.shape[2]
    tiling = weight_tiling(len(lhs), padded_inner, padded_width, parts, lhs.dtype, depth=depth)
    k_columns, n_columns = tiling.columns
    plan, table = make_plan(sizes, rows, unit, tiling.most, every_group=True, pairs=None, fold=LANES)
    itemsize = lhs.dtype.itemsize
    block = (1, parts, k_columns, n_columns)
    scratch = [
        pltpu.VMEM((2, tiling.depth * LANES, k_columns), lhs.dtype),
        pltpu.VMEM((2, parts, tiling.depth * LANES, n_columns), grad.dtype),
        pltpu.VMEM((2, tiling.grain, k_columns), lhs.dtype),
        pltpu.VMEM((2, parts, tiling.grain, n_columns), grad.dtype),
        pltpu.VMEM(block[1:], jnp.float32),
    ]
    vmem = 2 * math.prod(block) * dtype.itemsize + sum(math.prod(s.shape) * s.dtype.itemsize for s in scratch)
    vmem += 4 * math.prod(tiling.tile) * tiling.tile_parts
    grid = (padded_inner // k_columns, padded_width // n_columns, experts)
    flops = 2 * lhs.size * parts * padded_width
    touched = (lhs.size * grid[1] + grad.size * grid[0]) * itemsize + experts * parts * padded_inner * padded_width * 2

    def call(interpret) -> Callable[..., jax.Array]:
        def run(table, lhs, grad):
            kernel = functools.partial(_tgmm_kernel, plan=plan, tiling=tiling, exact=interpret is False)
            return pl.pallas_call(
                kernel,
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=1,
                    grid=grid,
                    in_specs=[pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
                    out_specs=pl.BlockSpec(block, lambda k, n, step, table: (step, 0, k, n)),
                    scratch_shapes=[*scratch, pltpu.SemaphoreType.DMA((2,))],
                ),
                out_shape=jax.ShapeDtypeStruct(
                    (experts, parts, padded_inner, padded_width), dtype, manual_axis_type=jax.typeof(lhs).mat
                ),
                compiler_params=pltpu.CompilerParams(
                    dimension_semantics=("parallel", "parallel", "arbitrary"),
                    vmem_limit_bytes=vmem + VMEM_SLACK,
                    disable_bounds_checks=True,
                ),
                cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=touched),
                interpret=interpret,
                name="grouped_matmul_weights",
            )(table, lhs, grad)

        return run

    return _launch(call, interpret, table, lhs, grad)[:, :, :inner, :width]
