"""Policy losses and advantages against the code they come from, and what must hold of any of them."""

import dataclasses
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.errors import ObjectiveError
from rl.objectives import (
    ESTIMATORS,
    KL,
    PRESETS,
    Aggregate,
    Cispo,
    Clip,
    Correction,
    KLCov,
    PolicySpec,
    Ratio,
    Rejection,
    Vespo,
    advantages,
    aggregate,
    gae,
    kl_estimate,
    policy_loss,
    policy_objective,
    preset,
    trl_dr_grpo,
    value_loss,
)
from rl.objectives.presets import ICEPOP, MIS_SEQUENCE, TIS, TIS_SEQUENCE, TRL_KL

GOLD = pathlib.Path(__file__).parent / "golden" / "objectives.npz"
change = dataclasses.replace


@pytest.fixture(scope="module")
def gold() -> dict[str, np.ndarray]:
    with np.load(GOLD) as kept:
        return dict(kept)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def inputs(gold: dict[str, np.ndarray], batch: str) -> dict[str, Any]:
    return {k.split("/")[2]: jnp.asarray(v) for k, v in gold.items() if k.startswith(f"input/{batch}/")}


VERL, TRL, SLIME = PRESETS["verl.grpo"], PRESETS["trl.grpo"], PRESETS["slime.grpo"]
UNLIKE = {  # cases of the sources that are no preset as it stands
    "verl.grpo token-sum": change(VERL, aggregate=Aggregate("token_sum")),
    "verl.grpo seq-mean-token-sum": change(VERL, aggregate=Aggregate("sequence_mean_token_sum")),
    "verl.grpo seq-mean-token-mean": change(VERL, aggregate=Aggregate("sequence_mean_token_mean")),
    "verl.gspo wide": change(PRESETS["verl.gspo"], surrogate=Clip()),
    "verl.kl_cov": change(PRESETS["verl.kl_cov"], surrogate=KLCov(share=0.1)),
    "verl.grpo tis": change(VERL, correction=TIS),
    "verl.grpo tis sequence": change(VERL, correction=TIS_SEQUENCE),
    "verl.grpo icepop": change(VERL, correction=ICEPOP),
    "verl.grpo tis normalised": change(VERL, correction=change(TIS, normalise=True)),
    "verl.grpo tis sequence normalised": change(VERL, correction=change(TIS_SEQUENCE, normalise=True)),
    "verl.geo_mean tis": change(PRESETS["verl.geo_mean"], correction=TIS),
    "verl.grpo reject token_k1": change(VERL, rejection=(Rejection("token", "k1", 1.5, 0.6),)),
    "verl.grpo reject token_k3": change(VERL, rejection=(Rejection("token", "k3", 0.05),)),
    "verl.grpo reject seq_mean_k2": change(VERL, rejection=(Rejection("sequence_mean", "k2", 0.03),)),
    "verl.grpo reject seq_sum_k1": change(VERL, rejection=(Rejection("sequence_sum", "k1", 1.4, 0.7),)),
    "verl.grpo reject seq_max_k3": change(VERL, rejection=(Rejection("sequence_max", "k3", 0.1),)),
    **{
        f"verl.grpo kl {kind}": change(
            VERL, kl=KL(0.1, kind.rstrip("+"), straight_through="+" in kind, log_bound=20.0, value_bound=10.0)
        )
        for kind in ("k1", "abs", "k2", "k3", "k1+", "k3+")
    },
    "trl.dr_grpo": trl_dr_grpo(20),
    "trl.grpo delta": change(TRL, surrogate=Clip(cap=4.0)),
    "trl.grpo kl": change(TRL, kl=TRL_KL),
    "trl.grpo kl unbiased": change(TRL, kl=change(TRL_KL, unbiased=True)),
    "trl.grpo off-policy mask": change(TRL, off_policy=0.1),
    "trl.grpo vllm": change(TRL, correction=MIS_SEQUENCE),
    "trl.dapo vllm kl": change(PRESETS["trl.dapo"], correction=MIS_SEQUENCE, kl=TRL_KL, off_policy=0.1),
    "slime.grpo tis": change(SLIME, correction=Correction(2.0, 0.0, log_bound=None)),
    "slime.grpo icepop": change(SLIME, correction=change(ICEPOP, log_bound=None)),
}
with np.load(GOLD) as _kept:
    CASES = sorted({tuple(k.split("/")[1:3]) for k in _kept if k.startswith("loss/")})


@pytest.mark.parametrize(("case", "batch"), CASES)
def test_losses_are_their_source_s(gold, case, batch):
    spec = UNLIKE.get(case) or PRESETS[case]
    d = inputs(gold, batch)
    given = d["token_advantages"] if case.startswith("verl") else d["advantages"][:, 0]
    needs_rollout = spec.correction is not None or spec.rejection
    more = {"rollout_logp": d["rollout"] if needs_rollout else None, "ref_logp": d["ref"] if spec.kl else None}
    run = jax.jit(lambda new: policy_loss(new, d["old"], given, d["mask"], spec=spec, **more)[0])
    value, gradient = jax.value_and_grad(run)(d["new"])
    expected = [gold[f"loss/{case}/{batch}/{name}"] for name in ("value", "gradient")]
    if np.isnan(expected[0]):  # verl's 0 / 0 where everything is rejected: here nothing is learned from it
        assert "reject" in case
        assert value == 0
        assert not gradient.any()
        return
    # verl adds 1e-8 to numbers of tokens
    np.testing.assert_allclose(value, expected[0], rtol=1e-7)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-6, atol=1e-7 * np.abs(expected[1]).max())
    assert not np.asarray(gradient)[~np.asarray(d["mask"])].any()


def test_every_framework_preset_was_compared():
    named = {case for case, _ in CASES}
    missing = [name for name in PRESETS if name.split(".")[0] in ("verl", "trl", "slime") and name not in named]
    assert not missing, missing


@pytest.mark.parametrize("batch", ["mild", "extreme"])
@pytest.mark.parametrize(
    "name", ["grpo", "dr_grpo", "rloo", "opo", "gpg", "reinforce_plus_plus_baseline", "reinforce_plus_plus", "remax",
             "gae", "optimal_token_baseline", "pass_at_k", "gdpo"]
)  # fmt: skip
def test_advantages_are_verl_s(gold, name, batch):
    d = inputs(gold, batch)
    rewards, group, mask = d["rewards"], d["group"], d["mask"]
    options: dict[str, Any] = {}
    if name == "reinforce_plus_plus":
        options = {"gamma": 0.97}
    elif name in ("remax", "gae", "optimal_token_baseline"):
        rewards = d["token_rewards"]
        options = {
            "remax": {"greedy": d["greedy"]},
            "gae": {"values": d["values"], "gamma": 0.97, "lam": 0.9},
            "optimal_token_baseline": {"logp": d["old"], "squares": d["squares"]},
        }[name]
    elif name == "pass_at_k":  # which refuses groups of one
        several = np.flatnonzero(np.asarray(group) != 7)
        rewards, group, mask = rewards[several], group[several], mask[several]
    elif name == "gdpo":
        rewards, options = d["components"], {"weights": [0.7, 1.3]}
    found = advantages(name, rewards, group, mask, **options)
    expected = gold[f"advantages/{name}/{batch}"]
    # verl's whitened values are not masked again after GAE
    np.testing.assert_allclose(found, np.where(mask, expected, 0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("batch", ["mild", "extreme"])
def test_returns_and_the_critic_are_verl_s(gold, batch):
    d = inputs(gold, batch)
    _, returns = gae(d["token_rewards"], d["values"], d["mask"], gamma=0.97, lam=0.9)
    np.testing.assert_allclose(returns, gold[f"advantages/gae returns/{batch}"], rtol=1e-9)
    each = value_loss(d["values"], d["old_values"], d["token_rewards"])
    np.testing.assert_allclose(aggregate(each, d["mask"]), gold[f"value_loss/{batch}"], rtol=1e-9)


@pytest.mark.parametrize("batch", ["mild", "extreme"])
@pytest.mark.parametrize("name", ["trl.grpo", "trl.dr_grpo", "trl.batch", "trl.normalize_then_sum"])
def test_advantages_are_trl_s_with_samples_that_have_no_score(gold, name, batch):
    parts = np.array(gold[f"input/{batch}/components"][:8])
    parts[2, 0] = parts[5] = np.nan
    total = np.where(np.isnan(parts).all(1), np.nan, np.nansum(parts * [0.7, 1.3], 1))
    group, mask = jnp.repeat(jnp.arange(2), 4), jnp.ones((8, 3), bool)
    if name.endswith("sum"):
        found = advantages(name, jnp.asarray(parts), group, mask, weights=[0.7, 1.3])
    else:
        found = advantages(name, jnp.asarray(total), group, mask)
    np.testing.assert_allclose(found, np.repeat(gold[f"advantages/{name}/{batch}"][:, None], 3, 1), rtol=1e-6)
    assert not found[5].any()


def test_advantages_of_steps_are_the_plain_sum():
    rng = np.random.default_rng(0)
    mask = np.arange(8) < np.array([8, 5, 7])[:, None]
    steps = np.zeros((3, 8), bool)
    for row, ends in enumerate(([2, 5, 7], [4], [1, 6])):
        steps[row, ends] = True
    rewards = np.where(steps, rng.standard_normal((3, 8)), 0)
    found = advantages("process", jnp.asarray(rewards), jnp.zeros(3, int), jnp.asarray(mask), steps=jnp.asarray(steps))
    pool = rewards[steps]
    z = (rewards - pool.mean()) / (pool.std(ddof=1) + 1e-6)
    for i, t in itertools.product(range(3), range(8)):
        expected = sum(z[i, k] for k in range(t, 8) if steps[i, k]) if mask[i, t] else 0.0
        assert found[i, t] == pytest.approx(expected, abs=1e-12)


# ---- what holds of any of them
def some(seed: int = 0, b: int = 6, t: int = 9) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((b, t))
    mask = np.arange(t) < rng.integers(1, t + 1, b)[:, None]
    return {
        "new": jnp.asarray(-np.logaddexp(0, logits)), "advantages": jnp.asarray(rng.standard_normal(b)),
        "mask": jnp.asarray(mask),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_at_the_old_policy_every_gradient_is_reinforce_s(name):
    d, spec = some(), PRESETS[name]
    if name == "verl.kl_cov":
        spec = change(spec, surrogate=KLCov(coefficient=0.0))

    def gradient(spec):
        return jax.grad(lambda new: policy_loss(new, None, d["advantages"], d["mask"], spec=spec)[0])(d["new"])

    plain = gradient(PolicySpec(PRESETS["reinforce"].surrogate, aggregate=spec.aggregate))
    np.testing.assert_allclose(gradient(spec), plain, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_what_is_masked_does_not_matter_and_nan_stays_out(name):
    d, spec = some(1), PRESETS[name]
    old = d["new"] + 0.1 * jnp.asarray(np.random.default_rng(2).standard_normal(d["new"].shape))
    spec = change(spec, correction=TIS, kl=TRL_KL)

    def run(new, old):
        more = {"rollout_logp": old, "ref_logp": old}
        return policy_loss(new, old, d["advantages"], d["mask"], spec=spec, **more)[0]

    clean = jax.value_and_grad(run)(d["new"], old)
    holes = [jnp.where(d["mask"], x, jnp.nan) for x in (d["new"], old)]
    poisoned = jax.value_and_grad(run)(*holes)
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)
    assert not np.asarray(clean[1])[~np.asarray(d["mask"])].any()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_losses_add_up_over_micro_batches(name):
    """Totals and weights of two halves are those of the whole, for whatever is defined by samples."""
    d, spec = some(3), PRESETS[name]
    if isinstance(spec.surrogate, KLCov):
        pytest.skip("KL-Cov ranks the tokens of a batch: it is defined by it")
    old = d["new"] + 0.3 * jnp.asarray(np.random.default_rng(4).standard_normal(d["new"].shape))
    whole, _ = policy_objective(d["new"], old, d["advantages"], d["mask"], spec=spec)
    halves = [
        policy_objective(d["new"][s], old[s], d["advantages"][s], d["mask"][s], spec=spec)[0]
        for s in (slice(0, 2), slice(2, None))
    ]
    both = jax.tree.map(lambda *x: sum(x), *halves)["policy"]
    weight = whole["policy"].weight if spec.aggregate.mode == "token_sum" else both.weight
    np.testing.assert_allclose(both.total / weight, whole["policy"].value(), rtol=1e-12)


def test_a_batch_over_devices_is_one_batch():
    d = some(5, b=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for mode in ("token_mean", "token_sum", "sequence_mean_token_mean", "sequence_mean_token_sum"):
        how = Aggregate(mode, count_empty=True)
        spread = jax.shard_map(
            lambda x, m, how=how: aggregate(x, m, how, axis_name="data"), mesh=mesh,
            in_specs=jax.sharding.PartitionSpec("data"), out_specs=jax.sharding.PartitionSpec(),
        )  # fmt: skip
        np.testing.assert_allclose(spread(d["new"], d["mask"]), aggregate(d["new"], d["mask"], how), rtol=1e-12)


def test_the_two_forms_of_gspo_agree_where_advantages_are_of_samples():
    d = some(6)
    old = d["new"] + 0.1 * jnp.asarray(np.random.default_rng(7).standard_normal(d["new"].shape))
    how = Aggregate("sequence_mean_token_mean")
    runs = []
    for level in ("sequence", "sequence_token"):
        spec = PolicySpec(Clip(0.02, 0.02), Ratio(level), how)
        runs.append(
            jax.value_and_grad(lambda new, s=spec: policy_loss(new, old, d["advantages"], d["mask"], spec=s)[0])(
                d["new"]
            )
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *runs)


def enumerated(seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(7)), jax.nn.log_softmax(jnp.asarray(rng.standard_normal(7)))


def test_estimators_of_kl_by_enumeration_of_a_vocabulary():
    """Over all tokens of a small vocabulary: k1 and k3 have the KL as their mean, k2 (and `straight_through`) its
    gradient, k1 none, and k3 weighted by the ratio the right one.
    """
    theta, ref = enumerated(0)
    p = jax.nn.softmax(theta)

    def kl(theta):
        logp = jax.nn.log_softmax(theta)
        return (jnp.exp(logp) * (logp - ref)).sum()

    def sampled(estimator, **options):
        """Mean over draws from the policy as it is, differentiated through the loss alone."""
        return lambda theta: (p * kl_estimate(jax.nn.log_softmax(theta), ref, estimator, **options)).sum()

    exact, slope = jax.value_and_grad(kl)(theta)
    for estimator in ("k1", "k3"):
        assert sampled(estimator)(theta) == pytest.approx(float(exact), rel=1e-12)
        straight = jax.value_and_grad(sampled(estimator, straight_through=True))(theta)
        assert straight[0] == pytest.approx(float(exact), rel=1e-12)
        np.testing.assert_allclose(straight[1], slope, rtol=1e-9)
    np.testing.assert_allclose(jax.grad(sampled("k2"))(theta), slope, rtol=1e-9)
    np.testing.assert_allclose(jax.grad(sampled("k1"))(theta), 0, atol=1e-12)
    assert not np.allclose(jax.grad(sampled("k3"))(theta), slope, rtol=0.05)

    def weighted(theta):
        logp = jax.nn.log_softmax(theta)
        return (p * kl_estimate(logp, ref, "k3") * jnp.exp(logp - jnp.log(p))).sum()

    np.testing.assert_allclose(jax.grad(weighted)(theta), slope, rtol=1e-9)
    x = jnp.linspace(-30, 30, 101)
    assert (kl_estimate(x, jnp.zeros_like(x), "k3") >= 0).all()


def test_bounds_hold_where_they_should():
    """One token each: what is clipped has no gradient, on the side where leaving would pay and only there."""
    mask = jnp.ones((1, 1), bool)

    def slope(log_ratio, advantage, surrogate):
        spec = PolicySpec(surrogate, Ratio())
        f = lambda new: policy_loss(new, jnp.zeros((1, 1)), jnp.full((1, 1), advantage), mask, spec=spec)[0]  # noqa: E731
        return float(jax.grad(f)(jnp.full((1, 1), log_ratio))[0, 0])

    for shift, advantage, free in ((0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False)):
        assert (slope(shift, advantage, Clip()) != 0) == free
    assert slope(1.5, -1.0, Clip(dual=3.0)) == 0
    assert slope(0.9, -1.0, Clip(dual=3.0)) > 0
    assert slope(3.0, 2.0, Cispo(None, 5.0)) == pytest.approx(-10.0), "no token is silenced"
    assert slope(0.0, 1.0, Vespo()) == pytest.approx(-1.0)


def test_metrics_say_what_happened():
    d = some(8)
    old = d["new"] - 1.0
    spec = PolicySpec(Clip(), correction=TIS, rejection=(Rejection("token", "k3", 0.1),))
    _, seen = policy_loss(d["new"], old, jnp.abs(d["advantages"]), d["mask"], spec=spec, rollout_logp=old - 1.0)
    assert seen["rejected"] == 1
    assert seen["correction"] == 2
    assert seen["clipped"] == 0
    assert seen["mismatch_k3"] == pytest.approx(np.exp(1.0) - 2, rel=1e-5), "of log(rollout / old) = -1"
    _, seen = policy_loss(d["new"], old, jnp.abs(d["advantages"]), d["mask"])
    assert seen["clipped"] == 1
    assert seen["approx_kl"] == pytest.approx(-1.0)


def test_bad_input_is_named():
    d = some()
    with pytest.raises(ObjectiveError, match=r"did you mean 'verl.grpo'"):
        preset("verl.grpp")
    with pytest.raises(ObjectiveError, match="needs ref_logp"):
        policy_loss(d["new"], None, d["advantages"], d["mask"], spec=PolicySpec(kl=KL(0.1)))
    with pytest.raises(ObjectiveError, match="needs rollout_logp"):
        policy_loss(d["new"], None, d["advantages"], d["mask"], spec=PolicySpec(correction=TIS))
    with pytest.raises(ObjectiveError, match="mode 'mean'"):
        Aggregate("mean")
    with pytest.raises(ObjectiveError, match="needs a bound"):
        Correction(high=None)
    with pytest.raises(ObjectiveError, match="k1 has a sign"):
        Rejection("token", "k1", 1.0)
    with pytest.raises(ObjectiveError, match="did you mean 'rloo'"):
        advantages("rlo", d["advantages"], jnp.zeros(6, int), d["mask"])
    with pytest.raises(ObjectiveError, match="pass group"):
        advantages("rloo", d["advantages"], None, d["mask"])
    assert set(ESTIMATORS) >= {"grpo", "trl.grpo", "verl.grpo"}
