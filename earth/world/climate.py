"""Climate normals over the globe: what each sensor reports on average at a point, and how much that varies.

    normal = fit_climate(reports, seed=0)            # on training reports only
    z = (value - mean) / sd;   mean, sd = climate(normal, latitude, longitude, height, view_angle, time, platform)

The mean is one ridge regression per variable on spherical harmonics, their products with polynomials of height and with
harmonics of the solar time, and for radiometers powers of the view angle (the limb is darker); fixed platforms keep
what their own reports add, shrunk by how many there are. A climate's spectrum is red: the penalty grows with the sixth
power of the degree, and its strength is the one that predicts left-out platforms best (left-out days, where there are
few platforms), so that normals of sparse networks carry to other places. The deviation comes from a regression of the
logarithm of the squared residual on zonal harmonics and height, chosen alike. `surface_pressure` is regressed divided
by the standard atmosphere's ratio at the height of the report. There is no yearly cycle: give a record shorter than a
season, or one without seasons (ours, and a limit).

Shapes: n reports, V variables, F features, P platforms.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float

from earth import geometry
from earth.geometry import Array
from earth.observations import EmptyWindowError, Reports
from moe.params import Param

DEGREE = 12
_HEIGHT_DEGREE, _HEIGHT_POWERS = 8, 5
_CLOCK_DEGREE = 3
_VIEW_DEGREE, _VIEW_POWERS = 4, 4
_SPREAD_DEGREE = 6
_ROWS = 60_000
_BLOCK = 40_000
_PSEUDO_REPORTS = 10.0
_LEAST_REPORTS = 50  # of a belt of latitude that says what is known of the cycle of local time
_LEAST_CYCLE = 0.1  # variance that makes a direction of it known; where all hours are reported it is 0.5
_FOLDS = 8
_DAYS = 5  # of a fold where platforms are few: longer than weather remembers
_STRENGTHS = tuple(10.0**k for k in np.arange(-8.0, 2.5, 0.5))
REDUCED = ("surface_pressure",)


@flax.struct.dataclass
class Climate:
    """The normal of one sensor.

    Attributes:
      mean: [F, V]; spread: [G, V] of the logarithm of the deviation.
      site: [P, V] what each fixed platform adds; zeros for sensors that move.
      centre, scale: [] of the height in m; view: [] largest view angle in degrees.
      reduced: [V] 1 where values are divided by the standard pressure ratio.
      clock: [4, 4] projection of the cycle of local time on what the reports know of it.
    """

    mean: Param
    spread: Param
    site: Param
    centre: Param
    scale: Param
    view: Param
    reduced: Param
    clock: Param


def _product(a: Any, b: Any) -> Any:
    return (a[..., :, None] * b[..., None, :]).reshape(*a.shape[:-1], -1)


def _zonal(degree: int) -> np.ndarray:
    return np.arange(degree + 1) ** 2  # where `harmonics` has them


def _features(climate: Climate, latitude, longitude, height, view_angle, time) -> tuple[Any, Any]:
    """(features of the mean [..., F], of the deviation [..., G]); `penalties` goes with them."""
    y = geometry.harmonics(latitude, longitude, DEGREE)
    z = jnp.clip((height - climate.centre) / climate.scale, -1.05, 1.05)
    chebyshev = [z, 2 * z * z - 1]
    while len(chebyshev) < _HEIGHT_POWERS:
        chebyshev.append(2 * z * chebyshev[-1] - chebyshev[-2])
    powers = jnp.stack(chebyshev, -1)
    clock = _cycle(time, longitude) @ climate.clock
    s = view_angle / climate.view
    view = jnp.stack([s**k for k in range(1, _VIEW_POWERS + 1)], -1)
    mean = [
        y,
        _product(y[..., : (_HEIGHT_DEGREE + 1) ** 2], powers),
        _product(y[..., : (_CLOCK_DEGREE + 1) ** 2], clock),
        _product(y[..., _zonal(_VIEW_DEGREE)], view),
    ]
    zonal = y[..., _zonal(_SPREAD_DEGREE)]
    return jnp.concatenate(mean, -1), jnp.concatenate([zonal, _product(zonal, powers)], -1)


def _cycle(time: Any, longitude: Any) -> Any:
    """[..., 4] first and second harmonic of local solar time."""
    solar = geometry.solar_angle(time, longitude)
    return jnp.stack([jnp.cos(solar), jnp.sin(solar), jnp.cos(2 * solar), jnp.sin(2 * solar)], -1)


def _known_cycle(latitude: np.ndarray, cycle: np.ndarray) -> np.ndarray:
    """[4, 4] projection of cycles [n, 4] on the directions in which the reports vary in every belt of latitude. A
    satellite that keeps its local time knows one of the four, between its two passes; the rest of a cycle fitted to it
    would be noise at all hours when it is elsewhere. Belts are joined by the mean of the inverses, which the one that
    knows least decides.
    """
    inverses = []
    for low, high in itertools.pairwise((-90.0, -30.0, 30.0, 90.0)):
        own = cycle[(latitude >= low) & (latitude <= high)]
        if len(own) >= _LEAST_REPORTS:
            inverses.append(np.linalg.inv(np.cov(own.T) + 1e-4 * np.eye(4)))
    if not inverses:
        return np.zeros((4, 4))
    spread, direction = np.linalg.eigh(np.mean(inverses, 0))  # of the inverse
    known = direction[:, 1.0 / spread >= _LEAST_CYCLE]
    return np.eye(4) if known.shape[1] == 4 else known @ known.T


def penalties() -> tuple[np.ndarray, np.ndarray]:
    """Relative penalties ([F], [G]) of `_features`: the inverse of the variance expected of each coefficient."""

    def smooth(degrees):
        return 1e-5 + (degrees * (degrees + 1) / 40.0) ** 3

    def bent(degrees):  # with height
        k = np.arange(1, _HEIGHT_POWERS + 1)
        return (smooth(degrees)[:, None] * (1 + k) + 1e-4 * k**2).ravel()

    y = geometry.harmonic_degrees(DEGREE)
    clock = 0.03 + smooth(y[y <= _CLOCK_DEGREE])[:, None] * np.array([1.0, 1.0, 2.0, 2.0])
    view = smooth(np.arange(_VIEW_DEGREE + 1))[:, None] + 1e-4 * np.arange(1, _VIEW_POWERS + 1)
    zonal = np.arange(_SPREAD_DEGREE + 1)
    mean = np.concatenate([smooth(y), bent(y[y <= _HEIGHT_DEGREE]), clock.ravel(), view.ravel()])
    return mean, np.concatenate([smooth(zonal), bent(zonal)])


def climate(
    normal: Climate,
    latitude: Float[Array, "*#n"],
    longitude: Float[Array, "*#n"],
    height: Float[Array, "*#n"],
    view_angle: Float[Array, "*#n"],
    time: Any,
    platform: Any = None,
) -> tuple[Float[Array, "*#n V"], Float[Array, "*#n V"]]:
    """(mean, standard deviation) at points, SI. `platform` indexes the platforms of the fit, -1 for others."""
    mean, spread = _features(normal, latitude, longitude, height, view_angle, time)
    value = mean @ normal.mean
    if platform is not None and normal.site.shape[0]:
        value = value + jnp.where((platform >= 0)[..., None], normal.site[jnp.maximum(platform, 0)], 0.0)
    ratio = 1.0 + normal.reduced * (geometry.standard_pressure_ratio(height)[..., None] - 1.0)
    return value * ratio, jnp.exp(spread @ normal.spread) * ratio


def pool(
    reports: Sequence[Reports], *, variables: Sequence[str] | None = None, rows: int = _ROWS, seed: int = 0
) -> Reports:
    """Reports of several sensors as one: for sensors that measure the same, whose normals one fit then shares (sondes
    say where the air is at any height, aircraft where nobody launches).

    Args:
      reports: of each sensor; heights as for `fit_climate`.
      variables: to keep, of sensors that have them; all by default.
      rows: drawn of each at most, so that a frequent sensor does not drown a rare one.
    """
    rng = np.random.default_rng(seed)
    known = dict.fromkeys(name for r in reports for name in r.variables)
    variables = tuple(name for name in known if variables is None or name in variables)
    parts: dict[str, list[np.ndarray]] = {
        k: [] for k in ("platform", "time", "latitude", "longitude", "height", "values", "view_angle")
    }
    platforms: list[str] = []
    for r in reports:
        own = np.sort(rng.choice(len(r), min(len(r), rows), replace=False))
        values = np.full((len(own), len(variables)), np.nan)
        for i, name in enumerate(variables):
            if name in r.variables:
                values[:, i] = r.values[own, r.variables.index(name)]
        parts["values"].append(values)
        parts["platform"].append(r.platform[own] + len(platforms))
        parts["view_angle"].append(np.zeros(len(own)) if r.view_angle is None else r.view_angle[own])
        for name in ("time", "latitude", "longitude", "height"):
            parts[name].append(getattr(r, name)[own])
        platforms += [f"{r.sensor}/{name}" for name in r.platforms]
    joined = {name: np.concatenate(part) for name, part in parts.items()}
    order = np.lexsort((joined["time"], joined["platform"]))
    joined = {name: part[order] for name, part in joined.items()}
    joined["platform"] = joined["platform"].astype(np.int32)
    return Reports(reports[0].sensor, variables, tuple(platforms), **joined)


def fit_climate(
    reports: Reports, *, sites: bool, joint: Climate | None = None, shared: Sequence[int] | None = None,
    rows: int = _ROWS, seed: int = 0,
) -> Climate:  # fmt: skip
    """The normal of one sensor's reports.

    Args:
      reports: training reports; heights must be finite (`earth.world.records`).
      sites: platforms stand still, and keep what their own reports add.
      joint: a normal whose mean some variables take, and but for sites its deviation.
      shared: [V] column of each variable there, -1 for those that are fitted here.
      rows: drawn at most.
      seed: of the rows drawn and of the folds.

    Raises:
      EmptyWindowError: no value of a variable.
    """
    rng = np.random.default_rng(seed)
    own = np.sort(rng.choice(len(reports), min(len(reports), rows), replace=False))
    v = len(reports.variables)
    counts = np.isfinite(reports.values).sum(0)
    if not counts.all():
        raise EmptyWindowError(
            f"{reports.sensor}: no value of {reports.variables[int(counts.argmin())]!r} in the training reports; "
            "leave the variable out"
        )
    height = reports.height[own]
    view = np.zeros(len(own)) if reports.view_angle is None else reports.view_angle[own]
    limit = max(float(np.abs(view).max(initial=0.0)), 1.0)
    centre, scale = float(height.min() + height.max()) / 2, max(float(np.ptp(height)) / 2, 100.0)
    reduced = np.array([name in REDUCED for name in reports.variables], np.float32)
    time = geometry.seconds(reports.times[own])
    theirs = np.full(v, -1) if shared is None else np.asarray(shared)
    if joint is None:
        empty = np.zeros((0, v), np.float32)
        cycle = np.asarray(_cycle(time, reports.longitude[own]))
        shell = Climate(
            empty, empty, empty, centre=np.float32(centre), scale=np.float32(scale), view=np.float32(limit),
            reduced=reduced, clock=_known_cycle(reports.latitude[own], cycle).astype(np.float32),
        )  # fmt: skip
    else:
        shell = dataclasses.replace(joint, reduced=reduced)
    at = [np.float32(x) for x in (reports.latitude[own], reports.longitude[own], height, view)]
    ratio = 1.0 + reduced * (np.asarray(geometry.standard_pressure_ratio(height))[:, None] - 1.0)
    values = reports.values[own] / ratio
    features, coarse = (np.asarray(part, np.float64) for part in _features(shell, at[0], at[1], at[2], at[3], time))
    fold = _folds(reports.platform[own], time, rng)
    smooth, coarse_smooth = penalties()
    mean = _filled(joint and joint.mean, theirs, lambda i: _ridge(features, values[:, i], smooth, fold))
    residual = values - features @ mean
    site = np.zeros((len(reports.platforms) if sites else 0, v))
    if sites:
        owner = reports.platform[own]
        for i in range(v):
            known = np.isfinite(residual[:, i])
            total = np.bincount(owner[known], residual[known, i], len(reports.platforms))
            count = np.bincount(owner[known], minlength=len(reports.platforms))
            site[:, i] = total / (count + _PSEUDO_REPORTS)
        residual = residual - site[owner]
    floor = 1e-4 * np.nanstd(residual, 0) + 1e-12

    def deviation(i):
        log = 0.5 * _ridge(coarse, np.log(residual[:, i] ** 2 + floor[i] ** 2), coarse_smooth, fold)
        # E log r^2 lies below log E r^2: one factor puts the mean square of the standardised residual at 1.
        log[0] += 0.5 * np.log(np.nanmean((residual[:, i] / np.exp(coarse @ log)) ** 2, 0) + 1e-12)
        return log

    spread = _filled(joint and joint.spread, np.full(v, -1) if sites else theirs, deviation)
    return dataclasses.replace(
        shell, mean=mean.astype(np.float32), spread=spread.astype(np.float32), site=site.astype(np.float32)
    )


def _filled(known: Any, column: np.ndarray, fit: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[F, V]: columns of `known` where there are (>= 0), the others fitted together."""
    own = np.flatnonzero(column < 0)
    found = fit(own) if len(own) else None
    length = len(known) if found is None else len(found)
    out = np.zeros((length, len(column)))
    if found is not None:
        out[:, own] = found
    if len(own) < len(column):
        out[:, column >= 0] = np.asarray(known, float)[:, column[column >= 0]]
    return out


def _folds(platform: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fold [n] of each report: whole platforms, or where they are fewer than twice the folds, blocks of days."""
    names, owner = np.unique(platform, return_inverse=True)
    if len(names) < 2 * _FOLDS:
        names, owner = np.unique(time // (_DAYS * 86400), return_inverse=True)
    return (rng.permutation(len(names)) % _FOLDS)[owner]


def _ridge(features: np.ndarray, targets: np.ndarray, penalty: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """[F, V] ridge coefficients; the strength of the penalty is chosen for each target by leaving folds out. The first
    feature is the constant and free, NaN targets are left out.
    """
    out = np.zeros((features.shape[1], targets.shape[1]))
    weight = np.where(np.arange(len(penalty)) == 0, 0.0, penalty)
    patterns, which = np.unique(np.isfinite(targets), axis=1, return_inverse=True)
    for pattern, rows in enumerate(patterns.T):  # targets that are missing together share every factorisation
        columns = np.flatnonzero(which.ravel() == pattern)
        y, count = targets[:, columns], rows.sum()
        offset = y[rows].mean(0)
        grams, moments, squares = [], [], []
        for f in np.unique(fold[rows]):
            own = rows & (fold == f)
            x, t = features[own], y[own] - offset
            grams.append(x.T @ x)
            moments.append(x.T @ t)
            squares.append((t * t).sum(0))
        gram, moment = np.sum(grams, 0), np.sum(moments, 0)

        def solve(a, b, strength, count=count):
            return scipy.linalg.solve(a + np.diag(count * (strength * weight + 1e-10)), b, assume_a="pos")

        errors = np.zeros((len(_STRENGTHS), len(columns)))
        for error, strength in zip(errors if len(grams) > 1 else (), _STRENGTHS, strict=False):
            for g, m, s in zip(grams, moments, squares, strict=True):
                w = solve(gram - g, moment - m, strength)
                error += (w * (g @ w - 2 * m)).sum(0) + s
        best = errors.argmin(0) if len(grams) > 1 else np.full(len(columns), len(_STRENGTHS) - 1)
        for k in np.unique(best):
            mine = best == k
            out[:, columns[mine]] = solve(gram, moment[:, mine], _STRENGTHS[k])
        out[0, columns] += offset
    return out


def standardise(normals: Mapping[str, Climate], reports: Mapping[str, Reports]) -> dict[str, tuple[Any, Any]]:
    """{sensor: (anomalies [n, V] in standard deviations, NaN missing; the deviations [n, V])}, in blocks."""
    out = {}
    for name, r in reports.items():
        z, sd = np.empty_like(r.values), np.empty_like(r.values)
        view = np.zeros(len(r)) if r.view_angle is None else r.view_angle
        owner = r.platform if normals[name].site.shape[0] else None
        for start in range(0, len(r), _BLOCK):
            rows = slice(start, start + _BLOCK)
            at: Any = [x[rows].astype(np.float32) for x in (r.latitude, r.longitude, r.height, view)]
            time, site = geometry.seconds(r.times[rows]), None if owner is None else owner[rows]
            mean, deviation = climate(normals[name], at[0], at[1], at[2], at[3], time, site)
            z[rows] = (r.values[rows] - np.asarray(mean)) / np.asarray(deviation)
            sd[rows] = deviation
        out[name] = (z, sd)
    return out
