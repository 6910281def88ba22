"""xarray Datasets, zarr and netCDF: gridded, station, trajectory or point data with CF coordinates to the observation
table.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from earth.observations import DropReport, EmptyWindowError, SchemaError
from earth.readers.tables import ROLES, wide_to_reports
from earth.sensors import name_key

SUFFIXES = (".zarr", ".nc", ".nc4", ".netcdf")
_MAX_VALUES = 2e9


def open_dataset(source: Any) -> xr.Dataset:
    """A Dataset from a Dataset, DataArray, zarr store or netCDF file; raises SchemaError if it cannot be opened."""
    if isinstance(source, xr.Dataset):
        return source
    if isinstance(source, xr.DataArray):
        return source.to_dataset(name=source.name or "value")
    if not isinstance(source, (str, os.PathLike)):
        raise SchemaError(f"cannot read arrays from {type(source).__name__}; pass a path or an xarray Dataset")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"observation store {path} does not exist")
    try:
        if path.is_dir() or path.suffix.lower() == ".zarr":
            # Local stores open fast without consolidated metadata, and not every store has them.
            return xr.open_dataset(path, engine="zarr", consolidated=False, chunks=None)
        return xr.open_dataset(path)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise SchemaError(
            f"{path} cannot be opened as zarr or netCDF; is it truncated or of another format? ({error})"
        ) from error


def _role(name: str, variable: xr.DataArray) -> str | None:
    """CF role of a coordinate by its attributes first (standard_name, units, axis, cf_role), then by its name."""
    attrs = {k: str(v).lower() for k, v in variable.attrs.items()}
    standard, units, axis = attrs.get("standard_name", ""), attrs.get("units", ""), attrs.get("axis", "")
    if standard in ("latitude", "longitude", "time"):
        return standard
    if units in ("degrees_north", "degree_north", "degrees_n"):
        return "latitude"
    if units in ("degrees_east", "degree_east", "degrees_e"):
        return "longitude"
    if "cf_role" in attrs or standard in ("platform_id", "platform_name"):
        return "platform"
    if standard in ("altitude", "height", "surface_altitude", "height_above_mean_sea_level"):
        return "height"
    if standard == "air_pressure" and (axis == "z" or (variable.ndim == 1 and variable.dims == (name,))):
        return "pressure"
    if axis == "t" or (variable.dtype.kind == "M" and name_key(name) in ROLES["time"]):
        return "time"
    key = name_key(name)
    for role in ("time", "latitude", "longitude", "height", "platform"):
        if key in ROLES[role]:
            return role
    if key in ("level", "lev", "plev", "pressurelevel", "isobaricinhpa"):
        return "pressure"
    return None


def to_frame(source: Any) -> tuple[pd.DataFrame, dict[str, str]]:
    """A Dataset flattened to one row per cell of its full grid, with columns named by role, and the units its
    attributes state.

    Dimensions without a coordinate, and variables over unrelated dimensions, follow xarray's broadcasting. Text and
    boolean variables are left out unless they name the platform.

    Raises: SchemaError if latitude, longitude or time are not found, or two of a kind are; EmptyWindowError for no
    cells.
    """
    data = open_dataset(source)
    roles: dict[str, str] = {}
    for name in [*data.coords, *data.data_vars]:
        role = _role(str(name), data[name])
        if (
            role is not None
            and role not in roles
            and (name in data.coords or role in ("latitude", "longitude", "time", "height", "platform"))
        ):
            roles[role] = str(name)
    for role in ("latitude", "longitude", "time"):
        if role not in roles:
            raise SchemaError(
                f"no {role} found among {', '.join(map(str, [*data.coords, *data.data_vars]))}; rename it, or give it "
                f"the CF attribute standard_name={role!r}"
            )
    used = set(roles.values())
    values = [str(n) for n in data.data_vars if n not in used and data[n].dtype.kind in "iuf"]
    if not isinstance(source, (xr.Dataset, xr.DataArray)):
        values.sort()  # a store lists its variables in the order of the file system
    if not values:
        raise SchemaError(f"no numeric variable found among {', '.join(map(str, data.data_vars))}")
    dims = dict.fromkeys(d for n in values for d in data[n].dims)
    cells = int(np.prod([data.sizes[d] for d in dims]))
    if not cells:
        raise EmptyWindowError(f"the dataset has no cells: {dict(data.sizes)}; pass a larger selection")
    if cells * len(values) > _MAX_VALUES:
        raise SchemaError(
            f"{cells} cells x {len(values)} variables are too many for a table; select a region, period or variables "
            "first"
        )
    picked = data[values].assign_coords({n: data[n] for n in used if n not in data.coords})
    extra = [str(c) for c in picked.coords if c not in used and c not in picked.dims]
    spare_dims = [str(d) for d in dims if d not in used]
    frame = picked.drop_vars(extra).to_dataframe().reset_index()
    frame = frame.drop(columns=[c for c in spare_dims if c in frame and c not in values])
    missing = [n for n in used if n not in frame.columns]
    for name in missing:
        if data[name].size != 1:
            raise SchemaError(
                f"coordinate {name!r} over {data[name].dims} does not lie on the dimensions {tuple(dims)} of "
                f"{', '.join(values)}; broadcast it first"
            )
        frame[name] = data[name].to_numpy().ravel()[0]
    renames = {name: role for role, name in roles.items() if role != name and role not in frame.columns}
    frame = frame.rename(columns=renames)
    attributes = {str(n): str(data[n].attrs["units"]) for n in values if "units" in data[n].attrs}
    if "pressure" in roles:
        units = str(data[roles["pressure"]].attrs.get("units", ""))
        attributes |= {
            "pressure": "hPa"
            if units.lower() in ("millibars", "millibar", "hpa", "mb", "")
            and float(np.nanmax(data[roles["pressure"]])) <= 1_100
            else units or "Pa"
        }
    return frame, attributes


def read_arrays(
    source: Any,
    *,
    columns: Mapping[str, str | None] | None = None,
    units: Mapping[str, str] | None = None,
    timezone: str = "UTC",
    sensor: str = "station",
    variables: Sequence[str] | None = None,
    trust_coordinates: bool = False,
) -> tuple[pd.DataFrame, DropReport]:
    """Reads zarr, netCDF or an xarray object to the canonical long table, validated.

    Cells without a value (NaN) vanish, counted. Units in the attributes are taken as stated: values that contradict
    them are a `UnitError`. On a grid, every cell is a fixed platform named by its position.

    Args: as `earth.readers.stations.read_stations`.
    Returns: table, report (rows are cells, not values).
    Raises: ObservationError subclasses, FileNotFoundError.
    """
    frame, attributes = to_frame(source)
    reports, _, report = wide_to_reports(
        frame,
        sensor=sensor,
        columns=columns,
        units=units,
        attributes=attributes,
        timezone=timezone,
        variables=variables,
        trust_coordinates=trust_coordinates,
    )
    return reports.to_table(), report
