"""Checkpoints in Hugging Face's format, in and out: config.json and safetensors files.

    params, cfg = load("Qwen3-30B-A3B", dtype="bfloat16", mesh=mesh, rules=FSDP_EP)
    save("out/model", params, cfg)

Families: llama (SmolLM2 too), qwen3, qwen3_moe, glm4_moe_lite (GLM-4.7-Flash), longcat_flash. Loading goes leaf by leaf
and layer by layer: each device's part is read from the mapped files and written into its array, so that the host holds
a few layers' leaves at a time beside the parameters. Experts of an expert-parallel mesh are read only where they live.
Of FP8 checkpoints (DeepSeek-V3's format) the experts stay in FP8 (`moe.experts.quantized`), both ways.

`from_tensors` is the same for any source of tensors under these names (moe.models.gguf uses it).
"""

import dataclasses
import difflib
import functools
import json
import math
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from moe import params as parameters
from moe.experts import ExpertParams, QuantizedExpertParams
from moe.experts.quantized import quantize_specs
from moe.layers.attention import GQAConfig, GQAParams, MLAConfig, MLAParams
from moe.layers.mlp import MLPParams
from moe.layers.moe import MoEConfig, MoEParams
from moe.layers.rotary import RotaryConfig
from moe.models import tensor_files
from moe.models.transformer import (
    LayerParams,
    ShortcutParams,
    TransformerConfig,
    TransformerParams,
    restack,
    transformer_specs,
)
from moe.params import is_spec, path_name
from moe.quantize import E4M3, Quantized, quantization_config, scale_format
from moe.routing import RoutingConfig
from moe.sharding import AxisRules


class HFError(ValueError):
    """A directory that is no checkpoint of a known family, or not a whole one. Names the key or file and the remedy."""


# --------------------------------------------------------------------------------------------------
# config.json

_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False}
# What transformers 5.24's config classes assume where config.json is silent: it omits values equal to these.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _COMMON
    | dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, mlp_bias=False, rope_theta=1e4,
    ),
    "qwen3": _COMMON
    | dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, max_position_embeddings=32768, use_sliding_window=False,
        sliding_window=4096, max_window_layers=28, rope_theta=1e4,
    ),
    "qwen3_moe": _COMMON
    | dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=32768, use_sliding_window=False, sliding_window=4096,
        decoder_sparse_step=1, moe_intermediate_size=768, num_experts_per_tok=8, num_experts=128,
        norm_topk_prob=False, mlp_only_layers=(), rope_theta=1e4,
    ),
    "glm4_moe_lite": _COMMON
    | dict(
        vocab_size=154880, hidden_size=2048, intermediate_size=10240, moe_intermediate_size=1536, num_hidden_layers=47,
        num_attention_heads=20, n_shared_experts=1, n_routed_experts=64, routed_scaling_factor=1.8, kv_lora_rank=512,
        q_lora_rank=768, qk_rope_head_dim=64, v_head_dim=256, qk_nope_head_dim=192, n_group=1, topk_group=1,
        num_experts_per_tok=4, norm_topk_prob=True, max_position_embeddings=202752, rms_norm_eps=1e-5, bos_token_id=0,
        eos_token_id=1, rope_interleave=True, rope_theta=1e4,
    ),
    "longcat_flash": _COMMON
    | dict(
        vocab_size=131072, hidden_size=6144, num_layers=28, num_attention_heads=64, max_position_embeddings=131072,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, ffn_hidden_size=12288, q_lora_rank=1536, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, moe_topk=12, n_routed_experts=512,
        zero_expert_num=256, expert_ffn_hidden_size=2048, routed_scaling_factor=6.0, rope_theta=1e7,
    ),
}  # fmt: skip
# Keys under which transformers 5 writes what released checkpoints call otherwise (its attribute_map).
_ALIASES = {("qwen3_moe", "num_local_experts"): "num_experts"}
# Where null is a value of its own and not "as the class defaults".
_NULLABLE = ("q_lora_rank", "n_shared_experts", "zero_expert_num")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def config_from_hf(config: Mapping[str, Any]) -> TransformerConfig:
    """The TransformerConfig of a config.json.

    ZEDA's releases ("qwen3_moe_plus_plus", "glm4_moe_lite_plus_plus", and their plain names with the keys zce_nums,
    zce_types, use_zce_mask) come out as their family with parameter-free slots; zce_target_ratio is ours.

    Raises:
        HFError: a model_type that is not known, a value that this decoder does not have (named).
    """
    dynamic, config = _dynamic(config)
    if dynamic:
        cfg = config_from_hf(config)
        if cfg.moe is None:
            raise HFError(f"zce_nums {dynamic['free']} in a model without mixtures of experts")
        return dataclasses.replace(
            cfg, moe=dataclasses.replace(cfg.moe, routing=dataclasses.replace(cfg.moe.routing, **dynamic))
        )
    family: Any = config.get("model_type")
    if family not in DEFAULTS:
        near = difflib.get_close_matches(str(family), DEFAULTS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise HFError(f"model_type {family!r} is not supported; {hint}known: {', '.join(DEFAULTS)}")
    given: dict[str, Any] = {
        _ALIASES.get((family, k), k): v for k, v in config.items() if v is not None or k in _NULLABLE
    }
    c: dict[str, Any] = dict(DEFAULTS[family]) | given
    if c["hidden_act"] not in _ACTIVATIONS:
        raise HFError(f"hidden_act {c['hidden_act']!r} is not one of {', '.join(map(repr, _ACTIVATIONS))}")
    if c.get("mlp_bias"):
        raise HFError("mlp_bias true: MLPs with biases are not supported")
    eos = c.get("eos_token_id")
    common: dict[str, Any] = dict(
        family=family, vocab=c["vocab_size"], width=c["hidden_size"], eps=c["rms_norm_eps"],
        tied=c["tie_word_embeddings"], activation=_ACTIVATIONS[c["hidden_act"]],
        max_positions=c["max_position_embeddings"], bos=c.get("bos_token_id"), pad=c.get("pad_token_id"),
        eos=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
    )  # fmt: skip
    if family == "longcat_flash":
        if c.get("zero_expert_type", "identity") != "identity" or c.get("router_bias"):
            raise HFError(
                f"zero_expert_type {c.get('zero_expert_type')!r} with router_bias {c.get('router_bias')}: only "
                "identity zero experts and routers without bias are supported"
            )
        zero = c["zero_expert_num"] or 0
        mixture = MoEConfig(
            RoutingConfig(
                c["n_routed_experts"], c["moe_topk"], renormalise=False, selection_bias=True,
                scaling=c["routed_scaling_factor"], free=(("copy", zero),) if zero else (),
            ),
            hidden=c["expert_ffn_hidden_size"], activation=common["activation"],
        )  # fmt: skip
        scales = tuple((c["hidden_size"] / c[rank]) ** 0.5 for rank in ("q_lora_rank", "kv_lora_rank"))
        layers = ("shortcut",) * c["num_layers"]
        return TransformerConfig(
            layers=layers, hidden=c["ffn_hidden_size"], moe=mixture, attention=_mla(c, True, scales), **common
        )
    layers = c["num_hidden_layers"]
    if family == "glm4_moe_lite":
        limited = c["n_group"] > 1
        mixture = MoEConfig(
            RoutingConfig(
                c["n_routed_experts"], c["num_experts_per_tok"], scoring="sigmoid", renormalise=c["norm_topk_prob"],
                selection_bias=True, scaling=c["routed_scaling_factor"],
                selection="group_limited" if limited else "top_k",
                n_group=c["n_group"] if limited else 1, topk_group=c["topk_group"] if limited else 1,
            ),
            hidden=c["moe_intermediate_size"], activation=common["activation"],
            shared=c["moe_intermediate_size"] * (c["n_shared_experts"] or 0),
        )  # fmt: skip
        types = c.get("mlp_layer_types")
        dense = c.get("first_k_dense_replace", 1)
        types = ["dense"] * dense + ["sparse"] * (layers - dense) if types is None else list(types)
        if len(types) != layers:
            raise HFError(f"mlp_layer_types names {len(types)} layers, num_hidden_layers is {layers}")
        return TransformerConfig(
            layers=tuple("moe" if kind == "sparse" else "dense" for kind in types), hidden=c["intermediate_size"],
            moe=mixture, attention=_mla(c, c["rope_interleave"], (1.0, 1.0)), **common,
        )  # fmt: skip
    attention = _gqa(c, family)
    if family == "qwen3_moe":
        mixture = MoEConfig(
            RoutingConfig(c["num_experts"], c["num_experts_per_tok"], renormalise=c["norm_topk_prob"]),
            hidden=c["moe_intermediate_size"], activation=common["activation"],
        )  # fmt: skip
        sparse = [
            i not in c["mlp_only_layers"] and c["num_experts"] > 0 and (i + 1) % c["decoder_sparse_step"] == 0
            for i in range(layers)
        ]
        return TransformerConfig(
            layers=tuple("moe" if s else "dense" for s in sparse), hidden=c["intermediate_size"],
            moe=mixture if any(sparse) else None, attention=attention, **common,
        )  # fmt: skip
    return TransformerConfig(layers=("dense",) * layers, hidden=c["intermediate_size"], attention=attention, **common)


_DYNAMIC = {
    "qwen3_moe": ("qwen3_moe_plus_plus", "Qwen3MoePlusPlusForCausalLM"),
    "glm4_moe_lite": ("glm4_moe_lite_plus_plus", "Glm4MoeLitePlusPlusForCausalLM"),
}
"""model_type and class of a family's dynamic form in ZEDA's fork of transformers (TsinghuaC3I/ZEDA)."""


def _dynamic(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of RoutingConfig, empty for a static model; the config of the static model)."""
    families = {name: family for family, (name, _) in _DYNAMIC.items()}
    family = config.get("model_type")
    keys = ("zce_nums", "zce_types", "use_zce_mask", "zce_target_ratio")
    rest = {key: value for key, value in config.items() if key not in keys}
    if family in families:  # the fork's defaults where config.json is silent
        config = {"zce_nums": [64], "zce_types": ["copy"], "use_zce_mask": True} | dict(config)
        rest["model_type"] = families[family]
    numbers, kinds = (list(config.get(key) or ()) for key in keys[:2])
    if not any(numbers):
        return {}, rest
    if rest.get("model_type") not in _DYNAMIC:
        raise HFError(f"zce_nums {numbers} with model_type {family!r}; only {', '.join(_DYNAMIC)} have dynamic forms")
    if len(numbers) != len(kinds):
        raise HFError(f"zce_nums {numbers} and zce_types {kinds} need the same length, one number for each type")
    if {"constant", "mixed"} & set(kinds):
        raise HFError(
            f"zce_types {kinds}: the fork's constant experts mix x by learnt weights; only zero and copy are read"
        )
    fields: dict[str, Any] = {
        "free": tuple((kind, number) for kind, number in zip(kinds, numbers, strict=True) if number),
        "free_masked": bool(config.get("use_zce_mask", False)),
    }
    if config.get("zce_target_ratio") is not None:
        fields["free_share"] = float(config["zce_target_ratio"])
    return fields, rest


def _check_router(cfg: TransformerConfig) -> None:
    """Refuses routers that no family of checkpoints has a place for."""
    if cfg.moe is None:
        return
    r = cfg.moe.routing
    if any(kind in ("constant", "mixed") for kind, _ in r.free):
        raise HFError(f"family {cfg.family!r} has no place for the constant slots {r.free}")
    if r.dynamic or r.redistribute or r.gating_residual:
        raise HFError(
            f"family {cfg.family!r} has no place for dynamic {r.dynamic!r}, redistribute {r.redistribute}, "
            f"gating_residual {r.gating_residual}; keep such a model with moe.checkpoint"
        )


def _dynamic_keys(cfg: TransformerConfig) -> dict[str, Any]:
    """What config.json says of parameter-free slots, for the families of `_DYNAMIC`."""
    _check_router(cfg)
    if cfg.moe is None or not cfg.moe.routing.free or cfg.family == "longcat_flash":
        return {}
    routing = cfg.moe.routing
    name, architecture = _DYNAMIC[cfg.family]
    keys: dict[str, Any] = {
        "model_type": name, "architectures": [architecture], "zce_nums": [number for _, number in routing.free],
        "zce_types": [kind for kind, _ in routing.free], "use_zce_mask": routing.free_masked,
    }  # fmt: skip
    return keys | ({} if routing.free_share is None else {"zce_target_ratio": routing.free_share})


def _rotary(c: Mapping[str, Any], head: int, interleaved: bool) -> RotaryConfig:
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    theta = rope.get("rope_theta", c["rope_theta"])
    partial = rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    positions = rope.get("original_max_position_embeddings", c.get("original_max_position_embeddings"))
    same: dict[str, Any] = dict(dim=int(head * partial), theta=float(theta), interleaved=interleaved)
    if kind == "default":
        return RotaryConfig(**same)
    if kind not in ("linear", "yarn", "llama3", "longrope"):
        raise HFError(f"rope_type {kind!r} is not supported; known: default, linear, yarn, llama3, longrope")
    factor = rope.get("factor")
    if factor is None:
        if not positions:
            raise HFError(f"rope_type {kind!r} without factor or original_max_position_embeddings; state one")
        factor = c["max_position_embeddings"] / positions
    if kind == "llama3":
        more: dict[str, Any] = {key: rope[key] for key in ("low_freq_factor", "high_freq_factor")}
    elif kind == "yarn":
        keys = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")
        more = {key: rope[key] for key in keys if rope.get(key) is not None}
    elif kind == "longrope":
        more = {key: tuple(rope[key]) for key in ("short_factor", "long_factor")}
        more["attention_factor"] = rope.get("attention_factor")
    else:
        more = {}
    return RotaryConfig(scaling=kind, factor=float(factor), original_positions=int(positions or 0), **same, **more)


def _gqa(c: Mapping[str, Any], family: str) -> GQAConfig:
    heads = c["num_attention_heads"]
    head = c.get("head_dim") or c["hidden_size"] // heads
    window = c["sliding_window"] if c.get("use_sliding_window") else None
    types = c.get("layer_types")
    if types is not None:
        sliding = {kind == "sliding_attention" for kind in types}
    else:
        first = c.get("max_window_layers", 0) if family == "qwen3" else 0
        sliding = {window is not None and i >= first for i in range(c["num_hidden_layers"])}
    if len(sliding) > 1:
        raise HFError("layers with and without a sliding window in one model are not supported; use_sliding_window")
    return GQAConfig(
        heads, c.get("num_key_value_heads") or heads, head, _rotary(c, head, False), qk_norm=family != "llama",
        bias=c["attention_bias"], out_bias=c["attention_bias"], eps=c["rms_norm_eps"],
        window=window if sliding == {True} else None,
    )  # fmt: skip


def _mla(c: Mapping[str, Any], interleaved: bool, scales: tuple[float, float]) -> MLAConfig:
    rope = c["qk_rope_head_dim"]
    return MLAConfig(
        c["num_attention_heads"], c.get("q_lora_rank"), c["kv_lora_rank"], c["qk_nope_head_dim"], rope,
        c["v_head_dim"], _rotary(c, rope, interleaved), bias=c["attention_bias"], query_scale=scales[0],
        latent_scale=scales[1],
    )  # fmt: skip


def config_to_hf(cfg: TransformerConfig) -> dict[str, Any]:
    """The config.json of this model, every key that `config_from_hf` reads written out."""
    names = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
    rope = cfg.attention.rotary
    head = cfg.attention.head_dim if isinstance(cfg.attention, GQAConfig) else cfg.attention.rope_dim
    rotary: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    if rope.dim != head:
        rotary["partial_rotary_factor"] = rope.dim / head
    if rope.scaling != "default":
        rotary["factor"] = rope.factor
    if rope.scaling in ("yarn", "llama3", "longrope"):
        rotary["original_max_position_embeddings"] = rope.original_positions
    if rope.scaling == "llama3":
        rotary |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        rotary |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        rotary |= {key: getattr(rope, key) for key in ("mscale", "mscale_all_dim") if getattr(rope, key)}
    if rope.scaling == "longrope":
        rotary |= {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    if rope.attention_factor is not None:
        rotary["attention_factor"] = rope.attention_factor
    architectures = {
        "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
        "glm4_moe_lite": "Glm4MoeLiteForCausalLM", "longcat_flash": "LongcatFlashForCausalLM",
    }  # fmt: skip
    if cfg.family not in architectures:
        raise HFError(f"family {cfg.family!r} has no Hugging Face class here; known: {', '.join(architectures)}")
    c: dict[str, Any] = {
        "model_type": cfg.family, "architectures": [architectures[cfg.family]], "vocab_size": cfg.vocab,
        "hidden_size": cfg.width, "rms_norm_eps": cfg.eps, "tie_word_embeddings": cfg.tied,
        "hidden_act": names[cfg.activation], "max_position_embeddings": cfg.max_positions,
        "rope_parameters": rotary, "rope_theta": rope.theta, "bos_token_id": cfg.bos, "pad_token_id": cfg.pad,
        "eos_token_id": None if not cfg.eos else cfg.eos[0] if len(cfg.eos) == 1 else list(cfg.eos),
    }  # fmt: skip
    a = cfg.attention
    c["num_attention_heads"], c["attention_bias"] = a.heads, a.bias
    if isinstance(a, GQAConfig):
        if a.bias != a.out_bias:
            raise HFError(f"attention_bias covers all projections; bias {a.bias} and out_bias {a.out_bias} differ")
        if a.qk_norm != (cfg.family != "llama"):
            raise HFError(f"family {cfg.family!r} cannot hold qk_norm={a.qk_norm}")
        c |= {"num_key_value_heads": a.kv_heads, "head_dim": a.head_dim}
        if cfg.family != "llama":
            c |= {"use_sliding_window": a.window is not None, "sliding_window": a.window, "max_window_layers": 0}
            if cfg.family == "qwen3":
                c["layer_types"] = ["full_attention" if a.window is None else "sliding_attention"] * len(cfg.layers)
    else:
        c |= {
            "q_lora_rank": a.query_rank, "kv_lora_rank": a.latent_rank, "qk_nope_head_dim": a.nope_dim,
            "qk_rope_head_dim": a.rope_dim, "v_head_dim": a.value_dim, "num_key_value_heads": a.heads,
            "qk_head_dim": a.nope_dim + a.rope_dim, "head_dim": a.rope_dim,
        }  # fmt: skip
    if cfg.family == "longcat_flash":
        assert cfg.moe is not None
        r = cfg.moe.routing
        return c | {
            "num_layers": len(cfg.layers), "ffn_hidden_size": cfg.hidden, "expert_ffn_hidden_size": cfg.moe.hidden,
            "moe_topk": r.top_k, "n_routed_experts": r.experts, "zero_expert_num": r.free_slots,
            "zero_expert_type": "identity", "routed_scaling_factor": r.scaling,
        }  # fmt: skip
    c |= {"num_hidden_layers": len(cfg.layers), "intermediate_size": cfg.hidden}
    if cfg.family == "glm4_moe_lite":
        assert cfg.moe is not None
        r = cfg.moe.routing
        c |= {
            "moe_intermediate_size": cfg.moe.hidden, "n_shared_experts": cfg.moe.shared // cfg.moe.hidden,
            "n_routed_experts": r.experts, "routed_scaling_factor": r.scaling, "n_group": r.n_group,
            "topk_group": r.topk_group, "num_experts_per_tok": r.top_k, "norm_topk_prob": r.renormalise,
            "rope_interleave": rope.interleaved,
            "mlp_layer_types": ["sparse" if kind == "moe" else "dense" for kind in cfg.layers],
            "first_k_dense_replace": next((i for i, k in enumerate(cfg.layers) if k == "moe"), len(cfg.layers)),
        }  # fmt: skip
    if cfg.family == "qwen3_moe" and cfg.moe is not None:
        r = cfg.moe.routing
        c |= {
            "moe_intermediate_size": cfg.moe.hidden, "num_experts": r.experts, "num_experts_per_tok": r.top_k,
            "norm_topk_prob": r.renormalise, "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, kind in enumerate(cfg.layers) if kind == "dense"],
        }  # fmt: skip
    return c | _dynamic_keys(cfg)


# --------------------------------------------------------------------------------------------------
# Tensors


@dataclasses.dataclass(frozen=True)
class _Source:
    """The tensors that make up one leaf of one layer.

    Attributes:
        names: one name, or for experts [E][parts] names in the order of our leading axes.
        linear: torch's [out, in] against our [in, out], out and in folded as our shape wants.
    """

    names: Any
    linear: bool = False

    def flat(self) -> list[str]:
        return [self.names] if isinstance(self.names, str) else [name for part in self.names for name in part]


def _linear(name: str, bias: bool = False) -> tuple[_Source, _Source | None]:
    return _Source(f"{name}.weight", linear=True), _Source(f"{name}.bias") if bias else None


def _mlp_sources(prefix: str) -> MLPParams:
    return MLPParams(*(_Source(f"{prefix}{part}_proj.weight", linear=True) for part in ("gate", "up", "down")))


def _attention_sources(cfg: GQAConfig | MLAConfig, prefix: str) -> GQAParams | MLAParams:
    if isinstance(cfg, GQAConfig):
        (q, qb), (k, kb), (v, vb) = (_linear(f"{prefix}{p}_proj", cfg.bias) for p in "qkv")
        o, ob = _linear(f"{prefix}o_proj", cfg.out_bias)
        qn, kn = (_Source(f"{prefix}{p}_norm.weight") if cfg.qk_norm else None for p in "qk")
        return GQAParams(q, k, v, o, qn, kn, qb, kb, vb, ob)
    kv, kvb = _linear(f"{prefix}kv_a_proj_with_mqa", cfg.bias)
    out, outb = _linear(f"{prefix}o_proj", cfg.bias)
    up, _ = _linear(f"{prefix}kv_b_proj")
    norm = _Source(f"{prefix}kv_a_layernorm.weight")
    common: dict[str, Any] = dict(
        latent_down=kv, latent_norm=norm, latent_up=up, out=out, latent_down_bias=kvb, out_bias=outb
    )  # fmt: skip
    if cfg.query_rank is None:
        return MLAParams(query=_linear(f"{prefix}q_proj")[0], **common)
    down, downb = _linear(f"{prefix}q_a_proj", cfg.bias)
    return MLAParams(
        query_down=down, query_down_bias=downb, query_norm=_Source(f"{prefix}q_a_layernorm.weight"),
        query_up=_linear(f"{prefix}q_b_proj")[0], **common,
    )  # fmt: skip


def _moe_sources(cfg: TransformerConfig, prefix: str) -> MoEParams:
    assert cfg.moe is not None
    r = cfg.moe.routing
    _check_router(cfg)

    def each(parts: Sequence[str]) -> _Source:
        names = [[f"{prefix}experts.{e}.{part}_proj.weight" for part in parts] for e in range(r.experts)]
        return _Source(names, linear=True)

    gate = f"{prefix}router.classifier.weight" if cfg.family == "longcat_flash" else f"{prefix}gate.weight"
    bias = gate.removesuffix("classifier.weight").removesuffix("weight") + "e_score_correction_bias"
    return MoEParams(
        router=_Source(gate, linear=True),
        router_bias=_Source(bias) if r.selection_bias else None,
        experts=ExpertParams(gate_up=each(("gate", "up")), down=each(("down",))),
        shared=_mlp_sources(f"{prefix}shared_experts.") if cfg.moe.shared else None,
    )


def _layer_sources(cfg: TransformerConfig, index: int) -> Any:
    prefix, kind = f"model.layers.{index}.", cfg.layers[index]
    if kind == "shortcut":

        def half(i: int) -> LayerParams:
            return LayerParams(
                _attention_sources(cfg.attention, f"{prefix}self_attn.{i}."),
                _Source(f"{prefix}input_layernorm.{i}.weight"),
                _mlp_sources(f"{prefix}mlps.{i}."),
                _Source(f"{prefix}post_attention_layernorm.{i}.weight"),
            )

        return ShortcutParams(half(0), half(1), _moe_sources(cfg, f"{prefix}mlp."))
    return LayerParams(
        _attention_sources(cfg.attention, f"{prefix}self_attn."),
        _Source(f"{prefix}input_layernorm.weight"),
        _moe_sources(cfg, f"{prefix}mlp.") if kind == "moe" else _mlp_sources(f"{prefix}mlp."),
        _Source(f"{prefix}post_attention_layernorm.weight"),
    )


_SCALE = "_scale_inv"


def _quantized_sources(layer: Any) -> Any:
    """The sources of a layer whose experts are QuantizedExpertParams: as stored, [out, in], and scales beside them."""

    def quantized(source: _Source) -> Quantized:
        scales = [[f"{name}{_SCALE}" for name in parts] for parts in source.names]
        return Quantized(_Source(source.names), _Source(scales))

    def experts(node: Any) -> Any:
        if not isinstance(node, ExpertParams):
            return node
        return QuantizedExpertParams(quantized(node.gate_up), quantized(node.down))

    return jax.tree.map(experts, layer, is_leaf=lambda node: isinstance(node, ExpertParams))


def _sources(cfg: TransformerConfig, quantized: bool = False) -> dict[str, list[_Source]]:
    """path of a leaf of TransformerParams -> its sources: one for each layer of its run."""
    out: dict[str, list[_Source]] = {"embed": [_Source("model.embed_tokens.weight")]}
    first = 0
    for number, (_, count) in enumerate(cfg.runs):
        for index in range(first, first + count):
            layer = _layer_sources(cfg, index)
            layer = _quantized_sources(layer) if quantized else layer
            for path, source in jax.tree_util.tree_leaves_with_path(layer, is_leaf=lambda s: isinstance(s, _Source)):
                out.setdefault(f"runs/{number}/{path_name(path)}", []).append(source)
        first += count
    out["norm"] = [_Source("model.norm.weight")]
    if not cfg.tied:
        out["head"] = [_Source("lm_head.weight")]
    return out


def _torch_shape(shape: Sequence[int], path: str) -> tuple[int, int]:
    """[out, in] of the linear map whose leaf, without axes of layers and experts, has this shape."""
    inputs = len(shape) - 1 if path.endswith("attention/out") else 1
    return int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))


_IGNORED = re.compile(r"rotary_emb\.inv_freq$|^model\.mtp\.|\.weight_scale_inv$")


def _ignored(name: str, cfg: TransformerConfig) -> bool:
    """Tensors of a checkpoint that this decoder has no use for: buffers, multi-token prediction, LongCat's weights of
    experts that compute nothing, the head of a tied model.
    """
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if _IGNORED.search(name) or (layer and int(layer[1]) >= len(cfg.layers)):
        return True
    expert = re.search(r"\.experts\.(\d+)\.", name)
    if expert and cfg.moe is not None and cfg.moe.routing.free and int(expert[1]) >= cfg.moe.routing.experts:
        return True
    return cfg.tied and name == "lm_head.weight"


def _check_names(tensors: Mapping[str, Any], cfg: TransformerConfig, sources: Mapping[str, list[_Source]]) -> None:
    wanted = {name for leaf in sources.values() for source in leaf for name in source.flat()}
    missing = sorted(wanted - tensors.keys())
    extra = sorted(name for name in tensors.keys() - wanted if not _ignored(name, cfg))
    if missing:
        near = difflib.get_close_matches(missing[0], extra, 1)
        hint = f" ({near[0]!r} is there)" if near else ""
        raise HFError(
            f"no tensor {missing[0]!r}{hint}; {len(missing)} of {len(wanted)} are missing. The config and the files "
            "must be of one checkpoint"
        )
    if extra:
        raise HFError(
            f"tensor {extra[0]!r} has no place in a {cfg.family} of {len(cfg.layers)} layers ({len(extra)} such "
            "tensors); the config and the files must be of one checkpoint"
        )


class _Dequantised(Mapping[str, np.ndarray]):
    """Tensors whose 8-bit floats come back as float32, multiplied block by block with `NAME_scale_inv` (the FP8 format
    of DeepSeek-V3 and Qwen3), but for those that are `kept` as stored.
    """

    def __init__(self, tensors: Mapping[str, Any], config: Mapping[str, Any], kept: Set[str]):
        self._tensors, self._kept = tensors, kept
        self._block = (config.get("quantization_config") or {}).get("weight_block_size") or (128, 128)

    def __getitem__(self, name: str) -> np.ndarray:
        array = np.asarray(self._tensors[name])
        if name in self._kept or array.dtype.itemsize > 1 or array.dtype.kind in "iub":
            return array
        if f"{name}{_SCALE}" not in self._tensors:
            raise HFError(f"{name!r} is {array.dtype} without {name}{_SCALE}; fetch the whole checkpoint")
        scale = np.asarray(self._tensors[f"{name}{_SCALE}"]).astype(np.float32)
        wanted = tuple(-(-size // block) for size, block in zip(array.shape, self._block, strict=True))
        if scale.shape != wanted:
            raise HFError(f"{name}{_SCALE} has shape {scale.shape}, blocks of {tuple(self._block)} ask for {wanted}")
        wide = np.repeat(np.repeat(scale, self._block[0], 0), self._block[1], 1)
        return array.astype(np.float32) * wide[: array.shape[0], : array.shape[1]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def _piece(
    tensors: Mapping[str, Any], source: _Source, path: str, shape: tuple[int, ...], index: Any, dtype: Any
) -> np.ndarray:
    """One layer's leaf, or the part of it that `index` (slices, one for each dimension) asks for."""
    names: Any = np.array(source.names)
    if names.ndim and names.shape[1] == 1:  # [E, in, out], else [E, parts, in, out]
        names = names[:, 0]
    inner, part = shape[names.ndim :], index[names.ndim :]
    flat = (math.prod(inner),) if path.endswith("_bias") else inner
    expected = _torch_shape(inner, path) if source.linear else flat
    names = np.asarray(names[index[: names.ndim]])
    out = np.empty((*names.shape, *(len(range(n)[s]) for n, s in zip(inner, part, strict=True))), dtype)
    for place in np.ndindex(names.shape):
        array = np.asarray(tensors[str(names[place])])
        if array.shape != expected:
            raise HFError(f"tensor {str(names[place])!r} has shape {array.shape}, the config asks for {expected}")
        if dtype == E4M3 and array.dtype != E4M3:
            raise HFError(f"tensor {str(names[place])!r} is {array.dtype}, not float8_e4m3fn; load with fp8=False")
        out[place] = (array.T if source.linear else array).reshape(inner)[part]
    return out


@functools.partial(jax.jit, donate_argnums=0)
def _put(leaf: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(leaf, layer, index, 0)


def from_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    *,
    dtype: Any = None,
    fp8: bool = True,
    mesh: Mesh | None = None,
    rules: AxisRules | None = None,
) -> tuple[TransformerParams, TransformerConfig]:
    """(params, cfg) from a config.json's dict and tensors under Hugging Face's names.

    Args:
        tensors: name -> numpy array, read when asked for.
        dtype: of the parameters; default as stored, of a quantised checkpoint that of its embedding. Routers and their
            biases are float32 in any case.
        fp8: where the config has a quantization_config, experts are QuantizedExpertParams, as stored (for inference;
            the one format is that of `moe.quantize.scale_format`). False dequantises them like all other weights, and
            takes blocks of any size.
        mesh, rules: where to place the parameters; both or neither.

    Raises:
        HFError: an unknown model_type; missing, extra or mis-shaped tensors, named.
        QuantizationError: a quantization_config that experts cannot be kept in, the key named.
    """
    if (mesh is None) != (rules is None):
        raise HFError("give from_tensors both a mesh and rules, or neither")
    cfg = config_from_hf(config)
    specs, quantization = transformer_specs(cfg), config.get("quantization_config") or {}
    quantized = fp8 and bool(quantization) and cfg.mixtures > 0
    if quantized:
        specs = quantize_specs(specs, scale=scale_format(quantization))
    sources = _sources(cfg, quantized)
    _check_names(tensors, cfg, sources)
    if quantization and dtype is None:
        dtype = tensors[sources["embed"][0].names].dtype
    kept = {n for path, leaf in sources.items() if path.endswith(_QUANTIZED) for source in leaf for n in source.flat()}
    tensors = _Dequantised(tensors, config, kept)
    placed = None if mesh is None or rules is None else parameters.shardings(specs, mesh, rules)
    shardings = {} if placed is None else {path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(placed)}
    leaves, tree = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)
    return jax.tree.unflatten(
        tree, [_leaf(path_name(path), spec, sources, tensors, dtype, shardings) for path, spec in leaves]
    ), cfg


_QUANTIZED = ("/values", "/scale")  # ends of the paths of what stays as stored


def _leaf(path: str, spec: Any, sources: Any, tensors: Any, dtype: Any, shardings: Mapping[str, Any]) -> jax.Array:
    sharding = shardings.get(path) or SingleDeviceSharding(jax.local_devices()[0])
    stacked = path.startswith("runs/")
    shape = spec.shape[1:] if stacked else spec.shape
    first = sources[path][0]
    if path.endswith(("router", "router_bias", *_QUANTIZED)):
        dtype = spec.dtype
    dtype = jnp.dtype(tensors[first.flat()[0]].dtype if dtype is None else dtype)

    def layer(source: _Source, where: Any) -> jax.Array:
        return jax.make_array_from_callback(
            shape, where, lambda index: _piece(tensors, source, path, shape, index, dtype)
        )

    if not stacked:
        return layer(first, sharding)
    inner = sharding
    if isinstance(sharding, NamedSharding):
        inner = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    if len(sources[path]) == 1:
        return jax.jit(lambda leaf: leaf[None], out_shardings=sharding)(layer(first, inner))
    out = jax.jit(lambda: jnp.zeros(spec.shape, dtype), out_shardings=sharding)()
    for number, source in enumerate(sources[path]):
        out = _put(out, layer(source, inner), jnp.int32(number))
        out.block_until_ready()  # keeps the host at one layer's piece: dispatch would run ahead of the copies
    return out


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: Any = None,
    fp8: bool = True,
    mesh: Mesh | None = None,
    rules: AxisRules | None = None,
) -> tuple[TransformerParams, TransformerConfig]:
    """(params, cfg) of a checkpoint directory; see `from_tensors` for the arguments.

    Raises:
        HFError, TensorFileError, QuantizationError: naming the file or key.
    """
    path = pathlib.Path(directory)
    return from_tensors(
        read_config(path), tensor_files.TensorFiles(path), dtype=dtype, fp8=fp8, mesh=mesh, rules=rules
    )  # fmt: skip


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a checkpoint directory."""
    file = pathlib.Path(directory) / "config.json"
    if not file.is_file():
        raise HFError(f"no file {file}; give the folder of a Hugging Face checkpoint")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise HFError(f"{file} is no JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise HFError(f"{file} holds a {type(config).__name__}, not the keys of a config; fetch it again")
    return config


def _whole(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def _scale_kind(params: TransformerParams) -> str | None:
    """Of quantised experts; None where there are none."""
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, QuantizedExpertParams))
    return next((node.scale for node in nodes if isinstance(node, QuantizedExpertParams)), None)


def tensors_of(params: TransformerParams, cfg: TransformerConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face's name, array) of every tensor, layer by layer."""
    sources = _sources(cfg, _scale_kind(params) is not None)
    if len(params.runs) != len(cfg.runs):
        params = restack(params, cfg)
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    unlike = sorted(sources.keys() ^ leaves.keys())
    if unlike:
        raise HFError(f"parameter {unlike[0]!r} is not in both the parameters and a {cfg.family} of this config")

    def torch(array: np.ndarray, source: _Source, path: str) -> np.ndarray:
        return array.reshape(_torch_shape(array.shape, path)[::-1]).T if source.linear else array

    for path in ("embed", "norm", "head"):
        if path in sources:
            yield sources[path][0].names, _whole(leaves[path])
    for path in sources:
        if not path.startswith("runs/"):
            continue
        for number, source in enumerate(sources[path]):
            layer = _whole(leaves[path][number])
            if isinstance(source.names, str):
                bias = source.names.endswith("bias") and layer.ndim > 1
                yield source.names, layer.reshape(-1) if bias else torch(layer, source, path)
                continue
            for e, names in enumerate(source.names):
                for p, name in enumerate(names):
                    yield name, torch(layer[e, p] if len(names) > 1 else layer[e], source, path)
    if cfg.family == "longcat_flash" and cfg.moe is not None and cfg.moe.routing.free:
        # transformers' module allocates gate and up for zero experts too, and its loader wants to find them.
        r = cfg.moe.routing
        blank = np.zeros((cfg.moe.hidden, cfg.width), leaves["embed"].dtype)
        for index in range(len(cfg.layers)):
            for e in range(r.experts, r.slots):
                for part in ("gate", "up"):
                    yield f"model.layers.{index}.mlp.experts.{e}.{part}_proj.weight", blank


def save(
    directory: str | os.PathLike[str],
    params: TransformerParams,
    cfg: TransformerConfig,
    *,
    dtype: Any = None,
    base: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Writes config.json and safetensors that `load` and transformers read.

    The directory appears under its name only when complete. In a multi-process run every process calls, the first
    writes.

    Args:
        dtype: of the weights in the files; default theirs. Routers and their biases stay float32, FP8 experts as they
            are.
        base: a config.json to start from: keys that this decoder does not know (tokens, licences) are kept.
        shard_bytes: size of a file.
        progress: called with each tensor's name.

    Raises:
        FileExistsError: there is something in `directory` already.
    """
    target = pathlib.Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists; give save a new folder, or remove it first")
    config = dict(base or {}) | config_to_hf(cfg)
    config.pop("quantization_config", None)  # of a base whose weights were dequantised
    scale = _scale_kind(params)
    if scale is not None:
        plain = [leaf for leaves in _sources(cfg, True).values() for leaf in leaves if leaf.linear]
        names = ["lm_head", *(name.removesuffix(".weight") for leaf in plain for name in leaf.flat())]
        config["quantization_config"] = quantization_config(scale=scale) | {"modules_to_not_convert": names}
    config["torch_dtype"] = str(jnp.dtype(dtype or params.embed.dtype))

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in tensors_of(params, cfg):
            if progress is not None:
                progress(name)
            kept = array.dtype == E4M3 or re.search(r"\.(gate|classifier)\.weight$|correction_bias$|_scale_inv$", name)
            yield name, array if dtype is None or kept else array.astype(dtype)

    if jax.process_index():
        for _ in stream():  # takes part in the gathers
            pass
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        tensor_files.write(partial, stream(), shard_bytes=shard_bytes)
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
