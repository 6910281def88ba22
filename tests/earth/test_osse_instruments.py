"""earth.osse: satellites, aircraft and ships, against vectors in space, integration, quadrature and statistics."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.integrate import quad, solve_ivp

import earth.osse
from configs.osse_global import t21, t31, tiny
from earth import sensors
from earth.geometry import standard_height, standard_pressure
from earth.observations import COLUMNS, to_reports, validate
from earth.osse import (
    AFTERNOON,
    DISC,
    MORNING,
    AircraftFleet,
    ChannelError,
    DriftingShips,
    ErrorModel,
    InstrumentError,
    NatureConfig,
    Orbit,
    OrbitError,
    OsseConfig,
    Placement,
    RadiosondeNetwork,
    Scatterometer,
    SounderChannel,
    Truth,
    TruthQueryError,
    brightness_temperature,
    nature,
    nature_run,
    observe_aircraft,
    observe_imager,
    observe_radiosondes,
    observe_scatterometer,
    observe_ships,
    observe_sounder,
    orbits,
    profiles,
    query,
    radiation,
    satellites,
    simulate,
    truth_from_dataset,
)
from earth.sensors import Channel
from examples import observing_system

SIGMA = (np.arange(8) + 0.5) / 8
LATITUDE = np.rad2deg(np.arcsin(np.polynomial.legendre.leggauss(16)[0]))
LONGITUDE = np.arange(32) * 11.25
RADIUS = orbits.EARTH_RADIUS


def atmosphere(steps=9, hours=3, temperature=None) -> xr.Dataset:
    """A smooth atmosphere with a tropopause, jets, weather in surface pressure and a mountain that moves through time;
    `temperature` (time index, sigma, latitude, longitude) replaces its own.
    """
    t, s, j, i = np.ix_(np.arange(steps), SIGMA, LATITUDE, LONGITUDE)
    j, i = np.deg2rad(j), np.deg2rad(i)
    if temperature is None:
        warm = np.maximum(210.0, 300 - 40 * np.sin(j) ** 2 + 75 * np.log(s)) + 3 * np.sin(3 * i + 0.3 * t)
    else:
        warm = temperature(t, s, j, i)
    fields = {
        "temperature": warm,
        "u_component_of_wind": 40 * (1 - s) * np.sin(2 * j) ** 2 + 3 * np.cos(4 * i + t),
        "v_component_of_wind": 5 * np.cos(4 * i - 0.2 * t) * np.cos(j) + 0 * s,
        "specific_humidity": 0.015 * s**3 * np.cos(j) ** 2 * (1 + 0.3 * np.sin(2 * i + 0.1 * t)),
    }
    shape = (steps, 8, 16, 32)
    hill = 1500 * np.exp(-(((j - 0.6) / 0.3) ** 2) - ((i - 1.6) / 0.5) ** 2)
    pressure = (1e5 + 1500 * np.sin(4 * i - 0.2 * t) * np.cos(j) ** 2) * np.exp(-hill / 8000)
    dims = ("time", "sigma", "latitude", "longitude")
    return xr.Dataset(
        {
            **{name: (dims, np.broadcast_to(field, shape).astype(np.float32)) for name, field in fields.items()},
            "surface_pressure": (("time", "latitude", "longitude"), pressure[:, 0]),
            "surface_altitude": (("latitude", "longitude"), hill[0, 0]),
        },
        {
            "time": np.datetime64("2000-01-01", "ns") + np.arange(steps) * np.timedelta64(hours, "h"),
            "sigma": SIGMA,
            "latitude": LATITUDE,
            "longitude": LONGITUDE,
        },
    )


@pytest.fixture(scope="module")
def weather() -> Truth:
    return truth_from_dataset(atmosphere())


def unit(latitude, longitude) -> np.ndarray:
    lat, lon = np.deg2rad(latitude), np.deg2rad(longitude)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def degrees_between(a, b) -> np.ndarray:
    return np.rad2deg(np.arctan2(np.linalg.norm(np.cross(a, b), axis=-1), (a * b).sum(axis=-1)))


def hours_after(start, hours) -> np.ndarray:
    return np.datetime64(start, "ns") + (np.asarray(hours) * 3600e9).astype("timedelta64[ns]")


def watch(observe, *args) -> Any:
    """What an instrument reports, untyped: to pandas' annotations every column may be a DataFrame."""
    return observe(*args)


# --------------------------------------------------------------------------------------------------------------- orbits
@pytest.mark.parametrize(
    ("altitude", "minutes", "inclination"),
    [(833e3, 101.5, 98.7), (705e3, 98.9, 98.2), (786e3, 100.6, 98.6)],  # NOAA-17, Landsat 8, Sentinel-2
)
def test_periods_and_sun_synchronous_inclinations_are_the_published_ones(altitude, minutes, inclination):
    orbit = Orbit(altitude)
    assert orbit.period / 60 == pytest.approx(minutes, abs=0.2)
    assert orbit.tilt == pytest.approx(inclination, abs=0.1)
    assert orbit.node_rate == pytest.approx(2 * np.pi / (365.2422 * 86400), rel=1e-12)


@pytest.mark.parametrize("inclination", [51.6, 98.7])
def test_the_node_precesses_as_the_oblate_earths_equations_of_motion_say(inclination):
    gm, j2, equator = 3.986004418e14, 1.08262668e-3, 6.378137e6
    orbit = Orbit(833e3, inclination)
    tilt, radius = np.deg2rad(inclination), RADIUS + 833e3

    def motion(_, state):
        x, v = state[:3], state[3:]
        r = np.linalg.norm(x)
        flat = 1.5 * j2 * (equator / r) ** 2 * (np.array([1, 1, 3]) - 5 * (x[2] / r) ** 2)
        return np.concatenate([v, -gm * x / r**3 * (1 + flat)])

    speed = np.sqrt(gm / radius)
    start = [radius, 0, 0, 0, speed * np.cos(tilt), speed * np.sin(tilt)]
    end = solve_ivp(motion, (0, 2 * 86400), start, rtol=1e-9, atol=1e-3).y[:, -1]
    normal = np.cross(end[:3], end[3:])
    node = np.arctan2(normal[0], -normal[1])
    assert node / (2 * 86400) == pytest.approx(orbit.node_rate, rel=0.01)


def test_ground_track_reaches_the_inclination_and_keeps_its_local_time():
    orbit = Orbit(817e3, local_time=9.5, epoch="2000-01-01T06:00")
    time = hours_after("2000-01-01", np.linspace(0, 48, 20_000))
    latitude, longitude, heading = orbits.ground_track(orbit, time)
    assert np.abs(latitude).max() == pytest.approx(180 - orbit.tilt, abs=1e-3)
    assert ((longitude >= -180) & (longitude < 180)).all()
    turn = np.arange(0, 420)  # a month
    time = hours_after(orbit.epoch, turn * orbit.period / 3600)
    latitude, longitude, heading = orbits.ground_track(orbit, time)
    np.testing.assert_allclose(latitude, 0, atol=1e-4)
    np.testing.assert_allclose(heading, 90 - orbit.tilt, atol=1e-4)  # north-north-west
    clock = (time - time.astype("datetime64[D]")) / np.timedelta64(1, "h")
    np.testing.assert_allclose((clock + longitude / 15 - 9.5 + 12) % 24 - 12, 0, atol=1e-3)
    drifting = dataclasses.replace(orbit, inclination=66.0)
    _, longitude, _ = orbits.ground_track(drifting, time)
    assert np.ptp(np.unwrap(clock + longitude / 15, period=24)) > 1


def test_heading_is_the_direction_of_flight():
    orbit = Orbit(833e3, 40.0)
    time = hours_after("2000-01-01", np.linspace(0, 3, 50))
    step = 1e-3
    lat0, lon0, heading = orbits.ground_track(orbit, time)
    lat1, lon1, _ = orbits.ground_track(orbit, time + np.timedelta64(int(step * 1e9), "ns"))
    spin = np.rad2deg(7.292115e-5 - orbit.node_rate) * step  # back to axes that do not turn with the Earth
    bearing, _ = orbits.great_circle(lat0, lon0, lat1, lon1 + spin)
    np.testing.assert_allclose(np.rad2deg(bearing), heading, atol=0.05)


def test_scan_points_are_where_lines_of_sight_meet_the_sphere():
    orbit = Orbit(833e3)
    time = hours_after("2000-01-01", np.linspace(0, 30, 400))[:, None]
    angle = np.array([-60.0, -48.33, -10.0, 1e-6, 25.0, 55.0])
    look = orbits.scan(orbit, time, angle)
    below, east, heading = (part[:, None] for part in orbits.ground_track(orbit, time[:, 0]))
    up = np.broadcast_to(unit(below, east), (*look.latitude.shape, 3))
    lat, lon, turn = np.deg2rad(below), np.deg2rad(east), np.deg2rad(heading)[..., None]
    to_east = np.stack([-np.sin(lon), np.cos(lon), 0 * lon], -1)
    to_north = np.stack([-np.sin(lat) * np.cos(lon), -np.sin(lat) * np.sin(lon), np.cos(lat)], -1)
    right = np.cos(turn) * to_east - np.sin(turn) * to_north
    tilt = np.deg2rad(angle)[:, None]
    sight = -np.cos(tilt) * up + np.sin(tilt) * right
    satellite = (RADIUS + 833e3) * up
    along = (satellite * sight).sum(-1)
    distance = -along - np.sqrt(along**2 - (satellite**2).sum(-1) + RADIUS**2)
    ground = (satellite + distance[..., None] * sight) / RADIUS
    assert degrees_between(ground, unit(look.latitude, look.longitude)).max() < 1e-9
    np.testing.assert_allclose(look.zenith, degrees_between(ground, -sight), atol=1e-7)
    lat, lon = np.deg2rad(look.latitude), np.deg2rad(look.longitude)
    to_east = np.stack([-np.sin(lon), np.cos(lon), 0 * lon], -1)
    to_north = np.stack([-np.sin(lat) * np.cos(lon), -np.sin(lat) * np.sin(lon), np.cos(lat)], -1)
    azimuth = np.rad2deg(np.arctan2((-sight * to_east).sum(-1), (-sight * to_north).sum(-1)))
    oblique = np.abs(angle) > 1
    gap = (azimuth - look.azimuth + 180) % 360 - 180
    np.testing.assert_allclose(gap[:, oblique], 0, atol=1e-6)
    # the reader of satellite files goes the other way by the same triangle
    back, zenith = orbits.view_angles(833e3, orbits.ground_arc(833e3, angle)[0])
    np.testing.assert_allclose(back, angle, atol=1e-9)
    np.testing.assert_allclose(np.abs(zenith), look.zenith[0], atol=1e-9)


def test_swath_is_as_wide_as_its_edges_are_apart():
    look = orbits.scan(MORNING.orbit, np.datetime64("2000-01-01T05:00"), np.array([-48.33, 48.33]))
    edges = unit(look.latitude, look.longitude)
    width = np.deg2rad(degrees_between(edges[0], edges[1])) * RADIUS
    assert MORNING.swath == pytest.approx(width, rel=1e-9)
    assert 1.9e6 < MORNING.swath < 2.3e6 < AFTERNOON.swath < 2.7e6  # published: 2,074 km (AMSU-A), 2,600 km (ATMS)
    np.testing.assert_allclose(MORNING.angles, -MORNING.angles[::-1], atol=1e-12)
    np.testing.assert_allclose(AFTERNOON.angles, -AFTERNOON.angles[::-1], atol=1e-12)


def test_geostationary_satellite_sees_81_degrees_and_where_it_looks():
    radius = orbits.GEOSTATIONARY_ALTITUDE + RADIUS
    assert radius == pytest.approx(42_164.2e3, abs=1e3)
    _, zenith = orbits.disc_view(0.0, np.zeros(3), np.array([80.0, 81.309, 82.0]))
    assert zenith[0] < 90 < zenith[2]
    assert zenith[1] == pytest.approx(90, abs=0.01)
    rng = np.random.default_rng(0)
    angle, direction = rng.uniform(0, 8.6, 300), rng.uniform(0, 360, 300)
    look = orbits.disc(140.0, angle, direction)
    ground, satellite = RADIUS * unit(look.latitude, look.longitude), radius * unit(0.0, 140.0)
    np.testing.assert_allclose(degrees_between(ground - satellite, -satellite + 0 * ground), angle, atol=1e-9)
    np.testing.assert_allclose(degrees_between(satellite - ground, ground), look.zenith, atol=1e-7)
    back, zenith = orbits.disc_view(140.0, look.latitude, look.longitude)
    np.testing.assert_allclose(back, angle, atol=1e-7)
    np.testing.assert_allclose(zenith, look.zenith, atol=1e-6)
    assert orbits.disc(140.0, 1.0, 0.0).latitude > 0  # north
    assert orbits.wrap(orbits.disc(140.0, 1.0, 90.0).longitude - 140.0) > 0  # east


def test_great_circle_and_destination_are_inverses():
    rng = np.random.default_rng(1)
    lat, lon = rng.uniform(-89, 89, (2, 300)), rng.uniform(-180, 180, (2, 300))
    bearing, arc = orbits.great_circle(lat[0], lon[0], lat[1], lon[1])
    np.testing.assert_allclose(np.rad2deg(arc), degrees_between(unit(lat[0], lon[0]), unit(lat[1], lon[1])), atol=1e-9)
    there = orbits.destination(lat[0], lon[0], bearing, arc)
    assert degrees_between(unit(*there), unit(lat[1], lon[1])).max() < 1e-7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Orbit(100e3), "altitude=100000.0"),
        (lambda: Orbit(inclination=190.0), "inclination=190.0"),
        (lambda: Orbit(local_time=24.0), "local_time=24.0"),
        (lambda: Orbit(epoch="noon"), "epoch='noon'"),
        (lambda: orbits.sun_synchronous_inclination(7e6), "altitude=7000000.0"),
        (lambda: orbits.scan(Orbit(833e3), np.datetime64("2000-01-01"), 70.0), "angle 70 misses"),
        (lambda: orbits.disc(0.0, 9.0, 0.0), "angle 9 misses"),
        (lambda: dataclasses.replace(MORNING, scan_limit=65.0), "angle 65 misses"),
    ],
)
def test_impossible_orbits_are_typed_errors(make, message):
    with pytest.raises(OrbitError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------------ radiation
CHANNELS = (*MORNING.channels, *AFTERNOON.channels, *DISC.channels)
ZENITH = np.array([0.0, 20.0, 45.0, 60.0, 70.0])


def columns(temperature) -> tuple[np.ndarray, np.ndarray]:
    """Nodes of a column under 1000 hPa for each zenith angle; `temperature` of ln(p / p_s)."""
    nodes = np.concatenate([[0.0], np.log(SIGMA[::-1])])
    return np.tile(1e5 * np.exp(nodes), (len(ZENITH), 1)), np.tile(temperature(nodes), (len(ZENITH), 1))


def test_every_channel_sees_an_isothermal_atmosphere_as_warm_as_it_is():
    pressure, temperature = columns(lambda x: 250.0 + 0 * x)
    seen = brightness_temperature(CHANNELS, pressure, temperature, ZENITH)
    np.testing.assert_allclose(seen, 250.0, rtol=1e-13)
    grey = tuple(dataclasses.replace(channel, emissivity=0.6) for channel in CHANNELS)
    through = np.exp(-radiation.optical_depth(grey, pressure, ZENITH)[..., 0])
    # 250 K up through t, what the ground emits, and what it reflects of 250 K (1 - t) coming down
    expected = 250 * (1 - through) + through * (0.6 * 250 + 0.4 * 250 * (1 - through))
    np.testing.assert_allclose(brightness_temperature(grey, pressure, temperature, ZENITH), expected, rtol=1e-12)


def test_weights_add_to_one_peak_where_stated_and_are_as_wide():
    for channel in CHANNELS:
        for zenith in ZENITH:

            def weight(x, channel=channel, zenith=zenith):
                return float(radiation.weighting_function((channel,), np.exp([x]), np.asarray(zenith))[0, 0])

            peak = np.log(channel.depth_pressure * np.cos(np.deg2rad(zenith)) ** (1 / channel.exponent))
            air = quad(weight, peak - 16, np.log(1e5), points=[min(peak, np.log(1e5))], limit=200)[0]
            depth = radiation.optical_depth((channel,), np.array([1e5]), np.asarray(zenith))[0, 0]
            assert air + np.exp(-depth) == pytest.approx(1.0, abs=1e-6)
            fine = peak + np.linspace(-3, 3, 6001)
            values = radiation.weighting_function((channel,), np.exp(fine), np.asarray(zenith))[0]
            assert fine[values.argmax()] == pytest.approx(peak, abs=1e-3)
            above_half = fine[values > values.max() / 2]
            assert np.ptp(above_half) == pytest.approx(channel.width, abs=3e-3)


def test_the_weighting_function_is_the_slope_of_the_transmission():
    x, step = np.log(4e4), 1e-5
    p = np.exp([x - step, x, x + step])
    through = np.exp(-radiation.optical_depth(CHANNELS, p, np.asarray(50.0)))
    slope = (through[:, 0] - through[:, 2]) / (2 * step)
    np.testing.assert_allclose(radiation.weighting_function(CHANNELS, p, np.asarray(50.0))[:, 1], slope, rtol=1e-6)


def test_brightness_is_linear_in_temperature_and_colder_towards_the_edge():
    pressure, first = columns(lambda x: 300 + 40 * x)
    _, second = columns(lambda x: 260 + 30 * np.sin(2 * x))
    both = brightness_temperature(CHANNELS, pressure, 0.3 * first + 0.7 * second, ZENITH)
    apart = [brightness_temperature(CHANNELS, pressure, part, ZENITH) for part in (first, second)]
    np.testing.assert_allclose(both, 0.3 * apart[0] + 0.7 * apart[1], rtol=1e-12)
    assert (np.diff(apart[0], axis=0) < 0).all()
    # Euler-Mascheroni: the mean of ln(delta) under exp(-delta); an opaque channel's mean level, in a straight profile
    deep = SounderChannel(Channel(1, frequency=57.0, peak_pressure=25_000.0))
    tall = np.geomspace(1e5, 1e-2, 400)
    straight = brightness_temperature((deep,), tall, 300 + 5 * np.log(tall / 1e5), np.asarray(0.0))
    assert straight[0] == pytest.approx(300 + 5 * (np.log(0.25) - 0.5772157 / deep.exponent), abs=1e-4)


def test_profiles_are_the_truth_at_its_nodes(weather):
    rng = np.random.default_rng(3)
    lat, lon = rng.uniform(-90, 90, (5, 40)), rng.uniform(-180, 180, 40)
    time = hours_after(weather.start, rng.uniform(0, 24, (5, 1)))
    for name in ("temperature", "u_component_of_wind", "specific_humidity"):
        pressure, values = profiles(weather, name, time, lat, lon)
        assert pressure.shape == (5, 40, 9)
        exact = query(weather, [name], time[..., None], lat[..., None], lon[:, None], pressure=pressure)[name]
        np.testing.assert_allclose(values, exact, rtol=1e-9, atol=1e-9)
    surface = query(weather, ["surface_pressure"], time, lat, lon)["surface_pressure"]
    np.testing.assert_allclose(pressure[..., 0], surface, rtol=1e-12)
    with pytest.raises(TruthQueryError, match="geopotential"):
        profiles(weather, "geopotential", time, lat, lon)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": -1.0}, "noise=-1.0"),
        ({"width": 0.0}, "width=0.0"),
        ({"emissivity": 1.2}, "emissivity=1.2"),
        ({"unit_depth": -5.0}, "unit_depth=-5.0"),
        ({"channel": Channel(20, wavenumber=14500.0)}, "channel 20: unit_depth=nan"),
    ],
)
def test_impossible_channels_are_typed_errors(change, message):
    with pytest.raises(ChannelError, match=message):
        SounderChannel(**{"channel": Channel(1, frequency=50.3, peak_pressure=9e4), **change})


# ----------------------------------------------------------------------------------------------------------- satellites
def test_sounder_truth_is_the_weighted_mean_of_the_queried_temperature(weather):
    observed = watch(observe_sounder, weather, AFTERNOON, 0)
    rows = observed.table.iloc[np.random.default_rng(0).integers(len(observed.table), size=12)]
    for index, row in rows.iterrows():
        at = (row["time"], row["latitude"], row["longitude"])
        surface = float(query(weather, ["surface_pressure"], *at)["surface_pressure"])
        kinks = np.log(surface * SIGMA)

        def temperature(x, at=at, kinks=kinks):
            level = np.exp(np.maximum(x, kinks[0] + 1e-12))
            return float(query(weather, ["temperature"], *at, pressure=level)["temperature"])

        number = int(row["channel"])
        (channel,) = (c for c in AFTERNOON.channels if c.channel.number == number)
        sine = (RADIUS + AFTERNOON.orbit.altitude) / RADIUS * np.sin(np.deg2rad(row["view_angle"]))
        secant = 1 / np.sqrt(1 - sine**2)

        def seen(x, channel=channel, secant=secant, temperature=temperature):
            depth = (np.exp(x) / channel.depth_pressure) ** channel.exponent * secant
            return channel.exponent * depth * np.exp(-depth) * temperature(x)

        edges = [kinks[0] - 12, *kinks, np.log(surface)]
        air = sum(quad(seen, a, b, limit=100)[0] for a, b in itertools.pairwise(edges))
        depth = (surface / channel.depth_pressure) ** channel.exponent * secant
        expected = air + np.exp(-depth) * temperature(np.log(surface))
        assert observed.truth[index] == pytest.approx(expected, abs=1e-3)


def test_sounder_rows_lie_on_its_swath_at_its_local_times(weather):
    observed = watch(observe_sounder, weather, MORNING, 0)
    table = observed.table
    assert tuple(table.columns) == COLUMNS
    assert len(table) == 1351 * 10 * 6
    look = orbits.scan(MORNING.orbit, table["time"].to_numpy(), table["view_angle"].to_numpy())
    np.testing.assert_allclose(look.latitude, table["latitude"], atol=1e-9)
    np.testing.assert_allclose(look.longitude, table["longitude"], atol=1e-9)
    assert (table["time"] == table["time"].dt.floor("s")).all()
    relief = query(weather, ["surface_altitude"], weather.start, table["latitude"], table["longitude"])
    np.testing.assert_allclose(table["height"], relief["surface_altitude"], atol=1e-9)
    assert table["height"].max() > 500
    for sounder, hours in ((MORNING, (9.5, 21.5)), (AFTERNOON, (1.5, 13.5))):
        table = watch(observe_sounder, weather, sounder, 0).table
        tropics = table[(table["latitude"].abs() < 5) & (table["view_angle"].abs() < 10)]
        clock = (tropics["time"].dt.hour + tropics["time"].dt.minute / 60 + tropics["longitude"] / 15) % 24
        off = np.abs((clock.to_numpy()[:, None] - hours + 12) % 24 - 12).min(axis=1)
        assert off.max() < 0.6
        cells = np.histogram2d(np.sin(np.deg2rad(table["latitude"])), table["longitude"], [9, 18])[0]
        assert (cells > 0).all()  # a day sees the whole Earth


def test_sounder_errors_are_the_stated_ones(weather):
    observed = watch(observe_sounder, weather, MORNING, 5)
    table, platform = observed.table, observed.platforms.iloc[0]
    error = observed.table["value"] - observed.truth
    for channel in MORNING.channels:
        number = channel.channel.number
        rows = table["channel"] == number
        assert (table.loc[rows, "obs_error"] == channel.noise).all()
        x = table.loc[rows, "view_angle"] / MORNING.scan_limit
        column = f"brightness_temperature:{number}"
        bias = (
            platform[f"bias_{column}"] + platform[f"scan_slope_{column}"] * x + platform[f"scan_curve_{column}"] * x**2
        )
        noise, n = (error[rows] - bias).to_numpy(), int(rows.sum())
        assert abs(noise.mean()) < 5 * channel.noise / np.sqrt(n)
        assert abs(noise.std() - channel.noise) < 5 * channel.noise / np.sqrt(2 * n)
        assert abs((np.abs(noise) < channel.noise).mean() - 0.6827) < 5 * np.sqrt(0.6827 * 0.3173 / n)
        assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 5 / np.sqrt(n)


def test_satellite_biases_have_the_stated_spread_over_satellites():
    still = truth_from_dataset(atmosphere(steps=2, hours=1))
    sparse = dataclasses.replace(MORNING, cadence_seconds=3600)
    many = pd.concat(
        [watch(observe_sounder, still, dataclasses.replace(sparse, platform=f"L{k}"), 0).platforms for k in range(150)]
    )
    for kind, spread in (("bias_", 0.3), ("scan_slope_", 0.15), ("scan_curve_", 0.15)):
        drawn = many[[name for name in many if str(name).startswith(kind)]].to_numpy()
        assert drawn.shape == (150, 6)
        assert abs(drawn.std() - spread) < 5 * spread / np.sqrt(2 * drawn.size)
        assert abs(drawn.mean()) < 5 * spread / np.sqrt(drawn.size)


def test_imager_sees_its_disc_every_three_hours(weather):
    imager = dataclasses.replace(DISC, longitude=140.0)
    table = watch(observe_imager, weather, imager, 0).table
    assert set(table["time"]) == set(pd.DatetimeIndex(weather.times))
    assert (table.groupby("time").size() == len(table) / 9).all()
    angle, zenith = orbits.disc_view(140.0, table["latitude"].to_numpy(), table["longitude"].to_numpy())
    np.testing.assert_allclose(angle, table["view_angle"], atol=1e-7)
    assert 60 < zenith.max() <= 65 + 1e-6
    assert table["latitude"].max() == pytest.approx(-table["latitude"].min())
    # a solid angle of the disc holds so many of the lattice's cells
    assert len(table) / 9 / 3 == pytest.approx(np.pi * imager.edge**2 / imager.spacing**2, rel=0.05)
    below = table[table["view_angle"] < 0.1]
    assert len(below) == 9 * 3
    assert below["longitude"].iloc[0] == pytest.approx(140.0)


def test_scatterometer_sees_the_sea_beside_its_track(weather):
    scatterometer = Scatterometer()
    observed = watch(observe_scatterometer, weather, scatterometer, 1)
    table = observed.table
    share = nature.continentality(table["latitude"].to_numpy(), table["longitude"].to_numpy())
    assert share.max() <= 0.5
    assert share.max() > 0.45
    track = orbits.ground_track(scatterometer.orbit, table["time"].to_numpy())[:2]
    away = np.deg2rad(degrees_between(unit(*track), unit(table["latitude"], table["longitude"]))) * RADIUS
    np.testing.assert_allclose(np.unique(np.round(away)), [360e3, 635e3, 910e3])
    angle, _ = orbits.view_angles(scatterometer.orbit.altitude, np.rad2deg(away / RADIUS))
    np.testing.assert_allclose(np.abs(table["view_angle"]), angle, atol=1e-6)
    assert (table["view_angle"] < 0).mean() == pytest.approx(0.5, abs=0.05)
    for model in scatterometer.errors:
        rows = table["variable"] == model.variable
        at = (table.loc[rows, "time"].to_numpy(), table.loc[rows, "latitude"], table.loc[rows, "longitude"])
        np.testing.assert_allclose(observed.truth[rows], query(weather, [model.variable], *at)[model.variable])
        noise = table.loc[rows, "value"] - observed.truth[rows] - observed.platforms[f"bias_{model.variable}"].iloc[0]
        assert abs(noise.mean()) < 5 * model.noise / np.sqrt(rows.sum())
        assert abs(noise.std() - model.noise) < 5 * model.noise / np.sqrt(2 * rows.sum())


def test_blocks_do_not_show(weather, monkeypatch):
    sounder = dataclasses.replace(AFTERNOON, cadence_seconds=900)
    scatterometer = Scatterometer(cadence_seconds=300)
    pairs = ((observe_sounder, sounder), (observe_imager, DISC), (observe_scatterometer, scatterometer))
    whole = [observe(weather, satellite, 2) for observe, satellite in pairs]
    monkeypatch.setattr(satellites, "_BLOCK", 100)
    for (observe, satellite), before in zip(pairs, whole, strict=True):
        after = observe(weather, satellite, 2)
        pd.testing.assert_frame_equal(before.table, after.table, check_exact=True)
        pd.testing.assert_series_equal(before.truth, after.truth, check_exact=True)


def test_simulated_sensors_carry_the_metadata_of_their_models():
    amsua, atms = sensors.sensor("simulated_amsua"), sensors.sensor("simulated_atms")
    assert amsua.channel(5) == sensors.sensor("amsua").channel(5)
    assert [c.number for c in amsua.channels] == [2, 4, 5, 6, 7, 8]
    shared = {c.frequency for c in amsua.channels} & {c.frequency for c in atms.channels}
    assert shared == {53.596, 54.4, 54.94}
    assert amsua.altitude == MORNING.orbit.altitude
    assert amsua.column
    clash = dataclasses.replace(MORNING, channels=MORNING.channels[:2])
    with pytest.raises(InstrumentError, match="sensor='simulated_amsua' is already registered"):
        observe_sounder(truth_from_dataset(atmosphere(steps=1)), clash, 0)


# ------------------------------------------------------------------------------------------------------------- vehicles
FLEET = AircraftFleet(count=30, interval_minutes=10)


def test_aircraft_fly_great_circles_at_their_speed_and_climb_as_stated(weather):
    observed = watch(observe_aircraft, weather, FLEET, 0)
    table = observed.table[observed.table["variable"] == "temperature"].sort_values(["platform", "time"])
    np.testing.assert_allclose(table["height"], standard_height(table["pressure"].to_numpy()), rtol=1e-9)
    np.testing.assert_allclose(standard_pressure(np.array([0.0, 11000.0])), [101325, 22632], rtol=1e-4)
    assert table["height"].max() <= 12000
    gap = table.groupby("platform")["time"].diff()
    flight = (gap != pd.Timedelta(minutes=10)).cumsum()  # 90 minutes on the ground are longer
    flights, ends = 0, []
    first, last = table["time"].min() + pd.Timedelta(minutes=10), table["time"].max() - pd.Timedelta(minutes=10)
    for _, part in table.groupby(flight):
        if len(part) < 3:
            continue
        flights += 1
        at = unit(part["latitude"], part["longitude"])
        step = np.deg2rad(degrees_between(at[1:], at[:-1])) * RADIUS
        np.testing.assert_allclose(step, 230 * 600, rtol=1e-6)
        plane = np.cross(at[0], at[-1])
        assert np.abs(at @ plane / np.linalg.norm(plane)).max() < 1e-7  # one great circle
        climb = np.diff(part["height"]) / 600
        assert np.abs(climb).max() <= 7.5 + 1e-9
        assert (np.diff(np.sign(np.round(climb, 9))) <= 0).all()  # up, level, down
        ends += [part["height"].iloc[0]] * (part["time"].iloc[0] > first)
        ends += [part["height"].iloc[-1]] * (part["time"].iloc[-1] < last)
    assert flights > 40
    # at most 10 min after take-off from 1.5 km, or before landing; a little more where mountains hid the first report
    assert (np.array(ends) < 7.5 * 600 + 1600).mean() > 0.97
    both = (table["height"] < 5000).mean()
    assert 0.02 < both < 0.4


def test_aircraft_reports_are_the_truth_with_the_stated_errors(weather):
    fleet = dataclasses.replace(FLEET, count=80)
    observed = watch(observe_aircraft, weather, fleet, 3)
    table, platforms = observed.table, observed.platforms.set_index("platform")
    assert table["time"].is_monotonic_increasing
    assert table["time"].min() < pd.Timestamp(weather.start) + pd.Timedelta(
        minutes=10
    )  # some are under way at the start
    for model in fleet.errors:
        rows = (table["variable"] == model.variable).to_numpy()
        part = table[rows]
        at = (part["time"].to_numpy(), part["latitude"], part["longitude"])
        exact = query(weather, [model.variable], *at, pressure=part["pressure"])[model.variable]
        np.testing.assert_allclose(observed.truth[rows], exact, rtol=1e-12, atol=1e-12)
        bias = platforms[f"bias_{model.variable}"]
        noise = part["value"] - observed.truth[rows] - bias.loc[part["platform"]].to_numpy()
        assert abs(noise.mean()) < 5 * model.noise / np.sqrt(len(part))
        assert abs(noise.std() - model.noise) < 5 * model.noise / np.sqrt(2 * len(part))
        assert abs(bias.std() - model.bias) < 5 * model.bias / np.sqrt(2 * 80)


def test_airports_without_a_neighbour_are_an_error(weather):
    fleet = AircraftFleet(airports=2, placement=Placement(clusters=0), ranges=(1e3, 2e3))
    with pytest.raises(InstrumentError, match=r"airport 0 at .* ranges=\(1000.0, 2000.0\)"):
        observe_aircraft(weather, fleet, 0)


def test_ships_stay_at_sea_and_never_jump():
    month = truth_from_dataset(atmosphere(steps=31, hours=24))
    ships = DriftingShips(count=60)
    observed = watch(observe_ships, month, ships, 0)
    table = observed.table
    assert nature.continentality(table["latitude"].to_numpy(), table["longitude"].to_numpy()).max() <= 0.5
    assert table["latitude"].abs().max() <= 70
    assert len(table) == 60 * 241 * 4
    one = table[table["variable"] == "surface_pressure"].sort_values(["platform", "time"])
    where = unit(one["latitude"], one["longitude"]).reshape(60, 241, 3)
    step = np.deg2rad(degrees_between(where[:, 1:], where[:, :-1])) * RADIUS / (3 * 3600)
    moving = step > 1e-6
    assert moving.mean() > 0.99
    speed = np.nanmedian(np.where(moving, step, np.nan), axis=1, keepdims=True)
    np.testing.assert_allclose(step[moving], np.broadcast_to(speed, step.shape)[moving], rtol=1e-6)
    assert 1 <= speed.min() < 2.5
    assert 6.5 < speed.max() <= 8
    assert degrees_between(where[:, 0], where[:, -1]).max() > 20
    platforms = observed.platforms.set_index("platform")
    for model in ships.errors:
        part = table[table["variable"] == model.variable]
        at = (part["time"].to_numpy(), part["latitude"], part["longitude"])
        exact = query(month, [model.variable], *at)[model.variable]
        np.testing.assert_allclose(observed.truth[part.index], exact, rtol=1e-12, atol=1e-12)
        noise = part["value"] - exact - platforms.loc[part["platform"], f"bias_{model.variable}"].to_numpy()
        assert abs(noise.std() - model.noise) < 5 * model.noise / np.sqrt(2 * len(part))
    biases = np.array([platforms[f"bias_{model.variable}"] / model.bias for model in ships.errors])
    assert abs(biases.std() - 1) < 5 / np.sqrt(2 * biases.size)


# ------------------------------------------------------------------------------------------------------------- humidity
def test_sondes_measure_humidity_on_request_and_nothing_else_changes(weather):
    wet = watch(observe_radiosondes, weather, RadiosondeNetwork(count=60, humidity=True), 0)
    dry = watch(observe_radiosondes, weather, RadiosondeNetwork(count=60), 0)
    humid = wet.table["variable"] == "specific_humidity"
    pd.testing.assert_frame_equal(wet.table[~humid].reset_index(drop=True), dry.table, check_exact=True)
    part = wet.table[humid]
    at = (part["time"].to_numpy(), part["latitude"], part["longitude"])
    exact = query(weather, ["specific_humidity"], *at, pressure=part["pressure"])["specific_humidity"]
    np.testing.assert_allclose(wet.truth[humid], exact, rtol=1e-12)
    assert part["value"].min() == 0  # cut
    sure = exact > 5 * part["obs_error"]
    noise = ((part["value"] - exact) / part["obs_error"])[sure]
    assert abs(noise.mean()) < 5 / np.sqrt(sure.sum())
    assert abs(noise.std() - 1) < 5 / np.sqrt(2 * sure.sum())
    dry_truth = truth_from_dataset(atmosphere(steps=9).drop_vars("specific_humidity"))
    with pytest.raises(TruthQueryError, match=r"NatureConfig\(moisture=True\)"):
        observe_radiosondes(dry_truth, RadiosondeNetwork(count=2, humidity=True), 0)


def test_saturation_is_the_tabulated_one():
    celsius, vapour = np.array([-20.0, 0.0, 20.0, 30.0]), np.array([125.4, 611.2, 2338.0, 4245.0])  # Pa, over water
    expected = 0.622 * vapour / (1e5 - 0.378 * vapour)
    np.testing.assert_allclose(nature.saturation(celsius + 273.15, np.float64(1e5)), expected, rtol=5e-3)


def test_moisture_renames_no_older_run():
    assert NatureConfig().fingerprint() == "a49f623b599aadc4"  # as before the field was added
    assert NatureConfig(moisture=True).fingerprint() != NatureConfig().fingerprint()


@pytest.mark.slow
def test_the_flow_carries_humidity_and_does_not_feel_it(tmp_path):
    pytest.importorskip("dinosaur", reason="extra osse is not installed")
    config = NatureConfig(spin_up_days=8, days=2, relief_height=2000.0, diurnal_amplitude=4.0)
    dry = nature_run(config, progress=False)
    wet = nature_run(dataclasses.replace(config, moisture=True), cache=tmp_path, progress=False)
    for name in dry:
        np.testing.assert_array_equal(dry[name], wet[name])
    humidity = wet["specific_humidity"]
    assert humidity.min() >= 0
    pressure = (wet["sigma"] * wet["surface_pressure"]).transpose(*humidity.dims)
    limit = np.asarray(nature.saturation(wet["temperature"].values, pressure.values))
    assert (humidity / limit).max() < 1 + 1e-5
    lowest = humidity.isel(sigma=-1, time=-1).mean("latitude")
    assert lowest.sel(longitude=0) > 1.1 * lowest.sel(longitude=90)  # the sea evaporates faster
    assert 1e-3 < float(humidity.isel(sigma=-1).mean()) < 2e-2
    again = nature_run(dataclasses.replace(config, moisture=True), cache=tmp_path)
    xr.testing.assert_identical(again, wet)


# --------------------------------------------------------------------------------------------------------------- system
@pytest.fixture
def instant(monkeypatch):
    """`simulate` on the analytic atmosphere."""
    monkeypatch.setattr(earth.osse, "nature_run", lambda config, **_: atmosphere(steps=5, hours=6))


def test_the_whole_system_makes_one_valid_table_and_repeats(instant):
    first, again = simulate(tiny()), simulate(tiny())
    pd.testing.assert_frame_equal(first.table, again.table, check_exact=True)
    table: Any = first.table
    assert tuple(table.columns) == COLUMNS
    assert table["time"].is_monotonic_increasing
    assert np.isfinite(first.meta.truth_values).all()
    checked, drops = validate(table)
    assert len(checked) == len(table), drops
    reports = to_reports(checked)
    wanted = {"simulated_amsua", "simulated_atms", "simulated_geo_imager", "scatterometer", "aircraft", "ship"}
    assert set(reports) == wanted | {"station", "radiosonde"}
    assert reports["simulated_amsua"].variables[1] == "brightness_temperature:4"
    assert reports["simulated_atms"].values.shape == (169 * 14, 6)
    assert np.isfinite(reports["simulated_atms"].values).all()
    assert "well-mixed absorber" in first.meta.caveats[-1]
    assert set(simulate(OsseConfig()).table["sensor"]) == {"station", "radiosonde"}  # the default is what it was
    other: Any = simulate(dataclasses.replace(tiny(), seed=1)).table
    assert not np.isin(other["value"], table["value"][table["value"] != 0]).any()  # humidity is cut at 0


def test_an_instrument_changes_no_report_of_the_others(instant):
    whole: Any = simulate(tiny())
    nothing = {"stations": None, "radiosondes": None, "aircraft": None, "ships": None}
    nothing |= {"sounders": (), "imagers": (), "scatterometers": ()}
    for name in nothing:
        alone: Any = simulate(dataclasses.replace(tiny(), **{**nothing, name: getattr(tiny(), name)}))
        names = set(alone.table["platform"])
        same = whole.table["platform"].isin(names)
        pd.testing.assert_frame_equal(alone.table, whole.table[same].reset_index(drop=True), check_exact=True)
    few = dataclasses.replace(
        tiny(), aircraft=AircraftFleet(count=4, interval_minutes=30), ships=DriftingShips(count=3)
    )
    fewer: Any = simulate(
        dataclasses.replace(few, **{k: v for k, v in nothing.items() if k not in ("aircraft", "ships")})
    )
    flown = fewer.table[fewer.table["sensor"] == "aircraft"]
    same = whole.table["platform"].isin(set(flown["platform"]))
    pd.testing.assert_frame_equal(
        flown.reset_index(drop=True), whole.table[same].reset_index(drop=True), check_exact=True
    )


def test_example_tables_and_maps_what_is_seen(instant, tmp_path, capsys):
    assert observing_system.main(["--tiny", "--out", str(tmp_path / "out")]) == 0
    rows = pd.read_csv(tmp_path / "out" / "table.csv").set_index(["sensor", "variable"])
    assert rows.loc[("simulated_amsua", "brightness_temperature:4"), "values"] == 169 * 10
    assert len(rows) == 4 + 5 + 6 + 6 + 3 + 2 + 3 + 4
    assert (tmp_path / "out" / "coverage.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "well-mixed absorber" in capsys.readouterr().out


def test_presets_build():
    assert t31().nature.truncation == 31
    assert len(t21().instruments) == 8
    assert t21().nature.spin_up_days >= 150


@pytest.mark.slow
def test_the_dycore_and_all_instruments_run_together():
    pytest.importorskip("dinosaur", reason="extra osse is not installed")
    world: Any = simulate(tiny(), progress=False)
    assert world.table["sensor"].nunique() == 8
    assert np.isfinite(world.table["value"]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(MORNING, channels=()), r"channels \[\]"),
        (lambda: dataclasses.replace(MORNING, channels=MORNING.channels[:1] * 2), r"channels \[2, 2\]"),
        (lambda: dataclasses.replace(MORNING, cadence_seconds=0), "LEO1: cadence_seconds=0"),
        (lambda: dataclasses.replace(MORNING, keep_fields=-3), "keep_fields=-3"),
        (lambda: dataclasses.replace(MORNING, scan_limit=0.0), "scan_limit=0.0"),
        (lambda: dataclasses.replace(DISC, max_zenith=89.0), "max_zenith=89.0"),
        (lambda: dataclasses.replace(DISC, spacing=20.0), "spacing=20.0"),
        (lambda: dataclasses.replace(DISC, cadence_hours=0), "cadence_hours=0"),
        (lambda: Scatterometer(near=9e5, far=5e5), "near=900000.0 and far=500000.0"),
        (lambda: Scatterometer(far=9e6), "far=9000000.0"),
        (lambda: Scatterometer(errors=(ErrorModel("temperature", 1.0, 0.0),)), "temperature"),
        (lambda: Scatterometer(land_share=0.0), "land_share=0.0"),
        (lambda: AircraftFleet(airports=1), "airports=1"),
        (lambda: AircraftFleet(cruise=(12000.0, 9000.0)), "cruise="),
        (lambda: AircraftFleet(ranges=(0.0, 1e6)), "ranges="),
        (lambda: AircraftFleet(speed=0.0), "speed=0.0"),
        (lambda: AircraftFleet(errors=()), "errors names nothing"),
        (lambda: AircraftFleet(errors=(ErrorModel("surface_pressure", 1.0, 0.0),)), "surface_pressure"),
        (lambda: DriftingShips(count=0), "count=0"),
        (lambda: DriftingShips(speeds=(5.0, 2.0)), "speeds="),
        (lambda: DriftingShips(max_latitude=90.0), "max_latitude=90.0"),
        (lambda: OsseConfig(sounders=(MORNING, MORNING)), "LEO1"),
        (lambda: OsseConfig(stations=None, radiosondes=None), "at least one"),
    ],
)
def test_impossible_instruments_are_typed_errors(make, message):
    with pytest.raises(InstrumentError, match=message):
        make()
