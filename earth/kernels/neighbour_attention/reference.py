"""What neighbour attention means: dense, every point with every anchor. The oracle of the other files.

Differentiated by JAX. Memory O(N M H).
"""

import jax
import jax.numpy as jnp

from earth.kernels.neighbour_attention.shapes import POINTS, Pairs

_HIGHEST = jax.lax.Precision.HIGHEST


def scores(
    query: jax.Array, key: jax.Array, decay: jax.Array, pairs: Pairs, *, side: str
) -> tuple[jax.Array, jax.Array]:
    """(score [N, M, H], [N, M, 1] bool: neighbours): <q, k> - decay d2 + 2 log(1 - d2 / radius2)."""
    pattern = "nhk,mhk->nmh" if side == POINTS else "mhk,nhk->nmh"
    product = jnp.einsum(pattern, query, key, precision=_HIGHEST)
    d2 = jnp.square(pairs.points[:, None] - pairs.anchors).sum(-1)[..., None]
    radius2 = pairs.radius2[:, None, None]
    near = d2 < radius2
    taper = jnp.log1p(-jnp.where(near, d2 / jnp.where(near, radius2, 1), 0))
    return product - decay * d2 + 2 * taper, near


def moments(coefficient: jax.Array | None, pairs: Pairs) -> jax.Array | float:
    """g [N, M, H]: c0 + sum over c of c_c (frame[m, c] . (x_n - u_m))."""
    if coefficient is None:
        return 1.0
    offset = pairs.points[:, None] - pairs.anchors
    along = jnp.einsum("nmp,mcp->nmc", offset, pairs.frame, precision=_HIGHEST)
    return coefficient[:, 0] + jnp.einsum("nmc,hc->nmh", along, coefficient[:, 1:], precision=_HIGHEST)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    decay: jax.Array,
    prior: jax.Array | None,
    coefficient: jax.Array | None,
    pairs: Pairs,
    *,
    side: str,
) -> tuple[jax.Array, jax.Array]:
    """([rows, H, V] sum of weight x moment x value, [rows, H] log of the sum of weights).

    Rows are points or anchors by `side`. The prior, if any, is one more weight, of value 0. Without any weight the
    result is 0 and the logarithm 0.
    """
    query, key, value, decay = (a.astype(jnp.float32) for a in (query, key, value, decay))
    score, near = scores(query, key, decay, pairs, side=side)
    axis = 1 if side == POINTS else 0
    score = jnp.where(near, score, -jnp.inf)
    most = score.max(axis) if prior is None else jnp.maximum(score.max(axis), prior)
    most = jax.lax.stop_gradient(jnp.where(jnp.isfinite(most), most, 0))
    weight = jnp.where(near, jnp.exp(score - jnp.expand_dims(most, axis)), 0)
    total = weight.sum(axis) + (0 if prior is None else jnp.exp(prior - most))
    some = total > 0
    total = jnp.where(some, total, 1)
    pattern = "nmh,mhv->nhv" if side == POINTS else "nmh,nhv->mhv"
    out = jnp.einsum(pattern, weight * moments(coefficient, pairs), value, precision=_HIGHEST) / total[..., None]
    return out, jnp.where(some, most + jnp.log(total), 0)
