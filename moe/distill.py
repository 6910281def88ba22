"""Distillation of one language model into another: from the teacher's text, or on the student's own.

    batch = rollouts(engine.generate(prompts, Sampling(temperature=1.0)), length=256, cfg=cfg)
    loss_fn = lambda p, batch, rng, teacher: distillation_loss(
        p, batch, teacher, cfg=cfg, teacher_cfg=teacher_cfg, loss=LossConfig(switch=0.0, group=0.1), rng=rng)
    step = make_train_step(loss_fn, optimizer)
    state, metrics = step(state, batch, teacher)      # the teacher is an argument: frozen, in its own sharding

The teacher runs in the same step, so neither its logits nor its log-probabilities are stored. On the student's own text
every form minimises the reverse KL(student || teacher) of each next token; the policy gradient sees the tokens drawn,
"reverse_kl" all of them, with less variance.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from moe.models.decode import Completion
from moe.models.transformer import TransformerConfig, TransformerParams, apply, logits
from moe.objectives import LossConfig, in_chunks, router_observer, router_terms, token_loss
from moe.training import Mean

FORMS = ("policy_gradient", "reverse_kl", "forward_kl")


class DistillError(ValueError):
    """Roll-outs or settings that cannot be trained on. The message names the value and the remedy."""


def rollouts(
    completions: Sequence[Completion], *, length: int, cfg: TransformerConfig, replay: bool = True
) -> dict[str, np.ndarray]:
    """One row for each completion, without packing.

    Returns:
        tokens, targets, positions, segments (1, 0 for padding) [B, length] int32; mask [B, length], true where the
        target was drawn by the student; old_logprobs [B, length] of those; with `replay` also routing
        [B, mixtures, length, K], the slots of every token (2510.11370: training then follows the roll-out's choices).

    Raises:
        DistillError: a completion that failed, does not fit `length`, or holds no record to replay.
    """
    count = len(completions)
    if not count:
        raise DistillError("no completions; hand over at least one")
    shape = count, length
    batch: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments")}
    batch["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy()
    batch["mask"] = np.zeros(shape, bool)
    batch["old_logprobs"] = np.zeros(shape, np.float32)
    if replay:
        if cfg.moe is None:
            raise DistillError("replay needs a model with mixtures of experts; pass replay=False")
        how = cfg.moe.routing.routed
        batch["routing"] = np.full((count, cfg.mixtures, length, how.top_k), how.slots, np.int32)
    for row, one in enumerate(completions):
        ids = np.concatenate([one.prompt, one.tokens]).astype(np.int32)
        fed, first = len(ids) - 1, len(one.prompt) - 1
        if one.finish == "error" or not len(one.tokens):
            raise DistillError(
                f"completion {row} finished with {one.finish!r} and {len(one.tokens)} tokens; leave it out"
            )
        if fed > length:
            raise DistillError(f"completion {row} has {fed} tokens to feed, length is {length}; raise it to {fed}")
        batch["tokens"][row, :fed], batch["targets"][row, :fed] = ids[:-1], ids[1:]
        batch["segments"][row, :fed] = 1
        batch["mask"][row, first:fed] = True
        batch["old_logprobs"][row, first:fed] = one.logprobs
        if replay:
            if one.routing is None or one.routing.shape[1] != fed:
                raise DistillError(f"completion {row} has no routing record; set EngineConfig.record_routing")
            batch["routing"][row, :, :fed] = one.routing
    return batch


def divergence(
    params: TransformerParams,
    hidden: Float[Array, "B S D"],
    teacher: TransformerParams,
    teacher_hidden: Float[Array, "B S E"],
    *,
    form: str = "reverse_kl",
    chunk: int | None = 256,
) -> Float[Array, "B S"]:
    """KL of the next-token distributions at every position, in nats, over the whole vocabulary: KL(student || teacher)
    for "reverse_kl", KL(teacher || student) for "forward_kl". No gradient reaches the teacher.

    Args:
        hidden, teacher_hidden: `Output.hidden` of each model; both have one vocabulary.
    """
    if form not in FORMS[1:]:
        raise DistillError(f"form {form!r} is not one of {', '.join(map(repr, FORMS[1:]))}")

    def part(mine: jax.Array, theirs: jax.Array) -> jax.Array:
        s = jax.nn.log_softmax(logits(params, mine), -1)
        t = jax.lax.stop_gradient(jax.nn.log_softmax(logits(teacher, theirs), -1))
        if s.shape != t.shape:
            raise DistillError(f"vocabularies of {s.shape[-1]} and {t.shape[-1]} differ; student and teacher share one")
        return (jnp.exp(s) * (s - t)).sum(-1) if form == "reverse_kl" else (jnp.exp(t) * (t - s)).sum(-1)

    return in_chunks(part, (hidden, jax.lax.stop_gradient(teacher_hidden)), chunk)


def policy_surrogate(
    logprobs: Float[Array, "*b"],
    old_logprobs: Float[Array, "*b"],
    advantages: Float[Array, "*b"],
    *,
    clip: tuple[float, float] = (0.2, 0.2),
) -> Float[Array, "*b"]:
    """Minus PPO's clipped surrogate of each token (1707.06347 eq. 7): -min(r A, clip(r, 1 - low, 1 + high) A), r the
    ratio of new to old probability. At one step a roll-out r is 1 and the gradient is -A times that of `logprobs`.
    """
    ratio = jnp.exp(logprobs - old_logprobs)
    limited = jnp.clip(ratio, 1 - clip[0], 1 + clip[1])
    return -jnp.minimum(ratio * advantages, limited * advantages)


def mean_of_samples(values: Float[Array, "B S"], mask: Bool[Array, "B S"]) -> Mean:
    """Mean over the tokens of each row, then over the rows that have any: long answers weigh as much as short ones."""
    tokens = mask.sum(-1)
    each = jnp.where(mask, values, 0).sum(-1) / jnp.maximum(tokens, 1)
    return Mean.of(each, tokens > 0)


def distillation_loss(
    params: TransformerParams,
    batch: Mapping[str, Any],
    teacher: TransformerParams,
    *,
    cfg: TransformerConfig,
    teacher_cfg: TransformerConfig,
    loss: LossConfig = LossConfig(),
    form: str = "policy_gradient",
    clip: tuple[float, float] = (0.2, 0.2),
    rng: Key[Array, ""] | None = None,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """(objective, metrics) for `moe.training.make_train_step`; averaged over a row's tokens, then over rows.

    "policy_gradient": ZEDA's stage 2 (spec section 2.3), PPO's surrogate with the advantage log pi_T - log pi_old of
    each token, neither normalised nor discounted; in expectation the gradient of the reverse KL. "reverse_kl" and
    "forward_kl": of the whole distributions.

    Objective: "distillation" and the router terms of `loss`. Metrics: "kl" (the mean of log pi_S - log pi_T over drawn
    tokens: its expectation on the student's own text is the reverse KL), "nll" of the targets, the routers' as in
    `language_model_loss`.

    Args:
        batch: of `rollouts`, or packed rows of `moe.data` for the two KL forms. "routing", if there, is replayed.
        teacher: frozen; its own routing is chosen anew.
        loss: its z, switch, router_z, group and remat hold.

    Raises:
        DistillError: another form, or a policy gradient without old log-probabilities.
    """
    if form not in FORMS:
        raise DistillError(f"form {form!r} is not one of {', '.join(map(repr, FORMS))}")
    if form == "policy_gradient" and "old_logprobs" not in batch:
        raise DistillError("the policy gradient needs old_logprobs of the text's author; take rollouts, or a KL form")
    where: dict[str, Any] = dict(
        positions=batch["positions"],
        segments=batch["segments"],
        valid=batch["segments"] > 0,
        consecutive=True,
        remat=loss.remat,
    )
    record = batch.get("routing")
    out = apply(
        params, batch["tokens"], cfg=cfg, rng=rng, observe=router_observer(loss, cfg),
        replay=None if record is None else jnp.moveaxis(record, 1, 0), **where,
    )  # fmt: skip
    frozen = jax.lax.stop_gradient(teacher)
    theirs = jax.lax.stop_gradient(apply(frozen, batch["tokens"], cfg=teacher_cfg, **where).hidden)
    mask = batch["mask"]
    mine = token_loss(params, out.hidden, batch["targets"], chunk=loss.chunk)
    gap = jax.lax.stop_gradient(token_loss(frozen, theirs, batch["targets"], chunk=loss.chunk).nll - mine.nll)
    if form == "policy_gradient":
        old = batch["old_logprobs"]
        advantage = jax.lax.stop_gradient(gap * -1 - mine.nll - old)  # log pi_T - log pi_old
        each = policy_surrogate(-mine.nll, old, advantage, clip=clip)
    else:
        each = divergence(params, out.hidden, frozen, theirs, form=form, chunk=loss.chunk)
    objective = {"distillation": mean_of_samples(each, mask)}
    metrics = {"kl": Mean.of(gap, mask), "nll": Mean.of(jax.lax.stop_gradient(mine.nll), mask)}
    if loss.z:
        objective["z"] = Mean.of(loss.z * mine.log_z**2, mask)
    terms, reports = router_terms(params, out.observed, loss, cfg)
    return objective | terms, metrics | reports
