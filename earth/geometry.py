"""Positions on the sphere, solar geometry, the standard atmosphere and time, as pure functions of arrays.

Time is int32 seconds since 2000-01-01T00:00 UTC (`EPOCH`): exact from 1932 to 2068, where a float32 of hours would
round to minutes.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

Array: TypeAlias = jax.Array | np.ndarray
EPOCH = np.datetime64("2000-01-01T00:00:00", "s")
EARTH_RADIUS_KM = 6371.0
_YEAR_DAYS = 365.25
# Day of year of the epoch minus one is 0, and 2000 is a leap year, so `days since epoch` modulo 365.25 runs with the
# calendar to within a day.


def seconds(times: Any) -> Any:
    """datetime64 (UTC) -> int32 seconds since `EPOCH`.

    Raises:
      ValueError: for a time outside 1932-2068, which int32 cannot hold.
    """
    value = (np.asarray(times).astype("datetime64[s]") - EPOCH).astype(np.int64)
    outside = (value < -(2**31)) | (value >= 2**31)
    if outside.any():
        first = np.asarray(times).ravel()[outside.ravel().argmax()]
        raise ValueError(f"time {first} is outside 1932-2068; int32 seconds cannot hold it")
    return value.astype(np.int32)


def datetimes(time: Any) -> Any:
    """int32 seconds since `EPOCH` -> datetime64[ns], the inverse of `seconds`."""
    return (EPOCH + np.asarray(time).astype("timedelta64[s]")).astype("datetime64[ns]")


def unit_vector(
    latitude: Float[Array, "*#n"], longitude: Float[Array, "*#n"], *, xp: Any = jnp
) -> Float[Array, "*#n 3"]:
    """Degrees -> Cartesian unit vector (x to 0E, y to 90E, z to the north pole); `xp` as for `harmonics`."""
    lat, lon = xp.deg2rad(latitude), xp.deg2rad(longitude)
    return xp.stack([xp.cos(lat) * xp.cos(lon), xp.cos(lat) * xp.sin(lon), xp.sin(lat)], -1)


def harmonics(latitude: Any, longitude: Any, degree: int, *, xp: Any = jnp) -> Any:
    """Real spherical harmonics to `degree`: [..., K], K = (degree + 1)^2, degree by degree (`harmonic_degrees`),
    normalised to a mean square of 1 on the sphere.

    Args:
      latitude, longitude: degrees.
      xp: jax.numpy, or numpy for float64 on the host.
    """
    x, c = xp.sin(xp.deg2rad(latitude)), xp.cos(xp.deg2rad(latitude))
    lon = xp.deg2rad(longitude)
    legendre: dict[tuple[int, int], Any] = {(0, 0): xp.ones_like(x)}
    for m in range(1, degree + 1):  # stable recurrences of the fully normalised functions
        legendre[m, m] = (1.0 if m > 1 else 2**0.5) * ((2 * m + 1) / (2 * m)) ** 0.5 * c * legendre[m - 1, m - 1]
    for m in range(degree + 1):
        for n in range(m + 1, degree + 1):
            a = ((2 * n + 1) * (2 * n - 1) / ((n - m) * (n + m))) ** 0.5
            term = a * x * legendre[n - 1, m]
            if n > m + 1:
                b = ((2 * n + 1) * (n + m - 1) * (n - m - 1) / ((2 * n - 3) * (n - m) * (n + m))) ** 0.5
                term = term - b * legendre[n - 2, m]
            legendre[n, m] = term
    parts = []
    for n in range(degree + 1):
        parts.append(legendre[n, 0] + 0.0 * lon)
        for m in range(1, n + 1):
            parts += [legendre[n, m] * xp.cos(m * lon), legendre[n, m] * xp.sin(m * lon)]
    return xp.stack(parts, -1)


def harmonic_degrees(degree: int) -> np.ndarray:
    """[K] degree of each of `harmonics`."""
    return np.repeat(np.arange(degree + 1), 2 * np.arange(degree + 1) + 1)


def distance_km(
    lat_a: Float[Array, "*#n a"],
    lon_a: Float[Array, "*#n a"],
    lat_b: Float[Array, "*#n b"],
    lon_b: Float[Array, "*#n b"],
) -> Float[Array, "*#n a b"]:
    """Great-circle distance in km between every a and every b, by the haversine (accurate at small separations in
    float32).
    """
    lat_a, lon_a, lat_b, lon_b = (jnp.deg2rad(x) for x in (lat_a, lon_a, lat_b, lon_b))
    s_lat = jnp.sin((lat_a[..., :, None] - lat_b[..., None, :]) / 2) ** 2
    s_lon = jnp.sin((lon_a[..., :, None] - lon_b[..., None, :]) / 2) ** 2
    h = s_lat + jnp.cos(lat_a)[..., :, None] * jnp.cos(lat_b)[..., None, :] * s_lon
    return 2 * EARTH_RADIUS_KM * jnp.arcsin(jnp.sqrt(jnp.clip(h, 0.0, 1.0)))


def _angles(time: Int[Array, "*#n"]) -> tuple[Float[Array, "*#n"], Float[Array, "*#n"]]:
    """(annual angle, UTC hour angle) in radians. Days and seconds are split in integers first: float32 never sees the
    large number.
    """
    day = time // 86400
    hour = (time - day * 86400).astype(jnp.float32) / 3600.0
    # 1461 days are four years of 365.25: integer remainder keeps the annual phase exact, and day-of-year 1 of the epoch
    # is phase 1/365.25.
    annual = 2 * jnp.pi * (((day % 1461).astype(jnp.float32) + 1.0 + hour / 24.0) / _YEAR_DAYS)
    return annual, 2 * jnp.pi * hour / 24.0


def solar_cosine(
    time: Int[Array, "*#n"], latitude: Float[Array, "*#n"], longitude: Float[Array, "*#n"]
) -> Float[Array, "*#n"]:
    """Cosine of the solar zenith angle, negative at night; declination by a one-term series (0.4 degrees), no equation
    of time (16 min).
    """
    annual, utc = _angles(time)
    declination = 0.409 * jnp.sin(annual - 1.39)
    lat = jnp.deg2rad(latitude)
    hour_angle = utc + jnp.deg2rad(longitude) - jnp.pi
    return jnp.sin(lat) * jnp.sin(declination) + jnp.cos(lat) * jnp.cos(declination) * jnp.cos(hour_angle)


def seasonal_features(time: Int[Array, "*#n"], *, annual: int, daily: int) -> Float[Array, "*#n K"]:
    """Fourier features of season and UTC hour: (1, cos a, sin a, ...) outer (1, cos h, sin h, ...), K = (1 + 2
    annual)(1 + 2 daily).
    """

    def series(angle, order):
        terms = [jnp.ones_like(angle)]
        for k in range(1, order + 1):
            terms += [jnp.cos(k * angle), jnp.sin(k * angle)]
        return jnp.stack(terms, -1)

    a, h = _angles(time)
    outer = series(a, annual)[..., :, None] * series(h, daily)[..., None, :]
    return outer.reshape(*time.shape, (1 + 2 * annual) * (1 + 2 * daily))


def solar_angle(time: Int[Array, "*#n"], longitude: Float[Array, "*#n"]) -> Float[Array, "*#n"]:
    """Mean solar time as an angle in radians, 0 at midnight."""
    return _angles(time)[1] + jnp.deg2rad(longitude)


def clock_features(time: Int[Array, "*#n"], longitude: Float[Array, "*#n"]) -> Float[Array, "*#n 6"]:
    """Two harmonics of mean solar time and one of the year: what a network is told of the clock.

    Higher annual harmonics are left out on purpose: with under two years of record they let a network memorise dates
    (measured: validation error rises), and the climate normal already carries them.
    """
    annual, solar = _angles(time)[0], solar_angle(time, longitude)
    parts = [jnp.cos(solar), jnp.sin(solar), jnp.cos(2 * solar), jnp.sin(2 * solar), jnp.cos(annual), jnp.sin(annual)]
    return jnp.stack(parts, -1)


def standard_pressure_ratio(height: Float[Array, "*#n"]) -> Float[Array, "*#n"]:
    """Pressure at `height` m over pressure at sea level in the ICAO standard troposphere."""
    return jnp.clip(1.0 - 2.25577e-5 * height, 0.05, None) ** 5.25588


def standard_height(pressure: Any) -> np.ndarray:
    """Height in m of a pressure in Pa in the ICAO standard atmosphere: troposphere to 11 km, isothermal above. A
    coordinate, not a measurement.
    """
    ratio = np.clip(np.asarray(pressure, np.float64) / 101325.0, 1e-5, None)
    low = (1.0 - ratio ** (1 / 5.25588)) / 2.25577e-5
    high = 11000.0 - 6341.6 * np.log(ratio / 0.22336)
    return np.where(ratio > 0.22336, low, high)


def standard_pressure(height: Any) -> np.ndarray:
    """Pressure in Pa at a height in m of the ICAO standard atmosphere: the inverse of `standard_height`."""
    height = np.asarray(height, np.float64)
    low = (1.0 - 2.25577e-5 * np.minimum(height, 11000.0)) ** 5.25588
    return 101325.0 * np.where(height <= 11000.0, low, 0.22336 * np.exp((11000.0 - height) / 6341.6))
