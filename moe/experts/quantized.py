"""FP8 experts: e4m3 weights in blocks of 128 x 128 (`moe.quantize`), and the layer that runs on them.

    quantised = quantize_experts(params.experts)                        # a quarter of float32, half of bfloat16
    y = quantized_experts(quantised, x, routing.index, routing.weights) # FP8 products on CUDA, simulated elsewhere
    y = experts(simulate_experts(params.experts), x, ...)               # training that sees the rounding

`moe.models.hf.load` reads them from FP8 checkpoints; `expert_layer`, and so a model, runs either kind of experts.
"""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moe.experts.dispatch import Dispatch, combine, dispatch, gather_rows
from moe.experts.mlp import ExpertParams, check_experts
from moe.kernels import grouped_matmul as kernels
from moe.kernels.platform import Partial, platform_dependent
from moe.params import ParamSpec, zeros
from moe.quantize import (
    BLOCK,
    E4M3,
    QuantizationError,
    Quantized,
    check_quantized,
    dequantize,
    quantize_blocks,
    quantize_rows,
    simulate_blocks,
    simulate_rows,
)

T = TypeVar("T")

IMPLEMENTATIONS = ("fp8", "simulated")


@struct.dataclass
class QuantizedExpertParams:
    """E gated MLPs; matrices lie [out, in] as in checkpoints, transposed against `moe.experts.ExpertParams`.

    Attributes:
        gate_up: values [E, 2, F, D].
        down: values [E, D, F].
        scale: kind of the scales, one of `moe.quantize.SCALES`; the layer quantises activations with the same kind.
    """

    gate_up: Quantized
    down: Quantized
    scale: str = struct.field(pytree_node=False, default="float32")


def quantize_experts(params: ExpertParams, *, scale: str = "float32") -> QuantizedExpertParams:
    """[E, 2, D, F], [E, F, D] -> e4m3 [E, 2, F, D], [E, D, F] with float32 scales."""
    return QuantizedExpertParams(
        quantize_blocks(params.gate_up.mT, scale=scale), quantize_blocks(params.down.mT, scale=scale), scale
    )


def dequantize_experts(params: QuantizedExpertParams, dtype: jax.typing.DTypeLike = jnp.float32) -> ExpertParams:
    """What `quantize_experts` kept, [E, 2, D, F] and [E, F, D]."""
    return ExpertParams(gate_up=dequantize(params.gate_up, dtype).mT, down=dequantize(params.down, dtype).mT)


def simulate_experts(params: ExpertParams, *, scale: str = "float32", straight_through: bool = True) -> ExpertParams:
    """The experts as FP8 would hold them, in their own dtype: for training, with `moe.experts.experts`."""
    # Blocks are square: those of a matrix are those of its transpose.
    return jax.tree.map(lambda w: simulate_blocks(w, scale=scale, straight_through=straight_through), params)


def quantize_tree(params: T, *, scale: str = "float32") -> T:
    """Every `ExpertParams` inside a tree of parameters replaced by `QuantizedExpertParams`; all else as it is."""
    return _map_experts(functools.partial(quantize_experts, scale=scale), params)


def quantize_specs(specs: T, *, scale: str = "float32") -> T:
    """The specs of what `quantize_tree` makes of parameters with these, stacked or not. The last two axes of scales are
    not split: there is one for 128 elements, too few to divide over a mesh.
    """

    def quantized(spec: ParamSpec) -> Quantized:
        *stack, columns, rows = spec.shape
        *names, inputs, outputs = spec.axes
        blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
        return Quantized(
            values=ParamSpec((*stack, rows, columns), (*names, outputs, inputs), zeros, E4M3),
            scale=ParamSpec((*stack, *blocks), (*names, None, None), zeros),
        )

    return _map_experts(lambda p: QuantizedExpertParams(quantized(p.gate_up), quantized(p.down), scale), specs)


def _map_experts(function: Any, tree: T) -> T:
    def is_experts(node: Any) -> bool:
        return isinstance(node, ExpertParams)

    return jax.tree.map(lambda node: function(node) if is_experts(node) else node, tree, is_leaf=is_experts)


def _fp8_forward(params: QuantizedExpertParams, x, weights, plan: Dispatch, *, activation: str):
    """FP8 products. Tokens are quantised before they are gathered: the K rows of a token share its values."""
    from moe.kernels.grouped_matmul import pallas_gpu  # Pallas is slow to import

    top_k = weights.shape[1]
    tokens, token = quantize_rows(x, scale=params.scale), plan.order // top_k
    gate_up, down = params.gate_up, params.down
    rows, row_scale = (jnp.take(a, token, axis=0, mode="clip") for a in (tokens.values, tokens.scale))
    hidden = pallas_gpu.gmm_fp8(
        rows, row_scale, gate_up.values, gate_up.scale, plan.sizes, activation=activation, dtype=x.dtype
    )
    hidden = quantize_rows(hidden, scale=params.scale)
    y = pallas_gpu.gmm_fp8(
        hidden.values, hidden.scale, down.values[:, None], down.scale[:, None], plan.sizes, dtype=x.dtype
    )
    return combine(y[:, 0], weights, plan)


def _simulated_forward(params: QuantizedExpertParams, x, weights, plan: Dispatch, *, activation: str):
    """The numbers of FP8, multiplied in the dtype of x. Differentiable in x and weights."""
    full = dequantize_experts(params, x.dtype)
    rows = gather_rows(simulate_rows(x, scale=params.scale), plan, weights.shape[1])
    hidden = kernels.gated_grouped_matmul(rows, full.gate_up, plan.sizes, activation=activation)
    y = kernels.grouped_matmul(simulate_rows(hidden, scale=params.scale), full.down, plan.sizes)
    return combine(y, weights, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _quantized_experts(params, x, weights, plan, activation, implementation):
    fp8, simulated = (Partial(f, activation=activation) for f in (_fp8_forward, _simulated_forward))
    if implementation is not None:
        return {"fp8": fp8, "simulated": simulated}[implementation](params, x, weights, plan)
    return platform_dependent(params, x, weights, plan, cuda=fp8, default=simulated)


def _quantized_experts_forward(params, x, weights, plan, activation, implementation):
    return _quantized_experts(params, x, weights, plan, activation, implementation), (params, x, weights, plan)


def _quantized_experts_backward(activation, implementation, saved, grad):
    params, x, weights, plan = saved
    _, pull = jax.vjp(
        lambda x, weights: _simulated_forward(params, x, weights, plan, activation=activation), x, weights
    )
    return None, *pull(grad), None


_quantized_experts.defvjp(_quantized_experts_forward, _quantized_experts_backward)


def quantized_experts(
    params: QuantizedExpertParams,
    x: Float[Array, "T D"],
    index: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    activation: str = "silu",
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """`moe.experts.experts` with FP8 weights and FP8 activations: x and the hidden layer are rounded to e4m3 as well,
    every 128 elements of a row with a scale of their own. Weights alone in FP8: `experts(dequantize_experts(params,
    x.dtype), x, index, weights)`.

    Differentiable in x and weights, straight through the rounding and by products in the dtype of x; params are
    constants (train with `simulate_experts`).

    Args:
        params: of `quantize_experts` or a checkpoint.
        index, weights, activation: as in `experts`.
        implementation: "fp8" is the kernel for CUDA (interpreted where lowered for another platform), "simulated"
            dequantises the weights at every call and multiplies in the dtype of x. None: "fp8" where lowered for CUDA.

    Raises:
        QuantizationError: params or an implementation that cannot be.
        ValueError: as `experts`.
    """
    for label, q in (("gate_up", params.gate_up), ("down", params.down)):
        check_quantized(q, label)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise QuantizationError(
            f"implementation {implementation!r} is not one of {', '.join(map(repr, IMPLEMENTATIONS))}"
        )
    kernels.check_activation(activation)
    shapes = jax.eval_shape(functools.partial(dequantize_experts, dtype=x.dtype), params)
    check_experts(shapes, x, index, weights)
    plan = dispatch(index, params.gate_up.values.shape[0])
    leaves, tree = jax.tree.flatten((params, x, weights, plan))
    operands = jax.tree.unflatten(tree, kernels.align_varying(*leaves))
    return _quantized_experts(*operands, activation, implementation)
