"""Makes a trained mixture of experts skip half of its slots (ZEDA, 2605.18643), beside what else there is.

    python examples/train_moe.py --config configs/moe_tutorial.py:teacher --out out/teacher
    python examples/zeda.py --teacher out/teacher --out out/zeda --seeds 0 1 2
    python examples/zeda.py --teacher path/to/a/hugging-face/moe --text my/*.txt --out out/mine

The teacher is a run of train_moe.py or a Hugging Face directory with its tokenizer. It answers prompts (stage 1), then
every variant is adapted to it and measured on held-out text and problems: held-out loss, problems solved, share of
slots skipped layer by layer, divergence from the teacher, how far expert loads have moved, and whether tokens that the
teacher finds easy are those that skip. OUT receives runs/, results.csv, summary.csv, margins.csv, zeda.png, skips.png,
students/.

Killed and started again with the same command, finished variants are kept. Several processes may share OUT, with
different seeds or variants. A variant that the teacher cannot be made into is left out, and the reason printed.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # presets and examples are not installed

from configs.zeda import Zeda
from examples import train_moe as tutorial
from moe import data, dynamic, tasks, text, training, zeda
from moe.config import add_config_arguments, config_from_arguments
from moe.distill import distillation_loss, divergence, rollouts
from moe.models import hf
from moe.models.decode import Engine, EngineConfig
from moe.models.sampling import Sampling
from moe.models.tokenizer import Tokenizer, from_directory
from moe.models.transformer import TransformerConfig, TransformerParams, apply, logits
from moe.objectives import LossConfig, balance_by_bias, language_model_loss
from moe.params import path_name


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model with what it is tested on and the prompts it answers."""

    params: TransformerParams
    cfg: TransformerConfig
    given: tutorial.Data
    prompts: list[list[int]]
    limits: list[int]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to spend fewer expert FLOPs.

    Attributes:
        kind: "zero", "copy" or "constant" slots (`moe.zeda`), a router of `moe.dynamic`, or "fewer" experts.
        loss: router losses of both stages; the preset's alpha where `group` is not 0.
        zero_experts: as a multiple of the preset's.
        target: share of slots to skip, None: the preset's.
        sft, opd: whether the stages are run.
        replay: the training forward of stage 2 follows the roll-out's routing.
    """

    kind: str = "zero"
    loss: LossConfig = LossConfig(switch=0.0, router_z=0.0, group=0.1)
    zero_experts: float = 1.0
    target: float | None = None
    sft: bool = True
    opd: bool = True
    replay: bool = True


QUIET = LossConfig(switch=0.0, router_z=0.0)
EACH = LossConfig(switch=0.1, router_z=0.0)
VARIANTS = {
    "ZEDA, stage 1 only": Variant(opd=False),
    "ZEDA": Variant(),
    "half of K, not adapted": Variant("fewer", QUIET, sft=False, opd=False),
    "half of K, stage 1 only": Variant("fewer", QUIET, opd=False),
    "half of K, distilled": Variant("fewer", QUIET),
    "top-p, not adapted": Variant("top_p", QUIET, sft=False, opd=False),
    "top-p, stage 1 only": Variant("top_p", QUIET, opd=False),
    "top-p, distilled": Variant("top_p", QUIET),
    "DynMoE thresholds, stage 1 only": Variant("threshold", QUIET, opd=False),
    "AdaMoE, stage 1 only": Variant("null", dataclasses.replace(EACH, pool_free=True), opd=False),
    "MoE++, stage 1 only": Variant("moe++", EACH, opd=False),
    "switch loss on every slot, stage 1 only": Variant(loss=EACH, opd=False),
    "ZEDA, stage 2 only": Variant(sft=False),
    "ZEDA, no replay": Variant(replay=False),
    "zero experts, not adapted": Variant(sft=False, opd=False),
    "copy experts, stage 1 only": Variant("copy", opd=False),
    "ZEDA, Z / 2, stage 1 only": Variant(zero_experts=0.5, opd=False),
    "ZEDA, 2 Z, stage 1 only": Variant(zero_experts=2.0, opd=False),
    "ZEDA, target 1/3, stage 1 only": Variant(target=1 / 3, opd=False),
    "ZEDA, target 2/3, stage 1 only": Variant(target=2 / 3, opd=False),
}
"""All use the preset's slots, steps and learning rate. The target is the share of all slots; with Z = E / 2 targets of
1/3, 1/2 and 2/3 are the source's w = 1, 2 and 4.
"""


# ---- the teacher
def load_teacher(cfg: Zeda, folder: pathlib.Path, files: Sequence[pathlib.Path], out: pathlib.Path) -> Teacher:
    """Reads the model and draws prompts: beginnings of training text, and problems."""
    model = folder / "model" if (folder / "model").is_dir() else folder
    params, model_cfg = hf.load(model)
    if model_cfg.moe is None:
        raise zeda.ZedaError(f"{model} holds a {model_cfg.family} without mixtures of experts; give a sparse model")
    cache = folder / "data" if (folder / "data" / "text.json").exists() and not files else out / "data"
    documents, origin = tutorial.gather_text(files, None, cache)
    given = tutorial.prepare(cfg.tutorial, documents, origin, 0, from_directory(model))
    exam = tasks.problems(cfg.tutorial.tasks, cfg.test_problems, seed=0, held_out=True, fewer=True)
    encoded = tutorial.encode_problems(exam, given.tokenizer)
    given = dataclasses.replace(given, test=exam, exam=data.padded(encoded, int(np.diff(encoded.starts).max()) - 1))
    rng, texts = np.random.default_rng(0), max(1, round(cfg.text_share * cfg.samples))
    each = -(-(cfg.samples - texts) // len(cfg.tutorial.tasks.families))
    problems = tasks.problems(cfg.tutorial.tasks, each, seed=1)
    start = tutorial.ends(given.tokenizer)[0]
    asked = [start + ids for ids in given.tokenizer.encode_batch([p.prompt for p in problems])]
    train, _ = text.held_out(documents)
    pieces = [train[i] for i in rng.integers(0, len(train), texts)]
    begun = []
    for ids in given.tokenizer.encode_batch(
        [piece[at : at + 80] for piece, at in zip(pieces, _starts(pieces, rng), strict=True)]
    ):
        begun.append((start + ids)[: cfg.text_prompt])
    begun = [ids for ids in begun if len(ids) > len(start)]
    order = rng.permutation(len(asked) + len(begun))
    prompts, limits = asked + begun, [24] * len(asked) + [cfg.text_tokens] * len(begun)
    return Teacher(params, model_cfg, given, [prompts[i] for i in order], [limits[i] for i in order])


def _starts(pieces: Sequence[str], rng: np.random.Generator) -> list[int]:
    """A word boundary somewhere in each text."""
    spots = [piece.find(" ", int(rng.integers(0, max(1, len(piece) - 80)))) for piece in pieces]
    return [max(0, spot) for spot in spots]


def engine(params: TransformerParams, cfg: TransformerConfig, rows: int, length: int) -> Engine:
    return Engine(params, cfg, EngineConfig(sequences=rows, length=length, record_routing=True, steps=4))


def answers(teacher: Teacher, cfg: Zeda, out: pathlib.Path) -> data.PackedRows:
    """Stage 1's text: what the teacher writes at temperature 1, drawn once for all variants."""
    path = out / "answers.npz"
    if not path.exists():
        writer = engine(teacher.params, teacher.cfg, 64, cfg.tutorial.length)
        found = []
        for first in tqdm(range(0, len(teacher.prompts), 512), desc="the teacher answers", unit="x512"):
            some = slice(first, first + 512)
            wanted = [Sampling(temperature=1.0, max_tokens=limit) for limit in teacher.limits[some]]
            found += writer.generate(teacher.prompts[some], wanted, seed=first)
        ids = [np.concatenate([one.prompt, one.tokens]) for one in found]
        partial = path.with_name(f".answers-{os.getpid()}.npz")  # another process may be drawing them too
        np.savez(
            partial,
            tokens=np.concatenate(ids),
            sizes=[len(one) for one in ids],
            given=[len(one.prompt) for one in found],
        )
        partial.replace(path)
    stored = np.load(path)
    ids = np.split(stored["tokens"], np.cumsum(stored["sizes"])[:-1])
    kept = data.documents([one.tolist() for one in ids], prompts=stored["given"].tolist())
    return data.PackedRows(kept, length=cfg.tutorial.length)


# ---- adapting
def adam(rate: Any, cfg: Zeda) -> optax.GradientTransformation:
    def decayed(p: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in path_name(path), p)

    return balance_by_bias(optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=cfg.weight_decay, mask=decayed))


def start(
    variant: Variant, teacher: Teacher, rows: data.PackedRows, cfg: Zeda, seed: int
) -> tuple[TransformerParams, TransformerConfig]:
    """The student before any training; cuts are placed on the teacher's answers."""
    params, model = jax.tree.map(jnp.copy, teacher.params), teacher.cfg
    assert model.moe is not None
    target = cfg.target if variant.target is None else variant.target
    if variant.kind == "fewer":
        return params, zeda.fewer_experts(model, max(1, round((1 - target) * model.moe.routing.top_k)))
    cuts = {"top_p": dynamic.top_p, "threshold": dynamic.thresholds}
    if variant.kind in cuts:
        params, model = cuts[variant.kind](params, model, target_zero_ratio=target)
        feed = iter(data.batches([rows], batch=8 * cfg.tutorial.batch, seed=seed))
        return dynamic.calibrate(params, model, [next(feed)]), model
    slots: dict[str, Any] = dict(
        zero_experts=max(1, round(variant.zero_experts * cfg.zero_experts)), target_zero_ratio=target,
        key=jax.random.key(1000 + seed),
    )  # fmt: skip
    if variant.kind in ("null", "moe++"):
        return {"null": dynamic.null_experts, "moe++": dynamic.moe_plus_plus}[variant.kind](params, model, **slots)
    return zeda.convert(params, model, kind=variant.kind, **slots)


def stage_one(
    params: TransformerParams,
    student: TransformerConfig,
    teacher: Teacher,
    rows: data.PackedRows,
    variant: Variant,
    cfg: Zeda,
    seed: int,
) -> TransformerParams:
    """Training on the teacher's answers: on their tokens, or on its distributions."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, cfg.sft_learning_rate, cfg.sft_steps // 10, cfg.sft_steps)
    optimizer, router = adam(schedule, cfg), _scaled(variant.loss, cfg)

    def loss(p: Any, batch: Any, rng: Any, frozen: Any) -> Any:
        if cfg.sft_form == "nll":
            return language_model_loss(p, batch, cfg=student, loss=router, rng=rng)
        return distillation_loss(
            p, batch, frozen, cfg=student, teacher_cfg=teacher.cfg, loss=router, form=cfg.sft_form, rng=rng
        )

    step = training.make_train_step(loss, optimizer, clip_norm=cfg.clip, policy=training.Policy(keep=("router",)))
    state = training.init_state(params, optimizer, jax.random.key(seed))
    feed = iter(data.batches([rows], batch=cfg.tutorial.batch, seed=seed))
    for i in (bar := tqdm(range(cfg.sft_steps), desc="stage 1", unit="step", leave=False)):
        state, metrics = step(state, next(feed), teacher.params)
        if i % 10 == 0:
            bar.set_postfix_str(f"loss {float(metrics['loss']):.3f}", refresh=False)
    return state.params


def stage_two(
    params: TransformerParams, student: TransformerConfig, teacher: Teacher, variant: Variant, cfg: Zeda, seed: int
) -> TransformerParams:
    """On-policy distillation: the student writes, the teacher judges every token."""
    optimizer = adam(cfg.opd_learning_rate, cfg)

    def loss(p: Any, batch: Any, rng: Any, frozen: Any) -> Any:
        return distillation_loss(
            p, batch, frozen, cfg=student, teacher_cfg=teacher.cfg, loss=_scaled(variant.loss, cfg), form=cfg.opd_form,
            rng=rng,
        )  # fmt: skip

    step = training.make_train_step(loss, optimizer, clip_norm=cfg.clip, policy=training.Policy(keep=("router",)))
    state = training.init_state(params, optimizer, jax.random.key(seed))
    writer = engine(state.params, student, cfg.opd_prompts * cfg.opd_samples, cfg.tutorial.length)
    rng = np.random.default_rng(seed)
    for i in (bar := tqdm(range(cfg.opd_steps), desc="stage 2", unit="roll-out", leave=False)):
        chosen = rng.choice(len(teacher.prompts), cfg.opd_prompts, replace=False)
        wanted = [Sampling(temperature=1.0, max_tokens=teacher.limits[c], n=cfg.opd_samples) for c in chosen]
        writer.update(state.params)
        drawn = writer.generate([teacher.prompts[c] for c in chosen], wanted, seed=1000 * seed + i)
        batch = rollouts(
            drawn, length=cfg.tutorial.length, cfg=student, replay=variant.replay and student.moe is not None
        )
        state, metrics = step(state, batch, teacher.params)
        bar.set_postfix_str(f"kl {float(metrics['kl']):.4f}", refresh=False)
    return state.params


def _scaled(loss: LossConfig, cfg: Zeda) -> LossConfig:
    return dataclasses.replace(loss, group=cfg.alpha) if loss.group else loss


# ---- measuring
@functools.partial(jax.jit, static_argnames=("cfg", "teacher_cfg"))
def _look(p, batch, teacher, *, cfg, teacher_cfg):
    where: dict[str, Any] = dict(
        positions=batch["positions"], segments=batch["segments"], valid=batch["segments"] > 0, consecutive=True
    )
    mine, theirs = (
        apply(p, batch["tokens"], cfg=cfg, **where),
        apply(teacher, batch["tokens"], cfg=teacher_cfg, **where),
    )
    kl = divergence(p, mine.hidden, teacher, theirs.hidden, form="forward_kl")
    share = jax.nn.log_softmax(logits(teacher, theirs.hidden), -1)
    return kl, mine.routing, theirs.routing, -(jnp.exp(share) * share).sum(-1)


def measure(params: TransformerParams, student: TransformerConfig, teacher: Teacher, cfg: Zeda) -> dict[str, float]:
    """Held-out figures of a model beside the teacher's."""
    given, how = teacher.given, dataclasses.replace(cfg.tutorial, model=student)
    total, _ = tutorial.text_loss(params, how, given.held_out)
    right = tutorial.exact(params, how, given.exam)
    family = np.asarray([problem.family for problem in given.test])
    assert student.moe is not None
    assert teacher.cfg.moe is not None
    experts, before = student.moe.routing.experts, teacher.cfg.moe.routing.top_k
    row = {"text": total / given.held_out_bytes, "solved": float(right.mean())}
    row |= {f"solved/{name}": float(right[family == name].mean()) for name in cfg.tutorial.tasks.families}
    written = [given.held_out[i] for i in range(min(cfg.tutorial.evaluation_rows, len(given.held_out)))]
    asked = [{key: values[i] for key, values in given.exam.items()} for i in range(len(given.test))]
    batches = [(True, batch) for batch in data.in_order(written, cfg.tutorial.batch)]
    batches += [(False, batch) for batch in data.in_order(asked, 4 * cfg.tutorial.batch)]
    parts: list[tuple[np.ndarray, ...]] = []  # of every token: prose?, target counted?, kl, entropy, both models' slots
    for prose, batch in batches:
        seen = _look(params, batch, teacher.params, cfg=student, teacher_cfg=teacher.cfg)
        real = np.asarray(batch["segments"]) > 0
        kl, routing, reference, entropy = map(np.asarray, seen)
        slots = (array[:, real].swapaxes(0, 1) for array in (routing, reference))
        parts.append((np.full(real.sum(), prose), batch["mask"][real], kl[real], entropy[real], *slots))
    prose, counted, kl, entropy, mine, theirs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    skipped = 1 - (mine < experts).sum(-1) / before  # [T, L]
    depth = (skipped[prose].mean(0) + skipped[~prose].mean(0)) / 2  # both sources weigh the same
    row |= {"kl": float(kl[counted].mean()), "skipped": float(depth.mean())}
    row |= {f"skipped/{layer}": float(part) for layer, part in enumerate(depth)}

    def moved(kind: np.ndarray) -> float:  # of the experts' loads on these tokens, mean over layers
        shares = (zeda.load_shares(slots[kind].swapaxes(0, 1), experts) for slots in (mine, theirs))
        return float(zeda.load_divergence(*shares).mean())

    same = (mine[..., None] == theirs[..., None, :]).any(-1)
    row["load divergence"] = moved(np.ones_like(prose))
    row["experts kept"] = float(same[mine < experts].mean())  # of its own slots, that the teacher fills alike
    for name, kind in (("text", prose), ("problems", ~prose)):
        row[f"load divergence, {name}"] = moved(kind)
        hard = entropy[kind] > np.median(entropy[kind])
        row[f"kl, {name}"] = float(kl[counted & kind].mean())
        row[f"skipped, {name}"] = float(skipped[kind].mean())
        row[f"skipped, easy {name}"] = float(skipped[kind][~hard].mean())
        row[f"skipped, hard {name}"] = float(skipped[kind][hard].mean())
        each = pd.Series(skipped[kind].mean(-1))
        varied = each.nunique() > 1
        row[f"skip and entropy, {name}"] = each.corr(pd.Series(entropy[kind]), method="spearman") if varied else np.nan
    return row


@dataclasses.dataclass
class Halfway:
    """The last student after stage 1, for the next variant that begins with the same."""

    key: Any = None
    params: Any = None


def run_variant(
    name: str, teacher: Teacher, rows: data.PackedRows, cfg: Zeda, seed: int, out: pathlib.Path, halfway: Halfway
) -> dict[str, Any]:
    """Adapts and measures; ZEDA's student is kept in OUT/students."""
    variant, begun = VARIANTS[name], time.perf_counter()
    params, student = start(variant, teacher, rows, cfg, seed)
    key = dataclasses.replace(variant, opd=False, replay=True), seed
    if variant.sft and halfway.key != key:
        halfway.params = stage_one(params, student, teacher, rows, variant, cfg, seed)
        halfway.key = key
    if variant.sft:
        params = jax.tree.map(jnp.copy, halfway.params)
    if variant.opd:
        params = stage_two(params, student, teacher, variant, cfg, seed)
    if name == "ZEDA":
        folder = out / "students" / f"zeda-{seed}"
        if not folder.exists():
            hf.save(folder, params, student)
            teacher.given.tokenizer.save(folder)
    row = measure(params, student, teacher, cfg)
    return {"variant": name, "seed": seed, **row, "seconds": time.perf_counter() - begun}


# ---- results
def slug(name: str, seed: int) -> str:
    return re.sub("[^a-z0-9]+", "-", f"{name}-{seed}".lower())


def gather(out: pathlib.Path) -> pd.DataFrame:
    """One row for each finished run, the teacher's first, then as in VARIANTS."""
    paths = (out / "runs").glob("[!.]*.json")  # a name with a dot is half-written
    rows: list[dict[str, Any]] = [
        {k: np.nan if v is None else v for k, v in json.loads(path.read_text()).items()} for path in paths
    ]
    order = ["teacher", *VARIANTS]
    return pd.DataFrame(sorted(rows, key=lambda row: (order.index(row["variant"]), row["seed"])))


def margins(table: pd.DataFrame, of: str = "ZEDA, stage 1 only") -> pd.DataFrame:
    """What every variant loses beyond `of`, seed by seed: mean and half-width of a 95 % t interval of the paired
    differences, with the slots that either skips.
    """
    from scipy import stats

    reference, rows = table[table.variant == "teacher"].iloc[0], []
    mine = table[table.variant == of].set_index("seed")
    for name, part in table.groupby("variant", sort=False):
        both = mine.join(part.set_index("seed").add_suffix(" other"), how="inner")
        if name in ("teacher", of) or both.empty:
            continue
        row: dict[str, Any] = {"variant": name, "seeds": len(both)}
        differences = {
            "skipped more": both["skipped other"] - both.skipped,
            "text, %": 100 * (both["text other"] - both.text) / reference.text,
            "solved, points": 100 * (both.solved - both["solved other"]),
            "kl": both["kl other"] - both.kl,
        }
        for column, values in differences.items():
            row[column] = values.mean()
            if len(both) > 1:
                row[f"{column} ±"] = stats.t.ppf(0.975, len(both) - 1) * values.std() / len(both) ** 0.5
        rows.append(row)
    return pd.DataFrame(rows)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds and the half-width of a 95 % t interval, of the figures that matter, beside the teacher."""
    from scipy import stats

    reference = table[table.variant == "teacher"].iloc[0]
    table = table.assign(
        **{"text, % over the teacher": 100 * (table.text / reference.text - 1),
           "solved, points under the teacher": 100 * (reference.solved - table.solved)}
    )  # fmt: skip
    rows = []
    for name, part in table.groupby("variant", sort=False):
        row: dict[str, Any] = {"variant": name, "seeds": len(part)}
        for column in (
            "skipped", "skipped, text", "skipped, problems", "text, % over the teacher",
            "solved, points under the teacher", "kl", "load divergence", "load divergence, text",
            "load divergence, problems", "experts kept", "skip and entropy, text", "skip and entropy, problems",
        ):  # fmt: skip
            if column not in part:  # of an earlier release
                continue
            row[column] = part[column].mean()
            if len(part) > 1:
                row[f"{column} ±"] = stats.t.ppf(0.975, len(part) - 1) * part[column].std() / len(part) ** 0.5
        rows.append(row)
    return pd.DataFrame(rows)


def draw(summary: pd.DataFrame, table: pd.DataFrame, layers: int, target: float) -> Figure:
    """What is lost against what is skipped (95 % intervals from three seeds on), and where."""
    with matplotlib.rc_context(tutorial.STYLE):
        figure = Figure(figsize=(11.5, 4.4), layout="constrained")
        loss, solved, depth = figure.subplots(1, 3)
        shown = summary[summary.variant != "teacher"]
        for number, (_, row) in enumerate(shown.iterrows()):
            colour, marker = tutorial.PALETTE[number % 8], "osD^vPX<>"[number % 9]
            for axis, column in ((loss, "text, % over the teacher"), (solved, "solved, points under the teacher")):
                error = float(row.get(f"{column} ±", np.nan))  # pyright: ignore[reportArgumentType]
                known = row.seeds >= 3 and not np.isnan(error)
                axis.errorbar(100 * row.skipped, row[column], yerr=error if known else None, color=colour,
                              marker=marker, ms=5, ls="", label=row.variant)  # fmt: skip
        for axis, title, unit in (
            (loss, "Held-out text", "loss, % over the teacher"),
            (solved, "Problems", "points lost"),
        ):
            axis.set(title=title, xlabel="expert FLOPs skipped (%)", ylabel=unit)
            if axis.get_ylim()[1] > 4:  # a variant that was not adapted
                axis.set_yscale("symlog", linthresh=1)
            axis.axhline(0, color="#777777", lw=0.8)
        figure.legend(*solved.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
        for number, name in enumerate(name for name in table.variant.unique() if name.startswith(("ZEDA", "switch"))):
            mean = table[table.variant == name][[f"skipped/{i}" for i in range(layers)]].mean()
            depth.plot(
                range(1, layers + 1), 100 * mean, marker="o", ms=3, color=tutorial.PALETTE[number % 8], label=name
            )
        depth.axhline(100 * target, color="#777777", lw=0.8, ls=":")
        depth.set(title="Skipped, layer by layer", xlabel="layer", ylabel="%", ylim=(0, 100))
        depth.set_xticks(range(1, layers + 1))
        if depth.get_legend_handles_labels()[0]:
            depth.legend(fontsize=7)
        return figure


def draw_skips(params: TransformerParams, cfg: TransformerConfig, tokenizer: Tokenizer, shown: Sequence[str]) -> Figure:
    """Texts with each token on the colour of the share of its slots that were skipped."""
    assert cfg.moe is not None
    lines: list[list[tuple[str, float]]] = []
    for one in shown:
        ids = tutorial.ends(tokenizer)[0] + tokenizer.encode(one)
        index = apply(params, jnp.asarray(ids, jnp.int32)[None], cfg=cfg).routing
        skipped = np.asarray(index >= cfg.moe.routing.experts).mean((0, 1, 3))
        line: list[tuple[str, float]] = []
        for i, part in list(zip(ids, skipped, strict=True))[len(tutorial.ends(tokenizer)[0]) :]:
            word = tokenizer.decode([i]).replace("\n", "⏎") or "·"
            if sum(len(w) for w, _ in line) + len(word) > 100:
                lines.append(line)
                line = []
            line.append((word, float(part)))
        lines += [line, []]
    longest = max(sum(len(word) for word, _ in line) for line in lines)
    with matplotlib.rc_context(tutorial.STYLE):
        figure = Figure(figsize=(1.2 + 0.1 * longest, 0.9 + 0.24 * len(lines)), layout="constrained")
        axis = figure.subplots()
        colours = matplotlib.colormaps["viridis"]
        for row, line in enumerate(lines):
            column = 0
            for word, part in line:
                shade = colours(part)
                dark = sum(shade[:3]) < 1.5
                axis.add_patch(Rectangle((column, -row - 0.5), len(word), 0.92, color=shade, lw=0))
                axis.text(column + len(word) / 2, -row - 0.05, word, ha="center", va="center", fontsize=7,
                          family="monospace", color="white" if dark else "black")  # fmt: skip
                column += len(word)
        axis.set(xlim=(0, longest), ylim=(-len(lines), 1), title="Share of slots skipped, token by token (all layers)")
        axis.set_axis_off()
        scale = ScalarMappable(Normalize(0, 1), colours)
        figure.colorbar(scale, ax=axis, shrink=0.8, label="skipped")
        return figure


def tie(out: pathlib.Path, setting: str) -> None:
    """Ties OUT to one preset, teacher and text: rows of different ones must not stand in one table.

    Raises:
        SystemExit: OUT holds results of another setting.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "setting.txt"
    if path.exists() and path.read_text() != setting:
        raise SystemExit(f"{out} holds results of another preset, teacher or text ({path}); choose another --out")
    tutorial.write(path, setting.encode())


def run(
    cfg: Zeda, teacher_folder: pathlib.Path, out: pathlib.Path, *, seeds: Sequence[int], variants: Sequence[str],
    files: Sequence[pathlib.Path] = (),
) -> pd.DataFrame:  # fmt: skip
    """Everything; returns the summary."""
    tie(out, f"{cfg}\n{teacher_folder.resolve()}\n{sorted(map(str, files))}\n")
    teacher = load_teacher(cfg, teacher_folder, files, out)
    rows = answers(teacher, cfg, out)
    (out / "runs").mkdir(exist_ok=True)
    jobs, halfway = [("teacher", 0)] + [(name, seed) for seed in seeds for name in variants], Halfway()
    for name, seed in (bar := tqdm(jobs, desc="variants", unit="run")):
        path = out / "runs" / f"{slug(name, seed)}.json"
        if path.exists():
            continue
        if name == "teacher":
            row: dict[str, Any] = {"variant": name, "seed": 0, **measure(teacher.params, teacher.cfg, teacher, cfg)}
        else:
            try:
                row = run_variant(name, teacher, rows, cfg, seed, out, halfway)
            except zeda.ZedaError as error:  # with two slots a token, cuts skip less than half
                bar.write(f"{name} is left out: {error}")
                continue
        known = {k: None if v != v else v for k, v in row.items()}  # JSON has no NaN
        tutorial.write(path, json.dumps(known, indent=1, allow_nan=False).encode())
        bar.write(
            f"{name}, seed {seed}: text {row['text']:.4f}, solved {row['solved']:.3f}, skipped {row['skipped']:.3f}, "
            f"kl {row['kl']:.4f}"
        )
    table = gather(out)
    summary = summarise(table)
    for name, made in (("results", table), ("summary", summary), ("margins", margins(table))):
        tutorial.write(out / f"{name}.csv", made.to_csv(index=False).encode())
    figure = draw(summary, table, teacher.cfg.mixtures, cfg.target)
    tutorial.write(out / "zeda.png", tutorial.png(figure))
    student = out / "students" / f"zeda-{seeds[0]}"
    if student.exists():
        params, model = hf.load(student)
        texts = [p.prompt + p.answer for p in teacher.given.test[:: max(1, len(teacher.given.test) // 6)]]
        for i in range(3):
            row = teacher.given.held_out[i]
            texts.append(teacher.given.tokenizer.decode(row["tokens"][row["segments"] == 1].tolist()))
        tutorial.write(out / "skips.png", tutorial.png(draw_skips(params, model, teacher.given.tokenizer, texts)))
    print(summary.to_string(index=False, float_format="{:.3f}".format))
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add_config_arguments(
        parser, default=f"{pathlib.Path(__file__).resolve().parent.parent / 'configs' / 'zeda.py'}:default"
    )
    parser.add_argument("--teacher", type=pathlib.Path, required=True, help="run of train_moe.py, or a model directory")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for everything this run makes")
    parser.add_argument("--text", type=pathlib.Path, nargs="+", default=[], metavar="FILE", help="text for prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    given = parser.parse_args(arguments)
    run(
        config_from_arguments(given), given.teacher, given.out, seeds=given.seeds, variants=given.variants,
        files=given.text,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
