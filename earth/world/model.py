"""Earth-o1 over the globe as a functional model: one field, fed and read by every sensor.

    state = assimilate(params, None, tokens, end, cfg=cfg)    # reports of a window -> analysis at its end
    state = advance(params, state, 2, cfg=cfg)                # two steps of the dynamics
    state = assimilate(params, state, tokens, end, cfg=cfg)   # cycling: the advanced state is the background
    mean, spread = observe(params, state, sensor, queries, cfg=cfg)   # any sensor, any point, up to `step` hours back

The public facts of the paper (2605.06337) fix tokens at observation coordinates, a unified latent field that is not a
grid, and dynamics in it; everything else is ours and labelled so where it is decided. `earth.model` is the other
member of the family: a regional model of stations around a closed-form propagator.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from earth import geometry, layers, store
from earth.neighbours import Neighbourhood
from earth.observations import Reports
from earth.world import network
from earth.world.climate import Climate, climate, fit_climate, pool
from earth.world.field import Anchors, FieldConfig, make_anchors
from earth.world.network import Network, NetworkConfig
from earth.world.records import SensorConfig, Tokens, select
from moe.experts.mlp import ExpertParams
from moe.layers.moe import MoEParams
from moe.params import Param


@dataclasses.dataclass(frozen=True)
class Shared:
    """Sensors that measure the same: one normal is fitted to the reports of all.

    Attributes:
      sensors: names. Those that are fixed keep what their platforms add, and a deviation of their own.
      variables: that are shared among those that have them; None: all that two or more have. The others are fitted to
        the sensor's own reports.
    """

    sensors: tuple[str, ...]
    variables: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """Structure of the model.

    Attributes:
      sensors: what is read and predicted. field: the basis. network: sizes.
      step: hours of a window, and of a step of the dynamics.
      temperature: (sensor, variable) in situ whose normal gives the deviation of temperature with height, the unit of
        what radiometers weigh; None takes 5 K everywhere.
      normals: (sensor, variable, height in m) of normals that the anchors are told: anomalies live on a mean state that
        carries them, and the network knows no longitude to learn it by.
      shared: groups of sensors with one normal, a sensor in one at most.
    """

    sensors: tuple[SensorConfig, ...]
    field: FieldConfig = dataclasses.field(default_factory=FieldConfig)
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    step: float = 12.0
    temperature: tuple[str, str] | None = ("radiosonde", "temperature")
    normals: tuple[tuple[str, str, float], ...] = ()
    shared: tuple[Shared, ...] = ()

    def __post_init__(self):
        names = [s.sensor for s in self.sensors]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"sensors {names} must be at least one, each once")
        grouped = [name for group in self.shared for name in group.sensors]
        bad = [name for name in grouped if name not in names or grouped.count(name) > 1]
        if bad:
            raise ValueError(f"shared: {bad[0]!r} is in two groups, or not among the sensors {names}")
        for group in self.shared:
            have = [v for name in group.sensors for v in self.sensor(name).variables]
            for variable in group.variables or ():
                if have.count(variable) < 2:
                    raise ValueError(f"shared: not two of {group.sensors} have {variable!r}; leave it out of the group")
        for name, variable, _ in self.normals:
            if variable not in self.sensor(name).variables:
                raise ValueError(f"normals: {variable!r} is not among {name}'s variables {self.sensor(name).variables}")
        if not self.step > 0:
            raise ValueError(f"step {self.step} h must be above 0")

    def sensor(self, name: str) -> SensorConfig:
        for s in self.sensors:
            if s.sensor == name:
                return s
        raise ValueError(f"sensor {name!r} is not among the model's: {[s.sensor for s in self.sensors]}")


@flax.struct.dataclass
class Fitted:
    """What is fitted in closed form: normals per sensor, anchors, [Z] deviation of temperature at the heights, K."""

    normals: dict[str, Climate]
    anchors: Anchors
    profile: Param


@flax.struct.dataclass
class Params:
    fitted: Fitted
    network: Network


@flax.struct.dataclass
class State:
    """The field at `time` (int32 seconds since 2000): latent [M, D] on the anchors."""

    time: Param
    latent: Param


def fit(reports: Mapping[str, Reports], cfg: WorldConfig, *, statics: Any = None, seed: int = 0) -> Fitted:
    """The closed-form part, from training reports."""
    grouped = {name for group in cfg.shared for name in group.sensors}
    normals = {
        s.sensor: fit_climate(select(reports, s), sites=s.fixed, seed=seed)
        for s in cfg.sensors
        if s.sensor not in grouped
    }
    for group in cfg.shared:
        members = [cfg.sensor(name) for name in group.sensors]
        have = [v for s in members for v in s.variables]
        common = [v for v in dict.fromkeys(have) if have.count(v) > 1 and v in (group.variables or have)]
        pooled = pool([select(reports, s) for s in members], variables=common, seed=seed)
        joint = fit_climate(pooled, sites=False, rows=len(pooled), seed=seed)
        for s in members:
            column = [pooled.variables.index(v) if v in pooled.variables else -1 for v in s.variables]
            own = select(reports, s)
            normals[s.sensor] = fit_climate(own, sites=s.fixed, joint=joint, shared=column, seed=seed)
    heights = np.asarray(cfg.network.heights, np.float32)
    profile = np.full(len(heights), 5.0, np.float32)
    if cfg.temperature is not None:
        name, variable = cfg.temperature
        about = cfg.sensor(name)
        latitude = (np.rad2deg(np.arcsin(np.linspace(-0.95, 0.95, 19)))[:, None] + 0 * heights).astype(np.float32)
        zero = np.zeros_like(latitude, np.float32)
        _, sd = climate(normals[name], latitude, zero, heights + zero, zero, np.zeros(latitude.shape, np.int32))
        profile = np.sqrt(np.mean(np.asarray(sd)[..., about.variables.index(variable)] ** 2, 0))

    def told(latitude, longitude):
        ground = [np.asarray(statics(latitude, longitude), np.float32)] if statics else []
        return np.concatenate([*ground, _told_normals(normals, cfg, latitude, longitude)], -1)

    return jax.tree.map(jnp.asarray, Fitted(normals, make_anchors(cfg.field, told), profile.astype(np.float32)))


def _told_normals(normals: Mapping[str, Climate], cfg: WorldConfig, latitude: Any, longitude: Any) -> np.ndarray:
    """[M, n] of `cfg.normals`, each with mean 0 and deviation 1 over the anchors."""
    zero = np.zeros_like(latitude, np.float32)
    out = [zero[:, None][:, :0]]
    for name, variable, height in cfg.normals:
        column = cfg.sensor(name).variables.index(variable)
        mean, _ = climate(normals[name], latitude, longitude, zero + height, zero, np.zeros(zero.shape, np.int32))
        x = np.asarray(mean)[:, [column]]
        out.append((x - x.mean()) / (x.std() + 1e-6))
    return np.concatenate(out, -1)


def assimilate(
    params: Params,
    state: State | None,
    tokens: Mapping[str, Tokens],
    end: Any,
    *,
    cfg: WorldConfig,
    given: Mapping[str, Any] | None = None,
    key: Any = None,
) -> State:
    """Analysis at `end` of the reports of (end - step, end].

    Args:
      state: the background, advanced to `end`; None starts from what the forcing alone says.
      tokens: {sensor: Tokens} of every sensor of the config (`earth.world.records`); none masked-in is fine.
      given: {sensor: [N] bool} reports that may be read; all by default.
      key: random key of one member of an ensemble (`NetworkConfig.noise`); None for the one deterministic analysis.
    """
    h = network.background(params.network, params.fitted.anchors, end) if state is None else state.latent
    before = read_field(params, h, tokens, end, cfg=cfg)
    given = {s.sensor: jnp.ones(tokens[s.sensor].age.shape, bool) for s in cfg.sensors} if given is None else given
    h = network.analyse(
        params.network, h, params.fitted.anchors, tokens, given, {k: v[0] for k, v in before.items()}, end,
        cfg=cfg.network, field=cfg.field, sensors=cfg.sensors, step=cfg.step, key=part_of(key, 1),
    )  # fmt: skip
    return State(end, h)


def advance(params: Params, state: State, steps: int | jax.Array = 1, *, cfg: WorldConfig, key: Any = None) -> State:
    """The field `steps` steps of the dynamics later; `key` as for `assimilate`: one member keeps one key."""

    def once(_, s: State) -> State:
        time = s.time + jnp.int32(round(cfg.step * 3600))
        latent = network.step(
            params.network, s.latent, params.fitted.anchors, time, cfg=cfg.network, key=part_of(key, 0)
        )
        return State(time, latent)

    return jax.lax.fori_loop(0, steps, once, State(jnp.asarray(state.time, jnp.int32), state.latent))


def part_of(key: Any, number: int) -> Any:
    """Steps and analyses of one time have noise of their own."""
    return None if key is None else jax.random.fold_in(key, number)


def read(params: Params, state: State, tokens: Mapping[str, Tokens], *, cfg: WorldConfig) -> dict[str, tuple[Any, Any]]:
    """{sensor: (mean, log spread) [N, V]}, in standard deviations, at tokens aged up to `step` h before the state."""
    return read_field(params, state.latent, tokens, state.time, cfg=cfg)


def read_field(params: Params, h: Any, tokens: Mapping[str, Tokens], end: Any, *, cfg: WorldConfig) -> dict[str, Any]:
    return network.read(
        params.network, h, params.fitted.anchors, tokens, end, cfg=cfg.network, field=cfg.field,
        sensors=tuple(s for s in cfg.sensors if s.sensor in tokens), step=cfg.step, profile=params.fitted.profile,
    )  # fmt: skip


def observe(
    params: Params, state: State, sensor: str, queries: Tokens, *, cfg: WorldConfig, platform: Any = None
) -> tuple[Any, Any]:
    """What a sensor would report: (mean [Q, V], standard deviation [Q, V]), SI.

    Args:
      queries: where and when; `value`, `mask` are not looked at.
      platform: [Q] index of a platform of the fit whose own normal is to be used, -1 for none.
    """
    time = state.time - jnp.round(queries.age * 3600.0).astype(jnp.int32)
    mean, sd = climate(
        params.fitted.normals[sensor], queries.latitude, queries.longitude, queries.height, queries.view_angle, time,
        platform,
    )  # fmt: skip
    queries = dataclasses.replace(queries, deviation=sd)
    z, spread = read(params, state, {sensor: queries}, cfg=cfg)[sensor]
    return mean + z * sd, jnp.exp(spread) * sd


def window_end(seconds_1970: int) -> np.int32:
    """End of a window of a `Record` as the model's time."""
    return geometry.seconds(np.datetime64(int(seconds_1970), "s"))


_CLASSES = (
    Params, Fitted, Climate, Anchors, Neighbourhood, Network, network.Attention, network.Block, network.SparseBlock,
    network.Noise, network.Sense, network.Direct, network.Spectral, layers.Dense, MoEParams, ExpertParams,
)  # fmt: skip


def save_model(
    directory: str | pathlib.Path, params: Params | Fitted, cfg: WorldConfig, *, meta: Mapping[str, Any] | None = None
) -> None:
    """Writes a model, or its closed-form part, to a folder, complete or not at all; `meta` is JSON beside it."""
    store.save(directory, params, cfg, meta=meta)


def load_model(
    directory: str | pathlib.Path, *, cfg: WorldConfig | None = None
) -> tuple[Any, WorldConfig, dict[str, Any]]:
    """Reads what `save_model` wrote: (params, config, meta).

    Raises:
      moe.checkpoint.CheckpointError: nothing there, truncated, or (with `cfg`) of another configuration; the message
      names what differs.
    """
    return store.load(directory, WorldConfig, _CLASSES, cfg=cfg)
