"""Readers of wide, long and gridded data: names, units, traps of real files, and fuzzing."""

import time as clock
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from earth import sensors
from earth.observations import (
    CoordinateError,
    EmptyWindowError,
    MissingVariableError,
    ObservationError,
    SchemaError,
    TimeError,
    UnitError,
    UnknownSensorError,
    UnknownVariableError,
    to_reports,
    validate,
)
from earth.readers import read_arrays, read_stations, read_table
from earth.readers.stations import wind_components


def wide(n_times: int = 30, stations: int = 3, **changes) -> Any:
    """Hourly wide table in common units."""
    rng = np.random.default_rng(1)
    n = n_times * stations
    frame = pd.DataFrame(
        {
            "time": np.tile(pd.date_range("2021-01-01", periods=n_times, freq="h"), stations),
            "station": np.repeat([f"S{s}" for s in range(stations)], n_times),
            "lat": np.repeat(24.0 + np.arange(stations), n_times),
            "lon": np.repeat(121.0 + np.arange(stations), n_times),
            "elev": np.repeat(10.0 + 100 * np.arange(stations), n_times),
            "t2m": rng.normal(20, 5, n),
            "ps": rng.normal(1000, 5, n),
            "ws": rng.uniform(0.5, 12, n),
            "wd": rng.uniform(0, 360, n),
        }
    )
    return frame.assign(**changes)


def series(table, name):
    """Values of a variable or column in the table's order of (station, time), file units."""
    reports = table.reports
    return table.to_file_units(name, reports.values[:, reports.index([table.variable(name)])[0]].astype(np.float64))


# ---------------------------------------------------------------------------------------------------------- wide tables
def test_a_wide_table_becomes_reports():
    frame = wide()
    table = read_stations(frame)
    assert (table.report.rows_in, table.report.rows_kept, table.report.dropped) == (90, 90, {})
    reports = table.reports
    assert reports.sensor == "station"
    assert reports.platforms == ("S0", "S1", "S2")
    assert {c: (m.variable, m.units) for c, m in table.columns.items()} == {
        "t2m": ("2m_temperature", "degC"),
        "ps": ("surface_pressure", "hPa"),
        "ws": ("10m_wind_speed", "m s-1"),
        "wd": ("10m_wind_direction", "degree"),
        "u": ("10m_u_component_of_wind", "m s-1"),
        "v": ("10m_v_component_of_wind", "m s-1"),
    }
    for column in ("t2m", "ps", "ws", "wd"):
        np.testing.assert_allclose(series(table, column), frame[column], rtol=3e-6, atol=2e-5)
    np.testing.assert_allclose(reports.values[:, 0], frame["t2m"] + 273.15, rtol=1e-6)
    np.testing.assert_array_equal(reports.height, frame["elev"])


def test_the_wide_and_the_long_way_agree():
    frame = wide()
    frame.loc[5:8, "t2m"] = np.nan
    frame = pd.concat([frame, frame.iloc[[3]]]).sample(frac=1, random_state=0)
    direct = read_stations(frame, derive_wind=False).reports
    melted = frame.melt(["time", "station", "lat", "lon", "elev"], ["t2m", "ps", "ws", "wd"], "variable", "value")
    table, report = read_table(melted)
    through = to_reports(table)["station"]
    assert report.rows_in == report.rows_kept + sum(report.dropped.values()) == 4 * 91
    assert set(direct.variables) == set(through.variables)
    np.testing.assert_array_equal(direct.values, through.values[:, through.index(direct.variables)])
    np.testing.assert_array_equal(direct.time, through.time)
    assert direct.platforms == through.platforms
    long = read_stations(melted)  # the long form is recognised
    assert set(long.columns) == {"t2m", "ps", "ws", "wd", "u", "v"}
    np.testing.assert_allclose(series(long, "t2m"), series(read_stations(frame), "t2m"), rtol=1e-6)


def test_validate_agrees_with_the_wide_reader():
    frame = wide()
    frame.loc[4, "lat"] = np.nan
    frame.loc[9, "t2m"] = 200.0
    frame.loc[30, "elev"] = np.nan
    frame.loc[50:, "lat"] += 0.0  # no change
    reports = read_stations(frame).reports
    table, report = validate(reports.to_table())
    assert report.dropped == {}
    again = to_reports(table)["station"]
    np.testing.assert_array_equal(again.values[:, again.index(reports.variables)], reports.values)


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"lat": "latitude", "lon": "longitude", "elev": "elevation", "station": "station_id", "time": "datetime"},
        {"lat": "LAT", "lon": "lng", "elev": "alt", "station": "id", "time": "timestamp"},
        {"lat": "Latitude", "lon": "Longitude", "elev": "height", "station": "numer_sta", "time": "valid_time"},
        {"lat": "lat_deg", "lon": "lon_deg", "elev": "z", "station": "name", "time": "date"},
        {
            "lat": "latitude (deg)",
            "lon": "longitude (deg)",
            "elev": "Elevation [m]",
            "station": "platform_id",
            "time": "time_utc",
        },
        {
            "lat": "MetaData/latitude",
            "lon": "MetaData/longitude",
            "elev": "MetaData/stationElevation",
            "station": "MetaData/stationIdentification",
            "time": "MetaData/dateTime",
            "t2m": "ObsValue/airTemperature",
            "ps": "ObsValue/stationPressure",
        },
        {"lat": "latitude@MetaData", "lon": "longitude@MetaData", "time": "datetime@MetaData", "t2m": "temp@ObsValue"},
    ],
)
def test_column_names_of_many_schools(names):
    plain, other = read_stations(wide()), read_stations(wide().rename(columns=names))
    assert other.reports.variables == plain.reports.variables
    for field in ("values", "latitude", "longitude", "height", "time", "platform"):
        np.testing.assert_array_equal(getattr(other.reports, field), getattr(plain.reports, field))


@pytest.mark.parametrize(
    "convert",
    [
        lambda t: t.dt.strftime("%Y%m%d%H%M%S").astype(np.int64),
        lambda t: t.dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
        lambda t: t.dt.tz_localize("UTC").dt.tz_convert("Asia/Taipei"),
        lambda t: (t - pd.Timestamp(0)) // pd.Timedelta("1s"),
        lambda t: t.astype("datetime64[ms]"),
        lambda t: t.astype(str).astype("category"),
    ],
)
def test_times_of_many_schools(convert):
    frame = wide()
    frame["time"] = convert(frame["time"])
    np.testing.assert_array_equal(read_stations(frame).reports.time, read_stations(wide()).reports.time)


def test_dates_and_hours_in_separate_columns():
    expected = read_stations(wide()).reports.time
    frame = wide()
    split = frame.assign(date=frame["time"].dt.strftime("%Y-%m-%d"), hour=frame["time"].dt.hour).drop(columns="time")
    np.testing.assert_array_equal(read_stations(split).reports.time, expected)
    parts = split.drop(columns="date").assign(year=2021, month=1, day=frame["time"].dt.day)
    table = read_stations(parts)
    np.testing.assert_array_equal(table.reports.time, expected)
    assert not {"year", "month", "day", "hour"} & set(table.columns)
    local = split.drop(columns="hour").assign(time=frame["time"].dt.strftime("%H:%M"))
    np.testing.assert_array_equal(read_stations(local, timezone="+08:00").reports.time, expected - 8 * 3600)


def test_a_date_column_of_datetimes_beside_a_clock():
    frame = wide()
    split = frame.assign(date=frame["time"].dt.normalize(), time=frame["time"].dt.strftime("%H:%M:%S"))
    np.testing.assert_array_equal(read_stations(split).reports.time, read_stations(frame).reports.time)


def test_marks_of_missing_values_and_traces_in_text_columns():
    frame = wide(gust="M", p01m="0.00", vsby=["oops", *["5.0"] * 89])
    frame.loc[:4, "gust"] = "12.5"
    frame.loc[7, "p01m"] = "T"
    frame.loc[8, "p01m"] = "2.5"
    table = read_stations(frame)
    assert np.isfinite(series(table, "gust")).sum() == 5
    np.testing.assert_allclose(series(table, "p01m")[6:9], [0.0, 0.0, 2.5], rtol=1e-6)
    assert table.report.masked == {"vsby: not a number": 1}
    assert table.report.adjusted == {"p01m: trace (T) set to 0": 1}


def test_explicit_columns_and_ignored_ones():
    frame = wide().rename(columns={"lat": "nord", "lon": "ost", "t2m": "messwert_7", "station": "wo", "time": "wann"})
    with pytest.raises(SchemaError, match=r"no time column found among wann, .*'<your column>': 'time'"):
        read_stations(frame)
    columns = {"nord": "latitude", "ost": "longitude", "messwert_7": "t2m", "wo": "station", "wann": "time", "ps": None}
    table = read_stations(frame, columns=columns)
    assert table.variable("messwert_7") == "2m_temperature"
    assert "ps" not in table.columns
    coded = read_stations(
        frame.rename(columns={"ps": "code"}),
        columns={k: v for k, v in columns.items() if k != "ps"} | {"code": "surface_pressure"},
    )
    assert coded.variable("code") == "surface_pressure"
    with pytest.raises(SchemaError, match=r"columns= names 'nrod', .* nearest is 'nord'"):
        read_stations(frame, columns={"nrod": "latitude"})
    with pytest.raises(SchemaError, match=r"maps the file's names to ours: \{'nord': 'latitude'\}"):
        read_stations(frame, columns={"latitude": "nord"})
    with pytest.raises(SchemaError, match="two columns for latitude"):
        read_stations(frame, columns={"nord": "latitude", "ost": "latitude"})


def test_missing_coordinates_say_what_to_do():
    with pytest.raises(CoordinateError, match=r"no latitude column found among .*stations="):
        read_stations(wide().drop(columns="lat"))


def test_positions_from_a_list_of_stations():
    frame = wide()
    listed = frame[["station", "lat", "lon", "elev"]].drop_duplicates()
    table = read_stations(frame.drop(columns=["lat", "lon", "elev"]), stations=listed)
    expected = read_stations(frame).reports
    for field in ("values", "latitude", "longitude", "height"):
        np.testing.assert_array_equal(getattr(table.reports, field), getattr(expected, field))
    table = read_stations(frame.drop(columns=["lat", "lon", "elev"]), stations=listed.iloc[:2])
    assert table.report.dropped == {"coordinate missing or not a number": 30}


def test_no_heights_no_station_names():
    table = read_stations(wide().drop(columns=["elev", "station"]))
    assert np.isnan(table.reports.height).all()
    assert table.reports.platforms == ("24.0000_121.0000", "25.0000_122.0000", "26.0000_123.0000")
    assert "no height column: heights are unknown (NaN)" in table.report.notes


def test_unknown_numeric_columns_are_kept_as_they_are():
    frame = wide(pollen=np.arange(90.0), remark="fine", flag=True)
    table = read_stations(frame, units={"pollen": "grains m-3"})
    np.testing.assert_array_equal(series(table, "pollen"), np.arange(90))
    assert (table.units("pollen"), table.variable("pollen")) == ("grains m-3", "pollen")
    assert "flag" in table.columns
    assert any("'remark' holds no numbers" in note for note in table.report.notes)


def test_whole_columns_missing_are_reported_or_an_error_if_asked_for():
    frame = wide(rh=np.nan, uvi=-9999.0)
    table = read_stations(frame)
    assert not {"rh", "uvi"} & set(table.columns)
    assert "columns without any usable value were dropped: rh, uvi" in table.report.notes
    with pytest.raises(MissingVariableError, match=r"'rh' was asked for but has no usable value in 90 rows"):
        read_stations(frame, variables=["t2m", "rh"])
    with pytest.raises(MissingVariableError, match=r"'t22m' is not in the table; the nearest is 't2m'"):
        read_stations(frame, variables=["t22m"])
    with pytest.raises(SchemaError, match="must be a list"):
        read_stations(frame, variables="t2m")


def test_only_the_variables_asked_for():
    frame = wide()
    frame.loc[:4, "t2m"] = np.nan
    table = read_stations(frame, variables=["t2m", "u"])
    assert table.reports.variables == ("2m_temperature", "10m_u_component_of_wind")
    assert list(table.columns) == ["t2m", "u"]
    only = read_stations(frame, variables=["2m_temperature"])
    assert only.report.dropped == {"no value in the row": 5}
    melted = frame.melt(["time", "station", "lat", "lon", "elev"], ["t2m", "ps"], "variable", "value")
    long = read_stations(melted, variables=["t2m"])
    assert long.reports.variables == ("2m_temperature",)
    assert len(long.reports) == 85


def test_rows_add_up_through_every_kind_of_drop():
    frame = wide()
    frame["time"] = frame["time"].astype(object)
    frame.loc[0, "time"] = None
    frame.loc[1, "lat"] = np.nan
    frame.loc[2, "station"] = None
    frame.loc[3, ["t2m", "ps", "ws", "wd"]] = np.nan
    frame = pd.concat([frame, frame.iloc[[10, 11]], frame.iloc[[12]].assign(t2m=-3.0)], ignore_index=True)
    report = read_stations(frame).report
    assert report.dropped == {
        "time missing": 1,
        "coordinate missing or not a number": 1,
        "platform not named": 1,
        "no value in the row": 1,
        "duplicate of an earlier report": 2,
        "duplicate with another value": 1,
    }
    assert report.rows_in == 93 == report.rows_kept + sum(report.dropped.values())
    assert "93 rows read, 86 kept" in str(report)


def test_duplicate_rows_complete_each_other():
    frame = wide(3, 1)[["time", "station", "lat", "lon", "t2m", "ps"]].assign(rh=[50.0, np.nan, 60.0])
    first, second = frame.copy(), frame.copy()
    first.loc[[0, 2], "ps"] = np.nan
    second.loc[[0, 2], "t2m"] = np.nan
    table = read_stations(pd.concat([first, second], ignore_index=True))
    np.testing.assert_allclose(series(table, "ps"), frame["ps"], rtol=1e-6)
    np.testing.assert_allclose(series(table, "t2m"), frame["t2m"], rtol=1e-5)
    assert table.report.dropped == {"duplicate of an earlier report": 3}
    assert table.report.adjusted["reports completed from a duplicate row"] == 2


def test_many_duplicates_do_not_take_forever():
    n = 60_000
    frame = pd.DataFrame({"time": "2021-01-01", "lat": 24.0, "lon": 121.0, "t2m": np.arange(n) % 30}, index=range(n))
    start = clock.perf_counter()
    report = read_stations(frame).report
    assert clock.perf_counter() - start < 10
    assert (report.rows_kept, report.dropped["duplicate of an earlier report"]) == (1, 1999)


# ---------------------------------------------------------------------------------------------------------------- units
@pytest.mark.parametrize(
    ("column", "values", "variable", "unit"),
    [
        ("t2m", [-10, 20, 35], "2m_temperature", "degC"),
        ("t2m", [263, 293, 308], "2m_temperature", "K"),
        ("temp", [14, 68, 95], "2m_temperature", "degF"),
        ("temp_f", [14, 30, 33], "2m_temperature", "degF"),
        ("air_temp [K]", [280, 290, 300], "2m_temperature", "K"),
        ("ps", [1000, 990, 632], "surface_pressure", "hPa"),
        ("pressure", [100_000, 99_000, 63_200], "surface_pressure", "Pa"),
        ("slp", [29.5, 30.0, 30.4], "mean_sea_level_pressure", "inHg"),
        ("pres", [29.5, 30.1, 30.4], "surface_pressure", "inHg"),
        ("pres", [85.0, 99.0, 101.0], "surface_pressure", "kPa"),
        ("rh", [5, 50, 100], "2m_relative_humidity", "%"),
        ("humidity", [0.05, 0.5, 1.0], "2m_relative_humidity", "1"),
        ("clouds", [0, 4, 8], "total_cloud_cover", "oktas"),
        ("clouds", [0, 4, 10], "total_cloud_cover", "tenths"),
        ("cloud_tenths", [0, 4, 8], "total_cloud_cover", "tenths"),
        ("n", [0, 40, 90], "total_cloud_cover", "%"),
        ("vis", [100, 9999, 30_000], "visibility", "m"),
        ("vis_km", [0.1, 10, 30], "visibility", "km"),
        ("swdown", [0, 1.2, 3.5], "surface_solar_radiation_downwards", "MJ m-2"),
        ("ssrd", [0, 1.2e6, 3.5e6], "surface_solar_radiation_downwards", "J m-2"),
        ("solar", [0, 400, 1100], "mean_surface_downward_short_wave_radiation_flux", "W m-2"),
        ("sunshine", [0, 0.5, 1.0], "sunshine_duration", "h"),
        ("sunshine", [0, 60, 600], "sunshine_duration", "min"),
        ("wind_kt", [0, 20, 40], "10m_wind_speed", "kt"),
        ("wind_kmh", [0, 20, 40], "10m_wind_speed", "km h-1"),
        ("precip", [0, 0.5, 40], "total_precipitation", "mm"),
        ("uvi", [0, 5, 11], "uv_index", "1"),
        ("q", [1.5, 8.0, 18.0], "2m_specific_humidity", "g kg-1"),
        ("tmax", [15, 25, 33], "maximum_2m_temperature", "degC"),
    ],
)
def test_units_are_inferred_from_name_and_values(column, values, variable, unit):
    frame = wide(3, 1)[["time", "station", "lat", "lon"]].assign(**{column: values})
    table = read_stations(frame)
    mapping = table.columns[column]
    assert (mapping.variable, mapping.units, mapping.inferred) == (variable, unit, True)
    expected = sensors.unit(unit)
    np.testing.assert_allclose(
        table.reports.values[:, 0], np.array(values) * expected.scale + expected.offset, rtol=1e-6
    )
    np.testing.assert_allclose(series(table, column), values, rtol=1e-5, atol=1e-4)


def test_celsius_passed_as_kelvin():
    with pytest.raises(UnitError) as caught:
        read_stations(wide(), units={"t2m": "K"})
    message = str(caught.value)
    assert message.startswith(
        "column 't2m', value 21.7279 at row 0 gives 2m_temperature = 21.7279 K, outside [173.15, 335]"
    )
    assert "90 of 90 values" in message
    assert "the values look like degC: pass units={'t2m': 'degC'}" in message
    with pytest.raises(UnitError, match="look like K"):
        read_stations(wide(t2m=290.0), units={"2m_temperature": "degC"})
    with pytest.raises(UnitError, match=r"look like hPa"):
        read_stations(wide(), units={"ps": "Pa"})


def test_units_that_cannot_be():
    with pytest.raises(UnitError, match="Pa measures pressure, but 2m_temperature is a temperature in K"):
        read_stations(wide(), units={"t2m": "Pa"})
    with pytest.raises(UnitError, match="unit 'degX' is not known"):
        read_stations(wide(), units={"t2m": "degX"})
    with pytest.raises(SchemaError, match=r"units= names 'tm2', .* nearest is 't2m'"):
        read_stations(wide(), units={"tm2": "K"})
    with pytest.raises(
        UnitError, match=r"column 't2m', value 5000 .*leave the column out with columns=\{'t2m': None\}"
    ):
        read_stations(wide(t2m=5000.0))


def test_a_short_name_that_means_something_else_is_kept_as_it_is():
    table = read_stations(wide(t=5000.0 + np.arange(90), p=-3.0).drop(columns=["t2m", "ps"]))
    np.testing.assert_array_equal(series(table, "t"), 5000.0 + np.arange(90))
    assert table.variable("t") == "t"
    assert any("'t' does not look like 2m_temperature" in note for note in table.report.notes)


def test_fill_values_and_impossible_values_are_masked_and_counted():
    frame = wide(rh=50.0)
    frame.loc[:9, "t2m"] = -9999.0
    frame.loc[:79, "rh"] = 999.9  # more than half is fill, which is not a matter of units
    frame.loc[20, "ps"] = 5.0
    table = read_stations(frame)
    assert table.report.masked == {
        "t2m: fill value": 10,
        "ps: outside the valid range of surface_pressure": 1,
        "rh: fill value": 80,
    }
    assert np.isnan(series(table, "t2m")[:10]).all()


def test_two_columns_of_one_variable():
    frame = wide(temp=np.linspace(5, 9, 90)).rename(columns={"t2m": "2m_temperature"})
    table = read_stations(frame)
    assert table.variable("2m_temperature") == "2m_temperature"
    np.testing.assert_allclose(series(table, "2m_temperature"), frame["2m_temperature"], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(series(table, "temp"), frame["temp"], rtol=1e-4)
    assert any("both read as 2m_temperature" in note for note in table.report.notes)


def test_station_table_speaks_the_file_s_language():
    table = read_stations(wide())
    for name in ("t2m", "2m_temperature", "T2M", "temp"):
        assert (table.column(name), table.variable(name), table.units(name)) == ("t2m", "2m_temperature", "degC")
    assert table.to_file_units("t2m", 273.15) == 0.0
    with pytest.raises(UnknownVariableError, match=r"'ps2' is not in the table; the nearest is 'ps'"):
        table.column("ps2")


# ----------------------------------------------------------------------------------------------------------------- wind
@given(st.floats(0, 60), st.floats(0, 360))
def test_wind_components_keep_speed_and_direction(speed, direction):
    u, v = wind_components(speed, direction)
    assert np.hypot(u, v) == pytest.approx(speed, abs=1e-9)
    if speed > 1e-3:
        back = (270.0 - np.rad2deg(np.arctan2(v, u))) % 360.0  # an independent formula for the direction it blows from
        assert abs((back - direction + 180) % 360 - 180) < 1e-6


def test_wind_from_the_cardinal_points_calm_and_variable():
    u, v = wind_components([10, 10, 10, 10, 0, 0, 5, np.nan], [0, 90, 180, 270, 45, np.nan, np.nan, 90])
    np.testing.assert_allclose(u, [0, -10, 0, 10, 0, 0, np.nan, np.nan], atol=1e-12)
    np.testing.assert_allclose(v, [-10, 0, 10, 0, 0, 0, np.nan, np.nan], atol=1e-12)


def test_wind_is_derived_only_where_it_is_missing():
    frame = wide(u=np.full(90, 1.0), v=np.full(90, -2.0))
    table = read_stations(frame)
    assert table.columns["u"].derived_from == ()
    np.testing.assert_array_equal(series(table, "v"), -2.0)
    assert not {"u", "v"} & set(read_stations(wide(), derive_wind=False).columns)
    knots = read_stations(wide(), units={"ws": "kt"})
    assert (knots.units("u"), knots.columns["u"].derived_from) == ("kt", ("ws", "wd"))
    expected, _ = wind_components(wide()["ws"], wide()["wd"])
    np.testing.assert_allclose(series(knots, "u"), expected, rtol=1e-4, atol=1e-5)


def test_u_without_v_is_humidity_but_not_if_negative():
    frame = wide(u=np.linspace(20, 100, 90))
    table = read_stations(frame)
    assert (table.variable("u"), table.units("u")) == ("2m_relative_humidity", "%")
    assert any("taken as relative humidity" in note for note in table.report.notes)
    assert {"u10", "v"} <= set(table.columns)
    assert read_stations(wide(u=np.linspace(-5, 60, 90))).variable("u") == "10m_u_component_of_wind"
    assert read_stations(frame, columns={"u": "u10"}).variable("u") == "10m_u_component_of_wind"


# --------------------------------------------------------------------------------------------------------- bad
# positions
def test_bad_coordinates_in_wide_tables():
    frame = wide()
    with pytest.raises(CoordinateError, match=r"at row 0.*radians"):
        read_stations(frame.assign(lat=np.deg2rad(frame["lat"]), lon=np.deg2rad(frame["lon"])))
    swapped = frame.rename(columns={"lat": "lon", "lon": "lat"})
    with pytest.raises(CoordinateError, match=r"latitude 121 at row 0 is outside.*swapped"):
        read_stations(swapped)
    table = read_stations(frame.assign(lon=frame["lon"] + 180))
    assert table.report.adjusted == {"longitude wrapped to [-180, 180)": 90}
    with pytest.raises(TimeError, match="'soon' at row 0"):
        read_stations(frame.assign(time="soon"))
    with pytest.raises(UnknownSensorError, match="nearest registered one is 'station'"):
        read_stations(frame, sensor="stations")
    with pytest.raises(EmptyWindowError):
        read_stations(frame.iloc[:0])
    table = read_stations(frame.assign(elev=np.where(np.arange(90) < 30, 99_999.0, 50.0)))
    assert table.report.adjusted == {"height outside [-500, 9500] m set missing": 30}
    feet = read_stations(frame.rename(columns={"elev": "elev_ft"}))
    np.testing.assert_allclose(feet.reports.height, frame["elev"] * 0.3048)
    feet = read_stations(frame, units={"elev": "ft"})
    np.testing.assert_allclose(feet.reports.height, frame["elev"] * 0.3048)


def test_a_station_that_moves_is_split():
    frame = wide()
    frame.loc[45:59, ["lat", "elev"]] += [0.05, 10.0]
    table = read_stations(frame)
    assert table.reports.platforms == ("S0", "S1", "S1@2", "S2")
    assert table.report.adjusted == {"reports of a station that moved, given a new platform": 15}
    np.testing.assert_allclose(table.reports.positions().loc[["S1", "S1@2"], "latitude"], [25.0, 25.05])


# ----------------------------------------------------------------------------------------------------------- other
# files
def test_files_of_every_kind_give_the_same_reports(tmp_path):
    frame = wide()
    frame[["t2m", "ps", "ws", "wd"]] = frame[["t2m", "ps", "ws", "wd"]].round(3)
    expected = read_stations(frame).reports
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "b.csv.gz", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_csv(tmp_path / "german.csv", index=False, sep=";", decimal=",")
    frame.assign(station=frame["station"].astype("category")).astype({"t2m": np.float32, "lat": np.float32}).to_parquet(
        tmp_path / "c.parquet"
    )
    frame.set_index(["time", "station"]).to_parquet(tmp_path / "indexed.parquet")
    for path in sorted(tmp_path.iterdir()):
        reports = read_stations(path).reports
        np.testing.assert_allclose(reports.values, expected.values, rtol=1e-6, atol=1e-6, err_msg=path.name)
        np.testing.assert_array_equal(reports.time, expected.time)
        assert reports.platforms == expected.platforms
    assert read_stations(str(tmp_path / "a.csv")).report.rows_in == 90


def test_unreadable_files(tmp_path):
    wide().to_parquet(tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(SchemaError, match=r"cut\.parquet cannot be read as \.parquet; is it truncated"):
        read_stations(tmp_path / "cut.parquet")
    with pytest.raises(SchemaError, match=r"empty\.csv cannot be read"):
        read_stations(tmp_path / "empty.csv")
    with pytest.raises(SchemaError, match=r"a\.docx has no suffix"):
        read_stations(tmp_path / "a.docx")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_stations(tmp_path / "nothing.parquet")
    with pytest.raises(SchemaError, match="cannot read observations from list"):
        read_stations([1, 2])


def test_a_long_table_with_units_errors_and_flags():
    frame = pd.DataFrame(
        {
            "time_utc": pd.Timestamp("2021-01-01"),
            "platform_id": ["A", "A", "B", "B"],
            "latitude": [10.0, 10.0, 20.0, 20.0],
            "longitude": 30.0,
            "variable": ["airTemperature", "stationPressure"] * 2,
            "observation": [20.0, 1000.0, 25.0, 990.0],
            "units": ["degC", "hPa"] * 2,
            "obs_error": [0.5, 1.0] * 2,
            "qc": [0, 0, 3, 0],
        }
    )
    table, report = read_table(frame)
    assert report.dropped == {"quality flag not 0": 1}
    assert table["value"].tolist() == [293.15, 100_000.0, 99_000.0]
    assert table["obs_error"].tolist() == [0.5, 100.0, 100.0]
    with pytest.raises(UnitError, match="given in 'degC' and in 'K'"):
        read_table(frame.assign(units=["degC", "hPa", "K", "hPa"]))
    with pytest.raises(UnitError, match="look like degC"):
        read_table(frame.assign(units=["K", "hPa"] * 2))
    plain = frame.drop(columns="units").assign(variable=["2m_temperature", "surface_pressure"] * 2)
    with pytest.raises(UnitError, match=r"2m_temperature = 20 K"):  # our own names state SI
        read_table(plain)
    table, _ = read_table(plain, units={"2m_temperature": "degC", "surface_pressure": "hPa"})
    assert table["value"].tolist() == [293.15, 100_000.0, 99_000.0]


def test_one_name_means_different_things_to_different_sensors():
    frame = pd.DataFrame(
        {
            "time": pd.Timestamp("2021-01-01"),
            "platform": ["A", "47646"],
            "latitude": [10.0, 36.0],
            "longitude": 30.0,
            "pressure": [np.nan, 50_000.0],
            "sensor": ["station", "radiosonde"],
            "variable": "airTemperature",
            "value": [290.0, 250.0],
        }
    )
    table, _ = read_table(frame)
    assert dict(zip(table["sensor"], table["variable"], strict=True)) == {
        "station": "2m_temperature",
        "radiosonde": "temperature",
    }
    only = read_stations(frame)
    assert only.report.dropped == {"sensor radiosonde, not asked for": 1}
    assert only.report.rows_in == 2 == only.report.rows_kept + 1
    with pytest.raises(EmptyWindowError, match="no 'ship' report, only radiosonde, station"):
        read_stations(frame, sensor="ship")


def test_ioda_columns_with_errors_and_flags():
    frame = pd.DataFrame(
        {
            "MetaData/dateTime": pd.to_datetime(["2021-01-01", "2021-01-01", "2021-01-02"]),
            "MetaData/stationIdentification": ["A", "B", "A"],
            "MetaData/latitude": [10.0, 20.0, 10.0],
            "MetaData/longitude": 30.0,
            "ObsValue/airTemperature": [290.0, 291.0, 292.0],
            "ObsError/airTemperature": [1.0, 2.0, np.nan],
            "PreQC/airTemperature": [0, 9, 0],
            "ObsValue/windEastward": [1.0, 2.0, 3.0],
        }
    )
    table = read_stations(frame)
    assert table.reports.variables == ("2m_temperature", "10m_u_component_of_wind")
    np.testing.assert_array_equal(table.reports.values, [[290, 1], [292, 3], [np.nan, 2]])
    np.testing.assert_array_equal(table.reports.error, [[1, np.nan], [np.nan, np.nan], [np.nan, np.nan]])
    assert table.report.masked == {"ObsValue/airTemperature: quality flag not 0": 1}


def test_errors_follow_units_and_duplicates():
    frame = pd.DataFrame(
        {
            "dateTime@MetaData": ["2021-01-01T00:00Z"] * 3,
            "stationIdentification@MetaData": "A",
            "latitude@MetaData": 10.0,
            "longitude@MetaData": 30.0,
            "stationPressure@ObsValue": [1000.0, np.nan, 1001.0],
            "stationPressure@ObsError": [0.5, 0.7, 0.9],
            "airTemperature@ObsValue": [np.nan, 20.0, 21.0],
            "airTemperature@ObsError": [3.0, 2.0, 1.0],
        }
    )
    table = read_stations(frame)
    np.testing.assert_allclose(table.reports.values, [[1e5, 293.15]], rtol=1e-6)
    assert table.reports.error is not None
    np.testing.assert_allclose(table.reports.error, [[50.0, 2.0]], rtol=1e-6)  # Pa; the row the value came from
    assert table.report.dropped == {"duplicate of an earlier report": 1, "duplicate with another value": 1}


# --------------------------------------------------------------------------------------------------------------- arrays
def grid_dataset() -> xr.Dataset:
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            "t2m": (("time", "lat", "lon"), rng.normal(15, 3, (4, 3, 5)).astype(np.float32), {"units": "degC"}),
            "msl": (("time", "lat", "lon"), rng.normal(101_000, 300, (4, 3, 5)), {"units": "Pa"}),
        },
        coords={
            "time": pd.date_range("2021-01-01", periods=4, freq="6h"),
            "lat": ("lat", [10.0, 20.0, 30.0], {"standard_name": "latitude", "units": "degrees_north"}),
            "lon": ("lon", [0.0, 90.0, 180.0, 270.0, 350.0], {"units": "degrees_east"}),
        },
    )


def test_a_grid_becomes_a_table_cell_by_cell():
    data = grid_dataset()
    data["t2m"][0, 1, 2] = np.nan
    table, report = read_arrays(data)
    assert len(table) == 2 * 60 - 1
    assert report.rows_in == 60
    assert len(set(table["platform"])) == 15
    some = table[(table["variable"] == "2m_temperature") & (table["latitude"] == 20) & (table["longitude"] == -10)]
    np.testing.assert_allclose(some["value"], data["t2m"].sel(lat=20, lon=350) + 273.15, rtol=1e-6)
    reports = read_stations(data).reports
    grid = reports.grid()
    np.testing.assert_array_equal(grid.time, data.time)
    west = grid["mean_sea_level_pressure"].sel(station="10.0000_-90.0000")
    np.testing.assert_allclose(west, data["msl"].sel(lat=10, lon=270), rtol=1e-6)


def test_zarr_and_netcdf_stores(tmp_path):
    data = grid_dataset()
    data.to_zarr(tmp_path / "two.zarr", zarr_format=2)
    data.to_zarr(tmp_path / "three.zarr", zarr_format=3, consolidated=False)
    data.to_netcdf(tmp_path / "four.nc")
    expected = read_stations(data).reports
    for path in sorted(tmp_path.iterdir()):
        reports = read_stations(path).reports
        np.testing.assert_array_equal(reports.values[:, reports.index(expected.variables)], expected.values)
        assert len(read_arrays(path)[0]) == 120
    (tmp_path / "bad.nc").write_bytes(b"CDF\x01 but not really")
    with pytest.raises(SchemaError, match=r"bad\.nc cannot be opened"):
        read_arrays(tmp_path / "bad.nc")
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "none.zarr")


def test_station_trajectory_and_profile_datasets():
    stations = xr.Dataset(
        {"airTemperature": (("station", "time"), np.full((2, 3), 290.0))},
        coords={
            "time": pd.date_range("2021-01-01", periods=3, freq="3h"),
            "station": ["A", "B"],
            "lat": ("station", [10.0, 20.0]),
            "lon": ("station", [30.0, 40.0]),
            "alt": ("station", [5.0, 700.0]),
        },
    )
    reports = read_stations(stations).reports
    assert reports.platforms == ("A", "B")
    assert reports.positions()["height"].tolist() == [5.0, 700.0]
    assert reports.cadence() == 3 * 3600
    track = xr.Dataset(
        {
            "sst": ("obs", [290.0, 291.0, 292.0]),
            "lat": ("obs", [1.0, 2.0, 3.0]),
            "lon": ("obs", [10.0, 11.0, 12.0]),
            "time": ("obs", pd.date_range("2021-01-01", periods=3, freq="h")),
        }
    )
    table, _ = read_arrays(track, sensor="ship")
    assert table["latitude"].tolist() == [1.0, 2.0, 3.0]
    assert set(table["variable"]) == {"sea_surface_temperature"}
    levels = xr.Dataset(
        {"t": (("time", "level", "latitude", "longitude"), np.full((1, 3, 2, 2), 250.0))},
        coords={
            "time": pd.to_datetime(["2021-01-01"]),
            "level": [1000, 500, 250],
            "latitude": [0.0, 30.0],
            "longitude": [0.0, 90.0],
        },
    )
    table, _ = read_arrays(levels, sensor="radiosonde")
    assert sorted(set(table["pressure"])) == [25_000.0, 50_000.0, 100_000.0]
    assert len(table) == 12


def test_attributes_that_contradict_the_values():
    data = grid_dataset()
    data["t2m"].attrs["units"] = "K"
    with pytest.raises(UnitError, match="look like degC"):
        read_arrays(data)


def test_one_time_for_a_whole_field():
    data = grid_dataset().isel(time=0)
    assert len(read_arrays(data)[0]) == 30
    apart = data.drop_vars("time").assign_coords(time=("time", pd.to_datetime(["2021-01-01"])))
    assert len(read_arrays(apart)[0]) == 30
    with pytest.raises(SchemaError, match="'time' over"):
        read_arrays(data.drop_vars("time").assign_coords(time=("time", pd.date_range("2021-01-01", periods=2))))


def test_datasets_without_coordinates():
    with pytest.raises(SchemaError, match="no latitude found among"):
        read_arrays(grid_dataset().drop_vars("lat"))
    with pytest.raises(SchemaError, match="no numeric variable"):
        read_arrays(grid_dataset().drop_vars(["t2m", "msl"]))
    with pytest.raises(EmptyWindowError, match="no cells"):
        read_arrays(grid_dataset().isel(time=slice(0)))


# ------------------------------------------------------------------------------------------------------------ real
# files
def test_taiwan(taiwan_parquet):
    frame: Any = pd.read_parquet(taiwan_parquet)
    start = clock.perf_counter()
    table = read_stations(frame)
    seconds = clock.perf_counter() - start
    assert seconds < 20, seconds  # about 1 s on a quiet core
    assert table.report.rows_in == len(frame) == table.report.rows_kept + sum(table.report.dropped.values())
    assert table.report.dropped == {"no value in the row": 329}
    mountains = frame.groupby("station", observed=True)["msl"].median() > 1100
    assert mountains.sum() == 4
    high = frame["station"].isin(mountains.index[mountains])
    assert (
        table.report.masked["msl: outside the valid range of mean_sea_level_pressure"]
        == frame.loc[high, "msl"].notna().sum()
    )
    units = {
        "t2m": "degC",
        "ps": "hPa",
        "rh": "%",
        "precip": "mm",
        "swdown": "MJ m-2",
        "vis_km": "km",
        "cloud_tenths": "tenths",
        "sunshine": "h",
        "uvi": "1",
    }
    assert {name: table.units(name) for name in units} == units

    frame["u"] = np.where(frame.ws == 0, 0, -frame.ws * np.sin(np.deg2rad(frame.wd)))
    frame["v"] = np.where(frame.ws == 0, 0, -frame.ws * np.cos(np.deg2rad(frame.wd)))
    grid = table.reports.grid()
    assert (grid.sizes["time"], grid.sizes["station"]) == (13_903, 31)
    for column in ("t2m", "td2m", "ps", "u", "v", "precip", "uvi"):
        pivot = frame.pivot(index="time", columns="station", values=column)
        ours = table.to_file_units(column, grid[table.variable(column)].to_numpy().astype(np.float64))
        np.testing.assert_allclose(ours, pivot[list(grid.station.to_numpy())], rtol=2e-6, atol=3e-5, err_msg=column)
    part = table.reports.select(start="2021-03-01", end="2021-03-08")
    again = to_reports(part.to_table())["station"]
    np.testing.assert_array_equal(again.values, part.values)
    np.testing.assert_array_equal(again.time, part.time)


def test_france(shared_data):
    frame: Any = pd.read_parquet(shared_data / "france_synop_202412.parquet")
    table = read_stations(frame)
    assert table.report.rows_kept == len(frame)
    expected = {
        "u": ("2m_relative_humidity", "%"),
        "t": ("2m_temperature", "K"),
        "td": ("2m_dewpoint_temperature", "K"),
        "pmer": ("mean_sea_level_pressure", "Pa"),
        "ff": ("10m_wind_speed", "m s-1"),
        "dd": ("10m_wind_direction", "degree"),
        "vv": ("visibility", "m"),
        "n": ("total_cloud_cover", "%"),
        "u10": ("10m_u_component_of_wind", "m s-1"),
        "v": ("10m_v_component_of_wind", "m s-1"),
        "rr3": ("total_precipitation_3hr", "mm"),
    }
    assert {c: (table.variable(c), table.units(c)) for c in expected} == expected
    assert not {"date", "numer_sta", "name"} & set(table.columns)
    assert table.reports.cadence() == 3 * 3600
    assert len(table.reports.platforms) == 61
    assert "7005" in table.reports.platforms
    assert table.report.adjusted["rr1: trace (-0.1 mm) set to 0"] == int((frame["rr1"] < 0).sum())
    # The same file by the time in its integer column, and without its dialect's signs.
    dated = read_stations(frame.drop(columns="time"))
    np.testing.assert_array_equal(dated.reports.time, table.reports.time)
    plain = read_stations(frame[["numer_sta", "date", "lat", "lon", "elev", "u", "t", "dd", "ff"]])
    assert plain.variable("u") == "2m_relative_humidity"
    assert any("no v beside it" in note for note in plain.report.notes)
    grid = table.reports.grid()
    pivot = frame.pivot(index="time", columns="numer_sta", values="t")
    np.testing.assert_allclose(grid["2m_temperature"].sel(station=[str(c) for c in pivot.columns]), pivot, rtol=1e-6)


def test_metar(shared_data):
    frame: Any = pd.read_parquet(shared_data / "metar_global_2020100106.parquet")
    table = read_stations(frame)
    units = {"Temp": "degC", "Wspd": "kt", "Vis": "mi", "Altimeter": "inHg"}
    assert {name: table.units(name) for name in units} == units
    assert table.reports.times.min() == np.datetime64("2020-10-01T05:31")
    assert len(table.reports.platforms) == 4821
    assert np.nanmax(table.reports.values[:, table.reports.index(["altimeter_setting"])[0]]) < 1.05e5


def test_hirs_orbit(shared_data):
    frame: Any = pd.read_parquet(shared_data / "hirs_metop_orbit_20181122.parquet")
    table = read_stations(frame, sensor="hirs4")
    reports = table.reports
    assert reports.variables == tuple(f"brightness_temperature:{c}" for c in range(1, 20))
    assert "columns without any usable value were dropped: tb_ch20" in table.report.notes
    assert table.report.rows_in == 51_968 == len(reports) + sum(table.report.dropped.values())
    assert table.report.dropped == {"no value in the row": int(frame.filter(like="tb_").isna().all(axis=1).sum())}
    assert reports.view_angle is not None
    assert 49.0 < reports.view_angle.max() < 50.5  # the instrument scans to 49.5 degrees; the zenith angle reaches 59.5
    part = reports.take(np.arange(500))
    again = to_reports(part.to_table())["hirs4"]
    np.testing.assert_array_equal(again.values, part.values)
    np.testing.assert_array_equal(again.view_angle, part.view_angle)


def test_soundings_aircraft_and_pressure_snapshots(shared_data):
    sondes: Any = pd.read_parquet(shared_data / "pdbufr_temp.parquet")
    table = read_stations(sondes, sensor="radiosonde")
    reports = table.reports
    assert table.report.rows_in == len(sondes) == len(reports) + sum(table.report.dropped.values())
    assert {"temperature", "dewpoint_temperature", "u_component_of_wind"} <= set(reports.variables)
    assert reports.pressure is not None
    first = np.flatnonzero(reports.platform == reports.platforms.index("71907"))
    here = sondes[(sondes.WMO_station_id == 71907) & sondes[["airTemperature", "windSpeed"]].notna().any(axis=1)]
    np.testing.assert_allclose(reports.pressure[first][:5], here["pressure"].to_numpy()[:5])

    aircraft = pd.read_parquet(shared_data / "pdbufr_aircraft.parquet")
    table = read_stations(aircraft, sensor="aircraft")
    assert table.report.rows_in == 6698 == len(table.reports) + sum(table.report.dropped.values())
    assert np.nanmax(table.reports.height) == 12_500.0
    assert table.report.adjusted["platform not named, taken as one platform of the sensor's name"] == 455
    assert len(table.reports) > 6_690
    long, _ = validate(table.reports.to_table())
    assert long["sensor"].unique().tolist() == ["aircraft"]

    synop = pd.read_parquet(shared_data / "pdbufr_synop.parquet")
    table = read_stations(synop)
    seen = synop.dropna(subset="pressureReducedToMeanSeaLevel").groupby("WMO_station_id")
    assert len({p.split("@")[0] for p in table.reports.platforms}) == len(seen)


# -------------------------------------------------------------------------------------------------------------- fuzzing
JUNK = st.one_of(
    st.none(),
    st.floats(),
    st.integers(-(10**20), 10**20),
    st.text(max_size=4),
    st.sampled_from(["2021-01-01", "n/a", b"x", True, (1,), pd.NaT, -9999.0, 1e30, "12:00", "24:00"]),
)
NAMES = st.sampled_from(
    "t2m T td u v ws wd ff rh ps msl precip tp swdown vis n q foo date hour name id z pressure level tb_ch01 tb:7 "
    "value "
    "variable channel qc obs_error ObsValue/airTemperature ObsError/airTemperature PreQC/airTemperature temp_f".split()
)
COLUMN = st.one_of(
    st.lists(st.floats(-100, 2000), min_size=5, max_size=5),
    st.lists(st.sampled_from([280.0, 285.0, np.nan]), min_size=5, max_size=5),
    st.lists(JUNK, min_size=5, max_size=5),
)
GOOD = {
    "time": st.lists(
        st.sampled_from([pd.Timestamp("2021-01-01"), pd.Timestamp("2021-01-01 01:00")]), min_size=5, max_size=5
    ),
    "lat": st.lists(st.sampled_from([24.0, 24.5, 30.0]), min_size=5, max_size=5),
    "lon": st.lists(st.sampled_from([121.0, 300.0]), min_size=5, max_size=5),
    "station": st.lists(st.sampled_from(["A", "B"]), min_size=5, max_size=5),
    "elev": st.lists(st.sampled_from([0.0, 40.0, 1000.0, np.nan]), min_size=5, max_size=5),
}


@st.composite
def random_tables(draw) -> pd.DataFrame:
    """Good coordinates, of which up to two columns are missing or junk, and up to six columns of anything."""
    missing = draw(st.sets(st.sampled_from(sorted(GOOD)), max_size=1)) if draw(st.integers(0, 3)) == 0 else set()
    junk = draw(st.sets(st.sampled_from(sorted(GOOD)), max_size=1)) if draw(st.integers(0, 2)) == 0 else set()
    columns = {name: draw(COLUMN if name in junk else good) for name, good in GOOD.items() if name not in missing}
    columns |= draw(st.dictionaries(NAMES, COLUMN, min_size=1, max_size=6))
    return pd.DataFrame({name: pd.Series(values) for name, values in columns.items()})


@settings(max_examples=150)
@given(
    random_tables(),
    st.sampled_from(["station", "station", "radiosonde", "ship", "amsua"]),
    st.sampled_from(["UTC", "Asia/Taipei"]),
)
def test_read_stations_gives_a_typed_error_or_valid_reports(frame, sensor, timezone):
    try:
        table = read_stations(frame, sensor=sensor, timezone=timezone)
    except ObservationError:
        return
    reports, report = table.reports, table.report
    assert report.rows_in == len(frame) == report.rows_kept + sum(report.dropped.values())
    assert 0 < len(reports) <= len(frame)
    assert {m.variable for m in table.columns.values()} == set(reports.variables)
    assert np.isfinite(reports.latitude).all()
    assert (np.abs(reports.latitude) <= 90).all()
    assert ((reports.longitude >= -180) & (reports.longitude < 180)).all()
    assert not np.isinf(reports.values).any()
    assert np.isfinite(reports.values).any(axis=1).all()
    assert np.isfinite(reports.values).any(axis=0).all()
    for i, name in enumerate(reports.variables):
        low, high = sensors.describe(name).valid_range
        column = reports.values[:, i][np.isfinite(reports.values[:, i])].astype(np.float64)
        slack = 1e-6 * (1 + max(abs(low), abs(high)))  # values are float32; a bound may be negative
        assert ((column >= low - slack) & (column <= high + slack)).all(), name
    again = to_reports(reports.to_table())[sensor]
    np.testing.assert_array_equal(again.values[:, again.index(reports.variables)], reports.values)
    np.testing.assert_array_equal(again.time, reports.time)
