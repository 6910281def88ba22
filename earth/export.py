"""Forecasts as files others read: xarray Datasets with CF names, netCDF, zarr, and WeatherBench-X's sparse parquet.

The parquet layout follows `weatherbenchX/data_loaders/sparse_parquet.py` of google-research/weatherbenchX (read at
commit 0a0a304): the loader computes file names from times, so that names are fixed, and every partition it may touch
must exist. All files appear under their final name only when complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from earth import sensors
from earth.protocol import hours_to_timedelta, utc_times

SPREAD = "_spread"


def to_dataset(
    mean: np.ndarray,
    spread: np.ndarray | None = None,
    *,
    init_times: Any,
    lead_hours: Sequence[int | float] | np.ndarray,
    variables: Sequence[str],
    stations: Sequence[str],
    latitude: Any,
    longitude: Any,
    height: Any = None,
    units: Mapping[str, str] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Point forecasts as an xarray Dataset with CF metadata: what verification, reports and exports read.

    Args:
      mean: float [I, L, S, V] in SI units, NaN = no forecast.
      spread: predictive standard deviation of the same shape, or None.
      init_times: [I] datetimes (UTC).
      lead_hours: [L] hours.
      variables: V ERA5 names.
      stations: S names of the points.
      latitude, longitude, height: [S] degrees, metres (None = unknown).
      units: units of variables the registry does not know, or of values that are not SI.
      attributes: global attributes (title, source, history, ...).

    Returns:
      Dataset with dims (init_time, lead_time, station), one variable per name and, with a spread, one `<name>_spread`;
      coordinates init_time, lead_time (timedelta64[ns]), valid_time(init_time, lead_time), station, latitude,
      longitude, height.

    Raises:
      ValueError: shapes disagree, or a spread is negative.
    """
    shape = (len(utc_times(init_times)), len(lead_hours), len(stations), len(variables))
    if np.shape(mean) != shape:
        raise ValueError(
            f"mean has shape {np.shape(mean)}, but init_times, lead_hours, stations and variables give {shape}"
        )
    if spread is not None:
        if np.shape(spread) != shape:
            raise ValueError(f"spread has shape {np.shape(spread)}, expected that of the mean, {shape}")
        if np.nanmin(spread, initial=0.0) < 0:
            raise ValueError(f"spread has negative values such as {np.nanmin(spread)}; pass standard deviations")
    inits, leads = utc_times(init_times), hours_to_timedelta(np.asarray(lead_hours, float))
    dims = ("init_time", "lead_time", "station")
    data: dict[str, Any] = {}
    for v, name in enumerate(variables):
        known = sensors.describe(name, (units or {}).get(name, "1"))
        unit = (units or {}).get(name, known.units)
        about = {"units": unit, "long_name": name.replace("_", " ")}
        about |= {"standard_name": known.standard_name} if known.standard_name else {}
        data[name] = (dims, np.asarray(mean[..., v]), about)
        if spread is not None:
            note = {
                "units": unit,
                "long_name": f"standard deviation of the predictive distribution of {name.replace('_', ' ')}",
            }
            # CF: the modifier says whose spread it is; ancillary_variables ties the two together.
            note |= {"standard_name": f"{known.standard_name} standard_error"} if known.standard_name else {}
            data[name + SPREAD] = (dims, np.asarray(spread[..., v]), note)
            data[name][2]["ancillary_variables"] = name + SPREAD
    place = np.full(len(stations), np.nan) if height is None else np.asarray(height, np.float64)
    coordinates = {
        "init_time": (
            "init_time",
            inits,
            {"standard_name": "forecast_reference_time", "long_name": "time of the last observation used"},
        ),
        "lead_time": ("lead_time", leads, {"standard_name": "forecast_period", "long_name": "lead time"}),
        "valid_time": (
            ("init_time", "lead_time"),
            inits[:, None] + leads[None],
            {"standard_name": "time", "long_name": "valid time"},
        ),
        "station": (
            "station",
            np.asarray([str(s) for s in stations], dtype=object),
            {"cf_role": "timeseries_id", "long_name": "station"},
        ),
        "latitude": (
            "station",
            np.asarray(latitude, np.float64),
            {"units": "degrees_north", "standard_name": "latitude"},
        ),
        "longitude": (
            "station",
            np.asarray(longitude, np.float64),
            {"units": "degrees_east", "standard_name": "longitude"},
        ),
        "height": (
            "station",
            place,
            {"units": "m", "standard_name": "surface_altitude", "long_name": "height above sea level"},
        ),
    }
    return xr.Dataset(data, coordinates, {"Conventions": "CF-1.11", **(attributes or {})})


def lead_hours_of(dataset: xr.Dataset) -> np.ndarray:
    """The lead times of a forecast in hours, float64 [L]."""
    return dataset["lead_time"].to_numpy().astype("timedelta64[ns]") / np.timedelta64(1, "ns") / 3.6e12


def forecast_variables(dataset: xr.Dataset) -> tuple[str, ...]:
    """The variables of a forecast Dataset without their `_spread` companions."""
    names = [str(n) for n in dataset.data_vars]
    return tuple(n for n in names if not (n.endswith(SPREAD) and n[: -len(SPREAD)] in names))


# ---- files
@contextlib.contextmanager
def appearing_complete(path: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block ends without an error."""
    final = Path(path)
    if final.exists() and not overwrite:
        raise FileExistsError(f"{final} exists; pass overwrite=True to replace it")
    final.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers choose their format by it.
    temporary = final.with_name(f".partial-{os.getpid()}-{final.name}")
    _remove(temporary)
    try:
        yield temporary
        if final.is_dir() or (final.exists() and temporary.is_dir()):
            # A directory cannot be replaced in one step: the old one steps aside first.
            aside = final.with_name(f".replaced-{os.getpid()}-{final.name}")
            os.replace(final, aside)
            os.replace(temporary, final)
            _remove(aside)
        else:
            os.replace(temporary, final)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_dataset(dataset: xr.Dataset, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a Dataset to `path`: netCDF for `.nc`, zarr (one chunk per initial time) for `.zarr`.

    Raises:
      ValueError: another suffix.
      FileExistsError: `path` exists and overwrite is false.
    """
    kind = Path(path).suffix
    if kind not in (".nc", ".zarr"):
        raise ValueError(f"{path} ends in {kind!r}; a Dataset is written as .nc (netCDF) or .zarr")
    with appearing_complete(path, overwrite) as temporary:
        if kind == ".nc":
            dataset.to_netcdf(temporary)
        else:
            # zarr 3 has no stable variable-length string: names are stored at fixed width.
            plain = dataset.assign_coords({n: c.astype(str) for n, c in dataset.coords.items() if c.dtype == object})
            sizes = {d: 1 if d == "init_time" else n for d, n in dataset.sizes.items()}
            encoding = {
                str(n): {"chunks": tuple(max(1, sizes[d]) for d in v.dims)} for n, v in dataset.data_vars.items()
            }
            plain.to_zarr(temporary, encoding=encoding, zarr_format=2, consolidated=True)


_PARTITIONS = {"month": "M", "day": "D", "hour": "h"}
PLACE_COLUMNS = ("latitude", "longitude", "elevation", "stationName")


def partition_file(time: np.datetime64, partitioned_by: str) -> str:
    """Relative name of the partition of a time, e.g. year=2020/month=1/day=1/2020-01-01.parquet for "day"."""
    if partitioned_by not in _PARTITIONS:
        raise ValueError(f"partitioned_by={partitioned_by!r} is not known; choose month, day or hour")
    stamp = pd.Timestamp(time)
    folder, name = f"year={stamp.year}/month={stamp.month}", f"{stamp.year}-{stamp.month:02d}"
    if partitioned_by != "month":
        folder, name = f"{folder}/day={stamp.day}", f"{name}-{stamp.day:02d}"
    if partitioned_by == "hour":
        folder, name = f"{folder}/hour={stamp.hour}", f"{name}T{stamp.hour:02d}"
    return f"{folder}/{name}.parquet"


def sparse_frame(dataset: xr.Dataset, variables: Iterable[str] | None = None) -> pd.DataFrame:
    """A forecast (init_time, lead_time, station) or a record (time, station) as rows: one per report.

    Returns:
      DataFrame sorted by valid_time, init_time and station: valid_time, init_time, lead_time (a record has init_time =
      valid_time and a lead of zero), latitude, longitude, elevation, stationName, one column per variable; a spread is
      a column `<name>_spread`. Rows without any value are left out.
    """
    names = [str(n) for n in dataset.data_vars] if variables is None else list(variables)
    for name in names:
        if name not in dataset.data_vars:
            raise ValueError(
                f"variable {name!r} is not in the dataset; it has {', '.join(map(str, dataset.data_vars))}"
            )
    if "time" in dataset.dims:
        init = utc_times(dataset["time"].to_numpy())[:, None]
        lead = np.zeros((1, 1), "timedelta64[ns]")
        dims: tuple[str, ...] = ("time", "station")
    else:
        init = utc_times(dataset["init_time"].to_numpy())[:, None, None]
        lead = dataset["lead_time"].to_numpy().astype("timedelta64[ns]")[None, :, None]
        dims = ("init_time", "lead_time", "station")
    shape = tuple(dataset.sizes[d] for d in dims)
    station = np.arange(shape[-1])

    def rows(array: np.ndarray) -> np.ndarray:
        return np.broadcast_to(array, shape).reshape(-1)

    def place(name: str) -> np.ndarray:
        return (
            rows(dataset[name].to_numpy().astype(np.float64)) if name in dataset.variables else rows(np.array(np.nan))
        )

    columns = {"valid_time": rows(init + lead), "init_time": rows(init), "lead_time": rows(lead)}
    columns |= {"latitude": place("latitude"), "longitude": place("longitude"), "elevation": place("height")}
    columns["stationName"] = rows(dataset["station"].to_numpy().astype(str).astype(object))
    values = {n: dataset[n].transpose(*dims).to_numpy().reshape(-1) for n in names}
    some = (
        np.logical_or.reduce([np.isfinite(v) for v in values.values()]) if values else np.ones(len(rows(station)), bool)
    )
    order = np.lexsort((rows(station), columns["init_time"], columns["valid_time"]))
    order = order[some[order]]
    return pd.DataFrame({n: v[order] for n, v in (columns | values).items()})


def to_weatherbenchx(
    dataset: xr.Dataset,
    path: str | os.PathLike[str],
    *,
    partitioned_by: str = "day",
    variables: Iterable[str] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write a forecast or a record as WeatherBench-X sparse parquet, partitioned by valid time.

    Read it with ``SparseObservationsFromParquet(path, partitioned_by="day", time_dim="valid_time", variables=[...],
    coordinate_variables=["latitude", "longitude", "elevation", "stationName"], split_variables=True, dropna=True)``.
    That loader selects rows by valid time alone and then writes the requested init_time and lead_time over them; a
    forecast with several leads therefore needs one loader per lead with ``preprocessing_fn=select_lead(6)``.

    Besides the partitions with rows, empty ones are written before and after each: the loader opens the partitions an
    hour around a time (`file_tolerance`) and "assumes there are no missing files".

    Args:
      dataset: dims (init_time, lead_time, station) or (time, station); values are written as they are (SI in the
        library).
      path: folder of the store.
      partitioned_by: "month", "day" or "hour".
      variables: names to write; None = all, spreads included.
      overwrite: replace an existing store.

    Returns:
      The files written, sorted.

    Raises:
      FileExistsError: `path` exists and overwrite is false.
      ValueError: nothing to write, or an unknown partition or variable.
    """
    frame = sparse_frame(dataset, variables)
    if partitioned_by not in _PARTITIONS:
        raise ValueError(f"partitioned_by={partitioned_by!r} is not known; choose month, day or hour")
    if not len(frame):
        raise ValueError("the dataset holds no value to write; check the variables and times selected")
    unit = _PARTITIONS[partitioned_by]
    key = frame["valid_time"].to_numpy().astype(f"datetime64[{unit}]")
    present = np.unique(key)
    wanted = np.unique(np.concatenate([present - 1, present, present + 1]))
    files = []
    with appearing_complete(path, overwrite) as temporary:
        first, last = np.searchsorted(key, wanted, "left"), np.searchsorted(key, wanted, "right")
        for time, start, end in zip(wanted, first, last, strict=True):
            name = partition_file(time, partitioned_by)
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            frame.iloc[start:end].to_parquet(temporary / name, index=False)
            files.append(Path(path) / name)
    return sorted(files)


def select_lead(hours: float | int) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """The `preprocessing_fn` that keeps the rows of one lead of a forecast written by `to_weatherbenchx`."""
    lead = pd.Timedelta(hours=hours)

    def keep(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.loc[frame["lead_time"] == lead].reset_index(drop=True)

    return keep
