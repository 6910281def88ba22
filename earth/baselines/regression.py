"""Ridge regression from lagged anomalies: AR (each station from itself) and VAR (each station from all).

Both regress the standardised anomalies at t + lead on those at lags 0, 1, 2, 3, 6, 12, 23, 24 h, all variables, without
intercept, one fit per lead ("direct"). Missing values are 0 in inputs and in training targets; scores and validation
errors ignore missing targets. Penalties are added to the diagonal of the unscaled normal equations (X'X + penalty I).

The readings that reproduce the table of *stations-v1* (found by experiment, all cells within 0.2 %):

* A sample trains for a lead if the span [t - 24 h, t + *that* lead] is clear of test and validation hours, not the span
  to the longest lead.
* AR: the penalty of {10, 100, 1000} is chosen per station and lead by the mean square validation error of the
  standardised anomalies, pooled over the station's variables.
* VAR: one penalty per lead, pooled over stations and variables. Not refitted on validation hours.
* At validation and test time inputs come from any observation at or before the initial time, training hour or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.linalg

from earth.baselines.climatology import Anomalies
from earth.baselines.panel import BaselineError, take, usable_lags
from earth.baselines.spatial import distances
from earth.protocol import Protocol, hours_to_timedelta

LAGS = (0, 1, 2, 3, 6, 12, 23, 24)
AR_PENALTIES = (10.0, 100.0, 1000.0)
VAR_PENALTIES = (100.0, 300.0, 1000.0, 3000.0, 10_000.0, 30_000.0)
# Beyond this many features the normal equations of one common fit cost more than neighbourhoods do (F^3 against S k^3),
# and over-fit.
MAX_FEATURES = 4000


@dataclasses.dataclass(frozen=True)
class Ridge:
    """A fitted regression for one lead.

    Attributes:
      lead_hours: the lead.
      lags: in time steps.
      groups: pairs (target stations, input stations), positions on the station axis.
      weights: per group float64 [len(lags) * len(inputs) * V, len(targets) * V], lag slowest, variable fastest.
      penalties: the chosen penalty of each group.
    """

    lead_hours: int | float
    lags: tuple[int, ...]
    groups: tuple[tuple[np.ndarray, np.ndarray], ...]
    weights: tuple[np.ndarray, ...]
    penalties: tuple[int | float, ...]

    def predict(self, anomalies: Anomalies, positions: np.ndarray) -> np.ndarray:
        """Standardised anomalies [I, S, V] at positions + lead from the record up to `positions` [I]; NaN for a
        station in no group.
        """
        out = np.full((len(positions), *anomalies.inputs.shape[1:]), np.nan)
        for (targets, inputs), weights in zip(self.groups, self.weights, strict=True):
            x = lagged(anomalies.inputs, positions, self.lags, inputs)
            out[:, targets] = (x @ weights).reshape(len(positions), len(targets), -1)
        return out


def lagged(inputs: np.ndarray, positions: np.ndarray, lags: Sequence[int], stations: np.ndarray) -> np.ndarray:
    """Features [I, len(lags) * len(stations) * V] from `inputs` [T, S, V]; lag slowest, variable fastest; 0 outside
    the record.
    """
    some = inputs[:, stations].reshape(len(inputs), -1)
    return np.concatenate([np.nan_to_num(take(some, positions - lag)) for lag in lags], -1)


def training_positions(
    anomalies: Anomalies, protocol: Protocol, lead_hours: int | float, lags: Sequence[int]
) -> np.ndarray:
    """Positions of the initial times whose span, from 24 h before (or the oldest lag) to the target, is inside the
    record and clear.
    """
    panel = anomalies.panel
    lead = panel.steps(lead_hours)
    before = max(max(lags), round(24 / panel.cadence_hours))
    positions = np.arange(before, len(panel.times) - lead)
    times = panel.times[positions]
    reach = hours_to_timedelta(before * panel.cadence_hours)
    return (
        positions[protocol.clear(times - reach, times + hours_to_timedelta(lead_hours))]
        if len(positions)
        else positions
    )


def scored_positions(anomalies: Anomalies, protocol: Protocol, lead_hours: int | float, role: str) -> np.ndarray:
    """Positions inside the record whose valid time t + lead has the role."""
    panel = anomalies.panel
    positions = np.arange(0, len(panel.times) - panel.steps(lead_hours))
    return positions[protocol.role(panel.times[positions] + hours_to_timedelta(lead_hours)) == role]


def fit_ar(
    anomalies: Anomalies,
    protocol: Protocol,
    lead_hours: int | float,
    *,
    penalties: Sequence[int | float] = AR_PENALTIES,
    **options,
) -> Ridge:
    """AR ridge: every station from its own variables; a penalty per station. Options as in `fit_ridge`."""
    groups = [(np.array([s]), np.array([s])) for s in range(len(anomalies.panel.stations))]
    return fit_ridge(anomalies, protocol, lead_hours, groups, penalties=penalties, **options)


def fit_var(
    anomalies: Anomalies,
    protocol: Protocol,
    lead_hours: int | float,
    *,
    penalties: Sequence[int | float] = VAR_PENALTIES,
    neighbours: int | None = None,
    lags: Sequence[int | float] = LAGS,
    **options,
) -> Ridge:
    """VAR ridge: every station from all stations, one penalty.

    Args:
      neighbours: each station from its nearest `neighbours` stations (itself included) with a penalty of its own,
        instead of from all. None = all, unless that makes more than 4,000 features; then as many as make 400 (ours).
      lags: hours.
      penalties, options: as in `fit_ridge`.
    """
    panel = anomalies.panel
    per_station = len(usable_lags(lags, panel.cadence_hours)) * len(panel.variables)
    everything = np.arange(len(panel.stations))
    if neighbours is None and per_station * len(everything) > MAX_FEATURES:
        neighbours = max(1, 400 // per_station)
    if neighbours is None or neighbours >= len(everything):
        groups = [(everything, everything)]
    else:
        order = np.argsort(
            distances(panel.latitude, panel.longitude, panel.latitude, panel.longitude), axis=1, kind="stable"
        )
        groups = [(np.array([s]), order[s, :neighbours]) for s in everything]
    return fit_ridge(anomalies, protocol, lead_hours, groups, penalties=penalties, lags=lags, **options)


def fit_ridge(
    anomalies: Anomalies,
    protocol: Protocol,
    lead_hours: int | float,
    groups: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    penalties: Sequence[int | float],
    lags: Sequence[int | float] = LAGS,
    refit: bool = False,
) -> Ridge:
    """Closed-form ridge of each group, the penalty chosen by validation error.

    Args:
      anomalies: standardised record.
      protocol: gives training spans and validation hours.
      lead_hours: the lead, a multiple of the cadence.
      groups: pairs (target stations, input stations).
      penalties: candidates; the first wins a tie.
      lags: hours; those off the cadence are dropped (`usable_lags`).
      refit: after the choice, fit again with validation hours in training (the second split of the data notes does,
        stations-v1 does not).

    Returns:
      Ridge. Without a validation target the penalty is chosen on the last 15 % of the training samples, then refitted
      on all (ours).

    Raises:
      BaselineError: no training sample is clear of test and validation hours.
    """
    steps = usable_lags(lags, anomalies.panel.cadence_hours)
    lead = anomalies.panel.steps(lead_hours)
    train = training_positions(anomalies, protocol, lead_hours, steps)
    if len(train) < 2:
        raise BaselineError(
            f"no training sample for the lead of {lead_hours:g} h: no span from "
            f"{max(24, max(steps) * anomalies.panel.cadence_hours):g} h before to {lead_hours:g} h after an initial "
            "time is clear of test and validation hours; shorten the lead or leave longer training stretches"
        )
    check = scored_positions(anomalies, protocol, lead_hours, "validation")
    final = train
    if refit and len(check):
        both = None if protocol.train is None else (*protocol.train, *protocol.validation)
        wider = Protocol(name=protocol.name, test=protocol.test, train=both)
        final = training_positions(anomalies, wider, lead_hours, steps)
    if not np.isfinite(take(anomalies.standardised, check + lead)).any():
        cut = max(1, int(0.85 * len(train)))
        train, check = train[:cut], train[cut:]
    targets_train = anomalies.inputs[train + lead]
    targets_check = anomalies.standardised[check + lead]
    refitting = len(final) != len(train)
    weights, chosen = [], []
    for targets, inputs in groups:
        x, y = lagged(anomalies.inputs, train, steps, inputs), targets_train[:, targets].reshape(len(train), -1)
        gram, moment = x.T @ x, x.T @ y
        x_check, y_check = (
            lagged(anomalies.inputs, check, steps, inputs),
            targets_check[:, targets].reshape(len(check), -1),
        )
        valid = np.isfinite(y_check)
        best, best_error, best_weights = penalties[0], np.inf, None
        # One Gram matrix per lead; a Cholesky factor per penalty (F^3/3) is cheaper than one eigendecomposition (~9
        # F^3) for up to two dozen.
        for penalty in penalties:
            w = solve_ridge(gram, moment, penalty)
            error = np.square((x_check @ w - y_check)[valid]).mean() if valid.any() else np.inf
            if best_weights is None or error < best_error:
                best, best_error, best_weights = penalty, error, w
        if refitting:
            x, y = (
                lagged(anomalies.inputs, final, steps, inputs),
                anomalies.inputs[final + lead][:, targets].reshape(len(final), -1),
            )
            best_weights = solve_ridge(x.T @ x, x.T @ y, best)
        assert best_weights is not None
        weights.append(best_weights)
        chosen.append(float(best))
    return Ridge(
        lead_hours, steps, tuple((np.asarray(a), np.asarray(b)) for a, b in groups), tuple(weights), tuple(chosen)
    )


def solve_ridge(gram: np.ndarray, moment: np.ndarray, penalty: int | float) -> np.ndarray:
    """(gram + penalty I)^-1 moment for symmetric positive semi-definite gram [F, F] and moment [F, K]."""
    system = gram.copy()
    system[np.diag_indices_from(system)] += penalty
    return scipy.linalg.solve(system, moment, assume_a="pos", overwrite_a=True)
