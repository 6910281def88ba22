"""Readers of archives' own formats: BUFR against tables that pdbufr made, IODA, NNJA-AI, HealDA, WeatherBench-X."""

import builtins
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from earth import archive
from earth.export import to_weatherbenchx
from earth.observations import EmptyWindowError, SchemaError, UnitError, to_reports, validate
from earth.readers import (
    MissingExtraError,
    read,
    read_bufr,
    read_ioda,
    read_stations,
    read_weatherbenchx,
    stream,
    stream_bufr,
    stream_parquet,
    stream_weatherbenchx,
)
from earth.readers.files import format_of
from earth.readers.weatherbenchx import partition_span

BUFR_FILES = {
    "aircraft": "perf_aircraft.bufr",
    "radiosonde": "temp.bufr",
    "synop": "perf_synop.bufr",
    "hirs": "M02-HIRS-HIRxxx1B-NA-1.0-20181122114854.000000000Z-20181122132602-1304602.bufr",
}
ORACLES = {
    "aircraft": "pdbufr_aircraft.parquet",
    "radiosonde": "pdbufr_temp.parquet",
    "synop": "pdbufr_synop.parquet",
    "hirs": "hirs_metop_orbit_20181122.parquet",
}
needs_pdbufr = pytest.mark.skipif(
    importlib.util.find_spec("pdbufr") is None, reason="needs the extra `readers` (pdbufr)"
)


# ---------------------------------------------------------------------------------------------------------------- BUFR
@pytest.fixture
def bufr(shared_data: Path, tmp_path: Path) -> Any:
    """The first messages of a real file as a file, cut by the lengths in their section 0."""

    def cut(kind: str, count: int | None = None) -> Path:
        data, start, end = (shared_data / "bufr" / BUFR_FILES[kind]).read_bytes(), 0, 0
        for _ in range(count or 1_000_000):
            start = data.find(b"BUFR", end)
            if start < 0:
                break
            end = start + int.from_bytes(data[start + 4 : start + 7], "big")
        (tmp_path / f"{kind}.bufr").write_bytes(data[:end])
        return tmp_path / f"{kind}.bufr"

    return cut


def oracle(shared_data: Path, kind: str, rows: int | None = None) -> pd.DataFrame:
    return pd.read_parquet(shared_data / ORACLES[kind]).iloc[:rows]


def values_of(table: pd.DataFrame, variable: str) -> pd.DataFrame:
    """Values of a variable with what locates them, sorted, at the precision of the oracles."""
    part = table[table["variable"] == variable]
    columns = {c: part[c].round(3) for c in ("latitude", "longitude", "height", "pressure")}
    return pd.DataFrame({"time": part["time"], **columns, "value": part["value"].round(3)}).sort_values(
        ["time", "latitude", "longitude", "height", "pressure", "value"], ignore_index=True
    )


def expected(frame: pd.DataFrame, column: str, height: str = "", pressure: str = "") -> pd.DataFrame:
    given = frame[frame[column].notna()].astype(dict.fromkeys(frame.select_dtypes("float32"), np.float64))
    table = given.assign(
        time=given["data_datetime"].dt.round("s").astype("datetime64[ns]"),
        value=given[column],
        variable="x",
        height=given[height] if height else np.nan,
        pressure=given[pressure] if pressure else np.nan,
        longitude=given["longitude"].where(given["longitude"] < 180, given["longitude"] - 360),
    )
    return values_of(table, "x")


@needs_pdbufr
def test_aircraft_agree_with_pdbufr(bufr, shared_data):
    table, report = read_bufr(bufr("aircraft", 400), min_confidence=0)
    frame = oracle(shared_data, "aircraft", 400)
    for variable, column in (
        ("temperature", "airTemperature"),
        ("wind_speed", "windSpeed"),
        ("wind_direction", "windDirection"),
    ):
        pd.testing.assert_frame_equal(
            values_of(table, variable), expected(frame, column, height="height"), rtol=0, atol=2e-3
        )
    assert report.rows_in == report.rows_kept + sum(report.dropped.values())
    named = set(frame["aircraftFlightNumber"].str.strip()) - {""}
    assert set(table["platform"]) - {"aircraft"} == named
    reports = to_reports(table)["aircraft"]
    u, speed = (reports.values[:, reports.index([n])[0]] for n in ("u_component_of_wind", "wind_speed"))
    assert (np.abs(u[np.isfinite(u)]) <= speed[np.isfinite(u)] + 1e-4).all()


@needs_pdbufr
def test_radiosondes_agree_with_pdbufr(bufr, shared_data):
    table, _ = read_bufr(bufr("radiosonde", 30), min_confidence=0)
    stations = pd.unique(table["platform"]).tolist()
    frame = oracle(shared_data, "radiosonde")
    frame = frame.iloc[: np.flatnonzero(frame["WMO_station_id"].astype(str).isin(stations)).max() + 1]
    for variable, column in (
        ("temperature", "airTemperature"),
        ("dewpoint_temperature", "dewpointTemperature"),
        ("wind_speed", "windSpeed"),
    ):
        pd.testing.assert_frame_equal(
            values_of(table, variable), expected(frame, column, pressure="pressure"), rtol=0, atol=2e-3
        )
    reports = to_reports(table)["radiosonde"]
    assert reports.pressure is not None
    assert np.isfinite(reports.pressure).all()
    assert {"geopotential", "u_component_of_wind"} <= set(reports.variables)


@needs_pdbufr
def test_synops_agree_with_pdbufr(bufr, shared_data):
    table, report = read_bufr(bufr("synop", 400), min_confidence=0)
    frame = oracle(shared_data, "synop", 400)
    msl = values_of(table, "mean_sea_level_pressure")
    pd.testing.assert_frame_equal(msl, expected(frame, "pressureReducedToMeanSeaLevel", "heightOfStation"), rtol=0)
    assert set(table["platform"]) <= set(frame["WMO_station_id"].astype(str))
    assert table["value"][table["variable"] == "2m_temperature"].between(200, 320).all()
    assert table["value"][table["variable"] == "total_cloud_cover"].between(0, 1).all()
    rain = table["value"][table["variable"] == "total_precipitation_6hr"]
    assert bool(rain.between(0, 0.2).all())
    assert float(rain.max()) > 0
    assert report.rows_in == report.rows_kept + sum(report.dropped.values())


@needs_pdbufr
def test_hirs_radiances_agree_with_pdbufr(bufr, shared_data):
    path = bufr("hirs", 2)
    pairs = list(stream_bufr(path, messages=1))
    assert len(pairs) == 2
    frame = oracle(shared_data, "hirs", len(pairs[0][0]) // 19)
    table = pairs[0][0]
    assert table["channel"].unique().tolist() == list(range(1, 20))  # channel 20 holds no value
    reports = to_reports(table)["hirs4"]
    assert reports.platforms == ("4",)  # Metop-A
    wanted = frame.sort_values("data_datetime", kind="stable")
    np.testing.assert_allclose(reports.latitude, wanted["latitude"], atol=1e-4)
    for channel in (1, 8, 19):
        got = reports.values[:, reports.index([f"brightness_temperature:{channel}"])[0]]
        np.testing.assert_allclose(got, wanted[f"tb_ch{channel:02d}"], atol=1e-4)
    angle = read_stations(wanted, sensor="hirs4").reports.view_angle
    assert angle is not None
    assert reports.view_angle is not None
    np.testing.assert_allclose(np.sort(reports.view_angle), np.sort(angle), atol=1e-4)


@needs_pdbufr
def test_doubtful_values_and_variables_not_asked_for(bufr):
    path = bufr("synop", 300)
    every, _ = read_bufr(path, min_confidence=0)
    good, report = read_bufr(path)
    assert report.dropped["confidence below 50 %"] > 0
    assert len(good) < len(every)
    both = every.merge(good, on=["time", "platform", "variable"])
    assert len(both) == len(good)
    some, _ = read_bufr(path, variables=["2m_temperature"], derive_wind=False)
    assert some["variable"].unique().tolist() == ["2m_temperature"]
    with pytest.raises(EmptyWindowError, match="no usable value"):
        read_bufr(path, variables=["temperature"])


@needs_pdbufr
def test_batches_in_an_archive_are_the_whole_file(bufr, tmp_path):
    path = bufr("radiosonde", 12)
    whole, _ = read_bufr(path)
    pairs = list(stream_bufr(path, messages=5))
    assert len(pairs) == 3
    archive.append(tmp_path / "a", pairs, hold=500)
    pd.testing.assert_frame_equal(archive.read(tmp_path / "a"), whole)
    table, _ = read(path)
    pd.testing.assert_frame_equal(table, whole)


@needs_pdbufr
def test_files_of_several_kinds_and_broken_ones(bufr, tmp_path):
    sondes, aircraft = bufr("radiosonde", 3).read_bytes(), bufr("aircraft", 4).read_bytes()
    mixed = tmp_path / "mixed"  # no suffix, and a bulletin's heading
    mixed.write_bytes(b"IUSV01 KWBC 081200\r\r\n" + sondes + aircraft)
    assert format_of(mixed) == "bufr"
    table, report = read_bufr(mixed, "aircraft")
    assert table["sensor"].unique().tolist() == ["aircraft"]
    assert "messages of data category 2 skipped" in report.notes
    assert read_bufr(mixed)[0]["sensor"].unique().tolist() == ["radiosonde"]
    with pytest.raises(SchemaError, match=r"holds no synop message, only data categories \[2, 4\]"):
        read_bufr(mixed, "synop")
    with pytest.raises(SchemaError, match="kind 'synops' is not known; the nearest is 'synop'"):
        read_bufr(mixed, "synops")
    mixed.write_bytes(sondes[:-200])
    with pytest.raises(SchemaError, match="cannot be decoded"):
        read_bufr(mixed)
    mixed.write_text("no messages here")
    with pytest.raises(SchemaError, match="holds no BUFR message"):
        read_bufr(mixed)
    with pytest.raises(FileNotFoundError):
        read_bufr(tmp_path / "absent.bufr")


@needs_pdbufr
def test_prepbufr_is_refused_with_a_remedy(shared_data):
    with pytest.raises(SchemaError, match=r"data category 11, .*NCEP prepbufr carries tables of its own"):
        read_bufr(shared_data / "bufr" / "rap.t06z.adpsfc.prepbufr.tm00")


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.bufr").write_bytes(b"BUFR")
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("pdbufr", "eccodes"):
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'earthmoe\[readers\]'"):
        read_bufr(tmp_path / "a.bufr")


@needs_pdbufr
def test_drifting_balloons(tmp_path):
    """The template of today's soundings (309052) states each level's displacement from the launch."""
    import eccodes

    message = eccodes.codes_bufr_new_from_samples("BUFR4")
    header = {"masterTablesVersionNumber": 36, "dataCategory": 2, "numberOfSubsets": 1, "compressedData": 0}
    for key, value in header.items():
        eccodes.codes_set(message, key, value)
    eccodes.codes_set_array(message, "inputExtendedDelayedDescriptorReplicationFactor", [2])
    eccodes.codes_set_array(message, "inputDelayedDescriptorReplicationFactor", [0])
    eccodes.codes_set(message, "unexpandedDescriptors", 309052)
    values = {"blockNumber": 10, "stationNumber": 393, "year": 2021, "month": 3, "day": 1, "hour": 11, "minute": 30}
    values |= {"second": 0, "latitude": 52.2, "longitude": 14.1, "heightOfStationGroundAboveMeanSeaLevel": 112.0}
    levels = {"timePeriod": (0, 1800), "pressure": (1e5, 3e4), "airTemperature": (280.0, 220.5)}
    levels |= {"latitudeDisplacement": (0.0, 0.25), "longitudeDisplacement": (0.0, 1.5)}
    levels |= {
        "nonCoordinateGeopotentialHeight": (120.0, 9000.0),
        "windSpeed": (3.0, 40.0),
        "windDirection": (270, 270),
    }
    values |= {f"#{i + 1}#{key}": pair[i] for key, pair in levels.items() for i in (0, 1)}
    for key, value in values.items():
        eccodes.codes_set(message, key, value)
    eccodes.codes_set(message, "pack", 1)
    with (tmp_path / "drift.bufr").open("wb") as file:
        eccodes.codes_write(message, file)
    eccodes.codes_release(message)
    reports = to_reports(read_bufr(tmp_path / "drift.bufr")[0])["radiosonde"]
    assert reports.platforms == ("10393",)
    np.testing.assert_allclose(reports.latitude, [52.2, 52.45])
    np.testing.assert_allclose(reports.longitude, [14.1, 15.6])
    np.testing.assert_array_equal(np.diff(reports.time), [1800])
    np.testing.assert_allclose(reports.values[:, reports.index(["u_component_of_wind"])[0]], [3.0, 40.0], rtol=1e-5)
    np.testing.assert_allclose(reports.values[:, reports.index(["geopotential_height"])[0]], [120.0, 9000.0])


@pytest.mark.slow
@needs_pdbufr
@pytest.mark.parametrize(
    ("kind", "variable", "column"),
    [
        ("aircraft", "temperature", "airTemperature"),
        ("radiosonde", "temperature", "airTemperature"),
        ("hirs", "brightness_temperature", ""),
    ],
)
def test_whole_files_agree_with_pdbufr(bufr, shared_data, tmp_path, kind, variable, column):
    frame = oracle(shared_data, kind)
    pairs = stream_bufr(bufr(kind), min_confidence=0)
    if kind == "hirs":
        reports = [report for _, report in pairs]
        count = int(frame.filter(like="tb_ch").notna().sum().sum())
        assert sum(report.rows_in for report in reports) == count == 938_419
        assert sum(report.dropped.get("quality flag not 0", 0) for report in reports) == 11_704
        return
    archive.append(tmp_path / "a", pairs)
    place = {"height": "height"} if kind == "aircraft" else {"pressure": "pressure"}
    got = values_of(archive.read(tmp_path / "a"), variable)
    pd.testing.assert_frame_equal(got, expected(frame, column, **place), rtol=0, atol=2e-3)


# ---------------------------------------------------------------------------------------------------------------- IODA
def ioda_file(path: Path, groups: dict, dims: dict, root: dict | None = None) -> Path:
    """Writes {group: {name: (dims, values, attributes)}} in the layout of IODA v3."""
    netcdf = pytest.importorskip("netCDF4")
    with netcdf.Dataset(path, "w") as file:
        file.setncatts({"_ioda_layout": "ObsGroup", "_ioda_layout_version": np.int32(0)})
        for name, size in dims.items():
            file.createDimension(name, size)
            file.createVariable(name, "i4", (name,))[:] = (root or {}).get(name, np.arange(size))
        for group, variables in groups.items():
            parent = file.createGroup(group)
            for name, (over, values, attributes) in variables.items():
                values = np.asarray(values)
                text = values.dtype.kind in "UO"
                fill = None if text else {"f": -3.368795e38, "i": -2147483643 if values.itemsize == 4 else -(2**62)}
                kind = str if text else values.dtype
                variable = parent.createVariable(name, kind, over, fill_value=fill and fill[values.dtype.kind])
                variable.setncatts(attributes)
                variable.set_auto_maskandscale(False)
                variable[:] = values.astype(object) if text else values
    return path


SECONDS = {"units": "seconds since 1970-01-01T00:00:00Z"}


def ioda_stations(path: Path) -> Path:
    at, start = ("Location",), int(pd.Timestamp("2021-08-01T00:00").timestamp())
    meta = {
        "latitude": (at, np.float32([10.0, 20.0, 30.0, 95.0 - 65.0]), {"units": "degrees_north"}),
        "longitude": (at, np.float32([100.0, 200.0, 300.0, 300.0]), {"units": "degrees_east"}),
        "dateTime": (at, np.int64([start, start + 60, start + 120, start + 3600]), SECONDS),
        "stationElevation": (at, np.float32([5.0, -3.368795e38, 700.0, 700.0]), {"units": "m"}),
        "height": (at, np.float32([7.0, 7.0, 702.0, 702.0]), {"units": "m"}),
        "stationIdentification": (at, np.array(["47646", "SHIP ", "ÅS", "ÅS"], dtype=object), {}),
    }
    value = {
        "airTemperature": (at, np.float32([290.0, 291.0, -3.368795e38, 293.0]), {"units": "K"}),
        "stationPressure": (at, np.float32([1000.0, 1001.0, 930.0, 931.0]), {"units": "hPa"}),
        "windEastward": (at, np.float32([1.0, 2.0, 3.0, 4.0]), {"units": "m s-1"}),
    }
    error = {"airTemperature": (at, np.float32([1.5, 1.5, 1.5, -3.368795e38]), {"units": "K"})}
    error |= {"stationPressure": (at, np.float32([0.7, 0.7, 0.8, 0.8]), {"units": "hPa"})}
    mark = {"airTemperature": (at, np.int32([0, 2, 0, 1]), {}), "stationPressure": (at, np.int32([0, 0, 9, 0]), {})}
    final = {"windEastward": (at, np.int32([0, 12, 0, -2147483643]), {})}
    groups = {"MetaData": meta, "ObsValue": value, "ObsError": error, "PreQC": mark, "EffectiveQC0": final}
    return ioda_file(path, groups, {"Location": 4})


def test_ioda_stations(tmp_path):
    path = ioda_stations(tmp_path / "sfc.nc4")
    table, report = read_ioda(path)
    reports = to_reports(table)["station"]
    assert reports.variables == ("2m_temperature", "surface_pressure", "10m_u_component_of_wind")
    assert set(reports.platforms) == {"47646", "SHIP", "ÅS"}
    order = [reports.platforms.index(p) for p in ("47646", "SHIP", "ÅS")]
    rows = [int(np.flatnonzero(reports.platform == p)[0]) for p in order]
    np.testing.assert_array_equal(reports.values[rows, 0], [290.0, np.nan, np.nan])  # PreQC 2 and missing
    np.testing.assert_array_equal(reports.values[rows, 1], [100_000.0, 100_100.0, np.nan])
    np.testing.assert_array_equal(reports.values[rows, 2], [1.0, np.nan, 3.0])
    np.testing.assert_array_equal(reports.height[rows], [5.0, np.nan, 700.0])
    assert reports.times[rows[1]] == np.datetime64("2021-08-01T00:01:00")
    assert reports.longitude[rows[1]] == -160.0
    assert reports.error is not None
    np.testing.assert_allclose(reports.error[rows, 1], [70.0, 70.0, np.nan])
    assert report.masked == {
        "airTemperature: PreQC not passed": 2,
        "stationPressure: PreQC not passed": 1,
        "windEastward: EffectiveQC0 not passed": 2,
    }
    lenient, report = read_ioda(path, preqc_max=3, effective_qc=False)
    assert len(lenient) == 10
    assert report.masked == {"stationPressure: PreQC not passed": 1}
    pd.testing.assert_frame_equal(read(path)[0], table)
    moving = read_ioda(path, sensor="aircraft", variables=["airTemperature"])[0]
    assert moving["height"].tolist() == [7.0]


def test_ioda_radiances(tmp_path):
    at, both, n = ("Location",), ("Location", "Channel"), 6
    rng = np.random.default_rng(0)
    start = int(pd.Timestamp("2021-08-01").timestamp())
    meta = {
        "latitude": (at, rng.uniform(-60, 60, n).astype(np.float32), {}),
        "longitude": (at, rng.uniform(-180, 180, n).astype(np.float32), {}),
        "dateTime": (at, np.int64(start + np.arange(n)), SECONDS),
        "satelliteIdentifier": (at, np.full(n, 224, np.int32), {}),
        "sensorZenithAngle": (at, np.float32([0, 10, 20, 30, 40, 50]), {"units": "degree"}),
        "sensorChannelNumber": (("Channel",), np.int32([1, 7, 22]), {}),
    }
    tb = rng.uniform(200, 290, (n, 3)).astype(np.float32)
    marks = np.zeros((n, 3), np.int32)
    marks[0, 1] = 13
    groups = {"MetaData": meta, "ObsValue": {"brightnessTemperature": (both, tb, {"units": "K"})}}
    groups |= {"ObsError": {"brightnessTemperature": (both, np.full((n, 3), 0.5, np.float32), {})}}
    groups |= {"EffectiveQC0": {"brightnessTemperature": (both, marks + 99, {})}}  # the last outer loop counts
    groups |= {"EffectiveQC1": {"brightnessTemperature": (both, marks, {})}}
    path = ioda_file(tmp_path / "atms.nc", groups, {"Location": n, "Channel": 3}, {"Channel": [1, 7, 22]})
    table, report = read_ioda(path, sensor="atms")
    reports = to_reports(table)["atms"]
    assert reports.variables == tuple(f"brightness_temperature:{c}" for c in (1, 7, 22))
    assert reports.platforms == ("224",)
    assert report.masked == {"brightnessTemperature: EffectiveQC1 not passed": 1}
    tb[0, 1] = np.nan
    np.testing.assert_array_equal(reports.values, tb)
    assert reports.times[0] == np.datetime64("2021-08-01T00:00:00")
    assert set(table["obs_error"]) == {0.5}
    assert reports.view_angle is not None
    assert reports.view_angle[0] == 0.0
    assert 40.0 < reports.view_angle[5] < 50.0


def test_ioda_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_ioda(tmp_path / "absent.nc")
    (tmp_path / "text.nc").write_text("no netCDF")
    with pytest.raises(SchemaError, match="cannot be opened as netCDF with groups"):
        read_ioda(tmp_path / "text.nc")
    xr.Dataset({"t2m": ("x", [1.0])}).to_netcdf(tmp_path / "plain.nc")
    with pytest.raises(SchemaError, match="has no group MetaData"):
        read_ioda(tmp_path / "plain.nc")
    assert format_of(tmp_path / "plain.nc") == "arrays"
    only: Any = {"airTemperature": (("Location",), np.zeros(2, np.float32), {})}
    path = ioda_file(tmp_path / "nowhere.nc", {"MetaData": only, "ObsValue": only}, {"Location": 2})
    with pytest.raises(SchemaError, match="has no latitude in its group MetaData, only airTemperature"):
        read_ioda(path)
    none: Any = {"latitude": (("Location",), np.zeros(0, np.float32), {})}
    path = ioda_file(tmp_path / "empty.nc", {"MetaData": none, "ObsValue": none}, {"Location": 0})
    with pytest.raises(EmptyWindowError, match="has no location"):
        read_ioda(path)


# ----------------------------------------------------------------------------------------------------- NNJA-AI, HealDA
def nnja_radiances(rows: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "OBS_TIMESTAMP": pd.date_range("2021-01-01", periods=rows, freq="s", tz="UTC"),
            "OBS_DATE": pd.Timestamp("2021-01-01").date(),
            "LAT": rng.uniform(-80, 80, rows),
            "LON": rng.uniform(-180, 180, rows),
            "SAID": 223.0,
            "SAZA": rng.uniform(0, 55, rows),
            "SOZA": 30.0,
            "FOVN": np.arange(rows) % 30,
        }
    )
    channels = {f"BRITCSTC.TMBR_{c:05d}": rng.uniform(180, 290, rows).astype(np.float32) for c in (1, 2, 15)}
    return frame.assign(**channels, **{"BRITCSTC.CHNM_00001": 1.0})


def test_nnja_radiances_in_batches_from_hive_folders(tmp_path):
    frame = nnja_radiances()
    frame.loc[3, "BRITCSTC.TMBR_00002"] = np.nan
    frame.loc[4, "BRITCSTC.TMBR_00002"] = 0.0
    for day, part in enumerate(np.array_split(np.arange(40), 2)):
        folder = tmp_path / "amsua" / f"OBS_DATE=2021-01-0{day + 1}"
        folder.mkdir(parents=True)
        frame.iloc[part].drop(columns="OBS_DATE").to_parquet(folder / "0.parquet")
    pairs = list(stream_parquet(tmp_path / "amsua", sensor="amsua", rows=15))
    assert [len(table) for table, _ in pairs] == [43, 15, 45, 15]
    assert pairs[0][1].dropped == {"brightness_temperature outside its valid range": 1}
    table, _ = read(tmp_path / "amsua", sensor="amsua")
    reports = to_reports(table)["amsua"]
    assert reports.variables == tuple(f"brightness_temperature:{c}" for c in (1, 2, 15))
    assert reports.platforms == ("223",)
    np.testing.assert_array_equal(reports.values[:, 2], frame["BRITCSTC.TMBR_00015"])
    assert reports.view_angle is not None
    assert (np.abs(reports.view_angle) < frame["SAZA"]).all()
    with pytest.raises(SchemaError, match="does not say which sensor it is of; pass sensor="):
        next(stream_parquet(tmp_path / "amsua"))
    with pytest.raises(SchemaError, match="timezone= is for plain tables"):
        next(stream_parquet(tmp_path / "amsua", sensor="amsua", timezone="UTC"))


def test_nnja_stations_and_their_quality_marks(tmp_path):
    frame = pd.DataFrame(
        {
            "OBS_TIMESTAMP": pd.to_datetime(["2021-01-01T00:00", "2021-01-01T00:00", "2021-01-01T01:00"]),
            "LAT": [50.0, 60.0, 50.0],
            "LON": [5.0, 10.0, 5.0],
            "WMOB": [6.0, np.nan, 6.0],
            "WMOS": [447.0, np.nan, 447.0],
            "RPID": ["06447", "LFPG", "06447"],
            "SELV": [104.0, np.nan, 104.0],
            "TMPSQ1.TMDB": [275.0, 280.0, 276.0],
            "TMPSQ1.TMPSQ2.TMDB": 1.0,  # a deeper sequence's does not count
            "TMPSQ1.QMAT": [2.0, 13.0, np.nan],
            "TMPSQ1.REHU": [90.0, 80.0, 70.0],
            "WNDSQ1.WSPD": [3.0, 4.0, 5.0],
            "WNDSQ1.WDIR": [0.0, 90.0, 180.0],
            "PRSSQ1.PRES": [99_000.0, 101_000.0, 99_100.0],
        }
    )
    frame.to_parquet(tmp_path / "adpsfc.parquet")
    table, report = read(tmp_path / "adpsfc.parquet", sensor="station")
    assert report.dropped == {"quality flag not 0": 1}
    reports = to_reports(table)["station"]
    assert reports.platforms == ("6447", "LFPG")
    values = {n: reports.values[:, reports.index([n])[0]].tolist() for n in reports.variables}
    np.testing.assert_array_equal(values["2m_temperature"], [275.0, 276.0, np.nan])
    np.testing.assert_allclose(values["2m_relative_humidity"], [0.9, 0.7, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(values["surface_pressure"], [99_000.0, 99_100.0, 101_000.0])
    np.testing.assert_allclose(values["10m_u_component_of_wind"], [0.0, 0.0, -4.0], atol=1e-6)
    np.testing.assert_allclose(values["10m_v_component_of_wind"], [-3.0, 5.0, 0.0], atol=1e-6)
    everything, _ = read(tmp_path / "adpsfc.parquet", sensor="station", quality_max=15)
    assert len(everything) == len(table) + 1


def test_nnja_soundings_with_a_column_per_level(tmp_path):
    frame = pd.DataFrame(
        {
            "OBS_TIMESTAMP": pd.to_datetime(["2021-01-01T12:00", "2021-01-01T12:00"]),
            "LAT": [50.0, 60.0],
            "LON": [5.0, 10.0],
            "WMOB": [6, 1],
            "WMOS": [447, 1],
            "TMDB_PRLC85000": [273.0, 263.0],
            "TMDB_PRLC50000": [253.0, np.nan],
            "QMAT_PRLC85000": [1.0, 3.0],
            "GP10_PRLC50000": [55_000.0, 54_000.0],
        }
    )
    frame.to_parquet(tmp_path / "adpupa.parquet")
    table, report = read(tmp_path / "adpupa.parquet", sensor="radiosonde")
    assert report.dropped == {"quality flag not 0": 1}
    got = sorted(zip(table["platform"], table["pressure"], table["variable"], table["value"], strict=True))
    assert got == [
        ("1001", 50_000.0, "geopotential", 54_000.0),
        ("6447", 50_000.0, "geopotential", 55_000.0),
        ("6447", 50_000.0, "temperature", 253.0),
        ("6447", 85_000.0, "temperature", 273.0),
    ]


def test_healda_wide(tmp_path):
    rows = 9
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "latitude": rng.uniform(-80, 80, rows).astype(np.float32),
            "longitude": rng.uniform(-180, 180, rows).astype(np.float32),
            "time_utc": pd.date_range("2021-01-01", periods=rows, freq="s"),
            "da_window": pd.Timestamp("2021-01-01T03:00"),
            "platform_id": np.full(rows, 224, np.uint16),
            "satellite_zenith_angle": np.linspace(0, 60, rows),
            "solar_zenith_angle": 20.0,
            "field_of_view": np.arange(rows),
            "antenna_temperature__ch_1": rng.uniform(200, 290, rows).astype(np.float32),
            "antenna_temperature__ch_22": rng.uniform(200, 290, rows).astype(np.float32),
        }
    )
    frame.to_parquet(tmp_path / "atms.parquet")
    reports = to_reports(read(tmp_path / "atms.parquet", sensor="atms")[0])["atms"]
    assert reports.variables == ("brightness_temperature:1", "brightness_temperature:22")
    np.testing.assert_array_equal(reports.values[:, 1], frame["antenna_temperature__ch_22"])
    assert reports.platforms == ("224",)


def test_healda_long_with_its_channel_table(tmp_path):
    channels = pd.DataFrame(
        {
            "Global_Channel_ID": np.arange(6, dtype=np.uint16),
            "name": ["atms_000", "atms_021", "gps_angle", "ps", "t", "u"],
            "min_valid": [0, 0, 0, 500, 150, -100],
            "max_valid": [400, 400, 0.1, 1100, 350, 100],
            "sensor_id": 0,
        }
    )
    rows = [  # channel, value, report type, platform, pressure hPa, height, QC_Flag, Analysis_Use_Flag
        (0, 250.0, None, 26, None, None, 0, None),
        (1, 240.0, None, 26, None, None, 0, None),
        (1, 239.0, None, 26, None, None, 3, None),
        (2, 0.02, 4, 27, 200.0, 11_000.0, None, 1),
        (3, 990.0, 181, 28, 990.0, 80.0, None, 1),
        (4, 281.0, 181, 30, 990.0, 80.0, None, 1),
        (4, 245.0, 120, 30, 400.0, 7_000.0, None, 1),
        (5, 30.0, 220, 31, 400.0, 7_000.0, None, -1),
        (5, 25.0, 231, 31, 250.0, 10_500.0, None, 1),
        (4, 999.0, 120, 30, 300.0, 9_000.0, None, 1),
        (9, 1.0, 120, 30, 300.0, 9_000.0, None, 1),
    ]
    names = ("Global_Channel_ID", "Observation", "Observation_Type", "Platform_ID", "Pressure", "Height")
    frame = pd.DataFrame(rows, columns=[*names, "QC_Flag", "Analysis_Use_Flag"]).astype({"Observation": np.float32})
    frame = frame.assign(Latitude=np.linspace(10, 60, len(rows)), Longitude=350.0, Scan_Angle=-30.0)
    frame = frame.assign(Absolute_Obs_Time=pd.Timestamp("2021-01-01"), DA_window=pd.Timestamp("2021-01-01"))
    folder = tmp_path / "obs" / "conv" / "20210101"
    folder.mkdir(parents=True)
    frame.to_parquet(folder / "0.parquet")
    with pytest.raises(SchemaError, match=r"no channel_table.parquet beside or above"):
        read(tmp_path / "obs")
    channels.to_parquet(tmp_path / "obs" / "channel_table.parquet")
    table, report = read(tmp_path / "obs")
    assert report.rows_in == len(rows) == report.rows_kept + sum(report.dropped.values())
    assert report.dropped == {
        "channel not in the channel table": 1,
        "channel or report type of no registered sensor": 1,
        "outside the channel table's valid range": 1,
        "quality flag not 0": 2,
    }
    got = {
        (s, v, c): x for s, v, c, x in zip(*(table[n] for n in ("sensor", "variable", "channel", "value")), strict=True)
    }
    assert got == {
        ("atms", "brightness_temperature", 1): 250.0,
        ("atms", "brightness_temperature", 22): 240.0,
        ("station", "surface_pressure", -1): 99_000.0,
        ("station", "2m_temperature", -1): 281.0,
        ("radiosonde", "temperature", -1): 245.0,
        ("aircraft", "u_component_of_wind", -1): 25.0,
    }
    sonde = table[table["sensor"] == "radiosonde"].iloc[0]
    assert (sonde["pressure"], sonde["longitude"]) == (40_000.0, -10.0)


def test_plain_parquet_tables_in_batches(tmp_path):
    times = pd.date_range("2021-01-01", periods=50, freq="h")
    frame = pd.DataFrame({"time": times, "station": "A", "lat": 24.0, "lon": 121.0, "t2m": 20.0 + np.arange(50) / 10})
    frame.to_parquet(tmp_path / "t.parquet")
    assert format_of(tmp_path / "t.parquet") == "table"
    pairs = list(stream(tmp_path / "t.parquet", rows=20))
    assert [len(table) for table, _ in pairs] == [20, 20, 10]
    archive.append(tmp_path / "a", pairs)
    whole, _ = read(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(archive.read(tmp_path / "a"), validate(whole)[0])
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-50])
    with pytest.raises(SchemaError, match="cannot be read as parquet"):
        next(stream(tmp_path / "broken.parquet"))
    with pytest.raises(FileNotFoundError):
        next(stream(tmp_path / "absent.parquet"))


def test_taiwan_into_an_archive_and_back(taiwan_parquet, tmp_path):
    frame = pd.read_parquet(taiwan_parquet)
    frame = frame[frame["time"] < "2020-06-08"]
    frame.assign(station=frame["station"].astype(str)).to_parquet(tmp_path / "week.parquet")
    archive.append(tmp_path / "a", stream(tmp_path / "week.parquet", rows=1000))
    direct = read_stations(frame, derive_wind=False).reports
    stored = to_reports(archive.read(tmp_path / "a"))["station"]
    assert {p.split("@")[0] for p in stored.platforms} == {p.split("@")[0] for p in direct.platforms}
    assert len(stored) == len(direct)
    for name in ("2m_temperature", "surface_pressure"):
        got, want = (np.sort(r.values[:, r.index([name])[0]]) for r in (stored, direct))
        np.testing.assert_allclose(got, want, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ WeatherBench-X
def record(leads: tuple[int, ...] = ()) -> xr.Dataset:
    """A record (time, station), or forecasts (init_time, lead_time, station) with a spread."""
    rng = np.random.default_rng(0)
    places = {"latitude": ("station", [10.0, 20.0]), "longitude": ("station", [30.0, -40.0])}
    places |= {"height": ("station", [5.0, 600.0]), "station": ["A", "B"]}
    times = pd.date_range("2020-01-30", periods=12, freq="6h")
    if not leads:
        values = rng.normal(280, 5, (12, 2)).astype(np.float32)
        values[3, 1] = np.nan
        return xr.Dataset(
            {"2m_temperature": (("time", "station"), values), "pollen": (("time", "station"), values - 280)},
            {"time": times, **places},
        )
    dims, shape = ("init_time", "lead_time", "station"), (12, len(leads), 2)
    mean, spread = rng.normal(280, 5, shape).astype(np.float32), rng.uniform(1, 2, shape).astype(np.float32)
    return xr.Dataset(
        {"2m_temperature": (dims, mean), "2m_temperature_spread": (dims, spread)},
        {"init_time": times, "lead_time": pd.to_timedelta(leads, "h"), **places},
    )


@pytest.mark.parametrize("by", ["month", "day", "hour"])
def test_weatherbenchx_round_trip(tmp_path, by):
    dataset = record()
    to_weatherbenchx(dataset, tmp_path / "s", partitioned_by=by)
    table, _ = read_weatherbenchx(tmp_path / "s")
    assert format_of(tmp_path / "s") == "weatherbenchx"
    grid = to_reports(table)["station"].grid(cadence="6h")
    np.testing.assert_array_equal(grid["2m_temperature"], dataset["2m_temperature"])
    np.testing.assert_array_equal(grid["pollen"], dataset["pollen"])
    np.testing.assert_array_equal(grid["time"], dataset["time"])
    for name in ("latitude", "longitude", "height"):
        np.testing.assert_array_equal(grid[name], dataset[name])
    pd.testing.assert_frame_equal(read(tmp_path / "s")[0], table)


def test_weatherbenchx_opens_the_period_only(tmp_path, monkeypatch):
    to_weatherbenchx(record(), tmp_path / "s")
    opened = []
    from earth.readers import weatherbenchx

    original = weatherbenchx.open_parquet
    monkeypatch.setattr(weatherbenchx, "open_parquet", lambda file: opened.append(file.name) or original(file))
    tables = [table for table, _ in stream_weatherbenchx(tmp_path / "s", "2020-01-31T06:00", "2020-02-01T12:00")]
    assert opened == ["2020-01-31.parquet", "2020-02-01.parquet"]
    times = sorted(set(pd.concat(tables)["time"]))
    assert (times[0], times[-1]) == (pd.Timestamp("2020-01-31T06:00"), pd.Timestamp("2020-02-01T06:00"))
    only, _ = read_weatherbenchx(tmp_path / "s", variables=["2m_temperature"])
    assert only["variable"].unique().tolist() == ["2m_temperature"]
    with pytest.raises(EmptyWindowError, match="has no value in"):
        read_weatherbenchx(tmp_path / "s", "2021-01-01")
    with pytest.raises(UnitError):
        read_weatherbenchx(tmp_path / "s", units={"2m_temperature": "degC"})
    assert partition_span("year=2020/month=12/2020-12.parquet") == (np.datetime64("2020-12"), np.datetime64("2021-01"))


def test_weatherbenchx_forecasts_need_a_lead(tmp_path):
    dataset = record((6, 12))
    to_weatherbenchx(dataset, tmp_path / "s")
    with pytest.raises(SchemaError, match=r"several leads \(6, 12 h\); choose one with lead_hours="):
        read_weatherbenchx(tmp_path / "s")
    table, _ = read_weatherbenchx(tmp_path / "s", lead_hours=12)
    reports = to_reports(table)["station"]
    assert reports.error is not None
    want = dataset.sel(lead_time=pd.Timedelta(hours=12))
    np.testing.assert_array_equal(reports.values[:, 0], want["2m_temperature"].to_numpy().T.ravel())
    np.testing.assert_array_equal(reports.error[:, 0], want["2m_temperature_spread"].to_numpy().T.ravel())
    assert reports.times.min() == np.datetime64("2020-01-30T12:00:00")
    (tmp_path / "other").mkdir()
    nnja_radiances().to_parquet(tmp_path / "other" / "x.parquet")
    with pytest.raises(SchemaError, match="has no partition such as"):
        read_weatherbenchx(tmp_path / "other")
