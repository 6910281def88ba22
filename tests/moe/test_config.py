"""Presets, overrides by annotation, and the JSON round trip."""

import argparse
import dataclasses
import enum
import pathlib
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.config import (
    add_config_arguments,
    config_from_arguments,
    fingerprint,
    flatten,
    from_dict,
    load_config,
    override,
    to_dict,
)


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3
    name: Literal["adamw", "sgd", 3] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate {self.learning_rate} must be positive")


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 2
    dropout: float | None = None
    bias: bool = True
    note: str = ""
    leads: tuple[int, ...] = (6, 12)
    boxes: tuple[tuple[int, ...], ...] = ()
    names: list[str] = dataclasses.field(default_factory=list)
    limit: int | str = 3
    folder: pathlib.Path = pathlib.Path("out")
    colour: Colour = Colour.RED
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    anything: Any = None
    optimizer: Optimizer = Optimizer()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("layers=6", "layers", 6),
        ("layers=1e6", "layers", 1_000_000),
        ("layers=1_000", "layers", 1000),
        ("dropout=0.5", "dropout", 0.5),
        ("dropout=none", "dropout", None),
        ("bias=False", "bias", False),
        ("bias=on", "bias", True),
        ("note=a=b, c", "note", "a=b, c"),
        ("note=none", "note", "none"),
        ("leads=1,2,3", "leads", (1, 2, 3)),
        ("leads=(6,)", "leads", (6,)),
        ("leads=[]", "leads", ()),
        ("boxes=(1,2),(3,4,5)", "boxes", ((1, 2), (3, 4, 5))),
        ("boxes=((1,2),(3,))", "boxes", ((1, 2), (3,))),
        ("names=['t2m', ps]", "names", ["t2m", "ps"]),
        ("limit=7", "limit", 7),
        ("limit=all", "limit", "all"),
        ("folder=a/b", "folder", pathlib.Path("a/b")),
        ("colour=BLUE", "colour", Colour.BLUE),
        ('weights={"t2m": 2}', "weights", {"t2m": 2.0}),
        ("anything=[1, 2]", "anything", [1, 2]),
        ("anything=free text", "anything", "free text"),
    ],
)
def test_values_are_coerced_by_annotation(text, key, value):
    got = getattr(override(Config(), [text]), key)
    assert got == value
    assert type(got) is type(value)


def test_nested_overrides_apply_in_order_and_rerun_checks():
    cfg = override(Config(), ["optimizer.learning_rate=0.1", "optimizer.name=sgd", "optimizer.learning_rate=0.2"])
    assert cfg.optimizer == Optimizer(0.2, "sgd")
    assert override(cfg, ["optimizer.name=3"]).optimizer.name == 3
    with pytest.raises(ValueError, match=r"learning_rate -1\.0 must be positive"):
        override(cfg, ["optimizer.learning_rate=-1"])


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("layer=3", TypeError, "did you mean 'layers'"),
        ("optimizer.lerning_rate=3", TypeError, "Optimizer has no field 'lerning_rate'; did you mean 'learning_rate'"),
        ("zzz=3", TypeError, "known: anything, bias"),
        ("layers.deep=3", TypeError, "which has no fields"),
        ("optimizer=adamw", TypeError, r"set one of its fields, e.g. .learning_rate"),
        ("layers", ValueError, "must read key=value"),
        ("layers=2.5", ValueError, "layers='2.5': expected an integer"),
        ("layers=nan", ValueError, "expected an integer"),
        ("bias=maybe", ValueError, "true or false"),
        ("dropout=half", ValueError, "expected float or NoneType"),
        ("leads=1,x", ValueError, "expected an integer"),
        ("optimizer.betas=1", ValueError, "expected 2 values, got 1"),
        ("optimizer.name=adam", ValueError, "did you mean 'adamw'"),
        ("colour=GREEN", ValueError, "RED"),
        ("weights=[1]", ValueError, "JSON object"),
    ],
)
def test_bad_overrides_name_key_and_remedy(text, error, message):
    with pytest.raises(error, match=message):
        override(Config(), [text])


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
CONFIGS = st.builds(
    Config,
    layers=st.integers(),
    dropout=st.none() | FLOATS,
    bias=st.booleans(),
    note=st.text(),
    leads=st.lists(st.integers()).map(tuple),
    boxes=st.lists(st.lists(st.integers(), max_size=3).map(tuple), max_size=3).map(tuple),
    names=st.lists(st.text()),
    limit=st.integers() | st.text(),
    folder=st.sampled_from([pathlib.Path("a"), pathlib.Path("/b/c")]),
    colour=st.sampled_from(Colour),
    weights=st.dictionaries(st.text(), FLOATS),
    anything=st.none() | st.integers() | st.text() | st.lists(st.integers()),
    optimizer=st.builds(
        Optimizer,
        learning_rate=st.floats(min_value=1e-9, max_value=1e9),
        name=st.sampled_from(["adamw", "sgd", 3]),
        betas=st.tuples(FLOATS, FLOATS),
    ),
)


@given(CONFIGS)
def test_json_round_trip(cfg):
    import json

    text = json.dumps(to_dict(cfg))
    assert from_dict(Config, json.loads(text)) == cfg
    assert fingerprint(from_dict(Config, json.loads(text))) == fingerprint(cfg)


@given(CONFIGS)
def test_scalars_survive_being_written_as_overrides(cfg):
    texts = [
        f"{key}={value}"
        for key, value in flatten(to_dict(cfg)).items()
        if key.split(".")[0] in {"layers", "dropout", "bias", "optimizer", "leads", "boxes", "colour", "folder"}
    ]
    got = override(Config(), texts)
    for key in ("layers", "dropout", "bias", "optimizer", "leads", "boxes", "colour", "folder"):
        assert getattr(got, key) == getattr(cfg, key)


@given(CONFIGS, CONFIGS)
def test_fingerprint_tells_configs_apart(one, other):
    assert (fingerprint(one) == fingerprint(other)) == (to_dict(one) == to_dict(other))


@given(st.text(max_size=30))
def test_any_text_is_an_override_or_a_typed_error(text):
    for key in (
        "layers",
        "dropout",
        "bias",
        "leads",
        "boxes",
        "names",
        "limit",
        "weights",
        "colour",
        "anything",
        "optimizer.betas",
    ):
        try:
            override(Config(), [f"{key}={text}"])
        except ValueError as error:
            assert key in str(error)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"layer": 1}, TypeError, "unknown key 'layer' in Config: did you mean 'layers'"),
        ({"optimizer": {"nam": "sgd"}}, TypeError, r"'nam' in Config.optimizer"),
        ({"layers": "2"}, ValueError, "Config.layers: expected int, got '2'"),
        ({"layers": True}, ValueError, "expected int"),
        ({"leads": 3}, ValueError, "expected a list"),
        ({"optimizer": 3}, ValueError, "expected the fields of Optimizer"),
    ],
)
def test_from_dict_refuses(data, error, message):
    with pytest.raises(error, match=message):
        from_dict(Config, data)


PRESETS = '''
import dataclasses

@dataclasses.dataclass(frozen=True)
class Run:
    """Defined in the preset file itself; annotations as strings must resolve."""
    size: "int" = 1
    leads: "tuple[int, ...]" = (6,)

def small():
    return Run()

def large():
    return dataclasses.replace(small(), size=100)

def broken():
    return 3

def _private():
    return Run()
'''


@pytest.fixture
def preset_file(tmp_path):
    path = tmp_path / "presets.py"
    path.write_text(PRESETS)
    return path


def test_load_config(preset_file):
    assert load_config(f"{preset_file}:large").size == 100
    cfg = load_config(f"{preset_file}:large", ["size=7", "leads=1,2"])
    assert (cfg.size, cfg.leads) == (7, (1, 2))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (":smal", AttributeError, "did you mean 'small'"),
        (":_private", AttributeError, "no preset '_private'"),
        (":dataclasses", AttributeError, "no preset"),
        (":broken", TypeError, "returned int"),
        ("", ValueError, "file.py:NAME"),
    ],
)
def test_load_config_refuses(preset_file, name, error, message):
    with pytest.raises(error, match=message):
        load_config(f"{preset_file}{name}")


def test_load_config_names_the_missing_file():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py"):
        load_config("nowhere.py:small")


def test_command_line(preset_file):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, default=f"{preset_file}:small")
    assert config_from_arguments(parser.parse_args([])).size == 1
    arguments = parser.parse_args(["--config", f"{preset_file}:large", "--set", "size=4", "leads=3", "--set", "size=5"])
    cfg = config_from_arguments(arguments)
    assert (cfg.size, cfg.leads) == (5, (3,))
