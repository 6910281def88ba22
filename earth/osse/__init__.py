"""Observing-system simulation experiments: a known atmosphere, and instruments that see it imperfectly.

`simulate` runs (or reads from a cache) a nature run, lets simulated stations and radiosondes observe it, and returns
the truth, the observations in the library's canonical table, and what is needed to verify. dinosaur-dycore (extra
`osse`) is imported only when a nature run is computed. The truth is a dry Held-Suarez atmosphere: `caveats` lists what
no result on it can show, and belongs in every report made from it.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

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
from earth.osse.truth import (
    Truth,
    TruthQueryError,
    query,
    truth_from_dataset,
)

__all__ = [
    "DinosaurMissingError",
    "ErrorModel",
    "InstrumentError",
    "NatureCacheError",
    "NatureConfig",
    "NatureConfigError",
    "NatureRunError",
    "Observed",
    "OsseConfig",
    "OsseError",
    "Placement",
    "RadiosondeNetwork",
    "Simulation",
    "SimulationMeta",
    "SondeErrors",
    "StationNetwork",
    "Truth",
    "TruthQueryError",
    "caveats",
    "nature_run",
    "observe_radiosondes",
    "observe_stations",
    "query",
    "read_nature",
    "simulate",
    "truth_from_dataset",
]


@dataclasses.dataclass(frozen=True)
class OsseConfig:
    """A whole experiment.

    Attributes:
      nature: the truth.
      stations: the station network, or None.
      radiosondes: the radiosonde network, or None.
      seed: seed of everything observed (positions, errors, losses); the truth has its own, `nature.seed`.
    """

    nature: NatureConfig = dataclasses.field(default_factory=NatureConfig)
    stations: StationNetwork | None = dataclasses.field(default_factory=StationNetwork)
    radiosondes: RadiosondeNetwork | None = dataclasses.field(default_factory=RadiosondeNetwork)
    seed: int = 0

    def __post_init__(self):
        if self.stations is None and self.radiosondes is None:
            raise InstrumentError("an experiment without stations and radiosondes observes nothing; give at least one")
        if self.seed < 0:
            raise InstrumentError(f"seed={self.seed} must not be negative")


@dataclasses.dataclass(frozen=True)
class SimulationMeta:
    """What goes with a simulated table.

    Attributes:
      truth_values: true value of each row, aligned with the table's index; for verification only, never an input.
      platforms: platform, sensor, latitude, longitude, height, and the true `bias_<variable>` of stations.
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
    parts: list[Observed] = []
    if config.stations is not None:
        parts.append(observe_stations(truth, config.stations, config.seed))
    if config.radiosondes is not None:
        parts.append(observe_radiosondes(truth, config.radiosondes, config.seed))
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
        caveats=caveats(config.nature),
        seconds=dict(zip(("nature", "truth", "instruments"), np.diff(clock).tolist(), strict=True)),
    )
    return Simulation(truth, table.iloc[order].reset_index(drop=True), meta)
