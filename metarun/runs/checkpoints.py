"""Reading and writing of checkpoints with torch, without executing code from a file."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

from metarun.core.types import Record
from metarun.runs.formats import FORMAT, check_format


def read_checkpoint(path: Path) -> Record:
    """Load a checkpoint onto the CPU without executing any code in it.

    Raises:
        ValueError: The file is damaged, or has another format.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
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
