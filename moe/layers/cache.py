"""The key/value cache of decoding, in pages (2309.06180): rows of any sequence lie wherever its page table says.

A cache holds, for every run of layers, the arrays that its attention stores per token (keys and values of GQA; the
latent and the rotary key of MLA) as [layers, pages * page_size, ...]. A contiguous cache is the special case of one
page for each sequence (`new_cache(..., page_size=length)`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from moe.params import Param


class CacheError(ValueError):
    """A cache that does not fit the model or the call. The message names the value and the remedy."""


@struct.dataclass
class Cache:
    """What the attention layers have stored.

    Attributes:
        rows: one tree for each run of layers; leaves [layers, pages * page_size, ...].
        table: pages of each sequence in order; entries past the used ones may name any page.
        length: tokens of each sequence in the cache.
        page_size: rows of a page.
    """

    rows: Any
    table: Param  # [B, N] int32
    length: Param  # [B] int32
    page_size: int = struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may hold: N * page_size."""
        return self.table.shape[1] * self.page_size


@struct.dataclass
class View:
    """What one call's attention layers need of the cache: where to write, what to read.

    Attributes:
        write: row of each new token, past the end where it is not stored (padding).
        read: rows of each sequence in order of position.
        key_positions: position of each row read, -1 where it holds nothing.
    """

    write: Param  # [B, S] int32
    read: Param  # [B, T] int32
    key_positions: Param  # [B, T] int32


def cache_specs(cfg: Any, width: int) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """name -> (shape, logical axes) of what an attention layer of config `cfg` stores for one token."""
    return cfg.stored()


def new_cache(
    runs: list[tuple[int, dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]]],
    *,
    batch: int,
    pages_each: int,
    page_size: int,
    dtype: Any,
    pages: int | None = None,
) -> Cache:
    """An empty cache of zeros.

    Args:
        runs: for each run of layers, (number of attention layers in it, what one stores for a token).
        batch: B sequences.
        pages_each: N, pages that a sequence may hold.
        page_size: tokens of a page.
        pages: pages in all; default batch * pages_each, dealt to the sequences in order.
    """
    if min(batch, pages_each, page_size) < 1:
        raise CacheError(f"a cache of {batch} sequences x {pages_each} pages x {page_size} tokens; give positive sizes")
    total = batch * pages_each if pages is None else pages
    rows = tuple(
        {name: jnp.zeros((layers, total * page_size, *shape), dtype) for name, (shape, _) in stored.items()}
        for layers, stored in runs
    )
    table = jnp.arange(batch * pages_each, dtype=jnp.int32).reshape(batch, pages_each) % total
    return Cache(rows=rows, table=table, length=jnp.zeros(batch, jnp.int32), page_size=page_size)


def view(cache: Cache, positions: Int[Array, "B S"], valid: jax.Array | None) -> View:
    """Where tokens at `positions` are written, and what their queries may read once they are.

    Tokens that are not `valid` [B, S] are not stored. Positions at or past the capacity are not stored either.
    """
    batch, pages_each = cache.table.shape
    page = jnp.clip(positions // cache.page_size, 0, pages_each - 1)
    row = jnp.take_along_axis(cache.table, page, 1) * cache.page_size + positions % cache.page_size
    stored = (positions >= 0) & (positions < cache.capacity)
    stored = stored if valid is None else stored & valid
    end = jnp.iinfo(jnp.int32).max
    offsets = jnp.arange(cache.page_size, dtype=jnp.int32)
    read = (cache.table[:, :, None] * cache.page_size + offsets).reshape(batch, -1)
    new_length = jnp.maximum(cache.length, jnp.where(stored, positions + 1, 0).max(1))
    at = jnp.arange(cache.capacity, dtype=jnp.int32)[None]
    return View(write=jnp.where(stored, row, end), read=read, key_positions=jnp.where(at < new_length[:, None], at, -1))


def store(rows: jax.Array, layer: Any, write: Int[Array, "B S"], values: jax.Array) -> jax.Array:
    """`rows` [layers, R, ...] with `values` [B, S, ...] written at `write` of this layer; in place under jit."""
    return rows.at[layer, write].set(values.astype(rows.dtype), mode="drop")


def load(rows: jax.Array, layer: Any, read: Int[Array, "B T"]) -> jax.Array:
    """[B, T, ...]: the rows of each sequence in this layer."""
    return rows.at[layer, read].get(mode="promise_in_bounds")


def advance(cache: Cache, rows: Any, view: View) -> Cache:
    """The cache after a call: new rows, and the lengths that its tokens reached."""
    return dataclasses.replace(cache, rows=rows, length=(view.key_positions >= 0).sum(1, dtype=jnp.int32))
