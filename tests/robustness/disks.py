"""Small disks: tmpfs mounts in a mount namespace of this process alone, so that root sees none.

`unshare` makes the namespace, for root or where the system lets ordinary users have one.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

_MARK = "METARUN_TESTS_MAY_MOUNT"
PAGE = 4096
"""Bytes of a page: a tmpfs gives space in whole ones."""


def _unshared(*words: str) -> list[str]:
    return ["unshare", "-m" if os.geteuid() == 0 else "-rm", *words]


@functools.cache
def can_mount() -> bool:
    """Whether this user may mount disks in a namespace of its own."""
    try:
        words = _unshared("mount", "-t", "tmpfs", "tmpfs", "/tmp")
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def enter() -> None:
    """Start this program again in a mount namespace of its own.

    Raises:
        SystemExit: The system does not allow it.
    """
    if os.environ.get(_MARK):
        return
    if not can_mount():
        sys.exit("this user may mount no disks here (`unshare -rm` fails): run it as root on Linux")
    words = _unshared(sys.executable, *sys.orig_argv[1:])
    os.execvpe(words[0], words, os.environ | {_MARK: "1"})


class Disk:
    """A disk in memory at a path, which is mounted as long as a `with` block.

    Attributes:
        path: Where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Disk:
        self.path.mkdir(parents=True, exist_ok=True)
        _mount("-t", "tmpfs", "-o", "size=1g", "tmpfs", str(self.path))
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True)

    def used(self) -> tuple[int, int]:
        """Return the bytes and the inodes in use."""
        found = os.statvfs(self.path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree

    def leave(self, *, num_bytes: int | None = None, num_inodes: int | None = None) -> None:
        """Let so many bytes or inodes more be used."""
        used = self.used()
        # A size of 0 would mean that there is no limit.
        pages = 2**18 if num_bytes is None else max(1, (used[0] + num_bytes) // PAGE)
        inodes = 10**5 if num_inodes is None else used[1] + num_inodes
        options = f"remount,size={pages * PAGE},nr_inodes={inodes}"
        _mount("-o", options, str(self.path))

    def free(self) -> None:
        """Remove the limits."""
        self.leave()


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)
