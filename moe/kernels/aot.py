"""Compiles for TPUs that are not there; reads what the compiler made of it: memory, collectives, kernels, schedules.

    mesh = topology_mesh("v5e:2x2", {"data": 2, "expert": 2})
    report = compile_report(function, mesh, abstract(mesh, (8192, 512), jnp.bfloat16, P("data")), ...)
    report.temporary_bytes, report.collectives, report.kernels

    kernel = compile_schedules("candidate.py:build", "v5e")["my_kernel"]     # build() runs in a process of its own
    kernel.full.cycles, [loop.matmuls for loop in kernel.full.loops]

Needs libtpu of this jaxlib (`missing()` says what lacks): pip install 'jax[tpu]==VERSION', never a bare libtpu.

The compiler is the real one; **nothing is run**. A `Report` is per device, after partitioning. A `Schedule` is the
static schedule of one kernel's very long instruction words: one bundle a cycle while nothing stalls. It knows the
latencies of the core's units, but no waits for copies from HBM, no fetching of instructions, no clocks. Loops and
branches are in it once: `Schedule.path` weighs them with trip counts that the caller knows.

Traps: without `jax.set_mesh` Pallas takes the host for its target. XLA's `cost_analysis()` counts a loop's body once.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class TpuCompilerError(RuntimeError):
    """The TPU compiler is not there, or a compilation in a process of its own failed. The message says what to do."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One core of a TPU as its schedules see it.

    Attributes:
        topology: the smallest topology the compiler knows by name.
        flops_per_cycle: of all matrix units, dense bfloat16.
        hertz: such that flops_per_cycle x hertz x cores is the published peak.
        bytes_per_second: of HBM, published, this core's share.
        hbm_bytes: of HBM, published, of the whole chip, which is one device.
    """

    topology: str
    flops_per_cycle: int
    hertz: float
    bytes_per_second: float
    hbm_bytes: int

    @property
    def bytes_per_cycle(self) -> float:
        return self.bytes_per_second / self.hertz


# Peaks, bandwidths and sizes as published (197, 459 and 918 TFLOP/s, 819, 2765 and 1640 GB/s, 16, 95 and 32 GiB a
# chip). Multiplications a cycle from the spacing of the matrix instructions in schedules: four 128 x 128 units that
# take a row a cycle; on v6e two of 256 x 256 that take two. A v5p chip is two cores.
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip("v5e:2x2", 4 * 128 * 128 * 2, 197e12 / 131_072, 819e9, 16 << 30),
    "v5p": Chip("v5p:2x2x1", 4 * 128 * 128 * 2, 459e12 / 2 / 131_072, 2765e9 / 2, 95 << 30),
    "v6e": Chip("v6e:2x2", 2 * 256 * 256 * 2 * 2, 918e12 / 524_288, 1640e9, 32 << 30),
}


def missing() -> str | None:
    """Why nothing can be compiled for a TPU here, None if it can."""
    if importlib.util.find_spec("libtpu") is None:
        return f"no libtpu: pip install 'jax[tpu]=={jax.__version__}'"
    version = importlib.metadata.version("libtpu")
    wanted = [r for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu")]
    if not any(f"=={version.rsplit('.', 1)[0]}." in r.replace(" ", "") for r in wanted):
        return f"libtpu {version} is not that of jax {jax.__version__} ({wanted}): pip install 'jax[tpu]'"
    return None


def topology_mesh(topology: str, axes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh of devices that are not there.

    Args:
        topology: a name of CHIPS, or one the compiler knows: "v5e:4x4", "v5p:8x8x8", "tpu7x:2x2x1".
        axes: mesh axes and their sizes; one device if left out.

    Raises:
        TpuCompilerError: no libtpu, or too few devices in the topology.
    """
    devices = topology_devices(topology)
    axes = {"device": 1} if axes is None else axes
    if math.prod(axes.values()) > len(devices):
        name = CHIPS[topology].topology if topology in CHIPS else topology
        raise TpuCompilerError(f"{dict(axes)} needs {math.prod(axes.values())} devices, {name} has {len(devices)}")
    return Mesh(np.array(devices[: math.prod(axes.values())]).reshape(*axes.values()), tuple(axes))


def topology_devices(topology: str) -> list[Any]:
    """All devices of a topology, for `moe.sharding.make_mesh`; arguments and errors as in `topology_mesh`."""
    if reason := missing():
        raise TpuCompilerError(reason)
    name = CHIPS[topology].topology if topology in CHIPS else topology
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other processes may be compiling too
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def abstract(
    mesh: Mesh, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, spec: PartitionSpec | None = None
) -> jax.ShapeDtypeStruct:
    """An array of `mesh` that exists in name only; replicated without `spec`."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec() if spec is None else spec))


# The result before the name ends with "]", with the "}" of a layout, or is a tuple.
_COLLECTIVE = re.compile(
    r"[\]})] (all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast)(?:-start)?\("
)
_KERNEL = re.compile(r'%([\w.-]+?)(?:\.\d+)? = [^\n]*?custom_call_target="tpu_custom_call"')


def count_collectives(text: str) -> Counter[str]:
    """How often each kind occurs in the text of a program; an asynchronous pair counts once, and so does one that
    returns a tuple.
    """
    return Counter(_COLLECTIVE.findall(text))


_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64} | {
    f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)
}
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
_CONDITION = re.compile(r" while\(.*condition=%?([\w.-]+)")
_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]+)\})")


def collective_traffic(text: str) -> dict[str, tuple[int, int]]:
    """{kind: (times, bytes that a device receives)} of an optimised program.

    Loops count as often as they go round, by the compiler's word or the one constant of their condition (once where
    there is neither), all branches of a condition once. With G devices in a group and results of b bytes a device
    receives (G - 1) / G b of an all-gather, (G - 1) b of a reduce-scatter, twice (G - 1) / G b of an all-reduce (a
    ring), b of others.
    """
    found: dict[str, Counter[str]] = {}
    sizes: dict[str, Counter[str]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    limits: dict[str, set[int]] = {}
    loops: dict[str, str] = {}  # body: condition
    entry = name = ""
    for line in text.splitlines():
        if line[:1] not in (" ", "}", "") and (head := _HEAD.match(line)):
            name = head[1]
            entry = name if line.startswith("ENTRY") else entry
            found[name], sizes[name], calls[name], limits[name] = Counter(), Counter(), [], set()
            continue
        if not name:
            continue
        if match := _COLLECTIVE.search(line):
            kind = match[1]
            size = _received(kind, line, line[: match.start() + 1], scattered="all-reduce-scatter" in name)
            kind = "reduce-scatter" if "all-reduce-scatter" in name else kind
            found[name][kind] += 1
            sizes[name][kind] += size
        limits[name] |= set(map(int, _LIMIT.findall(line)))
        known = _TRIPS.search(line)
        if (condition := _CONDITION.search(line)) and not known:
            loops |= dict.fromkeys(_CALLED.findall(line), condition[1])
        calls[name] += [(called, int(known[1]) if known else 1) for called in _CALLED.findall(line)]
        if branches := _BRANCHES.search(line):
            calls[name] += [(called.strip(" %"), 1) for called in branches[1].split(",")]

    @functools.cache
    def total(name: str) -> tuple[Counter[str], Counter[str]]:
        times, moved = Counter(found[name]), Counter(sizes[name])
        for called, trips in calls[name]:
            if called in loops and len(limits.get(loops[called], ())) == 1:
                trips = max(limits[loops[called]])
            if called in found:
                for mine, theirs in zip((times, moved), total(called), strict=True):
                    for kind, value in theirs.items():
                        mine[kind] += trips * value
        return times, moved

    times, moved = total(entry)
    return {kind: (times[kind], moved[kind]) for kind in times}


def _received(kind: str, line: str, before: str, *, scattered: bool) -> int:
    """Bytes a device receives in the collective of a line, whose text before its name is `before`."""
    arrays = [
        math.prod(int(n) for n in dims.split(",") if n) * _BITS[dtype] // 8
        for dtype, dims in _ARRAY.findall(before.partition(" = ")[2])
        if dtype in _BITS
    ]
    if f" {kind}-start(" in line and kind != "all-reduce":  # returns (operands, results, scalars)
        arrays = [size for size in arrays if size > 4]
        arrays = arrays[len(arrays) // 2 :]
    size = sum(arrays)
    match = _GROUPS.search(line)
    group = 1 if match is None else int(match[2]) if match[2] else len(match[3].split(","))
    if kind == "all-gather" or scattered:
        return size * (group - 1) // max(group, 1)
    if kind == "reduce-scatter":
        return size * (group - 1)
    return 2 * size * (group - 1) // max(group, 1) if kind == "all-reduce" else size


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of one program, per device.

    Attributes:
        argument_bytes, output_bytes, alias_bytes, temporary_bytes, peak_bytes: HBM. Outputs in donated arguments count
            as alias. Padding of tiles is included.
        code_bytes: of the program.
        collectives: how often each occurs in the program text; a loop's body counts once.
        kernels: names of the Pallas kernels, each call once.
        flops: XLA's estimate, None where it has none; loop bodies count once, a kernel what it declares.
        text: the optimised program.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    peak_bytes: int
    code_bytes: int
    collectives: Counter[str]
    kernels: tuple[str, ...]
    flops: float | None
    text: str = dataclasses.field(repr=False)


def compile_report(function: Callable[..., Any], mesh: Mesh, *args: Any, **jit_options: Any) -> Report:
    """Compiles `function` for the devices of `mesh`; `args` are pytrees of `abstract` arrays on it."""
    with jax.set_mesh(mesh):  # tells Pallas its target
        compiled = jax.jit(function, **jit_options).lower(*args).compile()
    return report_of(compiled)


def report_of(compiled: jax.stages.Compiled) -> Report:
    """The report of what `jax.jit(...).lower(...).compile()` made."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise TpuCompilerError("the compiler gives no memory analysis or text for this program")
    return Report(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        collectives=count_collectives(text),
        kernels=tuple(_KERNEL.findall(text)),
        flops=(compiled.cost_analysis() or {}).get("flops"),
        text=text,
    )


# A taken branch leaves after this many further bundles (v5e, v5p, v6e alike).
_DELAY_SLOTS = 4
_BUNDLE = re.compile(r" *(0x[0-9a-f]+|0) +[A-Z]* *: *>* *\{(.*)")
_BRANCH = re.compile(r"= sbr\.\w+ (\(!?%\w+\))?.*?target (?:= \$region(\d+)|bundleno = (\d+))")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")


@dataclasses.dataclass(frozen=True)
class Loop:
    """Bundles [start, stop) that are repeated.

    Attributes:
        inner: loops directly in it.
        matmuls: matrix instructions in it, those of inner loops included, each counted once.
    """

    start: int
    stop: int
    inner: tuple["Loop", ...]
    matmuls: int


class Schedule:
    """The bundles of one compiled kernel, in order.

    Attributes:
        cycles: bundles, each once.
        loops: outermost loops.
        spills: stores of registers to memory.
    """

    def __init__(self, text: str):
        """Parses `*-packed-bundles-post-ra.txt` (or `*-final_bundles.txt`) of libtpu."""
        self._text: list[str] = []
        regions: dict[int, int] = {}
        for line in text.splitlines():
            if match := _BUNDLE.match(line):
                self._text.append(match[2])
            if self._text:  # a bundle may go on over several lines; its regions come last
                regions |= dict.fromkeys(map(int, _REGION.findall(line)), len(self._text) - 1)
        if not self._text:
            raise ValueError("no bundles in this text; expected libtpu's '0x10 : { ... }' lines")
        self._matmuls = [len(re.findall(r"\bvmatmul\b", bundle)) for bundle in self._text]
        self._branches: dict[int, tuple[int, bool]] = {}
        for at, bundle in enumerate(self._text):
            if match := _BRANCH.search(bundle):
                # The region after the last bundle, the exit, is not named in stored schedules.
                target = int(match[3]) if match[3] else regions.get(int(match[2]), len(self._text))
                self._branches[at] = (target, match[1] is not None)
        self.cycles = len(self._text)
        self.spills = sum(len(re.findall(r"\bvst [^;]*_spill\]", bundle)) for bundle in self._text)
        spans = {
            (target, min(at + 1 + _DELAY_SLOTS, self.cycles))
            for at, (target, _) in self._branches.items()
            if target <= at
        }
        self.loops = self._nest(sorted(spans, key=lambda s: (s[0], -s[1])))

    def _nest(self, spans: list[tuple[int, int]]) -> tuple[Loop, ...]:
        loops = []
        while spans:
            start, stop = spans[0]
            inner = [s for s in spans[1:] if s[1] <= stop]
            spans = [s for s in spans[1:] if s[1] > stop]
            loops.append(Loop(start, stop, self._nest(inner), sum(self._matmuls[start:stop])))
        return tuple(loops)

    def all_loops(self) -> tuple[Loop, ...]:
        """Every loop, outer before inner."""

        def walk(loops: Iterable[Loop]) -> Iterable[Loop]:
            for loop in loops:
                yield loop
                yield from walk(loop.inner)

        return tuple(walk(self.loops))

    def matmul_blocks(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, matrix instructions) of the stretches between branches and their targets that have any."""
        cuts = {0, self.cycles} | {target for target, _ in self._branches.values()}
        cuts |= {min(at + 1 + _DELAY_SLOTS, self.cycles) for at in self._branches}
        edges = sorted(cuts)
        blocks = [(a, b, sum(self._matmuls[a:b])) for a, b in itertools.pairwise(edges)]
        return tuple(block for block in blocks if block[2])

    def path(
        self,
        start: int,
        stop: int,
        *,
        trips: Callable[[Loop], int],
        avoid: Iterable[tuple[int, int]] = (),
        longest: bool = True,
    ) -> int:
        """Cycles from bundle `start` until `stop` is reached.

        Args:
            trips: how often each loop on the way is gone through.
            avoid: stretches [from, to) not to be entered: the branches that this path does not take.
            longest: where branches are left open, the longest way (an upper bound); else the shortest.

        Raises:
            ValueError: there is no such way.
        """
        closed = frozenset(i for a, b in avoid for i in range(a, b))
        cycles = self._path(start, stop, trips, closed, max if longest else min)
        if cycles is None:
            raise ValueError(f"no way leads from bundle {start} to {stop} around {sorted(avoid)}; avoid fewer")
        return cycles

    def _path(self, start: int, stop: int, trips, closed: frozenset[int], choose) -> int | None:
        """Backwards over the bundles, each loop inside as one step."""
        # A loop that is the whole stretch is the one whose single trip is asked for.
        loops = [loop for loop in self.all_loops() if start <= loop.start and loop.stop <= stop]
        inside = [loop for loop in loops if (loop.start, loop.stop) != (start, stop)]
        outermost = {loop.start: loop for loop in reversed(inside)}
        best: dict[int, int] = {stop: 0}
        for at in range(stop - 1, start - 1, -1):
            if at in closed:
                continue
            options = []
            if at in outermost:
                loop = outermost[at]
                body = self._path(loop.start, loop.stop, trips, closed, choose) if trips(loop) else 0
                if loop.stop in best and body is not None:
                    options.append(trips(loop) * body + best[loop.stop])
            else:
                target, conditional = self._branches.get(at - _DELAY_SLOTS, (start, True))
                if conditional and at + 1 in best:
                    options.append(1 + best[at + 1])
                if at < target and target in best:
                    options.append(1 + best[target])
            if options:
                best[at] = choose(options)
        return best.get(start)


@dataclasses.dataclass(frozen=True)
class KernelSchedule:
    """One compiled kernel (a Pallas call, or a fusion of XLA's).

    Attributes:
        full: one bundle a cycle, waiting for results included: what to count cycles with.
        stored: the final bundles as stored; most waiting is folded into the bundle before it. Fewer than cycles.
    """

    name: str
    full: Schedule
    stored: Schedule


def parse_schedules(folder: pathlib.Path) -> dict[str, KernelSchedule]:
    """The kernels in a folder that libtpu dumped to, by name; the last one where a name occurs twice."""
    texts: dict[str, dict[str, str]] = {}
    for kind in ("packed-bundles-post-ra", "final_bundles"):
        for file in sorted(folder.glob(f"*-{kind}.txt")):
            if match := re.fullmatch(rf"\d+-(.+?)(?:\.\d+)?-\d+-{kind}\.txt", file.name):
                texts.setdefault(match[1], {})[kind] = file.read_text()
    return {
        name: KernelSchedule(name, *(Schedule(found[k]) for k in ("packed-bundles-post-ra", "final_bundles")))
        for name, found in texts.items()
        if len(found) == 2
    }


def compile_schedules(target: str, topology: str, **options: Any) -> dict[str, KernelSchedule]:
    """Compiles in a process of its own (libtpu reads its flags once) and parses the schedules of every Pallas kernel.

    Args:
        target: "package.module:build" or "file.py:build". build(mesh, **options) returns (function, args) as for
            `compile_report`, or a list of such pairs; name the kernels apart (`pl.pallas_call(name=...)`).
        topology: as in `topology_mesh`.
        options: keyword arguments for build; JSON.

    Raises:
        TpuCompilerError: no libtpu, or the process failed; with the end of what it wrote.
    """
    if reason := missing():
        raise TpuCompilerError(reason)
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        command = [sys.executable, "-m", "moe.kernels.aot", target, topology, json.dumps(options)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TpuCompilerError(f"compiling {target} for {topology} failed:\n{done.stderr[-3000:]}")
        names = set(json.loads(done.stdout.splitlines()[-1]))
        return {name: kernel for name, kernel in parse_schedules(pathlib.Path(folder)).items() if name in names}


def _load(target: str) -> Callable[..., Any]:
    where, _, name = target.rpartition(":")
    if not where.endswith(".py"):
        return getattr(importlib.import_module(where), name)
    spec = importlib.util.spec_from_file_location(pathlib.Path(where).stem, where)
    if spec is None or spec.loader is None:
        raise TpuCompilerError(f"cannot import {where}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def _main(target: str, topology: str, options: str) -> None:
    mesh = topology_mesh(topology)
    made = _load(target)(mesh, **json.loads(options))
    names = [
        compile_report(function, mesh, *args).kernels for function, args in (made if isinstance(made, list) else [made])
    ]
    print(json.dumps([name for kernels in names for name in kernels]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
