"""Learning from pairs, better and worse, or from single samples called good or bad.

    loss, metrics = preference_loss(chosen_logp, chosen_mask, rejected_logp, rejected_mask,
                                    ref_chosen_logp=..., ref_rejected_logp=..., spec=PREFERENCES["dpo"])

Log-probabilities are of tokens, [B, T], and whether a sequence's are summed or averaged is part of the specification:
implementations differ in it more than in anything else.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.training import Mean
from rl.errors import ObjectiveError
from rl.objectives.aggregate import Aggregate, parts
from rl.objectives.ratios import sequence_mean

KINDS = ("sigmoid", "robust", "hinge", "ipo", "exo", "nca", "bco", "sppo", "apo_zero", "apo_down", "discopop", "odds")


@dataclasses.dataclass(frozen=True)
class Preference:
    """A loss of pairs. c and r are the scores of chosen and rejected, their log-probabilities (over the reference's
    where there is one), h = c - r.

    Attributes:
        kind: "sigmoid", -log s(beta h - gamma), with smoothing also of the flipped pair (DPO 2305.18290, cDPO);
            "robust", the same unbiased for labels flipped with that probability (2403.00409); "hinge" (SLiC
            2305.10425); "ipo", (h - 1 / (2 beta))^2 (2310.12036); "exo" (2402.00856); "nca" (2402.05369); "bco"
            (2404.04656, without its running mean); "sppo" (2405.00675, hard); "apo_zero", "apo_down" (2408.06266);
            "discopop" (2406.08414); "odds", -beta log s(log-odds of chosen over rejected) (ORPO 2403.07691).
        beta: inverse temperature. gamma: margin of the scaled difference (SimPO 2405.14734; TRL's simpo_gamma).
        smoothing: probability that a label is flipped.
        average: scores are means over tokens instead of sums.
        reference: scores are relative to a reference policy.
        nll: coefficient of the chosen sequences' negative log-likelihood, mean over tokens.
        tau: temperature of "discopop".
        source: of the conventions.
    """

    kind: str = "sigmoid"
    beta: float = 0.1
    gamma: float = 0.0
    smoothing: float = 0.0
    average: bool = False
    reference: bool = True
    nll: float = 0.0
    tau: float = 0.05
    source: str = "ours"

    def __post_init__(self):
        if self.kind not in KINDS:
            near = difflib.get_close_matches(self.kind, KINDS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(KINDS)}"
            raise ObjectiveError(f"no loss of pairs is called {self.kind!r}{hint}")
        if not self.beta > 0 or not 0 <= self.smoothing < 0.5:
            raise ObjectiveError(f"beta={self.beta} must be positive and smoothing={self.smoothing} in [0, 0.5)")
        if self.kind == "exo" and not self.smoothing:
            raise ObjectiveError("exo needs smoothing > 0: it matches the distribution (1 - smoothing, smoothing)")


PREFERENCES: Mapping[str, Preference] = {
    "dpo": Preference(source="2305.18290, TRL 1.16.0 sigmoid"),
    "cdpo": Preference(smoothing=0.1, source="ericmitchell.ai/cdpo.pdf"),
    "robust": Preference("robust", smoothing=0.1, source="TRL 1.16.0"),
    "hinge": Preference("hinge", source="TRL 1.16.0"),
    "ipo": Preference("ipo", average=True, source="TRL 1.16.0: averaged over tokens"),
    "ipo.sum": Preference("ipo", source="2310.12036: summed"),
    "dpo.averaged": Preference(average=True, source="TRL 1.16.0 sigmoid_norm"),
    "simpo": Preference(beta=2.0, gamma=1.0, average=True, reference=False, source="2405.14734"),
    "cpo": Preference(reference=False, nll=1.0, source="2401.08417, TRL 1.16.0"),
    "orpo": Preference("odds", average=True, reference=False, nll=1.0, source="2403.07691, TRL 1.16.0"),
}


def preference_objective(
    chosen_logp: Float[Array, "B T"],
    chosen_mask: Bool[Array, "B T"],
    rejected_logp: Float[Array, "B S"],
    rejected_mask: Bool[Array, "B S"],
    *,
    ref_chosen_logp: Float[Array, "B T"] | None = None,
    ref_rejected_logp: Float[Array, "B S"] | None = None,
    spec: Preference = Preference(),
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """(objective, metrics) as totals and weights, see `preference_loss`."""
    if spec.reference and (ref_chosen_logp is None or ref_rejected_logp is None):
        raise ObjectiveError(
            f"the specification ({spec.source}) scores against a reference; pass ref_chosen_logp and "
            "ref_rejected_logp, or reference=False"
        )
    chosen = _score(chosen_logp, ref_chosen_logp if spec.reference else None, chosen_mask, spec)
    rejected = _score(rejected_logp, ref_rejected_logp if spec.reference else None, rejected_mask, spec)
    loss = pair_loss(chosen, rejected, spec)
    objective = {"preference": Mean(loss.sum(), jnp.asarray(float(len(loss)), loss.dtype))}
    if spec.nll:
        nll = parts(-chosen_logp, chosen_mask.astype(bool), Aggregate())
        objective["nll"] = Mean(spec.nll * nll.total, nll.weight)
    scores = jax.lax.stop_gradient(spec.beta * jnp.stack([chosen, rejected]))
    metrics = {
        "accuracy": Mean.of((scores[0] > scores[1]).astype(jnp.float32)),
        "margin": Mean.of(scores[0] - scores[1]),
        "reward_chosen": Mean.of(scores[0]),
        "reward_rejected": Mean.of(scores[1]),
    }
    return objective, metrics


def preference_loss(
    chosen_logp: Float[Array, "B T"],
    chosen_mask: Bool[Array, "B T"],
    rejected_logp: Float[Array, "B S"],
    rejected_mask: Bool[Array, "B S"],
    *,
    ref_chosen_logp: Float[Array, "B T"] | None = None,
    ref_rejected_logp: Float[Array, "B S"] | None = None,
    spec: Preference = Preference(),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss, mean over pairs, and metrics: accuracy (share of pairs ranked right), margin and rewards (beta times
    the scores).

    Raises:
        ObjectiveError: a reference that the specification needs and is not given.
    """
    objective, metrics = preference_objective(
        chosen_logp, chosen_mask, rejected_logp, rejected_mask,
        ref_chosen_logp=ref_chosen_logp, ref_rejected_logp=ref_rejected_logp, spec=spec,
    )  # fmt: skip
    total = sum((term.value() for term in objective.values()), start=jnp.zeros((), chosen_logp.dtype))
    return total, {name: mean.value() for name, mean in metrics.items()}


def pair_loss(
    chosen: Float[Array, " B"], rejected: Float[Array, " B"], spec: Preference = Preference()
) -> Float[Array, " B"]:
    """The loss of each pair from the scores of its two sequences."""
    log_s, beta, e = jax.nn.log_sigmoid, spec.beta, spec.smoothing
    h = beta * (chosen - rejected) - spec.gamma
    if spec.kind == "sigmoid":
        return -(1 - e) * log_s(h) - e * log_s(-h)
    if spec.kind == "robust":
        return (-(1 - e) * log_s(h) + e * log_s(-h)) / (1 - 2 * e)
    if spec.kind == "hinge":
        return jax.nn.relu(1 - h)
    if spec.kind == "ipo":
        return (chosen - rejected - 1 / (2 * beta)) ** 2
    if spec.kind == "exo":
        s = jax.nn.sigmoid(h)
        return s * (log_s(h) - jnp.log1p(-e)) + (1 - s) * (log_s(-h) - jnp.log(e))
    if spec.kind == "nca":
        return -log_s(beta * chosen) - 0.5 * log_s(-beta * chosen) - 0.5 * log_s(-beta * rejected)
    if spec.kind == "bco":
        return -log_s(beta * chosen) - log_s(-beta * rejected)
    if spec.kind == "sppo":
        return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    if spec.kind == "apo_zero":
        return 1 - jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * rejected)
    if spec.kind == "apo_down":
        return jax.nn.sigmoid(beta * chosen) + 1 - jax.nn.sigmoid(h)
    if spec.kind == "discopop":
        share = jax.nn.sigmoid(h / spec.tau)
        return -log_s(h) * (1 - share) + jnp.exp(-h) * share
    odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return -beta * log_s(odds)


def kto_loss(
    scores: Float[Array, " B"],
    desirable: Bool[Array, " B"],
    kl: Float[Array, ""],
    *,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Float[Array, " B"]:
    """KTO (2402.01306 eq. 7) of single samples, un-reduced: lambda (1 - s(+-beta (score - kl))).

    Args:
        scores: log-ratios to the reference, summed over tokens.
        kl: mean log-ratio of prompts paired with other prompts' answers; taken as at least 0 and without gradient.
        weights: lambda of desirable and undesirable samples.
    """
    reference = jnp.maximum(jax.lax.stop_gradient(kl), 0)
    sign = jnp.where(desirable, 1.0, -1.0)
    weight = jnp.where(desirable, *weights)
    return (weight * (1 - jax.nn.sigmoid(sign * beta * (scores - reference)))).astype(scores.dtype)


def _score(logp: Any, ref: Any, mask: Any, spec: Preference) -> Any:
    gap = jnp.where(mask, logp if ref is None else logp - jax.lax.stop_gradient(ref), 0)
    return sequence_mean(gap, mask.astype(bool)) if spec.average else gap.sum(-1)


def _log1mexp(x: Any) -> Any:
    """log(1 - exp(x)) for x < 0, accurate at both ends (Maechler 2012)."""
    near = x > -0.6931471805599453
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))
