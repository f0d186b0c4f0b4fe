"""Folder of one run: its records, its checkpoints and its lock.

Files are replaced atomically, so a reader finds either the old or the new content, and a run can be
resumed after a kill at any time. `metrics.jsonl` and `timing.jsonl` grow line by line, and a
checkpoint records their lengths.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from metarun.core.files import inner_folder
from metarun.core.types import Record
from metarun.runs.checkpoints import Checkpoints
from metarun.runs.find import find_run
from metarun.runs.lock import InUse, Lock
from metarun.runs.records import EPISODES as EPISODES
from metarun.runs.records import RESULTS as RESULTS
from metarun.runs.records import Records, State


class Run(Protocol):
    """What training needs of a run: `RunFolder`, or `NullRun` in all but the main process.

    Attributes:
        path: Path of the folder; that of the main process's folder, for messages.
    """

    path: Path

    def locked(self) -> AbstractContextManager[None]: ...
    def logging(self) -> AbstractContextManager[None]: ...
    def has(self, name: str) -> bool: ...
    def status(self) -> Record: ...
    def is_complete(self) -> bool: ...
    def set_status(self, state: State, **facts: Any) -> None: ...
    def read_json(self, name: str) -> Record: ...
    def write_json(self, name: str, record: Mapping[str, Any]) -> None: ...
    def write_bytes(self, name: str, data: bytes) -> None: ...
    def append(self, name: str, record: Mapping[str, Any]) -> None: ...
    def read_lines(self, name: str) -> list[Record]: ...
    def lengths(self) -> dict[str, int]: ...
    def cut(self, lengths: Mapping[str, int], step: int) -> bool: ...
    def load_last(self) -> Record | None: ...
    def save_last(self, checkpoint: Record) -> None: ...
    def save_best(self, checkpoint: Record) -> None: ...
    def drop_best(self) -> None: ...


class RunFolder(Records, Checkpoints, Lock):
    """Files of one run, to be created by `RunFolder.create` or `RunFolder.open`.

    Attributes:
        path: Path of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: str | Path, config: str, overrides: Sequence[str] = ()) -> RunFolder:
        """Create the folder of a new run.

        Args:
            path: Path of the folder; an existing folder has to be empty.
            config: Resolved configuration, as YAML.
            overrides: Overrides of the command line, for `resume`.

        Raises:
            InUse: The folder is not empty, or another run has just created it.
        """
        run = cls(Path(path))
        run.path.mkdir(parents=True, exist_ok=True)
        if any(run.path.iterdir()):
            raise InUse(f"{run.path} is not empty: a run needs a folder of its own")
        try:
            (run.path / "config.yaml").open("x").close()
        except FileExistsError:
            raise InUse(f"{run.path} belongs to another run that started just now") from None
        except OSError:
            run._remove_empty()
            raise
        listed = "".join(f"- {json.dumps(override)}\n" for override in overrides)
        try:
            (run.path / "checkpoints").mkdir()
            run.write_bytes("overrides.yaml", (listed or "[]\n").encode())
            run.write_bytes("config.yaml", config.encode())
            run.set_status("running", step=0)
        except OSError:
            run.clear_false_start()
            raise
        return run

    def clear_false_start(self) -> None:
        """Remove what `create` has made without getting as far as a status, and the folder."""
        # Another process may begin once there is no config.yaml.
        others = (*self.path.glob(".*.tmp"), self.path / "overrides.yaml")
        for path in (*others, self.path / "config.yaml"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (self.path / "checkpoints").rmdir()
        self._remove_empty()

    def _remove_empty(self) -> None:
        # Another process may have begun in it.
        with contextlib.suppress(OSError):
            self.path.rmdir()

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open the folder of an existing run.

        Args:
            path: Path of the folder, or another name of the run, see `find_run`.

        Raises:
            ValueError: The folder does not exist, or is not the folder of a run.
        """
        run = cls(find_run(path))
        if not run.path.is_dir():
            raise ValueError(f"{path}: there is no such folder: expected the folder of a run")
        missing = [
            name for name in ("config.yaml", "status.json") if not (run.path / name).is_file()
        ]
        if missing:
            raise ValueError(
                f"{path} is not a run folder, it has no {missing[0]}: expected a folder such as "
                "outputs/<date>/<time>-<algo>-<data>-…"
            )
        return run

    def test_folder(self, slug: str) -> Path:
        """Create a new folder `tests/<slug>`, with a number appended if it exists."""
        tests = inner_folder(self.path / "tests")
        number = 1
        while True:
            folder = tests / (slug if number == 1 else f"{slug}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
            number += 1


class NullRun:
    """A run that reads and writes nothing, for all but the main process.

    Attributes:
        path: See `Run`; empty until training sets it.
    """

    def __init__(self) -> None:
        self.path = Path()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock nothing."""
        yield

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Log nothing."""
        yield

    def has(self, name: str) -> bool:  # noqa: ARG002
        """Return that no file exists."""
        return False

    def status(self) -> Record:
        """Return no status."""
        return {}

    def is_complete(self) -> bool:
        """Return that the run is not finished."""
        return False

    def read_json(self, name: str) -> Record:  # noqa: ARG002
        """Return an empty record."""
        return {}

    def read_lines(self, name: str) -> list[Record]:  # noqa: ARG002
        """Return no lines."""
        return []

    def lengths(self) -> dict[str, int]:
        """Return no lengths."""
        return {}

    def cut(self, lengths: Mapping[str, int], step: int) -> bool:  # noqa: ARG002
        """Cut nothing, and return that nothing was damaged."""
        return False

    def load_last(self) -> Record | None:
        """Return no checkpoint."""
        return None

    def _ignore(self, *_: Any, **__: Any) -> None:
        """Write nothing."""

    set_status = write_json = write_bytes = append = _ignore
    save_last = save_best = drop_best = _ignore
