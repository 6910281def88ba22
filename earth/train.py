"""Training: closed-form fits, then the network in stages, then calibration on validation hours.

    data = prepare(reports, cfg, protocol)                    # normals, anchors, kernels, propagator
    params = train(data, TrainConfig(...), directory)         # masked pre-training, then forecasting; members averaged
    params = calibrate(params, data)                          # earth.calibration: on validation hours

Every stage runs through `moe.training.fit`: resumable after SIGKILL bit for bit, SIGTERM saves and exits.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from earth import field, geometry, model, normals, objectives, propagator, windows
from earth.model import EarthConfig, Fitted, Params
from earth.objectives import ObjectiveConfig
from earth.observations import EmptyWindowError, Reports
from earth.protocol import Protocol
from earth.windows import Cycling, Sampling, Stream
from moe import sharding, training
from moe.params import shardings


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    Attributes:
      name: of its directory.
      steps: optimizer steps.
      strata: groups of leads, see `earth.windows.Sampling`; ((0.0,),) is masked pre-training.
      objective: hiding, mixing and weights.
      learning_rate, weight_decay, warmup: of AdamW with cosine decay to 2 % of the rate.
      queries: targets per lead and sample of a moving stream.
      cycling: the chain of analyses and the roll-out, see `earth.windows.Cycling`; none by default.
    """

    name: str
    steps: int
    strata: tuple[tuple[float, ...], ...]
    objective: ObjectiveConfig = ObjectiveConfig()
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup: int = 100
    queries: int = 128
    cycling: Cycling = Cycling()


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Attributes:
    stages: in order; each starts from the last one's averaged parameters.
    batch: samples of a step. seed: of everything.
    members: independently drawn networks, averaged in forecasts. They alternate: the first corrects the propagator, the
    second forecasts by
      itself, and so on; the two kinds err differently (stations-v1: correcting is better to 12 h, by itself beyond).
    ema: decay of the averaged parameters.
    checkpoint_every, log_every: in steps. accumulate: micro-batches of a step.
    direct: stages of the members that forecast by themselves; empty: the same stages.
    """

    stages: tuple[StageConfig, ...]
    batch: int = 64
    members: int = 1
    seed: int = 0
    ema: float = 0.995
    checkpoint_every: int = 500
    accumulate: int = 1
    log_every: int = 10
    direct: tuple[StageConfig, ...] = ()

    def __post_init__(self):
        if not self.stages:
            raise ValueError("no training stage; give at least one StageConfig")


@dataclasses.dataclass
class Prepared:
    """What training needs: the standardised streams, the fitted parts, and the initial times of training and
    validation.
    """

    cfg: EarthConfig
    protocol: Protocol
    reports: dict[str, Reports]
    streams: dict[str, Stream]
    fitted: Fitted
    train_times: np.ndarray
    folds: np.ndarray
    validation_times: np.ndarray
    choices: dict[str, np.ndarray]


def fill_heights(reports: Reports) -> tuple[Reports, int]:
    """Unknown heights become the standard-atmosphere height of the pressure, or 0 m; returns how many were filled
    without a pressure.
    """
    height = np.array(reports.height)
    missing = ~np.isfinite(height)
    if not missing.any():
        return reports, 0
    if reports.pressure is not None:
        height = np.where(missing, geometry.standard_height(reports.pressure), height)
        missing = ~np.isfinite(height)
    height[missing] = 0.0
    return dataclasses.replace(reports, height=height), int(missing.sum())


def prepare(reports: Mapping[str, Reports], cfg: EarthConfig, protocol: Protocol, *, progress: bool = True) -> Prepared:
    """Fits everything that has a closed form, on training hours only.

    Args:
      reports: per sensor, held-out stations already removed; heights finite (`fill_heights`).

    Raises:
      EmptyWindowError: nothing to train or validate on.
    """
    from earth.baselines.climatology import harmonics_for

    standard: dict[str, Stream] = {}
    fits = {}
    for stream in cfg.streams:
        r = reports[stream.sensor]
        train = protocol.role(r.times) == "train"
        if not train.any():
            raise EmptyWindowError(
                f"no training report of {stream.sensor!r}: the record runs {r.times.min()}..{r.times.max()}; "
                "check the periods"
            )
        annual, daily = harmonics_for(r.times[train])
        if stream.moving:
            annual, daily = min(annual, 1), min(daily, 1)
        fits[stream.sensor] = normals.fit_normal(
            r, stream.variables, train, annual=annual, daily=daily, moving=stream.moving
        )
        standard[stream.sensor] = Stream(
            r, stream, normals.standardise_reports(fits[stream.sensor], r, stream.variables)
        )
    fixed = [s for s in cfg.streams if not s.moving]
    main = fixed[0] if fixed else cfg.streams[0]
    places = reports[main.sensor].positions()
    where = latitude, longitude, height = tuple(
        places[c].to_numpy(np.float64) for c in ("latitude", "longitude", "height")
    )
    anchors = (
        field.fibonacci_anchors(cfg.anchors, cfg.levels)
        if cfg.placement == "global"
        else field.fit_anchors(latitude, longitude, height, cfg.anchors)
    )
    longest = max(cfg.leads)
    span = max(max(s.slots) for s in cfg.streams)
    train_times = windows.training_times(
        reports[main.sensor], protocol, span_hours=span, longest_lead=longest, streams=standard
    )
    validation_times = _validation_times(reports[main.sensor], protocol, cfg.leads)
    if not len(train_times) or not len(validation_times):
        raise EmptyWindowError(
            f"{len(train_times)} training and {len(validation_times)} validation initial times of spans {span:g} h + "
            f"{longest:g} h; "
            "give longer periods, or shorten slots and leads"
        )
    kernel = _fit_kernel(cfg, standard, anchors, where, main.sensor, train_times)
    folds = windows.contiguous_folds(train_times, cfg.folds)
    c = len(cfg.channels)
    k = len(cfg.leads)
    scale_place = np.stack([
        [w.mean() for w in where], [max(w.std(), floor) for w, floor in zip(where, (0.1, 0.1, 100.0), strict=True)],
    ])  # fmt: skip
    target_channels = [cfg.channels.index(tuple(t)) for t in cfg.targets]
    empty = propagator.none(anchors, cfg.leads, cfg.folds)
    fitted = Fitted(
        fits,
        anchors,
        kernel,
        empty,
        jnp.ones((k, c)),
        jnp.ones((k, c)),
        jnp.ones((1, k, c)),
        jnp.asarray(scale_place, jnp.float32),
    )
    choices: dict[str, np.ndarray] = {}
    if target_channels:
        prop, choices = _fit_propagator(cfg, fitted, standard, protocol, train_times, validation_times, folds, progress)
        scale = np.ones((k, c))
        scale[:, target_channels] = choices["scale"]
        fitted = dataclasses.replace(fitted, propagator=prop, scale=jnp.asarray(scale, jnp.float32))
    return Prepared(cfg, protocol, dict(reports), standard, fitted, train_times, folds, validation_times, choices)


def _validation_times(reports: Reports, protocol: Protocol, leads) -> np.ndarray:
    step = np.timedelta64(int(reports.cadence()), "s")
    times = np.arange(reports.times.min(), reports.times.max() + step, step)
    return geometry.seconds(protocol.init_times(times, leads, role="validation"))


def _fit_kernel(cfg, standard, anchors, where, sensor, train_times):
    stream = standard[sensor]
    some = train_times[:: max(1, len(train_times) // 400)]
    channels = np.full((len(some), len(where[0]), len(cfg.channels)), np.nan)
    if not stream.config.moving:
        now = stream.tokens(some)
        value = np.where(now["mask"][:, :, 0], now["value"][:, :, 0], np.nan)
        channels[:, :, cfg.span(sensor)] = value[:, : len(where[0])]
    latitude, longitude, height = where
    return field.fit_kernel(anchors, latitude, longitude, height, channels)


def _fit_propagator(cfg, fitted, standard, protocol, train_times, validation_times, folds, progress):
    times = np.concatenate([train_times, validation_times])
    is_validation = np.r_[np.zeros(len(train_times), bool), np.ones(len(validation_times), bool)]
    gather = jax.jit(lambda tokens: model.gather_history(fitted, tokens, None, cfg=cfg)[0])
    channels = [cfg.channels.index(tuple(t)) for t in cfg.targets]
    m = fitted.anchors.latitude.shape[0]
    history = np.empty((len(times), m, cfg.slots, len(cfg.channels)), np.float32)
    chunk = 256
    for start in range(0, len(times), chunk):
        part = times[start : start + chunk]
        batch = {name: windows.Tokens(**s.tokens(part)) for name, s in standard.items()}
        if len(part) < chunk:  # one compiled shape
            batch = jax.tree.map(
                lambda x: np.concatenate([x, np.zeros((chunk - len(x), *x.shape[1:]), x.dtype)]), batch
            )
        history[start : start + len(part)] = np.asarray(gather(batch))[: len(part)]
    near = np.asarray(field.proximity(fitted.anchors, *(jnp.asarray(a) for a in _sites(standard, cfg))))
    typical = np.median(np.sort(near, axis=1)[:, -1] ** -0.25)
    threshold = max(15.0, 1.5 * typical) ** -4
    target = np.zeros((len(cfg.leads), len(times), m, len(channels)), np.float32)
    present = np.zeros(target.shape, bool)
    fixed = next(s for s in standard.values() if not s.config.moving)
    span = cfg.span(fixed.config.sensor)
    columns = [c - span.start for c in channels]
    for start in range(0, len(times), chunk):
        part = slice(start, start + chunk)
        out = fixed.targets(times[part], np.asarray(cfg.leads))
        mask = out["mask"][..., columns].astype(np.float32)
        weight = np.einsum("mn,tlnc->ltmc", near, mask, optimize=True)
        total = np.einsum("mn,tlnc->ltmc", near, out["value"][..., columns] * mask, optimize=True)
        target[:, part] = total / np.maximum(weight, 1e-30)
        present[:, part] = weight > threshold
    for k, lead in enumerate(cfg.leads):  # validation rows count at the leads whose valid time is a validation hour
        valid = geometry.datetimes(validation_times) + np.timedelta64(round(lead * 3600), "s")
        present[k, len(train_times) :] &= (protocol.role(valid) == "validation")[:, None, None]
    slots = [i for i, s in enumerate(fixed.config.slots) if s in (0.0, 3.0, 12.0)] or [0]
    normal = fitted.normals[fixed.config.sensor]
    return propagator.fit_propagator(
        fitted.anchors,
        history,
        times,
        target,
        present,
        leads=cfg.leads,
        channels=channels,
        slots=slots,
        folds=np.r_[folds, np.full(len(validation_times), -1)],
        validation=is_validation,
        fold_count=cfg.folds,
        penalties=cfg.penalties,
        length_km=cfg.localisation_km,
        clock=normal.daily > 0,
        season=normal.annual > 1,
        progress=progress,
    )


def _sites(standard, cfg):
    fixed = next(s for s in standard.values() if not s.config.moving)
    t = fixed.targets(0, np.zeros(1), 0)
    return t["latitude"], t["longitude"], t["height"]


def train(
    data: Prepared,
    tcfg: TrainConfig,
    directory: str | pathlib.Path,
    *,
    mesh: Any = None,
    rules: Any = None,
    progress: bool = True,
) -> Params:
    """Trains every member through every stage; returns Params whose network carries a leading member axis.

    Each member and stage has its own directory below `directory` with checkpoints and metrics.jsonl; an interrupted run
    resumes where it stopped.

    Args:
      mesh, rules: over all devices of all processes; every process calls this with the same data and gets the same
        parameters back. `tcfg.batch` is the global batch, which every process reads its own rows of.

    Raises:
      EmptyWindowError: the chain of a stage is longer than any stretch of training hours.
    """
    rules = rules or sharding.DP
    found = []
    context = contextlib.nullcontext() if mesh is None else sharding.use_mesh(mesh, rules)
    with context:
        for member in range(tcfg.members):
            found.append(_train_member(data, tcfg, pathlib.Path(directory), member, mesh, rules, progress))
    shape = (len(found), len(data.cfg.leads), len(data.cfg.channels))
    return Params(dataclasses.replace(data.fitted, weight=jnp.full(shape, 1.0 / len(found))), model.members(found))


def _train_member(data: Prepared, tcfg: TrainConfig, directory, member: int, mesh, rules, progress: bool) -> Any:
    """One network through every stage; from a mesh it comes back whole, as numpy arrays."""
    seed = tcfg.seed * 1000 + member
    anchors = data.fitted.anchors.latitude.shape[0]
    network = model.initial_network(jax.random.key(seed), data.cfg, anchors, residual=member % 2 == 0)
    place = None
    if mesh is not None:
        network = jax.device_put(network, shardings(model.specs(data.cfg, anchors), mesh, rules))
        place = functools.partial(sharding.global_batch, mesh=mesh, rules=rules)
    for number, stage in enumerate(tcfg.stages if member % 2 == 0 else tcfg.direct or tcfg.stages):
        times, folds = _stage_times(data, stage)
        batches = windows.dataset(
            data.streams,
            times,
            folds,
            Sampling(stage.strata, stage.queries, stage.cycling, partners=stage.objective.mixup > 0),
            batch=tcfg.batch,
            seed=seed * 10 + number,
            shard=sharding.host_shard(mesh, rules) if mesh is not None else sharding.HostShard(0, 1),
        )
        schedule = optax.warmup_cosine_decay_schedule(
            0.0,
            stage.learning_rate,
            min(stage.warmup, stage.steps // 4 + 1),
            max(stage.steps, 2),
            0.02 * stage.learning_rate,
        )
        decay_mask = functools.partial(jax.tree.map, lambda x: x.ndim >= 2)
        optimizer = optax.adamw(schedule, b2=0.98, weight_decay=stage.weight_decay, mask=decay_mask)
        state = training.init_state(network, optimizer, jax.random.key(seed + 7), ema=True)
        loss = functools.partial(
            objectives.forecast_loss, fitted=data.fitted, cfg=data.cfg, objective=stage.objective, cycling=stage.cycling
        )
        step = training.make_train_step(
            loss,
            optimizer,
            accumulate=tcfg.accumulate,
            clip_norm=1.0,
            ema_decay=tcfg.ema,
            shardings=None if mesh is None else training.state_shardings(state),
        )
        state = training.fit(
            step,
            state,
            iter(batches),
            steps=stage.steps,
            directory=directory / f"member{member}" / stage.name,
            config={"model": data.cfg, "stage": stage, "batch": tcfg.batch, "seed": seed},
            checkpoint_every=tcfg.checkpoint_every,
            log_every=tcfg.log_every,
            place=place,
            progress=progress,
            description=f"member {member + 1}/{tcfg.members} {stage.name}",
        )
        network = state.ema_params
    if mesh is None:
        return network
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(network)
    return jax.tree.map(np.asarray, whole)


def _stage_times(data: Prepared, stage: StageConfig) -> tuple[np.ndarray, np.ndarray]:
    """Initial times (and folds) whose whole chain, from the oldest report of its first window to the last target, lies
    in training hours.
    """
    if not stage.cycling.active:
        return data.train_times, data.folds
    main = next((s for s in data.cfg.streams if not s.moving), data.cfg.streams[0])
    found = windows.training_times(
        data.reports[main.sensor],
        data.protocol,
        span_hours=max(max(s.slots) for s in data.cfg.streams),
        longest_lead=max(data.cfg.leads),
        streams=data.streams,
        cycling=stage.cycling,
        candidates=data.train_times,
    )
    keep = np.isin(data.train_times, found)
    if not keep.any():
        raise EmptyWindowError(
            f"no initial time of stage {stage.name!r} has {stage.cycling.before:g} h of windows before it and "
            f"{stage.cycling.after:g} h of targets after it within training hours; take fewer cycles or a shorter "
            "roll-out"
        )
    return data.train_times[keep], data.folds[keep]
