"""Snapshots: what a scene's reports say of the values that are missing or hidden in it, of any sensor at any place.

    cfg = SnapshotConfig(sensors=(SensorConfig("station", ("2m_temperature", ...), tokens=768),),
                         field=SceneField(length_km=100.0, anchors=768), guesses=(("station", KrigingConfig()),))
    fitted = fit(reports, cfg)                                  # normals and first guesses, from training reports
    params = train(reports, fitted, cfg, SnapshotTrainConfig(steps=2000), directory)
    mean, deviation = reconstruct(params, reports, {"station": hidden}, cfg=cfg)["station"]

The masked autoencoder of the paper's figure on real files, whose snapshots have nothing in common with a global sphere
at uniform spacing: footprints lie 20 km apart along one orbit, airports cluster. A sample is a scene, a place and the
reports nearest to it. Its anchors are drawn from the places of its own reports, so that the basis is as dense as what
is observed; they are anchors with continuous coordinates like any others, and the maps that write to them and read from
them are those of the global model (`earth.world.network`). Whole reports, whole platforms and whole variables of a
scene are hidden and predicted from the rest.

Predictions are departures from a first guess in closed form (`earth.world.guess`: kriging, or ridge on the other
variables of the report; 0, the normal, without one): innovations are taken against it, and the mean and the spread are
read in units of its deviation. What a report itself shows is read beside the field. A first guess and a reading of this
form are ours, as everything here but the masking; compare with the guess alone before the network is given credit.

Shapes: N reports of a sensor in a scene, V variables, M anchors, n reports of a sensor in all.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from earth import geometry
from earth.layers import Dense, apply, dense
from earth.neighbours import nearest
from earth.observations import EmptyWindowError, ObservationError, Reports
from earth.world import network
from earth.world.climate import Climate, climate, fit_climate
from earth.world.field import Anchors, FieldConfig
from earth.world.guess import KrigingConfig, Ridge, RidgeConfig, fit_ridge, krige, means_nearby, sides, unit_vectors
from earth.world.guess import guess as guess_from_others
from earth.world.model import window_end
from earth.world.network import Direct, Network, NetworkConfig
from earth.world.records import SensorConfig, Tokens, host_place, select
from moe import training
from moe.params import FanIn, ParamSpec, init, zeros
from moe.training import Mean

_FAR = 1e4  # of anchors that are not there, in lengths
_CLIP = 8.0
_HUBER = 2.0
_BLOCK = 40_000
_CALIBRATION = 1000
_LEAST = 1e-3  # of a first guess's deviation, in standard deviations


@dataclasses.dataclass(frozen=True)
class SceneField(FieldConfig):
    """The basis of a scene: `anchors` of its reports' places.

    Attributes:
      length_km: horizontal unit of distances, where `FieldConfig` has the spacing of a sphere: about the distance at
        which reports stop telling of each other.
      core: share of a scene's reports, those nearest its centre, that are scored and predicted: what lies further out
        has neighbours outside the scene.
    """

    anchors: int = 768
    neighbours: int = 12
    length_km: float = 100.0
    core: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not self.length_km > 0 or not 0 < self.core <= 1:
            raise ValueError(f"length_km {self.length_km} must be above 0 and core {self.core} in (0, 1]")

    @property
    def spacing_km(self) -> float:
        return self.length_km


@dataclasses.dataclass(frozen=True)
class SnapshotConfig:
    """Structure.

    Attributes:
      sensors: what is read and predicted; `tokens` is N. `fixed` is of no account: no platform has a normal of its own.
      field, network: the basis and sizes; dynamics are not used.
      guesses: (sensor, first guess); a sensor that is not named has the normal for its guess.
      weights: (variable, weight in the loss) where it is not 1.
      normal_rows: reports that a normal is fitted to, at most.
      step: hours that ages are measured in.
    """

    sensors: tuple[SensorConfig, ...]
    field: SceneField = dataclasses.field(default_factory=SceneField)
    network: NetworkConfig = dataclasses.field(default_factory=lambda: NetworkConfig(width=64, dynamics_layers=0))
    guesses: tuple[tuple[str, KrigingConfig | RidgeConfig], ...] = ()
    weights: tuple[tuple[str, float], ...] = ()
    normal_rows: int = 8000
    step: float = 12.0

    def __post_init__(self):
        names = [s.sensor for s in self.sensors]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"sensors {names} must be at least one, each once")
        for name, _ in self.guesses:
            if name not in names:
                raise ValueError(f"guesses name the sensor {name!r}, which is not among {names}")
        known = {v for s in self.sensors for v in s.variables}
        for name, weight in self.weights:
            if name not in known or weight < 0:
                raise ValueError(f"weight {weight} of {name!r}: no such variable among {sorted(known)}, or negative")

    def guess(self, sensor: str) -> KrigingConfig | RidgeConfig | None:
        return dict(self.guesses).get(sensor)

    def weight(self, s: SensorConfig) -> np.ndarray:
        """[V] weights of a sensor's variables in the loss."""
        given = dict(self.weights)
        return s.weight * np.array([given.get(v, 1.0) for v in s.variables], np.float32)


@dataclasses.dataclass(frozen=True)
class SnapshotTrainConfig:
    """Training.

    Attributes:
      steps, learning_rate, weight_decay, warmup: of AdamW with cosine decay to 2 %; one scene a step.
      reports, platforms: shares of a scene's reports and of its platforms that are hidden wholly.
      variables: of each sensor at most so many are hidden in a whole scene, as many scenes for every number from 1 on;
        0 hides none. sets: distinct sets of variables that are hidden, for a regression is solved for each.
      turn: turn every scene about the pole by any angle and along its meridian by up to so many degrees, so that the
        network cannot learn by heart what is at a place of a single snapshot; 0 leaves scenes where they are. Normals
        and first guesses are of the true place. What goes with the sun is not learned then.
      lift: and raise or lower it by up to so many m.
      ema: decay of the averaged parameters that are returned. seed: of weights, scenes and hiding.
    """

    steps: int = 2000
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup: int = 100
    reports: float = 0.0
    platforms: float = 0.0
    variables: int = 0
    sets: int = 40
    turn: float = 0.0
    lift: float = 0.0
    ema: float = 0.99
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 50

    def __post_init__(self):
        if self.steps < 1 or not 0 <= self.reports < 1 or not 0 <= self.platforms < 1 or self.variables < 0:
            raise ValueError(
                f"steps {self.steps} start at 1, reports {self.reports} and platforms {self.platforms} lie in [0, 1), "
                f"variables {self.variables} at 0"
            )
        if not (self.reports or self.platforms or self.variables):
            raise ValueError("nothing is hidden, so nothing is learned: give reports, platforms or variables above 0")
        if not 0 <= self.turn <= 90 or self.lift < 0:
            raise ValueError(f"turn {self.turn} must lie in [0, 90] degrees and lift {self.lift} m not below 0")


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What is fitted in closed form, by sensor: normals; regressions on the other variables; [V] factors that put the
    deviation of kriging at the size of its errors on a draw of the training reports, each left out.
    """

    normals: dict[str, Climate]
    ridges: dict[str, Ridge] = dataclasses.field(default_factory=dict)
    scales: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@flax.struct.dataclass
class Reading(Network):
    """The network and, of each sensor, what a report is told beside the field: [.. -> 2 D]."""

    told: dict[str, Dense] = flax.struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Params:
    fitted: Fitted
    network: Reading


def specs(cfg: SnapshotConfig) -> Reading:
    """Declaration of every parameter. Channels have weights of their own: a snapshot knows them all, and metadata alone
    cannot tell neighbouring channels of one band apart.
    """
    net = network.network_specs(cfg.network, cfg.sensors, 0)
    hidden = 2 * cfg.network.width
    senses, told = {}, {}
    for s in cfg.sensors:
        v = len(s.variables)
        form = Direct(
            ParamSpec((v, 3, cfg.network.width), (None, None, "embed"), FanIn(1.0, (-3, -2))),
            ParamSpec((hidden,), (None,), zeros), dense(hidden, v, 0.1), dense(hidden, v, 0.1),
        )  # fmt: skip
        senses[s.sensor] = dataclasses.replace(net.senses[s.sensor], form=form)
        told[s.sensor] = dense(5 * v + 3, hidden)
    parts: dict[str, Any] = {f.name: getattr(net, f.name) for f in dataclasses.fields(net)}
    return Reading(**{**parts, "senses": senses}, told=told)


def fit(
    reports: Mapping[str, Reports], cfg: SnapshotConfig, *, normals: Mapping[str, Climate] | None = None, seed: int = 0
) -> Fitted:
    """Normals and first guesses from training reports, which hold nothing that is to be predicted.

    Args:
      normals: those of an earlier fit, to compare first guesses about the same ones.

    Raises:
      ObservationError: no reports of a sensor, a variable that is unknown or without values.
    """
    found, ridges, scales = dict(normals or {}), {}, {}
    for s in cfg.sensors:
        r = select(reports, s)
        if s.sensor not in found:
            fitted = fit_climate(r, sites=False, rows=min(cfg.normal_rows, len(r)), seed=seed)
            found[s.sensor] = jax.tree.map(jnp.asarray, fitted)
        guess = cfg.guess(s.sensor)
        normal, sd = _normal(found[s.sensor], r)
        z = (r.values - normal) / sd
        if isinstance(guess, KrigingConfig):
            shown, drawn = np.isfinite(z), np.zeros(len(z), bool)
            drawn[np.random.default_rng(seed).choice(len(z), min(len(z), _CALIBRATION), replace=False)] = True
            place = (r.latitude, r.longitude, r.height)
            mean, deviation = krige(guess, *place, np.where(shown, z, 0.0), shown, wanted=drawn)
            error = np.where(shown, (z - mean) / deviation, np.nan)[drawn]
            known = np.isfinite(error)
            square = np.where(known, error, 0.0) ** 2
            scales[s.sensor] = np.sqrt((square.sum(0) + 1.0) / (known.sum(0) + 1.0))
        if isinstance(guess, RidgeConfig):
            near = _around(_place(cfg, r), headings(r), guess)
            ridges[s.sensor] = fit_ridge(guess, z, about(r.latitude, r.longitude, _view(r), _time(r)), near)
    return Fitted(found, ridges, scales)


def about(latitude: Any, longitude: Any, view_angle: Any, time: Any) -> np.ndarray:
    """[n, 5] what a regression is told of a report: view angle over 60 degrees and its square, sine of latitude and its
    square, cosine of the solar zenith angle, 0 at night.
    """
    view, y = np.asarray(view_angle) / 60.0, np.sin(np.deg2rad(np.asarray(latitude)))
    sun = np.maximum(
        np.asarray(geometry.solar_cosine(time, np.asarray(latitude, np.float32), np.asarray(longitude, np.float32))),
        0.0,
    )
    return np.stack([view, view**2, y, y**2, sun], -1).astype(np.float64)


def _view(r: Reports) -> np.ndarray:
    return np.zeros(len(r)) if r.view_angle is None else np.where(np.isfinite(r.view_angle), r.view_angle, 0.0)


def _time(r: Reports) -> np.ndarray:
    return np.asarray(geometry.seconds(r.times), np.int32)


def _place(cfg: SnapshotConfig, r: Reports) -> np.ndarray:
    return host_place(cfg.field, r.latitude, r.longitude, r.height)


def _near(place: np.ndarray, k: int) -> np.ndarray:
    """[n, k] the nearest other reports, -1 where there are fewer."""
    if not k:
        return np.zeros((len(place), 0), np.int64)
    index = nearest(place, place, k + 1).index
    own = index == np.arange(len(index))[:, None]
    own[~own.any(1), -1] = True  # more reports at one place than neighbours: any may go
    own &= np.cumsum(own, 1) == 1
    return index[~own].reshape(len(index), k).astype(np.int64)


def headings(r: Reports) -> np.ndarray:
    """[n, 3] unit vectors at a tangent to the sphere: the way a report's platform moves, north where it stands still.

    What a scanner does alike in all its scans (registration of channels, limb) is fixed to its track, not to north.
    """
    up = unit_vectors(r.latitude, r.longitude)
    first = np.r_[True, (np.diff(r.platform) != 0) | (np.diff(r.time) != 0)]
    group = np.cumsum(first) - 1
    count = np.bincount(group)[:, None]
    centre = np.stack([np.bincount(group, up[:, c]) for c in range(3)], -1) / count
    owner, rows = r.platform[first], np.arange(len(count))
    after = np.where(np.r_[owner[1:] == owner[:-1], False], rows + 1, rows)
    before = np.where(np.r_[False, owner[1:] == owner[:-1]], rows - 1, rows)
    move = (centre[after] - centre[before])[group]
    move = move - (move * up).sum(-1, keepdims=True) * up
    lat, lon = np.deg2rad(r.latitude), np.deg2rad(r.longitude)
    north = np.stack([-np.sin(lat) * np.cos(lon), -np.sin(lat) * np.sin(lon), np.cos(lat)], -1)
    length = np.linalg.norm(move, axis=-1, keepdims=True)
    return np.where(length > 1e-6, move / np.maximum(length, 1e-6), north)


def _around(place: np.ndarray, along: np.ndarray, cfg: RidgeConfig) -> np.ndarray:
    """[n, S, k] the nearest other reports, and by side where the regression asks for them."""
    near = _near(place, cfg.nearby)
    return sides(place, along, near) if cfg.sides and cfg.nearby else near[:, None]


class Scenes:
    """Reports of a snapshot, to cut scenes from.

    Raises:
      ObservationError: no reports of a sensor.
    """

    def __init__(self, reports: Mapping[str, Reports], fitted: Fitted, cfg: SnapshotConfig):
        self.cfg, self.fitted = cfg, fitted
        chosen = {s.sensor: select(reports, s) for s in cfg.sensors}
        for name, r in chosen.items():
            if not len(r):
                raise EmptyWindowError(f"{name} has no report; leave the sensor out of the config")
        last = max(int(r.time.max()) for r in chosen.values())
        self.end = window_end(last)
        self.parts: dict[str, dict[str, Any]] = {}
        for name, r in chosen.items():
            view = _view(r)
            normal, sd = _normal(fitted.normals[name], r)
            self.parts[name] = {
                "value": (r.values - normal) / sd, "normal": normal, "deviation": sd, "platform": r.platform,
                "age": ((last - r.time) / 3600.0).astype(np.float32),
                "latitude": r.latitude, "longitude": r.longitude, "height": r.height, "view_angle": view,
                "about": about(r.latitude, r.longitude, view, _time(r)), "place": _place(cfg, r), "along": headings(r),
                "unit": host_place(cfg.field, r.latitude, r.longitude, 0 * r.height)[:, :3],
            }  # fmt: skip

    def near(self, sensor: str, row: int) -> dict[str, np.ndarray]:
        """{sensor: the N rows nearest to a report, nearest first}; ties by place, so that no order of rows matters."""
        centre = self.parts[sensor]["unit"][row]
        out = {}
        for s in self.cfg.sensors:
            p = self.parts[s.sensor]
            distance = np.square(p["unit"] - centre).sum(-1).astype(np.float32)
            rows = np.arange(len(distance))
            if len(rows) > s.tokens:
                edge = np.partition(distance, s.tokens - 1)[s.tokens - 1]
                rows = np.flatnonzero(distance <= edge)
            keys = (p["age"], p["height"], p["longitude"], p["latitude"], distance)
            out[s.sensor] = rows[np.lexsort([k[rows] for k in keys])][: s.tokens]
        return out

    def scene(
        self, rows: Mapping[str, np.ndarray], shown: Mapping[str, np.ndarray], rng: np.random.Generator
    ) -> dict[str, Any]:
        """One sample of the reports `rows`, of whose values those that are `shown` {sensor: [rows, V]} may be read.

        Returns:
          tokens {sensor: Tokens [N]}, guess {sensor: (mean, deviation) [N, V]}, target {sensor: [N, V]}, 0 where it is
          not known, hidden {sensor: [N, V] known, not shown and in the core}, anchors, time.
        """
        cfg = self.cfg
        places = {
            k: np.concatenate([self.parts[s.sensor][k][rows[s.sensor]] for s in cfg.sensors])
            for k in ("latitude", "longitude", "height", "along")
        }
        drawn = np.arange(len(places["height"]))
        if len(drawn) > cfg.field.anchors:
            drawn = np.sort(rng.choice(drawn, cfg.field.anchors, replace=False))
        anchors, tree = self._anchors(**{k: x[drawn] for k, x in places.items()})
        out: dict[str, Any] = {"tokens": {}, "guess": {}, "target": {}, "hidden": {}}
        for s in cfg.sensors:
            name, own = s.sensor, rows[s.sensor]
            p = {k: v[own] for k, v in self.parts[name].items()}
            pad = functools.partial(_pad, count=s.tokens)
            known = np.isfinite(p["value"])
            seen = known & shown[name]
            mean, deviation = self.guess(name, p, seen)
            near = nearest(p["place"], tree, cfg.field.neighbours)
            out["tokens"][name] = Tokens(
                pad(np.where(seen, p["value"], 0.0)), pad(seen), pad(p["deviation"], fill=1.0), pad(p["age"]),
                pad(p["latitude"]), pad(p["longitude"]), pad(p["height"]), pad(p["view_angle"]),
                jax.tree.map(pad, near),
            )  # fmt: skip
            out["guess"][name] = (pad(mean), pad(np.maximum(deviation, _LEAST), fill=1.0))
            core = np.arange(len(own)) < max(1, round(cfg.field.core * s.tokens))
            out["target"][name] = pad(np.where(known, p["value"], 0.0))
            out["hidden"][name] = pad(known & ~seen & core[:, None])
        return out | {"anchors": anchors, "time": self.end}

    def guess(
        self,
        name: str,
        p: Mapping[str, Any],
        seen: np.ndarray,
        *,
        wanted: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(mean, deviation) [N, V] of the values of reports `p`, of those `wanted`, each from the others `seen`."""
        cfg = self.cfg.guess(name)
        value = np.where(seen, p["value"], 0.0)
        if isinstance(cfg, RidgeConfig):
            near = _around(p["place"], p["along"], cfg)
            columns: Any = None if wanted is None else wanted.any(0)
            return guess_from_others(self.fitted.ridges[name], value, seen, p["about"], near, wanted=columns)
        if isinstance(cfg, KrigingConfig):
            rows: Any = None if wanted is None else wanted.any(1)
            at = (p["latitude"], p["longitude"], p["height"])
            mean, deviation = krige(cfg, *at, value, seen, wanted=rows)
            return mean, deviation * self.fitted.scales[name]
        return np.zeros_like(value), np.ones_like(value)

    def features(self, name: str, nearby: int = 8) -> np.ndarray:
        """[n, 2 V + 5] what a regression of any kind may be given of each report: its anomalies, NaN missing, what it
        is told beside them (`about`), and their means over the nearest reports.
        """
        p = self.parts[name]
        return np.concatenate([p["value"], p["about"], means_nearby(p["value"], _near(p["place"], nearby))], -1)

    def _anchors(
        self, latitude: np.ndarray, longitude: np.ndarray, height: np.ndarray, along: np.ndarray
    ) -> tuple[Anchors, np.ndarray]:
        """(anchors at places, with frames that look along the track, padded with ones that are out of everyone's reach;
        their place in float64).
        """
        cfg, count = self.cfg.field, len(height)
        where = host_place(cfg, latitude, longitude, height)
        far = np.zeros((cfg.anchors - count, 4))
        far[:, 3] = _FAR * (1 + np.arange(len(far)))
        frame = np.zeros((cfg.anchors, 3, 4), np.float32)
        frame[:count, 0, :3] = np.cross(along, unit_vectors(latitude, longitude))  # to the right
        frame[:count, 1, :3] = along
        frame[:, 2, 3] = 1.0
        where = np.concatenate([where, far])
        lat, lon, height = (_pad(x, count=cfg.anchors) for x in (latitude, longitude, height))
        anchors = Anchors(
            lat, lon, height, where.astype(np.float32), frame, nearest(where, where, cfg.reach),
            np.zeros((cfg.anchors, 0), np.float32),
        )  # fmt: skip
        return anchors, where

    def draw(self, tcfg: SnapshotTrainConfig, rng: np.random.Generator) -> dict[str, Any]:
        """A scene about a report drawn at random, with reports, platforms and variables hidden."""
        cfg = self.cfg
        sensor = cfg.sensors[int(rng.integers(len(cfg.sensors)))].sensor
        rows = self.near(sensor, int(rng.integers(len(self.parts[sensor]["age"]))))
        shown = {}
        for s in cfg.sensors:
            platform = self.parts[s.sensor]["platform"][rows[s.sensor]]
            keep = rng.random(len(platform)) >= tcfg.reports
            names, owner = np.unique(platform, return_inverse=True)
            keep &= (rng.random(len(names)) >= tcfg.platforms)[owner]
            shown[s.sensor] = keep[:, None] & ~_hidden_set(len(s.variables), tcfg, int(rng.integers(tcfg.sets)))
        sample = self.scene(rows, shown, rng)
        return self.turned(sample, tcfg.turn, tcfg.lift, rng) if tcfg.turn or tcfg.lift else sample

    def turned(self, scene: Mapping[str, Any], turn: float, lift: float, rng: np.random.Generator) -> dict[str, Any]:
        """The scene elsewhere: turned as a whole, by up to `turn` degrees along its meridian and by any angle about the
        pole, and lifted by up to `lift` m. Distances, neighbours and directions within it stay.
        """
        anchors, up = scene["anchors"], rng.uniform(-lift, lift)
        first = np.deg2rad(float(anchors.longitude[0]))
        tilt, about = np.deg2rad(rng.uniform(-turn, turn)), 2 * np.pi * rng.random() if turn else 0.0
        rotation = _turn(first + about, 2) @ _turn(tilt, 1) @ _turn(-first, 2)

        def move(x: Any) -> dict[str, np.ndarray]:
            unit = unit_vectors(x.latitude, x.longitude) @ rotation.T
            lat, lon = np.arcsin(np.clip(unit[:, 2], -1, 1)), np.arctan2(unit[:, 1], unit[:, 0])
            found = {"latitude": np.rad2deg(lat), "longitude": np.rad2deg(lon), "height": x.height + up}
            return {k: v.astype(np.float32) for k, v in found.items()}

        moved = move(anchors)
        there = anchors.place[:, 3] < _FAR / 2
        place = host_place(self.cfg.field, **moved).astype(np.float32)
        frame = np.array(anchors.frame)
        frame[..., :3] = frame[..., :3] @ rotation.T.astype(np.float32)
        at = dataclasses.replace(
            anchors, **moved, place=np.where(there[:, None], place, anchors.place), frame=frame
        )  # fmt: skip
        tokens = {name: dataclasses.replace(t, **move(t)) for name, t in scene["tokens"].items()}
        return dict(scene) | {"tokens": tokens, "anchors": at}


def _turn(angle: float, axis: int) -> np.ndarray:
    """[3, 3] rotation about the polar axis (2) or that of 90 E (1)."""
    c, s = np.cos(angle), np.sin(angle)
    rows = ((c, -s, 0.0), (s, c, 0.0), (0.0, 0.0, 1.0)) if axis == 2 else ((c, 0.0, s), (0.0, 1.0, 0.0), (-s, 0.0, c))
    return np.array(rows)


def _hidden_set(width: int, tcfg: SnapshotTrainConfig, number: int) -> np.ndarray:
    """[V] the variables that one of the sets hides: a number of them drawn, and each variable in its turn."""
    hidden = np.zeros(width, bool)
    most = min(tcfg.variables, width - 1)
    if most > 0:
        rng = np.random.default_rng([tcfg.seed, number])
        others = rng.permutation(np.delete(np.arange(width), number % width))
        hidden[[number % width, *others[: int(rng.integers(most))]]] = True
    return hidden


def _pad(x: np.ndarray, count: int, fill: float = 0) -> np.ndarray:
    x = np.asarray(x)
    x = x.astype(np.float32) if x.dtype == np.float64 else x
    return np.concatenate([x, np.full((count - len(x), *x.shape[1:]), fill, x.dtype)])


def predict(net: Reading, scene: Mapping[str, Any], *, cfg: SnapshotConfig) -> dict[str, tuple[Any, Any]]:
    """{sensor: (departure of the mean from the first guess, log of the spread) [N, V]}, in units of the guess's
    deviation.
    """
    anchors, end, tokens = scene["anchors"], scene["time"], scene["tokens"]
    expected, told = {}, {}
    for s in cfg.sensors:
        t = tokens[s.sensor]
        mean, deviation = scene["guess"][s.sensor]
        innovation = jnp.where(t.mask, jnp.clip((t.value - mean) / deviation, -_CLIP, _CLIP), 0.0)
        expected[s.sensor] = t.value - innovation
        view = t.view_angle / 60.0
        told[s.sensor] = jnp.concatenate(
            [
                jnp.where(t.mask, jnp.clip(t.value, -_CLIP, _CLIP), 0.0), innovation, t.mask.astype(mean.dtype),
                jnp.clip(mean, -_CLIP, _CLIP), jnp.log(deviation), jnp.stack([view, view * view, view * 0 + 1], -1),
            ],
            -1,
        )  # fmt: skip
    given = {s.sensor: jnp.ones(tokens[s.sensor].age.shape, bool) for s in cfg.sensors}
    h = network.analyse(
        net, network.background(net, anchors, end), anchors, tokens, given, expected, end, cfg=cfg.network,
        field=cfg.field, sensors=cfg.sensors, step=cfg.step,
    )  # fmt: skip
    out = {}
    for s in cfg.sensors:
        t, form = tokens[s.sensor], net.senses[s.sensor].form
        assert isinstance(form, Direct)
        column = network.read_column(net, h, anchors, t, cfg=cfg.network, field=cfg.field)
        where, age = network.about_report(t, end, cfg.step)
        x = apply(net.hidden, column) + age[..., :1] * apply(net.tendency, column) + form.kind
        x = x + apply(net.about, jnp.concatenate([where, age], -1)) + apply(net.told[s.sensor], told[s.sensor])
        x = jax.nn.gelu(x) * (1.0 + apply(net.gate, where))
        out[s.sensor] = (apply(form.mean, x), apply(form.spread, x))
    return out


def loss(net: Reading, batch: Mapping[str, Any], rng: Any, *, cfg: SnapshotConfig) -> tuple[Any, Any]:
    """Of what was hidden, in units of the first guess's deviation: the square of the error, linear from 2 on (Huber:
    files hold gross errors), and a quarter of the Gaussian likelihood of the spread about it (whose gradient stops at
    the mean): {objective per sensor}, metrics.
    """
    del rng
    scene = jax.tree.map(lambda x: x[0], batch)
    found = predict(net, scene, cfg=cfg)
    objective, metrics = {}, {}
    for s in cfg.sensors:
        name = s.sensor
        departure, log_spread = found[name]
        mean, deviation = scene["guess"][name]
        hidden = scene["hidden"][name]
        wanted = jnp.where(hidden, jnp.clip((scene["target"][name] - mean) / deviation, -_CLIP, _CLIP), 0.0)
        error = jnp.where(hidden, wanted - departure, 0.0)
        sd = jnp.clip(log_spread, -4.0, 3.0)
        nll = sd + 0.5 * jax.lax.stop_gradient(error) ** 2 * jnp.exp(-2 * sd)
        weight = hidden * cfg.weight(s)
        objective[name] = Mean(
            jnp.sum(weight * (2.0 * optax.huber_loss(error, delta=_HUBER) + 0.25 * nll)), jnp.sum(weight)
        )
        metrics[f"model/{name}"] = Mean(jnp.sum(weight * error**2), jnp.sum(weight))
        metrics[f"guess/{name}"] = Mean(jnp.sum(weight * wanted**2), jnp.sum(weight))
    return objective, metrics


class _Draw(grain.transforms.RandomMap):
    def __init__(self, scenes: Scenes, tcfg: SnapshotTrainConfig):
        self.scenes, self.tcfg = scenes, tcfg

    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
        return self.scenes.draw(self.tcfg, rng)


def train(
    reports: Mapping[str, Reports], fitted: Fitted, cfg: SnapshotConfig, tcfg: SnapshotTrainConfig,
    directory: str | pathlib.Path | None = None, *, progress: bool = True,
) -> Params:  # fmt: skip
    """Trains on scenes of the reports; resumable from `directory`.

    Args:
      reports: training reports: nothing in them is held out.
    """
    scenes = Scenes(reports, fitted, cfg)
    net = init(jax.random.key(tcfg.seed), specs(cfg))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, tcfg.learning_rate, min(tcfg.warmup, tcfg.steps // 4 + 1), max(tcfg.steps, 2), 0.02 * tcfg.learning_rate
    )
    mask = functools.partial(jax.tree.map, lambda x: x.ndim >= 2)
    optimizer = optax.adamw(schedule, b2=0.99, weight_decay=tcfg.weight_decay, mask=mask)
    state = training.init_state(net, optimizer, jax.random.key(tcfg.seed + 7), ema=True)
    step = training.make_train_step(functools.partial(loss, cfg=cfg), optimizer, clip_norm=1.0, ema_decay=tcfg.ema)
    data = grain.MapDataset.range(2**30).seed(tcfg.seed).random_map(_Draw(scenes, tcfg))
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)).batch(1)
    state = training.fit(
        step, state, iter(data), steps=tcfg.steps, directory=directory, config={"model": cfg, "training": tcfg},
        checkpoint_every=tcfg.checkpoint_every, log_every=tcfg.log_every, progress=progress, description="snapshot",
    )  # fmt: skip
    return Params(fitted, state.ema_params)


def _without(
    reports: Mapping[str, Reports], hidden: Mapping[str, np.ndarray], cfg: SnapshotConfig
) -> dict[str, Reports]:
    blank = {s.sensor: select(reports, s) for s in cfg.sensors}
    for name, mask in hidden.items():
        if name not in blank:
            raise ObservationError(f"hidden names {name!r}; the sensors are {sorted(blank)}")
        r = blank[name]
        if np.shape(mask) != r.values.shape:
            raise ObservationError(
                f"hidden[{name!r}] has shape {np.shape(mask)}, not {r.values.shape}: a row for each report and a "
                "column for each of the config's variables"
            )
        blank[name] = dataclasses.replace(r, values=np.where(mask, np.nan, r.values))
    if not any(np.isfinite(r.values).any() for r in blank.values()):
        raise EmptyWindowError("everything there is is hidden; leave something to predict it from")
    return blank


def first_guess(
    fitted: Fitted, reports: Mapping[str, Reports], hidden: Mapping[str, np.ndarray], *, cfg: SnapshotConfig
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The first guess alone, from all reports at once: what a network has to beat.

    Args:
      reports, hidden: as for `reconstruct`.

    Returns:
      {sensor: (mean, standard deviation) [n, V]}, SI, NaN where nothing was asked.
    """
    scenes = Scenes(_without(reports, hidden, cfg), fitted, cfg)
    out = {}
    for name, wanted in hidden.items():
        p = scenes.parts[name]
        seen = np.isfinite(p["value"])
        mean, deviation = scenes.guess(name, p, seen, wanted=wanted)
        found = p["normal"] + p["deviation"] * mean, p["deviation"] * deviation
        out[name] = (np.where(wanted, found[0], np.nan), np.where(wanted, found[1], np.nan))
    return out


@functools.cache
def _jitted(cfg: SnapshotConfig) -> Any:
    return jax.jit(functools.partial(predict, cfg=cfg))


def reconstruct(
    params: Params, reports: Mapping[str, Reports], hidden: Mapping[str, np.ndarray], *, cfg: SnapshotConfig,
    seed: int = 0,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """What the reports say of those values that are asked for.

    Args:
      reports: of the snapshot: other ones than were trained on, or those and more. A place to be predicted is a report
        whose values are NaN.
      hidden: {sensor: [n, V] bool} values asked for; whatever the reports hold there is not looked at.
      seed: of the draw of anchors, where a scene has more reports than anchors.

    Returns:
      {sensor: (mean, standard deviation) [n, V]}, SI, NaN where nothing was asked.

    Raises:
      ObservationError: hidden that does not fit the reports, or leaves nothing to read.
    """
    scenes = Scenes(_without(reports, hidden, cfg), params.fitted, cfg)
    out = {name: np.full((2, *np.shape(mask)), np.nan) for name, mask in hidden.items()}
    for batch, rows, answered in _cover(scenes, hidden, seed):
        found = _jitted(cfg)(params.network, batch)
        for name, chosen in answered.items():
            own = rows[name][chosen]
            mean, deviation, departure, spread = (
                np.asarray(x)[: len(chosen)][chosen] for x in (*batch["guess"][name], *found[name])
            )
            normal, sd = (scenes.parts[name][k][own] for k in ("normal", "deviation"))
            wanted = hidden[name][own]
            out[name][0, own] = np.where(wanted, normal + sd * (mean + deviation * departure), np.nan)
            spread = np.exp(np.clip(spread, -4.0, 3.0))
            out[name][1, own] = np.where(wanted, sd * deviation * spread, np.nan)
    return {name: (x[0], x[1]) for name, x in out.items()}


def _normal(normal: Climate, r: Reports) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation) [n, V] at reports, SI, in blocks."""
    out = np.zeros((2, *r.values.shape))
    for start in range(0, len(r), _BLOCK):
        rows = slice(start, start + _BLOCK)
        at: Any = [np.float32(x[rows]) for x in (r.latitude, r.longitude, r.height, _view(r))]
        out[0, rows], out[1, rows] = climate(normal, at[0], at[1], at[2], at[3], _time(r)[rows])
    return out[0], out[1]


def _cover(
    scenes: Scenes, hidden: Mapping[str, np.ndarray], seed: int
) -> Iterator[tuple[Any, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Scenes, the rows of their reports, and which of them they answer {sensor: bool}, until every row with something
    hidden has been in the core of one.
    """
    cfg = scenes.cfg
    left: dict[str, Any] = {name: np.asarray(mask).any(1) for name, mask in hidden.items()}
    while any(rows.any() for rows in left.values()):
        name = next(name for name, rows in left.items() if rows.any())
        near = scenes.near(name, int(np.flatnonzero(left[name])[0]))
        shown = {s.sensor: np.ones((len(near[s.sensor]), len(s.variables)), bool) for s in cfg.sensors}
        answered = {}
        for s in cfg.sensors:
            if s.sensor in left:
                core = np.arange(len(near[s.sensor])) < max(1, round(cfg.field.core * s.tokens))
                answered[s.sensor] = core & left[s.sensor][near[s.sensor]]
                left[s.sensor][near[s.sensor][core]] = False
        yield scenes.scene(near, shown, np.random.default_rng(seed)), near, answered
