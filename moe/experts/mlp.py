"""The expert layer: gated MLPs, each token through K of them."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moe.experts import fused
from moe.experts.dispatch import Dispatch, combine_rows, dispatch
from moe.kernels import grouped_matmul as kernels
from moe.kernels.platform import Partial
from moe.params import Param, ParamSpec


@struct.dataclass
class ExpertParams:
    """E gated MLPs.

    Attributes:
        gate_up: gate and up projection, gate first.
        down: down projection.
    """

    gate_up: Param  # [E, 2, D, F]
    down: Param  # [E, F, D]


def expert_specs(experts: int, width: int, hidden: int) -> ExpertParams:
    """Specs of E experts of model size D = `width` and expert width F = `hidden`."""
    return ExpertParams(
        gate_up=ParamSpec((experts, 2, width, hidden), ("expert", None, "embed", "mlp")),
        down=ParamSpec((experts, hidden, width), ("expert", "mlp", "embed")),
    )


def _composed_forward(gate_up, down, x, weights, plan, *, activation, keep, implementation):
    """The layer of grouped matmuls. Returns (output [T, D], gate beside up [M, 2F] if `keep`)."""
    top_k = weights.shape[1]
    rows = jnp.take(x, plan.order // top_k, axis=0, mode="clip")
    if keep:
        pre = kernels.gmm(rows, gate_up, plan.sizes, implementation=implementation)
        hidden = kernels.ACTIVATIONS[activation](pre[:, 0].astype(jnp.float32)) * pre[:, 1].astype(jnp.float32)
        hidden = hidden.astype(x.dtype)
    else:
        pre = None
        hidden = kernels.gated(rows, gate_up, plan.sizes, activation=activation, implementation=implementation)
    y = kernels.gmm(hidden, down[:, None], plan.sizes, implementation=implementation)[:, 0]
    return combine_rows(y, weights, plan, top_k), None if pre is None else pre.reshape(len(pre), -1)


def _composed_backward(gate_up, down, x, weights, plan, pre, grad, *, activation, implementation):
    """Gradients of (gate_up, down, x, weights) out of grouped matmuls.

    The weight of a slot is applied to the hidden rows: with u = gradient @ down.T of a row, its slot's weight has the
    gradient hidden . u, and the forward's [M, D] output is not needed again.
    """
    top_k = weights.shape[1]
    token = plan.order // top_k
    rows, grad_rows = jnp.take(x, token, axis=0, mode="clip"), jnp.take(grad, token, axis=0, mode="clip")
    if pre is None:
        pre = kernels.gmm(rows, gate_up, plan.sizes, implementation=implementation)
    pre = pre.reshape(len(pre), 2, -1)
    u = kernels.gmm_t(grad_rows[:, None], down[:, None], plan.sizes, implementation=implementation)
    weight = jnp.take(weights.reshape(-1), plan.order)[:, None]
    hidden, d_pre = kernels.activation_vjp(pre, u.astype(jnp.float32) * weight, activation, x.dtype)
    hidden32 = hidden.astype(jnp.float32)
    d_weight = (hidden32 * u.astype(jnp.float32)).sum(-1)
    live = jnp.arange(len(token)) < plan.sizes.sum()
    d_weights = jnp.take(jnp.where(live, d_weight, 0), plan.inverse).reshape(weights.shape)
    weighted = (hidden32 * weight).astype(x.dtype)
    d_down = kernels.tgmm(weighted, grad_rows[:, None], plan.sizes, dtype=down.dtype, implementation=implementation)
    d_gate_up = kernels.tgmm(rows, d_pre, plan.sizes, dtype=gate_up.dtype, implementation=implementation)
    d_rows = kernels.gmm_t(d_pre, gate_up, plan.sizes, implementation=implementation)
    return d_gate_up, d_down[:, 0], combine_rows(d_rows, None, plan, top_k), d_weights


def _loop_forward(*operands, activation, keep):
    # The fused loop never keeps: zeros that no backward reads are removed by XLA.
    gate_up, _, x, _, plan = operands
    pre = jnp.zeros((plan.order.size, 2 * gate_up.shape[-1]), x.dtype) if keep else None
    pre = jax.tree.map(lambda a: kernels.align_varying(a, *jax.tree.leaves(operands))[0], pre)
    return fused.forward(*operands, activation=activation), pre


def _loop_backward(gate_up, down, x, weights, plan, pre, grad, *, activation):
    return fused.backward(gate_up, down, x, weights, plan, grad, activation=activation)


def _forward(gate_up, down, x, weights, plan, activation, keep, implementation):
    operands = (gate_up, down, x, weights, plan)
    composed = Partial(_composed_forward, activation=activation, keep=keep)
    loop = Partial(_loop_forward, activation=activation, keep=keep)
    if implementation == "fused":
        return loop(*operands)
    return kernels.by_platform(composed, *operands, implementation=implementation, default=loop)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _experts(gate_up, down, x, weights, plan, activation, recompute, implementation):
    return _forward(gate_up, down, x, weights, plan, activation, False, implementation)[0]


def _experts_forward(gate_up, down, x, weights, plan, activation, recompute, implementation):
    out, pre = _forward(gate_up, down, x, weights, plan, activation, not recompute, implementation)
    return out, (gate_up, down, x, weights, plan, pre)


def _experts_backward(activation, recompute, implementation, saved, grad):
    operands = (*saved, grad)
    composed = Partial(_composed_backward, activation=activation)
    loop = Partial(_loop_backward, activation=activation)
    if implementation == "fused":
        return (*loop(*operands), None)
    return (*kernels.by_platform(composed, *operands, implementation=implementation, default=loop), None)


_experts.defvjp(_experts_forward, _experts_backward)


def check_experts(params: ExpertParams, x: jax.Array, index: jax.Array, weights: jax.Array) -> None:
    """Raises ValueError where the operands of `experts` do not fit together; names the shape and the remedy."""
    gate_up, down = params.gate_up, params.down
    if gate_up.ndim != 4 or gate_up.shape[1] != 2 or down.shape != (gate_up.shape[0], *gate_up.shape[:1:-1]):
        raise ValueError(
            f"gate_up {gate_up.shape} and down {down.shape} must be [E, 2, D, F] and [E, F, D]; see expert_specs"
        )
    width = gate_up.shape[2]
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"x of shape {x.shape} must be [T, D = {width}]; flatten batch and sequence into T")
    if index.ndim != 2 or index.shape != weights.shape or len(index) != len(x):
        raise ValueError(
            f"index {index.shape} and weights {weights.shape} must both be [T = {len(x)}, K], a row for every row of x"
        )
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"index is {index.dtype}; hand over integers, such as Routing.index")
    if weights.dtype != jnp.float32:
        raise ValueError(f"weights are {weights.dtype}; keep routing weights in float32")
    if not x.dtype == gate_up.dtype == down.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x is {x.dtype}, gate_up {gate_up.dtype}, down {down.dtype}; cast the three to one floating dtype "
            "(moe.training.Policy does), sums are float32 anyway"
        )


def experts(
    params: ExpertParams,
    x: Float[Array, "T D"],
    index: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    activation: str = "silu",
    recompute: bool = True,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """sum over k of weights[t, k] * (act(x_t @ gate_i) * (x_t @ up_i)) @ down_i with i = index[t, k].

    Dropless, and its cost follows the slots that have an expert: an index outside [0, E) (zero, copy and constant
    slots, padding) is sorted past the last expert, meets no matrix and adds nothing, whatever the weight.
    Differentiable in params, x and weights. Sums are float32, the output has the dtype of x.

    Args:
        params: [E, 2, D, F] and [E, F, D], in the dtype of x.
        index: as `moe.routing.Routing.index`; the experts of a token should be distinct.
        weights: float32; `Routing.weights`.
        activation: "silu" or "gelu_tanh".
        recompute: the backward computes gate and up again, two more products to nine; False keeps [T * K, 2 F] where
            grouped matmuls run. The fused loop always recomputes: keeping was slower (407 ms to 317).
        implementation: None takes a fused loop where lowered for CPU (and where there is no kernel), the grouped matmul
            of the platform on TPU and CUDA. "fused" forces the loop, a name of
            `moe.kernels.grouped_matmul.IMPLEMENTATIONS` that grouped matmul.

    Raises:
        ValueError: operands that do not fit together, an unknown activation or implementation.
    """
    check_experts(params, x, index, weights)
    kernels.check_activation(activation)
    if implementation != "fused":
        kernels.check_implementation(implementation)
    plan = dispatch(index, params.gate_up.shape[0])
    gate_up, down, x, weights, *plan_arrays = kernels.align_varying(
        params.gate_up, params.down, x, weights, plan.order, plan.inverse, plan.sizes
    )
    return _experts(gate_up, down, x, weights, Dispatch(*plan_arrays), activation, recompute, implementation)
