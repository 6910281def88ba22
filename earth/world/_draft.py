"""Stand-in for the kernels, until they are merged."""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import cKDTree


@flax.struct.dataclass
class Neighbourhood:
    index: Any
    radius2: Any


def nearest_host(points, anchors, k):
    tree = cKDTree(np.asarray(anchors, np.float64))
    extra = min(k + 1, len(anchors))
    d, i = tree.query(np.asarray(points, np.float64), extra)
    r2 = d[:, -1] ** 2 if extra == k + 1 else np.full(len(points), 1e30)
    return Neighbourhood(i[:, :k].astype(np.int32), r2.astype(np.float32))


def _scores(query, key, at, to, near, decay, frame, coefficient, side):
    """[N, k, H] scores and moments; `side` says which of query and key belongs to the points."""
    delta = at[:, None] - to[near.index]  # [N, k, P]
    d2 = (delta * delta).sum(-1)
    q, kk = (query[:, None], key[near.index]) if side == "attend" else (query[near.index], key[:, None])
    s = (q * kk).sum(-1) / math.sqrt(query.shape[-1])
    taper = jnp.maximum(1.0 - d2 / near.radius2[:, None], 1e-9)
    s = s - decay[near.index] * d2[..., None] + 2.0 * jnp.log(taper)[..., None]
    g = None
    if coefficient is not None:
        moments = jnp.einsum("nkcp,nkp->nkc", frame[near.index], delta)
        g = coefficient[:, 0] + jnp.einsum("nkc,hc->nkh", moments, coefficient[:, 1:])
    return s, g


def attend(query, key, value, at, to, near, decay, *, frame=None, coefficient=None):
    s, g = _scores(query, key, at, to, near, decay, frame, coefficient, "attend")
    w = jax.nn.softmax(s, 1)
    if g is not None:
        w = w * g
    return jnp.einsum("nkh,nkhv->nhv", w, value[near.index])


def collect(query, key, value, at, to, near, decay, prior, *, where=None, frame=None, coefficient=None):
    m, h, _ = query.shape
    s, g = _scores(query, key, at, to, near, decay, frame, coefficient, "collect")
    if where is not None:
        s = jnp.where(where[:, None, None], s, -jnp.inf)
        value = jnp.where(where[:, None, None], value, 0.0)
    flat = near.index.reshape(-1)
    top = jnp.maximum(jax.ops.segment_max(jax.lax.stop_gradient(s.reshape(-1, h)), flat, m), prior)
    top = jax.lax.stop_gradient(top)
    w = jnp.exp(s - top[near.index])
    total = jax.ops.segment_sum(w.reshape(-1, h), flat, m)
    norm = jnp.exp(prior - top) + total
    wg = w if g is None else w * g
    # gather form of the sum: one pass over pairs
    pairs = wg[..., None] * value[:, None]
    out = jax.ops.segment_sum(pairs.reshape(-1, *value.shape[1:]), flat, m)
    return out / norm[..., None], total / norm


def attend2(query, key, value, decay, meet, *, coefficient=None):
    near = Neighbourhood(meet.index, meet.radius2)
    return attend(query, key, value, meet.points, meet.anchors, near, decay, frame=meet.frame, coefficient=coefficient)


def collect2(query, key, value, decay, prior, meet, *, coefficient=None):
    near = Neighbourhood(jnp.maximum(meet.index, 0), jnp.maximum(meet.radius2, 1e-6))
    return collect(
        query,
        key,
        value,
        meet.points,
        meet.anchors,
        near,
        decay,
        prior,
        where=meet.where,
        frame=meet.frame,
        coefficient=coefficient,
    )
