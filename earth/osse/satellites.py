"""Simulated satellites: microwave sounders and a wind scatterometer in low orbits, an imager over a geostationary disc.

Each is a frozen dataclass and a function `observe_*(truth, satellite, seed) -> Observed`. A satellite draws from the
random stream of its platform name, so adding one changes no report of the others; fields of view are points, and all
of one scan have its time. `height` of a row is the model's ground below, `view_angle` the scan angle from nadir, which
is negative left of the flight.

Numbers follow the instruments named, rounded and thinned (ours) to what a coarse truth can feed; instrument biases are
drawn once per platform and channel, and stand in `Observed.platforms`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from earth.osse.instruments import ErrorModel, InstrumentError, Observed, Stream, check_errors, is_sea, observed_rows
from earth.osse.orbits import (
    EARTH_RADIUS,
    GEOSTATIONARY_ALTITUDE,
    Look,
    Orbit,
    destination,
    disc,
    ground_arc,
    ground_track,
    scan,
    view_angles,
)
from earth.osse.radiation import SounderChannel, brightness_temperature
from earth.osse.truth import SURFACE_VARIABLES, Truth, profiles, query
from earth.sensors import SENSORS, Channel, Sensor, join_channel, register_sensor, sensor

_BLOCK = 20_000  # footprints simulated at once: bounds the temporaries to some 100 MB
_TB = "brightness_temperature"


@dataclasses.dataclass(frozen=True)
class Sounder:
    """A radiometer that scans across its track.

    Attributes:
      platform: name of the satellite.
      sensor: name of the instrument in `earth.sensors.SENSORS`, registered when it is first used.
      orbit: its orbit.
      channels: its channels.
      scan_limit: degrees from nadir of the outermost field of view.
      fields: fields of view of a scan, evenly spaced in scan angle.
      keep_fields: thinning across the track: one field in so many is kept.
      cadence_seconds: thinning along the track: whole seconds between the scans that are kept, from the start of the
        truth. AMSU-A scans every 8 s, ATMS every 8/3 s; 64 s are 430 km.
    """

    platform: str
    sensor: str
    orbit: Orbit
    channels: tuple[SounderChannel, ...]
    scan_limit: float = 48.33
    fields: int = 30
    keep_fields: int = 3
    cadence_seconds: int = 64

    def __post_init__(self):
        _check_channels(self.platform, self.channels)
        _check_counts(self, "fields", "keep_fields", "cadence_seconds")
        if not self.scan_limit > 0:
            raise InstrumentError(f"{self.platform}: scan_limit={self.scan_limit} must be positive degrees")
        ground_arc(self.orbit.altitude, self.scan_limit)

    @property
    def angles(self) -> np.ndarray:
        """Scan angles in degrees of the fields that are kept, left to right."""
        first = (self.fields - 1) % self.keep_fields // 2
        return np.linspace(-self.scan_limit, self.scan_limit, self.fields)[first :: self.keep_fields]

    @property
    def swath(self) -> float:
        """Width on the ground between the outermost fields of a full scan, m."""
        arc, _ = ground_arc(self.orbit.altitude, self.scan_limit)
        return float(2 * np.deg2rad(arc) * EARTH_RADIUS)


@dataclasses.dataclass(frozen=True)
class GeoImager:
    """An infrared imager over the disc of a geostationary satellite.

    Attributes:
      platform: name of the satellite.
      sensor: name of the instrument in `earth.sensors.SENSORS`, registered when it is first used.
      longitude: of the satellite, degrees east.
      channels: its channels.
      cadence_hours: hours between images, from the start of the truth.
      spacing: degrees at the satellite between footprints, both ways: 0.5 is 310 km below it and more towards the limb.
      max_zenith: largest zenith angle of the satellite at a footprint, degrees.
    """

    platform: str
    sensor: str
    longitude: float
    channels: tuple[SounderChannel, ...]
    cadence_hours: int = 3
    spacing: float = 0.5
    max_zenith: float = 65.0

    def __post_init__(self):
        _check_channels(self.platform, self.channels)
        _check_counts(self, "cadence_hours")
        if not 0 < self.max_zenith < 85:
            raise InstrumentError(f"{self.platform}: max_zenith={self.max_zenith} must lie in (0, 85) degrees")
        if not 0 < self.spacing < self.edge:
            raise InstrumentError(
                f"{self.platform}: spacing={self.spacing} must lie in (0, {self.edge:.2f}) degrees, the disc's radius"
            )

    @property
    def edge(self) -> float:
        """Angle from nadir at the satellite under which `max_zenith` is seen, degrees."""
        ratio = EARTH_RADIUS / (EARTH_RADIUS + GEOSTATIONARY_ALTITUDE)
        return float(np.rad2deg(np.arcsin(ratio * np.sin(np.deg2rad(self.max_zenith)))))


@dataclasses.dataclass(frozen=True)
class Scatterometer:
    """Winds of the lowest level over the sea, in two swaths beside the track.

    The defaults are of the size of ASCAT's, quoted from memory. Its ambiguous directions and its dependence on wind
    speed are not simulated.

    Attributes:
      platform: name of the satellite.
      orbit: its orbit.
      near, far: distances on the ground from the track to the edges of a swath, m.
      cells: cells across each swath.
      cadence_seconds: whole seconds between rows of cells.
      errors: of the two winds.
      land_share: largest `continentality` that counts as sea.
    """

    platform: str = "SCAT1"
    orbit: Orbit = dataclasses.field(default_factory=lambda: Orbit(altitude=817e3, local_time=21.5))
    near: float = 360e3
    far: float = 910e3
    cells: int = 3
    cadence_seconds: int = 40
    errors: tuple[ErrorModel, ...] = (
        ErrorModel("lowest_level_u_component_of_wind", 1.5, 0.2),
        ErrorModel("lowest_level_v_component_of_wind", 1.5, 0.2),
    )
    land_share: float = 0.5

    def __post_init__(self):
        horizon = np.arccos(EARTH_RADIUS / (EARTH_RADIUS + self.orbit.altitude)) * EARTH_RADIUS
        if not 0 <= self.near < self.far <= horizon:
            raise InstrumentError(
                f"{self.platform}: near={self.near} and far={self.far} m must ascend and end before the horizon at "
                f"{horizon:.0f} m"
            )
        _check_counts(self, "cells", "cadence_seconds")
        if not 0 < self.land_share <= 1:
            raise InstrumentError(f"{self.platform}: land_share={self.land_share} must lie in (0, 1]")
        check_errors(self.errors, SURFACE_VARIABLES)


def observe_sounder(truth: Truth, sounder: Sounder, seed: int) -> Observed:
    """Simulates a sounder's brightness temperatures over the whole truth; one row per footprint and channel."""
    rng = _stream(seed, Stream.SOUNDERS, sounder.platform)
    times = _regular(truth, sounder.cadence_seconds)
    angles = sounder.angles

    def footprints() -> Iterator[tuple[np.ndarray, np.ndarray, Look]]:
        for block in _blocks(times, len(angles)):
            when, view = np.broadcast_arrays(block[:, None], angles)
            yield when, view, scan(sounder.orbit, when, view)

    place = {"latitude": np.nan, "longitude": np.nan, "height": sounder.orbit.altitude}
    return _radiances(truth, sounder, footprints(), sounder.scan_limit, rng, place)


def observe_imager(truth: Truth, imager: GeoImager, seed: int) -> Observed:
    """Simulates the images of a geostationary imager over the whole truth; one row per footprint and channel."""
    rng = _stream(seed, Stream.IMAGERS, imager.platform)
    times = _regular(truth, imager.cadence_hours * 3600)
    steps = np.arange(-(imager.edge // imager.spacing), imager.edge // imager.spacing + 1) * imager.spacing
    east, north = (part.ravel() for part in np.meshgrid(steps, steps))
    seen = np.hypot(east, north) <= imager.edge
    angle, direction = np.hypot(east, north)[seen], np.rad2deg(np.arctan2(east, north))[seen]
    look = disc(imager.longitude, angle, direction)

    def footprints() -> Iterator[tuple[np.ndarray, np.ndarray, Look]]:
        for block in _blocks(times, len(angle)):
            when, view, *parts = np.broadcast_arrays(block[:, None], angle, *look)
            yield when, view, Look(*parts)

    place = {"latitude": 0.0, "longitude": imager.longitude, "height": GEOSTATIONARY_ALTITUDE}
    return _radiances(truth, imager, footprints(), imager.edge, rng, place)


def observe_scatterometer(truth: Truth, scatterometer: Scatterometer, seed: int) -> Observed:
    """Simulates a scatterometer's winds over the whole truth; rows over the sea only."""
    rng = _stream(seed, Stream.SCATTEROMETERS, scatterometer.platform)
    orbit, names = scatterometer.orbit, [error.variable for error in scatterometer.errors]
    bias = np.array([error.bias for error in scatterometer.errors]) * rng.standard_normal(len(names))
    noise = np.array([error.noise for error in scatterometer.errors])
    right = np.linspace(scatterometer.near, scatterometer.far, scatterometer.cells) / EARTH_RADIUS
    arc = np.concatenate([-right[::-1], right])
    angle, _ = view_angles(orbit.altitude, np.rad2deg(arc))
    parts = []
    for block in _blocks(_regular(truth, scatterometer.cadence_seconds), len(arc)):
        latitude, longitude, heading = (part[:, None] for part in ground_track(orbit, block))
        latitude, longitude = destination(latitude, longitude, np.deg2rad(heading + 90.0), arc)
        sea = is_sea(latitude, longitude, scatterometer.land_share)
        when, view = (np.broadcast_to(part, sea.shape)[sea] for part in (block[:, None], angle))
        latitude, longitude = latitude[sea], longitude[sea]
        exact = query(truth, [*names, "surface_altitude"], when, latitude, longitude)
        values = np.stack([exact[name] for name in names], axis=-1)
        error = bias + noise * rng.standard_normal(values.shape)
        parts.append((when, latitude, longitude, exact["surface_altitude"], view, values, values + error))
    platforms = pd.DataFrame(
        {"platform": [scatterometer.platform], "sensor": "scatterometer", "latitude": np.nan, "longitude": np.nan}
    ).assign(height=orbit.altitude, **{f"bias_{name}": b for name, b in zip(names, bias, strict=True)})
    channels = np.full(len(names), -1)
    return _long(parts, np.asarray(names, object), channels, noise, platforms)


def _check_counts(satellite: Any, *names: str) -> None:
    for name in names:
        count = getattr(satellite, name)
        if count < 1 or count != int(count):
            raise InstrumentError(f"{satellite.platform}: {name}={count} must be a whole number from 1")


def _check_channels(platform: str, channels: tuple[SounderChannel, ...]) -> None:
    numbers = [channel.channel.number for channel in channels]
    if not numbers or len(set(numbers)) != len(numbers):
        raise InstrumentError(f"{platform}: channels {numbers} must be at least one, each number once")


def _enrol(instrument: Sounder | GeoImager, altitude: float) -> None:
    """Registers the sensor with its channels' metadata, once; another sensor of that name is an error."""
    channels = tuple(channel.channel for channel in instrument.channels)
    given = Sensor(instrument.sensor, (_TB,), channels, True, "surface", True, altitude, "simulated radiometer")
    known = SENSORS.get(instrument.sensor)
    if known is None:
        register_sensor(given)
    elif repr(known) != repr(given):  # not ==: a NaN bandwidth differs from itself
        raise InstrumentError(
            f"{instrument.platform}: sensor={instrument.sensor!r} is already registered with other channels or another "
            "altitude; give this instrument its own sensor name"
        )


def _stream(seed: int, kind: Stream, platform: str) -> np.random.Generator:
    return np.random.default_rng([seed, kind, zlib.crc32(platform.encode())])


def _regular(truth: Truth, seconds: int) -> np.ndarray:
    step = np.timedelta64(seconds, "s").astype("timedelta64[ns]")
    return np.arange(truth.start, truth.end + np.timedelta64(1, "ns"), step)


def _blocks(times: np.ndarray, points: int) -> Iterator[np.ndarray]:
    count = max(1, _BLOCK // points)
    for start in range(0, len(times), count):
        yield times[start : start + count]


def _radiances(
    truth: Truth,
    instrument: Sounder | GeoImager,
    footprints: Iterator[tuple[np.ndarray, np.ndarray, Look]],
    edge: float,
    rng: np.random.Generator,
    place: dict[str, Any],
) -> Observed:
    """Brightness temperatures of (time, view angle, look) blocks, each of shape [time, field]."""
    _enrol(instrument, place["height"])
    channels = instrument.channels
    noise = np.array([channel.noise for channel in channels])
    constant, slope, curve = np.array(
        [[c.bias for c in channels], [c.scan_bias for c in channels], [c.scan_bias for c in channels]]
    ) * rng.standard_normal((3, len(channels)))
    parts = []
    for when, view, look in footprints:
        flat = [part.ravel() for part in (when, look.latitude, look.longitude, look.zenith, view)]
        when, latitude, longitude, zenith, view = flat
        ground = query(truth, ["surface_altitude"], when, latitude, longitude)["surface_altitude"]
        pressure, temperature = profiles(truth, "temperature", when, latitude, longitude)
        exact = brightness_temperature(channels, pressure, temperature, zenith)
        x = view[:, None] / edge
        error = constant + slope * x + curve * x**2 + noise * rng.standard_normal(exact.shape)
        parts.append((when, latitude, longitude, ground, view, exact, exact + error))
    numbers = np.array([channel.channel.number for channel in channels])
    platforms = pd.DataFrame({"platform": [instrument.platform], "sensor": instrument.sensor, **place})
    for kind, biases in (("bias", constant), ("scan_slope", slope), ("scan_curve", curve)):
        platforms = platforms.assign(
            **{f"{kind}_{join_channel(_TB, int(n))}": b for n, b in zip(numbers, biases, strict=True)}
        )
    return _long(parts, np.full(len(numbers), _TB, object), numbers, noise, platforms)


def _long(
    parts: list[tuple[np.ndarray, ...]],
    variables: np.ndarray,
    channels: np.ndarray,
    noise: np.ndarray,
    platforms: pd.DataFrame,
) -> Observed:
    """Rows of one satellite from blocks of (time, latitude, longitude, height, view angle, each [n]; exact, observed,
    each [n, V]).
    """
    when, latitude, longitude, height, view, exact, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    width, count = len(variables), len(when)
    return observed_rows(
        {
            "time": np.repeat(when, width),
            "latitude": np.repeat(latitude, width),
            "longitude": np.repeat(longitude, width),
            "height": np.repeat(height, width),
            "pressure": np.full(count * width, np.nan),
            "value": values.ravel(),
            "channel": np.tile(channels, count),
            "obs_error": np.tile(noise, count),
            "view_angle": np.repeat(view, width),
        },
        np.tile(variables, count),
        np.zeros(count * width, int),
        exact.ravel(),
        platforms,
    )


def _microwave(name: str, *rows: tuple[int, float, float | None]) -> tuple[SounderChannel, ...]:
    """Channels of a real instrument, by number, NEDT in K and unit depth in Pa."""
    return tuple(SounderChannel(sensor(name).channel(number), noise, depth) for number, noise, depth in rows)


# Noise: NOAA KLM guide for AMSU-A, the same doubled for the narrower beam of ATMS; from memory. Unit depths of windows
# and of channels that see the ground: ours.
MORNING = Sounder(
    platform="LEO1",
    sensor="simulated_amsua",
    orbit=Orbit(altitude=817e3, local_time=21.5),
    channels=_microwave(
        "amsua",
        (2, 0.30, 4e5),
        (4, 0.25, 1.1e5),
        (5, 0.25, None),
        (6, 0.25, None),
        (7, 0.25, None),
        (8, 0.25, None),
    ),
)
AFTERNOON = Sounder(
    platform="LEO2",
    sensor="simulated_atms",
    orbit=Orbit(altitude=824e3, local_time=13.5, phase=120.0),
    channels=_microwave(
        "atms",
        (3, 0.6, 2e5),
        (4, 0.5, 1.4e5),
        (6, 0.5, None),
        (7, 0.5, None),
        (8, 0.5, None),
        (10, 0.5, None),
    ),
    scan_limit=52.7,
    fields=96,
    keep_fields=7,
)
# Channels of the size of SEVIRI's 10.8, 13.4 and 6.2 um; the last one's water vapour does not vary here.
DISC = GeoImager(
    platform="GEO1",
    sensor="simulated_geo_imager",
    longitude=0.0,
    channels=(
        SounderChannel(Channel(1, wavenumber=926.0, bandwidth=171.0, peak_pressure=101_325.0), 0.2, 4e5),
        SounderChannel(Channel(2, wavenumber=746.0, bandwidth=111.0, peak_pressure=85_000.0), 0.3),
        SounderChannel(Channel(3, wavenumber=1600.0, bandwidth=460.0, peak_pressure=35_000.0), 0.3, width=0.9),
    ),
)

for _instrument, _altitude in (
    (MORNING, MORNING.orbit.altitude),
    (AFTERNOON, AFTERNOON.orbit.altitude),
    (DISC, GEOSTATIONARY_ALTITUDE),
):
    _enrol(_instrument, _altitude)
if "scatterometer" not in SENSORS:
    register_sensor(
        Sensor(
            "scatterometer",
            ("lowest_level_u_component_of_wind", "lowest_level_v_component_of_wind"),
            moving=True,
            description="simulated winds over the sea",
        )
    )
