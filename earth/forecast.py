"""Forecasts from a trained model at stations or any points, at many initial times; the model as a folder on disk."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from earth import field, geometry, layers, model, network, normals, propagator, store, windows
from earth.export import to_dataset
from earth.model import EarthConfig, Params, Queries, State
from earth.observations import ObservationError, Reports
from earth.windows import Stream


def streams_of(params: Params, cfg: EarthConfig, reports: Mapping[str, Reports]) -> dict[str, Stream]:
    """Records -> standardised streams the model reads. Heights must be finite (`earth.train.fill_heights`)."""
    out = {}
    for stream in cfg.streams:
        if stream.sensor not in reports:
            raise ObservationError(
                f"the model reads {[s.sensor for s in cfg.streams]}; the record has {sorted(reports)}: "
                f"add {stream.sensor!r}"
            )
        r = reports[stream.sensor]
        # A network may have grown since training: tokens are padded to what is there.
        wide = stream if stream.moving else dataclasses.replace(stream, tokens=max(stream.tokens, len(r.platforms)))
        out[stream.sensor] = Stream(
            r, wide, normals.standardise_reports(params.fitted.normals[stream.sensor], r, stream.variables)
        )
    return out


@functools.partial(jax.jit, static_argnames=("cfg",))
def _parts(params: Params, tokens: Any, time: Any, leads: Any, queries: Queries, *, cfg: EarthConfig):
    feature_of = functools.partial(propagator.features, params.fitted.propagator, params.fitted.anchors)

    def member(weights):
        p = Params(params.fitted, weights)
        state = model.assimilate_tokens(p, None, tokens, time, cfg=cfg)
        feature = feature_of(state.history, state.origin)

        def at(lead):
            later = model.advance(p, state, lead, cfg=cfg)
            linear = model.linear_field(p.fitted, feature, state.history, later.lead)
            base, own, log_spread, scale = model.read(p, later, linear, queries, cfg=cfg)
            return base, own - base, scale * jnp.exp(log_spread)

        return jax.lax.map(at, leads)

    base, delta, spread = jax.vmap(member)(params.network)
    return base[0], delta, spread


def predict_members(
    params: Params,
    cfg: EarthConfig,
    streams: Mapping[str, Stream],
    times: np.ndarray,
    leads: Sequence[float],
    queries: Queries,
    *,
    batch: int = 64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parts of a forecast in standardised anomalies: (propagator [T, L, Q, C], what each member would add to it
    [E, T, L, Q, C], each member's spread before calibration [E, T, L, Q, C]).

    Args:
      params: with a leading axis of E members on `network`.
      times: int32 [T] initial times; only observations at or before them are read.
    """
    out = []
    hours = jnp.asarray(leads, jnp.float32)
    for start in range(0, len(times), batch):
        part = np.asarray(times[start : start + batch])
        full = np.r_[part, np.full(batch - len(part), part[0])] if len(times) > batch else part
        tokens = {name: windows.Tokens(**s.tokens(full)) for name, s in streams.items()}
        parts = [np.asarray(r) for r in _parts(params, tokens, jnp.asarray(full, jnp.int32), hours, queries, cfg=cfg)]
        out.append([np.moveaxis(r, -4, -3)[..., : len(part), :, :, :] for r in parts])  # leads came first
    return tuple(np.concatenate([o[i] for o in out], -4) for i in range(3))  # type: ignore[return-value]


def mixture(weight: np.ndarray, delta: np.ndarray, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of a mixture of the propagator (delta 0, share 1 - sum of weights) and the members.

    Args:
      weight, delta, spread: [E, ...] share, departure from the propagator and spread of each member. The propagator has
        no spread of its own and takes the members' average.
    """
    total = weight.sum(0)
    mean = (weight * delta).sum(0)
    own = ((weight + 1e-6) * spread**2).sum(0) / (total + 1e-6 * len(weight))
    return mean, np.sqrt(own + np.maximum((weight * delta**2).sum(0) - mean**2, 0.0))


def predict(
    params: Params,
    cfg: EarthConfig,
    streams: Mapping[str, Stream],
    times: np.ndarray,
    leads: Sequence[float],
    queries: Queries,
    *,
    batch: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """Predictive mean and standard deviation in SI, [T, L, Q, C] (cfg.channels), calibrated and members averaged."""
    base, delta, spread = predict_members(params, cfg, streams, times, leads, queries, batch=batch)
    served, hours = params.fitted.propagator.leads, jnp.asarray(leads, jnp.float32)
    knots = np.asarray(propagator.knot_weights(served, jnp.minimum(hours, served[-1])))
    # The analysis is that of the members that correct it, which learned it at hidden stations; validation of forecasts
    # says nothing about it.
    now = np.clip(1.0 - np.asarray(leads, float) / float(served[0]), 0.0, 1.0)[:, None]
    corrects = np.asarray(params.network.residual, float)
    corrects = corrects / corrects.sum() if corrects.any() else np.full_like(corrects, 1.0 / len(corrects))
    weight = (1 - now) * np.einsum("lk,ekc->elc", knots, np.asarray(params.fitted.weight))
    weight = (weight + now * corrects[:, None, None])[:, None, :, None, :]
    factor = (knots @ np.asarray(params.fitted.calibration))[None, :, None, :]
    change, spread = mixture(weight, delta, spread)
    z, spread = base + change, factor * spread
    at = np.asarray(times, np.int64)[:, None] + np.round(np.asarray(leads) * 3600).astype(np.int64)  # [T, L]
    mean = np.empty_like(z)
    for stream in cfg.streams:
        span, normal = cfg.span(stream.sensor), params.fitted.normals[stream.sensor]
        coefficients, log_sd = normals.normal_coefficients(normal, queries.latitude, queries.longitude, queries.height)
        unique, inverse = np.unique(at, return_inverse=True)
        expected = np.asarray(
            _normal_at(normal, coefficients, queries.height, jnp.asarray(unique, jnp.int32))
        )  # [U, Q, V]
        sd = np.exp(np.asarray(log_sd))
        mean[..., span] = expected[inverse.reshape(at.shape)] + z[..., span] * sd
        spread[..., span] *= sd
    return mean, spread


@jax.jit
def _normal_at(normal: normals.Normal, coefficients: Any, height: Any, time: Any):
    return jax.lax.map(
        lambda t: normals.normal_values(normal, coefficients, height, jnp.broadcast_to(t, height.shape)), time
    )


def sites(latitude: Any, longitude: Any, height: Any) -> Queries:
    """Degrees, degrees and metres -> Queries; raises ObservationError on NaN or impossible coordinates."""
    values = [np.atleast_1d(np.asarray(v, np.float32)) for v in (latitude, longitude, height)]
    for name, v, limit in zip(("latitude", "longitude", "height"), values, (90.0, 360.0, 1e5), strict=True):
        bad = ~(np.abs(v) <= limit)
        if bad.any():
            i = int(bad.argmax())
            raise ObservationError(
                f"{name} {v[i]} of query {i} is not a {name}; pass degrees north, degrees east and metres, none missing"
            )
    return Queries(*(jnp.asarray(v) for v in values))


def forecast(
    params: Params,
    cfg: EarthConfig,
    streams: Mapping[str, Stream],
    init_times: Any,
    leads: Sequence[float],
    stations: Mapping[str, Any],
    *,
    variables: Sequence[str],
    sensor: str | None = None,
    batch: int = 64,
) -> xr.Dataset:
    """Forecast Dataset (init_time, lead_time, station) with spreads, CF metadata and SI units, at any points.

    Args:
      init_times: datetimes UTC; leads: hours >= 0.
      stations: {"station": names, "latitude", "longitude", "height"} of the points; they need not be in the record.
      variables: of `sensor` (default: the first stream).
    """
    times = geometry.seconds(np.asarray(init_times, "datetime64[s]"))
    where = sites(stations["latitude"], stations["longitude"], stations["height"])
    mean, spread = predict(params, cfg, streams, times, leads, where, batch=batch)
    first = sensor or cfg.streams[0].sensor
    index = [cfg.channels.index((first, v)) for v in variables]
    return to_dataset(
        mean[..., index],
        spread[..., index],
        init_times=init_times,
        lead_hours=list(leads),
        variables=list(variables),
        stations=list(stations["station"]),
        latitude=stations["latitude"],
        longitude=stations["longitude"],
        height=stations["height"],
    )


def analyse(params: Params, cfg: EarthConfig, streams: Mapping[str, Stream], time: Any) -> State:
    """The state at one time from the record's window, by the first member; for `advance` and `observe`."""
    second = int(geometry.seconds(np.asarray(time, "datetime64[s]")))
    tokens = {name: jax.tree.map(jnp.asarray, windows.Tokens(**s.tokens(second))) for name, s in streams.items()}
    return model.assimilate_tokens(first_member(params), None, tokens, jnp.asarray(second, jnp.int32), cfg=cfg)


def first_member(params: Params) -> Params:
    """Params with one network, as the verbs take them."""
    fitted = dataclasses.replace(params.fitted, weight=params.fitted.weight[:1])
    return Params(fitted, jax.tree.map(lambda x: x[0], params.network))


_CLASSES = (
    Params,
    model.Fitted,
    normals.Normal,
    field.Anchors,
    field.Kernel,
    propagator.Propagator,
    network.Network,
    layers.Dense,
    network.Block,
)


def save_model(
    directory: str | pathlib.Path, params: Params, cfg: EarthConfig, *, meta: Mapping[str, Any] | None = None
) -> None:
    """Writes a trained model to a folder, complete or not at all. The cross-fitted propagators, needed in training
    only, are left out.
    """
    slim = dataclasses.replace(
        params, fitted=dataclasses.replace(params.fitted, propagator=propagator.final(params.fitted.propagator))
    )
    store.save(directory, slim, cfg, meta=meta)


def load_model(
    directory: str | pathlib.Path, *, cfg: EarthConfig | None = None
) -> tuple[Params, EarthConfig, dict[str, Any]]:
    """Reads what `save_model` wrote: (params, config, meta).

    Raises:
      moe.checkpoint.CheckpointError: nothing there, truncated, or (with `cfg`) of another configuration; the message
      names what differs.
    """
    return store.load(directory, EarthConfig, _CLASSES, cfg=cfg)
