"""`examples/zeda_pod.py`: presets against the paper, sharded steps against one device, runs, the real TPU compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import zeda_pod as presets
from examples import zeda_pod as example
from moe import params as parameters
from moe import zeda
from moe.distill import rollouts
from moe.kernels import aot
from moe.models import hf
from moe.models.decode import Completion
from moe.models.transformer import apply, logits, map_mixtures, transformer_specs
from moe.sharding import use_mesh

BIG = {"qwen3_30b_a3b": presets.qwen3_30b_a3b, "glm_4_7_flash": presets.glm_4_7_flash}


@pytest.mark.parametrize(
    ("name", "experts", "zero", "top_k", "rate"),
    [("qwen3_30b_a3b", 128, 64, 8, 5e-6), ("glm_4_7_flash", 64, 32, 4, 1e-6)],
)
def test_presets_are_the_released_runs(name, experts, zero, top_k, rate):
    """Spec section 2: the table of 2.1, w of 2.2, both stages of 2.3."""
    cfg = BIG[name]()
    student = example.student_config(cfg)
    assert cfg.model.moe
    assert student.moe
    routing = cfg.model.moe.routing
    assert (routing.experts, cfg.zero_experts, routing.top_k) == (experts, zero, top_k)
    assert zeda.zero_weight(routing.experts, cfg.zero_experts, cfg.target) == 2
    assert (cfg.alpha, cfg.beta1, cfg.beta2, cfg.weight_decay) == (0.1, 0.9, 0.98, 0.1)
    assert (cfg.sft_batch, cfg.sft_steps, cfg.sft_learning_rate, cfg.sft_warmup) == (128, 469, 2e-5, 0.1)
    assert (cfg.opd_prompts, cfg.opd_samples, cfg.opd_rows, cfg.opd_steps) == (16, 2, 32, 321)
    assert (cfg.opd_learning_rate, cfg.opd_clip, cfg.temperature, cfg.response) == (rate, 0.2, 1.0, 32_768)
    assert student.moe.routing.slots == experts + zero
    assert student.moe.routing.free_share == 0.5
    # What convert makes is what the specs of its config say.
    made = jax.eval_shape(lambda p: example.convert(p, cfg, 0)[0], parameters.abstract(transformer_specs(cfg.model)))
    assert made == parameters.abstract(transformer_specs(student))


def test_adam_of_both_stages():
    """Warm-up and cosine, no decay of norms; a correction bias neither learns nor decays (spec section 2.1)."""
    cfg = presets.glm_4_7_flash()
    ones = {"mlp": {"router_bias": jnp.ones(3), "router": jnp.ones(3)}, "norm": jnp.ones(3)}
    still = jax.tree.map(jnp.zeros_like, ones)
    for stage, rates in ((1, {0: 0.0, 47: 2e-5, 258: 1e-5, 469: 0.0}), (2, dict.fromkeys((0, 47, 258), 1e-6))):
        chosen = example.optimizer(cfg, stage)
        for count, rate in rates.items():
            state = jax.tree.map(
                lambda leaf, count=count: jnp.full_like(leaf, count) if leaf.dtype == jnp.int32 else leaf,
                chosen.init(ones),
            )
            updates, _ = chosen.update(still, state, ones)
            np.testing.assert_allclose(updates["mlp"]["router"], -0.1 * rate, rtol=1e-5, atol=1e-12)
            assert not updates["norm"].any()
        updates, _ = chosen.update(ones, chosen.init(ones), ones)
        assert not updates["mlp"]["router_bias"].any()
        assert (updates["norm"] != 0).all() == (stage == 2)


# ---- the smoke preset on eight host devices
@pytest.fixture(scope="module")
def cfg():
    return presets.smoke()


@pytest.fixture(scope="module")
def teacher(cfg):
    """With selection biases that matter."""
    params = parameters.init(jax.random.key(0), transformer_specs(cfg.model))
    shape = params.runs[0].mlp.router_bias.shape
    bias = 0.1 * jax.random.normal(jax.random.key(1), shape)
    return map_mixtures(params, lambda mixture, _: dataclasses.replace(mixture, router_bias=bias))


def written(cfg, count, seed=0):
    """(ids, given): texts whose prompts are short and whose lengths differ."""
    rng = np.random.default_rng(seed)
    given = rng.integers(2, cfg.prompt, count)
    return [rng.integers(3, cfg.model.vocab, n + rng.integers(2, cfg.response)) for n in given], given


def batch_of(cfg, stage, student):
    if stage == 1:
        ids, given = written(cfg, cfg.answers)
        return example.Answers(cfg, ids, given, seed=0, multiple=8)[0]
    ids, given = written(cfg, cfg.opd_rows)
    rng = np.random.default_rng(1)
    done = []
    for one, prompt in zip(ids, given, strict=True):
        drawn = len(one) - prompt
        record = (student.mixtures, len(one) - 1, student.moe.routing.top_k)
        done.append(
            Completion(
                request=0, sample=0, prompt=one[:prompt], tokens=one[prompt:], finish="length", stop=None, text=None,
                logprobs=rng.normal(-4, 0.1, drawn).astype(np.float32), sampling_logprobs=np.zeros(drawn, np.float32),
                versions=np.zeros(drawn, np.int32),
                routing=rng.random((*record[:2], student.moe.routing.slots)).argsort(-1)[..., : record[2]],
            )
        )  # fmt: skip
    return rollouts(done, length=cfg.length, cfg=student)


def loss_by_hand(cfg, stage, student, params, teacher, batch):
    """The objective of a stage from logits and slots, on one device, without the code of the losses."""
    how, batch = student.moe.routing, jax.tree.map(jnp.asarray, batch)
    where = {"positions": batch["positions"], "segments": batch["segments"], "valid": batch["segments"] > 0}
    seen = apply(
        params, batch["tokens"], cfg=student, observe=lambda r, _: r.logits, **where,
        replay=jnp.moveaxis(batch["routing"], 1, 0) if stage == 2 else None,
    )  # fmt: skip

    def chosen(p, hidden):
        z = np.asarray(logits(p, hidden), np.float64)
        z -= z.max(-1, keepdims=True)
        each = z - np.log(np.exp(z).sum(-1, keepdims=True))
        return np.take_along_axis(each, np.asarray(batch["targets"])[..., None], -1)[..., 0]

    mine, mask = chosen(params, seen.hidden), np.asarray(batch["mask"])
    if stage == 1:
        main = -mine[mask].mean()
    else:
        theirs, old = (
            chosen(teacher, apply(teacher, batch["tokens"], cfg=cfg.model, **where).hidden),
            batch["old_logprobs"],
        )
        ratio, advantage = np.exp(mine - old), theirs - old
        surrogate = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
        main = -np.mean([one[m].mean() for one, m in zip(surrogate, mask, strict=True)])
    group = 0.0
    for layer in np.asarray(seen.observed, np.float64):
        for rows in (slice(0, None, 2), slice(1, None, 2)):  # micro-batches: shares are counted in each (spec 2.2)
            valid = np.asarray(where["valid"])
            scores = 1 / (1 + np.exp(-layer[rows][valid[rows]]))
            scores /= scores.sum(-1, keepdims=True)
            top = np.argsort(-scores, -1)[:, : how.top_k]
            value = zeda.group_loss(jnp.asarray(scores), jnp.asarray(top), how.experts, w=2.0, alpha=0.1)
            group += float(value) * valid[rows].sum() / valid.sum()
    return main + group


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])  # each compiles for some 15 s
def test_a_sharded_step_has_the_loss_of_one_device(cfg, teacher, stage, monkeypatch):
    """fsdp 4 x expert 2 and two micro-batches, against the objective written out on one device."""
    monkeypatch.setattr(example, "POLICY", example.training.Policy(keep=("router",)))  # float32 shows what differs
    mesh, rules = example.place(cfg, jax.devices())
    assert dict(mesh.shape) == {"fsdp": 4, "expert": 2, "tensor": 1}
    made = example.program(cfg, stage, mesh, rules)
    assert made.accumulate == 2
    params, student = example.convert(teacher, cfg, 0)
    assert student == made.student
    batch = batch_of(cfg, stage, student)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in made.batch.items()}
    expected = loss_by_hand(cfg, stage, student, params, teacher, batch)
    placed = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, made.state.params))
    frozen = jax.device_put((teacher,) * (stage - 1), jax.tree.map(lambda leaf: leaf.sharding, made.frozen))
    with use_mesh(mesh, rules):
        state = example.training.init_state(placed, example.optimizer(cfg, stage), jax.random.key(0))
        before = jax.tree.map(np.asarray, state.params)
        state, metrics = made.step(state, example.global_batch(batch, mesh, rules), *frozen)
    np.testing.assert_allclose(float(metrics["loss"]), expected, rtol=2e-5)
    assert metrics.keys() >= {"free_fraction/0", "free_fraction/1", "loss/group"}
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.params, before)
    mixture = moved.runs[0].mlp
    assert moved.embed and mixture.router and mixture.experts.down  # noqa: PT018
    assert not mixture.router_bias


def test_batches_of_answers(cfg):
    """A batch is exactly sft_batch answers, an epoch all of them; every learned token is there once."""
    ids, given = written(cfg, 40)
    source = example.Answers(cfg, ids, given, seed=0, multiple=8)
    assert len(source) == 3
    assert source.rows % 8 == 0
    seen = [source[i] for i in range(3)]
    assert {batch["tokens"].shape for batch in seen} == {(source.rows, cfg.length)}
    learned = sum(int(batch["mask"].sum()) for batch in seen)
    order = np.random.default_rng(0).permutation(40)
    twice = order[:8]  # 3 x 16 answers of 40: the first eight begin the next epoch
    sizes = np.asarray([len(one) for one in ids]) - given
    assert learned == sizes.sum() + sizes[twice].sum()
    documents = sum(len(np.unique(row[row > 0])) for batch in seen for row in batch["segments"])
    assert documents == 48
    with pytest.raises(example.PodError, match="does not fit a row of 24; raise response"):
        example.Answers(cfg, [*ids, np.zeros(40, np.int32)], np.append(given, 1), seed=0, multiple=8)


def test_rows_that_do_not_divide(cfg):
    mesh, rules = example.place(cfg, jax.devices())
    with pytest.raises(example.PodError, match="12 rows do not divide over 8 shards"):
        example.program(cfg, 1, mesh, rules, rows=12)
    with pytest.raises(example.PodError, match="8 devices do not divide over expert 3"):
        example.place(dataclasses.replace(cfg, expert=3), jax.devices())


@pytest.mark.slow
def test_both_stages_run_and_go_on(cfg, teacher, tmp_path):
    """From files to files, on eight host devices; a run cut in two ends as one that was not."""
    hf.save(tmp_path / "teacher", teacher, cfg.model)
    model = hf.config_from_hf(hf.read_config(tmp_path / "teacher"))
    cfg = dataclasses.replace(cfg, model=model)
    ids, given = written(cfg, cfg.answers)
    np.savez(tmp_path / "answers.npz", tokens=np.concatenate(ids), sizes=[len(one) for one in ids], given=given)
    call = dict(model=tmp_path / "teacher", answers=tmp_path / "answers.npz", progress=False, checkpoint_every=1)
    whole = example.run(cfg, 1, out=tmp_path / "whole", **call)
    assert int(whole.step) == cfg.sft_steps == 3
    example.run(cfg, 1, out=tmp_path / "cut", steps=2, **call)
    again = example.run(cfg, 1, out=tmp_path / "cut", **call)
    same = jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), whole.params, again.params)
    assert all(jax.tree.leaves(same))
    student = tmp_path / "whole" / "stage1" / "model"
    done = example.run(cfg, 2, out=tmp_path / "whole", student=student, **call)
    rows = example.training.read_metrics(tmp_path / "whole" / "stage2" / "metrics.jsonl")
    assert int(done.step) == len(rows) == cfg.opd_steps
    assert all(np.isfinite(row["kl"]) for row in rows)


# ---- the real compiler
@pytest.mark.slow
@pytest.mark.aot_tpu
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("name", BIG)
@pytest.mark.parametrize("stage", [1, 2])
def test_fits_the_slice_of_the_preset(name, stage):
    """Both models, both stages: the state takes the place of the old one, all of it fits a chip, and no layer is run
    more often than forward, again for the backward, and forward by the teacher: none to sum the objective's weights.
    """
    cfg = BIG[name]()
    report, made, mesh, _ = example.compiled(cfg, stage, cfg.topology)
    assert mesh.size == 16
    assert report.alias_bytes >= 0.98 * example._bytes_each(made.state)
    total = report.argument_bytes + report.output_bytes - report.alias_bytes + report.temporary_bytes
    assert total + report.code_bytes < 0.97 * aot.CHIPS["v5p"].hbm_bytes
    assert report.collectives["all-gather"] > 0
    runs = len(cfg.model.runs)
    assert report.kernels.count("splash_mha_fwd_segmented_residuals") == 2 * runs
    assert report.kernels.count("splash_mha_fwd_segmented_no_residuals") == (stage - 1) * runs
