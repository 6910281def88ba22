"""A process that loads a checkpoint and prints what it needed: python -m tests.moe.load_memory_run FOLDER

One line of JSON, bytes: `parameters`, and `above`, the peak of the resident set (file pages that are mapped count)
during the load, above the resident set before it. The first load compiles and is not measured.
"""

import ctypes
import gc
import json
import pathlib
import sys

import jax

from moe import params as parameters
from moe.models import hf


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at the peak since the last reset."""
    key = "VmHWM:" if peak else "VmRSS:"
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def main(folder: str) -> None:
    jax.block_until_ready(hf.load(folder)[0])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident()
    params, _ = hf.load(folder)
    jax.block_until_ready(params)
    print(json.dumps({"parameters": parameters.nbytes(params), "above": resident(peak=True) - before}))


if __name__ == "__main__":
    main(sys.argv[1])
