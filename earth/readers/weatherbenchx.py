"""WeatherBench-X sparse parquet, partition by partition: the layout that `earth.export.to_weatherbenchx` writes.

`<store>/year=2020/month=1/day=1/2020-01-01.parquet` (or by month, or by hour) holds the reports of that valid time with
columns valid_time, latitude, longitude, elevation, stationName and one per variable; forecasts add init_time and
lead_time. Source: weatherbenchX/data_loaders/sparse_parquet.py of google-research/weatherbenchX.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from earth import observations, sensors
from earth.export import SPREAD
from earth.observations import DropReport, EmptyWindowError, SchemaError
from earth.readers.parquet import files, open_parquet
from earth.readers.tables import wide_to_reports

_PLACES = {"latitude": "latitude", "longitude": "longitude", "elevation": "height", "stationName": "platform"}
_PARTITION = re.compile(r"year=(\d+)/month=(\d+)(?:/day=(\d+))?(?:/hour=(\d+))?/[^/]+\.parquet$")


def is_weatherbenchx(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is partitioned in the way of WeatherBench-X."""
    return Path(path).is_dir() and any(Path(path).glob("year=*/month=*"))


def stream_weatherbenchx(
    path: str | os.PathLike[str],
    start: Any = None,
    end: Any = None,
    *,
    variables: Sequence[str] | None = None,
    lead_hours: float | int | None = None,
    time_dim: str = "valid_time",
    sensor: str = "station",
    units: Mapping[str, str] | None = None,
) -> Iterator[tuple[pd.DataFrame, DropReport]]:
    """Canonical tables of a store, one per partition with values in start <= time < end, in order of time.

    Only partitions that overlap the period are opened; empty ones, which the layout asks for, are passed over. Values
    of registered variables are SI unless `units` says otherwise; `<variable>_spread` becomes the observation error.

    Args:
      start, end: anything `parse_times` reads (UTC); None is open.
      variables: names to keep where a partition has them; None keeps all.
      lead_hours: the lead to read from a store of forecasts; one with several leads needs it.
      time_dim: the column of valid times.
      sensor, units: as `earth.readers.stations.read_stations`.

    Raises: SchemaError for another layout or several leads; EmptyWindowError if nothing lies in the period.
    """
    root = Path(path)
    low, high = (_instant(t) for t in (start, end))
    partitions = [
        (span, f) for f in files(root) if (span := partition_span(f.relative_to(root).as_posix())) is not None
    ]
    if not partitions:
        raise SchemaError(f"{path} has no partition such as year=2020/month=1/day=1/2020-01-01.parquet")
    leads: set[float] = set()
    kept = False
    for (first, after), file in sorted(partitions):
        if (low is not None and after <= low) or (high is not None and first >= high):
            continue
        frame = _select(open_parquet(file).read().to_pandas(), file, time_dim, low, high, lead_hours)
        if "lead_time" in frame:
            leads |= set((frame["lead_time"].dropna() / pd.Timedelta(hours=1)).tolist())
            if len(leads) > 1:
                shown = ", ".join(f"{lead:g}" for lead in sorted(leads))
                raise SchemaError(f"{path} holds forecasts of several leads ({shown} h); choose one with lead_hours=")
        names = [n for n in frame.columns if n not in (time_dim, "init_time", "lead_time", *_PLACES)]
        names = [n for n in names if not (n.endswith(SPREAD) and n[: -len(SPREAD)] in names)]
        wanted = [n for n in names if variables is None or n in variables]
        if not len(frame) or not wanted:
            continue
        try:
            table = _table(frame, wanted, time_dim, sensor, units or {})
        except EmptyWindowError:
            continue
        kept = True
        yield table
    if not kept:
        raise EmptyWindowError(f"{path} has no value in [{start}, {end}); choose another period or other variables")


def read_weatherbenchx(
    path: str | os.PathLike[str], start: Any = None, end: Any = None, **options: Any
) -> tuple[pd.DataFrame, DropReport]:
    """`stream_weatherbenchx` as one table; the report is that of joining the partitions' tables."""
    parts = [table for table, _ in stream_weatherbenchx(path, start, end, **options)]
    return observations.validate(pd.concat(parts, ignore_index=True))


def _select(
    frame: pd.DataFrame, file: Path, time_dim: str, low: Any, high: Any, lead_hours: float | int | None
) -> pd.DataFrame:
    """The rows of the period and the lead."""
    if time_dim not in frame:
        raise SchemaError(f"{file} has no column {time_dim!r} but {', '.join(map(str, frame.columns))}; pass time_dim=")
    times = frame[time_dim].to_numpy("datetime64[ns]")
    keep = np.ones(len(frame), bool)
    if low is not None:
        keep &= times >= low
    if high is not None:
        keep &= times < high
    if lead_hours is not None and "lead_time" in frame:
        keep &= (frame["lead_time"] == pd.Timedelta(hours=lead_hours)).to_numpy()
    return frame.loc[keep]


def _table(
    frame: pd.DataFrame, names: Sequence[str], time_dim: str, sensor: str, units: Mapping[str, str]
) -> tuple[pd.DataFrame, DropReport]:
    # Named in the way of IODA, which ties each error to its variable.
    renames = {n: f"ObsValue/{n}" for n in names} | {f"{n}{SPREAD}": f"ObsError/{n}" for n in names}
    columns = {time_dim: "time"} | {n: role for n, role in _PLACES.items() if n in frame}
    si = {n: sensors.VARIABLES[n].units for n in names if n in sensors.VARIABLES}
    picked: pd.DataFrame = frame.loc[:, [*columns, *(n for n in renames if n in frame)]]
    reports, _, report = wide_to_reports(
        picked.rename(columns=renames),
        sensor=sensor,
        columns=columns,
        units={renames.get(n, n): unit for n, unit in (si | dict(units)).items()},
    )
    return reports.to_table(), report


def _instant(value: Any) -> np.datetime64 | None:
    if value is None:
        return None
    return np.datetime64(int(observations.parse_times(pd.Series([value]))[0]), "s")


def partition_span(name: str) -> tuple[np.datetime64, np.datetime64] | None:
    """The times [first, after) that a partition covers by its place in the folder, or None for another file."""
    found = _PARTITION.search(name)
    if found is None:
        return None
    year, month, day, hour = found.groups()
    text = (
        f"{int(year):04d}-{int(month):02d}"
        + (f"-{int(day):02d}" if day else "")
        + (f"T{int(hour):02d}" if hour else "")
    )
    first = np.datetime64(text)  # of a month, a day or an hour
    return first, first + 1
