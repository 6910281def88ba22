"""First guesses in closed form: what the shown values of a snapshot say of each value, that value itself left out.

    mean, deviation = krige(cfg, latitude, longitude, height, value, shown)      # the same variable at nearby reports
    ridge = fit_ridge(cfg, value, about, near); mean, deviation = guess(ridge, value, shown, about, near)
                                                                                 # other variables of the same report

Both are baselines in their own right (universal kriging with a drift in height; polynomial ridge regression), and the
backgrounds that `earth.world.snapshot` learns departures from. Every value gets one, shown or not: of a shown value it
is what the others would have said, so that its departure is an innovation, of a hidden one it is the prediction. Forms
and defaults are ours.

Shapes: n reports, V variables, A further features of a report. Values are anomalies in standard deviations.
"""

import dataclasses
from typing import Any

import numpy as np
import scipy.linalg
from scipy.spatial import KDTree

from earth import geometry
from earth.observations import EmptyWindowError
from earth.sensors import ObservationError

_KEPT = 4096
_BATCH = 4096


@dataclasses.dataclass(frozen=True)
class KrigingConfig:
    """Local universal kriging.

    Attributes:
      horizontal_km, vertical_m: lengths of the covariance, and of the distance that neighbours are chosen by.
      nugget: share of the variance that neighbours know nothing of.
      neighbours: reports that a value is guessed from, at most.
      drift: fit a constant and a slope with height among the neighbours (universal kriging); False takes the mean to be
        0, the normal (simple kriging).
      smooth: Matern 3/2 in each direction instead of exponential.
    """

    horizontal_km: float = 300.0
    vertical_m: float = 1000.0
    nugget: float = 0.1
    neighbours: int = 24
    drift: bool = True
    smooth: bool = False

    def __post_init__(self):
        if not (self.horizontal_km > 0 and self.vertical_m > 0 and self.neighbours >= 1):
            raise ValueError(
                f"horizontal_km {self.horizontal_km}, vertical_m {self.vertical_m} and neighbours {self.neighbours} "
                "must be above 0"
            )
        if not 0 < self.nugget < 1:
            raise ValueError(f"nugget {self.nugget} must lie between 0 and 1; it also keeps the systems solvable")


def krige(
    cfg: KrigingConfig,
    latitude: np.ndarray,
    longitude: np.ndarray,
    height: np.ndarray,
    value: np.ndarray,
    shown: np.ndarray,
    *,
    wanted: np.ndarray | None = None,
    group: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Every value from the nearest shown values of its variable, itself left out.

    Args:
      latitude, longitude: degrees [n]; height: m [n].
      value: [n, V]; only those that are `shown` [n, V] are looked at.
      wanted: [n] rows to answer, the others stay NaN; all by default.
      group: [n] labels; a report's own group is left out as well (leave-one-platform-out).

    Returns:
      (mean [n, V], standard deviation [n, V]): without any shown value to guess from 0 and 1, the normal. The deviation
      is that of an observation: nugget included.
    """
    n, width = value.shape
    place = np.concatenate(
        [
            unit_vectors(latitude, longitude) * (geometry.EARTH_RADIUS_KM / cfg.horizontal_km),
            (np.asarray(height, np.float64) / cfg.vertical_m)[:, None],
        ],
        -1,
    )
    mean, deviation = np.full((2, n, width), np.nan)
    rows = np.arange(n) if wanted is None else np.flatnonzero(wanted)
    for v in range(width):
        known = np.flatnonzero(shown[:, v])
        if not len(known):
            mean[rows, v], deviation[rows, v] = 0.0, 1.0
            continue
        tree = KDTree(place[known])
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            near = _neighbours(tree, place, known, part, cfg.neighbours, group)
            mean[part, v], deviation[part, v] = _solve(cfg, place, value[:, v], part, near)
    return mean, deviation


def unit_vectors(latitude: Any, longitude: Any) -> Any:
    """`geometry.unit_vector` on the host, float64."""
    return geometry.unit_vector(np.asarray(latitude, np.float64), np.asarray(longitude, np.float64), xp=np)


def _neighbours(
    tree: KDTree, place: np.ndarray, known: np.ndarray, rows: np.ndarray, k: int, group: np.ndarray | None
) -> np.ndarray:
    """[rows, k] the nearest known rows that are neither the row itself nor of its group, -1 where there are fewer."""
    own = np.arange(len(place)) if group is None else group
    extra = 1 if group is None else int(np.bincount(np.unique(group[known], return_inverse=True)[1]).max())
    count = min(k + extra, len(known))
    ranks: Any = np.arange(1, count + 1)
    index = tree.query(place[rows], ranks)[1]
    found = known[index]
    order = np.argsort(own[found] == own[rows][:, None], axis=1, kind="stable")  # its own last
    found = np.take_along_axis(found, order, 1)
    found = np.where(own[found] == own[rows][:, None], -1, found)[:, :k]
    return np.pad(found, ((0, 0), (0, k - found.shape[1])), constant_values=-1)


def _covariance(cfg: KrigingConfig, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    gap = a - b
    horizontal, vertical = np.sqrt((gap[..., :3] ** 2).sum(-1)), np.abs(gap[..., 3])
    if not cfg.smooth:
        return np.exp(-horizontal - vertical)
    x, y = 3**0.5 * horizontal, 3**0.5 * vertical
    return (1 + x) * (1 + y) * np.exp(-x - y)


def _solve(
    cfg: KrigingConfig, place: np.ndarray, value: np.ndarray, rows: np.ndarray, near: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    there = near >= 0
    k = near.shape[1]
    at = place[near]
    scale = 1.0 - cfg.nugget
    both = there[:, :, None] & there[:, None]
    system = np.where(both, scale * _covariance(cfg, at[:, :, None], at[:, None]), 0.0) + np.eye(k)
    system[:, np.arange(k), np.arange(k)] = 1.0
    to = np.where(there, scale * _covariance(cfg, place[rows][:, None], at), 0.0)
    seen = np.where(there, value[near], 0.0)
    solved = np.linalg.solve(system, np.stack([to, seen], -1))
    mean, variance = (to * solved[..., 1]).sum(-1), 1.0 - (to * solved[..., 0]).sum(-1)
    if cfg.drift:
        basis = np.where(there[..., None], np.stack([np.ones_like(to), at[..., 3] - place[rows][:, None, 3]], -1), 0.0)
        inverse = np.linalg.solve(system, basis)
        # a weak prior on the slope, one deviation per vertical length, and none to speak of on the constant: defined
        # where all neighbours are at one height
        gram = np.einsum("nkb,nkc->nbc", basis, inverse) + np.diag([1e-6, 1.0])
        gap = np.array([1.0, 0.0]) - np.einsum("nkb,nk->nb", inverse, to)
        slope = np.linalg.solve(gram, np.einsum("nkb,nk->nb", inverse, seen)[..., None])[..., 0]
        mean = mean + (gap * slope).sum(-1)
        variance = variance + (gap * np.linalg.solve(gram, gap[..., None])[..., 0]).sum(-1)
    none = ~there.any(1)
    return np.where(none, 0.0, mean), np.where(none, 1.0, np.sqrt(np.clip(variance, 1e-6, 4.0)))


@dataclasses.dataclass(frozen=True)
class RidgeConfig:
    """Ridge regression of each variable of a report on its others.

    Attributes:
      degree: of the polynomial in them and in what is known about the report, 1 or 2.
      nearby: take the means of each other variable over so many nearest reports as well; 0 for none.
      sides: and the means over those of them that lie ahead, behind, to the left and to the right (`sides`).
      penalty: added to the diagonal of the sums of squares of the features.
    """

    degree: int = 2
    nearby: int = 8
    sides: bool = False
    penalty: float = 1.0

    def __post_init__(self):
        if self.degree not in (1, 2) or self.nearby < 0 or not self.penalty > 0:
            raise ValueError(
                f"degree {self.degree} must be 1 or 2, nearby {self.nearby} not negative and penalty {self.penalty} "
                "above 0"
            )


@dataclasses.dataclass(frozen=True)
class Ridge:
    """Sums of products of all features over `count` complete reports, from which the regression of any variable on any
    shown set follows; `owner` [F, 2] the variables that each feature is made of, -1 for none.
    """

    cfg: RidgeConfig
    gram: np.ndarray
    owner: np.ndarray
    width: int
    count: int
    solved: dict[Any, Any]


def _features(
    cfg: RidgeConfig, value: np.ndarray, about: np.ndarray, near: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """([n, F]: the V values first, a constant, then the rest; owner [F, 2])."""
    n, width = value.shape
    extra = about.shape[1]
    base = np.concatenate([value, about], -1)
    of = np.r_[np.arange(width), np.full(extra, -1)]
    parts = [value, np.ones((n, 1)), about]
    owners = [np.stack([np.arange(width)] * 2, -1), np.full((1 + extra, 2), -1)]
    if cfg.degree == 2:
        i, j = np.triu_indices(base.shape[1])
        parts.append(base[:, i] * base[:, j])
        owners.append(np.stack([of[i], of[j]], -1))
    if cfg.nearby:
        if near is None:
            raise ObservationError(f"nearby = {cfg.nearby} needs the nearest reports; pass near")
        for part in np.moveaxis(near, 1, 0):
            parts.append(means_nearby(value, part))
            owners.append(np.stack([np.arange(width)] * 2, -1))
    return np.concatenate(parts, -1), np.concatenate(owners)


def means_nearby(value: np.ndarray, near: np.ndarray) -> np.ndarray:
    """[n, V] means over the rows `near` [n, k] (-1 for none) that are finite; a report's own value without any."""
    beside = np.where((near >= 0)[..., None], value[near], np.nan)
    known = np.isfinite(beside)
    count = known.sum(1)
    return np.where(count > 0, np.where(known, beside, 0.0).sum(1) / np.maximum(count, 1), value)


def sides(place: np.ndarray, along: np.ndarray, near: np.ndarray) -> np.ndarray:
    """[n, 5, k] the neighbours `near` [n, k] of reports: all of them, then those ahead, behind, left and right, -1 for
    the rest.

    Args:
      place: [n, 3 or more] Cartesian; along: [n, 3] unit vectors at a tangent, the way that is ahead.
    """
    x = place[:, :3]
    gap = x[near] - x[:, None]
    across = np.cross(along, x)
    ahead, right = np.einsum("nkc,nc->nk", gap, along), np.einsum("nkc,nc->nk", gap, across)
    right = right / np.linalg.norm(x, axis=1)[:, None]
    mainly = np.abs(ahead) >= np.abs(right)
    parts = [mainly | True, mainly & (ahead >= 0), mainly & (ahead < 0), ~mainly & (right < 0), ~mainly & (right >= 0)]
    return np.stack([np.where(part & (near >= 0), near, -1) for part in parts], 1)


def fit_ridge(cfg: RidgeConfig, value: np.ndarray, about: np.ndarray, near: np.ndarray | None = None) -> Ridge:
    """From training reports [n, V], NaN missing; reports that lack a variable are left out.

    Args:
      about: [n, A] what is known about each report beside its values (view angle, latitude), about unit size.
      near: [n, S, k] the nearest other reports, all and by side, -1 for none; for `nearby`.

    Raises:
      EmptyWindowError: fewer than two complete reports per feature.
    """
    complete = np.isfinite(value).all(1)
    features, owner = _features(cfg, value, about, near)
    if complete.sum() < 2 * features.shape[1]:
        raise EmptyWindowError(
            f"{int(complete.sum())} of {len(value)} reports have all {value.shape[1]} variables; {features.shape[1]} "
            "features need twice as many: leave out variables that are often missing, or take degree=1"
        )
    x = features[complete]
    return Ridge(cfg, x.T @ x, owner, value.shape[1], len(x), {})


def guess(
    ridge: Ridge,
    value: np.ndarray,
    shown: np.ndarray,
    about: np.ndarray,
    near: np.ndarray | None = None,
    *,
    wanted: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(mean, deviation) [n, V] of every variable from the other shown variables of its report; arguments as in
    `fit_ridge`, values that are not `shown` [n, V] are not looked at.

    Costs a solve for every variable and every set of shown variables that occurs: meant for few sets, as when whole
    channels are missing.

    Args:
      wanted: [V] variables to answer, the others stay NaN; all by default.
    """
    value = np.where(shown, value, np.nan)
    features, _ = _features(ridge.cfg, value, about, near)
    mean, deviation = np.full((2, *value.shape), np.nan)
    asked = range(value.shape[1]) if wanted is None else np.flatnonzero(wanted)
    masks, which = np.unique(shown, axis=0, return_inverse=True)
    for m, mask in enumerate(masks):
        rows = np.flatnonzero(which.ravel() == m)
        x = np.where(np.isfinite(features[rows]), features[rows], 0.0)
        for v in asked:
            weights, deviation[rows, v] = _weights(ridge, mask, int(v))
            mean[rows, v] = x @ weights
    return mean, deviation


def _weights(ridge: Ridge, mask: np.ndarray, v: int) -> tuple[np.ndarray, float]:
    """([F] coefficients, rms of the fit) of a variable for a set of shown ones; kept, up to some thousand."""
    key = (mask.tobytes(), v)
    if key not in ridge.solved:
        if len(ridge.solved) >= _KEPT:
            ridge.solved.clear()
        gram = ridge.gram
        own = np.flatnonzero((((ridge.owner < 0) | mask[ridge.owner]) & (ridge.owner != v)).all(1))
        inner = gram[np.ix_(own, own)]
        w = scipy.linalg.solve(inner + ridge.cfg.penalty * np.eye(len(own)), gram[own, v], assume_a="pos")
        weights = np.zeros(len(gram))
        weights[own] = w
        square = gram[v, v] - 2 * w @ gram[own, v] + w @ inner @ w
        ridge.solved[key] = (weights, float(np.sqrt(max(square / ridge.count, 1e-8))))
    return ridge.solved[key]
