"""Runs Python that a model wrote: no network, no sight of the machine, limits of time, memory, output and processes.

    result = run("print(6 * 7)", seconds=5)                  # Result(status="ok", stdout="42\\n", ...)
    with Session() as session:                                # state lasts between calls
        session.run("x = 20")
        session.run("x + 1").stdout                           # "21\\n"
    with Pool(workers=2) as pool:
        results = pool.map(programs)

With bubblewrap (`apt install bubblewrap`) a program gets namespaces of its own: it sees the standard library read-only,
an empty file system in memory, no network, no other process, and dies as a whole. Without it (`isolation="limits"`)
there are only resource limits and a clean environment: *that is no security boundary*, and says so when it is used.

Results are data: whatever a program does, the caller gets a `Result`. What the limits are worth is tested in
tests/rl/test_sandbox.py (fork bombs, memory bombs, endless output, ...). Choices of limits and statuses are ours.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rl.errors import RLError

STATUSES = ("ok", "error", "timeout", "memory", "output", "killed")
_MEMORY_EXIT = 97  # what the child says after a MemoryError that nobody caught
_NOBODY = 65_534
_POLL = 0.02


class SandboxError(RLError):
    """A sandbox that cannot be made, or a session that has ended."""


class SandboxWarning(UserWarning):
    """Programs run without isolation."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one call.

    Attributes:
        seconds: wall-clock time, and of the processor.
        memory_mb: of each process's address space, and of what all of them hold together.
        output_bytes: of stdout and stderr together.
        disk_mb: of files, which lie in memory.
        processes: of processes and threads.
        packages: the installed packages can be imported, read-only; otherwise the standard library alone.
    """

    seconds: int | float = 10.0
    memory_mb: int = 512
    output_bytes: int = 1 << 16
    disk_mb: int = 64
    processes: int = 32
    packages: bool = False

    def __post_init__(self):
        for name in ("seconds", "memory_mb", "output_bytes", "disk_mb", "processes"):
            if not getattr(self, name) > 0:
                raise SandboxError(f"{name}={getattr(self, name)} must be positive")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a program did.

    Attributes:
        status: "ok", exit 0; "error", another exit, an exception for instance; "timeout"; "memory", an uncaught
            MemoryError or more held than allowed; "output", more written than allowed; "killed", by a signal or for too
            many processes.
        stdout, stderr: up to the limit; what is no UTF-8 is replaced.
        seconds: wall-clock time.
        returncode: of the interpreter, -n for signal n; None where the sandbox ended it.
        isolation: "bubblewrap" or "limits".
    """

    status: str
    stdout: str
    stderr: str
    seconds: float
    returncode: int | None
    isolation: str

    @property
    def ok(self) -> bool:
        return self.status == "ok"


@functools.cache
def available_isolation() -> str:
    """ "bubblewrap" where it is installed and works (user namespaces may be forbidden), else "limits"."""
    if shutil.which("bwrap") is None:
        return "limits"
    command = ["bwrap", "--unshare-all", "--unshare-user", "--ro-bind", "/", "/", "true"]
    done = subprocess.run(command, capture_output=True, timeout=30)
    return "limits" if done.returncode else "bubblewrap"


def run(
    code: str,
    *,
    stdin: str = "",
    files: Mapping[str, str | bytes] | None = None,
    isolation: str | None = None,
    **limits: Any,
) -> Result:
    """Runs a program as `__main__` in an empty directory of its own.

    Args:
        code: Python source.
        stdin: what it reads.
        files: {relative path: content} that it finds there.
        isolation: "bubblewrap" or "limits"; the best there is by default.
        limits: of `Limits`.

    Raises:
        SandboxError: an isolation that is not available, or a file outside the directory.
    """
    bounds = Limits(**limits)
    with _launch(_SCRIPT, {**(files or {}), "main.py": code}, bounds, isolation) as child:
        threading.Thread(target=_feed, args=(child.process.stdin, stdin.encode()), daemon=True).start()
        reason = child.watch(bounds)
        return child.result(reason)


class Session:
    """An interpreter whose state lasts between calls. A call that is ended for a limit ends the session.

    Args:
        isolation: as for `run`.
        limits: `Limits` of every call; memory, disk and processes of the whole session.
    """

    def __init__(self, *, isolation: str | None = None, **limits: Any):
        self.limits = Limits(**limits)
        self._isolation = isolation
        self._stack = contextlib.ExitStack()
        self.ended: str | None = None
        self._start()

    def _start(self) -> None:
        self._child = self._stack.enter_context(_launch(_SERVER, {}, self.limits, self._isolation, channel=True))
        self.ended = None

    def run(self, code: str, *, seconds: int | float | None = None) -> Result:
        """Runs a piece of code; the value of a last expression is printed, as in a notebook.

        Raises:
            SandboxError: the session has ended; says why.
        """
        if self.ended is not None:
            raise SandboxError(f"the session ended with {self.ended!r} and its state is gone; call restart()")
        bounds = self.limits if seconds is None else dataclasses.replace(self.limits, seconds=seconds)
        result = self._child.call(code, bounds)
        if result.status not in ("ok", "error") or not self._child.alive:
            self.ended = result.status if result.status not in ("ok", "error") else "exit"
            self._stack.close()
        return result

    def restart(self) -> None:
        """Starts again with nothing."""
        self._stack.close()
        self._start()

    def close(self) -> None:
        self._stack.close()
        self.ended = self.ended or "close"

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pool:
    """Runs many programs, so many at a time, each in a sandbox of its own.

    Attributes:
        counts: {status: number of results so far}.
    """

    def __init__(self, workers: int = 2, *, isolation: str | None = None, **limits: Any):
        if workers < 1:
            raise SandboxError(f"workers={workers} must be at least 1")
        Limits(**limits)
        self._options = {"isolation": isolation, **limits}
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, "sandbox")
        self._lock = threading.Lock()
        self.counts: dict[str, int] = dict.fromkeys(STATUSES, 0)

    def submit(self, code: str, **options: Any) -> "concurrent.futures.Future[Result]":
        """A future of `run(code, ...)`; options override the pool's."""
        return self._threads.submit(self._run, code, {**self._options, **options})

    def map(self, programs: Sequence[str], *, stdins: Iterable[str] | None = None, **options: Any) -> list[Result]:
        """Results in order; `stdins`, one for each."""
        given = [""] * len(programs) if stdins is None else list(stdins)
        waiting = [self.submit(code, stdin=text, **options) for code, text in zip(programs, given, strict=True)]
        return [one.result() for one in waiting]

    def _run(self, code: str, options: dict[str, Any]) -> Result:
        result = run(code, **options)
        with self._lock:
            self.counts[result.status] += 1
        return result

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)


# ---- inside: what the child runs before the program
_LIMITS = """
import resource, sys
def _limit(name, value, more=0):
    number = getattr(resource, name)
    hard = resource.getrlimit(number)[1]
    value, most = (x if hard == resource.RLIM_INFINITY else min(x, hard) for x in (value, value + more))
    resource.setrlimit(number, (value, most))
_seconds, _memory, _disk, _processes, _site = {limits!r}
_limit("RLIMIT_CORE", 0)
_limit("RLIMIT_AS", _memory)
_limit("RLIMIT_FSIZE", _disk)
_limit("RLIMIT_NPROC", _processes)
_limit("RLIMIT_NOFILE", 256)
if _seconds: _limit("RLIMIT_CPU", _seconds, 1)
if _site: sys.path.append(_site)
import builtins
builtins.exit = builtins.quit = sys.exit
"""
_SCRIPT = (
    _LIMITS
    + """
sys.path.insert(0, "")
sys.argv = ["main.py"]
with open("main.py", "rb") as _file: _source = _file.read()
try:
    exec(compile(_source, "main.py", "exec"), {{"__name__": "__main__", "__file__": "main.py"}})
except SystemExit: raise
except MemoryError:
    _source = None
    print("MemoryError", file=sys.stderr)
    sys.stderr.flush()
    import os
    os._exit({memory})
except BaseException:
    import traceback
    kind, error, trace = sys.exc_info()
    traceback.print_exception(kind, error, trace.tb_next or trace)
    sys.exit(1)
"""
)
_SERVER = (
    _LIMITS
    + """
sys.path.insert(0, "")
import ast, json, os, traceback
_requests, _replies = (os.fdopen(int(fd), mode) for fd, mode in zip(os.environ.pop("SANDBOX_CHANNEL").split(), "rw"))
def _serve():
    space = {{"__name__": "__main__"}}
    for line in _requests:
        status = "ok"
        try:
            tree = ast.parse(json.loads(line), "<cell>")
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "<cell>", "exec"), space)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), space)
                if value is not None: print(repr(value))
        except SystemExit: raise
        except MemoryError:
            status = "memory"
            print("MemoryError", file=sys.stderr)
        except BaseException:
            status = "error"
            kind, error, trace = sys.exc_info()
            traceback.print_exception(kind, error, trace.tb_next or trace)
            del kind, error, trace
        sys.stdout.flush()
        sys.stderr.flush()
        print(status, file=_replies, flush=True)
_serve()
"""
)


# ---- outside
def _as_nobody() -> dict[str, Any]:
    """Root gives up its rights for a program without namespaces, where the interpreter is readable without them."""
    base = pathlib.Path(sys.base_prefix).resolve()
    if os.geteuid() == 0 and all(path.stat().st_mode & 0o005 == 0o005 for path in (base, *base.parents)):
        return {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
    return {}


@functools.cache
def _controllers() -> dict[str, pathlib.Path]:
    """{"pids": folder, "memory": folder} of control groups that this process may make groups in."""
    found: dict[str, pathlib.Path] = {}
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            for name in names.split(",") if names else ["pids", "memory"]:
                root = pathlib.Path("/sys/fs/cgroup") / (name if names else "")
                base = next((x for x in (root / path.lstrip("/"), root) if (x / "cgroup.procs").exists()), None)
                if name in ("pids", "memory") and name not in found and base is not None and _may_group(base, name):
                    found[name] = base
    return found


def _may_group(base: pathlib.Path, name: str) -> bool:
    trial = base / f"sandbox-trial-{os.getpid()}-{name}"
    try:
        trial.mkdir()
    except OSError:
        return False
    try:
        return any((trial / file).exists() for file in _BOUNDS[name])
    finally:
        trial.rmdir()


_BOUNDS = {"pids": ("pids.max",), "memory": ("memory.limit_in_bytes", "memory.max")}
_numbers = itertools.count()


class _Group:
    """Control groups of one sandbox: the kernel holds its memory and number of processes, where it lets us ask it to;
    elsewhere `_Child.watch` looks after them.
    """

    def __init__(self, bounds: Limits):
        self.folders: dict[str, pathlib.Path] = {}
        name = f"sandbox-{os.getpid()}-{next(_numbers)}"
        # bubblewrap itself takes three processes; files lie in memory
        values = {"pids": bounds.processes + 3, "memory": (bounds.memory_mb + bounds.disk_mb + 16) << 20}
        for controller, base in _controllers().items():
            with contextlib.suppress(OSError):
                folder = base / name
                folder.mkdir(exist_ok=True)
                self.folders[controller] = folder
                file = next(folder / file for file in _BOUNDS[controller] if (folder / file).exists())
                file.write_text(str(values[controller]))

    def entered(self, command: list[str]) -> list[str]:
        """A command line that runs another one in the groups."""
        if not self.folders:
            return command
        into = " ".join(f"'{folder}/cgroup.procs'" for folder in set(self.folders.values()))
        return ["/bin/sh", "-c", f'for g in {into}; do echo $$ > "$g"; done; exec "$@"', "sh", *command]

    def ran_out(self) -> bool:
        """Whether the kernel ended a process for memory."""
        for file in ("memory.oom_control", "memory.events"):
            path = self.folders.get("memory", pathlib.Path()) / file
            with contextlib.suppress(OSError):
                counts = dict(line.split() for line in path.read_text().splitlines())
                return int(counts.get("oom_kill", 0)) > 0
        return False

    def remove(self) -> None:
        deadline = time.monotonic() + 5
        for folder in set(self.folders.values()):
            while folder.exists() and time.monotonic() < deadline:
                try:
                    folder.rmdir()
                except OSError:  # until the last process is gone
                    time.sleep(0.005)


def _system() -> list[str]:
    """Read-only folders that an interpreter needs, as arguments of bubblewrap."""
    out: list[str] = []
    for name in ("/usr", "/lib", "/lib64", "/bin"):
        path = pathlib.Path(name)
        if path.is_symlink():
            out += ["--symlink", os.readlink(path), name]
        elif path.exists():
            out += ["--ro-bind", name, name]
    base = str(pathlib.Path(sys.base_prefix).resolve())
    if not base.startswith("/usr"):
        out += ["--ro-bind", base, base]
    for name in ("/etc/ld.so.cache", "/etc/alternatives"):
        if pathlib.Path(name).exists():
            out += ["--ro-bind", name, name]
    return out


@contextlib.contextmanager
def _launch(
    program: str, files: Mapping[str, str | bytes], bounds: Limits, isolation: str | None, *, channel: bool = False
) -> "Iterator[_Child]":
    best = available_isolation()
    isolation = best if isolation is None else isolation
    if isolation not in ("bubblewrap", "limits"):
        raise SandboxError(f"isolation {isolation!r} is not one of 'bubblewrap', 'limits'")
    if isolation == "bubblewrap" and best != isolation:
        raise SandboxError("bubblewrap is missing or may not make namespaces here; install it, or isolation='limits'")
    if isolation == "limits":
        warnings.warn(
            "programs run with resource limits only, which is no security boundary; install bubblewrap",
            SandboxWarning,
            stacklevel=4,
        )
    for name in files:
        if pathlib.PurePosixPath(name).is_absolute() or ".." in pathlib.PurePosixPath(name).parts:
            raise SandboxError(f"file {name!r} must lie in the program's directory")
    site = sysconfig.get_paths()["purelib"] if bounds.packages else ""
    inside = "/site" if site and isolation == "bubblewrap" else site
    # a session's calls add up, so that only the wall clock bounds each
    cpu = 0 if channel else int(bounds.seconds) + 1
    limits = (cpu, bounds.memory_mb << 20, bounds.disk_mb << 20, bounds.processes, inside)
    script = program.format(limits=limits, memory=_MEMORY_EXIT)
    python = str(pathlib.Path(sys.executable).resolve())
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/work", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        fds: list[int] = []
        ours: list[int] = []
        if channel:
            (there, here_out), (here_in, back) = os.pipe(), os.pipe()
            fds, ours = [there, back], [here_in, here_out]
            stack.callback(_close, [there, back, here_in, here_out])
            environment["SANDBOX_CHANNEL"] = f"{there} {back}"
        if isolation == "bubblewrap":
            command = [
                "bwrap", "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
                "--uid", str(_NOBODY), "--gid", str(_NOBODY), "--hostname", "sandbox", "--clearenv",
            ]  # fmt: skip
            command += [part for item in environment.items() for part in ("--setenv", *item)]
            command += [*_system(), "--proc", "/proc", "--dev", "/dev"]
            command += ["--size", str(bounds.disk_mb << 20), "--tmpfs", "/work", "--size", "1048576", "--tmpfs", "/tmp"]
            if site:
                command += ["--ro-bind", site, "/site"]
            for name, content in files.items():
                fd = _in_memory(content)
                fds.append(fd)
                stack.callback(_close, [fd])
                for parent in list(pathlib.PurePosixPath(name).parents)[-2::-1]:
                    command += ["--dir", f"/work/{parent}"]
                command += ["--file", str(fd), f"/work/{name}"]
            command += ["--chdir", "/work", python, "-I", "-S", "-c", script]
            where = "/"
            user = {}
        else:
            user = _as_nobody()
            where = stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True))
            environment["HOME"] = where
            for name, content in files.items():
                path = pathlib.Path(where) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            if user:
                for path in [pathlib.Path(where), *pathlib.Path(where).rglob("*")]:
                    os.chown(path, _NOBODY, _NOBODY)
            command = [python, "-I", "-S", "-c", script]
        pipes: dict[str, Any] = {
            "stdin": subprocess.DEVNULL if channel else subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        group = _Group(bounds)
        stack.callback(group.remove)
        process = subprocess.Popen(
            group.entered(command), cwd=where, env=environment, pass_fds=fds, start_new_session=True, **pipes, **user
        )
        child = _Child(process, isolation, ours, bounds.output_bytes, group)
        stack.callback(child.end)
        if channel:
            _close(fds[:2])
        yield child


class _Child:
    """A running sandbox: its output so far, and what ends it."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", isolation: str, channel: list[int], most: int, group: _Group
    ):
        self.process, self.isolation, self.channel = process, isolation, channel
        self.started = time.monotonic()
        self.most, self.group = most, group
        self.streams = [process.stdout, process.stderr]
        self.output = [bytearray(), bytearray()]
        for stream in self.streams:
            assert stream is not None
            os.set_blocking(stream.fileno(), False)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def watch(self, bounds: Limits, *, until_reply: bool = False) -> str | None:
        """Reads what the program writes until it ends (or replies, for a session); why it was stopped, or None."""
        deadline = time.monotonic() + bounds.seconds
        looked = 0.0
        opened = [stream for stream in self.streams if stream is not None and not stream.closed]
        while opened or self.alive:
            now = time.monotonic()
            if now > deadline:
                return self._stop("timeout")
            if now - looked > _POLL:
                looked = now
                if (reason := self._excess(bounds)) is not None:
                    return self._stop(reason)
            sources: list[Any] = [*opened, *(self.channel[:1] if until_reply else [])]
            ready, _, _ = select.select(sources, [], [], min(_POLL, max(deadline - now, 0)))
            for source in ready:
                if source in opened and not self._read(source):
                    opened.remove(source)
            if sum(map(len, self.output)) > bounds.output_bytes:
                return self._stop("output")
            if until_reply and self.channel[0] in ready:
                return None
            if not opened and until_reply:
                self.process.wait(max(deadline - now, _POLL))
                return None
            if not ready and not self.alive and not until_reply:
                # the interpreter is gone; without namespaces something it left behind may hold the pipes
                return None
        return None

    def call(self, code: str, bounds: Limits) -> Result:
        """One piece of a session."""
        self.started = time.monotonic()
        self.output = [bytearray(), bytearray()]
        writer = threading.Thread(target=_send, args=(self.channel[1], json.dumps(code) + "\n"), daemon=True)
        writer.start()
        reason = self.watch(bounds, until_reply=True)
        if reason is not None:
            return self.result(reason)
        ready, _, _ = select.select(self.channel[:1], [], [], 0)
        said = os.read(self.channel[0], 64).decode(errors="replace").strip() if ready else ""
        if not said:  # it has left
            return self.result(None)
        while any(self._rest(stream, bounds) for stream in self.streams):
            pass
        if sum(map(len, self.output)) > bounds.output_bytes:
            return self.result(self._stop("output"))
        # a program that writes to the channel itself spoils its own session only
        status = said if said in ("ok", "error", "memory") else "error"
        return self._as_result(status, None)

    def result(self, reason: str | None) -> Result:
        if reason is not None:
            return self._as_result(reason, None)
        code = self.process.wait()
        if self.isolation == "bubblewrap" and code > 128:
            code = 128 - code
        if code == _MEMORY_EXIT or (code != 0 and self.group.ran_out()):
            return self._as_result("memory", code)
        if code == -signal.SIGXCPU:
            return self._as_result("timeout", code)
        return self._as_result("ok" if code == 0 else "killed" if code < 0 else "error", code)

    def end(self) -> None:
        """Ends everything that may be left, and frees what is ours."""
        self._stop("end")
        for stream in (self.process.stdin, *self.streams):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _as_result(self, status: str, code: int | None) -> Result:
        out, err = (bytes(x[: self.most]).decode(errors="replace") for x in self.output)
        return Result(status, out, err, time.monotonic() - self.started, code, self.isolation)

    def _read(self, stream: Any) -> bool:
        """Takes some of what is there; whether more may come."""
        try:
            found = os.read(stream.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        self.output[self.streams.index(stream)] += found
        return bool(found)

    def _rest(self, stream: Any, bounds: Limits) -> bool:
        """Takes some of what a call left in a pipe; whether it got any and may take more."""
        before = sum(map(len, self.output))
        return before <= bounds.output_bytes and self._read(stream) and sum(map(len, self.output)) > before

    def _excess(self, bounds: Limits) -> str | None:
        """Whether the processes together hold too much or are too many."""
        held, most = 0, bounds.processes + 2
        pids = _descendants(self.process.pid, most)
        if len(pids) > most:
            return "killed"
        for pid in pids:
            try:
                fields = pathlib.Path(f"/proc/{pid}/statm").read_bytes().split()
            except OSError:
                continue
            held += (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")
        return "memory" if held > bounds.memory_mb << 20 else None

    def _stop(self, reason: str) -> str:
        left = _descendants(self.process.pid) if self.isolation == "limits" else []
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in left:  # those that made a session of their own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return reason


def _descendants(pid: int, most: int = 10_000) -> list[int]:
    """All processes below one; where they are more, some of more than `most`."""
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        try:
            threads = os.listdir(f"/proc/{parent}/task")
            for thread in threads:
                children = pathlib.Path(f"/proc/{parent}/task/{thread}/children").read_text().split()
                waiting += map(int, children)
                found += map(int, children)
        except OSError:
            continue
        if len(found) > most:
            break
    return found


def _in_memory(content: str | bytes) -> int:
    fd = os.memfd_create("sandbox")
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _feed(pipe: Any, content: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):
        pipe.write(content)
        pipe.close()


def _send(fd: int, text: str) -> None:
    with contextlib.suppress(OSError):
        data = text.encode()
        while data:
            data = data[os.write(fd, data) :]


def _close(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
