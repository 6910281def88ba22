"""FP8 checkpoints, written by hand in numpy in Hugging Face's names, against the same weights dequantised in numpy."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType

from moe import quantize
from moe.experts import ExpertParams, QuantizedExpertParams, expert_layer
from moe.experts.quantized import dequantize_experts, quantize_tree
from moe.models import hf
from moe.models.decode import Engine, EngineConfig
from moe.models.hf import HFError
from moe.models.sampling import Sampling
from moe.models.tensor_files import TensorFiles
from moe.models.transformer import apply, forward, logits
from moe.quantize import QuantizationError
from moe.sharding import FSDP, FSDP_EP, FSDP_TP_EP, make_mesh, use_mesh
from tests.moe.golden import decoders

# Widths of 160 and 144: the last block of each is cut.
CONFIG = decoders.CONFIGS["qwen3_moe"] | dict(
    vocab_size=64, hidden_size=160, intermediate_size=144, moe_intermediate_size=144, num_experts=4,
    num_experts_per_tok=2, mlp_only_layers=[0],
)  # fmt: skip
NAME = "model.layers.2.mlp.experts.3.up_proj.weight"
SCALES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "ue8m0": ml_dtypes.float8_e8m0fnu}


def quantised(w, kind):
    """(e4m3 [out, in], a scale for each 128 x 128 block), a block at a time."""
    values = np.zeros(w.shape, ml_dtypes.float8_e4m3fn)
    scale = np.zeros([-(-n // 128) for n in w.shape], SCALES[kind])
    for i, j in np.ndindex(scale.shape):
        block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
        exact = np.abs(w[block]).max() / 448
        scale[i, j] = 2.0 ** np.ceil(np.log2(exact)) if kind == "ue8m0" else exact * 1.01
        values[block] = (w[block] / np.float32(scale[i, j])).astype(ml_dtypes.float8_e4m3fn)
    return values, scale


def dequantised(values, scale):
    out = values.astype(np.float32)
    for i, j in np.ndindex(out.shape):
        out[i, j] *= np.float32(scale[i // 128, j // 128])
    return out


@functools.cache
def checkpoint(kind):
    """(config, tensors in FP8, the same in float32): all projections are in FP8, as in Qwen3-30B-A3B-FP8."""
    cfg = hf.config_from_hf(CONFIG)
    packed, plain = {}, {}
    for name, array in hf.tensors_of(decoders.weights(cfg), cfg):
        w = np.ascontiguousarray(array)
        packed[name] = plain[name] = w
        if name.endswith("_proj.weight"):
            packed[name], packed[f"{name}_scale_inv"] = quantised(w, kind)
            plain[name] = dequantised(packed[name], packed[f"{name}_scale_inv"])
    settings = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128])
    settings |= {"scale_fmt": "ue8m0"} if kind == "ue8m0" else {}
    return CONFIG | {"quantization_config": settings}, packed, plain


def write(folder, config, tensors):
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config, packed, _ = checkpoint("float32")
    return write(tmp_path_factory.mktemp("fp8") / "model", config, packed)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def experts_of(loaded):
    return [run.mlp.experts for run in loaded.runs if hasattr(run.mlp, "experts")]


def weights_only(params, x, index, weights, *, activation):
    return expert_layer(dequantize_experts(params, x.dtype), x, index, weights, activation=activation)


@pytest.mark.parametrize("kind", [*SCALES][:1] + [pytest.param(k, marks=pytest.mark.slow) for k in [*SCALES][1:]])
def test_parameters_are_those_of_the_dequantised_checkpoint(kind, tmp_path):
    config, packed, plain = checkpoint(kind)
    loaded, cfg = hf.load(write(tmp_path / "fp8", config, packed))
    want, want_cfg = hf.from_tensors(CONFIG, plain)
    assert cfg == want_cfg
    (ours,), (theirs,) = experts_of(loaded), experts_of(want)
    assert isinstance(ours, QuantizedExpertParams)
    assert ours.scale == ("ue8m0" if kind == "ue8m0" else "float32")
    assert ours.gate_up.values.dtype == ours.down.values.dtype == quantize.E4M3
    equal(dequantize_experts(ours), theirs)
    equal(hf.load(tmp_path / "fp8", fp8=False)[0], want)  # and all else


@pytest.mark.parametrize("kind", ["float32", pytest.param("ue8m0", marks=pytest.mark.slow)])
def test_logits_are_those_of_the_dequantised_checkpoint(kind):
    config, packed, plain = checkpoint(kind)
    (loaded, cfg), (want, _) = hf.from_tensors(config, packed), hf.from_tensors(CONFIG, plain)
    tokens = jnp.asarray(decoders.tokens())

    @functools.partial(jax.jit, static_argnames="experts")
    def run(p, replay=None, experts=None):
        out = apply(p, tokens, cfg=cfg, replay=replay, experts=experts)
        return logits(p, out.hidden), out.routing

    expected, routing = run(want)
    np.testing.assert_allclose(run(loaded, experts=weights_only)[0], expected, atol=1e-4)
    # Activations in e4m3 too: 0.041 and 0.047 of the norm, along the same routing (near ties would choose otherwise).
    assert 0.01 < relative(run(loaded, routing)[0], expected) < 0.06


def test_compute_dtype(folder):
    loaded, _ = hf.load(folder, dtype="bfloat16")
    assert experts_of(loaded)[0].gate_up.values.dtype == quantize.E4M3
    assert experts_of(loaded)[0].gate_up.scale.dtype == jnp.float32
    assert loaded.runs[1].attention.query.dtype == loaded.embed.dtype == jnp.bfloat16
    config, packed, _ = checkpoint("float32")
    half = dict(packed)
    for name, array in packed.items():
        if array.dtype == np.float32 and "scale" not in name:
            half[name] = array.astype(ml_dtypes.bfloat16)
    by_default, _ = hf.from_tensors(config, half)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(by_default)} == {"bfloat16", "float32", "float8_e4m3fn"}
    assert by_default.runs[1].attention.query.dtype == jnp.bfloat16  # not the float32 in which it is dequantised


def test_saved_experts_come_back_under_the_same_keys(folder, tmp_path):
    loaded, cfg = hf.load(folder)
    base = hf.read_config(folder)
    hf.save(tmp_path / "again", loaded, cfg, base=base, dtype="bfloat16")
    files, original = TensorFiles(tmp_path / "again"), TensorFiles(folder)
    experts = [name for name in original if ".experts." in name]
    assert len(experts) == 2 * 4 * 3 * 2
    for name in experts:
        assert files[name].dtype == original[name].dtype
        np.testing.assert_array_equal(files[name], original[name])
    assert not [name for name in files if name.endswith("_scale_inv") and ".experts." not in name]
    assert files["model.layers.0.self_attn.q_proj.weight"].dtype == ml_dtypes.bfloat16
    settings = hf.read_config(tmp_path / "again")["quantization_config"]
    assert base["quantization_config"].items() <= settings.items()
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.0.mlp.up_proj"} < {*settings["modules_to_not_convert"]}
    again, _ = hf.load(tmp_path / "again")
    equal(experts_of(again), experts_of(loaded))
    # What is no longer in FP8 does not say that it is.
    hf.save(tmp_path / "plain", hf.load(folder, fp8=False)[0], cfg, base=base)
    assert "quantization_config" not in hf.read_config(tmp_path / "plain")
    assert isinstance(experts_of(hf.load(tmp_path / "plain")[0])[0], ExpertParams)


def test_a_quantised_model_is_saved_and_loaded(tmp_path):
    cfg = hf.config_from_hf(CONFIG)
    ours = quantize_tree(decoders.weights(cfg), scale="ue8m0")
    hf.save(tmp_path / "model", ours, cfg, shard_bytes=100_000)
    equal(hf.load(tmp_path / "model")[0], ours)


@pytest.mark.slow
def test_decoding_follows_the_forward(folder):
    loaded, cfg = hf.load(folder)
    engine = Engine(loaded, cfg, EngineConfig(sequences=2, length=32, page_size=8, unstack=False))
    prompts = [row[:7].tolist() for row in decoders.tokens()]
    completions = engine.generate(prompts, Sampling(max_tokens=6, temperature=0))
    whole = np.array([prompt + list(done.tokens) for prompt, done in zip(prompts, completions, strict=True)])
    assert whole.shape == (2, 13)
    best = jax.jit(functools.partial(forward, cfg=cfg))(loaded, jnp.asarray(whole)).argmax(-1)
    np.testing.assert_array_equal(whole[:, 7:], best[:, 6:-1])


CASES = {
    "all_to_all": (FSDP_EP, {"fsdp": 2, "expert": 4}, AxisType.Auto),
    "fsdp": (FSDP, {"fsdp": 8}, AxisType.Auto),
    "tensor": (FSDP_TP_EP, {"fsdp": 2, "expert": 2, "tensor": 2}, AxisType.Explicit),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["all_to_all", "tensor", "fsdp"])
def test_a_mesh_changes_nothing(folder, case):
    rules, sizes, axis_types = CASES[case]
    mesh = make_mesh(sizes, axis_types=axis_types)
    here, there = (experts_of(hf.load(folder, **where)[0])[0] for where in ({}, dict(mesh=mesh, rules=rules)))
    assert there.gate_up.values.addressable_shards[0].data.size == here.gate_up.values.size // 8
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (8, 6, 160))
    index = jax.random.randint(keys[1], (8, 6, 2), 0, 5)  # 4: no expert
    weights = jax.random.uniform(keys[2], index.shape)

    def layer(experts, x, weights):
        one = jax.tree.map(lambda leaf: leaf[0], experts)
        method = case if case == "all_to_all" else None
        return (expert_layer(one, x, index, weights, method=method, safety_factor=0.6) ** 2).sum()

    both = jax.value_and_grad(layer, (1, 2))
    wanted = jax.jit(both)(here, x, weights)
    with use_mesh(mesh, rules):
        found = jax.jit(both)(there, x, weights)
    # Sums in another order send an element in a thousand to the other of two neighbouring e4m3 numbers.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative(a, b) < 1e-3


# ---- what can be wrong


def test_what_is_missing_or_wrong_is_named():
    config, packed, _ = checkpoint("float32")

    def loaded(settings=(), fp8=True, **changes):
        tensors = {name: array for name, array in (packed | changes).items() if array is not None}
        described = dict(config, quantization_config=dict(config["quantization_config"], **dict(settings)))
        return hf.from_tensors(described, tensors, fp8=fp8)

    scale = f"{NAME}_scale_inv"
    with pytest.raises(HFError, match=rf"no tensor '{scale}'"):
        loaded(**{scale: None})
    with pytest.raises(HFError, match=rf"without {scale}"):
        loaded(fp8=False, **{scale: None})
    with pytest.raises(HFError, match=rf"'{scale}' has shape \(1, 2\), the config asks for \(2, 2\)"):
        loaded(**{scale: packed[scale][:1]})
    with pytest.raises(HFError, match=rf"'{NAME}' has shape \(144, 159\)"):
        loaded(**{NAME: packed[NAME][:, 1:]})
    with pytest.raises(HFError, match=rf"'{NAME}' is float32, not float8_e4m3fn; load with fp8=False"):
        loaded(**{NAME: packed[NAME].astype(np.float32)})
    other = "model.layers.0.mlp.up_proj.weight_scale_inv"  # of a weight that is dequantised
    with pytest.raises(HFError, match=f"without {other}"):
        loaded(**{other: None})
    with pytest.raises(QuantizationError, match=r"weight_block_size \[64, 64\]"):
        loaded({"weight_block_size": [64, 64]})
    with pytest.raises(QuantizationError, match="quant_method 'awq'"):
        loaded({"quant_method": "awq"})
    with pytest.raises(QuantizationError, match="scale_fmt 'e5m3'"):
        loaded({"scale_fmt": "e5m3"})


# ---- an independent witness (extra `parity`)


@pytest.mark.slow
@pytest.mark.parametrize("scale", quantize.SCALES)
def test_transformers_reads_what_we_write(scale, tmp_path, monkeypatch):
    """Without a GPU it dequantises. Whole blocks: cut ones it spreads evenly (5.24, 160 rows in two blocks of 80)."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cfg = hf.config_from_hf(CONFIG | dict(hidden_size=256, moe_intermediate_size=128))
    ours, tokens = quantize_tree(decoders.weights(cfg), scale=scale), decoders.tokens()
    hf.save(tmp_path / "model", ours, cfg)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    with torch.no_grad():
        found = theirs.eval()(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    expected = logits(ours, apply(ours, jnp.asarray(tokens), cfg=cfg, experts=weights_only).hidden)
    np.testing.assert_allclose(found, expected, atol=1e-4)
