"""How fast Earth-o1 trains and forecasts on this machine, beside DeepSensor and beside the machine's own limit.

    python -m tests.bench [--peer PYTHON] [--model DIR]

Three tables, all on the hourly station record of ../shared/data, or on a synthetic network of its shape without it:

1. Observations per second of training, ours and DeepSensor's, on the same record, stations, variables, history slots,
   batch and cores, in turns. DeepSensor (extra `parity`) runs in a process of its own, whose interpreter `--peer`
   names when it is installed elsewhere. Where it is missing, its rows are missing and the output says so.
2. The time of a 48 h hourly forecast for 1,000 points after compilation.
3. Floating-point operations of a training step, counted by the compiler, against the machine's matrix product.

Wall clocks of a shared machine are noisy: every number is a median of rounds with its range, and CPU seconds, which
competing processes disturb less, stand beside wall seconds.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import scipy.signal

from configs import earth_o1
from earth import model, objectives, windows
from earth import train as trainer
from earth.forecast import forecast, load_model, streams_of
from earth.model import Params
from earth.observations import Reports
from earth.protocol import Protocol
from earth.readers import read_stations
from earth.stations import design, usual_variables
from earth.train import Prepared, TrainConfig
from moe import training
from tests.benchmarks import timing
from tests.benchmarks.timing import middle

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORD = ROOT.parent / "shared" / "data" / "taiwan_hourly_2020-06_2021-12.parquet"
PROTOCOL = ROOT / "configs" / "protocols" / "stations-v1.json"
PEER = pathlib.Path(__file__).resolve().parent / "benchmarks" / "deepsensor_peer.py"
DEFINITION = (
    "An observation is one observed (not missing) value of one variable at one station and hour that a training step\n"
    "reads as input (context) or scores as target; a value read in two windows of a batch counts twice, a hidden,\n"
    "filled-in or masked one not at all. The same count for both."
)
LIMIT_SECONDS = 1.0
LIMIT_RATIO = 10.0


@dataclasses.dataclass
class Timing:
    """One timed stretch of `steps` training steps: wall seconds, and CPU seconds of the process."""

    steps: int
    wall: float
    cpu: float


def synthetic_record(sites: int = 31, hours: int = 13903, seed: int = 0) -> pd.DataFrame:
    """A wide table of a station network with the real record's shape: daily and yearly cycles plus red noise common to
    all stations and of their own, 2 % of the values missing.
    """
    rng = np.random.default_rng(seed)
    t = np.arange(hours)
    day, year = np.sin(2 * np.pi * (t + 8) / 24), np.sin(2 * np.pi * t / 8766)

    def red(decay: float, *shape: int) -> np.ndarray:
        noise = rng.standard_normal((hours, *shape))
        return np.asarray(scipy.signal.lfilter([np.sqrt(1 - decay**2)], [1, -decay], noise, axis=0))

    shared = red(0.98, 1) + 0.5 * red(0.9, sites)
    temperature = 295 + 6 * year[:, None] + 3 * day[:, None] + 2 * shared
    dew_point = temperature - 3 - 2 * np.abs(red(0.9, sites))
    sun = np.maximum(day, 0)[:, None] * np.clip(0.7 + 0.2 * red(0.9, sites), 0, 1)
    wind = [3 * red(0.95, 1) + 1.5 * red(0.8, sites) for _ in range(2)]
    columns = {
        "2m_temperature": temperature, "2m_dewpoint_temperature": dew_point,
        "surface_pressure": 101000 + 500 * red(0.99, 1) + 40 * red(0.9, sites),
        "10m_u_component_of_wind": wind[0], "10m_v_component_of_wind": wind[1],
        "10m_wind_gust": 1.6 * np.hypot(*wind), "total_precipitation": np.maximum(red(0.8, sites) - 1.5, 0) * 1e-3,
        "2m_relative_humidity": np.clip(np.exp(-0.06 * (temperature - dew_point)), 0.05, 1),
        "surface_solar_radiation_downwards": 3e6 * sun, "uv_index": 9 * sun,
    }  # fmt: skip
    place = [22 + 4 * rng.random(sites), 118.5 + 3.5 * rng.random(sites), rng.gamma(0.5, 500, sites)]
    table = pd.DataFrame({name: np.broadcast_to(v, (hours, sites)).ravel() for name, v in columns.items()})
    table = table.mask(rng.random(table.shape) < 0.02)
    start = np.datetime64("2020-06-01T00", "h")
    table.insert(0, "time", np.repeat((start + t).astype("datetime64[ns]"), sites))
    table.insert(1, "station", np.tile([f"{467000 + i}" for i in range(sites)], hours))
    for name, values in zip(("lat", "lon", "elev"), place, strict=True):
        table[name] = np.tile(values, hours)
    return table


def load() -> tuple[Reports, Protocol, str]:
    """(reports without the held-out stations, protocol, what they are)."""
    protocol = Protocol.load(PROTOCOL)
    if RECORD.is_file():
        reports, _ = trainer.fill_heights(read_stations(RECORD).reports)
        name = RECORD.name
    else:
        units = {"2m_relative_humidity": "1", "total_precipitation": "m"}
        reports = read_stations(synthetic_record(), units=units).reports
        protocol = dataclasses.replace(protocol, held_out=reports.platforms[-len(protocol.held_out) :])
        name = f"a synthetic network, for want of ../shared/data/{RECORD.name}"
    return reports.select(platforms=[p for p in reports.platforms if p not in protocol.held_out]), protocol, name


def prepare(
    reports: Reports, protocol: Protocol, saved: pathlib.Path | None
) -> tuple[Prepared, TrainConfig, Params | None]:
    """The default station model on this record: fitted here (minutes), or with the fitted parts of a saved model."""
    config = earth_o1.stations()
    targets = protocol.variables or usual_variables(reports)
    train = protocol.role(reports.times) == "train"
    cfg, tcfg = design(reports, targets, protocol.leads, train, config)
    if saved is None:
        return trainer.prepare({"station": reports}, cfg, protocol), tcfg, None
    params, cfg, _ = load_model(saved, cfg=cfg)
    # A saved model lacks the cross-fitted propagators. Copies of the one it has cost the same to evaluate.
    prop = params.fitted.propagator
    many = {name: jnp.repeat(getattr(prop, name)[:1], cfg.folds + 1, 0) for name in ("shared", "local")}
    prop = dataclasses.replace(prop, **many)
    fitted = dataclasses.replace(params.fitted, propagator=prop)
    times = windows.training_times(
        reports, protocol, span_hours=max(s.span for s in cfg.streams), longest_lead=max(cfg.leads)
    )
    folds = windows.contiguous_folds(times, cfg.folds)
    records = {"station": reports}
    streams = streams_of(params, cfg, records)
    return Prepared(cfg, protocol, records, streams, fitted, times, folds, times[:0], {}), tcfg, params


class Ours:
    """Training as `earth.train.train` does it, in stretches: the same batches, step and loop, without checkpoints."""

    def __init__(self, data: Prepared, tcfg: TrainConfig, batch: int):
        stage = tcfg.stages[-1]
        network = model.initial_network(jax.random.key(0), data.cfg, data.fitted.anchors.latitude.shape[0])
        sampling = windows.Sampling(stage.strata)
        self.batches: Any = iter(
            windows.dataset(data.streams, data.train_times, data.folds, sampling, batch=batch, seed=0)
        )
        mask = functools.partial(jax.tree.map, lambda x: x.ndim >= 2)
        optimizer = optax.adamw(stage.learning_rate, b2=0.98, weight_decay=stage.weight_decay, mask=mask)
        loss = functools.partial(objectives.forecast_loss, fitted=data.fitted, cfg=data.cfg, objective=stage.objective)
        state = training.init_state(network, optimizer, jax.random.key(1), ema=True)
        step = training.make_train_step(loss, optimizer, clip_norm=1.0, ema_decay=tcfg.ema)
        examples = [next(self.batches) for _ in range(4)]
        self.batch, self.parameters = batch, sum(x.size for x in jax.tree.leaves(network))
        self.inputs, self.scored = np.mean(
            [count_observations(b, data.cfg, stage.objective, seed) for seed, b in enumerate(examples)], 0
        )
        start = time.perf_counter()
        self.step = step.lower(state, examples[0]).compile()
        self.compile_seconds = time.perf_counter() - start
        self.state, self.example = state, examples[0]

    @property
    def flops(self) -> float:
        """Floating-point operations of one step, as the compiler counts them."""
        analysis = self.step.cost_analysis()
        assert analysis is not None, "the compiler counts no operations on this platform"
        return float(analysis["flops"])

    def run(self, steps: int, *, warm: int = 6) -> Timing:
        """`steps` steps of the training loop, batches included, after `warm` more that use up what was prefetched."""
        for count in (warm, steps):
            wall, cpu = time.perf_counter(), time.process_time()
            until = int(self.state.step) + count
            self.state = training.fit(self.step, self.state, self.batches, steps=until, progress=False)
            jax.block_until_ready(self.state)
        return Timing(steps, time.perf_counter() - wall, time.process_time() - cpu)

    def compute(self, steps: int) -> Timing:
        """`steps` steps on one batch that is there already."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.state, _ = self.step(self.state, self.example)
        jax.block_until_ready(self.state)
        return Timing(steps, time.perf_counter() - wall, time.process_time() - cpu)


def count_observations(
    batch: Any, cfg: model.EarthConfig, objective: objectives.ObjectiveConfig, seed: int
) -> tuple[float, float]:
    """(values read, values scored) of a sample: what is left after hiding, and what has weight in the loss.

    The weights are those of `objectives.forecast_loss`: at lead 0 only hidden values count, and of two mixed samples a
    value only where both have it.
    """
    tokens, hidden = objectives.hide(jax.random.key(seed), jax.tree.map(jnp.asarray, batch["tokens"]), cfg, objective)
    size = len(batch["time"])
    read = scored = 0
    for stream in cfg.streams:
        read += int(tokens[stream.sensor].mask.sum())
        live = np.array(batch["targets"][stream.sensor].mask)
        reconstruct = False if stream.moving or not objective.analysis else np.asarray(hidden[stream.sensor])[:, None]
        live &= (batch["leads"][..., None, None] > 0) | reconstruct
        if objective.mixup > 0:
            live &= live[::-1]
        scored += int(live.sum())
    return read / size, scored / size


class Peer(timing.Peer):
    """DeepSensor in a process of its own."""

    def __init__(self, python: str, setup: dict[str, Any], folder: pathlib.Path):
        self.batch = int(setup["batch"])
        super().__init__(python, PEER, setup, folder / f"peer_{setup['batch']}_{setup['density']}.json")
        self.inputs, self.scored = self.about["inputs"], self.about["scored"]

    def run(self, steps: int) -> Timing:
        answer = self.ask(steps)
        losses = answer["losses"]
        if len(losses) != steps or not np.isfinite(losses).all():
            raise RuntimeError(f"DeepSensor was to take {steps} steps and reports the losses {losses}")
        return Timing(steps, answer["wall"], answer["cpu"])


def rates(timings: Sequence[Timing], per_step: float) -> tuple[list[float], list[float]]:
    """Observations per (wall second, CPU second) of each stretch."""
    return [t.steps * per_step / t.wall for t in timings], [t.steps * per_step / t.cpu for t in timings]


def compare(ours: Ours, peer: Peer | None, rounds: int, steps: tuple[int, int], label: str) -> list[Timing]:
    """Prints the rows of one batch size; returns our timings."""
    runners = {"ours": functools.partial(ours.run, steps[0])}
    if peer is not None:
        runners["theirs"] = functools.partial(peer.run, steps[1])
    timings = list(timing.interleave(runners, rounds).values())
    per_step = ours.batch * (ours.inputs + ours.scored)
    wall, cpu = rates(timings[0], per_step)
    print(f"\nbatch {ours.batch}, {rounds} rounds in turns of {steps[0]} steps (DeepSensor {steps[1]}); median (range)")
    row = "  {:34s} {:>28s} {:>26s} {:>7s} {:>7s} {:>11s}"
    print(row.format("", "observations / s", "per CPU second", "read", "scored", "parameters"))
    print(
        row.format(
            "Earth-o1, data loading included", middle(wall), middle(cpu), f"{ours.inputs:.0f}", f"{ours.scored:.0f}",
            f"{ours.parameters:,}",
        )
    )  # fmt: skip
    if peer is not None:
        peer_wall, peer_cpu = rates(timings[1], peer.batch * (peer.inputs + peer.scored))
        print(
            row.format(
                f"DeepSensor, {label}", middle(peer_wall), middle(peer_cpu), f"{peer.inputs:.0f}",
                f"{peer.scored:.0f}", f"{peer.about['parameters']:,}",
            )
        )  # fmt: skip
        by_round = [a / b for a, b in zip(wall, peer_wall, strict=True)]
        by_cpu = np.median(cpu) / np.median(peer_cpu)
        verdict = "reached" if np.median(by_round) >= LIMIT_RATIO else "MISSED"
        a, b = peer.about["grid"]
        print(
            f"  ratio {middle(by_round)} of the rounds, {by_cpu:.3g} by CPU seconds; {LIMIT_RATIO:g} wanted: {verdict}"
        )
        print(
            f"  (DeepSensor's grid {a} x {b}, internal_density {peer.about['density']}; its task loader takes another "
            f"{1e3 * peer.about['task_seconds']:.0f} ms a task, not in the ratio)"
        )
    return timings[0]


def bench_forecast(data: Prepared, tcfg: TrainConfig, params: Params | None, repeats: int) -> None:
    """Prints the time of a 48 h hourly forecast for 1,000 points."""
    if params is None:
        anchors = data.fitted.anchors.latitude.shape[0]
        drawn = [model.initial_network(jax.random.key(i), data.cfg, anchors) for i in range(tcfg.members)]
        params = Params(data.fitted, model.members(drawn))
    streams = streams_of(params, data.cfg, data.reports)
    where = data.reports["station"].positions()
    rng, count = np.random.default_rng(0), 1000
    points: dict[str, Any] = {"station": [f"P{i}" for i in range(count)]}
    for name in ("latitude", "longitude", "height"):
        points[name] = rng.uniform(where[name].min(), where[name].max(), count)
    leads = list(range(1, 49))
    times = data.reports["station"].times
    inits = np.arange(times.min(), times.max(), np.timedelta64(1, "h"))[100 :: max(1, len(data.train_times) // 50)]
    variables = [name for _, name in data.cfg.targets]
    walls, cpus = [], []
    for i in range(repeats + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        out = forecast(params, data.cfg, streams, inits[i : i + 1], leads, points, variables=variables)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        shape = (1, len(leads), count)
        if any(out[name].shape != shape or not np.isfinite(out[name]).all() for name in variables):
            raise RuntimeError(f"the forecast is not finite values of shape {shape}: {out}")
    members = jax.tree.leaves(params.network)[0].shape[0]
    verdict = "within" if np.median(walls[1:]) < LIMIT_SECONDS else "BEYOND"
    print(f"\n2. A {leads[-1]} h hourly forecast of {len(variables)} variables with spreads for {count:,} new points")
    print(f"   observations to Dataset, {members} members: {middle(walls[1:])} s, {middle(cpus[1:])} CPU s")
    print(f"   first call, with compilation: {walls[0]:.1f} s; {verdict} the limit of {LIMIT_SECONDS:g} s")


def bench_limit(ours: Ours, loop: Sequence[Timing], rounds: int) -> None:
    """Prints operations of a step against the matrix product's."""
    size = 1536
    x = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()

    def matmul(steps: int) -> Timing:
        wall, cpu = time.perf_counter(), time.process_time()
        y = x
        for _ in range(steps):
            y = product(y) / size
        y.block_until_ready()
        return Timing(steps, time.perf_counter() - wall, time.process_time() - cpu)

    runners = {"step": functools.partial(ours.compute, 6), "peak": functools.partial(matmul, 12)}
    step, peak = timing.interleave(runners, rounds).values()
    giga = [ours.flops * t.steps / t.wall / 1e9 for t in step]
    whole = [ours.flops * t.steps / t.wall / 1e9 for t in loop]
    top = [2 * size**3 * t.steps / t.wall / 1e9 for t in peak]
    by_cpu = np.median([t.steps / t.cpu for t in step]) * ours.flops
    by_cpu /= np.median([t.steps / t.cpu for t in peak]) * 2 * size**3
    print(
        f"\n3. The limit: a training step of batch {ours.batch} is {ours.flops / 1e9:.2f} GFLOP by the compiler's count"
    )
    print(f"   float32 matrix product of {size}: {middle(top)} GFLOP/s, the peak here")
    print(f"   the compiled step on a batch in memory: {middle(giga)} GFLOP/s = {np.median(giga) / max(top):.1%} of it")
    print(f"   (in turns with the product: {np.median(giga) / np.median(top):.1%}, by CPU seconds {by_cpu:.1%})")
    print(f"   the whole training loop: {middle(whole)} GFLOP/s = {np.median(whole) / max(top):.1%} of it")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--peer", metavar="PYTHON", default=sys.executable, help="interpreter with DeepSensor (default: this one)"
    )
    parser.add_argument(
        "--model", type=pathlib.Path, metavar="DIR",
        help="model folder of examples/forecast_stations.py on the same record: spares the fit (default: fit here)",
    )  # fmt: skip
    parser.add_argument("--cores", type=int, default=2, help="cores for either side (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--batch", type=int, default=64, help="windows a step (default 64)")
    parser.add_argument(
        "--density", type=int, default=32,
        help="DeepSensor's internal_density at that batch (default 32 of a unit, coarse enough to be quick)",
    )  # fmt: skip
    parser.add_argument(
        "--inferred-batch", type=int, default=8,
        help="batch of the comparison with the density DeepSensor infers itself (default 8: its memory; 0: leave out)",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    jax.config.update("jax_platforms", "cpu")
    if hasattr(os, "sched_setaffinity"):  # before the first computation starts XLA's threads; children inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
        args.cores = len(os.sched_getaffinity(0))
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    reports, protocol, name = load()
    data, tcfg, params = prepare(reports, protocol, args.model)
    stream = data.cfg.streams[0]
    print(f"record: {name}; {len(reports.platforms)} stations, {len(data.train_times):,} training windows")
    print(
        f"{len(stream.variables)} variables, slots {stream.slots} h, {len(tcfg.stages[-1].strata)} leads a step; "
        f"{args.cores} cores, load {load_before:.1f} before this"
    )
    print(f"\n1. Training. {DEFINITION}")
    found = timing.has_modules(args.peer, "deepsensor", "torch")
    if not found:
        print(
            f"\nDeepSensor is not installed in {args.peer}: its rows are left out. Install the extra `parity`, or pass"
        )
        print("--peer with an interpreter that has deepsensor==0.4.4, torch and pandas.")
    with tempfile.TemporaryDirectory() as folder:
        grid = reports.select(variables=list(stream.variables)).grid()
        store = pathlib.Path(folder) / "record.npz"
        np.savez(
            store,
            values=np.stack([grid[v].transpose("time", "station").values for v in stream.variables], -1),
            where=np.stack([grid.latitude.values, grid.longitude.values], 1),
            times=grid.time.values,
            train_times=np.datetime64("2000-01-01", "s") + data.train_times.astype("timedelta64[s]"),
        )
        # One lead of each stratum beyond 0, as our steps draw them.
        leads = sorted({group[-1] for group in tcfg.stages[-1].strata if group[-1] > 0})
        targets = [v for _, v in data.cfg.targets]
        setup = dict(
            data=str(store), cores=args.cores, variables=list(stream.variables), slots=list(stream.slots),
            targets=targets, leads=leads,
        )  # fmt: skip

        def contest(batch: int, density: int | None, steps: tuple[int, int], label: str) -> tuple[Ours, list[Timing]]:
            ours = Ours(data, tcfg, batch)
            extra = dict(batch=batch, batches=steps[1], density=density)
            peer = Peer(args.peer, setup | extra, pathlib.Path(folder)) if found else None
            try:
                return ours, compare(ours, peer, args.rounds, steps, label)
            finally:
                if peer is not None:
                    peer.close()

        if found and args.inferred_batch:
            contest(args.inferred_batch, None, (40, 1), "its own density")
        ours, loop = contest(args.batch, args.density, (20, 1), f"density set to {args.density}")
    bench_forecast(data, tcfg, params, max(args.rounds, 7))
    bench_limit(ours, loop, args.rounds)
    if hasattr(os, "getloadavg"):
        print(f"\nload at the end {os.getloadavg()[0]:.1f}; on an idle machine it is about {args.cores}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
