"""earth.propagator on dynamics that are known: the optimal error, direct normal equations, interpolation in lead."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from earth import propagator
from earth.field import Anchors

M, SLOTS = 5, (0.0, 1.0)
PLACES = np.array(
    [[23.0, 120.0, 0.0], [23.2, 120.3, 50.0], [23.5, 120.1, 10.0], [23.9, 120.6, 300.0], [24.4, 120.2, 5.0]]
)
ANCHORS = Anchors(*(jnp.asarray(PLACES[:, i], jnp.float32) for i in range(3)))


def dynamics():
    """A stable VAR(1) on the anchors: damped advection from south to north with some mixing."""
    matrix = 0.75 * np.eye(M) + 0.2 * np.eye(M, k=-1) - 0.05 * np.eye(M, k=1)
    assert np.abs(np.linalg.eigvals(matrix)).max() < 1
    return matrix


def simulate(n, seed):
    """[n, M] states of the VAR at hourly steps, driven by unit noise."""
    rng = np.random.default_rng(seed)
    x = np.zeros((n + 200, M))
    for t in range(1, len(x)):
        x[t] = dynamics() @ x[t - 1] + rng.normal(size=M)
    return x[200:]


def samples(x, leads, seed=0):
    """Histories [n, M, R, 2] (channel 0 noise that must be ignored, channel 1 the state), times, targets by lead."""
    at = np.arange(1, len(x) - int(max(leads)))
    history = np.stack([x[at], x[at - 1]], 2)[..., None]
    noise = np.random.default_rng(seed + 9).normal(size=history.shape)
    target = np.stack([x[at + int(lead)] for lead in leads])[..., None]
    return np.concatenate([noise, history], -1).astype(np.float32), (at * 3600).astype(np.int32), target


LEADS = (1.0, 3.0)


@pytest.fixture(scope="module")
def fitted():
    x = simulate(5000, 0)
    history, time, target = samples(x, LEADS)
    present = np.random.default_rng(1).random(target.shape) < 0.8
    target = np.where(present, target, np.nan)
    folds, validation = np.arange(len(time)) // 500 % 2, np.zeros(len(time), bool)
    validation[4000:] = True
    arguments: dict[str, Any] = dict(
        leads=LEADS, channels=[1], slots=[0], folds=folds, validation=validation, fold_count=2, progress=False,
        penalties=(1.0, 100.0), length_km=50.0, season=False, block_neighbours=1,
    )  # fmt: skip
    result = propagator.fit_propagator(ANCHORS, history, time, target, present, **arguments)
    return *result, (history, time, target, present, folds, validation)


def forecast(prop, history, time, lead, fold=None):
    feature = propagator.features(prop, ANCHORS, jnp.asarray(history), jnp.asarray(time))
    hours = jnp.full(len(time), lead, jnp.float32)
    return np.asarray(propagator.propagate(prop, feature, hours, fold))


def test_it_reaches_the_optimal_error_and_beats_persistence(fitted):
    prop, chosen, _ = fitted
    history, time, target = samples(simulate(3000, 5), LEADS)
    for k, lead in enumerate(LEADS):
        error = np.sqrt(np.mean((forecast(prop, history, time, lead) - target[k]) ** 2))
        # The error of a forecaster who knows the matrix: what the noise adds over the steps.
        powers = [np.linalg.matrix_power(dynamics(), i) for i in range(int(lead))]
        optimal = np.sqrt(np.mean(np.diag(sum(p @ p.T for p in powers))))
        persistence = np.sqrt(np.mean((history[:, :, 0, 1:] - target[k]) ** 2))
        assert error < 1.03 * optimal
        assert error > 0.97 * optimal
        assert error < 0.95 * persistence
        assert chosen["scale"][k, 0] == pytest.approx(optimal, rel=0.05), "cross-fitted residual sd"
        assert chosen["validation"][k, 0] == pytest.approx(optimal, rel=0.08)
    assert chosen["scale"].shape == (2, 1)


def hand_made_features(history, time, prop):
    """Shared features of the state channel in plain loops: own, near mean, far mean; times clock; times position."""
    h = history[..., 1].astype(np.float64)  # [n, M, R]
    core = np.concatenate([h, *(np.einsum("mn,tnr->tmr", np.asarray(w, np.float64), h) for w in prop.means)], -1)
    solar = 2 * np.pi * (time[:, None] / 86400 + PLACES[None, :, 1] / 360)
    where = [np.broadcast_to(np.asarray(prop.place, np.float64)[:, i], solar.shape) for i in range(3)]
    return np.concatenate([core, *(core * part[..., None] for part in (np.cos(solar), np.sin(solar), *where))], -1)


def test_shared_weights_solve_the_pooled_normal_equations(fitted):
    """One regression over all anchors, in float64, of the full fit and of the fit without fold 1."""
    prop, chosen, (history, time, target, present, folds, validation) = fitted
    for k in range(len(LEADS)):
        features = hand_made_features(history, time, prop)
        width = features.shape[-1]
        core = width // 6
        penalty = chosen["shared_penalty"][k, 0] * np.r_[np.ones(core), np.full(width - core, 5.0)]
        for index, inside in ((0, ~validation), (2, ~validation & (folds != 1))):
            x = features[inside].reshape(-1, width)
            seen = present[k, inside].reshape(-1)
            # Rows without a target stay in the Gram matrix; the moment is scaled up to them.
            y = np.where(seen, target[k, inside].reshape(-1), 0.0)
            want = np.linalg.solve(x.T @ x + np.diag(penalty), x.T @ y * len(seen) / seen.sum())
            np.testing.assert_allclose(prop.shared[index, k, :, 0], want, atol=3e-3)


def test_local_weights_solve_the_penalised_normal_equations_of_the_rest(fitted):
    """One anchor and lead in float64, of the full fit and of the fit without fold 1: the average of the fits with and
    without clock products, on what the shared part leaves.
    """
    prop, chosen, (history, time, target, present, folds, validation) = fitted
    a, k = 3, 1
    near = np.asarray(prop.near)[a]
    lat, lon = np.deg2rad(PLACES[:, 0]), np.deg2rad(PLACES[:, 1])
    cosine = np.sin(lat[a]) * np.sin(lat) + np.cos(lat[a]) * np.cos(lat) * np.cos(lon - lon[a])
    d2 = (6371 * np.arccos(np.clip(cosine, -1, 1))) ** 2 + ((PLACES[:, 2] - PLACES[a, 2]) * 0.03) ** 2
    assert near[0] == a
    assert (np.diff(d2[near]) >= 0).all()
    h = history[..., 1].astype(np.float64)
    solar = 2 * np.pi * (time / 86400 + PLACES[a, 1] / 360)
    x = np.concatenate([h[:, near].reshape(len(h), -1), h[:, a, :1] * np.stack([np.cos(solar), np.sin(solar)], 1)], 1)
    width = len(near) * len(SLOTS)
    grown = 0.03 + np.r_[np.repeat(d2[near], len(SLOTS)), 0, 0] / 50.0**2
    grown[width:] *= 3.0
    for index, inside in ((0, ~validation), (2, ~validation & (folds != 1))):
        seen = present[k, inside, a, 0]
        shared = hand_made_features(history, time, prop)[inside, a] @ np.asarray(
            prop.shared[index, k, :, 0], np.float64
        )
        rest = np.where(seen, target[k, inside, a, 0] - shared, 0.0)
        want = np.zeros(x.shape[1])
        for fit, live in enumerate((slice(width), slice(None))):
            z, penalty = x[inside, live], chosen["penalty"][fit, k, 0] * grown[live]
            alone = np.linalg.solve(z.T @ z + np.diag(penalty), z.T @ rest * len(seen) / seen.sum())
            want[live] += chosen["share"][fit, k, 0] * alone
        np.testing.assert_allclose(prop.local[index, k, a, :, 0], want, atol=3e-3)


def test_folds_differ_and_the_selection_picks_the_right_one(fitted):
    prop, _, (history, time, *_) = fitted
    part, when = history[:6], time[:6]
    fold = jnp.asarray([-1, 0, 1, 1, 0, -1])
    got = forecast(prop, part, when, 3.0, fold)
    shared, local = propagator.features(prop, ANCHORS, jnp.asarray(part), jnp.asarray(when))
    for i, f in enumerate([-1, 0, 1, 1, 0, -1]):
        want = np.asarray(shared[i]) @ np.asarray(prop.shared)[f + 1, 1]
        want = want + np.einsum("mf,mfc->mc", local[i], np.asarray(prop.local)[f + 1, 1])
        np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[[0, 5]], forecast(prop, part, when, 3.0)[[0, 5]], rtol=1e-5, atol=1e-6)
    for weights in (prop.shared, prop.local):
        full, first, second = np.asarray(weights)
        for a, b in ((full, first), (full, second), (first, second)):
            assert np.abs(a - b).max() > 1e-5


def test_a_fold_is_not_in_its_own_fit():
    """Poisoned targets of fold 0 spoil every weight but those of the fit without fold 0."""
    x = simulate(900, 3)
    history, time, target = samples(x, (1.0,))
    folds = (np.arange(len(time)) // 100 % 2).astype(np.int32)
    validation = np.arange(len(time)) > 800
    arguments: dict[str, Any] = dict(
        leads=(1.0,), channels=[1], slots=[0], folds=folds, validation=validation, fold_count=2, progress=False,
        penalties=(10.0,), shared_penalties=(10.0,), clock=False, season=False,
    )  # fmt: skip
    spoiled = np.where((folds == 0)[None, :, None, None], -target, target)
    clean, dirty = (
        propagator.fit_propagator(ANCHORS, history, time, y, np.ones(y.shape, bool), **arguments)[0]
        for y in (target, spoiled)
    )
    for a, b in ((clean.shared, dirty.shared), (clean.local, dirty.local)):
        np.testing.assert_allclose(a[1], b[1], atol=1e-5)
    assert np.abs(clean.shared[0] - dirty.shared[0]).max() > 0.1
    assert np.abs(clean.shared[2] - dirty.shared[2]).max() > 0.1


@pytest.mark.parametrize("block", ["clock", "season"])
def test_the_hour_and_the_season_may_change_what_an_anomaly_means(block):
    """An anomaly that reverses its meaning between day and night, or summer and winter."""
    rng = np.random.default_rng(4)
    n = 2500
    history = rng.normal(size=(n, M, 2, 1)).astype(np.float32)
    hours = np.arange(n) * (1 if block == "clock" else 6)  # 104 days or 625
    time = (hours * 3600).astype(np.int32)
    solar = 2 * np.pi * (hours[:, None] / 24 + PLACES[None, :, 1] / 360)
    phase = solar if block == "clock" else 2 * np.pi * (hours[:, None] / 24 + 1) / 365.25
    target = (history[:, :, 0, 0] * np.cos(phase))[None, :, :, None] + 0.1 * rng.normal(size=(1, n, M, 1))
    arguments: dict[str, Any] = dict(
        leads=(1.0,), channels=[0], slots=[0], folds=np.arange(n) // 100 % 2, validation=np.arange(n) > 2000,
        fold_count=2, progress=False, penalties=(1.0,),
    )  # fmt: skip
    prop, chosen = propagator.fit_propagator(ANCHORS, history, time, target, np.ones(target.shape, bool), **arguments)
    assert chosen["validation"][0, 0] < 0.2
    error = forecast(prop, history, time, 1.0) - target[0]
    assert np.sqrt((error**2).mean()) < 0.2
    without: dict[str, Any] = {"clock": False, "season": False}
    _, chosen = propagator.fit_propagator(
        ANCHORS, history, time, target, np.ones(target.shape, bool), **arguments, **without
    )
    assert chosen["validation"][0, 0] > 0.6
    assert np.sqrt((target**2).mean()) > 0.6


@given(st.lists(st.floats(0.5, 100), min_size=1, max_size=6, unique=True), st.floats(0, 150))
def test_knot_weights_interpolate(knots, lead):
    knots = np.unique(np.round(sorted(knots), 1)).astype(np.float32)
    share = np.asarray(propagator.knot_weights(jnp.asarray(knots), jnp.asarray([lead], jnp.float32)))[0]
    decay = np.exp(-max(lead - knots[-1], 0) / 48.0)
    assert share.sum() == pytest.approx(decay, abs=1e-4), "a partition of unity up to the last knot"
    assert (share >= 0).all()
    assert (share > 0).sum() <= 2
    values = np.sin(knots) + 2
    assert share @ values == pytest.approx(np.interp(lead, knots, values) * decay, abs=2e-3)


def test_knot_weights_are_exact_at_knots_in_any_batch_shape():
    knots = jnp.asarray([1.0, 3.0, 6.0, 48.0])
    np.testing.assert_allclose(propagator.knot_weights(knots, knots), np.eye(4), atol=1e-6)
    grid = propagator.knot_weights(knots, jnp.asarray([[0.0, 2.0], [27.0, 96.0]]))
    assert grid.shape == (2, 2, 4)
    np.testing.assert_allclose(grid[0], [[1, 0, 0, 0], [0.5, 0.5, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(grid[1], [[0, 0, 0.5, 0.5], [0, 0, 0, np.exp(-1)]], atol=1e-6)


def test_what_one_anchor_taught_serves_another():
    """An anchor whose own record is nearly all missing is forecast by what the others taught."""
    x = simulate(1500, 8)
    x = np.repeat(x[:, :1], M, 1) + np.random.default_rng(2).normal(size=x.shape)  # the same dynamics everywhere
    history, time, target = samples(x, (1.0,))
    present = np.ones(target.shape, bool)
    present[:, 20:, 2] = False
    arguments: dict[str, Any] = dict(
        leads=(1.0,), channels=[1], slots=[0], folds=np.arange(len(time)) // 100 % 2,
        validation=np.arange(len(time)) > 1300, fold_count=2, progress=False, season=False, clock=False,
    )  # fmt: skip
    prop, _ = propagator.fit_propagator(ANCHORS, history, time, target, present, **arguments)
    error = np.sqrt(((forecast(prop, history, time, 1.0) - target[0]) ** 2).mean((0, 2)))
    assert error[2] < 1.1 * np.delete(error, 2).mean()
    assert error[2] < 0.9 * target[0][:, 2].std()


def test_a_short_record_may_leave_folds_and_validation_empty():
    x = simulate(260, 6)
    history, time, target = samples(x, (1.0,))
    arguments: dict[str, Any] = dict(
        leads=(1.0,), channels=[1], slots=[0], folds=np.arange(len(time)) // 200, fold_count=4, progress=False,
        validation=np.zeros(len(time), bool), season=False,
    )  # fmt: skip
    prop, chosen = propagator.fit_propagator(ANCHORS, history, time, target, np.ones(target.shape, bool), **arguments)
    error = forecast(prop, history, time, 1.0) - target[0]
    assert np.sqrt((error**2).mean()) < 0.9 * target.std()
    assert np.isfinite(chosen["scale"]).all()
