"""Rotary position embedding (RoPE, 2104.09864) and the published ways of stretching it.

`frequencies(cfg)` gives one inverse wavelength for each pair of dimensions and the factor on cos and sin; `angles`
turns positions into cos and sin; `rotate` applies them. The rules of the scalings are those of transformers 5.24
(`modeling_rope_utils`): "linear" (position interpolation, 2306.15595), "yarn" (2309.00071), "llama3" (Llama 3.1) and
"longrope" (2402.13753).
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SCALINGS = ("default", "linear", "yarn", "llama3", "longrope")


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """Which dimensions turn, and how fast.

    Attributes:
        dim: rotated dimensions of a head (the first ones); even.
        theta: base of the wavelengths.
        interleaved: True pairs dimensions (0, 1), (2, 3), ... (GPT-J, DeepSeek's MLA), False (i, i + dim/2).
        scaling: one of SCALINGS.
        factor: how far the context is stretched; all scalings but "default".
        original_positions: context length before stretching; "yarn", "llama3", "longrope".
        beta_fast, beta_slow, truncate: ramp of "yarn", in rotations over the original context.
        mscale, mscale_all_dim: of "yarn" (DeepSeek): factor on cos and sin, and squared on the softmax scale.
        attention_factor: factor on cos and sin, where the checkpoint states it.
        low_freq_factor, high_freq_factor: of "llama3".
        short_factor, long_factor: divisors of the frequencies, "longrope"; `long` chooses between them (a static choice
            here: transformers looks at the length of each call).
        long: see above.
    """

    dim: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    long: bool = False

    def __post_init__(self):
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"rotary dim {self.dim} must be even and at least 2")
        if self.theta <= 0:
            raise ValueError(f"rotary theta {self.theta} must be positive")
        if self.scaling not in SCALINGS:
            raise ValueError(f"rotary scaling {self.scaling!r} is not one of {', '.join(map(repr, SCALINGS))}")
        if self.scaling in ("yarn", "llama3", "longrope") and self.original_positions < 1:
            raise ValueError(f"rotary scaling {self.scaling!r} needs original_positions, the context before stretching")
        if self.scaling != "default" and self.factor <= 0:
            raise ValueError(f"rotary factor {self.factor} must be positive")
        chosen = self.long_factor if self.long else self.short_factor
        if self.scaling == "longrope" and len(chosen) != self.dim // 2:
            name = "long_factor" if self.long else "short_factor"
            raise ValueError(f"longrope's {name} has {len(chosen)} entries, dim {self.dim} needs {self.dim // 2}")


def _yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(cfg: RotaryConfig) -> tuple[np.ndarray, float]:
    """(inverse wavelengths float32 [dim / 2] in radians a position, factor on cos and sin)."""
    plain = cfg.theta ** -(np.arange(0, cfg.dim, 2) / cfg.dim)
    stated = cfg.attention_factor
    if cfg.scaling == "linear":
        return (plain / cfg.factor).astype(np.float32), 1.0
    if cfg.scaling == "yarn":

        def turns(rotations: float) -> float:  # the dimension that makes so many rotations over the original context
            return cfg.dim * math.log(cfg.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(cfg.theta))

        low, high = turns(cfg.beta_fast), turns(cfg.beta_slow)
        if cfg.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, cfg.dim - 1)
        high = high + 0.001 if low == high else high
        ramp = np.clip((np.arange(cfg.dim // 2) - low) / (high - low), 0, 1)
        if stated is None and cfg.mscale and cfg.mscale_all_dim:
            stated = _yarn_mscale(cfg.factor, cfg.mscale) / _yarn_mscale(cfg.factor, cfg.mscale_all_dim)
        stated = _yarn_mscale(cfg.factor) if stated is None else stated
        return (plain / cfg.factor * ramp + plain * (1 - ramp)).astype(np.float32), stated
    if cfg.scaling == "llama3":
        wavelength = 2 * np.pi / plain
        low, high = cfg.original_positions / cfg.low_freq_factor, cfg.original_positions / cfg.high_freq_factor
        smooth = (cfg.original_positions / wavelength - cfg.low_freq_factor) / (
            cfg.high_freq_factor - cfg.low_freq_factor
        )
        between = (1 - smooth) * plain / cfg.factor + smooth * plain
        out = np.where(wavelength > low, plain / cfg.factor, np.where(wavelength < high, plain, between))
        return out.astype(np.float32), 1.0
    if cfg.scaling == "longrope":
        if stated is None:
            stretched = math.log(cfg.factor) / math.log(cfg.original_positions) if cfg.factor > 1 else 0.0
            stated = math.sqrt(1 + stretched)
        return (plain / np.asarray(cfg.long_factor if cfg.long else cfg.short_factor)).astype(np.float32), stated
    return plain.astype(np.float32), 1.0


def softmax_factor(cfg: RotaryConfig) -> float:
    """What "yarn" with mscale_all_dim multiplies the softmax scale of MLA with (DeepSeek-V2, V3); else 1."""
    return _yarn_mscale(cfg.factor, cfg.mscale_all_dim) ** 2 if cfg.scaling == "yarn" and cfg.mscale_all_dim else 1.0


def angles(
    positions: Int[Array, "B S"], cfg: RotaryConfig
) -> tuple[Float[Array, "B S half"], Float[Array, "B S half"]]:
    """(cos, sin) float32 [B, S, dim / 2] of the angles position * frequency, times the scaling's factor."""
    inverse, factor = frequencies(cfg)
    angle = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
    x: Float[Array, "B S H K"], cos: Float[Array, "B S half"], sin: Float[Array, "B S half"], *, interleaved: bool
) -> Float[Array, "B S H K"]:
    """The first 2 * half dimensions of each head turned by the angles; the others pass. In x's dtype.

    Interleaved pairs come out de-interleaved (first members, then second), as in transformers: queries and keys are
    permuted alike, so that their products are those of the interleaved form.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
    return out if rest.shape[-1] == 0 else jnp.concatenate([out, rest], -1)
