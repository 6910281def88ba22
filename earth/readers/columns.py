"""Which column of a user's table is what, and in which unit.

Column names are compared without case, blanks and punctuation. Understood beside plain names and the ERA5 / CF names
of `earth.sensors`:

* IODA: `MetaData/latitude`, `MetaData/dateTime`, `ObsValue/airTemperature`, `ObsError/...`, `PreQC/...`, and the older
  `airTemperature@ObsValue`;
* HealDA / NNJA: `time_utc`, `platform_id`, `satellite_zenith_angle`, `TMBR_00001`, long tables with `observation` and
  `variable`;
* dialects recognised by their neighbours (`DIALECTS`): Meteo-France SYNOP, METAR tables, IEM ASOS, Meteostat, NOAA
  GSOD.

The unit of a column is, in this order: stated by the caller (`units=`) or by the file's attributes; the dialect's;
written in the name (`temp_f`, `wind [kt]`); implied by the alias; or the first of the variable's usual units in which
the values are plausible. A stated unit that the values contradict is a `UnitError`; every guess is listed in the
report. Guesses, dialects and thresholds are **ours**.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from earth import observations, sensors
from earth.observations import DropReport, SchemaError, UnitError
from earth.sensors import name_key

# role -> aliases in order of preference, compared by name_key
# fmt: off
ROLES: dict[str, tuple[str, ...]] = {
    role: tuple(aliases.split())
    for role, aliases in {
        "time":
            "time validtime datetime timestamp timeutc datetimeutc utctime utc dateutc obstime obstimeutc "
            "observationtime datadatetime reporttime phenomenontime valid unixtime epoch dateheure datehour "
            "datestring localtime timelocal datetimelocal date datum dateobs day",
        "latitude":
            "latitude lat stationlatitude latitudedeg latdeg geolat decimallatitude stationlat y",
        "longitude":
            "longitude lon lng long stationlongitude longitudedeg londeg geolon decimallongitude stationlon x",
        "height":
            "height elevation elev alt altitude z stationelev stationelevation heightofstation stationheight elevm "
            "hgt stationaltitude heightofstationgroundabovemeansealevel heightabovemeansealevel altitudem "
            "surfacealtitude orography elevationm",
        "platform":
            "station stationid platformid platform stationidentification stnid stid siteid site numersta usaf wmo "
            "wmoid wmostationid icao stationnumber stn sid id code stationcode aircraftflightnumber "
            "aircraftregistrationnumber aircraftregistrationnumberorotheridentification flightnumber "
            "shiporbuoyidentifier callsign satelliteid satid stationname name",
        "pressure":
            "pressure airpressure pres plev p pressurelevel level lev",
        "view_angle":
            "viewangle sensorviewangle scanangle",
        "zenith_angle":
            "satellitezenithangle sensorzenithangle satza saza viewzenithangle",
        "sensor":
            "sensor sensorname instrument obstype",
        "variable":
            "variable parameter varname variablename element observedvariable quantity param datatype",
        "value":
            "value observation obsvalue observationvalue datavalue measurement val",
        "units":
            "units unit",
        "channel":
            "channel sensorchannelnumber channelnumber sensorchannel chan",
        "obs_error":
            "obserror error uncertainty observationerror stdev",
        "qc":
            "qc qcflag qualitycontrol qualityflag flag preqc quality",
    }.items()
}
# fmt: on
_LONG_ROLES = ("sensor", "variable", "value", "units", "channel", "obs_error", "qc")
_DATE_PARTS = frozenset(
    "year month day hour minute second doy dayofyear yyyy mm hh mn yr mo dy hr minutes hours unnamed0 index "
    "level0 weekday".split()
)
_ALIAS_UNITS = {
    word: unit
    for unit, words in {
        "tenths": "cloudtenths",
        "oktas": "cloudoktas oktas",
        "km": "viskm visibilitykm",
        "degF": "tmpf dwpf",
        "degC": "tmpc dwpc",
        "kt": "sknt",
        "mm": "p01m rainmm",
        "in": "p01i",
        "J m-2": "ssrd",
        "min": "tsun",
        "h": "preciph preciphours",
    }.items()
    for word in words.split()
}
_SUFFIX_UNITS = {
    word: unit
    for unit, words in {
        "degC": "c degc celsius",
        "degF": "f degf fahrenheit",
        "K": "k kelvin",
        "hPa": "hpa mb mbar",
        "Pa": "pa",
        "kPa": "kpa",
        "inHg": "inhg",
        "mmHg": "mmhg",
        "m s-1": "ms mps",
        "kt": "kt kts knots",
        "km h-1": "kmh kph",
        "mph": "mph",
        "mm": "mm",
        "cm": "cm",
        "km": "km",
        "m": "m",
        "ft": "ft",
        "in": "in",
        "%": "pct percent",
        "degree": "deg degrees",
        "W m-2": "wm2",
        "J m-2": "jm2",
        "MJ m-2": "mjm2",
        "min": "min",
        "oktas": "oktas",
        "tenths": "tenths",
    }.items()
    for word in words.split()
}
# fmt: off
_FILLS = np.array([
    -9999.0, -9999.9, -999.0, -999.9, -999.99, -99.0, -99.9, -99.99, -99999.0, -8888.0, -32768.0,
    999.0, 999.9, 9999.0, 9999.9, 99999.0, 99999.9, 999999.0, 32767.0, 1e20, 9.969209968386869e36,
])
# fmt: on
_SURE_FILLS = np.array([-9999.0, -9999.9, 1e20, 9.969209968386869e36])  # never a value of anything
_CHANNEL = re.compile(
    r"^(?:tb|bt|tmbr|tbb|brightness_?temperature)[_ ]*(?:ch|chan|channel)?[_ :]*0*(\d{1,4})$", re.IGNORECASE
)
_IODA_SLASH = re.compile(
    r"^(MetaData|ObsValue|ObsError|PreQC|EffectiveError|EffectiveQC|ObsType|PreUseFlag)/(.+)$", re.IGNORECASE
)
_IODA_AT = re.compile(
    r"^(.+)@(MetaData|ObsValue|ObsError|PreQC|EffectiveError|EffectiveQC|ObsType|PreUseFlag)$", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Dialect:
    """A family of files known by its column names.

    Attributes:
      name: for the report.
      signs: name keys that betray it; `at_least` of them must be present, and one of `decisive`.
      columns: name key -> (variable, unit).
    """

    name: str
    signs: frozenset[str]
    at_least: int
    decisive: frozenset[str]
    columns: Mapping[str, tuple[str, str]]

    def fits(self, keys: set[str]) -> bool:
        """Whether a table with these column name keys is written in the dialect."""
        return len(self.signs & keys) >= self.at_least and bool(self.decisive & keys)


def _dialect(name: str, signs: str, at_least: int, decisive: str, **columns: tuple[str, str]) -> Dialect:
    return Dialect(name, frozenset(signs.split()), at_least, frozenset(decisive.split()), columns)


_T, _TD, _SP, _MSL = "2m_temperature", "2m_dewpoint_temperature", "surface_pressure", "mean_sea_level_pressure"
_WS, _WD, _GUST, _RH = "10m_wind_speed", "10m_wind_direction", "10m_wind_gust", "2m_relative_humidity"
_TP, _VIS = "total_precipitation", "visibility"
# fmt: off
DIALECTS: tuple[Dialect, ...] = (
    _dialect("Meteo-France SYNOP", "numersta pmer tend ff dd raf10 rr1 rr3 vv td pres", 5, "pmer numersta raf10",
             t=(_T, "K"), td=(_TD, "K"), u=(_RH, "%"), pmer=(_MSL, "Pa"), pres=(_SP, "Pa"),
             tend=("surface_pressure_tendency_3h", "Pa"), ff=(_WS, "m s-1"), dd=(_WD, "degree"),
             raf10=(_GUST, "m s-1"), vv=(_VIS, "m"), n=("total_cloud_cover", "%"), htneige=("snow_depth", "m")),
    _dialect("METAR table", "icao altimeter wspd wdir wgst dewp temp qcflag cvg1 wxstring", 5, "altimeter icao wgst",
             temp=(_T, "degC"), dewp=(_TD, "degC"), wspd=(_WS, "kt"), wgst=(_GUST, "kt"), vis=(_VIS, "mi"),
             altimeter=("altimeter_setting", "inHg"), pcp=(_TP, "mm")),
    _dialect("IEM ASOS", "tmpf dwpf sknt drct alti p01i p01m vsby relh mslp skyc1", 3, "tmpf dwpf sknt alti",
             tmpf=(_T, "degF"), dwpf=(_TD, "degF"), sknt=(_WS, "kt"), gust=(_GUST, "kt"),
             alti=("altimeter_setting", "inHg"), mslp=(_MSL, "hPa"), vsby=(_VIS, "mi"), p01i=(_TP, "in"), p01m=(_TP,
             "mm")),
    _dialect("Meteostat", "temp dwpt rhum prcp wdir wspd wpgt pres tsun coco", 4, "wpgt coco rhum dwpt tsun",
             temp=(_T, "degC"), dwpt=(_TD, "degC"), wspd=(_WS, "km h-1"), wpgt=(_GUST, "km h-1"), pres=(_MSL,
             "hPa"), tsun=("sunshine_duration", "min"), prcp=(_TP, "mm"), snow=("snow_depth", "mm")),
    _dialect("NOAA GSOD", "temp dewp slp stp visib wdsp mxspd frshtt sndp", 5, "frshtt mxspd wdsp",
             temp=("mean_2m_temperature", "degF"), dewp=(_TD, "degF"), slp=(_MSL, "hPa"), stp=(_SP, "hPa"),
             visib=(_VIS, "mi"), wdsp=(_WS, "kt"), gust=(_GUST, "kt"),
             max=("maximum_2m_temperature", "degF"), min=("minimum_2m_temperature", "degF"), prcp=(_TP, "in"),
             sndp=("snow_depth", "in")),
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class ColumnMapping:
    """How a user's column became a variable: SI value = file value * scale + offset.

    Attributes:
      variable: column name in `Reports.variables`.
      units: unit of the file ("1" if unknown).
      scale, offset: conversion to SI.
      inferred: nobody stated the unit.
      derived_from: file columns this one was computed from; empty for a column of the file.
    """

    variable: str
    units: str
    scale: float
    offset: float
    inferred: bool = False
    derived_from: tuple[str, ...] = ()

    def to_si(self, values: Any) -> Any:
        """File units to SI."""
        return values * self.scale + self.offset

    def from_si(self, values: Any) -> Any:
        """SI to file units."""
        return (values - self.offset) / self.scale


@dataclasses.dataclass
class Column:
    """A file column that holds values, before its unit is known."""

    name: str  # of the file
    target: str  # variable
    asked: bool  # the caller named this column or its unit
    exact: bool  # its name is the registered one
    unit: str | None  # dialect's, suffix's or alias's
    weak: bool  # a name of one or two letters may mean something else


# --------------------------------------------------------------------------------------------------------------- layout
@dataclasses.dataclass
class Layout:
    """Which column is what: role -> column, the value columns, and IODA companions (variable column -> its error or
    flag column).
    """

    roles: dict[str, str]
    values: list[Column]
    errors: dict[str, str]
    flags: dict[str, str]
    dialect: str | None


def plain_name(name: str) -> tuple[str, str, str | None]:
    """Splits a column name into (group of IODA or "", bare name, unit in brackets or None)."""
    group, bare = "", name
    if found := _IODA_SLASH.match(name):
        group, bare = found[1].lower(), found[2]
    elif found := _IODA_AT.match(name):
        group, bare = found[2].lower(), found[1]
    bracket = re.match(r"^(.*?)\s*[(\[]\s*([^)\]]+?)\s*[)\]]\s*$", bare)
    if bracket and bracket[1]:
        return group, bracket[1], bracket[2]
    return group, bare, None


def suffix_unit(name: str) -> tuple[str, str | None]:
    """`temp_f` -> ("temp", "degF"); a name without a unit at its end stays."""
    found = re.match(r"^(.+?)[_\s.]+([A-Za-z0-9]+|%)$", name)
    if found and (unit := "%" if found[2] == "%" else _SUFFIX_UNITS.get(found[2].lower())):
        return found[1], unit
    return name, None


def find_columns(
    frame: pd.DataFrame,
    sensor: str,
    columns: Mapping[str, str | None] | None,
    units: Mapping[str, str] | None,
    report: DropReport,
    *,
    long: bool = False,
) -> Layout:
    """Finds the role or variable of every column.

    Args:
      columns: the caller's map from file column to role (`time`, `latitude`, `longitude`, `height`, `platform` or
        `station`, `pressure`, `view_angle`), to a variable or any alias of one, or to None to ignore the column.
      units: the caller's units by file column or variable; a name that is neither is an error.
      long: the table has variable and value columns; the rest are not values.

    Raises: SchemaError for an unknown column in `columns` or `units`.
    """
    columns = dict(columns or {})
    names = list(frame.columns)
    for name, target in columns.items():
        if name not in names:
            swapped = f" (columns= maps the file's names to ours: {{{target!r}: {name!r}}}?)" if target in names else ""
            raise SchemaError(
                f"columns= names {name!r}, which is not in the table; the nearest is "
                f"{sensors.nearest(name, names)!r}{swapped}"
            )
    kind = sensors.sensor(sensor)
    roles: dict[str, str] = {}
    chosen: dict[str, str] = {}
    role_names = {"station": "platform", "platform_id": "platform", "elevation": "height"} | {
        role: role for role in ROLES
    }
    for name, target in columns.items():
        if target is None:
            chosen[name] = ""
        elif target in role_names:
            role = role_names[target]
            if role in roles:
                raise SchemaError(f"columns= gives two columns for {role}: {roles[role]!r} and {name!r}; choose one")
            roles[role] = name
            chosen[name] = role
    keys = {name: name_key(plain_name(name)[1]) for name in names}
    groups = {name: plain_name(name)[0] for name in names}
    vertical = kind.vertical == "pressure"
    coordinates: set[str] = set()
    for role, aliases in ROLES.items():
        if (role in _LONG_ROLES and not long) or (role == "pressure" and not (vertical or long)):
            continue
        stripped = (
            {name: name_key(suffix_unit(plain_name(name)[1])[0]) for name in names}
            if role in ("latitude", "longitude", "height", "pressure")
            else keys
        )
        found = [
            n
            for alias in aliases
            for n in names
            if n not in columns and groups[n] in ("", "metadata") and (keys[n] == alias or stripped[n] == alias)
        ]
        coordinates.update(found)
        if role not in roles and found:
            roles[role] = _better_time(frame, found) if role == "time" else found[0]
    present = set(keys.values())
    dialect = None
    if sensor == "station":
        dialect = next((d for d in DIALECTS if d.fits(present)), None)
    # A column that is a coordinate by name but not used as one (a second time, a station's name) is no variable
    # either, unless the dialect says it is.
    spare = [n for n in coordinates if n not in roles.values() and not (dialect and keys[n] in dialect.columns)]
    if spare:
        report.note(f"columns read as coordinates but not used: {', '.join(sorted(spare))}")
    out = Layout(roles, [], {}, {}, dialect.name if dialect else None)
    if long:
        return out
    used = set(roles.values()) | set(spare) | set(chosen)
    companions: dict[tuple[str, str], str] = {}
    for name in names:
        if name in used:
            continue
        group, bare, bracket = plain_name(name)
        if group in ("obserror", "effectiveerror", "preqc", "effectiveqc"):
            companions[(group, name_key(bare))] = name
            continue
        if group not in ("", "obsvalue"):
            continue
        meant = name in columns or (dialect is not None and keys[name] in dialect.columns)
        if keys[name] in _DATE_PARTS and not meant:
            continue
        out.values.append(value_column(name, bare, bracket, sensor, columns.get(name), dialect, units or {}))
    _settle(out, frame, report)
    by_key = {name_key(plain_name(c.name)[1]): c.name for c in out.values}
    for (group, key), name in companions.items():
        if key in by_key:
            (out.errors if group.endswith("error") else out.flags).setdefault(by_key[key], name)
    if dialect:
        report.note(f"columns read in the way of {dialect.name} files")
    for name in units or {}:
        if (
            name not in names
            and name not in {c.target for c in out.values}
            and name_key(name) not in {name_key(c.name) for c in out.values}
        ):
            raise SchemaError(
                f"units= names {name!r}, which is neither a column nor a variable of the table; the nearest is "
                f"{sensors.nearest(name, names)!r}"
            )
    return out


def _better_time(frame: pd.DataFrame, found: list[str]) -> str:
    """The first time column, but a datetime column before text or numbers."""
    typed = [n for n in found if frame[n].dtype.kind == "M" or isinstance(frame[n].dtype, pd.DatetimeTZDtype)]
    return typed[0] if typed else found[0]


def value_column(
    name: str,
    bare: str,
    bracket: str | None,
    sensor: str,
    asked: str | None,
    dialect: Dialect | None,
    units: Mapping[str, str],
) -> Column:
    key = name_key(bare)
    by_unit = name in units
    if asked is not None:
        base, channel = sensors.split_channel(asked)
        target = sensors.join_channel(sensors.lookup_alias(base, sensor) or base, channel)
        return Column(name, target, True, True, bracket, False)
    if found := _CHANNEL.match(bare):
        return Column(
            name, sensors.join_channel("brightness_temperature", int(found[1])), by_unit, True, bracket, False
        )
    if dialect and key in dialect.columns:
        target, unit = dialect.columns[key]
        return Column(name, target, by_unit, False, unit, True)
    target = sensors.lookup_alias(bare, sensor)
    unit = bracket or _ALIAS_UNITS.get(key)
    if target is None:
        stem, suffix = suffix_unit(bare)
        target = sensors.lookup_alias(stem, sensor) if suffix else None
        key, unit = (name_key(stem), bracket or suffix) if target else (key, unit)
    if target is None:
        own = bare if plain_name(name)[0] else name  # without IODA's group
        return Column(name, own, by_unit, False, bracket, False)
    return Column(name, target, by_unit, name == target, unit, len(key) <= 2)


def _settle(out: Layout, frame: pd.DataFrame, report: DropReport) -> None:
    """Relative humidity under the name `u`, and one column per variable (the best name wins, the others keep their own
    name).
    """
    v_names = ("10m_v_component_of_wind", "v_component_of_wind")
    u_names = ("10m_u_component_of_wind", "u_component_of_wind")
    if not any(c.target in v_names for c in out.values):
        for column in out.values:
            if column.target in u_names and not column.asked and name_key(column.name) == "u":
                values = observations.to_numbers(frame[column.name])
                values = values[np.isfinite(values)]
                if values.size and values.min() >= 0 and values.max() <= 100:
                    column.target = "2m_relative_humidity" if column.target.startswith("10m") else "relative_humidity"
                    report.note(
                        f"column {column.name!r} has no v beside it and lies in 0..100: taken as relative humidity, "
                        f"not as wind (columns={{{column.name!r}: 'u10'}} overrules)"
                    )
    winners: dict[str, Column] = {}
    for column in sorted(out.values, key=lambda c: (not c.asked, not c.exact, c.weak)):
        if column.target not in winners:
            winners[column.target] = column
        else:
            report.note(
                f"columns {winners[column.target].name!r} and {column.name!r} both read as {column.target}: the "
                "second keeps its own name"
            )
            column.target = column.name if column.name != column.target else f"{column.name} (2)"
            column.weak = True
    if len({c.target for c in out.values}) != len(out.values):
        seen: set[str] = set()
        for column in out.values:
            while column.target in seen:
                column.target += " (2)"
            seen.add(column.target)


# ---------------------------------------------------------------------------------------------------------------- units
def _inside(values: np.ndarray, about: sensors.Variable, unit: sensors.Unit) -> float:
    si = values * unit.scale + unit.offset
    low, high = about.valid_range
    return float(np.mean((si >= low) & (si <= high))) if values.size else 1.0


def stated_unit(column: Column, units: Mapping[str, str]) -> str | None:
    for name in (column.name, column.target):
        if name in units:
            return units[name]
    key = name_key(column.name)
    return next((unit for name, unit in units.items() if name_key(name) == key), None)


def to_si(
    values: np.ndarray,
    column: Column,
    rows: np.ndarray | None,
    report: DropReport,
    *,
    units: Mapping[str, str],
    attributes: Mapping[str, str],
    mask: bool,
) -> tuple[np.ndarray, ColumnMapping]:
    """Values of one file column (float64 [n], file units) to SI, with its mapping.

    Fill values (-9999, 999.9, ... where they are no possible value) become NaN. With `mask`, so do values outside the
    variable's valid range. Both are counted. rows: row numbers for messages, default 0..n-1.

    Raises: UnitError for a stated unit that is unknown, of another dimension, or contradicted by the values, and for
    values that fit no usual unit.
    """
    about = sensors.describe(column.target)
    base = sensors.split_channel(column.target)[0]
    known = base in sensors.VARIABLES
    stated = stated_unit(column, units)
    finite = values[np.isfinite(values)]
    sample = finite[:: max(1, finite.size // 100_000)]
    inferred = False
    if not known:
        unit_name, scale, offset = _free_unit(column, stated, attributes)
        fills = np.isin(values, _SURE_FILLS)
        report.mask(f"{column.name}: fill value", int(fills.sum()))
        odd = ~fills & ~np.isnan(values) & ~(np.abs(values) <= observations.LARGEST)
        report.mask(f"{column.name}: infinite", int(odd.sum()))
        kept = np.where(fills | odd, np.nan, values * scale + offset)
        return kept, ColumnMapping(column.target, unit_name, scale, offset, stated is None)
    candidates = [sensors.unit(u) for u in dict.fromkeys((about.units, *about.file_units))]
    possible = np.zeros(sample.size, bool)
    for candidate in candidates:
        si = sample * candidate.scale + candidate.offset
        possible |= (si >= about.valid_range[0]) & (si <= about.valid_range[1])
    is_fill = np.isin(sample, _FILLS) & ~possible
    sample = sample[~is_fill]
    unit: sensors.Unit | None = None
    hard = False
    if stated is not None:
        unit, hard = _unit_for(stated, about, column.name), True
    elif column.name in attributes and (unit := known_unit(attributes[column.name], about)) is not None:
        hard = True
    elif column.unit is not None and (soft := known_unit(column.unit, about)) is not None:
        if _inside(sample, about, soft) >= 0.5:
            unit, inferred = soft, True
        else:
            report.note(f"column {column.name!r} does not hold {column.unit}: unit taken from the values")
    if unit is None and base == "surface_solar_radiation_downwards" and sample.size and 45.0 < sample.max() <= 2_000.0:
        about = sensors.VARIABLES["mean_surface_downward_short_wave_radiation_flux"]
        unit, inferred = sensors.unit("W m-2"), True
        column.target = about.name
        report.note(f"column {column.name!r} reaches {sample.max():.0f}: taken as a flux in W m-2")
    if unit is None:
        shares = [_inside(sample, about, sensors.unit(u)) for u in about.file_units]
        best = max(shares)
        unit = sensors.unit(about.file_units[next(i for i, s in enumerate(shares) if s >= best - 0.02)])
        inferred = True
        if best < 0.5 and column.weak:
            report.note(
                f"column {column.name!r} does not look like {column.target} in any usual unit: kept under its own name"
            )
            column.target, unit_name = column.name, "1"
            kept = np.where(np.abs(values) <= observations.LARGEST, values, np.nan)
            return kept, ColumnMapping(column.name, unit_name, 1.0, 0.0, True)
    if about.name.startswith("total_precipitation"):
        # Trace rain is coded -0.1 mm in SYNOP files.
        trace = np.isclose(values * unit.scale, -1e-4, rtol=1e-4, atol=0.0)
        report.adjust(f"{column.name}: trace (-0.1 mm) set to 0", int(trace.sum()))
        values = np.where(trace, 0.0, values)
    si = values * unit.scale + unit.offset
    low, high = about.valid_range
    outside = ~np.isnan(si) & ~((si >= low) & (si <= high))
    if outside.any():
        fills = outside & np.isin(values, _FILLS)
        if fills.any():
            report.mask(f"{column.name}: fill value", int(fills.sum()))
            si = np.where(fills, np.nan, si)
        bad = observations.check_range(
            si,
            about.name,
            rows=rows,
            what=f"column {column.name!r}, value",
            given=values,
            remedy=_remedy(sample, about, column, unit, hard),
        )
        if mask and bad.any():
            report.mask(f"{column.name}: outside the valid range of {about.name}", int(bad.sum()))
            si = np.where(bad, np.nan, si)
    return si, ColumnMapping(column.target, unit.name, unit.scale, unit.offset, inferred)


def _free_unit(column: Column, stated: str | None, attributes: Mapping[str, str]) -> tuple[str, float, float]:
    name = stated or column.unit or attributes.get(column.name)
    return (str(name) if name else "1"), 1.0, 0.0


def _unit_for(name: str, about: sensors.Variable, column: str) -> sensors.Unit:
    unit = sensors.unit(name)
    wanted = sensors.unit(about.units).dimension
    if unit.dimension != wanted:
        raise UnitError(
            f"column {column!r}: {name} measures {unit.dimension}, but {about.name} is a {wanted} in {about.units}; "
            f"state a unit of {wanted} such as {about.file_units[-1]}"
        )
    return unit


def known_unit(name: str, about: sensors.Variable) -> sensors.Unit | None:
    try:
        return _unit_for(name, about, "")
    except UnitError:
        return None


def _remedy(sample: np.ndarray, about: sensors.Variable, column: Column, unit: sensors.Unit, hard: bool) -> str:
    fits = [
        u
        for u in about.file_units
        if sensors.unit(u).name != unit.name and _inside(sample, about, sensors.unit(u)) > 0.9
    ]
    if fits:
        return f"the values look like {fits[0]}: pass units={{{column.name!r}: {fits[0]!r}}}"
    state = "check the stated unit, or " if hard else "state its unit with units=, or "
    return f"{state}leave the column out with columns={{{column.name!r}: None}}"
