"""The global model: normals, windows, symmetries of the field, and what must and must not influence it.

The atmosphere here is a formula, waves that travel east over a mean state: cheap, and known everywhere.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy.special import sph_harm_y

from earth import forecast as stations
from earth import geometry, verify
from earth.neighbours import nearest
from earth.observations import EmptyWindowError, ObservationError, Reports
from earth.world import climate as normals
from earth.world import field, model, network, records
from earth.world import training as chains
from earth.world.climate import fit_climate
from earth.world.denial import denial_matrix
from earth.world.field import FieldConfig, make_anchors
from earth.world.forecasts import analyse, ensemble, forecast, queries
from earth.world.inversion import InversionConfig, fit_inversion, invert
from earth.world.model import Params, Shared, WorldConfig
from earth.world.network import NetworkConfig
from earth.world.records import Record, SensorConfig
from earth.world.training import StageConfig, TrainConfig, train
from moe import training
from moe.checkpoint import CheckpointError
from moe.params import init

DAYS = 12
START = int(np.datetime64("2001-01-01", "s").astype(int))
CHANNELS = (5, 7)
CFG = WorldConfig(
    sensors=(
        SensorConfig("station", ("2m_temperature", "surface_pressure"), 40, fixed=True),
        SensorConfig("radiosonde", ("temperature", "u_component_of_wind"), 60),
        SensorConfig("amsua", tuple(f"brightness_temperature:{c}" for c in CHANNELS), 50),
    ),
    field=FieldConfig(anchors=48, neighbours=4, reach=6),
    network=NetworkConfig(width=16, heads=4, key=4, dynamics_layers=1, heights=(500.0, 3000.0, 8000.0, 15000.0)),
    step=6.0,
)


def temperature(latitude, longitude, height, time):
    """K: colder poleward and upward, and a wave 3 that goes around in 12 days."""
    lat, lon = np.deg2rad(latitude), np.deg2rad(longitude)
    phase = 3 * (lon - 2 * np.pi * (time - START) / (DAYS * 86400.0))
    return 288 - 30 * np.sin(lat) ** 2 - 0.006 * np.minimum(height, 11000) + 5 * np.cos(lat) ** 2 * np.cos(phase)


def wind(latitude, longitude, time):
    lat, lon = np.deg2rad(latitude), np.deg2rad(longitude)
    phase = 3 * (lon - 2 * np.pi * (time - START) / (DAYS * 86400.0))
    return 20 * np.cos(lat) + 6 * np.cos(lat) ** 2 * np.sin(phase)


def sphere(rng, n):
    return np.rad2deg(np.arcsin(rng.uniform(-1, 1, n))), rng.uniform(-180, 180, n)


def ordered(sensor, variables, platforms, platform, time, columns, values, **extra):
    order = np.lexsort((time, platform))
    latitude, longitude, height = (c[order] for c in columns)
    extra = {k: v[order] for k, v in extra.items()}
    return Reports(
        sensor, variables, platforms, platform[order].astype(np.int32), time[order], latitude, longitude, height,
        np.stack(values, -1)[order], **extra,
    )  # fmt: skip


@pytest.fixture(scope="module")
def reports():
    rng = np.random.default_rng(0)
    n = 30
    lat, lon = sphere(rng, n)
    z = rng.uniform(0, 500, n)
    bias = rng.normal(0, 2, n)
    hours = np.arange(0, DAYS * 24, 3)
    owner, hour = (a.ravel() for a in np.meshgrid(np.arange(n), hours, indexing="ij"))
    time = START + hour * 3600
    t = temperature(lat[owner], lon[owner], z[owner], time) + bias[owner] + rng.normal(0, 0.3, len(time))
    wave = 0.002 * (temperature(lat[owner], lon[owner], 0.0, time) - 273.0)
    p = 101_325 * geometry.standard_pressure_ratio(z[owner]) * (1 + wave)
    t[rng.random(len(t)) < 0.05] = np.nan
    out = {
        "station": ordered(
            "station", ("2m_temperature", "surface_pressure"), tuple(f"S{i}" for i in range(n)), owner, time,
            (lat[owner], lon[owner], z[owner]), (t, p + rng.normal(0, 30, len(p))),
        )
    }  # fmt: skip
    count = 120 * DAYS
    lat, lon = sphere(rng, count)
    time = START + rng.integers(0, DAYS * 86400, count)
    pressure = rng.uniform(1.5e4, 1e5, count)
    z = geometry.standard_height(pressure)
    out["radiosonde"] = ordered(
        "radiosonde", CFG.sensors[1].variables, ("R",), np.zeros(count), time, (lat, lon, np.full(count, np.nan)),
        (temperature(lat, lon, z, time) + rng.normal(0, 0.3, count), wind(lat, lon, time) + rng.normal(0, 0.5, count)),
        pressure=pressure,
    )  # fmt: skip
    count = 200 * DAYS
    lat, lon = sphere(rng, count)
    time, view = START + rng.integers(0, DAYS * 86400, count), rng.uniform(-48, 48, count)
    seen = [temperature(lat, lon, h, time) - 0.002 * view**2 + rng.normal(0, 0.2, count) for h in (6000.0, 10000.0)]
    out["amsua"] = ordered(
        "amsua", CFG.sensors[2].variables, ("M",), np.zeros(count), time, (lat, lon, 0 * lat), seen, view_angle=view
    )
    return out


@pytest.fixture(scope="module")
def fitted(reports):
    return model.fit(reports, CFG)


@pytest.fixture(scope="module")
def record(reports, fitted):
    return Record(reports, CFG.sensors, CFG.field, fitted.anchors, fitted.normals, CFG.step)


@pytest.fixture(scope="module")
def params(fitted):
    specs = network.network_specs(CFG.network, CFG.sensors, 0)
    net = init(jax.random.key(0), specs)
    # Outputs start small: enlarged, so that the tests see the whole network.
    return Params(fitted, jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), net))


END = START + 5 * 86400
TIME = model.window_end(END)


@pytest.fixture(scope="module")
def window(record):
    return record.window(END, np.random.default_rng(1))


ASSIMILATE = jax.jit(functools.partial(model.assimilate, cfg=CFG))
READ = jax.jit(functools.partial(model.read, cfg=CFG))
ADVANCE = jax.jit(functools.partial(model.advance, cfg=CFG), static_argnums=2)


def at(latitude, longitude, height, *, cfg=CFG, anchors, age=0.0, view=0.0):
    """Queries at points."""
    shape = np.shape(latitude)
    full = [np.broadcast_to(np.float32(x), shape) for x in (latitude, longitude, height, view, age)]
    place = records.host_place(cfg.field, *full[:3])
    near = nearest(place.astype(np.float32), np.asarray(anchors.place), cfg.field.neighbours)
    v = np.zeros((*shape, 2), np.float32)
    return records.Tokens(v, v > 0, v + 1, full[4], *full[:4], near)


# --- normals


def test_harmonics_are_scipy_s():
    rng = np.random.default_rng(3)
    lat, lon = sphere(rng, 50)
    got = np.asarray(geometry.harmonics(np.float32(lat), np.float32(lon), 6), np.float64)
    place = 0
    for n in range(7):
        for m in range(n + 1):
            y = sph_harm_y(n, m, np.deg2rad(90 - lat), np.deg2rad(lon)) * np.sqrt(4 * np.pi)
            if m == 0:
                np.testing.assert_allclose(got[:, place], y.real, atol=2e-5)
                place += 1
                continue
            sign = (-1) ** m * np.sqrt(2)  # scipy's phase of Condon and Shortley
            np.testing.assert_allclose(got[:, place], sign * y.real, atol=2e-5)
            np.testing.assert_allclose(got[:, place + 1], sign * y.imag, atol=2e-5)
            place += 2
    assert place == got.shape[1]


def test_a_normal_finds_the_mean_state_and_the_deviation(reports, fitted):
    r = records.select(reports, CFG.sensors[1])
    mean, sd = normals.climate(
        fitted.normals["radiosonde"],
        *(np.float32(x) for x in (r.latitude, r.longitude, r.height, 0 * r.height)),
        geometry.seconds(r.times),
    )
    lat = np.deg2rad(r.latitude)
    known = 288 - 30 * np.sin(lat) ** 2 - 0.006 * np.minimum(r.height, 11000)
    assert np.abs(np.asarray(mean)[:, 0] - known).mean() < 1.5
    wave = 5 * np.cos(lat) ** 2 / np.sqrt(2)
    tropics, polar = np.abs(r.latitude) < 20, np.abs(r.latitude) > 60
    assert np.asarray(sd)[tropics, 0].mean() > 1.5 * np.asarray(sd)[polar, 0].mean()
    assert abs(np.asarray(sd)[tropics, 0].mean() / wave[tropics].mean() - 1) < 0.35
    for z, _ in normals.standardise(fitted.normals, {"radiosonde": r}).values():
        np.testing.assert_allclose(np.nanmean(z**2, 0), 1.0, atol=0.02)


def test_fixed_platforms_keep_their_bias_and_a_limb_is_no_weather(reports, fitted):
    r = reports["station"]
    z, _ = normals.standardise(fitted.normals, {"station": r})["station"]
    for platform in range(30):
        own = z[r.platform == platform, 0]
        assert abs(np.nanmean(own)) < 0.4, "2 K of bias are gone"
    r = reports["amsua"]
    z, _ = normals.standardise(fitted.normals, {"amsua": r})["amsua"]
    edge = np.abs(r.view_angle) > 40
    assert np.abs(z[edge].mean(0)).max() < 0.35  # 4 K of limb, where the weather's deviation is 3 K
    gone = dataclasses.replace(reports["station"], values=reports["station"].values * [1, np.nan])
    with pytest.raises(EmptyWindowError, match="no value of 'surface_pressure'"):
        fit_climate(gone, sites=True)


def clustered(rng, sensor, variables, clusters, each):
    """Sites in clusters, all reporting the atmosphere at one height twice a day, with noise of 0.3."""
    lat, lon = np.linspace(-60, 60, clusters) if clusters > 1 else np.array([40.0]), rng.uniform(-180, 180, clusters)
    lat = np.clip(np.repeat(lat, each) + rng.normal(0, 6, clusters * each), -85, 85)
    lon = np.repeat(lon, each) + rng.normal(0, 10, clusters * each)
    lon = (lon + 180) % 360 - 180
    owner, when = (a.ravel() for a in np.meshgrid(np.arange(len(lat)), np.arange(0, DAYS * 24, 12), indexing="ij"))
    z = rng.choice([1000.0, 3000.0, 6000.0, 9000.0], len(owner))
    time = START + when * 3600
    value = temperature(lat[owner], lon[owner], z, time) + rng.normal(0, 0.3, len(owner))
    names = tuple(f"{sensor}{i}" for i in range(len(lat)))
    return ordered(sensor, variables, names, owner, time, (lat[owner], lon[owner], z), (value,))


def off_normal(normal, lat, lon, z):
    """Standardised departures of the atmosphere from a normal, over all phases of its wave."""
    time = START + np.linspace(0, DAYS * 86400, len(lat)).astype(int)
    mean, sd = normals.climate(
        normal, *(np.float32(x) for x in (lat, lon, z, 0 * z)), geometry.seconds(time.astype("datetime64[s]"))
    )
    return (temperature(lat, lon, z, time) - np.asarray(mean)[:, 0]) / np.asarray(sd)[:, 0]


def test_normals_of_clustered_sites_carry_to_other_places():
    """32 sites on four continents: 81 harmonics and their products with height fit them exactly, and nothing else."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        normal = fit_climate(clustered(rng, "radiosonde", ("temperature",), 4, 8), sites=False)
        lat, lon = sphere(rng, 400)
        far = off_normal(normal, lat, lon, rng.uniform(1000, 9000, 400))
        assert np.sqrt(np.mean(far**2)) < 5.0  # one penalty for all degrees: 50 to 300


def test_a_satellite_that_keeps_its_local_time_has_a_normal_at_every_hour(monkeypatch):
    """Weather of 5 K and no cycle of the day, seen at 9:30 and 21:30 only, an hour of local time to either side."""
    rng = np.random.default_rng(0)
    n = 20_000
    seconds = START + rng.integers(0, 60 * 86400, n)
    latitude = np.rad2deg(np.arcsin(rng.uniform(-0.99, 0.99, n)))
    local = rng.choice([9.5, 21.5], n) + rng.uniform(-0.7, 0.7, n)
    longitude = (15 * (local - seconds % 86400 / 3600) + 180) % 360 - 180
    day = (seconds - START) / 86400
    weather = sum(
        5 * np.sin(np.deg2rad(k * longitude + 360 * day / period + phase)) * np.cos(np.deg2rad(latitude))
        for k, period, phase in ((3, 9.0, 0.0), (5, 5.3, 70.0), (7, 4.1, 200.0))
    )
    value = 250 - 20 * np.sin(np.deg2rad(latitude)) ** 2 + weather
    reports = ordered(
        "amsua", ("brightness_temperature:5",), ("M",), np.zeros(n), seconds, (latitude, longitude, 0 * latitude),
        (value,), view_angle=0 * latitude,
    )  # fmt: skip
    lat, lon = (x.ravel() for x in np.meshgrid(np.arange(-80.0, 81.0, 20.0), np.arange(-180.0, 180.0, 30.0)))
    expected = 250 - 20 * np.sin(np.deg2rad(lat)) ** 2

    def errors():
        """Root mean square over hours and places, and the largest cycle of any place, K: there is none."""
        normal = fit_climate(reports, sites=False)
        zero, out = np.zeros_like(lat, np.float32), []
        for hour in range(0, 24, 3):
            time = np.full(lat.shape, geometry.seconds(np.datetime64(START + 3600 * hour, "s")), np.int32)
            mean, _ = normals.climate(normal, np.float32(lat), np.float32(lon), zero, zero, time)
            out.append(np.asarray(mean)[:, 0] - expected)
        return np.sqrt(np.mean(np.square(out))), np.ptp(out, 0).max()

    error, cycle = errors()
    monkeypatch.setattr(normals, "_LEAST_CYCLE", 0.0)  # as if all hours were known
    worse, noise = errors()
    assert error < 0.4, error  # of 4 K
    assert cycle < 0.6, cycle
    assert worse > 2 * error, worse
    assert noise > 1.2, noise


def test_sensors_that_share_a_normal_tell_each_other_of_places():
    rng = np.random.default_rng(0)
    sonde = clustered(rng, "radiosonde", ("temperature",), 1, 8)
    plane = clustered(rng, "aircraft", ("temperature",), 30, 2)
    cfg = dataclasses.replace(
        CFG,
        sensors=(SensorConfig("radiosonde", ("temperature",)), SensorConfig("aircraft", ("temperature",))),
        shared=(Shared(("radiosonde", "aircraft")),),
    )
    lat, lon = sphere(rng, 400)
    z = rng.uniform(1000, 9000, 400)
    errors = []
    for one in (cfg, dataclasses.replace(cfg, shared=())):
        fitted = model.fit({"radiosonde": sonde, "aircraft": plane}, one)
        errors.append(np.sqrt(np.mean(off_normal(fitted.normals["radiosonde"], lat, lon, z) ** 2)))
        if one.shared:
            jax.tree.map(np.testing.assert_array_equal, *(fitted.normals[s.sensor] for s in one.sensors))
    assert errors[0] < 3.0 < 5.0 < errors[1], errors
    with pytest.raises(ValueError, match="'ship' is in two groups, or not among"):
        dataclasses.replace(cfg, shared=(Shared(("radiosonde", "ship")),))
    with pytest.raises(ValueError, match=r"not two of .* have 'wind'"):
        dataclasses.replace(cfg, shared=(Shared(("radiosonde", "aircraft"), ("wind",)),))


def test_a_fixed_sensor_shares_a_mean_and_keeps_what_its_platforms_add():
    """Stations in one place, each with a bias of its own, learn of the rest of the globe from ships."""
    rng = np.random.default_rng(1)
    station = clustered(rng, "station", ("temperature",), 1, 8)
    bias = 3 * rng.normal(0, 1, 8)
    station = dataclasses.replace(station, values=station.values + bias[station.platform][:, None])
    ship = clustered(rng, "ship", ("temperature",), 30, 2)
    cfg = dataclasses.replace(
        CFG,
        sensors=(SensorConfig("station", ("temperature",), fixed=True), SensorConfig("ship", ("temperature",))),
        shared=(Shared(("station", "ship")),), temperature=("ship", "temperature"),
    )  # fmt: skip
    lat, lon = sphere(rng, 400)
    z = rng.uniform(1000, 9000, 400)
    reports = {"station": station, "ship": ship}
    near, alone = (model.fit(reports, one) for one in (cfg, dataclasses.replace(cfg, shared=())))
    far = [np.sqrt(np.mean(off_normal(f.normals["station"], lat, lon, z) ** 2)) for f in (near, alone)]
    assert far[0] < 3.0 < 5.0 < far[1], far
    at = [x.astype(np.float32) for x in (station.latitude, station.longitude, station.height, 0 * station.height)]
    left = []
    for platform in (None, station.platform):
        mean, _ = normals.climate(near.normals["station"], *at, geometry.seconds(station.times), platform)
        departure = station.values[:, 0] - np.asarray(mean)[:, 0]
        left.append(np.bincount(station.platform, departure) / np.bincount(station.platform))
    assert np.std(left[0]) > 1.0  # of the biases
    np.testing.assert_allclose(left[1], left[0] * 10 / 34, atol=0.05)  # 24 reports each, drawn to 0 as by ten
    assert near.normals["ship"].site.shape == (0, 1)


def test_anchors_are_told_the_normals_they_stand_in(reports):
    cfg = dataclasses.replace(CFG, normals=(("radiosonde", "temperature", 1000.0),))
    fitted = model.fit(reports, cfg, statics=lambda latitude, longitude: (0 * latitude)[:, None])
    told = np.asarray(fitted.anchors.statics)
    assert told.shape == (48, 2)
    assert np.corrcoef(told[:, 1], -(np.sin(np.deg2rad(fitted.anchors.latitude)) ** 2))[0, 1] > 0.95
    np.testing.assert_allclose([told[:, 1].mean(), told[:, 1].std()], [0, 1], atol=1e-3)


# --- windows


def test_windows_hold_what_was_reported_and_nothing_of_the_future(record, reports):
    rng = np.random.default_rng(0)
    for end in START + rng.integers(86400, DAYS * 86400, 10):
        got = record.window(int(end), rng, tokens={"station": 400, "radiosonde": 400, "amsua": 400})
        for name, t in got.items():
            there = t.mask.any(-1)
            assert (t.age[there] >= 0).all()
            assert (t.age[there] < CFG.step).all()
            r = reports[name]
            inside = (r.time > end - CFG.step * 3600) & (r.time <= end)
            assert there.sum() == np.isfinite(r.values[inside]).any(-1).sum()
    with pytest.raises(ObservationError, match="no reports of sensor 'radiosonde'"):
        records.select({"station": reports["station"]}, CFG.sensors[1])


def test_the_place_of_a_point_is_the_same_on_host_and_device():
    lat, lon = sphere(np.random.default_rng(5), 40)
    for cfg in (CFG.field, FieldConfig(20, (0.0, 5000.0), vertical_km=5.0, neighbours=4, reach=4)):
        z = np.linspace(0, 9000, 40)
        device = field.place(cfg, *(jnp.asarray(x, jnp.float32) for x in (lat, lon, z)))
        np.testing.assert_allclose(records.host_place(cfg, lat, lon, z), device, atol=2e-6)
        anchors = make_anchors(cfg)
        assert anchors.place.shape == (cfg.count, 4)
        np.testing.assert_allclose(
            np.einsum("mcp,mdp->mcd", anchors.frame, anchors.frame)[:, :2, :2],
            np.eye(2)[None].repeat(cfg.count, 0),
            atol=1e-6,
        )


# --- the field


def test_a_point_is_read_alike_however_many_others_are(params, window):
    """No grid hides anywhere: 1x, 4x and 16x as many points agree where they share one."""
    state = ASSIMILATE(params, None, window, TIME)
    anchors = params.fitted.anchors
    rng = np.random.default_rng(7)
    lat, lon = sphere(rng, 16 * 8)
    z = rng.uniform(0, 15000, 128)
    found = []
    for count in (8, 32, 128):
        t = at(lat[:count], lon[:count], z[:count], anchors=anchors)
        found.append([READ(params, state, {name: t})[name][0][:8] for name in ("station", "radiosonde", "amsua")])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.std(found[0][1]) > 0.01


def test_the_field_is_continuous_along_a_path(params, window):
    """Neighbours change on the way; the steps shrink with the distance between points all the same."""
    state = ASSIMILATE(params, None, window, TIME)
    jumps = []
    for count in (400, 4000):
        lat, lon = np.linspace(10, 40, count), np.linspace(-20, 90, count)
        t = at(lat, lon, np.linspace(0, 9000, count), anchors=params.fitted.anchors)
        jumps.append(float(jnp.abs(jnp.diff(READ(params, state, {"radiosonde": t})["radiosonde"][0], axis=0)).max()))
    assert jumps[1] < 0.2 * jumps[0]


def test_moving_a_report_moves_the_field_smoothly(params, window):
    t = at(*sphere(np.random.default_rng(8), 60), 2000.0, anchors=params.fitted.anchors)

    def after(km):
        station = window["station"]
        lat = np.array(station.latitude)
        lat[3] += km / 111.2
        place = records.host_place(CFG.field, lat, station.longitude, station.height).astype(np.float32)
        near = nearest(place, np.asarray(params.fitted.anchors.place), CFG.field.neighbours)
        moved = {**window, "station": station.replace(latitude=lat, near=near)}
        return READ(params, ASSIMILATE(params, None, moved, TIME), {"radiosonde": t})["radiosonde"][0]

    still, one, two = after(0.0), after(20.0), after(40.0)
    first, second = float(jnp.abs(one - still).max()), float(jnp.abs(two - still).max())
    assert 0 < first < 0.05
    assert 1.5 < second / first < 2.5


def test_turning_the_whole_scene_about_the_pole_turns_the_field(params, window):
    """Anchors, reports, queries and sun together: nothing else knows where Greenwich is."""
    turn = 75.0
    later = TIME - np.int32(turn / 15 * 3600)  # the sun stands over the turned meridian earlier
    cfg = CFG
    base = params.fitted.anchors
    lon = (np.asarray(base.longitude) + turn + 180) % 360 - 180
    place = jnp.asarray(
        records.host_place(cfg.field, np.asarray(base.latitude), lon, np.asarray(base.height)), jnp.float32
    )
    frame = jnp.concatenate([_turn(base.frame[..., :2], turn), base.frame[..., 2:]], -1)
    turned = dataclasses.replace(base, longitude=jnp.asarray(lon), place=place, frame=frame)
    other = params.replace(fitted=params.fitted.replace(anchors=turned))

    def rotate(t):
        longitude = (np.asarray(t.longitude) + turn + 180) % 360 - 180
        return t.replace(longitude=longitude.astype(np.float32))

    lat, lon = sphere(np.random.default_rng(9), 50)
    query = at(lat, lon, 3000.0, anchors=base)
    want = READ(params, ADVANCE(params, ASSIMILATE(params, None, window, TIME), 2), {"radiosonde": query})
    scene = {k: rotate(t) for k, t in window.items()}
    got = READ(other, ADVANCE(other, ASSIMILATE(other, None, scene, later), 2), {"radiosonde": rotate(query)})
    np.testing.assert_allclose(got["radiosonde"][0], want["radiosonde"][0], atol=2e-4)
    unturned = READ(other, ADVANCE(other, ASSIMILATE(other, None, window, later), 2), {"radiosonde": rotate(query)})
    assert float(jnp.abs(unturned["radiosonde"][0] - want["radiosonde"][0]).max()) > 0.01


def _turn(xy, degrees):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return xy @ jnp.asarray([[c, s], [-s, c]], jnp.float32)


# --- what counts


def test_order_padding_and_hidden_reports_do_not_matter(params, window):
    want = ASSIMILATE(params, None, window, TIME).latent
    rng = np.random.default_rng(4)
    shuffled = {}
    for name, t in window.items():
        order = rng.permutation(len(t.age))
        shuffled[name] = jax.tree.map(lambda x, order=order: np.asarray(x)[order], t)
    np.testing.assert_allclose(ASSIMILATE(params, None, shuffled, TIME).latent, want, atol=2e-5)

    rubbish, given = {}, {}
    for name, t in window.items():
        keep = np.arange(len(t.age)) % 3 > 0
        given[name] = keep & t.mask.any(-1)
        value = np.where(t.mask & keep[:, None], t.value, np.float32(1e6))
        rubbish[name] = t.replace(value=value)
    hidden = jax.jit(functools.partial(model.assimilate, cfg=CFG))
    a = hidden(params, None, window, TIME, given=given).latent
    b = hidden(params, None, rubbish, TIME, given=given).latent
    np.testing.assert_array_equal(a, b)
    assert float(jnp.abs(a - want).max()) > 1e-3


def test_every_sensor_moves_the_field_and_near_more_than_far(params, window):
    base = ASSIMILATE(params, None, window, TIME).latent
    for name, t in window.items():
        first = int(np.argmax(t.mask.any(-1)))
        value = np.array(t.value)
        value[first] += 1.0
        moved = ASSIMILATE(params, None, {**window, name: t.replace(value=value)}, TIME).latent
        change = np.abs(np.asarray(moved - base)).max(-1)
        anchors = params.fitted.anchors
        far = np.asarray(geometry.distance_km(
            t.latitude[first : first + 1], t.longitude[first : first + 1], anchors.latitude, anchors.longitude
        ))[0]  # fmt: skip
        order = np.argsort(far)
        assert change[order[:6]].max() > 1e-4, name
        assert change[order[:6]].max() > 5 * change[order[-12:]].max(), name


def test_advancing_in_one_go_or_two_is_the_same(params, window):
    state = ASSIMILATE(params, None, window, TIME)
    once, twice = ADVANCE(params, state, 3), ADVANCE(params, ADVANCE(params, state, 1), 2)
    np.testing.assert_allclose(once.latent, twice.latent, atol=1e-5)
    assert int(once.time) == int(TIME) + 18 * 3600


# --- radiometers


def test_weights_over_height_are_normalised_peak_where_told_and_rise_with_the_view(params):
    unseen = SensorConfig("amsua", tuple(f"brightness_temperature:{c}" for c in range(4, 11)), 10)
    fresh = init(jax.random.key(1), network.network_specs(CFG.network, CFG.sensors, 0)).senses["amsua"].form
    cfg = NetworkConfig()
    w = np.asarray(network.weighting(fresh, unseen, jnp.asarray([0.0, 30.0]), cfg=cfg))
    assert w.shape == (2, 7, len(cfg.heights))
    np.testing.assert_allclose(w.sum(-1), 1.0, atol=1e-5)
    centre = (w[0] * np.asarray(cfg.heights)).sum(-1)
    assert (np.diff(centre) > 0).all(), "channels 4 to 10 peak ever higher: also those that no training saw"


def test_an_unseen_channel_is_read(params, window):
    more = dataclasses.replace(
        CFG, sensors=(*CFG.sensors[:2], SensorConfig("amsua", ("brightness_temperature:6",), 50))
    )
    state = ASSIMILATE(params, None, window, TIME)
    query = at(*sphere(np.random.default_rng(2), 12), 0.0, anchors=params.fitted.anchors)
    query = query.replace(deviation=np.ones((12, 1), np.float32))
    mean, spread = model.read(params, state, {"amsua": query}, cfg=more)["amsua"]
    assert mean.shape == spread.shape == (12, 1)
    assert np.isfinite(mean).all()


# --- training


STAGE = StageConfig("run", 60, cycles=2, leads=2, learning_rate=5e-3, warmup=10, batch=2, hide=0.2)


@pytest.fixture(scope="module")
def trained(record, fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tcfg = TrainConfig((STAGE,), ema=0.9, checkpoint_every=30, log_every=10)
    return tcfg, folder, train((record,), fitted, CFG, tcfg, folder, progress=False)


def test_training_beats_the_climate_at_every_sensor(record, fitted, trained):
    _, folder, params = trained
    rows = training.read_metrics(folder / "run" / "metrics.jsonl")
    for name in ("station", "radiosonde", "amsua"):  # the climate's mean square is 1
        assert np.mean([row[f"after/{name}"] for row in rows[-2:]]) < 0.7, name
    # and the spread says how much is left
    w = record.window(END, np.random.default_rng(1))
    state = ADVANCE(
        params, ASSIMILATE(params, None, record.window(END - 21600, np.random.default_rng(2)), TIME - 21600), 1
    )
    for name, (mean, log_spread) in READ(params, state, w).items():
        error = np.where(w[name].mask, w[name].value - mean, 0.0)
        z = np.sqrt((error**2)[w[name].mask].mean() / np.exp(2 * np.asarray(log_spread))[w[name].mask].mean())
        assert 0.4 < z < 2.5, name


def test_training_again_changes_nothing(record, fitted, trained):
    tcfg, folder, params = trained
    again = train((record,), fitted, CFG, tcfg, folder, progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.network, params.network)


def test_a_trained_model_is_read_back_whole(trained, tmp_path):
    _, folder, params = trained
    again, cfg, meta = model.load_model(folder / "model", cfg=CFG)
    assert cfg == CFG
    assert meta == {"seed": 0}
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(CheckpointError, match="step"):
        model.load_model(folder / "model", cfg=dataclasses.replace(CFG, step=12.0))
    with pytest.raises(CheckpointError, match="its Fitted differs from today"):
        stations.load_model(folder / "model")


def test_networks_go_on_with_the_normals_they_learned_with_only(record, fitted, trained):
    tcfg, folder, params = trained
    normal = fitted.normals["station"]
    warmer = dataclasses.replace(normal, site=normal.site + 0.1)
    other = dataclasses.replace(fitted, normals={**fitted.normals, "station": warmer})
    with pytest.raises(CheckpointError, match=r"normals.*station.*site"):
        train((record,), other, CFG, tcfg, folder, progress=False)
    nearly = dataclasses.replace(fitted, profile=fitted.profile * (1 + 1e-6))  # another machine's rounding
    again = train((record,), nearly, CFG, tcfg, folder, progress=False)
    np.testing.assert_array_equal(again.fitted.profile, params.fitted.profile)


def test_a_spin_is_a_part_of_the_chain_without_gradients(params, record):
    chain = chains.chain(record, END, 5, np.random.default_rng(0))
    tokens, time = chain["tokens"], jnp.asarray(chain["time"])
    given = {name: jnp.ones(t.age.shape, bool)[:4] for name, t in tokens.items()}

    def read(value, spin):
        own = {**tokens, "station": dataclasses.replace(tokens["station"], value=value)}
        out = chains.run(params, own, time, given, cfg=CFG, cycles=4 - spin, leads=1, spin=spin)
        return out[2]["station"][0].sum(), out

    value = jnp.asarray(tokens["station"].value)
    whole = jax.jit(lambda v: read(v, 0)[1])(value)
    (_, parts), late = jax.jit(jax.value_and_grad(functools.partial(read, spin=2), has_aux=True))(value)
    for a, b in zip(jax.tree.leaves(whole[1:]), jax.tree.leaves(parts[1:]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    for a, b in zip(jax.tree.leaves(whole[0]), jax.tree.leaves(parts[0]), strict=True):
        np.testing.assert_allclose(a[2:], b, atol=2e-5)
    assert np.abs(late[2:4]).max() > 0
    assert np.abs(late[:2]).max() == 0


@pytest.mark.slow
def test_one_sample_is_scored_as_two_are(params, record):
    """It is not mapped over: gathers with a batch axis are slow on a CPU."""
    chain = chains.chain(record, END, 5, np.random.default_rng(0))
    batch = jax.tree.map(lambda x: x[None], chain)
    stage = dataclasses.replace(STAGE, spin=1, batch=1)
    scored = jax.jit(functools.partial(chains.loss, fitted=params.fitted, cfg=CFG, stage=stage))
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
    totals = [scored(params.network, b, jax.random.key(0))[0] for b in (batch, twice)]
    assert all(0 < float(t.total) < np.inf for part in totals for t in part.values())
    # one sample is not mapped over: its windows are scored as those of two are
    for key in totals[0]:
        if key.startswith("after") or key.startswith("before"):
            assert float(totals[1][key].weight) == 2 * float(totals[0][key].weight)


def test_hidden_reports_are_hidden(record):
    tokens = chains.chain(record, END, 4, np.random.default_rng(0))["tokens"]
    hidden = 0
    for seed in range(20):
        given = chains.shown(jax.random.key(seed), tokens, CFG, dataclasses.replace(STAGE, hide=0.5, keep=0.7))
        gone = [name for name, g in given.items() if not np.asarray(g).any()]
        hidden += len(gone)
        assert len(gone) < 3, "one sensor at least is shown"
        for name, g in given.items():
            if name not in gone:
                assert np.asarray(g[0]).all()
                assert 0.3 < np.asarray(g[-1]).mean() < 0.95
    assert 10 < hidden < 45


def test_a_head_on_the_frozen_trunk_learns_a_product(record, trained):
    """Temperature at 5 km over points, from radiances and soundings alone, on days that the head has not seen."""
    _, _, params = trained
    rng = np.random.default_rng(0)
    times = START + np.arange(2, 44) * 6 * 3600
    place = [sphere(rng, 40) for _ in times]
    frame = pd.DataFrame(
        {
            "time": np.repeat(times, 40).astype("datetime64[s]"),
            "latitude": np.concatenate([p[0] for p in place]),
            "longitude": np.concatenate([p[1] for p in place]),
            "height": 0.0,
        }
    )
    known = temperature(frame.latitude, frame.longitude, 5000.0, np.repeat(times, 40))
    frame["t5"], frame["nothing"] = known, np.nan
    early = np.repeat(np.arange(len(times)) < 30, 40)
    given = {"station": False}
    icfg = InversionConfig(steps=1500, learning_rate=5e-3, cycles=2, hidden=32)
    head = fit_inversion(params, record, frame[early], ["t5"], cfg=CFG, icfg=icfg, given=given, progress=False)
    error, wave = [], []
    for time in times[30:40]:
        rows = frame[frame.time == np.datetime64(int(time), "s")]
        state = analyse(params, record, np.datetime64(int(time), "s"), cycles=2, cfg=CFG, given=given)
        q = queries(CFG, params.fitted.anchors, "station", rows.latitude, rows.longitude, rows.height)
        mean, spread = invert(params, head, state, q, cfg=CFG)
        assert mean.shape == spread.shape == (40, 1)
        error.append(np.asarray(mean)[:, 0] - rows.t5)
        wave.append(rows.t5 - (288 - 30 * np.sin(np.deg2rad(rows.latitude)) ** 2 - 30))
    assert np.std(np.concatenate(error)) < 0.9 * np.std(np.concatenate(wave))
    with pytest.raises(EmptyWindowError, match="'nothing' has no value"):
        fit_inversion(params, record, frame, ["t5", "nothing"], cfg=CFG, icfg=icfg)


NOISY = dataclasses.replace(CFG, network=dataclasses.replace(CFG.network, noise=4))


def test_the_score_of_members_is_the_fair_one():
    rng = np.random.default_rng(0)
    members, value = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 5))
    ours = chains.ranked_probability(jnp.asarray(members), jnp.asarray(value))
    np.testing.assert_allclose(ours, verify.crps_ensemble(members, value, axis=1, fair=True), atol=1e-6)


def test_one_key_is_one_course_of_the_atmosphere(params, fitted, window):
    net = init(jax.random.key(3), network.network_specs(NOISY.network, NOISY.sensors, 0))
    noisy = Params(fitted, net)
    start = model.assimilate(noisy, None, window, TIME, cfg=NOISY)
    a, b = jax.random.split(jax.random.key(0))
    once = model.advance(noisy, start, 3, cfg=NOISY, key=a)
    twice = model.advance(noisy, model.advance(noisy, start, 1, cfg=NOISY, key=a), 2, cfg=NOISY, key=a)
    np.testing.assert_allclose(once.latent, twice.latent, atol=1e-5)
    for other in (None, b):
        assert np.abs(once.latent - model.advance(noisy, start, 3, cfg=NOISY, key=other).latent).max() > 1e-3
    analysed = [model.assimilate(noisy, start, window, TIME, cfg=NOISY, key=key).latent for key in (a, a, b, None)]
    np.testing.assert_array_equal(analysed[0], analysed[1])
    assert np.abs(analysed[0] - analysed[2]).max() > 1e-3
    assert np.abs(analysed[0] - analysed[3]).max() > 1e-3
    with pytest.raises(ValueError, match="without noise"):
        model.advance(params, start, 1, cfg=CFG, key=a)


@pytest.mark.slow
def test_members_differ_about_as_much_as_they_err(record, fitted, reports, tmp_path):
    """Spread beside the error of the mean, against the formula that made the reports."""
    stages = (STAGE, dataclasses.replace(STAGE, name="members", steps=150, members=2, learning_rate=3e-3))
    tcfg = TrainConfig(stages, ema=0.9, log_every=10)
    params = train((record,), fitted, NOISY, tcfg, tmp_path, progress=False)
    rng = np.random.default_rng(5)
    lat, lon = sphere(rng, 60)
    frames = []
    for init_time in np.datetime64(START, "s") + np.arange(5, 10) * np.timedelta64(86400, "s"):
        valid = init_time + np.timedelta64(6, "h")
        frames.append(
            pd.DataFrame(
                {
                    "init_time": init_time, "valid_time": valid, "group": "radiosonde", "variable": "temperature",
                    "latitude": lat, "longitude": lon, "height": 3000.0, "pressure": np.nan,
                    "truth": temperature(lat, lon, 3000.0, valid.astype("datetime64[s]").astype(int)),
                }
            )
        )  # fmt: skip
    frame = pd.concat(frames, ignore_index=True)
    members = ensemble(params, record, frame, members=8, cycles=2, cfg=NOISY, progress=False)
    error = np.sqrt(np.mean((members.mean(1) - frame["truth"]) ** 2))
    spread = np.sqrt(np.mean(members.var(1, ddof=1)) * 9 / 8)
    climate = np.std(frame["truth"] - frame["truth"].mean())
    assert error < 0.8 * climate, (error, climate)
    assert 0.5 < spread / error < 2.0, (spread, error)


def test_denial_scores_every_cell_beside_the_climate_and_a_regression(record, reports, trained):
    _, _, params = trained
    ends = (START + np.arange(30, 40) * 6 * 3600).astype("datetime64[s]")
    past = (START + np.arange(2, 30) * 6 * 3600).astype("datetime64[s]")
    given = {"in situ": ("station", "radiosonde"), "sounder": ("amsua",)}
    made = denial_matrix(
        params, record, ends, record, past, cfg=CFG, given=given, predicted=("radiosonde", "amsua"), progress=False
    )
    cells = {(r.given, r.predicted, r.variable): r for r in made.itertuples()}
    assert ("sounder", "amsua") not in {(g, p) for g, p, _ in cells}, "nothing is left to read"
    for cell in cells.values():
        assert 0.7 < cell.rmse_climate < 1.3
        assert cell.rmse_regression < 1.05 * cell.rmse_climate
        assert cell.ratio == cell.rmse / min(cell.rmse_climate, cell.rmse_regression)
    warm = cells["in situ", "amsua", "brightness_temperature:5"]
    assert warm.rmse_regression < 0.9, "soundings tell of radiances"
    assert warm.rmse < 0.9
    # The predicted sensor's own reports are not read: other values of it change the scores of nothing else.
    other = dataclasses.replace(reports["amsua"], values=reports["amsua"].values[::-1].copy())
    fake = Record(
        {**reports, "amsua": other}, CFG.sensors, CFG.field, params.fitted.anchors, params.fitted.normals, 6.0
    )
    states = [analyse(params, r, ends[0], cycles=1, cfg=CFG, given={"amsua": False}).latent for r in (record, fake)]
    np.testing.assert_array_equal(*states)


def test_forecasts_answer_a_frame(record, reports, trained):
    _, _, params = trained
    init = (START + np.arange(20, 23) * 6 * 3600).astype("datetime64[s]")
    rows = []
    for i in init:
        for lead in (3, 6, 12):
            for group, variable, pressure in (
                ("station", "2m_temperature", np.nan), ("radiosonde", "temperature", 5e4), ("station", "rain", np.nan)
            ):  # fmt: skip
                rows.append((i, i + np.timedelta64(lead, "h"), group, variable, 10.0 * lead, 20.0, 100.0, pressure))
    columns = ["init_time", "valid_time", "group", "variable", "latitude", "longitude", "height", "pressure"]
    frame = pd.DataFrame(rows, columns=columns)
    mean, sd = forecast(params, record, frame, cycles=2, cfg=CFG, progress=False)
    rain = (frame.variable == "rain").to_numpy()
    assert np.isnan(mean[rain]).all()
    assert np.isfinite(mean[~rain]).all()
    assert (sd[~rain] > 0).all()
    # one row, by the verbs
    row = 3  # 6 h
    state = analyse(params, record, init[0], cycles=2, cfg=CFG)
    q = queries(CFG, params.fitted.anchors, "station", *([x] for x in (60.0, 20.0, 100.0)))
    want, _ = model.observe(params, ADVANCE(params, state, 1), "station", q, cfg=CFG)
    np.testing.assert_allclose(mean[row], want[0, 0], rtol=1e-5)
    upper = geometry.standard_height(5e4)
    q = queries(CFG, params.fitted.anchors, "radiosonde", [30.0], [20.0], [upper], age=[3.0])
    want, _ = model.observe(params, ADVANCE(params, state, 1), "radiosonde", q, cfg=CFG)
    np.testing.assert_allclose(mean[1], want[0, 0], rtol=1e-5)
    # a carried analysis is a longer chain
    every = {s.sensor: 400 for s in CFG.sensors}  # not thinned: the same reports either way
    cycled, _ = forecast(params, record, frame, cycles=2, cfg=CFG, carry=True, tokens=every, progress=False)
    state = analyse(params, record, init[2], cycles=4, cfg=CFG, tokens=every)
    q = queries(CFG, params.fitted.anchors, "station", *([x] for x in (60.0, 20.0, 100.0)))
    want, _ = model.observe(params, ADVANCE(params, state, 1), "station", q, cfg=CFG)
    np.testing.assert_allclose(cycled[18 + row], want[0, 0], rtol=1e-5)
    assert abs(cycled[18 + row] - mean[18 + row]) > 1e-4
    # nothing after the initial time is read
    late = {k: r.take(r.time <= int(init[0].astype(int))) for k, r in reports.items()}
    cut = Record(late, CFG.sensors, CFG.field, params.fitted.anchors, params.fitted.normals, CFG.step)
    again, _ = forecast(params, cut, frame[frame.init_time == init[0]], cycles=2, cfg=CFG, progress=False)
    np.testing.assert_allclose(again, mean[: len(again)], rtol=1e-5)
    with pytest.raises(ObservationError, match="age of 7"):
        queries(CFG, params.fitted.anchors, "station", [0.0], [0.0], [0.0], age=[7.0])
    with pytest.raises(ObservationError, match="latitude of query 1 is nan"):
        queries(CFG, params.fitted.anchors, "station", [0.0, np.nan], [0.0, 0.0], [0.0, 0.0])


def test_bad_configs_are_named():
    with pytest.raises(ValueError, match="each once"):
        WorldConfig((CFG.sensors[0], CFG.sensors[0]))
    with pytest.raises(ValueError, match="vertical_km"):
        FieldConfig(20, (0.0, 1000.0))
    with pytest.raises(ValueError, match="neighbours 80"):
        FieldConfig(20, neighbours=80)
    with pytest.raises(ValueError, match="multiple of heads"):
        NetworkConfig(width=10, heads=4)
    with pytest.raises(ValueError, match="cycles 0"):
        StageConfig("x", 1, cycles=0)
    with pytest.raises(ValueError, match="'rain' is not among station's variables"):
        dataclasses.replace(CFG, normals=(("station", "rain", 0.0),))
    with pytest.raises(ValueError, match="sensor 'buoy' is not among"):
        CFG.sensor("buoy")


def test_a_record_shorter_than_a_chain_is_an_error(record):
    with pytest.raises(EmptyWindowError, match="as long as 100 windows"):
        chains.starts((record,), 100, 1)
