"""What the benchmarks share: processes of peers, and candidates timed in turns."""

import json
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")


def cpu_model() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seconds(call: Callable[[], Any]) -> float:
    """Wall seconds until what `call` returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def interleave(candidates: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What every candidate returns in each of `rounds`, in turns, after a round that is not counted."""
    found: dict[str, list[T]] = {name: [] for name in candidates}
    for counted in [False] + [True] * rounds:
        for name, run in candidates.items():
            answer = run()
            if counted:
                found[name].append(answer)
    return found


def middle(values: Sequence[float], digits: int = 3) -> str:
    """`median (least-most)` in significant digits."""
    shown = [f"{float(f'{v:.{digits}g}'):,.10g}" for v in (np.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]}-{shown[2]})"


def has_modules(python: str, *names: str) -> bool:
    """Whether this interpreter finds the modules."""
    code = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {names!r})))"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


class Peer:
    """`script` in a process of its own, which answers a line of JSON when it is ready (`about`) and to every line.

    Args:
        setup: what the script finds in the file that it is started with, `path`; its log is written beside that.

    Raises:
        RuntimeError: the process ended; with the end of its log.
    """

    def __init__(self, python: str, script: pathlib.Path, setup: Mapping[str, Any], path: pathlib.Path):
        path.write_text(json.dumps(setup))
        self._name = script.name
        self._log = open(path.with_suffix(".log"), "w+")  # closed in close()
        self._process = subprocess.Popen(
            [python, str(script), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        try:
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, question: Any) -> dict[str, Any]:
        """The answer to a question, which is sent as JSON."""
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self._name} ended with {self._process.wait()}:\n{self._log.read()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process; waits for it."""
        self._process.kill()
        self._process.wait()
        self._log.close()
