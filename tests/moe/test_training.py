"""The train step against plain oracles, and the loop's own promises (interruption is in test_interruption.py)."""

import dataclasses
import json
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import params, training
from moe.checkpoint import CheckpointConfigError, CorruptCheckpointError
from moe.params import FanIn, ParamSpec, zeros
from moe.sharding import DP, FSDP, FSDP_TP_EP, global_batch, make_mesh, use_mesh
from moe.training import DivergedError, Mean, Policy, TrainState

SPECS = {
    "w": ParamSpec((8, 16), ("embed", "mlp"), FanIn()),
    "v": ParamSpec((16, 4), ("mlp", None)),
    "b": ParamSpec((4,), (None,), zeros),
}


def predict(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"] + p["b"]


def masked_loss(p, batch, rng):
    error = (predict(p, batch["x"]) - batch["y"]) ** 2
    return Mean.of(error, batch["mask"][:, None]), {"mae": Mean.of(jnp.sqrt(error + 1e-12), batch["mask"][:, None])}


def two_term_loss(p, batch, rng):
    """Two masked means with masks of their own and a plain scalar, as a multi-task objective has."""
    error = (predict(p, batch["x"]) - batch["y"]) ** 2
    terms = {
        "first": Mean.of(error[:, :2], batch["mask"][:, None]),
        "rest": Mean.of(0.3 * error[:, 2:], (1 - batch["mask"])[:, None]),
        "decay": 1e-2 * jnp.sum(p["w"] ** 2),
    }
    return terms, {}


def make_batch(rows=32, seed=0, keep=0.6):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 8)).astype(np.float32)
    mask = (rng.random(rows) < keep).astype(np.float32)
    return {"x": x, "y": np.sin(2 * x[:, :4]), "mask": mask}


def make_state(optimizer, *mesh_and_rules, ema=False):
    return training.init_state(
        params.init(jax.random.key(0), SPECS, *mesh_and_rules), optimizer, jax.random.key(1), ema=ema
    )


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), **tolerance), a, b)


def same(a, b):
    close(a, b, rtol=0, atol=0)


def host(tree):
    """A copy that survives donation."""
    return jax.tree.map(np.array, tree)


# --- the step
# --------------------------------------------------------------------------------------------------


def test_one_step_is_the_textbook_one():
    """Against gradients of the quotient written out, optax applied by hand."""
    batch, optimizer = make_batch(), optax.adam(1e-2)
    state = make_state(optimizer)
    start = host(state.params)

    def quotient(p):
        weights = np.broadcast_to(batch["mask"][:, None], (32, 4))
        return ((predict(p, batch["x"]) - batch["y"]) ** 2 * weights).sum() / weights.sum()

    loss, grads = jax.value_and_grad(quotient)(start)
    updates, _ = optimizer.update(grads, optimizer.init(start), start)
    state, metrics = training.make_train_step(masked_loss, optimizer)(state, batch)
    close(state.params, optax.apply_updates(start, updates), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-6)
    assert int(state.step) == 1
    assert metrics["mae"] > 0


@pytest.mark.parametrize("loss", [masked_loss, two_term_loss], ids=["masked", "two terms"])
@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_is_one_big_batch(loss, accumulate):
    """The masks of the micro-batches differ (one may be empty), which is where averaging their means goes wrong."""
    batch, optimizer = make_batch(keep=0.3), optax.sgd(1.0)
    whole, one = training.make_train_step(loss, optimizer)(make_state(optimizer), batch)
    parts, many = training.make_train_step(loss, optimizer, accumulate=accumulate)(make_state(optimizer), batch)
    close(parts.params, whole.params, rtol=2e-5, atol=2e-6)
    assert one.keys() == many.keys()
    close(many, one, rtol=2e-5)
    # The test has teeth: the mean over micro-batches of their own means is something else.
    micro = jax.tree.map(lambda x: np.stack([x[m::accumulate] for m in range(accumulate)]), batch)
    naive = np.mean(
        [
            float(masked_loss(whole.params, jax.tree.map(lambda x, m=m: x[m], micro), None)[0].value())
            for m in range(accumulate)
        ]
    )
    exact = float(masked_loss(whole.params, batch, None)[0].value())
    assert abs(naive / exact - 1) > 1e-3


def test_accumulation_computes_the_model_once_per_micro_batch():
    """The pass that sums the weights first must not pay for the model: compiled matmuls are those of one forward and
    backward.
    """
    optimizer, batch = optax.sgd(1.0), make_batch()

    def matmuls(accumulate):
        step = training.make_train_step(masked_loss, optimizer, accumulate=accumulate)
        text = step.lower(make_state(optimizer), batch).compile().as_text()  # pyright: ignore[reportFunctionMemberAccess]
        assert text
        return text.count(" dot(")

    assert matmuls(1) > 0
    assert matmuls(4) <= matmuls(1)


@pytest.mark.parametrize(
    ("rules", "shape"),
    [(DP, {"data": 8}), (FSDP, {"data": 2, "fsdp": 4}), (FSDP_TP_EP, {"data": 2, "fsdp": 2, "tensor": 2})],
    ids=["DP", "FSDP", "FSDP_TP"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_sharded_training_is_the_unsharded_one(rules, shape, accumulate):
    optimizer = optax.adamw(1e-2)
    options: dict[str, Any] = dict(accumulate=accumulate, clip_norm=0.5, ema_decay=0.9)
    plain = make_state(optimizer, ema=True)
    step = training.make_train_step(masked_loss, optimizer, **options)
    mesh = make_mesh(shape)
    placed = make_state(optimizer, mesh, rules, ema=True)
    where = training.state_shardings(placed)
    traces, first = [], 0

    def counted(*arguments):
        traces.append(1)
        return masked_loss(*arguments)

    sharded_step = training.make_train_step(counted, optimizer, shardings=where, **options)
    for seed in range(3):
        batch = make_batch(seed=seed)
        plain, expected = step(plain, batch)
        with use_mesh(mesh, rules):
            placed, got = sharded_step(placed, global_batch(batch, mesh, rules))
        first = first or len(traces)
        close(got, expected, rtol=1e-4, atol=1e-6)
    close(placed.params, plain.params, rtol=1e-4, atol=1e-6)
    close(placed.ema_params, plain.ema_params, rtol=1e-4, atol=1e-6)
    assert training.state_shardings(placed) == where, "every leaf stayed where it was"
    assert len(traces) == first > 0, "nothing was traced again"
    moments = jax.tree_util.tree_leaves_with_path(placed.opt_state)
    splits = {leaf.sharding.spec for path, leaf in moments if params.path_name(path).endswith("mu/w")}
    assert splits == {placed.params["w"].sharding.spec}, "the moments lie with their parameters"


def test_clipping():
    optimizer, batch = optax.sgd(1.0), make_batch()
    state = make_state(optimizer)
    start = host(state.params)
    state, metrics = training.make_train_step(masked_loss, optimizer, clip_norm=1e-3)(state, batch)
    moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, state.params, start))
    np.testing.assert_allclose(moved, 1e-3, rtol=1e-2)
    assert metrics["grad_norm"] > 1e-2, "the norm before clipping is reported"


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_guard_skips_and_counts(where):
    def poisoned(p, batch, rng):
        objective, metrics = masked_loss(p, batch, rng)
        bad = batch["bad"].any()
        if where == "loss":
            return dataclasses.replace(objective, total=objective.total * jnp.where(bad, jnp.nan, 1.0)), metrics
        # sqrt has an infinite slope at 0: the loss is finite, its gradient is not.
        return {"main": objective, "bad": jnp.sqrt(jnp.where(bad, 0.0, 1.0) * jnp.sum(p["w"] ** 2))}, metrics

    optimizer = optax.adam(1e-2)
    step = training.make_train_step(poisoned, optimizer, ema_decay=0.5)
    good, bad = (make_batch() | {"bad": np.full(32, flag)} for flag in (False, True))
    state, _ = step(make_state(optimizer, ema=True), good)
    before = host((state.params, state.opt_state, state.ema_params))
    for count in (1, 2):
        state, metrics = step(state, bad)
        same((state.params, state.opt_state, state.ema_params), before)
        assert (int(state.skipped), int(state.skipped_run)) == (count, count)
        assert not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
    state, metrics = step(state, good)
    assert (int(state.step), int(state.skipped), int(state.skipped_run)) == (4, 2, 0)
    assert np.isfinite(metrics["loss"])
    assert not np.array_equal(state.params["w"], before[0]["w"])
    # Without the guard the same batch destroys the parameters.
    unguarded, _ = training.make_train_step(poisoned, optimizer, ema_decay=0.5, nan_guard=False)(state, bad)
    assert np.isnan(unguarded.params["w"]).any()


def test_a_batch_without_targets_changes_nothing():
    optimizer = optax.sgd(1.0)
    batch = make_batch() | {"mask": np.zeros(32, np.float32), "y": np.full((32, 4), np.nan, np.float32)}

    def loss(p, batch, rng):
        kept = jnp.where(batch["mask"][:, None] > 0, batch["y"], 0)
        return Mean.of((predict(p, batch["x"]) - kept) ** 2, batch["mask"][:, None]), {}

    state = make_state(optimizer)
    start = host(state.params)
    state, metrics = training.make_train_step(loss, optimizer, accumulate=2)(state, batch)
    same(state.params, start)
    assert (float(metrics["loss"]), float(metrics["grad_norm"]), int(state.skipped)) == (0, 0, 0)


def test_average():
    optimizer, decay = optax.sgd(0.1), 0.8
    step = training.make_train_step(masked_loss, optimizer, ema_decay=decay)
    state = make_state(optimizer, ema=True)
    average = host(state.params)
    for seed in range(3):
        state, _ = step(state, make_batch(seed=seed))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * np.asarray(p), average, state.params)
    close(state.ema_params, average, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="needs a state made with ema=True"):
        step(make_state(optimizer), make_batch())


def test_policy_casts_parameters_not_batches():
    seen = {}

    def loss(p, batch, rng):
        seen.update({name: leaf.dtype for name, leaf in p.items()}, x=batch["x"].dtype)
        return masked_loss(p, batch, rng)

    optimizer = optax.sgd(0.1)
    state = make_state(optimizer)
    step = training.make_train_step(loss, optimizer, policy=Policy("bfloat16", keep=("^b$",)))
    state, metrics = step(state, make_batch())
    assert seen == {"w": jnp.bfloat16, "v": jnp.bfloat16, "b": jnp.float32, "x": jnp.float32}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    _, exact = training.make_train_step(masked_loss, optimizer)(make_state(optimizer), make_batch())
    assert 0 < abs(float(metrics["loss"] / exact["loss"]) - 1) < 0.02
    with pytest.raises(ValueError, match="float31"):
        Policy("float31")


def test_random_numbers_depend_on_seed_and_step_only():
    def noise(p, batch, rng):
        return jnp.sum(p["w"]) * 0, {"noise": jax.random.normal(rng)}

    optimizer = optax.sgd(0.1)
    step = training.make_train_step(noise, optimizer)
    state, draws = make_state(optimizer), []
    for _ in range(3):
        state, metrics = step(state, make_batch())
        draws.append(float(metrics["noise"]))
    assert len(set(draws)) == 3
    again = dataclasses.replace(make_state(optimizer), step=jnp.int32(2))
    assert float(step(again, make_batch())[1]["noise"]) == draws[2]


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.2, 0.9, 1.0]))
def test_mean_is_numpys_and_adds_up(seed, kept):
    rng = np.random.default_rng(seed)
    rows, columns = 3, 4
    values = rng.normal(size=(rows, columns)).astype(np.float32)
    mask = rng.random((rows, columns)) < kept
    poisoned = np.where(mask, values, np.nan).astype(np.float32)
    mean = Mean.of(jnp.asarray(poisoned), jnp.asarray(mask))
    want = values[mask].mean() if mask.any() else 0.0
    np.testing.assert_allclose(mean.value(), want, rtol=1e-4, atol=1e-6)
    parts = [Mean.of(jnp.asarray(poisoned[i]), jnp.asarray(mask[i])) for i in range(rows)]
    summed = Mean(sum(p.total for p in parts), sum(p.weight for p in parts))
    np.testing.assert_allclose(summed.value(), want, rtol=1e-4, atol=1e-6)
    gradient = jax.grad(lambda v: Mean.of(v, jnp.asarray(mask)).value())(jnp.asarray(poisoned))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (lambda p, b, r: (Mean.of(predict(p, b["x"])), {"loss": 1.0}), {}, r"\['loss'\]"),
        (lambda p, b, r: (predict(p, b["x"]), {}), {}, r"shape \(32, 4\).*reduce"),
        (masked_loss, {"accumulate": 5}, "32 rows does not divide into accumulate=5"),
        (masked_loss, {"accumulate": 0}, "at least 1"),
    ],
)
def test_wrong_losses_are_explained(loss, options, message):
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=message):
        training.make_train_step(loss, optimizer, **options)(make_state(optimizer), make_batch())


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-2),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3)),
        optax.multi_transform(
            {"a": optax.adam(1e-2), "s": optax.sgd(0.1, momentum=0.9)}, {"w": "a", "v": "s", "b": "s"}
        ),
    ],
    ids=["adamw", "lion", "multi"],
)
def test_abstract_state_describes_the_state(optimizer):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    state = make_state(optimizer, mesh, FSDP_TP_EP, ema=True)
    described = training.abstract_state(params.abstract(SPECS, mesh, FSDP_TP_EP), optimizer, ema=True)
    assert jax.tree.structure(state) == jax.tree.structure(described)
    for (path, leaf), want in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(described), strict=True):
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype)
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim), path
    split = [leaf.sharding.spec for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (8, 16)]
    assert split
    assert set(split) == {state.params["w"].sharding.spec}


# --- the loop
# --------------------------------------------------------------------------------------------------


def batches():
    table = [{name: value[i] for name, value in make_batch(64).items()} for i in range(64)]
    return iter(grain.MapDataset.source(table).seed(2).shuffle().repeat().batch(16).to_iter_dataset())


OPTIMIZER = optax.adam(1e-2)


@pytest.fixture(scope="module")
def step():
    return training.make_train_step(masked_loss, OPTIMIZER)


def losses(directory):
    return {row["step"]: row["loss"] for row in training.read_metrics(directory / "metrics.jsonl") if "loss" in row}


def test_fit_resumes_exactly(step, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options: dict[str, Any] = dict(checkpoint_every=8, log_every=1, progress=False)
    state = training.fit(step, make_state(OPTIMIZER), batches(), steps=20, directory=whole, **options)
    training.fit(step, make_state(OPTIMIZER), batches(), steps=11, directory=halves, **options)
    # A kill after step 11 was saved may leave later rows, and one cut off.
    with (halves / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "loss": 99.0}\n{"step": 13, "lo')
    resumed = training.fit(step, make_state(OPTIMIZER), batches(), steps=20, directory=halves, **options)
    same(resumed.params, state.params)
    assert losses(halves) == losses(whole)
    assert list(losses(whole)) == list(range(1, 21))
    assert losses(whole)[20] < losses(whole)[1]
    # Nothing is left to do: the state comes back as it was.
    same(
        training.fit(step, make_state(OPTIMIZER), batches(), steps=20, directory=halves, **options).params, state.params
    )


def test_fit_without_a_directory_logs_nothing_and_trains_the_same(step, tmp_path):
    state = training.fit(step, make_state(OPTIMIZER), batches(), steps=5, progress=False)
    other = training.fit(step, make_state(OPTIMIZER), batches(), steps=5, directory=tmp_path, progress=False)
    same(state.params, other.params)


def test_fit_evaluates(step, tmp_path):
    training.fit(
        step,
        make_state(OPTIMIZER),
        batches(),
        steps=7,
        directory=tmp_path,
        evaluate=lambda state: {"w": jnp.sum(state.params["w"]), "bad": float("nan")},
        evaluate_every=3,
        log_every=100,
        progress=False,
    )
    rows = [row for row in training.read_metrics(tmp_path / "metrics.jsonl") if "evaluation/w" in row]
    assert [row["step"] for row in rows] == [3, 6, 7]
    assert [row["evaluation/bad"] for row in rows] == [None] * 3
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def test_fit_refuses_another_config_and_a_damaged_checkpoint(step, tmp_path):
    options: dict[str, Any] = dict(directory=tmp_path, progress=False)
    training.fit(step, make_state(OPTIMIZER), batches(), steps=3, config={"width": 16, "steps": 3}, **options)
    with pytest.raises(CheckpointConfigError, match=r"width \(16 saved, 32 now\)"):
        training.fit(
            step,
            make_state(OPTIMIZER),
            batches(),
            steps=5,
            config={"width": 32, "steps": 5},
            ignore=["steps"],
            **options,
        )
    state = training.fit(
        step, make_state(OPTIMIZER), batches(), steps=5, config={"width": 16, "steps": 5}, ignore=["steps"], **options
    )
    assert int(state.step) == 5
    (tmp_path / "checkpoints" / "5" / "manifest" / "metadata").write_text("{}")
    with pytest.raises(CorruptCheckpointError, match="go on from step 3"):
        training.fit(step, make_state(OPTIMIZER), batches(), steps=6, **options)


def test_fit_stops_when_nothing_but_nans_come(tmp_path):
    def hopeless(p, batch, rng):
        return jnp.sum(p["w"]) * jnp.nan, {}

    step = training.make_train_step(hopeless, OPTIMIZER)
    with pytest.raises(DivergedError, match="the last 6 updates up to step 6"):
        training.fit(
            step,
            make_state(OPTIMIZER),
            batches(),
            steps=50,
            max_skipped=5,
            log_every=2,
            progress=False,
            directory=tmp_path,
        )


def test_fit_says_where_the_data_ended(step):
    short = iter(grain.MapDataset.source([make_batch(16, seed=i) for i in range(3)]).to_iter_dataset())
    with pytest.raises(ValueError, match="ended after 3 of 5 steps"):
        training.fit(step, make_state(OPTIMIZER), short, steps=5, progress=False)


def test_train_state_is_a_tree():
    state = make_state(OPTIMIZER)
    assert isinstance(jax.tree.map(lambda x: x, state), TrainState)
    assert params.path_name(jax.tree_util.tree_leaves_with_path(state)[1][0]) == "params/b"
