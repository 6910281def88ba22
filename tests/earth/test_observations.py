"""The canonical table: each kind of bad input, exact round trips to Reports and back, grids against pandas, fuzzing."""

import datetime
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earth import observations, sensors
from earth.observations import (
    COLUMNS,
    CoordinateError,
    DropReport,
    DuplicateError,
    EmptyWindowError,
    MissingVariableError,
    ObservationError,
    Reports,
    SchemaError,
    TimeError,
    UnitError,
    UnknownSensorError,
    UnknownVariableError,
    parse_times,
    to_reports,
    validate,
)


def table(n_times: int = 4, stations: int = 3) -> Any:
    """A good table: hourly 2 m temperature and pressure of a few stations in Taiwan, sorted."""
    rows = [
        (pd.Timestamp("2021-01-01") + pd.Timedelta(hours=t), 24.0 + s, 121.0 + s / 2, 10.0 * s, name, value, f"S{s}")
        for s in range(stations)
        for t in range(n_times)
        for name, value in (("2m_temperature", 290.0 + t + s), ("surface_pressure", 1.0e5 - 10 * t))
    ]
    frame = pd.DataFrame(rows, columns=["time", "latitude", "longitude", "height", "variable", "value", "platform"])
    return frame.assign(sensor="station")


# ------------------------------------------------------------------------------------------------------------- validate
def test_a_good_table_passes_whole_and_canonical():
    given_table = table()
    out, report = validate(given_table)
    assert list(out.columns) == list(COLUMNS)
    assert (report.rows_in, report.rows_kept, report.dropped, report.adjusted) == (24, 24, {}, {})
    assert out["time"].dtype == "datetime64[ns]"
    assert out["qc"].dtype == np.int8
    pd.testing.assert_frame_equal(
        out.loc[:, ["latitude", "longitude", "height", "value"]],
        given_table.loc[:, ["latitude", "longitude", "height", "value"]],
    )
    np.testing.assert_array_equal(out["time"], given_table["time"])
    again, second = validate(out)
    pd.testing.assert_frame_equal(again, out)
    assert second.dropped == {}


def test_the_given_table_is_not_changed():
    bad = table()
    bad.loc[3, "longitude"] = 359.0
    copy = bad.copy(deep=True)
    validate(bad)
    pd.testing.assert_frame_equal(bad, copy)


def test_nan_coordinates_are_dropped_and_counted():
    bad = table()
    bad.loc[[0, 5], "latitude"] = np.nan
    bad.loc[7, "longitude"] = np.nan
    out, report = validate(bad)
    assert report.dropped == {"coordinate missing or not a number": 3}
    assert len(out) == report.rows_kept == 21


def test_infinite_numbers_are_no_numbers():
    bad = table()
    bad.loc[0, "longitude"] = np.inf
    bad.loc[1, "value"] = 1e39  # beyond float32
    bad.loc[2, "height"] = -np.inf
    _, report = validate(bad)
    assert report.dropped == {"coordinate missing or not a number": 1, "surface_pressure outside its valid range": 1}
    assert report.adjusted["height outside [-12000, 120000] m set missing"] == 1


def test_latitude_in_radians():
    bad = table()
    bad[["latitude", "longitude"]] = np.deg2rad(bad[["latitude", "longitude"]])
    with pytest.raises(CoordinateError, match=r"latitude 0\.418879, longitude 2\.11185 at row 0.*radians.*rad2deg"):
        validate(bad)
    out, _ = validate(bad, trust_coordinates=True)
    assert len(out) == len(bad)


@pytest.mark.parametrize(
    ("sensor", "latitude", "longitude", "radians"),
    [
        ("station", [0.4, 0.4], [2.1, 2.1], False),  # one station: nothing to tell by
        ("station", [0.4, 0.45], [2.1, 2.1], True),
        ("station", [-1.43, 3.75], [5.63, 8.78], False),  # Annobon and Malabo
        ("ship", [0.4, 0.9], [1.0, 1.5], False),  # a cruise in the Gulf of Guinea
        ("ship", [-1.0, 1.2], [-3.0, 3.0], True),  # the globe in radians
        ("ship", [-1.0, 1.2], [-30.0, 3.0], False),
    ],
)
def test_radians_are_told_from_the_gulf_of_guinea(sensor, latitude, longitude, radians):
    lat, lon = np.array(latitude), np.array(longitude)
    fixed = not sensors.sensor(sensor).moving
    if radians:
        with pytest.raises(CoordinateError, match="radians"):
            observations.check_coordinates(lat, lon, fixed=fixed, report=DropReport())
    else:
        keep, _ = observations.check_coordinates(lat, lon, fixed=fixed, report=DropReport())
        assert keep.all()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("latitude", 121.5, r"latitude 121\.5 at row 9 is outside \[-90, 90\]; pass degrees north"),
        ("latitude", -999.0, r"latitude -999 at row 9 is outside \[-90, 90\]"),
        ("longitude", 361.0, r"longitude 361 at row 9 is outside \[-180, 360\]; pass degrees east"),
    ],
)
def test_impossible_coordinates_name_row_and_value(column, value, message):
    bad = table()
    bad.loc[9, column] = value
    with pytest.raises(CoordinateError, match=message):
        validate(bad)


def test_eastern_longitudes_are_wrapped_and_counted():
    bad = table()
    bad["longitude"] += 100.0  # 221 .. 222
    out, report = validate(bad)
    assert report.adjusted == {"longitude wrapped to [-180, 180)": 24}
    np.testing.assert_allclose(np.unique(out["longitude"]), [-139.0, -138.5, -138.0])
    assert set(validate(table().assign(longitude=180.0))[0]["longitude"]) == {-180.0}


def test_celsius_passed_as_kelvin():
    bad = table()
    warm = bad["variable"] == "2m_temperature"
    bad.loc[warm, "value"] -= 273.15
    with pytest.raises(UnitError) as caught:
        validate(bad)
    message = str(caught.value)
    assert "2m_temperature 16.85 at row 0" in message
    assert "12 of 12 values" in message
    assert "the value fits degC: convert it to K (x * 1 + 273.15)" in message


def test_a_few_impossible_values_are_dropped_and_counted():
    bad = table()
    bad.loc[0, "value"] = 12.0
    bad.loc[[1, 3], "value"] = [np.inf, -5.0]
    out, report = validate(bad)
    assert report.dropped == {
        "2m_temperature outside its valid range": 1,
        "surface_pressure outside its valid range": 2,
    }
    assert len(out) == 21


def test_duplicates_keep_the_first_and_conflicts_are_counted_apart():
    good = table()
    conflict = good.iloc[[4]].assign(value=lambda t: t["value"] + 1)
    out, report = validate(pd.concat([good, good.iloc[:3], conflict], ignore_index=True))
    assert report.dropped == {"duplicate of an earlier report": 3, "duplicate with another value": 1}
    pd.testing.assert_frame_equal(out, validate(good)[0])


def test_duplicates_of_moving_sensors_need_the_same_place():
    frame = pd.DataFrame(
        {
            "time": pd.Timestamp("2021-01-01"),
            "latitude": [10.0, 10.0, 11.0, 10.0],
            "longitude": 20.0,
            "height": [1000.0, 2000.0, 1000.0, 1000.0],
            "variable": "temperature",
            "value": 280.0,
            "sensor": "aircraft",
            "platform": "KL123",
        }
    )
    out, report = validate(frame)
    assert report.dropped == {"duplicate of an earlier report": 1}
    assert len(out) == 3


def test_a_channel_may_stand_in_the_variable_column():
    radiances = table(1, 1).assign(sensor="amsua", variable=["brightness_temperature:3", "brightness_temperature"])
    out, _ = validate(radiances.assign(value=250.0, channel=[-1, 7]))
    assert out["channel"].tolist() == [3, 7]
    assert set(out["variable"]) == {"brightness_temperature"}


def test_levels_and_channels_are_no_duplicates():
    sonde = pd.DataFrame(
        {
            "time": pd.Timestamp("2021-01-01"),
            "latitude": 10.0,
            "longitude": 20.0,
            "pressure": [1e5, 8.5e4, np.nan],
            "variable": "temperature",
            "value": [290.0, 280.0, 270.0],
            "sensor": "radiosonde",
            "platform": "47646",
        }
    )
    assert len(validate(sonde)[0]) == 3
    radiances = sonde.assign(pressure=np.nan, sensor="amsua", variable="brightness_temperature", channel=[1, 2, 3])
    out, _ = validate(radiances)
    assert to_reports(out)["amsua"].variables == tuple(f"brightness_temperature:{c}" for c in (1, 2, 3))


def test_unsorted_times_are_sorted_and_counted():
    good = table()
    shuffled = good.iloc[::-1].reset_index(drop=True)
    out, report = validate(shuffled)
    assert report.adjusted == {"rows out of order of time, sorted": 9}  # 3 stations, 3 steps back each
    for _, part in out.groupby("platform", observed=True):
        assert part["time"].is_monotonic_increasing
    a, b = to_reports(validate(good)[0])["station"], to_reports(out)["station"]
    assert_same(a, b)


def test_naive_times_are_taken_in_the_timezone_and_reported():
    local = table()
    local["time"] += pd.Timedelta(hours=8)
    out, report = validate(local, timezone="Asia/Taipei")
    assert "naive times taken as Asia/Taipei" in report.notes
    np.testing.assert_array_equal(out["time"], validate(table())[0]["time"])
    aware = table()
    aware["time"] = aware["time"].dt.tz_localize("UTC").dt.tz_convert("America/New_York")
    out, report = validate(aware, timezone="Asia/Taipei")
    assert not any("naive" in note for note in report.notes)
    np.testing.assert_array_equal(out["time"], validate(table())[0]["time"])


def test_unparsable_times_name_row_and_value():
    bad = table()
    bad["time"] = bad["time"].dt.strftime("%Y-%m-%dT%H:%M")
    bad.loc[5, "time"] = "yesterday-ish"
    with pytest.raises(TimeError, match=r"time 'yesterday-ish' at row 5 cannot be read; pass ISO 8601"):
        validate(bad)


def test_unknown_sensor_names_row_and_nearest():
    bad = table()
    bad.loc[4:, "sensor"] = "radiosond"
    with pytest.raises(
        UnknownSensorError, match=r"row 4: sensor 'radiosond' .* nearest registered one is 'radiosonde'"
    ):
        validate(bad)


def test_all_missing_variable_is_reported_or_an_error_if_asked_for():
    bad = table()
    bad.loc[bad["variable"] == "surface_pressure", "value"] = np.nan
    out, report = validate(bad)
    assert set(out["variable"]) == {"2m_temperature"}
    assert report.dropped == {"value missing or not a number": 12}
    assert "variable surface_pressure has no usable value and was dropped" in report.notes
    with pytest.raises(MissingVariableError, match="'surface_pressure' has no usable value"):
        validate(bad, variables=["surface_pressure"])
    with pytest.raises(MissingVariableError, match="is not in the table; the nearest is '2m_temperature'"):
        validate(bad, variables=["2m_temperatur"])


def test_asking_for_variables_drops_the_others_countably():
    out, report = validate(table(), variables=["2m_temperature"])
    assert report.dropped == {"variable not asked for": 12}
    assert len(out) == report.rows_kept == 12


def test_a_station_that_moves_is_split_and_reported():
    bad = table(n_times=6)
    hours = bad["time"].dt.hour
    moved = (bad["platform"] == "S1") & (hours >= 3)
    bad.loc[moved, "latitude"] += 0.02  # 2.2 km
    raised = (bad["platform"] == "S2") & (hours == 5)
    bad.loc[raised, "height"] += 60.0
    jitter = (bad["platform"] == "S0") & (hours % 2 == 1)
    bad.loc[jitter, ["latitude", "height"]] += [0.004, 20.0]  # 450 m, 20 m: the same station
    out, report = validate(bad)
    assert set(out["platform"]) == {"S0", "S1", "S1@2", "S2", "S2@2"}
    assert report.adjusted == {"reports of a station that moved, given a new platform": 8}
    assert "S1 (2 positions), S2 (2 positions)" in report.notes[-1]
    assert observations.base_platform("S1@2") == observations.base_platform("S1") == "S1"
    back = out[out["platform"] == "S1@2"]
    assert min(back["time"]) == pd.Timestamp("2021-01-01 03:00")


def test_a_vehicle_is_no_station():
    n = 60
    frame = pd.DataFrame(
        {
            "time": pd.Timestamp("2021-01-01") + pd.to_timedelta(np.arange(n), "h"),
            "latitude": 10 + 0.1 * np.arange(n),
            "longitude": 30.0,
            "variable": "2m_temperature",
            "value": 290.0,
            "platform": "RV Polarstern",
        }
    )
    with pytest.raises(CoordinateError, match=r"'RV Polarstern' has more than 50 positions, row 50 .*'ship'"):
        validate(frame, sensor="station")
    assert len(validate(frame, sensor="ship")[0]) == n


def test_moves_across_the_date_line_are_seen():
    latitude, height = np.zeros(3), np.zeros(3)
    report = DropReport()
    where = np.array([179.9999, 0.0, -179.9999])
    platform, names = observations.split_moves(np.zeros(3, int), ["P"], np.arange(3), latitude, where, height, report)
    assert names == ("P", "P@2")
    assert platform.tolist() == [0, 1, 0]


def test_heights_are_filled_from_the_same_station():
    bad = table()
    bad.loc[(bad["platform"] == "S2") & (bad["time"].dt.hour < 2), "height"] = np.nan
    bad.loc[bad["platform"] == "S1", "height"] = np.nan
    out, report = validate(bad)
    assert report.adjusted["height taken from the same platform's other reports"] == 4
    assert set(out.loc[out["platform"] == "S2", "height"]) == {20.0}
    assert out.loc[out["platform"] == "S1", "height"].isna().all()


def test_flags_and_missing_cells_are_counted():
    bad = table().assign(qc=0, obs_error=0.5)
    bad.loc[0, "qc"] = 2
    bad["time"] = bad["time"].astype(object)
    bad.loc[1, "time"] = None
    bad.loc[2, "platform"] = None
    bad["value"] = bad["value"].astype(object)
    bad.loc[3, "value"] = "n/a"
    bad.loc[4, "variable"] = ""
    out, report = validate(bad)
    assert report.dropped == {
        "time missing": 1,
        "variable not named": 1,
        "value missing or not a number": 1,
        "quality flag not 0": 1,
        "platform not named": 1,
    }
    assert report.rows_kept == len(out) == 19


def test_structural_errors():
    with pytest.raises(EmptyWindowError, match="no rows"):
        validate(table().iloc[:0])
    with pytest.raises(EmptyWindowError, match=r"no observation is left of 24 rows; dropped: 24 value missing"):
        validate(table().assign(value=np.nan))
    with pytest.raises(EmptyWindowError, match="24 coordinate missing"):
        validate(table().assign(latitude=np.nan))
    with pytest.raises(SchemaError, match="column 'latitude' is missing"):
        validate(table().drop(columns="latitude"))
    doubled = table()
    doubled.columns = [*doubled.columns[:-1], "value"]
    with pytest.raises(SchemaError, match="'value' occurs twice"):
        validate(doubled)
    with pytest.raises(SchemaError, match="several levels"):
        validate(table().T.T.set_axis(pd.MultiIndex.from_product([["a"], table().columns]), axis=1))


def test_without_platform_stations_are_named_by_position():
    out, report = validate(table().drop(columns="platform"))
    assert set(out["platform"]) == {"24.0000_121.0000", "25.0000_121.5000", "26.0000_122.0000"}
    assert any("named by their position" in note for note in report.notes)


def test_without_platform_vehicles_are_named_by_their_sensor():
    ships = table().assign(sensor="ship")
    ships.loc[ships["platform"] == "S0", "platform"] = ""
    out, report = validate(ships)
    assert set(out["platform"]) == {"ship", "S1", "S2"}
    assert report.dropped == {}
    assert report.adjusted == {"platform not named, taken as one platform of the sensor's name": 8}


# ---------------------------------------------------------------------------------------------------------------- times
NOON = int(datetime.datetime(2024, 12, 1, 12, tzinfo=datetime.UTC).timestamp())


@pytest.mark.parametrize(
    "values",
    [
        pd.Series(pd.to_datetime(["2024-12-01 12:00"])),
        pd.Series(pd.to_datetime(["2024-12-01 20:00+08:00"])),
        pd.Series(pd.to_datetime(["2024-12-01 12:00"]).astype("datetime64[ms]")),
        pd.Series(["2024-12-01T12:00:00Z"]),
        pd.Series(["2024-12-01 20:00+0800"]),
        pd.Series(["2024-12-01T12"]),
        pd.Series(["20241201120000"]),
        pd.Series(["2024120112"]),
        pd.Series([20241201120000]),
        pd.Series([202412011200]),
        pd.Series([2024120112]),
        pd.Series([float(NOON)]),
        pd.Series([NOON]),
        pd.Series([str(NOON)]),
        pd.Series([NOON * 1000]),
        pd.Series([NOON * 10**6]),
        pd.Series([NOON * 10**9]),
        pd.Series([datetime.datetime(2024, 12, 1, 12)], dtype=object),
        pd.Series([datetime.datetime(2024, 12, 1, 12, tzinfo=datetime.UTC)], dtype=object),
        pd.Series(["2024-12-01 12:00"], dtype="category"),
        pd.Series([pd.Timestamp("2024-12-01 12:00")], dtype="category"),
        pd.Series([np.datetime64("2024-12-01T12")], dtype=object),
        pd.Series(pd.to_datetime(["2024-12-01 12:00:00.4"])),
        pd.Series(pd.to_datetime(["2024-12-01 11:59:59.5"])),
    ],
)
def test_times_of_any_form(values):
    assert parse_times(values).tolist() == [NOON]


def test_hour_24_is_the_next_midnight():
    midnight = NOON + 12 * 3600
    for value in ("2024-12-01 24:00", "2024-12-01T24:00:00", "20241201240000"):
        assert parse_times(pd.Series([value])).tolist() == [midnight]
    assert parse_times(pd.Series([2024120124])).tolist() == [midnight]


@pytest.mark.parametrize("timezone", ["Asia/Taipei", "+08:00", "UTC+8"])
def test_naive_text_and_numbers_are_local_but_unix_is_not(timezone):
    assert parse_times(pd.Series(["2024-12-01 20:00"]), timezone).tolist() == [NOON]
    assert parse_times(pd.Series([20241201200000]), timezone).tolist() == [NOON]
    assert parse_times(pd.Series([NOON]), timezone).tolist() == [NOON]
    assert parse_times(pd.Series(["2024-12-01 20:00", "2024-12-01 12:00Z"]), timezone).tolist() == [NOON, NOON]


def test_daylight_saving_gaps_become_missing_and_are_counted():
    report = DropReport()
    clock = pd.Series(pd.to_datetime(["2021-03-28 02:30", "2021-10-31 02:30", "2021-07-01 12:00"]))
    seconds = parse_times(clock, "Europe/Paris", report)
    assert (seconds == observations.MISSING_TIME).tolist() == [True, True, False]
    assert seconds[2] == np.datetime64("2021-07-01T10:00:00").astype(int)
    assert report.adjusted == {"clock times skipped or repeated by Europe/Paris set missing": 2}


def test_the_whole_of_a_real_year_in_paris_agrees_with_pandas():
    utc = pd.date_range("2021-01-01", "2021-12-31", freq="h", tz="UTC")
    local = utc.tz_convert("Europe/Paris")
    seconds = parse_times(pd.Series(local.tz_localize(None)), "Europe/Paris")
    good = seconds != observations.MISSING_TIME
    assert (~good).sum() == 2
    np.testing.assert_array_equal(
        seconds[good], utc[good].tz_localize(None).to_numpy().astype("datetime64[s]").astype(int)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([12.5, 13.5], r"time 13\.5 at row 1 is neither a date such as 2024120103 nor a Unix time"),
        ([np.inf], r"at row 0 is infinite"),
        (["2024-13-45"], r"'2024-13-45' at row 0 cannot be read"),
        ([True], "are no points in time"),
        (["0012-01-01"], "outside the years 1700..2250"),
    ],
)
def test_times_that_are_none(values, message):
    with pytest.raises(TimeError, match=message):
        parse_times(pd.Series(values))


def test_unknown_timezone():
    with pytest.raises(TimeError, match=r"'Asia/Tapei' is not known; pass an IANA name"):
        parse_times(pd.Series(["2024-12-01"]), "Asia/Tapei")


def test_impossible_calendar_numbers_are_not_dates():
    # 30 February: no date, and far too large for Unix seconds, so milliseconds since 1970 would be year 2611.
    with pytest.raises(TimeError):
        parse_times(pd.Series([20240230000000]))


# -------------------------------------------------------------------------------------------------------------- Reports
def assert_same(a: Reports, b: Reports) -> None:
    assert (a.sensor, a.variables, a.platforms) == (b.sensor, b.variables, b.platforms)
    for name in ("platform", "time", "latitude", "longitude", "height", "values", "error", "view_angle", "pressure"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype, name
            np.testing.assert_array_equal(x, y, err_msg=name)


@st.composite
def random_reports(draw) -> dict:
    """The fields of some Reports. (Building them here would call beartype, which draws from `random`.)"""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sensor = draw(st.sampled_from(["station", "radiosonde", "amsua"]))
    n, p = draw(st.integers(1, 30)), draw(st.integers(1, 4))
    names = {
        "station": ("10m_wind_speed", "2m_temperature", "zz own"),
        "radiosonde": ("temperature", "wind_speed"),
        "amsua": ("brightness_temperature:2", "brightness_temperature:11"),
    }[sensor]
    moving = sensors.sensor(sensor).moving
    if moving:  # several reports at one time and platform, told apart by position or pressure
        platform, time = np.sort(rng.integers(0, p, n)), np.zeros(n, int)
        order = np.lexsort((time, platform))
    else:
        cells = np.sort(rng.choice(p * 40, min(n, p * 40), replace=False))
        platform, time = cells // 40, cells % 40 * 3600
        order = slice(None)
    n = len(platform)
    values = rng.normal(280, 5, (n, len(names))).astype(np.float32)
    hole = rng.random(values.shape) < 0.3
    hole[np.arange(n), rng.integers(0, len(names), n)] = False
    values[hole] = np.nan
    values[:, 0] = np.where(hole[:, 0] & (np.arange(n) > 0), values[:, 0], 3.5)
    used = np.unique(platform)
    error = np.where(np.isnan(values), np.nan, 0.5) if draw(st.booleans()) else None
    place = rng.uniform(-60, 60, (n if moving else p, 2))
    at = np.arange(n) if moving else platform
    keep = np.atleast_1d(np.isfinite(values).any(axis=0))
    return {
        "sensor": sensor,
        "variables": tuple(name for name, k in zip(names, keep, strict=True) if k),
        "platforms": tuple(f"P{9 - u}" for u in used),
        "platform": np.searchsorted(used, platform)[order],
        "time": time[order],
        "latitude": place[at, 0],
        "longitude": place[at, 1],
        "height": np.where(rng.random(len(place)) < 0.5, np.nan, 100.0)[at],
        "values": values[:, keep],
        "error": None if error is None else error[:, keep],
        "view_angle": rng.uniform(0, 50, n) if sensor == "amsua" else None,
        "pressure": rng.uniform(1e3, 1e5, n) if sensor == "radiosonde" else None,
    }


@given(random_reports())
def test_reports_to_table_and_back_is_exact(fields):
    reports = Reports(**fields)
    long = reports.to_table()
    assert len(long) == np.isfinite(reports.values).sum()
    again = to_reports(long)
    assert list(again) == [reports.sensor]
    assert_same(again[reports.sensor], reports)


@settings(max_examples=40)
@given(random_reports(), st.randoms(use_true_random=False))
def test_row_order_and_text_columns_do_not_matter_to_the_content(fields, random):
    reports = Reports(**fields)
    long = reports.to_table()
    order = list(range(len(long)))
    random.shuffle(order)
    plain = long.astype(dict.fromkeys(("variable", "sensor", "platform"), str)).iloc[order].reset_index(drop=True)
    again = to_reports(plain)[reports.sensor]
    key = ["platform", "time", "latitude", "pressure", "variable", "channel"]
    a, b = (
        t.astype(dict.fromkeys(("variable", "sensor", "platform"), str)).sort_values(key).reset_index(drop=True)
        for t in (again.to_table(), long)
    )
    pd.testing.assert_frame_equal(a, b)


def test_to_reports_rejects_repeats_and_wrong_tables():
    out, _ = validate(table())
    with pytest.raises(DuplicateError, match=r"row 24 repeats 2m_temperature of platform 'S0' at 2021-01-01T00:00:00"):
        to_reports(pd.concat([out, out.iloc[:1]], ignore_index=True))
    with pytest.raises(SchemaError, match="column 'channel' is missing"):
        to_reports(out.drop(columns="channel"))
    with pytest.raises(EmptyWindowError):
        to_reports(out.iloc[:0])


def test_reports_check_their_shape():
    good = to_reports(validate(table())[0])["station"]
    with pytest.raises(SchemaError, match=r"values has shape \(12, 1\), not \(12, 2\)"):
        replace(good, values=good.values[:, :1])
    with pytest.raises(SchemaError, match="sorted by"):
        replace(good, time=good.time[::-1])
    with pytest.raises(SchemaError, match="not indices into 1 platforms"):
        replace(good, platforms=("S0",))
    with pytest.raises(SchemaError, match="twice"):
        replace(good, variables=("a", "a"))


def test_select_and_take():
    reports = to_reports(validate(table())[0])["station"]
    part = reports.select(
        variables=["surface_pressure"], platforms=["S2", "S0"], start="2021-01-01T01:00", end="2021-01-01T03:00"
    )
    assert part.platforms == ("S0", "S2")
    assert part.platform.tolist() == [0, 0, 1, 1]
    assert part.times.tolist() == [datetime.datetime(2021, 1, 1, h) for h in (1, 2, 1, 2)]
    np.testing.assert_array_equal(part.values[:, 0], [99_990, 99_980] * 2)
    assert part.latitude.tolist() == [24.0, 24.0, 26.0, 26.0]
    with pytest.raises(UnknownVariableError, match="nearest is '2m_temperature'"):
        reports.select(variables=["2m_temperatur"])
    with pytest.raises(SchemaError, match="platform 'S9' is not among"):
        reports.select(platforms=["S9"])
    with pytest.raises(
        EmptyWindowError, match=r"no station report in \[2030-01-01, None\).*2021-01-01T00:00:00 to 2021-01-01T03"
    ):
        reports.select(start="2030-01-01")
    assert len(reports.take(reports.platform == 1)) == 4
    assert reports.positions().loc["S1"].tolist() == [25.0, 121.5, 10.0]


# ----------------------------------------------------------------------------------------------------------------- grid
@pytest.mark.parametrize("cadence", [600, 3600, 10_800, 86_400])
def test_grid_equals_a_pandas_pivot(cadence):
    rng = np.random.default_rng(cadence)
    stations, steps = 5, 60
    present = np.sort(rng.choice(stations * steps, 220, replace=False))
    start = int(np.datetime64("2021-02-27T00:00:00").astype(int)) + (7 * 60 if cadence > 600 else 0)
    frame = pd.DataFrame(
        {
            "time": pd.to_datetime(start + present % steps * cadence, unit="s"),
            "latitude": 20.0 + present // steps,
            "longitude": 5.0,
            "variable": "2m_temperature",
            "value": rng.normal(290, 5, present.size),
            "platform": [f"S{p // steps}" for p in present],
        }
    )
    reports = to_reports(validate(frame, sensor="station")[0])["station"]
    assert reports.cadence() == cadence
    grid = reports.grid()
    assert grid.attrs == {"sensor": "station", "cadence_seconds": cadence, "snapped": 0, "collisions": 0}
    pivot = frame.pivot(index="time", columns="platform", values="value")
    pivot = pivot.reindex(pd.date_range(pivot.index[0], pivot.index[-1], freq=f"{cadence}s"))
    np.testing.assert_array_equal(grid["2m_temperature"].to_numpy(), pivot.to_numpy(np.float32))
    np.testing.assert_array_equal(grid.time.to_numpy(), pivot.index.to_numpy("datetime64[ns]"))
    assert grid.station.to_numpy().tolist() == list(pivot.columns)
    assert grid["2m_temperature"].attrs == {"units": "K", "standard_name": "air_temperature"}
    np.testing.assert_array_equal(grid.latitude, [20, 21, 22, 23, 24])


def one_station(minutes, values=None):
    frame = pd.DataFrame(
        {
            "time": pd.Timestamp("2021-01-01") + pd.to_timedelta(minutes, "m"),
            "latitude": 20.0,
            "longitude": 5.0,
            "variable": "2m_temperature",
            "value": 280.0 + np.arange(len(minutes)) if values is None else values,
            "platform": "A",
        }
    )
    return to_reports(validate(frame, sensor="station")[0])["station"]


def test_off_grid_times_are_snapped_and_the_nearest_wins():
    reports = one_station([0, 60, 120, 178, 181, 240, 330, 420])
    grid = reports.grid()
    # 178 and 181 both belong to 180: 181 is nearer. 330 lies half way: it goes to 360.
    np.testing.assert_array_equal(grid["2m_temperature"].to_numpy()[:, 0], [280, 281, 282, 284, 285, np.nan, 286, 287])
    assert (grid.attrs["snapped"], grid.attrs["collisions"], grid.attrs["cadence_seconds"]) == (3, 1, 3600)


def test_gaps_of_the_nearer_report_are_filled_by_the_farther():
    frame = pd.DataFrame(
        {
            "time": pd.to_datetime(["2021-01-01 00:00", "2021-01-01 01:00", "2021-01-01 01:05"]),
            "latitude": 20.0,
            "longitude": 5.0,
            "variable": ["2m_temperature", "2m_temperature", "surface_pressure"],
            "value": [280.0, 281.0, 1e5],
            "platform": "A",
        }
    )
    grid = to_reports(validate(frame, sensor="station")[0])["station"].grid(cadence="1h")
    assert grid["surface_pressure"].to_numpy().ravel().tolist()[1] == 1e5
    assert grid["2m_temperature"].to_numpy().ravel().tolist() == [280.0, 281.0]


def test_grid_of_a_span():
    reports = one_station(np.arange(0, 600, 60))
    grid = reports.grid(start="2020-12-31T22:00", end="2021-01-01T03:00")
    assert grid.sizes["time"] == 6
    np.testing.assert_array_equal(
        np.isnan(grid["2m_temperature"].to_numpy()[:, 0]), [True, True, False, False, False, False]
    )
    three = reports.grid(cadence="3h")
    assert three.sizes["time"] == 4
    with pytest.raises(EmptyWindowError, match="no station report between 2022"):
        reports.grid(start="2022-01-01", end="2022-01-02")
    with pytest.raises(TimeError, match="cadence 'often' cannot be read"):
        reports.grid(cadence="often")
    with pytest.raises(TimeError, match="not positive"):
        reports.grid(cadence=0)


def test_grid_refuses_moving_sensors_and_absurd_sizes():
    ship = Reports(
        "ship",
        ("2m_temperature",),
        ("A",),
        np.zeros(1),
        np.zeros(1),
        np.zeros(1),
        np.zeros(1),
        np.zeros(1),
        np.ones((1, 1)),
    )
    with pytest.raises(SchemaError, match="'ship' moves"):
        ship.grid()
    with pytest.raises(ObservationError, match="too large; pass a coarser cadence"):
        one_station([0, 60 * 24 * 365 * 100]).grid(cadence=1)


# -------------------------------------------------------------------------------------------------------------- fuzzing
JUNK = st.one_of(
    st.none(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-(10**20), 10**20),
    st.text(max_size=5),
    st.sampled_from(
        [
            "2021-01-01",
            "2m_temperature",
            "station",
            "nan",
            "",
            "1e400",
            b"x",
            pd.NaT,
            True,
            (1, 2),
            pd.Timestamp("2021-01-01"),
        ]
    ),
    st.lists(st.integers(), max_size=1),
)


GOOD = {
    "time": (pd.Timestamp("2021-01-01"), pd.Timestamp("2021-01-01 01:00")),
    "latitude": (24.0, 25.0),
    "longitude": (121.0, 300.0),
    "variable": ("2m_temperature", "own", "brightness_temperature:4"),
    "value": (280.0, 290.0, 12.0),
    "platform": ("A", "B", 1, 2.0),
    "sensor": ("station", "ship"),
    "height": (0.0, 100.0, np.nan),
    "pressure": (1e5, np.nan),
    "channel": (-1, 3),
    "obs_error": (0.5, -1.0),
    "view_angle": (0.0, 10.0),
    "qc": (0, 0, 1),
    "other": ("x", 1),
}
NEEDED = ("time", "latitude", "longitude", "variable", "value")


@st.composite
def long_tables(draw) -> pd.DataFrame:
    """Six rows of plausible cells; in up to two columns any cell may be junk."""
    optional = draw(st.sets(st.sampled_from([name for name in GOOD if name not in NEEDED])))
    names = [*NEEDED, *sorted(optional)]
    junk = draw(st.sets(st.sampled_from(names), max_size=2))
    cells = {
        name: st.one_of(st.sampled_from(good), JUNK) if name in junk else st.sampled_from(good)
        for name, good in GOOD.items()
    }
    return pd.DataFrame({name: pd.Series(draw(st.lists(cells[name], min_size=6, max_size=6))) for name in names})


def check_invariants(out: Any, report: DropReport, rows_in: int) -> None:
    assert list(out.columns) == list(COLUMNS)
    assert report.rows_in == rows_in == report.rows_kept + sum(report.dropped.values())
    assert len(out) == report.rows_kept > 0
    assert all(count > 0 for counts in (report.dropped, report.masked, report.adjusted) for count in counts.values())
    assert out["time"].dtype == "datetime64[ns]"
    assert out[["time", "latitude", "longitude", "value", "channel", "qc"]].notna().all().all()
    assert out["latitude"].between(-90, 90).all()
    assert ((out["longitude"] >= -180) & (out["longitude"] < 180)).all()
    assert np.isfinite(out["value"]).all()
    assert (out["qc"] == 0).all()
    assert set(out["sensor"]) <= set(sensors.SENSORS)
    for name, values in out.groupby("variable", observed=True)["value"]:
        low, high = sensors.describe(str(name)).valid_range
        assert values.between(low, high).all()
    for _, part in out.groupby(["sensor", "platform"], observed=True):
        assert part["time"].is_monotonic_increasing
    again, second = validate(out, trust_coordinates=True)
    assert second.dropped == {}
    pd.testing.assert_frame_equal(again, out)
    for reports in to_reports(out).values():
        assert_same(to_reports(reports.to_table())[reports.sensor], reports)


@settings(max_examples=100)
@given(long_tables(), st.sampled_from(["UTC", "Asia/Taipei"]), st.booleans())
def test_validate_gives_a_typed_error_or_a_valid_table(frame, timezone, trust):
    try:
        out, report = validate(frame, timezone=timezone, trust_coordinates=trust)
    except ObservationError:
        return
    check_invariants(out, report, len(frame))
