"""The global model at an operational load on a slice of a TPU pod: a forecast cycle and a train step, compiled ahead of
time. **Nothing is run.**

    python examples/world_pod.py --preset configs/earth_pod.py:window_10m                     # a forecast cycle
    python examples/world_pod.py --preset configs/earth_pod.py:window_10m --topology v5p:4x4x4 --program train

Needs no TPU, only its compiler (extra `tpu`; set JAX_PLATFORMS=cpu where there is no TPU). The cycle assimilates all
reports of a window, advances one step and observes as many points with every sensor; the train step is that of
`earth.world.training`, with recomputation. Chains lie over `data`, anchors and reports over `space`
(`earth.world.sharding`). Printed are what a chip has to hold, the collectives with their bytes and the Pallas kernels,
all from the compiled program, and below them a roofline, which is arithmetic and no measurement:

    matrices     2 x multiplications of all dense maps and of the tiles that the kernels visit, at the chip's peak.
                 Dense maps multiply float32 in one bfloat16 pass, XLA's default on TPU. Kernels multiply float32
                 operands in six, bfloat16 ones in one, and every head takes a whole group of 128 lanes.
    memory       every input and output of a dense map once, and every tile that a kernel visits, at the bandwidth of
                 HBM: what is between is counted as fused
    links        bytes of the collectives that a chip receives, at all its links, one way (v5p: half of the published
                 1,200 GB/s, cloud.google.com/tpu/docs/v5p, read 2026-11)

The tiles visited are counted on points drawn evenly over the sphere. Sorting and lists of tiles, vector units, latency
and what is not overlapped are left out: the sum of the three is a bound for no overlap, the largest for all of it.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # presets and examples are not installed

from configs.earth_pod import EarthPod
from earth.kernels.neighbour_attention.tiles import Lanes
from earth.neighbours import Neighbourhood, nearest
from earth.world import climate, model, network
from earth.world import training as chains
from earth.world.climate import Climate
from earth.world.field import Anchors, FieldConfig, make_anchors
from earth.world.model import Fitted, Params, State, WorldConfig
from earth.world.records import SensorConfig, Tokens, host_place
from earth.world.sharding import GLOBE, split_over, token_shardings
from moe import params as parameters
from moe import training
from moe.config import load_config
from moe.kernels import aot
from moe.sharding import AxisRules, make_mesh, use_mesh

LINKS = {"v5p": 600e9}
"""Bytes a second that a chip receives over all its links, published."""
TILE = 128
PROGRAMS = ("cycle", "train")


class PodError(ValueError):
    """A slice that the preset does not fit. The message names the value and the remedy."""


# ---- the programs
@dataclasses.dataclass(frozen=True)
class Program:
    """Jitted function and its abstract arguments; call and lower it inside `use_mesh(mesh, rules)`."""

    function: Any
    args: tuple[Any, ...]


def place(cfg: EarthPod, devices: Sequence[Any]) -> tuple[Mesh, AxisRules]:
    """The preset's mesh over these devices, and its rules."""
    if len(devices) % cfg.data:
        raise PodError(f"{len(devices)} devices do not divide over data {cfg.data}")
    space = len(devices) // cfg.data
    if cfg.world.field.count % space:
        raise PodError(f"{cfg.world.field.count} anchors do not divide over {space} devices; choose another number")
    return make_mesh({"data": cfg.data, "space": space}, devices=devices), GLOBE


def _shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def fitted_shapes(world: WorldConfig, statics: int, platforms: int = 8000) -> Fitted:
    """What `earth.world.model.fit` makes, of ShapeDtypeStruct; so many platforms of each fixed sensor."""
    m, reach = world.field.count, world.field.reach
    anchors = Anchors(
        _shape(m), _shape(m), _shape(m), _shape(m, 4), _shape(m, 3, 4),
        Neighbourhood(_shape(m, reach, dtype=jnp.int32), _shape(m)), _shape(m, statics),
    )  # fmt: skip
    mean, spread = (len(p) for p in climate.penalties())
    normals = {}
    for s in world.sensors:
        v = len(s.variables)
        sites = platforms if s.fixed else 0
        normals[s.sensor] = Climate(
            _shape(mean, v), _shape(spread, v), _shape(sites, v), _shape(), _shape(), _shape(), _shape(v), _shape(4, 4)
        )
    return Fitted(normals, anchors, _shape(len(world.network.heights)))


def token_shapes(s: SensorConfig, field: FieldConfig, lead: tuple[int, ...] = ()) -> Tokens:
    """One sensor's reports of a window, with leading axes."""
    lead, v = (*lead, s.tokens), len(s.variables)
    return Tokens(
        _shape(*lead, v), _shape(*lead, v, dtype=jnp.bool_), _shape(*lead, v), *(_shape(*lead) for _ in range(5)),
        near=Neighbourhood(_shape(*lead, field.neighbours, dtype=jnp.int32), _shape(*lead)),
    )  # fmt: skip


def padded(world: WorldConfig, parts: int) -> WorldConfig:
    """Reports of every sensor up to a multiple, as `earth.world.sharding.pad` has them."""
    sensors = tuple(dataclasses.replace(s, tokens=-(-s.tokens // parts) * parts) for s in world.sensors)
    return dataclasses.replace(world, sensors=sensors)


def program(cfg: EarthPod, name: str, mesh: Mesh, rules: AxisRules) -> Program:
    """The forecast cycle or the train step on a mesh."""
    if name not in PROGRAMS:
        raise PodError(f"program {name!r} is not one of {', '.join(PROGRAMS)}")
    world = padded(cfg.world, split_over("query", mesh, rules)[1])
    whole = NamedSharding(mesh, PartitionSpec())

    def on(shapes: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def tokens(lead: tuple[int, ...], names: tuple[str | None, ...]) -> dict[str, Tokens]:
        made = {s.sensor: token_shapes(s, world.field, lead) for s in world.sensors}
        return {k: on(t, token_shardings(t, mesh, rules, lead=names)) for k, t in made.items()}

    fitted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), fitted_shapes(world, cfg.statics)
    )
    specs = network.network_specs(world.network, world.sensors, cfg.statics)
    net = parameters.abstract(specs, mesh, rules)
    if name == "cycle":
        latent = NamedSharding(mesh, PartitionSpec(*split_over("anchor", mesh, rules)[0]))
        state = State(
            jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
            jax.ShapeDtypeStruct((world.field.count, world.network.width), jnp.float32, sharding=latent),
        )
        cycle = jax.jit(functools.partial(forecast_cycle, cfg=world), donate_argnums=1)
        return Program(cycle, (Params(fitted, net), state, tokens((), ()), tokens((), ())))
    stage = cfg.stage
    lead = (stage.batch, stage.spin + stage.cycles + stage.leads)
    batch = {
        "tokens": tokens(lead, ("batch", None)),
        "time": jax.ShapeDtypeStruct(lead, jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data"))),
    }
    optimizer = chains.make_optimizer(stage)
    state = training.abstract_state(net, optimizer, ema=True)
    step = training.make_train_step(
        lambda net, batch, rng, fitted: chains.loss(net, batch, rng, fitted=fitted, cfg=world, stage=stage), optimizer,
        clip_norm=1.0, ema_decay=0.999, shardings=training.state_shardings(state),
    )  # fmt: skip
    return Program(step, (state, batch, fitted))


def forecast_cycle(
    params: Params, state: State, tokens: Mapping[str, Tokens], queries: Mapping[str, Tokens], *, cfg: WorldConfig
) -> tuple[State, dict[str, Any]]:
    """An analysis at the state's time, one step on, and what every sensor would report there."""
    state = model.assimilate(params, state, tokens, state.time, cfg=cfg)
    state = model.advance(params, state, 1, cfg=cfg)
    return state, {name: model.observe(params, state, name, q, cfg=cfg) for name, q in queries.items()}


# ---- ahead of time
def compiled(cfg: EarthPod, name: str, topology: str) -> tuple[aot.Report, Program, Mesh, float]:
    """(report, program, mesh, seconds of compilation) for a topology that is not here."""
    mesh, rules = place(cfg, aot.topology_devices(topology))
    made = program(cfg, name, mesh, rules)
    with use_mesh(mesh, rules):
        lowered = made.function.lower(*made.args)
        begun = time.perf_counter()
        done = lowered.compile()
    return aot.report_of(done), made, mesh, time.perf_counter() - begun


def describe(cfg: EarthPod, name: str, topology: str) -> str:
    """The table of one compilation."""
    kind = topology.split(":")[0]
    if kind not in LINKS:
        raise PodError(f"topology {topology!r} is of no chip whose links are known; choose one of {', '.join(LINKS)}")
    chip = aot.CHIPS[kind]
    report, _, mesh, seconds = compiled(cfg, name, topology)
    new = report.output_bytes - report.alias_bytes
    total = report.argument_bytes + new + report.temporary_bytes + report.code_bytes
    figures = {
        "arguments": report.argument_bytes,
        "outputs": report.output_bytes,
        "  in the place of arguments": report.alias_bytes,
        "temporaries": report.temporary_bytes,
        "program": report.code_bytes,
        "all, outputs in place once": total,
        "live at the peak": report.peak_bytes,
        "memory of a chip": chip.hbm_bytes,
    }
    world = cfg.world
    specs = network.network_specs(world.network, world.sensors, cfg.statics)
    lines = [
        f"{name}: {cfg.reports:,} reports a window, {world.field.count:,} anchors, width {world.network.width}, "
        f"{parameters.count(specs) / 1e6:.1f} million parameters; {topology} ({mesh.size} chips), mesh "
        f"{dict(mesh.shape)}"
    ]
    if name == "train":
        stage = cfg.stage
        lines.append(f"batch {stage.batch}: {stage.cycles} windows assimilated, {stage.leads} forecast, recomputed")
    lines += ["", "GiB a chip", *(f"{label:<28}{size / (1 << 30):>8.2f}" for label, size in figures.items())]
    lines.append(f"{'all / memory of a chip':<28}{total / chip.hbm_bytes:>8.1%}")
    traffic = aot.collective_traffic(report.text)
    lines += ["", f"{'collectives':<28}{'times':>8}{'received, MB a chip':>22}"]
    lines += [f"  {kind:<26}{count:>8}{size / 1e6:>22,.1f}" for kind, (count, size) in sorted(traffic.items())]
    kernels = {label: report.kernels.count(label) for label in sorted(set(report.kernels))}
    lines += ["", "Pallas kernels in the text: " + (", ".join(f"{k} x {n}" for k, n in kernels.items()) or "none")]
    lines += ["", *roofline(cfg, name, mesh, chip, sum(size for _, size in traffic.values()) / LINKS[kind])]
    lines.append(f"compiled in {seconds:.0f} s; nothing was run")
    return "\n".join(lines)


# ---- arithmetic
@dataclasses.dataclass(frozen=True)
class Work:
    """Of one chip: operations of dense maps and of kernels (as executed, padding and passes included), bytes of HBM."""

    dense: float = 0.0
    kernels: float = 0.0
    moved: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.dense + other.dense, self.kernels + other.kernels, self.moved + other.moved)

    def times(self, dense: float, kernels: float, moved: float) -> "Work":
        return Work(self.dense * dense, self.kernels * kernels, self.moved * moved)


def maps(rows: float, *shapes: tuple[int, int]) -> Work:
    """Dense maps of so many rows, [(inputs, outputs), ...]."""
    return Work(
        dense=sum(2.0 * rows * i * o for i, o in shapes),
        moved=sum(4.0 * rows * (i + o) + 4.0 * i * o for i, o in shapes),
    )


def visits(points: int, field: FieldConfig, anchors: np.ndarray, reach: int | None = None) -> int:
    """Pairs of a tile of points and a tile of anchors that meet, counted by `earth.kernels.neighbour_attention.tiles`
    on points drawn evenly over the sphere; with `reach` the points are anchors themselves, a band about the equator.
    """
    from earth.kernels.neighbour_attention import pairs
    from earth.kernels.neighbour_attention.shapes import POINTS
    from earth.kernels.neighbour_attention.tiles import sort

    rng = np.random.default_rng(points)
    if reach is None:
        latitude = np.rad2deg(np.arcsin(rng.uniform(-1, 1, points)))
        place = host_place(field, latitude, rng.uniform(-180, 180, points), 0 * latitude)
    else:
        place = anchors[(len(anchors) - points) // 2 :][:points]
    near = nearest(place, anchors, reach or field.neighbours)
    meet = sort(pairs(jnp.asarray(place, jnp.float32), jnp.asarray(anchors, jnp.float32), near), TILE).meet
    return int(meet[POINTS].count.sum())


def kernel_work(count: int, cfg: network.NetworkConfig, backward: bool) -> Work:
    """Of so many visits, forward or with the gradient's two passes alone."""
    scores, values = Lanes(cfg.heads, cfg.key), Lanes(cfg.heads, cfg.width // cfg.heads)
    exact = cfg.operands == "float32"
    product = 2.0 * TILE**2 * (6 if exact else 1) * cfg.heads
    # Forward: scores, values. Backward: again both, and the gradients of one side; then of the other, with its values.
    operations = product * (4 * scores.group + 3 * values.group if backward else scores.group + values.group)
    tile = TILE * ((scores.total + values.total) * (4 if exact else 2) + 4 * 64)
    return Work(kernels=count * operations, moved=count * tile * (2.0 if backward else 1.0))


def windows(cfg: EarthPod, parts: int) -> dict[str, tuple[Work, Work]]:
    """{stage of a window: (work of its forward pass, of the gradients of its kernels)} of one of `parts` chips."""
    world = padded(cfg.world, parts)
    how, field = world.network, world.field
    m, d, h, z = field.count // parts, how.width, how.heads, len(how.heights)
    key, hidden, forcing = h * how.key, 2 * d, network.forcing_width(cfg.statics)
    anchors = np.asarray(make_anchors(field).place, np.float64)
    met = {n: visits(n, field, anchors) for n in {s.tokens // parts for s in world.sensors}}
    own = visits(m, field, anchors, field.reach)

    def block() -> tuple[Work, Work]:
        dense = maps(
            m, (d, key), (d, key), (d, d), (d, d), (d, how.expansion * d), (how.expansion * d, d), (forcing, hidden)
        )
        return dense + kernel_work(own, how, False), kernel_work(own, how, True)

    def repeated(pair: tuple[Work, Work], count: int) -> tuple[Work, Work]:
        return pair[0].times(count, count, count), pair[1].times(count, count, count)

    read, fed, gradient = maps(m, (d, key), (d, d)), maps(m, (d, hidden), (hidden, d), (d, d)), Work()
    normals = Work()
    mean, spread = (len(p) for p in climate.penalties())
    for s in world.sensors:
        n, v, seen = s.tokens // parts, len(s.variables), met[s.tokens // parts]
        about = network.PLACE + network.AGE
        read += maps(n, (d, hidden), (d, hidden), (about, hidden), (network.PLACE, hidden)) + kernel_work(
            seen, how, False
        )
        if network.is_radiometer(s):
            read += maps(n, (hidden, z), (d, v), (d, v)) + Work(2.0 * n * v * z, 0.0, 8.0 * n * v * z)
        else:
            read += maps(n, (hidden, v), (hidden, v))
        fed += maps(n, (3 * v, d), (about + 3, d), (d, d), (d, key), (d, d)) + maps(m, (d, key), (d, d), (h, d))
        fed += kernel_work(seen, how, False)
        gradient += kernel_work(seen, how, True)
        normals += maps(n, (mean, v), (spread, v))
    inner = repeated(block(), how.analysis_layers)
    return {
        "read": (read, gradient),
        "analyse": (fed + inner[0], gradient + inner[1]),
        "step": repeated(block(), how.dynamics_layers),
        "normals": (normals, Work()),
    }


def work(cfg: EarthPod, name: str, parts: int) -> dict[str, Work]:
    """{stage: work of one chip} of a program; `parts` chips share a chain."""
    made = windows(cfg, parts)
    if name == "cycle":
        counts = {"read": 2, "analyse": 1, "step": 1, "normals": 1}
        return {k: made[k][0].times(n, n, n) for k, n in counts.items()}
    stage = cfg.stage
    chains_here = stage.batch / cfg.data
    counts = {
        "read": stage.cycles + stage.leads + 1, "analyse": stage.cycles, "step": stage.cycles + stage.leads,
    }  # fmt: skip
    passes = 4 if stage.remat else 3  # forward, again, and two for the gradients
    out = {}
    for k, n in counts.items():
        forward, gradient = made[k]
        n = n * chains_here
        out[k] = forward.times(n * passes, n * (passes - 2), n * passes) + gradient.times(n, n, n)
    return out


def roofline(cfg: EarthPod, name: str, mesh: Mesh, chip: aot.Chip, links: float) -> list[str]:
    """Lines of the table; `links`: seconds of the collectives."""
    peak, bandwidth = chip.flops_per_cycle * chip.hertz * 2, chip.bytes_per_second * 2  # a v5p chip is two cores
    lines = [f"{'roofline, ms a chip':<28}{'dense':>8}{'kernels':>9}{'memory':>8}   (TFLOP, TFLOP, GB)"]
    total = Work()
    for stage, one in work(cfg, name, mesh.shape["space"]).items():
        total += one
        times = one.dense / peak, one.kernels / peak, one.moved / bandwidth
        lines.append(
            f"  {stage:<26}{1e3 * times[0]:>8.2f}{1e3 * times[1]:>9.2f}{1e3 * times[2]:>8.2f}"
            f"   ({one.dense / 1e12:.2f}, {one.kernels / 1e12:.2f}, {one.moved / 1e9:.1f})"
        )
    parts = (total.dense + total.kernels) / peak, total.moved / bandwidth, links
    label = dict(zip(("matrices", "memory", "links"), parts, strict=True))
    lines.append("bounds: " + ", ".join(f"{k} {1e3 * v:.1f} ms" for k, v in label.items()))
    lines.append(
        f"step time: {1e3 * max(parts):.0f} ms if all overlaps, {1e3 * sum(parts):.0f} ms if nothing does; not measured"
    )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--preset", default="configs/earth_pod.py:window_10m", metavar="FILE.py:NAME", help="default: %(default)s"
    )
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="e.g. data=2"
    )
    parser.add_argument("--program", choices=PROGRAMS, default="cycle")
    parser.add_argument("--topology", help="e.g. v5p:4x4x4 (default: the preset's)")
    given = parser.parse_args(arguments)
    cfg = load_config(given.preset, given.overrides)
    try:
        print(describe(cfg, given.program, given.topology or cfg.topology))
    except (PodError, aot.TpuCompilerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
