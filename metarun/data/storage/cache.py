"""Store of an imported data set: uint8 arrays and a description with their hashes.

A store is a folder with `meta.json` and `.npy` files. It is built in a temporary folder and moved
to its place in one step, so that it is either complete or absent. Torch is not imported.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metarun.core.files import named

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_FORMAT = 1
_META = "meta.json"


@dataclass(frozen=True, slots=True)
class Store:
    """A complete store on the disk.

    Attributes:
        folder: Folder of the store.
        facts: Description by the importer: source, classes, counts.
        files: Size in bytes and sha256 of each array, by name.
    """

    folder: Path
    facts: dict[str, Any]
    files: dict[str, tuple[int, str]]

    def array(self, name: str) -> Pixels:
        """Return an array as a memory map."""
        # Copy on write, because torch warns about read-only arrays.
        array: Pixels = np.load(self.folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
        return array

    def digest(self, name: str) -> str:
        """Return the sha256 of an array at the time when it was written."""
        return self.files[name][1]

    def verify(self) -> None:
        """Read every array and compare its hash.

        Raises:
            ValueError: An array has changed.
        """
        for name, (_, digest) in self.files.items():
            path = self.folder / f"{name}.npy"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise ValueError(
                        f"{path} was changed since it was imported: {_again(self.folder)}"
                    )


def open_store(folder: Path) -> Store | None:
    """Open the store in a folder; None if there is none.

    Raises:
        ValueError: The store is damaged or has another format.
    """
    meta = folder / _META
    if not meta.is_file():
        return None
    try:
        content = json.loads(meta.read_text(encoding="utf-8"))
        files = {str(k): (int(v[0]), str(v[1])) for k, v in content["files"].items()}
        store = Store(folder, dict(content["facts"]), files)
        version = content["format"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{meta} is damaged: {_again(folder)}") from None
    if version != _FORMAT:
        raise ValueError(f"{folder} was written by another version: {_again(folder)}")
    for name, (size, _) in files.items():
        path = folder / f"{name}.npy"
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise ValueError(f"{path} has {found} of its {size} bytes: {_again(folder)}")
    return store


class StoreWriter:
    """Writer of arrays to a temporary folder, which `build_store` moves to its place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, tuple[int, str]] = {}
        self.facts: dict[str, Any] = {}

    @contextmanager
    def array(self, name: str, shape: tuple[int, ...]) -> Iterator[Pixels]:
        """Create an array on the disk that the caller fills, in any order."""
        path = self._folder / f"{name}.npy"
        with path.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            size = file.tell() + math.prod(shape)
            # Allocate the blocks now: writing to a mapped file on a full disk kills the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        out = np.load(path, mmap_mode="r+", allow_pickle=False)
        yield out
        out.flush()
        del out
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._files[name] = (path.stat().st_size, digest)

    def close(self) -> None:
        """Write the description of the store."""
        content = {"format": _FORMAT, "facts": self.facts, "files": self._files}
        text = json.dumps(content, indent=1) + "\n"
        (self._folder / _META).write_text(text, encoding="utf-8")


@contextmanager
def build_store(folder: Path) -> Iterator[StoreWriter]:
    """Build a store; if the block raises, no partial store is left.

    Raises:
        ValueError: The folder exists already.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already: {_again(folder)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        # `mkdtemp` restricts access to the user; the store gets ordinary permissions.
        work.chmod(0o777 & ~_umask())
        writer = StoreWriter(work)
        with named(folder):
            yield writer
            writer.close()
            work.replace(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _again(folder: Path) -> str:
    return f"delete {folder} and run `metarun data {folder.name}` again"
