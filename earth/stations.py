"""From a station network's record to a model configuration: what to read, which slots and leads its cadence allows, how
to train.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from earth.model import EarthConfig
from earth.network import NetworkConfig
from earth.objectives import ObjectiveConfig
from earth.observations import MissingVariableError, Reports
from earth.sensors import describe
from earth.train import StageConfig, TrainConfig
from earth.windows import Cycling, StreamConfig

USUAL = (
    "2m_temperature",
    "2m_dewpoint_temperature",
    "surface_pressure",
    "mean_sea_level_pressure",
    "10m_u_component_of_wind",
    "10m_v_component_of_wind",
)
_INSTRUMENTS = (
    ("2m_temperature",),
    ("2m_dewpoint_temperature", "2m_relative_humidity"),
    ("surface_pressure", "mean_sea_level_pressure"),
    ("10m_u_component_of_wind", "10m_v_component_of_wind", "10m_wind_speed", "10m_wind_gust"),
    ("total_precipitation", "precipitation_duration"),
    ("surface_solar_radiation_downwards", "uv_index", "sunshine_duration"),
)


@dataclasses.dataclass(frozen=True)
class StationsConfig:
    """Sizes and budgets of a station model; presets live in configs/earth_o1.py.

    Attributes:
      network: sizes of the learned part.
      anchors: at most this many.
      slots: hours of history read, thinned to the record's cadence.
      inputs: at most this many variables beside the targets are read as further sensors.
      coverage: a further sensor needs this share of reports.
      pretrain_steps: masked pre-training (lead 0); steps: forecasting.
      batch, members, learning_rate, weight_decay: of training.
      cycle_steps, cycling: a last stage on chains of analyses, at 0.3 of the learning rate; 0 steps leave it out.
      checkpoint_every: steps; the last one and the one under way at SIGTERM are saved anyway.
      objective: of the forecasting stage.
    """

    network: NetworkConfig = NetworkConfig(width=64, dropout=0.15)
    anchors: int = 64
    slots: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 6.0, 12.0, 23.0, 24.0)
    inputs: int = 6
    coverage: float = 0.2
    pretrain_steps: int = 0
    steps: int = 1000
    batch: int = 64
    members: int = 2
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    cycle_steps: int = 0
    cycling: Cycling = Cycling(cycles=3, hours=6.0, spin_up=1, rollout=1)
    checkpoint_every: int = 500
    objective: ObjectiveConfig = ObjectiveConfig()


def usual_variables(reports: Reports) -> tuple[str, ...]:
    """Forecast variables when none are named: temperature, dew point, pressure and wind where the record has them, else
    its best covered columns.
    """
    share = dict(zip(reports.variables, np.isfinite(reports.values).mean(0), strict=True))
    found = [v for v in USUAL if share.get(v, 0) > 0.3]
    if "surface_pressure" in found and "mean_sea_level_pressure" in found:
        found.remove("mean_sea_level_pressure")
    if not found:
        found = [v for v in sorted(share, key=lambda v: -share[v]) if share[v] > 0.3 and not describe(v).circular][:8]
    if not found:
        raise MissingVariableError(
            f"no column has values in more than 30 % of the reports (shares: {share}); name the variables"
        )
    return tuple(found)


def design(
    reports: Reports,
    targets: Sequence[str],
    leads: Sequence[float],
    train: np.ndarray,
    config: StationsConfig,
    *,
    seed: int = 0,
) -> tuple[EarthConfig, TrainConfig]:
    """Model and training configuration for this record.

    Args:
      reports: training stations only.
      targets: variables to forecast (ERA5 names).
      leads: hours to serve; those between the propagator's knots are interpolated.
      train: bool [n] training reports.

    Raises:
      MissingVariableError: a target without any training value, named with what the record has.
    """
    share = dict(
        zip(
            reports.variables,
            np.isfinite(reports.values[train]).mean(0) if train.any() else np.zeros(len(reports.variables)),
            strict=True,
        )
    )
    lost = [t for t in targets if share.get(t, 0.0) == 0.0]
    if lost:
        raise MissingVariableError(
            f"{lost} have no value in the training period; the record has {[v for v, s in share.items() if s > 0]}: "
            "choose among these"
        )
    spread = dict(
        zip(
            reports.variables,
            np.nanstd(np.where(np.isfinite(reports.values), reports.values, np.nan), axis=0),
            strict=True,
        )
    )
    known = [v for group in _INSTRUMENTS for v in group]
    others = [
        v for v in sorted(share, key=lambda v: (v not in known, -share[v]))
        if v not in targets and share[v] >= config.coverage and spread[v] > 0 and not describe(v).circular
        and not (v == "mean_sea_level_pressure" and "surface_pressure" in targets) and v != "10m_wind_speed"
    ]  # fmt: skip
    variables = tuple(targets) + tuple(others[: config.inputs])
    groups = tuple(g for g in (tuple(v for v in group if v in variables) for group in _INSTRUMENTS) if g)
    groups += tuple((v,) for v in variables if not any(v in g for g in groups))
    cadence = reports.cadence() / 3600
    slots = sorted(
        {s for s in config.slots if abs(s / cadence - round(s / cadence)) < 1e-6} | {cadence * k for k in range(4)}
    )
    slots = tuple(s for s in slots if s <= max(config.slots[-1], 3 * cadence))
    served = sorted({float(lead) for lead in leads if lead > 0})
    top = max([*served, cadence])
    knots = tuple(
        sorted(
            {k for k in (1.0, 3.0, 6.0, 12.0, 24.0, 48.0) if k <= top and abs(k / cadence - round(k / cadence)) < 1e-6}
            | set(served)
            | {max(cadence, 1.0)}
        )
    )
    knots = tuple(k for k in knots if abs(k / cadence - round(k / cadence)) < 1e-6)
    stream = StreamConfig(
        "station", variables, slots=slots, tolerance=cadence, tokens=len(reports.platforms), instruments=groups
    )
    model = EarthConfig(
        streams=(stream,),
        targets=tuple(("station", v) for v in targets),
        anchors=config.anchors,
        leads=knots,
        network=config.network,
    )
    groups_of = min(4, len(knots))
    cuts = np.array_split(np.asarray(knots), groups_of)
    strata: list[tuple[float, ...]] = [(0.0,)]
    for i, part in enumerate(cuts):
        before = () if i == 0 else (float(cuts[i - 1][-1]),)
        strata.append(before + tuple(float(k) for k in part))
    stages = []
    if config.pretrain_steps:
        mask = ObjectiveConfig(hide_site=0.3, hide_instrument=0.3, mixup=0.0, auxiliary=1.0, analysis=1.0)
        stages.append(
            StageConfig(
                "reconstruct", config.pretrain_steps, ((0.0,),), mask, config.learning_rate, config.weight_decay
            )
        )
    stages.append(
        StageConfig(
            "forecast", config.steps, tuple(strata), config.objective, config.learning_rate, config.weight_decay
        )
    )
    if config.cycle_steps:
        gentle = 0.3 * config.learning_rate
        objective = config.objective
        stages.append(
            StageConfig(
                "cycle", config.cycle_steps, tuple(strata), objective, gentle, config.weight_decay,
                cycling=dataclasses.replace(config.cycling, hours=max(config.cycling.hours, cadence)),
            )
        )  # fmt: skip
    # What a member that forecasts by itself adds lies at long leads, in the targets alone.
    far = np.asarray([k for k in knots if k >= 6] or knots[-1:])
    far_strata = tuple(tuple(float(k) for k in part) for part in np.array_split(far, min(3, len(far))))
    alone = dataclasses.replace(
        config.objective,
        hide_site=config.objective.hide_site * 2 / 3,
        hide_instrument=config.objective.hide_instrument / 2,
        auxiliary=0.0,
    )
    direct = StageConfig("direct", config.steps, far_strata, alone, config.learning_rate, config.weight_decay)
    return model, TrainConfig(
        tuple(stages),
        batch=config.batch,
        members=config.members,
        seed=seed,
        checkpoint_every=config.checkpoint_every,
        direct=(direct,),
    )
