"""earth.protocol against brute force: roles hour by hour, spans hour by hour."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from earth.protocol import Protocol, ProtocolError, hours_to_timedelta, utc_times

HOURS = pd.date_range("2021-01-01", "2021-03-01", freq="h", inclusive="left")


def small(**changes):
    entries = {"name": "p", "test": [("2021-01-22", "2021-01-29")], "validation": [("2021-01-08", "2021-01-15")]}
    return Protocol(**(entries | changes))


def test_stations_v1_is_the_documented_split(checkout):
    protocol = Protocol.load(checkout / "configs" / "protocols" / "stations-v1.json")
    assert protocol.held_out == ("467550", "467530", "467620", "467990", "466990", "467410")
    times = pd.date_range("2020-05-31 17:00", "2021-12-31 23:00", freq="h")
    role = protocol.role(times)
    odd = (times.year == 2021) & (times.month % 2 == 1)
    expected = np.where(
        odd & (times.day >= 22) & (times.day <= 28),
        "test",
        np.where(odd & (times.day >= 8) & (times.day <= 14), "validation", "train"),
    )
    np.testing.assert_array_equal(role, expected)
    assert (role == "test").sum() == 1008
    assert protocol.leads == (1, 3, 6, 12, 24, 48)
    assert len(protocol.variables) == 5


def test_intervals_are_half_open():
    protocol = small()
    edge = np.array(["2021-01-21T23:59:59", "2021-01-22", "2021-01-28T23:59:59", "2021-01-29"], "datetime64[s]")
    assert list(protocol.role(edge)) == ["train", "test", "test", "train"]
    assert list(protocol.block(edge)) == [-1, 0, 0, -1]


@given(st.integers(0, len(HOURS) - 1), st.integers(0, 24 * 20))
def test_clear_equals_looking_at_every_hour(start, length):
    end = min(start + length, len(HOURS) - 1)
    protocol = small()
    brute = not np.isin(protocol.role(HOURS[start : end + 1]), ["test", "validation"]).any()
    assert bool(protocol.clear(HOURS[start], HOURS[end])) == brute


@given(st.integers(0, len(HOURS) - 1), st.integers(0, 24 * 20))
def test_clear_with_given_training_intervals(start, length):
    protocol = small(train=[("2021-01-01", "2021-01-08"), ("2021-01-15", "2021-01-18"), ("2021-01-18", "2021-01-20")])
    end = min(start + length, len(HOURS) - 1)
    brute = (protocol.role(HOURS[start : end + 1]) == "train").all()
    assert bool(protocol.clear(HOURS[start], HOURS[end])) == brute


def test_unused_outside_the_training_intervals():
    protocol = small(train=[("2021-01-01", "2021-01-08")])
    assert list(protocol.role(["2021-01-02", "2021-01-16"])) == ["train", "unused"]


def test_init_times_reach_back_by_the_lead():
    protocol = small(leads=(6, 24))
    found = protocol.init_times(HOURS)
    valid = [t for t in HOURS if any(protocol.role(t + pd.Timedelta(hours=h)) == "test" for h in (6, 24))]
    np.testing.assert_array_equal(found, pd.DatetimeIndex(valid).to_numpy().astype("datetime64[ns]"))
    with pytest.raises(ProtocolError, match="names no leads"):
        small().init_times(HOURS)


def test_round_trip_and_atomic_save(tmp_path):
    protocol = small(train=[("2020-01-01T05", "2021-01-08")], held_out=("a",), leads=(1, 0.5 + 1), variables=("x",))
    protocol.save(tmp_path / "p.json")
    assert Protocol.load(tmp_path / "p.json") == protocol
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"name": "p"}, "needs 'test'"),
        ({"name": "p", "test": [["2021-01-02", "2021-01-01"]]}, "is empty"),
        ({"name": "p", "test": ["2021-01-02"]}, "is not a pair"),
        ({"name": "p", "test": [["2021-01-02", "nonsense"]]}, "cannot read times"),
        ({"name": "p", "test": [[1, 2]]}, "must be datetimes"),
        (
            {"name": "p", "test": [["2021-01-01", "2021-01-05"]], "validation": [["2021-01-04", "2021-01-08"]]},
            "separate",
        ),
        ({"name": "p", "test": [["2021-01-01", "2021-01-05"]], "train": [["2021-01-04", "2021-01-08"]]}, "separate"),
        ({"name": "p", "test": [], "heldout": ["a"]}, "did you mean 'held_out'"),
        ({"name": "p", "test": [], "held_out": ["a", "a"]}, "twice"),
        ({"name": "p", "test": [], "leads": [6, 3]}, "increasing"),
        ({"name": "p", "test": [], "leads": [0]}, "positive"),
    ],
)
def test_bad_files_are_typed_errors_naming_the_file(tmp_path, entries, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(ProtocolError, match=message) as caught:
        Protocol.load(path)
    assert "bad.json" in str(caught.value)


def test_a_truncated_file_is_a_typed_error(tmp_path):
    (tmp_path / "bad.json").write_text('{"name": "p", ')
    with pytest.raises(ProtocolError, match="is not JSON"):
        Protocol.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ProtocolError, match="expected an object"):
        Protocol.load(tmp_path / "bad.json")


def test_times_of_every_kind():
    want = np.array(["2021-01-01T00", "2021-01-01T01"], "datetime64[ns]")
    local = pd.DatetimeIndex(["2021-01-01 08:00", "2021-01-01 09:00"], tz="Asia/Taipei")
    for given_times in (
        want,
        want.astype("datetime64[s]"),
        local,
        pd.Series(local),
        ["2021-01-01T00", "2021-01-01T01"],
    ):
        np.testing.assert_array_equal(utc_times(given_times), want)
    assert utc_times(np.zeros((2, 3), "datetime64[h]")).shape == (2, 3)
    assert hours_to_timedelta(1.5) == np.timedelta64(90, "m")


@given(st.integers(10, 900), st.floats(0.05, 0.4))
def test_protocol_from_periods_partitions_the_training_period(days, fraction):
    start = np.datetime64("2020-01-01")
    end = start + np.timedelta64(days, "D")
    test = (end + np.timedelta64(5, "D"), end + np.timedelta64(35, "D"))
    protocol = Protocol.from_periods([test], (start, end), validation_fraction=fraction)
    hours = np.arange(start, test[1], np.timedelta64(1, "h"))
    role = protocol.role(hours)
    assert set(role[hours < end]) == {"train", "validation"}
    assert (role[(hours >= end) & (hours < test[0])] == "unused").all()
    assert (role[hours >= test[0]] == "test").all()
    share = (role == "validation").sum() / (hours < end).sum()
    assert fraction / 2.5 < share < fraction * 2 + 0.05


def test_a_test_period_inside_the_training_period_cuts_it():
    protocol = Protocol.from_periods([("2021-02-01", "2021-02-08")], ("2021-01-01", "2021-06-01"))
    assert (protocol.role(pd.date_range("2021-02-01", "2021-02-07 23:00", freq="h")) == "test").all()


@pytest.mark.parametrize("days", [6, 31, 200, 579])
def test_rotating_gives_every_role_a_share(days):
    protocol = Protocol.rotating("2020-06-01", np.datetime64("2020-06-01") + np.timedelta64(days, "D"))
    hours = np.arange(
        np.datetime64("2020-06-01"), np.datetime64("2020-06-01") + np.timedelta64(days, "D"), np.timedelta64(1, "h")
    )
    share = {r: (protocol.role(hours) == r).mean() for r in ("train", "validation", "test")}
    assert share["train"] > 0.45
    assert 0.1 < share["test"] < 0.4
    assert share["validation"] > 0.05
    assert len(protocol.test) >= 2
