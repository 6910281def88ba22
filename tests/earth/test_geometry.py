"""earth.geometry against double-precision formulas, tables and the baselines' own features."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from earth import geometry
from earth.baselines.boosting import solar_cosine as reference_solar_cosine
from earth.baselines.climatology import features

latitudes = st.floats(-90, 90)
longitudes = st.floats(-180, 180)


def vincenty_km(lat_a, lon_a, lat_b, lon_b):
    """Great circle by Vincenty's formula for a sphere: well conditioned at all distances, in float64."""
    p, q, d = np.deg2rad(lat_a), np.deg2rad(lat_b), np.deg2rad(np.float64(lon_b) - lon_a)
    across = np.hypot(np.cos(q) * np.sin(d), np.cos(p) * np.sin(q) - np.sin(p) * np.cos(q) * np.cos(d))
    along = np.sin(p) * np.sin(q) + np.cos(p) * np.cos(q) * np.cos(d)
    return 6371.0 * np.arctan2(across, along)


def as_float(x):
    return np.atleast_1d(np.asarray(x, np.float32))


@given(latitudes, longitudes, latitudes, longitudes)
def test_distance_is_the_great_circle(lat_a, lon_a, lat_b, lon_b):
    a, b, c, d = (as_float(x) for x in (lat_a, lon_a, lat_b, lon_b))
    got = np.asarray(geometry.distance_km(*(jnp.asarray(x) for x in (a, b, c, d))))[0, 0]
    want = vincenty_km(*(x[0].astype(np.float64) for x in (a, b, c, d)))
    # The haversine loses digits only towards the antipode, where float32 allows about 10 km.
    assert got == pytest.approx(want, rel=2e-5, abs=0.005 if want < 15000 else 12.0)


def test_distance_keeps_its_digits_between_near_stations():
    """Two sites 120 m apart: the law of cosines in float32 would answer 0 or 300 m."""
    lat, lon = np.float32([25.0, 25.001]), np.float32([121.5, 121.5005])
    got = np.asarray(geometry.distance_km(*(jnp.asarray(x) for x in (lat, lon, lat, lon))))
    want = vincenty_km(*(x.astype(np.float64) for x in (lat[:, None], lon[:, None], lat[None], lon[None])))
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert got[0, 1] == pytest.approx(got[1, 0])
    assert got[0, 1] > 0.1


def test_unit_vectors_give_the_chord():
    rng = np.random.default_rng(0)
    lat, lon = rng.uniform(-90, 90, 50).astype(np.float32), rng.uniform(-180, 180, 50).astype(np.float32)
    u = np.asarray(geometry.unit_vector(jnp.asarray(lat), jnp.asarray(lon)), np.float64)
    np.testing.assert_allclose((u**2).sum(-1), 1, atol=1e-6)
    lat, lon = lat.astype(np.float64), lon.astype(np.float64)
    angle = vincenty_km(lat[:, None], lon[:, None], lat[None], lon[None]) / 6371.0
    np.testing.assert_allclose(np.linalg.norm(u[:, None] - u[None], axis=-1), 2 * np.sin(angle / 2), atol=2e-6)
    axes = geometry.unit_vector(jnp.asarray([0.0, 0.0, 90.0]), jnp.asarray([0.0, 90.0, 0.0]))
    np.testing.assert_allclose(axes, np.eye(3), atol=1e-6)


@pytest.mark.parametrize(("annual", "daily"), [(2, 3), (1, 1), (0, 3), (0, 0)])
def test_seasonal_features_are_the_climatology_baselines(annual, daily):
    """An independent implementation from calendar days. Away from leap days both count days alike to within one."""
    times = np.arange(np.datetime64("2000-01-01"), np.datetime64("2000-12-30"), np.timedelta64(7 * 3600 + 61, "s"))
    want = features(times, annual=annual, daily=daily)
    seconds = jnp.asarray(geometry.seconds(times))
    got = np.asarray(geometry.seasonal_features(seconds, annual=annual, daily=daily))
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=2e-5)
    later = np.arange(np.datetime64("2020-06-01"), np.datetime64("2021-12-30"), np.timedelta64(5 * 3600, "s"))
    got = geometry.seasonal_features(jnp.asarray(geometry.seconds(later)), annual=annual, daily=daily)
    np.testing.assert_allclose(
        got, features(later, annual=annual, daily=daily), atol=2 * np.pi / 365.25 * 2 * annual + 2e-5
    )


def test_seasonal_features_do_not_lose_time_far_from_the_epoch():
    """float32 seconds would be wrong by a minute; hour features in 2060 are exact."""
    times = np.array(["1935-03-01T06:00:00", "2060-03-01T06:00:00"], "datetime64[s]")
    got = np.asarray(geometry.seasonal_features(jnp.asarray(geometry.seconds(times)), annual=0, daily=1))
    np.testing.assert_allclose(got, [[1, 0, 1], [1, 0, 1]], atol=1e-6)


@given(st.integers(-(2**31), 2**31 - 1))
def test_seconds_and_datetimes_are_inverses(second):
    assert geometry.seconds(geometry.datetimes(second)) == second
    assert geometry.seconds(geometry.datetimes(np.int32([second, 0])))[0] == second
    assert geometry.datetimes(second) == np.datetime64("2000-01-01") + np.timedelta64(second, "s")


@pytest.mark.parametrize("bad", ["1931-12-01", "2068-02-01", "1600-01-01", "NaT"])
def test_times_that_do_not_fit_are_named(bad):
    times = np.array(["2020-01-01", bad, "2021-01-01"], "datetime64[s]")
    with pytest.raises(ValueError, match=f"{bad}.*1932-2068"):
        geometry.seconds(times)


def test_seconds_takes_empty_and_scalar():
    assert geometry.seconds(np.array([], "datetime64[s]")).shape == (0,)
    assert geometry.seconds(np.datetime64("2000-01-02")) == 86400
    assert geometry.seconds(np.array(["2000-01-01T01:00"], "datetime64[ns]")).dtype == np.int32


@pytest.mark.parametrize(
    ("day", "declination"), [("2021-03-20", 0.0), ("2021-06-21", 23.44), ("2021-09-22", 0.0), ("2021-12-21", -23.44)]
)
def test_solar_noon_at_solstice_and_equinox(day, declination):
    """The sun at Greenwich noon stands at 90 - |latitude - declination| degrees, within the stated 16 minutes and the
    accuracy of the one-term declination.
    """
    noon = jnp.asarray(geometry.seconds(np.datetime64(f"{day}T12:00")))
    for latitude in (-60.0, -23.44, 0.0, 25.0, 51.5):
        cosine = float(geometry.solar_cosine(noon, jnp.float32(latitude), jnp.float32(0.0)))
        want = np.deg2rad(abs(latitude - declination))
        # 1 degree of declination at equinox (0.4 by the series, the rest by the calendar) and 4 degrees of hour angle.
        slack = np.sin(min(want + np.deg2rad(1.2), np.pi / 2)) * np.deg2rad(1.2) + (1 - np.cos(np.deg2rad(4.0)))
        assert cosine == pytest.approx(np.cos(want), abs=slack)
    night = float(geometry.solar_cosine(noon, jnp.float32(0.0), jnp.float32(180.0)))
    assert night == pytest.approx(-np.cos(np.deg2rad(declination)), abs=0.02)


def test_solar_cosine_against_the_baselines_own():
    """Another one-term declination, in float64 from calendar days; it is clipped at night."""
    rng = np.random.default_rng(0)
    start = np.datetime64("2020-06-01T00:00", "s")
    times = start + (60 * rng.integers(0, 500 * 1440, 400)).astype("timedelta64[s]")
    lat, lon = rng.uniform(-60, 60, 400).astype(np.float32), rng.uniform(-180, 180, 400).astype(np.float32)
    got = np.asarray(geometry.solar_cosine(jnp.asarray(geometry.seconds(times)), jnp.asarray(lat), jnp.asarray(lon)))
    want = reference_solar_cosine(times, lat, lon, hour_offset=0)
    np.testing.assert_allclose(np.maximum(got, 0), want, atol=np.deg2rad(1.5))
    assert (got < -0.5).any()


def test_clock_features_follow_local_solar_time():
    """Local midnight reads the same at every longitude; six hours later the daily harmonic has turned a quarter."""
    longitude = jnp.asarray([0.0, 90.0, -90.0, 179.0], jnp.float32)
    utc = np.datetime64("2021-04-01T00:00", "s") - (np.asarray(longitude) * 240).astype("timedelta64[s]")
    at = jnp.asarray(geometry.seconds(utc))
    midnight = np.asarray(geometry.clock_features(at, longitude))
    np.testing.assert_allclose(midnight[:, :4], np.tile([1, 0, 1, 0], (4, 1)), atol=1e-5)
    morning = np.asarray(geometry.clock_features(at + 6 * 3600, longitude))
    np.testing.assert_allclose(morning[:, :4], np.tile([0, 1, -1, 0], (4, 1)), atol=1e-5)


# ICAO standard atmosphere (Doc 7488): geopotential height m, pressure Pa.
ICAO = [
    (0, 101325.0),
    (500, 95460.8),
    (1000, 89874.6),
    (2000, 79495.2),
    (5000, 54019.9),
    (8000, 35599.8),
    (11000, 22632.1),
]
STRATOSPHERE = [(12000, 19330.4), (15000, 12044.6), (20000, 5474.89)]


def test_standard_atmosphere_against_the_icao_tables():
    height, pressure = np.array(ICAO, np.float64).T
    ratio = np.asarray(geometry.standard_pressure_ratio(jnp.asarray(height, jnp.float32)))
    np.testing.assert_allclose(ratio * 101325.0, pressure, rtol=3e-4)
    np.testing.assert_allclose(geometry.standard_height(pressure), height, atol=2.0)
    height, pressure = np.array(STRATOSPHERE, np.float64).T
    np.testing.assert_allclose(geometry.standard_height(pressure), height, atol=15.0)


@given(st.floats(2000.0, 105000.0), st.floats(0.5, 50.0))
def test_standard_height_falls_with_pressure(pressure, step):
    low, high = geometry.standard_height([pressure + step, pressure])
    assert high > low
    assert np.isnan(geometry.standard_height(np.nan))
