"""One decoder-only transformer for the families that this library reads and writes: Llama (SmolLM2), Qwen3, Qwen3-MoE,
GLM-4.7-Flash (glm4_moe_lite) and LongCat-Flash.

    params = moe.params.init(jax.random.key(0), transformer_specs(cfg))
    logits = forward(params, tokens, cfg=cfg)                                 # [B, S, V] float32
    out = apply(params, tokens, cfg=cfg, valid=valid, observe=lambda r, c: switch_loss(r, c))

A layer is one of three kinds:

    "dense"      x + attention(norm(x)), then + mlp(norm(.))
    "moe"        the same with a mixture of experts as the second half
    "shortcut"   LongCat-Flash (2509.01322): two attentions and two dense MLPs in a row; the mixture reads what the
                 first MLP reads, and its output joins after the second, so that its communication hides behind them

Consecutive layers of one kind are a run, whose parameters are stacked on a leading axis and scanned over. `unstack`
turns every run into runs of one layer: slower to compile, but a step then reads each weight where it lies. Decoding on
CPU wants that: a scan copies every layer's weights into its body first.
"""

import dataclasses
import itertools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from moe import params as parameters
from moe.layers import cache as caching
from moe.layers.attention import GQAConfig, GQAParams, MLAConfig, MLAParams, Tokens, attention, attention_specs
from moe.layers.cache import Cache, CacheError, new_cache
from moe.layers.mlp import ACTIVATIONS, mlp, mlp_specs
from moe.layers.moe import MoEConfig, MoEParams, moe, moe_specs
from moe.layers.norm import rms_norm
from moe.layers.rotary import angles
from moe.params import Normal, Param, ParamSpec, ones
from moe.routing import Routing, RoutingConfig
from moe.sharding import constrain

KINDS = ("dense", "moe", "shortcut")


class ModelError(ValueError):
    """A model config, or an input of the model, that cannot be honoured. The message names the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder.

    Attributes:
        family: model_type of the Hugging Face config that this model is written as.
        vocab: V, rows of the embedding.
        width: D.
        layers: kind of each layer, of KINDS.
        attention: of every layer.
        hidden: width of the dense MLPs.
        moe: of every mixture, or None.
        eps: of the RMSNorms.
        tied: the head is the embedding.
        activation: of MLPs and experts.
        max_positions: context length that the checkpoint states; not enforced.
        bos, eos, pad: token ids of the checkpoint; eos may be several.
    """

    family: str
    vocab: int
    width: int
    layers: tuple[str, ...]
    attention: GQAConfig | MLAConfig
    hidden: int
    moe: MoEConfig | None = None
    eps: float = 1e-6
    tied: bool = False
    activation: str = "silu"
    max_positions: int = 0
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None

    def __post_init__(self):
        if min(self.vocab, self.width, self.hidden) < 1 or not self.layers:
            raise ModelError(
                f"vocab {self.vocab}, width {self.width}, hidden {self.hidden} and {len(self.layers)} layers must be "
                "positive"
            )
        for index, kind in enumerate(self.layers):
            if kind not in KINDS:
                raise ModelError(f"layer {index} is of kind {kind!r}, not one of {', '.join(map(repr, KINDS))}")
            if kind != "dense" and self.moe is None:
                raise ModelError(f"layer {index} is of kind {kind!r} and needs a MoEConfig as moe=")
        if self.activation not in ACTIVATIONS:
            raise ModelError(f"activation {self.activation!r} is not one of {', '.join(map(repr, ACTIVATIONS))}")
        if self.moe is not None and self.moe.activation != self.activation:
            raise ModelError(f"experts have activation {self.moe.activation!r}, the model {self.activation!r}")

    @property
    def runs(self) -> tuple[tuple[str, int], ...]:
        """(kind, how many) of the consecutive layers of one kind."""
        return tuple((kind, len(list(group))) for kind, group in itertools.groupby(self.layers))

    @property
    def mixtures(self) -> int:
        """Layers with a mixture of experts."""
        return sum(kind != "dense" for kind in self.layers)


@struct.dataclass
class LayerParams:
    """A "dense" layer (mlp is MLPParams) or a "moe" layer (MoEParams)."""

    attention: GQAParams | MLAParams
    attention_norm: Param  # [D]
    mlp: Any  # MLPParams or MoEParams
    mlp_norm: Param  # [D]


@struct.dataclass
class ShortcutParams:
    """A "shortcut" layer: two plain layers and the mixture beside them."""

    first: LayerParams
    second: LayerParams
    moe: MoEParams


@struct.dataclass
class TransformerParams:
    embed: Param  # [V, D]
    runs: tuple[Any, ...]  # LayerParams or ShortcutParams with a leading axis of layers
    norm: Param  # [D]
    head: Param = None  # [V, D], None where tied


@struct.dataclass
class Output:
    """What `apply` returns.

    Attributes:
        hidden: after the final norm.
        routing: index of every mixture's slots; what `replay` takes.
        observed: what `observe` returned for every mixture, stacked on a leading axis of mixtures; None without.
        cache: with this call's tokens, or None.
    """

    hidden: Param  # [B, S, D]
    routing: Param  # [mixtures, B, S, K] int32, or None
    observed: Any = None
    cache: Cache | None = None


def layer_specs(cfg: TransformerConfig, kind: str) -> LayerParams | ShortcutParams:
    """Parameters of one layer, without a leading axis."""

    def plain(second: Any) -> LayerParams:
        norm = ParamSpec((cfg.width,), (None,), ones)
        return LayerParams(attention_specs(cfg.attention, cfg.width), norm, second, norm)

    dense = mlp_specs(cfg.width, cfg.hidden)
    if kind == "dense" or cfg.moe is None:
        return plain(dense)
    if kind == "moe":
        return plain(moe_specs(cfg.moe, cfg.width))
    return ShortcutParams(first=plain(dense), second=plain(dense), moe=moe_specs(cfg.moe, cfg.width))


def transformer_specs(cfg: TransformerConfig) -> TransformerParams:
    """All parameters, for `moe.params.init`, `abstract` and `shardings`."""
    table = ParamSpec((cfg.vocab, cfg.width), ("vocab", "embed"), Normal(0.02))
    return TransformerParams(
        embed=table,
        runs=tuple(parameters.stack(layer_specs(cfg, kind), count) for kind, count in cfg.runs),
        norm=ParamSpec((cfg.width,), (None,), ones),
        head=None if cfg.tied else table,
    )


def unstack(params: TransformerParams) -> TransformerParams:
    """The same parameters with every layer a run of its own, each in its own array."""

    def layers(run: Any) -> list[Any]:
        count = jax.tree.leaves(run)[0].shape[0]
        return [jax.tree.map(operator.itemgetter(slice(i, i + 1)), run) for i in range(count)]

    return dataclasses.replace(params, runs=tuple(layer for run in params.runs for layer in layers(run)))


def restack(params: TransformerParams, cfg: TransformerConfig) -> TransformerParams:
    """The inverse of `unstack`: the runs of `cfg`."""
    singles = iter(unstack(params).runs)
    runs = []
    for _, count in cfg.runs:
        group = list(itertools.islice(singles, count))
        runs.append(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *group))
    return dataclasses.replace(params, runs=tuple(runs))


def mixtures_of(params: TransformerParams) -> list[MoEParams]:
    """The mixtures of every run that has any, with their leading axis of layers."""
    return [run.moe if isinstance(run, ShortcutParams) else run.mlp for run in params.runs if _mixes(run)]


def map_mixtures(params: TransformerParams, change: Callable[[MoEParams, int], MoEParams]) -> TransformerParams:
    """params with change(mixture, number of its first mixture) for the stacked mixtures of every run."""
    runs, first = [], 0
    for run in params.runs:
        if not _mixes(run):
            runs.append(run)
            continue
        shortcut = isinstance(run, ShortcutParams)
        mixture = change(run.moe if shortcut else run.mlp, first)
        runs.append(dataclasses.replace(run, **{"moe" if shortcut else "mlp": mixture}))
        first += mixture.router.shape[0]
    return dataclasses.replace(params, runs=tuple(runs))


def make_cache(
    params: TransformerParams,
    cfg: TransformerConfig,
    *,
    batch: int,
    length: int,
    page_size: int | None = None,
    pages: int | None = None,
    dtype: Any = None,
) -> Cache:
    """An empty cache for these parameters (its runs are theirs).

    Args:
        batch: sequences.
        length: tokens that each may hold; rounded up to whole pages.
        page_size: tokens of a page; default: one page for each sequence.
        pages: pages in all, where sequences share a pool.
        dtype: default the embedding's.
    """
    size = length if page_size is None else page_size
    stored = cfg.attention.stored()
    runs = []
    for run in params.runs:
        count = jax.tree.leaves(run)[0].shape[0]
        runs.append((2 * count if isinstance(run, ShortcutParams) else count, stored))
    return new_cache(
        runs, batch=batch, pages_each=-(-length // size), page_size=size, pages=pages, dtype=dtype or params.embed.dtype
    )


def forward(params: TransformerParams, tokens: Int[Array, "B S"], *, cfg: TransformerConfig) -> Float[Array, "B S V"]:
    """Logits of the next token after every position, float32."""
    return logits(params, apply(params, tokens, cfg=cfg).hidden)


def logits(params: TransformerParams, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
    """hidden x head, accumulated and returned in float32."""
    head = params.embed if params.head is None else params.head
    out = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    return constrain(out, *("batch", "seq")[: out.ndim - 1], "vocab") if out.ndim <= 3 else out


def apply(
    params: TransformerParams,
    tokens: Int[Array, "B S"],
    *,
    cfg: TransformerConfig,
    positions: Int[Array, "B S"] | None = None,
    valid: Bool[Array, "B S"] | None = None,
    segments: Int[Array, "B S"] | None = None,
    consecutive: bool = False,
    cache: Cache | None = None,
    replay: Int[Array, "L B S K"] | None = None,
    rng: Key[Array, ""] | None = None,
    observe: Callable[[Routing, RoutingConfig], Any] | None = None,
    experts: Callable[..., Any] | None = None,
    remat: bool = False,
) -> Output:
    """Features of every position, and what happened on the way.

    Args:
        tokens: ids in [0, V).
        positions: of the tokens; default 0, 1, ... after what the cache holds. Packed segments need their own.
        valid: False marks padding: no key for others, no expert used, not stored in the cache.
        segments: packed sequences see only their own; not with a cache.
        consecutive: a promise about `positions`: none negative, in every segment indices plus a constant, as in
            `moe.data.PackedRows`. Attention kernels then serve (`moe.kernels.attention`); broken, they are wrong
            without a warning. Default positions keep it by themselves; padding need not.
        cache: read, and written at the tokens' positions.
        replay: `Output.routing` of an earlier call, to be followed by every mixture.
        rng: for routers with jitter.
        observe: called with every mixture's Routing; its results come back stacked.
        experts: another expert computation, see `moe.layers.moe.moe`.
        remat: recompute each layer in the backward pass instead of keeping its activations.

    Raises:
        ModelError: shapes that do not fit.
        CacheError: a cache of other layers or another batch.
    """
    batch, length = tokens.shape
    if replay is not None and (cfg.moe is None or replay.shape[:3] != (cfg.mixtures, batch, length)):
        raise ModelError(f"replay of shape {replay.shape} must start with ({cfg.mixtures}, {batch}, {length})")
    if segments is not None and cache is not None:
        raise ModelError("segments (packing) and a cache exclude each other; give each segment its own sequence")
    if cache is not None and len(cache.rows) != len(params.runs):
        raise CacheError(
            f"a cache of {len(cache.rows)} runs of layers, parameters of {len(params.runs)}; make it with make_cache "
            "from these parameters"
        )
    if cache is not None and cache.table.shape[0] != batch:
        raise CacheError(f"tokens of {batch} sequences, a cache of {cache.table.shape[0]}; make it for the batch")
    consecutive |= positions is None
    if positions is None:
        start = 0 if cache is None else cache.length[:, None]
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None] + start, tokens.shape)
    cos, sin = angles(positions, cfg.attention.rotary)
    key_positions = positions if valid is None else jnp.where(valid, positions, -1)
    call = _Call(
        tokens=Tokens(positions, cos, sin, key_positions, segments, consecutive),
        valid=valid,
        view=None if cache is None else caching.view(cache, positions, valid),
        cfg=cfg,
        observe=observe,
        experts=experts,
    )
    x = constrain(params.embed[tokens], "batch", "seq", "embed")
    keys = None if rng is None else jax.random.split(rng, max(cfg.mixtures, 1))
    rows, routing, observed, first = [], [], [], 0
    below = None  # router logits of the mixture below, where they are used
    if cfg.moe is not None and cfg.moe.routing.gating_residual:
        below = jnp.zeros((*tokens.shape, cfg.moe.routing.routed.slots), jnp.float32)
    for number, run in enumerate(params.runs):
        count = jax.tree.leaves(run)[0].shape[0]
        mixed = _mixes(run)
        here = slice(first, first + count)
        given = (
            None if replay is None or not mixed else replay[here],
            None if keys is None or not mixed else keys[here],
        )
        (x, below), kept, out = _run(run, (x, below), call, None if cache is None else cache.rows[number], given, remat)
        rows.append(kept)
        if mixed:
            routing.append(out[0])
            observed.append(out[1])
            first += count
    return Output(
        hidden=rms_norm(x, params.norm, eps=cfg.eps),
        routing=jnp.concatenate(routing) if routing else None,
        observed=jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *observed) if observe and observed else None,
        cache=None if cache is None or call.view is None else caching.advance(cache, tuple(rows), call.view),
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """What every layer of one call shares."""

    tokens: Tokens
    valid: Any
    view: caching.View | None
    cfg: TransformerConfig
    observe: Any
    experts: Any


def _mixes(run: Any) -> bool:
    return isinstance(run, ShortcutParams) or isinstance(run.mlp, MoEParams)


def _run(run: Any, x: Any, call: _Call, rows: Any, given: tuple[Any, Any], remat: bool) -> tuple[Any, Any, Any]:
    """All layers of a run: (x, the cache's arrays, (index, observed) of its mixtures with a leading axis).

    x is a pair here and in `_layer`: residual stream, and router logits of the mixture below or None.
    """
    count = jax.tree.leaves(run)[0].shape[0]

    def step(carry, item):
        x, rows = carry
        layer, (params, given) = item
        x, rows, out = _layer(params, x, call, rows, layer, given)
        return (x, rows), out

    if remat:
        step = jax.checkpoint(step)
    if count == 1:
        (x, rows), out = step((x, rows), (0, jax.tree.map(lambda leaf: leaf[0], (run, given))))
        return x, rows, jax.tree.map(lambda leaf: leaf[None], out)
    (x, rows), out = jax.lax.scan(step, (x, rows), (jnp.arange(count), (run, given)))
    return x, rows, out


def _layer(params: Any, x: Any, call: _Call, rows: Any, layer: Any, given: tuple[Any, Any]) -> Any:
    x, below = x
    if isinstance(params, ShortcutParams):
        x, rows = _attend(params.first, x, call, rows, 2 * layer)
        middle = rms_norm(x, params.first.mlp_norm, eps=call.cfg.eps)
        aside, below, out = _mixture(params.moe, middle, below, call, given)
        x = x + mlp(params.first.mlp, middle, activation=call.cfg.activation)
        x, rows = _attend(params.second, x, call, rows, 2 * layer + 1)
        inner = rms_norm(x, params.second.mlp_norm, eps=call.cfg.eps)
        return (x + mlp(params.second.mlp, inner, activation=call.cfg.activation) + aside, below), rows, out
    x, rows = _attend(params, x, call, rows, layer)
    inner = rms_norm(x, params.mlp_norm, eps=call.cfg.eps)
    if isinstance(params.mlp, MoEParams):
        y, below, out = _mixture(params.mlp, inner, below, call, given)
        return (x + y, below), rows, out
    return (x + mlp(params.mlp, inner, activation=call.cfg.activation), below), rows, ()


def _attend(params: LayerParams, x: jax.Array, call: _Call, rows: Any, layer: Any) -> tuple[jax.Array, Any]:
    inner = rms_norm(x, params.attention_norm, eps=call.cfg.eps)
    y, rows = attention(
        params.attention, inner, call.tokens, cfg=call.cfg.attention, rows=rows, layer=layer, view=call.view
    )
    return x + y, rows


def _mixture(params: MoEParams, x: jax.Array, below: Any, call: _Call, given: tuple[Any, Any]) -> tuple[Any, Any, Any]:
    assert call.cfg.moe is not None
    replay, rng = given
    y, routing = moe(
        params, x, cfg=call.cfg.moe, rng=rng, replay=replay, valid=call.valid, below=below, experts=call.experts
    )
    return (
        y,
        None if below is None else routing.logits,
        (routing.index, None if call.observe is None else call.observe(routing, call.cfg.moe.routing.routed)),
    )
