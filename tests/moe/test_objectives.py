"""moe.objectives against a loss written out in numpy float64, and its gradients against the unchunked ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe import data, objectives, params, routing, training
from moe.layers.attention import GQAConfig
from moe.layers.moe import MoEConfig
from moe.layers.rotary import RotaryConfig
from moe.models.transformer import TransformerConfig, apply, forward, transformer_specs
from moe.objectives import LossConfig, language_model_loss, token_loss

V = 40


def model(**router):
    return TransformerConfig(
        family="qwen3_moe", vocab=V, width=16, layers=("moe",) * 2, hidden=16,
        attention=GQAConfig(2, 1, 8, RotaryConfig(8), qk_norm=True),
        moe=MoEConfig(routing.RoutingConfig(4, 2, **router), hidden=16),
    )  # fmt: skip


def weights(cfg, scale=8.0):
    """Larger than initial ones, so that logits and routers have opinions."""
    p = params.init(jax.random.key(0), transformer_specs(cfg))
    return dataclasses.replace(p, embed=p.embed * scale, head=p.head * scale)


def packed(rows=4, length=24, seed=0):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, V, n).tolist() for n in rng.integers(3, 20, 12)]
    stored = data.documents(ids, prompts=[1] * len(ids))
    source = data.PackedRows(stored, length=length)
    batch = next(data.in_order(source, max(rows, len(source))))
    assert (batch["segments"] == 0).any()
    assert (batch["segments"] > 1).any()
    return {name: jnp.asarray(value) for name, value in batch.items()}, ids


def losses(p, batch, cfg, **options):
    """language_model_loss in one compiled call: op by op it takes a minute."""
    return jax.jit(functools.partial(language_model_loss, cfg=cfg, **options))(p, batch)


def by_hand(p, cfg, ids):
    """Mean over counted tokens of -log softmax, every document a sequence of its own, in float64."""
    alone = np.zeros((len(ids), max(map(len, ids))), np.int32)  # what follows a document does not change it
    for row, one in zip(alone, ids, strict=True):
        row[: len(one)] = one
    scores = np.asarray(jax.jit(functools.partial(forward, cfg=cfg))(p, jnp.asarray(alone)), np.float64)
    total = count = 0.0
    for z, one in zip(scores, ids, strict=True):
        z = z[: len(one) - 1]
        log_p = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
        nll = -log_p[np.arange(len(one) - 1), one[1:]]
        total, count = total + nll.sum(), count + len(nll)
    return total / count, count


def observed(p, batch, cfg, observe):
    """`Output` of the batch with what `observe` saw, compiled."""
    return jax.jit(
        lambda p, b: apply(p, b["tokens"], cfg=cfg, positions=b["positions"], segments=b["segments"],
                           valid=b["segments"] > 0, observe=observe)
    )(p, batch)  # fmt: skip


def test_packed_loss_is_the_mean_over_documents_seen_alone():
    cfg = model()
    p = weights(cfg)
    batch, ids = packed()
    objective, metrics = losses(p, batch, cfg, loss=LossConfig(switch=0.0, router_z=0.0))
    want, count = by_hand(p, cfg, ids)
    assert objective.keys() == {"nll"}
    assert float(objective["nll"].weight) == count
    np.testing.assert_allclose(objective["nll"].value(), want, rtol=1e-5)
    assert 0 <= float(metrics["accuracy"].value()) <= 1


@pytest.mark.parametrize("chunk", [1, 5, 8, 24, 100])
def test_chunks_change_neither_loss_nor_gradient(chunk):
    cfg = model()
    p = weights(cfg)
    hidden = jax.random.normal(jax.random.key(1), (3, 24, 16))
    targets = jax.random.randint(jax.random.key(2), (3, 24), 0, V)
    scale = jax.random.normal(jax.random.key(3), (3, 24))

    def total(head, hidden, size):
        each = token_loss(dataclasses.replace(p, head=head), hidden, targets, chunk=size)
        return (each.nll * scale).sum() + (each.log_z**2 * scale).sum(), each

    (_, want), want_grad = jax.value_and_grad(total, (0, 1), has_aux=True)(p.head, hidden, None)
    (_, got), got_grad = jax.value_and_grad(total, (0, 1), has_aux=True)(p.head, hidden, chunk)
    for a, b in zip(jax.tree.leaves((got, got_grad)), jax.tree.leaves((want, want_grad)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_the_logits_of_the_whole_sequence_never_exist():
    """Largest array in the compiled forward and backward: far below [B, S, V]."""
    cfg = dataclasses.replace(model(), vocab=2000)
    p = jax.eval_shape(lambda: params.init(jax.random.key(0), transformer_specs(cfg)))
    hidden = jax.ShapeDtypeStruct((2, 512, 16), jnp.bfloat16)
    targets = jax.ShapeDtypeStruct((2, 512), jnp.int32)

    def memory(chunk):
        def total(p, hidden, targets):
            return token_loss(p, hidden, targets, chunk=chunk).nll.sum()

        compiled = jax.jit(jax.grad(total)).lower(p, hidden, targets).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    whole = 2 * 512 * 2000 * 4
    assert memory(None) >= whole
    assert memory(32) < whole / 4


def test_nothing_leaks_from_padding_or_masked_targets():
    cfg = model()
    p = weights(cfg)
    batch, _ = packed()
    rubbish = {
        **batch,
        "tokens": jnp.where(batch["segments"] > 0, batch["tokens"], V - 1),
        "targets": jnp.where(batch["mask"], batch["targets"], 3),
    }
    for a, b in zip(
        jax.tree.leaves(losses(p, batch, cfg)),
        jax.tree.leaves(losses(p, rubbish, cfg)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_router_losses_are_means_over_layers_of_the_published_formulas():
    cfg = model()
    p = weights(cfg)
    batch, _ = packed()
    objective, metrics = losses(p, batch, cfg, loss=LossConfig(z=0.5, switch=0.25, router_z=0.125))
    valid = np.asarray(batch["segments"] > 0)
    out = observed(p, batch, cfg, lambda r, c: r)
    switch, z = [], []
    for layer in range(2):
        logits = np.asarray(out.observed.logits[layer], np.float64)[valid]
        index = np.asarray(out.observed.index[layer])[valid]
        probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        share = np.bincount(index.ravel(), minlength=4) / index.size
        switch.append(4 * (share * probability.mean(0)).sum())
        z.append((np.log(np.exp(logits).sum(-1)) ** 2).mean())
        for e in range(4):
            np.testing.assert_allclose(metrics[f"load/{layer}/{e}"].value(), share[e], rtol=1e-6)
        want = -(probability * np.log(probability)).sum(-1).mean()
        np.testing.assert_allclose(metrics[f"entropy/{layer}"].value(), want, rtol=1e-4)
        np.testing.assert_allclose(metrics[f"max_violation/{layer}"].value(), 4 * share.max() - 1, rtol=1e-4)
    np.testing.assert_allclose(objective["switch"].value(), 0.25 * np.mean(switch), rtol=1e-5)
    np.testing.assert_allclose(objective["router_z"].value(), 0.125 * np.mean(z), rtol=1e-4)
    log_z = np.asarray(jax.nn.logsumexp(p.head.astype(jnp.float32) @ out.hidden[..., None], axis=(-2, -1)), np.float64)
    np.testing.assert_allclose(objective["z"].value(), 0.5 * (log_z[np.asarray(batch["mask"])] ** 2).mean(), rtol=1e-4)


def test_frozen_biases_and_loads_that_nobody_reads_leave_no_trace():
    cfg = model(scoring="sigmoid", selection_bias=True)
    p, (batch, _) = weights(cfg), packed()
    full, off = (losses(p, batch, cfg, loss=LossConfig(balance=on, loads=on)) for on in (True, False))
    assert full[0].keys() - off[0].keys() == {"balance"}
    assert full[1].keys() - off[1].keys() == {f"load/{layer}/{e}" for layer in range(2) for e in range(4)}
    jax.tree.map(np.testing.assert_array_equal, off[0], {name: full[0][name] for name in off[0]})


def test_sources_split_the_loss():
    cfg = model()
    p = weights(cfg)
    batch, _ = packed()
    batch["source"] = jnp.arange(len(batch["tokens"])) % 2
    objective, metrics = losses(p, batch, cfg, sources=("text", "tasks"))
    parts = [metrics["nll/text"], metrics["nll/tasks"]]
    assert all(float(part.weight) > 0 for part in parts)
    np.testing.assert_allclose(sum(part.total for part in parts), objective["nll"].total, rtol=1e-6)


def steps_of(cfg, batch, *, accumulate, optimizer, count=1, clip=None):
    loss = LossConfig(switch=0.0)
    step = training.make_train_step(
        lambda p, b, rng: language_model_loss(p, b, cfg=cfg, loss=loss), optimizer, accumulate=accumulate,
        clip_norm=clip,
    )  # fmt: skip
    state = training.init_state(weights(cfg), optimizer, jax.random.key(0))
    for _ in range(count):
        state, metrics = step(state, batch)
    return state, metrics


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_selection_bias_follows_the_rule_and_nothing_else(accumulate):
    cfg = model(scoring="sigmoid", selection_bias=True)
    batch, _ = packed(rows=6)
    batch = {name: value[:6] for name, value in batch.items()}
    optimizer = objectives.balance_by_bias(optax.adamw(1e-3), rate=0.01)
    before = weights(cfg)
    state, metrics = steps_of(cfg, batch, accumulate=accumulate, optimizer=optimizer)
    out = observed(before, batch, cfg, lambda r, c: routing.counts(r))
    old = objectives.selection_biases(before)
    new = objectives.selection_biases(state.params)
    assert old is not None
    assert new is not None
    for layer in range(2):
        want = routing.update_bias(old[layer], out.observed[layer], 0.01)
        assert (np.asarray(out.observed[layer]) != np.asarray(out.observed[layer]).mean()).any()
        np.testing.assert_array_equal(np.asarray(new[layer]), np.asarray(want))
    assert float(metrics["loss/balance"]) == 0
    plain, plain_metrics = steps_of(cfg, batch, accumulate=accumulate, optimizer=optax.adamw(1e-3))
    np.testing.assert_allclose(metrics["grad_norm"], plain_metrics["grad_norm"], rtol=1e-6)
    np.testing.assert_allclose(state.params.embed, plain.params.embed, rtol=1e-6)


@pytest.mark.slow
def test_the_bias_evens_out_a_lopsided_router():
    cfg = model(scoring="sigmoid", selection_bias=True)
    batch, _ = packed()
    frozen = optax.set_to_zero()
    optimizer = objectives.balance_by_bias(frozen, rate=0.003)
    _, first = steps_of(cfg, batch, accumulate=1, optimizer=optimizer)
    _, last = steps_of(cfg, batch, accumulate=1, optimizer=optimizer, count=150)
    for layer in range(2):
        assert float(last[f"max_violation/{layer}"]) < 0.5 * float(first[f"max_violation/{layer}"])


def test_dense_models_have_no_router_terms():
    cfg = dataclasses.replace(model(), family="qwen3", layers=("dense",) * 2, moe=None)
    p = weights(cfg)
    batch, ids = packed()
    objective, metrics = losses(p, batch, cfg)
    np.testing.assert_allclose(objective["nll"].value(), by_hand(p, cfg, ids)[0], rtol=1e-5)
    assert objective.keys() == {"nll"}
    assert metrics.keys() == {"accuracy"}
    assert objectives.selection_biases(p) is None


@pytest.mark.parametrize(("name", "value"), [("z", -1.0), ("switch", float("nan")), ("router_z", float("inf"))])
def test_coefficients_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} .*finite"):
        LossConfig(**{name: value})
