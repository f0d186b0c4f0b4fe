"""Archives that may come from somebody else: `.npz` files and checkpoints, both of which are zips.

A few kilobytes can unpack to gigabytes, so sizes are checked before anything is unpacked.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metarun.core.files import size_text

MOST_TIMES = 20
"""Largest content of an archive, in multiples of its size on disk. Those of metarun are not
compressed: their content is smaller than the file."""


def check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Check the size of what an archive holds, without unpacking it.

    Raises:
        ValueError: It is more than `MOST_TIMES` times the size of the file.
    """
    held = sum(entry.file_size for entry in archive.infolist())
    if held > MOST_TIMES * path.stat().st_size:
        raise ValueError(
            f"{path} would unpack to {size_text(held)}, more than {MOST_TIMES} times its size: "
            "it is no file of metarun"
        )


def read_arrays(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Any]:
    """Read the arrays of an `.npz` file whose names are wanted; by default all of them.

    Raises:
        ValueError: The file is damaged, or its content is larger than `MOST_TIMES` allows.
    """
    import numpy as np

    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(path, archive)
            for entry in archive.infolist():
                _check_header(path, archive, entry)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if wanted(name)}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged") from error


def _check_header(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Check that an array has numbers, and as many bytes as its header says: numpy reserves them.

    Raises:
        ValueError: It is not so.
    """
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        with archive.open(entry) as file:
            shape, _, dtype = readers[npy.read_magic(file)](file)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {entry.filename} is no array") from error
    if dtype.hasobject:
        raise ValueError(
            f"{path}: array {entry.filename.removesuffix('.npy')} holds Python objects, which are "
            "never unpickled: expected numbers or text"
        )
    if math.prod(shape) * dtype.itemsize > entry.file_size:
        raise ValueError(f"{path} is damaged: {entry.filename} is not as its header says")
