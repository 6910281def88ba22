"""The engine that draws tokens is not quite the model that learns from them: what to do about the difference.

rho = pi_old(a) / pi_rollout(a), old: recomputed by the trainer, rollout: reported by the engine. Truncated importance
sampling (TIS, fengyao.notion.site/off-policy-rl) multiplies the loss by rho up to a bound; masking (MIS; per token and
two-sided: IcePop) drops what lies outside; rejection takes tokens or sequences out of the batch and its denominator.
Weights hold no gradient: they change the measure, not the objective.

Routing replay needs no weight: the trainer's forward takes the routing that was recorded, the old policy's own (R2) or
the engine's (R3, 2510.11370), as `moe.models.transformer.apply(replay=...)`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl.errors import ObjectiveError
from rl.objectives.kl import kl_estimate
from rl.objectives.ratios import sequence_mean

STATISTICS = ("token", "sequence_sum", "sequence_mean", "sequence_max")


@dataclasses.dataclass(frozen=True)
class Correction:
    """Weights on the loss of each token.

    Attributes:
        high, low: bounds of the ratio.
        mode: "truncate" holds it within them, "mask" sets what lies outside to 0.
        level: "token", or "sequence": the product over the tokens, for each of them.
        log_bound: of the logarithm, before it is exponentiated (verl: 20).
        normalise: weights are divided by their mean over the batch.
        numerator: "old", or "new" for the policy that is being trained: REINFORCE on the engine's own samples, where no
            old policy is recomputed (verl's bypass mode).
    """

    high: float | None = 2.0
    low: float | None = None
    mode: str = "truncate"
    level: str = "token"
    log_bound: float | None = 20.0
    normalise: bool = False
    numerator: str = "old"

    def __post_init__(self):
        for name, allowed in (
            ("mode", ("truncate", "mask")),
            ("level", ("token", "sequence")),
            ("numerator", ("old", "new")),
        ):
            if getattr(self, name) not in allowed:
                raise ObjectiveError(f"{name} {getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}")
        if self.high is None and self.low is None:
            raise ObjectiveError("a correction needs a bound; give high, low or both")


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Which tokens or sequences are taken out of the batch.

    Attributes:
        statistic: "token", or of a sequence the "sequence_sum", "sequence_mean" or "sequence_max".
        estimator: "k1", "k2" or "k3" of KL(rollout || old), from tokens of the roll-out.
        high: largest that stays. For "k1", and there `low` too, a ratio pi_rollout / pi_old, compared as a logarithm.
    """

    statistic: str
    estimator: str
    high: float
    low: float | None = None

    def __post_init__(self):
        if self.statistic not in STATISTICS or self.estimator not in ("k1", "k2", "k3"):
            raise ObjectiveError(
                f"statistic {self.statistic!r} must be one of {', '.join(map(repr, STATISTICS))} and estimator "
                f"{self.estimator!r} k1, k2 or k3"
            )
        if self.estimator == "k1" and (self.low is None or self.statistic == "sequence_max"):
            raise ObjectiveError("k1 has a sign: give it a ratio below as well (low), and no maximum")


def correction_weights(
    old_logp: Float[Array, "B T"],
    rollout_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    how: Correction = Correction(),
) -> Float[Array, "B T"]:
    """Weights, 0 outside the mask, without gradient. A log-probability that the engine could not report (NaN) corrects
    nothing: its ratio is 1.
    """
    gap = jax.lax.stop_gradient(old_logp - rollout_logp)
    gap = jnp.where(mask & ~jnp.isnan(gap), gap, 0)
    if how.level == "sequence":
        gap = jnp.broadcast_to(gap.sum(-1, keepdims=True), gap.shape)
    if how.log_bound is not None:
        gap = jnp.clip(gap, -how.log_bound, how.log_bound)
    ratio = jnp.exp(gap)
    if how.mode == "truncate":
        weights = jnp.clip(ratio, how.low, how.high)
    else:
        low = -math.inf if how.low is None else how.low
        high = math.inf if how.high is None else how.high
        weights = jnp.where((ratio >= low) & (ratio <= high), ratio, 0)
    weights = jnp.where(mask, weights, 0)
    if how.normalise:
        each = weights if how.level == "token" else sequence_mean(weights, mask)
        count = mask.sum() if how.level == "token" else (mask.sum(-1) > 0).sum()
        mean = each.sum() / jnp.maximum(count, 1)
        weights = jnp.where(mean > 1e-8, weights / jnp.where(mean > 1e-8, mean, 1), weights)
    return weights


def kept(
    old_logp: Float[Array, "B T"], rollout_logp: Float[Array, "B T"], mask: Bool[Array, "B T"], how: Rejection
) -> Bool[Array, "B T"]:
    """The mask without what is rejected."""
    gap = jnp.clip(jnp.where(mask, jax.lax.stop_gradient(rollout_logp - old_logp), 0), -20.0, 20.0)
    values = jnp.where(mask, kl_estimate(gap, jnp.zeros_like(gap), how.estimator), 0)
    if how.statistic == "sequence_sum":
        values = values.sum(-1, keepdims=True)
    elif how.statistic == "sequence_mean":
        values = sequence_mean(values, mask)[:, None]
    elif how.statistic == "sequence_max":
        values = values.max(-1, keepdims=True)
    if how.estimator == "k1":
        assert how.low is not None
        return mask & (values >= math.log(how.low)) & (values <= math.log(how.high))
    return mask & (values <= how.high)


def off_policy_mask(
    new_logp: Float[Array, "B T"],
    behaviour_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    threshold: float,
) -> Bool[Array, "B T"]:
    """What stays where bad sequences that the policy has left are ignored: all tokens but those with a negative
    advantage in a sequence whose mean log(pi_behaviour / pi) exceeds the threshold (DeepSeek-V3.2 2512.02556).
    """
    gap = jnp.nan_to_num(behaviour_logp - jax.lax.stop_gradient(new_logp), nan=0.0)
    return (advantages >= 0) | (sequence_mean(gap, mask) <= threshold)[:, None]
