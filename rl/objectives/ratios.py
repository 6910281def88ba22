"""How far the policy has moved from the one that is being corrected for: log-ratios per token or per sequence."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl.errors import ObjectiveError

LEVELS = ("token", "sequence", "sequence_token")


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Which log-ratio enters the surrogate.

    Attributes:
        level: "token", log pi(a) - log pi_old(a) of each; "sequence", its mean over the sequence for every token of it
            (GSPO 2507.18071 eq. 7); "sequence_token", the same value with the gradient of each token's own log-ratio
            (GSPO-token, eq. 14-15). The last two agree where advantages are constant in a sequence and it is averaged
            over its tokens.
        low, high: bounds of the log-ratio, beyond which it has no gradient; None for none.
    """

    level: str = "token"
    low: float | None = None
    high: float | None = None

    def __post_init__(self):
        if self.level not in LEVELS:
            raise ObjectiveError(f"level {self.level!r} is not one of {', '.join(map(repr, LEVELS))}")


def log_ratio(
    new_logp: Float[Array, "B T"], old_logp: Float[Array, "B T"], mask: Bool[Array, "B T"], how: Ratio = Ratio()
) -> Float[Array, "B T"]:
    """Log-ratios, 0 outside the mask."""
    gap = jnp.where(mask, new_logp - old_logp, 0)
    if how.level != "token":
        whole = sequence_mean(gap, mask)[:, None]
        if how.level == "sequence_token":
            whole = jax.lax.stop_gradient(whole) + jnp.where(mask, new_logp - jax.lax.stop_gradient(new_logp), 0)
        gap = jnp.where(mask, whole, 0)
    return clamp(gap, how.low, how.high)


def clamp(x: Float[Array, "*b"], low: float | None, high: float | None) -> Float[Array, "*b"]:
    return x if low is None and high is None else jnp.clip(x, low, high)


def sequence_mean(values: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Mean over the tokens of each sequence, 0 for one without any."""
    return jnp.where(mask, values, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)
