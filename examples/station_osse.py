"""The regional model from end to end on a simulated atmosphere, without any download.

    python examples/station_osse.py --out out/station_osse

A nature run of a simulated, dry atmosphere (dinosaur-dycore, extra `osse`) is observed by simulated stations and
soundings. From their reports alone a model is trained; it forecasts weeks it has not seen, at its stations, at held-out
stations and anywhere else. It is scored beside climatology, persistence, anomaly persistence, AR ridge and VAR ridge,
and, what no real record allows, against the truth at places where nothing is observed. OUT receives scores.csv,
ratios.csv, forecast.zarr, the model (model/), PNG figures and report.html.

Running it again with the same OUT starts from the finished nature run and from the last checkpoint of the training.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the presets are not installed

from configs import station_osse
from configs.station_osse import SURFACE, Demo
from earth import field, report, verify
from earth.baselines import MODELS, Baselines, Panel, fit_baselines
from earth.baselines.forecasts import carrying_error
from earth.baselines.spatial import distances
from earth.calibration import calibrate
from earth.export import SPREAD, write_dataset
from earth.forecast import forecast, load_model, save_model, streams_of
from earth.observations import Reports, to_reports, validate
from earth.osse import Simulation, Truth, query, simulate
from earth.protocol import Protocol
from earth.train import fill_heights, prepare, train
from moe import training

# In the units of the figures: name, factor from SI.
SHOWN = {
    "lowest_level_temperature": ("temperature (K)", 1.0),
    "surface_pressure": ("surface pressure (hPa)", 0.01),
    "lowest_level_u_component_of_wind": ("eastward wind (m s⁻¹)", 1.0),
    "lowest_level_v_component_of_wind": ("northward wind (m s⁻¹)", 1.0),
}
GROUPS = {
    "training": "training stations",
    "held_out": "held-out stations",
    "truth_near": "truth, near the network",
    "truth_far": "truth, far from it",
}
MAP_LEAD = 24.0


def split(demo: Demo, start: np.datetime64, stations: Sequence[str]) -> Protocol:
    """Training, gap, validation, gap, test blocks, in this order; every so many-th station held out."""

    def day(days: float) -> np.datetime64:
        return start + np.timedelta64(round(days * 24), "h")

    checked = demo.train_days + demo.gap_days
    first = checked + demo.validation_days + demo.gap_days
    edges = [first + i * demo.block_days for i in range(demo.blocks + 1)]
    return Protocol(
        "demo",
        test=[(day(a), day(b)) for a, b in itertools.pairwise(edges)],
        validation=[(day(checked), day(checked + demo.validation_days))],
        train=[(day(0), day(demo.train_days))],
        held_out=tuple(sorted(stations)[:: demo.held_out_every]),
        variables=SURFACE,
        leads=demo.model.leads,
        source=f"{demo.train_days:g} training days, gap, {demo.validation_days:g} validation days, gap, test",
    )


@dataclasses.dataclass(frozen=True)
class Places:
    """Where forecasts are scored: names, positions, and the groups of `scores.csv` they belong to."""

    names: tuple[str, ...]
    latitude: np.ndarray
    longitude: np.ndarray
    height: np.ndarray
    groups: dict[str, list[str]]

    def table(self) -> dict[str, Any]:
        """As `earth.forecast.forecast` takes them."""
        place = {"latitude": self.latitude, "longitude": self.longitude, "height": self.height}
        return {"station": list(self.names), **place}


def places(demo: Demo, truth: Truth, stations: Reports, protocol: Protocol) -> Places:
    """Training stations, held-out stations, and points evenly over the globe, which nothing observes."""
    known = stations.positions()
    held = [s for s in known.index if s in protocol.held_out]
    inside = [s for s in known.index if s not in protocol.held_out]
    known = known.loc[inside + held]
    even = field.fibonacci_anchors(demo.points, (0.0,))
    latitude, longitude = np.asarray(even.latitude, np.float64), np.asarray(even.longitude, np.float64)
    relief = query(truth, ["surface_altitude"], truth.start, latitude, longitude)["surface_altitude"]
    network = known.loc[inside]
    nearest = distances(network.latitude.to_numpy(), network.longitude.to_numpy(), latitude, longitude).min(1)
    names = [f"P{i:03d}" for i in range(demo.points)]
    near = nearest <= demo.near_km
    groups = {"training": inside, "held_out": held}
    groups["truth_near"] = [n for n, close in zip(names, near, strict=True) if close]
    groups["truth_far"] = [n for n, close in zip(names, near, strict=True) if not close]
    return Places(
        (*known.index, *names),
        np.r_[known.latitude.to_numpy(), latitude],
        np.r_[known.longitude.to_numpy(), longitude],
        np.r_[known.height.to_numpy(), relief],
        groups,
    )


def check(truth: Truth, stations: Reports, where: Places, times: np.ndarray) -> xr.Dataset:
    """What forecasts are scored against, (time, station): reports at stations, the truth at points."""
    seen = stations.select(variables=list(SURFACE)).grid()
    points = where.groups["truth_near"] + where.groups["truth_far"]
    row = [where.names.index(n) for n in points]
    exact = query(truth, SURFACE, times[:, None], where.latitude[row], where.longitude[row])
    data = {name: (("time", "station"), values) for name, values in exact.items()}
    known = xr.Dataset(data, {"time": times, "station": np.asarray(points, object)})
    return xr.concat(
        [seen[list(SURFACE)].drop_vars(["latitude", "longitude", "height"]), known], "station", join="left"
    )


def baseline_forecasts(
    fitted: Baselines, panel: Panel, where: Places, init: np.ndarray, protocol: Protocol
) -> tuple[dict[str, xr.Dataset], str]:
    """Every baseline at its stations and, by the interpolation that carries VAR best on validation hours, elsewhere."""
    away = [i for i, n in enumerate(where.names) if n not in where.groups["training"]]
    empty = np.full((2, len(away), len(SURFACE)), np.nan)
    there = Panel(
        panel.times[:2],
        tuple(where.names[i] for i in away),
        panel.variables,
        empty,
        where.latitude[away],
        where.longitude[away],
        where.height[away],
    )
    issued = fitted.forecast("var", role="validation")
    error = {m: carrying_error(issued, panel, protocol, method=m) for m in ("idw", "lapse_idw")}
    method = "idw" if np.mean(error["idw"] / error["lapse_idw"]) < 1 else "lapse_idw"
    out = {}
    for name in MODELS:
        carried = fitted.forecast_at(name, there, init, method=method)
        out[name] = xr.concat([fitted.forecast(name, init), carried], "station", combine_attrs="override")
    return out, method


def run(demo: Demo, out: pathlib.Path, *, seed: int = 0, progress: bool = True) -> pd.DataFrame:
    """The whole demonstration; returns the table of scores.csv."""
    out.mkdir(parents=True, exist_ok=True)
    clock = report.Clock()
    begun = time.perf_counter()
    osse = dataclasses.replace(demo.osse, seed=seed, nature=dataclasses.replace(demo.osse.nature, seed=seed))
    with clock("simulating the atmosphere and its observations"):
        world: Simulation = simulate(osse, cache=out / "nature", progress=progress)
        table, dropped = validate(world.table)
        reports = to_reports(table)
        print(f"{dropped}\n{len(table):,} values: " + ", ".join(f"{len(r):,} {n} reports" for n, r in reports.items()))
        print("What no result on this atmosphere can show:")
        print("\n".join(f"  - {sentence}" for sentence in world.meta.caveats))
    stations = reports["station"]
    protocol = split(demo, world.meta.start, stations.platforms)
    sondes, _ = fill_heights(reports["radiosonde"])  # pressure levels at their standard heights
    inside = stations.select(platforms=[s for s in stations.platforms if s not in protocol.held_out])
    cfg = demo.model
    tcfg = dataclasses.replace(demo.training, seed=seed)

    with clock("fitting normals, kernels and the linear propagator"):
        data = prepare({"station": inside, "radiosonde": sondes}, cfg, protocol, progress=progress)
        counts = f"{len(inside.platforms)} stations, {len(protocol.held_out)} held out"
        print(f"{counts}; {len(data.train_times):,} training times, {len(data.validation_times):,} for validation")
    with clock("training"):
        params = train(data, tcfg, out / "training", progress=progress)
    with clock("calibrating on validation hours"):
        params, chosen = calibrate(params, data)
        save_model(out / "model", params, cfg, meta={"protocol": protocol.to_dict(), "seed": seed})
        params, cfg, _ = load_model(out / "model", cfg=cfg)
    with clock("fitting the baselines"):
        panel = Panel.from_grid(inside.select(variables=list(SURFACE)).grid())
        # In favour of this baseline: here ten neighbours beat 20, 40 and all, and small penalties large ones.
        options = {"var": {"neighbours": 10, "penalties": (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)}}
        fitted = fit_baselines(panel, protocol, leads=cfg.leads, options=options, progress=progress)
    with clock("forecasting"):
        where = places(demo, world.truth, stations, protocol)
        step = np.timedelta64(demo.init_hours, "h")
        axis = np.arange(world.meta.start, world.meta.end + np.timedelta64(1, "ns"), step)
        init = protocol.init_times(axis, cfg.leads)
        streams = streams_of(params, cfg, {"station": inside, "radiosonde": sondes})
        ours = forecast(params, cfg, streams, init, cfg.leads, where.table(), variables=SURFACE, batch=16)
        write_dataset(ours, out / "forecast.zarr", overwrite=True)
        others, method = baseline_forecasts(fitted, panel, where, init, protocol)
        maps = global_maps(demo, world.truth, (params, cfg), streams, protocol, inside)
    with clock("verifying"):
        times = np.unique(ours["valid_time"].to_numpy())
        seen = check(world.truth, stations, where, times[times <= world.meta.end])
        common = {"climatology": others["climatology"], "groups": where.groups}
        tables = [verify.score(ours, seen, protocol, model="earth-o1", **common)]
        tables += [verify.score(f, seen, protocol, model=name, **common) for name, f in others.items()]
        scores = pd.concat(tables, ignore_index=True)
        ratios = verify.compare(ours, others["var"], seen, protocol, groups=where.groups)
        for frame, name in ((scores, "scores.csv"), (ratios, "ratios.csv")):
            frame.to_csv(out / f".{name}", index=False)
            (out / f".{name}").replace(out / name)
        show(scores, ratios, method)
    with clock("figures and report"):
        kept = pd.DataFrame({"lead_hours": cfg.leads})
        for name in SURFACE:
            kept[name] = chosen["weight"].sum(0)[:, cfg.channels.index(("station", name))]
        last = out / "training" / "member0" / tcfg.stages[-1].name / "metrics.jsonl"
        curve = pd.DataFrame(training.read_metrics(last))
        results = Results(demo, world, protocol, where, seen, ours, scores, ratios, maps, method, kept, curve)
        write(results, out, clock, seed)
    print(f"\nWhat these scores cannot show: {'; '.join(world.meta.caveats)}.")
    print(f"{out / 'report.html'}: {time.perf_counter() - begun:.0f} s in all")
    for phase, seconds in clock.seconds.items():
        print(f"  {seconds:6.0f} s  {phase}")
    return scores


def show(scores: pd.DataFrame, ratios: pd.DataFrame, method: str) -> None:
    """The score tables on the terminal."""
    print(f"RMSE in SI units; away from its stations a baseline is carried by {method}.")
    with pd.option_context("display.width", 200, "display.max_rows", 400, "display.float_format", "{:.3f}".format):
        for group, part in scores.groupby("stations", sort=False):
            print(f"\n{GROUPS[str(group)]} (n = {part.n.min():,} to {part.n.max():,} per cell)")
            wide = part.pivot_table(index=["variable", "lead_hours"], columns="model", values="rmse", sort=False)
            print(wide.to_string())
        print(
            "\nRMSE of earth-o1 over VAR ridge's, mean over variables and leads, 95 % paired block-bootstrap interval"
        )
        print(
            ratios.loc[ratios.variable == "mean", ["stations", "ratio", "ratio_lo", "ratio_hi"]].to_string(index=False)
        )


# ---- figures
@dataclasses.dataclass(frozen=True)
class Maps:
    """One forecast of the whole globe beside the truth: fields [Y, X] by variable, SI.

    Attributes:
      latitude, longitude: [Y], [X] degrees.
      lead, valid: hours, UTC time.
      truth, forecast, spread: by variable.
      usual: mean of the truth over the training period; departures from it are what a forecast has to get right.
      stations: positions of the training stations.
    """

    latitude: np.ndarray
    longitude: np.ndarray
    lead: float
    valid: np.datetime64
    truth: dict[str, np.ndarray]
    forecast: dict[str, np.ndarray]
    spread: dict[str, np.ndarray]
    usual: dict[str, np.ndarray]
    stations: pd.DataFrame


def global_maps(demo: Demo, truth: Truth, model: Any, streams: Any, protocol: Protocol, inside: Reports) -> Maps:
    """The forecast from 00 UTC that is valid in the middle of the test period, on a regular grid."""
    params, cfg = model
    latitude = np.arange(-90 + demo.map_degrees / 2, 90, demo.map_degrees)
    longitude = np.arange(-180 + demo.map_degrees / 2, 180, demo.map_degrees)
    shape = (len(latitude), len(longitude))
    lat, lon = (a.ravel() for a in np.meshgrid(latitude, longitude, indexing="ij"))
    relief = query(truth, ["surface_altitude"], truth.start, lat, lon)["surface_altitude"]
    middle = protocol.test[0][0] + (protocol.test[-1][1] - protocol.test[0][0]) / 2
    init = middle.astype("datetime64[D]").astype("datetime64[ns]")
    valid = init + np.timedelta64(round(MAP_LEAD * 3600), "s")
    where = {"station": [str(i) for i in range(len(lat))], "latitude": lat, "longitude": lon, "height": relief}
    made = forecast(params, cfg, streams, [init], [MAP_LEAD], where, variables=SURFACE, batch=1)
    exact = query(truth, SURFACE, valid, lat, lon)
    assert protocol.train
    [(start, end)] = protocol.train
    days = truth.times[(truth.times >= start) & (truth.times < end)][::8]
    usual = dict.fromkeys(SURFACE, 0.0)
    for time_ in days:
        now = query(truth, SURFACE, time_, lat, lon)
        usual = {name: usual[name] + now[name] / len(days) for name in SURFACE}
    return Maps(
        latitude,
        longitude,
        MAP_LEAD,
        valid,
        truth={n: exact[n].reshape(shape) for n in SURFACE},
        forecast={n: made[n].to_numpy().reshape(shape) for n in SURFACE},
        spread={n: made[n + SPREAD].to_numpy().reshape(shape) for n in SURFACE},
        usual={n: np.reshape(usual[n], shape) for n in SURFACE},
        stations=inside.positions(),
    )


def draw_maps(maps: Maps, names: Sequence[str]) -> Figure:
    """Rows of variables; columns truth, forecast, their difference, predicted spread.

    Pressure is drawn as the departure from its mean, since the relief's share of it would hide the weather.
    """
    with matplotlib.rc_context(report.STYLE):
        figure = Figure(figsize=(13.6, 2.3 * len(names) + 0.5), layout="constrained")
        axes = figure.subplots(len(names), 4, squeeze=False, sharex=True, sharey=True)
        for row, name in zip(axes, names, strict=True):
            label, factor = SHOWN[name]
            what, units = label.removesuffix(")").split(" (")
            weather = factor * (maps.truth[name] - maps.usual[name])
            # One scale for departures and errors: what counts is how large an error is beside the weather.
            reach = np.percentile(np.abs(weather), 99.5)
            base = maps.usual[name] if name == "surface_pressure" else 0.0
            true, made = (factor * (f[name] - base) for f in (maps.truth, maps.forecast))
            diverging = {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach}
            if name == "lowest_level_temperature":
                low, high = np.percentile([true, made], [0.5, 99.5])
                look: dict[str, Any] = {"cmap": "viridis", "vmin": low, "vmax": high}
            else:
                size = np.percentile(np.abs([true, made]), 99.5)
                look = {"cmap": "RdBu_r", "vmin": -size, "vmax": size}
            spread = factor * maps.spread[name]
            shade = {"cmap": "magma_r", "vmin": 0.0, "vmax": np.percentile(spread, 99.5)}
            panels = (("truth", true, look), ("forecast", made, look), ("forecast − truth", made - true, diverging))
            for axis, (title, values, style) in zip(row, (*panels, ("predicted spread", spread, shade)), strict=True):
                mesh = axis.pcolormesh(
                    maps.longitude, maps.latitude, values, shading="nearest", rasterized=True, **style
                )
                if title in ("forecast", "predicted spread"):
                    dots = maps.stations
                    axis.plot(dots.longitude, dots.latitude, ".", color="black", markersize=2.2, alpha=0.7)
                axis.set(xlim=(-180, 180), ylim=(-90, 90), aspect="equal", xticks=(-180, -90, 0, 90, 180))
                axis.set(yticks=(-60, 0, 60))
                axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _degrees(v % 360 if v == -180 else v, "EW")))
                axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _degrees(v, "NS")))
                axis.grid(False)
                axis.set_title(f"{what}: {title}" if axis is row[0] else title)
                ends = "max" if title == "predicted spread" else "both"
                figure.colorbar(mesh, ax=axis, shrink=0.75, pad=0.02, extend=ends).set_label(units, fontsize=8)
        when = np.datetime_as_string(maps.valid, unit="h")
        title = f"{maps.lead:g} h forecast valid {when} UTC; dots: training stations"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _degrees(value: float, sides: str) -> str:
    side = sides[0] if 0 < value < 180 else sides[1] if -180 < value < 0 else ""
    return f"{abs(value):g}°{side}"


@dataclasses.dataclass(frozen=True)
class Results:
    """What the figures and the report show; see `run`."""

    demo: Demo
    world: Simulation
    protocol: Protocol
    where: Places
    observed: xr.Dataset
    forecast: xr.Dataset
    scores: pd.DataFrame
    ratios: pd.DataFrame
    maps: Maps
    method: str
    kept: pd.DataFrame
    curve: pd.DataFrame


def figures(r: Results) -> dict[str, dict[str, tuple[str, Figure]]]:
    """Captions and figures by section and file name."""
    field_caption = (
        "A gap-free forecast of the whole globe, made from the reports of stations and soundings alone; the truth, "
        "which nobody observed; their difference; and the spread the model expects, which grows away from stations. "
        "Surface pressure is the departure from its mean over the training period."
    )
    out: dict[str, dict[str, tuple[str, Figure]]] = {"field": {}, "skill": {}, "stations": {}, "training": {}}
    out["field"]["field"] = field_caption, draw_maps(r.maps, SURFACE[:3])
    order = ("earth-o1", "var", *[m for m in MODELS if m != "var"])
    for group, text in GROUPS.items():
        if not r.where.groups[group]:
            continue
        caption = (
            f"RMSE by lead time, {text}. Bands: 95 % block-bootstrap intervals over {r.demo.blocks} blocks, of the "
            "first two models."
        )
        drawn = report.skill_by_lead(r.scores, stations=group, title=text.capitalize(), models=order)
        out["skill"][f"skill_{group}"] = caption, drawn
        caption = f"RMSE of the model over VAR ridge's, {text}; bold where the paired 95 % interval excludes 1."
        drawn = report.scorecard(r.ratios, stations=group, reference="VAR ridge", title=text.capitalize())
        out["skill"][f"scorecard_{group}"] = caption, drawn

    variable, held = SURFACE[0], r.protocol.held_out
    lead = min(r.protocol.leads, key=lambda h: abs(h - MAP_LEAD))
    known = {"all": r.where.groups["training"] + r.where.groups["held_out"]}
    by = verify.score(r.forecast, r.observed, r.protocol, groups=known, by_station=True, draws=0)
    rmse = by.loc[(by.lead_hours == lead) & (by.variable == variable)].set_index("station").rmse
    row = [r.where.names.index(str(name)) for name in rmse.index]
    label = f"RMSE of {SHOWN[variable][0]}"
    position = r.where.latitude[row], r.where.longitude[row]
    drawn = report.station_map(*position, rmse.to_numpy(), label=label, names=list(rmse.index), held_out=held)
    out["stations"]["stations"] = f"{label} at {lead:g} h by station; triangles are held out.", drawn
    drawn = report.time_series(
        r.forecast,
        r.observed,
        station=held[0],
        variable=variable,
        leads=[r.protocol.leads[0], lead],
        start=r.protocol.test[0][0],
        end=r.protocol.test[min(1, len(r.protocol.test) - 1)][1],
        title=f"Held-out station {held[0]}",
    )
    caption = f"{SHOWN[variable][0]} at a station the model never saw: reports, forecasts, 50 and 90 % intervals."
    out["stations"]["series"] = caption, drawn
    inside = r.forecast.sel(station=r.where.groups["training"])
    drawn = report.calibration(verify.pit_values(inside, r.observed, r.protocol))
    out["stations"]["calibration"] = "Calibration of the spread at training stations, all leads together.", drawn
    caption = (
        "Squared error of the forecast mean on training samples (mixed pairs), with the linear propagator's alone, in "
        "units of the propagator's error."
    )
    drawn = report.loss_curve(r.curve.filter(["step", "mse", "mse_base"]), smooth=10)
    out["training"]["training"] = caption, drawn
    return out


def write(r: Results, out: pathlib.Path, clock: report.Clock, seed: int) -> None:
    """PNG files and report.html."""
    drawn = figures(r)
    for part in drawn.values():
        for name, (_, figure) in part.items():
            hidden = out / f".{name}.png"
            hidden.write_bytes(report.png(figure))
            hidden.replace(out / f"{name}.png")
    groups = r.where.groups
    mean = r.ratios.loc[r.ratios.variable == "mean"].set_index("stations")
    ratio = [
        f"{GROUPS[str(group)]} {row.ratio:.3f} [{row.ratio_lo:.3f}, {row.ratio_hi:.3f}]"
        for group, row in mean.iterrows()
    ]
    index = ["stations", "variable", "lead_hours"]
    wide = r.scores.pivot_table(index=index, columns="model", values="rmse", sort=False).reset_index()
    both = r.scores.loc[r.scores.model.isin(["earth-o1", "var"]) & r.scores.crps.notna()]
    spread = both.pivot_table(index=index, columns="model", values=["crps", "coverage"], sort=False)
    spread.columns = [f"{score} {model}" for score, model in spread.columns]
    phases = pd.DataFrame({"phase": list(clock.seconds), "seconds": [round(s) for s in clock.seconds.values()]})
    osse, demo = r.world.meta.config, r.demo
    assert osse.stations is not None
    assert osse.radiosondes is not None
    about = (
        f"A simulated atmosphere was observed by {osse.stations.count} stations every {osse.stations.cadence_hours} h "
        f"and {osse.radiosondes.count} sounding sites; {len(groups['held_out'])} stations are held out of everything. "
        f"The model saw {demo.train_days:g} days of reports, is calibrated on {demo.validation_days:g} later days, and "
        f"is scored on {demo.blocks} blocks of {demo.block_days:g} days after a gap of {demo.gap_days:g} days.\n\n"
        f"What no result on this atmosphere can show: {'; '.join(r.world.meta.caveats)}.\n\n"
        "At stations, forecasts are scored against reports, whose own errors (noise and an unknown constant bias) are "
        f"part of the RMSE. At {demo.points} points spread evenly over the globe they are scored against the exact "
        f"truth; the {len(groups['truth_near'])} of them within {demo.near_km:g} km of a training station are near "
        f"the network. Away from stations, baselines are carried by {r.method}, the better of idw and lapse_idw on "
        f"validation hours. Intervals re-draw {demo.blocks} test blocks, which is few: read them as a lower bound of "
        "the uncertainty."
    )

    def section(heading: str, part: str, *tables: tuple[str, pd.DataFrame]) -> report.Section:
        return report.Section(heading, figures=list(drawn[part].values()), tables=tables)

    sections = [
        report.Section("What this is, and what it is not", about),
        section("The field, anywhere", "field"),
        section("Skill", "skill", ("RMSE, SI units", wide), ("CRPS; coverage of 90 % intervals", spread.reset_index())),
        section("Stations and spread", "stations"),
        section("Training", "training", ("Share of the network's forecast kept", r.kept), ("Wall time", phases)),
    ]
    extra = {"platform": jax.default_backend(), "simulation": str(osse)}
    report.write_report(
        out / "report.html",
        title="Earth-o1 on a simulated atmosphere",
        summary=f"RMSE over VAR ridge's, mean over variables and leads, 95 % interval: {'; '.join(ratio)}.",
        sections=sections,
        origin=report.provenance(protocol=r.protocol, seeds=[seed], extra=extra),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out/station_osse"), help="folder for everything written"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the simulated weather, the observations and the training"
    )
    parser.add_argument(
        "--fast", action="store_true", help="a minute instead of ten, with scores that mean nothing; for tests"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    run(
        station_osse.fast() if arguments.fast else station_osse.demo(),
        arguments.out,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
