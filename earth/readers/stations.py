"""Wide station tables: time, station, position and one column per variable, as most people keep their data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from earth import sensors
from earth.observations import DropReport, EmptyWindowError, Reports, UnknownVariableError, to_reports
from earth.readers import arrays
from earth.readers.tables import ColumnMapping, is_long, load_frame, read_long_or_wide, wide_to_reports


@dataclasses.dataclass(frozen=True)
class StationTable:
    """A user's table as Reports, and the way back to its columns and units.

    Attributes:
      reports: the observations, SI.
      columns: file column -> ColumnMapping; columns computed from others (u, v) have `derived_from`.
      report: what was dropped, masked, changed and guessed.
    """

    reports: Reports
    columns: dict[str, ColumnMapping]
    report: DropReport

    def column(self, name: str) -> str:
        """The file column of a variable (or of a file column itself); raises `UnknownVariableError` naming the
        nearest.
        """
        if name in self.columns:
            return name
        for column, mapping in self.columns.items():
            if mapping.variable == name:
                return column
        folded = {sensors.name_key(column): column for column in self.columns}
        if sensors.name_key(name) in folded:
            return folded[sensors.name_key(name)]
        alias = sensors.lookup_alias(name, self.reports.sensor)
        for column, mapping in self.columns.items():
            if alias is not None and mapping.variable == alias:
                return column
        known = [*self.columns, *(m.variable for m in self.columns.values())]
        raise UnknownVariableError(
            f"variable {name!r} is not in the table; the nearest is {sensors.nearest(name, known)!r}; columns: "
            f"{', '.join(self.columns)}"
        )

    def variable(self, name: str) -> str:
        """The variable behind a file column, alias or variable name."""
        return self.columns[self.column(name)].variable

    def units(self, name: str) -> str:
        """The file's unit of a variable."""
        return self.columns[self.column(name)].units

    def to_file_units(self, name: str, values: Any) -> Any:
        """SI values of a variable in the file's unit."""
        return self.columns[self.column(name)].from_si(values)


def read_stations(
    source: Any,
    *,
    columns: Mapping[str, str | None] | None = None,
    units: Mapping[str, str] | None = None,
    timezone: str = "UTC",
    sensor: str = "station",
    variables: Sequence[str] | None = None,
    stations: Any = None,
    derive_wind: bool = True,
    trust_coordinates: bool = False,
) -> StationTable:
    """Reads a table of station reports: wide (one column per variable) or long (recognised by variable and value
    columns).

    Args:
      source: path of a parquet, CSV, TSV, feather, zarr or netCDF file, a DataFrame, or an xarray Dataset.
      columns: file column -> role (`time`, `latitude`, `longitude`, `height`, `station`), variable or alias; None
        leaves the column out. Only needed where the names are not recognised.
      units: file column or variable -> unit, e.g. {"t2m": "degC"}; without it the unit is inferred and listed in the
        report.
      timezone: zone of naive times, e.g. "Asia/Taipei" or "+08:00".
      sensor: registry name; a moving one such as `radiosonde` takes `pressure` as the vertical coordinate.
      variables: read only these (file columns, variables or aliases); each must have values.
      stations: a table of station, latitude, longitude, height, for files that keep positions apart.
      derive_wind: compute u and v (m/s, or the file's unit) from speed and direction if the file has none: calm is u =
        v = 0, an unknown direction with wind is missing.
      trust_coordinates: see `observations.check_coordinates`.

    Numeric columns with unknown names are kept as variables under their own name and unit. Stations that move are
    split (`observations.split_moves`).

    Raises: ObservationError subclasses naming row, value and remedy; FileNotFoundError.
    """
    if isinstance(source, xr.Dataset) or (
        isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() in arrays.SUFFIXES
    ):
        frame, attributes = arrays.to_frame(source)
    else:
        frame, attributes = load_frame(source), {}
    if is_long(frame, columns):
        table, mappings, report = read_long_or_wide(
            frame,
            columns=columns,
            units=units,
            timezone=timezone,
            sensor=sensor,
            variables=None,
            stations=stations,
            trust_coordinates=trust_coordinates,
        )
        by_sensor = to_reports(table)
        if sensor not in by_sensor:
            raise EmptyWindowError(f"the table has no {sensor!r} report, only {', '.join(by_sensor)}; pass sensor=")
        reports = by_sensor[sensor]
        for other in sorted(set(by_sensor) - {sensor}):
            count = int(np.asarray(table["sensor"] == other).sum())
            report.drop(f"sensor {other}, not asked for", count)
            report.rows_kept -= count
    else:
        reports, mappings, report = wide_to_reports(
            frame,
            sensor=sensor,
            columns=columns,
            units=units,
            attributes=attributes,
            timezone=timezone,
            variables=variables,
            stations=stations,
            trust_coordinates=trust_coordinates,
        )
    if derive_wind:
        reports, mappings = _derive_wind(reports, mappings, report)
    out = StationTable(reports, mappings, report)
    if variables is not None:
        chosen = [out.variable(name) for name in variables]
        kept = {c: m for c, m in mappings.items() if m.variable in chosen}
        out = StationTable(_with_values(reports.select(variables=list(dict.fromkeys(chosen))), report), kept, report)
    return out


def _with_values(reports: Reports, report: DropReport) -> Reports:
    """Without the reports that have no value of the chosen variables (counted)."""
    valued = np.asarray(np.isfinite(reports.values).any(axis=1))
    report.drop("no value of the variables asked for", int((~valued).sum()))
    report.rows_kept -= int((~valued).sum())
    if not valued.any():
        raise EmptyWindowError(f"no report has a value of {', '.join(reports.variables)}; choose other variables=")
    return reports.take(valued)


def wind_components(speed: Any, direction: Any) -> tuple[np.ndarray, np.ndarray]:
    """Eastward and northward wind from speed and the direction it blows *from* (degrees): u = -ws sin wd, v = -ws cos
    wd.

    Calm (speed 0) is u = v = 0 whatever the direction; a missing direction with wind gives NaN. Units of u, v are
    those of speed.
    """
    speed, direction = np.asarray(speed, np.float64), np.asarray(direction, np.float64)
    angle = np.deg2rad(direction)
    calm = speed == 0
    return np.where(calm, 0.0, -speed * np.sin(angle)), np.where(calm, 0.0, -speed * np.cos(angle))


def _derive_wind(
    reports: Reports, mappings: dict[str, ColumnMapping], report: DropReport
) -> tuple[Reports, dict[str, ColumnMapping]]:
    for prefix in ("10m_", ""):
        names = [
            f"{prefix}{part}" for part in ("wind_speed", "wind_direction", "u_component_of_wind", "v_component_of_wind")
        ]
        have = [name in reports.variables for name in names]
        if not (have[0] and have[1]) or all(have[2:]):
            continue
        speed, direction = (reports.values[:, reports.variables.index(name)] for name in names[:2])
        components = wind_components(speed, direction)
        source = {m.variable: c for c, m in mappings.items()}
        file_speed = mappings[source[names[0]]]
        for variable, letter, component, there in zip(names[2:], "uv", components, have[2:], strict=True):
            if there or not np.isfinite(component).any():
                continue
            column = letter if letter not in mappings else f"{letter}10" if f"{letter}10" not in mappings else variable
            mappings = mappings | {
                column: ColumnMapping(
                    variable,
                    file_speed.units,
                    file_speed.scale,
                    0.0,
                    file_speed.inferred,
                    (source[names[0]], source[names[1]]),
                )
            }
            values = np.concatenate([reports.values, component[:, None].astype(np.float32)], axis=1)
            error = (
                None
                if reports.error is None
                else np.concatenate([reports.error, np.full((len(reports), 1), np.nan, np.float32)], axis=1)
            )
            reports = dataclasses.replace(reports, variables=(*reports.variables, variable), values=values, error=error)
            report.note(f"{variable} computed from {source[names[0]]!r} and {source[names[1]]!r}")
    return reports, mappings
