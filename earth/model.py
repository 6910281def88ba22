"""Earth-o1 as a functional model: `assimilate`, `advance`, `observe`.

    state = assimilate(params, None, observations, time, cfg=cfg)        # observations of a window -> analysis
    state = advance(params, state, hours, cfg=cfg)                       # analysis -> field `hours` later
    mean, spread = observe(params, state, queries, cfg=cfg)              # field -> any sensor at any (latitude,
    longitude, height) state = assimilate(params, state, new_observations, later, cfg=cfg)  # cycling: the advanced
    state is the background

All verbs are pure, jit-able and take any leading batch axes. `Params` holds what was fitted in closed form (climate
normals, anchors, kernels, the linear propagator) and the network; the state is a pytree.

A forecast is  normal(q, t) + sd(q) * ( kriged propagator + error scale * network ),  with the spread from the network,
calibrated on validation. The public facts of the paper (2605.06337) fix tokens at observation coordinates, a unified
latent field and dynamics in it; everything else here is ours and labelled so where it is decided.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from earth import field, network, normals, propagator
from earth.field import Anchors, Kernel
from earth.geometry import Array
from earth.network import Network, NetworkConfig, Sites
from earth.normals import Normal
from earth.propagator import Propagator
from earth.windows import Observations, StreamConfig, Tokens
from moe.params import Param, init


@dataclasses.dataclass(frozen=True)
class EarthConfig:
    """Structure of the model; sizes of the fitted parts follow from the data.

    Attributes:
      streams: what is read of each sensor.
      targets: (sensor, variable) whose linear evolution the propagator carries; every other channel's base is its
        normal.
      anchors: at most this many.
      placement: "fitted" to sites and relief, or "global" (Fibonacci).
      levels: heights in m of the global placement.
      leads: knots of the propagator in hours.
      folds: cross-fitting folds.
      penalties: candidates of the propagator's penalty; fewer and smaller ones for clean reports.
      localisation_km: distance over which the propagator's penalty grows; None follows the network's density, see
        `earth.propagator.fit_propagator`.
      network: sizes of the learned part.
      compute: "float32" or "bfloat16" for the network; the rest is float32.
    """

    streams: tuple[StreamConfig, ...]
    targets: tuple[tuple[str, str], ...]
    anchors: int = 48
    placement: str = "fitted"
    levels: tuple[float, ...] = (0.0,)
    leads: tuple[float, ...] = (1.0, 3.0, 6.0, 12.0, 24.0, 48.0)
    folds: int = 4
    penalties: tuple[float, ...] = (300.0, 1000.0, 3000.0, 1e4, 3e4, 1e5, 3e5)
    localisation_km: float | None = None
    network: NetworkConfig = NetworkConfig()
    compute: str = "float32"

    def __post_init__(self):
        if self.placement not in ("fitted", "global"):
            raise ValueError(f"placement {self.placement!r} is neither 'fitted' nor 'global'")
        if self.compute not in ("float32", "bfloat16"):
            raise ValueError(f"compute {self.compute!r} is neither 'float32' nor 'bfloat16'")
        names = [s.sensor for s in self.streams]
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"streams {names} must be distinct and at least one")
        for name in self.targets:
            if tuple(name) not in self.channels:
                raise ValueError(f"target {tuple(name)} is not among the channels {self.channels}")
        if list(self.leads) != sorted(self.leads) or not self.leads or self.leads[0] <= 0:
            raise ValueError(f"leads {self.leads} must rise and be above 0 h")

    @property
    def channels(self) -> tuple[tuple[str, str], ...]:
        """(sensor, variable) of the C channels of the field."""
        return tuple((s.sensor, v) for s in self.streams for v in s.variables)

    @property
    def slots(self) -> int:
        """R of the field's history: the longest of the streams'."""
        return max(len(s.slots) for s in self.streams)

    def span(self, sensor: str) -> slice:
        """Channels of one stream."""
        start = 0
        for s in self.streams:
            if s.sensor == sensor:
                return slice(start, start + len(s.variables))
            start += len(s.variables)
        raise ValueError(f"sensor {sensor!r} is not among the streams {[s.sensor for s in self.streams]}")


@flax.struct.dataclass
class Fitted:
    """Closed-form part of the parameters.

    Attributes:
      normals: climate normal per stream; anchors; kernel over all channels; propagator over the targets.
      scale: [K, C] error of the propagator (1 for channels without one) at the lead knots: the unit of the network's
        output.
      calibration: [K, C] factor on the spread, from validation.
      weight: [E, K, C] share of each member in the forecast, from validation; the rest is the propagator's.
      place: [2, 3] centre and extent of latitude, longitude, height.
    """

    normals: dict[str, Normal]
    anchors: Anchors
    kernel: Kernel
    propagator: Propagator
    scale: Param  # [K, C]
    calibration: Param  # [K, C]
    weight: Param  # [E, K, C]
    place: Param  # [2, 3]


@flax.struct.dataclass
class Params:
    """All parameters; `network` is the trained part (in `earth.forecast` with a leading axis of members)."""

    fitted: Fitted
    network: Network


@flax.struct.dataclass
class State:
    """The field.

    Attributes:
      time: valid time, int32 s; origin: time of the last analysis.
      history: [..., M, R, C] anomalies on the anchors at the slots before `origin`; seen: share of each that came from
        observations.
      analysis: [..., M, D] latent at `origin`; latent: [..., M, D] at `time`.
      sites: what is remembered of fixed platforms at `origin`.
    """

    time: Param  # [...]
    origin: Param  # [...]
    history: Param  # [..., M, R, C]
    seen: Param  # [..., M, R, C]
    analysis: Param  # [..., M, D]
    latent: Param  # [..., M, D]
    sites: Sites

    @property
    def lead(self) -> Float[Array, "*#b"]:
        """Hours since the analysis."""
        return (self.time - self.origin).astype(jnp.float32) / 3600.0


@flax.struct.dataclass
class Queries:
    """Where to read the field: latitude, longitude in degrees, height in m; [..., Q] each."""

    latitude: Param  # [..., Q]
    longitude: Param  # [..., Q]
    height: Param  # [..., Q]


def specs(cfg: EarthConfig, anchors: int) -> Network:
    """ParamSpecs of the trained part for a model with this many anchors."""
    return network.network_specs(cfg.network, cfg.streams, anchors)


def standardise(
    params: Params, observations: Mapping[str, Observations], time: Int[Array, "*#b"], *, cfg: EarthConfig
) -> dict[str, Tokens]:
    """SI observations -> tokens of standardised anomalies about the climate normal."""
    out = {}
    for stream in cfg.streams:
        o = observations[stream.sensor]
        normal = params.fitted.normals[stream.sensor]
        coefficients, log_sd = normals.normal_coefficients(normal, o.latitude, o.longitude, o.height)
        at = time[..., None, None] - jnp.round(o.age * 3600.0).astype(jnp.int32)
        height = jnp.broadcast_to(o.height[..., None], o.age.shape)
        expected = normals.normal_values(normal, coefficients[..., None, :, :], height, at)
        value = (o.value - expected) * jnp.exp(-log_sd)[..., None, :]
        ok = o.mask & jnp.isfinite(value)
        out[stream.sensor] = Tokens(jnp.where(ok, value, 0.0), ok, o.age, o.latitude, o.longitude, o.height)
    return out


def assimilate(
    params: Params,
    state: State | None,
    observations: Mapping[str, Observations],
    time: Int[Array, "*#b"],
    *,
    cfg: EarthConfig,
) -> State:
    """Analysis of a window of observations.

    Args:
      state: the background, advanced to `time`; None starts from the climate normal.
      observations: one `Observations` per stream, ages relative to `time`.
      time: int32 seconds since 2000 (`earth.geometry.seconds`).

    Returns:
      The state at `time`. Where nothing was observed it holds the background's forecast of each slot.
    """
    return assimilate_tokens(params, state, standardise(params, observations, time, cfg=cfg), time, cfg=cfg)


def assimilate_tokens(
    params: Params,
    state: State | None,
    tokens: Mapping[str, Tokens],
    time: Int[Array, "*#b"],
    *,
    cfg: EarthConfig,
    rng: Any = None,
) -> State:
    """`assimilate` after standardisation."""
    fitted = params.fitted
    history, seen = gather_history(fitted, tokens, background(fitted, state, time, cfg=cfg), cfg=cfg)
    analysis, sites = network.encode(
        params.network, tokens, fitted.anchors, fitted.place, time, None if state is None else state.latent,
        cfg=cfg.network, streams=cfg.streams, dtype=jnp.dtype(cfg.compute), rng=rng,
    )  # fmt: skip
    latent = network.evolve(
        params.network, analysis, fitted.anchors, time, jnp.zeros(time.shape), cfg=cfg.network, rng=rng
    )
    return State(time, time, history, seen, analysis, latent, sites)


def gather_history(
    fitted: Fitted, tokens: Mapping[str, Tokens], background: Mapping[str, Any] | None, *, cfg: EarthConfig
) -> tuple[Float[Array, "*#b M R C"], Float[Array, "*#b M R C"]]:
    """(anomalies of all channels on the anchors, share of each that was observed); background None is the climate
    normal.
    """
    history, seen = [], []
    for stream in cfg.streams:
        t = tokens[stream.sensor]
        shape = (*t.value.shape[:-3], fitted.anchors.latitude.shape[0], len(stream.slots), len(stream.variables))
        zero = jnp.zeros(shape)
        before, confidence = (zero, zero) if background is None else (background[stream.sensor], zero + 1.0)
        value, share = field.gather(
            fitted.anchors, t.value, t.mask, t.latitude, t.longitude, t.height, before, confidence
        )
        pad = [(0, 0)] * (value.ndim - 2) + [(0, cfg.slots - len(stream.slots)), (0, 0)]
        history.append(jnp.pad(value, pad))
        seen.append(jnp.pad(share, pad))
    return jnp.concatenate(history, -1), jnp.concatenate(seen, -1)


def background(
    fitted: Fitted, state: State | None, time: Int[Array, "*#b"], *, cfg: EarthConfig, fold: Any = None
) -> dict[str, Float[Array, "*#b M R V"]] | None:
    """What an advanced state says of the slots of every stream's window at `time`, with the propagator of a
    cross-fitting `fold` in training; None without a state.
    """
    if state is None:
        return None
    return {s.sensor: _background(fitted, state, s, time, cfg=cfg, fold=fold) for s in cfg.streams}


def _background(fitted: Fitted, state: State, stream: StreamConfig, time, *, cfg: EarthConfig, fold: Any = None):
    """What the advanced state says of each slot: its old history where the slot predates the old analysis, its forecast
    after.
    """
    span, slots = cfg.span(stream.sensor), jnp.asarray(stream.slots)
    feature = propagator.features(fitted.propagator, fitted.anchors, state.history, state.origin)
    elapsed = (time - state.origin).astype(jnp.float32) / 3600.0
    since = elapsed[..., None] - slots  # [..., R] hours after the old analysis

    def at(lead):
        return linear_field(fitted, feature, state.history, lead, fold)[..., span]

    forecast = jax.vmap(at, in_axes=-1, out_axes=-2)(jnp.maximum(since, 0.0))  # [..., M, R, V]
    nearest = jnp.argmin(jnp.abs(slots + since[..., None]), -1)
    past = jnp.take_along_axis(state.history[..., span], nearest[..., None, :, None], axis=-2)
    return jnp.where((since >= 0)[..., None, :, None], forecast, past)


def linear_field(
    fitted: Fitted, feature, history: Float[Array, "*#b M R C"], lead: Float[Array, "*#b"], fold: Any = None
) -> Float[Array, "*#b M C"]:
    """Propagated anomalies of all channels on the anchors; at lead 0 the analysis itself, in between interpolated to
    the first knot.
    """
    prop = fitted.propagator
    moved = propagator.propagate(prop, feature, jnp.maximum(lead, prop.leads[0]), fold)
    index = jnp.asarray(prop.channels, int)
    now = history[..., 0, :]
    share = jnp.clip(lead / prop.leads[0], 0.0, 1.0)[..., None, None]
    # Channels without a propagator relax to their normal within the first lead.
    ahead = jnp.zeros_like(now).at[..., index].set(moved)
    return now * (1 - share) + ahead * share


def advance(params: Params, state: State, hours: Any, *, cfg: EarthConfig) -> State:
    """The field `hours` later (any real number >= 0). Advancing by a then b equals advancing by a + b: the flow map
    starts from the analysis.
    """
    step = jnp.round(jnp.asarray(hours, jnp.float32) * 3600.0).astype(jnp.int32)
    moved = dataclasses.replace(state, time=state.time + jnp.broadcast_to(step, state.time.shape))
    latent = network.evolve(
        params.network, state.analysis, params.fitted.anchors, state.origin, moved.lead, cfg=cfg.network
    )
    return dataclasses.replace(moved, latent=latent)


def observe(
    params: Params, state: State, queries: Queries, *, cfg: EarthConfig
) -> tuple[Float[Array, "*#b Q C"], Float[Array, "*#b Q C"]]:
    """Predictive mean and standard deviation of every channel (cfg.channels) at the queries and the state's time, in SI
    units, by one member (`earth.forecast.first_member`); `earth.forecast.predict` mixes all.
    """
    z, sd = observe_anomalies(params, state, queries, cfg=cfg)
    means, spreads = [], []
    for stream in cfg.streams:
        normal, span = params.fitted.normals[stream.sensor], cfg.span(stream.sensor)
        coefficients, log_sd = normals.normal_coefficients(normal, queries.latitude, queries.longitude, queries.height)
        at = jnp.broadcast_to(state.time[..., None], z.shape[:-1])
        height = jnp.broadcast_to(queries.height, z.shape[:-1])
        means.append(normals.normal_values(normal, coefficients, height, at) + z[..., span] * jnp.exp(log_sd))
        spreads.append(sd[..., span] * jnp.exp(log_sd))
    return jnp.concatenate(means, -1), jnp.concatenate(spreads, -1)


def observe_anomalies(
    params: Params, state: State, queries: Queries, *, cfg: EarthConfig
) -> tuple[Float[Array, "*#b Q C"], Float[Array, "*#b Q C"]]:
    """`observe` in standardised anomalies."""
    fitted = params.fitted
    feature = propagator.features(fitted.propagator, fitted.anchors, state.history, state.origin)
    base, forecast, log_spread, scale = read(
        params, state, linear_field(fitted, feature, state.history, state.lead), queries, cfg=cfg
    )
    knots = propagator.knot_weights(fitted.propagator.leads, jnp.minimum(state.lead, fitted.propagator.leads[-1]))
    now = jnp.clip(1.0 - state.lead / fitted.propagator.leads[0], 0.0, 1.0)[..., None]
    keep = (now + (1.0 - now) * jnp.einsum("...k,kc->...c", knots, fitted.weight[0]))[..., None, :]
    factor = jnp.einsum("...k,kc->...c", knots, fitted.calibration)[..., None, :]
    return base + keep * (forecast - base), factor * scale * jnp.exp(log_spread)


def read(
    params: Params,
    state: State,
    linear: Float[Array, "*#b M C"],
    queries: Queries,
    *,
    cfg: EarthConfig,
    rng: Any = None,
) -> tuple[Float[Array, "*#b Q C"], Float[Array, "*#b Q C"], Float[Array, "*#b Q C"], Float[Array, "*#b Q C"]]:
    """The parts of a prediction: (kriged linear field, network's forecast, its log spread in units of scale, scale)."""
    fitted = params.fitted
    weight, explained = field.read_weights(
        fitted.kernel, fitted.anchors, queries.latitude, queries.longitude, queries.height
    )
    base = jnp.einsum("...cqm,...mc->...qc", weight, linear)
    correction, log_spread = network.decode(
        params.network,
        state.latent,
        fitted.anchors,
        fitted.place,
        state.sites,
        state.time,
        state.lead,
        explained,
        queries.latitude,
        queries.longitude,
        queries.height,
        rng=rng,
        rate=cfg.network.dropout,
    )
    knots = propagator.knot_weights(fitted.propagator.leads, jnp.minimum(state.lead, fitted.propagator.leads[-1]))
    scale = jnp.einsum("...k,kc->...c", knots, fitted.scale)[..., None, :]
    # Away from every anchor the unexplained share of the variance adds to the error.
    scale = jnp.sqrt(scale**2 + (1.0 - jnp.moveaxis(explained, -2, -1)))
    residual = jax.lax.stop_gradient(params.network.residual)
    forecast = residual * (base + scale * correction) + (1.0 - residual) * correction
    return base, forecast, jnp.clip(log_spread, -4.0, 3.0), scale


def initial_network(rng: Any, cfg: EarthConfig, anchors: int, *, residual: bool = True) -> Network:
    """Freshly drawn network parameters of a member that corrects the propagator (residual) or forecasts by itself."""
    network = init(rng, specs(cfg, anchors))
    return dataclasses.replace(network, residual=jnp.asarray(float(residual)))


def members(networks: list[Network]) -> Network:
    """Stacks independently trained networks on a leading member axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
