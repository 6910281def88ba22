"""earth.normals recovers climates that were put in: harmonics, lapse, pressure, spreads."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from earth import geometry, normals
from earth.observations import EmptyWindowError, Reports

TEMPERATURE, PRESSURE = "2m_temperature", "surface_pressure"
START = int(np.datetime64("2019-01-01", "s").astype(np.int64))


def icao_ratio(height):
    return (1 - 0.0065 * np.asarray(height, np.float64) / 288.15) ** 5.25588


def climate(seconds, latitude, height):
    """The truth: temperature (K) and pressure (Pa) by position, day of year and UTC hour, without the library."""
    day = (np.asarray(seconds) - START) / 86400.0
    year, hour = 2 * np.pi * day / 365.25, 2 * np.pi * (np.asarray(seconds) % 86400) / 86400.0
    warm = 295 - 0.8 * (latitude - 24) - 6.5e-3 * np.asarray(height)
    warm = (
        warm + (6 + 0.5 * (latitude - 24)) * np.cos(year - 3.6) + 3 * np.cos(hour - 1.4) + np.cos(year) * np.sin(hour)
    )
    press = (101325 + 500 * np.cos(year - 0.2) + 80 * np.cos(2 * hour)) * icao_ratio(height)
    return np.stack(np.broadcast_arrays(warm, press), -1)


NOISE = np.array([[0.5, 60.0], [1.0, 100.0], [2.0, 150.0], [1.0, 100.0], [1.5, 120.0], [0.7, 80.0], [1.2, 90.0]])


def make_record(days=420, every=3, seed=0) -> Reports:
    """Seven sites between 0 and 900 m; P3 never reports pressure, P6 is silent for half the record."""
    rng = np.random.default_rng(seed)
    steps = START + 3600 * np.arange(0, 24 * days, every)
    latitude = np.array([22.0, 22.8, 23.4, 24.0, 24.5, 25.1, 25.6])
    longitude = np.array([120.2, 121.0, 120.5, 121.6, 120.9, 121.4, 120.1])
    height = np.array([5.0, 300.0, 900.0, 40.0, 600.0, 120.0, 15.0])
    time = np.tile(steps, 7)
    platform = np.repeat(np.arange(7), len(steps))
    values = climate(time, latitude[platform], height[platform]) + rng.normal(size=(len(time), 2)) * NOISE[platform]
    values[platform == 3, 1] = np.nan
    values[(platform == 6) & (time > np.median(time))] = np.nan
    values[rng.random(values.shape) < 0.05] = np.nan
    where = (latitude[platform], longitude[platform], height[platform])
    names = tuple(f"P{i}" for i in range(7))
    return Reports("station", (TEMPERATURE, PRESSURE), names, platform, time, *where, values)


@pytest.fixture(scope="module")
def record():
    return make_record()


@pytest.fixture(scope="module")
def fitted(record):
    train = np.ones(len(record), bool)
    return normals.fit_normal(record, record.variables, train, annual=2, daily=3, moving=False)


def expected(normal, latitude, longitude, height, seconds):
    """[times, points, V] of the fitted normal at Unix seconds."""
    where = [jnp.asarray(a, jnp.float32) for a in (latitude, longitude, height)]
    coefficients, log_sd = normals.normal_coefficients(normal, *where)
    at = jnp.asarray(geometry.seconds(np.asarray(seconds).astype("datetime64[s]")))
    out = [normals.normal_values(normal, coefficients, where[2], jnp.broadcast_to(t, where[2].shape)) for t in at]
    return np.stack(out), np.exp(np.asarray(log_sd))


HOURS = START + 86400 * 9 + 3600 * np.arange(0, 24 * 360, 317)


def test_sites_get_their_own_climate_and_spread(record, fitted):
    place = record.positions()
    got, sd = expected(fitted, place.latitude, place.longitude, place.height, HOURS)
    want = climate(HOURS[:, None], place.latitude.to_numpy(), place.height.to_numpy())
    rms = np.sqrt(((got - want) ** 2).mean(0))
    known = np.arange(7) != 3
    # 35 coefficients from about 3,200 reports: the error of the mean is a tenth of the noise; a half-year record more.
    assert (rms[:6, 0] < 0.2 * NOISE[:6, 0] + 0.02).all()
    assert (rms[known, 1][:5] < 0.2 * NOISE[known, 1][:5] + 2).all()
    np.testing.assert_allclose(sd[:, 0], NOISE[:, 0], rtol=0.1)
    np.testing.assert_allclose(sd[known, 1], NOISE[known, 1], rtol=0.1)


def test_a_new_point_and_a_summit_follow_physics(fitted):
    latitude, longitude = np.array([23.7, 24.2, 24.0]), np.array([120.8, 121.2, 120.9])
    height = np.array([200.0, 450.0, 3000.0])
    got, sd = expected(fitted, latitude, longitude, height, HOURS)
    error = got - climate(HOURS[:, None], latitude, height)
    # Positions enter linearly and so does the truth: what is left is the noise of the sites' own estimates.
    assert np.sqrt((error[:, :2, 0] ** 2).mean()) < 0.6
    assert np.sqrt((error[:, :2, 1] ** 2).mean()) < 60
    # 2,100 m above the highest site, where a free regression on height would be lost.
    assert np.sqrt((error[:, 2, 0] ** 2).mean()) < 3.0
    assert np.abs(error[:, 2, 1]).max() < 0.01 * 101325
    assert (sd > 0.3 * NOISE.min(0)).all()
    assert (sd < 3 * NOISE.max(0)).all()


def test_temperature_falls_with_height_at_about_the_standard_lapse(fitted):
    height = np.array([1500.0, 2500.0, 3500.0])
    got, _ = expected(fitted, np.full(3, 24.0), np.full(3, 121.0), height, HOURS)
    lapse = np.diff(got[..., 0].mean(0)) / 1000
    np.testing.assert_allclose(lapse, -6.5e-3, rtol=0.15)
    ratio = got[..., 1].mean(0) / icao_ratio(height)
    np.testing.assert_allclose(ratio, 101325, rtol=0.01)


def test_standardised_reports_have_unit_spread_and_keep_gaps(record, fitted):
    z = normals.standardise_reports(fitted, record, record.variables, chunk=10_000)
    np.testing.assert_array_equal(np.isnan(z), np.isnan(record.values))
    for p in range(7):
        mine = z[record.platform == p]
        assert np.nanstd(mine[:, 0]) == pytest.approx(1, abs=0.05)
        assert np.nanmean(mine[:, 0]) == pytest.approx(0, abs=0.1)
        if p != 3:
            assert np.nanstd(mine[:, 1]) == pytest.approx(1, abs=0.05)
    # Against the truth: the anomaly is the noise that was added.
    noise = (record.values - climate(record.time, record.latitude, record.height)) / NOISE[record.platform]
    ok = np.isfinite(z[:, 0]) & (record.platform < 6)
    assert np.corrcoef(z[ok, 0], noise[ok, 0])[0, 1] > 0.98


def test_variables_are_chosen_by_name(record, fitted):
    swapped = normals.fit_normal(record, (PRESSURE,), np.ones(len(record), bool), annual=2, daily=3, moving=False)
    z = normals.standardise_reports(swapped, record, (PRESSURE,))
    both = normals.standardise_reports(fitted, record, record.variables)
    ok = np.isfinite(z[:, 0]) & (record.platform != 3)
    np.testing.assert_allclose(z[ok, 0], both[ok, 1], atol=2e-3)


def test_nothing_outside_the_training_mask_is_read(record):
    train = record.time < START + 300 * 86400
    spoiled = dataclasses.replace(record, values=np.where(train[:, None], record.values, 1e4))
    one, two = (normals.fit_normal(r, r.variables, train, annual=1, daily=2, moving=False) for r in (record, spoiled))
    for name in ("site", "background", "site_log_sd"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_a_variable_without_a_value_is_named(record):
    empty = dataclasses.replace(record, values=np.where([True, False], record.values, np.nan))
    with pytest.raises(EmptyWindowError, match=PRESSURE):
        normals.fit_normal(empty, record.variables, np.ones(len(record), bool), annual=1, daily=1, moving=False)
    with pytest.raises(EmptyWindowError, match="training"):
        normals.fit_normal(record, record.variables, np.zeros(len(record), bool), annual=1, daily=1, moving=False)


def test_a_constant_series_standardises_to_finite_values(record):
    still = dataclasses.replace(record, values=np.where(np.isfinite(record.values), np.float32([280.0, 1e5]), np.nan))
    normal = normals.fit_normal(still, record.variables, np.ones(len(record), bool), annual=0, daily=1, moving=False)
    z = normals.standardise_reports(normal, still, record.variables)
    assert np.isfinite(z[np.isfinite(still.values)]).all()


def test_soundings_recover_a_profile():
    """Moving platforms go without sites: background on height, spread that grows with height."""
    rng = np.random.default_rng(1)
    n = 6000
    time = np.sort(START + rng.integers(0, 200 * 86400, n))
    latitude, longitude, height = rng.uniform(22, 26, n), rng.uniform(119, 123, n), rng.uniform(0, 8000, n)
    truth = 296 - 6.5e-3 * height - 0.7 * (latitude - 24) + 2 * np.cos(2 * np.pi * (time - START) / 86400 / 365.25)
    values = (truth + rng.normal(size=n))[:, None]
    sonde = Reports("radiosonde", ("temperature",), ("R",), np.zeros(n, int), time, latitude, longitude, height, values)
    normal = normals.fit_normal(sonde, ("temperature",), np.ones(n, bool), annual=1, daily=0, moving=True)
    z = normals.standardise_reports(normal, sonde, ("temperature",))[:, 0]
    assert z.std() == pytest.approx(1, abs=0.08)
    low, high = z[height < 2000], z[height > 6000]
    assert abs(low.mean()) < 0.15
    assert abs(high.mean()) < 0.15
    got, sd = expected(normal, np.array([23.0]), np.array([121.0]), np.array([5000.0]), time[[1000, 4000]])
    np.testing.assert_allclose(
        got[:, 0, 0], 296 - 32.5 + 0.7 + 2 * np.cos(2 * np.pi * (time[[1000, 4000]] - START) / 86400 / 365.25), atol=0.3
    )
    np.testing.assert_allclose(sd, 1, rtol=0.15)
