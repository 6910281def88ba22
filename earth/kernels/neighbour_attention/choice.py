"""Which implementation runs a pass: by name, or by the platform being lowered for."""

import importlib
from types import ModuleType
from typing import Any

from earth.kernels.neighbour_attention.shapes import Pairs
from moe.kernels.platform import Partial, platform_dependent

GATHER_MOST = 2**26
"""Numbers [N, k, H, V] up to which `gather` is taken where there is no kernel: 256 MB."""

_COMPILED = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}
"""By platform. There a kernel comes without the alternative of interpreting it."""


def implementation_of(name: str) -> ModuleType:
    """Imported on first use, for Pallas is slow to import."""
    return importlib.import_module(f"{__package__}.{name}")


def _of_module(*args: Any, module: str, name: str, **options: Any) -> Any:
    return getattr(implementation_of(module), name)(*args, **options)


def run_pass(name: str, side: str, implementation: str | None, *args: Any) -> Any:
    """`forward` or `backward` of an implementation, on one device."""
    if implementation is not None:
        return _of_module(*args, module=implementation, name=name, side=side)
    kernels = {
        platform: Partial(_of_module, module=module, name=name, side=side, interpret=False)
        for platform, module in _COMPILED.items()
    }
    index, value = next(a.index for a in args if isinstance(a, Pairs)), args[2]
    plain = "gather" if index.size * value.shape[1] * value.shape[2] <= GATHER_MOST else "blocked"
    return platform_dependent(*args, default=Partial(_of_module, module=plain, name=name, side=side), **kernels)
