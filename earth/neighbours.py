"""The k nearest anchors of every point, and how far the neighbourhood reaches.

Positions are Euclidean, [.., P], scaled by the caller: for a sphere with height P = 4, the unit vector times the radius
over a horizontal length, and height over a vertical length. On the host a tree (scipy, float64); in jit brute force in
blocks of points, whose memory is one block's distances.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Float

from earth.geometry import Array
from moe.params import Param

FAR2 = 1e30
"""Squared radius of a neighbourhood without an edge."""

_TIE = 1e-5
_LEAST2 = 1e-30
# The (k+1)-th anchor is to be outside also where float32 rounds its distance down: the taper's logarithm there is only
# -33, which a score can make up for.
_RIM = 1 - 2e-6


class NeighbourError(ValueError):
    """Positions or a number of neighbours that make no neighbourhood. The message names the value and the remedy."""


@flax.struct.dataclass
class Neighbourhood:
    """Of every point, the anchors at squared distance below `radius2`.

    Attributes:
      index: [N, k] int32, nearest first (ties in any order); -1 where there are fewer than k anchors, and for points at
        NaN.
      radius2: [N] squared distance to the (k+1)-th nearest anchor, less 2e-6 of it: that one is outside. `FAR2` where
        there are at most k anchors; 0 for a point at NaN, which has no neighbours. Never so small that the nearest
        anchor is outside: where k + 1 anchors are nearest alike, which of them count is left open.
    """

    index: Param  # [N, k] int32
    radius2: Param  # [N]


def nearest(points: Float[Array, "N P"], anchors: Float[Array, "M P"], k: int, *, block: int = 512) -> Neighbourhood:
    """The k nearest of M anchors of each of N points, O(N k) memory.

    numpy arrays are searched on the host (a k-d tree in float64) and give numpy arrays; jax arrays by brute force,
    jit-able, with block x M distances in memory. Neither result has a gradient.

    Args:
      k: neighbours, at least 1; may exceed M.
      block: points searched at a time in jit.

    Raises:
      NeighbourError: k < 1; no anchors; a position that is not finite (traced positions cannot be looked at: a point at
        NaN has no neighbours, an anchor at NaN is nobody's).
    """
    if k < 1:
        raise NeighbourError(f"k = {k}; a point needs at least 1 neighbour")
    if not len(anchors):
        raise NeighbourError("there are no anchors; pass at least one position [M, P]")
    for name, positions in (("point", points), ("anchor", anchors)):
        if not isinstance(positions, Tracer):
            bad = ~np.isfinite(np.asarray(positions)).all(1)
            if bad.any():
                row = int(bad.argmax())
                raise NeighbourError(f"{name} {row} is at {np.asarray(positions)[row]}; drop rows that are not finite")
    if isinstance(points, np.ndarray) and isinstance(anchors, np.ndarray):
        return _on_host(points, anchors, k)
    return _in_jit(jnp.asarray(points), jnp.asarray(anchors), k, block)


def _on_host(points: np.ndarray, anchors: np.ndarray, k: int) -> Neighbourhood:
    from scipy.spatial import KDTree

    # Query k + 1 even for M <= k: scipy marks what is missing with an infinite distance and the index M.
    distance, index = KDTree(anchors.astype(np.float64)).query(points.astype(np.float64), k + 1)
    index = np.where(index == len(anchors), -1, index)[:, :k]
    return Neighbourhood(index.astype(np.int32), _radius2(distance**2, k, np).astype(np.float32))


def _radius2(d2, k: int, module) -> Any:
    """[N] from sorted squared distances [N, k + 1]; jnp or np."""
    return module.maximum(module.minimum(d2[:, k] * _RIM, FAR2), d2[:, 0] * (1 + _TIE) + _LEAST2)


def _in_jit(points: jax.Array, anchors: jax.Array, k: int, block: int) -> Neighbourhood:
    points, anchors = lax.stop_gradient((points, anchors))
    count, wanted = len(points), min(k + 1, len(anchors))

    def search(x):
        # One coordinate at a time: no [block, M, P], and no cancellation as in |x|^2 + |u|^2 - 2 <x, u>.
        d2: Any = sum((x[:, p, None] - anchors[None, :, p]) ** 2 for p in range(x.shape[1]))
        least, index = lax.top_k(-jnp.where(jnp.isnan(d2), jnp.inf, d2), wanted)
        return -least, index

    block = min(block, max(count, 1))
    blocks = jnp.pad(points, ((0, -count % block), (0, 0))).reshape(-1, block, points.shape[1])
    d2, index = (a.reshape(-1, wanted)[:count] for a in lax.map(search, blocks))
    index = jnp.where(jnp.isfinite(d2), index, -1).astype(jnp.int32)
    missing = ((0, 0), (0, k + 1 - wanted))
    d2 = jnp.pad(d2, missing, constant_values=jnp.inf)
    index = jnp.pad(index, missing, constant_values=-1)[:, :k]
    radius2 = jnp.where(index[:, 0] < 0, 0, _radius2(d2, k, jnp))
    return Neighbourhood(index, radius2.astype(jnp.float32))
