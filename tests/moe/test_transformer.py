"""The decoder against transformers (golden logits), against itself in other forms (cache, packing, padding, shards),
and its gradients against finite differences.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import params, routing, training
from moe.layers import attend
from moe.layers.cache import CacheError
from moe.models import hf
from moe.models.transformer import (
    ModelError,
    Output,
    TransformerConfig,
    apply,
    forward,
    logits,
    make_cache,
    restack,
    transformer_specs,
    unstack,
)
from moe.routing import switch_loss
from moe.sharding import DP, FSDP_EP, FSDP_TP_EP, batch_sharding, make_mesh, use_mesh
from tests.moe.golden import decoders

GOLDEN = np.load(decoders.FILE)
every_family = pytest.mark.parametrize("name", decoders.CONFIGS)
MIXED = ("qwen3_moe_mixed", "longcat_flash")

jitted = jax.jit(apply, static_argnames=("cfg", "observe", "experts", "remat"))
jitted_forward = jax.jit(forward, static_argnames="cfg")


@functools.cache
def model(name):
    cfg = hf.config_from_hf(decoders.CONFIGS[name])
    return decoders.weights(cfg), cfg


@functools.cache
def whole(name):
    """Logits of the whole sequences, without a cache."""
    weights, cfg = model(name)
    return np.asarray(jitted_forward(weights, jnp.asarray(decoders.tokens()), cfg=cfg))


@every_family
def test_logits_are_those_of_transformers(name):
    assert np.abs(GOLDEN[name]).max() > 2  # the tiny models are not degenerate
    np.testing.assert_allclose(whole(name), GOLDEN[name], atol=2e-4)


@pytest.mark.slow
@every_family
def test_golden_logits_are_what_transformers_computes_today(name, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    np.testing.assert_allclose(decoders.by_transformers(name), GOLDEN[name], atol=2e-5)


@every_family
def test_cached_decoding_gives_the_forward_logits(name):
    """Two prompts of unequal length, prefilled right-padded in two chunks into scattered pages, then token by token."""
    weights, cfg = model(name)
    tokens = jnp.asarray(decoders.tokens())
    lengths = np.array([13, 9])
    cache = make_cache(weights, cfg, batch=2, length=24, page_size=4, pages=12)
    cache = cache.replace(table=jnp.asarray([[7, 2, 9, 0, 11, 4], [3, 8, 1, 10, 5, 6]], jnp.int32))
    got = np.full(whole(name).shape, np.nan, np.float32)
    at = np.zeros(2, int)
    for size in (8, 8, *[1] * 13):
        ends = np.minimum(at + size, lengths) if size > 1 else np.minimum(at + 1, decoders.LENGTH)
        positions = at[:, None] + np.arange(size)
        valid = positions < ends[:, None]
        inputs = jnp.take_along_axis(tokens, np.minimum(positions, decoders.LENGTH - 1), 1)
        out = jitted(weights, inputs, cfg=cfg, cache=cache, valid=jnp.asarray(valid), positions=jnp.asarray(positions))
        cache = out.cache
        for row in range(2):
            got[row, at[row] : ends[row]] = logits(weights, out.hidden)[row, : ends[row] - at[row]]
        at = ends
        np.testing.assert_array_equal(cache.length, at)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, whole(name), atol=1e-4)


@pytest.mark.parametrize("name", ["llama_tied", "glm4_moe_lite", "longcat_flash"])
def test_packed_and_padded_sequences_are_those_alone(name):
    weights, cfg = model(name)
    tokens = jnp.asarray(decoders.tokens())[:1]
    alone = [whole(name)[:1, :12], np.asarray(jitted_forward(weights, tokens[:, 12:], cfg=cfg))]
    segments = jnp.asarray([[0] * 12 + [1] * 9 + [2] * 3])
    positions = jnp.asarray([[*range(12), *range(9), *range(3)]])
    out = jitted(weights, jnp.concatenate([tokens, tokens[:, :3]], 1), cfg=cfg, segments=segments, positions=positions)
    got = np.asarray(logits(weights, out.hidden))
    np.testing.assert_allclose(got[:, :21], np.concatenate(alone, 1), atol=1e-4)
    # Padding before and after, with whatever tokens, changes nothing.
    valid = jnp.asarray([[False] * 2 + [True] * 21 + [False]])
    padded = jnp.concatenate([tokens[:, 5:7], tokens, tokens[:, 9:10]], 1)
    shifted = jnp.asarray([[40, 41, *range(21), 3]])
    out = jitted(weights, padded, cfg=cfg, valid=valid, positions=shifted)
    np.testing.assert_allclose(logits(weights, out.hidden)[:, 2:23], whole(name)[:1], atol=1e-4)
    if out.routing is not None:
        assert cfg.moe is not None
        assert (out.routing[:, ~valid] == cfg.moe.routing.slots).all()


@pytest.mark.parametrize("name", MIXED)
def test_replay_follows_the_record_and_observe_sees_every_mixture(name):
    weights, cfg = model(name)
    assert cfg.moe is not None
    tokens = jnp.asarray(decoders.tokens())

    def observe(r, c):
        return {"counts": routing.counts(r), "switch": switch_loss(r, c).value()}

    out = jitted(weights, tokens, cfg=cfg, observe=observe)
    assert out.routing.shape == (cfg.mixtures, *tokens.shape, cfg.moe.routing.top_k)
    assert out.observed["switch"].shape == (cfg.mixtures,)
    for counts, index in zip(out.observed["counts"], out.routing, strict=True):
        np.testing.assert_array_equal(counts, np.bincount(np.ravel(index), minlength=cfg.moe.routing.slots))
    again = jitted(weights, tokens, cfg=cfg, replay=out.routing)
    np.testing.assert_allclose(again.hidden, out.hidden, atol=1e-5)
    other = jitted(weights, tokens, cfg=cfg, replay=(out.routing + 1) % cfg.moe.routing.experts)
    assert np.abs(np.asarray(other.hidden - out.hidden)).max() > 0.1
    np.testing.assert_array_equal(other.routing, (out.routing + 1) % cfg.moe.routing.experts)


@pytest.mark.parametrize("name", MIXED)
def test_unstacked_parameters_are_the_same_model(name):
    weights, cfg = model(name)
    single = unstack(weights)
    assert len(single.runs) == len(cfg.layers)
    tokens = jnp.asarray(decoders.tokens())
    np.testing.assert_allclose(jitted_forward(single, tokens, cfg=cfg), whole(name), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, restack(single, cfg), weights)


def lm_loss(weights, batch, replay, cfg, remat=False):
    out = apply(weights, batch, cfg=cfg, remat=remat, replay=replay)
    scores = jax.nn.log_softmax(logits(weights, out.hidden))
    return -jnp.take_along_axis(scores[:, :-1], batch[:, 1:, None], -1).mean()


@pytest.mark.parametrize(
    "name",
    ["longcat_flash", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3_moe_mixed", "glm4_moe_lite_groups"))],
)
def test_gradients_against_finite_differences(name):
    """Leaf by leaf along the gradient, with the routing replayed (it jumps)."""
    weights, cfg = model(name)
    tokens = jnp.asarray(decoders.tokens())
    replay = jitted(weights, tokens, cfg=cfg).routing
    loss = jax.jit(lm_loss, static_argnames=("cfg", "remat"))
    grad = jax.jit(jax.grad(lm_loss), static_argnames=("cfg", "remat"))(weights, tokens, replay, cfg=cfg)
    leaves, tree = jax.tree.flatten(weights)
    for number, (path, g) in enumerate(jax.tree_util.tree_leaves_with_path(grad)):
        if "router_bias" in jax.tree_util.keystr(path):
            assert not np.any(g)  # selection only
            continue
        norm = float(jnp.linalg.norm(g))
        assert norm > 1e-4, path
        step = 4e-3 / norm**2

        def moved(sign, number=number, step=step, g=g):
            changed = [*leaves[:number], leaves[number] + sign * step * g, *leaves[number + 1 :]]
            return float(loss(jax.tree.unflatten(tree, changed), tokens, replay, cfg=cfg))

        assert (moved(1) - moved(-1)) / (2 * step) == pytest.approx(norm**2, rel=0.05), (name, path)


@pytest.mark.slow
def test_recomputation_changes_no_gradient():
    weights, cfg = model("qwen3_moe")
    tokens = jnp.asarray(decoders.tokens())
    grad = jax.jit(jax.grad(lm_loss), static_argnames=("cfg", "remat"))
    kept, redone = (grad(weights, tokens, None, cfg=cfg, remat=remat) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-3), kept, redone)


def test_long_sequences_go_in_blocks_of_queries():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 37, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    positions = jnp.broadcast_to(jnp.arange(37), (2, 37))
    segments = jnp.asarray([[0] * 20 + [1] * 17, [0] * 37])
    where = dict(query_positions=positions, key_positions=positions, query_segments=segments, key_segments=segments)

    def blocked(q, k, v, size=16):
        return attend(q, k, v, scale=0.3, window=11, query_block=size, **where)

    def dense(q, k, v):  # by hand, head by head
        seen = (positions[:, :, None] >= positions[:, None]) & (positions[:, :, None] - positions[:, None] < 11)
        seen &= segments[:, :, None] == segments[:, None]
        heads = []
        for h in range(4):
            scores = jnp.where(seen, jnp.einsum("bsk,btk->bst", q[:, :, h], k[:, :, h // 2]) * 0.3, -jnp.inf)
            heads.append(jax.nn.softmax(scores, -1) @ v[:, :, h // 2])
        return jnp.stack(heads, 2)

    def scalar(f):
        return jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1, 2))(q, k, v)

    for size in (16, 512):
        np.testing.assert_allclose(blocked(q, k, v, size), dense(q, k, v), atol=1e-5)
    for a, b in zip(scalar(blocked), scalar(dense), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "rules", "shape"),
    [
        ("qwen3_moe", DP, {"data": 8}),
        ("qwen3_moe", FSDP_EP, {"fsdp": 2, "expert": 4}),
        ("glm4_moe_lite", FSDP_TP_EP, {"fsdp": 2, "expert": 2, "tensor": 2}),
    ],
)
def test_sharded_logits_are_those_of_one_device(name, rules, shape):
    config = decoders.CONFIGS[name] | {"vocab_size": 64}
    cfg = hf.config_from_hf(config)
    weights = decoders.weights(cfg)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (8, 12)))
    expected = jitted_forward(weights, tokens, cfg=cfg)
    mesh = make_mesh(shape)
    placed = jax.device_put(weights, params.shardings(transformer_specs(cfg), mesh, rules))
    with use_mesh(mesh, rules):
        got = jitted_forward(placed, jax.device_put(tokens, batch_sharding(mesh, rules)), cfg=cfg)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_bfloat16_keeps_router_and_logits_in_float32():
    weights, cfg = model("qwen3_moe")
    half = training.Policy("bfloat16", keep=("router",)).cast(weights)
    seen = []

    def observe(r, _):
        seen.append(r.logits.dtype)
        return r.weights

    out = apply(half, jnp.asarray(decoders.tokens()), cfg=cfg, observe=observe)
    assert out.hidden.dtype == jnp.bfloat16
    assert set(seen) == {jnp.dtype(jnp.float32)}
    assert half.runs[0].mlp.router.dtype == jnp.float32
    got = logits(half, out.hidden)
    assert got.dtype == jnp.float32
    # Tokens of near-equal experts may go elsewhere under rounding; most logits must agree.
    assert np.median(np.abs(np.asarray(got) - whole("qwen3_moe"))) < 0.05


def test_errors_name_value_and_remedy():
    weights, cfg = model("qwen3_moe")
    tokens = jnp.asarray(decoders.tokens())
    with pytest.raises(ModelError, match="kind 'sparse'"):
        dataclasses.replace(cfg, layers=("sparse",))
    with pytest.raises(ModelError, match="needs a MoEConfig"):
        TransformerConfig("llama", 8, 8, ("moe",), cfg.attention, 8)
    with pytest.raises(ModelError, match="must start with"):
        apply(weights, tokens, cfg=cfg, replay=jnp.zeros((1, 2, 21, 3), jnp.int32))
    with pytest.raises(CacheError, match="make it with make_cache"):
        apply(unstack(weights), tokens, cfg=cfg, cache=make_cache(weights, cfg, batch=2, length=32))
    with pytest.raises(CacheError, match="3 sequences"):
        apply(weights, jnp.zeros((3, 4), jnp.int32), cfg=cfg, cache=make_cache(weights, cfg, batch=2, length=32))
    cache = make_cache(weights, cfg, batch=2, length=32)
    with pytest.raises(ModelError, match="exclude"):
        apply(weights, tokens, cfg=cfg, cache=cache, segments=jnp.zeros_like(tokens))
    assert isinstance(apply(weights, tokens[:, :1], cfg=cfg), Output)
