"""The learned maps: reports -> field, field -> field six or twelve hours later, field -> any sensor at any point.

    field = background(net, anchors, ...)              # no observation yet
    field = analyse(net, field, tokens, ...)           # reports of a window enter, each with its innovation
    field = step(net, field, ...)                      # one step of the dynamics
    mean, log_spread = read(net, field, tokens, ...)   # what a sensor would report

In situ sensors read the field at their height. Radiometers read its temperature at `heights` and average it with a
normalised weighting over height that is computed from the channel's metadata and the view angle: a channel that was
never trained on has one too, and it can be plotted (`weighting`). A small residual read from the column covers what
temperature does not. Widths and depths, the innovation as an input, moments of the displacement and the rest of the
form are ours; the paper's are unknown.

Shapes: N reports, V variables of a sensor, M anchors, D width, H heads, K key width, Z heights, F metadata.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from earth import geometry, sensors
from earth.kernels.neighbour_attention import attend, collect, pairs
from earth.layers import Dense, apply, dense, layer_norm
from earth.sensors import split_channel
from earth.world.field import Anchors, FieldConfig, place
from earth.world.records import SensorConfig, Tokens
from moe.layers.moe import MoEConfig, MoEParams, moe, moe_specs
from moe.params import Constant, FanIn, Param, ParamSpec, zeros
from moe.routing import RoutingConfig, switch_loss
from moe.sharding import constrain, current_rules, use_rules
from moe.training import Mean

PLACE = 9  # of a report: height (5), latitude (2), solar time (2)
AGE = 2
METADATA = 14
_VERTICAL = 5  # of those that vary with height
CHUNK = 16_384
"""Reports of a sensor read at a time on one device: what lies between is some 5 kB a report at width 96."""
_CLIP = 8.0


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Sizes.

    Attributes:
      width: D. heads: H, divides D; every other head weighs by a displacement. key: K per head.
      expansion: hidden width of the MLPs over D.
      analysis_layers, dynamics_layers: self-attention blocks of an analysis and of a step.
      heights: Z at which radiometers read the field, m.
      experts: E, above 0 the MLP of every dynamics block is a mixture of so many gated MLPs (`moe.layers.moe`), each as
        wide inside. top_k: of them that an anchor goes through.
      ordered: reports come arranged along the anchors (`earth.world.sharding.arrange`), so that no device sorts them.
      operands: dtype of queries, keys and values where points and anchors meet. "bfloat16" halves what devices send
        each other and takes one pass of a TPU's matrix units instead of six; sums stay float32.
      noise: channels of white noise on every anchor that steps and analyses can be given, so that a forecast is one of
        many that are possible; 0: there is one only.
    """

    width: int = 96
    heads: int = 8
    key: int = 8
    expansion: int = 2
    analysis_layers: int = 1
    dynamics_layers: int = 2
    heights: tuple[float, ...] = (
        100.0, 800.0, 1500.0, 2500.0, 4000.0, 5500.0, 7000.0, 9000.0, 11000.0, 13500.0, 16500.0, 20000.0
    )  # fmt: skip
    operands: str = "float32"
    experts: int = 0
    top_k: int = 2
    ordered: bool = False
    noise: int = 0

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if len(self.heights) < 2 or list(self.heights) != sorted(self.heights):
            raise ValueError(f"heights {self.heights} must be at least two, rising")
        if self.experts < 0 or (self.experts and not 1 <= self.top_k <= self.experts):
            raise ValueError(f"experts {self.experts} must be 0 or more, and top_k {self.top_k} in 1..experts")
        if self.operands not in ("float32", "bfloat16"):
            raise ValueError(f"operands {self.operands!r} is not one of float32, bfloat16")
        if self.noise < 0:
            raise ValueError(f"noise {self.noise} must not be negative")


@flax.struct.dataclass
class Attention:
    """Distances are in spacings: `decay` [H] is the log of the factor on their square; `moments` [H, 4]."""

    query: Dense
    key: Dense
    value: Dense
    decay: Param
    moments: Param


@flax.struct.dataclass
class Block:
    """Self-attention of the anchors and an MLP, modulated by clock and place of each anchor."""

    attention: Attention
    out: Dense
    up: Dense
    down: Dense
    forcing: Dense


@flax.struct.dataclass
class SparseBlock:
    """The same with a mixture of experts in place of the MLP."""

    attention: Attention
    out: Dense
    mixture: MoEParams
    forcing: Dense


@flax.struct.dataclass
class Direct:
    """What an in situ sensor is read by: on the way in weights of values, innovations and masks [V, 3, D]; on the way
    out what it adds to the hidden layer of the reading [2 D], mean and log spread.
    """

    embed: Param
    kind: Param
    mean: Dense
    spread: Dense


@flax.struct.dataclass
class Spectral:
    """The same of a radiometer, every channel's weights made from its metadata: on the way in, of the residual that the
    column gives beside temperature, of the log spread, and of the weighting over height.
    """

    embed: Dense
    residual: Dense
    spread: Dense
    weighting: Dense
    weighting_out: Dense


@flax.struct.dataclass
class Sense:
    """One sensor on the way in and out; `prior` [H] is the logit of the background in the average over reports."""

    about: Dense
    hidden: Dense
    attention: Attention
    prior: Param
    mass: Dense
    merge: Dense
    form: Direct | Spectral


@flax.struct.dataclass
class Noise:
    """Noise on the way in: what it does, and how much of it, channel by channel, the field there asks for."""

    mix: Dense
    strength: Dense


@flax.struct.dataclass
class Network:
    """`step_noise`, `analysis_noise`: None where the configuration has no noise."""

    place: Dense
    senses: dict[str, Sense]
    blend: Dense
    blend_out: Dense
    skip: Dense
    analysis: list[Block]
    dynamics: list[Block | SparseBlock]
    reading: Attention
    hidden: Dense
    tendency: Dense
    about: Dense
    gate: Dense
    profile: Dense
    profile_out: Dense
    step_noise: Any = None  # Noise
    analysis_noise: Any = None  # Noise


def _attention(cfg: NetworkConfig, d_in: int) -> Attention:
    pattern = np.zeros((cfg.heads, 4), np.float32)
    pattern[:, 0] = 1.0
    for i in range(1, cfg.heads, 2):
        pattern[i, 0] = 0.0
        pattern[i, 1 + (i // 2) % 2] = 2.0
    spread = np.log(np.geomspace(0.1, 2.0, cfg.heads).astype(np.float32))[
        np.argsort(np.arange(cfg.heads) % 2, kind="stable")
    ]
    return Attention(
        query=dense(cfg.width, cfg.heads * cfg.key, 0.3), key=dense(d_in, cfg.heads * cfg.key, 0.3),
        value=dense(d_in, cfg.width),
        decay=ParamSpec((cfg.heads,), (None,), Constant(spread)),
        moments=ParamSpec((cfg.heads, 4), (None, None), Constant(pattern)),
    )  # fmt: skip


def _block(cfg: NetworkConfig, forcing: int) -> Block:
    d = cfg.width
    return Block(
        attention=_attention(cfg, d), out=dense(d, d, 0.2), up=dense(d, cfg.expansion * d),
        down=dense(cfg.expansion * d, d, 0.2), forcing=dense(forcing, 2 * d, 0.1),
    )  # fmt: skip


def mixture(cfg: NetworkConfig) -> MoEConfig:
    """Of a dynamics block; weights of an anchor sum to 1."""
    return MoEConfig(RoutingConfig(cfg.experts, cfg.top_k), hidden=cfg.expansion * cfg.width)


def _sparse_block(cfg: NetworkConfig, forcing: int) -> SparseBlock:
    d = cfg.width
    return SparseBlock(
        attention=_attention(cfg, d), out=dense(d, d, 0.2), mixture=moe_specs(mixture(cfg), d),
        forcing=dense(forcing, 2 * d, 0.1),
    )  # fmt: skip


def forcing_width(statics: int) -> int:
    return 6 + statics


def network_specs(cfg: NetworkConfig, sensors: tuple[SensorConfig, ...], statics: int) -> Network:
    """Declaration of every parameter; `statics` fixed features of the anchors."""
    d = cfg.width
    hidden = 2 * d

    def sense(s: SensorConfig) -> Sense:
        v, radiometer = len(s.variables), is_radiometer(s)
        if radiometer:
            form: Direct | Spectral = Spectral(
                embed=dense(METADATA, 3 * d), residual=dense(METADATA, d + 1, 0.01),
                spread=dense(METADATA, d + 1, 0.01), weighting=dense(METADATA + 4, 32),
                weighting_out=dense(32, 2, 0.1),
            )  # fmt: skip
        else:
            embed = ParamSpec((v, 3, d), (None, None, "embed"), FanIn(1.0, (-3, -2)))
            kind = ParamSpec((hidden,), (None,), zeros)
            form = Direct(embed, kind, dense(hidden, v, 0.1), dense(hidden, v, 0.1))
        return Sense(
            about=dense(PLACE + AGE + 3, d), hidden=dense(d, d), attention=_attention(cfg, d),
            prior=ParamSpec((cfg.heads,), (None,), zeros), mass=dense(cfg.heads, d, 0.3), merge=dense(d, d),
            form=form,
        )  # fmt: skip

    def noise() -> Noise | None:
        return Noise(dense(cfg.noise, d, 0.2), dense(d, d, 0.1)) if cfg.noise else None

    f = forcing_width(statics)
    return Network(
        place=dense(f, d), senses={s.sensor: sense(s) for s in sensors},
        blend=dense(d, hidden), blend_out=dense(hidden, d, 0.2), skip=dense(d, d),
        analysis=[_block(cfg, f) for _ in range(cfg.analysis_layers)],
        dynamics=[(_sparse_block if cfg.experts else _block)(cfg, f) for _ in range(cfg.dynamics_layers)],
        reading=_attention(cfg, d), hidden=dense(d, hidden), tendency=dense(d, hidden, 0.3),
        about=dense(PLACE + AGE, hidden), gate=dense(PLACE, hidden, 0.3), profile=dense(_VERTICAL, 32),
        profile_out=dense(32, hidden + 1, 0.3), step_noise=noise(), analysis_noise=noise(),
    )  # fmt: skip


def is_radiometer(s: SensorConfig) -> bool:
    return bool(sensors.sensor(s.sensor).column)


def metadata(s: SensorConfig) -> tuple[np.ndarray, np.ndarray]:
    """([V, F] what describes each channel: frequency, bandwidth, polarisation, peak; [V] height of the peak in m)."""
    about = sensors.sensor(s.sensor)
    rows, peaks = [], []
    for name in s.variables:
        c = about.channel(split_channel(name)[1])
        x = math.log10(c.frequency_hz / 1e9)  # 1.4 for 24 GHz, 4.5 for 10 um
        width = 0.0 if not math.isfinite(c.bandwidth) else math.log10(max(c.bandwidth_hz, 1e6) / 1e9)
        peak = 101_325.0 if not math.isfinite(c.peak_pressure) else c.peak_pressure
        y = math.log(peak / 101_325.0)
        waves = [g(k * x) for k in (1.0, 4.0, 16.0) for g in (math.sin, math.cos)]
        pol = [float("V" in c.polarisation), float("H" in c.polarisation), float("Q" in c.polarisation)]
        rows.append([x, *waves, width, *pol, y, math.exp(y), float(c.frequency is None)])
        peaks.append(float(geometry.standard_height(peak)))
    return np.asarray(rows, np.float32), np.asarray(peaks, np.float32)


def place_features(latitude: Any, height: Any) -> Any:
    """[..., 7] of a point: height over 10 km in five smooth functions, sine and cosine of latitude."""
    latitude, height = jnp.broadcast_arrays(latitude, height)
    z = jnp.clip(height / 1e4, -0.1, 3.0)
    lat = jnp.deg2rad(latitude)
    parts = [z, z * z / 2, jnp.exp(-2.5 * jnp.maximum(z, 0.0)), jnp.sin(math.pi * z), jnp.cos(math.pi * z)]
    return jnp.stack([*parts, jnp.sin(lat), jnp.cos(lat)], -1)


def about_report(t: Tokens, end: Any, step: float) -> tuple[Any, Any]:
    """(place and clock [N, PLACE], age [N, AGE])."""
    time = end - jnp.round(t.age * 3600.0).astype(jnp.int32)
    return about_place(t.latitude, t.longitude, t.height, time), age_features(t.age, step)


def about_place(latitude: Any, longitude: Any, height: Any, time: Any) -> Any:
    where = place_features(latitude, height)
    clock = geometry.clock_features(time, longitude)[..., :2]
    return jnp.concatenate([where, jnp.broadcast_to(clock, (*where.shape[:-1], 2))], -1)


def age_features(age: Any, step: float) -> Any:
    x = age / step
    return jnp.stack([x, x * x], -1)


def forcing_features(anchors: Anchors, time: Any) -> Any:
    """[M, 6 + S] of the anchors: latitude, height, solar time, statics."""
    lat = jnp.deg2rad(anchors.latitude)
    parts = [jnp.sin(lat), jnp.cos(lat), jnp.abs(jnp.sin(lat)), anchors.height / 1e4]
    clock = geometry.clock_features(jnp.broadcast_to(time, lat.shape), anchors.longitude)[..., :2]
    return jnp.concatenate([jnp.stack(parts, -1), clock, anchors.statics], -1)


def _heads(x: Any, cfg: NetworkConfig) -> Any:
    return x.reshape(*x.shape[:-1], cfg.heads, -1).astype(cfg.operands)


def _decay(a: Attention, m: int) -> Any:
    return jnp.broadcast_to(jnp.exp(a.decay), (m, a.decay.shape[0]))


def _anchored(h: Any) -> Any:
    """[M, D], split as the anchors are (nothing without a mesh)."""
    return constrain(h, "anchor", "embed")


def _reported(x: Any) -> Any:
    """[N, D], split as the reports are (nothing without a mesh)."""
    return constrain(x, "query", "embed")


def _run(
    block: Block | SparseBlock, h: Any, anchors: Anchors, forcing: Any, *, cfg: NetworkConfig
) -> tuple[Any, list[Mean]]:
    """(the field after a block, the load-balancing loss of its mixture, if it has one)."""
    shift, gain = jnp.split(apply(block.forcing, forcing), 2, -1)
    a = block.attention
    y = layer_norm(h) + shift
    q, k, v = (_heads(apply(to, y), cfg) for to in (a.query, a.key, a.value))
    meet = pairs(anchors.place, anchors.place, anchors.near, frame=anchors.frame)
    mixed = attend(q, k, v, _decay(a, h.shape[0]), meet, coefficient=a.moments).reshape(h.shape)
    h = h + apply(block.out, mixed.astype(h.dtype))
    y = layer_norm(h) * (1.0 + gain)
    if isinstance(block, Block):
        return _anchored(h + apply(block.down, jax.nn.gelu(apply(block.up, y)))), []
    made, balance = _mix(block.mixture, y, cfg)
    return _anchored(h + made), [balance]


def _mix(params: MoEParams, y: Any, cfg: NetworkConfig) -> tuple[Any, Mean]:
    """([M, D], load-balancing loss, 1 where all experts have as much to do): tokens are anchors."""
    how, rules = mixture(cfg), current_rules()
    # What a mixture takes for a batch are here the anchors; the batch of chains is mapped over outside.
    own = rules and rules.replace(activations={"batch": dict(rules.activations)["anchor"]})
    with use_rules(own):
        out, routing = moe(params, y[:, None], cfg=how)
    return out[:, 0], switch_loss(routing, how.routing)


def background(net: Network, anchors: Anchors, time: Any) -> Float[Any, "M D"]:
    """The field before any report: what forcing alone says."""
    return _anchored(apply(net.place, forcing_features(anchors, time)))


def step(net: Network, h: Any, anchors: Anchors, time: Any, *, cfg: NetworkConfig, key: Any = None) -> Any:
    """One step of the dynamics to `time`. Steps and analyses start from the normalised field: the state of a long chain
    stays as large as that of a short one, and a report weighs as much. With a random key, one of many steps that are
    possible: the same for the same key and time.
    """
    return balanced_step(net, h, anchors, time, cfg=cfg, key=key)[0]


def balanced_step(
    net: Network, h: Any, anchors: Anchors, time: Any, *, cfg: NetworkConfig, key: Any = None
) -> tuple[Any, list[Mean]]:
    """`step`, and the load-balancing loss of every mixture in it (Switch Transformer, `moe.routing.switch_loss`)."""
    h, found = _stirred(net.step_noise, layer_norm(h), key, time, cfg), []
    forcing = forcing_features(anchors, time)
    for block in net.dynamics:
        h, balance = _run(block, h, anchors, forcing, cfg=cfg)
        found += balance
    return h, found


def _stirred(noise: Noise | None, h: Any, key: Any, time: Any, cfg: NetworkConfig) -> Any:
    """The field with noise of this key and time in it."""
    if key is None:
        return h
    if noise is None:
        raise ValueError("a random key was given to a network without noise; set NetworkConfig.noise and train with it")
    white = jax.random.normal(jax.random.fold_in(key, jnp.asarray(time).astype(jnp.uint32)), (h.shape[0], cfg.noise))
    return h + apply(noise.mix, _anchored(white)) * jax.nn.softplus(apply(noise.strength, layer_norm(h)))


def read_column(
    net: Network, h: Any, anchors: Anchors, t: Tokens, *, cfg: NetworkConfig, field: FieldConfig, height: Any = None
) -> Any:
    """What the field says at reports, before their height is looked at: [N, D]."""
    a = net.reading
    y = layer_norm(h)
    n = t.latitude.shape[0]
    query = jnp.broadcast_to(_heads(a.query.b, cfg), (n, cfg.heads, cfg.key))
    at = place(field, t.latitude, t.longitude, t.height if height is None else height)
    key, value = (_heads(apply(to, y), cfg) for to in (a.key, a.value))
    meet = pairs(at, anchors.place, t.near, frame=anchors.frame, ordered=cfg.ordered)
    out = attend(query, key, value, _decay(a, h.shape[0]), meet, coefficient=a.moments)
    return _reported(out.reshape(n, -1).astype(h.dtype))


def hidden_layer(net: Network, column: Any, about: Any, age: Any) -> Any:
    """[..., 2 D]: column and height meet: additively under a gelu, and multiplicatively."""
    x = apply(net.hidden, column) + age[..., :1] * apply(net.tendency, column)
    x = x + apply(net.about, jnp.concatenate([about, age], -1))
    return jax.nn.gelu(x) * (1.0 + apply(net.gate, about))


def read(
    net: Network, h: Any, anchors: Anchors, tokens: Mapping[str, Tokens], end: Any, *, cfg: NetworkConfig,
    field: FieldConfig, sensors: tuple[SensorConfig, ...], step: float, profile: Any,
) -> dict[str, tuple[Any, Any]]:  # fmt: skip
    """{sensor: (mean [N, V], log spread [N, V])} in standard deviations about the normal.

    Args:
      profile: [Z] standard deviation of temperature at the heights, K: the unit of the profile that radiometers weigh.
    """

    def of_sensor(s: SensorConfig, t: Tokens) -> tuple[Any, Any]:
        form = net.senses[s.sensor].form
        column = read_column(net, h, anchors, t, cfg=cfg, field=field)
        about, age = about_report(t, end, step)
        if isinstance(form, Direct):
            x = hidden_layer(net, column, about, age) + form.kind
            return apply(form.mean, x), apply(form.spread, x)
        meta, _ = metadata(s)
        weights = weighting(form, s, t.view_angle, cfg=cfg)  # [N, V, Z]
        temperature = _profile(net, hidden_layer(net, column, about, age), cfg) * profile  # [N, Z]
        mean = jnp.einsum("nvz,nz->nv", weights, temperature) / t.deviation
        w, b = jnp.split(apply(form.residual, meta), [cfg.width], -1)
        r, c = jnp.split(apply(form.spread, meta), [cfg.width], -1)
        return mean + column @ w.T + b[:, 0], column @ r.T + c[:, 0]

    return {s.sensor: _in_chunks(functools.partial(of_sensor, s), tokens[s.sensor]) for s in sensors}


def _in_chunks(read: Callable[[Tokens], Any], t: Tokens) -> Any:
    """`read` of so many reports at a time on one device; all at once where they are few, or split over a mesh."""
    n = t.age.shape[0]
    if n <= CHUNK or current_rules() is not None:
        return read(t)

    def cut(x: Any) -> Any:
        x = jnp.pad(x, ((0, -n % CHUNK), *[(0, 0)] * (x.ndim - 1)), mode="edge")  # the last report again
        return x.reshape(-1, CHUNK, *x.shape[1:])

    found = jax.lax.map(read, jax.tree.map(cut, t))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], found)


def _profile(net: Network, x: Any, cfg: NetworkConfig) -> Any:
    """[N, Z] temperature at the heights: linear in what is read of the column, with weights that are a smooth function
    of height.
    """
    heights = jnp.asarray(cfg.heights)
    at = place_features(jnp.zeros_like(heights), heights)[:, :_VERTICAL]
    weights = apply(net.profile_out, jnp.tanh(apply(net.profile, at)))
    return x @ weights[:, :-1].T / x.shape[-1] ** 0.5 + weights[:, -1]


def weighting(form: Spectral, s: SensorConfig, view_angle: Any, *, cfg: NetworkConfig) -> Any:
    """[N, V, Z] weights over the heights, which sum to 1, of each channel at view angles in degrees.

    They start as a bump about the peak in the channel's metadata, 0.6 wide in ln(p).
    """
    meta, peak = metadata(s)
    z = np.asarray(cfg.heights, np.float32)
    lnp = np.log(geometry.standard_pressure(z) / 101_325.0).astype(np.float32)
    top = np.log(geometry.standard_pressure(peak) / 101_325.0).astype(np.float32)
    gap = lnp[None] - top[:, None]
    features = np.concatenate(
        [
            np.broadcast_to(meta[:, None], (*gap.shape, METADATA)),
            np.stack([gap, gap * gap, np.broadcast_to(lnp, gap.shape), np.exp(np.broadcast_to(lnp, gap.shape))], -1),
        ],
        -1,
    )
    base, slant = jnp.moveaxis(apply(form.weighting_out, jnp.tanh(apply(form.weighting, features))), -1, 0)
    layer = np.log(np.abs(np.gradient(lnp)))
    base = 3.0 * base - gap * gap / (2 * 0.6**2) + layer  # layers are unequal: weights per ln(p), times their depth
    path = 1.0 / jnp.cos(jnp.deg2rad(jnp.clip(view_angle, -70.0, 70.0))) - 1.0
    return jax.nn.softmax(base + path[:, None, None] * slant, -1)


def analyse(
    net: Network, h: Any, anchors: Anchors, tokens: Mapping[str, Tokens], given: Mapping[str, Any],
    expected: Mapping[str, Any], end: Any, *, cfg: NetworkConfig, field: FieldConfig,
    sensors: tuple[SensorConfig, ...], step: float, key: Any = None,
) -> Any:  # fmt: skip
    """The field after the reports of a window.

    Args:
      given: {sensor: [N] which reports may be read}.
      expected: {sensor: [N, V]} what the field before says of them, in the units of the values.
      key: of the noise, as for `step`; None for none.
    """
    y = layer_norm(h)
    total = jnp.zeros_like(h)
    for s in sensors:
        t, sense = tokens[s.sensor], net.senses[s.sensor]
        mask = t.mask & given[s.sensor][..., None]
        value = jnp.where(mask, jnp.clip(t.value, -_CLIP, _CLIP), 0.0)
        innovation = jnp.where(mask, jnp.clip(t.value - expected[s.sensor], -_CLIP, _CLIP), 0.0)
        if isinstance(sense.form, Spectral):
            meta, _ = metadata(s)
            embed = apply(sense.form.embed, meta).reshape(len(meta), 3, -1) / len(meta) ** 0.5
        else:
            embed = sense.form.embed
        seen = mask.astype(h.dtype)
        x = jnp.concatenate([value, innovation, seen], -1) @ jnp.moveaxis(embed, 1, 0).reshape(-1, cfg.width)
        about, age = about_report(t, end, step)
        v = t.view_angle / 60.0
        x = x + apply(sense.about, jnp.concatenate([about, age, jnp.stack([v, v * v, v * 0 + 1], -1)], -1))
        x = _reported(x + apply(sense.hidden, jax.nn.gelu(x)))
        a = sense.attention
        at = place(field, t.latitude, t.longitude, t.height)
        query, keys, value = (_heads(apply(to, of), cfg) for to, of in ((a.query, y), (a.key, x), (a.value, x)))
        meet = pairs(at, anchors.place, t.near, frame=anchors.frame, where=mask.any(-1), ordered=cfg.ordered)
        prior = jnp.broadcast_to(sense.prior, (h.shape[0], cfg.heads))
        found = collect(query, keys, value, _decay(a, h.shape[0]), prior, meet, coefficient=a.moments)
        out, mass = (x.astype(h.dtype) for x in found)
        total = total + apply(sense.merge, out.reshape(h.shape)) + apply(sense.mass, mass)
    x = apply(net.blend, y + total)
    h = _anchored(y + apply(net.blend_out, jax.nn.gelu(x)) + apply(net.skip, total))
    h = _stirred(net.analysis_noise, h, key, end, cfg)
    forcing = forcing_features(anchors, end)
    for block in net.analysis:
        h, _ = _run(block, h, anchors, forcing, cfg=cfg)
    return h
