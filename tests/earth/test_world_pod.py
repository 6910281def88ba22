"""`examples/world_pod.py`: the load of the preset, and the programs by the real TPU compiler."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import earth_pod as presets
from earth.world import model, network
from earth.world.field import make_anchors
from earth.world.network import NetworkConfig
from examples import world_pod as example
from moe import params as parameters
from moe.kernels import aot

compiles = [pytest.mark.aot_tpu, pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))]


def test_the_load_is_ten_million_reports():
    cfg = presets.window_10m()
    assert cfg.reports == 10_000_000
    assert cfg.world.field.count > 100_000
    per_satellite = {"atms": 1_555_200, "mhs": 1_458_000, "amsua": 162_000}  # footprints in 12 hours
    tokens = {s.sensor: s.tokens for s in cfg.world.sensors}
    assert {name: tokens[name] / n for name, n in per_satellite.items()} == {"atms": 3, "mhs": 3, "amsua": 4}
    for count in (1_000, 12_345):
        assert sum(s.tokens for s in presets.growth(count).sensors) == count
    with pytest.raises(ValueError, match="batch 1 does not divide over data 2"):
        dataclasses.replace(cfg, data=2)


def test_abstract_fits_are_those_of_real_ones():
    """Shapes of anchors, parameters and normals are what the library makes."""
    cfg = presets.smoke()
    shapes = example.fitted_shapes(cfg.world, statics=2)
    real = make_anchors(cfg.world.field, lambda latitude, longitude: np.zeros((len(latitude), 2)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes.anchors) == jax.tree.map(
        lambda x: (x.shape, x.dtype), real
    )
    net = parameters.abstract(network.network_specs(cfg.world.network, cfg.world.sensors, 2))
    state = model.State(np.int32(0), jax.ShapeDtypeStruct((cfg.world.field.count, 64), np.float32))
    tokens = {s.sensor: example.token_shapes(s, cfg.world.field) for s in cfg.world.sensors}

    def cycle(params, state, tokens):
        return example.forecast_cycle(params, state, tokens, tokens, cfg=cfg.world)

    after, seen = jax.eval_shape(cycle, model.Params(shapes, net), state, tokens)
    assert after.latent.shape == state.latent.shape
    assert {name: mean.shape for name, (mean, _) in seen.items()} == {n: t.value.shape for n, t in tokens.items()}


def test_arithmetic_of_a_block_and_of_visits():
    """By hand: six maps of the anchors; and tiles that meet are at least one for each tile of points."""
    how = NetworkConfig(width=64, heads=4, key=16, expansion=2)
    made = example.maps(100, (64, 64), (64, 64), (64, 64), (64, 64), (64, 128), (128, 64))
    assert made.dense == 2 * 100 * 64 * (4 * 64 + 2 * 128)
    exact, rounded = (
        example.kernel_work(3, dataclasses.replace(how, operands=kind), False) for kind in ("float32", "bfloat16")
    )
    assert exact.kernels == 6 * rounded.kernels == 6 * 3 * 4 * 2 * (2 * 128**3)
    field = presets.smoke().world.field
    anchors = np.asarray(make_anchors(field).place, np.float64)
    few, many = (example.visits(n, field, anchors) for n in (1280, 12800))
    assert 10 <= few <= 10 * 4
    assert many >= 100
    assert many / 100 <= few / 10, "denser points meet fewer tiles each"


@pytest.mark.parametrize("name", [pytest.param("cycle", marks=compiles)])
def test_a_small_cycle_compiles_with_the_kernels(name):
    """Eight chips of v5p: what travels are anchors, never reports."""
    cfg = presets.smoke()
    report, made, mesh, _ = example.compiled(cfg, name, "v5p:2x2x2")
    assert dict(mesh.shape) == {"data": 1, "space": 8}
    sensors, blocks = len(cfg.world.sensors), cfg.world.network.dynamics_layers + cfg.world.network.analysis_layers
    assert report.kernels.count("neighbour_forward_anchors") == sensors
    assert report.kernels.count("neighbour_forward_points") == 2 * sensors + blocks
    assert report.alias_bytes > 0, "the state takes the place of the old one"
    traffic = aot.collective_traffic(report.text)
    # Keys and values of the anchors in bfloat16 for every block, before what reading and analysing add.
    m, d = cfg.world.field.count, cfg.world.network.width
    assert traffic["all-gather"][1] > blocks * 2 * m * d * 2 * 7 / 8
    # What anchors read of one sensor is summed in float32; the compiler takes all-reduces where little is scattered.
    summed = traffic["all-reduce"][1] + traffic.get("reduce-scatter", (0, 0))[1]
    assert summed >= sensors * m * d * 4 * 7 / 8
    assert made.args[2]["atms"].value.sharding.shard_shape((936, 22)) == (117, 22)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=compiles) for name in example.PROGRAMS])
def test_the_preset_fits_its_slice(name):
    cfg = presets.window_10m()
    report, _, mesh, _ = example.compiled(cfg, name, cfg.topology)
    assert mesh.size == 16
    total = report.argument_bytes + report.output_bytes - report.alias_bytes + report.temporary_bytes
    assert total + report.code_bytes < 0.97 * aot.CHIPS["v5p"].hbm_bytes
    assert "neighbour_forward_anchors" in report.kernels
    assert ("neighbour_backward_anchors" in report.kernels) == (name == "train")


def test_errors_name_the_value(capsys):
    cfg = presets.smoke()
    with pytest.raises(example.PodError, match="512 anchors do not divide over 3 devices"):
        example.place(cfg, jax.devices()[:3])
    assert example.main(["--preset", "configs/earth_pod.py:smoke", "--topology", "v5e:2x2"]) == 2
    assert "of no chip whose links are known" in capsys.readouterr().err
