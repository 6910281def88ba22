"""earth.field against kriging written out in float64, brute-force weights and simulated fields."""

import jax.numpy as jnp
import numpy as np
import pytest

from earth import field
from earth.field import Anchors

RIDGE = 1e-3


def as_anchors(latitude, longitude, height) -> Anchors:
    return Anchors(*(jnp.asarray(a, jnp.float32) for a in (latitude, longitude, height)))


def scatter(n, seed=0, extent=3.0, relief=1500.0):
    rng = np.random.default_rng(seed)
    return rng.uniform(22, 22 + extent, n), rng.uniform(120, 120 + extent, n), rng.uniform(0, relief, n)


def kilometres(lat_a, lon_a, lat_b, lon_b):
    p, q, d = np.deg2rad(lat_a)[:, None], np.deg2rad(lat_b)[None], np.deg2rad(lon_b[None] - lon_a[:, None])
    across = np.hypot(np.cos(q) * np.sin(d), np.cos(p) * np.sin(q) - np.sin(p) * np.cos(q) * np.cos(d))
    return 6371.0 * np.arctan2(across, np.sin(p) * np.sin(q) + np.cos(p) * np.cos(q) * np.cos(d))


def matern(a, b, length_km, length_m, site):
    """Matern-3/2 plus the site part, in float64."""
    d, dz = kilometres(a[0], a[1], b[0], b[1]), a[2][:, None] - b[2][None]
    s = np.sqrt(3 * ((d / length_km) ** 2 + (dz / length_m) ** 2))
    return (1 - site) * (1 + s) * np.exp(-s) + site * np.exp(-(d**2) - (dz / 100) ** 2)


@pytest.fixture(scope="module")
def places():
    return scatter(15)


@pytest.fixture(scope="module")
def kernel(places):
    return field.make_kernel(as_anchors(*places), [80.0, 300.0], [1000.0, 3000.0], [0.1, 0.02], ridge=RIDGE)


def read(kernel, places, where):
    weight, explained = field.read_weights(kernel, as_anchors(*places), *(jnp.asarray(a, jnp.float32) for a in where))
    return np.asarray(weight), np.asarray(explained)


def test_reading_is_simple_kriging(kernel, places):
    where = scatter(9, seed=4, extent=4.0)
    weight, explained = read(kernel, places, where)
    for c, scales in enumerate([(80.0, 1000.0, 0.1), (300.0, 3000.0, 0.02)]):
        prior = matern(where, places, *scales)
        gain = prior @ np.linalg.inv(matern(places, places, *scales) + RIDGE * np.eye(15))
        np.testing.assert_allclose(weight[c], gain, atol=0.02)
        np.testing.assert_allclose(explained[c], (gain * prior).sum(-1), atol=0.02)


def test_reading_is_exact_at_anchors_and_nothing_far_away(kernel, places):
    weight, explained = read(kernel, places, places)
    np.testing.assert_allclose(weight, np.tile(np.eye(15), (2, 1, 1)), atol=0.06)
    assert (explained > 0.97).all()
    far = (np.array([-40.0, 60.0]), np.array([-60.0, 10.0]), np.array([0.0, 0.0]))
    weight, explained = read(kernel, places, far)
    np.testing.assert_allclose(weight, 0, atol=1e-6)
    np.testing.assert_allclose(explained, 0, atol=1e-6)


def test_gather_is_a_weighted_mean_with_the_background(places):
    """Against a loop: every anchor's mean over seen tokens by inverse fourth power, the background far from all."""
    rng = np.random.default_rng(2)
    where = scatter(6, seed=3)
    value, mask = rng.normal(size=(6, 2, 3)), rng.random((6, 2, 3)) < 0.6
    background, confidence = rng.normal(size=(15, 2, 3)), np.full((15, 2, 3), 0.5)
    arguments = (jnp.asarray(value, jnp.float32), jnp.asarray(mask), *(jnp.asarray(a, jnp.float32) for a in where))
    got, share = field.gather(
        as_anchors(*places), *arguments, jnp.asarray(background, jnp.float32), jnp.asarray(confidence, jnp.float32)
    )
    d = np.hypot(kilometres(*places[:2], *where[:2]), (places[2][:, None] - where[2][None]) / 10)
    for m in range(15):
        for r in range(2):
            for v in range(3):
                w = (d[m] ** 2 + 4.0) ** -2.0 * mask[:, r, v]
                null = 150.0**-4 * 1.5
                want = ((w * value[:, r, v]).sum() + null * background[m, r, v]) / (w.sum() + null)
                np.testing.assert_allclose(got[m, r, v], want, rtol=2e-3, atol=2e-3)
                np.testing.assert_allclose(share[m, r, v], w.sum() / (w.sum() + null), rtol=2e-3, atol=1e-4)


def test_gather_at_a_site_and_in_the_void(places):
    rng = np.random.default_rng(5)
    value = jnp.asarray(rng.normal(size=(15, 1, 1)), jnp.float32)
    background = jnp.asarray(rng.normal(size=(15, 1, 1)), jnp.float32)
    seen, zero = jnp.ones((15, 1, 1), bool), jnp.zeros((15, 1, 1))
    own = tuple(jnp.asarray(a, jnp.float32) for a in places)
    got, share = field.gather(as_anchors(*places), value, seen, *own, background, zero)
    np.testing.assert_allclose(got, value, atol=0.02)
    assert (np.asarray(share) > 0.99).all()
    got, share = field.gather(as_anchors(*places), value, ~seen, *own, background, zero)
    np.testing.assert_allclose(got, background, atol=1e-6)
    np.testing.assert_array_equal(share, 0)
    away = tuple(jnp.full(15, x) for x in (-50.0, -60.0, 0.0))
    got, share = field.gather(as_anchors(*places), value, seen, *away, background, zero)
    np.testing.assert_allclose(got, background, atol=1e-3)


@pytest.fixture(scope="module")
def simulated():
    """(places, anomalies [T, N, C], kernel fitted): Gaussian fields of 60, 300 and 1200 km and one that is noise."""
    places = scatter(30, seed=7, extent=6.0, relief=100.0)
    rng = np.random.default_rng(8)
    truth = [(60.0, 0.02), (300.0, 0.02), (1200.0, 0.02), (300.0, 0.5)]
    fields = []
    for length, site in truth:
        cov = matern(places, places, length, 1000.0, site)
        fields.append(rng.normal(size=(150, 30)) @ np.linalg.cholesky(cov + 1e-9 * np.eye(30)).T)
    anomalies = np.stack(fields, -1)
    anomalies[rng.random(anomalies.shape) < 0.01] = np.nan
    anomalies = np.concatenate([anomalies, np.full((150, 30, 1), np.nan)], -1)
    anomalies[:, :2, 4] = 1.0  # a channel of two sites only
    return places, anomalies, field.fit_kernel(as_anchors(*places), *places, anomalies)


def test_fitted_scales_follow_the_simulated_ones(simulated):
    kernel = simulated[2]
    length = np.asarray(kernel.length_km)[:4]
    assert length[0] < length[1] < length[2]
    # The candidates are a factor 2 apart: within one step of the truth.
    assert (np.abs(np.log2(length[:3] / np.array([60.0, 300.0, 1200.0]))) <= 1.2).all()
    site = np.asarray(kernel.site)
    assert site[3] >= 0.3 > site[1]


def test_a_channel_of_two_sites_borrows_the_others_scales(simulated):
    kernel = simulated[2]
    borrowed = float(kernel.length_km[4])
    assert min(kernel.length_km[:4]) <= borrowed <= max(kernel.length_km[:4])
    assert np.isfinite(kernel.inverse).all()
    nothing = np.full((30, 5, 2), np.nan)
    few = scatter(5)
    kernel = field.fit_kernel(as_anchors(*few), *few, nothing)
    assert np.isfinite(kernel.inverse).all()
    assert (np.asarray(kernel.length_km) > 0).all()


def test_fitted_kernel_predicts_left_out_sites_better_than_a_wrong_one(simulated):
    """Simple kriging of sites 25-29 from the others, in float64: the fit for channel 1 beats the neighbours' scales."""
    places, anomalies, kernel = simulated
    rest, left = (tuple(a[s] for a in places) for s in (slice(0, 25), slice(25, 30)))
    z = np.nan_to_num(anomalies[:, :, 1])

    def error(c):
        scales = (float(kernel.length_km[c]), float(kernel.length_m[c]), float(kernel.site[c]))
        gain = matern(left, rest, *scales) @ np.linalg.inv(matern(rest, rest, *scales) + RIDGE * np.eye(25))
        return np.mean((z[:, 25:] - z[:, :25] @ gain.T) ** 2)

    assert error(1) < error(0)
    assert error(1) < error(3)
    assert error(1) < 0.6 * np.mean(z[:, 25:] ** 2)


def test_anchors_are_the_sites_or_clusters_of_them():
    places = scatter(40, seed=1)
    all_of_them = field.fit_anchors(*places, 40)
    np.testing.assert_allclose(np.sort(all_of_them.latitude), np.sort(places[0]), rtol=1e-6)
    doubled = tuple(np.r_[a, a] for a in places)
    assert field.fit_anchors(*doubled, 50).latitude.shape == (40,), "two reports of one place are one anchor"
    few = field.fit_anchors(*places, 8)
    assert few.latitude.shape == (8,)
    d = np.hypot(
        kilometres(*places[:2], np.asarray(few.latitude, float), np.asarray(few.longitude, float)),
        (places[2][:, None] - np.asarray(few.height, float)[None]) / 10,
    )
    random = np.hypot(
        kilometres(*places[:2], places[0][:8], places[1][:8]), (places[2][:, None] - places[2][None, :8]) / 10
    )
    assert (d.min(1) ** 2).mean() < 0.8 * (random.min(1) ** 2).mean()


def test_fibonacci_anchors_cover_the_globe_evenly():
    anchors = field.fibonacci_anchors(500, (0.0, 5000.0))
    latitude, longitude = np.asarray(anchors.latitude, float), np.asarray(anchors.longitude, float)
    assert latitude.shape == (1000,)
    np.testing.assert_array_equal(np.unique(anchors.height), [0, 5000])
    assert (np.abs(longitude) <= 180).all()
    for edge in (-60, -30, 0, 20, 70):  # area south of a latitude
        assert (latitude[:500] < edge).mean() == pytest.approx((1 + np.sin(np.deg2rad(edge))) / 2, abs=0.004)
    d = kilometres(latitude[:500], longitude[:500], latitude[:500], longitude[:500])
    nearest = np.where(np.eye(500, dtype=bool), np.inf, d).min(1)
    assert nearest.min() > 0.75 * nearest.mean()
