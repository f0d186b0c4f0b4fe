"""Files of weights that may come from somebody else, and which of their tensors fit a network.

A file of safetensors holds numbers alone. One of torch is read with `weights_only=True`, which
builds tensors and plain containers and runs nothing. Torch is imported late.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarun.core.archives import check_archive
from metarun.core.errors import one_line
from metarun.core.words import first_of, number_of

if TYPE_CHECKING:
    from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
"""Endings of the names of files of weights; all but the first are torch's."""

_NESTED = ("state_dict", "model_state_dict", "model", "state", "params", "teacher", "student")
"""Entries below which a checkpoint keeps its weights, the preferred first."""
_UNUSED = "num_batches_tracked"
"""What torch's batch norm counts, which ours need not have."""
_NAMED = 3


def read_weights(key: str, path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name, without executing anything of it.

    Args:
        key: What the user has typed, such as `init=FILE`, for messages.
        path: File of safetensors or of torch, by its name.

    Raises:
        ValueError: It does not exist, is of another format than its name says, is damaged, holds
            more than tensors and plain containers, or no tensors.
    """
    if not path.is_file():
        raise ValueError(f"{key}: there is no such file")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{key}: expected a file *{' or *'.join(SUFFIXES)}")
    named = "safetensors" if path.suffix.lower() == SUFFIXES[0] else "torch"
    found = _format_of(path)
    if found != named:
        what = "neither safetensors nor torch" if found is None else f"one of {found}"
        raise ValueError(f"{key}: by its name it is a file of {named}, but its content is {what}")
    weights = _of_safetensors(key, path) if named == "safetensors" else _of_torch(key, path)
    if not weights:
        raise ValueError(f"{key}: it holds no tensors by name")
    return weights


def hash_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _format_of(path: Path) -> str | None:
    """Return the format of a file by its content."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "torch"
    if len(start) == 9 and start[8:] == b"{":
        (length,) = struct.unpack("<Q", start[:8])
        return "safetensors" if length < path.stat().st_size else None
    return None


def _of_safetensors(key: str, path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(
            f"{key} needs a package: type pip install 'metarun[safetensors]'"
        ) from None
    try:
        loaded: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{key} is damaged: {one_line(error)}") from error
    return loaded


def _of_torch(key: str, path: Path) -> dict[str, Tensor]:
    import torch

    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_archive(path, archive)
        with warnings.catch_warnings():
            # Torch warns of pickles of another protocol, and then refuses them or not.
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{key}: it is damaged or holds more than tensors and plain values, which is not "
            "read: save the model's state_dict() alone"
        ) from error
    except (RuntimeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{key} is damaged") from error
    return _tensors_in(loaded)


def _tensors_in(loaded: Any) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, which may be below a name such as `state_dict`."""
    import torch

    if not isinstance(loaded, dict):
        return {}
    own = {str(name): v for name, v in loaded.items() if isinstance(v, torch.Tensor)}
    if own:
        return own
    below = [loaded[name] for name in _NESTED if name in loaded]
    found = (_tensors_in(node) for node in [*below, *loaded.values()])
    return next((tensors for tensors in found if tensors), {})


@dataclass(frozen=True)
class Match:
    """Which tensors of a file are those of a network.

    Attributes:
        fits: Tensors by their names in the network.
        missing: Names of the network that the file lacks.
        misshapen: Names with both shapes, where these differ.
        unknown: Names in the file that belong to parts that the network has, but not to it.
        left_out: All other names in the file, such as those of its classifier.
    """

    fits: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def complaints(self) -> str:
        """What keeps the file from being the network's, in words; empty if nothing does."""
        parts: list[str] = []
        if self.misshapen:
            parts.append(first_of(self.misshapen, _NAMED))
        if self.missing:
            names = first_of(self.missing, _NAMED)
            parts.append(f"it lacks {number_of(len(self.missing), 'tensor')} ({names})")
        if self.unknown:
            names = first_of(self.unknown, _NAMED)
            parts.append(f"the network lacks {number_of(len(self.unknown), 'tensor')} ({names})")
        return "; ".join(parts)


def match(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Match:
    """Find the tensors of a network among those of a file.

    Either side may have all names below a prefix, such as `module.`, `backbone.` or `encoder.`:
    those prefixes are taken with which the most names agree.

    Args:
        weights: Tensors of the file.
        own: Tensors of the network.
    """
    there, here = _prefixes(weights, own)
    mine = {name.removeprefix(here): tensor for name, tensor in own.items()}
    theirs = {name.removeprefix(there): name for name in weights if name.startswith(there)}
    found = Match(left_out=[name for name in weights if not name.startswith(there)])
    parts = {name.partition(".")[0] for name in mine}
    for name, tensor in mine.items():
        if name not in theirs:
            if not name.endswith(_UNUSED):
                found.missing.append(f"{here}{name}")
        elif weights[theirs[name]].shape != tensor.shape:
            sizes = f"{tuple(weights[theirs[name]].shape)} there and {tuple(tensor.shape)} here"
            found.misshapen.append(f"{here}{name} is {sizes}")
        else:
            found.fits[f"{here}{name}"] = weights[theirs[name]]
    for name, full in theirs.items():
        if name not in mine and not name.endswith(_UNUSED):
            (found.unknown if name.partition(".")[0] in parts else found.left_out).append(full)
    return found


def _prefixes(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return the prefixes of the names of a file and of a network with the most names in common."""
    counts: Counter[tuple[str, str]] = Counter()
    for here in _common_prefixes(list(own)):
        mine = {name.removeprefix(here) for name in own}
        for name in weights:
            fit = (there for there in _prefixes_of(name) if name[len(there) :] in mine)
            counts.update((there, here) for there in fit)
    # Of equals those with the shortest names here, then the first in the file.
    return max(counts, key=lambda p: (counts[p], len(p[1]), -len(p[0])), default=("", ""))


def _prefixes_of(name: str) -> Iterator[str]:
    yield ""
    for position, letter in enumerate(name):
        if letter == ".":
            yield name[: position + 1]


def _common_prefixes(names: Sequence[str]) -> list[str]:
    """Return the prefixes that all names have."""
    if not names:
        return [""]
    shared = (p for p in _prefixes_of(names[0]) if all(name.startswith(p) for name in names))
    return list(shared)


def load_into(
    module: nn.Module, weights: Mapping[str, Tensor], key: str, *, strict: bool, hint: str = ""
) -> Match:
    """Load the tensors of a file that are a module's into it, and return the match.

    Args:
        module: The network, or its encoder.
        weights: Tensors of the file.
        key: What the user has typed, such as `init=FILE`, for messages.
        strict: Whether every tensor has to fit, but for those of parts that the module lacks.
        hint: What to type to be less strict, for the message.

    Raises:
        ValueError: No name matches, or the file does not fit; nothing has changed.
    """
    import torch

    own = module.state_dict()
    found = match(weights, own)
    if not found.fits and not found.misshapen:
        theirs, mine = first_of(list(weights), _NAMED), first_of(list(own), _NAMED)
        raise ValueError(f"{key}: none of its names ({theirs}) is one of the network's ({mine})")
    if found.complaints and (strict or not found.fits):
        raise ValueError(f"{key} does not fit the network: {found.complaints}{hint}")
    with torch.no_grad():
        for name, tensor in found.fits.items():
            own[name].copy_(tensor)
    return found
