"""Attention by library kernels: interpreted, it is `attend`; compiled, it is there on TPU and CUDA and not on CPU."""

import functools
import importlib
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe import params
from moe.kernels import aot, aot_cuda
from moe.kernels import attention as kernels
from moe.kernels.platform import Partial
from moe.layers.rotary import RotaryConfig
from moe.models.transformer import TransformerConfig, apply, make_cache, transformer_specs
from moe.objectives import language_model_loss
from moe.sharding import DP, FSDP_TP_EP, make_mesh, use_mesh

layers = importlib.import_module("moe.layers.attention")
needs_tpu = pytest.mark.skipif(aot.missing() is not None, reason=f"{aot.missing()}")
needs_cuda = pytest.mark.skipif(aot_cuda.missing() is not None, reason=f"{aot_cuda.missing()}")

IMPLEMENTATIONS = {
    "tpu": (kernels._splash_forward, kernels._splash_backward),
    "cuda": (kernels._triton_forward, kernels._triton_backward),
}
PACKED = dict(packed=True, padded=True)
CASES = {  # rows, tokens, H, G, K, V
    "tpu-window": ("tpu", (2, 150, 4, 2, 32, 24), dict(window=40, **PACKED)),
    "tpu-one-key-head": ("tpu", (1, 128, 4, 1, 16, 16), {}),
    "tpu-blocks": ("tpu", (2, 700, 4, 2, 32, 32), PACKED),  # two of 384
    "tpu-window-blocks": ("tpu", (1, 1024, 2, 2, 32, 32), dict(window=100)),
    "tpu-padded": ("tpu", (2, 200, 4, 4, 32, 32), dict(padded=True)),
    "cuda": ("cuda", (2, 150, 4, 2, 48, 48), PACKED),
    "cuda-plain": ("cuda", (1, 640, 2, 2, 64, 64), {}),
}
QUICK = ("tpu-window", "cuda")


def inputs(shape, *, window=None, packed=False, padded=False):
    """(q, k, v), cotangent, Where, default, which tokens are real."""
    batch, length, heads, groups, size, width = shape
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(batch, length, *two)) for two in ((heads, size), (groups, size), (groups, width))]
    q, k, v = (jnp.asarray(x, jnp.float32) for x in rows)
    segments, positions = np.zeros((batch, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    if packed:
        for row in range(batch):
            cut = length // 3 + row
            segments[row, cut:] = 1
            positions[row, cut:] = np.arange(length - cut)
    real = np.ones((batch, length), bool)
    if padded:
        real[0, -17:] = real[-1, :9] = False  # behind and before
    places = jnp.asarray(positions)
    where = kernels.Where(
        places, jnp.where(real, places, -1) if padded else places, jnp.asarray(segments) if packed else None
    )
    grad = jnp.asarray(np.where(real[..., None, None], rng.normal(size=(batch, length, heads, width)), 0), jnp.float32)
    return (q, k, v), grad, where, Partial(layers._by_position, scale=size**-0.5, window=window), real


def interpreted(implementation, how, qkv, where, grad):
    """Output and gradients of q, k, v."""
    forward, backward = (Partial(f, interpret=True) for f in IMPLEMENTATIONS[implementation])
    out, total = kernels._sharded(*qkv, where, local=forward, how=how, name="forward")
    return out, *kernels._sharded(*qkv, where, out, total, grad, local=backward, how=how, name="backward")


def check(found, expected, real):
    for a, b in zip((jnp.where(real[..., None, None], found[0], 0), *found[1:]), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def reference(default, qkv, where, grad, real):
    out, pull = jax.vjp(lambda *a: default(*a, where), *qkv)
    return jnp.where(real[..., None, None], out, 0), *pull(grad)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_interpreted_kernels_are_attend(name):
    """In value and gradient; padded queries aside, which mean nothing."""
    implementation, shape, options = CASES[name]
    qkv, grad, where, default, real = inputs(shape, **options)
    masked = where.segments is not None or where.key_positions is not where.positions
    how = kernels.plan(*qkv, default=default, scale=shape[4] ** -0.5, window=options.get("window"), masked=masked)
    assert how is not None
    check(interpreted(implementation, how, qkv, where, grad), reference(default, qkv, where, grad, real), real)


def test_split_over_a_mesh_it_is_attend():
    """Rows over one axis, heads over another, and the one key head repeated for them."""
    shape = (2, 128, 4, 1, 16, 16)
    qkv, grad, where, default, real = inputs(shape, **PACKED)
    mesh = make_mesh({"data": 2, "tensor": 2}, devices=jax.devices()[:4])
    with use_mesh(mesh, FSDP_TP_EP):
        how = kernels.plan(*qkv, default=default, scale=0.25, window=None, masked=True)
        assert how
        assert (how.batch, how.heads, how.repeat) == (("data",), ("tensor",), 2)
        found = jax.jit(functools.partial(interpreted, "tpu", how))(qkv, where, grad)
    check(found, reference(default, qkv, where, grad, real), real)


def test_where_no_kernel_is_taken():
    def planned(shape=(4, 256, 4, 2, 32, 32), dtype=jnp.float32):
        batch, length, heads, groups, size, width = shape
        qkv = [jnp.zeros((batch, length, *two), dtype) for two in ((heads, size), (groups, size), (groups, width))]
        return kernels.plan(*qkv, default=layers._by_position, scale=1.0, window=None, masked=False)

    assert planned()
    assert planned((4, 127, 4, 2, 32, 32)) is None
    assert planned(dtype=jnp.float16) is None
    mesh = make_mesh({"data": 2, "tensor": 4})
    with jax.set_mesh(mesh):
        assert planned() is None  # nobody says what to split over what
    with use_mesh(mesh, FSDP_TP_EP):
        assert planned((4, 256, 12, 3, 32, 32)) is None
        assert planned()
    with use_mesh(mesh, FSDP_TP_EP.replace(activations={"seq": ("tensor",), "heads": (), "kv_heads": ()})):
        assert planned() is None

    def inside(x):
        return x * (1 if planned() is None else jnp.nan)

    with use_mesh(mesh, FSDP_TP_EP):
        manual = jax.jit(jax.shard_map(inside, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}))
        assert np.isfinite(manual(jnp.ones(2))).all()


@pytest.mark.parametrize(("length", "size"), [(128, 128), (200, 256), (512, 512), (640, 384), (1024, 512), (4096, 512)])
def test_block_size(length, size):
    assert kernels.block_size(length) == size


def loss(qkv, where, default):
    return (kernels.attend_by_index(*qkv, where, default=default, scale=16**-0.5) ** 2).sum()


def test_on_cpu_it_is_attend_and_traces_no_kernel(monkeypatch):
    """Bit for bit, the gradient too. The same program for TPU does trace them."""
    traced = []
    kernel = kernels._kernel
    monkeypatch.setattr(kernels, "_kernel", lambda *a, name, **k: traced.append(name) or kernel(*a, name=name, **k))
    qkv, _, where, default, _ = inputs((2, 130, 4, 2, 16, 16), **PACKED)
    found = jax.jit(jax.value_and_grad(loss), static_argnums=2).trace(qkv, where, default)
    expected = jax.jit(jax.value_and_grad(lambda qkv: (default(*qkv, where) ** 2).sum()))(qkv)
    jax.tree.map(np.testing.assert_array_equal, found.lower().compile()(qkv, where), expected)
    assert "pallas" not in str(found.jaxpr)
    assert not traced
    assert found.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3
    assert traced == ["forward", "backward"]
    batched = jax.jit(jax.vmap(lambda q: default(q, *qkv[1:], where) + 0 * loss((q, *qkv[1:]), where, default)))
    text = batched.trace(jnp.stack([qkv[0]] * 2)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1


def test_the_promise_reaches_attention(monkeypatch):
    """Default positions keep it, the loss gives it for packed rows; other positions and a cache do not use kernels."""
    calls = []
    real = layers.attend_by_index
    monkeypatch.setattr(layers, "attend_by_index", lambda *a, **k: calls.append(a[3]) or real(*a, **k))
    attention = layers.GQAConfig(2, 1, 8, RotaryConfig(dim=8))
    cfg = TransformerConfig(
        family="llama", vocab=16, width=16, layers=("dense",), attention=attention, hidden=16
    )  # fmt: skip
    weights = jax.eval_shape(lambda: params.init(jax.random.key(0), transformer_specs(cfg)))
    tokens = jnp.zeros((2, 6), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), tokens) | {"mask": tokens == 0}
    batch |= {"source": tokens[:, 0]}

    def used(function, *args):
        calls.clear()
        jax.eval_shape(function, weights, *args)
        return len(calls)

    call = functools.partial(apply, cfg=cfg)
    assert used(call, tokens)
    assert calls[0].key_positions is calls[0].positions
    assert used(lambda w, t: call(w, t, valid=t == 0), tokens)
    assert calls[0].key_positions is not calls[0].positions
    assert not used(lambda w, t: call(w, t, positions=t), tokens)
    assert used(lambda w, t: call(w, t, positions=t, segments=t, consecutive=True), tokens)
    assert not used(lambda w, t: call(w, t, cache=make_cache(w, cfg, batch=2, length=8)), tokens)
    assert used(functools.partial(language_model_loss, cfg=cfg), batch)


# --------------------------------------------------------------------------------------------------
# Compiled for devices that are not there


def step(q, k, v, grad, positions, key_positions, segments=None, *, window=None):
    where = kernels.Where(positions, key_positions, segments)
    scale = q.shape[-1] ** -0.5
    default = Partial(layers._by_position, scale=scale, window=window)

    def call(q, k, v):
        return kernels.attend_by_index(q, k, v, where, default=default, scale=scale, window=window)

    out, pull = jax.vjp(call, q, k, v)
    return out, pull(grad)


def arguments(array, rows=4, length=512, heads=8, groups=4, size=64, dtype=jnp.bfloat16):
    """`array(shape, dtype)` of every argument of `step`, in order."""
    q, k = ((rows, length, h, size) for h in (heads, groups))
    return [*(array(s, dtype) for s in (q, k, k, q)), *[array((rows, length), jnp.int32)] * 3]


@needs_tpu
@pytest.mark.aot_tpu
@pytest.mark.parametrize(
    "options",
    [
        dict(length=1000, window=300, size=80),
        pytest.param(dict(length=4096, size=128, heads=32, groups=8), marks=pytest.mark.slow),
        pytest.param(dict(length=4096, size=128, dtype=jnp.float32), marks=pytest.mark.slow),
        pytest.param(dict(length=200, size=32, groups=1), marks=pytest.mark.slow),
    ],
)
def test_compiled_for_one_tpu(options):
    """Three kernels, and no room for scores in float32."""
    mesh = aot.topology_mesh("v5e")
    sizes = {name: value for name, value in options.items() if name != "window"}
    args = arguments(functools.partial(aot.abstract, mesh), **sizes)
    report = aot.compile_report(functools.partial(step, window=options.get("window")), mesh, *args)
    assert sorted(name.split("_")[2] for name in report.kernels) == ["dkv", "dq", "fwd"]
    rows, length, heads, _ = args[0].shape
    assert report.temporary_bytes < 4 * rows * heads * length * length


@needs_tpu
@pytest.mark.aot_tpu
@pytest.mark.parametrize("groups", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_compiled_for_four_tpus(groups):
    """Rows and heads split: no exchange at all, but for the gradient of a key head that is not split."""
    mesh = aot.topology_mesh("v5e", {"data": 2, "tensor": 2})

    def array(shape, dtype):
        heads = "tensor" if len(shape) == 4 and shape[2] > 1 else None
        return aot.abstract(mesh, shape, dtype, P("data", None, heads) if len(shape) == 4 else P("data"))

    with use_mesh(mesh, FSDP_TP_EP):
        report = aot.compile_report(step, mesh, *arguments(array, groups=groups))
    assert len(report.kernels) == 3
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf" ({kinds})(?:-start)?\(", report.text)
    assert found == ([] if groups > 1 else ["all-reduce"])
    shapes = re.findall(r'= \((.*?)\) custom-call\(.*?custom_call_target="tpu_custom_call"', report.text)
    assert any("2,4,512,64" in shape for shape in shapes)  # half of the rows, half of the heads


@needs_tpu
@pytest.mark.aot_tpu
def test_a_program_over_several_devices_without_rules_has_no_kernel():
    """Pallas would refuse it."""
    mesh = aot.topology_mesh("v5e", {"data": 4})
    args = arguments(lambda shape, dtype: aot.abstract(mesh, shape, dtype, P("data")))
    assert "tpu_custom_call" not in jax.jit(step).lower(*args).as_text()
    with use_mesh(mesh, DP):
        assert "tpu_custom_call" in jax.jit(step).lower(*args).as_text()


@needs_cuda
@pytest.mark.parametrize("size", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_compiled_for_h100(size):
    """Three kernels of which none spills; less memory than the scores. A window, or float32, is left to XLA."""
    args = arguments(jax.ShapeDtypeStruct, size=size)
    report = aot_cuda.compile_for_h100(step, *args)
    found = {kernel.name: kernel.spill_bytes for kernel in report.kernels if "mha" in kernel.name}
    assert sorted(found) == ["mha_backward", "mha_forward", "mha_preprocess_backward"]
    assert set(found.values()) <= {0, None}
    assert report.temporary_bytes < 4 * args[0].shape[0] * 8 * 512 * 512
    for other, options in ((functools.partial(step, window=100), {}), (step, {"dtype": jnp.float32})):
        args = arguments(jax.ShapeDtypeStruct, size=size, **options)
        traced = jax.jit(other).trace(*args)
        assert "triton" not in traced.lower(lowering_platforms=("cuda",)).as_text()
