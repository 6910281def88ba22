"""The gated MLP (SwiGLU, 2002.05202): act(x gate) * (x up), then down."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from moe.params import Param, ParamSpec
from moe.sharding import constrain

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@struct.dataclass
class MLPParams:
    gate: Param  # [D, F]
    up: Param  # [D, F]
    down: Param  # [F, D]


def mlp_specs(width: int, hidden: int) -> MLPParams:
    """Parameters of a gated MLP from `width` (D) over `hidden` (F) back to `width`."""
    wide = ParamSpec((width, hidden), ("embed", "mlp"))
    return MLPParams(gate=wide, up=wide, down=ParamSpec((hidden, width), ("mlp", "embed")))


def mlp(params: MLPParams, x: Float[Array, "B S D"], *, activation: str = "silu") -> Float[Array, "B S D"]:
    """The gated MLP of every position."""
    hidden = ACTIVATIONS[activation](x @ params.gate) * (x @ params.up)
    hidden = constrain(hidden, "batch", "seq", "mlp")
    return constrain(jnp.matmul(hidden, params.down), "batch", "seq", "embed")
