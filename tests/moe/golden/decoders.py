"""Tiny decoders of every family, their seeded weights, and the logits that transformers computes from them.

    python tests/moe/golden/decoders.py        # needs the extra `parity`; rewrites decoders.npz

The weights are drawn by numpy from the seeds below, written with `moe.models.hf.save`, read by transformers' own
classes, and run in float32 on CPU. decoders.npz holds the logits and the versions that made them; tests compare our
forward with it, so that they need neither torch nor transformers (`make test-all` computes them anew).
"""

import os
import pathlib
import sys
import tempfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from moe.models import hf
from moe.models.transformer import TransformerConfig, transformer_specs
from moe.params import is_spec, path_name

FILE = pathlib.Path(__file__).with_suffix(".npz")
VOCAB, BATCH, LENGTH = 61, 2, 21

_ROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6})
_DENSE = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
_MOE = _DENSE | dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=16)
_MLA = dict(
    vocab_size=VOCAB, hidden_size=48, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24,
    qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=20, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
_GLM = _MLA | dict(
    intermediate_size=80, moe_intermediate_size=24, num_hidden_layers=3, n_routed_experts=8, num_experts_per_tok=2
)
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
    "mscale": 0.7, "mscale_all_dim": 0.9,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip

CONFIGS: dict[str, dict] = {
    "llama_tied": _DENSE | _ROPE | dict(model_type="llama", tie_word_embeddings=True),
    "llama_bias_llama3": _DENSE | dict(model_type="llama", attention_bias=True, rope_parameters=_LLAMA3),
    "llama_linear": _DENSE
    | dict(model_type="llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    "qwen3": _DENSE | _ROPE | dict(model_type="qwen3", head_dim=16),
    "qwen3_window_yarn": _DENSE
    | dict(
        model_type="qwen3", head_dim=16, use_sliding_window=True, sliding_window=7, max_window_layers=0,
        rope_parameters={k: v for k, v in _YARN.items() if not k.startswith("mscale")},
    ),
    "qwen3_moe": _MOE | _ROPE | dict(model_type="qwen3_moe", norm_topk_prob=True),
    "qwen3_moe_mixed": _MOE
    | _ROPE
    | dict(model_type="qwen3_moe", norm_topk_prob=False, mlp_only_layers=[1], num_hidden_layers=4),
    "qwen3_moe_step": _MOE
    | _ROPE
    | dict(model_type="qwen3_moe", norm_topk_prob=True, decoder_sparse_step=2, num_experts_per_tok=1),
    "glm4_moe_lite": _GLM | _ROPE | dict(model_type="glm4_moe_lite"),
    "glm4_moe_lite_groups": _GLM
    | dict(
        model_type="glm4_moe_lite", n_group=4, topk_group=2, q_lora_rank=None, rope_parameters=_YARN,
        norm_topk_prob=False, n_shared_experts=2, attention_bias=True,
    ),
    "longcat_flash": _MLA
    | _ROPE
    | dict(
        model_type="longcat_flash", ffn_hidden_size=64, num_layers=2, head_dim=8, moe_topk=3, n_routed_experts=6,
        zero_expert_num=4, expert_ffn_hidden_size=24,
    ),
}  # fmt: skip


def weights(cfg: TransformerConfig):
    """Parameters drawn by numpy from the name of each: large enough that every part of the model matters."""

    def leaf(path, spec):
        name = path_name(path)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if "norm" in name.rsplit("/", 1)[-1]:
            value = rng.uniform(0.5, 1.5, spec.shape)
        elif "bias" in name:
            value = rng.normal(0, 0.1, spec.shape)
        else:
            value = rng.normal(0, 0.2, spec.shape)
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, transformer_specs(cfg), is_leaf=is_spec)


def tokens() -> np.ndarray:
    """Ids [BATCH, LENGTH]."""
    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)


def by_transformers(name: str) -> np.ndarray:
    """Logits [BATCH, LENGTH, VOCAB] of transformers, from the files that we wrote."""
    import torch
    import transformers

    cfg = hf.config_from_hf(CONFIGS[name])
    with tempfile.TemporaryDirectory() as folder:
        hf.save(f"{folder}/model", weights(cfg), cfg, shard_bytes=50_000)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            f"{folder}/model", output_loading_info=True, dtype=torch.float32
        )
    if info["missing_keys"] or info["mismatched_keys"] or info["unexpected_keys"]:
        raise ValueError(f"{name}: transformers reports {info}")
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens().astype(np.int64))).logits.numpy()


def main() -> None:
    import torch
    import transformers

    logits = {name: by_transformers(name) for name in CONFIGS}
    versions = np.array([f"transformers {transformers.__version__}", f"torch {torch.__version__}"])
    np.savez_compressed(FILE, versions=versions, **logits)
    print(f"wrote {FILE} ({FILE.stat().st_size / 1e3:.0f} kB)", file=sys.stderr)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
