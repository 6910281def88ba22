"""Presets of a whole simulated observing system over mountains, a diurnal cycle and carried humidity (all ours)."""

import dataclasses

from earth.osse import (
    AFTERNOON,
    DISC,
    MORNING,
    AircraftFleet,
    DriftingShips,
    NatureConfig,
    OsseConfig,
    Placement,
    RadiosondeNetwork,
    Scatterometer,
    StationNetwork,
)


def t21() -> OsseConfig:
    """30 days, 3-hourly: stations, radiosondes, two sounders, a geostationary disc, winds over the sea, aircraft and
    ships: some 270,000 values a day.
    """
    return OsseConfig(
        nature=NatureConfig(days=30, save_hours=3, relief_height=2000.0, diurnal_amplitude=4.0, moisture=True),
        stations=StationNetwork(count=300),
        radiosondes=RadiosondeNetwork(count=40, drift=True, humidity=True),
        sounders=(MORNING, AFTERNOON),
        imagers=(DISC,),
        scatterometers=(Scatterometer(),),
        aircraft=AircraftFleet(count=60),
        ships=DriftingShips(count=40),
    )


def t31() -> OsseConfig:
    """The same over 96 x 48 points and 12 layers: weather down to some 700 km."""
    preset = t21()
    return dataclasses.replace(preset, nature=dataclasses.replace(preset.nature, truncation=31, layers=12))


def tiny() -> OsseConfig:
    """The same instruments, fewer and thinned, over one day from rest: seconds. Not an atmosphere in any climate."""
    return OsseConfig(
        nature=NatureConfig(
            spin_up_days=0, days=1, save_hours=6, relief_height=2000.0, diurnal_amplitude=4.0, moisture=True
        ),
        stations=StationNetwork(count=30, cadence_hours=6, placement=Placement(clusters=3)),
        radiosondes=RadiosondeNetwork(count=6, placement=Placement(clusters=3), humidity=True),
        sounders=tuple(dataclasses.replace(sounder, cadence_seconds=512) for sounder in (MORNING, AFTERNOON)),
        imagers=(dataclasses.replace(DISC, cadence_hours=6, spacing=1.5),),
        scatterometers=(Scatterometer(cadence_seconds=240),),
        aircraft=AircraftFleet(count=10, interval_minutes=30),
        ships=DriftingShips(count=10, cadence_hours=6),
    )


def benchmark() -> tuple[OsseConfig, OsseConfig]:
    """(180 days to learn from, 40 of another seed to forecast), as `examples/global_osse.py` has them: dry, without the
    imager, satellites thinned: some 330,000 values a day.
    """
    preset = t21()
    assert preset.radiosondes is not None
    system = dataclasses.replace(
        preset,
        radiosondes=dataclasses.replace(preset.radiosondes, humidity=False),
        sounders=tuple(dataclasses.replace(sounder, cadence_seconds=128) for sounder in preset.sounders),
        imagers=(),
        scatterometers=tuple(dataclasses.replace(one, cadence_seconds=120) for one in preset.scatterometers),
    )
    nature = dataclasses.replace(preset.nature, days=180, moisture=False)
    return _two_runs(system, nature, 40)


def benchmark_tiny() -> tuple[OsseConfig, OsseConfig]:
    """The same of `tiny`: six days and three."""
    preset = tiny()
    assert preset.radiosondes is not None
    system = dataclasses.replace(
        preset,
        radiosondes=dataclasses.replace(preset.radiosondes, humidity=False),
        imagers=(),
    )
    return _two_runs(system, dataclasses.replace(preset.nature, days=6, moisture=False), 3)


def _two_runs(system: OsseConfig, nature: NatureConfig, days: int) -> tuple[OsseConfig, OsseConfig]:
    later = dataclasses.replace(nature, days=days, seed=1, start="2001-01-01T00:00")
    return dataclasses.replace(system, nature=nature), dataclasses.replace(system, nature=later)
