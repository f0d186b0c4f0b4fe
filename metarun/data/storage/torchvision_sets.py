"""Classification data sets of torchvision, as stores of all their images."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from metarun.core.errors import one_line
from metarun.data.storage.cache import Pixels, Store
from metarun.data.storage.image_files import photograph
from metarun.data.storage.image_sets import Images, store_images

_HALVES = ({"split": "train"}, {"split": "test"})
_THIRDS = ({"split": "train"}, {"split": "val"}, {"split": "test"})
_BOTH = ({"train": True}, {"train": False})
_TESTS = (_HALVES[1], _BOTH[1])

PARTS: dict[str, Sequence[dict[str, Any]]] = {
    "Caltech101": ({},),
    "Caltech256": ({},),
    "CIFAR10": _BOTH,
    "Country211": ({"split": "train"}, {"split": "valid"}, {"split": "test"}),
    "DTD": _THIRDS,
    "EuroSAT": ({},),
    "FGVCAircraft": ({"split": "trainval"}, {"split": "test"}),
    "Flowers102": _THIRDS,
    "Food101": _HALVES,
    "GTSRB": _HALVES,
    "Imagenette": ({"split": "train"}, {"split": "val"}),
    "OxfordIIITPet": ({"split": "trainval"}, {"split": "test"}),
    "STL10": _HALVES,
    "SUN397": ({},),
    "SVHN": _HALVES,
}
"""Arguments of each part of a data set; its classes are the same in all parts."""

PUBLISHED: dict[str, Literal["aircraft", "dtd", "flowers"]] = {
    "FGVCAircraft": "aircraft",
    "DTD": "dtd",
    "Flowers102": "flowers",
}
"""Splits of the classes that Meta-Dataset (Triantafillou et al. 2020) has for them."""

_SIDES = {"CIFAR10": 32, "EuroSAT": 64, "SVHN": 32}
_SIDE = 84
_FROM_ONE = ("Flowers102",)
"""Data sets whose classes the published split numbers, from 1."""


def store_name(name: str) -> str:
    """Return the name of the store of a data set.

    Raises:
        ValueError: torchvision has no such data set, or it is not one of classification.
    """
    if name not in PARTS:
        lower = {known.lower(): known for known in PARTS}
        near = difflib.get_close_matches(name.lower(), lower, n=1)
        others = f"did you mean {lower[near[0]]}?" if near else f"choose from {', '.join(PARTS)}"
        raise ValueError(f"data.name={name}: {others}")
    return f"torchvision_{name.lower()}"


def fetch_torchvision(name: str, source: Path | None, root: Path) -> Store:
    """Download a data set by torchvision, or read its files, and build the store.

    Args:
        name: Name of the class in torchvision.datasets.
        source: Folder that torchvision has downloaded to, its `root`; None downloads.
        root: Folder of the data sets. A download stays in `torchvision` there.

    Raises:
        ValueError: The data set cannot be downloaded or read.
    """
    from torchvision import datasets

    store = store_name(name)
    place = source or root / "torchvision"
    if source is None:
        place.mkdir(parents=True, exist_ok=True)
    try:
        kind = getattr(datasets, name)
        parts = [kind(str(place), download=source is None, **how) for how in PARTS[name]]
    except (OSError, RuntimeError, ModuleNotFoundError) as error:
        what = "cannot be downloaded" if source is None else f"is not complete in {source}"
        raise ValueError(
            f"{name} {what} ({one_line(error)}): torchvision's own files are expected in "
            "--from PATH, which is the `root` of its class"
        ) from error
    images = _Parts(name, parts)
    return store_images(store, images, root, _SIDES.get(name, _SIDE), 3, str(place.absolute()))


class _Parts(Images):
    form = "torchvision"

    def __init__(self, name: str, parts: Sequence[Any]) -> None:
        self._parts = parts
        if len(parts) > 1 and PARTS[name][-1] in _TESTS:
            self.num_test = len(parts[-1])
        labels = [label for part in parts for label in _labels(part)]
        classes: Any = getattr(parts[0], "classes", getattr(parts[0], "categories", None))
        if name in _FROM_ONE or not _are_names(classes):
            classes = [f"{label + (name in _FROM_ONE):03d}" for label in range(max(labels) + 1)]
        self.names = [str(classes[label]) for label in labels]

    def read(self, side: int, channels: int) -> Iterator[tuple[int, Pixels]]:
        number = 0
        for part in self._parts:
            for place in range(len(part)):
                yield number, photograph(part[place][0], side, crop=True, grayscale=channels == 1)
                number += 1


def _are_names(classes: Any) -> bool:
    return isinstance(classes, list) and all(isinstance(name, str) for name in classes)


def _labels(part: Any) -> list[int]:
    """Return all labels, from an attribute that has them, or by reading every image."""
    for attribute in ("targets", "labels", "_labels", "y"):
        labels = getattr(part, attribute, None)
        if labels is not None and len(labels) == len(part):
            return [int(label) for label in labels]
    return [int(part[place][1]) for place in range(len(part))]
