"""Orders in which neighbours lie together."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from earth.kernels.neighbour_attention.shapes import Pairs


def anchor_order(positions: jax.Array) -> jax.Array:
    """[M, P] -> [M] int32, the anchors along a Z-curve: cells of the bounding cube, bits of all axes in turns."""
    axes = positions.shape[1]
    bits = 30 // axes
    low = positions.min(0)
    width = jnp.maximum((positions.max(0) - low).max(), 1e-30)
    cell = jnp.clip((positions - low) / width * 2**bits, 0, 2**bits - 1).astype(jnp.int32)
    code = jnp.zeros(len(positions), jnp.int32)
    for bit in range(bits):
        for axis in range(axes):
            code |= ((cell[:, axis] >> bit) & 1) << (bit * axes + axis)
    return jnp.argsort(code).astype(jnp.int32)


def rank(order: jax.Array) -> jax.Array:
    """Where each is in the order."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)


def arrangement(near: Any, anchors: Any) -> np.ndarray:
    """[..., N] int, the order of `point_order`, on the host: of neighbours [..., N, k] (-1 none), anchors at [M, P]."""
    place = np.append(np.asarray(rank(anchor_order(jnp.asarray(anchors, jnp.float32)))), len(anchors))
    return np.argsort(place[np.asarray(near)[..., 0]], axis=-1, kind="stable")


def point_order(pairs: Pairs, anchors: jax.Array) -> jax.Array:
    """[N] int32: points by the place of their nearest anchor in the order `anchors` [M]; those without one last."""
    place = jnp.append(rank(anchors), len(anchors))
    return jnp.argsort(place[pairs.index[:, 0]]).astype(jnp.int32)
