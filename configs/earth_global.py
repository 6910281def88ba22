"""Presets of the global model (`earth.world`) on the simulated observing system of `configs.osse_global` (all ours)."""

import dataclasses
from typing import Any

import numpy as np

from earth.osse.nature import continentality, relief
from earth.world.field import FieldConfig
from earth.world.model import Shared, WorldConfig
from earth.world.network import NetworkConfig
from earth.world.records import SensorConfig
from earth.world.training import StageConfig, TrainConfig

_TB = "brightness_temperature"
_SURFACE = (
    "lowest_level_temperature",
    "surface_pressure",
    "lowest_level_u_component_of_wind",
    "lowest_level_v_component_of_wind",
)
_UPPER = ("temperature", "u_component_of_wind", "v_component_of_wind")


def _radiometer(sensor: str, channels: tuple[int, ...], tokens: int) -> SensorConfig:
    return SensorConfig(sensor, tuple(f"{_TB}:{c}" for c in channels), tokens)


def benchmark() -> WorldConfig:
    """For `osse_global.benchmark`: columns 1,000 km apart, steps of 12 hours."""
    return WorldConfig(
        sensors=(
            SensorConfig("station", _SURFACE, 400, fixed=True),
            SensorConfig("radiosonde", _UPPER, 450),
            _radiometer("simulated_amsua", (2, 4, 5, 6, 7, 8), 800),
            _radiometer("simulated_atms", (3, 4, 6, 7, 8, 10), 800),
            SensorConfig("scatterometer", _SURFACE[2:], 400),
            SensorConfig("aircraft", _UPPER, 600),
            SensorConfig("ship", _SURFACE, 120),
        ),
        field=FieldConfig(anchors=512, neighbours=8, reach=20),
        network=NetworkConfig(noise=8),  # for `ensemble_training`; without effect before
        normals=tuple(("radiosonde", name, height) for name in _UPPER for height in (1500.0, 5500.0, 11000.0)),
        # air over land is warmer by day and colder by night: temperature near the ground is each sensor's own
        shared=(Shared(("radiosonde", "aircraft")), Shared(("station", "ship", "scatterometer"), _SURFACE[1:])),
    )


def t21() -> WorldConfig:
    """For `osse_global.t21`: with humidity and a geostationary imager."""
    base = benchmark()
    humid = {"radiosonde": (*_UPPER, "specific_humidity")}
    sensors = [dataclasses.replace(s, variables=humid[s.sensor]) if s.sensor in humid else s for s in base.sensors]
    sensors.insert(4, _radiometer("simulated_geo_imager", (1, 2, 3), 100))
    return dataclasses.replace(base, sensors=tuple(sensors))


def benchmark_tiny() -> WorldConfig:
    """For `osse_global.benchmark_tiny`: seconds."""
    return _tiny(benchmark())


def tiny() -> WorldConfig:
    """For `osse_global.tiny`: seconds."""
    return _tiny(t21())


def _tiny(full: WorldConfig) -> WorldConfig:
    return dataclasses.replace(
        full,
        field=FieldConfig(anchors=64, neighbours=4, reach=8),
        network=NetworkConfig(width=32, heads=4, key=4, heights=(500.0, 3000.0, 8000.0, 15000.0), noise=2),
        step=6.0,
    )


def training() -> TrainConfig:
    return TrainConfig(
        stages=(
            StageConfig("short", 5000, cycles=2, leads=2, learning_rate=2e-3),
            StageConfig("long", 3500, spin=4, cycles=2, leads=4, learning_rate=1e-3),
        )
    )


def ensemble_training() -> TrainConfig:
    """From a network of `training`: several members of each forecast, which learn to differ as much as they err."""
    return TrainConfig((StageConfig("members", 2000, spin=4, cycles=2, leads=4, learning_rate=5e-4, members=2),))


def statics(latitude: Any, longitude: Any) -> Any:
    """Relief over 2 km and the share of land of the simulated planet: what the model is told of the ground."""
    land = continentality(np.asarray(latitude, float), np.asarray(longitude, float))
    return np.stack([relief(np.asarray(latitude, float), np.asarray(longitude, float), 1.0), land], -1)
