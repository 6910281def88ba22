"""Presets of `examples/station_osse.py`: what is simulated, what is trained on it, how the time is split."""

from __future__ import annotations

import dataclasses

from configs import osse_stations
from earth.model import EarthConfig
from earth.network import NetworkConfig
from earth.objectives import ObjectiveConfig
from earth.osse import NatureConfig, OsseConfig, Placement, RadiosondeNetwork, StationNetwork
from earth.train import StageConfig, TrainConfig
from earth.windows import StreamConfig

SURFACE = (
    "lowest_level_temperature",
    "surface_pressure",
    "lowest_level_u_component_of_wind",
    "lowest_level_v_component_of_wind",
)
UPPER = ("temperature", "u_component_of_wind", "v_component_of_wind", "geopotential_height")


@dataclasses.dataclass(frozen=True)
class Demo:
    """One demonstration.

    Attributes:
      osse: what is simulated and observed.
      model, training: what is trained on the observations. Its leads are the ones scored.
      validation_days, gap_days, block_days, blocks: the record ends with `blocks` test blocks of `block_days` each;
        before them lie a gap, the validation days, another gap, and the training days. The gaps keep windows and
        targets of two roles apart.
      held_out_every: every so many-th station is held out.
      init_hours: hours between initial times of the scored forecasts.
      points: places, evenly over the globe, where forecasts are scored against the truth.
      near_km: a place with a training station this close counts as near the network, else as far from it.
      map_degrees: spacing of the global maps.
    """

    osse: OsseConfig
    model: EarthConfig
    training: TrainConfig
    validation_days: float = 21
    gap_days: float = 3
    block_days: float = 7
    blocks: int = 4
    held_out_every: int = 16
    init_hours: int = 6
    points: int = 400
    near_km: float = 700.0
    map_degrees: float = 2.5

    def __post_init__(self):
        if self.train_days <= 0:
            raise ValueError(
                f"{self.osse.nature.days} days do not hold {self.blocks} test blocks of {self.block_days:g} days, "
                f"{self.validation_days:g} validation days and two gaps of {self.gap_days:g}; simulate more days"
            )

    @property
    def train_days(self) -> float:
        """Days left for training at the start of the record."""
        return self.osse.nature.days - self.blocks * self.block_days - self.validation_days - 2 * self.gap_days


def model(stations: int, sonde_tokens: int, *, slots, leads, tolerance, network, folds: int = 4) -> EarthConfig:
    """Two streams: stations with a history each, soundings level by level; the stations' variables are forecast."""
    wind, upper_wind = SURFACE[2:], UPPER[1:3]
    return EarthConfig(
        streams=(
            StreamConfig(
                "station",
                SURFACE,
                slots=slots,
                tolerance=tolerance,
                tokens=stations,
                instruments=(SURFACE[:1], SURFACE[1:2], wind),
            ),
            # Balloons go up at 00 and 12 UTC: with 5 h an analysis at 03 UTC reads them, and targets stay on time.
            StreamConfig(
                "radiosonde",
                UPPER,
                slots=(0.0,),
                tolerance=5.0,
                tokens=sonde_tokens,
                moving=True,
                instruments=(UPPER[:1], upper_wind, UPPER[3:]),
            ),
        ),
        targets=tuple(("station", name) for name in SURFACE),
        anchors=stations,
        leads=leads,
        folds=folds,
        penalties=(10.0, 30.0, 100.0, 300.0),  # reports of a smooth truth are clean
        network=network,
    )


def demo() -> Demo:
    """128 stations and 40 sounding sites over the globe, 180 days; under 12 minutes on 2 cores."""
    osse = osse_stations.demo()
    assert osse.stations is not None
    forecast = StageConfig(
        "forecast", 400, ((0.0,), (6.0, 12.0), (24.0,), (48.0,)), ObjectiveConfig(), learning_rate=1e-3, queries=32
    )
    return Demo(
        osse=dataclasses.replace(
            osse,
            nature=dataclasses.replace(osse.nature, days=180),
            stations=dataclasses.replace(osse.stations, count=128),
        ),
        model=model(
            128,
            256,
            slots=(0.0, 6.0, 12.0, 24.0),
            leads=(6.0, 12.0, 24.0, 48.0),
            tolerance=1.0,
            network=NetworkConfig(width=64, dropout=0.1),
        ),
        training=TrainConfig(stages=(forecast,), batch=32),
    )


def fast() -> Demo:
    """The same path in under a minute, for tests: an atmosphere still spinning up, whose scores mean nothing."""
    osse = OsseConfig(
        nature=NatureConfig(
            layers=4, spin_up_days=6, days=20, save_hours=6, relief_height=1000.0, diurnal_amplitude=4.0
        ),
        stations=StationNetwork(count=24, cadence_hours=6, placement=Placement(clusters=4)),
        radiosondes=RadiosondeNetwork(count=4, placement=Placement(clusters=2)),
    )
    stage = StageConfig("forecast", 12, ((0.0,), (6.0, 24.0)), ObjectiveConfig(), warmup=4, queries=8)
    return Demo(
        osse=osse,
        model=model(
            24,
            32,
            slots=(0.0, 6.0, 12.0),
            leads=(6.0, 24.0),
            tolerance=1.0,
            folds=2,
            network=NetworkConfig(width=16, heads=2, encoder_layers=1),
        ),
        training=TrainConfig(stages=(stage,), batch=8),
        validation_days=3,
        gap_days=1.5,
        block_days=1.5,
        blocks=2,
        held_out_every=8,
        points=60,
        map_degrees=15.0,
    )
