"""Routers that use some of their K slots: top-p, thresholds, null experts, MoE++."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe import dynamic, routing, training
from moe.models import hf
from moe.models.decode import EngineConfig, generate
from moe.models.sampling import Sampling
from moe.models.transformer import apply, map_mixtures, mixtures_of
from moe.objectives import LossConfig, balance_by_bias, language_model_loss
from moe.routing import RoutingConfig, RoutingError, route
from moe.zeda import ZedaError, zero_ratio
from tests.moe.test_zeda import KEY, TOKENS, K, N, Z, batch_of, how_of, run, static_model

CUTS = {"top_p": dynamic.top_p, "threshold": dynamic.thresholds}


def added(name, p, cfg, target=0.5):
    if name in CUTS:
        return CUTS[name](p, cfg, target_zero_ratio=target)
    make = {"null": dynamic.null_experts, "moe++": dynamic.moe_plus_plus}[name]
    return make(p, cfg, zero_experts=Z, target_zero_ratio=target, key=KEY)


# ---- one router
def by_hand(z, cut, how, threshold=None):
    """Loops over tokens and slots, in numpy: (index, weights)."""
    index, weights = np.full((len(z), how.top_k), how.slots), np.zeros((len(z), how.top_k))
    for t, row in enumerate(np.asarray(z, np.float64)):
        p = np.exp(row - row.max())
        p /= p.sum()
        best = np.argsort(-p)[: how.top_k]
        total, used = 0.0, []
        for rank, slot in enumerate(best):
            wanted = total < cut if threshold is None else p[slot] > threshold[slot] + cut
            if rank == 0 or wanted:
                used.append(rank)
            total += p[slot]
        for rank in used:
            index[t, rank] = best[rank]
            weights[t, rank] = p[best[rank]] / p[best[used]].sum()
    return index, weights


@pytest.mark.parametrize("kind", sorted(CUTS))
def test_used_slots_are_those_of_a_loop(kind):
    how = RoutingConfig(N, K, dynamic=kind)
    z = 2 * jax.random.normal(jax.random.key(0), (60, N))
    threshold = jnp.linspace(-0.1, 0.2, N) if kind == "threshold" else None
    cut = 0.85 if kind == "top_p" else 0.05
    index, weights = by_hand(z, cut, how, None if threshold is None else np.asarray(threshold, np.float64))
    got = route(z, how, cut=jnp.float32(cut), threshold=threshold)
    np.testing.assert_array_equal(got.index, index)
    np.testing.assert_allclose(got.weights, weights, atol=1e-6)
    assert len(set((index < N).sum(1))) == K, "every number of experts occurs"
    again = route(z, how, cut=jnp.float32(cut), threshold=threshold, replay=got.index)
    np.testing.assert_array_equal(again.index, got.index)
    np.testing.assert_allclose(again.weights, got.weights, atol=1e-7)
    np.testing.assert_allclose(
        routing.statistics(got, how)["free_fraction"].value(), zero_ratio(got.index, N), rtol=1e-6
    )


def test_thresholds_learn_from_the_slots_that_are_used():
    """Straight through: the gradient of a gate, 1 in the forward, is that of its margin."""
    how = RoutingConfig(N, K, dynamic="threshold")
    z = 2 * jax.random.normal(jax.random.key(0), (7, N))
    value = jax.random.normal(jax.random.key(1), (7, K))

    def total(threshold):
        return (value * route(z, how, cut=jnp.float32(0.1), threshold=threshold).weights).sum()

    got = route(z, how, cut=jnp.float32(0.1), threshold=jnp.zeros(N))
    wanted = np.zeros(N)
    for index, gain in zip(np.asarray(got.index).ravel(), np.asarray(value * got.weights).ravel(), strict=True):
        if index < N:
            wanted[index] -= gain
    np.testing.assert_allclose(jax.grad(total)(jnp.zeros(N)), wanted, atol=1e-6)


def test_redistributed_weight_is_that_of_the_other_slots():
    how = RoutingConfig(N, K, free=(("zero", Z),))
    z = jax.random.normal(jax.random.key(0), (60, N + Z))
    kept, given = route(z, how), route(z, dataclasses.replace(how, redistribute=True))
    np.testing.assert_array_equal(kept.index, given.index)
    expert = np.asarray(kept.index) < N
    alone = np.where(expert, kept.weights, 0)
    total = alone.sum(-1, keepdims=True)
    np.testing.assert_allclose(given.weights, np.where(total > 0, alone / np.where(total > 0, total, 1), 0), atol=1e-6)
    assert (given.weights >= kept.weights * expert - 1e-7).all()


def test_mixed_slots_are_the_paper_s_constant_experts():
    """a_1 x + a_2 v, a = softmax(W x), token by token in numpy."""
    how = RoutingConfig(2, 3, free=(("zero", 1), ("copy", 1), ("constant", 1), ("mixed", 2)))
    rng = np.random.default_rng(0)
    x, constants, mixers = rng.normal(size=(20, 6)), rng.normal(size=(3, 6)), rng.normal(size=(2, 2, 6))
    routed = route(jnp.asarray(rng.normal(size=(20, 7)), jnp.float32), how)
    got = routing.free_output(
        routed, *(jnp.asarray(a, jnp.float32) for a in (x,)), how, jnp.asarray(constants, jnp.float32),
        jnp.asarray(mixers, jnp.float32),
    )  # fmt: skip
    wanted = np.zeros((20, 6))
    for t in range(20):
        for slot, weight in zip(np.asarray(routed.index)[t], np.asarray(routed.weights)[t], strict=True):
            if slot == 3:
                wanted[t] += weight * x[t]
            elif slot == 4:
                wanted[t] += weight * constants[0]
            elif slot > 4:
                a = np.exp(mixers[slot - 5] @ x[t])
                a /= a.sum()
                wanted[t] += weight * (a[0] * x[t] + a[1] * constants[slot - 4])
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    with pytest.raises(RoutingError, match=r"constants \[3, D\] and mixers \[2, 2, D\]"):
        routing.free_output(routed, jnp.zeros((20, 6)), how, jnp.zeros((3, 6)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dynamic="top_k"), "dynamic 'top_k' is not one of"),
        (dict(dynamic="top_p", straight_through=True), "no straight_through"),
        (dict(redistribute=True, renormalise=False), "set renormalise"),
        (dict(gating_residual=True, selection="group_limited", n_group=2, topk_group=1), "gating_residual needs"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(RoutingError, match=message):
        RoutingConfig(N, K, **options)


# ---- whole models
@pytest.mark.parametrize("name", ["top_p", "threshold"])
def test_nothing_changes_before_the_cut_moves(name):
    p, cfg = static_model()
    student, scfg = added(name, p, cfg)
    wanted, got = run(p, TOKENS, cfg=cfg), run(student, TOKENS, cfg=scfg)
    np.testing.assert_allclose(got.hidden, wanted.hidden, atol=1e-6)
    np.testing.assert_array_equal(got.routing, wanted.routing)


@pytest.mark.parametrize("name", ["top_p", "threshold"])
def test_calibration_leaves_out_the_wanted_share_of_every_layer(name):
    p, cfg = static_model()
    student, scfg = added(name, p, cfg, target=0.4)
    batches = [batch_of(i) for i in range(2)]
    student = dynamic.calibrate(student, scfg, batches)
    index = run(student, jnp.concatenate([b["tokens"] for b in batches]), cfg=scfg).routing
    np.testing.assert_allclose(zero_ratio(index.reshape(2, -1, K), N), 0.4, atol=0.01)
    assert len(dynamic.cuts(student)) == 2


@pytest.mark.parametrize("name", ["top_p", pytest.param("threshold", marks=pytest.mark.slow)])
def test_in_training_the_cut_follows_the_share(name):
    p, cfg = static_model()
    student, scfg = added(name, p, cfg, target=0.5)
    optimizer = balance_by_bias(optax.adam(1e-3), cut_rate=0.1 if name == "top_p" else 0.02)
    step = training.make_train_step(
        lambda p, b, rng: language_model_loss(p, b, cfg=scfg, loss=LossConfig(switch=0.0, router_z=0.0)), optimizer,
        accumulate=2, clip_norm=1.0,
    )  # fmt: skip
    state = training.init_state(jax.tree.map(jnp.copy, student), optimizer, jax.random.key(2))
    for i in range(120):
        state, metrics = step(state, batch_of(i))
    np.testing.assert_allclose([float(metrics[f"free_fraction/{layer}"]) for layer in range(2)], 0.5, atol=0.03)
    moved = [float(jnp.abs(m.router_threshold).max()) for m in mixtures_of(state.params) if name == "threshold"]
    assert all(m > 0 for m in moved)


def test_the_gating_residual_is_the_logits_below():
    p, cfg = static_model()
    student, scfg = added("moe++", p, cfg)
    hidden = {"none": run(student, TOKENS, cfg=scfg).hidden}
    seen = jax.jit(lambda s: apply(s, TOKENS, cfg=scfg, observe=lambda r, c: r.logits).observed)
    before = seen(student)
    matrix = 0.1 * jax.random.normal(jax.random.key(4), (2, N + Z, N + Z))
    changed = map_mixtures(student, lambda m, first: dataclasses.replace(m, router_residual=matrix))
    after = seen(changed)
    np.testing.assert_allclose(after[0], before[0], atol=1e-5)  # there is no mixture below the first
    cut = map_mixtures(student, lambda m, first: dataclasses.replace(m, router_residual=matrix.at[1].set(0)))
    np.testing.assert_allclose(after[1] - seen(cut)[1], before[0] @ matrix[1], atol=1e-4)
    assert float(jnp.abs(run(changed, TOKENS, cfg=scfg).hidden - hidden["none"]).max()) > 1e-4


@pytest.mark.parametrize("name", ["top_p", pytest.param("null", marks=pytest.mark.slow), "moe++"])
def test_decoding_equals_the_forward(name):
    """Cached, one token at a time, with the routing record."""
    p, cfg = static_model()
    student, scfg = added(name, p, cfg)
    if name == "top_p":
        student = dynamic.calibrate(student, scfg, [batch_of(0)])
    size = EngineConfig(sequences=2, length=32, record_routing=True)
    prompts = [[3, 4, 5], [6, 7, 8, 9]]
    done = generate(student, scfg, prompts, Sampling(max_tokens=6, ignore_eos=True), config=size)
    for one in done:
        ids = jnp.asarray(np.concatenate([one.prompt, one.tokens]))[None]
        whole = run(student, ids[:, :-1], cfg=scfg)
        np.testing.assert_array_equal(one.routing, whole.routing[:, 0])


# ---- objectives
def test_the_switch_loss_knows_the_wanted_share():
    """At the wanted shares it equals its coefficient a layer; AdaMoE's pooled form is its own formula."""
    how = RoutingConfig(N, K, free=(("zero", Z),), free_share=0.4)
    z = jax.random.normal(jax.random.key(3), (50, N + Z))
    r = route(z, how)
    f = np.bincount(np.asarray(r.index).ravel(), minlength=N + Z) / (50 * K)
    p = np.asarray(jax.nn.softmax(z, -1).mean(0), np.float64)
    shares = np.concatenate([np.full(N, 0.6 / N), np.full(Z, 0.4 / Z)])
    from moe.objectives import _switch

    np.testing.assert_allclose(_switch(r, how, LossConfig(switch=0.1)).value(), 0.1 * (f * p / shares).sum(), rtol=1e-5)
    pooled = np.concatenate([f[:N], np.full(Z, f[N:].mean())])  # AdaMoE: loads of null experts averaged
    got = _switch(r, how, LossConfig(switch=0.1, pool_free=True)).value()
    np.testing.assert_allclose(got, 0.1 * (pooled * p / shares).sum(), rtol=1e-5)


def test_bad_models():
    p, cfg = static_model()
    student, scfg = added("top_p", p, cfg)
    with pytest.raises(ZedaError, match="start from a static top_k"):
        added("threshold", student, scfg)
    with pytest.raises(ZedaError, match=r"target_zero_ratio 0\.9 must lie between 0 and 0\.750"):
        added("top_p", p, cfg, target=0.9)
    with pytest.raises(ZedaError, match="no router with a cut"):
        dynamic.calibrate(p, cfg, [batch_of(0)])
    with pytest.raises(ZedaError, match="zero_experts 2 must be at least 3"):
        dynamic.moe_plus_plus(p, cfg, zero_experts=2, key=KEY)
    for name in ("top_p", "null", "moe++"):
        with pytest.raises(hf.HFError, match="has no place for"):
            hf.config_to_hf(added(name, p, cfg)[1])
    assert how_of(scfg).dynamic == "top_p"
