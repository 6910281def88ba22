"""ZEDA (2605.18643): a trained mixture of experts made to skip slots, by experts whose output is zero.

    student, scfg = convert(params, cfg, zero_experts=64, target_zero_ratio=0.5, key=key)
    loss = LossConfig(switch=0.0, router_z=0.0, group=0.1)   # stage 1: language_model_loss on the teacher's own text
    partial(distillation_loss, cfg=scfg, teacher_cfg=cfg, loss=loss)   # stage 2: moe.distill, on the student's text
    static(scfg)                                             # the original model again, bit for bit

K does not change: a slot won by a zero expert costs nothing and adds nothing, and its weight is not handed back to the
others, so a token uses between 0 and K experts. `examples/zeda.py` runs conversion, both stages and the comparisons.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from moe.layers.moe import MoEParams
from moe.models.transformer import TransformerConfig, TransformerParams, map_mixtures
from moe.params import key_for
from moe.routing import RoutingConfig

KINDS = ("zero", "copy", "constant")
"""What `convert` can add; MoE++'s own mixture of slots is `moe.dynamic.moe_plus_plus`."""


class ZedaError(ValueError):
    """A model or a target that cannot be converted. The message names the value and the remedy."""


def convert(
    params: TransformerParams,
    cfg: TransformerConfig,
    *,
    zero_experts: int,
    target_zero_ratio: float = 0.5,
    key: Key[Array, ""],
    kind: str = "zero",
    selection_bias: bool = False,
) -> tuple[TransformerParams, TransformerConfig]:
    """The dynamic form of a static mixture: every router gets `zero_experts` more columns, everything else is shared.

    New columns are Gaussian with the mean and the standard deviation (unbiased) of the old ones, input by input, and
    so is the selection bias where there is one (spec section 2.1): a new slot looks like a typical expert and takes
    about Z / (E + Z) of the slots at once. Old columns stay bit for bit.

    Args:
        params, cfg: softmax or sigmoid routers, with selection "top_k" (GLM-4.7-Flash: one group).
        zero_experts: Z, e.g. half of the experts.
        target_zero_ratio: share of all slots that the group loss steers zero experts to; kept as
            `RoutingConfig.free_share`, see `zero_weight`.
        key: each layer draws from its own, named by its number.
        kind: what the new slots do, "zero", "copy" (adds weight * x) or "constant" (a learnt vector, first 0; ours).
        selection_bias: gives routers without one a bias of zeros, for the bias controllers of
            `moe.objectives.balance_by_bias`.

    Raises:
        ZedaError: no mixture, slots without parameters already there, another selection, a number that cannot be.
    """
    if cfg.moe is None:
        raise ZedaError(f"family {cfg.family!r} with layers {set(cfg.layers)} has no mixture of experts to convert")
    old = cfg.moe.routing
    if old.free:
        raise ZedaError(f"the routers have parameter-free slots already: {old.free}; convert the model without them")
    if old.dynamic or old.gating_residual:
        raise ZedaError(
            f"the routers are dynamic already ({old.dynamic!r}, gating_residual {old.gating_residual}); convert a "
            "static model"
        )
    if old.selection != "top_k":
        raise ZedaError(
            f"selection {old.selection!r} has groups that zero experts do not belong to; only 'top_k' works"
        )
    if kind not in KINDS:
        raise ZedaError(f"kind {kind!r} is not one of {', '.join(map(repr, KINDS))}")
    if zero_experts < 1:
        raise ZedaError(f"zero_experts {zero_experts} must be at least 1; half of the {old.experts} experts is usual")
    if not 0 < target_zero_ratio < 1:
        raise ZedaError(f"target_zero_ratio {target_zero_ratio} must lie between 0 and 1; 0.5 skips half of the slots")
    new = dataclasses.replace(
        old,
        free=((kind, zero_experts),),
        free_share=float(target_zero_ratio),
        selection_bias=old.selection_bias or selection_bias,
    )

    def widen(mixture: MoEParams, first: int) -> MoEParams:
        layers, _, experts = mixture.router.shape
        keys = [key_for(key, f"router/{first + layer}") for layer in range(layers)]
        router = _widened(mixture.router, keys, zero_experts)
        bias = mixture.router_bias
        if bias is not None:
            bias = _widened(bias, [jax.random.fold_in(one, 1) for one in keys], zero_experts)
        elif selection_bias:
            bias = jnp.zeros((layers, experts + zero_experts), jnp.float32)
        width = mixture.router.shape[1]
        constants = jnp.zeros((layers, zero_experts, width), mixture.router.dtype) if kind == "constant" else None
        return dataclasses.replace(mixture, router=router, router_bias=bias, constants=constants)

    return map_mixtures(params, widen), with_routing(cfg, new)


def _widened(old: jax.Array, keys: list[jax.Array], count: int) -> jax.Array:
    """[L, ..., E] -> [L, ..., E + count], drawn with the mean and deviation over the last axis."""
    wide = old.astype(jnp.float32)
    mean, deviation = wide.mean(-1, keepdims=True), wide.std(-1, keepdims=True, ddof=1)
    noise = jnp.stack([jax.random.normal(key, (*old.shape[1:-1], count)) for key in keys])
    return jnp.concatenate([old, (mean + deviation * noise).astype(old.dtype)], -1)


def static(cfg: TransformerConfig, *, masked: bool = True) -> TransformerConfig:
    """The same parameters with zero experts never chosen (use_zce_mask): logits equal those of the model before
    `convert` bit for bit, as the products are the same. masked=False: dynamic again.
    """
    if cfg.moe is None or not cfg.moe.routing.free:
        raise ZedaError("the model has no parameter-free slots to mask; convert it first")
    return with_routing(cfg, dataclasses.replace(cfg.moe.routing, free_masked=masked))


def fewer_experts(cfg: TransformerConfig, top_k: int) -> TransformerConfig:
    """The static baseline: the same parameters with the `top_k` best experts of every token."""
    if cfg.moe is None:
        raise ZedaError(f"family {cfg.family!r} has no mixture of experts")
    return with_routing(cfg, dataclasses.replace(cfg.moe.routing, top_k=top_k))


def with_routing(cfg: TransformerConfig, routing: RoutingConfig) -> TransformerConfig:
    """The model with other routers."""
    assert cfg.moe is not None
    return dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, routing=routing))


def zero_weight(experts: int, zero_experts: int, target_zero_ratio: float) -> float:
    """w with w Z / (E + w Z) = target: how many experts' worth a zero expert counts in the group loss. The paper's
    w = 2 with Z = E / 2 is a target of 0.5.
    """
    if not 0 < target_zero_ratio < 1 or min(experts, zero_experts) < 1:
        raise ZedaError(
            f"target_zero_ratio {target_zero_ratio} must lie between 0 and 1, experts {experts} and zero_experts "
            f"{zero_experts} be at least 1"
        )
    return target_zero_ratio * experts / ((1 - target_zero_ratio) * zero_experts)


def group_loss(
    scores: Float[Array, "T S"], selected: Int[Array, "T K"], n_real: int, *, w: float, alpha: float
) -> Float[Array, ""]:
    """L_GA of one layer, from plain arrays (spec section 2.2; training uses `moe.routing.group_loss`, which knows
    padding and accumulation).

        alpha * (N + w Z) * (f_E P_E / N + f_Z P_Z / (w Z))

    f counts slots, without gradient; P is the mean probability of each group. alpha at the fixed point f = P = target.

    Args:
        scores: probabilities that sum to 1 over all N + Z slots (sigmoids over their sum).
        selected: the K best of `scores`, without selection bias.
        n_real: N.
    """
    n_zero = scores.shape[-1] - n_real
    if n_zero < 1 or n_real < 1 or w <= 0:
        raise ZedaError(f"scores of {scores.shape[-1]} slots, n_real {n_real}, w {w}: need zero experts and w > 0")
    zero_share = jax.lax.stop_gradient((selected >= n_real).mean(dtype=jnp.float32))
    p_real, p_zero = scores[..., :n_real].sum(-1).mean(), scores[..., n_real:].sum(-1).mean()
    total = n_real + w * n_zero
    return alpha * total * ((1 - zero_share) * p_real / n_real + zero_share * p_zero / (w * n_zero))


def zero_ratio(
    selected: Int[Array, "*L T K"], n_real: int, *, valid: Bool[Array, " T"] | None = None
) -> Float[Array, "*L"]:
    """Share of the slots that parameter-free experts won, per layer: the share of expert FLOPs saved.

    Args:
        selected: [T, K] of one layer, or [L, T, K] (token axes flattened) of several.
        n_real: N.
        valid: False marks padding, which counts neither way.
    """
    skipped = (selected >= n_real).mean(-1, dtype=jnp.float32)
    if valid is None:
        return skipped.mean(-1)
    return jnp.where(valid, skipped, 0).sum(-1) / jnp.maximum(valid.sum(), 1)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """How the controller stands, arrays [L]: one entry for each mixture.

    Attributes:
        target: wanted share of parameter-free slots.
        zero_ratio: their share.
        max_violation, avg_violation: of the experts' loads among themselves (spec section 2.4).
        unused: experts that no token used.
        all_skipped: share of the tokens all of whose slots were parameter-free.
    """

    target: float
    zero_ratio: Float[np.ndarray, " L"]
    max_violation: Float[np.ndarray, " L"]
    avg_violation: Float[np.ndarray, " L"]
    unused: Int[np.ndarray, " L"]
    all_skipped: Float[np.ndarray, " L"]

    def __str__(self) -> str:
        rows = [f"target {self.target:.3f}", "layer  zero    max_viol  avg_viol  unused  all_skipped"]
        for i, ratio in enumerate(self.zero_ratio):
            rows.append(
                f"{i:5d}  {ratio:.3f}  {self.max_violation[i]:8.3f}  {self.avg_violation[i]:8.3f}  {self.unused[i]:6d}"
                f"  {self.all_skipped[i]:.3f}"
            )
        return "\n".join(rows)


def layer_report(
    selected: Int[np.ndarray, "L *b K"], routing: RoutingConfig, *, valid: Bool[np.ndarray, "*b"] | None = None
) -> LayerReport:
    """Per-layer shares and loads of recorded slots (`Output.routing`, `Completion.routing`)."""
    flat = np.asarray(selected).reshape(len(selected), -1, selected.shape[-1])
    kept = np.ones(flat.shape[1], bool) if valid is None else np.asarray(valid).reshape(-1)
    flat = flat[:, kept]
    loads = load_shares(flat, routing.experts) * routing.experts  # 1: the mean
    return LayerReport(
        target=routing.free_share or 0.0,
        zero_ratio=(flat >= routing.experts).mean((1, 2)),
        max_violation=(loads - 1).max(1),
        avg_violation=np.abs(loads - 1).mean(1),
        unused=(loads == 0).sum(1),
        all_skipped=(flat >= routing.experts).all(-1).mean(1),
    )


def load_shares(selected: Int[np.ndarray, "L T K"], experts: int) -> Float[np.ndarray, "L E"]:
    """Share of the slots with an expert that each expert won, per layer; even where there is none."""
    flat = np.asarray(selected).reshape(len(selected), -1)
    counts = np.stack([np.bincount(one[one < experts], minlength=experts) for one in flat]).astype(float)
    total = counts.sum(1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), 1 / experts)


def load_divergence(a: Float[np.ndarray, "L E"], b: Float[np.ndarray, "L E"]) -> Float[np.ndarray, " L"]:
    """Jensen-Shannon divergence of two models' loads in nats, per layer: 0 where experts are used alike, at most log 2.
    What ZEDA's group loss keeps small and a loss on single experts does not.
    """

    def relative(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(q > 0, q, 1)), 0).sum(-1)

    middle = (a + b) / 2
    return (relative(a, middle) + relative(b, middle)) / 2
