"""Compiles a function for an H100 on a machine without a GPU, and tells what the compiler made of it.

    args = [jax.ShapeDtypeStruct((32768, 2048), jnp.bfloat16), ...]
    report = compile_for_h100(function, *args)
    report.temporary_bytes, [(k.name, k.registers, k.spill_bytes) for k in report.kernels]

Needs the CUDA plugin of exactly this jaxlib, but no driver (`missing()` says what lacks): pip install --no-deps
jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION. Nothing is run: numbers about memory and machine code are the
compiler's, there are none about time. Code that needs cuDNN does not compile this way.
"""

import dataclasses
import importlib.metadata
import importlib.util
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib.version import __version__ as jaxlib_version

# An H100 SXM as XLA describes it.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "sm_90"
"""

_ENTRY = re.compile(r"\.visible \.entry (\w+)")
_LAUNCH = re.compile(r"(\w+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), 1, 1\]\s+shared_memory: (\d+) bytes")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


class CudaCompilerError(RuntimeError):
    """The CUDA compiler is not there. The message names the packages to install."""


def missing() -> str | None:
    """Why nothing can be compiled for CUDA here, None if it can."""
    command = f"pip install --no-deps jax-cuda12-plugin=={jaxlib_version} jax-cuda12-pjrt=={jaxlib_version}"
    for package in ("jax-cuda12-plugin", "jax-cuda12-pjrt"):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"no {package}: {command}"
        if found != jaxlib_version:
            return f"{package} {found} does not belong to jaxlib {jaxlib_version}: {command}"
    return None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled program.

    Attributes:
        name: of its entry point.
        grid: blocks along x, y, z.
        threads: per block.
        shared_bytes: dynamic shared memory per block.
        ptx: its code before ptxas.
        registers: per thread; None without a ptxas to ask. It may be another version than XLA's own.
        spill_bytes: stored to and loaded from local memory for want of registers, per thread; None without ptxas.
    """

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    ptx: str
    registers: int | None
    spill_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Report:
    """Bytes per device, the kernels in order of launch, and the optimised program (after partitioning)."""

    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    kernels: tuple[Kernel, ...]
    text: str


def h100_mesh(shape: Mapping[str, int] | None = None) -> Mesh:
    """A mesh of H100s of one host that are not there; by default one.

    Raises:
        CudaCompilerError: see `missing`.
    """
    if reason := missing():
        raise CudaCompilerError(reason)
    shape = dict(shape or {"device": 1})
    count = int(np.prod(list(shape.values())))
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=f"h100x{count}", topology=f"1x1x{count}", target_config=_H100
    )
    return Mesh(np.array(topology.devices).reshape(tuple(shape.values())), tuple(shape))


def compile_for_h100(function: Callable[..., Any], *args: Any, mesh: Mesh | None = None) -> Report:
    """Lowers and compiles `function` for `mesh` (one H100 by default).

    Args:
        function: to be jitted; may be jitted already.
        *args: trees of jax.ShapeDtypeStruct; leaves without a sharding are replicated.

    Raises:
        CudaCompilerError: see `missing`.
    """
    mesh = h100_mesh() if mesh is None else mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(leaf):
        return leaf if leaf.sharding else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    with jax.set_mesh(mesh):
        lowered = jax.jit(function).lower(*jax.tree.map(place, args))
    with tempfile.TemporaryDirectory() as dump:
        compiled = lowered.compile(compiler_options={"xla_dump_to": dump})
        kernels = _kernels(pathlib.Path(dump))
    memory = compiled.memory_analysis()
    assert memory is not None
    return Report(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        kernels=kernels,
        text=compiled.as_text() or "",
    )


def _kernels(dump: pathlib.Path) -> tuple[Kernel, ...]:
    code: dict[str, tuple[str, int | None, int | None]] = {}
    for file in sorted(dump.glob("*.ptx")):
        text = file.read_text()
        for name in _ENTRY.findall(text):
            code[name] = (text, *_resources(file))
    launches = [
        match for file in sorted(dump.glob("*thunk_sequence.txt")) for match in _LAUNCH.findall(file.read_text())
    ]
    kernels = []
    for name, x, y, z, threads, shared in launches:
        ptx, registers, spills = code.get(name, ("", None, None))
        kernels.append(Kernel(name, (int(x), int(y), int(z)), int(threads), int(shared), ptx, registers, spills))
    return tuple(kernels)


def _ptxas() -> str | None:
    """On the path, or the one that the triton package brings along."""
    if found := shutil.which("ptxas"):
        return found
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (binary := pathlib.Path(folder, "backends/nvidia/bin/ptxas")).is_file():
            return str(binary)
    return None


def _resources(file: pathlib.Path) -> tuple[int | None, int | None]:
    ptxas = _ptxas()
    if ptxas is None:
        return None, None
    done = subprocess.run(
        [ptxas, "-v", "-arch=sm_90a", str(file), "-o", str(file.with_suffix(".cubin"))], capture_output=True, text=True
    )
    registers, spills = _REGISTERS.search(done.stderr), _SPILLS.search(done.stderr)
    if not registers or not spills:
        return None, None
    return int(registers[1]), int(spills[1]) + int(spills[2])
