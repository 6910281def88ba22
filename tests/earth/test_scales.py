"""Spectra from points: against scipy's harmonics, Parseval, and fields whose scales are known."""

import numpy as np
import pytest
from scipy.special import sph_harm_y

from earth.scales import ScaleError, compare_scales, even_points, power_by_degree


def single(latitude, longitude, n, m):
    """A real harmonic of scipy, mean square 1 on the sphere."""
    y = sph_harm_y(n, m, np.deg2rad(90 - latitude), np.deg2rad(longitude))
    return np.sqrt(4 * np.pi) * (y.real if m == 0 else np.sqrt(2) * y.real)


@pytest.mark.parametrize(("n", "m"), [(0, 0), (1, 1), (4, 0), (7, 3), (10, 10)])
def test_one_harmonic_is_of_one_degree(n, m):
    latitude, longitude = even_points(10)
    power = power_by_degree(3.0 * single(latitude, longitude, n, m), latitude, longitude, 10)
    expected = np.zeros(11)
    expected[n] = 9.0
    np.testing.assert_allclose(power, expected, atol=1e-9)


def test_powers_add_up_to_the_mean_square():
    """Parseval, against the integral by Gauss-Legendre quadrature."""
    rng = np.random.default_rng(0)
    terms = [(n, m, rng.normal()) for n in range(7) for m in range(n + 1)]

    def field(latitude, longitude):
        return sum(a * single(latitude, longitude, n, m) for n, m, a in terms)

    nodes, weights = np.polynomial.legendre.leggauss(12)
    lat, lon = np.meshgrid(np.rad2deg(np.arcsin(nodes)), np.arange(0, 360, 15.0), indexing="ij")
    integral = (field(lat, lon) ** 2).mean(1) @ weights / 2
    latitude, longitude = even_points(8)
    power = power_by_degree(field(latitude, longitude), latitude, longitude, 8)
    assert power.sum() == pytest.approx(integral, rel=1e-9)


def test_a_blurred_forecast_loses_its_small_scales_first():
    rng = np.random.default_rng(1)
    latitude, longitude = even_points(9)
    terms = [(n, m, rng.normal(size=40)) for n in range(10) for m in range(n + 1)]
    truth = sum(a[:, None] * single(latitude, longitude, n, m) for n, m, a in terms)
    blurred = sum(a[:, None] * 0.9**n * single(latitude, longitude, n, m) for n, m, a in terms)
    found = compare_scales(blurred, truth, latitude, longitude, 9)
    np.testing.assert_allclose(found["ratio"], 0.81 ** np.arange(10), rtol=1e-9)
    np.testing.assert_allclose(found["error"], found["truth"] * (1 - 0.9 ** np.arange(10)) ** 2, rtol=1e-7, atol=1e-12)


def test_points_that_determine_nothing_are_refused():
    latitude, longitude = even_points(5)
    with pytest.raises(ScaleError, match="do not determine the 121 coefficients to degree 10"):
        power_by_degree(np.zeros(len(latitude)), latitude, longitude, 10)
    north = np.abs(latitude)
    with pytest.raises(ScaleError, match="even_points"):
        power_by_degree(np.zeros(len(latitude)), north, longitude, 5)
    with pytest.raises(ScaleError, match="not finite"):
        power_by_degree(np.full(len(latitude), np.nan), latitude, longitude, 5)
