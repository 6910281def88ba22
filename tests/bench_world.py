"""The whole global model on this CPU as reports grow: assimilate + advance + observe over 4,096 anchors.

    python -m tests.bench_world [--sizes 1000 10000 100000] [--out FILE.md] [--picture FILE.png]
    python -m tests.bench_world --sizes 1000 10000 100000 1000000       # 5 GB and minutes

A cycle assimilates N reports of the sensors and proportions of `configs.earth_pod`, advances one step and reads every
sensor at N other points: forward only, width 96 (the preset of the simulated globe), compiled beforehand. The search
for the nearest anchors of both (a k-d tree on the host) is timed apart and together with the cycle. Every size runs in
a process of its own, whose largest resident memory is thereby its own; "above" is what it holds above what it held
before the first report. Times are CPU seconds of the process, medians (beyond 10^5 reports of one run without another
before it): other processes disturb them little. Slopes are those of the least-squares line through the logarithms; at
most 1.1 is asked for. Constants (anchors, programs) flatten the whole line, so that it is also drawn through the sizes
from 10^4 up.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.benchmarks import timing

SIZES = (1_000, 10_000, 100_000)
LARGE = 10_000
COLUMNS = {"search": "search, s", "cycle": "cycle, s", "together": "together, s", "above": "memory above, MB"}


def draw(cfg: Any, anchors: np.ndarray, rng: np.random.Generator) -> tuple[dict[str, Any], float]:
    """(a window of reports anywhere, CPU seconds of the search)."""
    from earth.neighbours import nearest
    from earth.world.records import Tokens, host_place

    out, spent = {}, 0.0
    for s in cfg.sensors:
        n, v = s.tokens, len(s.variables)
        lat, lon = np.rad2deg(np.arcsin(rng.uniform(-1, 1, n))), rng.uniform(-180, 180, n)
        height, view = rng.uniform(0, 1e4, n), rng.uniform(-50, 50, n)
        begun = time.process_time()
        near = nearest(host_place(cfg.field, lat, lon, height), anchors, cfg.field.neighbours)
        spent += time.process_time() - begun
        value = rng.standard_normal((n, v), np.float32)
        parts = (rng.uniform(0, cfg.step, n), lat, lon, height, view)
        ones = np.ones((n, v), np.float32)
        out[s.sensor] = Tokens(value, ones > 0, ones, *(x.astype(np.float32) for x in parts), near=near)
    return out, spent


def resident() -> int:
    """Bytes, now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def largest() -> int:
    """Bytes, at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(reports: int, rounds: int) -> dict[str, Any]:
    """One size, in this process."""
    import jax

    from configs import earth_pod
    from earth.world import model, network
    from earth.world.field import make_anchors
    from earth.world.model import Fitted, Params, State
    from moe.params import init

    cfg = earth_pod.growth(reports)
    anchors = make_anchors(cfg.field)
    net = init(jax.random.key(0), network.network_specs(cfg.network, cfg.sensors, 0))
    params = Params(Fitted({}, anchors, np.full(len(cfg.network.heights), 5.0, np.float32)), net)
    state = State(np.int32(0), np.zeros((cfg.field.count, cfg.network.width), np.float32))

    def cycle(params, state, tokens, queries):
        state = model.assimilate(params, state, tokens, state.time, cfg=cfg)
        state = model.advance(params, state, 1, cfg=cfg)
        return state, model.read(params, state, queries, cfg=cfg)

    params, state = jax.block_until_ready(jax.tree.map(jax.numpy.asarray, (params, state)))
    before = resident()
    rng = np.random.default_rng(0)
    (tokens, first), (queries, second) = (draw(cfg, np.asarray(anchors.place), rng) for _ in range(2))
    program = jax.jit(cycle).lower(params, state, tokens, queries).compile()
    if rounds > 1:
        program(params, state, tokens, queries)
    found = []
    for _ in range(rounds):
        time.sleep(0.05)  # threads of the call before spin for a while
        begun = time.process_time()
        jax.block_until_ready(program(params, state, tokens, queries))
        found.append(time.process_time() - begun)
    spent, search = float(np.median(found)), first + second
    memory = program.memory_analysis()
    return dict(
        reports=reports, search=search, cycle=spent, together=search + spent, peak=largest() / 1e6,
        above=(largest() - before) / 1e6, temporary=memory.temp_size_in_bytes / 1e6 if memory else float("nan"),
    )  # fmt: skip


def apart(reports: int, rounds: int) -> dict[str, Any]:
    """One size, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench_world", "--one", str(reports), "--rounds", str(rounds)]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{reports} reports: process ended with {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    sizes = [row["reports"] for row in rows]
    lines = ["| reports | " + " | ".join(COLUMNS.values()) + " | memory, MB |", "|-" * (len(COLUMNS) + 2) + "|"]
    for row in rows:
        shown = " | ".join(f"{row[name]:.3g}" for name in COLUMNS)
        lines.append(f"| {row['reports']:,} | {shown} | {row['peak']:.0f} |")
    chosen = {"all": np.arange(len(rows)), f"from {LARGE:,}": np.flatnonzero(np.asarray(sizes) >= LARGE)}
    for label, index in chosen.items():
        if len(index) > 1:
            found = [slope([sizes[i] for i in index], [rows[i][name] for i in index]) for name in COLUMNS]
            lines.append(f"| slope, {label} | " + " | ".join(f"{x:.2f}" for x in found) + " | |")
    return lines


def picture(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    sizes = np.array([row["reports"] for row in rows], float)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, names in zip(axes, (("search", "cycle", "together"), ("above", "peak")), strict=True):
        for name in names:
            values = np.array([row[name] for row in rows])
            axis.loglog(sizes, values, "o-", label=COLUMNS.get(name, "memory, MB"))
        axis.loglog(sizes, values[-1] * (sizes / sizes[-1]) ** 1.1, "k:", label="slope 1.1")
        axis.set_xlabel("reports of a window")
        axis.legend()
    axes[0].set_ylabel("CPU seconds")
    axes[1].set_ylabel("MB")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--picture", type=pathlib.Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one, args.rounds)))
        return
    rows = []
    for reports in sorted(args.sizes):
        rows.append(apart(reports, args.rounds if reports <= 100_000 else 1))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    lines = [f"{timing.cpu_model()}; 4,096 anchors, width 96, 8 neighbours, float32, forward", "", *table(rows)]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    if args.picture:
        picture(rows, args.picture)


if __name__ == "__main__":
    main()
