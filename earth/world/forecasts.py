"""Forecasts of the global model at any points: a chain of analyses to the initial time, then the dynamics.

    analysis = analyse(params, record, init, cycles=4, cfg=cfg)
    frame["prediction"], frame["spread"] = forecast(params, record, frame, cycles=4, cfg=cfg)

`forecast` answers the frames of `earth.osse.verification.targets`, or any with the same columns; `assimilate`,
`advance` and `observe` of `earth.world.model` are beneath it.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pandas as pd

from earth import geometry
from earth.neighbours import nearest
from earth.observations import ObservationError
from earth.world import model, network
from earth.world.climate import climate
from earth.world.model import Params, State, WorldConfig
from earth.world.records import Record, Tokens, host_place


def queries(
    cfg: WorldConfig, anchors: Any, sensor: str, latitude: Any, longitude: Any, height: Any, *, view_angle: Any = 0.0,
    age: Any = 0.0,
) -> Tokens:  # fmt: skip
    """Points to read a sensor at, with their nearest anchors.

    Args:
      anchors: `params.fitted.anchors`. latitude, longitude: degrees [Q]; height: m; view_angle: degrees from nadir.
      age: hours before the time of the state, within [0, step).

    Raises:
      ObservationError: a coordinate that is not finite, or an age outside the window.
    """
    shape = np.shape(latitude)
    parts = [np.broadcast_to(np.float32(x), shape) for x in (latitude, longitude, height, view_angle, age)]
    for name, x in zip(("latitude", "longitude", "height", "view_angle", "age"), parts, strict=True):
        bad = ~np.isfinite(x)
        if bad.any():
            raise ObservationError(f"{name} of query {int(bad.argmax())} is {x[bad][0]}; drop it or give a number")
    lat, lon, z, view, old = parts
    outside = (old < 0) | (old >= cfg.step)
    if outside.any():
        raise ObservationError(
            f"an age of {old[outside][0]} h lies outside [0, {cfg.step}): advance the state to the window the query "
            "belongs to"
        )
    width = len(cfg.sensor(sensor).variables)
    empty = np.zeros((*shape, width), np.float32)
    near = nearest(host_place(cfg.field, lat, lon, z), np.asarray(anchors.place, np.float64), cfg.field.neighbours)
    return Tokens(empty, empty > 0, empty + 1, old, lat, lon, z, view, near)


@functools.cache
def _jitted(cfg: WorldConfig) -> tuple[Any, Any, Any]:
    return (
        jax.jit(functools.partial(model.assimilate, cfg=cfg)),
        jax.jit(functools.partial(model.advance, cfg=cfg), static_argnums=2),
        jax.jit(functools.partial(model.observe, cfg=cfg), static_argnums=2),
    )


def analyse(
    params: Params, record: Record, init: Any, *, cycles: int, cfg: WorldConfig,
    tokens: Mapping[str, int] | None = None, given: Mapping[str, bool] | None = None, state: State | None = None,
    seed: int = 0, key: Any = None,
) -> State:  # fmt: skip
    """The analysis at `init` (datetime64) from the last `cycles` windows of a record, each with a first guess.

    Args:
      tokens: reports of a window by sensor, where more than the config's are to be read.
      given: sensors that may be read; all by default.
      state: an analysis `cycles` steps earlier to go on from; None starts from nothing.
      seed: of the reports drawn where there are more. key: random key of a member, see `ensemble`.
    """
    assimilate, advance, _ = _jitted(cfg)
    end = int(np.datetime64(init, "s").astype(np.int64))
    step = round(cfg.step * 3600)
    rng = np.random.default_rng([seed, end % 2**32])
    for k in reversed(range(cycles)):
        window = record.window(end - k * step, rng, tokens=tokens)
        time = model.window_end(end - k * step)
        if state is None:
            state = State(time - np.int32(step), network.background(params.network, params.fitted.anchors, time))
        shown = {name: np.full(np.shape(t.age), given is None or given.get(name, True)) for name, t in window.items()}
        state = assimilate(params, advance(params, state, 1, key=key), window, time, given=shown, key=key)
    assert state is not None
    return state


def forecast(
    params: Params, record: Record, wanted: pd.DataFrame, *, cycles: int, cfg: WorldConfig,
    sensors: Mapping[str, str] | None = None, tokens: Mapping[str, int] | None = None,
    given: Mapping[str, bool] | None = None, carry: bool = False, key: Any = None, progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(prediction, standard deviation) [n], SI, of every row of a frame; NaN for variables the model does not have.

    Args:
      record: reports that may be read; none after an initial time is.
      wanted: columns init_time, valid_time, group, variable, latitude, longitude, height, pressure (NaN where the
        height counts).
      sensors: which sensor answers for a group; the group's own name by default.
      carry: each analysis goes on from the one before where whole steps lie between them, as a centre would cycle;
        otherwise every initial time starts from nothing, `cycles` windows earlier.
      key: random key of one member, see `ensemble`; None for the deterministic forecast.
    """
    from tqdm import tqdm

    _, advance, observe = _jitted(cfg)
    out = np.full((2, len(wanted)), np.nan)
    height = wanted["height"].to_numpy(float)
    pressure = wanted["pressure"].to_numpy(float)
    height = np.where(np.isfinite(pressure), geometry.standard_height(pressure), height)
    valid = wanted["valid_time"].to_numpy("datetime64[s]")
    step = np.timedelta64(round(cfg.step * 3600), "s")
    starts = np.unique(wanted["init_time"].to_numpy("datetime64[s]"))
    last, analysis = None, None
    for init in tqdm(starts, desc="forecasts", disable=not progress):
        go_on = carry and last is not None and not (init - last) % step
        windows = int((init - last) // step) if go_on else cycles
        analysis = analyse(
            params, record, init, cycles=windows, cfg=cfg, tokens=tokens, given=given,
            state=analysis if go_on else None, key=key,
        )  # fmt: skip
        last, state = init, analysis
        rows = np.flatnonzero(wanted["init_time"].to_numpy("datetime64[s]") == init)
        ahead = -((init - valid[rows]) // step)  # whole steps that reach the valid time
        done = 0
        for count in np.unique(ahead):
            state = advance(params, state, int(count) - done, key=key)
            done = int(count)
            now = rows[ahead == count]
            for group in wanted["group"].iloc[now].unique():
                name = group if sensors is None else sensors[group]
                own = now[(wanted["group"].iloc[now] == group).to_numpy()]
                place = np.stack([wanted["latitude"].to_numpy()[own], wanted["longitude"].to_numpy()[own], height[own]])
                age = (init + done * step - valid[own]) / np.timedelta64(3600, "s")
                points, back = np.unique(np.concatenate([place, age[None]]).T, axis=0, return_inverse=True)
                padded = pad(points)
                q = queries(cfg, params.fitted.anchors, name, *padded[:, :3].T, age=padded[:, 3])
                mean, sd = (np.asarray(x) for x in observe(params, state, name, q))
                columns = {v: i for i, v in enumerate(cfg.sensor(name).variables)}
                column = np.array([columns.get(v, -1) for v in wanted["variable"].to_numpy()[own]])
                known = column >= 0
                out[0, own[known]] = mean[back.ravel()[known], column[known]]
                out[1, own[known]] = sd[back.ravel()[known], column[known]]
    return out[0], out[1]


def ensemble(
    params: Params, record: Record, wanted: pd.DataFrame, *, members: int, cfg: WorldConfig, seed: int = 0,
    progress: bool = True, **options: Any,
) -> np.ndarray:  # fmt: skip
    """Forecasts [n, members], SI, of every row of a frame: equally likely courses of the atmosphere, from a network
    that was trained with noise and several members (`NetworkConfig.noise`, `StageConfig.members`). Each cycles and
    advances with noise of its own; the reports are the same. What a single report errs by is not in them.

    Args:
      options: as for `forecast`.
    """
    from tqdm import tqdm

    keys = jax.random.split(jax.random.key(seed), members)
    made = [
        forecast(params, record, wanted, cfg=cfg, key=key, progress=False, **options)[0]
        for key in tqdm(keys, desc="members", disable=not progress)
    ]
    return np.stack(made, 1)


def sample(
    params: Params, state: State, sensor: str, latitude: Any, longitude: Any, height: Any, *, cfg: WorldConfig,
    view_angle: Any = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """(prediction, standard deviation, normal) [Q, V], SI, of a sensor at points (as for `queries`) and at the state's
    time; for maps and spectra.
    """
    place = np.stack(np.broadcast_arrays(latitude, longitude, height, view_angle), -1).astype(np.float32)
    padded = pad(place)
    q = queries(cfg, params.fitted.anchors, sensor, *padded[:, :3].T, view_angle=padded[:, 3])
    mean, sd = (np.asarray(x)[: len(place)] for x in _jitted(cfg)[2](params, state, sensor, q))
    usual, _ = climate(params.fitted.normals[sensor], place[:, 0], place[:, 1], place[:, 2], place[:, 3], state.time)
    return mean, sd, np.broadcast_to(np.asarray(usual), mean.shape)


def pad(points: np.ndarray, multiple: int = 128) -> np.ndarray:
    """To a multiple, so that few sizes are compiled."""
    extra = -len(points) % multiple
    return np.concatenate([points, np.repeat(points[-1:], extra, 0)])
