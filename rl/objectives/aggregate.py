"""From one loss per token to one number: the largest source of "same algorithm, different result".

`Aggregate` names the weights; `parts` gives total and weight before their division, so that micro-batches and devices
add up to the mean over the whole batch (`moe.training.Mean`); `aggregate` divides.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from moe.training import Mean
from rl.errors import ObjectiveError

MODES = ("token_mean", "token_sum", "sequence_mean_token_mean", "sequence_mean_token_sum")


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """How a batch of per-token losses becomes one number.

    Attributes:
        mode: "token_mean", the sum over tokens by their number (DAPO 2503.14476); "sequence_mean_token_mean", each
            sequence's mean, then theirs (GRPO 2402.03300); "sequence_mean_token_sum", each sequence's sum, then their
            mean; "token_sum".
        divisor: a constant that the result is divided by: a number, or "width" for the padded length T. With
            "sequence_mean_token_sum" this is Dr. GRPO (2503.20783).
        count_empty: sequences without a token count as sequences, with a loss of 0 (TRL); otherwise they are left out
            (verl).
    """

    mode: str = "token_mean"
    divisor: int | float | Literal["width"] | None = None
    count_empty: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise ObjectiveError(f"mode {self.mode!r} is not one of {', '.join(map(repr, MODES))}")
        if self.divisor not in (None, "width") and not self.divisor > 0:
            raise ObjectiveError(f"divisor {self.divisor!r} must be positive, 'width' or None")


def parts(values: Float[Array, "B T"], mask: Bool[Array, "B T"], how: Aggregate = Aggregate()) -> Mean:
    """Total and weight of a batch; values outside the mask may be anything, NaN too. The weight holds no gradient."""
    kept = jnp.where(mask, values, 0)
    tokens = mask.sum(-1).astype(values.dtype)
    sequences = jnp.ones_like(tokens) if how.count_empty else (tokens > 0).astype(values.dtype)
    if how.mode.startswith("token"):
        total, weight = kept.sum(), tokens.sum()
    else:
        each = kept.sum(-1)
        each = each / jnp.maximum(tokens, 1) if how.mode == "sequence_mean_token_mean" else each
        total, weight = each.sum(), sequences.sum()
    if how.mode == "token_sum":
        weight = jnp.ones((), values.dtype)
    if how.divisor is not None:
        total = total / (values.shape[-1] if how.divisor == "width" else how.divisor)
    return Mean(total, weight)


def aggregate(
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    how: Aggregate = Aggregate(),
    *,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    """The number itself, 0 for a batch without tokens.

    Args:
        axis_name: mapped axes that the batch is split over: totals and weights are summed over them, so that the result
            is the whole batch's. Its gradient is then each device's own part.
    """
    found = parts(values, mask, how)
    if axis_name is not None:
        found = jax.lax.psum(found, axis_name) if how.mode != "token_sum" else _summed(found, axis_name)
    return found.value()


def _summed(found: Mean, axis_name: str | tuple[str, ...]) -> Mean:
    return Mean(jax.lax.psum(found.total, axis_name), found.weight)


def masked_mean(values: Num[Array, "*b"], mask: Bool[Array, "*b"]) -> Float[Array, ""]:
    """Mean over the mask; 0 where there is none."""
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1)
