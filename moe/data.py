"""Batches for language models: documents of any length, packed into rows of one length without losing a token.

    stored = documents(tokenizer.encode_batch(texts))
    rows = PackedRows(stored, length=256, seed=0)
    data = iter(batches([rows], batch=32, seed=0))      # grain iterator: get_state / set_state

A document of n tokens holds n - 1 pairs (token, next token). Pairs are what is packed: a document longer than a row is
cut into pieces that overlap by the one token which is the target of the first and the input of the second, so every
token but the first of each document is predicted exactly once an epoch, and none twice. Pieces go into the fullest row
that still holds them (best fit); the plan is made once, rows are shuffled anew every epoch. A plan instead of a stream
makes row i a function of i alone: an iterator's whole state is a number, and any host can read any part.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Int

from moe.sharding import HostShard


class DataError(ValueError):
    """Documents or sizes that make no batch. The message names the value and the remedy."""


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Tokenised documents, end to end.

    Attributes:
        tokens: of all documents.
        starts: document d is tokens[starts[d] : starts[d + 1]].
        wanted: False marks tokens whose prediction does not count (a prompt).
    """

    tokens: Int[np.ndarray, " N"]
    starts: Int[np.ndarray, " n1"]
    wanted: Bool[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, d: int) -> np.ndarray:
        return self.tokens[self.starts[d] : self.starts[d + 1]]


def documents(ids: Sequence[Sequence[int]], prompts: Sequence[int] | None = None) -> Documents:
    """Stores token ids.

    Args:
        ids: of each document, at least two.
        prompts: how many tokens at the start of each document are given and not learned.

    Raises:
        DataError: no document, one with fewer than two tokens, or a prompt that leaves nothing to learn.
    """
    if not len(ids):
        raise DataError("no documents; give at least one")
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    if lengths.min() < 2:
        d = int(lengths.argmin())
        raise DataError(f"document {d} has {lengths[d]} tokens, too few to predict any; leave it out")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([np.asarray(one, np.int32) for one in ids])
    wanted = np.ones(len(tokens), bool)
    if prompts is not None:
        given = np.asarray(prompts, np.int64)
        if given.shape != lengths.shape or (given >= lengths).any() or (given < 0).any():
            raise DataError("prompts must hold one length for every document, shorter than the document itself")
        wanted = np.arange(len(tokens)) - np.repeat(starts[:-1], lengths) >= np.repeat(given, lengths)
    return Documents(tokens, starts, wanted)


def pieces(stored: Documents, length: int) -> Int[np.ndarray, "c 2"]:
    """(first input, how many pairs) of every piece of at most `length` pairs."""
    found = []
    for start, stop in zip(stored.starts[:-1], stored.starts[1:] - 1, strict=True):
        first = np.arange(start, stop, length)
        found.append(np.stack([first, np.minimum(length, stop - first)], 1))
    return np.concatenate(found)


def best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which items share a row: each goes, in the order given, to the fullest row that still holds it.

    Raises:
        DataError: an item larger than a row.
    """
    rows: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the space left in them
    some = 0  # bit r: room[r] is not empty
    for item, size in enumerate(sizes):
        if not 0 < size <= length:
            raise DataError(f"item {item} of size {size} does not fit a row of {length}; cut it with pieces()")
        fitting = some >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            row = room[left].pop()
            if not room[left]:
                some &= ~(1 << left)
        else:
            left, row = length, len(rows)
            rows.append([])
        rows[row].append(item)
        room[left - size].append(row)
        some |= 1 << (left - size)
    return rows


class PackedRows(grain.sources.RandomAccessDataSource):
    """Rows {tokens, targets, segments, positions int32 [S]; mask bool [S]; source int32 []}.

    `segments` counts the pieces of a row from 1; 0 is padding. `positions` start at 0 in each piece. `mask` is where
    predicting `targets` from `tokens` counts.
    """

    def __init__(self, stored: Documents, *, length: int, seed: int = 0, source: int = 0):
        """
        Args:
            length: S.
            seed: of the order in which pieces are packed, so that neighbours in a row are strangers.
            source: goes into every row, to tell mixed sources apart in the metrics.
        """
        if length < 1:
            raise DataError(f"row length {length} must be positive")
        found = pieces(stored, length)
        found = found[np.random.default_rng(seed).permutation(len(found))]
        self._stored, self._length, self._source, self._pieces = stored, length, source, found
        self._rows = best_fit(found[:, 1].tolist(), length)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"PackedRows({len(self)} x {self._length})"

    @property
    def filled(self) -> float:
        """Share of the positions that hold a token."""
        return float(self._pieces[:, 1].sum() / (len(self) * self._length))

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        row = {name: np.zeros(self._length, np.int32) for name in ("tokens", "targets", "segments", "positions")}
        mask = np.zeros(self._length, bool)
        at = 0
        for segment, item in enumerate(self._rows[int(index)], 1):
            first, count = self._pieces[item]
            here, there = slice(at, at + count), slice(first, first + count)
            after = slice(first + 1, first + count + 1)
            row["tokens"][here], row["targets"][here] = self._stored.tokens[there], self._stored.tokens[after]
            row["segments"][here], row["positions"][here] = segment, np.arange(count)
            mask[here] = self._stored.wanted[after]
            at += count
        return {**row, "mask": mask, "source": np.asarray(self._source, np.int32)}


def padded(stored: Documents, length: int) -> dict[str, np.ndarray]:
    """Every document a row of its own, [n, S], with the keys of PackedRows: for evaluation document by document.

    Raises:
        DataError: a document with more than `length` pairs.
    """
    sizes = np.diff(stored.starts) - 1
    if sizes.max() > length:
        d = int(sizes.argmax())
        raise DataError(f"document {d} has {sizes[d]} pairs, a row {length}; raise length to {sizes[d]}")
    out = {name: np.zeros((len(stored), length), np.int32) for name in ("tokens", "targets", "segments", "positions")}
    out["mask"] = np.zeros((len(stored), length), bool)
    for d, (start, size) in enumerate(zip(stored.starts[:-1], sizes, strict=True)):
        out["tokens"][d, :size] = stored.tokens[start : start + size]
        out["targets"][d, :size] = stored.tokens[start + 1 : start + size + 1]
        out["segments"][d, :size], out["positions"][d, :size] = 1, np.arange(size)
        out["mask"][d, :size] = stored.wanted[start + 1 : start + size + 1]
    return {**out, "source": np.zeros(len(stored), np.int32)}


def batches(
    sources: Sequence[PackedRows],
    *,
    weights: Sequence[float] | None = None,
    batch: int,
    seed: int,
    shard: HostShard = HostShard(0, 1),
) -> grain.IterDataset:
    """Endless, shuffled, sharded and resumable batches {name: [batch / hosts, ...]}.

    Args:
        sources: each is shuffled and repeated by itself.
        weights: share of the rows that comes from each source; default: equal.
        batch: rows of the global batch, which does not depend on the number of hosts; each reads its part of it.
        seed: of the shuffles.

    Raises:
        DataError: a batch that does not divide over the hosts, no source, weights that do not fit.
    """
    if batch < 1 or batch % shard.count:
        raise DataError(f"a batch of {batch} rows does not divide over {shard.count} hosts; choose a multiple")
    if not sources:
        raise DataError("no sources; give at least one PackedRows")
    if weights is not None and (len(weights) != len(sources) or min(weights) <= 0):
        raise DataError(f"weights {tuple(weights)} must be positive, one for each of the {len(sources)} sources")
    shuffled = [
        grain.MapDataset.source(rows).seed(seed + number).shuffle().repeat() for number, rows in enumerate(sources)
    ]
    # Half of endless: grain 0.2.18 overflows on batches of one row of an endless dataset.
    data = grain.MapDataset.mix(shuffled, weights)[: sys.maxsize // 2]
    size = batch // shard.count
    mine = slice(shard.index * size, (shard.index + 1) * size)
    data = data.batch(batch).map(lambda whole: {name: values[mine] for name, values in whole.items()})
    return data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def in_order(rows: Sequence[dict[str, np.ndarray]] | PackedRows, batch: int) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in batches of one shape; the last is filled up with rows of padding (no mask, segment 0)."""
    for first in range(0, len(rows), batch):
        some = [rows[i] for i in range(first, min(first + batch, len(rows)))]
        blank = {name: np.zeros_like(value) for name, value in some[0].items()}
        some += [blank] * (batch - len(some))
        yield {name: np.stack([row[name] for row in some]) for name in blank}
