"""The global model on a mesh: chains of a batch over `data`, anchors and every sensor's reports over `space`.

    mesh = make_mesh({"data": 2, "space": 8})
    params = train(records, fitted, cfg, tcfg, directory, mesh=mesh)              # `earth.world.training`
    with use_mesh(mesh, GLOBE):
        tokens = place_tokens(window, mesh, GLOBE)
        state = assimilate(params, None, tokens, end, cfg=cfg)                    # the verbs as without a mesh

Which device has which report is free, for reports never travel (`earth.kernels.neighbour_attention.sharded`): they are
cut where they stand, padded to a multiple of the devices with reports that are not there. Anchors are cut along the
Fibonacci sphere, and their number must divide; so must that of experts, if there are any. All choices here are ours.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from earth.kernels.neighbour_attention.order import arrangement
from earth.neighbours import Neighbourhood
from earth.world.records import Tokens
from moe.sharding import AxisRules, HostShard, host_shard, partition_spec

GLOBE = AxisRules.of(
    "GLOBE",
    weights={"expert": ("space",)},
    activations={"batch": ("data",), "query": ("space",), "anchor": ("space",), "expert": ("space",)},
)


def split_over(name: str, mesh: Any, rules: AxisRules) -> tuple[tuple[str, ...], int]:
    """(mesh axes that this axis of activations is split over, how many parts that makes)."""
    (axes,) = partition_spec((name,), mesh, rules, kind="activations") or (None,)
    axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
    return axes, int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))


def pad(tokens: Mapping[str, Tokens], multiple: int) -> dict[str, Any]:
    """Every sensor's reports, [..., N], to a multiple of so many with reports that are not there (numpy)."""
    return {name: _padded(t, -np.shape(t.age)[-1] % multiple) for name, t in tokens.items()}


def _padded(t: Tokens, extra: int) -> Tokens:
    axis = np.ndim(t.age) - 1

    def filled(x: Any, value: Any) -> np.ndarray:
        widths = [(0, extra if i == axis else 0) for i in range(np.ndim(x))]
        return np.pad(np.asarray(x), widths, constant_values=value)

    near = Neighbourhood(filled(t.near.index, -1), filled(t.near.radius2, 0))
    made = {name: filled(getattr(t, name), 0) for name in ("value", "age", "latitude", "longitude", "height")}
    made |= dict(mask=filled(t.mask, False), deviation=filled(t.deviation, 1), view_angle=filled(t.view_angle, 0))
    return Tokens(**made, near=near, error=None if t.error is None else filled(t.error, 0))


def arrange(tokens: Mapping[str, Tokens], anchors: Any) -> dict[str, Any]:
    """Every sensor's reports, [..., N], in the order of their nearest anchors along a curve (numpy), as
    `NetworkConfig.ordered` promises them.

    Args:
      anchors: [M, 4] their places.
    """
    out = {}
    for name, t in tokens.items():
        order, axis = arrangement(t.near.index, anchors), np.ndim(t.age) - 1

        def moved(x: Any, order: np.ndarray = order, axis: int = axis) -> np.ndarray:
            index = order.reshape(*order.shape, *[1] * (np.ndim(x) - order.ndim))
            return np.take_along_axis(np.asarray(x), index, axis)

        out[name] = jax.tree.map(moved, t)
    return out


def token_shardings(tokens: Any, mesh: Mesh, rules: AxisRules, *, lead: tuple[str | None, ...] = ()) -> Any:
    """Where the arrays of one sensor's Tokens lie; `lead` names the axes before those of reports."""

    def of(x: Any) -> NamedSharding:
        axes = (*lead, "query", *[None] * (np.ndim(x) - len(lead) - 1))
        return NamedSharding(mesh, partition_spec(axes, mesh, rules, kind="activations", shape=x.shape, label="tokens"))

    return jax.tree.map(of, tokens)


def place_tokens(tokens: Mapping[str, Tokens], mesh: Mesh, rules: AxisRules) -> dict[str, Any]:
    """A window's tokens (`Record.window`, `queries`) on the devices, padded. Every process passes all of them."""
    padded = pad(tokens, split_over("query", mesh, rules)[1])
    return {name: _put(t, token_shardings(t, mesh, rules), HostShard(0, 1)) for name, t in padded.items()}


def place_batch(batch: Mapping[str, Any], mesh: Mesh, rules: AxisRules, *, order: Any = None) -> dict[str, Any]:
    """Chains (`earth.world.training.dataset`: this process's rows, numpy) as arrays of the whole batch, padded.

    Args:
      order: [M, 4] places of the anchors that reports are arranged along; None leaves them as they come.

    Raises:
      ValueError: a batch that does not divide over the mesh axes of "batch".
    """
    shard = host_shard(mesh, rules)
    tokens = batch["tokens"] if order is None else arrange(batch["tokens"], order)
    tokens = pad(tokens, split_over("query", mesh, rules)[1])
    rows, parts = len(batch["time"]) * shard.count, split_over("batch", mesh, rules)[1]
    if rows % parts:
        raise ValueError(f"a batch of {rows} chains does not divide over {parts} shards; raise the stage's batch")
    time = NamedSharding(mesh, partition_spec(("batch",), mesh, rules, kind="activations"))
    lead = ("batch", None)
    return {
        "tokens": {name: _put(t, token_shardings(t, mesh, rules, lead=lead), shard) for name, t in tokens.items()},
        "time": _put(batch["time"], time, shard),
    }


def _put(tree: Any, shardings: Any, shard: HostShard) -> Any:
    """Global arrays of which this process has the rows of its shard, each whole along the other axes."""

    def leaf(x: Any, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        first = shard.index * len(x) if shard.count > 1 else 0

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(len(x) * shard.count)
            return x[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback((len(x) * shard.count, *x.shape[1:]), sharding, part)

    return jax.tree.map(leaf, tree, shardings)
