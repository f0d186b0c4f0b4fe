"""Words as KEY=VALUE: read by Hydra's grammar and looked up among the keys that there are."""

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
    """A key and its value, read as Hydra reads them; no sweep, no + or ~.

    Raises:
        ValueError: It is not a plain KEY=VALUE.
    """
    override = read_words(OverridesParser.create(), [word])[0]
    if override.is_sweep_override():
        raise ValueError(f"{word} names several values: resume= and test= are about one run")
    if override.type is not OverrideType.CHANGE or override.package is not None:
        raise ValueError(f"{word}: resume= and test= take plain KEY=VALUE")
    return override.key_or_group, override.value()


def read_words(parser: OverridesParser, words: Sequence[str]) -> list[Override]:
    """Parse words by Hydra's grammar.

    Raises:
        ValueError: One cannot be read.
    """
    parsed: list[Override] = []
    for word in words:
        try:
            parsed += parser.parse_overrides([word])
        except (HydraException, ValueError, RecursionError, OverflowError) as error:
            raise ValueError(
                f"cannot read {word!r}: expected key=value; quote a value with special "
                "characters, as in 'key=\"a b\"'"
            ) from error
    return parsed


def text_of(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def leaves(node: Config, prefix: str = "") -> list[str]:
    """Every dotted key below a node but Hydra's and the classes'."""
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
    """Refuse keys that only a typed dictionary can have added."""
    for key, value in node.items():
        if prefix == "" and key == "hydra":
            continue
        if key not in base:
            raise unknown_key(f"{prefix}{key}", leaves(base, prefix))
        known = base[key]
        if isinstance(value, dict) and isinstance(known, dict):
            check_added(f"{prefix}{key}.", cast("Config", value), cast("Config", known))


def with_values(stored: Config, typed: Mapping[str, Any]) -> Config:
    """A copy with the typed values in their places."""
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
    if key not in leaves(stored):
        raise unknown_key(key, leaves(stored))
    raise ValueError(f"{key} cannot change in {rule}")
