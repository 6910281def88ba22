"""FP8 numbers: e4m3 values with a scale for each 128 x 128 block of a weight, and each 128 elements of a token.

    q = quantize_blocks(w)          # Quantized: values and scales; `dequantize` undoes it but for the rounding
    w = simulate_blocks(w)          # rounded and back, gradients pass straight through
    scale_format(config)            # of a checkpoint's quantization_config

`moe.experts.quantized` are the experts made of them.

The convention is that of DeepSeek-V3 (2412.19437 section 3.3) and of the FP8 checkpoints on the Hugging Face hub
(DeepSeek-V3, Qwen3-*-FP8): `weight` [out, in] in float8_e4m3fn beside `weight_scale_inv`, one number per block; its
name notwithstanding, weight * scale is what is meant. Scales are float32, or powers of two ("ue8m0", as in
DeepSeek-V3.1): then dequantising to bfloat16 is exact. Router, norms, embeddings and head stay as they are
(`stays_high_precision`).

Where what is multiplied:
- CUDA: Triton, wgmma on e4m3 operands (`pallas_gpu.gmm_fp8`); compiled for sm_90, never run.
- Elsewhere: the values that FP8 operands would have, in the dtype of x. Of libtpu 0.0.42, the compiler takes a Pallas
  dot of e4m3 operands on v5e, v5p, v6e and v7x (512 x 512 x 512: 64 matmul instructions on v7x against 128 in bfloat16,
  in the type f8e4m3fn; on v6e 64 against 128 in f8e4m3b11; XLA's own dot on v6e converts to float32). No kernel here
  uses that.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from moe.params import Param

BLOCK = 128
E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
SCALES = ("float32", "ue8m0")

# Names, in ours and in Hugging Face checkpoints, of what FP8 checkpoints keep in bfloat16 or float32: routers (gate,
# router, classifier; not gate_proj), norms, embeddings, the head, biases.
_HIGH_PRECISION = re.compile(
    r"(^|[./_])(router|gate|classifier|norm|layernorm|\w*norm|embed|embedding|embed_tokens|lm_head|head|bias|\w+_bias)"
    r"([./]|$)"
)


class QuantizationError(ValueError):
    """An array, a name or a checkpoint's settings that cannot be quantised so. Names the value and the remedy."""


@struct.dataclass
class Quantized:
    """An array in e4m3 whose last two axes are cut into blocks with a scale each; values * scale is what is meant.

    Attributes:
        values: [..., R, C] float8_e4m3fn.
        scale: [..., ceil(R / block[0]), ceil(C / block[1])] float32, positive.
        block: (128, 128) for weights, (1, 128) for activations.
    """

    values: Param
    scale: Param
    block: tuple[int, int] = struct.field(pytree_node=False, default=(BLOCK, BLOCK))


def stays_high_precision(name: str) -> bool:
    """Whether a parameter of this name ("layers/3/router", "model.layers.3.mlp.gate.weight") is never quantised."""
    return _HIGH_PRECISION.search(name) is not None


def quantize_blocks(w: Float[Array, "... R C"], *, scale: str = "float32") -> Quantized:
    """Weights [..., R, C] in blocks of 128 x 128; the last blocks may be smaller.

    The largest magnitude of a block becomes 448, the largest e4m3 number; "ue8m0" rounds the scale up to a power of 2,
    which gives away up to one bit of range. An outlier costs its own block only. A block of zeros has scale 1. NaN and
    infinities become NaN (e4m3 has no infinity) and leave the rest of their block alone.

    Errors of finite values, s the scale of the block: |values * s - w| <= max(|w| / 16, s / 1024) and some float32
    rounding.
    """
    return _quantize(w, (BLOCK, BLOCK), scale)


def quantize_rows(x: Float[Array, "... R C"], *, scale: str = "float32") -> Quantized:
    """Activations [..., R, C]: every 128 elements of a row share a scale, whatever the other rows hold."""
    return _quantize(x, (1, BLOCK), scale)


def _quantize(w: jax.Array, block: tuple[int, int], scale: str) -> Quantized:
    if scale not in SCALES:
        raise QuantizationError(f"scale {scale!r} is not one of {', '.join(map(repr, SCALES))}")
    if w.ndim < 2:
        raise QuantizationError(f"an array of shape {w.shape} has no blocks of two axes; give it at least two")
    w = w.astype(jnp.float32)
    # XLA:CPU's minimum and maximum lose NaN (its fast min/max is on by default), here and in the clip below.
    finite = jnp.isfinite(w)
    largest = _block_max(jnp.where(finite, jnp.abs(w), 0), block)
    # Below the smallest normal float32, scales would be flushed to zero.
    per_block = jnp.maximum(largest / E4M3_MAX, jnp.finfo(jnp.float32).tiny)
    if scale == "ue8m0":
        per_block = _power_of_two_at_least(per_block)
    per_block = jnp.where(largest == 0, 1.0, per_block)
    # A quotient may be rounded up past 448, which the cast would make NaN.
    scaled = jnp.clip(w / _spread(per_block, block, w.shape), -E4M3_MAX, E4M3_MAX)
    return Quantized(jnp.where(finite, scaled, jnp.nan).astype(E4M3), per_block, block)


def _power_of_two_at_least(a: jax.Array) -> jax.Array:
    mantissa, exponent = jnp.frexp(a)
    return jnp.ldexp(jnp.float32(1), exponent - (mantissa == 0.5))


def _block_max(a: jax.Array, block: tuple[int, int]) -> jax.Array:
    """[..., R, C] >= 0 -> [..., blocks, blocks]."""
    *lead, rows, columns = a.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    padding = [(0, 0)] * len(lead) + [(0, down * block[0] - rows), (0, across * block[1] - columns)]
    return jnp.pad(a, padding).reshape(*lead, down, block[0], across, block[1]).max((-3, -1))


def _spread(scale: jax.Array, block: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
    """[..., blocks, blocks] -> `shape`, every element its block's."""
    for axis in (-2, -1):
        scale = jnp.repeat(scale, block[axis], axis)
    return scale[..., : shape[-2], : shape[-1]]


def dequantize(q: Quantized, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """values * scale, [..., R, C], multiplied in float32. In bfloat16 "ue8m0" scales lose nothing.

    Raises:
        QuantizationError: a scale that does not fit the values, as of a checkpoint with other blocks.
    """
    check_quantized(q)
    return (q.values.astype(jnp.float32) * _spread(q.scale, q.block, q.values.shape)).astype(dtype)


def from_checkpoint(weight: jax.Array, weight_scale_inv: jax.Array, label: str = "weight") -> Quantized:
    """The pair of tensors of an FP8 checkpoint. Scales may be stored in float8_e8m0fnu, which float32 holds exactly.

    Raises:
        QuantizationError: they do not fit together; names `label`.
    """
    q = Quantized(weight, weight_scale_inv.astype(jnp.float32))
    check_quantized(q, label)
    return q


def check_quantized(q: Quantized, label: str = "array") -> None:
    """Raises QuantizationError unless values are e4m3 and there is one float32 scale per block."""
    shape = q.values.shape
    if q.values.dtype != E4M3:
        raise QuantizationError(f"{label} has values of {q.values.dtype}; they must be float8_e4m3fn")
    wanted = (*shape[:-2], *(-(-size // block) for size, block in zip(shape[-2:], q.block, strict=True)))
    if q.scale.shape != wanted or q.scale.dtype != jnp.float32:
        raise QuantizationError(
            f"{label} of shape {shape} in blocks of {q.block} needs scales {wanted} float32, not {q.scale.shape} "
            f"{q.scale.dtype}; look at weight_block_size of the checkpoint"
        )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _straight_through(w: jax.Array, block: tuple[int, int], scale: str) -> jax.Array:
    return dequantize(_quantize(w, block, scale), w.dtype)


@_straight_through.defjvp
def _straight_through_jvp(block, scale, primals, tangents):
    return _straight_through(*primals, block, scale), tangents[0]


def simulate_blocks(
    w: Float[Array, "... R C"], *, scale: str = "float32", straight_through: bool = True
) -> Float[Array, "... R C"]:
    """`w` as FP8 would hold it, in the dtype of w (which rounds once more where it is bfloat16).

    The gradient passes as if nothing had been rounded; without `straight_through` it is zero, the true one almost
    everywhere.
    """
    out = _straight_through(w, (BLOCK, BLOCK), scale)
    return out if straight_through else lax.stop_gradient(out)


def simulate_rows(
    x: Float[Array, "... R C"], *, scale: str = "float32", straight_through: bool = True
) -> Float[Array, "... R C"]:
    """`simulate_blocks` for activations, 128 elements of a row at a time."""
    out = _straight_through(x, (1, BLOCK), scale)
    return out if straight_through else lax.stop_gradient(out)


def scale_format(config: dict[str, Any]) -> str:
    """The kind of scales, one of SCALES, of a checkpoint with this `quantization_config` in its config.json.

    Raises:
        QuantizationError: another method, number format or block; names the key.
    """
    optional = {"fmt": "e4m3", "expert_dtype": "fp8"}  # often left out; e4m3 is the only format there is
    wanted = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"} | optional
    for key, value in wanted.items():
        found = config.get(key, optional.get(key))
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise QuantizationError(
                f"quantization_config has {key} {found!r}; only {value!r} is read, take the bfloat16 checkpoint instead"
            )
    scale = config.get("scale_fmt") or "float32"
    scale = "float32" if scale == "float" else scale  # transformers' word
    if scale not in SCALES:
        raise QuantizationError(
            f"quantization_config has scale_fmt {scale!r}, not one of {', '.join(map(repr, SCALES))}"
        )
    return scale


def quantization_config(*, scale: str = "float32") -> dict[str, Any]:
    """The `quantization_config` that `scale_format` reads, for config.json."""
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    return config | ({"scale_fmt": scale} if scale != "float32" else {})
