"""`examples/station_osse.py` from end to end on a small simulated atmosphere, and what its scores mean."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from configs import station_osse
from earth.baselines import MODELS
from earth.forecast import load_model
from earth.osse import caveats, query, simulate
from earth.protocol import Protocol
from examples import station_osse as example

pytest.importorskip("dinosaur", reason="the nature run needs the extra `osse`")

GROUPS = {"training", "held_out", "truth_near", "truth_far"}
FIGURES = {"field", "stations", "series", "calibration", "training"}
FIGURES |= {f"{kind}_{group}" for kind in ("skill", "scorecard") for group in GROUPS}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What one run of the command line leaves behind."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert example.main(["--fast", "--quiet", "--out", str(folder), "--seed", "3"]) == 0
    return folder


@pytest.fixture(scope="module")
def scores(out):
    return pd.read_csv(out / "scores.csv")


@pytest.fixture(scope="module")
def protocol(out):
    _, _, meta = load_model(out / "model")
    return Protocol.from_dict(meta["protocol"])


def cell(scores, model, group, variable, lead):
    [row] = scores.loc[
        (scores.model == model)
        & (scores.stations == group)
        & (scores.variable == variable)
        & (scores.lead_hours == lead)
    ].to_dict("records")
    return row


@pytest.mark.slow  # a whole demo: minutes
def test_every_file_is_there_and_complete(out):
    assert {p.stem for p in out.glob("*.png")} == FIGURES
    for path in out.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 5_000
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")], "a temporary file was left behind"
    params, cfg, meta = load_model(out / "model", cfg=station_osse.fast().model)
    assert meta["seed"] == 3
    assert {s.sensor for s in cfg.streams} == {"station", "radiosonde"}
    held = len(meta["protocol"]["held_out"])
    assert params.fitted.normals["station"].latitude.shape == (24 - held,)
    assert params.fitted.anchors.latitude.shape == (24 - held,)


@pytest.mark.slow  # a whole demo: minutes
def test_scores_have_every_cell_once_and_are_finite(scores):
    preset = station_osse.fast()
    assert {"variable", "lead_hours", "stations", "model", "rmse", "mae", "crps", "n"} <= set(scores.columns)
    assert set(scores.stations) == GROUPS
    assert set(scores.model) == {"earth-o1", *MODELS}
    assert set(scores.variable) == set(station_osse.SURFACE)
    assert set(scores.lead_hours) == set(preset.model.leads)
    keys = ["variable", "lead_hours", "stations", "model"]
    assert not scores.duplicated(keys).any()
    assert len(scores) == np.prod([scores[k].nunique() for k in keys])
    assert np.isfinite(scores[["rmse", "mae", "bias", "crps", "rmse_lo", "rmse_hi"]].to_numpy()).all()
    assert (scores.mae <= scores.rmse + 1e-9).all()
    assert (scores.rmse_lo <= scores.rmse).all()
    assert (scores.rmse <= scores.rmse_hi).all()
    # Away from stations every forecast exists; the truth has no gap, so both groups together are all points.
    away = scores[scores.stations.str.startswith("truth")]
    assert (away.n_unforecast == 0).all()
    counts = away[away.model == "earth-o1"].groupby(["variable", "lead_hours"]).n.sum()
    steps = preset.blocks * preset.block_days * 24 / preset.init_hours
    assert set(counts) == {preset.points * steps}


@pytest.mark.slow  # a whole demo: minutes
def test_model_beats_climatology_and_persistence(scores):
    wide = scores.pivot_table(index=["stations", "variable", "lead_hours"], columns="model", values="rmse")
    ratio = wide.div(wide["climatology"], axis=0).groupby("stations")["earth-o1"].mean()
    assert ratio["training"] < 0.9
    assert ratio["truth_near"] < 1.0
    short = scores[(scores.lead_hours == 6) & (scores.stations == "training")].pivot(
        index="variable", columns="model", values="rmse"
    )
    assert (short["earth-o1"] < short["persistence"]).sum() >= 3


@pytest.mark.slow  # a whole demo: minutes
def test_scores_against_the_truth_are_what_the_truth_says(out, scores, protocol):
    preset = station_osse.fast()
    osse = dataclasses.replace(preset.osse, seed=3, nature=dataclasses.replace(preset.osse.nature, seed=3))
    truth = simulate(osse, cache=out / "nature", progress=False).truth
    made = xr.open_zarr(out / "forecast.zarr", decode_timedelta=True)
    points = made.isel(station=[str(s).startswith("P") for s in made.station.values])
    variable, lead = "surface_pressure", np.timedelta64(24, "h")
    at = points.sel(lead_time=lead)
    valid = at.valid_time.to_numpy()
    inside = protocol.role(valid) == "test"
    exact = query(truth, [variable], valid[inside, None], points.latitude.to_numpy(), points.longitude.to_numpy())
    error = at[variable].to_numpy()[inside] - exact[variable]
    rows = [cell(scores, "earth-o1", g, variable, 24) for g in ("truth_near", "truth_far")]
    pooled = np.sqrt(sum(r["n"] * r["rmse"] ** 2 for r in rows) / sum(r["n"] for r in rows))
    assert pooled == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-5)
    # The points stand on the relief: the forecast's height is the truth's.
    relief = query(truth, ["surface_altitude"], truth.start, points.latitude.to_numpy(), points.longitude.to_numpy())
    np.testing.assert_allclose(points.height.to_numpy(), relief["surface_altitude"], atol=1e-6)


@pytest.mark.slow  # a whole demo: minutes
def test_report_stands_alone_and_says_what_it_cannot_show(out):
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert not re.search(r'(src|href)="(?!data:)', page)
    for sentence in caveats(station_osse.fast().osse.nature):
        assert sentence in page
    assert "lower bound of the uncertainty" in page


def test_split_keeps_roles_apart_and_stations_out():
    preset = station_osse.demo()
    names = [f"ST{i:04d}" for i in range(200)]
    start = np.datetime64("2000-01-01", "ns")
    made = example.split(preset, start, names)
    assert len(made.held_out) == len(names[:: preset.held_out_every])
    hours = start + np.arange(preset.osse.nature.days * 24) * np.timedelta64(1, "h")
    role = made.role(hours)
    order = [role[i] for i in np.flatnonzero(np.r_[True, role[1:] != role[:-1]])]
    assert order == ["train", "unused", "validation", "unused", "test"]
    # From the newest training hour to the oldest validation hour lies more than the gap's worth of time, and no window
    # of 24 h reaches across it.
    last_train, first_validation = hours[role == "train"][-1], hours[role == "validation"][0]
    oldest = np.timedelta64(int(preset.model.streams[0].span * 3600), "s")
    assert first_validation - oldest > last_train
    assert hours[role == "test"][0] - oldest > hours[role == "validation"][-1]
    assert len(made.test) == preset.blocks
    assert (made.test[-1][1] - made.test[0][0]) / np.timedelta64(1, "D") == preset.blocks * preset.block_days


def test_a_record_too_short_for_its_split_is_refused():
    preset = station_osse.demo()
    short = dataclasses.replace(preset.osse, nature=dataclasses.replace(preset.osse.nature, days=50))
    with pytest.raises(ValueError, match=r"50 days do not hold 4 test blocks of 7 days.*simulate more days"):
        dataclasses.replace(preset, osse=short)


@pytest.mark.slow
@pytest.mark.slow  # a whole demo: minutes
def test_same_seed_gives_the_same_scores(out, tmp_path):
    """A second run in another folder repeats every number; the second run in the same folder takes its checkpoints."""
    first = (out / "scores.csv").read_bytes()
    example.main(["--fast", "--quiet", "--out", str(tmp_path / "again"), "--seed", "3"])
    assert (tmp_path / "again" / "scores.csv").read_bytes() == first
    example.main(["--fast", "--quiet", "--out", str(out), "--seed", "3"])
    assert (out / "scores.csv").read_bytes() == first
