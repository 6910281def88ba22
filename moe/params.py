"""Parameters declared once: shape, logical axes, initialiser and dtype; from it come values, abstract trees and
shardings.

A model offers `x_specs(cfg) -> tree of ParamSpec` (a flax.struct.dataclass or nested dicts) and pure functions
`x(params, inputs, *, cfg)`. The values made by `init` sit in the same tree in place of the specs. Struct fields that
hold parameters are annotated `Param`, because the same class carries specs, arrays, abstract arrays and shardings in
turn:

    @flax.struct.dataclass
    class LinearParams:
        w: Param
        b: Param

    def linear_specs(d_in, d_out):
        return LinearParams(w=ParamSpec((d_in, d_out), ("embed", "mlp")), b=ParamSpec((d_out,), ("mlp",), zeros))
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Key

from moe.sharding import AxisRules, check_rules, partition_spec

Param: TypeAlias = Any
"""A leaf of a parameter tree: a ParamSpec, a jax.Array, a jax.ShapeDtypeStruct or a sharding."""
Tree: TypeAlias = Any
Initialiser: TypeAlias = Callable[[Any, tuple[int, ...], Any], jax.Array]
"""(key, shape, dtype) -> array. Equal initialisers should compare equal: the compiled draw is then shared."""


def zeros(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """All zeros; the key is not used."""
    return jnp.zeros(shape, dtype)


def ones(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """All ones; the key is not used."""
    return jnp.ones(shape, dtype)


# Standard deviation of a unit normal truncated at ±2; divided out so that the stated deviation is the actual one.
_TRUNCATED_STD = 0.87962566103423978


@dataclasses.dataclass(frozen=True)
class Normal:
    """Normal with mean 0 and this standard deviation, untruncated."""

    stddev: float

    def __call__(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return (jax.random.normal(key, shape, jnp.float32) * self.stddev).astype(dtype)


@dataclasses.dataclass(frozen=True)
class TruncatedNormal:
    """Normal cut at ±2 deviations, rescaled so that the standard deviation of the draws is `stddev`."""

    stddev: float

    def __call__(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> jax.Array:
        draw = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
        return (draw * (self.stddev / _TRUNCATED_STD)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class FanIn:
    """Truncated normal of variance `scale / fan_in`, fan_in = product of the sizes of `axes`.

    Attributes:
        scale: 1 keeps the variance of a linear map's output (LeCun), 2 suits ReLU (He).
        axes: input axes of the weight, counted from the end so that a leading stack of layers or experts does not
            change the
            fan: (-2,) for [..., D_in, D_out], (-3,) for [D, heads, head_dim], (-3, -2) for [heads, head_dim, D].
    """

    scale: float = 1.0
    axes: tuple[int, ...] = (-2,)

    def __post_init__(self):
        if not self.axes or any(axis >= 0 for axis in self.axes):
            raise ValueError(f"FanIn axes {self.axes} must count from the end, e.g. (-2,)")

    def __call__(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if -min(self.axes) > len(shape):
            raise ValueError(f"FanIn axes {self.axes} do not exist in a weight of shape {shape}")
        fan_in = math.prod(shape[axis] for axis in self.axes)
        return TruncatedNormal(math.sqrt(self.scale / fan_in))(key, shape, dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A given number or array, broadcast to the shape (leading axes of a stack repeat it)."""

    value: Any

    def __call__(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(self.value, dtype), shape)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """The declaration of one parameter.

    Attributes:
        shape: sizes, all positive.
        axes: one logical axis name per dimension (see `moe.sharding`), None where never split.
        init: initialiser; the default is FanIn over the second-last axis.
        dtype: of the stored parameter; computation may cast (see moe.training.Policy).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initialiser = FanIn()
    dtype: Any = jnp.float32

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"ParamSpec of shape {self.shape} has {len(self.axes)} axis names {self.axes}; give one a dimension"
            )
        if any(not isinstance(size, int | np.integer) or size < 1 for size in self.shape):
            raise ValueError(f"ParamSpec shape {self.shape} needs positive integers")
        names = [name for name in self.axes if name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"ParamSpec axes {self.axes} repeat a name; name one of the two None")


def is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParamSpec)


def path_name(path: Iterable[Any]) -> str:
    """ "blocks/0/w" for a JAX key path; the name under which a parameter is drawn, reported and checkpointed."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def key_for(rng: Key[Array, ""], name: str) -> Key[Array, ""]:
    """A key that depends on `rng` and `name` alone (64 bits of SHA-256 of the name are folded in)."""
    digest = hashlib.sha256(name.encode()).digest()
    high, low = (int.from_bytes(digest[i : i + 4], "big") for i in (0, 4))
    return jax.random.fold_in(jax.random.fold_in(rng, np.uint32(high)), np.uint32(low))


def _map(function: Callable[[str, ParamSpec], Any], specs: Tree) -> Tree:
    def apply(path, leaf):
        if not is_spec(leaf):
            raise TypeError(f"leaf {path_name(path)!r} of the specs is {type(leaf).__name__}, not ParamSpec")
        return function(path_name(path), leaf)

    return jax.tree_util.tree_map_with_path(apply, specs, is_leaf=is_spec)


def shardings(specs: Tree, mesh: Mesh, rules: AxisRules) -> Tree:
    """The tree of NamedSharding that `rules` give these parameters on `mesh`. Errors name the parameter."""
    check_rules(mesh, rules)
    return _map(
        lambda name, spec: NamedSharding(
            mesh, partition_spec(spec.axes, mesh, rules, shape=spec.shape, label=f"parameter {name!r}")
        ),
        specs,
    )


def abstract(specs: Tree, mesh: Mesh | None = None, rules: AxisRules | None = None) -> Tree:
    """The tree of jax.ShapeDtypeStruct, with shardings where mesh and rules are given: for eval_shape, restore and
    AOT.
    """
    if mesh is None or rules is None:
        return _map(lambda _, spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)
    placed = shardings(specs, mesh, rules)
    return jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding),
        specs,
        placed,
        is_leaf=is_spec,
    )


@functools.cache
def _draw(
    init: Initialiser, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None
) -> Callable[[Any], jax.Array]:
    return jax.jit(lambda key: init(key, shape, dtype), out_shardings=sharding)


def init(rng: Key[Array, ""], specs: Tree, mesh: Mesh | None = None, rules: AxisRules | None = None) -> Tree:
    """Draws every parameter, each on its own devices from the start.

    A parameter's values depend on `rng`, its path, shape, dtype and initialiser only: adding another parameter, or
    another mesh, changes nothing. One small program is compiled for each distinct (initialiser, shape, dtype,
    sharding).

    Args:
        rng: a typed key, `jax.random.key(seed)`.
        specs: tree of ParamSpec.
        mesh, rules: place the parameters; both or neither.
    """
    if (mesh is None) != (rules is None):
        raise ValueError("give init both a mesh and rules, or neither")
    placed = _map(lambda *_: None, specs) if mesh is None or rules is None else shardings(specs, mesh, rules)
    where = {
        path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(placed, is_leaf=lambda x: x is None)
    }

    def draw(name: str, spec: ParamSpec) -> jax.Array:
        value = _draw(spec.init, tuple(spec.shape), jnp.dtype(spec.dtype), where.get(name))(key_for(rng, name))
        if value.shape != tuple(spec.shape) or value.dtype != jnp.dtype(spec.dtype):
            raise ValueError(f"initialiser of {name!r} made {value.shape} {value.dtype}, not {spec.shape} {spec.dtype}")
        return value

    return _map(draw, specs)


def stack(specs: Tree, count: int, axis: str | None = "layer") -> Tree:
    """`count` copies of each parameter on a new leading axis, e.g. for `lax.scan` over layers; every copy is drawn
    anew.
    """
    return _map(
        lambda _, spec: dataclasses.replace(spec, shape=(count, *spec.shape), axes=(axis, *spec.axes)),
        specs,
    )


def count(tree: Tree) -> int:
    """Number of parameters in a tree of specs, arrays or abstract arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree, is_leaf=is_spec))


def nbytes(tree: Tree) -> int:
    """Bytes that the parameters occupy, over all devices, each counted once."""
    return sum(
        math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree, is_leaf=is_spec)
    )
