"""The learned part: tokens at observation coordinates -> latent anchors -> lead-time-conditioned dynamics ->
observation operators.

It corrects the linear propagator in units of that propagator's error, so it starts as the identity on it and learns
what is nonlinear: saturation of extremes, dependence on hour and season, one sensor from another, points without a
station. Widths and depths are ours (the paper's are unknown).

Shapes: B batch, N tokens, R slots, V variables of a stream, M anchors, D width, C channels of all streams, Q queries, H
heads.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from earth import geometry
from earth.field import Anchors, proximity
from earth.geometry import Array
from earth.layers import Dense, apply, dense, layer_norm
from earth.windows import StreamConfig, Tokens
from moe.params import Normal, Param, ParamSpec, ones, zeros
from moe.sharding import constrain

CLOCK = 6
PLACE = 4
LEAD = 8
_CLIP = 8.0
_SITE_KM = 1.0
_SITE_HEIGHT_M = 100.0


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the learned part.

    Attributes:
      width: D.
      heads: H, divides the width.
      encoder_layers: anchor self-attention blocks of the analysis.
      dynamics_layers: lead-conditioned blocks.
      expansion: hidden width of the MLPs over D.
      dropout: of residual branches, in training.
    """

    width: int = 64
    heads: int = 4
    encoder_layers: int = 2
    dynamics_layers: int = 1
    expansion: int = 2
    dropout: float = 0.1

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must lie in [0, 1)")


@flax.struct.dataclass
class Sites:
    """What the analysis remembers of fixed platforms: a query at a platform's own place reads it, a new point finds
    nothing.

    Attributes:
      feature: [..., N, D] embedding of the platform's own window; alive: [..., N] 1 where it reported.
      latitude, longitude, height: [..., N].
    """

    feature: Param  # [..., N, D]
    alive: Param  # [..., N]
    latitude: Param  # [..., N]
    longitude: Param  # [..., N]
    height: Param  # [..., N]


@flax.struct.dataclass
class Block:
    """Pre-norm attention over anchors and MLP, both modulated by a condition vector."""

    query: Dense
    key: Dense
    value: Dense
    out: Dense
    up: Dense
    down: Dense
    modulate: Dense
    decay: Param  # [H] log inverse distance scale of the attention bias
    pair: Param  # [H, M, M] learned bias between anchors


@flax.struct.dataclass
class Network:
    """Parameters of the learned part.

    `embed` has one Dense per stream; `anchor` [M, D] are the anchors' own features (those of the field, not of
    stations). `residual` [] is not
    trained: 1 adds the network's output to the propagator's forecast, 0 makes it a forecast of its own.
    """

    embed: dict[str, Dense]
    anchor: Param
    place: Dense
    clock: Dense
    lead: Dense
    memory: Dense
    gate: Param
    encoder: list[Block]
    dynamics: list[Block]
    query: Dense
    own: Dense
    hidden: Dense
    narrow: Dense
    mean: Dense
    spread: Dense
    residual: Param


def network_specs(cfg: NetworkConfig, streams: tuple[StreamConfig, ...], anchors: int) -> Network:
    """Declaration of every parameter."""
    d = cfg.width
    channels = sum(len(s.variables) for s in streams)

    def block() -> Block:
        return Block(
            query=dense(d, d),
            key=dense(d, d),
            value=dense(d, d),
            out=dense(d, d, 0.1),
            up=dense(d, cfg.expansion * d),
            down=dense(cfg.expansion * d, d, 0.1),
            modulate=dense(d, 2 * d, 0.0),
            decay=ParamSpec((cfg.heads,), (None,), zeros),
            pair=ParamSpec((cfg.heads, anchors, anchors), (None, None, None), zeros),
        )

    return Network(
        embed={s.sensor: dense(2 * len(s.slots) * len(s.variables) + len(s.slots) + PLACE, d) for s in streams},
        anchor=ParamSpec((anchors, d), (None, "embed"), Normal(0.3)),
        place=dense(PLACE, d), clock=dense(CLOCK, d), lead=dense(LEAD, d), memory=dense(d, d, 0.1),
        gate=ParamSpec((d,), (None,), zeros),
        encoder=[block() for _ in range(cfg.encoder_layers)], dynamics=[block() for _ in range(cfg.dynamics_layers)],
        query=dense(PLACE + CLOCK + 2 + LEAD + channels, d), own=dense(d, d), hidden=dense(d, cfg.expansion * d),
        narrow=dense(cfg.expansion * d, d, 0.1), mean=dense(d, channels, 0.01), spread=dense(d, channels, 0.01),
        residual=ParamSpec((), (), ones),
    )  # fmt: skip


def place_features(scale: Float[Array, "2 3"], latitude, longitude, height) -> Float[Array, "*#n 4"]:
    """Centred and scaled latitude, longitude and height, and height saturating at 1 km; clipped to the trained range
    plus a margin.
    """
    lat, lon = (latitude - scale[0, 0]) / scale[1, 0], (longitude - scale[0, 1]) / scale[1, 1]
    z = (height - scale[0, 2]) / scale[1, 2]
    return jnp.clip(jnp.stack([lat, lon, z, 1.0 - jnp.exp(-jnp.maximum(height, 0.0) / 1000.0)], -1), -3.0, 3.0)


def lead_features(lead: Float[Array, "*#b"]) -> Float[Array, "*#b 8"]:
    """Smooth features of a lead time in hours: logarithm, decays from 3 h to 48 h, and the daily cycle."""
    decays = [jnp.exp(-lead / tau) for tau in (3.0, 8.0, 20.0, 48.0)]
    phase = 2 * math.pi * lead / 24.0
    return jnp.stack(
        [jnp.log1p(lead) / 4.0, *decays, jnp.cos(phase), jnp.sin(phase), (lead > 0).astype(lead.dtype)], -1
    )


def dropout(rng: Any, x: Array, rate: float) -> Array:
    if rng is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


def attend(
    block: Block,
    x: Float[Array, "*#b M D"],
    condition: Float[Array, "*#b D"],
    distance: Float[Array, "M M"],
    *,
    cfg: NetworkConfig,
    rng: Any,
) -> Float[Array, "*#b M D"]:
    """One anchor self-attention block. `distance` is in units of the anchors' spacing."""
    keys = (None, None) if rng is None else jax.random.split(rng)
    first, second = jnp.split(apply(block.modulate, condition)[..., None, :], 2, -1)
    y = layer_norm(x) * (1 + first)

    def heads(to: Dense):
        z = apply(to, y)
        return z.reshape(*z.shape[:-1], cfg.heads, -1)

    q, k, v = heads(block.query), heads(block.key), heads(block.value)
    bias = block.pair - jnp.exp(block.decay.astype(jnp.float32) - 2.0)[:, None, None] * distance
    score = jnp.einsum("...ihd,...jhd->...hij", q, k).astype(jnp.float32) / math.sqrt(q.shape[-1]) + bias
    mixed = jnp.einsum("...hij,...jhd->...ihd", jax.nn.softmax(score, -1).astype(x.dtype), v).reshape(x.shape)
    x = x + dropout(keys[0], apply(block.out, mixed), cfg.dropout)
    y = layer_norm(x) * (1 + second)
    return x + dropout(keys[1], apply(block.down, jax.nn.gelu(apply(block.up, y))), cfg.dropout)


def encode(
    net: Network,
    tokens: Mapping[str, Tokens],
    anchors: Anchors,
    scale: Float[Array, "2 3"],
    time: Int[Array, "*#b"],
    memory: Float[Array, "*#b M D"] | None,
    *,
    cfg: NetworkConfig,
    streams: tuple[StreamConfig, ...],
    dtype: Any = jnp.float32,
    rng: Any = None,
) -> tuple[Float[Array, "*#b M D"], Sites]:
    """Analysis: tokens gathered onto anchors by nearness (several sensors add), mixed by anchor self-attention.
    `memory` is an advanced latent.

    Positions of a batch whose platforms stand still may come once, with a leading 1: pairwise distances are then
    computed once too.

    Returns:
      (latent, what is remembered of each fixed platform).
    """
    place = place_features(scale, anchors.latitude, anchors.longitude, anchors.height)
    h = net.anchor.astype(dtype) + apply(net.place, place.astype(dtype))
    sites = []
    for stream in streams:
        t = tokens[stream.sensor]
        seen = t.mask.astype(dtype)
        flat = (*t.value.shape[:-2], -1)
        parts = [
            jnp.clip(t.value, -_CLIP, _CLIP).astype(dtype).reshape(flat),
            (seen - 1).reshape(flat),
            (t.age / 24.0).astype(dtype),
            place_features(scale, t.latitude, t.longitude, t.height).astype(dtype),
        ]
        parts[-1] = jnp.broadcast_to(parts[-1], (*t.age.shape[:-1], PLACE))
        e = apply(net.embed[stream.sensor], jnp.concatenate(parts, -1))  # [..., N, D]
        alive = t.mask.any((-1, -2))
        near = proximity(anchors, t.latitude, t.longitude, t.height) * alive[..., None, :]
        near = near / (near.sum(-1, keepdims=True) + 1e-10)
        h = h + jnp.einsum("...mn,...nd->...md", near.astype(dtype), e)
        if not stream.moving:
            sites.append(Sites(e, alive.astype(jnp.float32), t.latitude, t.longitude, t.height))
    if memory is not None:
        h = h + net.gate.astype(dtype) * apply(net.memory, layer_norm(memory.astype(dtype)))
    h = constrain(h, "batch", "anchor", "embed") if h.ndim == 3 else h
    central = jnp.broadcast_to(anchors.longitude.mean(), time.shape)
    condition = apply(net.clock, geometry.clock_features(time, central).astype(dtype))
    distance = spacing(anchors)
    for i, block in enumerate(net.encoder):
        h = attend(block, h, condition, distance, cfg=cfg, rng=None if rng is None else jax.random.fold_in(rng, i))
    sites = sites or [_nobody(time.shape, cfg.width, dtype)]
    return h, jax.tree.map(lambda *x: jnp.concatenate(x, len(time.shape)), *sites)


def _nobody(batch: tuple[int, ...], width: int, dtype: Any) -> Sites:
    zero = jnp.zeros((*batch, 0))
    return Sites(jnp.zeros((*batch, 0, width), dtype), zero, zero, zero, zero)


def own_features(
    sites: Sites, latitude: Float[Array, "*#b Q"], longitude: Float[Array, "*#b Q"], height: Float[Array, "*#b Q"]
) -> tuple[Float[Array, "*#b Q D"], Float[Array, "*#b Q 1"]]:
    """(mean feature of the platforms at each query's own place, 0..1 how much there is); within about 1 km, 100 m."""
    d = geometry.distance_km(latitude, longitude, sites.latitude, sites.longitude)
    dz = height[..., :, None] - sites.height[..., None, :]
    weight = jnp.exp(-((d / _SITE_KM) ** 2) - (dz / _SITE_HEIGHT_M) ** 2) * sites.alive[..., None, :]
    total = weight.sum(-1, keepdims=True)
    own = jnp.einsum(
        "...qn,...nd->...qd", (weight / jnp.maximum(total, 1.0)).astype(sites.feature.dtype), sites.feature
    )
    return own, jnp.minimum(total, 1.0).astype(sites.feature.dtype)


def evolve(
    net: Network,
    latent: Float[Array, "*#b M D"],
    anchors: Anchors,
    time: Int[Array, "*#b"],
    lead: Float[Array, "*#b"],
    *,
    cfg: NetworkConfig,
    rng: Any = None,
) -> Float[Array, "*#b M D"]:
    """Flow map of the latent field from its analysis at `time` over `lead` hours. One map per lead, so advancing twice
    composes exactly.
    """
    central = jnp.broadcast_to(anchors.longitude.mean(), time.shape)
    valid = time + jnp.round(lead * 3600.0).astype(time.dtype)
    step = apply(net.lead, lead_features(lead).astype(latent.dtype))
    condition = step + apply(net.clock, geometry.clock_features(valid, central).astype(latent.dtype))
    h = latent + step[..., None, :]
    distance = spacing(anchors)
    for i, block in enumerate(net.dynamics):
        h = attend(
            block, h, condition, distance, cfg=cfg, rng=None if rng is None else jax.random.fold_in(rng, 100 + i)
        )
    return h


def decode(
    net: Network,
    latent: Float[Array, "*#b M D"],
    anchors: Anchors,
    scale: Float[Array, "2 3"],
    sites: Sites,
    valid: Int[Array, "*#b"],
    lead: Float[Array, "*#b"],
    explained: Float[Array, "*#b C Q"],
    latitude: Float[Array, "*#b Q"],
    longitude: Float[Array, "*#b Q"],
    height: Float[Array, "*#b Q"],
    *,
    rng: Any = None,
    rate: float = 0.0,
) -> tuple[Float[Array, "*#b Q C"], Float[Array, "*#b Q C"]]:
    """Observation operator: (mean correction, log spread), both in units of the propagator's error, at any point."""
    near = jnp.swapaxes(proximity(anchors, latitude, longitude, height), -1, -2)  # [..., Q, M]
    near = near / near.sum(-1, keepdims=True)
    h = jnp.einsum("...qm,...md->...qd", near.astype(latent.dtype), latent)
    t = jnp.broadcast_to(valid[..., None], (*valid.shape, latitude.shape[-1]))
    sun = geometry.solar_cosine(t, latitude, longitude)
    parts = [
        place_features(scale, latitude, longitude, height),
        geometry.clock_features(t, longitude),
        sun[..., None],
        jnp.maximum(sun, 0.0)[..., None],
        lead_features(lead)[..., None, :],
        jnp.moveaxis(explained, -2, -1),
    ]
    shape = (*h.shape[:-1], -1)
    asked = jnp.concatenate([jnp.broadcast_to(p, (*h.shape[:-1], p.shape[-1])) for p in parts], -1).reshape(shape)
    own, there = own_features(sites, latitude, longitude, height)
    x = layer_norm(h) + apply(net.query, asked.astype(latent.dtype)) + there * apply(net.own, own)
    x = x + apply(net.narrow, dropout(rng, jax.nn.gelu(apply(net.hidden, layer_norm(x))), rate))
    x = layer_norm(x)
    return apply(net.mean, x).astype(jnp.float32), apply(net.spread, x).astype(jnp.float32)


def spacing(anchors: Anchors) -> Float[Array, "M M"]:
    """Distances between anchors over their mean nearest-neighbour distance."""
    d = geometry.distance_km(anchors.latitude, anchors.longitude, anchors.latitude, anchors.longitude)
    d = d + jnp.abs(anchors.height[:, None] - anchors.height) / 1000.0 * 100.0
    m = d.shape[0]
    nearest = jnp.where(jnp.eye(m, dtype=bool), jnp.inf, d).min(-1)
    return d / jnp.maximum(jnp.where(jnp.isfinite(nearest), nearest, 1.0).mean(), 1.0)
