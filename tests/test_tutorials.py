"""The pages of docs/ run as they stand: every Python block of a page, in order, in one namespace."""

import pathlib
import re

import pytest

pytest.importorskip("dinosaur", reason="the nature run needs the extra `osse`")

PAGES = sorted((pathlib.Path(__file__).resolve().parent.parent / "docs").glob("*.md"))


def blocks(page: pathlib.Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    assert found
    names: dict[str, object] = {"__name__": "tutorial"}
    for number, block in enumerate(found):
        exec(compile(block, f"{page.name}, block {number + 1}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target
