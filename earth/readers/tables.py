"""Tables of users (parquet, CSV, DataFrame), long or wide, to the observation table and to `Reports`.

A long table has one row per value, with columns for the variable and the value; a wide one has a column per variable.
How columns are recognised and converted: `earth.readers.columns`. Both ways share the checks of `earth.observations`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from earth import observations, sensors
from earth.observations import (
    CoordinateError,
    DropReport,
    EmptyWindowError,
    MissingVariableError,
    Reports,
    SchemaError,
    TimeError,
    UnitError,
)
from earth.readers.columns import (
    ROLES,
    Column,
    ColumnMapping,
    Layout,
    find_columns,
    known_unit,
    plain_name,
    stated_unit,
    suffix_unit,
    to_si,
    value_column,
)
from earth.sensors import name_key


# ---------------------------------------------------------------------------------------------------------------- files
def load_frame(source: Any) -> pd.DataFrame:
    """A DataFrame from a DataFrame or from a parquet, CSV (any delimiter, `.gz` too), TSV or feather file.

    An unnamed DatetimeIndex becomes column `time`, named index levels become columns.

    Raises: FileNotFoundError; SchemaError for an unreadable or truncated file, an unknown suffix, or doubled columns.
    """
    if isinstance(source, pd.DataFrame):
        frame = source
    elif isinstance(source, (str, os.PathLike)):
        frame = _read_file(Path(source))
    else:
        raise SchemaError(f"cannot read observations from {type(source).__name__}; pass a path or a pandas DataFrame")
    if isinstance(frame.index, pd.DatetimeIndex) and frame.index.name is None:
        frame = frame.rename_axis(index="time")
    if any(name is not None for name in frame.index.names):
        levels = [name for name in frame.index.names if name is not None and name not in frame.columns]
        frame = frame.reset_index(level=levels) if levels else frame
    frame = frame.reset_index(drop=True)
    frame.columns = observations.check_columns(frame.columns)
    return frame


def _read_file(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise FileNotFoundError(f"observation file {path} does not exist")
    suffixes = [s.lower() for s in path.suffixes]
    kind = next((s for s in reversed(suffixes) if s not in (".gz", ".bz2", ".xz", ".zst")), "")
    try:
        if kind in (".parquet", ".pq") or path.is_dir():
            return pd.read_parquet(path)
        if kind == ".feather":
            return pd.read_feather(path)
        if kind in (".csv", ".tsv", ".txt", ".dat"):
            head = pd.read_csv(path, header=None, nrows=1, sep="\x00", engine="python", dtype=str).iloc[0, 0]
            separator = max(",;\t|", key=str(head).count)
            if not str(head).count(separator):
                separator = r"\s+"
            decimal = "," if separator == ";" and _has_decimal_comma(path) else "."
            return pd.read_csv(path, sep=separator, decimal=decimal, low_memory=False, skipinitialspace=True)
    except (OSError, ValueError, UnicodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise SchemaError(
            f"{path} cannot be read as {kind or 'parquet'}; is it truncated or of another format? ({error})"
        ) from error
    raise SchemaError(
        f"{path} has no suffix this reader knows; use .parquet, .csv, .tsv, .txt or .feather, or pass a DataFrame"
    )


def _has_decimal_comma(path: Path) -> bool:
    sample = pd.read_csv(path, sep=";", nrows=200, dtype=str)
    text = sample.to_numpy().ravel().astype(str)
    return any(re.fullmatch(r"-?\d+,\d+", t) for t in text) and not any(re.fullmatch(r"-?\d+\.\d+", t) for t in text)


# ------------------------------------------------------------------------------------------------------- shared reading
def read_times(frame: pd.DataFrame, out: Layout, timezone: str, report: DropReport) -> np.ndarray:
    """Seconds since 1970 [n] from the time column, with the hour from a second one where the first holds days only."""
    by_key = {name_key(n): n for n in frame.columns}
    if "time" not in out.roles or name_key(out.roles["time"]) == "day":
        if {"year", "month", "day"} <= set(by_key):
            parts = {p: observations.to_numbers(frame[by_key[p]]) for p in ("year", "month", "day")}
            parts |= {p: observations.to_numbers(frame[by_key[p]]) for p in ("hour", "minute") if p in by_key}
            return _from_parts(parts, timezone, report)
    if "time" not in out.roles:
        raise SchemaError(
            f"no time column found among {', '.join(map(str, frame.columns))}; name it with "
            "columns={'<your column>': 'time'}"
        )
    name = out.roles["time"]
    clock = next((by_key[k] for k in _CLOCK_NAMES if k in by_key and _is_clock(frame[by_key[k]])), None)
    day = name if name != clock else next((by_key[k] for k in ("date", "day", "datum", "dateutc") if k in by_key), None)
    if clock is not None and day is not None:
        days = observations.parse_times(frame[day], "UTC", DropReport())
        pieces = frame[clock].astype(str).str.extract(r"^(\d{1,2}):(\d{2})").astype(float)
        report.note(f"time put together from {day!r} and {clock!r}")
        return _combine(days, (pieces[0] * 3600 + pieces[1] * 60).to_numpy(), timezone, report)
    column = frame[name]
    hour = next(
        (by_key[k] for k in ("hour", "hr", "hh", "utchour", "hourutc") if k in by_key and k not in out.roles.values()),
        None,
    )
    if hour is not None and name_key(name) in ("date", "day", "datum", "yyyymmdd", "time"):
        days = observations.parse_times(column, "UTC", DropReport())
        known = days[days != observations.MISSING_TIME]
        if known.size and (known % 86_400 == 0).all():
            hours = observations.to_numbers(frame[hour])
            if (np.isnan(hours) | ((hours >= 0) & (hours <= 24))).all():
                report.note(f"time put together from {name!r} and {hour!r}")
                return _combine(days, hours * 3600, timezone, report)
    return observations.parse_times(column, timezone, report)


_CLOCK_NAMES = ("time", "clock", "timeutc", "utctime", "localtime", "hhmm")


def _is_clock(column: Any) -> bool:
    """Whether a column holds times of day such as 06:30."""
    if column.dtype != object and not isinstance(column.dtype, pd.StringDtype):
        return False
    some = column.dropna().astype(str).head(50)
    return bool(len(some)) and bool(some.str.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?").all())


def _from_parts(parts: Mapping[str, np.ndarray], timezone: str, report: DropReport) -> np.ndarray:
    missing = ~np.all([np.isfinite(p) for p in parts.values()], axis=0)
    number = np.where(missing, np.nan, parts["year"] * 10_000 + parts["month"] * 100 + parts["day"])
    if np.isfinite(number).any() and observations.calendar_seconds(number[~missing].astype(np.int64)) is None:
        row = int(np.flatnonzero(~missing)[0])
        raise TimeError(
            f"year, month, day at row {row} ({number[row]:.0f}) or below are no dates; mend them or give one time "
            "column"
        )
    days = observations.parse_times(pd.Series(number), "UTC", DropReport())
    return _combine(
        days,
        parts.get("hour", np.zeros(missing.size)) * 3600 + parts.get("minute", np.zeros(missing.size)) * 60,
        timezone,
        report,
    )


def _combine(days: np.ndarray, seconds: np.ndarray, timezone: str, report: DropReport) -> np.ndarray:
    known = (days != observations.MISSING_TIME) & np.isfinite(seconds)
    local = np.where(known, days + np.where(known, seconds, 0).astype(np.int64), observations.MISSING_TIME)
    return observations.localise(local, observations.time_zone(timezone), timezone, report)


def read_positions(
    frame: pd.DataFrame,
    out: Layout,
    units: Mapping[str, str],
    stations: Any,
    platform: np.ndarray,
    names: tuple[str, ...],
    report: DropReport,
) -> dict[str, np.ndarray]:
    """latitude, longitude, height (float64 [n], NaN unknown) from the table itself or from a separate list of
    stations.
    """
    got: dict[str, np.ndarray] = {}
    for role in ("latitude", "longitude", "height"):
        if role in out.roles:
            column = out.roles[role]
            values = observations.to_numbers(frame[column])
            if role == "height":
                length = sensors.VARIABLES["geopotential_height"]
                bracket, suffix = plain_name(column)[2], suffix_unit(plain_name(column)[1])[1]
                unit = sensors.unit(units[column]) if column in units else known_unit(bracket or suffix or "m", length)
                values = values * (unit.scale if unit is not None else 1.0)
            got[role] = values
    if stations is not None:
        listed = load_frame(stations)
        where = find_columns(listed, "station", None, None, DropReport())
        for role in ("platform", "latitude", "longitude"):
            if role not in where.roles:
                raise SchemaError(
                    f"stations= has no {role} column among {', '.join(map(str, listed.columns))}; it needs station, "
                    "latitude and longitude"
                )
        codes, labels = observations.platform_labels(listed[where.roles["platform"]])
        row_of = {labels[c]: i for i, c in reversed(list(enumerate(codes))) if c >= 0}
        rows = np.array([row_of.get(name, -1) for name in names], np.int64)
        at = np.where(platform >= 0, rows[platform], -1)
        for role in ("latitude", "longitude", "height"):
            if role in where.roles and role not in got:
                values = observations.to_numbers(listed[where.roles[role]])
                got[role] = np.where(at >= 0, values[at], np.nan)
    for role in ("latitude", "longitude"):
        if role not in got:
            raise CoordinateError(
                f"no {role} column found among {', '.join(map(str, frame.columns))}; name it with columns={{'<your "
                f"column>': {role!r}}} or give a list of stations with stations="
            )
    if "height" not in got:
        report.note("no height column: heights are unknown (NaN)")
        got["height"] = np.full(len(frame), np.nan)
    return got


def wide_to_reports(
    frame: pd.DataFrame,
    *,
    sensor: str = "station",
    columns: Mapping[str, str | None] | None = None,
    units: Mapping[str, str] | None = None,
    attributes: Mapping[str, str] | None = None,
    timezone: str = "UTC",
    variables: Sequence[str] | None = None,
    stations: Any = None,
    trust_coordinates: bool = False,
) -> tuple[Reports, dict[str, ColumnMapping], DropReport]:
    """A table with one column per variable to Reports, without a detour through the long table (431k rows x 15
    variables in about a second).

    The checks are those of `observations.validate`. Rows of one platform and time (for moving sensors also position,
    pressure and height) are one report: the first value of each variable stays, later rows fill its gaps.

    Args, errors: see `earth.readers.stations.read_stations`; attributes: units by column as a file's metadata state
    them.
    Returns: reports, mapping by file column, what was done (rows_in == rows_kept + dropped).
    """
    kind = sensors.sensor(sensor)
    n = len(frame)
    report = DropReport(rows_in=n)
    if not n:
        raise EmptyWindowError("the table has no rows; pass at least one observation")
    out = find_columns(frame, sensor, columns, units, report)
    time = read_times(frame, out, timezone, report)
    if "platform" in out.roles:
        platform, names = observations.platform_labels(frame[out.roles["platform"]])
    else:
        platform, names = np.full(n, -1, np.int64), ()
    place = read_positions(frame, out, units or {}, stations, platform, names, report)
    latitude, longitude, height = place["latitude"], place["longitude"], place["height"]

    keep = time != observations.MISSING_TIME
    report.drop("time missing", n - int(keep.sum()))
    rows = np.flatnonzero(keep)
    good, wrapped = observations.check_coordinates(
        latitude[rows], longitude[rows], fixed=not kind.moving, report=report, rows=rows, trust=trust_coordinates
    )
    longitude = longitude.copy()
    longitude[rows] = wrapped
    keep[rows[~good]] = False
    platform, names, keep = observations.name_platforms(
        platform, names, latitude, longitude, keep, np.zeros(n, np.int64), [sensor], report
    )
    if not keep.any():
        raise EmptyWindowError(f"no report is left of {n} rows; {report.reasons()}")
    low, high = (-500.0, 9_500.0) if not kind.moving else (-12_000.0, 120_000.0)
    odd = keep & ~np.isnan(height) & ~((height >= low) & (height <= high))
    report.adjust(f"height outside [{low:.0f}, {high:.0f}] m set missing", int(odd.sum()))
    height = np.where(odd, np.nan, height)

    rows = np.flatnonzero(keep)
    values, errors, mappings = _stack_values(
        frame, out, rows, report, units=units or {}, attributes=attributes or {}, wanted=_wanted(variables, out, sensor)
    )
    valued = ~np.isnan(values).all(axis=1)
    if not valued.all():
        report.drop("no value in the row", int((~valued).sum()))
        rows, values, errors = rows[valued], values[valued], None if errors is None else errors[valued]
    if not rows.size:
        raise EmptyWindowError(f"no report is left of {n} rows; {report.reasons()}")

    platform, time, latitude, longitude, height = (x[rows] for x in (platform, time, latitude, longitude, height))
    pressure = _pressure(frame, out, attributes or {}, units or {}, report)
    angle = _view_angle(frame, out, kind)
    pressure, angle = (None if x is None else x[rows] for x in (pressure, angle))
    report.adjust("rows out of order of time, sorted", observations.count_unsorted(platform, time))
    keys: list[np.ndarray] = []
    if kind.moving:
        keys = [observations.float_bits(x) for x in (latitude, longitude, height, pressure) if x is not None]
    else:
        height = observations.fill_heights(platform, len(names), height, report)
        platform, names = observations.split_moves(platform, names, time, latitude, longitude, height, report, rows)
    group, first = observations.group_rows(platform, time, *keys)
    if first.size < rows.size:
        _merge(values, errors, group, first, report)
    ranked = sorted(names)
    place_of = {name: i for i, name in enumerate(ranked)}
    rank = np.array([place_of[name] for name in names], np.int64)
    order = first[np.lexsort((first, time[first], rank[platform[first]]))]  # levels of a sounding keep the file's order
    present, back = np.unique(rank[platform[order]], return_inverse=True)
    report.rows_kept = int(order.size)
    reports = Reports(
        sensor=sensor,
        variables=tuple(m.variable for m in mappings.values()),
        platforms=tuple(ranked[r] for r in present),
        platform=back.astype(np.int32),
        time=time[order],
        latitude=latitude[order],
        longitude=longitude[order],
        height=height[order],
        values=values[order],
        error=None if errors is None else errors[order],
        view_angle=None if angle is None else angle[order],
        pressure=None if pressure is None else pressure[order],
    )
    return reports, mappings, report


def _stack_values(
    frame: pd.DataFrame,
    out: Layout,
    rows: np.ndarray,
    report: DropReport,
    *,
    units: Mapping[str, str],
    attributes: Mapping[str, str],
    wanted: set[str] | None,
) -> tuple[np.ndarray, np.ndarray | None, dict[str, ColumnMapping]]:
    """The value columns at the given rows as SI float32 [len(rows), V], their errors or None, and the mappings."""
    mappings: dict[str, ColumnMapping] = {}
    stack: list[np.ndarray] = []
    errors: list[np.ndarray | None] = []
    absent: list[str] = []
    for column in out.values:
        if wanted is not None and column.name not in wanted:
            continue
        values = _values_of(frame[column.name], column, report)
        if values is None:
            absent += [column.name] if wanted is not None else []
            continue
        values = values if rows.size == len(frame) else values[rows]
        if column.name in out.flags:
            bad = (observations.to_numbers(frame[out.flags[column.name]])[rows] > 0) & ~np.isnan(values)
            report.mask(f"{column.name}: quality flag not 0", int(bad.sum()))
            values = np.where(bad, np.nan, values)
        if np.isfinite(values).any():
            si, mapping = to_si(values, column, rows, report, units=units, attributes=attributes, mask=True)
        if not np.isfinite(values).any() or not np.isfinite(si).any():
            absent.append(column.name)
            continue
        taken = {m.variable for m in mappings.values()}
        if mapping.variable in taken:  # a column that fell back to its own name met a variable of that name
            name = next(n for n in (column.name, *(f"{column.name} ({k})" for k in range(2, 99))) if n not in taken)
            mapping = dataclasses.replace(mapping, variable=name)
        mappings[column.name] = mapping
        stack.append(si.astype(np.float32))
        error = None
        if column.name in out.errors:
            error = observations.to_numbers(frame[out.errors[column.name]])[rows] * abs(mapping.scale)
            error = np.where(
                (error >= 0) & (error <= observations.LARGEST) & np.isfinite(stack[-1]), error, np.nan
            ).astype(np.float32)
        errors.append(error)
    if absent:
        report.note(f"columns without any usable value were dropped: {', '.join(absent)}")
        if wanted is not None:
            raise MissingVariableError(
                f"column {absent[0]!r} was asked for but has no usable value in {len(frame)} rows; drop it from "
                "variables= or mend the data"
            )
    if not stack:
        raise MissingVariableError(
            f"no column with values found among {', '.join(map(str, frame.columns))}; name one with "
            "columns={'<your column>': '2m_temperature'}"
        )
    together = None
    if any(error is not None for error in errors):
        empty = np.full(rows.size, np.nan, np.float32)
        together = np.stack([empty if error is None else error for error in errors], axis=1)
    return np.stack(stack, axis=1), together, mappings


def _wanted(variables: Sequence[str] | None, out: Layout, sensor: str) -> set[str] | None:
    """File columns behind the requested names (file columns, variables or aliases); wind asked for as u, v brings
    speed and direction.
    """
    if variables is None:
        return None
    if isinstance(variables, str):
        raise SchemaError(f"variables= must be a list of names, not the text {variables!r}; pass [{variables!r}]")
    wanted: set[str] = set()
    targets = {c.target: c.name for c in out.values}
    keys = {name_key(c.name): c.name for c in out.values}
    for name in variables:
        target = name if sensors.split_channel(name)[0] in sensors.VARIABLES else sensors.lookup_alias(name, sensor)
        if name in {c.name for c in out.values}:
            wanted.add(name)
        elif target in targets:
            wanted.add(targets[target])
        elif name_key(name) in keys:
            wanted.add(keys[name_key(name)])
        elif (
            target is not None
            and "component_of_wind" in target
            and {w for w in targets if w.endswith("wind_speed")}
            and {w for w in targets if w.endswith("wind_direction")}
        ):
            wanted |= {c for t, c in targets.items() if t.endswith(("wind_speed", "wind_direction"))}
        else:
            raise MissingVariableError(
                f"variable {name!r} is not in the table; the nearest is "
                f"{sensors.nearest(name, [*targets, *keys.values()])!r}; it has "
                f"{', '.join(c.name for c in out.values)}"
            )
    return wanted


_MISSING_MARKS = frozenset(("", "m", "na", "n/a", "nan", "none", "null", "...", "-", "--", "/", "//", "*", "x"))


def _values_of(series: Any, column: Column, report: DropReport) -> np.ndarray | None:
    """A value column as float64 [n], or None (noted) if it holds text."""
    values = observations.to_numbers(series)
    if series.dtype.kind in "biuf":
        return values
    text = series.astype(str).str.strip().str.lower()
    given = (series.notna() & ~text.isin(_MISSING_MARKS)).to_numpy()
    if column.target.startswith("total_precipitation"):
        trace = (text == "t").to_numpy()
        values[trace] = 0.0
        report.adjust(f"{column.name}: trace (T) set to 0", int(trace.sum()))
    lost = int((given & np.isnan(values)).sum())
    if series.dtype.kind in "mMc" or 2 * lost > int(given.sum()):
        if given.any():
            report.note(f"column {column.name!r} holds no numbers and was left out")
        return None
    report.mask(f"{column.name}: not a number", lost)
    return values


def _pressure(
    frame: pd.DataFrame, out: Layout, attributes: Mapping[str, str], units: Mapping[str, str], report: DropReport
) -> np.ndarray | None:
    if "pressure" not in out.roles:
        return None
    name = out.roles["pressure"]
    values = observations.to_numbers(frame[name])
    finite = values[np.isfinite(values)]
    stated = units.get(name) or attributes.get(name)
    if stated is not None:
        unit = sensors.unit(stated)
    else:
        unit = sensors.unit("hPa" if finite.size and finite.max() <= 1_100.0 else "Pa")
        report.note(f"pressure column {name!r} read in {unit.name}")
    pascal = values * unit.scale
    odd = ~np.isnan(pascal) & ~((pascal > 0) & (pascal <= 120_000))
    report.adjust("pressure outside (0, 120000] Pa set missing", int(odd.sum()))
    return np.where(odd, np.nan, pascal)


def _view_angle(frame: pd.DataFrame, out: Layout, kind: sensors.Sensor) -> np.ndarray | None:
    if "view_angle" in out.roles:
        return observations.to_numbers(frame[out.roles["view_angle"]])
    if "zenith_angle" in out.roles:
        return view_angle(observations.to_numbers(frame[out.roles["zenith_angle"]]), kind)
    return None


def view_angle(zenith: np.ndarray, kind: sensors.Sensor) -> np.ndarray:
    """Degrees from nadir at the satellite from the zenith angle at the ground (degrees), NaN beyond the horizon.

    Law of sines in the triangle of the Earth's centre, the ground and the satellite.
    """
    radius = observations.EARTH_RADIUS_KM * 1e3
    ratio = radius / (radius + kind.altitude) if np.isfinite(kind.altitude) else 1.0
    return np.rad2deg(np.arcsin(ratio * np.sin(np.deg2rad(np.where(np.abs(zenith) <= 90, zenith, np.nan)))))


def drop_impossible(table: pd.DataFrame, report: DropReport) -> pd.DataFrame:
    """A long table without the values outside their variable's valid range, which are counted as rows read and dropped.

    For formats that fix the units: there such values are errors, however many they are, and not the sign of a wrong
    unit that `observations.validate` takes them for.
    """
    codes, names = pd.factorize(table["variable"])
    limits = np.array([sensors.describe(str(name)).valid_range for name in names]).reshape(-1, 2)
    value = table["value"].to_numpy(np.float64)
    bad = ~((value >= limits[codes, 0]) & (value <= limits[codes, 1]))
    for code, count in enumerate(np.bincount(codes[bad], minlength=len(names))):
        report.rows_in += int(count)
        report.drop(f"{names[code]} outside its valid range", int(count))
    return table.loc[~bad].reset_index(drop=True)


def _merge(
    values: np.ndarray, errors: np.ndarray | None, group: np.ndarray, first: np.ndarray, report: DropReport
) -> None:
    """Folds the rows of each group into its first row, in place: the first value of a variable stays, later ones fill
    its gaps; rows with another value are counted apart.
    """
    repeated = np.flatnonzero(np.bincount(group)[group] > 1)
    later = repeated[first[group[repeated]] != repeated]
    table = pd.DataFrame(values[repeated])
    merged = table.groupby(group[repeated], sort=False).transform("first").to_numpy(np.float32)
    spot = np.searchsorted(repeated, later)
    conflict = ((values[later] != merged[spot]) & ~np.isnan(values[later])).any(axis=1)
    heads = np.unique(first[group[repeated]])
    whole = merged[np.searchsorted(repeated, heads)]
    gap = np.isnan(values[heads]) & ~np.isnan(whole)
    report.drop("duplicate of an earlier report", int((~conflict).sum()))
    report.drop("duplicate with another value", int(conflict.sum()))
    report.adjust("reports completed from a duplicate row", int(gap.any(axis=1).sum()))
    if errors is not None:
        # The error of a filled value is that of the row it came from: the first row of the group that has the value.
        masked = np.where(np.isnan(values[repeated]), np.nan, np.nan_to_num(errors[repeated], nan=-1.0))
        filled = pd.DataFrame(masked).groupby(group[repeated], sort=False).transform("first").to_numpy(np.float32)
        best = filled[np.searchsorted(repeated, heads)]
        errors[heads] = np.where(gap, np.where(best < 0, np.nan, best), errors[heads])
    values[heads] = whole


# ----------------------------------------------------------------------------------------------------------------- long
def is_long(frame: pd.DataFrame, columns: Mapping[str, str | None] | None = None) -> bool:
    """Whether the table has a variable column (text) and a value column."""
    keys = {name_key(plain_name(str(n))[1]): n for n in frame.columns}
    targets = {v: k for k, v in (columns or {}).items() if v}
    variable = targets.get("variable") or next((keys[a] for a in ROLES["variable"] if a in keys), None)
    value = targets.get("value") or next((keys[a] for a in ROLES["value"] if a in keys), None)
    return variable in frame.columns and value in frame.columns and frame[variable].dtype.kind not in "iufbmMc"


def read_table(
    source: Any,
    *,
    columns: Mapping[str, str | None] | None = None,
    units: Mapping[str, str] | None = None,
    timezone: str = "UTC",
    sensor: str | None = None,
    variables: Sequence[str] | None = None,
    stations: Any = None,
    trust_coordinates: bool = False,
) -> tuple[pd.DataFrame, DropReport]:
    """Reads a table of any layout to the canonical long table (`earth.observations`), validated.

    A long table has one row per value (variable and value columns); anything else is read as a wide one by
    `wide_to_reports`. Names of variables are ours (`2m_temperature`, then the values must be SI unless `units` says
    otherwise) or aliases (`t2m`, unit from `units`, a `units` column, or the values).

    Args: as `earth.readers.stations.read_stations`; sensor is the default for rows that name none.
    Returns: table, report.
    Raises: ObservationError (see `observations.validate`), FileNotFoundError.
    """
    table, _, report = read_long_or_wide(
        source,
        columns=columns,
        units=units,
        timezone=timezone,
        sensor=sensor,
        variables=variables,
        stations=stations,
        trust_coordinates=trust_coordinates,
    )
    return table, report


def read_long_or_wide(
    source: Any,
    *,
    columns: Mapping[str, str | None] | None,
    units: Mapping[str, str] | None,
    timezone: str,
    sensor: str | None,
    variables: Sequence[str] | None,
    stations: Any,
    trust_coordinates: bool,
) -> tuple[pd.DataFrame, dict[str, ColumnMapping], DropReport]:
    """`read_table` with the column mappings."""
    frame = load_frame(source)
    if not is_long(frame, columns):
        reports, mappings, report = wide_to_reports(
            frame,
            sensor=sensor or "station",
            columns=columns,
            units=units,
            timezone=timezone,
            variables=variables,
            stations=stations,
            trust_coordinates=trust_coordinates,
        )
        return reports.to_table(), mappings, report
    default = sensor or "station"
    first = DropReport()
    if not len(frame):
        raise EmptyWindowError("the table has no rows; pass at least one observation")
    out = find_columns(frame, default, columns, None, first, long=True)
    units = dict(units or {})
    n = len(frame)
    codes, names = observations.platform_labels(frame[out.roles["variable"]])
    codes, known_columns = _long_columns(frame, out, default, codes, names)
    for name in units:
        if name not in names and name not in {c.target for c in known_columns} and name not in frame.columns:
            raise SchemaError(
                f"units= names {name!r}, which is no variable of the table; the nearest is "
                f"{sensors.nearest(name, names)!r}"
            )
    raw = observations.to_numbers(frame[out.roles["value"]])
    value = raw.copy()
    scale = np.ones(n)
    mappings: dict[str, ColumnMapping] = {}
    targets = [column.target for column in known_columns]
    attributes: dict[str, str] = {}
    unit_codes, unit_names = (
        observations.platform_labels(frame[out.roles["units"]]) if "units" in out.roles else (np.full(n, -1), ())
    )
    for code, column in enumerate(known_columns):
        rows = np.flatnonzero(codes == code)
        if not rows.size:
            continue
        named = unit_codes[rows][unit_codes[rows] >= 0]
        if named.size:
            if (named != named[0]).any():
                raise UnitError(
                    f"variable {column.name!r} is given in {unit_names[int(named[0])]!r} and in "
                    f"{unit_names[int(named[named != named[0]][0])]!r}; convert it to one unit"
                )
            attributes[column.name] = unit_names[int(named[0])]
        given = dict(units)
        if (
            column.exact
            and stated_unit(column, units) is None
            and column.name not in attributes
            and sensors.split_channel(column.target)[0] in sensors.VARIABLES
        ):
            given[column.name] = sensors.describe(column.target).units
        si, mapping = to_si(raw[rows], column, rows, first, units=given, attributes=attributes, mask=False)
        value[rows], scale[rows] = si, abs(mapping.scale)
        mappings.setdefault(column.name, mapping)
        targets[code] = mapping.variable
    parts = [sensors.split_channel(target) for target in targets]
    kinds = list(dict.fromkeys(base for base, _ in parts))
    bases = np.array([kinds.index(base) for base, _ in parts], np.int64)
    base_code = np.where(codes >= 0, bases[codes], -1) if len(bases) else codes
    channels = np.array([channel for _, channel in parts], np.int64)
    channel = np.where(codes >= 0, channels[codes], -1)
    if "channel" in out.roles:
        given_channel = observations.to_numbers(frame[out.roles["channel"]])
        channel = np.where(channel >= 0, channel, np.where(np.isnan(given_channel), -1, given_channel))
    platform, platform_names = (
        observations.platform_labels(frame[out.roles["platform"]])
        if "platform" in out.roles
        else (np.full(n, -1, np.int64), ())
    )
    time = read_times(frame, out, timezone, first)
    place = read_positions(frame, out, units or {}, stations, platform, platform_names, first)
    table = pd.DataFrame(
        {
            "time": pd.Series(
                np.where(time == observations.MISSING_TIME, np.datetime64("NaT", "s"), time.astype("datetime64[s]"))
            ),
            **place,
            "variable": pd.Categorical.from_codes(base_code, categories=kinds),
            "value": value,
            "channel": channel,
        }
    )
    pressure, angle = _pressure(frame, out, attributes, units, first), _view_angle(frame, out, sensors.sensor(default))
    if pressure is not None:
        table["pressure"] = pressure
    if angle is not None:
        table["view_angle"] = angle
    if "platform" in out.roles:
        table["platform"] = frame[out.roles["platform"]]
    if "obs_error" in out.roles:
        table["obs_error"] = observations.to_numbers(frame[out.roles["obs_error"]]) * scale
    for role in ("sensor", "qc"):
        if role in out.roles:
            table[role] = frame[out.roles[role]]
    wanted = None
    if variables is not None:
        wanted = [
            mappings[v].variable if v in mappings else v if v in kinds else (sensors.lookup_alias(v, default) or v)
            for v in variables
        ]
        wanted = [sensors.split_channel(v)[0] for v in wanted]
    valid, report = observations.validate(table, sensor=default, variables=wanted, trust_coordinates=trust_coordinates)
    report.notes = list(
        dict.fromkeys([*first.notes, *(note for note in report.notes if note != "naive times taken as UTC")])
    )
    for reason, count in first.masked.items():
        report.mask(reason, count)
    for reason, count in first.adjusted.items():
        report.adjust(reason, count)
    present = set(valid["variable"].cat.categories)
    return valid, {k: m for k, m in mappings.items() if sensors.split_channel(m.variable)[0] in present}, report


def _long_columns(
    frame: pd.DataFrame, out: Layout, default: str, codes: np.ndarray, names: tuple[str, ...]
) -> tuple[np.ndarray, list[Column]]:
    """One Column per pair of variable name and sensor: `airTemperature` is at 2 m for stations and aloft for sondes."""
    if "sensor" not in out.roles:
        return codes, [_long_name(name, default) for name in names]
    kinds, labels = observations.platform_labels(frame[out.roles["sensor"]])
    known = [label if label in sensors.SENSORS else default for label in labels]
    pair = np.where(codes >= 0, codes * (len(known) + 1) + kinds + 1, -1)
    present, back = np.unique(pair, return_inverse=True)
    if present[0] == -1:
        present, back = present[1:], back - 1
    width = len(known) + 1
    columns = [_long_name(names[int(p) // width], known[p % width - 1] if p % width else default) for p in present]
    return back, columns


def _long_name(name: str, sensor: str) -> Column:
    """An entry of the variable column; our own names state SI."""
    base, channel = sensors.split_channel(name)
    if base in sensors.VARIABLES:
        return Column(name, sensors.join_channel(base, channel), False, True, None, False)
    bare, bracket = plain_name(name)[1:]
    column = value_column(name, bare, bracket, sensor, None, None, {})
    column.exact = False
    return column
