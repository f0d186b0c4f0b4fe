"""What `results.json` and checkpoints say of themselves: their format number and their run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
"""Format written by this version, which reads all formats up to its own. It increases when older
versions cannot read new records."""


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


def check_own(path: Path, record: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that a record does not say that it belongs to another run.

    Args:
        path: File of the record.
        record: The record; files of older versions say less.
        own: What the run's configuration says, by the same names.

    Raises:
        ValueError: They differ.
    """
    for name, value in own.items():
        if name in record and record[name] != value:
            raise ValueError(
                f"{path} is of another run: its {name} is {record[name]}, that of this run {value}"
            )
