"""Every implementation of neighbour attention against loops in float64, and what the field must never do."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from earth.kernels.neighbour_attention import (
    IMPLEMENTATIONS,
    NeighbourAttentionError,
    attend,
    collect,
    pairs,
)
from earth.kernels.neighbour_attention.order import arrangement
from earth.kernels.neighbour_attention.shapes import check_operands
from earth.kernels.neighbour_attention.tiles import sort
from earth.neighbours import FAR2, Neighbourhood, nearest
from moe.kernels import aot, aot_cuda
from moe.sharding import AxisRules, make_mesh, use_mesh

HEADS, KEY, WIDTH, AXES, DIRECTIONS = 4, 4, 5, 4, 3
POINTS, ANCHORS, SLOTS = 150, 40, 4  # most tests have these shapes, so that they share what is compiled


@dataclasses.dataclass
class Case:
    """Positions [N, 4] and [M, 4], frame [M, 3, 4], which points are there, and k."""

    points: np.ndarray
    anchors: np.ndarray
    frame: np.ndarray
    where: np.ndarray
    k: int

    def pairs(self):
        near = nearest(self.points, self.anchors, self.k)
        index = np.pad(near.index, ((0, 0), (0, max(0, SLOTS - self.k))), constant_values=-1)
        near = Neighbourhood(index, near.radius2)
        return pairs(self.points, self.anchors, near, frame=jnp.asarray(self.frame), where=jnp.asarray(self.where))


def sphere(rng, count):
    """Unit vectors of twice the unit length, and heights."""
    x = rng.normal(size=(count, 3))
    x *= 2 / np.linalg.norm(x, axis=1, keepdims=True)
    return np.concatenate([x, rng.uniform(0, 0.5, (count, 1))], 1).astype(np.float32)


def make(points=POINTS, anchors=ANCHORS, k=SLOTS, missing=0.2, seed=0):
    rng = np.random.default_rng(seed)
    frame = rng.normal(size=(anchors, DIRECTIONS, AXES)).astype(np.float32)
    return Case(sphere(rng, points), sphere(rng, anchors), frame, rng.random(points) >= missing, k)


def operands(case, kind, seed=1, plain=False):
    """Plain: with a moment of 1."""
    rng = np.random.default_rng(seed)
    n, m = len(case.points), len(case.anchors)
    rows, columns = (n, m) if kind == "attend" else (m, n)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    found = dict(
        query=draw(rows, HEADS, KEY),
        key=draw(columns, HEADS, KEY),
        value=draw(columns, HEADS, WIDTH),
        decay=np.abs(draw(m, HEADS)),
    )
    if kind == "collect":
        found["prior"] = draw(m, HEADS)
    one = np.tile(np.eye(1, 1 + DIRECTIONS, dtype=np.float32), (HEADS, 1))
    found["coefficient"] = one if plain else draw(HEADS, 1 + DIRECTIONS)
    return found


# Compiled, also because hundreds of small operations would each be compiled otherwise.
CALL = {f.__name__: jax.jit(f, static_argnames="implementation") for f in (attend, collect)}


def run(case, kind, given, implementation):
    given = {name: jnp.asarray(a) for name, a in given.items()}
    out = CALL[kind](pairs=case.pairs(), implementation=implementation, **given)
    return (out,) if kind == "attend" else out


def oracle(case, kind, given, taper=True):
    """The meaning, one pair at a time. A point's neighbours are found by sorting, not taken from `nearest`."""
    x, u, frame = (a.astype(np.float64) for a in (case.points, case.anchors, case.frame))
    given = {name: np.asarray(a, np.float64) for name, a in given.items()}
    rows = len(x) if kind == "attend" else len(u)
    weights = [[] for _ in range(rows)]
    for n in range(len(x)):
        if not case.where[n]:
            continue
        d2 = ((x[n] - u) ** 2).sum(1)
        radius2 = np.sort(d2)[case.k] if case.k < len(u) else math.inf
        for m in range(len(u)):
            if d2[m] >= radius2:
                continue
            row, column = (n, m) if kind == "attend" else (m, n)
            score = (given["query"][row] * given["key"][column]).sum(1) / math.sqrt(KEY) - given["decay"][m] * d2[m]
            if taper:
                score += 2 * math.log(1 - d2[m] / radius2)
            g = np.ones(HEADS)
            if "coefficient" in given:
                g = given["coefficient"] @ np.append(1, frame[m] @ (x[n] - u[m]))
            weights[row].append((np.exp(score), g[:, None] * given["value"][column]))
    out, mass = np.zeros((rows, HEADS, WIDTH)), np.zeros((rows, HEADS))
    for row in range(rows):
        prior = np.exp(given["prior"][row]) if kind == "collect" else 0.0
        total = prior + sum(w for w, _ in weights[row])
        if weights[row]:
            out[row] = sum(w[:, None] * v for w, v in weights[row]) / total[:, None]
            mass[row] = 1 - prior / total
    return (out,) if kind == "attend" else (out, mass)


CASES = {
    "usual": make(),
    "one neighbour": make(k=1),
    "nobody there": make(missing=1.1),
    "few anchors": make(anchors=3, k=5),
    "more anchors than points": make(points=7, anchors=50, k=6, missing=0),
}
KINDS = ("attend", "collect")
FAST = [name for name in IMPLEMENTATIONS if not name.startswith("pallas")]  # interpreters are slow


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, i) for name in CASES for i in IMPLEMENTATIONS if i in FAST or name in ("usual", "one neighbour")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(name, kind, implementation):
    check_values_and_gradients(name, kind, implementation)


def check_values_and_gradients(name, kind, implementation):
    """Values against the oracle; gradients of a weighted sum against its central differences in float64, along random
    directions of every operand.
    """
    case = CASES[name]
    rng = np.random.default_rng(2)
    given = operands(case, kind)
    if name == "few anchors":
        del given["coefficient"]
    wanted = oracle(case, kind, given)
    cotangents = [rng.normal(size=w.shape) for w in wanted]

    def loss(made, module):
        return sum((module.asarray(c) * m).sum() for c, m in zip(cotangents, made, strict=True))

    def ours(given):
        made = run(case, kind, given, implementation)
        return loss(made, jnp), made

    (_, got), gradient = jax.value_and_grad(ours, has_aux=True)(given)
    for w, g in zip(wanted, got, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * max(1, np.abs(w).max()))
    h = 1e-5
    for operand, slope in gradient.items():
        for _ in range(2):
            direction = rng.normal(size=slope.shape)
            moved = [loss(oracle(case, kind, given | {operand: given[operand] + s * direction}), np) for s in (h, -h)]
            numerical = (moved[0] - moved[1]) / (2 * h)
            terms = np.asarray(slope, np.float64) * direction
            bound = 3e-5 * max(1, np.linalg.norm(terms))
            assert abs(terms.sum() - numerical) < bound, f"{operand}: {terms.sum()} is not {numerical}"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_points_that_are_not_there(kind, implementation):
    """NaN in whatever they hold, and positions of theirs: no trace in values or gradients."""
    case = make(seed=3)
    given = operands(case, kind)
    gone = ~case.where
    poisoned = dict(given)
    for name in ("query",) if kind == "attend" else ("key", "value"):
        poisoned[name] = np.where(gone[:, None, None], np.nan, given[name])

    def loss(given, case=case):
        made = run(case, kind, given, implementation)
        return sum(jnp.sum(jnp.square(m)) for m in made), made

    (_, clean), slope = jax.value_and_grad(loss, has_aux=True)(given)
    (_, made), poisoned_slope = jax.value_and_grad(loss, has_aux=True)(poisoned)
    for a, b in zip(clean, made, strict=True):
        np.testing.assert_array_equal(a, b)
    for name, a in slope.items():
        np.testing.assert_array_equal(poisoned_slope[name], a, err_msg=name)
    if kind == "attend":
        assert not np.any(np.asarray(made[0])[gone])
    points = np.where(gone[:, None], case.points[::-1], case.points)
    moved = dataclasses.replace(case, points=points)
    for a, b in zip(clean, run(moved, kind, given, implementation), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_points_that_come_in_order_are_not_sorted(kind):
    """The TPU kernels in their interpreter: arranged or not, the same oracle; and no sort of the points is left."""
    case = make()
    order = arrangement(nearest(case.points, case.anchors, case.k).index, case.anchors)
    arranged = Case(case.points[order], case.anchors, case.frame, case.where[order], case.k)
    given = operands(arranged, kind)
    meet = arranged.pairs().replace(ordered=True)

    def both(given):
        made, pull = jax.vjp(lambda g: CALL[kind](pairs=meet, implementation="pallas_tpu", **g), given)
        return made, pull(made)[0]

    made, slope = jax.jit(both)(given)
    want, pull = jax.vjp(lambda g: CALL[kind](pairs=meet, implementation="reference", **g), given)
    for a, b in zip(jax.tree.leaves((made, slope)), jax.tree.leaves((want, pull(want)[0])), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))
    for g, w in zip(jax.tree.leaves(made), oracle(arranged, kind, given), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * max(1, np.abs(w).max()))
    sorted_, unsorted = (
        str(jax.make_jaxpr(lambda m: sort(m, 128))(m)).count("sort[") for m in (meet, meet.replace(ordered=False))
    )
    assert sorted_ < unsorted


def split(devices=5, **other):
    """A mesh and rules that split points and anchors."""
    rules = AxisRules.of("split", activations=dict(query=("space",), anchor=("space",)) | other)
    return make_mesh({"space": devices}, devices=jax.devices()[:devices]), rules


@pytest.mark.parametrize("implementation", ["gather", "blocked"])
@pytest.mark.parametrize("name", ["usual", "one neighbour", "nobody there"])
@pytest.mark.parametrize("kind", KINDS)
def test_points_and_anchors_split_over_devices(name, kind, implementation):
    """The same oracle and the same bounds as on one device: the prior counts once, sums are merged exactly."""
    with use_mesh(*split()):
        check_values_and_gradients(name, kind, implementation)


def test_extreme_scores_split_over_devices():
    case = make(missing=0)
    given = operands(case, "collect", plain=True)
    given["query"] = given["query"] * 3000
    wanted = run(case, "collect", given, "gather")
    with use_mesh(*split()):
        made = run(case, "collect", given, "gather")
    for a, b in zip(made, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-3)  # scores of 1e4 are known to 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_over_one_axis_of_the_mesh_and_points_over_another(kind):
    """One sample a device, and its kernels without a batch axis: as each sample by itself."""
    case = make(points=160)
    batch = [operands(case, kind, seed=s) for s in (1, 2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *batch)
    rules = AxisRules.of("both", activations=dict(batch=("data",), query=("space",), anchor=("space",)))

    def both(given):
        def one(given):
            made, pull = jax.vjp(lambda given: run(case, kind, given, None), given)
            return made, pull(made)[0]

        return jax.vmap(one, spmd_axis_name="data")(given)

    with use_mesh(make_mesh({"data": 2, "space": 4}), rules):
        compiled = jax.jit(both).lower(stacked).compile()
        found = compiled(stacked)
    assert aot.count_collectives(compiled.as_text())["reduce-scatter"] >= 1
    for i, given in enumerate(batch):
        made, pull = jax.vjp(lambda given: run(case, kind, given, "reference"), given)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves((made, pull(made)[0])), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))


def test_what_does_not_divide_over_devices_is_an_error():
    case = make()
    given = operands(case, "attend")
    with (
        use_mesh(*split(4)),
        pytest.raises(NeighbourAttentionError, match=r"150 points do not divide over mesh axes \('space',\) .* size 4"),
    ):
        run(case, "attend", given, "gather")
    with (
        use_mesh(*split(5, anchor=())),
        pytest.raises(NeighbourAttentionError, match="map both to the same mesh axes"),
    ):
        run(case, "attend", given, "gather")


@pytest.mark.parametrize("implementation", FAST)
def test_anchors_without_points_keep_their_prior(implementation):
    case = make(k=2)
    case.where = np.arange(POINTS) < 3
    given = operands(case, "collect")
    out, mass = run(case, "collect", given, implementation)  # pyright: ignore[reportAssignmentType]
    empty = np.setdiff1d(np.arange(ANCHORS), nearest(case.points[:3], case.anchors, 2).index)
    assert len(empty) >= 34
    assert not np.asarray(out)[empty].any()
    assert not np.asarray(mass)[empty].any()
    assert (np.asarray(mass) >= 0).all()
    assert (np.asarray(mass) < 1).all()
    slope = jax.grad(lambda p: run(case, "collect", given | {"prior": p}, implementation)[1].sum())(given["prior"])  # pyright: ignore[reportGeneralTypeIssues]
    assert not np.asarray(slope)[empty].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_scores(kind, implementation):
    """Scores of thousands, of either sign: the running maximum keeps sums finite."""
    case = make(missing=0)
    given = operands(case, kind, plain=True)
    given["query"] = given["query"] * 3000
    made, slope = jax.value_and_grad(lambda g: sum(jnp.sum(m) for m in run(case, kind, g, implementation)))(given)
    assert np.isfinite(made)
    assert all(np.isfinite(s).all() for s in slope.values())
    wanted = run(case, kind, given, "reference")
    for a, b in zip(run(case, kind, given, implementation), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-3)  # scores of 1e4 are known to 1e-3


@pytest.mark.parametrize("implementation", FAST)
def test_partition_of_unity(implementation):
    """Plain attention of one value everywhere is that value; the gradient of keys is then 0."""
    case = make(missing=0)
    given = operands(case, "attend", plain=True)
    given["value"] = np.broadcast_to(given["value"][:1], given["value"].shape)
    (out,) = run(case, "attend", given, implementation)
    np.testing.assert_allclose(out, np.broadcast_to(given["value"][:1], out.shape), rtol=3e-6)


@pytest.mark.parametrize("implementation", FAST)
def test_linear_fields_are_read_exactly(implementation):
    """Four heads, the value and the slopes at the anchors: the expansion is exact for what is linear in position."""
    case = make(missing=0)
    rng = np.random.default_rng(5)
    slope = rng.normal(size=AXES).astype(np.float32)
    # The frame spans three of the four axes, so the field varies along these alone.
    case.frame = np.broadcast_to(np.eye(AXES, dtype=np.float32)[:3], case.frame.shape)
    slope[3] = 0
    given = operands(case, "attend", plain=True)
    given = {name: np.repeat(a[:, :1], HEADS, 1) for name, a in given.items()}
    value = np.zeros((ANCHORS, HEADS, WIDTH), np.float32)
    value[:, 0, 0] = case.anchors @ slope
    value[:, 1:, 0] = slope[:3]
    given |= dict(value=value, coefficient=np.eye(4, dtype=np.float32))
    (out,) = run(case, "attend", given, implementation)
    np.testing.assert_allclose(np.asarray(out)[:, :, 0].sum(1), case.points @ slope, atol=2e-5)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("kind", KINDS)
def test_order_is_free(kind, implementation):
    case = make()
    given = operands(case, kind)
    rng = np.random.default_rng(7)
    p, a = rng.permutation(POINTS), rng.permutation(ANCHORS)
    shuffled = Case(case.points[p], case.anchors[a], case.frame[a], case.where[p], case.k)
    rows, columns = (p, a) if kind == "attend" else (a, p)
    of = dict(query=rows, key=columns, value=columns, decay=a, prior=a)
    moved = {name: array[of[name]] if name in of else array for name, array in given.items()}
    one, other = run(case, kind, given, implementation), run(shuffled, kind, moved, implementation)
    for x, y in zip(one, other, strict=True):
        np.testing.assert_allclose(np.asarray(x)[rows], y, rtol=0, atol=3e-6)


def switch():
    """A case whose first point goes along a line, and where its third and fourth anchor change places."""
    case = make(k=3, missing=0, seed=11)
    case.where = np.arange(POINTS) == 0
    start, end = case.points[0].astype(np.float64), case.anchors[5].astype(np.float64)

    def at(t):
        return (1 - t) * start + t * end

    def third(t):
        return set(np.argsort(((at(t) - case.anchors) ** 2).sum(1))[:3])

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if third(middle) == third(0.0) else (low, middle)
    assert len(third(high) - third(low)) == 1
    return case, at, low


@pytest.mark.parametrize("implementation", FAST)
def test_continuous_where_neighbours_change(implementation):
    """The jump across a switch goes to 0 with the step, and would not without the taper."""
    case, at, place = switch()
    given = operands(case, "attend")

    def jump(step, function):
        sides = [np.append(at(place + s * step)[None], case.points[1:], 0).astype(np.float32) for s in (-1, 1)]
        before, after = (np.asarray(function(dataclasses.replace(case, points=side)))[0] for side in sides)
        return np.abs(after - before).max()

    steps = (1e-2, 1e-3, 1e-4)
    found = [jump(step, lambda side: run(side, "attend", given, implementation)[0]) for step in steps]
    bare = [jump(step, lambda side: oracle(side, "attend", given, taper=False)[0]) for step in steps]
    assert found[1] < 0.15 * found[0]
    assert found[2] < 0.15 * found[1] + 1e-5
    assert bare[2] > 100 * found[2], "without the taper there is a step"


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("kind", KINDS)
def test_all_points_at_one_place(kind, implementation):
    """On an anchor, even: distance 0."""
    case = make(missing=0)
    case.points = np.broadcast_to(case.anchors[2], case.points.shape).copy()
    given = operands(case, kind)
    for g, w in zip(run(case, kind, given, implementation), oracle(case, kind, given), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * max(1, np.abs(w).max()))


@pytest.mark.parametrize("implementation", FAST)
def test_anchors_read_themselves(implementation):
    """Self-attention: with k = 1 an anchor reads its own value."""
    case = make(k=1)
    case.points = np.append(case.anchors, case.points[ANCHORS:], 0)
    case.where = np.arange(POINTS) < ANCHORS
    given = operands(case, "attend", plain=True)
    (out,) = run(case, "attend", given, implementation)
    np.testing.assert_allclose(out[:ANCHORS], given["value"], rtol=1e-6)


@pytest.mark.parametrize("implementation", FAST)
def test_bfloat16_in_bfloat16_out(implementation):
    case = make()
    for kind in KINDS:
        given = {name: jnp.asarray(a, jnp.bfloat16) for name, a in operands(case, kind).items()}
        made = run(case, kind, given, implementation)
        assert all(m.dtype == jnp.bfloat16 for m in made)

        def gradient(given, made, kind=kind):
            return jax.vjp(lambda g: run(case, kind, g, implementation), given)[1](made)[0]

        slope = jax.eval_shape(gradient, given, made)
        assert all(s.dtype == jnp.bfloat16 for s in slope.values())
        for m, w in zip(made, oracle(case, kind, given), strict=True):
            np.testing.assert_allclose(np.asarray(m, np.float64), w, rtol=0, atol=2e-2 * max(1, np.abs(w).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_positions_have_no_gradient(kind):
    """Stopped, not forgotten: in every implementation, the one that JAX differentiates included."""
    case = make()
    given = {name: jnp.asarray(a) for name, a in operands(case, kind).items()}
    near = nearest(case.points, case.anchors, case.k)
    for implementation in FAST:

        def loss(x, u, frame, radius2, implementation=implementation):
            meet = pairs(x, u, Neighbourhood(jnp.asarray(near.index), radius2), frame=frame)
            made = CALL[kind](pairs=meet, implementation=implementation, **given)
            return jax.tree.leaves(made)[0].sum()

        slopes = jax.grad(loss, (0, 1, 2, 3))(*map(jnp.asarray, (case.points, case.anchors, case.frame, near.radius2)))
        assert not any(np.any(s) for s in slopes)


@pytest.mark.parametrize("kind", KINDS)
def test_default_under_jit_and_vmap(kind):
    """Without a name the platform chooses; batches of operands share their pairs."""
    case = make()
    batch = [operands(case, kind, seed=s) for s in (1, 2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *batch)

    @jax.jit
    @jax.vmap
    def both(given):
        made, pull = jax.vjp(lambda given: run(case, kind, given, None), given)
        return made, pull(made)[0]

    made, slope = both(stacked)
    for i, given in enumerate(batch):
        one, pull = jax.vjp(lambda given: run(case, kind, given, "reference"), given)
        for a, b in zip(jax.tree.leaves((made, slope)), jax.tree.leaves((one, pull(one)[0])), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))


def test_errors_name_the_operand():
    case = make()
    q, k, v, decay, _ = (jnp.asarray(a) for a in operands(case, "attend").values())
    meet = case.pairs()

    def check(q=q, k=k, v=v, decay=decay, coefficient=None, meet=meet):
        check_operands("points", q, k, v, decay, None, coefficient, meet)

    check()
    with pytest.raises(NeighbourAttentionError, match=r"\(40, 4, 4\) is not one row for each of the 150 points"):
        check(q=k)
    with pytest.raises(NeighbourAttentionError, match=r"value .* 40 anchors"):
        check(v=v[:5])
    with pytest.raises(NeighbourAttentionError, match="as many heads"):
        check(k=k[:, :2])
    with pytest.raises(NeighbourAttentionError, match=r"must be .rows, heads, width"):
        check(k=k[:, 0])
    with pytest.raises(NeighbourAttentionError, match=r"decay \(40, 1\)"):
        check(decay=decay[:, :1])
    with pytest.raises(NeighbourAttentionError, match="coefficient"):
        check(coefficient=jnp.ones((HEADS, 2)))
    with pytest.raises(NeighbourAttentionError, match="pass frame="):
        check(coefficient=jnp.ones((HEADS, 4)), meet=meet.replace(frame=None))
    with pytest.raises(NeighbourAttentionError, match="'mosaic' is not one of reference"):
        attend(q, k, v, decay, meet, implementation="mosaic")
    with pytest.raises(NeighbourAttentionError, match="of 150 points, there are 149"):
        pairs(case.points[1:], case.anchors, nearest(case.points, case.anchors, 4))


@pytest.mark.parametrize("implementation", FAST)
def test_unbounded_neighbourhoods(implementation):
    """radius2 = inf is FAR2: every anchor counts, nothing is tapered."""
    case = CASES["few anchors"]
    near = nearest(case.points, case.anchors, 5)
    assert (near.radius2 == np.float32(FAR2)).all()
    given = operands(case, "attend")
    meet = pairs(
        case.points,
        case.anchors,
        Neighbourhood(near.index, np.full_like(near.radius2, np.inf)),
        frame=jnp.asarray(case.frame),
        where=jnp.asarray(case.where),
    )
    out = CALL["attend"](pairs=meet, implementation=implementation, **given)
    np.testing.assert_allclose(out, oracle(case, "attend", given)[0], atol=1e-5)


# The compilers of TPUs and GPUs, at 4,096 points and 1,024 anchors: nothing is run.


def program(kind, shape):
    """(values and gradients through the public functions, abstract operands) with moments, in bfloat16."""
    n, m, heads, width, bf16 = 4096, 1024, 8, 16, jnp.bfloat16
    rows, columns = (n, m) if kind == "attend" else (m, n)
    near = Neighbourhood(shape((n, 16), jnp.int32), shape((n,), jnp.float32))
    given = [shape((r, heads, width), bf16) for r in (rows, columns, columns)]
    given += [shape((m, heads), jnp.float32)] * (1 if kind == "attend" else 2)

    def both(given, coefficient, x, u, near, frame):
        def made(given, coefficient):
            function = attend if kind == "attend" else collect
            return function(*given, pairs(x, u, near, frame=frame), coefficient=coefficient)

        out, pull = jax.vjp(made, given, coefficient)
        return out, pull(out)

    positions = [shape((n, 4), jnp.float32), shape((m, 4), jnp.float32)]
    return both, (given, shape((heads, 4), jnp.float32), *positions, near, shape((m, 3, 4), jnp.float32))


def kernels_of(kind):
    side = "points" if kind == "attend" else "anchors"
    return [f"neighbour_backward_{s}" for s in ("anchors", "points")] + [f"neighbour_forward_{side}"]


@pytest.mark.aot_tpu
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_for_tpu(kind):
    mesh = aot.topology_mesh("v5e")
    report = aot.compile_report(*(lambda f, args: (f, mesh, *args))(*program(kind, lambda *a: aot.abstract(mesh, *a))))
    assert sorted(report.kernels) == kernels_of(kind)
    pairs_bytes = 4096 * 16 * 8 * 16 * 4  # one array of [N, k, H, V]
    assert report.temporary_bytes < 1.5 * pairs_bytes


@pytest.mark.skipif(aot_cuda.missing() is not None, reason=str(aot_cuda.missing()))
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_for_h100(kind):
    function, args = program(kind, jax.ShapeDtypeStruct)
    report = aot_cuda.compile_for_h100(function, *args)
    ours = [k for k in report.kernels if k.name.startswith("neighbour")]
    assert sorted(k.name for k in ours) == kernels_of(kind)
    for kernel in ours:
        assert "mma" in kernel.ptx, "tensor cores"
        assert (kernel.spill_bytes or 0) <= 512, kernel.name  # a weakness: 8 to 440 bytes a thread
    assert report.temporary_bytes < 4096 * 16 * 8 * 16 * 4
