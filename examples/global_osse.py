"""One field for every sensor of the globe, on a simulated atmosphere where truth is known: train it, forecast with it,
and verify it beside what it has to beat.

    python examples/global_osse.py --out out/global_osse                              # everything: hours
    python examples/global_osse.py --out out/global_osse --stages world --seeds 0     # one part; parts add up
    python examples/global_osse.py --out out/global_osse --tiny                       # a minute, and no weather

A run of 180 days is observed by stations, radiosondes, aircraft, ships, scatterometers and two sounders; another of 40
days and another seed is forecast (extra `osse`). Everything is verified at stations and radiosonde sites that nobody
saw. Stages:

- `world`: Earth-o1's global model (`earth.world`), trained on the reports of the first run, one model per seed;
- `baselines`: climatology, persistence, optimal interpolation and a vector autoregression (`earth.baselines.globe`);
- `filter`: an ensemble Kalman filter that owns what the others must learn, the equations, at a coarser truncation: it
  stands for an operational centre (`earth.osse.letkf`);
- `denial`: which sensor tells of which, beside the climate and a linear regression;
- `inversion`: surface pressure and temperatures of the column from radiances alone, by a head on the frozen model that
  learned from the reports of stations and sondes, beside the climate and a linear regression; and the weights over
  height that the model learned for each channel beside the instruments' own;
- `ensemble`: each model goes on learning with noise and two members; spread beside error, and the ranked probability
  score beside that of the deterministic forecast with its own spread;
- `scales`: how much of the truth's variance the model's forecasts have, by scale (mean-squared errors blur), and one
  member where `ensemble` has run.

OUT keeps each stage's forecasts and models, so that a stage that was killed goes on and one that is finished is not run
again. It receives table.csv (RMSE per model, group, variable and lead), ratios.csv (over the best statistical
baseline), limits.csv (lead at which a forecast stops beating climatology), counts.csv (what the filter read),
denial.csv, inversion.csv, ensemble.csv, scales.csv, and figures rmse.png, denial.png, weighting.png, ensemble.png,
scales.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the presets are not installed

from configs import earth_global, osse_global
from earth import verify, world
from earth.baselines import globe
from earth.export import appearing_complete
from earth.geometry import standard_height, standard_pressure
from earth.observations import to_reports
from earth.osse import OsseConfig, World, caveats, letkf, observe, query
from earth.osse.nature import dynamical_core
from earth.osse.radiation import weighting_function
from earth.osse.verification import (
    VerificationConfig,
    given_table,
    held_out_platforms,
    ratios,
    score,
    skill_limits,
    targets,
)
from earth.report import PALETTE, STYLE, skill_by_group
from earth.scales import compare_scales, even_points
from earth.world import network
from earth.world.climate import climate
from earth.world.denial import nearby_means, regress
from earth.world.model import window_end

STAGES = ("world", "baselines", "filter", "denial", "inversion", "ensemble", "scales")
SOUNDERS = ("simulated_amsua", "simulated_atms")
DENIAL = {  # rows of the matrix
    "stations": ("station",),
    "stations, sondes": ("station", "radiosonde"),
    "AMSU-A": SOUNDERS[:1],
    "ATMS": SOUNDERS[1:],
    "stations, AMSU-A": ("station", SOUNDERS[0]),
    "stations, ATMS": ("station", SOUNDERS[1]),
    "all others": ("station", "radiosonde", *SOUNDERS, "scatterometer", "aircraft", "ship"),
}
DEGREE = 21  # of the scales: the truth's own truncation
SCALES = (  # sensor, variable, pressure in Pa
    ("station", "lowest_level_temperature", None),
    ("radiosonde", "temperature", 50_000.0),
    ("radiosonde", "v_component_of_wind", 50_000.0),
)
PRODUCTS = {"station": ("surface_pressure", "lowest_level_temperature"), "radiosonde": ("temperature",)}
PREDICTED = ("station", "radiosonde", *SOUNDERS, "aircraft")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One experiment: who observes what, when, and how everybody is set up."""

    train: OsseConfig
    test: OsseConfig
    protocol: VerificationConfig
    model: world.WorldConfig
    training: world.TrainConfig
    ensemble: world.TrainConfig  # goes on from there
    members: int
    cycles: int  # windows of an analysis, as many as the last stage trains with
    reports: float  # of a window when forecasting, over those of training
    baselines: globe.GlobeConfig
    filter: letkf.LetkfConfig
    candidates: tuple[dict[str, float], ...]  # changes of the filter tried on a stretch of the training run
    tuning_start: int  # day of the training run
    tuning_days: int


def full() -> Plan:
    """180 days to learn from, 40 of another seed to forecast."""
    train, test = osse_global.benchmark()
    model = dataclasses.replace(train.nature, truncation=15, seed=7)
    return Plan(
        train=train,
        test=test,
        protocol=VerificationConfig(warm_up_hours=240),
        model=earth_global.benchmark(),
        training=earth_global.training(),
        ensemble=earth_global.ensemble_training(),
        members=10,
        cycles=6,
        reports=3.0,
        baselines=globe.GlobeConfig(),
        filter=letkf.LetkfConfig(model=model, ensemble_forecast=True),
        candidates=({}, {"radius_km": 1500.0}, {"additive": 0.25}),
        tuning_start=120,
        tuning_days=10,
    )


def tiny() -> Plan:
    """Days from rest, few instruments: it shows that everything runs and nothing else."""
    train, test = osse_global.benchmark_tiny()
    kernel = globe.Kernel()
    return Plan(
        train=train,
        test=test,
        protocol=VerificationConfig(warm_up_hours=24, leads=(6, 12, 24)),
        model=earth_global.benchmark_tiny(),
        training=world.TrainConfig((world.StageConfig("short", 4, cycles=2, leads=1),), checkpoint_every=2),
        ensemble=world.TrainConfig((world.StageConfig("members", 2, cycles=2, leads=1, members=2),)),
        members=3,
        cycles=2,
        reports=1.0,
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
        filter=letkf.LetkfConfig(
            model=dataclasses.replace(train.nature, truncation=15, seed=7, spin_up_days=2),
            members=4,
            member_days=1,
            neighbours=64,
        ),
        candidates=({},),
        tuning_start=3,
        tuning_days=1,
    )


class Experiment(NamedTuple):
    """A plan, the runs' reports as they are asked for, and where results go."""

    plan: Plan
    out: pathlib.Path
    cache: pathlib.Path
    seeds: tuple[int, ...]
    held: tuple[str, ...]  # platforms that nobody may read
    runs: dict[str, World]

    def run(self, name: str) -> World:
        if name not in self.runs:
            self.runs[name] = observe(getattr(self.plan, name), cache=self.cache)
        return self.runs[name]

    def reports(self, name: str) -> dict[str, Any]:
        """{sensor: reports} of a run that the model may read; the run's table, gigabytes, is let go."""
        given = to_reports(given_table(self.run(name).table, self.held))
        del self.runs[name]
        return given


def keep(path: pathlib.Path, forecasts: dict[str, Any]) -> None:
    with appearing_complete(path, overwrite=True) as temporary:
        pd.DataFrame(forecasts).to_parquet(temporary)


# ---- the global model
def fit_world(experiment: Experiment, seed: int, known: dict[str, Any]) -> world.Params:
    """Trains one model, or goes on, or reads it; `known` keeps the closed-form part and the records."""
    fitted, record = fit_parts(experiment, known)
    config = dataclasses.replace(experiment.plan.training, seed=seed)
    return world.train((record,), fitted, experiment.plan.model, config, experiment.out / f"world-{seed}")


def fit_parts(experiment: Experiment, known: dict[str, Any]) -> tuple[world.Fitted, world.Record]:
    """What all seeds share: normals, anchors and the training record."""
    model = experiment.plan.model
    if "fitted" not in known:
        reports = experiment.reports("train")
        fitted = world.fit(reports, model, statics=earth_global.statics)
        known["fitted"] = fitted
        known["train"] = world.Record(reports, model.sensors, model.field, fitted.anchors, fitted.normals, model.step)
    return known["fitted"], known["train"]


def test_record(experiment: Experiment, known: dict[str, Any]) -> world.Record:
    if "test" not in known:
        model, fitted = experiment.plan.model, known["fitted"]
        known["test"] = world.Record(
            experiment.reports("test"), model.sensors, model.field, fitted.anchors, fitted.normals, model.step
        )
    return known["test"]


def tokens(plan: Plan) -> dict[str, int]:
    return {s.sensor: round(s.tokens * plan.reports) for s in plan.model.sensors}


def forecast_world(experiment: Experiment, wanted: pd.DataFrame) -> None:
    plan, known = experiment.plan, {}
    for seed in experiment.seeds:
        path = experiment.out / f"forecasts-world-{seed}.parquet"
        if path.exists():
            continue
        params = fit_world(experiment, seed, known)
        record = test_record(experiment, known)
        mean, sd = world.forecast(params, record, wanted, cycles=plan.cycles, cfg=plan.model, tokens=tokens(plan))
        keep(path, {f"world_{seed}": mean, f"spread_{seed}": sd})


def deny(experiment: Experiment) -> None:
    """The matrix of each seed's model."""
    plan, known = experiment.plan, {}
    parts = []
    for seed in experiment.seeds:
        path = experiment.out / f"denial-{seed}.csv"
        if not path.exists():
            params = fit_world(experiment, seed, known)
            names = {s.sensor for s in plan.model.sensors}
            given = {row: [s for s in sensors if s in names] for row, sensors in DENIAL.items()}
            test, train = test_record(experiment, known), known["train"]
            matrix = world.denial_matrix(
                params, test, ends(test, 40), train, ends(train, 60), cfg=plan.model,
                given={row: sensors for row, sensors in given.items() if sensors},
                predicted=[name for name in PREDICTED if name in names],
            )  # fmt: skip
            with appearing_complete(path, overwrite=True) as temporary:
                matrix.to_csv(temporary, index=False)
        parts.append(pd.read_csv(path).assign(seed=seed))
    table = pd.concat(parts, ignore_index=True)
    table.to_csv(experiment.out / "denial.csv", index=False)
    denial_figure(table).savefig(experiment.out / "denial.png")


# ---- products from radiances alone
def products(experiment: Experiment, name: str, times: np.ndarray, held: bool) -> pd.DataFrame:
    """Rows of time, place, sensor, variable, product (with its level), truth and the platform's own report: at stations
    and radiosonde sites of a run, those that nobody may read or the others.
    """
    run, protocol = experiment.run(name), experiment.plan.protocol
    own: Any = run.platforms["platform"][run.platforms["sensor"].isin(list(PRODUCTS))]
    platforms = experiment.held if held else tuple(set(own) - set(experiment.held))
    cfg = dataclasses.replace(
        protocol, leads=(12,), station_variables=PRODUCTS["station"], sonde_variables=PRODUCTS["radiosonde"]
    )
    made = targets(run.truth, run.platforms, platforms, run.table, cfg, inits=times - np.timedelta64(12, "h"))
    level = made["pressure"].to_numpy(float)
    at = np.where(np.isfinite(level), standard_height(np.nan_to_num(level, nan=101_325.0)), made["height"])
    labels = [f"{p / 100:.0f} hPa" if np.isfinite(p) else "ground" for p in level]
    product = made["variable"].str.removeprefix("lowest_level_") + ", " + labels
    return made.assign(time=made["valid_time"], height=at, product=product)


def usual(fitted: world.Fitted, rows: pd.DataFrame, cfg: world.WorldConfig) -> np.ndarray:
    """The normal of every row."""
    out = np.full(len(rows), np.nan)
    place = rows[["latitude", "longitude", "height"]].to_numpy(np.float32)
    groups: Any = rows.groupby(["time", "group"]).indices
    for (valid, sensor), index in groups.items():
        nadir, end = np.zeros(len(index), np.float32), window_end(seconds(valid))
        latitude, longitude, height = place[index].T
        mean, _ = climate(fitted.normals[sensor], latitude, longitude, height, nadir, end)
        columns = cfg.sensor(sensor).variables
        which = np.array([columns.index(v) for v in rows["variable"].to_numpy()[index]])
        out[index] = np.asarray(mean)[np.arange(len(index)), which]
    return out


def radiances_nearby(record: world.Record, rows: pd.DataFrame) -> np.ndarray:
    """Features of the regression for every row: the sounders' reports around it in the last window."""
    sounders = [s.sensor for s in record.sensors if s.sensor in SOUNDERS]
    parts, order = [], []
    for valid, index in rows.groupby("time").indices.items():
        window = record.window(seconds(valid), np.random.default_rng(0))
        latitude, longitude = rows[["latitude", "longitude"]].to_numpy(float)[index].T
        parts.append(nearby_means(record, window, sounders, latitude, longitude))
        order.append(index)
    out = np.concatenate(parts)
    out[np.concatenate(order)] = out.copy()
    return out


def seconds(time: Any) -> int:
    return int(np.datetime64(time, "s").astype(np.int64))


def invert_radiances(experiment: Experiment, wanted: pd.DataFrame) -> None:
    """Heads learn departures from the normals where stations and sondes report, and are verified with the truth where
    nobody does, on every second initial time of the test run.
    """
    plan, known = experiment.plan, dict[str, Any]()
    given = {s.sensor: s.sensor in SOUNDERS for s in plan.model.sensors}
    times = np.unique(wanted["init_time"].to_numpy("datetime64[s]"))[::2]
    parts = []
    for seed in experiment.seeds:
        path = experiment.out / f"inversion-{seed}.csv"
        if not path.exists():
            if not known:
                run: Any = experiment.run("train").truth
                first, last = (np.datetime64(t, "s") for t in (run.start, run.end))
                step = np.timedelta64(round(plan.model.step), "h")
                every = np.arange(first + plan.cycles * step, last, step)
                past = every[np.unique(np.linspace(0, len(every) - 1, 120).astype(int))]
                known["learn"] = products(experiment, "train", past, held=False)
                known["ask"] = products(experiment, "test", times, held=True)
                fitted, record = fit_parts(experiment, known)
                for name in ("learn", "ask"):
                    known[name]["usual"] = usual(fitted, known[name], plan.model)
                learn: Any = known["learn"]
                names = list(dict.fromkeys(learn["product"]))
                departure = learn["observation"] - learn["usual"]
                wide = learn.assign(**{n: departure.where(learn["product"] == n) for n in names})
                known |= {
                    "names": names,
                    "wide": wide,
                    "regression": regress(radiances_nearby(record, learn), wide[names].to_numpy(), 1e-2),
                }
            params = fit_world(experiment, seed, known)
            icfg = world.InversionConfig(cycles=plan.cycles, seed=seed)
            head = world.fit_inversion(
                params, known["train"], known["wide"], known["names"], cfg=plan.model, icfg=icfg, given=given,
                tokens=tokens(plan),
            )  # fmt: skip
            record, ask = test_record(experiment, known), known["ask"]
            which = np.array([known["names"].index(p) for p in ask["product"]])
            each = np.arange(len(ask))
            linear = (radiances_nearby(record, ask) @ known["regression"])[each, which]
            ours = np.zeros(len(ask))
            place = ask[["latitude", "longitude", "height"]].to_numpy(float)
            for valid, index in ask.groupby("time").indices.items():
                state = world.analyse(
                    params, record, valid, cycles=plan.cycles, cfg=plan.model, given=given, tokens=tokens(plan)
                )
                q = world.queries(plan.model, params.fitted.anchors, "station", *place[index].T)
                mean, _ = world.invert(params, head, state, q, cfg=plan.model)
                ours[index] = np.asarray(mean)[np.arange(len(index)), which[index]]
            truth: Any = ask["truth"] - ask["usual"]
            squares = pd.DataFrame(
                {"rmse": (ours - truth) ** 2, "rmse_climate": truth**2, "rmse_regression": (linear - truth) ** 2}
            )
            table: Any = np.sqrt(squares.groupby(ask["product"], sort=False).mean()).reset_index()
            table["ratio"] = table["rmse"] / table[["rmse_climate", "rmse_regression"]].min(axis=1)
            with appearing_complete(path, overwrite=True) as temporary:
                table.to_csv(temporary, index=False)
            with appearing_complete(experiment.out / "weighting.png", overwrite=True) as temporary:
                weighting_figure(plan, params).savefig(temporary, format="png")
        parts.append(pd.read_csv(path).assign(seed=seed))
    table = pd.concat(parts, ignore_index=True)
    with appearing_complete(experiment.out / "inversion.csv", overwrite=True) as temporary:
        table.to_csv(temporary, index=False)
    columns = ["rmse", "rmse_climate", "rmse_regression", "ratio"]
    print(table.groupby("product", sort=False)[columns].mean().to_string(float_format=lambda number: f"{number:.3g}"))


def weighting_figure(plan: Plan, params: world.Params) -> Figure:
    """Weights per ln p at nadir that the model learned for each channel, and the instruments' own."""
    lengths = np.asarray(plan.model.network.heights)
    pressure = standard_pressure(lengths)
    depth = np.abs(np.gradient(np.log(pressure)))
    fine = np.geomspace(2e3, 1e5, 200)
    sounders = {s.sensor: s for s in plan.train.sounders}
    configured = [s for s in plan.model.sensors if s.sensor in sounders]
    with matplotlib.rc_context(STYLE):
        out = Figure(figsize=(8, 3.6), layout="constrained")
        for axis, s in zip(out.subplots(1, len(configured), squeeze=False)[0], configured, strict=True):
            sense: Any = params.network.senses[s.sensor]
            learned = np.asarray(network.weighting(sense.form, s, np.zeros(1), cfg=plan.model.network))[0] / depth
            channels = {c.channel.number: c for c in sounders[s.sensor].channels}
            for variable, curve, colour in zip(s.variables, learned, PALETTE, strict=False):
                channel = channels[int(variable.split(":")[1])]
                label = f"{channel.channel.frequency:.1f} GHz"
                axis.plot(curve, pressure / 100, color=colour, marker="o", ms=2.5, label=label)
                own = weighting_function((channel,), fine, np.zeros(()))[0]
                axis.plot(own, fine / 100, color=colour, ls="--", lw=0.9)
            axis.set(yscale="log", ylim=(1000, 20), xlim=(0, None), xlabel="weight per ln p at nadir", title=s.sensor)
            axis.set_yticks([1000, 500, 200, 100, 50, 20], labels=["1000", "500", "200", "100", "50", "20"])
            axis.minorticks_off()
            axis.legend(fontsize=6.5, title="— learned  - - instrument")
        out.axes[0].set_ylabel("hPa")
    return out


def fit_members(experiment: Experiment, seed: int, known: dict[str, Any]) -> world.Params:
    """One model that has learned to be an ensemble."""
    plan, start = experiment.plan, fit_world(experiment, seed, known)
    config = dataclasses.replace(plan.ensemble, seed=seed)
    directory = experiment.out / f"members-{seed}"
    return world.train((known["train"],), start.fitted, plan.model, config, directory, start=start.network)


def measure_ensemble(experiment: Experiment, wanted: pd.DataFrame) -> None:
    """Spread and error of the ensemble's mean; ranked probability scores of members and of the deterministic forecast.
    Every third initial time.
    """
    plan, known = experiment.plan, dict[str, Any]()
    inits = np.unique(wanted["init_time"])[::3]
    asked: Any = wanted[wanted["init_time"].isin(list(inits))].reset_index(drop=True)
    parts = []
    for seed in experiment.seeds:
        path = experiment.out / f"members-{seed}.parquet"
        if not path.exists():
            params = fit_members(experiment, seed, known)
            options = {"cycles": plan.cycles, "cfg": plan.model, "tokens": tokens(plan)}
            record = test_record(experiment, known)
            alone = world.forecast(fit_world(experiment, seed, known), record, asked, **options)
            members = world.ensemble(params, record, asked, members=plan.members, **options)
            columns = {f"member_{i}": x for i, x in enumerate(members.T)}
            keep(path, {"mean": alone[0], "spread": alone[1], **columns})
        made: Any = pd.read_parquet(path)
        members = made.filter(like="member_").to_numpy()
        truth = asked["truth"].to_numpy()
        parts.append(
            asked[["group", "variable", "lead_time"]].assign(
                seed=seed,
                crps=verify.crps_ensemble(members, truth, axis=1),
                crps_deterministic=verify.crps_gaussian(made["mean"], made["spread"], truth),
                square=(members.mean(1) - truth) ** 2,
                square_deterministic=(made["mean"] - truth) ** 2,
                # of M members: unbiased, and as the error of a mean of M (Fortin et al. 2014)
                variance=members.var(1, ddof=1) * (1 + 1 / plan.members),
            )
        )
    keys = ["group", "variable", "lead_time", "seed"]
    mean: Any = pd.concat(parts).groupby(keys, sort=False).mean()
    table = pd.DataFrame(
        {
            "rmse": np.sqrt(mean["square"]),
            "rmse_deterministic": np.sqrt(mean["square_deterministic"]),
            "spread": np.sqrt(mean["variance"]),
            "crps": mean["crps"],
            "crps_deterministic": mean["crps_deterministic"],
        }
    ).reset_index()
    with appearing_complete(experiment.out / "ensemble.csv", overwrite=True) as temporary:
        table.to_csv(temporary, index=False)
    table["spread / error"] = table["spread"] / table["rmse"]
    print(table.pivot_table(index=["group", "variable"], columns="lead_time", values="spread / error", sort=False))
    spread_figure(table).savefig(experiment.out / "ensemble.png")


def measure_scales(experiment: Experiment, wanted: pd.DataFrame) -> None:
    """Spectra of departures from the normal, forecast and true, at every lead that is whole steps."""
    plan, known = experiment.plan, dict[str, Any]()
    truth: Any = experiment.run("test").truth
    latitude, longitude = even_points(DEGREE)
    ground = query(truth, ["surface_altitude"], truth.start, latitude, longitude)["surface_altitude"]
    inits = np.unique(wanted["init_time"].to_numpy("datetime64[s]"))[::5]
    ahead = [0, *(lead for lead in plan.protocol.leads if lead % plan.model.step == 0)]
    parts = []
    for seed in experiment.seeds:
        models: list[tuple[str, world.Params, Any]] = [("deterministic", fit_world(experiment, seed, known), None)]
        if (experiment.out / f"members-{seed}").exists():
            models.append(("one member", fit_members(experiment, seed, known), jax.random.key(seed)))
        record = test_record(experiment, known)
        for name, params, key in models:
            found: dict[Any, list[Any]] = {}
            for init in inits:
                state = world.analyse(
                    params, record, init, cycles=plan.cycles, cfg=plan.model, tokens=tokens(plan), key=key
                )
                for before, lead in itertools.pairwise([0, *ahead]):
                    state = world.advance(
                        params, state, round((lead - before) / plan.model.step), cfg=plan.model, key=key
                    )
                    for sensor, variable, pressure in SCALES:
                        height = ground if pressure is None else standard_height(np.full(len(latitude), pressure))
                        read, _, usual = world.sample(
                            params, state, sensor, latitude, longitude, height, cfg=plan.model
                        )
                        column = plan.model.sensor(sensor).variables.index(variable)
                        level = {} if pressure is None else {"pressure": pressure}
                        valid = init + np.timedelta64(lead, "h")
                        exact = query(truth, [variable], valid, latitude, longitude, **level)[variable]
                        pair = np.stack([read[:, column], exact]) - usual[:, column]
                        found.setdefault((variable, pressure, lead), []).append(pair)
            for (variable, pressure, lead), pairs in found.items():
                made, exact = np.stack(pairs, 1)
                labels = {"seed": seed, "model": name, "variable": variable, "pressure": pressure, "lead_time": lead}
                spectra = compare_scales(made, exact, latitude, longitude, DEGREE)
                parts.append(pd.DataFrame(spectra).assign(degree=np.arange(DEGREE + 1), **labels))
    table = pd.concat(parts, ignore_index=True)
    with appearing_complete(experiment.out / "scales.csv", overwrite=True) as temporary:
        table.to_csv(temporary, index=False)
    scales_figure(table).savefig(experiment.out / "scales.png")


def ends(record: world.Record, count: int) -> np.ndarray:
    """Ends of so many windows of a record, evenly spread."""
    first, last = (np.datetime64(second, "s").astype("datetime64[h]") for second in record.span)
    first = first + np.timedelta64(round(record.step), "h")
    return np.arange(first, last, max((last - first) // count, np.timedelta64(1, "h")))


# ---- what it has to beat
def forecast_baselines(experiment: Experiment, wanted: pd.DataFrame) -> None:
    path = experiment.out / "forecasts-baselines.parquet"
    if path.exists():
        return
    plan = experiment.plan
    table = experiment.run("train").table
    table = table.loc[~table["sensor"].isin(list(SOUNDERS))]  # they read no radiances
    fitted = globe.fit_globe(given_table(table, experiment.held), plan.baselines)
    for kind, kernel in zip(globe.KINDS, fitted.kernels, strict=True):
        print(f"- {kind}: {kernel}, left-out error {fitted.skill.get(kind, np.nan):.2f} of the anomalies'")
    print(f"- var: {fitted.chosen}")
    keep(path, globe.forecast(fitted, given_table(experiment.run("test").table, experiment.held), wanted))


def tune_filter(experiment: Experiment) -> tuple[letkf.LetkfConfig, pd.DataFrame]:
    """The candidate of the smallest departures of in situ reports from six-hour forecasts, on a stretch of the training
    run, and the table of all.
    """
    plan = experiment.plan
    stretch = slice(plan.tuning_start, plan.tuning_start + plan.tuning_days)
    cut = observe(plan.train, cache=experiment.cache, days=stretch)
    given = given_table(cut.table, experiment.held)
    start, end = cut.truth.start, cut.truth.end
    members = letkf.climate_members(plan.filter, cache=experiment.cache)
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


def forecast_filter(experiment: Experiment, wanted: pd.DataFrame) -> None:
    path = experiment.out / "forecasts-filter.parquet"
    if path.exists():
        return
    plan, test = experiment.plan, experiment.run("test")
    cfg, tried = tune_filter(experiment)
    print(tried.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    core = dynamical_core(cfg.model)
    members = letkf.climate_members(cfg, cache=experiment.cache)
    inits = np.unique(wanted["init_time"].to_numpy("datetime64[ns]"))
    seen = given_table(test.table, experiment.held)
    run = letkf.assimilate(seen, test.truth.start, inits, members, cfg, radiometers=plan.test.sounders, core=core)
    late = run.diagnostics[run.diagnostics["time"] >= inits[0]]
    counts: Any = late.groupby(["sensor", "variable"]).agg(
        n=("n", "mean"),
        rejected=("n_rejected", "mean"),
        rms=("rms", "mean"),
        spread=("spread", "mean"),
        error=("error", "mean"),
    )
    counts.to_csv(experiment.out / "counts.csv")
    keep(path, {"letkf": letkf.forecast(run.analyses, test.truth.start, wanted, cfg, core=core)})


# ---- tables and figures
def report(experiment: Experiment, wanted: pd.DataFrame) -> None:
    """Scores whatever forecasts there are."""
    forecasts: dict[str, Any] = {}
    for path in sorted(experiment.out.glob("forecasts-*.parquet")):
        frame = pd.read_parquet(path)
        forecasts |= {str(name): frame[name].to_numpy() for name in frame if not str(name).startswith("spread")}
    if not forecasts:
        return
    table = score(wanted, forecasts)
    table.to_csv(experiment.out / "table.csv", index=False)
    skill_by_group(table).savefig(experiment.out / "rmse.png")
    statistical = [name for name in globe.MODELS if name in forecasts]
    parts = [("RMSE", table, "rmse", ["lead_time", "model"])]
    if statistical:
        over = ratios(wanted, forecasts, statistical)
        over.to_csv(experiment.out / "ratios.csv", index=False)
        learned: Any = over[~over["model"].isin(statistical)]
        parts.append(("over the best statistical baseline", learned, "ratio", ["lead_time", "model"]))
        limits = skill_limits(table)
        limits.to_csv(experiment.out / "limits.csv", index=False)
        parts.append(("limits", limits, "limit_hours", ["model"]))
    for name, part, value, columns in parts:
        shown = part.pivot_table(index=["group", "variable"], columns=columns, values=value, sort=False)
        print(f"\n{name}\n" + shown.T.to_string(float_format=lambda number: f"{number:.3g}"))
    for caveat in caveats(experiment.plan.test.nature):
        print(f"- {caveat}")


def denial_figure(table: pd.DataFrame) -> Figure:
    """Each cell: error over the better of climate and regression, mean over the sensor's variables and the seeds."""
    mean = table.pivot_table(index="given", columns="predicted", values="ratio", sort=False)
    with matplotlib.rc_context(STYLE):
        out = Figure(figsize=(6.4, 3.6), layout="constrained")
        axis = out.subplots()
        image = axis.imshow(mean.to_numpy(), vmin=0.5, vmax=1.5, cmap="RdBu_r", aspect="auto")
        for (i, j), value in np.ndenumerate(mean.to_numpy()):
            if np.isfinite(value):
                axis.text(j, i, f"{value:.2f}", ha="center", va="center")
        axis.set_xticks(range(mean.shape[1]), [str(name).replace("simulated_", "") for name in mean.columns])
        axis.set_yticks(range(mean.shape[0]), list(mean.index))
        axis.set(xlabel="predicted", ylabel="given")
        axis.grid(visible=False)
        out.colorbar(image, label="error over the better of\nclimate and linear regression")
    return out


def scales_figure(table: pd.DataFrame) -> Figure:
    """Variance of forecasts over the truth's by degree: rows of models, columns of variables, a line per lead; over all
    seeds.
    """
    names = [str(name) for name in dict.fromkeys(table["model"])]
    columns = list(dict.fromkeys(zip(table["variable"], table["pressure"].fillna(0.0), strict=True)))
    leads = sorted(set(table["lead_time"]))
    with matplotlib.rc_context(STYLE):
        out = Figure(figsize=(3.4 * len(columns), 0.5 + 2.6 * len(names)), layout="constrained")
        axes = out.subplots(len(names), len(columns), sharex=True, sharey=True, squeeze=False)
        for (i, name), (j, (variable, pressure)) in itertools.product(enumerate(names), enumerate(columns)):
            axis: Any = axes[i, j]
            own: Any = table[(table["model"] == name) & (table["variable"] == variable)]
            own = own[own["pressure"].fillna(0.0) == pressure]
            for k, lead in enumerate(leads):
                mean = own[own["lead_time"] == lead].groupby("degree")[["forecast", "truth"]].mean()
                colour = matplotlib.colormaps["viridis"](k / max(len(leads) - 1, 1))
                axis.plot(mean.index, mean["forecast"] / mean["truth"], color=colour, label=f"{lead} h")
            place = f"{pressure / 100:g} hPa" if pressure else "ground"
            short = variable.removeprefix("lowest_level_").replace("_component_of_wind", "-wind")
            axis.set(title=f"{name}: {short}, {place}", ylim=(0, 1.5))
            axis.axhline(1.0, color="black", lw=0.8)
        for axis in axes[-1]:
            axis.set_xlabel("degree of spherical harmonic")
        for axis in axes[:, 0]:
            axis.set_ylabel("variance over the truth's")
        axes[0, 0].legend(title="lead", ncols=2)
    return out


def spread_figure(table: pd.DataFrame) -> Figure:
    """Spread of the members beside the error of their mean by lead, a panel per group and variable."""
    panels: Any = list(table.groupby(["group", "variable"], sort=False))
    with matplotlib.rc_context(STYLE):
        out = Figure(figsize=(11, 5.2), layout="constrained")
        axes = out.subplots(2, 4).ravel()
        for axis, ((group, variable), part) in zip(axes, panels, strict=False):
            factor = 0.01 if variable == "surface_pressure" else 1.0
            mean = part.groupby("lead_time")[["rmse", "spread", "rmse_deterministic"]].mean() * factor
            axis.plot(mean.index, mean["rmse"], color=PALETTE[0], marker="o", ms=4, label="error of the members' mean")
            axis.plot(mean.index, mean["spread"], color=PALETTE[1], marker="s", ms=4, label="spread of the members")
            axis.plot(mean.index, mean["rmse_deterministic"], color=PALETTE[6], ls="--", label="deterministic error")
            short = variable.removeprefix("lowest_level_").replace("_component_of_wind", "")
            unit = "hPa" if "pressure" in variable else "K" if "temp" in variable else "m s⁻¹"
            axis.set(title=f"{group}: {short} ({unit})", ylim=(0, None), xlabel="lead time (h)")
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        handles, labels = axes[0].get_legend_handles_labels()
        out.legend(handles, labels, loc="outside lower center", ncols=3)
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="days from rest: a minute, and no weather")
    parser.add_argument("--cache", type=pathlib.Path, help="folder of nature runs; OUT/nature if not given")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the global model")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(
        plan=tiny() if given.tiny else full(),
        out=given.out,
        cache=given.out / "nature" if given.cache is None else given.cache,
        seeds=tuple(given.seeds),
        held=(),
        runs={},
    )
    stated = given.out / "plan.txt"  # what is kept in OUT belongs to one plan
    if stated.exists() and stated.read_text() != repr(experiment.plan):
        print(f"{given.out} holds the results of another plan ({stated}); choose another --out", file=sys.stderr)
        return 2
    with appearing_complete(stated, overwrite=True) as temporary:
        temporary.write_text(repr(experiment.plan))
    test = experiment.run("test")
    experiment = experiment._replace(held=held_out_platforms(test.platforms, experiment.plan.protocol))
    wanted = targets(test.truth, test.platforms, experiment.held, test.table, experiment.plan.protocol)
    stages = {
        "world": lambda: forecast_world(experiment, wanted),
        "baselines": lambda: forecast_baselines(experiment, wanted),
        "filter": lambda: forecast_filter(experiment, wanted),
        "denial": lambda: deny(experiment),
        "inversion": lambda: invert_radiances(experiment, wanted),
        "ensemble": lambda: measure_ensemble(experiment, wanted),
        "scales": lambda: measure_scales(experiment, wanted),
    }
    for name in given.stages:
        clock = time.perf_counter()
        stages[name]()
        print(f"{name}: {time.perf_counter() - clock:.0f} s", flush=True)
    report(experiment, wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
