"""Experts: dispatch by sorting, the gated MLPs, expert parallelism, and paths to compare with.

layer = init(key, expert_specs(experts=64, width=512, hidden=256))
y = experts(layer, x, routing.index, routing.weights)             # [T, D]
"""

from moe.experts.capacity import capacity_experts
from moe.experts.dense import dense_experts
from moe.experts.dispatch import Dispatch, combine, dispatch, gather_rows
from moe.experts.mlp import ExpertParams, expert_specs, experts
from moe.experts.parallel import ExpertLoad, expert_layer, experts_parallel
from moe.experts.quantized import QuantizedExpertParams, quantize_experts, quantized_experts

__all__ = [
    "Dispatch",
    "ExpertLoad",
    "ExpertParams",
    "QuantizedExpertParams",
    "capacity_experts",
    "combine",
    "dense_experts",
    "dispatch",
    "expert_layer",
    "expert_specs",
    "experts",
    "experts_parallel",
    "gather_rows",
    "quantize_experts",
    "quantized_experts",
]
