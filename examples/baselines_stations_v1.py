"""The baselines of the protocol stations-v1, printed beside their documented scores.

    python examples/baselines_stations_v1.py --observations taiwan_hourly_2020-06_2021-12.parquet --out OUT

reads a table of station reports (one row per station and time: time, station, lat, lon, elev, one column per variable),
fits climatology, persistence, anomaly persistence, AR ridge and VAR ridge under the protocol, nowcasts the held-out
stations by interpolation, and prints RMSE, the documented value and their ratio. `--boosting 0 1 2 3 4` adds pooled
gradient boosting, averaged over five draws of its training rows (a quarter of an hour), `--cross-sensor` the models of
radiation and UV index from the other sensors. OUT receives scores.csv and skill.png. Another table and protocol work as
well: scores without a documented value are then printed alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from earth import report, verify
from earth.baselines import (
    MODELS,
    Panel,
    fit_baselines,
    fit_cross_sensor,
    interpolate_panel,
)
from earth.baselines.boosting import BoostingConfig
from earth.protocol import Protocol
from earth.readers.stations import read_stations

ROOT = Path(__file__).resolve().parent.parent
LEADS = (1, 3, 6, 12, 24, 48)
# RMSE in the file's units by lead: the project's data notes, section 2b.
DOCUMENTED: dict[str, dict[str, tuple[float, ...]]] = {
    "climatology": {
        "t2m": (2.367,) * 6,
        "td2m": (2.537,) * 6,
        "ps": (5.200,) * 6,
        "u": (1.887,) * 6,
        "v": (2.297,) * 6,
    },
    "persistence": {
        "t2m": (0.774, 1.750, 2.779, 3.499, 2.127, 2.908),
        "td2m": (0.594, 1.034, 1.456, 1.976, 2.433, 3.294),
        "ps": (0.465, 1.167, 1.727, 1.720, 2.649, 4.306),
        "u": (0.979, 1.454, 1.909, 2.320, 2.194, 2.595),
        "v": (1.018, 1.487, 1.886, 2.310, 2.530, 3.092),
    },
    "anomaly_persistence": {
        "t2m": (0.615, 1.124, 1.548, 1.898, 2.116, 2.886),
        "td2m": (0.586, 0.994, 1.371, 1.877, 2.424, 3.276),
        "ps": (0.280, 0.580, 0.938, 1.552, 2.642, 4.292),
        "u": (0.959, 1.342, 1.654, 1.978, 2.193, 2.592),
        "v": (1.008, 1.428, 1.749, 2.130, 2.530, 3.090),
    },
    "ar": {
        "t2m": (0.590, 1.038, 1.354, 1.549, 1.818, 2.253),
        "td2m": (0.569, 0.923, 1.219, 1.573, 1.989, 2.457),
        "ps": (0.267, 0.531, 0.833, 1.370, 2.360, 3.967),
        "u": (0.873, 1.175, 1.394, 1.568, 1.713, 1.882),
        "v": (0.942, 1.282, 1.520, 1.766, 1.990, 2.241),
    },
    "var": {
        "t2m": (0.566, 0.973, 1.250, 1.447, 1.738, 2.285),
        "td2m": (0.565, 0.879, 1.100, 1.386, 1.910, 2.453),
        "ps": (0.270, 0.551, 0.840, 1.417, 2.551, 4.122),
        "u": (0.854, 1.121, 1.321, 1.532, 1.791, 1.949),
        "v": (0.927, 1.227, 1.436, 1.663, 1.963, 2.280),
    },
    "boosting": {
        "t2m": (np.nan, np.nan, 1.292, 1.587, 1.976, 2.492),
        "td2m": (np.nan, np.nan, 1.162, 1.542, 2.068, 2.629),
        "ps": (np.nan, np.nan, 0.954, 1.675, 3.063, 3.494),
        "u": (np.nan, np.nan, 1.368, 1.530, 1.826, 1.979),
        "v": (np.nan, np.nan, 1.504, 1.774, 2.071, 2.155),
    },
}
NOWCAST = {
    "nearest": {"t2m": 8.57, "td2m": 9.12, "u": 3.46, "v": 2.77},
    "idw": {"t2m": 9.17, "td2m": 9.61, "u": 2.99, "v": 2.79},
    "lapse_idw": {"t2m": 3.88, "td2m": 4.29, "u": 3.78, "v": 4.02},
}
MET = ("t2m", "td2m", "rh", "ps", "ws", "u", "v", "gust", "precip")
CROSS = {
    ("swdown", ()): (0.756, 0.799),
    ("swdown", MET): (0.428, 0.683),
    ("uvi", ()): (2.086, 2.376),
    ("uvi", MET): (1.231, 2.185),
}


def beside(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the documented value and the ratio of each row; the protocol must be stations-v1's."""

    def documented(row: dict[str, Any]) -> float:
        by_lead = DOCUMENTED.get(row["model"], {}).get(row["variable"], ())
        known = dict(zip(LEADS, by_lead, strict=False))
        return known.get(row["lead_hours"], np.nan) if row["stations"] == "training" else np.nan

    out = table.filter(["model", "variable", "lead_hours", "stations", "units", "n", "rmse", "crps", "coverage"])
    out["documented"] = [documented(row) for row in table.to_dict("records")]
    out["ratio"] = out["rmse"] / out["documented"]
    return out


def boosting(
    panel: Panel, protocol: Protocol, leads: list[float], seeds: list[int], columns: dict[str, Any]
) -> pd.DataFrame:
    """Scores of pooled boosting, their mean over the seeds; prints how single cells move with the rows drawn."""
    tables = []
    for seed in seeds:
        options = {"boosting": {"config": BoostingConfig(seed=seed)}}
        boosted = fit_baselines(panel, protocol, models=("boosting",), leads=leads, options=options, progress=True)
        table = verify.score(boosted.forecast("boosting"), panel.to_grid(), protocol, model="boosting", columns=columns)
        tables.append(table)
    if len(seeds) > 1:
        each = pd.concat(tables, keys=seeds, names=["seed"]).reset_index("seed")
        cells = each.groupby(["variable", "lead_hours"])["rmse"].agg(["mean", "std", "min", "max"])
        print(f"\nboosting, RMSE over {len(seeds)} draws of the training rows\n{cells.round(3).to_string()}")
    return tables[0].assign(rmse=np.mean([table["rmse"].to_numpy() for table in tables], 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", required=True, help="table of station reports (parquet, CSV, ...)")
    parser.add_argument("--protocol", default=str(ROOT / "configs" / "protocols" / "stations-v1.json"))
    parser.add_argument("--out", default="baselines", help="folder for scores.csv and skill.png")
    parser.add_argument("--leads", type=float, nargs="+", help="hours; default: the protocol's")
    parser.add_argument(
        "--boosting", type=int, nargs="*", metavar="SEED",
        help="add pooled gradient boosting at leads from 6 h (minutes a seed; default 0); the scores of several seeds, "
        "which draw other training rows, are averaged",
    )  # fmt: skip
    parser.add_argument("--cross-sensor", action="store_true", help="add radiation and UV index from the other sensors")
    arguments = parser.parse_args()

    protocol = Protocol.load(arguments.protocol)
    documented = protocol.name == "stations-v1"
    stations = read_stations(arguments.observations)
    print(stations.report)
    record = Panel.from_grid(stations.reports.grid())
    names = [v for v in (protocol.variables or record.variables) if v in record.variables]
    panel = record.select(variables=names)
    observed = panel.to_grid()
    leads = tuple(arguments.leads or protocol.leads)

    started = time.perf_counter()
    baselines = fit_baselines(panel, protocol, leads=leads, progress=True)
    print(f"{', '.join(MODELS)} fitted in {time.perf_counter() - started:.0f} s")
    climatology = baselines.forecast("climatology")
    tables = []
    for model in MODELS:
        forecast = baselines.forecast(model)
        tables.append(
            verify.score(forecast, observed, protocol, model=model, columns=stations.columns, climatology=climatology)
        )
    held_out = [s for s in protocol.held_out if s in panel.stations]
    if held_out:
        there = panel.select(stations=held_out)
        carried = baselines.forecast_at("var", there)
        tables.append(verify.score(carried, observed, protocol, model="var + lapse_idw", columns=stations.columns))
    if arguments.boosting is not None:
        tables.append(
            boosting(panel, protocol, [h for h in leads if h >= 6], arguments.boosting or [0], stations.columns)
        )
    scores = pd.concat(tables, ignore_index=True)

    pd.set_option("display.width", 160, "display.max_rows", 500)
    plain = scores.filter(["model", "variable", "lead_hours", "stations", "n", "rmse"])
    shown = beside(scores) if documented else plain
    print(shown.round(3).to_string(index=False, na_rep="-"))
    if documented:
        print(f"largest departure from the documented RMSE: {100 * np.nanmax(np.abs(shown['ratio'] - 1)):.2f} %")
    mean = scores.loc[scores["lead_hours"].isin((6, 12, 24, 48)) & (scores["stations"] == "training")]
    wide = mean.pivot_table(index=["variable", "lead_hours"], columns="model", values="rmse")
    print("\nmean over variables and leads 6, 12, 24, 48 h of RMSE / VAR ridge's RMSE")
    print(wide.div(wide["var"], axis=0).mean().round(3).to_string())

    if held_out:
        print("\nnowcast of the held-out stations from the others, test hours")
        sources, targets = panel.without(held_out), panel.select(stations=held_out)
        test = protocol.role(panel.times) == "test"
        shows = verify.displays(stations.columns, panel.variables)
        for method in ("nearest", "idw", "lapse_idw"):
            error = (interpolate_panel(sources, targets, method=method) - targets.values)[test]
            for v, name in enumerate(panel.variables):
                rmse = float(np.sqrt(verify.masked_mean(error[..., v] ** 2))) / shows[name].scale
                known = NOWCAST[method].get(shows[name].label, np.nan) if documented else np.nan
                print(f"{method:10s} {shows[name].label:6s} {rmse:8.3f} {known:8.2f} {rmse / known:7.3f}")

    if arguments.cross_sensor:
        print("\ncross-sensor: RMSE at training and held-out stations, documented, ratio")
        role = protocol.role(record.times) == "test"
        for (target, inputs), known in CROSS.items():
            if target not in stations.columns or not set(inputs) <= set(stations.columns):
                continue
            variable, scale = stations.columns[target].variable, stations.columns[target].scale
            model = fit_cross_sensor(record, protocol, variable, [stations.columns[c].variable for c in inputs])
            error = (model.predict(record) - record.select(variables=[variable]).values[..., 0])[role] / scale
            held = np.isin(record.stations, held_out)
            found = [float(np.sqrt(verify.masked_mean(error[:, k] ** 2))) for k in (~held, held)]
            what = "geometry + sensors" if inputs else "geometry"
            print(
                f"{target:7s} {what:18s}",
                *(f"{f:7.3f} {k:7.3f} {f / k:6.3f}" for f, k in zip(found, known, strict=True)),
            )

    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    scores.to_csv(out / "scores.csv", index=False)
    figure = report.skill_by_lead(scores, stations="training", title=f"Baselines, {protocol.name}", bands=("var",))
    figure.savefig(out / "skill.png", dpi=150)
    print(f"wrote {out / 'scores.csv'} and {out / 'skill.png'}")


if __name__ == "__main__":
    main()
