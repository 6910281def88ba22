"""Causal self-attention: grouped-query (GQA, 2305.13245) with optional QK-norm, and multi-head latent attention (MLA,
2405.04434), with or without a cache.

Shapes: B batch, S new tokens, T keys, D model, H query heads, G key/value heads, K head size, R latent rank.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moe.kernels.attention import Where, attend_by_index
from moe.kernels.platform import Partial
from moe.layers import cache as caching
from moe.layers.cache import View
from moe.layers.norm import rms_norm
from moe.layers.rotary import RotaryConfig, rotate, softmax_factor
from moe.params import FanIn, Param, ParamSpec, ones, zeros
from moe.sharding import constrain

# Scores of masked keys. Finite, so that a query without any key (padding) averages values instead of dividing 0 by 0.
_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention.

    Attributes:
        heads, kv_heads: H and G; G divides H (multi-head: equal, multi-query: 1).
        head_dim: K.
        rotary: of queries and keys.
        qk_norm: RMSNorm over each head of queries and keys (Qwen3).
        bias: of the query, key and value projections.
        out_bias: of the output projection.
        eps: of the QK-norm.
        window: keys at distance below this are seen; None: all earlier ones.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary: RotaryConfig
    qk_norm: bool = False
    bias: bool = False
    out_bias: bool = False
    eps: float = 1e-6
    window: int | None = None

    def __post_init__(self):
        if min(self.heads, self.kv_heads, self.head_dim) < 1 or self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads} (head_dim {self.head_dim})")
        if self.rotary.dim > self.head_dim:
            raise ValueError(f"rotary dim {self.rotary.dim} exceeds head_dim {self.head_dim}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window} must be at least 1; None for no window")

    def stored(self) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
        """What the cache keeps of a token."""
        each = ((self.kv_heads, self.head_dim), ("kv_heads", "head_dim"))
        return {"key": each, "value": each}


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention: keys and values of all heads come from one latent of rank R and one rotary key.

    Attributes:
        heads: H.
        query_rank: low rank of the queries; None: full.
        latent_rank: R.
        nope_dim, rope_dim, value_dim: of a head's query/key without and with rotation, and of its value.
        rotary: of the rope part; its dim equals rope_dim.
        bias: of the down projections and the output projection.
        query_scale, latent_scale: factors on queries and on the normalised latent (LongCat-Flash: sqrt(D / rank)).
        eps: of the norms of the low-rank projections.
    """

    heads: int
    query_rank: int | None
    latent_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rotary: RotaryConfig
    bias: bool = False
    query_scale: float = 1.0
    latent_scale: float = 1.0
    eps: float = 1e-6

    def __post_init__(self):
        sizes = (self.heads, self.latent_rank, self.nope_dim, self.rope_dim, self.value_dim, self.query_rank or 1)
        if min(sizes) < 1:
            raise ValueError(f"MLA sizes must be positive, not {self}")
        if self.rotary.dim != self.rope_dim:
            raise ValueError(f"rotary dim {self.rotary.dim} must equal rope_dim {self.rope_dim}")

    def stored(self) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
        """What the cache keeps of a token: R + rope_dim numbers, whatever the number of heads."""
        return {"latent": ((self.latent_rank,), (None,)), "rope": ((self.rope_dim,), (None,))}


@struct.dataclass
class GQAParams:
    query: Param  # [D, H, K]
    key: Param  # [D, G, K]
    value: Param  # [D, G, K]
    out: Param  # [H, K, D]
    query_norm: Param = None  # [K]
    key_norm: Param = None  # [K]
    query_bias: Param = None  # [H, K]
    key_bias: Param = None  # [G, K]
    value_bias: Param = None  # [G, K]
    out_bias: Param = None  # [D]


@struct.dataclass
class MLAParams:
    latent_down: Param  # [D, R + rope]
    latent_norm: Param  # [R]
    latent_up: Param  # [R, H, nope + value]
    out: Param  # [H, value, D]
    query: Param = None  # [D, H, nope + rope], without query_rank
    query_down: Param = None  # [D, query_rank]
    query_norm: Param = None  # [query_rank]
    query_up: Param = None  # [query_rank, H, nope + rope]
    query_down_bias: Param = None  # [query_rank]
    latent_down_bias: Param = None  # [R + rope]
    out_bias: Param = None  # [D]


def attention_specs(cfg: GQAConfig | MLAConfig, width: int) -> GQAParams | MLAParams:
    """Parameters of a self-attention over `width` (D)."""
    fan = FanIn(axes=(-3,))
    if isinstance(cfg, GQAConfig):
        kv = ParamSpec((width, cfg.kv_heads, cfg.head_dim), ("embed", "kv_heads", "head_dim"), fan)
        norm = ParamSpec((cfg.head_dim,), (None,), ones) if cfg.qk_norm else None
        kv_bias = ParamSpec((cfg.kv_heads, cfg.head_dim), ("kv_heads", "head_dim"), zeros) if cfg.bias else None
        return GQAParams(
            query=ParamSpec((width, cfg.heads, cfg.head_dim), ("embed", "heads", "head_dim"), fan),
            key=kv,
            value=kv,
            out=ParamSpec((cfg.heads, cfg.head_dim, width), ("heads", "head_dim", "embed"), FanIn(axes=(-3, -2))),
            query_norm=norm,
            key_norm=norm,
            query_bias=ParamSpec((cfg.heads, cfg.head_dim), ("heads", "head_dim"), zeros) if cfg.bias else None,
            key_bias=kv_bias,
            value_bias=kv_bias,
            out_bias=ParamSpec((width,), ("embed",), zeros) if cfg.out_bias else None,
        )
    heads = cfg.heads, cfg.nope_dim + cfg.rope_dim
    down = cfg.latent_rank + cfg.rope_dim
    common: dict[str, Any] = dict(
        latent_down=ParamSpec((width, down), ("embed", None)),
        latent_norm=ParamSpec((cfg.latent_rank,), (None,), ones),
        latent_up=ParamSpec(
            (cfg.latent_rank, cfg.heads, cfg.nope_dim + cfg.value_dim), (None, "heads", "head_dim"), fan
        ),
        out=ParamSpec((cfg.heads, cfg.value_dim, width), ("heads", "head_dim", "embed"), FanIn(axes=(-3, -2))),
        latent_down_bias=ParamSpec((down,), (None,), zeros) if cfg.bias else None,
        out_bias=ParamSpec((width,), ("embed",), zeros) if cfg.bias else None,
    )
    if cfg.query_rank is None:
        return MLAParams(query=ParamSpec((width, *heads), ("embed", "heads", "head_dim"), fan), **common)
    return MLAParams(
        query_down=ParamSpec((width, cfg.query_rank), ("embed", None)),
        query_norm=ParamSpec((cfg.query_rank,), (None,), ones),
        query_up=ParamSpec((cfg.query_rank, *heads), (None, "heads", "head_dim"), fan),
        query_down_bias=ParamSpec((cfg.query_rank,), (None,), zeros) if cfg.bias else None,
        **common,
    )


@struct.dataclass
class Tokens:
    """What attention knows of the tokens of a call besides their features.

    Attributes:
        positions: position of each token in its sequence.
        cos, sin: of its rotary angles.
        key_positions: positions of the keys of this call's own tokens, -1 for padding.
        segments: which of several packed sequences a token belongs to, or None.
        consecutive: a promise: no negative positions, in every segment (row, without segments) indices plus a
            constant. Calls without a cache then may use kernels that mask by index.
    """

    positions: Param  # [B, S] int32
    cos: Param  # [B, S, half]
    sin: Param  # [B, S, half]
    key_positions: Param  # [B, S] int32
    segments: Param = None  # [B, S] int32
    consecutive: bool = struct.field(pytree_node=False, default=False)


def attend(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G V"],
    *,
    query_positions: Int[Array, "B S"],
    key_positions: Int[Array, "B T"],
    scale: float,
    window: int | None = None,
    query_segments: Int[Array, "B S"] | None = None,
    key_segments: Int[Array, "B T"] | None = None,
    query_block: int = 512,
) -> Float[Array, "B S H V"]:
    """softmax(scale * q k^T + mask) v with scores and softmax in float32, in the dtype of `value`.

    A query sees the keys whose position is in [0, its own], closer than `window`, and of its segment. Where S exceeds
    `query_block`, blocks of queries go one after another, each recomputed in the backward pass: the scores never exist
    beyond [B, H, query_block, T].
    """
    batch, length, heads, size = query.shape
    groups = key.shape[2]

    def block(query, positions, segments):
        grouped = query.reshape(batch, -1, groups, heads // groups, size)
        scores = jnp.einsum("bsgrk,btgk->bgrst", grouped, key, preferred_element_type=jnp.float32) * scale
        distance = positions[:, :, None] - key_positions[:, None, :]
        seen = (distance >= 0) & (key_positions >= 0)[:, None, :]
        if window is not None:
            seen &= distance < window
        if segments is not None and key_segments is not None:
            seen &= segments[:, :, None] == key_segments[:, None, :]
        scores = jnp.where(seen[:, None, None], scores, _MASKED)
        shares = jax.nn.softmax(scores, -1).astype(value.dtype)
        out = jnp.einsum("bgrst,btgv->bsgrv", shares, value, preferred_element_type=jnp.float32)
        return out.reshape(batch, -1, heads, value.shape[-1]).astype(value.dtype)

    if length <= query_block:
        return block(query, query_positions, query_segments)
    blocks = -(-length // query_block)
    missing = blocks * query_block - length

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, blocks, query_block, *x.shape[2:]), 1, 0)

    parts = (split(query), split(query_positions), None if query_segments is None else split(query_segments))
    out = jax.lax.map(jax.checkpoint(lambda part: block(*part)), parts)
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])[:, :length]


def attention(
    params: GQAParams | MLAParams,
    x: Float[Array, "B S D"],
    tokens: Tokens,
    *,
    cfg: GQAConfig | MLAConfig,
    rows: Any = None,
    layer: Any = 0,
    view: View | None = None,
) -> tuple[Float[Array, "B S D"], Any]:
    """Self-attention of the tokens of this call, and of what the cache holds of their sequences.

    Args:
        tokens: positions, rotary angles, padding and segments.
        rows, layer, view: the cache's arrays of this run of layers, which layer this is, and where to write and read
            (`moe.layers.cache.view`); segments are ignored with a cache.

    Returns:
        (output [B, S, D], the cache's arrays with this layer's new rows).
    """
    if isinstance(cfg, GQAConfig) and isinstance(params, GQAParams):
        return _gqa(params, x, tokens, cfg, rows, layer, view)
    if isinstance(cfg, MLAConfig) and isinstance(params, MLAParams):
        return _mla(params, x, tokens, cfg, rows, layer, view)
    raise TypeError(f"attention parameters {type(params).__name__} do not belong to a {type(cfg).__name__}")


def _project(x: jax.Array, w: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """[B, S, D] x [D, ...] -> [B, S, ...]."""
    out = jnp.tensordot(x, w, 1)
    return out if bias is None else out + bias


def _out(params: GQAParams | MLAParams, heads: jax.Array) -> jax.Array:
    out = jnp.einsum("bshk,hkd->bsd", heads, params.out)
    out = out if params.out_bias is None else out + params.out_bias
    return constrain(out, "batch", "seq", "embed")


def _by_position(query, key, value, where, *, scale, window):
    return attend(
        query, key, value, query_positions=where.positions, key_positions=where.key_positions, scale=scale,
        window=window, query_segments=where.segments, key_segments=where.segments,
    )  # fmt: skip


def _heads(query, key, value, tokens: Tokens, view: View | None, *, scale: float, window: int | None = None):
    """Attention to the tokens of this call, by a kernel where there is one, or to what the cache holds."""
    if view is not None:
        return _by_position(
            query, key, value, Where(tokens.positions, view.key_positions), scale=scale, window=window
        )  # fmt: skip
    where = Where(tokens.positions, tokens.key_positions, tokens.segments)
    default = Partial(_by_position, scale=scale, window=window)
    if not tokens.consecutive:
        return default(query, key, value, where)
    return attend_by_index(query, key, value, where, default=default, scale=scale, window=window)


def _gqa(params, x, tokens, cfg, rows, layer, view):
    q = _project(x, params.query, params.query_bias)
    k = _project(x, params.key, params.key_bias)
    v = _project(x, params.value, params.value_bias)
    if cfg.qk_norm:
        q, k = rms_norm(q, params.query_norm, eps=cfg.eps), rms_norm(k, params.key_norm, eps=cfg.eps)
    q, k = (rotate(a, tokens.cos, tokens.sin, interleaved=cfg.rotary.interleaved) for a in (q, k))
    q = constrain(q, "batch", "seq", "heads", "head_dim")
    if view is not None:
        rows = {"key": caching.store(rows["key"], layer, view.write, k),
                "value": caching.store(rows["value"], layer, view.write, v)}  # fmt: skip
        k, v = (caching.load(rows[name], layer, view.read).astype(x.dtype) for name in ("key", "value"))
    heads = _heads(q, k, v, tokens, view, scale=cfg.head_dim**-0.5, window=cfg.window)
    return _out(params, constrain(heads, "batch", "seq", "heads", "head_dim")), rows


def _mla(params, x, tokens, cfg, rows, layer, view):
    low, nope, rope = cfg.latent_rank, cfg.nope_dim, cfg.rope_dim
    if cfg.query_rank is None:
        q = _project(x, params.query)
    else:
        q = _project(x, params.query_down, params.query_down_bias)
        q = _project(rms_norm(q, params.query_norm, eps=cfg.eps), params.query_up)
    if cfg.query_scale != 1:
        q = q * jnp.asarray(cfg.query_scale, q.dtype)
    q = constrain(q, "batch", "seq", "heads", "head_dim")
    down = _project(x, params.latent_down, params.latent_down_bias)
    latent = rms_norm(down[..., :low], params.latent_norm, eps=cfg.eps)
    if cfg.latent_scale != 1:
        latent = latent * jnp.asarray(cfg.latent_scale, latent.dtype)
    turn = dict(interleaved=cfg.rotary.interleaved)
    q_rope = rotate(q[..., nope:], tokens.cos, tokens.sin, **turn)
    k_rope = rotate(down[..., None, low:], tokens.cos, tokens.sin, **turn)[:, :, 0]
    if view is not None:
        rows = {"latent": caching.store(rows["latent"], layer, view.write, latent),
                "rope": caching.store(rows["rope"], layer, view.write, k_rope)}  # fmt: skip
        latent, k_rope = (caching.load(rows[name], layer, view.read).astype(x.dtype) for name in ("latent", "rope"))
    scale = (nope + rope) ** -0.5 * softmax_factor(cfg.rotary)
    key_up, value_up = params.latent_up[..., :nope], params.latent_up[..., nope:]
    # Multiplications per key and head: expanding the latent once for all queries, or meeting it in its own space.
    new, expanded = x.shape[1], nope + cfg.value_dim
    if new * (2 * low + rope) < low * expanded + new * (expanded + rope):
        inner = jnp.einsum("bshn,rhn->bshr", q[..., :nope], key_up)
        joint = jnp.concatenate([latent, k_rope], -1)[:, :, None]
        heads = _heads(jnp.concatenate([inner, q_rope], -1), joint, latent[:, :, None], tokens, view, scale=scale)
        heads = jnp.einsum("bshr,rhv->bshv", heads, value_up)
    else:
        k = jnp.einsum("btr,rhn->bthn", latent, key_up)
        shared = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:3], rope))
        v = jnp.einsum("btr,rhv->bthv", latent, value_up)
        q, k = jnp.concatenate([q[..., :nope], q_rope], -1), jnp.concatenate([k, shared], -1)
        heads = _heads(q, k, v, tokens, view, scale=scale)
    return _out(params, constrain(heads, "batch", "seq", "heads", "head_dim")), rows
