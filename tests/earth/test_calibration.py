"""earth.calibration and the mixture of members against draws, plain least squares and the prior's own promises."""

import numpy as np
import pytest

from earth.calibration import _shrunk, prior_weights
from earth.forecast import mixture


def test_mixture_moments_are_those_of_draws():
    rng = np.random.default_rng(0)
    weight, delta, spread = np.array([0.3, 0.5]), np.array([1.5, -0.7]), np.array([0.4, 1.1])
    mean, sd = mixture(weight[:, None], delta[:, None], spread[:, None])
    which = rng.choice(3, 400_000, p=[0.2, 0.3, 0.5])
    own = np.sqrt((weight * spread**2).sum() / weight.sum())  # the propagator takes the members' average
    draws = np.r_[0.0, delta][which] + np.r_[own, spread][which] * rng.normal(size=len(which))
    assert mean[0] == pytest.approx(draws.mean(), abs=0.01)
    assert sd[0] == pytest.approx(draws.std(), rel=0.01)


def test_a_member_without_weight_changes_nothing():
    delta, spread = np.array([[1.0], [50.0]]), np.array([[0.5], [30.0]])
    mean, sd = mixture(np.array([[0.6], [0.0]]), delta, spread)
    alone = mixture(np.array([[0.6]]), delta[:1], spread[:1])
    assert mean[0] == pytest.approx(alone[0][0])
    assert sd[0] == pytest.approx(alone[1][0], rel=0.01)


def test_prior_halves_a_correction_and_distrusts_an_own_forecast_at_first():
    weight = prior_weights(np.array([1.0, 0.0, 1.0, 0.0]), np.array([1.0, 6.0, 48.0]))
    np.testing.assert_allclose(weight[[0, 2]].sum(0), 0.5)
    own = weight[[1, 3]].sum(0)
    assert (np.diff(own) > 0).all()
    assert own[0] < 0.02
    assert 0.3 < own[2] < 0.5


def test_weights_lie_between_the_prior_and_least_squares():
    rng = np.random.default_rng(1)
    delta = rng.normal(size=(1, 20_000))
    left = 0.9 * delta[0] + rng.normal(size=20_000)
    w = _shrunk(left, delta, np.array([0.1]))[0]
    assert w == pytest.approx((0.9 + 3 * 0.1) / 4, abs=0.02)  # the prior counts three times
    assert _shrunk(-5 * delta[0], delta, np.array([0.1]))[0] == 0.0
    both = _shrunk(5 * delta[0], np.repeat(delta, 2, 0), np.array([0.5, 0.5]))
    assert both.sum() == pytest.approx(1.0)
