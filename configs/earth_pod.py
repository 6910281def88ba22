"""Presets of `examples/world_pod.py`: the global model at the load of an operational centre, on a slice of a TPU pod.

Footprints of the sounders in 12 hours follow from how they scan (published, quoted from memory: ATMS 96 footprints in
8/3 s, MHS 90 in 8/3 s, AMSU-A 30 in 8 s), none thinned: three ATMS, three MHS and four AMSU-A make 9.7 million. With
reports in situ, whose numbers are ours and round, a window has 10 million, the load that HealDA (2601.17636) states for
its own. One report is one token with all its channels or variables: 135 million values. Sizes of the model, the slices
and the mesh are ours.
"""

import dataclasses

from earth.world.field import FieldConfig
from earth.world.model import WorldConfig
from earth.world.network import NetworkConfig
from earth.world.records import SensorConfig
from earth.world.training import StageConfig

_WINDOW = 12 * 3600
_SURFACE = ("2m_temperature", "2m_dewpoint_temperature", "10m_u_component_of_wind", "10m_v_component_of_wind")
_UPPER = ("temperature", "u_component_of_wind", "v_component_of_wind", "specific_humidity")


@dataclasses.dataclass(frozen=True)
class EarthPod:
    """A model, its load and its slice.

    Attributes:
      world: the model; `tokens` of its sensors are the reports of a window.
      stage: of the train step; its batch is that of the whole slice.
      topology: as `moe.kernels.aot.topology_mesh` names it.
      data: devices that chains of a batch are split over; all others split anchors and reports.
      statics: S, fixed features of the anchors.
    """

    world: WorldConfig
    stage: StageConfig
    topology: str = "v5p:2x2x4"
    data: int = 1
    statics: int = 2

    def __post_init__(self):
        if self.data < 1 or self.stage.batch % self.data:
            raise ValueError(f"batch {self.stage.batch} does not divide over data {self.data}")

    @property
    def reports(self) -> int:
        """Of a window, all sensors."""
        return sum(s.tokens for s in self.world.sensors)


def _channels(count: int) -> tuple[str, ...]:
    return tuple(f"brightness_temperature:{c}" for c in range(1, count + 1))


def sensors() -> tuple[SensorConfig, ...]:
    """10,000,000 reports in 12 hours."""
    return (
        SensorConfig("atms", _channels(22), 3 * 96 * _WINDOW * 3 // 8),
        SensorConfig("mhs", _channels(5), 3 * 90 * _WINDOW * 3 // 8),
        SensorConfig("amsua", _channels(15), 4 * 30 * _WINDOW // 8),
        SensorConfig("aircraft", _UPPER[:3], 136_000),
        SensorConfig("station", (*_SURFACE, "surface_pressure"), 96_000, fixed=True),
        SensorConfig("radiosonde", _UPPER, 64_000),
        SensorConfig("buoy", (*_SURFACE[:1], *_SURFACE[2:], "surface_pressure"), 14_400),
        SensorConfig("ship", (*_SURFACE, "surface_pressure"), 2_000),
    )


def window_10m() -> EarthPod:
    """10 million reports, 102,400 anchors 71 km apart, width 512."""
    return EarthPod(
        world=WorldConfig(
            sensors=sensors(),
            field=FieldConfig(anchors=102_400, neighbours=8, reach=20),
            network=NetworkConfig(
                width=512,
                heads=16,
                key=32,
                expansion=4,
                analysis_layers=1,
                dynamics_layers=4,
                operands="bfloat16",
                ordered=True,
            ),
        ),
        stage=StageConfig("pod", 100_000, cycles=2, leads=2, remat=True),
    )


def smoke() -> EarthPod:
    """The same path in seconds, for tests."""
    full = window_10m()
    world = dataclasses.replace(
        full.world,
        sensors=tuple(dataclasses.replace(s, tokens=max(40, s.tokens // 5000)) for s in sensors() if s.tokens > 1e5),
        field=FieldConfig(anchors=512, neighbours=8, reach=12),
        network=NetworkConfig(
            width=64,
            heads=4,
            key=16,
            dynamics_layers=1,
            heights=(500.0, 3000.0, 8000.0, 15000.0),
            operands="bfloat16",
            ordered=True,
        ),
        temperature=("aircraft", "temperature"),
    )
    return dataclasses.replace(full, world=world, stage=dataclasses.replace(full.stage, cycles=1, leads=1))


def growth(reports: int) -> WorldConfig:
    """The same sensors in the same proportions, so many reports in all, and the sizes of the preset that is trained on
    the simulated globe over 4,096 anchors: for `tests.bench_world`.
    """
    load = sensors()
    total = sum(s.tokens for s in load)
    counts = [max(1, round(reports * s.tokens / total)) for s in load]
    counts[0] += reports - sum(counts)
    return WorldConfig(
        sensors=tuple(dataclasses.replace(s, tokens=n) for s, n in zip(load, counts, strict=True)),
        field=FieldConfig(anchors=4096, neighbours=8, reach=20),
    )
