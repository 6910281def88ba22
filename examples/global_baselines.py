"""What a learned global forecast has to beat: climatology, persistence, optimal interpolation, a vector autoregression
and an ensemble Kalman filter, on one simulated atmosphere, verified on another.

    python examples/global_baselines.py --out out/global_baselines

The statistical baselines are fitted on the reports of a training run; everything is verified at stations and radiosonde
sites that nobody saw, on a later run of another seed (extra `osse`). The Kalman filter owns what the others must learn,
the equations, at a coarser truncation: it stands for an operational centre. OUT receives table.csv (RMSE per model,
group, variable and lead), ratios.csv (over the best statistical baseline), limits.csv (lead at which a forecast stops
beating climatology), counts.csv (what the filter read) and rmse.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pandas.api.types import union_categoricals

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the presets are not installed

from configs import osse_global
from earth.baselines import globe
from earth.osse import OsseConfig, Truth, caveats, letkf, nature_run, truth_from_dataset
from earth.osse.nature import dynamical_core
from earth.osse.verification import (
    VerificationConfig,
    given_table,
    held_out_platforms,
    ratios,
    score,
    skill_limits,
    targets,
)
from earth.report import MARKERS, PALETTE, STYLE

TEXT = ("variable", "sensor", "platform")


class World(NamedTuple):
    """One run and what its instruments report, strings as categories."""

    truth: Truth
    table: pd.DataFrame
    platforms: pd.DataFrame


@dataclasses.dataclass(frozen=True)
class Plan:
    """One experiment: who observes what, when, and how the filter is tuned."""

    train: OsseConfig
    test: OsseConfig
    protocol: VerificationConfig
    baselines: globe.GlobeConfig
    filter: letkf.LetkfConfig
    candidates: tuple[dict[str, float], ...]  # changes of the filter tried on a stretch of the training run
    tuning_start: int  # day of the training run
    tuning_days: int


def full() -> Plan:
    """180 days to learn from, 40 of another seed to forecast; the imager is left out, the satellites are thinned."""
    preset = osse_global.t21()
    assert preset.radiosondes is not None
    system = dataclasses.replace(
        preset,
        radiosondes=dataclasses.replace(preset.radiosondes, humidity=False),
        sounders=tuple(dataclasses.replace(sounder, cadence_seconds=128) for sounder in preset.sounders),
        imagers=(),
        scatterometers=tuple(dataclasses.replace(one, cadence_seconds=120) for one in preset.scatterometers),
    )
    nature = dataclasses.replace(preset.nature, days=180, moisture=False)
    later = dataclasses.replace(nature, days=40, seed=1, start="2001-01-01T00:00")
    model = dataclasses.replace(nature, truncation=15, seed=7)
    return Plan(
        train=dataclasses.replace(system, nature=nature),
        test=dataclasses.replace(system, nature=later),
        protocol=VerificationConfig(warm_up_hours=240),
        baselines=globe.GlobeConfig(),
        filter=letkf.LetkfConfig(model=model, ensemble_forecast=True),
        candidates=({}, {"radius_km": 1500.0}, {"additive": 0.25}),
        tuning_start=120,
        tuning_days=10,
    )


def tiny() -> Plan:
    """Days from rest, few instruments: seconds. It shows that everything runs and nothing else."""
    preset = osse_global.tiny()
    assert preset.radiosondes is not None
    system = dataclasses.replace(
        preset,
        radiosondes=dataclasses.replace(preset.radiosondes, humidity=False),
        imagers=(),
        sounders=preset.sounders[:1],
    )
    nature = dataclasses.replace(preset.nature, days=6, moisture=False)
    later = dataclasses.replace(nature, days=3, seed=1, start="2001-01-01T00:00")
    model = dataclasses.replace(nature, truncation=15, seed=7, spin_up_days=2)
    kernel = globe.Kernel()
    return Plan(
        train=dataclasses.replace(system, nature=nature),
        test=dataclasses.replace(system, nature=later),
        protocol=VerificationConfig(warm_up_hours=24, leads=(6, 12, 24)),
        baselines=globe.GlobeConfig(
            tuning_times=0,
            damping_times=4,
            kernels=(kernel, kernel, kernel),
            grid=(4, 8),
            waves=2,
            components=(2,),
            penalties=(0.1,),
            leads=(6, 12, 24),
        ),
        filter=letkf.LetkfConfig(model=model, members=4, member_days=1, neighbours=64),
        candidates=({},),
        tuning_start=3,
        tuning_days=1,
    )


def observe(config: OsseConfig, cache: pathlib.Path, *, days: slice | None = None, progress: bool = True) -> World:
    """`earth.osse.simulate`, instrument by instrument, so that 180 days fit into memory; `days` cuts the run first."""
    run = nature_run(config.nature, cache=cache, progress=progress)
    if days is not None:
        steps = 24 // config.nature.save_hours
        run = run.isel(time=slice(days.start * steps, days.stop * steps + 1))
    truth = truth_from_dataset(run)
    parts, platforms = [], []
    for look, instrument in config.instruments:
        seen = look(truth, instrument, config.seed)
        parts.append(seen.table.astype(dict.fromkeys(TEXT, "category")))
        platforms.append(seen.platforms)
    table = pd.DataFrame(
        {
            name: union_categoricals([part[name] for part in parts])
            if name in TEXT
            else np.concatenate([part[name].to_numpy() for part in parts])
            for name in parts[0].columns
        }
    )
    order = np.argsort(table["time"].to_numpy(), kind="stable")
    return World(truth, table.iloc[order].reset_index(drop=True), pd.concat(platforms, ignore_index=True))


def tune_filter(plan: Plan, cache: pathlib.Path, held: tuple[str, ...]) -> tuple[letkf.LetkfConfig, pd.DataFrame]:
    """The candidate of the smallest departures of in situ reports from six-hour forecasts, on a stretch of the training
    run, and the table of all.
    """
    stretch = slice(plan.tuning_start, plan.tuning_start + plan.tuning_days)
    world = observe(plan.train, cache, days=stretch)
    given = given_table(world.table, held)
    start, end = world.truth.start, world.truth.end
    members = letkf.climate_members(plan.filter, cache=cache)
    core = dynamical_core(plan.filter.model)
    rows: list[dict[str, Any]] = []
    for change in plan.candidates:
        cfg = dataclasses.replace(plan.filter, **change)
        result = letkf.assimilate(
            given, start, np.array([end]), members, cfg, radiometers=plan.train.sounders, core=core
        ).diagnostics
        late = result[(result["time"] > start + (end - start) // 2) & (result["n"] > 0)]
        score_ = np.sqrt(np.average((late["rms"] / late["error"]) ** 2, weights=late["n"]))
        rows.append({**change, "departure": float(score_)})
    table = pd.DataFrame(rows)
    best = plan.candidates[int(table["departure"].argmin())]
    return dataclasses.replace(plan.filter, **best), table


def figure(scores: pd.DataFrame) -> Figure:
    """RMSE against lead, one panel per group and variable, a line per model, a band of the interval for the first."""
    models = list(dict.fromkeys(scores["model"]))
    panels: Any = list(scores.groupby(["group", "variable"], sort=False))
    with matplotlib.rc_context(STYLE):
        out = Figure(figsize=(11, 5.6), layout="constrained")
        axes = out.subplots(2, 4).ravel()
        for axis, ((group, variable), part) in zip(axes, panels, strict=False):
            for i, model in enumerate(models):
                line = part[part["model"] == model]
                hectopascal = 0.01 if variable == "surface_pressure" else 1.0
                axis.plot(
                    line["lead_time"],
                    line["rmse"] * hectopascal,
                    color=PALETTE[i],
                    marker=MARKERS[i],
                    ms=4,
                    label=model,
                )
                axis.fill_between(
                    line["lead_time"],
                    line["rmse_lo"] * hectopascal,
                    line["rmse_hi"] * hectopascal,
                    color=PALETTE[i],
                    alpha=0.12,
                    lw=0,
                )
            axis.set(ylim=(0, None), title=f"{group}: {LABELS.get(variable, variable)}")
            axis.set_xticks(sorted(set(part["lead_time"])))
            axis.tick_params(axis="x", labelrotation=60)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis in axes[4:]:
            axis.set_xlabel("lead (h)")
        for axis in axes[::4]:
            axis.set_ylabel("RMSE against the truth")
        handles, labels = axes[0].get_legend_handles_labels()
        out.legend(handles, labels, loc="outside lower center", ncols=6)
    return out


LABELS = {
    "lowest_level_temperature": "temperature (K)",
    "lowest_level_u_component_of_wind": "u (m s⁻¹)",
    "lowest_level_v_component_of_wind": "v (m s⁻¹)",
    "surface_pressure": "pressure (hPa)",
    "temperature": "temperature (K)",
    "u_component_of_wind": "u (m s⁻¹)",
    "v_component_of_wind": "v (m s⁻¹)",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="days from rest: seconds, and no weather")
    parser.add_argument("--cache", type=pathlib.Path, help="folder of nature runs; OUT/nature if not given")
    parser.add_argument("--no-filter", action="store_true", help="leave the Kalman filter out")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    cache = given.out / "nature" if given.cache is None else given.cache
    plan = tiny() if given.tiny else full()
    clock = time.perf_counter()

    def took(what: str) -> None:
        nonlocal clock
        print(f"{what}: {time.perf_counter() - clock:.0f} s", flush=True)
        clock = time.perf_counter()

    train = observe(dataclasses.replace(plan.train, sounders=()), cache)
    held = held_out_platforms(train.platforms, plan.protocol)
    took("training reports")
    fitted = globe.fit_globe(given_table(train.table, held), plan.baselines)
    del train
    took("baselines")
    for kind, kernel in zip(globe.KINDS, fitted.kernels, strict=True):
        print(f"- {kind}: {kernel}, left-out error {fitted.skill.get(kind, np.nan):.2f} of the anomalies'")
    print(f"- var: {fitted.chosen}")
    test = observe(plan.test, cache)
    wanted = targets(test.truth, test.platforms, held, test.table, plan.protocol)
    seen = given_table(test.table, held)
    took(f"test reports, {len(seen):,} values given, {len(wanted):,} targets")
    forecasts: dict[str, Any] = globe.forecast(fitted, seen, wanted)
    took("baselines' forecasts")
    if not given.no_filter:
        cfg, tried = tune_filter(plan, cache, held)
        print(tried.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
        took("tuning of the filter")
        core = dynamical_core(cfg.model)
        members = letkf.climate_members(cfg, cache=cache)
        inits = np.unique(wanted["init_time"].to_numpy("datetime64[ns]"))
        run = letkf.assimilate(seen, test.truth.start, inits, members, cfg, radiometers=plan.test.sounders, core=core)
        took("filter")
        forecasts["letkf"] = letkf.forecast(run.analyses, test.truth.start, wanted, cfg, core=core)
        took("filter's forecasts")
        late = run.diagnostics[run.diagnostics["time"] >= inits[0]]
        counts: Any = late.groupby(["sensor", "variable"]).agg(
            n=("n", "mean"),
            rejected=("n_rejected", "mean"),
            rms=("rms", "mean"),
            spread=("spread", "mean"),
            error=("error", "mean"),
        )
        counts.to_csv(given.out / "counts.csv")
        print(counts.to_string(float_format=lambda value: f"{value:.2f}"))
    table = score(wanted, forecasts)
    table.to_csv(given.out / "table.csv", index=False)
    statistical = [name for name in forecasts if name != "letkf"]
    over = ratios(wanted, forecasts, statistical)
    over.to_csv(given.out / "ratios.csv", index=False)
    limits = skill_limits(table)
    limits.to_csv(given.out / "limits.csv", index=False)
    figure(table).savefig(given.out / "rmse.png")
    for name, part in (("RMSE", table), ("limits", limits)):
        value = "rmse" if name == "RMSE" else "limit_hours"
        columns = ["lead_time", "model"] if name == "RMSE" else ["model"]
        shown = part.pivot_table(index=["group", "variable"], columns=columns[::-1][::-1], values=value, sort=False)
        print(f"\n{name}\n" + shown.T.to_string(float_format=lambda number: f"{number:.3g}"))
    for caveat in caveats(plan.test.nature):
        print(f"- {caveat}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
