"""Verification of forecasts in a global OSSE: who is held out, when forecasts start, what they must say, their scores.

One protocol for every kind of forecast, so that a neural model, a statistical baseline and an ensemble Kalman filter
are asked the same questions. `held_out_platforms` withholds whole stations and radiosonde sites from everything;
`given_table` is what remains; `targets` lists what a forecast has to say: one row per initial time, lead, held-out
platform and variable. A forecast is one number per row of it (`aligned` takes frames with keys too); `score`, `ratios`
and `skill_limits` compare.

Choices that are ours:
- Forecasts may use every report with a time up to and including the initial time, and none after it.
- A station's target is the truth at its place; a sonde's is the truth over its launch site at fixed pressures at the
  valid time, also at hours without a launch, so that the leads are scored on the same places. Levels under the ground
  are no targets.
- `observation` is the platform's own report: at the valid time for a station; for a sonde that of its pressure within
  three hours after the valid time, wherever the balloon has drifted to by then. It has the platform's error.
- All leads are scored from the same initial times: those whose longest lead still lies in the run.
- Intervals: percentiles of a bootstrap that draws blocks of consecutive initial times, because forecasts that overlap
  err together. Blocks of different runs (column `run`) are drawn alike. With fewer than about ten blocks they are too
  narrow.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from earth.osse.nature import OsseError
from earth.osse.truth import Truth, query
from earth.protocol import hours_to_timedelta
from earth.verify import resampling_weights

KEYS = ("init_time", "lead_time", "platform", "variable", "pressure")
COLUMNS = (
    "init_time",
    "lead_time",
    "valid_time",
    "group",
    "platform",
    "variable",
    "latitude",
    "longitude",
    "height",
    "pressure",
    "truth",
    "observation",
)
STATION_VARIABLES = (
    "lowest_level_temperature",
    "lowest_level_u_component_of_wind",
    "lowest_level_v_component_of_wind",
    "surface_pressure",
)
SONDE_VARIABLES = ("temperature", "u_component_of_wind", "v_component_of_wind")
_AFTER_LAUNCH = 3.0  # hours within which a level is reached at 5 m/s, with room to spare
_CELL = ("group", "variable", "lead_time")


class VerificationProtocolError(OsseError):
    """A protocol that cannot be applied, or a forecast that does not answer it."""


@dataclasses.dataclass(frozen=True)
class VerificationConfig:
    """The protocol.

    Attributes:
      station_share: share of the stations held out, at least one.
      radiosonde_share: share of the radiosonde sites held out, at least one.
      seed: of the choice of platforms.
      warm_up_hours: from the start of the run to the first initial time.
      every_hours: between initial times.
      leads: hours, increasing.
      pressures: levels of the sondes' targets, Pa.
      station_variables: of `earth.osse.truth.SURFACE_VARIABLES`.
      sonde_variables: of `earth.osse.truth.UPPER_VARIABLES`; specific humidity where the truth carries it, if named.
    """

    station_share: float = 0.2
    radiosonde_share: float = 0.25
    seed: int = 0
    warm_up_hours: int = 120
    every_hours: int = 12
    leads: tuple[int, ...] = (6, 12, 24, 48, 72, 96, 120)
    pressures: tuple[float, ...] = (85000.0, 70000.0, 50000.0, 25000.0)
    station_variables: tuple[str, ...] = STATION_VARIABLES
    sonde_variables: tuple[str, ...] = SONDE_VARIABLES

    def __post_init__(self):
        if not (0 <= self.station_share < 1 and 0 <= self.radiosonde_share < 1):
            raise VerificationProtocolError(
                f"station_share={self.station_share} and radiosonde_share={self.radiosonde_share} must lie in [0, 1): "
                "something must be left to forecast from"
            )
        if self.warm_up_hours < 0 or self.every_hours < 1:
            raise VerificationProtocolError(
                f"warm_up_hours={self.warm_up_hours} must not be negative and every_hours={self.every_hours} be at "
                "least 1"
            )
        if not self.leads or min(self.leads) <= 0 or list(self.leads) != sorted(set(self.leads)):
            raise VerificationProtocolError(f"leads={self.leads} must be positive hours, increasing, each once")


def held_out_platforms(platforms: pd.DataFrame, cfg: VerificationConfig = VerificationConfig()) -> tuple[str, ...]:
    """Names of the stations and radiosonde sites that nobody may see; satellites, aircraft and ships are all given.

    Args:
      platforms: `SimulationMeta.platforms`: columns platform and sensor at least.
      cfg: the shares and the seed.

    Returns:
      Platforms, stations first, each group sorted. Runs with the same platforms hold the same ones out.

    Raises:
      VerificationProtocolError: a group with a share has fewer than two platforms.
    """
    held: list[str] = []
    for index, (sensor, share) in enumerate((("station", cfg.station_share), ("radiosonde", cfg.radiosonde_share))):
        names = np.sort(platforms.loc[platforms["sensor"] == sensor, "platform"].unique().astype(str))
        if share == 0 or not len(names):
            continue
        if len(names) < 2:
            raise VerificationProtocolError(
                f"the only {sensor}, {names[0]}, cannot be both given and held out; simulate more or set its share to 0"
            )
        count = min(max(1, round(share * len(names))), len(names) - 1)
        chosen = np.random.default_rng([cfg.seed, index]).permutation(len(names))[:count]
        held += sorted(names[chosen].tolist())
    return tuple(held)


def given_table(table: pd.DataFrame, held_out: Collection[str]) -> pd.DataFrame:
    """The rows of a canonical table that forecasts may read: those of no held-out platform."""
    return table.loc[~table["platform"].isin(list(held_out))].reset_index(drop=True)


def init_times(start: Any, end: Any, cfg: VerificationConfig = VerificationConfig()) -> np.ndarray:
    """Initial times datetime64[ns] of a run from `start` to `end`.

    Raises:
      VerificationProtocolError: the run is too short for one.
    """
    first = np.datetime64(start, "ns") + np.timedelta64(cfg.warm_up_hours, "h")
    last = np.datetime64(end, "ns") - np.timedelta64(cfg.leads[-1], "h")
    if last < first:
        raise VerificationProtocolError(
            f"a run from {start} to {end} has no room for warm_up_hours={cfg.warm_up_hours} and a lead of "
            f"{cfg.leads[-1]} h; run more days or shorten them"
        )
    return np.arange(first, last + np.timedelta64(1, "ns"), np.timedelta64(cfg.every_hours, "h"))


def targets(
    truth: Truth,
    platforms: pd.DataFrame,
    held_out: Collection[str],
    table: pd.DataFrame | None = None,
    cfg: VerificationConfig = VerificationConfig(),
    *,
    inits: np.ndarray | None = None,
) -> pd.DataFrame:
    """What a forecast has to say.

    Args:
      truth: of the run.
      platforms: `SimulationMeta.platforms`.
      held_out: platforms to verify at, stations and radiosonde sites.
      table: the canonical table with the held-out platforms still in it, for `observation`; None leaves it NaN.
      cfg: the protocol.
      inits: initial times instead of `init_times`.

    Returns:
      Columns `COLUMNS`, RangeIndex, sorted by init_time, group ('station', then 'radiosonde'), platform, lead_time.
      lead_time is in hours (int). height is the ground's, in m; pressure is NaN for stations. truth has no NaN.

    Raises:
      VerificationProtocolError: a held-out name that is no station or radiosonde site, or nothing to verify.
    """
    moments = init_times(truth.start, truth.end, cfg) if inits is None else np.asarray(inits, "datetime64[ns]")
    sites = platforms.loc[platforms["platform"].isin(list(held_out)) & platforms["sensor"].isin(_GROUPS)]
    unknown = sorted(set(held_out) - set(sites["platform"]))
    if unknown:
        raise VerificationProtocolError(
            f"held-out {unknown[0]!r} is no station or radiosonde site of this run; pass its own platforms"
        )
    if not len(sites) or not len(moments):
        raise VerificationProtocolError(
            f"{len(sites)} held-out platforms and {len(moments)} initial times: nothing to verify"
        )
    valid = moments[:, None] + np.asarray(cfg.leads) * np.timedelta64(3_600_000_000_000, "ns")
    distinct, where = np.unique(valid, return_inverse=True)
    parts = []
    for group in _GROUPS:
        own = sites.loc[sites["sensor"] == group]
        upper = group == "radiosonde"
        names = cfg.sonde_variables if upper else cfg.station_variables
        if not len(own) or not names:
            continue
        levels = np.asarray(cfg.pressures if upper else (np.nan,), float)
        site, level, which = (x.ravel() for x in np.indices((len(own), len(levels), len(names))))
        latitude, longitude, height = (own[name].to_numpy(float) for name in ("latitude", "longitude", "height"))
        exact = query(
            truth,
            list(names),
            distinct[:, None, None],
            latitude[:, None],
            longitude[:, None],
            **({"pressure": levels} if upper else {}),
        )
        shape = (len(distinct), len(own), len(levels))
        values = np.stack(
            [np.broadcast_to(exact[name].reshape(*exact[name].shape[:2], -1), shape) for name in names], -1
        )
        values = values.reshape(len(distinct), -1)[where.reshape(valid.shape)]  # [init, lead, point]
        init, lead, point = (x.ravel() for x in np.indices(values.shape))
        parts.append(
            pd.DataFrame(
                {
                    "init_time": moments[init],
                    "lead_time": np.asarray(cfg.leads)[lead],
                    "valid_time": valid[init, lead],
                    "group": pd.Categorical.from_codes(np.full(len(init), _GROUPS.index(group)), list(_GROUPS)),
                    "platform": own["platform"].to_numpy(object)[site[point]],
                    "variable": np.asarray(names, object)[which[point]],
                    "latitude": latitude[site[point]],
                    "longitude": longitude[site[point]],
                    "height": height[site[point]],
                    "pressure": levels[level[point]],
                    "truth": values.ravel(),
                }
            )
        )
    out = pd.concat(parts, ignore_index=True)
    out = out.loc[np.isfinite(out["truth"])]
    out = out.sort_values(["init_time", "group", "platform", "lead_time"], kind="stable").reset_index(drop=True)
    out["group"] = out["group"].astype(object)
    out["observation"] = np.nan if table is None else _observations(out, table)
    return out[list(COLUMNS)]


_GROUPS = ("station", "radiosonde")


def _observations(wanted: pd.DataFrame, table: pd.DataFrame) -> np.ndarray:
    """Reports [n] of the targets' platforms, NaN where there is none."""
    rows = table.loc[table["platform"].isin(list(set(wanted["platform"])))]
    out = np.full(len(wanted), np.nan)
    for group, back in (("station", 0.0), ("radiosonde", _AFTER_LAUNCH)):
        here = (wanted["group"] == group).to_numpy()
        own = rows.loc[rows["sensor"] == group]
        if not here.any() or not len(own):
            continue
        keys = ["platform", "variable", "millibar"]
        left = wanted.loc[here, ["valid_time", "platform", "variable", "pressure"]]
        left = left.assign(millibar=left["pressure"].fillna(-100.0).div(100).round(3), row=np.flatnonzero(here))
        right = own[["time", "platform", "variable", "pressure", "value"]]
        pressure = right["pressure"] if group == "radiosonde" else pd.Series(np.nan, right.index)
        right = right.assign(millibar=pressure.fillna(-100.0).div(100).round(3)).drop(columns="pressure")
        for frame in (left, right):
            for name in ("platform", "variable"):
                frame[name] = frame[name].astype(str)
        found: Any = pd.merge_asof(
            left.sort_values("valid_time"),
            right.sort_values("time"),
            left_on="valid_time",
            right_on="time",
            by=keys,
            direction="forward",
            tolerance=datetime.timedelta(hours=back),
        )
        out[found["row"].to_numpy()] = found["value"].to_numpy()
    return out


def aligned(wanted: pd.DataFrame, forecast: Any) -> np.ndarray:
    """A forecast as float64 [n], one number per row of `wanted`; NaN where it says nothing.

    Args:
      wanted: see `targets`.
      forecast: an array [n] in the order of the rows; a Series or a DataFrame with `prediction` on the same index; or a
        DataFrame with `prediction` and the columns `KEYS` (and `run` where `wanted` has it), in any order.

    Raises:
      VerificationProtocolError: another length, no `prediction`, a key twice.
    """
    keys = [*KEYS, *(("run",) if "run" in wanted else ())]
    if isinstance(forecast, pd.DataFrame):
        if "prediction" not in forecast:
            raise VerificationProtocolError(
                f"a forecast needs a column 'prediction'; it has {list(map(str, forecast.columns))}"
            )
        if set(keys) <= set(forecast.columns):
            right: Any = forecast[[*keys, "prediction"]]
            twice = right.duplicated(subset=keys)
            if twice.any():
                row = right.loc[twice, keys].iloc[0].to_dict()
                raise VerificationProtocolError(f"the forecast says two things about {row}; keep one")
            merged: Any = wanted[keys].merge(right, how="left", on=keys)  # NaN pressures are equal to pandas
            return merged["prediction"].to_numpy(float)
        forecast = forecast["prediction"]
    if isinstance(forecast, pd.Series):
        if not forecast.index.equals(wanted.index):
            raise VerificationProtocolError(
                f"the forecast's index of {len(forecast)} rows is not the targets' of {len(wanted)}; add the columns "
                f"{keys} to match by key"
            )
        forecast = forecast.to_numpy()
    values = np.asarray(forecast, float)
    if values.shape != (len(wanted),):
        raise VerificationProtocolError(f"a forecast of shape {values.shape} does not answer {len(wanted)} targets")
    return values


def score(
    wanted: pd.DataFrame,
    forecasts: Mapping[str, Any],
    *,
    by: Sequence[str] = (),
    block_hours: int = 72,
    draws: int = 1000,
    level: float = 0.9,
    seed: int = 0,
) -> pd.DataFrame:
    """Errors of forecasts per group, variable and lead.

    A row that a forecast leaves NaN is scored for the others and counted for it (`n_unforecast`): compare scores only
    where that is 0, or use `ratios`, which keeps common rows.

    Args:
      wanted: see `targets`; several runs may be concatenated with a column `run` (and an index of their own).
      forecasts: model -> anything `aligned` takes.
      by: further columns to split by, e.g. ("pressure",).
      block_hours: length of the bootstrap's blocks of initial times.
      draws, level, seed: of the bootstrap; 0 draws for no intervals.

    Returns:
      One row per model and cell: model, group, variable, lead_time, `by`; rmse with rmse_lo and rmse_hi, bias (forecast
      - truth), rmse_observation (against the platform's own report), n, n_unforecast, n_observation.
    """
    cells = _Cells(wanted, by, block_hours)
    weights = resampling_weights(cells.blocks, draws, seed)
    truth, observed = wanted["truth"].to_numpy(float), wanted["observation"].to_numpy(float)
    rows = []
    for model, forecast in forecasts.items():
        predicted = aligned(wanted, forecast)
        error, departure = predicted - truth, predicted - observed
        square, count = cells.sums(error**2), cells.sums(np.where(np.isfinite(error), 1.0, np.nan))
        low, high = _interval(_rms(weights @ square, weights @ count), level)
        against = np.where(np.isfinite(departure), 1.0, np.nan)
        rows.append(
            cells.labels.assign(
                model=model,
                rmse=_rms(square.sum(0), count.sum(0)),
                rmse_lo=low,
                rmse_hi=high,
                bias=_ratio(cells.sums(error).sum(0), count.sum(0)),
                rmse_observation=_rms(cells.sums(departure**2).sum(0), cells.sums(against).sum(0)),
                n=count.sum(0).astype(int),
                n_unforecast=(cells.sums(np.ones(len(wanted))).sum(0) - count.sum(0)).astype(int),
                n_observation=cells.sums(against).sum(0).astype(int),
            )
        )
    out: Any = pd.concat(rows, ignore_index=True)
    return out[["model", *(name for name in out.columns if name != "model")]]


def ratios(
    wanted: pd.DataFrame,
    forecasts: Mapping[str, Any],
    baselines: Iterable[str],
    *,
    by: Sequence[str] = (),
    block_hours: int = 72,
    draws: int = 1000,
    level: float = 0.9,
    seed: int = 0,
) -> pd.DataFrame:
    """RMSE of every forecast over that of the best baseline of the cell, on the rows that all of them forecast.

    The best baseline is the one of the lowest RMSE over the whole cell, chosen after the event, which favours it. The
    intervals re-weight both alike; they do not include that choice.

    Args:
      wanted, forecasts, by, block_hours, draws, level, seed: as in `score`.
      baselines: models among `forecasts`.

    Returns:
      One row per model and cell: model, the cell, best (baseline), rmse, rmse_best, ratio with ratio_lo and ratio_hi, n
      (common rows), n_left_out.

    Raises:
      VerificationProtocolError: a baseline that is no forecast.
    """
    names = list(baselines)
    missing = [name for name in names if name not in forecasts]
    if missing or not names:
        raise VerificationProtocolError(f"baselines {missing or names} are not among the forecasts {list(forecasts)}")
    cells = _Cells(wanted, by, block_hours)
    weights = resampling_weights(cells.blocks, draws, seed)
    truth = wanted["truth"].to_numpy(float)
    errors = {model: aligned(wanted, forecast) - truth for model, forecast in forecasts.items()}
    common = np.logical_and.reduce([np.isfinite(error) for error in errors.values()])
    count = cells.sums(np.where(common, 1.0, np.nan))
    total = cells.sums(np.ones(len(wanted))).sum(0)
    squares = {model: cells.sums(np.where(common, error**2, np.nan)) for model, error in errors.items()}
    table = np.stack([_rms(squares[name].sum(0), count.sum(0)) for name in names])
    best = np.where(np.isfinite(table), table, np.inf).argmin(0)
    reference = np.take_along_axis(np.stack([squares[name] for name in names]), best[None, None], 0)[0]
    rows = []
    for model, square in squares.items():
        low, high = _interval(np.sqrt(_ratio(weights @ square, weights @ reference)), level)
        rows.append(
            cells.labels.assign(
                model=model,
                best=np.asarray(names, object)[best],
                rmse=_rms(square.sum(0), count.sum(0)),
                rmse_best=_rms(reference.sum(0), count.sum(0)),
                ratio=np.sqrt(_ratio(square.sum(0), reference.sum(0))),
                ratio_lo=low,
                ratio_hi=high,
                n=count.sum(0).astype(int),
                n_left_out=(total - count.sum(0)).astype(int),
            )
        )
    out: Any = pd.concat(rows, ignore_index=True)
    return out[["model", *(name for name in out.columns if name != "model")]]


def skill_limits(scores: pd.DataFrame, reference: str = "climatology") -> pd.DataFrame:
    """The lead in hours at which each forecast stops beating the reference.

    Args:
      scores: of `score`.
      reference: a model in it.

    Returns:
      One row per model, group, variable (and what `score` was split by): limit_hours, where the ratio of the RMSEs,
      linear between leads, first reaches 1: 0 if already at the first lead, inf if at none.

    Raises:
      VerificationProtocolError: no such reference.
    """
    if reference not in set(scores["model"]):
        raise VerificationProtocolError(f"reference {reference!r} is not one of {sorted(set(scores['model']))}")
    cell = [name for name in scores.columns[1:] if name not in _NUMBERS and name != "lead_time"]
    base = scores.loc[scores["model"] == reference, [*cell, "lead_time", "rmse"]]
    joined: Any = scores.merge(base, on=[*cell, "lead_time"], suffixes=("", "_reference"))
    rows = []
    for labels, part in joined.groupby(["model", *cell], sort=False, dropna=False):
        if labels[0] == reference:
            continue
        part = part.sort_values("lead_time")
        lead, ratio = part["lead_time"].to_numpy(float), (part["rmse"] / part["rmse_reference"]).to_numpy(float)
        lead, ratio = lead[np.isfinite(ratio)], ratio[np.isfinite(ratio)]
        lost = np.flatnonzero(ratio >= 1)
        if not len(ratio):
            limit = np.nan
        elif not lost.size:
            limit = np.inf
        elif lost[0] == 0:
            limit = 0.0
        else:
            before, after = lost[0] - 1, lost[0]
            share = (1 - ratio[before]) / (ratio[after] - ratio[before])
            limit = lead[before] + share * (lead[after] - lead[before])
        rows.append({**dict(zip(["model", *cell], labels, strict=True)), "limit_hours": limit})
    return pd.DataFrame(rows, columns=["model", *cell, "limit_hours"])


_NUMBERS = ("rmse", "rmse_lo", "rmse_hi", "bias", "rmse_observation", "n", "n_unforecast", "n_observation")


class _Cells:
    """Sums of row values over blocks of initial times and cells of a table."""

    def __init__(self, wanted: pd.DataFrame, by: Sequence[str], block_hours: int):
        unknown = [name for name in by if name not in wanted]
        if unknown or block_hours <= 0:
            raise VerificationProtocolError(
                f"by={unknown or list(by)} must name columns of the targets and block_hours={block_hours} be positive"
            )
        keys = list(dict.fromkeys([*_CELL, *by]))
        grouped = wanted.groupby(keys, sort=False, dropna=False)
        self._cell = grouped.ngroup().to_numpy()
        first = np.unique(self._cell, return_index=True)[1]
        self.labels = wanted.iloc[first][keys].reset_index(drop=True)
        run = pd.factorize(wanted["run"])[0] if "run" in wanted else np.zeros(len(wanted), int)
        init = wanted["init_time"].to_numpy("datetime64[ns]")
        start = pd.Series(init).groupby(run).transform("min").to_numpy("datetime64[ns]")
        piece = (init - start) // hours_to_timedelta(block_hours)
        self._block = pd.factorize(pd.MultiIndex.from_arrays([run, piece]))[0]
        self.blocks = int(self._block.max()) + 1 if len(wanted) else 0

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums [block, cell] of the finite values of rows."""
        keep = np.isfinite(values)
        flat = self._block[keep] * len(self.labels) + self._cell[keep]
        total = np.bincount(flat, weights=values[keep], minlength=self.blocks * len(self.labels))
        return total.reshape(self.blocks, len(self.labels))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b > 0, a / np.where(b > 0, b, 1.0), np.nan)


def _rms(square: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.sqrt(_ratio(square, count))


def _interval(drawn: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles [cell] of draws [draw, cell]; NaN where no draw is finite."""
    if not 0 < level < 1:
        raise VerificationProtocolError(f"level={level} must lie in (0, 1), e.g. 0.9")
    empty = np.full(drawn.shape[1], np.nan)
    known = np.isfinite(drawn).any(0)
    if not known.any():
        return empty, empty.copy()
    low, high = empty, empty.copy()
    low[known], high[known] = np.nanquantile(drawn[:, known], [0.5 - level / 2, 0.5 + level / 2], axis=0)
    return low, high
