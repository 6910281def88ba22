"""Configs: frozen dataclasses beside the code they configure, presets as Python functions, overrides from the command
line.

    cfg = load_config("configs/earth_o1.py:taiwan", ["model.layers=6", "train.optimizer.learning_rate=3e-4"])

Overrides are coerced by the field's annotation (int, float, bool, str, Path, Enum, Literal, Optional, unions, tuples,
lists, dicts as JSON); nested dataclasses are replaced from the inside out, so every `__post_init__` check runs. An
unknown key is a TypeError that names the nearest known one.
"""

import argparse
import collections.abc
import dataclasses
import difflib
import enum
import functools
import hashlib
import importlib.util
import json
import math
import pathlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_TRUE = {"true", "1", "yes", "on"}
_FALSE = {"false", "0", "no", "off"}
_NONE = {"none", "null"}


def load_config(source: str, overrides: Sequence[str] = ()) -> Any:
    """The preset `NAME` of a Python file, with overrides.

    Args:
        source: "path/to/file.py:NAME"; NAME is a function without required arguments that returns a dataclass.
        overrides: "dotted.key=value" strings, applied left to right.

    Raises:
        FileNotFoundError: no such file.
        AttributeError: no such preset; names the nearest, or all.
        TypeError, ValueError: see `override`.
    """
    path_text, separator, name = source.rpartition(":")
    if not separator or not path_text.endswith(".py") or not name:
        raise ValueError(f"config {source!r} must read path/to/file.py:NAME")
    path = pathlib.Path(path_text)
    if not path.is_file():
        raise FileNotFoundError(f"config file {path_text!r} does not exist (looked from {pathlib.Path.cwd()})")
    module = _load_module(path.resolve())
    presets = [
        key
        for key, value in vars(module).items()
        if isinstance(value, types.FunctionType) and value.__module__ == module.__name__ and not key.startswith("_")
    ]
    if name not in presets:
        raise AttributeError(f"{path_text} has no preset {name!r}; {_hint(name, presets)}")
    cfg = getattr(module, name)()
    if not dataclasses.is_dataclass(cfg) or isinstance(cfg, type):
        raise TypeError(f"preset {source!r} returned {type(cfg).__name__}, not a dataclass")
    return override(cfg, overrides)


def _load_module(path: pathlib.Path) -> types.ModuleType:
    name = f"_preset_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path} as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses defined in the file look their module up while they are made
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def override(cfg: T, overrides: Iterable[str]) -> T:
    """`cfg` with "dotted.key=value" overrides applied left to right.

    Raises:
        TypeError: unknown key (names the nearest known one), or a key that stops at, or goes on below, a nested
            dataclass.
        ValueError: no "=", or a value that its annotation cannot take.
    """
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not key.strip():
            raise ValueError(f"override {item!r} must read key=value")
        cfg = _replace(cfg, key.strip().split("."), value.strip(), key.strip())
    return cfg


def _replace(cfg: Any, path: list[str], text: str, key: str) -> Any:
    if not dataclasses.is_dataclass(cfg) or isinstance(cfg, type):
        raise TypeError(f"{key!r} goes below {type(cfg).__name__} value {cfg!r}, which has no fields")
    head, *rest = path
    hints = _field_types(type(cfg))
    if head not in hints:
        raise TypeError(f"unknown key {key!r}: {type(cfg).__name__} has no field {head!r}; {_hint(head, hints)}")
    if rest:
        return dataclasses.replace(cfg, **{head: _replace(getattr(cfg, head), rest, text, key)})
    try:
        value = _coerce(text, hints[head])
    except ValueError as error:
        raise ValueError(f"{key}={text!r}: {error}") from None
    except TypeError as error:
        raise TypeError(f"{key}={text!r}: {error}") from None
    return dataclasses.replace(cfg, **{head: value})


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _hint(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"


def _describe(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)


def _coerce(text: str, annotation: Any) -> Any:
    """A string -> a value of `annotation`. ValueError when it does not fit, TypeError when the annotation cannot come
    from text.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _coerce(text, args[0])
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.lower() in _NONE:
            return None
        # str takes anything, so it is asked last.
        for option in sorted((arg for arg in args if arg is not type(None)), key=lambda arg: arg is str):
            try:
                return _coerce(text, option)
            except ValueError:
                continue
        raise ValueError(f"expected {' or '.join(_describe(arg) for arg in args)}")
    if origin is typing.Literal:
        for option in args:
            if str(option) == text:
                return option
        raise ValueError(f"expected one of {list(args)}; {_hint(text, map(str, args))}")
    if annotation is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise ValueError("expected true or false")
    if annotation is int:
        try:
            return int(text)
        except ValueError:
            pass
        try:  # 1e6 is a number of steps to most people
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number != int(number):
            raise ValueError("expected an integer")
        return int(number)
    if annotation is float:
        try:
            return float(text)
        except ValueError:
            raise ValueError("expected a number") from None
    if annotation is str:
        return text
    if annotation is Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        if text in annotation.__members__:
            return annotation[text]
        raise ValueError(f"expected one of {list(annotation.__members__)}; {_hint(text, annotation.__members__)}")
    if isinstance(annotation, type) and issubclass(annotation, pathlib.PurePath):
        return annotation(text)
    container = origin or annotation
    if container in (tuple, list, collections.abc.Sequence):
        return _sequence(_items(text), annotation, _coerce)
    if container in (dict, collections.abc.Mapping):
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise ValueError('expected a JSON object such as {"a": 1}')
        return _decode(value, annotation, "value")
    if dataclasses.is_dataclass(annotation):
        raise TypeError(
            f"it is a {_describe(annotation)}; set one of its fields, e.g. .{next(iter(_field_types(annotation)), '')}"
        )
    raise TypeError(f"a field of type {_describe(annotation)} cannot be set from text; change the preset")


def _items(text: str) -> list[str]:
    """ "(1, 2)", "[1,2]", "1,2" and "" -> their items; brackets nest."""
    if len(text) > 1 and text[0] + text[-1] in ("()", "[]"):
        inner, depth = text[1:-1], 0
        for character in inner:
            depth += (character in "([") - (character in ")]")
            if depth < 0:
                break
        if depth == 0:
            text = inner
    items, depth, current = [], 0, ""
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            items.append(current)
            current = ""
        else:
            current += character
    items.append(current)
    if not items[-1].strip():
        items.pop()  # trailing comma, or empty
    return [item.strip().strip("'\"") for item in items]


def _sequence(items: Sequence[Any], annotation: Any, element: Any) -> Any:
    origin, args = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is tuple and args and args[-1] is not Ellipsis:
        if args == ((),):
            args = ()
        if len(items) != len(args):
            raise ValueError(f"expected {len(args)} values, got {len(items)}")
        return tuple(element(item, kind) for item, kind in zip(items, args, strict=True))
    kind = args[0] if args else Any
    values = [element(item, kind) for item in items]
    return values if origin is list else tuple(values)


def to_dict(cfg: Any) -> Any:
    """A config as JSON-able nested dicts and lists; `from_dict` inverts it.

    Raises:
        TypeError: a value that JSON cannot hold, such as a function or an array.
    """
    if dataclasses.is_dataclass(cfg) and not isinstance(cfg, type):
        return {field.name: to_dict(getattr(cfg, field.name)) for field in dataclasses.fields(cfg) if field.init}
    if isinstance(cfg, enum.Enum):
        return cfg.name
    if isinstance(cfg, pathlib.PurePath):
        return str(cfg)
    if isinstance(cfg, Mapping):
        if not all(isinstance(key, str) for key in cfg):
            raise TypeError(f"config dict with keys {list(cfg)[:3]!r}: keys must be strings")
        return {key: to_dict(value) for key, value in cfg.items()}
    if isinstance(cfg, list | tuple):
        return [to_dict(value) for value in cfg]
    if cfg is None or isinstance(cfg, bool | int | float | str):
        return cfg
    raise TypeError(f"config value {cfg!r} of type {type(cfg).__name__} cannot be written as JSON")


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """The dataclass `cls` from what `to_dict` made. Missing keys take their defaults; unknown keys are a TypeError."""
    return _decode(data, cls, cls.__name__)


def _decode(value: Any, annotation: Any, where: str) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _decode(value, args[0], where)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected the fields of {annotation.__name__}, got {value!r}")
        hints = _field_types(annotation)
        for key in value:
            if key not in hints:
                raise TypeError(f"unknown key {key!r} in {where}: {_hint(key, hints)}")
        return annotation(**{key: _decode(item, hints[key], f"{where}.{key}") for key, item in value.items()})
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        # A union of an exact type first, so that 1 stays an int in `float | int` and a str a str in `Path | str`.
        for option in sorted((arg for arg in args if arg is not type(None)), key=lambda arg: type(value) is not arg):
            try:
                return _decode(value, option, where)
            except (ValueError, TypeError):
                continue
        raise ValueError(f"{where}: {value!r} is not {_describe(annotation)}")
    if origin is typing.Literal:
        if not any(value == option and type(value) is type(option) for option in args):
            raise ValueError(f"{where}: {value!r} is not one of {list(args)}; {_hint(str(value), map(str, args))}")
        return value
    if annotation is Any:
        return value
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        if value not in annotation.__members__:
            raise ValueError(f"{where}: {value!r} is not one of {list(annotation.__members__)}")
        return annotation[value]
    if isinstance(annotation, type) and issubclass(annotation, pathlib.PurePath):
        return annotation(value)
    container = origin or annotation
    if container in (tuple, list, collections.abc.Sequence):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        try:
            return _sequence(value, annotation, lambda item, kind: _decode(item, kind, where))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if container in (dict, collections.abc.Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected an object, got {value!r}")
        kind = args[1] if len(args) == 2 else Any
        return {key: _decode(item, kind, f"{where}.{key}") for key, item in value.items()}
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(annotation, type):
        if type(value) is annotation:
            return value
        raise ValueError(f"{where}: expected {annotation.__name__}, got {value!r}")
    raise TypeError(f"{where}: a field of type {_describe(annotation)} cannot be read from JSON")


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested dicts; lists count as values."""
    if isinstance(data, Mapping) and data:
        return {k: v for key, value in data.items() for k, v in flatten(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: data}


def fingerprint(cfg: Any) -> str:
    """16 hex digits of the SHA-256 of the config's canonical JSON: equal configs, equal fingerprints, in any
    process.
    """
    return hashlib.sha256(json.dumps(to_dict(cfg), sort_keys=True).encode()).hexdigest()[:16]


def add_config_arguments(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Adds `--config FILE.py:NAME` and `--set key=value` (any number of times, several values each) to a parser."""
    parser.add_argument(
        "--config",
        metavar="FILE.py:NAME",
        default=default,
        required=default is None,
        help="preset function NAME of a Python file" + (f" (default: {default})" if default else ""),
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        dest="overrides",
        action="extend",
        nargs="+",
        default=[],
        help="override a field by its dotted name, e.g. model.layers=6",
    )


def config_from_arguments(arguments: argparse.Namespace) -> Any:
    """The config that the arguments of `add_config_arguments` name."""
    return load_config(arguments.config, arguments.overrides)
