"""Grouped matrix multiplication: rows sorted by expert, each times its own expert's matrix.

    y = grouped_matmul(rows, weights, sizes)              # [M, K], [E, K, N], [E] int32 -> [M, N]
    h = gated_grouped_matmul(rows, gate_up, sizes)        # [E, 2, K, N]: silu(rows @ gate) * (rows @ up)

The first sizes[0] rows belong to expert 0, the next sizes[1] to expert 1, and so on. **Rows at or beyond sizes.sum()
come out as exactly zero**, whatever they hold (megablox leaves garbage there), and have no part in any gradient. Sums
are float32; outputs have the dtype of the rows.

Implementations (all four products each: gmm, gmm_t, tgmm, gated):

    reference     dense and masked, E times the work: the meaning
    blocked       XLA only, dynamic trip counts: CPU, and wherever there is no kernel
    pallas_tpu    Mosaic
    pallas_gpu    Triton

By default the one is taken that fits the platform being lowered for (`moe.kernels.platform`), never that of the host.
The gradient runs through the same implementation.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.kernels.grouped_matmul import blocked
from moe.kernels.grouped_matmul.shapes import (
    ACTIVATIONS,
    GroupedMatmulError,
    check_activation,
    check_group_sizes,
    check_operands,
    check_sizes,
)
from moe.kernels.platform import Partial, platform_dependent

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "GroupedMatmulError",
    "activation_vjp",
    "align_varying",
    "by_platform",
    "check_activation",
    "check_group_sizes",
    "check_implementation",
    "check_sizes",
    "gated",
    "gated_grouped_matmul",
    "gmm",
    "gmm_t",
    "grouped_matmul",
    "implementation_module",
    "tgmm",
]

IMPLEMENTATIONS = ("reference", "blocked", "pallas_tpu", "pallas_gpu")


def implementation_module(name: str) -> ModuleType:
    """The module behind a name of IMPLEMENTATIONS; imported on first use, for Pallas is slow to import."""
    check_implementation(name)
    return importlib.import_module(f"{__name__}.{name}")


_COMPILED = {"mosaic": "pallas_tpu", "triton": "pallas_gpu"}
"""Kernels without the alternative of interpreting them, which on TPU has side effects that a program would carry."""


@functools.cache
def _product(name: str, implementation: str, **options: Any) -> Callable[..., jax.Array]:
    """A product as an inlined jit: a kernel's trace takes up to a second; this way once per shape, not per call."""
    if implementation in _COMPILED:
        implementation, options = _COMPILED[implementation], options | {"interpret": False}
    return jax.jit(functools.partial(getattr(implementation_module(implementation), name), **options), inline=True)


def _run(*args: jax.Array, product: str, implementation: str, **options: Any) -> jax.Array:
    return _product(product, implementation, **options)(*args)


def _call(product: str, implementation: str | None, *args: jax.Array, **options: Any) -> jax.Array:
    return by_platform(Partial(_run, product=product, **options), *args, implementation=implementation)


def by_platform(
    function: Callable[..., Any],
    *args: Any,
    implementation: str | None = None,
    default: Callable[..., Any] | None = None,
) -> Any:
    """function(*args, implementation=name) with `implementation` if given, else with the one of the platform being
    lowered for, and default(*args), if given, where there is no kernel. Not differentiable.
    """
    if implementation is not None:
        return function(*args, implementation=implementation)
    return platform_dependent(
        *args,
        default=Partial(function, implementation="blocked") if default is None else default,
        tpu=Partial(function, implementation="mosaic"),
        cuda=Partial(function, implementation="triton"),
    )


def gmm(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """lhs [M, K], rhs [E, P, K, N] -> [M, P, N]. Not differentiable; for composing other custom VJPs."""
    return _call("gmm", implementation, lhs, rhs, sizes)


def gmm_t(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """lhs [M, P, N], rhs [E, P, K, N] -> [M, K], sum over parts of lhs[:, p] @ rhs[e, p].T. Not differentiable."""
    return _call("gmm_t", implementation, lhs, rhs, sizes)


def tgmm(
    lhs: jax.Array,
    grad: jax.Array,
    sizes: jax.Array,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """lhs [M, K], grad [M, P, N] -> [E, P, K, N] in `dtype` (default: that of lhs). Not differentiable."""
    return _call("tgmm", implementation, lhs, grad, sizes, dtype=dtype)


def gated(
    lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, activation: str, implementation: str | None = None
) -> jax.Array:
    """lhs [M, K], rhs [E, 2, K, N] -> act(lhs @ gate) * (lhs @ up), [M, N]. Not differentiable."""
    return _call("gated", implementation, lhs, rhs, sizes, activation=activation)


def check_implementation(name: str | None) -> None:
    """Raises GroupedMatmulError for a name that is not one of IMPLEMENTATIONS."""
    if name is not None and name not in IMPLEMENTATIONS:
        raise GroupedMatmulError(f"implementation {name!r} is not one of {', '.join(map(repr, IMPLEMENTATIONS))}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, implementation: str | None) -> jax.Array:
    return gmm(lhs, rhs, sizes, implementation=implementation)[:, 0]


def _grouped_forward(lhs, rhs, sizes, implementation):
    return _grouped(lhs, rhs, sizes, implementation), (lhs, rhs, sizes)


def _grouped_backward(implementation, saved, grad):
    lhs, rhs, sizes = saved
    grad = grad[:, None]
    d_lhs = gmm_t(grad, rhs, sizes, implementation=implementation)
    return d_lhs, tgmm(lhs, grad, sizes, dtype=rhs.dtype, implementation=implementation), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def grouped_matmul(
    lhs: Float[Array, "M K"], rhs: Float[Array, "E K N"], sizes: Int[Array, " E"], *, implementation: str | None = None
) -> Float[Array, "M N"]:
    """Every row times its expert's matrix; rows without an expert give zeros. Differentiable in lhs and rhs.

    Args:
        lhs: rows, sorted by expert.
        rhs: one matrix per expert, in the dtype of lhs.
        sizes: int32, rows of each expert; a sum below M leaves the last rows without one. `check_group_sizes` looks at
            concrete values.
        implementation: forces one of IMPLEMENTATIONS.

    Raises:
        GroupedMatmulError: shapes or dtypes that do not fit, an unknown implementation.
    """
    check_operands(lhs, rhs, sizes, parts=None)
    check_implementation(implementation)
    lhs, rhs, sizes = align_varying(lhs, rhs[:, None], sizes)
    return _grouped(lhs, rhs, sizes, implementation)


def align_varying(*operands: jax.Array) -> list[jax.Array]:
    """Inside shard_map: marks every operand as varying over the union of their mesh axes.

    Done outside a custom VJP, so that the cotangent of a replicated weight is summed over the devices by the transpose
    of this cast, as JAX does by itself for ordinary products.
    """
    return [blocked.varying_like(operand, *operands) for operand in operands]


def activation_vjp(
    pre: jax.Array, grad: jax.Array, activation: str, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Gate and up before the activation [M, 2, F], gradient [M, F] -> (hidden [M, F], gradient of `pre`); float32 in
    between, both rounded to `dtype` at the end.
    """
    gate, up = pre[:, 0].astype(jnp.float32), pre[:, 1].astype(jnp.float32)
    hidden, pull = jax.vjp(lambda g, u: ACTIVATIONS[activation](g) * u, gate, up)
    return hidden.astype(dtype), jnp.stack(pull(grad.astype(jnp.float32)), 1).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _gated(lhs: jax.Array, gate_up: jax.Array, sizes: jax.Array, activation: str, implementation: str | None):
    return gated(lhs, gate_up, sizes, activation=activation, implementation=implementation)


def _gated_forward(lhs, gate_up, sizes, activation, implementation):
    return _gated(lhs, gate_up, sizes, activation, implementation), (lhs, gate_up, sizes)


def _gated_backward(activation, implementation, saved, grad):
    lhs, gate_up, sizes = saved
    pre = gmm(lhs, gate_up, sizes, implementation=implementation)
    _, d_pre = activation_vjp(pre, grad, activation, lhs.dtype)
    d_lhs = gmm_t(d_pre, gate_up, sizes, implementation=implementation)
    return d_lhs, tgmm(lhs, d_pre, sizes, dtype=gate_up.dtype, implementation=implementation), None


_gated.defvjp(_gated_forward, _gated_backward)


def gated_grouped_matmul(
    lhs: Float[Array, "M K"],
    gate_up: Float[Array, "E 2 K N"],
    sizes: Int[Array, " E"],
    *,
    activation: str = "silu",
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """act(rows @ gate) * (rows @ up) of every row's expert, one pass over the rows. Differentiable in lhs and gate_up.

    The backward recomputes gate and up instead of keeping [M, 2, N] (memory; `moe.experts.experts` can keep them).

    Args:
        lhs, sizes, implementation: as in `grouped_matmul`.
        gate_up: [E, 2, K, N], gate first.
        activation: "silu" or "gelu_tanh".

    Raises:
        GroupedMatmulError: as `grouped_matmul`; an unknown activation.
    """
    check_operands(lhs, gate_up, sizes, parts=2)
    check_activation(activation)
    check_implementation(implementation)
    lhs, gate_up, sizes = align_varying(lhs, gate_up, sizes)
    return _gated(lhs, gate_up, sizes, activation, implementation)
