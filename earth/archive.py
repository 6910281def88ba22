"""A tabular zarr archive of observations, chunked by time: years of reports that never lie in memory at once.

    append("observations", stream_bufr("temp.bufr"))  # tables in, in any order, again after a crash
    table = read("observations", "2021-06-01", "2021-06-02")  # the canonical table of `earth.observations` out
    for day in stream("observations", sensors=["station"]): ...

**Layout** (a local folder; ours). `rows.zarr` (zarr format 3) has one group per sensor with one 1-d array per column of
the canonical table; text is stored as dictionary codes. The rows of one time span (a day) form a *segment*: sorted by
time, without duplicates, starting on a chunk boundary, so that a chunk belongs to one span only. `commits.jsonl` is the
time index: a line per segment with its sensor, span, first row, rows, first and last time, and the names new to the
dictionaries; the last line of a span counts. **What the index does not name does not exist**: rows are written first
and committed by one appended line, so a killed `append` leaves the previous state, and running it again adds what is
missing and nothing twice.

One process appends at a time (a file lock). Readers see the state at the moment they open the archive.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr

from earth import observations, sensors
from earth.observations import (
    COLUMNS,
    DropReport,
    EmptyWindowError,
    MissingVariableError,
    ObservationError,
    SchemaError,
)

SCHEMA_VERSION = 1
LOG, ROWS = "commits.jsonl", "rows.zarr"
_KEY = "earth_archive"  # attribute of the root group
_MISSING = np.iinfo(np.int64).min  # fill value of time: a row that was never written
_STORED: dict[str, tuple[str, Any]] = {  # column -> dtype on disk, fill value; `sensor` is the group
    "time": ("int64", _MISSING),  # nanoseconds since 1970
    "latitude": ("float64", np.nan),
    "longitude": ("float64", np.nan),
    "height": ("float64", np.nan),
    "pressure": ("float64", np.nan),
    "variable": ("int16", -1),
    "value": ("float64", np.nan),
    "channel": ("int32", -1),
    "platform": ("int32", -1),
    "obs_error": ("float64", np.nan),
    "view_angle": ("float64", np.nan),
    "qc": ("int8", 0),
}
_CODED = ("variable", "platform")
_NEVER_MISSING = ("latitude", "longitude", "value")  # in a canonical table
_NS = 1_000_000_000
Rows = dict[str, np.ndarray]  # stored columns of equal length


class ArchiveError(ObservationError):
    """A folder that is no archive, of another schema version, damaged, or locked by another writer."""


@dataclasses.dataclass(frozen=True)
class ArchiveConfig:
    """Chosen when the archive is created.

    Attributes:
      span: seconds of observations that form a segment; the rows of one sensor and span must fit in memory.
      chunk: rows of a chunk. A span takes whole chunks, the last one padded (and compressed to almost nothing).
    """

    span: int = 86_400
    chunk: int = 65_536

    def __post_init__(self) -> None:
        for name in ("span", "chunk"):
            if getattr(self, name) < 1:
                raise ArchiveError(f"{name}={getattr(self, name)} must be at least 1; the defaults are a day and 65536")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Rows [start, start + rows) of a sensor's arrays: those of one span. first, last: seconds since 1970."""

    start: int
    rows: int
    first: int
    last: int


@dataclasses.dataclass
class _Shelf:
    """What the log says about one sensor."""

    names: dict[str, list[str]] = dataclasses.field(default_factory=lambda: {name: [] for name in _CODED})
    segments: dict[int, Segment] = dataclasses.field(default_factory=dict)
    end: int = 0  # first free row, on a chunk boundary


# ----------------------------------------------------------------------------------------------------------------- open
def create(path: str | os.PathLike[str], config: ArchiveConfig | None = None) -> None:
    """Creates an empty archive; an existing one of the same configuration is left as it is.

    Raises: ArchiveError if there is an archive of another configuration or a folder that is none.
    """
    config = config or ArchiveConfig()
    root = Path(path)
    if root.exists() and any(root.iterdir() if root.is_dir() else [root]):
        if (there := _config(root)) != config:
            raise ArchiveError(f"{root} was created with {there}, not with {config}; leave config= out to keep to it")
        return
    # The root's metadata is one file that zarr writes in one step: the archive exists or does not.
    attributes: Any = {_KEY: {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(config)}}
    zarr.open_group(root / ROWS, mode="w-", zarr_format=3, attributes=attributes)


def _config(root: Path) -> ArchiveConfig:
    if not root.exists():
        raise FileNotFoundError(f"observation archive {root} does not exist")
    try:
        attributes = json.loads((root / ROWS / "zarr.json").read_text())["attributes"][_KEY]
        version, known = attributes.pop("schema_version"), ArchiveConfig(**attributes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArchiveError(f"{root} is no observation archive; make one with append() ({error!r})") from error
    if version != SCHEMA_VERSION:
        raise ArchiveError(f"{root} has schema version {version}, this library reads {SCHEMA_VERSION}; write it anew")
    return known


def _replay(root: Path, chunk: int) -> dict[str, _Shelf]:
    """The state that the complete lines of the log describe. A line without its newline was cut by a crash."""
    shelves: dict[str, _Shelf] = {}
    text = (root / LOG).read_bytes() if (root / LOG).exists() else b""
    for number, line in enumerate(text.split(b"\n")[:-1]):
        try:
            entry = json.loads(line)
            shelf = shelves.setdefault(entry["sensor"], _Shelf())
            for name in _CODED:
                shelf.names[name] += entry[name]
            segment = Segment(*(int(entry[f.name]) for f in dataclasses.fields(Segment)))
            shelf.segments[int(entry["span"])] = segment
        except (ValueError, KeyError, TypeError) as error:
            raise ArchiveError(f"line {number} of {root / LOG} is damaged ({error!r}); restore it") from error
        shelf.end = max(shelf.end, _whole(segment.start + segment.rows, chunk))
    return shelves


def _chunk_path(root: Path, sensor: str, column: str, number: int) -> Path:
    return root / ROWS / sensor / column / "c" / str(number)


def _whole(rows: int, chunk: int) -> int:
    return -(-rows // chunk) * chunk


def spans(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The time index: one row per sensor and span with columns sensor, start, rows, first, last (times UTC)."""
    root = Path(path)
    config = _config(root)
    rows = [
        (name, span * config.span, segment.rows, segment.first, segment.last)
        for name, shelf in sorted(_replay(root, config.chunk).items())
        for span, segment in sorted(shelf.segments.items())
    ]
    frame = pd.DataFrame(rows, columns=["sensor", "start", "rows", "first", "last"])
    times = {c: frame[c].to_numpy(np.int64).astype("datetime64[s]") for c in ("start", "first", "last")}
    return frame.assign(**times)


# --------------------------------------------------------------------------------------------------------------- append
def append(
    path: str | os.PathLike[str],
    tables: Iterable[pd.DataFrame | tuple[pd.DataFrame, DropReport]],
    *,
    config: ArchiveConfig | None = None,
    hold: int = 1_000_000,
) -> DropReport:
    """Adds canonical tables to an archive, creating it if need be.

    Rows wait in memory by sensor and span; when more than `hold` of them wait, the earliest spans are written until
    half are left. Tables in order of time therefore write each span once; for those in order of station, raise `hold`
    as far as memory allows. A span that is already there is read, completed and written to a new segment; its old
    chunks are removed after the commit. Duplicates (as in `observations.validate`; the first one stays) are dropped
    and counted, so that appending the same tables again changes nothing.

    Args:
      path: folder of the archive.
      tables: tables from `observations.validate` or a reader, or (table, report) pairs as the streaming readers give.
      config: for a new archive; an existing one must agree.
      hold: rows held in memory, about 80 bytes each.

    Returns: rows_in == rows_kept + dropped.
    Raises: SchemaError for a table that is not canonical, ArchiveError; what the iterator raises. The rows committed
      until then stay.
    """
    root = Path(path)
    if config is not None or not (root / ROWS).exists():
        create(root, config)
    config = _config(root)
    report = DropReport()
    with (root / LOG).open("a+b") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArchiveError(f"another process is appending to {root}; wait until it has ended") from error
        log.truncate(_complete(root / LOG))
        writer = _Writer(root, config, log, _replay(root, config.chunk), report)
        waiting: dict[tuple[int, str], list[Rows]] = {}
        held = 0

        def write(limit: int) -> None:
            nonlocal held
            while held > limit:
                key = min(waiting)
                parts = waiting.pop(key)
                held -= sum(len(part["time"]) for part in parts)
                writer.commit(key[1], key[0], parts)

        for item in tables:
            table = item[0] if isinstance(item, tuple) else item
            report.rows_in += len(table)
            for name, rows in _encode(table, writer.shelves):
                span = rows["time"] // (config.span * _NS)
                order = np.argsort(span, kind="stable")
                cuts = np.flatnonzero(np.diff(span[order])) + 1
                for part in np.split(order, cuts):
                    key = (int(span[part[0]]), name)
                    waiting.setdefault(key, []).append({column: values[part] for column, values in rows.items()})
                held += len(span)
            if held > hold:
                write(hold // 2)
        write(0)
    return report


def _complete(log: Path) -> int:
    """Bytes of the log up to the end of its last complete line."""
    return log.read_bytes().rfind(b"\n") + 1


def _encode(table: pd.DataFrame, shelves: dict[str, _Shelf]) -> Iterator[tuple[str, Rows]]:
    """Sensor and stored columns of each sensor's rows; names new to the dictionaries are added to `shelves`."""
    if missing := [name for name in COLUMNS if name not in table]:
        raise SchemaError(f"column {missing[0]!r} is missing; pass the table through observations.validate() first")
    if not len(table):
        return
    stamps = table["time"].to_numpy()
    if stamps.dtype.kind != "M" or np.isnat(stamps).any():
        raise SchemaError(
            "the time column is not datetime64 or has gaps; pass the table through observations.validate()"
        )
    columns: Rows = {"time": stamps.astype("datetime64[ns]").astype(np.int64)}
    codes: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {}
    for name in (*_CODED, "sensor"):
        codes[name] = observations.platform_labels(table[name])
        if (empty := np.flatnonzero(codes[name][0] < 0)).size:
            raise SchemaError(
                f"column {name!r} is empty at row {empty[0]}; pass the table through observations.validate()"
            )
    for name, (dtype, _) in _STORED.items():
        if name not in columns and name not in _CODED:
            columns[name] = table[name].to_numpy().astype(dtype)
    for name in _NEVER_MISSING:
        if (empty := np.flatnonzero(np.isnan(columns[name]))).size:
            raise SchemaError(
                f"column {name!r} is NaN at row {empty[0]}; pass the table through observations.validate()"
            )
    kind, kinds = codes["sensor"]
    for number, sensor in enumerate(kinds):
        rows = np.flatnonzero(kind == number)
        if not rows.size:
            continue
        sensors.sensor(sensor)
        part = {name: values[rows] for name, values in columns.items()}
        shelf = shelves.setdefault(sensor, _Shelf())
        for name in _CODED:
            code, labels = codes[name]
            part[name] = _global_codes(code[rows], labels, shelf.names[name]).astype(_STORED[name][0])
        yield sensor, part


def _global_codes(codes: np.ndarray, labels: tuple[str, ...], names: list[str]) -> np.ndarray:
    """Codes into `labels` as codes into `names`, which grows by the labels in use that it lacks."""
    place = {name: i for i, name in enumerate(names)}
    lookup = np.full(len(labels), -1)
    for code in np.unique(codes).tolist():
        lookup[code] = place.setdefault(labels[code], len(names))
        if lookup[code] == len(names):
            names.append(labels[code])
    return lookup[codes]


@dataclasses.dataclass
class _Writer:
    """The open archive of one `append`."""

    root: Path
    config: ArchiveConfig
    log: Any
    shelves: dict[str, _Shelf]
    report: DropReport

    def __post_init__(self) -> None:
        self.arrays: dict[str, dict[str, Any]] = {}
        self.logged = {
            name: {column: len(shelf.names[column]) for column in _CODED} for name, shelf in self.shelves.items()
        }

    def commit(self, sensor: str, span: int, parts: list[Rows]) -> None:
        """Writes the rows of one span, merged with those there, and the line that makes them count."""
        shelf, chunk = self.shelves[sensor], self.config.chunk
        arrays = self._open(sensor)
        old = shelf.segments.get(span)
        if old is not None:
            parts = [_load(arrays, old, _STORED, self.root), *parts]
        rows = {name: np.concatenate([part[name] for part in parts]) for name in _STORED}
        before = old.rows if old else 0
        stay = self._without_duplicates(rows, sensor, before)
        self.report.rows_kept += stay.size - before
        if stay.size == before:
            return
        order = stay[np.argsort(rows["time"][stay], kind="stable")]
        start, end = shelf.end, shelf.end + len(order)
        for name, array in arrays.items():
            if array.shape[0] < end:  # doubled, so that the arrays' metadata is rarely written
                array.resize((max(_whole(end, chunk), 2 * array.shape[0]),))
            array[start:end] = rows[name][order]
        first, last = (int(rows["time"][order[i]] // _NS) for i in (0, -1))
        segment = Segment(start, len(order), first, last)
        known = self.logged.setdefault(sensor, dict.fromkeys(_CODED, 0))
        entry = {"sensor": sensor, "span": span, **dataclasses.asdict(segment)}
        entry |= {name: shelf.names[name][known[name] :] for name in _CODED}
        self.log.write(json.dumps(entry).encode() + b"\n")
        self.log.flush()
        os.fsync(self.log.fileno())
        self.logged[sensor] = {name: len(shelf.names[name]) for name in _CODED}
        shelf.segments[span], shelf.end = segment, _whole(end, chunk)
        if old is not None:
            for name, number in itertools.product(
                _STORED, range(old.start // chunk, -(-(old.start + old.rows) // chunk))
            ):
                _chunk_path(self.root, sensor, name, number).unlink(missing_ok=True)

    def _open(self, sensor: str) -> dict[str, Any]:
        if sensor not in self.arrays:
            group = zarr.open_group(self.root / ROWS, mode="r+").require_group(sensor)
            # Arrays that no commit speaks of are the rest of a killed append.
            stale = sensor not in self.logged
            self.arrays[sensor] = {
                name: group.create_array(
                    name, shape=(0,), chunks=(self.config.chunk,), dtype=dtype, fill_value=fill, overwrite=True
                )
                if stale
                else group[name]
                for name, (dtype, fill) in _STORED.items()
            }
        return self.arrays[sensor]

    def _without_duplicates(self, rows: Rows, sensor: str, before: int) -> np.ndarray:
        """Positions of the rows to keep, ascending; drops are counted. The key is that of `observations.validate`."""
        fixed = not sensors.sensor(sensor).moving
        places = [rows["height"], rows["pressure"], *([] if fixed else [rows["latitude"], rows["longitude"]])]
        keys = [rows[name].astype(np.int64) for name in ("platform", "time", "variable", "channel")]
        group, first = observations.group_rows(*keys, *(observations.float_bits(x) for x in places))
        later = np.ones(len(group), bool)
        later[first] = False
        equal = rows["value"] == rows["value"][first[group]]
        self.report.drop("duplicate of an earlier row", int((later & equal)[before:].sum()))
        self.report.drop("duplicate with another value", int((later & ~equal)[before:].sum()))
        return np.sort(first)


# ----------------------------------------------------------------------------------------------------------------- read
def read(
    path: str | os.PathLike[str],
    start: Any = None,
    end: Any = None,
    *,
    sensors: Sequence[str] | None = None,
    variables: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The canonical table of all rows with start <= time < end, sorted by (sensor, platform, time) as `validate` does.

    Only the chunks of spans that the time index puts in the period are read. A station that moved between two appended
    tables still has one name here; `validate` splits it.

    Args:
      start, end: anything `parse_times` reads (UTC), or seconds since 1970; None is open.
      sensors, variables: names to read; None reads all.

    Raises: EmptyWindowError if no row is left, SchemaError for an unknown sensor, MissingVariableError for a variable
      that no chosen sensor holds, ArchiveError, FileNotFoundError.
    """
    opened = _Reader(path, start, end, sensors, variables)
    table = opened.table(opened.segments())
    if not len(table):
        raise EmptyWindowError(f"{path} has no row of {opened.wanted()} in [{start}, {end}); spans() lists what it has")
    return table


def stream(
    path: str | os.PathLike[str],
    start: Any = None,
    end: Any = None,
    *,
    sensors: Sequence[str] | None = None,
    variables: Sequence[str] | None = None,
) -> Iterator[pd.DataFrame]:
    """`read`, one span after the other: a table of each span that has rows, in order of time."""
    opened = _Reader(path, start, end, sensors, variables)
    for _, group in itertools.groupby(opened.segments(), key=lambda item: item[0]):
        table = opened.table(group)
        if len(table):
            yield table


class _Reader:
    """An archive at one moment and a selection from it."""

    def __init__(self, path: Any, start: Any, end: Any, names: Sequence[str] | None, variables: Sequence[str] | None):
        self.root = Path(path)
        self.chunk = _config(self.root).chunk
        self.shelves = _replay(self.root, self.chunk)
        self.start, self.end = (_instant(t, default) for t, default in ((start, -(2**33)), (end, 2**33)))
        for name in names or ():
            if name not in self.shelves:
                near = sensors.nearest(name, self.shelves)
                raise SchemaError(f"sensor {name!r} is not in {self.root}; the nearest there is {near!r}")
        self.names = sorted(self.shelves if names is None else set(names))
        self.variables = variables
        held = {v for name in self.names for v in self.shelves[name].names["variable"]}
        for name in variables or ():
            if name not in held:
                near = sensors.nearest(name, held)
                raise MissingVariableError(f"variable {name!r} is not in {self.root}; the nearest there is {near!r}")
        self.group = zarr.open_group(self.root / ROWS, mode="r")
        self.arrays: dict[str, dict[str, Any]] = {}

    def wanted(self) -> str:
        return ", ".join(self.variables or self.names) or "any sensor"

    def segments(self) -> list[tuple[int, str, Segment]]:
        """(span, sensor, segment) of the period, in order of time."""
        found = [(k, n, s) for n in self.names for k, s in self.shelves[n].segments.items()]
        return sorted((x for x in found if x[2].last >= self.start and x[2].first < self.end), key=lambda x: x[:2])

    def table(self, segments: Iterable[tuple[int, str, Segment]]) -> pd.DataFrame:
        parts: dict[str, list[Rows]] = {}
        for _, name, segment in segments:
            if name not in self.arrays:
                self.arrays[name] = {column: self.group[f"{name}/{column}"] for column in _STORED}
            if (rows := self._rows(name, segment)) is not None:
                parts.setdefault(name, []).append(rows)
        return _canonical(parts, self.shelves)

    def _rows(self, name: str, segment: Segment) -> Rows | None:
        arrays, rows = self.arrays[name], _load(self.arrays[name], segment, ("time", "variable"), self.root)
        keep = (rows["time"] >= self.start * _NS) & (rows["time"] < self.end * _NS)
        if self.variables is not None:
            known = self.shelves[name].names["variable"]
            keep &= np.isin(rows["variable"], [i for i, v in enumerate(known) if v in self.variables])
        if not keep.any():
            return None
        rows |= _load(arrays, segment, [c for c in _STORED if c not in rows], self.root)
        # A span that is written anew loses its first chunk of times before all others: with it there, none was missed.
        if not _chunk_path(self.root, name, "time", segment.start // self.chunk).exists():
            raise ArchiveError(f"the rows of {name} from {segment.start} on were written anew; open {self.root} again")
        return {column: values[keep] for column, values in rows.items()}


def _instant(value: Any, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, (int, np.integer)):
        return int(value)
    return int(observations.parse_times(pd.Series([value]))[0])


def _load(arrays: dict[str, Any], segment: Segment, columns: Iterable[str], root: Path) -> Rows:
    """Columns of a segment; raises ArchiveError if a chunk is gone."""
    span = slice(segment.start, segment.start + segment.rows)
    try:
        rows = {name: np.asarray(arrays[name][span]) for name in columns}
    except (OSError, ValueError, RuntimeError) as error:
        raise ArchiveError(f"a chunk of {root} cannot be read ({error}); append its tables again elsewhere") from error
    for name, values in rows.items():
        gone = np.isnan(values) if name in _NEVER_MISSING else values == _STORED[name][1]
        if len(values) < segment.rows or (name in ("time", *_CODED, *_NEVER_MISSING) and gone.any()):
            raise ArchiveError(
                f"rows {span.start}..{span.stop} of {root}, column {name!r}, are gone: a chunk was removed, or the "
                "span was written anew since the archive was opened; open it again"
            )
    return rows


def _canonical(parts: dict[str, list[Rows]], shelves: dict[str, _Shelf]) -> pd.DataFrame:
    """Stored columns by sensor to the canonical table, with names and order as `observations.validate` gives them."""
    present = sorted(parts)
    rows = {name: {c: np.concatenate([p[c] for p in parts[name]]) for c in _STORED} for name in present}
    out: dict[str, Any] = {}
    ranks: dict[str, list[np.ndarray]] = {}
    orders: dict[str, Callable[..., list[str]]] = {"variable": observations.variable_order, "platform": sorted}
    for column, sort in orders.items():
        used = {name: np.unique(rows[name][column]) for name in present}
        names = sort({shelves[name].names[column][code] for name in present for code in used[name]})
        place = {label: i for i, label in enumerate(names)}
        ranks[column] = []
        for name in present:
            lookup = np.zeros(len(shelves[name].names[column]), np.int64)
            lookup[used[name]] = [place[shelves[name].names[column][code]] for code in used[name]]
            ranks[column].append(lookup[rows[name][column]])
        out[column] = names
    order = [np.lexsort((rows[name]["time"], rank)) for name, rank in zip(present, ranks["platform"], strict=True)]
    frame: dict[str, Any] = {}
    for column in COLUMNS:
        if column == "sensor":
            codes = np.repeat(np.arange(len(present)), [len(o) for o in order])
            frame[column] = pd.Categorical.from_codes(codes, categories=pd.Index(present, dtype=object))
            continue
        values = ranks.get(column) or [rows[name][column] for name in present]
        flat = np.concatenate([v[o] for v, o in zip(values, order, strict=True)] or [np.empty(0, _STORED[column][0])])
        if column in _CODED:
            codes = flat.astype(np.int64)
            frame[column] = pd.Categorical.from_codes(codes, categories=pd.Index(out[column], dtype=object))
        elif column == "time":
            frame[column] = flat.view("datetime64[ns]")
        else:
            frame[column] = flat.astype(np.int64) if column == "channel" else flat
    return pd.DataFrame(frame, columns=list(COLUMNS))
