"""Trains a small mixture of experts from scratch, on real text and on problems that can be checked.

    python examples/train_moe.py --out out/moe                                        # a few minutes on two cores
    python examples/train_moe.py --out out/teacher --config configs/moe_tutorial.py:teacher
    python examples/train_moe.py --out out/mine --text my/*.txt --gsm8k gsm8k_train.jsonl --set steps=4000
    python examples/train_moe.py --out out/specialised --start out/teacher --config configs/moe_tutorial.py:specialised

The text is English prose from the documentation inside the installed Python packages (moe.text), so nothing is
downloaded; --text takes files of your own instead. --start goes on from the model, tokenizer and text of an earlier run
(or from a model directory). The problems (moe.tasks) are drawn by seed, and those tested are
never trained on. A byte-pair tokenizer is learned from the training text. OUT receives the model in Hugging Face's
format with its tokenizer (model/), scores.csv, training.png, experts.png and report.html.

Killed at any moment and started again with the same command, it goes on, and metrics.jsonl is the same bit for bit.
"""

import argparse
import base64
import dataclasses
import functools
import hashlib
import html
import io
import json
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pandas as pd
import tokenizers
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the presets are not installed

from configs.moe_tutorial import Tutorial
from moe import data, params, tasks, text, training
from moe.config import add_config_arguments, config_from_arguments
from moe.models import hf
from moe.models.decode import EngineConfig, generate
from moe.models.sampling import Sampling
from moe.models.tokenizer import Tokenizer, from_directory
from moe.models.transformer import TransformerConfig, TransformerParams, apply, forward, transformer_specs
from moe.objectives import balance_by_bias, language_model_loss, token_loss
from moe.tasks import Problem

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}  # ids 0, 1, 2 of configs.moe_tutorial
SOURCES = ("text", "tasks")
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")  # Okabe & Ito
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e3e3e3", "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 8,
    "lines.linewidth": 1.5, "figure.facecolor": "white",
}  # fmt: skip


# ---- data
def train_tokenizer(documents: Sequence[str], vocab: int) -> Tokenizer:
    """Byte-pair encoding over bytes: any text can be written. Digits stand alone, so that numbers have positions."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIAL.values()), initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(documents, trainer)
    return Tokenizer(backend, SPECIAL, stop_ids=(list(SPECIAL).index("eos_token"),))  # special tokens come first


@dataclasses.dataclass(frozen=True)
class Data:
    """Everything that is trained and tested on.

    Attributes:
        tokenizer: learned from the training text.
        text, tasks: packed rows for training.
        held_out: packed rows of held-out text; held_out_bytes, how many bytes of text they are.
        test: held-out problems, `exam` the same as rows, one each.
        fingerprint: digest of the text, which ties a checkpoint to it.
        origin: what the text is.
    """

    tokenizer: Tokenizer
    text: data.PackedRows
    tasks: data.PackedRows
    held_out: data.PackedRows
    held_out_bytes: int
    test: list[Problem]
    exam: dict[str, np.ndarray]
    fingerprint: str
    origin: str


def read_gsm8k(path: pathlib.Path) -> list[str]:
    """Question and worked answer of each line, without the calculator's annotations."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [re.sub(r"<<.*?>>", "", f"Question: {row['question']}\nAnswer: {row['answer']}") for row in rows]


def gather_text(
    files: Sequence[pathlib.Path], gsm8k: pathlib.Path | None, cache: pathlib.Path
) -> tuple[list[str], str]:
    """(documents, what they are). Read once per OUT: a run that goes on after an upgrade keeps its text."""
    path = cache / "text.json"
    if path.exists():
        stored = json.loads(path.read_text())
        return stored["documents"], stored["origin"]
    documents = text.read_documents(files) if files else text.installed_prose()
    origin = f"{len(files)} files of the user's" if files else "documentation of Python and the installed packages"
    if gsm8k is not None:
        documents, origin = documents + read_gsm8k(gsm8k), f"{origin}, GSM8K's problems"
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"documents": documents, "origin": origin}))
    partial.replace(path)
    return documents, origin


def ends(tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens before and after a document; some tokenizers have none."""
    return [[] if token is None else [token] for token in (tokenizer.bos_id, tokenizer.eos_id)]


def encode_problems(problems: Sequence[Problem], tokenizer: Tokenizer) -> data.Documents:
    """<bos> prompt answer <eos>; prompts are given, not learned. Both are tokenised apart, as decoding will."""
    bos, eos = ends(tokenizer)
    prompts = tokenizer.encode_batch([p.prompt for p in problems])
    answers = tokenizer.encode_batch([p.answer for p in problems])
    ids = [bos + prompt + answer + eos for prompt, answer in zip(prompts, answers, strict=True)]
    return data.documents(ids, prompts=[len(prompt) + 1 for prompt in prompts])


def prepare(
    cfg: Tutorial, documents: Sequence[str], origin: str, seed: int, tokenizer: Tokenizer | None = None
) -> Data:
    """Splits, tokenises and packs; trains a tokenizer where none is given."""
    train, held = text.held_out(documents)
    if cfg.characters is not None:
        train = _first(train, cfg.characters)
        held = _first(held, cfg.characters // 10)
    if tokenizer is None:
        tokenizer = train_tokenizer(train, cfg.model.vocab)

    bos, eos = ends(tokenizer)

    def encode(texts: Sequence[str]) -> data.Documents:
        return data.documents([bos + ids + eos for ids in tokenizer.encode_batch(texts)])

    learned = encode_problems(tasks.problems(cfg.tasks, cfg.problems, seed=seed), tokenizer)
    test = tasks.problems(cfg.tasks, cfg.test_problems, seed=seed, held_out=True)
    asked = encode_problems(test, tokenizer)
    rows = functools.partial(data.PackedRows, length=cfg.length, seed=seed)
    return Data(
        tokenizer=tokenizer,
        text=rows(encode(train), source=SOURCES.index("text")),
        tasks=rows(learned, source=SOURCES.index("tasks")),
        held_out=rows(encode(held)),
        held_out_bytes=sum(len(one.encode()) for one in held),
        test=test,
        exam=data.padded(asked, int(np.diff(asked.starts).max()) - 1),
        fingerprint=hashlib.blake2b("\0".join(documents).encode(), digest_size=8).hexdigest(),
        origin=origin,
    )


def _first(documents: Sequence[str], characters: int) -> list[str]:
    total = np.cumsum([len(one) for one in documents])
    return list(documents[: max(1, int(np.searchsorted(total, characters)))])


# ---- evaluation
@functools.partial(jax.jit, static_argnames="cfg")
def _look(p: TransformerParams, batch: Mapping[str, Any], *, cfg: TransformerConfig):
    segments = batch["segments"]
    out = apply(
        p, batch["tokens"], cfg=cfg, positions=batch["positions"], segments=segments, valid=segments > 0,
        consecutive=True,
    )  # fmt: skip
    each = token_loss(p, out.hidden, batch["targets"])
    return each.nll, each.correct


def text_loss(p: TransformerParams, cfg: Tutorial, rows: Any) -> tuple[float, int]:
    """(sum of the losses in nats, tokens) of packed rows."""
    total, count = 0.0, 0
    for batch in data.in_order(rows, cfg.batch):
        nll, _ = _look(p, batch, cfg=cfg.model)
        total += float(np.where(batch["mask"], np.asarray(nll, np.float64), 0).sum())
        count += int(batch["mask"].sum())
    return total, count


def exact(p: TransformerParams, cfg: Tutorial, exam: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of each problem, whether every token of the answer is the likeliest one after those before it: then, and only
    then, greedy decoding writes exactly this answer.
    """
    rows = [{name: values[i] for name, values in exam.items()} for i in range(len(exam["tokens"]))]
    found = []
    for batch in data.in_order(rows, 4 * cfg.batch):
        _, correct = _look(p, batch, cfg=cfg.model)
        found.append((np.asarray(correct) | ~batch["mask"]).all(1))
    return np.concatenate(found)[: len(rows)]


def solve(p: TransformerParams, cfg: Tutorial, problems: Sequence[Problem], tokenizer: Tokenizer) -> list[str]:
    """Greedy completions of the prompts, without the end-of-text token."""
    bos, _ = ends(tokenizer)
    prompts = [bos + ids for ids in tokenizer.encode_batch([problem.prompt for problem in problems])]
    room = max(map(len, prompts)) + 24
    engine = EngineConfig(sequences=min(64, len(prompts)), length=-(-room // 16) * 16, steps=4)
    done = generate(p, cfg.model, prompts, Sampling(temperature=0.0, max_tokens=24), config=engine)
    return [tokenizer.decode(one.tokens, skip_special_tokens=True) for one in done]


# ---- training
def optimizer(cfg: Tutorial) -> optax.GradientTransformation:
    """AdamW on a warm-up and a cosine; decay on matrices only; the selection bias by its own rule."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, cfg.warmup, cfg.steps, end_value=cfg.learning_rate / 10
    )

    def decayed(p: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in params.path_name(path), p)

    adam = optax.adamw(schedule, b2=0.95, weight_decay=cfg.weight_decay, mask=decayed)
    return balance_by_bias(adam, cfg.bias_rate) if by_bias(cfg) else adam


def by_bias(cfg: Tutorial) -> bool:
    """Whether the routers are balanced by a selection bias."""
    return cfg.model.moe is not None and cfg.model.moe.routing.selection_bias


def earlier(folder: pathlib.Path, cfg: Tutorial) -> tuple[TransformerParams, Tokenizer]:
    """The model that a run begins with: of a run of this script, or of a Hugging Face directory.

    Raises:
        ValueError: it is not of the preset's shape.
    """
    model = folder / "model" if (folder / "model").is_dir() else folder
    p, found = hf.load(model)
    if found != cfg.model:
        names = [f.name for f in dataclasses.fields(found) if getattr(found, f.name) != getattr(cfg.model, f.name)]
        raise ValueError(
            f"{model} differs from the preset's model in {', '.join(names)}; give a preset of the model's own shape"
        )
    return p, from_directory(model)


def balance(cfg: Tutorial) -> str:
    """What keeps the experts' loads even, in words."""
    if by_bias(cfg):
        return "balanced by selection bias"
    return "balanced by the switch loss" if cfg.loss.switch else "loads left alone"


def train(
    cfg: Tutorial, given: Data, out: pathlib.Path, *, seed: int, progress: bool, start: TransformerParams | None = None
) -> TransformerParams:
    """Trains, from scratch or from `start`, or goes on; the parameters after the last step."""
    loss = functools.partial(language_model_loss, cfg=cfg.model, loss=cfg.loss, sources=SOURCES)
    step = training.make_train_step(
        lambda p, batch, rng: loss(p, batch, rng=rng), optimizer(cfg), clip_norm=cfg.clip,
        policy=training.Policy(keep=("router",)),
    )  # fmt: skip
    begun = params.init(jax.random.key(seed), transformer_specs(cfg.model)) if start is None else start
    state = training.init_state(begun, optimizer(cfg), jax.random.key(seed + 1))
    rows = [given.held_out[i] for i in range(min(cfg.evaluation_rows, len(given.held_out)))]
    _, count = text_loss(state.params, cfg, given.held_out)
    per_byte = count / given.held_out_bytes
    family = np.asarray([problem.family for problem in given.test])

    def evaluate(state: training.TrainState) -> dict[str, float]:
        total, tokens = text_loss(state.params, cfg, rows)
        right = exact(state.params, cfg, given.exam)
        return {"text": total / tokens * per_byte} | {name: right[family == name].mean() for name in cfg.tasks.families}

    batches = data.batches(
        [given.text, given.tasks], weights=[cfg.text_share, 1 - cfg.text_share], batch=cfg.batch, seed=seed
    )
    tied = {"tutorial": cfg, "seed": seed, "text": given.fingerprint}
    if start is not None:
        tied["start"] = digest(start)
    done = training.fit(
        step, state, iter(batches), steps=cfg.steps, directory=out / "training", config=tied,
        checkpoint_every=cfg.checkpoint_every, evaluate=evaluate, evaluate_every=cfg.evaluate_every,
        log_every=cfg.log_every, progress=progress,
    )  # fmt: skip
    return done.params


def save(p: TransformerParams, cfg: Tutorial, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Writes the model and its tokenizer in Hugging Face's format, reads them again and compares.

    Raises:
        RuntimeError: what was read is not what was written.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run of this command
    hf.save(folder, p, cfg.model)
    tokenizer.save(folder)
    again, model = hf.load(folder)
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), p, again)
    tokens = jnp.arange(3, 35, dtype=jnp.int32)[None]
    logits = [np.asarray(forward(one, tokens, cfg=c)) for one, c in ((p, cfg.model), (again, model))]
    probe = "It returns 12 + 34."
    if not all(jax.tree.leaves(same)) or not (logits[0] == logits[1]).all():
        raise RuntimeError(f"the model read from {folder} differs from the one written; do not use it")
    if from_directory(folder).encode(probe) != tokenizer.encode(probe):
        raise RuntimeError(f"the tokenizer read from {folder} differs from the one written; do not use it")


# ---- results
@dataclasses.dataclass(frozen=True)
class Results:
    """What is shown: the training's rows, the final scores, and examples."""

    history: pd.DataFrame
    evaluations: pd.DataFrame
    scores: pd.DataFrame
    examples: pd.DataFrame
    samples: list[tuple[str, str]]


def score(p: TransformerParams, cfg: Tutorial, given: Data, out: pathlib.Path) -> Results:
    """Held-out text and every held-out problem, decoded greedily and checked."""
    total, tokens = text_loss(p, cfg, given.held_out)
    answers = solve(p, cfg, given.test, given.tokenizer)
    right = np.asarray([tasks.check(problem, answer) for problem, answer in zip(given.test, answers, strict=True)])
    family = np.asarray([problem.family for problem in given.test])
    rows = [
        {"what": "held-out text (nats per byte)", "value": total / given.held_out_bytes, "of": given.held_out_bytes},
        {"what": "held-out text (nats per token)", "value": total / tokens, "of": tokens},
    ]
    for name in cfg.tasks.families:
        rows.append({"what": f"solved: {name}", "value": right[family == name].mean(), "of": (family == name).sum()})
    rows.append({"what": "solved: all", "value": right.mean(), "of": len(right)})
    shown = [int(np.flatnonzero(family == name)[0]) for name in cfg.tasks.families]
    shown += list(np.flatnonzero(~right)[:5])
    examples = pd.DataFrame(
        [
            {"prompt": given.test[i].prompt, "completion": answers[i].strip(), "right": "yes" if right[i] else "no"}
            for i in dict.fromkeys(shown)
        ]
    )
    history = pd.DataFrame(training.read_metrics(out / "training" / "metrics.jsonl"))
    seen = [str(c) for c in history if str(c).startswith("evaluation/")]
    evaluations = pd.DataFrame(history[["step", *seen]]).dropna()
    evaluations.columns = [str(name).removeprefix("evaluation/") for name in evaluations.columns]
    return Results(
        history.dropna(subset=["loss"]), evaluations, pd.DataFrame(rows), examples, write_on(p, cfg, given.tokenizer)
    )


def write_on(p: TransformerParams, cfg: Tutorial, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(beginning, continuation drawn at temperature 0.7) of a few texts."""
    starts = ["Returns the", "If the value is", "This method"]
    bos, _ = ends(tokenizer)
    prompts = [bos + tokenizer.encode(start) for start in starts]
    engine = EngineConfig(sequences=len(prompts), length=96)
    done = generate(p, cfg.model, prompts, Sampling(temperature=0.7, max_tokens=60), config=engine, seed=0)
    return [(s, tokenizer.decode(one.tokens, skip_special_tokens=True)) for s, one in zip(starts, done, strict=True)]


def draw_training(results: Results, cfg: Tutorial) -> Figure:
    """Losses, accuracy by family, and how evenly and how surely the routers decide."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 6.6), layout="constrained")
        panels = figure.subplot_mosaic("AABBCC;DDDEEE")
        loss, held, solved, even, sure = (panels[name] for name in "ABCDE")
        table, checks = results.history, results.evaluations
        window = max(1, len(table) // 60)
        for colour, name in zip(PALETTE, SOURCES, strict=False):
            column = table[f"nll/{name}"]
            label = {"text": "text", "tasks": "answers of problems"}[name]
            loss.plot(table.step, column, color=colour, lw=0.6, alpha=0.3)
            loss.plot(table.step, column.rolling(window, min_periods=1).mean(), color=colour, label=label)
        loss.set(title="Training loss", xlabel="step", ylabel="nats per token", ylim=(0, None))
        loss.legend()
        for number, name in enumerate(cfg.tasks.families):
            solved.plot(
                checks.step, 100 * checks[name], color=PALETTE[number], label=name, marker="osD^vPX"[number], ms=3
            )
        solved.set(title="Held-out problems solved", xlabel="step", ylabel="%", ylim=(-3, 103))
        solved.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.2), columnspacing=0.9, handlelength=1.4)
        held.plot(checks.step, checks.text, color=PALETTE[0], marker="o", ms=3)
        held.set(title="Held-out text", xlabel="step", ylabel="nats per byte")
        for layer in range(cfg.model.mixtures):
            colour = matplotlib.colormaps["viridis"](0.9 * layer / max(1, cfg.model.mixtures - 1))
            for axis, name in ((even, "max_violation"), (sure, "entropy")):
                curve = table[f"{name}/{layer}"].rolling(window, min_periods=1).mean()
                axis.plot(table.step, curve, color=colour, label=f"layer {layer + 1}")
        even.set(
            title="Balance: excess load of the busiest expert", xlabel="step", ylabel="max violation", ylim=(0, None)
        )
        even.legend(ncols=2)
        assert cfg.model.moe is not None
        top = float(np.log(cfg.model.moe.routing.slots))
        sure.axhline(top, color="#777777", lw=0.8, ls=":")
        sure.annotate(f"uniform: log {cfg.model.moe.routing.slots}", (0.99, top), xycoords=("axes fraction", "data"),
                      xytext=(0, -10), textcoords="offset points", ha="right", fontsize=8, color="#555555")  # fmt: skip
        sure.set(title="Entropy of the router", xlabel="step", ylabel="nats", ylim=(None, 1.02 * top))
        return figure


def draw_experts(results: Results, cfg: Tutorial) -> Figure:
    """Load of every expert over training, a panel for each layer; 1 is an even share."""
    assert cfg.model.moe is not None
    table, count = results.history, cfg.model.moe.routing.experts
    layers = cfg.model.mixtures
    bins = np.array_split(np.arange(len(table)), min(60, len(table)))
    with matplotlib.rc_context(STYLE):
        across = min(layers, 3 if layers % 3 == 0 else 2)
        down = -(-layers // across)
        figure = Figure(figsize=(10.5, 0.9 + 2.1 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        image = None
        for layer, axis in enumerate(axes.ravel()[:layers]):
            load = table[[f"load/{layer}/{e}" for e in range(count)]].to_numpy() * count
            shown = np.stack([load[b].mean(0) for b in bins], 1)
            image = axis.imshow(
                shown, aspect="auto", origin="lower", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest",
                extent=(0, float(table.step.iloc[-1]), 0.5, count + 0.5),
            )  # fmt: skip
            axis.set_title(f"Layer {layer + 1}")
            axis.grid(False)
        for axis in axes[-1]:
            axis.set_xlabel("step")
        for axis in axes[:, 0]:
            axis.set_ylabel("expert")
            axis.set_yticks(range(1, count + 1, 1 if count <= 8 else 3))
        for spare in axes.ravel()[layers:]:
            spare.set_visible(False)
        bar = figure.colorbar(image, ax=axes, shrink=0.9, extend="max")  # pyright: ignore[reportArgumentType]
        bar.set_label("load / even share")
        return figure


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 1000px; margin: 2.5rem auto; padding: 0 1rem; }
img { max-width: 100%; }
figcaption { color: #555; font-size: .87rem; }
pre { white-space: pre-wrap; }
table { border-collapse: collapse; font-size: .87rem; }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #eee; }
"""


def write_report(out: pathlib.Path, cfg: Tutorial, given: Data, results: Results, facts: Mapping[str, str]) -> None:
    """training.png, experts.png, scores.csv and report.html, each complete or not there."""
    pictures = {
        "training": (
            png(draw_training(results, cfg)),
            "Loss, problems solved, balance and entropy of the routers, smoothed.",
        ),
        "experts": (png(draw_experts(results, cfg)), "Load of each expert over training; white is an even share."),
    }
    parts = ["<h1>A small mixture of experts, from scratch</h1>", "<table>"]
    parts += [f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items()]
    parts += ["</table><h2>Scores</h2>", results.scores.to_html(index=False, float_format="{:.3f}".format)]
    for name, (picture, caption) in pictures.items():
        write(out / f"{name}.png", picture)
        code = base64.b64encode(picture).decode("ascii")
        parts.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{code}"><figcaption>{caption}</figcaption></figure>'
        )
    parts += ["<h2>Completions of held-out problems</h2>", results.examples.to_html(index=False)]
    parts.append("<h2>Text it writes</h2>")
    parts += [f"<pre><b>{html.escape(a)}</b>{html.escape(b)}</pre>" for a, b in results.samples]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>moe</title><style>{_CSS}</style>'
    write(out / "report.html", f"{head}{''.join(parts)}</html>\n".encode())
    write(out / "scores.csv", results.scores.to_csv(index=False).encode())


def digest(p: TransformerParams) -> str:
    """Of the values of all parameters."""
    found = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(p):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def write(path: pathlib.Path, content: bytes) -> None:
    """A file that is complete or not there."""
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(content)
    partial.replace(path)


def run(
    cfg: Tutorial,
    out: pathlib.Path,
    *,
    files: Sequence[pathlib.Path] = (),
    gsm8k: pathlib.Path | None = None,
    start: pathlib.Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """The whole tutorial; returns the table of scores.csv."""
    begun = time.perf_counter()
    first, tokenizer = (None, None) if start is None else earlier(start, cfg)
    kept = None if start is None else start / "data" / "text.json"
    if kept is not None and kept.exists() and not files and gsm8k is None and not (out / "data" / "text.json").exists():
        (out / "data").mkdir(parents=True, exist_ok=True)
        write(out / "data" / "text.json", kept.read_bytes())  # the same documents stay held out
    documents, origin = gather_text(files, gsm8k, out / "data")
    given = prepare(cfg, documents, origin, seed, tokenizer)
    size = params.count(transformer_specs(cfg.model))
    print(
        f"text: {origin}, {sum(map(len, documents)):,} characters in {len(documents):,} documents; "
        f"{len(given.text):,} rows of {cfg.length} ({given.text.filled:.1%} filled), "
        f"{len(given.tasks):,} rows of problems ({given.tasks.filled:.1%}); {size:,} parameters",
        flush=True,
    )
    trained = train(cfg, given, out, seed=seed, progress=progress, start=first)
    save(trained, cfg, given.tokenizer, out / "model")
    results = score(trained, cfg, given, out)
    rate = results.history.steps_per_second
    assert cfg.model.moe is not None
    routing, layers = cfg.model.moe.routing, len(cfg.model.layers)
    positions = rate.median() * cfg.batch * cfg.length
    facts = {
        "text": f"{origin}; {sum(map(len, documents)):,} characters, digest {given.fingerprint}",
        "model": f"{cfg.model.family}, {size:,} parameters, {layers} layers of {routing.experts} experts, "
        f"{routing.top_k} a token, {balance(cfg)}",
        "training": f"{cfg.steps:,} steps of {cfg.batch} x {cfg.length} positions, seed {seed}"
        + ("" if start is None else f", from {start}"),
        "speed": f"{positions:,.0f} positions per second (median), on {jax.devices()[0].platform}",
    }
    write_report(out, cfg, given, results, facts)
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(results.scores.to_string(index=False, float_format="{:.3f}".format))
    print(f"{out / 'report.html'}: {time.perf_counter() - begun:.0f} s for this call")
    return results.scores


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    preset = pathlib.Path(__file__).resolve().parent.parent / "configs" / "moe_tutorial.py"
    add_config_arguments(parser, default=f"{preset}:default")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for everything this run makes")
    parser.add_argument("--text", type=pathlib.Path, nargs="+", default=[], metavar="FILE", help="text files to learn")
    parser.add_argument("--gsm8k", type=pathlib.Path, metavar="FILE", help="GSM8K's train.jsonl, added to the text")
    parser.add_argument("--start", type=pathlib.Path, metavar="DIR", help="an earlier run, or a model, to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(arguments)
    run(
        config_from_arguments(given), given.out, files=given.text, gsm8k=given.gsm8k, start=given.start,
        seed=given.seed, progress=not given.quiet,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
