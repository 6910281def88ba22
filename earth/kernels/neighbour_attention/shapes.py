"""Who meets whom, the checks of arguments, and the numbers that all implementations share."""

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from earth.geometry import Array
from earth.neighbours import FAR2, Neighbourhood
from moe.params import Param

POINTS, ANCHORS = "points", "anchors"
"""Which side reads: `attend` has rows of points and sums over anchors, `collect` has it the other way round."""


class NeighbourAttentionError(ValueError):
    """Operands that do not fit together. The message names the value and the remedy."""


@flax.struct.dataclass
class Pairs:
    """Points and anchors, and which of them are neighbours: made by `pairs`, carries no gradient.

    Attributes:
      points: [N, P]; anchors: [M, P] positions.
      radius2: [N] squared reach of a point's neighbourhood, 0 for points that are not there.
      index: [N, k] int32, holds every anchor below radius2; -1 where there is none.
      frame: [M, C, P] directions that moments are taken along, or None.
      where: [N] bool, which points are there, or None for all.
      ordered: points lie along the anchors already: kernels that take tiles of them do not sort. A matter of speed.
    """

    points: Param
    anchors: Param
    radius2: Param
    index: Param
    frame: Param = None
    where: Param = None
    ordered: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def sizes(self) -> tuple[int, int]:
        return len(self.points), len(self.anchors)


def pairs(
    points: Float[Array, "N P"],
    anchors: Float[Array, "M P"],
    neighbourhood: Neighbourhood,
    *,
    frame: Float[Array, "M C P"] | None = None,
    where: Bool[Array, " N"] | None = None,
    ordered: bool = False,
) -> Pairs:
    """The pairs of a neighbourhood (`earth.neighbours.nearest` of the same points and anchors).

    Explicitly without gradient (`stop_gradient`): positions, radii and frames. Who is whose neighbour is a matter of
    sorting, and the model's anchors move by equations of their own.

    Args:
      frame: unit directions at every anchor (east, north, up, say), as positions are scaled.
      where: False for points that are not there (padding, missing reports): whatever they hold, NaN included, has no
        part in any sum or gradient, and what they would read is 0.
      ordered: the points come in an order in which those with near anchors lie together (`order.arrangement` makes it),
        so that no device has to sort and permute them; sorting 3e5 points takes XLA:TPU 11 s to compile. No result
        depends on it.

    Raises:
      NeighbourAttentionError: the neighbourhood is not of so many points.
    """
    count = len(points)
    if len(neighbourhood.index) != count or neighbourhood.radius2.shape != (count,):
        raise NeighbourAttentionError(
            f"the neighbourhood is of {len(neighbourhood.index)} points, there are {count}; search again with "
            "earth.neighbours.nearest after points were dropped or added"
        )
    x, index = jnp.asarray(points), jnp.asarray(neighbourhood.index)
    radius2 = jnp.minimum(neighbourhood.radius2, FAR2)
    if where is not None:
        x = jnp.where(where[:, None], x, 0)
        radius2 = jnp.where(where, radius2, 0)
        index = jnp.where(where[:, None], index, -1)
    made = Pairs(points=x, anchors=jnp.asarray(anchors), radius2=radius2, index=index, frame=frame, where=where)
    made = made.replace(ordered=ordered)  # pyright: ignore[reportAttributeAccessIssue]
    return lax.stop_gradient(made)


def check_operands(side: str, query, key, value, decay, prior, coefficient, pairs: Pairs) -> None:
    """Raises NeighbourAttentionError unless the operands fit the pairs; `side` is that of the query."""
    names, sizes = ("points", "anchors"), pairs.sizes
    rows, columns = sizes if side == POINTS else sizes[::-1]
    row_name, column_name = names if side == POINTS else names[::-1]
    if query.ndim != 3 or key.ndim != 3 or value.ndim != 3:
        raise NeighbourAttentionError(
            f"query {query.shape}, key {key.shape} and value {value.shape} must be [rows, heads, width]"
        )
    if len(query) != rows:
        raise NeighbourAttentionError(f"query {query.shape} is not one row for each of the {rows} {row_name}")
    for name, array in (("key", key), ("value", value)):
        if len(array) != columns:
            raise NeighbourAttentionError(
                f"{name} {array.shape} is not one row for each of the {columns} {column_name}"
            )
    heads = query.shape[1]
    if query.shape[1:] != key.shape[1:] or value.shape[1] != heads:
        raise NeighbourAttentionError(
            f"query {query.shape}, key {key.shape}, value {value.shape}: all need as many heads, and query and key one "
            "width"
        )
    anchors = sizes[1]
    for name, array in (("decay", decay), ("prior", prior)):
        if array is not None and array.shape != (anchors, heads):
            raise NeighbourAttentionError(
                f"{name} {array.shape} is not [anchors, heads] = {(anchors, heads)}; jnp.broadcast_to makes it so"
            )
    if coefficient is not None:
        if pairs.frame is None:
            raise NeighbourAttentionError("coefficients need directions: pass frame= to `pairs`")
        wanted = (heads, 1 + pairs.frame.shape[1])
        if coefficient.shape != wanted:
            raise NeighbourAttentionError(f"coefficient {coefficient.shape} is not [heads, 1 + C] = {wanted}")
