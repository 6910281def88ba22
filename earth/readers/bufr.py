"""BUFR files (radiosondes, aircraft, SYNOP, HIRS radiances) to the observation table, through pdbufr and ecCodes.

pdbufr decodes in Python: 15-60 s for a file of some thousand messages. `stream_bufr` therefore hands out a table per
batch of messages, for `earth.archive.append`; `read_bufr` returns one table. Both need the extra `readers`.

Values come out of BUFR in SI, except for percentages and kg m-2. What is **ours**: the choice of keys (`KINDS`), names
of platforms (the WMO number without leading zeros, as tables of others write it; the satellite's number), and that
values with a stated confidence below 50 % (table B 33007), on scan lines marked "do not use" (33030, bit 1) or on
channels with any quality flag (33032) are dropped and counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from earth import observations, sensors
from earth.observations import DropReport, EmptyWindowError, SchemaError
from earth.readers.stations import wind_components
from earth.readers.tables import drop_impossible, view_angle


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message gives the pip command."""


@dataclasses.dataclass(frozen=True)
class BufrKind:
    """How one kind of report is coded.

    Attributes:
      sensor: name in the registry.
      categories: data categories (BUFR table A) of its messages.
      platform: keys that name the platform; the first with a value counts.
      height: keys of the height above sea level in m, in the same way.
      values: BUFR key -> (variable, factor to SI); of several keys for a variable the first with a value counts.
      pressure, zenith_angle, channel: keys of the pressure of a level, the satellite's zenith angle, the channel.
      flags: (key, bits of it that condemn a row).
      sequence: table D sequence a message must hold; 0 for any.
      batch: messages decoded at once.
    """

    sensor: str
    categories: tuple[int, ...]
    platform: tuple[str, ...]
    values: Mapping[str, tuple[str, float]]
    height: tuple[str, ...] = ()
    pressure: str = ""
    zenith_angle: str = ""
    channel: str = ""
    flags: tuple[tuple[str, int], ...] = ()
    sequence: int = 0
    batch: int = 500

    def takes(self, message: Any) -> bool:
        """Whether a message, not yet unpacked, is of this kind."""
        descriptors = np.atleast_1d(message["unexpandedDescriptors"])
        return int(message["dataCategory"]) in self.categories and self.sequence in (0, *descriptors)

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys to ask pdbufr for."""
        single = (self.pressure, self.zenith_angle, self.channel)
        plain = (*_PLACE, *self.platform, *self.height, *(k for k in single if k), *(k for k, _ in self.flags))
        return (*plain, *self.values, *(f"{key}->percentConfidence" for key in self.values))


# The displacements are those of a drifting balloon (309052 and later); files without them lack the columns.
_DRIFT = ("latitudeDisplacement", "longitudeDisplacement", "timePeriod")
_PLACE = ("latitude", "longitude", "data_datetime", *_DRIFT)
_AIR = {
    "airTemperature": ("temperature", 1.0),
    "dewpointTemperature": ("dewpoint_temperature", 1.0),
    "windSpeed": ("wind_speed", 1.0),
    "windDirection": ("wind_direction", 1.0),
}
_GROUND = {
    "airTemperatureAt2M": ("2m_temperature", 1.0),
    "airTemperature": ("2m_temperature", 1.0),
    "dewpointTemperatureAt2M": ("2m_dewpoint_temperature", 1.0),
    "dewpointTemperature": ("2m_dewpoint_temperature", 1.0),
    "relativeHumidity": ("2m_relative_humidity", 0.01),
    "nonCoordinatePressure": ("surface_pressure", 1.0),
    "pressureReducedToMeanSeaLevel": ("mean_sea_level_pressure", 1.0),
    "3HourPressureChange": ("surface_pressure_tendency_3h", 1.0),
    "windSpeedAt10M": ("10m_wind_speed", 1.0),
    "windSpeed": ("10m_wind_speed", 1.0),
    "windDirectionAt10M": ("10m_wind_direction", 1.0),
    "windDirection": ("10m_wind_direction", 1.0),
    "maximumWindGustSpeed": ("10m_wind_gust", 1.0),
    "horizontalVisibility": ("visibility", 1.0),
    "cloudCoverTotal": ("total_cloud_cover", 0.01),
    "totalSnowDepth": ("snow_depth", 1.0),
    "totalPrecipitationPast1Hour": ("total_precipitation_1hr", 1e-3),
    "totalPrecipitationPast3Hours": ("total_precipitation_3hr", 1e-3),
    "totalPrecipitationPast6Hours": ("total_precipitation_6hr", 1e-3),
    "totalPrecipitationPast12Hours": ("total_precipitation_12hr", 1e-3),
    "totalPrecipitationPast24Hours": ("total_precipitation_24hr", 1e-3),
}
_NUMBERED = ("WMO_station_id", "shipOrMobileLandStationIdentifier")
KINDS: Mapping[str, BufrKind] = MappingProxyType(
    {
        "radiosonde": BufrKind(
            "radiosonde",
            (2,),
            _NUMBERED,
            _AIR
            | {
                "nonCoordinateGeopotential": ("geopotential", 1.0),
                "nonCoordinateGeopotentialHeight": ("geopotential_height", 1.0),
            },
            pressure="pressure",
        ),
        "aircraft": BufrKind(
            "aircraft",
            (4,),
            ("aircraftRegistrationNumberOrOtherIdentification", "aircraftFlightNumber", "aircraftTailNumber"),
            _AIR | {"relativeHumidity": ("relative_humidity", 0.01)},
            height=("height", "flightLevel"),
        ),
        "synop": BufrKind(
            "station",
            (0,),
            _NUMBERED,
            _GROUND,
            height=("heightOfStationGroundAboveMeanSeaLevel", "heightOfStation"),
        ),
        "hirs": BufrKind(
            "hirs4",
            (3, 21),
            ("satelliteIdentifier",),
            {"brightnessTemperature": ("brightness_temperature", 1.0)},
            zenith_angle="satelliteZenithAngle",
            channel="tovsOrAtovsOrAvhrrInstrumentationChannelNumber",
            # 24-bit flag tables count bits from the left: bit 1 of 33030 is "do not use scan line for products".
            flags=(("scanLineStatusFlagsForAtovs", 1 << 23), ("channelQualityFlagsForAtovs", (1 << 24) - 1)),
            sequence=310008,
            batch=4,  # of 20,000 values each
        ),
    }
)
_MISSING_LONG, _MISSING_DOUBLE = 2**31 - 1, -1e100


def stream_bufr(
    path: str | os.PathLike[str],
    kind: str | None = None,
    *,
    messages: int | None = None,
    min_confidence: float | int = 50,
    variables: Sequence[str] | None = None,
    derive_wind: bool = True,
) -> Iterator[tuple[pd.DataFrame, DropReport]]:
    """Canonical tables of a BUFR file, one per batch of messages that holds any usable value, each with its report.

    Duplicates within a batch are dropped; those of different batches `earth.archive.append` drops.

    Args:
      path: the file.
      kind: a name in `KINDS`; None takes that of the first message. Messages of other kinds are skipped and noted.
      messages: messages per batch; None takes 500, or 4 of HIRS.
      min_confidence: per cent; values whose message states less are dropped. 0 keeps all.
      variables: names to keep; None keeps all.
      derive_wind: add u and v from speed and direction (calm is 0; without a direction there is none).

    Raises: MissingExtraError, FileNotFoundError; SchemaError for a file that is no BUFR, a kind that is not known or
      not in the file, and a message that cannot be decoded.
    """
    kept = False
    for table, first in _long_tables(Path(path), kind, messages, min_confidence, variables, derive_wind):
        try:
            valid, report = observations.validate(table, sensor=str(table["sensor"].iloc[0]))
        except EmptyWindowError:
            continue
        kept = True
        yield valid, _joined(first, report)
    if not kept:
        raise EmptyWindowError(f"no usable value is left of {path}; lower min_confidence= or choose other variables=")


def read_bufr(
    path: str | os.PathLike[str],
    kind: str | None = None,
    *,
    min_confidence: float | int = 50,
    variables: Sequence[str] | None = None,
    derive_wind: bool = True,
) -> tuple[pd.DataFrame, DropReport]:
    """A BUFR file as one canonical table, with a report whose rows are values.

    Args, errors: see `stream_bufr`; EmptyWindowError if no value is left.
    """
    parts, first = [], DropReport()
    for table, report in _long_tables(Path(path), kind, None, min_confidence, variables, derive_wind):
        parts.append(table)
        first = _joined(report, first)
    if not parts:
        raise EmptyWindowError(f"no usable value is left of {path}; {first.reasons()}")
    table, report = observations.validate(pd.concat(parts, ignore_index=True))
    return table, _joined(first, report)


def _joined(first: DropReport, then: DropReport) -> DropReport:
    """The report of two steps: rows that the first dropped never reached the second."""
    out = DropReport(first.rows_in - first.rows_kept + then.rows_in, then.rows_kept)
    for report in (first, then):
        for reason, count in report.dropped.items():
            out.drop(reason, count)
        for reason, count in report.adjusted.items():
            out.adjust(reason, count)
        for sentence in report.notes:
            out.note(sentence)
    return out


# ------------------------------------------------------------------------------------------------------------ decoding
def _libraries() -> tuple[Any, Any, Any]:
    """pdbufr, its file class and ecCodes."""
    try:
        import eccodes  # pyright: ignore[reportMissingImports]
        import pdbufr  # pyright: ignore[reportMissingImports]
        from pdbufr.high_level_bufr.bufr import BufrFile  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # ecCodes without its library raises RuntimeError
        raise MissingExtraError(
            f"BUFR files need pdbufr and eccodes: pip install 'earthmoe[readers]' ({error})"
        ) from error
    return pdbufr, BufrFile, eccodes


class _Messages:
    """The messages of an open file that are of the kind, one by one, and what was met on the way."""

    def __init__(self, file: Any, path: Path, kind: str | None):
        self.file, self.path, self.name = file, path, kind
        self.number = -1  # of the message handed out last
        self.skipped: set[int] = set()  # data categories of messages of other kinds
        self.taken = 0

    def __iter__(self) -> Iterator[Any]:
        for message in self.file:
            self.number += 1
            self.file.open_messages.clear()  # pdbufr closes each message; the list of them would only grow
            if self.name is None:
                self.name = _kind_of(message, self.path)
            if KINDS[self.name].takes(message):
                self.taken += 1
                yield message
            else:
                self.skipped.add(int(message["dataCategory"]))
                message.close()


def _kind_of(message: Any, path: Path) -> str:
    for name, kind in KINDS.items():
        if kind.takes(message):
            return name
    category, sequence = int(message["dataCategory"]), int(np.atleast_1d(message["unexpandedDescriptors"])[0])
    raise SchemaError(
        f"{path} starts with a message of data category {category}, sequence {sequence:06d}, which is none of "
        f"{', '.join(KINDS)}; NCEP prepbufr carries tables of its own: convert it to IODA first"
    )


def _long_tables(
    path: Path,
    kind: str | None,
    size: int | None,
    min_confidence: float | int,
    variables: Sequence[str] | None,
    derive_wind: bool,
) -> Iterator[tuple[pd.DataFrame, DropReport]]:
    """Tables for `validate` with a row per value, and what was dropped before."""
    if kind is not None and kind not in KINDS:
        raise SchemaError(
            f"kind {kind!r} is not known; the nearest is {sensors.nearest(kind, KINDS)!r} of {list(KINDS)}"
        )
    if not path.exists():
        raise FileNotFoundError(f"observation file {path} does not exist")
    pdbufr, file_class, eccodes = _libraries()
    with file_class(os.fspath(path)) as file:
        messages = _Messages(file, path, kind)
        source = iter(messages)
        while True:
            try:
                head = next(source, None)  # its kind is known from here on
                if head is None:
                    break
                wanted = KINDS[str(messages.name)]
                batch = itertools.chain([head], itertools.islice(source, (size or wanted.batch) - 1))
                frame = pdbufr.read_bufr(batch, columns=list(wanted.keys), required_columns=False)
            except (eccodes.CodesInternalError, KeyError) as error:
                raise SchemaError(
                    f"message {max(messages.number, 0)} of {path} cannot be decoded ({error}); is the file cut off, or "
                    "in tables that ecCodes lacks?"
                ) from error
            report = DropReport()
            for category in messages.skipped:
                report.note(f"messages of data category {category} skipped")
            table = _to_long(frame, wanted, report, min_confidence, variables, derive_wind)
            if len(table):
                yield table, report
        if messages.number < 0:
            raise SchemaError(f"{path} holds no BUFR message; is it of another format?")
        if not messages.taken:
            raise SchemaError(
                f"{path} holds no {messages.name} message, only data categories {sorted(messages.skipped)}; choose "
                "another kind="
            )


# --------------------------------------------------------------------------------------------------------------- tables
def _to_long(
    frame: pd.DataFrame,
    kind: BufrKind,
    report: DropReport,
    min_confidence: float | int,
    variables: Sequence[str] | None,
    derive_wind: bool,
) -> pd.DataFrame:
    """pdbufr's frame (a row per level or channel) to a row per value."""
    n = len(frame)

    def number(key: str) -> np.ndarray:
        if key not in frame or not key:
            return np.full(n, np.nan)
        values = observations.to_numbers(frame[key])
        return np.where((values == _MISSING_LONG) | (values <= _MISSING_DOUBLE), np.nan, values)

    def either(keys: Sequence[str]) -> np.ndarray:
        out = np.full(n, np.nan)
        for key in keys:
            out = np.where(np.isnan(out), number(key), out)
        return out

    channel = number(kind.channel)
    flagged = np.zeros(n, bool)
    for key, bits in kind.flags:
        flagged |= (np.nan_to_num(number(key)).astype(np.int64) & bits) != 0
    values: dict[str, np.ndarray] = {}
    for key, (variable, factor) in kind.values.items():
        value, confidence = number(key) * factor, number(f"{key}->percentConfidence")
        if kind.channel:  # statistics at the end of a message carry the same key, but no channel
            value = np.where(np.isnan(channel), np.nan, value)
        unsure = ~np.isnan(value) & (confidence < min_confidence)
        report.rows_in += int(unsure.sum())
        report.drop(f"confidence below {min_confidence:g} %", int(unsure.sum()))
        value = np.where(unsure, np.nan, value)
        values[variable] = (
            np.where(np.isnan(values[variable]), value, values[variable]) if variable in values else value
        )
    if derive_wind:
        for prefix in ("", "10m_"):
            if (speed := f"{prefix}wind_speed") in values:
                parts = wind_components(values[speed], values[f"{prefix}wind_direction"])
                values |= {f"{prefix}{c}_component_of_wind": part for c, part in zip("uv", parts, strict=True)}
    if variables is not None:
        values = {name: value for name, value in values.items() if name in variables}

    platform = _platforms(frame, kind)
    # BUFR holds 1e-5 degrees; its decimals in binary may reach beyond the pole.
    latitude, longitude = np.round(number("latitude"), 6), np.round(number("longitude"), 6)
    time = pd.to_datetime(frame["data_datetime"]) if "data_datetime" in frame else pd.Series(pd.NaT, index=range(n))
    if kind.pressure:
        latitude = latitude + np.nan_to_num(number("latitudeDisplacement"))
        longitude = longitude + np.nan_to_num(number("longitudeDisplacement"))
        time = time + pd.to_timedelta(np.nan_to_num(number("timePeriod")), unit="s")
    base = {
        "time": time.to_numpy(),
        "latitude": latitude,
        "longitude": longitude,
        "height": either(kind.height),
        "pressure": number(kind.pressure),
        "view_angle": view_angle(number(kind.zenith_angle), sensors.sensor(kind.sensor)),
        "channel": np.nan_to_num(channel, nan=-1.0),
        "platform": platform,
        "qc": flagged.astype(np.int8),
    }
    tables = []
    for variable, value in values.items():
        if variable.startswith("total_precipitation"):
            value = np.where(np.isclose(value, -1e-4), 0.0, value)  # -0.1 mm is the code of a trace
        rows = np.flatnonzero(~np.isnan(value))
        part = pd.DataFrame({name: column[rows] for name, column in base.items()})
        tables.append(part.assign(variable=variable, value=value[rows], sensor=kind.sensor, row=rows))
    if not tables:
        return pd.DataFrame()
    # Values of a report side by side, levels in the file's order.
    table = pd.concat(tables, ignore_index=True).sort_values("row", kind="stable")
    return drop_impossible(table, report)


def _platforms(frame: pd.DataFrame, kind: BufrKind) -> np.ndarray:
    """Names as text [n], "" where the message has none."""
    out = np.full(len(frame), "", dtype=object)
    for key in kind.platform:
        if key not in frame:
            continue
        codes, names = observations.platform_labels(frame[key])
        # A WMO number put together from missing parts is a huge one; missing text is a row of bytes 255.
        usable = [not (key == "WMO_station_id" and len(name) > 5) and name.isprintable() for name in names]
        texts = np.array([*(n if ok else "" for n, ok in zip(names, usable, strict=True)), ""], dtype=object)[codes]
        out = np.where(out == "", texts, out)
    return out
