"""The grid-free field: anchors with continuous coordinates, and how observations reach them and queries read them.

Anchors are a basis, not an input or output grid: observations arrive at any position through kernels centred on the
observation, queries leave at any position through kernels centred on the query. Two placements: `fit_anchors` (a
region's stations and relief) and `fibonacci_anchors` (the globe).

Shapes: M anchors, N tokens, R slots, C channels (every variable of every stream), Q queries. Kernels are ours (the
paper's field is not public).
"""

import dataclasses

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from earth.geometry import EARTH_RADIUS_KM, Array, distance_km, unit_vector
from moe.params import Param

_HEIGHT_KM_PER_KM = 100.0
_SAME_PLACE_KM = 2.0
_NULL_REACH_KM = 150.0
_SITE_KM = 1.0
_SITE_HEIGHT_M = 100.0


@flax.struct.dataclass
class Anchors:
    """Positions of the M anchors: latitude, longitude in degrees, height in m; [M] each."""

    latitude: Param  # [M]
    longitude: Param  # [M]
    height: Param  # [M]


@flax.struct.dataclass
class Kernel:
    """Covariance of the anomaly field per channel: Matern-3/2 in great-circle and height distance plus a site-scale
    part.

    Attributes:
      length_km: [C] horizontal scale; length_m: [C] vertical scale; site: [C] variance share that lives at scales below
        1 km (station exposure).
      inverse: [C, M, M] inverse covariance of the anchors.
    """

    length_km: Param  # [C]
    length_m: Param  # [C]
    site: Param  # [C]
    inverse: Param  # [C, M, M]


def covariance(kernel: Kernel, anchors: Anchors, latitude, longitude, height) -> Float[Array, "*#b C Q M"]:
    """Prior covariance between the field at queries [..., Q] and at the anchors."""
    d = distance_km(latitude, longitude, anchors.latitude, anchors.longitude)[..., None, :, :]
    dz = (height[..., :, None] - anchors.height)[..., None, :, :]
    scaled = jnp.sqrt(
        3.0 * ((d / kernel.length_km[:, None, None]) ** 2 + (dz / kernel.length_m[:, None, None]) ** 2) + 1e-12
    )
    smooth = (1.0 + scaled) * jnp.exp(-scaled)
    site = jnp.exp(-((d / _SITE_KM) ** 2) - (dz / _SITE_HEIGHT_M) ** 2)
    share = kernel.site[:, None, None]
    return (1.0 - share) * smooth + share * site


def read_weights(
    kernel: Kernel, anchors: Anchors, latitude, longitude, height
) -> tuple[Float[Array, "*#b C Q M"], Float[Array, "*#b C Q"]]:
    """(weights of the anchors, explained variance in 0..1) of the field at queries: simple kriging, exact at an anchor,
    0 far from all.
    """
    cov = covariance(kernel, anchors, latitude, longitude, height)
    weight = jnp.einsum("...cqm,cmn->...cqn", cov, kernel.inverse)
    return weight, jnp.clip((weight * cov).sum(-1), 0.0, 1.0)


def gather(
    anchors: Anchors,
    value: Float[Array, "*#b N R V"],
    mask: Bool[Array, "*#b N R V"],
    latitude,
    longitude,
    height,
    background,
    confidence,
) -> tuple[Float[Array, "*#b M R V"], Float[Array, "*#b M R V"]]:
    """Observed anomalies onto anchors by inverse fourth-power distance, with the background where nothing is near.

    Args:
      background: [..., M, R, V] what the anchors hold without these observations (0 = the climate normal).
      confidence: [..., M, R, V] in 0..1; 1 lets the background compete with observations 150 km away on equal terms.

    Returns:
      (field [..., M, R, V], share of it that comes from observations [..., M, R, V]).
    """
    weight = proximity(anchors, latitude, longitude, height)  # [..., M, N]
    seen = mask.astype(value.dtype)
    total = jnp.einsum("...mn,...nrv->...mrv", weight, seen)
    numerator = jnp.einsum("...mn,...nrv->...mrv", weight, value * seen)
    null = _NULL_REACH_KM**-4 * (1.0 + confidence)
    field = (numerator + null * background) / (total + null)
    return field, total / (total + null)


def proximity(anchors: Anchors, latitude, longitude, height) -> Float[Array, "*#b M N"]:
    """Inverse fourth power of the distance in km (1 km of height = 100 km), 1/16 at the same place."""
    d = distance_km(anchors.latitude, anchors.longitude, latitude, longitude)
    dz = (anchors.height[:, None] - height[..., None, :]) / 1000.0 * _HEIGHT_KM_PER_KM
    return 1.0 / (d**2 + dz**2 + _SAME_PLACE_KM**2) ** 2


def fit_anchors(latitude: np.ndarray, longitude: np.ndarray, height: np.ndarray, count: int) -> Anchors:
    """At most `count` anchors for a region: the sites themselves or, when there are more, those nearest the centres of
    their clusters in (position, height).

    Anchors stand on sites because an anchor between sites has no history of its own: `gather` fades it to the normal.
    """
    points = np.unique(np.stack([latitude, longitude, height], 1).astype(np.float64), axis=0)
    if len(points) > count:
        from sklearn.cluster import KMeans

        sphere = EARTH_RADIUS_KM * unit_vector(points[:, 0], points[:, 1], xp=np)
        space = np.concatenate([sphere, points[:, 2:] * _HEIGHT_KM_PER_KM / 1000.0], 1)
        centres = KMeans(count, n_init=4, random_state=0).fit(space).cluster_centers_  # pyright: ignore[reportArgumentType]
        nearest = np.square(space[:, None] - centres[None]).sum(-1).argmin(0)
        points = points[np.unique(nearest)]
    return Anchors(*(jnp.asarray(points[:, i], jnp.float32) for i in range(3)))


def fibonacci_anchors(count: int, levels: tuple[float, ...]) -> Anchors:
    """`count` points of a Fibonacci sphere at each height (m) of `levels`: nearly equal areas."""
    i = np.arange(count) + 0.5
    latitude = np.rad2deg(np.arcsin(1 - 2 * i / count))
    longitude = (np.rad2deg(np.pi * (1 + 5**0.5) * i) + 180) % 360 - 180
    tiled = [np.tile(latitude, len(levels)), np.tile(longitude, len(levels)), np.repeat(levels, count)]
    return Anchors(*(jnp.asarray(a, jnp.float32) for a in tiled))


_LENGTHS_KM = (40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0)
_LENGTHS_M = (300.0, 1000.0, 3000.0)
_SITES = (0.02, 0.1, 0.3, 0.5)


def fit_kernel(
    anchors: Anchors,
    latitude: np.ndarray,
    longitude: np.ndarray,
    height: np.ndarray,
    anomalies: np.ndarray,
    *,
    ridge: float = 1e-3,
) -> Kernel:
    """Length scales and site share of each channel by leave-one-site-out error of simple kriging.

    Args:
      latitude, longitude, height: [N] sites.
      anomalies: [T, N, C] standardised anomalies, NaN missing; a few hundred times suffice.

    A channel observed at fewer than three sites gets the median scale of the others.
    """
    sites = Anchors(*(jnp.asarray(a, jnp.float32) for a in (latitude, longitude, height)))
    d = np.asarray(distance_km(sites.latitude, sites.longitude, sites.latitude, sites.longitude), np.float64)
    dz = np.abs(height[:, None] - height[None, :])
    channels = anomalies.shape[2]
    best = np.full((channels, 4), np.nan)
    filled = _filled(anomalies, d)
    relief = np.ptp(height) > 150
    for length in _LENGTHS_KM:
        for vertical in _LENGTHS_M if relief else (1000.0,):
            scaled = np.sqrt(3 * ((d / length) ** 2 + (dz / vertical) ** 2))
            smooth = (1 + scaled) * np.exp(-scaled)
            for site in _SITES:
                cov = (1 - site) * smooth + site * np.exp(-((d / _SITE_KM) ** 2) - (dz / _SITE_HEIGHT_M) ** 2)
                for c in range(channels):
                    present = np.isfinite(anomalies[:, :, c]).mean(0) > 0.5
                    if present.sum() < 3:
                        continue
                    inverse = np.linalg.inv(cov[np.ix_(present, present)] + ridge * np.eye(present.sum()))
                    observed = np.isfinite(anomalies[:, present, c])
                    if observed.any(1).sum() < 20:
                        continue
                    # The leave-one-out residual of kriging, where there is a value to leave out.
                    held = (filled[:, present, c] @ inverse) / np.diag(inverse)
                    cost = (held[observed] ** 2).mean()
                    if not cost >= best[c, 0]:
                        best[c] = cost, length, vertical, site
    fallback = (
        np.where(
            np.isfinite(best).any(0),
            np.nanmedian(np.where(np.isfinite(best), best, np.nan), 0),
            [1.0, 160.0, 1000.0, 0.3],
        )
        if np.isfinite(best).any()
        else np.array([1.0, 160.0, 1000.0, 0.3])
    )
    best = np.where(np.isfinite(best), best, fallback)
    return make_kernel(anchors, best[:, 1], best[:, 2], best[:, 3], ridge=ridge)


def _filled(anomalies: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Missing values replaced by the inverse-distance mean of what is there: of 200 sites one is always silent."""
    seen = np.isfinite(anomalies)
    weight = 1.0 / (distance + 10.0) ** 2
    total = np.einsum("mn,tnc->tmc", weight, seen)
    mean = np.einsum("mn,tnc->tmc", weight, np.where(seen, anomalies, 0.0)) / np.maximum(total, 1e-12)
    return np.where(seen, anomalies, mean)


def make_kernel(anchors: Anchors, length_km, length_m, site, *, ridge: float = 1e-3) -> Kernel:
    """A Kernel from per-channel scales, with the inverse covariance of the anchors."""
    scales = [jnp.asarray(a, jnp.float32) for a in (length_km, length_m, site)]
    m = anchors.latitude.shape[0]
    shell = Kernel(*scales, inverse=jnp.zeros((scales[0].shape[0], m, m)))
    cov = np.asarray(covariance(shell, anchors, anchors.latitude, anchors.longitude, anchors.height), np.float64)
    return dataclasses.replace(shell, inverse=jnp.asarray(np.linalg.inv(cov + ridge * np.eye(m)), jnp.float32))
