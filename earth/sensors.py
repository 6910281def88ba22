"""What is measured and by which instrument: variables, units, sensors, channels and normalisation.

Variables carry ERA5 / WeatherBench-2 names (`2m_temperature`), CF standard names and SI units; every value inside the
library is SI. A sensor is a family of instruments with one observation operator: `station`, `radiosonde`, `aircraft`,
`ship`, `buoy` and the sounders `atms`, `amsua`, `mhs`, `hirs4`, whose channels carry the metadata the observation
operator reads (frequency, polarisation, bandwidth, pressure of the weighting function's peak).

Sources of the channel tables (public). Peak pressures are approximate (nadir, mid-latitudes) and depend on the profile:
they are features for a network, not for a retrieval.

* ATMS: centres, bandwidths, polarisation at nadir from NOAA STAR (star.nesdis.noaa.gov/jpss/ATMS.php) and NOAA MiRS
  (mirs.nesdis.noaa.gov/npoessatms.php, kept by the UNT web archive, 2013-02-15), the latter also for the peaks of
  channels 6-15 (700, 400, 250, 180, 90, 50, 25, 10, 6, 3 hPa). The side bands of channels 11-15 are those of AMSU-A
  10-14, which these channels repeat; the MiRS page abridges them.
* AMSU-A: centres, side bands, bandwidths from `amsu_channels.m` of atmlab (P. Eriksson, 2003), which follows the NOAA
  KLM User's Guide, section 3.3; peaks of the corresponding ATMS channels. Polarisation: KLM guide, quoted from memory.
* MHS: WMO's table as given in Wikipedia, "Microwave humidity sounder".
* HIRS/4: centres of Metop-A from NCEP GSI's monitoring file `hirs4_metop-a.ctl` (GHz, divided by c); half-power
  widths from the NWP SAF page on AAPP HIRS/2, except channels 12, 17, 18 (narrower since HIRS/3; KLM guide, quoted from
  memory). Peaks: Smith et al. 1979 (Bull. Amer. Meteor. Soc. 60, 1177), quoted from memory.
* Peaks of windows (the surface), of ATMS 4-5 and of the humidity channels near 165-190 GHz: rounded by us (**ours**).

Aliases and plausible ranges are **ours**.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


class ObservationError(ValueError):
    """Base of every error about observations; the message names the row, the value and the remedy."""


class UnknownSensorError(ObservationError):
    """A sensor that is not registered; the message names the nearest registered one."""


class UnknownVariableError(ObservationError):
    """A variable that is not registered or not in the data; the message names the nearest known one."""


class UnitError(ObservationError):
    """A unit that is unknown, of another dimension than the variable's, or contradicted by the values."""


# ---------------------------------------------------------------------------------------------------------------- units
# unit -> (dimension, scale, offset): SI value = value * scale + offset. The first spelling of each entry is the one
# reported.
_UNIT_TABLE: tuple[tuple[tuple[str, ...], str, float, float], ...] = (
    (("K", "kelvin", "degK"), "temperature", 1.0, 0.0),
    (("degC", "C", "celsius", "°C", "deg_C", "degree_Celsius", "degrees_celsius"), "temperature", 1.0, 273.15),
    (("degF", "F", "fahrenheit", "°F", "deg_F"), "temperature", 5.0 / 9.0, 273.15 - 32.0 * 5.0 / 9.0),
    (("Pa", "pascal"), "pressure", 1.0, 0.0),
    (("hPa", "mb", "mbar", "millibar", "millibars"), "pressure", 100.0, 0.0),
    (("kPa",), "pressure", 1000.0, 0.0),
    (("inHg", "inch_Hg"), "pressure", 3386.389, 0.0),
    (("mmHg", "torr"), "pressure", 133.322387415, 0.0),
    (("m s-1", "m/s", "ms-1", "m s**-1", "mps"), "speed", 1.0, 0.0),
    (("kt", "kts", "knot", "knots"), "speed", 1852.0 / 3600.0, 0.0),
    (("km h-1", "km/h", "kmh", "kph"), "speed", 1.0 / 3.6, 0.0),
    (("mph", "mi/h"), "speed", 0.44704, 0.0),
    (("ft s-1", "ft/s"), "speed", 0.3048, 0.0),
    (("m", "metre", "meter", "metres", "meters"), "length", 1.0, 0.0),
    (("mm", "kg m-2", "kg/m2", "kg m**-2", "millimetre", "millimeter"), "length", 1e-3, 0.0),
    (("cm",), "length", 1e-2, 0.0),
    (("km",), "length", 1e3, 0.0),
    (("in", "inch", "inches"), "length", 0.0254, 0.0),
    (("ft", "feet", "foot"), "length", 0.3048, 0.0),
    (("mi", "mile", "miles", "statute_mile"), "length", 1609.344, 0.0),
    (("1", "fraction", "(0 - 1)", "dimensionless", ""), "ratio", 1.0, 0.0),
    (("%", "percent", "pct"), "ratio", 1e-2, 0.0),
    (("tenths",), "ratio", 0.1, 0.0),
    (("oktas", "okta", "octas", "eighths"), "ratio", 0.125, 0.0),
    (("g kg-1", "g/kg"), "ratio", 1e-3, 0.0),
    (("kg kg-1", "kg/kg", "kg kg**-1"), "ratio", 1.0, 0.0),
    (("degree", "deg", "degrees", "°", "degrees_true"), "angle", 1.0, 0.0),
    (("rad", "radian", "radians"), "angle", 180.0 / math.pi, 0.0),
    (("s", "second", "seconds"), "duration", 1.0, 0.0),
    (("min", "minute", "minutes"), "duration", 60.0, 0.0),
    (("h", "hour", "hours", "hr"), "duration", 3600.0, 0.0),
    (("J m-2", "J/m2", "J m**-2"), "energy", 1.0, 0.0),
    (("kJ m-2", "kJ/m2", "kJ m**-2"), "energy", 1e3, 0.0),
    (("MJ m-2", "MJ/m2", "MJ m**-2", "MJ m-2 h-1"), "energy", 1e6, 0.0),
    (("Wh m-2", "Wh/m2"), "energy", 3600.0, 0.0),
    (("W m-2", "W/m2", "W m**-2"), "power", 1.0, 0.0),
    (("m2 s-2", "m**2 s**-2", "m2/s2", "J kg-1"), "geopotential", 1.0, 0.0),
)


def _unit_key(unit: str) -> str:
    folded = unit.strip()
    # Case carries meaning in units (mm, Mm), so only the words are folded.
    folded = folded if len(folded) <= 3 else folded.lower()
    return re.sub(r"[\s^*._]+", "", folded)


_UNITS: dict[str, tuple[str, str, float, float]] = {}
for _spellings, _dimension, _scale, _offset in _UNIT_TABLE:
    for _spelling in _spellings:
        _UNITS[_unit_key(_spelling)] = (_spellings[0], _dimension, _scale, _offset)


@dataclasses.dataclass(frozen=True)
class Unit:
    """A unit of measure: SI value = value * scale + offset.

    Attributes:
      name: the spelling reported to the user, e.g. `degC`.
      dimension: kind of quantity, e.g. `temperature`; units convert within one dimension only.
      scale, offset: the conversion to the SI unit of the dimension (degrees for angles).
    """

    name: str
    dimension: str
    scale: float
    offset: float


def unit(name: str) -> Unit:
    """Looks up a unit by any of its spellings; raises `UnitError` naming the nearest known one."""
    key = _unit_key(str(name))
    if key not in _UNITS:
        lowered = {k.lower(): k for k in _UNITS}
        if key.lower() in lowered:
            key = lowered[key.lower()]
        else:
            known = sorted({value[0] for value in _UNITS.values()})
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise UnitError(
                f"unit {name!r} is not known; the nearest known one is {near[0]!r}; known units: {', '.join(known)}"
            )
    return Unit(*_UNITS[key])


# ------------------------------------------------------------------------------------------------------------ variables
@dataclasses.dataclass(frozen=True)
class Variable:
    """A geophysical quantity.

    Attributes:
      name: ERA5 / WeatherBench-2 style name, the key in tables, Reports and forecasts.
      units: SI unit of the values in the library (degrees for directions).
      standard_name: CF standard name ("" where CF has none).
      valid_range: closed interval of physically possible SI values; values outside are dropped and counted.
      aliases: other names under which users' files carry it, compared without case, blanks and punctuation.
      file_units: units to try on a user's column, in this order, when none is stated.
      floor: smallest standard deviation that normalisation divides by, SI.
      circular: a direction in degrees; average and difference modulo 360.
    """

    name: str
    units: str
    standard_name: str = ""
    valid_range: tuple[float, float] = (-math.inf, math.inf)
    aliases: tuple[str, ...] = ()
    file_units: tuple[str, ...] = ()
    floor: float = 1e-6
    circular: bool = False

    def __post_init__(self) -> None:
        low, high = self.valid_range
        if not low < high:
            raise ObservationError(
                f"valid_range {self.valid_range} of variable {self.name!r} is empty; give (low, high) with low < high"
            )
        if not self.floor > 0:
            raise ObservationError(
                f"floor {self.floor} of variable {self.name!r} must be positive; it bounds the standard deviation "
                "from below"
            )


_TEMPERATURE = ("K", "degC", "degF")
# inHg before kPa: pressures in kPa are never plausible as inHg, but 30 inHg is a plausible 30 kPa.
_PRESSURE = ("Pa", "hPa", "inHg", "kPa", "mmHg")

VARIABLES: dict[str, Variable] = {}
_BY_NAME: dict[str, str] = {}  # name_key of a registered name -> name
_BY_ALIAS: dict[str, list[str]] = {}  # name_key of an alias -> names, in the order of registration


def name_key(name: str) -> str:
    """The form in which names are compared: lower case, letters and digits only (`Air Temp` and `air_temp` are one)."""
    return re.sub(r"[^a-z0-9]+", "", str(name).lower())


def register_variable(variable: Variable, *, replace: bool = False) -> Variable:
    """Adds a variable to `VARIABLES`; raises `ObservationError` if the name is taken and `replace` is false."""
    if variable.name in VARIABLES and not replace:
        raise ObservationError(f"variable {variable.name!r} is already registered; pass replace=True to overwrite it")
    VARIABLES[variable.name] = variable
    _BY_NAME[name_key(variable.name)] = variable.name
    for names in _BY_ALIAS.values():
        if variable.name in names:
            names.remove(variable.name)
    for alias in variable.aliases:
        _BY_ALIAS.setdefault(name_key(alias), []).append(variable.name)
    return variable


def nearest(name: str, known: Iterable[str]) -> str:
    candidates = sorted(known)
    near = difflib.get_close_matches(str(name), candidates, n=1, cutoff=0.0)
    return near[0] if near else "none"


def split_channel(column: str) -> tuple[str, int]:
    """`brightness_temperature:5` -> ("brightness_temperature", 5); a name without a channel -> (name, -1)."""
    base, colon, number = column.rpartition(":")
    if colon and base and re.fullmatch(r"0|[1-9]\d{0,5}", number):
        return base, int(number)
    return column, -1


def join_channel(variable: str, channel: int) -> str:
    """Inverse of `split_channel`: the column of Reports that holds one channel of a variable."""
    return variable if channel < 0 else f"{variable}:{channel}"


def variable(name: str) -> Variable:
    """The registered variable of that name (a `name:channel` column gives its variable); raises
    `UnknownVariableError`.
    """
    base, _ = split_channel(name)
    if base not in VARIABLES:
        raise UnknownVariableError(
            f"variable {base!r} is not registered; the nearest registered one is {nearest(base, VARIABLES)!r}; use "
            "that or register_variable()"
        )
    return VARIABLES[base]


def describe(name: str, units: str = "1") -> Variable:
    """Like `variable`, but an unregistered name gives a plain Variable in `units`, without limits, and no error."""
    base, _ = split_channel(name)
    return VARIABLES.get(base) or Variable(base, units)


def _add(
    name: str,
    units: str,
    standard_name: str,
    low: float,
    high: float,
    floor: float,
    file_units: tuple[str, ...],
    *,
    aliases: str,
    circular: bool = False,
) -> None:
    words = tuple(aliases.split())
    register_variable(Variable(name, units, standard_name, (low, high), words, file_units, floor, circular))


# fmt: off
_add("2m_temperature", "K", "air_temperature", 173.15, 335.0, 0.05, _TEMPERATURE,
     aliases="t2m 2t t temp temperature ta tair tas tmp airtemp airtemperature tmpf tmpc temp2m tempair "
             "temperature2m t2 tt drybulb drybulbtemperature drybulbtemp hourlydrybulbtemperature tl")
_add("2m_dewpoint_temperature", "K", "dew_point_temperature", 150.0, 310.0, 0.05, _TEMPERATURE,
     aliases="td2m d2m 2d td dewp dewpoint dewpointtemperature dewpt dwpt dwpf dwpc dpt dew tdew tdew2m dewpoint2m "
             "dewpointtemp hourlydewpointtemperature")
_add("surface_pressure", "Pa", "surface_air_pressure", 30_000.0, 110_000.0, 5.0, _PRESSURE,
     aliases="ps sp pres pressure stationpressure surfacepressure stnpres psfc p press airpressure barometer stp "
             "nonCoordinatePressure po qfe pressurestation stationairpressure")
_add("mean_sea_level_pressure", "Pa", "air_pressure_at_mean_sea_level", 85_000.0, 109_000.0, 5.0, _PRESSURE,
     aliases="msl mslp slp pmsl prmsl pmer seapres sealevelpressure pressurereducedtomeansealevel "
             "meansealevelpressure pressurereducedtomeansealevelpressure qff pressuremsl pressuresealevel msp")
_add("altimeter_setting", "Pa", "", 85_000.0, 109_000.0, 5.0, _PRESSURE,
     aliases="altimeter alti qnh")
_add("surface_pressure_tendency_3h", "Pa", "tendency_of_surface_air_pressure", -6000.0, 6000.0, 5.0, ("Pa", "hPa"),
     aliases="tend ptend pressuretendency 3hourpressurechange")
_add("10m_u_component_of_wind", "m s-1", "eastward_wind", -120.0, 120.0, 0.05, ("m s-1",),
     aliases="u10 u 10u uas uwind windeastward eastwardwind windu u10m ucomponentofwind ugrd")
_add("10m_v_component_of_wind", "m s-1", "northward_wind", -120.0, 120.0, 0.05, ("m s-1",),
     aliases="v10 v 10v vas vwind windnorthward northwardwind windv v10m vcomponentofwind vgrd")
_add("10m_wind_speed", "m s-1", "wind_speed", 0.0, 120.0, 0.05, ("m s-1",),
     aliases="ws ff wspd windspeed wind si10 ws10 sknt wdsp sfcwind speed windspeed10m fflt wndspd w10 "
             "hourlywindspeed wsp")
_add("10m_wind_direction", "degree", "wind_from_direction", 0.0, 360.0, 1.0, ("degree",), circular=True,
     aliases="wd dd wdir winddirection winddir drct wd10 direction winddirection10m wnddir hourlywinddirection "
             "wdirection")
_add("10m_wind_gust", "m s-1", "wind_speed_of_gust", 0.0, 150.0, 0.05, ("m s-1",),
     aliases="gust wgst raf10 fx gustspeed windgust windgustspeed wsgust wpgt i10fg fg10 maxwindgust windgusts "
             "windgusts10m peakgust gst rafper wsmax")
_add("10m_wind_gust_direction", "degree", "", 0.0, 360.0, 1.0, ("degree",), circular=True,
     aliases="gustdir wdgust gustdirection windgustdirection")
_add("2m_relative_humidity", "1", "relative_humidity", 0.0, 1.05, 0.002, ("1", "%"),
     aliases="rh rh2m relh rhum hum humidity hurs relativehumidity relhum relativehumidity2m 2mrh "
             "hourlyrelativehumidity rf r2")
_add("2m_specific_humidity", "kg kg-1", "specific_humidity", 0.0, 0.06, 1e-05, ("kg kg-1", "g kg-1"),
     aliases="q2m huss specifichumidity q")
_add("total_precipitation", "m", "lwe_thickness_of_precipitation_amount", 0.0, 2.0, 1e-05, ("mm",),
     aliases="precip tp prcp rain rainfall precipitation pr rr pcp precipamount p01m p01i prec rainmm rrr "
             "precipitationamount hourlyprecipitation ppt")
for _hours in (1, 3, 6, 12, 24):
    _add(f"total_precipitation_{_hours}hr", "m", "lwe_thickness_of_precipitation_amount", 0.0, 2.0, 1e-05, ("mm",),
         aliases=f"rr{_hours} pcp{_hours}h precip{_hours}h tp{_hours}h p{_hours:02d}h rain{_hours}h prec{_hours}h "
                 f"precipitation{_hours}h")
_add("precipitation_duration", "s", "", 0.0, 90_000.0, 10.0, ("h", "min", "s"),
     aliases="preciph precipduration rainduration preciphour preciphours")
_add("sunshine_duration", "s", "duration_of_sunshine", 0.0, 90_000.0, 10.0, ("h", "min", "s"),
     aliases="sunshine sund tsun sun sunhours sd sunshineduration ss")
_add("surface_solar_radiation_downwards", "J m-2", "integral_wrt_time_of_surface_downwelling_shortwave_flux_in_air",
     -100_000.0, 45000000.0, 1000.0, ("MJ m-2", "kJ m-2", "J m-2"),
     aliases="swdown ssrd globalrad globlrad solar globalradiation solarradiation glob globalsolarradiation gsr srad")
_add("mean_surface_downward_short_wave_radiation_flux", "W m-2", "surface_downwelling_shortwave_flux_in_air", -20.0,
     1800.0, 1.0, ("W m-2",),
     aliases="msdwswrf rsds ghi shortwaveradiation solarflux swin swd solarirradiance irradiance")
_add("mean_surface_downward_long_wave_radiation_flux", "W m-2", "surface_downwelling_longwave_flux_in_air", 20.0,
     800.0, 1.0, ("W m-2",),
     aliases="msdwlwrf rlds lwdown lwd lwin")
_add("uv_index", "1", "ultraviolet_index", 0.0, 30.0, 0.01, ("1",),
     aliases="uvi uvindex uv")
_add("visibility", "m", "visibility_in_air", 0.0, 200_000.0, 10.0, ("km", "m"),
     aliases="viskm vis vv visib vsby visb horizontalvisibility visibilitykm hourlyvisibility")
_add("total_cloud_cover", "1", "cloud_area_fraction", 0.0, 1.0, 0.005, ("1", "oktas", "tenths", "%"),
     aliases="cloudtenths tcc n cloud cloudcover clouds cloudamount clt skycover cloudarea cloudoktas oktas clct "
             "cloudcoverage cloudfraction")
_add("snow_depth", "m", "surface_snow_thickness", 0.0, 20.0, 0.001, ("cm", "m"),
     aliases="sde snowdepth snow htneige snwd snd")
_add("soil_temperature", "K", "soil_temperature", 200.0, 350.0, 0.05, _TEMPERATURE,
     aliases="tsoil stl1 soilt tg soiltemp groundtemperature")
_add("maximum_2m_temperature", "K", "air_temperature", 173.15, 335.0, 0.05, _TEMPERATURE,
     aliases="tmax tx mx2t temperaturemax maxtemp tempmax maxt")
_add("minimum_2m_temperature", "K", "air_temperature", 173.15, 335.0, 0.05, _TEMPERATURE,
     aliases="tmin tn mn2t temperaturemin mintemp tempmin mint")
_add("mean_2m_temperature", "K", "air_temperature", 173.15, 335.0, 0.05, _TEMPERATURE,
     aliases="tavg tmean temperaturemean meantemp tm")
_add("sea_surface_temperature", "K", "sea_surface_temperature", 268.0, 313.0, 0.02, _TEMPERATURE,
     aliases="sst wtmp seasurfacetemp watertemp watertemperature seasurfacetemperature")
_add("significant_height_of_combined_wind_waves_and_swell", "m", "sea_surface_wave_significant_height", 0.0, 35.0,
     0.01, ("m",),
     aliases="swh wvht hs waveheight")
_add("temperature", "K", "air_temperature", 130.0, 340.0, 0.05, _TEMPERATURE,
     aliases="t temp airtemperature ta tmp airtemp tmpk")
_add("dewpoint_temperature", "K", "dew_point_temperature", 100.0, 315.0, 0.05, _TEMPERATURE,
     aliases="td dewpoint dewpointtemperature dewp dpt")
_add("u_component_of_wind", "m s-1", "eastward_wind", -200.0, 200.0, 0.05, ("m s-1",),
     aliases="u windeastward eastwardwind uwind windu ua ugrd")
_add("v_component_of_wind", "m s-1", "northward_wind", -200.0, 200.0, 0.05, ("m s-1",),
     aliases="v windnorthward northwardwind vwind windv va vgrd")
_add("wind_speed", "m s-1", "wind_speed", 0.0, 200.0, 0.05, ("m s-1",),
     aliases="ws ff windspeed wspd speed sknt")
_add("wind_direction", "degree", "wind_from_direction", 0.0, 360.0, 1.0, ("degree",), circular=True,
     aliases="wd dd winddirection wdir direction drct")
_add("specific_humidity", "kg kg-1", "specific_humidity", 0.0, 0.06, 1e-06, ("kg kg-1", "g kg-1"),
     aliases="q specifichumidity hus spfh")
_add("relative_humidity", "1", "relative_humidity", 0.0, 1.5, 0.002, ("1", "%"),
     aliases="rh r relativehumidity hur relh")
_add("virtual_temperature", "K", "virtual_temperature", 130.0, 345.0, 0.05, _TEMPERATURE,
     aliases="tv virtualtemperature")
_add("geopotential", "m2 s-2", "geopotential", -10_000.0, 700_000.0, 10.0, ("m2 s-2",),
     aliases="phi nonCoordinateGeopotential")
_add("geopotential_height", "m", "geopotential_height", -1000.0, 70_000.0, 1.0, ("m",),
     aliases="gh zg gph geopotentialheight nonCoordinateGeopotentialHeight nonCoordinateHeight")
_add("brightness_temperature", "K", "toa_brightness_temperature", 50.0, 400.0, 0.1, ("K",),
     aliases="tb bt tmbr brightnesstemperature tbb brighttemp")
# fmt: on

_UPPER_AIR = tuple(
    "temperature dewpoint_temperature u_component_of_wind v_component_of_wind wind_speed wind_direction "
    "specific_humidity relative_humidity virtual_temperature geopotential geopotential_height".split()
)
_MARINE = ("sea_surface_temperature", "significant_height_of_combined_wind_waves_and_swell")
_SURFACE = tuple(name for name in VARIABLES if name not in (*_UPPER_AIR, *_MARINE, "brightness_temperature"))


# -------------------------------------------------------------------------------------------------------------- sensors
_LIGHT = 299_792_458.0


@dataclasses.dataclass(frozen=True)
class Channel:
    """One spectral channel of a radiometer. Give `frequency` (microwave) or `wavenumber` (infrared, visible).

    Attributes:
      number: the channel's number in the instrument's documents, from 1.
      frequency: centre in GHz (line centre for side-band channels), or None.
      wavenumber: centre in cm-1, or None.
      polarisation: `V`, `H`, `QV`, `QH` (quasi: rotates with the scan angle, as named at nadir) or `` (unpolarised).
      bandwidth: width of one pass band, in GHz or cm-1 like the centre.
      offsets: side-band offsets from the centre in GHz: (d1,) means f +- d1, (d1, d2) means f +- d1 +- d2.
      peak_pressure: pressure of the peak of the weighting function in Pa; 101325 for a surface-seeing window; NaN for
        reflected sunlight.
    """

    number: int
    frequency: float | None = None
    wavenumber: float | None = None
    polarisation: str = ""
    bandwidth: float = math.nan
    offsets: tuple[float, ...] = ()
    peak_pressure: float = math.nan

    def __post_init__(self) -> None:
        if (self.frequency is None) == (self.wavenumber is None):
            raise ObservationError(
                f"channel {self.number}: give either frequency (GHz) or wavenumber (cm-1), got {self.frequency} and "
                f"{self.wavenumber}"
            )
        if self.polarisation not in ("", "V", "H", "QV", "QH"):
            raise ObservationError(
                f"channel {self.number}: polarisation {self.polarisation!r} is not one of '', 'V', 'H', 'QV', 'QH'"
            )

    @property
    def frequency_hz(self) -> float:
        """Centre frequency in Hz whichever way the channel was given (wavenumber * c)."""
        if self.frequency is not None:
            return self.frequency * 1e9
        assert self.wavenumber is not None
        return self.wavenumber * 100.0 * _LIGHT

    @property
    def bandwidth_hz(self) -> float:
        """Width of one pass band in Hz."""
        return self.bandwidth * (1e9 if self.frequency is not None else 100.0 * _LIGHT)


@dataclasses.dataclass(frozen=True)
class Sensor:
    """A family of instruments that share an observation operator.

    Attributes:
      name: registry key, the `sensor` column of the table.
      variables: names of the variables it can report, in the preferred order.
      channels: spectral channels, empty for in-situ sensors.
      moving: positions change from report to report (no split of moving platforms, no grid()).
      vertical: what locates a report in the vertical: `surface`, `height` or `pressure`.
      column: sees a column of air (a radiance), not a point.
      altitude: height of the orbit in m, to turn a zenith angle at the ground into the angle from nadir; NaN in situ.
      description: one line for people.
    """

    name: str
    variables: tuple[str, ...]
    channels: tuple[Channel, ...] = ()
    moving: bool = False
    vertical: str = "surface"
    column: bool = False
    altitude: float = math.nan
    description: str = ""

    def __post_init__(self) -> None:
        if self.vertical not in ("surface", "height", "pressure"):
            raise ObservationError(
                f"sensor {self.name!r}: vertical {self.vertical!r} is not one of 'surface', 'height', 'pressure'"
            )
        numbers = [channel.number for channel in self.channels]
        if len(set(numbers)) != len(numbers):
            raise ObservationError(f"sensor {self.name!r} lists a channel number twice: {numbers}")
        for name in self.variables:
            variable(name)

    def channel(self, number: int) -> Channel:
        """The channel of that number; raises `UnknownVariableError` naming the numbers there are."""
        for channel in self.channels:
            if channel.number == number:
                return channel
        raise UnknownVariableError(
            f"sensor {self.name!r} has no channel {number}; it has {[channel.number for channel in self.channels]}"
        )


SENSORS: dict[str, Sensor] = {}


def register_sensor(sensor: Sensor, *, replace: bool = False) -> Sensor:
    """Adds a sensor to `SENSORS`; raises `ObservationError` if the name is taken and `replace` is false."""
    if sensor.name in SENSORS and not replace:
        raise ObservationError(f"sensor {sensor.name!r} is already registered; pass replace=True to overwrite it")
    SENSORS[sensor.name] = sensor
    return sensor


def sensor(name: str) -> Sensor:
    """The registered sensor of that name; raises `UnknownSensorError` naming the nearest one."""
    if name not in SENSORS:
        raise UnknownSensorError(
            f"sensor {name!r} is not registered; the nearest registered one is {nearest(name, SENSORS)!r}; use that "
            "or register_sensor()"
        )
    return SENSORS[name]


_HPA = 100.0
_SURFACE_PEAK = 101_325.0


def _microwave(rows: Sequence[tuple[Any, ...]]) -> tuple[Channel, ...]:
    return tuple(
        Channel(
            number,
            frequency=frequency,
            polarisation=polarisation,
            bandwidth=bandwidth,
            offsets=offsets,
            peak_pressure=peak * _HPA,
        )
        for number, frequency, offsets, bandwidth, polarisation, peak in rows
    )


_WINDOW = _SURFACE_PEAK / _HPA
_O2 = 57.290344
# fmt: off
# number, centre GHz, side-band offsets GHz, width of a pass band GHz, polarisation, peak hPa
_ATMS = _microwave([
    (1, 23.8, (), 0.27, "QV", _WINDOW),
    (2, 31.4, (), 0.18, "QV", _WINDOW),
    (3, 50.3, (), 0.18, "QH", _WINDOW),
    (4, 51.76, (), 0.40, "QH", 950.0),
    (5, 52.8, (), 0.40, "QH", 850.0),
    (6, 53.596, (0.115,), 0.17, "QH", 700.0),
    (7, 54.4, (), 0.40, "QH", 400.0),
    (8, 54.94, (), 0.40, "QH", 250.0),
    (9, 55.5, (), 0.33, "QH", 180.0),
    (10, _O2, (), 0.33, "QH", 90.0),
    (11, _O2, (0.217,), 0.078, "QH", 50.0),
    (12, _O2, (0.3222, 0.048), 0.036, "QH", 25.0),
    (13, _O2, (0.3222, 0.022), 0.016, "QH", 10.0),
    (14, _O2, (0.3222, 0.010), 0.008, "QH", 6.0),
    (15, _O2, (0.3222, 0.0045), 0.003, "QH", 3.0),
    (16, 88.2, (), 2.0, "QV", _WINDOW),
    (17, 165.5, (), 3.0, "QH", 950.0),
    (18, 183.31, (7.0,), 2.0, "QH", 800.0),
    (19, 183.31, (4.5,), 2.0, "QH", 650.0),
    (20, 183.31, (3.0,), 1.0, "QH", 550.0),
    (21, 183.31, (1.8,), 1.0, "QH", 450.0),
    (22, 183.31, (1.0,), 0.5, "QH", 350.0),
])
_AMSUA = _microwave([
    (1, 23.8, (), 0.27, "QV", _WINDOW),
    (2, 31.4, (), 0.18, "QV", _WINDOW),
    (3, 50.3, (), 0.18, "QV", _WINDOW),
    (4, 52.8, (), 0.40, "QV", 850.0),
    (5, 53.596, (0.115,), 0.17, "QH", 700.0),
    (6, 54.4, (), 0.40, "QH", 400.0),
    (7, 54.94, (), 0.40, "QV", 250.0),
    (8, 55.5, (), 0.33, "QH", 180.0),
    (9, _O2, (), 0.33, "QH", 90.0),
    (10, _O2, (0.217,), 0.078, "QH", 50.0),
    (11, _O2, (0.3222, 0.048), 0.036, "QH", 25.0),
    (12, _O2, (0.3222, 0.022), 0.016, "QH", 10.0),
    (13, _O2, (0.3222, 0.010), 0.008, "QH", 6.0),
    (14, _O2, (0.3222, 0.0045), 0.003, "QH", 3.0),
    (15, 89.0, (), 6.0, "QV", _WINDOW),
])
_MHS = _microwave([
    (1, 89.0, (), 2.8, "QV", _WINDOW),
    (2, 157.0, (), 2.8, "QV", 950.0),
    (3, 183.311, (1.0,), 0.5, "QH", 350.0),
    (4, 183.311, (3.0,), 1.0, "QH", 550.0),
    (5, 190.311, (), 2.2, "QV", 800.0),
])
# number, centre cm-1 (Metop-A), half-power width cm-1, peak hPa (channels 9 and 17 rounded by us)
_HIRS4 = tuple(
    Channel(number, wavenumber=wavenumber, bandwidth=bandwidth, peak_pressure=peak * _HPA)
    for number, wavenumber, bandwidth, peak in (
        (1, 668.66, 3.0, 30.0),
        (2, 679.18, 10.0, 60.0),
        (3, 689.70, 12.0, 100.0),
        (4, 701.99, 16.0, 400.0),
        (5, 716.47, 16.0, 600.0),
        (6, 731.71, 16.0, 800.0),
        (7, 748.82, 16.0, 900.0),
        (8, 898.59, 35.0, _WINDOW),
        (9, 1028.51, 25.0, 25.0),
        (10, 800.93, 16.0, 1000.0),
        (11, 1361.88, 40.0, 700.0),
        (12, 1530.13, 55.0, 500.0),
        (13, 2189.72, 23.0, 1000.0),
        (14, 2212.33, 23.0, 950.0),
        (15, 2237.61, 23.0, 700.0),
        (16, 2245.57, 23.0, 400.0),
        (17, 2418.86, 28.0, _WINDOW),
        (18, 2516.06, 35.0, _WINDOW),
        (19, 2663.68, 100.0, _WINDOW),
        (20, 14500.0, 1000.0, math.nan),
    )
)
# fmt: on

_TB = ("brightness_temperature",)
register_sensor(Sensor("station", _SURFACE, description="fixed surface weather station"))
register_sensor(
    Sensor(
        "radiosonde", _UPPER_AIR, moving=True, vertical="pressure", description="balloon sounding, located by pressure"
    )
)
register_sensor(
    Sensor("aircraft", _UPPER_AIR, moving=True, vertical="height", description="aircraft reports (AMDAR, ACARS)")
)
register_sensor(Sensor("ship", (*_SURFACE, *_MARINE), moving=True, description="ship of opportunity"))
register_sensor(Sensor("buoy", (*_SURFACE, *_MARINE), moving=True, description="moored or drifting buoy"))
register_sensor(
    Sensor(
        "atms",
        _TB,
        _ATMS,
        True,
        "surface",
        True,
        824e3,
        "Advanced Technology Microwave Sounder (Suomi NPP, NOAA-20, NOAA-21)",
    )
)
register_sensor(
    Sensor("amsua", _TB, _AMSUA, True, "surface", True, 833e3, "Advanced Microwave Sounding Unit A (NOAA, Metop, Aqua)")
)
register_sensor(
    Sensor("mhs", _TB, _MHS, True, "surface", True, 833e3, "Microwave Humidity Sounder (NOAA-18/19, Metop)")
)
register_sensor(
    Sensor(
        "hirs4",
        _TB,
        _HIRS4,
        True,
        "surface",
        True,
        817e3,
        "High-resolution Infrared Radiation Sounder 4 (NOAA-18/19, Metop-A/B)",
    )
)


def lookup_alias(name: str, sensor_name: str | None = None) -> str | None:
    """The registered variable a column name stands for, or None.

    Where several variables share an alias (`t` at 2 m and aloft) the first one the sensor can report is taken.
    """
    key = name_key(name)
    found = [*([_BY_NAME[key]] if key in _BY_NAME else []), *_BY_ALIAS.get(key, [])]
    if sensor_name is not None:
        allowed = sensor(sensor_name).variables
        found = [n for n in found if n in allowed] or found
    return found[0] if found else None


# -------------------------------------------------------------------------------------------------------- normalisation
@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Per-variable mean and standard deviation: z = (x - mean) / sd.

    Fit it on training observations only: whatever it sees leaks into every input. `sd` is never below the variable's
    floor, so a constant series or a single value gives finite numbers. A variable without one finite training value
    gets the centre of its valid range (0 if unbounded) and a quarter of its width (1 if unbounded), count 0
    (**ours**).

    Attributes:
      variables: column names as in `Reports.variables`.
      mean, sd: float64 [V], SI.
      count: int64 [V], finite training values behind each.
    """

    variables: tuple[str, ...]
    mean: np.ndarray
    sd: np.ndarray
    count: np.ndarray

    def __post_init__(self) -> None:
        shape = (len(self.variables),)
        for field in ("mean", "sd", "count"):
            if np.shape(getattr(self, field)) != shape:
                raise ObservationError(
                    f"normalisation: {field} has shape {np.shape(getattr(self, field))}, not {shape} for "
                    f"{self.variables}"
                )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.sd).all() and (self.sd > 0).all()):
            raise ObservationError(
                f"normalisation: mean and sd must be finite and sd positive, got mean {self.mean} and sd {self.sd}"
            )

    @classmethod
    def fit(
        cls, values: Any, variables: Sequence[str] | None = None, *, floors: Mapping[str, float] | None = None
    ) -> Normalisation:
        """Fits mean and sd over all finite entries of each column.

        Args:
          values: [..., V] array of SI values, NaN missing; or anything with `.values` and `.variables` such as
            `Reports`.
          variables: names of the V columns; taken from `values` when it has them.
          floors: smallest sd by variable, overriding the registry's.
        """
        names = tuple(values.variables if variables is None else variables)
        if variables is None:
            values = values.values
        array = np.asarray(values)
        if array.ndim < 1 or array.shape[-1] != len(names):
            raise ObservationError(
                f"normalisation: values of shape {array.shape} do not end in {len(names)} variables {names}"
            )
        array = array.reshape(-1, len(names))
        mean, sd, count = (np.zeros(len(names)) for _ in range(3))
        for i, name in enumerate(names):
            about = describe(name)
            column = array[:, i].astype(np.float64)
            column = column[np.isfinite(column)]
            count[i] = column.size
            if column.size:
                # Two passes about a first guess: pressures of 1e5 Pa lose nothing to cancellation.
                guess = column[0]
                mean[i] = guess + np.mean(column - guess)
                sd[i] = np.sqrt(np.mean((column - mean[i]) ** 2))
            else:
                low, high = about.valid_range
                bounded = math.isfinite(low) and math.isfinite(high)
                mean[i], sd[i] = ((low + high) / 2, (high - low) / 4) if bounded else (0.0, 1.0)
            sd[i] = max(sd[i], (floors or {}).get(name, about.floor))
        return cls(names, mean, sd, count.astype(np.int64))

    def index(self, variables: Sequence[str]) -> np.ndarray:
        """Positions [len(variables)] of the given names; raises `UnknownVariableError` naming the nearest."""
        place = {name: i for i, name in enumerate(self.variables)}
        for name in variables:
            if name not in place:
                raise UnknownVariableError(
                    f"variable {name!r} has no normalisation; the nearest fitted one is "
                    f"{nearest(name, self.variables)!r}; fit it on training data first"
                )
        return np.array([place[name] for name in variables], np.int64)

    def normalise(self, values: np.ndarray, variables: Sequence[str] | None = None) -> np.ndarray:
        """(x - mean) / sd over the last axis, which holds `variables` (default: all fitted). Same float dtype as
        given.
        """
        at = self.index(self.variables if variables is None else variables)
        array = np.asarray(values)
        return ((array.astype(np.float64) - self.mean[at]) / self.sd[at]).astype(_float_dtype(array))

    def denormalise(self, values: np.ndarray, variables: Sequence[str] | None = None) -> np.ndarray:
        """The inverse of `normalise` (to rounding)."""
        at = self.index(self.variables if variables is None else variables)
        array = np.asarray(values)
        return (array.astype(np.float64) * self.sd[at] + self.mean[at]).astype(_float_dtype(array))

    def to_dict(self) -> dict[str, dict[str, float]]:
        """A plain dict, exact through JSON: {variable: {mean, sd, count}}."""
        return {
            n: {"mean": float(m), "sd": float(s), "count": int(c)}
            for n, m, s, c in zip(self.variables, self.mean, self.sd, self.count, strict=True)
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, float]]) -> Normalisation:
        """Inverse of `to_dict`; raises `ObservationError` on a missing entry."""
        try:
            columns = [np.array([entry[key] for entry in data.values()]) for key in ("mean", "sd", "count")]
        except (KeyError, TypeError) as error:
            raise ObservationError(
                f"normalisation: each variable needs mean, sd and count; {error!r} is missing or not a mapping"
            ) from error
        return cls(
            tuple(data), columns[0].astype(np.float64), columns[1].astype(np.float64), columns[2].astype(np.int64)
        )

    def to_json(self) -> str:
        """`to_dict` as JSON text; Python writes floats so that they read back bit for bit."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Normalisation:
        """Inverse of `to_json`."""
        return cls.from_dict(json.loads(text))


def _float_dtype(array: np.ndarray) -> np.dtype:
    return array.dtype if array.dtype.kind == "f" else np.dtype(np.float64)
