"""Writes of files, atomic and through no link, and checks of free disk space."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from metarun.core.nested import finite

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk and of an exhausted quota."""


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replace a file atomically: a reader finds either the old content or the new."""
    with prepared_file(path, data) as temporary:
        temporary.replace(path)


def write_new(path: Path, data: bytes) -> Path:
    """Write a new file atomically and return its path.

    Raises:
        FileExistsError: The path exists.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    with prepared_file(path, data) as temporary:
        # `replace` alone would overwrite a file that was created in the meantime.
        path.open("x").close()
        temporary.replace(path)
    return path


_FLAGS = {
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "a+": os.O_RDWR | os.O_CREAT | os.O_APPEND,
    "r+": os.O_RDWR,
}


def open_inside(path: Path, mode: Literal["a", "ab", "a+", "r+b"]) -> IO[Any]:
    """Open a file of a run's folder to write in place; all others are written atomically.

    The folder may come from somebody else, and a link in it may name any file of the user.

    Raises:
        ValueError: The path is a link, or something else than a file.
    """
    refuse_link(path)
    # A system without these flags has the check above alone. A pipe would block.
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, _FLAGS[mode.replace("b", "")] | safe, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not an ordinary file: remove it")
    return os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8")


def inner_folder(path: Path) -> Path:
    """Create a folder inside that of a run, unless it exists, and return its path.

    Raises:
        ValueError: The path is a link.
    """
    refuse_link(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def refuse_link(path: Path) -> None:
    """Check that nothing will be written through a link.

    Raises:
        ValueError: The path is a link.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a link, and metarun writes through no link: remove it")


def check_space(path: str | Path, needed: int) -> None:
    """Check before a run starts that the disk has room for it.

    Args:
        path: Run folder, which need not exist yet.
        needed: Number of bytes that the run needs.

    Raises:
        ValueError: Less space is free.
    """
    place, free = free_space(path)
    if free < needed:
        raise ValueError(
            f"{place} has {size_text(free)} free and the run needs about {size_text(needed)}: "
            "free some space, or choose another folder with hydra.run.dir=…"
        )


def free_space(path: str | Path) -> tuple[Path, int]:
    """Return the nearest folder that exists above a path, and the bytes free on its disk."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return place, shutil.disk_usage(place).free


def to_json(record: Mapping[str, Any]) -> bytes:
    """Encode a record as indented JSON, with null for numbers that are not finite."""
    text = json.dumps(finite(record), indent=2, allow_nan=False, ensure_ascii=False)
    return f"{text}\n".encode()


def to_npz(arrays: Mapping[str, Any]) -> bytes:
    """Encode arrays by name as an `.npz` file."""
    # numpy is imported late, since the command line often needs none.
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def csv_cell(value: Any) -> Any:
    """Return a cell of a CSV, with an apostrophe before a text that a spreadsheet would run.

    Names of files, classes and runs may come from somebody else.
    """
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    with contextlib.suppress(ValueError):
        float(value)
        return value
    return f"'{value}"


def full_disk(path: str | Path | None) -> tuple[str, str]:
    """Return what a disk lacks on which nothing more can be written, and what to do about it.

    Args:
        path: What was to be written, which need not exist; None if it is not known.
    """
    where = "on the disk" if path is None else f"for {path}"
    with contextlib.suppress(OSError, AttributeError):
        found = os.statvfs(free_space(path or ".")[0])
        # Some file systems count no files.
        if found.f_files and found.f_favail < _FEW and found.f_bavail * found.f_frsize > 2**20:
            return f"no room for more files is left {where}", "remove some"
    return f"no space is left {where}", "free some"


_FEW = 64
"""A disk with fewer inodes and some space is one that has no room for more files."""


def size_text(count: int) -> str:
    """Return a number of bytes in MB or GB, such as `3.2 MB`."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


@contextlib.contextmanager
def prepared_file(path: Path, data: bytes | memoryview) -> Iterator[Path]:
    """Yield a temporary file in the folder of `path` that holds the data, synced to disk.

    It is removed on exit unless it was renamed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with named(path), temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Name a file in the errors of its disk; those of a write name none."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync_folder(folder: Path) -> None:
    # Some systems cannot open a folder, and some file systems cannot sync one.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
