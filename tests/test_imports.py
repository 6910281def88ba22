"""The direction of imports: moe <- earth, rl <- configs <- examples, tests, tpu_scripts; and no room called utils."""

import ast
import pathlib

import pytest

PACKAGES = ("moe", "earth", "rl")
MAY_IMPORT = {
    "moe": {"moe"},
    "earth": {"moe", "earth"},
    "rl": {"moe", "rl"},
    "configs": {"moe", "earth", "rl", "configs"},
}
OURS = {"moe", "earth", "rl", "configs", "examples", "tests", "tpu_scripts"}


def imported_roots(source: str, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """(line, top-level package) of every import in `source`, a module inside `package` (its dotted parents)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # relative: resolve against the package, so that `from ... import earth` cannot hide
                base = package[: len(package) - (node.level - 1)]
                names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                found += [(node.lineno, base[0] if base else name) for name in names]
            else:
                found.append((node.lineno, (node.module or "").split(".")[0]))
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute | ast.Name)
            and (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id) == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((node.lineno, str(node.args[0].value).split(".")[0]))
    return found


def violations(root: pathlib.Path) -> list[str]:
    bad = []
    for room, allowed in MAY_IMPORT.items():
        for path in sorted((root / room).rglob("*.py")):
            relative = path.relative_to(root)
            for line, name in imported_roots(path.read_text(), relative.parts[:-1]):
                if name in OURS and name not in allowed:
                    bad.append(f"{relative}:{line} imports {name}")
    return bad


def test_imports_point_downwards(checkout):
    assert not violations(checkout), "against the direction of the house"
    assert all(any((checkout / room).rglob("*.py")) for room in PACKAGES), "nothing was looked at"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("moe/a.py", "import earth.model"),
        ("moe/deep/a.py", "def f():\n    from rl import train"),
        ("earth/a.py", "from rl.objectives import kl"),
        ("rl/a.py", "import numpy, earth"),
        ("earth/a.py", "from configs import earth_o1"),
        ("moe/a.py", "import importlib\nimportlib.import_module('rl.train')"),
        ("moe/a.py", "from .. import earth"),
        ("configs/a.py", "import tests.conftest"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, path, source):
    target = tmp_path / path
    target.parent.mkdir(parents=True)
    target.write_text(source)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("earth/a.py", "import moe.params"),
        ("rl/a.py", "from .objectives import kl"),
        ("configs/a.py", "import rl, earth"),
    ],
)
def test_a_right_import_is_left_alone(tmp_path, path, source):
    target = tmp_path / path
    target.parent.mkdir(parents=True)
    target.write_text(source)
    assert violations(tmp_path) == []


def test_no_utils(checkout):
    rooms = [p for package in PACKAGES for p in (checkout / package).rglob("*") if "__pycache__" not in p.parts]
    names = [p for p in rooms if p.stem.strip("_") in {"utils", "util", "helpers", "common", "misc"}]
    assert not names, "name it by its subject, or keep it private where it is used"


def test_shared_errors_and_layout(checkout):
    """configs is loaded by path and is not installed, so it must not be a package that could shadow another."""
    assert not (checkout / "configs" / "__init__.py").exists()
