"""The pictures of a user's folder as they were prepared, kept for the next runs.

Decoding some ten thousand photographs takes minutes, each time that a run starts and in each
process of it. Beside the data sets, in `prepared`, stands what came of it, mapped from the disk so
that processes share it. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL

from metarun.core.types import SPLITS, Split
from metarun.data.storage import registry
from metarun.data.storage.cache import Pixels, build_store, open_store

KEPT_FROM = 2000
"""Images from which on they are kept, and decoded with a bar: fewer take a second or two."""

_VERSION = 1
"""Of how pictures are prepared: what another one made is made again."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a folder's pictures came to.

    Attributes:
        images: (N, C, H, W) of each split.
        digests: A hash of each.
        mean, std: Of each channel of the train split, in [0, 1] units.
    """

    images: Mapping[Split, Pixels]
    digests: Mapping[Split, str]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def prepared(
    files: Mapping[Split, list[Path]],
    base: Path,
    how: Mapping[str, Any],
    prepare: Callable[[], Prepared],
) -> Prepared:
    """The prepared pictures, from an earlier run if nothing has changed since.

    Args:
        files: The pictures of each split in order.
        base: The user's folder.
        how: What else the pixels depend on.
        prepare: Makes them.
    """
    if sum(map(len, files.values())) < KEPT_FROM:
        return prepare()
    try:
        own = repr((str(base.resolve()), sorted(how.items()), PIL.__version__))
        name = f"{base.resolve().name}-{hashlib.sha256(own.encode()).hexdigest()[:12]}"
        place = registry.default_root() / "prepared" / name
        listing = _listing(files, base)
    # A picture that is gone, whose name `prepare` says; or a user without a home.
    except (OSError, RuntimeError):
        return prepare()
    kept = _kept(place, listing)
    if kept is not None:
        return kept
    made = prepare()
    try:
        _keep(made, place, listing)
    # A full or a read-only disk, or another process that was faster.
    except (OSError, ValueError) as error:
        _LOG.info("the prepared pictures are not kept: %s", error)
    return _kept(place, listing) or made


def _listing(files: Mapping[Split, list[Path]], base: Path) -> str:
    """A hash of which pictures there are, and of when they were written."""
    digest = hashlib.sha256(repr(_VERSION).encode())
    for split in SPLITS:
        for file in files[split]:
            stat = file.stat()
            line = (split, str(file.relative_to(base)), stat.st_size, stat.st_mtime_ns)
            digest.update(repr(line).encode())
    return digest.hexdigest()


def _kept(place: Path, listing: str) -> Prepared | None:
    """What is there, if it is whole and of these pictures."""
    try:
        store = open_store(place)
        if store is None or store.facts["listing"] != listing:
            return None
        return Prepared(
            images={split: store.array(split) for split in SPLITS},
            digests=store.facts["digests"],
            mean=tuple(store.facts["mean"]),
            std=tuple(store.facts["std"]),
        )
    # Damaged, or deleted just now.
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(made: Prepared, place: Path, listing: str) -> None:
    if _kept(place, listing) is not None:
        return
    # What is there is of other pictures, or damaged. Who has it mapped keeps it.
    shutil.rmtree(place, ignore_errors=True)
    with build_store(place) as writer:
        for split in SPLITS:
            with writer.array(split, made.images[split].shape) as out:
                out[:] = made.images[split]
        writer.facts |= {
            "listing": listing,
            "digests": dict(made.digests),
            "mean": list(made.mean),
            "std": list(made.std),
        }
