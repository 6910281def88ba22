"""Presets of Earth-o1 for station networks: `--config configs/earth_o1.py:NAME --set network.width=96`."""

import dataclasses

from earth.network import NetworkConfig
from earth.stations import StationsConfig


def stations() -> StationsConfig:
    """The default of `examples/forecast_stations.py`: 31 stations of 19 months in about 10 minutes on 2 idle cores."""
    return StationsConfig()


def smoke() -> StationsConfig:
    """A run of seconds that exercises every part; its scores mean nothing."""
    return dataclasses.replace(
        stations(), network=NetworkConfig(width=16, heads=2, encoder_layers=1), steps=8, batch=16, anchors=16
    )


def cycling() -> StationsConfig:
    """`stations` with a last stage on chains of analyses, for assimilating into a running state."""
    return dataclasses.replace(stations(), cycle_steps=300)


def cross_sensor() -> StationsConfig:
    """Masked reconstruction only: one sensor from the others at the same hour."""
    return dataclasses.replace(
        stations(), network=NetworkConfig(width=96, dropout=0.05), inputs=12, coverage=0.1, pretrain_steps=2000, steps=1
    )
