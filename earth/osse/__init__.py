"""Observing-system simulation experiments: a known atmosphere, and instruments that see it imperfectly.

`simulate` runs (or reads from a cache) a nature run, lets simulated instruments observe it (stations, radiosondes,
sounders, imagers, scatterometers, aircraft, ships), and returns the truth, the observations in the library's canonical
table, and what is needed to verify. dinosaur-dycore (extra `osse`) is imported only when a nature run is computed. The
truth is a dry Held-Suarez atmosphere: `caveats` lists what no result on it can show, and belongs in every report made
from it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas.api.types import union_categoricals

from earth.osse.instruments import (
    ErrorModel,
    InstrumentError,
    Observed,
    Placement,
    RadiosondeNetwork,
    SondeErrors,
    StationNetwork,
    observe_radiosondes,
    observe_stations,
)
from earth.osse.nature import (
    DinosaurMissingError,
    NatureCacheError,
    NatureConfig,
    NatureConfigError,
    NatureRunError,
    OsseError,
    caveats,
    nature_run,
    read_nature,
)
from earth.osse.orbits import Orbit, OrbitError
from earth.osse.radiation import ChannelError, SounderChannel, brightness_temperature
from earth.osse.satellites import (
    AFTERNOON,
    DISC,
    MORNING,
    GeoImager,
    Scatterometer,
    Sounder,
    observe_imager,
    observe_scatterometer,
    observe_sounder,
)
from earth.osse.truth import (
    Truth,
    TruthQueryError,
    profiles,
    query,
    truth_from_dataset,
)
from earth.osse.vehicles import AircraftFleet, DriftingShips, observe_aircraft, observe_ships

__all__ = [
    "AFTERNOON",
    "DISC",
    "MORNING",
    "AircraftFleet",
    "ChannelError",
    "DinosaurMissingError",
    "DriftingShips",
    "ErrorModel",
    "GeoImager",
    "InstrumentError",
    "NatureCacheError",
    "NatureConfig",
    "NatureConfigError",
    "NatureRunError",
    "Observed",
    "Orbit",
    "OrbitError",
    "OsseConfig",
    "OsseError",
    "Placement",
    "RadiosondeNetwork",
    "Scatterometer",
    "Simulation",
    "SimulationMeta",
    "SondeErrors",
    "Sounder",
    "SounderChannel",
    "StationNetwork",
    "Truth",
    "TruthQueryError",
    "World",
    "brightness_temperature",
    "caveats",
    "nature_run",
    "observe",
    "observe_aircraft",
    "observe_imager",
    "observe_radiosondes",
    "observe_scatterometer",
    "observe_ships",
    "observe_sounder",
    "observe_stations",
    "profiles",
    "query",
    "read_nature",
    "simulate",
    "truth_from_dataset",
]


_RADIANCE_CAVEATS = (
    "brightness temperatures of one well-mixed absorber per channel: no water vapour, clouds or surface emissivity "
    "of their own, and air above the highest model layer as warm as that layer",
)


@dataclasses.dataclass(frozen=True)
class OsseConfig:
    """A whole experiment.

    Attributes:
      nature: the truth.
      stations: the station network, or None.
      radiosondes: the radiosonde network, or None.
      sounders: satellites that sound the column, e.g. (MORNING, AFTERNOON).
      imagers: geostationary imagers, e.g. (DISC,).
      scatterometers: satellites that see the wind over the sea.
      aircraft: the aircraft, or None.
      ships: the ships, or None.
      seed: seed of everything observed (positions, errors, losses); the truth has its own, `nature.seed`.
    """

    nature: NatureConfig = dataclasses.field(default_factory=NatureConfig)
    stations: StationNetwork | None = dataclasses.field(default_factory=StationNetwork)
    radiosondes: RadiosondeNetwork | None = dataclasses.field(default_factory=RadiosondeNetwork)
    sounders: tuple[Sounder, ...] = ()
    imagers: tuple[GeoImager, ...] = ()
    scatterometers: tuple[Scatterometer, ...] = ()
    aircraft: AircraftFleet | None = None
    ships: DriftingShips | None = None
    seed: int = 0

    def __post_init__(self):
        if not self.instruments:
            raise InstrumentError("an experiment without any instrument observes nothing; give at least one")
        satellites = [satellite.platform for satellite in (*self.sounders, *self.imagers, *self.scatterometers)]
        twice = {name for name in satellites if satellites.count(name) > 1}
        if twice:
            raise InstrumentError(f"platforms {sorted(twice)} are given twice; each satellite needs its own name")
        if self.seed < 0:
            raise InstrumentError(f"seed={self.seed} must not be negative")

    @property
    def instruments(self) -> tuple[tuple[Callable[[Truth, Any, int], Observed], Any], ...]:
        """(observe function, what it simulates) of every instrument there is, in the order of the table."""
        pairs = (
            (observe_stations, self.stations),
            (observe_radiosondes, self.radiosondes),
            *((observe_sounder, sounder) for sounder in self.sounders),
            *((observe_imager, imager) for imager in self.imagers),
            *((observe_scatterometer, scatterometer) for scatterometer in self.scatterometers),
            (observe_aircraft, self.aircraft),
            (observe_ships, self.ships),
        )
        return tuple(pair for pair in pairs if pair[1] is not None)


@dataclasses.dataclass(frozen=True)
class SimulationMeta:
    """What goes with a simulated table.

    Attributes:
      truth_values: true value of each row, aligned with the table's index; for verification only, never an input.
      platforms: platform, sensor, latitude, longitude, height (where it starts, for one that moves; NaN on a low
        orbit), and its true `bias_<variable>`, for radiometers also `scan_slope_*` and `scan_curve_*`.
      start, end: first and last time of the truth.
      config: the experiment.
      caveats: sentences to print with every result.
      seconds: wall time of the steps `nature` (near 0 when cached), `truth` and `instruments`.
    """

    truth_values: pd.Series
    platforms: pd.DataFrame
    start: np.datetime64
    end: np.datetime64
    config: OsseConfig
    caveats: tuple[str, ...]
    seconds: dict[str, float]


class Simulation(NamedTuple):
    """Result of `simulate`."""

    truth: Truth
    table: pd.DataFrame
    meta: SimulationMeta


class World(NamedTuple):
    """Result of `observe`: one run and what its instruments report, strings as categories."""

    truth: Truth
    table: pd.DataFrame
    platforms: pd.DataFrame


def observe(
    config: OsseConfig, *, cache: str | Path | None = None, days: slice | None = None, progress: bool = True
) -> World:
    """The observations of `simulate` without their truth, instrument by instrument and in compact columns, so that half
    a year of 300,000 values a day fits into memory.

    Args:
      config, cache, progress: as for `simulate`.
      days: cuts the nature run first.

    Returns:
      (truth, canonical table sorted by time, platforms as in `SimulationMeta`).

    Raises:
      DinosaurMissingError, NatureRunError, NatureCacheError: see `nature_run`.
    """
    run = nature_run(config.nature, cache=cache, progress=progress)
    if days is not None:
        steps = 24 // config.nature.save_hours
        run = run.isel(time=slice(days.start * steps, days.stop * steps + 1))
    truth = truth_from_dataset(run)
    parts, platforms = [], []
    for look, instrument in config.instruments:
        seen = look(truth, instrument, config.seed)
        parts.append(seen.table.astype(dict.fromkeys(_TEXT, "category")))
        platforms.append(seen.platforms)
    table = pd.DataFrame(
        {
            name: union_categoricals([part[name] for part in parts])
            if name in _TEXT
            else np.concatenate([part[name].to_numpy() for part in parts])
            for name in parts[0].columns
        }
    )
    order = np.argsort(table["time"].to_numpy(), kind="stable")
    return World(truth, table.iloc[order].reset_index(drop=True), pd.concat(platforms, ignore_index=True))


_TEXT = ("variable", "sensor", "platform")


def simulate(config: OsseConfig, *, cache: str | Path | None = None, progress: bool = True) -> Simulation:
    """Runs an experiment up to its observations.

    Args:
      config: the experiment.
      cache: folder for finished nature runs, see `nature_run`; None keeps nothing.
      progress: show a progress bar of the nature run.

    Returns:
      (truth, table, meta): the truth for `query`; the canonical long table sorted by time, then sensor, platform as
      simulated; and the rest. The same config gives the same table, bit for bit, on one machine and one version of jax.

    Raises:
      DinosaurMissingError, NatureRunError, NatureCacheError: see `nature_run`.
    """
    clock = [time.perf_counter()]
    dataset = nature_run(config.nature, cache=cache, progress=progress)
    clock.append(time.perf_counter())
    truth = truth_from_dataset(dataset)
    clock.append(time.perf_counter())
    parts = [observe(truth, instrument, config.seed) for observe, instrument in config.instruments]
    table = pd.concat([part.table for part in parts], ignore_index=True)
    values = pd.concat([part.truth for part in parts], ignore_index=True)
    order = np.argsort(table["time"].to_numpy(), kind="stable")
    clock.append(time.perf_counter())
    meta = SimulationMeta(
        truth_values=values.iloc[order].reset_index(drop=True),
        platforms=pd.concat([part.platforms for part in parts], ignore_index=True),
        start=truth.start,
        end=truth.end,
        config=config,
        caveats=(*caveats(config.nature), *(_RADIANCE_CAVEATS if config.sounders or config.imagers else ())),
        seconds=dict(zip(("nature", "truth", "instruments"), np.diff(clock).tolist(), strict=True)),
    )
    return Simulation(truth, table.iloc[order].reset_index(drop=True), meta)
