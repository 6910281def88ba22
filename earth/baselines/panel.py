"""Station records as one dense array: what the baselines read.

Shape legend of `earth.baselines`: `T` times, `S` stations, `V` variables, `L` leads, `I` initial times, `F` features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from earth.protocol import utc_times


class BaselineError(ValueError):
    """A record or an option a baseline cannot work with; the message names the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """A dense record of fixed stations at a regular cadence.

    Attributes:
      times: ``datetime64[ns]`` [T], increasing at one cadence.
      stations: S names.
      variables: V names (ERA5 names in the library; any in a test).
      values: float64 [T, S, V], NaN = missing; any unit, the same for all times.
      latitude, longitude: float64 [S], degrees.
      height: float64 [S], metres, NaN = unknown.
    """

    times: np.ndarray
    stations: tuple[str, ...]
    variables: tuple[str, ...]
    values: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray
    height: np.ndarray

    def __post_init__(self) -> None:
        shape = (len(self.times), len(self.stations), len(self.variables))
        if self.values.shape != shape:
            raise BaselineError(
                f"values have shape {self.values.shape}, but times, stations and variables give {shape}"
            )
        for name in ("latitude", "longitude", "height"):
            if getattr(self, name).shape != (len(self.stations),):
                raise BaselineError(
                    f"{name} has shape {getattr(self, name).shape}, expected one per station ({len(self.stations)})"
                )
        for name in ("stations", "variables"):
            names = getattr(self, name)
            if len(set(names)) != len(names):
                twice = next(n for i, n in enumerate(names) if n in names[:i])
                raise BaselineError(f"{twice!r} is twice among the {name}; merge or rename one")
        if len(self.times) < 2:
            raise BaselineError(f"a record needs at least two times to have a cadence, got {len(self.times)}")
        steps = np.diff(self.times)
        if steps.min() <= np.timedelta64(0, "ns") or steps.min() != steps.max():
            at = int(np.argmax(steps != steps[0]))
            raise BaselineError(
                f"times are not at one cadence: {self.times[at]} is followed by {self.times[at + 1]}; "
                "build the panel with Panel.from_grid or Panel.from_frame, which fill gaps with NaN"
            )

    @property
    def cadence_hours(self) -> float:
        """Hours between consecutive times."""
        return float((self.times[1] - self.times[0]) / np.timedelta64(1, "s")) / 3600

    def to_grid(self) -> xr.Dataset:
        """The record as a Dataset with dims (time, station), the form of `Reports.grid`: what verification reads."""
        data = {name: (("time", "station"), self.values[..., v]) for v, name in enumerate(self.variables)}
        place = {n: ("station", getattr(self, n)) for n in ("latitude", "longitude", "height")}
        return xr.Dataset(data, {"time": self.times, "station": np.asarray(self.stations, dtype=object), **place})

    @classmethod
    def from_grid(cls, grid: xr.Dataset, variables: Iterable[str] | None = None) -> Panel:
        """From the Dataset of `Reports.grid`: dims time, station; coordinates latitude, longitude, height on
        station.

        Gaps in the time axis are filled with NaN; the cadence is the time step of most of them, else their common
        divisor.
        """
        names = tuple(str(n) for n in grid.data_vars) if variables is None else tuple(variables)
        for name in names:
            if name not in grid.data_vars:
                raise BaselineError(
                    f"variable {name!r} is not in the record; it has {', '.join(map(str, grid.data_vars))}"
                )
        values = np.stack([grid[n].transpose("time", "station").to_numpy().astype(np.float64) for n in names], -1)
        times, values = _regular(utc_times(grid["time"].to_numpy()), values)

        def coordinate(name: str) -> np.ndarray:
            found = name in grid.coords or name in grid.variables
            return np.asarray(grid[name].to_numpy() if found else np.full(grid.sizes["station"], np.nan), np.float64)

        stations = tuple(str(s) for s in grid["station"].to_numpy())
        return cls(
            times, stations, names, values, coordinate("latitude"), coordinate("longitude"), coordinate("height")
        )

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        variables: Mapping[str, str] | Sequence[str],
        *,
        time: str = "time",
        station: str = "station",
        latitude: str = "lat",
        longitude: str = "lon",
        height: str | None = "elev",
    ) -> Panel:
        """From a wide table, one row per station and time.

        Args:
          frame: the table; station coordinates are taken from each station's first row with finite ones.
          variables: columns to read, or a mapping column -> name in the panel.
          time, station, latitude, longitude, height: column names; height None or absent = unknown.

        Raises:
          BaselineError: a column is not there, or a (time, station) pair occurs twice.
        """
        renamed = dict(variables) if isinstance(variables, Mapping) else {v: v for v in variables}
        for column in (time, station, latitude, longitude, *renamed):
            if column not in frame.columns:
                raise BaselineError(
                    f"column {column!r} is not in the table; it has {', '.join(map(str, frame.columns))}"
                )
        stamps = utc_times(frame[time])
        names, code = np.unique(frame[station].astype(str).to_numpy(dtype=object), return_inverse=True)
        axis, row = np.unique(stamps, return_inverse=True)
        cell = row * len(names) + code
        order = np.argsort(cell, kind="stable")
        twice = np.flatnonzero(np.diff(cell[order]) == 0)
        if twice.size:
            at = int(order[twice[0] + 1])
            raise BaselineError(
                f"row {at}: station {names[code[at]]} reports twice at {stamps[at]}; drop or merge duplicates first"
            )
        values = np.full((len(axis), len(names), len(renamed)), np.nan)
        for v, column in enumerate(renamed):
            values[row, code, v] = frame[column].to_numpy(dtype=np.float64)
        axis, values = _regular(axis, values)

        def coordinate(column: str | None) -> np.ndarray:
            if column is None or column not in frame.columns:
                return np.full(len(names), np.nan)
            first = pd.Series(frame[column].to_numpy(dtype=np.float64)).groupby(code).first()
            return first.reindex(range(len(names))).to_numpy()

        coordinates = coordinate(latitude), coordinate(longitude), coordinate(height)
        return cls(axis, tuple(names), tuple(renamed.values()), values, *coordinates)

    def select(self, *, stations: Iterable[str] | None = None, variables: Iterable[str] | None = None) -> Panel:
        """The panel of some stations and variables, in the order given."""
        pick_s = tuple(self.stations if stations is None else stations)
        pick_v = tuple(self.variables if variables is None else variables)
        s = [_position(self.stations, n, "station") for n in pick_s]
        v = [_position(self.variables, n, "variable") for n in pick_v]
        coordinates = self.latitude[s], self.longitude[s], self.height[s]
        return Panel(self.times, pick_s, pick_v, self.values[:, s][:, :, v], *coordinates)

    def without(self, stations: Iterable[str]) -> Panel:
        """The panel without some stations (names not in the panel are ignored)."""
        dropped = set(stations)
        return self.select(stations=[s for s in self.stations if s not in dropped])

    def steps(self, hours: int | float) -> int:
        """Hours as a whole number of time steps; BaselineError when they are not on the cadence."""
        steps = round(hours / self.cadence_hours)
        if not np.isclose(steps * self.cadence_hours, hours):
            raise BaselineError(
                f"{hours:g} h is no multiple of the record's cadence of {self.cadence_hours:g} h; "
                "choose another lead or lag"
            )
        return steps

    def positions(self, times: Any) -> np.ndarray:
        """Index of each time on the panel's axis; may lie outside [0, T); BaselineError for a time between two
        steps.
        """
        offset = utc_times(times) - self.times[0]
        step = self.times[1] - self.times[0]
        position, remainder = np.divmod(offset.astype("int64"), step.astype("int64"))
        if np.any(remainder):
            at = int(np.flatnonzero(remainder)[0])
            raise BaselineError(
                f"time {utc_times(times).reshape(-1)[at]} is not on the record's axis "
                f"(cadence {self.cadence_hours:g} h from {self.times[0]}); choose a time on it"
            )
        return position

    def at(self, times: Any, hours: int | float = 0) -> np.ndarray:
        """values at times + hours: [..., S, V], NaN outside the record."""
        return take(self.values, self.positions(times) + self.steps(hours))


def take(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """values[positions] along the first axis, NaN where a position lies outside the record."""
    inside = (positions >= 0) & (positions < len(values))
    out = values[np.where(inside, positions, 0)]
    return out if inside.all() else np.where(inside.reshape(inside.shape + (1,) * (values.ndim - 1)), out, np.nan)


def usable_lags(lags: Sequence[int | float], cadence_hours: int | float) -> tuple[int, ...]:
    """Lags in hours as time steps of the record.

    Lags that are no multiple of the cadence are dropped (ours). If fewer than three survive (a daily record keeps 0 and
    24 h of the standard lags), the lags are the last four time steps instead (ours).
    """
    steps = sorted({round(h / cadence_hours) for h in lags if np.isclose(round(h / cadence_hours) * cadence_hours, h)})
    return tuple(steps) if len(steps) >= 3 else (0, 1, 2, 3)


def usable_leads(leads: Sequence[int | float], cadence_hours: int | float) -> tuple[int | float, ...]:
    """The leads (hours) that are multiples of the cadence."""
    return tuple(h for h in leads if h > 0 and np.isclose(round(h / cadence_hours) * cadence_hours, h))


def _regular(times: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fill gaps in the time axis with NaN; the cadence is the common divisor of all steps."""
    if len(times) < 2:
        raise BaselineError(f"a record needs at least two times to have a cadence, got {len(times)}")
    gaps = np.diff(times)
    if gaps.min() <= np.timedelta64(0, "ns"):
        at = int(np.argmin(gaps))
        raise BaselineError(
            f"times do not increase: {times[at]} is followed by {times[at + 1]}; sort the record and drop duplicates"
        )
    steps, counts = np.unique(gaps, return_counts=True)
    if len(steps) == 1:
        return times, values
    # One late report must not make the whole record twenty times denser: where the common divisor leaves most of the
    # axis empty, the commonest step is the cadence and whatever is off it an error.
    divisor = np.gcd.reduce(steps.astype("int64")).astype(steps.dtype)
    dense = 2 * len(times) >= int((times[-1] - times[0]) / divisor)
    step = divisor if dense else steps[np.argmax(counts)]
    offset, remainder = np.divmod((times - times[0]).astype("int64"), step.astype("int64"))
    if remainder.any():
        at = int(np.flatnonzero(remainder)[0])
        raise BaselineError(
            f"time {times[at]} is not on a regular axis of {_hours(step):g} h from {times[0]}; "
            "grid the record first (Reports.grid(cadence=...))"
        )
    full = np.full((int(offset[-1]) + 1, *values.shape[1:]), np.nan)
    full[offset] = values
    return times[0] + np.arange(len(full)) * step, full


def _hours(step: np.timedelta64) -> float:
    return float(step / np.timedelta64(1, "s")) / 3600


def _position(names: tuple[str, ...], name: str, what: str) -> int:
    if name not in names:
        raise BaselineError(f"{what} {name!r} is not in the record; it has {', '.join(names[:40])}")
    return names.index(name)
