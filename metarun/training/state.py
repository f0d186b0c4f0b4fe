"""Parameters from checkpoints, and the disk space that checkpoints need."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metarun.algorithms.base import Algorithm
from metarun.algorithms.capabilities import MatchesShapes
from metarun.core import distributed
from metarun.core.errors import RunError
from metarun.core.types import Record


def required_bytes(algorithm: Algorithm) -> int:
    """Return the disk space of a run: its checkpoints, the one being written, and its records."""
    values = [*algorithm.parameters(), *algorithm.buffers()]
    size = sum(value.numel() * value.element_size() for value in values)
    # Parameters with Adam's two moments, in best.pt and twice in each of three files.
    return 3 * size * 7 + 16 * 2**20


def load_parameters(
    algorithm: Algorithm, checkpoint: Record, run_info: Mapping[str, Any], path: Path
) -> None:
    """Load the state of a checkpoint into an algorithm.

    Raises:
        ValueError: The checkpoint is of another algorithm or has other shapes; nothing has
            changed.
    """
    if checkpoint["algo"] != run_info.get("algo"):
        raise ValueError(
            f"{path} holds a checkpoint of algo={checkpoint['algo']}, "
            f"which algo={run_info.get('algo')} cannot read"
        )
    stored: Mapping[str, Any] = checkpoint["state"]
    if isinstance(algorithm, MatchesShapes):
        algorithm.match_shapes(stored)
    here = algorithm.state_dict()
    for name in sorted(stored.keys() ^ here.keys()):
        where = "the checkpoint" if name in stored else "this algorithm"
        raise ValueError(_misfit(path, f"only {where} has {name}"))
    for name, value in here.items():
        if isinstance(value, Tensor) and value.shape != stored[name].shape:
            sizes = f"{tuple(stored[name].shape)} there and {tuple(value.shape)} here"
            raise ValueError(_misfit(path, f"{name} is {sizes}"))
    try:
        algorithm.load_state_dict(stored)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(_misfit(path, str(error).splitlines()[0])) from error


def _misfit(path: Path, what: str) -> str:
    return (
        f"{path}: its checkpoint does not fit, {what}: "
        "way, backbone and the options of algo have to equal those of the run"
    )


def check_same_parameters(algorithm: Algorithm, step: int, run_info: Mapping[str, Any]) -> None:
    """Check that all processes have the same parameters.

    An algorithm that a user adds may let them differ.

    Raises:
        RunError: The parameters differ.
    """
    if distributed.size() == 1:
        return
    digest = hashlib.blake2b(digest_size=8)
    for leaf in pytree.tree_leaves(algorithm.state_dict()):
        if isinstance(leaf, Tensor):
            digest.update(
                leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            )
    if len(set(distributed.gather_objects(digest.hexdigest()))) > 1:
        text = (
            f"step {step}: the processes no longer have the same parameters: "
            f"algo={run_info.get('algo')} keeps state of its own tasks, or the machines "
            "differ: run it in one process"
        )
        raise distributed.mark_reported(RunError(text))
