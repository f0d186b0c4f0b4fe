"""Errors of a full disk, in words."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from metarun.core.errors import describe_error
from metarun.core.files import write_atomically


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_the_file_and_what_to_do(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        # As of a write, which names no file.
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "report.html"
    with pytest.raises(OSError, match=r"report\.html") as caught:
        write_atomically(path, b"page")
    said = f"no space is left for {path}: free some and repeat the command"
    assert describe_error(caught.value) == said
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_space_but_no_room_for_files_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.json")
    space = {"f_blocks": 10**6, "f_bfree": 10**6, "f_bavail": 10**6, "f_frsize": 4096}
    disk = SimpleNamespace(f_files=1000, f_favail=0, **space)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    said = "no room for more files is left for a.json: remove some and repeat the command"
    assert describe_error(error) == said
    # Some file systems have no number of files.
    disk.f_files = 0
    assert describe_error(error).startswith("no space is left for a.json: free some")


def test_an_error_that_names_no_file_says_that_the_disk_is_full() -> None:
    said = "no space is left on the disk: free some and repeat the command"
    assert describe_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) == said
