"""Files that are written whole or not at all, and the room that they need."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metarun.core.nested import finite

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a disk, or of a user's share of it, that is full."""


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file or none: a reader meets the old content or the new."""
    with prepared_file(path, data) as temporary:
        temporary.replace(path)


def write_new(path: Path, data: bytes) -> Path:
    """Write a whole file under a name that is free; returns it.

    Raises:
        FileExistsError: It is not.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    with prepared_file(path, data) as temporary:
        # `replace` alone would take the place of whatever has come meanwhile.
        path.open("x").close()
        temporary.replace(path)
    return path


def check_space(path: str | Path, needed: int) -> None:
    """Check that there is room for a run before it starts.

    Args:
        path: Where the run's folder is or will be.
        needed: Bytes.

    Raises:
        ValueError: There is not.
    """
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"{place} has {size_text(free)} free and the run needs about {size_text(needed)}: "
            "free some space, or put the run elsewhere with hydra.run.dir=…"
        )


def to_json(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(finite(record), indent=2, allow_nan=False, ensure_ascii=False)
    return f"{text}\n".encode()


def size_text(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


@contextlib.contextmanager
def prepared_file(path: Path, data: bytes | memoryview) -> Iterator[Path]:
    """A temporary file beside `path` with the data on the disk, removed unless it was moved."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # Not every system can open a folder, nor every file system sync one.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
