"""The linear part of the dynamics: shared and local ridge propagators of the anchor field, fitted in closed form.

Near the climate normal the atmosphere's response to small anomalies is linear, and 500 days of hourly reports hold too
few independent weather situations for a network to find that part by gradient descent (measured on stations-v1: a
transformer alone is 12 % worse than ridge regression at 6 h, this propagator 2.5 % better). So the field at lead Δ is

    mean(Δ) = S(Δ) · neighbourhood + A(Δ) · history  (+ the network's correction).

S is one regression for all anchors, because the same physics acts everywhere: an anchor's own history and the means of
its near and far neighbourhood, each alone and times solar hour, season and position. It has seen every station's
weather, so it is sure of much more than a regression per station is. A is what each anchor adds to it: a ridge
regression of the residual on the histories of all near anchors, with a penalty that grows with distance,
λ (0.03 + (d/ℓ)²), the covariance localisation of data assimilation. A is the average of a fit with and one without near
history times solar hour and season (an anomaly at noon means another thing than one at night). Every λ is chosen per
channel and lead by squared error on left-out folds and validation hours together, and the fits of A are weighted by the
same error (pseudo-BMA, Yao et al. 2018, doi:10.1214/17-BA1091, one independent weather situation per two days).
Between the fitted leads the propagators are interpolated linearly; beyond the last they decay towards the normal.
All ours. On stations-v1, leads 6 to 48 h, RMSE over VAR ridge's: A alone 0.984, S alone 0.983, both 0.965.

Cross-fitting: a network that corrects them must not be trained on in-sample residuals, so both are also fitted without
each fold of the training times (index 1 + fold; index 0 is the fit on everything, used after training).

Shapes: M anchors, R slots, C linear channels, K lead knots, G = folds + 1 fits, U = 24 R C shared features, F = J R C +
4 J' R' C local features (fewer where the record has no daily or no yearly cycle).
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.struct
import jax
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
_SHARED, _CLOCK, _SEASON = 5.0, 3.0, 30.0  # penalties of products over the main part's; cross-validated on stations-v1
_SHARED_PENALTIES = (100.0, 300.0, 1000.0, 3000.0, 1e4, 3e4, 1e5, 3e5)
_SITUATION_HOURS = 48.0
_HEIGHT_KM_PER_KM = 30.0
_FAR = 5.0  # far neighbourhood over near
_WIDE_DEGREES = 40.0


@flax.struct.dataclass
class Propagator:
    """Fitted propagators.

    Attributes:
      leads: [K] hours, rising; the first is above 0.
      shared: [G, K, U, C] from `shared_features`; local: [G, K, M, F, C] from `local_features`, to the anchors'
        anomalies.
      near: [M, J] nearest anchors, nearest first: their history is what an anchor's tendency may depend on.
      means: [2, M, M] weights of the near and the far neighbourhood's mean.
      place: [M, 3] scaled position.
      block_near: how many near anchors enter the clock and season blocks (static).
      slots: indices of the R' slots of these blocks (static).
      channels: indices of the C linear channels among all channels (static).
      cycles: which of `earth.geometry.clock_features` multiply history: solar hour, season, both or none (static).
    """

    leads: Param  # [K]
    shared: Param  # [G, K, U, C]
    local: Param  # [G, K, M, F, C]
    near: Param  # [M, J]
    means: Param  # [2, M, M]
    place: Param  # [M, 3]
    block_near: int = flax.struct.field(pytree_node=False)
    slots: tuple[int, ...] = flax.struct.field(pytree_node=False)
    channels: tuple[int, ...] = flax.struct.field(pytree_node=False)
    cycles: tuple[int, ...] = flax.struct.field(pytree_node=False)


def none(anchors: Anchors, leads: Sequence[float], folds: int) -> Propagator:
    """A propagator of no channel."""
    k, m = len(leads), anchors.latitude.shape[0]
    shell = _shell(anchors, leads, (), (), 1, 1, ())
    return dataclasses.replace(shell, shared=jnp.zeros((folds + 1, k, 0, 0)), local=jnp.zeros((folds + 1, k, m, 0, 0)))


def final(propagator: Propagator) -> Propagator:
    """Without the cross-fitted copies, which only training needs."""
    return dataclasses.replace(propagator, shared=propagator.shared[:1], local=propagator.local[:1])


def _shell(anchors: Anchors, leads, slots, channels, neighbours: int, few: int, cycles) -> Propagator:
    d = _distances(anchors)
    m = len(d)
    order = np.sort(d, axis=1)
    reach = max(float(np.median(order[:, min(4, m - 1)])), 30.0)
    near = np.exp(-((d / reach) ** 2)) * (1 - np.eye(m))
    far = np.exp(-((d / (_FAR * reach)) ** 2))
    means = np.stack([near / (near.sum(1, keepdims=True) + 1e-3), far / far.sum(1, keepdims=True)])
    lat, lon, z = (np.asarray(a, np.float64) for a in (anchors.latitude, anchors.longitude, anchors.height))
    if np.ptp(lat) > _WIDE_DEGREES or np.ptp(lon) > _WIDE_DEGREES:
        lat, lon = np.sin(np.deg2rad(lat)), np.sin(np.deg2rad(lat)) ** 2
    where = np.stack([lat, lon, 1 - np.exp(-np.maximum(z, 0) / 1000.0)], 1)
    extent = np.maximum(where.std(0), (0.02, 0.02, 0.02))
    return Propagator(
        leads=jnp.asarray(leads, jnp.float32),
        shared=jnp.zeros(0),
        local=jnp.zeros(0),
        near=jnp.asarray(np.argsort(d, axis=1)[:, : min(neighbours, m)], jnp.int32),
        means=jnp.asarray(means, jnp.float32),
        place=jnp.asarray(np.clip((where - where.mean(0)) / extent, -3, 3), jnp.float32),
        block_near=min(few, m),
        slots=tuple(slots),
        channels=tuple(channels),
        cycles=tuple(cycles),
    )


def shared_features(
    propagator: Propagator, anchors: Anchors, history: Float[Array, "*#b M R A"], time: Int[Array, "*#b"]
) -> Float[Array, "*#b M U"]:
    """Own history and its near and far neighbourhood's means; the same times cosine and sine of solar hour and season,
    and times the scaled position.
    """
    h = history[..., jnp.asarray(propagator.channels, int)]
    h = h.reshape(*h.shape[:-2], -1)  # [..., M, R C]
    core = jnp.concatenate([h, *(jnp.einsum("mn,...nf->...mf", w, h) for w in propagator.means)], -1)
    place = [jnp.broadcast_to(propagator.place[:, i], core.shape[:-1]) for i in range(3)]
    parts = [core, *(core * part[..., None] for part in (*_modulation(propagator, anchors, time), *place))]
    return jnp.concatenate(parts, -1)


def local_features(
    propagator: Propagator, anchors: Anchors, history: Float[Array, "*#b M R A"], time: Int[Array, "*#b"]
) -> Float[Array, "*#b M F"]:
    """History of the near anchors, then of the nearest few times cosine and sine of their solar hour and of season."""
    h = history[..., jnp.asarray(propagator.channels, int)]

    def around(values, count):
        flat = values.reshape(*values.shape[:-2], -1)[..., propagator.near[:, :count], :]  # [..., M, J, R C]
        return flat.reshape(*flat.shape[:-2], -1)

    brief = h[..., jnp.asarray(propagator.slots, int), :]
    cycles = _modulation(propagator, anchors, time)
    blocks = [around(brief * part[..., None, None], propagator.block_near) for part in cycles]
    return jnp.concatenate([around(h, propagator.near.shape[1]), *blocks], -1)


def features(
    propagator: Propagator, anchors: Anchors, history: Float[Array, "*#b M R A"], time: Int[Array, "*#b"]
) -> tuple[Float[Array, "*#b M U"], Float[Array, "*#b M F"]]:
    """(shared, local) features of a history of all A channels at initial time `time`."""
    arguments = propagator, anchors, history, time
    return shared_features(*arguments), local_features(*arguments)


def _modulation(propagator: Propagator, anchors: Anchors, time: Int[Array, "*#b"]) -> list[Float[Array, "*#b M"]]:
    """Cosine and sine of each anchor's solar hour, then of the season, of those the propagator uses."""
    m = anchors.longitude.shape[0]
    clock = geometry.clock_features(jnp.broadcast_to(time[..., None], (*time.shape, m)), anchors.longitude)
    return [clock[..., i] for i in propagator.cycles]


def propagate(
    propagator: Propagator,
    feature: tuple[Float[Array, "*#b M U"], Float[Array, "*#b M F"]],
    lead: Float[Array, "*#b"],
    fold: Any = None,
) -> Float[Array, "*#b M C"]:
    """Anchor anomalies `lead` hours (> 0) after the analysis.

    Args:
      feature: from `features`.
      lead: hours, one per batch entry.
      fold: cross-fitting fold per batch entry, -1 for the fit on everything; None is -1 everywhere.
    """
    shared, local = propagator.shared, propagator.local
    if fold is None:
        shared, local = shared[:1], local[:1]
    # Every knot (and fold) is evaluated: at M R C of a few thousand that is far cheaper than gathering a weight matrix
    # per sample.
    every = jnp.einsum("...mf,gkfc->...gkmc", feature[0], shared) + jnp.einsum(
        "...mf,gkmfc->...gkmc", feature[1], local
    )
    if fold is None:
        every = every[..., 0, :, :, :]
    else:
        every = jnp.take_along_axis(every, (fold + 1)[..., None, None, None, None], axis=-4)[..., 0, :, :, :]
    share = knot_weights(propagator.leads, lead)  # [..., K]
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
    block_neighbours: int = 6,
    penalties: Sequence[float] = (300.0, 1000.0, 3000.0, 1e4, 3e4, 1e5, 3e5),
    shared_penalties: Sequence[float] = _SHARED_PENALTIES,
    length_km: float | None = None,
    clock: bool = True,
    season: bool = True,
    progress: bool = True,
) -> tuple[Propagator, dict[str, np.ndarray]]:
    """Fit by penalised least squares; every penalty and the share of each local fit by out-of-sample error.

    Args:
      history: [n, M, R, A] anchor histories at the n initial times (all channels).
      time: [n] int32 initial times.
      target: [K, n, M, C] anchor anomalies at each lead; present: same shape, False where not observed.
      leads: K hours; channels: the C linear channels; slots: slots of the local clock and season blocks.
      folds: [n] fold of each training time, anything for others; validation: bool [n]. A time is training when it is
        not validation.
      penalties, shared_penalties: candidates of λ of the local and the shared part.
      length_km: ℓ; None is half the median distance between neighbouring anchors, at least 30 km (ours).
      clock, season: whether history is multiplied by them; daily means have no clock, and the season of a record of a
        few months would be extrapolated.

    Returns:
      (Propagator, {"scale": [K, C] cross-fitted residual sd over training, "validation": [K, C] RMSE on validation,
      "length_km": [], "shared_penalty": [K, C], and of the local fits without and with blocks "penalty": [2, K, C],
      "share": [2, K, C]}).
    """
    n, m = history.shape[:2]
    c, k = len(channels), len(leads)
    cycles = (0, 1) * clock + (4, 5) * season
    shell = _shell(anchors, leads, slots, channels, neighbours, block_neighbours, cycles)
    history = np.ascontiguousarray(history[..., list(channels)], np.float32)
    ours = dataclasses.replace(shell, channels=tuple(range(c)))
    rows = [np.flatnonzero((folds == f) & ~validation) for f in range(fold_count)]
    groups = [*rows, np.flatnonzero(validation)]
    seen = present.transpose(1, 2, 0, 3).reshape(n, m, k * c)
    y = np.where(seen, np.asarray(target).transpose(1, 2, 0, 3).reshape(n, m, k * c), 0.0).astype(np.float32)

    bar = tqdm(total=m + 2 * len(groups), desc="propagator", unit="part", disable=not progress)
    shared, shared_penalty = _fit_shared(ours, anchors, history, time, y, seen, groups, shared_penalties, bar)
    residual = _residuals(ours, anchors, history, time, y, shared, groups, bar)
    local, found = _fit_local(
        ours, anchors, history, time, residual, seen, groups, penalties, length_km, _distances(anchors), bar
    )
    bar.close()
    errors, held = found.pop("squares")
    n_left, n_held = (seen[r].sum((0, 1)) for r in (np.concatenate(rows), groups[-1]))
    scale, held = (np.sqrt(e / np.maximum(q, 1)).reshape(k, c) for e, q in ((errors, n_left), (held, n_held)))

    def knots(weight):  # [G, ..., K C] -> [G, K, ..., C]
        return jnp.asarray(np.moveaxis(weight.reshape(*weight.shape[:-1], k, c), -2, 1))

    found = {name: v.reshape(*v.shape[:-1], k, c) if v.ndim else v for name, v in found.items()}
    return dataclasses.replace(shell, shared=knots(shared), local=knots(local)), {
        "scale": scale, "validation": held, "shared_penalty": shared_penalty.reshape(k, c), **found,
    }  # fmt: skip


def _chunks(rows: np.ndarray, size: int = 512) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _shared_rows(shell: Propagator, anchors: Anchors, history, time, rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, their shared features [b, M, U]) in chunks of one compiled shape."""
    run = jax.jit(shared_features)
    for part in _chunks(rows):
        full = np.resize(part, 512)
        yield part, np.asarray(run(shell, anchors, history[full], time[full]))[: len(part)]


def _fit_shared(shell, anchors, history, time, y, seen, groups, penalties, bar):
    """Shared weights [G, U, K C] and their penalties [K C]. Missing targets: see `_fit_local`."""
    m, width = y.shape[1], y.shape[2]
    products = 3 + len(shell.cycles)
    core = 3 * history.shape[2] * history.shape[3]
    features = (1 + products) * core
    grams, moments, squares, share = [], [], [], []
    for rows in groups:
        gram, moment = np.zeros((features, features), np.float32), np.zeros((features, width), np.float32)
        for part, x in _shared_rows(shell, anchors, history, time, rows):
            flat = x.reshape(len(part) * m, -1)
            gram, moment = gram + flat.T @ flat, moment + flat.T @ y[part].reshape(len(part) * m, -1)
        grams.append(gram)
        moments.append(moment)
        squares.append((y[rows].astype(np.float64) ** 2).sum((0, 1)))
        share.append(np.maximum(seen[rows].mean((0, 1)) if len(rows) else np.zeros(width), 1e-3))
        bar.update()
    size = np.array([len(rows) for rows in groups], np.float64)
    relative = np.repeat([1.0, _SHARED], [core, products * core])
    fits = len(groups)  # on everything, and without each fold
    weights = np.zeros((len(penalties), fits, len(relative), width), np.float32)
    cost = np.zeros((len(penalties), width))
    for g in range(fits):
        kept = [f for f in range(fits - 1) if f != g - 1]
        out = fits - 1 if g == 0 else g - 1
        gram = np.sum([grams[f] for f in kept], 0)
        part = np.sum([share[f] * size[f] for f in kept], 0) / max(sum(size[f] for f in kept), 1.0)
        moment = np.sum([moments[f] for f in kept], 0) / np.maximum(part, 1e-3)
        for i, strength in enumerate(penalties):
            w = weights[i, g] = _solve(gram.copy(), moment, strength * relative)
            if size[out]:  # sum over seen of (y - p)^2, by quadratic forms
                fitted = np.einsum("uw,uw->w", w, grams[out] @ w, dtype=np.float64)
                cross = np.einsum("uw,uw->w", w, moments[out], dtype=np.float64)
                cost[i] += squares[out] - 2 * cross + share[out] * fitted
    best = cost.argmin(0)
    chosen = np.moveaxis(weights[best, :, :, np.arange(width)], 0, -1)
    return np.ascontiguousarray(chosen), np.asarray(penalties)[best]


def _residuals(shell, anchors, history, time, y, weight, groups, bar):
    """[G, n, M, K C] what each shared fit leaves of the targets."""
    out = np.zeros((weight.shape[0], *y.shape), np.float32)
    flat = np.moveaxis(weight, 0, 1).reshape(weight.shape[1], -1)
    for rows in groups:
        for part, x in _shared_rows(shell, anchors, history, time, rows):
            predicted = (x.reshape(-1, x.shape[-1]) @ flat).reshape(len(part), y.shape[1], weight.shape[0], -1)
            out[:, part] = y[part] - np.moveaxis(predicted, 2, 0)
        bar.update()
    return out


def _fit_local(shell, anchors, history, time, residual, seen, groups, penalties, length_km, d, bar):
    """Local weights [G, M, F, K C] of the residuals, and what was chosen.

    All anchors share one global feature matrix: the whole history, and every anchor's own products. Anchor a's features
    are a column subset, so one Gram matrix per fold serves all anchors, and one factorisation all leads. Rows without a
    target enter the Gram matrix of the others, so a moment is scaled up to the rows it was not taken from (missing at
    random).
    """
    n, m, slots, c = history.shape
    fits, width = residual.shape[0], residual.shape[-1]
    near = np.asarray(shell.near)
    if length_km is None:
        length_km = max(30.0, 0.5 * float(np.median(np.sort(d, axis=1)[:, min(1, m - 1)])))
    brief = history[:, :, list(shell.slots)].reshape(n, m, -1)
    parts = [np.asarray(part)[..., None] for part in _modulation(shell, anchors, jnp.asarray(time))]
    x = np.concatenate([history.reshape(n, -1), *((brief * part).reshape(n, -1) for part in parts)], 1)
    main, per = slots * c, brief.shape[2]

    def columns(a):
        """(columns of x, their distance-grown penalty, whether of a block) of one anchor."""
        close = near[a][: shell.block_near]
        own = (close[:, None] * per + np.arange(per)).reshape(-1)
        index = [(near[a][:, None] * main + np.arange(main)).reshape(-1)]
        index += [m * main + i * m * per + own for i in range(len(parts))]
        grown = _LOCAL + (d[a] / length_km) ** 2
        block = np.repeat(grown[close], per)
        penalty = [np.repeat(grown[near[a]], main), *((_CLOCK if i < 2 else _SEASON) * block for i in shell.cycles)]
        mine = np.concatenate(index)
        return mine, np.concatenate(penalty), np.arange(len(mine)) >= len(index[0])

    rows, holdout = groups[:-1], groups[-1]
    grams = [x[r].T @ x[r] for r in rows]
    counts = np.stack([seen[r].sum(0) for r in rows]).astype(np.float64)  # [folds, M, K C]
    sizes = np.array([len(r) for r in rows], np.float64)
    masked = [np.where(seen, part, 0.0) for part in residual]
    moments = {
        (g, f): (x[r].T @ masked[g][r].reshape(len(r), m * width)).reshape(-1, m, width)
        for g in range(fits) for f, r in enumerate(rows) if f != g - 1
    }  # fmt: skip

    def solve(a):
        """Weights [2, penalties, G, F, K C] and out-of-sample squared errors [2, penalties, K C] of one anchor."""
        mine, penalty, block = columns(a)
        weights = np.zeros((2, len(penalties), fits, len(mine), width), np.float32)
        squares = np.zeros((2, len(penalties), width))
        inside = [g[np.ix_(mine, mine)] for g in grams]
        for g in range(fits):
            kept = [f for f in range(fits - 1) if f != g - 1]
            gram = np.sum([inside[f] for f in kept], 0)
            share = counts[kept, a].sum(0) / max(sizes[kept].sum(), 1.0)
            moment = np.sum([moments[g, f][mine, a] for f in kept], 0) / np.maximum(share, 1e-3)
            out = holdout if g == 0 else rows[g - 1]
            x_out = x[np.ix_(out, mine)]
            for v, live in enumerate((np.flatnonzero(~block), np.arange(len(mine)))):
                part = gram[np.ix_(live, live)]
                for i, strength in enumerate(penalties):
                    w = weights[v, i, g]
                    w[live] = _solve(part.copy(), moment[live], strength * penalty[live])
                    squares[v, i] += _squares(x_out[:, live] @ w[live], residual[g, out, a], seen[out, a])
        return weights, squares

    # One BLAS thread per solve and one solve per core: at this size OpenBLAS's own threads cost five times what they
    # bring.
    solved, total = [], np.zeros((2, len(penalties), width))
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        for weights, squares in pool.map(solve, range(m)):
            solved.append(weights)
            total += squares
            bar.update()
    best = total.argmin(1)  # [2, K C]
    least = np.take_along_axis(total, best[:, None], 1)[:, 0]
    situations = len(np.unique(np.asarray(time)[np.concatenate(rows)] // round(_SITUATION_HOURS * 3600)))
    evidence = -0.5 * situations * np.log(np.maximum(least, 1e-30))
    share = np.exp(evidence - evidence.max(0))
    share /= share.sum(0)
    weight = np.zeros((fits, m, solved[0].shape[3], width), np.float32)
    squares = np.zeros((2, width))  # left-out folds, validation
    for a in range(m):
        for v in range(2):
            picked = np.moveaxis(solved[a][v, best[v], :, :, np.arange(width)], 0, -1)  # [G, F, K C]
            weight[:, a] += share[v] * picked
        mine = columns(a)[0]
        for f, r in enumerate(rows):
            squares[0] += _squares(x[np.ix_(r, mine)] @ weight[1 + f, a], residual[1 + f, r, a], seen[r, a])
        squares[1] += _squares(x[np.ix_(holdout, mine)] @ weight[0, a], residual[0, holdout, a], seen[holdout, a])
    chosen = {"penalty": np.asarray(penalties)[best], "share": share, "length_km": np.asarray(length_km)}
    return weight, {"squares": squares, **chosen}


def _solve(gram: np.ndarray, moment: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Ridge solution in float32 (overwrites gram): with penalties of 3 and more the condition number stays below 1e6,
    and it is twice as fast as float64.
    """
    gram[np.diag_indices_from(gram)] += penalty.astype(np.float32)
    factor = scipy.linalg.cho_factor(gram, overwrite_a=True, check_finite=False)
    return scipy.linalg.cho_solve(factor, moment.astype(np.float32), check_finite=False)


def _squares(predicted: np.ndarray, y: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return np.where(seen, (predicted - y) ** 2, 0.0).sum(0)


def _distances(anchors: Anchors) -> np.ndarray:
    d = np.asarray(geometry.distance_km(anchors.latitude, anchors.longitude, anchors.latitude, anchors.longitude))
    dz = np.abs(np.asarray(anchors.height)[:, None] - np.asarray(anchors.height)[None]) / 1000.0 * _HEIGHT_KM_PER_KM
    return np.sqrt(d.astype(np.float64) ** 2 + dz**2)
