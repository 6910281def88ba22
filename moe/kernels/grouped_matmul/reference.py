"""What the four grouped products mean: dense, masked, float32; E times the work. The oracle of the other files."""

import jax
import jax.numpy as jnp

from moe.kernels.grouped_matmul.shapes import ACTIVATIONS


def membership(sizes: jax.Array, rows: int) -> jax.Array:
    """[E, M] bool: row m belongs to expert e. Rows at or beyond sizes.sum() belong to none."""
    end = jnp.cumsum(sizes)
    row = jnp.arange(rows, dtype=sizes.dtype)
    return (row >= (end - sizes)[:, None]) & (row < end[:, None])


def _rows(a: jax.Array, mask: jax.Array) -> jax.Array:
    """[E, M, ...] float32: the rows of each expert, zeros elsewhere (also where the other rows are NaN)."""
    return jnp.where(mask.reshape(*mask.shape, *[1] * (a.ndim - 1)), a.astype(jnp.float32), 0)


def _einsum(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(pattern, a, b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def gmm(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
    """lhs [M, K], rhs [E, P, K, N] -> [M, P, N]: row m times every part of its expert's matrix."""
    return _einsum("emk,epkn->mpn", _rows(lhs, membership(sizes, len(lhs))), rhs).astype(lhs.dtype)


def gmm_t(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
    """lhs [M, P, N], rhs [E, P, K, N] -> [M, K]: sum over parts of lhs[:, p] @ rhs[e, p].T."""
    return _einsum("empn,epkn->mk", _rows(lhs, membership(sizes, len(lhs))), rhs).astype(lhs.dtype)


def tgmm(lhs: jax.Array, grad: jax.Array, sizes: jax.Array, *, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """lhs [M, K], grad [M, P, N] -> [E, P, K, N]: lhs.T @ grad[:, p] over the rows of each expert; zeros where none."""
    mask = membership(sizes, len(lhs))
    out = jnp.einsum("emk,empn->epkn", _rows(lhs, mask), _rows(grad, mask), precision=jax.lax.Precision.HIGHEST)
    return out.astype(dtype or lhs.dtype)


def gated(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, activation: str) -> jax.Array:
    """lhs [M, K], rhs [E, 2, K, N] -> [M, N]: act(lhs @ rhs[e, 0]) * (lhs @ rhs[e, 1]), rounded once at the end."""
    pre = gmm(lhs.astype(jnp.float32), rhs, sizes)
    return (ACTIVATIONS[activation](pre[:, 0]) * pre[:, 1]).astype(lhs.dtype)
