"""The climate normal: expected value and spread of every variable at any position, season and hour, fitted on training
data in closed form.

The model works on standardised anomalies about it. A site with a record of its own (its *profile*, which is an input:
the coefficients of that site's own past observations) gets exactly its own normal; any other point gets a background
regressed on position plus the neighbouring sites' departures from that background. Height enters through physics where
it is known: temperature about the standard lapse rate, pressure as a ratio to the standard atmosphere, so that a summit
above every training station is extrapolated by physics and not by a polynomial.

All of this is ours: the paper's treatment of climatology is not public. Shapes: P sites, V variables, K harmonics, G
position features, Q points.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from earth import geometry
from earth.geometry import Array
from earth.observations import EmptyWindowError, Reports
from earth.sensors import describe
from moe.params import Param

# Standard lapse; the dew point's is the same at constant relative humidity times (Td/T)^2, about 0.93.
_LAPSE = {"air_temperature": -6.5e-3, "dew_point_temperature": -6.0e-3}
_PRESSURE = ("surface_air_pressure", "air_pressure")
_RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
_REACH_KM = (20.0, 60.0, 200.0)
_HEIGHT_KM_PER_KM = 100.0  # one km of height counts as this much horizontal distance between sites
_SAME_SITE_KM = 0.3
_BOUNDARY_LAYER_M = 1000.0  # the daily cycle's dependence on height saturates above it


@flax.struct.dataclass
class Normal:
    """Climate normal of one stream.

    Attributes:
      latitude, longitude, height: [P] sites with a record of their own.
      site: [P, V, K] their harmonic coefficients minus the background, after the height reduction.
      known: [P, V] 1 where the site has a record of the variable.
      site_log_sd: [P, V] log standard deviation of the anomaly minus the background's.
      background: [V, G, K] coefficients on position features; log_sd: [V, G].
      lapse: [V] K m-1 removed before fitting; ratio: [V] 1 where values are divided by the standard pressure ratio.
      centre, extent: [3] latitude, longitude, height scales of the position features.
      reach_km: [] distance at which a neighbouring site's departure has lost half its weight to the background.
    """

    latitude: Param  # [P]
    longitude: Param  # [P]
    height: Param  # [P]
    site: Param  # [P, V, K]
    known: Param  # [P, V]
    site_log_sd: Param  # [P, V]
    background: Param  # [V, G, K]
    log_sd: Param  # [V, G]
    lapse: Param  # [V]
    ratio: Param  # [V]
    centre: Param  # [3]
    extent: Param  # [3]
    reach_km: Param  # []
    annual: int = flax.struct.field(pytree_node=False)
    daily: int = flax.struct.field(pytree_node=False)
    wide: bool = flax.struct.field(pytree_node=False)


def normal_coefficients(
    normal: Normal, latitude: Float[Array, "*#b Q"], longitude: Float[Array, "*#b Q"], height: Float[Array, "*#b Q"]
) -> tuple[Float[Array, "*#b Q V K"], Float[Array, "*#b Q V"]]:
    """Harmonic coefficients (reduced to sea level) and log standard deviation at positions.

    Split from `normal_values` because positions repeat over times: evaluate once, use at every hour.
    """
    g_season, g_daily = _position_features(normal, latitude, longitude, height)
    season = jnp.arange(normal.background.shape[-1]) % (1 + 2 * normal.daily) == 0  # annual-only harmonics
    coefficients = jnp.where(
        season,
        jnp.einsum("...g,vgk->...vk", g_season, normal.background),
        jnp.einsum("...g,vgk->...vk", g_daily, normal.background),
    )
    log_sd = jnp.einsum("...g,vg->...v", g_daily, normal.log_sd)
    weight = _site_weights(normal, latitude, longitude, height)  # [..., Q, P]
    per_variable = weight[..., None] * normal.known
    far = 1.0 / (normal.reach_km**4)
    total = per_variable.sum(-2, keepdims=True) + far
    share = per_variable / total
    coefficients = coefficients + jnp.einsum("...pv,pvk->...vk", share, normal.site)
    log_sd = log_sd + jnp.einsum("...pv,pv->...v", share, normal.site_log_sd)
    return coefficients, log_sd


def normal_values(
    normal: Normal, coefficients: Float[Array, "*#b V K"], height: Float[Array, "*#b"], time: Int[Array, "..."]
) -> Float[Array, "... V"]:
    """Expected value in SI at the positions of `coefficients` and at `time` (broadcast against [*b, Q])."""
    harmonics = geometry.seasonal_features(time, annual=normal.annual, daily=normal.daily)
    value = jnp.einsum("...vk,...k->...v", coefficients, harmonics) + normal.lapse * height[..., None]
    return value * reduction(normal, height)


def reduction(normal: Normal, height: Float[Array, "*#n"]) -> Float[Array, "*#n V"]:
    """Factor by which a reduced value is multiplied at a height: the standard pressure ratio for pressures, else 1."""
    return jnp.where(normal.ratio > 0, geometry.standard_pressure_ratio(height)[..., None], 1.0)


def _site_weights(normal: Normal, latitude, longitude, height):
    d = geometry.distance_km(latitude, longitude, normal.latitude, normal.longitude)
    dz = (height[..., :, None] - normal.height) / 1000.0 * _HEIGHT_KM_PER_KM
    return 1.0 / (d**2 + dz**2 + _SAME_SITE_KM**2) ** 2


def _position_features(normal: Normal, latitude, longitude, height):
    """(for seasonal harmonics: linear in height, for daily ones: saturating), each [..., G]."""
    saturated = _BOUNDARY_LAYER_M * (1 - jnp.exp(-jnp.maximum(height, 0.0) / _BOUNDARY_LAYER_M))
    out = []
    for z in (height, saturated):
        z = (z - normal.centre[2]) / normal.extent[2]
        if not normal.wide:
            lat = (latitude - normal.centre[0]) / normal.extent[0]
            lon = (longitude - normal.centre[1]) / normal.extent[1]
            out.append(jnp.stack([jnp.ones_like(z), lat, lon, z], -1))
            continue
        x, y, s = jnp.moveaxis(geometry.unit_vector(latitude, longitude), -1, 0)
        zonal = [jnp.ones_like(z), s, s**2, s**3, s**4, s**6]
        terms = (
            zonal
            + [x, y, x * s, y * s, x * y, x**2 - y**2]
            + [z * t for t in zonal]
            + [z**2 * t for t in zonal]
            + [z**3]
        )
        out.append(jnp.stack(terms, -1))
    return tuple(out)


def fit_normal(
    reports: Reports, variables: Sequence[str], train: np.ndarray, *, annual: int, daily: int, moving: bool
) -> Normal:
    """Fit the normal of a stream on training reports.

    Args:
      reports: the stream's record; heights must be finite (the windows put unknown heights at 0 m and say so).
      variables: V columns of it.
      train: bool [n], the reports to fit on.
      annual, daily: harmonics of year and day (fewer for short or coarse records).
      moving: True fits the background straight on the values (soundings, aircraft); False goes through each site's own
        normal.

    Raises:
      EmptyWindowError: a variable has no training value at all; the message names it.
    """
    columns = reports.index(variables)
    y_all = np.asarray(reports.values[:, columns], np.float64)
    rows = np.asarray(train, bool) & np.isfinite(y_all).any(1)
    empty = [v for v, ok in zip(variables, np.atleast_1d(np.isfinite(y_all[rows]).any(0)), strict=True) if not ok]
    if empty or not rows.any():
        raise EmptyWindowError(
            f"no training value of {empty or list(variables)}; drop the variable or widen the training period"
        )
    names = [describe(v) for v in variables]
    lapse = np.array([_LAPSE.get(n.standard_name or "", 0.0) for n in names])
    ratio = np.array([float((n.standard_name or "") in _PRESSURE) for n in names])
    z = reports.height[rows]
    factor = np.where(ratio > 0, np.asarray(geometry.standard_pressure_ratio(z))[:, None], 1.0)
    y = y_all[rows] / factor - lapse * z[:, None]
    lat, lon = reports.latitude[rows], reports.longitude[rows]
    time = geometry.seconds(reports.times[rows])
    wide = bool(np.ptp(lat) > 25 or np.ptp(lon) > 40)
    shell = Normal(
        *(jnp.zeros(0) for _ in range(3)),
        site=jnp.zeros((0, len(names), 1)),
        known=jnp.zeros((0, len(names))),
        site_log_sd=jnp.zeros((0, len(names))),
        background=jnp.zeros(0),
        log_sd=jnp.zeros(0),
        lapse=jnp.asarray(lapse, jnp.float32),
        ratio=jnp.asarray(ratio, jnp.float32),
        centre=jnp.asarray([lat.mean(), lon.mean(), 0.0 if moving else z.mean()], jnp.float32),
        extent=jnp.asarray([max(lat.std(), 0.1), max(lon.std(), 0.1), max(z.std(), 100.0)], jnp.float32),
        reach_km=jnp.asarray(60.0),
        annual=annual,
        daily=daily,
        wide=wide,
    )
    harmonics = np.asarray(geometry.seasonal_features(jnp.asarray(time), annual=annual, daily=daily), np.float64)
    if moving:
        return _fit_moving(shell, y, factor, harmonics, lat, lon, z)
    return _fit_sites(shell, y, factor, harmonics, reports.platform[rows], lat, lon, z)


def _fit_moving(shell, y, factor, harmonics, lat, lon, z):
    g, g_daily = (
        np.asarray(f, np.float64)
        for f in _position_features(shell, *(jnp.asarray(a, jnp.float32) for a in (lat, lon, z)))
    )
    season = np.arange(harmonics.shape[1]) % (1 + 2 * shell.daily) == 0
    design = np.concatenate(
        [(g if s else g_daily)[:, :, None] * harmonics[:, None, k, None] for k, s in enumerate(season)], -1
    )
    design = design.reshape(len(y), -1)  # [n, G K]
    background, log_sd = [], []
    for v in range(y.shape[1]):
        ok = np.isfinite(y[:, v])
        w = _ridge(design[ok], y[ok, v : v + 1], 1e-3 * ok.sum() * np.r_[0.0, np.ones(design.shape[1] - 1)] * 1e-2)
        residual = (y[ok, v] - design[ok] @ w[:, 0]) * factor[ok, v]
        half_log = np.log(np.abs(residual) + 1e-6 * residual.std() + 1e-12) + 0.6352  # E log|N(0,1)| = -0.6352
        log_sd.append(
            _ridge(g_daily[ok], half_log[:, None], 1e-2 * ok.sum() * np.r_[0.0, np.ones(g.shape[1] - 1)])[:, 0]
        )
        background.append(w.reshape(g.shape[1], -1))
    one = jnp.zeros(1)
    return dataclasses.replace(
        shell, latitude=one, longitude=one, height=one, site=jnp.zeros((1, y.shape[1], harmonics.shape[1])),
        known=jnp.zeros((1, y.shape[1])), site_log_sd=jnp.zeros((1, y.shape[1])),
        background=jnp.asarray(np.stack(background), jnp.float32), log_sd=jnp.asarray(np.stack(log_sd), jnp.float32),
    )  # fmt: skip


def _fit_sites(shell, y, factor, harmonics, platform, lat, lon, z):
    ids, first = np.unique(platform, return_index=True)
    p, v, k = len(ids), y.shape[1], harmonics.shape[1]
    coefficients, log_sd, known = np.zeros((p, v, k)), np.zeros((p, v)), np.zeros((p, v))
    for i in range(p):
        mine = slice(first[i], first[i + 1] if i + 1 < p else len(y))  # reports are sorted by platform
        for j in range(v):
            ok = np.isfinite(y[mine, j])
            if ok.sum() < max(3 * k, 24):
                continue
            x, target = harmonics[mine][ok], y[mine, j][ok]
            w = np.linalg.solve(x.T @ x + 1e-3 * np.eye(k), x.T @ target)
            sd = ((target - x @ w) * factor[mine, j][ok]).std()
            coefficients[i, j], log_sd[i, j], known[i, j] = w, np.log(max(sd, 1e-12)), float(sd > 0)
    where = tuple(jnp.asarray(a[first], jnp.float32) for a in (lat, lon, z))
    g_season, g_daily = (np.asarray(f, np.float64) for f in _position_features(shell, *where))
    season = np.arange(k) % (1 + 2 * shell.daily) == 0
    best = None
    for ridge in _RIDGES:
        background, sd_background, held = _regress(g_season, g_daily, season, coefficients, log_sd, known, ridge)
        for reach in _REACH_KM:
            trial = dataclasses.replace(
                shell, latitude=where[0], longitude=where[1], height=where[2], known=jnp.asarray(known, jnp.float32),
                reach_km=jnp.asarray(reach, jnp.float32),
            )  # fmt: skip
            weight = np.array(_site_weights(trial, *where), np.float64)
            np.fill_diagonal(weight, 0.0)
            share = weight[:, :, None] * known
            share /= share.sum(1, keepdims=True) + reach**-4
            # Leave one site out: background without it, neighbours' departures from their own left-out backgrounds.
            error = (held - np.einsum("qpv,pvk->qvk", share, held)) * known[..., None]
            cost = (error**2).sum((0, 2)) / np.maximum((coefficients.var(0)).sum(-1), 1e-12)
            if best is None or cost.mean() < best[0]:
                best = (cost.mean(), reach, background, sd_background)
    assert best is not None
    _, reach, background, sd_background = best
    fit = np.where(
        season, np.einsum("pg,vgk->pvk", g_season, background), np.einsum("pg,vgk->pvk", g_daily, background)
    )
    site = np.where(known[..., None] > 0, coefficients - fit, 0.0)
    site_sd = np.where(known > 0, log_sd - g_daily @ sd_background.T, 0.0)
    return dataclasses.replace(
        shell, latitude=where[0], longitude=where[1], height=where[2], reach_km=jnp.asarray(reach, jnp.float32),
        **{n: jnp.asarray(a, jnp.float32) for n, a in (("site", site), ("known", known), ("site_log_sd", site_sd),
                                                       ("background", background), ("log_sd", sd_background))},
    )  # fmt: skip


def _ridge(x: np.ndarray, y: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    return np.linalg.solve(x.T @ x + np.diag(penalty + 1e-9 * len(x)), x.T @ y)


def _regress(g_season, g_daily, season, coefficients, log_sd, known, ridge):
    """Ridge of site coefficients on position, and the leave-one-out residuals by the hat matrix."""
    p, v, k = coefficients.shape
    g = g_season.shape[1]
    background, sd_background = np.zeros((v, g, k)), np.zeros((v, g))
    held = np.zeros((p, v, k))
    penalty = ridge * np.r_[0.0, np.ones(g - 1)]
    for j in range(v):
        ok = known[:, j] > 0
        if not ok.any():
            continue
        for columns, features in ((season, g_season), (~season, g_daily)):
            x = features[ok]
            inverse = np.linalg.inv(x.T @ x + np.diag(penalty + 1e-6))
            y = coefficients[ok, j][:, columns]
            w = inverse @ x.T @ y
            background[j][:, columns] = w
            leverage = np.clip(np.einsum("pg,gh,ph->p", x, inverse, x), 0.0, 0.95)
            block = np.zeros((p, int(columns.sum())))
            block[ok] = (y - x @ w) / (1 - leverage)[:, None]
            held[:, j, columns] = block
        # The spread varies less than the mean with position: a constant and the sites' own departures carry it.
        sd_background[j, 0] = log_sd[ok, j].mean()
    return background, sd_background, held


def standardise(
    normal: Normal, values: Float[Array, "*#b Q V"], latitude, longitude, height, time: Int[Array, "*#b Q"]
) -> Float[Array, "*#b Q V"]:
    """SI values -> standardised anomalies; NaN stays NaN."""
    coefficients, log_sd = normal_coefficients(normal, latitude, longitude, height)
    return (values - normal_values(normal, coefficients, height, time)) * jnp.exp(-log_sd)


def standardise_reports(
    normal: Normal, reports: Reports, variables: Sequence[str], *, chunk: int = 65536
) -> np.ndarray:
    """Standardised anomalies [n, V] float32 of a whole record, on the host in chunks."""
    columns = reports.index(variables)
    run = jax.jit(standardise)
    time = geometry.seconds(reports.times)
    out = np.empty((len(reports), len(variables)), np.float32)
    for start in range(0, len(reports), chunk):
        part = slice(start, min(start + chunk, len(reports)))
        pad = (0, chunk - (part.stop - part.start))
        values = np.pad(reports.values[part][:, columns], (pad, (0, 0)))
        args = [
            np.pad(np.asarray(a[part], np.float32), pad) for a in (reports.latitude, reports.longitude, reports.height)
        ]
        result = run(normal, values, *args, np.pad(time[part], pad))
        out[part] = np.asarray(result)[: part.stop - part.start]
    return out
