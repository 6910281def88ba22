"""Cycling and roll-out, missing targets, precision, and training over devices, processes and interruptions."""

import dataclasses
import functools
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earth import model, objectives, propagator, windows
from earth.model import EarthConfig, Params, Queries
from earth.network import NetworkConfig
from earth.objectives import ObjectiveConfig
from earth.observations import EmptyWindowError
from earth.train import StageConfig, TrainConfig, _stage_times, prepare, train
from earth.windows import Cycling, Sampling, StreamConfig
from moe import sharding, training

STREAM = StreamConfig("station", ("2m_temperature", "surface_pressure"), slots=(0.0, 3.0), tolerance=1.0, tokens=7)
CFG = EarthConfig(
    streams=(STREAM,),
    targets=(("station", "2m_temperature"), ("station", "surface_pressure")),
    leads=(3.0, 6.0),
    folds=2,
    penalties=(1000.0,),
    network=NetworkConfig(width=8, heads=2, encoder_layers=1, dropout=0.0),
)
PLAIN = ObjectiveConfig(hide_site=0.0, hide_instrument=0.0, mixup=0.0, analysis=0.0)
CHAIN = Cycling(cycles=1, hours=3.0, rollout=1)
LEADS = [0.0, 3.0, 6.0]


@pytest.fixture(scope="module")
def data(network_record, network_protocol):
    return prepare({"station": network_record}, CFG, network_protocol, progress=False)


@pytest.fixture(scope="module")
def network():
    # Heads and gate start near zero: enlarge them so that the tests see the network and its memory.
    fresh = model.initial_network(jax.random.key(0), CFG, 7)
    return jax.tree.map(lambda x: x + 0.1 if x.ndim in (1, 2) else x, fresh)


@pytest.fixture(scope="module")
def batch(data):
    return draw(data, [40, 130, 300, 500])


def draw(data, index, cycling=CHAIN):
    return jax.tree.map(jnp.asarray, windows.sample(data.streams, data.train_times[index], LEADS, cycling=cycling))


def value_of(data, objective=PLAIN, cycling=CHAIN, cfg=CFG):
    """Jitted (network, batch) -> (loss, metrics)."""

    def total(network, batch):
        terms, metrics = objectives.forecast_loss(
            network, batch, jax.random.key(1), fitted=data.fitted, cfg=cfg, objective=objective, cycling=cycling
        )
        return sum(t.value() for t in terms.values()), {k: m.value() for k, m in metrics.items()}

    return total


@pytest.fixture(scope="module")
def plain(data):
    return jax.jit(jax.value_and_grad(value_of(data), has_aux=True))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- cycling and roll-out


@functools.partial(jax.jit, static_argnames="lead")
def forecast_by_verbs(params, state, queries, lead):
    later = model.advance(params, state, lead, cfg=CFG)
    feature = propagator.features(params.fitted.propagator, params.fitted.anchors, state.history, state.origin)
    linear = model.linear_field(params.fitted, feature, state.history, later.lead)
    parts = model.read(params, later, linear, queries, cfg=CFG)
    return later, parts, model.observe_anomalies(params, later, queries, cfg=CFG)


def scored(params, state, queries, target, mask, lead):
    """(sum of mean loss, of spread loss, of squared error, count) of a state `lead` hours after its analysis, and the
    state then.
    """
    later, (_, own, log_spread, scale), (mean, spread) = forecast_by_verbs(params, state, queries, lead)
    np.testing.assert_allclose(mean, own, atol=1e-5)  # what is trained is what is served
    np.testing.assert_allclose(spread, scale * jnp.exp(log_spread), rtol=1e-5)
    error = np.where(mask, (target - own) / scale, 0.0)
    nll = np.where(mask, 0.5 * error**2 * np.exp(-2 * log_spread) + log_spread, 0.0)
    return np.array([0.5 * (error**2).sum(), nll.sum(), (error**2).sum(), mask.sum()]), later


def test_the_loss_of_a_chain_is_what_the_verbs_forecast(data, network):
    chain = Cycling(cycles=2, hours=3.0, spin_up=1, rollout=1)
    batch = draw(data, [40, 130, 300, 500], chain)
    params = Params(data.fitted, network)
    place, target = batch["targets"]["station"], batch["steps"]["station"]
    assert target.value.shape[1] == len(chain.steps) == 3
    queries = Queries(place.latitude[0], place.longitude[0], place.height[0])
    assimilate = jax.jit(functools.partial(model.assimilate_tokens, cfg=CFG))
    steps, leads = np.zeros(4), np.zeros(4)
    empty = jax.tree.map(lambda x: jnp.zeros_like(x) if x.dtype == bool else x, batch["tokens"])
    early = [jax.tree.map(lambda x, k=k: x[:, k], batch["windows"]) for k in range(2)]
    background = None
    for k, seen in enumerate([*early, batch["tokens"], empty]):
        state = assimilate(params, background, seen, batch["time"] + (k - 2) * 3 * 3600)
        s = max(k - chain.spin_up, 0)
        sums, background = scored(params, state, queries, target.value[:, s], target.mask[:, s], 3.0)
        np.testing.assert_array_equal(background.time, batch["time"] + (k - 1) * 3 * 3600)
        if k >= chain.spin_up:
            steps += sums
        if k == 2:  # lead 0 has no weight
            leads += sum(
                scored(params, state, queries, place.value[:, i], place.mask[:, i], LEADS[i])[0] for i in (1, 2)
            )
    loss, metrics = jax.jit(value_of(data, cycling=chain))(network, batch)
    total = steps + leads
    np.testing.assert_allclose(loss, (total[0] + total[1]) / total[3], rtol=1e-5)
    np.testing.assert_allclose(metrics["mse"], leads[2] / leads[3], rtol=1e-5)
    np.testing.assert_allclose(metrics["mse_steps"], steps[2] / steps[3], rtol=1e-5)


@pytest.mark.slow  # half a minute of compilation; test_the_loss_of_a_chain_is_what_the_verbs_forecast stays fast
def test_without_a_chain_training_is_the_single_window(data, tmp_path):
    """The first loss of `train` is that of a single window, computed from the verbs; nothing of a chain is read."""
    whole = dataclasses.replace(data, folds=np.full_like(data.folds, -1))
    stage = StageConfig("forecast", 2, ((0.0,), (3.0,), (6.0,)), PLAIN, warmup=1)
    assert not stage.cycling.active
    train(whole, TrainConfig((stage,), batch=8, log_every=1), tmp_path, progress=False)
    rows = training.read_metrics(tmp_path / "member0" / "forecast" / "metrics.jsonl")
    sampling = Sampling(stage.strata, stage.queries)
    first = next(iter(windows.dataset(data.streams, data.train_times, whole.folds, sampling, batch=8, seed=0)))
    assert set(first) == {"time", "fold", "leads", "tokens", "targets"}
    params = Params(data.fitted, model.initial_network(jax.random.key(0), CFG, 7))
    assimilate = jax.jit(functools.partial(model.assimilate_tokens, cfg=CFG))
    state = assimilate(params, None, first["tokens"], jnp.asarray(first["time"]))
    place = first["targets"]["station"]
    queries = Queries(place.latitude[0], place.longitude[0], place.height[0])
    total = sum(scored(params, state, queries, place.value[:, i], place.mask[:, i], LEADS[i])[0] for i in (1, 2))
    np.testing.assert_allclose(rows[0]["loss"], (total[0] + total[1]) / total[3], rtol=1e-5)
    np.testing.assert_allclose(rows[0]["mse"], total[2] / total[3], rtol=1e-5)
    assert not any("steps" in name for name in rows[0].keys() - {"steps_per_second"})


def test_gradients_flow_through_the_chain_unless_stopped(data, network, batch, plain):
    cut = dataclasses.replace(CHAIN, through_time=False)
    through, stopped = plain, jax.jit(jax.value_and_grad(value_of(data, cycling=cut), has_aux=True))
    (a, _), flowing = through(network, batch)
    (b, _), short = stopped(network, batch)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    gap = jnp.abs(flowing.embed["station"].w - short.embed["station"].w).max()
    assert gap > 1e-3 * jnp.abs(short.embed["station"].w).max()
    # A closed gate (as drawn at the start) lets nothing through, but learns to open.
    closed = network.replace(gate=jnp.zeros_like(network.gate))
    (_, _), flowing = through(closed, batch)
    (_, _), short = stopped(closed, batch)
    assert jnp.abs(flowing.gate).max() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), flowing, short)


def test_every_window_of_a_chain_is_mixed_with_the_same_partner(data, network, plain):
    """Mixing pairs row i with row B - 1 - i; where the pair is one sample, mixing must change nothing."""
    mixed = jax.jit(value_of(data, dataclasses.replace(PLAIN, mixup=1.0)))
    twins, strangers = draw(data, [40, 300, 300, 40]), draw(data, [40, 130, 300, 500])
    np.testing.assert_allclose(mixed(network, twins)[0], plain(network, twins)[0][0], rtol=1e-5)
    assert abs(float(mixed(network, strangers)[0] - plain(network, strangers)[0][0])) > 1e-3


def test_what_is_hidden_is_hidden_in_every_window(data, batch):
    objective = ObjectiveConfig(hide_site=0.4, hide_instrument=0.3)
    now, hidden = objectives.hide(jax.random.key(5), batch["tokens"], CFG, objective)
    early = jax.tree.map(lambda x: x[:, 0], batch["windows"])
    before, again = objectives.hide(jax.random.key(5), early, CFG, objective)
    same(hidden, again)
    lost = np.asarray(hidden["station"])
    assert lost.any()
    assert not lost.all()
    np.testing.assert_array_equal(lost, lost[::-1])  # a pair that is mixed hides the same
    for tokens in (now, before):
        assert not (np.asarray(tokens["station"].mask) & lost[:, :, None, :]).any()


def test_stage_times_keep_the_whole_chain_out_of_test_hours(data):
    stage = StageConfig("cycle", 1, ((3.0,),), cycling=Cycling(cycles=6, hours=6.0, rollout=2))
    times, folds = _stage_times(data, stage)
    assert 0 < len(times) < len(data.train_times)
    assert len(folds) == len(times)
    foreign = data.streams["station"].time[data.protocol.role(data.reports["station"].times) != "train"]
    first, last = times.min() - (36 + STREAM.span) * 3600, times.max() + 18 * 3600
    start = data.streams["station"].time.min()
    assert first + STREAM.tolerance * 3600 >= start
    assert last + STREAM.tolerance * 1800 < foreign.min()
    same(_stage_times(data, dataclasses.replace(stage, cycling=Cycling()))[0], data.train_times)
    with pytest.raises(EmptyWindowError, match="4800 h of windows"):
        _stage_times(data, dataclasses.replace(stage, cycling=Cycling(cycles=800)))


@pytest.mark.slow  # a minute of training
def test_training_on_chains_lowers_their_error(data):
    """A network that forecasts by itself, on weather that is a wave: what 40 steps learn shows on other hours."""
    start = model.initial_network(jax.random.key(4), CFG, 7, residual=False)
    score = jax.jit(value_of(data, PLAIN))
    sampling = Sampling(((3.0, 6.0),), cycling=CHAIN)
    held = windows.sample(data.streams, data.train_times[700:800:7], LEADS, cycling=CHAIN)
    stream = iter(windows.dataset(data.streams, data.train_times[:600], data.folds[:600], sampling, batch=16, seed=5))
    loss = functools.partial(
        objectives.forecast_loss, fitted=data.fitted, cfg=CFG, objective=ObjectiveConfig(), cycling=CHAIN
    )
    optimizer = optax.adam(5e-3)
    step = training.make_train_step(loss, optimizer, clip_norm=1.0)
    _, before = score(start, held)
    state = training.init_state(start, optimizer, jax.random.key(6))
    for _ in range(40):
        state, _ = step(state, next(stream))
    _, after = score(state.params, held)
    assert int(state.skipped) == 0
    assert after["mse_steps"] < 0.8 * before["mse_steps"]
    assert after["mse"] < 0.8 * before["mse"]
    assert jnp.abs(state.params.gate).max() > 0.01, "the gate of the memory has opened"


# --- missing targets


def poison(targets, seed, share, value):
    """Targets with more missing, and `value` where something is missing."""
    rng = np.random.default_rng(seed)
    mask = np.asarray(targets.mask) & (rng.random(targets.mask.shape) >= share)
    clean = np.where(mask, targets.value, np.float32(0))
    return [targets.replace(value=np.where(mask, clean, np.float32(v)), mask=mask) for v in (0.0, value)]


@pytest.fixture(scope="module")
def clean_and_poisoned(data, network, batch):
    """(seed, share, value) -> the two losses and gradients. One function: hypothesis prints its arguments."""
    gradient = jax.jit(jax.value_and_grad(value_of(data, ObjectiveConfig()), has_aux=True))  # hidden and mixed

    def compare(seed, share, value):
        clean, poisoned = dict(batch), dict(batch)
        for part in ("targets", "steps"):
            a, b = poison(batch[part]["station"], seed, share, value)
            clean[part], poisoned[part] = {"station": a}, {"station": b}
        for part in ("tokens", "windows"):
            t = batch[part]["station"]
            poisoned[part] = {"station": t.replace(value=jnp.where(t.mask, t.value, value))}
        return gradient(network, clean), gradient(network, poisoned)

    return compare


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    value=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]),
)
def test_missing_targets_never_poison(clean_and_poisoned, seed, share, value):
    want, got = clean_and_poisoned(seed, share, value)
    same(want, got)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
    moved = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(got[1]))
    if share == 1.0:
        assert (moved, float(got[0][0])) == (0.0, 0.0)
    else:
        assert moved > 0


def test_a_sample_without_targets_counts_as_absent(data, network, batch, plain):
    emptied, twice = dict(batch), draw(data, [40, 130, 40, 130])  # twice the same two samples: their mean
    for part in ("targets", "steps"):
        t = batch[part]["station"]
        keep = (jnp.arange(4) < 2)[:, None, None, None]
        emptied[part] = {"station": t.replace(mask=t.mask & keep, value=jnp.where(keep, t.value, jnp.nan))}
    (want, _), a = plain(network, twice)
    (got, _), b = plain(network, emptied)
    np.testing.assert_allclose(want, got, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), a, b)


# --- precision


def dtypes_of(jaxpr, primitive):
    """Output dtypes of every `primitive` of a jaxpr, inner ones included."""
    found = [eqn.outvars[0].aval.dtype for eqn in jaxpr.eqns if eqn.primitive.name == primitive]
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    found += dtypes_of(inner, primitive)
    return found


@pytest.mark.slow  # a compilation of the whole step of its own: 46 s
def test_bfloat16_computes_low_and_keeps_high(data, network, batch, plain):
    low = dataclasses.replace(CFG, compute="bfloat16")
    products = {
        cfg.compute: dtypes_of(jax.make_jaxpr(value_of(data, cfg=cfg))(network, batch).jaxpr, "dot_general")
        for cfg in (CFG, low)
    }
    assert jnp.bfloat16 not in products["float32"]
    # Of every matrix product of the network none stays in float32: what remains are those of kernels, normals and
    # propagator, as many as both have in common.
    narrow = products["bfloat16"].count(jnp.bfloat16)
    assert narrow > 60
    assert len(products["bfloat16"]) == len(products["float32"])

    loss = functools.partial(objectives.forecast_loss, fitted=data.fitted, cfg=low, objective=PLAIN, cycling=CHAIN)
    optimizer = optax.adamw(1e-3)
    step = training.make_train_step(loss, optimizer, ema_decay=0.9)
    state = training.init_state(jax.tree.map(jnp.copy, network), optimizer, jax.random.key(1), ema=True)
    state, metrics = step(state, batch)
    for tree in (state.params, state.ema_params, state.opt_state, metrics):
        kinds = {x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}
        assert kinds == {jnp.dtype("float32")}
    assert int(state.skipped) == 0
    assert np.isfinite(metrics["loss"])
    # bfloat16 rounds to 2^-9 = 0.2 %; some ten roundings in a row and a loss quadratic in the output leave a few
    # percent at most of the network's share of it.
    (want, _), gradient = plain(network, batch)
    np.testing.assert_allclose(metrics["loss"], want, rtol=0.02)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=0.1)
    assert metrics["loss"] != want


# --- devices, processes, interruptions

STAGE = StageConfig("cycle", 24, ((0.0,), (3.0, 6.0)), ObjectiveConfig(), warmup=2, cycling=CHAIN)
RUN = TrainConfig((STAGE,), batch=8, checkpoint_every=5, log_every=1)


def curve(directory):
    rows = training.read_metrics(directory / "member0" / "cycle" / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows]


@pytest.mark.slow  # two compilations of the whole step; test_verbs.py has one data-parallel step in the fast suite
def test_eight_devices_train_like_one(data, tmp_path):
    """The whole of `train`, with hidden and mixed samples: rows are paired across devices."""
    short = dataclasses.replace(RUN, stages=(dataclasses.replace(STAGE, steps=3),))
    alone = train(data, short, tmp_path / "one", progress=False)
    mesh = sharding.make_mesh({"data": 8})
    spread = train(data, short, tmp_path / "eight", mesh=mesh, progress=False)
    for a, b in zip(curve(tmp_path / "one"), curve(tmp_path / "eight"), strict=True):
        # Sums run in another order: a few float32 roundings of sums of some hundred terms, more after three updates.
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-3)
    # Adam divides by the root of the second moment: where a gradient is nearly 0 its sign, hence a step of the learning
    # rate, may differ; the average over 1 / (1 - 0.995) steps keeps 0.5 % of each.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), alone.network, spread.network)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(spread.network))


SCRIPT = pathlib.Path(__file__).parent / "cycling_run.py"


def start(prepared, directory, *arguments) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    command = [sys.executable, str(SCRIPT), "--prepared", str(prepared), "--directory", str(directory)]
    return subprocess.Popen([*command, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("prepared") / "prepared.pickle"
    path.write_bytes(pickle.dumps((data, RUN)))
    return path


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    finish(start(prepared, directory))
    return directory


@pytest.mark.slow
def test_a_killed_cycling_stage_resumes_bit_for_bit(prepared, undisturbed, tmp_path):
    process = start(prepared, tmp_path)
    path = tmp_path / "member0" / "cycle" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (path.exists() and len(curve(tmp_path)) >= 8):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 8 <= len(curve(tmp_path)) < STAGE.steps
    finish(start(prepared, tmp_path))
    assert len(curve(tmp_path)) == STAGE.steps
    assert curve(tmp_path) == curve(undisturbed)


@pytest.mark.slow
def test_two_processes_train_like_one(prepared, undisturbed, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    common = ("--devices", 2, "--coordinator", address, "--processes", 2)
    for process in [start(prepared, tmp_path, *common, "--process", i) for i in (0, 1)]:
        finish(process)
    got, want = ([(row["loss"], row["mse_steps"]) for row in curve(d)] for d in (tmp_path, undisturbed))
    assert len(got) == STAGE.steps
    np.testing.assert_allclose(got, want, rtol=2e-4)
