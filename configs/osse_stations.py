"""Presets of the observing-system simulation experiment of stations and soundings (`configs/station_osse.py`)."""

from earth.osse import NatureConfig, OsseConfig, Placement, RadiosondeNetwork, StationNetwork


def demo() -> OsseConfig:
    """Global, 90 days 3-hourly: 200 stations and 40 radiosonde sites over mountains and a diurnal cycle (both ours)."""
    return OsseConfig(
        nature=NatureConfig(days=90, save_hours=3, relief_height=2000.0, diurnal_amplitude=4.0),
        stations=StationNetwork(count=200, cadence_hours=3),
        radiosondes=RadiosondeNetwork(count=40),
    )


def held_suarez() -> OsseConfig:
    """The same networks over the Held-Suarez atmosphere as published: flat, without a diurnal cycle."""
    return OsseConfig(nature=NatureConfig(days=90, save_hours=3), stations=StationNetwork(count=200, cadence_hours=3))


def tiny() -> OsseConfig:
    """Two days from rest, seconds to run: for tests of what comes after. Not an atmosphere in any climate."""
    return OsseConfig(
        nature=NatureConfig(spin_up_days=0, days=2, save_hours=6, relief_height=2000.0, diurnal_amplitude=4.0),
        stations=StationNetwork(count=30, cadence_hours=6, placement=Placement(clusters=3)),
        radiosondes=RadiosondeNetwork(count=6, placement=Placement(clusters=3)),
    )
