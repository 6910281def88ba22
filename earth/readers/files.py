"""Any file of observations: the reader is chosen by the suffix and, where several formats share one, by the content."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from earth import observations
from earth.observations import DropReport
from earth.readers import arrays, bufr, ioda, parquet, tables, weatherbenchx

FORMATS = ("bufr", "ioda", "arrays", "weatherbenchx", "parquet", "table")
_BUFR = (".bufr", ".bufr4", ".bfr", ".prepbufr")
_NETCDF = (".nc", ".nc4", ".netcdf")


def format_of(path: str | os.PathLike[str]) -> str:
    """One of `FORMATS`; raises FileNotFoundError.

    `parquet` is an archive of NNJA-AI or HealDA, `table` any other table.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"observation file {path} does not exist")
    if path.is_dir():
        if (path / "zarr.json").exists() or (path / ".zgroup").exists() or path.suffix == ".zarr":
            return "arrays"
        return "weatherbenchx" if weatherbenchx.is_weatherbenchx(path) else "parquet"
    suffix = path.suffix.lower()
    if suffix in _NETCDF:
        return "ioda" if ioda.is_ioda(path) else "arrays"
    if suffix in (".parquet", ".pq"):
        return "parquet" if parquet.layout_of(parquet.open_parquet(path).schema_arrow.names) else "table"
    if suffix in _BUFR:
        return "bufr"
    with path.open("rb") as file:  # BUFR often has no suffix, and a bulletin's heading before the first message
        return "bufr" if b"BUFR" in file.read(1024) else "table"


def read(path: str | os.PathLike[str], **options: Any) -> tuple[pd.DataFrame, DropReport]:
    """A file or folder of any known format as one canonical table, with its report.

    Args:
      options: those of the reader: `read_bufr`, `read_ioda`, `read_arrays`, `stream_weatherbenchx`, `stream_parquet`,
        `read_table`.

    The report of an archive in pieces is that of joining them; `stream` gives each piece its own.

    Raises: ObservationErrors, FileNotFoundError, MissingExtraError.
    """
    kind = format_of(path)
    if kind == "bufr":
        return bufr.read_bufr(path, **options)
    if kind in ("parquet", "weatherbenchx"):
        pairs = list(stream(path, **options))
        if len(pairs) == 1:
            return pairs[0]
        return observations.validate(pd.concat([table for table, _ in pairs], ignore_index=True))
    return {"ioda": ioda.read_ioda, "arrays": arrays.read_arrays, "table": tables.read_table}[kind](path, **options)


def stream(path: str | os.PathLike[str], **options: Any) -> Iterator[tuple[pd.DataFrame, DropReport]]:
    """`read` in pieces that fit in memory, for `earth.archive.append`; arrays, IODA files and tables are one piece.

    Parquet tables are read in batches of rows.
    """
    kind = format_of(path)
    if kind == "bufr":
        yield from bufr.stream_bufr(path, **options)
    elif kind == "weatherbenchx":
        yield from weatherbenchx.stream_weatherbenchx(path, **options)
    elif kind == "parquet" or Path(path).suffix.lower() in (".parquet", ".pq"):
        yield from parquet.stream_parquet(path, **options)
    else:
        yield read(path, **options)
