"""Stored YAML, read as plain values: it may come from somebody else."""

from __future__ import annotations

import functools
from typing import Any

_PLAIN = (bool, int, float, str, type(None))


def read_literals(text: str) -> Any:
    """Read mappings, lists and scalars from YAML, with scalars as OmegaConf reads them.

    Interpolations stay text. Aliases are refused: a few lines of them expand to gigabytes.

    Raises:
        ValueError: There is an alias, or a value of any other type.
        yaml.YAMLError: The text is not valid YAML.
    """
    import yaml

    found = yaml.load(text, Loader=_loader())
    _check_plain(found)
    return found


def find_interpolation(node: Any) -> str | None:
    """Return the first text of nested values that OmegaConf would resolve; None if none is left."""
    if isinstance(node, dict):
        node = [*node, *node.values()]
    if isinstance(node, list):
        return next((text for part in node if (text := find_interpolation(part))), None)
    return node if isinstance(node, str) and "${" in node else None


@functools.cache
def _loader() -> Any:
    import yaml
    from omegaconf._utils import get_yaml_loader

    class Loader(get_yaml_loader()):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has an alias (*NAME): expected plain values")
            return super().compose_node(parent, index)

    return Loader


def _check_plain(node: Any) -> None:
    if isinstance(node, dict):
        node = [*node, *node.values()]
    if isinstance(node, list):
        for part in node:
            _check_plain(part)
    elif not isinstance(node, _PLAIN):
        raise ValueError(f"it has a {type(node).__name__}: expected plain values")
