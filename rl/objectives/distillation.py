"""Divergences between a student's and a teacher's next-token distributions, un-reduced: [*b, V] logits in, [*b] out.

`moe.distill` has the train steps, which see logits in chunks only. No gradient reaches the teacher.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rl.errors import ObjectiveError

TAILS = ("drop", "renormalise", "bucket")


def forward_kl(
    student: Float[Array, "*b V"], teacher: Float[Array, "*b V"], *, temperature: float = 1.0
) -> Float[Array, "*b"]:
    """KL(teacher || student)."""
    s, t = _log_softmax(student, teacher, temperature)
    return _kl(t, s)


def reverse_kl(
    student: Float[Array, "*b V"], teacher: Float[Array, "*b V"], *, temperature: float = 1.0
) -> Float[Array, "*b"]:
    """KL(student || teacher)."""
    s, t = _log_softmax(student, teacher, temperature)
    return _kl(s, t)


def generalised_jsd(
    student: Float[Array, "*b V"],
    teacher: Float[Array, "*b V"],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    convention: str = "trl",
) -> Float[Array, "*b"]:
    """GKD's divergence (2306.13649): beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S.

    At beta = 0 it is the forward and at beta = 1 the reverse KL in full, though the mixture's value tends to 0 there.

    Args:
        convention: "trl" as above; "easydel" has student and teacher exchanged.
    """
    if convention not in ("trl", "easydel") or not 0 <= beta <= 1:
        raise ObjectiveError(f"convention {convention!r} must be 'trl' or 'easydel' and beta={beta} lie in [0, 1]")
    s, t = _log_softmax(student, teacher, temperature)
    if convention == "easydel":
        s, t = t, s
    if beta == 0:
        return _kl(t, s)
    if beta == 1:
        return _kl(s, t)
    mixed = jnp.logaddexp(s + jnp.log1p(-beta), t + jnp.log(beta))
    return beta * _kl(t, mixed) + (1 - beta) * _kl(s, mixed)


def top_k_forward_kl(
    student: Float[Array, "*b V"],
    teacher_logp: Float[Array, "*b K"],
    teacher_ids: Int[Array, "*b K"],
    *,
    tail: str = "drop",
    floor: float | None = None,
) -> Float[Array, "*b"]:
    """KL(teacher || student) where only the teacher's likeliest tokens are known.

    Args:
        student: logits.
        teacher_logp, teacher_ids: log-probabilities (of the whole vocabulary) and ids of K tokens.
        tail: what becomes of the rest. "drop": nothing is added and probabilities stay as they are (verl); the value
            may be negative. "renormalise": both are distributions over the K tokens (Tunix). "bucket": the rest is one
            more outcome (TRL's server distillation).
        floor: least log-probability of either, with "drop" (verl's log_prob_min_clamp).

    Raises:
        ObjectiveError: another tail.
    """
    if tail not in TAILS:
        raise ObjectiveError(f"tail {tail!r} is not one of {', '.join(map(repr, TAILS))}")
    t = jax.lax.stop_gradient(teacher_logp)
    s = jnp.take_along_axis(jax.nn.log_softmax(student, -1), teacher_ids, -1)
    if tail == "renormalise":
        return _kl(jax.nn.log_softmax(t, -1), jax.nn.log_softmax(s, -1))
    if tail == "bucket":
        rest = [jnp.log1p(-jnp.minimum(jnp.exp(x).sum(-1), 1 - 1e-7)) for x in (t, s)]
        return _kl(t, s) + jnp.exp(rest[0]) * (rest[0] - rest[1])
    if floor is not None:
        s, t = jnp.maximum(s, floor), jnp.maximum(t, floor)
    return _kl(t, s)


def on_policy_advantages(student_logp: Float[Array, "*b"], teacher_logp: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """log pi_T - log pi_S of the tokens that the student drew, without gradient: as advantages of a policy gradient
    they descend the reverse KL of each next token (thinkingmachines.ai/blog/on-policy-distillation). Differentiating
    the difference itself instead would have a gradient of zero in expectation.
    """
    return jax.lax.stop_gradient(teacher_logp - student_logp)


def _log_softmax(student: Array, teacher: Array, temperature: float) -> tuple[Array, Array]:
    if student.shape != teacher.shape:
        raise ObjectiveError(f"logits of student {student.shape} and teacher {teacher.shape} differ; one vocabulary")
    if not temperature > 0:
        raise ObjectiveError(f"temperature={temperature} must be positive")
    frozen = jax.lax.stop_gradient(teacher)
    return jax.nn.log_softmax(student / temperature, -1), jax.nn.log_softmax(frozen / temperature, -1)


def _kl(p: Array, q: Array) -> Array:
    """KL(p || q) of log-probabilities; an outcome without probability adds nothing."""
    mass = jnp.exp(p)
    return jnp.where(mass > 0, mass * (jnp.where(mass > 0, p, 0) - q), 0).sum(-1)
