"""earth.osse.letkf: the transform against a dense Kalman filter, the operators against the truth, the cycle itself."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from configs import osse_global
from earth.geometry import unit_vector
from earth.osse import letkf, query
from earth.osse.letkf import LetkfConfig, LetkfError
from earth.osse.nature import NatureConfig, dynamical_core
from earth.osse.verification import VerificationConfig, held_out_platforms, targets

pytest.importorskip("dinosaur", reason="extra osse is not installed")

MODEL = NatureConfig(
    truncation=15, spin_up_days=0, days=2, save_hours=3, relief_height=2000.0, diurnal_amplitude=4.0, seed=3
)


# ------------------------------------------------------------------------------------------------------- the transform
def ensemble(rng, state=6, members=5):
    return rng.normal(size=(state, members)) * rng.uniform(0.5, 2.0, (state, 1)) + rng.normal(size=(state, 1))


def test_transform_is_the_kalman_filter_of_the_ensembles_covariance():
    """Mean and covariance of the analysis in float64, from the textbook gain and not from the ensemble's space."""
    rng = np.random.default_rng(0)
    x, h = ensemble(rng), rng.normal(size=(9, 6))
    r, y, inflation = rng.uniform(0.3, 2.0, 9), rng.normal(size=9), 1.3
    mean = x.mean(1)
    away = x - mean[:, None]
    p = inflation * away @ away.T / 4
    gain = p @ h.T @ np.linalg.inv(h @ p @ h.T + np.diag(r))
    shift, matrix = (
        np.asarray(part, np.float64)
        for part in letkf.transform(jnp.asarray(h @ away), jnp.asarray(y - h @ mean), jnp.asarray(1 / r), inflation)
    )
    np.testing.assert_allclose(mean + away @ shift, mean + gain @ (y - h @ mean), atol=2e-5)
    after = away @ matrix
    np.testing.assert_allclose(after @ after.T / 4, (np.eye(6) - gain @ h) @ p, atol=2e-5)
    np.testing.assert_allclose(after.sum(1), 0, atol=2e-5)  # the square root is the symmetric one: it keeps the mean


def test_filter_is_the_kalman_filter_of_a_linear_problem():
    """Thirty cycles of a rotating, damped state seen through two noisy sums; with a large ensemble whose spread is the
    initial covariance exactly and no model error, the ensemble filter is the Kalman filter.
    """
    rng = np.random.default_rng(1)
    turn = 0.98 * np.array([[np.cos(0.3), -np.sin(0.3), 0], [np.sin(0.3), np.cos(0.3), 0], [0, 0, 1.0]])
    h, r = np.array([[1.0, 0, 1.0], [0, 1.0, 0]]), np.array([0.2, 0.4])
    members = np.concatenate([np.eye(3), -np.eye(3)], 1) * np.sqrt(5 / 2)  # covariance I
    mean, cov = np.zeros(3), np.eye(3)
    truth = rng.normal(size=3)
    for _ in range(30):
        truth, members, mean, cov = turn @ truth, turn @ members, turn @ mean, turn @ cov @ turn.T
        y = h @ truth + np.sqrt(r) * rng.normal(size=2)
        gain = cov @ h.T @ np.linalg.inv(h @ cov @ h.T + np.diag(r))
        mean, cov = mean + gain @ (y - h @ mean), (np.eye(3) - gain @ h) @ cov
        centre = members.mean(1)
        away = members - centre[:, None]
        shift, matrix = letkf.transform(jnp.asarray(h @ away), jnp.asarray(y - h @ centre), jnp.asarray(1 / r), 1.0)
        members = (centre + away @ np.asarray(shift))[:, None] + away @ np.asarray(matrix)
        np.testing.assert_allclose(members.mean(1), mean, atol=3e-4)
        np.testing.assert_allclose(np.cov(members), cov, atol=3e-4)


def analysis(radius, depth=np.inf, relaxation=0.0, seed=2, count=30, neighbours=32):
    """One analysis of random columns, through `_neighbours` and `analyse` as a cycle does it."""
    rng = np.random.default_rng(seed)
    cfg = LetkfConfig(members=6, radius_km=radius, neighbours=neighbours)
    lat, lon = rng.uniform(-80, 80, count), rng.uniform(-180, 180, count)
    grid_lat, grid_lon = rng.uniform(-80, 80, 12), rng.uniform(-180, 180, 12)
    columns = rng.normal(size=(6, 4, 3, 12))
    observed = rng.normal(size=(count, 6))
    departures, variance, level = rng.normal(size=count), rng.uniform(0.3, 2.0, count), rng.uniform(10, 11.5, count)
    place = pd.DataFrame({"latitude": lat, "longitude": lon})
    nearest, weight = letkf._neighbours(cfg, place, unit_vector(grid_lat, grid_lon, xp=np))
    levels = np.broadcast_to(np.array([10.2, 10.8, 11.4])[:, None], (3, 12))
    arrays = (columns, observed, departures, variance, level)
    out = letkf.analyse(
        *(jnp.asarray(x, jnp.float32) for x in arrays),
        jnp.asarray(nearest, jnp.int32),
        jnp.asarray(weight, jnp.float32),
        jnp.asarray(levels, jnp.float32),
        depth,
        1.1,
        relaxation,
    )
    return np.asarray(out, np.float64), arrays, (lat, lon, grid_lat, grid_lon, levels)


def global_etkf(columns, observed, departures, variance, inflation=1.1):
    """One transform for all, by singular values in float64 (Bishop et al. 2001), not by the routine under test."""
    members = columns.shape[0]
    centre = columns.mean(0)
    away = columns - centre
    y = (observed - observed.mean(1, keepdims=True)) / np.sqrt(variance)[:, None]
    _, s, v = np.linalg.svd(y * np.sqrt(inflation / (members - 1)))
    gamma = np.zeros(members)
    gamma[: len(s)] = s**2
    inner = (v.T / (1 + gamma)) @ v * inflation / (members - 1)
    shift = inner @ (y.T @ (departures / np.sqrt(variance)))
    matrix = (v.T / np.sqrt(1 + gamma)) @ v * np.sqrt(inflation)
    return centre + np.einsum("mflc,m->flc", away, shift) + np.einsum("mflc,mk->kflc", away, matrix)


def test_without_localisation_it_is_the_global_transform():
    out, arrays, _ = analysis(np.inf)
    np.testing.assert_allclose(out, global_etkf(*arrays[:4]), atol=1e-4)


def test_localisation_uses_near_observations_only_with_inflated_errors():
    out, (columns, observed, departures, variance, level), (lat, lon, glat, glon, levels) = analysis(1200.0, 0.4)
    moved = 0
    for c in range(12):
        cosine = np.sin(np.deg2rad(lat)) * np.sin(np.deg2rad(glat[c])) + np.cos(np.deg2rad(lat)) * np.cos(
            np.deg2rad(glat[c])
        ) * np.cos(np.deg2rad(lon - glon[c]))
        distance = 6371 * np.arccos(np.clip(cosine, -1, 1))
        for k in range(3):
            weight = gaspari(distance / 1200) * gaspari(np.abs(level - levels[k, c]) / 0.4)
            near = weight > 1e-9
            moved += near.any()
            expected = global_etkf(
                columns[:, :, k : k + 1, c : c + 1], observed[near], departures[near], variance[near] / weight[near]
            )
            np.testing.assert_allclose(out[:, :, k, c], expected[:, :, 0, 0], atol=1e-3)
    assert 5 < moved < 36  # some columns see nothing: they only inflate


def gaspari(r):
    """Gaspari-Cohn as the self-convolution of a linear cone in three dimensions: their definition, by quadrature."""
    x = (np.arange(40) + 0.5) / 40 * 2 - 1
    a, b = np.meshgrid(x, np.abs(x[20:]), indexing="ij")  # axis, radius; the cone has support 1 (= c)

    def overlap(shift):
        one = np.clip(1 - np.hypot(a, b), 0, None)
        two = np.clip(1 - np.hypot(a - shift, b), 0, None)
        return (one * two * b).sum()

    norm = overlap(0.0)
    return np.array([overlap(s) / norm if s < 2 else 0.0 for s in np.atleast_1d(r)])


def test_gaspari_cohn_is_the_convolution_that_defines_it():
    r = np.linspace(0, 2.2, 23)
    np.testing.assert_allclose(letkf.gaspari_cohn(jnp.asarray(r)), gaspari(r), atol=3e-3)


def test_relaxation_draws_the_spread_back_and_leaves_the_mean():
    free, arrays, _ = analysis(np.inf)
    for share in (0.5, 1.0):
        held, _, _ = analysis(np.inf, relaxation=share)
        np.testing.assert_allclose(held.mean(0), free.mean(0), atol=1e-5)
        expected = (1 - share) * free.std(0) + share * arrays[0].std(0)
        np.testing.assert_allclose(held.std(0), expected, rtol=1e-4)


def test_fewer_neighbours_take_the_nearest():
    few, arrays, (lat, lon, glat, glon, _) = analysis(np.inf, neighbours=8)
    place, grid = unit_vector(lat, lon, xp=np), unit_vector(glat, glon, xp=np)
    for c in range(12):
        near = np.argsort(-(grid[c] @ place.T))[:8]
        expected = global_etkf(arrays[0][..., c : c + 1], arrays[1][near], arrays[2][near], arrays[3][near])
        np.testing.assert_allclose(few[..., c], expected[..., 0], atol=1e-4)


# ------------------------------------------------------------------------------------------------------- the operators
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from earth.osse import simulate

    preset = osse_global.tiny()
    radiosondes: Any = dataclasses.replace(preset.radiosondes, humidity=False, drift=True)
    nature = dataclasses.replace(preset.nature, spin_up_days=2, days=1, moisture=False)
    config = dataclasses.replace(preset, nature=nature, radiosondes=radiosondes, imagers=())
    return simulate(config, cache=tmp_path_factory.mktemp("nature"), progress=False)


def test_operators_at_the_truth_are_the_truth(world):
    """Every sensor's error-free value, by the simulator's own queries."""
    found = letkf.equivalents(world.truth, world.table, radiometers=world.meta.config.sounders)
    assert np.isfinite(found).all()
    scale = world.table["obs_error"].to_numpy()
    error = np.abs(found - world.meta.truth_values.to_numpy()) / scale
    worst: Any = pd.Series(error).groupby([world.table["sensor"], world.table["variable"]]).max()
    assert len(worst) == 19
    assert worst.max() < 1e-3, worst


def test_a_column_goes_on_under_the_models_ground_and_ends_at_its_top(world):
    """At an isothermal-free place: pressure by hydrostatics with the temperature that the lowest line gives."""
    truth = world.truth
    at = {"time": truth.start, "latitude": 35.0, "longitude": 90.0}
    ground = float(query(truth, ["surface_altitude"], **at)["surface_altitude"])
    surface = float(query(truth, ["surface_pressure"], **at)["surface_pressure"])
    low = [surface * s for s in truth.sigma[:2]]
    t0, t1 = (float(query(truth, ["temperature"], **at, pressure=p)["temperature"]) for p in low)
    slope = (t0 - t1) / np.log(low[0] / low[1])
    # Down to 600 m below the ground in small steps of the hydrostatic equation.
    log_p, steps = np.log(surface), 6000
    for _ in range(steps):
        temperature = t0 + slope * (log_p - np.log(low[0]))
        log_p += 600.0 / steps * 9.80616 / (1004 * 2 / 7 * temperature)
    rows = pd.DataFrame(
        {"variable": ["surface_pressure", "lowest_level_temperature", "lowest_level_u_component_of_wind"]}
    )
    rows = rows.assign(time=truth.start, latitude=35.0, longitude=90.0, height=ground - 600.0, pressure=np.nan)
    found = letkf.equivalents(truth, rows)
    assert found[0] == pytest.approx(np.exp(log_p), rel=1e-4)
    level = log_p + np.log(truth.sigma[0])
    assert found[1] == pytest.approx(t0 + slope * (level - np.log(low[0])), abs=0.02)
    wind = query(truth, ["lowest_level_u_component_of_wind"], **at)["lowest_level_u_component_of_wind"]
    if level > np.log(low[0]):
        assert found[2] == pytest.approx(float(wind), abs=1e-6)
    upper = rows.assign(variable="temperature", pressure=[1e3, surface * 1.05, np.nan], height=np.nan)
    found = letkf.equivalents(truth, upper)
    assert np.isnan(found[[0, 2]]).all()
    assert found[1] == pytest.approx(t0 + slope * (np.log(surface * 1.05) - np.log(low[0])), abs=1e-6)


@pytest.fixture(scope="module")
def core():
    return dynamical_core(MODEL)


def test_restored_states_are_the_states_they_came_from(core):
    carry = core.carry
    for _ in range(8):
        carry = core.advance(carry)
    fields = core.diagnose(carry)
    again = core.restore(fields, 24.0)
    for name, tolerance in (("temperature", 0.01), ("u_component_of_wind", 0.02), ("surface_pressure", 6.0)):
        for one, two in (
            (fields, core.diagnose(again)),
            (core.diagnose(core.advance(carry)), core.diagnose(core.advance(again))),
        ):
            np.testing.assert_allclose(one[name], two[name], atol=tolerance)  # ln ps is 45 in float32
    # The hour of the day matters: the sun heats another continent.
    wrong = core.diagnose(core.advance(core.restore(fields, 12.0)))
    assert np.abs(wrong["temperature"] - core.diagnose(core.advance(carry))["temperature"]).max() > 0.1


# ----------------------------------------------------------------------------------------------------------- the cycle
@pytest.fixture(scope="module")
def run(world, core):
    """Eight members of a coarser model from 2 to 9 days of its own adjustment, against a truth of another seed."""
    cfg = LetkfConfig(model=MODEL, members=8, member_days=1, radius_km=2500.0, neighbours=128)
    carry, states = core.carry, []
    for day in range(10):
        states.append({name: np.asarray(x) for name, x in core.diagnose(carry).items()})
        for _ in range(8 * (day < 9)):
            carry = core.advance(carry)
    members = {name: np.stack([state[name] for state in states[2:]]) for name in states[0]}
    held = held_out_platforms(world.meta.platforms)
    given = world.table[~world.table["platform"].isin(held)].reset_index(drop=True)
    inits = world.truth.start + np.array([6, 18], "timedelta64[h]")
    result = letkf.assimilate(
        given, world.truth.start, inits, members, cfg, radiometers=world.meta.config.sounders, core=core, progress=False
    )
    return cfg, members, given, inits, core, result, held


def test_analyses_come_nearer_to_the_truth_than_the_first_ensemble(world, run):
    _, members, _, inits, core, result, _ = run
    assert set(result.analyses) == set(inits)
    lat, lon = np.meshgrid(core.latitude, core.longitude)
    at = (inits[-1], lat[None], lon[None])
    names = {"temperature": "lowest_level_temperature", "surface_pressure": "surface_pressure"}
    exact = query(world.truth, list(names.values()), *at)
    for name, variable in names.items():
        analysis, first = (
            x[name][:, -1] if name == "temperature" else x[name] for x in (result.analyses[inits[-1]], members)
        )
        error, before = (np.sqrt(np.mean((x.mean(0) - exact[variable][0]) ** 2)) for x in (analysis, first))
        assert error < 0.8 * before
        assert analysis.std(0).min() > 0
    late: Any = result.diagnostics[result.diagnostics["time"] == inits[-1]]
    assert set(late["sensor"]) == set(world.table["sensor"])
    assert (late["n"] > 0).all()


def test_forecast_answers_the_targets_and_starts_from_the_analysis(world, run):
    cfg, _, _, inits, core, result, held = run
    protocol = VerificationConfig(warm_up_hours=6, leads=(3, 6))
    wanted = targets(world.truth, world.meta.platforms, held, None, protocol)
    found = letkf.forecast(result.analyses, world.truth.start, wanted, cfg, core=core, progress=False)
    assert np.isfinite(found).all()
    mean = {name: x.mean(0) for name, x in result.analyses[inits[0]].items()}
    carry = core.restore(mean, 6.0)
    for _ in range(6 // cfg.model.save_hours):
        carry = core.advance(carry)
    truth = letkf.as_truth(core, [{name: np.asarray(x) for name, x in core.diagnose(carry).items()}])
    rows = (wanted["init_time"] == inits[0]) & (wanted["lead_time"] == 6)
    expected = letkf.equivalents(truth, wanted[rows], np.full(rows.sum(), truth.start))
    np.testing.assert_allclose(found[rows], expected, rtol=1e-6)
    many = dataclasses.replace(cfg, ensemble_forecast=True)
    other = letkf.forecast(result.analyses, world.truth.start, wanted[rows], many, core=core, progress=False)
    assert 0 < np.abs(other - expected)[wanted.loc[rows, "variable"] == "temperature"].max() < 10
    strange = wanted.assign(variable="specific_humidity")
    assert np.isnan(
        letkf.forecast(result.analyses, world.truth.start, strange[rows], cfg, core=core, progress=False)
    ).all()


def test_analyses_read_nothing_after_their_time(world, run):
    cfg, members, given, inits, core, result, _ = run
    some = list(inits[:1])
    late = given["time"] > some[0]
    spoilt = given.assign(value=np.where(late, given["value"] * 1.2, given["value"]))
    again = letkf.assimilate(
        spoilt,
        world.truth.start,
        np.array(some),
        members,
        cfg,
        radiometers=world.meta.config.sounders,
        core=core,
        progress=False,
    )
    for name, values in again.analyses[some[0]].items():
        np.testing.assert_array_equal(values, result.analyses[some[0]][name])


def test_gross_errors_are_rejected_and_counted(world, run):
    cfg, members, given, _, core, _, _ = run
    init = world.truth.start + np.array([6], "timedelta64[h]")
    broken = (given["sensor"] == "ship") & (given["variable"] == "surface_pressure")
    spoilt = given.assign(value=np.where(broken, 2e5, given["value"]))
    report: Any = letkf.assimilate(spoilt, world.truth.start, init, members, cfg, core=core, progress=False).diagnostics
    ships: Any = report[(report["sensor"] == "ship") & (report["variable"] == "surface_pressure")]
    assert ships["n"].sum() == 0
    assert ships["n_rejected"].sum() > 0
    radiances: Any = report[report["variable"] == "brightness_temperature"]  # no radiometer was named: none can be read
    assert radiances["n"].sum() == 0


def test_thinning_keeps_the_newest_of_each_box(world):
    table = world.table[world.table["sensor"] == "aircraft"].reset_index(drop=True)
    fewer: Any = letkf.thin(table, 1000.0)
    assert 0 < len(fewer) < 0.8 * len(table)
    assert letkf.thin(table, 0.0) is table
    two: Any = pd.concat(
        [table.iloc[:3], table.iloc[:3].assign(value=-1.0, time=table["time"].max())], ignore_index=True
    )
    newest: Any = letkf.thin(two, 100.0)
    assert (newest["value"] == -1.0).all()
    assert set(letkf.thin(world.table, 300.0)["platform"]) == set(world.table["platform"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": 1}, "members=1"),
        ({"cycle_hours": 5}, "cycle_hours=5"),
        ({"radius_km": 0.0}, "radius_km=0.0"),
        ({"inflation": 0.9}, "inflation=0.9"),
    ],
)
def test_bad_configs_are_typed_errors(change, message):
    with pytest.raises(LetkfError, match=message):
        LetkfConfig(**change)


def test_bad_requests_are_typed_errors(world, run):
    cfg, members, given, inits, core, result, _ = run
    late = inits[:1] + np.timedelta64(1, "h")
    with pytest.raises(LetkfError, match="not a multiple of 6 h"):
        letkf.assimilate(given, world.truth.start, late, members, cfg, core=core)
    noon = world.truth.start + np.timedelta64(6, "h")
    with pytest.raises(LetkfError, match="midnight"):
        letkf.assimilate(given, noon, inits[1:], members, cfg, core=core)
    with pytest.raises(LetkfError, match="8 members were given for members=20"):
        letkf.assimilate(given, world.truth.start, inits, members, dataclasses.replace(cfg, members=20), core=core)
    odd = pd.DataFrame({"init_time": inits[:1], "lead_time": [5], "variable": ["temperature"]})
    with pytest.raises(LetkfError, match="not multiples of save_hours=3"):
        letkf.forecast(result.analyses, world.truth.start, odd, cfg, core=core)


@pytest.mark.slow
def test_example_compares_model_baselines_and_filter(tmp_path):
    from examples import global_osse

    assert global_osse.main(["--tiny", "--seeds", "0", "--out", str(tmp_path)]) == 0
    table: Any = pd.read_csv(tmp_path / "table.csv")
    assert set(table["model"]) == {
        "world_0",
        "climatology",
        "persistence",
        "oi_persistence",
        "oi_damped",
        "var",
        "oi_var",
        "letkf",
    }
    assert (table["n_unforecast"] == 0).all()
    assert np.isfinite(table["rmse"]).all()
    denial: Any = pd.read_csv(tmp_path / "denial.csv")
    assert np.isfinite(denial["ratio"]).all()
    assert {"stations, AMSU-A"} <= set(denial["given"])
    inversion: Any = pd.read_csv(tmp_path / "inversion.csv")
    assert {"surface_pressure, ground", "temperature, 500 hPa"} <= set(inversion["product"])
    assert np.isfinite(inversion["ratio"]).all()
