"""Verification: scores of point forecasts against station reports, with block-bootstrap intervals.

Two layers. Pure functions on arrays return one value per forecast (`crps_gaussian`, `pit_gaussian`, ...); the caller
reduces. `score` and `compare` take forecast Datasets (dims init_time, lead_time, station) and a record, and return tidy
tables in the units of the user's file.

Missing values: a missing observation or forecast is never scored and never spoils another; the number scored (`n`) and
the number of observations without a forecast (`n_unforecast`) stand beside every score.

Intervals: blocks of whole test intervals (weeks), because errors of one week are not independent. All statistics are
sums over blocks, so a bootstrap draw only re-weights the blocks. With few blocks (stations-v1 has six) percentile
intervals are too narrow; read them as a lower bound of the uncertainty. Paired comparisons (`compare`) re-weight both
forecasts alike and are much sharper.

Sources: CRPS of a Gaussian and of an ensemble, Gneiting & Raftery 2007 (JASA 102, 359) eq. 21 and 20; fair ensemble
CRPS, Ferro 2014 (QJRMS 140, 1917); spread-error relation for finite ensembles, Fortin et al. 2014 (J. Hydrometeor. 15,
1708).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy import special

from earth import sensors
from earth.export import SPREAD, forecast_variables, lead_hours_of
from earth.protocol import Protocol, utc_times

Array = Any  # whatever np.asarray takes
Score = np.ndarray | np.floating


class VerificationError(ValueError):
    """Forecasts and observations that cannot be compared; the message names the value and the remedy."""


# ---- one value per forecast
def crps_gaussian(mean: Array, spread: Array, observed: Array) -> np.ndarray:
    """Continuous ranked probability score of a Gaussian, un-reduced, in the units of the variable.

    ``s [z (2 Phi(z) - 1) + 2 phi(z) - 1/sqrt(pi)]``, z = (observed - mean)/s; its limit |observed - mean| at s = 0.

    Args:
      mean, spread, observed: arrays that broadcast; spread is the standard deviation, >= 0.

    Returns:
      Array of the broadcast shape, NaN where an argument is NaN.
    """
    mean, spread, observed = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (mean, spread, observed)))
    if np.nanmin(spread, initial=0.0) < 0:
        raise VerificationError(f"spread has negative values such as {np.nanmin(spread)}; pass standard deviations")
    error = observed - mean
    safe = np.where(spread > 0, spread, 1.0)
    z = error / safe
    density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    value = safe * (z * special.erf(z / np.sqrt(2)) + 2 * density - 1 / np.sqrt(np.pi))
    return np.where(spread == 0, np.abs(error), np.where(np.isnan(spread), np.nan, value))


def crps_ensemble(members: Array, observed: Array, *, axis: int = 0, fair: bool = True) -> Score:
    """Continuous ranked probability score of an ensemble, un-reduced.

    ``mean |x_i - y| - sum_ij |x_i - x_j| / (2 M (M - 1))``; with fair=False the divisor is ``2 M^2``, the score of the
    members' step function itself. The fair form's expectation does not depend on M when members are drawn from one
    distribution.

    Args:
      members: float array with M members along `axis`.
      observed: array of the shape of `members` without `axis`.
      axis: the member axis.
      fair: see above; needs M >= 2.

    Returns:
      Array of observed's shape; NaN where a member or the observation is NaN.
    """
    x = np.sort(np.moveaxis(np.asarray(members, np.float64), axis, -1), axis=-1)
    m = x.shape[-1]
    if fair and m < 2:
        raise VerificationError(f"the fair CRPS needs at least two members, got {m}; pass fair=False for a single one")
    skill = np.abs(x - np.asarray(observed, np.float64)[..., None]).mean(-1)
    # sum_ij |x_i - x_j| = 2 sum_k (2k - M - 1) x_(k) over sorted members: M log M instead of M^2.
    pairs = 2 * (x * (2 * np.arange(1, m + 1) - m - 1)).sum(-1)
    return skill - pairs / (2 * m * (m - 1 if fair else m))


def pit_gaussian(mean: Array, spread: Array, observed: Array) -> np.ndarray:
    """Probability integral transform Phi((observed - mean)/spread), un-reduced; uniform on [0, 1] for a calibrated
    forecast.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return special.ndtr((np.asarray(observed, np.float64) - mean) / spread)


def ensemble_rank(members: Array, observed: Array, *, rng: np.random.Generator, axis: int = 0) -> np.ndarray:
    """Rank of the observation among M members, 0..M, ties broken at random; float so that NaN marks a missing value."""
    x = np.moveaxis(np.asarray(members, np.float64), axis, -1)
    y = np.asarray(observed, np.float64)[..., None]
    below, ties = (x < y).sum(-1), (x == y).sum(-1)
    rank = (below + rng.integers(0, ties + 1)).astype(np.float64)
    return np.where(np.isnan(x).any(-1) | np.isnan(y[..., 0]), np.nan, rank)


def inside_interval(mean: Array, spread: Array, observed: Array, *, level: int | float = 0.9) -> np.ndarray:
    """1.0 where the central Gaussian interval of probability `level` holds the observation, 0.0 where not, NaN where
    something is missing.
    """
    if not 0 < level < 1:
        raise VerificationError(f"level {level} must lie strictly between 0 and 1, e.g. 0.9")
    error = np.abs(np.asarray(observed, np.float64) - mean)
    bound = special.ndtri(0.5 + level / 2) * np.asarray(spread, np.float64)
    return np.where(np.isnan(error) | np.isnan(bound), np.nan, (error <= bound).astype(np.float64))


# ---- reductions
def masked_mean(x: Array, *, axis: Any = None, where: Array | None = None) -> Score:
    """Mean over `axis` of the finite values where `where`; NaN (without a warning) where there is none."""
    x = np.asarray(x, np.float64)
    keep = np.isfinite(x) if where is None else np.isfinite(x) & where
    count = keep.sum(axis)
    return np.where(count > 0, np.where(keep, x, 0.0).sum(axis) / np.maximum(count, 1), np.nan)


def rmse(forecast: Array, observed: Array, *, axis: Any = None, where: Array | None = None) -> Score:
    """Root mean square error over `axis`, missing pairs left out."""
    return np.sqrt(masked_mean((np.asarray(forecast, np.float64) - observed) ** 2, axis=axis, where=where))


def mae(forecast: Array, observed: Array, *, axis: Any = None, where: Array | None = None) -> Score:
    """Mean absolute error over `axis`, missing pairs left out."""
    return masked_mean(np.abs(np.asarray(forecast, np.float64) - observed), axis=axis, where=where)


def bias(forecast: Array, observed: Array, *, axis: Any = None, where: Array | None = None) -> Score:
    """Mean of forecast - observed over `axis`, missing pairs left out."""
    return masked_mean(np.asarray(forecast, np.float64) - observed, axis=axis, where=where)


def anomaly_correlation(
    forecast: Array, observed: Array, climatology: Array, *, axis: Any = None, centred: bool = False
) -> Score:
    """Correlation of anomalies about a climatology over `axis`; centred removes their means first (then it is
    Pearson's).
    """
    f, o, c = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (forecast, observed, climatology)))
    keep = np.isfinite(f) & np.isfinite(o) & np.isfinite(c)
    f, o = np.where(keep, f - c, 0.0), np.where(keep, o - c, 0.0)
    n = np.maximum(keep.sum(axis), 1)
    fo, ff, oo = (f * o).sum(axis), (f * f).sum(axis), (o * o).sum(axis)
    if centred:
        fo, ff, oo = fo - f.sum(axis) * o.sum(axis) / n, ff - f.sum(axis) ** 2 / n, oo - o.sum(axis) ** 2 / n
    norm = np.sqrt(np.maximum(ff, 0) * np.maximum(oo, 0))
    return np.where(norm > 0, fo / np.where(norm > 0, norm, 1.0), np.nan)


def variance_ratio(forecast: Array, observed: Array, climatology: Array | float = 0.0, *, axis: Any = None) -> Score:
    """Variance of the forecast (anomaly) over that of the observation (anomaly); below 1 the forecast is smoother
    than nature.
    """
    f, o, c = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (forecast, observed, climatology)))
    keep = np.isfinite(f) & np.isfinite(o) & np.isfinite(c)
    n = np.maximum(keep.sum(axis), 1)
    f, o = np.where(keep, f - c, 0.0), np.where(keep, o - c, 0.0)
    vf, vo = ((x * x).sum(axis) / n - (x.sum(axis) / n) ** 2 for x in (f, o))
    return np.where(vo > 0, vf / np.where(vo > 0, vo, 1.0), np.nan)


def spread_skill_ratio(members: Array, observed: Array, *, axis: int = 0) -> Score:
    """Unbiased spread-skill ratio of an M-member ensemble over all forecasts; 1 in expectation for exchangeable
    members and observation.

    sqrt(mean s^2 / (mean (xbar - y)^2 - mean s^2 / M)), s^2 the member variance with divisor M - 1: the error of a
    finite ensemble mean holds s^2/M of sampling noise that is no lack of skill. NaN where the corrected error is not
    positive.
    """
    x = np.moveaxis(np.asarray(members, np.float64), axis, -1)
    m = x.shape[-1]
    if m < 2:
        raise VerificationError(f"the spread of an ensemble needs at least two members, got {m}")
    y = np.asarray(observed, np.float64)
    keep = np.isfinite(x).all(-1) & np.isfinite(y)
    variance = masked_mean(np.where(keep, np.var(np.where(keep[..., None], x, 0.0), axis=-1, ddof=1), np.nan))
    square = (
        masked_mean(np.where(keep, (np.where(keep[..., None], x, 0.0).mean(-1) - np.where(keep, y, 0.0)) ** 2, np.nan))
        - variance / m
    )
    return np.where(square > 0, np.sqrt(variance / np.where(square > 0, square, 1.0)), np.nan)


def histogram(values: Array, bins: int = 20, *, ranks: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Relative frequencies of PIT values (or of ranks 0..M) in `bins` equal bins and the bins' edges on [0, 1];
    uniform = 1/bins.

    With ranks=True `bins` must be M + 1 and the values ranks.
    """
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    scaled = (finite + 0.5) / bins if ranks else finite
    edges = np.linspace(0, 1, bins + 1)
    counts, _ = np.histogram(scaled, edges)
    return counts / max(len(finite), 1), edges


# ---- tables
@dataclasses.dataclass(frozen=True)
class Display:
    """How a variable appears in a table: value in the table = SI value / scale (scores of differences need no
    offset).
    """

    label: str
    units: str
    scale: int | float = 1.0


def displays(columns: Mapping[str, Any] | None, variables: Iterable[str]) -> dict[str, Display]:
    """Label, units and scale of each variable: those of the user's file where `columns` maps a column to it, else
    ERA5 name and SI.

    Args:
      columns: `StationTable.columns`: user's column -> object with `variable`, `units`, `scale` (SI = file * scale +
        offset). None = SI.
      variables: ERA5 names.
    """
    out = {name: Display(name, sensors.describe(name).units) for name in variables}
    for column, mapping in (columns or {}).items():
        if mapping.variable in out:
            out[mapping.variable] = Display(str(column), str(mapping.units), float(mapping.scale))
    return out


@dataclasses.dataclass(frozen=True)
class _Cell:
    """Sums over blocks of everything the scores need: float64 [K, len(_SUMS)]."""

    sums: np.ndarray
    unforecast: int


_SUMS = ("n", "e", "abs", "sq", "crps", "hit", "var", "nspread", "fo", "ff", "oo", "f", "o", "nclim")


def _metrics(sums: np.ndarray) -> dict[str, Array]:
    """Scores from sums [..., len(_SUMS)]."""
    s = dict(zip(_SUMS, np.moveaxis(sums, -1, 0), strict=True))

    def ratio(a: Array, b: Array) -> Array:
        return np.where(b > 0, a / np.where(b > 0, b, 1.0), np.nan)

    square, with_spread = ratio(s["sq"], s["n"]), s["nspread"]
    out = {"rmse": np.sqrt(square), "mae": ratio(s["abs"], s["n"]), "bias": ratio(s["e"], s["n"])}
    out["crps"] = ratio(s["crps"], with_spread)
    out["spread"] = np.sqrt(ratio(s["var"], with_spread))
    out["spread_skill"] = np.where(with_spread > 0, ratio(out["spread"], out["rmse"]), np.nan)
    out["coverage"] = ratio(s["hit"], with_spread)
    out["acc"] = ratio(s["fo"], np.sqrt(s["ff"] * s["oo"]))
    n = s["nclim"]
    vf, vo = ratio(s["ff"], n) - ratio(s["f"], n) ** 2, ratio(s["oo"], n) - ratio(s["o"], n) ** 2
    out["variance_ratio"] = ratio(vf, np.where(np.isfinite(vo), vo, 0.0))
    return out


METRICS = ("rmse", "mae", "bias", "crps", "spread", "spread_skill", "coverage", "acc", "variance_ratio")


def block_labels(valid_times: Any, protocol: Protocol | None, role: str = "test") -> np.ndarray:
    """The bootstrap block of each valid time, -1 = not scored.

    Whole intervals of the protocol; an interval longer than ten days is cut into weeks counted from its start. Without
    a protocol: weeks counted from the first valid time.
    """
    t = utc_times(valid_times)
    week = np.timedelta64(7, "D").astype("timedelta64[ns]")
    if protocol is None:
        return ((t - t.min()) // week).astype("int64") if t.size else np.zeros(t.shape, "int64")
    intervals = protocol.test if role == "test" else protocol.validation
    labels, following = np.full(t.shape, -1), 0
    for start, end in intervals:
        inside = (t >= start) & (t < end)
        pieces = 1 if end - start <= np.timedelta64(10, "D") else max(1, int((end - start) // week))
        piece = np.minimum(((t - start) // week).astype("int64"), pieces - 1)
        labels[inside] = following + (piece[inside] if pieces > 1 else 0)
        following += pieces
    return labels


def resampling_weights(blocks: int, draws: int, seed: int) -> np.ndarray:
    """How often each of `blocks` blocks occurs in each bootstrap draw: float64 [draws, blocks], rows sum to
    `blocks`.
    """
    rng = np.random.default_rng(seed)
    return (
        rng.multinomial(blocks, np.full(blocks, 1 / max(blocks, 1)), size=draws).astype(np.float64)
        if blocks
        else np.zeros((draws, 0))
    )


@dataclasses.dataclass(frozen=True)
class _Matched:
    """A forecast beside its observations, in display units: arrays [I, L, S] per variable; NaN observations are not
    scored.
    """

    variables: tuple[str, ...]
    leads: np.ndarray
    stations: tuple[str, ...]
    block: np.ndarray  # [I, L]
    blocks: int
    mean: dict[str, np.ndarray]
    spread: dict[str, np.ndarray | None]
    observed: dict[str, np.ndarray]
    climatology: dict[str, np.ndarray]


def _match(
    forecast: xr.Dataset,
    observations: xr.Dataset,
    protocol: Protocol | None,
    variables: Iterable[str] | None,
    climatology: xr.Dataset | None,
    scale: Mapping[str, Display],
    role: str,
) -> _Matched:
    names = forecast_variables(forecast) if variables is None else tuple(variables)
    for name in names:
        for what, dataset in (("forecast", forecast), ("observations", observations)):
            if name not in dataset.data_vars:
                raise VerificationError(
                    f"variable {name!r} is not in the {what}; there are {', '.join(map(str, dataset.data_vars))}"
                )
    stations = tuple(str(s) for s in forecast["station"].to_numpy())
    known = {str(s): i for i, s in enumerate(observations["station"].to_numpy())}
    absent = [s for s in stations if s not in known]
    if absent:
        raise VerificationError(
            f"stations {absent[:5]} of the forecast are not in the observations; score only stations that report"
        )
    column = np.array([known[s] for s in stations])
    valid = (
        utc_times(forecast["init_time"].to_numpy())[:, None]
        + forecast["lead_time"].to_numpy().astype("timedelta64[ns]")[None]
    )
    block = block_labels(valid, protocol, role)
    labels = np.unique(block[block >= 0])
    block = np.where(block >= 0, np.searchsorted(labels, block), -1)
    axis = utc_times(observations["time"].to_numpy())
    order = np.argsort(axis, kind="stable")
    at = np.searchsorted(axis[order], valid).clip(max=max(len(axis) - 1, 0))
    row = order[at]
    scored = (axis[row] == valid) & (block >= 0)
    mean, spread, observed, climate = {}, {}, {}, {}
    reference = (
        None
        if climatology is None
        else climatology.reindex(
            init_time=forecast["init_time"], lead_time=forecast["lead_time"], station=forecast["station"]
        )
    )
    for name in names:
        dims, factor = ("init_time", "lead_time", "station"), 1 / scale[name].scale
        mean[name] = forecast[name].transpose(*dims).to_numpy().astype(np.float64) * factor
        has = name + SPREAD in forecast.data_vars
        spread[name] = (
            forecast[name + SPREAD].transpose(*dims).to_numpy().astype(np.float64) * abs(factor) if has else None
        )
        values = observations[name].transpose("time", "station").to_numpy().astype(np.float64) * factor
        observed[name] = np.where(scored[..., None], values[row][..., column], np.nan)
        if reference is not None and name in reference.data_vars:
            climate[name] = reference[name].transpose(*dims).to_numpy().astype(np.float64) * factor
    return _Matched(names, lead_hours_of(forecast), stations, block, len(labels), mean, spread, observed, climate)


def _cell(
    matched: _Matched, name: str, lead: int, stations: np.ndarray, level: int | float, also: np.ndarray | None = None
) -> _Cell:
    """Sums over blocks for one variable, lead and set of stations; `also` [I, L, S] restricts to pairs another
    forecast has, too.
    """
    f, o = matched.mean[name][:, lead][:, stations], matched.observed[name][:, lead][:, stations]
    there = np.isfinite(o) if also is None else np.isfinite(o) & also[:, lead][:, stations]
    keep = there & np.isfinite(f)
    block = np.broadcast_to(matched.block[:, lead, None], f.shape)[keep]
    f, o = f[keep], o[keep]
    rows = np.zeros((len(_SUMS), len(f)))
    index = {n: i for i, n in enumerate(_SUMS)}
    error = f - o
    rows[index["n"]], rows[index["e"]], rows[index["abs"]], rows[index["sq"]] = 1.0, error, np.abs(error), error**2
    spread = matched.spread[name]
    if spread is not None:
        sd = spread[:, lead][:, stations][keep]
        ok = np.isfinite(sd)
        rows[index["nspread"]] = ok
        rows[index["crps"]] = np.where(ok, crps_gaussian(f, np.where(ok, sd, 0.0), o), 0.0)
        rows[index["hit"]] = np.where(ok, inside_interval(f, np.where(ok, sd, 0.0), o, level=level), 0.0)
        rows[index["var"]] = np.where(ok, sd**2, 0.0)
    if name in matched.climatology:
        c = matched.climatology[name][:, lead][:, stations][keep]
        ok = np.isfinite(c)
        df, do = np.where(ok, f - c, 0.0), np.where(ok, o - c, 0.0)
        for key, value in {"nclim": ok, "fo": df * do, "ff": df * df, "oo": do * do, "f": df, "o": do}.items():
            rows[index[key]] = value
    sums = np.stack([np.bincount(block, weights=r, minlength=matched.blocks) for r in rows], -1)
    return _Cell(sums, int(there.sum() - keep.sum()))


def _station_groups(
    stations: tuple[str, ...], protocol: Protocol | None, groups: Mapping[str, Iterable[str]] | None, each: bool
) -> list[tuple[dict[str, str], np.ndarray]]:
    if groups is None:
        held = set(protocol.held_out) if protocol else set()
        groups = {"training": [s for s in stations if s not in held], "held_out": [s for s in stations if s in held]}
    out = []
    for label, members in groups.items():
        inside = {str(m) for m in members}
        index = np.array([i for i, s in enumerate(stations) if s in inside], int)
        if each:
            out += [({"stations": label, "station": stations[i]}, np.array([i])) for i in index]
        elif len(index):
            out.append(({"stations": label}, index))
    return out


def score(
    forecast: xr.Dataset,
    observations: xr.Dataset,
    protocol: Protocol | None = None,
    *,
    model: str = "model",
    variables: Iterable[str] | None = None,
    columns: Mapping[str, Any] | None = None,
    climatology: xr.Dataset | None = None,
    groups: Mapping[str, Iterable[str]] | None = None,
    by_station: bool = False,
    role: str = "test",
    level: int | float = 0.9,
    draws: int = 1000,
    confidence: int | float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Score a forecast against a record.

    Args:
      forecast: Dataset with dims (init_time, lead_time, station), a mean per variable and optionally `<name>_spread`.
      observations: Dataset with dims (time, station), the same variables and units (`Reports.grid`, or
        `Panel.to_grid`).
      protocol: valid times in its test intervals are scored, its held-out stations are a group of their own, its
        intervals are the bootstrap blocks. None = score everything, blocks of weeks.
      model: label of the rows.
      variables: names to score; None = all of the forecast.
      columns: the user's columns (`StationTable.columns`): scores come in the file's units under the file's names. None
        = SI and ERA5 names.
      climatology: a climatology forecast at the same times, for anomaly correlation and variance ratio; NaN columns
        without it.
      groups: label -> stations; None = "training" and "held_out" by the protocol.
      by_station: one row per station instead of per group.
      role: "test" or "validation".
      level: probability of the central interval of `coverage`.
      draws: bootstrap draws (0 = no intervals); intervals also need two blocks.
      confidence: of the intervals.
      seed: of the bootstrap.

    Returns:
      Tidy DataFrame: variable, lead_hours, stations, [station,] model, units, n, n_unforecast, rmse, mae, bias, crps,
      spread, spread_skill, coverage, acc, variance_ratio, and `<score>_lo`, `<score>_hi` for rmse, mae, bias, crps,
      coverage. crps, spread, coverage are NaN without a spread. A cell without any pair has n = 0 and NaN scores.
    """
    names = forecast_variables(forecast) if variables is None else tuple(variables)
    shown = displays(columns, names)
    matched = _match(forecast, observations, protocol, names, climatology, shown, role)
    weights = resampling_weights(matched.blocks, draws, seed)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    rows = []
    for name in matched.variables:
        for lead, hours in enumerate(matched.leads):
            for label, stations in _station_groups(matched.stations, protocol, groups, by_station):
                cell = _cell(matched, name, lead, stations, level)
                total = cell.sums.sum(0)
                row: dict[str, Any] = {
                    "variable": shown[name].label,
                    "lead_hours": _plain(hours),
                    **label,
                    "model": model,
                    "units": shown[name].units,
                }
                row |= {"n": int(total[0]), "n_unforecast": cell.unforecast}
                row |= {k: float(v) for k, v in _metrics(total).items()}
                if draws:
                    drawn = _metrics(weights @ cell.sums)
                    for key in ("rmse", "mae", "bias", "crps", "coverage"):
                        row[f"{key}_lo"], row[f"{key}_hi"] = _quantiles(drawn[key], tails, (cell.sums[:, 0] > 0).sum())
                rows.append(row)
    return pd.DataFrame(rows)


def compare(
    forecast: xr.Dataset,
    reference: xr.Dataset,
    observations: xr.Dataset,
    protocol: Protocol | None = None,
    *,
    metric: str = "rmse",
    variables: Iterable[str] | None = None,
    leads: Iterable[int | float] | None = None,
    columns: Mapping[str, Any] | None = None,
    groups: Mapping[str, Iterable[str]] | None = None,
    role: str = "test",
    draws: int = 2000,
    confidence: int | float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Ratio of two forecasts' scores on the pairs both have, with paired block-bootstrap intervals; below 1 the
    first is better.

    Args:
      forecast, reference: forecast Datasets; leads, initial times and stations that only one has are left out.
      metric: "rmse", "mae" or "crps".
      leads: hours to use; None = all common ones.
      others: as in `score`.

    Returns:
      Tidy DataFrame: variable, lead_hours, stations, n, score, reference_score, ratio, ratio_lo, ratio_hi; beside the
      cells the mean ratio per variable (lead_hours NaN) and over everything (variable "mean"), whose intervals
      re-weight all cells by the same blocks.
    """
    if metric not in ("rmse", "mae", "crps"):
        raise VerificationError(f"metric {metric!r} cannot be compared; choose rmse, mae or crps")
    first, second = xr.align(forecast, reference, join="inner", exclude=())
    if leads is not None:
        wanted = [float(h) for h in leads]
        keep = np.array([bool(np.isclose(h, wanted).any()) for h in lead_hours_of(first)], bool)
        first, second = first.isel(lead_time=keep), second.isel(lead_time=keep)
    if 0 in (first.sizes["init_time"], first.sizes["lead_time"], first.sizes["station"]):
        raise VerificationError(
            f"the forecasts have nothing in common: {dict(first.sizes)}; "
            "compare the same stations, initial times and leads"
        )
    both = [n for n in forecast_variables(first) if n in second.data_vars]
    names = tuple(both) if variables is None else tuple(variables)
    shown = displays(columns, names)
    one = _match(first, observations, protocol, names, None, shown, role)
    two = _match(second, observations, protocol, names, None, shown, role)
    weights = resampling_weights(one.blocks, draws, seed)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    rows: list[dict[str, Any]] = []
    for label, stations in _station_groups(one.stations, protocol, groups, False):
        all_ratios: list[float] = []
        all_drawn: list[np.ndarray] = []
        for name in names:
            ratios: list[float] = []
            drawn: list[np.ndarray] = []
            for lead, hours in enumerate(one.leads):
                a = _cell(one, name, lead, stations, 0.9, np.isfinite(two.mean[name]))
                b = _cell(two, name, lead, stations, 0.9, np.isfinite(one.mean[name]))
                score_a, score_b = (float(_metrics(c.sums.sum(0))[metric]) for c in (a, b))
                ratio = score_a / score_b if score_b > 0 else np.nan
                da, db = (_metrics(weights @ c.sums)[metric] for c in (a, b))
                ratios.append(ratio)
                drawn.append(da / np.where(db > 0, db, np.nan))
                row = {
                    "variable": shown[name].label,
                    "lead_hours": _plain(hours),
                    **label,
                    "n": int(a.sums[:, 0].sum()),
                }
                row |= {"score": score_a, "reference_score": score_b, "ratio": ratio}
                row["ratio_lo"], row["ratio_hi"] = _quantiles(drawn[-1], tails, (a.sums[:, 0] > 0).sum())
                rows.append(row)
            rows.append(_mean_row(shown[name].label, label, ratios, drawn, tails, one.blocks))
            all_ratios += ratios
            all_drawn += drawn
        rows.append(_mean_row("mean", label, all_ratios, all_drawn, tails, one.blocks))
    return pd.DataFrame(rows)


def _mean_row(
    name: str, label: dict[str, str], ratios: list[float], drawn: list[np.ndarray], tails: list[float], blocks: int
) -> dict[str, Any]:
    mean = masked_mean(np.array(ratios))
    low, high = _quantiles(masked_mean(np.stack(drawn), axis=0), tails, blocks)
    return {"variable": name, "lead_hours": np.nan, **label, "ratio": float(mean), "ratio_lo": low, "ratio_hi": high}


def _quantiles(drawn: Array, tails: Sequence[float], blocks: int | np.integer) -> tuple[float, float]:
    finite = drawn[np.isfinite(drawn)]
    if blocks < 2 or not len(finite):
        return np.nan, np.nan
    low, high = np.quantile(finite, tails)
    return float(low), float(high)


def _plain(hours: int | float) -> float | int:
    return int(hours) if float(hours).is_integer() else float(hours)


def pit_values(
    forecast: xr.Dataset,
    observations: xr.Dataset,
    protocol: Protocol | None = None,
    *,
    variables: Iterable[str] | None = None,
    role: str = "test",
) -> dict[str, np.ndarray]:
    """PIT of every scored pair, [I, L, S] per variable with a spread, NaN where not scored: data of calibration
    plots.
    """
    names = forecast_variables(forecast) if variables is None else tuple(variables)
    matched = _match(forecast, observations, protocol, names, None, displays(None, names), role)
    out = {}
    for name in matched.variables:
        spread = matched.spread[name]
        if spread is not None:
            out[name] = pit_gaussian(matched.mean[name], np.where(spread > 0, spread, np.nan), matched.observed[name])
    return out
