"""What the networks of this package are made of: dense maps and the norm before them."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float

from earth.geometry import Array
from moe.params import FanIn, Param, ParamSpec, zeros


@flax.struct.dataclass
class Dense:
    w: Param
    b: Param


def dense(d_in: int, d_out: int, scale: float = 1.0) -> Dense:
    """Declaration of an affine map; scale 0 starts it at zero."""
    init: Any = FanIn(scale) if scale > 0 else zeros
    return Dense(w=ParamSpec((d_in, d_out), ("embed", None), init), b=ParamSpec((d_out,), (None,), zeros))


def apply(dense: Dense, x: Float[Array, "*#b I"]) -> Float[Array, "*#b O"]:
    return x @ dense.w.astype(x.dtype) + dense.b.astype(x.dtype)


def layer_norm(x: Float[Array, "*#b D"]) -> Float[Array, "*#b D"]:
    """Without affine parameters: what follows carries them. In fp32 whatever the compute type."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5)).astype(x.dtype)
