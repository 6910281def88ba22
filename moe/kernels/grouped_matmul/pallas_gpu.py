"""The grouped products as Pallas kernels for NVIDIA GPUs, lowered through Triton. Written for Hopper (sm_90).

No GPU was at hand: the kernels are correct in interpret mode and compile for an H100 (`moe.kernels.aot_cuda`), where
their machine code was read (wgmma fed by 16-byte cp.async, no register spills). **None was ever run or timed on one.**
Tiles are chosen for the shared memory of Hopper and Blackwell; an A100 has too little for them.

Shape of a kernel:
- A tile of rows belongs to one expert and starts at its first row, wherever that is; GPUs need no alignment of rows. So
  no tile is visited twice, as it is by kernels with a fixed raster of tiles, and an expert of n rows costs ceil(n / m)
  visits. Rows after the last expert are one more group, whose visits store zeros and multiply nothing.
- A visit whose rows fit into half a tile of 128 computes half. Real rows among those computed, 32,768 rows over 128
  experts: 0.89 multinomial (without: 0.81), 0.90 Zipf 0.7 (0.82); half the slots on zero experts 0.81 (0.68).
- The grid is static: `visit_bound` visits times the tiles of columns. Which visit is which expert's comes from a small
  table made by XLA. Visits past the real number have no rows and no trips of the inner loop: they end at once.
- Eight visits go through all their tiles of columns together (L2): neighbours share either the weights of an expert or
  rows.
- Masks along rows only; along columns and the contracted axis only where a tile does not divide the size.
- float32 operands multiply as XLA multiplies them on this hardware: TF32, unless
  jax.default_matmul_precision says more.

`gmm_fp8` multiplies e4m3 operands with the scales of `moe.quantize`. Both lie with the contracted axis innermost, the
one order in which Hopper's wgmma takes FP8 from shared memory. The sum of each 128 products is rescaled into a float32
total on the CUDA cores, as DeepSeek-V3 does (2412.19437 section 3.3.2).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.triton import lowering as triton_lowering
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.triton import dialect as triton_dialect

from moe.kernels.grouped_matmul.blocked import varying_like
from moe.kernels.grouped_matmul.shapes import ACTIVATIONS, GroupedMatmulError

FP8_BLOCK = 128
"""Elements along the contracted axis (and, for weights, along the columns) that share a scale."""

_VISITS_TOGETHER = 8
_WGMMA_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What one program computes, and how.

    Attributes:
        m, n: rows and columns of the output held in registers, powers of two >= 16.
        k: of the contracted axis, loaded at a time.
        warps: of 32 threads.
        stages: tiles of operands on their way at a time.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def __post_init__(self):
        for name in ("m", "n", "k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise GroupedMatmulError(f"tile {name} = {size} must be a power of two, at least 16")


def choose_tiles(rows: int, columns: int, inner: int, dtype: jax.typing.DTypeLike, *, accumulators: int = 1) -> Tiles:
    """128 x 256 of output for long groups (`accumulators` share the 256), less for short ones.

    128 bytes of the contracted axis at a time (the widest swizzle of shared memory), four in flight: at most
    4 * 128 * (128 + 256) = 196,608 of the 232,448 bytes that a block may have. Hopper's wgmma takes 64 rows and more;
    below, Triton falls back on mma.sync, which is no loss where streaming the weights takes longer.

    Args:
        rows: expected of a group.
        columns, inner: sizes of the output's columns and of the contracted axis.
        dtype: of the operands.
    """

    def at_most(size: int, limit: int) -> int:
        return max(16, min(limit, pl.next_power_of_2(size)))

    m = at_most(rows, 128)
    n = at_most(columns, (256 if m == 128 else 128) // accumulators)
    k = at_most(inner, 128 // jnp.dtype(dtype).itemsize)
    return Tiles(m, n, k, warps=8 if m * n * accumulators >= 128 * 256 else 4, stages=4)


def visit_bound(rows: int, groups: int, tile: int) -> int:
    """Most visits that any sizes of `groups` groups with `rows` rows in all can need."""
    return (rows + min(groups, rows) * (tile - 1)) // tile


def _visit_table(sizes: jax.Array, rows: int, tile: int) -> jax.Array:
    """[3, V] int32: group, first row and end of the rows of every visit. Group E holds the rows without an expert;
    visits past the real number have group E + 1 and no rows.
    """
    end = jnp.append(jnp.minimum(_running_sum(sizes), rows), rows).astype(jnp.int32)
    start = jnp.concatenate([jnp.zeros_like(end[:1]), end[:-1]])
    visits = (end - start + tile - 1) // tile
    last = _running_sum(visits)
    visit = jnp.arange(visit_bound(rows, len(end), tile), dtype=jnp.int32)[:, None]
    group = (visit >= last).sum(1, dtype=jnp.int32)
    own = (visit >= last - visits) & (visit < last)
    first = start + (visit - (last - visits)) * tile
    return jnp.stack([group, (own * first).sum(1, dtype=jnp.int32), (own * end).sum(1, dtype=jnp.int32)])


def _running_sum(a: jax.Array) -> jax.Array:
    """Cumulative sum of a few hundred numbers as one fused reduction; XLA makes three kernels of jnp.cumsum."""
    index = jnp.arange(len(a))
    return jnp.where(index[:, None] >= index, a, 0).sum(1, dtype=jnp.int32)


class _Visit(NamedTuple):
    group: jax.Array
    real: jax.Array  # the group is an expert
    rows: Any  # pl.ds, a whole tile of rows
    live: jax.Array  # [m, 1]: which of the rows are the visit's own


def _visit_tile(
    table, experts: int, m: int, column_tiles: int, body: Callable[[_Visit, jax.Array, int], None], halve: bool = True
) -> None:
    """Calls body(visit, tile of columns, m) for this program; with half of m where that holds the visit's rows."""
    visits = table.shape[1]
    block, within = _divmod(pl.program_id(0), _VISITS_TOGETHER * column_tiles)
    together = jnp.minimum(visits - block * _VISITS_TOGETHER, _VISITS_TOGETHER)
    column, visit = _divmod(within, together)
    visit += block * _VISITS_TOGETHER
    group, first, end = table[0, visit], table[1, visit], table[2, visit]

    def at_height(m: int) -> None:
        live = first + jnp.arange(m, dtype=jnp.int32) < end
        body(_Visit(group, group < experts, pl.ds(first, m), live[:, None]), column, m)

    if m // 2 < _WGMMA_ROWS or not halve:
        at_height(m)
    else:
        lax.cond(end - first <= m // 2, lambda: at_height(m // 2), lambda: at_height(m))


def _divmod(a, b) -> tuple[jax.Array, jax.Array]:
    """Of numbers that are not negative; `//` and `%` would spend instructions on signs."""
    a, b = jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32)
    return lax.div(a, b), lax.rem(a, b)


def _inside(start, tile: int, size: int) -> jax.Array | None:
    """[tile] bool: which elements lie inside an axis of `size`; None where all do, in every tile."""
    return None if size % tile == 0 else start + jnp.arange(tile, dtype=jnp.int32) < size


def _both(down: jax.Array | None, across: jax.Array | None) -> jax.Array | None:
    """Mask of a tile from those of its two axes, [r] and [c]."""
    if down is None or across is None:
        return across[None, :] if across is not None else None if down is None else down[:, None]
    return down[:, None] & across[None, :]


def _load(ref, mask: jax.Array | None) -> jax.Array:
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def _dot(a: jax.Array, b: jax.Array, *, a_axis: int = 1, b_axis: int = 0) -> jax.Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _loop(trips, step: Callable, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return lax.fori_loop(jnp.int32(0), trips, step, totals)


def _no_trips_unless(real: jax.Array, trips: int) -> jax.Array:
    return jnp.where(real, jnp.int32(trips), jnp.int32(0))


def _zeros(m: int, n: int, count: int = 1) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros((m, n), jnp.float32) for _ in range(count))


def _column_tiles(parts: int, columns: int, tile: int, activation: str | None) -> int:
    """Tiles of columns that a visit has programs for: with an activation all parts are one program's."""
    return pl.cdiv(columns, tile) * (1 if activation else parts)


def _columns(column, parts: int, columns: int, tile: int, activation: str | None):
    """(part, parts of the program, first column, mask of the columns or None) of a visit's tile of columns."""
    part, column = _divmod(column, pl.cdiv(columns, tile))
    of_program = [jnp.int32(p) for p in range(parts)] if activation else [part]
    return part, of_program, column * tile, _inside(column * tile, tile, columns)


def _gmm_kernel(table, lhs, rhs, out, *, tiles: Tiles, activation: str | None):
    """out [M, P, N], or out [M, N] with an activation, when a program holds gate and up side by side."""
    experts, parts, inner, columns = rhs.shape

    def multiply(visit: _Visit, column, m: int) -> None:
        part, of_program, first, column_mask = _columns(column, parts, columns, tiles.n, activation)
        columns_at = pl.ds(first, tiles.n)

        def step(i, totals):
            at = pl.ds(i * tiles.k, tiles.k)
            mask = _inside(i * tiles.k, tiles.k, inner)
            x = _load(lhs.at[visit.rows, at], visit.live if mask is None else visit.live & mask[None, :])
            weights = (_load(rhs.at[visit.group, p, at, columns_at], _both(mask, column_mask)) for p in of_program)
            return tuple(total + _dot(x, w) for total, w in zip(totals, weights, strict=True))

        totals = _loop(_no_trips_unless(visit.real, pl.cdiv(inner, tiles.k)), step, _zeros(m, tiles.n, len(of_program)))
        _store_rows(out, part, visit, columns_at, column_mask, totals, activation)

    _visit_tile(table, experts, tiles.m, _column_tiles(parts, columns, tiles.n, activation), multiply)


def _store_rows(out, part, visit: _Visit, columns_at, column_mask, totals, activation: str | None) -> None:
    if activation:
        value, ref = ACTIVATIONS[activation](totals[0]) * totals[1], out.at[visit.rows, columns_at]
    else:
        value, ref = totals[0], out.at[visit.rows, part, columns_at]
    mask = visit.live if column_mask is None else visit.live & column_mask[None, :]
    plgpu.store(ref, value.astype(out.dtype), mask=mask)


def _gmm_t_kernel(table, lhs, rhs, out, *, tiles: Tiles):
    """lhs [M, P, N], rhs [E, P, K, N], out [M, K]: the contraction runs over parts and N in one loop."""
    experts, parts, columns, inner = rhs.shape
    per_part = pl.cdiv(inner, tiles.k)

    def multiply(visit: _Visit, column, m: int) -> None:
        columns_at = pl.ds(column * tiles.n, tiles.n)
        column_mask = _inside(column * tiles.n, tiles.n, columns)

        def step(i, totals):
            part, tile = _divmod(i, per_part)
            at = pl.ds(tile * tiles.k, tiles.k)
            mask = _inside(tile * tiles.k, tiles.k, inner)
            x = _load(lhs.at[visit.rows, part, at], visit.live if mask is None else visit.live & mask[None, :])
            w = _load(rhs.at[visit.group, part, columns_at, at], _both(column_mask, mask))
            return (totals[0] + _dot(x, w, b_axis=1),)

        (total,) = _loop(_no_trips_unless(visit.real, parts * per_part), step, _zeros(m, tiles.n))
        mask = visit.live if column_mask is None else visit.live & column_mask[None, :]
        plgpu.store(out.at[visit.rows, columns_at], total.astype(out.dtype), mask=mask)

    _visit_tile(table, experts, tiles.m, pl.cdiv(columns, tiles.n), multiply)


def _tgmm_kernel(bounds, lhs, grad, out, *, tiles: Tiles):
    """lhs [M, K], grad [M, P, N], out [E, P, K, N]; a program sums a tile of one expert's matrix over its rows."""
    _, parts, down, across = out.shape
    tiles_down, tiles_across = pl.cdiv(down, tiles.m), pl.cdiv(across, tiles.n)
    rest, column = _divmod(pl.program_id(0), tiles_across)
    rest, row = _divmod(rest, tiles_down)
    expert, part = _divmod(rest, parts)
    down_at, across_at = pl.ds(row * tiles.m, tiles.m), pl.ds(column * tiles.n, tiles.n)
    down_mask = _inside(row * tiles.m, tiles.m, down)
    across_mask = _inside(column * tiles.n, tiles.n, across)
    start, end = bounds[expert], bounds[expert + 1]

    def step(i, totals):
        first = start + i * tiles.k
        live = first + jnp.arange(tiles.k, dtype=jnp.int32) < end
        # Both operands are masked: the next expert's rows, and those of none, may hold NaN.
        x = _load(lhs.at[pl.ds(first, tiles.k), down_at], _both(live, down_mask))
        g = _load(grad.at[pl.ds(first, tiles.k), part, across_at], _both(live, across_mask))
        return (totals[0] + _dot(x, g, a_axis=0),)

    trips, _ = _divmod(end - start + (tiles.k - 1), tiles.k)
    (total,) = _loop(trips, step, _zeros(tiles.m, tiles.n))
    plgpu.store(out.at[expert, part, down_at, across_at], total.astype(out.dtype), mask=_both(down_mask, across_mask))


# Hopper's FP8 wgmma keeps about 14 bits of a sum. Triton therefore refuses it, converts to float16 and uses mma.sync,
# unless told how many products may be summed that way; `lax.dot_general` has no word for it. This primitive has.
_dot_fp8 = Primitive("dot_fp8")


@_dot_fp8.def_abstract_eval
def _dot_fp8_shape(a, b, total):
    return total


mlir.register_lowering(
    _dot_fp8,
    mlir.lower_fun(
        lambda a, b, total: total + _dot(a.astype(jnp.float32), b.astype(jnp.float32), b_axis=1), multiple_results=False
    ),
)


@triton_lowering.register_lowering(_dot_fp8)
def _dot_fp8_in_triton(_, a, b, total):
    return triton_dialect.dot(a, triton_dialect.trans(b, (1, 0)), total, max_num_imprecise_acc=FP8_BLOCK)


def _gmm_fp8_kernel(table, lhs, lhs_scale, rhs, rhs_scale, out, *, tiles: Tiles, activation: str | None):
    """lhs [M, K], lhs_scale [K / 128, M], rhs [E, P, N, K], rhs_scale [E, P, N / 128, K / 128]."""
    experts, parts, columns, inner = rhs.shape

    def multiply(visit: _Visit, column, m: int) -> None:
        part, of_program, first, column_mask = _columns(column, parts, columns, tiles.n, activation)
        columns_at = pl.ds(first, tiles.n)
        scale_row, _ = _divmod(first, FP8_BLOCK)

        def step(i, totals):
            at = pl.ds(i * tiles.k, tiles.k)
            mask = _inside(i * tiles.k, tiles.k, inner)
            scale_at, _ = _divmod(i * tiles.k, FP8_BLOCK)
            x = _load(lhs.at[visit.rows, at], visit.live if mask is None else visit.live & mask[None, :])
            x_scale = _load(lhs_scale.at[scale_at, visit.rows], visit.live[:, 0])

            def add(total, p):
                w = _load(rhs.at[visit.group, p, columns_at, at], _both(column_mask, mask))
                scale = x_scale * rhs_scale[visit.group, p, scale_row, scale_at]
                return total + _dot_fp8.bind(x, w, jnp.zeros_like(total)) * scale[:, None]

            return tuple(add(total, p) for total, p in zip(totals, of_program, strict=True))

        totals = _loop(_no_trips_unless(visit.real, pl.cdiv(inner, tiles.k)), step, _zeros(m, tiles.n, len(of_program)))
        _store_rows(out, part, visit, columns_at, column_mask, totals, activation)

    # With gate and up the second height would take 136 registers: one block per SM instead of two of 128.
    column_tiles = _column_tiles(parts, columns, tiles.n, activation)
    _visit_tile(table, experts, tiles.m, column_tiles, multiply, halve=activation is None)


def _launch(
    kernel: Callable,
    name: str,
    programs: int,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    tiles: Tiles,
    interpret: bool | None,
    *operands: jax.Array,
) -> jax.Array:
    """Runs `kernel`; in interpret mode where the platform lowered for is not CUDA, unless `interpret` says."""
    operands = tuple(varying_like(operand, *operands) for operand in operands)
    if not programs or not math.prod(shape):
        return varying_like(jnp.zeros(shape, dtype), *operands)

    def call(interpret: bool) -> Callable[..., jax.Array]:
        return pl.pallas_call(
            kernel,
            grid=(programs,),
            out_shape=jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(operands[0]).mat),
            compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
            interpret=interpret,
            name=name,
        )

    if interpret is not None:
        return call(interpret)(*operands)
    return lax.platform_dependent(*operands, cuda=call(False), default=call(True))


def _mean_rows(rows: int, experts: int) -> int:
    return pl.cdiv(rows, max(1, min(rows, experts)))


def gmm(
    lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, tiles: Tiles | None = None, interpret: bool | None = None
) -> jax.Array:
    """lhs [M, K], rhs [E, P, K, N] -> [M, P, N]: row m times every part of its expert's matrix."""
    return _row_product(lhs, rhs, sizes, None, tiles, interpret)


def gated(
    lhs: jax.Array,
    rhs: jax.Array,
    sizes: jax.Array,
    *,
    activation: str,
    tiles: Tiles | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """lhs [M, K], rhs [E, 2, K, N] -> [M, N]: act(lhs @ rhs[e, 0]) * (lhs @ rhs[e, 1]), rounded once at the end."""
    return _row_product(lhs, rhs, sizes, activation, tiles, interpret)


def _row_product(lhs, rhs, sizes, activation: str | None, tiles: Tiles | None, interpret: bool | None) -> jax.Array:
    rows, (experts, parts, inner, columns) = len(lhs), rhs.shape
    together = parts if activation else 1
    tiles = tiles or choose_tiles(_mean_rows(rows, experts), columns, inner, lhs.dtype, accumulators=together)
    table = _visit_table(sizes, rows, tiles.m)
    return _launch(
        functools.partial(_gmm_kernel, tiles=tiles, activation=activation),
        "gated_grouped_matmul" if activation else "grouped_matmul",
        table.shape[1] * _column_tiles(parts, columns, tiles.n, activation),
        (rows, columns) if activation else (rows, parts, columns),
        lhs.dtype,
        tiles,
        interpret,
        *(table, lhs, rhs),
    )


def gmm_t(
    lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, tiles: Tiles | None = None, interpret: bool | None = None
) -> jax.Array:
    """lhs [M, P, N], rhs [E, P, K, N] -> [M, K]: sum over parts of lhs[:, p] @ rhs[e, p].T."""
    rows, (experts, _, columns, inner) = len(lhs), rhs.shape
    tiles = tiles or choose_tiles(_mean_rows(rows, experts), columns, inner, lhs.dtype)
    table = _visit_table(sizes, rows, tiles.m)
    return _launch(
        functools.partial(_gmm_t_kernel, tiles=tiles),
        "grouped_matmul_transposed",
        table.shape[1] * pl.cdiv(columns, tiles.n),
        (rows, columns),
        lhs.dtype,
        tiles,
        interpret,
        *(table, lhs, rhs),
    )


def tgmm(
    lhs: jax.Array,
    grad: jax.Array,
    sizes: jax.Array,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    tiles: Tiles | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """lhs [M, K], grad [M, P, N] -> [E, P, K, N]: lhs.T @ grad[:, p] over the rows of each expert; zeros where none."""
    rows, inner, experts, (parts, columns) = len(lhs), lhs.shape[1], len(sizes), grad.shape[1:]
    shape = (experts, parts, inner, columns)
    tiles = tiles or choose_tiles(inner, columns, _mean_rows(rows, experts), lhs.dtype)
    bounds = jnp.minimum(_running_sum(jnp.pad(sizes, (1, 0))), rows)
    return _launch(
        functools.partial(_tgmm_kernel, tiles=tiles),
        "grouped_matmul_weights",
        experts * parts * pl.cdiv(inner, tiles.m) * pl.cdiv(columns, tiles.n) if rows else 0,
        shape,
        dtype or lhs.dtype,
        tiles,
        interpret,
        *(bounds, lhs, grad),
    )


def gmm_fp8(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    sizes: jax.Array,
    *,
    activation: str | None = None,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    tiles: Tiles | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """The product of dequantised operands, from FP8 multiplications.

    Args:
        lhs: [M, K] float8_e4m3fn.
        lhs_scale: [M, ceil(K / 128)] float32, one per row and 128 elements of it.
        rhs: [E, P, N, K] float8_e4m3fn, the contracted axis last.
        rhs_scale: [E, P, ceil(N / 128), ceil(K / 128)] float32.
        sizes: [E] int32.
        activation: act(part 0) * part 1, as `gated`.
        dtype: of the output.

    Returns:
        [M, P, N], or [M, N] with an activation; rows at or beyond sizes.sum() are zero.

    Raises:
        GroupedMatmulError: weights of 2**31 to 2**32 elements, which Triton's lowering would index wrongly.
    """
    rows, (experts, parts, columns, inner) = len(lhs), rhs.shape
    # jax 0.10.2 chooses 64-bit offsets by bytes > 2**32; one-byte elements overflow a signed 32-bit offset before.
    if 2**31 <= rhs.size <= 2**32:
        raise GroupedMatmulError(
            f"FP8 weights of shape {rhs.shape} have {rhs.size} elements, between 2**31 and 2**32, which Pallas would "
            "index with 32 bits; split the experts over more devices, or over two calls"
        )
    together = parts if activation else 1
    # Half the columns: the sum of 128 products needs registers beside the totals (with all, ptxas 13.0 spills 8 bytes).
    tiles = tiles or dataclasses.replace(
        choose_tiles(_mean_rows(rows, experts), columns, inner, lhs.dtype, accumulators=2 * together), stages=3
    )
    if FP8_BLOCK % tiles.n or FP8_BLOCK % tiles.k:
        raise GroupedMatmulError(f"tile n = {tiles.n}, k = {tiles.k} must divide {FP8_BLOCK}: one scale a tile")
    table = _visit_table(sizes, rows, tiles.m)
    return _launch(
        functools.partial(_gmm_fp8_kernel, tiles=tiles, activation=activation),
        "gated_grouped_matmul_fp8" if activation else "grouped_matmul_fp8",
        table.shape[1] * _column_tiles(parts, columns, tiles.n, activation),
        (rows, columns) if activation else (rows, parts, columns),
        dtype,
        tiles,
        interpret,
        *(table, lhs, lhs_scale.T, rhs, rhs_scale),
    )
