"""Where satellites are and what they look at: circular orbits, scans across the track, a geostationary disc.

The Earth is a sphere of the nature run's radius; its oblateness enters only as the precession of orbital planes (J2),
which is what keeps an orbit's local time. No drag, no eccentricity, no yaw steering. Angles are in degrees, distances
in m, `arc` is the angle at the Earth's centre between a ground point and the point below the satellite.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from earth.osse.nature import OsseError

EARTH_RADIUS = 6.37122e6  # m, dinosaur's
_GM = 3.986004418e14  # m3 s-2, WGS 84
_J2, _EQUATOR = 1.08262668e-3, 6.378137e6  # EGM96, WGS 84
_SIDEREAL_RATE = 7.292115e-5  # rad s-1, WGS 84
_SUN_RATE = 2 * np.pi / (365.2422 * 86400)  # rad s-1, mean motion of the sun
GEOSTATIONARY_ALTITUDE = float((_GM / _SIDEREAL_RATE**2) ** (1 / 3)) - EARTH_RADIUS

Angles = np.ndarray | np.floating | float  # arguments of one function are broadcast together


class OrbitError(OsseError):
    """An orbit or a scan that does not exist."""


@dataclasses.dataclass(frozen=True)
class Orbit:
    """A circular orbit.

    Attributes:
      altitude: m above the sphere.
      inclination: degrees; None for the sun-synchronous one.
      local_time: mean solar time at the ascending node at `epoch`, hours (a sun-synchronous orbit keeps it).
      phase: degrees along the orbit from the ascending node at `epoch`.
      epoch: UTC.
    """

    altitude: float = 833e3
    inclination: float | None = None
    local_time: float = 21.5
    phase: float = 0.0
    epoch: str = "2000-01-01T00:00"

    def __post_init__(self):
        if not 150e3 <= self.altitude <= 5000e3:
            raise OrbitError(f"altitude={self.altitude} m is not that of a low orbit, 150e3 to 5000e3")
        if self.inclination is not None and not 0 <= self.inclination <= 180:
            raise OrbitError(f"inclination={self.inclination} must lie in [0, 180] degrees; None is sun-synchronous")
        if not 0 <= self.local_time < 24:
            raise OrbitError(f"local_time={self.local_time} must lie in [0, 24) hours")
        try:
            np.datetime64(self.epoch, "ns")
        except ValueError as error:
            raise OrbitError(f"epoch={self.epoch!r} is no ISO 8601 time without a zone") from error

    @property
    def tilt(self) -> float:
        """Inclination in degrees, whichever way the orbit was given."""
        return sun_synchronous_inclination(self.altitude) if self.inclination is None else self.inclination

    @property
    def period(self) -> float:
        """Seconds of one revolution (Kepler)."""
        return 2 * np.pi / _mean_motion(self.altitude)

    @property
    def node_rate(self) -> float:
        """Precession of the ascending node, rad s-1, positive eastward: -3/2 n J2 (a_e / r)^2 cos i."""
        return -_oblate_rate(self.altitude) * np.cos(np.deg2rad(self.tilt))


class Look(NamedTuple):
    """Where lines of sight meet the ground, each of the broadcast shape: degrees; `zenith` is the satellite's zenith
    angle there, `azimuth` its bearing clockwise from north.
    """

    latitude: np.ndarray
    longitude: np.ndarray
    zenith: np.ndarray
    azimuth: np.ndarray


def sun_synchronous_inclination(altitude: float) -> float:
    """Inclination in degrees at which the node precesses once a year with the mean sun.

    Raises:
      OrbitError: too high for any.
    """
    cosine = -_SUN_RATE / _oblate_rate(altitude)
    if cosine < -1:
        raise OrbitError(f"no orbit of altitude={altitude} m is sun-synchronous; stay below 5980e3 or give inclination")
    return float(np.rad2deg(np.arccos(cosine)))


def ground_track(orbit: Orbit, time: np.ndarray | np.datetime64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latitude, longitude [-180, 180) and heading of the point below the satellite at UTC times (datetime64).

    The heading is that of the inertial velocity, clockwise from north: an instrument without yaw steering scans across
    it, not across the track on the turning ground, which is up to 4 degrees off.
    """
    epoch = np.datetime64(orbit.epoch, "ns")
    seconds = (np.asarray(time, "datetime64[ns]") - epoch) / np.timedelta64(1, "s")
    along = np.deg2rad(orbit.phase) + _mean_motion(orbit.altitude) * seconds
    tilt = np.deg2rad(orbit.tilt)
    clock = (epoch - epoch.astype("datetime64[D]")) / np.timedelta64(1, "h")
    node = np.deg2rad(15.0 * (orbit.local_time - clock)) + (orbit.node_rate - _SIDEREAL_RATE) * seconds
    latitude = np.arcsin(np.sin(tilt) * np.sin(along))
    longitude = node + np.arctan2(np.cos(tilt) * np.sin(along), np.cos(along))
    heading = np.arctan2(np.cos(tilt), np.sin(tilt) * np.cos(along))
    return np.asarray(np.rad2deg(latitude)), wrap(np.rad2deg(longitude)), np.asarray(np.rad2deg(heading))


def scan(orbit: Orbit, time: np.ndarray | np.datetime64, angle: Angles) -> Look:
    """Ground points of a scan across the track; `time` and `angle` are broadcast together.

    Args:
      time: UTC, datetime64.
      angle: scan angle from nadir in degrees, positive to the right of the flight.

    Raises:
      OrbitError: an angle that misses the Earth.
    """
    latitude, longitude, heading = ground_track(orbit, time)
    return _look(orbit.altitude, latitude, longitude, heading + 90.0, angle)


def disc(longitude: float, angle: Angles, direction: Angles) -> Look:
    """Ground points of a geostationary satellite's lines of sight.

    Args:
      longitude: of the satellite, degrees east.
      angle: from nadir, degrees.
      direction: of the line of sight's trace on the ground, clockwise from north, degrees.

    Raises:
      OrbitError: an angle that misses the Earth.
    """
    return _look(GEOSTATIONARY_ALTITUDE, np.zeros(()), np.asarray(longitude), direction, angle)


def disc_view(longitude: float, latitude: Angles, east: Angles) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `disc`: angle from nadir at a geostationary satellite at `longitude`, and its zenith angle, for
    ground points (latitude, east). A zenith angle above 90 is below the horizon.
    """
    cosine = np.cos(np.deg2rad(latitude)) * np.cos(np.deg2rad(np.asarray(east) - longitude))
    return view_angles(GEOSTATIONARY_ALTITUDE, np.rad2deg(np.arccos(np.clip(cosine, -1.0, 1.0))))


def ground_arc(altitude: float, angle: Angles) -> tuple[np.ndarray, np.ndarray]:
    """Arc to, and zenith angle at, the ground seen under an angle from nadir, with its sign.

    Law of sines in the triangle of the Earth's centre, the ground and the satellite: sin(zenith) = (r / R) sin(angle),
    arc = zenith - angle.

    Raises:
      OrbitError: an angle that misses the Earth.
    """
    sine = (EARTH_RADIUS + altitude) / EARTH_RADIUS * np.sin(np.deg2rad(angle))
    if np.any(np.abs(sine) > 1) or np.any(np.abs(angle) > 90):
        limit = np.rad2deg(np.arcsin(EARTH_RADIUS / (EARTH_RADIUS + altitude)))
        raise OrbitError(
            f"angle {np.max(np.abs(angle)):g} misses the Earth from {altitude:g} m; stay within {limit:.2f} degrees"
        )
    zenith = np.asarray(np.rad2deg(np.arcsin(sine)))
    return np.asarray(zenith - angle), zenith


def view_angles(altitude: float, arc: Angles) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `ground_arc`: angle from nadir and zenith angle for a signed arc within [-180, 180]."""
    turn = np.deg2rad(arc)
    angle = np.rad2deg(np.arctan2(EARTH_RADIUS * np.sin(turn), EARTH_RADIUS + altitude - EARTH_RADIUS * np.cos(turn)))
    return np.asarray(angle), np.asarray(angle + arc)


def destination(latitude: Angles, longitude: Angles, bearing: Angles, arc: Angles) -> tuple[np.ndarray, np.ndarray]:
    """Goes along a great circle: latitude and longitude [-180, 180) in degrees, for `bearing` clockwise from north and
    `arc`, both in radians.
    """
    lat0 = np.deg2rad(latitude)
    sine = np.sin(lat0) * np.cos(arc) + np.cos(lat0) * np.sin(arc) * np.cos(bearing)
    sine = np.clip(sine, -1.0, 1.0)
    turn = np.arctan2(np.sin(bearing) * np.sin(arc) * np.cos(lat0), np.cos(arc) - np.sin(lat0) * sine)
    return np.asarray(np.rad2deg(np.arcsin(sine))), wrap(longitude + np.rad2deg(turn))


def great_circle(
    latitude: Angles, longitude: Angles, to_latitude: Angles, to_longitude: Angles
) -> tuple[np.ndarray, np.ndarray]:
    """Bearing at the first point and arc to the second, radians; the inverse of `destination`."""
    lat0, lat1 = np.deg2rad(latitude), np.deg2rad(to_latitude)
    east = np.deg2rad(np.asarray(to_longitude) - longitude)
    side = np.cos(lat1) * np.sin(east)
    ahead = np.cos(lat0) * np.sin(lat1) - np.sin(lat0) * np.cos(lat1) * np.cos(east)
    cosine = np.sin(lat0) * np.sin(lat1) + np.cos(lat0) * np.cos(lat1) * np.cos(east)
    return np.asarray(np.arctan2(side, ahead)), np.asarray(np.arctan2(np.hypot(side, ahead), cosine))


def wrap(longitude: Angles) -> np.ndarray:
    """Degrees east in [-180, 180)."""
    return np.asarray((longitude + 180.0) % 360.0 - 180.0)


def _mean_motion(altitude: float) -> float:
    return float(np.sqrt(_GM / (EARTH_RADIUS + altitude) ** 3))


def _oblate_rate(altitude: float) -> float:
    return 1.5 * _mean_motion(altitude) * _J2 * (_EQUATOR / (EARTH_RADIUS + altitude)) ** 2


def _look(altitude: float, latitude: np.ndarray, longitude: np.ndarray, bearing: Angles, angle: Angles) -> Look:
    arc, zenith = ground_arc(altitude, angle)
    where = destination(latitude, longitude, np.deg2rad(bearing), np.deg2rad(arc))
    back, _ = great_circle(*where, latitude, longitude)
    return Look(*np.broadcast_arrays(*where, np.abs(zenith), np.rad2deg(back) % 360.0))
