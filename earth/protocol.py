"""Evaluation protocols: which hours train, validate and test, and which stations nobody may learn from.

A protocol is data, not code: a small JSON file (`configs/protocols/stations-v1.json`) that a user copies and edits. All
intervals are half-open UTC intervals ``[start, end)``; a time belongs to an interval by its own instant, whatever the
cadence of the record.

The rule that keeps a test clean is `Protocol.clear`: a training sample is usable only if its *whole span*, from the
oldest observation it reads to the last target it is scored on, touches no test or validation hour. Definitions follow
the protocol *stations-v1* of the project's data notes; `Protocol.from_periods` and `Protocol.rotating` are ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

Interval = tuple[np.datetime64, np.datetime64]
Hours = int | float
ROLES = ("unused", "train", "validation", "test")


class ProtocolError(ValueError):
    """A protocol that contradicts itself or cannot be read; the message names the offending entry and the remedy."""


def utc_times(times: Any) -> np.ndarray:
    """Any datetime-like array as naive UTC ``datetime64[ns]``.

    Args:
      times: array of datetime64, pandas index or series (time zones are converted to UTC), ISO strings or datetimes,
        any shape.

    Returns:
      ``datetime64[ns]`` array of the same shape.

    Raises:
      ProtocolError: numbers instead of times (the unit would be a guess), or text that is no time.
    """
    if isinstance(times, pd.DatetimeIndex | pd.Series):
        index = pd.DatetimeIndex(times)
        index = index.tz_convert("UTC").tz_localize(None) if index.tz is not None else index
        return index.to_numpy().astype("datetime64[ns]")
    array = np.asarray(times)
    if np.issubdtype(array.dtype, np.datetime64):
        return array.astype("datetime64[ns]")
    if np.issubdtype(array.dtype, np.number):
        raise ProtocolError(
            f"times must be datetimes, got {array.dtype} values such as {array.reshape(-1)[:1]}; pass datetime64 in UTC"
        )
    try:
        flat = pd.to_datetime(array.reshape(-1), utc=True, format="ISO8601")
    except (ValueError, TypeError) as error:
        raise ProtocolError(
            f"cannot read times such as {array.reshape(-1)[:1]!r}: {str(error).splitlines()[0]}; pass ISO 8601 in UTC"
        ) from error
    return flat.tz_localize(None).to_numpy().astype("datetime64[ns]").reshape(array.shape)


def _intervals(entries: Any, what: str) -> tuple[Interval, ...]:
    out: list[Interval] = []
    for entry in entries:
        if isinstance(entry, str) or len(entry) != 2:
            raise ProtocolError(
                f'{what} interval {entry!r} is not a pair (start, end); write ["2021-01-22", "2021-01-29"]'
            )
        start, end = utc_times(list(entry))
        if not start < end:
            raise ProtocolError(
                f"{what} interval [{start}, {end}) is empty; intervals are half-open, so end must lie after start"
            )
        out.append((start, end))
    return tuple(sorted(out))


def _inside(times: np.ndarray, intervals: Sequence[Interval]) -> np.ndarray:
    mask = np.zeros(times.shape, bool)
    for start, end in intervals:
        mask |= (times >= start) & (times < end)
    return mask


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A split of times and stations.

    Intervals are given as pairs of anything `utc_times` reads and kept as sorted tuples of datetime64[ns] pairs.

    Attributes:
      name: what reports call it.
      test: half-open UTC intervals whose valid times are scored.
      validation: intervals for choices (penalties, early stopping, spread); must not overlap `test`.
      train: intervals that may train; None = every time outside test and validation.
      held_out: stations that are in nobody's inputs, targets or normalisation.
      variables: variables to score, ERA5 names; empty = all.
      leads: lead times in hours, positive, increasing.
      source: free text: where the split comes from.
    """

    name: str
    test: Sequence[Any]
    validation: Sequence[Any] = ()
    train: Sequence[Any] | None = None
    held_out: Sequence[str] = ()
    variables: Sequence[str] = ()
    leads: Sequence[Hours] = ()
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "test", _intervals(self.test, "test"))
        object.__setattr__(self, "validation", _intervals(self.validation, "validation"))
        if self.train is not None:
            object.__setattr__(self, "train", _intervals(self.train, "train"))
        object.__setattr__(self, "held_out", tuple(str(s) for s in self.held_out))
        object.__setattr__(self, "variables", tuple(self.variables))
        object.__setattr__(self, "leads", tuple(float(h) if h != int(h) else int(h) for h in self.leads))
        named = [("test", self.test), ("validation", self.validation), ("train", self.train or ())]
        flat = [(start, end, what) for what, intervals in named for start, end in intervals]
        flat.sort(key=lambda item: item[:2])
        for (_, end, one), (start, _, two) in itertools.pairwise(flat):
            if start < end and not one == two == "train":
                raise ProtocolError(
                    f"protocol {self.name!r}: a {one} interval ends at {end}, after a {two} interval starts at {start};"
                    " separate them"
                )
        if len(set(self.held_out)) != len(self.held_out):
            raise ProtocolError(f"protocol {self.name!r}: held_out names a station twice: {self.held_out}")
        if any(h <= 0 for h in self.leads) or list(self.leads) != sorted(set(self.leads)):
            raise ProtocolError(
                f"protocol {self.name!r}: leads {self.leads} must be positive hours, increasing, each once"
            )

    # -- times
    def role(self, times: Any) -> np.ndarray:
        """'test', 'validation', 'train' or 'unused' (outside `train` where that is given) of each time; same shape
        as `times`.
        """
        t = utc_times(times)
        allowed = np.ones(t.shape, bool) if self.train is None else _inside(t, self.train)
        code = np.where(_inside(t, self.test), 3, np.where(_inside(t, self.validation), 2, allowed.astype(int)))
        return np.asarray(np.asarray(ROLES)[code])

    def clear(self, start: Any, end: Any) -> np.ndarray:
        """True where the closed span [start, end] touches no test or validation hour and, where `train` is given,
        lies in one training interval.

        Args:
          start: times of the oldest input.
          end: times of the last target; broadcast against `start`.

        Returns:
          bool array of the broadcast shape.
        """
        first, last = np.broadcast_arrays(utc_times(start), utc_times(end))
        if (last < first).any():
            raise ProtocolError("clear() got a span that ends before it starts; pass (oldest input, last target)")
        mask = np.ones(first.shape, bool)
        for a, b in (*self.test, *self.validation):
            mask &= ~((first < b) & (last >= a))
        if self.train is not None:
            mask &= np.logical_or.reduce([(first >= a) & (last < b) for a, b in _merged(self.train)])
        return mask

    def block(self, times: Any, role: str = "test") -> np.ndarray:
        """Index of the test (or validation) interval that holds each time, -1 outside: the blocks of the bootstrap."""
        intervals = {"test": self.test, "validation": self.validation}[role]
        t = utc_times(times)
        out = np.full(t.shape, -1)
        for i, (a, b) in enumerate(intervals):
            out[(t >= a) & (t < b)] = i
        return out

    def init_times(self, times: Any, leads: Iterable[Hours] | None = None, role: str = "test") -> np.ndarray:
        """The initial times among `times` from which some lead (hours) is valid in an interval of `role`; sorted
        `datetime64[ns]`.
        """
        t = np.unique(utc_times(times))
        hours = tuple(self.leads if leads is None else leads)
        if not hours:
            raise ProtocolError(f"protocol {self.name!r} names no leads; pass leads=")
        keep = np.zeros(t.shape, bool)
        for lead in hours:
            keep |= self.block(t + hours_to_timedelta(lead), role) >= 0
        return t[keep]

    # -- files
    def to_dict(self) -> dict[str, Any]:
        """The protocol as plain JSON types; `from_dict` reads it back equal."""

        def text(intervals: Sequence[Interval]) -> list[list[str]]:
            return [[str(np.datetime_as_string(v, unit="auto")) for v in pair] for pair in intervals]

        out: dict[str, Any] = {
            "name": self.name,
            "held_out": list(self.held_out),
            "variables": list(self.variables),
            "leads": list(self.leads),
        }
        out |= {"test": text(self.test), "validation": text(self.validation)}
        out |= {"train": None if self.train is None else text(self.train), "source": self.source}
        return out

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Protocol:
        known = [f.name for f in dataclasses.fields(cls)]
        for key in entries:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
                raise ProtocolError(f"unknown protocol key {key!r}{hint}")
        for key in ("name", "test"):
            if key not in entries:
                raise ProtocolError(f"a protocol needs {key!r}; it has {sorted(entries)}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entries.items()}
        return cls(**plain)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Protocol:
        """Read a protocol from JSON; every fault is a ProtocolError naming the file."""
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ProtocolError(f"{path} is not JSON: {error}") from error
        if not isinstance(entries, dict):
            raise ProtocolError(f"{path} holds a {type(entries).__name__}, expected an object with name, test, ...")
        try:
            return cls.from_dict(entries)
        except ProtocolError as error:
            raise ProtocolError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the protocol as JSON (atomically: a temporary name, then a rename)."""
        temporary = Path(f"{path}.partial-{os.getpid()}")
        temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    # -- protocols for a user's own record (ours)
    @classmethod
    def from_periods(
        cls,
        test: Iterable[tuple[Any, Any]],
        train: tuple[Any, Any],
        *,
        held_out: Iterable[str] = (),
        variables: Iterable[str] = (),
        leads: Iterable[Hours] = (),
        validation_fraction: Hours = 0.15,
        name: str = "periods",
    ) -> Protocol:
        """A protocol from training and test periods; validation is cut out of the training period.

        Ours: the training period is cut into weeks and one week in every round(1/fraction), the middle one of its
        group, validates, so that every season of the record takes part; a training period under 8 weeks gives its last
        `validation_fraction` instead.
        """
        tests = _intervals(test, "test")
        [(start, end)] = _intervals([train], "train")
        whole = [(start, end)]
        for a, b in tests:  # a test period inside the training period cuts it
            whole = [piece for s, e in whole for piece in ((s, min(e, a)), (max(s, b), e)) if piece[0] < piece[1]]
        validation: list[Interval] = []
        training: list[Interval] = []
        week = np.timedelta64(7, "D").astype("timedelta64[ns]")
        group = max(2, round(1 / validation_fraction)) if validation_fraction > 0 else 0
        for s, e in whole:
            if not group:
                training.append((s, e))
            elif e - s < 8 * week:
                cut = s + np.timedelta64(round(int((e - s) / np.timedelta64(1, "h")) * (1 - validation_fraction)), "h")
                training.append((s, cut))
                validation.append((cut, e))
            else:
                edge = s
                for first in np.arange(s + (group // 2) * week, e - week + np.timedelta64(1, "ns"), group * week):
                    training.append((edge, first))
                    validation.append((first, first + week))
                    edge = first + week
                if edge < e:
                    training.append((edge, e))
        extra = {"held_out": tuple(held_out), "variables": tuple(variables), "leads": tuple(leads)}
        note = "train and test periods given by the user; validation cut out of training"
        return cls(name=name, test=tests, validation=tuple(validation), train=tuple(training), source=note, **extra)

    @classmethod
    def rotating(
        cls,
        start: Any,
        end: Any,
        *,
        held_out: Iterable[str] = (),
        variables: Iterable[str] = (),
        leads: Iterable[Hours] = (),
        cycle_days: Hours = 28,
        test_days: Hours = 5,
        validation_days: Hours = 4,
        name: str = "rotating",
    ) -> Protocol:
        """A protocol for a record with no split given: in every cycle the last `test_days` test, a middle stretch
        validates, the rest trains.

        Ours. A record shorter than two cycles is cut into two cycles of half its length with the same proportions,
        never shorter than a day of test hours.
        """
        [(first, last)] = _intervals([(start, end)], "record")
        length = float((last - first) / np.timedelta64(1, "D"))
        cycle = min(cycle_days, length / 2)
        scale = cycle / cycle_days
        day = np.timedelta64(86_400, "s").astype("timedelta64[ns]")

        def at(days: Hours) -> np.datetime64:
            return first + np.timedelta64(round(days * 24), "h").astype("timedelta64[ns]")

        tests, validations = [], []
        for i in range(int(length / cycle + 1e-9)):
            close = min(at((i + 1) * cycle), last)
            tests.append((min(at((i + 1) * cycle - test_days * scale), close - day), close))
            middle = (i + 0.5) * cycle
            validations.append((at(middle - validation_days * scale / 2), at(middle + validation_days * scale / 2)))
        extra = {"held_out": tuple(held_out), "variables": tuple(variables), "leads": tuple(leads)}
        note = f"{test_days:g} test and {validation_days:g} validation days in every {cycle_days:g}"
        return cls(name=name, test=tuple(tests), validation=tuple(validations), source=note, **extra)


def _merged(intervals: Sequence[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in intervals:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def hours_to_timedelta(hours: Any) -> Any:
    """Hours (float or array) as timedelta64[ns], exact to the second."""
    seconds = np.rint(np.asarray(hours, float) * 3600).astype("int64")
    return (seconds * 1_000_000_000).astype("timedelta64[ns]")
