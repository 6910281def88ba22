"""Inversion: products from the field by small heads on the frozen trunk.

    head = fit_inversion(params, record, products, times, cfg=cfg, given={"amsua": True, ...})
    mean, spread = invert(params, head, state, queries, cfg=cfg)

A product is whatever is known at points during training (a column amount, surface pressure, a flux): the trunk is not
touched, so heads are cheap and never spoil each other. Analyses are made once, with the sensors that will be there in
use; the head then learns on what `read` sees at the points, standardised by the products' own mean and deviation. Form
and sizes are ours; that heads sit on a frozen trunk is how we read the paper's panel "Inversion".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from earth.layers import Dense, apply, dense
from earth.observations import EmptyWindowError
from earth.world import forecasts, network
from earth.world.model import Params, State, WorldConfig
from earth.world.records import Record, Tokens
from moe.params import init


@dataclasses.dataclass(frozen=True)
class InversionConfig:
    """Attributes:
    hidden: width of the head. steps, learning_rate, weight_decay: of AdamW with cosine decay. batch: points of a step.
    cycles: windows of each analysis. seed: of draws and initial weights.
    """

    hidden: int = 64
    steps: int = 2000
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    batch: int = 1024
    cycles: int = 3
    seed: int = 0


@flax.struct.dataclass
class Inversion:
    """A head: features of the trunk -> products; [P] centre and scale of each product."""

    up: Dense
    mean: Dense
    spread: Dense
    centre: Any
    scale: Any


def features(params: Params, state: State, queries: Tokens, *, cfg: WorldConfig) -> Any:
    """[Q, F] what the trunk knows at points: the hidden layer of reading and the place."""
    net, anchors = params.network, params.fitted.anchors
    column = network.read_column(net, state.latent, anchors, queries, cfg=cfg.network, field=cfg.field)
    about, age = network.about_report(queries, state.time, cfg.step)
    return jnp.concatenate([network.hidden_layer(net, column, about, age), about, age], -1)


def fit_inversion(
    params: Params, record: Record, products: pd.DataFrame, names: Sequence[str], *, cfg: WorldConfig,
    icfg: InversionConfig | None = None, given: Mapping[str, bool] | None = None,
    tokens: Mapping[str, int] | None = None, progress: bool = True,
) -> Inversion:  # fmt: skip
    """Fits a head for P products.

    Args:
      record: training reports, which the analyses are made of.
      products: columns time (datetime64, of an analysis: any, but few distinct ones), latitude, longitude, height and
        the products; NaN where a product is not known.
      names: the products' columns.
      given: sensors that the analyses may read; all by default. tokens: reports of a window, as for `analyse`.

    Raises:
      EmptyWindowError: a product without any value.
    """
    icfg = icfg or InversionConfig()
    y = products[list(names)].to_numpy(np.float64)
    empty = ~np.isfinite(y).any(0)
    if empty.any():
        raise EmptyWindowError(f"product {names[int(empty.argmax())]!r} has no value; leave it out")
    centre, scale = np.nanmean(y, 0), np.maximum(np.nanstd(y, 0), 1e-12)
    z = ((y - centre) / scale).astype(np.float32)
    sensor = cfg.sensors[0].sensor  # any: features do not depend on it
    collect = jax.jit(lambda state, q: features(params, state, q, cfg=cfg))
    x = None
    times = products["time"].to_numpy("datetime64[s]")
    from tqdm import tqdm

    for time in tqdm(np.unique(times), desc="analyses", disable=not progress):
        rows = np.flatnonzero(times == time)
        state = forecasts.analyse(params, record, time, cycles=icfg.cycles, cfg=cfg, given=given, tokens=tokens)
        place = products[["latitude", "longitude", "height"]].to_numpy(float)[rows]
        q = forecasts.queries(cfg, params.fitted.anchors, sensor, *forecasts.pad(place).T)
        found = np.asarray(collect(state, q))[: len(rows)]
        x = np.zeros((len(products), found.shape[1]), np.float32) if x is None else x
        x[rows] = found
    assert x is not None
    specs = {
        "up": dense(x.shape[1], icfg.hidden), "mean": dense(icfg.hidden, len(names), 0.1),
        "spread": dense(icfg.hidden, len(names), 0.1),
    }  # fmt: skip
    head = init(jax.random.key(icfg.seed), specs)
    schedule = optax.warmup_cosine_decay_schedule(0.0, icfg.learning_rate, 50, max(icfg.steps, 100), 0.0)
    optimizer = optax.adamw(schedule, weight_decay=icfg.weight_decay)

    def loss(head: Any, x: Any, z: Any) -> Any:
        mean, log_spread = _answer(head, x)
        known = jnp.isfinite(z)
        error = jnp.where(known, z - mean, 0.0)
        sd = jnp.clip(log_spread, -5.0, 3.0)
        nll = sd + 0.5 * jax.lax.stop_gradient(error) ** 2 * jnp.exp(-2 * sd)
        return jnp.sum(jnp.where(known, error**2 + 0.25 * nll, 0.0)) / jnp.maximum(known.sum(), 1)

    @jax.jit
    def step(head: Any, state: Any, x: Any, z: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(head, x, z), state, head)
        return optax.apply_updates(head, updates), state

    rng = np.random.default_rng(icfg.seed)
    state = optimizer.init(head)
    for _ in range(icfg.steps):
        rows = rng.integers(0, len(x), min(icfg.batch, len(x)))
        head, state = step(head, state, x[rows], z[rows])
    fitted: Any = head
    return Inversion(fitted["up"], fitted["mean"], fitted["spread"], np.float32(centre), np.float32(scale))


def _answer(head: Any, x: Any) -> tuple[Any, Any]:
    up, mean, spread = (head[k] if isinstance(head, Mapping) else getattr(head, k) for k in ("up", "mean", "spread"))
    hidden = jax.nn.gelu(apply(up, x))
    return apply(mean, hidden), apply(spread, hidden)


def invert(params: Params, head: Inversion, state: State, queries: Tokens, *, cfg: WorldConfig) -> tuple[Any, Any]:
    """(mean [Q, P], standard deviation [Q, P]) of the products at points, in the units they were given in."""
    mean, log_spread = _answer(head, features(params, state, queries, cfg=cfg))
    return mean * head.scale + head.centre, jnp.exp(jnp.clip(log_spread, -5.0, 3.0)) * head.scale
