"""Which experts a token goes to, with which weights; the balance losses, statistics and replay that go with it.

    cfg = RoutingConfig(experts=128, top_k=8)                           # Qwen3-MoE
    routing = route(x @ w_router, cfg)                                  # [T, E] -> index [T, K], weights [T, K]
    loss = {"lm": nll, "balance": switch_loss(routing, cfg, coefficient=1e-3)}

The slots of a layer are its E experts, then Z parameter-free ones (`RoutingConfig.free`): index i < E is an expert,
E <= i < E + Z a slot without parameters, and i == E + Z ("nowhere") a slot of a padding token. Whoever dispatches sorts
every index >= E past the last group: such slots never meet a matrix.

All arithmetic here is float32, whatever the dtype of the logits. `*b` stands for any number of token axes, usually T.

Published routers as settings (everything else at its default):

    Qwen3-MoE, Mixtral           experts, top_k
    ZEDA on Qwen3 (2605.18643)   experts, top_k, free=(("zero", E // 2),)
    Intern-S1-Pro (2603.25040)   experts, top_k=8, selection="per_group", n_group=8, straight_through=True
    DeepSeek-V2                  renormalise=False, selection="group_limited", group_score="max", scaling
    DeepSeek-V3, GLM-4.7-Flash   scoring="sigmoid", selection_bias=True, scaling; n_group > 1: selection="group_limited"
    LongCat-Flash (2509.01322)   renormalise=False, selection_bias=True, free=(("copy", Z),), scaling=6.0
    gpt-oss                      softmax_over="chosen"
    AdaMoE (2406.13233)          free=(("zero", Z),), redistribute=True
    MoE++ (2410.07348)           free=(("zero", 1), ("copy", 1), ("mixed", Z - 2)), redistribute, gating_residual
    top-p (2403.07652)           dynamic="top_p";  DynMoE (2405.14297): dynamic="threshold"
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from moe.params import Param
from moe.training import Mean

FREE_KINDS = ("zero", "copy", "constant", "mixed")
"""What a slot without an expert puts out for a token x: 0, x itself, a vector v that it is handed, or MoE++'s constant
expert, a_1 x + a_2 v with a = softmax(W x).
"""
DYNAMIC = ("top_p", "threshold")


class RoutingError(ValueError):
    """A router setting, or an input of `route`, that cannot be honoured. The message names the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
    """How logits become experts and weights.

    Attributes:
        experts: E, experts with parameters.
        top_k: K, slots of a token.
        scoring: "softmax" or "sigmoid" of the logits.
        softmax_over: "all" scores all slots, then takes the K best (Qwen3-MoE, DeepSeek-V2); "chosen" takes the K best
            logits and weights them by the softmax over these K (gpt-oss, ZEDA's Megatron). With `renormalise` the
            weights are equal; the selection bias is added to the scores in the first, to the logits in the second.
        renormalise: weights of a token sum to `scaling`. Parameter-free slots are part of the sum (ZEDA section 2.1:
            what they win is not handed back to the experts).
        scaling: factor on the weights (routed_scaling_factor).
        selection: "top_k" over all slots; "group_limited", over the `topk_group` best of `n_group` groups (DeepSeek-V2,
            V3); "per_group", the K / n_group best of each group (Intern-S1-Pro: K = n_group, exactly one of each).
        n_group: groups of E / n_group consecutive experts each.
        topk_group: groups kept by "group_limited".
        group_score: what ranks groups: "max" (DeepSeek-V2) or "top2", the sum of the two best (DeepSeek-V3, GLM).
        selection_bias: `route` takes a bias [E + Z] (e_score_correction_bias) that decides who is chosen, never the
            weights, and gets no gradient (2408.15664).
        jitter: half-width, in logits, of uniform noise on the selection when `route` has an `rng`. Ours: Switch
            multiplies the router's input, which moves the weights too; here they stay those of the clean logits, so
            that replaying a recorded index gives the recorded weights.
        free: parameter-free slots after the experts, as (kind, how many) of FREE_KINDS; zce_types and zce_nums of ZEDA.
        free_share: share of the slots that training steers towards doing nothing, because a parameter-free slot won
            them (`moe.zeda`) or because `dynamic` left them out; None: no target.
        redistribute: the weight of "zero" slots is handed back to the other chosen slots (AdaMoE, MoE++).
        dynamic: which of the K chosen slots are used at all, the best one always; the others are nowhere. "top_p": the
            shortest prefix whose probabilities sum to `cut` (2403.07652). "threshold": those whose score exceeds a
            learnt threshold of their expert plus `cut`, with a straight-through gradient (DynMoE).
        gating_residual: `route`'s logits get those of the mixture below, by a learnt matrix (MoE++; `moe.layers.moe`).
        free_masked: the parameter-free slots stay in the router and are never chosen: `routed` is the layer without
            them (ZEDA's use_zce_mask).
        straight_through: dense gradient for the router, see `route`. Softmax only.
    """

    experts: int
    top_k: int
    scoring: str = "softmax"
    softmax_over: str = "all"
    renormalise: bool = True
    scaling: float = 1.0
    selection: str = "top_k"
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "top2"
    selection_bias: bool = False
    jitter: float = 0.0
    free: tuple[tuple[str, int], ...] = ()
    free_share: float | None = None
    free_masked: bool = False
    redistribute: bool = False
    dynamic: str | None = None
    gating_residual: bool = False
    straight_through: bool = False

    def __post_init__(self):
        for name, allowed in (
            ("scoring", ("softmax", "sigmoid")),
            ("softmax_over", ("all", "chosen")),
            ("selection", ("top_k", "group_limited", "per_group")),
            ("group_score", ("max", "top2")),
            ("dynamic", (None, *DYNAMIC)),
        ):
            if getattr(self, name) not in allowed:
                raise RoutingError(f"{name} {getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}")
        if self.experts < 1:
            raise RoutingError(f"experts {self.experts} must be at least 1")
        for kind, number in self.free:
            if kind not in FREE_KINDS:
                raise RoutingError(f"kind {kind!r} in free is not one of {', '.join(map(repr, FREE_KINDS))}")
            if number < 1:
                raise RoutingError(f"free {self.free} has {number} slots of kind {kind!r}; give at least 1 or drop it")
        if (self.free_masked or (self.free_share is not None and self.dynamic is None)) and not self.free:
            raise RoutingError(
                f"free_share {self.free_share}, free_masked {self.free_masked} have no meaning without free slots"
            )
        if self.redistribute and not (self.renormalise or self.softmax_over == "chosen"):
            raise RoutingError("redistribute hands weight back among shares that sum to scaling: set renormalise")
        if self.dynamic is not None and (self.selection != "top_k" or self.straight_through):
            raise RoutingError(f"dynamic {self.dynamic!r} needs selection 'top_k' and no straight_through")
        if self.gating_residual and self.selection != "top_k":
            raise RoutingError(f"gating_residual needs selection 'top_k', not {self.selection!r}")
        if self.free_share is not None and not 0 < self.free_share < 1:
            raise RoutingError(f"free_share {self.free_share} must lie between 0 and 1; 0.5 skips half of the slots")
        if self.free_masked and self.top_k > self.experts:
            raise RoutingError(f"top_k {self.top_k} exceeds the {self.experts} experts that free_masked leaves")
        if not 1 <= self.top_k <= self.slots:
            raise RoutingError(
                f"top_k {self.top_k} is outside [1, {self.slots}] (experts {self.experts} + {self.free_slots} "
                "parameter-free slots); lower top_k or add experts"
            )
        if not 0 < self.scaling < float("inf"):
            raise RoutingError(f"scaling {self.scaling} must be positive and finite; 1.0 leaves the weights alone")
        if not 0 <= self.jitter < float("inf"):
            raise RoutingError(f"jitter {self.jitter} must be finite and at least 0; 0.0 turns it off")
        if self.scoring == "sigmoid" and self.softmax_over == "chosen":
            raise RoutingError('softmax_over "chosen" has no meaning for scoring "sigmoid"; leave it at "all"')
        if self.scoring == "sigmoid" and self.straight_through:
            raise RoutingError(
                'straight_through needs scoring "softmax": sigmoid scores do not depend on each other, so that '
                "experts not chosen have no gradient to pass on"
            )
        self._check_groups()

    def _check_groups(self) -> None:
        if self.selection == "top_k":
            if (self.n_group, self.topk_group) != (1, 1):
                raise RoutingError(
                    f'n_group {self.n_group}, topk_group {self.topk_group} have no effect on selection "top_k"; choose '
                    '"group_limited" or "per_group", or leave both at 1'
                )
            return
        if self.free:
            raise RoutingError(
                f'selection {self.selection!r}: the parameter-free slots {self.free} belong to no group; use "top_k"'
            )
        if self.n_group < 1 or self.experts % self.n_group:
            raise RoutingError(f"n_group {self.n_group} does not divide experts {self.experts}; choose a divisor")
        size = self.experts // self.n_group
        if self.selection == "per_group":
            if self.top_k % self.n_group:
                raise RoutingError(
                    f"top_k {self.top_k} is no multiple of n_group {self.n_group}; every group gives equally many, "
                    f"one each for top_k {self.n_group}"
                )
            if self.topk_group != 1:
                raise RoutingError(f'topk_group {self.topk_group} has no effect on "per_group"; leave it at 1')
            return
        if not 1 <= self.topk_group <= self.n_group:
            raise RoutingError(f"topk_group {self.topk_group} is outside [1, n_group {self.n_group}]")
        if self.topk_group * size < self.top_k:
            raise RoutingError(
                f"topk_group {self.topk_group} groups of {size} hold fewer than top_k {self.top_k} experts; raise "
                "topk_group"
            )
        if self.group_score == "top2" and size < 2:
            raise RoutingError(
                f'group_score "top2" needs groups of 2 or more, not {self.experts}/{self.n_group}; use "max"'
            )

    @property
    def free_slots(self) -> int:
        """Z, parameter-free slots of all kinds."""
        return sum(number for _, number in self.free)

    @property
    def slots(self) -> int:
        """E + Z, the width of the router; also the index that means nowhere."""
        return self.experts + self.free_slots

    @property
    def routed(self) -> "RoutingConfig":
        """What `route` is called with: this, or the same without parameter-free slots where they are masked."""
        if not self.free_masked:
            return self
        share = None if self.dynamic is None else self.free_share
        return dataclasses.replace(self, free=(), free_share=share, free_masked=False)

    def of_kind(self, *kinds: str) -> Bool[np.ndarray, " E"]:
        """Which of the E + Z slots are parameter-free ones of these kinds."""
        names = ["expert"] * self.experts + [kind for kind, number in self.free for _ in range(number)]
        return np.isin(np.asarray(names), kinds)


@struct.dataclass
class Routing:
    """Where every token goes.

    Attributes:
        index: chosen slots, best first ("per_group": group by group); E + Z where the token is padding or `dynamic`
            leaves the slot out. This is the record that `route(replay=)` takes.
        weights: what each chosen slot's output is multiplied with; 0 where nowhere, NaN where the token's logits hold a
            NaN or +inf, or a replayed index is outside [0, E + Z].
        scores: softmax or sigmoid of the logits over all slots, without bias, jitter and scaling; 0 for padding.
        logits: as given, in float32; 0 for padding.
        valid: False for padding.
    """

    index: Param  # [*b, K] int32
    weights: Param  # [*b, K] float32
    scores: Param  # [*b, E + Z] float32
    logits: Param  # [*b, E + Z] float32
    valid: Param  # [*b] bool


def check(
    logits: Float[Array, "*b E"],
    cfg: RoutingConfig,
    *,
    bias: Float[Array, " E"] | None = None,
    replay: Int[Array, "*b K"] | None = None,
    valid: Bool[Array, "*b"] | None = None,
) -> None:
    """Looks at values, outside jit, that `route` can only answer with NaN weights.

    Raises:
        RoutingError: naming the first offending token and slot: a NaN or +inf logit (-inf is allowed and takes the slot
            out), fewer than K slots left, a bias that is not finite, a replayed index outside [0, E + Z] or repeated.
            Padding is not looked at.
    """
    _check_shapes(logits, cfg, bias, replay)
    z = np.asarray(logits.astype(jnp.float32)).reshape(-1, cfg.slots)
    kept = np.ones(len(z), bool) if valid is None else np.asarray(valid).reshape(-1)
    wrong = np.argwhere((np.isnan(z) | (z == np.inf)) & kept[:, None])
    if len(wrong):
        token, slot = wrong[0]
        raise RoutingError(
            f"the logit of token {token}, slot {slot} is {z[token, slot]} ({len(wrong)} such logits); look at the "
            "activations before the router, or mark the token as padding with valid="
        )
    left = (z > -np.inf).sum(-1)
    few = np.flatnonzero((left < cfg.top_k) & kept)
    if len(few):
        raise RoutingError(f"token {few[0]} has {left[few[0]]} slots above -inf, top_k is {cfg.top_k}; mask fewer")
    if bias is not None and not np.isfinite(np.asarray(bias)).all():
        slot = int(np.flatnonzero(~np.isfinite(np.asarray(bias)))[0])
        raise RoutingError(f"the selection bias of slot {slot} is {float(bias[slot])}; start again from zeros")
    if replay is not None:
        index = np.asarray(replay).reshape(-1, cfg.top_k)
        outside = np.argwhere(((index < 0) | (index > cfg.slots)) & kept[:, None])
        if len(outside):
            token, slot = outside[0]
            raise RoutingError(
                f"replay of token {token} names slot {index[token, slot]}, outside [0, {cfg.slots}]; record the index "
                f"of parameter-free slots too ({cfg.experts} and above), not -1"
            )
        ordered = np.sort(index, -1)
        twice = np.argwhere((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < cfg.slots) & kept[:, None])
        if len(twice):
            token, slot = twice[0]
            raise RoutingError(f"replay of token {token} names slot {ordered[token, slot]} twice; slots are distinct")


def _check_shapes(logits: jax.Array, cfg: RoutingConfig, bias: jax.Array | None, replay: jax.Array | None) -> None:
    if logits.ndim < 1 or logits.shape[-1] != cfg.slots:
        raise RoutingError(
            f"logits of shape {logits.shape} need {cfg.slots} at the end: {cfg.experts} experts and {cfg.free_slots} "
            "parameter-free slots"
        )
    if (bias is not None) != cfg.selection_bias:
        raise RoutingError(
            "selection_bias is set: hand route a bias of shape " + str((cfg.slots,))
            if bias is None
            else "route got a bias, but selection_bias is not set; set it in the RoutingConfig"
        )
    if bias is not None and bias.shape != (cfg.slots,):
        raise RoutingError(f"bias of shape {bias.shape} must have shape {(cfg.slots,)}, a number for every slot")
    if replay is not None and replay.shape != (*logits.shape[:-1], cfg.top_k):
        raise RoutingError(f"replay of shape {replay.shape} must have shape {(*logits.shape[:-1], cfg.top_k)}")


def _score(logits: jax.Array, cfg: RoutingConfig) -> jax.Array:
    return jax.nn.softmax(logits, -1) if cfg.scoring == "softmax" else jax.nn.sigmoid(logits)


def _select(choice: jax.Array, cfg: RoutingConfig) -> jax.Array:
    """The K best of [*b, E + Z]; of equals the lower index (lax.top_k)."""
    if cfg.selection == "top_k":
        return lax.top_k(choice, cfg.top_k)[1]
    size = cfg.experts // cfg.n_group
    grouped = choice.reshape(*choice.shape[:-1], cfg.n_group, size)
    if cfg.selection == "per_group":
        local = lax.top_k(grouped, cfg.top_k // cfg.n_group)[1]
        index = local + size * jnp.arange(cfg.n_group, dtype=local.dtype)[:, None]
        return index.reshape(*choice.shape[:-1], cfg.top_k)
    rank = grouped.max(-1) if cfg.group_score == "max" else lax.top_k(grouped, 2)[0].sum(-1)
    best = lax.top_k(rank, cfg.topk_group)[1]
    kept = (best[..., None] == jnp.arange(cfg.n_group)).any(-2)
    # -inf, as in DeepSeek's own code and transformers 5.24; older ones fill with 0, which beats negative biased scores.
    return lax.top_k(jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape), cfg.top_k)[1]


def route(
    logits: Float[Array, "*b E"],
    cfg: RoutingConfig,
    *,
    bias: Float[Array, " E"] | None = None,
    rng: Key[Array, ""] | None = None,
    replay: Int[Array, "*b K"] | None = None,
    valid: Bool[Array, "*b"] | None = None,
    cut: Float[Array, ""] | None = None,
    threshold: Float[Array, " E"] | None = None,
) -> Routing:
    """Chooses the slots of every token and weights them.

    A logit of -inf takes its slot out: it is chosen only where fewer than K others are left, then with weight 0 (ZEDA's
    use_zce_mask, the exact static router, is -inf for every parameter-free slot). NaN and +inf give the token NaN
    weights; `check` names them outside jit.

    Renormalised weights are computed as softmax(log score) over the chosen, which equals the published
    s_i / (sum s + 1e-20) and keeps value and gradient finite where all chosen scores underflow.

    straight_through (Intern-S1-Pro, 2603.25040: "straight-through estimator, dense gradient for router training" is
    stated, the formula is unknown; this one is ours, spec section 4): weights as without it, bit for bit, and the
    gradient of p_i * scaling / stop_gradient(sum of the chosen p), p = softmax over *all* slots. With G_i = dL/dw_i and
    S the chosen, dL/dz_j is proportional to p_j (G_j [j in S] - sum_S p_i G_i): slots not chosen learn too, though only
    the chosen run. Without `renormalise` and with softmax_over "all" that gradient is the ordinary one.

    Args:
        logits: [*b, E + Z], any floating dtype.
        bias: [E + Z], when cfg.selection_bias; no gradient.
        rng: draws the jitter; None (evaluation, or cfg.jitter 0) means none.
        replay: recorded `Routing.index`: these slots instead of a selection, weights and gradient from the present
            logits (rollout routing replay, 2510.11370). E + Z means nowhere, weight 0.
        valid: False marks padding: index E + Z, weight 0, no gradient, counted in no loss or statistic, whatever its
            logits hold.
        cut: when cfg.dynamic; no gradient (`moe.objectives.balance_by_bias` moves it).
        threshold: [E + Z], when cfg.dynamic is "threshold"; learns from the slots that are used.

    Raises:
        RoutingError: shapes that do not fit cfg, a bias or cut missing or not asked for.
    """
    _check_shapes(logits, cfg, bias, replay)
    if (cut is not None) != (cfg.dynamic is not None) or (threshold is not None) != (cfg.dynamic == "threshold"):
        raise RoutingError(f"dynamic {cfg.dynamic!r} goes with a cut, and 'threshold' with thresholds; hand both over")
    z = logits.astype(jnp.float32)
    valid = jnp.ones(z.shape[:-1], bool) if valid is None else valid
    z = jnp.where(valid[..., None], z, 0.0)
    scores = _score(z, cfg)
    if replay is None:
        noisy = lax.stop_gradient(z)
        if rng is not None and cfg.jitter:
            noisy = noisy + jax.random.uniform(rng, z.shape, jnp.float32, -cfg.jitter, cfg.jitter)
        choice = noisy if cfg.softmax_over == "chosen" else _score(noisy, cfg)
        if bias is not None:
            choice = choice + lax.stop_gradient(bias.astype(jnp.float32))
        index = _select(jnp.where(noisy == -jnp.inf, -jnp.inf, choice), cfg).astype(jnp.int32)
        if cut is not None:
            index = jnp.where(_used(index, z, scores, cut, threshold, cfg), index, cfg.slots)
    else:
        index = replay.astype(jnp.int32)
    index = jnp.where(valid[..., None], index, cfg.slots)
    safe = jnp.clip(index, 0, cfg.slots - 1)
    chosen = jnp.take_along_axis(z, safe, -1)
    here = (index < cfg.slots) & (chosen != -jnp.inf)
    if cfg.redistribute:
        here &= ~jnp.asarray(cfg.of_kind("zero"))[safe]
    weights = _weights(jnp.where(here, chosen, 0.0), jnp.take_along_axis(scores, safe, -1), here, cfg)
    if threshold is not None:
        margin = jnp.take_along_axis(scores, safe, -1) - threshold.astype(jnp.float32)[safe]
        weights = weights * (1 + jnp.where(here, margin - lax.stop_gradient(margin), 0.0))
    broken = (jnp.isnan(z) | (z == jnp.inf)).any(-1) | ((index < 0) | (index > cfg.slots)).any(-1)
    weights = jnp.where(broken[..., None], jnp.nan, weights)
    return Routing(index, weights, jnp.where(valid[..., None], scores, 0.0), z, valid)


def _used(
    index: jax.Array, z: jax.Array, scores: jax.Array, cut: jax.Array, threshold: jax.Array | None, cfg: RoutingConfig
) -> jax.Array:
    """Which of the chosen slots [*b, K] `dynamic` uses."""
    scores, cut = lax.stop_gradient(scores), lax.stop_gradient(cut.astype(jnp.float32))
    if threshold is None:
        shares = scores if cfg.scoring == "softmax" else lax.stop_gradient(jax.nn.softmax(jax.nn.log_sigmoid(z), -1))
        chosen = jnp.take_along_axis(shares, index, -1)
        used = jnp.cumsum(chosen, -1) - chosen < cut
    else:
        used = jnp.take_along_axis(scores, index, -1) > lax.stop_gradient(threshold.astype(jnp.float32))[index] + cut
    return used | (jnp.arange(cfg.top_k) == 0)


def _weights(z: jax.Array, scores: jax.Array, here: jax.Array, cfg: RoutingConfig) -> jax.Array:
    """Weights [*b, K] from the logits and scores of the chosen slots; 0 where not `here`."""
    scores = jnp.where(here, scores, 0.0)
    share = cfg.renormalise or cfg.softmax_over == "chosen"
    if share:
        log = z if cfg.scoring == "softmax" else jax.nn.log_sigmoid(z)
        peak = lax.stop_gradient(jnp.max(log, -1, keepdims=True, where=here, initial=jnp.finfo(jnp.float32).min))
        # Slots that are nowhere may lie above the peak of those that are: keep exp from overflowing under the mask.
        parts = jnp.where(here, jnp.exp(jnp.where(here, log - peak, 0.0)), 0.0)
        total = parts.sum(-1, keepdims=True)
        weights = parts / jnp.where(total > 0, total, 1.0)  # not jnp.maximum: at total == 1 it halves the gradient
    else:
        weights = scores
    if cfg.straight_through:
        # The floor is for replayed slots whose probabilities have all underflowed.
        among = jnp.maximum(scores.sum(-1, keepdims=True), 1e-20) if share else 1.0
        weights = lax.stop_gradient(weights) + (scores - lax.stop_gradient(scores)) / lax.stop_gradient(among)
    return weights * cfg.scaling


# --------------------------------------------------------------------------------------------------
# Parameter-free slots


def free_output(
    routing: Routing,
    x: Float[Array, "*b D"],
    cfg: RoutingConfig,
    constants: Float[Array, "C D"] | None = None,
    mixers: Float[Array, "M 2 D"] | None = None,
) -> Float[Array, "*b D"]:
    """What the parameter-free slots add to the layer's output, in x's dtype.

    "zero" slots add nothing: their weight is simply gone (ZEDA section 2.1) or with the others (`redistribute`); "copy"
    adds weight * x (LongCat-Flash, MoE++); "constant" adds weight * v; "mixed" adds weight * (a_1 x + a_2 v) with
    a = softmax(W x), MoE++'s (2410.07348, eq. 5) constant expert.

    Args:
        constants: v [C, D], one for each "constant" and "mixed" slot of cfg, in order.
        mixers: W [M, 2, D], one for each "mixed" slot.
    """
    wanted, mixed = (int(cfg.of_kind(*kinds).sum()) for kinds in (("constant", "mixed"), ("mixed",)))
    if (0 if constants is None else len(constants), 0 if mixers is None else len(mixers)) != (wanted, mixed):
        raise RoutingError(
            f"free {cfg.free} has {wanted} slots with a vector; hand free_output constants [{wanted}, D] and mixers "
            f"[{mixed}, 2, D]"
        )
    out = jnp.zeros(x.shape, jnp.float32)
    first, used, turn = cfg.experts, 0, 0
    for kind, number in cfg.free:
        mine = (routing.index >= first) & (routing.index < first + number)
        if kind == "copy":
            weight = jnp.where(mine, routing.weights, 0.0).sum(-1, keepdims=True)
            some = mine.any(-1, keepdims=True)
            out = out + jnp.where(some, weight * jnp.where(some, x, 0.0), 0.0)  # 0 * NaN is NaN
        elif kind == "constant" and constants is not None:
            which = jnp.clip(routing.index - first, 0, number - 1) + used
            rows = jnp.where(mine[..., None], constants.astype(jnp.float32)[which], 0.0)
            out = out + (jnp.where(mine, routing.weights, 0.0)[..., None] * rows).sum(-2)
            used += number
        elif kind == "mixed" and constants is not None and mixers is not None:
            # weight of every such slot for every token: M is a handful, and x is then read once
            slots = jnp.arange(first, first + number)
            weight = jnp.where(routing.index[..., None, :] == slots[:, None], routing.weights[..., None, :], 0).sum(-1)
            some = mine.any(-1, keepdims=True)
            clean = jnp.where(some, x, 0.0).astype(jnp.float32)
            share = jax.nn.softmax(jnp.einsum("...d,mad->...ma", clean, mixers[turn : turn + number]), -1)
            out = out + (weight * share[..., 0]).sum(-1, keepdims=True) * clean
            out = out + (weight * share[..., 1]) @ constants[used : used + number].astype(jnp.float32)
            used, turn = used + number, turn + number
        first += number
    return out.astype(x.dtype)


# --------------------------------------------------------------------------------------------------
# Statistics


def counts(routing: Routing) -> Int[Array, " E"]:
    """How many slots of valid tokens each of the E + Z slots won. Sum it over devices before `update_bias`."""
    return _counts(routing.index, routing.scores.shape[-1])


def _counts(index: jax.Array, slots: int) -> jax.Array:
    hit = index[..., None] == jnp.arange(slots, dtype=index.dtype)
    return hit.sum(range(index.ndim), dtype=jnp.int32)


def real_experts(routing: Routing, cfg: RoutingConfig) -> Int[Array, "*b"]:
    """Experts with parameters that each token uses, 0 to K."""
    return (routing.index < cfg.experts).sum(-1, dtype=jnp.int32)


def probabilities(routing: Routing, cfg: RoutingConfig) -> Float[Array, "*b E"]:
    """Scores that sum to 1 over all slots: the softmax itself, or sigmoids over their sum (DeepSeek-V3 eq. 19, ZEDA
    section 2.2). 0 for padding.
    """
    if cfg.scoring == "softmax":
        return routing.scores
    shares = jax.nn.softmax(jax.nn.log_sigmoid(routing.logits), -1)  # finite where every sigmoid underflows
    return jnp.where(routing.valid[..., None], shares, 0.0)


def entropy(routing: Routing, cfg: RoutingConfig) -> Float[Array, "*b"]:
    """Entropy of each token's probabilities, in nats: 0 to log(E + Z); 0 for padding. For reporting."""
    p = probabilities(routing, cfg)
    return -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), p).sum(-1)


def violation(counts: Int[Array, " E"], experts: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(max, mean) of |c_i - mean| / mean over the real experts (the max without absolute value): 0 is perfect balance.

    ZEDA section 2.4's max_violation and avg_violation; 0 where no expert was used.
    """
    real = counts[:experts].astype(jnp.float32)
    mean = real.mean()
    off = jnp.where(mean > 0, (real - mean) / jnp.where(mean > 0, mean, 1.0), 0.0)
    return off.max(), jnp.abs(off).mean()


def statistics(routing: Routing, cfg: RoutingConfig) -> dict[str, Mean]:
    """Metrics for moe.training, weighted by tokens.

    "entropy" (nats), "free_fraction" (slots without an expert: the share of expert FLOPs saved),
    "real_experts" (per token), "top_weight" (largest weight of a token), "max_violation" and "avg_violation" (see
    `violation`; over micro-batches the mean of each one's own).
    """
    tokens = routing.valid.sum().astype(jnp.float32)
    used = real_experts(routing, cfg)
    free = (routing.index >= cfg.experts).sum(-1)
    worst, typical = violation(counts(routing), cfg.experts)
    return {
        "entropy": Mean.of(entropy(routing, cfg), routing.valid),
        "free_fraction": Mean.of(free / cfg.top_k, routing.valid),
        "real_experts": Mean.of(used.astype(jnp.float32), routing.valid),
        "top_weight": Mean.of(routing.weights.max(-1), routing.valid),
        "max_violation": Mean(worst * tokens, tokens),
        "avg_violation": Mean(typical * tokens, tokens),
    }


# --------------------------------------------------------------------------------------------------
# Balance


def fractions(counts: Int[Array, " E"]) -> Float[Array, " E"]:
    """counts over their sum; 0 where nothing was counted."""
    return counts / jnp.maximum(counts.sum(), 1).astype(jnp.float32)


def switch_loss(
    routing: Routing,
    cfg: RoutingConfig,
    *,
    coefficient: float = 1.0,
    fraction: Float[Array, " E"] | None = None,
) -> Mean:
    """coefficient * (E+Z) * sum_e f_e P_e: f the fraction of slots that e won, P its mean probability.

    Switch Transformer (2101.03961) eq. 4-6 with f over T*K slots, so that uniform routing gives `coefficient` whatever
    K; transformers' load_balancing_loss_func is K times this. The gradient goes through P only.

    Args:
        fraction: f [E + Z] of the whole batch, e.g. `fractions` of counts summed over devices and micro-batches. The
            loss is then a mean over tokens and exact under accumulation; by default f is this call's own, and
            accumulating gives the token-weighted mean of the micro-batches' losses.
    """
    f = fractions(counts(routing)) if fraction is None else fraction
    return _balance(probabilities(routing, cfg), f * cfg.slots, routing, coefficient)


def group_loss(
    routing: Routing,
    cfg: RoutingConfig,
    sizes: Sequence[int],
    *,
    shares: Sequence[float] | None = None,
    coefficient: float = 1.0,
    fraction: Float[Array, " E"] | None = None,
    with_bias: bool = True,
) -> Mean:
    """The switch loss over groups of consecutive slots: balances between groups, leaves the inside of a group alone.

        coefficient * (sum_g v_g) * sum_g f_g P_g / v_g

    ZEDA's L_GA (2605.18643, spec section 2.2) is sizes (N, N_Z), shares (N, w N_Z), with_bias=False: equal to the
    coefficient at its fixed point f_g = P_g = v_g / sum v. Equal groups on devices: sizes (E/G,) * G.

    Args:
        sizes: slots of each group; they sum to E + Z.
        shares: v, wanted proportions, positive; default: the sizes.
        fraction: as in `switch_loss`, per slot.
        with_bias: count the slots as routed; False counts the plain K best scores, without bias, groups and replay.
    """
    if sum(sizes) != cfg.slots or min(sizes) < 1:
        raise RoutingError(f"sizes {tuple(sizes)} must be positive and sum to {cfg.slots} slots, not {sum(sizes)}")
    wanted = tuple(map(float, sizes)) if shares is None else tuple(map(float, shares))
    if len(wanted) != len(sizes) or min(wanted) <= 0:
        raise RoutingError(f"shares {wanted} must be positive, one for each of the {len(sizes)} groups")
    if fraction is None:
        index = routing.index
        if not with_bias:
            plain = lax.top_k(lax.stop_gradient(routing.scores), cfg.top_k)[1]
            index = jnp.where(routing.valid[..., None], plain, cfg.slots)
        fraction = fractions(_counts(index, cfg.slots))
    group = np.repeat(np.arange(len(sizes)), sizes)
    per_group = (fraction[:, None] * np.equal.outer(group, np.arange(len(sizes)))).sum(0)
    factor = (per_group * (sum(wanted) / np.asarray(wanted, np.float32)))[group]
    return _balance(probabilities(routing, cfg), factor, routing, coefficient)


def _balance(p: jax.Array, factor: jax.Array, routing: Routing, coefficient: float) -> Mean:
    each = (p * lax.stop_gradient(factor)).sum(-1)
    return Mean.of(coefficient * each, routing.valid)


def z_loss(routing: Routing, *, coefficient: float = 1.0) -> Mean:
    """coefficient * mean over tokens of logsumexp(logits)^2 (ST-MoE, 2202.08906, eq. 5)."""
    return Mean.of(coefficient * jax.nn.logsumexp(routing.logits, -1) ** 2, routing.valid)


def update_bias(
    bias: Float[Array, " E"], counts: Int[Array, " E"], rate: float, *, experts: int | None = None
) -> Float[Array, " E"]:
    """The selection bias after a step: bias + rate * sign(mean count - count) (2408.15664; DeepSeek-V3's rate: 1e-3).

    Args:
        bias, counts: [E + Z]; counts over the whole batch, summed over devices.
        experts: E when there are parameter-free slots: the rule then sees the experts alone and the bias of the others
            stays (LongCat-Flash leaves zero-experts out of its update; their share is the business of `group_loss`).
    """
    number = bias.shape[0] if experts is None else experts
    if counts.shape != bias.shape or not 1 <= number <= bias.shape[0]:
        raise RoutingError(
            f"bias {bias.shape} and counts {counts.shape} need one shape, with at least experts={number} entries"
        )
    load = counts[:number].astype(jnp.float32)
    return bias.at[:number].add((rate * jnp.sign(load.mean() - load)).astype(bias.dtype))
