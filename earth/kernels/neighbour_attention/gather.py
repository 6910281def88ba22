"""Neighbour attention by its index: gathers and segment sums in plain XLA, N x k pairs and nothing else.

On two quiet cores of a CPU it is 3 to 5 times as fast as `blocked` at 2,400 points, 512 anchors and k = 8 (values and
gradients: 7 against 29 ms reading, 9 against 27 ms collecting). It holds all pairs' values, N k H V numbers, so that
`blocked` takes over where these are many.
"""

from typing import Any

import jax
import jax.numpy as jnp

from earth.kernels.neighbour_attention.shapes import POINTS, Pairs


def _pairs(query: Any, key: Any, decay: Any, coefficient: Any, pairs: Pairs, side: str) -> tuple[Any, Any, Any]:
    """(score [N, k, H], -inf for pairs that are none; moment [N, k, H] or None; anchor [N, k])."""
    anchor = jnp.maximum(pairs.index, 0)
    offset = pairs.points[:, None] - pairs.anchors[anchor]
    d2 = jnp.square(offset).sum(-1)
    radius2 = pairs.radius2[:, None]
    near = (d2 < radius2) & (pairs.index >= 0)
    taper = jnp.log1p(-jnp.where(near, d2 / jnp.where(near, radius2, 1), 0))
    product = (query[:, None] * key[anchor] if side == POINTS else query[anchor] * key[:, None]).sum(-1)
    score = jnp.where(near[..., None], product - decay[anchor] * d2[..., None] + 2 * taper[..., None], -jnp.inf)
    if coefficient is None:
        return score, None, anchor
    along = jnp.einsum("nkp,nkcp->nkc", offset, pairs.frame[anchor])
    return score, coefficient[:, 0] + jnp.einsum("nkc,hc->nkh", along, coefficient[:, 1:]), anchor


def _sums(query: Any, key: Any, value: Any, decay: Any, coefficient: Any, pairs: Pairs, shift: Any, side: str) -> Any:
    """([rows, H, V] sum of exp(score - shift) x moment x value, [rows, H] sum of exp(score - shift))."""
    score, moment, anchor = _pairs(query, key, decay, coefficient, pairs, side)
    near = jnp.isfinite(score)
    shift = shift[:, None] if side == POINTS else shift[anchor]
    weight = jnp.where(near, jnp.exp(jnp.where(near, score - shift, 0)), 0)
    moved = weight if moment is None else weight * moment
    if side == POINTS:
        return jnp.einsum("nkh,nkhv->nhv", moved, value[anchor]), weight.sum(1)
    flat, rows = anchor.reshape(-1), pairs.sizes[1]
    each = (moved[..., None] * value[:, None]).reshape(-1, *value.shape[1:])
    total = jax.ops.segment_sum(weight.reshape(-1, weight.shape[-1]), flat, rows)
    return jax.ops.segment_sum(each, flat, rows), total


def forward(
    query: Any, key: Any, value: Any, decay: Any, prior: Any, coefficient: Any, pairs: Pairs, *, side: str
) -> tuple[jax.Array, jax.Array]:
    """As `reference.forward`."""
    query, key, value, decay = (a.astype(jnp.float32) for a in (query, key, value, decay))
    score, _, anchor = _pairs(query, key, decay, None, pairs, side)
    if side == POINTS:
        most = score.max(1)
    else:
        most = jax.ops.segment_max(score.reshape(-1, score.shape[-1]), anchor.reshape(-1), pairs.sizes[1])
    most = most if prior is None else jnp.maximum(most, prior)
    most = jnp.where(jnp.isfinite(most), most, 0)
    out, total = _sums(query, key, value, decay, coefficient, pairs, most, side)
    total = total + (0 if prior is None else jnp.exp(prior - most))
    some = total > 0
    total = jnp.where(some, total, 1)
    return out / total[..., None], jnp.where(some, most + jnp.log(total), 0)


def backward(
    query: Any, key: Any, value: Any, decay: Any, coefficient: Any, pairs: Pairs, total: Any, grad: Any, rest: Any, *,
    side: str,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of query, key, value, decay and coefficient.

    With total, the logarithm of a row's weights, held fixed the weights are p = exp(score - total): the gradient is
    that of sum(p g v) by `grad` less that of sum(p) by `rest`.
    """
    operands = tuple(a.astype(jnp.float32) for a in (query, key, value, decay))
    if coefficient is None:
        _, pull = jax.vjp(lambda q, k, v, d: _sums(q, k, v, d, None, pairs, total, side), *operands)
        return *pull((grad.astype(jnp.float32), -rest)), None
    _, pull = jax.vjp(
        lambda q, k, v, d, c: _sums(q, k, v, d, c, pairs, total, side), *operands, coefficient.astype(jnp.float32)
    )
    return pull((grad.astype(jnp.float32), -rest))
