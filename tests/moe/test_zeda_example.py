"""`examples/zeda.py` on a tiny teacher: from the command line to the figures, and started again."""

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
NAMES = ["ZEDA", "half of K, distilled"]


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
    assert table.skipped.tolist()[2] == 0.5
    assert all((out / name).stat().st_size > 10_000 for name in ("zeda.png", "skips.png"))
    _, cfg = hf.load(out / "students" / "zeda-0")
    assert cfg.moe is not None
    assert cfg.moe.routing.free == (("zero", 2),)
    assert "ZEDA" in printed
    before = (out / "results.csv").read_bytes()
    call(*command)
    assert (out / "results.csv").read_bytes() == before, "nothing is computed twice"


def test_results_of_another_setting_are_not_mixed(tmp_path):
    example.tie(tmp_path / "out", "one")
    example.tie(tmp_path / "out", "one")
    with pytest.raises(SystemExit, match="another preset, teacher or text"):
        example.tie(tmp_path / "out", "two")
