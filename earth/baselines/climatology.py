"""Climatology of each series by harmonics of the year and the day, and standardised anomalies about it.

Definition (the project's data notes, section 3): per (station, variable) least squares on training hours with a ridge
of 1e-3 (added once to the diagonal of the normal equations, on every coefficient including the constant), 35 features
``{1, cos a, sin a, cos 2a, sin 2a} x {1, cos h, sin h, cos 2h, sin 2h, cos 3h, sin 3h}`` with ``a = 2 pi (day of year +
hour/24) / 365.25`` (day of year counts from 1) and ``h = 2 pi hour / 24``, UTC. Anomaly = observation - climatology,
standardised by the population standard deviation of the series over training hours (not centred: the mean anomaly is
zero already up to the ridge).

Short, coarse and empty records (ours): harmonics the record cannot determine are left out, see `harmonics_for`; a
series without a training value takes the mean coefficients of the other stations, and stays NaN if there are none.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd

from earth.baselines.panel import BaselineError, Panel
from earth.protocol import utc_times


@dataclasses.dataclass(frozen=True)
class Climatology:
    """Harmonic climatology.

    Attributes:
      coefficients: float64 [F, S, V], units of the record.
      annual, daily: number of harmonics of the year and of the day; F = (1 + 2 annual)(1 + 2 daily).
    """

    coefficients: np.ndarray
    annual: int
    daily: int

    def predict(self, times: Any) -> np.ndarray:
        """Climatology [..., S, V] at `times` [...]."""
        return np.tensordot(features(times, annual=self.annual, daily=self.daily), self.coefficients, axes=1)


def features(times: Any, *, annual: int = 2, daily: int = 3) -> np.ndarray:
    """Products of annual and daily harmonics [..., (1 + 2 annual)(1 + 2 daily)], annual index slowest."""
    t = utc_times(times)
    stamps = pd.DatetimeIndex(t.reshape(-1))
    hour = stamps.hour.to_numpy() + stamps.minute.to_numpy() / 60 + stamps.second.to_numpy() / 3600
    year_angle = 2 * np.pi * (stamps.day_of_year.to_numpy() + hour / 24) / 365.25
    day_angle = 2 * np.pi * hour / 24
    one = np.ones(len(stamps))
    year = np.stack([one, *(f(k * year_angle) for k in range(1, annual + 1) for f in (np.cos, np.sin))], -1)
    day = np.stack([one, *(f(k * day_angle) for k in range(1, daily + 1) for f in (np.cos, np.sin))], -1)
    return (year[:, :, None] * day[:, None, :]).reshape(*t.shape, -1)


def harmonics_for(times: Any) -> tuple[int, int]:
    """(annual, daily) harmonics a record with these training times can determine (ours).

    Two annual harmonics from 300 days of record, one from 150 days (the season then tilts but cannot wave), none below.
    Daily harmonics up to three, fewer than half the number of different times of day: 3-hourly records keep three,
    6-hourly one, daily none.
    """
    t = utc_times(times)
    days = float((t.max() - t.min()) / np.timedelta64(1, "D"))
    different = len(np.unique((t - t.astype("datetime64[D]")).astype("int64")))
    return (2 if days >= 300 else 1 if days >= 150 else 0), min(3, (different - 1) // 2)


def fit_climatology(
    panel: Panel, train: np.ndarray, *, ridge: int | float = 1e-3, annual: int | None = None, daily: int | None = None
) -> Climatology:
    """Fit the climatology of every series.

    Args:
      panel: the record.
      train: bool [T], the hours to fit on.
      ridge: added to the diagonal of the normal equations.
      annual, daily: harmonics; None = two and three, or fewer for a short or coarse record (`harmonics_for`).

    Returns:
      Climatology with coefficients [F, S, V].
    """
    if not train.any():
        raise BaselineError(
            "no training hour for the climatology; the protocol leaves nothing of this record to train on"
        )
    auto = harmonics_for(panel.times[train])
    annual, daily = auto[0] if annual is None else annual, auto[1] if daily is None else daily
    x = features(panel.times[train], annual=annual, daily=daily)  # [n, F]
    y = panel.values[train].reshape(len(x), -1)
    valid = np.isfinite(y)
    coefficients = np.full((x.shape[1], y.shape[1]), np.nan)
    penalty = ridge * np.eye(x.shape[1])
    # Series that miss the same hours share their normal equations.
    _, pattern = np.unique(valid, axis=1, return_inverse=True)
    for p in range(pattern.max() + 1):
        series = np.flatnonzero(pattern == p)
        rows = valid[:, series[0]]
        if rows.any():
            xs = x[rows]
            coefficients[:, series] = np.linalg.solve(xs.T @ xs + penalty, xs.T @ y[rows][:, series])
    coefficients = coefficients.reshape(x.shape[1], len(panel.stations), len(panel.variables))
    empty = ~np.isfinite(coefficients[0])  # [S, V]
    for v in np.flatnonzero(empty.any(0) & ~empty.all(0)):
        coefficients[:, empty[:, v], v] = coefficients[:, ~empty[:, v], v].mean(1, keepdims=True)
    return Climatology(coefficients, annual, daily)


@dataclasses.dataclass(frozen=True)
class Anomalies:
    """A record as standardised anomalies.

    Attributes:
      panel: the record in its units.
      climatology: what was subtracted.
      scale: float64 [S, V], standard deviation of the anomaly over training hours, units of the record; 1 for a
        constant series.
      standardised: float64 [T, S, V], NaN = missing.
      inputs: the same with 0 for missing.
    """

    panel: Panel
    climatology: Climatology
    scale: np.ndarray
    standardised: np.ndarray
    inputs: np.ndarray


def fit_anomalies(panel: Panel, train: np.ndarray, *, ridge: int | float = 1e-3) -> Anomalies:
    """Climatology and scale fitted on the hours `train` [T] of `panel`; see the module's docstring."""
    climatology = fit_climatology(panel, train, ridge=ridge)
    anomaly = panel.values - climatology.predict(panel.times)
    valid = np.isfinite(anomaly[train])
    count = valid.sum(0)
    kept = np.where(valid, anomaly[train], 0.0)
    mean = kept.sum(0) / np.maximum(count, 1)
    scale = np.sqrt(np.where(valid, (kept - mean) ** 2, 0.0).sum(0) / np.maximum(count, 1))
    # An empty series borrows the variable's typical scale; a constant one must not be divided by zero.
    for v in range(scale.shape[1]):
        seen = count[:, v] > 0
        scale[~seen, v] = np.median(scale[seen, v]) if seen.any() else 1.0
    scale = np.where(scale > 1e-9 * np.maximum(1.0, np.abs(np.nan_to_num(mean))), scale, 1.0)
    standardised = anomaly / scale
    return Anomalies(panel, climatology, scale, standardised, np.nan_to_num(standardised, nan=0.0))
