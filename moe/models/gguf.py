"""GGUF files in: one memory-mapped file with weights, config and tokenizer, as llama.cpp writes it.

    params, cfg, tokenizer = load("SmolLM2-135M-Instruct.Q4_1.gguf")

`read_gguf` gives what a Hugging Face directory would: a config.json as a dict, tensors under their Hugging Face names
and a tokenizer. Tensors are read and dequantised when they are asked for. Architectures: llama (Llama, SmolLM2, Mistral
without sliding window), qwen3, qwen3moe.

Dequantisation is the package `gguf`'s (llama.cpp's own, vectorised; extra `gguf`). The header is read here: its
GGUFReader takes 1.8 s for the 49,152 tokens of SmolLM2 where this takes 0.07 s, and meets damaged files with an
IndexError.
Layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import functools
import math
import os
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Shaped, UInt8

from moe.models.hf import from_tensors
from moe.models.tokenizer import Tokenizer, from_gguf_metadata
from moe.models.transformer import TransformerConfig, TransformerParams
from moe.sharding import AxisRules

try:
    import gguf
except ImportError as error:
    raise ImportError("reading GGUF files needs the package gguf: pip install 'earthmoe[gguf]'") from error

PathLike = str | os.PathLike[str]


class GGUFError(ValueError):
    """A file that is not GGUF, is damaged, or contradicts itself; base of the other two."""


class TruncatedGGUFError(GGUFError):
    """The file ends before what its header announces."""


class UnsupportedGGUFError(GGUFError):
    """A sound file that holds something this reader does not know: version, architecture, tensor type."""


_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where general.alignment does not say otherwise
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4  # of arrays in arrays; no file is known to nest them at all
_PLAIN = {
    gguf.GGMLQuantizationType.F32: np.dtype("<f4"),
    gguf.GGMLQuantizationType.F16: np.dtype("<f2"),
    gguf.GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# Blocks that go through gguf's dequantisation at a time are sixteen rows of this many: 0.37 s for SmolLM2 instead of
# 0.62 s with the file's own rows (18 blocks each).
_BLOCKS_PER_ROW = 256


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file.

    Attributes:
        name: llama.cpp's name.
        shape: in numpy's order, slowest axis first (GGUF writes it the other way round).
        type: how the values are stored.
        offset: of the first byte, from the start of the file.
        nbytes: length in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    nbytes: int


class _Cursor:
    """Reads the header front to back; never past the end."""

    def __init__(self, path: pathlib.Path, data: np.ndarray):
        self.path = path
        self.data = memoryview(data)  # type: ignore[arg-type]
        self.position = 0

    def take(self, count: int, what: str) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise TruncatedGGUFError(
                f"{self.path}: {what} at byte {self.position} needs {count} bytes, the file ends at byte "
                f"{len(self.data)}; it is cut short or damaged, fetch it again"
            )
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def unpack(self, layout: str, what: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def string(self, what: str) -> str:
        start = self.position
        raw = self.take(self.unpack("<Q", what), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise GGUFError(f"{self.path}: {what} at byte {start} is not UTF-8 ({error.reason}); damaged") from error

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """A scalar as int, float or bool; a string; an array as numpy array or list (of strings, of arrays)."""
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY or depth > _MAX_DEPTH:
            raise UnsupportedGGUFError(f"{self.path}: {what} before byte {self.position} has the unknown type {kind}")
        inner, count = self.unpack("<I", what), self.unpack("<Q", what)
        if inner in _SCALARS:
            dtype = np.dtype(_SCALARS[inner])
            return np.frombuffer(self.take(dtype.itemsize * count, what), dtype)
        # A string or an array takes eight bytes at least: a damaged count is found before the loop.
        if count * 8 > len(self.data) - self.position:
            self.take(count * 8, f"{what} with {count} entries")
        return [self.value(inner, what, depth + 1) for _ in range(count)]


def read_header(path: PathLike) -> tuple[dict[str, Any], dict[str, TensorInfo], UInt8[np.ndarray, " bytes"]]:
    """(metadata, tensors by llama.cpp's names, the mapped file) of a GGUF file of version 2 or 3.

    Every tensor is checked to lie within the file, so that reading it cannot fail later.

    Raises:
        FileNotFoundError: no such file.
        TruncatedGGUFError, UnsupportedGGUFError, GGUFError: what is wrong, at which byte.
    """
    path = pathlib.Path(path)
    if path.stat().st_size < 4:
        raise TruncatedGGUFError(f"{path} has {path.stat().st_size} bytes; it is no GGUF file, fetch it again")
    data = np.memmap(path, np.uint8, mode="r")
    cursor = _Cursor(path, data)
    magic = bytes(cursor.take(4, "magic"))
    if magic != _MAGIC:
        raise GGUFError(
            f"{path} starts with {magic!r}, not {_MAGIC!r}; it is no GGUF file (moe.models.hf reads safetensors)"
        )
    version = cursor.unpack("<I", "version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        remedy = "big-endian: run gguf-convert-endian" if swapped else "convert the model again with today's llama.cpp"
        raise UnsupportedGGUFError(f"{path} has GGUF version {version}, not 2 or 3; {remedy}")
    tensor_count, key_count = cursor.unpack("<Q", "tensor count"), cursor.unpack("<Q", "key count")

    metadata: dict[str, Any] = {}
    for number in range(key_count):
        start = cursor.position
        key = cursor.string(f"key {number} of {key_count}")
        if key in metadata:
            raise GGUFError(f"{path}: key {key!r} at byte {start} is there twice; it is damaged, fetch it again")
        metadata[key] = cursor.value(cursor.unpack("<I", f"type of {key!r}"), f"value of {key!r}")

    entries = [_read_entry(cursor, f"tensor {number} of {tensor_count}") for number in range(tensor_count)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise GGUFError(f"{path}: general.alignment is {alignment!r}, not a multiple of 8; fetch it again")
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise GGUFError(f"{path}: tensor {name!r} is there twice; it is damaged, fetch it again")
        tensors[name] = info = _placed(path, name, shape, kind, offset, start)
        if offset % alignment:
            raise GGUFError(f"{path}: tensor {name!r} at offset {offset} is not aligned to {alignment} bytes")
        if info.offset + info.nbytes > len(data):
            raise TruncatedGGUFError(
                f"{path}: tensor {name!r} lies in bytes {info.offset} to {info.offset + info.nbytes}, the file ends at "
                f"byte {len(data)}; it is cut short, fetch it again"
            )
    return metadata, tensors, data


def _read_entry(cursor: _Cursor, what: str) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type, offset from the start of the data) as the file gives them."""
    name = cursor.string(f"name of {what}")
    what = f"tensor {name!r}"
    dimensions = cursor.unpack("<I", f"number of dimensions of {what}")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise GGUFError(f"{cursor.path}: {what} has {dimensions} dimensions, not 1 to {_MAX_DIMENSIONS}; damaged")
    shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions, f"shape of {what}"))
    return name, shape[::-1], cursor.unpack("<I", f"type of {what}"), cursor.unpack("<Q", f"offset of {what}")


def _placed(path: pathlib.Path, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> TensorInfo:
    try:
        kind = gguf.GGMLQuantizationType(kind)
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise UnsupportedGGUFError(
            f"{path}: tensor {name!r} has the type number {kind}, unknown to the installed package gguf; update it"
        ) from error
    if min(shape) < 1 or shape[-1] % block:
        raise GGUFError(f"{path}: tensor {name!r} of shape {shape} does not hold whole {kind.name} blocks of {block}")
    return TensorInfo(name, shape, kind, start + offset, math.prod(shape) // block * nbytes)


def dequantise(
    raw: UInt8[np.ndarray, " bytes"], kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]
) -> Shaped[np.ndarray, "..."]:
    """The values in `raw`: float32 of quantised blocks, a view of float32, float16 or bfloat16 stored as such.

    Raises:
        UnsupportedGGUFError: a type that the package gguf cannot dequantise, such as integers.
    """
    if kind in _PLAIN:
        return raw.view(_PLAIN[kind]).reshape(shape)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = raw.size // nbytes
    row = max(math.gcd(blocks, _BLOCKS_PER_ROW), shape[-1] // block)
    try:
        return gguf.dequantize(raw.reshape(blocks // row, row * nbytes), kind).reshape(shape)
    except NotImplementedError as error:
        raise UnsupportedGGUFError(f"tensor type {kind.name} cannot be dequantised: {error}") from error


# --- llama.cpp's names and Hugging Face's -----------------------------------------------------------------------------

# architecture -> (model_type, class)
_MODELS = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "feed_forward_length": "intermediate_size",
}
_EXPERT_FIELDS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a Hugging Face tensor comes from: a whole tensor of the file, or one expert's part of it.

    Attributes:
        heads: number of heads whose rows llama.cpp has permuted, or None.
    """

    info: TensorInfo
    expert: int | None = None
    heads: int | None = None


class GGUFTensors(Mapping[str, np.ndarray]):
    """Tensors by their Hugging Face names; read, dequantised and put into Hugging Face's order when asked for.

    The last one is kept: a mesh asks for the same tensor once for each device.
    """

    def __init__(self, data: UInt8[np.ndarray, " bytes"], sources: Mapping[str, _Source]):
        self._data = data
        self._sources = sources
        self._last: tuple[str, np.ndarray] | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        if self._last is None or self._last[0] != name:
            values = self._read(self._sources[name])
            values.flags.writeable = False
            self._last = (name, values)
        return self._last[1]

    def _read(self, source: _Source) -> np.ndarray:
        info = source.info
        start, nbytes, shape = info.offset, info.nbytes, info.shape
        if source.expert is not None:
            nbytes //= shape[0]
            start += source.expert * nbytes
            shape = shape[1:]
        values = dequantise(self._data[start : start + nbytes], info.type, shape)
        if source.heads is not None:
            # llama.cpp keeps the two numbers that RoPE turns together side by side, Hugging Face half a head apart.
            pairs = values.reshape(source.heads, -1, 2, *shape[1:])
            values = pairs.swapaxes(1, 2).reshape(shape)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFModel:
    """What `read_gguf` finds.

    Attributes:
        config: as in the model's config.json.
        tensors: Hugging Face name -> array, read on access.
        metadata: the file's own keys.
    """

    config: dict[str, Any]
    tensors: GGUFTensors
    metadata: dict[str, Any]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Built on first use; a TokenizerError says why it cannot be, without keeping the weights from being read."""
        return from_gguf_metadata(self.metadata)


def read_gguf(path: PathLike) -> GGUFModel:
    """Maps a GGUF file under Hugging Face's names.

    Raises:
        FileNotFoundError: no such file.
        GGUFError: see `read_header`; also a missing key, an unknown architecture, or a tensor without a place in it.
    """
    path = pathlib.Path(path)
    metadata, tensors, data = read_header(path)
    if (parts := _value(path, metadata, "split.count", int, 1)) > 1:
        raise UnsupportedGGUFError(f"{path} is one of {parts} files; join them: llama-gguf-split --merge")
    config = _config(path, metadata, tensors, data)
    return GGUFModel(config, GGUFTensors(data, _sources(path, config, tensors)), metadata)


def load(
    path: PathLike, *, dtype: Any = None, mesh: Mesh | None = None, rules: AxisRules | None = None
) -> tuple[TransformerParams, TransformerConfig, Tokenizer]:
    """(params, cfg, tokenizer) of a GGUF file.

    Args:
        dtype: of the parameters; default float32 for quantised tensors, else as stored.
        mesh, rules: where to place the parameters; both or neither.

    Raises:
        GGUFError, TokenizerError, moe.models.hf.HFError: what is wrong with the file, or missing in it.
    """
    model = read_gguf(path)
    params, cfg = from_tensors(model.config, model.tensors, dtype=dtype, mesh=mesh, rules=rules)
    return params, cfg, model.tokenizer


def _config(
    path: pathlib.Path, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], data: np.ndarray
) -> dict[str, Any]:
    """config.json of the model, in the form in which it lies on the Hub."""
    architecture = _value(path, metadata, "general.architecture", str)
    if architecture not in _MODELS:
        raise UnsupportedGGUFError(
            f"{path}: general.architecture is {architecture!r}, not one of {sorted(_MODELS)}; load the Hugging Face "
            "checkpoint with moe.models.hf"
        )
    own = functools.partial(_value, path, metadata)
    experts = own(f"{architecture}.expert_count", int, 0)
    mixture = architecture == "qwen3moe"
    if experts and not mixture:
        raise UnsupportedGGUFError(
            f"{path}: {architecture} with {experts} experts (Mixtral) is not supported; known mixtures: qwen3moe"
        )
    if window := own(f"{architecture}.attention.sliding_window", int, 0):
        raise UnsupportedGGUFError(f"{path}: a sliding window of {window} tokens is not supported for GGUF")
    model_type, name = _MODELS[architecture]
    config: dict[str, Any] = {"architectures": [name], "model_type": model_type, "hidden_act": "silu"}
    fields = _FIELDS | (_EXPERT_FIELDS if mixture else {})
    config |= {theirs: own(f"{architecture}.{ours}", int) for ours, theirs in fields.items()}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = own(f"{architecture}.attention.head_count_kv", int, heads)
    turned = own(f"{architecture}.rope.dimension_count", int, config["hidden_size"] // max(heads, 1))
    config["head_dim"] = own(f"{architecture}.attention.key_length", int, turned)
    if min(heads, config["num_key_value_heads"], config["head_dim"]) < 1:
        raise GGUFError(f"{path}: {heads} heads, {config['num_key_value_heads']} of keys, of {config['head_dim']}")
    if f"{architecture}.rope.dimension_count" in metadata and turned != config["head_dim"]:
        raise UnsupportedGGUFError(f"{path}: RoPE turns {turned} of {config['head_dim']} dimensions of a head")
    config["rms_norm_eps"] = _shortest(own(f"{architecture}.attention.layer_norm_rms_epsilon", float))
    config["rope_theta"] = _shortest(own(f"{architecture}.rope.freq_base", float, 10000.0))
    if _ROPE_FACTORS in tensors:
        info = tensors[_ROPE_FACTORS]
        factors = dequantise(data[info.offset : info.offset + info.nbytes], info.type, info.shape)
        config["rope_scaling"] = _llama3_scaling(path, config, np.asarray(factors, np.float64))
    else:
        config["rope_scaling"] = _rope_scaling(path, metadata, f"{architecture}.rope.scaling")
    config["attention_bias"] = "blk.0.attn_output.bias" in tensors
    if mixture:
        config |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if "token_embd.weight" not in tensors:
        raise GGUFError(f"{path} has no tensor 'token_embd.weight'; convert the model again")
    config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    for theirs, ours in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{theirs}_token_id"] = own(f"tokenizer.ggml.{ours}_token_id", int, None)
    return config


_REQUIRED = object()


def _value(path: pathlib.Path, metadata: Mapping[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """The value of a key, of this type."""
    if key not in metadata:
        if default is _REQUIRED:
            raise GGUFError(f"{path} has no key {key!r}; convert the model again")
        return default
    value = metadata[key]
    if type(value) is not kind:
        shown = value.tolist() if isinstance(value, np.ndarray) else value
        raise UnsupportedGGUFError(
            f"{path}: {key!r} is {shown!r}, only one {kind.__name__} for all layers is supported"
        )
    return value


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-5, which the file gives as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(path: pathlib.Path, metadata: Mapping[str, Any], prefix: str) -> dict[str, Any] | None:
    kind = _value(path, metadata, f"{prefix}.type", str, "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedGGUFError(f"{path}: {prefix}.type {kind!r} is not one of 'none', 'linear', 'yarn'")
    scaling = {"rope_type": kind, "factor": _shortest(_value(path, metadata, f"{prefix}.factor", float))}
    if kind == "yarn":
        positions = _value(path, metadata, f"{prefix}.original_context_length", int)
        scaling["original_max_position_embeddings"] = positions
    return scaling


def _llama3_scaling(path: pathlib.Path, config: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Llama 3.1's scaling, of which the file keeps only the divisor of every frequency.

    The divisors follow from the largest one and the constants that all Llama 3.1 to 3.3 models share; other divisors
    are refused rather than approximated.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    half = config["head_dim"] // 2
    wavelength = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)
    ramp = (8192 / wavelength - 1.0) / (4.0 - 1.0)
    expected = 1 / np.interp(ramp, [0.0, 1.0], [1 / scaling["factor"], 1.0])
    if factors.shape != (half,) or not np.allclose(factors, expected, rtol=1e-5):
        raise UnsupportedGGUFError(
            f"{path}: the divisors in {_ROPE_FACTORS!r} are not Llama 3.1's; load the Hugging Face checkpoint"
        )
    return scaling


def _sources(path: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, _Source]:
    permuted = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    if config["model_type"] != "llama":
        permuted = {}
    sources = {}
    for name, info in tensors.items():
        if name == _ROPE_FACTORS:  # is in the config
            continue
        stem, _, kind = name.rpartition(".")
        if stem in _OUTER:
            sources[f"{_OUTER[stem]}.{kind}"] = _Source(info)
            continue
        prefix, _, place = stem.partition(".")
        layer, _, part = place.partition(".")
        inside = prefix == "blk" and layer.isdecimal() and int(layer) < config["num_hidden_layers"]
        if inside and part in _INNER:
            heads = permuted.get(part)
            if heads is not None and info.shape[0] != heads * config["head_dim"]:
                raise GGUFError(f"{path}: {name!r} of shape {info.shape} does not hold {heads} heads")
            sources[f"model.layers.{layer}.{_INNER[part]}.{kind}"] = _Source(info, heads=heads)
        elif inside and part in _EXPERTS and "num_experts" in config:
            if len(info.shape) != 3 or info.shape[0] != config["num_experts"]:
                raise GGUFError(f"{path}: {name!r} of shape {info.shape} does not hold {config['num_experts']} experts")
            for expert in range(info.shape[0]):
                key = f"model.layers.{layer}.mlp.experts.{expert}.{_EXPERTS[part]}.{kind}"
                sources[key] = _Source(info, expert=expert)
        else:
            raise UnsupportedGGUFError(f"{path}: tensor {name!r} has no place in a {config['model_type']} model")
    return sources
