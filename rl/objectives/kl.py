"""Distance to a reference policy, estimated from the tokens that were drawn (joschu.net/blog/kl-approx).

With x = log pi(a) - log pi_ref(a), a ~ pi: k1 = x and k3 = exp(-x) - 1 + x have the reverse KL as their expectation,
k2 = x^2 / 2 has its gradient. Differentiating k1 through the sampled loss gives zero in expectation, k3 the forward
KL's; `straight_through` keeps a value and takes k2's gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rl.errors import ObjectiveError
from rl.objectives.aggregate import Aggregate
from rl.objectives.ratios import clamp

ESTIMATORS = ("k1", "abs", "k2", "k3")


@dataclasses.dataclass(frozen=True)
class KL:
    """A KL term of the loss.

    Attributes:
        coefficient: beta.
        estimator: "k1", "abs" (|x|), "k2" or "k3".
        straight_through: the estimator's value with k2's gradient (verl's suffix "+").
        log_bound: x is held within this of 0 for k3, whose exponential overflows (verl: 20).
        value_bound: the value of k3 is held within this of 0 (verl, slime's low_var: 10).
        unbiased: multiplied by the ratio to the old policy, which corrects k3's gradient off policy (DeepSeek-V3.2
            2512.02556, TRL's use_bias_correction_kl).
        aggregate: its own, where it differs from the policy loss's.
    """

    coefficient: float
    estimator: str = "k3"
    straight_through: bool = False
    log_bound: float | None = None
    value_bound: float | None = None
    unbiased: bool = False
    aggregate: Aggregate | None = None

    def __post_init__(self):
        if self.estimator not in ESTIMATORS:
            raise ObjectiveError(f"estimator {self.estimator!r} is not one of {', '.join(map(repr, ESTIMATORS))}")


def kl_estimate(
    logp: Float[Array, "*b"],
    ref_logp: Float[Array, "*b"],
    estimator: str = "k3",
    *,
    log_bound: float | None = None,
    value_bound: float | None = None,
    straight_through: bool = False,
) -> Float[Array, "*b"]:
    """One estimate per token, see `KL`.

    Raises:
        ObjectiveError: another estimator.
    """
    x = logp - ref_logp
    square = 0.5 * x * x
    if estimator == "k1":
        value = x
    elif estimator == "abs":
        value = jnp.abs(x)
    elif estimator == "k2":
        value = square
    elif estimator == "k3":
        bounded = -x if log_bound is None else clamp(-x, -log_bound, log_bound)
        value = jnp.exp(bounded) - bounded - 1
        value = value if value_bound is None else clamp(value, -value_bound, value_bound)
    else:
        raise ObjectiveError(f"estimator {estimator!r} is not one of {', '.join(map(repr, ESTIMATORS))}")
    if straight_through:
        return square - jax.lax.stop_gradient(square) + jax.lax.stop_gradient(value)
    return value


def penalised_rewards(
    rewards: Float[Array, "B T"],
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    coefficient: float,
    *,
    estimator: str = "k1",
) -> Float[Array, "B T"]:
    """KL in the reward instead of the loss: r - beta * KL of each token, without gradient."""
    return jax.lax.stop_gradient(rewards - coefficient * kl_estimate(logp, ref_logp, estimator))


def adapted_coefficient(coefficient: float, kl: float, *, target: float, horizon: float, steps: float) -> float:
    """The next coefficient of a controller that holds the KL near a target (1909.08593 sec. 2.2, clipped to 20 %)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * steps / horizon)
