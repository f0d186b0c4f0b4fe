"""`init=RUN` or `init=FILE`: networks whose encoder starts from weights that were learned before.

Torch is imported with the networks.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarun.core.types import Record
from metarun.core.weights import SUFFIXES, hash_of_file, load_into, read_weights
from metarun.runs.find import find_run
from metarun.runs.folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor, nn


def with_path_of_init(words: Sequence[str]) -> list[str]:
    """Return overrides in which `init=` has the path of a run instead of another name of it.

    `last` would be another run for the next run of a sweep. The path is quoted, since Hydra's
    grammar cannot parse every path.

    Raises:
        ValueError: There is no such run.
    """
    return [_with_path(word) if word.startswith("init=") else word for word in words]


def _with_path(word: str) -> str:
    init = word.removeprefix("init=")
    if init in ("", "null") or init[0] in "\"'":
        return word
    # A folder of a sweep may have a comma in its name.
    names = [init] if Path(init).exists() else init.split(",")
    return f"init={','.join(_quoted(_path(name)) for name in names)}"


def _path(name: str) -> str:
    if name == "null" or Path(name).exists() or Path(name).suffix.lower() in SUFFIXES:
        return name
    try:
        return str(find_run(name))
    except ValueError as error:
        raise ValueError(f"init={name}: expected a run or a file of weights: {error}") from error


def _quoted(path: str) -> str:
    escaped = path.replace('"', r"\"")
    return path if re.fullmatch(r"[\w/.+-]+", path) else f'"{escaped}"'


class Initialized:
    """Factory of networks as another one makes them, with the weights of a run or of a file.

    The weights are those of the encoder: the network without its head.

    Args:
        make: The other factory.
        init: A run, or a file of weights.
        strict: Whether all weights of the encoder have to fit.

    Attributes:
        record: Where the weights are from, and which of them were taken.

    Raises:
        ValueError: There are no weights, or they cannot be read.
    """

    def __init__(self, make: Callable[..., Any], init: str, *, strict: bool) -> None:
        self.func = getattr(make, "func", make)
        self.__signature__ = inspect.signature(make)
        self._make = make
        self._key = f"init={init}"
        self._strict = strict
        self._encoders: list[nn.Module] = []
        file, self._weights = _weights(self._key, init)
        self.record: Record = {"path": str(file), "sha256": hash_of_file(file)}

    def __call__(self, **given: Any) -> nn.Module:
        """Build a network and load the weights.

        Raises:
            ValueError: They do not fit.
        """
        from metarun.backbones.network import Network

        net: nn.Module = self._make(**given)
        encoder = net.body if isinstance(net, Network) else net
        self._load(encoder)
        self._encoders.append(encoder)
        return net

    def load_again(self) -> None:
        """Load the weights again, once the learner is built: some draw parameters of their own."""
        while self._encoders:
            self._load(self._encoders.pop())

    def _load(self, encoder: nn.Module) -> None:
        hint = ": type init_strict=false to take what fits"
        found = load_into(encoder, self._weights, self._key, strict=self._strict, hint=hint)
        self.record |= {
            "tensors": len(found.fits),
            "left_out": [*found.left_out, *found.unknown],
            "not_found": [*found.missing, *found.misshapen],
        }


def _weights(key: str, init: str) -> tuple[Path, dict[str, Tensor]]:
    """Return the file of a run or of weights, and the tensors in it."""
    path = Path(init).expanduser()
    if path.is_file() or path.suffix.lower() in SUFFIXES:
        return path, read_weights(key, path)
    try:
        run = RunFolder.open(init)
    except ValueError as error:
        raise ValueError(f"{key}: expected a run or a file of weights: {error}") from error
    learned = run.load_learned()
    if learned is None:
        raise ValueError(f"{key}: the run has no checkpoint yet: let it train first")
    which, checkpoint = learned
    file = run.path / "checkpoints" / f"{which}.pt"
    tensors = {n: v for n, v in checkpoint["state"].items() if hasattr(v, "shape")}
    # The best parameters are in last.pt, too.
    return file if file.exists() else file.with_name("last.pt"), tensors
