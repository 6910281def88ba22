"""Other mixtures that spend a different number of experts on every token, on a trained static one: what `moe.zeda` is
compared with.

    student, scfg = top_p(params, cfg, target_zero_ratio=0.5)
    student = calibrate(student, scfg, batches)            # no training: half of each layer's slots left out
    optimizer = balance_by_bias(adamw(1e-4))               # in training the cut follows the share

    top_p            2403.07652   the shortest prefix of the K best whose probabilities reach p
    thresholds       2405.14297   DynMoE's threshold for every expert
    null_experts     2406.13233   AdaMoE: zero slots whose weight goes to the experts, loss on single experts
    moe_plus_plus    2410.07348   zero, copy and constant slots, gating residual, loss on single experts

Published for training from scratch or fine-tuning without a teacher; each starts here from the trained router, so that
nothing but the skipping is new. What had to be changed for that is said at each.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from moe.layers.moe import MoEParams
from moe.models.transformer import TransformerConfig, TransformerParams, apply, map_mixtures, mixtures_of
from moe.routing import RoutingConfig
from moe.zeda import ZedaError, convert, with_routing, zero_ratio


def top_p(
    params: TransformerParams, cfg: TransformerConfig, *, target_zero_ratio: float = 0.5
) -> tuple[TransformerParams, TransformerConfig]:
    """Top-p routing capped at the model's own K; p (`MoEParams.router_cut`, one a layer) begins at 1: the same model.

    The source fixes p and adds an entropy loss; here p is moved to the wanted share, by `calibrate` and in training.
    """
    return _cut(params, cfg, "top_p", 1.0, target_zero_ratio)


def thresholds(
    params: TransformerParams, cfg: TransformerConfig, *, target_zero_ratio: float = 0.5
) -> tuple[TransformerParams, TransformerConfig]:
    """A learnt threshold on the score of every expert, straight-through as in DynMoE; all 0 at first: the same model.

    DynMoE scores by cosine, weights the chosen alike, and adds and removes experts: all three would throw the trained
    router away, so scores and weights stay the model's and at most K experts are used. Its best expert is always used.
    """
    return _cut(params, cfg, "threshold", 0.0, target_zero_ratio)


def _cut(
    params: TransformerParams, cfg: TransformerConfig, dynamic: str, start: float, target: float
) -> tuple[TransformerParams, TransformerConfig]:
    old = _static(cfg)
    if not 0 < target < 1 - 1 / old.top_k + 1e-9:
        raise ZedaError(
            f"target_zero_ratio {target} must lie between 0 and {1 - 1 / old.top_k:.3f}: the best of {old.top_k} slots "
            "is always used"
        )

    def add(mixture: MoEParams, first: int) -> MoEParams:
        layers, _, slots = mixture.router.shape
        limits = jnp.zeros((layers, slots), jnp.float32) if dynamic == "threshold" else None
        cuts = jnp.full((layers,), start, jnp.float32)
        return dataclasses.replace(mixture, router_cut=cuts, router_threshold=limits)

    how = dataclasses.replace(old, dynamic=dynamic, free_share=float(target))
    return map_mixtures(params, add), with_routing(cfg, how)


def null_experts(
    params: TransformerParams,
    cfg: TransformerConfig,
    *,
    zero_experts: int,
    target_zero_ratio: float = 0.5,
    key: Key[Array, ""],
) -> tuple[TransformerParams, TransformerConfig]:
    """AdaMoE: `moe.zeda.convert`, but the weight of null slots is handed back to the chosen experts.

    Train with LossConfig(switch=c, pool_free=True): the null slots share one load, every expert has its own. The source
    raises K and draws the new router rows at random; K stays here, and rows are drawn like the old ones.
    """
    _static(cfg)
    params, cfg = convert(params, cfg, zero_experts=zero_experts, target_zero_ratio=target_zero_ratio, key=key)
    assert cfg.moe is not None
    return params, with_routing(cfg, dataclasses.replace(cfg.moe.routing, redistribute=True))


def moe_plus_plus(
    params: TransformerParams,
    cfg: TransformerConfig,
    *,
    zero_experts: int,
    target_zero_ratio: float = 0.5,
    key: Key[Array, ""],
) -> tuple[TransformerParams, TransformerConfig]:
    """MoE++: one zero slot, one copy slot, the others constant experts; logits get those of the layer below.

    Train with LossConfig(switch=c): its loss on single slots, weighted to the target. Constant vectors, their mixers
    and the gating residual begin as zeros, so that experts keep their logits.

    Raises:
        ZedaError: as `convert`, and fewer than 3 slots.
    """
    _static(cfg)
    if zero_experts < 3:
        raise ZedaError(f"zero_experts {zero_experts} must be at least 3: a zero, a copy and a constant one")
    params, cfg = convert(params, cfg, zero_experts=zero_experts, target_zero_ratio=target_zero_ratio, key=key)
    assert cfg.moe is not None
    constant = zero_experts - 2

    def add(mixture: MoEParams, first: int) -> MoEParams:
        layers, width, slots = mixture.router.shape
        dtype = mixture.router.dtype
        return dataclasses.replace(
            mixture,
            constants=jnp.zeros((layers, constant, width), dtype),
            mixers=jnp.zeros((layers, constant, 2, width), dtype),
            router_residual=jnp.zeros((layers, slots, slots), jnp.float32),
        )

    free = (("zero", 1), ("copy", 1), ("mixed", constant))
    how = dataclasses.replace(cfg.moe.routing, free=free, redistribute=True, gating_residual=True)
    return map_mixtures(params, add), with_routing(cfg, how)


def calibrate(
    params: TransformerParams, cfg: TransformerConfig, batches: Sequence[Mapping[str, Any]], *, steps: int = 24
) -> TransformerParams:
    """The cuts at which `RoutingConfig.free_share` of every layer's slots are left out, by bisection in all layers side
    by side; on `batches` of training text (tokens, positions, segments [B, S]), never on what is tested.

    Raises:
        ZedaError: routers without a cut.
    """
    how = None if cfg.moe is None else cfg.moe.routing
    if how is None or how.dynamic is None or how.free_share is None:
        raise ZedaError(f"family {cfg.family!r} has no router with a cut and a target; make one with top_p, thresholds")
    together = {name: jnp.concatenate([b[name] for b in batches]) for name in ("tokens", "positions", "segments")}

    @jax.jit
    def left_out(params: TransformerParams) -> Float[Array, " L"]:
        real = together["segments"] > 0
        index = apply(
            params, together["tokens"], cfg=cfg, positions=together["positions"], segments=together["segments"],
            valid=real, consecutive=True,
        ).routing  # fmt: skip
        return zero_ratio(index.reshape(len(index), -1, index.shape[-1]), how.experts, valid=real.reshape(-1))

    low, high = jnp.zeros(cfg.mixtures), jnp.ones(cfg.mixtures)
    for _ in range(steps):
        middle = (low + high) / 2
        more = left_out(_set_cuts(params, middle)) > how.free_share  # too much is left out
        raise_it = more if how.dynamic == "top_p" else ~more
        low, high = jnp.where(raise_it, middle, low), jnp.where(raise_it, high, middle)
    return _set_cuts(params, (low + high) / 2)


def _set_cuts(params: TransformerParams, cuts: Float[Array, " L"]) -> TransformerParams:
    def change(mixture: MoEParams, first: int) -> MoEParams:
        return dataclasses.replace(mixture, router_cut=cuts[first : first + mixture.router.shape[0]])

    return map_mixtures(params, change)


def cuts(params: TransformerParams) -> Float[Array, " L"]:
    """Every layer's cut: p of top-p, or what is added to the thresholds."""
    return jnp.concatenate([mixture.router_cut for mixture in mixtures_of(params)])


def _static(cfg: TransformerConfig) -> RoutingConfig:
    if cfg.moe is None:
        raise ZedaError(f"family {cfg.family!r} has no mixture of experts")
    how = cfg.moe.routing
    if how.free or how.dynamic or how.selection != "top_k":
        raise ZedaError(
            f"selection {how.selection!r}, free {how.free}, dynamic {how.dynamic!r}: start from a static top_k"
        )
    return how
