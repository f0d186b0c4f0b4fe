"""One process at a time in a run folder."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # a system without it
    fcntl = None  # type: ignore[assignment]


class InUse(ValueError):  # noqa: N818 - a state of the folder's
    """The folder is another run's, or another process is at work in it."""


def locked_file(path: Path) -> IO[str]:
    """Open the lock file and hold it.

    The kernel drops a lock with its process, so a lock that can be had is free or stale; where
    the file system has none, the process written in the file is looked for.
    """
    while True:
        file = path.open("a+", encoding="utf-8")
        file.seek(0)
        owner = file.read().split()
        if not _held(file, owner):
            file.close()
            who = f"process {owner[1]} on {owner[0]}" if len(owner) == 2 else "another process"
            raise InUse(
                f"{path.parent} is in use by {who}: wait for it, or stop it, "
                f"or remove {path} if it is gone"
            )
        # The process before may have removed the file between our opening and locking it.
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
    if os.name != "posix":  # where signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
