"""The global model at scale: eight devices against one, reports that do not divide, mixtures of experts."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from earth.kernels.neighbour_attention import NeighbourAttentionError
from earth.kernels.neighbour_attention.order import anchor_order
from earth.neighbours import nearest
from earth.observations import Reports
from earth.world import model, network, records, sharding
from earth.world import training as chains
from earth.world.climate import Climate
from earth.world.field import FieldConfig, make_anchors
from earth.world.model import Fitted, Params, State, WorldConfig
from earth.world.network import NetworkConfig
from earth.world.records import Record, SensorConfig, Tokens
from earth.world.sharding import GLOBE
from earth.world.training import StageConfig, TrainConfig, train
from moe import training
from moe.params import init, shardings
from moe.sharding import make_mesh, use_mesh

CFG = WorldConfig(
    sensors=(
        SensorConfig("station", ("2m_temperature", "surface_pressure"), 41, fixed=True),
        SensorConfig("amsua", ("brightness_temperature:5", "brightness_temperature:7"), 51),
    ),
    field=FieldConfig(anchors=48, neighbours=4, reach=6),
    network=NetworkConfig(width=16, heads=4, key=4, dynamics_layers=1, heights=(500.0, 3000.0, 8000.0, 15000.0)),
    step=6.0,
    temperature=None,
)
END = int(np.datetime64("2001-01-05", "s").astype(int))
STAGE = StageConfig("run", 4, cycles=2, leads=1, batch=2, hide=0.3, warmup=2)


def window(rng, s, windows=()):
    """Reports anywhere, a fifth of the values missing and the last reports not there."""
    shape = (*windows, s.tokens)
    lat, lon = np.rad2deg(np.arcsin(rng.uniform(-1, 1, shape))), rng.uniform(-180, 180, shape)
    height = rng.uniform(0, 1e4, shape)
    place = records.host_place(CFG.field, lat, lon, height).reshape(-1, 4)
    near = nearest(place, np.asarray(ANCHORS.place, np.float64), CFG.field.neighbours)
    near = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), near)
    mask = rng.random((*shape, 2)) < 0.8
    mask[..., -3:, :] = False
    value = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    parts = (rng.uniform(0, 6, shape), lat, lon, height, rng.uniform(-50, 50, shape))
    return Tokens(value, mask, np.ones_like(value), *(x.astype(np.float32) for x in parts), near=near)


ANCHORS = make_anchors(CFG.field)


@pytest.fixture(scope="module")
def fitted():
    """Normals of mean 0 and deviation 1."""
    none = np.zeros((0, 2), np.float32)
    about = (np.float32(0), np.float32(1e4), np.float32(60), np.zeros(2, np.float32), np.eye(4, dtype=np.float32))
    shell = Climate(none, none, none, *about)
    normals = {}
    for s in CFG.sensors:
        mean, spread = (np.zeros((x.shape[-1], 2), np.float32) for x in _features(shell))
        normals[s.sensor] = dataclasses.replace(shell, mean=mean, spread=spread)
    return jax.tree.map(jnp.asarray, Fitted(normals, ANCHORS, np.full(4, 5.0, np.float32)))


def _features(shell):
    from earth.world.climate import _features as of

    zero = np.zeros(1, np.float32)
    return of(shell, zero, zero, zero, zero, np.zeros(1, np.int32))


@pytest.fixture(scope="module")
def net():
    drawn = init(jax.random.key(0), network.network_specs(CFG.network, CFG.sensors, 0))
    # Outputs start small: enlarged, so that every part of the network is seen.
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), drawn)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "space": 4})


def close(got, wanted, tolerance):
    """To a share of each array's largest number, and 1e-6 of the largest of all."""
    got, wanted = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, wanted))
    least = 1e-6 * max(np.abs(b).max() for _, b in wanted)
    for (path, a), (_, b) in zip(got, wanted, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max() + least, jax.tree_util.keystr(path)


def test_padded_reports_are_not_there():
    rng = np.random.default_rng(0)
    tokens = {s.sensor: window(rng, s, (2, 3)) for s in CFG.sensors}
    made = sharding.pad(tokens, 4)
    assert {name: t.age.shape for name, t in made.items()} == {
        "station": (2, 3, 44),
        "amsua": (2, 3, 52),
    }
    for name, t in made.items():
        n = tokens[name].age.shape[-1]
        cut = jax.tree.map(lambda x, n=n: x[:, :, :n], t)
        jax.tree.map(np.testing.assert_array_equal, cut, tokens[name])
        assert not t.mask[:, :, n:].any()
        assert (t.near.index[:, :, n:] == -1).all()
        assert np.isfinite(1 / t.deviation).all()


def test_arranged_reports_are_the_same_reports():
    rng = np.random.default_rng(0)
    tokens = {s.sensor: window(rng, s, (2, 3)) for s in CFG.sensors}
    made = sharding.arrange(tokens, ANCHORS.place)
    for name, t in made.items():
        along = np.asarray(anchor_order(jnp.asarray(ANCHORS.place)))
        place = np.argsort(along)[t.near.index[..., 0]]
        assert (np.diff(place, axis=-1) >= 0).all()
        for b in range(2):
            rows = np.lexsort((tokens[name].age[b, 1], tokens[name].latitude[b, 1]))
            back = np.lexsort((t.age[b, 1], t.latitude[b, 1]))
            for x, y in zip(jax.tree.leaves(tokens[name]), jax.tree.leaves(t), strict=True):
                np.testing.assert_array_equal(x[b, 1][rows], y[b, 1][back])


@pytest.mark.slow  # two programs with gradients: minutes on a busy machine
def test_loss_and_gradients_are_those_of_one_device(fitted, net, mesh):
    """Two chains over `data`, 41 and 51 reports and 48 anchors over `space`, hidden sensors and reports, recomputation.

    Sums run in another order: 2e-5 of the largest entry of each gradient (float32 rounds at 6e-8, and some thousand
    terms of either sign meet), and 1e-6 of the largest of all, for some are 0 but for rounding: a bias that all logits
    of a softmax share. The loss has one sign and agrees better.
    """
    rng = np.random.default_rng(1)
    ends = [[model.window_end(END + 21600 * k + 86400 * b) for k in range(3)] for b in range(2)]
    batch = {"tokens": {s.sensor: window(rng, s, (2, 3)) for s in CFG.sensors}, "time": np.asarray(ends, np.int32)}
    stage = dataclasses.replace(STAGE, remat=True)

    def scalar(net, batch, rng, fitted):
        parts, metrics = chains.loss(net, batch, rng, fitted=fitted, cfg=CFG, stage=stage)
        return sum(m.value() for m in parts.values()), (parts, metrics)

    graded = jax.value_and_grad(scalar, has_aux=True)
    key = jax.random.key(3)
    (loss, aux), slope = jax.jit(graded)(net, batch, key, fitted)
    with use_mesh(mesh, GLOBE):
        placed = sharding.place_batch(batch, mesh, GLOBE)
        assert placed["tokens"]["station"].value.sharding.shard_shape((2, 3, 44, 2)) == (1, 3, 11, 2)
        program = jax.jit(graded).lower(net, placed, key, fitted).compile()
        (spread, other), found = program(net, placed, key, fitted)
    np.testing.assert_allclose(spread, loss, rtol=2e-6)
    close(other, aux, 2e-6)
    close(found, slope, 2e-5)
    assert all(np.abs(np.asarray(x)).max() > 0 for x in jax.tree.leaves(slope.dynamics))
    text = program.as_text() or ""
    assert "reduce-scatter" in text
    assert re.search(r"f32\[(1,)?11,16\]", text), "a device reads 11 stations"
    assert not re.search(r"f32\[([12],)?44,16\]", text), "nowhere are all of them"


@pytest.mark.slow
def test_verbs_on_a_mesh_are_those_without(fitted, net):
    rng = np.random.default_rng(2)
    params = Params(fitted, net)
    tokens = {s.sensor: window(rng, s) for s in CFG.sensors}
    time = model.window_end(END)

    def cycle(params, tokens):
        state = model.assimilate(params, None, tokens, time, cfg=CFG)
        state = model.advance(params, state, 2, cfg=CFG)
        return state.latent, model.observe(params, state, "amsua", tokens["amsua"], cfg=CFG)

    latent, (mean, sd) = jax.jit(cycle)(params, tokens)
    mesh = make_mesh({"data": 1, "space": 8})
    with use_mesh(mesh, GLOBE):
        far, (far_mean, far_sd) = jax.jit(cycle)(params, sharding.place_tokens(tokens, mesh, GLOBE))
        assert far.sharding.shard_shape(far.shape) == (6, 16)
        with pytest.raises(ValueError, match=r"41.* does not divide over mesh axes|41 points do not divide"):
            jax.jit(cycle)(params, tokens)
    close((far, far_mean[:51], far_sd[:51]), (latent, mean, sd), 5e-6)
    assert np.isfinite(far_mean).all()


def record_of(fitted):
    """Four days of reports of noise on a wave, for `train`."""
    rng = np.random.default_rng(4)
    reports = {}
    for s in CFG.sensors:
        n = 1600
        time = np.sort(END + rng.integers(0, 4 * 86400, n))
        lat, lon = np.rad2deg(np.arcsin(rng.uniform(-1, 1, n))), rng.uniform(-180, 180, n)
        value = np.cos(np.deg2rad(lon))[:, None] + 0.1 * rng.normal(size=(n, 2))
        view = {"view_angle": np.zeros(n)} if s.sensor == "amsua" else {}
        reports[s.sensor] = Reports(
            s.sensor, s.variables, ("P",), np.zeros(n, np.int32), time, lat, lon, np.full(n, 100.0), value, **view
        )
    return Record(reports, CFG.sensors, CFG.field, fitted.anchors, fitted.normals, CFG.step)


# What all logits of a softmax share has the gradient 0 but for rounding, of which Adam makes steps as large as others.
INVARIANT = re.compile(r"weighting_out\.b$|(dynamics\[\d\]|analysis\[\d\])\.attention\.key\.b$|\.reading\.key\.b$")


@pytest.mark.slow
def test_training_on_a_mesh_follows_training_on_one_device(fitted, mesh, tmp_path):
    record = record_of(fitted)
    tcfg = TrainConfig((STAGE,), ema=0.5, log_every=1)
    kept = train((record,), fitted, CFG, tcfg, tmp_path / "one", progress=False)
    spread = train((record,), fitted, CFG, tcfg, tmp_path / "eight", mesh=mesh, progress=False)
    one, eight = (training.read_metrics(tmp_path / name / "run" / "metrics.jsonl") for name in ("one", "eight"))
    assert len(one) == len(eight) == STAGE.steps
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
        np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-4)
    drawn = init(jax.random.key(0), network.network_specs(CFG.network, CFG.sensors, 0))
    leaves = (jax.tree_util.tree_leaves_with_path(tree) for tree in (drawn, kept.network, spread.network))
    for (path, start), (_, a), (_, b) in zip(*leaves, strict=True):
        name = jax.tree_util.keystr(path)
        if not INVARIANT.search(name):
            assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(a - start), f"{name} went elsewhere"
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(spread.network))
    # and goes on from its checkpoint: nothing is left to do
    again = train((record,), fitted, CFG, tcfg, tmp_path / "eight", mesh=mesh, progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.network, spread.network)
    odd = dataclasses.replace(tcfg, stages=(dataclasses.replace(STAGE, batch=3),))
    with pytest.raises(ValueError, match="a batch of 3 chains does not divide over 2 shards"):
        train((record,), fitted, CFG, odd, tmp_path / "odd", mesh=mesh, progress=False)


def test_anchors_that_do_not_divide_are_named(fitted, net):
    cfg = dataclasses.replace(CFG, field=dataclasses.replace(CFG.field, anchors=50))
    anchors = jax.tree.map(jnp.asarray, make_anchors(cfg.field))
    state = State(jnp.int32(0), jnp.zeros((50, 16)))
    params = Params(dataclasses.replace(fitted, anchors=anchors), net)
    with (
        use_mesh(make_mesh({"data": 1, "space": 8}), GLOBE),
        pytest.raises((ValueError, NeighbourAttentionError), match=r"50.* divide over mesh axes"),
    ):
        jax.eval_shape(functools.partial(model.advance, cfg=cfg), params, state)


# --- mixtures of experts in the dynamics

SPARSE = dataclasses.replace(
    CFG, sensors=CFG.sensors[:1], network=dataclasses.replace(CFG.network, experts=4, top_k=2, dynamics_layers=2)
)


def sparse_net(cfg, seed=0):
    drawn = init(jax.random.key(seed), network.network_specs(cfg.network, cfg.sensors, 0))
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), drawn)


def test_without_experts_nothing_changes():
    plain = network.network_specs(CFG.network, CFG.sensors, 0)
    assert all(type(block) is network.Block for block in (*plain.dynamics, *plain.analysis))
    for bad in (dict(experts=2, top_k=3), dict(experts=-1)):
        with pytest.raises(ValueError, match="experts"):
            NetworkConfig(**bad)
    with pytest.raises(ValueError, match="operands 'float16'"):
        NetworkConfig(operands="float16")


def test_one_expert_is_a_gated_mlp(fitted):
    """A block whose attention puts out nothing, written out in float64."""
    cfg = dataclasses.replace(SPARSE.network, experts=1, top_k=1, dynamics_layers=1)
    net = sparse_net(dataclasses.replace(SPARSE, network=cfg))
    block = net.dynamics[0]
    block = dataclasses.replace(block, out=jax.tree.map(jnp.zeros_like, block.out))
    h = np.random.default_rng(0).normal(size=(48, 16))
    time = model.window_end(END)
    once = jax.jit(functools.partial(network.step, cfg=cfg))
    got = once(dataclasses.replace(net, dynamics=[block]), jnp.asarray(h, jnp.float32), fitted.anchors, time)

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    w = jax.tree.map(lambda x: np.asarray(x, np.float64), block)
    forcing = np.asarray(network.forcing_features(fitted.anchors, time), np.float64)
    gain = (forcing @ w.forcing.w + w.forcing.b)[:, 16:]
    start = norm(h)
    y = norm(start) * (1 + gain)
    (gate, up), down = w.mixture.experts.gate_up[0], w.mixture.experts.down[0]
    pre = y @ gate
    want = start + (pre / (1 + np.exp(-pre)) * (y @ up)) @ down
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_sparse_model_is_read_back_whole(fitted, tmp_path):
    params = Params(fitted, sparse_net(SPARSE))
    model.save_model(tmp_path / "model", params, SPARSE)
    again, cfg, _ = model.load_model(tmp_path / "model")
    assert cfg == SPARSE
    jax.tree.map(np.testing.assert_array_equal, again, params)


def sparse_loss(fitted, batch):
    stage = dataclasses.replace(STAGE, cycles=1, leads=1, hide=0.0)

    def scalar(net):
        parts, metrics = chains.loss(net, batch, jax.random.key(0), fitted=fitted, cfg=SPARSE, stage=stage, balance=0.1)
        return sum(m.value() for m in parts.values()), (parts, metrics)

    return jax.jit(jax.value_and_grad(scalar, has_aux=True))


@pytest.fixture(scope="module")
def sparse_batch():
    rng = np.random.default_rng(6)
    ends = [[model.window_end(END + 21600 * k + 86400 * b) for k in range(2)] for b in range(2)]
    return {"tokens": {s.sensor: window(rng, s, (2, 2)) for s in SPARSE.sensors}, "time": np.asarray(ends, np.int32)}


def test_gradients_of_a_mixture(fitted):
    """Central differences of two steps of the dynamics and their balance, along the gradient of routers, experts and
    what lies before them. (The loss stops gradients at innovations, so that its differences are none of its gradient.)
    """
    rng = np.random.default_rng(9)
    h, weight = (jnp.asarray(rng.normal(size=(48, 16)), jnp.float32) for _ in range(2))
    net = sparse_net(SPARSE)

    def scalar(net):
        out, balance = network.balanced_step(net, h, fitted.anchors, model.window_end(END), cfg=SPARSE.network)
        return jnp.sum(weight * out) / 48 + sum(m.value() for m in balance)

    graded = jax.jit(jax.value_and_grad(scalar))
    here, slope = graded(net)

    def along(name):
        """Only the leaves whose path has the name, of unit length."""
        kept = jax.tree_util.tree_map_with_path(
            lambda path, g: g if name in jax.tree_util.keystr(path) else jnp.zeros_like(g), slope
        )
        size = float(jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(kept))))
        return jax.tree.map(lambda x: x / size, kept), size

    step = 5e-4
    for name in ("router", "gate_up", "down", "attention"):
        direction, size = along(f"dynamics[0].{name}" if name == "attention" else name)
        assert size > 1e-2, name
        ends = [float(graded(jax.tree.map(lambda p, d, s=s: p + s * d, net, direction))[0]) for s in (step, -step)]
        assert abs(ends[0] + ends[1] - 2 * float(here)) < 1e-5, f"{name}: an anchor changed its experts on the way"
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), size, rtol=0.01, atol=2e-3, err_msg=name)


@pytest.mark.slow
def test_a_mixture_is_balanced_in_the_objective_and_alike_over_devices(fitted, mesh, sparse_batch):
    """One expert on each of four devices."""
    graded, net = sparse_loss(fitted, sparse_batch), sparse_net(SPARSE)
    (loss, (parts, metrics)), slope = graded(net)
    assert 0.9 < float(metrics["balance"].value()) < 4.0, "1 is even, 4 is one expert for all"
    np.testing.assert_allclose(parts["balance"].value(), 0.1 * metrics["balance"].value(), rtol=1e-6)
    others = sum(float(m.value()) for k, m in parts.items() if k != "balance")
    np.testing.assert_allclose(loss, others + float(parts["balance"].value()), rtol=1e-6)
    with use_mesh(mesh, GLOBE):
        placed = sharding.place_batch(sparse_batch, mesh, GLOBE)
        there = jax.device_put(net, shardings(network.network_specs(SPARSE.network, SPARSE.sensors, 0), mesh, GLOBE))
        assert there.dynamics[0].mixture.experts.down.sharding.shard_shape((4, 32, 16)) == (1, 32, 16)
        (spread, aux), found = sparse_loss(fitted, placed)(there)
    np.testing.assert_allclose(spread, loss, rtol=2e-6)
    close(aux, (parts, metrics), 2e-6)
    close(found, slope, 2e-5)


def test_reading_in_chunks_is_reading_at_once(fitted, net, monkeypatch):
    """41 and 51 reports, 16 at a time: values and gradients, the repeated last report without a trace."""
    rng = np.random.default_rng(8)
    params, tokens = Params(fitted, net), {s.sensor: window(rng, s) for s in CFG.sensors}
    h = jnp.asarray(rng.normal(size=(48, 16)), jnp.float32)

    def read(net, h):
        found = model.read_field(params.replace(network=net), h, tokens, model.window_end(END), cfg=CFG)
        return sum(jnp.sum(jnp.sin(mean) + spread) for mean, spread in found.values()), found

    graded = jax.value_and_grad(read, (0, 1), has_aux=True)
    whole = jax.jit(lambda *a: graded(*a))(net, h)
    monkeypatch.setattr(network, "CHUNK", 16)
    parts = jax.jit(lambda *a: graded(*a))(net, h)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))
