"""Neighbour attention on this CPU: beside a plain gather, beside the machine's limit, and as observations grow.

    python -m tests.bench_neighbours [--out FILE] [--growth 1000 10000 100000 1000000] [--schedule v5e]

`plain` gathers the keys and values of every pair, [N, k, H, K + V], and multiplies them by einsum (XLA); assimilation
scatters them back. `blocked` and `gather` are ours; `gather`, which is also one of pairs, is what a CPU runs while they
fit. All compute the same and are given the same neighbours. Interleaved rounds, medians; times are CPU
seconds of the process, which other processes disturb less. `limit` is the larger of two times: the operations of the
pairs (2 k H (K + V) a point; three times that with the gradient) at the speed of a large matrix product, and every
operand and result moved once at the speed of a copy. Growth: blocked only, forward and backward, neighbours given, and
the slope of time in log-log. `--schedule` compiles the TPU kernels (extra `tpu`) and reads how many of the bundles of a
visit its products need.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from earth.kernels.neighbour_attention import attend, collect, pairs
from earth.kernels.neighbour_attention.shapes import Pairs
from earth.neighbours import nearest
from moe.kernels import aot
from tests.benchmarks import timing

HEADS, WIDTH = 8, 16
CASES = ((4096, 512, 8), (4096, 4096, 8), (16384, 512, 16), (65536, 512, 8), (65536, 4096, 16))
GROWTH = (1_000, 10_000, 100_000, 1_000_000)
OURS = ("blocked", "gather")


def taper(near: Pairs, d2: jax.Array) -> jax.Array:
    return 2 * jnp.log(jnp.maximum(1 - d2 / near.radius2[:, None], 1e-30))


def plain_attend(query, key, value, decay, near: Pairs):
    index = near.index
    d2 = jnp.square(near.points[:, None] - near.anchors[index]).sum(-1)
    score = jnp.einsum("nhk,njhk->nhj", query, key[index]) * query.shape[-1] ** -0.5
    score = score - decay[index].transpose(0, 2, 1) * d2[:, None] + taper(near, d2)[:, None]
    return jnp.einsum("nhj,njhv->nhv", jax.nn.softmax(score, -1), value[index])


def plain_collect(query, key, value, decay, prior, near: Pairs):
    index = near.index
    d2 = jnp.square(near.points[:, None] - near.anchors[index]).sum(-1)
    score = jnp.einsum("nhk,njhk->njh", key, query[index]) * query.shape[-1] ** -0.5
    score = score - decay[index] * d2[..., None] + taper(near, d2)[..., None]
    most = jax.lax.stop_gradient(jnp.maximum(jnp.full(prior.shape, -jnp.inf).at[index].max(score), prior))
    weight = jnp.exp(score - most[index])
    seen = jnp.zeros_like(prior).at[index].add(weight)
    out = jnp.zeros((*prior.shape, value.shape[-1])).at[index].add(weight[..., None] * value[:, None])
    total = jnp.exp(prior - most) + seen
    return out / total[..., None], seen / total


def draw(points: int, anchors: int, k: int) -> tuple[Pairs, dict[str, Any]]:
    """Points and anchors anywhere on a sphere, and operands for both directions."""
    rng = np.random.default_rng(0)

    def place(count):
        x = rng.normal(size=(count, 3))
        x *= 10 / np.linalg.norm(x, axis=1, keepdims=True)
        return np.concatenate([x, rng.uniform(0, 0.1, (count, 1))], 1).astype(np.float32)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    x, u = place(points), place(anchors)
    operands = dict(
        point=normal(points, HEADS, WIDTH),
        seen=normal(points, HEADS, WIDTH),
        anchor=normal(anchors, HEADS, WIDTH),
        held=normal(anchors, HEADS, WIDTH),
        decay=jnp.abs(normal(anchors, HEADS)),
        prior=normal(anchors, HEADS),
    )
    return pairs(x, u, nearest(x, u, k)), operands


def programs(near: Pairs, operands: dict[str, Any]) -> dict[tuple[str, str, str], Callable[[], Any]]:
    """(direction, passes, implementation) -> call."""
    o = operands
    observe, assimilate = (o["point"], o["anchor"], o["held"], o["decay"]), (o["anchor"], o["point"], o["seen"])
    assimilate = (*assimilate, o["decay"], o["prior"])
    functions = {("observe", "plain"): (plain_attend, observe), ("assimilate", "plain"): (plain_collect, assimilate)}
    for name in OURS:
        functions["observe", name] = functools.partial(attend, implementation=name), observe
        functions["assimilate", name] = functools.partial(collect, implementation=name), assimilate
    made = {}
    for (direction, implementation), (function, args) in functions.items():

        def loss(args, near, function=function):
            return sum(jnp.square(x).sum() for x in jax.tree.leaves(function(*args, near)))

        forward = jax.jit(lambda args, near, function=function: function(*args, near))
        gradient = jax.jit(jax.grad(loss))
        made[direction, "forward", implementation] = functools.partial(forward, args, near)
        made[direction, "forward+backward", implementation] = functools.partial(gradient, args, near)
    return made


def cpu_seconds(call: Callable[[], Any]) -> float:
    time.sleep(0.05)  # threads of the call before spin for a while
    start = time.process_time()
    jax.block_until_ready(call())
    return time.process_time() - start


def timed(calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    return timing.interleave({name: functools.partial(cpu_seconds, call) for name, call in calls.items()}, rounds)


def machine() -> tuple[float, float]:
    """(operations, bytes) a CPU second: a matrix product of 1024, and a copy of 64 MB (read and write)."""
    a, b = jnp.ones((1024, 1024)), jnp.ones(16 << 20)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda b: b + 1)
    found = timed({"product": lambda: product(a), "copy": lambda: copy(b)}, 5)
    return 2 * 1024**3 / np.median(found["product"]), 2 * b.nbytes / np.median(found["copy"])


def limit(points: int, anchors: int, k: int, backward: bool, speed: tuple[float, float]) -> float:
    """Seconds that nobody can be below, see the module."""
    operations = 2 * points * k * HEADS * 2 * WIDTH * (3 if backward else 1)
    moved = 4 * HEADS * WIDTH * 2 * (points + anchors) * (2 if backward else 1)
    return max(operations / speed[0], moved / speed[1])


def table(cases: Sequence[tuple[int, int, int]], rounds: int) -> list[str]:
    speed = machine()
    lines = [f"product {speed[0] / 1e9:.0f} GFLOP/s, copy {speed[1] / 1e9:.1f} GB/s", ""]
    head = "| N | M | k | | passes | plain ms | blocked ms | gather ms | plain / blocked | plain / gather |"
    lines += [f"{head} blocked / limit | gather / limit |", "|-|-|-|-|-|-|-|-|-|-|-|-|"]
    for points, anchors, k in cases:
        found = timed(programs(*draw(points, anchors, k)), rounds)
        for direction in ("observe", "assimilate"):
            for passes in ("forward", "forward+backward"):
                plain, *ours = (1e3 * np.array(found[direction, passes, i]) for i in ("plain", *OURS))
                bound = 1e3 * limit(points, anchors, k, passes != "forward", speed)
                cells = [points, anchors, k, direction, passes, *map(timing.middle, (plain, *ours))]
                cells += [f"{np.median(plain) / np.median(one):.2f}" for one in ours]
                cells += [f"{np.median(one) / bound:.1f}" for one in ours]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
                print(lines[-1], flush=True)
    return lines


def growth(sizes: Sequence[int], anchors: int = 512, k: int = 8, rounds: int = 3) -> list[str]:
    """Times of growing numbers of points over the same anchors."""
    found: dict[tuple[str, str], list[float]] = {}
    for points in sizes:
        near, operands = draw(points, anchors, k)
        calls = {name: call for name, call in programs(near, operands).items() if name[2] == "blocked"}
        for name, seconds in timed(calls, rounds).items():
            found.setdefault(name[:2], []).append(float(np.median(seconds)))
    head = " | ".join(f"{n:,} points, ms" for n in sizes)
    lines = [f"| M {anchors}, k {k} | | {head} | slope |", "|-" * (len(sizes) + 3) + "|"]
    for (direction, passes), seconds in found.items():
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        shown = " | ".join(f"{1e3 * s:.1f}" for s in seconds)
        lines.append(f"| {direction} | {passes} | {shown} | {slope:.2f} |")
        print(lines[-1], flush=True)
    return lines


def build(mesh: Mesh, side: str, name: str, moments: bool = False):
    """(function, abstract arguments) of the TPU kernels: 4,096 points, 1,024 anchors, k 16, bfloat16."""
    from earth.kernels.neighbour_attention import pallas_tpu

    def made(*shape, dtype: Any = jnp.float32):
        return aot.abstract(mesh, shape, dtype)

    points, anchors, bf16 = 4096, 1024, jnp.bfloat16
    rows, columns = (points, anchors) if side == "points" else (anchors, points)
    near = Pairs(
        *(made(points, 4), made(anchors, 4), made(points), made(points, 16, dtype=jnp.int32)), made(anchors, 3, 4)
    )
    vectors = [made(n, HEADS, WIDTH, dtype=bf16) for n in (rows, columns, columns)]
    decay, stats = made(anchors, HEADS), made(rows, HEADS)
    coefficient = made(HEADS, 4) if moments else None
    if name == "forward":
        rest = (decay, None if side == "points" else decay, coefficient, near)
    else:
        rest = (decay, coefficient, near, stats, made(rows, HEADS, WIDTH), stats)
    return functools.partial(getattr(pallas_tpu, name), side=side, interpret=False), (*vectors, *rest)


def schedule(chip: str) -> list[str]:
    """Bundles of one visit (128 x 128 pairs, 8 heads) against those in which the matrix units would be full."""
    lines = ["| chip | rows | kernel | bundles a visit | full units | use | spill stores |", "|-|-|-|-|-|-|-|"]
    for side in ("points", "anchors"):
        for name in ("forward", "backward"):
            for kernel in aot.compile_schedules("tests.bench_neighbours:build", chip, side=side, name=name).values():
                visit = max(kernel.full.loops[0].inner, key=lambda loop: loop.matmuls)
                # Products of a visit: scores and values, in the gradient of either side one or two more.
                products = 2 if name == "forward" else 3 if kernel.name.endswith(side) else 4
                full = products * HEADS * 2 * 128**3 / aot.CHIPS[chip].flops_per_cycle
                bundles = visit.stop - visit.start
                lines.append(
                    f"| {chip} | {side} | {kernel.name} | {bundles} | {full:.0f} | {full / bundles:.2f} | "
                    f"{kernel.full.spills} |"
                )
                print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--growth", type=int, nargs="*", default=GROWTH)
    parser.add_argument("--schedule", nargs="*", default=(), choices=tuple(aot.CHIPS))
    parser.add_argument("--only-schedule", action="store_true")
    args = parser.parse_args()
    lines = [f"{timing.cpu_model()}; H {HEADS}, K = V = {WIDTH}, float32; median (least-most)"]
    if not args.only_schedule:
        lines += ["", *table(CASES, args.rounds)]
        if args.growth:
            lines += ["", *growth(args.growth)]
    for chip in args.schedule:
        lines += ["", *schedule(chip)]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
