"""From irregular reports to padded fixed-shape windows: the grain pipeline of training, and the same windows for
forecasting.

A *window* is what was known at an initial time t0. Reports of one fixed platform form one token whose R slots hold its
latest report at or before t0 - slot hours; every report of a moving platform (a sounding level, an aircraft) is a token
of its own. Nothing after t0 enters. Targets are the reports within half a tolerance of t0 + lead.

A *cycling* sample adds the windows before t0 and the targets of every step from one analysis to the next, see
`Cycling`.

Shapes: N tokens, R slots, V variables of a stream, L leads, Q query points, K earlier windows, S scored steps of a
chain.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import grain
import numpy as np

from earth import geometry
from earth.observations import EmptyWindowError, ObservationError, Reports
from moe.params import Param
from moe.sharding import HostShard


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """What the model reads of one sensor.

    Attributes:
      sensor: name of the stream, a key of the reports.
      variables: V columns.
      slots: R hours before the initial time at which a fixed platform's history is read; (0,) for moving platforms.
      tolerance: hours; a slot takes the latest report no older than this before its nominal time.
      tokens: N, the fixed number of tokens of a window; more are thinned, fewer padded.
      moving: every report is a token (soundings, aircraft) instead of every platform.
      instruments: groups of variables one instrument measures; hidden together in masked training, each alone when
        empty.
    """

    sensor: str
    variables: tuple[str, ...]
    slots: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 6.0, 12.0, 23.0, 24.0)
    tolerance: float = 1.0
    tokens: int = 64
    moving: bool = False
    instruments: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self):
        if not self.variables:
            raise ValueError(f"stream {self.sensor!r} has no variables; name at least one column of its reports")
        if self.moving and self.slots != (0.0,):
            raise ValueError(
                f"stream {self.sensor!r} moves: slots must be (0.0,), not {self.slots}; "
                "a moving platform has no history at a place"
            )
        if not self.slots or list(self.slots) != sorted(set(self.slots)) or self.slots[0] != 0:
            raise ValueError(f"slots {self.slots} of stream {self.sensor!r} must rise from 0")
        if not self.tolerance > 0 or self.tokens < 1:
            raise ValueError(
                f"stream {self.sensor!r} has tolerance {self.tolerance} h and tokens {self.tokens}; "
                "both must be above 0"
            )
        unknown = {v for group in self.instruments for v in group} - set(self.variables)
        if unknown:
            raise ValueError(
                f"instruments of {self.sensor!r} name {sorted(unknown)}, "
                f"which are not among its variables {self.variables}"
            )

    @property
    def span(self) -> float:
        """Hours from the oldest report a window may hold to its initial time."""
        return self.slots[-1] + self.tolerance


@flax.struct.dataclass
class Observations:
    """One stream's observations in a window, in SI units, as the public verb `assimilate` takes them. Leading axes are
    batch axes.

    Attributes:
      value: [..., N, R, V] SI; anything where mask is False.
      mask: [..., N, R, V] True where observed.
      age: [..., N, R] hours before the analysis time (>= 0).
      latitude, longitude: [..., N] degrees; height: [..., N] m.
      view_angle: [..., N] degrees from nadir; 0 for in-situ sensors.
      error: [..., N, R, V] standard deviation of the observation error, SI; 0 where not stated.
    """

    value: Param  # [..., N, R, V]
    mask: Param  # [..., N, R, V]
    age: Param  # [..., N, R]
    latitude: Param  # [..., N]
    longitude: Param  # [..., N]
    height: Param  # [..., N]
    view_angle: Param  # [..., N]
    error: Param  # [..., N, R, V]


@flax.struct.dataclass
class Tokens:
    """Observations after standardisation: what the network reads. Fields as in `Observations`; `value` holds
    standardised anomalies, 0 where masked.
    """

    value: Param  # [..., N, R, V]
    mask: Param  # [..., N, R, V]
    age: Param  # [..., N, R]
    latitude: Param  # [..., N]
    longitude: Param  # [..., N]
    height: Param  # [..., N]


@flax.struct.dataclass
class Targets:
    """One stream's targets at L leads; positions are [..., Q] for fixed platforms and [..., L, Q] for moving ones.

    `hidden` marks values that are no input of the window: all of them at leads beyond 0.
    """

    value: Param  # [..., L, Q, V]
    mask: Param  # [..., L, Q, V]
    latitude: Param  # [..., Q]
    longitude: Param  # [..., Q]
    height: Param  # [..., Q]


class Stream:
    """One stream's record, indexed for window lookups.

    Args:
      reports: the record; NaN heights must have been filled.
      config: what to read of it.
      values: [n, V] what windows hold instead of the SI values (standardised anomalies in training); None for SI.
    """

    def __init__(self, reports: Reports, config: StreamConfig, values: np.ndarray | None = None):
        self.config = config
        self.reports = reports
        columns = reports.index(config.variables)
        self.values = np.asarray(reports.values[:, columns] if values is None else values, np.float32)
        self.error = None if reports.error is None else reports.error[:, columns]
        self.time = geometry.seconds(reports.times).astype(np.int64)
        if config.moving:
            order = np.argsort(self.time, kind="stable")
            self._order, self._sorted_time = order, self.time[order]
        else:
            self._key = reports.platform.astype(np.int64) * 2**34 + self.time
            first = np.searchsorted(reports.platform, np.arange(len(reports.platforms)))
            self._first = np.minimum(first, max(len(reports) - 1, 0))
            if len(reports.platforms) > config.tokens:
                raise ObservationError(
                    f"{len(reports.platforms)} platforms of {config.sensor!r} do not fit the {config.tokens} tokens "
                    "of a window; "
                    f"set tokens={len(reports.platforms)} or thin the network"
                )

    def _lookup(self, at: np.ndarray, before: Any, after: Any) -> tuple[np.ndarray, np.ndarray]:
        """(row, found), each [P, len(at)]: each fixed platform's latest report in (at - before, at + after] seconds."""
        p = np.arange(len(self.reports.platforms), dtype=np.int64)[:, None] * 2**34
        row = np.searchsorted(self._key, p + at[None, :] + np.int64(after), side="right") - 1
        inside = row >= 0
        row = np.maximum(row, 0)
        here = self.reports.platform[row] == np.arange(len(p))[:, None]
        found = inside & here & (self.time[row] > at[None, :] - before)
        return row, found

    def tokens(self, time: Any, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """Windows at `time` (int32 seconds; one, or [B]): arrays of `Tokens` (values as given to the constructor), N =
        config.tokens.
        """
        times = np.atleast_1d(np.asarray(time, np.int64))
        c, rep = self.config, self.reports
        b, n, r, v = len(times), c.tokens, len(c.slots), len(c.variables)
        out = {
            "value": np.full((b, n, r, v), np.nan, np.float32),
            "mask": np.zeros((b, n, r, v), bool),
            "age": np.zeros((b, n, r), np.float32),
            "latitude": np.zeros((b, n), np.float32),
            "longitude": np.zeros((b, n), np.float32),
            "height": np.zeros((b, n), np.float32),
        }
        if c.moving:
            for i, t in enumerate(times):
                rows = self._recent(t - c.tolerance * 3600, t, n, rng)
                k = len(rows)
                out["value"][i, :k, 0], out["age"][i, :k, 0] = self.values[rows], (t - self.time[rows]) / 3600.0
                for name in ("latitude", "longitude", "height"):
                    out[name][i, :k] = getattr(rep, name)[rows]
        else:
            k = len(rep.platforms)
            slots = np.asarray(c.slots)
            at = (times[:, None] - (slots * 3600).astype(np.int64)).reshape(-1)
            row, found = self._lookup(at, c.tolerance * 3600, 0.0)
            row, found = (a.reshape(k, b, r).transpose(1, 0, 2) for a in (row, found))  # [B, P, R]
            out["value"][:, :k] = np.where(found[..., None], self.values[row], np.nan)
            out["age"][:, :k] = np.where(found, (times[:, None, None] - self.time[row]) / 3600.0, slots)
            newest = np.take_along_axis(row, found.argmax(-1)[..., None], -1)[..., 0]
            newest = np.where(found.any(-1), newest, self._first)
            for name in ("latitude", "longitude", "height"):
                out[name][:, :k] = getattr(rep, name)[newest]
        np.isfinite(out["value"], out=out["mask"])
        np.nan_to_num(out["value"], copy=False)
        return out if np.ndim(time) else {name: x[0] for name, x in out.items()}

    def targets(
        self, time: Any, leads: Any, queries: int = 0, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """Targets at time + leads hours (`time` one, or [B]): arrays of `Targets`; Q = config.tokens for fixed
        platforms, `queries` for moving.
        """
        times = np.atleast_1d(np.asarray(time, np.int64))
        c, rep = self.config, self.reports
        at = times[:, None] + np.round(np.asarray(leads) * 3600).astype(np.int64)
        b, count, v = len(times), at.shape[1], len(c.variables)
        if not c.moving:
            k = len(rep.platforms)
            half = c.tolerance * 1800
            row, found = self._lookup(at.reshape(-1), half, half)
            value = np.full((b, count, c.tokens, v), np.nan, np.float32)
            value[:, :, :k] = (
                np.where(found[..., None], self.values[row], np.nan).reshape(k, b, count, v).transpose(1, 2, 0, 3)
            )
            where = {}
            for name in ("latitude", "longitude", "height"):
                where[name] = np.zeros((b, c.tokens), np.float32)
                where[name][:, :k] = getattr(rep, name)[self._first]
        else:
            value = np.full((b, count, queries, v), np.nan, np.float32)
            where = {name: np.zeros((b, count, queries), np.float32) for name in ("latitude", "longitude", "height")}
            for index in np.ndindex(b, count):
                t = at[index]
                rows = self._recent(t - c.tolerance * 1800, t + c.tolerance * 1800, queries, rng)
                value[index][: len(rows)] = self.values[rows]
                for name in where:
                    where[name][index][: len(rows)] = getattr(rep, name)[rows]
        out = {"value": np.nan_to_num(value), "mask": np.isfinite(value), **where}
        return out if np.ndim(time) else {name: x[0] for name, x in out.items()}

    def _recent(self, after: Any, until: Any, most: int, rng: np.random.Generator | None) -> np.ndarray:
        """Rows with after < time <= until, thinned at random to `most`; without a generator the thinning depends on
        `until` alone.
        """
        low, high = np.searchsorted(self._sorted_time, [after, until], side="right")
        rows = self._order[low:high]
        if len(rows) > most:
            rows = np.sort((rng or np.random.default_rng(int(until) & 0x7FFFFFFF)).choice(rows, most, replace=False))
        return rows

    def window(self, time: int) -> Observations:
        """The window at one time in SI units, for `assimilate`. Raises EmptyWindowError when nothing was observed."""
        t = self.tokens(time)
        if not t["mask"].any():
            raise EmptyWindowError(
                f"no {self.config.sensor} report in the {self.config.span:g} h before {geometry.datetimes(time)}; "
                "widen the window or start where the record does"
            )
        angle, error = np.zeros_like(t["height"]), np.zeros_like(t["value"])
        if self.config.moving:
            row = self._recent(time - self.config.tolerance * 3600, time, self.config.tokens, None)[:, None]
            found = np.ones_like(row, bool)
        else:
            at = np.int64(time) - (np.asarray(self.config.slots) * 3600).astype(np.int64)
            row, found = self._lookup(at, self.config.tolerance * 3600, 0)
        k = len(row)
        if self.reports.view_angle is not None:  # of the newest report found
            newest = np.take_along_axis(row, found.argmax(-1)[:, None], -1)[:, 0]
            angle[:k] = np.where(found.any(-1), np.nan_to_num(self.reports.view_angle[newest]), 0.0)
        if self.error is not None:
            error[:k] = np.where(found[..., None], np.nan_to_num(self.error[row]), 0.0)
        return Observations(**t, view_angle=angle, error=error)


@dataclasses.dataclass(frozen=True)
class Cycling:
    """The chain of analyses of a training sample (ours; its spin-up follows AIFS-DOP 2606.19093).

    The window at t0 - cycles * hours is assimilated from the climate normal, the state advanced by `hours`, the next
    window assimilated into it, and so on to the window at t0; then `rollout` times the state is advanced by `hours` and
    an empty window assimilated, which is autoregression: each forecast starts from the forecast before. Every analysis
    of the chain but the first `spin_up` is scored by its forecast over `hours`, at the reports of that hour, on top of
    the leads of the sample, which start at t0. So the last target of a roll-out lies (rollout + 1) * hours after t0.

    Attributes:
      cycles: K windows before t0; 0 with rollout 0 switches the chain off.
      hours: between windows.
      spin_up: first analyses without a loss of their own; at most `cycles`.
      rollout: steps in which nothing is observed.
      through_time: gradients flow back through all analyses; False stops them where a background is assimilated.
    """

    cycles: int = 0
    hours: float = 6.0
    spin_up: int = 0
    rollout: int = 0
    through_time: bool = True

    def __post_init__(self):
        if self.cycles < 0 or self.rollout < 0:
            raise ValueError(f"cycles {self.cycles} and rollout {self.rollout} must be at least 0")
        if not self.hours > 0:
            raise ValueError(f"hours {self.hours} between the windows of a chain must be above 0")
        if not 0 <= self.spin_up <= self.cycles:
            raise ValueError(f"spin_up {self.spin_up} must lie between 0 and cycles {self.cycles}")

    @property
    def active(self) -> bool:
        """Whether there is a chain at all."""
        return self.cycles > 0 or self.rollout > 0

    @property
    def offsets(self) -> tuple[float, ...]:
        """Hours from t0 to the K earlier windows, oldest first; all below 0."""
        return tuple((k - self.cycles) * self.hours for k in range(self.cycles))

    @property
    def steps(self) -> tuple[float, ...]:
        """Hours from t0 to the valid times of the S scored steps."""
        if not self.active:
            return ()
        return tuple((k + 1 - self.cycles) * self.hours for k in range(self.spin_up, self.cycles + self.rollout + 1))

    @property
    def before(self) -> float:
        """Hours from the first window to t0."""
        return self.cycles * self.hours

    @property
    def after(self) -> float:
        """Hours from t0 to the last scored step."""
        return max((0.0, *self.steps))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How training batches are drawn.

    Attributes:
      strata: L groups of leads in hours; each batch takes one lead of each group, so that every batch covers short and
        long. 0 is the analysis.
      queries: Q for moving streams.
      cycling: the chain of analyses; none by default.
      partners: the second half of a batch is drawn so that sample B - 1 - i has the time of day of sample i, its
        partner in mixing: dynamics are linear at a given hour, not across hours.
    """

    strata: tuple[tuple[float, ...], ...]
    queries: int = 128
    cycling: Cycling = Cycling()
    partners: bool = False

    def __post_init__(self):
        if not self.strata or not all(self.strata) or min(map(min, self.strata)) < 0:
            raise ValueError(f"strata {self.strata} must be non-empty groups of leads of at least 0 h")


class _Source(grain.sources.RandomAccessDataSource):
    """Initial times (and their fold) by index."""

    def __init__(self, times: np.ndarray, folds: np.ndarray):
        self._pairs = np.stack([times, folds], 1).astype(np.int32)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._pairs[int(index)]

    def __repr__(self) -> str:
        return f"InitialTimes({len(self)})"


class _Batch(grain.transforms.RandomMap):
    """(time, fold) [B, 2] of a global batch -> this host's rows of it."""

    def __init__(
        self, streams: Mapping[str, Stream], sampling: Sampling, shard: HostShard, times: np.ndarray, folds: np.ndarray
    ):
        self._streams, self._sampling, self._shard = streams, sampling, shard
        self._all = np.stack([times, folds], 1)
        self._hour, group = np.unique(times % 86400, return_inverse=True)
        self._rows = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])

    def random_map(self, element: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        s = self._sampling
        leads = np.array([rng.choice(group) for group in s.strata], np.float32)
        if s.partners:
            element, half = element.copy(), len(element) // 2
            of_day = np.searchsorted(self._hour, element[:half, 0] % 86400)
            element[::-1][:half] = self._all[[rng.choice(self._rows[g]) for g in of_day]]
        mine = np.split(element, self._shard.count)[self._shard.index]
        return sample(self._streams, mine[:, 0], leads, fold=mine[:, 1], queries=s.queries, rng=rng, cycling=s.cycling)


def sample(
    streams: Mapping[str, Stream],
    time: np.ndarray,
    leads: Any,
    *,
    fold: Any = -1,
    queries: int = 128,
    rng: np.random.Generator | None = None,
    cycling: Cycling = Cycling(),
) -> dict[str, Any]:
    """A batch at times [B]: {"time" int32 [B], "fold" int32 [B], "leads" [B, L], "tokens" {stream: Tokens}, "targets"
    {stream: Targets}}.

    With an active chain also "windows" {stream: Tokens [B, K, N, ...]}, the earlier windows, oldest first (without
    cycles it is left out), and "steps" {stream: Targets [B, S, ...]}, the reports at `cycling.steps`.
    """
    leads = np.asarray(leads, np.float32)
    batch = {
        "time": np.asarray(time, np.int32),
        "fold": np.broadcast_to(np.asarray(fold, np.int32), (len(time),)).copy(),
        "leads": np.tile(leads, (len(time), 1)),
        "tokens": {name: Tokens(**s.tokens(time, rng)) for name, s in streams.items()},
        "targets": {name: Targets(**s.targets(time, leads, queries, rng)) for name, s in streams.items()},
    }
    if cycling.cycles:
        offsets = np.round(np.asarray(cycling.offsets) * 3600).astype(np.int64)
        at = (np.asarray(time, np.int64)[:, None] + offsets).reshape(-1)
        batch["windows"] = {
            name: Tokens(**{k: x.reshape(len(time), len(offsets), *x.shape[1:]) for k, x in s.tokens(at, rng).items()})
            for name, s in streams.items()
        }
    if cycling.active:
        batch["steps"] = {name: Targets(**s.targets(time, cycling.steps, queries, rng)) for name, s in streams.items()}
    return batch


def dataset(
    streams: Mapping[str, Stream],
    times: np.ndarray,
    folds: np.ndarray,
    sampling: Sampling,
    *,
    batch: int,
    seed: int,
    shard: HostShard = HostShard(0, 1),
) -> grain.IterDataset:
    """Endless, shuffled, sharded and resumable batches.

    Args:
      streams: the records.
      times: int32 [n] initial times allowed for training; folds: [n] cross-fitting fold of each (-1 none).
      sampling: leads and queries.
      batch: global batch size; each host reads its own batch / shard.count consecutive rows of it, so that the global
        batch does not depend on the number of hosts (but for the thinning of moving streams, drawn by each host).
      seed: of the shuffle and of everything drawn per batch; hosts draw the same leads.

    Returns:
      grain.IterDataset; its iterators have get_state/set_state, so a resumed run sees the same batches.

    Raises:
      EmptyWindowError: no initial time is left for training.
      ValueError: batch is not a multiple of the hosts.
    """
    if not len(times):
        raise EmptyWindowError(
            "no initial time is left for training; widen the training period or shorten leads and slots"
        )
    if batch % shard.count:
        raise ValueError(f"batch {batch} does not divide over {shard.count} hosts; choose a multiple")
    data = grain.MapDataset.source(_Source(np.asarray(times), np.asarray(folds))).seed(seed).shuffle().repeat()
    # Hosts slice whole batches, not the times: rows keep their partners in mixing. (The identity slice keeps the draws,
    # which depend on the number of stages before them, as they have always been.)
    data = (
        data[::1]
        .batch(batch)
        .random_map(_Batch(streams, sampling, shard, np.asarray(times, np.int64), np.asarray(folds, np.int64)))
    )
    return data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def contiguous_folds(times: np.ndarray, count: int, *, block_days: float = 20.0) -> np.ndarray:
    """Cross-fitting fold [n] of each time: blocks of `block_days` days dealt in turn, so that neighbours in time share
    a fold; shorter blocks where the record has too few for every fold to get one. Blocks without a time are not dealt.
    """
    since = np.asarray(times, np.int64) - np.min(times)
    block = since // min(int(block_days * 86400), int(since.max()) // count + 1)
    _, dealt = np.unique(block, return_inverse=True)
    return (dealt % count).astype(np.int32)


def training_times(
    reports: Reports,
    protocol: Any,
    *,
    span_hours: float,
    longest_lead: float,
    every_hours: float | None = None,
    streams: Mapping[str, Stream] | None = None,
    cycling: Cycling = Cycling(),
    candidates: np.ndarray | None = None,
) -> np.ndarray:
    """int32 initial times whose whole span [t - span, t + longest lead] avoids test and validation hours and lies in
    the training period.

    A chain lengthens the span: it starts `cycling.before` hours earlier and ends no earlier than `cycling.after`.

    Args:
      reports: the record that gives start, end and (without `every_hours`) the step.
      streams: where given, no window or target at a time may hold a report outside training hours either; tolerances
        reach beyond the nominal span.
      cycling: the chain of analyses of every sample.
      candidates: int32 times to choose from instead of the record's own steps.
    """
    span_hours, longest_lead = span_hours + cycling.before, max(longest_lead, cycling.after)
    step = int((every_hours or reports.cadence() / 3600) * 3600)
    start, stop = reports.times.min(), reports.times.max()
    times = np.arange(
        start + np.timedelta64(int(span_hours * 3600), "s"),
        stop - np.timedelta64(int(longest_lead * 3600), "s") + np.timedelta64(1, "s"),
        np.timedelta64(step, "s"),
    )
    if candidates is not None:
        inside = geometry.datetimes(candidates)
        times = inside[(inside >= times[0]) & (inside <= times[-1])] if len(times) else inside[:0]
    before, after = np.timedelta64(int(span_hours * 3600), "s"), np.timedelta64(int(longest_lead * 3600), "s")
    found = geometry.seconds(times[protocol.clear(times - before, times + after)])
    for stream in (streams or {}).values():
        foreign = np.unique(stream.time[protocol.role(stream.reports.times) != "train"])
        at = found.astype(np.int64)
        first = np.searchsorted(foreign, at - round((stream.config.span + cycling.before) * 3600), side="right")
        last = np.searchsorted(foreign, at + round((longest_lead + stream.config.tolerance / 2) * 3600), side="right")
        found = found[first == last]
    return found
