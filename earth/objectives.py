"""Training objective: masked Gaussian likelihood in observation space, with hidden stations, hidden instruments and
mixed samples.

One objective serves every stage; only the leads differ. At lead 0 it is the masked autoencoder (hidden values are
reconstructed from what is left), beyond 0 the forecast. Rates and weights are ours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from earth import model, propagator
from earth.geometry import Array
from earth.model import EarthConfig, Fitted, Params, Queries
from earth.network import Network, evolve
from earth.windows import Tokens
from moe.training import Mean


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
    analysis: weight of lead 0.
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
    """Hides platforms and instruments. Returns the tokens and, per stream, a mask [B, N, V] of what was hidden."""
    out, hidden = {}, {}
    for i, stream in enumerate(cfg.streams):
        t = tokens[stream.sensor]
        batch, n = t.value.shape[:2]
        site, instrument, amount = jax.random.split(jax.random.fold_in(rng, i), 3)
        # Rates vary from sample to sample (0 to twice the mean), so that the network meets dense and sparse networks
        # alike.
        rate = 2 * objective.hide_site * jax.random.uniform(amount, (batch, 1))
        gone = jax.random.bernoulli(site, rate, (batch, n))
        groups = stream.instruments or tuple((name,) for name in stream.variables)
        index = {name: g for g, group in enumerate(groups) for name in group}
        of = jnp.asarray([index.get(name, len(groups)) for name in stream.variables])
        off = jax.random.bernoulli(instrument, objective.hide_instrument, (batch, len(groups) + 1))[:, of]
        lost = gone[:, :, None] | off[:, None, :] | jnp.asarray([name in objective.denied for name in stream.variables])
        mask = t.mask & ~lost[:, :, None, :]
        out[stream.sensor] = t.replace(mask=mask, value=jnp.where(mask, t.value, 0.0))
        hidden[stream.sensor] = lost
    return out, hidden


def forecast_loss(
    network: Network,
    batch: Mapping[str, Any],
    rng: Any,
    *,
    fitted: Fitted,
    cfg: EarthConfig,
    objective: ObjectiveConfig,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Objective of a batch from `earth.windows.dataset` (tokens and targets standardised).

    The mean is fitted by squared error in units of the propagator's cross-fitted error, the spread by Gaussian
    likelihood of the detached residual.

    Returns:
      ({"mean": Mean, "spread": Mean}, metrics); missing targets have weight 0.
    """
    params = Params(fitted, network)
    rng_hide, rng_mix, rng_drop = jax.random.split(rng, 3)
    tokens, hidden = hide(rng_hide, batch["tokens"], cfg, objective)
    time, leads, fold = batch["time"], batch["leads"], batch["fold"]
    b, n_leads = leads.shape
    history, _ = model.gather_history(fitted, tokens, None, cfg=cfg)
    feature = propagator.features(fitted.propagator, fitted.anchors, history, time)

    def base_at(k):
        return model.linear_field(fitted, feature, history, leads[:, k], fold)

    base = jnp.stack([base_at(k) for k in range(n_leads)], 1)  # [B, L, M, C]
    mixed, share = tokens, jnp.ones(b)
    if objective.mixup > 0:
        share = jax.random.beta(rng_mix, objective.mixup, objective.mixup, (b,))
        share = jnp.maximum(share, 1 - share)
        mixed = {name: _mix_tokens(t, share) for name, t in tokens.items()}
    state = model.assimilate_tokens(params, None, mixed, time, cfg=cfg, rng=rng_drop)
    latent = jax.vmap(
        lambda lead: evolve(network, state.analysis, fitted.anchors, time, lead, cfg=cfg.network, rng=rng_drop),
        in_axes=1,
        out_axes=1,
    )(leads)
    sites = jax.tree.map(lambda x: x[:, None], state.sites)
    terms: dict[str, list] = {"mean": [], "spread": [], "weight": []}
    squares, baseline = [], []
    for stream in cfg.streams:
        target, span = batch["targets"][stream.sensor], cfg.span(stream.sensor)
        # Fixed platforms stand still: one set of positions for the batch, so that kernel weights are computed once and
        # not B L times.
        where = [a if stream.moving else a[0] for a in (target.latitude, target.longitude, target.height)]
        valid = time[:, None] + jnp.round(leads * 3600.0).astype(time.dtype)
        lead_state = model.State(
            valid,
            jnp.broadcast_to(time[:, None], valid.shape),
            history[:, None],
            history[:, None],
            state.analysis[:, None],
            latent,
            sites,
        )
        queries = Queries(*where)
        read, own, log_spread, scale = model.read(params, lead_state, base, queries, cfg=cfg, rng=rng_drop)
        y, w = target.value, target.mask.astype(jnp.float32)
        lost = hidden[stream.sensor][:, None] if not stream.moving else jnp.zeros((b, 1, y.shape[2], y.shape[3]), bool)
        w = w * jnp.where(leads[..., None, None] > 0, 1.0, objective.analysis * lost)
        read, own, log_spread, scale = (a[..., span] for a in (read, own, log_spread, scale))
        if objective.mixup > 0:
            s = share[:, None, None, None]
            mixed_read = s * read + (1 - s) * read[::-1]
            own = own + jax.lax.stop_gradient(network.residual) * (mixed_read - read)
            read, y, w = mixed_read, s * y + (1 - s) * y[::-1], w * w[::-1]
        error = (y - own) / scale
        role = jnp.asarray(
            [1.0 if (stream.sensor, v) in cfg.targets else objective.auxiliary for v in stream.variables]
        )
        w = w * role
        terms["mean"].append(0.5 * error**2)
        terms["spread"].append(0.5 * jax.lax.stop_gradient(error) ** 2 * jnp.exp(-2 * log_spread) + log_spread)
        terms["weight"].append(w)
        main = w * (role == 1) * (leads[..., None, None] > 0)
        squares.append((main * error**2).sum())
        baseline.append(((main * ((y - read) / scale) ** 2).sum(), main.sum()))
    total = {k: sum((w * t).sum() for w, t in zip(terms["weight"], terms[k], strict=True)) for k in ("mean", "spread")}
    weight = sum(w.sum() for w in terms["weight"])
    count = sum(c for _, c in baseline)
    metrics = {"mse": Mean(sum(squares), count), "mse_base": Mean(sum(s for s, _ in baseline), count)}
    return {k: Mean(v, weight) for k, v in total.items()}, metrics


def _mix_tokens(t: Tokens, share: Float[Array, " B"]) -> Tokens:
    s = share[:, None, None, None]
    mask = t.mask & t.mask[::-1]
    return t.replace(value=jnp.where(mask, s * t.value + (1 - s) * t.value[::-1], 0.0), mask=mask)
