"""A sparse mixture-of-experts layer: router, routed experts, parameter-free slots, shared experts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from moe.experts import ExpertParams, QuantizedExpertParams, expert_layer, expert_specs
from moe.layers.mlp import mlp, mlp_specs
from moe.params import Constant, Normal, Param, ParamSpec, zeros
from moe.routing import Routing, RoutingConfig, free_output, route
from moe.sharding import constrain


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """One MoE layer.

    Attributes:
        routing: who is chosen and how it is weighted.
        hidden: F, width of an expert.
        shared: width of the expert that sees every token (all shared experts side by side); 0 for none.
        activation: of experts.
    """

    routing: RoutingConfig
    hidden: int
    shared: int = 0
    activation: str = "silu"

    def __post_init__(self):
        if self.hidden < 1 or self.shared < 0:
            raise ValueError(f"expert width {self.hidden} must be positive, shared width {self.shared} not negative")


@struct.dataclass
class MoEParams:
    """Parameters of an MoE layer. The router stays in float32 whatever the policy (keep "router")."""

    router: Param  # [D, E + Z]
    experts: ExpertParams | QuantizedExpertParams
    router_bias: Param = None  # [E + Z], selection only, no gradient
    shared: Any = None  # MLPParams or None
    constants: Param = None  # [C, D], of "constant" and "mixed" slots
    mixers: Param = None  # [M, 2, D], of "mixed" slots
    router_cut: Param = None  # [], of RoutingConfig.dynamic, no gradient
    router_threshold: Param = None  # [E + Z], of dynamic "threshold"
    router_residual: Param = None  # [E + Z, E + Z], of gating_residual: from the logits of the mixture below


_NO_CUT = {"top_p": 1.0, "threshold": 0.0}
"""The value of router_cut at which all K slots are used."""


def moe_specs(cfg: MoEConfig, width: int) -> MoEParams:
    """Parameters of an MoE layer over `width` (D)."""
    routing = cfg.routing
    constants, mixers = int(routing.of_kind("constant", "mixed").sum()), int(routing.of_kind("mixed").sum())
    slots = routing.slots
    return MoEParams(
        router=ParamSpec((width, routing.slots), ("embed", None), Normal(0.02)),
        experts=expert_specs(routing.experts, width, cfg.hidden),
        router_bias=ParamSpec((routing.slots,), (None,), zeros) if routing.selection_bias else None,
        shared=mlp_specs(width, cfg.shared) if cfg.shared else None,
        constants=ParamSpec((constants, width), (None, "embed"), zeros) if constants else None,
        mixers=ParamSpec((mixers, 2, width), (None, None, "embed"), zeros) if mixers else None,
        router_cut=ParamSpec((), (), Constant(_NO_CUT[routing.dynamic])) if routing.dynamic else None,
        router_threshold=ParamSpec((slots,), (None,), zeros) if routing.dynamic == "threshold" else None,
        router_residual=ParamSpec((slots, slots), (None, None), zeros) if routing.gating_residual else None,
    )


def moe(
    params: MoEParams,
    x: Float[Array, "B S D"],
    *,
    cfg: MoEConfig,
    rng: Key[Array, ""] | None = None,
    replay: Int[Array, "B S K"] | None = None,
    valid: Bool[Array, "B S"] | None = None,
    below: Float[Array, "B S E"] | None = None,
    experts: Callable[..., Any] | None = None,
) -> tuple[Float[Array, "B S D"], Routing]:
    """The layer's output and where every token went.

    Args:
        rng: for the router's jitter.
        replay: recorded `Routing.index` to follow instead of choosing.
        valid: False marks padding, which uses no expert.
        below: `Routing.logits` of the mixture below, where there is one and the router has a gating residual.
        experts: another expert computation of the signature of `moe.experts.expert_layer`, for comparison.
    """
    how = cfg.routing.routed
    router, bias, residual = params.router, params.router_bias, params.router_residual
    threshold = params.router_threshold
    if how.slots < cfg.routing.slots:  # masked: the very products of the layer without parameter-free slots
        router = router[:, : how.slots]
        bias, threshold, residual = (
            None if leaf is None else leaf[..., : how.slots] for leaf in (bias, threshold, residual)
        )
    logits = jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    if residual is not None and below is not None:
        residual = residual[: how.slots].astype(jnp.float32)
        logits = logits + jnp.matmul(below, residual, precision=jax.lax.Precision.HIGHEST)
    logits = constrain(logits, "batch", "seq", None)
    routing = route(
        logits, how, bias=bias, rng=rng, replay=replay, valid=valid, cut=params.router_cut, threshold=threshold
    )
    if experts is None:
        experts = functools.partial(expert_layer, n_group=how.n_group if how.selection == "per_group" else 1)
    out = experts(params.experts, x, routing.index, routing.weights, activation=cfg.activation)
    if any(kind != "zero" for kind, _ in how.free):
        out = out + free_output(routing, x, how, params.constants, params.mixers)
    if params.shared is not None:
        out = out + mlp(params.shared, x, activation=cfg.activation)
    return constrain(out, "batch", "seq", "embed"), routing
