"""Checkpoints as bytes: written by torch, read without running anything in them."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

from metarun.core.types import Record

FORMAT = 1
"""Of checkpoints; raised when an older program could not read a newer one."""


def read_checkpoint(path: Path) -> Record:
    """Load a checkpoint onto the CPU, without running anything that it may contain.

    Raises:
        ValueError: It is damaged, or of a newer format.
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
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of metarun")
    if checkpoint["format"] > FORMAT:
        raise ValueError(f"{path} was written by a newer metarun: update this one")
    return checkpoint


def serialized(checkpoint: Record) -> memoryview:
    import torch

    # In memory first: torch reports a full disk as an internal error of its own writer.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    return buffer.getbuffer()
