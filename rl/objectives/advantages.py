"""Advantages: how much better than expected a sample, or a token of it, was.

    advantages("grpo", rewards, group, mask)                 # [B, T]
    advantages("trl.grpo", rewards, group, mask)             # the same with TRL's constants
    advantages("gae", token_rewards, None, mask, values=values, gamma=1.0, lam=0.95)

Rewards are one number per sample [B], or where an estimator says so per token [B, T]. `group` names the prompt of each
sample, any integers. A reward that is not finite could not be had: such a sample is left out of its group's statistics
and its advantage is 0. Everything is a pure function that can be compiled; nothing here has a gradient.
"""

import difflib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rl.errors import ObjectiveError


def advantages(
    name: str, rewards: Float[Array, "B ..."], group: Int[Array, " B"] | None, mask: Bool[Array, "B T"], **options: Any
) -> Float[Array, "B T"]:
    """Advantages of every token, 0 outside the mask.

    Args:
        name: of `ESTIMATORS`, with or without the framework whose constants it takes.
        group: of each sample; None for estimators without.

    Raises:
        ObjectiveError: another name, or shapes that do not fit.
    """
    if name not in ESTIMATORS:
        near = difflib.get_close_matches(name, ESTIMATORS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(ESTIMATORS))}"
        raise ObjectiveError(f"no advantage estimator is called {name!r}{hint}")
    if rewards.shape[:1] != mask.shape[:1] or (group is not None and group.shape != mask.shape[:1]):
        raise ObjectiveError(
            f"rewards {rewards.shape}, group {None if group is None else group.shape} and mask {mask.shape} must have "
            "one row per sample"
        )
    return jax.lax.stop_gradient(ESTIMATORS[name](rewards, group, mask.astype(bool), **options))


# ---- one number per sample
def grpo(
    rewards: Any, group: Any, mask: Any, *, scale: str = "group", eps: float = 1e-6, ddof: int = 1, lone: str = "reward"
) -> Any:
    """(R - mean of the group) / (deviation + eps), GRPO (2402.03300).

    Args:
        scale: deviation of the "group", of the "batch" or "none" (Dr. GRPO 2503.20783).
        ddof: 1 for Bessel's correction.
        lone: a sample alone in its group has its "reward" as advantage (verl: mean 0, deviation 1) or "zero".
    """
    each, valid, index = _scores(rewards, group, mask)
    count, mean, deviation = _statistics(each, valid, index, ddof)
    alone = count <= 1
    out = each - mean
    if lone == "reward":
        out, deviation = jnp.where(alone, each, out), jnp.where(alone, 1, deviation)
    elif lone != "zero":
        raise ObjectiveError(f"lone {lone!r} is not one of 'reward', 'zero'")
    if scale == "batch":
        whole = jnp.zeros_like(index)
        deviation = _statistics(each, valid, whole, ddof)[2]
    elif scale not in ("group", "none"):
        raise ObjectiveError(f"scale {scale!r} is not one of 'group', 'batch', 'none'")
    if scale != "none":
        out = out / (deviation + eps)
    return _spread(out, valid, mask)


def rloo(rewards: Any, group: Any, mask: Any) -> Any:
    """R - mean of the others in the group (2402.14740); a sample alone in its group keeps its reward."""
    each, valid, index = _scores(rewards, group, mask)
    count, mean, _ = _statistics(each, valid, index)
    return _spread(jnp.where(count > 1, (each - mean) * count / jnp.maximum(count - 1, 1), each), valid, mask)


def opo(rewards: Any, group: Any, mask: Any) -> Any:
    """R - mean of the group weighted by length (2505.23585); a sample alone in its group keeps its reward."""
    each, valid, index = _scores(rewards, group, mask)
    length = jnp.where(valid, mask.sum(-1), 0)
    count, _, _ = _statistics(each, valid, index)
    baseline = _sum(length * each, index) / jnp.maximum(_sum(length, index), 1)
    return _spread(jnp.where(count > 1, each - baseline, each), valid, mask)


def remax(rewards: Any, group: Any, mask: Any, *, greedy: Any) -> Any:
    """Reward to go minus that of a greedy sample [B] (2310.10505); rewards [B] or [B, T]."""
    return jnp.where(mask, _to_go(token_rewards(rewards, mask), mask) - greedy[:, None], 0)


def pass_at_k(rewards: Any, group: Any, mask: Any, *, scale: bool = True, eps: float = 1e-6) -> Any:
    """The best of a group gets its lead over the second, over the group's deviation, the others 0 (2503.19595)."""
    each, valid, index = _scores(rewards, group, mask)
    _, _, deviation = _statistics(each, valid, index)
    lowest = jnp.finfo(each.dtype).min
    scores = jnp.where(valid, each, lowest)
    rows = jnp.arange(len(each))
    # of equals, the first
    best = jax.ops.segment_max(scores, index, len(each))[index]
    first = jax.ops.segment_min(jnp.where(scores == best, rows, len(each)), index, len(each))[index]
    leads = (rows == first) & valid
    second = jax.ops.segment_max(jnp.where(leads, lowest, scores), index, len(each))[index]
    lead = jnp.where(leads & (second > lowest), best - second, 0)
    return _spread(lead / (deviation + eps) if scale else lead, valid, mask)


def gpg(rewards: Any, group: Any, mask: Any, *, norm: float = 1.0) -> Any:
    """alpha (R - mean of the group) / norm, alpha the batch size over the number of rewards that are not 0
    (2504.02546); a sample alone in its group keeps its reward.
    """
    each, valid, index = _scores(rewards, group, mask)
    count, mean, _ = _statistics(each, valid, index)
    alpha = len(each) / jnp.maximum((each != 0).sum(), 1)
    return _spread(alpha * jnp.where(count > 1, each - mean, each) / norm, valid, mask)


def gdpo(rewards: Any, group: Any, mask: Any, *, weights: Any = None, eps: float = 1e-6) -> Any:
    """Every component of the reward [B, R] is normalised in its group by itself, then the weighted sum over the batch's
    tokens (2601.05242).
    """
    parts = jnp.stack([grpo(rewards[:, r], group, mask, eps=eps) for r in range(rewards.shape[1])], -1)
    total = parts.sum(-1) if weights is None else parts @ jnp.asarray(weights)
    return jnp.where(mask, whiten(total, mask), 0)


def normalize_then_sum(rewards: Any, group: Any, mask: Any, *, weights: Any = None, eps: float = 1e-4) -> Any:
    """TRL's form of the same: components [B, R], standardised over the samples instead of the tokens in the end."""
    samples = jnp.ones((len(rewards), 1), bool)
    each = [grpo(rewards[:, r], group, samples, eps=eps, lone="zero") for r in range(rewards.shape[1])]
    parts = jnp.concatenate(each, -1)
    total = parts.sum(-1) if weights is None else parts @ jnp.asarray(weights)
    total = jnp.where(jnp.isfinite(rewards).any(-1), total, jnp.nan)
    return grpo(total, jnp.zeros(len(rewards), jnp.int32), mask, eps=eps, lone="zero")


def reinforce_plus_plus_baseline(rewards: Any, group: Any, mask: Any) -> Any:
    """R - mean of the group, standardised over the batch's tokens (2501.03262); a sample alone keeps its reward."""
    each, valid, index = _scores(rewards, group, mask)
    count, mean, _ = _statistics(each, valid, index)
    out = _spread(jnp.where(count > 1, each - mean, each), valid, mask)
    return jnp.where(mask, whiten(out, mask), 0)


# ---- one number per token
def reinforce_plus_plus(rewards: Any, group: Any, mask: Any, *, gamma: float = 1.0) -> Any:
    """Discounted reward to go, standardised over the batch's tokens (2501.03262). What the policy did not say is
    skipped: the return is carried over it. Rewards [B] stand at each sample's last token; a KL penalty comes in with
    `penalised_rewards`.
    """
    returns = discounted_returns(token_rewards(rewards, mask), mask, gamma)
    return jnp.where(mask, whiten(returns, mask), 0)


def gae_advantages(
    rewards: Any, group: Any, mask: Any, *, values: Any, gamma: float = 1.0, lam: float = 1.0, whitened: bool = True
) -> Any:
    """`gae`, standardised over the batch's tokens."""
    found, _ = gae(token_rewards(rewards, mask), values, mask, gamma=gamma, lam=lam)
    return jnp.where(mask, whiten(found, mask) if whitened else found, 0)


def process(rewards: Any, group: Any, mask: Any, *, steps: Any, eps: float = 1e-6) -> Any:
    """Rewards of reasoning steps, GRPO's process supervision (2402.03300 sec. 4.1.3).

    Args:
        rewards: [B, T], of each step at its last token.
        steps: [B, T] bool, where a step ends.

    Returns:
        For every token the sum of the standardised rewards (over all steps of the group) of the steps that end there or
        later.
    """
    known = steps & jnp.isfinite(rewards)
    each = jnp.where(known, rewards, 0)
    index = _index(group)
    count = _sum(known.sum(-1), index)
    mean = _sum(each.sum(-1), index) / jnp.maximum(count, 1)
    gap = jnp.where(known, each - mean[:, None], 0)
    deviation = jnp.sqrt(_sum((gap**2).sum(-1), index) / jnp.maximum(count - 1, 1))
    return jnp.where(mask, _to_go(gap / (deviation[:, None] + eps), known), 0)


def optimal_token_baseline(
    rewards: Any, group: Any, mask: Any, *, logp: Any, squares: Any, weights: Any = None, eps: float = 1e-8
) -> Any:
    """Reward to go minus, at each position, the group's mean weighted by the variance that each sample's path has
    gathered so far, W_t = sum of 1 - 2 pi(a) + sum over the vocabulary of pi^2 (verl's optimal_token_baseline).
    Where only the longest sample of a group still speaks there is no baseline.

    Args:
        logp: [B, T] of the tokens. squares: [B, T] sum over the vocabulary of the squared probabilities.
        weights: [B, T] of a correction for the roll-out's mismatch, whose squares weight W.
    """
    to_go = _to_go(token_rewards(rewards, mask), mask)
    energy = 1 - 2 * jnp.exp(logp) + squares
    energy = energy if weights is None else energy * weights**2
    path = jnp.where(mask, jnp.where(mask, energy, 0).cumsum(-1), 0)
    index = _index(group)
    baseline = _sum(to_go * path, index) / (_sum(path, index) + eps)
    length, rows = mask.sum(-1), jnp.arange(len(mask))
    longest = jax.ops.segment_max(length, index, len(mask))[index]
    ties = _sum((length == longest).astype(jnp.int32), index)
    only = (length == longest) & (ties == 1)
    second = jax.ops.segment_max(jnp.where(only, 0, length), index, len(mask))[index]
    alone = _sum(jnp.ones_like(rows), index) == 1
    beyond = only[:, None] & (jnp.arange(mask.shape[1]) >= second[:, None])
    return jnp.where(mask, to_go - jnp.where(beyond | alone[:, None], 0, baseline), 0)


# ---- parts
def gae(
    rewards: Float[Array, "B T"], values: Float[Array, "B T"], mask: Bool[Array, "B T"], *, gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:  # fmt: skip
    """(advantages, returns): generalised advantage estimation (1506.02438), returns = advantages + values.

    Tokens outside the mask are skipped: the value and the advantage of the next token of the policy's own are carried
    over them.
    """

    def back(carry: Any, now: Any) -> Any:
        value_after, advantage_after = carry
        reward, value, own = now
        found = reward + gamma * value_after - value + gamma * lam * advantage_after
        carry = jnp.where(own, value, value_after), jnp.where(own, found, advantage_after)
        return carry, carry[1]

    zero = jnp.zeros_like(values[:, 0])
    _, out = jax.lax.scan(back, (zero, zero), (rewards.T, values.T, mask.T), reverse=True)
    return out.T, out.T + values


def discounted_returns(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"], gamma: float = 1.0
) -> Float[Array, "B T"]:
    """Reward to go of every token, 0 outside the mask, over which it is carried."""

    def back(after: Any, now: Any) -> Any:
        reward, own = now
        here = reward + gamma * after
        return jnp.where(own, here, after), jnp.where(own, here, 0)

    _, out = jax.lax.scan(back, jnp.zeros_like(rewards[:, 0]), (rewards.T, mask.T), reverse=True)
    return out.T


def whiten(values: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Standardised by mean and (Bessel-corrected) variance over the mask; also what lies outside it."""
    count = mask.sum()
    mean = jnp.where(mask, values, 0).sum() / jnp.maximum(count, 1)
    variance = jnp.where(mask, (values - mean) ** 2, 0).sum() / jnp.maximum(count - 1, 1)
    return (values - mean) * jax.lax.rsqrt(variance + 1e-8)


def token_rewards(rewards: Float[Array, "B ..."], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Rewards [B] at the last token of each sample's own; rewards [B, T] as they are."""
    if rewards.ndim == 2:
        return rewards
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], -1)
    here = (jnp.arange(mask.shape[1]) == last[:, None]) & mask
    return jnp.where(here, rewards[:, None], 0)


def _to_go(rewards: Any, mask: Any) -> Any:
    return jnp.where(mask, rewards, 0)[:, ::-1].cumsum(-1)[:, ::-1]


def _scores(rewards: Any, group: Any, mask: Any) -> tuple[Any, Any, Any]:
    if group is None:
        raise ObjectiveError("this estimator compares the samples of one prompt; pass group, one integer per sample")
    each = rewards if rewards.ndim == 1 else rewards.sum(-1)
    valid = jnp.isfinite(each)
    return jnp.where(valid, each, 0), valid, _index(group)


def _index(group: Any) -> Any:
    return jnp.unique(group, return_inverse=True, size=len(group))[1].ravel()


def _sum(x: Any, index: Any) -> Any:
    """Sum over the group, for each of its members."""
    return jax.ops.segment_sum(x, index, len(index))[index]


def _statistics(each: Any, valid: Any, index: Any, ddof: int = 1) -> tuple[Any, Any, Any]:
    count = _sum(valid.astype(each.dtype), index)
    mean = _sum(jnp.where(valid, each, 0), index) / jnp.maximum(count, 1)
    gap = jnp.where(valid, each - mean, 0)
    deviation = jnp.sqrt(_sum(gap * gap, index) / jnp.maximum(count - ddof, 1))
    return count, mean, deviation


def _spread(each: Any, valid: Any, mask: Any) -> Any:
    return jnp.where(mask & valid[:, None], each[:, None], 0)


ESTIMATORS: dict[str, Callable[..., Any]] = {
    "grpo": grpo,
    "dr_grpo": functools.partial(grpo, scale="none"),
    "rloo": rloo,
    "opo": opo,
    "remax": remax,
    "pass_at_k": pass_at_k,
    "gpg": gpg,
    "gdpo": gdpo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "gae": gae_advantages,
    "process": process,
    "optimal_token_baseline": optimal_token_baseline,
    "verl.grpo": grpo,
    "verl.dr_grpo": functools.partial(grpo, scale="none"),
    "slime.grpo": functools.partial(grpo, eps=1e-6, lone="zero"),
    "trl.grpo": functools.partial(grpo, eps=1e-4, lone="zero"),
    "trl.dr_grpo": functools.partial(grpo, scale="none", lone="zero"),
    "trl.batch": functools.partial(grpo, scale="batch", eps=1e-4, lone="zero"),
    "trl.normalize_then_sum": normalize_then_sum,
}
