"""Presets of `examples/demo.py`: `make demo`."""

from __future__ import annotations

import dataclasses

from configs import earth_global, osse_global
from earth.baselines.globe import GlobeConfig, Kernel
from earth.osse import OsseConfig
from earth.osse.verification import VerificationConfig
from earth.world import StageConfig, TrainConfig, WorldConfig


@dataclasses.dataclass(frozen=True)
class Demo:
    """One demonstration.

    Attributes:
      train, test: the run that is learned from and, of another seed, the one that is forecast.
      protocol: which platforms are held out, when forecasts start, what they are asked.
      model, training: of the global model.
      cycles: windows of an analysis.
      baselines: what it is compared with; nothing of them is tuned here (`examples/global_osse.py` does).
      inferred: (sensor, channel) that the maps show where the sensor itself was not read.
      map_lead, map_degrees: of the maps, hours and spacing.
    """

    train: OsseConfig
    test: OsseConfig
    protocol: VerificationConfig
    model: WorldConfig
    training: TrainConfig
    cycles: int
    baselines: GlobeConfig
    inferred: tuple[str, int] = ("simulated_atms", 7)
    map_lead: int = 24
    map_degrees: float = 2.5


def demo() -> Demo:
    """60 days of the benchmark's observing system to learn from, 20 of another seed to forecast."""
    train, test = (_shorter(run, days) for run, days in zip(osse_global.benchmark(), (60, 20), strict=True))
    model = earth_global.benchmark()
    third = [dataclasses.replace(s, tokens=s.tokens // 3) for s in model.sensors]
    protocol = VerificationConfig(warm_up_hours=96, leads=(6, 12, 24, 48, 72))
    return Demo(
        train,
        test,
        protocol,
        dataclasses.replace(model, sensors=tuple(third)),
        TrainConfig((StageConfig("short", 1200, cycles=3, leads=2, learning_rate=2e-3),), ema=0.995),
        cycles=4,
        baselines=_untuned(protocol, components=(12,), penalties=(0.1,), damping_times=20),
    )


def fast() -> Demo:
    """The same path for tests, in a minute: an atmosphere still at rest, whose scores mean nothing."""
    train, test = osse_global.benchmark_tiny()
    protocol = VerificationConfig(warm_up_hours=24, leads=(6, 12, 24))
    return Demo(
        train,
        test,
        protocol,
        earth_global.benchmark_tiny(),
        TrainConfig((StageConfig("short", 4, cycles=2, leads=1),), checkpoint_every=2),
        cycles=2,
        baselines=_untuned(protocol, components=(2,), penalties=(0.1,), damping_times=4, grid=(4, 8), waves=2),
        map_lead=12,
        map_degrees=15.0,
    )


def _shorter(run: OsseConfig, days: int) -> OsseConfig:
    return dataclasses.replace(run, nature=dataclasses.replace(run.nature, days=days))


def _untuned(protocol: VerificationConfig, **sizes) -> GlobeConfig:
    kernel = Kernel()
    return GlobeConfig(tuning_times=0, kernels=(kernel, kernel, kernel), leads=protocol.leads, **sizes)
