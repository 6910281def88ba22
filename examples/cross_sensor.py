"""One sensor from the others: radiation and UV index from thermometer, hygrometer, barometer, anemometer and gauge.

    python examples/cross_sensor.py --observations stations.parquet --protocol PROTOCOL.json --out out/cross

The model is trained to reconstruct the denied sensors (`--targets`) at the same hour from what the other sensors of the
whole network report, and scored at training stations and at held-out stations (which give their other sensors and were
never trained on), beside gradient boosting on the same inputs. Hours with the sun up count. OUT receives
cross_sensor.csv (variable, stations, model, rmse, n) and cross_sensor.png. A protocol to start from is
configs/protocols/stations-v1.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from earth import geometry, report
from earth.baselines import BaselineError, Panel, fit_cross_sensor
from earth.baselines.boosting import solar_cosine
from earth.forecast import predict, save_model, sites, streams_of
from earth.model import EarthConfig
from earth.network import NetworkConfig
from earth.objectives import ObjectiveConfig
from earth.observations import EmptyWindowError, MissingVariableError, ObservationError, base_platform
from earth.protocol import Protocol, ProtocolError
from earth.readers import read_stations
from earth.train import StageConfig, TrainConfig, fill_heights, prepare, train
from earth.windows import StreamConfig
from moe.checkpoint import CheckpointError
from moe.training import DivergedError

ERRORS = (ObservationError, ProtocolError, BaselineError, CheckpointError, DivergedError, FileNotFoundError)
INPUTS = ("t2m", "td2m", "rh", "ps", "ws", "u", "v", "gust", "precip")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", required=True)
    parser.add_argument("--protocol", required=True)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--inputs", nargs="+", default=list(INPUTS), help="columns of the sensors that are read")
    parser.add_argument("--targets", nargs="+", default=["swdown", "uvi"], help="columns of the denied sensors")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=96, help="of the network, a multiple of 4")
    parser.add_argument("--layers", type=int, default=2, help="of the network's encoder")
    parser.add_argument("--batch", type=int, default=64, help="hours of a training step")
    parser.add_argument("--trees", type=int, default=500, help="rounds of the gradient boosting beside it")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> pd.DataFrame:
    args.out.mkdir(parents=True, exist_ok=True)
    table = read_stations(args.observations)
    record, _ = fill_heights(table.reports)
    protocol = Protocol.load(args.protocol)
    inputs, targets = ([table.variable(c) for c in names] for names in (args.inputs, args.targets))
    twice = sorted(set(inputs) & set(targets))
    if twice:
        raise MissingVariableError(f"{twice} are both inputs and targets; a denied sensor is read by nobody: drop one")
    inside = record.select(platforms=[p for p in record.platforms if base_platform(p) not in protocol.held_out])
    seen = np.atleast_1d(np.isfinite(inside.values[protocol.role(inside.times) == "train"]).any(0))
    for column, name in zip((*args.inputs, *args.targets), (*inputs, *targets), strict=True):
        if not seen[inside.index([name])[0]]:
            raise MissingVariableError(
                f"column {column!r} has no value at the training stations in training hours; leave it out"
            )
    if not (protocol.role(record.times) == "test").any():
        raise EmptyWindowError(
            f"no report lies in the test intervals of {args.protocol}; the record runs from {record.times.min()} to "
            f"{record.times.max()}: choose them inside it"
        )
    cadence = record.cadence() / 3600
    slots = tuple(s * cadence for s in (0.0, 1.0, 2.0, 3.0, 6.0))
    stream = StreamConfig("station", (*inputs, *targets), slots=slots, tolerance=cadence, tokens=len(inside.platforms))
    cfg = EarthConfig(
        streams=(stream,),
        targets=(),
        leads=(cadence,),
        network=NetworkConfig(width=args.width, encoder_layers=args.layers, dropout=0.05),
    )
    objective = ObjectiveConfig(
        hide_site=0.05, hide_instrument=0.05, mixup=0.0, auxiliary=1.0, analysis=1.0, denied=tuple(targets)
    )
    stage = StageConfig("reconstruct", args.steps, ((0.0,),), objective, learning_rate=2e-3)
    data = prepare({"station": inside}, cfg, protocol)
    params = train(data, TrainConfig((stage,), batch=args.batch, seed=args.seed), args.out / "training")
    save_model(args.out / "model", params, cfg, meta={"denied": targets, "protocol": protocol.to_dict()})

    # Every station gives its other sensors; the denied ones are nobody's input.
    values = np.array(record.values)
    values[:, record.index(targets)] = np.nan
    streams = streams_of(params, cfg, {"station": dataclasses.replace(record, values=values)})
    panel = Panel.from_grid(record.select(variables=[*inputs, *targets]).grid())
    tests = panel.times[protocol.role(panel.times) == "test"]
    place = sites(panel.latitude, panel.longitude, panel.height)
    mean, _ = predict(params, cfg, streams, geometry.seconds(tests), [0.0], place)
    rows = np.searchsorted(panel.times, tests)
    up = solar_cosine(tests[:, None], panel.latitude[None], panel.longitude[None]) > 0
    held = np.isin([base_platform(s) for s in panel.stations], protocol.held_out)
    # Parts of a station that moved (`NAME@2`) are held out with it.
    split = dataclasses.replace(protocol, held_out=[s for s, out in zip(panel.stations, held, strict=True) if out])
    out = []
    for column, name in zip(args.targets, targets, strict=True):
        mapping = table.columns[column]
        truth = panel.values[rows][..., panel.variables.index(name)]
        ours = np.maximum(mean[:, 0, :, cfg.channels.index(("station", name))], 0.0)
        boosted = fit_cross_sensor(panel, split, name, inputs, iterations=args.trees).predict(panel)[rows]
        geometric = fit_cross_sensor(panel, split, name, iterations=args.trees).predict(panel)[rows]
        for model, predicted in (("earth-o1", ours), ("gradient boosting", boosted), ("sun geometry", geometric)):
            for group, chosen in (("training", ~held), ("held_out", held)):
                if not chosen.any():
                    continue
                error = np.where(up, predicted - truth, np.nan)[:, chosen] / mapping.scale
                n = int(np.isfinite(error).sum())
                out.append(
                    {
                        "variable": column,
                        "stations": group,
                        "model": model,
                        "rmse": np.sqrt(np.nanmean(error**2)) if n else np.nan,
                        "n": n,
                    }
                )
    result = pd.DataFrame(out)
    result.to_csv(args.out / ".cross_sensor.csv", index=False)
    (args.out / ".cross_sensor.csv").replace(args.out / "cross_sensor.csv")
    print(
        result.pivot_table(index=["variable", "stations"], columns="model", values="rmse", sort=False)
        .round(3)
        .to_string()
    )
    (args.out / "cross_sensor.png").write_bytes(report.png(bars(result)))
    return result


def bars(result: pd.DataFrame) -> Figure:
    """RMSE of each model at training and held-out stations, a panel per variable."""
    variables, models = list(dict.fromkeys(result.variable)), list(dict.fromkeys(result.model))
    figure = Figure(figsize=(3.6 * len(variables), 3.2), layout="constrained")
    for axis, variable in zip(figure.subplots(1, len(variables), squeeze=False)[0], variables, strict=True):
        part = result[result.variable == variable].pivot_table(
            index="stations", columns="model", values="rmse", sort=False
        )[models]
        for i, model in enumerate(models):
            axis.bar(np.arange(len(part)) + 0.27 * (i - 1), part[model], 0.25, label=model, color=report.PALETTE[i])
        axis.set_xticks(range(len(part)), [str(s).replace("_", " ") for s in part.index])
        axis.set(title=variable, ylabel="RMSE, in the file's units")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
