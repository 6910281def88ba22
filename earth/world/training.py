"""Training the global model: chains of analyses, then a forecast, scored by every report on the way.

A sample is `spin` windows that are assimilated one after the other from nothing, so that the chain starts from a state
as good as in use, without gradients; `cycles` windows more; and `leads` windows that the model forecasts. Every window
of the cycles (without a spin, after the first) is scored before it is assimilated (a one-step forecast of all sensors),
the last analysis is scored on what was hidden from it (whole sensors, and some reports: the masked autoencoder of the
paper's figure), and every forecast window on all its reports. Curriculum: stages with more cycles and leads.
"""

import contextlib
import dataclasses
import functools
import pathlib
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from earth.observations import EmptyWindowError
from earth.world import model, network
from earth.world.model import Fitted, Params, WorldConfig
from earth.world.records import Record, Tokens
from earth.world.sharding import GLOBE, place_batch, split_over
from moe import training
from moe.checkpoint import CheckpointStructureError
from moe.params import init, shardings
from moe.sharding import AxisRules, HostShard, current_rules, host_shard, use_mesh
from moe.training import Mean


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage.

    Attributes:
      name: of its directory. steps: of the optimiser.
      cycles, leads: windows assimilated and forecast. spin: windows assimilated before them, without gradients.
      learning_rate, weight_decay, warmup: of AdamW with cosine decay to 2 %.
      hide: probability that a whole sensor is hidden from a sample; always one at least is shown.
      keep: share of the reports of the last window that its analysis may read.
      batch: samples of a step.
      remat: recompute each window's work in the backward pass.
      members: forecasts of each sample, 1 for the deterministic one. More are given noise (`NetworkConfig.noise`) and
        scored together, by the continuous ranked probability score: they learn to differ as much as they err.
    """

    name: str
    steps: int
    cycles: int = 3
    leads: int = 4
    spin: int = 0
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup: int = 200
    hide: float = 0.15
    keep: float = 0.8
    batch: int = 1
    remat: bool = False
    members: int = 1

    def __post_init__(self):
        if min(self.cycles, self.steps, self.batch, self.members) < 1 or self.leads < 0 or self.spin < 0:
            raise ValueError(
                f"stage {self.name!r}: cycles {self.cycles}, steps {self.steps}, batch {self.batch} and members "
                f"{self.members} start at 1, leads {self.leads} and spin {self.spin} at 0"
            )
        if not 0 <= self.hide < 1 or not 0 < self.keep <= 1:
            raise ValueError(f"stage {self.name!r}: hide {self.hide} must lie in [0, 1) and keep {self.keep} in (0, 1]")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Stages in order, each from the last one's averaged parameters.

    Attributes:
      starts: every so many hours a sample begins.
      balance: weight of the load-balancing loss, where the dynamics have mixtures of experts.
    """

    stages: tuple[StageConfig, ...]
    seed: int = 0
    ema: float = 0.999
    starts: int = 1
    checkpoint_every: int = 500
    log_every: int = 20
    balance: float = 0.01


def chain(record: Record, first: int, windows: int, rng: np.random.Generator, tokens: Any = None) -> dict[str, Any]:
    """{sensor: Tokens with a leading axis of windows}, and "time": int32 ends of the windows, from `first` (s 1970)."""
    ends = [first + round(k * record.step * 3600) for k in range(windows)]
    parts = [record.window(end, rng, tokens=tokens) for end in ends]
    out: dict[str, Any] = {
        s.sensor: jax.tree.map(lambda *x: np.stack(x), *(p[s.sensor] for p in parts)) for s in record.sensors
    }
    return {"tokens": out, "time": np.asarray([model.window_end(end) for end in ends], np.int32)}


class _Sample(grain.transforms.RandomMap):
    def __init__(self, records: tuple[Record, ...], stage: StageConfig):
        self.records, self.stage = records, stage

    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
        which, first = int(element[0]), int(element[1])
        return chain(self.records[which], first, self.stage.spin + self.stage.cycles + self.stage.leads, rng)


def starts(records: tuple[Record, ...], windows: int, every: int) -> np.ndarray:
    """[n, 2] (record, end of the first window in s since 1970) of all chains of so many windows inside the records.

    Raises:
      EmptyWindowError: the records are shorter than a chain.
    """
    found = []
    for i, record in enumerate(records):
        first, last = record.span
        step = round(record.step * 3600)
        begin = (first // 3600 + 1) * 3600 + step
        ends = np.arange(begin, last - (windows - 1) * step + 1, every * 3600)
        found.append(np.stack([np.full(len(ends), i), ends], -1))
    out = np.concatenate(found)
    if not len(out):
        raise EmptyWindowError(f"no record is as long as {windows} windows of {records[0].step:g} h; shorten the chain")
    return out


def dataset(
    records: tuple[Record, ...], stage: StageConfig, *, every: int, seed: int, shard: HostShard = HostShard(0, 1)
) -> grain.IterDataset:
    """Endless, shuffled, resumable batches of chains, thinned anew each time.

    Args:
      every: hours between the starts of samples.
      shard: this process's part: every `count`-th chain of the same order.

    Raises:
      EmptyWindowError: no record is as long as a chain.
      ValueError: a batch that does not divide over the processes.
    """
    if stage.batch % shard.count:
        raise ValueError(f"stage {stage.name!r}: batch {stage.batch} does not divide over {shard.count} processes")
    first = starts(records, stage.spin + stage.cycles + stage.leads, every)
    data = grain.MapDataset.source(_Rows(first)).seed(seed).shuffle().repeat().random_map(_Sample(records, stage))
    if shard.count > 1:
        data = data[shard.index : sys.maxsize // 2 : shard.count]
    read = data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    return read.batch(stage.batch // shard.count)


class _Rows:
    def __init__(self, rows: np.ndarray):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[index]


def shown(rng: Any, tokens: Mapping[str, Tokens], cfg: WorldConfig, stage: StageConfig) -> dict[str, Any]:
    """{sensor: [W, N]} which reports the analyses may read: hidden sensors none, the last window a share."""
    names = [s.sensor for s in cfg.sensors]
    keys = jax.random.split(rng, 2 + len(names))
    hidden = jax.random.bernoulli(keys[0], stage.hide, (len(names),))
    spared = jax.random.randint(keys[1], (), 0, len(names))
    hidden = hidden & (jnp.arange(len(names)) != spared)
    out = {}
    for i, name in enumerate(names):
        shape = (stage.spin + stage.cycles, tokens[name].age.shape[-1])
        last = jax.random.bernoulli(keys[2 + i], stage.keep, shape[1:])
        keep = jnp.ones(shape, bool).at[-1].set(last)
        out[name] = keep & ~hidden[i]
    return out


def run(
    params: Params, tokens: Mapping[str, Tokens], time: Any, given: Mapping[str, Any], *, cfg: WorldConfig, cycles: int,
    leads: int, spin: int = 0, remat: bool = False, key: Any = None,
) -> tuple[Any, Any, Any, Any, list[Mean]]:  # fmt: skip
    """One chain; with a random key that of one member of an ensemble.

    Returns:
      (readings before each analysis but the spin's {sensor: [cycles, N, V] pairs}, readings of the last analysis,
      readings of each forecast window {sensor: [leads, N, V] pairs}, the last analysis [M, D], the load-balancing loss
      of every mixture in the steps but the spin's).
    """
    net, anchors = params.network, params.fitted.anchors

    def cycle(h, x):
        t, end, g = x
        h, balance = network.balanced_step(net, h, anchors, end, cfg=cfg.network, key=model.part_of(key, 0))
        before = model.read_field(params, h, t, end, cfg=cfg)
        h = network.analyse(
            net, h, anchors, t, g, {k: jax.lax.stop_gradient(v[0]) for k, v in before.items()}, end, cfg=cfg.network,
            field=cfg.field, sensors=cfg.sensors, step=cfg.step, key=model.part_of(key, 1),
        )  # fmt: skip
        return h, (before, balance)

    def forecast(h, x):
        t, end = x
        h, balance = network.balanced_step(net, h, anchors, end, cfg=cfg.network, key=model.part_of(key, 0))
        return h, (model.read_field(params, h, t, end, cfg=cfg), balance)

    if remat:
        cycle, forecast = jax.checkpoint(cycle), jax.checkpoint(forecast)

    def part(x: Any, start: int, stop: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[start:stop], x)

    h = network.background(net, anchors, time[0])
    if spin:
        h, _ = jax.lax.scan(cycle, h, part((tokens, time, given), 0, spin))
        h = jax.lax.stop_gradient(h)
    end = spin + cycles
    h, (before, balance) = jax.lax.scan(cycle, h, part((tokens, time, given), spin, end))
    at = jax.tree.map(lambda x: x[end - 1], tokens)
    now = model.read_field(params, h, at, time[end - 1], cfg=cfg)
    after = None
    if leads:
        _, (after, more) = jax.lax.scan(forecast, h, part((tokens, time), end, end + leads))
        balance = [*balance, *more]
    return before, now, after, h, balance


def loss(
    net: Any, batch: Mapping[str, Any], rng: Any, *, fitted: Fitted, cfg: WorldConfig, stage: StageConfig,
    balance: float = 0.01,
) -> tuple[Any, Any]:  # fmt: skip
    """Squared error of the mean in standard deviations, and a quarter of the Gaussian likelihood of the spread about
    it (whose gradient stops at the mean): {objective per sensor and kind}, metrics. Of several members the fair
    continuous ranked probability score instead of the square; each gets an error as stated of the report, so that the
    field need not vary for it. With mixtures of experts `balance` times their load-balancing loss, reported as
    "balance": 1 where all have as much to do.
    """
    params = Params(fitted, net)
    samples = batch["time"].shape[0]
    keys = jax.random.split(rng, samples)
    totals: dict[str, list[Mean]] = {}
    metrics: dict[str, list[Mean]] = {}

    def one(tokens, time, key):
        given = shown(key, tokens, cfg, stage)

        def member(key):
            before, now, after, _, uneven = run(
                params, tokens, time, given, cfg=cfg, cycles=stage.cycles, leads=stage.leads, spin=stage.spin,
                remat=stage.remat, key=key,
            )  # fmt: skip
            return before, now, after, uneven

        if stage.members == 1:
            made = jax.tree.map(lambda x: x[None], member(None))
        else:  # one after the other: gathers with a batch axis are slow
            made = jax.lax.map(member, jax.random.split(jax.random.fold_in(key, 1), stage.members))
        return given, *made

    if samples == 1:  # gathers with a batch axis are three times as slow on a CPU
        found = one(*jax.tree.map(lambda x: x[0], (batch["tokens"], batch["time"], keys)))
        given, before, now, after, uneven = jax.tree.map(lambda x: x[None], found)
    else:
        spread = jax.vmap(one, spmd_axis_name=_batch_axes() or None)
        given, before, now, after, uneven = spread(batch["tokens"], batch["time"], keys)
    for s in cfg.sensors:
        t, name = batch["tokens"][s.sensor], s.sensor
        b, c = stage.spin, stage.spin + stage.cycles
        parts = []
        skip = 0 if b else 1  # the first window from nothing is no forecast
        if stage.cycles > skip:
            own = slice(b + skip, c)
            parts.append(("before", tuple(x[:, :, skip:] for x in before[name]), own, t.mask[:, own]))
        hidden = t.mask[:, c - 1] & ~given[name][:, -1][..., None]
        parts.append(("hidden", now[name], c - 1, hidden))
        if stage.leads:
            parts.append(("after", after[name], slice(c, None), t.mask[:, c:]))
        for kind, (read, log_spread), where, mask in parts:
            value, mean = t.value[:, where], read.mean(1)
            clipped = jnp.clip(value, -10.0, 10.0)
            error = jnp.where(mask, clipped - mean, 0.0)
            sd = jnp.clip(log_spread.mean(1), -4.0, 3.0)
            nll = sd + 0.5 * jax.lax.stop_gradient(error) ** 2 * jnp.exp(-2 * sd)
            if stage.members == 1:
                score = error**2
            else:
                if t.error is not None:
                    own_key = jax.random.fold_in(rng, zlib.crc32(f"{kind}/{name}".encode()))
                    read = read + t.error[:, None, where] * jax.random.normal(own_key, read.shape)
                score = jnp.where(mask, ranked_probability(read, clipped), 0.0)
            weight = s.weight * mask
            totals.setdefault(kind, []).append(Mean(jnp.sum(weight * (score + 0.25 * nll)), jnp.sum(weight)))
            metrics[f"{kind}/{name}"] = [Mean(jnp.sum(mask * error**2), jnp.sum(mask))]
        if stage.leads:
            _, (read, _), where, mask = parts[-1]
            error = jnp.where(mask, t.value[:, where] - read.mean(1), 0.0) ** 2
            for lead in range(stage.leads):
                metrics[f"lead{lead + 1}/{name}"] = [Mean(jnp.sum(error[:, lead]), jnp.sum(mask[:, lead]))]
    # every sensor counts by its weight, not by its number of reports
    objective = {}
    for kind, found in totals.items():
        for s, m in zip(cfg.sensors, found, strict=True):
            objective[f"{kind}_{s.sensor}"] = Mean(m.total * s.weight / len(cfg.sensors), m.weight)
    if uneven:
        total, weight = (sum(jnp.sum(getattr(m, part)) for m in uneven) for part in ("total", "weight"))
        objective["balance"], metrics["balance"] = Mean(balance * total, weight), [Mean(total, weight)]
    return objective, {k: v[0] for k, v in metrics.items()}


def ranked_probability(members: Any, value: Any) -> Any:
    """Fair continuous ranked probability score of E > 1 members [S, E, ...] for values [S, ...] (Ferro 2014): its
    expectation is least for members drawn as the value is, however few they are.
    """
    count = members.shape[1]
    apart = sum(jnp.abs(members[:, i] - members[:, j]) for i in range(count) for j in range(i))
    return jnp.abs(members - value[:, None]).mean(1) - apart / (count * (count - 1))


def _batch_axes() -> tuple[str, ...]:
    rules, mesh = current_rules(), jax.sharding.get_abstract_mesh()
    return () if rules is None or mesh.empty else split_over("batch", mesh, rules)[0]


def train(
    records: tuple[Record, ...], fitted: Fitted, cfg: WorldConfig, tcfg: TrainConfig, directory: str | pathlib.Path, *,
    start: Any = None, mesh: Any = None, rules: AxisRules = GLOBE, progress: bool = True,
) -> Params:  # fmt: skip
    """Trains through every stage, each resumable from its own directory below `directory`.

    The closed-form part is kept there too, in `fitted`, and what is there counts: a network knows the normals that it
    learned with. The whole model is written to `model` at the end (`earth.world.load_model`). With several processes
    neither is: save what is returned, in one of them.

    Args:
      start: parameters of the network to start from; drawn by default.
      mesh, rules: over all devices of all processes (`earth.world.sharding`); every process calls this with the same
        arguments and gets the same parameters back. A stage's `batch` is the global one, of which every process reads
        its share.

    Raises:
      moe.checkpoint.CheckpointError: what `directory` holds was trained with another configuration or other normals.
      EmptyWindowError: no record is as long as a stage's chain.
      ValueError: a batch that does not divide over the mesh.
    """
    directory = pathlib.Path(directory)
    alone = jax.process_count() == 1
    fitted = _kept(fitted, cfg, directory / "fitted") if alone else fitted
    context = contextlib.nullcontext() if mesh is None else use_mesh(mesh, rules)
    specs = network.network_specs(cfg.network, cfg.sensors, int(np.shape(fitted.anchors.statics)[-1]))
    net = init(jax.random.key(tcfg.seed), specs) if start is None else start
    if mesh is not None:
        net = jax.device_put(net, shardings(specs, mesh, rules))
    with context:
        for number in range(len(tcfg.stages)):
            net = _train_stage(records, fitted, cfg, tcfg, number, net, directory, mesh, rules, progress)
    if mesh is not None:
        net = jax.tree.map(np.asarray, jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(net))
    params = Params(fitted, net)
    if alone:
        model.save_model(directory / "model", params, cfg, meta={"seed": tcfg.seed})
    return params


def _kept(fitted: Fitted, cfg: WorldConfig, folder: pathlib.Path) -> Fitted:
    """What the folder holds, once it is certain to be the same fit (to rounding: another machine, other threads)."""
    if not folder.exists():
        model.save_model(folder, fitted, cfg)
        return fitted
    known, _, _ = model.load_model(folder, cfg=cfg)
    same = jax.tree.structure(known) == jax.tree.structure(fitted)
    for (path, a), b in zip(jax.tree.leaves_with_path(known), jax.tree.leaves(fitted), strict=False):
        least = 1e-4 * float(np.max(np.abs(a), initial=0.0))
        same = same and np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-4, atol=least)
        if not same:
            raise CheckpointStructureError(
                f"{folder}: networks there know another {jax.tree_util.keystr(path)} than was fitted now; train "
                "into another directory, or fit to the reports that they were trained on"
            )
    return known


def _train_stage(
    records: tuple[Record, ...], fitted: Fitted, cfg: WorldConfig, tcfg: TrainConfig, number: int, net: Any,
    directory: pathlib.Path, mesh: Any, rules: AxisRules, progress: bool,
) -> Any:  # fmt: skip
    """The averaged parameters after a stage."""
    stage = tcfg.stages[number]
    optimizer = make_optimizer(stage)
    state = training.init_state(net, optimizer, jax.random.key(tcfg.seed + 7), ema=True)
    options: Any = dict(clip_norm=1.0, ema_decay=tcfg.ema)
    how = functools.partial(loss, cfg=cfg, stage=stage, balance=tcfg.balance)
    place, shard = None, HostShard(0, 1)
    if mesh is None:
        step = training.make_train_step(functools.partial(how, fitted=fitted), optimizer, **options)
    else:
        order = fitted.anchors.place if cfg.network.ordered else None
        place, shard = functools.partial(place_batch, mesh=mesh, rules=rules, order=order), host_shard(mesh, rules)
        kept = jax.device_put(fitted, NamedSharding(mesh, PartitionSpec()))
        made = training.make_train_step(
            lambda net, batch, rng, fitted: how(net, batch, rng, fitted=fitted), optimizer,
            shardings=training.state_shardings(state), **options,
        )  # fmt: skip

        def step(state: Any, batch: Any) -> Any:
            return made(state, batch, kept)

    data = dataset(records, stage, every=tcfg.starts, seed=tcfg.seed * 10 + number, shard=shard)
    state = training.fit(
        step, state, iter(data), steps=stage.steps, directory=directory / stage.name,
        config={"model": cfg, "stage": stage, "seed": tcfg.seed}, checkpoint_every=tcfg.checkpoint_every,
        log_every=tcfg.log_every, place=place, progress=progress, description=stage.name,
    )  # fmt: skip
    return state.ema_params


def make_optimizer(stage: StageConfig) -> optax.GradientTransformation:
    """AdamW of a stage."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, stage.learning_rate, min(stage.warmup, stage.steps // 4 + 1), max(stage.steps, 2),
        0.02 * stage.learning_rate,
    )  # fmt: skip
    mask = functools.partial(jax.tree.map, lambda x: x.ndim >= 2)
    return optax.adamw(schedule, b2=0.99, weight_decay=stage.weight_decay, mask=mask)
