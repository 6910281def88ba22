"""The grouped products for XLA without a kernel (CPU; fallback anywhere): a scan over experts, in it a loop over blocks
of rows whose trip count is read from the group sizes.

Work follows the rows there are: an expert of n rows costs ceil(n / B) blocks, rows without an expert cost nothing.
Blocks stay in cache. Trip counts known only at run time have no reverse derivative; the public functions bring a
custom VJP. The last block of an expert runs over into the next one's rows, which the next expert then overwrites; only
`tgmm` must mask.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moe.kernels.grouped_matmul.shapes import ACTIVATIONS


def block_rows(rows: int, experts: int) -> int:
    """B, rows a block: the mean group size rounded up to a power of two, within [8, 256]."""
    mean = max(1, -(-rows // experts))
    return max(8, min(256, 1 << (mean - 1).bit_length()))


def varying_like(a: jax.Array, *operands: jax.Array) -> jax.Array:
    """`a` marked as varying over the mesh axes that any operand varies over: what a loop's carry needs in shard_map."""
    axes = frozenset().union(*(jax.typeof(o).mat.varying for o in operands)) - jax.typeof(a).mat.varying
    return lax.pcast(a, tuple(sorted(axes)), to="varying") if axes else a


def _block(a: jax.Array, start: jax.Array, rows: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(a, start, rows)


def _pad(a: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(a, ((0, rows), *[(0, 0)] * (a.ndim - 1)))


def _dot(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def _per_block(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    lhs: jax.Array,
    rhs: jax.Array,
    sizes: jax.Array,
    shape: tuple,
) -> jax.Array:
    """Rows of `function(block of lhs, rhs[e])`, [M, *shape]; zeros beyond sizes.sum()."""
    rows = len(lhs)
    size = block_rows(rows, len(sizes))
    lhs = _pad(lhs, size)

    def expert(out, per):
        weight, start, count = per

        def step(i, out):
            at = start + i * size
            value = function(_block(lhs, at, size), weight).astype(out.dtype)
            return lax.dynamic_update_slice_in_dim(out, value, at, 0)

        return lax.fori_loop(0, (count + size - 1) // size, step, out), None

    out = varying_like(jnp.zeros((rows + size, *shape), lhs.dtype), lhs, rhs, sizes)
    out, _ = lax.scan(expert, out, (rhs, jnp.cumsum(sizes) - sizes, sizes))
    live = jnp.arange(rows) < sizes.sum()
    return jnp.where(live.reshape(-1, *[1] * len(shape)), out[:rows], 0)


def gmm(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
    """lhs [M, K], rhs [E, P, K, N] -> [M, P, N]: row m times every part of its expert's matrix."""
    return _per_block(lambda x, w: _dot("mk,pkn->mpn", x, w), lhs, rhs, sizes, (rhs.shape[1], rhs.shape[3]))


def gmm_t(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
    """lhs [M, P, N], rhs [E, P, K, N] -> [M, K]: sum over parts of lhs[:, p] @ rhs[e, p].T."""
    return _per_block(lambda x, w: _dot("mpn,pkn->mk", x, w), lhs, rhs, sizes, (rhs.shape[2],))


def gated(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, activation: str) -> jax.Array:
    """lhs [M, K], rhs [E, 2, K, N] -> [M, N]: act(lhs @ rhs[e, 0]) * (lhs @ rhs[e, 1]), rounded once at the end."""

    def hidden(x, w):
        return ACTIVATIONS[activation](_dot("mk,kn->mn", x, w[0])) * _dot("mk,kn->mn", x, w[1])

    return _per_block(hidden, lhs, rhs, sizes, (rhs.shape[3],))


def tgmm(lhs: jax.Array, grad: jax.Array, sizes: jax.Array, *, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """lhs [M, K], grad [M, P, N] -> [E, P, K, N]: lhs.T @ grad[:, p] over the rows of each expert; zeros where none."""
    size = block_rows(len(lhs), len(sizes))
    dtype = lhs.dtype if dtype is None else dtype
    zero = varying_like(jnp.zeros((grad.shape[1], lhs.shape[1], grad.shape[2]), jnp.float32), lhs, grad, sizes)
    lhs, grad = _pad(lhs, size), _pad(grad, size)

    def expert(_, per):
        start, count = per

        def step(i, total):
            live = i * size + jnp.arange(size) < count
            x = jnp.where(live[:, None], _block(lhs, start + i * size, size), 0)
            g = jnp.where(live[:, None, None], _block(grad, start + i * size, size), 0)
            return total + _dot("mk,mpn->pkn", x, g)

        return None, lax.fori_loop(0, (count + size - 1) // size, step, zero).astype(dtype)

    return lax.scan(expert, None, (jnp.cumsum(sizes) - sizes, sizes))[1]
