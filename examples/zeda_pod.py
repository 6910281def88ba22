"""ZEDA (2605.18643) at full size: both stages as sharded train steps, compiled ahead of time for a TPU slice, or run.

    python examples/zeda_pod.py --preset configs/zeda_pod.py:qwen3_30b_a3b --stage 1            # no TPU needed
    python examples/zeda_pod.py --preset configs/zeda_pod.py:glm_4_7_flash --topology v5p:2x2x4 --stage 2
    python examples/zeda_pod.py --preset ... --stage 1 --run --model DIR --answers answers.npz --out OUT
    python examples/zeda_pod.py --preset ... --stage 2 --run --model DIR --student OUT/stage1/model --answers ...

Compiling (extra `tpu`; set JAX_PLATFORMS=cpu where there is no TPU) prints what a chip has to hold; nothing is run.
`--run` trains on the devices that are there, with the same step. MODEL is the teacher's Hugging Face directory; answers
are those of `examples/zeda.py`: `tokens` of all, end to end, `sizes` of each, `given` tokens that are its prompt.
Killed and started again with the same command, a run goes on from its last checkpoint.

Parameters, moments and routers are float32, products bfloat16; the teacher is bfloat16 but for its routers. Stage 2
draws its roll-outs with `moe.models.decode.Engine` on the same mesh, in one process: on several hosts it stops at once.
The table is of the train step alone. At full length the engine's cache (32 x 34,816 tokens: 110 GB for Qwen3, 60 GB for
GLM) is split over `tensor` only and does not fit beside the step on the preset's slice: lower `response`, or write the
roll-outs elsewhere. `--run` has been tried at test size; no released checkpoint was trained with it.
"""

import argparse
import dataclasses
import functools
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # presets and examples are not installed

from configs.zeda_pod import ZedaPod
from moe import data, training, zeda
from moe import params as parameters
from moe.config import load_config
from moe.distill import distillation_loss, rollouts
from moe.kernels import aot
from moe.models import hf
from moe.models.decode import Engine, EngineConfig
from moe.models.sampling import Sampling
from moe.models.transformer import TransformerConfig, TransformerParams, transformer_specs
from moe.objectives import LossConfig, language_model_loss
from moe.params import path_name
from moe.sharding import (
    FSDP_TP_EP,
    AxisRules,
    HostShard,
    batch_sharding,
    global_batch,
    host_shard,
    make_mesh,
    use_mesh,
)

POLICY = training.Policy("bfloat16", keep=("router",))


class PodError(ValueError):
    """A slice, or answers, that the preset does not fit. The message names the value and the remedy."""


# ---- the programs
@dataclasses.dataclass(frozen=True)
class Program:
    """The train step of one stage, and what it takes.

    Attributes:
        step: jitted, (state, batch, *frozen) -> (state, metrics); call it inside `use_mesh(mesh, rules)`.
        state, batch, frozen: abstract, with shardings; frozen is () or (teacher's parameters,).
        accumulate: micro-batches.
        student: the converted model.
    """

    step: Any
    state: training.TrainState
    batch: Mapping[str, jax.ShapeDtypeStruct]
    frozen: tuple[Any, ...]
    accumulate: int
    student: TransformerConfig


def place(cfg: ZedaPod, devices: Sequence[Any]) -> tuple[Mesh, AxisRules]:
    """The preset's mesh over these devices, and its rules. Key and value heads that do not divide over `tensor` are
    replicated.
    """
    shared = cfg.expert * cfg.tensor
    if len(devices) % shared:
        raise PodError(f"{len(devices)} devices do not divide over expert {cfg.expert} x tensor {cfg.tensor}")
    mesh = make_mesh({"fsdp": -1, "expert": cfg.expert, "tensor": cfg.tensor}, devices=devices)
    heads = getattr(cfg.model.attention, "kv_heads", cfg.tensor)
    rules = FSDP_TP_EP
    if heads % cfg.tensor:
        rules = rules.replace(weights={"kv_heads": ()}, activations={"kv_heads": ()})
    return mesh, rules


def convert(params: TransformerParams, cfg: ZedaPod, seed: int) -> tuple[TransformerParams, TransformerConfig]:
    """The student before any training."""
    return zeda.convert(
        params, cfg.model, zero_experts=cfg.zero_experts, target_zero_ratio=cfg.target, key=jax.random.key(seed)
    )


def student_config(cfg: ZedaPod) -> TransformerConfig:
    """Of the converted model; no parameter is made."""
    found: list[TransformerConfig] = []

    def shapes(params: TransformerParams) -> TransformerParams:
        params, student = convert(params, cfg, 0)
        found.append(student)
        return params

    jax.eval_shape(shapes, parameters.abstract(transformer_specs(cfg.model)))
    return found[0]


def optimizer(cfg: ZedaPod, stage: int) -> optax.GradientTransformation:
    """Adam of the stage. Norms do not decay; a selection bias neither learns nor decays."""
    rate: Any = cfg.opd_learning_rate
    if stage == 1:
        warmup = round(cfg.sft_warmup * cfg.sft_steps)
        rate = optax.warmup_cosine_decay_schedule(0.0, cfg.sft_learning_rate, warmup, cfg.sft_steps)

    def named(pattern: str, yes: Any, no: Any) -> Callable[[Any], Any]:
        return lambda p: jax.tree_util.tree_map_with_path(lambda path, _: yes if pattern in path_name(path) else no, p)

    adam = optax.adamw(rate, b1=cfg.beta1, b2=cfg.beta2, weight_decay=cfg.weight_decay, mask=named("norm", False, True))
    return optax.partition({"frozen": optax.set_to_zero(), "rest": adam}, named("router_bias", "frozen", "rest"))


def loss_of(cfg: ZedaPod, stage: int, student: TransformerConfig) -> training.LossFn:
    """What the step of a stage minimises. Selection biases are frozen."""
    loss = LossConfig(
        switch=0.0, router_z=0.0, group=cfg.alpha, balance=False, loads=False, chunk=cfg.chunk, remat=True
    )

    def sft(p: Any, batch: Any, rng: Any) -> Any:
        return language_model_loss(p, batch, cfg=student, loss=loss, rng=rng)

    def opd(p: Any, batch: Any, rng: Any, teacher: Any) -> Any:
        return distillation_loss(
            p, batch, teacher, cfg=student, teacher_cfg=cfg.model, loss=loss, form="policy_gradient",
            clip=(cfg.opd_clip, cfg.opd_clip), rng=rng,
        )  # fmt: skip

    return sft if stage == 1 else opd


def batch_shapes(cfg: ZedaPod, stage: int, student: TransformerConfig, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Of the whole batch: `moe.data.PackedRows`, or `moe.distill.rollouts` with a record to replay."""
    shape = rows, cfg.length
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets", "segments", "positions")}
    batch["mask"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
    if stage == 1:
        return batch | {"source": jax.ShapeDtypeStruct((rows,), jnp.int32)}
    assert student.moe is not None
    record = rows, student.mixtures, cfg.length, student.moe.routing.top_k
    batch["old_logprobs"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return batch | {"routing": jax.ShapeDtypeStruct(record, jnp.int32)}


def shards(mesh: Mesh) -> int:
    """Parts that a batch is split into."""
    return mesh.shape["fsdp"] * mesh.shape["expert"]


def program(cfg: ZedaPod, stage: int, mesh: Mesh, rules: AxisRules, *, rows: int | None = None) -> Program:
    """The step of a stage on a mesh, one row a device and micro-batch.

    Args:
        rows: of a batch; default the preset's.

    Raises:
        PodError: rows that do not divide over the mesh.
    """
    rows = rows or (cfg.sft_rows if stage == 1 else cfg.opd_rows)
    parts = shards(mesh)
    if rows % parts:
        raise PodError(
            f"{rows} rows do not divide over {parts} shards of the batch; take fewer chips, or raise tensor above "
            f"{cfg.tensor}"
        )
    student = student_config(cfg)
    chosen = optimizer(cfg, stage)
    state = training.abstract_state(parameters.abstract(transformer_specs(student), mesh, rules), chosen)
    step = training.make_train_step(
        loss_of(cfg, stage, student), chosen, accumulate=rows // parts, clip_norm=cfg.clip, policy=POLICY,
        shardings=training.state_shardings(state),
    )  # fmt: skip
    sharding = batch_sharding(mesh, rules)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in batch_shapes(cfg, stage, student, rows).items()
    }
    frozen = () if stage == 1 else (_low(parameters.abstract(transformer_specs(cfg.model), mesh, rules)),)
    return Program(step, state, batch, frozen, rows // parts, student)


def _low(shapes: TransformerParams) -> TransformerParams:
    """In the dtypes that products take."""
    cast = jax.eval_shape(POLICY.cast, shapes)
    return jax.tree.map(lambda a, b: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=b.sharding), cast, shapes)


# ---- ahead of time
def compiled(cfg: ZedaPod, stage: int, topology: str) -> tuple[aot.Report, Program, Mesh, float]:
    """(report, program, mesh, seconds of compilation) for a topology that is not here."""
    mesh, rules = place(cfg, aot.topology_devices(topology))
    made = program(cfg, stage, mesh, rules)
    with use_mesh(mesh, rules):
        lowered = made.step.lower(made.state, made.batch, *made.frozen)
        begun = time.perf_counter()
        done = lowered.compile()
    return aot.report_of(done), made, mesh, time.perf_counter() - begun


def describe(cfg: ZedaPod, stage: int, topology: str) -> str:
    """The table of one compilation."""
    chip = aot.CHIPS.get(topology.split(":")[0])
    if chip is None:
        raise PodError(f"topology {topology!r} is of no known chip; choose one of {', '.join(aot.CHIPS)}")
    report, made, mesh, seconds = compiled(cfg, stage, topology)
    rows = next(iter(made.batch.values())).shape[0]
    state, teacher, batch = (_bytes_each(tree) for tree in (made.state, made.frozen, made.batch))
    new = report.output_bytes - report.alias_bytes
    total = report.argument_bytes + new + report.temporary_bytes + report.code_bytes
    figures = {
        "arguments": report.argument_bytes,
        "  state": state,
        "  teacher": teacher,
        "  batch": batch,
        "outputs": report.output_bytes,
        "  in the place of arguments": report.alias_bytes,
        "temporaries": report.temporary_bytes,
        "program": report.code_bytes,
        "all, outputs in place once": total,
        "live at the peak": report.peak_bytes,
        "memory of a chip": chip.hbm_bytes,
    }
    lines = [
        f"{cfg.model.family}, {parameters.count(made.state.params) / 1e9:.2f} billion parameters, stage {stage}, "
        f"{topology} ({mesh.size} chips), mesh {dict(mesh.shape)}",
        f"{rows} rows of {cfg.length:,} tokens a step in {made.accumulate} micro-batches of "
        f"{shards(mesh) * cfg.length:,} tokens",
        "",
        "GiB a chip",
        *(f"{name:<28}{size / (1 << 30):>8.2f}" for name, size in figures.items()),
        f"{'all / memory of a chip':<28}{total / chip.hbm_bytes:>8.1%}",
    ]
    lines += ["", "collectives in the text (a loop's body counts once)"]
    lines += [f"  {kind:<26}{count:>8}" for kind, count in sorted(report.collectives.items())]
    kernels = {name: report.kernels.count(name) for name in sorted(set(report.kernels))}
    lines += ["", "Pallas kernels: " + (", ".join(f"{name} x {count}" for name, count in kernels.items()) or "none")]
    if report.flops is not None:
        lines.append(f"XLA's estimate, loop bodies once: {report.flops / 1e12:.1f} TFLOP a chip")
    lines.append(f"compiled in {seconds:.0f} s")
    return "\n".join(lines)


def _bytes_each(tree: Any) -> int:
    """Bytes on one device, without padding."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        total += int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    return total


# ---- running
class Answers(grain.sources.RandomAccessDataSource):
    """Batches of stage 1: `sft_batch` answers each, packed into as many rows as the fullest batch needs.

    An epoch is every answer once, in an order drawn once; what is left over starts the next.
    """

    def __init__(self, cfg: ZedaPod, ids: Sequence[np.ndarray], given: np.ndarray, *, seed: int, multiple: int):
        """
        Args:
            ids, given: tokens of each answer, prompt included, and how many the prompt has.
            multiple: the number of rows is one of it.

        Raises:
            PodError: an answer longer than a row.
        """
        longest = max(map(len, ids))
        if longest - 1 > cfg.length:
            raise PodError(f"an answer of {longest} tokens does not fit a row of {cfg.length}; raise response")
        self._cfg, self._ids, self._given = cfg, ids, given
        self._order = np.random.default_rng(seed).permutation(len(ids))
        sizes = [[len(ids[i]) - 1 for i in self._chosen(batch)] for batch in range(len(self))]
        most = max(len(data.best_fit(sorted(one, reverse=True), cfg.length)) for one in sizes)
        self.rows = -(-most // multiple) * multiple

    def __len__(self) -> int:
        return -(-len(self._ids) // self._cfg.sft_batch)

    def __repr__(self) -> str:
        return f"Answers({len(self._ids)} in {len(self)} batches of {self.rows} x {self._cfg.length})"

    def _chosen(self, batch: int) -> np.ndarray:
        return np.take(self._order, np.arange(self._cfg.sft_batch) + batch * self._cfg.sft_batch, mode="wrap")

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        chosen = sorted(self._chosen(int(index)), key=lambda i: -len(self._ids[i]))
        plan = data.best_fit([len(self._ids[i]) - 1 for i in chosen], self._cfg.length)
        rows = []
        for items in plan:
            mine = [chosen[item] for item in items]
            tokens = [self._ids[i] for i in mine]
            starts = np.cumsum([0, *map(len, tokens)])
            wanted = np.concatenate(
                [np.arange(len(one)) >= self._given[i] for i, one in zip(mine, tokens, strict=True)]
            )
            stored = data.Documents(np.concatenate(tokens), starts, wanted)
            rows.append(data.PackedRows(stored, length=self._cfg.length)[0])
        return next(data.in_order(rows, self.rows))


def feed(source: Any, shard: HostShard) -> Any:
    """An endless iterator of this host's part of every batch, in order; get_state / set_state."""

    def mine(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name: values[slice(*(len(values) * i // shard.count for i in (shard.index, shard.index + 1)))]
            for name, values in batch.items()
        }

    repeated = grain.MapDataset.source(source).repeat()[: sys.maxsize // 2]
    return iter(repeated.map(mine).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def read_answers(path: pathlib.Path) -> tuple[list[np.ndarray], np.ndarray]:
    """(tokens of each answer with its prompt, tokens of each prompt)."""
    with np.load(path) as stored:
        missing = {"tokens", "sizes", "given"} - set(stored.files)
        if missing:
            raise PodError(f"{path} lacks {sorted(missing)}; hand over the answers.npz of examples/zeda.py")
        ids = np.split(stored["tokens"].astype(np.int32), np.cumsum(stored["sizes"])[:-1])
        return ids, np.asarray(stored["given"])


def run(
    cfg: ZedaPod, stage: int, model: pathlib.Path, answers: pathlib.Path, out: pathlib.Path, *,
    student: pathlib.Path | None = None, seed: int = 0, steps: int | None = None, checkpoint_every: int = 50,
    progress: bool = True,
) -> training.TrainState:  # fmt: skip
    """Trains a stage on all devices and writes OUT/stageN: checkpoints, metrics.jsonl, model.

    Args:
        model: the teacher, of the preset's config.
        student: where to start from; default the converted teacher.
        steps: default the preset's.
    """
    if stage == 2 and jax.process_count() > 1:
        raise PodError(f"the roll-outs of stage 2 need one process, there are {jax.process_count()}")
    mesh, rules = place(cfg, jax.devices())
    found = hf.config_from_hf(hf.read_config(model))
    if found != cfg.model:
        raise PodError(f"{model} holds another model than the preset: {found}, not {cfg.model}")
    ids, given = read_answers(answers)
    folder = out / f"stage{stage}"
    source = Answers(cfg, ids, given, seed=seed, multiple=shards(mesh)) if stage == 1 else None
    made = program(cfg, stage, mesh, rules, rows=source.rows if source else None)
    load = functools.partial(hf.load, mesh=mesh, rules=rules)
    with use_mesh(mesh, rules):
        if student is None:
            start, _ = load(model, dtype="float32")
            widen = jax.jit(lambda p: convert(p, cfg, seed)[0], out_shardings=_shardings(made.state.params))
            start = widen(start)
        else:
            start, other = load(student, dtype="float32")
            if other.moe != made.student.moe:
                raise PodError(f"{student} holds other mixtures than the preset's student: {other.moe}")
        state = training.init_state(start, optimizer(cfg, stage), jax.random.key(seed))
        del start
        if source is not None:
            batches, step = feed(source, host_shard(mesh, rules)), made.step
        else:
            low = jax.jit(POLICY.cast, out_shardings=_shardings(made.frozen[0]))
            teacher = low(load(model, dtype="float32")[0])
            batches, step = _prompts(cfg, ids, given, seed), _on_policy(cfg, made, state, teacher, mesh, rules, seed)
        done = training.fit(
            step, state, batches, steps=steps or (cfg.sft_steps if stage == 1 else cfg.opd_steps), directory=folder,
            config={"preset": cfg, "stage": stage, "seed": seed, "rows": next(iter(made.batch.values())).shape[0]},
            place=(lambda batch: global_batch(batch, mesh, rules)) if stage == 1 else None,
            checkpoint_every=checkpoint_every, log_every=1, progress=progress, description=f"stage {stage}",
        )  # fmt: skip
        if jax.process_index() == 0:
            shutil.rmtree(folder / "model", ignore_errors=True)  # of an earlier call with fewer steps
        hf.save(folder / "model", done.params, made.student)
    return done


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _prompts(cfg: ZedaPod, ids: Sequence[np.ndarray], given: np.ndarray, seed: int) -> Any:
    """Numbers and prompts of every roll-out, without repetition until all were seen; get_state / set_state."""
    usable = [one[:count] for one, count in zip(ids, given, strict=True) if 0 < count <= cfg.prompt]
    if len(usable) < cfg.opd_prompts:
        raise PodError(f"{len(usable)} prompts of at most {cfg.prompt} tokens, a roll-out takes {cfg.opd_prompts}")
    shuffled = grain.MapDataset.range(len(usable)).seed(seed).shuffle().repeat()[: sys.maxsize // 2]

    def take(numbers: np.ndarray) -> list[np.ndarray]:
        return [usable[i] for i in numbers]

    return iter(shuffled.batch(cfg.opd_prompts).map(take).to_iter_dataset())


def _on_policy(
    cfg: ZedaPod, made: Program, state: training.TrainState, teacher: Any, mesh: Mesh, rules: AxisRules, seed: int
) -> Callable[..., Any]:
    """step(state, prompts): the student writes, then learns from what the teacher thinks of it."""
    low = jax.jit(POLICY.cast, out_shardings=_shardings(_low(made.state.params)))
    sizes = EngineConfig(sequences=cfg.opd_rows, length=cfg.length, record_routing=True)
    engine = Engine(low(state.params), made.student, sizes, mesh=mesh, rules=rules)
    wanted = Sampling(temperature=cfg.temperature, max_tokens=cfg.response, n=cfg.opd_samples)

    def step(state: training.TrainState, prompts: Any) -> Any:
        engine.update(low(state.params))
        drawn = engine.generate(prompts, wanted, seed=seed + int(state.step))
        batch = rollouts(drawn, length=cfg.length, cfg=made.student)
        return made.step(state, global_batch(batch, mesh, rules), teacher)

    return step


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--preset", required=True, metavar="FILE.py:NAME", help="e.g. configs/zeda_pod.py:qwen3_30b_a3b"
    )
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="e.g. expert=8"
    )
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--topology", help="e.g. v5p:4x4x4 (default: the preset's)")
    parser.add_argument("--run", action="store_true", help="train on the devices that are here")
    parser.add_argument("--model", type=pathlib.Path, help="the teacher's Hugging Face directory")
    parser.add_argument("--answers", type=pathlib.Path, help="the teacher's answers, npz")
    parser.add_argument("--out", type=pathlib.Path, help="folder for checkpoints and the trained model")
    parser.add_argument("--student", type=pathlib.Path, help="start from this student, e.g. OUT/stage1/model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="stop after so many (default: the preset's)")
    given = parser.parse_args(arguments)
    cfg = load_config(given.preset, given.overrides)
    try:
        if not given.run:
            print(describe(cfg, given.stage, given.topology or cfg.topology))
            return 0
        if given.model is None or given.answers is None or given.out is None:
            parser.error("--run needs --model, --answers and --out")
        run(
            cfg, given.stage, given.model, given.answers, given.out, student=given.student, seed=given.seed,
            steps=given.steps,
        )  # fmt: skip
    except (PodError, aot.TpuCompilerError, hf.HFError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
