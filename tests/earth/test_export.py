"""earth.export: CF metadata, round trips, and WeatherBench-X's own opening rules re-implemented."""

import os

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from earth import export

NAMES = ("2m_temperature", "10m_u_component_of_wind")


def forecast(spread=True, seed=0):
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(5, 3, 4, 2)).astype(np.float32)
    mean[1, 2, 3, 0] = np.nan
    return export.to_dataset(
        mean,
        np.abs(rng.normal(size=mean.shape)) if spread else None,
        init_times=pd.date_range("2020-12-31 18:00", periods=5, freq="6h"),
        lead_hours=[6, 12, 24],
        variables=NAMES,
        stations=["a", "b", "c", "466990"],
        latitude=[1.0, 2.0, 3.0, 4.0],
        longitude=[5.0, 6.0, 7.0, 8.0],
        height=[9.0, 10.0, np.nan, 12.0],
    )


def test_dataset_is_cf():
    ds = forecast()
    assert ds["2m_temperature"].dims == ("init_time", "lead_time", "station")
    assert ds["2m_temperature"].attrs["units"] == "K"
    assert ds["2m_temperature"].attrs["standard_name"] == "air_temperature"
    assert ds["10m_u_component_of_wind"].attrs["standard_name"] == "eastward_wind"
    assert ds["2m_temperature"].attrs["ancillary_variables"] == "2m_temperature_spread"
    assert ds.init_time.attrs["standard_name"] == "forecast_reference_time"
    assert ds.lead_time.attrs["standard_name"] == "forecast_period"
    assert ds.lead_time.dtype == "timedelta64[ns]"
    assert (ds.valid_time == ds.init_time + ds.lead_time).all()
    assert ds.attrs["Conventions"].startswith("CF-")
    assert export.forecast_variables(ds) == NAMES
    np.testing.assert_array_equal(export.lead_hours_of(ds), [6, 12, 24])
    assert export.forecast_variables(forecast(spread=False)) == NAMES


def test_a_variable_that_is_called_like_a_spread_is_kept():
    ds = forecast(spread=False)[["2m_temperature"]].rename({"2m_temperature": "band_spread"})
    assert export.forecast_variables(ds) == ("band_spread",)


def test_shapes_and_spreads_are_checked():
    good = {
        "init_times": ["2021-01-01"],
        "lead_hours": [6],
        "variables": ["x"],
        "stations": ["a"],
        "latitude": [0.0],
        "longitude": [0.0],
    }
    export.to_dataset(np.zeros((1, 1, 1, 1)), **good, units={"x": "m"})
    with pytest.raises(ValueError, match=r"mean has shape \(1, 1, 2, 1\)"):
        export.to_dataset(np.zeros((1, 1, 2, 1)), **good)
    with pytest.raises(ValueError, match="spread has shape"):
        export.to_dataset(np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1)), **good)
    with pytest.raises(ValueError, match="negative"):
        export.to_dataset(np.zeros((1, 1, 1, 1)), np.full((1, 1, 1, 1), -1.0), **good)


@pytest.mark.parametrize("name", ["f.nc", "f.zarr"])
def test_files_round_trip_and_appear_complete(tmp_path, name):
    ds = forecast()
    export.write_dataset(ds, tmp_path / name)
    again = (
        xr.open_dataset(tmp_path / name, decode_timedelta=True)
        if name.endswith("nc")
        else xr.open_zarr(tmp_path / name, decode_timedelta=True)
    )
    with again:
        xr.testing.assert_allclose(again.load().reset_coords(drop=True), ds.reset_coords(drop=True))
        assert list(again.station.values) == list(ds.station.values)
        assert again["2m_temperature"].attrs["standard_name"] == "air_temperature"
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export.write_dataset(ds, tmp_path / name)
    export.write_dataset(ds.isel(station=[0]), tmp_path / name, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with pytest.raises(ValueError, match=r"\.nc"):
        export.write_dataset(ds, tmp_path / "f.grib")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    ds = forecast()
    store = tmp_path / "store"
    files = export.to_weatherbenchx(ds, store)
    before = {f: f.read_bytes() for f in files}
    calls = []

    def broken(self, path, **options):
        calls.append(path)
        if len(calls) > 1:
            raise OSError("disk full")
        path.write_bytes(b"half")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", broken)
    with pytest.raises(OSError, match="disk full"):
        export.to_weatherbenchx(ds, store, overwrite=True)
    assert {f: f.read_bytes() for f in files} == before
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_partition_names():
    time = np.datetime64("2020-01-01T07")
    assert export.partition_file(time, "day") == "year=2020/month=1/day=1/2020-01-01.parquet"
    assert export.partition_file(time, "month") == "year=2020/month=1/2020-01.parquet"
    assert export.partition_file(time, "hour") == "year=2020/month=1/day=1/hour=7/2020-01-01T07.parquet"


# ---- the opening rules of weatherbenchX/data_loaders/sparse_parquet.py, written anew
# (google-research/weatherbenchX, commit 0a0a304)
UNIT = {"month": "M", "day": "D", "hour": "h"}


def rule_files(root, start, end, partitioned_by):
    """get_parquet_files_subset: every partition from start to end, by name alone."""
    unit = UNIT[partitioned_by]
    first, last = np.datetime64(start, unit), np.datetime64(end, unit)
    names = []
    for t in np.arange(first, last + 1):
        d = t.astype("datetime64[s]").item()
        folder = {
            "month": f"year={d.year}/month={d.month}/{d:%Y-%m}.parquet",
            "day": f"year={d.year}/month={d.month}/day={d.day}/{d:%Y-%m-%d}.parquet",
            "hour": f"year={d.year}/month={d.month}/day={d.day}/hour={d.hour}/{d:%Y-%m-%dT%H}.parquet",
        }[partitioned_by]
        names.append(os.path.join(root, folder))
    return names


def rule_open(root, partitioned_by, init_times, lead_times, variables, coordinates, preprocess=None, tolerance=None):
    """SparseObservationsFromParquet(time_dim="valid_time"): filter on valid time, then init and lead written over."""
    frames = []
    for init in init_times:
        for lead in lead_times:
            valid = init + lead
            start, stop = (valid, valid) if tolerance is None else (valid - tolerance, valid + tolerance)
            around = np.timedelta64(1, "h")  # file_tolerance
            if tolerance is None:
                filters = [("valid_time", "=", pd.Timestamp(valid))]
            else:
                filters = [("valid_time", ">=", pd.Timestamp(start)), ("valid_time", "<", pd.Timestamp(stop))]
            files = rule_files(root, start - around, stop + around, partitioned_by)
            frame = pd.concat([pd.read_parquet(f, filters=filters) for f in files], ignore_index=True)
            if preprocess is not None:
                frame = preprocess(frame)
            frame = (
                frame.rename(columns={"valid_time": "valid_time"})
                .loc[:, [*variables, *coordinates, "valid_time"]]
                .copy()
            )
            frame["init_time"], frame["lead_time"] = init, lead
            frames.append(frame)
    combined = pd.concat(frames)
    combined.index = range(len(combined))
    return combined.to_xarray().set_coords([*coordinates, "valid_time", "init_time", "lead_time"])


@pytest.mark.parametrize("partitioned_by", ["month", "day", "hour"])
def test_a_forecast_opens_by_weatherbenchx_rules(tmp_path, partitioned_by):
    ds = forecast()
    export.to_weatherbenchx(ds, tmp_path / "store", partitioned_by=partitioned_by)
    inits = ds.init_time.values
    for lead in (6, 24):
        delta = np.timedelta64(lead, "h").astype("timedelta64[ns]")
        opened = rule_open(
            tmp_path / "store",
            partitioned_by,
            inits,
            [delta],
            NAMES,
            export.PLACE_COLUMNS,
            preprocess=export.select_lead(lead),
        )
        want = ds.sel(lead_time=delta)
        for name in NAMES:
            np.testing.assert_array_equal(opened[name].values.reshape(5, 4), want[name].values)
        assert list(opened.stationName.values[:4]) == ["a", "b", "c", "466990"]
        np.testing.assert_array_equal(opened.elevation.values[:4], [9, 10, np.nan, 12])
        np.testing.assert_array_equal(opened.valid_time.values.reshape(5, 4)[:, 0], want.valid_time.values)


def test_a_record_opens_by_weatherbenchx_rules(tmp_path):
    rng = np.random.default_rng(1)
    times = pd.date_range("2020-01-01", periods=30, freq="h")
    values = rng.normal(size=(30, 3))
    values[4] = np.nan
    grid = xr.Dataset(
        {"2m_temperature": (("time", "station"), values)},
        {"time": times, "station": ["x", "y", "z"], "latitude": ("station", [1.0, 2, 3])},
    )
    files = export.to_weatherbenchx(grid, tmp_path / "store")
    assert tmp_path / "store" / "year=2020/month=1/day=1/2020-01-01.parquet" in files
    zero = np.timedelta64(0, "ns")
    # The first and the last hour make the loader look into the neighbouring days.
    opened = rule_open(
        tmp_path / "store", "day", times.to_numpy()[[0, 29]], [zero], ["2m_temperature"], export.PLACE_COLUMNS
    )
    np.testing.assert_array_equal(opened["2m_temperature"].values.reshape(2, 3), values[[0, 29]])
    near = rule_open(
        tmp_path / "store",
        "day",
        times.to_numpy()[[10]],
        [zero],
        ["2m_temperature"],
        export.PLACE_COLUMNS,
        tolerance=np.timedelta64(2, "h"),
    )
    np.testing.assert_array_equal(near["2m_temperature"].values.reshape(4, 3), values[8:12])
    frame = pd.read_parquet(tmp_path / "store" / "year=2020/month=1/day=1/2020-01-01.parquet")
    assert {"init_time", "lead_time", "valid_time"} <= set(frame.columns)
    assert (frame.lead_time == pd.Timedelta(0)).all()
    assert len(frame) == 23 * 3  # the hour without a value has no rows


def test_stores_refuse_what_they_cannot_hold(tmp_path):
    ds = forecast()
    export.to_weatherbenchx(ds, tmp_path / "store", variables=["2m_temperature"])
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export.to_weatherbenchx(ds, tmp_path / "store")
    with pytest.raises(ValueError, match="partitioned_by='week'"):
        export.to_weatherbenchx(ds, tmp_path / "other", partitioned_by="week")
    with pytest.raises(ValueError, match="'x' is not in the dataset"):
        export.to_weatherbenchx(ds, tmp_path / "other", variables=["x"])
    with pytest.raises(ValueError, match="no value to write"):
        export.to_weatherbenchx(ds.where(False), tmp_path / "other")
    assert not (tmp_path / "other").exists()
