"""The Pallas kernels for NVIDIA GPUs: their numbers in interpret mode, their machine code from the CUDA compiler.

Nothing here runs on a GPU."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.experts import ExpertParams, experts
from moe.kernels import aot_cuda, grouped_matmul
from moe.kernels.grouped_matmul import GroupedMatmulError, pallas_gpu
from moe.kernels.grouped_matmul.pallas_gpu import Tiles

SMALL = Tiles(m=16, n=16, k=16, warps=4, stages=2)
needs_cuda_compiler = pytest.mark.skipif(aot_cuda.missing() is not None, reason=str(aot_cuda.missing()))


def draw(rows, experts, parts, inner, columns, sizes, dtype=np.float32, seed=0):
    """lhs [M, K], rhs [E, P, K, N], grad [M, P, N], all NaN beyond the rows of the experts."""
    rng = np.random.default_rng(seed)
    lhs, rhs, grad = (
        rng.normal(size=shape) for shape in ((rows, inner), (experts, parts, inner, columns), (rows, parts, columns))
    )
    lhs[sum(sizes) :], grad[sum(sizes) :] = np.nan, np.nan
    return *(jnp.asarray(a, dtype) for a in (lhs, rhs, grad)), jnp.asarray(sizes, jnp.int32)


def silu(x):
    return x * 0.5 * (1 + np.tanh(x / 2))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def oracle(lhs, rhs, grad, sizes):
    """The products one expert at a time in float64, by what the docstrings say."""
    lhs, rhs, grad = (np.asarray(a, np.float64) for a in (lhs, rhs, grad))
    gmm, gmm_t, tgmm = np.zeros_like(grad), np.zeros_like(lhs), np.zeros_like(rhs)
    start = 0
    for expert, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start := start + size)
        for part in range(rhs.shape[1]):
            gmm[rows, part] = lhs[rows] @ rhs[expert, part]
            gmm_t[rows] += grad[rows, part] @ rhs[expert, part].T
            tgmm[expert, part] = lhs[rows].T @ grad[rows, part]
    out = {"gmm": gmm, "gmm_t": gmm_t, "tgmm": tgmm}
    if rhs.shape[1] == 2:
        out |= {"silu": silu(gmm[:, 0]) * gmm[:, 1], "gelu_tanh": gelu_tanh(gmm[:, 0]) * gmm[:, 1]}
    return out


@functools.partial(jax.jit, static_argnames="tiles")
def ours(lhs, rhs, grad, sizes, tiles=None):
    out = {
        "gmm": pallas_gpu.gmm(lhs, rhs, sizes, tiles=tiles),
        "gmm_t": pallas_gpu.gmm_t(grad, rhs, sizes, tiles=tiles),
        "tgmm": pallas_gpu.tgmm(lhs, grad, sizes, tiles=tiles),
    }
    if rhs.shape[1] == 2:
        for activation in ("silu", "gelu_tanh"):
            out[activation] = pallas_gpu.gated(lhs, rhs, sizes, activation=activation, tiles=tiles)
    return out


def compare(operands, tiles, tolerance):
    got, want = ours(*operands, tiles=tiles), oracle(*operands)
    assert got.keys() == want.keys()
    live = int(operands[-1].sum())
    for product, expected in want.items():
        value = np.asarray(got[product])
        assert value.shape == expected.shape
        assert value.dtype == operands[0].dtype
        # One bound for the whole product: sums cancel, so that single elements may be small beside their terms.
        scale = max(np.abs(expected).max(), 1e-30)
        np.testing.assert_array_less(np.abs(value.astype(np.float64) - expected) / scale, tolerance, err_msg=product)
        if product != "tgmm":
            assert not value[live:].any(), f"{product}: rows without an expert must be zero"


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((50, 3, 2, 32, 48), (20, 0, 17)),  # tiles divide the axes; an empty expert; rows without one
        ((50, 3, 2, 37, 19), (10, 25, 15)),  # nothing divides; all rows have an expert
        ((33, 2, 1, 16, 16), (0, 33)),
        ((1, 3, 2, 20, 5), (0, 1, 0)),
    ],
)
def test_products(shape, sizes):
    compare(draw(*shape, sizes), SMALL, 2e-6)


def test_no_expert_has_rows():
    operands = draw(20, 3, 2, 32, 32, (0, 0, 0))
    assert all(not np.asarray(value).any() for value in ours(*operands, tiles=SMALL).values())


def test_more_than_a_block_of_visits():
    """Eight visits go through the columns together; here are 25, as many as 310 rows can need, so one in the last."""
    sizes = (97, 17, 1, 81, 65)
    assert pallas_gpu.visit_bound(310, 6, SMALL.m) == 25 == sum(-(-n // SMALL.m) for n in (*sizes, 310 - sum(sizes)))
    compare(draw(310, 5, 1, 16, 40, sizes), SMALL, 2e-6)


@pytest.mark.parametrize("sizes", [(140, 130), (64, 192), (0, 65), (255, 45)])
def test_tiles_of_its_own_choice(sizes):
    """Tiles of 128 rows, or of 64 where no more are left of an expert's."""
    compare(draw(300, 2, 2, 100, 130, sizes), None, 2e-6)


def test_bfloat16():
    # Half an ulp of the rounded output, 2^-8 of the largest element; the sums themselves are float32.
    compare(draw(70, 3, 2, 64, 48, (30, 0, 33), jnp.bfloat16), SMALL, 2**-8 + 1e-5)


@st.composite
def group_sizes(draw, experts=4, rows=60):
    """Sizes with many empty experts, of any sum up to `rows`."""
    sizes = []
    for _ in range(experts):
        sizes.append(draw(st.one_of(st.just(0), st.integers(0, rows - sum(sizes)))))
    return tuple(draw(st.permutations(sizes)))


@given(group_sizes())
@settings(max_examples=25)
def test_any_sizes(sizes):
    compare(draw(60, 4, 2, 24, 16, sizes), SMALL, 2e-6)


@given(group_sizes(experts=7, rows=200), st.sampled_from([16, 64, 128]))
@settings(max_examples=60)
def test_every_row_is_visited_once(sizes, tile):
    group, first, end = np.asarray(pallas_gpu._visit_table(jnp.asarray(sizes, jnp.int32), 200, tile))
    visits = [(g, r) for g, f, e in zip(group, first, end, strict=True) for r in range(f, min(f + tile, e))]
    owners = [e for e, size in enumerate(sizes) for _ in range(size)]
    owners += [len(sizes)] * (200 - len(owners))
    assert visits == list(zip(owners, range(200), strict=True))
    used = sum(-(-size // tile) for size in (*sizes, 200 - sum(sizes)))
    assert used <= len(group)
    assert (end[used:] <= first[used:]).all(), "visits past the real number have no rows"


def rows_computed(sizes, tile=128):
    """By visits of `tile` rows, the last of an expert halved where that is enough."""
    rest = sizes % tile
    return (sizes - rest + np.where(rest == 0, 0, np.where(rest <= tile // 2, tile // 2, tile))).sum()


def test_computed_rows_are_mostly_real():
    """The figures of the module's docstring: Qwen3-30B-A3B's 32,768 rows over 128 experts."""
    rng = np.random.default_rng(0)
    zipf = np.arange(1, 129) ** -0.7

    def use(rows, probabilities):
        draws = [rng.multinomial(rows, probabilities / probabilities.sum()) for _ in range(50)]
        return np.mean([rows / rows_computed(sizes) for sizes in draws])

    assert round(use(32_768, np.ones(128)), 2) == 0.89
    assert round(use(32_768, zipf), 2) == 0.90
    assert round(use(16_384, np.ones(128)), 2) == 0.81


@pytest.mark.parametrize(("rows", "groups", "tile"), [(9, 3, 4), (2, 4, 4), (8, 2, 4), (7, 1, 4), (0, 2, 4)])
def test_visit_bound_is_tight(rows, groups, tile):
    """The static grid is as long as the worst of all possible group sizes needs, and no longer."""
    sizes = (s for s in itertools.product(range(rows + 1), repeat=groups) if sum(s) == rows)
    assert pallas_gpu.visit_bound(rows, groups, tile) == max(sum(-(-n // tile) for n in s) for s in sizes)


@pytest.mark.parametrize(("name", "size"), [("m", 24), ("n", 8), ("k", 0)])
def test_tiles_are_powers_of_two(name, size):
    with pytest.raises(GroupedMatmulError, match=f"{name} = {size}"):
        Tiles(**{"m": 16, "n": 16, "k": 16, "warps": 4, "stages": 2, name: size})


@pytest.mark.parametrize("rows", [1, 7, 40, 100, 256, 5000])
@pytest.mark.parametrize("columns", [5, 100, 768, 2048])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("accumulators", [1, 2])
def test_tiles_fit_an_sm(rows, columns, dtype, accumulators):
    tiles = pallas_gpu.choose_tiles(rows, columns, 2048, dtype, accumulators=accumulators)
    shared = tiles.stages * tiles.k * (tiles.m + accumulators * tiles.n) * jnp.dtype(dtype).itemsize
    assert shared <= 232448
    # float32 totals, of the 255 registers a thread can have.
    assert tiles.m * tiles.n * accumulators <= 128 * 32 * tiles.warps


# The FP8 kernel. Operands are exact in e4m3 and the scales are arbitrary: the product has one right answer.


def draw_fp8(rows, experts, parts, inner, columns, sizes):
    rng = np.random.default_rng(0)

    def e4m3(*shape):
        return jnp.asarray(rng.normal(size=shape) * 50, jnp.float8_e4m3fn)

    def scales(*shape):
        return jnp.asarray(np.exp(rng.normal(size=shape)), jnp.float32)

    blocks, column_blocks = -(-inner // 128), -(-columns // 128)
    lhs, lhs_scale = e4m3(rows, inner), scales(rows, blocks)
    lhs = lhs.at[sum(sizes) :].set(jnp.nan)
    lhs_scale = lhs_scale.at[sum(sizes) :].set(jnp.nan)
    rhs, rhs_scale = e4m3(experts, parts, columns, inner), scales(experts, parts, column_blocks, blocks)
    return lhs, lhs_scale, rhs, rhs_scale, jnp.asarray(sizes, jnp.int32)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("inner", [256, 150])
def test_fp8_is_the_product_of_the_dequantised(activation, inner):
    rows, experts, columns, sizes = 40, 3, 200, (13, 0, 20)
    lhs, lhs_scale, rhs, rhs_scale, sizes = draw_fp8(rows, experts, 2, inner, columns, sizes)
    x = np.asarray(lhs, np.float64) * np.repeat(lhs_scale, 128, 1)[:, :inner]
    w = np.asarray(rhs, np.float64) * np.repeat(np.repeat(rhs_scale, 128, 2)[:, :, :columns], 128, 3)[..., :inner]
    want = oracle(x, np.swapaxes(w, 2, 3), np.zeros((rows, 2, columns)), sizes)["silu" if activation else "gmm"]
    got = pallas_gpu.gmm_fp8(lhs, lhs_scale, rhs, rhs_scale, sizes, activation=activation, dtype=jnp.float32)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
    assert not np.asarray(got)[33:].any()


def test_fp8_names_what_it_cannot_do():
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float8_e4m3fn)
    scale = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    sizes = jax.ShapeDtypeStruct((128,), jnp.int32)
    with pytest.raises(GroupedMatmulError, match="between 2\\*\\*31 and 2\\*\\*32"):
        jax.eval_shape(
            pallas_gpu.gmm_fp8,
            *(shape((64, 7168)), scale((64, 56)), shape((128, 2, 2048, 7168)), scale((128, 2, 16, 56)), sizes),
        )
    wide = functools.partial(pallas_gpu.gmm_fp8, tiles=Tiles(m=128, n=256, k=64, warps=8, stages=3))
    with pytest.raises(GroupedMatmulError, match="n = 256"):
        jax.eval_shape(wide, shape((64, 256)), scale((64, 2)), shape((128, 1, 256, 256)), scale((128, 1, 2, 2)), sizes)


# The CUDA compiler, at the shapes of Qwen3-30B-A3B: 4,096 tokens of 8 experts each.

ROWS, D, F, EXPERTS = 32_768, 2_048, 768, 128
HIDDEN_BYTES = ROWS * F * 2


def bf16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


SIZES = jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)


def experts_mlp(x, gate_up, down, sizes):
    return grouped_matmul.grouped_matmul(grouped_matmul.gated_grouped_matmul(x, gate_up, sizes), down, sizes)


def experts_gradient(x, gate_up, down, sizes, grad):
    return jax.vjp(lambda *weights: experts_mlp(*weights, sizes), x, gate_up, down)[1](grad)


def products(report):
    """The kernels of ours, by name without the number that a second one of a kind gets."""
    ours = [kernel for kernel in report.kernels if "grouped_matmul" in kernel.name]
    return [(re.sub(r"__\d+$", "", kernel.name), kernel) for kernel in ours]


def check_machine_code(kernels, instruction):
    """Tensor cores of Hopper fed from shared memory, operands copied there 16 bytes at a time, nothing spilled."""
    for name, kernel in kernels:
        assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.{instruction}", kernel.ptx), name
        assert "cp.async.cg.shared.global" in kernel.ptx, name
        assert "mma.sync" not in kernel.ptx, name
        assert not re.search(r"cp\.async\.ca|ld\.global\.(b16|b8|v2)", kernel.ptx), f"{name}: narrow loads"
        assert kernel.shared_bytes <= 232448, name
        assert kernel.spill_bytes in (0, None), name


@needs_cuda_compiler
def test_forward_for_h100():
    report = aot_cuda.compile_for_h100(experts_mlp, bf16(ROWS, D), bf16(EXPERTS, 2, D, F), bf16(EXPERTS, F, D), SIZES)
    kernels = products(report)
    assert sorted(name for name, _ in kernels) == ["gated_grouped_matmul", "grouped_matmul"]
    check_machine_code(kernels, r"m64n(128|256)k16\.f32\.bf16\.bf16")
    # Between its two products the forward keeps [M, F] in bf16, and small tables beside it.
    assert HIDDEN_BYTES <= report.temporary_bytes < 1.01 * HIDDEN_BYTES
    assert report.output_bytes == ROWS * D * 2


@needs_cuda_compiler
def test_gradient_for_h100():
    report = aot_cuda.compile_for_h100(
        experts_gradient, bf16(ROWS, D), bf16(EXPERTS, 2, D, F), bf16(EXPERTS, F, D), SIZES, bf16(ROWS, D)
    )
    kernels = products(report)
    assert sorted(name for name, _ in kernels) == [
        *("gated_grouped_matmul", "grouped_matmul"),
        *("grouped_matmul_transposed", "grouped_matmul_transposed"),
        *("grouped_matmul_weights", "grouped_matmul_weights"),
    ]
    check_machine_code(kernels, r"m64n(128|256)k16\.f32\.bf16\.bf16")
    # Ideal: gate and up before the activation, [M, 2, F], whose gradient takes their place; the hidden layer and its
    # gradient lie in buffers of the results.
    assert 2 * HIDDEN_BYTES <= report.temporary_bytes < 1.3 * 2 * HIDDEN_BYTES


@needs_cuda_compiler
def test_layer_for_h100():
    """The whole expert layer with its dispatch, 4,096 tokens of 8 experts: no buffer beyond those that it must have."""
    tokens, top_k = ROWS // 8, 8
    operands = (
        *(ExpertParams(gate_up=bf16(EXPERTS, 2, D, F), down=bf16(EXPERTS, F, D)), bf16(tokens, D)),
        jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
        jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
    )

    def gradient(layer, x, index, weights, grad):
        return jax.vjp(lambda layer, x, weights: experts(layer, x, index, weights), layer, x, weights)[1](grad)

    rows_bytes = ROWS * D * 2
    # Hidden and output rows; the gathered rows take the place of the output's.
    forward = aot_cuda.compile_for_h100(experts, *operands)
    assert HIDDEN_BYTES + rows_bytes <= forward.temporary_bytes < 1.3 * (HIDDEN_BYTES + rows_bytes)
    # At the gradient of down: both kinds of gathered rows, hidden, and the gradient of gate and up.
    backward = aot_cuda.compile_for_h100(gradient, *operands, bf16(tokens, D))
    assert backward.temporary_bytes < 1.3 * (2 * rows_bytes + 3 * HIDDEN_BYTES)
    assert len(products(forward)) == 2
    assert len(products(backward)) == 5, "of the forward, gate and up alone are computed again"


@needs_cuda_compiler
def test_fp8_for_h100():
    """The FP8 instruction of wgmma, in both uses; Triton's default would convert to float16 and use mma.sync."""
    fp8 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float8_e4m3fn)
    scale = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    for activation, parts, inner, columns in ((None, 1, F, D), ("silu", 2, D, F)):
        report = aot_cuda.compile_for_h100(
            functools.partial(pallas_gpu.gmm_fp8, activation=activation),
            *(fp8((ROWS, inner)), scale((ROWS, inner // 128)), fp8((EXPERTS, parts, columns, inner))),
            *(scale((EXPERTS, parts, columns // 128, inner // 128)), SIZES),
        )
        kernels = products(report)
        assert len(kernels) == 1
        check_machine_code(kernels, r"m64n(128|64)k32\.f32\.e4m3\.e4m3")


@needs_cuda_compiler
def test_few_rows_for_h100():
    """Decoding: tiles of 16 rows, which wgmma does not have; still 16-byte copies, and a small grid."""
    report = aot_cuda.compile_for_h100(experts_mlp, bf16(128, D), bf16(EXPERTS, 2, D, F), bf16(EXPERTS, F, D), SIZES)
    for name, kernel in products(report):
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in kernel.ptx, name
        assert "cp.async.cg.shared.global" in kernel.ptx, name
        assert kernel.grid[0] <= 128 * (D // 64)


@needs_cuda_compiler
def test_inside_shard_map_for_four_h100():
    """Experts split over devices, rows replicated: the kernels compile under shard_map's check of varying axes, and
    the only collective is the sum of the rows' gradients."""
    mesh = aot_cuda.h100_mesh({"expert": 4})

    def place(array, *spec):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, P(*spec)))

    def gradient(x, gate_up, sizes):
        def loss(x, gate_up):
            return grouped_matmul.gated_grouped_matmul(x, gate_up, sizes).astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1))(x, gate_up)

    split = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("expert"), P("expert")), out_specs=(P(), P("expert")))
    report = aot_cuda.compile_for_h100(
        split,
        *(place(bf16(ROWS, D)), place(bf16(EXPERTS, 2, D, F), "expert"), place(SIZES, "expert")),
        mesh=mesh,
    )
    assert len(products(report)) == 3
    collectives = re.findall(r"= \S+ (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", report.text)
    assert collectives == ["all-reduce"]


def test_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(aot_cuda.importlib.metadata, "version", lambda package: "0.0.1")
    assert "jax-cuda12-plugin 0.0.1 does not belong" in str(aot_cuda.missing())
    with pytest.raises(aot_cuda.CudaCompilerError, match="pip install --no-deps jax-cuda12-plugin=="):
        aot_cuda.h100_mesh()
