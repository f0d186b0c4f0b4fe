"""The checkpoints of a run, and their files, which are read without executing code from them.

Torch is imported with the first checkpoint, so that the command line can read a configuration
without delay.
"""

from __future__ import annotations

import io
import logging
import pickle
import zipfile
from pathlib import Path
from typing import Literal

from metarun.core.archives import check_archive
from metarun.core.files import prepared_file, refuse_link, write_atomically
from metarun.core.types import Record
from metarun.runs.formats import FORMAT, check_format, check_own

_log = logging.getLogger(__name__)


class Checkpoints:
    """The last checkpoint of a run, the one before it, and the best on meta-val.

    Attributes:
        path: Path of the run's folder.
    """

    path: Path

    def identity(self) -> Record:
        """Return what the run's own checkpoints say of it: algorithm, data and seed."""
        raise NotImplementedError

    def save_last(self, checkpoint: Record) -> None:
        """Write `last.pt`; the previous checkpoint is kept as `previous.pt`."""
        folder = self._written
        data = serialized(checkpoint)
        with prepared_file(folder / "last.pt", data) as temporary:
            if (folder / "last.pt").exists():
                (folder / "last.pt").replace(folder / "previous.pt")
            temporary.replace(folder / "last.pt")

    def has_checkpoint(self) -> bool:
        """Return whether a checkpoint was written, be it damaged or not."""
        return any((self._folder / name).exists() for name in ("last.pt", "previous.pt"))

    def load_last(self) -> Record | None:
        """Return the newest intact checkpoint; None if none was written.

        Raises:
            ValueError: All checkpoints are damaged or of another run.
        """
        folder = self._folder
        damaged: list[str] = []
        for name in ("last.pt", "previous.pt"):
            if (folder / name).exists():
                try:
                    checkpoint = self._read(name)
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
        write_atomically(self._written / "best.pt", serialized(checkpoint))

    def drop_best(self) -> None:
        """Remove `best.pt`, which may be newer than the step from which a run resumes."""
        (self._written / "best.pt").unlink(missing_ok=True)

    def load_learned(self) -> tuple[Literal["best", "last"], Record] | None:
        """Load the parameters with the best result on meta-val, or the last ones without it.

        Returns:
            `best` or `last`, and a record with `algo`, `data`, `step` and `state`; None if the
            run has no checkpoint yet.

        Raises:
            ValueError: All checkpoints are damaged.
        """
        best = self._folder / "best.pt"
        if best.exists():
            try:
                return "best", self._read("best.pt")
            except ValueError as error:
                _log.warning("%s: its copy in last.pt is used", error)
        last = self.load_last()
        if last is None:
            return None
        return ("last", last) if last["best"] is None else ("best", last["best"])

    def _read(self, name: str) -> Record:
        checkpoint = read_checkpoint(self._folder / name)
        check_own(self._folder / name, checkpoint, self.identity())
        return checkpoint

    @property
    def _folder(self) -> Path:
        return self.path / "checkpoints"

    @property
    def _written(self) -> Path:
        """The folder, to be written to."""
        refuse_link(self._folder)
        return self._folder


def read_checkpoint(path: Path) -> Record:
    """Load a checkpoint onto the CPU without executing any code in it.

    Raises:
        ValueError: The file is damaged, has another format, or is small and unpacks to much.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(path, archive)
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"{broken} differs from its checksum")
        checkpoint: Record = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is damaged") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is not a checkpoint of metarun")
    check_format(path, checkpoint)
    return checkpoint


def serialized(checkpoint: Record) -> memoryview:
    """Return the bytes of a checkpoint file."""
    import torch

    # In memory first, because torch reports a full disk as an internal error of its writer.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    return buffer.getbuffer()
