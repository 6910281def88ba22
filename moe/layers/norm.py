"""Root-mean-square normalisation (1910.07467), in float32 whatever the dtype of the input."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*b D"], scale: Float[Array, " D"], *, eps: float) -> Float[Array, "*b D"]:
    """scale * x / sqrt(mean(x^2) + eps), in x's dtype. The scale multiplies after the cast back, as in transformers."""
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return scale.astype(x.dtype) * normal.astype(x.dtype)
