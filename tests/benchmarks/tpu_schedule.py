"""How much of a TPU's matrix units our grouped matmul uses, beside megablox's: read from compiled schedules.

    python -m tests.benchmarks.tpu_schedule [--chips v5e v5p v6e] [--products gated ...]

No TPU is needed and **nothing is run**: libtpu compiles, the final bundles are counted. Shapes: Qwen3-30B-A3B's experts
(128, model 2,048, width 768) in bfloat16, 4,096 tokens x 8 slots.

    effective use = operations of the real rows / (scheduled cycles of all visits x peak per cycle)

Cycles count the waiting for results (the full schedule). `stored` is the same figure with the final bundles as stored,
into which the compiler folds most of that waiting: the measure of earlier tables. It is too high for every kernel, more
so for ours, and it can pass 1. Each size of chunk (rows of a row product, passes of tgmm) is a branch of its own in
the bundles: a chunk is charged the longest way from the head of the chunk loop to its end that enters its own branch
and no other size's, masks and copies that it may not need included. How many chunks of which size: the kernel's own
table of visits for the drawn sizes (mean of 3 draws). `passes`: tgmm's use if nothing but its passes took time.

`HBM`: the use that is left if HBM, at its published bandwidth, serves one copy after the other (weights in order and as
far ahead as the kernel's buffers allow). `bound`: the use that nobody can pass, every operand moved once. Not in any
figure: fetching of instructions, waits inside a visit, XLA's few small fusions that make the table of visits.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm as megablox_gmm
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm as megablox_tgmm
from jax.sharding import Mesh

from moe.kernels import aot
from moe.kernels.grouped_matmul import pallas_tpu

EXPERTS, ROWS, MODEL, WIDTH, SEEDS = 128, 32_768, 2_048, 768, 3
HISTOGRAMS = ("multinomial", "zipf", "half")


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of an expert layer: rows [M, C] times C x W (parts together), or tgmm's C x W from M rows.

    Attributes:
        parts_in, parts_out: arrays of rows read and written (gate and up are two).
        inner, outer: C, W of one part; outer is what reaches HBM.
        columns: product columns per row, all parts: 2 x M x inner x columns operations.
        weights: numbers in one expert's matrices.
    """

    kernel: str  # its name in the program
    parts_in: int
    parts_out: int
    inner: int
    outer: int
    columns: int
    weights: int


PRODUCTS = {
    "gated": Product("gated_grouped_matmul", 1, 1, MODEL, WIDTH, 2 * WIDTH, 2 * MODEL * WIDTH),
    "gate_up": Product("grouped_matmul", 1, 2, MODEL, WIDTH, 2 * WIDTH, 2 * MODEL * WIDTH),
    "gate_up_t": Product("grouped_matmul_transposed", 2, 1, WIDTH, MODEL, 2 * MODEL, 2 * MODEL * WIDTH),
    "down": Product("grouped_matmul", 1, 1, WIDTH, MODEL, MODEL, MODEL * WIDTH),
    "down_t": Product("grouped_matmul_transposed", 1, 1, MODEL, WIDTH, WIDTH, MODEL * WIDTH),
    "gate_up_weights": Product("grouped_matmul_weights", 1, 2, MODEL, WIDTH, 2 * WIDTH, 2 * MODEL * WIDTH),
    "down_weights": Product("grouped_matmul_weights", 1, 1, WIDTH, MODEL, MODEL, MODEL * WIDTH),
}


def build(mesh: Mesh, product: str, options: dict | None = None):
    """(function, abstract arguments) of one of our kernels at the shapes above."""
    made = functools.partial(aot.abstract, mesh)
    bf16, options = jnp.bfloat16, options or {}
    parts = 2 if product.startswith("gate") else 1
    k, n = (MODEL, WIDTH) if parts == 2 else (WIDTH, MODEL)
    rows, back = made((ROWS, k), bf16), made((ROWS, parts, n), bf16)
    weights, sizes = made((EXPERTS, parts, k, n), bf16), made((EXPERTS,), jnp.int32)
    options = dict(interpret=False) | options
    if product == "gated":
        return functools.partial(pallas_tpu.gated, activation="silu", **options), (rows, weights, sizes)
    if product.endswith("_t"):
        return functools.partial(pallas_tpu.gmm_t, **options), (back, weights, sizes)
    if product.endswith("_weights"):
        return functools.partial(pallas_tpu.tgmm, **options), (rows, back, sizes)
    return functools.partial(pallas_tpu.gmm, **options), (rows, weights, sizes)


def build_megablox(mesh: Mesh, tile: Sequence[int], transposed: bool = False):
    """megablox gmm (or tgmm) of gate and up as one matrix."""
    made = functools.partial(aot.abstract, mesh)
    bf16, width = jnp.bfloat16, 2 * WIDTH
    sizes, rows = made((EXPERTS,), jnp.int32), made((ROWS, MODEL), bf16)
    options = dict(preferred_element_type=bf16, tiling=tuple(tile))
    if transposed:
        return lambda x, g, s: megablox_tgmm(x.T, g, s, **options), (rows, made((ROWS, width), bf16), sizes)
    return functools.partial(megablox_gmm, **options), (rows, made((EXPERTS, MODEL, width), bf16), sizes)


def histogram(kind: str, seed: int) -> np.ndarray:
    """Rows of each expert, drawn: [128]."""
    rng = np.random.default_rng(seed)
    share = np.ones(EXPERTS)
    if kind == "zipf":
        share = rng.permutation(np.arange(1, EXPERTS + 1) ** -0.7)
    return rng.multinomial(ROWS // 2 if kind == "half" else ROWS, share / share.sum())


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cycles of all visits, and the same where copies at HBM's bandwidth may take longer than a visit."""

    cycles: float
    with_hbm: float

    def use(self, chip: aot.Chip, operations: float) -> tuple[float, float]:
        return operations / self.cycles / chip.flops_per_cycle, operations / self.with_hbm / chip.flops_per_cycle


def _main_loop(schedule: aot.Schedule) -> aot.Loop:
    return max(schedule.loops, key=lambda loop: loop.matmuls)


def _around(schedule: aot.Schedule, outer: aot.Loop, inner: aot.Loop, longest: bool) -> int:
    """Cycles of one trip through `outer` without those in `inner`, by the shortest way or the longest."""
    return sum(
        schedule.path(a, b, trips=lambda loop: 0, longest=longest)
        for a, b in ((outer.start, inner.start), (inner.stop, outer.stop))
    )


def row_cost(schedule: aot.Schedule, product: Product, sizes: np.ndarray, chip: aot.Chip, **options) -> Cost:
    """Cost of one of our row products over a histogram, by the chunks that the kernel's own plan gives."""
    with jax.set_mesh(aot.topology_mesh(chip.topology)):  # the cut depends on the chip
        parts = product.weights // product.inner // product.outer
        shapes = pallas_tpu.row_tiling(
            ROWS,
            *(product.inner, product.outer, parts, jnp.bfloat16),
            **dict(transposed=product.kernel.endswith("transposed")) | options,
        )
    plan, table = pallas_tpu.make_plan(
        jnp.asarray(sizes, jnp.int32), ROWS, shapes.unit, shapes.most, every_group=False, pairs=shapes.pairs
    )
    table = np.asarray(table)
    chunk_loop = _main_loop(schedule)
    blocks = [b for b in schedule.matmul_blocks() if chunk_loop.start <= b[0] < chunk_loop.stop]
    assert len(blocks) == shapes.most // shapes.pairs - shapes.least + 1, (
        "one stretch of matrix instructions per size of chunk"
    )
    chunk_cycles = [
        schedule.path(
            chunk_loop.start,
            chunk_loop.stop,
            trips=lambda loop: shapes.trips,
            avoid=[(a, b) for a, b, _ in blocks if a != start],
        )
        for start, _, _ in blocks
    ]
    begin = table[plan.begin :][: table[plan.scalar("groups")] + 1]
    units = table[plan.field("units") + 1 :][: table[plan.scalar("chunks")]]
    weight_bytes = 2 * product.weights / shapes.tiles
    row_bytes = 2 * (product.parts_in * product.inner + product.parts_out * product.outer / shapes.tiles)
    busy, copied = [], []
    for a, b in itertools.pairwise(begin):
        busy.append(sum(chunk_cycles[max(-(-u // shapes.pairs) - shapes.least, 0)] for u in units[a:b]))
        copied.append(row_bytes * shapes.unit * float(units[a:b].sum()))
    edges = schedule.path(0, chunk_loop.start, trips=lambda loop: 1) + schedule.path(
        chunk_loop.stop, schedule.cycles, trips=lambda loop: 1
    )
    with_hbm = _pipeline(busy, copied, weight_bytes, pallas_tpu.WEIGHT_RING, chip)
    return Cost((edges + sum(busy)) * shapes.tiles, (edges + with_hbm) * shapes.tiles)


def _pipeline(busy: Sequence[float], copied: Sequence[float], weights: float, ring: int, chip: aot.Chip) -> float:
    """Cycles when group g may start once its weights are there, fetched since group g - ring + 1 began, and HBM serves
    one copy after the other: rows of a group while it runs, weights in order.
    """
    port = end = 0.0
    ready = []
    for _ in range(min(ring - 1, len(busy))):
        port += weights / chip.bytes_per_cycle
        ready.append(port)
    for group, cycles in enumerate(busy):
        begin = max(end, ready[group])
        port = max(port, begin) + copied[group] / chip.bytes_per_cycle
        rows_done = port
        if group + ring - 1 < len(busy):
            port += weights / chip.bytes_per_cycle
            ready.append(port)
        end = max(begin + cycles, rows_done)
    return end


def tgmm_cost(schedule: aot.Schedule, product: Product, sizes: np.ndarray, chip: aot.Chip, **options) -> Cost:
    """As `row_cost` for the gradient of the weights."""
    parts = product.columns // product.outer
    with jax.set_mesh(aot.topology_mesh(chip.topology)):
        cut = pallas_tpu.weight_tiling(ROWS, product.inner, product.outer, parts, jnp.bfloat16, **options)
    plan, table = pallas_tpu.make_plan(
        jnp.asarray(sizes, jnp.int32), ROWS, cut.unit, cut.most, every_group=True, pairs=None, fold=pallas_tpu.LANES
    )
    table = np.asarray(table)
    step_loop = _main_loop(schedule)
    chunk_loop = max(step_loop.inner, key=lambda loop: loop.matmuls)
    blocks = [b for b in schedule.matmul_blocks() if chunk_loop.start <= b[0] < chunk_loop.stop]
    assert len(blocks) == cut.depth, "one stretch of matrix instructions for each number of passes"
    trips = cut.trips * parts // cut.tile_parts

    @functools.cache
    def chunk_cycles(passes: int) -> int:
        """The longest way: both masks, copies of zeros and of spared rows, whether the chunk needs them or not."""
        return schedule.path(
            chunk_loop.start,
            chunk_loop.stop,
            trips=lambda loop: trips,
            avoid=tuple((a, b) for i, (a, b, _) in enumerate(blocks) if i != passes - 1),
        )

    # A group without rows writes zeros: the longest way.
    fixed = {empty: _around(schedule, step_loop, chunk_loop, empty) for empty in (False, True)}
    tiles = product.inner * product.outer // math.prod(cut.columns)
    begin = table[plan.begin :][: EXPERTS + 1]
    units, spared = (table[plan.field(name) + 1 :] for name in ("units", "spared"))
    cycles = with_hbm = 0.0
    out_bytes = 2 * parts * math.prod(cut.columns)
    row_bytes = 2 * (cut.columns[0] + parts * cut.columns[1])
    for a, b in itertools.pairwise(begin):
        busy = fixed[a == b]
        for c in range(a, b):
            busy += chunk_cycles(-(-int(units[c]) * cut.unit // pallas_tpu.LANES))
        cycles += busy
        copied = float(units[a:b].sum() + np.count_nonzero(spared[a:b]))
        with_hbm += max(busy, (out_bytes + row_bytes * cut.unit * copied) / chip.bytes_per_cycle)
    return Cost(cycles * tiles, with_hbm * tiles)


def megablox_cost(schedule: aot.Schedule, tile: Sequence[int], sizes: np.ndarray, chip: aot.Chip) -> Cost:
    """Visits of megablox's raster of row tiles (one for each group a tile has rows of) x cycles of a visit."""
    loop = _main_loop(schedule)
    stop = np.cumsum(sizes)
    start = stop - sizes
    visits = int(sum(-(-b // tile[0]) - a // tile[0] for a, b in zip(start, stop, strict=True) if b > a))
    columns = 2 * WIDTH // tile[2]
    cycles = schedule.path(loop.start, loop.stop, trips=lambda loop: 1) * visits * columns
    moved = 2 * (ROWS * MODEL * columns + 2 * WIDTH * (EXPERTS * MODEL + ROWS))
    return Cost(cycles, max(cycles, moved / chip.bytes_per_cycle))


_TARGET = str(pathlib.Path(__file__).resolve())
# Megablox's best tiles of those tried, by chip; tgmm's among those that fit VMEM.
MEGABLOX = {"v5e": ((64, 2048, 1536), (128, 2048, 1536)), "v5p": ((64, 2048, 1536),), "v6e": ((128, 2048, 1536),)}
MEGABLOX_WEIGHTS = {"v5e": ((128, 2048, 768),), "v5p": (), "v6e": ((256, 2048, 768),)}


def schedules(chip: str, product: str) -> aot.KernelSchedule:
    """Compiles one of our products."""
    return aot.compile_schedules(f"{_TARGET}:build", chip, product=product)[PRODUCTS[product].kernel]


def megablox_schedules(chip: str, tile: Sequence[int], transposed: bool = False) -> aot.KernelSchedule:
    """Compiles megablox's gate and up (or the gradient of their weights)."""
    found = aot.compile_schedules(f"{_TARGET}:build_megablox", chip, tile=list(tile), transposed=transposed)
    return found["tgmm" if transposed else "gmm"]


def _mean_use(chip: str, cost, product: Product, kind: str) -> tuple[float, float]:
    uses = []
    for seed in range(SEEDS):
        sizes = histogram(kind, seed)
        operations = 2.0 * float(sizes.sum()) * product.inner * product.columns
        uses.append(cost(sizes).use(aot.CHIPS[chip], operations))
    within, with_hbm = np.mean(uses, 0)
    return float(within), float(with_hbm)


def our_use(chip: str, product: str, schedule: aot.Schedule, kind: str) -> float:
    """Effective use of one of our products, mean over draws of a histogram."""
    return _our_uses(chip, product, schedule, kind)[0]


def _our_uses(chip: str, product: str, schedule: aot.Schedule, kind: str) -> tuple[float, float]:
    cost = tgmm_cost if product.endswith("_weights") else row_cost
    of = PRODUCTS[product]
    return _mean_use(chip, lambda sizes: cost(schedule, of, sizes, aot.CHIPS[chip]), of, kind)


def megablox_use(chip: str, tile: Sequence[int], schedule: aot.Schedule, kind: str) -> float:
    """The same for megablox's gate and up."""
    return _megablox_uses(chip, tile, schedule, kind)[0]


def _megablox_uses(chip: str, tile: Sequence[int], schedule: aot.Schedule, kind: str) -> tuple[float, float]:
    cost = functools.partial(megablox_cost, schedule, tile, chip=aot.CHIPS[chip])
    return _mean_use(chip, lambda sizes: cost(sizes), PRODUCTS["gate_up"], kind)


def bound(chip: str, product: str, kind: str) -> float:
    """Use with every operand moved between HBM and the core once, at the published bandwidth."""
    of, sizes = PRODUCTS[product], histogram(kind, 0)
    rows = float(sizes.sum())
    moved = 2 * (rows * (of.parts_in * of.inner + of.parts_out * of.outer) + np.count_nonzero(sizes) * of.weights)
    operations = 2.0 * rows * of.inner * of.columns
    return min(1.0, operations / aot.CHIPS[chip].flops_per_cycle / (moved / aot.CHIPS[chip].bytes_per_cycle))


def passes_bound(chip: str, kind: str) -> float:
    """Use of a tgmm that takes only the time of ceil(rows / depth) passes of the matrix units for each group."""
    depth = {"v6e": 256}.get(chip, 128)
    draws = [histogram(kind, seed) for seed in range(SEEDS)]
    return float(np.mean([np.sum(sizes) / (depth * np.sum(-(-sizes // depth))) for sizes in draws]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=aot.CHIPS, default=list(aot.CHIPS))
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    args = parser.parse_args()
    if reason := aot.missing():
        print(f"TPU schedules left out: {reason}")
        return
    print("Effective use of the matrix units, from schedules; nothing was run. use (stored) HBM / bound")
    print(f"{'':34}{'bundles':>8}{'spills':>7}  " + "".join(f"{kind:^28}" for kind in HISTOGRAMS))

    def line(chip, name, product, kernel, uses):
        cells = []
        for kind in HISTOGRAMS:
            (use, hbm), (stored, _) = uses(kernel.full, kind), uses(kernel.stored, kind)
            cells.append(f"{use:6.3f} ({stored:5.3f}) {hbm:5.3f} /{bound(chip, product, kind):5.2f}")
        label = f"{chip} {name}"
        if product.endswith("_weights"):
            cells.append("passes " + " ".join(f"{passes_bound(chip, kind):.3f}" for kind in HISTOGRAMS))
        print(f"{label:34}{kernel.stored.cycles:8}{kernel.full.spills:7}  " + "  ".join(cells), flush=True)

    for chip in args.chips:
        for product in args.products:
            line(chip, product, product, schedules(chip, product), functools.partial(_our_uses, chip, product))
        for transposed, tiles in ((False, MEGABLOX[chip]), (True, MEGABLOX_WEIGHTS[chip])):
            for tile in tiles:
                kernel = megablox_schedules(chip, tile, transposed)
                name = f"megablox {'tgmm' if transposed else 'gmm'} {'x'.join(map(str, tile))}"
                of = "gate_up_weights" if transposed else "gate_up"
                line(chip, name, of, kernel, functools.partial(_megablox_uses, chip, tile))


if __name__ == "__main__":
    main()
