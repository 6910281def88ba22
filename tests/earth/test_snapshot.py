"""Snapshots: first guesses beside other formulas for the same thing, what must not influence what, and that departures
from a guess are learned.
"""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import PolynomialFeatures

from earth.geometry import EARTH_RADIUS_KM
from earth.neighbours import nearest
from earth.observations import EmptyWindowError, ObservationError, Reports, great_circle_km
from earth.world.guess import KrigingConfig, RidgeConfig, fit_ridge, guess, krige, sides
from earth.world.network import NetworkConfig
from earth.world.records import SensorConfig, host_place
from earth.world.snapshot import (
    SceneField,
    Scenes,
    SnapshotConfig,
    SnapshotTrainConfig,
    first_guess,
    fit,
    headings,
    reconstruct,
    train,
)

VARIABLES = ("2m_temperature", "2m_dewpoint_temperature", "10m_u_component_of_wind")
START = int(np.datetime64("2020-10-01", "s").astype(int))
CFG = SnapshotConfig(
    sensors=(SensorConfig("station", VARIABLES, 80),),
    field=SceneField(anchors=80, length_km=150.0, vertical_km=0.5, neighbours=6, reach=6),
    network=NetworkConfig(width=16, heads=4, key=4, dynamics_layers=0),
    guesses=(("station", KrigingConfig(neighbours=8)),),
)


def places(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.uniform(40, 52, n), rng.uniform(-5, 15, n), rng.uniform(0, 2000, n), rng


def stations(n: int = 60, seed: int = 0) -> Reports:
    """Stations in one hour: a wave in temperature over a lapse rate, dew point and wind that go with it."""
    lat, lon, height, rng = places(n, seed)
    wave = np.sin(lat / 2) * np.cos(lon / 3)
    t = 290 - 0.0065 * height + 4 * wave + 0.2 * rng.normal(size=n)
    values = np.stack([t, t - 3 - 2 * wave**2, 5 * wave + 0.5 * rng.normal(size=n)], -1)
    values[rng.random(values.shape) < 0.05] = np.nan
    names = tuple(f"S{i:03d}" for i in range(n))
    return Reports("station", VARIABLES, names, np.arange(n), np.full(n, START), lat, lon, height, values)


@pytest.fixture(scope="module")
def trained():
    known = {"station": stations()}
    fitted = fit(known, CFG)
    return train(known, fitted, CFG, SnapshotTrainConfig(steps=3, reports=0.3, variables=1), progress=False)


def some_hidden(r: Reports, seed: int = 1) -> np.ndarray:
    hidden = np.zeros(r.values.shape, bool)
    rows = np.random.default_rng(seed).choice(len(r), len(r) // 4, replace=False)
    hidden[rows[::2]] = True
    hidden[rows[1::2], 0] = True
    return hidden


# -------------------------------------------------------------------------------------------------------- first guesses
def leave_one_out(covariance: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a Gaussian process, from one inverse (Rasmussen and Williams 2006, eq. 5.12)."""
    inverse = np.linalg.inv(covariance)
    return y - inverse @ y / np.diag(inverse), np.diag(inverse) ** -0.5


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("drift", [False, True])
def test_kriging_with_all_neighbours_is_the_leave_one_out_mean_of_a_gaussian_process(smooth, drift):
    lat, lon, height, rng = places(40)
    y = rng.normal(size=40)
    cfg = KrigingConfig(400.0, 800.0, 0.2, neighbours=39, drift=drift, smooth=smooth)
    chord = 2 * np.sin(great_circle_km(lat[:, None], lon[:, None], lat, lon) / 6371.0088 / 2) * EARTH_RADIUS_KM
    gaps = (chord / 400.0, np.abs(height[:, None] - height) / 800.0)
    parts = [(1 + 3**0.5 * g) * np.exp(-(3**0.5) * g) if smooth else np.exp(-g) for g in gaps]
    covariance = 0.8 * parts[0] * parts[1] + 0.2 * np.eye(40)
    mean, deviation = krige(cfg, lat, lon, height, y[:, None], np.ones((40, 1), bool))
    if not drift:
        wanted = leave_one_out(covariance, y)
    else:  # a drift with a Gaussian prior is one more part of the covariance, for every target about its own height
        wanted = np.zeros((2, 40))
        for i in range(40):
            x = (height - height[i]) / 800.0
            wanted[:, i] = [a[i] for a in leave_one_out(covariance + 1e6 + np.outer(x, x), y)]
    np.testing.assert_allclose(mean[:, 0], wanted[0], atol=2e-4)
    np.testing.assert_allclose(deviation[:, 0], np.minimum(wanted[1], 2.0), rtol=2e-3)


def test_kriging_leaves_out_hidden_values_a_row_itself_and_its_group():
    lat, lon, height, rng = places(30)
    y, shown = rng.normal(size=(30, 2)), rng.random((30, 2)) < 0.7
    shown[:, 1] &= np.arange(30) > 3
    cfg = KrigingConfig(neighbours=5)
    mean, deviation = krige(cfg, lat, lon, height, y, shown)
    again, _ = krige(cfg, lat, lon, height, np.where(shown, y, 1e6), shown)
    np.testing.assert_array_equal(mean, again)
    assert np.isfinite(mean).all()
    assert (deviation > 0).all()
    group = np.arange(30) // 10
    apart, _ = krige(cfg, lat, lon, height, y, shown, group=group)
    moved, _ = krige(cfg, lat, lon, height, np.where((group == 1)[:, None], y + 100, y), shown, group=group)
    np.testing.assert_array_equal(apart[group == 1], moved[group == 1])
    assert np.abs(apart[group != 1] - moved[group != 1]).max() > 1
    own = y.copy()
    own[7] += 50
    np.testing.assert_array_equal(krige(cfg, lat, lon, height, own, shown)[0][7], mean[7])
    nothing, one = krige(cfg, lat, lon, height, y, np.zeros_like(shown))
    assert (nothing == 0).all()
    assert (one == 1).all()


def test_ridge_guess_is_polynomial_ridge_regression_on_what_is_shown():
    rng = np.random.default_rng(0)
    value, extra = rng.normal(size=(300, 4)), rng.normal(size=(300, 2))
    value[:, 3] = value[:, 0] * extra[:, 1] - value[:, 1] + 0.1 * rng.normal(size=300)
    made = fit_ridge(RidgeConfig(2, 0, penalty=3.0), value, extra)
    shown = np.array([True, True, False, True])
    mean, _ = guess(made, value, np.broadcast_to(shown, value.shape), extra)
    for target, others in ((3, [0, 1]), (2, [0, 1, 3]), (0, [1, 3])):
        x = PolynomialFeatures(2).fit_transform(np.c_[value[:, others], extra])
        wanted = Ridge(alpha=3.0, fit_intercept=False).fit(x, value[:, target]).predict(x)
        np.testing.assert_allclose(mean[:, target], wanted, atol=1e-8)


def test_ridge_guess_of_a_variable_does_not_see_it_at_the_report_or_beside_it():
    rng = np.random.default_rng(0)
    value, extra, near = rng.normal(size=(200, 3)), rng.normal(size=(200, 1)), rng.integers(0, 200, (200, 1, 4))
    made = fit_ridge(RidgeConfig(1, 4), value, extra, near)
    shown = rng.random(value.shape) < 0.8
    mean, _ = guess(made, value, shown, extra, near)
    np.testing.assert_array_equal(mean, guess(made, np.where(shown, value, np.nan), shown, extra, near)[0])
    other = value.copy()
    other[:, 1] += rng.normal(size=200)
    moved, _ = guess(made, other, shown, extra, near)
    np.testing.assert_array_equal(mean[:, 1], moved[:, 1])
    assert np.abs(mean[:, 0] - moved[:, 0]).max() > 0.01


def test_headings_follow_the_track_and_sides_are_seen_from_it():
    """A platform that flies north-east by steps of 10 km, beside one that stands still."""
    step = 0.09 * np.arange(7)
    lat, lon = np.r_[10 + step, 50.0], np.r_[20 + step / np.cos(np.deg2rad(10)), 5.0]
    r = Reports(
        "aircraft", ("temperature",), ("A", "B"), np.r_[np.zeros(7), 1], START + np.r_[60 * np.arange(7), 0], lat, lon,
        np.full(8, 1e4), np.full((8, 1), 220.0),
    )  # fmt: skip
    along = headings(r)
    up = np.stack([np.cos(np.deg2rad(lat)) * np.cos(np.deg2rad(lon)), np.cos(np.deg2rad(lat)) * np.sin(np.deg2rad(lon)),
                   np.sin(np.deg2rad(lat))], -1)  # fmt: skip
    np.testing.assert_allclose((along * up).sum(-1), 0, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(along, axis=-1), 1)
    east = np.stack([-np.sin(np.deg2rad(lon)), np.cos(np.deg2rad(lon)), 0 * lon], -1)
    azimuth = np.rad2deg(np.arctan2((along * east).sum(-1), along[:, 2] / np.cos(np.deg2rad(lat))))
    np.testing.assert_allclose(azimuth, [45.0] * 7 + [0.0], atol=1.0)
    near = np.array([[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1], [-1, -1]])
    found = sides(up, along, near)
    np.testing.assert_array_equal(found[1], [[0, 2], [-1, 2], [0, -1], [-1, -1], [-1, -1]])
    turned = sides(up, np.cross(up, along), near)  # looking to the left: what was ahead is to the right
    np.testing.assert_array_equal(turned[1], [[0, 2], [-1, -1], [-1, -1], [0, -1], [-1, 2]])
    assert (found[7] == -1).all()


# ------------------------------------------------------------------------------------------------------------ influence
def test_hidden_values_have_no_influence_and_shown_ones_have(trained):
    r = stations()
    hidden = some_hidden(r)
    mean, deviation = reconstruct(trained, {"station": r}, {"station": hidden}, cfg=CFG)["station"]
    assert np.isfinite(mean[hidden]).all()
    assert (deviation[hidden] > 0).all()
    assert np.isnan(mean[~hidden]).all()
    for value in (np.nan, 250.0):
        other = dataclasses.replace(r, values=np.where(hidden, value, r.values))
        again, spread = reconstruct(trained, {"station": other}, {"station": hidden}, cfg=CFG)["station"]
        np.testing.assert_array_equal(again[hidden], mean[hidden])
        np.testing.assert_array_equal(spread[hidden], deviation[hidden])
    shown = dataclasses.replace(r, values=np.where(hidden, r.values, r.values + 2.0))
    moved, _ = reconstruct(trained, {"station": shown}, {"station": hidden}, cfg=CFG)["station"]
    assert np.abs(moved - mean)[hidden].min() > 0.01


def test_order_and_names_of_reports_do_not_matter(trained):
    r = stations()
    hidden = some_hidden(r)
    mean, _ = reconstruct(trained, {"station": r}, {"station": hidden}, cfg=CFG)["station"]
    order = np.random.default_rng(3).permutation(len(r))
    parts = {k: getattr(r, k)[order] for k in ("latitude", "longitude", "height", "values")}
    mixed = dataclasses.replace(r, platforms=tuple(f"X{i}" for i in range(len(r))), **parts)
    again, _ = reconstruct(trained, {"station": mixed}, {"station": hidden[order]}, cfg=CFG)["station"]
    np.testing.assert_allclose(again, mean[order], atol=2e-3)


def test_moving_a_report_by_a_little_moves_predictions_by_a_little(trained):
    r = stations()
    hidden = some_hidden(r)
    mean, _ = reconstruct(trained, {"station": r}, {"station": hidden}, cfg=CFG)["station"]
    row = int(np.flatnonzero(~hidden.any(1))[0])
    change = {}
    for km in (0.01, 1.0, 200.0):
        latitude = r.latitude.copy()
        latitude[row] += km / 111.2
        moved = dataclasses.replace(r, latitude=latitude)
        again, _ = reconstruct(trained, {"station": moved}, {"station": hidden}, cfg=CFG)["station"]
        change[km] = np.abs(again - mean)[hidden].max()
    assert change[0.01] < 5e-3
    assert change[1.0] < 0.2
    assert change[200.0] > 10 * change[0.01]


def test_innovations_of_shown_values_are_against_a_guess_without_them(trained):
    r = stations()
    values = np.array(r.values)
    values[11] += 30.0
    guesses = []
    for v in (r.values, values):
        scenes = Scenes({"station": dataclasses.replace(r, values=v)}, trained.fitted, CFG)
        p = scenes.parts["station"]
        guesses.append(scenes.guess("station", p, np.isfinite(p["value"])))
    assert np.isfinite(guesses[0][0]).all()
    np.testing.assert_array_equal(guesses[0][0][11], guesses[1][0][11])
    assert np.abs(guesses[0][0] - guesses[1][0]).max() > 0.1


def test_scenes_have_anchors_at_their_reports_and_score_their_core_only(trained):
    r = stations(120)
    scenes = Scenes({"station": r}, trained.fitted, CFG)
    scene = scenes.draw(SnapshotTrainConfig(reports=0.4), np.random.default_rng(0))
    t, anchors = scene["tokens"]["station"], scene["anchors"]
    distance = great_circle_km(
        t.latitude[:, None].astype(float), t.longitude[:, None].astype(float), anchors.latitude, anchors.longitude
    )
    assert distance.min(1).max() < 0.01  # every report has an anchor
    from_centre = great_circle_km(
        *(np.asarray(x, float) for x in (t.latitude, t.longitude)), t.latitude[0], t.longitude[0]
    )
    assert (np.diff(from_centre) > -0.01).all()
    hidden = scene["hidden"]["station"]
    assert hidden.any()
    assert not hidden[40:].any()
    assert not (hidden & t.mask).any()
    assert (t.value[~t.mask] == 0).all()
    few = Scenes({"station": stations(12)}, trained.fitted, CFG).draw(
        SnapshotTrainConfig(reports=0.4), np.random.default_rng(0)
    )
    assert few["tokens"]["station"].mask[12:].sum() == 0
    assert (few["anchors"].place[12:, 3] > 1e3).all()


def test_a_turned_scene_keeps_distances_neighbours_and_directions(trained):
    scenes = Scenes({"station": stations(120)}, trained.fitted, CFG)
    scene = scenes.draw(SnapshotTrainConfig(reports=0.4), np.random.default_rng(0))
    moved = scenes.turned(scene, 30.0, 500.0, np.random.default_rng(1))
    before, after = scene["anchors"], moved["anchors"]
    assert np.abs(before.latitude - after.latitude).max() > 1
    assert np.abs(before.height - after.height).max() > 1

    def gaps(a):
        offset = a.place[:, None] - a.place
        return np.square(offset).sum(-1), np.einsum("nmp,mcp->nmc", offset, a.frame)

    for x, y in zip(gaps(before), gaps(after), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-3)
    t = moved["tokens"]["station"]
    place = host_place(CFG.field, t.latitude, t.longitude, t.height)
    near = nearest(place, after.place.astype(np.float64), CFG.field.neighbours)
    np.testing.assert_allclose(near.radius2, t.near.radius2, rtol=1e-3, atol=1e-3)
    assert (near.index[:, 0] == t.near.index[:, 0]).all()
    np.testing.assert_array_equal(t.value, scene["tokens"]["station"].value)


def test_a_file_of_several_scenes_is_answered_everywhere(trained):
    r = stations(300)
    hidden = np.ones(r.values.shape, bool)
    hidden[::2] = False
    mean, deviation = reconstruct(trained, {"station": r}, {"station": hidden}, cfg=CFG)["station"]
    assert np.isfinite(mean[hidden]).all()
    assert np.isfinite(deviation[hidden]).all()
    assert np.sqrt(np.nanmean((mean[:, 0] - r.values[:, 0]) ** 2)) < 2.5  # of 5.1 K about the mean


# ------------------------------------------------------------------------------------------------------------- learning
def test_a_departure_from_the_guess_is_learned_and_carries_to_reports_of_another_place():
    """The second variable is the absolute value of the first, of which linear regression knows nothing."""

    def made(seed: int, n: int) -> Reports:
        lat, lon, height, rng = places(n, seed)
        x = rng.normal(size=n)
        values = np.stack([285 + 3 * x, 275 + 4 * np.abs(x), rng.normal(size=n)], -1)
        names = tuple(f"S{i:04d}" for i in range(n))
        return Reports("station", VARIABLES, names, np.arange(n), np.full(n, START), lat, lon, height, values)

    cfg = dataclasses.replace(CFG, guesses=(("station", RidgeConfig(1, 0)),))
    known, other = {"station": made(0, 600)}, {"station": made(1, 200)}
    fitted = fit(known, cfg)
    tcfg = SnapshotTrainConfig(steps=200, variables=1, learning_rate=1e-2, warmup=10, ema=0.95)
    params = train(known, fitted, cfg, tcfg, progress=False)
    hidden = np.zeros((200, 3), bool)
    hidden[:, 1] = True
    truth = other["station"].values[:, 1]
    mean, deviation = reconstruct(params, other, {"station": hidden}, cfg=cfg)["station"]
    linear, _ = first_guess(fitted, other, {"station": hidden}, cfg=cfg)["station"]
    error, before = (np.sqrt(np.mean((m[:, 1] - truth) ** 2)) for m in (mean, linear))
    assert before > 2.0
    assert error < 0.5 * before
    assert 0.3 < np.mean(((mean[:, 1] - truth) / deviation[:, 1]) ** 2) < 3.0


# --------------------------------------------------------------------------------------------------------------- errors
def test_bad_input_is_named(trained):
    r = stations()
    hidden = some_hidden(r)
    with pytest.raises(ObservationError, match=r"shape \(60, 2\), not \(60, 3\)"):
        reconstruct(trained, {"station": r}, {"station": hidden[:, :2]}, cfg=CFG)
    with pytest.raises(ObservationError, match="'ship'"):
        reconstruct(trained, {"station": r}, {"ship": hidden}, cfg=CFG)
    with pytest.raises(EmptyWindowError, match="everything there is is hidden"):
        reconstruct(trained, {"station": r}, {"station": np.ones_like(hidden)}, cfg=CFG)
    with pytest.raises(ObservationError, match="no reports of sensor 'station'"):
        fit({}, CFG)
    with pytest.raises(EmptyWindowError, match="twice as many"):
        fit({"station": stations(15)}, dataclasses.replace(CFG, guesses=(("station", RidgeConfig()),)))
    for bad, match in (
        (lambda: SnapshotTrainConfig(), "nothing is hidden"),
        (lambda: SnapshotTrainConfig(reports=1.0), "lie in"),
        (lambda: SceneField(core=0.0), "core 0.0"),
        (lambda: KrigingConfig(nugget=0.0), "nugget 0.0"),
        (lambda: RidgeConfig(degree=3), "degree 3"),
        (lambda: dataclasses.replace(CFG, guesses=(("ship", RidgeConfig()),)), "'ship'"),
        (lambda: dataclasses.replace(CFG, weights=(("temperature", 1.0),)), "'temperature'"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
