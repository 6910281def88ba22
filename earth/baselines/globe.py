"""Statistical baselines for forecasts at any point of the globe, fitted on reports alone (all of it ours).

What they read is the canonical table of a training run: stations, ships, radiosondes, aircraft and scatterometer winds.
Radiances are left out: a fair linear use of them needs their weighting functions, which these baselines do not know.

- **climatology** (`fit_climate`): a smooth normal of temperature, wind and ln(surface pressure): ridge on spherical
  harmonics times Chebyshev polynomials of ln(pressure), with a cycle of local solar time; heights enter the surface's.
  The penalty is chosen by leaving platforms out. Beside it the zonal standard deviation of the anomalies about it.
- **persistence**: climatology at the valid time plus the last anomaly of the nearest given platform of the same sensor.
- **oi_persistence**: climatology plus the anomaly of an optimal interpolation (`interpolate`) at the initial time. It
  combines all in situ sensors and scatterometer winds; u and v are analysed together, through the covariance of a
  streamfunction and a velocity potential (Daley 1991, Atmospheric Data Analysis, section 5.2). Reports are carried
  downstream with a share of the normal wind. Scales and error inflation are chosen by predicting left-out platforms.
- **oi_damped**: the same anomaly times a regression coefficient per quantity, level, band of latitude and lead.
- **var**: a vector autoregression (linear inverse model) that is homogeneous along latitude circles: optimal
  interpolations on a grid, Fourier transformed in longitude; for each zonal wavenumber a complex ridge regression of
  its leading principal components at the lead on those now and 12 h before. Truncation and penalty are chosen on the
  last fifth of the training run.
- **oi_var**: both, in proportions fitted per quantity, level, band and lead: the interpolation sees what the grid of
  the vector autoregression is too coarse for, and that knows where things go.

A forecast reads reports up to and including its initial time, and none after it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from earth.baselines.panel import BaselineError
from earth.geometry import harmonic_degrees, harmonics, standard_pressure, unit_vector

MODELS = ("climatology", "persistence", "oi_persistence", "oi_damped", "var", "oi_var")
QUANTITIES = ("temperature", "u_component_of_wind", "v_component_of_wind", "surface_pressure")
KINDS = ("temperature", "wind", "surface_pressure")  # analysed together: u and v are one
_KIND = np.array([0, 1, 1, 2])  # of each quantity
_WIND = "lowest_level_{}_component_of_wind"
_VARIABLES = {  # variable: (quantity, at the surface)
    "lowest_level_temperature": (0, True),
    _WIND.format("u"): (1, True),
    _WIND.format("v"): (2, True),
    "surface_pressure": (3, True),
    "temperature": (0, False),
    "u_component_of_wind": (1, False),
    "v_component_of_wind": (2, False),
}
_SURFACE_SIGMA = 0.94  # where in the column the lowest level stands, for vertical distances only
_RADIUS = 6371.0  # km
_STEERING = 7e4  # Pa, whose normal wind carries reports
_EPOCH = np.datetime64("1970-01-01", "ns")
_FIT_ROWS = 150_000  # rows of one quantity that fit a normal: more change nothing but the time
_BANDS = (25.0, 55.0)  # degrees of latitude where the damping changes
_LEVELS = np.log([85000.0, 70000.0, 50000.0, 25000.0])  # of the damping and of the grid
_FOLDS = 5


# ---- reports as arrays
@dataclasses.dataclass(frozen=True)
class Points:
    """Places, times and quantities; arrays [n].

    Attributes:
      hours: since 1970.
      latitude, longitude: degrees.
      height: of the ground in m, for surface quantities (0 where unknown).
      log_pressure: ln(p / Pa); of surface quantities that of a standard atmosphere at their height.
      quantity: index into `QUANTITIES`; -1 for what these baselines do not forecast.
      surface: of the lowest level or the ground.
    """

    hours: Float[np.ndarray, " n"]
    latitude: Float[np.ndarray, " n"]
    longitude: Float[np.ndarray, " n"]
    height: Float[np.ndarray, " n"]
    log_pressure: Float[np.ndarray, " n"]
    quantity: Int[np.ndarray, " n"]
    surface: Bool[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.hours)

    def take(self, rows: np.ndarray) -> Points:
        return Points(*(getattr(self, field.name)[rows] for field in dataclasses.fields(Points)))


@dataclasses.dataclass(frozen=True)
class Reports:
    """A table as arrays sorted by time; ln for surface pressure.

    Attributes:
      points: where and what.
      value, error: in the quantity's own unit; ln(Pa) and its error for surface pressure.
      platform: index into `platforms`.
      sensor: index into `sensors`.
      platforms, sensors: names.
    """

    points: Points
    value: Float[np.ndarray, " n"]
    error: Float[np.ndarray, " n"]
    platform: Int[np.ndarray, " n"]
    sensor: Int[np.ndarray, " n"]
    platforms: tuple[str, ...]
    sensors: tuple[str, ...]

    def take(self, rows: np.ndarray) -> Reports:
        arrays = (self.value[rows], self.error[rows], self.platform[rows], self.sensor[rows])
        return Reports(self.points.take(rows), *arrays, self.platforms, self.sensors)

    def between(self, after: float, until: float) -> Reports:
        """Those with after < hours <= until."""
        first, last = np.searchsorted(self.points.hours, [after, until], side="right")
        return self.take(np.arange(first, last))


def hours_of(times: Any) -> np.ndarray:
    """Hours since 1970 of datetimes."""
    return (np.asarray(times, "datetime64[ns]") - _EPOCH) / np.timedelta64(1, "h")


def points_of(frame: pd.DataFrame, times: str = "time") -> Points:
    """Places and quantities of the rows of a table or of targets; quantity -1 where the variable is none of ours."""
    codes, names = pd.factorize(frame["variable"])
    known = [_VARIABLES.get(str(name), (-1, False)) for name in names]
    quantity, surface = (np.array([pair[i] for pair in known], kind)[codes] for i, kind in ((0, int), (1, bool)))
    height = np.nan_to_num(frame["height"].to_numpy(float))
    pressure = frame["pressure"].to_numpy(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.log(np.where(surface, _SURFACE_SIGMA * standard_pressure(height), pressure))
    quantity = np.where(np.isfinite(level), quantity, -1)  # an upper value whose pressure is unknown
    latitude, longitude = (frame[name].to_numpy(float) for name in ("latitude", "longitude"))
    hours = hours_of(frame[times].to_numpy())
    return Points(hours, latitude, longitude, height, np.nan_to_num(level), quantity, surface)


def reports_of(table: pd.DataFrame) -> Reports:
    """Rows of a canonical table that these baselines read, sorted by time.

    Raises:
      BaselineError: there is none.
    """
    points = points_of(table)
    value, error = table["value"].to_numpy(float), table["obs_error"].to_numpy(float)
    pressure = points.quantity == 3
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(pressure, error / value, error)
        value = np.where(pressure, np.log(value), value)
    good = (points.quantity >= 0) & np.isfinite(value) & np.isfinite(error)
    if not good.any():
        raise BaselineError(f"none of {len(table)} rows is one of {tuple(_VARIABLES)} with a value and an obs_error")
    rows = np.flatnonzero(good)
    rows = rows[np.argsort(points.hours[rows], kind="stable")]
    platform, platforms = pd.factorize(table["platform"])
    sensor, sensors = pd.factorize(table["sensor"])
    names = tuple(map(str, platforms)), tuple(map(str, sensors))
    return Reports(points, value, error, platform, sensor, *names).take(rows)


# ---- climatology
def _features(points: Points, surface: bool) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, F] of a normal and the relative penalty [F] of each."""
    top = 8 if surface else 6
    mean, degrees = harmonics(points.latitude, points.longitude, top, xp=np), harmonic_degrees(top)
    low = mean[:, degrees <= 3]
    # A climate's spectrum is red: the prior variance of a coefficient falls with the sixth power of its degree.
    smooth = 1e-5 + (degrees * (degrees + 1) / 40.0) ** 3
    phase = 2 * np.pi * (points.hours + points.longitude / 15.0)[:, None] / 24.0
    if surface:
        height = points.height[:, None] / 1000.0
        parts = [mean, height * mean[:, degrees <= 2], height**2]
        penalties = [smooth, 1e-3 + smooth[degrees <= 2], np.array([1e-2])]
        parts += [low * wave(k * phase) for k in (1, 2) for wave in (np.cos, np.sin)]
        penalties += [k * (0.03 + smooth[degrees <= 3]) for k in (1, 2) for _ in range(2)]
    else:
        x = 2 * (points.log_pressure - math.log(4e3)) / (math.log(1.05e5) - math.log(4e3)) - 1
        vertical = np.polynomial.chebyshev.chebvander(np.clip(x, -1.1, 1.1), 5)
        parts = [(mean[:, :, None] * vertical[:, None, :]).reshape(len(points), 6 * len(degrees))]
        penalties = [(smooth[:, None] * (1 + np.arange(6)) + 1e-4).ravel()]
        near = np.clip((np.exp(points.log_pressure) / 1e5 - 0.6) / 0.3, 0, 1)[:, None]
        parts += [near * low * wave(phase) for wave in (np.cos, np.sin)]
        penalties += [0.03 + smooth[degrees <= 3] for _ in range(2)]
    return np.concatenate(parts, -1), np.concatenate(penalties)


@dataclasses.dataclass(frozen=True)
class _Spread:
    """Zonal standard deviation of anomalies over nodes of latitude and ln(pressure)."""

    latitude: np.ndarray
    log_pressure: np.ndarray
    sd: np.ndarray  # [latitude, log_pressure]

    def at(self, points: Points) -> np.ndarray:
        def cell(axis, x):
            if len(axis) == 1:
                return np.zeros(len(x), int), np.zeros(len(x), int), np.zeros(len(x))
            x = np.clip(x, axis[0], axis[-1])
            i = np.clip(np.searchsorted(axis, x, side="right") - 1, 0, len(axis) - 2)
            return i, i + 1, (x - axis[i]) / (axis[i + 1] - axis[i])

        j, j1, a = cell(self.latitude, points.latitude)
        k, k1, b = cell(self.log_pressure, points.log_pressure)
        low = (1 - a) * self.sd[j, k] + a * self.sd[j1, k]
        return (1 - b) * low + b * ((1 - a) * self.sd[j, k1] + a * self.sd[j1, k1])


def _fit_spread(points: Points, variance: np.ndarray, surface: bool) -> _Spread:
    latitude = np.linspace(-85, 85, 35)
    levels = np.array([0.0]) if surface else np.linspace(math.log(6e3), math.log(1e5), 15)
    j = np.abs(points.latitude[:, None] - latitude).argmin(1)
    k = np.zeros(len(points), int) if surface else np.abs(points.log_pressure[:, None] - levels).argmin(1)
    total, count = np.zeros((2, len(latitude), len(levels)))
    np.add.at(total, (j, k), variance)
    np.add.at(count, (j, k), 1.0)
    share = np.where(count > 0, total / np.maximum(count, 1), 0.0)
    weight = np.minimum(count, 200.0)  # a crowded cell does not drown its neighbours
    near = np.exp(-0.5 * ((latitude[:, None] - latitude) / 5.0) ** 2) + 1e-6
    above = np.exp(-0.5 * ((levels[:, None] - levels) / 0.2) ** 2) + 1e-6
    smoothed = (near @ (weight * share) @ above) / np.maximum(near @ weight @ above, 1e-12)
    floor = 0.02 * max(float(variance.mean()), 1e-12)
    return _Spread(latitude, levels, np.sqrt(np.maximum(smoothed, floor)))


@dataclasses.dataclass(frozen=True)
class Climate:
    """Normals and standard deviations, see `fit_climate`.

    Attributes:
      coefficients: (quantity, surface) -> coefficients.
      spreads: (quantity, surface) -> standard deviation of the anomalies.
      penalties: (quantity, surface) -> the penalty chosen.
      offsets: (quantity, surface) -> mean anomaly per platform name, shrunk by its sampling error.
    """

    coefficients: dict[tuple[int, bool], np.ndarray]
    spreads: dict[tuple[int, bool], _Spread]
    penalties: dict[tuple[int, bool], float]
    offsets: dict[tuple[int, bool], dict[str, float]]

    def normal(self, points: Points) -> Float[np.ndarray, " n"]:
        """Normals, ln(Pa) for surface pressure; NaN for what was not fitted."""
        out = np.full(len(points), np.nan)
        for rows, key in self._groups(points):
            for part in np.array_split(rows, max(1, len(rows) // 20_000)):
                if len(part):
                    out[part] = _features(points.take(part), key[1])[0] @ self.coefficients[key]
        return out

    def spread(self, points: Points) -> Float[np.ndarray, " n"]:
        """Standard deviations of the anomalies."""
        out = np.full(len(points), np.nan)
        for rows, key in self._groups(points):
            out[rows] = self.spreads[key].at(points.take(rows))
        return out

    def offset(self, reports: Reports) -> Float[np.ndarray, " n"]:
        """What each report's platform is off the normal on average; 0 for platforms that did not train."""
        out = np.zeros(len(reports.value))
        for rows, key in self._groups(reports.points):
            known = self.offsets[key]
            each = np.array([known.get(name, 0.0) for name in reports.platforms])
            out[rows] = each[reports.platform[rows]]
        return out

    def _groups(self, points: Points) -> Iterator[tuple[np.ndarray, tuple[int, bool]]]:
        for key in self.coefficients:
            rows = np.flatnonzero((points.quantity == key[0]) & (points.surface == key[1]))
            if len(rows):
                yield rows, key


def fit_climate(
    reports: Reports, *, penalties: Sequence[float] = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6), seed: int = 0
) -> Climate:
    """Fits normals, standard deviations and platform offsets to the reports of a training run.

    The penalty of each normal is the one that predicts the reports of left-out stations and sondes best (5 folds).

    Args:
      reports: see `reports_of`.
      penalties: candidates.
      seed: of the folds and of the thinning to 150,000 rows a quantity.

    Raises:
      BaselineError: a quantity has fewer platforms than folds.
    """
    rng = np.random.default_rng(seed)
    fold = _folds(reports, seed)
    coefficients, spreads, chosen, offsets = {}, {}, {}, {}
    for key in itertools.product(range(len(QUANTITIES)), (True, False)):
        rows = np.flatnonzero((reports.points.quantity == key[0]) & (reports.points.surface == key[1]))
        if not len(rows):
            continue
        if len(rows) > _FIT_ROWS:
            rows = np.sort(rng.choice(rows, _FIT_ROWS, replace=False))
        group = fold[reports.platform[rows]]
        if len(set(group[group >= 0])) < 2:
            raise BaselineError(
                f"{QUANTITIES[key[0]]} {'at the surface' if key[1] else 'aloft'} comes from fewer than two stations "
                "or sondes; a normal needs more"
            )
        grams, moments, squares, counts = [], [], [], []
        scale = np.ones(0)
        for index in range(-1, _FOLDS):
            own = rows[group == index]
            gram, moment, square = 0.0, 0.0, 0.0
            for part in np.array_split(own, max(1, len(own) // 20_000)):
                x, scale = _features(reports.points.take(part), key[1])
                y = reports.value[part] - (_LN_P0 if key[0] == 3 else 0.0)
                gram, moment, square = gram + x.T @ x, moment + x.T @ y, square + y @ y
            grams.append(gram)
            moments.append(moment)
            squares.append(square)
            counts.append(len(own))
        gram, moment = np.sum(grams, 0), np.sum(moments, 0)
        errors = []
        for penalty in penalties:
            total = 0.0
            for index in range(1, _FOLDS + 1):
                if counts[index]:
                    w = np.linalg.solve(gram - grams[index] + np.diag(penalty * scale), moment - moments[index])
                    total += w @ grams[index] @ w - 2 * w @ moments[index] + squares[index]
            errors.append(total)
        chosen[key] = float(penalties[int(np.argmin(errors))])
        w = np.linalg.solve(gram + np.diag(chosen[key] * scale), moment)
        if key[0] == 3:
            w[0] += _LN_P0  # the first harmonic is 1
        coefficients[key] = w
        climate = Climate({key: w}, {}, {}, {})
        some = reports.take(rows)
        anomaly = some.value - climate.normal(some.points)
        spreads[key] = _fit_spread(some.points, np.maximum(anomaly**2 - some.error**2, 0.0), key[1])
        offsets[key] = _offsets(some, anomaly, spreads[key].at(some.points))
    return Climate(coefficients, spreads, chosen, offsets)


_LN_P0 = math.log(1e5)


def _folds(reports: Reports, seed: int) -> np.ndarray:
    """Fold of each platform [P]; -1 for those that always train: moving ones and satellites."""
    fold = np.full(len(reports.platforms), -1)
    fixed = np.isin(reports.sensor, [i for i, name in enumerate(reports.sensors) if name in ("station", "radiosonde")])
    names = np.unique(reports.platform[fixed])
    fold[names] = np.random.default_rng(seed).permutation(len(names)) % _FOLDS
    return fold


def _offsets(reports: Reports, anomaly: np.ndarray, spread: np.ndarray) -> dict[str, float]:
    """Mean anomalies of platforms, each shrunk by tau2 / (tau2 + its sampling variance); weather decorrelates in about
    two days, and tau2 is what the platforms differ by beyond that.
    """
    count = np.bincount(reports.platform, minlength=len(reports.platforms))
    mean = np.bincount(reports.platform, anomaly, minlength=len(count)) / np.maximum(count, 1)
    variance = np.bincount(reports.platform, spread**2, minlength=len(count)) / np.maximum(count, 1)
    days = pd.Series(np.floor(reports.points.hours / 24)).groupby(reports.platform).nunique()
    days = days.reindex(range(len(count)), fill_value=0).to_numpy()
    sampling = variance * 2.0 / np.maximum(days, 1)
    seen = days > 0
    tau2 = max(float(np.mean(mean[seen] ** 2) - np.mean(sampling[seen])), 0.0)
    shrunk = mean * tau2 / np.maximum(tau2 + sampling, 1e-30)
    return {reports.platforms[i]: float(shrunk[i]) for i in np.flatnonzero(seen)}


# ---- optimal interpolation
@dataclasses.dataclass(frozen=True)
class Kernel:
    """Correlation of standardised anomalies.

    Scalars: C(d) of the chord d between places; wind: that of a streamfunction (and a share of velocity potential) with
    correlation C. Times exp(-(dln p)^2 / 2 vertical^2) exp(-|dt| / hours), times `link` between surface and upper air.

    Attributes:
      length_km: of C.
      vertical: scale in ln(pressure).
      hours: scale in time.
      family: "gauss" exp(-d^2 / 2 L^2), or "soar" (1 + d / L) exp(-d / L).
      divergent: share of the wind variance in the velocity potential.
      link: correlation of surface and upper-air values at one place.
      error: factor of the stated observation errors.
      nugget: standard deviation, in units of the anomalies', of what the kernel cannot see.
      steering: share of the normal wind at 700 hPa that carries reports to the time of the analysis.
      offsets: share of the platforms' offsets that is taken off.
    """

    length_km: float = 1000.0
    vertical: float = 0.5
    hours: float = 48.0
    family: str = "gauss"
    divergent: float = 0.1
    link: float = 0.8
    error: float = 1.0
    nugget: float = 0.2
    steering: float = 0.5
    offsets: float = 1.0

    def __post_init__(self):
        if self.family not in _SHAPES:
            raise BaselineError(f"family={self.family!r} is not one of {tuple(_SHAPES)}")
        if not (self.length_km > 0 and self.vertical > 0 and self.hours > 0 and self.error >= 0 and self.nugget >= 0):
            raise BaselineError(f"{self}: scales must be positive, errors not negative")


# r = d / L -> correlation of a scalar; along and across the line between them of a non-divergent wind
_SHAPES: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]] = {
    "gauss": lambda r: (np.exp(-0.5 * r * r), np.exp(-0.5 * r * r), (1 - r * r) * np.exp(-0.5 * r * r)),
    "soar": lambda r: ((1 + r) * np.exp(-r), np.exp(-r), (1 - r) * np.exp(-r)),
}


@dataclasses.dataclass(frozen=True)
class _Nodes:
    """Places of a covariance; arrays of one shape [...], `place` and `axis` [..., 3]."""

    place: np.ndarray
    axis: np.ndarray  # unit vector of the wind component, 0 for scalars
    level: np.ndarray
    hours: np.ndarray
    surface: np.ndarray

    def take(self, rows: Any) -> _Nodes:
        return _Nodes(self.place[rows], self.axis[rows], self.level[rows], self.hours[rows], self.surface[rows])

    def rough(self) -> _Nodes:
        """In single precision, enough to rank by."""
        place, axis, level, hours = (x.astype(np.float32) for x in (self.place, self.axis, self.level, self.hours))
        return _Nodes(place, axis, level, hours, self.surface)


def _nodes(points: Points) -> _Nodes:
    lat, lon = np.deg2rad(points.latitude), np.deg2rad(points.longitude)
    place = np.asarray(unit_vector(points.latitude, points.longitude, xp=np))
    east = np.stack([-np.sin(lon), np.cos(lon), np.zeros_like(lon)], -1)
    north = np.stack([-np.sin(lat) * np.cos(lon), -np.sin(lat) * np.sin(lon), np.cos(lat)], -1)
    which = points.quantity[:, None]
    axis = np.where(which == 1, east, np.where(which == 2, north, 0.0))
    return _Nodes(place, axis, points.log_pressure, points.hours, points.surface)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def covariance(kernel: Kernel, a: _Nodes, b: _Nodes, wind: bool) -> np.ndarray:
    """Correlations of nodes whose shapes broadcast (`wind`: of components along their axes)."""
    cosine = np.clip(_dot(a.place, b.place), -1.0, 1.0)
    chord2 = 2.0 * (1.0 - cosine)
    scalar, along, across = _SHAPES[kernel.family](np.sqrt(chord2) * (_RADIUS / kernel.length_km))
    if wind:
        share = kernel.divergent
        along, across = (1 - share) * along + share * across, (1 - share) * across + share * along
        sine2 = 1.0 - cosine**2
        near = sine2 < 1e-8
        parallel = -_dot(a.axis, b.place) * _dot(b.axis, a.place)
        # Across the line, t = x_a x x_b: (e_a . t)(e_b . t) = -(e_a x x_a . x_b)(e_b x x_b . x_a).
        turned = np.cross(a.axis, a.place), np.cross(b.axis, b.place)
        across_part = -_dot(turned[0], b.place) * _dot(turned[1], a.place)
        safe = np.where(near, 1.0, sine2)
        scalar = np.where(near, along * _dot(a.axis, b.axis), (along * parallel + across * across_part) / safe)
    vertical = np.exp(-0.5 * ((a.level - b.level) / kernel.vertical) ** 2)
    linked = np.where(a.surface == b.surface, np.float32(1), np.float32(kernel.link))
    return scalar * vertical * np.exp(-np.abs(a.hours - b.hours) / kernel.hours) * linked


def interpolate(
    kernel: Kernel,
    given: Points,
    values: Float[np.ndarray, " n"],
    errors: Float[np.ndarray, " n"],
    wanted: Points,
    *,
    neighbours: int = 48,
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Optimal interpolation of standardised anomalies of one kind (scalars, or both wind components).

    Args:
      kernel: the correlation; `error`, `nugget`, `steering` and `offsets` are not applied here.
      given: where they were observed.
      values: standardised anomalies.
      errors: their standard deviations of error.
      wanted: where they are wanted.
      neighbours: reports that enter each value, the best correlated ones.

    Returns:
      Estimates and their standard deviations of error, if the kernel is right; 0 and 1 without any report.
    """
    if not len(given) or not len(wanted):
        return np.zeros(len(wanted)), np.ones(len(wanted))
    wind = bool(_KIND[given.quantity[0]] == 1)
    nodes = _nodes(given)
    # u and v of one place, and one place asked twice, share their equations.
    keys = np.stack([wanted.latitude, wanted.longitude, wanted.log_pressure, wanted.hours, wanted.surface], 1)
    _, first, back = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    places = wanted.take(first)
    parts = (1, 2) if wind else (int(given.quantity[0]),)
    goals = [_nodes(dataclasses.replace(places, quantity=np.full(len(places), part))) for part in parts]
    estimate, error = np.empty((2, len(places), len(parts)))
    count = min(neighbours, len(given))
    rough, rough_goals = nodes.rough(), goals[0].rough()
    for start in range(0, len(places), 256):
        rows = np.arange(start, min(start + 256, len(places)))
        # Ranked by the scalar correlation: the reports near a place serve u and v alike.
        rank = covariance(kernel, rough_goals.take((rows, None)), rough.take((None, slice(None))), False)
        chosen = np.argpartition(-rank, count - 1, axis=1)[:, :count]
        some = nodes.take(chosen)
        left, right = some.take((slice(None), slice(None), None)), some.take((slice(None), None))
        gram = covariance(kernel, left, right, wind)
        gram[:, np.arange(count), np.arange(count)] += errors[chosen] ** 2 + 1e-9
        cross = np.stack([covariance(kernel, goal.take((rows, None)), some, wind) for goal in goals], -1)
        weight = np.linalg.solve(gram, cross)
        estimate[rows] = (weight * values[chosen][..., None]).sum(1)
        error[rows] = np.sqrt(np.clip(1.0 - (weight * cross).sum(1), 0.0, None))
    part = np.searchsorted(parts, wanted.quantity) if wind else 0
    return estimate[back.ravel(), part], error[back.ravel(), part]


# ---- the baselines
@dataclasses.dataclass(frozen=True)
class GlobeConfig:
    """How the baselines are fitted.

    Attributes:
      window_hours: age of the oldest report that an analysis reads.
      neighbours: reports that enter a value of an analysis.
      tuning_times: analyses by which the kernels are chosen, evenly over the training run; 0 keeps `kernels`.
      damping_times: analyses by which the damping is fitted.
      kernels: to start from, in the order of `KINDS`.
      grid: latitudes and longitudes of the grid of the vector autoregression; () leaves `var` out.
      grid_neighbours: as `neighbours`, for the grid.
      grid_hours: between its training analyses, a divisor of 24.
      waves: largest zonal wavenumber.
      components: candidates for the number of principal components per wavenumber.
      penalties: candidates for the ridge penalty, in units of the sum of squares of the leading component.
      leads: hours.
      seed: of folds and choices.
    """

    window_hours: float = 24.0
    neighbours: int = 48
    tuning_times: int = 16
    damping_times: int = 80
    kernels: tuple[Kernel, Kernel, Kernel] = (
        Kernel(1000.0, 0.4, 36.0),
        Kernel(1000.0, 0.6, 36.0),
        Kernel(1500.0, 1.0, 36.0),
    )
    grid: tuple[int, ...] = (16, 24)
    grid_neighbours: int = 24
    grid_hours: int = 12
    waves: int = 9
    components: tuple[int, ...] = (6, 12, 20, 30)
    penalties: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
    leads: tuple[int, ...] = (6, 12, 24, 48, 72, 96, 120)
    seed: int = 0

    def __post_init__(self):
        if self.window_hours <= 0 or self.neighbours < 1 or self.grid_hours < 1 or 24 % self.grid_hours:
            raise BaselineError(
                f"window_hours={self.window_hours} must be positive, neighbours={self.neighbours} at least 1 and "
                f"grid_hours={self.grid_hours} divide 24"
            )
        if self.grid and (len(self.grid) != 2 or self.grid[0] < 2 or self.grid[1] < 2 * self.waves):
            raise BaselineError(
                f"grid={self.grid} needs two latitudes or more and 2 * waves={2 * self.waves} longitudes"
            )


@dataclasses.dataclass(frozen=True)
class _Wave:
    """The regression of one zonal wavenumber: state [F] -> `basis` [F, r] -> per lead weights [2 r, r]."""

    basis: np.ndarray
    weights: dict[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Globe:
    """Fitted baselines, see `fit_globe`.

    Attributes:
      cfg: how they were fitted.
      climate: normals.
      kernels: chosen, in the order of `KINDS`.
      skill: normalised RMSE of the analyses at left-out platforms, per kind, with `kernels`.
      damping: coefficients [quantity, level (surface first), band, lead (0 first)].
      blend: the same of the interpolation and of the vector autoregression together [..., 2]; 0 without the latter.
      waves: of the vector autoregression, or ().
      chosen: (components, penalty) per lead.
    """

    cfg: GlobeConfig
    climate: Climate
    kernels: tuple[Kernel, ...]
    skill: dict[str, float]
    damping: np.ndarray
    blend: np.ndarray
    waves: tuple[_Wave, ...]
    chosen: dict[int, tuple[int, float]]


def fit_globe(table: pd.DataFrame, cfg: GlobeConfig = GlobeConfig(), *, progress: bool = True) -> Globe:
    """Fits all baselines on the given reports of a training run.

    Args:
      table: canonical table, without the held-out platforms.
      cfg: see `GlobeConfig`.
      progress: show bars.

    Raises:
      BaselineError: too few reports or platforms.
    """
    reports = reports_of(table)
    climate = fit_climate(reports, seed=cfg.seed)
    standard = _Standard(reports, climate)
    hours = reports.points.hours
    first, last = hours[0] + cfg.window_hours, hours[-1]
    if last - first < max(cfg.leads) + 24:
        raise BaselineError(
            f"{(last - hours[0]) / 24:.1f} days of reports are too few to fit leads of {max(cfg.leads)} h; give more"
        )
    lacking = [name for name, (q, s) in _VARIABLES.items() if (q, s) not in climate.coefficients]
    if cfg.grid and lacking:
        raise BaselineError(f"no report of {lacking} trains the vector autoregression; pass grid=() to leave it out")
    kernels, skill = cfg.kernels, {}
    fold = _folds(reports, cfg.seed)
    if cfg.tuning_times:
        times = _nominal(first, last, 12, cfg.tuning_times)
        kernels, skill = _tune(standard, cfg, times, fold, progress)
    waves, chosen = (), {}
    if cfg.grid:
        times = _nominal(first + 12, last, cfg.grid_hours, 10**9)
        states = {t: _state(standard, kernels, cfg, t) for t in tqdm(times, desc="analyses", disable=not progress)}
        waves, chosen = _fit_waves(cfg, states)
    times = _nominal(first + 24, last, 12, cfg.damping_times)
    damping, blend = _fit_damping(standard, cfg, kernels, times, fold, waves, progress)
    return Globe(cfg, climate, kernels, skill, damping, blend, waves, chosen)


def forecast(
    globe: Globe, table: pd.DataFrame, wanted: pd.DataFrame, *, models: Sequence[str] = MODELS, progress: bool = True
) -> dict[str, np.ndarray]:
    """Forecasts of the baselines for targets.

    Args:
      globe: fitted on another run or period.
      table: canonical table of the targets' run, without the held-out platforms.
      wanted: columns init_time, lead_time (hours), valid_time, group, variable, latitude, longitude, height, pressure,
        as `earth.osse.verification.targets` makes them.
      models: which.

    Returns:
      {model: [n], SI}; NaN for variables that are none of `QUANTITIES`, and where no report of the last
      `window_hours` could be persisted.

    Raises:
      BaselineError: an unknown model, `var` of baselines fitted without it, or a lead it was not fitted for.
    """
    unknown = [name for name in models if name not in MODELS]
    if unknown or ({"var", "oi_var"} & set(models) and not globe.waves):
        raise BaselineError(
            f"models {unknown or ['var']} were not fitted; this one has {MODELS[: 6 if globe.waves else 4]}"
        )
    lead = wanted["lead_time"].to_numpy(int)
    strange = sorted(set(lead.tolist()) - set(globe.cfg.leads))
    if strange and {"oi_damped", "var", "oi_var"} & set(models):
        raise BaselineError(f"lead {strange[0]} h was not fitted; fit with leads={globe.cfg.leads} and it")
    standard = _Standard(reports_of(table), globe.climate)
    valid = points_of(wanted, "valid_time")
    init = points_of(wanted, "init_time")
    normal, spread = globe.climate.normal(valid), globe.climate.spread(valid)
    out = {name: np.full(len(wanted), np.nan) for name in models}
    places = wanted.groupby(["latitude", "longitude", "variable", "pressure", "group"], dropna=False, sort=False)
    place = places.ngroup().to_numpy()
    states: dict[float, np.ndarray] = {}
    distinct = np.unique(init.hours)
    for moment in tqdm(distinct, desc="baseline forecasts", disable=not progress):
        rows = np.flatnonzero((init.hours == moment) & (init.quantity >= 0))
        _, first, back = np.unique(place[rows], return_index=True, return_inverse=True)
        asked = init.take(rows[first])
        recent = standard.reports.between(moment - globe.cfg.window_hours, moment)
        interpolated = np.zeros(len(rows))
        if {"oi_persistence", "oi_damped", "oi_var"} & set(models):
            interpolated = standard.analyse(globe.kernels, globe.cfg, moment, asked)[back]
            if "oi_persistence" in models:
                out["oi_persistence"][rows] = normal[rows] + spread[rows] * interpolated
            if "oi_damped" in models:
                factor = _coefficients(globe.damping, globe.cfg.leads, init.take(rows), lead[rows])
                out["oi_damped"][rows] = normal[rows] + spread[rows] * factor * interpolated
        if "persistence" in models:
            group = wanted["group"].to_numpy(object)[rows[first]]
            out["persistence"][rows] = normal[rows] + _nearest(recent, globe.climate, asked, group)[back]
        if {"var", "oi_var"} & set(models):
            for when in (moment, moment - 12.0):
                if when not in states:
                    states[when] = _state(standard, globe.kernels, globe.cfg, when)
            carried = np.zeros(len(rows))
            for hours in np.unique(lead[rows]):
                fields = _wave_forecast(globe.cfg, globe.waves, states[moment], states[moment - 12.0], int(hours))
                here = lead[rows] == hours
                carried[here] = _from_grid(globe.cfg, fields, valid.take(rows[here]))
            if "var" in models:
                out["var"][rows] = normal[rows] + spread[rows] * carried
            if "oi_var" in models:
                factors = _coefficients(globe.blend, globe.cfg.leads, init.take(rows), lead[rows])
                both = factors[:, 0] * interpolated + factors[:, 1] * carried
                out["oi_var"][rows] = normal[rows] + spread[rows] * both
            states = {when: state for when, state in states.items() if when > moment - 24.0}
    if "climatology" in models:
        out["climatology"] = normal.copy()
    for values in out.values():
        pressure = valid.quantity == 3
        values[pressure] = np.exp(values[pressure])
    return out


class _Standard:
    """Reports as standardised anomalies, and analyses of them."""

    def __init__(self, reports: Reports, climate: Climate):
        self.reports, self.climate = reports, climate
        self.spread = climate.spread(reports.points)
        self.anomaly = (reports.value - climate.normal(reports.points)) / self.spread
        self.offset = climate.offset(reports) / self.spread
        self.error = reports.error / self.spread

    def window(self, cfg: GlobeConfig, moment: float, without: np.ndarray | None = None) -> np.ndarray:
        """Rows of the reports that an analysis reads: of each platform the newest one in boxes of 2.5 degrees, 0.15 in
        ln(p) and 12 h; none of the platforms `without`.
        """
        first, last = np.searchsorted(self.reports.points.hours, [moment - cfg.window_hours, moment], side="right")
        rows = np.arange(first, last)[::-1]
        if without is not None:
            rows = rows[~np.isin(self.reports.platform[rows], without)]
        points = self.reports.points.take(rows)
        age = np.where(
            points.surface & (self.reports.sensor[rows] != self._scatterometer), 0.0, (moment - points.hours) // 12
        )
        keys = [self.reports.platform[rows], points.quantity, points.latitude // 2.5, points.longitude // 2.5]
        keys += [points.log_pressure // 0.15, age]
        code = np.zeros(len(rows), np.int64)
        for key in keys:
            _, inverse = np.unique(key, return_inverse=True)
            code = np.unique(code * (inverse.max(initial=0) + 1) + inverse, return_inverse=True)[1]
        return rows[np.unique(code, return_index=True)[1]]

    @property
    def _scatterometer(self) -> int:
        return self.reports.sensors.index("scatterometer") if "scatterometer" in self.reports.sensors else -1

    def analyse(
        self,
        kernels: Sequence[Kernel],
        cfg: GlobeConfig,
        moment: float,
        wanted: Points,
        without: np.ndarray | None = None,
        *,
        neighbours: int | None = None,
        window: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Standardised anomalies at `moment` at points; `window`: rows and steering winds found before."""
        out = np.zeros(len(wanted))
        rows = self.window(cfg, moment, without) if window is None else window[0]
        wind = self.steering(rows) if window is None else window[1]
        kind = _KIND[self.reports.points.quantity[rows]]
        for index, kernel in enumerate(kernels):
            goals = np.flatnonzero((wanted.quantity >= 0) & (_KIND[wanted.quantity] == index))
            if not len(goals):
                continue
            own = rows[kind == index]
            given = _steered(self.reports.points.take(own), kernel.steering * wind[kind == index], moment)
            values = self.anomaly[own] - kernel.offsets * self.offset[own]
            errors = np.sqrt((kernel.error * self.error[own]) ** 2 + kernel.nugget**2)
            there = dataclasses.replace(wanted.take(goals), hours=np.full(len(goals), moment))
            count = (neighbours or cfg.neighbours) * (2 if index == 1 else 1)
            out[goals], _ = interpolate(kernel, given, values, errors, there, neighbours=count)
        return out

    def steering(self, rows: np.ndarray) -> np.ndarray:
        """Normal eastward wind in m/s that carries reports; 0 without winds aloft."""
        points = self.reports.points.take(rows)
        aloft = dataclasses.replace(
            points,
            quantity=np.ones(len(points), int),
            surface=np.zeros(len(points), bool),
            log_pressure=np.full(len(points), math.log(_STEERING)),
        )
        return np.nan_to_num(self.climate.normal(aloft))


def _steered(points: Points, wind: np.ndarray, moment: float) -> Points:
    metres = wind * (moment - points.hours) * 3600
    degrees = np.rad2deg(metres / (_RADIUS * 1e3 * np.cos(np.deg2rad(np.clip(points.latitude, -80, 80)))))
    return dataclasses.replace(points, longitude=points.longitude + degrees)


def _nominal(first: float, last: float, step: int, count: int) -> np.ndarray:
    """At most `count` hours since 1970 on multiples of `step`, evenly over [first, last]."""
    times = np.arange(math.ceil(first / step), math.floor(last / step) + 1) * float(step)
    if len(times) <= count:
        return times
    return times[np.unique(np.linspace(0, len(times) - 1, count).round().astype(int))]


def _left_out(standard: _Standard, fold: np.ndarray, moment: float, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Platforms of a fold, and rows of their reports at a time: within the hour for stations, three hours on for sondes
    on their way.
    """
    platforms = np.flatnonzero(fold == index)
    reports = standard.reports
    first, last = np.searchsorted(reports.points.hours, [moment - 0.01, moment + 3.0], side="left")
    rows = np.arange(first, last)
    rows = rows[np.isin(reports.platform[rows], platforms)]
    return platforms, rows[~reports.points.surface[rows] | (reports.points.hours[rows] < moment + 0.5)]


def _tune(
    standard: _Standard, cfg: GlobeConfig, times: np.ndarray, fold: np.ndarray, progress: bool
) -> tuple[tuple[Kernel, ...], dict[str, float]]:
    """Coordinate descent over the parameters of the kernels on the error at left-out platforms."""
    cases = [(moment, *_left_out(standard, fold, moment, i % _FOLDS)) for i, moment in enumerate(times)]
    windows = [standard.window(cfg, moment, platforms) for moment, platforms, _ in cases]
    windows = [(rows, standard.steering(rows)) for rows in windows]
    kernels = list(cfg.kernels)
    moves = {
        "length_km": (0.7, 1.4),
        "hours": (0.6, 1.7),
        "vertical": (0.65, 1.5),
        "nugget": (0.5, 2.0),
        "error": (0.6, 1.6),
        "family": ("gauss", "soar"),
        "steering": (0.0, 0.5, 1.0),
        "offsets": (0.0, 0.5, 1.0),
        "link": (0.5, 0.8, 1.0),
        "divergent": (0.02, 0.1, 0.3),
    }
    skill = {}
    for kind in tqdm(range(len(KINDS)), desc="tuning", disable=not progress):
        used = [name for name in moves if name != "divergent" or kind == 1]
        used = [name for name in used if kind != 2 or name not in ("vertical", "link")]

        def loss(kernel: Kernel, kind: int = kind) -> float:
            total, count = 0.0, 0
            tried = [*kernels[:kind], kernel, *kernels[kind + 1 :]]
            for (moment, _, rows), window in zip(cases, windows, strict=True):
                own = rows[_KIND[standard.reports.points.quantity[rows]] == kind]
                there = standard.reports.points.take(own)
                found = standard.analyse(tried, cfg, moment, there, window=window, neighbours=cfg.neighbours // 2)
                total += float(((standard.anomaly[own] - found) ** 2).sum())
                count += len(own)
            return math.sqrt(total / max(count, 1))

        best = loss(kernels[kind])
        for length in (300.0, 600.0, 1000.0, 1600.0, 2500.0):  # far from the right one the error is flat
            tried = dataclasses.replace(kernels[kind], length_km=length)
            error = loss(tried)
            if error < best:
                best, kernels[kind] = error, tried
        for _ in range(3):
            before = kernels[kind]
            for name in used:
                value = getattr(kernels[kind], name)
                for move in moves[name]:
                    scaled = name in ("length_km", "hours", "vertical", "nugget", "error")
                    tried = dataclasses.replace(kernels[kind], **{name: value * move if scaled else move})
                    if tried != kernels[kind]:
                        error = loss(tried)
                        if error < best * (1 - 1e-4):
                            best, kernels[kind] = error, tried
            if kernels[kind] == before:
                break
        skill[KINDS[kind]] = best
    return tuple(kernels), skill


def _class(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Level (0 for the surface) and band of latitude of points, for the damping."""
    level = np.where(points.surface, 0, 1 + np.abs(points.log_pressure[:, None] - _LEVELS).argmin(1))
    return level, np.searchsorted(_BANDS, np.abs(points.latitude))


def _fit_damping(
    standard: _Standard,
    cfg: GlobeConfig,
    kernels: Sequence[Kernel],
    times: np.ndarray,
    fold: np.ndarray,
    waves: tuple[_Wave, ...],
    progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Regression of the anomalies at left-out platforms on the interpolation at the initial time, alone and together
    with the vector autoregression: coefficients [quantity, level, band, lead] and the same [..., 2].
    """
    leads = (0, *cfg.leads)
    shape = (len(QUANTITIES), 1 + len(_LEVELS), len(_BANDS) + 1, len(leads))
    gram, moment = np.zeros((*shape, 2, 2)), np.zeros((*shape, 2))
    points = standard.reports.points
    for i, moment_ in enumerate(tqdm(times, desc="damping", disable=not progress)):
        rows = [_left_out(standard, fold, moment_ + lead, i % _FOLDS)[1] for lead in leads]
        which = np.repeat(np.arange(len(leads)), [len(part) for part in rows])
        every = np.concatenate(rows)
        level, band = _class(points.take(every))
        off = np.abs(points.log_pressure[every] - _LEVELS[np.maximum(level - 1, 0)])
        keep = (level == 0) | (off < 0.02)
        every, which, level, band = every[keep], which[keep], level[keep], band[keep]
        if not len(every):
            continue
        # One analysis per platform, quantity and level: a sonde's drift differs little from launch to launch.
        keys = np.stack([standard.reports.platform[every], points.quantity[every], level], 1)
        _, first, back = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        platforms = np.flatnonzero(fold == i % _FOLDS)
        x = np.zeros((len(every), 2))
        x[:, 0] = standard.analyse(kernels, cfg, moment_, points.take(every[first]), platforms)[back.ravel()]
        if waves:
            # The states leave the platforms out as well: with their own reports in it the grid would look too good.
            now, before = (_state(standard, kernels, cfg, when, platforms) for when in (moment_, moment_ - 12.0))
            for k, lead in enumerate(leads):
                fields = _wave_forecast(cfg, waves, now, before, lead)
                here = which == k
                x[here, 1] = _from_grid(cfg, fields, points.take(every[here]))
        key = (points.quantity[every], level, band, which)
        np.add.at(gram, key, x[:, :, None] * x[:, None, :])
        np.add.at(moment, key, x * standard.anomaly[every][:, None])
    damping = _shrunk(gram[..., :1, :1], moment[..., :1], leads)[..., 0]
    return np.clip(damping, 0.0, 1.5), _shrunk(gram, moment, leads)


def _shrunk(gram: np.ndarray, moment: np.ndarray, leads: Sequence[int]) -> np.ndarray:
    """Regression coefficients [quantity, level, band, lead, K], drawn to those of all bands, which are drawn to 0."""
    unit = np.eye(gram.shape[-1])
    pooled = gram.sum(2, keepdims=True)
    common = np.linalg.solve(pooled + 5.0 * unit, moment.sum(2, keepdims=True)[..., None])
    found = np.linalg.solve(gram + 20.0 * unit, moment[..., None] + 20.0 * common)[..., 0]
    found = np.where(pooled[..., :1, 0] > 20, found, np.nan)
    hours = np.asarray(leads, float)
    for index in np.ndindex(*found.shape[:3], found.shape[4]):  # leads at which no sonde flies
        line = found[(*index[:3], slice(None), index[3])]
        known = np.isfinite(line)
        found[(*index[:3], slice(None), index[3])] = np.interp(hours, hours[known], line[known]) if known.any() else 0.0
    return found


def _coefficients(table: np.ndarray, leads: Sequence[int], points: Points, lead: np.ndarray) -> np.ndarray:
    level, band = _class(points)
    return table[points.quantity, level, band, 1 + np.searchsorted(np.asarray(leads), lead)]


def _nearest(recent: Reports, climate: Climate, asked: Points, group: np.ndarray) -> np.ndarray:
    """Last anomaly of the nearest platform of the same sensor, variable and (within 2 %) pressure."""
    anomaly = recent.value - climate.normal(recent.points)
    from_, to = _nodes(recent.points).place, _nodes(asked).place
    out = np.full(len(asked), np.nan)
    for i in range(len(asked)):
        same = (recent.points.quantity == asked.quantity[i]) & (recent.points.surface == asked.surface[i])
        if group[i] in recent.sensors:
            same &= recent.sensor == recent.sensors.index(group[i])
        if not asked.surface[i]:
            same &= np.abs(recent.points.log_pressure - asked.log_pressure[i]) < 0.02
        rows = np.flatnonzero(same)
        if len(rows):
            close = from_[rows] @ to[i]
            nearest = rows[recent.platform[rows] == recent.platform[rows[close.argmax()]]]
            out[i] = anomaly[nearest[-1]]  # sorted by time
    return out


# ---- vector autoregression along latitude circles
def _grid(cfg: GlobeConfig) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = cfg.grid
    return np.rad2deg(np.arcsin((np.arange(rows) + 0.5) * 2 / rows - 1)), np.arange(columns) * 360.0 / columns


def _grid_points(cfg: GlobeConfig) -> tuple[Points, tuple[tuple[int, int], ...]]:
    """Points of all fields of the grid, field slowest, then latitude; and (quantity, level) of each field."""
    latitude, longitude = _grid(cfg)
    fields = [(q, 0) for q in range(4)] + [(q, level + 1) for level in range(len(_LEVELS)) for q in range(3)]
    shape = (len(fields), len(latitude), len(longitude))
    f, j, i = (x.ravel() for x in np.indices(shape))
    quantity, level = np.array(fields).T
    ground = math.log(_SURFACE_SIGMA * 101325.0)
    pressure = np.where(level[f] == 0, ground, np.concatenate([[0.0], _LEVELS])[level[f]])
    zeros = np.zeros(f.size)
    points = Points(zeros, latitude[j], longitude[i], zeros, pressure, quantity[f], level[f] == 0)
    return points, tuple((int(q), int(k)) for q, k in fields)


def _state(
    standard: _Standard,
    kernels: Sequence[Kernel],
    cfg: GlobeConfig,
    moment: float,
    without: np.ndarray | None = None,
) -> np.ndarray:
    """Fourier coefficients [waves + 1, field * latitude] of an analysis, that of all platforms but `without`."""
    points, fields = _grid_points(cfg)
    values = standard.analyse(kernels, cfg, moment, points, without, neighbours=cfg.grid_neighbours)
    values = values.reshape(len(fields), *cfg.grid)
    # No weights: the latitudes are even in their sine, so that all cells have one area.
    spectrum = np.fft.rfft(values, axis=-1)[..., : cfg.waves + 1] / cfg.grid[1]
    return spectrum.reshape(-1, cfg.waves + 1).T


def _fit_waves(
    cfg: GlobeConfig, analyses: dict[float, np.ndarray]
) -> tuple[tuple[_Wave, ...], dict[int, tuple[int, float]]]:
    steps = [lead for lead in cfg.leads if lead % cfg.grid_hours == 0]
    if not steps or 12 % cfg.grid_hours:
        raise BaselineError(f"grid_hours={cfg.grid_hours} must divide 12 and one of leads={cfg.leads}")
    times, states = np.array(list(analyses)), np.stack(list(analyses.values()))
    lag = 12 // cfg.grid_hours
    train = int(0.8 * len(times))
    chosen: dict[int, tuple[int, float]] = {}
    most = max(cfg.components)
    components = []
    for wave in range(cfg.waves + 1):
        _, _, basis = np.linalg.svd(states[:, wave], full_matrices=False)
        basis = basis.conj().T[:, :most]
        components.append((basis, states[:, wave] @ basis))
    waves = [_Wave(basis, {}) for basis, _ in components]
    for lead in steps:
        shift = lead // cfg.grid_hours
        start = np.arange(lag, len(times) - shift)
        early, late = start[start + shift < train], start[start >= train]
        errors = {}
        for count, penalty in itertools.product(cfg.components, cfg.penalties):
            total = 0.0
            for wave, (basis, scores) in enumerate(components):
                w = _ridge(scores, early, lag, shift, min(count, basis.shape[1]), penalty)
                guess = _inputs(scores, late, lag, min(count, basis.shape[1])) @ w
                actual = states[late + shift, wave]
                missed = actual - guess @ basis[:, : w.shape[1]].conj().T
                total += (1 if wave == 0 else 2) * float((np.abs(missed) ** 2).sum())
            errors[(count, penalty)] = total
        count, penalty = min(errors, key=errors.__getitem__)
        chosen[lead] = (count, penalty)
        for wave, (basis, scores) in enumerate(components):
            waves[wave].weights[lead] = _ridge(scores, start, lag, shift, min(count, basis.shape[1]), penalty)
    return tuple(waves), chosen


def _inputs(scores: np.ndarray, rows: np.ndarray, lag: int, count: int) -> np.ndarray:
    return np.concatenate([scores[rows, :count], scores[rows - lag, :count]], 1)


def _ridge(scores: np.ndarray, rows: np.ndarray, lag: int, shift: int, count: int, penalty: float) -> np.ndarray:
    x, y = _inputs(scores, rows, lag, count), scores[rows + shift, :count]
    gram = x.conj().T @ x
    level = penalty * float(np.real(np.diag(gram)).max(initial=1e-12))
    return np.linalg.solve(gram + level * np.eye(len(gram)), x.conj().T @ y)


def _wave_forecast(
    cfg: GlobeConfig, waves: tuple[_Wave, ...], now: np.ndarray, before: np.ndarray, lead: int
) -> np.ndarray:
    """Standardised anomalies [field, latitude, longitude]; leads between fitted ones are interpolated linearly, from
    the analysis itself at 0.
    """
    fitted = sorted(waves[0].weights)
    if not lead:
        return _grid_values(cfg, now)
    if lead not in fitted:
        low = max((step for step in fitted if step < lead), default=0)
        high = min((step for step in fitted if step > lead), default=low)
        share = 0.0 if high == low else (lead - low) / (high - low)
        one = _wave_forecast(cfg, waves, now, before, low) if low else _grid_values(cfg, now)
        return (1 - share) * one + share * _wave_forecast(cfg, waves, now, before, high)
    spectrum = np.empty_like(now)
    for wave, fit in enumerate(waves):
        weights = fit.weights[lead]
        basis = fit.basis[:, : weights.shape[1]]
        inputs = np.concatenate([now[wave] @ basis, before[wave] @ basis])
        spectrum[wave] = (inputs @ weights) @ basis.conj().T
    return _grid_values(cfg, spectrum)


def _grid_values(cfg: GlobeConfig, spectrum: np.ndarray) -> np.ndarray:
    values = np.fft.irfft(spectrum.T * cfg.grid[1], n=cfg.grid[1], axis=-1)
    return values.reshape(-1, *cfg.grid)


def _from_grid(cfg: GlobeConfig, fields: np.ndarray, points: Points) -> np.ndarray:
    """Bilinear interpolation of fields [field, latitude, longitude] to points, linear in ln(p) between levels."""
    latitude, longitude = _grid(cfg)
    x = np.clip(points.latitude, latitude[0], latitude[-1])
    j = np.clip(np.searchsorted(latitude, x, side="right") - 1, 0, len(latitude) - 2)
    a = (x - latitude[j]) / (latitude[j + 1] - latitude[j])
    position = (points.longitude % 360.0) / (360.0 / len(longitude))
    i = np.floor(position).astype(int)
    b = position - i
    i, i1 = i % len(longitude), (i + 1) % len(longitude)
    grid = fields.reshape(-1, len(latitude), len(longitude))

    def level(field):
        low = (1 - b) * grid[field, j, i] + b * grid[field, j, i1]
        return (1 - a) * low + a * ((1 - b) * grid[field, j + 1, i] + b * grid[field, j + 1, i1])

    surface = level(np.where(points.surface, points.quantity, 0))
    depth = np.clip(-points.log_pressure, -_LEVELS[0], -_LEVELS[-1])
    k = np.clip(np.searchsorted(-_LEVELS, depth, side="right") - 1, 0, len(_LEVELS) - 2)
    share = (depth + _LEVELS[k]) / (_LEVELS[k] - _LEVELS[k + 1])
    upper = np.where(points.surface, 0, points.quantity)
    last = len(grid) - 1
    aloft = (1 - share) * level(np.minimum(4 + 3 * k + upper, last))
    aloft = aloft + share * level(np.minimum(7 + 3 * k + upper, last))
    return np.where(points.surface, surface, aloft)
