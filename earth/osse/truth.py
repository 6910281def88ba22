"""The truth of an OSSE at any point: a nature run interpolated to (latitude, longitude, height or pressure, time).

The truth *is* the interpolant defined here (ours), not the spectral model between its grid points and kept times:
- linear in time, bilinear in latitude and longitude, on the sigma levels; pressure as ln(surface pressure), so that
  over mountains an isothermal atmosphere stays hydrostatic between grid points; longitude is periodic;
- between the last Gaussian latitude and a pole, towards the mean of the ring for scalars and towards its mean vector
  for the wind (a wind across the pole is one vector, whose u and v turn with longitude);
- in the vertical, linear in ln(sigma) between layer centres. Between the lowest centre and the ground temperature is
  extrapolated along the same line as between the two lowest centres, wind and humidity are constant. Above the highest
  centre, and under the ground, there is no truth: NaN;
- heights are geopotential heights (geopotential / 9.80616 m s-2) from the hydrostatic integral of that piecewise linear
  temperature, exact in closed form, both ways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from earth.osse.nature import GAS_CONSTANT, GRAVITY, OsseError

Times = np.ndarray | np.datetime64 | pd.Series | pd.Timestamp
Numbers = np.ndarray | np.floating | pd.Series | float | int

SURFACE_VARIABLES = (
    "surface_pressure",
    "surface_altitude",
    "lowest_level_temperature",
    "lowest_level_u_component_of_wind",
    "lowest_level_v_component_of_wind",
)
UPPER_VARIABLES = (
    "temperature",
    "u_component_of_wind",
    "v_component_of_wind",
    "geopotential_height",
    "pressure",
    "specific_humidity",
)

_CHUNK = 32_768  # points interpolated at once: bounds the temporaries to some 50 MB
_COLUMN = ("temperature", "u_component_of_wind", "v_component_of_wind", "specific_humidity")  # the last where carried


class TruthQueryError(OsseError):
    """A query outside the truth's range of time or latitude, or badly formed."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """A nature run laid out for point queries; made by `truth_from_dataset`.

    Attributes:
      times: kept times, datetime64[ns] [T], regular.
      latitude: degrees north, ascending, with both poles added [J].
      longitude: degrees east, regular from 0, with 360 added [I].
      sigma: layer centres from the ground up (descending) [L].
      columns: float32 [T, J, I, L] of each of temperature, u_component_of_wind, v_component_of_wind and, where the
        nature run carries it, specific_humidity, SI.
      log_pressure: ln(surface pressure / Pa), float64 [T, J, I].
      surface_altitude: m, float64 [J, I].
      attrs: the nature run's attributes.
    """

    times: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray
    sigma: np.ndarray
    columns: dict[str, np.ndarray]
    log_pressure: np.ndarray
    surface_altitude: np.ndarray
    attrs: dict[str, object]

    @property
    def start(self) -> np.datetime64:
        return self.times[0]

    @property
    def end(self) -> np.datetime64:
        """Last time that can be queried."""
        return self.times[-1]


def truth_from_dataset(dataset: xr.Dataset) -> Truth:
    """Lays a nature run of `earth.osse.nature` (or any Dataset of the same variables and dims) out for `query`.

    Raises:
      TruthQueryError: axes that are not as `nature_run` describes them.
    """
    latitude, longitude = dataset.latitude.values.astype(float), dataset.longitude.values.astype(float)
    steps = np.diff(longitude)
    regular = longitude[0] == 0 and np.allclose(steps, 360 / len(longitude), atol=1e-6)
    if not regular or np.any(np.diff(latitude) <= 0) or abs(latitude).max() >= 90:
        raise TruthQueryError(
            "a nature run needs ascending latitudes without poles and regular longitudes from 0 to 360"
        )
    if len(dataset.time) > 1 and len(np.unique(np.diff(dataset.time.values))) > 1:
        raise TruthQueryError("a nature run needs regular times; sort it and fill its gaps")
    order = np.argsort(dataset.sigma.values)[::-1]
    columns = {
        name: dataset[name].transpose("time", "latitude", "longitude", "sigma").values[..., order].astype(np.float32)
        for name in _COLUMN
        if name in dataset
    }
    u, v = _wind_poles(columns["u_component_of_wind"], columns["v_component_of_wind"], np.deg2rad(longitude))
    winds = {"u_component_of_wind": u, "v_component_of_wind": v}
    columns = {name: winds[name] if name in winds else _scalar_poles(x, 1) for name, x in columns.items()}
    pressure = np.log(dataset.surface_pressure.transpose("time", "latitude", "longitude").values.astype(float))
    altitude = dataset.surface_altitude.transpose("latitude", "longitude").values.astype(float)
    return Truth(
        times=dataset.time.values.astype("datetime64[ns]"),
        latitude=np.concatenate([[-90.0], latitude, [90.0]]),
        longitude=np.concatenate([longitude, [360.0]]),
        sigma=dataset.sigma.values[order].astype(float),
        columns={name: _wrap(values, 2) for name, values in columns.items()},
        log_pressure=_wrap(_scalar_poles(pressure, 1), 2),
        surface_altitude=_wrap(_scalar_poles(altitude, 0), 1),
        attrs=dict(dataset.attrs),
    )


def query(
    truth: Truth,
    variables: Sequence[str],
    time: Times,
    latitude: Numbers,
    longitude: Numbers,
    *,
    height: Numbers | None = None,
    pressure: Numbers | None = None,
) -> dict[str, np.ndarray]:
    """The truth at points.

    Args:
      truth: see `truth_from_dataset`.
      variables: any of `SURFACE_VARIABLES` and `UPPER_VARIABLES`. An upper one needs `height` or `pressure`.
      time: datetime64 UTC, within [truth.start, truth.end].
      latitude: degrees north.
      longitude: degrees east, any turn.
      height: geopotential height above sea level in m.
      pressure: Pa. NaN, underground or above the highest layer centre gives NaN for the upper variables, as for
        `height`. time, latitude, longitude and height or pressure are broadcast together.

    Returns:
      {variable: float64 of the broadcast shape}, SI units.

    Raises:
      TruthQueryError: unknown variable, time outside the run, latitude outside [-90, 90], NaN coordinates, no or two
      verticals.
    """
    unknown = [name for name in variables if name not in SURFACE_VARIABLES + UPPER_VARIABLES]
    if unknown:
        raise TruthQueryError(f"variable {unknown[0]!r} is not one of {SURFACE_VARIABLES + UPPER_VARIABLES}")
    if "specific_humidity" in variables and "specific_humidity" not in truth.columns:
        raise TruthQueryError("the nature run is dry: specific_humidity needs NatureConfig(moisture=True)")
    if height is not None and pressure is not None:
        raise TruthQueryError("pass height or pressure, not both")
    upper = [name for name in variables if name in UPPER_VARIABLES]
    if upper and height is None and pressure is None:
        raise TruthQueryError(f"{upper[0]} needs a height or a pressure; at the lowest level ask for lowest_level_*")
    vertical = height if height is not None else pressure
    parts = [np.asarray(time, "datetime64[ns]"), np.asarray(latitude, float), np.asarray(longitude, float)]
    parts.append(np.asarray(np.nan if vertical is None else vertical, float))
    shape = np.broadcast_shapes(*(part.shape for part in parts))
    times, lats, lons, levels = (np.broadcast_to(part, shape).ravel() for part in parts)
    _check(truth, times, lats, lons)
    out = {name: np.empty(times.size) for name in variables}
    for start in range(0, times.size, _CHUNK):
        rows = slice(start, start + _CHUNK)
        found = _query(truth, variables, times[rows], lats[rows], lons[rows], levels[rows], height is not None)
        for name in variables:
            out[name][rows] = found[name]
    return {name: values.reshape(shape) for name, values in out.items()}


def profiles(
    truth: Truth, variable: str, time: Times, latitude: Numbers, longitude: Numbers
) -> tuple[Float[np.ndarray, "*n K"], Float[np.ndarray, "*n K"]]:
    """Whole columns of the truth, which is linear in ln(pressure) between the nodes given here.

    Args:
      truth: see `truth_from_dataset`.
      variable: one of `truth.columns`.
      time, latitude, longitude: as for `query`.

    Returns:
      Pressure in Pa and value in SI of K nodes, the ground first, then the layer centres upwards.

    Raises:
      TruthQueryError: as for `query`.
    """
    if variable not in truth.columns:
        raise TruthQueryError(f"variable {variable!r} is not one of {tuple(truth.columns)}")
    parts = (np.asarray(time, "datetime64[ns]"), np.asarray(latitude, float), np.asarray(longitude, float))
    shape = np.broadcast_shapes(*(part.shape for part in parts))
    times, lats, lons = (np.broadcast_to(part, shape).ravel() for part in parts)
    _check(truth, times, lats, lons)
    nodes = np.concatenate([[0.0], np.log(truth.sigma)])
    pressure, values = np.empty((2, times.size, len(nodes)))
    for start in range(0, times.size, _CHUNK):
        rows = slice(start, start + _CHUNK)
        corners = list(_corners(truth, times[rows], lats[rows], lons[rows]))
        log_surface = np.asarray(sum(w * truth.log_pressure[t, j, i] for t, j, i, w in corners))
        column = np.asarray(sum(w[:, None] * truth.columns[variable][t, j, i] for t, j, i, w in corners))
        pressure[rows] = np.exp(log_surface[:, None] + nodes)
        values[rows] = _with_ground(column, nodes, variable)
    return pressure.reshape(*shape, -1), values.reshape(*shape, -1)


def hydrostatic_heights(
    temperature: Float[np.ndarray, "*N K"], log_sigma: Float[np.ndarray, " K"], surface_height: Float[np.ndarray, "*N"]
) -> Float[np.ndarray, "*N K"]:
    """Geopotential heights of nodes from the ground (log_sigma[0] = 0) up, for temperature linear in ln(sigma) between
    nodes.

    dz = -(R T / g) d ln(sigma), whose integral over a linear T is the trapezoid, exactly.

    Args:
      temperature: K at the nodes.
      log_sigma: ln(pressure / surface pressure) of the nodes, 0 first, descending.
      surface_height: m at the first node.
    """
    thickness = GAS_CONSTANT / GRAVITY * 0.5 * (temperature[..., 1:] + temperature[..., :-1]) * -np.diff(log_sigma)
    above = np.cumsum(thickness, axis=-1)
    return surface_height[..., None] + np.concatenate([np.zeros_like(above[..., :1]), above], axis=-1)


def _check(truth: Truth, times: np.ndarray, lats: np.ndarray, lons: np.ndarray) -> None:
    bad = np.flatnonzero(np.isnat(times) | (times < truth.start) | (times > truth.end))
    if bad.size:
        raise TruthQueryError(
            f"time {times[bad[0]]} at point {bad[0]} is outside the nature run [{truth.start}, {truth.end}]; "
            "query inside it or run more days"
        )
    bad = np.flatnonzero(~(np.abs(lats) <= 90))
    if bad.size:
        raise TruthQueryError(f"latitude {lats[bad[0]]} at point {bad[0]} is outside [-90, 90]; pass degrees north")
    bad = np.flatnonzero(~np.isfinite(lons))
    if bad.size:
        raise TruthQueryError(f"longitude {lons[bad[0]]} at point {bad[0]} is not finite; pass degrees east")


def _query(
    truth: Truth,
    variables: Sequence[str],
    times: np.ndarray,
    lats: np.ndarray,
    lons: np.ndarray,
    levels: np.ndarray,
    by_height: bool,
) -> dict[str, np.ndarray]:
    """`query` for one chunk of flat points [N]."""
    corners = list(_corners(truth, times, lats, lons))
    upper = [name for name in variables if name in UPPER_VARIABLES]
    need = {name.removeprefix("lowest_level_") for name in variables} & set(_COLUMN)
    if upper and (by_height or "geopotential_height" in upper):
        need.add("temperature")
    layers = None if upper else 1  # the lowest layer is enough at the surface
    column = {
        name: sum(w[:, None] * truth.columns[name][t, j, i, :layers] for t, j, i, w in corners) for name in need
    }  # float64 [N, L]
    log_surface = np.asarray(sum(w * truth.log_pressure[t, j, i] for t, j, i, w in corners))
    altitude = np.asarray(sum(w * truth.surface_altitude[j, i] for _, j, i, w in corners))

    out: dict[str, np.ndarray] = {}
    for name in variables:
        if name == "surface_pressure":
            out[name] = np.exp(log_surface)
        elif name == "surface_altitude":
            out[name] = altitude
        elif name.startswith("lowest_level_"):
            out[name] = np.asarray(column[name.removeprefix("lowest_level_")])[:, 0]
    if not upper:
        return out

    nodes = np.concatenate([[0.0], np.log(truth.sigma)])  # ln sigma from the ground up, descending [K = L + 1]
    profile = {name: _with_ground(np.asarray(values), nodes, name) for name, values in column.items()}  # [N, K]
    heights = None
    if "temperature" in profile:
        heights = hydrostatic_heights(profile["temperature"], nodes, altitude)
    if by_height:
        assert heights is not None
        position = _log_sigma_at_height(levels, heights, profile["temperature"], nodes)
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            position = np.log(levels) - log_surface
    tolerance = 1e-9  # of ln sigma: a query at exactly the surface pressure is on the ground, not under it
    outside = ~((position <= tolerance) & (position >= nodes[-1] - tolerance))
    position = np.clip(np.where(outside, 0.0, position), nodes[-1], 0.0)
    # Nodes are common to all points: the segment [k, k + 1] holds the position.
    segment = np.clip(np.searchsorted(-nodes, -position, side="right") - 1, 0, len(nodes) - 2)
    fraction = (position - nodes[segment]) / (nodes[segment + 1] - nodes[segment])
    rows = np.arange(len(levels))
    for name in upper:
        if name == "pressure":
            values = np.exp(position + log_surface)
        elif name == "geopotential_height":
            assert heights is not None
            low = profile["temperature"][rows, segment]
            here = low + fraction * (profile["temperature"][rows, segment + 1] - low)
            rise = GAS_CONSTANT / GRAVITY * 0.5 * (low + here) * (nodes[segment] - position)
            values = heights[rows, segment] + rise
        else:
            low = profile[name][rows, segment]
            values = low + fraction * (profile[name][rows, segment + 1] - low)
        out[name] = np.where(outside, np.nan, values)
    return out


def _corners(
    truth: Truth, times: np.ndarray, lats: np.ndarray, lons: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The up to 8 (time, latitude, longitude) corners of the cells around the points, with weights [N] of sum 1."""
    axes = []
    if len(truth.times) > 1:
        step = truth.times[1] - truth.times[0]
        axes.append(_cell((times - truth.start) / step, len(truth.times)))
    else:
        axes.append(_cell(np.zeros(len(times)), 2))
    index = np.clip(np.searchsorted(truth.latitude, lats, side="right") - 1, 0, len(truth.latitude) - 2)
    spacing = np.diff(truth.latitude)[index]
    axes.append((index, (lats - truth.latitude[index]) / spacing))
    # -1e-17 % 360 rounds to 360: the last cell with weight 1, which the added meridian holds.
    axes.append(_cell((lons % 360.0) / truth.longitude[1], len(truth.longitude)))
    for dt in (0, 1):
        for dj in (0, 1):
            for di in (0, 1):
                weight = np.ones(len(times))
                for (_, fraction), side in zip(axes, (dt, dj, di), strict=True):
                    weight = weight * (fraction if side else 1.0 - fraction)
                if weight.any():  # points at kept times leave half of the corners out
                    yield axes[0][0] + dt, axes[1][0] + dj, axes[2][0] + di, weight


def _cell(position: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Index of the cell and fraction inside it, for a position counted in cells of an axis of `count` nodes."""
    index = np.clip(np.floor(position).astype(int), 0, count - 2)
    return index, position - index


def _with_ground(values: np.ndarray, nodes: np.ndarray, name: str) -> np.ndarray:
    """Adds the value at the ground in front of a column [N, L] -> [N, L + 1]."""
    lowest = values[:, 0]
    if name == "temperature":
        slope = (values[:, 1] - lowest) / (nodes[2] - nodes[1])
        lowest = lowest - slope * nodes[1]
    return np.concatenate([lowest[:, None], values], axis=1)


def _log_sigma_at_height(
    height: np.ndarray, heights: np.ndarray, temperature: np.ndarray, nodes: np.ndarray
) -> np.ndarray:
    """ln(sigma) of a geopotential height [N]; NaN outside the column [N, K].

    Within a segment g (z - z_k) / R = -(T_k x + b x^2 / 2) for x = ln(sigma) - ln(sigma_k) <= 0 and b = dT / d
    ln(sigma); the root near 0 is written without cancellation, so that it holds for b = 0.
    """
    rows = np.arange(len(height))
    segment = np.clip((heights <= height[:, None]).sum(axis=1) - 1, 0, len(nodes) - 2)
    base = temperature[rows, segment]
    slope = (temperature[rows, segment + 1] - base) / (nodes[segment + 1] - nodes[segment])
    lift = (height - heights[rows, segment]) * GRAVITY / GAS_CONSTANT
    with np.errstate(invalid="ignore"):
        offset = -2.0 * lift / (base + np.sqrt(base**2 - 2.0 * slope * lift))
        inside = (height >= heights[:, 0] - 1e-6) & (height <= heights[:, -1] + 1e-6)
    return np.where(inside, np.clip(nodes[segment] + offset, nodes[-1], 0.0), np.nan)


def _scalar_poles(values: np.ndarray, axis: int) -> np.ndarray:
    """Adds a pole before and after the latitude axis, each the mean of its ring along the next axis, longitude."""
    poles = []
    for side in (0, -1):
        ring = np.take(values, [side], axis=axis)
        mean = ring.astype(float).mean(axis=axis + 1, keepdims=True)
        poles.append(np.broadcast_to(mean, ring.shape).astype(values.dtype))
    return np.concatenate([poles[0], values, poles[1]], axis=axis)


def _wind_poles(u: np.ndarray, v: np.ndarray, longitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Adds the poles to winds [T, J, I, L]: the mean vector of the ring, resolved again along each meridian.

    In the plane touching the pole, east is (-sin, cos) and north is -(cos, sin) at the north pole, +(cos, sin) at the
    south pole.
    """
    sine, cosine = np.sin(longitude)[:, None], np.cos(longitude)[:, None]
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for side, sign in ((0, 1.0), (-1, -1.0)):
        ring_u, ring_v = u[:, side].astype(float), v[:, side].astype(float)  # [T, I, L]
        x = (-sine * ring_u + sign * cosine * ring_v).mean(axis=1, keepdims=True)
        y = (cosine * ring_u + sign * sine * ring_v).mean(axis=1, keepdims=True)
        rows.append((-sine * x + cosine * y, sign * (cosine * x + sine * y)))
    (south_u, south_v), (north_u, north_v) = rows
    return (
        np.concatenate([south_u[:, None], u, north_u[:, None]], axis=1).astype(u.dtype),
        np.concatenate([south_v[:, None], v, north_v[:, None]], axis=1).astype(v.dtype),
    )


def _wrap(values: np.ndarray, axis: int) -> np.ndarray:
    """Repeats longitude 0 as 360."""
    return np.concatenate([values, np.take(values, [0], axis=axis)], axis=axis)
