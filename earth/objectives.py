"""Training objective: masked Gaussian likelihood in observation space, with hidden stations, hidden instruments and
mixed samples.

One objective serves every stage; only the leads differ. At lead 0 it is the masked autoencoder (hidden values are
reconstructed from what is left), beyond 0 the forecast. With `earth.windows.Cycling` the analysis at t0 comes out of a
chain of earlier ones and may be rolled out beyond it. Rates, weights and the scoring of the chain are ours.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from earth import model, propagator
from earth.geometry import Array
from earth.model import EarthConfig, Fitted, Params, Queries, State
from earth.network import Network, encode, evolve
from earth.windows import Cycling, Targets, Tokens
from moe.training import Mean

_VISIBLE = 0.1


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Attributes:
    hide_site: probability that a platform's whole window is hidden (it is then a point without a station).
    hide_instrument: probability that an instrument is hidden at every platform of the sample.
    mixup: Beta parameter of mixing pairs of samples; 0 switches it off. Mixing keeps linear relations and is what lets
    a network train on
      500 days of weather without memorising them (measured on stations-v1: without it validation error rises after 250
      steps).
    auxiliary: weight of channels that are not targets.
    analysis: weight of lead 0, at what was hidden; a tenth of it at what was seen, where nothing is to be corrected.
    denied: variables hidden in every sample: a sensor-denial experiment learns them from the other sensors only.
    """

    hide_site: float = 0.15
    hide_instrument: float = 0.1
    mixup: float = 1.0
    auxiliary: float = 0.2
    analysis: float = 0.5
    denied: tuple[str, ...] = ()


def hide(
    rng: Any, tokens: Mapping[str, Tokens], cfg: EarthConfig, objective: ObjectiveConfig
) -> tuple[dict[str, Tokens], dict[str, Array]]:
    """Hides platforms and instruments, where samples are mixed the same ones in both of a pair.

    Returns:
      (tokens, per stream a mask [B, N, V] of what was hidden).
    """
    out, hidden = {}, {}
    for i, stream in enumerate(cfg.streams):
        t = tokens[stream.sensor]
        batch, n = t.value.shape[:2]
        site, instrument, amount = jax.random.split(jax.random.fold_in(rng, i), 3)
        # Rates vary from sample to sample (0 to twice the mean), so that the network meets dense and sparse networks
        # alike.
        rate = 2 * objective.hide_site * jax.random.uniform(amount, (batch, 1))
        gone = _pairs(jax.random.bernoulli(site, rate, (batch, n)), objective)
        groups = stream.instruments or tuple((name,) for name in stream.variables)
        index = {name: g for g, group in enumerate(groups) for name in group}
        of = jnp.asarray([index.get(name, len(groups)) for name in stream.variables])
        off = jax.random.bernoulli(instrument, objective.hide_instrument, (batch, len(groups) + 1))
        off = _pairs(off, objective)[:, of]
        lost = gone[:, :, None] | off[:, None, :] | jnp.asarray([name in objective.denied for name in stream.variables])
        mask = t.mask & ~lost[:, :, None, :]
        out[stream.sensor] = dataclasses.replace(t, mask=mask, value=jnp.where(mask, t.value, 0.0))
        hidden[stream.sensor] = lost
    return out, hidden


def _once(tokens: Mapping[str, Tokens], cfg: EarthConfig) -> dict[str, Tokens]:
    """Positions of platforms that stand still, once for the batch: kernels are then not computed B times."""
    out = dict(tokens)
    for stream in (s for s in cfg.streams if not s.moving):
        t = tokens[stream.sensor]
        out[stream.sensor] = dataclasses.replace(
            t, latitude=t.latitude[:1], longitude=t.longitude[:1], height=t.height[:1]
        )
    return out


def _pairs(x: Array, objective: ObjectiveConfig) -> Array:
    """Sample B - 1 - i gets what sample i has; nothing changes where samples are not mixed."""
    half = x.shape[0] // 2
    return x if objective.mixup == 0 else jnp.concatenate([x[: x.shape[0] - half], x[:half][::-1]])


def forecast_loss(
    network: Network,
    batch: Mapping[str, Any],
    rng: Any,
    *,
    fitted: Fitted,
    cfg: EarthConfig,
    objective: ObjectiveConfig,
    cycling: Cycling = Cycling(),
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Objective of a batch from `earth.windows.dataset` (tokens and targets standardised).

    The mean is fitted by squared error in units of the propagator's cross-fitted error, the spread by Gaussian
    likelihood of the detached residual.

    Args:
      batch: see `earth.windows.sample`; values where a mask is False may be anything, NaN too.
      cycling: the chain the batch was sampled with. What is hidden, the partner of a sample and its share are the same
        in every window of a chain. Every scored step counts like a lead. The background comes from the propagator that
        was fitted without the sample's fold at t0; an earlier window may reach into the fold before, by
        `cycling.before` hours at each boundary.

    Returns:
      ({"mean": Mean, "spread": Mean}, metrics); missing targets have weight 0. Metrics are the mean squared error at
      the targets and that of the propagator alone ("mse", "mse_base"), and the same over the chain's steps
      ("mse_steps", "mse_steps_base").
    """
    params = Params(fitted, network)
    batch = dict(batch, tokens=_once(batch["tokens"], cfg))
    if "windows" in batch:
        batch["windows"] = _once(batch["windows"], cfg)
    rng_hide, rng_mix, rng_drop = jax.random.split(rng, 3)
    time, leads, fold = batch["time"], batch["leads"], batch["fold"]
    b = leads.shape[0]
    share = None
    if objective.mixup > 0:
        share = jax.random.beta(rng_mix, objective.mixup, objective.mixup, (b,))
        share = jnp.maximum(share, 1 - share)

    def analyse(before: State | None, tokens, at, key) -> tuple[State, dict[str, Array]]:
        # `model.assimilate_tokens`, but that the linear part reads the sample's own tokens, so that its forecasts can
        # be mixed afterwards, with the propagator of the fold, and the network reads the mixed tokens.
        tokens, hidden = hide(rng_hide, tokens, cfg, objective)
        history, seen = model.gather_history(
            fitted, tokens, model.background(fitted, before, at, cfg=cfg, fold=fold), cfg=cfg
        )
        mixed = tokens if share is None else {name: _mix_tokens(t, share) for name, t in tokens.items()}
        memory = None if before is None else before.latent
        if memory is not None and not cycling.through_time:
            memory = jax.lax.stop_gradient(memory)
        analysis, sites = encode(
            network, mixed, fitted.anchors, fitted.place, at, memory,
            cfg=cfg.network, streams=cfg.streams, dtype=jnp.dtype(cfg.compute), rng=key,
        )  # fmt: skip
        return State(at, at, history, seen, analysis, analysis, sites), hidden

    def ahead(state: State, hours: Float[Array, "B L"], key) -> State:
        """The state at L leads: time and latent [B, L, ...], the rest [B, 1, ...]."""
        latent = jax.vmap(
            lambda lead: evolve(network, state.analysis, fitted.anchors, state.origin, lead, cfg=cfg.network, rng=key),
            in_axes=1,
            out_axes=1,
        )(hours)
        valid = state.origin[:, None] + jnp.round(hours * 3600.0).astype(time.dtype)
        one = jax.tree.map(lambda x: x[:, None], state)
        return dataclasses.replace(one, time=valid, origin=jnp.broadcast_to(one.origin, valid.shape), latent=latent)

    def linear(state: State, hours: Float[Array, "B L"]) -> Float[Array, "B L M C"]:
        feature = propagator.features(fitted.propagator, fitted.anchors, state.history, state.origin)
        count = hours.shape[1]
        fields = [model.linear_field(fitted, feature, state.history, hours[:, k], fold) for k in range(count)]
        return jnp.stack(fields, 1)

    step = jnp.full((b, 1), cycling.hours, jnp.float32)
    state, moved, chain = None, None, []
    places = (*range(-cycling.cycles, 0), 0, *range(1, cycling.rollout + 1)) if cycling.active else (0,)
    forecast = None
    for number, place in enumerate(places):
        key = rng_drop if place == 0 else jax.random.fold_in(rng_drop, 1000 + number)
        tokens = batch["tokens"]
        if place < 0:
            tokens = jax.tree.map(lambda x, k=number: x[:, k], batch["windows"])
        if place > 0:  # nothing is observed
            tokens = {name: dataclasses.replace(t, mask=jnp.zeros_like(t.mask)) for name, t in tokens.items()}
        at = time + jnp.asarray(round(place * cycling.hours * 3600), time.dtype)
        background = None if moved is None else jax.tree.map(lambda x: x[:, 0], moved)
        state, hidden = analyse(background, tokens, at, key)
        if place == 0:
            forecast = state, hidden
        if cycling.active:
            moved = ahead(state, step, key)
            if number >= cycling.spin_up:
                chain.append((moved, linear(state, step)))
    assert forecast is not None  # 0 is among the places
    state, hidden = forecast
    terms: list = []
    score = functools.partial(_score, params, cfg=cfg, objective=objective, share=share, rng=rng_drop)
    metrics = score(terms, ahead(state, leads, rng_drop), linear(state, leads), batch["targets"], leads, hidden=hidden)
    metrics = {"mse": metrics[0], "mse_base": metrics[1]}
    if chain:
        later, base = (jax.tree.map(lambda *x: jnp.concatenate(x, 1), *parts) for parts in zip(*chain, strict=True))
        hours = jnp.broadcast_to(step, (b, len(chain)))
        steps = score(terms, later, base, batch["steps"], hours, hidden=None)
        metrics |= {"mse_steps": steps[0], "mse_steps_base": steps[1]}
    total = {k: sum((w * term[k]).sum() for w, term in terms) for k in ("mean", "spread")}
    weight = sum(w.sum() for w, _ in terms)
    return {k: Mean(v, weight) for k, v in total.items()}, metrics


def _score(
    params: Params,
    terms: list,
    state: State,
    base: Float[Array, "B L M C"],
    targets: Mapping[str, Targets],
    leads: Float[Array, "B L"],
    *,
    hidden: Mapping[str, Array] | None,
    cfg: EarthConfig,
    objective: ObjectiveConfig,
    share: Float[Array, " B"] | None,
    rng: Any,
) -> tuple[Mean, Mean]:
    """Appends (weight, {"mean", "spread"} loss) [B, L, Q, V] of each stream to `terms`; returns the mean squared errors
    of the forecast and of the propagator at target variables beyond lead 0.

    Args:
      state: at the valid times of the L leads; base: the linear field there.
      hidden: what the analysis did not see, for lead 0; None where no lead is 0.
    """
    squares, baseline, count = [], [], []
    for stream in cfg.streams:
        target, span = targets[stream.sensor], cfg.span(stream.sensor)
        # Fixed platforms stand still: one set of positions for the batch, so that kernel weights are computed once and
        # not B L times.
        where = [a if stream.moving else a[0] for a in (target.latitude, target.longitude, target.height)]
        read, own, log_spread, scale = model.read(params, state, base, Queries(*where), cfg=cfg, rng=rng)
        y, w = jnp.where(target.mask, target.value, 0.0), target.mask.astype(jnp.float32)
        factor = jnp.ones(())
        if hidden is not None:
            lost = hidden[stream.sensor][:, None] if not stream.moving else jnp.zeros((), bool)
            now = objective.analysis * jnp.where(lost, 1.0, _VISIBLE)
            factor = jnp.where(leads[..., None, None] > 0, 1.0, now)
        read, own, log_spread, scale = (a[..., span] for a in (read, own, log_spread, scale))
        if share is not None:
            s = share[:, None, None, None]
            mixed_read = s * read + (1 - s) * read[::-1]
            own = own + jax.lax.stop_gradient(params.network.residual) * (mixed_read - read)
            read, y, w = mixed_read, s * y + (1 - s) * y[::-1], w * w[::-1]
        error = (y - own) / scale
        role = jnp.asarray(
            [1.0 if (stream.sensor, v) in cfg.targets else objective.auxiliary for v in stream.variables]
        )
        w = w * factor * role
        spread = 0.5 * jax.lax.stop_gradient(error) ** 2 * jnp.exp(-2 * log_spread) + log_spread
        terms.append((w, {"mean": 0.5 * error**2, "spread": spread}))
        main = w * (role == 1) * (leads[..., None, None] > 0)
        squares.append((main * error**2).sum())
        baseline.append((main * ((y - read) / scale) ** 2).sum())
        count.append(main.sum())
    return Mean(sum(squares), sum(count)), Mean(sum(baseline), sum(count))


def _mix_tokens(t: Tokens, share: Float[Array, " B"]) -> Tokens:
    s = share[:, None, None, None]
    mask = t.mask & t.mask[::-1]
    return dataclasses.replace(t, value=jnp.where(mask, s * t.value + (1 - s) * t.value[::-1], 0.0), mask=mask)
