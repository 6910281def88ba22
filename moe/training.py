"""The train state, the builder of train steps, and the loop that survives being killed.

Loss functions
--------------
`loss_fn(params, batch, rng) -> (objective, metrics)`. The objective is a scalar, a `Mean(total, weight)`, or a dict of
these whose sum is minimised. A `Mean` is a weighted mean that has not been divided yet: `total = sum(mask * error)`,
`weight = sum(mask)`. Handing over the two parts instead of their quotient is what makes gradient accumulation exact:
with `accumulate=k` every Mean is divided by its weight over the *whole* batch, so k micro-batches with unequal masks
give the gradient of one big batch. A Mean of weight 0 counts as 0 with zero gradient, so a batch without
targets changes nothing. A plain scalar counts as Mean(x, 1): micro-batches are averaged. `metrics` is a dict of the
same kinds, reported but not differentiated. Weights must not depend on the parameters. (Convention ours.)

The exactness holds for losses whose examples do not interact and which draw no random numbers across a batch: every
micro-batch gets its own key.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from moe.checkpoint import Checkpoints, DataIterator
from moe.params import path_name
from moe.sharding import constrain

T = TypeVar("T")
Tree: TypeAlias = Any

SIGTERM_EXIT_CODE = 143
"""What a run exits with after SIGTERM (128 + 15), once its state is on disk; the same command goes on from there."""


class DivergedError(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


@struct.dataclass
class Mean:
    """A weighted mean before its division: total and weight add up over micro-batches.

    Attributes:
        total: scalar, sum of weight times value.
        weight: scalar, sum of weights, >= 0 and independent of the parameters.
    """

    total: Any
    weight: Any

    @classmethod
    def of(cls, values: Float[Array, "..."], where: Any = None) -> "Mean":
        """The mean of `values` where the mask (bool, or weights; broadcast) is not 0.

        Values outside the mask may be NaN: the mean and its gradient with respect to `values` stay clean. Where
        `values` are computed from poisoned targets, replace those first: 0 * NaN is NaN on the way back.
        """
        if where is None:
            return cls(jnp.sum(values, dtype=jnp.float32), jnp.float32(values.size))
        where = jnp.broadcast_to(jnp.asarray(where), values.shape).astype(jnp.float32)
        kept = jnp.where(where != 0, values, 0).astype(jnp.float32)
        return cls(jnp.sum(kept * where), jnp.sum(where))

    def value(self) -> Float[Array, ""]:
        """total / weight, or 0 where the weight is 0."""
        some = self.weight > 0
        return jnp.where(some, self.total / jnp.where(some, self.weight, 1), 0)


LossFn: TypeAlias = Callable[..., tuple[Any, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Precision: parameters are stored in their own dtype (ParamSpec) and cast before the loss function sees them.

    Batches are not cast: coordinates, times and targets lose too much in bfloat16; a model casts its activations where
        it wants to.

    Attributes:
        compute: dtype name of floating-point parameters inside the loss function.
        keep: regular expressions of parameter paths ("router", "norm/scale$") that stay as stored.
    """

    compute: str = "float32"
    keep: tuple[str, ...] = ()

    def __post_init__(self):
        if self.compute not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"compute dtype {self.compute!r} is not one of float32, bfloat16, float16")

    def cast(self, params: T) -> T:
        """The parameters in the compute dtype; gradients flow back to the stored dtype."""

        def leaf(path, x):
            kept = not jnp.issubdtype(x.dtype, jnp.floating) or any(re.search(p, path_name(path)) for p in self.keep)
            return x if kept else x.astype(self.compute)

        return jax.tree_util.tree_map_with_path(leaf, params)


@struct.dataclass
class TrainState:
    """Everything a step changes.

    Attributes:
        step: int32, batches seen, skipped updates included.
        params, opt_state: trees.
        rng: typed key; step n draws from fold_in(rng, n).
        skipped: int32, updates skipped because loss or gradient was not finite.
        skipped_run: int32, how many of them in a row up to now.
        ema_params: exponential moving average of params, or None.
    """

    step: Any
    params: Any
    opt_state: Any
    rng: Any
    skipped: Any
    skipped_run: Any
    ema_params: Any = None


def _state_of(params: Tree, opt_state: Tree, rng: Any, ema: bool) -> TrainState:
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=opt_state,
        rng=rng,
        skipped=jnp.int32(0),
        skipped_run=jnp.int32(0),
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
    )


def abstract_state(params: Tree, optimizer: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """The TrainState of jax.ShapeDtypeStruct for these parameters: the target of a restore and the argument of AOT
    compilation.

    Args:
        params: abstract (`moe.params.abstract(specs, mesh, rules)`) or concrete. Their shardings carry over to the
            moments of the optimiser that have a parameter's path and shape; everything else is replicated on the same
            mesh.
        optimizer: any optax transformation.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda p, k: _state_of(p, optimizer.init(p), k, ema), params, key)
    flat = jax.tree_util.tree_leaves_with_path(params)
    placed = {
        tuple(map(str, path)): (leaf.shape, leaf.sharding) for path, leaf in flat if getattr(leaf, "sharding", None)
    }
    meshes = {sharding.mesh for _, sharding in placed.values() if isinstance(sharding, NamedSharding)}
    if len(meshes) > 1:
        raise ValueError(f"the parameters lie on {len(meshes)} different meshes; place them on one")
    if not meshes:
        return shapes
    replicated = NamedSharding(meshes.pop(), PartitionSpec())

    def place(path, leaf):
        path = tuple(map(str, path))
        for start in range(len(path) + 1):  # the longest suffix that is a parameter's path
            shape, sharding = placed.get(path[start:], (None, replicated))
            if shape == leaf.shape:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    return jax.tree_util.tree_map_with_path(place, shapes)


def state_shardings(state: TrainState) -> TrainState:
    """The shardings of a state or abstract state, for `make_train_step(shardings=...)`."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def init_state(
    params: Tree, optimizer: optax.GradientTransformation, rng: Key[Array, ""], *, ema: bool = False
) -> TrainState:
    """The state before the first step; the optimiser's moments are made on the devices of their parameters."""
    placed = abstract_state(params, optimizer, ema=ema)
    shardings = state_shardings(placed) if isinstance(placed.step.sharding, NamedSharding) else None
    impl = jax.random.key_impl(rng)
    data = np.asarray(jax.random.key_data(rng))

    def build(params, data):
        return _state_of(params, optimizer.init(params), jax.random.wrap_key_data(data, impl=impl), ema)

    return jax.jit(build, out_shardings=shardings)(params, data)


def _means(values: Any, name: str) -> dict[str, Mean]:
    if isinstance(values, Mean) or not isinstance(values, Mapping):
        values = {name: values}
    means = {
        key: item if isinstance(item, Mean) else Mean(jnp.asarray(item, jnp.float32), jnp.float32(1))
        for key, item in values.items()
    }
    for key, mean in means.items():
        if jnp.shape(mean.total) or jnp.shape(mean.weight):
            raise ValueError(
                f"{name} {key!r} has shape {jnp.shape(mean.total)}; reduce it to a scalar or a Mean of scalars"
            )
    return means


def _split(batch: Tree, parts: int) -> Tree:
    """[B, ...] -> [parts, B / parts, ...]; micro-batch m takes rows m, m + parts, ..., so that no row changes its
    device.
    """

    def leaf(x):
        if x.shape[0] % parts:
            raise ValueError(f"a batch of {x.shape[0]} rows does not divide into accumulate={parts} micro-batches")
        x = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(leaf, batch)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
    nan_guard: bool = True,
    ema_decay: float | None = None,
    policy: Policy = Policy(),
    shardings: TrainState | None = None,
) -> jax.stages.Wrapped:
    """The jitted function step(state, batch, *frozen) -> (state, metrics). `state` is donated: use the returned one.
    `frozen` is handed to loss_fn(params, batch, rng, *frozen) as it is: a teacher's parameters, say, which are neither
    trained, cast nor split into micro-batches.

    Args:
        loss_fn: see the module's docstring.
        optimizer: optax transformation; its schedules count applied updates, not skipped ones.
        accumulate: micro-batches per update. The weights of the objective are summed over all of them first, in a pass
            of which the compiler keeps only what the weights depend on, usually the masks.
        clip_norm: gradients of a larger global norm are scaled down to it.
        nan_guard: an update whose loss or gradient norm is not finite leaves params, optimiser and average as they were
            and is counted.
        ema_decay: weight of the old average; needs a state made with ema=True.
        policy: precision of the parameters inside loss_fn.
        shardings: `state_shardings(state)`: keeps the state where it is on a mesh. Call the step inside `use_mesh`.

    Returns:
        metrics: float32 scalars: "loss", "loss/NAME" of a dict objective, "grad_norm" (before clipping), "skipped",
            "skipped_run" and what loss_fn reported.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate} must be at least 1")

    def terms_of(params, batch, rng, frozen):
        objective, metrics = loss_fn(policy.cast(params), batch, rng, *frozen)
        return _means(objective, "loss"), _means(metrics, "metric")

    def contribution(params, batch, rng, frozen, weights):
        terms, metrics = terms_of(params, batch, rng, frozen)
        weights = {name: term.weight for name, term in terms.items()} if weights is None else weights
        parts = {name: Mean(term.total, jax.lax.stop_gradient(weights[name])) for name, term in terms.items()}
        return sum(part.value() for part in parts.values()), (terms, metrics)

    def gradients(params, batch, rng, frozen):
        if accumulate == 1:
            return jax.grad(contribution, has_aux=True)(params, batch, jax.random.fold_in(rng, 0), frozen, None)
        micro = (_split(batch, accumulate), jnp.arange(accumulate))

        def add(tree, other):
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), tree, other)

        def zeros(tree):
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), tree)

        def weigh(total, item):
            terms, _ = terms_of(params, item[0], jax.random.fold_in(rng, item[1]), frozen)
            return add(total, {name: term.weight for name, term in terms.items()}), None

        def accumulate_one(total, item):
            key = jax.random.fold_in(rng, item[1])
            got = jax.grad(contribution, has_aux=True)(params, item[0], key, frozen, weights)
            return add(total, got), None

        first = jax.tree.map(lambda leaf: leaf[0], micro)
        shapes = jax.eval_shape(lambda item: terms_of(params, item[0], rng, frozen)[0], first)
        weights, _ = jax.lax.scan(weigh, zeros({name: term.weight for name, term in shapes.items()}), micro)
        grads = jax.eval_shape(
            lambda item: jax.grad(contribution, has_aux=True)(params, item[0], rng, frozen, weights), first
        )
        (grads, aux), _ = jax.lax.scan(accumulate_one, zeros(grads), micro)
        return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), aux

    def step(state: TrainState, batch: Any, *frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        if (ema_decay is not None) != (state.ema_params is not None):
            raise ValueError(f"ema_decay={ema_decay} needs a state made with ema={ema_decay is not None}")
        grads, (terms, metrics) = gradients(state.params, batch, jax.random.fold_in(state.rng, state.step), frozen)
        taken = {"loss", "grad_norm", "skipped", "skipped_run"} & metrics.keys()
        if taken:
            raise ValueError(f"loss_fn reports {sorted(taken)}, names that the train step uses itself; rename them")
        loss = sum(term.value() for term in terms.values())
        norm = optax.tree.norm(grads)
        if clip_norm is not None:
            scale = jnp.where(norm > clip_norm, clip_norm / norm, 1.0)
            grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema_params
        if ema_decay is not None:
            kept = ema_decay
            ema = jax.tree.map(lambda old, new: (old * kept + new * (1 - kept)).astype(old.dtype), ema, params)
        new, old = (params, opt_state, ema), (state.params, state.opt_state, state.ema_params)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        if nan_guard:
            new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=new[0],
            opt_state=new[1],
            ema_params=new[2],
            skipped=state.skipped + ~good,
            skipped_run=jnp.where(good, 0, state.skipped_run + 1),
        )
        reported = {"loss": loss, "grad_norm": norm, "skipped": state.skipped, "skipped_run": state.skipped_run}
        reported |= {f"loss/{name}": term.value() for name, term in terms.items() if len(terms) > 1}
        reported |= {name: mean.value() for name, mean in metrics.items()}
        return state, {name: jnp.asarray(value, jnp.float32) for name, value in reported.items()}

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


# --------------------------------------------------------------------------------------------------


class _Log:
    """metrics.jsonl: one row a line; rows beyond the restored step are dropped when a run goes on."""

    def __init__(self, path: pathlib.Path | None, step: int):
        self._file = None
        if path is None or jax.process_index() != 0:
            return
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)
        self._file = path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        if self._file is not None:
            row = {key: None if isinstance(v, float) and not np.isfinite(v) else v for key, v in row.items()}
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """On disk before the checkpoint that stands for these rows."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _complete_lines(path: pathlib.Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a line cut off by a kill is left out. Values that were not finite are None."""
    return [json.loads(line) for line in _complete_lines(pathlib.Path(path))]


class _Termination:
    """True once SIGTERM has come. In a multi-process run JAX's coordination service hears it on any host and all agree
    on a step.
    """

    def __init__(self):
        self._asked = False

    def _hear(self, *_: Any) -> None:
        self._asked = True

    def at(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    @contextlib.contextmanager
    def listening(self) -> Iterator["_Termination"]:
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = signal.signal(signal.SIGTERM, self._hear)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, previous)


def fit(
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    data: DataIterator,
    *,
    steps: int,
    directory: str | os.PathLike[str] | None = None,
    config: Any = None,
    extra: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    checkpoint_every: int = 500,
    keep: int | None = 2,
    place: Callable[[Any], Any] | None = None,
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
    evaluate_every: int | None = None,
    log_every: int = 10,
    max_skipped: int = 50,
    progress: bool = True,
    description: str = "training",
) -> TrainState:
    """Trains to `steps`, going on from the newest checkpoint in `directory` if there is one.

    `directory` gets `checkpoints/STEP/` and `metrics.jsonl`, a row every `log_every` steps and after every evaluation.
    A run killed at any moment (SIGKILL) and started again yields the same metrics, bit for bit on the same machine:
    state, data iterator and random key are restored and the rows after the restored step dropped. On SIGTERM the step
    under way is finished and saved, and SystemExit(143) raised.

    Args:
        train_step: from `make_train_step`.
        state: where to start, also the restore target (its shardings say where restored arrays go). Donated.
        data: infinite iterator of batches with get_state/set_state, e.g. iter(grain dataset.repeat()); restored with
            the state.
        steps: total, counted from the first run.
        config, extra, ignore: saved with and compared on restore, see `moe.checkpoint`.
        checkpoint_every: in steps; the last step is always saved.
        keep: newest checkpoints that stay on disk.
        place: puts a host-local batch on the devices, e.g. lambda b: global_batch(b, mesh, rules).
        evaluate: state -> {name: number}, every `evaluate_every` steps and after the last; logged as "evaluation/NAME".
        log_every: in steps; reading metrics waits for the device.
        max_skipped: DivergedError after so many skipped updates in a row (looked at when logging).
        progress: a bar on stderr, in process 0.

    Returns:
        The state after `steps` steps.

    Raises:
        SystemExit: code 143, after SIGTERM.
        DivergedError; CheckpointError; ValueError when the data end early.
    """
    root = None if directory is None else pathlib.Path(directory)
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if root is not None:
            checkpoints = stack.enter_context(Checkpoints(root / "checkpoints", config=config, extra=extra, keep=keep))
            if checkpoints.latest() is not None:
                state = checkpoints.restore(state, iterator=data, ignore=ignore).state
        step = start = int(state.step)
        log = _Log(None if root is None else root / "metrics.jsonl", start)
        stack.callback(log.close)
        termination = stack.enter_context(_Termination().listening())
        bar = stack.enter_context(
            tqdm(
                total=steps,
                initial=start,
                desc=description,
                unit="step",
                disable=not progress or jax.process_index() != 0,
            )
        )
        clock, logged = time.perf_counter(), start
        while step < steps:
            try:
                batch = next(data)
            except StopIteration:
                raise ValueError(f"the data ended after {step} of {steps} steps; repeat the dataset") from None
            state, metrics = train_step(state, batch if place is None else place(batch))
            step += 1
            bar.update()
            last = step == steps
            if step % log_every == 0 or last:
                row = {name: float(value) for name, value in metrics.items()}
                now = time.perf_counter()
                log.write({"step": step, **row, "steps_per_second": (step - logged) / (now - clock)})
                clock, logged = now, step
                bar.set_postfix_str(f"loss {row['loss']:.4g}", refresh=False)
                if row["skipped_run"] >= max_skipped:
                    raise DivergedError(
                        f"the last {row['skipped_run']:.0f} updates up to step {step} had a loss or gradient that is "
                        "not finite; lower the learning rate or look at the batches"
                    )
            if evaluate is not None and (last or (evaluate_every and step % evaluate_every == 0)):
                log.write({"step": step} | {f"evaluation/{name}": float(v) for name, v in evaluate(state).items()})
            stop = termination.at(step)
            if checkpoints is not None and (stop or last or step % checkpoint_every == 0):
                log.sync()
                checkpoints.save(step, state, data)
            if stop and not last:
                if checkpoints is not None:
                    checkpoints.wait()
                bar.close()
                saved = (
                    "nothing was saved: no directory" if root is None else "saved; the same command goes on from here"
                )
                print(f"SIGTERM at step {step} of {steps}: {saved}", file=sys.stderr)
                raise SystemExit(SIGTERM_EXIT_CODE)
    return state
