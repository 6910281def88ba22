"""The expert layer against the dense oracle and finite differences; dispatch against numpy; extremes of routing."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from moe import params
from moe.experts import (
    ExpertParams,
    capacity_experts,
    combine,
    dense_experts,
    dispatch,
    expert_specs,
    experts,
    gather_rows,
)
from moe.routing import RoutingConfig, route
from moe.sharding import FSDP_EP, make_mesh

E, D, F, T, K = 8, 24, 16, 60, 3
PATHS = ("fused", "reference", "blocked")
DEFAULT = None  # what users get


def layer(seed=0, dtype="float32", sizes=(E, D, F)):
    tree = params.init(jax.random.key(seed), expert_specs(*sizes))
    return jax.tree.map(lambda a: a.astype(dtype), tree)


def distinct(rng, tokens, top_k, slots):
    return np.argsort(rng.random((tokens, slots)), 1)[:, :top_k].astype(np.int32)


def routings():
    rng = np.random.default_rng(0)
    some = distinct(rng, T, K, E + 4)
    yield "plain", distinct(rng, T, K, E)
    yield "half_without_expert", distinct(rng, T, K, 2 * E)
    yield "two_experts_empty", np.where(some < 2, E, some)
    yield "all_to_one_expert", np.stack([np.full(T, 5), np.full(T, E), np.full(T, E + 3)], 1)
    yield "all_without_expert", np.full((T, K), E) + np.arange(K)
    yield "one_token", distinct(rng, 1, K, E)
    yield "one_token_without_expert", np.full((1, K), E)
    yield "outside_on_both_sides", np.where(some == 3, -1, some)
    yield "one_slot", distinct(rng, T, 1, E)
    yield "decoding", distinct(rng, 6, K, E + 1)
    yield "decoding_one_expert_full", np.stack([np.full(9, 2), rng.integers(3, E, 9), rng.integers(E, E + 4, 9)], 1)
    yield "several_visits", np.stack([np.full(200, 2), rng.integers(3, E, 200)], 1)


loop = functools.partial(experts, implementation="fused")

ROUTINGS = {name: jnp.asarray(index, jnp.int32) for name, index in routings()}
each_routing = pytest.mark.parametrize("name", ROUTINGS)


def draw(name, seed=0, dtype="float32"):
    index = ROUTINGS[name]
    rng = np.random.default_rng(seed)
    x, grad = (jnp.asarray(rng.normal(size=(len(index), D)), dtype) for _ in range(2))
    return x, index, jnp.asarray(rng.uniform(0.1, 1.0, index.shape), jnp.float32), grad


def objective(function):
    """value(params, x, weights, index, grad) of a layer: its product with `grad`."""
    return lambda p, x, w, index, grad: (function(p, x, index, w).astype(jnp.float32) * grad).sum()


@functools.cache
def compiled(path, recompute=True, activation="silu"):
    """(forward, gradients), each compiled once per shape."""
    if path == "dense":
        function = functools.partial(dense_experts, activation=activation)
    else:
        function = functools.partial(
            experts, implementation=path, recompute=recompute, activation=activation
        )  # fmt: skip
    return jax.jit(function), jax.jit(jax.grad(objective(function), (0, 1, 2)))


def test_default_is_the_fused_loop_on_a_cpu():
    p = layer()
    x, index, weights, grad = draw("half_without_expert")
    for got, wanted in zip(compiled(DEFAULT), compiled("fused"), strict=True):
        args = (p, x, weights, index, grad) if got is compiled(DEFAULT)[1] else (p, x, index, weights)
        for a, b in zip(*map(jax.tree.leaves, (got(*args), wanted(*args))), strict=True):
            np.testing.assert_array_equal(a, b)


def close(got, wanted, atol):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        scale = max(1.0, float(jnp.abs(w.astype(jnp.float32)).max()))
        np.testing.assert_allclose(np.asarray(g, np.float32), np.asarray(w, np.float32), rtol=0, atol=atol * scale)


def oracle_cases():
    """Every path on every routing; without recomputing (the fused loop always recomputes) on three. The paths of
    grouped matmuls, whose products have tests of their own, on half of the routings under `slow`.
    """
    for path in PATHS:
        for number, name in enumerate(ROUTINGS):
            marks = () if path == "fused" or number % 2 else (pytest.mark.slow,)
            yield pytest.param(path, name, True, marks=marks)
    for name in ("half_without_expert", "one_token_without_expert"):
        yield pytest.param("blocked", name, False)
    yield pytest.param("fused", "plain", False)


@pytest.mark.parametrize(("path", "name", "recompute"), list(oracle_cases()))
def test_against_the_dense_oracle(path, name, recompute):
    p = layer()
    x, index, weights, grad = draw(name)
    forward, backward = compiled(path, recompute)
    dense, dense_backward = compiled("dense")
    close(forward(p, x, index, weights), dense(p, x, index, weights), 3e-6)
    got = backward(p, x, weights, index, grad)
    close(got, dense_backward(p, x, weights, index, grad), 1e-5)
    live = (np.asarray(index) >= 0) & (np.asarray(index) < E)
    assert not np.asarray(got[2])[~live].any(), "a slot without an expert has no gradient of its weight"
    unused = np.setdiff1d(np.arange(E), np.asarray(index))
    assert not any(np.asarray(a)[unused].any() for a in jax.tree.leaves(got[0]))


@pytest.mark.parametrize("path", ["pallas_tpu", "pallas_gpu"])
def test_through_interpreted_kernels(path):
    """The composition that TPU and CUDA run, forward and backward; widths that the kernels must pad."""
    p = layer(sizes=(4, 24, 16))
    index = jnp.asarray(distinct(np.random.default_rng(3), 20, 2, 6), jnp.int32)
    rng = np.random.default_rng(4)
    x, grad = (jnp.asarray(rng.normal(size=(20, 24)), jnp.float32) for _ in range(2))
    weights = jnp.asarray(rng.uniform(0.1, 1.0, index.shape), jnp.float32)
    (forward, backward), (dense, dense_backward) = compiled(path), compiled("dense")
    close(forward(p, x, index, weights), dense(p, x, index, weights), 3e-6)
    close(backward(p, x, weights, index, grad), dense_backward(p, x, weights, index, grad), 1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_gelu(path):
    p = layer()
    x, index, weights, grad = draw("half_without_expert")
    got, wanted = (compiled(one, activation="gelu_tanh") for one in (path, "dense"))
    close(got[0](p, x, index, weights), wanted[0](p, x, index, weights), 3e-6)
    close(got[1](p, x, weights, index, grad), wanted[1](p, x, weights, index, grad), 1e-5)


@pytest.mark.parametrize(("path", "recompute"), [("fused", True), ("blocked", True), ("blocked", False)])
def test_bfloat16(path, recompute):
    """Against the oracle on the same rounded operands; sums are float32, so the error is that of a few roundings."""
    p = layer(dtype="bfloat16")
    x, index, weights, grad = draw("half_without_expert", dtype="bfloat16")
    forward, backward = compiled(path, recompute)
    dense, dense_backward = compiled("dense")
    y = forward(p, x, index, weights)
    assert y.dtype == jnp.bfloat16
    close(y, dense(p, x, index, weights), 0.01)
    got = backward(p, x, weights, index, grad)
    assert [a.dtype for a in jax.tree.leaves(got)] == [jnp.bfloat16] * 3 + [jnp.float32]
    close(got, dense_backward(p, x, weights, index, grad), 0.015)


def test_gradient_against_finite_differences():
    p = layer()
    x, index, weights, grad = draw("two_experts_empty")
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), (p, x, weights))
    gradient = compiled("fused")[1](p, x, weights, index, grad)
    analytic = sum(float((g * d).sum()) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    # The oracle in float64: steps small enough for six digits.
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), tree)  # noqa: E731

        def value(step):
            p64, x64, w64 = jax.tree.map(lambda a, d: a + step * d, wide((p, x, weights)), wide(direction))
            chosen = np.asarray(index)[..., None] == np.arange(E)
            share = jnp.einsum("tke,tk->te", chosen, w64)
            gate, up = (jnp.einsum("td,edf->tef", x64, p64.gate_up[:, i]) for i in range(2))
            y = jnp.einsum("tef,efd,te->td", jax.nn.silu(gate) * up, p64.down, share)
            return float((y * wide(grad)).sum())

        numeric = (value(1e-4) - value(-1e-4)) / 2e-4
    np.testing.assert_allclose(analytic, numeric, rtol=2e-5)


@pytest.mark.parametrize("path", PATHS)
def test_tokens_without_experts_may_hold_nan(path):
    """A padding token full of NaN whose slots all lie beyond the experts touches no other token and no gradient."""
    p = layer()
    x, index, weights, grad = draw("plain")
    gone = jnp.asarray([0, 7, T - 1])
    index = index.at[gone].set(E + 1)
    forward, backward = compiled(path)
    clean, clean_grads = forward(p, x, index, weights), backward(p, x, weights, index, grad)
    x, weights, grad = x.at[gone].set(jnp.nan), weights.at[gone].set(jnp.nan), grad.at[gone].set(jnp.nan)
    np.testing.assert_array_equal(forward(p, x, index, weights), clean)
    for got, wanted in zip(*map(jax.tree.leaves, (backward(p, x, weights, index, grad), clean_grads)), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_gradient_of_gradient_checkpointing_and_scan():
    """Works under jax.checkpoint and as the body of a scan over layers, where the gradient is the same."""
    stacked = params.init(jax.random.key(3), params.stack(expert_specs(E, D, F), 3))
    x, index, weights, _ = draw("half_without_expert")

    def scanned(p, x):
        body = jax.checkpoint(lambda x, one: (x + loop(one, x, index, weights), None))
        return (jax.lax.scan(body, x, p)[0] ** 2).sum()

    def unrolled(p, x):
        for i in range(3):
            x = x + dense_experts(jax.tree.map(lambda a, i=i: a[i], p), x, index, weights)
        return (x**2).sum()

    close(jax.jit(jax.grad(scanned, (0, 1)))(stacked, x), jax.jit(jax.grad(unrolled, (0, 1)))(stacked, x), 1e-5)


def test_vmap():
    """Batched (sizes and all) under vmap; slower than flattening the batch into T, but the same."""
    p = layer()
    x, index, weights, _ = draw("half_without_expert")
    fold = lambda a: a.reshape(4, T // 4, *a.shape[1:])  # noqa: E731
    got = jax.jit(jax.vmap(loop, (None, 0, 0, 0)))(p, fold(x), fold(index), fold(weights))
    close(got.reshape(T, D), dense_experts(p, x, index, weights), 3e-6)


def test_sharded_equals_unsharded():
    """Tokens over devices inside shard_map, weights replicated: outputs and every gradient."""
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    p = layer()
    x, index, weights, grad = draw("half_without_expert")
    rows = P("data")
    sharded = jax.shard_map(loop, mesh=mesh, in_specs=(P(), rows, rows, rows), out_specs=rows)
    got = jax.jit(jax.grad(objective(sharded), (0, 1, 2)))(p, x, weights, index, grad)
    close(got, compiled("dense")[1](p, x, weights, index, grad), 1e-5)


def test_whole_layer_from_the_router():
    """Router to output, gradient of the router's matrix included, with zero-experts in the routing."""
    cfg = RoutingConfig(E, K, free=(("zero", 4),))
    p = layer()
    router = jax.random.normal(jax.random.key(5), (D, cfg.slots))
    x = jax.random.normal(jax.random.key(6), (T, D))

    def value(function):
        def run(router, p, x):
            routing = route(x @ router, cfg)
            return (function(p, x, routing.index, routing.weights) ** 2).sum()

        return jax.jit(jax.grad(run, (0, 1, 2)))

    close(value(loop)(router, p, x), value(dense_experts)(router, p, x), 2e-5)


def test_capacity_is_exact_where_nothing_overflows_and_drops_beyond():
    p = layer()
    x, index, weights, _ = draw("half_without_expert")
    dense = dense_experts(p, x, index, weights)
    close(capacity_experts(p, x, index, weights, capacity_factor=float(E)), dense, 3e-6)
    x, index, weights, _ = draw("all_to_one_expert")
    dense = dense_experts(p, x, index, weights)
    capacity = int(np.ceil(1.25 * T * K / E))
    got = capacity_experts(p, x, index, weights, capacity_factor=1.25)
    close(got[:capacity], dense[:capacity], 3e-6)
    assert not np.asarray(got[capacity:]).any()
    with pytest.raises(ValueError, match=r"capacity_factor 0\.0 must be positive"):
        capacity_experts(p, x, index, weights, capacity_factor=0.0)


# --------------------------------------------------------------------------------------------------
# Dispatch


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 1.0]))
def test_dispatch_is_the_stable_sort(seed, gone):
    rng = np.random.default_rng(seed)
    index = np.where(rng.random((20, 3)) < gone, rng.integers(E, E + 3, (20, 3)), rng.integers(0, E, (20, 3)))
    d = jax.jit(dispatch, static_argnums=1)(jnp.asarray(index, jnp.int32), E)
    flat = np.minimum(index.reshape(-1), E)
    np.testing.assert_array_equal(d.order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(np.asarray(d.order)[d.inverse], np.arange(60))
    np.testing.assert_array_equal(d.sizes, np.bincount(flat, minlength=E + 1)[:E])
    assert all(a.dtype == jnp.int32 for a in jax.tree.leaves(d))


def test_dispatch_with_many_experts():
    """(E + 1) * M beyond int32 takes the sort of two operands."""
    experts_, rng = 2**20, np.random.default_rng(0)
    index = jnp.asarray(rng.integers(0, experts_ + 5, (1024, 4)), jnp.int32)
    d = dispatch(index, experts_)
    flat = np.minimum(np.asarray(index).reshape(-1), experts_)
    np.testing.assert_array_equal(d.order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(d.sizes, np.bincount(flat, minlength=experts_ + 1)[:-1])


@each_routing
def test_gather_and_combine(name):
    """gather_rows then combine is sum_k w over the slots with an expert; the gradients are JAX's own of plain
    indexing; NaN in rows without an expert is ignored both ways.
    """
    x, index, weights, grad = draw(name)
    d = dispatch(index, E)
    top_k = index.shape[1]
    rows = gather_rows(x, d, top_k)
    np.testing.assert_array_equal(rows, x[d.order // top_k])
    count = int(d.sizes.sum())
    live = (index >= 0) & (index < E)

    def value(x, weights):
        return (combine(gather_rows(x, d, top_k), weights, d) * grad).sum()

    def plain(x, weights):
        return (jnp.where(live, weights, 0).sum(1, keepdims=True) * x * grad).sum()

    close(jax.grad(value, (0, 1))(x, weights), jax.grad(plain, (0, 1))(x, weights), 1e-6)
    y = jnp.asarray(np.random.default_rng(2).normal(size=rows.shape), jnp.float32)
    clean = combine(y, weights, d)
    pull = jax.vjp(lambda y, w: combine(y, w, d), y, weights)[1](grad)
    poisoned = y.at[count:].set(jnp.nan)
    np.testing.assert_array_equal(combine(poisoned, weights, d), clean)
    again = jax.vjp(lambda y, w: combine(y, w, d), poisoned, weights)[1](grad)
    for got, wanted in zip(again, pull, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert not np.asarray(pull[0][count:]).any()


# --------------------------------------------------------------------------------------------------
# Specs and bad input


def test_specs():
    specs = expert_specs(4, 8, 16)
    assert specs.gate_up.shape == (4, 2, 8, 16)
    assert specs.gate_up.axes == ("expert", None, "embed", "mlp")
    assert specs.down.shape == (4, 16, 8)
    assert specs.down.axes == ("expert", "mlp", "embed")
    tree = params.init(jax.random.key(0), expert_specs(4, 256, 64))
    np.testing.assert_allclose(np.std(tree.gate_up), 256**-0.5, rtol=0.02)
    np.testing.assert_allclose(np.std(tree.down), 64**-0.5, rtol=0.02)
    placed = params.shardings(specs, make_mesh({"fsdp": 4, "expert": 2}), FSDP_EP)
    assert placed.gate_up.spec == P("expert", None, "fsdp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=jnp.zeros((5, D + 1))), f"must be \\[T, D = {D}\\]"),
        (dict(x=jnp.zeros((1, 5, D))), "flatten batch and sequence"),
        (dict(x=jnp.zeros((6, D))), r"must both be \[T = 6, K\]"),
        (dict(weights=jnp.zeros((5, 3))), r"index \(5, 2\) and weights \(5, 3\)"),
        (dict(index=jnp.zeros((5, 2))), "index is float32; hand over integers"),
        (dict(weights=jnp.zeros((5, 2), jnp.bfloat16)), "weights are bfloat16; keep routing weights in float32"),
        (dict(x=jnp.zeros((5, D), jnp.bfloat16)), "x is bfloat16, gate_up float32, down float32; cast"),
        (dict(params=ExpertParams(jnp.zeros((E, D, F)), jnp.zeros((E, F, D)))), r"must be \[E, 2, D, F\]"),
        (dict(params=ExpertParams(jnp.zeros((E, 2, D, F)), jnp.zeros((E, D, F)))), r"down \(8, 24, 16\) must be"),
        (dict(activation="relu"), "'relu' is not one of"),
        (dict(implementation="dense"), "'dense' is not one of"),
    ],
)
def test_operands_that_do_not_fit(change, message):
    operands = dict(
        params=ExpertParams(jnp.zeros((E, 2, D, F)), jnp.zeros((E, F, D))),
        x=jnp.zeros((5, D)),
        index=jnp.zeros((5, 2), jnp.int32),
        weights=jnp.zeros((5, 2)),
    )
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(experts)(**(operands | change))


def test_k_beyond_the_experts():
    """More slots than there are experts and parameter-free slots is refused where the routing is configured."""
    with pytest.raises(ValueError, match=r"top_k 9 is outside \[1, 8\]"):
        RoutingConfig(E, 9)
