"""Losses of pairs and divergences against TRL's and verl's code, and what must hold of any of them."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.errors import ObjectiveError
from rl.objectives import (
    PREFERENCES,
    Preference,
    distillation,
    kto_loss,
    preference_loss,
)
from rl.objectives.preference import pair_loss

with np.load(pathlib.Path(__file__).parent / "golden" / "objectives.npz") as _kept:
    GOLD = {k: v for k, v in _kept.items() if k.split("/")[0] in ("pairs", "kto", "divergence", "input")}
BETA = 0.3
SPECS = {
    **{k: Preference(k, BETA) for k in ("sigmoid", "hinge", "nca", "bco", "sppo", "apo_zero", "apo_down", "discopop")},
    "ipo": dataclasses.replace(PREFERENCES["ipo"], beta=BETA),
    "averaged": dataclasses.replace(PREFERENCES["dpo.averaged"], beta=BETA),
    "robust": dataclasses.replace(PREFERENCES["robust"], beta=BETA),
    "exo": Preference("exo", BETA, smoothing=0.1),
    "simpo": dataclasses.replace(PREFERENCES["simpo"], beta=BETA, gamma=0.5),
    "cpo": dataclasses.replace(PREFERENCES["cpo"], beta=BETA),
    "orpo": dataclasses.replace(PREFERENCES["orpo"], beta=BETA),
}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def pairs() -> tuple[Any, Any, Any]:
    logp, ref, mask = (jnp.asarray(GOLD[f"input/pairs/{name}"]) for name in ("logp", "ref", "mask"))
    return logp, ref, mask


def same(value: Any, gradient: Any, case: str) -> None:
    np.testing.assert_allclose(value, GOLD[f"{case}/value"], rtol=1e-9)
    expected = GOLD[f"{case}/gradient"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("case", sorted(SPECS))
def test_losses_of_pairs_are_trl_s(case):
    logp, ref, mask = pairs()

    def run(x):
        return preference_loss(
            x[0], mask[0], x[1], mask[1], ref_chosen_logp=ref[0], ref_rejected_logp=ref[1], spec=SPECS[case]
        )[0]

    # TRL's sums run over the padding too, whose log-probability is 0 but has a gradient here
    value, gradient = jax.value_and_grad(run)(logp)
    assert not gradient[~mask].any()
    same(value, jnp.where(mask, gradient, GOLD[f"pairs/{case}/gradient"]), f"pairs/{case}")


def test_every_loss_of_pairs_was_compared():
    assert {spec.kind for spec in PREFERENCES.values()} <= {spec.kind for spec in SPECS.values()}


@pytest.mark.parametrize(("case", "kl"), [("above", 0.7), ("below", -0.7)])
def test_kto_is_trl_s(case, kl):
    logp, ref, _ = pairs()
    desirable = jnp.repeat(jnp.array([True, False]), 5)

    def run(x):
        scores = (x - ref).sum(-1).ravel()
        return kto_loss(scores, desirable, jnp.asarray(kl), beta=BETA, weights=(1.5, 0.5)).sum()

    same(*jax.value_and_grad(run)(logp), f"kto/{case}")


@pytest.mark.parametrize("case", ["jsd 0", "jsd 0.3", "jsd 1", "top drop", "top floor"])
def test_divergences_are_their_source_s(case):
    student, teacher, top = (jnp.asarray(GOLD[f"input/logits/{name}"]) for name in ("student", "teacher", "top"))
    known = jnp.take_along_axis(jax.nn.log_softmax(teacher, -1), top, -1)

    def run(x):
        if case.startswith("jsd"):
            return distillation.generalised_jsd(x, teacher, beta=float(case[4:]), temperature=1.7).sum()
        floor = -2.0 if case == "top floor" else None
        return distillation.top_k_forward_kl(x, known, top, floor=floor).sum()

    same(*jax.value_and_grad(run)(student), f"divergence/{case}")


# ---- what holds of any of them
def test_at_the_reference_dpo_is_log_two_and_ranks_by_its_own_gradient():
    logp, _, mask = pairs()
    loss, seen = preference_loss(logp[0], mask[0], logp[1], mask[1], ref_chosen_logp=logp[0], ref_rejected_logp=logp[1])
    assert loss == pytest.approx(np.log(2))
    assert seen["margin"] == 0
    for kind in ("sigmoid", "ipo", "hinge", "robust", "bco", "sppo", "apo_zero", "odds"):
        spec = Preference(kind, 0.5, smoothing=0.1 if kind == "robust" else 0.0)
        slopes = jax.grad(lambda c, r, s=spec: pair_loss(c, r, s).sum(), (0, 1))(jnp.array([-1.0]), jnp.array([-0.9]))
        assert slopes[0] < 0 < slopes[1], f"{kind} does not raise the chosen and lower the rejected"


def test_smoothing_is_the_mean_over_flipped_labels_and_robust_undoes_it():
    """With labels flipped with probability e, cDPO is the expected loss; robust DPO's expectation is the clean loss."""
    rng = np.random.default_rng(0)
    c, r = jnp.asarray(rng.standard_normal((2, 20)))
    e, clean = 0.2, pair_loss(c, r, Preference())
    flipped = pair_loss(r, c, Preference())
    np.testing.assert_allclose(pair_loss(c, r, Preference(smoothing=e)), (1 - e) * clean + e * flipped, rtol=1e-12)
    robust = Preference("robust", smoothing=e)
    np.testing.assert_allclose((1 - e) * pair_loss(c, r, robust) + e * pair_loss(r, c, robust), clean, rtol=1e-12)


def test_divergences_by_enumeration():
    rng = np.random.default_rng(1)
    s, t = (jnp.asarray(x) for x in rng.standard_normal((2, 4, 9)))
    p, q = jax.nn.softmax(s), jax.nn.softmax(t)
    np.testing.assert_allclose(distillation.reverse_kl(s, t), (p * jnp.log(p / q)).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(distillation.forward_kl(s, t), (q * jnp.log(q / p)).sum(-1), rtol=1e-12)
    halves = [distillation.generalised_jsd(s, t, beta=0.25, convention=c) for c in ("trl", "easydel")]
    np.testing.assert_allclose(halves[1], distillation.generalised_jsd(t, s, beta=0.25), rtol=1e-12)
    assert not np.allclose(*halves)
    everything = jnp.broadcast_to(jnp.arange(9), t.shape)
    for tail in distillation.TAILS:  # all tokens known: nothing is left for the tail
        whole = distillation.top_k_forward_kl(s, jax.nn.log_softmax(t), everything, tail=tail)
        np.testing.assert_allclose(whole, distillation.forward_kl(s, t), rtol=1e-5)
    few = jnp.argsort(-t, -1)[:, :3]
    known = jnp.take_along_axis(jax.nn.log_softmax(t), few, -1)
    grouped = distillation.top_k_forward_kl(s, known, few, tail="bucket")
    assert (grouped >= 0).all(), "a KL of two distributions over four outcomes"
    assert (grouped <= distillation.forward_kl(s, t)).all(), "merging outcomes loses information"
    fixed = jax.grad(lambda x: distillation.reverse_kl(x, t).sum())(t)
    np.testing.assert_allclose(fixed, 0, atol=1e-12)


def test_the_policy_gradient_of_distillation_descends_the_reverse_kl():
    rng = np.random.default_rng(2)
    s, t = (jnp.asarray(x) for x in rng.standard_normal((2, 9)))
    p = jax.nn.softmax(s)

    def surrogate(x):
        logp, frozen = jax.nn.log_softmax(x), jax.nn.log_softmax(s)
        advantage = distillation.on_policy_advantages(frozen, jax.nn.log_softmax(t))
        return -(p * advantage * jnp.exp(logp - frozen)).sum()

    exact = jax.grad(lambda x: distillation.reverse_kl(x, t))(s)
    np.testing.assert_allclose(jax.grad(surrogate)(s), exact, rtol=1e-9)


def test_bad_input_is_named():
    logp, _, mask = pairs()
    with pytest.raises(ObjectiveError, match="did you mean 'hinge'"):
        Preference("hing")
    with pytest.raises(ObjectiveError, match="pass ref_chosen_logp"):
        preference_loss(logp[0], mask[0], logp[1], mask[1])
    with pytest.raises(ObjectiveError, match="exo needs smoothing"):
        Preference("exo")
    with pytest.raises(ObjectiveError, match="tail 'cut'"):
        distillation.top_k_forward_kl(jnp.zeros((2, 5)), jnp.zeros((2, 2)), jnp.zeros((2, 2), int), tail="cut")
