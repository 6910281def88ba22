"""earth.osse: nature run, truth, instruments and their caches, against closed forms, scipy and statistics."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.integrate import quad
from scipy.interpolate import RegularGridInterpolator

from configs.osse_stations import demo, held_suarez, tiny
from earth.observations import COLUMNS, to_reports, validate
from earth.osse import (
    DinosaurMissingError,
    ErrorModel,
    InstrumentError,
    NatureCacheError,
    NatureConfig,
    NatureConfigError,
    NatureRunError,
    OsseConfig,
    Placement,
    RadiosondeNetwork,
    StationNetwork,
    Truth,
    TruthQueryError,
    nature,
    nature_run,
    observe_radiosondes,
    observe_stations,
    query,
    read_nature,
    simulate,
    truth_from_dataset,
)

R, G = 1004 * 2 / 7, 9.80616  # J kg-1 K-1, m s-2: dinosaur's constants
SIGMA = (np.arange(8) + 0.5) / 8
LATITUDE = np.rad2deg(np.arcsin(np.polynomial.legendre.leggauss(32)[0]))  # ascending, like the nature run's
LONGITUDE = np.arange(64) * 5.625


def dataset(temperature, u=None, v=None, pressure=None, altitude=None, steps=3, hours=6) -> xr.Dataset:
    """A nature run of given fields: functions of (time index, sigma, latitude, longitude) that broadcast."""
    t, s, j, i = np.ix_(np.arange(steps), SIGMA, LATITUDE, LONGITUDE)
    dims = ("time", "sigma", "latitude", "longitude")

    def field(function):
        values = 0.0 if function is None else function(t, s, j, i)
        return dims, np.broadcast_to(values, (steps, 8, 32, 64)).astype(np.float32)

    z = np.zeros((32, 64)) if altitude is None else np.broadcast_to(altitude(j, i), (1, 1, 32, 64))[0, 0]
    ps = 1e5 if pressure is None else pressure(t, j, i)
    return xr.Dataset(
        {
            "temperature": field(temperature),
            "u_component_of_wind": field(u),
            "v_component_of_wind": field(v),
            "surface_pressure": (("time", "latitude", "longitude"), np.broadcast_to(ps, (steps, 1, 32, 64))[:, 0]),
            "surface_altitude": (("latitude", "longitude"), z),
        },
        {
            "time": np.datetime64("2000-01-01", "ns") + np.arange(steps) * np.timedelta64(hours, "h"),
            "sigma": SIGMA,
            "latitude": LATITUDE,
            "longitude": LONGITUDE,
        },
    )


def isothermal(steps=3, hours=6) -> xr.Dataset:
    """A resting isothermal 280 K atmosphere over a mountain, in exact balance at the grid points."""

    def hill(j, i):
        return 2000 * np.exp(-(((j - 30) / 20) ** 2) - ((i - 180) / 30) ** 2)

    return dataset(
        lambda t, s, j, i: 280.0,
        pressure=lambda t, j, i: 1e5 * np.exp(-G * hill(j, i) / (R * 280)),
        altitude=hill,
        steps=steps,
        hours=hours,
    )


def wavy(steps=3, hours=6) -> xr.Dataset:
    """A smooth baroclinic-looking atmosphere with jets, weather in ps and a tropopause, that changes with time."""
    return dataset(
        lambda t, s, j, i: (
            np.maximum(210.0, 300 - 40 * np.sin(np.deg2rad(j)) ** 2 + 75 * np.log(s))
            + 3 * np.sin(np.deg2rad(3 * i) + 0.3 * t)
        ),
        u=lambda t, s, j, i: 40 * (1 - s) * np.sin(2 * np.deg2rad(j)) ** 2 + 3 * np.cos(np.deg2rad(4 * i) + t),
        v=lambda t, s, j, i: 5 * np.cos(np.deg2rad(4 * i) - 0.2 * t) * np.cos(np.deg2rad(j)),
        pressure=lambda t, j, i: 1e5 + 1500 * np.sin(np.deg2rad(4 * i) - 0.2 * t) * np.cos(np.deg2rad(j)) ** 2,
        steps=steps,
        hours=hours,
    )


def scattered(count=500, seed=0, max_latitude=85.0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-max_latitude, max_latitude, count), rng.uniform(-180, 360, count), rng


# ---------------------------------------------------------------------------------------------------------------- truth
def test_truth_is_the_nature_run_at_its_grid_points():
    rng = np.random.default_rng(1)
    run = dataset(
        lambda *_: rng.uniform(200, 310, (3, 8, 32, 64)), pressure=lambda *_: rng.uniform(9e4, 1e5, (3, 1, 32, 64))
    )
    truth = truth_from_dataset(run)
    time, lat, lon = run.time.values[:, None, None], LATITUDE[:, None], LONGITUDE
    got = query(truth, ["lowest_level_temperature", "surface_pressure"], time, lat, lon)
    np.testing.assert_array_equal(got["lowest_level_temperature"], run.temperature.values[:, -1])
    np.testing.assert_allclose(got["surface_pressure"], run.surface_pressure.values, rtol=1e-14)
    for level in range(8):
        pressure = SIGMA[level] * run.surface_pressure.values
        upper = query(truth, ["temperature", "pressure"], time, lat, lon, pressure=pressure)
        np.testing.assert_allclose(upper["temperature"], run.temperature.values[:, level], rtol=1e-12)
        np.testing.assert_allclose(upper["pressure"], pressure, rtol=1e-12)


def test_interpolation_is_exact_on_linear_fields_and_agrees_with_scipy_on_any():
    truth = truth_from_dataset(dataset(lambda t, s, j, i: 250 + 0.3 * j + 4.0 * t + 20 * np.log(s), steps=4))
    lat, lon, rng = scattered()
    hours = rng.uniform(0, 18, 500)
    time = truth.start + (hours * 3600e9).astype("timedelta64[ns]")
    pressure = rng.uniform(7e3, 1e5, 500)  # down to the ground: below the lowest centre the same line goes on
    got = query(truth, ["temperature"], time, lat, lon, pressure=pressure)["temperature"]
    np.testing.assert_allclose(got, 250 + 0.3 * lat + 4.0 * hours / 6 + 20 * np.log(pressure / 1e5), atol=2e-4)

    rng = np.random.default_rng(2)
    run = dataset(lambda *_: rng.uniform(200, 310, (3, 8, 32, 64)))
    values = run.temperature.values.astype(float)[:, ::-1]
    oracle = RegularGridInterpolator(
        ([0.0, 6.0, 12.0], -np.log(SIGMA[::-1]), LATITUDE, np.append(LONGITUDE, 360.0)),
        np.concatenate([values, values[..., :1]], axis=-1),
    )
    hours = rng.uniform(0, 12, 500)
    time = run.time.values[0] + (hours * 3600e9).astype("timedelta64[ns]")
    sigma = np.exp(rng.uniform(np.log(SIGMA[0]), np.log(SIGMA[-1]), 500))
    got = query(truth_from_dataset(run), ["temperature"], time, lat, lon, pressure=1e5 * sigma)["temperature"]
    expected = oracle(np.stack([hours, -np.log(sigma), lat, lon % 360], axis=-1))
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_longitude_is_periodic():
    truth = truth_from_dataset(wavy())
    lat, lon, _ = scattered()
    names = ["lowest_level_temperature", "lowest_level_u_component_of_wind", "surface_pressure"]
    base = query(truth, names, truth.start, lat, lon)
    for turn in (-720.0, -360.0, 360.0):
        turned = query(truth, names, truth.start, lat, lon + turn)
        for name in names:
            np.testing.assert_allclose(turned[name], base[name], rtol=1e-9, atol=1e-9)
    seam = query(truth, names, truth.start, 10.0, np.array([-1e-17, 0.0, 354.375, 357.1875, 360.0]))
    for name in names:
        assert seam[name][0] == seam[name][1] == seam[name][4]
        if name == "surface_pressure":  # linear in its logarithm
            assert seam[name][3] == pytest.approx(np.sqrt(seam[name][1] * seam[name][2]), rel=1e-12)
        else:
            assert seam[name][3] == pytest.approx(0.5 * (seam[name][1] + seam[name][2]), rel=1e-12)


def test_poles_scalars_are_single_valued_and_a_wind_across_is_one_vector():
    # Solid-body rotation by 20 m/s about the axis through (0N, 0E): over the north pole it blows along 90W.
    truth = truth_from_dataset(
        dataset(
            lambda t, s, j, i: 250 + np.cos(np.deg2rad(i)) + 0.1 * j,
            u=lambda t, s, j, i: -20 * np.sin(np.deg2rad(j)) * np.cos(np.deg2rad(i)),
            v=lambda t, s, j, i: 20 * np.sin(np.deg2rad(i)) + 0 * j,
        )
    )
    lon = np.linspace(0, 360, 37)
    names = ["lowest_level_temperature", "lowest_level_u_component_of_wind", "lowest_level_v_component_of_wind"]
    for pole in (90.0, -90.0):
        got = query(truth, names, truth.start, pole, lon)
        np.testing.assert_allclose(got[names[0]], 250 + 0.1 * np.sign(pole) * LATITUDE.max(), atol=1e-3)
        np.testing.assert_allclose(got[names[1]], -20 * np.sign(pole) * np.cos(np.deg2rad(lon)), atol=0.1)
        np.testing.assert_allclose(got[names[2]], 20 * np.sin(np.deg2rad(lon)), atol=0.1)
    lat = np.linspace(86, 89.9, 30)
    near = query(truth, names, truth.start, lat[:, None], lon)
    np.testing.assert_allclose(near[names[2]], np.broadcast_to(20 * np.sin(np.deg2rad(lon)), (30, 37)), atol=0.1)


def test_isothermal_atmosphere_is_hydrostatic_everywhere_even_between_the_points_of_a_mountain():
    truth = truth_from_dataset(isothermal())
    lat, lon, rng = scattered(seed=3)
    z = query(truth, ["surface_altitude", "surface_pressure"], truth.start, lat, lon)
    assert z["surface_altitude"].max() > 1500
    np.testing.assert_allclose(z["surface_pressure"], 1e5 * np.exp(-G * z["surface_altitude"] / (R * 280)), rtol=1e-6)
    pressure = rng.uniform(1e4, 7e4, 500)
    height = query(truth, ["geopotential_height"], truth.start, lat, lon, pressure=pressure)["geopotential_height"]
    np.testing.assert_allclose(height, R * 280 / G * np.log(1e5 / pressure), rtol=1e-6)
    back = query(truth, ["pressure", "temperature"], truth.start, lat, lon, height=height)
    np.testing.assert_allclose(back["pressure"], pressure, rtol=1e-6)
    np.testing.assert_allclose(back["temperature"], 280, rtol=1e-6)


def test_heights_integrate_the_interpolated_temperature_and_invert():
    run = wavy()
    truth = truth_from_dataset(run)
    j, i = 25, 7
    at = {"time": truth.start, "latitude": LATITUDE[j], "longitude": LONGITUDE[i]}
    surface = float(run.surface_pressure.values[0, j, i])

    def temperature(log_p):
        return float(query(truth, ["temperature"], **at, pressure=np.exp(log_p))["temperature"])

    for pressure in (9.7e4, 7e4, 3.1e4, 8e3):
        # kinks at the centres: let quad know them
        kinks = np.log(surface * SIGMA[(surface * SIGMA > pressure)])
        expected = quad(temperature, np.log(pressure), np.log(surface), points=kinks)[0] * R / G
        got = query(truth, ["geopotential_height"], **at, pressure=pressure)["geopotential_height"]
        assert got == pytest.approx(expected, rel=1e-7)

    lat, lon, rng = scattered(seed=5)
    pressure = rng.uniform(7e3, 9.7e4, 500)
    names = ["geopotential_height", "temperature", "u_component_of_wind"]
    there = query(truth, names, truth.end, lat, lon, pressure=pressure)
    back = query(truth, ["pressure", *names], truth.end, lat, lon, height=there["geopotential_height"])
    np.testing.assert_allclose(back["pressure"], pressure, rtol=1e-9)
    for name in names:
        np.testing.assert_allclose(back[name], there[name], rtol=1e-8, atol=1e-8)


def test_there_is_no_truth_underground_or_above_the_top():
    truth = truth_from_dataset(isothermal())
    surface = query(truth, ["surface_pressure", "surface_altitude"], truth.start, 30.0, 180.0)
    pressure = surface["surface_pressure"] * np.array([1.001, 1.0, 0.5, SIGMA[0], SIGMA[0] * 0.999, np.nan])
    at = query(truth, ["temperature", "geopotential_height"], truth.start, 30.0, 180.0, pressure=pressure)
    np.testing.assert_array_equal(np.isfinite(at["temperature"]), [False, True, True, True, False, False])
    assert at["geopotential_height"][1] == pytest.approx(surface["surface_altitude"])
    height = np.array([surface["surface_altitude"] - 1, surface["surface_altitude"], 5e3, 60e3])
    at = query(truth, ["temperature", "pressure"], truth.start, 30.0, 180.0, height=height)
    np.testing.assert_array_equal(np.isfinite(at["temperature"]), [False, True, True, False])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latitude": 123.4}, "123.4 at point 0"),
        ({"latitude": np.array([0.0, np.nan])}, "at point 1"),
        ({"longitude": np.inf}, "not finite"),
        ({"time": np.datetime64("2000-01-02")}, "outside the nature run"),
        ({"time": np.datetime64("NaT")}, "outside the nature run"),
        ({"variables": ["2m_temperature"]}, "2m_temperature"),
        ({"variables": ["temperature"]}, "needs a height or a pressure"),
        ({"height": 1.0, "pressure": 1.0}, "not both"),
    ],
)
def test_bad_queries_are_typed_errors(change, message):
    truth = truth_from_dataset(isothermal())
    given = {"variables": ["surface_pressure"], "time": truth.start, "latitude": 0.0, "longitude": 0.0, **change}
    with pytest.raises(TruthQueryError, match=message):
        query(truth, **given)


def test_truth_refuses_axes_it_would_misread():
    with pytest.raises(TruthQueryError, match="ascending latitudes"):
        truth_from_dataset(isothermal().isel(latitude=slice(None, None, -1)))
    with pytest.raises(TruthQueryError, match="regular times"):
        truth_from_dataset(isothermal(steps=4).isel(time=[0, 1, 3]))


def test_large_queries_are_the_same_in_chunks(monkeypatch):
    truth = truth_from_dataset(wavy())
    lat, lon, _ = scattered()
    whole = query(truth, ["temperature"], truth.start, lat, lon, height=3000.0)["temperature"]
    monkeypatch.setattr("earth.osse.truth._CHUNK", 7)
    np.testing.assert_array_equal(
        query(truth, ["temperature"], truth.start, lat, lon, height=3000.0)["temperature"], whole
    )


# ---------------------------------------------------------------------------------------------------------- instruments
def watch_stations(*args, **kwargs) -> Any:
    """`observe_stations`, untyped: to pandas' annotations every column may be a DataFrame."""
    return observe_stations(*args, **kwargs)


def watch_sondes(*args, **kwargs) -> Any:
    """`observe_radiosondes`, untyped."""
    return observe_radiosondes(*args, **kwargs)


@pytest.fixture(scope="module")
def weather() -> Truth:
    """Ten days, 3-hourly, of the smooth analytic atmosphere."""
    return truth_from_dataset(wavy(steps=81, hours=3))


STATIONS = StationNetwork(count=150, placement=Placement(max_latitude=70.0))


def test_station_errors_are_the_stated_ones(weather):
    observed = watch_stations(weather, STATIONS, seed=4)
    table, platforms = observed.table, observed.platforms.set_index("platform")
    error = table["value"] - observed.truth
    assert table["value"].notna().all()
    for model in STATIONS.errors:
        rows = (table["variable"] == model.variable).to_numpy()
        assert (table.loc[rows, "obs_error"] == model.noise).all()
        owner = table.loc[rows, "platform"]
        noise = error[rows].to_numpy() - platforms.loc[owner, f"bias_{model.variable}"].to_numpy()
        n = len(noise)
        assert n > 10_000
        # five standard errors of a mean and of a standard deviation
        assert abs(noise.mean()) < 5 * model.noise / np.sqrt(n)
        assert abs(noise.std() - model.noise) < 5 * model.noise / np.sqrt(2 * n)
        assert abs((np.abs(noise) < model.noise).mean() - 0.6827) < 5 * np.sqrt(0.6827 * 0.3173 / n)  # Gaussian
        bias = platforms[f"bias_{model.variable}"]
        assert abs(bias.std() - model.bias) < 5 * model.bias / np.sqrt(2 * len(bias))
        assert abs(bias.mean()) < 5 * model.bias / np.sqrt(len(bias))
        order = np.argsort(owner.to_numpy(), kind="stable")  # by station, then time
        assert abs(np.corrcoef(noise[order][1:], noise[order][:-1])[0, 1]) < 5 / np.sqrt(n)  # independent in time


def test_station_truth_is_the_truth(weather):
    observed = watch_stations(weather, STATIONS, seed=4)
    for name, rows in observed.table.groupby("variable").groups.items():
        part = observed.table.loc[rows]
        exact = query(weather, [str(name)], part["time"].to_numpy(), part["latitude"], part["longitude"])[str(name)]
        np.testing.assert_allclose(observed.truth.loc[rows], exact, rtol=1e-12, atol=1e-12)


def test_stations_lie_in_range_and_report_on_time(weather):
    observed = watch_stations(weather, STATIONS, seed=4)
    table, platforms = observed.table, observed.platforms
    assert tuple(table.columns) == COLUMNS
    assert len(platforms) == platforms["platform"].nunique() == 150
    assert platforms["latitude"].abs().max() <= 70
    assert platforms["longitude"].between(-180, 180, inclusive="left").all()
    assert table["time"].is_monotonic_increasing
    assert (table["time"].dt.hour % 3 == 0).all()
    assert (table["time"] == table["time"].dt.floor("h")).all()
    assert not table.duplicated(["time", "platform", "variable"]).any()
    assert table.groupby("platform")[["latitude", "longitude", "height"]].nunique().max().max() == 1
    assert set(table["sensor"]) == {"station"}
    assert set(table["channel"]) == {-1}
    assert (table["qc"] == 0).all()
    assert table["qc"].dtype == np.int8
    assert table["time"].dtype == "datetime64[ns]"


def test_station_heights_are_the_relief():
    truth = truth_from_dataset(isothermal())
    network = StationNetwork(count=300, cadence_hours=6, placement=Placement(clusters=0), outage_hours=6.0)
    observed = watch_stations(truth, network, seed=0)
    at = observed.platforms
    relief = query(truth, ["surface_altitude"], truth.start, at["latitude"], at["longitude"])["surface_altitude"]
    np.testing.assert_array_equal(at["height"], relief)
    rows = (observed.table["variable"] == "surface_pressure").to_numpy()
    expected = 1e5 * np.exp(-G * observed.table.loc[rows, "height"] / (R * 280))
    np.testing.assert_allclose(observed.truth[rows], expected, rtol=1e-6)
    assert at["height"].max() > 500


def test_losses_have_the_stated_shares_and_silences_their_length(weather):
    none = dataclasses.replace(STATIONS, missing_report=0.0, missing_value=0.0, outage=0.0)
    full = len(watch_stations(weather, none, seed=1).table)
    assert full == 150 * 81 * 4
    lost_reports = dataclasses.replace(none, missing_report=0.1)
    assert 1 - len(watch_stations(weather, lost_reports, seed=1).table) / full == pytest.approx(0.1, abs=0.014)
    lost_values = dataclasses.replace(none, missing_value=0.1)
    assert 1 - len(watch_stations(weather, lost_values, seed=1).table) / full == pytest.approx(0.1, abs=0.007)

    long = truth_from_dataset(isothermal(steps=2, hours=24 * 200))
    network = dataclasses.replace(
        none, count=60, outage=0.2, outage_hours=36.0, errors=(ErrorModel("surface_pressure", 50.0, 0.0),)
    )
    table = watch_stations(long, network, seed=2).table
    steps = 24 * 200 // 3 + 1
    assert 1 - len(table) / (60 * steps) == pytest.approx(0.2, abs=0.02)
    gaps = table.groupby("platform")["time"].diff().dropna() / pd.Timedelta(hours=3) - 1
    # merged silences are longer than single ones: (exp(rate * mean) - 1) / rate = 0.25 / -log(0.8) of the mean
    assert gaps[gaps > 0].mean() * 3 == pytest.approx(36 * 0.25 / -np.log(0.8), rel=0.12)


def test_clusters_crowd_stations(weather):
    def nearest(placement):
        at = np.deg2rad(
            watch_stations(weather, StationNetwork(placement=placement), seed=3).platforms[["latitude", "longitude"]]
        )
        lat, lon = at.to_numpy().T
        unit = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
        cosine = unit.T @ unit
        np.fill_diagonal(cosine, -1)
        return np.median(np.rad2deg(np.arccos(cosine.max(axis=1).clip(-1, 1))))

    assert nearest(Placement(clusters=5, radius=5.0, isolated=0.0)) < 0.5 * nearest(Placement(clusters=0))


def test_reports_depend_on_the_seed_alone_and_not_on_other_stations(weather):
    first = watch_stations(weather, STATIONS, seed=4)
    again = watch_stations(weather, STATIONS, seed=4)
    pd.testing.assert_frame_equal(first.table, again.table, check_exact=True)
    pd.testing.assert_series_equal(first.truth, again.truth, check_exact=True)
    fewer = watch_stations(weather, dataclasses.replace(STATIONS, count=10), seed=4).table
    same = first.table[first.table["platform"].isin(fewer["platform"].unique())].reset_index(drop=True)
    pd.testing.assert_frame_equal(fewer, same, check_exact=True)
    other = watch_stations(weather, STATIONS, seed=5)
    assert not np.isin(other.platforms["latitude"], first.platforms["latitude"]).any()

    sondes = RadiosondeNetwork(count=8)
    pd.testing.assert_frame_equal(
        watch_sondes(weather, sondes, 4).table, watch_sondes(weather, sondes, 4).table, check_exact=True
    )
    few = watch_sondes(weather, dataclasses.replace(sondes, count=3), 4).table
    all_of_them = watch_sondes(weather, sondes, 4).table
    same = all_of_them[all_of_them["platform"].isin(few["platform"].unique())].reset_index(drop=True)
    pd.testing.assert_frame_equal(few, same, check_exact=True)


def test_sondes_fly_at_00_and_12_and_report_mandatory_levels(weather):
    network = RadiosondeNetwork(count=30, missing_sounding=0.0, early_burst=0.0)
    observed = watch_sondes(weather, network, seed=0)
    table = observed.table
    assert tuple(table.columns) == COLUMNS
    assert set(table["time"].dt.hour) == {0, 12}
    assert (table["time"] == table["time"].dt.floor("h")).all()
    assert table["time"].is_monotonic_increasing
    assert set(table["sensor"]) == {"radiosonde"}
    assert (
        table["height"].isna().all()
    )  # geopotential_height is observed: as a coordinate it would give the answer away
    assert len(table.groupby(["platform", "time"])) == 30 * 21
    surface = query(weather, ["surface_pressure"], table["time"].to_numpy(), table["latitude"], table["longitude"])
    surface = surface["surface_pressure"]
    assert (table["pressure"] <= surface * (1 + 1e-9)).all()
    assert (table["pressure"] >= surface * SIGMA[0] * (1 - 1e-9)).all()
    heights = table[table["variable"] == "geopotential_height"]
    assert set(heights["pressure"]) <= set(network.mandatory)
    for level in network.mandatory[1:]:  # 1000 hPa lies under the ground in a low
        assert (heights["pressure"] == level).sum() == 30 * 21
    assert not table.duplicated(["time", "platform", "variable", "pressure"]).any()
    for name, rows in table.groupby("variable").groups.items():
        part = table.loc[rows]
        exact = query(
            weather,
            [str(name)],
            part["time"].to_numpy(),
            part["latitude"],
            part["longitude"],
            pressure=part["pressure"],
        )[str(name)]
        np.testing.assert_allclose(observed.truth.loc[rows], exact, rtol=1e-12)


def test_significant_levels_are_enough_and_no_more_than_needed(weather):
    network = RadiosondeNetwork(count=12, missing_sounding=0.0, early_burst=0.0, mandatory=(85000.0, 50000.0))
    observed = watch_sondes(weather, network, seed=1)
    table = observed.table.assign(truth=observed.truth)
    added = 0
    for (platform, time), sounding in table.groupby(["platform", "time"]):
        wide = sounding.pivot(index="pressure", columns="variable", values="truth").sort_index()
        where = observed.platforms.set_index("platform").loc[platform]
        surface = query(weather, ["surface_pressure"], time, where["latitude"], where["longitude"])["surface_pressure"]
        nodes = surface * SIGMA
        names = ["temperature", "u_component_of_wind", "v_component_of_wind"]
        exact = query(weather, names, time, where["latitude"], where["longitude"], pressure=nodes)
        line = [np.interp(np.log(nodes), np.log(wide.index), wide[name]) for name in names]
        gap = [exact[name] - values for name, values in zip(names, line, strict=True)]
        assert np.abs(gap[0]).max() <= 1.0 + 1e-9
        assert np.hypot(gap[1], gap[2]).max() <= 5.0 + 1e-9
        added += len(wide) - 4  # ground, top and two mandatory levels
    assert 0 < added < 5 * len(table.groupby(["platform", "time"]))

    straight = truth_from_dataset(dataset(lambda t, s, j, i: 300 + 40 * np.log(s)))
    table = watch_sondes(straight, network, seed=1).table
    assert (table[table["variable"] == "temperature"].groupby(["platform", "time"]).size() == 4).all()


def test_sonde_errors_follow_the_table_of_levels(weather):
    network = RadiosondeNetwork(count=60)
    observed = watch_sondes(weather, network, seed=2)
    table = observed.table
    scaled = (table["value"] - observed.truth) / table["obs_error"]
    for (name, pressure), rows in table.groupby(["variable", "pressure"]).groups.items():
        if len(rows) < 500:
            continue
        n = len(rows)
        assert abs(scaled[rows].mean()) < 5 / np.sqrt(n)
        assert abs(scaled[rows].std() - 1) < 5 / np.sqrt(2 * n)
        if pressure in network.errors.pressure:
            table_name = "wind" if str(name).endswith("wind") else str(name)
            stated = getattr(network.errors, table_name)[network.errors.pressure.index(float(pressure))]
            np.testing.assert_allclose(table.loc[rows, "obs_error"], stated, rtol=1e-12)
    wind = network.errors.at("u_component_of_wind", np.sqrt([85000.0 * 50000.0]))
    assert wind[0] == pytest.approx(0.5 * (1.5 + 2.1))  # half way in ln p


def test_missing_soundings_and_early_bursts(weather):
    network = RadiosondeNetwork(count=100, missing_sounding=0.2, early_burst=0.5)
    table = watch_sondes(weather, network, seed=3).table
    flown = table.groupby(["platform", "time"])["pressure"].min()
    assert 1 - len(flown) / 2100 == pytest.approx(0.2, abs=0.04)
    assert (flown > 7500).mean() == pytest.approx(0.5, abs=0.12)  # a burst at the very top does not show
    assert flown.max() <= 50000 * (1 + 1e-9)


def test_drifting_sonde_goes_with_the_wind():
    truth = truth_from_dataset(dataset(lambda t, s, j, i: 280.0, u=lambda t, s, j, i: 30.0, steps=9))
    network = RadiosondeNetwork(
        count=20, drift=True, missing_sounding=0.0, early_burst=0.0, placement=Placement(clusters=0, max_latitude=1e-6)
    )
    observed = watch_sondes(truth, network, seed=0)
    table = observed.table[observed.table["variable"] == "temperature"]
    site = observed.platforms.set_index("platform").loc[table["platform"], "longitude"].to_numpy()
    height = R * 280 / G * np.log(1e5 / table["pressure"].to_numpy())  # isothermal
    nominal = table["time"].dt.floor("12h")
    np.testing.assert_allclose((table["time"] - nominal).dt.total_seconds(), height / 5.0, atol=1.0)
    east = (table["longitude"].to_numpy() - site + 180) % 360 - 180
    np.testing.assert_allclose(east, np.rad2deg(30.0 * height / 5.0 / 6.37122e6), atol=1e-4)
    assert table["time"].max() <= truth.end
    assert east.max() > 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: ErrorModel("surface_pressure", -1.0, 0.0),
        lambda: StationNetwork(count=0),
        lambda: StationNetwork(missing_report=1.0),
        lambda: StationNetwork(errors=()),
        lambda: StationNetwork(cadence_hours=6, outage_hours=1.0),
        lambda: RadiosondeNetwork(hours=(24,)),
        lambda: RadiosondeNetwork(significant_wind=0.0),
        lambda: Placement(isolated=1.5),
        lambda: OsseConfig(stations=None, radiosondes=None),
    ],
)
def test_impossible_networks_are_typed_errors(make):
    with pytest.raises(InstrumentError):
        make()


# --------------------------------------------------------------------------------------------------------------- caches
CACHED = NatureConfig(spin_up_days=0, days=2, save_hours=6)


def fake_blocks(config, progress):
    """What `_integrate` yields, without the dycore: two blocks of `CACHED`."""
    whole = wavy(steps=9).assign_coords(time=config.times).astype(np.float32)
    yield whole.isel(time=slice(0, 5))
    yield whole.isel(time=slice(5, 9))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(nature, "_integrate", fake_blocks)


def test_cache_round_trip(fake, tmp_path, monkeypatch):
    written = nature_run(CACHED, cache=tmp_path, progress=False)
    expected = nature_run(CACHED, progress=False)
    for name in expected.variables:
        np.testing.assert_array_equal(written[name].values, expected[name].values)
        assert written[name].attrs.get("standard_name") == expected[name].attrs.get("standard_name") is not None
        assert written[name].dtype == expected[name].dtype
    assert [path.name for path in tmp_path.iterdir()] == [f"nature-{CACHED.fingerprint()}.zarr"]
    monkeypatch.setattr(nature, "_integrate", lambda *_: pytest.fail("the cache was not used"))
    xr.testing.assert_identical(nature_run(CACHED, cache=tmp_path), written)


def test_fingerprint_changes_with_every_field():
    values = {
        "truncation": 31, "layers": 10, "dt_minutes": 20.0, "spin_up_days": 1, "days": 3, "save_hours": 3,
        "start": "2001-01-01", "seed": 1, "perturbation": 1.0, "relief_height": 1.0, "diurnal_amplitude": 1.0,
        "moisture": True,
    }  # fmt: skip
    assert set(values) == {field.name for field in dataclasses.fields(NatureConfig)}
    prints = {dataclasses.replace(CACHED, **{name: value}).fingerprint() for name, value in values.items()}
    assert len(prints | {CACHED.fingerprint()}) == len(values) + 1
    assert dataclasses.replace(CACHED, dt_minutes=30.0).fingerprint() == CACHED.fingerprint()  # the default, spelt out


def test_damaged_or_foreign_cache_is_refused(fake, tmp_path):
    nature_run(CACHED, cache=tmp_path, progress=False)
    path = tmp_path / f"nature-{CACHED.fingerprint()}.zarr"
    with pytest.raises(NatureCacheError, match="fingerprint"):
        read_nature(path, dataclasses.replace(CACHED, seed=1))
    chunk = next(file for file in sorted((path / "temperature").rglob("*")) if file.is_file() and "c" in file.parts)
    chunk.unlink()  # zarr itself would read the hole as fill values, without a word
    with pytest.raises(NatureCacheError, match="digest"):
        nature_run(CACHED, cache=tmp_path)
    with pytest.raises(NatureCacheError, match="not a readable nature run"):
        read_nature(tmp_path / "nothing.zarr")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, NatureRunError])
def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch, stop):
    def interrupted(config, progress):
        yield next(fake_blocks(config, progress))
        assert list(tmp_path.iterdir())  # the first block is on disk by now
        raise stop

    monkeypatch.setattr(nature, "_integrate", interrupted)
    with pytest.raises(stop):
        nature_run(CACHED, cache=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["between blocks", "before the rename"])
def test_killed_run_does_not_look_finished(fake, tmp_path, moment):
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from earth.osse import nature
        from tests.earth.test_osse import CACHED, fake_blocks
        def kill(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        def killed(config, progress):
            yield next(fake_blocks(config, progress))
            kill()
        if {moment!r} == "between blocks":
            nature._integrate = killed
        else:
            nature._integrate = fake_blocks
            os.rename = kill
        nature.nature_run(CACHED, cache={str(tmp_path)!r}, progress=False)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].endswith(".partial")  # the kill hit while the run was being written
    assert len(nature_run(CACHED, cache=tmp_path, progress=False).time) == 9


def test_second_writer_keeps_the_first_ones_copy(fake, tmp_path, monkeypatch):
    path = tmp_path / f"nature-{CACHED.fingerprint()}.zarr"

    def slow(config, progress):
        yield from fake_blocks(config, progress)
        monkeypatch.setattr(nature, "_integrate", fake_blocks)
        nature_run(config, cache=tmp_path, progress=False)  # somebody else finishes meanwhile

    monkeypatch.setattr(nature, "_integrate", slow)
    assert len(nature_run(CACHED, cache=tmp_path, progress=False).time) == 9
    assert list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------------------------------- nature run
@pytest.mark.parametrize(
    "change",
    [
        {"truncation": 63}, {"layers": 2}, {"spin_up_days": -1}, {"days": 0}, {"save_hours": 5}, {"dt_minutes": 35.0},
        {"dt_minutes": 0.0}, {"relief_height": 9000.0}, {"diurnal_amplitude": -1.0}, {"seed": -1},
        {"start": "2000-01-01T03:00"}, {"start": "yesterday"},
    ],
)  # fmt: skip
def test_impossible_configs_are_typed_errors(change):
    with pytest.raises(NatureConfigError, match=next(iter(change))):
        NatureConfig(**change)


def test_missing_dycore_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "dinosaur", None)
    with pytest.raises(DinosaurMissingError, match=r"pip install earthmoe\[osse\]"):
        nature_run(CACHED, progress=False)


def test_diurnal_heating_is_balanced_over_a_day_and_warms_until_15_local():
    config = NatureConfig(diurnal_amplitude=4.0)
    steps = 48
    cosine, sine = nature._diurnal_heating(config, LATITUDE, LONGITUDE, SIGMA)
    angle = 2 * np.pi * (np.arange(steps) + 0.5) / steps
    warming = np.cos(angle)[:, None, None, None] * cosine + np.sin(angle)[:, None, None, None] * sine
    temperature = np.cumsum(warming, axis=0)  # after each step, from midnight UTC
    assert np.abs(temperature[-1]).max() < 1e-10
    i, j = 16, 16  # 90E, next to the equator
    swing = temperature[:, -1, i, j]
    assert (swing.max() - swing.min()) / 2 == pytest.approx(4.0, rel=0.01)
    local = (np.argmax(swing) + 1) / 2 + LONGITUDE[i] / 15
    assert local % 24 == pytest.approx(15.0, abs=0.5)
    assert np.abs(temperature[:, SIGMA < 0.7]).max() == 0
    assert np.abs(temperature[:, :, 0]).max() < 1e-10  # 0E is ocean


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> xr.Dataset:
    """The nature run of the preset `tiny`, through the cache, written in blocks of one day."""
    pytest.importorskip("dinosaur", reason="extra osse is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nature, "_BLOCK_DAYS", 1)
        return nature_run(tiny().nature, cache=tmp_path_factory.mktemp("cache"), progress=False)


@pytest.fixture(scope="module")
def simulation():
    """The preset `tiny`, run anew and kept in memory."""
    pytest.importorskip("dinosaur", reason="extra osse is not installed")
    return simulate(tiny(), progress=False)


def gaussian_mean(field: np.ndarray) -> np.ndarray:
    """Mean over the sphere of [..., 32, 64]."""
    return (field.astype(float).mean(axis=-1) * np.polynomial.legendre.leggauss(32)[1]).sum(axis=-1) / 2


def test_nature_run_keeps_its_mass_and_describes_itself(short_run):
    np.testing.assert_allclose(short_run.latitude, LATITUDE, atol=1e-5)
    np.testing.assert_allclose(short_run.longitude, LONGITUDE, atol=1e-5)
    np.testing.assert_allclose(short_run.sigma, SIGMA, atol=1e-6)
    np.testing.assert_array_equal(short_run.time, tiny().nature.times)
    assert short_run.sizes == {"time": 9, "sigma": 8, "latitude": 32, "longitude": 64}
    mass = gaussian_mean(short_run.surface_pressure.values)
    mountains = gaussian_mean(1e5 * np.exp(-G * short_run.surface_altitude.values / (R * 288)))
    assert abs(mass[0] - mountains) < 20  # the initial perturbation has almost no mean
    assert np.abs(mass - mass[0]).max() < 3.0  # Pa, of 1e5
    assert short_run.temperature.attrs == {"standard_name": "air_temperature", "units": "K"}
    assert "idealised mountains" in short_run.attrs["comment"]
    assert "no diurnal cycle" in " ".join(nature.caveats(CACHED))
    for name in ("temperature", "u_component_of_wind", "v_component_of_wind", "surface_pressure"):
        assert np.isfinite(short_run[name]).all()


def test_nature_run_starts_from_its_perturbation_at_rest_and_moves(short_run):
    first, last = short_run.isel(time=0), short_run.isel(time=-1)
    np.testing.assert_allclose(first.temperature, 288.0, atol=1e-3)
    np.testing.assert_allclose(first.u_component_of_wind, 0.0, atol=1e-4)
    balanced = 1e5 * np.exp(-G * first.surface_altitude / (R * 288))
    assert 1e3 < float(abs(first.surface_pressure - balanced).max()) < 5e3
    assert float(abs(last.u_component_of_wind).max()) > 1.0
    # Held-Suarez: the ground warms at the equator and cools at the poles from 288 K
    zonal = last.temperature.isel(sigma=-1).mean("longitude").values
    assert zonal[15] > 289
    assert zonal[0] < 287.9


def test_nature_run_repeats_bit_for_bit_in_memory_and_through_the_cache(short_run, simulation):
    again, truth = truth_from_dataset(short_run), simulation.truth
    np.testing.assert_array_equal(again.times, truth.times)
    np.testing.assert_array_equal(again.log_pressure, truth.log_pressure)
    for name, values in truth.columns.items():
        np.testing.assert_array_equal(again.columns[name], values)


def test_seed_moves_the_perturbation_and_relief_starts_in_balance():
    pytest.importorskip("dinosaur", reason="extra osse is not installed")

    def start(**change):
        config = dataclasses.replace(CACHED, **change)
        core = nature.dynamical_core(config)
        return np.asarray(core.diagnose(core.carry)["surface_pressure"]), core.surface_altitude

    first, _ = start(seed=0)
    second, _ = start(seed=1)
    assert np.abs(first - second).max() > 1e3
    pressure, altitude = start(relief_height=2000.0, perturbation=0.0)
    np.testing.assert_allclose(pressure.T, 1e5 * np.exp(-G * altitude / (R * 288)), rtol=1e-4)  # ln ps is 45 in float32
    wanted = nature.relief(LATITUDE[:, None], LONGITUDE, 2000.0)
    assert wanted.max() > 1900
    np.testing.assert_allclose(altitude, wanted, atol=40)  # what T21 can carry of it
    with pytest.raises(NatureRunError, match="day 3"):
        nature._check_finite((type("State", (), {"temperature_variation": np.array([np.nan])}), None), 3)


# ------------------------------------------------------------------------------------------------------------- simulate
def test_simulate_returns_an_aligned_table_sorted_by_time(simulation):
    truth, table, meta = simulation
    assert tuple(table.columns) == COLUMNS
    assert table["time"].is_monotonic_increasing
    assert table.index.equals(meta.truth_values.index)
    assert set(table["sensor"]) == {"station", "radiosonde"}
    assert len(meta.platforms) == 36
    assert (meta.start, meta.end) == (truth.start, truth.end)
    assert "idealised mountains" in " ".join(meta.caveats)
    for name, rows in table[table["sensor"] == "station"].groupby("variable").groups.items():
        part = table.loc[rows]
        exact = query(truth, [str(name)], part["time"].to_numpy(), part["latitude"], part["longitude"])[str(name)]
        np.testing.assert_allclose(meta.truth_values[rows], exact, rtol=1e-12, atol=1e-12)
    scaled = (table["value"] - meta.truth_values) / table["obs_error"]
    assert scaled.std() == pytest.approx(1.0, abs=0.3)  # station biases add to the stated random errors


def test_the_table_passes_the_librarys_validation_untouched(simulation):
    table, drops = validate(simulation.table)
    assert len(table) == len(simulation.table), drops
    keys = ["sensor", "platform", "time", "variable", "pressure"]
    both = simulation.table.merge(table, on=keys, suffixes=("_before", ""), validate="one_to_one")
    for name in ("value", "latitude", "longitude", "height", "obs_error"):
        np.testing.assert_array_equal(both[f"{name}_before"], both[name])
    reports = to_reports(table)
    assert set(reports) == {"station", "radiosonde"}
    assert {"lowest_level_temperature", "surface_pressure"} < set(reports["station"].variables)


def test_mountains_do_not_blow(simulation):
    # The first 6 h over 2 km of relief stay calm only if relief and pressure balance: 1.8 m/s, 20 m/s without.
    truth = simulation.truth
    lat, lon = np.meshgrid(np.arange(20, 51, 5.0), np.arange(60, 121, 5.0))
    got = query(truth, ["lowest_level_u_component_of_wind"], truth.times[1], lat, lon)
    assert np.abs(got["lowest_level_u_component_of_wind"]).max() < 4


def test_presets_build():
    assert demo().nature.spin_up_days >= 150
    assert demo().nature.fingerprint() != held_suarez().nature.fingerprint()
    assert held_suarez().nature.relief_height == held_suarez().nature.diurnal_amplitude == 0


# -------------------------------------------------------------------------------------------------------------- climate
@pytest.mark.slow
def test_climate_of_held_suarez_after_spin_up():
    pytest.importorskip("dinosaur", reason="extra osse is not installed")
    run = nature_run(NatureConfig(days=60), progress=False)
    temperature, u, pressure = (run[name].values for name in ("temperature", "u_component_of_wind", "surface_pressure"))
    assert 180 < temperature.min() < 200
    assert 300 < temperature.max() < 320
    jets = u.mean(axis=(0, 3))
    assert 25 < jets[:, :16].max() < 36
    assert 25 < jets[:, 16:].max() < 36
    middle = (np.abs(LATITUDE) > 35) & (np.abs(LATITUDE) < 60)
    assert 6e2 < (pressure - pressure.mean(axis=0))[:, middle].std() < 12e2
    mass = gaussian_mean(pressure)
    assert np.abs(mass - 1e5).max() < 50


@pytest.mark.slow
def test_diurnal_heating_moves_the_air_as_stated():
    pytest.importorskip("dinosaur", reason="extra osse is not installed")
    config = NatureConfig(spin_up_days=10, days=10, save_hours=3, relief_height=2000.0, diurnal_amplitude=4.0)
    temperature = nature_run(config, progress=False).temperature.values[:-1, -1].astype(float)
    by_hour = temperature.reshape(10, 8, 32, 64).mean(axis=0)
    wave = np.fft.fft(by_hour, axis=0)[1] / 4
    assert abs(wave[16, 16]) == pytest.approx(4.0, rel=0.15)
    assert (-np.angle(wave[16, 16]) / (2 * np.pi) * 24 + 90 / 15) % 24 == pytest.approx(15, abs=1)
    assert abs(wave[16, 0]) < 0.5
