"""Every implementation of the grouped matmul against per-expert numpy loops in float64; gradients; bad input."""

import contextlib
import importlib.util
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from moe.kernels import grouped_matmul as G
from moe.kernels.grouped_matmul import (
    GroupedMatmulError,
    blocked,
    check_group_sizes,
    gated_grouped_matmul,
    grouped_matmul,
)
from moe.sharding import make_mesh

# What is not written here yet, or cannot be imported, is not run; the two of XLA always are.
PRESENT = [name for name in G.IMPLEMENTATIONS if importlib.util.find_spec(f"moe.kernels.grouped_matmul.{name}")]
implementations = pytest.mark.parametrize("implementation", PRESENT)


def interpreted(implementation):
    """Pallas kernels run in interpret mode on a CPU."""
    if implementation == "pallas_tpu":
        from jax.experimental.pallas import tpu

        return tpu.force_tpu_interpret_mode()
    return contextlib.nullcontext()


# name -> (M, K, N, sizes). Odd sizes throughout: kernels that need multiples of 128 must pad by themselves.
CASES = {
    "mixed": (96, 40, 24, [17, 0, 30, 1, 9]),
    "full": (64, 24, 40, [20, 12, 32]),
    "one_expert_takes_all": (70, 16, 24, [0, 0, 70, 0]),
    "no_rows_at_all": (33, 16, 24, [0, 0, 0]),
    "one_row": (1, 24, 16, [0, 1, 0]),
    "one_row_without_expert": (1, 24, 16, [0, 0]),
    "single_expert": (40, 16, 16, [23]),
    "larger_than_tiles": (700, 136, 264, [300, 0, 129, 7, 200, 1]),
}
BLOCKED = {name: jax.jit(getattr(blocked, name)) for name in ("gmm", "gmm_t", "tgmm")}
DTYPES = {"float32": 2e-5, "bfloat16": 2e-2}


def selection(default):
    """(implementation, case, dtype): all of them for XLA; for Pallas, whose interpreter takes seconds each, `default`
    and the rest under `slow`.
    """
    for name in PRESENT:
        for case in CASES:
            for dtype in DTYPES:
                quick = name in ("reference", "blocked") or (case, dtype) in default
                marks = () if quick else (pytest.mark.slow,)
                yield pytest.param(name, case, dtype, marks=marks, id=f"{name}-{case}-{dtype}")


def draw(case, parts, dtype="float32", seed=0, poison=True):
    rows, k, n, sizes = CASES[case] if isinstance(case, str) else case
    rng = np.random.default_rng(seed)
    lhs, grad = rng.normal(size=(rows, k)), rng.normal(size=(rows, parts, n))
    rhs = rng.normal(size=(len(sizes), parts, k, n)) / np.sqrt(k)
    if poison:
        lhs[sum(sizes) :], grad[sum(sizes) :] = np.nan, np.nan
    return *(jnp.asarray(a, dtype) for a in (lhs, rhs, grad)), jnp.asarray(sizes, jnp.int32)


def groups(sizes):
    stop = np.cumsum(sizes)
    return [slice(a, b) for a, b in zip(stop - sizes, stop, strict=True)]


def by_hand(product, lhs, other, sizes, activation="silu"):
    """float64, one expert at a time; zeros where no expert writes."""
    lhs, other = np.asarray(lhs, np.float64), np.asarray(other, np.float64)
    spans = groups(np.asarray(sizes))
    if product == "tgmm":
        return np.stack([np.einsum("mk,mpn->pkn", lhs[s], other[s]) for s in spans])
    shape = {"gmm": other.shape[1::2], "gmm_t": other.shape[2:3], "gated": other.shape[3:]}[product]
    out = np.zeros((len(lhs), *shape))
    for s, w in zip(spans, other, strict=True):
        if product == "gmm":
            out[s] = np.einsum("mk,pkn->mpn", lhs[s], w)
        elif product == "gmm_t":
            out[s] = np.einsum("mpn,pkn->mk", lhs[s], w)
        else:
            gate, up = lhs[s] @ w[0], lhs[s] @ w[1]
            act = {
                "silu": lambda z: z / (1 + np.exp(-z)),
                "gelu_tanh": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
            }[activation]
            out[s] = act(gate) * up
    return out


def close(got, wanted, dtype):
    got = np.asarray(got, np.float64)
    scale = max(1.0, np.abs(wanted).max(initial=0))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=DTYPES[dtype] * scale)


@pytest.mark.parametrize(
    ("implementation", "case", "dtype"),
    list(selection(set())),  # the kernels have tests of their own, test_grouped_matmul_tpu.py and _gpu.py
)
def test_products(implementation, case, dtype):
    """gmm, gmm_t, tgmm (two parts and one) and gated; rows without an expert are poisoned with NaN on the way in, and
    exactly zero on the way out.
    """
    module = G.implementation_module(implementation)
    with interpreted(implementation):
        for parts in (1, 2):
            lhs, rhs, grad, sizes = draw(case, parts, dtype)
            beyond = int(sizes.sum())
            calls = {"gmm": (lhs, rhs), "gmm_t": (grad, rhs), "tgmm": (lhs, grad)}
            for product, (a, b) in calls.items():
                got = jax.jit(getattr(module, product))(a, b, sizes)
                assert got.dtype == a.dtype
                close(got, by_hand(product, a, b, sizes), dtype)
                if product != "tgmm":
                    assert not np.asarray(got[beyond:]).any()
        for activation in ("silu", "gelu_tanh"):
            got = jax.jit(lambda *args, a=activation: module.gated(*args, activation=a))(lhs, rhs, sizes)
            assert got.dtype == lhs.dtype
            close(got, by_hand("gated", lhs, rhs, sizes, activation), dtype)
            assert not np.asarray(got[beyond:]).any()


@implementations
def test_tgmm_dtype(implementation):
    """bf16 rows may give float32 weight gradients, of more digits than bf16 has."""
    lhs, _, grad, sizes = draw("mixed", 2, "bfloat16")
    with interpreted(implementation):
        got = jax.jit(lambda *a: G.implementation_module(implementation).tgmm(*a, dtype=jnp.float32))(lhs, grad, sizes)
    assert got.dtype == jnp.float32
    close(got, by_hand("tgmm", lhs, grad, sizes), "float32")


def loss(implementation, gated, activation="silu"):
    def value(lhs, rhs, sizes, grad):
        if gated:
            y = gated_grouped_matmul(lhs, rhs, sizes, activation=activation, implementation=implementation)
        else:
            y = grouped_matmul(lhs, rhs[:, 0], sizes, implementation=implementation)
        return (y.astype(jnp.float32) * grad).sum()

    return value


@pytest.mark.parametrize(("implementation", "case", "dtype"), list(selection({("mixed", "float32")})))
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_against_autodiff_of_loops(implementation, gated, case, dtype):
    """The custom VJPs against JAX's own derivative of one product per expert on its slice."""
    parts = 2 if gated else 1
    lhs, rhs, grad, sizes = draw(case, parts, dtype)
    grad = jnp.where(jnp.isnan(grad), 1.0, grad)[:, 0]

    def plain(lhs, rhs):
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
        total = 0.0
        for e, s in enumerate(groups(np.asarray(sizes))):
            y = lhs[s] @ rhs[e, 0]
            y = jax.nn.silu(y) * (lhs[s] @ rhs[e, 1]) if gated else y
            total += (y * grad[s]).sum()
        return total

    wanted = jax.jit(jax.grad(plain, (0, 1)))(lhs, rhs)
    with interpreted(implementation):
        got = jax.jit(jax.grad(loss(implementation, gated), (0, 1)))(lhs, rhs, sizes, grad)
    for g, w in zip(got, wanted, strict=True):
        close(g, np.asarray(w, np.float64), dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gradient_against_finite_differences(activation):
    with jax.enable_x64(True):
        lhs, rhs, grad, sizes = draw((7, 3, 4, [2, 0, 3]), 2, "float64", poison=False)
        grad = grad[:, 0]

        def value(lhs, rhs):  # float32 sums inside: a step that leaves 4 digits
            return float(loss("reference", True, activation)(lhs, rhs, sizes, grad))

        d_lhs, d_rhs = jax.grad(loss("blocked", True, activation), (0, 1))(lhs, rhs, sizes, grad)
        step = 1e-2
        for place in [(0, 0), (3, 1), (6, 2)]:
            up, down = (value(lhs.at[place].add(s), rhs) for s in (step, -step))
            np.testing.assert_allclose(d_lhs[place], (up - down) / (2 * step), atol=2e-3)
        for place in [(0, 0, 1, 2), (2, 1, 0, 3), (1, 0, 0, 0)]:
            up, down = (value(lhs, rhs.at[place].add(s)) for s in (step, -step))
            np.testing.assert_allclose(d_rhs[place], (up - down) / (2 * step), atol=2e-3)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 60), min_size=5, max_size=5))
def test_any_sizes(sizes):
    """Sizes are data: one compiled program serves all of them."""
    lhs, rhs, grad, sizes = draw((300, 5, 3, sizes), 1)
    for product, a, b in (("gmm", lhs, rhs), ("gmm_t", grad, rhs), ("tgmm", lhs, grad)):
        close(BLOCKED[product](a, b, sizes), by_hand(product, a, b, sizes), "float32")


def test_work_follows_the_rows():
    """Blocks that hold no row are not computed: a NaN weight of an expert without rows reaches nothing, and the loops'
    trip counts are the ceil(n / B) of the group sizes.
    """
    lhs, rhs, _, sizes = draw("mixed", 1)
    poisoned = rhs.at[np.flatnonzero(np.asarray(sizes) == 0)].set(jnp.nan)
    got = grouped_matmul(lhs, poisoned[:, 0], sizes, implementation="blocked")
    np.testing.assert_array_equal(got, grouped_matmul(lhs, rhs[:, 0], sizes, implementation="blocked"))


def test_default_is_chosen_by_the_lowering_platform():
    lhs, rhs, _, sizes = draw("full", 2)
    text = {
        platform: jax.jit(lambda *a: gated_grouped_matmul(*a)).trace(lhs, rhs, sizes).lower(
            lowering_platforms=(platform,)
        ).as_text()
        for platform in ("cpu", "tpu")
        if platform == "cpu" or "pallas_tpu" in PRESENT
    }  # fmt: skip
    assert "stablehlo.while" in text["cpu"]
    assert "custom_call @tpu" not in text["cpu"]
    if "tpu" in text:
        assert "tpu_custom_call" in text["tpu"]


def test_inside_shard_map():
    """Replicated weights, rows split over devices: the weight gradient is the sum over the devices."""
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    lhs, rhs, grad, _ = draw((64, 8, 12, [3, 4, 5]), 2, poison=False)
    sizes = jnp.asarray([[3, 4, 5], [16, 0, 0], [0, 0, 0], [1, 9, 2]], jnp.int32)

    def local(lhs, rhs, sizes, grad):
        return jax.lax.psum(loss("blocked", True)(lhs, rhs, sizes[0], grad[:, 0]), "data")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(), P("data"), P("data")), out_specs=P())
    got = jax.jit(jax.grad(sharded, (0, 1)))(lhs, rhs, sizes, grad)
    one = jax.grad(loss("reference", True), (0, 1))
    parts = [one(lhs[16 * i : 16 * i + 16], rhs, sizes[i], grad[16 * i : 16 * i + 16, 0]) for i in range(4)]
    close(got[0], np.concatenate([p[0] for p in parts]), "float32")
    close(got[1], np.sum([p[1] for p in parts], 0), "float32")


# --------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sizes=jnp.zeros(4, jnp.int32)), r"shape \(4,\) do not fit 3 experts"),
        (dict(sizes=jnp.zeros((3, 1), jnp.int32)), r"shape \(3, 1\) do not fit 3 experts"),
        (dict(sizes=jnp.zeros(3)), "float32; cast them with sizes.astype"),
        (dict(sizes=jnp.zeros(3, jnp.int16)), "int16; cast them"),
        (dict(lhs=jnp.zeros((8, 5))), "has K = 5"),
        (dict(lhs=jnp.zeros((2, 4, 6))), "flatten batch and sequence"),
        (dict(rhs=jnp.zeros((3, 6))), r"must be \[M, K\] and \[E, K, N\]"),
        (dict(lhs=jnp.zeros((8, 6), jnp.bfloat16)), "lhs is bfloat16, rhs is float32; cast both"),
        (dict(lhs=jnp.zeros((8, 6), jnp.int32), rhs=jnp.zeros((3, 6, 2), jnp.int32)), "lhs is int32"),
        (dict(implementation="megablox"), "'megablox' is not one of 'reference', 'blocked'"),
    ],
)
def test_operands_that_do_not_fit(change, message):
    operands = dict(lhs=jnp.zeros((8, 6)), rhs=jnp.zeros((3, 6, 2)), sizes=jnp.zeros(3, jnp.int32)) | change
    # Unwrapped: the shape checks of the test run would come first.
    with pytest.raises(GroupedMatmulError, match=message):
        inspect.unwrap(grouped_matmul)(**operands)


def test_gated_operands_that_do_not_fit():
    lhs, rhs, sizes = jnp.zeros((8, 6)), jnp.zeros((3, 2, 6, 4)), jnp.zeros(3, jnp.int32)
    with pytest.raises(GroupedMatmulError, match=r"must be \[M, K\] and \[E, 2, K, N\]"):
        inspect.unwrap(gated_grouped_matmul)(lhs, rhs[:, 0], sizes)
    with pytest.raises(GroupedMatmulError, match="'relu' is not one of 'silu', 'gelu_tanh'"):
        gated_grouped_matmul(lhs, rhs, sizes, activation="relu")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([3, -2, 4], "expert 1 has group size -2"),
        ([3, 6, 4], "sum to 13, there are 12 rows"),
        ([2**31 - 1, 2**31 - 1], "sum to 4294967294, there are 12"),  # no overflow in the sum
        ([1.0, 2.0], "float64 must be"),
    ],
)
def test_group_sizes_looked_at(sizes, message):
    with pytest.raises(GroupedMatmulError, match=message):
        check_group_sizes(np.asarray(sizes), rows=12)
    check_group_sizes(np.asarray([3, 0, 9]), rows=12)
    check_group_sizes(jnp.asarray([3, 0, 1]), rows=12)
