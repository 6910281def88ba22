"""Continuous batching over a paged cache: many requests of different lengths, one decode step for all of them.

    completions = generate(params, cfg, prompts, Sampling(temperature=0.7, max_tokens=64), seed=0)

    engine = Engine(params, cfg, EngineConfig(sequences=64, length=4096, record_routing=True))
    engine.generate(prompts, Sampling(n=8, max_tokens=1024), seed=0)
    engine.update(new_params)                          # other weights, same compiled steps

The engine is a host object, because queues, pages and stop strings live on the host; around it everything is pure: a
step is a jitted function of (parameters, cache rows, one array per request setting), with the cache donated. Shapes are
static and few: the decode step has a batch bucket and a table-width bucket, the prefill step a length bucket, a row
bucket and a width bucket.

Rules of the house, ours where 2309.06180 (vLLM) leaves a choice:

    Prefill      fills the cache with all tokens of a prompt but the last; the last one is the first decode step's. So
                 every token is drawn by the decode step, and n samples of one prompt share all of its full pages; the
                 rest, at most one page, is computed anew for each sample (no copy on write).
    Admission    first come, first served, when the prompt's missing pages and one more for every running sequence are
                 free. Nothing is reserved for tokens to come.
    Preemption   when a running sequence needs a page and none is left, the youngest gives up its pages and goes back to
                 the head of the queue. It keeps its tokens, log-probabilities and routing; its cache is computed again,
                 following the recorded routing where there is one.
    Prefixes     full pages stay findable when their sequence ends, until their room is needed or the weights change.
    Prefill and decode alternate: as long as fewer than half of the running sequences are ready to decode, a step makes
                 further prefill calls; otherwise one at most.

Determinism: a draw depends on (seed, key of the request, sample, position) and the logits. The logits of a sequence do
not depend on what else is in the batch but for rounding: another batch or width bucket, and the expert layer's blocks,
may sum in another order, and a draw within about 1e-6 of the border between two tokens can then fall on the other side.
One batch bucket and one width (`EngineConfig(batches=(n,), widths=(w,))`) leave only the expert layer's blocks.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int

from moe.layers.cache import Cache
from moe.models.pages import ROOT, PagePool
from moe.models.sampling import Sampling, Settings, sample, settings, token_keys
from moe.models.transformer import TransformerConfig, TransformerParams, apply, logits, make_cache, unstack
from moe.params import Param, path_name
from moe.sharding import AxisRules, constrain, partition_spec, use_mesh

ALTERNATIVES = 20
"""Most `Sampling.top_logprobs` (OpenAI's limit): the second of the two shapes a decode step is compiled for."""


class DecodeError(ValueError):
    """A request or engine setting that cannot be honoured. The message names the value and the remedy."""


class PromptError(DecodeError):
    """A prompt that is empty, too long, or holds ids that the model does not have."""


class NonFiniteLogits(DecodeError):
    """The model's logits held a NaN or an infinity; names the request and the position."""


@runtime_checkable
class TextStream(Protocol):
    """A decoder of ids that arrive one at a time; `moe.models.tokenizer.TextStream`."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


@runtime_checkable
class Detokenizer(Protocol):
    """What the engine needs of a tokenizer; `moe.models.tokenizer.Tokenizer`."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> list[int]: ...

    def stream(self, *, skip_special_tokens: bool) -> TextStream: ...


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
        sequences: that decode side by side, at most.
        length: tokens that a sequence may hold, prompt included.
        page_size: tokens of a page.
        pages: of the pool; None: enough for all sequences at full length, so that nothing is ever preempted.
        batches: sizes of the decode step, ascending, the last one `sequences`; None: powers of 4.
        widths: pages a step's sequences may span, ascending, the last one length / page_size; None: powers of 4, from
            128 tokens on. Each step attends over the smallest that holds its longest sequence.
        prefill_tokens: of one prefill call, padding included. Longer prompts take several calls.
        steps: decode steps in one compiled call. More than 1 spares round trips to the host; a stop string or a
            cancellation is then noticed up to steps - 1 tokens late, which are thrown away.
        record_routing: keep every token's experts, see `Completion.routing`.
        share_prefixes: sequences that begin alike hold the same pages.
        unstack: read each layer's weights where they lie instead of scanning over layers; None: on CPU.
        dtype: of the cache; None: the parameters'.
    """

    sequences: int = 16
    length: int = 2048
    page_size: int = 16
    pages: int | None = None
    batches: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None
    prefill_tokens: int = 512
    steps: int = 1
    record_routing: bool = False
    share_prefixes: bool = True
    unstack: bool | None = None
    dtype: Any = None

    def __post_init__(self):
        for name in ("sequences", "length", "page_size", "steps"):
            if getattr(self, name) < 1:
                raise DecodeError(f"{name} {getattr(self, name)} must be at least 1")
        if self.prefill_tokens < self.page_size:
            raise DecodeError(f"prefill_tokens {self.prefill_tokens} must hold a page of {self.page_size} tokens")
        if self.pages is not None and self.pages < self.pages_each:
            raise DecodeError(
                f"pages {self.pages} of {self.page_size} tokens do not hold one sequence of length {self.length}; give "
                f"at least {self.pages_each}"
            )
        for name, last in (("batches", self.sequences), ("widths", self.pages_each)):
            sizes = getattr(self, name)
            if sizes is not None and (not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1):
                raise DecodeError(f"{name} {sizes} must be ascending and positive")
            if sizes is not None and sizes[-1] != last:
                raise DecodeError(f"{name} {sizes} must end with {last}, the largest that can come up")

    @property
    def pages_each(self) -> int:
        """Pages of a sequence at full length."""
        return -(-self.length // self.page_size)

    @property
    def pool(self) -> int:
        """Pages of the pool."""
        return self.sequences * self.pages_each if self.pages is None else self.pages


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """One finished sample of one request.

    Attributes:
        request, sample: which.
        prompt: [P] token ids.
        tokens: [C] generated ids, the one that stopped it included.
        logprobs: [C] of each token under the model (float32), as the training forward gives it.
        sampling_logprobs: [C] of each token under the tempered and filtered distribution that it was drawn from.
        versions: [C] `Engine.version` of the weights that drew each token.
        finish: "stop", "length", "cancelled" or "error".
        stop: the token id or string that stopped it, or None.
        text: of `tokens` without special tokens, up to the stop string; None without a tokenizer.
        top: [C, A] ids and [C, A] log-probabilities of the likeliest tokens, where `Sampling.top_logprobs` asks for A.
        routing: [mixtures, P + C - 1, K] slots of every token that was fed to the model: all but the last. It equals
            Output.routing of `apply` on these tokens, which takes it as `replay`. None unless recorded.
        error: what went wrong where finish is "error".
    """

    request: int
    sample: int
    prompt: Int[np.ndarray, " P"]
    tokens: Int[np.ndarray, " C"]
    logprobs: Float[np.ndarray, " C"]
    sampling_logprobs: Float[np.ndarray, " C"]
    versions: Int[np.ndarray, " C"]
    finish: str
    stop: int | str | None = None
    text: str | None = None
    top: tuple[Int[np.ndarray, "C A"], Float[np.ndarray, "C A"]] | None = None
    routing: Int[np.ndarray, "L N K"] | None = None
    error: DecodeError | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Event:
    """What a step has added to one sample.

    Attributes:
        request, sample: which.
        tokens, logprobs: new ids with the model's log-probabilities.
        top: for each of them, the likeliest ids with theirs.
        text: new text, in whole characters; text that may turn out to be a stop string is held back.
        completion: set on the last event of the sample.
    """

    request: int
    sample: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    text: str = ""
    completion: Completion | None = None


@dataclasses.dataclass
class Metrics:
    """Counts since the engine started, or since `Engine.reset_metrics`.

    Attributes:
        generated: tokens drawn and kept.
        prefilled: prompt tokens computed, padding not counted; those of preempted sequences each time.
        shared: prompt tokens found in the cache.
        prefill_calls, decode_calls: compiled calls.
        prefill_seconds, decode_seconds: spent in them, compilation included.
        rows, slots: rows of decode calls that held a sequence, rows in all, both times steps.
        preemptions: sequences that gave up their pages.
        peak_pages: most pages held at once.
        finished: completions, whatever the reason.
    """

    generated: int = 0
    prefilled: int = 0
    shared: int = 0
    prefill_calls: int = 0
    decode_calls: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    rows: int = 0
    slots: int = 0
    preemptions: int = 0
    peak_pages: int = 0
    finished: int = 0

    @property
    def decode_rate(self) -> float:
        """Generated tokens a second of decoding."""
        return self.generated / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second of prefilling."""
        return self.prefilled / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def utilisation(self) -> float:
        """Share of the decode steps' rows that held a sequence."""
        return self.rows / self.slots if self.slots else 0.0


# --- The compiled steps -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the steps are compiled for, besides shapes."""

    cfg: TransformerConfig
    page_size: int
    record: bool
    experts: Callable[..., Any] | None


@struct.dataclass
class _Rows:
    """The sequences of one decode call, arrays [B].

    Attributes:
        token: to be fed.
        position: of that token; also how many the cache holds.
        left: tokens still to draw; 0 in rows without a sequence.
        table: pages [B, W].
        stops: ids that end the sequence, [B, Q], filled up with -1.
        settings: of the sampling.
        seed, request, sample: of the draws, see `token_keys`.
    """

    token: Param
    position: Param
    left: Param
    table: Param
    stops: Param
    settings: Settings
    seed: Param
    request: Param
    sample: Param


def _pinned(rows: Any, cfg: TransformerConfig) -> Any:
    """The cache's arrays in the sharding they came with, so that they can be updated in place."""
    stored = cfg.attention.stored()
    return tuple({name: constrain(leaf, None, None, *stored[name][1]) for name, leaf in run.items()} for run in rows)


def _compact(routing: jax.Array | None, static: _Static) -> jax.Array | None:
    """The record in the smallest of the two types that hold it: it is most of what leaves the device."""
    if routing is None or not static.record or static.cfg.moe is None:
        return None
    return routing.astype(jnp.int16 if static.cfg.moe.routing.slots < 2**15 else jnp.int32)


@functools.partial(jax.jit, static_argnames="static", donate_argnames="rows")
def _prefill(params, rows, tokens, start, count, table, replay, *, static: _Static):
    """Stores tokens [R, S] at positions start [R], ...; the first count [R] of each row are real."""
    cache = Cache(rows=rows, table=table, length=start, page_size=static.page_size)
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    out = apply(
        params, tokens, cfg=static.cfg, positions=start[:, None] + offsets, valid=offsets < count[:, None], cache=cache,
        replay=replay, experts=static.experts,
    )  # fmt: skip
    assert out.cache is not None
    return _pinned(out.cache.rows, static.cfg), _compact(out.routing, static)


@functools.partial(jax.jit, static_argnames=("static", "steps", "alternatives"), donate_argnames="rows")
def _decode(params, rows, batch: _Rows, *, static: _Static, steps: int, alternatives: int):
    """`steps` tokens for every sequence; (cache rows, what was drawn with a leading axis of steps)."""

    def one(carry, _):
        rows, token, position, left = carry
        active = left > 0
        cache = Cache(rows=rows, table=batch.table, length=position, page_size=static.page_size)
        out = apply(
            params, token[:, None], cfg=static.cfg, positions=position[:, None], valid=active[:, None], cache=cache,
            experts=static.experts,
        )  # fmt: skip
        assert out.cache is not None
        z = logits(params, out.hidden[:, 0])
        drawn = sample(z, token_keys(batch.seed, batch.request, batch.sample, position + 1), batch.settings)
        goes_on = active & drawn.finite & ~(drawn.token[:, None] == batch.stops).any(-1)
        top = None
        if alternatives:
            top_logits, top_ids = jax.lax.top_k(z, min(alternatives, z.shape[-1]))
            top = top_ids, top_logits - jax.nn.logsumexp(z, -1, keepdims=True)
        routing = _compact(out.routing, static)
        made = {"drawn": drawn, "top": top, "routing": None if routing is None else routing[:, :, 0]}
        carry = (
            _pinned(out.cache.rows, static.cfg),
            jnp.where(active, drawn.token, token),
            position + active,
            jnp.where(goes_on, left - 1, 0),
        )
        return carry, made

    carry = (rows, batch.token, batch.position, batch.left)
    if steps == 1:
        carry, made = one(carry, None)
        return carry[0], jax.tree.map(lambda leaf: leaf[None], made)
    carry, made = jax.lax.scan(one, carry, length=steps)
    return carry[0], made


@functools.partial(jax.jit, static_argnames="page_size", donate_argnames="rows")
def _clear(rows, pages, *, page_size: int):
    """Zeros in these pages. A NaN left behind would reach whoever gets the page next: 0 * NaN is NaN."""
    index = (pages[:, None] * page_size + jnp.arange(page_size)).reshape(-1)
    return jax.tree.map(lambda leaf: leaf.at[:, index].set(0), rows)


_unstack = jax.jit(unstack)


# --- One sequence on the host -----------------------------------------------------------------------------------------


class _Text:
    """The text of a sequence as it may be shown: whole characters, nothing that may belong to a stop string."""

    def __init__(self, stream: TextStream, stops: tuple[str, ...]):
        self._stream = stream
        self._stops = stops
        self._held = ""
        self._shown: list[str] = []

    def push(self, token: int) -> tuple[str, str | None]:
        """(text to show, the stop string that the token completes)."""
        return self._add(self._stream.push(token), last=False)

    def finish(self) -> tuple[str, str | None]:
        """The rest, when no token follows."""
        return self._add(self._stream.finish(), last=True)

    def _add(self, piece: str, last: bool) -> tuple[str, str | None]:
        text = self._held + piece
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            shown, self._held = text[:at], ""
        else:
            stop, kept = None, 0 if last else self._overlap(text)
            shown, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self._shown.append(shown)
        return shown, stop

    def _overlap(self, text: str) -> int:
        """Characters at the end of `text` that may be the beginning of a stop string."""
        longest = min(len(text), max((len(stop) for stop in self._stops), default=0))
        return next((k for k in range(longest, 0, -1) if any(stop.startswith(text[-k:]) for stop in self._stops)), 0)

    def whole(self) -> str:
        return "".join(self._shown)


class _Record:
    """[mixtures, N, K] slots of the tokens fed so far, growing along N."""

    def __init__(self):
        self._buffer: np.ndarray | None = None
        self.length = 0

    def append(self, chunk: Int[np.ndarray, "L N K"]) -> None:
        end = self.length + chunk.shape[1]
        if self._buffer is None or end > self._buffer.shape[1]:
            grown = np.empty((chunk.shape[0], max(64, 2 * end), chunk.shape[2]), chunk.dtype)
            if self._buffer is not None:
                grown[:, : self.length] = self._buffer[:, : self.length]
            self._buffer = grown
        self._buffer[:, self.length : end] = chunk
        self.length = end

    def part(self, start: int, stop: int) -> Int[np.ndarray, "L N K"]:
        assert self._buffer is not None
        return self._buffer[:, start:stop].copy()


@dataclasses.dataclass(eq=False)
class _Sequence:
    """One sample of one request.

    Attributes:
        tokens: of prompt and completion.
        prompt: how many of them are the prompt.
        limit: tokens at which it ends.
        stops: ids that end it.
        target: tokens that the cache must hold before it can decode.
        pages, computed, chain: pages held, tokens in the cache, chain of the last registered page.
    """

    request: int
    sample: int
    sampling: Sampling
    tokens: list[int]
    prompt: int
    limit: int
    stops: tuple[int, ...]
    seed: int
    key: int
    text: _Text | None
    record: _Record = dataclasses.field(default_factory=_Record)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    sampling_logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    top: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    registered: int = 0
    chain: int = ROOT

    @property
    def target(self) -> int:
        return len(self.tokens) - 1

    @property
    def ready(self) -> bool:
        return self.computed >= self.target

    def completion(self, finish: str, stop: int | str | None, error: DecodeError | None, routing: bool) -> Completion:
        top = None
        if self.sampling.top_logprobs:
            wide = min(self.sampling.top_logprobs, len(self.top[0][0])) if self.top else 0
            top = (
                np.array([ids[:wide] for ids, _ in self.top], np.int32).reshape(len(self.top), wide),
                np.array([values[:wide] for _, values in self.top], np.float32).reshape(len(self.top), wide),
            )
        return Completion(
            request=self.request,
            sample=self.sample,
            prompt=np.array(self.tokens[: self.prompt], np.int32),
            tokens=np.array(self.tokens[self.prompt :], np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            sampling_logprobs=np.array(self.sampling_logprobs, np.float32),
            versions=np.array(self.versions, np.int32),
            finish=finish,
            stop=stop,
            text=None if self.text is None else self.text.whole(),
            top=top,
            routing=self.record.part(0, self.record.length) if routing and self.record.length else None,
            error=error,
        )


def _powers(first: int, last: int, base: int) -> tuple[int, ...]:
    """first, first * base, ... below last, and last."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= base
    return (*sizes, last)


def _fit(count: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending sizes that holds `count`."""
    return next(size for size in sizes if size >= count)


class Engine:
    """Decodes requests as they come. One thread at a time may call it.

    Args:
        params: of `cfg`, on one device or placed on `mesh`.
        config: sizes.
        tokenizer: for stop strings, text and prompts that are strings; its stop ids join those of `cfg`.
        mesh, rules: as in `moe.sharding.use_mesh`; both or neither. Rows of a call are padded to a multiple of what the
            batch is split over.
        experts: another expert computation, see `moe.layers.moe.moe`.

    Attributes:
        version: how often the weights were replaced.
        metrics: see `Metrics`.
    """

    def __init__(
        self,
        params: TransformerParams,
        cfg: TransformerConfig,
        config: EngineConfig | None = None,
        *,
        tokenizer: Detokenizer | None = None,
        mesh: Mesh | None = None,
        rules: AxisRules | None = None,
        experts: Callable[..., Any] | None = None,
    ):
        if (mesh is None) != (rules is None):
            raise DecodeError("give the engine both a mesh and rules, or neither")
        self.cfg = cfg
        self.config = config = config or EngineConfig()
        self.tokenizer = tokenizer
        self._mesh, self._rules = mesh, rules
        self._static = _Static(cfg, config.page_size, config.record_routing and cfg.mixtures > 0, experts)
        platform = next(iter(params.embed.devices())).platform
        self._split = config.unstack if config.unstack is not None else platform == "cpu"
        self._params = self._prepared(params)
        self.version = 0
        self.metrics = Metrics()

        parts = 1
        if mesh is not None and rules is not None:
            parts = math.prod(mesh.shape.get(axis, 1) for axis in dict(rules.activations).get("batch", ()))
        self._batches = self._multiples(config.batches or _powers(1, config.sequences, 4), parts)
        self._parts = parts
        first_width = -(-128 // config.page_size)
        self._widths = config.widths or _powers(first_width, config.pages_each, 4)
        self._chunk = config.prefill_tokens // config.page_size * config.page_size
        self._lengths = _powers(config.page_size, self._chunk, 2)

        self._pool = PagePool(config.pool + 1, config.page_size)
        self._cache_rows = self._empty_cache()
        self._queue: collections.deque[_Sequence] = collections.deque()
        self._running: dict[_Sequence, None] = {}  # in the order of admission; a dict, for membership
        self._ended: list[Event] = []
        self._requests = 0

    @staticmethod
    def _multiples(sizes: Sequence[int], parts: int) -> tuple[int, ...]:
        return tuple(sorted({-(-size // parts) * parts for size in sizes}))

    def _prepared(self, params: TransformerParams) -> TransformerParams:
        if self._split and any(jax.tree.leaves(run)[0].shape[0] > 1 for run in params.runs):
            return _unstack(params)
        return params

    def _empty_cache(self) -> Any:
        """Zeros for the pool, on the mesh split as the attention splits keys and values."""

        def zeros(params):
            size = self.config.page_size
            cache = make_cache(
                params, self.cfg, batch=1, length=size, page_size=size, pages=self.config.pool + 1,
                dtype=self.config.dtype,
            )  # fmt: skip
            return cache.rows

        if self._mesh is None or self._rules is None:
            return jax.jit(zeros)(self._params)
        mesh, rules, stored = self._mesh, self._rules, self.cfg.attention.stored()
        shapes = jax.eval_shape(zeros, self._params)
        place = tuple(
            {
                name: NamedSharding(
                    mesh,
                    partition_spec((None, None, *stored[name][1]), mesh, rules, kind="activations", shape=leaf.shape),
                )
                for name, leaf in run.items()
            }
            for run in shapes
        )
        return jax.jit(zeros, out_shardings=place)(self._params)

    def _context(self) -> contextlib.AbstractContextManager[None]:
        if self._mesh is None or self._rules is None:
            return contextlib.nullcontext()
        return use_mesh(self._mesh, self._rules)

    # --- Requests -----------------------------------------------------------------------------------------------------

    def submit(
        self, prompt: Sequence[int] | np.ndarray | str, sampling: Sampling, *, seed: int = 0, key: int | None = None
    ) -> int:
        """Queues a request; returns its number, which its events carry.

        Args:
            prompt: token ids, or text where there is a tokenizer.
            seed, key: same (seed, key), same prompt and sampling: same tokens. `key` defaults to the request's number.

        Raises:
            PromptError: empty, longer than the engine holds, ids outside the vocabulary, text without a tokenizer.
            DecodeError: stop strings without a tokenizer, more top_logprobs than ALTERNATIVES, a negative seed or key.
        """
        tokens = self._prompt(prompt)
        if sampling.stop and self.tokenizer is None:
            raise DecodeError(f"stop strings {sampling.stop} need a tokenizer; hand one to the engine, or use stop_ids")
        if sampling.top_logprobs > ALTERNATIVES:
            raise DecodeError(f"top_logprobs {sampling.top_logprobs} exceeds {ALTERNATIVES}")
        number = self._requests
        key = number if key is None else key
        for name, value in (("seed", seed), ("key", key)):
            if not 0 <= value < 2**32:
                raise DecodeError(f"{name} {value} is outside [0, 2**32)")
        self._requests += 1
        stops = set(sampling.stop_ids)
        if not sampling.ignore_eos:
            stops.update(self.cfg.eos)
            stops.update(() if self.tokenizer is None else self.tokenizer.stop_ids)
        limit = self.config.length if sampling.max_tokens is None else len(tokens) + sampling.max_tokens
        for number_of_sample in range(sampling.n):
            text = None
            if self.tokenizer is not None:
                text = _Text(self.tokenizer.stream(skip_special_tokens=True), sampling.stop)
            self._queue.append(
                _Sequence(
                    request=number,
                    sample=number_of_sample,
                    sampling=sampling,
                    tokens=list(tokens),
                    prompt=len(tokens),
                    limit=min(limit, self.config.length),
                    stops=tuple(sorted(stops)),
                    seed=seed,
                    key=key,
                    text=text,
                )
            )
        return number

    def _prompt(self, prompt: Sequence[int] | np.ndarray | str) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise PromptError("a prompt of text needs a tokenizer; hand one to the engine, or give token ids")
            prompt = self.tokenizer.encode(prompt)
        array = np.asarray(prompt)
        if array.size == 0:
            raise PromptError("the prompt is empty; give at least one token, such as the bos token")
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise PromptError(f"a prompt is a list of token ids, not shape {array.shape} of {array.dtype}")
        wrong = np.flatnonzero((array < 0) | (array >= self.cfg.vocab))
        if wrong.size:
            raise PromptError(
                f"token {array[wrong[0]]} at position {wrong[0]} of the prompt is outside the vocabulary of "
                f"{self.cfg.vocab}; cut the padding off, or use the model's own tokenizer"
            )
        if array.size >= self.config.length:
            raise PromptError(
                f"the prompt has {array.size} tokens, the engine's sequences hold {self.config.length} and need room "
                "for one more; shorten it or raise EngineConfig.length"
            )
        return array.tolist()

    def cancel(self, request: int) -> bool:
        """Ends what is left of a request; its samples come out of the next `step` as "cancelled". False: none left."""
        mine = [s for s in (*self._queue, *self._running) if s.request == request]
        for sequence in mine:
            self._end(sequence, "cancelled")
        return bool(mine)

    @property
    def pending(self) -> int:
        """Samples that are not finished."""
        return len(self._queue) + len(self._running)

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do or to tell."""
        return bool(self._queue or self._running or self._ended)

    def update(self, params: TransformerParams) -> None:
        """Other weights of the same shapes; nothing is compiled again.

        Sequences under way go on under the new weights: what the cache holds is computed again (see Preemption above),
        `Completion.versions` says which weights drew which token.

        Raises:
            DecodeError: parameters of another structure, shape, dtype or sharding; names the first.
        """
        params = self._prepared(params)
        self._check_same(params)
        self._params = params
        self.version += 1
        for sequence in reversed(self._running):
            self._release(sequence)
            self._queue.appendleft(sequence)
        self._running.clear()
        self._pool.forget()

    def _check_same(self, params: TransformerParams) -> None:
        old, new = (jax.tree_util.tree_leaves_with_path(tree) for tree in (self._params, params))
        if [path for path, _ in old] != [path for path, _ in new]:
            raise DecodeError("the new parameters have another structure; hand over those of the same config")
        for (path, was), (_, now) in zip(old, new, strict=True):
            for what in ("shape", "dtype", "sharding"):
                if getattr(was, what) != getattr(now, what):
                    raise DecodeError(
                        f"parameter {path_name(path)!r} has {what} {getattr(now, what)}, the engine was made for "
                        f"{getattr(was, what)}; cast or place it as before"
                    )

    def reset_metrics(self) -> None:
        """Counts from zero."""
        self.metrics = Metrics()

    # --- Steps --------------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Admits, prefills, decodes: at most `EngineConfig.steps` tokens for every running sequence."""
        with self._context():
            self._admit()
            while any(not s.ready for s in self._running):
                self._prefill_some()
                self._admit()
                if 2 * sum(s.ready for s in self._running) >= len(self._running):
                    break
            if any(s.ready for s in self._running):
                self._decode_all()
        events, self._ended = self._ended, []
        return events

    def _admit(self) -> None:
        """Moves sequences from the queue to the running ones, in order, while rows and pages last.

        A sequence whose next page is being computed for another one waits for it with its row kept free, so that
        later requests may start beside it but not instead of it.
        """
        free_rows = self.config.sequences - len(self._running)
        spare = self._pool.available - len(self._running)
        coming = {self._next_key(s) for s in self._running if not s.ready} if self.config.share_prefixes else set()
        coming.discard(None)
        waiting = []
        while self._queue and free_rows > 0:
            sequence = self._queue.popleft()
            pages, chain = [], ROOT
            if self.config.share_prefixes:
                pages, chain = self._pool.match(sequence.tokens, sequence.target // self.config.page_size)
            sequence.pages, sequence.chain = pages, chain
            sequence.computed = sequence.registered = len(pages) * self.config.page_size
            missing = -(-len(sequence.tokens) // self.config.page_size) - len(pages)
            needed = missing + self._pool.idle(pages)
            if self.config.share_prefixes and self._next_key(sequence) in coming:
                sequence.pages = []
                waiting.append(sequence)
                free_rows -= 1
                spare -= needed
                continue
            if needed > (spare if self._running else self._pool.available):
                sequence.pages = []
                self._queue.appendleft(sequence)
                break
            self._pool.hold(pages)
            sequence.pages = pages + self._pool.take(missing)
            if self._static.record:
                # A sequence that comes back has its record already.
                for number in range(sequence.record.length // self.config.page_size, len(pages)):
                    sequence.record.append(self._pool.record(pages[number]))
            self._running[sequence] = None
            self.metrics.shared += sequence.computed
            free_rows -= 1
            spare -= needed + 1
            coming.add(self._next_key(sequence))
            coming.discard(None)
        self._queue.extendleft(reversed(waiting))
        self.metrics.peak_pages = max(self.metrics.peak_pages, self._pool.used)

    def _next_key(self, sequence: _Sequence) -> tuple[int, bytes] | None:
        """Under what the next page that the sequence computes will be registered; None where it fills none."""
        start, size = sequence.registered, self.config.page_size
        if start + size > sequence.target:
            return None
        return self._pool.key(sequence.chain, sequence.tokens[start : start + size])

    def _prefill_some(self) -> None:
        """One prefill call: the next piece of the oldest sequence that is not ready, and of others of its bucket."""
        started = time.perf_counter()

        def kind(sequence: _Sequence) -> tuple[int, bool]:
            known = self._static.record and sequence.record.length >= sequence.target
            return _fit(min(sequence.target - sequence.computed, self._chunk), self._lengths), known

        unready = [s for s in self._running if not s.ready]
        length, known = kind(unready[0])
        most = max(1, self._chunk // length)
        group = [s for s in unready if kind(s) == (length, known)][:most]
        rows = _fit(len(group), self._multiples(_powers(1, most, 4), self._parts))
        tokens = np.zeros((rows, length), np.int32)
        start, count = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        replay = None
        if known:
            assert self.cfg.moe is not None
            routing = self.cfg.moe.routing.routed
            replay = np.full((self.cfg.mixtures, rows, length, routing.top_k), routing.slots, np.int32)
        for row, sequence in enumerate(group):
            start[row] = sequence.computed
            count[row] = n = min(sequence.target - sequence.computed, length)
            tokens[row, :n] = sequence.tokens[sequence.computed : sequence.computed + n]
            if replay is not None:
                replay[:, row, :n] = sequence.record.part(sequence.computed, sequence.computed + n)
        self._cache_rows, routing = _prefill(
            self._params, self._cache_rows, tokens, start, count, self._table(group, rows), replay, static=self._static
        )
        routing = None if routing is None or known else np.asarray(routing)
        for row, sequence in enumerate(group):
            if routing is not None:
                new = max(sequence.record.length - sequence.computed, 0)
                sequence.record.append(routing[:, row, new : count[row]])
            sequence.computed += int(count[row])
            self._register(sequence)
        jax.block_until_ready(jax.tree.leaves(self._cache_rows)[0])
        self.metrics.prefill_calls += 1
        self.metrics.prefilled += int(count.sum())
        self.metrics.prefill_seconds += time.perf_counter() - started

    def _table(self, group: list[_Sequence], rows: int) -> Int[np.ndarray, "R W"]:
        width = _fit(max(len(s.pages) for s in group), self._widths)
        table = np.zeros((rows, width), np.int32)
        for row, sequence in enumerate(group):
            table[row, : len(sequence.pages)] = sequence.pages
        return table

    def _register(self, sequence: _Sequence) -> None:
        """Makes the sequence's full pages findable."""
        if not self.config.share_prefixes:
            return
        size = self.config.page_size
        while sequence.registered + size <= sequence.computed:
            start, stop = sequence.registered, sequence.registered + size
            record = sequence.record.part(start, stop) if self._static.record else None
            sequence.chain = self._pool.register(
                sequence.pages[start // size], sequence.chain, sequence.tokens[start:stop], record
            )
            sequence.registered = stop

    def _grow(self) -> list[_Sequence]:
        """The ready sequences, each with pages for the coming steps; preempts the youngest where they do not last."""
        ready = []
        for sequence in list(self._running):
            if sequence not in self._running or not sequence.ready:
                continue
            steps = min(self.config.steps, sequence.limit - len(sequence.tokens))
            missing = -(-(sequence.computed + steps) // self.config.page_size) - len(sequence.pages)
            while missing > self._pool.available and sequence in self._running:
                self._preempt(next(reversed(self._running)))
            if sequence in self._running:
                sequence.pages += self._pool.take(max(missing, 0))
                ready.append(sequence)
        return [s for s in ready if s in self._running]

    def _preempt(self, sequence: _Sequence) -> None:
        del self._running[sequence]
        self._release(sequence)
        self._queue.appendleft(sequence)
        self.metrics.preemptions += 1

    def _release(self, sequence: _Sequence) -> None:
        self._register(sequence)
        self._pool.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.registered, sequence.chain = [], 0, 0, ROOT

    def _decode_all(self) -> None:
        started = time.perf_counter()
        group = self._grow()
        rows, steps = _fit(len(group), self._batches), self.config.steps
        alternatives = ALTERNATIVES if any(s.sampling.top_logprobs for s in group) else 0
        self._cache_rows, made = _decode(
            self._params, self._cache_rows, self._batch(group, rows), static=self._static, steps=steps,
            alternatives=alternatives,
        )  # fmt: skip
        self.metrics.peak_pages = max(self.metrics.peak_pages, self._pool.used)
        made = jax.device_get(made)
        self.metrics.decode_calls += 1
        self.metrics.slots += rows * steps
        for row, sequence in enumerate(group):
            self._take(sequence, row, made)
        self.metrics.decode_seconds += time.perf_counter() - started

    def _batch(self, group: list[_Sequence], rows: int) -> _Rows:
        def filled(values: list[int], dtype: Any = np.int32) -> np.ndarray:
            return np.array(values + [0] * (rows - len(values)), dtype)

        # Widths of the stops differ little from request to request; multiples of 4 keep the shapes few.
        width = -(-max(1, *(len(s.stops) for s in group)) // 4) * 4
        stops = np.full((rows, width), -1, np.int32)
        for row, sequence in enumerate(group):
            stops[row, : len(sequence.stops)] = sequence.stops
        idle = Sampling(temperature=0)
        return _Rows(
            token=filled([s.tokens[-1] for s in group]),
            position=filled([s.computed for s in group]),
            left=filled([s.limit - len(s.tokens) for s in group]),
            table=self._table(group, rows),
            stops=stops,
            settings=settings([s.sampling for s in group] + [idle] * (rows - len(group))),
            seed=filled([s.seed for s in group], np.uint32),
            request=filled([s.key for s in group], np.uint32),
            sample=filled([s.sample for s in group], np.uint32),
        )

    def _take(self, sequence: _Sequence, row: int, made: Any) -> None:
        """Appends what a decode call has drawn for one sequence, up to where it ends."""
        drawn, tokens, tops, pieces = made["drawn"], [], [], []
        finish = stop = error = None
        for step in range(len(drawn.token)):
            self.metrics.rows += 1
            if not drawn.finite[step, row]:
                finish = "error"
                error = NonFiniteLogits(
                    f"the logits after position {len(sequence.tokens) - 1} of request {sequence.request} (sample "
                    f"{sequence.sample}) hold a NaN or an infinity; look for them in the weights"
                )
                break
            token = int(drawn.token[step, row])
            if made["routing"] is not None:
                sequence.record.append(made["routing"][step, :, row, None])
            sequence.computed += 1
            sequence.tokens.append(token)
            sequence.logprobs.append(float(drawn.logprob[step, row]))
            sequence.sampling_logprobs.append(float(drawn.sampling_logprob[step, row]))
            sequence.versions.append(self.version)
            tokens.append(token)
            if sequence.sampling.top_logprobs:
                ids, values = (part[step, row] for part in made["top"])
                sequence.top.append((ids, values))
                wide = sequence.sampling.top_logprobs
                tops.append(tuple(zip(ids[:wide].tolist(), values[:wide].tolist(), strict=True)))
            self.metrics.generated += 1
            if token in sequence.stops:
                finish, stop = "stop", token
                break
            if sequence.text is not None:
                piece, stop = sequence.text.push(token)
                pieces.append(piece)
                if stop is not None:
                    finish = "stop"
                    break
            if len(sequence.tokens) >= sequence.limit:
                finish = "length"
                break
        fresh = Event(
            request=sequence.request,
            sample=sequence.sample,
            tokens=tuple(tokens),
            logprobs=tuple(sequence.logprobs[len(sequence.logprobs) - len(tokens) :]),
            top=tuple(tops),
            text="".join(pieces),
        )
        if finish is None:
            self._ended.append(fresh)
        else:
            self._end(sequence, finish, stop, error, fresh)

    def _end(
        self,
        sequence: _Sequence,
        finish: str,
        stop: int | str | None = None,
        error: DecodeError | None = None,
        fresh: Event | None = None,
    ) -> None:
        """Takes a sequence out and reports it."""
        fresh = fresh or Event(request=sequence.request, sample=sequence.sample)
        text = fresh.text
        if sequence.text is not None and not isinstance(stop, str):
            rest, found = sequence.text.finish()
            text += rest
            # An incomplete character at the end can complete a stop string: the text is cut, the reason is it.
            finish, stop = ("stop", found) if found is not None and finish == "length" else (finish, stop)
        if sequence in self._running:
            del self._running[sequence]
            if error is not None:
                self._pool.forget(sequence.pages)
                self._pool.release(sequence.pages)
                self._wipe([page for page in sequence.pages if not self._pool.holders(page)])
            else:
                self._release(sequence)
        else:
            self._queue.remove(sequence)
        completion = sequence.completion(finish, stop, error, self._static.record)
        self._ended.append(dataclasses.replace(fresh, text=text, completion=completion))
        self.metrics.finished += 1

    def _wipe(self, pages: list[int]) -> None:
        """Zeros in pages of a sequence that failed."""
        padded = np.zeros(-(-len(pages) // 16) * 16, np.int32)  # few shapes; page 0 is zeros anyway
        padded[: len(pages)] = pages
        with self._context():
            self._cache_rows = _clear(self._cache_rows, padded, page_size=self.config.page_size)

    # --- Whole calls --------------------------------------------------------------------------------------------------

    def stream(
        self, prompt: Sequence[int] | np.ndarray | str, sampling: Sampling, *, seed: int = 0, key: int | None = None
    ) -> Iterator[Event]:
        """Events of one request as they come. Requests submitted beside it go on, their events are lost; dropping the
        iterator cancels it.
        """
        request = self.submit(prompt, sampling, seed=seed, key=key)
        left = sampling.n
        try:
            while left:
                for event in self.step():
                    if event.request == request:
                        left -= event.completion is not None
                        yield event
        finally:
            if left:
                self.cancel(request)

    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray | str],
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008  (frozen)
        *,
        seed: int = 0,
        on_event: Callable[[Event], None] | None = None,
    ) -> list[Completion]:
        """Completions of all prompts, those of one prompt side by side.

        The key of a request is its number in `prompts`: the same (seed, number) gives the same tokens. `request` of the
        completions is that number, too; `on_event` sees the engine's own numbers.

        Args:
            sampling: for all, or one for each prompt.
            seed: of all draws.
            on_event: called with every event.

        Raises:
            PromptError, DecodeError: before anything is computed.
            NonFiniteLogits: a sample that failed; the others are cancelled.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(prompts):
            raise DecodeError(f"{len(each)} samplings for {len(prompts)} prompts; give one, or one each")
        if self.busy:
            raise DecodeError(f"{self.pending} samples are under way; step until the engine is idle, or cancel them")
        numbers: dict[int, int] = {}
        try:
            for index, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
                numbers[self.submit(prompt, own, seed=seed, key=index)] = index
            done: dict[tuple[int, int], Completion] = {}
            while self.busy:
                for event in self.step():
                    if on_event is not None:
                        on_event(event)
                    if event.completion is None:
                        continue
                    if event.completion.error is not None:
                        raise event.completion.error
                    done[numbers[event.request], event.sample] = event.completion
        except BaseException:
            for number in numbers:
                self.cancel(number)
            self._ended.clear()
            raise
        return [
            dataclasses.replace(done[index, number], request=index)
            for index, own in enumerate(each)
            for number in range(own.n)
        ]


def generate(
    params: TransformerParams,
    cfg: TransformerConfig,
    prompts: Sequence[Sequence[int] | np.ndarray | str],
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008  (frozen)
    *,
    seed: int = 0,
    config: EngineConfig | None = None,
    tokenizer: Detokenizer | None = None,
    mesh: Mesh | None = None,
    rules: AxisRules | None = None,
    experts: Callable[..., Any] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> list[Completion]:
    """Completions of all prompts by an engine of its own; see `Engine.generate`. Steps compiled by an earlier call with
    the same sizes are used again.
    """
    engine = Engine(params, cfg, config, tokenizer=tokenizer, mesh=mesh, rules=rules, experts=experts)
    return engine.generate(prompts, sampling, seed=seed, on_event=on_event)
