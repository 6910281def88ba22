"""Neighbour attention as Pallas kernels for NVIDIA GPUs, lowered through Triton. Written for Hopper (sm_90).

No GPU was at hand: the kernels are correct in interpret mode and compile for an H100 (`moe.kernels.aot_cuda`), where
with moments they use all 255 registers of a thread and spill 8 to 440 bytes of them. **None was ever run or timed on
one.**

The tiles of `tiles`, 64 x 64, as on TPU, and no gathers; but a program is one block and one head, so that distances are
computed again for every head (12 operations a pair, beside the 4 K of a head's two products). A program goes through as
many tiles as its block meets. float32 operands multiply as XLA multiplies them on this hardware: TF32, unless
jax.default_matmul_precision says more.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from earth.kernels.neighbour_attention.shapes import ANCHORS, POINTS, Pairs
from earth.kernels.neighbour_attention.tiles import Sorted, Spec, make_spec, other, pad_rows, scalars, sort

SIZE = 64
_LOW = -1e30


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    return lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def _kernel(*refs, spec: Spec):
    """One block and one head; `refs` are whole arrays."""
    refs = list(refs)
    count, tiles = refs.pop(0), refs.pop(0)
    coefficient: Any = refs.pop(0) if spec.moments else None
    vectors = [refs.pop(0) for _ in range(2 if spec.backward else 1)]
    table, tile_scores, tile_values, tile_table = (refs.pop(0) for _ in range(4))
    results = [refs.pop(0) for _ in spec.outputs]
    summary = refs.pop(0)
    block, head = pl.program_id(0), pl.program_id(1)
    mine, theirs = spec.fields(spec.block), spec.fields(other(spec.block))
    rows = pl.ds(block * SIZE, SIZE)
    score_vectors = plgpu.load(vectors[0].at[head, rows, :])
    value_vectors: Any = plgpu.load(vectors[1].at[head, rows, :]) if spec.backward else None

    def of_block(name, per_head=False):
        at = mine[f"{name}0"] + head if per_head else jnp.int32(mine[name])
        return plgpu.load(table.at[at, rows])[:, None]

    prior = of_block("prior", True)[:, 0] if spec.prior else None

    def visit(at, carry):
        columns = pl.ds(tiles[block, at] * SIZE, SIZE)

        def of_tile(name, per_head=False):
            row = theirs[f"{name}0"] + head if per_head else jnp.int32(theirs[name])
            return plgpu.load(tile_table.at[row, columns])[None, :]

        def of(side, name, per_head=False):
            return of_block(name, per_head) if side == spec.block else of_tile(name, per_head)

        offset = [of(POINTS, f"x{p}") - of(ANCHORS, f"x{p}") for p in range(spec.axes)]
        d2 = functools.reduce(jnp.add, [o * o for o in offset])
        radius2 = of(POINTS, "radius2")
        edge = jnp.maximum(1 - d2 / jnp.maximum(radius2, 1e-30), 0)
        taper = jnp.where(radius2 > 0, edge * edge, 0)
        near = taper > 0
        along = [
            functools.reduce(jnp.add, [offset[p] * of(ANCHORS, f"frame{c},{p}") for p in range(spec.axes)])
            for c in range(spec.directions or 0)
        ]
        b, v = plgpu.load(tile_scores.at[head, columns, :]), plgpu.load(tile_values.at[head, columns, :])
        score = _dot(score_vectors, b, (1, 1)) - of(ANCHORS, "decay", True) * d2

        def moved(weight):
            if not spec.moments:
                return weight
            g = coefficient[head, 0] + jnp.zeros_like(weight)
            for c, term in enumerate(along):
                g = g + coefficient[head, 1 + c] * term
            return weight * g

        if not spec.backward:
            most, total, out = carry
            score = jnp.where(near, score, _LOW)
            after = jnp.maximum(most, jnp.max(score, 1))
            weight = jnp.exp(score - after[:, None]) * taper
            keep = jnp.exp(most - after)
            product = _dot(moved(weight).astype(v.dtype), v, (1, 0))
            return after, total * keep + jnp.sum(weight, 1), out * keep[:, None] + product

        weight = jnp.where(near, jnp.exp(score - of(spec.rows, "total", True)) * taper, 0)
        product = _dot(value_vectors, v, (1, 1))
        lifted = moved(weight)
        of_score = lifted * product - weight * of(spec.rows, "rest", True)
        made = [_dot(of_score.astype(b.dtype), b, (1, 0))]
        if "values" in spec.outputs:
            made.append(_dot(lifted.astype(v.dtype), v, (1, 0)))
        if spec.block == ANCHORS:
            made.append(-jnp.sum(of_score * d2, 1))
        elif spec.moments:
            per = weight * product
            made += [jnp.sum(term, 1) for term in (per, *(per * a for a in along))]
        return tuple(c + m for c, m in zip(carry, made, strict=True))

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    widths = [results[i].shape[2] for i in range(len(results))]
    if spec.backward:
        sums = 1 if spec.block == ANCHORS else spec.moments
        start = (*(zeros((SIZE, w)) for w in widths), *(zeros(SIZE) for _ in range(sums)))
    else:
        first = (zeros(SIZE) + _LOW, zeros(SIZE)) if prior is None else (prior, zeros(SIZE) + 1)
        start = (*first, zeros((SIZE, widths[0])))
    made = lax.fori_loop(jnp.int32(0), count[block], visit, start)
    if not spec.backward:
        most, total, out = made
        some = total > 0
        total = jnp.where(some, total, 1)
        plgpu.store(results[0].at[head, rows, :], out / total[:, None])
        plgpu.store(summary.at[head, rows], jnp.where(some, most + jnp.log(total), 0))
        return
    for result, value in zip(results, made, strict=False):
        plgpu.store(result.at[head, rows, :], value)
    for i, value in enumerate(made[len(results) :]):
        at = summary.at[head, rows] if spec.block == ANCHORS else summary.at[jnp.int32(i), head, rows]
        plgpu.store(at, value)


def _call(spec: Spec, meet, sides: dict[str, tuple], coefficient, interpret) -> Any:
    """sides: {side: (score vectors [H, R, K], value vectors, scalars [F, R])}; rows have no values in a forward."""
    mine, theirs = sides[spec.block], sides[other(spec.block)]
    items, heads = mine[-1].shape[1], spec.heads
    width = {"scores": mine[0].shape[2], "values": theirs[1].shape[2]}
    shapes = [jax.ShapeDtypeStruct((heads, items, width[name]), jnp.float32) for name in spec.outputs]
    per_item = (spec.moments or 1, heads, items) if spec.backward and spec.block == POINTS else (heads, items)
    shapes.append(jax.ShapeDtypeStruct(per_item, jnp.float32))
    inputs = [*meet, *([] if coefficient is None else [coefficient]), *mine, *theirs]
    return pl.pallas_call(
        functools.partial(_kernel, spec=spec),
        grid=(items // SIZE, heads),
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name=f"neighbour_{'backward' if spec.backward else 'forward'}_{spec.block}",
    )(*inputs)


def _launch(spec: Spec, interpret: bool | None, meet, sides, coefficient) -> Any:
    """Compiled where lowered for CUDA, interpreted elsewhere, unless told."""

    def call(meet, sides, coefficient, interpret):
        return _call(spec, meet, sides, coefficient, interpret)

    if interpret is not None:
        return call(meet, sides, coefficient, interpret)
    compiled, interpreted = (functools.partial(call, interpret=i) for i in (False, True))
    return lax.platform_dependent(meet, sides, coefficient, cuda=compiled, default=interpreted)


def _width(width: int) -> int:
    """Tensor cores contract 16 at least, Triton powers of two."""
    return max(16, pl.next_power_of_2(width))


def _sides(spec: Spec, vectors: dict[str, tuple], tables: dict[str, jax.Array], ordered: Sorted, dtype) -> dict:
    made = {}
    for side, arrays in vectors.items():
        packed = []
        for a in arrays:
            a = pad_rows(ordered.sorted(side, a).astype(dtype), SIZE).transpose(1, 0, 2)
            packed.append(jnp.pad(a, ((0, 0), (0, 0), (0, _width(a.shape[2]) - a.shape[2]))))
        table = tables[side].transpose(1, 0, 2)
        made[side] = (*packed, table.reshape(len(table), -1))
    return made


def _unpack(array: jax.Array, ordered: Sorted, side: str, count: int, width: int) -> jax.Array:
    return ordered.back(side, array.transpose(1, 0, 2)[:, :, :width])[:count]


def _prepare(query, value, coefficient):
    dtype = jnp.bfloat16 if value.dtype == jnp.bfloat16 else jnp.float32
    return dtype, None if coefficient is None else coefficient.astype(jnp.float32)


def forward(
    query, key, value, decay, prior, coefficient, pairs: Pairs, *, side: str, interpret: bool | None = None
) -> tuple[jax.Array, jax.Array]:
    """As `reference.forward`."""
    spec = make_spec(query, value, coefficient, pairs, side, block=side, backward=False, prior=prior is not None)
    dtype, flat = _prepare(query, value, coefficient)
    ordered = sort(pairs, SIZE)
    tables = scalars(spec, pairs, decay, {} if prior is None else dict(prior=prior), ordered, SIZE)
    sides = _sides(spec, {side: (query,), other(side): (key, value)}, tables, ordered, dtype)
    out, logs = _launch(spec, interpret, ordered.meet[side], sides, flat)
    count = len(query)
    return _unpack(out, ordered, side, count, value.shape[2]), ordered.back(side, logs.T)[:count]


def backward(
    query, key, value, decay, coefficient, pairs: Pairs, total, grad, rest, *, side: str, interpret: bool | None = None
) -> tuple:
    """As `blocked.backward`."""
    dtype, flat = _prepare(query, value, coefficient)
    ordered = sort(pairs, SIZE)
    vectors = {side: (query, grad), other(side): (key, value)}
    widths = {"scores": query.shape[2], "values": value.shape[2]}
    gradients, of_decay, of_coefficient = {}, None, jnp.zeros(())
    for block in (POINTS, ANCHORS):
        spec = make_spec(query, value, coefficient, pairs, side, block=block, backward=True, prior=False)
        tables = scalars(spec, pairs, decay, dict(total=total, rest=rest), ordered, SIZE)
        count = pairs.sizes[0 if block == POINTS else 1]
        made = _launch(spec, interpret, ordered.meet[block], _sides(spec, vectors, tables, ordered, dtype), flat)
        for name, array in zip(spec.outputs, made, strict=False):
            gradients[block, name] = _unpack(array, ordered, block, count, widths[name])
        if block == ANCHORS:
            of_decay = ordered.back(block, made[-1].T)[:count]
        elif spec.moments:
            of_coefficient = made[-1].sum(2).T
    column = other(side)
    return gradients[side, "scores"], gradients[column, "scores"], gradients[column, "values"], of_decay, of_coefficient
