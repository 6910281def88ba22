"""Training a sparse language model: next-token cross-entropy, router losses, balance by bias.

    loss_fn = functools.partial(language_model_loss, cfg=cfg, loss=LossConfig())
    step = moe.training.make_train_step(lambda p, batch, rng: loss_fn(p, batch, rng=rng), optimizer)

`batch` is what `moe.data` makes. Everything is handed over as moe.training.Mean: exact under gradient accumulation.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key

from moe import routing as routers
from moe.models.transformer import TransformerConfig, TransformerParams, apply, logits, mixtures_of
from moe.params import Param, path_name
from moe.training import Mean


@struct.dataclass
class TokenLoss:
    """Of every position [*b, S], float32, before any mask.

    Attributes:
        nll: minus the log-probability of the target, in nats.
        log_z: logsumexp of the logits.
        correct: whether the likeliest token is the target.
    """

    nll: Param
    log_z: Param
    correct: Param


def token_loss(
    params: TransformerParams, hidden: Float[Array, "B S D"], targets: Int[Array, "B S"], *, chunk: int | None = 256
) -> TokenLoss:
    """Cross-entropy of the targets, from float32 logits of which only [B, chunk, V] exist at a time.

    The backward computes each chunk's logits again (one more product with the head) instead of keeping them: at
    V = 151,936 the float32 logits of 4,096 tokens are 2.5 GB.

    Args:
        hidden: `Output.hidden`.
        chunk: positions side by side; a sequence that is no multiple is padded. None: all at once, kept.
    """

    def part(hidden: jax.Array, targets: jax.Array) -> TokenLoss:
        z = logits(params, hidden)
        log_z = jax.nn.logsumexp(z, -1)
        chosen = jnp.take_along_axis(z, targets[..., None], -1)[..., 0]
        return TokenLoss(log_z - chosen, log_z, z.argmax(-1) == targets)

    return in_chunks(part, (hidden, targets), chunk)


def in_chunks(function: Callable[..., Any], arrays: Sequence[jax.Array], chunk: int | None) -> Any:
    """function(*arrays) on pieces of `chunk` positions, one after another and each computed again in the backward
    pass; results [B, S] are put together. What is [B, S, V] inside then exists as [B, chunk, V] only.
    """
    batch, length = arrays[0].shape[:2]
    if chunk is None or chunk >= length:
        return function(*arrays)
    if chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1; None takes the whole sequence at once")
    count = -(-length // chunk)
    spare = count * chunk - length

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, spare)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    _, out = jax.lax.scan(lambda _, item: (None, jax.checkpoint(function)(*item)), None, tuple(map(split, arrays)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length], out)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is added to the cross-entropy.

    Attributes:
        z: coefficient of logsumexp(logits)^2, which keeps the logits of the vocabulary near 0 (PaLM 2204.02311: 1e-4).
        switch: coefficient of the load-balancing loss, mean over layers (2101.03961: 1e-2). Every slot is steered to
            the same share, or where `RoutingConfig.free_share` is set, experts to (1 - rho) / E and parameter-free
            slots to rho / Z each (MoE++'s heterogeneous loss, with its tau = (1 - rho) Z / (rho E)).
        pool_free: `switch` sees the parameter-free slots as one (AdaMoE averages their loads).
        router_z: coefficient of the routers' z-loss, mean over layers (2202.08906: 1e-3).
        group: coefficient of ZEDA's two-group loss, *sum* over layers (2605.18643: 0.1), which steers the share of the
            parameter-free slots to `RoutingConfig.free_share` and leaves the balance among experts alone.
        balance: the objective holds the gradient of selection biases. Off, they stay as they are, and gradient
            accumulation is spared a forward pass: this term's weight depends on the routing.
        loads: the metrics hold the load of every expert, thousands of numbers at full size.
        chunk: see `token_loss`.
        remat: recompute each layer in the backward pass.
    """

    z: float = 0.0
    switch: float = 0.01
    router_z: float = 1e-3
    group: float = 0.0
    pool_free: bool = False
    balance: bool = True
    loads: bool = True
    chunk: int | None = 256
    remat: bool = False

    def __post_init__(self):
        for name in ("z", "switch", "router_z", "group"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} {getattr(self, name)} must be finite and at least 0; 0 turns it off")


def language_model_loss(
    params: TransformerParams,
    batch: Mapping[str, Any],
    *,
    cfg: TransformerConfig,
    loss: LossConfig = LossConfig(),
    rng: Key[Array, ""] | None = None,
    sources: Sequence[str] = (),
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """(objective, metrics) for `moe.training.make_train_step`.

    The objective: "nll" in nats per counted token, and, as configured, "z", "switch", "router_z", "group". Where
    routers have a selection bias it also holds "balance", whose value is 0 and whose gradient with respect to each bias
    is the excess of the load: what `balance_by_bias` steps on.

    Metrics: "accuracy", "nll/NAME" of each source, and of each mixture l "entropy/l" (nats), "max_violation/l",
    "load/l/e" (share of the slots that expert e won), and with parameter-free slots "free_fraction/l" (their share).

    Args:
        batch: tokens, targets, segments, positions [B, S] int32, mask [B, S] bool, source [B] int32.
        rng: for routers with jitter.
        sources: names of the values of `source`.
    """

    out = apply(
        params, batch["tokens"], cfg=cfg, positions=batch["positions"], segments=batch["segments"],
        valid=batch["segments"] > 0, consecutive=True, rng=rng, observe=router_observer(loss, cfg), remat=loss.remat,
    )  # fmt: skip
    each = token_loss(params, out.hidden, batch["targets"], chunk=loss.chunk)
    mask = batch["mask"]
    objective = {"nll": Mean.of(each.nll, mask)}
    metrics = {"accuracy": Mean.of(each.correct.astype(jnp.float32), mask)}
    for number, name in enumerate(sources):
        metrics[f"nll/{name}"] = Mean.of(jax.lax.stop_gradient(each.nll), mask & (batch["source"] == number)[:, None])
    if loss.z:
        objective["z"] = Mean.of(loss.z * each.log_z**2, mask)
    terms, reports = router_terms(params, out.observed, loss, cfg)
    return objective | terms, metrics | reports


def router_observer(loss: LossConfig, cfg: TransformerConfig) -> Any:
    """What `apply` is to observe of every mixture for `router_terms`; None for a model without mixtures."""

    def observe(routing: routers.Routing, how: routers.RoutingConfig) -> dict[str, Any]:
        seen = {
            "switch": _switch(routing, how, loss),
            "router_z": routers.z_loss(routing, coefficient=loss.router_z),
            "counts": routers.counts(routing),
            "statistics": routers.statistics(routing, how),
        }
        if loss.group:
            if how.free_share is None or not how.free:
                raise ValueError(f"group {loss.group} needs RoutingConfig.free_share; moe.zeda.convert sets it")
            shares = 1 - how.free_share, how.free_share
            seen["group"] = routers.group_loss(
                routing, how, (how.experts, how.free_slots), shares=shares, coefficient=loss.group, with_bias=False
            )
        return seen

    return observe if cfg.mixtures else None


def _switch(routing: routers.Routing, how: routers.RoutingConfig, loss: LossConfig) -> Mean:
    if how.free_share is None or not how.free:
        return routers.switch_loss(routing, how, coefficient=loss.switch)
    sizes = [1] * how.experts + ([how.free_slots] if loss.pool_free else [1] * how.free_slots)
    each = (1 - how.free_share) / how.experts, how.free_share / how.free_slots
    shares = [each[number >= how.experts] * size for number, size in enumerate(sizes)]
    return routers.group_loss(routing, how, sizes, shares=shares, coefficient=loss.switch)


def router_terms(
    params: TransformerParams, seen: Any, loss: LossConfig, cfg: TransformerConfig
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """(terms of the objective, metrics) of what `router_observer` saw: see `language_model_loss`."""
    objective: dict[str, Mean] = {}
    metrics: dict[str, Mean] = {}
    if not cfg.mixtures:
        return objective, metrics
    assert cfg.moe is not None
    for name in ("switch", "router_z"):
        if getattr(loss, name):
            objective[name] = jax.tree.map(jnp.sum, seen[name])
    if loss.group:  # the sum over layers: means over the same tokens
        objective["group"] = Mean(seen["group"].total.sum(), seen["group"].weight.mean())
    how = cfg.moe.routing.routed
    biases, cuts = selection_biases(params), _leaves(params, "router_cut")
    if biases is not None and loss.balance:
        objective["balance"] = _balance(biases, seen["counts"], cfg)
    if cuts is not None and how.free_share is not None:
        objective["cut"] = _budget(cuts, seen["statistics"]["free_fraction"], how)
    names = ("entropy", "max_violation", *(("free_fraction",) if how.free or how.dynamic else ()))
    for layer in range(cfg.mixtures):
        for name in names:
            metrics[f"{name}/{layer}"] = jax.tree.map(lambda x, at=layer: x[at], seen["statistics"][name])
        counts = seen["counts"][layer].astype(jnp.float32)
        for e in range(cfg.moe.routing.experts if loss.loads else 0):
            metrics[f"load/{layer}/{e}"] = Mean(counts[e], counts.sum())
    return objective, metrics


def selection_biases(params: TransformerParams) -> Float[Array, "L E"] | None:
    """The selection bias of every mixture, or None where routers have none."""
    return _leaves(params, "router_bias")


def _leaves(params: TransformerParams, name: str) -> jax.Array | None:
    found = [leaf for mixture in mixtures_of(params) if (leaf := getattr(mixture, name)) is not None]
    return jnp.concatenate(found) if found else None


# Keeps the balance gradient out of the global norm that clips the others; `balance_by_bias` undoes it.
_TINY = 1e-12


def _balance(biases: jax.Array, counts: jax.Array, cfg: TransformerConfig) -> Mean:
    assert cfg.moe is not None
    how, load = cfg.moe.routing, counts.astype(jnp.float32)
    total = load.sum(-1, keepdims=True)
    wanted = load[:, : how.experts].mean(-1, keepdims=True)
    if how.free_share is not None:
        wanted = total * (1 - how.free_share) / how.experts
    excess = jnp.where(jnp.arange(load.shape[1]) < how.experts, load - wanted, 0)
    value = (excess * (biases[:, : load.shape[1]] - jax.lax.stop_gradient(biases[:, : load.shape[1]]))).sum()
    return Mean(_TINY * value, total.mean())


def _budget(cuts: jax.Array, free: Mean, how: routers.RoutingConfig) -> Mean:
    """The gradient of each layer's cut: the share of slots used too much, or for thresholds its negative."""
    assert how.free_share is not None
    excess = (free.weight - free.total) - (1 - how.free_share) * free.weight  # in tokens: exact over micro-batches
    sign = 1.0 if how.dynamic == "top_p" else -1.0
    return Mean(_TINY * sign * (excess * (cuts - jax.lax.stop_gradient(cuts))).sum(), free.weight.mean())


def balance_by_bias(
    optimizer: optax.GradientTransformation, rate: float = 1e-3, *, rule: str = "sign", cut_rate: float = 0.02
) -> optax.GradientTransformation:
    """`optimizer` for all parameters but the routers' selection biases and cuts, which move by their own rules.

    "sign": rate * sign(mean load - load), `moe.routing.update_bias` (2408.15664; DeepSeek-V3's rate: 1e-3).
    "proportional": rate * ((1 - rho) / E - share of all slots that the expert won), LongCat-Flash's controller
    (2509.01322) of the share rho of parameter-free slots.

    With the "balance" term of `language_model_loss` as gradient, loads are summed over micro-batches and devices like
    any gradient. Where `RoutingConfig.free_share` is set both aim at (1 - rho) / E of all slots for every expert, else
    at the experts' mean. Parameter-free slots keep their bias.

    The cut of a router with `RoutingConfig.dynamic` moves by cut_rate * (share of slots used - (1 - rho)), until rho of
    each layer's slots are left out (ours: published top-p routers fix p and take the share that comes).

    Raises:
        ValueError: another rule.
    """
    rules = {"sign": optax.sign_sgd(rate), "proportional": optax.sgd(rate / _TINY)}
    if rule not in rules:
        raise ValueError(f"rule {rule!r} is not one of {', '.join(map(repr, rules))}")

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: {"router_bias": "bias", "router_cut": "cut"}.get(
                path_name(path).rpartition("/")[2], "rest"
            ),
            params,
        )

    return optax.partition({"bias": rules[rule], "cut": optax.sgd(cut_rate / _TINY), "rest": optimizer}, labels)
