"""Overrides `KEY=VALUE`: parsed by Hydra's grammar and looked up among the existing keys."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from metarun.config.schema import Config
from metarun.config.suggestions import unknown_key


def parse_value(word: str) -> tuple[str, Any]:
    """Parse one override by Hydra's grammar and return its key and value.

    Raises:
        ValueError: The override is a sweep, uses + or ~, or cannot be parsed.
    """
    override = read_words(OverridesParser.create(), [word])[0]
    if override.is_sweep_override():
        raise ValueError(f"{word} has several values: resume= and test= accept one for each key")
    if override.type is not OverrideType.CHANGE or override.package is not None:
        raise ValueError(f"{word}: resume= and test= accept only KEY=VALUE, without + ~ or @")
    return override.key_or_group, override.value()


def read_words(parser: OverridesParser, words: Sequence[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar.

    Raises:
        ValueError: One of them cannot be parsed.
    """
    parsed: list[Override] = []
    for word in words:
        try:
            parsed += parser.parse_overrides([word])
        except (HydraException, ValueError, RecursionError, OverflowError) as error:
            raise ValueError(
                f"cannot read {word!r}: expected KEY=VALUE; quote a value with special "
                "characters, as in 'KEY=\"a b\"'"
            ) from error
    return parsed


def text_of(override: Override) -> str:
    """Return an override as it was typed."""
    assert override.input_line is not None
    return override.input_line


def leaves(node: Config, prefix: str = "") -> list[str]:
    """Return all dotted keys below a node, without `hydra` and keys such as `_target_`."""
    found: list[str] = []
    for key, value in node.items():
        if not prefix and key == "hydra":
            continue
        if not str(key).startswith("_"):
            found.append(f"{prefix}{key}")
        if isinstance(value, dict):
            found += leaves(cast("Config", value), f"{prefix}{key}.")
    return found


def has_key(node: Any, path: list[str]) -> bool:
    """Return whether a nested key or list index exists."""
    if not path:
        return True
    head, rest = path[0], path[1:]
    if isinstance(node, dict):
        mapping = cast("Config", node)
        return head in mapping and has_key(mapping[head], rest)
    if isinstance(node, list):
        return head.isdigit() and int(head) < len(node) and has_key(node[int(head)], rest)
    return False


def check_added(prefix: str, node: Config, base: Config) -> None:
    """Check for keys that are not in `base`: a value that is a dictionary can add some.

    Raises:
        ValueError: There is such a key.
    """
    for key, value in node.items():
        if prefix == "" and key == "hydra":
            continue
        if key not in base:
            raise unknown_key(f"{prefix}{key}", leaves(base, prefix))
        known = base[key]
        if isinstance(value, dict) and isinstance(known, dict):
            check_added(f"{prefix}{key}.", cast("Config", value), cast("Config", known))


def without_repeated(words: Sequence[str], stored: Config) -> list[str]:
    """Return overrides without those that name the algorithm or backbone of a run again.

    `algo=mine --config-dir DIR` says that the code behind a stored name is the user's own.
    """
    again = {(key, stored["names"].get(key)) for key in ("algo", "backbone")}
    return [word for word in words if tuple(word.split("=", 1)) not in again]


def rehearsal(words: Sequence[str]) -> list[str]:
    """Return overrides, completed with those of a run that is only to show that all of it works."""
    typed = {word.partition("=")[0] for word in words}
    return [*words, *(f"{key}={value}" for key, value in _REHEARSAL.items() if key not in typed)]


_REHEARSAL = {
    "train.rehearse": 30,
    "train.eval_every": 2**31 - 1,
    "eval.val_episodes": 20,
    "eval.episodes": 50,
}


def with_values(stored: Config, typed: Mapping[str, Any]) -> Config:
    """Return a copy of a stored configuration with the typed values set.

    Raises:
        ValueError: A key does not exist.
    """
    config = copy.deepcopy(stored)
    for key, value in typed.items():
        *path, leaf = key.split(".")
        node: Any = config
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf not in node:
            raise unknown_key(key, leaves(stored))
        node[leaf] = value
    return config


def refuse_change(key: str, stored: Config, rule: str) -> None:
    """Raise the error for a key that may not change.

    Raises:
        ValueError: Always.
    """
    if key not in leaves(stored):
        raise unknown_key(key, leaves(stored))
    raise ValueError(f"{key} cannot change in {rule}")
