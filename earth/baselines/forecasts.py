"""Baseline forecasts as Datasets: one call from a record and a protocol to what verification scores.

Every baseline gets a predictive spread by the same route, the *Gaussian baseline*: the root mean square of its errors
on validation hours per station, variable and lead (a rolling-origin estimate no training sample has seen, though the
ridges' penalties were chosen on the same hours). Cells with fewer than 24 validation errors take the pooled value of
their variable and lead; without validation hours the errors on training hours stand in, which are smaller than errors
on new data (ours).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from tqdm import tqdm

from earth import export
from earth.baselines import spatial
from earth.baselines.boosting import fit_pooled_boosting
from earth.baselines.climatology import Anomalies, fit_anomalies
from earth.baselines.panel import BaselineError, Panel, take, usable_leads
from earth.baselines.regression import fit_ar, fit_var
from earth.protocol import Protocol, hours_to_timedelta, utc_times

MODELS = ("climatology", "persistence", "anomaly_persistence", "ar", "var")  # the quick ones
ALL_MODELS = (*MODELS, "boosting")
FEWEST_ERRORS = 24

# (anomalies, positions [I]) -> forecast [I, S, V] in the record's units, for one lead
Predictor = Callable[[Anomalies, np.ndarray], np.ndarray]


def climatology_forecast(anomalies: Anomalies, positions: np.ndarray, lead_hours: int | float) -> np.ndarray:
    """Climatology at t + lead: [I, S, V]."""
    panel = anomalies.panel
    return anomalies.climatology.predict(
        panel.times[0] + positions * (panel.times[1] - panel.times[0]) + hours_to_timedelta(lead_hours)
    )


def persistence_forecast(anomalies: Anomalies, positions: np.ndarray) -> np.ndarray:
    """The observation at t: [I, S, V]; NaN where it is missing (not scored)."""
    return anomalies.panel.values[positions]


def anomaly_persistence_forecast(anomalies: Anomalies, positions: np.ndarray, lead_hours: int | float) -> np.ndarray:
    """Climatology at t + lead plus the anomaly at t: [I, S, V]; NaN where the observation at t is missing (not
    scored).
    """
    return climatology_forecast(anomalies, positions, lead_hours) + anomalies.standardised[positions] * anomalies.scale


def _fit(
    model: str, anomalies: Anomalies, protocol: Protocol, lead: int | float, options: Mapping[str, Any]
) -> tuple[Predictor, dict[str, Any]]:
    if model == "climatology":
        return lambda a, p: climatology_forecast(a, p, lead), {}
    if model == "persistence":
        return persistence_forecast, {}
    if model == "anomaly_persistence":
        return lambda a, p: anomaly_persistence_forecast(a, p, lead), {}
    if model in ("ar", "var"):
        ridge = (fit_ar if model == "ar" else fit_var)(anomalies, protocol, lead, **options)
        return lambda a, p: climatology_forecast(a, p, lead) + ridge.predict(a, p) * a.scale, {
            "penalties": list(ridge.penalties)
        }
    if model == "boosting":
        pooled = fit_pooled_boosting(anomalies, protocol, lead, **options)
        return lambda a, p: climatology_forecast(a, p, lead) + pooled.predict(a, p) * a.scale, {}
    raise BaselineError(f"baseline {model!r} is not known; choose from {', '.join(ALL_MODELS)}")


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Baselines fitted on one record.

    Attributes:
      anomalies: record, climatology and scale.
      protocol: what they were fitted under.
      leads: hours.
      predictors: per model and lead.
      spread: per model float64 [L, S, V], units of the record.
      details: per model and lead, e.g. the chosen penalties.
    """

    anomalies: Anomalies
    protocol: Protocol
    leads: tuple[int | float, ...]
    predictors: Mapping[str, tuple[Predictor, ...]]
    spread: Mapping[str, np.ndarray]
    details: Mapping[str, tuple[dict[str, Any], ...]]

    def forecast(self, model: str, init_times: Any = None, *, role: str = "test") -> xr.Dataset:
        """Forecasts of one baseline with its spread.

        Args:
          model: a fitted baseline.
          init_times: [I] datetimes on the record's axis; None = every one from which a lead is valid in an interval of
            `role`.
          role: "test" or "validation".

        Returns:
          Dataset as in `earth.export.to_dataset`, in the record's units.
        """
        if model not in self.predictors:
            raise BaselineError(f"baseline {model!r} was not fitted; there are {', '.join(self.predictors)}")
        panel = self.anomalies.panel
        times = self.protocol.init_times(panel.times, self.leads, role) if init_times is None else utc_times(init_times)
        positions = panel.positions(times)
        if len(positions) and (positions.min() < 0 or positions.max() >= len(panel.times)):
            raise BaselineError(f"an initial time lies outside the record, {panel.times[0]} to {panel.times[-1]}")
        mean = np.stack([predict(self.anomalies, positions) for predict in self.predictors[model]], 1)
        spread = np.broadcast_to(self.spread[model][None], mean.shape)
        about = {"title": f"{model} baseline", "source": f"earth.baselines {model}, protocol {self.protocol.name}"}
        return export.to_dataset(
            mean,
            spread,
            init_times=times,
            lead_hours=self.leads,
            variables=panel.variables,
            stations=panel.stations,
            latitude=panel.latitude,
            longitude=panel.longitude,
            height=panel.height,
            attributes=about,
        )

    def forecast_at(
        self, model: str, places: Panel, init_times: Any = None, *, role: str = "test", method: str = "lapse_idw"
    ) -> xr.Dataset:
        """Forecasts of one baseline carried to other stations: the baseline for held-out stations.

        The spread is the root mean square error, on validation hours, of carrying the forecast to each fitted station
        from the others, pooled over stations per lead and variable (ours).

        Args:
          model, init_times, role: as in `forecast`.
          places: where to (its observations are not read).
          method: "nearest", "idw" or "lapse_idw".
        """
        panel = self.anomalies.panel
        checked = self.protocol.init_times(panel.times, self.leads, "validation")
        spread = None
        if len(checked) and len(panel.stations) > 1:
            issued = self.forecast(model, checked)
            spread = carrying_error(issued, panel, self.protocol, method=method)
        return interpolate_forecast(
            self.forecast(model, init_times, role=role),
            stations=places.stations,
            latitude=places.latitude,
            longitude=places.longitude,
            height=places.height,
            method=method,
            spread=spread,
        )


def fit_baselines(
    panel: Panel,
    protocol: Protocol,
    *,
    models: Sequence[str] = MODELS,
    leads: Iterable[int | float] | None = None,
    anomalies: Anomalies | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = False,
) -> Baselines:
    """Fit baselines on a record under a protocol.

    Held-out stations of the protocol are taken out of the record first: they are in nobody's inputs, targets or
    normalisation.

    Args:
      panel: the record (any units).
      protocol: split of times and stations.
      models: names from `ALL_MODELS`.
      leads: hours; None = the protocol's, those on the record's cadence.
      anomalies: climatology and scale already fitted on this record; None = fit on training hours.
      options: extra keywords per model, e.g. {"var": {"penalties": (300.0,), "refit": True}}.
      progress: show a progress bar.

    Returns:
      Baselines.
    """
    kept = panel.without(protocol.held_out)
    if not kept.stations:
        raise BaselineError("the protocol holds out every station of the record; leave some to train on")
    asked = tuple(protocol.leads if leads is None else leads)
    hours = usable_leads(asked, kept.cadence_hours)
    if not hours:
        raise BaselineError(
            f"none of the leads {asked} h is a multiple of the record's cadence of {kept.cadence_hours:g} h; "
            "pass leads="
        )
    if anomalies is None:
        anomalies = fit_anomalies(kept, protocol.role(kept.times) == "train")
    predictors: dict[str, tuple[Predictor, ...]] = {}
    details: dict[str, tuple[dict[str, Any], ...]] = {}
    spread: dict[str, np.ndarray] = {}
    with tqdm(total=len(models) * len(hours), desc="baselines", disable=not progress) as bar:
        for model in models:
            fitted, notes, sds = [], [], []
            for lead in hours:
                predict, note = _fit(model, anomalies, protocol, lead, (options or {}).get(model, {}))
                fitted.append(predict)
                notes.append(note)
                sds.append(_residual_sd(anomalies, protocol, lead, predict))
                bar.update()
            predictors[model], details[model], spread[model] = tuple(fitted), tuple(notes), np.stack(sds)
    return Baselines(anomalies, protocol, hours, predictors, spread, details)


def _residual_sd(anomalies: Anomalies, protocol: Protocol, lead_hours: int | float, predict: Predictor) -> np.ndarray:
    """Root mean square error on validation hours (training hours where there are none), [S, V]."""
    panel = anomalies.panel
    lead = panel.steps(lead_hours)
    positions = np.arange(0, max(len(panel.times) - lead, 0))
    role = protocol.role(panel.times[positions] + hours_to_timedelta(lead_hours))
    use = positions[role == "validation"]
    if len(use) < FEWEST_ERRORS:
        use = positions[(role == "validation") | (role == "train")]
    error = predict(anomalies, use) - panel.values[use + lead]
    return pooled_rms(error, axis=0)


def pooled_rms(error: np.ndarray, axis: int = 0) -> np.ndarray:
    """Root mean square over one axis of error [..., V], NaN left out; a cell with fewer than 24 errors takes its
    variable's pooled value.
    """
    valid = np.isfinite(error)
    square = np.where(valid, error, 0.0) ** 2
    count = valid.sum(axis)
    others = tuple(range(error.ndim - 1))
    total = valid.sum(others)
    pooled = np.sqrt(square.sum(others) / np.maximum(total, 1))
    pooled = np.where(total > 0, pooled, np.nan)
    return np.where(count >= FEWEST_ERRORS, np.sqrt(square.sum(axis) / np.maximum(count, 1)), pooled)


def interpolate_forecast(
    forecast: xr.Dataset,
    *,
    stations: Sequence[str],
    latitude: np.ndarray,
    longitude: np.ndarray,
    height: np.ndarray,
    method: str = "lapse_idw",
    spread: np.ndarray | None = None,
) -> xr.Dataset:
    """A forecast at stations carried to other points.

    The mean of every initial time and lead is interpolated on its own (`spatial.interpolate`). There is no record at
    the points to fit a spread on: pass `carrying_error`; otherwise the spread of the nearest station is kept where the
    forecast has one, an underestimate, as errors of the interpolation come on top.

    Args:
      forecast: Dataset (init_time, lead_time, station).
      stations, latitude, longitude, height: the points [P].
      method: "nearest", "idw" or "lapse_idw".
      spread: float [L, V], standard deviation per lead and variable at any point.

    Returns:
      Dataset with the new stations.
    """
    place = [forecast[n].to_numpy() for n in ("latitude", "longitude", "height")]
    to_place = [np.asarray(a, float) for a in (latitude, longitude, height)]
    names = export.forecast_variables(forecast)

    def carried(name: str, how: str) -> np.ndarray:
        values = forecast[name].transpose("init_time", "lead_time", "station").to_numpy()
        return spatial.interpolate(
            values, place[0], place[1], place[2], to_place[0], to_place[1], to_place[2], method=how
        )

    mean = np.stack([carried(n, method) for n in names], -1)
    sd = None
    if spread is not None:
        sd = np.broadcast_to(spread[None, :, None], mean.shape)
    elif all(n + export.SPREAD in forecast for n in names):
        sd = np.stack([carried(n + export.SPREAD, "nearest") for n in names], -1)
    about = dict(forecast.attrs) | {"title": f"{forecast.attrs.get('title', 'forecast')}, {method} to other points"}
    return export.to_dataset(
        mean,
        sd,
        init_times=forecast["init_time"].to_numpy(),
        lead_hours=export.lead_hours_of(forecast),
        variables=names,
        stations=stations,
        latitude=to_place[0],
        longitude=to_place[1],
        height=to_place[2],
        attributes=about,
    )


def carrying_error(
    forecast: xr.Dataset, panel: Panel, protocol: Protocol, *, role: str = "validation", method: str = "lapse_idw"
) -> np.ndarray:
    """Root mean square error of a forecast carried to each of its stations from the others: float64 [L, V].

    Args:
      forecast: at stations of `panel`, whose variables it has.
      panel: the record it is checked against.
      protocol, role: valid times to use.
    """
    names = export.forecast_variables(forecast)
    seen = panel.select(stations=[str(s) for s in forecast["station"].to_numpy()], variables=names)
    mean = np.stack([forecast[n].transpose("init_time", "lead_time", "station").to_numpy() for n in names], -1)
    valid = utc_times(forecast["valid_time"].transpose("init_time", "lead_time").to_numpy())
    observed = take(seen.values, seen.positions(valid))
    observed[protocol.role(valid) != role] = np.nan
    error = np.empty_like(observed)
    for s in range(len(seen.stations)):
        others = np.arange(len(seen.stations)) != s
        source = seen.latitude[others], seen.longitude[others], seen.height[others]
        target = seen.latitude[[s]], seen.longitude[[s]], seen.height[[s]]
        rows = np.moveaxis(mean[:, :, others], 2, -1)  # [I, L, V, S - 1]
        error[:, :, s] = spatial.interpolate(rows, *source, *target, method=method)[..., 0] - observed[:, :, s]
    ok = np.isfinite(error)
    count = ok.sum((0, 2))
    square = np.where(ok, error, 0.0) ** 2
    return np.where(count > 0, np.sqrt(square.sum((0, 2)) / np.maximum(count, 1)), np.nan)


def interpolate_panel(panel: Panel, targets: Panel, *, method: str = "lapse_idw") -> np.ndarray:
    """Nowcast at the stations of `targets` [T, S', V] from the simultaneous reports of `panel` (same variables)."""
    place = panel.latitude, panel.longitude, panel.height, targets.latitude, targets.longitude, targets.height
    return np.moveaxis(spatial.interpolate(np.moveaxis(panel.values, 1, -1), *place, method=method), -1, 1)
