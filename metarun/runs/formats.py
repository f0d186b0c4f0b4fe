"""Format number of `results.json` and of checkpoints. A version reads all formats up to its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
"""Format written by this version. It increases when older versions cannot read new records."""


def check_format(path: Path, record: Mapping[str, Any]) -> None:
    """Check that this version can read a record.

    Raises:
        ValueError: The record has no format, or a newer one.
    """
    found = record.get("format")
    if not isinstance(found, int):
        raise ValueError(
            f"{path} has no format: it was written by a metarun before format {FORMAT}, which "
            "this version does not read: run it again"
        )
    if found > FORMAT:
        raise ValueError(
            f"{path} has format {found}, of a newer metarun: update metarun, this version reads up "
            f"to {FORMAT}"
        )
