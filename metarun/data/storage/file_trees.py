"""Files of a data set in a folder, a zip or a tar archive, which are only read."""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError)


class FileTree(ABC):
    """Files by their relative paths, with slashes.

    Attributes:
        path: Folder or archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def names(self) -> list[str]:
        """Return the paths of all files, but for hidden ones."""

    @abstractmethod
    def open(self, wanted: Collection[str]) -> Iterator[tuple[str, IO[bytes]]]:
        """Yield the wanted files, open, in an order that is fast to read."""


class _Folder(FileTree):
    def names(self) -> list[str]:
        paths = (path for path in self.path.rglob("*") if path.is_file())
        return _shown(path.relative_to(self.path).as_posix() for path in paths)

    def open(self, wanted: Collection[str]) -> Iterator[tuple[str, IO[bytes]]]:
        for name in wanted:
            with (self.path / name).open("rb") as file:
                yield name, file


class _Zip(FileTree):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._zip = zipfile.ZipFile(path)

    def names(self) -> list[str]:
        return _shown(entry.filename for entry in self._zip.infolist() if not entry.is_dir())

    def open(self, wanted: Collection[str]) -> Iterator[tuple[str, IO[bytes]]]:
        for name in wanted:
            with self._zip.open(name) as file:
                yield name, file


class _Tar(FileTree):
    def names(self) -> list[str]:
        with tarfile.open(self.path) as archive:
            return _shown(member.name for member in archive if member.isfile())

    def open(self, wanted: Collection[str]) -> Iterator[tuple[str, IO[bytes]]]:
        # A compressed archive can only be read from its beginning.
        kept = set(wanted)
        with tarfile.open(self.path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name in kept else None
                if file is not None:
                    with file:
                        yield member.name, file


def _shown(names: Iterator[str]) -> list[str]:
    hidden = (".", "__MACOSX")
    return sorted(name for name in names if not any(p.startswith(hidden) for p in name.split("/")))


def open_tree(path: Path) -> FileTree:
    """Open a folder or an archive, also one that is alone in its folder.

    Raises:
        ValueError: It does not exist, or is neither.
    """
    if path.is_dir():
        inside = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        if len(inside) == 1 and inside[0].suffix in (".zip", ".tar", ".gz", ".tgz"):
            return open_tree(inside[0])
        return _Folder(path)
    if not path.exists():
        raise ValueError(f"--from {path}: there is no such file or folder")
    try:
        if zipfile.is_zipfile(path):
            return _Zip(path)
        if tarfile.is_tarfile(path):
            return _Tar(path)
    except _DAMAGED as error:
        raise damaged(path, error) from error
    raise ValueError(f"--from {path} is neither a folder nor a complete zip or tar file")


def damaged(path: Path, error: Exception) -> ValueError:
    """Return the error for an archive that cannot be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{path} is damaged ({reason}): get it again")
