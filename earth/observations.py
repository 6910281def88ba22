"""The observation table, its checks, and `Reports`, the array form that windows, models and baselines read.

**Canonical table** (long form, one row per value; `COLUMNS`):

| column | dtype | meaning |
|---|---|---|
| time | datetime64[ns] | UTC, naive dtype |
| latitude, longitude | float64 | degrees north; degrees east in [-180, 180) |
| height | float64 | m above mean sea level, NaN unknown |
| pressure | float64 | Pa, NaN unknown; the vertical coordinate of soundings |
| variable | str | ERA5 style name, e.g. `2m_temperature` |
| value | float64 | SI |
| sensor | str | name in `earth.sensors.SENSORS` |
| channel | int | channel number, -1 none |
| platform | str | station, flight, satellite ... |
| obs_error | float64 | standard deviation of the observation error, SI, NaN unknown |
| view_angle | float64 | degrees from nadir at the instrument, NaN in situ |
| qc | int8 | 0 good; other flags are dropped by `validate` and counted |

Every problem is either a typed error (`ObservationError` and its subclasses, all `ValueError`) that names row, value
and remedy, or a counted entry of a `DropReport`. Row numbers are 0-based positions in the table as given. Where the
issue leaves a choice open the choice is ours; each is named below: nearest-neighbour snapping in `Reports.grid`, the
radians heuristic (`check_coordinates`), the `@2` split of stations that move (`split_moves`).
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import zoneinfo
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from earth import sensors
from earth.sensors import ObservationError, UnitError, UnknownSensorError, UnknownVariableError

__all__ = [
    "COLUMNS",
    "CoordinateError",
    "DropReport",
    "DuplicateError",
    "EmptyWindowError",
    "MissingVariableError",
    "ObservationError",
    "Reports",
    "SchemaError",
    "TimeError",
    "UnitError",
    "UnknownSensorError",
    "UnknownVariableError",
    "check_coordinates",
    "check_range",
    "parse_times",
    "split_moves",
    "to_reports",
    "validate",
]


class SchemaError(ObservationError):
    """A column is missing, doubled or of the wrong kind."""


class CoordinateError(ObservationError):
    """A latitude, longitude or height that cannot be where a report was made."""


class TimeError(ObservationError):
    """A time that cannot be read."""


class DuplicateError(ObservationError):
    """Two values for one observation where only one can be held."""


class EmptyWindowError(ObservationError):
    """No observation is left where at least one is needed."""


class MissingVariableError(ObservationError):
    """A variable that was asked for is absent or has no value at all."""


COLUMNS = (
    "time",
    "latitude",
    "longitude",
    "height",
    "pressure",
    "variable",
    "value",
    "sensor",
    "channel",
    "platform",
    "obs_error",
    "view_angle",
    "qc",
)

MOVE_KM = 1.0  # a fixed station further than this from where it was is another platform
MOVE_M = 50.0  # the same in the vertical
MOVE_LIMIT = 50  # a "fixed" platform with more positions than this is a vehicle
EARTH_RADIUS_KM = 6371.0
LARGEST = float(np.finfo(np.float32).max)  # Reports hold float32; anything beyond counts as infinite


@dataclasses.dataclass
class DropReport:
    """What reading and validation did, countable: rows_in == rows_kept + sum(dropped.values()).

    Attributes:
      rows_in: rows given (values for a long table, reports for a wide one).
      rows_kept: rows left.
      dropped: rows removed, by reason; each row is counted once, under the first reason that met it.
      masked: single values set to missing in rows that stay, by reason (wide tables).
      adjusted: rows that stay but were changed (wrapped longitude, sorted time, ...), by reason.
      notes: decisions taken that a person may want to overrule, one sentence each.
    """

    rows_in: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    masked: dict[str, int] = dataclasses.field(default_factory=dict)
    adjusted: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def drop(self, reason: str, count: int) -> None:
        """Counts removed rows; zero leaves no entry."""
        _count(self.dropped, reason, count)

    def mask(self, reason: str, count: int) -> None:
        """Counts single values set to missing."""
        _count(self.masked, reason, count)

    def adjust(self, reason: str, count: int) -> None:
        """Counts rows changed but kept."""
        _count(self.adjusted, reason, count)

    def note(self, sentence: str) -> None:
        """Adds a decision worth telling, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def reasons(self) -> str:
        """What was dropped, in one phrase for error messages."""
        return "dropped: " + (", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "none")

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.rows_in:,} rows read, {self.rows_kept:,} kept"]
        for title, counts in (
            ("dropped rows", self.dropped),
            ("values set missing", self.masked),
            ("adjusted rows", self.adjusted),
        ):
            lines += [f"  {title}: {reason}: {count:,}" for reason, count in counts.items()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _count(counts: dict[str, int], reason: str, count: int) -> None:
    if count:
        counts[reason] = counts.get(reason, 0) + int(count)


# ---------------------------------------------------------------------------------------------------------------- times
_FIRST_YEAR, _LAST_YEAR = 1700, 2250
_EPOCH = np.datetime64(0, "s")
_FIRST_SECOND = int((np.datetime64(f"{_FIRST_YEAR}-01-01", "s") - _EPOCH).astype(np.int64))
_LAST_SECOND = int((np.datetime64(f"{_LAST_YEAR}-01-01", "s") - _EPOCH).astype(np.int64))
_MISSING_TEXT = frozenset(("", "nan", "nat", "none", "null", "na", "n/a", "<na>", "--", "-"))
_OFFSET = re.compile(r"(?:[zZ]|\bUTC|\bGMT|[+-]\d{2}:?\d{2}|[+-]\d{2})$")
_HOUR_24 = re.compile(r"[ T]24(?::?00){0,2}$")
MISSING_TIME = np.iinfo(np.int64).min


def parse_times(values: Any, timezone: str = "UTC", report: DropReport | None = None) -> np.ndarray:
    """Times of any usual form to int64 seconds since 1970 UTC [n]; the minimum of int64 marks a missing time.

    Understood: datetime64 (naive or tz-aware), Python dates and Timestamps, ISO and other unambiguous text, "24:00"
    (the next midnight), integers yyyymmdd, yyyymmddhh, yyyymmddhhmm, yyyymmddhhmmss, and Unix seconds, milli-, micro-
    or nanoseconds (also as text). Calendar integers win over Unix ones if every value is a valid date between 1950 and
    2100 (**ours**). Fractions of a second are rounded.

    Naive times are taken in `timezone`; a clock time that the zone skips or repeats (daylight saving) becomes missing
    and is counted.

    Raises:
      TimeError: text or number that is no time, a year outside 1700..2250, or an unknown timezone.
    """
    report = DropReport() if report is None else report
    zone = time_zone(timezone)
    series = values if isinstance(values, pd.Series) else pd.Series(values)
    if isinstance(series.dtype, pd.CategoricalDtype):
        codes = np.asarray(series.cat.codes)
        seconds = np.full(len(series), MISSING_TIME)
        categories = pd.Series(series.cat.categories)
        used = np.unique(codes[codes >= 0])
        unique = np.full(len(categories), MISSING_TIME)
        unique[used] = parse_times(categories.iloc[used].reset_index(drop=True), timezone, report)
        seconds[codes >= 0] = unique[codes[codes >= 0]]
        return seconds
    if isinstance(series.dtype, pd.DatetimeTZDtype):
        seconds = _to_seconds(series.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy())
    elif series.dtype.kind == "M":
        seconds = localise(_to_seconds(series.to_numpy()), zone, timezone, report)
    elif series.dtype.kind in "iuf":
        seconds = _numbers_to_seconds(
            series.to_numpy(dtype=np.float64, na_value=np.nan), series, zone, timezone, report
        )
    elif series.dtype.kind in "mbc":
        raise TimeError(
            f"times of dtype {series.dtype} at row 0 ({series.iloc[0] if len(series) else 'empty'}) are no points in "
            "time; pass datetimes, ISO text or Unix seconds"
        )
    else:
        seconds = _text_to_seconds(series, zone, timezone, report)
    known = seconds != MISSING_TIME
    odd = np.flatnonzero(known & ((seconds < _FIRST_SECOND) | (seconds >= _LAST_SECOND)))
    if odd.size:
        raise TimeError(
            f"time {_shown(series.iloc[odd[0]])} at row {odd[0]} is outside the years {_FIRST_YEAR}..{_LAST_YEAR}; "
            "check "
            "the unit or the format of the time column"
        )
    return seconds


def time_zone(timezone: str) -> datetime.tzinfo | None:
    if timezone.upper() in ("UTC", "GMT", "Z"):
        return None
    fixed = re.fullmatch(r"(?:UTC|GMT)?([+-])(\d{1,2})(?::?(\d{2}))?", timezone)
    if fixed:
        minutes = int(fixed[2]) * 60 + int(fixed[3] or 0)
        if minutes < 24 * 60:
            return datetime.timezone(datetime.timedelta(minutes=minutes if fixed[1] == "+" else -minutes))
    try:
        return zoneinfo.ZoneInfo(timezone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise TimeError(
            f"timezone {timezone!r} is not known; pass an IANA name such as 'Asia/Taipei' or an offset such as '+08:00'"
        ) from error


def _to_seconds(stamps: np.ndarray) -> np.ndarray:
    missing = np.isnat(stamps)
    unit, step = np.datetime_data(stamps.dtype)
    counts = stamps.astype(np.int64)
    per_second = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}.get(unit)
    if per_second is None or step != 1:
        seconds = stamps.astype("datetime64[s]").astype(np.int64)
    else:
        seconds = counts if per_second == 1 else (counts // per_second) + ((counts % per_second) * 2 >= per_second)
    return np.where(missing, MISSING_TIME, seconds)


def localise(seconds: np.ndarray, zone: datetime.tzinfo | None, timezone: str, report: DropReport) -> np.ndarray:
    known = seconds != MISSING_TIME
    if not known.any():
        return seconds
    report.note(f"naive times taken as {timezone}")
    if zone is None:
        return seconds
    if ((seconds[known] < _FIRST_SECOND) | (seconds[known] >= _LAST_SECOND)).any():
        return seconds  # reported by the caller with the row
    clock, back = np.unique(seconds[known], return_inverse=True)
    index = pd.DatetimeIndex(clock.astype("datetime64[s]")).tz_localize(zone, ambiguous="NaT", nonexistent="NaT")
    unique = _to_seconds(index.tz_convert("UTC").tz_localize(None).to_numpy())
    out = seconds.copy()
    out[known] = unique[back]
    report.adjust(f"clock times skipped or repeated by {timezone} set missing", int((out[known] == MISSING_TIME).sum()))
    return out


_CALENDAR = ((8, "yyyymmdd"), (10, "yyyymmddhh"), (12, "yyyymmddhhmm"), (14, "yyyymmddhhmmss"))


def calendar_seconds(numbers: np.ndarray) -> np.ndarray | None:
    """int64 numbers such as 2024120103 as seconds, or None if they are not all valid dates of one length."""
    digits = len(str(int(numbers[0]))) if numbers[0] > 0 else 0
    if digits not in (8, 10, 12, 14):
        return None
    full = numbers * 10 ** (14 - digits)
    if (full < 19_500_000_000_000).any() or (full > 21_010_000_000_000).any():
        return None
    year, month, day = full // 10**10, full // 10**8 % 100, full // 10**6 % 100
    hour, minute, second = full // 10**4 % 100, full // 100 % 100, full % 100
    if (
        (month < 1).any()
        or (month > 12).any()
        or (day < 1).any()
        or (hour > 24).any()
        or (minute > 59).any()
        or (second > 60).any()
    ):
        return None
    months = (year - 1970) * 12 + month - 1
    start = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    if (start + day - 1 >= (months + 1).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)).any():
        return None
    return (start + day - 1) * 86_400 + hour * 3_600 + minute * 60 + second


def _numbers_to_seconds(
    numbers: np.ndarray, source: pd.Series, zone: datetime.tzinfo | None, timezone: str, report: DropReport
) -> np.ndarray:
    seconds = np.full(numbers.shape, MISSING_TIME)
    known = np.isfinite(numbers)
    infinite = np.flatnonzero(np.isinf(numbers))
    if infinite.size:
        raise TimeError(
            f"time {_shown(source.iloc[infinite[0]])} at row {infinite[0]} is infinite; leave a missing time empty"
        )
    if not known.any():
        return seconds
    some = numbers[known]
    whole = (some == np.floor(some)).all() and (np.abs(some) < 2**53).all()
    if whole:
        calendar = calendar_seconds(some.astype(np.int64))
        if calendar is not None:
            seconds[known] = calendar
            return localise(seconds, zone, timezone, report)
    size = np.abs(some).max()
    scale = next((s for limit, s in ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6), (1e20, 1e9)) if size < limit), None)
    row = int(np.flatnonzero(known)[np.argmax(np.abs(some))])
    if scale is None or size < 1e8:
        raise TimeError(
            f"time {_shown(source.iloc[row])} at row {row} is neither a date such as 2024120103 nor a Unix time; "
            "convert the column with pandas.to_datetime (hours since a date: origin=..., unit='h')"
        )
    report.note(
        {1.0: "numeric times read as Unix seconds", 1e3: "numeric times read as Unix milliseconds"}.get(
            scale, f"numeric times read as Unix seconds / {scale:.0e}"
        )
    )
    seconds[known] = np.rint(some / scale).astype(np.int64)
    return seconds


def _text_to_seconds(series: pd.Series, zone: datetime.tzinfo | None, timezone: str, report: DropReport) -> np.ndarray:
    text = series.astype(object).map(_time_text).to_numpy(dtype=object)
    codes, unique = pd.factorize(text)
    words = np.array([str(w) for w in unique], dtype=object)
    result = np.full(len(words), MISSING_TIME)
    missing = np.array([w.lower() in _MISSING_TEXT for w in words], bool)
    if len(words) and all(re.fullmatch(r"-?\d+(\.\d*)?", w) for w in words[~missing]):
        numbers = np.array([np.nan if skip else float(w) for w, skip in zip(words, missing, strict=True)])
        return _numbers_to_seconds(
            numbers[codes] if len(words) else np.full(len(series), np.nan), series, zone, timezone, report
        )
    naive = np.zeros(len(words), bool)
    shifted = np.zeros(len(words), bool)
    plain: list[str] = []
    for i, word in enumerate(words):
        naive[i] = not missing[i] and not _OFFSET.search(re.sub(r"^\d{4}-?\d{2}-?\d{2}$", "", word))
        shifted[i] = bool(_HOUR_24.search(word))
        plain.append(_HOUR_24.sub(" 00:00", word) if shifted[i] else word)
    if (~missing).any():
        parsed = pd.to_datetime(pd.Series(plain, dtype=object)[~missing], format="mixed", errors="coerce", utc=True)
        stamps = pd.DatetimeIndex(parsed).tz_localize(None).to_numpy()
        bad = np.flatnonzero(np.isnat(stamps))
        if bad.size:
            first = np.flatnonzero(~missing)[bad]
            row = int(np.flatnonzero(np.isin(codes, first))[0])
            raise TimeError(
                f"time {_shown(series.iloc[row])} at row {row} cannot be read; pass ISO 8601 such as "
                "2024-12-01T03:00Z, or "
                "leave a missing time empty"
            )
        result[~missing] = _to_seconds(stamps) + 86_400 * shifted[~missing]
    local = np.where(naive, result, MISSING_TIME)
    if naive.any():
        result = np.where(naive, localise(local, zone, timezone, report), result)
    out = np.full(len(series), MISSING_TIME)
    out[codes >= 0] = result[codes[codes >= 0]]
    return out


def _shown(value: Any) -> str:
    """A cell as a person wrote it: 13.5, not np.float64(13.5)."""
    return repr(value.item() if isinstance(value, np.generic) else value)


def _time_text(value: Any) -> str | None:
    if value is None or value is pd.NaT or (isinstance(value, float) and np.isnan(value)):
        return None
    return str(value).strip()


# ---------------------------------------------------------------------------------------------------- coordinates,
# ranges
def check_coordinates(
    latitude: np.ndarray,
    longitude: np.ndarray,
    *,
    fixed: bool,
    report: DropReport,
    rows: np.ndarray | None = None,
    trust: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the rows with usable coordinates and brings longitudes to [-180, 180).

    Args:
      latitude, longitude: float64 [n], degrees.
      fixed: fixed land stations; decides how strong the evidence for radians must be.
      report: counts NaN coordinates and wrapped longitudes.
      rows: row numbers for messages, default 0..n-1.
      trust: take the numbers as degrees even if they look like radians.

    Returns: keep mask [n], longitude [n].

    Radians (**ours**): all |latitude| <= pi/2 and all longitudes in [-pi, 2 pi]. Read as degrees that box is open sea
    in the Gulf of Guinea with one inhabited island, so two different positions of *fixed stations* inside it mean
    radians. Ships, aircraft and satellites may well be there: for them the positions must also span more than 1 in
    latitude and 3 in longitude, which a set in radians from anywhere but a small region does.

    Raises: CoordinateError for radians, |latitude| > 90 or a longitude outside [-180, 360].
    """
    rows = np.arange(latitude.size) if rows is None else rows
    keep = np.isfinite(latitude) & np.isfinite(longitude)
    report.drop("coordinate missing or not a number", int((~keep).sum()))
    for name, values, low, high, hint in (
        (
            "latitude",
            latitude,
            -90.0,
            90.0,
            "pass degrees north (is latitude swapped with longitude, or a fill value left in?)",
        ),
        ("longitude", longitude, -180.0, 360.0, "pass degrees east (is a fill value left in?)"),
    ):
        bad = np.flatnonzero(keep & ((values < low) | (values > high)))
        if bad.size:
            raise CoordinateError(
                f"{name} {values[bad[0]]:.6g} at row {rows[bad[0]]} is outside [{low:g}, {high:g}]; {hint}"
            )
    lat, lon = latitude[keep], longitude[keep]
    if (
        lat.size
        and not trust
        and np.abs(lat).max() <= np.pi / 2 + 1e-6
        and lon.min() >= -np.pi - 1e-6
        and lon.max() <= 2 * np.pi + 1e-6
    ):
        height, width = np.ptp(lat), np.ptp(lon)
        if (height > 0 or width > 0) if fixed else (height > 1.0 and width > 3.0):
            first = int(np.flatnonzero(keep)[0])
            raise CoordinateError(
                f"latitude {latitude[first]:.6g}, longitude {longitude[first]:.6g} at row {rows[first]}, like all the "
                "others, look like radians; "
                "pass degrees (numpy.rad2deg), or trust_coordinates=True if the reports are from the Gulf of Guinea"
            )
    east = np.flatnonzero(keep & (longitude >= 180.0))
    wrapped = longitude.copy()
    wrapped[east] = (longitude[east] + 180.0) % 360.0 - 180.0
    report.adjust("longitude wrapped to [-180, 180)", east.size)
    return keep, wrapped


def check_range(
    values: np.ndarray,
    name: str,
    *,
    rows: np.ndarray | None = None,
    remedy: str = "",
    what: str = "",
    given: np.ndarray | None = None,
) -> np.ndarray:
    """Mask [n] of SI values that are not finite-and-possible: infinite, or outside the variable's valid range (NaN is
    not marked).

    Raises:
      UnitError: more than half of the finite values are outside: a unit is wrong, not the weather. Names column, first
        row, value and remedy.
    """
    about = sensors.describe(name)
    low, high = about.valid_range
    finite = np.abs(values) <= LARGEST
    bad = ~np.isnan(values) & ~((values >= low) & (values <= high) & finite)
    wrong = bad & finite
    if 2 * int(wrong.sum()) > int(finite.sum()):
        first = int(np.flatnonzero(wrong)[0])
        row = first if rows is None else rows[first]
        shown = values[first] if given is None else given[first]
        raise UnitError(
            f"{what or name} {shown:.6g} at row {row} gives {name} = {values[first]:.6g} {about.units}, outside "
            f"[{low:g}, {high:g}] "
            f"like {int(wrong.sum())} of {int(finite.sum())} values; {remedy or _unit_hint(values[first], about)}"
        )
    return bad


def _unit_hint(value: float, about: sensors.Variable) -> str:
    low, high = about.valid_range
    for name in about.file_units:
        unit = sensors.unit(name)
        if name != about.units and low <= value * unit.scale + unit.offset <= high:
            return f"the value fits {name}: convert it to {about.units}" + (f" (x * {unit.scale:g} + {unit.offset:g})")
    return f"convert the values to {about.units}"


def great_circle_km(latitude: Any, longitude: Any, latitude2: Any, longitude2: Any) -> np.ndarray:
    """Great-circle distance in km on a sphere of 6371 km (haversine), broadcasting, degrees in."""
    a, b, c, d = (np.deg2rad(np.asarray(x, np.float64)) for x in (latitude, longitude, latitude2, longitude2))
    half = np.sin((c - a) / 2) ** 2 + np.cos(a) * np.cos(c) * np.sin((d - b) / 2) ** 2
    return 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.clip(half, 0, 1)))


def split_moves(
    platform: np.ndarray,
    names: Sequence[str],
    time: np.ndarray,
    latitude: np.ndarray,
    longitude: np.ndarray,
    height: np.ndarray,
    report: DropReport,
    rows: np.ndarray | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Fixed platforms that move become several: `46688`, `46688@2`, ... in order of time (**ours**).

    A position belongs to an earlier one of the same platform if it is within 1 km and 50 m of it (unknown heights
    match any), else it starts a new platform. The distance is to the position's first report, so that slow drifts of
    rounded coordinates cannot creep. A protocol that holds a station out should hold out its `@` parts too:
    `base_platform("46688@2") == "46688"`.

    Args: platform int [n] index into names; time int64 [n]; latitude, longitude, height float64 [n]; rows: numbers for
      messages, default 0..n-1.
    Returns: platform int64 [n] into the new names, names.
    Raises: CoordinateError for more than 50 positions: a vehicle, not a station.
    """
    platform = np.asarray(platform, np.int64)
    names = tuple(names)
    if not platform.size:
        return platform, names
    count = len(names)
    # Cheap test first: the bounding box of each platform.
    lows, highs = [], []
    for values in (latitude, longitude, height):
        low, high = np.full(count, np.inf), np.full(count, -np.inf)
        known = np.isfinite(values)
        np.minimum.at(low, platform[known], values[known])
        np.maximum.at(high, platform[known], values[known])
        lows.append(low)
        highs.append(high)
    present = np.isfinite(lows[0])
    spread = np.zeros(count)
    spread[present] = great_circle_km(lows[0][present], lows[1][present], highs[0][present], highs[1][present])
    # A range of longitudes beyond 180 degrees may hide a point in between its ends, which are close to each other.
    far = (spread > MOVE_KM / 2) | (highs[1] - lows[1] > 180.0)
    suspects = np.flatnonzero(far | (highs[2] - lows[2] > MOVE_M / 2))
    sequence = np.lexsort((time, platform)) if suspects.size else np.zeros(0, np.int64)
    ends = np.cumsum(np.bincount(platform, minlength=count))
    out, new_names, taken = platform.copy(), list(names), set(names)
    moved_rows, moved = 0, []
    for p in suspects:
        mine = sequence[(ends[p - 1] if p else 0) : ends[p]]
        positions = np.column_stack([latitude[mine], longitude[mine], height[mine]])
        keys = pd.MultiIndex.from_arrays(list(positions.T))
        codes, _ = pd.factorize(keys, use_na_sentinel=False)
        _, first = np.unique(codes, return_index=True)
        unique = positions[first]
        anchors = [0]
        label = np.zeros(len(unique), np.int64)
        for i in range(1, len(unique)):
            at = unique[anchors]
            near = great_circle_km(at[:, 0], at[:, 1], unique[i, 0], unique[i, 1])
            level = np.abs(at[:, 2] - unique[i, 2])
            fits = np.flatnonzero((near <= MOVE_KM) & ~(level > MOVE_M))
            if fits.size:
                label[i] = fits[np.argmin(near[fits])]
                if np.isnan(unique[anchors[label[i]], 2]):
                    unique[anchors[label[i]], 2] = unique[i, 2]
            else:
                label[i] = len(anchors)
                anchors.append(i)
                if len(anchors) > MOVE_LIMIT:
                    row = mine[first[i]] if rows is None else rows[mine[first[i]]]
                    raise CoordinateError(
                        f"platform {names[p]!r} has more than {MOVE_LIMIT} positions, row {row} is at latitude "
                        f"{unique[i, 0]:.4f}, longitude {unique[i, 1]:.4f}; give a moving platform a moving sensor "
                        "such as 'ship', or one "
                        "name per station"
                    )
        if len(anchors) == 1:
            continue
        ids = [int(p)]
        for part in range(2, len(anchors) + 1):
            name = f"{names[p]}@{part}"
            while name in taken:
                name += "'"
            taken.add(name)
            ids.append(len(new_names))
            new_names.append(name)
        out[mine] = np.array(ids)[label[codes]]
        moved_rows += int((label[codes] > 0).sum())
        moved.append(f"{names[p]} ({len(anchors)} positions)")
    report.adjust("reports of a station that moved, given a new platform", moved_rows)
    if moved:
        report.note(
            "stations that moved more than 1 km or 50 m were split: "
            + ", ".join(moved[:10])
            + (f" and {len(moved) - 10} more" if len(moved) > 10 else "")
        )
    return out, tuple(new_names)


def base_platform(name: str) -> str:
    """The platform a `split_moves` part came from: `46688@2` -> `46688`."""
    return re.sub(r"@\d+'*$", "", name)


def fill_heights(platform: np.ndarray, count: int, height: np.ndarray, report: DropReport) -> np.ndarray:
    """Missing heights of a fixed platform taken from its first report that has one."""
    missing = np.isnan(height)
    if not missing.any() or missing.all():
        return height
    known = np.full(count, np.nan)
    rows = np.flatnonzero(~missing)[::-1]
    known[platform[rows]] = height[rows]
    filled = np.where(missing, known[platform], height)
    report.adjust("height taken from the same platform's other reports", int((missing & np.isfinite(filled)).sum()))
    return filled


def count_unsorted(platform: np.ndarray, time: np.ndarray) -> int:
    """Rows earlier than the row of the same platform before them."""
    order = np.argsort(platform, kind="stable")
    p, t = platform[order], time[order]
    return int(((p[1:] == p[:-1]) & (t[1:] < t[:-1])).sum())


def platform_labels(values: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Platform column of any kind to (int64 codes [n] with -1 missing, names in order of first appearance or of the
    categories).

    Whole numbers lose a trailing `.0`, text its outer blanks; empty text, "nan" and the like are missing.
    """
    series = values if isinstance(values, pd.Series) else pd.Series(values)
    if isinstance(series.dtype, pd.CategoricalDtype):
        codes, kinds = np.asarray(series.cat.codes, np.int64), list(series.cat.categories)
    else:
        try:
            codes, kinds = pd.factorize(series)
        except TypeError:  # unhashable cells
            codes, kinds = pd.factorize(series.map(lambda v: None if v is None else str(v)))
        codes, kinds = np.asarray(codes, np.int64), list(kinds)
    texts = [_label(kind) for kind in kinds]
    codes = np.where(codes >= 0, codes, -1)
    lookup: dict[str, int] = {}
    final = np.full(len(texts) + 1, -1)
    for i, text in enumerate(texts):
        if text.lower() not in _MISSING_TEXT:
            final[i] = lookup.setdefault(text, len(lookup))
    return final[codes], tuple(lookup)


def _label(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").strip()
    if isinstance(value, (float, np.floating)) and np.isfinite(value) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


# -------------------------------------------------------------------------------------------------------------- reports
@dataclasses.dataclass(frozen=True)
class Reports:
    """One sensor's observations as wide reports sorted by (platform, time): n reports of V variables.

    Attributes:
      sensor: registry name.
      variables: V column names; a channel of a radiometer is `brightness_temperature:5`.
      platforms: names of the platforms.
      platform: int32 [n], index into `platforms`.
      time: int64 [n], seconds since 1970-01-01 UTC.
      latitude, longitude, height: float64 [n]; degrees, degrees in [-180, 180), m (NaN unknown).
      values: float32 [n, V], SI, NaN missing.
      error: float32 [n, V] standard deviation of the observation error, or None.
      view_angle: float64 [n] degrees from nadir, or None.
      pressure: float64 [n] Pa, the vertical coordinate of soundings, or None.
    """

    sensor: str
    variables: tuple[str, ...]
    platforms: tuple[str, ...]
    platform: np.ndarray
    time: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray
    height: np.ndarray
    values: np.ndarray
    error: np.ndarray | None = None
    view_angle: np.ndarray | None = None
    pressure: np.ndarray | None = None

    def __post_init__(self) -> None:
        n, v = len(self.time), len(self.variables)
        kinds = dict.fromkeys(("latitude", "longitude", "height", "view_angle", "pressure"), np.float64)
        kinds |= {"platform": np.int32, "time": np.int64, "values": np.float32, "error": np.float32}
        for name, kind in kinds.items():
            shape = (n, v) if name in ("values", "error") else (n,)
            array = getattr(self, name)
            if array is None and name in ("error", "view_angle", "pressure"):
                continue
            array = np.asarray(array, kind)
            if array.shape != shape:
                raise SchemaError(f"Reports.{name} has shape {array.shape}, not {shape} ({n} times, {v} variables)")
            object.__setattr__(self, name, array)
        for name in ("variables", "platforms"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise SchemaError(f"Reports.{name} names something twice: {getattr(self, name)}")
        if n:
            if self.platform.min() < 0 or self.platform.max() >= len(self.platforms):
                raise SchemaError(
                    f"Reports.platform holds {self.platform.min()}..{self.platform.max()}, not indices into "
                    f"{len(self.platforms)} platforms"
                )
            step = np.diff(self.platform)
            if (step < 0).any() or ((step == 0) & (np.diff(self.time) < 0)).any():
                raise SchemaError(
                    "Reports rows must be sorted by (platform, time); sort with numpy.lexsort((time, platform))"
                )

    def __len__(self) -> int:
        return len(self.time)

    @property
    def times(self) -> np.ndarray:
        """time as datetime64[s] [n]."""
        return self.time.astype("datetime64[s]")

    def index(self, variables: Sequence[str]) -> np.ndarray:
        """Column numbers of the given variables; raises `UnknownVariableError` naming the nearest."""
        place = {name: i for i, name in enumerate(self.variables)}
        for name in variables:
            if name not in place:
                raise UnknownVariableError(
                    f"variable {name!r} is not among the {self.sensor} reports; the nearest is "
                    f"{sensors.nearest(name, self.variables)!r}; they hold {', '.join(self.variables)}"
                )
        return np.array([place[name] for name in variables], np.int64)

    def take(self, rows: np.ndarray) -> Reports:
        """The reports at a mask [n] or at ascending positions [k]; platforms stay as they are."""
        return dataclasses.replace(
            self,
            **{f: getattr(self, f)[rows] for f in ("platform", "time", "latitude", "longitude", "height", "values")},
            **{
                f: None if getattr(self, f) is None else getattr(self, f)[rows]
                for f in ("error", "view_angle", "pressure")
            },
        )

    def select(
        self,
        *,
        variables: Sequence[str] | None = None,
        platforms: Iterable[str] | None = None,
        start: Any = None,
        end: Any = None,
    ) -> Reports:
        """Reports of some variables, platforms and times, start <= time < end (anything `parse_times` reads, UTC).

        Platforms that are not chosen leave `platforms`; with `platforms` given, the order stays the order of this
        object.

        Raises: UnknownVariableError, SchemaError for an unknown platform, EmptyWindowError if no report is left.
        """
        rows = np.ones(len(self), bool)
        if start is not None:
            rows &= self.time >= _instant(start)
        if end is not None:
            rows &= self.time < _instant(end)
        chosen = np.ones(len(self.platforms), bool)
        if platforms is not None:
            wanted = set(platforms)
            for name in sorted(wanted - set(self.platforms)):
                raise SchemaError(
                    f"platform {name!r} is not among the {self.sensor} reports; the nearest is "
                    f"{sensors.nearest(name, self.platforms)!r}"
                )
            chosen = np.array([name in wanted for name in self.platforms], bool)
            rows &= chosen[self.platform]
        if not rows.any():
            raise EmptyWindowError(
                f"no {self.sensor} report in [{start}, {end}) of {'the chosen' if platforms is not None else 'all'} "
                f"platforms; the reports run from {self._span()}"
            )
        out = self.take(rows)
        if platforms is not None:
            place = np.cumsum(chosen) - 1
            names = tuple(name for name, yes in zip(self.platforms, chosen, strict=True) if yes)
            out = dataclasses.replace(out, platform=place[out.platform].astype(np.int32), platforms=names)
        if variables is not None:
            at = self.index(variables)
            out = dataclasses.replace(
                out,
                variables=tuple(variables),
                values=out.values[:, at],
                error=None if out.error is None else out.error[:, at],
            )
        return out

    def _span(self) -> str:
        return f"{self.times.min()} to {self.times.max()}" if len(self) else "nothing"

    def positions(self) -> pd.DataFrame:
        """latitude, longitude, height of the first report of each platform that has one, indexed by platform name."""
        first = np.flatnonzero(np.r_[True, np.diff(self.platform) != 0]) if len(self) else np.zeros(0, np.int64)
        return pd.DataFrame(
            {"latitude": self.latitude[first], "longitude": self.longitude[first], "height": self.height[first]},
            index=pd.Index([self.platforms[p] for p in self.platform[first]], name="station"),
        )

    def to_table(self) -> pd.DataFrame:
        """The canonical long table of all finite values, reports in order, variables in order within a report.

        `variable`, `sensor` and `platform` are categoricals whose order `to_reports` takes over, so
        `to_reports(r.to_table())[r.sensor]` is `r` exactly (reports without any value and unused platforms have no row
        and vanish).
        """
        row, column = np.nonzero(~np.isnan(self.values))
        parts = [sensors.split_channel(name) for name in self.variables]
        kinds = list(dict.fromkeys(base for base, _ in parts))
        bases = np.array([kinds.index(base) for base, _ in parts], np.int64)
        channels = np.array([channel for _, channel in parts], np.int64)
        nan = np.full(row.size, np.nan)
        table = {
            "time": self.time.astype("datetime64[s]").astype("datetime64[ns]")[row],
            "latitude": self.latitude[row],
            "longitude": self.longitude[row],
            "height": self.height[row],
            "pressure": nan if self.pressure is None else self.pressure[row],
            "variable": pd.Categorical.from_codes(bases[column], categories=pd.Index(kinds, dtype=object)),
            "value": self.values[row, column].astype(np.float64),
            "sensor": pd.Categorical.from_codes(
                np.zeros(row.size, np.int8), categories=pd.Index([self.sensor], dtype=object)
            ),
            "channel": channels[column],
            "platform": pd.Categorical.from_codes(
                self.platform[row], categories=pd.Index(self.platforms, dtype=object)
            ),
            "obs_error": nan if self.error is None else self.error[row, column].astype(np.float64),
            "view_angle": nan if self.view_angle is None else self.view_angle[row],
            "qc": np.zeros(row.size, np.int8),
        }
        return pd.DataFrame(table, columns=list(COLUMNS))

    def cadence(self) -> int:
        """Seconds between reports: the most common time difference within a platform (3600 if no platform reports
        twice).
        """
        step = np.diff(self.time)[np.diff(self.platform) == 0]
        step = step[step > 0]
        if not step.size:
            return 3600
        kinds, counts = np.unique(step, return_counts=True)
        return int(kinds[np.argmax(counts)])

    def grid(self, start: Any = None, end: Any = None, cadence: int | str | None = None) -> xr.Dataset:
        """Stations x regular times as a Dataset with dims (time, station), NaN where nothing was reported.

        Args:
          start, end: times in [start, end] (default: first and last report, on the cadence).
          cadence: seconds or a pandas offset such as "3h"; default `cadence()`.

        Off-grid times go to the nearest grid time (at most half a cadence away); where two reports meet, the nearer
        one wins, variable by variable. The phase of the grid is `start`'s, or else the most common one of the reports.
        Dataset attributes count `snapped` and `collisions` (reports) and give `cadence_seconds`. Each variable has
        `units` and `standard_name`; coordinates latitude, longitude, height lie on `station`.

        Raises: SchemaError for a moving sensor, EmptyWindowError if nothing lies in the span, ObservationError for a
        grid beyond 2e9 cells.
        """
        if sensors.sensor(self.sensor).moving:
            raise SchemaError(f"grid() needs fixed platforms but {self.sensor!r} moves; use the reports themselves")
        step = self.cadence() if cadence is None else _step(cadence)
        if not len(self):
            raise EmptyWindowError("there is no report to put on a grid")
        if start is not None:
            origin = _instant(start)
        else:
            phases, counts = np.unique(self.time % step, return_counts=True)
            phase = int(phases[np.argmax(counts)])
            origin = int(np.rint((self.time.min() - phase) / step)) * step + phase
        last = _instant(end) if end is not None else int(self.time.max())
        slot = np.floor_divide(2 * (self.time - origin) + step, 2 * step)
        final = (last - origin) // step if end is not None else int(slot.max())
        inside = (slot >= 0) & (slot <= final)
        if not inside.any():
            raise EmptyWindowError(
                f"no {self.sensor} report between {start} and {end}; the reports run from {self._span()}"
            )
        steps, stations = final + 1, len(self.platforms)
        if steps * stations * len(self.variables) > 2e9:
            raise ObservationError(
                f"a grid of {steps} times x {stations} stations x {len(self.variables)} variables at {step} s is too "
                "large; pass a coarser cadence= or a shorter span"
            )
        rows = np.flatnonzero(inside)
        away = np.abs(self.time[rows] - origin - slot[rows] * step)
        cell = slot[rows] * stations + self.platform[rows]
        # Written from far to near, only where finite, so the nearest report wins; at equal distance the earlier report
        # wins.
        order = np.lexsort((-rows, -away))
        rows, cell, away = rows[order], cell[order], away[order]
        _, per_cell = np.unique(cell, return_counts=True)
        out: dict[str, Any] = {}
        for i, name in enumerate(self.variables):
            field = np.full(steps * stations, np.nan, np.float32)
            column = self.values[rows, i]
            good = ~np.isnan(column)
            field[cell[good]] = column[good]
            about = sensors.describe(name)
            attrs = {"units": about.units} | ({"standard_name": about.standard_name} if about.standard_name else {})
            out[name] = (("time", "station"), field.reshape(steps, stations), attrs)
        place = self.positions().reindex(list(self.platforms))
        return xr.Dataset(
            out,
            coords={
                "time": (origin + np.arange(steps) * step).astype("datetime64[s]").astype("datetime64[ns]"),
                "station": np.array(self.platforms, dtype=object),
                "latitude": (
                    "station",
                    place.latitude.to_numpy(),
                    {"units": "degrees_north", "standard_name": "latitude"},
                ),
                "longitude": (
                    "station",
                    place.longitude.to_numpy(),
                    {"units": "degrees_east", "standard_name": "longitude"},
                ),
                "height": ("station", place.height.to_numpy(), {"units": "m", "standard_name": "surface_altitude"}),
            },
            attrs={
                "sensor": self.sensor,
                "cadence_seconds": step,
                "snapped": int((away > 0).sum()),
                "collisions": int((per_cell - 1).sum()),
            },
        )


def _instant(value: Any) -> int:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    seconds = parse_times(pd.Series([value]))
    if seconds[0] == MISSING_TIME:
        raise TimeError(f"time {value!r} is missing; pass a datetime, ISO text or seconds since 1970")
    return int(seconds[0])


def _step(cadence: int | str) -> int:
    try:
        step = int(cadence) if isinstance(cadence, (int, np.integer)) else int(pd.Timedelta(cadence).total_seconds())
    except ValueError as error:
        raise TimeError(f"cadence {cadence!r} cannot be read; pass seconds or text such as '3h'") from error
    if step <= 0:
        raise TimeError(f"cadence {cadence!r} is not positive; pass seconds or text such as '3h'")
    return step


# ----------------------------------------------------------------------------------------------------------- validation
def to_numbers(series: Any) -> np.ndarray:
    """Any column as a new float64 array [n]: no number becomes NaN, a number beyond float32 becomes infinite."""
    if series.dtype.kind in "mMc":
        return np.full(len(series), np.nan)
    try:
        given: Any = series if series.dtype.kind in "biuf" else pd.to_numeric(series, errors="coerce")
        numbers = np.array(given.to_numpy(dtype=np.float64, na_value=np.nan))
    except (TypeError, ValueError):
        numbers = np.array(series.map(_number).to_numpy(dtype=np.float64))
    huge = np.abs(numbers) > LARGEST
    if huge.any():
        numbers[huge] = np.copysign(np.inf, numbers[huge])
    return numbers


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return np.nan


def _names(series: Any) -> tuple[np.ndarray, list[str]]:
    codes, names = platform_labels(series)
    return codes, list(names)


def validate(
    table: pd.DataFrame,
    *,
    timezone: str = "UTC",
    sensor: str | None = None,
    variables: Sequence[str] | None = None,
    trust_coordinates: bool = False,
) -> tuple[pd.DataFrame, DropReport]:
    """Checks a table in long form and returns it canonical: `COLUMNS`, sorted by (sensor, platform, time), with a
    report of what was done.

    Args:
      table: needs columns time, latitude, longitude, variable, value; the other columns of `COLUMNS` are optional,
        more are ignored.
      timezone: zone of naive times.
      sensor: sensor of rows that name none (default `station`).
      variables: names that must be there with at least one value; others are dropped and counted.
      trust_coordinates: see `check_coordinates`.

    Dropped and counted: missing time, NaN coordinates, missing values or platforms, qc flags other than 0, values
    outside the variable's range, duplicates (equal value or not, counted apart; the first one stays). A duplicate has
    the same sensor, platform, time, variable, channel, height and pressure, and for moving sensors the same latitude
    and longitude. Adjusted and counted: wrapped longitudes, order of time, filled heights, stations that moved.

    Raises:
      SchemaError, TimeError, CoordinateError, UnknownSensorError, UnitError (more than half of a variable outside its
      range), MissingVariableError, EmptyWindowError: as their names say; each names row, value and remedy.
    """
    if not isinstance(table, pd.DataFrame):
        raise SchemaError(
            f"a table must be a pandas DataFrame, not {type(table).__name__}; read files with earth.readers"
        )
    frame = table.copy(deep=False)
    frame.columns = check_columns(table.columns)
    for name in ("time", "latitude", "longitude", "variable", "value"):
        if name not in frame:
            raise SchemaError(
                f"column {name!r} is missing; a table needs time, latitude, longitude, variable and value, and has "
                f"{', '.join(map(str, table.columns))}"
            )
    n = len(frame)
    report = DropReport(rows_in=n)
    if not n:
        raise EmptyWindowError("the table has no rows; pass at least one observation")
    frame = frame.reset_index(drop=True)

    time = parse_times(frame["time"], timezone, report)
    latitude, longitude = to_numbers(frame["latitude"]), to_numbers(frame["longitude"])
    height, pressure, error, angle = (
        to_numbers(frame[c]) if c in frame else np.full(n, np.nan)
        for c in ("height", "pressure", "obs_error", "view_angle")
    )
    value = to_numbers(frame["value"])
    channel_number = to_numbers(frame["channel"]) if "channel" in frame else np.full(n, -1.0)
    qc = to_numbers(frame["qc"]) if "qc" in frame else np.zeros(n)
    variable, variable_names = _names(frame["variable"])
    variable, channel_number, variable_names = _split_channels(variable, channel_number, variable_names)
    default = sensor if sensor is not None else "station"
    sensors.sensor(default)
    if "sensor" in frame:
        sensor_code, sensor_names = _names(frame["sensor"])
        if (sensor_code < 0).any():
            if default not in sensor_names:
                sensor_names.append(default)
            report.adjust(f"sensor not named, taken as {default}", int((sensor_code < 0).sum()))
            sensor_code = np.where(sensor_code < 0, sensor_names.index(default), sensor_code)
    else:
        sensor_code, sensor_names = np.zeros(n, np.int64), [default]
        report.note(f"no sensor column: all rows taken as {default}")
    for code, name in enumerate(sensor_names):
        rows = np.flatnonzero(sensor_code == code)
        if rows.size and name not in sensors.SENSORS:
            try:
                sensors.sensor(name)
            except UnknownSensorError as problem:
                raise UnknownSensorError(f"row {rows[0]}: {problem}") from None
    moving = np.array([name in sensors.SENSORS and sensors.SENSORS[name].moving for name in sensor_names])

    keep = np.ones(n, bool)

    def drop(reason: str, bad: np.ndarray) -> None:
        nonlocal keep
        report.drop(reason, int((keep & bad).sum()))
        keep = keep & ~bad

    drop("time missing", time == MISSING_TIME)
    drop("variable not named", variable < 0)
    drop("value missing or not a number", np.isnan(value))
    drop("channel not a number", ~(np.isfinite(channel_number) & (np.abs(channel_number) < 1e6)))
    drop("quality flag not 0", ~(qc == 0))
    if not keep.any():
        raise EmptyWindowError(f"no observation is left of {n} rows; {report.reasons()}")
    for is_moving in (False, True):
        rows = np.flatnonzero(keep & (moving[sensor_code] == is_moving))
        if rows.size:
            good, wrapped = check_coordinates(
                latitude[rows], longitude[rows], fixed=not is_moving, report=report, rows=rows, trust=trust_coordinates
            )
            longitude[rows] = wrapped
            keep[rows[~good]] = False
    bad_height = np.isfinite(height) & ((height < -12_000) | (height > 120_000)) | np.isinf(height)
    report.adjust("height outside [-12000, 120000] m set missing", int((keep & bad_height).sum()))
    height = np.where(bad_height, np.nan, height)
    bad_pressure = np.isfinite(pressure) & ((pressure <= 0) | (pressure > 120_000)) | np.isinf(pressure)
    report.adjust("pressure outside (0, 120000] Pa set missing", int((keep & bad_pressure).sum()))
    pressure = np.where(bad_pressure, np.nan, pressure)
    for code, name in enumerate(variable_names):
        rows = np.flatnonzero(keep & (variable == code))
        if rows.size:
            bad = rows[check_range(value[rows], name, rows=rows)]
            report.drop(f"{name} outside its valid range", bad.size)
            keep[bad] = False

    platform, platform_names = (
        platform_labels(frame["platform"]) if "platform" in frame else (np.full(n, -1, np.int64), ())
    )
    platform, platform_names, keep = name_platforms(
        platform, platform_names, latitude, longitude, keep, sensor_code, sensor_names, report
    )
    if not keep.any():
        raise EmptyWindowError(f"no observation is left of {n} rows; {report.reasons()}")

    kept = np.flatnonzero(keep)
    platform, time, latitude, longitude, height, pressure = (
        x[kept] for x in (platform, time, latitude, longitude, height, pressure)
    )
    variable, value, sensor_code, error, angle = (x[kept] for x in (variable, value, sensor_code, error, angle))
    channel = channel_number[kept].astype(np.int64)
    channel = np.where(channel < 0, -1, channel)
    report.adjust(
        "rows out of order of time, sorted", count_unsorted(platform + len(platform_names) * sensor_code, time)
    )
    fixed = ~moving[sensor_code]
    if fixed.any():
        part = np.flatnonzero(fixed)
        height[part] = fill_heights(platform[part], len(platform_names), height[part], report)
        platform[part], platform_names = split_moves(
            platform[part],
            platform_names,
            time[part],
            latitude[part],
            longitude[part],
            height[part],
            report,
            kept[part],
        )

    where = np.where(fixed, 0.0, latitude), np.where(fixed, 0.0, longitude)
    group, first = group_rows(
        sensor_code, platform, time, variable, channel, *(float_bits(k) for k in (*where, height, pressure))
    )
    stay = np.zeros(group.size, bool)
    stay[first] = True
    equal = value == value[first[group]]
    report.drop("duplicate of an earlier report", int((~stay & equal).sum()))
    report.drop("duplicate with another value", int((~stay & ~equal).sum()))
    rank_sensor, rank_platform = (
        np.argsort(np.argsort(np.array(names, dtype=object))) for names in (sensor_names, platform_names)
    )
    rows = np.flatnonzero(stay)
    rows = rows[np.lexsort((time[rows], rank_platform[platform[rows]], rank_sensor[sensor_code[rows]]))]

    if variables is not None:
        present = {variable_names[c] for c in np.unique(variable[rows])}
        for name in variables:
            if name not in present:
                state = (
                    "has no usable value"
                    if name in variable_names
                    else f"is not in the table; the nearest is {sensors.nearest(name, variable_names)!r}"
                )
                raise MissingVariableError(
                    f"variable {name!r} {state}; drop it from variables= or mend the data ({report.reasons()})"
                )
        wanted = np.array([name in set(variables) for name in variable_names])
        chosen = wanted[variable[rows]]
        report.drop("variable not asked for", int((~chosen).sum()))
        rows = rows[chosen]
    for code, name in enumerate(variable_names):
        if not (variable[rows] == code).any() and variables is None:
            report.note(f"variable {name} has no usable value and was dropped")
    report.rows_kept = int(rows.size)
    if not rows.size:
        raise EmptyWindowError(f"no observation is left of {n} rows; {report.reasons()}")
    out = {
        "time": time[rows].astype("datetime64[s]").astype("datetime64[ns]"),
        "latitude": latitude[rows],
        "longitude": longitude[rows],
        "height": height[rows],
        "pressure": pressure[rows],
        "variable": _categorical(variable[rows], variable_names, variable_order),
        "value": value[rows],
        "sensor": _categorical(sensor_code[rows], sensor_names),
        "channel": channel[rows],
        "platform": _categorical(platform[rows], platform_names),
        "obs_error": np.where((error[rows] >= 0) & (error[rows] <= LARGEST), error[rows], np.nan),
        "view_angle": angle[rows],
        "qc": np.zeros(rows.size, np.int8),
    }
    return pd.DataFrame(out, columns=list(COLUMNS)), report


def _split_channels(
    variable: np.ndarray, channel: np.ndarray, names: list[str]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """`brightness_temperature:5` in the variable column of rows without a channel is channel 5."""
    parts = [sensors.split_channel(name) for name in names]
    if all(number < 0 for _, number in parts):
        return variable, channel, names
    bases = list(dict.fromkeys([*names, *(base for base, _ in parts)]))
    place = {name: i for i, name in enumerate(bases)}
    plain = np.array([place[name] for name in names], np.int64)
    split = np.array([place[base] for base, _ in parts], np.int64)
    number = np.array([number for _, number in parts], np.float64)
    use = (variable >= 0) & ~(channel >= 0)
    use &= number[variable] >= 0
    out = np.where(variable >= 0, np.where(use, split[variable], plain[variable]), -1)
    return out, np.where(use, number[variable], channel), bases


def check_columns(columns: Iterable[Hashable]) -> list[str]:
    """Column names as text; raises `SchemaError` for a doubled name or a MultiIndex."""
    names = list(columns)
    if any(isinstance(name, tuple) for name in names):
        raise SchemaError(
            f"columns such as {next(n for n in names if isinstance(n, tuple))!r} have several levels; flatten them to "
            "one name each"
        )
    texts = [str(name) for name in names]
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            raise SchemaError(f"column {text!r} occurs twice; rename or drop one")
        seen.add(text)
    return texts


def float_bits(values: np.ndarray) -> np.ndarray:
    """float64 as int64 that compares equal for equal numbers and for any two NaN."""
    clean = np.where(np.isnan(values), np.nan, values + 0.0)  # + 0.0 turns -0.0 into 0.0
    return clean.view(np.int64)


def group_rows(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that agree in all int64 keys: group of each row [n], numbered by first appearance, and the first row of
    each group.

    Hashing one combined number is ten times faster than a lexsort of 7 million rows by nine keys.
    """
    combined = np.zeros(len(keys[0]), np.int64)
    span = 1
    for key in keys:
        low, high = int(key.min()), int(key.max())
        if low == high:
            continue
        width = high - low + 1
        if width > 2**31:
            codes, kinds = pd.factorize(key)
            key, low, width = np.asarray(codes, np.int64), 0, len(kinds)
        if span * width >= 2**62:
            codes, kinds = pd.factorize(combined)
            combined, span = np.asarray(codes, np.int64), len(kinds)
        combined = combined * width + (key - low)
        span *= width
    codes, kinds = pd.factorize(combined)
    first = np.full(len(kinds), len(codes), np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    return np.asarray(codes, np.int64), first


def _categorical(codes: np.ndarray, names: Sequence[str], sort: Any = None) -> pd.Categorical:
    """Codes into names as a categorical of the names in use, by name or in the order `sort` gives."""
    present = np.zeros(len(names), bool)
    present[codes] = True
    ranked = (sort or sorted)([name for name, yes in zip(names, present, strict=True) if yes])
    place = {name: i for i, name in enumerate(ranked)}
    recode = np.array([place.get(name, -1) for name in names], np.int64)
    return pd.Categorical.from_codes(recode[codes], categories=pd.Index(ranked, dtype=object))


def name_platforms(
    platform: np.ndarray,
    names: Sequence[str],
    latitude: np.ndarray,
    longitude: np.ndarray,
    keep: np.ndarray,
    sensor_code: np.ndarray,
    sensor_names: Sequence[str],
    report: DropReport,
) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """Gives reports without a platform one, or drops them (**ours**).

    Moving sensors: the sensor's name. Fixed ones: `24.9976_121.4420` (4 decimals, 11 m) if no fixed report has a name,
    else they are dropped, since they may repeat a named one.

    Args: platform int [n], -1 for none, index into names; latitude, longitude [n]; keep bool [n]; sensor_code int [n],
    index into sensor_names.
    Returns: platform [n], names, keep.
    """
    platform, names = platform.copy(), list(names)
    moving = np.array([sensors.sensor(name).moving if name in sensors.SENSORS else True for name in sensor_names])
    nameless = keep & (platform < 0)
    vehicles = nameless & moving[sensor_code]
    for code, name in enumerate(sensor_names):
        mine = vehicles & (sensor_code == code)
        if mine.any():
            names += [] if name in names else [name]
            platform[mine] = names.index(name)
    report.adjust("platform not named, taken as one platform of the sensor's name", int(vehicles.sum()))
    stations = nameless & ~vehicles
    if (keep & ~moving[sensor_code] & (platform >= 0)).any():
        report.drop("platform not named", int(stations.sum()))
        keep = keep & ~stations
    elif stations.any():
        rows = np.flatnonzero(stations)
        place = np.rint(np.column_stack([latitude[rows], longitude[rows]]) * 1e4).astype(np.int64)
        codes, kinds = pd.factorize(pd.MultiIndex.from_arrays([place[:, 0], place[:, 1]]))
        platform[rows] = len(names) + codes
        names += [f"{a / 1e4:.4f}_{b / 1e4:.4f}" for a, b in kinds]
        report.note("stations have no name: named by their position")
    return platform, tuple(names), keep


def to_reports(table: pd.DataFrame) -> dict[str, Reports]:
    """A validated table (from `validate` or `Reports.to_table`) to one `Reports` per sensor, without loss in float32.

    Values of one sensor, platform, time, position, pressure and view angle form one report. The order of platforms and
    variables is that of the categories where the columns are categorical, else by name (platforms) and by registry,
    then name (variables).

    Raises: SchemaError for a column missing, EmptyWindowError for no rows, UnknownSensorError, DuplicateError for two
    values of one observation.
    """
    for name in COLUMNS:
        if name not in table:
            raise SchemaError(f"column {name!r} is missing; pass the table through validate() first")
    if not len(table):
        raise EmptyWindowError("the table has no rows; pass at least one observation")
    sensor_code, sensor_names = _ordered(table["sensor"], sorted)
    out: dict[str, Reports] = {}
    for code, name in enumerate(sensor_names):
        rows = np.flatnonzero(sensor_code == code)
        if rows.size:
            sensors.sensor(name)
            out[name] = _one_sensor(table.iloc[rows], name, rows)
    return out


def _ordered(series: Any, sort: Any) -> tuple[np.ndarray, list[str]]:
    """Codes and names of a text column, in the order of its categories or as `sort` puts them."""
    codes, names = platform_labels(series)
    if (codes < 0).any():
        raise SchemaError(
            f"column {series.name!r} is empty at row {int(np.flatnonzero(codes < 0)[0])}; pass the table through "
            "validate() first"
        )
    if not isinstance(series.dtype, pd.CategoricalDtype):
        ranked = list(sort(names))
        place = {name: i for i, name in enumerate(ranked)}
        return np.array([place[name] for name in names], np.int64)[codes], ranked
    used, back = np.unique(codes, return_inverse=True)
    return back, [names[u] for u in used]


def variable_order(names: Iterable[str]) -> list[str]:
    """Registered variables in the registry's order, then the others by name; channels ascending."""
    rank = {name: i for i, name in enumerate(sensors.VARIABLES)}
    return sorted(names, key=lambda n: (rank.get(sensors.split_channel(n)[0], len(rank)), *sensors.split_channel(n)))


def _one_sensor(table: pd.DataFrame, sensor_name: str, rows: np.ndarray) -> Reports:
    platform, platforms = _ordered(table["platform"], sorted)
    base, bases = _ordered(table["variable"], variable_order)
    channel = table["channel"].to_numpy(np.int64)
    time = parse_times(table["time"])
    if (time == MISSING_TIME).any():
        raise TimeError(
            f"time is missing at row {rows[np.flatnonzero(time == MISSING_TIME)[0]]}; pass the table through "
            "validate() first"
        )
    floats = {
        name: table[name].to_numpy(np.float64) for name in ("latitude", "longitude", "height", "pressure", "view_angle")
    }
    value, error = table["value"].to_numpy(np.float64), table["obs_error"].to_numpy(np.float64)
    group, first = group_rows(platform, time, *(float_bits(v) for v in floats.values()))
    sequence = np.lexsort((first, time[first], platform[first]))
    place = np.empty(len(first), np.int64)
    place[sequence] = np.arange(len(first))
    report_row, head = place[group], first[sequence]

    pair = base * (int(channel.max(initial=-1)) + 2) + channel + 1
    kinds, column = np.unique(pair, return_inverse=True)
    width = int(channel.max(initial=-1)) + 2
    variables = tuple(sensors.join_channel(bases[int(k) // width], int(k) % width - 1) for k in kinds)
    cell = report_row * len(kinds) + column
    filled = np.zeros(len(head) * len(kinds), bool)
    filled[cell] = True
    if int(filled.sum()) != len(cell):
        row = int(np.flatnonzero(pd.Series(cell).duplicated().to_numpy())[0])
        raise DuplicateError(
            f"row {rows[row]} repeats {variables[column[row]]} of platform {platforms[platform[row]]!r} at "
            f"{np.datetime64(int(time[row]), 's')}; pass the table through validate() first"
        )
    values = np.full((len(head), len(kinds)), np.nan, np.float32)
    values[report_row, column] = value
    errors = None
    if np.isfinite(error).any():
        errors = np.full(values.shape, np.nan, np.float32)
        errors[report_row, column] = error
    optional: Mapping[str, np.ndarray | None] = {
        k: floats[k][head] if np.isfinite(floats[k]).any() else None for k in ("view_angle", "pressure")
    }
    return Reports(
        sensor=sensor_name,
        variables=variables,
        platforms=tuple(platforms),
        platform=platform[head].astype(np.int32),
        time=time[head],
        latitude=floats["latitude"][head],
        longitude=floats["longitude"][head],
        height=floats["height"][head],
        values=values,
        error=errors,
        view_angle=optional["view_angle"],
        pressure=optional["pressure"],
    )
