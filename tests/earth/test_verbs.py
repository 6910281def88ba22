"""The public verbs, the objective and training on a small synthetic network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from earth import model, objectives, windows
from earth.calibration import calibrate
from earth.forecast import first_member, forecast, load_model, predict, save_model, sites, streams_of
from earth.model import EarthConfig, Params, Queries
from earth.network import NetworkConfig
from earth.objectives import ObjectiveConfig
from earth.observations import EmptyWindowError, ObservationError
from earth.train import StageConfig, TrainConfig, prepare, train
from earth.windows import StreamConfig
from moe import sharding, training
from moe.checkpoint import CheckpointConfigError, MissingCheckpointError

STREAM = StreamConfig(
    "station", ("2m_temperature", "surface_pressure"), slots=(0.0, 1.0, 3.0, 6.0), tolerance=1.0, tokens=7
)
CFG = EarthConfig(
    streams=(STREAM,),
    targets=(("station", "2m_temperature"), ("station", "surface_pressure")),
    leads=(3.0, 6.0),
    folds=2,
    network=NetworkConfig(width=16, heads=2, encoder_layers=1, dropout=0.0),
)
PLAIN = ObjectiveConfig(hide_site=0.0, hide_instrument=0.0, mixup=0.0)


@pytest.fixture(scope="module")
def data(network_record, network_protocol):
    return prepare({"station": network_record}, CFG, network_protocol, progress=False)


@pytest.fixture(scope="module")
def params(data):
    network = model.initial_network(jax.random.key(0), CFG, len(data.reports["station"].platforms))
    # Heads start near zero: enlarge them so that the tests see the network.
    return Params(data.fitted, jax.tree.map(lambda x: x + 0.1 if x.ndim == 2 else x, network))


@pytest.fixture(scope="module")
def batch(data):
    return jax.tree.map(jnp.asarray, windows.sample(data.streams, data.train_times[:8], [0.0, 3.0, 6.0], fold=0))


ASSIMILATE = jax.jit(functools.partial(model.assimilate, cfg=CFG))
ASSIMILATE_TOKENS = jax.jit(functools.partial(model.assimilate_tokens, cfg=CFG))
ADVANCE = jax.jit(functools.partial(model.advance, cfg=CFG))
OBSERVE = jax.jit(functools.partial(model.observe, cfg=CFG))


def queries(data) -> Queries:
    place = data.reports["station"].positions()
    return sites(place.latitude, place.longitude, place.height)


def window(data, time):
    stream = windows.Stream(data.reports["station"], STREAM)
    return {"station": jax.tree.map(jnp.asarray, stream.window(int(time)))}, jnp.asarray(time, jnp.int32)


def test_advancing_twice_equals_advancing_once(data, params):
    observations, time = window(data, data.train_times[5])
    state = ASSIMILATE(params, None, observations, time)
    step = ADVANCE
    once, twice = step(params, state, 6.0), step(params, step(params, state, 2.0), 4.0)
    a, b = (OBSERVE(params, s, queries(data)) for s in (once, twice))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    assert float(jnp.abs(a[0] - OBSERVE(params, state, queries(data))[0]).max()) > 0.01


def test_batch_equals_loop(data, params):
    times = data.train_times[[3, 40, 200]]
    stream = data.streams["station"]
    together = windows.Tokens(**stream.tokens(times))
    state = ASSIMILATE_TOKENS(params, None, {"station": together}, jnp.asarray(times))
    state = ADVANCE(params, state, 3.0)
    mean, spread = OBSERVE(params, state, queries(data))
    for i, t in enumerate(times):
        alone = {"station": windows.Tokens(**stream.tokens(int(t)))}
        one = ASSIMILATE_TOKENS(params, None, alone, jnp.asarray(t, jnp.int32))
        m, s = OBSERVE(params, ADVANCE(params, one, 3.0), queries(data))
        np.testing.assert_allclose(mean[i], m, rtol=2e-5)
        np.testing.assert_allclose(spread[i], s, rtol=2e-3)


def test_an_observed_site_reads_its_own_value_at_the_analysis(data, params):
    observations, time = window(data, data.train_times[77])
    mean = jax.tree.map(jnp.zeros_like, params.network.mean)
    quiet = params.replace(network=params.network.replace(mean=mean))
    state = ASSIMILATE(quiet, None, observations, time)
    mean, _ = OBSERVE(quiet, state, queries(data))
    o = observations["station"]
    seen = np.asarray(o.mask[:, 0])
    error = np.abs(np.asarray(mean) - np.asarray(o.value[:, 0]))[seen] / np.tile([1.0, 100.0], (7, 1))[seen]
    assert error.max() < 0.25  # K and hPa, where the normal alone is 1.5 K off


def test_cycling_without_observations_keeps_the_forecast(data, params):
    observations, time = window(data, data.train_times[60])
    state = ASSIMILATE(params, None, observations, time)
    later = ADVANCE(params, state, 3.0)
    empty = jax.tree.map(jnp.zeros_like, observations)
    cycled = ASSIMILATE(params, later, empty, later.time)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(cycled))
    feature = model.propagator.features(params.fitted.propagator, params.fitted.anchors, state.history, state.origin)
    expected = model.linear_field(params.fitted, feature, state.history, later.lead)
    np.testing.assert_allclose(cycled.history[:, 0], expected, atol=1e-5)  # slot 0: the forecast
    np.testing.assert_allclose(cycled.history[:, 2], state.history[:, 0], atol=1e-5)  # slot 3 h: the old analysis
    # With the same observations again, the cycled analysis follows them and not the background.
    again, _ = window(data, data.train_times[60] + 3 * 3600)
    fresh = ASSIMILATE(params, None, again, later.time)
    both = ASSIMILATE(params, later, again, later.time)
    np.testing.assert_allclose(both.history[:, 0], fresh.history[:, 0], atol=0.02)


def test_missing_values_and_targets_have_no_influence(data, params, batch):
    loss = functools.partial(objectives.forecast_loss, fitted=params.fitted, cfg=CFG, objective=PLAIN)

    def total(network, b):
        terms, _ = loss(network, b, jax.random.key(0))
        return sum(t.value() for t in terms.values())

    tokens, targets = batch["tokens"]["station"], batch["targets"]["station"]
    both = jax.jit(jax.value_and_grad(total))
    value, gradient = both(params.network, batch)
    poisoned = dict(
        batch,
        tokens={"station": tokens.replace(value=jnp.where(tokens.mask, tokens.value, 1e6))},
        targets={"station": targets.replace(value=jnp.where(targets.mask, targets.value, 1e6))},
    )
    hidden, _ = objectives.hide(jax.random.key(0), poisoned["tokens"], CFG, PLAIN)
    poisoned["tokens"] = hidden
    again, same = both(params.network, poisoned)
    assert not targets.mask.all()
    assert not tokens.mask.all()
    np.testing.assert_allclose(value, again, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, same)


def test_gradient_against_finite_differences(data, params, batch):
    objective = dataclasses.replace(PLAIN, hide_site=0.2)

    def total(network):
        terms, _ = objectives.forecast_loss(
            network, batch, jax.random.key(1), fitted=params.fitted, cfg=CFG, objective=objective
        )
        return terms["mean"].value()

    total = jax.jit(total)
    keys = iter(jax.random.split(jax.random.key(2), 200))
    direction = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) * (x.ndim > 0), params.network)
    slope = sum(
        jnp.vdot(g, d)
        for g, d in zip(*map(jax.tree.leaves, (jax.jit(jax.grad(total))(params.network), direction)), strict=True)
    )
    step = 2e-3
    up, down = (total(jax.tree.map(lambda p, d, s=s: p + s * d, params.network, direction)) for s in (step, -step))
    assert abs(float(slope)) > 1e-3
    np.testing.assert_allclose((up - down) / (2 * step), slope, rtol=0.03)


def test_data_parallel_step_equals_one_device(data, params, batch):
    loss = functools.partial(objectives.forecast_loss, fitted=data.fitted, cfg=CFG, objective=PLAIN)
    step = training.make_train_step(loss, optax.sgd(0.1), clip_norm=1.0)

    def fresh(tree):
        return training.init_state(jax.tree.map(jnp.array, tree), optax.sgd(0.1), jax.random.key(3))

    alone, _ = step(fresh(params.network), batch)
    mesh = sharding.make_mesh({"data": 8})
    with sharding.use_mesh(mesh, sharding.DP):
        spread = sharding.global_batch(jax.tree.map(np.asarray, batch), mesh, sharding.DP)
        shared, _ = step(fresh(params.network), spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), alone.params, shared.params)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    stage = StageConfig("forecast", 6, ((0.0,), (3.0, 6.0)), ObjectiveConfig(), warmup=2)
    tcfg = TrainConfig((stage,), batch=16, members=2, checkpoint_every=3)
    folder = tmp_path_factory.mktemp("run")
    return tcfg, folder, calibrate(train(data, tcfg, folder, progress=False), data)[0]


def test_training_again_changes_nothing(data, trained):
    tcfg, folder, params = trained
    log = (folder / "member0" / "forecast" / "metrics.jsonl").read_text()
    again = train(data, tcfg, folder, progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.network, params.network)
    assert (folder / "member0" / "forecast" / "metrics.jsonl").read_text() == log


def test_forecast_beats_climatology_and_persistence(data, trained, network_record, network_protocol):
    _, _, params = trained
    times = network_record.grid().time.values
    init = network_protocol.init_times(times)[::5]
    place = network_record.positions()
    where = {"station": list(place.index), **{c: place[c].to_numpy() for c in ("latitude", "longitude", "height")}}
    streams = streams_of(params, CFG, {"station": network_record})
    ds = forecast(params, CFG, streams, init, [3.0, 6.0], where, variables=["2m_temperature"])
    truth = network_record.grid()["2m_temperature"]
    for lead in (3, 6):
        valid = init + np.timedelta64(lead, "h")
        y = truth.reindex(time=valid).values
        ours = ds["2m_temperature"].sel(lead_time=np.timedelta64(lead, "h")).values
        last = truth.reindex(time=init).values
        normal = truth.mean("time").values
        rms = lambda e: np.sqrt(np.nanmean(e**2))  # noqa: E731
        assert rms(ours - y) < 0.75 * min(rms(last - y), rms(normal - y))


def test_save_and_load(data, trained, tmp_path, network_record):
    _, _, params = trained
    streams = streams_of(params, CFG, {"station": network_record})
    save_model(tmp_path / "m", params, CFG, meta={"note": "x"})
    loaded, cfg, meta = load_model(tmp_path / "m")
    assert cfg == CFG
    assert meta == {"note": "x"}
    args = (streams, data.validation_times[:3], [0.0, 6.0], queries(data))
    for a, b in zip(predict(params, CFG, *args), predict(loaded, cfg, *args), strict=True):
        np.testing.assert_array_equal(a, b)
    other = dataclasses.replace(CFG, network=dataclasses.replace(CFG.network, width=32))
    with pytest.raises(CheckpointConfigError, match="width"):
        load_model(tmp_path / "m", cfg=other)
    with pytest.raises(MissingCheckpointError):
        load_model(tmp_path / "nothing")
    assert first_member(loaded).network.anchor.ndim == 2


def test_bad_queries_and_windows(data):
    with pytest.raises(ObservationError, match="latitude nan of query 1"):
        sites([10.0, np.nan], [1.0, 2.0], [0.0, 0.0])
    with pytest.raises(EmptyWindowError, match="no station report"):
        windows.Stream(data.reports["station"], STREAM).window(0)


def test_a_window_never_sees_the_future(data):
    stream = data.streams["station"]
    rng = np.random.default_rng(0)
    for time in rng.choice(data.train_times, 20):
        got = stream.tokens(int(time) + int(rng.integers(0, 3600)))
        assert (got["age"] >= 0).all()
        assert (got["age"] <= STREAM.span).all()
    t = int(data.train_times[30])
    changed = np.array(stream.values)
    changed[stream.time > t] = 99.0
    future = windows.Stream(stream.reports, STREAM, changed)
    for name, before in stream.tokens(t).items():
        np.testing.assert_array_equal(before, future.tokens(t)[name])
