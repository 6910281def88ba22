"""Distillation against brute force over the vocabulary; the policy gradient against the exact gradient of the KL."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe import params, training
from moe.distill import DistillError, distillation_loss, divergence, mean_of_samples, policy_surrogate, rollouts
from moe.models.decode import EngineConfig, generate
from moe.models.sampling import Sampling
from moe.models.transformer import forward, transformer_specs
from moe.objectives import LossConfig
from moe.zeda import convert
from tests.moe.test_zeda import KEY, TOKENS, V, Z, how_of, run, small, static_model

QUIET = LossConfig(switch=0.0, router_z=0.0)


def pair():
    """(student, its config, teacher, its config): a converted model and another one."""
    p, cfg = static_model()
    student, scfg = convert(p, cfg, zero_experts=Z, key=KEY)
    other = params.init(jax.random.key(5), transformer_specs(cfg))
    return student, scfg, dataclasses.replace(other, embed=20 * other.embed, head=20 * other.head), cfg  # opinionated


def arrays(batch):
    return jax.tree.map(jnp.asarray, batch)


def drawn(student, scfg, count=4, seed=0, max_tokens=8):
    engine = EngineConfig(sequences=count, length=32, record_routing=True)
    prompts = [[1 + i, 2, 3][: 2 + i % 2] for i in range(count)]
    return generate(student, scfg, prompts, Sampling(temperature=1.0, max_tokens=max_tokens), config=engine, seed=seed)


@pytest.mark.parametrize(("form", "chunk"), [("reverse_kl", 5), ("forward_kl", 5), ("forward_kl", None)])
def test_divergence_is_the_sum_over_the_vocabulary(form, chunk):
    student, scfg, teacher, cfg = pair()
    mine, theirs = run(student, TOKENS, cfg=scfg), run(teacher, TOKENS, cfg=cfg)
    got = divergence(student, mine.hidden, teacher, theirs.hidden, form=form, chunk=chunk)
    s, t = (np.asarray(forward(p, TOKENS, cfg=c), np.float64) for p, c in ((student, scfg), (teacher, cfg)))
    s, t = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (s, t))
    p, q = (s, t) if form == "reverse_kl" else (t, s)
    np.testing.assert_allclose(got, (np.exp(p) * (p - q)).sum(-1), atol=2e-5)
    assert np.asarray(got).min() > 0
    same = divergence(student, mine.hidden, student, mine.hidden, form=form, chunk=chunk)
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_policy_gradient_is_the_reverse_kl_in_expectation():
    """One position, all V tokens as samples weighted by their probability: the score-function gradient summed exactly
    is the gradient of the KL over the vocabulary.
    """
    z, t = (jax.random.normal(jax.random.key(i), (V,)) for i in (0, 1))
    teacher = jax.nn.log_softmax(t)
    exact = jax.grad(lambda z: (jax.nn.softmax(z) * (jax.nn.log_softmax(z) - teacher)).sum())(z)
    old = jax.nn.log_softmax(z)

    def expected(z):
        each = policy_surrogate(jax.nn.log_softmax(z), old, teacher - old)
        return (jnp.exp(old) * each).sum()

    np.testing.assert_allclose(jax.grad(expected)(z), exact, atol=1e-6)


def test_the_clip_stops_the_gradient_where_it_should():
    old = jnp.zeros(4)
    moved = jnp.log(jnp.asarray([1.5, 1.5, 0.5, 0.5]))
    advantage = jnp.asarray([1.0, -1.0, 1.0, -1.0])
    slope = jax.grad(lambda lp: policy_surrogate(lp, old, advantage).sum())(moved)
    np.testing.assert_allclose(slope, [0.0, 1.5, -0.5, 0.0], atol=1e-6)


def test_samples_weigh_alike():
    values, mask = (
        jnp.asarray([[1.0, 3.0, 9.0], [5.0, 7.0, 7.0], [1.0, 1.0, 1.0]]),
        jnp.asarray([[True, True, False], [True, False, False], [False] * 3]),
    )
    assert float(mean_of_samples(values, mask).value()) == pytest.approx((2 + 5) / 2)


def test_rollouts_hold_what_was_drawn():
    student, scfg, _, _ = pair()
    done = drawn(student, scfg)
    batch = rollouts(done, length=16, cfg=scfg)
    for row, one in enumerate(done):
        fed = len(one.prompt) + len(one.tokens) - 1
        picked = batch["targets"][row][batch["mask"][row]]
        np.testing.assert_array_equal(picked, one.tokens)
        np.testing.assert_array_equal(batch["old_logprobs"][row][batch["mask"][row]], one.logprobs)
        np.testing.assert_array_equal(batch["routing"][row, :, :fed], one.routing)
        assert (batch["routing"][row, :, fed:] == how_of(scfg).slots).all()
    with pytest.raises(DistillError, match="raise it to"):
        rollouts(done, length=4, cfg=scfg)
    with pytest.raises(DistillError, match="record_routing"):
        rollouts([dataclasses.replace(done[0], routing=None)], length=16, cfg=scfg)
    with pytest.raises(DistillError, match="no completions"):
        rollouts([], length=16, cfg=scfg)


def test_the_loss_replays_and_equals_its_parts():
    student, scfg, teacher, cfg = pair()
    batch = arrays(rollouts(drawn(student, scfg), length=16, cfg=scfg))
    objective, metrics = distillation_loss(student, batch, teacher, cfg=scfg, teacher_cfg=cfg, loss=QUIET)
    logp = lambda p, c: jnp.take_along_axis(  # noqa: E731
        jax.nn.log_softmax(forward(p, batch["tokens"], cfg=c)), batch["targets"][..., None], -1
    )[..., 0]
    mine, theirs = logp(student, scfg), logp(teacher, cfg)
    np.testing.assert_allclose(
        mine[batch["mask"]], batch["old_logprobs"][batch["mask"]], atol=2e-5, err_msg="sampler and training"
    )
    wanted = mean_of_samples(mine - theirs, batch["mask"]).value()  # ratio 1: minus the advantage
    np.testing.assert_allclose(objective["distillation"].value(), wanted, rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"].value(), (mine - theirs)[batch["mask"]].mean(), rtol=1e-4)
    other = batch | {"routing": batch["routing"][:, ::-1]}
    changed, _ = distillation_loss(student, other, teacher, cfg=scfg, teacher_cfg=cfg, loss=QUIET)
    assert abs(float(changed["distillation"].value() - wanted)) > 1e-5, "the record decides"


def test_bad_requests():
    student, scfg, teacher, cfg = pair()
    batch = arrays(rollouts(drawn(student, scfg), length=16, cfg=scfg))
    with pytest.raises(DistillError, match="form 'jsd' is not one of"):
        distillation_loss(student, batch, teacher, cfg=scfg, teacher_cfg=cfg, form="jsd")
    del batch["old_logprobs"]
    with pytest.raises(DistillError, match="needs old_logprobs"):
        distillation_loss(student, batch, teacher, cfg=scfg, teacher_cfg=cfg)
    with pytest.raises(ValueError, match=r"needs RoutingConfig\.free_share"):
        distillation_loss(
            student, batch, teacher, cfg=small(free=(("zero", Z),)), teacher_cfg=cfg, loss=LossConfig(group=0.1),
            form="reverse_kl",
        )  # fmt: skip


@pytest.mark.slow
def test_micro_batches_and_the_teacher_as_an_argument():
    """The same update in one piece and in two; the teacher stays as it was."""
    student, scfg, teacher, cfg = pair()
    before, optimizer = jax.tree.map(np.asarray, teacher), optax.sgd(0.1)
    batch = rollouts(drawn(student, scfg), length=16, cfg=scfg)

    def loss(p, b, rng, t):
        return distillation_loss(p, b, t, cfg=scfg, teacher_cfg=cfg, loss=QUIET)

    def update(parts):
        state = training.init_state(jax.tree.map(jnp.copy, student), optimizer, jax.random.key(0))
        return training.make_train_step(loss, optimizer, accumulate=parts)(state, batch, teacher)[0].params

    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), update(1), student)
    assert max(jax.tree.leaves(moved)) > 1e-3
    for a, b in zip(*map(jax.tree.leaves, (update(2), update(1))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), teacher, before))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "steps"), [("policy_gradient", 100), ("reverse_kl", 30)])
def test_training_on_its_own_text_nears_the_teacher(form, steps):
    student, scfg, teacher, cfg = pair()
    optimizer = optax.adam(3e-3)
    step = training.make_train_step(
        lambda p, b, rng, t: distillation_loss(p, b, t, cfg=scfg, teacher_cfg=cfg, loss=QUIET, form=form), optimizer
    )
    state, gaps = training.init_state(jax.tree.map(jnp.copy, student), optimizer, jax.random.key(0)), []
    for i in range(steps):
        batch = rollouts(drawn(state.params, scfg, 16, seed=i), length=16, cfg=scfg)
        state, metrics = step(state, batch, teacher)
        gaps.append(float(metrics["kl"]))
    assert np.mean(gaps[-5:]) < 0.8 * np.mean(gaps[:5])
