"""Trained models in folders: arrays with orbax, the classes they sit in by name, the configuration beside them.

    save(directory, params, cfg, meta={"seed": 0})
    params, cfg, meta = load(directory, WorldConfig, CLASSES)

`moe.checkpoint` needs a target of the right structure to restore into; here the structure is saved too, so that a model
opens without the data that its shapes depend on.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from moe import checkpoint, config

T = TypeVar("T")


def save(directory: str | pathlib.Path, params: Any, cfg: Any, *, meta: Mapping[str, Any] | None = None) -> None:
    """Writes a model, complete or not at all.

    Args:
      params: tree of dataclasses, mappings and lists of arrays. cfg: dataclass. meta: JSON.
    """
    extra = {"structure": _describe(params), "meta": dict(meta or {})}
    params = jax.tree.map(lambda x: x if x.size else jnp.zeros(1, x.dtype), params)  # orbax keeps no empty arrays
    with checkpoint.Checkpoints(directory, config={"model": cfg}, extra=extra, keep=1) as folder:
        folder.save(max(folder.steps(), default=-1) + 1, params)


def load(
    directory: str | pathlib.Path, config_class: type[T], classes: Iterable[type], *, cfg: T | None = None
) -> tuple[Any, T, dict[str, Any]]:
    """Reads what `save` wrote: (params, config, meta).

    Args:
      classes: dataclasses of the tree; those of another name cannot be read.
      cfg: configuration that it has to have.

    Raises:
      moe.checkpoint.CheckpointError: nothing there, truncated, of other classes or (with `cfg`) another configuration;
      the message names what differs.
    """
    step, saved, extra = checkpoint.describe(directory)
    if "structure" not in extra:
        raise checkpoint.CheckpointStructureError(
            f"{directory} holds a training state, not a model; pass the folder that save_model wrote"
        )
    shapes = _skeleton(extra["structure"], {c.__name__: c for c in classes}, directory)
    found = config.from_dict(config_class, saved["model"])
    wanted = None if cfg is None else {"model": cfg}
    kept = jax.tree.map(lambda x: x if x.size else jax.ShapeDtypeStruct((1,), x.dtype), shapes)
    state = checkpoint.restore(directory, kept, step=step, config=wanted).state
    return jax.tree.map(lambda x, s: x if s.size else jnp.zeros(s.shape, s.dtype), state, shapes), found, extra["meta"]


def _describe(tree: Any) -> Any:
    """A parameter tree as JSON: class names, static fields, and shape and dtype of every array."""
    if dataclasses.is_dataclass(tree):
        return {
            "class": type(tree).__name__,
            "fields": {f.name: _describe(getattr(tree, f.name)) for f in dataclasses.fields(tree)},
        }
    if isinstance(tree, Mapping):
        return {"dict": {k: _describe(v) for k, v in tree.items()}}
    if isinstance(tree, list):
        return {"list": [_describe(v) for v in tree]}
    if tree is None or isinstance(tree, bool | int | tuple):
        return {"static": list(tree) if isinstance(tree, tuple) else tree}
    return {"shape": list(tree.shape), "dtype": str(tree.dtype)}


def _skeleton(described: Mapping[str, Any], classes: Mapping[str, type], directory: Any) -> Any:
    if "class" in described:
        name = described["class"]
        if name not in classes:
            raise checkpoint.CheckpointStructureError(
                f"{directory} holds a {name}, none of {sorted(classes)}; it is another kind of model: open it with the "
                "load_model of its package"
            )
        known, found = {f.name for f in dataclasses.fields(classes[name])}, set(described["fields"])
        if known != found:
            raise checkpoint.CheckpointStructureError(
                f"{directory}: its {name} differs from today's by {sorted(known ^ found)}; it is another kind of "
                "model, or written by another version of the library: open it with that, or train anew"
            )
        return classes[name](**{k: _skeleton(v, classes, directory) for k, v in described["fields"].items()})
    if "dict" in described:
        return {k: _skeleton(v, classes, directory) for k, v in described["dict"].items()}
    if "list" in described:
        return [_skeleton(v, classes, directory) for v in described["list"]]
    if "static" in described:
        value = described["static"]
        return tuple(value) if isinstance(value, list) else value
    return jax.ShapeDtypeStruct(tuple(described["shape"]), described["dtype"])
