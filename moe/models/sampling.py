"""From logits to tokens: greedy, temperature, top-k, top-p, min-p, with the log-probability of what was drawn.

All functions take logits [B, V] and one setting per row as arrays [B], so that one compiled program serves any mixture
of requests. The order is transformers': temperature, top-k, top-p, min-p; each keeps tokens of equal logit together.

Two log-probabilities belong to a token: `logprob`, of the model's own softmax (what the training forward gives, what
importance ratios and KL are taken of), and `sampling_logprob`, of the tempered and filtered distribution that it was
drawn from (0 where greedy).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt32

from moe.params import Param

_BLOCK = 256  # tokens summed together before the draw


class SamplingError(ValueError):
    """A sampling setting that has no meaning. The message names the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a request asks for.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keeps the k likeliest tokens; 0 keeps all.
        top_p: keeps the likeliest tokens that together reach this mass; 1 keeps all.
        min_p: keeps tokens at least this likely, relative to the likeliest; 0 keeps all.
        max_tokens: ends the completion; None: as many as the engine holds.
        stop: strings that end it (needs a tokenizer); the text ends before them.
        stop_ids: further token ids that end it.
        ignore_eos: the model's own stop ids do not end it.
        n: completions of the prompt.
        top_logprobs: likeliest tokens reported with their log-probabilities at every position.
    """

    temperature: float | int = 1.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    top_logprobs: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SamplingError(f"temperature {self.temperature} must be finite and at least 0; 0 is greedy")
        if self.top_k < 0:
            raise SamplingError(f"top_k {self.top_k} must be at least 0; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p {self.top_p} is outside (0, 1]; 1 keeps every token")
        if not 0 <= self.min_p <= 1:
            raise SamplingError(f"min_p {self.min_p} is outside [0, 1]; 0 keeps every token")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise SamplingError(f"max_tokens {self.max_tokens} must be at least 1, or None for all there is room for")
        if self.n < 1:
            raise SamplingError(f"n {self.n} must be at least 1")
        if self.top_logprobs < 0:
            raise SamplingError(f"top_logprobs {self.top_logprobs} must be at least 0")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise SamplingError(f"stop {self.stop!r} must be a tuple of strings that are not empty")
        if any(token < 0 for token in self.stop_ids):
            raise SamplingError(f"stop_ids {self.stop_ids} must be token ids, at least 0")


@struct.dataclass
class Settings:
    """The settings of B rows."""

    temperature: Param  # [B] float32
    top_k: Param  # [B] int32
    top_p: Param  # [B] float32
    min_p: Param  # [B] float32


def settings(requests: list[Sampling]) -> Settings:
    """The rows' settings side by side, as numpy arrays."""
    return Settings(
        temperature=np.array([r.temperature for r in requests], np.float32),
        top_k=np.array([r.top_k for r in requests], np.int32),
        top_p=np.array([r.top_p for r in requests], np.float32),
        min_p=np.array([r.min_p for r in requests], np.float32),
    )


@struct.dataclass
class Drawn:
    """One token for each row.

    Attributes:
        token: drawn ids; anything where not `finite`.
        logprob: of the token under softmax(logits).
        sampling_logprob: of the token under the distribution that it was drawn from.
        finite: False where the logits hold a NaN or +inf, or nothing but -inf.
    """

    token: Param  # [B] int32
    logprob: Param  # [B] float32
    sampling_logprob: Param  # [B] float32
    finite: Param  # [B] bool


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> uint32 with the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(enough: Callable[[UInt32[Array, "B 1"]], jax.Array], rows: int) -> UInt32[Array, "B 1"]:
    """The largest number of which `enough` is true, bit by bit; `enough` must be true of 0 and change once."""

    def bit(i, found):
        higher = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(higher)[:, None], higher, found)

    return lax.fori_loop(0, 32, bit, jnp.zeros((rows, 1), jnp.uint32))


def keep_top_k(logits: Float[Array, "B V"], k: Int[Array, " B"]) -> Float[Array, "B V"]:
    """-inf below each row's k-th largest logit; k = 0 keeps all.

    The k-th largest is found bit by bit, in 32 counts over the row whatever k is: no sort, and no k in the shapes.
    """
    order = _ordered(logits.astype(jnp.float32))
    wanted = jnp.where(k > 0, jnp.minimum(k, logits.shape[-1]), logits.shape[-1])
    least = _largest(lambda bound: (order >= bound).sum(-1) >= wanted, len(logits))
    return jnp.where(order >= least, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """-inf but for the likeliest tokens of softmax(logits), as few as reach the mass p; p = 1 keeps all.

    A token stays where the tokens strictly likelier than it hold less than p (2, 1904.09751).
    """
    order = _ordered(logits.astype(jnp.float32))
    shares = jax.nn.softmax(logits.astype(jnp.float32), -1)

    def enough(bound):
        return jnp.where(order >= bound, shares, 0).sum(-1) >= p

    least = jnp.where(p[:, None] < 1, _largest(enough, len(logits)), 0)
    return jnp.where(order >= least, logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "B V"], p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """-inf below p times the largest probability of the row (2407.01082); p = 0 keeps all."""
    least = logits.max(-1, keepdims=True) + jnp.log(p)[:, None]
    return jnp.where((logits >= least) | (p == 0)[:, None], logits, -jnp.inf)


def adjust(logits: Float[Array, "B V"], rows: Settings) -> Float[Array, "B V"]:
    """The logits that a token is drawn from, float32: tempered, then filtered. Rows with temperature 0 keep T = 1."""
    rows = jax.tree.map(jnp.asarray, rows)
    z = logits.astype(jnp.float32)
    # From the peak down, so that a tiny temperature ends at -inf and not at inf - inf.
    z = (z - z.max(-1, keepdims=True)) / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    z = lax.cond((rows.top_k > 0).any(), lambda z: keep_top_k(z, rows.top_k), lambda z: z, z)
    z = lax.cond((rows.top_p < 1).any(), lambda z: keep_top_p(z, rows.top_p), lambda z: z, z)
    return keep_min_p(z, rows.min_p)


def token_keys(
    seed: UInt32[Array, " B"], request: UInt32[Array, " B"], sample: UInt32[Array, " B"], position: Int[Array, " B"]
) -> Key[Array, " B"]:
    """The key of each row's next draw; it depends on these four numbers and nothing else."""

    def one(seed, *parts):
        key = jax.random.key(seed)
        for part in parts:
            key = jax.random.fold_in(key, part)
        return key

    return jax.vmap(one)(seed, request, sample, position.astype(jnp.uint32))


def _choose(z: Float[Array, "B V"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """The index at which the cumulated softmax(z) passes `uniform`, never one of probability 0.

    Blocks of 256 first, then the tokens of the one block: a running sum over the whole vocabulary costs XLA more than
    everything else here, and so do Gumbel numbers for all of it (16 x 49,152 on two cores: 10 ms, this 2 ms).
    """
    rows, size = z.shape
    shares = jnp.exp(z - z.max(-1, keepdims=True))
    blocks = jnp.pad(shares, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
    sums = blocks.sum(-1)
    ends = jnp.cumsum(sums, -1)
    target = uniform * ends[:, -1]
    # First and last choice that hold anything: rounding must not leave either.
    block = _first(sums > 0, ends > target[:, None])
    rest = target - jnp.take_along_axis(ends - sums, block[:, None], 1)[:, 0]
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    return block * _BLOCK + _first(inside > 0, jnp.cumsum(inside, -1) > rest[:, None])


def _first(allowed: jax.Array, passed: jax.Array) -> jax.Array:
    """Index of the first column that is both; the last allowed one where none is."""
    both = allowed & passed
    last = allowed.shape[1] - 1 - jnp.argmax(allowed[:, ::-1], -1)
    return jnp.where(both.any(-1), jnp.argmax(both, -1), last)


def sample(logits: Float[Array, "B V"], keys: Key[Array, " B"], rows: Settings) -> Drawn:
    """One token for each row: argmax where temperature is 0, else a draw from softmax(adjust(logits)).

    The draw inverts the cumulative distribution at one float32 uniform of the row's key. Filters and draws are computed
    only in calls where some row wants them.
    """
    rows = jax.tree.map(jnp.asarray, rows)
    z = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(z, -1)
    greedy = rows.temperature == 0

    def likeliest(z):
        return jnp.argmax(z, -1), jnp.zeros(len(z), jnp.float32)

    def draw(z):
        adjusted = adjust(z, rows)
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
        token = jnp.where(greedy, jnp.argmax(z, -1), _choose(adjusted, uniform))
        own = jnp.take_along_axis(adjusted, token[:, None], -1)[:, 0] - jax.nn.logsumexp(adjusted, -1)
        return token, jnp.where(greedy, 0.0, own)

    token, own = lax.cond(greedy.all(), likeliest, draw, z)
    return Drawn(
        token=token.astype(jnp.int32),
        logprob=jnp.take_along_axis(z, token[:, None], -1)[:, 0] - total,
        sampling_logprob=own,
        finite=jnp.isfinite(total),
    )
