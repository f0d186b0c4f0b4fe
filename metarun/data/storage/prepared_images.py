"""Cache of the decoded images of a user's folder.

Decoding ten thousand photographs takes minutes, at every start and in every process of a run. The
folder `prepared` next to the data sets keeps the decoded images. They are memory-mapped, so that
processes share them. The cache may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL

from metarun.core.types import SPLITS, Split
from metarun.data.storage import registry
from metarun.data.storage.cache import Pixels, build_store, open_store

KEPT_FROM = 2000
"""Smallest number of images that are cached and decoded with a progress bar. Fewer images take a
second or two."""

_VERSION = 1
"""Version of the preparation of images; a cache of another version is rebuilt."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Decoded images of a folder.

    Attributes:
        images: (N, C, H, W) images of each split.
        digests: Hash of the images of each split.
        mean, std: Mean and standard deviation of each channel of the train split, in [0, 1]
            units.
        unreadable: Rows of the files of each split that are left out of `images`.
    """

    images: Mapping[Split, Pixels]
    digests: Mapping[Split, str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unreadable: Mapping[Split, tuple[int, ...]] = field(default_factory=dict)


def prepared(
    files: Mapping[Split, list[Path]],
    base: Path,
    how: Mapping[str, Any],
    prepare: Callable[[], Prepared],
) -> Prepared:
    """Return decoded images, from the cache if no file has changed since it was written.

    Args:
        files: Files of each split, in order.
        base: Folder of the user.
        how: Options on which the images depend.
        prepare: Function that decodes the images.
    """
    if sum(map(len, files.values())) < KEPT_FROM:
        return prepare()
    try:
        own = repr((str(base.resolve()), sorted(how.items()), PIL.__version__))
        name = f"{base.resolve().name}-{hashlib.sha256(own.encode()).hexdigest()[:12]}"
        place = registry.default_root() / "prepared" / name
        listing = _listing(files, base)
    # A missing image, which `prepare` reports by name; or a user without a home folder.
    except (OSError, RuntimeError):
        return prepare()
    kept = _kept(place, listing)
    if kept is not None:
        return kept
    made = prepare()
    try:
        _keep(made, place, listing)
    # A full or read-only disk, or another process that was faster.
    except (OSError, ValueError) as error:
        _LOG.info("the decoded images are not cached: %s", error)
    return _kept(place, listing) or made


def _listing(files: Mapping[Split, list[Path]], base: Path) -> str:
    """Return a hash of the names, sizes and modification times of the images."""
    digest = hashlib.sha256(repr(_VERSION).encode())
    for split in SPLITS:
        for file in files[split]:
            stat = file.stat()
            line = (split, str(file.relative_to(base)), stat.st_size, stat.st_mtime_ns)
            digest.update(repr(line).encode())
    return digest.hexdigest()


def _kept(place: Path, listing: str) -> Prepared | None:
    """Return the cached images, or None if the cache is missing, damaged or outdated."""
    try:
        store = open_store(place)
        if store is None or store.facts["listing"] != listing:
            return None
        return Prepared(
            images={split: store.array(split) for split in SPLITS},
            digests=store.facts["digests"],
            mean=tuple(store.facts["mean"]),
            std=tuple(store.facts["std"]),
            unreadable={s: tuple(rows) for s, rows in store.facts.get("unreadable", {}).items()},
        )
    # The cache is damaged, or was deleted just now.
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(made: Prepared, place: Path, listing: str) -> None:
    if _kept(place, listing) is not None:
        return
    # An outdated or damaged cache. Processes that have mapped it keep their data.
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
            "unreadable": {split: list(rows) for split, rows in made.unreadable.items()},
        }
