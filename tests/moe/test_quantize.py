"""FP8 experts: the rounding by enumeration of the format, bounds of the error, the layer, checkpoints."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe import params, quantize
from moe.experts import ExpertParams, QuantizedExpertParams, expert_specs, experts, quantized, quantized_experts
from moe.kernels import aot_cuda
from moe.quantize import (
    E4M3,
    SCALES,
    QuantizationError,
    Quantized,
    dequantize,
    quantize_blocks,
    quantize_rows,
)

scales = pytest.mark.parametrize("scale", SCALES)


def e4m3_numbers():
    """OCP 8-bit floating point, E4M3: sign, 4 bits of exponent of bias 7, 3 of mantissa; subnormals; no infinities,
    S.1111.111 is NaN. Code -> number, for the codes without sign.
    """
    numbers = []
    for exponent, mantissa in itertools.product(range(16), range(8)):
        if exponent == 0:
            numbers.append(mantissa / 8 * 2.0**-6)
        elif (exponent, mantissa) == (15, 7):
            numbers.append(np.nan)
        else:
            numbers.append((1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.array(numbers)


def nearest_e4m3(x):
    """Round to nearest, ties to the even code, by looking at all of them."""
    numbers = e4m3_numbers()[:-1]
    distance = np.abs(np.abs(np.float64(x))[..., None] - numbers)
    # Among equally near codes the even one: a tenth of the smallest difference there is breaks the tie.
    code = (distance + (np.arange(127) % 2) * 2.0**-40).argmin(-1)
    return np.copysign(numbers[code], x)


def test_codes_are_those_of_the_ocp_format():
    codes = np.arange(256, dtype=np.uint8)
    positive = e4m3_numbers()
    want = np.concatenate([positive, -positive])
    np.testing.assert_array_equal(np.asarray(jax.lax.bitcast_convert_type(codes, E4M3), np.float64), want)
    np.testing.assert_array_equal(codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64), want)
    assert np.nanmax(positive) == quantize.E4M3_MAX


def awkward_numbers():
    """Codes, the middles between them and their neighbours, and random numbers of all magnitudes."""
    numbers = e4m3_numbers()[:-1]
    middles = (numbers[1:] + numbers[:-1]) / 2
    rng = np.random.default_rng(0)
    random = np.exp2(rng.uniform(-14, 8.8, 20_000))
    x = np.concatenate([numbers, middles, np.nextafter(np.float32(middles), 0), np.nextafter(np.float32(middles), 500)])
    x = np.concatenate([x, random[random <= 448]]).astype(np.float32)
    return np.concatenate([x, -x])


def test_rounding_is_to_the_nearest():
    """A block whose largest element is 448 has scale 1: what is left is the rounding."""
    x = awkward_numbers()
    x = np.pad(x, (0, -len(x) % 127)).reshape(-1, 127)
    x = np.pad(x, ((0, 0), (1, 0)), constant_values=448)
    q = jax.jit(quantize_rows)(x)
    np.testing.assert_array_equal(q.scale, 1)
    np.testing.assert_array_equal(np.asarray(q.values, np.float64), nearest_e4m3(x))
    np.testing.assert_array_equal(np.asarray(q.values), x.astype(ml_dtypes.float8_e4m3fn))


def blockwise(x, block):
    """The block's largest magnitude at every element, by a loop."""
    out = np.zeros_like(x)
    for i in range(0, x.shape[0], block[0]):
        for j in range(0, x.shape[1], block[1]):
            part = slice(i, i + block[0]), slice(j, j + block[1])
            out[part] = np.abs(x[part]).max()
    return out


matrices = hnp.arrays(
    np.float32,
    st.sampled_from([(1, 1), (3, 130), (128, 128), (130, 257)]),
    elements=st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False),
    fill=st.floats(-1, 1, width=32, allow_subnormal=False),
)


@functools.partial(jax.jit, static_argnums=(1, 2))
def round_trip(x, scale, rows):
    q = (quantize_rows if rows else quantize_blocks)(x, scale=scale)
    return q, dequantize(q)


@given(matrices, st.sampled_from(SCALES), st.booleans())
@settings(max_examples=60)
def test_error_bound(x, scale, rows):
    q, back = round_trip(x, scale, rows)
    block = (1, 128) if rows else (128, 128)
    largest = blockwise(np.float64(x), block)
    step = np.where(largest == 0, 1, np.maximum(largest / 448, 2.0**-126))
    if scale == "ue8m0":
        step = np.exp2(np.ceil(np.log2(step) - 1e-9))
    spread = np.repeat(np.repeat(np.float64(q.scale), block[0], 0), block[1], 1)[: x.shape[0], : x.shape[1]]
    np.testing.assert_allclose(spread, step, rtol=1e-6)
    bound = np.maximum(np.abs(x) / 16, step / 1024) * (1 + 1e-6)
    assert (np.abs(np.float64(back) - x) <= bound).all()
    # The largest element of a block uses the range: no power of two of it is given away, beyond ue8m0's one.
    assert (np.abs(np.float64(q.values)).max() >= (224 if scale == "ue8m0" else 448)) or not x.any()


def test_the_bound_is_used_up():
    """Errors of 1/17 and more occur: a bound that any rounding satisfies would show nothing."""
    x = jax.random.normal(jax.random.key(0), (128, 128))
    error = np.abs(dequantize(quantize_blocks(x)) - x)
    assert (error / np.abs(x))[np.abs(x) > 0.1].max() > 1 / 17.5
    # About a thirtieth of the norm is lost, by numpy's own rounding as well.
    assert 0.02 < np.linalg.norm(error) / np.linalg.norm(x) < 0.03


def test_ue8m0_scales_are_exact():
    w = jax.random.normal(jax.random.key(0), (300, 200)) * jnp.exp2(jnp.arange(300.0) / 5 - 30)[:, None]
    q = quantize_blocks(w, scale="ue8m0")
    np.testing.assert_array_equal(q.scale.astype(jnp.float8_e8m0fnu).astype(jnp.float32), q.scale)
    # Four significant bits times a power of two: bfloat16 has them all.
    np.testing.assert_array_equal(dequantize(q, jnp.bfloat16).astype(jnp.float32), dequantize(q))
    # Whatever is representable comes back unchanged, which quantising twice shows.
    again = quantize_blocks(dequantize(q), scale="ue8m0")
    np.testing.assert_array_equal(dequantize(again), dequantize(q))


@pytest.mark.parametrize(("largest", "expected"), [(448.0, 1.0), (448.5, 2.0), (224.0, 0.5), (1.75, 2.0**-8)])
def test_ue8m0_at_powers_of_two(largest, expected):
    assert float(quantize_blocks(jnp.full((1, 1), largest), scale="ue8m0").scale[0, 0]) == expected


@scales
def test_an_outlier_costs_its_block_only(scale):
    w = jax.random.normal(jax.random.key(0), (256, 384))
    hit = w.at[130, 200].set(1e6)
    clean, dirty = (np.asarray(dequantize(quantize_blocks(a, scale=scale))) for a in (w, hit))
    outside = np.ones(w.shape, bool)
    outside[128:256, 128:256] = False
    np.testing.assert_array_equal(clean[outside], dirty[outside])
    assert np.abs(dirty - hit)[128:256, 128:256].max() > 0.5, "within the block small numbers vanish"
    rows = np.asarray(dequantize(quantize_rows(hit, scale=scale)))
    assert np.abs(rows - np.asarray(hit))[131].max() < 0.3, "a token's outlier leaves other tokens alone"


@scales
def test_zeros_nan_and_infinity(scale):
    w = jnp.ones((256, 256)).at[:128].set(0).at[200, 200].set(jnp.nan).at[201, 201].set(-jnp.inf)
    for q in (quantize_blocks(w, scale=scale), quantize_rows(w, scale=scale)):
        zero_blocks = np.asarray(q.scale)[: 128 // q.block[0]]
        assert (zero_blocks == 1).all()
        back = np.asarray(dequantize(q))
        np.testing.assert_array_equal(np.argwhere(np.isnan(back)), [[200, 200], [201, 201]])
        np.testing.assert_array_equal(np.nan_to_num(back, nan=1), np.where(jnp.isfinite(w), w, 1))


@scales
def test_tiny_numbers_are_not_lost(scale):
    """Scales stay normal numbers, which a compiler that flushes subnormals to zero would otherwise divide by."""
    q = quantize_blocks(jnp.full((1, 4), 1e-36), scale=scale)
    np.testing.assert_allclose(dequantize(q), 1e-36, rtol=1 / 16)
    assert float(q.scale.min()) >= np.finfo(np.float32).tiny


# Gradients.


@scales
@pytest.mark.parametrize("simulate", [quantize.simulate_blocks, quantize.simulate_rows])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_simulated_values_and_gradient(scale, simulate, dtype):
    x = jax.random.normal(jax.random.key(0), (130, 140), dtype)
    cotangent = jax.random.normal(jax.random.key(1), x.shape, dtype)
    quantise = quantize_blocks if simulate is quantize.simulate_blocks else quantize_rows
    out, pull = jax.vjp(functools.partial(simulate, scale=scale), x)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, dequantize(quantise(x, scale=scale), dtype))
    assert (np.asarray(out) != np.asarray(x)).any()
    np.testing.assert_array_equal(pull(cotangent)[0], cotangent)
    blocked = jax.grad(lambda x: simulate(x, scale=scale, straight_through=False).astype(jnp.float32).sum())(x)
    assert not np.asarray(blocked, np.float32).any()


# The layer.

D, F, E, K = 200, 144, 6, 2


@functools.cache
def layer(dtype=jnp.float32, tokens=24):
    keys = jax.random.split(jax.random.key(0), 4)
    weights = jax.nn.softmax(jax.random.normal(keys[0], (tokens, K)))
    # Indices of E and more have no expert; the first tokens have none at all.
    index = jax.random.randint(keys[1], (tokens, K), 0, E + 2).at[:3].set(E).astype(jnp.int32)
    p = jax.tree.map(lambda w: w.astype(dtype), params.init(keys[2], expert_specs(E, D, F)))
    return p, jax.random.normal(keys[3], (tokens, D), dtype), index, weights


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@scales
def test_experts_keep_their_layout_and_values(scale):
    p = layer()[0]
    q = quantized.quantize_experts(p, scale=scale)
    assert q.gate_up.values.shape == (E, 2, F, D)
    assert q.gate_up.scale.shape == (E, 2, 2, 2)
    assert q.down.values.shape == (E, D, F)
    back = quantized.dequantize_experts(q)
    for name in ("gate_up", "down"):
        assert 0.01 < relative(getattr(back, name), getattr(p, name)) < 0.04
    # Transposing commutes with square blocks.
    simulated = quantized.simulate_experts(p, scale=scale)
    np.testing.assert_array_equal(simulated.gate_up, back.gate_up)
    np.testing.assert_array_equal(simulated.down, back.down)
    assert params.nbytes(q) < 0.27 * params.nbytes(p)


def by_hand(q, x, index, weights, scale):
    """One token and one expert at a time, float64, rounding where the docstring says."""

    def rounded(v):
        return np.float64(dequantize(quantize_rows(jnp.asarray(v, jnp.float32)[None], scale=scale)))[0]

    gate_up, down = (np.float64(dequantize(part)) for part in (q.gate_up, q.down))
    out = np.zeros(x.shape)
    for t, k in np.ndindex(index.shape):
        if (e := int(index[t, k])) < E:
            v = rounded(x[t])
            gate, up = gate_up[e, 0] @ v, gate_up[e, 1] @ v
            out[t] += float(weights[t, k]) * down[e] @ rounded(gate / (1 + np.exp(-gate)) * up)
    return out


@scales
@pytest.mark.parametrize("implementation", [None, "fp8"])  # None is "simulated" here
def test_layer_is_what_it_says(scale, implementation):
    p, x, index, weights = layer()
    q = quantized.quantize_experts(p, scale=scale)
    got = jax.jit(lambda *args: quantized_experts(*args, implementation=implementation))(q, x, index, weights)
    # A hidden element within float32 rounding of the middle of two codes may go either way, an error of 1/16 of it:
    # far less than the 3 % that quantising makes altogether.
    assert relative(got, by_hand(q, x, index, weights, scale)) < 1e-3
    assert not np.asarray(got[:3]).any()
    assert 0.02 < relative(got, experts(p, x, index, weights)) < 0.08


@pytest.mark.slow
def test_layer_in_bfloat16():
    p, x, index, weights = layer(jnp.bfloat16)
    q = quantized.quantize_experts(p, scale="ue8m0")
    outs = [quantized_experts(q, x, index, weights, implementation=i) for i in quantized.IMPLEMENTATIONS]
    assert all(out.dtype == jnp.bfloat16 for out in outs)
    # With ue8m0 both multiply the very same numbers; hidden and output are rounded to bfloat16.
    assert relative(*outs) < 0.01


def test_weights_alone_in_fp8():
    p, x, index, weights = layer()
    full = quantized.dequantize_experts(quantized.quantize_experts(p), x.dtype)
    assert 0.01 < relative(experts(full, x, index, weights), experts(p, x, index, weights)) < 0.06


def test_layer_gradient_goes_straight_through():
    """The gradients of x and weights are those of the layer whose rounding is the identity plus a constant."""
    p, x, index, weights = layer()
    q = quantized.quantize_experts(p)
    full = quantized.dequantize_experts(q)
    grad = jax.random.normal(jax.random.key(9), x.shape)

    def ours(x, weights):
        return (quantized_experts(q, x, index, weights) * grad).sum()

    def plain(x, weights):
        """A loop over experts; every rounding adds a constant."""
        rounded = x + jax.lax.stop_gradient(quantize.simulate_rows(x) - x)
        total = jnp.zeros_like(x)
        for e in range(E):
            gate, up = rounded @ full.gate_up[e, 0], rounded @ full.gate_up[e, 1]
            hidden = jax.nn.silu(gate) * up
            hidden = hidden + jax.lax.stop_gradient(quantize.simulate_rows(hidden) - hidden)
            total += (weights * (index == e)).sum(1)[:, None] * (hidden @ full.down[e])
        return (total * grad).sum()

    both = jax.jit(lambda *args: [jax.grad(function, (0, 1))(*args) for function in (ours, plain)])(x, weights)
    for got, want in zip(*both, strict=True):
        assert relative(got, want) < 1e-3


def test_training_sees_the_rounding():
    p, x, index, weights = layer()
    grads = jax.grad(lambda p: experts(quantized.simulate_experts(p), x, index, weights).sum())(p)
    want = jax.grad(lambda p: experts(p, x, index, weights).sum())(quantized.simulate_experts(p))
    jax.tree.map(np.testing.assert_array_equal, grads, want)
    assert float(jnp.abs(grads.down).max()) > 0


def test_quantize_tree_takes_experts_only():
    p = layer()[0]
    tree = {"layers": [{"experts": p, "router": jnp.ones((D, E))}], "embed": jnp.ones((10, D)), "norm": jnp.ones(D)}
    out = quantized.quantize_tree(tree)
    assert isinstance(out["layers"][0]["experts"], QuantizedExpertParams)
    assert out["layers"][0]["router"] is tree["layers"][0]["router"]
    assert out["embed"] is tree["embed"]
    assert out["norm"] is tree["norm"]


@pytest.mark.parametrize("layers", [0, 3])
def test_specs_are_those_of_quantised_experts(layers):
    plain = params.stack(expert_specs(E, D, F), layers) if layers else expert_specs(E, D, F)
    specs = quantized.quantize_specs({"experts": plain}, scale="ue8m0")["experts"]
    quantised = jax.eval_shape(functools.partial(quantized.quantize_experts, scale="ue8m0"), params.abstract(plain))
    assert jax.tree.structure(params.abstract(specs)) == jax.tree.structure(quantised)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), params.abstract(specs), quantised)
    assert all(jax.tree.leaves(same))
    lead = ("layer",) if layers else ()
    assert specs.gate_up.values.axes == (*lead, "expert", None, "mlp", "embed")
    assert specs.down.values.axes == (*lead, "expert", "embed", "mlp")
    assert specs.down.scale.axes == (*lead, "expert", None, None)


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("model.layers.3.mlp.gate.weight", True),
        ("model.layers.3.mlp.gate.e_score_correction_bias", True),
        ("model.layers.3.mlp.router.classifier.weight", True),
        ("model.layers.3.input_layernorm.weight", True),
        ("model.layers.3.self_attn.q_norm.weight", True),
        ("model.norm.weight", True),
        ("model.embed_tokens.weight", True),
        ("lm_head.weight", True),
        ("layers/3/router", True),
        ("embed", True),
        ("model.layers.3.mlp.experts.17.gate_proj.weight", False),
        ("model.layers.3.mlp.experts.17.down_proj.weight", False),
        ("model.layers.3.self_attn.q_proj.weight", False),
        ("layers/3/experts/gate_up", False),
    ],
)
def test_names_that_stay(name, stays):
    assert quantize.stays_high_precision(name) is stays


# What cannot be.


def test_bad_input_is_named():
    p, x, index, weights = layer()
    q = quantized.quantize_experts(p)
    with pytest.raises(QuantizationError, match="scale 'e5m2'"):
        quantize_blocks(jnp.ones((2, 2)), scale="e5m2")
    with pytest.raises(QuantizationError, match=r"down of shape .* needs scales \(6, 2, 2\)"):
        quantized_experts(q.replace(down=q.down.replace(scale=q.down.scale[:, :1])), x, index, weights)
    with pytest.raises(QuantizationError, match="gate_up has values of float32"):
        quantized_experts(q.replace(gate_up=q.gate_up.replace(values=jnp.ones((E, 2, F, D)))), x, index, weights)
    with pytest.raises(QuantizationError, match="implementation 'int8'"):
        quantized_experts(q, x, index, weights, implementation="int8")
    with pytest.raises(ValueError, match="x of shape"):
        quantized_experts(q, x[:, :-1], index, weights)
    with pytest.raises(QuantizationError, match="lm_head of shape"):
        quantize.from_checkpoint(jnp.ones((130, 4), E4M3), jnp.ones((1, 1)), "lm_head")


def test_checkpoint_settings():
    for scale in SCALES:
        assert quantize.scale_format(quantize.quantization_config(scale=scale)) == scale
    # As in Qwen3-30B-A3B-FP8.
    assert (
        quantize.scale_format(
            {"activation_scheme": "dynamic", "quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
        )
        == "float32"
    )
    assert quantize.scale_format(quantize.quantization_config() | {"scale_fmt": "float"}) == "float32"
    wrong = {"quant_method": "gptq", "weight_block_size": [64, 64], "fmt": "e5m2", "expert_dtype": "fp4"}
    for key, value in wrong.items():
        with pytest.raises(QuantizationError, match=key):
            quantize.scale_format(quantize.quantization_config() | {key: value})
    with pytest.raises(QuantizationError, match="scale_fmt 'e5m3'"):
        quantize.scale_format(quantize.quantization_config() | {"scale_fmt": "e5m3"})


# The CUDA compiler.


@pytest.mark.skipif(aot_cuda.missing() is not None, reason=str(aot_cuda.missing()))
def test_layer_for_h100():
    """4,096 tokens of 8 experts of Qwen3-30B-A3B: both products on FP8 tensor cores, buffers as they must be."""
    tokens, top_k, e, d, f = 4096, 8, 128, 2048, 768
    q = jax.eval_shape(
        quantized.quantize_experts,
        ExpertParams(*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((e, 2, d, f), (e, f, d)))),
    )
    report = aot_cuda.compile_for_h100(
        quantized_experts,
        q,
        jax.ShapeDtypeStruct((tokens, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
        jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
    )
    products = [kernel for kernel in report.kernels if "grouped_matmul" in kernel.name]
    assert len(products) == 2
    assert all("f32.e4m3.e4m3" in kernel.ptx and kernel.spill_bytes in (0, None) for kernel in products)
    rows = tokens * top_k
    # At the peak: hidden rows in FP8 with their scales, and the output rows in bf16; weights are not dequantised.
    ideal = rows * f + rows * (f // 128) * 4 + rows * d * 2
    assert report.temporary_bytes < 1.3 * ideal


# Independent witnesses (extra `parity`).


@pytest.mark.slow
def test_rounding_against_torch():
    torch = pytest.importorskip("torch")
    x = awkward_numbers()
    want = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(np.asarray(jnp.asarray(x).astype(E4M3)).view(np.uint8), want)


@pytest.mark.slow
@scales
def test_blocks_against_transformers(scale):
    """What transformers writes into FP8 checkpoints, and reads from them."""
    torch = pytest.importorskip("torch")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")

    class Settings:
        weight_block_size = (128, 128)
        scale_fmt = "ue8m0" if scale == "ue8m0" else "float"

    class Quantizer:
        quantization_config = Settings()

    w = np.array(jax.random.normal(jax.random.key(0), (3, 256, 384)))
    theirs = fp8.Fp8Quantize(Quantizer()).convert({"mlp.experts.0.up_proj.weight": torch.from_numpy(w)})
    values = theirs["mlp.experts.0.up_proj.weight"]
    their_scale = theirs["mlp.experts.0.up_proj.weight_scale_inv"].to(torch.float32).numpy()
    ours = quantize_blocks(jnp.asarray(w), scale=scale)
    # They multiply by a reciprocal, we divide: a last bit of float32, which rarely moves a code.
    np.testing.assert_allclose(ours.scale, their_scale, rtol=3e-7 if scale == "float32" else 0)
    codes = np.asarray(ours.values).view(np.uint8) != values.view(torch.uint8).numpy()
    assert codes.mean() < (1e-4 if scale == "float32" else 1e-12)
    read = quantize.from_checkpoint(jnp.asarray(values.view(torch.uint8).numpy()).view(E4M3), jnp.asarray(their_scale))
    back = values.to(torch.float32).numpy() * np.repeat(np.repeat(their_scale, 128, -2), 128, -1)
    np.testing.assert_array_equal(dequantize(read), back)
    assert isinstance(read, Quantized)
