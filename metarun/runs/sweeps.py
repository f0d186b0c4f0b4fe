"""The names of sweeps: which runs of the pool each one has, in a small file of its own.

The pool of runs stays as it is: a run is found by what it computes, in any sweep.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from metarun.core.files import to_json, write_atomically

INDEX = Path("outputs/sweeps/.index")
"""Folder of these files, below the current one."""


@dataclass(frozen=True)
class Sweep:
    """A sweep by its name.

    Attributes:
        name: Name of the sweep, and of its file without `.json`.
        time: When it was last started, as `2026-11-21T09:30:00`.
        command: Words of the command line behind `metarun`.
        runs: Folders of its runs, as the command line would name them.
    """

    name: str
    time: str
    command: list[str]
    runs: list[str]

    def existing(self) -> list[Path]:
        """Return the folders of the runs that have begun.

        Raises:
            ValueError: There is none.
        """
        found = [path for path in map(Path, self.runs) if path.is_dir()]
        if not found:
            raise ValueError(f"sweep {self.name}: none of its {len(self.runs)} runs has a folder")
        return found

    def store(self) -> None:
        """Write the file of the sweep; the same name stands for the newest sweep of that name."""
        INDEX.mkdir(parents=True, exist_ok=True)
        write_atomically(_path(self.name), to_json(asdict(self)))


def find(name: str) -> Sweep | None:
    """Return the sweep of a name; None if there is none.

    Raises:
        ValueError: Its file is damaged.
    """
    # A part of a path is no name: the file would lie elsewhere.
    if name != Path(name).name or not _path(name).is_file():
        return None
    return _read(_path(name))


def stored() -> list[Sweep]:
    """Return all sweeps, the newest first.

    Raises:
        ValueError: A file is damaged.
    """
    found = [_read(path) for path in INDEX.glob("*.json")]
    return sorted(found, key=lambda sweep: (sweep.time, sweep.name), reverse=True)


def free_name(name: str, runs: Sequence[str]) -> str:
    """Return a name that no sweep of other runs has: with a number if it is taken."""
    number = 1
    while True:
        candidate = name if number == 1 else f"{name}-{number}"
        taken = find(candidate)
        if taken is None or taken.runs == list(runs):
            return candidate
        number += 1


def now() -> str:
    """Return the current time as `Sweep.time` has it."""
    return datetime.now().isoformat(timespec="seconds")


def _path(name: str) -> Path:
    return INDEX / f"{name}.json"


def _read(path: Path) -> Sweep:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, Mapping):
            raise TypeError("it holds no mapping")
        command, runs = ([str(item) for item in record[key]] for key in ("command", "runs"))
        return Sweep(path.stem, str(record["time"]), command, runs)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and repeat the sweep") from error
