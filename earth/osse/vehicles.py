"""Simulated platforms that move: aircraft between airports, ships that drift over the sea.

Every aircraft and ship draws from its own random stream, route included, so adding one changes no report of the others.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from earth.geometry import standard_height, standard_pressure
from earth.osse.instruments import (
    ErrorModel,
    InstrumentError,
    Observed,
    Placement,
    Stream,
    check_errors,
    is_sea,
    observed_rows,
    place,
    platform_rows,
)
from earth.osse.orbits import EARTH_RADIUS, destination, great_circle
from earth.osse.truth import SURFACE_VARIABLES, UPPER_VARIABLES, Truth, query

_TURNS = np.deg2rad([0.0, 45.0, -45.0, 90.0, -90.0, 135.0, -135.0, 180.0])  # tried in this order at a coast


@dataclasses.dataclass(frozen=True)
class AircraftFleet:
    """Aircraft that fly along great circles from airport to airport and report on the way.

    As real ones, they fly on pressure: heights here are pressure altitudes in the ICAO standard atmosphere, and what a
    row has as `height` is that of its exact `pressure`, not where the aircraft truly is. The wind does not change the
    speed over the ground (ours).

    Attributes:
      count: number of aircraft.
      airports: number of airports.
      placement: where the airports are.
      interval_minutes: whole minutes between reports, on a clock of each aircraft's own.
      cruise: lowest and highest cruising height, m; each flight draws its own.
      speed: over the ground, m/s.
      climb_rate: up and down, m/s; a short flight never reaches its cruising height.
      ranges: shortest and longest leg, m.
      ground_hours: hours between landing and the next departure.
      errors: what is measured and how well.
      prefix: first letters of the platform names.
    """

    count: int = 40
    airports: int = 40
    placement: Placement = dataclasses.field(default_factory=Placement)
    interval_minutes: int = 15
    cruise: tuple[float, float] = (9000.0, 12000.0)
    speed: float = 230.0
    climb_rate: float = 7.5
    ranges: tuple[float, float] = (500e3, 9000e3)
    ground_hours: float = 1.5
    errors: tuple[ErrorModel, ...] = (
        ErrorModel("temperature", 1.0, 0.5),
        ErrorModel("u_component_of_wind", 2.0, 0.3),
        ErrorModel("v_component_of_wind", 2.0, 0.3),
    )
    prefix: str = "AC"

    def __post_init__(self):
        if self.count < 1 or self.airports < 2 or self.interval_minutes < 1:
            raise InstrumentError(
                f"count={self.count} and interval_minutes={self.interval_minutes} must be at least 1, "
                f"airports={self.airports} at least 2"
            )
        if not 0 < self.cruise[0] <= self.cruise[1] <= 14000:
            raise InstrumentError(f"cruise={self.cruise} must ascend within (0, 14000] m")
        if not 0 < self.ranges[0] < self.ranges[1]:
            raise InstrumentError(f"ranges={self.ranges} must be positive and ascend, in m")
        if not (self.speed > 0 and self.climb_rate > 0 and self.ground_hours >= 0):
            raise InstrumentError(
                f"speed={self.speed} and climb_rate={self.climb_rate} must be positive, "
                f"ground_hours={self.ground_hours} not negative"
            )
        check_errors(self.errors, UPPER_VARIABLES)


@dataclasses.dataclass(frozen=True)
class DriftingShips:
    """Ships that wander over the sea and report the air of the lowest level and the surface pressure.

    A ship keeps its speed, and its course up to a random turn after each report; where the next position would be land
    or too near a pole it turns away by the least multiple of 45 degrees that helps, or waits.

    Attributes:
      count: number of ships.
      cadence_hours: hours between reports, from the start of the truth.
      speeds: slowest and fastest ship, m/s.
      turn: standard deviation of the turn between reports, degrees.
      max_latitude: degrees.
      land_share: largest `continentality` that counts as sea.
      errors: what is measured and how well.
      prefix: first letters of the platform names.
    """

    count: int = 40
    cadence_hours: int = 3
    speeds: tuple[float, float] = (1.0, 8.0)
    turn: float = 15.0
    max_latitude: float = 70.0
    land_share: float = 0.5
    errors: tuple[ErrorModel, ...] = (
        ErrorModel("lowest_level_temperature", 0.8, 0.5),
        ErrorModel("surface_pressure", 80.0, 50.0),
        ErrorModel("lowest_level_u_component_of_wind", 1.5, 0.5),
        ErrorModel("lowest_level_v_component_of_wind", 1.5, 0.5),
    )
    prefix: str = "SH"

    def __post_init__(self):
        if self.count < 1 or self.cadence_hours < 1:
            raise InstrumentError(f"count={self.count} and cadence_hours={self.cadence_hours} must be at least 1")
        if not 0 <= self.speeds[0] <= self.speeds[1] <= 20:
            raise InstrumentError(f"speeds={self.speeds} must ascend within [0, 20] m/s")
        if not (self.turn >= 0 and 0 < self.max_latitude < 90 and 0 < self.land_share <= 1):
            raise InstrumentError(
                f"turn={self.turn} must not be negative, max_latitude={self.max_latitude} lie in (0, 90), "
                f"land_share={self.land_share} in (0, 1]"
            )
        check_errors(self.errors, SURFACE_VARIABLES)


def observe_aircraft(truth: Truth, fleet: AircraftFleet, seed: int) -> Observed:
    """Simulates the reports of a fleet over the whole truth; reports under the model's mountains are not made.

    Raises:
      InstrumentError: an airport from which no other is within `ranges`.
    """
    rngs = [np.random.default_rng([seed, Stream.AIRPORTS, index]) for index in range(fleet.airports)]
    latitude, longitude = place(fleet.placement, rngs, seed)
    rngs = [np.random.default_rng([seed, Stream.AIRCRAFT, index]) for index in range(fleet.count)]
    names = [error.variable for error in fleet.errors]
    bias = np.stack([rng.standard_normal(len(names)) for rng in rngs]) * [error.bias for error in fleet.errors]
    noise = np.array([error.noise for error in fleet.errors])

    _, arcs = great_circle(latitude[:, None], longitude[:, None], latitude, longitude)
    reachable = (arcs * EARTH_RADIUS >= fleet.ranges[0]) & (arcs * EARTH_RADIUS <= fleet.ranges[1])
    lonely = np.flatnonzero(~reachable.any(axis=1))
    if lonely.size:
        raise InstrumentError(
            f"airport {lonely[0]} at {latitude[lonely[0]]:.1f}N {longitude[lonely[0]]:.1f}E has no other within "
            f"ranges={fleet.ranges} m; widen them or add airports"
        )
    home, owner, seconds, lat, lon, height = _routes(truth, fleet, rngs, latitude, longitude, arcs, reachable)
    pressure = standard_pressure(height)
    when = truth.start + seconds.astype("timedelta64[s]")
    exact = query(truth, names, when, lat, lon, pressure=pressure)
    values = np.stack([exact[name] for name in names], axis=-1)
    error = np.empty_like(values)
    for index, rng in enumerate(rngs):  # each aircraft's stream goes on where its flights ended
        own = owner == index
        error[own] = bias[index] + noise * rng.standard_normal((int(own.sum()), len(names)))

    ground = query(truth, ["surface_altitude"], truth.start, latitude[home], longitude[home])["surface_altitude"]
    platforms = platform_rows(fleet.prefix, "aircraft", latitude[home], longitude[home], ground)
    for column, name in enumerate(names):
        platforms[f"bias_{name}"] = bias[:, column]
    row, which = np.nonzero(np.isfinite(values))
    return observed_rows(
        {
            "time": when[row],
            "latitude": lat[row],
            "longitude": lon[row],
            "height": height[row],
            "pressure": pressure[row],
            "value": (values + error)[row, which],
            "obs_error": noise[which],
        },
        np.asarray(names, object)[which],
        owner[row],
        values[row, which],
        platforms,
    )


def observe_ships(truth: Truth, ships: DriftingShips, seed: int) -> Observed:
    """Simulates the reports of ships over the whole truth; the first n of more ships are those of fewer."""
    rngs = [np.random.default_rng([seed, Stream.SHIPS, index]) for index in range(ships.count)]
    names = [error.variable for error in ships.errors]
    noise = np.array([error.noise for error in ships.errors])
    bias_sd = np.array([error.bias for error in ships.errors])
    step = np.timedelta64(ships.cadence_hours, "h").astype("timedelta64[ns]")
    times = np.arange(truth.start, truth.end + np.timedelta64(1, "ns"), step)

    bias, error, start, course, speed = [], [], [], [], []
    for rng in rngs:
        bias.append(bias_sd * rng.standard_normal(len(names)))
        start.append(_at_sea(ships, rng))
        speed.append(rng.uniform(*ships.speeds))
        turns = np.deg2rad(ships.turn) * rng.standard_normal(len(times))
        course.append(rng.uniform(-np.pi, np.pi) + np.cumsum(turns))
        error.append(bias[-1] + noise * rng.standard_normal((len(times), len(names))))
    latitude, longitude = _drift(ships, np.array(start), np.array(course), np.array(speed))  # [ship, time]
    exact = query(truth, [*names, "surface_altitude"], times, latitude, longitude)
    values = np.stack([exact[name] for name in names], axis=-1)

    platforms = platform_rows(ships.prefix, "ship", latitude[:, 0], longitude[:, 0], exact["surface_altitude"][:, 0])
    for column, name in enumerate(names):
        platforms[f"bias_{name}"] = np.array(bias)[:, column]
    when, ship, which = (part.ravel() for part in np.indices((len(times), ships.count, len(names))))
    return observed_rows(
        {
            "time": times[when],
            "latitude": latitude[ship, when],
            "longitude": longitude[ship, when],
            "height": exact["surface_altitude"][ship, when],
            "pressure": np.full(len(when), np.nan),
            "value": (values + np.array(error))[ship, when, which],
            "obs_error": noise[which],
        },
        np.asarray(names, object)[which],
        ship,
        values[ship, when, which],
        platforms,
    )


def _routes(
    truth: Truth,
    fleet: AircraftFleet,
    rngs: list[np.random.Generator],
    latitude: np.ndarray,
    longitude: np.ndarray,
    arcs: np.ndarray,
    reachable: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """First airport of each aircraft; then of each report, sorted by time: aircraft, seconds from the start of the
    truth, latitude, longitude, pressure altitude.
    """
    length = (truth.end - truth.start) / np.timedelta64(1, "s")
    legs, reports, home = [], [], []
    for index, rng in enumerate(rngs):
        own = _legs(fleet, rng, arcs, reachable, length)
        home.append(own[0, 0])
        seconds = np.arange(rng.integers(fleet.interval_minutes * 60), length + 1, fleet.interval_minutes * 60)
        leg = np.searchsorted(own[:, 2], seconds, side="right") - 1
        airborne = (leg >= 0) & (seconds <= own[leg, 3])
        reports.append(
            np.stack([seconds[airborne], leg[airborne] + sum(map(len, legs)), np.full(airborne.sum(), index)])
        )
        legs.append(own)
    origin, target, departure, arrival, cruise = np.concatenate(legs).T
    origin, target = origin.astype(int), target.astype(int)
    seconds, leg, owner = np.concatenate(reports, axis=1)
    order = np.lexsort((owner, seconds))
    seconds, leg, owner = seconds[order], leg[order].astype(int), owner[order].astype(int)

    bearing, arc = great_circle(latitude[origin], longitude[origin], latitude[target], longitude[target])
    below, above = (
        _runway(truth, t, latitude[at], longitude[at]) for t, at in ((departure, origin), (arrival, target))
    )
    flown, left = seconds - departure[leg], arrival[leg] - seconds
    climbing, descending = (z[leg] + fleet.climb_rate * t for z, t in ((below, flown), (above, left)))
    height = np.minimum(np.minimum(climbing, descending), np.maximum(cruise, np.maximum(below, above))[leg])
    share = flown / (arrival - departure)[leg]
    lat, lon = destination(latitude[origin[leg]], longitude[origin[leg]], bearing[leg], arc[leg] * share)
    return np.asarray(home, int), owner, seconds, lat, lon, height


def _legs(
    fleet: AircraftFleet, rng: np.random.Generator, arcs: np.ndarray, reachable: np.ndarray, length: float
) -> np.ndarray:
    """Flights [leg, 5] of one aircraft until `length` s: origin, target, departure, arrival in s, cruising height.

    The first one is under way at 0, so that a run does not begin with every aircraft on the ground.
    """
    legs: list[tuple[float, ...]] = []
    at, clock = int(rng.integers(fleet.airports)), 0.0
    while not legs or clock <= length:
        target = int(rng.choice(np.flatnonzero(reachable[at])))
        seconds = arcs[at, target] * EARTH_RADIUS / fleet.speed
        if not legs:
            clock = -seconds * rng.random()
        legs.append((at, target, clock, clock + seconds, rng.uniform(*fleet.cruise)))
        at, clock = target, clock + seconds + fleet.ground_hours * 3600
    return np.array(legs)


def _runway(truth: Truth, seconds: np.ndarray, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Pressure altitudes of airports at times in s, or at the nearest end of the truth."""
    length = (truth.end - truth.start) / np.timedelta64(1, "s")
    when = truth.start + np.clip(seconds, 0, length).astype("timedelta64[s]")
    return standard_height(query(truth, ["surface_pressure"], when, latitude, longitude)["surface_pressure"])


def _at_sea(ships: DriftingShips, rng: np.random.Generator) -> tuple[float, float]:
    """A point at sea, evenly over the sea between the latitude limits."""
    limit = np.sin(np.deg2rad(ships.max_latitude))
    while True:
        latitude, longitude = np.rad2deg(np.arcsin(rng.uniform(-limit, limit, 1))), rng.uniform(-180.0, 180.0, 1)
        if is_sea(latitude, longitude, ships.land_share).all():
            return float(latitude[0]), float(longitude[0])


def _drift(
    ships: DriftingShips, start: np.ndarray, course: np.ndarray, speed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions [ship, time] from starts [ship, 2], courses [ship, time] in radians before the coasts, and speeds."""
    latitude, longitude = np.empty(course.shape), np.empty(course.shape)
    latitude[:, 0], longitude[:, 0] = start.T
    arc = (speed * ships.cadence_hours * 3600 / EARTH_RADIUS)[:, None]
    turned = np.zeros(len(start))
    rows = np.arange(len(start))
    for step in range(1, course.shape[1]):
        lat0, lon0 = latitude[:, step - 1], longitude[:, step - 1]
        tried = (course[:, step - 1] + turned)[:, None] + _TURNS
        lat, lon = destination(lat0[:, None], lon0[:, None], tried, arc)
        free = is_sea(lat, lon, ships.land_share) & (np.abs(lat) <= ships.max_latitude)
        first = free.argmax(axis=1)
        stuck = ~free.any(axis=1)
        latitude[:, step] = np.where(stuck, lat0, lat[rows, first])
        longitude[:, step] = np.where(stuck, lon0, lon[rows, first])
        turned = turned + _TURNS[first]
    return latitude, longitude
