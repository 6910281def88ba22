"""The field: features on anchors with continuous coordinates, read and written by distance-biased attention.

Anchors are a basis, not a grid: points of a Fibonacci sphere, at one height or several, each with a latent vector.
Between them the field is a partition of unity: at a point the k nearest anchors share, with weights that fall to zero
at the edge of the neighbourhood (`earth.kernels.neighbour_attention`), and some heads weigh by the displacement from
the anchor as well, so that the blend is of first-order expansions. Nothing is ever interpolated to a grid.

Lengths are in units of the anchors' spacing horizontally and of `vertical_km` vertically; without the latter anchors
are whole columns and height is a coordinate of the queries alone.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np

from earth import geometry
from earth.field import fibonacci_anchors
from earth.neighbours import Neighbourhood, nearest
from moe.params import Param


@dataclasses.dataclass(frozen=True)
class FieldConfig:
    """The basis.

    Attributes:
      anchors: points of the Fibonacci sphere at each height.
      levels: heights in m.
      vertical_km: vertical length that counts as one horizontal spacing; None ignores height (columns).
      neighbours: k, anchors that a report or query shares in.
      reach: neighbours of an anchor in self-attention, itself included.
    """

    anchors: int = 512
    levels: tuple[float, ...] = (0.0,)
    vertical_km: float | None = None
    neighbours: int = 8
    reach: int = 20

    def __post_init__(self):
        if self.anchors < 4 or not self.levels:
            raise ValueError(f"anchors {self.anchors} at levels {self.levels} span no field; give at least 4 at one")
        if len(self.levels) > 1 and self.vertical_km is None:
            raise ValueError(f"levels {self.levels} need vertical_km: without it they are the same place")
        if not 1 <= self.neighbours <= self.count or not 1 <= self.reach <= self.count:
            raise ValueError(
                f"neighbours {self.neighbours} and reach {self.reach} must lie in 1..{self.count}, the anchors"
            )

    @property
    def count(self) -> int:
        """M, anchors in all."""
        return self.anchors * len(self.levels)

    @property
    def spacing_km(self) -> float:
        """Side of the square that is one anchor's share of the sphere."""
        return geometry.EARTH_RADIUS_KM * math.sqrt(4 * math.pi / self.anchors)


@flax.struct.dataclass
class Anchors:
    """M anchors.

    Attributes:
      latitude, longitude, height: [M].
      place: [M, 4] in scaled space; frame: [M, 3, 4] unit vectors east, north and up there.
      near: the `reach` nearest anchors of each.
      statics: [M, S] what does not change there, e.g. relief and land, about unit size.
    """

    latitude: Param
    longitude: Param
    height: Param
    place: Param
    frame: Param
    near: Neighbourhood
    statics: Param


def place(cfg: FieldConfig, latitude: Any, longitude: Any, height: Any) -> Any:
    """[..., 4] scaled coordinates of points."""
    unit = geometry.unit_vector(latitude, longitude) * (geometry.EARTH_RADIUS_KM / cfg.spacing_km)
    up = (
        jnp.zeros_like(unit[..., 0])
        if cfg.vertical_km is None
        else height / (1000.0 * cfg.vertical_km) + 0.0 * unit[..., 0]
    )
    return jnp.concatenate([unit, up[..., None]], -1)


def make_anchors(cfg: FieldConfig, statics: Any = None) -> Anchors:
    """The anchors of a config.

    Args:
      statics: function (latitude, longitude) in degrees -> [M, S], or None for S = 0.
    """
    points = fibonacci_anchors(cfg.anchors, cfg.levels)
    latitude, longitude, height = (
        np.asarray(x, np.float32) for x in (points.latitude, points.longitude, points.height)
    )
    lat, lon = np.deg2rad(latitude), np.deg2rad(longitude)
    zero = np.zeros_like(lat)
    east = np.stack([-np.sin(lon), np.cos(lon), zero, zero], -1)
    north = np.stack([-np.sin(lat) * np.cos(lon), -np.sin(lat) * np.sin(lon), np.cos(lat), zero], -1)
    up = np.stack([zero, zero, zero, zero + 1.0], -1)
    where = np.asarray(place(cfg, latitude, longitude, height))
    return Anchors(
        latitude, longitude, height, where, np.stack([east, north, up], 1).astype(np.float32),
        nearest(where, where, cfg.reach),
        np.asarray(statics(latitude, longitude), np.float32) if statics else np.zeros((cfg.count, 0), np.float32),
    )  # fmt: skip
