"""Expert parallelism: every rank of a mesh axis holds E / R of the experts, and tokens travel to them.

    with use_mesh(mesh, FSDP_EP):
        y = expert_layer(params, x, routing.index, routing.weights)       # under any rules: what a model calls
    y, load = experts_parallel(params, x, index, weights, axis="expert")  # inside a shard_map of your own

Three ways to travel; R ranks, T tokens a rank, K slots a token, one meaning (that of `moe.experts.experts`):

    all_gather         every rank sees all R T tokens and computes what its experts add; the sums are reduce-scattered.
                       (R - 1) T rows in and out whatever K is: least traffic where R <= K, and fewest messages.
    all_to_all         one bucket of fixed size for each destination: (R - 1) / R T K rows, times the safety factor.
    ragged_all_to_all  rows without padding between the destinations. XLA:CPU lacks this collective (jax issue 34755);
                       lowered for CPU, an all-gather that obeys the same arguments stands in for it.

**Bounded and dropless.** A rank has room for `safety_factor` times the rows it may expect. Where the routing is so
skewed that some rank needs more, the same exchange is repeated through the same room until every row had its turn:
nothing is dropped, and no larger buffer exists. All ranks of the axis know the number of rounds, so the collectives in
the loop match; ranks that differ in another axis may make other numbers of turns.

**Grouped routing needs no bound.** With selection "per_group" (Intern-S1-Pro, 2603.25040, section 2.2 of our notes)
slot k stays in its group of experts. Given `n_group`, a multiple of R, every rank gets T K rows at most, exactly T K
without padding: shapes are static and there is no loop.

**Slots without an expert** (an index outside [0, E): zero, copy and constant slots, padding) are never sent and take up
no room. The weight of a slot travels with its row and is applied by the expert: the backward needs no output rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from moe.experts.dispatch import Dispatch, combine_rows, dispatch, gather_rows
from moe.experts.mlp import ExpertParams, check_experts, expert_specs, experts
from moe.experts.quantized import QuantizedExpertParams, dequantize_experts, quantized_experts
from moe.kernels.grouped_matmul import align_varying
from moe.kernels.grouped_matmul.blocked import varying_like
from moe.params import Param
from moe.sharding import AxisRules, MeshAxes, current_rules, partition_spec

T = TypeVar("T")
AnyExperts: TypeAlias = ExpertParams | QuantizedExpertParams

METHODS = ("all_gather", "all_to_all", "ragged_all_to_all", "replicated")


@struct.dataclass
class ExpertLoad:
    """What a device had to do, for a log: rows.max() / rows.mean() is the imbalance, rounds > 1 the overflow.

    Attributes:
        rows: rows of this device's experts.
        rounds: 1, or more where a rank had more rows than room; above 1 on many steps: raise the safety factor.
    """

    rows: Param  # [] int32; [devices] from expert_layer
    rounds: Param  # the same


def _experts(params: AnyExperts, *tokens: jax.Array, recompute: bool, **options: Any) -> jax.Array:
    """Experts of either kind; tokens are x, index and weights."""
    if isinstance(params, QuantizedExpertParams):
        return quantized_experts(params, *tokens, **options)
    return experts(params, *tokens, recompute=recompute, **options)


@dataclasses.dataclass(frozen=True)
class _How:
    """What is known before tracing. `room`: rows a rank, or for all_to_all rows a bucket, takes in one round."""

    method: str
    axis: MeshAxes
    ranks: int
    room: int
    bounded: bool  # False: the room suffices for any routing
    activation: str
    recompute: bool
    implementation: str | None

    def experts(self, params: AnyExperts, *tokens: jax.Array) -> jax.Array:
        return _experts(
            params,
            *tokens,
            activation=self.activation,
            recompute=self.recompute,
            implementation=self.implementation,
        )


@struct.dataclass
class _Plan:
    """Who sends what, in integers. `counts` is None where nothing is sent."""

    sorted: Dispatch  # of the tokens at hand, by expert
    index: Param  # [T, K] their experts; local numbers where nothing is sent
    counts: Param  # [R, E] rows of each rank for each expert
    rounds: Param  # [] int32


# --------------------------------------------------------------------------------------------------
# One round


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _return_rows(y: jax.Array, window: Dispatch, top_k: int) -> jax.Array:
    """The transpose of `gather_rows`: [B, D] -> [T, D], the sum of each token's rows."""
    return combine_rows(y, None, window, top_k)


def _return_rows_backward(top_k, window, grad):
    there = (window.order < window.inverse.size)[:, None]
    return jnp.where(there, jnp.take(grad, window.order // top_k, axis=0, mode="clip"), 0), None


_return_rows.defvjp(lambda y, window, top_k: (_return_rows(y, window, top_k), window), _return_rows_backward)


def _window(plan: _Plan, at: jax.Array, row: jax.Array) -> Dispatch:
    """The pairs that take part in a round, as a Dispatch that need not be a permutation.

    Args:
        at: [B] the sorted position that each row of the buffer holds, M or more where empty.
        row: [M] the row of the buffer that holds each pair, B or more for those elsewhere.
    """
    order = jnp.take(plan.sorted.order, at, mode="fill", fill_value=plan.sorted.order.size)
    return Dispatch(order=order, inverse=row, sizes=jnp.full((1,), at.size, jnp.int32))


def _exclusive(sizes: jax.Array, axis: int = 0) -> jax.Array:
    return jnp.cumsum(sizes, axis) - sizes


def _identity(rows: jax.Array) -> jax.Array:
    return rows


def _local_round(how: _How, turn: jax.Array | int, plan: _Plan):
    total = plan.sorted.sizes.sum()
    at = turn * how.room + jnp.arange(how.room)
    at = jnp.where(at < total, at, plan.index.size)
    row = plan.sorted.inverse - turn * how.room
    row = jnp.where((row >= 0) & (plan.sorted.inverse < total), row, how.room)
    window = _window(plan, at, row)
    expert = jnp.take(plan.index.reshape(-1), window.order, mode="fill", fill_value=plan.sorted.sizes.size)
    return window, expert, _identity, _identity


def _bucket_round(how: _How, turn: jax.Array | int, plan: _Plan):
    ranks, room = how.ranks, how.room
    local = plan.counts.shape[1] // ranks
    mine = plan.sorted.sizes.reshape(ranks, local).sum(1)  # rows that this rank has for each destination
    base = _exclusive(mine)
    within = turn * room + jnp.arange(room)
    at = jnp.where(within < mine[:, None], base[:, None] + within, plan.index.size).reshape(-1)
    to = jnp.clip(plan.index.reshape(-1) // local, 0, ranks - 1)
    row = plan.sorted.inverse - base[to] - turn * room
    here = (row >= 0) & (row < room) & (plan.sorted.inverse < mine.sum())
    window = _window(plan, at, jnp.where(here, to * room + row, ranks * room))
    # Rows of a bucket are sorted by expert, so the counts tell whose they are.
    ends = jnp.cumsum(_to_me(how, plan.counts), 1)  # [R, E / R]
    expert = (within[:, None] >= ends[:, None]).sum(-1, dtype=jnp.int32).reshape(-1)
    exchange = functools.partial(lax.all_to_all, axis_name=how.axis, split_axis=0, concat_axis=0, tiled=True)
    return window, expert, exchange, exchange


def _to_me(how: _How, counts: jax.Array) -> jax.Array:
    """[R, E] -> [R, E / R]: the part for this rank's experts."""
    return counts.reshape(how.ranks, how.ranks, -1)[:, lax.axis_index(how.axis)]


def _ragged_round(how: _How, turn: jax.Array | int, plan: _Plan):
    me, local = lax.axis_index(how.axis), plan.counts.shape[1] // how.ranks
    sent = plan.counts.reshape(how.ranks, how.ranks, local).sum(2)  # [from, to]
    start = _exclusive(sent)  # where a sender's rows stand among all of a destination
    low = jnp.clip(start, turn * how.room, (turn + 1) * how.room)
    size = jnp.clip(start + sent, turn * how.room, (turn + 1) * how.room) - low
    out = _exclusive(sent, 1) + low - start  # the slice's place with its sender, sorted by expert
    into = low - turn * how.room  # and in the destination's buffer
    there = _Slices(out[me], size[me], into[me], size[:, me])
    back = _Slices(into[:, me], size[:, me], out[:, me], size[me])
    live = plan.sorted.sizes.sum()
    at = jnp.arange(plan.index.size)
    window = _window(
        plan,
        jnp.where(at < live, at, plan.index.size),
        jnp.where(plan.sorted.inverse < live, plan.sorted.inverse, plan.index.size),
    )
    ends = jnp.cumsum(_to_me(how, plan.counts).reshape(-1))  # by sender, then expert
    place = turn * how.room + jnp.arange(how.room)
    segment = (place[:, None] >= ends).sum(-1, dtype=jnp.int32)
    expert = jnp.where(place < ends[-1], segment % local, local)
    pairs, room, axis = plan.index.size, how.room, how.axis
    return (
        window,
        expert,
        lambda rows: _exchange(rows, there, back, pairs, room, axis),
        lambda rows: _exchange(rows, back, there, room, pairs, axis),
    )


_ROUNDS = {
    "all_gather": _local_round,
    "replicated": _local_round,
    "all_to_all": _bucket_round,
    "ragged_all_to_all": _ragged_round,
}


def _round(
    how: _How, turn: jax.Array | int, params: AnyExperts, x: jax.Array, weights: jax.Array, plan: _Plan
) -> jax.Array:
    """What the pairs whose turn it is add to the tokens at hand; [T, D], differentiable in params, x and weights."""
    window, expert, send, receive = _ROUNDS[how.method](how, turn, plan)
    top_k = weights.shape[1]
    rows = send(gather_rows(x, window, top_k))
    scale = send(gather_rows(weights.reshape(-1, 1), window, 1))
    y = how.experts(params, rows, expert[:, None], scale)
    return _return_rows(receive(y), window, top_k)


# --------------------------------------------------------------------------------------------------
# The ragged exchange


@struct.dataclass
class _Slices:
    """Arguments of lax.ragged_all_to_all, [R] int32 each: my slice for each rank, its place there, what I receive."""

    source: Param
    sent: Param
    target: Param
    received: Param


def _ragged(rows: jax.Array, out: jax.Array, source, sent, target, received, *, axis: MeshAxes) -> jax.Array:
    return lax.ragged_all_to_all(rows, out, source, sent, target, received, axis_name=axis)


def _gathered_ragged(rows: jax.Array, out: jax.Array, source, sent, target, received, *, axis: MeshAxes) -> jax.Array:
    """lax.ragged_all_to_all by an all-gather of everybody's rows. Obeys the senders' arguments, as the original does,
    and answers with NaN where a receiver expects another number of rows: the original is then undefined.
    """
    me = lax.axis_index(axis)
    everyone = lax.all_gather(rows, axis)  # [R, N, D]
    source, sent, target = lax.all_gather(jnp.stack([source, sent, target]), axis)[:, :, me].T
    place = jnp.arange(len(out))[:, None]
    inside = (place >= target) & (place < target + sent)
    sender = jnp.argmax(inside, 1)
    picked = everyone[sender, jnp.clip(source[sender] + place[:, 0] - target[sender], 0, len(rows) - 1)]
    return jnp.where((sent == received).all(), jnp.where(inside.any(1)[:, None], picked, out), jnp.nan)


def _exchange_once(rows: jax.Array, slices: _Slices, count: int, axis: MeshAxes) -> jax.Array:
    out = varying_like(jnp.zeros((count, rows.shape[1]), rows.dtype), rows)
    return lax.platform_dependent(
        rows,
        out,
        slices.source,
        slices.sent,
        slices.target,
        slices.received,
        cpu=functools.partial(_gathered_ragged, axis=axis),
        default=functools.partial(_ragged, axis=axis),
    )


# JAX's own transpose would exchange the offsets once more; here both directions are known beforehand.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _exchange(rows: jax.Array, there: _Slices, back: _Slices, before: int, after: int, axis: MeshAxes) -> jax.Array:
    """[before, D] -> [after, D], zeros where nothing arrives. `back` undoes `there` and is the way of the gradient."""
    return _exchange_once(rows, there, after, axis)


_exchange.defvjp(
    lambda rows, there, back, before, after, axis: (_exchange(rows, there, back, before, after, axis), back),
    lambda before, after, axis, back, grad: (_exchange_once(grad, back, before, axis), None, None),
)


# --------------------------------------------------------------------------------------------------
# All rounds


def _in_rounds(how: _How, plan: _Plan, one: Callable[[jax.Array | int], T]) -> T:
    """one(0) + one(1) + ..., as many as the plan says. Nearly always one is enough: it stands before the loop, where
    XLA can overlap its exchange with other work, and the loop makes no turn.
    """
    first = one(0)
    if not how.bounded:
        return first
    return lax.fori_loop(1, plan.rounds, lambda turn, total: jax.tree.map(jnp.add, total, one(turn)), first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounds(how: _How, params: AnyExperts, x: jax.Array, weights: jax.Array, plan: _Plan) -> jax.Array:
    """A loop of unknown length has no reverse derivative of its own; and the rows received are not kept for it."""
    return _in_rounds(how, plan, lambda turn: _round(how, turn, params, x, weights, plan))


def _rounds_backward(how, saved, grad):
    params, x, weights, plan = saved

    def one(turn):
        _, pull = jax.vjp(lambda p, x, w: _round(how, turn, p, x, w, plan), params, x, weights)
        return pull(grad)

    return (*_in_rounds(how, plan, one), None)


_rounds.defvjp(
    lambda how, params, x, weights, plan: (_rounds(how, params, x, weights, plan), (params, x, weights, plan)),
    _rounds_backward,
)


def _room(expected: float, safety_factor: float, most: int) -> int:
    """Rows of room where `expected` come. Four standard deviations of a multinomial's count are added: 2 % at 32,768
    rows, but what keeps a small batch of decoding from overflowing all the time. A multiple of 8, unless `most` is
    enough for any routing.
    """
    rows = safety_factor * expected
    return min(most, 8 * math.ceil((rows + 4 * math.sqrt(rows)) / 8))


# --------------------------------------------------------------------------------------------------
# Public


def experts_parallel(
    params: AnyExperts,
    x: Float[Array, "T D"],
    index: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    axis: str | MeshAxes = "expert",
    method: str = "all_gather",
    n_group: int = 1,
    safety_factor: float = 1.25,
    embed_axes: MeshAxes = (),
    activation: str = "silu",
    recompute: bool = True,
    implementation: str | None = None,
) -> tuple[Float[Array, "T D"], ExpertLoad]:
    """`moe.experts.experts` with the experts spread over a mesh axis. Call it inside shard_map, manual over `axis`.

    The backward sends tokens (and gathers weights over `embed_axes`) again instead of keeping what was received.

    Args:
        params: this rank's share, [E / R, 2, D, F] and [E / R, F, D]; rank r holds experts r E / R and on. Where the
            width F is split too (a tensor axis), so that this is a part of it, the result is a partial sum: psum it.
            QuantizedExpertParams are split over experts only.
        x: this rank's tokens, other ones on every rank ("replicated": the same on all).
        index: global expert numbers in [0, E); any other number means no expert.
        weights: float32.
        axis: the mesh axis, or axes, that the experts are split over.
        method: "all_gather", "all_to_all", "ragged_all_to_all", see the module; or "replicated", for tokens that all
            ranks hold (a batch too small to split): no exchange, and the result is a partial sum over `axis`: psum it.
        n_group: groups of consecutive experts that the slots of a token keep to, slot k to group k // (K / n_group), as
            selection "per_group" does. 1 promises nothing. A token that breaks the promise comes out as NaN.
        safety_factor: room for rows, over those expected if every slot has an expert and all ranks get alike; lower it
            where parameter-free slots are known to win their share. Costs speed when too small, never a row.
        embed_axes: mesh axes that dimension D of the weights is split over (FSDP); they are gathered here.
        activation, implementation: as in `experts`.
        recompute: gate and up are computed again in the backward, as in `experts`; with it goes the gathering of x and
            of weights in the backward. False keeps both.

    Returns:
        The output [T, D] of this rank's tokens in the dtype of x, and what this device had to do.

    Raises:
        ValueError: operands that do not fit, an unknown method, n_group that does not divide, a safety factor that is
            not positive.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(map(repr, METHODS))}")
    if not 0 < safety_factor < math.inf:
        raise ValueError(f"safety_factor {safety_factor} must be positive and finite; 1.25 is a fair start")
    axis = (axis,) if isinstance(axis, str) else tuple(axis)
    ranks = math.prod(lax.axis_size(name) for name in axis)
    _check_operands(params, x, index, weights, math.prod(lax.axis_size(name) for name in embed_axes))
    local, top_k = _count(params), index.shape[1]
    _check_groups(n_group, ranks, top_k, local * ranks)
    leaves, tree = jax.tree.flatten((params, x, weights, index))
    params, x, weights, index = jax.tree.unflatten(tree, align_varying(*leaves))
    index, weights = _keep_to_groups(index, weights, local * ranks, n_group)

    me, sends = lax.axis_index(axis), method in ("all_to_all", "ragged_all_to_all")
    width = top_k * max(1, n_group // ranks) // n_group  # slots of a token that can have an expert of one rank
    tokens = len(x) if method in ("all_to_all", "replicated") else len(x) * ranks
    most = tokens * width
    room = _room(tokens * top_k / ranks, safety_factor, most)  # of a bucket for all_to_all, else of a rank
    how = _How(method, axis, ranks, room, room < most, activation, recompute, implementation)

    def gather(a: jax.Array) -> jax.Array:
        return lax.all_gather(a, axis, tiled=True) if method == "all_gather" else a

    def my_slots(a: jax.Array) -> jax.Array:
        return a if sends else lax.dynamic_slice_in_dim(a, me * n_group // ranks * (top_k // n_group), width, 1)

    index = my_slots(gather(index))
    if not sends:
        index = jnp.where((index >= 0) & (index // local == me), index % local, local)
    plan, load = _plan(how, index, local)

    def add_up(params: AnyExperts, x: jax.Array, weights: jax.Array) -> Any:
        params, x, weights = _gather_weights(params, embed_axes), gather(x), my_slots(gather(weights))
        # Where the room holds any routing and nothing is sent, the sorting inside `experts` is dispatch enough.
        if plan is None:
            y = how.experts(params, x, index, weights)
        else:
            y = _rounds(how, params, x, weights, plan)
        return lax.psum_scatter(y, axis, tiled=True) if method == "all_gather" else y

    return (jax.checkpoint(add_up) if recompute else add_up)(params, x, weights), load


def _count(params: AnyExperts) -> int:
    return jax.tree.leaves(params)[0].shape[0]


def _gather_weights(params: AnyExperts, embed_axes: MeshAxes) -> AnyExperts:
    if not embed_axes:
        return params
    if isinstance(params, QuantizedExpertParams):
        raise ValueError(f"quantised experts are split over experts only, not over {embed_axes}; leave embed_axes out")
    gather = functools.partial(lax.all_gather, axis_name=embed_axes, axis=2, tiled=True)
    return ExpertParams(gate_up=gather(params.gate_up), down=gather(params.down))  # [E, 2, D, F], [E, F, D]


def _check_operands(params: AnyExperts, x: jax.Array, index: jax.Array, weights: jax.Array, parts: int) -> None:
    """`check_experts` with the weights as they will be once gathered from `parts` parts."""
    if isinstance(params, QuantizedExpertParams):  # never in parts
        whole = jax.eval_shape(functools.partial(dequantize_experts, dtype=x.dtype), params)
        return check_experts(whole, x, index, weights)
    gate_up, down = params.gate_up, params.down
    if gate_up.ndim == 4 and down.ndim == 3:
        gate_up, down = (
            jax.ShapeDtypeStruct((*w.shape[:2], w.shape[2] * parts, *w.shape[3:]), w.dtype) for w in (gate_up, down)
        )
    check_experts(ExpertParams(gate_up, down), x, index, weights)


def _check_groups(n_group: int, ranks: int, top_k: int, experts: int) -> None:
    if n_group < 1 or top_k % n_group or experts % n_group:
        raise ValueError(f"n_group {n_group} must divide the {top_k} slots of a token and the {experts} experts")
    if n_group % ranks and ranks % n_group:
        raise ValueError(
            f"n_group {n_group} and the {ranks} ranks of the expert axis must divide one another, so that no group "
            "straddles ranks; change the mesh, or leave n_group at 1"
        )


def _keep_to_groups(index: jax.Array, weights: jax.Array, experts: int, n_group: int) -> tuple[jax.Array, jax.Array]:
    """A slot outside its group goes to its group's first expert with weight NaN: loud, where it would else vanish."""
    if n_group == 1:
        return index, weights
    size = experts // n_group
    group = jnp.arange(index.shape[1], dtype=index.dtype) // (index.shape[1] // n_group)
    strays = (index >= 0) & (index < experts) & (index // size != group)
    return jnp.where(strays, group * size, index), jnp.where(strays, jnp.nan, weights)


def _plan(how: _How, index: jax.Array, local: int) -> tuple[_Plan | None, ExpertLoad]:
    """The plan of the exchange, None where `experts` alone does it; and the load of this device."""
    if how.method in ("all_gather", "replicated"):
        rows = (index < local).sum(dtype=jnp.int32)
        rounds = jnp.maximum(1, -(-rows // how.room))
        plan = _Plan(dispatch(index, local), index, None, rounds) if how.bounded else None
        return plan, ExpertLoad(rows, rounds)
    pairs = dispatch(index, local * how.ranks)
    counts = lax.all_gather(pairs.sizes, how.axis)
    sent = counts.reshape(how.ranks, how.ranks, local).sum(2)
    fullest = sent.max() if how.method == "all_to_all" else sent.sum(0).max()
    rounds = jnp.maximum(1, -(-fullest // how.room))
    return _Plan(pairs, index, counts, rounds), ExpertLoad(_to_me(how, counts).sum(dtype=jnp.int32), rounds)


@dataclasses.dataclass(frozen=True)
class _Placement:
    """Over which mesh axes what is split."""

    tokens: tuple[MeshAxes, ...]  # of every axis of x but the last
    params: AnyExperts  # of PartitionSpec
    experts: MeshAxes
    embed: MeshAxes
    hidden: MeshAxes
    replicated: bool  # the ranks of `experts` hold the same tokens


def _placement(params: AnyExperts, shape: tuple[int, ...], mesh: AbstractMesh, rules: AxisRules) -> _Placement:
    def split(axes: tuple[str | None, ...], **options) -> tuple[MeshAxes, ...]:
        spec = partition_spec(axes, mesh, rules, **options)
        each = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
        return (*each, *[()] * (len(axes) - len(each)))

    manual = [axis for axis in dict(rules.weights)["expert"] if axis in mesh.manual_axes and mesh.shape[axis] > 1]
    if manual:
        raise ValueError(f"mesh axis {manual[0]!r}, which splits the experts, is manual here; call experts_parallel")
    quantized = isinstance(params, QuantizedExpertParams)
    if quantized:
        experts_, _, hidden, width = params.gate_up.values.shape
    else:
        experts_, _, width, hidden = params.gate_up.shape
    specs = expert_specs(experts_, width, hidden)
    gate_up = split(specs.gate_up.axes, shape=specs.gate_up.shape, label="gate_up")
    down = split(specs.down.axes, shape=specs.down.shape, label="down")
    if quantized:  # a part of a matrix would need a part of a block's scale: whole matrices come in
        gate_up, down = (axes[:1] + ((),) * len(axes[1:]) for axes in (gate_up, down))
    lead = ("batch", "seq", *[None] * len(shape))[: len(shape) - 1]
    tokens = split(lead, kind="activations", shape=shape[:-1], label="x")
    # A rank of the tensor axis holds a part of every expert: it needs the tokens of all of them.
    tokens = tuple(tuple(axis for axis in axes if axis not in gate_up[3]) for axes in tokens)
    shared = [axis for axis in gate_up[0] if not any(axis in axes for axes in tokens)]
    if shared and len(shared) < len(gate_up[0]):
        raise ValueError(
            f"{rules.name} splits the experts over {gate_up[0]} and tokens over {tokens}: split them over all of "
            "these axes or none"
        )
    return _Placement(
        tokens,
        jax.tree.map(lambda _: _spec(gate_up[:1]), params)
        if quantized
        else ExpertParams(gate_up=_spec(gate_up), down=_spec(down)),
        experts=gate_up[0],
        embed=gate_up[2],
        hidden=gate_up[3],
        replicated=bool(shared),
    )


def _spec(axes: tuple[MeshAxes, ...]) -> PartitionSpec:
    return PartitionSpec(*[each or None for each in axes])


def expert_layer(
    params: AnyExperts,
    x: Float[Array, "*b D"],
    index: Int[Array, "*b K"],
    weights: Float[Array, "*b K"],
    *,
    method: str | None = None,
    n_group: int = 1,
    safety_factor: float = 1.25,
    activation: str = "silu",
    recompute: bool = True,
    implementation: str | None = None,
    with_load: bool = False,
) -> Any:
    """`moe.experts.experts` under the mesh and the rules in context (`moe.sharding.use_mesh`); what a model calls.

    Each device sorts and dispatches its own tokens. Weights split over `embed` (FSDP) are gathered for the layer, and
    again in its backward; experts split over a mesh axis stay where they are and tokens travel (`experts_parallel`);
    what the parts of an expert split over `mlp` (tensor) put out is summed. Without mesh or rules this is `experts`.
    Experts in FP8 run `quantized_experts`; they are gathered whole over all axes but those that split the experts.

    Args:
        params: global arrays, placed by `expert_specs` (`quantize_specs`) and the rules.
        x: [B, S, D], [B, D] or more axes; the first is "batch", the second "seq".
        index, weights: likewise; see `experts`.
        method: of `experts_parallel`. None takes all_gather up to K ranks (then it moves fewest bytes), all_to_all
            beyond. Without effect where no axis splits the experts, or where its ranks hold the same tokens (rules
            whose "batch" leaves the expert axis out, for batches too small to split).
        n_group, safety_factor, recompute: of `experts_parallel`.
        activation, implementation: of `experts` or `quantized_experts`.
        with_load: return (output, ExpertLoad) with arrays [devices], in the order of the mesh.

    Returns:
        The output, in the shape and dtype of x; with_load: and the load.

    Raises:
        ValueError: what `experts_parallel` and `partition_spec` raise; experts split over an axis that is manual here.
    """
    if method is not None and method not in METHODS[:3]:
        raise ValueError(f"method {method!r} is not one of {', '.join(map(repr, METHODS[:3]))}, or None")
    options = {"activation": activation, "recompute": recompute, "implementation": implementation}
    rules, mesh = current_rules(), jax.sharding.get_abstract_mesh()

    def local(params: AnyExperts, *tokens: jax.Array, embed_axes: MeshAxes = ()) -> tuple[jax.Array, ExpertLoad]:
        def compute(params, *tokens):
            return _experts(_gather_weights(params, embed_axes), *tokens, **options)

        index = tokens[1]
        rows = ((index >= 0) & (index < _count(params))).sum(dtype=jnp.int32)
        compute = jax.checkpoint(compute) if embed_axes and recompute else compute
        return compute(params, *tokens), ExpertLoad(rows, jnp.ones((), jnp.int32))

    def flat(compute: Callable[..., tuple[jax.Array, ExpertLoad]], params: AnyExperts, *tokens: jax.Array):
        y, load = compute(params, *(a.reshape(-1, a.shape[-1]) for a in tokens))
        return y.reshape(tokens[0].shape), jax.tree.map(lambda a: a[None], load)

    if rules is None or mesh.size == 1:
        y, load = flat(local, params, x, index, weights)
        return (y, load) if with_load else y

    place = _placement(params, x.shape, mesh, rules)
    partial = place.hidden + (place.experts if place.replicated else ())

    def each(params: AnyExperts, *tokens: jax.Array):
        if not place.experts:
            compute = functools.partial(local, embed_axes=place.embed)
        else:
            ranks = math.prod(lax.axis_size(axis) for axis in place.experts)
            chosen = method or ("all_gather" if ranks <= index.shape[-1] else "all_to_all")
            compute = functools.partial(
                experts_parallel,
                axis=place.experts,
                method="replicated" if place.replicated else chosen,
                n_group=n_group,
                safety_factor=safety_factor,
                embed_axes=place.embed,
                **options,
            )
        y, load = flat(compute, params, *tokens)
        return (y[None] if partial else y), load if with_load else None

    free = tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes)
    tokens = _spec(place.tokens)
    if mesh.are_all_axes_explicit:
        x, index, weights = (jax.sharding.reshard(a, tokens) for a in (x, index, weights))
        params = jax.tree.map(jax.sharding.reshard, params, place.params)
    # check_vma=False, for kernels do not say how their outputs vary. Sums over ranks that hold the same tokens are then
    # best taken outside: the transpose of a psum would be another psum, that of this sum is local.
    y, load = jax.shard_map(
        each,
        in_specs=(place.params, tokens, tokens, tokens),
        # only who asks for the loads names every axis: under a vmap one of them may be taken (spmd_axis_name)
        out_specs=(_spec((partial, *place.tokens)) if partial else tokens, PartitionSpec(free) if with_load else None),
        axis_names=set(free),
        check_vma=False,
    )(params, x, index, weights)
    y = lax.reduce_sum(y, axes=(0,)) if partial else y
    return (y, load) if with_load else y
