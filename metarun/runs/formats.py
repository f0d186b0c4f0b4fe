"""The format of `results.json` and of checkpoints: this version reads every one up to its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
"""Written by this version; raised when an older program could not read a newer record."""


def check_format(path: Path, record: Mapping[str, Any]) -> None:
    """Refuse a record of another format.

    Raises:
        ValueError: It says none, or a later one.
    """
    found = record.get("format")
    if not isinstance(found, int):
        raise ValueError(
            f"{path} has no format: it is of a metarun before format {FORMAT}, which this one "
            "does not read: make the run again"
        )
    if found > FORMAT:
        raise ValueError(
            f"{path} has format {found}, of a newer metarun: update this one, which reads up to "
            f"{FORMAT}"
        )
