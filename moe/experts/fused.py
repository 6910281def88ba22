"""The whole expert layer as one loop over blocks of rows, for XLA without a kernel (CPU).

A block gathers its tokens, passes gate, up, activation and down in cache and writes its output rows; no [M, D] of
gathered inputs, no [M, F] of hidden rows exists. See `moe.kernels.grouped_matmul.blocked` for the loops.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe.experts.dispatch import Dispatch, combine_rows
from moe.kernels.grouped_matmul.blocked import block_rows, varying_like
from moe.kernels.grouped_matmul.shapes import ACTIVATIONS

__all__ = ["backward", "block_rows", "forward"]


def _dot(pattern, a, b):
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def _gather(a, rows):
    return jnp.take(a, rows, axis=0, mode="clip")


def forward(gate_up, down, x, weights, plan: Dispatch, *, activation: str, keep: bool):
    """(output [T, D], gate and up [M + B, 2, F] in x.dtype if `keep` else None)."""
    experts, _, _, hidden_size = gate_up.shape
    top_k, pairs = weights.shape[1], plan.order.size
    size = block_rows(pairs, experts)
    order = jnp.pad(plan.order, (0, size))
    token, weight = order // top_k, _gather(weights.reshape(-1), order)

    def expert(carry, per):
        gate_up, down, start, count = per

        def step(i, carry):
            y, pre = carry
            at = start + i * size
            rows = _gather(x, lax.dynamic_slice_in_dim(token, at, size))
            gate, up = _dot("md,df->mf", rows, gate_up[0]), _dot("md,df->mf", rows, gate_up[1])
            hidden = ACTIVATIONS[activation](gate) * up * lax.dynamic_slice_in_dim(weight, at, size)[:, None]
            out = _dot("mf,fd->md", hidden.astype(x.dtype), down).astype(x.dtype)
            if keep:
                kept = jnp.stack([gate, up], 1).astype(x.dtype)
                pre = lax.dynamic_update_slice_in_dim(pre, kept, at, 0)
            return lax.dynamic_update_slice_in_dim(y, out, at, 0), pre

        return lax.fori_loop(0, (count + size - 1) // size, step, carry), None

    y = jnp.zeros((pairs + size, x.shape[1]), x.dtype)
    pre = jnp.zeros((pairs + size, 2, hidden_size), x.dtype) if keep else None
    operands = (gate_up, down, x, weights, plan.order)
    carry = jax.tree.map(lambda a: varying_like(a, *operands), (y, pre))
    starts = jnp.cumsum(plan.sizes) - plan.sizes
    (y, pre), _ = lax.scan(expert, carry, (gate_up, down, starts, plan.sizes))
    return combine_rows(y, None, plan, top_k), pre


def backward(gate_up, down, x, weights, plan: Dispatch, pre, grad, *, activation: str):
    """Gradients of (gate_up, down, x, weights); gate and up again from `x` where `pre` is None."""
    experts = gate_up.shape[0]
    top_k, pairs = weights.shape[1], plan.order.size
    size = block_rows(pairs, experts)
    order = jnp.pad(plan.order, (0, size))
    token, weight = order // top_k, _gather(weights.reshape(-1), order)
    operands = (gate_up, down, x, weights, plan.order, grad)

    def expert(carry, per):
        gate_up, down, start, count = per

        def step(i, carry):
            d_rows, d_weight, d_gate_up, d_down = carry
            at = start + i * size
            live = (i * size + jnp.arange(size) < count)[:, None]
            ids = lax.dynamic_slice_in_dim(token, at, size)
            rows, grads = jnp.where(live, _gather(x, ids), 0), jnp.where(live, _gather(grad, ids), 0)
            slot = lax.dynamic_slice_in_dim(weight, at, size)[:, None]
            if pre is None:
                gate, up = _dot("md,df->mf", rows, gate_up[0]), _dot("md,df->mf", rows, gate_up[1])
            else:
                kept = lax.dynamic_slice_in_dim(pre, at, size).astype(jnp.float32)
                kept = jnp.where(live[:, :, None], kept, 0)
                gate, up = kept[:, 0], kept[:, 1]
            u = _dot("md,fd->mf", grads, down)
            hidden, pull = jax.vjp(lambda g, v: ACTIVATIONS[activation](g) * v, gate, up)
            d_gate, d_up = (a.astype(x.dtype) for a in pull(u * slot))
            d_gate_up = d_gate_up + jnp.stack([_dot("md,mf->df", rows, d_gate), _dot("md,mf->df", rows, d_up)])
            d_down = d_down + _dot("mf,md->fd", (hidden * slot).astype(x.dtype), grads)
            out = _dot("mf,df->md", d_gate, gate_up[0]) + _dot("mf,df->md", d_up, gate_up[1])
            d_rows = lax.dynamic_update_slice_in_dim(d_rows, out.astype(x.dtype), at, 0)
            d_weight = lax.dynamic_update_slice_in_dim(d_weight, (hidden * u).sum(-1), at, 0)
            return d_rows, d_weight, d_gate_up, d_down

        zero = [varying_like(jnp.zeros(a.shape, jnp.float32), *operands) for a in (gate_up, down)]
        *carry, d_gate_up, d_down = lax.fori_loop(0, (count + size - 1) // size, step, (*carry, *zero))
        return tuple(carry), (d_gate_up.astype(gate_up.dtype), d_down.astype(down.dtype))

    carry = (jnp.zeros((pairs + size, x.shape[1]), x.dtype), jnp.zeros(pairs + size, jnp.float32))
    carry = tuple(varying_like(a, *operands) for a in carry)
    starts = jnp.cumsum(plan.sizes) - plan.sizes
    (d_rows, d_weight), (d_gate_up, d_down) = lax.scan(expert, carry, (gate_up, down, starts, plan.sizes))
    d_weights = jnp.where(plan.inverse < plan.sizes.sum(), _gather(d_weight, plan.inverse), 0).reshape(weights.shape)
    return d_gate_up, d_down, combine_rows(d_rows, None, plan, top_k), d_weights.astype(weights.dtype)
