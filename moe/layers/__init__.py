"""Layers of a decoder: parameters declared by `*_specs(cfg)`, behaviour by functions of the same name."""

from moe.layers.attention import GQAConfig, GQAParams, MLAConfig, MLAParams, attend, attention, attention_specs
from moe.layers.cache import Cache, CacheError, cache_specs, new_cache
from moe.layers.mlp import MLPParams, mlp, mlp_specs
from moe.layers.moe import MoEConfig, MoEParams, moe, moe_specs
from moe.layers.norm import rms_norm
from moe.layers.rotary import RotaryConfig, angles, frequencies, rotate

__all__ = [
    "Cache",
    "CacheError",
    "GQAConfig",
    "GQAParams",
    "MLAConfig",
    "MLAParams",
    "MLPParams",
    "MoEConfig",
    "MoEParams",
    "RotaryConfig",
    "angles",
    "attend",
    "attention",
    "attention_specs",
    "cache_specs",
    "frequencies",
    "mlp",
    "mlp_specs",
    "moe",
    "moe_specs",
    "new_cache",
    "rms_norm",
    "rotate",
]
