"""`examples/forecast_stations.py` and `examples/cross_sensor.py` from end to end on tables of other regions, cadences
and layouts, and what they say when something is wrong.
"""

import dataclasses
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from jax.experimental.compilation_cache import compilation_cache

from earth.export import select_lead
from earth.forecast import forecast, load_model, streams_of
from earth.readers import read_stations
from earth.train import fill_heights
from examples import cross_sensor, forecast_stations
from moe.checkpoint import CheckpointConfigError, CorruptCheckpointError

# orbax abandons its other reads when one fails; what asyncio says about them at collection is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

HELD = "AR03"
TRAIN = ("2019-01-01", "2019-02-20")
TESTS = (("2019-02-22", "2019-02-26"), ("2019-02-28", "2019-03-03"))
SMALL = ["network.width=8", "members=1", "steps=8", "batch=4", "checkpoint_every=4", "anchors=6", "slots=0,3,6"]


def walk(rng, count, keep=0.9, scale=1.0):
    out = np.zeros(count)
    for t in range(1, count):
        out[t] = keep * out[t - 1] + scale * rng.normal()
    return out


def southern(days=62, stations=10, step=3):
    """A network in Argentina in the user's own words: degrees Celsius, hPa, wind as speed and direction, 5 % gaps.

    AR00 has no height, `rain_mm` no value, AR09 moves half a degree after 30 days.
    """
    rng = np.random.default_rng(5)
    times = pd.date_range("2019-01-01", periods=days * 24 // step, freq=f"{step}h")
    h = np.arange(len(times)) * step
    common = walk(rng, len(h))
    parts = []
    for i in range(stations):
        height = float(np.round(rng.uniform(5, 900)))
        own = walk(rng, len(h), scale=0.4)
        temp = 22 - 6.5e-3 * height + 5 * np.cos(2 * np.pi * (h - 19) / 24) + 1.5 * np.roll(common, i // 3) + own
        moved = (h >= 30 * 24) & (i == stations - 1)
        parts.append(
            pd.DataFrame(
                {
                    "obs_time": times,
                    "site": f"AR{i:02d}",
                    "lat": np.round(rng.uniform(-38, -31), 3) + 0.5 * moved,
                    "lng": np.round(rng.uniform(-68, -58), 3),
                    "elev_m": np.nan if i == 0 else height,
                    "temp_c": temp.round(1),
                    "dewpt_c": (temp - 4 - np.abs(own)).round(1),
                    "mslp_hpa": (1013 - 2 * common + rng.normal(0, 0.5, len(h))).round(1),
                    "wind_speed": np.abs(4 + common + own).round(1),
                    "wind_dir": ((180 + 40 * common + 20 * own) % 360).round(),
                }
            )
        )
    table = pd.concat(parts, ignore_index=True)
    values = ["temp_c", "dewpt_c", "mslp_hpa", "wind_speed", "wind_dir"]
    table[values] = table[values].mask(rng.random((len(table), len(values))) < 0.05)
    table["rain_mm"] = np.nan
    return table[rng.random(len(table)) > 0.02]


def command(table, out, *more, periods=True, leads=("3", "6"), small=SMALL, held=HELD):
    """The arguments of a tiny run."""
    arguments = ["--observations", str(table), "--out", str(out), "--quiet", "--config", "configs/earth_o1.py:smoke"]
    arguments += ["--set", *small]
    if periods:
        arguments += ["--train-period", *TRAIN]
        for period in TESTS:
            arguments += ["--test-period", *period]
    if leads:
        arguments += ["--leads", *leads]
    if held:
        arguments += ["--held-out", held]
    return [*arguments, *more]


@pytest.fixture(scope="module", autouse=True)
def at_the_checkout(checkout, folder):
    """Commands name the presets as README does, from the checkout's root. Compiling is most of what a tiny run does:
    here XLA does not optimise, and a second run takes what the first one compiled.
    """
    wanted = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before, there = {name: jax.config.values[name] for name in wanted}, os.getcwd()
    os.chdir(checkout)
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it may have opened another folder, or none
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    os.chdir(there)
    gc.collect()  # abandoned reads, while they are ignored


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def south(folder):
    path = folder / "south.csv"
    southern().to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def fits(folder, south):
    """What one run of the command line leaves behind, and its fits in closed form."""
    made, kept = folder / "out", []
    prepare = forecast_stations.prepare

    def keep(*positional, **named):
        kept.append(prepare(*positional, **named))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast_stations, "prepare", keep)
        assert forecast_stations.main(command(south, made, "--weatherbench", str(made / "wbx"))) == 0
    [data] = kept
    return made, data


@pytest.fixture(scope="module")
def out(fits):
    """What one run of the command line leaves behind."""
    return fits[0]


@pytest.fixture(scope="module")
def scores(out):
    return pd.read_csv(out / "scores.csv")


class Saved(Exception):
    """Ends a run when its model is saved."""


@pytest.fixture
def train_only(monkeypatch):
    """Runs a command up to the saved model and returns its parameters."""
    save = forecast_stations.save_model

    def run(arguments):
        def stop(folder, *rest, **named):
            save(folder, *rest, **named)
            raise Saved(folder)

        monkeypatch.setattr(forecast_stations, "save_model", stop)
        with pytest.raises(Saved) as caught:
            forecast_stations.main(arguments)
        return load_model(caught.value.args[0])[0]

    return run


def assert_same(mine, theirs):
    """Equal to the last bit."""
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def refusal(capsys, arguments, main=forecast_stations.main):
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    return error


# ------------------------------------------------------------------------------------------------ a region of one's own
def test_scores_have_every_cell_and_are_finite(scores):
    assert {"variable", "lead_hours", "stations", "model", "rmse", "mae", "crps", "n"} <= set(scores.columns)
    assert set(scores.variable) == {"temp_c", "dewpt_c", "mslp_hpa", "u", "v"}
    assert set(scores.stations) == {"training", "held_out"}
    cells = scores[scores.lead_hours > 0]
    assert set(cells.lead_hours) == {3, 6}
    assert set(cells.model) == {"earth-o1", *forecast_stations.BASELINES}
    assert len(cells) == 5 * 2 * 2 * 6
    assert not scores.duplicated(["variable", "lead_hours", "stations", "model"]).any()
    assert (cells.n > 0).all()
    assert np.isfinite(cells[["rmse", "mae"]].to_numpy()).all()
    assert np.isfinite(cells.crps[cells.model == "earth-o1"]).all()
    # 7 days of 8 reports at 9 stations, 5 % + 2 % gaps (and wind needs two values).
    n = cells[(cells.model == "earth-o1") & (cells.stations == "training")].set_index(["variable", "lead_hours"]).n
    assert n[("temp_c", 3)] == pytest.approx(0.93 * 7 * 8 * 9, rel=0.05)
    # Degrees Celsius, hectopascal: the errors of a network whose noise is a few of either.
    assert 0.3 < cells.rmse[cells.variable == "temp_c"].median() < 10
    assert 0.3 < cells.rmse[cells.variable == "mslp_hpa"].median() < 20
    nowcast = scores[scores.lead_hours == 0]
    assert set(nowcast.stations) == {"held_out"}
    assert set(nowcast.model) == {"earth-o1", "nearest", "idw", "lapse_idw"}


def test_every_file_is_there_and_complete(out):
    assert {"scores.csv", "ratios.csv", "forecast.nc", "report.html", "model", "training", "wbx"} <= {
        p.name for p in out.iterdir()
    }
    assert {"skill", "skill_held_out", "series", "calibration", "stations"} <= {p.stem for p in out.glob("*.png")}
    assert not [p.name for p in out.rglob(".*")], "a temporary file was left behind"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "columns without any usable value were dropped: rain_mm" in page


def test_a_moved_station_counts_as_two_and_an_unknown_height_as_sea_level(out):
    with xr.open_dataset(out / "forecast.nc", decode_timedelta=True) as made:
        names = [str(s) for s in made.station.values]
        assert {"AR09", "AR09@2"} <= set(names)
        apart = made.latitude.values[names.index("AR09@2")] - made.latitude.values[names.index("AR09")]
        assert apart == pytest.approx(0.5, abs=1e-6)
        assert made.height.values[names.index("AR00")] == 0.0
        assert (made.height.values[[n not in ("AR00",) for n in names]] > 0).all()


def test_model_folder_reproduces_the_forecast(out, south):
    params, cfg, meta = load_model(out / "model")
    assert meta["protocol"]["held_out"] == [HELD]
    record, unknown = fill_heights(read_stations(south).reports)
    assert unknown > 0
    inside = record.select(platforms=[p for p in record.platforms if p != HELD])
    with xr.open_dataset(out / "forecast.nc", decode_timedelta=True) as made:
        again = forecast(
            params,
            cfg,
            streams_of(params, cfg, {"station": inside}),
            made.init_time.values[:3],
            [3.0, 6.0],
            {"station": made.station.values, **{c: made[c].values for c in ("latitude", "longitude", "height")}},
            variables=meta["targets"],
        )
        for name in meta["targets"]:
            np.testing.assert_allclose(again[name].values, made[name].values[:3], rtol=1e-6, atol=1e-4)
            spread = f"{name}_spread"
            np.testing.assert_allclose(again[spread].values, made[spread].values[:3], rtol=1e-4)


def test_nobody_learns_from_the_held_out_station(out, tmp_path, train_only):
    """Other values at the held-out station, the same training to the last bit."""
    table = southern()
    there = table.site == HELD
    table.loc[there, "temp_c"] += 7.0
    table.loc[there, "mslp_hpa"] -= 9.0
    table.loc[there, "wind_speed"] *= 2.0
    table.to_csv(tmp_path / "other.csv", index=False)
    theirs = train_only(command(tmp_path / "other.csv", tmp_path / "out"))
    assert_same(load_model(out / "model")[0], theirs)


# ------------------------------------------------------------------------------------------------------- WeatherBench-X
def test_weatherbench_store_follows_its_layout(out):
    files = sorted((out / "wbx").rglob("*.parquet"))
    days = pd.date_range("2019-02-21", "2019-03-03")
    for day in days[1:]:
        assert out / "wbx" / f"year={day.year}/month={day.month}/day={day.day}" / f"{day:%Y-%m-%d}.parquet" in files
    frame = pd.concat([pd.read_parquet(f, partitioning=None) for f in files])
    assert {"init_time", "lead_time", "valid_time", "latitude", "longitude", "elevation", "stationName"} <= set(frame)
    assert (frame.valid_time == frame.init_time + frame.lead_time).all()
    for file in files:
        part = pd.read_parquet(file, partitioning=None)
        assert (part.valid_time.dt.strftime("%Y-%m-%d") == file.stem).all()
    with xr.open_dataset(out / "forecast.nc", decode_timedelta=True) as made:
        lead = np.timedelta64(6, "h")
        rows = select_lead(6)(frame)
        assert len(rows) == made.sizes["init_time"] * made.sizes["station"]
        row = rows[rows.stationName == HELD].iloc[5]
        cell = made.sel(station=HELD, lead_time=lead, init_time=row.init_time)
        assert row["2m_temperature"] == pytest.approx(float(cell["2m_temperature"]))
        assert row["2m_temperature_spread"] == pytest.approx(float(cell["2m_temperature_spread"]))


def test_weatherbench_leaves_a_foreign_folder_alone(south, tmp_path, capsys):
    store = tmp_path / "mine"
    store.mkdir()
    (store / "thesis.txt").write_text("years of work")
    error = refusal(capsys, command(south, tmp_path / "out", "--weatherbench", str(store)))
    assert error.startswith("FileExistsError: --weatherbench")
    assert "name a new folder" in error
    assert (store / "thesis.txt").read_text() == "years of work"


# ------------------------------------------------------------------------------------------------------------- refusals
REFUSALS = {
    "leads off the cadence": (
        {"leads": ("3", "4", "5")},
        [],
        r"ProtocolError: leads \[4, 5\] h are no multiples of the record's cadence of 3 h; pass --leads .* 3, 6, 12",
    ),
    "leads that are no numbers": ({"leads": ("six",)}, [], r"ProtocolError: --leads six: .*give hours such as"),
    "unknown variable": (
        {},
        ["--variables", "temp_c", "mslpp"],
        r"UnknownVariableError: variable 'mslpp' is not in the table; the nearest is .*columns: ",
    ),
    "unknown held-out station": (
        {"held": "AR77"},
        [],
        r"ObservationError: held-out stations \['AR77'\] are not in the table; the nearest to 'AR77' is 'AR07' among",
    ),
    "everything held out": (
        {"held": None},
        ["--held-out", *(f"AR{i:02d}" for i in range(10))],
        "EmptyWindowError: --held-out names all 10 stations; leave some",
    ),
    "test period outside the record": (
        {"periods": False},
        ["--train-period", *TRAIN, "--test-period", "2020-01-01", "2020-02-01"],
        r"EmptyWindowError: no report lies in the test periods \[2020-01-01.*the record runs from 2019-01-01.*choose",
    ),
    "empty test period": (
        {"periods": False},
        ["--train-period", *TRAIN, "--test-period", "2019-02-25", "2019-02-25"],
        r"ProtocolError: test interval .* is empty; .*end must lie after start",
    ),
    "period that is no time": (
        {"periods": False},
        ["--train-period", *TRAIN, "--test-period", "spring", "2019-02-25"],
        r"ProtocolError: cannot read times such as .*pass ISO 8601",
    ),
    "training period outside the record": (
        {"periods": False},
        ["--train-period", "2010-01-01", "2011-01-01", "--test-period", *TESTS[0]],
        r"(MissingVariable|EmptyWindow)Error: .*(training period|no training report)",
    ),
    "unit without a column": ({}, ["--units", "degC"], "SchemaError: --units 'degC' is not COLUMN=VALUE; write"),
    "unknown timezone": ({}, ["--timezone", "Mars/Olympus"], r"\w+Error: .*Mars/Olympus"),
    "no such preset": ({}, ["--config", "configs/earth_o1.py:smok"], "--config or --set: .*did you mean 'smoke'"),
    "no such field": ({}, ["--set", "network.widht=8"], "--config or --set: unknown key .*did you mean 'width'"),
    "no such file": ({}, ["--observations", "nowhere.csv"], "FileNotFoundError: .*nowhere.csv does not exist"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_with_the_value_and_the_remedy(case, south, tmp_path, capsys):
    options, more, expected = REFUSALS[case]
    error = refusal(capsys, command(south, tmp_path / "out", *more, **options))
    assert "\n" not in error
    assert re.match(expected, error), error


def test_a_table_without_time_is_refused(tmp_path, capsys):
    southern(days=3).drop(columns="obs_time").to_csv(tmp_path / "timeless.csv", index=False)
    error = refusal(capsys, command(tmp_path / "timeless.csv", tmp_path / "out"))
    assert error.startswith("SchemaError: no time column found among site, lat, lng")
    assert "name it with" in error


def test_leads_nobody_asked_for_by_name_are_left_out(south, tmp_path, capsys):
    """The default 1 h lead on a 3-hourly record is said, not refused."""
    protocol = {"name": "mine", "test": [list(p) for p in TESTS], "train": [list(TRAIN)], "leads": [1, 3]}
    (tmp_path / "p.json").write_text(json.dumps(protocol))
    arguments = command(south, tmp_path / "out", "--protocol", str(tmp_path / "p.json"), periods=False, leads=None)
    capsys.readouterr()
    assert forecast_stations.main(arguments) == 2  # it names no validation hour; the leads come before that
    said = capsys.readouterr()
    assert "leads [1] h are not on the record's cadence of 3 h and are left out" in said.out
    error = said.err
    assert error.startswith("EmptyWindowError: ")
    assert " 0 validation initial times" in error


# --------------------------------------------------------------------------------------------- broken and other folders
def truncate(step):
    """Cuts the largest file of a checkpoint to half."""
    largest = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = largest.read_bytes()
    largest.write_bytes(data[: len(data) // 2])


def checkpoints(folder):
    return folder / "training" / "member0" / "forecast" / "checkpoints"


def test_truncated_checkpoint_is_refused_and_its_remedy_works(fits, south, tmp_path, capsys, train_only, monkeypatch):
    out, data = fits
    monkeypatch.setattr(forecast_stations, "prepare", lambda *_, **__: data)  # the same, once more
    again = tmp_path / "out"
    again.mkdir()
    shutil.copytree(out / "training", again / "training")
    assert sorted(p.name for p in checkpoints(again).iterdir()) == ["4", "8"]
    truncate(checkpoints(again) / "8")
    error = refusal(capsys, command(south, again))
    assert error.startswith("CorruptCheckpointError: ")
    assert "remove that folder to go on from step 4" in error
    assert f"or remove {again / 'training'} to train anew" in error
    shutil.rmtree(checkpoints(again) / "8")
    assert_same(load_model(out / "model")[0], train_only(command(south, again)))


def test_another_run_in_the_same_folder_is_refused(out, south, tmp_path, capsys):
    before = (out / "scores.csv").read_bytes()
    error = refusal(capsys, command(south, out, "--set", "network.width=16"))
    assert error.startswith("CheckpointConfigError: ")
    assert "model.network.width (8 there, 16 now)" in error
    assert "Choose another --out" in error
    # Weights that have seen these test hours must not come back either.
    shifted = command(south, out, periods=False)
    shifted += ["--train-period", *TRAIN, "--test-period", "2019-02-24", "2019-03-03"]
    assert "protocol.test" in refusal(capsys, shifted)
    # Nor weights of another record.
    table = southern()
    table.loc[table.site == "AR01", "temp_c"] += 1.0
    table.to_csv(tmp_path / "other.csv", index=False)
    assert "observations.sha256" in refusal(capsys, command(tmp_path / "other.csv", out))
    assert (out / "scores.csv").read_bytes() == before


def test_load_model_refuses_a_broken_or_another_model(out, tmp_path):
    _, cfg, _ = load_model(out / "model")
    wider = dataclasses.replace(cfg, network=dataclasses.replace(cfg.network, width=24))
    with pytest.raises(CheckpointConfigError, match=r"model.network.width \(8 saved, 24 now\).*Use the saved config"):
        load_model(out / "model", cfg=wider)
    shutil.copytree(out / "model", tmp_path / "model")
    [step] = [p for p in (tmp_path / "model").iterdir() if p.is_dir()]
    truncate(step)
    with pytest.raises(CorruptCheckpointError, match="there is no other step to go back to"):
        load_model(tmp_path / "model")


# ----------------------------------------------------------------------------------------------------- other layouts
@pytest.mark.slow  # compiles a model of its own
def test_daily_record_in_long_form_and_local_time(tmp_path):
    rng = np.random.default_rng(1)
    days = pd.date_range("2020-01-01", periods=150)
    common = walk(rng, len(days), keep=0.8)
    parts = []
    for i in range(6):
        height = 100.0 * i
        place = {"station": f"D{i}", "lat": -30.0 - 0.7 * i, "lon": -60.0 + 0.9 * i, "elev": height}
        warm = 18 - 6.5e-3 * height + 2 * common + walk(rng, len(days), 0.5, 0.3)
        wet = np.maximum(common + rng.normal(size=len(days)), 0)
        for name, value in (("tavg_c", warm), ("rain_mm", wet)):
            parts.append(pd.DataFrame({"time": days, **place, "variable": name, "value": value.round(2)}))
    pd.concat(parts).to_csv(tmp_path / "daily.csv", index=False)
    arguments = command(tmp_path / "daily.csv", tmp_path / "out", "--variables", "tavg_c", periods=False, held="D4")
    arguments = [a for a in arguments if a not in ("3", "6")]
    arguments[arguments.index("--leads") + 1 : arguments.index("--leads") + 1] = ["24", "48"]
    arguments += ["--timezone", "America/Argentina/Buenos_Aires", "--train-period", "2020-01-01", "2020-04-20"]
    arguments += ["--test-period", "2020-04-25", "2020-05-29"]
    assert forecast_stations.main(arguments) == 0
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    cells = scores[(scores.lead_hours > 0) & (scores.model == "earth-o1")]
    assert set(cells.lead_hours) == {24, 48}
    assert set(cells.variable) == {"tavg_c"}
    # 34 days at five stations: local midnight is 03 UTC, so the last day of the record lies in the period.
    assert set(cells.n[cells.stations == "training"]) == {5 * 34}
    assert np.isfinite(cells[["rmse", "mae", "crps"]].to_numpy()).all()
    with xr.open_dataset(tmp_path / "out" / "forecast.nc", decode_timedelta=True) as made:
        assert set(made.init_time.dt.hour.values) == {3}


@pytest.mark.slow  # 61 stations: minutes on a busy machine
def test_french_synop(shared_data, tmp_path):
    path = shared_data / "france_synop_202412.parquet"
    if not path.is_file():
        pytest.skip(f"no {path.name} in ../shared/data")
    arguments = command(path, tmp_path / "out", periods=False, leads=("3", "6", "12"), held="7149")
    arguments += ["--train-period", "2024-12-01", "2024-12-24", "--test-period", "2024-12-25", "2025-01-01"]
    assert forecast_stations.main(arguments) == 0
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    cells = scores[scores.lead_hours > 0]
    assert set(cells.lead_hours) == {3, 6, 12}
    assert set(cells.stations) == {"training", "held_out"}
    ours = cells[(cells.model == "earth-o1") & (cells.n > 0)]
    assert len(ours) >= 4 * 3 * 2
    assert np.isfinite(ours[["rmse", "mae", "crps"]].to_numpy()).all()


# ------------------------------------------------------------------------------------------------------- interruption
def launch(checkout, arguments):
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen(
        [sys.executable, "examples/forecast_stations.py", *arguments],
        cwd=checkout,
        env=os.environ | environment | {"PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow  # three processes that each compile the model
def test_interrupted_run_resumes_to_the_same_scores(checkout, south, tmp_path):
    small = [s for s in SMALL if not s.startswith(("steps", "checkpoint"))] + ["steps=400"]
    more = ["--variables", "temp_c", "mslp_hpa"]
    whole = launch(checkout, command(south, tmp_path / "whole", *more, small=small))
    text, _ = whole.communicate(timeout=900)
    assert whole.returncode == 0, text
    arguments = command(south, tmp_path / "cut", *more, small=small)
    cut = launch(checkout, arguments)
    rows = tmp_path / "cut" / "training" / "member0" / "forecast" / "metrics.jsonl"
    until = time.monotonic() + 900
    while not (rows.exists() and rows.stat().st_size) and time.monotonic() < until and cut.poll() is None:
        time.sleep(0.01)
    cut.send_signal(signal.SIGTERM)
    text, _ = cut.communicate(timeout=900)
    assert cut.returncode == 143, text
    assert "SIGTERM at step" in text
    assert not (tmp_path / "cut" / "scores.csv").exists()
    again = launch(checkout, arguments)
    text, _ = again.communicate(timeout=900)
    assert again.returncode == 0, text
    assert (tmp_path / "cut" / "scores.csv").read_bytes() == (tmp_path / "whole" / "scores.csv").read_bytes()


# ------------------------------------------------------------------------------------------------------- cross_sensor
def radiometers(days=30, stations=6):
    """Hourly temperature, humidity and radiation behind clouds that all three know of."""
    rng = np.random.default_rng(2)
    times = pd.date_range("2021-06-01", periods=24 * days, freq="h")
    h = np.arange(len(times))
    cloud = 1 / (1 + np.exp(-walk(rng, len(h), 0.95, 0.5)))
    parts = []
    for i in range(stations):
        sun = np.maximum(np.sin(2 * np.pi * (h + 0.5 - 6 + 8) / 24), 0)  # 120 degrees east
        light = 900 * sun * (1 - 0.7 * cloud) * np.exp(rng.normal(0, 0.05, len(h)))
        place = {"station": f"C{i}", "lat": 23.0 + 0.3 * i, "lon": 120.0 + 0.2 * i, "elev": 50.0 * i}
        values = {"t2m": 295 + 8 * sun * (1 - cloud), "rh": 60 + 30 * cloud - 10 * sun, "swdown": light}
        parts.append(pd.DataFrame({"time": times, **place, **{k: v.round(2) for k, v in values.items()}}))
    return pd.concat(parts, ignore_index=True)


TINY = ["--steps=10", "--width=8", "--layers=1", "--batch=8", "--trees=20"]


@pytest.fixture(scope="module")
def sunny(folder):
    radiometers().to_parquet(folder / "sunny.parquet")
    split = {
        "name": "sunny",
        "test": [["2021-06-24", "2021-06-29"]],
        "validation": [["2021-06-20", "2021-06-23"]],
        "held_out": ["C2"],
    }
    (folder / "sunny.json").write_text(json.dumps(split))
    arguments = ["--observations", str(folder / "sunny.parquet"), "--protocol", str(folder / "sunny.json")]
    return [*arguments, *TINY]


@pytest.mark.slow  # compiles a model of its own
def test_cross_sensor_writes_its_table_and_picture(sunny, tmp_path):
    arguments = [*sunny, "--out", str(tmp_path / "out"), "--inputs", "t2m", "rh", "--targets", "swdown"]
    assert cross_sensor.main(arguments) == 0
    table = pd.read_csv(tmp_path / "out" / "cross_sensor.csv")
    assert set(zip(table.stations, table.model, strict=True)) == {
        (g, m) for g in ("training", "held_out") for m in ("earth-o1", "gradient boosting", "sun geometry")
    }
    assert set(table.variable) == {"swdown"}
    assert np.isfinite(table.rmse).all()
    # Hours with the sun up in June at 23 degrees north are 13 to 14 of 24.
    hours = table.set_index("stations").n["held_out"].unique()
    assert len(hours) == 1
    assert 12.5 < hours[0] / 5 < 14.5
    assert (table.set_index("stations").n["training"] == 5 * hours[0]).all()
    # Clouds show in temperature and humidity, so trees that read these beat the sun's height alone.
    rmse = table[table.stations == "held_out"].set_index("model").rmse
    assert rmse["gradient boosting"] < rmse["sun geometry"]
    assert (tmp_path / "out" / "cross_sensor.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("inputs", "targets", "expected"),
    [
        (["t2m", "rh"], ["uvi"], "UnknownVariableError: variable 'uvi' is not in the table; the nearest is"),
        (["t2m", "gust"], ["swdown"], "UnknownVariableError: variable 'gust' is not in the table; the nearest is"),
        (["t2m", "swdown"], ["swdown"], "MissingVariableError: "),
    ],
)
def test_cross_sensor_refuses_missing_columns(sunny, tmp_path, capsys, inputs, targets, expected):
    arguments = [*sunny, "--out", str(tmp_path / "out"), "--inputs", *inputs, "--targets", *targets]
    assert refusal(capsys, arguments, cross_sensor.main).startswith(expected)
