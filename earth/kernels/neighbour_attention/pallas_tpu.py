"""Neighbour attention as Pallas kernels for TPUs (Mosaic). Written for v5e, v5p, v6e.

No TPU was at hand. The kernels are correct in Pallas's TPU interpreter and compile with the real compiler, whose
schedules were read (`python -m tests.bench_neighbours --schedule`). **None was ever run or timed on one.**

No gathers: points and anchors lie in an order in which neighbours lie together (`tiles`), and a block of 128 of one
side goes through the tiles of 128 of the other that it meets, masked by distance, as in flash attention. Copies of
tiles are the kernel's own, the next tile's while this one is computed.

- All heads of a vector lie side by side in lanes. The product of one head contracts all lanes of its group against a
  copy of the block in which the other heads are zeros: heads of 16 use an eighth of the matrix units, as they would
  padded, and nothing is shifted between lanes.
- Distance, taper and offsets along the frame are computed once for all heads, coordinate by coordinate: |x|^2 + |u|^2 -
  2 <x, u> would cancel. The taper multiplies weights instead of adding its logarithm to scores.
- One kernel serves both directions, for in either order of the two sides the pair is the same. The gradient takes two
  passes, with blocks of points and with blocks of anchors; each computes the weights again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from earth.kernels.neighbour_attention.shapes import ANCHORS, POINTS, Pairs
from earth.kernels.neighbour_attention.tiles import Lanes, Sorted, Spec, make_spec, other, pad_rows, scalars, sort

SIZE = 128
_LOW = -1e30

# None: compiled where lowered for a TPU, interpreted elsewhere.
Interpret = bool | pltpu.InterpretParams | None


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], exact: bool) -> jax.Array:
    precision = lax.Precision.HIGHEST if exact and a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _own(lanes: Lanes, head: int) -> jax.Array:
    """[size, group] bool: the head's lanes in its group."""
    first = lanes.of(head)[1]
    lane = lax.broadcasted_iota(jnp.int32, (SIZE, lanes.group), 1)
    return (lane >= first) & (lane < first + lanes.stride)


def _alone(array: jax.Array, lanes: Lanes, head: int) -> jax.Array:
    """The head's group of lanes, zeros for the other heads."""
    # Through float32: v5 has no 16-bit select.
    return jnp.where(_own(lanes, head), array[:, lanes.of(head)[0]].astype(jnp.float32), 0).astype(array.dtype)


def _column(array: jax.Array, at: int) -> jax.Array:
    return array[:, at : at + 1]


def _kernel(count, *refs, spec: Spec):
    """One block: lists of tiles in SMEM, everything of the tiles in HBM."""
    refs = list(refs)
    tiles = refs.pop(0)
    coefficient: Any = refs.pop(0) if spec.moments else None
    block_score, block_value = refs.pop(0), refs.pop(0) if spec.backward else None
    block_scalars = refs.pop(0)
    hbm = [refs.pop(0) for _ in range(3)]
    results = [refs.pop(0) for _ in spec.outputs]
    summary = refs.pop(0)  # [1, F, size]: logarithms of totals, or gradients of decay
    parts = refs.pop(0) if spec.backward and spec.moments and spec.block == POINTS else None
    buffers = [refs.pop(0) for _ in range(3)]
    semaphores = refs.pop(0)
    alone_score, alone_value, columns, *state = refs
    block, heads, axes = pl.program_id(0), spec.heads, spec.axes
    mine, theirs = spec.fields(spec.block), spec.fields(other(spec.block))
    visits = count[block]
    reads = spec.block == spec.rows

    def copies(visit, slot):
        tile = tiles[0, 0, visit]
        rows = pl.ds(pl.multiple_of(tile * SIZE, SIZE), SIZE)
        sources = (hbm[0].at[rows], hbm[1].at[rows], hbm[2].at[tile])
        return [
            pltpu.make_async_copy(source, buffer.at[slot], semaphores.at[slot, i])
            for i, (source, buffer) in enumerate(zip(sources, buffers, strict=True))
        ]

    @pl.when(visits > 0)
    def _():
        for copy in copies(0, 0):
            copy.start()

    # Of the block: one copy of its vectors for every head, and its scalars as columns.
    for h in range(heads):
        alone_score[h] = _alone(block_score[...], spec.scores, h)
        if block_value is not None:
            alone_value[h] = _alone(block_value[...], spec.values, h)
    columns[:, : spec.depth(spec.block)] = block_scalars[0].T

    def of_block(name):
        return _column(columns[...], mine[name])

    lane = lax.broadcasted_iota(jnp.int32, (SIZE, SIZE), 1)
    if spec.backward:
        for ref in state:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)
    else:
        most, total, out = state
        for h in range(heads):
            start = of_block(f"prior{h}") if spec.prior else jnp.full((SIZE, 1), _LOW)
            most[h] = jnp.broadcast_to(start, (SIZE, SIZE))
            total[h] = jnp.full((SIZE, SIZE), 1.0 if spec.prior else 0.0)
            out[h] = jnp.zeros(out.shape[1:], jnp.float32)

    def visit(at, _):
        slot = at & 1
        for copy in copies(at, slot):
            copy.wait()

        @pl.when(at + 1 < visits)
        def _():
            for copy in copies(at + 1, 1 - slot):
                copy.start()

        def of_tile(name):
            return buffers[2][slot, theirs[name] : theirs[name] + 1, :]

        def of(side, name):
            return of_block(name) if side == spec.block else of_tile(name)

        sign = 1.0 if spec.block == POINTS else -1.0
        offset = [sign * (of_block(f"x{p}") - of_tile(f"x{p}")) for p in range(axes)]
        d2 = functools.reduce(jnp.add, [o * o for o in offset])
        radius2 = of(POINTS, "radius2")
        edge = jnp.maximum(1 - d2 * (1 / jnp.maximum(radius2, 1e-30)), 0)
        taper = jnp.where(radius2 > 0, edge * edge, 0)
        near = taper > 0
        along = [
            functools.reduce(jnp.add, [offset[p] * of(ANCHORS, f"frame{c},{p}") for p in range(axes)])
            for c in range(spec.directions or 0)
        ]

        def moment(h):
            g = coefficient[h * spec.moments]
            for c in range(spec.moments - 1):
                g = g + coefficient[h * spec.moments + 1 + c] * along[c]
            return g

        for h in range(heads):
            group, value_group = spec.scores.of(h)[0], spec.values.of(h)[0]
            tile_score = buffers[0][slot, :, group]
            tile_value = buffers[1][slot, :, value_group]
            score = _dot(alone_score[h], tile_score, (1, 1), spec.exact) - of(ANCHORS, f"decay{h}") * d2
            if spec.backward:
                backward(h, score, near, taper, d2, along, of, moment, tile_score, tile_value)
            else:
                forward(h, score, near, taper, moment, tile_value)
        return 0

    def forward(h, score, near, taper, moment, tile_value):
        most, total, out = state
        score = jnp.where(near, score, _LOW)
        before = most[h]
        after = jnp.maximum(before, jnp.max(score, 1, keepdims=True))
        weight = jnp.exp(score - after) * taper
        keep = jnp.exp(before - after)
        most[h] = after
        total[h] = total[h] * keep + jnp.sum(weight, 1, keepdims=True)
        moved = weight * moment(h) if spec.moments else weight
        product = _dot(moved.astype(tile_value.dtype), tile_value, (1, 0), spec.exact)
        out[h] = out[h] * _column(keep, 0) + product

    def backward(h, score, near, taper, d2, along, of, moment, tile_score, tile_value):
        weight = jnp.where(near, jnp.exp(score - of(spec.rows, f"total{h}")) * taper, 0)
        product = _dot(alone_value[h], tile_value, (1, 1), spec.exact)
        moved = weight * moment(h) if spec.moments else weight
        of_score = moved * product - weight * of(spec.rows, f"rest{h}")
        state[0][h] += _dot(of_score.astype(tile_score.dtype), tile_score, (1, 0), spec.exact)
        if not reads:
            state[1][h] += _dot(moved.astype(tile_value.dtype), tile_value, (1, 0), spec.exact)
        if spec.block == ANCHORS:
            state[-1][...] -= jnp.where(lane == h, jnp.sum(of_score * d2, 1, keepdims=True), 0)
        if parts is not None:
            per = weight * product
            for c, term in enumerate([per, *(per * a for a in along)]):
                at = h * spec.moments + c
                state[-1][at : at + 1, :] += jnp.sum(term, 0, keepdims=True)

    lax.fori_loop(0, visits, visit, 0)

    def merged(ref, lanes: Lanes, scale=None):
        """All heads side by side, of each its own lanes."""
        for first in range(0, lanes.total, lanes.group):
            group, value = slice(first, first + lanes.group), jnp.zeros((SIZE, lanes.group), jnp.float32)
            for h in range(heads):
                if lanes.of(h)[0] == group:
                    value = jnp.where(_own(lanes, h), ref[h] if scale is None else ref[h] * scale(h), value)
            yield group, value

    if spec.backward:
        for ref, result, lanes in zip(state, results, (spec.scores, spec.values), strict=False):
            for group, value in merged(ref, lanes):
                result[:, group] = value.astype(result.dtype)
        if spec.block == ANCHORS:
            summary[0] = state[-1][...].T[: summary.shape[1]]
        else:
            summary[0] = jnp.zeros(summary.shape[1:], jnp.float32)
        if parts is not None:
            parts[0] = state[-1][...]
    else:
        most, total, out = state
        logs = jnp.zeros((SIZE, SIZE), jnp.float32)
        for h in range(heads):
            some = total[h] > 0
            logs = logs + jnp.where((lane == h) & some, most[h] + jnp.log(jnp.where(some, total[h], 1)), 0)
        summary[0] = logs.T[: summary.shape[1]]

        def scale(h):
            divisor = _column(total[h], 0)
            return 1 / jnp.where(divisor > 0, divisor, 1)

        for group, value in merged(out, spec.values, scale):
            results[0][:, group] = value.astype(results[0].dtype)


def _call(spec: Spec, meet, sides: dict[str, tuple], coefficient, interpret) -> Any:
    """sides: {side: (score vectors, value vectors, scalars [tiles, F, size])}, sorted and padded; rows have no values
    in a forward kernel.
    """
    mine, theirs = sides[spec.block], sides[other(spec.block)]
    blocks, tiles = len(mine[-1]), len(theirs[-1])
    heads, summary = spec.heads, -(-spec.heads // 8) * 8
    lanes = {"scores": spec.scores, "values": spec.values}
    shapes = [jax.ShapeDtypeStruct((blocks * SIZE, lanes[name].total), jnp.float32) for name in spec.outputs]
    shapes.append(jax.ShapeDtypeStruct((blocks, summary, SIZE), jnp.float32))
    state = [pltpu.VMEM((heads, SIZE, lanes[name].group), jnp.float32) for name in spec.outputs]
    if not spec.backward:
        state = [pltpu.VMEM((heads, SIZE, SIZE), jnp.float32)] * 2 + state
    elif spec.block == ANCHORS:
        state.append(pltpu.VMEM((SIZE, SIZE), jnp.float32))
    elif spec.moments:
        rows = -(-heads * spec.moments // 8) * 8
        shapes.append(jax.ShapeDtypeStruct((blocks, rows, SIZE), jnp.float32))
        state.append(pltpu.VMEM((rows, SIZE), jnp.float32))

    def block_of(array):
        if array.ndim == 2:
            return pl.BlockSpec((SIZE, array.shape[1]), lambda b, *_: (b, 0))
        return pl.BlockSpec((1, *array.shape[1:]), lambda b, *_: (b, 0, 0))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    inputs: list[Any] = [meet.tiles.reshape(blocks, 1, tiles)]
    specs = [pl.BlockSpec((1, 1, tiles), lambda b, *_: (b, 0, 0), memory_space=pltpu.SMEM)]
    if spec.moments:
        inputs.append(coefficient.reshape(-1))
        specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    inputs += [*mine, *theirs]
    specs += [*(block_of(a) for a in mine), anywhere, anywhere, anywhere]
    dtype = mine[0].dtype
    scratch = [
        *(pltpu.VMEM((2, SIZE, a.shape[1]), a.dtype) for a in theirs[:2]),
        pltpu.VMEM((2, *theirs[2].shape[1:]), jnp.float32),
        pltpu.SemaphoreType.DMA((2, 3)),
        pltpu.VMEM((heads, SIZE, spec.scores.group), dtype),
        pltpu.VMEM((heads, SIZE, spec.values.group) if spec.backward else (8, 128), dtype),
        pltpu.VMEM((SIZE, -(-spec.depth(spec.block) // 128) * 128), jnp.float32),
        *state,
    ]
    return pl.pallas_call(
        functools.partial(_kernel, spec=spec),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks,),
            in_specs=specs,
            out_specs=[block_of(s) for s in shapes],
            scratch_shapes=scratch,
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=64 << 20),
        interpret=interpret,
        name=f"neighbour_{'backward' if spec.backward else 'forward'}_{spec.block}",
    )(meet.count, *inputs)


def _launch(call, interpret: Interpret, *args) -> Any:
    """Compiled where lowered for a TPU, in the interpreter elsewhere, unless told."""
    if interpret is not None:
        return call(*args, interpret=interpret)
    return lax.platform_dependent(
        *args,
        tpu=functools.partial(call, interpret=False),
        default=functools.partial(call, interpret=pltpu.InterpretParams()),
    )


def _sides(spec: Spec, vectors: dict[str, tuple], tables: dict[str, jax.Array], ordered: Sorted, dtype) -> dict:
    made = {}
    for side, arrays in vectors.items():
        layouts = zip((spec.scores, spec.values), arrays, strict=False)
        packed = [pad_rows(lanes.pack(ordered.sorted(side, a).astype(dtype)), SIZE) for lanes, a in layouts]
        made[side] = (*packed, tables[side])
    return made


def _operand_type(value) -> Any:
    return jnp.bfloat16 if value.dtype == jnp.bfloat16 else jnp.float32


def forward(
    query, key, value, decay, prior, coefficient, pairs: Pairs, *, side: str, interpret: Interpret = None
) -> tuple[jax.Array, jax.Array]:
    """As `reference.forward`."""
    spec = make_spec(query, value, coefficient, pairs, side, block=side, backward=False, prior=prior is not None)
    ordered = sort(pairs, SIZE)
    vectors = {side: (query,), other(side): (key, value)}
    stats = {} if prior is None else dict(prior=prior)
    tables = scalars(spec, pairs, decay, stats, ordered, SIZE)
    sides = _sides(spec, vectors, tables, ordered, _operand_type(value))
    flat = None if coefficient is None else coefficient.astype(jnp.float32)

    def call(meet, sides, flat, interpret):
        return _call(spec, meet, sides, flat, interpret)

    out, logs = _launch(call, interpret, ordered.meet[side], sides, flat)
    logs = logs.transpose(0, 2, 1).reshape(-1, logs.shape[1])[:, : spec.heads]
    count = len(query)
    return ordered.back(side, spec.values.unpack(out))[:count], ordered.back(side, logs)[:count]


def backward(
    query, key, value, decay, coefficient, pairs: Pairs, total, grad, rest, *, side: str, interpret: Interpret = None
) -> tuple:
    """As `blocked.backward`."""
    ordered = sort(pairs, SIZE)
    vectors = {side: (query, grad), other(side): (key, value)}
    flat = None if coefficient is None else coefficient.astype(jnp.float32)
    gradients, of_decay, of_coefficient = {}, None, None
    for block in (POINTS, ANCHORS):
        spec = make_spec(query, value, coefficient, pairs, side, block=block, backward=True, prior=False)
        tables = scalars(spec, pairs, decay, dict(total=total, rest=rest), ordered, SIZE)
        sides = _sides(spec, vectors, tables, ordered, _operand_type(value))

        def call(meet, sides, flat, interpret, spec=spec):
            return _call(spec, meet, sides, flat, interpret)

        made = _launch(call, interpret, ordered.meet[block], sides, flat)
        lanes, count = {"scores": spec.scores, "values": spec.values}, pairs.sizes[0 if block == POINTS else 1]
        for name, array in zip(spec.outputs, made, strict=False):
            gradients[block, name] = ordered.back(block, lanes[name].unpack(array))[:count]
        if block == ANCHORS:
            logs = made[len(spec.outputs)]
            logs = logs.transpose(0, 2, 1).reshape(-1, logs.shape[1])[:, : spec.heads]
            of_decay = ordered.back(block, logs)[:count]
        elif spec.moments:
            sums = made[-1].sum((0, 2))[: spec.heads * spec.moments]
            of_coefficient = sums.reshape(spec.heads, spec.moments)
    column = other(side)
    if of_coefficient is None:
        of_coefficient = jnp.zeros(())
    return gradients[side, "scores"], gradients[column, "scores"], gradients[column, "values"], of_decay, of_coefficient
