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
