"""Runs that are killed, terminated or split over processes: the loss curve must not show it.

Each run is a process of its own (tests/moe/regression_run.py) whose metrics.jsonl has a row for every step.
"""

import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from moe import checkpoint, training

STEPS = 150
SCRIPT = pathlib.Path(__file__).parent / "regression_run.py"


def start(directory, *arguments) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    command = [sys.executable, str(SCRIPT), "--directory", str(directory), "--steps", str(STEPS), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors[-3000:]
    return errors


def curve(directory) -> list[dict]:
    """Everything logged but the clock."""
    rows = training.read_metrics(directory / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key != "steps_per_second"} for row in rows]


def wait_for_rows(directory, count, process) -> None:
    deadline = time.monotonic() + 240
    path = directory / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and len(training.read_metrics(path)) >= count:
            return
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1][-3000:])
        time.sleep(0.005)
    raise AssertionError(f"{directory} never logged {count} rows")


def arrays(directory, step=None):
    """Every array of a checkpoint by name, and its digest, as saved."""
    with checkpoint.Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints._existing(step)
        return step, checkpoints._json(step, ("manifest",))["manifest"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run that nobody interrupts."""
    directory = tmp_path_factory.mktemp("undisturbed")
    finish(start(directory))
    return directory


def test_sigkill_at_random_moments_leaves_the_curve_bit_identical(undisturbed, tmp_path):
    """Killed three times at random moments of the training; a checkpoint is often under way, since one is due every 7
    steps.
    """
    moments = random.Random(time.time_ns())
    killed_at = []
    for _ in range(3):
        logged = len(curve(tmp_path))
        process = start(tmp_path)
        # More rows than any earlier run left, so that this one has restored (and cut the rows back) and is on its way.
        wait_for_rows(tmp_path, logged + moments.randint(1, 30), process)
        time.sleep(moments.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        killed_at.append(len(curve(tmp_path)))
    assert max(killed_at) < STEPS
    finish(start(tmp_path))
    assert len(curve(undisturbed)) == STEPS
    assert curve(tmp_path) == curve(undisturbed), killed_at
    assert arrays(tmp_path) == arrays(undisturbed), killed_at
    assert not list((tmp_path / "checkpoints").glob("*tmp*")), "nothing half-written is left"


def test_sigterm_saves_and_exits_and_the_same_command_goes_on(undisturbed, tmp_path):
    process = start(tmp_path, "--checkpoint-every", 100_000)
    wait_for_rows(tmp_path, 20, process)
    process.send_signal(signal.SIGTERM)
    errors = finish(process, training.SIGTERM_EXIT_CODE)
    assert "the same command goes on from here" in errors
    assert "Traceback" not in errors
    stopped = len(curve(tmp_path))
    assert 20 <= stopped < STEPS
    assert arrays(tmp_path)[0] == stopped, "the step at which it stopped is on disk although no checkpoint was due"
    finish(start(tmp_path, "--checkpoint-every", 100_000))
    assert curve(tmp_path) == curve(undisturbed)
    assert arrays(tmp_path) == arrays(undisturbed)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_pair(directory, *arguments):
    address = f"127.0.0.1:{free_port()}"
    common = ("--devices", 2, "--coordinator", address, "--processes", 2, *arguments)
    return [start(directory, *common, "--process", index) for index in (0, 1)]


def test_two_processes_train_like_one_and_stop_together(undisturbed, tmp_path):
    """Data parallel x FSDP over 2 processes x 2 devices gives the curve of one device; SIGTERM to one process stops
    both at one step.
    """
    pair = start_pair(tmp_path, "--checkpoint-every", 100_000)
    wait_for_rows(tmp_path, 10, pair[0])
    pair[1].send_signal(signal.SIGTERM)
    for process in pair:
        finish(process, training.SIGTERM_EXIT_CODE)
    step, _ = arrays(tmp_path)
    assert 10 <= step == len(curve(tmp_path)) < STEPS
    for process in start_pair(tmp_path):
        finish(process)
    got, want = ([(row["loss"], row["grad_norm"]) for row in curve(directory)] for directory in (tmp_path, undisturbed))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    shapes = [
        {name: entry["shape"] for name, entry in arrays(directory)[1].items()} for directory in (tmp_path, undisturbed)
    ]
    assert shapes[0] == shapes[1]
