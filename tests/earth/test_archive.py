"""The archive: exact round trips, any order of arrival, crashes, bounded memory, and which chunks a read touches."""

import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import zarr

from earth import archive
from earth.archive import LOG, ROWS, ArchiveConfig, ArchiveError, append, create, read, spans, stream
from earth.observations import EmptyWindowError, MissingVariableError, SchemaError, to_reports, validate

SMALL = ArchiveConfig(chunk=64)


def canonical(days: int = 4, stations: int = 3, seed: int = 0) -> pd.DataFrame:
    """Hourly stations, a sounding and a radiometer a day: heights, pressures, channels, errors and angles."""
    rng = np.random.default_rng(seed)
    parts = []
    for day in range(days):
        start = pd.Timestamp("2021-03-01") + pd.Timedelta(days=day)
        for variable, level in (("2m_temperature", 280.0), ("surface_pressure", 1e5)):
            n = 24 * stations
            rows = {"time": np.repeat(pd.date_range(start, periods=24, freq="h"), stations), "variable": variable}
            rows |= {"platform": np.tile([f"S{s}" for s in range(stations)], 24), "value": level + rng.normal(size=n)}
            rows |= {"latitude": np.tile(20.0 + np.arange(stations), 24), "longitude": 120.0, "height": 5.0}
            parts.append(pd.DataFrame(rows).assign(sensor="station", obs_error=0.1))
        levels = pd.DataFrame({"pressure": np.linspace(1e5, 1e4, 20), "value": 250 + rng.normal(size=20)})
        levels = levels.assign(time=start, variable="temperature", platform="47646", latitude=36.0, longitude=140.0)
        parts.append(levels.assign(sensor="radiosonde"))
        scan = pd.DataFrame({"latitude": rng.uniform(-60, 60, 9), "longitude": rng.uniform(-180, 180, 9)})
        scan = scan.assign(time=start + pd.to_timedelta(np.arange(9), "s"), platform="npp", view_angle=12.5)
        for channel in (1, 22):
            parts.append(scan.assign(channel=channel, value=250.0 + rng.normal(size=9), sensor="atms"))
            parts[-1]["variable"] = "brightness_temperature"
    table = pd.concat(parts, ignore_index=True)
    return validate(table.fillna({"channel": -1}))[0]


def by_day(table: pd.DataFrame) -> list[pd.DataFrame]:
    return [part for _, part in table.groupby(table["time"].dt.floor("D"))]


# ----------------------------------------------------------------------------------------------------------- round trip
def test_a_table_comes_back_exactly(tmp_path):
    table = canonical()
    report = append(tmp_path / "a", [table], config=SMALL)
    assert (report.rows_in, report.rows_kept, report.dropped) == (len(table), len(table), {})
    back = read(tmp_path / "a")
    pd.testing.assert_frame_equal(back, table)  # dtypes, categories and order too
    again = to_reports(back)
    assert sorted(again) == ["atms", "radiosonde", "station"]
    np.testing.assert_array_equal(again["atms"].values, to_reports(table)["atms"].values)


def test_the_order_of_arrival_does_not_matter(tmp_path):
    table = canonical()
    # One table per platform touches every day; a bound of 50 rows writes the days many times over.
    pieces = [part for _, part in table.groupby(["sensor", "platform"], observed=True)]
    report = append(tmp_path / "a", reversed(pieces), config=SMALL, hold=50)
    assert report.rows_kept == len(table)
    pd.testing.assert_frame_equal(read(tmp_path / "a"), table)
    # Chunks of replaced segments are gone: as many are left as the time index names.
    index = spans(tmp_path / "a")
    chunks = int(np.ceil(index["rows"] / SMALL.chunk).sum())
    assert len([p for p in (tmp_path / "a" / ROWS).glob("*/value/c/*") if not p.name.startswith(".")]) == chunks


def test_pairs_of_table_and_report_as_readers_give_them(tmp_path):
    table = canonical(1)
    append(tmp_path / "a", ((part, report) for part, report in [validate(table)]))
    pd.testing.assert_frame_equal(read(tmp_path / "a"), table)


def test_appending_again_changes_nothing_and_the_first_value_stays(tmp_path):
    table = canonical()
    append(tmp_path / "a", by_day(table), config=SMALL)
    log = (tmp_path / "a" / LOG).read_bytes()
    report = append(tmp_path / "a", by_day(table))
    assert (report.rows_in, report.rows_kept) == (len(table), 0)
    assert report.dropped == {"duplicate of an earlier row": len(table)}
    assert (tmp_path / "a" / LOG).read_bytes() == log
    other = table.assign(value=table["value"] + 1.0)
    assert append(tmp_path / "a", [other]).dropped == {"duplicate with another value": len(table)}
    pd.testing.assert_frame_equal(read(tmp_path / "a"), table)


def test_a_moving_platform_may_be_at_two_places_and_a_fixed_one_not(tmp_path):
    row = canonical(1).query("sensor == 'station'").head(1)
    ship = row.assign(sensor="ship")
    both = [row, row.assign(latitude=row["latitude"] + 1e-4), ship, ship.assign(latitude=ship["latitude"] + 1.0)]
    report = append(tmp_path / "a", both)
    assert report.dropped == {"duplicate of an earlier row": 1}
    assert read(tmp_path / "a")["sensor"].tolist() == ["ship", "ship", "station"]


def test_a_station_that_moved_between_tables_is_split_by_validate(tmp_path):
    day, next_day = by_day(canonical(2).query("platform == 'S0'"))
    append(tmp_path / "a", [day, next_day.assign(latitude=next_day["latitude"] + 1.0)])
    table = read(tmp_path / "a")
    assert set(table["platform"]) == {"S0"}
    assert set(validate(table)[0]["platform"]) == {"S0", "S0@2"}


def test_names_and_times_survive(tmp_path):
    table = canonical(1).query("sensor == 'station'").reset_index(drop=True)
    table["platform"] = table["platform"].cat.rename_categories({"S0": 'Zürich|"1"', "S1": "0123", "S2": "台北\n2"})
    table["time"] += pd.Timedelta(123_456_789, "ns")
    append(tmp_path / "a", [table])
    back = read(tmp_path / "a")
    assert set(back["platform"]) == {'Zürich|"1"', "0123", "台北\n2"}
    assert set(back["time"]) == set(table["time"])


# ------------------------------------------------------------------------------------------------------------ selection
def test_periods_sensors_and_variables(tmp_path):
    table = canonical()
    append(tmp_path / "a", by_day(table), config=SMALL)
    low, high = "2021-03-02T06:00", pd.Timestamp("2021-03-03T12:00")
    part = table[(table["time"] >= low) & (table["time"] < high)]
    back = read(tmp_path / "a", low, high)
    assert back["value"].tolist() == part["value"].tolist()
    seconds = int(pd.Timestamp(low).timestamp())
    pd.testing.assert_frame_equal(read(tmp_path / "a", seconds, high), back)
    back = read(tmp_path / "a", sensors=["atms", "station"], variables=["brightness_temperature", "surface_pressure"])
    wanted = table[table["variable"].isin(["brightness_temperature", "surface_pressure"])]
    assert back["value"].tolist() == wanted["value"].tolist()
    assert list(back["variable"].cat.categories) == ["surface_pressure", "brightness_temperature"]
    tables = list(stream(tmp_path / "a", low, sensors=["station"]))
    assert [t["time"].min() for t in tables] == [pd.Timestamp(t) for t in (low, "2021-03-03", "2021-03-04")]
    whole = pd.concat(tables, ignore_index=True)
    assert validate(whole)[0]["value"].tolist() == read(tmp_path / "a", low, sensors=["station"])["value"].tolist()


def test_the_time_index(tmp_path):
    table = canonical()
    append(tmp_path / "a", by_day(table), config=SMALL)
    index = spans(tmp_path / "a")
    assert int(index["rows"].sum()) == len(table)
    station = index[index["sensor"] == "station"]
    assert station["start"].tolist() == list(pd.date_range("2021-03-01", periods=4))
    assert (station["last"] - station["first"]).unique().tolist() == [pd.Timedelta(hours=23)]


def test_a_day_is_read_from_its_own_chunks_only(tmp_path, monkeypatch):
    table = canonical(6).query("sensor == 'station'")
    append(tmp_path / "a", by_day(table), config=SMALL)
    asked = []
    get = zarr.storage.LocalStore.get

    async def watched(self, key, *args, **kwargs):
        asked.append(key)
        return await get(self, key, *args, **kwargs)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", watched)
    day = read(tmp_path / "a", "2021-03-04", "2021-03-05")
    assert len(day) == 144
    data = [key for key in asked if "/c/" in key]
    # The fourth day of 144 rows, three chunks of 64 a day; twelve columns, each chunk once.
    assert {key.rsplit("/", 1)[1] for key in data} == {"9", "10", "11"}
    assert len(data) == len(set(data)) == 3 * 12
    asked.clear()
    with pytest.raises(EmptyWindowError):
        read(tmp_path / "a", "2021-04-04", "2021-04-05")
    assert not [key for key in asked if "/c/" in key]


def test_other_tools_can_open_the_arrays(tmp_path):
    append(tmp_path / "a", [canonical(1)], config=SMALL)
    group = zarr.open_group(tmp_path / "a" / ROWS, mode="r")
    assert sorted(group.group_keys()) == ["atms", "radiosonde", "station"]
    first = json.loads((tmp_path / "a" / LOG).read_text().splitlines()[0])
    values = np.asarray(group[f"{first['sensor']}/value"][first["start"] : first["start"] + first["rows"]])
    assert np.isfinite(values).all()


# ------------------------------------------------------------------------------------------------------ memory, crashes
def test_memory_does_not_grow_with_the_number_of_days(tmp_path):
    def days(count):
        rng = np.random.default_rng(0)
        n = 20_000
        for day in range(count):
            seconds = np.sort(rng.integers(0, 86_400, n)).astype("timedelta64[s]")
            rows = {"time": np.datetime64("2021-01-01", "ns") + np.timedelta64(day, "D") + seconds}
            rows |= dict.fromkeys(("latitude", "longitude", "height", "pressure", "obs_error", "view_angle"), 1.0)
            rows |= {"height": np.arange(n) * 0.5, "channel": -1, "qc": np.int8(0), "value": rng.normal(280, 5, n)}
            rows |= {c: pd.Categorical.from_codes(np.zeros(n, np.int8), [c]) for c in ("variable", "platform")}
            yield pd.DataFrame(rows).assign(sensor=pd.Categorical(["station"] * n))

    def peak(count):
        tracemalloc.start()
        append(tmp_path / str(count), days(count), config=ArchiveConfig(chunk=20_000), hold=10_000)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)  # imports and caches
    few, many = peak(3), peak(20)
    one_day = 20_000 * 12 * 8
    assert many < 1.15 * few
    assert many < 8 * one_day  # the table, its parts, the merged rows; 20 days would be 20


CRASH = """
import os, signal, sys
sys.path.insert(0, {checkout!r})
import pandas as pd
from earth import archive
table = pd.read_pickle({source!r})
days = [part for _, part in table.groupby(table["time"].dt.floor("D"))]
commits = 0
original = archive._Writer.commit
class Torn:
    def __init__(self, log): self.log = log
    def write(self, line):
        if commits == 5 and {point!r} == "log":
            self.log.write(line[: len(line) // 2]); self.log.flush(); os.kill(os.getpid(), signal.SIGKILL)
        self.log.write(line)
    def flush(self): self.log.flush()
    def fileno(self): return self.log.fileno()
def commit(self, sensor, span, parts):
    global commits
    commits += 1
    if not isinstance(self.log, Torn): self.log = Torn(self.log)
    if commits == 5 and {point!r} == "arrays":
        arrays = self._open(sensor)
        arrays["time"].resize((10_000,)); arrays["time"][self.shelves[sensor].end :] = 7
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, sensor, span, parts)
archive._Writer.commit = commit
archive.append({target!r}, days, hold=1)
"""


@pytest.mark.parametrize("point", ["arrays", "log"])
def test_a_killed_append_leaves_the_last_commit_and_can_be_resumed(tmp_path, checkout, point):
    table = canonical()
    target, source = tmp_path / "a", tmp_path / "table.pkl"
    table.to_pickle(source)
    create(target, SMALL)
    code = CRASH.format(checkout=str(checkout), source=str(source), target=str(target), point=point)
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert len(spans(target)) == 4  # a day of three sensors and one sensor of the next
    before = read(target)
    assert before["time"].max().day == 2
    report = append(target, by_day(table), hold=1)
    assert report.rows_kept == len(table) - len(before)
    pd.testing.assert_frame_equal(read(target), table)


def test_an_error_in_the_iterator_keeps_what_was_committed(tmp_path):
    table = canonical()

    def tables():
        yield from by_day(table)[:3]
        raise OSError("the disk of day four")

    with pytest.raises(OSError, match="day four"):
        append(tmp_path / "a", tables(), config=SMALL, hold=1)
    assert int(spans(tmp_path / "a")["rows"].sum()) == sum(len(day) for day in by_day(table)[:3])
    append(tmp_path / "a", by_day(table))
    pd.testing.assert_frame_equal(read(tmp_path / "a"), table)


# --------------------------------------------------------------------------------------------------------------- errors
def test_what_is_no_archive(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    for call in (lambda: read(tmp_path / "folder"), lambda: append(tmp_path / "folder", [canonical(1)])):
        with pytest.raises(ArchiveError, match="is no observation archive"):
            call()
    zarr.open_group(tmp_path / "other" / ROWS, mode="w", zarr_format=3)
    with pytest.raises(ArchiveError, match="is no observation archive"):
        read(tmp_path / "other")
    create(tmp_path / "new")
    meta = json.loads((tmp_path / "new" / ROWS / "zarr.json").read_text())
    meta["attributes"]["earth_archive"]["schema_version"] = 99
    (tmp_path / "new" / ROWS / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(ArchiveError, match="schema version 99, this library reads 1"):
        read(tmp_path / "new")
    with pytest.raises(ArchiveError, match="span=0 must be at least 1"):
        ArchiveConfig(span=0)


def test_another_configuration_and_a_second_writer(tmp_path):
    create(tmp_path / "a", SMALL)
    create(tmp_path / "a", SMALL)
    with pytest.raises(ArchiveError, match="was created with"):
        append(tmp_path / "a", [], config=ArchiveConfig())

    def tables():
        yield canonical(1)
        append(tmp_path / "a", [])

    with pytest.raises(ArchiveError, match="another process is appending"):
        append(tmp_path / "a", tables())


def test_tables_that_are_not_canonical(tmp_path):
    table = canonical(1)
    with pytest.raises(SchemaError, match="column 'qc' is missing"):
        append(tmp_path / "a", [table.drop(columns="qc")])
    with pytest.raises(SchemaError, match="has gaps"):
        append(tmp_path / "a", [table.assign(time=pd.NaT)])
    with pytest.raises(SchemaError, match="column 'platform' is empty at row 0"):
        append(tmp_path / "a", [table.assign(platform=None)])
    with pytest.raises(ValueError, match="sensor 'statoin' is not registered"):
        append(tmp_path / "a", [table.assign(sensor="statoin")])
    assert spans(tmp_path / "a").empty
    with pytest.raises(EmptyWindowError, match="has no row"):
        read(tmp_path / "a")


def test_selections_that_are_not_there(tmp_path):
    append(tmp_path / "a", [canonical(1)], config=SMALL)
    with pytest.raises(SchemaError, match=r"sensor 'radiosond' is not in .* nearest there is 'radiosonde'"):
        read(tmp_path / "a", sensors=["radiosond"])
    with pytest.raises(MissingVariableError, match=r"'temperature' is not in .*"):
        read(tmp_path / "a", sensors=["station"], variables=["temperature"])
    with pytest.raises(EmptyWindowError, match=r"no row of station in \[2022-01-01, None\)"):
        read(tmp_path / "a", "2022-01-01", sensors=["station"])


@pytest.mark.parametrize("column", ["latitude", "value", "variable", "platform"])
def test_a_lost_chunk_is_no_gap_in_the_data(tmp_path, column):
    append(tmp_path / "a", by_day(canonical()), config=SMALL)
    (tmp_path / "a" / ROWS / "station" / column / "c" / "1").unlink()
    with pytest.raises(ArchiveError, match=f"column '{column}', are gone"):
        read(tmp_path / "a")


def test_a_span_written_anew_under_a_reader_is_noticed(tmp_path, monkeypatch):
    """Between its first and its second columns the chunks that `append` removes first go, as do some it reads next."""
    append(tmp_path / "a", by_day(canonical()), config=SMALL)
    load, calls = archive._load, []

    def racing(arrays, segment, columns, root):
        rows = load(arrays, segment, columns, root)
        if not calls:
            for name in ("time", "height", "pressure"):
                (tmp_path / "a" / ROWS / "atms" / name / "c" / "0").unlink(missing_ok=True)
        calls.append(columns)
        return rows

    monkeypatch.setattr(archive, "_load", racing)
    with pytest.raises(ArchiveError, match="rows of atms from 0 on were written anew"):
        read(tmp_path / "a", sensors=["atms"])


def test_a_value_that_is_missing_is_refused(tmp_path):
    table = canonical().assign(value=np.nan)
    with pytest.raises(SchemaError, match=r"column 'value' is NaN at row 0; pass the table through .*validate"):
        append(tmp_path / "a", [table], config=SMALL)


def test_damage_is_noticed(tmp_path):
    append(tmp_path / "a", by_day(canonical()), config=SMALL)
    chunk = tmp_path / "a" / ROWS / "station" / "time" / "c" / "1"
    data = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(ArchiveError, match="column 'time', are gone"):
        read(tmp_path / "a", sensors=["station"])
    chunk.write_bytes(data[:10])
    with pytest.raises(ArchiveError, match="cannot be read"):
        read(tmp_path / "a", sensors=["station"])
    log = tmp_path / "a" / LOG
    log.write_bytes(b"{}\n" + log.read_bytes())
    with pytest.raises(ArchiveError, match=r"line 0 of .* is damaged"):
        read(tmp_path / "a", sensors=["station"])
