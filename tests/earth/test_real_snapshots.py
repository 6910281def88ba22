"""The example on real snapshots, on small files in the layout of the published ones."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from examples import real_snapshots

CHANNELS = (2, 5, 8, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("snapshots")
    rng = np.random.default_rng(0)
    lines, spots = 160, 12
    lat = np.repeat(np.linspace(-60, 60, lines), spots) + rng.normal(0, 0.01, lines * spots)
    lon = np.tile(np.linspace(-8, 8, spots), lines)
    view, seconds = np.abs(np.linspace(-58, 58, spots)), 6.4 * np.repeat(np.arange(lines), spots)
    surface, cloud = 300 - 40 * np.sin(np.deg2rad(lat)) ** 2, rng.random(lines * spots)
    hirs = pd.DataFrame(
        {
            "latitude": lat, "longitude": lon, "satelliteZenithAngle": np.tile(view, lines),
            "data_datetime": pd.Timestamp("2018-11-22 11:48:54") + pd.to_timedelta(seconds, "s"),
        }
    )  # fmt: skip
    for c in CHANNELS:
        hirs[f"tb_ch{c:02d}"] = np.float32(surface - 4 * c - c * cloud + 0.3 * rng.normal(size=len(hirs)))
    hirs["tb_ch20"] = np.float32(np.nan)
    hirs.loc[:5, "tb_ch08"] = np.nan
    hirs.to_parquet(out / real_snapshots.FILES["hirs"])

    n = 150
    lat, lon, height = rng.uniform(30, 55, n), rng.uniform(-100, 20, n), rng.integers(0, 2500, n)
    temperature = np.round(15 - 0.0065 * height + 5 * np.sin(lon / 20) + rng.normal(size=n))
    metar = pd.DataFrame(
        {
            "Unix_time": 1601531995 + rng.integers(0, 1000, n), "DateString": "2020_10_01_06_00",
            "ICAO": [f"K{i:03d}" for i in range(n)], "Latitude": lat, "Longitude": lon, "Elev": height,
            "Temp": temperature, "Dewp": temperature - 4, "Wdir": rng.integers(0, 360, n) * 1.0,
            "Wspd": rng.integers(0, 20, n) * 1.0, "Wgst": np.nan, "Vis": 10.0, "QcFlag": 2, "Altimeter": 29.9,
        }
    )  # fmt: skip
    metar.to_parquet(out / real_snapshots.FILES["metar"])

    levels = np.array([1000, 925, 850, 700, 600, 500, 400, 300, 250, 200, 150, 100, 70, 50]) * 100.0
    soundings = []
    for station in range(40):
        lat, lon = rng.uniform(20, 60), rng.uniform(-20, 60)
        t = 300 - 0.5 * np.abs(lat) - 60 * (1 - (levels / 1e5) ** 0.5) + rng.normal(size=len(levels))
        soundings.append(
            pd.DataFrame(
                {
                    "latitude": lat,
                    "longitude": lon,
                    "pressure": levels,
                    "airTemperature": t,
                    "dewpointTemperature": t - 8,
                    "windDirection": 250.0,
                    "windSpeed": 10.0 + rng.random(len(levels)),
                    "data_datetime": pd.Timestamp("2008-12-08 12:00"),
                    "WMO_station_id": 1000 + station,
                }
            )
        )
    pd.concat(soundings, ignore_index=True).to_parquet(out / real_snapshots.FILES["sondes"])
    return out


@pytest.mark.slow  # four trainings are compiled: over 90 s of one core
def test_every_part_runs_and_writes_its_table_and_picture(folder, tmp_path):
    channels = ["--channels", "5", "8"]
    assert real_snapshots.main(["--data", str(folder), "--out", str(tmp_path), "--tiny", *channels]) == 0
    wanted = {
        "hirs": ({"channel 5", "channel 8"}, {"ridge, own channels", "ridge, tuned", "gradient boosting"}),
        "metar": ({"held-out airports"}, {"lapse + IDW", "lapse + IDW, tuned", "kriging, tuned"}),
        "sondes": ({"hidden levels", "held-out stations"}, {"kriging, tuned", "normal"}),
    }
    for part, (targets, models) in wanted.items():
        scores: Any = pd.read_csv(tmp_path / f"{part}.csv")
        assert set(scores["target"]) == targets
        assert models | {real_snapshots.OURS} <= set(scores["model"])
        assert (scores["low"] <= scores["rmse"] + 1e-9).all()
        assert (scores["rmse"] <= scores["high"] + 1e-9).all()
        assert (scores["n"] > 0).all()
        assert (tmp_path / f"{part}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_pools_hold_outs_and_averages_their_seeds():
    parts = []
    for holdout, seed, model, size in (
        (0, 0, "base", 2.0), (1, 0, "base", 2.0),
        (0, 0, real_snapshots.OURS, 1.0), (0, 1, real_snapshots.OURS, 3.0), (1, 0, real_snapshots.OURS, 2.0),
    ):  # fmt: skip
        error = np.full(100, size)
        parts.append(real_snapshots.errors_of("t", model, holdout, seed, np.arange(100) // 10, error))
    scores = real_snapshots.table(pd.concat(parts), 100).set_index("model")
    ours = scores.loc[real_snapshots.OURS]
    assert ours["n"] == scores.loc["base", "n"] == 200
    assert ours["rmse"] == pytest.approx(np.sqrt((5.0 + 4.0) / 2))
    assert ours["ratio"] == pytest.approx(ours["rmse"] / 2)
    assert ours["spread_seed"] == pytest.approx(0.5)


def test_a_missing_file_is_named_with_the_remedy(tmp_path, capsys):
    assert real_snapshots.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--parts", "metar"]) == 2
    message = capsys.readouterr().err
    assert "metar_global_2020100106.parquet" in message
    assert "--data" in message
