"""Folder of one run: its files, written so that a run can be resumed after a kill at any time.

Files are replaced atomically, so a reader finds either the old or the new content. `metrics.jsonl`
and `timing.jsonl` grow line by line, and a checkpoint records their lengths. Torch is imported with
the first checkpoint, so that the command line can read a configuration without delay.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast

from metarun.core.files import DISK_FULL, prepared_file, to_json, write_atomically
from metarun.core.nested import finite
from metarun.core.types import Record
from metarun.runs.checkpoints import read_checkpoint, serialized
from metarun.runs.formats import check_format
from metarun.runs.lock import InUse, locked_file

State = Literal["running", "finished", "failed", "interrupted"]
RESULTS = "results.json"
_log = logging.getLogger(__name__)


class RunFolder:
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
            run._file("config.yaml").open("x").close()
        except FileExistsError:
            raise InUse(f"{run.path} belongs to another run that started just now") from None
        (run.path / "checkpoints").mkdir()
        listed = "".join(f"- {json.dumps(override)}\n" for override in overrides)
        write_atomically(run._file("overrides.yaml"), (listed or "[]\n").encode())
        write_atomically(run._file("config.yaml"), config.encode())
        run.set_status("running", step=0)
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open the folder of an existing run.

        Raises:
            ValueError: The folder does not exist, or is not the folder of a run.
        """
        run = cls(Path(path))
        if not run.path.is_dir():
            raise ValueError(f"{path}: there is no such folder: expected the folder of a run")
        missing = [name for name in ("config.yaml", "status.json") if not run._file(name).is_file()]
        if missing:
            raise ValueError(
                f"{path} is not a run folder, it has no {missing[0]}: expected a folder such as "
                "outputs/<date>/<time>-<algo>-<data>-…"
            )
        return run

    # Configuration.

    def config_text(self) -> str:
        """Return the resolved configuration as YAML."""
        return self._file("config.yaml").read_text(encoding="utf-8")

    def configuration(self) -> dict[str, Any]:
        """Return the resolved configuration.

        Raises:
            ValueError: The file is not valid YAML, or not the configuration of a run.
        """
        from omegaconf import OmegaConf

        try:
            stored = OmegaConf.to_container(OmegaConf.create(self.config_text()), resolve=True)
        # YAML raises several classes of errors, with messages of several lines.
        except Exception as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{self._file('config.yaml')} is damaged: {why}") from error
        if not isinstance(stored, dict) or "names" not in stored:
            raise ValueError(
                f"{self._file('config.yaml')} is damaged: it is not a run's configuration"
            )
        return cast("dict[str, Any]", stored)

    def overrides(self) -> list[str]:
        """Return the overrides of the command that started the run."""
        from omegaconf import OmegaConf

        path = self._file("overrides.yaml")
        loaded = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else []
        if not isinstance(loaded, list):
            raise ValueError(f"{path}: expected a list of overrides")
        return [str(override) for override in loaded]

    # Status.

    def status(self) -> Record:
        """Return `state`, `step`, `time` and, for a failed run, `why`.

        The state is `running`, `finished`, `failed` or `interrupted`.
        """
        return self.read_json("status.json")

    def set_status(self, state: State, **facts: Any) -> None:
        """Write the status; on a full disk the file is overwritten in place."""
        record = {"state": state, **facts, "time": datetime.now().isoformat(timespec="seconds")}
        data = to_json(record)
        try:
            write_atomically(self._file("status.json"), data)
        except OSError as error:
            if error.errno not in DISK_FULL or not self._file("status.json").exists():
                raise
            with self._file("status.json").open("r+b") as file:
                file.write(data)
                file.truncate()

    # Records.

    def write_json(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a record; numbers that are not finite become null."""
        write_atomically(self._file(name), to_json(record))

    def read_json(self, name: str) -> Record:
        """Read a record.

        Raises:
            ValueError: The file is damaged.
        """
        path = self._file(name)
        try:
            record: Record = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return record

    def read_results(self) -> Record:
        """Read `results.json`, the record of a finished run or meta-test.

        Raises:
            ValueError: The file is damaged, or has another format.
        """
        record = self.read_json(RESULTS)
        check_format(self._file(RESULTS), record)
        return record

    def has(self, name: str) -> bool:
        """Return whether a file exists."""
        return self._file(name).exists()

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a line to `metrics.jsonl` or `timing.jsonl`."""
        line = json.dumps(finite(record), allow_nan=False) + "\n"
        with self._file(name).open("ab") as file:
            file.write(line.encode())

    def read_lines(self, name: str) -> list[Record]:
        """Return the complete lines of a growing file; an empty list if it does not exist."""
        if not self.has(name):
            return []
        lines: list[Record] = []
        for text in self._file(name).read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def lengths(self) -> dict[str, int]:
        """Sync the growing files to disk and return their lengths in bytes."""
        lengths: dict[str, int] = {}
        for name in ("metrics.jsonl", "timing.jsonl"):
            with self._file(name).open("ab") as file:
                os.fsync(file.fileno())
                lengths[name] = file.tell()
        return lengths

    def cut(self, lengths: Mapping[str, int]) -> None:
        """Truncate the growing files to the lengths in a checkpoint, with any partial line."""
        for name in ("metrics.jsonl", "timing.jsonl"):
            path = self._file(name)
            length = lengths.get(name, 0)
            if path.exists() and path.stat().st_size > length:
                os.truncate(path, length)

    # Checkpoints.

    def save_last(self, checkpoint: Record) -> None:
        """Write `last.pt`; the previous checkpoint is kept as `previous.pt`."""
        folder = self.path / "checkpoints"
        data = serialized(checkpoint)
        with prepared_file(folder / "last.pt", data) as temporary:
            if (folder / "last.pt").exists():
                (folder / "last.pt").replace(folder / "previous.pt")
            temporary.replace(folder / "last.pt")

    def load_last(self) -> Record | None:
        """Return the newest intact checkpoint; None if none was written.

        Raises:
            ValueError: All checkpoints are damaged.
        """
        folder = self.path / "checkpoints"
        damaged: list[str] = []
        for name in ("last.pt", "previous.pt"):
            if (folder / name).exists():
                try:
                    checkpoint = read_checkpoint(folder / name)
                except ValueError as error:
                    damaged.append(str(error))
                    continue
                for text in damaged:
                    _log.warning("%s: continuing from %s", text, name)
                return checkpoint
        if damaged:
            raise ValueError(f"{damaged[0]}, and there is no other checkpoint: start a new run")
        return None

    def save_best(self, checkpoint: Record) -> None:
        """Write `best.pt`."""
        write_atomically(self.path / "checkpoints" / "best.pt", serialized(checkpoint))

    def drop_best(self) -> None:
        """Remove `best.pt`, which may be newer than the step from which a run resumes."""
        (self.path / "checkpoints" / "best.pt").unlink(missing_ok=True)

    def load_learned(self) -> tuple[Literal["best", "last"], Record] | None:
        """Load the parameters with the best result on meta-val, or the last ones without it.

        Returns:
            `best` or `last`, and a record with `algo`, `data`, `step` and `state`; None if the
            run has no checkpoint yet.

        Raises:
            ValueError: All checkpoints are damaged.
        """
        best = self.path / "checkpoints" / "best.pt"
        if best.exists():
            try:
                return "best", read_checkpoint(best)
            except ValueError as error:
                _log.warning("%s: its copy in last.pt is used", error)
        last = self.load_last()
        if last is None:
            return None
        return ("last", last) if last["best"] is None else ("best", last["best"])

    # Lock and log.

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other processes; the lock of an ended process is taken over.

        Raises:
            InUse: Another process uses the folder.
        """
        path = self._file("lock")
        file = locked_file(path)
        try:
            self._sweep()
            file.truncate(0)
            file.write(f"{socket.gethostname()} {os.getpid()}\n")
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)
            file.close()

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Write the log records of the program to `metarun.log`."""
        handler = _LogFile(self._file("metarun.log"), encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("metarun")
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            # The last lines may not fit on a full disk, which is already reported by then.
            with contextlib.suppress(OSError):
                handler.close()

    def test_folder(self, slug: str) -> Path:
        """Create a new folder `tests/<slug>`, with a number appended if it exists."""
        tests = self.path / "tests"
        tests.mkdir(exist_ok=True)
        number = 1
        while True:
            folder = tests / (slug if number == 1 else f"{slug}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
            number += 1

    def _file(self, name: str) -> Path:
        return self.path / name

    def _sweep(self) -> None:
        """Remove temporary files of a process that was killed while writing."""
        for folder in (self.path, self.path / "checkpoints"):
            for temporary in folder.glob(".*.tmp"):
                temporary.unlink(missing_ok=True)


class NullRunFolder(RunFolder):
    """Run folder that reads and writes nothing, for all but the main process of a run.

    Attributes:
        path: Empty path; the caller may set that of the main process, for messages.
    """

    def __init__(self) -> None:
        super().__init__(Path())

    def set_status(self, state: State, **facts: Any) -> None:
        pass

    def write_json(self, name: str, record: Mapping[str, Any]) -> None:
        pass

    def read_json(self, name: str) -> Record:  # noqa: ARG002
        return {}

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        pass

    def lengths(self) -> dict[str, int]:
        return {}

    def cut(self, lengths: Mapping[str, int]) -> None:
        pass

    def save_last(self, checkpoint: Record) -> None:
        pass

    def save_best(self, checkpoint: Record) -> None:
        pass

    def drop_best(self) -> None:
        pass

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        yield


class _LogFile(logging.FileHandler):
    """Log handler that ignores disk errors instead of printing a traceback for every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
