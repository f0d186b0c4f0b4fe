"""The lines of the logs that grow, `metrics.jsonl` and `timing.jsonl`, also of damaged ones."""

from __future__ import annotations

import json
from dataclasses import dataclass

from metarun.core.types import Record
from metarun.core.words import number_of


@dataclass(frozen=True, slots=True)
class Lines:
    """The content of a log.

    Attributes:
        records: The records of its whole lines: a step, and numbers or null by name.
        data: The bytes of these lines.
        damaged: Number of lines that are none of these.
    """

    records: list[Record]
    data: bytes
    damaged: int

    @classmethod
    def of(cls, data: bytes, until: float = float("inf")) -> Lines:
        """Read a log; lines of steps after `until` are left out, and are not damaged."""
        records: list[Record] = []
        kept: list[bytes] = []
        damaged = 0
        for line in filter(bytes.strip, data.split(b"\n")):
            record = _record(line)
            if record is None:
                damaged += 1
            elif record["step"] <= until:
                records.append(record)
                kept.append(line + b"\n")
        return cls(records, b"".join(kept), damaged)

    @property
    def end(self) -> int:
        """Step of the last line; 0 without any."""
        return int(self.records[-1]["step"]) if self.records else 0


def damage(data: bytes, length: int, step: int) -> str | None:
    """Return what is wrong with a log since a checkpoint was saved; None if it is whole.

    Args:
        data: Bytes of the log now. What was written after the checkpoint is not looked at.
        length: Length of the log in the checkpoint, in bytes.
        step: Step of the checkpoint.
    """
    saved = data[:length]
    lines = Lines.of(saved)
    found: list[str] = []
    if len(data) < length:
        found.append(f"it has {len(data):,} of {length:,} bytes")
    if lines.damaged:
        found.append(f"{number_of(lines.damaged, 'line')} cannot be read")
    if not found and (lines.end > step or not saved.endswith(b"\n")) and length:
        found.append("lines are missing")
    return ", ".join(found) or None


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    # The last one for a line of a thousand brackets.
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int)
    numbers = whole and all(isinstance(v, int | float | None) for v in record.values())
    return record if numbers else None
