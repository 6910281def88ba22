"""The whole expert layer as one loop over experts, for XLA without a kernel (CPU).

A visit gathers the rows of one expert, passes gate, up, activation and down, and writes its output rows; no [M, D] of
gathered inputs and no [M, F] of hidden rows exists. What the shape of the loop comes from (XLA:CPU, 2 cores, D 512,
F 256, float32):

- A product costs what 70 to 100 more rows would, whatever its size (its weights are packed anew), and whole blocks of
  256 rows waste half a block per expert. So an expert is one visit, of the smallest of a dozen static heights that
  holds its rows: 32,768 rows over 64 experts take 117 ms instead of 187 in blocks of 256 (dense floor: 128).
- Each height is a loop of zero or one trips, not a branch of `lax.switch`: a conditional copies the output buffer
  (64 MB a visit), a loop updates it in place. Its body must depend on the counter, else XLA computes it ahead of the
  loop for every height.
- Outputs are added to [T, D] at once: a buffer [M, D] costs more in page faults than the scatter-add in cache.
- An expert's weights are copied out of the stack before its products. With 4 rows an expert that is most of the time,
  so decoding takes one batched product over all experts, which reads in place, and the loop only for what is left.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe.experts.dispatch import Dispatch
from moe.kernels.grouped_matmul.blocked import varying_like
from moe.kernels.grouped_matmul.shapes import ACTIVATIONS

Carry = Any

FEW = 4
"""With at most as many rows an expert on average (decoding), one batched product takes the first FEW of each."""


def heights(rows: int, experts: int) -> tuple[int, ...]:
    """Rows of a visit to choose from, ascending: steps of an eighth of the mean group, up to twice the mean and at most
    1024; a larger group takes several visits of the largest.
    """
    mean = max(1, -(-rows // experts))
    step = max(32, (1 << (mean - 1).bit_length()) // 8)
    ladder = [4, 16, *(step * k for k in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16))]
    ladder = [height for height in ladder if height <= 1024]
    top = next((height for height in ladder if height >= min(2 * mean, 1024)), ladder[-1])
    top = max(16, top)
    return tuple(height for height in ladder if max(4, min(mean // 32, top)) <= height <= top)


def _visit(
    sizes: jax.Array,
    ladder: tuple[int, ...],
    read: Callable[[jax.Array], Any],
    step: Callable[[Carry, Any, jax.Array, jax.Array, jax.Array, int, bool], Carry],
    carry: Carry,
    skip: jax.Array | int = 0,
) -> Carry:
    """Runs step(carry, read(expert), expert, first row, rows that count, height, whether the expert's first) over all
    rows, experts in order; experts without rows are not read. A visit may run over into rows visited later. The
    first `skip` rows of each expert are left out.
    """
    starts = jnp.cumsum(sizes) - sizes + skip
    sizes = jnp.maximum(sizes - skip, 0)
    touched = jnp.argsort(sizes == 0, stable=True)
    top = ladder[-1]

    def expert(i, carry):
        e = touched[i]
        start, count = starts[e], sizes[e]
        whole = (count - 1) // top
        tail = count - whole * top  # 1 .. top, visited first
        weights = read(e)
        for below, height in zip((0, *ladder), ladder, strict=False):
            here = (tail > below) & (tail <= height)
            carry = lax.fori_loop(
                0,
                here.astype(jnp.int32),
                lambda j, carry, height=height: step(carry, weights, e, start + j, tail, height, True),
                carry,
            )
        return lax.fori_loop(
            0,
            whole,
            lambda j, carry: step(carry, weights, e, start + tail + j * top, jnp.int32(top), top, False),
            carry,
        )

    return lax.fori_loop(0, (sizes > 0).sum(dtype=jnp.int32), expert, carry)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    return lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
    )  # fmt: skip


def _read(gate_up: jax.Array, down: jax.Array, e: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """gate [D, F], up [D, F], down [F, D] of an expert."""
    gate, up = (lax.dynamic_slice(gate_up, (e, part, 0, 0), (1, 1, *gate_up.shape[2:]))[0, 0] for part in (0, 1))
    return gate, up, lax.dynamic_index_in_dim(down, e, 0, keepdims=False)


def _take(a: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.take(a, rows, axis=0, mode="clip")


def _by_row(plan: Dispatch, weights: jax.Array, spare: int) -> tuple[jax.Array, jax.Array]:
    """(token, weight) of every row, [M + spare]."""
    order = jnp.pad(plan.order, (0, spare))
    return order // weights.shape[1], _take(weights.reshape(-1), order)


def forward(gate_up, down, x, weights, plan: Dispatch, *, activation: str) -> jax.Array:
    """The layer's output [T, D]."""
    ladder = heights(plan.order.size, len(gate_up))
    token, weight = _by_row(plan, weights, ladder[-1])

    def step(y, matrices, e, at, count, height, first):
        gate, up, down = matrices
        ids = lax.dynamic_slice_in_dim(token, at, height)
        rows = _take(x, ids)
        hidden = ACTIVATIONS[activation](_dot(rows, gate)) * _dot(rows, up)
        hidden = hidden * lax.dynamic_slice_in_dim(weight, at, height)[:, None]
        return _add(y, ids, _dot(hidden.astype(x.dtype), down), count)

    y = varying_like(jnp.zeros(x.shape, jnp.float32), gate_up, down, x, weights, plan.order)
    pairs, experts, done = plan.order.size, len(gate_up), 0
    if experts <= 2 * pairs <= 2 * FEW * experts:
        most = (plan.sizes > 0).sum() > experts // 2
        first = functools.partial(_first_rows, gate_up, down, x, weights, plan, activation)
        y = lax.cond(most, first, lambda y: y, y)
        done = jnp.where(most, FEW, 0)
    return _visit(plan.sizes, ladder, lambda e: _read(gate_up, down, e), step, y, done).astype(x.dtype)


def _first_rows(gate_up, down, x, weights, plan: Dispatch, activation: str, y: jax.Array) -> jax.Array:
    """y plus the output of every expert's first FEW rows: batched products that read all weights in place."""
    top_k = weights.shape[1]
    live = jnp.arange(FEW) < plan.sizes[:, None]
    pair = _take(plan.order, (jnp.cumsum(plan.sizes) - plan.sizes)[:, None] + jnp.arange(FEW))
    rows = jnp.where(live[..., None], _take(x, pair // top_k), 0)
    rows = jnp.broadcast_to(rows[:, None], (len(rows), 2, *rows.shape[1:]))
    pre = jnp.einsum("epcd,epdf->epcf", rows, gate_up, preferred_element_type=jnp.float32)
    hidden = ACTIVATIONS[activation](pre[:, 0]) * pre[:, 1]
    hidden = hidden * jnp.where(live, _take(weights.reshape(-1), pair), 0)[..., None]
    out = jnp.einsum("ecf,efd->ecd", hidden.astype(x.dtype), down, preferred_element_type=jnp.float32)
    ids = jnp.where(live, pair // top_k, len(x)).reshape(-1)
    return y.at[ids].add(out.reshape(len(ids), -1), mode="drop")


def backward(gate_up, down, x, weights, plan: Dispatch, grad, *, activation: str):
    """Gradients of (gate_up, down, x, weights); computes gate and up again."""
    ladder = heights(plan.order.size, len(gate_up))
    token, weight = _by_row(plan, weights, ladder[-1])

    def step(carry, matrices, e, at, count, height, first):
        d_x, d_weight, d_gate_up, d_down = carry
        gate, up, down = matrices
        # What runs over belongs to other experts, or to none and may be NaN: out of every operand of a sum over rows.
        live = (jnp.arange(height) < count)[:, None]
        ids = lax.dynamic_slice_in_dim(token, at, height)
        rows, grads = jnp.where(live, _take(x, ids), 0), jnp.where(live, _take(grad, ids), 0)
        scale = jnp.where(live, lax.dynamic_slice_in_dim(weight, at, height)[:, None], 0)
        u = _dot(grads, down, (1, 1))
        hidden, pull = jax.vjp(lambda g, v: ACTIVATIONS[activation](g) * v, _dot(rows, gate), _dot(rows, up))
        d_gate, d_up = (part.astype(x.dtype) for part in pull(u * scale))
        d_weight = lax.dynamic_update_slice_in_dim(d_weight, (hidden * u).sum(-1), at, 0)
        d_x = _add(d_x, ids, _dot(d_gate, gate, (1, 1)) + _dot(d_up, up, (1, 1)), count)
        for part, d_pre in enumerate((d_gate, d_up)):
            d_gate_up = _put(d_gate_up, _dot(rows, d_pre, (0, 0))[None, None], (e, part, 0, 0), first)
        d_down = _put(d_down, _dot((hidden * scale).astype(x.dtype), grads, (0, 0))[None], (e, 0, 0), first)
        return d_x, d_weight, d_gate_up, d_down

    shapes = (x.shape, token.shape, gate_up.shape, down.shape)
    operands = (gate_up, down, x, weights, plan.order, grad)
    carry = tuple(varying_like(jnp.zeros(shape, jnp.float32), *operands) for shape in shapes)
    carry = _visit(plan.sizes, ladder, lambda e: _read(gate_up, down, e), step, carry)
    d_x, d_weight, d_gate_up, d_down = carry
    d_weights = jnp.where(plan.inverse < plan.sizes.sum(), _take(d_weight, plan.inverse), 0).reshape(weights.shape)
    return d_gate_up.astype(gate_up.dtype), d_down.astype(down.dtype), d_x.astype(x.dtype), d_weights


def _add(total: jax.Array, ids: jax.Array, rows: jax.Array, count: jax.Array) -> jax.Array:
    """total[ids] += rows for the first `count` rows; the others have an id beyond the end, which drops them."""
    ids = jnp.where(jnp.arange(len(ids)) < count, ids, len(total))
    return total.at[ids].add(rows, mode="drop")


def _put(total: jax.Array, piece: jax.Array, at: tuple, first: bool) -> jax.Array:
    """`piece` written at `at` on an expert's first visit, added on the following ones."""
    if not first:
        piece = piece + lax.dynamic_slice(total, at, piece.shape)
    return lax.dynamic_update_slice(total, piece, at)
