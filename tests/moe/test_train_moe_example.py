"""`examples/train_moe.py`: from the command line to the report, and killed on the way."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pandas as pd
import pytest

from configs import moe_tutorial
from examples import train_moe
from moe import params, tasks, text, training
from moe.models import hf
from moe.models.tokenizer import from_directory
from moe.models.transformer import transformer_specs

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
PRESET = f"{CHECKOUT / 'configs' / 'moe_tutorial.py'}:smoke"


def start(out: pathlib.Path, corpus: pathlib.Path, *more: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, str(CHECKOUT / "examples" / "train_moe.py"), "--config", PRESET, "--quiet"]
    command += ["--out", str(out), *(more or ("--text", str(corpus)))]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed[-3000:]
    return printed


def curve(out: pathlib.Path) -> list[dict]:
    """Everything logged but the clock."""
    rows = training.read_metrics(out / "training" / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key != "steps_per_second"} for row in rows]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A file of text: optax's documentation, the same for every run of the test."""
    documents = tmp_path_factory.mktemp("corpus") / "optax.txt"
    documents.write_text("\n\n".join(text.installed_prose(("optax",))))
    return documents


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    """(folder, what was printed) of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("moe") / "out"
    return out, finish(start(out, corpus))


@pytest.mark.slow  # a process that compiles everything: half a minute on an idle core
def test_the_folder_holds_everything(finished):
    out, printed = finished
    cfg = moe_tutorial.smoke()
    for name in ("training.png", "experts.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (out / name).stat().st_size > 20_000
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "held-out text" in page
    assert not [p.name for p in out.rglob(".*")], "a temporary file was left behind"
    scores = pd.read_csv(out / "scores.csv").set_index("what")
    assert set(scores.index) == {
        "held-out text (nats per byte)", "held-out text (nats per token)", "solved: all",
        *(f"solved: {family}" for family in cfg.tasks.families),
    }  # fmt: skip
    assert "solved: all" in printed
    rows = pd.DataFrame(curve(out)).dropna(subset=["loss"])
    assert len(rows) == cfg.steps
    loads = rows[[f"load/1/{e}" for e in range(4)]].sum(axis=1)
    np.testing.assert_allclose(loads, 1, rtol=1e-5)
    loss = rows["nll/text"].to_numpy()
    assert loss[-5:].mean() < loss[:5].mean() - 0.3, "it learns"


@pytest.mark.slow
def test_the_saved_model_scores_what_the_table_says(finished):
    """Read from disk and evaluated document by document, without packing."""
    out, _ = finished
    cfg = moe_tutorial.smoke()
    p, model = hf.load(out / "model")
    tokenizer = from_directory(out / "model")
    stored = json.loads((out / "data" / "text.json").read_text())
    given = train_moe.prepare(cfg, stored["documents"], stored["origin"], 0)
    scores = pd.read_csv(out / "scores.csv").set_index("what")["value"]
    total, tokens = train_moe.text_loss(p, cfg, given.held_out)
    assert model == cfg.model
    np.testing.assert_allclose(total / tokens, scores["held-out text (nats per token)"], rtol=1e-5)
    answers = train_moe.solve(p, cfg, given.test, tokenizer)
    right = [tasks.check(problem, answer) for problem, answer in zip(given.test, answers, strict=True)]
    assert np.mean(right) == scores["solved: all"]
    np.testing.assert_array_equal(
        [problem.answer == answer for problem, answer in zip(given.test, answers, strict=True)],
        train_moe.exact(p, cfg, given.exam),
    )


@pytest.mark.slow
def test_killed_and_started_again_the_curve_is_the_same_bit_for_bit(finished, corpus, tmp_path):
    undisturbed, _ = finished
    for rows in (11, 38):
        process = start(tmp_path, corpus)
        deadline = time.monotonic() + 300
        log = tmp_path / "training" / "metrics.jsonl"
        while not (log.exists() and len(training.read_metrics(log)) >= rows):
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert len(curve(tmp_path)) < len(curve(undisturbed))
    finish(start(tmp_path, corpus))
    assert curve(tmp_path) == curve(undisturbed)
    for name in ("model/model.safetensors", "scores.csv"):
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.slow
def test_another_run_begins_where_the_model_stands(finished, corpus, tmp_path):
    """Same tokenizer, same held-out text, and a first loss that a model trained from scratch does not have."""
    before, _ = finished
    finish(start(tmp_path, corpus, "--start", str(before), "--set", "warmup=1", "steps=4", "learning_rate=1e-9"))
    for name in ("data/text.json", "model/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (before / name).read_bytes()
    scores = [pd.read_csv(out / "scores.csv").set_index("what")["value"] for out in (before, tmp_path)]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-4)
    assert "from" in (tmp_path / "report.html").read_text()


def test_a_model_of_another_shape_is_refused(tmp_path):
    cfg = moe_tutorial.smoke()
    hf.save(tmp_path, params.init(jax.random.key(0), transformer_specs(cfg.model)), cfg.model)
    other = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, max_positions=32))
    with pytest.raises(ValueError, match="max_positions"):
        train_moe.earlier(tmp_path, other)


def test_loads_are_left_alone_where_nothing_balances_them():
    said = [train_moe.balance(p()) for p in (moe_tutorial.teacher, moe_tutorial.bias, moe_tutorial.specialised)]
    assert said == ["balanced by the switch loss", "balanced by selection bias", "loads left alone"]
    assert moe_tutorial.specialised().model == moe_tutorial.teacher().model, "it goes on from the teacher"


@pytest.mark.parametrize("name", ["default", "bias", "teacher", "smoke"])
def test_presets_survive_the_checkpoint_format(name):
    """What is trained can be written as a Hugging Face config and read back."""
    model = getattr(moe_tutorial, name)().model
    assert hf.config_from_hf(hf.config_to_hf(model)) == model


def test_the_teacher_is_what_zeda_needs():
    model = moe_tutorial.teacher().model
    assert model.moe is not None
    assert model.moe.routing.experts >= 8
    assert model.moe.routing.top_k >= 4
    assert model.mixtures >= 4


def test_the_tokenizer_writes_any_text_and_keeps_digits_apart():
    tokenizer = train_moe.train_tokenizer(["the value of the array is returned"] * 50, 300)
    written = "näïve 漢字 12 + 345 = 357\n"
    assert tokenizer.decode(tokenizer.encode(written)) == written
    assert [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id] == [
        moe_tutorial.BOS, moe_tutorial.EOS, moe_tutorial.PAD,
    ]  # fmt: skip
    assert len(tokenizer.encode("345")) == 3
    assert len(tokenizer.encode("the")) < 3


def test_balance_by_bias_is_chosen_where_routers_have_one():
    assert [train_moe.by_bias(preset()) for preset in (moe_tutorial.bias, moe_tutorial.default)] == [True, False]
