"""Causal self-attention of whole sequences by the kernels of `jax.experimental.pallas.ops`: no scores in memory.

    heads = attend_by_index(query, key, value, where, default=..., scale=K**-0.5, window=None)

TPU: splash attention (Mosaic), forward and backward. CUDA: `gpu.attention.mha` (Triton), where there is no window and
values are as wide as keys. Elsewhere, and where `plan` finds no place for a kernel: `default`, which is the meaning.

These kernels mask by index, the models by position. Within a segment the positions must therefore be the indices plus a
constant; then a key's distance is the same in both. Padding becomes a segment of its own. **Its outputs differ** from
those of `default` (a padded query sees padding instead of its sequence) and mean nothing in either.

The kernel is chosen when a program is lowered (`moe.kernels.platform`), so the gradient is a custom VJP and there is no
forward mode. It keeps q, k, v, the output and [B, H, S] of log-sums. The gradient of `default` computes the scores once
more: on two CPU cores a step of a small model of one to four layers takes 0.95 to 1.0 times as long as with the scores
kept (medians of 25 interleaved pairs), and 0.65 to 1.0 times the temporary memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Float

from moe.kernels.platform import Batched, Flat, Partial, platform_dependent
from moe.params import Param
from moe.sharding import MeshAxes, current_rules, partition_spec

SHORTEST = 128
"""Sequences below it are left to `default`: a kernel's smallest block."""

_PADDING = jnp.iinfo(jnp.int32).min  # segment of the tokens that nobody sees


@struct.dataclass
class Where:
    """Which keys a query sees: those with 0 <= position <= its own, of its segment.

    Attributes:
        positions: of the queries.
        key_positions: of the keys, -1 for padding.
        segments: or None.
    """

    positions: Param  # [B, S] int32
    key_positions: Param  # [B, S] int32
    segments: Param = None  # [B, S] int32


Default = Callable[[jax.Array, jax.Array, jax.Array, Where], jax.Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the kernels run.

    Attributes:
        scale: of the scores.
        window: keys at distance below this are seen; None: all earlier ones.
        masked: there are segments or padding.
        default: the same without a kernel.
        mesh: to split over; None: one device.
        batch, heads: mesh axes that these dimensions are split over.
        repeat: how often each key and value head is repeated so that the heads split over `heads`.
    """

    scale: float
    window: int | None
    masked: bool
    default: Default
    mesh: AbstractMesh | None = None
    batch: MeshAxes = ()
    heads: MeshAxes = ()
    repeat: int = 1


def plan(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    default: Default,
    scale: float,
    window: int | None,
    masked: bool,
) -> Plan | None:
    """The plan for arrays of these shapes, or None where `default` has to serve:

    - fewer than SHORTEST tokens, types other than bfloat16 and float32 or not the same for all three;
    - on a mesh: without rules (`moe.sharding.use_mesh`), with explicit axes, inside a shard_map, with a split sequence
      or head size, or with key/value heads of which neither their number nor the shards divides the other.
    """
    length = query.shape[1]
    if length < SHORTEST or key.shape[1] != length or query.dtype not in (jnp.bfloat16, jnp.float32):
        return None
    if not query.dtype == key.dtype == value.dtype:
        return None
    alone = Plan(scale, None if window is None or window >= length else window, masked, default)
    mesh, rules = jax.sharding.get_abstract_mesh(), current_rules()
    if mesh.empty:
        return alone
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    if mesh.size == 1:
        return alone
    if rules is None:
        return None
    names = ("batch", "seq", "heads", "head_dim")
    spec = partition_spec(names, mesh, rules, kind="activations", shape=query.shape, label="query")
    axes = [(part,) if isinstance(part, str) else part or () for part in (*spec, *(None,) * (4 - len(spec)))]
    shards, groups = math.prod(mesh.shape[axis] for axis in axes[2]), key.shape[2]
    if axes[1] or axes[3] or (groups % shards and shards % groups):
        return None
    repeat = 1 if groups % shards == 0 else shards // groups
    return dataclasses.replace(alone, mesh=mesh, batch=axes[0], heads=axes[2], repeat=repeat)


def attend_by_index(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G V"],
    where: Where,
    *,
    default: Default,
    scale: float,
    window: int | None = None,
) -> Float[Array, "B S H V"]:
    """softmax(scale * q k^T + mask) v, scores and softmax in float32, in the dtype of `value`.

    Args:
        query, key, value: G divides H. Kernels pad S to a multiple of their block, exactly.
        where: positions are indices plus a constant within each segment.
        default: computes the same without a kernel; equal ones share their traces (`moe.kernels.platform.Partial`).
        scale: of the scores.
        window: keys at distance below this are seen; None: all earlier ones.
    """
    masked = where.segments is not None or where.key_positions is not where.positions
    how = plan(query, key, value, default=default, scale=scale, window=window, masked=masked)
    return default(query, key, value, where) if how is None else _attend(how, query, key, value, where)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: Plan, query: jax.Array, key: jax.Array, value: jax.Array, where: Where) -> jax.Array:
    return _choose(how, "value", query, key, value, where)


def _forward(how, query, key, value, where):
    out, total = _choose(how, "forward", query, key, value, where)
    return out, (query, key, value, where, out, total)


_attend.defvjp(_forward, lambda how, saved, grad: (*_choose(how, "backward", *saved, grad), None))


def _choose(how: Plan, name: str, query: jax.Array, key: jax.Array, value: jax.Array, *rest: Any) -> Any:
    """One of the three functions, by the platform lowered for."""
    default = Partial(_DEFAULT[name], default=how.default)
    kernels = {"tpu": _SPLASH[name]}
    narrow = key.shape[-1] == value.shape[-1] <= 128 and query.dtype == jnp.bfloat16  # beyond, registers spill
    if how.window is None and narrow:
        kernels["cuda"] = _TRITON[name]
    kernels = {
        platform: Partial(_kernel, local=f, default=default, how=how, name=name) for platform, f in kernels.items()
    }
    return platform_dependent(query, key, value, *rest, default=default, **kernels)


def _default_value(query, key, value, where, *, default):
    return default(query, key, value, where)


def _default_forward(query, key, value, where, *, default):
    return default(query, key, value, where), jnp.zeros((query.shape[0], query.shape[2], query.shape[1]), jnp.float32)


def _default_backward(query, key, value, where, out, total, grad, *, default):
    return jax.vjp(lambda q, k, v: default(q, k, v, where), query, key, value)[1](grad)


_DEFAULT = {"value": _default_value, "forward": _default_forward, "backward": _default_backward}


# --------------------------------------------------------------------------------------------------
# Around the kernels: devices, layout, padding


def _kernel(*args, local, default, how: Plan, name: str):
    """`local` on every device's rows and heads."""
    if how.mesh is not None:
        return _sharded(*args, local=local, how=how, name=name)
    flat, tree = jax.tree.flatten(args)
    kernel = Flat(Partial(_sharded, local=local, how=how, name=name), tree)
    out = _unless_split.bind(*flat, kernel=kernel, default=Flat(default, tree))
    return out[0] if name == "value" else tuple(out)


# Without a mesh in force nobody knows how a program over several devices splits its arrays. XLA cannot split a kernel:
# on TPU that is an error of Pallas, on CUDA the operands would be gathered.
_unless_split = Primitive("kernel_unless_split")
_unless_split.multiple_results = True
_unless_split.def_abstract_eval(lambda *avals, kernel, default: jax.make_jaxpr(default)(*avals).out_avals)


def _batch_unless_split(axis, flat, dims, **functions):
    out = _unless_split.bind(*flat, **{name: Batched(f, tuple(dims), axis) for name, f in functions.items()})
    return out, [0] * len(out)


def _lower_unless_split(ctx, *operands, kernel, default):
    function = kernel if getattr(ctx.module_context.axis_context, "num_devices", 0) == 1 else default
    return mlir.lower_fun(lambda *flat: jax.tree.leaves(function(*flat)))(ctx, *operands)


batching.fancy_primitive_batchers[_unless_split] = _batch_unless_split
mlir.register_lowering(_unless_split, _lower_unless_split)


def _sharded(query, key, value, where, *rest, local, how: Plan, name: str) -> Any:
    split = PartitionSpec(how.batch or None, None, how.heads or None)
    totals = PartitionSpec(how.batch or None, how.heads or None)
    function = functools.partial(local, how)
    if how.repeat > 1:
        key, value = (jnp.repeat(x, how.repeat, 2) for x in (key, value))
    if how.mesh is not None:
        function = jax.shard_map(
            function,
            mesh=how.mesh,
            in_specs=(split, split, split, PartitionSpec(how.batch or None), *(split, totals, split)[: len(rest)]),
            out_specs={"value": split, "forward": (split, totals), "backward": (split, split, split)}[name],
            check_vma=False,
        )
    out = function(query, key, value, _segments(where) if how.masked else None, *rest)
    if name != "backward" or how.repeat == 1:
        return out
    dq, dk, dv = out
    return dq, _ungroup(dk, how.repeat), _ungroup(dv, how.repeat)


def _ungroup(x: jax.Array, repeat: int) -> jax.Array:
    """Gradient of jnp.repeat(., repeat, 2)."""
    return x.reshape(*x.shape[:2], -1, repeat, x.shape[-1]).sum(3, dtype=jnp.float32).astype(x.dtype)


def _segments(where: Where) -> jax.Array:
    inner = jnp.zeros_like(where.key_positions) if where.segments is None else where.segments
    return jnp.where(where.key_positions < 0, _PADDING, inner.astype(jnp.int32))


def block_size(length: int) -> int:
    """Tokens of a block: up to 512 one block, beyond that the size of least padding, the largest of equals."""
    if length <= 512:
        return -(-length // 128) * 128
    return min((512, 384, 256), key=lambda size: -(-length // size) * size)


def _pad(x: jax.Array, axis: int, value: int = 0) -> jax.Array:
    length = x.shape[axis]
    size = block_size(length)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -length % size)
    return jnp.pad(x, widths, constant_values=value)


# --------------------------------------------------------------------------------------------------
# TPU


def _splash_kernel(how: Plan, heads: int, length: int, *, save: bool, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    size = block_size(length)
    shape = (length, length)
    mask = masks.CausalMask(shape) if how.window is None else masks.LocalMask(shape, (how.window - 1, 0), 0)
    blocks = kernel.BlockSizes(*[size] * 8)  # pyright: ignore[reportArgumentType]
    made = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1, save_residuals=save,
        interpret=interpret,
    )  # fmt: skip
    return kernel, made


def _splash_operands(how: Plan, query, key, value, ids):
    """Heads first and padded; the kernel has no scale of its own."""
    query = (query.astype(jnp.float32) * how.scale).astype(query.dtype)
    q, k, v = (jnp.swapaxes(_pad(x, 1), 1, 2) for x in (query, key, value))
    return q, k, v, None if ids is None else _pad(ids, 1, _PADDING)


def _splash_forward(how: Plan, query, key, value, ids, *, save: bool = True, interpret: bool = False):
    length = query.shape[1]
    q, k, v, ids = _splash_operands(how, query, key, value, ids)
    kernel, made = _splash_kernel(how, q.shape[1], q.shape[2], save=save, interpret=interpret)

    def one(q, k, v, ids):
        return made(q, k, v, None if ids is None else kernel.SegmentIds(ids, ids))

    out: Any = jax.vmap(one)(q, k, v, ids)
    out, total = (out[0], out[1][0]) if save else (out, None)
    out = jnp.swapaxes(out, 1, 2)[:, :length]
    return out if total is None else (out, total[..., :length])


def _splash_backward(how: Plan, query, key, value, ids, out, total, grad, *, interpret: bool = False):
    """By the kernel's own backward. It is not public, but the public gradient would run the forward again."""
    length = query.shape[1]
    q, k, v, ids = _splash_operands(how, query, key, value, ids)
    out, grad = (jnp.swapaxes(_pad(x, 1), 1, 2) for x in (out, grad))
    kernel, made = _splash_kernel(how, q.shape[1], q.shape[2], save=False, interpret=interpret)
    same = ("save_residuals", "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function")
    static = [made.kwargs[name] for name in (*same, "attn_logits_soft_cap", "interpret")]

    def one(q, k, v, ids, out, total, grad):
        ids = None if ids is None else kernel.SegmentIds(ids, ids)
        saved = (q, k, v, ids, None, out, total, made.dq_mask_info, made.dkv_mask_info)
        return kernel._splash_attention_bwd(*static, saved, grad)[3:6]

    grads = jax.vmap(one)(q, k, v, ids, out, _pad(total, 2), grad)
    dq, dk, dv = (jnp.swapaxes(x, 1, 2)[:, :length] for x in grads)
    return (dq.astype(jnp.float32) * how.scale).astype(dq.dtype), dk, dv


# --------------------------------------------------------------------------------------------------
# CUDA

_LOG2 = math.log(2)


def _triton_options(size: int, interpret: bool) -> dict[str, Any]:
    """For heads of `size`. These blocks compile for sm_90 without spilled registers."""
    from jax.experimental.pallas.ops.gpu import attention as kernel

    names = ("q_dkv", "kv_dkv", "q_dq", "kv_dq")
    blocks = kernel.BlockSizes(128, 64, **{f"block_{name}": 64 if size <= 64 else 32 for name in names})
    return dict(block_sizes=blocks, backward_pass_impl="triton", num_warps=None, num_stages=2, grid=None,
                interpret=interpret, debug=False)  # fmt: skip


def _triton_operands(query, key, value, ids):
    """Padded; the kernel has as many key and value heads as query heads."""
    repeat = query.shape[2] // key.shape[2]
    q, k, v = (_pad(x, 1) for x in (query, *(jnp.repeat(x, repeat, 2) for x in (key, value))))
    return q, k, v, None if ids is None else _pad(ids, 1, _PADDING)


def _triton_forward(how: Plan, query, key, value, ids, *, save: bool = True, interpret: bool = False):
    from jax.experimental.pallas.ops.gpu import attention as kernel

    length = query.shape[1]
    q, k, v, ids = _triton_operands(query, key, value, ids)
    options = _triton_options(q.shape[-1], interpret)
    out: Any = kernel.mha(q, k, v, ids, sm_scale=how.scale, causal=True, return_residuals=save, **options)
    return (out[0][:, :length], out[1][..., :length] * _LOG2) if save else out[:, :length]


def _triton_backward(how: Plan, query, key, value, ids, out, total, grad, *, interpret: bool = False):
    """By the kernel's own backward, as on TPU."""
    from jax.experimental.pallas.ops.gpu import attention as kernel

    length = query.shape[1]
    q, k, v, ids = _triton_operands(query, key, value, ids)
    saved = (q, k, v, ids, _pad(out, 1), _pad(total / _LOG2, 2))
    options = _triton_options(q.shape[-1], interpret)
    dq, dk, dv, _ = kernel._mha_backward(
        how.scale, True, return_residuals=False, **options, res=saved, do=_pad(grad, 1)
    )
    dq, dk, dv = (x[:, :length] for x in (dq, dk, dv))
    repeat = query.shape[2] // key.shape[2]
    return dq, _ungroup(dk, repeat), _ungroup(dv, repeat)


_SPLASH = {"value": Partial(_splash_forward, save=False), "forward": _splash_forward, "backward": _splash_backward}
_TRITON = {"value": Partial(_triton_forward, save=False), "forward": _triton_forward, "backward": _triton_backward}
