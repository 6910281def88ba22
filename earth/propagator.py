"""The linear part of the dynamics: a localised ridge propagator of the anchor field, fitted in closed form.

Near the climate normal the atmosphere's response to small anomalies is linear, and 500 days of hourly reports hold too
few independent weather situations for a network to find that part by gradient descent (measured on stations-v1: a
transformer alone is 12 % worse than ridge regression at 6 h, this propagator 1.3 % better). So the field at lead Δ is

    mean(Δ) = A(Δ) · history  (+ the network's correction),

where history holds the nearest anchors' anomalies at the slots of the window, and A(Δ) is a ridge regression whose
penalty grows with distance: λ (0.03 + (d/ℓ)²), the covariance localisation of data assimilation. A second block
multiplies near history with the solar clock, because an anomaly at noon means another thing than one at night. λ, ℓ and
the clock block's penalty are chosen per channel and lead by the error on validation hours and on the left-out folds
together (six validation weeks alone are too few weather situations to choose by). Between the fitted leads A is
interpolated linearly; beyond the last it decays towards the normal. All ours.

Cross-fitting: a network that corrects A must not be trained on A's in-sample residuals, so A is also fitted without
each fold of the training times (index 1 + fold; index 0 is the fit on everything, used after training).

Shapes: M anchors, R slots, C linear channels, F = J R C + 2 J' R' C features, K lead knots.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from earth import geometry
from earth.field import Anchors
from earth.geometry import Array
from moe.params import Param

_LOCAL = 0.03
_DECAY_HOURS = 48.0


@flax.struct.dataclass
class Propagator:
    """Fitted propagator.

    Attributes:
      leads: [K] hours, rising; the first is above 0.
      weight: [folds + 1, K, M, F, C] from features to the anchors' anomalies.
      near: [M, J] nearest anchors, nearest first: their history is what an anchor's tendency may depend on.
      clock_near: how many of them enter the clock block (static).
      slots: indices of the R' slots of the clock block (static).
      channels: indices of the C linear channels among all channels (static).
    """

    leads: Param  # [K]
    weight: Param  # [G, K, M, F, C]
    near: Param  # [M, J]
    clock_near: int = flax.struct.field(pytree_node=False)
    slots: tuple[int, ...] = flax.struct.field(pytree_node=False)
    channels: tuple[int, ...] = flax.struct.field(pytree_node=False)


def features(
    propagator: Propagator, anchors: Anchors, history: Float[Array, "*#b M R A"], time: Int[Array, "*#b"]
) -> Float[Array, "*#b M F"]:
    """Per-anchor features of a history of all A channels at initial time `time`: the whole field's history, then near
    history times the clock.
    """
    h = history[..., jnp.asarray(propagator.channels)]
    m = h.shape[-3]

    def around(values, count):
        flat = values.reshape(*values.shape[:-2], -1)[..., propagator.near[:, :count], :]  # [..., M, J, R C]
        return flat.reshape(*flat.shape[:-2], -1)

    main = around(h, propagator.near.shape[1])
    local = around(h[..., jnp.asarray(propagator.slots), :], propagator.clock_near)
    clock = geometry.clock_features(jnp.broadcast_to(time[..., None], (*time.shape, m)), anchors.longitude)
    return jnp.concatenate([main, local * clock[..., :1], local * clock[..., 1:2]], -1)


def propagate(
    propagator: Propagator, feature: Float[Array, "*#b M F"], lead: Float[Array, "*#b"], fold: Any = None
) -> Float[Array, "*#b M C"]:
    """Anchor anomalies `lead` hours (> 0) after the analysis.

    Args:
      feature: from `features`.
      lead: hours, one per batch entry.
      fold: cross-fitting fold per batch entry, -1 for the fit on everything; None is -1 everywhere.
    """
    leads = propagator.leads
    weight = propagator.weight[:1] if fold is None else propagator.weight
    # Every knot (and fold) is evaluated: at M R C of a few thousand that is far cheaper than gathering a weight matrix
    # per sample.
    every = jnp.einsum("...mf,gkmfc->...gkmc", feature, weight)
    if fold is None:
        every = every[..., 0, :, :, :]
    else:
        every = jnp.take_along_axis(every, (fold + 1)[..., None, None, None, None], axis=-4)[..., 0, :, :, :]
    share = knot_weights(leads, lead)  # [..., K]
    return jnp.einsum("...k,...kmc->...mc", share, every)


def knot_weights(leads: Float[Array, " K"], lead: Float[Array, "*#b"]) -> Float[Array, "*#b K"]:
    """Linear interpolation weights between lead knots; constant before the first, decaying in 48 h beyond the last."""
    inside = jnp.clip(lead, leads[0], leads[-1])
    upper = jnp.clip(jnp.searchsorted(leads, inside, side="left"), 1 if leads.shape[0] > 1 else 0, leads.shape[0] - 1)
    lower = jnp.maximum(upper - 1, 0)
    span = jnp.maximum(leads[upper] - leads[lower], 1e-6)
    part = jnp.clip((inside - leads[lower]) / span, 0.0, 1.0)
    k = jnp.arange(leads.shape[0])
    share = (k == lower[..., None]) * (1 - part)[..., None] + (k == upper[..., None]) * part[..., None]
    return share * jnp.exp(-jnp.maximum(lead - leads[-1], 0.0) / _DECAY_HOURS)[..., None]


def fit_propagator(
    anchors: Anchors,
    history: np.ndarray,
    time: np.ndarray,
    target: np.ndarray,
    present: np.ndarray,
    *,
    leads: Sequence[float],
    channels: Sequence[int],
    slots: Sequence[int],
    folds: np.ndarray,
    validation: np.ndarray,
    fold_count: int,
    neighbours: int = 26,
    clock_neighbours: int = 5,
    penalties: Sequence[float] = (100.0, 300.0, 1000.0, 3000.0, 10000.0),
    lengths_km: Sequence[float] | None = None,
    clock_penalties: Sequence[float] = (10.0, 1e9),
    progress: bool = True,
) -> tuple[Propagator, dict[str, np.ndarray]]:
    """Fit by penalised least squares with hyper-parameters from validation times.

    Args:
      history: [n, M, R, A] anchor histories at the n initial times (all channels).
      time: [n] int32 initial times.
      target: [K, n, M, C] anchor anomalies at each lead; present: same shape, False where not observed.
      lengths_km: candidates of ℓ; None is half the median distance between neighbouring anchors, at least 50 km (the
        best in a network 21 km and in one 530 km apart; ours).
      leads: K hours; channels: the C linear channels; slots: slots of the clock block.
      folds: [n] fold of each training time, anything for others; validation: bool [n]. A time is training when it is
        not validation.

    Returns:
      (Propagator, {"scale": [K, C] cross-fitted residual sd over training, "penalty", "length_km", "clock": [K, C] the
      choices, "validation": [K, C] validation RMSE of the choice}).
    """
    n, m = history.shape[:2]
    c = len(channels)
    d = np.asarray(_distances(anchors), np.float64)
    near = np.argsort(d, axis=1)[:, : min(neighbours, m)]
    if lengths_km is None:
        apart = np.median(np.sort(d, axis=1)[:, min(1, m - 1)])
        lengths_km = (max(50.0, 0.5 * float(apart)),)
    shell = Propagator(
        leads=jnp.asarray(leads, jnp.float32),
        weight=jnp.zeros((fold_count + 1, len(leads), m, 0, c)),
        near=jnp.asarray(near, jnp.int32),
        clock_near=min(clock_neighbours, m),
        slots=tuple(slots),
        channels=tuple(channels),
    )
    # All anchors share one global feature matrix: the whole history, and every anchor's own clock products. Anchor a's
    # features are a column subset, so one Gram matrix per fold serves all anchors and leads.
    h = history[..., list(channels)].astype(np.float32)
    main = h.reshape(n, -1)
    local = h[:, :, list(slots)].reshape(n, m, -1)
    clock = np.asarray(geometry.clock_features(jnp.broadcast_to(jnp.asarray(time)[:, None], (n, m)), anchors.longitude))
    # The clock is the region's: anchors differ in solar time by minutes, and one clock lets them share columns.
    clock = (
        np.broadcast_to(clock.mean(1, keepdims=True), clock.shape)
        if np.ptp(np.asarray(anchors.longitude)) < 15
        else clock
    )
    blocks = [main, (local * clock[:, :, :1]).reshape(n, -1), (local * clock[:, :, 1:2]).reshape(n, -1)]
    x = np.concatenate(blocks, 1)
    width, per_main, per = main.shape[1], h.shape[2] * c, local.shape[2]
    columns, distance = [], []
    for a in range(m):
        close = near[a][: shell.clock_near]
        own = (close[:, None] * per + np.arange(per)).reshape(-1)
        columns.append(
            np.r_[(near[a][:, None] * per_main + np.arange(per_main)).reshape(-1), width + own, width + m * per + own]
        )
        distance.append((np.repeat(d[a][near[a]], per_main), np.tile(np.repeat(d[a][close], per), 2)))
    fold_rows = [np.flatnonzero((folds == f) & ~validation) for f in range(fold_count)]
    grams = [x[rows].T @ x[rows] for rows in fold_rows]
    total = np.sum(grams, 0)
    weight = np.zeros((fold_count + 1, len(leads), m, len(columns[0]), c), np.float32)
    shape = (len(leads), c)
    chosen = {
        "penalty": np.zeros(shape),
        "length_km": np.zeros(shape),
        "clock": np.zeros(shape),
        "validation": np.full(shape, np.inf),
    }
    scale = np.zeros(shape)
    grid = [(p, ell, q) for ell in lengths_km for q in clock_penalties for p in penalties]
    x_validation = x[validation]

    def solve(job):
        """Every penalty of one anchor: weights of the full fit and of each fold's complement, and out-of-sample squared
        errors.
        """
        a, moment, parts, y, seen = job
        mine = columns[a]
        weights = np.zeros((len(grid), fold_count + 1, len(mine), c), np.float32)
        squares = np.zeros((len(grid), 2, c))  # validation, left-out folds
        gram = total[np.ix_(mine, mine)]
        within = [g[np.ix_(mine, mine)] for g in grams]
        for i, g in enumerate(grid):
            penalty = _penalty(distance[a], *g)
            weights[i, 0] = _solve(gram, moment, penalty)
            squares[i, 0] = _squares(x_validation[:, mine] @ weights[i, 0], y[validation], seen[validation])
            for f, rows in enumerate(fold_rows):
                weights[i, 1 + f] = _solve(gram - within[f], moment - parts[f], penalty)
                squares[i, 1] += _squares(x[np.ix_(rows, mine)] @ weights[i, 1 + f], y[rows], seen[rows])
        return weights, squares

    # One BLAS thread per solve and one solve per core: at this size OpenBLAS's own threads cost five times what they
    # bring.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        for k in tqdm(range(len(leads)), desc="propagator", unit="lead", disable=not progress):
            y = np.where(present[k], target[k], 0.0).reshape(n, -1).astype(np.float32)
            moments = [(x[rows].T @ y[rows]).reshape(-1, m, c) for rows in fold_rows]
            moment = np.sum(moments, 0)
            jobs = [
                (a, moment[columns[a], a], [part[columns[a], a] for part in moments], target[k, :, a], present[k, :, a])
                for a in range(m)
            ]
            # The number of values behind each sum: validation and training count alike in the choice.
            counts = np.stack([present[k][validation].sum((0, 1)), present[k][~validation].sum((0, 1))]).astype(float)
            solved = list(pool.map(solve, jobs))
            mean_square = np.sum([s for _, s in solved], 0) / np.maximum(counts, 1)  # [grid, 2, C]
            relative = mean_square / mean_square.min(0)
            best = relative.mean(1).argmin(0)
            for j in range(c):
                chosen["penalty"][k, j], chosen["length_km"][k, j], chosen["clock"][k, j] = grid[int(best[j])]
                chosen["validation"][k, j] = np.sqrt(mean_square[best[j], 0, j])
                scale[k, j] = np.sqrt(mean_square[best[j], 1, j])
                for a in range(m):
                    weight[:, k, a, :, j] = solved[a][0][best[j], :, :, j]
    return shell.replace(weight=jnp.asarray(weight)), {"scale": scale, **chosen}


def _penalty(distance: tuple[np.ndarray, np.ndarray], penalty: float, length_km: float, clock: float) -> np.ndarray:
    main, near = (_LOCAL + (part / length_km) ** 2 for part in distance)
    return penalty * np.r_[main, clock * near]


def _solve(gram: np.ndarray, moment: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Ridge solution in float32: with penalties of 3 and more the condition number stays below 1e6, and it is twice as
    fast as float64.
    """
    live = penalty < 1e6 * penalty.min()  # a block switched off by its penalty is left out
    a = gram[np.ix_(live, live)]
    a[np.diag_indices_from(a)] += penalty[live].astype(np.float32)
    out = np.zeros(moment.shape, np.float32)
    factor = scipy.linalg.cho_factor(a, overwrite_a=True, check_finite=False)
    out[live] = scipy.linalg.cho_solve(factor, moment[live], check_finite=False)
    return out


def _squares(predicted: np.ndarray, y: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return np.where(seen, (predicted - y) ** 2, 0.0).sum(0)


def _distances(anchors: Anchors) -> np.ndarray:
    d = np.asarray(geometry.distance_km(anchors.latitude, anchors.longitude, anchors.latitude, anchors.longitude))
    dz = np.abs(np.asarray(anchors.height)[:, None] - np.asarray(anchors.height)[None]) / 1000.0 * 30.0
    return np.sqrt(d**2 + dz**2)
