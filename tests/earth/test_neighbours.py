"""The search for neighbours: tree and brute force against a loop, ties, few anchors, malformed positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from earth.neighbours import FAR2, NeighbourError, nearest


def draw(points, anchors, axes=4, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, axes)).astype(np.float32) for n in (points, anchors))


def oracle(points, anchors, k):
    """Sorted squared distances, float64: ([N] sets of anchors, [N] radius2)."""
    sets, radius2 = [], []
    for x in points.astype(np.float64):
        d2 = np.array([((x - u) ** 2).sum() for u in anchors.astype(np.float64)])
        order = np.argsort(d2, kind="stable")
        sets.append(list(order[:k]))
        radius2.append((1 - 2e-6) * d2[order[k]] if k < len(anchors) else FAR2)
    return sets, np.array(radius2)


SEARCHES = {
    "host": nearest,
    "jit": lambda x, u, k: jax.jit(nearest, static_argnums=2, static_argnames="block")(x, u, k, block=16),
    "eager": lambda x, u, k: nearest(jnp.asarray(x), jnp.asarray(u), k),
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(("points", "anchors", "k"), [(50, 30, 5), (16, 30, 1), (1, 2, 1), (33, 4, 3)])
def test_against_a_loop(search, points, anchors, k):
    x, u = draw(points, anchors)
    found = SEARCHES[search](x, u, k)
    sets, radius2 = oracle(x, u, k)
    assert found.index.dtype == np.int32
    assert np.asarray(found.index).tolist() == sets, "nearest first"
    np.testing.assert_allclose(found.radius2, radius2, rtol=3e-6)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(("anchors", "k"), [(3, 3), (3, 5), (1, 1)])
def test_no_more_anchors_than_neighbours(search, anchors, k):
    """All anchors are neighbours, and so far inside that the taper is 1."""
    x, u = draw(7, anchors)
    found = SEARCHES[search](x, u, k)
    assert (np.sort(found.index)[:, -anchors:] == np.arange(anchors)).all()
    assert (np.asarray(found.index)[:, anchors:] == -1).all()
    assert (np.asarray(found.radius2) == np.float32(FAR2)).all()
    assert (1 - 1e6 / np.asarray(found.radius2) == 1).all()


@pytest.mark.parametrize("search", SEARCHES)
def test_ties_leave_a_neighbour(search):
    """Anchors that are nearest alike, and anchors on the point itself: never an empty neighbourhood."""
    corners = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
    found = SEARCHES[search](np.zeros((1, 2), np.float32), corners, 2)
    assert 1 < found.radius2[0] < 1.0001
    found = SEARCHES[search](np.ones((1, 2), np.float32), np.ones((4, 2), np.float32), 2)
    assert 0 < found.radius2[0] < 1e-20
    assert len(set(np.asarray(found.index[0]).tolist())) == 2


@pytest.mark.parametrize("search", SEARCHES)
def test_order_of_anchors_is_free(search):
    x, u = draw(40, 25)
    shuffle = np.random.default_rng(1).permutation(25)
    one, other = SEARCHES[search](x, u, 4), SEARCHES[search](x, u[shuffle], 4)
    assert (shuffle[np.asarray(other.index)] == np.asarray(one.index)).all()
    np.testing.assert_array_equal(one.radius2, other.radius2)


def test_malformed_positions_are_named():
    x, u = draw(5, 9)
    with pytest.raises(NeighbourError, match="k = 0"):
        nearest(x, u, 0)
    with pytest.raises(NeighbourError, match="no anchors"):
        nearest(x, u[:0], 2)
    bad = x.copy()
    bad[3, 1] = np.nan
    with pytest.raises(NeighbourError, match=r"point 3 is at .*nan"):
        nearest(bad, u, 2)
    bad = u.copy()
    bad[7, 0] = np.inf
    with pytest.raises(NeighbourError, match="anchor 7"):
        nearest(jnp.asarray(x), jnp.asarray(bad), 2)


def test_traced_nan_has_no_neighbours():
    """What cannot be looked at while tracing: a point at NaN has none, an anchor at NaN is nobody's."""
    x, u = draw(6, 9)
    x[2, 0] = u[4, 1] = np.nan
    found = jax.jit(nearest, static_argnums=2)(x, u, 8)
    assert found.radius2[2] == 0
    assert (found.index[2] == -1).all()
    rest = np.asarray(found.index)[[0, 1, 3, 4, 5]]
    assert not (rest == 4).any()
    assert (np.asarray(found.radius2)[[0, 1, 3, 4, 5]] == np.float32(FAR2)).all(), "8 of 8 that are there"


def test_no_gradient():
    x, u = (jnp.asarray(a) for a in draw(6, 9))
    assert not np.any(jax.grad(lambda x: nearest(x, u, 2).radius2.sum())(x))


def test_memory_is_a_block_of_distances():
    """10^5 points against 10^3 anchors in jit: the distances of a block, not of all."""
    x, u = (jax.ShapeDtypeStruct((n, 4), jnp.float32) for n in (100_000, 1000))
    compiled = jax.jit(lambda x, u: nearest(x, u, 8, block=128)).lower(x, u).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    results = 100_000 * 9 * 4
    assert memory.temp_size_in_bytes < 4 * results + 8 * 128 * 1000 * 4 < 100_000 * 1000 * 4 / 10
