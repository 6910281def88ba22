"""The published decoders that this library builds, as their released config.json files state them.

    params = moe.params.init(jax.random.key(0), transformer_specs(qwen3_30b_a3b()))

Weights of a released checkpoint: `moe.models.hf.load(directory)` reads the same config from the folder.
"""

from moe.models.hf import config_from_hf
from moe.models.transformer import TransformerConfig


def smollm2_135m() -> TransformerConfig:
    """SmolLM2-135M-Instruct: Llama type, tied, 134,515,008 parameters."""
    return config_from_hf(
        dict(
            model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, rope_theta=1e5,
            max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        )
    )  # fmt: skip


def qwen3_0_6b() -> TransformerConfig:
    """Qwen3-0.6B: dense, QK-norm, tied."""
    return config_from_hf(
        dict(
            model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, rope_theta=1e6, tie_word_embeddings=True,
            max_position_embeddings=40960, bos_token_id=151643, eos_token_id=151645,
        )
    )  # fmt: skip


def qwen3_30b_a3b() -> TransformerConfig:
    """Qwen3-30B-A3B: 48 layers of 128 experts, 8 a token; 30.5 billion parameters, 3.3 billion active."""
    return config_from_hf(
        dict(
            model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, rope_theta=1e6, num_experts=128,
            num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, max_position_embeddings=40960,
            bos_token_id=151643, eos_token_id=151645,
        )
    )  # fmt: skip


def glm_4_7_flash() -> TransformerConfig:
    """GLM-4.7-Flash: MLA, one dense and 46 layers of 64 experts, 4 a token, one shared. Without its MTP layer."""
    return config_from_hf(
        dict(model_type="glm4_moe_lite", rope_theta=1e6, max_position_embeddings=202752, first_k_dense_replace=1)
    )


def longcat_flash() -> TransformerConfig:
    """LongCat-Flash: 28 shortcut layers, 512 experts and 256 that copy, 12 a token; 560 billion parameters."""
    return config_from_hf(dict(model_type="longcat_flash"))


PRESETS = {f.__name__: f for f in (smollm2_135m, qwen3_0_6b, qwen3_30b_a3b, glm_4_7_flash, longcat_flash)}
