"""earth.propagator on dynamics that are known: the optimal error, direct normal equations, interpolation in lead."""

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
    arguments = dict(
        leads=LEADS, channels=[1], slots=[0], folds=folds, validation=validation, fold_count=2, progress=False,
        penalties=(1.0, 100.0), clock_penalties=(1e9,),
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


def test_weights_solve_the_penalised_normal_equations(fitted):
    """One anchor and lead in float64, of the full fit and of the fit without fold 1."""
    prop, chosen, (history, time, target, present, folds, validation) = fitted
    a, k = 3, 1
    x = np.asarray(propagator.features(prop, ANCHORS, jnp.asarray(history), jnp.asarray(time)), np.float64)[:, a]
    near = np.asarray(prop.near)[a]
    lat, lon = np.deg2rad(PLACES[:, 0]), np.deg2rad(PLACES[:, 1])
    cosine = np.sin(lat[a]) * np.sin(lat) + np.cos(lat[a]) * np.cos(lat) * np.cos(lon - lon[a])
    d2 = (6371 * np.arccos(np.clip(cosine, -1, 1))) ** 2 + ((PLACES[:, 2] - PLACES[a, 2]) * 0.03) ** 2
    assert near[0] == a
    assert (np.diff(d2[near]) >= 0).all()
    width = len(near) * len(SLOTS)
    penalty = chosen["penalty"][k, 0] * (0.03 + np.repeat(d2[near], len(SLOTS)) / 50.0**2)
    x = x[:, :width]
    for index, rows in ((0, ~validation), (2, ~validation & (folds != 1))):
        rows = rows & present[k, :, a, 0]
        # Rows without a target enter the Gram matrix with target 0: absent targets pull towards the normal.
        inside = ~validation if index == 0 else ~validation & (folds != 1)
        moment = x[rows].T @ target[k, rows, a, 0]
        want = np.linalg.solve(x[inside].T @ x[inside] + np.diag(penalty), moment)
        np.testing.assert_allclose(prop.weight[index, k, a, :width, 0], want, atol=2e-3)
        np.testing.assert_allclose(prop.weight[index, k, a, width:, 0], 0, atol=1e-7)


def test_folds_differ_and_the_selection_picks_the_right_one(fitted):
    prop, _, (history, time, *_) = fitted
    part, when = history[:6], time[:6]
    fold = jnp.asarray([-1, 0, 1, 1, 0, -1])
    got = forecast(prop, part, when, 3.0, fold)
    x = np.asarray(propagator.features(prop, ANCHORS, jnp.asarray(part), jnp.asarray(when)))
    for i, f in enumerate([-1, 0, 1, 1, 0, -1]):
        want = np.einsum("mf,mfc->mc", x[i], np.asarray(prop.weight)[f + 1, 1])
        np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[[0, 5]], forecast(prop, part, when, 3.0)[[0, 5]], rtol=1e-5, atol=1e-6)
    full, first, second = np.asarray(prop.weight)
    for a, b in ((full, first), (full, second), (first, second)):
        assert np.abs(a - b).max() > 1e-4


def test_a_fold_is_not_in_its_own_fit():
    """Poisoned targets of fold 0 spoil every weight but those of the fit without fold 0."""
    x = simulate(900, 3)
    history, time, target = samples(x, (1.0,))
    folds = (np.arange(len(time)) // 100 % 2).astype(np.int32)
    validation = np.arange(len(time)) > 800
    arguments = dict(
        leads=(1.0,), channels=[1], slots=[0], folds=folds, validation=validation, fold_count=2, progress=False,
        penalties=(10.0,), clock_penalties=(1e9,),
    )  # fmt: skip
    spoiled = np.where((folds == 0)[None, :, None, None], -target, target)
    clean, dirty = (
        propagator.fit_propagator(ANCHORS, history, time, y, np.ones(y.shape, bool), **arguments)[0].weight
        for y in (target, spoiled)
    )
    np.testing.assert_allclose(clean[1], dirty[1], atol=1e-5)
    assert np.abs(clean[0] - dirty[0]).max() > 0.1
    assert np.abs(clean[2] - dirty[2]).max() > 0.1


def test_the_clock_block_is_chosen_when_the_hour_matters():
    """An anomaly that reverses its meaning between day and night: linear in history times clock, nothing without."""
    rng = np.random.default_rng(4)
    n = 2500
    history = rng.normal(size=(n, M, 2, 1)).astype(np.float32)
    time = (np.arange(n) * 3600).astype(np.int32)
    solar = 2 * np.pi * (np.arange(n)[:, None] / 24 + PLACES[None, :, 1] / 360)
    target = (history[:, :, 0, 0] * np.cos(solar))[None, :, :, None] + 0.1 * rng.normal(size=(1, n, M, 1))
    arguments = dict(
        leads=(1.0,), channels=[0], slots=[0], folds=np.arange(n) // 100 % 2, validation=np.arange(n) > 2000,
        fold_count=2, progress=False, penalties=(1.0,),
    )  # fmt: skip
    prop, chosen = propagator.fit_propagator(ANCHORS, history, time, target, np.ones(target.shape, bool), **arguments)
    assert chosen["clock"][0, 0] == 10.0
    assert chosen["validation"][0, 0] < 0.15
    error = forecast(prop, history, time, 1.0) - target[0]
    assert np.sqrt((error**2).mean()) < 0.15
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
