"""Neighbour attention for XLA without a kernel (CPU; fallback anywhere): blocks of points that lie together, each
against the union of its neighbours.

Points are put in order of their nearest anchor (which lie along a space-filling curve), so that the points of a block
share most of their neighbours: with k = 8, 32 points have 28 between them at 8 points per anchor, 70 at one. The union
is gathered once, in chunks, and the products over it are matrix products: more operations than a gather per pair, and
no array of [N, k, H, V]. Points outside a neighbourhood are masked by distance, so the result does not depend on the
order. The gradient runs through the same loop and computes weights again.

Memory: block x chunk x H, and the lists of neighbours, [N k].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from earth.kernels.neighbour_attention.order import anchor_order, point_order
from earth.kernels.neighbour_attention.shapes import POINTS, Pairs

_LOW = -1e30
_AWAY = 1e18
"""Position of the anchor that pads a chunk: nobody's neighbour."""


def block_sizes(points: int, anchors: int) -> tuple[int, int]:
    """(points in a block, neighbours in a chunk), from sweeps on a shared Zen 4 core: 16-128 by 32-64 at three shapes
    up to 16,384 points, 64-512 at one of them.
    """
    return (32, 32) if points >= 4 * anchors else (16, 64)


class _Lists(NamedTuple):
    """Blocks of points and whom they meet.

    Attributes:
      chunk: U, neighbours taken at a time.
      order: [blocks, B] points, N for none; inverse: [N] where each is in it.
      union: [blocks, L] anchors, M for none; count: [blocks] of them.
    """

    chunk: int
    order: jax.Array
    inverse: jax.Array
    union: jax.Array
    count: jax.Array


def _lists(pairs: Pairs) -> _Lists:
    points, anchors = pairs.sizes
    block, chunk = block_sizes(points, anchors)
    order = point_order(pairs, anchor_order(pairs.anchors))
    inverse = jnp.zeros(points, jnp.int32).at[order].set(jnp.arange(points, dtype=jnp.int32), unique_indices=True)
    order = jnp.pad(order, (0, -points % block), constant_values=points).reshape(-1, block)
    index = jnp.where(pairs.index < 0, anchors, pairs.index)
    index = jnp.pad(index, ((0, 1), (0, 0)), constant_values=anchors)
    slots = block * index.shape[1]
    length = -(-slots // chunk) * chunk
    position = jnp.arange(slots, dtype=jnp.int32)

    def union(owner, rows):
        # The last slot to name an anchor owns it. Only entries just written are read, so nothing is cleared.
        named = index[rows].reshape(-1)
        owner = owner.at[named].set(position)
        first = (owner[named] == position) & (named < anchors)
        at = jnp.where(first, jnp.cumsum(first) - 1, length)
        return owner, (jnp.full(length, anchors, jnp.int32).at[at].set(named, mode="drop"), first.sum(dtype=jnp.int32))

    _, (lists, count) = lax.scan(union, jnp.zeros(anchors + 1, jnp.int32), order)
    return _Lists(chunk, order, inverse, lists, count)


class _Near(NamedTuple):
    """Of a block and a chunk: d2 [B, U], (1 - d2 / radius2)^2 with 0 outside, and offsets along the frame."""

    d2: Any
    taper: jax.Array
    along: list[Any]


def _near(x, radius2, u, frame) -> _Near:
    offset = [x[:, None, p] - u[None, :, p] for p in range(x.shape[1])]
    d2: Any = sum(o * o for o in offset)
    # Blocks without a radius have no points in them; 1e-30 only keeps the quotient finite.
    edge = jnp.maximum(1 - d2 / jnp.maximum(radius2, 1e-30)[:, None], 0)
    along = []
    if frame is not None:
        along = [sum(o * frame[None, :, c, p] for p, o in enumerate(offset)) for c in range(frame.shape[1])]
    return _Near(d2, jnp.where(radius2[:, None] > 0, edge * edge, 0), along)


def _moment(coefficient, near: _Near):
    """[H, B, U], or None for 1."""
    if coefficient is None:
        return None
    g = coefficient[:, 0, None, None]
    for c, along in enumerate(near.along):
        g = g + coefficient[:, 1 + c, None, None] * along
    return g


def _score(point, anchor, decay, near: _Near) -> jax.Array:
    """[H, B, U] without the taper, very low outside the neighbourhood."""
    product = jnp.einsum("bhk,uhk->hbu", point, anchor)
    return jnp.where(near.taper > 0, product - decay.T[:, None, :] * near.d2, _LOW)


def _padded(a, fill: float = 0) -> Any:
    """With one more row, which the lists name where they name nobody."""
    if a is None:
        return None
    return jnp.pad(a.astype(jnp.float32), ((0, 1), *[(0, 0)] * (a.ndim - 1)), constant_values=fill)


def _loop(lists: _Lists, block, step: Callable, carry: Any) -> Any:
    """step(ids of a chunk, carry) over the chunks of a block's union."""

    def chunk(i, carry):
        return step(lax.dynamic_slice_in_dim(lists.union[block], i * lists.chunk, lists.chunk), carry)

    return lax.fori_loop(0, (lists.count[block] + lists.chunk - 1) // lists.chunk, chunk, carry)


def forward(query, key, value, decay, prior, coefficient, pairs: Pairs, *, side: str) -> tuple[jax.Array, jax.Array]:
    """As `reference.forward`."""
    anchors = pairs.sizes[1]
    lists = _lists(pairs)
    x, radius2, u = _padded(pairs.points), _padded(pairs.radius2), _padded(pairs.anchors, _AWAY)
    frame = _padded(pairs.frame) if coefficient is not None else None
    query, key, value, decay = (_padded(a) for a in (query, key, value, decay))
    coefficient = None if coefficient is None else coefficient.astype(jnp.float32)
    heads, width = value.shape[1:]

    def near(rows, ids):
        return _near(x[rows], radius2[rows], u[ids], None if frame is None else frame[ids])

    def read(block):
        rows = lists.order[block]
        q = query[rows]

        def step(ids, carry):
            most, total, out = carry
            here = near(rows, ids)
            score = _score(q, key[ids], decay[ids], here)
            most, before = jnp.maximum(most, score.max(-1)), most
            weight = jnp.exp(score - most[..., None]) * here.taper
            keep = jnp.exp(before - most)
            total = total * keep + weight.sum(-1)
            g = _moment(coefficient, here)
            product = jnp.einsum("hbu,uhv->hbv", weight if g is None else weight * g, value[ids])
            return most, total, out * keep[..., None] + product

        shape = (heads, len(rows))
        start = (jnp.full(shape, _LOW), jnp.zeros(shape), jnp.zeros((*shape, width)))
        most, total, out = _loop(lists, block, step, start)
        some = total > 0
        total = jnp.where(some, total, 1)
        out = out / total[..., None]
        return out.transpose(1, 0, 2), jnp.where(some, most + jnp.log(total), 0).T

    def feed(carry, block):
        rows = lists.order[block]
        k, v = key[rows], value[rows]

        def step(ids, carry):
            most, total, out = carry
            here = near(rows, ids)
            score = _score(k, query[ids], decay[ids], here)
            before = most[ids]
            after = jnp.maximum(before, score.max(1).T)
            weight = jnp.exp(score - after.T[:, None]) * here.taper
            keep = jnp.exp(before - after)
            g = _moment(coefficient, here)
            product = jnp.einsum("hbu,bhv->uhv", weight if g is None else weight * g, v)
            return (
                most.at[ids].set(after),
                total.at[ids].set(total[ids] * keep + weight.sum(1).T),
                out.at[ids].set(out[ids] * keep[..., None] + product),
            )

        return _loop(lists, block, step, carry), None

    blocks = jnp.arange(len(lists.order))
    if side == POINTS:
        out, total = lax.map(read, blocks)
        return out.reshape(-1, heads, width)[lists.inverse], total.reshape(-1, heads)[lists.inverse]
    start = (_padded(prior), jnp.ones((anchors + 1, heads)), jnp.zeros((anchors + 1, heads, width)))
    most, total, out = lax.scan(feed, start, blocks)[0]
    return (out / total[..., None])[:-1], (most + jnp.log(total))[:-1]


def backward(query, key, value, decay, coefficient, pairs: Pairs, total, grad, rest, *, side: str) -> tuple:
    """Gradients of (query, key, value, decay, coefficient).

    Args:
      total: [rows, H] logarithms of the sums of weights; grad: [rows, H, V] of the result.
      rest: [rows, H] what is taken off every weight's own gradient.
    """
    lists = _lists(pairs)
    x, radius2, u = _padded(pairs.points), _padded(pairs.radius2), _padded(pairs.anchors, _AWAY)
    frame = _padded(pairs.frame) if coefficient is not None else None
    coefficient = None if coefficient is None else coefficient.astype(jnp.float32)
    reads = side == POINTS
    # Of either side: the vector in the score, and the one that the weight's gradient is a product with.
    mine, wide, theirs, broad = (query, grad, key, value) if reads else (key, value, query, grad)
    mine, wide, theirs, broad, decay = (_padded(a) for a in (mine, wide, theirs, broad, decay))
    total, rest = _padded(total), _padded(rest)

    def block_gradient(carry, block):
        rows = lists.order[block]
        a, w, x_rows, radius2_rows = mine[rows], wide[rows], x[rows], radius2[rows]

        def of_rows(array, ids):
            """[H, B, 1] or [H, 1, U]"""
            return array[rows].T[:, :, None] if reads else array[ids].T[:, None, :]

        def step(ids, carry):
            of_mine, of_wide, of_theirs, of_broad, of_decay, of_coefficient = carry
            near = _near(x_rows, radius2_rows, u[ids], None if frame is None else frame[ids])
            b = theirs[ids]
            score = _score(a, b, decay[ids], near)
            weight = jnp.where(near.taper > 0, jnp.exp(score - of_rows(total, ids)) * near.taper, 0)
            product = jnp.einsum("bhv,uhv->hbu", w, broad[ids])
            g = _moment(coefficient, near)
            moved = weight if g is None else weight * g
            of_score = moved * product - weight * of_rows(rest, ids)
            of_mine = of_mine + jnp.einsum("hbu,uhk->bhk", of_score, b)
            of_theirs = of_theirs.at[ids].add(jnp.einsum("hbu,bhk->uhk", of_score, a))
            of_decay = of_decay.at[ids].add(-jnp.einsum("hbu,bu->uh", of_score, near.d2))
            if reads:
                of_broad = of_broad.at[ids].add(jnp.einsum("hbu,bhv->uhv", moved, w))
            else:
                of_wide = of_wide + jnp.einsum("hbu,uhv->bhv", moved, broad[ids])
            if coefficient is not None:
                per = weight * product
                parts = [per.sum((1, 2)), *((per * along).sum((1, 2)) for along in near.along)]
                of_coefficient = of_coefficient + jnp.stack(parts, -1)
            return of_mine, of_wide, of_theirs, of_broad, of_decay, of_coefficient

        shared, of_coefficient = carry
        start = (jnp.zeros_like(a), jnp.zeros(() if reads else w.shape), *shared, of_coefficient)
        of_mine, of_wide, *shared, of_coefficient = _loop(lists, block, step, start)
        return (tuple(shared), of_coefficient), (of_mine, of_wide)

    shared = (jnp.zeros_like(theirs), jnp.zeros_like(broad) if reads else jnp.zeros(()), jnp.zeros_like(decay))
    start = (shared, jnp.zeros(()) if coefficient is None else jnp.zeros_like(coefficient))
    (shared, of_coefficient), (of_mine, of_wide) = lax.scan(block_gradient, start, jnp.arange(len(lists.order)))
    of_theirs, of_broad, of_decay = shared
    of_mine = of_mine.reshape(-1, *of_mine.shape[2:])[lists.inverse]
    of_theirs, of_decay = of_theirs[:-1], of_decay[:-1]
    if reads:
        return of_mine, of_theirs, of_broad[:-1], of_decay, of_coefficient
    of_wide = of_wide.reshape(-1, *of_wide.shape[2:])[lists.inverse]
    return of_theirs, of_mine, of_wide, of_decay, of_coefficient
