"""Experts with a fixed number of rows each (GShard, 2006.16668; Switch, 2101.03961): drops tokens beyond it, and pads
every expert up to it. For comparison only.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.experts.dispatch import dispatch
from moe.experts.mlp import ExpertParams
from moe.kernels.grouped_matmul import ACTIVATIONS


def capacity_experts(
    params: ExpertParams,
    x: Float[Array, "T D"],
    index: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    capacity_factor: float = 1.25,
    activation: str = "silu",
) -> Float[Array, "T D"]:
    """As `moe.experts.experts`, each expert taking at most C = ceil(factor * T * K / E) slots, first come, first kept.

    C rows per expert are gathered into [E, C, D], so that the products are three batched matmuls; what finds no place
    adds nothing. C does not shrink with the slots that need no expert.

    Raises:
        ValueError: a capacity_factor that is not positive.
    """
    if not capacity_factor > 0:
        raise ValueError(f"capacity_factor {capacity_factor} must be positive; 1.25 is usual")
    experts = params.gate_up.shape[0]
    tokens, top_k = index.shape
    capacity = min(tokens, math.ceil(capacity_factor * tokens * top_k / experts))
    plan = dispatch(index, experts)
    starts = jnp.cumsum(plan.sizes) - plan.sizes
    row = starts[:, None] + jnp.arange(capacity)
    filled = jnp.arange(capacity) < plan.sizes[:, None]
    pair = jnp.take(plan.order, row, mode="clip")
    rows = jnp.where(filled[..., None], jnp.take(x, pair // top_k, axis=0), 0)
    gate = jnp.einsum("ecd,edf->ecf", rows, params.gate_up[:, 0], preferred_element_type=jnp.float32)
    up = jnp.einsum("ecd,edf->ecf", rows, params.gate_up[:, 1], preferred_element_type=jnp.float32)
    hidden = (ACTIVATIONS[activation](gate) * up).astype(x.dtype)
    y = jnp.einsum("ecf,efd->ecd", hidden, params.down, preferred_element_type=jnp.float32)
    expert = jnp.clip(index, 0, experts - 1)
    place = plan.inverse.reshape(tokens, top_k) - jnp.take(starts, expert)
    kept = (index >= 0) & (index < experts) & (place < capacity)
    share = jnp.where(kept, weights, 0)
    place = jnp.clip(place, 0, capacity - 1)
    out = sum(y[expert[:, k], place[:, k]] * share[:, k, None] for k in range(top_k))
    return jnp.asarray(out).astype(x.dtype)
