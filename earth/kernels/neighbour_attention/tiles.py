"""Points and anchors in the order and the tiles of the kernels, and which tiles meet.

Made by XLA in the program itself, from the index: lists follow the points, which change with every batch. They hold
every pair of tiles that meet, [tiles of points, tiles of anchors], so nothing can overflow: 10^7 points on 64 chips and
10^5 anchors in tiles of 128 are 1,221 x 782 numbers a chip. Kernels go through as many as there are.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from earth.kernels.neighbour_attention.order import anchor_order, point_order, rank
from earth.kernels.neighbour_attention.shapes import ANCHORS, POINTS, Pairs

AWAY = 1e18
"""Position of the anchors that pad a tile: nobody's neighbours."""


class Meetings(NamedTuple):
    """Of one side's blocks: count [blocks] of the other's tiles they meet, and tiles [blocks, all], those first."""

    count: jax.Array
    tiles: jax.Array


class Sorted(NamedTuple):
    """order: {side: items in the order of the kernels, None for the order they have}; place: {side: the inverse}; meet:
    {side: Meetings}.
    """

    order: dict[str, jax.Array | None]
    place: dict[str, jax.Array | None]
    meet: dict[str, Meetings]

    def sorted(self, side: str, array: jax.Array) -> jax.Array:
        """Rows of a side in the order of the kernels."""
        order = self.order[side]
        return array if order is None else array[order]

    def back(self, side: str, array: jax.Array) -> jax.Array:
        """Rows that the kernels made (and padded), as the caller has them."""
        place = self.place[side]
        return array if place is None else array[place]


def sort(pairs: Pairs, size: int) -> Sorted:
    """Tiles of `size` points along the order of their nearest anchors, anchors along a Z-curve."""
    points, anchors = pairs.sizes
    along = anchor_order(pairs.anchors)
    order = {ANCHORS: along, POINTS: None if pairs.ordered else point_order(pairs, along)}
    place = {side: None if o is None else rank(o) for side, o in order.items()}
    tiles = -(-anchors // size)
    of_anchor = jnp.append(rank(along) // size, tiles)  # -1, nobody, is the last
    of_point = jnp.arange(points) if pairs.ordered else rank(point_order(pairs, along))
    block = jnp.broadcast_to(of_point[:, None] // size, pairs.index.shape)
    meets = jnp.zeros((-(-points // size), tiles), bool).at[block, of_anchor[pairs.index]].set(True, mode="drop")
    return Sorted(order, place, {POINTS: _meetings(meets), ANCHORS: _meetings(meets.T)})


def _meetings(meets: jax.Array) -> Meetings:
    return Meetings(meets.sum(1, dtype=jnp.int32), jnp.argsort(~meets, axis=1, stable=True).astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Vectors of all heads side by side: [R, H, W] as [R, groups x group], a head within one group of lanes."""

    heads: int
    width: int

    @property
    def stride(self) -> int:
        return 1 << (self.width - 1).bit_length() if self.width <= 128 else -(-self.width // 128) * 128

    @property
    def group(self) -> int:
        return max(128, self.stride)

    @property
    def total(self) -> int:
        return -(-self.heads * self.stride // self.group) * self.group

    def of(self, head: int) -> tuple[slice, int]:
        """(the group of lanes, the head's first lane in it)"""
        first = head * self.stride
        group = first // self.group * self.group
        return slice(group, group + self.group), first - group

    def pack(self, array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, 0), (0, self.stride - self.width))).reshape(len(array), -1)
        return jnp.pad(padded, ((0, 0), (0, self.total - padded.shape[1])))

    def unpack(self, array: jax.Array) -> jax.Array:
        array = array[:, : self.heads * self.stride]
        return array.reshape(-1, self.heads, self.stride)[:, :, : self.width]


def pad_rows(array: Any, size: int, fill: float = 0) -> jax.Array:
    """[R, ...] to a multiple of `size` rows."""
    return jnp.pad(array, ((0, -len(array) % size), *[(0, 0)] * (array.ndim - 1)), constant_values=fill)


def other(side: str) -> str:
    return ANCHORS if side == POINTS else POINTS


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a kernel computes.

    Attributes:
        block: the side of the blocks; tiles are of the other.
        rows: the side that reads. A forward kernel has blocks of it.
        backward: gradients instead of values.
        axes: P; directions: C, None without moments.
        scores, values: the layouts of the two vectors of either side.
        prior: rows start with a weight.
        exact: float32 products of float32 operands.
    """

    block: str
    rows: str
    backward: bool
    axes: int
    directions: int | None
    scores: Lanes
    values: Lanes
    prior: bool
    exact: bool

    @property
    def heads(self) -> int:
        return self.scores.heads

    @property
    def moments(self) -> int:
        return 0 if self.directions is None else 1 + self.directions

    def fields(self, side: str) -> dict[str, int]:
        """Where the scalars of an item lie in its column of [F, size]."""
        names = [f"x{p}" for p in range(self.axes)]
        if side == POINTS:
            names.append("radius2")
        else:
            names += [f"frame{c},{p}" for c in range(self.directions or 0) for p in range(self.axes)]
            names += [f"decay{h}" for h in range(self.heads)]
        if side == self.rows:
            stats = ["total", "rest"] if self.backward else ["prior"] if self.prior else []
            names += [f"{name}{h}" for name in stats for h in range(self.heads)]
        return {name: i for i, name in enumerate(names)}

    def depth(self, side: str) -> int:
        return -(-len(self.fields(side)) // 8) * 8

    @property
    def outputs(self) -> tuple[str, ...]:
        """Arrays with one row per item of the block's side, in the order of the kernel's results."""
        if not self.backward:
            return ("values",)
        wide = self.block != self.rows  # the gradient of values goes to the side that is read
        return ("scores", "values") if wide else ("scores",)


def make_spec(query, value, coefficient, pairs: Pairs, side: str, **rest) -> Spec:
    return Spec(
        rows=side,
        axes=pairs.points.shape[1],
        directions=None if coefficient is None else coefficient.shape[1] - 1,
        scores=Lanes(*query.shape[1:]),
        values=Lanes(*value.shape[1:]),
        exact=value.dtype != jnp.bfloat16,
        **rest,
    )


def _scalars(spec: Spec, side: str, given: dict[str, jax.Array], ordered: Sorted, size: int) -> jax.Array:
    """[tiles, F, size] of a side from {name: [R, ...]}, sorted."""
    columns = []
    for name, array in given.items():
        fill = AWAY if name == "x" and side == ANCHORS else 0.0
        rows = ordered.sorted(side, array).astype(jnp.float32)
        columns.append(pad_rows(rows.reshape(len(rows), -1), size, fill))
    table = jnp.concatenate(columns, 1)
    assert table.shape[1] == len(spec.fields(side)), (table.shape, spec.fields(side))
    table = jnp.pad(table, ((0, 0), (0, spec.depth(side) - table.shape[1])))
    return table.reshape(-1, size, table.shape[1]).transpose(0, 2, 1)


def scalars(spec: Spec, pairs: Pairs, decay, stats: dict, ordered: Sorted, size: int) -> dict[str, jax.Array]:
    """{side: [tiles, F, size]}: `Spec.fields` of every item, sorted and padded."""
    made = {}
    for side in (POINTS, ANCHORS):
        if side == POINTS:
            given = dict(x=pairs.points, radius2=pairs.radius2)
        else:
            given = dict(x=pairs.anchors) | ({} if spec.directions is None else dict(frame=pairs.frame))
            given |= dict(decay=decay)
        if side == spec.rows:
            given |= stats
        made[side] = _scalars(spec, side, given, ordered, size)
    return made
