"""Simulated instruments: what stations and radiosondes would report of an OSSE's truth, in the canonical observation
table.

Each network is a frozen dataclass and a function `observe_*(truth, network, seed) -> Observed`; a new instrument is
another pair. Every platform draws from its own random stream, so adding platforms, or a second network, changes no
report of the others.

The errors are ours, of the size operational centres assign, and simpler than real ones: Gaussian, independent in time
and between platforms (and, for sondes, between levels), plus one constant bias per station and variable; no gross
errors, no representativeness error. `obs_error` in the table is the standard deviation of the random part alone; biases
are not known to the user of the table and stand in `Observed.platforms`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

import numpy as np
import pandas as pd

from earth.observations import COLUMNS
from earth.osse.nature import OsseError, continentality
from earth.osse.orbits import EARTH_RADIUS, destination
from earth.osse.truth import Truth, query
from earth.sensors import VARIABLES, Variable, register_variable

# The nature run has no surface layer: what its stations report is the air of the lowest sigma layer, and is named so.
for _variable in (
    Variable("lowest_level_temperature", "K", "air_temperature", (150.0, 350.0), floor=0.05),
    Variable("lowest_level_u_component_of_wind", "m s-1", "eastward_wind", (-150.0, 150.0), floor=0.05),
    Variable("lowest_level_v_component_of_wind", "m s-1", "northward_wind", (-150.0, 150.0), floor=0.05),
):
    if _variable.name not in VARIABLES:
        register_variable(_variable)


@enum.unique
class Stream(enum.IntEnum):
    """Second word of the seed of a random stream, after the experiment's: never reuse one."""

    STATIONS = 1
    SONDES = 2
    CLUSTERS = 3
    SOUNDERS = 4
    IMAGERS = 5
    SCATTEROMETERS = 6
    AIRCRAFT = 7
    AIRPORTS = 8
    SHIPS = 9


class InstrumentError(OsseError):
    """A network that cannot be simulated."""


@dataclasses.dataclass(frozen=True)
class ErrorModel:
    """Error of one variable of a station, ship, aircraft or scatterometer, SI: value = truth + bias + noise.

    Attributes:
      variable: name in the table.
      noise: standard deviation of the random error, drawn anew for each value.
      bias: standard deviation over platforms of the constant error.
    """

    variable: str
    noise: float
    bias: float

    def __post_init__(self):
        if not (self.noise >= 0 and self.bias >= 0):
            raise InstrumentError(f"{self.variable}: noise={self.noise} and bias={self.bias} must not be negative")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where platforms stand: a share in clusters (crowded land), the rest anywhere (islands, remote land).

    Attributes:
      clusters: number of cluster centres, uniform over the sphere between the latitude limits; 0 for none.
      radius: degrees of arc, scale of the distance from the centre (Gaussian in the tangent plane).
      isolated: share of platforms outside clusters, uniform over the same band.
      max_latitude: degrees; no platform stands nearer to a pole.
    """

    clusters: int = 10
    radius: float = 9.0
    isolated: float = 0.3
    max_latitude: float = 80.0

    def __post_init__(self):
        if self.clusters < 0 or self.radius <= 0 or not 0 <= self.isolated <= 1 or not 0 < self.max_latitude <= 90:
            raise InstrumentError(
                f"{self}: needs clusters >= 0, radius > 0, isolated in [0, 1], max_latitude in (0, 90]"
            )


@dataclasses.dataclass(frozen=True)
class StationNetwork:
    """Fixed surface stations.

    A station stands on the model's relief, its height is that relief's, and it reads the surface pressure there and the
    air of the lowest layer above it.

    Attributes:
      count: number of stations.
      cadence_hours: hours between reports, from the start of the truth.
      errors: what is measured and how well.
      placement: where they stand.
      missing_report: probability that a whole report is lost.
      missing_value: probability that one value of a report is lost.
      outage: share of time that a station is silent for long.
      outage_hours: mean length of such a silence.
      prefix: first letters of the platform names.
    """

    count: int = 200
    cadence_hours: int = 3
    errors: tuple[ErrorModel, ...] = (
        ErrorModel("lowest_level_temperature", 0.5, 0.5),
        ErrorModel("surface_pressure", 50.0, 30.0),
        ErrorModel("lowest_level_u_component_of_wind", 1.0, 0.3),
        ErrorModel("lowest_level_v_component_of_wind", 1.0, 0.3),
    )
    placement: Placement = Placement()
    missing_report: float = 0.02
    missing_value: float = 0.01
    outage: float = 0.02
    outage_hours: float = 36.0
    prefix: str = "ST"

    def __post_init__(self):
        if self.count < 1 or self.cadence_hours < 1:
            raise InstrumentError(f"count={self.count} and cadence_hours={self.cadence_hours} must be at least 1")
        if not all(0 <= share < 1 for share in (self.missing_report, self.missing_value, self.outage)):
            raise InstrumentError(
                f"missing_report={self.missing_report}, missing_value={self.missing_value} and outage={self.outage} "
                "are shares in [0, 1)"
            )
        if self.outage_hours < self.cadence_hours:
            raise InstrumentError(
                f"outage_hours={self.outage_hours} is shorter than one cadence of {self.cadence_hours} h"
            )
        if not self.errors:
            raise InstrumentError("errors is empty: name at least one variable to measure")


@dataclasses.dataclass(frozen=True)
class SondeErrors:
    """Random error of radiosondes by pressure, SI; between levels linear in ln(pressure), constant beyond the ends."""

    pressure: tuple[float, ...] = (100000.0, 85000.0, 50000.0, 25000.0, 10000.0)
    temperature: tuple[float, ...] = (1.2, 0.9, 0.8, 1.2, 1.5)
    wind: tuple[float, ...] = (1.5, 1.5, 2.1, 3.0, 2.5)
    geopotential_height: tuple[float, ...] = (7.0, 8.0, 12.0, 20.0, 27.0)
    specific_humidity: tuple[float, ...] = (1e-3, 8e-4, 3e-4, 5e-5, 1e-5)

    def __post_init__(self):
        for name in ("temperature", "wind", "geopotential_height", "specific_humidity"):
            errors = getattr(self, name)
            if len(errors) != len(self.pressure) or min(errors) < 0:
                raise InstrumentError(f"{name}={errors} needs one error >= 0 per pressure of {self.pressure}")

    def at(self, variable: str, pressure: np.ndarray) -> np.ndarray:
        """Standard deviation of a variable's random error at pressures in Pa."""
        table = getattr(self, "wind" if variable.endswith("component_of_wind") else variable)
        order = np.argsort(self.pressure)
        return np.interp(np.log(pressure), np.log(np.asarray(self.pressure)[order]), np.asarray(table)[order])


@dataclasses.dataclass(frozen=True)
class RadiosondeNetwork:
    """Balloon soundings: temperature, u, v, on mandatory levels geopotential height, and specific humidity on request.

    Levels: the mandatory ones, the ground, and significant ones. A significant level is a layer centre of the nature
    run (its profiles are straight lines in ln p between them) where temperature or wind departs from the line through
    the levels already taken by more than the threshold, the worst first (Douglas-Peucker, in the spirit of the WMO TEMP
    code's 1 K and 5 m/s). Levels below the ground or above the highest layer centre are not reported.

    Attributes:
      count: number of launch sites.
      hours: nominal UTC hours of launch.
      mandatory: pressures in Pa.
      significant_temperature: threshold, K.
      significant_wind: threshold of the vector difference, m/s.
      errors: random errors by pressure.
      placement: where the sites are.
      missing_sounding: probability that a launch does not happen.
      early_burst: probability that the balloon bursts at a height drawn evenly in ln(p) between 500 hPa and the top.
      humidity: measure specific humidity too, which the nature run must carry; observed values are cut at 0.
      drift: report times and positions of the balloon, which rises at `ascent_rate` with the wind from the nominal hour
        on; else all levels stand over the site at the nominal hour.
      ascent_rate: m/s.
      prefix: first letters of the platform names.
    """

    count: int = 40
    hours: tuple[int, ...] = (0, 12)
    mandatory: tuple[float, ...] = tuple(
        1e2 * level for level in (1000.0, 925.0, 850.0, 700.0, 500.0, 400.0, 300.0, 250.0, 200.0, 150.0, 100.0, 70.0)
    )
    significant_temperature: float = 1.0
    significant_wind: float = 5.0
    errors: SondeErrors = SondeErrors()
    placement: Placement = Placement()
    missing_sounding: float = 0.05
    early_burst: float = 0.1
    humidity: bool = False
    drift: bool = False
    ascent_rate: float = 5.0
    prefix: str = "RS"

    def __post_init__(self):
        if self.count < 1 or not self.hours or not all(0 <= hour < 24 for hour in self.hours):
            raise InstrumentError(f"count={self.count} must be at least 1 and hours={self.hours} lie in [0, 24)")
        if not self.mandatory or min(self.mandatory) <= 0:
            raise InstrumentError(f"mandatory={self.mandatory} must be pressures in Pa")
        if not (0 <= self.missing_sounding < 1 and 0 <= self.early_burst <= 1 and self.ascent_rate > 0):
            raise InstrumentError(
                f"missing_sounding={self.missing_sounding}, early_burst={self.early_burst} are shares and "
                f"ascent_rate={self.ascent_rate} is positive"
            )
        if not (self.significant_temperature > 0 and self.significant_wind > 0):
            raise InstrumentError("significant_temperature and significant_wind must be positive; inf turns one off")


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a network reported.

    Attributes:
      table: canonical long table (columns `COLUMNS`), sorted by time, RangeIndex.
      truth: the true value of each row, aligned with the table's index; for verification only.
      platforms: platform, sensor, latitude, longitude, height and `bias_<variable>` of each platform.
    """

    table: pd.DataFrame
    truth: pd.Series
    platforms: pd.DataFrame


def observe_stations(truth: Truth, network: StationNetwork, seed: int) -> Observed:
    """Simulates the reports of a station network over the whole truth.

    Same truth, network and seed give the same bits; the first n stations of a larger network are those of a smaller
    one.
    """
    step = np.timedelta64(network.cadence_hours, "h").astype("timedelta64[ns]")
    times = np.arange(truth.start, truth.end + np.timedelta64(1, "ns"), step)
    names = [error.variable for error in network.errors]
    rngs = [np.random.default_rng([seed, Stream.STATIONS, index]) for index in range(network.count)]
    latitude, longitude = place(network.placement, rngs, seed)
    exact = query(truth, names, times[None, :], latitude[:, None], longitude[:, None])
    values = np.stack([exact[name] for name in names], axis=-1)  # [station, time, variable]
    height = query(truth, ["surface_altitude"], truth.start, latitude, longitude)["surface_altitude"]

    noise_sd = np.array([error.noise for error in network.errors])
    bias_sd = np.array([error.bias for error in network.errors])
    bias = np.empty((network.count, len(names)))
    observed = np.empty_like(values)
    present = np.empty(values.shape, bool)
    for index, rng in enumerate(rngs):
        bias[index] = bias_sd * rng.standard_normal(len(names))
        observed[index] = values[index] + bias[index] + noise_sd * rng.standard_normal(values.shape[1:])
        lost = rng.random(len(times)) < network.missing_report
        lost |= _silences(rng, len(times), network.outage, network.outage_hours / network.cadence_hours)
        present[index] = ~lost[:, None] & (rng.random(values.shape[1:]) >= network.missing_value)

    when, station, which = np.nonzero(present.transpose(1, 0, 2))  # sorted by time, then station
    platforms = platform_rows(network.prefix, "station", latitude, longitude, height)
    for column, name in enumerate(names):
        platforms[f"bias_{name}"] = bias[:, column]
    return observed_rows(
        {
            "time": times[when],
            "latitude": latitude[station],
            "longitude": longitude[station],
            "height": height[station],
            "pressure": np.full(len(when), np.nan),
            "value": observed[station, when, which],
            "obs_error": noise_sd[which],
        },
        np.asarray(names, object)[which],
        station,
        values[station, when, which],
        platforms,
    )


def observe_radiosondes(truth: Truth, network: RadiosondeNetwork, seed: int) -> Observed:
    """Simulates the soundings of a radiosonde network over the whole truth.

    `pressure` of a row is its level's, exactly (a sonde's pressure error is part of the errors of what it measures
    there). `height` is NaN on purpose: it is known only through the hydrostatic height, which is itself an observed
    variable here. With `drift`, levels reached after the end of the truth are not reported.
    """
    rngs = [np.random.default_rng([seed, Stream.SONDES, index]) for index in range(network.count)]
    latitude, longitude = place(network.placement, rngs, seed)
    height = query(truth, ["surface_altitude"], truth.start, latitude, longitude)["surface_altitude"]
    platforms = platform_rows(network.prefix, "radiosonde", latitude, longitude, height)
    days = np.arange(truth.start.astype("datetime64[D]"), truth.end.astype("datetime64[D]") + 1)
    times = np.sort((days[:, None] + np.array(network.hours, "timedelta64[h]")).ravel()).astype("datetime64[ns]")
    times = times[(times >= truth.start) & (times <= truth.end)]

    site, nominal, burst = [], [], []
    for index, rng in enumerate(rngs):
        launched = rng.random(len(times)) >= network.missing_sounding
        top = np.where(rng.random(len(times)) < network.early_burst, rng.random(len(times)), 1.0)
        site.append(np.full(launched.sum(), index))
        nominal.append(times[launched])
        burst.append(top[launched])
    site, nominal, burst = np.concatenate(site), np.concatenate(nominal), np.concatenate(burst)

    pressure, mandatory, ground = _candidates(truth, network, nominal, latitude[site], longitude[site], burst)
    when, lat, lon = _positions(truth, network, nominal, latitude[site], longitude[site], pressure)
    names = ("temperature", "u_component_of_wind", "v_component_of_wind", "geopotential_height")
    names += ("specific_humidity",) * network.humidity
    inside = np.isfinite(pressure) & (when <= truth.end)
    exact = query(
        truth, names, np.where(inside, when, truth.start), lat, lon, pressure=np.where(inside, pressure, np.nan)
    )
    inside &= np.isfinite(exact["temperature"])
    kept = _significant(
        exact, np.log(np.where(inside, pressure, np.nan)), inside, inside & (mandatory | ground), network
    )

    values = np.stack([exact[name] for name in names], axis=-1)  # [sounding, level, variable]
    safe = np.where(inside, pressure, 1e5)
    sd = np.stack([network.errors.at(name, safe) for name in names], axis=-1)
    noise = np.empty_like(values)
    for index, rng in enumerate(rngs):  # each site's stream goes on where its launches ended
        own = site == index
        for part in (slice(4), slice(4, len(names))):  # humidity last: it changes no other value
            noise[own, :, part] = rng.standard_normal(noise[own, :, part].shape)
    observed = values + sd * noise
    observed[..., 4:] = np.maximum(observed[..., 4:], 0.0)
    present = np.repeat(kept[..., None], len(names), axis=-1)
    present[..., 3] &= mandatory
    sounding, level, which = np.nonzero(present)
    order = np.lexsort((-pressure[sounding, level], site[sounding], when[sounding, level]))
    sounding, level, which = sounding[order], level[order], which[order]
    rows = (sounding, level, which)
    return observed_rows(
        {
            "time": when[sounding, level],
            "latitude": lat[sounding, level],
            "longitude": lon[sounding, level],
            "height": np.full(len(order), np.nan),
            "pressure": pressure[sounding, level],
            "value": observed[rows],
            "obs_error": sd[rows],
        },
        np.asarray(names, object)[which],
        site[sounding],
        values[rows],
        platforms,
    )


def place(placement: Placement, rngs: list[np.random.Generator], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Latitudes and longitudes [-180, 180) of platforms, each from its own stream around shared centres."""
    limit = np.sin(np.deg2rad(placement.max_latitude))
    shared = np.random.default_rng([seed, Stream.CLUSTERS])
    centre_lat = np.arcsin(shared.uniform(-limit, limit, placement.clusters))
    centre_lon = shared.uniform(-np.pi, np.pi, placement.clusters)
    lats, lons = np.empty(len(rngs)), np.empty(len(rngs))
    for index, rng in enumerate(rngs):
        while True:
            if placement.clusters == 0 or rng.random() < placement.isolated:
                lat, lon = np.arcsin(rng.uniform(-limit, limit)), rng.uniform(-np.pi, np.pi)
            else:
                which = rng.integers(placement.clusters)
                x, y = np.deg2rad(placement.radius) * rng.standard_normal(2)
                distance, bearing = np.hypot(x, y), np.arctan2(x, y)
                lat0 = centre_lat[which]
                sine = np.sin(lat0) * np.cos(distance) + np.cos(lat0) * np.sin(distance) * np.cos(bearing)
                lat = np.arcsin(np.clip(sine, -1.0, 1.0))
                east = np.sin(bearing) * np.sin(distance) * np.cos(lat0)
                lon = centre_lon[which] + np.arctan2(east, np.cos(distance) - np.sin(lat0) * sine)
            if abs(np.sin(lat)) <= limit:
                break
        lats[index] = np.rad2deg(lat)
        lons[index] = (np.rad2deg(lon) + 180.0) % 360.0 - 180.0
    return lats, lons


def is_sea(latitude: np.ndarray, longitude: np.ndarray, land_share: float) -> np.ndarray:
    """Where the nature run's `continentality` is at most `land_share`; the truth itself knows no sea."""
    return continentality(latitude, longitude) <= land_share


def check_errors(errors: tuple[ErrorModel, ...], known: tuple[str, ...]) -> None:
    wrong = [error.variable for error in errors if error.variable not in known]
    if wrong or not errors:
        raise InstrumentError(f"errors names {wrong or 'nothing'}; name at least one of {known} and no other")


def _silences(rng: np.random.Generator, steps: int, share: float, mean_steps: float) -> np.ndarray:
    """True where a station is silent: silences begin at random and last geometrically, and cover `share` of time.

    Overlapping silences are an M/G/infinity queue, busy for 1 - exp(-rate * mean length) of the time.
    """
    warm_up = int(np.ceil(10 * mean_steps))  # so that a silence may be under way at the first step
    silent = np.zeros(warm_up + steps, bool)
    rate = -np.log1p(-share) / mean_steps
    for begin in np.flatnonzero(rng.random(warm_up + steps) < rate):
        silent[begin : begin + int(rng.geometric(1.0 / mean_steps))] = True
    return silent[warm_up:]


def _candidates(
    truth: Truth,
    network: RadiosondeNetwork,
    nominal: np.ndarray,
    latitude: np.ndarray,
    longitude: np.ndarray,
    burst: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pressures [sounding, level], falling, NaN last where there is none; which are mandatory; which are the ground."""
    surface = query(truth, ["surface_pressure"], nominal, latitude, longitude)["surface_pressure"]
    # 1e-9: a level on the ground or on the highest centre must survive the rounding of exp(log(p))
    mandatory = np.broadcast_to(np.asarray(network.mandatory, float), (len(nominal), len(network.mandatory)))
    nodes = surface[:, None] * truth.sigma
    pressure = np.concatenate([surface[:, None], mandatory, nodes], axis=1)
    kind = np.repeat([2, 1, 0], [1, mandatory.shape[1], nodes.shape[1]])
    top = nodes[:, -1]
    last = np.exp(np.log(5e4) + burst * (np.log(top) - np.log(5e4)))
    pressure = np.where((pressure <= surface[:, None]) & (pressure >= last[:, None] * (1 - 1e-9)), pressure, np.nan)
    order = np.argsort(-pressure, axis=1, kind="stable")
    pressure, kinds = np.take_along_axis(pressure, order, axis=1), kind[order]
    return pressure, kinds == 1, kinds == 2


def _positions(
    truth: Truth,
    network: RadiosondeNetwork,
    nominal: np.ndarray,
    latitude: np.ndarray,
    longitude: np.ndarray,
    pressure: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Time, latitude and longitude of the balloon at its levels, each [sounding, level]."""
    shape = pressure.shape
    when = np.broadcast_to(nominal[:, None], shape).copy()
    lat, lon = (np.broadcast_to(x[:, None], shape).copy() for x in (latitude, longitude))
    if not network.drift:
        return when, lat, lon
    names = ("u_component_of_wind", "v_component_of_wind", "geopotential_height")
    below = None
    for level in range(shape[1]):
        if below is not None:
            when[:, level], lat[:, level], lon[:, level] = when[:, level - 1], lat[:, level - 1], lon[:, level - 1]
        # Wind and height are taken where the balloon was one level below: over one layer it moves far less than a grid
        # cell.
        clock = np.minimum(when[:, level], truth.end)
        here = query(truth, names, clock, lat[:, level], lon[:, level], pressure=pressure[:, level])
        if below is not None:
            rise = here["geopotential_height"] - below["geopotential_height"]
            seconds = np.where(np.isfinite(rise), np.maximum(rise, 0.0), 0.0) / network.ascent_rate
            east = 0.5 * np.nan_to_num(here[names[0]] + below[names[0]]) * seconds
            north = 0.5 * np.nan_to_num(here[names[1]] + below[names[1]]) * seconds
            when[:, level] += (seconds * 1e9).astype("timedelta64[ns]")
            lat[:, level], lon[:, level] = _move(lat[:, level], lon[:, level], east, north)
        below = here
    return when, lat, lon


def _move(
    latitude: np.ndarray, longitude: np.ndarray, east: np.ndarray, north: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Goes `east` and `north` metres along a great circle."""
    distance, bearing = np.hypot(east, north) / EARTH_RADIUS, np.arctan2(east, north)
    return destination(latitude, longitude, bearing, distance)


def _significant(
    exact: Mapping[str, np.ndarray],
    log_pressure: np.ndarray,
    inside: np.ndarray,
    kept: np.ndarray,
    network: RadiosondeNetwork,
) -> np.ndarray:
    """Adds to the kept levels [sounding, level], one round after another, the worst one beyond the thresholds."""
    levels = np.arange(inside.shape[1])
    last = np.where(inside, levels, -1).max(axis=1)
    kept = kept | (levels == last[:, None])  # a sounding ends with its highest point
    profiles = [exact[name] for name in ("temperature", "u_component_of_wind", "v_component_of_wind")]
    for _ in range(inside.shape[1]):
        before = np.maximum.accumulate(np.where(kept, levels, 0), axis=1)
        after = np.minimum.accumulate(np.where(kept, levels, levels[-1])[:, ::-1], axis=1)[:, ::-1]
        low, high = (np.take_along_axis(log_pressure, at, axis=1) for at in (before, after))
        width = np.where(high == low, 1.0, high - low)
        share = (log_pressure - low) / width
        gaps = []
        for profile in profiles:
            start = np.take_along_axis(profile, before, axis=1)
            line = start + share * (np.take_along_axis(profile, after, axis=1) - start)
            gaps.append(profile - line)
        excess = np.maximum(
            np.abs(gaps[0]) / network.significant_temperature, np.hypot(gaps[1], gaps[2]) / network.significant_wind
        )
        excess = np.where(inside & ~kept & np.isfinite(excess), excess, 0.0)
        worst = excess.argmax(axis=1)
        rows = np.flatnonzero(np.take_along_axis(excess, worst[:, None], axis=1)[:, 0] > 1.0)
        if not rows.size:
            break
        kept[rows, worst[rows]] = True
    return kept & inside


def platform_rows(
    prefix: str, sensor: str, latitude: np.ndarray, longitude: np.ndarray, height: np.ndarray
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "platform": [f"{prefix}{index:04d}" for index in range(len(latitude))],
            "sensor": sensor,
            "latitude": latitude,
            "longitude": longitude,
            "height": height,
        }
    )


def observed_rows(
    numbers: dict[str, np.ndarray], variable: np.ndarray, owner: np.ndarray, exact: np.ndarray, platforms: pd.DataFrame
) -> Observed:
    """Puts the parts into the canonical columns; `owner` [row] indexes `platforms`."""
    table = pd.DataFrame(
        {"channel": np.full(len(owner), -1), "view_angle": np.nan, "qc": np.zeros(len(owner), np.int8), **numbers}
    )
    table["variable"] = pd.Series(variable, dtype="str")
    table["sensor"] = pd.Series([platforms["sensor"].iloc[0]] * len(table), dtype="str")
    table["platform"] = pd.Series(platforms["platform"].to_numpy(object)[owner], dtype="str")
    return Observed(table.reindex(columns=list(COLUMNS)), pd.Series(exact, name="truth"), platforms)
