"""From reports to windows of tokens: every sensor's reports by time, thinned to a fixed number, with their nearest
anchors.

One token is one report: a station's values at a time, one level of a sounding, one footprint with all its channels. A
window holds the reports of `step` hours up to a time; it is padded where there are fewer than `tokens`, and thinned at
random where there are more.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import numpy as np

from earth import geometry
from earth.neighbours import Neighbourhood, nearest
from earth.observations import ObservationError, Reports
from earth.world.climate import Climate, standardise
from earth.world.field import Anchors, FieldConfig
from moe.params import Param


@dataclasses.dataclass(frozen=True)
class SensorConfig:
    """What the model reads of one sensor, and predicts.

    Attributes:
      sensor: key of the reports, and name in `earth.sensors.SENSORS`.
      variables: V columns; channels of a radiometer as `brightness_temperature:5`.
      tokens: N, reports of a window.
      fixed: platforms stand still and are the same in training and use: their own normal is theirs.
      weight: of the sensor in the loss.
    """

    sensor: str
    variables: tuple[str, ...]
    tokens: int = 256
    fixed: bool = False
    weight: float = 1.0

    def __post_init__(self):
        if not self.variables or self.tokens < 1 or self.weight < 0:
            raise ValueError(
                f"{self.sensor}: variables {self.variables}, tokens {self.tokens} and weight {self.weight} must name "
                "something, be at least 1 and not be negative"
            )


@flax.struct.dataclass
class Tokens:
    """Reports of one sensor in one window; leading axes are windows or batches.

    Attributes:
      value: [..., N, V] anomalies in standard deviations, 0 where `mask` is False; mask: [..., N, V].
      deviation: [..., N, V] that standard deviation, SI.
      age: [..., N] hours before the end of the window.
      latitude, longitude, height, view_angle: [..., N].
      near: nearest anchors, [..., N, k] and [..., N].
      error: [..., N, V] stated errors in the same standard deviations, 0 where none is stated; None where nobody asks.
    """

    value: Param
    mask: Param
    deviation: Param
    age: Param
    latitude: Param
    longitude: Param
    height: Param
    view_angle: Param
    near: Neighbourhood
    error: Param = None


class Record:
    """Every sensor's reports by time, as standardised anomalies.

    Args:
      reports: {sensor: reports}; more sensors than configured are ignored.
      sensors: what to read; field, anchors: the basis.
      normals: of each sensor.
      step: hours of a window.
    """

    def __init__(
        self,
        reports: Mapping[str, Reports],
        sensors: Sequence[SensorConfig],
        field: FieldConfig,
        anchors: Anchors,
        normals: Mapping[str, Climate],
        step: float,
    ):
        self.sensors, self.field, self.step = tuple(sensors), field, step
        self.anchors = np.asarray(anchors.place)
        self._parts: dict[str, dict[str, Any]] = {}
        for s in self.sensors:
            r = select(reports, s)
            z, sd = standardise({s.sensor: normals[s.sensor]}, {s.sensor: r})[s.sensor]
            order = np.argsort(r.time, kind="stable")
            view = np.zeros(len(r)) if r.view_angle is None else r.view_angle
            error = np.zeros_like(z) if r.error is None else np.nan_to_num(r.error / sd).astype(np.float32)
            self._parts[s.sensor] = {
                "time": r.time[order],
                "value": z[order],
                "deviation": sd[order],
                "error": error[order],
                "platform": r.platform[order],
                **{
                    name: np.asarray(x, np.float32)[order]
                    for name, x in (
                        ("latitude", r.latitude), ("longitude", r.longitude), ("height", r.height), ("view_angle", view)
                    )
                },
            }  # fmt: skip

    @property
    def span(self) -> tuple[int, int]:
        """First and last report, seconds since 1970."""
        starts = [p["time"][0] for p in self._parts.values()]
        return int(min(starts)), int(max(p["time"][-1] for p in self._parts.values()))

    def window(
        self, end: int, rng: np.random.Generator, *, tokens: Mapping[str, int] | None = None
    ) -> dict[str, Tokens]:
        """The reports of (end - step, end], `end` in seconds since 1970. `tokens` overrides the configured numbers."""
        out = {}
        for s in self.sensors:
            p = self._parts[s.sensor]
            first, last = np.searchsorted(p["time"], [end - round(self.step * 3600), end], "right")
            n = s.tokens if tokens is None else tokens.get(s.sensor, s.tokens)
            rows = np.arange(first, last)
            if len(rows) > n:
                rows = np.sort(rng.choice(rows, n, replace=False))
            out[s.sensor] = self._tokens(p, rows, n, end)
        return out

    def _tokens(self, p: dict[str, Any], rows: np.ndarray, n: int, end: int) -> Tokens:
        def pad(x: np.ndarray, fill: Any = 0) -> np.ndarray:
            return np.concatenate([x, np.full((n - len(rows), *x.shape[1:]), fill, x.dtype)])

        value = p["value"][rows]
        mask = np.isfinite(value)
        lat, lon, height, view = (pad(p[k][rows]) for k in ("latitude", "longitude", "height", "view_angle"))
        age = ((end - p["time"][rows]) / 3600.0).astype(np.float32)
        return Tokens(
            pad(np.where(mask, value, 0.0).astype(np.float32)), pad(mask, False), pad(p["deviation"][rows], 1.0),
            pad(age), lat, lon, height, view,
            nearest(host_place(self.field, lat, lon, height), self.anchors, self.field.neighbours),
            pad(p["error"][rows]),
        )  # fmt: skip


def host_place(cfg: FieldConfig, latitude: np.ndarray, longitude: np.ndarray, height: np.ndarray) -> np.ndarray:
    """`earth.world.field.place` in numpy, without a device."""
    lat, lon = np.deg2rad(np.float64(latitude)), np.deg2rad(np.float64(longitude))
    r = geometry.EARTH_RADIUS_KM / cfg.spacing_km
    up = np.zeros_like(lat) if cfg.vertical_km is None else np.float64(height) / (1000.0 * cfg.vertical_km)
    return np.stack([r * np.cos(lat) * np.cos(lon), r * np.cos(lat) * np.sin(lon), r * np.sin(lat), up], -1)


def select(reports: Mapping[str, Reports], s: SensorConfig) -> Reports:
    """One sensor's reports with the configured variables, and a height for every row: of its pressure in the standard
    atmosphere where it has one (soundings), else as reported, else 0 m.
    """
    if s.sensor not in reports:
        raise ObservationError(f"no reports of sensor {s.sensor!r}; there are {sorted(reports)}")
    r = reports[s.sensor]
    height = np.array(r.height)
    if r.pressure is not None:
        known = np.isfinite(r.pressure)
        height[known] = geometry.standard_height(r.pressure[known])
    height[~np.isfinite(height)] = 0.0
    columns = r.index(s.variables)
    error = None if r.error is None else r.error[:, columns]
    return dataclasses.replace(r, variables=s.variables, values=r.values[:, columns], error=error, height=height)
