"""Climate normals over the globe: what each sensor reports on average at a point, and how much that varies.

    normal = fit_climate(reports, seed=0)            # on training reports only
    z = (value - mean) / sd;   mean, sd = climate(normal, latitude, longitude, height, view_angle, time, platform)

The mean is one ridge regression per variable on spherical harmonics, their products with height and with harmonics of
the solar time, and for radiometers powers of the view angle (the limb is darker); fixed platforms keep what their own
reports add, shrunk by how many there are. The deviation comes from a regression of the logarithm of the squared
residual on the coarser of the same features. `surface_pressure` is regressed divided by the standard atmosphere's ratio
at the height of the report. There is no yearly cycle: give a record shorter than a season, or one without seasons
(ours, and a limit).

Shapes: n reports, V variables, F features, P platforms.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from earth import geometry
from earth.geometry import Array
from earth.observations import EmptyWindowError, Reports
from moe.params import Param

DEGREE = 8
_HEIGHT_DEGREE, _HEIGHT_POWERS = 4, 4
_CLOCK_DEGREE = 2
_VIEW_DEGREE, _VIEW_POWERS = 4, 4
_SPREAD_DEGREE = 4
_ROWS = 60_000
_PSEUDO_REPORTS = 10.0
REDUCED = ("surface_pressure",)


@flax.struct.dataclass
class Climate:
    """The normal of one sensor.

    Attributes:
      mean: [F, V]; spread: [G, V] of the logarithm of the deviation.
      site: [P, V] what each fixed platform adds; zeros for sensors that move.
      centre, scale: [] of the height in m; view: [] largest view angle in degrees.
      reduced: [V] 1 where values are divided by the standard pressure ratio.
    """

    mean: Param
    spread: Param
    site: Param
    centre: Param
    scale: Param
    view: Param
    reduced: Param


def harmonics(latitude: Float[Array, "*#n"], longitude: Float[Array, "*#n"], degree: int) -> Float[Array, "*#n K"]:
    """Real spherical harmonics to `degree`, K = (degree + 1)^2, normalised to a mean square of 1 on the sphere."""
    x = jnp.sin(jnp.deg2rad(latitude))
    c = jnp.cos(jnp.deg2rad(latitude))
    lon = jnp.deg2rad(longitude)
    legendre: dict[tuple[int, int], Any] = {(0, 0): jnp.ones_like(x)}
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
            parts += [legendre[n, m] * jnp.cos(m * lon), legendre[n, m] * jnp.sin(m * lon)]
    return jnp.stack(parts, -1)


def _features(climate: Climate, latitude, longitude, height, view_angle, time) -> tuple[Any, Any]:
    """(features of the mean [..., F], of the deviation [..., G])."""
    y = harmonics(latitude, longitude, DEGREE)
    z = jnp.clip((height - climate.centre) / climate.scale, -2.0, 2.0)
    powers = jnp.stack([z**k for k in range(1, _HEIGHT_POWERS + 1)], -1)
    _, utc = geometry._angles(time)
    solar = utc + jnp.deg2rad(longitude)
    clock = jnp.stack([jnp.cos(solar), jnp.sin(solar), jnp.cos(2 * solar), jnp.sin(2 * solar)], -1)
    s = view_angle / climate.view
    view = jnp.stack([s**k for k in range(1, _VIEW_POWERS + 1)], -1)
    zonal = [n * n for n in range(DEGREE + 1)]

    def product(a, b):
        return (a[..., :, None] * b[..., None, :]).reshape(*a.shape[:-1], -1)

    low = y[..., : (_HEIGHT_DEGREE + 1) ** 2]
    mean = [
        y,
        product(low, powers),
        product(y[..., : (_CLOCK_DEGREE + 1) ** 2], clock),
        product(y[..., np.array(zonal[: _VIEW_DEGREE + 1])], view),
    ]
    coarse = y[..., : (_SPREAD_DEGREE + 1) ** 2]
    return jnp.concatenate(mean, -1), jnp.concatenate([coarse, product(y[..., np.array(zonal[:5])], powers)], -1)


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


def fit_climate(reports: Reports, *, sites: bool, seed: int = 0) -> Climate:
    """The normal of one sensor's reports.

    Args:
      reports: training reports; heights must be finite (`earth.world.records`).
      sites: platforms stand still, and keep what their own reports add.
      seed: of the rows drawn, at most 60,000.

    Raises:
      EmptyWindowError: no value of a variable.
    """
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(reports), min(len(reports), _ROWS), replace=False))
    v = len(reports.variables)
    counts = np.isfinite(reports.values).sum(0)
    if not counts.all():
        raise EmptyWindowError(
            f"{reports.sensor}: no value of {reports.variables[int(counts.argmin())]!r} in the training reports; "
            "leave the variable out"
        )
    height = reports.height[rows]
    view = np.zeros(len(rows)) if reports.view_angle is None else reports.view_angle[rows]
    limit = max(float(np.abs(view).max(initial=0.0)), 1.0)
    centre, scale = float(height.mean()), max(float(np.abs(height - height.mean()).max()), 100.0)
    reduced = np.array([name in REDUCED for name in reports.variables], np.float32)
    shell = Climate(
        *(np.zeros((0, v), np.float32) for _ in range(3)),
        centre=np.float32(centre), scale=np.float32(scale), view=np.float32(limit), reduced=reduced,
    )  # fmt: skip
    time = geometry.seconds(reports.times[rows])
    at = [np.float32(x) for x in (reports.latitude[rows], reports.longitude[rows], height, view)]
    ratio = 1.0 + reduced * (np.asarray(geometry.standard_pressure_ratio(height))[:, None] - 1.0)
    values = reports.values[rows] / ratio
    features, coarse = (np.asarray(part, np.float64) for part in _features(shell, at[0], at[1], at[2], at[3], time))
    mean = _ridge(features, values, 1e-4)
    residual = values - features @ mean
    site = np.zeros((len(reports.platforms) if sites else 0, v))
    if sites:
        owner = reports.platform[rows]
        for i in range(v):
            known = np.isfinite(residual[:, i])
            total = np.bincount(owner[known], residual[known, i], len(reports.platforms))
            count = np.bincount(owner[known], minlength=len(reports.platforms))
            site[:, i] = total / (count + _PSEUDO_REPORTS)
        residual = residual - site[owner]
    floor = 1e-4 * np.nanstd(residual, 0) + 1e-12
    spread = 0.5 * _ridge(coarse, np.log(residual**2 + floor**2), 1e-3)
    # E log r^2 lies below log E r^2: one factor puts the mean square of the standardised residual at 1.
    spread[0] += 0.5 * np.log(np.nanmean((residual / np.exp(coarse @ spread)) ** 2, 0) + 1e-12)
    return dataclasses.replace(
        shell, mean=mean.astype(np.float32), spread=spread.astype(np.float32), site=site.astype(np.float32)
    )


def _ridge(features: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    """[F, V] ridge coefficients, the penalty in units of the mean square of the features; the constant is free, NaN
    targets are left out. Variables that miss the same rows share a factorisation.
    """
    known = np.isfinite(targets)
    out = np.zeros((features.shape[1], targets.shape[1]))
    patterns, which = np.unique(known, axis=1, return_inverse=True)
    for i in range(patterns.shape[1]):
        columns = np.flatnonzero(which.ravel() == i)
        rows = patterns[:, i]
        x, y = features[rows], targets[np.ix_(rows, columns)]
        gram = x.T @ x / len(x)
        size = np.trace(gram) / len(gram)
        weight = np.full(len(gram), penalty * size)
        weight[0] = 0.0
        out[:, columns] = np.linalg.solve(gram + np.diag(weight + 1e-9 * size), x.T @ y / len(x))
    return out


def standardise(normals: Mapping[str, Climate], reports: Mapping[str, Reports]) -> dict[str, tuple[Any, Any]]:
    """{sensor: (anomalies [n, V] in standard deviations, NaN missing; the deviations [n, V])}, in blocks."""
    out = {}
    for name, r in reports.items():
        z, sd = np.empty_like(r.values), np.empty_like(r.values)
        view = np.zeros(len(r)) if r.view_angle is None else r.view_angle
        owner = r.platform if normals[name].site.shape[0] else None
        for start in range(0, len(r), 100_000):
            rows = slice(start, start + 100_000)
            at: Any = [x[rows].astype(np.float32) for x in (r.latitude, r.longitude, r.height, view)]
            time, site = geometry.seconds(r.times[rows]), None if owner is None else owner[rows]
            mean, deviation = climate(normals[name], at[0], at[1], at[2], at[3], time, site)
            z[rows] = (r.values[rows] - np.asarray(mean)) / np.asarray(deviation)
            sd[rows] = deviation
        out[name] = (z, sd)
    return out
