"""IODA netCDF files: groups MetaData, ObsValue, ObsError, PreQC and EffectiveQC over Location (and Channel).

The layout is that of JCSDA's IODA v2/v3 (https://jointcenterforsatellitedataassimilation-jedi-docs.readthedocs.io). A
file holds one window of one instrument, so that it is read as a whole; feed several to `earth.archive.append` with
`map(read_ioda, paths)`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from earth import observations, sensors
from earth.observations import DropReport, EmptyWindowError, SchemaError
from earth.readers.tables import wide_to_reports

# What IODA writes for missing, should a file not say so in _FillValue: -3.37e38, and the integers near their minimum.
_HUGE = 1e30
_MISSING_INTEGERS = (-(2**31), -2147483643, -(2**63), -9223372036854775801)
_PLACE = ("latitude", "longitude", "dateTime", "datetime", "pressure", "sensorZenithAngle", "sensorViewAngle")
_PLATFORM = ("stationIdentification", "satelliteIdentifier")
_HEIGHT = ("stationElevation", "height")


def is_ioda(path: str | os.PathLike[str]) -> bool:
    """Whether a netCDF file has the groups of IODA."""
    try:
        groups = xr.open_groups(path, decode_timedelta=False)
    except (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError):
        return False
    for group in groups.values():
        group.close()
    return {"/MetaData", "/ObsValue"} <= set(groups)


def read_ioda(
    path: str | os.PathLike[str],
    *,
    sensor: str = "station",
    preqc_max: int = 0,
    effective_qc: bool = True,
    units: Mapping[str, str] | None = None,
    variables: Sequence[str] | None = None,
    trust_coordinates: bool = False,
) -> tuple[pd.DataFrame, DropReport]:
    """Reads an IODA file to the canonical long table, validated.

    Units are those of the attributes. The platform is `stationIdentification`, else `satelliteIdentifier`; the height
    of a fixed sensor is `stationElevation`, that of a moving one `height`; several channels of a variable become
    channels of the table, numbered by `Channel` (or `MetaData/sensorChannelNumber`).

    Args:
      sensor: registry name; the file does not state it.
      preqc_max: values whose PreQC is missing or outside [0, preqc_max] are masked and counted. 0 is the default of
        UFO's PreQC filter; NCEP's marks 0-3 are "use".
      effective_qc: mask values whose last EffectiveQC is not 0 as well.
      units, variables, trust_coordinates: as `earth.readers.stations.read_stations`.

    Returns: table, report (rows are locations, not values).
    Raises: SchemaError for another format or a group that is missing, other ObservationErrors, FileNotFoundError.
    """
    frame, attributes, flagged = _to_frame(Path(path), sensor, preqc_max, effective_qc)
    platform = next((f"MetaData/{n}" for n in _PLATFORM if f"MetaData/{n}" in frame), None)
    reports, _, report = wide_to_reports(
        frame,
        sensor=sensor,
        columns={platform: "platform"} if platform else None,
        attributes=attributes,
        units=units,
        variables=variables,
        trust_coordinates=trust_coordinates,
    )
    for reason, count in flagged.items():
        report.mask(reason, count)
    return reports.to_table(), report


def _to_frame(
    path: Path, sensor: str, preqc_max: int, effective_qc: bool
) -> tuple[pd.DataFrame, dict[str, str], dict[str, int]]:
    """A row per location with columns `MetaData/x`, `ObsValue/x`, `ObsError/x` (`x_5` for channel 5), units by column,
    and the number of values masked by variable.
    """
    groups = _open(path)
    meta, values = groups["MetaData"], groups["ObsValue"]
    if not values.data_vars:
        raise SchemaError(f"{path} has no variable in its group ObsValue")
    if "latitude" not in meta or not meta["latitude"].ndim:
        raise SchemaError(f"{path} has no latitude in its group MetaData, only {', '.join(map(str, meta.data_vars))}")
    place = str(meta["latitude"].dims[0])
    if not meta.sizes[place]:
        raise EmptyWindowError(f"{path} has no location; leave it out")
    columns: dict[str, Any] = {}
    attributes: dict[str, str] = {}
    height = _HEIGHT[::-1] if sensors.sensor(sensor).moving else _HEIGHT
    for name in (*_PLACE, *_PLATFORM, *[n for n in height if n in meta][:1]):
        if name in meta and meta[name].dims == (place,):
            columns[f"MetaData/{name}"] = _column(meta[name])
            if "units" in meta[name].attrs:
                attributes[f"MetaData/{name}"] = str(meta[name].attrs["units"])
    checks = _checks(groups, preqc_max, effective_qc)
    flagged: dict[str, int] = {}
    for name, array in values.data_vars.items():
        if array.dtype.kind not in "iuf" or place not in array.dims or array.ndim > 2:
            continue
        other = [d for d in array.dims if d != place]
        channels = _channels(groups, str(other[0]), array.sizes[other[0]], path) if other else [None]
        error = groups["ObsError"].get(name) if "ObsError" in groups else None
        for position, channel in enumerate(channels):
            pick = {other[0]: position} if other else {}
            key = f"{name}_{channel}" if other else str(name)
            value = _column(array.isel(pick))
            bad = np.zeros(len(value), bool)
            for group, passes in checks:
                if name in groups[group]:
                    fails = ~passes(_column(groups[group][name].isel(pick))) & ~np.isnan(value) & ~bad
                    reason = f"{name}: {group} not passed"
                    flagged[reason] = flagged.get(reason, 0) + int(fails.sum())
                    bad |= fails
            columns[f"ObsValue/{key}"] = np.where(bad, np.nan, value)
            if error is not None:
                columns[f"ObsError/{key}"] = _column(error.isel(pick))
            if "units" in array.attrs:
                attributes[f"ObsValue/{key}"] = str(array.attrs["units"])
    return pd.DataFrame(columns), attributes, flagged


def _open(path: Path) -> dict[str, xr.Dataset]:
    if not path.exists():
        raise FileNotFoundError(f"observation file {path} does not exist")
    try:
        groups = {name.strip("/"): group.load() for name, group in xr.open_groups(path, decode_timedelta=False).items()}
    except (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError) as error:
        raise SchemaError(
            f"{path} cannot be opened as netCDF with groups; is it truncated, of another format, or netCDF4 not "
            f"installed (pip install netCDF4)? ({error})"
        ) from error
    for group in groups.values():
        group.close()
    for name in ("MetaData", "ObsValue"):
        if name not in groups:
            raise SchemaError(f"{path} has no group {name}, only {sorted(filter(None, groups))}; is it an IODA file?")
    return groups


def _column(array: xr.DataArray) -> np.ndarray:
    """Values [n]: times and text as they are, numbers as float64 with NaN for missing."""
    values = array.to_numpy()
    if values.dtype.kind == "M":
        return values
    if values.dtype.kind not in "iuf":
        return np.array(
            [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values], dtype=object
        )
    missing = np.isin(values, _MISSING_INTEGERS) if values.dtype.kind in "iu" else np.abs(values) > _HUGE
    return np.where(missing, np.nan, values.astype(np.float64))


def _checks(groups: Mapping[str, xr.Dataset], preqc_max: int, effective_qc: bool) -> list[tuple[str, Any]]:
    """(group, which flags pass) of the quality groups in the file."""
    found: list[tuple[str, Any]] = []
    if "PreQC" in groups:
        found.append(("PreQC", lambda flag: (flag >= 0) & (flag <= preqc_max)))
    numbered = sorted(g for g in groups if re.fullmatch(r"EffectiveQC\d*", g))
    if effective_qc and numbered:
        found.append((numbered[-1], lambda flag: flag == 0))
    return found


def _channels(groups: Mapping[str, xr.Dataset], dim: str, size: int, path: Path) -> list[int]:
    for group, name in (("", dim), ("MetaData", "sensorChannelNumber"), ("MetaData", dim)):
        if name in groups.get(group, {}) and groups[group][name].size == size:
            numbers = observations.to_numbers(pd.Series(groups[group][name].to_numpy().ravel()))
            if np.isfinite(numbers).all():
                return [int(n) for n in numbers]
    raise SchemaError(f"{path} does not number its dimension {dim}; it needs a variable {dim} or sensorChannelNumber")
