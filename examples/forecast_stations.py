"""Forecast your own station network: from a wide table to a trained model, scores and a report.

    python examples/forecast_stations.py --observations stations.parquet --out out/stations

The table has one row per station and time: `time, station, lat, lon, elev` and one column per variable (usual names and
units are recognised; long tables work too). Any region, variables, cadence and gaps. What happens:

1. The table is read and checked; every drop is counted and printed.
2. Hours are split into training, validation and test: by `--protocol FILE`, by `--train-period A B --test-period A B`
(repeat the latter), or, with
   neither, by a rotating split over the record. `--held-out` stations are in nobody's inputs, targets or normalisation.
3. Climate normals, anchors, the linear propagator (closed form) and the network (a few minutes) are fitted; an
interrupted run resumes when the
   same command is given again.
4. Forecasts for every test hour at training and held-out stations are scored beside climatology, persistence, anomaly
persistence, AR ridge, VAR
   ridge, and, at held-out stations, these interpolated by inverse distance with a lapse rate.
5. OUT receives scores.csv (variable, lead_hours, stations, model, rmse, mae, bias, crps, n, intervals, in the file's
units), ratios.csv,
   forecast.nc, the model (model/), figures and report.html; with `--weatherbench DIR` the forecast also goes to DIR as
WeatherBench-X sparse parquet.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time

import jax
import numpy as np
import pandas as pd
import xarray as xr

from earth import report, verify
from earth.baselines import BaselineError, Panel, fit_baselines, interpolate_forecast, interpolate_panel
from earth.calibration import calibrate
from earth.export import to_dataset, to_weatherbenchx, write_dataset
from earth.forecast import forecast, load_model, save_model, streams_of
from earth.observations import EmptyWindowError, ObservationError, Reports, SchemaError, base_platform
from earth.protocol import Protocol, ProtocolError, utc_times
from earth.readers import read_stations
from earth.sensors import nearest
from earth.stations import StationsConfig, design, usual_variables
from earth.train import fill_heights, prepare, train
from earth.verify import VerificationError
from moe import training
from moe.checkpoint import CheckpointConfigError, CheckpointError, CorruptCheckpointError
from moe.config import add_config_arguments, config_from_arguments, flatten, to_dict

ROOT = pathlib.Path(__file__).resolve().parent.parent
ERRORS = (
    ObservationError,
    ProtocolError,
    BaselineError,
    VerificationError,
    CheckpointError,
    training.DivergedError,
    FileNotFoundError,
    FileExistsError,
)
BASELINES = ("climatology", "persistence", "anomaly_persistence", "ar", "var")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", required=True, help="table of station reports (parquet, CSV, zarr, netCDF)")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder for scores, figures, report and model")
    parser.add_argument(
        "--variables",
        nargs="+",
        default=None,
        help="columns to forecast, as the file names them (default: temperature, dew point, pressure, wind)",
    )
    parser.add_argument(
        "--leads", nargs="+", default=None, help="lead times in hours (default: the protocol's, or 1 3 6 12 24 48)"
    )
    parser.add_argument("--train-period", nargs=2, metavar=("A", "B"), help="UTC, [A, B)")
    parser.add_argument(
        "--test-period", nargs=2, action="append", metavar=("A", "B"), help="UTC, [A, B); may be repeated"
    )
    parser.add_argument(
        "--protocol",
        help="JSON file naming the test, validation and held-out parts, e.g. configs/protocols/stations-v1.json",
    )
    parser.add_argument(
        "--held-out", nargs="+", default=None, metavar="STATION", help="stations nobody sees in training"
    )
    parser.add_argument("--timezone", default="UTC", help="of times that carry none (default UTC)")
    parser.add_argument(
        "--units", nargs="+", default=None, metavar="COLUMN=UNIT", help="e.g. t2m=degC, where the guess is wrong"
    )
    parser.add_argument("--rename", nargs="+", default=None, metavar="COLUMN=NAME", help="e.g. T_avg=2m_temperature")
    parser.add_argument(
        "--weatherbench", type=pathlib.Path, metavar="DIR", help="also write the forecast as WeatherBench-X parquet"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_config_arguments(parser, default=str(ROOT / "configs" / "earth_o1.py") + ":stations")
    return parser.parse_args(argv)


def words(values: list[str] | None) -> list[str]:
    """`a b`, `a,b` and `a, b` are the same."""
    return [w for v in values or [] for w in str(v).replace(",", " ").split()]


def pairs(args: argparse.Namespace, option: str) -> dict[str, str] | None:
    """`--units a=b c=d` as a dict, None where not given."""
    found = words(getattr(args, option))
    for word in found:
        if not all(word.partition("=")):
            raise SchemaError(f"--{option} {word!r} is not COLUMN=VALUE; write e.g. --{option} t2m=degC")
    return dict(word.split("=", 1) for word in found) or None


def hours(args: argparse.Namespace) -> tuple[float, ...]:
    """The leads asked for, increasing, each once; () where none are."""
    try:
        leads = tuple(sorted({float(word) for word in words(args.leads)}))
    except ValueError as error:
        raise ProtocolError(f"--leads {' '.join(args.leads)}: {error}; give hours such as --leads 6 12 24") from error
    return leads


def choose_protocol(args: argparse.Namespace, reports: Reports) -> Protocol:
    leads = hours(args) or (1.0, 3.0, 6.0, 12.0, 24.0, 48.0)
    held = tuple(dict.fromkeys(words(args.held_out)))
    start, stop = reports.times.min(), reports.times.max() + np.timedelta64(1, "s")
    if args.protocol:
        protocol = Protocol.load(args.protocol)
        leads = leads if args.leads or not protocol.leads else protocol.leads
        return dataclasses.replace(protocol, leads=leads, **({"held_out": held} if args.held_out else {}))
    if args.test_period:
        first = utc_times([a for a, _ in args.test_period]).min()
        period = tuple(args.train_period) if args.train_period else (start, first)
        return Protocol.from_periods(
            test=[tuple(p) for p in args.test_period], train=period, held_out=held, leads=leads
        )
    if args.train_period:
        begin, end = args.train_period
        return Protocol.from_periods(test=[(utc_times([end])[0], stop)], train=(begin, end), held_out=held, leads=leads)
    return Protocol.rotating(start, stop, held_out=held, leads=leads)


def usable_leads(args: argparse.Namespace, protocol: Protocol, cadence: float) -> list[float]:
    """The leads on the record's cadence (hours). One asked for by name that is not is an error; the others are left
    out and said.
    """
    off = [lead for lead in protocol.leads if abs(lead / cadence - round(lead / cadence)) > 1e-6]
    leads = [float(lead) for lead in protocol.leads if lead not in off]
    steps = ", ".join(f"{cadence * k:g}" for k in (1, 2, 4, 8))
    if off and (args.leads or not leads):
        raise ProtocolError(
            f"leads {off} h are no multiples of the record's cadence of {cadence:g} h; pass --leads with multiples of "
            f"it, such as {steps}"
        )
    if off:
        print(f"leads {off} h are not on the record's cadence of {cadence:g} h and are left out")
    return leads


def check_tests(protocol: Protocol, record: Reports, init: np.ndarray, longest: float) -> None:
    """Refuses a split that leaves nothing to score before anything is trained."""
    span = f"the record runs from {record.times.min()} to {record.times.max()}"
    blocks = protocol.block(record.times)
    empty = [f"[{a}, {b})" for i, (a, b) in enumerate(protocol.test) if not (blocks == i).any()]
    if len(empty) == len(protocol.test):
        raise EmptyWindowError(f"no report lies in the test periods {', '.join(empty)}; {span}: choose them inside it")
    if empty:
        print(f"no report lies in {len(empty)} of {len(protocol.test)} test periods, e.g. {empty[0]}; {span}")
    if not len(init):
        raise EmptyWindowError(
            f"no initial time has {longest:g} h of reports before it and a lead that ends in a test period; {span}: "
            "choose later test periods or longer leads"
        )


def keep_identity(folder: pathlib.Path, record: Reports, protocol: Protocol, cfg, tcfg) -> None:
    """Writes what a training run was made from beside its checkpoints; a run that goes on there must be the same.

    The checkpoints compare the configuration only: weights trained on other reports or hours would go unnoticed, and
    with other test periods they would have seen the test.

    Raises:
      CheckpointConfigError: another record, split or configuration, naming what differs.
    """
    content = hashlib.sha256(json.dumps([record.variables, record.platforms]).encode())
    for array in (record.platform, record.time, record.latitude, record.longitude, record.height, record.values):
        content.update(np.ascontiguousarray(array).tobytes())
    split = {key: entry for key, entry in protocol.to_dict().items() if key in ("train", "validation", "test")}
    mine = {
        "observations": {"reports": len(record), "stations": len(record.platforms), "sha256": content.hexdigest()[:16]},
        "protocol": split,
        "model": to_dict(cfg),
        "training": to_dict(tcfg),
    }
    mine = json.loads(json.dumps(mine))
    path = folder / "run.json"
    try:
        theirs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else mine
    except json.JSONDecodeError as error:
        raise CorruptCheckpointError(f"{path} cannot be read ({error}); remove {folder} to train anew") from error
    old, new = flatten(theirs), flatten(mine)
    differing = [
        f"{key} ({old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} now)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "absent") != new.get(key, "absent")
    ]
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise CheckpointConfigError(
            f"{folder} belongs to another run: {'; '.join(differing[:5])}{more}. Choose another --out, repeat that "
            f"run's options, or remove {folder} to train anew"
        )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{os.getpid()}-run.json")
    temporary.write_text(json.dumps(mine, indent=1), encoding="utf-8")
    temporary.replace(path)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        config = config_from_arguments(args)
    except (ValueError, TypeError, AttributeError, ImportError, FileNotFoundError) as error:
        print(f"--config or --set: {error}", file=sys.stderr)
        return 2
    try:
        run(args, config)
    except ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace, config: StationsConfig) -> pd.DataFrame:
    clock = time.time()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    store = args.weatherbench
    if (
        store is not None
        and store.exists()
        and not (store.is_dir() and all(p.match("year=*") for p in store.iterdir()))
    ):
        raise FileExistsError(f"--weatherbench {store} holds something else than such a forecast; name a new folder")
    table = read_stations(
        args.observations, columns=pairs(args, "rename"), units=pairs(args, "units"), timezone=args.timezone
    )
    print(table.report)
    record, unknown = fill_heights(table.reports)
    if unknown:
        print(f"{unknown:,} reports have no height: taken as 0 m, so relief is not used at them")
    protocol = choose_protocol(args, record)
    named = words(args.variables)
    targets = tuple(table.variable(n) for n in named) if named else usual_variables(record)
    protocol = dataclasses.replace(protocol, variables=targets)
    held_names = {base_platform(h) for h in protocol.held_out}
    known = {base_platform(p) for p in record.platforms}
    if held_names - known:
        lost = sorted(held_names - known)
        raise ObservationError(
            f"held-out stations {lost} are not in the table; the nearest to {lost[0]!r} is {nearest(lost[0], known)!r} "
            f"among {sorted(known)[:12]}..."
        )
    if known == held_names:
        raise EmptyWindowError(f"--held-out names all {len(known)} stations; leave some to train on")
    inside = record.select(platforms=[p for p in record.platforms if base_platform(p) not in held_names])
    held = (
        record.select(platforms=[p for p in record.platforms if base_platform(p) in held_names]) if held_names else None
    )
    cadence = record.cadence() / 3600
    leads = usable_leads(args, protocol, cadence)
    cfg, tcfg = design(inside, targets, leads, protocol.role(inside.times) == "train", config, seed=args.seed)
    print(
        f"{len(inside.platforms)} training stations, {len(held.platforms) if held else 0} held out; "
        f"targets {list(targets)}"
    )
    print(
        f"further sensors read: {[v for v in cfg.streams[0].variables if v not in targets]}; "
        f"slots {cfg.streams[0].slots} h"
    )
    grid = record.select(variables=list(targets)).grid()
    axis = grid.time.to_numpy()
    span = cfg.streams[0].slots[-1]
    init = protocol.init_times(axis, leads)
    init = init[init >= axis[0] + np.timedelta64(int(span * 3600), "s")]
    check_tests(protocol, record, init, span)
    keep_identity(out / "training", inside, protocol, cfg, tcfg)

    data = prepare({"station": inside}, cfg, protocol, progress=not args.quiet)
    values = int(np.isfinite(inside.values[:, inside.index(cfg.streams[0].variables)]).sum())
    print(
        f"fitted normals, kernels and propagator on {values:,} values ({time.time() - clock:.0f} s); "
        f"{len(data.train_times):,} training times"
    )
    begun = time.time()
    try:
        params = train(data, tcfg, out / "training", progress=not args.quiet)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{error}; or remove {out / 'training'} to train anew") from error
    params, chosen = calibrate(params, data)
    print(f"trained {tcfg.members} member(s) in {time.time() - begun:.0f} s")
    meta = {"protocol": protocol.to_dict(), "targets": list(targets), "seed": args.seed}
    save_model(out / "model", params, cfg, meta=meta)
    params, cfg, _ = load_model(out / "model", cfg=cfg)

    streams = streams_of(params, cfg, {"station": inside})
    scores, ratios = [], []
    points = record.positions()
    points = pd.DataFrame(points[~points.index.duplicated()])
    stations = {"station": list(points.index), **{c: points[c].to_numpy() for c in ("latitude", "longitude", "height")}}
    ours = forecast(params, cfg, streams, init, leads, stations, variables=targets)
    print(
        f"forecast {len(init):,} initial times x {len(leads)} leads x {len(points)} stations "
        f"({time.time() - clock:.0f} s)"
    )
    write_dataset(ours, out / "forecast.nc", overwrite=True)
    if store is not None:
        to_weatherbenchx(ours, store, overwrite=True)

    panel = Panel.from_grid(inside.select(variables=list(targets)).grid())
    baselines = fit_baselines(panel, protocol, models=BASELINES, leads=leads, progress=not args.quiet)
    groups = {"training": list(inside.platforms)} | ({"held_out": list(held.platforms)} if held else {})
    common = {"columns": table.columns, "groups": groups}
    scores.append(verify.score(ours, grid, protocol, model="earth-o1", **common))
    for name in BASELINES:
        predicted = baselines.forecast(name)
        both = predicted
        if held is not None:
            there = held.positions()
            away = interpolate_forecast(
                predicted,
                stations=list(held.platforms),
                latitude=there.latitude.to_numpy(),
                longitude=there.longitude.to_numpy(),
                height=there.height.to_numpy(),
                method="lapse_idw",
            )
            both = xr.concat([predicted, away], dim="station", join="outer")
        scores.append(verify.score(both, grid, protocol, model=name, **common))
        if name == "var":
            ratios.append(verify.compare(ours, both, grid, protocol, leads=leads, columns=table.columns, groups=groups))
    if held is not None:
        scores.append(nowcasts(params, cfg, streams, panel, held, targets, protocol, grid, axis, table.columns))
    result = pd.concat(scores, ignore_index=True)
    ratio = pd.concat(ratios, ignore_index=True)
    for frame, name in ((result, "scores.csv"), (ratio, "ratios.csv")):
        frame.to_csv(out / f".{name}", index=False)
        (out / f".{name}").replace(out / name)
    show(result, ratio)
    figures(out, args, table, ours, grid, result, ratio, protocol, targets, leads, inside, held, chosen)
    print(f"report: {out / 'report.html'} ({time.time() - clock:.0f} s in all)")
    return result


def nowcasts(params, cfg, streams, panel, held, targets, protocol, grid, axis, columns) -> pd.DataFrame:
    """Lead 0 at held-out stations: the model's field and the interpolations, scored alike."""
    tests = axis[protocol.role(axis) == "test"]
    tests = tests[tests >= axis[0] + np.timedelta64(int(cfg.streams[0].slots[-1] * 3600), "s")]
    there = held.positions()
    where = {"station": list(held.platforms), **{c: there[c].to_numpy() for c in ("latitude", "longitude", "height")}}
    parts = [
        verify.score(
            forecast(params, cfg, streams, tests, [0.0], where, variables=targets),
            grid,
            protocol,
            model="earth-o1",
            columns=columns,
            groups={"held_out": list(held.platforms)},
        )
    ]
    away = Panel.from_grid(held.select(variables=list(targets)).grid())
    rows = np.searchsorted(panel.times, tests)
    rows = rows[(rows < len(panel.times)) & np.isin(tests, panel.times)]
    for method in ("nearest", "idw", "lapse_idw"):
        values = interpolate_panel(panel, away, method=method)[rows]
        predicted = to_dataset(
            values[:, None],
            None,
            init_times=panel.times[rows],
            lead_hours=[0],
            variables=list(panel.variables),
            stations=list(away.stations),
            latitude=away.latitude,
            longitude=away.longitude,
            height=away.height,
        )
        parts.append(
            verify.score(
                predicted, grid, protocol, model=method, columns=columns, groups={"held_out": list(held.platforms)}
            )
        )
    return pd.concat(parts, ignore_index=True)


def show(scores: pd.DataFrame, ratios: pd.DataFrame) -> None:
    with pd.option_context("display.width", 200, "display.max_rows", 400, "display.float_format", "{:.3f}".format):
        for group, part in scores.groupby("stations", sort=False):
            print(f"\nRMSE, {group} stations")
            print(
                part.pivot_table(
                    index=["variable", "lead_hours"], columns="model", values="rmse", sort=False
                ).to_string()
            )
        print("\nRMSE over VAR ridge's, with paired block-bootstrap interval")
        print(ratios.to_string(index=False))


def figures(out, args, table, ours, grid, scores, ratios, protocol, targets, leads, inside, held, chosen) -> None:
    held_names = list(held.platforms) if held else []
    made = []

    def keep(caption, name, figure):
        path = out / f"{name}.png"
        path.with_name(f".{name}.png").write_bytes(report.png(figure))
        path.with_name(f".{name}.png").replace(path)
        made.append((caption, figure))

    here = scores[scores.lead_hours > 0]
    keep(
        "RMSE by lead time at training stations; band: 95 % block bootstrap.",
        "skill",
        report.skill_by_lead(here, stations="training"),
    )
    if held_names:
        keep(
            "RMSE by lead time at held-out stations; baselines are interpolated with a lapse rate.",
            "skill_held_out",
            report.skill_by_lead(here, stations="held_out"),
        )
    if ratios.ratio.notna().any():
        keep(
            "RMSE relative to VAR ridge.",
            "scorecard",
            report.scorecard(ratios, stations="training", reference="VAR ridge"),
        )
    lead = min(leads, key=lambda x: abs(x - 24))
    by = verify.score(ours, grid, protocol, model="earth-o1", columns=table.columns, by_station=True)
    column = next((c for c, m in table.columns.items() if m.variable == targets[0]), targets[0])
    rows = by[(by.lead_hours == lead) & (by.variable == column)].set_index("station").rmse if "station" in by else None
    if rows is not None and len(rows):
        rows = rows.reindex(ours.station.values)
        keep(
            f"RMSE of {column} at {lead:g} h by station.",
            "stations",
            report.station_map(
                ours.latitude.values,
                ours.longitude.values,
                rows.to_numpy(),
                label=f"RMSE of {column}",
                names=[str(s) for s in ours.station.values],
                held_out=held_names,
            ),
        )
    shown = [h for h in (6.0, 24.0) if h in leads] or [leads[0]]
    keep(
        f"{column} at one station: forecasts with 50 and 90 % intervals.",
        "series",
        report.time_series(
            ours, grid, station=inside.platforms[0], variable=targets[0], leads=shown, columns=table.columns
        ),
    )
    pit = verify.pit_values(ours.sel(station=list(inside.platforms)), grid, protocol, variables=targets)
    keep("Calibration of the spread over all leads.", "calibration", report.calibration(pit))
    metrics = pd.DataFrame(training.read_metrics(out / "training" / "member0" / "forecast" / "metrics.jsonl"))
    if {"mse", "mse_base"} <= set(metrics):
        keep(
            "Training: squared error of the mean in units of the propagator's error.",
            "training",
            report.loss_curve(metrics.filter(["step", "mse", "mse_base"]), smooth=10),
        )
    origin = report.provenance(
        data=[args.observations], protocol=protocol, seeds=[args.seed], extra={"platform": jax.default_backend()}
    )
    best = ratios[(ratios.variable == "mean") & (ratios.stations == "training")]
    summary = f"Mean RMSE over VAR ridge's at training stations: {best.ratio.iloc[0]:.3f}." if len(best) else ""
    table_scores = scores.pivot_table(
        index=["stations", "variable", "lead_hours"], columns="model", values="rmse", sort=False
    ).reset_index()
    report.write_report(
        out / "report.html",
        title=f"Forecast verification: {pathlib.Path(args.observations).name}",
        summary=summary,
        origin=origin,
        sections=[
            report.Section("Figures", figures=made),
            report.Section(
                "Scores", tables=[("RMSE in the file's units", table_scores), ("Ratio to VAR ridge", ratios)]
            ),
            report.Section("Reading", text=str(table.report)),
            report.Section(
                "Choices on validation hours", text=json.dumps({k: np.round(v, 3).tolist() for k, v in chosen.items()})
            ),
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main())
