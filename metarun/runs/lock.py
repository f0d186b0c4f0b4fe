"""Lock that restricts a run folder to one process."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from metarun.core.files import open_inside, refuse_link

try:
    import fcntl
except ImportError:  # not available on Windows
    fcntl = None  # type: ignore[assignment]


class InUse(ValueError):  # noqa: N818 - names the state of the folder
    """The folder belongs to another run, or another process uses it."""


class Lock:
    """The lock of a run's folder.

    Attributes:
        path: Path of the folder.
    """

    path: Path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other processes; the lock of an ended process is taken over.

        Raises:
            InUse: Another process uses the folder.
        """
        path = self.path / "lock"
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

    def is_in_use(self) -> bool:
        """Return whether the process that locked the folder still runs.

        One on another machine counts as running. Nothing is locked to find out.
        """
        try:
            owner = (self.path / "lock").read_text(errors="replace").split()
        except OSError:
            return False
        if len(owner) != 2 or not owner[1].isdecimal() or owner[0] != socket.gethostname():
            return True
        return _alive(int(owner[1]))

    def _sweep(self) -> None:
        """Remove temporary files of a process that was killed while writing."""
        refuse_link(self.path / "checkpoints")
        for folder in (self.path, self.path / "checkpoints"):
            for temporary in folder.glob(".*.tmp"):
                temporary.unlink(missing_ok=True)


def locked_file(path: Path) -> IO[str]:
    """Open and lock the lock file.

    The kernel releases a lock when its process ends, so a lock that can be acquired is free or
    stale. On file systems without locks, the process named in the file is looked up instead.

    Raises:
        InUse: Another process holds the lock.
    """
    while True:
        file = open_inside(path, "a+")
        file.seek(0)
        owner = file.read().split()
        if not _held(file, owner):
            file.close()
            who = f"process {owner[1]} on {owner[0]}" if len(owner) == 2 else "another process"
            raise InUse(
                f"{path.parent} is in use by {who}: wait for it, or stop it, "
                f"or remove {path} if it has ended"
            )
        # The previous owner may have removed the file after we opened and before we locked it.
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()


def _held(file: IO[str], owner: list[str]) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
    return len(owner) != 2 or (owner[0] == socket.gethostname() and not _alive(int(owner[1])))


def _alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
