"""Checks of types and ranges in a configuration, before anything is built; imports no torch."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, NoReturn, Union, cast

from metarun.config.schema import NODES, Config, Settings
from metarun.config.suggestions import unknown_key
from metarun.core.checks import positive
from metarun.core.sizes import Count, Range

_LARGEST = 2**31 - 1

_BOUNDS: dict[str, tuple[int, int]] = {
    "way": (1, _LARGEST),
    "shot": (1, _LARGEST),
    "query": (1, _LARGEST),
    "seed": (0, 2**63 - 1),
    "tasks_per_chunk": (1, _LARGEST),
    "threads": (1, 1024),
    # Online learners without meta-training have no training steps.
    "train.steps": (0, _LARGEST),
    "train.tasks_per_step": (1, _LARGEST),
    "train.way": (1, _LARGEST),
    "train.shot": (1, _LARGEST),
    # Reptile learns from support rows alone.
    "train.query": (0, _LARGEST),
    "train.log_every": (1, _LARGEST),
    "train.eval_every": (1, _LARGEST),
    "train.checkpoint_every": (1, _LARGEST),
    "train.patience": (1, _LARGEST),
    # A confidence interval needs two episodes.
    "eval.episodes": (2, _LARGEST),
    "eval.val_episodes": (2, _LARGEST),
    "eval.val_way": (1, _LARGEST),
    "eval.inner_steps": (0, _LARGEST),
    "eval.curve_steps": (0, _LARGEST),
    "eval.tasks_per_batch": (1, _LARGEST),
    "eval.views": (1, 1000),
    "eval.seed": (0, 2**63 - 1),
}
"""Smallest and largest value of every integer key."""

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def check_config(config: Mapping[str, Any]) -> Settings:
    """Check keys, types and ranges, and return the typed settings.

    Raises:
        ValueError: A key is unknown or missing, or its value is invalid.
    """
    settings: Settings = structured("", config, Settings)
    for key, (least, greatest) in _BOUNDS.items():
        value = functools.reduce(getattr, key.split("."), cast("Any", settings))
        if value is None:
            continue
        own = Range.of(key, value)
        if own.low < least or own.high > greatest:
            expected = f"{least} or more" if own.low < least else f"at most {greatest}"
            raise ValueError(f"{key}={value}: expected {expected}")
    positive("eval", null="or null", proficiency=settings.eval.proficiency)
    limits = {"max_minutes": settings.train.max_minutes, "rehearse": settings.train.rehearse}
    positive("train", null="or null", **limits)
    if not _DEVICE.fullmatch(settings.device):
        raise ValueError(
            f"device={settings.device}: expected auto, cpu, cuda or cuda:N, such as cuda:1"
        )
    for name in NODES:
        if not isinstance(getattr(settings, name).get("_target_"), str):
            raise ValueError(f"{name}._target_ is missing: expected the dotted name of a class")
    for name, node in (settings.logger or {}).items():
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise ValueError(
                f"logger.{name}._target_ is missing: expected the dotted name of a class"
            )
    return settings


def convert(key: str, value: Any, hint: Any) -> Any:
    """Convert a value of a configuration to the type of a hint.

    Raises:
        ValueError: The value does not have that type; the message names both.
    """
    try:
        return _convert(value, hint)
    except TypeError:
        typed = "null" if value is None else json.dumps(value) if _nested(value) else value
        typed = str(typed).lower() if isinstance(typed, bool) else typed
        raise ValueError(f"{key}={typed}: expected {describe_type(hint)}") from None


def check_numbers(key: str, value: Any) -> None:
    """Check that the numbers in an option are finite, and whole ones no larger than `_LARGEST`.

    A component checks ranges, but only of the options that it uses.

    Raises:
        ValueError: A number is not.
    """
    if isinstance(value, (list, tuple)):
        for item in value:
            check_numbers(key, item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}={value}: expected a finite number")
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"{key}: expected a whole number from -{_LARGEST} to {_LARGEST}")


def _convert(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args)
    if origin is Literal:
        return value if value in args else _refuse()
    if origin is tuple and args[-1:] != (...,):
        items = _items(value)
        return tuple(map(_convert, items, args)) if len(items) == len(args) else _refuse()
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Mapping):
        return value if isinstance(value, dict) else _refuse()
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence):
        converted = [_convert(item, args[0]) for item in _items(value)]
        return tuple(converted) if origin is tuple else converted
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (bool, int, float, str, types.NoneType):
        wanted = types.NoneType if hint is None else hint
        return value if type(value) is wanted else _refuse()
    return value


def _convert_union(value: Any, options: tuple[Any, ...]) -> Any:
    for option in options:
        try:
            return _convert(value, option)
        except TypeError:
            continue
    return _refuse()


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else _refuse()


def _refuse() -> NoReturn:
    raise TypeError


def _nested(value: Any) -> bool:
    return isinstance(value, (list, dict))


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "null",
}


def describe_type(hint: Any) -> str:
    """Describe a type hint in words, for messages."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if hint == Count:
        return "a whole number, or a range such as 5..50"
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe_type, args))
    if origin is Literal:
        words = [str(word) for word in args]
        return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
    if origin is tuple and args[-1:] != (...,):
        return f"a list of {len(args)}, such as [{','.join(map(describe_type, args))}]"
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Mapping):
        return "keys and values"
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence):
        return f"a list, each item {describe_type(args[0])}"
    if is_dataclass(hint):
        return "keys and values"
    return getattr(hint, "__name__", str(hint))


def structured(prefix: str, config: Any, kind: Any) -> Any:
    """Build a dataclass from a dictionary, recursively.

    Args:
        prefix: Dotted key of the dictionary itself, for messages.
        config: The dictionary.
        kind: The dataclass.

    Raises:
        ValueError: A key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{prefix}={config}: expected keys and values, type {prefix}.KEY=VALUE")
    given = cast("Mapping[str, Any]", config)
    hints = typing.get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    dotted = prefix + "." if prefix else ""
    for key in given:
        if key not in known:
            raise unknown_key(f"{dotted}{key}", [dotted + other for other in known])
    values: Config = {}
    for field in fields(kind):
        key, hint = f"{dotted}{field.name}", hints[field.name]
        if field.name not in given:
            # A stored run may be older than a setting: its default applies.
            if field.default is not MISSING:
                continue
            raise ValueError(f"{key} is missing: type {key}=…")
        values[field.name] = _typed(key, given[field.name], hint)
    return kind(**values)


def _typed(key: str, value: Any, hint: Any) -> Any:
    """Convert a value to its hint, which may contain a dataclass: X, X | None or list[X]."""
    options = [option for option in (hint, *typing.get_args(hint)) if is_dataclass(option)]
    if not options or (value is None and options[0] is not hint):
        return convert(key, value, hint)
    if typing.get_origin(hint) is list:
        items = convert(key, value, list[Any])
        return [structured(f"{key}[{i}]", item, options[0]) for i, item in enumerate(items)]
    return structured(key, value, options[0])
