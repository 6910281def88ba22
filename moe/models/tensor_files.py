"""Tensors of a Hugging Face directory: one or several safetensors files behind one mapping, read slice by slice.

The files are memory-mapped: reading a tensor touches its own bytes only, and its pages are given back when the next one
is asked for. The `safetensors` package writes; its numpy reader has no 8-bit floats (0.8), so that the bytes are viewed
here, with ml_dtypes.
"""

import json
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


class TensorFileError(ValueError):
    """Weight files that cannot be read as they are. The message names the file and the remedy."""


def _ends(offsets: Any) -> tuple[int, int]:
    first, last = offsets
    return int(first), int(last)


class TensorFiles(Mapping[str, np.ndarray]):
    """name -> array (a view of the mapped file) over all safetensors files of a directory.

    A view stays good after other tensors are asked for; reading it again then reads the file again.

    Raises:
        TensorFileError: no weights, a file named by the index that is missing, a truncated or damaged file, a tensor
            that the index places in a file that lacks it.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = pathlib.Path(directory)
        self._where: dict[str, tuple[mmap.mmap, np.dtype, tuple[int, ...], int]] = {}
        self._touched: mmap.mmap | None = None
        index = self.directory / INDEX
        if index.is_file():
            try:
                placed = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise TensorFileError(f"{index} is no index of safetensors files ({error}); fetch it again") from error
            files = sorted(set(placed.values()))
        else:
            placed, files = {}, [SINGLE]
        for name in files:
            self._open(self.directory / name, named_by_index=bool(placed))
        lost = [name for name in placed if name not in self._where]
        if lost:
            raise TensorFileError(
                f"{index} places {lost[0]!r} in {placed[lost[0]]!r}, which lacks it ({len(lost)} such tensors); the "
                "files and the index are of different checkpoints: fetch them again"
            )

    def _open(self, path: pathlib.Path, *, named_by_index: bool) -> None:
        if not path.is_file():
            source = f"named by {INDEX}" if named_by_index else f"and no {INDEX} either"
            raise TensorFileError(f"no file {path}, {source}; fetch the checkpoint's weights")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if 8 + length > size:
                raise TensorFileError(f"{path} of {size} bytes ends inside its header; fetch it again")
            try:
                header = json.loads(file.read(length))
                header.pop("__metadata__", None)
                entries = {
                    str(name): (str(entry["dtype"]), tuple(map(int, entry["shape"])), *_ends(entry["data_offsets"]))
                    for name, entry in header.items()
                }
                end = max((entry[3] for entry in entries.values()), default=0)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise TensorFileError(f"{path} has no safetensors header ({error}); fetch it again") from error
        if 8 + length + end != size:
            raise TensorFileError(
                f"{path} holds {size} bytes, its header describes {8 + length + end}: it is truncated or damaged; "
                "fetch it again"
            )
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for name, (code, shape, first, last) in entries.items():
            if code not in _DTYPES:
                raise TensorFileError(f"{path}: {name!r} is of dtype {code!r}, known: {', '.join(_DTYPES)}")
            dtype = np.dtype(_DTYPES[code])
            if first < 0 or min(shape, default=1) < 0 or last - first != dtype.itemsize * math.prod(shape):
                raise TensorFileError(
                    f"{path}: {name!r} of shape {shape} {dtype} lies at bytes {first} to {last}; fetch it again"
                )
            self._where[name] = (data, dtype, shape, 8 + length + first)

    def __getitem__(self, name: str) -> np.ndarray:
        # Whole files, because the kernel maps pages beside those that are read. The system still has them cached.
        if self._touched is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._touched.madvise(mmap.MADV_DONTNEED)
        data, dtype, shape, start = self._where[name]
        self._touched = data
        raw = np.frombuffer(data, np.uint8)[start : start + math.prod(shape) * dtype.itemsize]
        aligned = raw if start % dtype.itemsize == 0 else raw.copy()
        return aligned.view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where


def write(directory: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], *, shard_bytes: int) -> dict[str, Any]:
    """Writes tensors as they come into files of at most `shard_bytes` (or one tensor), and the index.

    Host memory stays near one file. Returns the index ({} when one file holds all).
    """
    parts: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        if held:
            path = directory / f"part-{len(parts):05d}.safetensors"
            safetensors.numpy.save_file(held, path, metadata={"format": "pt"})
            parts.append(list(held))
            held, size = {}, 0

    for name, array in tensors:
        if held and size + array.nbytes > shard_bytes:
            flush()
        held[name] = np.ascontiguousarray(array)
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    if len(parts) == 1:
        (directory / "part-00000.safetensors").rename(directory / SINGLE)
        return {}
    placed = {}
    for number, names in enumerate(parts):
        final = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (directory / f"part-{number:05d}.safetensors").rename(directory / final)
        placed |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (directory / INDEX).write_text(json.dumps(index, indent=2))
    return index
