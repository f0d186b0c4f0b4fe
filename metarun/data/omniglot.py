"""Omniglot (Lake et al. 2015): handwritten characters with 20 drawings of each.

`OmniglotSmall` is the part that ships with the package; `Omniglot` is the full data set.
Ink is 1 and paper is 0, as in the papers.
"""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from metarun.core.checks import within
from metarun.core.types import SourceSetup, Split
from metarun.data.augmentation import NO_AUGMENTATION, Augmentation
from metarun.data.episodes import (
    ClassEpisodes,
    Classes,
    ClassTable,
    Drawers,
    Episodes,
    EvalRotations,
    Rotations,
)
from metarun.data.storage import registry
from metarun.data.storage.cache import Pixels, open_store
from metarun.data.storage.image_files import DRAWING_SIZE, Drawing, Resize, drawing, open_image
from metarun.data.storage.omniglot_files import (
    FILES,
    NUM_DRAWINGS,
    ORIGINAL_SIDE,
    Character,
    characters,
    resized,
)

_SMALL_ARCHIVES = ("images_background_small1", "images_background_small2")
_SMALL_SPLITS: dict[Split, dict[str, str]] = {
    "train": dict.fromkeys(
        ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"), "images_background_small1"
    ),
    "val": {"Tagalog": "images_background_small2"},
    "test": dict.fromkeys(("Japanese_(katakana)", "Sanskrit"), "images_background_small2"),
}


class Characters(ClassEpisodes, ABC):
    """Drawings of characters. A subclass says which, in `tables`.

    Args:
        setup: See `ClassEpisodes`.
        resize: Method of resizing, see `image_files.drawing`.
        image_size: Side of the images in pixels; the original drawings have 105.
        rotations, rotations_eval, rotations_val, classes, episodes, drawers: See `ClassEpisodes`.
        augmentation: Changes of training images.
    """

    name: str
    """Name of the data set, for messages."""

    def __init__(
        self,
        setup: SourceSetup,
        *,
        resize: Resize = "paper",
        image_size: int = DRAWING_SIZE,
        rotations: Rotations = "none",
        rotations_eval: EvalRotations = "none",
        rotations_val: EvalRotations | None = None,
        classes: Classes = "split",
        episodes: Episodes | None = None,
        drawers: Drawers = "any",
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        within("data", f"[8, {ORIGINAL_SIDE}]", image_size=image_size)
        super().__init__(
            setup,
            name=self.name,
            tables=self.tables(resize, image_size),
            rotations=rotations,
            rotations_eval=rotations_eval,
            rotations_val=rotations_val,
            classes=classes,
            episodes=episodes,
            drawers=drawers,
            augmentation=augmentation.padded("zeros"),
            prepare=Drawing(resize, image_size),
        )

    @abstractmethod
    def tables(self, resize: Resize, side: int) -> dict[Split, ClassTable]:
        """Return the characters of each split, with images of side x side pixels."""


class OmniglotSmall(Characters):
    """Characters of the eight alphabets that ship with the package.

    Train: Balinese, Early Aramaic, Greek, Korean and Latin (136 characters); val: Tagalog (17);
    test: Japanese (katakana) and Sanskrit (89).
    """

    name = "omniglot_small"

    def tables(self, resize: Resize, side: int) -> dict[Split, ClassTable]:
        """Return the shipped characters."""
        return small_tables(resize, side)


class Omniglot(Characters):
    """All 1,623 characters, after `metarun data omniglot`.

    Args:
        setup: See `ClassEpisodes`.
        root: Folder of the data sets; None is `$METARUN_DATA`, or see `default_root`.
        split: `vinyals` is the split of Vinyals et al. (2016): 1028 train, 172 val and 423 test
            characters. `background` is that of Lake et al. (2015): the evaluation set (659) is
            the test split. Five whole alphabets of the background set, those of Vinyals's val
            split (172), are held out for val: Armenian, Bengali, Early Aramaic, Hebrew and
            Mkhedruli. That leaves 25 alphabets (792) for training.
        rotations: Rotations in training, see `ClassEpisodes`. The protocol of Vinyals and
            ProtoNet has `classes` in every split, that of MAML has `per_task` in every split.
        rotations_eval: The same at validation and test.
        **options: Other arguments of `Characters`.
    """

    name = "omniglot"

    def __init__(
        self,
        setup: SourceSetup,
        *,
        root: str | None = None,
        split: Literal["vinyals", "background"] = "vinyals",
        rotations: Rotations = "classes",
        rotations_eval: EvalRotations = "classes",
        **options: Any,
    ) -> None:
        self._place = root, split
        super().__init__(setup, rotations=rotations, rotations_eval=rotations_eval, **options)

    def tables(self, resize: Resize, side: int) -> dict[Split, ClassTable]:
        """Return the characters of the split that was asked for."""
        return full_tables(*self._place, resize, side)


def split_of(character: Character, split: Literal["vinyals", "background"]) -> Split:
    """Return the part of one of the two splits to which a character belongs."""
    if split == "vinyals":
        return character.vinyals
    if character.part == "images_evaluation":
        return "test"
    return "val" if character.vinyals == "val" else "train"


def full_tables(
    root: str | None, split: Literal["vinyals", "background"], resize: Resize, side: int
) -> dict[Split, ClassTable]:
    """Return the tables of all characters, with images of side x side pixels.

    Raises:
        ValueError: They are not stored.
    """
    absent = registry.missing("omniglot", root)
    store = open_store(registry.resolve_root(root) / "omniglot")
    if absent is not None or store is None:
        raise ValueError(absent)
    images = resized(store, resize, side).reshape(-1, NUM_DRAWINGS, side, side)
    members: dict[Split, list[int]] = {"train": [], "val": [], "test": []}
    everyone = characters()
    for position, character in enumerate(everyone):
        members[split_of(character, split)].append(position)
    return {
        part: _table((everyone[i].name, list(images[i])) for i in positions)
        for part, positions in members.items()
    }


@lru_cache(maxsize=2)
def small_tables(resize: Resize, side: int) -> dict[Split, ClassTable]:
    """Return the tables of the shipped characters, with images of side x side pixels."""
    archives = {name: _read_archive(name, resize, side) for name in _SMALL_ARCHIVES}
    return {
        split: _table(
            (name, drawings)
            for alphabet, archive in alphabets.items()
            for name, drawings in archives[archive].items()
            if name.startswith(f"{alphabet}/")
        )
        for split, alphabets in _SMALL_SPLITS.items()
    }


def _read_archive(archive: str, resize: Resize, side: int) -> dict[str, list[Pixels]]:
    """Return the drawings of each character `Alphabet/characterNN`, sorted by file name."""
    # Two alphabets are in both archives.
    wanted = {a for of in _SMALL_SPLITS.values() for a, place in of.items() if place == archive}
    found: dict[str, list[Pixels]] = {}
    with zipfile.ZipFile(FILES / f"{archive}.zip") as file:
        for name in sorted(name for name in file.namelist() if name.endswith(".png")):
            _, alphabet, character, _ = name.split("/")
            if alphabet not in wanted:
                continue
            pixels = drawing(open_image(file.read(name), name), resize, side)
            found.setdefault(f"{alphabet}/{character}", []).append(pixels)
    return found


def _table(classes: Iterable[tuple[str, list[Pixels]]]) -> ClassTable:
    """Return the table of a split from its characters, which are sorted by alphabet."""
    names, drawings = zip(*classes, strict=True)
    images = np.stack([pixels for character in drawings for pixels in character])
    return ClassTable(
        images=torch.from_numpy(images)[:, None],
        names=names,
        counts=tuple(len(character) for character in drawings),
        groups=tuple(name.split("/")[0] for name in names),
    )
