"""Checkpoints on orbax: the train state, the data iterator's state and the config, written whole or not at all.

A step's folder appears under its final name only once everything is on disk (orbax renames it), so a killed process
leaves the previous step intact. Beside the arrays lie

- `iterator`: the state of the data iterator of every process,
- `config`: the config as JSON, compared on restore,
- `extra`: whatever small JSON a model needs to be used again (normalisation, variables),
- `manifest`: shape, dtype and a 32-bit digest of every array. The digest is taken on the devices, does not depend on
the sharding, and
  is checked after restore: a flipped byte that a codec would pass on is found. The digest and this layout are ours.

Arrays are stored in a flat dict by path ("params/blocks/w"), so a checkpoint can be opened without the classes that
made it, and a part of it (the parameters alone) can be read. The target of a restore gives dtypes and shardings; its
mesh need not be the one that saved.
"""

import fnmatch
import gc
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import struct

from moe.config import fingerprint, flatten, to_dict
from moe.params import path_name

PathLike = str | os.PathLike[str]


class CheckpointError(Exception):
    """Base of everything that can be wrong with a checkpoint."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """There is no checkpoint, or not of that step."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint that is truncated, incomplete or whose content is not what was saved."""


class CheckpointConfigError(CheckpointError, ValueError):
    """The checkpoint was made by another config; the message lists the keys that differ."""


class CheckpointStructureError(CheckpointError, ValueError):
    """The checkpoint holds other arrays (names, shapes or dtypes) than the target asks for."""


@runtime_checkable
class DataIterator(Protocol):
    """What is saved with the state: grain's iterators, or any whose state is JSON-able or bytes of text."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@struct.dataclass
class Restored:
    """What `restore` returns: the state in the target's structure, its step, and the JSON beside it."""

    state: Any
    step: int = struct.field(pytree_node=False)
    config: Any = struct.field(pytree_node=False)
    extra: Any = struct.field(pytree_node=False)


class _IteratorState:
    """The iterator's state as grain's checkpoint handler wants it, frozen at the moment of saving."""

    def __init__(self, text: str = ""):
        self.text = text

    @classmethod
    def of(cls, iterator: DataIterator) -> "_IteratorState":
        state = iterator.get_state()
        if isinstance(state, bytes):
            return cls(json.dumps(_seal({"bytes": state.decode()})))
        return cls(json.dumps(_seal({"json": state})))

    def get_state(self) -> bytes:
        return self.text.encode()

    def set_state(self, state: bytes) -> None:
        self.text = state.decode()

    def start_prefetch(self) -> None:
        """Called by grain's handler after set_state; the real iterator starts by itself."""

    def apply(self, iterator: DataIterator) -> None:
        state = _unseal(json.loads(self.text))
        iterator.set_state(state["bytes"].encode() if "bytes" in state else state["json"])


def _seal(content: Any) -> dict[str, Any]:
    """JSON with its own fingerprint, so that a damaged character cannot pass for another value."""
    return {"content": content, "fingerprint": fingerprint(content)}


def _unseal(sealed: Any) -> Any:
    if not isinstance(sealed, dict) or sealed.keys() != {"content", "fingerprint"}:
        raise ValueError("the JSON beside the arrays is incomplete")
    if fingerprint(sealed["content"]) != sealed["fingerprint"]:
        raise ValueError("the JSON beside the arrays is not what was saved")
    return sealed["content"]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """{"a/b": leaf}; raises where two paths have one name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {path_name(path) or "value": leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two leaves of the state have the same path name; rename a dict key that contains '/'")
    return named


def _key_data_shape(leaf: Any) -> tuple[tuple[int, ...], Any]:
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return data.shape, data.dtype


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
    """sum over elements of bits * (2 * position + 1), modulo 2^32.

    Integer addition wraps and commutes, so the sum is the same on every mesh; a change of any single element always
    changes it, since an odd factor cannot cancel a difference modulo 2^32.
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == jnp.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8):
        x = x.astype(jnp.uint8)
    width = x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width])
    bits = bits.astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)


def _manifest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    digests = {name: _digest(leaf) for name, leaf in arrays.items()}
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": int(digests[name])}
        for name, leaf in arrays.items()
    }


def _jsonable(value: Any) -> Any:
    return None if value is None else json.loads(json.dumps(to_dict(value)))


class Checkpoints:
    """The checkpoints of one run in one folder. In a multi-process run every process makes the same calls.

    Args:
        directory: made if absent; on a file system that all processes share.
        config: dataclass or nested dict that goes with every save and is compared on restore.
        extra: small JSON-able dict that goes with every save.
        keep: how many of the newest steps stay; None for all.
        keep_every: steps that are multiples of this stay for ever.
        asynchronous: writing goes on in the background after `save` returns; at most one save is under way.
        read_only: for evaluation beside a running training; nothing is written or cleaned up.
    """

    def __init__(
        self,
        directory: PathLike,
        *,
        config: Any = None,
        extra: Mapping[str, Any] | None = None,
        keep: int | None = 3,
        keep_every: int | None = None,
        asynchronous: bool = True,
        read_only: bool = False,
    ):
        self.directory = pathlib.Path(directory).absolute()
        if read_only and not self.directory.is_dir():
            raise MissingCheckpointError(f"no folder {directory} to read checkpoints from")
        self._config, self._extra = _jsonable(config), _jsonable(extra)
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._manager = None
        if not read_only:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every,
                enable_async_checkpointing=asynchronous,
                cleanup_tmp_directories=True,  # what a killed process left half-written
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Complete steps on disk, ascending."""
        return sorted(ocp.utils.checkpoint_steps(self.directory))

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, step: int, state: Any, iterator: DataIterator | None = None) -> None:
        """Saves `state` (a tree of arrays and typed keys) as `step`; a no-op where that step is on disk already."""
        if self._manager is None:
            raise CheckpointError(
                f"checkpoints in {self.directory} were opened with read_only=True; save needs read_only=False"
            )
        self.wait()
        if step in self.steps():
            return
        leaves = {name: jnp.asarray(leaf) for name, leaf in _named_leaves(state).items()}
        arrays = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves.items()}
        manifest = _manifest(arrays)
        for name, leaf in leaves.items():
            if _is_key(leaf):
                manifest[name]["key"] = str(jax.random.key_impl(leaf))
        items: dict[str, Any] = {
            "state": ocp.args.StandardSave(arrays),
            "manifest": ocp.args.JsonSave(_seal(manifest)),
            "config": ocp.args.JsonSave(_seal(self._config)),
            "extra": ocp.args.JsonSave(_seal(self._extra)),
        }
        if iterator is not None:
            items["iterator"] = grain.checkpoint.CheckpointSave(_IteratorState.of(iterator))
        if not self._manager.save(step, args=ocp.args.Composite(**items), force=True):
            raise CheckpointError(f"orbax refused to save step {step} in {self.directory}; steps there: {self.steps()}")

    def restore(
        self,
        target: Any,
        *,
        step: int | None = None,
        iterator: DataIterator | None = None,
        ignore: Sequence[str] = (),
        prefix: str = "",
    ) -> Restored:
        """Reads a step into the structure, dtypes and shardings of `target`.

        Args:
            target: tree of jax.ShapeDtypeStruct (with shardings to place the arrays) or of arrays.
            step: default the newest.
            iterator: set to the state it had; it must have been saved.
            ignore: glob patterns of dotted config keys that may differ, e.g. ("train.steps", "report.*").
            prefix: read a part, e.g. "params/" when the target is the tree of parameters.

        Raises:
            MissingCheckpointError, CheckpointConfigError, CheckpointStructureError, CorruptCheckpointError.
        """
        step = self._existing(step)
        where = f"checkpoint {self.directory / str(step)}"
        beside = self._json(step, ("manifest", "config", "extra"))
        if self._config is not None:
            _check_config(where, beside["config"], self._config, ignore)
        named = {prefix + name: leaf for name, leaf in _named_leaves(target).items()}
        manifest = beside["manifest"]
        _check_structure(where, named, {k: v for k, v in manifest.items() if k.startswith(prefix)})

        wanted = {}
        for name, leaf in named.items():
            shape, dtype = _key_data_shape(leaf) if _is_key(leaf) else (leaf.shape, leaf.dtype)
            sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            wanted[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        arrays = self._orbax(
            step,
            state=ocp.args.PyTreeRestore(
                item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
            ),
        )["state"]
        changed = [name for name, leaf in arrays.items() if int(_digest(leaf)) != manifest[name]["digest"]]
        if changed:
            raise CorruptCheckpointError(
                f"{where}: content of {changed[0]!r} is not what was saved ({len(changed)} arrays changed); "
                f"{self._others(step)}"
            )
        if iterator is not None:
            self._restore_iterator(step, iterator)
        restored = [
            jax.random.wrap_key_data(arrays[name], impl=manifest[name]["key"]) if _is_key(leaf) else arrays[name]
            for name, leaf in named.items()
        ]
        state = jax.tree.unflatten(jax.tree.structure(target), restored)
        return Restored(state=state, step=step, config=beside["config"], extra=beside["extra"])

    def describe(self, step: int | None = None) -> tuple[int, Any, Any]:
        """(step, config, extra) of a checkpoint, without reading its arrays."""
        step = self._existing(step)
        beside = self._json(step, ("config", "extra"))
        return step, beside["config"], beside["extra"]

    def wait(self) -> None:
        """Returns when the save under way is on disk; raises what it raised."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the threads."""
        if self._manager is not None:
            self._manager.close()
        self._reader.close()

    def _existing(self, step: int | None) -> int:
        self.wait()
        steps = self.steps()
        if not steps:
            raise MissingCheckpointError(f"no checkpoint in {self.directory}")
        if step is not None and step not in steps:
            raise MissingCheckpointError(f"no checkpoint of step {step} in {self.directory}; there are {steps}")
        return steps[-1] if step is None else step

    def _others(self, step: int) -> str:
        others = [other for other in self.steps() if other != step]
        if others:
            return f"remove that folder to go on from step {others[-1]}"
        return "there is no other step to go back to: remove the folder and make it anew"

    def _orbax(self, step: int, **items: Any) -> Any:
        """Orbax's restore, with whatever a damaged file makes it raise turned into one error."""
        for name in items:
            if not (self.directory / str(step) / name).is_dir():
                raise CorruptCheckpointError(
                    f"checkpoint {self.directory / str(step)} has no {name!r} part; {self._others(step)}"
                )
        try:
            return self._reader.restore(self.directory / str(step), args=ocp.args.Composite(**items))
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):  # too little memory says nothing about the file
                raise
            _forget_abandoned_reads()
            raise CorruptCheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be read ({type(error).__name__}: {str(error)[:300]}); "
                f"{self._others(step)}"
            ) from error

    def _json(self, step: int, names: Sequence[str]) -> dict[str, Any]:
        read = self._orbax(step, **{name: ocp.args.JsonRestore() for name in names})
        try:
            return {name: _unseal(read.get(name)) for name in names}
        except ValueError as error:
            raise CorruptCheckpointError(
                f"checkpoint {self.directory / str(step)}: {error}; {self._others(step)}"
            ) from error

    def _restore_iterator(self, step: int, iterator: DataIterator) -> None:
        folder = self.directory / str(step) / "iterator"
        if not folder.is_dir():
            raise CheckpointStructureError(
                f"checkpoint {folder.parent} was saved without a data iterator; restore without one"
            )
        saved = len(list(folder.glob("process_*.json")))
        if saved and saved != jax.process_count():
            raise CheckpointStructureError(
                f"checkpoint {folder.parent} holds the iterators of {saved} processes, this run has "
                f"{jax.process_count()}; resume with as many, or restore without the iterator"
            )
        state = _IteratorState()
        self._orbax(step, iterator=grain.checkpoint.CheckpointRestore(state))
        try:
            state.apply(iterator)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptCheckpointError(
                f"checkpoint {folder.parent}: the iterator's state does not fit ({error})"
            ) from error


def _forget_abandoned_reads() -> None:
    """Lets asyncio drop the reads that orbax left behind without printing each one's traceback over our error."""
    logger = logging.getLogger("asyncio")
    disabled, logger.disabled = logger.disabled, True
    try:
        gc.collect()
    finally:
        logger.disabled = disabled


def _check_config(where: str, saved: Any, wanted: Any, ignore: Sequence[str]) -> None:
    old, new = flatten(saved or {}), flatten(wanted)
    differing = [
        f"{key} ({repr(old[key]) if key in old else 'absent'} saved, {repr(new[key]) if key in new else 'absent'} now)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, _ABSENT) != new.get(key, _ABSENT) and not any(fnmatch.fnmatch(key, glob) for glob in ignore)
    ]
    if differing:
        raise CheckpointConfigError(
            f"{where} was made by another config: {'; '.join(differing)}. "
            "Use the saved config, another folder, or ignore these keys"
        )


_ABSENT = object()


def _check_structure(where: str, named: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    problems = [f"no {name!r} in it" for name in named if name not in manifest]
    problems += [f"{name!r} is not in the target" for name in manifest if name not in named]
    for name, leaf in named.items():
        if name in manifest:
            shape, dtype = _key_data_shape(leaf) if _is_key(leaf) else (leaf.shape, leaf.dtype)
            entry = manifest[name]
            if _is_key(leaf) != ("key" in entry):
                problems.append(
                    f"{name!r} is {'a random key' if 'key' in entry else 'an array'} there and not in the target"
                )
            elif tuple(entry["shape"]) != tuple(shape) or entry["dtype"] != str(jnp.dtype(dtype)):
                problems.append(
                    f"{name!r} is {entry['dtype']}{entry['shape']}, the target {jnp.dtype(dtype)}{list(shape)}"
                )
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointStructureError(f"{where} does not fit the target: {'; '.join(problems[:5])}{more}")


def restore(
    directory: PathLike,
    target: Any,
    *,
    step: int | None = None,
    config: Any = None,
    ignore: Sequence[str] = (),
    prefix: str = "",
) -> Restored:
    """Reads one checkpoint without changing the folder; see `Checkpoints.restore`."""
    with Checkpoints(directory, config=config, read_only=True) as checkpoints:
        return checkpoints.restore(target, step=step, ignore=ignore, prefix=prefix)


def restore_params(directory: PathLike, target: Any, *, step: int | None = None, averaged: bool = False) -> Restored:
    """Reads the parameters of a TrainState alone: into the tree `target` (e.g. `moe.params.abstract(specs)`).

    Args:
        averaged: the exponential moving average instead of the raw parameters.
    """
    return restore(directory, target, step=step, prefix="ema_params/" if averaged else "params/")


def describe(directory: PathLike, step: int | None = None) -> tuple[int, Any, Any]:
    """(step, config, extra) of the newest or the given checkpoint in a folder."""
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.describe(step)
