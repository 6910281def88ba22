"""earth.osse.verification: targets against the truth asked point by point, scores against plain numpy."""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from earth.osse import (
    Placement,
    RadiosondeNetwork,
    StationNetwork,
    Truth,
    observe_radiosondes,
    observe_stations,
    query,
    truth_from_dataset,
)
from earth.osse.verification import (
    COLUMNS,
    KEYS,
    VerificationConfig,
    VerificationProtocolError,
    aligned,
    given_table,
    held_out_platforms,
    init_times,
    ratios,
    score,
    skill_limits,
    targets,
)

CFG = VerificationConfig(warm_up_hours=12, leads=(6, 12, 24), station_share=0.3, radiosonde_share=0.4)


def atmosphere(days=3) -> Truth:
    """Waves that travel over a mountain whose top is above the 850 hPa level."""
    sigma = (np.arange(8) + 0.5) / 8
    lat = np.rad2deg(np.arcsin(np.polynomial.legendre.leggauss(16)[0]))
    lon = np.arange(32) * 11.25
    hours = np.arange(0, 24 * days + 1, 6)
    t, s, j, i = np.ix_(hours, sigma, lat, lon)
    wave = np.sin(np.deg2rad(3 * i) - 0.1 * t) * np.cos(np.deg2rad(j))
    hill = (4000 * np.exp(-(((j - 20) / 35) ** 2) - ((i - 180) / 90) ** 2))[0, 0]
    dims = ("time", "sigma", "latitude", "longitude")
    flat = {"temperature": 285 + 30 * np.log(s) + 5 * wave, "u_component_of_wind": 10 + 8 * wave}
    flat["v_component_of_wind"] = 6 * wave + 0 * s
    pressure = (1e5 * np.exp(-hill / 8000) * (1 + 0.01 * wave[:, 0])).astype(np.float32)
    data = {name: (dims, np.broadcast_to(x, (len(hours), 8, 16, 32)).astype(np.float32)) for name, x in flat.items()}
    data["surface_pressure"] = (("time", "latitude", "longitude"), pressure)
    data["surface_altitude"] = (("latitude", "longitude"), hill)
    times = np.datetime64("2000-01-01", "ns") + hours * np.timedelta64(1, "h")
    return truth_from_dataset(xr.Dataset(data, {"time": times, "sigma": sigma, "latitude": lat, "longitude": lon}))


@pytest.fixture(scope="module")
def world():
    truth = atmosphere()
    # Clusters of one centre on the hill's flank would be luck: sites go anywhere, 40 of them reach it.
    anywhere = Placement(clusters=0)
    parts = [
        observe_stations(truth, StationNetwork(count=40, cadence_hours=3, placement=anywhere), 0),
        observe_radiosondes(truth, RadiosondeNetwork(count=20, placement=anywhere, drift=True), 0),
    ]
    table = pd.concat([part.table for part in parts], ignore_index=True)
    return truth, table, pd.concat([part.platforms for part in parts], ignore_index=True)


@pytest.fixture(scope="module")
def wanted(world):
    truth, table, platforms = world
    return targets(truth, platforms, held_out_platforms(platforms, CFG), table, CFG)


def test_whole_platforms_are_held_out_and_the_choice_is_the_seeds(world):
    _, table, platforms = world
    held = held_out_platforms(platforms, CFG)
    kinds = platforms.set_index("platform")["sensor"]
    assert [sum(kinds[list(held)] == kind) for kind in ("station", "radiosonde")] == [12, 8]
    assert held_out_platforms(platforms.iloc[::-1], CFG) == held
    assert held_out_platforms(platforms, dataclasses.replace(CFG, seed=1)) != held
    given = given_table(table, held)
    assert set(given["platform"]) == set(table["platform"]) - set(held)
    assert held_out_platforms(platforms, dataclasses.replace(CFG, station_share=0.0, radiosonde_share=0.0)) == ()


def test_targets_are_the_truth_asked_point_by_point(world, wanted):
    truth, _, platforms = world
    assert list(wanted.columns) == list(COLUMNS)
    assert not wanted.duplicated(subset=list(KEYS)).any()
    assert np.isfinite(wanted["truth"]).all()
    held = held_out_platforms(platforms, CFG)
    moments = init_times(truth.start, truth.end, CFG)
    assert set(wanted["init_time"]) == set(moments)
    assert moments[0] == truth.start + np.timedelta64(12, "h")
    assert moments[-1] + np.timedelta64(24, "h") <= truth.end < moments[-1] + np.timedelta64(36, "h")
    underground = 0
    count = 0
    for row in platforms.loc[platforms["platform"].isin(held)].itertuples():
        for lead in CFG.leads:
            when = moments[1] + np.timedelta64(lead, "h")
            mine = wanted[(wanted["platform"] == row.platform) & (wanted["init_time"] == moments[1])]
            mine = mine[mine["lead_time"] == lead]
            assert (mine["valid_time"] == when).all()
            for pressure in CFG.pressures if row.sensor == "radiosonde" else (None,):
                for name in CFG.sonde_variables if row.sensor == "radiosonde" else CFG.station_variables:
                    expected = query(truth, [name], when, row.latitude, row.longitude, pressure=pressure)[name]
                    here = mine[mine["variable"] == name]
                    here = here[here["pressure"] == pressure] if pressure else here[here["pressure"].isna()]
                    underground += int(np.isnan(expected))
                    count += len(here)
                    assert len(here) == int(np.isfinite(expected))
                    if len(here):
                        np.testing.assert_allclose(here["truth"], expected, rtol=1e-12)
    assert underground > 0  # a hill above 850 hPa: else the rule is not tested
    assert count == (wanted["init_time"] == moments[1]).sum()


def test_observations_are_the_platforms_own_reports(world, wanted):
    _, table, _ = world
    has = wanted["observation"].notna()
    stations = wanted["group"] == "station"
    assert 0.85 < has[stations].mean() < 1  # lost reports and outages
    on_hour = wanted["valid_time"].dt.hour % 12 == 0
    assert not has[~stations & ~on_hour].any()
    assert 0.6 < has[~stations & on_hour].mean() < 1
    error = wanted["observation"] - wanted["truth"]
    assert error[stations & (wanted["variable"] == "surface_pressure")].std() == pytest.approx(58, rel=0.3)
    for _, row in wanted[has].sample(40, random_state=0).iterrows():
        own = table[(table["platform"] == row.platform) & (table["variable"] == row.variable)]
        late = (own["time"] - row.valid_time).dt.total_seconds() / 3600
        if row.group == "station":
            own = own[late == 0]
        else:
            own = own[(late >= 0) & (late <= 3) & ((own["pressure"] / row.pressure - 1).abs() < 1e-9)]
        assert row.observation in own["value"].to_numpy()


def test_forecasts_align_by_order_index_or_key(wanted):
    values = np.arange(len(wanted), dtype=float)
    np.testing.assert_array_equal(aligned(wanted, values), values)
    np.testing.assert_array_equal(aligned(wanted, pd.Series(values, wanted.index)), values)
    frame = wanted[list(KEYS)].assign(prediction=values)
    shuffled = frame.sample(frac=1, random_state=1)
    np.testing.assert_array_equal(aligned(wanted, shuffled), values)
    short = aligned(wanted, shuffled.iloc[5:])
    assert np.isnan(short).sum() == 5
    np.testing.assert_array_equal(short[np.isfinite(short)], values[np.isfinite(short)])
    two = pd.concat([wanted.assign(run=0), wanted.assign(run=1)], ignore_index=True)
    keyed = two[[*KEYS, "run"]].assign(prediction=np.arange(len(two), dtype=float)).sample(frac=1, random_state=1)
    np.testing.assert_array_equal(aligned(two, keyed), np.arange(len(two)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: np.zeros(3), r"shape \(3,\)"),
        (lambda w: pd.Series(np.zeros(len(w)), w.index[::-1]), "index"),
        (lambda w: w[list(KEYS)], "'prediction'"),
        (lambda w: pd.concat([w[list(KEYS)], w[list(KEYS)].iloc[:1]]).assign(prediction=0.0), "two things about"),
    ],
)
def test_forecasts_that_do_not_answer_are_typed_errors(wanted, spoil, message):
    with pytest.raises(VerificationProtocolError, match=message):
        aligned(wanted, spoil(wanted))


def test_scores_are_plain_root_mean_squares_and_count_what_is_missing(wanted):
    rng = np.random.default_rng(0)
    good = wanted["truth"].to_numpy() + rng.normal(size=len(wanted))
    holes = np.where(rng.random(len(wanted)) < 0.1, np.nan, good + 1)
    table: Any = score(wanted, {"good": good, "holes": holes}, by=("pressure",), draws=200)
    for _, row in table.iterrows():
        here = (wanted["group"] == row.group) & (wanted["variable"] == row.variable)
        here &= wanted["lead_time"] == row.lead_time
        here &= wanted["pressure"].isna() if np.isnan(row.pressure) else wanted["pressure"] == row.pressure
        predicted = (good if row.model == "good" else holes)[here]
        error = predicted - wanted["truth"][here]
        assert row.rmse == pytest.approx(np.sqrt(np.nanmean(error**2)), rel=1e-12)
        assert row.bias == pytest.approx(np.nanmean(error), rel=1e-9)
        departure = predicted - wanted["observation"][here]
        assert row.n_observation == np.isfinite(departure).sum()
        if row.n_observation:
            assert row.rmse_observation == pytest.approx(np.sqrt(np.nanmean(departure**2)), rel=1e-12)
        assert (row.n, row.n_unforecast) == (np.isfinite(error).sum(), np.isnan(error).sum())
        assert row.rmse_lo <= row.rmse <= row.rmse_hi
    assert table["n"].sum() + table["n_unforecast"].sum() == 2 * len(wanted)
    assert (table.loc[table["model"] == "good", "n_unforecast"] == 0).all()


def blocky(days=60, seed=0):
    """Targets at one place whose forecast errors are one draw a day, so that forecasts within a day are no news."""
    rng = np.random.default_rng(seed)
    init = np.datetime64("2000-01-01", "ns") + np.arange(4 * days) * np.timedelta64(6, "h")
    frame = {"init_time": init, "lead_time": 6, "valid_time": init + np.timedelta64(6, "h"), "group": "station"}
    frame |= {"platform": "ST0", "variable": "surface_pressure", "latitude": 0.0, "longitude": 0.0, "height": 0.0}
    wanted = pd.DataFrame({**frame, "pressure": np.nan, "truth": 0.0, "observation": np.nan})
    return wanted, np.repeat(rng.normal(size=days), 4)


def test_intervals_cover_the_true_error_when_errors_come_in_blocks():
    inside = {6: 0, 24: 0}
    for seed in range(100):
        wanted, error = blocky(seed=seed)
        for hours in inside:
            row: Any = score(wanted, {"m": error}, block_hours=hours, draws=200).iloc[0]
            inside[hours] += row.rmse_lo <= 1.0 <= row.rmse_hi
    assert (
        76 <= inside[24] <= 95
    )  # of 100, nominal 90; plain numpy has 85: percentiles of skewed sums are a little narrow
    assert inside[6] < 65  # drawing single forecasts is over-confident


def test_ratios_use_common_rows_and_the_best_baseline(wanted):
    rng = np.random.default_rng(1)
    truth = wanted["truth"].to_numpy()
    noise = rng.normal(size=len(wanted))
    forecasts = {"model": truth + 0.8 * noise, "weak": truth + 2 * noise, "strong": truth + noise}
    table: Any = ratios(wanted, forecasts, ["weak", "strong"], draws=50)
    assert set(table["best"]) == {"strong"}
    mine = table[table["model"] == "model"]
    np.testing.assert_allclose(mine[["ratio", "ratio_lo", "ratio_hi"]], 0.8, rtol=1e-9)  # paired: no scatter at all
    # A baseline that leaves out its worst rows must not profit from it.
    bad = np.abs(noise) > 1
    sly = {**forecasts, "strong": np.where(bad, np.nan, truth + noise)}
    table = ratios(wanted, sly, ["strong"], draws=0)
    assert (table["n_left_out"] > 0).all()
    np.testing.assert_allclose(table.loc[table["model"] == "model", "ratio"], 0.8, rtol=1e-9)
    assert table["n"].sum() == 3 * (~bad).sum()
    with pytest.raises(VerificationProtocolError, match="nobody"):
        ratios(wanted, forecasts, ["nobody"])


def test_skill_limit_is_where_the_ratio_crosses_one():
    leads = [6, 12, 24, 48]
    curves = {"climatology": [2.0] * 4, "crosses": [1.0, 1.5, 1.8, 2.6], "never": [2.5] * 4, "always": [1.0] * 4}
    rows = [
        {"model": m, "group": "station", "variable": "v", "lead_time": lead, "rmse": r, "n": 1}
        for m, curve in curves.items()
        for lead, r in zip(leads, curve, strict=True)
    ]
    limits: Any = skill_limits(pd.DataFrame(rows)).set_index("model")["limit_hours"]
    assert limits["never"] == 0
    assert limits["always"] == np.inf
    assert limits["crosses"] == pytest.approx(24 + 24 * (1 - 0.9) / (1.3 - 0.9))
    with pytest.raises(VerificationProtocolError, match="nobody"):
        skill_limits(pd.DataFrame(rows), "nobody")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"station_share": 1.0}, "station_share=1.0"),
        ({"leads": (12, 6)}, r"leads=\(12, 6\)"),
        ({"every_hours": 0}, "every_hours=0"),
    ],
)
def test_bad_protocols_are_typed_errors(change, message):
    with pytest.raises(VerificationProtocolError, match=message):
        VerificationConfig(**change)


def test_impossible_requests_are_typed_errors(world):
    truth, table, platforms = world
    with pytest.raises(VerificationProtocolError, match="no room"):
        init_times(truth.start, truth.end, VerificationConfig(warm_up_hours=0, leads=(96,)))
    with pytest.raises(VerificationProtocolError, match="'AC0000' is no station"):
        targets(truth, platforms, ["AC0000"], table, CFG)
    with pytest.raises(VerificationProtocolError, match="only station"):
        held_out_platforms(platforms.iloc[:1], CFG)
    with pytest.raises(VerificationProtocolError, match="nothing to verify"):
        targets(truth, platforms, [], table, CFG)
