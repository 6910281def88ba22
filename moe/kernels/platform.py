"""Code by the platform being lowered for, of which only the chosen one is traced.

`jax.lax.platform_dependent` traces every alternative wherever it is used; a Pallas kernel takes up to a second, on CPU
for nothing. Here an alternative is traced when a program is lowered for its platform, so on CPU Pallas is not imported.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


@dataclasses.dataclass(frozen=True, init=False)
class Partial:
    """functools.partial of keywords only, and equal to another of the same function and keywords."""

    function: Callable[..., Any]
    keywords: tuple[tuple[str, Any], ...]

    def __init__(self, function: Callable[..., Any], **keywords: Any):
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "keywords", tuple(sorted(keywords.items())))

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.function(*args, **dict(self.keywords), **keywords)


@dataclasses.dataclass(frozen=True)
class Flat:
    """`function` of a tree's leaves. Equal ones share their traces."""

    function: Callable[..., Any]
    tree: Any

    def __call__(self, *flat: jax.Array) -> Any:
        return self.function(*jax.tree.unflatten(self.tree, flat))


@dataclasses.dataclass(frozen=True)
class Batched:
    """`function` under jax.vmap."""

    function: Callable[..., Any]
    dims: tuple[int | None, ...]
    axis: Any  # batching.AxisData

    def __call__(self, *flat: jax.Array) -> Any:
        axis = self.axis
        if axis.size == 1:  # a device's only sample: kernels without a batch axis
            alone = [x if d is None else lax.squeeze(x, (d,)) for x, d in zip(flat, self.dims, strict=True)]
            return jax.tree.map(lambda x: x[None], self.function(*alone))
        return jax.vmap(
            self.function, in_axes=self.dims, axis_size=axis.size, axis_name=axis.name, spmd_axis_name=axis.spmd_name
        )(*flat)


_choose = Primitive("choose_by_platform")
_choose.multiple_results = True


@_choose.def_abstract_eval
def _abstract(*avals, default, kernels):
    traced = jax.make_jaxpr(default)(*avals)
    if traced.effects:
        raise NotImplementedError(f"platform_dependent: {default} has the effects {traced.effects}; use jax.lax's")
    return traced.out_avals


@functools.cache
def _compiled(default, kernels) -> Callable[..., list[jax.Array]]:
    return jax.jit(lambda *flat: _choose.bind(*flat, default=default, kernels=kernels))


@_choose.def_impl
def _run(*flat, default, kernels):
    return _compiled(default, kernels)(*flat)


def _batch(axis, flat, dims, *, default, kernels):
    default, *others = (
        Batched(function, tuple(dims), axis) for function in (default, *(function for _, function in kernels))
    )
    names = [name for name, _ in kernels]
    outputs = _choose.bind(*flat, default=default, kernels=tuple(zip(names, others, strict=True)))
    return outputs, [0] * len(outputs)


batching.fancy_primitive_batchers[_choose] = _batch


def _lower(ctx, *operands, default, kernels, platform=None):
    function = dict(kernels).get(platform, default)
    return mlir.lower_fun(lambda *flat: jax.tree.leaves(function(*flat)))(ctx, *operands)


mlir.register_lowering(_choose, _lower)
for _name in ("tpu", "cuda"):
    mlir.register_lowering(_choose, functools.partial(_lower, platform=_name), platform=_name)


def platform_dependent(*args: Any, default: Callable[..., Any], **kernels: Callable[..., Any]) -> Any:
    """As `jax.lax.platform_dependent`, with these differences.

    Only the alternative of the platform lowered for is traced, and `default`, for the shapes: all must return what
    `default` returns. There is no derivative; wrap it in a custom VJP. Functions that are equal, such as `Partial`s,
    share their traces.

    Args:
        args: trees of arrays.
        default: where `kernels` has none.
        kernels: by platform, "tpu" or "cuda".
    """
    flat, tree = jax.tree.flatten(args)
    function, *others = (Flat(f, tree) for f in (default, *kernels.values()))
    shapes = jax.make_jaxpr(function, return_shape=True)(*flat)[1]
    outputs = _choose.bind(*flat, default=function, kernels=tuple(zip(kernels, others, strict=True)))
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)
