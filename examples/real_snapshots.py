"""Real observations, held out and predicted: sounder channels, airports, radiosonde levels and stations.

    python examples/real_snapshots.py --data DIR --out OUT [--parts hirs metar sondes] [--tiny]

hirs    One orbit of an infrared sounder. Segments of scan lines are held out of everything; there one channel at a time
        is hidden and predicted from the other channels of the segment, beside ridge regression and gradient boosting.
metar   Reports of airports around the globe. Temperature at held-out airports, beside lapse rate + inverse distance,
        and kriging with a drift in height.
sondes  Soundings of one time. Temperature at hidden levels between the given ones of a sounding, and of held-out
        soundings as a whole, beside kriging with a drift in height.

The model is `earth.world.snapshot`: departures from a first guess in closed form, itself one of the baselines. All
choices of the baselines are made by validation inside the training part of every hold-out, and the first guess of the
model is what they come to. OUT receives PART.csv (target, model, RMSE and mean absolute error with 90 % intervals by a
bootstrap over blocks in space, ratio to the best baseline) and PART.png. `--tiny` shrinks everything to a check that it
runs; its scores mean nothing. Hold-outs that are in OUT already (PART_blocks.parquet) are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.ensemble import HistGradientBoostingRegressor

from earth import report
from earth.baselines.spatial import interpolate
from earth.observations import ObservationError, Reports
from earth.readers import read_stations
from earth.verify import resampling_weights
from earth.world import NetworkConfig, SensorConfig
from earth.world.guess import KrigingConfig, RidgeConfig, krige
from earth.world.snapshot import (
    Fitted,
    SceneField,
    Scenes,
    SnapshotConfig,
    SnapshotTrainConfig,
    first_guess,
    fit,
    reconstruct,
    train,
)
from moe.training import DivergedError

FILES = {
    "hirs": "hirs_metop_orbit_20181122.parquet",
    "metar": "metar_global_2020100106.parquet",
    "sondes": "pdbufr_temp.parquet",
}
OURS = "earth.world snapshot"
CHANNELS = (5, 8, 11, 12)
LINES, GUARD = 16, 3
ROWS = 12_000  # that gradient boosting is fitted to, at most


@dataclasses.dataclass(frozen=True)
class Budget:
    """Hold-outs, model seeds of the first of them (the others have one), steps, reports of a scene, width, trees and
    bootstrap draws.
    """

    holdouts: int = 3
    seeds: int = 2
    steps: int = 800
    tokens: int = 256
    width: int = 48
    trees: int = 100
    draws: int = 2000


TINY = Budget(holdouts=1, seeds=1, steps=3, tokens=48, width=16, trees=5, draws=50)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=pathlib.Path, help="folder of the files")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--parts", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument("--tiny", action="store_true")
    for name, file in FILES.items():
        parser.add_argument(f"--{name}", default=file, help="file of this part below the folder (default: %(default)s)")
    parser.add_argument("--channels", nargs="+", type=int, default=list(CHANNELS), help="of the sounder, to predict")
    parser.add_argument("--sounder", default="hirs4", help="name in earth.sensors")
    for field in dataclasses.fields(Budget):
        parser.add_argument(f"--{field.name}", type=int, help="default: " + str(field.default))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Budget)}
    budget = dataclasses.replace(TINY if args.tiny else Budget(), **{k: v for k, v in given.items() if v is not None})
    parts: dict[Any, Callable[[int], pd.DataFrame]] = {
        "hirs": lambda h: hirs(args.data / args.hirs, args.sounder, args.channels, h, budget),
        "metar": lambda h: metar(args.data / args.metar, h, budget),
        "sondes": lambda h: sondes(args.data / args.sondes, h, budget),
    }
    try:
        missing = [str(args.data / getattr(args, p)) for p in args.parts if not (args.data / getattr(args, p)).exists()]
        if missing:
            raise FileNotFoundError(
                f"no {', '.join(missing)}; pass the folder with --data and other names with --{args.parts[0]} NAME, or "
                "leave parts out with --parts"
            )
        args.out.mkdir(parents=True, exist_ok=True)
        for holdout, part in itertools.product(range(budget.holdouts), list[str](args.parts)):
            path = args.out / f"{part}_blocks.parquet"
            found: Any = pd.read_parquet(path) if path.exists() else pd.DataFrame({"holdout": []})
            if holdout not in set(found["holdout"]):
                made = parts[part](holdout)
                found = pd.concat([found, made], ignore_index=True) if len(found) else made
                write(path, found.to_parquet)
            scores = table(found, budget.draws)
            write(args.out / f"{part}.csv", functools.partial(scores.to_csv, index=False))
            text = scores.round(4).to_string(index=False)
            print(f"\n{part}, {holdout + 1} of {budget.holdouts}\n{text}", flush=True)
            drawn = report.png(picture(scores, TITLES[part]))
            write(args.out / f"{part}.png", lambda path, drawn=drawn: path.write_bytes(drawn))
    except (ObservationError, DivergedError, FileNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def write(path: pathlib.Path, save: Callable[[pathlib.Path], Any]) -> None:
    """Whole or not at all."""
    save(path.with_name("." + path.name))
    path.with_name("." + path.name).replace(path)


# ------------------------------------------------------------------------------------------------------------- scores
def errors_of(target: str, model: str, holdout: int, seed: int, block: np.ndarray, error: np.ndarray) -> pd.DataFrame:
    """Sums of an error [n] by block: columns target, model, holdout, seed, block, square, absolute, n."""
    known = np.isfinite(error)
    frame = pd.DataFrame({"block": block[known], "square": error[known] ** 2, "absolute": np.abs(error[known]), "n": 1})
    sums: Any = frame.groupby("block", as_index=False).sum()
    return sums.assign(target=target, model=model, holdout=holdout, seed=seed)


def table(errors: pd.DataFrame, draws: int) -> pd.DataFrame:
    """RMSE and MAE of each target and model, pooled over hold-outs and seeds, with 90 % intervals from resampling
    blocks, the same ones in all hold-outs and models; `ratio` is RMSE over that of the best baseline of the target, in
    the same resamples; `spread` the standard deviation of RMSE over hold-outs, `spread_seed` over a hold-out's seeds.
    """
    rows = []
    for target, part in errors.groupby("target", sort=False):
        blocks = np.unique(part["block"])
        weights = resampling_weights(len(blocks), draws, 0)
        sums: dict[Any, Any] = {}
        own: Any
        for model, own in part.groupby("model", sort=False):
            share = own.groupby("holdout")["seed"].transform("nunique")
            s = own[["square", "absolute", "n"]].div(share, axis=0).groupby(own["block"]).sum()
            s = s.reindex(blocks, fill_value=0).to_numpy(float)
            sums[model] = (np.sqrt(s[:, 0].sum() / s[:, 2].sum()), s)
        baselines = [m for m in sums if not str(m).startswith(OURS)]
        best = min(baselines, key=lambda m: sums[m][0])
        drawn = {m: np.sqrt((weights @ s[:, 0]) / np.maximum(weights @ s[:, 2], 1)) for m, (_, s) in sums.items()}
        for model, (rmse, s) in sums.items():
            own = part[part["model"] == model]
            each = own.groupby(["holdout", "seed"])[["square", "n"]].sum()
            each = np.sqrt(each["square"] / each["n"])
            mae = (weights @ s[:, 1]) / np.maximum(weights @ s[:, 2], 1)
            ratio = drawn[model] / np.maximum(drawn[best], 1e-12)
            low, high = np.quantile(drawn[model], (0.05, 0.95))
            rows.append(
                {
                    "target": target, "model": model, "rmse": rmse, "low": low, "high": high,
                    "mae": s[:, 1].sum() / s[:, 2].sum(), "mae_low": np.quantile(mae, 0.05),
                    "mae_high": np.quantile(mae, 0.95), "best": best, "ratio": rmse / sums[best][0],
                    "ratio_low": np.quantile(ratio, 0.05), "ratio_high": np.quantile(ratio, 0.95),
                    "spread": each.groupby("holdout").mean().std(ddof=0),
                    "spread_seed": each.groupby("holdout").std(ddof=0).mean(),
                    "n": round(s[:, 2].sum()), "blocks": len(blocks),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


TITLES = {
    "hirs": "HIRS/4 channels predicted from the others, K",
    "metar": "Temperature at held-out airports, K",
    "sondes": "Radiosonde temperature, K",
}


def picture(scores: pd.DataFrame, title: str) -> Figure:
    """RMSE with its interval, a panel per target; in brackets the ratio to the best baseline."""
    targets = list(dict.fromkeys(scores["target"]))
    columns = min(4, len(targets))
    rows = -(-len(targets) // columns)
    models = list(dict.fromkeys(scores["model"]))
    colours = dict(zip(models, itertools.cycle(report.PALETTE), strict=False))
    size = (max(5.5, 2.7 * columns + 1.2), 0.9 + (0.5 + 0.24 * len(models)) * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, (axis, target) in enumerate(zip(axes, targets, strict=False)):
        part = scores[scores["target"] == target].set_index("model")
        there = [m for m in models if m in part.index]
        for i, model in enumerate(there):
            x, low, high = part.loc[model, ["rmse", "low", "high"]].astype(float)
            axis.plot([low, high], [i, i], color=colours[model], lw=2.0)
            axis.plot(x, i, "o", color=colours[model], ms=5)
            text = f"{x:.3g}" if model == part["best"].iloc[0] else f"{x:.3g}  (× {part.loc[model, 'ratio']:.2f})"
            axis.annotate(text, (x, i), (0, 4), textcoords="offset points", ha="center", fontsize=7)
        axis.set(ylim=(len(there) - 0.4, -0.8))
        axis.margins(x=0.2)
        axis.set_title(target, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_yticks(range(len(there)), there, fontsize=7)
        if number % columns and part.index.equals(scores[scores["target"] == targets[0]].set_index("model").index):
            axis.tick_params(labelleft=False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
    for axis in axes[len(targets) :]:
        axis.set_visible(False)
    figure.suptitle(f"{title}: RMSE and 90 % interval", fontsize=10)
    return figure


def boxes(latitude: np.ndarray, longitude: np.ndarray, degrees: float) -> np.ndarray:
    """Number of the box of each point, about square."""
    row = np.floor((latitude + 90) / degrees).astype(int)
    count = np.maximum(1, np.round(360 / degrees * np.cos(np.deg2rad((row + 0.5) * degrees - 90)))).astype(int)
    return row * 1000 + np.floor((longitude + 180) / 360 * count).astype(int) % count


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.nanmean(np.square(x))))


# --------------------------------------------------------------------------------------------------------------- hirs
def hirs(path: pathlib.Path, sounder: str, channels: Sequence[int], holdout: int, budget: Budget) -> pd.DataFrame:
    """Errors of channels that are hidden in held-out segments of an orbit."""
    r = read_stations(path, sensor=sounder).reports
    r = r.select(variables=[v for v in r.variables if np.isfinite(r.values[:, r.variables.index(v)]).mean() > 0.5])
    names = [f"brightness_temperature:{c}" for c in channels]
    names = [n for n in names if n in r.variables] or list(r.variables)
    line = np.unique(r.time, return_inverse=True)[1]
    segment = line // LINES
    out = []
    rng = np.random.default_rng([11, holdout])
    order = rng.permutation(np.unique(segment))
    count = max(1, len(order) // 7)
    test, validation = np.isin(segment, order[:count]), np.isin(segment, order[count : 2 * count])
    outer, inner = _clear(line, test), _clear(line, test | validation)
    known = {sounder: r.take(outer)}
    cfg = SnapshotConfig(
        sensors=(SensorConfig(sounder, r.variables, budget.tokens),),
        field=SceneField(
            anchors=budget.tokens, length_km=20.0, core=0.6, neighbours=min(8, budget.tokens),
            reach=min(12, budget.tokens),
        ),
        network=NetworkConfig(width=budget.width, heads=8, key=8, dynamics_layers=0), normal_rows=3000,
    )  # fmt: skip
    # penalties of the normal and of the regression see the inner part alone while they are compared
    normals = fit({sounder: r.take(inner)}, cfg).normals
    grid = [RidgeConfig(d, *k) for d in (1, 2) for k in ((0, False), (8, False), (8, True))]
    trials = []
    for choice in grid:
        trial = _with_guess(cfg, sounder, choice)
        fitted = fit({sounder: r.take(inner)}, trial, normals=normals)
        trials.append(_ridge(fitted, r.take(validation), names, trial))
    relative = np.array([[rms(e) for e in t] for t in trials])
    relative = relative / relative.min(0)
    best = grid[int(relative.mean(1).argmin())]
    linear = [i for i, g in enumerate(grid) if g.degree == 1 and not g.nearby]
    plain = grid[linear[int(relative[linear].mean(1).argmin())]]
    cfg = _with_guess(cfg, sounder, best)
    fitted = fit(known, cfg)
    where, block = r.take(test), segment[test]
    scored = {"ridge, own channels": _with_guess(cfg, sounder, plain), "ridge, tuned": cfg}
    for model, one in scored.items():
        own = fit(known, one, normals=fitted.normals)
        for name, error in zip(names, _ridge(own, where, names, one), strict=True):
            out.append(errors_of(_channel(name), model, holdout, 0, block, error))
    for name in names:
        error = _boosted(r, name, cfg, (inner, validation), (outer, test), (normals, fitted), budget)
        out.append(errors_of(_channel(name), "gradient boosting", holdout, 0, block, error))
    for seed in range(budget.seeds if not holdout else 1):
        params = train(known, fitted, cfg, _training(budget, 100 * holdout + seed, variables=4))
        for name in names:
            hidden = _only(where, name)
            column = where.variables.index(name)
            mean, _ = reconstruct(params, {sounder: where}, {sounder: hidden}, cfg=cfg)[sounder]
            error = mean[:, column] - where.values[:, column]
            out.append(errors_of(_channel(name), OURS, holdout, seed, block, error))
    return pd.concat(out)


def _channel(name: str) -> str:
    return "channel " + name.partition(":")[2]


def _clear(line: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Rows at least GUARD lines away from those that are held out."""
    near = np.unique(line[out])[:, None] + np.arange(-GUARD, GUARD + 1)
    return ~np.isin(line, near)


def _with_guess(cfg: SnapshotConfig, sensor: str, guess: RidgeConfig | KrigingConfig) -> SnapshotConfig:
    return dataclasses.replace(cfg, guesses=((sensor, guess),))


def _training(budget: Budget, seed: int, **hide: Any) -> SnapshotTrainConfig:
    return SnapshotTrainConfig(steps=budget.steps, learning_rate=3e-3, seed=seed, **hide)


def _only(r: Reports, *names: str) -> np.ndarray:
    hidden = np.zeros(r.values.shape, bool)
    hidden[:, r.index(names)] = True
    return hidden


def _ridge(fitted: Fitted, where: Reports, names: Sequence[str], cfg: SnapshotConfig) -> list[np.ndarray]:
    """Errors of the regression of each channel, with that channel alone hidden."""
    out = []
    for name in names:
        mean, _ = first_guess(fitted, {where.sensor: where}, {where.sensor: _only(where, name)}, cfg=cfg)[where.sensor]
        column = where.variables.index(name)
        out.append(mean[:, column] - where.values[:, column])
    return out


def _boosted(
    r: Reports, name: str, cfg: SnapshotConfig, inner: Any, outer: Any, fits: tuple[Any, Fitted], budget: Budget
) -> np.ndarray:
    """Errors [test rows] of gradient boosting on the other channels, their means nearby and what ridge is told, of the
    channel itself or of the residual of the tuned ridge, whichever is better in the validation segments.
    """
    column = r.variables.index(name)
    hidden = _only(r, name)

    def data(fitted: Fitted, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        own = r.take(rows)
        mean, _ = first_guess(fitted, {r.sensor: own}, {r.sensor: hidden[rows]}, cfg=cfg)[r.sensor]
        blank = dataclasses.replace(own, values=np.where(hidden[rows], np.nan, own.values))
        x = Scenes({r.sensor: blank}, fitted, cfg).features(r.sensor)
        x = np.delete(x, [column, len(r.variables) + 5 + column], 1)  # the hidden channel itself: nothing but NaN
        return x, own.values[:, column].astype(float), mean[:, column]

    def run(fitted: Fitted, known: np.ndarray, asked: np.ndarray, on_ridge: bool) -> np.ndarray:
        (x, y, ridge), (x_asked, y_asked, ridge_asked) = data(fitted, known), data(fitted, asked)
        base, base_asked = (ridge, ridge_asked) if on_ridge else (0 * ridge, 0 * ridge_asked)
        there = np.flatnonzero(np.isfinite(y))
        there = np.random.default_rng(0).choice(there, min(len(there), ROWS), replace=False)
        model = HistGradientBoostingRegressor(
            max_iter=budget.trees, learning_rate=0.08, max_leaf_nodes=31, random_state=0,
            early_stopping=False,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        return model.fit(x[there], (y - base)[there]).predict(x_asked) + base_asked - y_asked

    trial = dataclasses.replace(fits[1], normals=fits[0])
    trial = fit({r.sensor: r.take(inner[0])}, cfg, normals=trial.normals)
    tried = [rms(run(trial, inner[0], inner[1], on_ridge)) for on_ridge in (False, True)]
    return run(fits[1], outer[0], outer[1], bool(tried[1] < tried[0]))


# -------------------------------------------------------------------------------------------------------------- metar
TEMPERATURE = "2m_temperature"
STATION = (TEMPERATURE, "2m_dewpoint_temperature")
NEIGHBOURS = 16
LENGTHS = {"horizontal_km": (150.0, 300.0, 600.0, 1200.0, 2400.0, 4800.0), "nugget": (0.005, 0.02, 0.05, 0.1, 0.2, 0.4)}


def metar(path: pathlib.Path, holdout: int, budget: Budget) -> pd.DataFrame:
    """Errors of temperature at held-out stations: of each the last report of the file that has one."""
    r = read_stations(path).reports
    r = r.select(variables=[v for v in STATION if v in r.variables])
    there = np.isfinite(r.height) & np.isfinite(r.values[:, r.variables.index(TEMPERATURE)])
    r = r.take(there)
    r = r.take(np.r_[r.platform[1:] != r.platform[:-1], True])
    column = r.variables.index(TEMPERATURE)
    truth, block = r.values[:, column].astype(float), boxes(r.latitude, r.longitude, 5.0)
    cfg = SnapshotConfig(
        sensors=(SensorConfig("station", r.variables, budget.tokens),),
        field=SceneField(
            anchors=budget.tokens, length_km=100.0, vertical_km=0.5, core=0.5, neighbours=min(12, budget.tokens),
            reach=min(16, budget.tokens),
        ),
        network=NetworkConfig(width=budget.width, heads=8, key=8, dynamics_layers=0),
        weights=tuple((v, 0.2) for v in r.variables if v != TEMPERATURE),
    )  # fmt: skip
    out = []
    rng = np.random.default_rng([12, holdout])
    role = rng.permutation(len(r)) % 5  # 0 is the test, 1 the validation of what is not tuned by leaving one out
    test = role == 0
    known = {"station": r.take(~test)}
    normals = fit(known, cfg).normals
    grid = {"vertical_m": (150.0, 300.0, 600.0, 1200.0, 2400.0, 4800.0), **LENGTHS}
    kriging = _Kriging(Fitted(normals), r, column, cfg)
    kernel = kriging.tune(~test, grid, KrigingConfig(neighbours=NEIGHBOURS))
    one = _with_guess(cfg, "station", kernel)
    fitted = fit(known, one, normals=normals)

    def idw(power: float, given: np.ndarray, asked: np.ndarray, least: float, method: str = "lapse_idw"):
        at = [x for rows in (given, asked) for x in (r.latitude[rows], r.longitude[rows], r.height[rows])]
        return interpolate(truth[given], *at, method=method, power=power, minimum_km=least) - truth[asked]

    options = list(itertools.product((1.5, 2.0, 3.0, 4.0), (1.0, 30.0, 100.0)))
    tried = [rms(idw(p, role > 1, role == 1, least)) for p, least in options]
    power, least = options[int(np.argmin(tried))]
    hidden = np.repeat(test[:, None], len(r.variables), 1)
    for model, error in (
        ("lapse + IDW", idw(2.0, ~test, test, 1.0)), ("lapse + IDW, tuned", idw(power, ~test, test, least)),
        ("kriging, tuned", kriging.errors(kernel, ~test, test)),
    ):  # fmt: skip
        out.append(errors_of("held-out airports", model, holdout, 0, block[test], error))
    for seed in range(budget.seeds if not holdout else 1):
        params = train(known, fitted, one, _training(budget, 100 * holdout + seed, reports=0.25, turn=30.0, lift=300.0))
        mean, _ = reconstruct(params, {"station": r}, {"station": hidden}, cfg=one)["station"]
        error = mean[test, column] - truth[test]
        out.append(errors_of("held-out airports", OURS, holdout, seed, block[test], error))
    return pd.concat(out)


class _Kriging:
    """Kriging of one variable of a sensor's reports, of anomalies from the normal."""

    def __init__(self, fitted: Fitted, r: Reports, column: int, cfg: SnapshotConfig):
        part = Scenes({r.sensor: r}, fitted, cfg).parts[r.sensor]
        self.place = [part[k] for k in ("latitude", "longitude", "height")]
        self.normal, self.deviation = part["normal"][:, column], part["deviation"][:, column]
        self.value = part["value"][:, [column]]

    def errors(
        self, kernel: KrigingConfig, given: np.ndarray, asked: np.ndarray, apart: np.ndarray | None = None
    ) -> np.ndarray:
        """Of the rows asked for, predicted from those given; a row, or with `apart` its label, never from itself."""
        shown = np.isfinite(self.value) & given[:, None]
        latitude, longitude, height = self.place
        filled = np.where(shown, self.value, 0.0)
        mean, _ = krige(kernel, latitude, longitude, height, filled, shown, wanted=asked, group=apart)
        return ((mean - self.value)[:, 0] * self.deviation)[asked]

    def tune(
        self,
        known: np.ndarray,
        grid: Mapping[str, Sequence[float]],
        start: KrigingConfig,
        apart: np.ndarray | None = None,
    ) -> KrigingConfig:
        """The kernel that predicts a draw of the known rows best, each (or its label) left out: one parameter after the
        other, twice around, then with and without drift and smoothness.
        """
        rows = np.flatnonzero(known & np.isfinite(self.value[:, 0]))
        asked = np.zeros(len(known), bool)
        asked[np.random.default_rng(0).choice(rows, min(len(rows), 1200), replace=False)] = True
        scores: dict[KrigingConfig, float] = {}

        def score(kernel: KrigingConfig) -> float:
            if kernel not in scores:
                scores[kernel] = rms(self.errors(kernel, known, asked, apart))
            return scores[kernel]

        best, options = start, tuple(grid.items())
        for key, values in (*options, *options, ("smooth", (False, True)), ("drift", (False, True))):
            best = min((dataclasses.replace(best, **{key: v}) for v in values), key=score)
        return best


# ------------------------------------------------------------------------------------------------------------- sondes
SOUNDING = ("temperature", "dewpoint_temperature")


def sondes(path: pathlib.Path, holdout: int, budget: Budget) -> pd.DataFrame:
    """Errors of temperature at hidden levels of soundings that are given, and of held-out soundings."""
    r = read_stations(path, sensor="radiosonde").reports
    r = r.select(variables=[v for v in SOUNDING if v in r.variables])
    column = r.variables.index("temperature")
    r = r.take(np.isfinite(r.pressure) & np.isfinite(r.values).any(1))
    truth, log_p = r.values[:, column].astype(float), np.log(r.pressure)
    block = boxes(r.latitude, r.longitude, 10.0)
    cfg = SnapshotConfig(
        sensors=(SensorConfig("radiosonde", r.variables, 3 * budget.tokens),),
        field=SceneField(
            anchors=3 * budget.tokens, length_km=500.0, vertical_km=1.0, core=0.5, neighbours=min(10, budget.tokens),
            reach=min(16, budget.tokens),
        ),
        network=NetworkConfig(width=budget.width, heads=8, key=8, dynamics_layers=0),
        weights=tuple((v, 0.2) for v in r.variables if v != "temperature"),
    )  # fmt: skip
    grid = {"vertical_m": (125.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0), **LENGTHS}
    out = []
    rng = np.random.default_rng([13, holdout])
    station = (rng.permutation(len(r.platforms)) % 5 == 0)[r.platform]
    level = ~station & (rng.random(len(r)) < 0.2)
    known = r.take(~station & ~level)
    normals = fit({"radiosonde": known}, cfg).normals
    hidden = np.repeat((station | level)[:, None], len(r.variables), 1)
    kriging, given = _Kriging(Fitted(normals), r, column, cfg), ~station & ~level
    levels = kriging.tune(given, grid, KrigingConfig(neighbours=NEIGHBOURS))
    stations = kriging.tune(given, grid, levels, apart=r.platform)
    between = _between(r, level, truth, log_p, ~station & ~level)
    asked_for = (("hidden levels", levels, np.isfinite(between)), ("held-out stations", stations, station))
    for target, kernel, rows in asked_for:
        one = _with_guess(cfg, "radiosonde", kernel)
        fitted = fit({"radiosonde": known}, one, normals=normals)
        found = {
            "normal": (kriging.normal - truth)[rows],
            "kriging, tuned": kriging.errors(kernel, given, rows),
            "kriging, 48 neighbours": kriging.errors(dataclasses.replace(kernel, neighbours=48), given, rows),
        }
        if target == "hidden levels":
            found["linear in ln p"] = (between - truth)[rows]
        for seed in range(budget.seeds if not holdout else 1):
            hide = {"reports": 0.2} if target == "hidden levels" else {"platforms": 0.2}
            hide |= {"turn": 10.0}
            params = train({"radiosonde": known}, fitted, one, _training(budget, 100 * holdout + seed, **hide))
            asked = np.repeat(rows[:, None], len(r.variables), 1)
            blank = dataclasses.replace(r, values=np.where(hidden, np.nan, r.values))
            mean, _ = reconstruct(params, {"radiosonde": blank}, {"radiosonde": asked}, cfg=one)["radiosonde"]
            error = (mean[:, column] - truth)[rows]
            out.append(errors_of(target, OURS, holdout, seed, block[rows], error))
        for model, error in found.items():
            out.append(errors_of(target, model, holdout, 0, block[rows], error))
    return pd.concat(out)


def _between(r: Reports, level: np.ndarray, truth: np.ndarray, log_p: np.ndarray, given: np.ndarray) -> np.ndarray:
    """[n] temperature linear in ln p between the given levels of the same sounding; NaN outside them and elsewhere."""
    out = np.full(len(r), np.nan)
    for platform in np.unique(r.platform[level]):
        own = r.platform == platform
        use, ask = own & given & np.isfinite(truth), own & level & np.isfinite(truth)
        if use.sum() > 1:
            order = np.argsort(log_p[use])
            out[ask] = np.interp(log_p[ask], log_p[use][order], truth[use][order], np.nan, np.nan)
    return out


if __name__ == "__main__":
    raise SystemExit(main())
