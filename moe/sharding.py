"""One table of sharding: meshes, the map from logical axes to mesh axes, and `constrain`.

Weights name their axes in a `moe.params.ParamSpec`; activations name theirs in `constrain(x, "batch", "seq", "embed")`.
One `AxisRules` value per run says which mesh axes each name is split over. Models therefore know neither the mesh nor
the strategy:

    mesh = make_mesh({"data": 2, "fsdp": 4})
    with use_mesh(mesh, FSDP):
        ...                       # constrain() acts; without this context it returns its argument

Mesh axes used by the presets: `data` (replicas), `fsdp` (batch and weights), `expert` (batch and experts), `tensor`
    (heads, mlp, vocab).
A preset may name mesh axes that a mesh lacks (they count as size 1), but a mesh axis that no rule uses is an error: it
would replicate the work. Presets, and which weight axes they split, are ours.
"""

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")
MeshAxes = tuple[str, ...]

_WEIGHTS = ("embed", "mlp", "heads", "kv_heads", "head_dim", "vocab", "expert", "layer", "feature")
_ACTIVATIONS = (
    *("batch", "seq", "embed", "mlp", "heads", "kv_heads", "head_dim", "vocab", "expert", "capacity", "slot", "layer"),
    *("feature", "query", "anchor", "lead"),
)


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Logical axis -> mesh axes, apart for weights and for activations (FSDP splits a weight's `embed`, not an
    activation's).

    Attributes:
        name: shown in errors.
        weights: (logical axis, mesh axes) pairs; an empty tuple of mesh axes means replicated.
        activations: the same for `constrain` and for batches.
    """

    name: str
    weights: tuple[tuple[str, MeshAxes], ...]
    activations: tuple[tuple[str, MeshAxes], ...]

    def __post_init__(self):
        for kind in ("weights", "activations"):
            names = [name for name, _ in getattr(self, kind)]
            for name, axes in getattr(self, kind):
                if not isinstance(axes, tuple) or not all(isinstance(axis, str) for axis in axes):
                    raise TypeError(f"rule {name!r} of {self.name} maps to {axes!r}; give a tuple of mesh axis names")
            repeated = {name for name in names if names.count(name) > 1}
            if repeated:
                raise ValueError(f"{self.name} has two rules for {kind} axis {sorted(repeated)}; keep one of each")

    @classmethod
    def of(
        cls,
        name: str,
        *,
        weights: Mapping[str, MeshAxes] | None = None,
        activations: Mapping[str, MeshAxes] | None = None,
    ) -> "AxisRules":
        """Rules over the house's logical axes, all replicated but those given. Names beyond the house's are added."""
        weights = dict.fromkeys(_WEIGHTS, ()) | dict(weights or {})
        activations = dict.fromkeys(_ACTIVATIONS, ()) | dict(activations or {})
        return cls(name, tuple(weights.items()), tuple(activations.items()))

    def replace(
        self, *, weights: Mapping[str, MeshAxes] | None = None, activations: Mapping[str, MeshAxes] | None = None
    ) -> "AxisRules":
        """The same rules with some logical axes changed or added."""
        return AxisRules(
            self.name,
            tuple((dict(self.weights) | dict(weights or {})).items()),
            tuple((dict(self.activations) | dict(activations or {})).items()),
        )

    def mesh_axes(self) -> frozenset[str]:
        """Every mesh axis some rule uses."""
        return frozenset(axis for _, axes in self.weights + self.activations for axis in axes)


_BATCH = ("data", "fsdp", "expert")

DP = AxisRules.of("DP", activations={"batch": _BATCH})
FSDP = AxisRules.of("FSDP", weights={"embed": ("fsdp",)}, activations={"batch": _BATCH})
FSDP_EP = AxisRules.of(
    "FSDP_EP",
    weights={"embed": ("fsdp",), "expert": ("expert",)},
    activations={"batch": _BATCH, "expert": ("expert",)},
)
FSDP_TP_EP = AxisRules.of(
    "FSDP_TP_EP",
    weights={"embed": ("fsdp",), "expert": ("expert",)}
    | dict.fromkeys(("mlp", "heads", "kv_heads", "vocab"), ("tensor",)),
    activations={"batch": _BATCH, "expert": ("expert",)}
    | dict.fromkeys(("mlp", "heads", "kv_heads", "vocab"), ("tensor",)),
)
PRESETS: Mapping[str, AxisRules] = {rules.name: rules for rules in (DP, FSDP, FSDP_EP, FSDP_TP_EP)}


def make_mesh(
    shape: Mapping[str, int], *, devices: Sequence[Any] | None = None, axis_types: AxisType = AxisType.Auto
) -> Mesh:
    """A mesh over all devices of all processes (call `jax.distributed.initialize` first where there are several).

    Args:
        shape: mesh axis -> size, outermost (slowest links, other hosts) first; one size may be -1: what is left.
        devices: default `jax.devices()`. Also topology devices, for ahead-of-time compilation.
        axis_types: Auto lets XLA propagate shardings between the `constrain` points; Explicit puts them in the types.

    Raises:
        ValueError: when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(shape)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh shape {sizes} needs positive sizes and at most one -1")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh shape {dict(shape)} does not cover {len(devices)} devices; change a size or use one -1")
    types = (axis_types,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=devices)


def check_rules(mesh: Mesh | jax.sharding.AbstractMesh, rules: AxisRules) -> None:
    """Raises ValueError where `mesh` has an axis larger than 1 that `rules` never use: its devices would repeat each
    other's work.
    """
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in rules.mesh_axes():
            raise ValueError(
                f"mesh axis {axis!r} of size {size} is used by no rule of {rules.name}, "
                f"whose axes are {sorted(rules.mesh_axes())}"
            )


def partition_spec(
    axes: Sequence[str | None],
    mesh: Mesh | jax.sharding.AbstractMesh,
    rules: AxisRules,
    *,
    kind: str = "weights",
    shape: Sequence[int] | None = None,
    label: str = "array",
) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names.

    Args:
        axes: one logical name per dimension, None for a dimension that is never split.
        mesh: axes that it lacks are left out of the spec; axes in manual mode (inside shard_map) too.
        kind: "weights" or "activations", which half of the rules to read.
        shape: checked for divisibility when given.
        label: what to call the array in errors.

    Raises:
        ValueError: unknown logical axis (names the nearest), one mesh axis on two dimensions, a dimension that does not
            divide.
    """
    table = dict(getattr(rules, kind))
    manual = set(getattr(mesh, "manual_axes", ()))
    if shape is not None and len(shape) != len(axes):
        raise ValueError(f"{label} has {len(shape)} dimensions {tuple(shape)} but {len(axes)} axis names {tuple(axes)}")
    spec: list[MeshAxes | str | None] = []
    used: dict[str, str] = {}
    for dimension, name in enumerate(axes):
        if name is None:
            spec.append(None)
            continue
        if name not in table:
            near = difflib.get_close_matches(name, table, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {sorted(table)}"
            raise ValueError(f"{label} has logical axis {name!r}, unknown to the {kind} of {rules.name}; {hint}")
        physical = tuple(axis for axis in table[name] if mesh.shape.get(axis, 1) > 1 and axis not in manual)
        for axis in physical:
            if axis in used:
                raise ValueError(
                    f"{label} with axes {tuple(axes)} would split both {used[axis]!r} and {name!r} over mesh axis "
                    f"{axis!r} ({rules.name}); name one of them None"
                )
            used[axis] = name
        parts = math.prod(mesh.shape[axis] for axis in physical)
        if shape is not None and shape[dimension] % parts:
            raise ValueError(
                f"{label}: dimension {dimension} ({name!r}, size {shape[dimension]}) does not divide over mesh axes "
                f"{physical} of total size {parts}; pad it, or map {name!r} to ()"
            )
        spec.append(physical[0] if len(physical) == 1 else physical or None)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


# Part of JAX's trace and compilation cache keys, so that the same function under other rules is traced again.
_rules_in_context = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: AxisRules) -> Iterator[None]:
    """Within this context `constrain` acts, by `rules` on `mesh`. Enter it around the calls of jitted functions."""
    check_rules(mesh, rules)
    with jax.set_mesh(mesh), _rules_in_context(rules):
        yield


@contextlib.contextmanager
def use_rules(rules: AxisRules | None) -> Iterator[None]:
    """Other rules on the mesh in context, for a part of a model whose axes mean something else. Allowed inside jit."""
    with _rules_in_context(rules):
        yield


def current_rules() -> AxisRules | None:
    """The rules of the innermost `use_mesh`, or None."""
    return _rules_in_context.value


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` with a sharding constraint by the logical names of its axes; `x` itself without a mesh and rules in context.

    Args:
        x: any array, usually an activation inside jit.
        *axes: one name per dimension, e.g. ("batch", "seq", "embed"); None for a dimension that is never split.

    Raises:
        ValueError: see `partition_spec`. The number of names is checked without a mesh, too.
    """
    if x.ndim != len(axes):
        raise ValueError(f"constrain got {len(axes)} axis names {axes} for an array of shape {x.shape}")
    rules = current_rules()
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return x
    spec = partition_spec(axes, mesh, rules, kind="activations", shape=x.shape, label="activation")
    if all(axis_type == AxisType.Explicit for axis_type in mesh.axis_types):
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def batch_sharding(mesh: Mesh, rules: AxisRules) -> NamedSharding:
    """The sharding of a batch: leading axis over the mesh axes of "batch", the rest replicated."""
    return NamedSharding(mesh, partition_spec(("batch",), mesh, rules, kind="activations"))


@dataclasses.dataclass(frozen=True)
class HostShard:
    """Which of `count` equal parts of every global batch this process reads; what grain's ShardOptions wants."""

    index: int
    count: int


def host_shard(mesh: Mesh, rules: AxisRules) -> HostShard:
    """The part of each global batch that this process has to load.

    Processes whose devices hold the same rows (a tensor axis across hosts) get the same index and must load the same
    rows.

    Raises:
        ValueError: when the rows of a process are not one contiguous part; put the batch's axes outermost in the mesh.
    """
    sharding = batch_sharding(mesh, rules)
    rows = sharding.num_devices
    rows_of: dict[int, set[int]] = {}
    for device, (index, *_) in sharding.devices_indices_map((rows,)).items():
        rows_of.setdefault(device.process_index, set()).update(range(*index.indices(rows)))
    mine = rows_of[jax.process_index()]
    size = len(mine)
    first = min(mine)
    aligned = all(
        len(r) == size and r == set(range(min(r), min(r) + size)) and min(r) % size == 0 for r in rows_of.values()
    )
    if not aligned:
        raise ValueError(
            f"processes hold uneven parts of a batch on mesh {dict(mesh.shape)}; put the batch axes outermost"
        )
    return HostShard(first // size, rows // size)


def global_batch(batch: T, mesh: Mesh, rules: AxisRules) -> T:
    """Host-local numpy arrays -> global jax arrays split over the batch axes.

    Args:
        batch: tree of arrays [b, ...], the part of the global batch that `host_shard` gives to this process; every
            leaf's b is equal.

    Returns:
        The same tree of arrays [b * host_shard(...).count, ...].

    Raises:
        ValueError: a leaf without the common leading size, or one that does not divide over the devices.
    """
    sharding = batch_sharding(mesh, rules)
    count = host_shard(mesh, rules).count
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        return batch
    local = np.shape(leaves[0][1])[:1]
    axes = sharding.spec[0] if len(sharding.spec) else None
    parts = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
    for path, leaf in leaves:
        if np.ndim(leaf) == 0 or np.shape(leaf)[:1] != local:
            raise ValueError(
                f"batch leaf {jax.tree_util.keystr(path)} has shape {np.shape(leaf)}; "
                f"every leaf needs the leading size {local}"
            )
    if (local[0] * count) % parts:
        raise ValueError(f"a global batch of {local[0] * count} rows does not divide over {parts} batch shards")
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(
            sharding, np.asarray(leaf), (local[0] * count, *np.shape(leaf)[1:])
        ),
        batch,
    )
