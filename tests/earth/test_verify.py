"""earth.verify against independent witnesses: quadrature, scipy, scikit-learn, simulation, loops."""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.integrate
import scipy.stats
import sklearn.metrics
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from earth import verify
from earth.export import to_dataset
from earth.protocol import Protocol

FINITE = st.floats(-50, 50, width=32)


# ---- one value per forecast
@given(FINITE, st.floats(0.0625, 20, width=32), FINITE)
def test_gaussian_crps_is_the_integral_of_the_squared_cdf_error(mean, spread, observed):
    cdf = scipy.stats.norm(mean, spread).cdf
    reach = 12 * spread + abs(observed - mean)
    below, _ = scipy.integrate.quad(lambda x: cdf(x) ** 2, observed - 2 * reach, observed, limit=200, points=[mean])
    above, _ = scipy.integrate.quad(
        lambda x: (1 - cdf(x)) ** 2, observed, observed + 2 * reach, limit=200, points=[mean]
    )
    assert verify.crps_gaussian(mean, spread, observed) == pytest.approx(below + above, rel=1e-5, abs=1e-6)


def test_gaussian_crps_limits():
    np.testing.assert_allclose(verify.crps_gaussian(1.0, 0.0, 3.5), 2.5)
    np.testing.assert_allclose(verify.crps_gaussian(1.0, 1e-9, 3.5), 2.5, rtol=1e-6)
    assert np.isnan(verify.crps_gaussian(1.0, np.nan, 3.5))
    assert np.isnan(verify.crps_gaussian(1.0, 1.0, np.nan))
    with pytest.raises(verify.VerificationError, match="negative"):
        verify.crps_gaussian(0.0, -1.0, 0.0)


@given(st.lists(FINITE, min_size=2, max_size=9), FINITE)
def test_ensemble_crps_is_the_double_sum(members, observed):
    x, m = np.array(members, np.float64), len(members)
    pairs = sum(abs(a - b) for a, b in itertools.product(x, x))
    skill = np.abs(x - observed).mean()
    assert verify.crps_ensemble(x, observed, fair=False) == pytest.approx(skill - pairs / (2 * m * m), abs=1e-5)
    assert verify.crps_ensemble(x, observed) == pytest.approx(skill - pairs / (2 * m * (m - 1)), abs=1e-5)


def test_unfair_ensemble_crps_is_the_integral_of_its_step_function():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=7), 0.3
    grid = np.linspace(-8, 8, 400_001)
    cdf = (x[:, None] <= grid).mean(0)
    integral = scipy.integrate.trapezoid((cdf - (grid >= y)) ** 2, grid)
    np.testing.assert_allclose(verify.crps_ensemble(x, y, fair=False), integral, atol=1e-4)


def test_fair_crps_does_not_depend_on_the_ensemble_size_and_meets_the_gaussian():
    rng = np.random.default_rng(1)
    n = 60_000
    observed = rng.normal(0.4, 1.3, n)
    expected = verify.crps_gaussian(0.0, 1.0, observed).mean()
    for m in (2, 3, 10):
        members = rng.normal(size=(m, n))
        np.testing.assert_allclose(verify.crps_ensemble(members, observed).mean(), expected, atol=0.02)
        assert verify.crps_ensemble(members, observed, fair=False).mean() > expected + 0.25 / m


def test_ensemble_crps_along_any_axis_and_with_one_member():
    rng = np.random.default_rng(2)
    members, observed = rng.normal(size=(4, 5, 6)), rng.normal(size=(4, 6))
    moved = verify.crps_ensemble(np.moveaxis(members, 1, 0), observed)
    np.testing.assert_allclose(verify.crps_ensemble(members, observed, axis=1), moved)
    np.testing.assert_allclose(
        verify.crps_ensemble(members[:, :1], observed, axis=1, fair=False), np.abs(members[:, 0] - observed)
    )
    with pytest.raises(verify.VerificationError, match="two members"):
        verify.crps_ensemble(members[:, :1], observed, axis=1)


def test_pit_and_ranks_of_a_calibrated_forecast_are_uniform_and_of_a_narrow_one_not():
    rng = np.random.default_rng(3)
    mean = rng.normal(size=20_000)
    observed = mean + 2 * rng.normal(size=20_000)
    pit = verify.pit_gaussian(mean, np.full(20_000, 2.0), observed)
    assert scipy.stats.kstest(pit, "uniform").pvalue > 0.01
    assert scipy.stats.kstest(verify.pit_gaussian(mean, np.full(20_000, 1.5), observed), "uniform").pvalue < 1e-6
    members = mean + 2 * rng.normal(size=(9, 20_000))
    ranks = verify.ensemble_rank(members, observed, rng=rng)
    frequency, edges = verify.histogram(ranks, 10, ranks=True)
    assert scipy.stats.chisquare(frequency * 20_000).pvalue > 0.01
    np.testing.assert_allclose(frequency.sum(), 1)
    assert len(edges) == 11
    frequency, _ = verify.histogram(np.array([0.0, 1.0, np.nan, 0.05]), 10)
    np.testing.assert_allclose(frequency[[0, 9]], [2 / 3, 1 / 3])


def test_rank_ties_are_broken_evenly():
    rng = np.random.default_rng(4)
    ranks = verify.ensemble_rank(np.zeros((3, 8000)), np.zeros(8000), rng=rng)
    assert scipy.stats.chisquare(np.bincount(ranks.astype(int), minlength=4)).pvalue > 0.01
    assert np.isnan(verify.ensemble_rank(np.array([[np.nan], [1.0]]), np.array([0.0]), rng=rng)).all()


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_intervals_cover_at_their_level(level):
    rng = np.random.default_rng(5)
    spread = rng.uniform(0.5, 3, 40_000)
    inside = verify.inside_interval(np.zeros(40_000), spread, spread * rng.normal(size=40_000), level=level)
    assert inside.mean() == pytest.approx(level, abs=0.01)
    with pytest.raises(verify.VerificationError, match="level"):
        verify.inside_interval(0.0, 1.0, 0.0, level=90)


# ---- reductions
def gappy(shape=(40, 6), seed=6):
    rng = np.random.default_rng(seed)
    forecast, observed = rng.normal(size=shape), rng.normal(size=shape)
    observed[rng.random(shape) < 0.3] = np.nan
    forecast[rng.random(shape) < 0.1] = np.nan
    return forecast, observed


def test_rmse_mae_bias_match_scikit_learn_on_the_valid_pairs():
    forecast, observed = gappy()
    ok = np.isfinite(forecast) & np.isfinite(observed)
    f, o = forecast[ok], observed[ok]
    assert verify.rmse(forecast, observed) == pytest.approx(sklearn.metrics.root_mean_squared_error(o, f))
    assert verify.mae(forecast, observed) == pytest.approx(sklearn.metrics.mean_absolute_error(o, f))
    assert verify.bias(forecast, observed) == pytest.approx((f - o).mean())
    per_column = np.asarray(verify.rmse(forecast, observed, axis=0))
    for j in range(forecast.shape[1]):
        k = ok[:, j]
        assert per_column[j] == pytest.approx(sklearn.metrics.root_mean_squared_error(observed[k, j], forecast[k, j]))
    # rmse^2 = bias^2 + variance of the error
    assert verify.rmse(forecast, observed) ** 2 == pytest.approx((f - o).mean() ** 2 + (f - o).var())


def test_nothing_valid_gives_nan_without_a_warning():
    assert np.isnan(verify.rmse(np.ones(3), np.full(3, np.nan)))
    assert np.isnan(verify.masked_mean(np.ones(3), where=np.zeros(3, bool)))


def test_anomaly_correlation_matches_pearson_when_centred():
    forecast, observed = gappy()
    climatology = np.linspace(-1, 1, forecast.size).reshape(forecast.shape)
    ok = np.isfinite(forecast) & np.isfinite(observed)
    f, o = (forecast - climatology)[ok], (observed - climatology)[ok]
    centred = verify.anomaly_correlation(forecast, observed, climatology, centred=True)
    assert centred == pytest.approx(np.corrcoef(f, o)[0, 1])
    uncentred = verify.anomaly_correlation(forecast, observed, climatology)
    assert uncentred == pytest.approx((f * o).sum() / np.sqrt((f * f).sum() * (o * o).sum()))
    assert verify.variance_ratio(forecast, observed, climatology) == pytest.approx(f.var() / o.var())
    assert verify.anomaly_correlation(observed, observed, climatology) == pytest.approx(1)


@pytest.mark.parametrize("members", [2, 5])
def test_spread_skill_is_one_for_exchangeable_members_of_any_number(members):
    rng = np.random.default_rng(7)
    centre = rng.normal(size=200_000)
    ensemble = centre + rng.normal(size=(members, 200_000))
    observed = centre + rng.normal(size=200_000)
    observed[::7] = np.nan
    assert verify.spread_skill_ratio(ensemble, observed) == pytest.approx(1, abs=0.02)
    assert verify.spread_skill_ratio(ensemble, centre + 2 * (observed - centre)) == pytest.approx(0.5, abs=0.03)


# ---- tables
WEEKS = [("2021-01-22", "2021-01-29"), ("2021-03-22", "2021-03-29"), ("2021-05-22", "2021-05-29")]


def world(seed=0, stations=("a", "b", "c")):
    """Hourly observations of two variables and a forecast with a known error, gaps in both."""
    rng = np.random.default_rng(seed)
    times = pd.date_range("2021-01-20", "2021-06-01", freq="h").to_numpy()
    truth = 280 + rng.normal(size=(len(times), len(stations), 2)).cumsum(0) * 0.1
    observed = truth.copy()
    observed[rng.random(observed.shape) < 0.1] = np.nan
    names = ("2m_temperature", "surface_pressure")
    grid = xr.Dataset(
        {n: (("time", "station"), observed[..., v]) for v, n in enumerate(names)},
        {"time": times, "station": list(stations)},
    )
    protocol = Protocol(name="t", test=WEEKS, held_out=("c",), leads=(6, 12))
    inits = protocol.init_times(times)
    leads = np.array([6, 12])
    row = np.searchsorted(times, inits)[:, None] + leads
    mean = truth[row] + rng.normal(size=(len(inits), 2, len(stations), 2)) * np.array([1.0, 200.0])
    mean = np.moveaxis(mean, 2, 2)
    mean[rng.random(mean.shape) < 0.02] = np.nan
    spread = np.broadcast_to(np.array([1.0, 200.0]), mean.shape).copy()
    place = np.zeros(len(stations))
    forecast = to_dataset(
        mean,
        spread,
        init_times=inits,
        lead_hours=leads,
        variables=names,
        stations=stations,
        latitude=place,
        longitude=place,
    )
    return grid, forecast, protocol


def test_score_equals_a_loop_over_the_pairs():
    grid, forecast, protocol = world()
    table = verify.score(forecast, grid, protocol, model="m", draws=50)
    assert list(table.groupby(["variable", "lead_hours", "stations"]).size()) == [1] * 8
    frame = grid["2m_temperature"].to_pandas()
    at = {t: i for i, t in enumerate(frame.index.to_numpy())}
    values, issued = frame.to_numpy(), forecast["2m_temperature"].sel(lead_time=np.timedelta64(12, "h")).to_numpy()
    for group, names in (("training", "ab"), ("held_out", "c")):
        errors, crps, unforecast = [], [], 0
        for i, init in enumerate(forecast.init_time.values):
            valid = init + np.timedelta64(12, "h")
            if not any(np.datetime64(a) <= valid < np.datetime64(b) for a, b in WEEKS):
                continue
            for name in names:
                s = "abc".index(name)
                o, f = values[at[valid], s], float(issued[i, s])
                if np.isfinite(o) and not np.isfinite(f):
                    unforecast += 1
                elif np.isfinite(o):
                    errors.append(f - o)
                    crps.append(float(verify.crps_gaussian(f, 1.0, o)))
        row = table.query("variable == '2m_temperature' and lead_hours == 12 and stations == '" + group + "'").iloc[0]
        e = np.array(errors)
        assert row.n == len(e)
        assert row.n_unforecast == unforecast
        assert row.rmse == pytest.approx(np.sqrt((e**2).mean()))
        assert row.mae == pytest.approx(np.abs(e).mean())
        assert row.bias == pytest.approx(e.mean())
        assert row.crps == pytest.approx(np.mean(crps))
        assert row.coverage == pytest.approx((np.abs(e) <= scipy.stats.norm.ppf(0.95)).mean())
        assert row.rmse_lo < row.rmse < row.rmse_hi


def test_scores_in_the_users_units():
    grid, forecast, protocol = world()

    class Column:
        variable, units, scale, offset = "surface_pressure", "hPa", 100.0, 0.0

    plain = verify.score(forecast, grid, protocol, draws=20)
    shown = verify.score(forecast, grid, protocol, draws=20, columns={"ps": Column()})
    assert set(shown.variable) == {"2m_temperature", "ps"}
    one, two = plain.query("variable == 'surface_pressure'"), shown.query("variable == 'ps'")
    assert (two.units == "hPa").all()
    for column in ("rmse", "mae", "bias", "crps", "spread", "rmse_lo", "rmse_hi"):
        np.testing.assert_allclose(two[column].to_numpy() * 100, one[column].to_numpy(), rtol=1e-9)
    for column in ("coverage", "spread_skill", "n"):
        np.testing.assert_allclose(two[column].to_numpy(), one[column].to_numpy(), rtol=1e-9)


def test_groups_stations_and_order_of_the_record_do_not_matter():
    grid, forecast, protocol = world()
    table = verify.score(forecast, grid, protocol, draws=0)
    shuffled = grid.isel(time=np.random.default_rng(0).permutation(grid.sizes["time"]), station=[2, 0, 1])
    pd.testing.assert_frame_equal(table, verify.score(forecast.isel(station=[1, 2, 0]), shuffled, protocol, draws=0))
    each = verify.score(forecast, grid, protocol, draws=0, by_station=True)
    assert len(each) == 2 * 2 * 3
    pooled = (
        each.query("stations == 'training'")
        .groupby(["variable", "lead_hours"])[["n", "rmse"]]
        .apply(lambda g: np.sqrt((g.n * g.rmse**2).sum() / g.n.sum()))
    )
    want = table.query("stations == 'training'").set_index(["variable", "lead_hours"]).rmse
    np.testing.assert_allclose(pooled.sort_index(), want.sort_index())


def test_missing_targets_never_poison_and_empty_cells_say_so():
    grid, forecast, protocol = world()
    grid["2m_temperature"].loc[{"station": "c"}] = np.nan
    table = verify.score(forecast, grid, protocol, draws=10).set_index(["variable", "lead_hours", "stations"])
    empty = table.loc[("2m_temperature", 6, "held_out")]
    assert empty.n == 0
    assert np.isnan(empty.rmse)
    assert table.loc[("2m_temperature", 6, "training")].n > 0
    assert np.isfinite(table.loc[("surface_pressure", 6, "held_out")].rmse)


def test_valid_times_outside_the_record_or_the_test_hours_are_not_scored():
    grid, forecast, protocol = world()
    short = grid.sel(time=slice(None, "2021-03-25"))
    n = verify.score(forecast, short, protocol, draws=0).n.max()
    assert 0 < n < verify.score(forecast, grid, protocol, draws=0).n.max()
    everything = verify.score(forecast, grid, None, draws=0)
    assert set(everything.stations) == {"training"}
    assert everything.n.max() > n


def test_climatology_columns():
    grid, forecast, protocol = world()
    climatology = forecast.copy(deep=True)
    for name in ("2m_temperature", "surface_pressure"):
        climatology[name][:] = 280.0
    table = verify.score(forecast, grid, protocol, draws=0, climatology=climatology)
    matched = forecast["2m_temperature"].isel(lead_time=0, station=[0, 1])
    observed = grid["2m_temperature"].reindex(time=matched.valid_time.values).to_numpy()[:, :2]
    observed = np.where((protocol.role(matched.valid_time.values) == "test")[:, None], observed, np.nan)
    row = table.query("variable == '2m_temperature' and lead_hours == 6 and stations == 'training'").iloc[0]
    assert row.acc == pytest.approx(float(verify.anomaly_correlation(matched.values, observed, 280.0)))
    assert row.variance_ratio == pytest.approx(float(verify.variance_ratio(matched.values, observed, 280.0)))
    assert verify.score(forecast, grid, protocol, draws=0).acc.isna().all()


def test_errors_name_what_does_not_fit():
    grid, forecast, protocol = world()
    with pytest.raises(verify.VerificationError, match=r"stations \['c'\]"):
        verify.score(forecast, grid.sel(station=["a", "b"]), protocol)
    with pytest.raises(verify.VerificationError, match="'surface_pressure' is not in the observations"):
        verify.score(forecast, grid[["2m_temperature"]], protocol)
    with pytest.raises(verify.VerificationError, match="nothing in common"):
        verify.compare(
            forecast, forecast.isel(lead_time=[0]).assign_coords(lead_time=[np.timedelta64(99, "h")]), grid, protocol
        )
    with pytest.raises(verify.VerificationError, match="metric 'bias'"):
        verify.compare(forecast, forecast, grid, protocol, metric="bias")


def test_blocks_are_test_intervals_and_long_ones_weeks():
    protocol = Protocol(name="t", test=[("2021-01-22", "2021-01-29"), ("2021-06-01", "2021-06-24")])
    label = verify.block_labels(
        np.array(["2021-01-23", "2021-06-01", "2021-06-08", "2021-06-23", "2021-05-01"], "datetime64[h]"), protocol
    )
    assert list(label) == [0, 1, 2, 3, -1]


def test_bootstrap_interval_covers_the_truth_when_blocks_are_independent():
    """Errors share a random bias per week; over 24 weeks the interval of the mean covers zero at about its level."""
    times = pd.date_range("2021-01-01", periods=24 * 7 * 4, freq="6h").to_numpy()
    covered, naive = 0, 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        weekly = np.repeat(rng.normal(size=24), 28)[: len(times)]
        error = weekly + 0.3 * rng.normal(size=len(times))
        grid = xr.Dataset(
            {"2m_temperature": (("time", "station"), np.zeros((len(times), 1)))}, {"time": times, "station": ["a"]}
        )
        shifted = times - np.timedelta64(6, "h")
        forecast = to_dataset(
            error[:, None, None, None],
            init_times=shifted,
            lead_hours=[6],
            variables=["2m_temperature"],
            stations=["a"],
            latitude=[0.0],
            longitude=[0.0],
        )
        row = verify.score(forecast, grid, draws=200, seed=seed).iloc[0]
        covered += row.bias_lo < 0 < row.bias_hi
        naive += abs(error.mean()) < 1.96 * error.std() / np.sqrt(len(error))
    assert 0.86 < covered / 120 <= 1
    assert naive / 120 < 0.6  # what one would claim by taking hours as independent


def test_compare_pairs_the_blocks():
    """A forecast that is the reference's error times 0.9 has ratio 0.9 in every draw, however noisy the weeks are."""
    grid, forecast, protocol = world()
    better = forecast.copy(deep=True)
    for name in ("2m_temperature", "surface_pressure"):
        valid = forecast.valid_time.values
        o = grid[name].reindex(time=valid.reshape(-1)).to_numpy().reshape(*valid.shape, -1)
        better[name][:] = np.where(np.isfinite(o), o + 0.9 * (forecast[name].to_numpy() - o), forecast[name].to_numpy())
    table = verify.compare(better, forecast, grid, protocol, draws=100)
    np.testing.assert_allclose(table[["ratio", "ratio_lo", "ratio_hi"]].to_numpy(float), 0.9, rtol=1e-6)
    mean = table.query("variable == 'mean'")
    assert set(mean.stations) == {"training", "held_out"}
    other = verify.compare(
        forecast.isel(init_time=slice(10, None)), forecast, grid, protocol, leads=(12,), metric="crps", draws=10
    )
    assert set(other.lead_hours.dropna()) == {12}
    np.testing.assert_allclose(other.ratio, 1)


def test_pit_values_match_the_table():
    grid, forecast, protocol = world()
    pit = verify.pit_values(forecast, grid, protocol)
    table = verify.score(forecast, grid, protocol, draws=0)
    inside = np.nanmean(np.where(np.isnan(pit["2m_temperature"]), np.nan, np.abs(pit["2m_temperature"] - 0.5) <= 0.45))
    rows = table.query("variable == '2m_temperature'")
    assert inside == pytest.approx((rows.coverage * rows.n).sum() / rows.n.sum())
