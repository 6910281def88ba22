"""ZEDA's conversion, its identities (spec section 5), its controllers, and the way through Hugging Face's keys."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe import params, routing, training, zeda
from moe.layers.attention import GQAConfig
from moe.layers.moe import MoEConfig
from moe.layers.rotary import RotaryConfig
from moe.models import hf
from moe.models.decode import EngineConfig, generate
from moe.models.sampling import Sampling
from moe.models.transformer import TransformerConfig, apply, forward, transformer_specs
from moe.objectives import LossConfig, balance_by_bias, language_model_loss
from moe.routing import RoutingConfig
from moe.zeda import ZedaError, convert, group_loss, static, zero_ratio, zero_weight
from tests.moe.golden import decoders

N, Z, K, V, D = 8, 4, 4, 64, 32
KEY = jax.random.key(0)
TOKENS = jax.random.randint(jax.random.key(9), (2, 12), 0, V)
run = jax.jit(apply, static_argnames=("cfg", "observe", "experts", "remat"))
run_forward = jax.jit(forward, static_argnames="cfg")


def small(**options):
    how = RoutingConfig(N, K, **options)
    return TransformerConfig(
        family="qwen3_moe", vocab=V, width=D, layers=("moe", "moe"), hidden=16,
        attention=GQAConfig(2, 1, 16, RotaryConfig(16), qk_norm=True), moe=MoEConfig(how, hidden=16), max_positions=64,
    )  # fmt: skip


@functools.cache
def static_model(**options):
    cfg = small(**options)
    return params.init(jax.random.key(1), transformer_specs(cfg)), cfg


ROUTERS = {
    "softmax": {},
    "softmax_over_all": {"renormalise": False},
    "sigmoid_with_bias": {"scoring": "sigmoid", "selection_bias": True, "scaling": 1.8},
}
every_router = pytest.mark.parametrize(
    "options",
    [pytest.param(o, id=name, marks=[pytest.mark.slow] * (name == "softmax_over_all")) for name, o in ROUTERS.items()],
)


def how_of(cfg) -> RoutingConfig:
    assert cfg.moe is not None
    return cfg.moe.routing


def mixtures(p):
    return [r.mlp for r in p.runs]


# ---- conversion
@every_router
def test_masked_is_the_original_bit_for_bit(options):
    p, cfg = static_model(**options)
    student, scfg = convert(p, cfg, zero_experts=Z, target_zero_ratio=0.5, key=KEY)
    wanted, got = run(p, TOKENS, cfg=cfg), run(student, TOKENS, cfg=static(scfg))
    np.testing.assert_array_equal(got.hidden, wanted.hidden)
    np.testing.assert_array_equal(got.routing, wanted.routing)
    dynamic = run(student, TOKENS, cfg=scfg)
    assert 0.15 < float((dynamic.routing >= N).mean()) < 0.55, "fresh zero experts take about a third of the slots"
    assert static(static(scfg), masked=False) == scfg


def test_new_columns_are_drawn_like_the_old_ones():
    """Mean and unbiased deviation of each input, from 4,000 new columns; the old ones bit for bit."""
    p, cfg = static_model(scoring="sigmoid", selection_bias=True)
    rng = np.random.default_rng(0)
    old = mixtures(p)[0]
    bias = jnp.asarray(rng.normal(0.3, 0.2, old.router_bias.shape), jnp.float32)
    run0 = dataclasses.replace(p.runs[0], mlp=dataclasses.replace(old, router_bias=bias))
    student, _ = convert(dataclasses.replace(p, runs=(run0,)), cfg, zero_experts=4000, key=KEY)
    new = mixtures(student)[0]
    np.testing.assert_array_equal(new.router[..., :N], old.router)
    np.testing.assert_array_equal(new.router_bias[:, :N], bias)
    for before, after in ((old.router, new.router[..., N:]), (bias, new.router_bias[:, N:])):
        mean, deviation = np.mean(before, -1), np.std(before, -1, ddof=1)
        np.testing.assert_allclose(np.mean(after, -1), mean, atol=4 * deviation.max() / 4000**0.5)
        np.testing.assert_allclose(np.std(after, -1), deviation, rtol=0.06)
    first, second = np.asarray(new.router[0, :, N:]), np.asarray(new.router[1, :, N:])
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05, "layers draw from keys of their own"


def test_everything_else_is_shared():
    p, cfg = static_model()
    student, scfg = convert(p, cfg, zero_experts=Z, key=KEY)
    assert student.embed is p.embed
    assert all(a.experts is b.experts for a, b in zip(mixtures(student), mixtures(p), strict=True))
    shapes = jax.tree.map(lambda s: s.shape, transformer_specs(scfg), is_leaf=params.is_spec)
    assert jax.tree.map(lambda a: a.shape, student) == shapes


@pytest.mark.parametrize("options", [{"scoring": "sigmoid", "scaling": 1.8}, pytest.param({}, marks=pytest.mark.slow)])
def test_zero_experts_are_experts_whose_output_is_zero(options):
    """The dynamic model is the static one of N + Z experts of which the last Z have down projections of zeros."""
    p, cfg = static_model(**options)
    student, scfg = convert(p, cfg, zero_experts=Z, key=KEY)

    def widen(mixture):
        wide = lambda a: jnp.concatenate([a, jnp.zeros((*a.shape[:1], Z, *a.shape[2:]))], 1)  # noqa: E731
        return dataclasses.replace(mixture, experts=jax.tree.map(wide, mixture.experts))

    twin = dataclasses.replace(student, runs=tuple(dataclasses.replace(r, mlp=widen(r.mlp)) for r in student.runs))
    how = dataclasses.replace(how_of(cfg), experts=N + Z)
    tcfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, routing=how))
    wanted = run_forward(twin, TOKENS, cfg=tcfg)
    np.testing.assert_allclose(run_forward(student, TOKENS, cfg=scfg), wanted, atol=2e-5)


def test_tokens_with_zero_slots_only_pass_unchanged():
    """Replayed so: the routed output is exactly 0, as if the experts did not exist."""
    p, cfg = static_model()
    student, scfg = convert(p, cfg, zero_experts=Z, key=KEY)
    replay = jnp.broadcast_to(N + jnp.arange(K), (2, *TOKENS.shape, K)).astype(jnp.int32)

    def without(mixture):
        return dataclasses.replace(mixture, experts=jax.tree.map(jnp.zeros_like, mixture.experts))

    mute = dataclasses.replace(
        student, runs=tuple(dataclasses.replace(r, mlp=without(r.mlp)) for r in student.runs)
    )  # fmt: skip
    got = run(student, TOKENS, cfg=scfg, replay=replay)
    np.testing.assert_array_equal(got.hidden, run(mute, TOKENS, cfg=scfg).hidden)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("null", {}, "kind 'null' is not one of"),
        ("zero", {"zero_experts": 0}, "zero_experts 0 must be at least 1"),
        ("zero", {"target_zero_ratio": 1.0}, r"target_zero_ratio 1\.0 must lie between 0 and 1"),
    ],
)
def test_bad_requests(kind, options, message):
    p, cfg = static_model()
    with pytest.raises(ZedaError, match=message):
        convert(p, cfg, **({"zero_experts": Z, "key": KEY, "kind": kind} | options))


def test_models_that_cannot_be_converted():
    p, cfg = static_model()
    student, scfg = convert(p, cfg, zero_experts=Z, key=KEY)
    with pytest.raises(ZedaError, match="parameter-free slots already"):
        convert(student, scfg, zero_experts=Z, key=KEY)
    with pytest.raises(ZedaError, match="no mixture of experts to convert"):
        convert(p, dataclasses.replace(cfg, moe=None, layers=("dense",)), zero_experts=Z, key=KEY)
    with pytest.raises(ZedaError, match="no parameter-free slots to mask"):
        static(cfg)
    with pytest.raises(routing.RoutingError, match="have no meaning without free slots"):
        RoutingConfig(8, 2, free_share=0.5)


@pytest.mark.parametrize("kind", [pytest.param("copy", marks=pytest.mark.slow), "constant"])
def test_other_kinds_run(kind):
    p, cfg = static_model()
    student, scfg = convert(p, cfg, zero_experts=Z, key=KEY, kind=kind)
    zeroed, zcfg = convert(p, cfg, zero_experts=Z, key=KEY)
    got, wanted = run_forward(student, TOKENS, cfg=scfg), run_forward(zeroed, TOKENS, cfg=zcfg)
    assert (np.abs(got - wanted).max() > 1e-3) == (kind == "copy"), "constants begin as zeros"


# ---- the group loss
def test_the_paper_s_setting():
    assert zero_weight(128, 64, 0.5) == 2.0
    assert zero_weight(64, 32, 0.5) == 2.0
    assert zero_weight(128, 64, 1 / 3) == pytest.approx(1.0)
    with pytest.raises(ZedaError, match="must lie between 0 and 1"):
        zero_weight(128, 64, 0.0)


def spread(zero, tokens=64, n=N, z=Z, k=K, seed=0):
    """Scores with the given mass on zero experts, and slots of which that share are zero ones."""
    rng = np.random.default_rng(seed)
    real, free = rng.random((tokens, n)), rng.random((tokens, z))
    scores = np.concatenate(
        [(1 - zero) * real / real.sum(1, keepdims=True), zero * free / free.sum(1, keepdims=True)], 1
    )
    slots = np.where(np.arange(tokens * k) < round(zero * tokens * k), n, 0).reshape(tokens, k)
    return jnp.asarray(scores, jnp.float32), jnp.asarray(slots + np.arange(k), jnp.int32)


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
def test_alpha_at_the_fixed_point_and_the_value_of_all_zero(target):
    w = zero_weight(N, Z, target)
    scores, selected = spread(target)
    assert float(group_loss(scores, selected, N, w=w, alpha=0.1)) == pytest.approx(0.1, rel=1e-5)
    scores, selected = spread(1.0)
    everything = 0.1 * (N + w * Z) / (w * Z)
    assert float(group_loss(scores, selected, N, w=w, alpha=0.1)) == pytest.approx(everything, rel=1e-5)


def test_the_gradient_pushes_towards_the_target_from_both_sides():
    logits = jnp.zeros((64, N + Z))

    def slope(zero):
        """d loss / d logit of all zero experts."""
        _, selected = spread(zero)

        def value(shift):
            scores = jax.nn.softmax(logits.at[:, N:].add(shift), -1)
            return group_loss(scores, selected, N, w=2.0, alpha=0.1)

        return float(jax.grad(value)(0.0))

    assert slope(0.25) < -1e-4
    assert slope(0.75) > 1e-4
    assert slope(0.5) == pytest.approx(0.0, abs=1e-8)


def test_real_experts_may_be_permuted():
    scores, selected = spread(0.4)
    order = np.random.default_rng(1).permutation(N)
    moved = jnp.concatenate([scores[:, order], scores[:, N:]], 1)
    back = jnp.asarray(np.concatenate([np.argsort(order), np.arange(N, N + Z)]), jnp.int32)
    a = group_loss(scores, selected, N, w=2.0, alpha=0.1)
    np.testing.assert_allclose(group_loss(moved, back[selected], N, w=2.0, alpha=0.1), a, rtol=1e-6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_training_uses_the_same_loss(scoring):
    """moe.routing.group_loss, as language_model_loss calls it, in value and gradient, selection bias ignored."""
    how = RoutingConfig(
        N, K, scoring=scoring, selection_bias=True, free=(("zero", Z),), free_share=0.4,
    )  # fmt: skip
    z = jax.random.normal(jax.random.key(3), (50, N + Z))
    bias = jnp.linspace(-1, 1, N + Z)

    def theirs(z):
        routed = routing.route(z, how, bias=bias)
        shares = (1 - 0.4, 0.4)
        return routing.group_loss(routed, how, (N, Z), shares=shares, coefficient=0.1, with_bias=False).value()

    def ours(z):
        scores = jax.nn.softmax(z, -1) if scoring == "softmax" else jax.nn.sigmoid(z)
        scores = scores / scores.sum(-1, keepdims=True)
        selected = jax.lax.top_k(scores, K)[1]
        return group_loss(scores, selected, N, w=zero_weight(N, Z, 0.4), alpha=0.1)

    np.testing.assert_allclose(theirs(z), ours(z), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(theirs)(z), jax.grad(ours)(z), atol=1e-7)


def test_zero_ratio_counts_slots():
    selected = jnp.asarray([[[0, 1, 8, 9], [8, 9, 10, 11]], [[0, 1, 2, 3], [4, 5, 6, 11]]])
    np.testing.assert_allclose(zero_ratio(selected, N), [0.75, 0.125])
    assert float(zero_ratio(selected[0], N)) == 0.75
    np.testing.assert_allclose(zero_ratio(selected, N, valid=jnp.asarray([True, False])), [0.5, 0.0])
    report = zeda.layer_report(np.asarray(selected), RoutingConfig(N, K, free=(("zero", Z),), free_share=0.5))
    np.testing.assert_allclose(report.zero_ratio, [0.75, 0.125])
    np.testing.assert_allclose(report.all_skipped, [0.5, 0.0])
    np.testing.assert_array_equal(report.unused, [6, 1])
    assert "0.750" in str(report)


def test_divergence_of_loads():
    even, one = np.full((1, 4), 0.25), np.eye(4)[:1]
    assert zeda.load_divergence(even, even)[0] == 0
    assert zeda.load_divergence(np.eye(4)[:1], np.eye(4)[1:2])[0] == pytest.approx(np.log(2))
    p, m = 0.25, 0.625  # by hand: even against all on one
    by_hand = (p * np.log(p / m) + 3 * p * np.log(2) + np.log(1 / m)) / 2
    assert zeda.load_divergence(even, one)[0] == pytest.approx(by_hand)


# ---- control
def batch_of(seed, rows=16, length=24):
    tokens = np.random.default_rng(seed).integers(0, V, (rows, length + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": np.ones((rows, length), np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "mask": np.ones((rows, length), bool), "source": np.zeros(rows, np.int32),
    }  # fmt: skip


def adapt(student, scfg, loss, optimizer, steps):
    """Zero ratios [L] of a short training on random tokens, their mean over its second half: a step swings by 0.1."""
    step = training.make_train_step(
        lambda p, b, rng: language_model_loss(p, b, cfg=scfg, loss=loss), optimizer, accumulate=2
    )
    state = training.init_state(student, optimizer, jax.random.key(2))
    ratios = []
    for i in range(steps):
        state, metrics = step(state, batch_of(i))
        ratios.append([float(metrics[f"free_fraction/{layer}"]) for layer in range(2)])
    return np.mean(ratios[steps // 2 :], 0), metrics


@pytest.mark.parametrize("target", [0.3, pytest.param(0.6, marks=pytest.mark.slow)])
def test_the_group_loss_reaches_its_target(target):
    p, cfg = static_model()
    student, scfg = convert(p, cfg, zero_experts=Z, target_zero_ratio=target, key=KEY)
    loss = LossConfig(switch=0.0, router_z=0.0, group=0.1)
    ratios, metrics = adapt(student, scfg, loss, optax.adam(1e-2), 80)
    np.testing.assert_allclose(ratios, target, atol=0.03)
    assert float(metrics["loss/group"]) == pytest.approx(0.2, rel=0.1)  # alpha a layer at the fixed point, summed


@pytest.mark.slow
def test_the_proportional_controller_reaches_its_target():
    """LongCat-Flash's rule moves the experts' bias; the zero experts' stays."""
    p, cfg = static_model()
    student, scfg = convert(p, cfg, zero_experts=Z, target_zero_ratio=0.6, key=KEY, selection_bias=True)
    optimizer = balance_by_bias(optax.sgd(0.0), 0.05, rule="proportional")
    ratios, _ = adapt(student, scfg, LossConfig(switch=0.0, router_z=0.0), optimizer, 120)
    np.testing.assert_allclose(ratios, 0.6, atol=0.06)
    with pytest.raises(ValueError, match="rule 'pid' is not one of"):
        balance_by_bias(optax.sgd(0.0), rule="pid")


def test_one_proportional_step_is_the_formula():
    p, cfg = static_model()
    student, scfg = convert(p, cfg, zero_experts=Z, target_zero_ratio=0.6, key=KEY, selection_bias=True)
    optimizer = balance_by_bias(optax.sgd(0.0), 0.05, rule="proportional")
    step = training.make_train_step(
        lambda p, b, rng: language_model_loss(p, b, cfg=scfg, loss=LossConfig(switch=0.0, router_z=0.0)), optimizer
    )
    batch = batch_of(0)
    index = np.asarray(run(student, jnp.asarray(batch["tokens"]), cfg=scfg).routing).reshape(2, -1)
    share = np.stack([np.bincount(one, minlength=N + Z) for one in index]) / index.shape[1]
    state, _ = step(training.init_state(jax.tree.map(jnp.copy, student), optimizer, jax.random.key(2)), batch)
    moved = np.concatenate([m.router_bias for m in mixtures(state.params)])
    np.testing.assert_allclose(moved[:, :N], 0.05 * ((1 - 0.6) / N - share[:, :N]), atol=2e-7)
    assert not moved[:, N:].any()


# ---- checkpoints and decoding
@pytest.mark.parametrize("name", [pytest.param("qwen3_moe", marks=pytest.mark.slow), "glm4_moe_lite"])
def test_hugging_face_round_trip(name, tmp_path):
    cfg = hf.config_from_hf(decoders.CONFIGS[name])
    weights = decoders.weights(cfg)
    student, scfg = convert(weights, cfg, zero_experts=2, target_zero_ratio=0.4, key=KEY)
    hf.save(tmp_path / "s", student, scfg)
    written = json.loads((tmp_path / "s" / "config.json").read_text())
    assert written["model_type"] == f"{name}_plus_plus"
    assert (written["zce_nums"], written["zce_types"], written["use_zce_mask"]) == ([2], ["zero"], False)
    again, acfg = hf.load(tmp_path / "s")
    assert acfg == scfg
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, student))
    released = {k: v for k, v in written.items() if k != "zce_target_ratio"} | {"use_zce_mask": True}
    loaded = hf.config_from_hf(released)
    assert how_of(loaded).free_masked
    assert how_of(loaded).free_share is None
    plain = hf.config_from_hf(released | {"model_type": name})
    assert plain == loaded, "the keys alone say it too"


def test_bad_keys_are_named():
    given = hf.config_to_hf(small(free=(("zero", Z),)))
    with pytest.raises(hf.HFError, match="need the same length"):
        hf.config_from_hf(given | {"zce_types": ["zero", "copy"]})
    with pytest.raises(hf.HFError, match="constant experts"):
        hf.config_from_hf(given | {"zce_types": ["constant"]})
    with pytest.raises(hf.HFError, match="only qwen3_moe, glm4_moe_lite have dynamic forms"):
        hf.config_from_hf(given | {"model_type": "llama"})
    with pytest.raises(hf.HFError, match="no place for the constant slots"):
        hf.config_to_hf(small(free=(("constant", Z),)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe_lite"])
def test_transformers_with_silent_experts_agrees(name, tmp_path):
    """transformers' static model of N + Z experts, the last Z with down projections of zeros, from our files."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cfg = hf.config_from_hf(decoders.CONFIGS[name])
    student, scfg = convert(decoders.weights(cfg), cfg, zero_experts=2, key=KEY)
    how = dataclasses.replace(how_of(cfg), experts=how_of(cfg).experts + 2)
    wcfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, routing=how))

    def widen(r):
        if not hasattr(r.mlp, "experts"):
            return r
        wide = lambda a: jnp.concatenate([a, jnp.zeros((a.shape[0], 2, *a.shape[2:]))], 1)  # noqa: E731
        return dataclasses.replace(r, mlp=dataclasses.replace(r.mlp, experts=jax.tree.map(wide, r.mlp.experts)))

    hf.save(tmp_path / "w", dataclasses.replace(student, runs=tuple(map(widen, student.runs))), wcfg)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "w", torch_dtype=torch.float32).eval()
    tokens = decoders.tokens()
    with torch.no_grad():
        wanted = peer(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(run_forward(student, jnp.asarray(tokens), cfg=scfg), wanted, atol=2e-4)


@pytest.mark.slow
def test_decoding_skips_and_records():
    p, cfg = static_model()
    student, scfg = convert(p, cfg, zero_experts=Z, key=KEY)
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    engine = EngineConfig(sequences=2, length=32, record_routing=True)
    for model in (scfg, static(scfg)):
        for one in generate(student, model, prompts, Sampling(temperature=0.0, max_tokens=6), config=engine):
            fed = jnp.asarray(np.concatenate([one.prompt, one.tokens])[None, :-1])
            wanted = run(student, fed, cfg=model)
            np.testing.assert_array_equal(one.routing, wanted.routing[:, 0])
            assert (np.asarray(one.routing) >= N).any() == (model == scfg)
