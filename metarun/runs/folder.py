"""The folder of one run: what is in it, and how it survives a kill at any moment.

Every file is written beside its place and moved there, so that a reader meets the old file or
the new one; `metrics.jsonl` and `timing.jsonl` grow line by line, and a checkpoint records how
long they were. torch is imported with the first checkpoint, so that the command line can read
a run's configuration at once.
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
    """The files of one run. Made by `RunFolder.create` or `RunFolder.open`.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: str | Path, config: str, overrides: Sequence[str] = ()) -> RunFolder:
        """Make the folder of a new run.

        Args:
            path: Where; a folder that is there already has to be empty.
            config: The resolved configuration, as YAML.
            overrides: What was typed, for `resume`.

        Raises:
            InUse: Something is there already.
        """
        run = cls(Path(path))
        run.path.mkdir(parents=True, exist_ok=True)
        if any(run.path.iterdir()):
            raise InUse(f"{run.path} is not empty: every run has a folder of its own")
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
        """Open the folder of a run that was started before.

        Raises:
            ValueError: It is not there, or it is not the folder of a run.
        """
        run = cls(Path(path))
        if not run.path.is_dir():
            raise ValueError(f"{path}: there is no such folder: expected the folder of a run")
        missing = [name for name in ("config.yaml", "status.json") if not run._file(name).is_file()]
        if missing:
            raise ValueError(
                f"{path} is not a run folder, it has no {missing[0]}: expected one that metarun "
                "made, outputs/<date>/<time>-<algo>-<data>-…"
            )
        return run

    # What a run was asked for.

    def config_text(self) -> str:
        """The resolved configuration, as YAML."""
        return self._file("config.yaml").read_text(encoding="utf-8")

    def configuration(self) -> dict[str, Any]:
        """The resolved configuration.

        Raises:
            ValueError: The file is no YAML, or no run's.
        """
        from omegaconf import OmegaConf

        try:
            stored = OmegaConf.to_container(OmegaConf.create(self.config_text()), resolve=True)
        # YAML's own errors have several lines and classes.
        except Exception as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{self._file('config.yaml')} is damaged: {why}") from error
        if not isinstance(stored, dict) or "names" not in stored:
            raise ValueError(
                f"{self._file('config.yaml')} is damaged: it is not a run's configuration"
            )
        return cast("dict[str, Any]", stored)

    def overrides(self) -> list[str]:
        """What was typed when the run was started."""
        from omegaconf import OmegaConf

        path = self._file("overrides.yaml")
        loaded = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else []
        if not isinstance(loaded, list):
            raise ValueError(f"{path}: expected a list of overrides")
        return [str(override) for override in loaded]

    # Where it stands.

    def status(self) -> Record:
        """`state` (running, finished, failed, interrupted), `step`, `time`; `why` if it failed."""
        return self.read_json("status.json")

    def set_status(self, state: State, **facts: Any) -> None:
        """Write the status, in place if the disk has no room for a second file."""
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
        """Write a record; what is not finite becomes null."""
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
            ValueError: It is damaged, or of another format.
        """
        record = self.read_json(RESULTS)
        check_format(self._file(RESULTS), record)
        return record

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return self._file(name).exists()

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line to `metrics.jsonl` or `timing.jsonl`."""
        line = json.dumps(finite(record), allow_nan=False) + "\n"
        with self._file(name).open("ab") as file:
            file.write(line.encode())

    def read_lines(self, name: str) -> list[Record]:
        """The lines of a growing file, but for one that is being written; none without it."""
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
        """Bytes of the growing files, on the disk for sure."""
        lengths: dict[str, int] = {}
        for name in ("metrics.jsonl", "timing.jsonl"):
            with self._file(name).open("ab") as file:
                os.fsync(file.fileno())
                lengths[name] = file.tell()
        return lengths

    def cut(self, lengths: Mapping[str, int]) -> None:
        """Cut the growing files back to what a checkpoint recorded, half lines included."""
        for name in ("metrics.jsonl", "timing.jsonl"):
            path = self._file(name)
            length = lengths.get(name, 0)
            if path.exists() and path.stat().st_size > length:
                os.truncate(path, length)

    # Checkpoints.

    def save_last(self, checkpoint: Record) -> None:
        """Write `last.pt`; the one before stays as `previous.pt`."""
        folder = self.path / "checkpoints"
        data = serialized(checkpoint)
        with prepared_file(folder / "last.pt", data) as temporary:
            if (folder / "last.pt").exists():
                (folder / "last.pt").replace(folder / "previous.pt")
            temporary.replace(folder / "last.pt")

    def load_last(self) -> Record | None:
        """The newest checkpoint that is whole; None if none was ever written.

        Raises:
            ValueError: There are checkpoints and all are damaged.
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
            raise ValueError(f"{damaged[0]}, and there is no other: start the run again")
        return None

    def save_best(self, checkpoint: Record) -> None:
        """Write `best.pt`."""
        write_atomically(self.path / "checkpoints" / "best.pt", serialized(checkpoint))

    def drop_best(self) -> None:
        """Remove `best.pt`, which a run that goes on from an earlier step has not earned yet."""
        (self.path / "checkpoints" / "best.pt").unlink(missing_ok=True)

    def load_learned(self) -> tuple[Literal["best", "last"], Record] | None:
        """What the run has learned: the parameters with the best meta-val, else the last.

        Returns:
            Which of the two, and a record with `algo`, `data`, `step` and `state`; None if the
            run has saved nothing yet.

        Raises:
            ValueError: Every file is damaged.
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

    # One process at a time, and its log.

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder; a lock whose process is gone is taken over.

        Raises:
            InUse: Another process is at work here.
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
        """Write what the program logs to `metarun.log`."""
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
            # The last lines may not fit on a full disk, which has been reported by then.
            with contextlib.suppress(OSError):
                handler.close()

    def test_folder(self, slug: str) -> Path:
        """Make a new folder `tests/<slug>`, with a number behind it if there is one already."""
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
        """Remove the unfinished files of a process that was killed while it wrote."""
        for folder in (self.path, self.path / "checkpoints"):
            for temporary in folder.glob(".*.tmp"):
                temporary.unlink(missing_ok=True)


class NullRunFolder(RunFolder):
    """The folder of a run that another process writes; here nothing is written or read.

    Attributes:
        path: Where it is there, for messages.
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
    """A log that a full disk does not turn into a traceback for every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
