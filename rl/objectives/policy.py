"""Policy-gradient losses: one ratio, one surrogate, optional corrections, one aggregation.

    spec = PRESETS["verl.grpo"]                      # or PolicySpec(surrogate=Clip(low=0.2, high=0.28), ...)
    loss, metrics = policy_loss(new_logp, old_logp, advantages, mask, spec=spec)

Everything is [B, T]: a row per sample, a column per position that the policy might have sampled; `mask` is true where
it did, false for padding and for what tools or environments said. `policy_objective` gives the same as totals and
weights for `moe.training.make_train_step`, exact under gradient accumulation.
"""

import dataclasses
import functools
import typing
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.training import Mean
from rl.errors import ObjectiveError
from rl.objectives.aggregate import Aggregate, parts
from rl.objectives.corrections import Correction, Rejection, correction_weights, kept, off_policy_mask
from rl.objectives.kl import KL, kl_estimate
from rl.objectives.ratios import Ratio, clamp, log_ratio, sequence_mean

Tokens: TypeAlias = Float[Array, "B T"]


# ---- surrogates
@dataclasses.dataclass(frozen=True)
class Clip:
    """PPO's clipped surrogate (1707.06347 eq. 7).

    Attributes:
        low, high: the ratio is held within [1 - low, 1 + high] where leaving it would pay.
        dual: largest loss of a bad token, over -A: c of dual clip (1912.09729); None for none.
        cap: upper bound of the ratio in the unclipped branch (TRL's delta, INTELLECT-2); None for none.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    cap: float | None = None

    def __post_init__(self):
        if self.low < 0 or self.high < 0 or (self.dual is not None and self.dual <= 1):
            raise ObjectiveError(
                f"low={self.low} and high={self.high} must be at least 0 and dual={self.dual} more than 1, or None"
            )


@dataclasses.dataclass(frozen=True)
class Cispo:
    """REINFORCE weighted by the bounded ratio, without gradient through it: no token is silenced (MiniMax-M1
    2506.13585 eq. 4). `low` and `high` bound the ratio itself, not its distance from 1; None for no bound.
    """

    low: float | None = None
    high: float | None = 5.0


@dataclasses.dataclass(frozen=True)
class Sapo:
    """A sigmoid gate instead of clipping (2511.20347): 4 / tau * sigmoid(tau (r - 1)), tau by the advantage's sign."""

    positive: float = 1.0
    negative: float = 1.05


@dataclasses.dataclass(frozen=True)
class GeometricMean:
    """GMPO (2507.20673): log-ratios are clipped per token on the side where it would pay, within [-low, high], and the
    sequence's ratio is their geometric mean. The advantage is the sequence's mean.
    """

    low: float = 0.4
    high: float = 0.4


@dataclasses.dataclass(frozen=True)
class Reinforce:
    """-A log pi: no ratio."""


@dataclasses.dataclass(frozen=True)
class Divergence:
    """DPPO (2602.04879): REINFORCE weighted by the ratio, up to `cap`, without gradient through it; tokens whose
    probability has left a trust region in the direction of their advantage are dropped. The region is measured between
    the two-point distributions of the token and all others: by total variation ("tv") or by KL(old || new) ("kl").
    """

    kind: str = "tv"
    low: float = 0.2
    high: float = 0.2
    cap: float = 20.0

    def __post_init__(self):
        if self.kind not in ("tv", "kl"):
            raise ObjectiveError(f"kind {self.kind!r} is not one of 'tv', 'kl'")


@dataclasses.dataclass(frozen=True)
class Vespo:
    """REINFORCE weighted by phi(w) = exp(lambda (1 - w)) w^k of the sequence's ratio w, without gradient through it
    (2602.10693); k and lambda by the advantage's sign.
    """

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0


@dataclasses.dataclass(frozen=True)
class Dro:
    """REINFORCE with a square penalty on the log-ratio: -A log pi + beta / 2 (log r)^2 (2405.19107)."""

    beta: float = 1e-3


@dataclasses.dataclass(frozen=True)
class KLCov:
    """The ratio without clipping; the share of tokens whose log-probability goes most with their advantage pays for
    moving: + coefficient |log r| (2505.22617).
    """

    share: float = 2e-4
    coefficient: float = 1.0


Surrogate: TypeAlias = Clip | Cispo | Sapo | GeometricMean | Reinforce | Divergence | Vespo | Dro | KLCov


@functools.singledispatch
def surrogate(
    how: Any, new_logp: Tokens, ratio: Tokens, old_logp: Tokens, advantages: Tokens, mask: Bool[Array, "B T"]
) -> tuple[Tokens, dict[str, Tokens]]:
    """The loss of every token, un-reduced, and what is worth watching of it, by the kind of surrogate.

    Args:
        how: one of `Surrogate`.
        ratio: *logarithms*, of `log_ratio`.
    """
    kinds = ", ".join(kind.__name__ for kind in typing.get_args(Surrogate))
    raise ObjectiveError(f"{how!r} is no surrogate; take one of {kinds}")


@surrogate.register
def _(how: Clip, new_logp: Any, ratio: Any, old_logp: Any, advantages: Any, mask: Any) -> Any:
    r = jnp.exp(ratio)
    held = jnp.clip(r, 1 - how.low, 1 + how.high)
    free = r if how.cap is None else jnp.minimum(r, how.cap)
    plain, clipped = -advantages * free, -advantages * held
    loss = jnp.maximum(plain, clipped)
    seen = {"clipped": clipped > plain}
    if how.dual is not None:
        bound = -advantages * how.dual
        seen["clipped_dual"] = (loss > bound) & (advantages < 0)
        loss = jnp.where(advantages < 0, jnp.minimum(bound, loss), loss)
    return loss, seen


@surrogate.register
def _(how: Cispo, new_logp: Any, ratio: Any, old_logp: Any, advantages: Any, mask: Any) -> Any:
    r = jax.lax.stop_gradient(jnp.exp(ratio))
    held = clamp(r, how.low, how.high)
    return -held * advantages * new_logp, {"clipped": r != held}


@surrogate.register
def _(how: Sapo, new_logp: Any, ratio: Any, old_logp: Any, advantages: Any, mask: Any) -> Any:
    tau = jnp.where(advantages > 0, how.positive, how.negative).astype(ratio.dtype)
    return -4 / tau * jax.nn.sigmoid(tau * (jnp.exp(ratio) - 1)) * advantages, {}


@surrogate.register
def _(how: GeometricMean, new_logp: Any, ratio: Any, old_logp: Any, advantages: Any, mask: Any) -> Any:
    sign = jnp.sign(advantages)
    held = jnp.clip(ratio, -how.low, how.high)
    worse = sign * jnp.minimum(sign * ratio, sign * held)
    whole = -sequence_mean(advantages, mask) * jnp.exp(sequence_mean(worse, mask))
    return jnp.broadcast_to(whole[:, None], ratio.shape), {"clipped": ratio != held}


@surrogate.register
def _(how: Reinforce, new_logp: Any, ratio: Any, old_logp: Any, advantages: Any, mask: Any) -> Any:
    return -advantages * new_logp, {}


@surrogate.register
def _(how: Divergence, new_logp: Any, ratio: Any, old_logp: Any, advantages: Any, mask: Any) -> Any:
    frozen = jax.lax.stop_gradient(new_logp)
    p, old = jnp.exp(frozen), jnp.exp(old_logp)
    if how.kind == "tv":
        inside = jnp.where(advantages > 0, p - old <= how.high, p - old >= -how.low)
    else:
        kl = old * (old_logp - frozen) + (1 - old) * jnp.log((1 - old + 1e-8) / (1 - p + 1e-8))
        inside = jnp.where(advantages > 0, (kl <= how.high) | (p <= old), (kl <= how.low) | (p >= old))
    weight = jnp.minimum(jax.lax.stop_gradient(jnp.exp(ratio)), how.cap)
    return -advantages * weight * new_logp * inside, {"clipped": ~inside}


@surrogate.register
def _(how: Vespo, new_logp: Any, ratio: Any, old_logp: Any, advantages: Any, mask: Any) -> Any:
    gap = jnp.where(mask, jax.lax.stop_gradient(ratio), 0).sum(-1, keepdims=True)
    gap = jnp.clip(gap, jnp.log(1e-8), 20.0)
    k = jnp.where(advantages >= 0, how.k_positive, how.k_negative)
    rate = jnp.where(advantages >= 0, how.lambda_positive, how.lambda_negative)
    weight = jnp.exp(rate + k * gap - rate * jnp.exp(gap)).astype(ratio.dtype)
    return -weight * advantages * new_logp, {"weight": weight}


@surrogate.register
def _(how: Dro, new_logp: Any, ratio: Any, old_logp: Any, advantages: Any, mask: Any) -> Any:
    return -advantages * new_logp + 0.5 * how.beta * ratio**2, {}


@surrogate.register
def _(how: KLCov, new_logp: Any, ratio: Any, old_logp: Any, advantages: Any, mask: Any) -> Any:
    frozen, count = jax.lax.stop_gradient(new_logp), mask.sum()
    centred = [jnp.where(mask, x - jnp.where(mask, x, 0).sum() / count, 0) for x in (advantages, frozen)]
    covariance = jnp.where(mask, centred[0] * centred[1], -jnp.inf).ravel()
    number = jnp.maximum((count * how.share).astype(jnp.int32), 1)
    order = jnp.argsort(-covariance)
    chosen = (jnp.zeros(covariance.size, bool).at[order].set(jnp.arange(covariance.size) < number)).reshape(mask.shape)
    loss = -advantages * jnp.exp(ratio)
    return jnp.where(chosen & mask, loss + how.coefficient * jnp.abs(ratio), loss), {"penalised": chosen}


# ---- the whole loss
@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """A policy-gradient loss with every convention stated.

    Attributes:
        surrogate, ratio, aggregate: see there.
        correction: weights for the engine's mismatch, None for none; rejection: what leaves the batch.
        off_policy: threshold of `off_policy_mask`, None for none.
        kl: distance to a reference policy, in the loss.
        entropy: coefficient of a bonus for the entropy of each next-token distribution, aggregated like the loss.
        source: where the conventions come from.
    """

    surrogate: Surrogate = Clip()
    ratio: Ratio = Ratio(low=-20.0, high=20.0)
    aggregate: Aggregate = Aggregate()
    correction: Correction | None = None
    rejection: tuple[Rejection, ...] = ()
    off_policy: float | None = None
    kl: KL | None = None
    entropy: float = 0.0
    source: str = "ours"


def policy_objective(
    new_logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"] | None,
    advantages: Float[Array, "B T"] | Float[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    spec: PolicySpec = PolicySpec(),
    rollout_logp: Float[Array, "B T"] | None = None,
    ref_logp: Float[Array, "B T"] | None = None,
    entropy: Float[Array, "B T"] | None = None,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """(objective, metrics) as totals and weights: the objective's terms add up to the loss, see `policy_loss`."""
    mask, advantages, given = _checked(new_logp, advantages, mask, spec, old_logp, rollout_logp, ref_logp, entropy)
    old, rollout, ref, bonus = cast(tuple[Any, Any, Any, Any], given)
    old = jax.lax.stop_gradient(new_logp) if old is None else old
    everything = mask
    metrics: dict[str, Mean] = {}
    # What the engine got wrong is measured and mended on the whole mask; what is rejected leaves it afterwards.
    weights = None
    if rollout is not None:
        drift = jnp.nan_to_num(jnp.where(mask, jax.lax.stop_gradient(rollout - old), 0), nan=0.0)
        metrics["mismatch_k3"] = Mean.of(kl_estimate(drift, jnp.zeros_like(drift), "k3"), mask)
    if spec.correction is not None:
        top = new_logp if spec.correction.numerator == "new" else old
        weights = correction_weights(top, rollout, mask, spec.correction)
        metrics["correction"] = Mean.of(weights, mask)
    for one in spec.rejection:
        top = new_logp if spec.correction is not None and spec.correction.numerator == "new" else old
        mask = mask & kept(top, rollout, everything, one)
    if spec.rejection:
        metrics["rejected"] = Mean.of((~mask).astype(jnp.float32), everything)
    ratio = log_ratio(new_logp, old, mask, spec.ratio)
    safe = jnp.where(mask, new_logp, 0)
    loss, seen = surrogate(spec.surrogate, safe, ratio, jnp.where(mask, old, 0), advantages, mask)
    if spec.off_policy is not None:
        behaviour = old if rollout is None else rollout
        loss = loss * off_policy_mask(new_logp, behaviour, advantages, mask, spec.off_policy)
    if weights is not None:
        loss = loss * _per_sequence(weights, mask, spec.surrogate)
    objective = {"policy": parts(loss, mask, spec.aggregate)}
    if spec.kl is not None:
        kl = jnp.where(mask, _reference_kl(safe, ref, ratio, spec.kl), 0)
        metrics["kl"] = Mean.of(jax.lax.stop_gradient(kl), mask)
        objective["kl"] = parts(spec.kl.coefficient * kl, mask, spec.kl.aggregate or spec.aggregate)
    if spec.entropy:
        objective["entropy"] = parts(-spec.entropy * bonus, mask, spec.aggregate)
    frozen = jax.lax.stop_gradient(jnp.where(mask, new_logp - old, 0))
    metrics["approx_kl"] = Mean.of(-frozen, mask)
    metrics |= {name: Mean.of(jax.lax.stop_gradient(x).astype(jnp.float32), mask) for name, x in seen.items()}
    if bonus is not None:
        metrics["token_entropy"] = Mean.of(jax.lax.stop_gradient(bonus), mask)
    return objective, metrics


def policy_loss(
    new_logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"] | None,
    advantages: Float[Array, "B T"] | Float[Array, " B"],
    mask: Bool[Array, "B T"],
    spec: PolicySpec = PolicySpec(),
    rollout_logp: Float[Array, "B T"] | None = None,
    ref_logp: Float[Array, "B T"] | None = None,
    entropy: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss to minimise, and metrics.

    Args:
        new_logp: log-probabilities of the tokens drawn, of the policy that learns.
        old_logp: of the policy before this batch's first step, recomputed by the trainer; None where this is that step:
            the ratio is then 1, with a gradient.
        advantages: of tokens, or of whole samples. No gradient reaches them.
        mask: true where the policy drew the token; what stands elsewhere does not matter, NaN included.
        rollout_logp: as the engine that drew the tokens reported them, for `correction` and `rejection`.
        ref_logp: of the reference policy, for `kl`.
        entropy: of each next-token distribution, in nats, for the bonus and the metrics.

    Returns:
        The loss and metrics as means over tokens: "approx_kl" of old to new, "clipped" (share of tokens whose
        gradient the clip took), "clipped_dual", "kl" (to the reference, by its estimator), "mismatch_k3" of engine to
        trainer, "correction" (mean weight), "rejected", "token_entropy"; those that apply.

    Raises:
        ObjectiveError: shapes that differ, or log-probabilities that the specification needs and are not given.
    """
    objective, metrics = policy_objective(
        new_logp, old_logp, advantages, mask, spec=spec, rollout_logp=rollout_logp, ref_logp=ref_logp, entropy=entropy
    )
    total = sum((term.value() for term in objective.values()), start=jnp.zeros((), new_logp.dtype))
    return total, {name: mean.value() for name, mean in metrics.items()}


def value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    *,
    clip: float | None = 0.2,
) -> Float[Array, "B T"]:
    """Half the squared error of a critic, un-reduced; with `clip`, the larger of it and that of the value held within
    `clip` of the old one (PPO's implementation, 1811.02553).
    """
    error = (values - returns) ** 2
    if clip is not None:
        held = jnp.clip(values, old_values - clip, old_values + clip)
        error = jnp.maximum(error, (held - returns) ** 2)
    return 0.5 * error


def _reference_kl(new_logp: Any, ref: Any, ratio: Any, how: KL) -> Any:
    value = kl_estimate(
        new_logp, ref, how.estimator, log_bound=how.log_bound, value_bound=how.value_bound,
        straight_through=how.straight_through,
    )  # fmt: skip
    return value * jnp.exp(ratio) if how.unbiased else value


def _per_sequence(weights: Any, mask: Any, how: Any) -> Any:
    """The geometric mean of a sequence's weights where the surrogate is the sequence's."""
    if not isinstance(how, GeometricMean):
        return weights
    return jnp.exp(sequence_mean(jnp.log(weights + 1e-10), mask))[:, None]


def _checked(new_logp: Any, advantages: Any, mask: Any, spec: PolicySpec, *given: Any) -> tuple[Any, Any, Any]:
    shape = new_logp.shape
    names = ("old_logp", "rollout_logp", "ref_logp", "entropy")
    for name, x in zip(("mask", *names), (mask, *given), strict=True):
        if x is not None and x.shape != shape:
            raise ObjectiveError(f"{name} has shape {x.shape}, new_logp {shape}; they are one number per token each")
    if advantages.shape not in (shape, shape[:1]):
        raise ObjectiveError(f"advantages have shape {advantages.shape}; give {shape} or one per sample, {shape[:1]}")
    needs = {
        "rollout_logp": spec.correction is not None or bool(spec.rejection),
        "ref_logp": spec.kl is not None,
        "entropy": bool(spec.entropy),
    }
    for name, x in zip(names, given, strict=True):
        if needs.get(name) and x is None:
            raise ObjectiveError(f"the specification ({spec.source}) needs {name}; pass it or take the term out")
    mask = mask.astype(bool)
    advantages = jnp.broadcast_to(advantages if advantages.ndim == 2 else advantages[:, None], shape)
    advantages = jnp.where(mask, jax.lax.stop_gradient(advantages), 0).astype(new_logp.dtype)
    clean = [None if x is None else jnp.where(mask, x, 0) for x in given]
    old, rollout, ref, entropy = clean
    frozen = [None if x is None else jax.lax.stop_gradient(x) for x in (old, rollout, ref)]
    return mask, advantages, (*frozen, entropy)
