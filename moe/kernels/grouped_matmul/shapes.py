"""Argument checks of the grouped products and the activations they know; shared by all implementations."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class GroupedMatmulError(ValueError):
    """Operands or group sizes that do not fit together. The message names the value and the remedy."""


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise GroupedMatmulError(f"activation {activation!r} is not one of {', '.join(map(repr, ACTIVATIONS))}")


def check_sizes(sizes: jax.Array, experts: int) -> None:
    """Raises GroupedMatmulError unless `sizes` is [experts] of int32."""
    if sizes.shape != (experts,):
        raise GroupedMatmulError(
            f"group sizes of shape {sizes.shape} do not fit {experts} experts; hand over one number per expert, "
            f"shape ({experts},), and leave rows without an expert out of it"
        )
    if sizes.dtype != jnp.int32:
        raise GroupedMatmulError(f"group sizes are {sizes.dtype}; cast them with sizes.astype(jnp.int32)")


def check_operands(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, parts: int | None) -> None:
    """Raises GroupedMatmulError unless lhs [M, K], rhs [E, K, N] ([E, parts, K, N] if parts) and sizes [E] fit."""
    wanted = "[E, K, N]" if parts is None else f"[E, {parts}, K, N]"
    rank = 3 if parts is None else 4
    if lhs.ndim != 2 or rhs.ndim != rank or (parts is not None and rhs.shape[1] != parts):
        raise GroupedMatmulError(
            f"lhs of shape {lhs.shape} and rhs of shape {rhs.shape} must be [M, K] and {wanted}; flatten batch and "
            "sequence into M"
        )
    if lhs.shape[1] != rhs.shape[-2]:
        raise GroupedMatmulError(
            f"lhs {lhs.shape} has K = {lhs.shape[1]}, rhs {rhs.shape} has K = {rhs.shape[-2]}; the matrices are "
            f"{wanted}, transpose them with rhs.mT if they are [.., N, K]"
        )
    if not jnp.issubdtype(lhs.dtype, jnp.floating) or lhs.dtype != rhs.dtype:
        raise GroupedMatmulError(
            f"lhs is {lhs.dtype}, rhs is {rhs.dtype}; cast both to one floating dtype (sums are float32 anyway)"
        )
    check_sizes(sizes, rhs.shape[0])


def check_group_sizes(sizes: jax.Array | np.ndarray, rows: int) -> None:
    """Looks at concrete group sizes, outside jit; inside jit such sizes give wrong rows without a word.

    Raises:
        GroupedMatmulError: naming the first negative size, or a sum beyond the M rows there are.
    """
    values = np.asarray(sizes)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise GroupedMatmulError(f"group sizes of shape {values.shape}, {values.dtype} must be [E] integers")
    if len(values) and values.min() < 0:
        expert = int(np.flatnonzero(values < 0)[0])
        raise GroupedMatmulError(f"expert {expert} has group size {values[expert]}; sizes count rows, at least 0")
    total = int(values.astype(np.int64).sum())
    if total > rows:
        raise GroupedMatmulError(
            f"group sizes sum to {total}, there are {rows} rows; count every row once (jnp.bincount of the experts)"
        )
