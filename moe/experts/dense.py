"""Every expert on every token: E / K times the work. What the other paths are compared with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.experts.mlp import ExpertParams
from moe.kernels.grouped_matmul import ACTIVATIONS


def dense_experts(
    params: ExpertParams,
    x: Float[Array, "T D"],
    index: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    activation: str = "silu",
) -> Float[Array, "T D"]:
    """`moe.experts.experts` written as three einsums over [T, E, F]; float32 inside, ordinary gradients."""
    x32, gate_up, down = (a.astype(jnp.float32) for a in (x, params.gate_up, params.down))
    experts = gate_up.shape[0]
    chosen = index[..., None] == jnp.arange(experts)  # an index outside [0, E) matches none
    share = jnp.where(chosen, weights[..., None].astype(jnp.float32), 0).sum(1)
    highest = jax.lax.Precision.HIGHEST
    gate = jnp.einsum("td,edf->tef", x32, gate_up[:, 0], precision=highest)
    up = jnp.einsum("td,edf->tef", x32, gate_up[:, 1], precision=highest)
    hidden = ACTIVATIONS[activation](gate) * up * share[..., None]
    return jnp.einsum("tef,efd->td", hidden, down, precision=highest).astype(x.dtype)
