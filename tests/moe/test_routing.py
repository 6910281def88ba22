"""Routing against plain numpy loops, finite differences, closed forms and the published rules."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe import routing as R
from moe.routing import RoutingConfig, RoutingError

# Compiled: op by op every test would compile dozens of small programs.
route = jax.jit(R.route, static_argnames="cfg")
switch_loss = jax.jit(R.switch_loss, static_argnames=("cfg", "coefficient"))
group_loss = jax.jit(R.group_loss, static_argnames=("cfg", "sizes", "shares", "coefficient", "with_bias"))
z_loss = jax.jit(R.z_loss, static_argnames="coefficient")
free_output = jax.jit(R.free_output, static_argnames="cfg")

E, T = 16, 24

CONFIGS = {
    "qwen3": RoutingConfig(E, 4),
    "mixtral_top1": RoutingConfig(E, 1),
    "raw": RoutingConfig(E, 4, renormalise=False, scaling=6.0),
    "chosen": RoutingConfig(E, 4, softmax_over="chosen", renormalise=False),
    "chosen_bias": RoutingConfig(E, 4, softmax_over="chosen", selection_bias=True),
    "sigmoid": RoutingConfig(E, 4, scoring="sigmoid", scaling=1.8),
    "sigmoid_raw": RoutingConfig(E, 4, scoring="sigmoid", renormalise=False),
    "glm": RoutingConfig(E, 4, scoring="sigmoid", selection_bias=True, scaling=1.8),
    "deepseek2": RoutingConfig(
        E, 4, renormalise=False, selection="group_limited", n_group=4, topk_group=2, group_score="max", scaling=16.0
    ),
    "deepseek3": RoutingConfig(
        E, 4, scoring="sigmoid", selection_bias=True, selection="group_limited", n_group=4, topk_group=2, scaling=2.5
    ),
    "interns1": RoutingConfig(E, 4, selection="per_group", n_group=4),
    "interns1_two": RoutingConfig(E, 4, selection="per_group", n_group=2),
    "interns1_noaux": RoutingConfig(E, 4, scoring="sigmoid", selection_bias=True, selection="per_group", n_group=4),
    "longcat": RoutingConfig(E, 4, renormalise=False, selection_bias=True, free=(("copy", 8),), scaling=6.0),
    "zeda": RoutingConfig(E, 4, free=(("zero", 8),)),
    "everything_chosen": RoutingConfig(4, 6, free=(("zero", 1), ("constant", 1))),
}
STRAIGHT = {
    name: dataclasses.replace(cfg, straight_through=True) for name, cfg in CONFIGS.items() if cfg.scoring == "softmax"
}


def grad_of(function):
    return jax.jit(jax.grad(function))


every_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)


def draw(cfg, seed=0, tokens=T, scale=2.0):
    """Logits [tokens, E + Z] and a bias that matters."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (tokens, cfg.slots)).astype(np.float32)
    return logits, (rng.normal(0, 0.3, cfg.slots).astype(np.float32) if cfg.selection_bias else None)


def routed(cfg, logits, bias=None, **more):
    return route(jnp.asarray(logits), cfg, bias=None if bias is None else jnp.asarray(bias), **more)


def by_hand(logits, cfg, bias=None):
    """The routers as the papers write them: one token, one slot at a time, float64. (index, weights, scores)."""
    all_index, all_weights, all_scores = [], [], []
    for row in np.asarray(logits, np.float64):
        if cfg.scoring == "softmax":
            exps = [math.exp(z - max(row)) for z in row]
            scores = [e / sum(exps) for e in exps]
        else:
            scores = [1 / (1 + math.exp(-z)) for z in row]
        ranked_by = list(row) if cfg.softmax_over == "chosen" else list(scores)
        if bias is not None:
            ranked_by = [a + float(b) for a, b in zip(ranked_by, bias, strict=True)]

        def best(candidates, k, key=tuple(ranked_by)):
            return sorted(candidates, key=lambda slot: (-key[slot], slot))[:k]

        size = cfg.experts // cfg.n_group
        groups = [range(g * size, (g + 1) * size) for g in range(cfg.n_group)]
        if cfg.selection == "per_group":
            chosen = [i for group in groups for i in best(group, cfg.top_k // cfg.n_group)]
        elif cfg.selection == "group_limited":
            worth = []
            for group in groups:
                values = sorted((ranked_by[i] for i in group), reverse=True)
                worth.append(values[0] if cfg.group_score == "max" else values[0] + values[1])
            kept = sorted(range(cfg.n_group), key=lambda g: -worth[g])[: cfg.topk_group]
            chosen = best([i for g in kept for i in groups[g]], cfg.top_k)
        else:
            chosen = best(range(cfg.slots), cfg.top_k)
        if cfg.softmax_over == "chosen":
            parts = [math.exp(row[i] - max(row[j] for j in chosen)) for i in chosen]
            weights = [part / sum(parts) for part in parts]
        else:
            weights = [scores[i] for i in chosen]
            if cfg.renormalise:
                weights = [w / (sum(weights) + 1e-20) for w in weights]
        all_index.append(chosen)
        all_weights.append([w * cfg.scaling for w in weights])
        all_scores.append(scores)
    return np.array(all_index), np.array(all_weights), np.array(all_scores)


@every_config
def test_equals_the_loop(cfg):
    logits, bias = draw(cfg)
    got = jax.jit(lambda z: routed(cfg, z, bias))(logits)
    index, weights, scores = by_hand(logits, cfg, bias)
    np.testing.assert_array_equal(got.index, index)
    np.testing.assert_allclose(got.weights, weights, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(got.scores, scores, rtol=2e-5, atol=1e-7)
    assert got.index.dtype == jnp.int32
    assert got.weights.dtype == got.scores.dtype == got.logits.dtype == jnp.float32
    R.check(jnp.asarray(logits), cfg, bias=None if bias is None else jnp.asarray(bias), replay=got.index)


def test_orders_of_softmax_and_top_k_agree_once_renormalised():
    """ZEDA section 2.1: softmax over the K selected logits = norm_topk_prob. Without renormalising they differ."""
    logits, _ = draw(CONFIGS["qwen3"], 3)
    first, then = routed(CONFIGS["qwen3"], logits), routed(CONFIGS["chosen"], logits)
    np.testing.assert_array_equal(first.index, then.index)
    np.testing.assert_allclose(first.weights, then.weights, rtol=1e-6)
    assert np.all(routed(dataclasses.replace(CONFIGS["raw"], scaling=1.0), logits).weights.sum(-1) < 0.999)


def test_group_scores_disagree_where_they_should():
    """Group 0 has the best expert, group 1 the best pair."""
    logits = jnp.array([[3.0, -9.0, 2.9, 2.9]])
    for score, wanted in (("max", [[0, 1]]), ("top2", [[2, 3]])):
        cfg = RoutingConfig(
            4, 2, scoring="sigmoid", selection="group_limited", n_group=2, topk_group=1, group_score=score
        )
        np.testing.assert_array_equal(route(logits, cfg).index, wanted)


def test_masked_groups_stay_masked_when_every_biased_score_is_negative():
    """transformers fills masked groups with 0, which beats negative scores; DeepSeek's own code fills with -inf."""
    cfg = CONFIGS["deepseek3"]
    logits, _ = draw(cfg)
    got = routed(cfg, logits, np.full(E, -3.0, np.float32))
    groups = np.sort(np.asarray(got.index) // 4, -1)
    assert all(len(set(row)) <= 2 for row in groups.tolist())


@pytest.mark.parametrize("skew", [0.0, 50.0])
def test_per_group_balances_groups_absolutely(skew):
    """Intern-S1-Pro section 2.2: every group of experts gets exactly T tokens, whatever the logits."""
    cfg = CONFIGS["interns1"]
    logits, _ = draw(cfg, 5)
    logits[:, 3] += skew
    load = np.asarray(R.counts(routed(cfg, logits))).reshape(4, 4).sum(-1)
    np.testing.assert_array_equal(load, T)


@pytest.mark.parametrize("name", ["deepseek2", "deepseek3", "interns1_two", "longcat"])
def test_vmap_and_leading_axes_are_the_flat_call(name):
    cfg = CONFIGS[name]
    logits, bias = draw(cfg)
    flat = routed(cfg, logits, bias)
    shaped = routed(cfg, logits.reshape(2, 3, 4, -1), bias)
    mapped = jax.vmap(lambda z: routed(cfg, z, bias))(logits.reshape(6, 4, -1))
    for other in (shaped, mapped):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.reshape(a.shape), rtol=1e-6), flat, other)


def test_low_precision_logits_are_routed_in_float32():
    cfg = CONFIGS["glm"]
    logits, bias = draw(cfg)
    half = jnp.asarray(logits, jnp.bfloat16)
    got = routed(cfg, half, bias)
    index, weights, _ = by_hand(np.asarray(half.astype(jnp.float32)), cfg, bias)
    np.testing.assert_array_equal(got.index, index)
    np.testing.assert_allclose(got.weights, weights, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Anything goes in


SHAPES = [(1, 0, 1, 1), (3, 0, 3, 2), (9, 0, 2, 1), (5, 4, 6, 3), (2, 2, 4, 1)]  # experts, free, k, tokens
MODES = [("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False)]


@functools.cache
def routed_with_gradient(shape, mode):
    """(cfg, compiled logits -> (routing, gradient of some function of the weights))."""
    (experts, free, k, _), (scoring, renormalise) = shape, mode
    free = (("zero", free),) if free else ()
    cfg = RoutingConfig(experts, k, scoring=scoring, renormalise=renormalise, free=free, scaling=2.0)

    def call(z):
        return route(z, cfg), jax.grad(lambda z: (route(z, cfg).weights * jnp.arange(1.0, k + 1)).sum())(z)

    return cfg, jax.jit(call)


@st.composite
def cases(draw):
    """(shape, mode, logits): one token, k up to all slots; ties, equal and very large logits."""
    shape = draw(st.sampled_from(SHAPES))
    values = (
        st.sampled_from([0.0, 1.0]),
        st.floats(-(2.0**127), 2.0**127, width=32),
        st.floats(-20, 20, width=32),
        st.sampled_from([-1e30, -200.0, -100.0, 88.0, 100.0, 1e4]),
    )
    number = shape[3] * (shape[0] + shape[1])
    logits = draw(st.one_of([st.lists(value, min_size=number, max_size=number) for value in values]))
    return shape, draw(st.sampled_from(MODES)), logits


@settings(max_examples=120)
@given(cases())
@example(((1, 0, 1, 1), ("sigmoid", True), [-1e30]))
@example(((3, 0, 3, 2), ("softmax", True), [0.0] * 6))
@example(((2, 2, 4, 1), ("sigmoid", True), [-200.0, -1e30, -3e38, -150.0]))
def test_any_finite_logits(case):
    shape, mode, values = case
    cfg, call = routed_with_gradient(shape, mode)
    k, renormalise = cfg.top_k, cfg.renormalise
    logits = jnp.asarray(np.array(values, np.float32).reshape(-1, cfg.slots))
    got, grad = call(logits)
    index, weights, scores = (np.asarray(x) for x in (got.index, got.weights, got.scores))
    assert index.shape == (len(logits), k)
    assert ((index >= 0) & (index < cfg.slots)).all()
    assert all(len(set(row)) == k for row in index.tolist())
    for row, chosen in zip(scores, index, strict=True):
        rest = np.delete(row, chosen)
        assert not len(rest) or row[chosen].min() >= rest.max()
        for a, b in itertools.pairwise(chosen):
            assert row[a] > row[b] or (row[a] == row[b] and a < b), "of equals the lower index first"
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    if renormalise:
        np.testing.assert_allclose(weights.sum(-1), 2.0, rtol=1e-5)
    else:
        np.testing.assert_array_equal(weights, 2 * np.take_along_axis(scores, index, -1))
    assert np.isfinite(grad).all()
    R.check(logits, cfg)


@pytest.mark.parametrize(
    "cfg", [CONFIGS[n] for n in ("qwen3", "raw", "chosen", "glm", "deepseek3", "interns1", "zeda")]
)
@pytest.mark.parametrize("poison", [np.nan, -np.nan, np.inf])
def test_a_poisoned_logit_surfaces_in_its_own_token(cfg, poison):
    logits, bias = draw(cfg)
    logits[7, 2] = poison
    got = routed(cfg, logits, bias)
    bad = np.isnan(got.weights)
    assert bad[7].all()
    assert not np.delete(bad, 7, 0).any()
    assert ((np.asarray(got.index) >= 0) & (np.asarray(got.index) < cfg.slots)).all()
    bias = None if bias is None else jnp.asarray(bias)
    with pytest.raises(RoutingError, match=r"token 7, slot 2 is (nan|inf)"):
        R.check(jnp.asarray(logits), cfg, bias=bias)
    R.check(jnp.asarray(logits), cfg, bias=bias, valid=jnp.arange(T) != 7)


@pytest.mark.parametrize("name", ["zeda", "longcat"])
def test_minus_infinity_recovers_the_static_router(name):
    """ZEDA section 2.1, use_zce_mask: parameter-free slots at -inf give the routing of the original model."""
    cfg = CONFIGS[name]
    logits, bias = draw(cfg)
    if bias is not None:
        bias[E:] = 10.0
    masked = np.concatenate([logits[:, :E], np.full((T, 8), -np.inf, np.float32)], -1)
    got = routed(cfg, masked, bias)
    plain = routed(dataclasses.replace(cfg, free=()), logits[:, :E], None if bias is None else bias[:E])
    np.testing.assert_array_equal(got.index, plain.index)
    np.testing.assert_allclose(got.weights, plain.weights, rtol=1e-6)
    R.check(jnp.asarray(masked), cfg, bias=None if bias is None else jnp.asarray(bias))

    def loss(z):
        r = routed(cfg, z, bias)
        return (r.weights**2).sum() + switch_loss(r, cfg).value() + z_loss(r).value()

    assert np.isfinite(grad_of(loss)(jnp.asarray(masked))).all()


def test_fewer_slots_than_k_above_minus_infinity():
    cfg = RoutingConfig(4, 2, scoring="sigmoid", selection_bias=True)
    logits = jnp.array([[1.0, -jnp.inf, -jnp.inf, -jnp.inf]])
    bias = jnp.array([0.0, 9.0, 0.0, 0.0])
    got = route(logits, cfg, bias=bias)
    assert got.index[0, 0] == 0
    np.testing.assert_array_equal(got.weights, [[1.0, 0.0]])
    assert np.isfinite(grad_of(lambda z: (route(z, cfg, bias=bias).weights ** 2).sum())(logits)).all()
    with pytest.raises(RoutingError, match="token 0 has 1 slots above -inf, top_k is 2"):
        R.check(logits, cfg, bias=bias)


# --------------------------------------------------------------------------------------------------
# Gradients


def by_hand_weights(z, index, cfg):
    """Weights in float64 of slots held fixed."""
    z = np.asarray(z, np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True) if cfg.scoring == "softmax" else 1 / (1 + np.exp(-z))
    w = np.take_along_axis(p, index, -1)
    if cfg.renormalise or cfg.softmax_over == "chosen":
        w = w / w.sum(-1, keepdims=True)
    return w * cfg.scaling, p


def central(f, z, h=1e-6):
    """Central differences of a scalar function of a float64 array."""
    out = np.zeros_like(z)
    for i in np.ndindex(*z.shape):
        up, down = z.copy(), z.copy()
        up[i] += h
        down[i] -= h
        out[i] = (f(up) - f(down)) / (2 * h)
    return out


@every_config
@pytest.mark.parametrize("replayed", [False, True])
def test_gradient_is_the_finite_difference_with_slots_held_fixed(cfg, replayed):
    logits, bias = draw(cfg, 1, tokens=3)
    index = np.asarray(routed(cfg, logits, bias).index)
    if replayed and cfg.slots > cfg.top_k:
        index = np.stack([np.random.default_rng(i).permutation(cfg.slots)[: cfg.top_k] for i in range(3)])
    cotangent = np.random.default_rng(2).normal(size=index.shape)
    replay = jnp.asarray(index, jnp.int32) if replayed else None
    got = grad_of(lambda z: (routed(cfg, z, bias, replay=replay).weights * cotangent).sum())(jnp.asarray(logits))
    wanted = central(lambda z: (by_hand_weights(z, index, cfg)[0] * cotangent).sum(), logits.astype(np.float64))
    np.testing.assert_allclose(got, wanted, atol=3e-6 * cfg.scaling)
    if not (cfg.top_k == 1 and cfg.renormalise):  # a single renormalised weight is the constant 1
        assert np.abs(wanted).max() > 1e-3


@pytest.mark.parametrize("cfg", STRAIGHT.values(), ids=STRAIGHT)
def test_straight_through_is_sparse_forward_and_dense_backward(cfg):
    """Values bit for bit; gradient of sum_S p_i G_i, p the softmax over all slots, over the chosen mass (spec 4)."""
    logits, bias = draw(cfg, 4, tokens=3)
    plain = routed(dataclasses.replace(cfg, straight_through=False), logits, bias)
    got = routed(cfg, logits, bias)
    jax.tree.map(np.testing.assert_array_equal, plain, got)
    index = np.asarray(got.index)
    cotangent = np.random.default_rng(6).normal(size=index.shape)
    _, p = by_hand_weights(logits, index, cfg)
    mass = np.take_along_axis(p, index, -1).sum(-1, keepdims=True)
    factor = cfg.scaling / mass if cfg.renormalise or cfg.softmax_over == "chosen" else cfg.scaling

    def surrogate(z):
        return (factor * np.take_along_axis(by_hand_weights(z, index, cfg)[1], index, -1) * cotangent).sum()

    grad = np.asarray(grad_of(lambda z: (routed(cfg, z, bias).weights * cotangent).sum())(jnp.asarray(logits)))
    np.testing.assert_allclose(grad, central(surrogate, logits.astype(np.float64)), atol=3e-6 * cfg.scaling)
    unchosen = np.ones_like(logits, bool)
    np.put_along_axis(unchosen, index, False, -1)
    assert np.all(grad[unchosen] != 0)
    if cfg.renormalise and unchosen.any():
        bare = dataclasses.replace(cfg, straight_through=False)
        sparse = grad_of(lambda z: (routed(bare, z, bias).weights * cotangent).sum())(jnp.asarray(logits))
        assert not np.any(np.asarray(sparse)[unchosen]), "without it, slots not chosen learn nothing"


# --------------------------------------------------------------------------------------------------
# Replay, bias, jitter, padding


@every_config
def test_replay_repeats_the_routing_and_keeps_the_gradient(cfg):
    logits, bias = draw(cfg)
    record = routed(cfg, logits, bias)
    again = routed(cfg, logits, bias, replay=record.index)
    jax.tree.map(np.testing.assert_array_equal, record, again)
    moved, _ = draw(cfg, 99)
    forced = routed(cfg, moved, bias, replay=record.index)
    np.testing.assert_array_equal(forced.index, record.index)
    wanted, _ = by_hand_weights(moved, np.asarray(record.index), cfg)
    np.testing.assert_allclose(forced.weights, wanted, rtol=2e-5, atol=1e-7)
    if cfg.slots > cfg.top_k:
        assert not np.array_equal(routed(cfg, moved, bias).index, record.index)
    if not (cfg.top_k == 1 and cfg.renormalise):
        grad = grad_of(lambda z: (routed(cfg, z, bias, replay=record.index).weights ** 2).sum())(jnp.asarray(moved))
        assert np.abs(grad).max() > 1e-3


def test_replayed_slots_outside_the_layer():
    cfg = CONFIGS["zeda"]
    logits, _ = draw(cfg, tokens=3)
    index = np.tile(np.arange(4, dtype=np.int32), (3, 1))
    index[0, 3], index[2, 1] = cfg.slots, -1
    got = routed(cfg, logits, replay=jnp.asarray(index))
    assert np.isnan(got.weights).tolist() == [[False] * 4, [False] * 4, [True] * 4]
    assert got.weights[0, 3] == 0
    np.testing.assert_allclose(got.weights[0].sum(), 1, rtol=1e-6)
    assert R.counts(got).sum() == 10
    with pytest.raises(RoutingError, match=r"token 2 names slot -1, outside \[0, 24\]"):
        R.check(jnp.asarray(logits), cfg, replay=jnp.asarray(index))
    index[2, 1] = 0
    with pytest.raises(RoutingError, match="token 2 names slot 0 twice"):
        R.check(jnp.asarray(logits), cfg, replay=jnp.asarray(index))


@pytest.mark.parametrize("name", ["glm", "deepseek3", "longcat", "interns1_noaux", "chosen_bias"])
def test_bias_moves_the_selection_only(name):
    cfg = CONFIGS[name]
    logits, bias = draw(cfg)
    with_bias, without = routed(cfg, logits, bias), routed(cfg, logits, np.zeros_like(bias))
    assert not np.array_equal(with_bias.index, without.index)
    wanted, _ = by_hand_weights(logits, np.asarray(with_bias.index), cfg)
    np.testing.assert_allclose(with_bias.weights, wanted, rtol=2e-5)
    np.testing.assert_array_equal(with_bias.scores, without.scores)

    def loss(b):
        r = routed(cfg, logits, b)
        return (r.weights**2).sum() + switch_loss(r, cfg).value() + z_loss(r).value()

    np.testing.assert_array_equal(grad_of(loss)(jnp.asarray(bias)), 0)


def test_jitter_is_drawn_by_the_key_and_leaves_the_weights_alone():
    cfg = dataclasses.replace(CONFIGS["qwen3"], jitter=1.0)
    logits, _ = draw(cfg)
    plain = routed(CONFIGS["qwen3"], logits)
    a, b, c = (routed(cfg, logits, rng=jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.array_equal(a.index, c.index)
    assert not np.array_equal(a.index, plain.index)
    jax.tree.map(np.testing.assert_array_equal, routed(cfg, logits), plain)
    jax.tree.map(np.testing.assert_array_equal, routed(CONFIGS["qwen3"], logits, rng=jax.random.key(0)), plain)
    wanted, _ = by_hand_weights(logits, np.asarray(a.index), cfg)
    np.testing.assert_allclose(a.weights, wanted, rtol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, routed(cfg, logits, replay=a.index), a)
    lowest = np.take_along_axis(logits, np.asarray(a.index), -1).min(-1)
    assert np.all(lowest >= np.sort(logits, -1)[:, -4] - 2.0), "noise of ±1 swaps slots at most 2 apart"


@pytest.mark.parametrize("name", ["deepseek3", "interns1", "longcat"])
def test_padding_counts_nowhere(name):
    cfg = CONFIGS[name]
    logits, bias = draw(cfg)
    valid = np.random.default_rng(8).random(T) < 0.6
    poisoned = np.where(valid[:, None], logits, np.nan)

    @jax.jit
    def measure(z, **more):
        r = routed(cfg, z, bias, **more)
        means = R.statistics(r, cfg) | {
            "switch": switch_loss(r, cfg),
            "z": z_loss(r),
            "group": group_loss(r, cfg, (1, cfg.slots - 1)),
            "plain": group_loss(r, cfg, (1, cfg.slots - 1), with_bias=False),
        }
        return r, means

    padded, means = measure(poisoned, valid=jnp.asarray(valid))
    alone, wanted = measure(logits[valid])
    for part, mean in wanted.items():
        np.testing.assert_allclose(means[part].value(), mean.value(), rtol=1e-5, atol=1e-7, err_msg=part)
        assert means[part].weight == valid.sum()
    np.testing.assert_array_equal(R.counts(padded), R.counts(alone))
    np.testing.assert_array_equal(padded.index[valid], alone.index)
    np.testing.assert_array_equal(padded.weights[valid], alone.weights)
    np.testing.assert_array_equal(padded.index[~valid], cfg.slots)
    for field in (padded.weights, padded.scores, padded.logits, R.entropy(padded, cfg), R.real_experts(padded, cfg)):
        np.testing.assert_array_equal(field[~valid], 0)

    def loss(z):
        r, m = measure(z, valid=jnp.asarray(valid))
        return sum(m[part].value() for part in ("switch", "z", "group", "plain")) + (r.weights**2).sum()

    grad = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(poisoned)))
    assert np.isfinite(grad).all()
    assert not grad[~valid].any()
    nobody, means = measure(logits, valid=jnp.zeros(T, bool))
    assert all(mean.value() == 0 for mean in means.values())
    assert R.counts(nobody).sum() == 0


# --------------------------------------------------------------------------------------------------
# Parameter-free slots


@pytest.mark.parametrize("name", ["zeda", "longcat", "glm_zeda"])
def test_output_with_parameter_free_slots(name):
    """y = sum over chosen i of g_i F_i(x), F_i = A_i x for experts, 0 or x beyond; g normalised over all K (ZEDA)."""
    glm = RoutingConfig(E, 4, scoring="sigmoid", selection_bias=True, scaling=1.8, free=(("zero", 8),))
    cfg = glm if name == "glm_zeda" else CONFIGS[name]
    logits, bias = draw(cfg)
    logits[0, E : E + 4] = 20.0  # all slots of token 0 on parameter-free ones
    if bias is not None:
        bias[E : E + 4] = bias.max()
    rng = np.random.default_rng(0)
    x, experts = rng.normal(size=(T, 5)), rng.normal(size=(E, 5, 5))
    index, weights, _ = by_hand(logits, cfg, bias)
    wanted = np.zeros((T, 5))
    for t in range(T):
        for i, w in zip(index[t], weights[t], strict=True):
            wanted[t] += w * (experts[i] @ x[t] if i < E else (x[t] if name == "longcat" else 0))
    got = routed(cfg, logits, bias)
    real = np.where(np.asarray(got.index) < E, np.asarray(got.weights), 0)
    out = np.einsum("tk,tkij,tj->ti", real, experts[np.minimum(np.asarray(got.index), E - 1)], x)
    out = out + np.asarray(free_output(got, jnp.asarray(x, jnp.float32), cfg))
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)
    assert R.real_experts(got, cfg)[0] == 0
    if name != "longcat":
        np.testing.assert_allclose(got.weights.sum(-1), cfg.scaling, rtol=1e-5)
        assert np.all(real[(np.asarray(got.index) >= E).any(-1)].sum(-1) < cfg.scaling), "weight of zero slots is gone"
        np.testing.assert_array_equal(out[0], 0)


def test_mixed_kinds_and_their_bad_rows():
    cfg = RoutingConfig(2, 4, renormalise=False, free=(("constant", 1), ("copy", 2), ("zero", 1), ("constant", 2)))
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(40, 8)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(40, 3)), jnp.float32)
    constants = jnp.asarray(np.random.default_rng(3).normal(size=(3, 3)), jnp.float32)
    r = route(logits, cfg)
    table = {2: constants[0], 6: constants[1], 7: constants[2]}
    wanted = [
        sum(
            (w * np.asarray(x[t] if i in (3, 4) else table.get(i, np.zeros(3))))
            for i, w in zip(np.asarray(r.index[t]).tolist(), np.asarray(r.weights[t]), strict=True)
        )
        for t in range(40)
    ]
    np.testing.assert_allclose(free_output(r, x, cfg, constants), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(RoutingError, match=r"hand free_output constants \[3, D\]"):
        free_output(r, x, cfg)
    untouched = ~np.isin(np.asarray(r.index), (3, 4)).any(-1)
    assert untouched.any()
    bad = jnp.where(jnp.asarray(untouched)[:, None], jnp.nan, x)
    assert np.isfinite(free_output(r, bad, cfg, constants)).all(), "0 * NaN must not reach a token without copies"
    grad = grad_of(lambda z: free_output(route(z, cfg), bad, cfg, constants).sum())(logits)
    assert np.isfinite(grad).all()


# --------------------------------------------------------------------------------------------------
# Losses, statistics, bias update


def one_hot_routing(cfg, slots, sharpness=200.0):
    """Every token puts all its probability on its own slot(s)."""
    logits = np.zeros((len(slots), cfg.slots), np.float32)
    logits[np.arange(len(slots)), slots] = sharpness
    return route(jnp.asarray(logits), cfg)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_switch_loss_closed_forms(scoring):
    uniform = RoutingConfig(8, 8, scoring=scoring)
    np.testing.assert_allclose(switch_loss(route(jnp.zeros((5, 8)), uniform), uniform).value(), 1, rtol=1e-6)
    loss = switch_loss(route(jnp.zeros((5, 8)), uniform), uniform, coefficient=0.3)
    np.testing.assert_allclose(loss.value(), 0.3, rtol=1e-6)
    single = RoutingConfig(8, 1)
    np.testing.assert_allclose(switch_loss(one_hot_routing(single, [3] * 6), single).value(), 8, rtol=1e-6)
    np.testing.assert_allclose(switch_loss(one_hot_routing(single, range(8)), single).value(), 1, rtol=1e-6)
    shares = np.array([5, 3]) / 8  # f = P = shares
    two = switch_loss(one_hot_routing(single, [0] * 5 + [1] * 3), single).value()
    np.testing.assert_allclose(two, 8 * (shares**2).sum(), rtol=1e-6)


@pytest.mark.parametrize("name", ["qwen3", "glm", "zeda"])
def test_switch_and_z_loss_against_loops(name):
    cfg = CONFIGS[name]
    logits, bias = draw(cfg)
    r = routed(cfg, logits, bias)
    index, _, scores = by_hand(logits, cfg, bias)
    scores = scores / scores.sum(-1, keepdims=True)
    total = 0.0
    for e in range(cfg.slots):
        total += (index == e).sum() / index.size * scores[:, e].mean()
    np.testing.assert_allclose(switch_loss(r, cfg, coefficient=0.01).value(), 0.01 * cfg.slots * total, rtol=1e-5)
    z = np.mean([math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.astype(float)])
    np.testing.assert_allclose(z_loss(r, coefficient=0.5).value(), 0.5 * z, rtol=1e-5)


def test_losses_add_up_over_micro_batches():
    cfg = CONFIGS["qwen3"]
    logits, _ = draw(cfg)
    valid = np.arange(T) != 20
    whole = routed(cfg, logits, valid=jnp.asarray(valid))
    f = R.fractions(R.counts(whole))
    parts = [routed(cfg, logits[s], valid=jnp.asarray(valid[s])) for s in (slice(0, 17), slice(17, T))]
    for of in (lambda r: switch_loss(r, cfg, fraction=f), z_loss):
        means = [of(part) for part in parts]
        joined = sum(m.total for m in means) / sum(m.weight for m in means)
        np.testing.assert_allclose(joined, of(whole).value(), rtol=1e-6)
    np.testing.assert_allclose(switch_loss(whole, cfg, fraction=f).value(), switch_loss(whole, cfg).value(), rtol=1e-6)


def test_switch_gradient_pushes_probability_off_the_busy_expert():
    cfg = RoutingConfig(4, 1)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(32, 4)) * 0.1 + [1.0, 0, 0, 0], jnp.float32)
    grad = grad_of(lambda z: switch_loss(route(z, cfg), cfg).value())(logits).sum(0)
    assert grad[0] > 0
    assert np.all(grad[1:] < 0)


def test_group_loss_is_zedas():
    """L_GA (spec 2.2): alpha at the fixed point, alpha (N + w N_Z)/(w N_Z) with all mass on zero slots, its sign."""
    cfg, w, alpha = RoutingConfig(8, 1, free=(("zero", 4),)), 2.0, 0.1
    kwargs = dict(sizes=(8, 4), shares=(8.0, w * 4), coefficient=alpha)
    half = one_hot_routing(cfg, [0, 0, 0, 8, 9, 11])  # rho* = wN_Z / (N + wN_Z) = 1/2, unbalanced inside the groups
    np.testing.assert_allclose(group_loss(half, cfg, **kwargs).value(), alpha, rtol=1e-6)
    zeros = one_hot_routing(cfg, [9] * 5)
    np.testing.assert_allclose(group_loss(zeros, cfg, **kwargs).value(), alpha * 16 / 8, rtol=1e-6)
    for slots, sign in (([0, 1, 2, 8], -1), ([0, 8, 9, 10], +1)):
        logits = one_hot_routing(cfg, slots, 1.0).logits
        grad = grad_of(lambda z: group_loss(route(z, cfg), cfg, **kwargs).value())(logits)
        assert np.all(np.sign(grad[:, 8:].sum(-1)) == sign), "too few zero slots: descent raises them, and back"
    big = RoutingConfig(8, 3, free=(("zero", 4),), scoring="sigmoid", selection_bias=True)
    logits, bias = draw(big)
    r = routed(big, logits, bias)
    _, _, scores = by_hand(logits, big, bias)
    plain = np.argsort(-scores, -1)[:, :3]
    p = scores / scores.sum(-1, keepdims=True)
    f_z, p_z = (plain >= 8).mean(), p[:, 8:].sum(-1).mean()
    wanted = alpha * (8 + w * 4) * ((1 - f_z) * (1 - p_z) / 8 + f_z * p_z / (w * 4))
    np.testing.assert_allclose(group_loss(r, big, **kwargs, with_bias=False).value(), wanted, rtol=1e-5)
    order = np.r_[np.random.default_rng(0).permutation(8), 8:12]
    assert bias is not None
    mixed = routed(big, logits[:, order], bias[order])
    np.testing.assert_allclose(group_loss(mixed, big, **kwargs).value(), group_loss(r, big, **kwargs).value(), 1e-5)


def test_statistics_by_hand():
    cfg = RoutingConfig(3, 2, free=(("zero", 2),))
    logits = np.log(np.array([[4, 3, 1, 1, 1], [1, 1, 1, 5, 4], [4, 1, 1, 3, 1]], np.float32) / 10)
    logits[1] = np.log(np.array([1, 1, 1, 5, 4], np.float32) / 12)
    r = route(jnp.asarray(logits), cfg)
    np.testing.assert_array_equal(R.counts(r), [2, 1, 0, 2, 1])
    np.testing.assert_array_equal(R.real_experts(r, cfg), [2, 0, 1])
    p = np.exp(logits.astype(float))
    p = p / p.sum(-1, keepdims=True)
    np.testing.assert_allclose(R.entropy(r, cfg), [-sum(v * math.log(v) for v in row) for row in p], rtol=1e-5)
    values = {name: float(mean.value()) for name, mean in R.statistics(r, cfg).items()}
    assert values["free_fraction"] == pytest.approx(3 / 6)
    assert values["real_experts"] == pytest.approx(1)
    assert values["top_weight"] == pytest.approx((4 / 7 + 5 / 9 + 4 / 7) / 3)
    assert (values["max_violation"], values["avg_violation"]) == pytest.approx((1, 2 / 3))
    np.testing.assert_allclose(R.entropy(route(jnp.zeros((1, 5)), cfg), cfg), math.log(5), rtol=1e-6)


def test_update_bias_is_the_sign_rule():
    bias = R.update_bias(jnp.array([0.5, 0.0, 0.0, 0.25]), jnp.array([9, 1, 5, 5], jnp.int32), 0.125)
    np.testing.assert_array_equal(bias, [0.375, 0.125, 0, 0.25])
    partial = R.update_bias(jnp.zeros(4), jnp.array([9, 1, 5, 500], jnp.int32), 0.125, experts=3)
    np.testing.assert_array_equal(partial, [-0.125, 0.125, 0, 0])
    with pytest.raises(RoutingError, match="experts=5"):
        R.update_bias(jnp.zeros(4), jnp.zeros(4, jnp.int32), 0.1, experts=5)


@pytest.mark.parametrize("name", ["glm", "deepseek3"])
def test_update_bias_evens_out_skewed_loads(name):
    cfg = CONFIGS[name]
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(512, E)) + np.linspace(-1.5, 1.5, E), jnp.float32)

    @jax.jit
    def step(bias):
        load = R.counts(route(logits, cfg, bias=bias))
        return R.update_bias(bias, load, 0.01), R.violation(load, E)[0]

    bias, violations = jnp.zeros(E), []
    for _ in range(150):
        bias, worst = step(bias)
        violations.append(float(worst))
    assert violations[0] > 1.0
    assert np.mean(violations[-20:]) < 0.15


# --------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(experts=0), "experts 0"),
        (dict(top_k=17), r"top_k 17 is outside \[1, 16\].*lower top_k"),
        (dict(top_k=0), "top_k 0"),
        (dict(scoring="tanh"), "scoring 'tanh'.*'softmax', 'sigmoid'"),
        (dict(softmax_over="some"), "softmax_over 'some'"),
        (dict(selection="random"), "selection 'random'"),
        (dict(group_score="mean"), "group_score 'mean'"),
        (dict(scaling=0.0), "scaling 0.0"),
        (dict(scaling=float("nan")), "scaling nan"),
        (dict(jitter=-0.1), "jitter -0.1"),
        (dict(free=(("null", 3),)), "kind 'null'"),
        (dict(free=(("zero", 0),)), "0 slots of kind 'zero'"),
        (dict(scoring="sigmoid", softmax_over="chosen"), "no meaning"),
        (dict(scoring="sigmoid", straight_through=True), 'needs scoring "softmax"'),
        (dict(n_group=4), "n_group 4, topk_group 1 have no effect"),
        (dict(selection="per_group", n_group=4, free=(("zero", 4),)), "belong to no group"),
        (dict(selection="per_group", n_group=5, top_k=5), "n_group 5 does not divide experts 16"),
        (dict(selection="per_group", n_group=8), "top_k 4 is no multiple of n_group 8"),
        (dict(selection="per_group", n_group=4, topk_group=2), "topk_group 2 has no effect"),
        (dict(selection="group_limited", n_group=4, topk_group=5), r"topk_group 5 is outside \[1, n_group 4\]"),
        (dict(selection="group_limited", n_group=8, topk_group=1), "groups of 2 hold fewer than top_k 4"),
        (dict(selection="group_limited", n_group=16, topk_group=4), 'use "max"'),
    ],
)
def test_settings_that_cannot_be_honoured(settings, message):
    with pytest.raises(RoutingError, match=message):
        RoutingConfig(**({"experts": 16, "top_k": 4} | settings))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: route(jnp.zeros((3, 17)), CONFIGS["qwen3"]), r"\(3, 17\) need 16 at the end"),
        (lambda: route(jnp.zeros((3, 16)), CONFIGS["glm"]), r"hand route a bias of shape \(16,\)"),
        (lambda: route(jnp.zeros((3, 16)), CONFIGS["qwen3"], bias=jnp.zeros(16)), "not set"),
        (lambda: route(jnp.zeros((3, 16)), CONFIGS["qwen3"], replay=jnp.zeros((3, 5), jnp.int32)), r"shape \(3, 4\)"),
        (
            lambda: R.check(jnp.zeros((3, 16)), CONFIGS["glm"], bias=jnp.zeros(16).at[5].set(jnp.nan)),
            "selection bias of slot 5 is nan",
        ),
        (lambda: group_loss(route(jnp.zeros((3, 16)), CONFIGS["qwen3"]), CONFIGS["qwen3"], (8, 9)), "not 17"),
        (
            lambda: group_loss(
                route(jnp.zeros((3, 16)), CONFIGS["qwen3"]), CONFIGS["qwen3"], (8, 8), shares=(1.0, 0.0)
            ),
            "shares",
        ),
    ],
)
def test_inputs_that_do_not_fit(call, message):
    with pytest.raises(RoutingError, match=message):
        call()
