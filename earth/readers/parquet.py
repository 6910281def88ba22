"""Parquet archives of observations, file by file and batch by batch: NNJA-AI, HealDA, and plain tables.

* **NNJA-AI** (github.com/brightbandtech/nnja-ai, docs/datasets.md): BUFR mnemonics, dotted after their sequence
  (`BRITCSTC.TMBR_00001`, `TMPSQ1.TMDB`), pressure levels as columns (`TMDB_PRLC85000`), folders `OBS_DATE=2021-01-01`.
* **HealDA, wide** (github.com/NVlabs/HealDA, loaders/nnja_wide.py): a row per footprint, `time_utc`, `platform_id`,
  `satellite_zenith_angle`, `brightness_temperature__ch_1`.
* **HealDA, long** (observations/schema.py): a row per value, `Observation` and `Global_Channel_ID`, whose meaning lies
  in `channel_table.parquet` at the root of the archive; pressures in hPa.
* Anything else goes to `read_table`, a batch at a time.

Antenna temperatures (TMANT, `antenna_temperature`) are taken as brightness temperatures, as HealDA does. The table of
mnemonics is **ours**, from NCEP's BUFR table B (SI but for per cent).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from earth import observations, sensors
from earth.observations import DropReport, EmptyWindowError, SchemaError
from earth.readers.stations import wind_components
from earth.readers.tables import drop_impossible, read_table, view_angle

# mnemonic -> (variable aloft, variable at the ground, factor to SI, mnemonic of its quality mark)
_NNJA: dict[str, tuple[str, str, float, str]] = {
    "TMDB": ("temperature", "2m_temperature", 1.0, "QMAT"),
    "TMDP": ("dewpoint_temperature", "2m_dewpoint_temperature", 1.0, "QMDD"),
    "REHU": ("relative_humidity", "2m_relative_humidity", 0.01, "QMDD"),
    "WSPD": ("wind_speed", "10m_wind_speed", 1.0, "QMWN"),
    "WDIR": ("wind_direction", "10m_wind_direction", 1.0, "QMWN"),
    "GP10": ("geopotential", "", 1.0, "QMGP"),
    "MXGS": ("", "10m_wind_gust", 1.0, ""),
    "PRES": ("", "surface_pressure", 1.0, "QMPR"),
    "PMSL": ("", "mean_sea_level_pressure", 1.0, "QMPR"),
    "3HPC": ("", "surface_pressure_tendency_3h", 1.0, ""),
    "HOVI": ("", "visibility", 1.0, ""),
    "TOCC": ("", "total_cloud_cover", 0.01, ""),
    "TOSD": ("", "snow_depth", 1.0, ""),
    "TMBR": ("brightness_temperature", "brightness_temperature", 1.0, ""),
    "TMANT": ("brightness_temperature", "brightness_temperature", 1.0, ""),
}
_MNEMONIC = re.compile(r"(?:.*\.)?([A-Z0-9]+)(?:_PRLC(\d+)|_(\d{5}))?")
_WIDE_CHANNEL = re.compile(r"(?:brightness|antenna)_temperature__ch_(\d+)")
# role -> column names of the three layouts, the first one there counts
_PLACE = {
    "time": ("OBS_TIMESTAMP", "time_utc", "Absolute_Obs_Time"),
    "latitude": ("LAT", "CLATH", "latitude", "Latitude"),
    "longitude": ("LON", "CLONH", "longitude", "Longitude"),
    "height": ("HSMSL", "SELV", "HMSL", "Height"),
    "pressure": ("Pressure",),
    "view_angle": ("Scan_Angle",),
    "zenith_angle": ("SAZA", "satellite_zenith_angle", "Sat_Zenith_Angle"),
    "platform": ("SAID", "RPID", "ACRN", "platform_id", "Platform_ID"),
    "block": ("WMOB",),
    "number": ("WMOS",),
}
_CHANNELS = "channel_table.parquet"
_LONG = ("Observation", "Global_Channel_ID", "Observation_Type", "QC_Flag", "Analysis_Use_Flag")
# HealDA's conventional channels -> (variable aloft, variable at the ground, factor to SI)
_CONVENTIONAL = {
    "ps": ("", "surface_pressure", 100.0),
    "q": ("specific_humidity", "2m_specific_humidity", 1.0),
    "t": ("temperature", "2m_temperature", 1.0),
    "u": ("u_component_of_wind", "10m_u_component_of_wind", 1.0),
    "v": ("v_component_of_wind", "10m_v_component_of_wind", 1.0),
}
# PrepBUFR report types (last two digits: 1xx mass, 2xx wind) -> sensor
_REPORT_TYPES = {
    "radiosonde": (20, 21, 22, 32),
    "aircraft": (30, 31, 33, 34, 35),
    "ship": (80, 82),
    "station": (81, 83, 84, 87),
}


def stream_parquet(
    path: str | os.PathLike[str],
    *,
    sensor: str | None = None,
    rows: int = 200_000,
    quality_max: int = 2,
    channels: Any = None,
    **options: Any,
) -> Iterator[tuple[pd.DataFrame, DropReport]]:
    """Canonical tables of a parquet file or folder, one per batch of rows that holds any usable value.

    Args:
      path: a file, or a folder whose parquet files are read in the order of their names (hive partitions too).
      sensor: registry name; needed for NNJA-AI and wide HealDA (`atms`, `radiosonde`, ...), derived from the channels
        and report types of long HealDA, `station` for other tables.
      rows: file rows per batch.
      quality_max: NNJA-AI's quality marks (QMAT, QMWN, ...) beyond this are dropped; HealDA keeps up to 2.
      channels: HealDA's channel table (frame or path); None looks for `channel_table.parquet` beside or above the file.
      options: of `read_table`, for tables that are none of these layouts.

    Raises: FileNotFoundError, SchemaError, other ObservationErrors; EmptyWindowError if no value is left at all.
    """
    kept = False
    for file in files(Path(path)):
        source = open_parquet(file)
        names = source.schema_arrow.names
        layout = layout_of(names)
        if layout and options:
            raise SchemaError(f"{next(iter(options))}= is for plain tables, but {file} is one of NNJA-AI or HealDA")
        columns = [n for n in names if _is_known(n)] if layout else None
        table = _channel_table(channels, file) if layout == "long" else None
        for batch in source.iter_batches(batch_size=rows, columns=columns):
            frame = pa.Table.from_batches([batch]).to_pandas()
            try:
                if layout is None:
                    valid, report = read_table(frame, sensor=sensor, **options)
                else:
                    first = DropReport()
                    long = (
                        _from_long(frame, table, first)
                        if table is not None
                        else _from_wide(frame, _needed(sensor, file), quality_max)
                    )
                    valid, report = observations.validate(drop_impossible(long, first))
                    report.rows_in += first.rows_in
                    for reason, count in first.dropped.items():
                        report.drop(reason, count)
            except EmptyWindowError:
                continue
            kept = True
            yield valid, report
    if not kept:
        raise EmptyWindowError(f"no usable value is left of {path}; is it empty, or of another layout?")


def layout_of(names: Sequence[str]) -> str | None:
    """`long` (HealDA), `wide` (NNJA-AI, HealDA), or None for another table, by its column names."""
    have = set(names)
    if {"Observation", "Global_Channel_ID"} <= have:
        return "long"
    if "OBS_TIMESTAMP" in have or ("time_utc" in have and any(_WIDE_CHANNEL.fullmatch(n) for n in names)):
        return "wide"
    return None


def files(path: Path) -> list[Path]:
    """The parquet files of a folder in the order of their names, or the file itself."""
    if not path.exists():
        raise FileNotFoundError(f"observation file {path} does not exist")
    found = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    found = [file for file in found if file.name != _CHANNELS]
    if not found:
        raise SchemaError(f"{path} holds no parquet file")
    return found


def open_parquet(file: Path) -> pq.ParquetFile:
    """An open file; raises SchemaError for another format."""
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise SchemaError(
            f"{file} cannot be read as parquet; is it truncated or of another format? ({error})"
        ) from error


def _is_known(name: str) -> bool:
    places = {alias for aliases in _PLACE.values() for alias in aliases}
    found = _MNEMONIC.fullmatch(name)
    quality = {spec[3] for spec in _NNJA.values()}
    known = found is not None and (found[1] in _NNJA or found[1] in quality or found[1] in places)
    return known or name in places or name in _LONG or bool(_WIDE_CHANNEL.fullmatch(name))


def _needed(sensor: str | None, file: Path) -> str:
    if sensor is None:
        raise SchemaError(f"{file} does not say which sensor it is of; pass sensor= such as 'atms' or 'station'")
    return sensor


# ----------------------------------------------------------------------------------------------------------- NNJA, wide
def _from_wide(frame: pd.DataFrame, sensor: str, quality_max: int) -> pd.DataFrame:
    """A table for `validate` from columns that are variables, levels or channels."""
    kind = sensors.sensor(sensor)
    base = _places(frame, kind)
    short = {}  # bare name -> column; the outermost of several sequences counts
    for name in sorted(frame.columns, key=lambda n: (n.count("."), n)):
        short.setdefault(name.rsplit(".", 1)[-1], name)
    values: dict[tuple[str, int, int], np.ndarray] = {}  # by variable, level in Pa (0 none) and channel (-1 none)
    flags: dict[tuple[str, int, int], np.ndarray] = {}
    for bare, name in short.items():  # TMANT before TMBR, which wins
        found, channel = _MNEMONIC.fullmatch(bare), _WIDE_CHANNEL.fullmatch(bare)
        if channel is not None:
            key = ("brightness_temperature", 0, int(channel[1]))
            values[key], flags[key] = observations.to_numbers(frame[name]), np.zeros(len(frame), bool)
        elif found is not None and found[1] in _NNJA:
            aloft, ground, factor, mark = _NNJA[found[1]]
            variable = ground if kind.vertical == "surface" else aloft
            if not variable or (kind.vertical == "pressure") != bool(found[2]):
                continue
            key = (variable, int(found[2] or 0), int(found[3] or -1))
            quality = short.get(f"{mark}_PRLC{found[2]}" if found[2] else mark)
            marks = observations.to_numbers(frame[quality]) if mark and quality else np.zeros(len(frame))
            values[key], flags[key] = observations.to_numbers(frame[name]) * factor, marks > quality_max
    if not values:
        raise SchemaError(f"no column of a {sensor} variable found among {', '.join(map(str, frame.columns[:20]))} ...")
    for variable, level, channel in list(values):
        if variable.endswith("wind_speed"):
            speed, turn = ((variable.replace("speed", part), level, channel) for part in ("speed", "direction"))
            if turn in values:
                parts = wind_components(values[speed], values[turn])
                for letter, part in zip("uv", parts, strict=True):
                    key = (variable.replace("wind_speed", f"{letter}_component_of_wind"), level, channel)
                    values[key], flags[key] = part, flags[speed] | flags[turn]
    tables = []
    for (variable, level, channel), value in values.items():
        rows = np.flatnonzero(~np.isnan(value))
        part = {name: column[rows] for name, column in base.items()} | {"value": value[rows]}
        part |= {
            "qc": flags[variable, level, channel][rows].astype(np.int8),
            "pressure": np.full(len(rows), level or np.nan),
        }
        tables.append(pd.DataFrame(part).assign(variable=variable, channel=channel, sensor=sensor))
    return pd.concat(tables, ignore_index=True)


def _places(frame: pd.DataFrame, kind: sensors.Sensor | None) -> dict[str, np.ndarray]:
    """Time, position, angle and platform columns [n]."""
    bare = {}
    for name in sorted(frame.columns, key=lambda n: (n.count("."), n)):
        bare.setdefault(name.rsplit(".", 1)[-1], name)

    def column(role: str) -> Any:
        found = [frame[bare[alias]] for alias in _PLACE[role] if alias in bare]
        return functools.reduce(lambda a, b: a.where(a.notna(), b), found) if found else None

    def numbers(role: str) -> np.ndarray:
        series = column(role)
        return np.full(len(frame), np.nan) if series is None else observations.to_numbers(series)

    time = column("time")
    if time is None:
        raise SchemaError(f"no time column found; one of {', '.join(_PLACE['time'])} is needed")
    seconds = observations.parse_times(time)
    stamps = np.where(seconds == observations.MISSING_TIME, np.datetime64("NaT", "s"), seconds.astype("datetime64[s]"))
    angle = numbers("view_angle")
    if kind is not None and np.isnan(angle).all():
        angle = view_angle(numbers("zenith_angle"), kind)
    names, station = column("platform"), numbers("block") * 1000 + numbers("number")
    platform = np.full(len(frame), None, dtype=object) if names is None else names.astype(object).to_numpy()
    platform = np.where(np.isnan(station), platform, station.astype(object))
    return {
        "time": stamps,
        "latitude": numbers("latitude"),
        "longitude": numbers("longitude"),
        "height": numbers("height"),
        "pressure": numbers("pressure") * 100.0,
        "view_angle": angle,
        "platform": platform,
    }


# --------------------------------------------------------------------------------------------------------- HealDA, long
def _channel_table(channels: Any, file: Path) -> pd.DataFrame:
    if isinstance(channels, pd.DataFrame):
        table = channels
    else:
        found = [Path(channels)] if channels is not None else [p / _CHANNELS for p in file.parents]
        path = next((p for p in found if p.exists()), None)
        if path is None:
            raise SchemaError(f"no {_CHANNELS} beside or above {file}; pass channels= with its path")
        table = pd.DataFrame(open_parquet(path).read().to_pandas())
    for name in ("Global_Channel_ID", "name", "min_valid", "max_valid"):
        if name not in table:
            raise SchemaError(
                f"the channel table lacks the column {name!r}; it has {', '.join(map(str, table.columns))}"
            )
    return pd.DataFrame(table.set_index("Global_Channel_ID"))


def _from_long(frame: pd.DataFrame, table: pd.DataFrame, report: DropReport) -> pd.DataFrame:
    """A table for `validate` from HealDA's rows; rows of unknown channels or report types are dropped and counted."""
    identity, value = (observations.to_numbers(frame[c]) for c in ("Global_Channel_ID", "Observation"))
    listed = np.isin(identity, table.index.to_numpy())
    about = table.reindex(np.where(listed, identity, table.index[0]).astype(np.int64))
    kinds = _kinds(frame)
    variable, sensor = (np.full(len(frame), "", dtype=object) for _ in range(2))
    channel, factor = np.full(len(frame), -1), np.ones(len(frame))
    codes, names = pd.factorize(about["name"])
    for code, name in enumerate(map(str, names)):
        rows = np.flatnonzero(codes == code)
        instrument, _, number = name.rpartition("_")
        if instrument in sensors.SENSORS and number.isdigit():  # atms_000 is channel 1
            variable[rows], sensor[rows], channel[rows] = "brightness_temperature", instrument, int(number) + 1
        elif name in _CONVENTIONAL:
            aloft, ground, factor[rows] = _CONVENTIONAL[name]
            variable[rows] = np.where(np.isin(kinds[rows], ["station", "ship"]), ground, aloft)
            sensor[rows] = kinds[rows]
    inside = (value >= about["min_valid"].to_numpy()) & (value <= about["max_valid"].to_numpy())
    keep = np.ones(len(frame), bool)
    for reason, bad in (
        ("channel not in the channel table", ~listed),
        ("channel or report type of no registered sensor", (variable == "") | (sensor == "")),
        ("outside the channel table's valid range", ~np.isnan(value) & ~inside),
    ):
        report.rows_in += int((keep & bad).sum())
        report.drop(reason, int((keep & bad).sum()))
        keep &= ~bad
    flags = np.zeros(len(frame), bool)
    if "QC_Flag" in frame:
        flags |= np.nan_to_num(observations.to_numbers(frame["QC_Flag"])) != 0
    if "Analysis_Use_Flag" in frame:
        flags |= np.nan_to_num(observations.to_numbers(frame["Analysis_Use_Flag"]), nan=1.0) != 1
    places = _places(frame, None)
    # The platform of conventional rows is a family of instruments, no station.
    places["platform"][channel < 0] = None
    columns = {"variable": variable, "value": value * factor, "sensor": sensor, "channel": channel, "qc": flags * 1}
    return pd.DataFrame({name: column[keep] for name, column in (places | columns).items()})


def _kinds(frame: pd.DataFrame) -> np.ndarray:
    """Sensor of each row by its PrepBUFR report type, "" for none."""
    types = np.full(len(frame), -1)
    if "Observation_Type" in frame:
        types = np.nan_to_num(observations.to_numbers(frame["Observation_Type"]), nan=-1).astype(np.int64) % 100
    out = np.full(len(frame), "", dtype=object)
    for name, members in _REPORT_TYPES.items():
        out[np.isin(types, members)] = name
    return out
