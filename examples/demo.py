"""The main job from end to end on an embedded default, without any download: `make demo`.

    python examples/demo.py --out out/demo

Two runs of a simulated atmosphere (dinosaur-dycore, extra `osse`) are observed by stations, radiosondes, aircraft,
ships, scatterometers and two sounders. From the reports of the first a model is trained (`earth.world`); it forecasts
the second: at stations and sites that nobody read, on maps beside the truth, and a sounder that was taken away, from
the others. OUT receives scores.csv, forecasts.parquet, the model (training/model), PNG figures and report.html.

Running it again with the same OUT starts from the finished nature runs and the last checkpoint of the training.
`examples/global_osse.py` is the same at full length, with everything tuned that it is compared with.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
import pandas as pd

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the presets are not installed

from configs import earth_demo, earth_global
from configs.earth_demo import Demo
from earth import report, world
from earth.baselines import globe
from earth.export import appearing_complete
from earth.observations import to_reports
from earth.osse import OsseConfig, Truth, brightness_temperature, caveats, observe, profiles, query
from earth.osse.verification import given_table, held_out_platforms, score, skill_limits, targets
from moe import training

HEIGHT, PRESSURE = 5500.0, 50_000.0  # of the upper-air map


def seeded(run: OsseConfig, seed: int) -> OsseConfig:
    return dataclasses.replace(run, nature=dataclasses.replace(run.nature, seed=2 * seed + run.nature.seed))


def run(demo: Demo, out: pathlib.Path, *, seed: int = 0, progress: bool = True) -> pd.DataFrame:
    """The whole demonstration; returns the table of scores.csv."""
    out.mkdir(parents=True, exist_ok=True)
    clock, begun = report.Clock(), time.perf_counter()
    with clock("simulating two atmospheres and what instruments see of them"):
        past, new = (observe(seeded(r, seed), cache=out / "nature", progress=progress) for r in (demo.train, demo.test))
        held = held_out_platforms(new.platforms, demo.protocol)
        wanted = targets(new.truth, new.platforms, held, new.table, demo.protocol)
        seen: Any = past.table.groupby("sensor", observed=True).size()
        print(f"{len(past.table):,} values to learn from: " + ", ".join(f"{n:,} of {s}" for s, n in seen.items()))
        print(f"{len(held)} stations and radiosonde sites are held out of everything")
    cfg = demo.model
    with clock("fitting normals and anchors"):
        reports = to_reports(given_table(past.table, held))
        fitted = world.fit(reports, cfg, statics=earth_global.statics)
        record = world.Record(reports, cfg.sensors, cfg.field, fitted.anchors, fitted.normals, cfg.step)
    with clock("training"):
        tcfg = dataclasses.replace(demo.training, seed=seed)
        params = world.train((record,), fitted, cfg, tcfg, out / "training", progress=progress)
    with clock("forecasting"):
        given = given_table(new.table, held)
        recent = world.Record(to_reports(given), cfg.sensors, cfg.field, fitted.anchors, fitted.normals, cfg.step)
        mean, spread = world.forecast(params, recent, wanted, cycles=demo.cycles, cfg=cfg, progress=progress)
    with clock("fitting and forecasting baselines, untuned"):
        sounders = [s.sensor for s in demo.train.sounders]
        table: Any = past.table.loc[~past.table["sensor"].isin(sounders)]
        others = globe.forecast(
            globe.fit_globe(given_table(table, held), demo.baselines, progress=progress), given, wanted
        )
        made = {"world": mean, **others}
        with appearing_complete(out / "forecasts.parquet", overwrite=True) as hidden:
            wanted.assign(**made, spread=spread).to_parquet(hidden)
    with clock("verifying"):
        scores = score(wanted, made)
        with appearing_complete(out / "scores.csv", overwrite=True) as hidden:
            scores.to_csv(hidden, index=False)
        wide = scores.pivot_table(index=["group", "variable", "lead_time"], columns="model", values="rmse", sort=False)
        limits = skill_limits(scores).pivot_table(index=["group", "variable"], columns="model", values="limit_hours")
        text = (t.to_string(float_format="{:.3g}".format) for t in (wide, limits))
        print("RMSE against the truth, SI\n{}\n\nlead (h) at which climatology is as good\n{}".format(*text))
    with clock("maps and report"):
        rows, places = maps(demo, new.truth, (params, recent), wanted)
        curve = pd.DataFrame(training.read_metrics(out / "training" / demo.training.stages[-1].name / "metrics.jsonl"))
        write(demo, out, clock, seed, (scores, wide.reset_index(), limits.reset_index()), rows, places, curve)
    print(f"\nWhat these scores cannot show: {'; '.join(caveats(demo.test.nature))}.")
    print(f"{out / 'report.html'}: {time.perf_counter() - begun:.0f} s in all")
    for phase, seconds in clock.seconds.items():
        print(f"  {seconds:6.0f} s  {phase}")
    return scores


# ---- maps
def maps(demo: Demo, truth: Truth, model: Any, wanted: pd.DataFrame) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of `earth.report.globe_maps`: departures from the normals, true and read from the field, now and later; and
    the axes. The last row is of a sounder that the analysis did not read.
    """
    params, record = model
    cfg = demo.model
    latitude = np.arange(-90 + demo.map_degrees / 2, 90, demo.map_degrees)
    longitude = np.arange(-180 + demo.map_degrees / 2, 180, demo.map_degrees)
    lat, lon = (x.ravel() for x in np.meshgrid(latitude, longitude, indexing="ij"))
    shape = (len(latitude), len(longitude))
    starts = np.unique(wanted["init_time"].to_numpy("datetime64[s]"))
    init = starts[len(starts) // 2]
    times = {"now": init, "later": init + np.timedelta64(demo.map_lead * 3600, "s")}
    ground = query(truth, ["surface_altitude"], truth.start, lat, lon)["surface_altitude"]
    sounder, channel = demo.inferred
    [other] = [s.sensor for s in demo.train.sounders if s.sensor != sounder]
    [about] = [c for s in demo.train.sounders if s.sensor == sounder for c in s.channels if c.channel.number == channel]

    def seen_from_above(when: Any) -> np.ndarray:
        return brightness_temperature((about,), *profiles(truth, "temperature", when, lat, lon), 0.0 * lat)[:, 0]

    def surface(when: Any) -> np.ndarray:
        return query(truth, ["lowest_level_temperature"], when, lat, lon)["lowest_level_temperature"]

    def upper(when: Any) -> np.ndarray:
        wind = "v_component_of_wind"
        return query(truth, [wind], when, lat, lon, pressure=PRESSURE)[wind]

    quantities = (
        ("station", "lowest_level_temperature", ground, surface, "temperature near the ground,\ndeparture (K)"),
        ("radiosonde", "v_component_of_wind", 0 * lat + HEIGHT, upper, "northward wind at 500 hPa,\ndeparture (m s⁻¹)"),
        (sounder, f"brightness_temperature:{channel}", 0 * lat, seen_from_above,
         f"{about.channel.frequency:g} GHz, its sounder not read,\ndeparture (K)"),
    )  # fmt: skip
    rows = []
    for name, variable, height, true, label in quantities:
        without = {s.sensor: s.sensor != name or name != sounder for s in cfg.sensors}
        state = world.analyse(params, record, init, cycles=demo.cycles, cfg=cfg, given=without)
        column = cfg.sensor(name).variables.index(variable)
        panels = {}
        for key, when in times.items():
            ahead = round((when - init) / np.timedelta64(3600, "s") / cfg.step)
            later = world.advance(params, state, ahead, cfg=cfg)
            found, _, usual = (x[:, column] for x in world.sample(params, later, name, lat, lon, height, cfg=cfg))
            word = "now" if key == "now" else f"{demo.map_lead} h later"
            panels[f"truth, {word}"] = (true(when) - usual).reshape(shape)
            panels["analysis" if key == "now" else f"{demo.map_lead} h forecast"] = (found - usual).reshape(shape)
        window = record.window(int(init.astype(int)), np.random.default_rng(0))
        shown = [other] if name == sounder else [name]
        dots = [
            np.concatenate([np.asarray(getattr(window[s], axis))[window[s].mask.any(-1)] for s in shown])
            for axis in ("longitude", "latitude")
        ]
        rows.append({"label": label, "panels": panels, "dots": {"analysis": ((dots[0] + 180) % 360 - 180, dots[1])}})
    return rows, {"longitude": longitude, "latitude": latitude, "title": f"From {init} UTC"}


def write(
    demo: Demo, out: pathlib.Path, clock: report.Clock, seed: int, tables: Any, rows: Any, places: Any, curve: Any
) -> None:
    """PNG files and report.html."""
    scores, wide, limits = tables
    losses = [str(name) for name in curve if str(name).startswith("after/")]
    drawn = {
        "maps": (
            "Departures from the normal. Rows: what stations report, what radiosondes report, what a sounder sees "
            "whose own reports were kept from the analysis. Dots: that sensor's reports of the last window (in the "
            "last row of the other sounder, beside those of all others).",
            report.globe_maps(rows, **places),
        ),
        "rmse": (
            "Error at stations and radiosonde sites that nobody read. The baselines are not tuned here.",
            report.skill_by_group(scores),
        ),
        "training": (
            "Squared error of forecast windows by sensor, in variances about the normal (the climate has 1).",
            report.loss_curve(curve.filter(["step", *losses]), smooth=10),
        ),
    }
    for name, (_, figure) in drawn.items():
        with appearing_complete(out / f"{name}.png", overwrite=True) as hidden:
            hidden.write_bytes(report.png(figure))
    phases = pd.DataFrame({"phase": list(clock.seconds), "seconds": [round(s) for s in clock.seconds.values()]})
    days = demo.train.nature.days, demo.test.nature.days
    sensors = ", ".join(s.sensor for s in demo.model.sensors)
    about = (
        f"A simulated atmosphere was observed for {days[0]:g} days by {sensors}. The model learned from these reports "
        f"alone; it forecasts {days[1]:g} days of another run. A fifth of the stations and a quarter of the radiosonde "
        "sites are held out of everything, and forecasts are scored against the truth there.\n\n"
        f"What no result on this atmosphere can show: {'; '.join(caveats(demo.test.nature))}."
    )
    sections = [
        report.Section("What this is, and what it is not", about),
        report.Section("The field, anywhere, for any sensor", figures=[drawn["maps"]]),
        report.Section(
            "Skill", figures=[drawn["rmse"]],
            tables=[("RMSE, SI units", wide), ("Lead (h) at which climatology is as good", limits)],
        ),
        report.Section("Training", figures=[drawn["training"]], tables=[("Wall time", phases)]),
    ]  # fmt: skip
    report.write_report(
        out / "report.html",
        title="Earth-o1 on a simulated globe",
        summary="One field, fed and read by every sensor: forecasts where nobody observes, of sensors nobody read.",
        sections=sections,
        origin=report.provenance(
            seeds=[seed], extra={"platform": jax.default_backend(), "simulation": str(demo.train)}
        ),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out/demo"), help="folder for everything written"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the simulated weather and the training")
    parser.add_argument("--fast", action="store_true", help="a minute, with scores that mean nothing; for tests")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_args(argv)
    preset = earth_demo.fast() if given.fast else earth_demo.demo()
    run(preset, given.out, seed=given.seed, progress=not given.quiet)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
