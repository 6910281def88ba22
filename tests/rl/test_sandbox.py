"""What a program may not do: every attack ends within its limits, is reported, and leaves nothing behind."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from rl.sandbox import STATUSES, Limits, Pool, SandboxError, SandboxWarning, Session, available_isolation, run

isolated = pytest.mark.skipif(
    available_isolation() != "bubblewrap", reason="needs bubblewrap and user namespaces (apt install bubblewrap)"
)
ways = pytest.mark.parametrize("isolation", [pytest.param("bubblewrap", marks=isolated), "limits"])
pytestmark = pytest.mark.filterwarnings("ignore::rl.sandbox.SandboxWarning")


@ways
def test_a_program_reads_writes_and_ends(isolation):
    code = "import sys\nprint(sys.stdin.read().upper(), open('data/in.txt').read())\nprint('e', file=sys.stderr)"
    result = run(code, stdin="abc", files={"data/in.txt": "given"}, isolation=isolation)
    assert (result.status, result.stdout, result.stderr, result.returncode) == ("ok", "ABC given\n", "e\n", 0)
    assert result.isolation == isolation
    wrong = run("def f():\n    raise KeyError('k')\nf()", isolation=isolation)
    assert wrong.status == "error"
    assert wrong.stderr.splitlines()[-1] == "KeyError: 'k'"
    assert 'File "main.py", line 3' in wrong.stderr.splitlines()[1], "the sandbox's own frames are not shown"
    assert run("import sys; sys.exit(3)", isolation=isolation).returncode == 3
    assert run("def f(:", isolation=isolation).status == "error"


ATTACKS = {
    "infinite loop": ("while True: pass", {"timeout"}),
    "sleep": ("import time; time.sleep(1e6)", {"timeout"}),
    "ignored signals": (
        "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: "
        "pass\nwhile True: time.sleep(1)",
        {"timeout"},
    ),
    "hang in C": ("import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')", {"timeout"}),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10 ** 7))", {"memory"}),
    "one huge block": ("x = bytearray(10 ** 11)", {"memory"}),
    "endless output": ("while True: print('x' * 1000)", {"output"}),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}),
    "deep recursion": ("def f(): f()\nf()", {"error"}),
    "recursion without limit": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(*a): return f(*map(str, a))\nf(1)",
        {"killed", "memory", "error", "timeout"},
    ),
    "crash": ("import ctypes; ctypes.string_at(0)", {"killed"}),
    "ten gigabytes": (
        "for i in range(1000):\n    with open(f'f{i}', 'wb') as f:\n        f.write(b'x' * 10 ** 7)",
        {"error", "killed", "timeout"},
    ),
}


@ways
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_attacks_end_within_their_limits_and_are_reported(name, isolation):
    code, expected = ATTACKS[name]
    if name == "ten gigabytes" and isolation == "limits":
        pytest.skip("without a file system of its own only single files are limited")
    before = time.monotonic()
    result = run(code, seconds=2, memory_mb=256, output_bytes=20_000, disk_mb=32, isolation=isolation)
    assert result.status in expected, result
    assert time.monotonic() - before < 2 + 2, "ended with its limit, up to starting and collecting"
    assert max(len(result.stdout), len(result.stderr)) <= 20_000


FORKS = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "threads": "import threading, time\nfor _ in range(5000): threading.Thread(target=time.sleep, args=(60,)).start()",
    "memory in many": (
        "import os, time\nfor _ in range(20):\n    if os.fork() == 0:\n        x = bytearray(80 * 2 ** 20); "
        "time.sleep(60)\ntime.sleep(60)"
    ),
}


@isolated
@pytest.mark.parametrize("name", sorted(FORKS))
def test_many_processes_end_together(name):
    mark = f"sandbox-{os.getpid()}-{name.replace(' ', '-')}"
    before = time.monotonic()
    result = run(f"mark = {mark!r}\n{FORKS[name]}", seconds=3, memory_mb=400, processes=24)
    assert result.status in ("killed", "memory", "error", "timeout"), result
    assert time.monotonic() - before < 3 + 3
    time.sleep(0.2)
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "SANDBOX" not in shown.upper() or mark not in shown, "something is left"


OUTSIDE = {
    "network": "import socket\nsocket.create_connection(('1.1.1.1', 53), timeout=1)",
    "name service": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "loopback of the host": "import socket\ns = socket.socket()\ns.settimeout(1)\ns.connect(('127.0.0.1', {port}))",
    "home": "open({secret!r}).read()",
    "checkout": "open({file!r}).read()",
    "shadow": "open('/etc/shadow').read()",
    "writing to the system": "open('/usr/x', 'w')",
    "mounting": (
        "import ctypes, sys\nc = ctypes.CDLL(None, use_errno=True)\n"
        "sys.exit(0 if c.mount(b'none', b'/work', b'tmpfs', 0, None) == 0 else 1)"
    ),
    "other processes": "import os, sys\nsys.exit(sum(p.isdigit() for p in os.listdir('/proc')) > 3)",
}


@isolated
@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_nothing_outside_can_be_reached(name):
    with socket.socket() as server, tempfile.NamedTemporaryFile(dir=pathlib.Path.home()) as secret:
        server.bind(("127.0.0.1", 0))
        server.listen()
        code = OUTSIDE[name].format(port=server.getsockname()[1], secret=secret.name, file=__file__)
        result = run(code, seconds=5)
    if name == "other processes":
        assert result.status == "ok", result
    else:
        assert result.status == "error", result


@isolated
def test_killing_everyone_in_sight_hurts_nobody():
    attempt = "    try: os.kill(pid, 9)\n    except OSError: pass"
    code = f"import os\nfor pid in (os.getppid(), 1, -1):\n{attempt}\nprint('here')"
    result = run(code, seconds=3)
    assert result.status in ("ok", "killed")
    assert run("print(1)").ok


@ways
def test_a_session_keeps_its_state(isolation):
    with Session(isolation=isolation, seconds=5, output_bytes=5000) as session:
        assert session.run("x = 20\ndef f(y):\n    return x + y").status == "ok"
        assert session.run("f(1)").stdout == "21\n"
        failed = session.run("print('so far'); f(None)")
        assert (failed.status, failed.stdout) == ("error", "so far\n")
        assert "TypeError" in failed.stderr
        assert session.run("x").stdout == "20\n", "an error ends nothing"
        assert session.run("import os; os.write(1, b'raw')").stdout.startswith("raw")
        late = session.run("import time; time.sleep(60)", seconds=0.5)
        assert late.status == "timeout"
        assert 0.4 < late.seconds < 3
        with pytest.raises(SandboxError, match="ended with 'timeout' and its state is gone"):
            session.run("x")
        session.restart()
        assert "NameError" in session.run("x").stderr
        assert session.run("while True: print('x' * 100)").status == "output"
        session.restart()
        assert session.run("import os; os._exit(5)").status == "error"
        assert session.ended == "exit"


@isolated
def test_packages_are_there_when_asked_for():
    assert "ModuleNotFoundError" in run("import numpy").stderr
    result = run("import numpy as np; print(np.arange(4).sum())", packages=True, memory_mb=1024)
    assert result.stdout == "6\n", result


def test_programs_without_isolation_are_warned_of():
    with pytest.warns(SandboxWarning, match="no security boundary"):
        assert run("print(1)", isolation="limits").ok


def test_bad_settings_are_named():
    with pytest.raises(SandboxError, match="seconds=0 must be positive"):
        run("", seconds=0)
    with pytest.raises(SandboxError, match="isolation 'chroot'"):
        run("", isolation="chroot")
    with pytest.raises(SandboxError, match=r"'\.\./x' must lie"):
        run("", files={"../x": ""})
    with pytest.raises(SandboxError, match="workers=0"):
        Pool(0)
    with pytest.raises(TypeError, match="memory"):
        Pool(1, memory=5)
    assert Limits().seconds == 10


def storm(count: int) -> None:
    """Programs good and bad, side by side; the pool answers each, and no descriptor or process is left."""
    kinds = [
        "print(6 * 7)",
        "1 / 0",
        "x = bytearray(10 ** 11)",
        "while True: print('x' * 1000)",
        "import os; os.abort()",
    ]
    wanted = ["ok", "error", "memory", "output", "killed"]
    opened = len(os.listdir("/proc/self/fd"))
    with Pool(2, seconds=10, memory_mb=256, output_bytes=4096) as pool:
        results = pool.map([kinds[i % 5] for i in range(count)])
        assert [r.status for r in results] == [wanted[i % 5] for i in range(count)]
        assert sum(pool.counts.values()) == count
        assert set(pool.counts) == set(STATUSES)
        assert pool.map(["print(input())"], stdins=["still here"])[0].stdout == "still here\n"
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_pool_survives_bad_programs():
    storm(20)


@pytest.mark.slow
def test_a_pool_is_healthy_after_a_thousand_runs():
    storm(1000)


@isolated
def test_a_sandbox_dies_with_its_owner(tmp_path):
    """Killed in the middle of a run, the owner leaves no program behind."""
    mark = f"orphan-{os.getpid()}"
    code = f"import time\nmark = {mark!r}\nwhile True: time.sleep(0.1)"
    script = f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parents[2])!r})\n"
    script += f"from rl.sandbox import run\nrun({code!r}, seconds=100)"
    owner = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30

    def inside() -> bool:
        found = subprocess.run(["pgrep", "-P", str(owner.pid)], capture_output=True, text=True).stdout.split()
        return bool(found)

    while not inside() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(owner.pid)], capture_output=True, text=True).stdout.split()
    assert children
    owner.kill()
    owner.wait()
    while time.monotonic() < deadline and any(pathlib.Path(f"/proc/{pid}").exists() for pid in children):
        time.sleep(0.05)
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in children)
