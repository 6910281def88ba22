"""Expert parallelism on eight host devices against every expert on every token, on one."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe import params as P_
from moe.experts import ExpertParams, dense_experts, expert_specs, experts
from moe.experts.parallel import _gathered_ragged, _room, expert_layer, experts_parallel
from moe.sharding import DP, FSDP, FSDP_EP, FSDP_TP_EP, batch_sharding, make_mesh, use_mesh

E, D, F, K, B, S = 16, 16, 8, 3, 8, 16
FREE = 4
T = B * S
SPECS = expert_specs(E, D, F)
METHODS = ("all_gather", "all_to_all", "ragged_all_to_all")
COLLECTIVE = re.compile(
    r"= (?:\S+|\(.*?\)) (all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


@functools.cache
def weights_of(seed=0):
    return P_.init(jax.random.key(seed), SPECS)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def distinct(seed, slots=E + FREE, among=None):
    """[B, S, K] distinct slots of each token; E and above are free of parameters."""
    rng = np.random.default_rng(seed)
    among = np.arange(slots) if among is None else np.asarray(among)
    return jnp.asarray(among[rng.random((B, S, len(among))).argsort(-1)[..., :K]], jnp.int32)


def everywhere(*slots):
    return jnp.broadcast_to(jnp.asarray(slots, jnp.int32), (B, S, K))


ROUTINGS = {
    "any": distinct(0),
    "one_expert": everywhere(5, 5, 5),
    "first_rank": everywhere(1, 0, E + 1),
    "empty_experts": distinct(1, among=[2, 3, 7, 8, 15]),
    "nowhere": everywhere(E, E + 1, E + FREE),
    "beyond": everywhere(E, -1, E + 1000),
}
X, WEIGHTS, COTANGENT = normal(1, B, S, D), jnp.abs(normal(2, B, S, K)), normal(3, B, S, D)


def grads_of(layer):
    """(params, x, index, weights, cotangent) -> ((output, aux), gradients of params, x and weights)."""

    def run(p, x, index, weights, cotangent):
        out, pull, aux = jax.vjp(lambda p, x, w: layer(p, x, index, w), p, x, weights, has_aux=True)
        return (out, aux), pull(cotangent)

    return run


@jax.jit
@grads_of
def on_one_device(p, x, index, weights):
    out = dense_experts(p, *(a.reshape(-1, a.shape[-1]) for a in (x, index, weights)))
    return out.reshape(x.shape), None


def assert_close(got, wanted, tolerance=1e-5):
    got, wanted = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, wanted))
    for (path, a), (_, b) in zip(got, wanted, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        scale = max(1.0, np.abs(b).max())
        assert np.abs(a - b).max() <= tolerance * scale, jax.tree_util.keystr(path)


@functools.cache
def compiled(rules, shape, method, **options):
    """The layer's forward and backward under these rules, and where its arguments go."""
    mesh = make_mesh(dict(shape))
    places = (P_.shardings(SPECS, mesh, rules), *[batch_sharding(mesh, rules)] * 4)
    arguments = jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        (P_.abstract(SPECS), X, ROUTINGS["any"], WEIGHTS, COTANGENT),
        jax.tree.broadcast(places, (P_.abstract(SPECS), X, X, X, X)),
    )
    with use_mesh(mesh, rules):
        layer = functools.partial(expert_layer, method=method, with_load=True, **options)
        return jax.jit(grads_of(layer)).lower(*arguments).compile(), places


def run(case, index, x=X, weights=WEIGHTS, **options):
    program, places = compiled(*case, **options)
    return program(*jax.device_put((weights_of(), x, index, weights, COTANGENT), places))


def rows_by_rank(index, ranks):
    index = np.asarray(index)
    kept = index[(index >= 0) & (index < E)]
    return np.bincount(kept // (E // ranks), minlength=ranks)


DATA_EXPERT = (("data", 2), ("expert", 4))
EXPERT = (("expert", 8),)
FSDP_EXPERT_TENSOR = (("fsdp", 2), ("expert", 2), ("tensor", 2))
# (rules, mesh, method) and the collectives of forward and backward, written once each, twice where a loop that an
# overflow enters repeats them. all_gather: x, weights, index and the gradient of y (XLA:CPU undoes the recomputation
# of x) are gathered; y and the gradients of x and weights are scattered. all_to_all: x, weights and y there and back,
# x and weights again and three gradients. fsdp: two weights. All-reduce: what weights get from other axes than fsdp
# and expert, or the sums over tensor: combined into one.
A2A = {"all-gather": 1, "all-to-all": 2 * (3 + 5)}
CASES = {
    "data-all_gather": (
        (FSDP_EP, DATA_EXPERT, "all_gather"),
        {"all-gather": 4, "reduce-scatter": 3, "all-reduce": 1},
    ),
    "expert-all_to_all": ((FSDP_EP, EXPERT, "all_to_all"), A2A),
    "tensor-ragged": (
        (FSDP_TP_EP, FSDP_EXPERT_TENSOR, "ragged_all_to_all"),
        {"reduce-scatter": 2, "all-reduce": 1},
    ),
    "fsdp": ((FSDP, (("fsdp", 4), ("expert", 2)), None), {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 1}),
}
SLOW = {
    "data-all_to_all": ((FSDP_EP, DATA_EXPERT, "all_to_all"), A2A | {"all-reduce": 1}),
    "data-ragged": ((FSDP_EP, DATA_EXPERT, "ragged_all_to_all"), {"all-reduce": 1}),
    "expert-all_gather": ((FSDP_EP, EXPERT, "all_gather"), {"all-gather": 4, "reduce-scatter": 3}),
    "expert-ragged": ((FSDP_EP, EXPERT, "ragged_all_to_all"), {}),
    "tensor-all_gather": (
        (FSDP_TP_EP, FSDP_EXPERT_TENSOR, "all_gather"),
        {"all-gather": 6, "reduce-scatter": 5, "all-reduce": 1},
    ),
    "tensor-all_to_all": (
        (FSDP_TP_EP, FSDP_EXPERT_TENSOR, "all_to_all"),
        {"all-to-all": 3 + 5, "all-gather": 3, "reduce-scatter": 2, "all-reduce": 1},  # a bucket has room for all
    ),
    "dp": ((DP, DATA_EXPERT, None), {"all-reduce": 1}),
    "dp_no_expert_axis": ((FSDP_EP, (("data", 8),), None), {"all-reduce": 1}),
    "fsdp_tensor": (
        (FSDP_TP_EP, (("fsdp", 4), ("tensor", 2)), None),
        {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 1},
    ),
}


# The exchange is what is tested here: the reference products compile fastest. The slow ones take what the layer takes.
@pytest.mark.parametrize(
    ("case", "found", "implementation"),
    [
        *[(*case, "reference") for case in CASES.values()],
        *[pytest.param(*case, None, marks=pytest.mark.slow) for case in (CASES | SLOW).values()],
    ],
    ids=[*CASES, *[f"{name}-default" for name in CASES | SLOW]],
)
def test_equals_every_expert_on_every_token(case, found, implementation):
    """Output and gradients, however uneven the routing, to 1e-5; rows counted right; overflow where it must be;
    no collectives but these.
    """
    rules, shape, method = case
    ranks = dict(shape).get("expert", 1) if dict(rules.weights)["expert"] else 1
    overflowed = set()
    for name, index in ROUTINGS.items():
        (out, load), grads = run(case, index, implementation=implementation)
        (wanted, _), wanted_grads = on_one_device(weights_of(), X, index, WEIGHTS, COTANGENT)
        assert_close((out, grads), (wanted, wanted_grads))
        if name in ("nowhere", "beyond"):
            assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((out, grads)))
        axes = ("data", "fsdp", "expert", "tensor")
        rows = np.asarray(load.rows).reshape([dict(shape).get(axis, 1) for axis in axes])
        assert (rows == rows[..., :1]).all(), "the ranks of tensor have the same rows"
        rows = rows[..., 0].sum((0, 1) if ranks > 1 else None)
        np.testing.assert_array_equal(rows, rows_by_rank(index, ranks) if ranks > 1 else rows_by_rank(index, 1)[0])
        if (np.asarray(load.rounds) > 1).any():
            overflowed.add(name)
    assert "any" not in overflowed
    assert not overflowed & {"nowhere", "beyond"}
    # With two ranks a bucket of all_to_all has room for everything.
    assert ("one_expert" in overflowed) == (ranks > (2 if method == "all_to_all" else 1))
    program, _ = compiled(*case, implementation=implementation)
    kinds = Counter(COLLECTIVE.findall(program.as_text()))
    if method == "ragged_all_to_all":  # by the stand-in, an all-gather for each exchange
        found = found | {"all-gather": kinds["all-gather"]}
    assert kinds == found


@pytest.mark.parametrize("name", ["data-all_gather", "expert-all_to_all", "tensor-ragged"])
def test_nan_in_padding_stays_there(name):
    """Rows of padding and of free slots are not sent; their tokens may hold anything."""
    padded = jnp.asarray(np.random.default_rng(4).random((B, S, 1)) < 0.3)
    index = jnp.where(padded, E + FREE, ROUTINGS["any"])
    layer = functools.partial(run, CASES[name][0], implementation="reference")
    clean, grads = layer(index)
    dirty, dirty_grads = layer(index, jnp.where(padded, jnp.nan, X), jnp.where(padded, jnp.nan, WEIGHTS))
    np.testing.assert_array_equal(dirty[0], clean[0])
    jax.tree.map(np.testing.assert_array_equal, dirty_grads, grads)
    # A token that does use an expert is alone with its NaN.
    token = tuple(np.argwhere(~np.asarray(padded)[..., 0] & (np.asarray(index) < E).any(-1))[0])
    broken, _ = layer(index, X.at[token].set(jnp.nan))
    wrong = np.isnan(np.asarray(broken[0])).any(-1)
    assert wrong[token]
    assert wrong.sum() == 1


def grouped_routing(groups, top=1, width=2):
    """`top` slots in each group of experts, among its first `width` ones: even over groups, skewed inside."""
    local = np.random.default_rng(7).random((B, S, groups, width)).argsort(-1)[..., :top]
    return jnp.asarray((local + np.arange(groups)[:, None] * (E // groups)).reshape(B, S, groups * top), jnp.int32)


@pytest.mark.parametrize(
    ("method", "groups", "top"),
    [
        ("all_gather", 4, 1),
        ("all_to_all", 4, 1),
        pytest.param("ragged_all_to_all", 4, 1, marks=pytest.mark.slow),
        pytest.param("all_gather", 8, 1, marks=pytest.mark.slow),  # two groups a rank
        pytest.param("all_to_all", 8, 2, marks=pytest.mark.slow),
    ],
)
def test_grouped_routing_is_even_and_static(method, groups, top):
    """Whole groups on every rank: the same rows everywhere, and a program without the loop of an overflow."""
    mesh, index = make_mesh({"data": 2, "expert": 4}), grouped_routing(groups, top)
    weights = jnp.abs(normal(5, *index.shape))
    padded = jnp.asarray(np.random.default_rng(4).random((B, S, 1)) < 0.3)
    (wanted, _), wanted_grads = on_one_device(weights_of(), X, index, weights, COTANGENT)
    layer = functools.partial(expert_layer, method=method, with_load=True, implementation="reference")
    promised = functools.partial(layer, n_group=groups)
    p = jax.device_put(weights_of(), P_.shardings(SPECS, mesh, FSDP_EP))
    with use_mesh(mesh, FSDP_EP):
        for loops, f in ((False, promised), (True, layer)):
            jaxpr = jax.make_jaxpr(grads_of(f))(p, X, index, weights, COTANGENT)
            assert ("while[" in str(jaxpr)) == loops
        layer = jax.jit(grads_of(promised))
        (out, load), grads = layer(p, X, index, weights, COTANGENT)
        (_, less), _ = layer(p, X, jnp.where(padded, E, index), weights, COTANGENT)
        stray, _ = layer(p, X, index.at[2, 3, -1].set(0), weights, COTANGENT)
    assert_close((out, grads), (wanted, wanted_grads))
    assert (np.asarray(load.rows) == T * groups * top // 8).all()
    assert int(less.rows.sum()) == groups * top * int((~padded).sum())
    wrong = np.isnan(np.asarray(stray[0])).any(-1)
    assert wrong[2, 3], "a slot outside its group must not vanish"
    assert wrong.sum() == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_groups_larger_than_a_rank(method):
    """Two groups on four ranks: half of a token's slots can have an expert of a rank, no more."""
    mesh, index = make_mesh({"data": 2, "expert": 4}), grouped_routing(2, top=2, width=4)
    weights = jnp.abs(normal(5, *index.shape))
    wanted = on_one_device(weights_of(), X, index, weights, COTANGENT)
    with use_mesh(mesh, FSDP_EP):
        layer = functools.partial(expert_layer, method=method, n_group=2, with_load=True)
        (out, load), grads = jax.jit(grads_of(layer))(weights_of(), X, index, weights, COTANGENT)
    assert_close((out, grads), (wanted[0][0], wanted[1]))
    # Half of the ranks get all of their group: 128 of the 64 rows expected, above the room of 120. A bucket has room
    # for any routing that keeps to the groups.
    np.testing.assert_array_equal(np.asarray(load.rows).reshape(2, 4), [[128, 0, 128, 0]] * 2)
    assert (load.rounds > 1).any() == (method != "all_to_all")


def inside(method, **options):
    """experts_parallel in a shard_map whose replication is checked, the width of experts split too."""
    partial = method == "replicated"
    tokens = P() if partial else P("expert")

    def each(p, x, index, weights):
        y, load = experts_parallel(p, x, index, weights, method=method, implementation="reference", **options)
        summed = ("tensor", "expert") if partial else ("tensor",)
        return lax.psum(y, summed), jax.tree.map(lambda a: a[None], load)

    specs = (ExpertParams(P("expert", None, None, "tensor"), P("expert", "tensor")), *[tokens] * 3)
    return jax.shard_map(each, in_specs=specs, out_specs=(tokens, P(("expert", "tensor"))))


@pytest.mark.parametrize("method", ["all_to_all", pytest.param("all_gather", marks=pytest.mark.slow), "replicated"])
def test_in_a_checked_shard_map_with_many_rounds(method):
    """The public function in a user's own shard_map; a hundredth of the room, so that many rounds are taken."""
    x, index, weights, cotangent = (a.reshape(T, -1) for a in (X, ROUTINGS["any"], WEIGHTS, COTANGENT))
    wanted = on_one_device(weights_of(), x, index, weights, cotangent)
    with jax.set_mesh(make_mesh({"expert": 4, "tensor": 2})):
        layer = jax.jit(grads_of(inside(method, safety_factor=0.01)))
        (out, load), grads = layer(weights_of(), x, index, weights, cotangent)
    assert_close((out, grads), (wanted[0][0], wanted[1]))
    room = 8
    assert _room(0.01 * T * K / 16, 1.0, T) == room
    per_bucket = [rows_by_rank(part, 4) for part in np.split(np.asarray(index), 4)]
    fullest = np.max(per_bucket) if method == "all_to_all" else np.sum(per_bucket, 0)
    np.testing.assert_array_equal(load.rounds, np.broadcast_to(-(-fullest // room), 4).repeat(2))


def test_tokens_that_all_ranks_hold():
    """Rules whose batch leaves the expert axis out, for a batch of one: nothing is exchanged, parts are summed."""
    rules = FSDP_EP.replace(activations={"batch": ("data",)})
    x, index, weights, cotangent = (a[:1] for a in (X, ROUTINGS["any"], WEIGHTS, COTANGENT))
    wanted = on_one_device(weights_of(), x, index, weights, cotangent)
    with use_mesh(make_mesh({"expert": 8}), rules):
        layer = jax.jit(grads_of(functools.partial(expert_layer, implementation="reference", with_load=True)))
        (out, load), grads = layer(weights_of(), x, index, weights, cotangent)
        text = layer.lower(weights_of(), x, index, weights, cotangent).compile().as_text()
    assert_close((out, grads), (wanted[0][0], wanted[1]))
    np.testing.assert_array_equal(load.rows, rows_by_rank(index, 8))
    assert set(COLLECTIVE.findall(text)) == {"all-reduce"}


def test_without_a_mesh_it_is_experts():
    index = ROUTINGS["any"]
    out, load = expert_layer(weights_of(), X, index, WEIGHTS, implementation="reference", with_load=True)
    flat = experts(weights_of(), *(a.reshape(T, -1) for a in (X, index, WEIGHTS)), implementation="reference")
    np.testing.assert_array_equal(out, flat.reshape(X.shape))
    assert load.rows.tolist() == [int((index < E).sum())]


def test_stand_in_of_the_ragged_exchange():
    """Against the documented meaning of lax.ragged_all_to_all, in numpy; senders and receivers that disagree: NaN."""
    ranks, count, place, rng = 8, 24, 40, np.random.default_rng(8)
    sent = rng.integers(0, 4, (ranks, ranks)).astype(np.int32)  # [from, to]
    source = (np.cumsum(sent, 1) - sent + rng.integers(0, 2)).astype(np.int32)
    target = (np.cumsum(sent, 0) - sent + np.arange(ranks)).astype(np.int32)
    rows = rng.standard_normal((ranks, count, 2)).astype(np.float32)
    out = rng.standard_normal((ranks, place, 2)).astype(np.float32)
    wanted = out.copy()
    for a in range(ranks):
        for b in range(ranks):
            wanted[b, target[a, b] :][: sent[a, b]] = rows[a, source[a, b] :][: sent[a, b]]

    mesh = make_mesh({"expert": ranks})
    exchange = functools.partial(_gathered_ragged, axis=("expert",))
    exchange = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=(P("expert"),) * 6, out_specs=P("expert")))
    flat = [a.reshape(-1, *a.shape[2:]) for a in (rows, out, source, sent, target, sent.T)]
    np.testing.assert_array_equal(exchange(*flat).reshape(out.shape), wanted)
    flat[5] = flat[5].copy()
    flat[5][3] += 1
    wrong = np.isnan(np.asarray(exchange(*flat)).reshape(ranks, -1))
    assert wrong[0].all()
    assert not wrong[1:].any()


def test_room():
    assert _room(4096.0, 1.25, 10**6) == 5408  # 5120 and four times their square root
    assert _room(4096.0, 1.25, 4099) == 4099  # enough for any routing
    assert _room(2.0, 1.25, 100) == 16


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_explicit_mesh_in_a_scan_over_layers_in_bfloat16(method):
    """Three layers in a scan with recomputation around each, shardings in the types, bfloat16: near float32's result,
    and the same whatever the method but for rounding.
    """
    stacked = P_.init(jax.random.key(1), P_.stack(SPECS, 3))

    def model(layer, p, x, index, weights):
        def block(x, p):
            return x + layer(p, x, index, weights), None

        return lax.scan(jax.checkpoint(block), x, p)[0], None

    def single(p, x, index, weights):
        out = dense_experts(p, *(a.reshape(-1, a.shape[-1]) for a in (x, index, weights)))
        return out.reshape(x.shape)

    index = ROUTINGS["any"]
    arguments = (stacked, X, index, WEIGHTS, COTANGENT)
    (wanted, _), wanted_grads = jax.jit(grads_of(functools.partial(model, single)))(*arguments)
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}, axis_types=AxisType.Explicit)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (stacked, X, COTANGENT))
    batch = batch_sharding(mesh, FSDP_TP_EP)
    p = jax.device_put(half[0], P_.shardings(P_.stack(SPECS, 3), mesh, FSDP_TP_EP))
    x, index, weights, cotangent = jax.device_put((half[1], index, WEIGHTS, half[2]), batch)
    with use_mesh(mesh, FSDP_TP_EP):
        layer = functools.partial(expert_layer, method=method)
        (out, _), grads = jax.jit(grads_of(functools.partial(model, layer)))(p, x, index, weights, cotangent)
    for got, want in zip(jax.tree.leaves((out, grads)), jax.tree.leaves((wanted, wanted_grads)), strict=True):
        got, want = np.asarray(got, np.float32), np.asarray(want)
        assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ring"}, "method 'ring' is not one of"),
        ({"method": "replicated"}, "method 'replicated' is not one of"),
        ({"safety_factor": 0.0}, "safety_factor 0.0 must be positive"),
        ({"n_group": 2}, "n_group 2 must divide the 3 slots"),
        ({"n_group": 3}, "n_group 3 must divide the 3 slots of a token and the 16 experts"),
    ],
)
def test_bad_options(options, message):
    with use_mesh(make_mesh({"data": 2, "expert": 4}), FSDP_EP), pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(expert_layer, **options), weights_of(), X, ROUTINGS["any"], WEIGHTS)


def test_bad_operands():
    index = ROUTINGS["any"]
    mesh = make_mesh({"data": 2, "expert": 4})
    with use_mesh(mesh, FSDP_EP):
        with pytest.raises(ValueError, match=r"x: dimension 0 \('batch', size 3\) does not divide"):
            jax.eval_shape(expert_layer, weights_of(), X[:3], index[:3], WEIGHTS[:3])
        with pytest.raises(ValueError, match="keep routing weights in float32"):
            jax.eval_shape(expert_layer, weights_of(), X, index, WEIGHTS.astype(jnp.bfloat16))
        odd = jax.tree.map(lambda a: a[:6], weights_of())
        with pytest.raises(ValueError, match=r"gate_up: dimension 0 \('expert', size 6\) does not divide"):
            jax.eval_shape(expert_layer, odd, X, index, WEIGHTS)
        manual = jax.shard_map(expert_layer, in_specs=(P("expert"), *[P("expert")] * 3), out_specs=P("expert"))
        with pytest.raises(ValueError, match="mesh axis 'expert', which splits the experts, is manual here"):
            jax.eval_shape(manual, weights_of(), X, index, WEIGHTS)
    mixed = FSDP_EP.replace(weights={"expert": ("expert", "tensor")}, activations={"vocab": ("tensor",)})
    with use_mesh(make_mesh({"expert": 4, "tensor": 2}), mixed), pytest.raises(ValueError, match="all of these axes"):
        jax.eval_shape(expert_layer, weights_of(), X, index, WEIGHTS)
    wide = jnp.tile(index, 2)
    with use_mesh(make_mesh({"data": 4, "expert": 2}), FSDP_EP), pytest.raises(ValueError, match="straddles ranks"):
        jax.eval_shape(
            functools.partial(expert_layer, n_group=3),
            P_.init(jax.random.key(0), expert_specs(6, D, F)),
            X,
            wide,
            jnp.tile(WEIGHTS, 2),
        )
