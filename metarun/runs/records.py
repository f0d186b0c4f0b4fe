"""The records of a run: its configuration, status, results, and the logs that grow line by line."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast

from metarun.core.archives import read_arrays
from metarun.core.errors import one_line
from metarun.core.files import (
    DISK_FULL,
    open_inside,
    refuse_link,
    to_json,
    write_atomically,
    write_new,
)
from metarun.core.literals import find_interpolation, read_literals
from metarun.core.nested import finite
from metarun.core.once import warn_once
from metarun.core.results import Results, completed
from metarun.core.types import Record
from metarun.core.words import number_of
from metarun.runs.formats import check_format, check_own
from metarun.runs.lines import Lines, damage

State = Literal["running", "finished", "failed", "interrupted"]
RESULTS = "results.json"
EPISODES = "episodes.npz"
METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
_GROWING = (METRICS, "timing.jsonl")

_log = logging.getLogger(__name__)


class Records:
    """The records in a folder; those that do not grow are replaced atomically.

    Attributes:
        path: Path of the folder.
    """

    path: Path

    # Configuration.

    def config_text(self) -> str:
        """Return the resolved configuration as YAML."""
        return self._file("config.yaml").read_text(encoding="utf-8")

    def configuration(self) -> dict[str, Any]:
        """Return the resolved configuration.

        Raises:
            ValueError: The file is not valid YAML, or not the configuration of a run; or it has
                an interpolation, which could read what is none of its business.
        """
        path = self._file("config.yaml")
        stored = _literals(path)
        if not isinstance(stored, dict) or "names" not in stored:
            raise ValueError(f"{path} is damaged: it is not a run's configuration")
        found = find_interpolation(stored)
        if found is not None:
            raise ValueError(
                f"{path} is damaged: {found!r} is an interpolation: expected plain values"
            )
        return cast("dict[str, Any]", stored)

    def overrides(self) -> list[str]:
        """Return the overrides of the command that started the run, as text."""
        path = self._file("overrides.yaml")
        loaded = _literals(path) if path.exists() else []
        if not isinstance(loaded, list):
            raise ValueError(f"{path}: expected a list of overrides")
        return [str(override) for override in loaded]

    def environment(self) -> Record:
        """Return the versions, machine, code and data of the run; empty if none were recorded."""
        return self.read_json(ENVIRONMENT) if self.has(ENVIRONMENT) else {}

    def identity(self) -> Record:
        """Return the algorithm, data and seed of the run; empty if the folder has no configuration.

        Its own checkpoints and results say the same.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            config = self.configuration()
            names = config["names"]
            return {"algo": names["algo"], "data": names["data"], "seed": config["seed"]}
        return {}

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
            with open_inside(self._file("status.json"), "r+b") as file:
                file.write(data)
                file.truncate()

    # Files that are written as a whole.

    def has(self, name: str) -> bool:
        """Return whether a file exists."""
        return self._file(name).exists()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file."""
        write_atomically(self._file(name), data)

    def write_json(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a record; numbers that are not finite become null."""
        self.write_bytes(name, to_json(record))

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

    def read_results(self) -> Results:
        """Read `results.json`, the record of a finished run or meta-test, also of older versions.

        Raises:
            ValueError: The file is damaged, has another format, or is of another run.
        """
        record = self.read_json(RESULTS)
        check_format(self._file(RESULTS), record)
        check_own(self._file(RESULTS), record, self.identity())
        return completed(record)

    def read_episodes(self, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Any]:
        """Read the arrays of `episodes.npz` whose names are wanted; by default all of them.

        Raises:
            ValueError: The file is damaged, or is not the one of which `results.json` has the hash.
        """
        return self._episodes(self.read_json(RESULTS), wanted)

    def _episodes(self, results: Record, wanted: Callable[[str], bool]) -> dict[str, Any]:
        path = self._file(EPISODES)
        arrays = read_arrays(path, wanted)
        if not _has_hash(results, EPISODES, path.read_bytes()):
            raise ValueError(f"{path} is damaged: {RESULTS} has the hash of another file")
        return arrays

    def is_complete(self) -> bool:
        """Return whether the run is finished and the files of its meta-test can be read.

        It warns if they cannot: their meta-test can be made again.
        """
        if self.status().get("state") != "finished":
            return False
        why = self.damage_of_results()
        if why is not None:
            warn_once(f"{why}: the meta-test is made again")
        return why is None

    def damage_of_results(self) -> str | None:
        """Return what is wrong with the files of the meta-test; None if nothing is.

        A format of another version is not damage.
        """
        results = self._file(RESULTS)
        try:
            record = self.read_json(RESULTS)
            if not isinstance(record, dict) or not record:
                return f"{results} is damaged: it holds no results"
            check_own(results, record, self.identity())
            self._episodes(record, lambda _: True)
        except FileNotFoundError as error:
            return f"{error.filename} is missing"
        except (OSError, ValueError) as error:
            return one_line(error)
        return None

    # Logs that grow.

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a line to `metrics.jsonl` or `timing.jsonl`."""
        line = json.dumps(finite(record), allow_nan=False) + "\n"
        with open_inside(self._file(name), "ab") as file:
            file.write(line.encode())

    def read_lines(self, name: str) -> list[Record]:
        """Return the whole lines of a growing file, and warn of lines that are left out.

        The list is empty if the file does not exist.
        """
        path = self._file(name)
        data = path.read_bytes() if path.exists() else b""
        lines = Lines.of(data)
        status = self.status() if self.has("status.json") else {}
        state, step = status.get("state"), status.get("step")
        damaged = lines.damaged
        # The last line of a run that goes on may be half written.
        if damaged and not data.endswith(b"\n") and state == "running":
            damaged -= 1
        if damaged:
            warn_once(f"{path}: {number_of(damaged, 'damaged line')} left out")
        # A finished run has logged its last step.
        if state == "finished" and isinstance(step, int) and lines.end < step:
            warn_once(f"{path}: nothing after step {lines.end} of {step}")
        elif state == "finished" and not damaged and not self._is_own_log(name, data):
            warn_once(f"{path} was changed after the run: {RESULTS} has the hash of another file")
        return lines.records

    def check_logs(self) -> None:
        """Warn of what is damaged in the growing files."""
        for name in _GROWING:
            self.read_lines(name)

    def _is_own_log(self, name: str, data: bytes) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return _has_hash(self.read_json(RESULTS), name, data)
        return True

    def lengths(self) -> dict[str, int]:
        """Sync the growing files to disk and return their lengths in bytes."""
        lengths: dict[str, int] = {}
        for name in _GROWING:
            with open_inside(self._file(name), "ab") as file:
                os.fsync(file.fileno())
                lengths[name] = file.tell()
        return lengths

    def cut(self, lengths: Mapping[str, int], step: int) -> bool:
        """Truncate the growing files to the lengths in a checkpoint, with any partial line.

        A file that was damaged since then goes on with its whole lines; the damaged one is kept as
        `metrics.damaged.jsonl`.

        Args:
            lengths: Lengths in bytes, by name.
            step: Step of the checkpoint.

        Returns:
            Whether a file was damaged, so that the lengths in the checkpoint no longer hold.
        """
        was_damaged = False
        for name in _GROWING:
            path, length = self._file(name), lengths.get(name, 0)
            refuse_link(path)
            data = path.read_bytes() if path.is_file() else b""
            what = damage(data, length, step)
            if what is not None:
                was_damaged = True
                self._repair(path, data, step, what)
            elif len(data) > length:
                with open_inside(path, "r+b") as file:
                    file.truncate(length)
        return was_damaged

    def _repair(self, path: Path, data: bytes, step: int, what: str) -> None:
        """Replace a damaged log by its whole lines up to a step, and keep it beside them."""
        lines = Lines.of(data, until=step)
        kept = f"{number_of(len(lines.records), 'whole line')} kept"
        if data:
            kept += f", the damaged file is {_put_aside(path, data).name}"
        write_atomically(path, lines.data)
        _log.warning("%s was damaged after step %d was saved (%s): %s", path, step, what, kept)

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

    def _file(self, name: str) -> Path:
        return self.path / name


def _has_hash(results: Any, name: str, data: bytes) -> bool:
    """Return whether a file is the one whose hash results have; older results have none."""
    known = results.get("files") if isinstance(results, dict) else None
    hashed = known.get(name) if isinstance(known, dict) else None
    return hashed in (None, hash_of(data))


def hash_of(data: bytes) -> str:
    """Return the hash of a file's content that `results.json` holds."""
    return hashlib.sha256(data).hexdigest()


def _put_aside(path: Path, data: bytes) -> Path:
    """Write the content of a damaged log into a new file next to it, and return its path."""
    number = 1
    while True:
        aside = path.with_suffix(f".damaged{'' if number == 1 else f'-{number}'}.jsonl")
        with contextlib.suppress(FileExistsError):
            return write_new(aside, data)
        number += 1


def _literals(path: Path) -> Any:
    try:
        # A copy, which the caller may change.
        return copy.deepcopy(_parsed(path.read_text(encoding="utf-8")))
    # YAML raises several classes of errors, with messages of several lines.
    except Exception as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error


@functools.lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
    """Return what a text holds; every record of a run is checked against its configuration."""
    return read_literals(text)


class _LogFile(logging.FileHandler):
    """Log handler that ignores disk errors instead of printing a traceback for every line."""

    def _open(self) -> Any:
        return open_inside(Path(self.baseFilename), "a")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
