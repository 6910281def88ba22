"""Neighbour attention with points and anchors split over mesh axes.

    with use_mesh(mesh, rules):            # rules that map "query" (points) and "anchor" to the same mesh axes
        out = attend(...)                  # as without a mesh

Points never travel, so it does not matter which device has which, and swaths load all devices alike. What the anchors
hold does: it is gathered, [M, H (K + V)], for the points at hand to read. Where anchors read, every device makes the
sums over its own points for all anchors, and these are merged exactly: with S devices each counts exp(prior) / S for
the prior, so that no sum is empty; then, t_s being the logarithms of their sums of weights and o_s their results,

    out = sum_s exp(t_s - t) o_s,   t = log sum_s exp(t_s),

shifted by the largest t_s, and scattered so that every device keeps its own anchors. Gradients gather again instead of
keeping what was gathered: they take the same passes of the same kernels, inside shard_map.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from earth.kernels.neighbour_attention.choice import run_pass
from earth.kernels.neighbour_attention.shapes import POINTS, NeighbourAttentionError, Pairs
from moe.sharding import MeshAxes, current_rules, partition_spec


def mesh_axes() -> MeshAxes:
    """What points and anchors are split over in this context; () for no mesh, or rules that split neither.

    Raises:
      NeighbourAttentionError: rules that split points and anchors differently.
    """
    rules, mesh = current_rules(), jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return ()
    points, anchors = (partition_spec((name,), mesh, rules, kind="activations") for name in ("query", "anchor"))
    if points != anchors:
        raise NeighbourAttentionError(
            f"{rules.name} splits 'query' over {tuple(points)} and 'anchor' over {tuple(anchors)}; map both to "
            "the same mesh axes"
        )
    axes = points[0] if len(points) else ()
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def forward(
    side: str, implementation: str | None, axes: MeshAxes, query: Any, key: Any, value: Any, decay: Any, prior: Any,
    coefficient: Any, pairs: Pairs,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """As `reference.forward`, of arrays that are split over `axes` along points and anchors."""
    dtype = _travels_as(value)

    def local(query, key, value, decay, prior, coefficient, pairs):
        def run(*operands):
            return run_pass("forward", side, implementation, *operands, coefficient, pairs)

        decay = _gather(decay, axes)
        if side == POINTS:
            return run(query, _gather(key, axes, dtype), _gather(value, axes, dtype), decay, None)
        shares = math.prod(lax.axis_size(axis) for axis in axes)
        share = _gather(prior, axes) - math.log(shares)
        out, total = run(_gather(query, axes, dtype), key, value, decay, share)
        most = lax.pmax(total, axes)
        weight = jnp.exp(total - most)
        out, weight = _scatter(out * weight[..., None], axes), _scatter(weight, axes)
        mine = lax.dynamic_slice_in_dim(most, lax.axis_index(axes) * len(weight), len(weight))
        return out / weight[..., None], mine + jnp.log(weight)

    operands = (query, key, value, decay, prior, coefficient, pairs)
    return _mapped(local, axes, pairs, operands, (True, True, True, True, True, False), (True, True))


def backward(
    side: str, implementation: str | None, axes: MeshAxes, query: Any, key: Any, value: Any, decay: Any,
    coefficient: Any, pairs: Pairs, total: Any, grad: Any, rest: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """As `blocked.backward`, of arrays that are split over `axes` along points and anchors."""
    dtype = _travels_as(value)

    def local(query, key, value, decay, total, grad, rest, coefficient, pairs):
        decay = _gather(decay, axes)
        if side == POINTS:
            key, value = (_gather(a, axes, dtype) for a in (key, value))
        else:
            query, grad = (_gather(a, axes, dtype) for a in (query, grad))
            total, rest = (_gather(a, axes) for a in (total, rest))
        given = (query, key, value, decay, coefficient, pairs, total, grad, rest)
        of_query, of_key, of_value, of_decay, of_coefficient = run_pass("backward", side, implementation, *given)
        if side == POINTS:
            of_key, of_value = _scatter(of_key, axes), _scatter(of_value, axes)
        else:
            of_query = _scatter(of_query, axes)
        of_coefficient = None if coefficient is None else lax.psum(of_coefficient, axes)
        return of_query, of_key, of_value, _scatter(of_decay, axes), of_coefficient

    operands = (query, key, value, decay, total, grad, rest, coefficient, pairs)
    return _mapped(local, axes, pairs, operands, (*[True] * 7, False), (True, True, True, True, False))


def _mapped(
    local: Callable[..., Any], axes: MeshAxes, pairs: Pairs, operands: tuple[Any, ...], split: tuple[bool, ...],
    out: tuple[bool, ...],
) -> Any:  # fmt: skip
    parts = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    for name, count in zip(("points", "anchors"), pairs.sizes, strict=True):
        if count % parts:
            raise NeighbourAttentionError(
                f"{count} {name} do not divide over mesh axes {axes} of total size {parts}; pad points with rows that "
                "are not there (earth.world.sharding.pad), choose another number of anchors"
            )
    mine, whole = PartitionSpec(axes), PartitionSpec()
    of_pairs = Pairs(mine, whole, mine, mine, frame=whole, where=mine, ordered=pairs.ordered)
    in_specs = (*(mine if one else whole for one in split), of_pairs)
    out_specs = tuple(mine if one else whole for one in out)
    # What is partial and what is whole is said above; the checks of jax know nothing of the kernels inside.
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*operands)


def _travels_as(value: Any) -> Any:
    """Kernels multiply bfloat16 where values are: nothing is lost on the way there."""
    return jnp.bfloat16 if value.dtype == jnp.bfloat16 else jnp.float32


def _gather(x: jax.Array, axes: MeshAxes, dtype: Any = jnp.float32) -> jax.Array:
    return lax.all_gather(x.astype(dtype), axes, tiled=True)


def _scatter(x: jax.Array, axes: MeshAxes) -> jax.Array:
    return lax.psum_scatter(x, axes, tiled=True)
