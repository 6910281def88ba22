"""Gradient-boosting baselines (scikit-learn's HistGradientBoostingRegressor): pooled forecasts, and one sensor from
the others.

*Pooled forecasts* (stations-v1): one model per variable and lead over all stations. Features of a station at t: its own
anomalies at lags 0, 1, 2, 3, 6, 12, 23, 24 h of all variables, the mean over stations at lags 0, 6, 24 h of all
variables, cosine and sine of hour and season of the valid time, latitude, longitude, height; 120,000 rows drawn at
random, 300 iterations, rate 0.06, 63 leaves.

*Cross-sensor* (stations-v1): one model per target over all stations; geometry (cosine of the solar zenith angle,
latitude, longitude, height) with or without the simultaneous values of other variables; hours with the sun up; 500
iterations, rate 0.05, 63 leaves. The documented table does not state the solar geometry. Among some thirty readings of
it, tried against the documented scores, the solar angle half an hour *after* the stamp with rows of positive solar
cosine fits best and is the default. Training / held-out stations, ours (documented): swdown from geometry 0.760 / 0.802
(0.756 / 0.799), with all sensors 0.429 / 0.700 (0.428 / 0.683); uvi 2.103 / 2.400 (2.086 / 2.376) and 1.239 / 2.126
(1.231 / 2.185). All within 1 % but the two held-out scores with all sensors, which are not reproducible to 1 % without
the exact inputs: sixteen spellings of the declination, equal to a degree, give 0.684-0.711 and 2.08-2.18, and rounding
the inputs to float32 moves uvi from 2.184 to 2.126. With the solar angle half an hour *before* the stamp
(hour_offset=-0.5), where an hourly sum belongs, the same models score 0.666 / 0.722 and 0.405 / 0.646 (swdown), 1.721 /
2.006 and 1.085 / 2.048 (uvi): the stronger baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingRegressor

from earth.baselines.climatology import Anomalies
from earth.baselines.panel import BaselineError, Panel, take, usable_lags
from earth.baselines.regression import LAGS, training_positions
from earth.protocol import Protocol, utc_times


@dataclasses.dataclass(frozen=True)
class BoostingConfig:
    """Settings of the pooled model; the defaults are stations-v1's.

    Attributes:
      iterations, learning_rate, leaves: of the boosting.
      rows: training rows drawn at random without replacement (all, if there are fewer).
      lags: hours of the station's own values.
      mean_lags: hours of the means over stations.
      seed: of the draw and of the binning.
    """

    iterations: int = 300
    learning_rate: int | float = 0.06
    leaves: int = 63
    rows: int = 120_000
    lags: tuple[int | float, ...] = LAGS
    mean_lags: tuple[int | float, ...] = (0, 6, 24)
    seed: int = 0

    def regressor(self) -> HistGradientBoostingRegressor:
        return HistGradientBoostingRegressor(
            max_iter=self.iterations,
            learning_rate=self.learning_rate,
            max_leaf_nodes=self.leaves,
            early_stopping=False,  # pyright: ignore[reportArgumentType]
            random_state=self.seed,
        )


@dataclasses.dataclass(frozen=True)
class PooledBoosting:
    """A fitted pooled model for one lead: one regressor per variable, None where the variable has no training
    target.
    """

    lead_hours: int | float
    lags: tuple[int, ...]
    mean_lags: tuple[int, ...]
    regressors: tuple[HistGradientBoostingRegressor | None, ...]

    def predict(self, anomalies: Anomalies, positions: np.ndarray) -> np.ndarray:
        """Standardised anomalies [I, S, V] at positions + lead."""
        x = pooled_features(anomalies, positions, self.lead_hours, self.lags, self.mean_lags)
        shape = (len(positions), len(anomalies.panel.stations))
        x = x.reshape(-1, x.shape[-1])
        out = [
            np.full(shape, np.nan) if r is None or not len(x) else r.predict(x).reshape(shape) for r in self.regressors
        ]
        return np.stack(out, -1)


def pooled_features(
    anomalies: Anomalies, positions: np.ndarray, lead_hours: int | float, lags: Sequence[int], mean_lags: Sequence[int]
) -> np.ndarray:
    """Features float32 [I, S, F] at `positions` [I]; missing values stay NaN, which the trees split on."""
    panel = anomalies.panel
    base = anomalies.standardised
    valid = np.isfinite(base)
    count = valid.sum(1)
    mean = np.where(count > 0, np.where(valid, base, 0.0).sum(1) / np.maximum(count, 1), np.nan)  # [T, V]
    own = [take(base, positions - lag) for lag in lags]
    shared = np.concatenate([take(mean, positions - lag) for lag in mean_lags], -1)
    step = panel.times[1] - panel.times[0]
    stamps = pd.DatetimeIndex(panel.times[0] + (positions + panel.steps(lead_hours)) * step)
    hour = stamps.hour.to_numpy() + stamps.minute.to_numpy() / 60
    day, year = 2 * np.pi * hour / 24, 2 * np.pi * (stamps.day_of_year.to_numpy() + hour / 24) / 365.25
    clock = np.stack([np.cos(day), np.sin(day), np.cos(year), np.sin(year)], -1)
    place = np.stack([panel.latitude, panel.longitude, panel.height], -1)
    n, s = len(positions), len(panel.stations)
    wide = [np.broadcast_to(shared[:, None], (n, s, shared.shape[-1])), np.broadcast_to(clock[:, None], (n, s, 4))]
    return np.concatenate([*own, *wide, np.broadcast_to(place[None], (n, s, 3))], -1).astype(np.float32)


def fit_pooled_boosting(
    anomalies: Anomalies, protocol: Protocol, lead_hours: int | float, *, config: BoostingConfig | None = None
) -> PooledBoosting:
    """One boosted model per variable over all stations for one lead.

    Features and target are the standardised anomalies of `fit_anomalies`, missing values stay NaN in features, rows
    with a missing target are left out, no early stopping (raw values as features and target are worse: 1.322 for t2m at
    6 h). The table of stations-v1 is one draw of the training rows, and single cells move with the draw, by a standard
    deviation of 0.4 % (td2m at 6 h) to 3.4 % (ps at 6 h) over seeds 0 to 4. Over these and the 20 documented cells the
    mean ratio to the documented RMSE is 1.000 (0.997 to 1.003 for each seed); the mean over seeds is within 1 % in 11
    cells and departs most for u at 12 h (1.572 for 1.530). One fit of 120,000 rows takes 10 to 20 s on two free cores,
    minutes on busy ones, where OMP_NUM_THREADS=1 is faster; `fit_baselines` leaves "boosting" out unless asked for.
    """
    config = config or BoostingConfig()
    panel = anomalies.panel
    lags, mean_lags = (usable_lags(v, panel.cadence_hours) for v in (config.lags, config.mean_lags))
    positions = training_positions(anomalies, protocol, lead_hours, (*lags, *mean_lags))
    if len(positions) < 2:
        raise BaselineError(
            f"no training sample for the lead of {lead_hours:g} h is clear of test and validation hours; "
            "shorten the lead"
        )
    x = pooled_features(anomalies, positions, lead_hours, lags, mean_lags)
    x = x.reshape(-1, x.shape[-1])
    y = anomalies.standardised[positions + panel.steps(lead_hours)].reshape(len(x), -1)
    regressors: list[HistGradientBoostingRegressor | None] = []
    for v in range(y.shape[1]):
        rows = np.flatnonzero(np.isfinite(y[:, v]))
        rows = np.random.default_rng(config.seed).choice(rows, min(config.rows, len(rows)), replace=False)
        regressors.append(config.regressor().fit(x[rows], y[rows, v]) if len(rows) >= 2 else None)
    return PooledBoosting(lead_hours, lags, mean_lags, tuple(regressors))


def solar_cosine(
    times: Any, latitude: np.ndarray, longitude: np.ndarray, *, hour_offset: int | float = 0.5
) -> np.ndarray:
    """Cosine of the solar zenith angle at `times` + `hour_offset` hours, clipped to [0, 1]; arguments broadcast.

    Declination -23.44 deg cos(2 pi (day of year + 10)/365), hour angle (hour + hour_offset + longitude/15 - 12) pi/12,
    no equation of time. An hourly sum stamped with the end of its hour is centred half an hour *before* its stamp
    (hour_offset -0.5); the table of stations-v1 comes out with +0.5, so that is the default, and is the weaker
    baseline.
    """
    t = utc_times(times)
    stamps = pd.DatetimeIndex(t.reshape(-1))
    day = stamps.day_of_year.to_numpy().reshape(t.shape)
    hour = (stamps.hour.to_numpy() + stamps.minute.to_numpy() / 60).reshape(t.shape)
    declination = np.deg2rad(-23.44) * np.cos(2 * np.pi * (day + 10) / 365)
    angle = (hour + hour_offset + np.asarray(longitude) / 15 - 12) * np.pi / 12
    phi = np.deg2rad(latitude)
    cosine = np.sin(phi) * np.sin(declination) + np.cos(phi) * np.cos(declination) * np.cos(angle)
    return np.clip(cosine, 0, 1)


@dataclasses.dataclass(frozen=True)
class CrossSensor:
    """A fitted model of one variable from simultaneous others.

    Attributes:
      target: variable predicted.
      inputs: variables read beside geometry, in this order.
      sun_up: smallest cosine of the solar zenith angle at which it predicts, None = at all hours.
      hour_offset: hours from the stamp to the instant of the solar angle.
      regressor: the model.
    """

    target: str
    inputs: tuple[str, ...]
    sun_up: int | float | None
    hour_offset: int | float
    regressor: HistGradientBoostingRegressor

    def predict(self, panel: Panel) -> np.ndarray:
        """The target [T, S] at every hour and station of `panel`; NaN where the sun is down."""
        x, up = cross_features(panel, self.inputs, self.sun_up, self.hour_offset)
        out = np.full(up.shape, np.nan)
        if up.any():
            out[up] = self.regressor.predict(x[up])
        return out


def cross_features(
    panel: Panel, inputs: Sequence[str], sun_up: int | float | None, hour_offset: int | float
) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [T, S, 4 + len(inputs)] (solar cosine, latitude, longitude, height, inputs) and the mask [T,
    S] of hours with the sun up.
    """
    cosine = solar_cosine(panel.times[:, None], panel.latitude[None], panel.longitude[None], hour_offset=hour_offset)
    shape = cosine.shape
    place = [np.broadcast_to(a[None], shape) for a in (panel.latitude, panel.longitude, panel.height)]
    values = panel.select(variables=inputs).values if inputs else np.zeros((*shape, 0))
    x = np.concatenate([np.stack([cosine, *place], -1), values], -1).astype(np.float32)
    return x, np.ones(shape, bool) if sun_up is None else cosine > sun_up


def fit_cross_sensor(
    panel: Panel,
    protocol: Protocol,
    target: str,
    inputs: Sequence[str] = (),
    *,
    sun_up: int | float | None = 0.0,
    hour_offset: int | float = 0.5,
    iterations: int = 500,
    learning_rate: int | float = 0.05,
    leaves: int = 63,
    seed: int = 0,
) -> CrossSensor:
    """Model `target` from geometry and the simultaneous `inputs` at training stations and training hours.

    Args:
      panel: a record that holds target and inputs; held-out stations of the protocol are left out.
      protocol: training hours are those of role "train".
      sun_up: rows with a solar cosine above this; None = all rows (for targets that are no sunlight).
      hour_offset: of `solar_cosine`; -0.5 suits hourly sums stamped with the end of the hour.
    """
    kept = panel.without(protocol.held_out)
    x, up = cross_features(kept, inputs, sun_up, hour_offset)
    y = kept.select(variables=[target]).values[..., 0]
    rows = up & np.isfinite(y) & (protocol.role(kept.times) == "train")[:, None]
    if rows.sum() < 2:
        raise BaselineError(
            f"target {target!r} has {int(rows.sum())} training values at training stations; "
            "the sensor may be missing there"
        )
    config = BoostingConfig(iterations=iterations, learning_rate=learning_rate, leaves=leaves, seed=seed)
    return CrossSensor(target, tuple(inputs), sun_up, hour_offset, config.regressor().fit(x[rows], y[rows]))
