"""`examples/zeda.py` on a tiny teacher: from the command line to the figures, and started again."""

import json
import os
import pathlib
import subprocess
import sys

import pandas as pd
import pytest

from examples import zeda as example
from moe import text
from moe.models import hf

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
NAMES = ["ZEDA, stage 1 only", "ZEDA", "half of K, distilled", "top-p, stage 1 only", "MoE++, stage 1 only"]


def call(script: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(CHECKOUT / "examples" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow  # two processes that compile everything
def test_from_the_command_line(tmp_path):
    corpus = tmp_path / "optax.txt"
    corpus.write_text("\n\n".join(text.installed_prose(("optax",))))
    configs = CHECKOUT / "configs"
    call("train_moe.py", "--quiet", "--config", f"{configs / 'moe_tutorial.py'}:smoke", "--text", str(corpus),
         "--out", str(tmp_path / "teacher"))  # fmt: skip
    out = tmp_path / "zeda"
    command = ["zeda.py", "--config", f"{configs / 'zeda.py'}:smoke", "--teacher", str(tmp_path / "teacher"),
               "--out", str(out), "--seeds", "0", "--variants", *NAMES]  # fmt: skip
    printed = call(*command)
    table = pd.read_csv(out / "results.csv")
    assert table.variant.tolist() == ["teacher", *NAMES]
    assert table.skipped.tolist()[0] == 0
    assert table.skipped.tolist()[3] == 0.5
    assert table.skipped.tolist()[4] == pytest.approx(0.4, abs=0.15), "24 bisections on 32 rows, then six steps"
    assert (pd.read_csv(out / "margins.csv").variant.to_numpy() == NAMES[1:]).all()
    assert all((out / name).stat().st_size > 10_000 for name in ("zeda.png", "skips.png"))
    _, cfg = hf.load(out / "students" / "zeda-0")
    assert cfg.moe is not None
    assert cfg.moe.routing.free == (("zero", 3),)
    assert "ZEDA" in printed
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    call(*command)
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == before, "nothing is computed twice"


def test_a_row_that_a_killed_process_left_half_written_is_no_result(tmp_path):
    (tmp_path / "runs").mkdir()
    for name, seed in (("ZEDA", 1), ("teacher", 0), ("ZEDA", 0)):
        row = json.dumps({"variant": name, "seed": seed})
        (tmp_path / "runs" / f"{example.slug(name, seed)}.json").write_text(row)
    (tmp_path / "runs" / ".zeda-2.json").write_text('{"variant": "ZE')
    (tmp_path / "runs" / "zeda-1.json").write_text('{"variant": "ZEDA", "seed": 1, "kl": null}')
    found = example.gather(tmp_path)
    assert found.kl.dtype == float, "what is not known is a NaN in the table"
    assert list(zip(found.variant, found.seed, strict=True)) == [("teacher", 0), ("ZEDA", 0), ("ZEDA", 1)]


def test_margins_are_paired_by_seed():
    rows = [dict(variant="teacher", seed=0, text=2.0, solved=1.0, skipped=0.0, kl=0.0)]
    for seed, level in enumerate((0.0, 0.5, 0.2)):  # what a seed is worth cancels
        rows.append(dict(variant="a", seed=seed, text=2.0 + level, solved=0.9 - level, skipped=0.5, kl=level))
        other = dict(text=2.02 + level + 0.002 * seed, solved=0.88 - level, skipped=0.4, kl=level + 0.1)
        rows.append(dict(variant="b", seed=seed) | other)
    margin = example.margins(pd.DataFrame(rows), of="a").iloc[0]
    assert (margin.variant, margin.seeds) == ("b", 3)
    assert margin["text, %"] == pytest.approx(1.1)
    assert margin["text, % ±"] == pytest.approx(4.302653 * 0.1 / 3**0.5)  # t(0.975, 2) * deviation / sqrt(3)
    assert margin["solved, points"] == pytest.approx(2.0)
    assert margin["solved, points ±"] == pytest.approx(0.0, abs=1e-9)
    assert margin["skipped more"] == pytest.approx(-0.1)


def test_results_of_another_setting_are_not_mixed(tmp_path):
    example.tie(tmp_path / "out", "one")
    example.tie(tmp_path / "out", "one")
    with pytest.raises(SystemExit, match="another preset, teacher or text"):
        example.tie(tmp_path / "out", "two")
