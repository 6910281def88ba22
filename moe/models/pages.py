"""Who owns which page of a paged cache: free, held by sequences, or kept for the next prompt that starts alike.

Host-side bookkeeping only; the rows are in `moe.layers.cache.Cache`. A full page can be registered under the tokens
that it holds and the page before it. A later sequence with the same beginning holds the same page instead of computing
it (2309.06180 section 4.4; the key is the tokens themselves, so that no hash can collide). Registered pages that nobody
holds stay until their room is needed, the longest unused first.
"""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

ROOT = 0
"""The chain of a sequence without a registered page yet."""


class PagePool:
    """Pages 1 to `pages` - 1. Page 0 is never dealt: table entries that point nowhere point there, and it holds zeros.

    A page's chain is the number under which it was registered; it stands for all tokens up to the page's end.
    """

    def __init__(self, pages: int, page_size: int):
        self.page_size = page_size
        self.size = pages - 1
        self._free = list(range(pages - 1, 0, -1))
        self._held = [0] * pages  # how many sequences hold a page
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # registered, held by none
        self._pages: dict[tuple[int, bytes], int] = {}
        self._keys: dict[int, tuple[int, bytes]] = {}
        self._chains: dict[int, int] = {}
        self._records: dict[int, Any] = {}
        self._last_chain = ROOT

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that some sequence holds."""
        return self.size - self.available

    def key(self, chain: int, tokens: Sequence[int]) -> tuple[int, bytes]:
        """What a full page of `tokens` after `chain` is registered under."""
        return chain, np.asarray(tokens, np.int32).tobytes()

    def match(self, tokens: Sequence[int], limit: int) -> tuple[list[int], int]:
        """(registered pages that hold the beginning of `tokens`, the chain of the last), at most `limit` pages."""
        pages, chain = [], ROOT
        for number in range(limit):
            page = self._pages.get(self.key(chain, self._slice(tokens, number)))
            if page is None:
                break
            pages.append(page)
            chain = self._chains[page]
        return pages, chain

    def _slice(self, tokens: Sequence[int], number: int) -> Sequence[int]:
        return tokens[number * self.page_size : (number + 1) * self.page_size]

    def idle(self, pages: Sequence[int]) -> int:
        """How many of `pages` nobody holds: holding these makes fewer available."""
        return sum(self._held[page] == 0 for page in pages)

    def holders(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._held[page]

    def hold(self, pages: Sequence[int]) -> None:
        """One more sequence holds these registered pages."""
        for page in pages:
            self._held[page] += 1
            self._idle.pop(page, None)

    def take(self, count: int) -> list[int]:
        """`count` pages for one sequence, unregistered; call it only when so many are available."""
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                self.forget([page])
            self._held[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """One sequence fewer holds these pages, given in its order: later ones, useless alone, are reused first."""
        for page in reversed(pages):
            self._held[page] -= 1
            if self._held[page]:
                continue
            if page in self._keys:
                self._idle[page] = None
            else:
                self._free.append(page)

    def register(self, page: int, chain: int, tokens: Sequence[int], record: Any = None) -> int:
        """Makes a held page findable; returns its chain. Where an equal page is registered already, returns that one's.

        Args:
            record: kept with the page, see `record`.
        """
        key = self.key(chain, tokens)
        known = self._pages.get(key)
        if known is not None:
            return self._chains[known]
        self._last_chain += 1
        self._pages[key], self._keys[page], self._chains[page] = page, key, self._last_chain
        self._records[page] = record
        return self._last_chain

    def record(self, page: int) -> Any:
        """What `register` was given with the page."""
        return self._records[page]

    def forget(self, pages: Sequence[int] | None = None) -> None:
        """Makes these pages, or all, unfindable: their rows are of other weights, or damaged."""
        for page in list(self._keys) if pages is None else pages:
            key = self._keys.pop(page, None)
            if key is None:
                continue
            del self._pages[key], self._chains[page], self._records[page]
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)
