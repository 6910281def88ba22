"""earth.baselines.globe: normals and interpolation against closed forms and scikit-learn, forecasts of known waves."""

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from earth.baselines import globe
from earth.baselines.globe import GlobeConfig, Kernel, Points
from earth.baselines.panel import BaselineError
from earth.geometry import harmonic_degrees, harmonics, standard_pressure

START = np.datetime64("2000-01-01", "ns")
LEVELS = (85000.0, 70000.0, 50000.0, 25000.0)
PERIOD = 96.0  # hours in which the wave of wavenumber 3 turns once


def normal(variable, lat, lon, height, pressure, hours):
    """The climate of `world`: smooth, with a diurnal cycle and, for surface pressure, the ground's height."""
    s, local = np.sin(np.deg2rad(lat)), 2 * np.pi * (hours + lon / 15) / 24
    east = np.cos(np.deg2rad(lat)) * np.cos(np.deg2rad(lon))
    if variable == "surface_pressure":
        return np.log(1e5) + 0.01 * (1 - s**2) - height / 8000 + 0.002 * east
    if variable.endswith("temperature"):
        x = -height / 120 if variable.startswith("lowest") else 40 * np.log(pressure / 1e5)
        return 290 - 35 * s**2 + x + 3 * east + (2.0 * np.cos(local) if variable.startswith("lowest") else 0.0)
    if "_u_" in "_" + variable:
        return 12 - 15 * s**2 + 2 * east
    return 1.5 * east


def weather(variable, lat, lon, hours, amplitude):
    """A wave that travels eastward, in units of the variable; amplitude changes slowly with time."""
    scale = 0.01 if variable == "surface_pressure" else 4.0
    shift = 1.0 if variable.endswith("v_component_of_wind") else 0.0
    phase = 3 * np.deg2rad(lon) - 2 * np.pi * hours / PERIOD + shift
    return scale * amplitude * np.cos(phase) * np.cos(np.deg2rad(lat))


def world(days=32, seed=0, stations=60, sondes=40):
    """A canonical table of stations, sondes and scatterometer winds, and its truth as a function."""
    rng = np.random.default_rng(seed)
    grid = np.arange(0, 24 * days + 241, 6.0)
    size = np.ones(len(grid))
    for k in range(1, len(grid)):
        size[k] = 1 + 0.98 * (size[k - 1] - 1) + 0.1 * rng.normal()

    def truth(variable, lat, lon, height, pressure, hours):
        return normal(variable, lat, lon, height, pressure, hours) + weather(
            variable, lat, lon, hours, np.interp(hours, grid, size)
        )

    site = np.random.default_rng(99)  # the same places in every world
    parts = []

    def report(sensor, prefix, lat, lon, height, pressure, hours, names, errors):
        number, lat, lon, height, pressure, hours = np.broadcast_arrays(
            np.arange(len(lat))[:, None], lat[:, None], lon[:, None], height[:, None], pressure, hours
        )
        for name, error in zip(names, errors, strict=True):
            exact = truth(name, lat, lon, height, pressure, hours)
            value = np.exp(exact) if name == "surface_pressure" else exact
            frame = pd.DataFrame({"latitude": lat.ravel(), "longitude": lon.ravel()})
            frame["time"] = START + (hours.ravel() * 3600).astype("timedelta64[s]")
            frame["height"], frame["pressure"], frame["variable"] = height.ravel(), pressure.ravel(), name
            frame["value"] = value.ravel() + error * rng.normal(size=value.size)
            frame["sensor"], frame["obs_error"], frame["channel"] = sensor, error, -1
            frame["platform"] = [f"{prefix}{k}" for k in number.ravel()]
            parts.append(frame)

    def anywhere(count):
        return np.rad2deg(np.arcsin(site.uniform(-0.98, 0.98, count))), site.uniform(-180, 180, count)

    low = [f"lowest_level_{name}" for name in ("temperature", "u_component_of_wind", "v_component_of_wind")]
    steps = np.arange(0, 24 * days + 1, 3.0)
    report(
        "station",
        "ST",
        *anywhere(stations),
        site.uniform(0, 1500, stations),
        np.nan,
        steps,
        [*low, "surface_pressure"],
        [0.3, 0.3, 0.3, 30.0],
    )
    lat, lon = anywhere(sondes)
    for level in LEVELS:
        report(
            "radiosonde",
            "RS",
            lat,
            lon,
            np.full(sondes, np.nan),
            level,
            np.arange(0, 24 * days + 1, 12.0),
            [name.removeprefix("lowest_level_") for name in low],
            [0.3] * 3,
        )
    lat, lon = anywhere(30)
    report("scatterometer", "SC", lat, lon, np.zeros(30), np.nan, np.arange(3, 24 * days, 12.0), low[1:], [0.3, 0.3])
    table = pd.concat(parts).sort_values("time", kind="stable").reset_index(drop=True)
    table.loc[table["sensor"] == "scatterometer", "platform"] = "SCAT"
    return table, truth


def wanted_of(truth, inits, leads=(6, 24, 48), seed=5):
    """Targets at unseen places."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(12):
        lat, lon, height = np.rad2deg(np.arcsin(rng.uniform(-0.9, 0.9))), rng.uniform(-180, 180), rng.uniform(0, 1500)
        group = "station" if k < 8 else "radiosonde"
        for name in (
            ("lowest_level_temperature", "lowest_level_u_component_of_wind", "surface_pressure")
            if k < 8
            else ("temperature", "v_component_of_wind")
        ):
            for pressure in (np.nan,) if k < 8 else (85000.0, 50000.0):
                for init in inits:
                    for lead in leads:
                        exact = float(truth(name, lat, lon, height, pressure, init + lead))
                        rows.append(
                            (
                                START + np.timedelta64(int(init), "h"),
                                lead,
                                START + np.timedelta64(int(init + lead), "h"),
                                group,
                                name,
                                lat,
                                lon,
                                height,
                                pressure,
                                np.exp(exact) if name == "surface_pressure" else exact,
                            )
                        )
    return pd.DataFrame(
        rows,
        columns=[
            "init_time",
            "lead_time",
            "valid_time",
            "group",
            "variable",
            "latitude",
            "longitude",
            "height",
            "pressure",
            "truth",
        ],
    )


CFG = GlobeConfig(
    tuning_times=0,
    kernels=(Kernel(2500.0, steering=0.0), Kernel(2500.0, steering=0.0), Kernel(2500.0, steering=0.0)),
    damping_times=25,
    neighbours=24,
    grid_neighbours=24,
    grid=(8, 12),
    waves=4,
    components=(2, 4),
    penalties=(1e-4, 1e-2),
    leads=(6, 24, 48),
)


@pytest.fixture(scope="module")
def fitted():
    table, truth = world()
    return globe.fit_globe(table, CFG, progress=False), table, truth


@pytest.fixture(scope="module")
def forecasts(fitted):
    table, truth = world(days=20, seed=1)
    wanted = wanted_of(truth, np.arange(72.0, 400.0, 24.0))
    return globe.forecast(fitted[0], table, wanted, progress=False), wanted, table


def points(lat, lon, quantity=0, level=9.0, hours=0.0, surface=False, height=0.0) -> Points:
    lat, lon, quantity, level, hours, surface, height = np.broadcast_arrays(
        np.asarray(lat, float),
        np.asarray(lon, float),
        np.asarray(quantity, int),
        float(level) if np.ndim(level) == 0 else level,
        np.asarray(hours, float),
        np.asarray(surface, bool),
        np.asarray(height, float),
    )
    return Points(*(np.array(x) for x in (hours, lat, lon, height, level, quantity, surface)))


def scattered(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.rad2deg(np.arcsin(rng.uniform(-1, 1, count))), rng.uniform(-180, 180, count), rng


# ------------------------------------------------------------------------------------------------------------- normals
def test_harmonics_are_orthonormal_over_the_sphere():
    nodes, weights = np.polynomial.legendre.leggauss(12)
    lat, lon = np.meshgrid(np.rad2deg(np.arcsin(nodes)), np.arange(24) * 15.0, indexing="ij")
    values, degrees = harmonics(lat.ravel(), lon.ravel(), 6, xp=np), harmonic_degrees(6)
    assert np.bincount(degrees).tolist() == [2 * n + 1 for n in range(7)]
    area = np.repeat(weights / 2 / 24, 24)
    np.testing.assert_allclose((values.T * area) @ values, np.eye(49), atol=1e-12)


def test_normals_recover_a_known_climate_where_nobody_reports(fitted):
    lat, lon, rng = scattered(300, seed=3)
    lat = np.clip(lat, -70, 70)
    hours = 24 * 365.25 * 30 // 24 * 24 + rng.uniform(0, 960, 300)  # any day: the climate has no seasons
    for name, (quantity, surface) in globe._VARIABLES.items():
        height = rng.uniform(100, 1400, 300) if surface else np.zeros(300)
        pressure = rng.choice(LEVELS, 300)
        level = np.log(0.94 * standard_pressure(height)) if surface else np.log(pressure)
        found = fitted[0].climate.normal(points(lat, lon, quantity, level, hours, surface, height))
        exact = normal(name, lat, lon, height, pressure, hours)
        assert np.sqrt(np.mean((found - exact) ** 2)) < 0.25 * (0.01 if quantity == 3 else 4.0) / math.sqrt(2), name


def test_spread_is_that_of_the_weather(fitted):
    lat = np.array([-50.0, 0.0, 50.0])
    found = fitted[0].climate.spread(points(lat, 10.0, 0, np.log(5e4)))
    anomaly = np.stack(
        [
            fitted[2]("temperature", lat, lon, 0.0, 5e4, hour) - normal("temperature", lat, lon, 0.0, 5e4, hour)
            for lon in range(0, 120, 20)
            for hour in range(0, 768, 12)
        ]
    )
    np.testing.assert_allclose(found, np.sqrt((anomaly**2).mean(0)), rtol=0.25)


# ------------------------------------------------------------------------------------------------ optimal interpolation
def test_interpolation_is_that_of_a_gaussian_process():
    lat, lon, rng = scattered(40)
    to_lat, to_lon, _ = scattered(25, seed=1)
    values, errors = rng.normal(size=40), rng.uniform(0.1, 0.6, 40)
    kernel = Kernel(length_km=1800.0)
    found, spread = globe.interpolate(kernel, points(lat, lon), values, errors, points(to_lat, to_lon), neighbours=99)
    place, to_place = (globe._nodes(points(*x)).place for x in ((lat, lon), (to_lat, to_lon)))
    oracle = GaussianProcessRegressor(RBF(1800.0 / 6371.0, "fixed"), alpha=errors**2, optimizer=None).fit(place, values)
    mean, deviation = oracle.predict(to_place, return_std=True)
    np.testing.assert_allclose(found, mean, atol=1e-6)
    np.testing.assert_allclose(spread, deviation, atol=1e-6)
    # The nearest thirty of forty within 1,800 km hold nearly all of it.
    fewer, _ = globe.interpolate(kernel, points(lat, lon), values, errors, points(to_lat, to_lon), neighbours=30)
    assert 0 < np.abs(fewer - mean).max() < 0.2


@pytest.mark.parametrize("quantity", [0, 1])
def test_without_error_reports_come_back_and_far_away_is_climatology(quantity):
    lat, lon, rng = scattered(30)
    values = rng.normal(size=30)
    given = points(lat, lon, quantity)
    kernel = Kernel(length_km=500.0)
    found, spread = globe.interpolate(kernel, given, values, np.zeros(30), given, neighbours=20)
    np.testing.assert_allclose(found, values, atol=1e-5)
    assert spread.max() < 1e-3
    one, spread = globe.interpolate(
        kernel, points([0.0], [0.0], quantity), np.ones(1), np.ones(1), points([0.0, 0.0], [0.0, 90.0], quantity)
    )
    np.testing.assert_allclose(one, [0.5, 0.0], atol=1e-6)  # half: as good as the report
    np.testing.assert_allclose(spread**2, [0.5, 1.0], atol=1e-6)


@pytest.mark.parametrize("family", ["gauss", "soar"])
def test_wind_covariance_is_the_curl_of_a_streamfunctions(family):
    """u = -dpsi/dy, v = dpsi/dx: second differences of the scalar covariance on a patch that is nearly flat."""
    kernel = Kernel(length_km=120.0, family=family, divergent=0.0)
    unit = 120.0 / 111.195  # a length in degrees
    step = 0.02 * unit

    def psi(a, b):
        nodes = [globe._nodes(points([p[1]], [p[0]])) for p in (a, b)]
        return float(globe.covariance(kernel, *nodes, False)[0])

    def second(a, b, i, j):
        d = step * np.eye(2)
        four = [psi(a + s * d[i], b + t * d[j]) * s * t for s in (1, -1) for t in (1, -1)]
        return sum(four) / (2 * step / unit) ** 2

    for b in (np.array([0.7, 0.4]), np.array([-0.3, 1.1]), np.array([1.5, -0.2])):
        a, b = np.zeros(2), b * unit
        axis = {1: (1, -1.0), 2: (0, 1.0)}  # quantity -> (derivative, sign)
        for p, q in ((1, 1), (2, 2), (1, 2), (2, 1)):
            expected = axis[p][1] * axis[q][1] * second(a, b, axis[p][0], axis[q][0])
            nodes = [globe._nodes(points([x[1]], [x[0]], k)) for x, k in ((a, p), (b, q))]
            assert float(globe.covariance(kernel, *nodes, True)[0]) == pytest.approx(expected, abs=4e-3)


def test_wind_covariance_has_no_negative_variance():
    lat, lon, rng = scattered(120)
    kernel = Kernel(1500.0, 0.5, 24.0, divergent=0.2, link=0.5)
    nodes = globe._nodes(
        points(
            lat,
            lon,
            rng.integers(1, 3, 120),
            rng.uniform(10, 11.5, 120),
            rng.uniform(0, 24, 120),
            rng.random(120) < 0.5,
        )
    )
    matrix = globe.covariance(kernel, nodes.take((slice(None), None)), nodes.take((None, slice(None))), True)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(matrix), 1.0, atol=1e-12)
    # Along and across are those of the plane: on the sphere they are positive but for terms of (L / R)^2.
    assert np.linalg.eigvalsh(matrix).min() > -0.01


def test_tuning_finds_the_length_of_the_weather():
    table, _ = world(days=12)
    reports = globe.reports_of(table)
    standard = globe._Standard(reports, globe.fit_climate(reports))
    times = globe._nominal(reports.points.hours[0] + 24, reports.points.hours[-1], 12, 3)
    start = GlobeConfig(kernels=(Kernel(250.0), Kernel(250.0), Kernel(250.0)), tuning_times=3, neighbours=12)
    kernels, skill = globe._tune(standard, start, times, globe._folds(reports, 0), False)
    assert min(kernel.length_km for kernel in kernels) > 600  # a third of a wave of 13,000 km at least
    assert max(skill.values()) < 0.7  # of the anomalies' standard deviation, at places that gave no report


# ------------------------------------------------------------------------------------------------------------ forecasts
def rmse(forecasts, wanted, model, **where):
    rows = np.logical_and.reduce([wanted[name] == value for name, value in where.items()])
    return float(np.sqrt(np.mean((forecasts[model] - wanted["truth"])[rows] ** 2)))


@pytest.mark.parametrize("variable", ["lowest_level_temperature", "surface_pressure", "temperature"])
def test_forecasts_of_a_travelling_wave(forecasts, variable):
    """Half a period on, persistence is the wrong way round; a wave that only travels is linear and foreseeable."""
    found, wanted, _ = forecasts
    assert all(np.isfinite(values).all() for values in found.values())
    error = {
        (m, lead): rmse(found, wanted, m, variable=variable, lead_time=lead) for m in found for lead in (6, 24, 48)
    }
    for model in found:
        if model != "climatology" and (model, variable) != ("persistence", "temperature"):  # sondes are far apart
            assert error[model, 6] < 0.75 * error["climatology", 6], model
    assert error["oi_persistence", 6] < error["persistence", 6]  # many reports against the nearest one
    assert error["oi_persistence", 48] > 1.5 * error["climatology", 48]
    assert error["oi_damped", 48] < 1.1 * error["climatology", 48]
    assert error["var", 48] < 0.5 * error["climatology", 48]
    assert error["var", 24] < 0.5 * error["oi_damped", 24]
    for lead in (6, 24, 48):  # at least as good as the better of what it blends
        assert error["oi_var", lead] < 1.05 * min(error["oi_damped", lead], error["var", lead])


def test_damping_is_the_autocorrelation_of_the_weather(fitted):
    damping = fitted[0].damping  # [quantity, level, band, lead 0, 6, 24, 48]
    waves = np.cos(2 * np.pi * np.array([0, 6, 24]) / PERIOD)
    np.testing.assert_allclose(damping[0, 0].mean(0)[:3], waves, atol=0.15)
    np.testing.assert_array_equal(damping[0, 0, :, 3], 0)  # the wave is inverted: cut at 0
    np.testing.assert_allclose(damping[0, 3].mean(0)[[0, 2]], waves[[0, 2]], atol=0.2)  # 500 hPa


def test_forecasts_read_nothing_after_the_initial_time(fitted, forecasts):
    found, wanted, table = forecasts
    first = wanted["init_time"].min()
    rows = (wanted["init_time"] == first).to_numpy()
    late = table["time"] > first
    spoilt = table.assign(value=np.where(late, table["value"] * 1.1, table["value"]))
    again = globe.forecast(fitted[0], spoilt, wanted[rows], progress=False)
    for model, values in again.items():
        np.testing.assert_allclose(values, found[model][rows], rtol=1e-12)
    earlier = table["time"] > first - np.timedelta64(6, "h")
    spoilt = table.assign(value=np.where(earlier, table["value"] * 1.1, table["value"]))
    again = globe.forecast(fitted[0], spoilt, wanted[rows], progress=False)
    for model in ("persistence", "oi_persistence", "oi_damped", "var", "oi_var"):
        assert np.abs(again[model] - found[model][rows]).max() > 0.1


def test_what_is_not_forecast_is_nan_and_known_variables_are_not_touched(fitted, forecasts):
    found, wanted, table = forecasts
    some = wanted.iloc[:40].copy()
    some.loc[some.index[::2], "variable"] = "specific_humidity"
    again = globe.forecast(fitted[0], table, some, progress=False)
    for model, values in again.items():
        assert np.isnan(values[::2]).all()
        np.testing.assert_allclose(values[1::2], found[model][1:40:2], rtol=1e-12)


def test_mistakes_are_typed_errors(fitted, forecasts):
    _, wanted, table = forecasts
    with pytest.raises(BaselineError, match="none of"):
        globe.reports_of(table.assign(variable="specific_humidity"))
    with pytest.raises(BaselineError, match="too few to fit leads"):
        globe.fit_globe(table[table["time"] < START + np.timedelta64(48, "h")], CFG, progress=False)
    fewer = dataclasses.replace(fitted[0], cfg=dataclasses.replace(CFG, leads=(6, 48)))
    with pytest.raises(BaselineError, match="lead 24 h was not fitted"):
        globe.forecast(fewer, table, wanted, progress=False)
    with pytest.raises(BaselineError, match=r"\['var'\]"):
        globe.forecast(dataclasses.replace(fitted[0], waves=()), table, wanted, progress=False)
    with pytest.raises(BaselineError, match="grid="):
        GlobeConfig(grid=(16, 10))
    with pytest.raises(BaselineError, match="family='cubic'"):
        Kernel(family="cubic")
    only: Any = table[table["sensor"] != "radiosonde"]
    with pytest.raises(BaselineError, match=r"no report of \['temperature'"):
        globe.fit_globe(only, CFG, progress=False)
