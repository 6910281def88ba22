"""Interpolation from stations to points: nearest, inverse distance, inverse distance of the residuals about a fitted
lapse rate.

Definitions (the project's data notes, section 2b): weights 1/d^2 with d the great-circle distance in km, at least 1 km;
"lapse" fits ``value = a + b height`` by least squares over the reporting stations of each hour, interpolates the
residuals and adds ``a + b height`` of the point. Missing stations are left out hour by hour. Where the lapse rate is
not defined (fewer than three reporting stations with a height, no spread of height, a point without height) the plain
inverse distance takes over (ours).
"""

from __future__ import annotations

import numpy as np

from earth.observations import great_circle_km

METHODS = ("nearest", "idw", "lapse_idw")


def distances(
    latitude: np.ndarray, longitude: np.ndarray, to_latitude: np.ndarray, to_longitude: np.ndarray
) -> np.ndarray:
    """Great-circle distances in km [P, S] from points `to` [P] to stations [S]."""
    to_latitude, to_longitude = np.atleast_1d(to_latitude), np.atleast_1d(to_longitude)
    return great_circle_km(
        to_latitude[:, None], to_longitude[:, None], np.asarray(latitude)[None], np.asarray(longitude)[None]
    )


def interpolate(
    values: np.ndarray,
    latitude: np.ndarray,
    longitude: np.ndarray,
    height: np.ndarray,
    to_latitude: np.ndarray,
    to_longitude: np.ndarray,
    to_height: np.ndarray,
    *,
    method: str = "lapse_idw",
    power: int | float = 2.0,
    minimum_km: int | float = 1.0,
) -> np.ndarray:
    """Values of stations at points.

    Args:
      values: float [..., S], NaN = missing; every leading index is interpolated on its own.
      latitude, longitude, height: stations [S]; metres, NaN = unknown.
      to_latitude, to_longitude, to_height: points [P].
      method: "nearest" (the nearest reporting station), "idw", or "lapse_idw".
      power: exponent of the distance.
      minimum_km: smaller distances count as this.

    Returns:
      float64 [..., P]; NaN where no station reports.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; use one of {', '.join(METHODS)}")
    rows = np.asarray(values, np.float64).reshape(-1, np.shape(values)[-1])
    shape = (*np.shape(values)[:-1], len(np.atleast_1d(to_latitude)))
    distance = distances(latitude, longitude, to_latitude, to_longitude)  # [P, S]
    valid = np.isfinite(rows)
    if method == "nearest":
        return _nearest(rows, valid, distance).reshape(shape)
    weights = np.maximum(distance, minimum_km).T ** -power  # [S, P]
    plain = _weighted(rows, valid, weights)
    if method == "idw":
        return plain.reshape(shape)
    z, to_z = np.asarray(height, np.float64), np.atleast_1d(np.asarray(to_height, np.float64))
    use = valid & np.isfinite(z)
    count = use.sum(1)
    z0, y = np.where(np.isfinite(z), z, 0.0), np.where(use, rows, 0.0)
    divisor = np.maximum(count, 1)
    z_mean, y_mean = (use @ z0) / divisor, y.sum(1) / divisor
    dz = np.where(use, z0 - z_mean[:, None], 0.0)
    spread = np.square(dz).sum(1)
    defined = (count >= 3) & (spread > 1.0)  # one square metre: heights that all agree define no slope
    slope = np.where(defined, (dz * y).sum(1) / np.where(defined, spread, 1.0), 0.0)
    residual = np.where(use, rows - y_mean[:, None] - slope[:, None] * dz, np.nan)
    fitted = _weighted(residual, use, weights) + y_mean[:, None] + slope[:, None] * (to_z[None] - z_mean[:, None])
    return np.where(defined[:, None] & np.isfinite(to_z)[None], fitted, plain).reshape(shape)


def _weighted(rows: np.ndarray, valid: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = valid.astype(np.float64) @ weights
    return np.where(total > 0, (np.where(valid, rows, 0.0) @ weights) / np.where(total > 0, total, 1.0), np.nan)


def _nearest(rows: np.ndarray, valid: np.ndarray, distance: np.ndarray) -> np.ndarray:
    out = np.full((len(rows), len(distance)), np.nan)
    for p, order in enumerate(np.argsort(distance, axis=1, kind="stable")):
        first = valid[:, order].argmax(1)
        found = valid[np.arange(len(rows)), order[first]]
        out[found, p] = rows[found, order[first[found]]]
    return out
