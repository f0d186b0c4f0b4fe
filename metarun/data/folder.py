"""Data set of a user's own images, with one folder per class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from metarun.core.checks import at_least
from metarun.core.once import warn_once
from metarun.core.types import SPLITS, SourceSetup, Split
from metarun.core.words import first_of
from metarun.data.image_files import Classes, ImageFiles
from metarun.data.splits import (
    WORDS,
    check_disjoint,
    check_fractions,
    hashed_order,
    hashed_split,
)
from metarun.data.storage import registry
from metarun.data.storage.image_files import suffixes

_REACHED = (
    "(on CIFAR-100, 5-way 1-shot, algo=protonet reached 36 % with 11 training classes of 60 "
    "images, and 43 % with 55)"
)
"""What to expect of small photographs: measured with the recipe, see conf/recipe/README.md."""

_NAMED = 5
"""Most classes and suffixes that a warning names."""


class Folder(ImageFiles):
    """Images in a folder of class folders.

    `root` holds either `train`, `val` and `test` folders of class folders, or the class folders
    themselves, which are then split by a hash of their names. Without `val`, its classes are cut
    from those of `train` by the same hash.

    Args:
        setup: See `ClassEpisodes`.
        root: Folder of the images.
        min_per_class: Smallest number of images of a class, below which it is left out; None
            keeps all classes.
        val_fraction, test_fraction: Share of the classes for val and for test, if there are no
            such folders.
        classes: `split` has different classes in each split. `all` has all classes in each, for a
            meta-test on the whole folder.
        **options: Other arguments of `ImageFiles`.
    """

    def __init__(
        self,
        setup: SourceSetup,
        *,
        root: str | None = None,
        min_per_class: int | None = None,
        val_fraction: float = 0.2,
        test_fraction: float = 0.25,
        classes: Literal["split", "all"] = "split",
        **options: Any,
    ) -> None:
        absent = registry.missing("folder", root)
        if absent is not None:
            raise ValueError(absent)
        self.selection: dict[str, Any] = {
            "min_per_class": min_per_class,
            "val_fraction": val_fraction,
            "test_fraction": test_fraction,
        }
        if classes == "all":
            self.selection["classes"] = classes
        super().__init__(setup, root=root, **options)
        self.notes_for_user = (self._summary(str(root)),)

    def _summary(self, root: str) -> str:
        """Return what there is, and what others of that size have reached, in one line."""
        tables, size = self._tables, self.sizes["test"]
        parts = [tables[split] for split in SPLITS]
        numbers = "/".join(str(len(part.counts)) for part in parts)
        how = f"{numbers} train/val/test"
        if parts[0] is parts[1]:
            parts, how = parts[:1], "all of them in each split"
        images = sum(sum(part.counts) for part in parts)
        classes = sum(len(part.counts) for part in parts)
        side = self.spec.input_shape[-1]
        return (
            f"{root}: {images:,} images of {classes} classes ({how}), "
            f"taken as {side} x {side} pixels; "
            f"chance is {100 / size.way:.0f} % {_REACHED}"
        )

    def list_images(self, root: Path) -> dict[Split, Classes]:
        """Return the files of the class folders."""
        return list_folder(root, **self.selection)


def list_folder(
    root: Path,
    *,
    min_per_class: int | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.25,
    classes: Literal["split", "all"] = "split",
) -> dict[Split, Classes]:
    """Find the classes of each split without reading an image.

    Args:
        root: Folder of the images.
        min_per_class: See `Folder`.
        val_fraction, test_fraction: See `Folder`.
        classes: See `Folder`. `all` gives all of them as `train`, and no other split.

    Raises:
        ValueError: The folder has another layout.
    """
    at_least("data", 1, min_per_class=min_per_class)
    check_fractions(val_fraction, test_fraction)
    folders = _split_folders(root)
    _tell_other_files(root, folders.values() or [root])
    if folders:
        found = {s: _classes(f, min_per_class) for s, f in folders.items()}
        alone = "put all classes into one folder for an automatic split"
        check_disjoint(found, f"data.root={root}", alone)
        if classes == "all":
            return {"train": dict(sorted(item for own in found.values() for item in own.items()))}
        return found if "val" in found else _with_val(found, root, val_fraction)
    everyone = _classes(root, min_per_class)
    if classes == "all":
        return {"train": everyone}
    chosen = hashed_split(everyone, f"data.root={root}", val_fraction, test_fraction)
    return {split: _only(everyone, names) for split, names in chosen.items()}


def _split_folders(base: Path) -> dict[Split, Path]:
    found: dict[Split, Path] = {}
    for split, words in WORDS.items():
        for word in words:
            if (base / word).is_dir():
                found[split] = base / word
                break
    if "train" not in found or len(found) == 1:
        return {}
    if "test" not in found:
        raise ValueError(
            f"data.root={base} has {' and '.join(f'{p.name}/' for p in found.values())} but no "
            "test/: add it, or put all classes into one folder for an automatic split"
        )
    return found


def _classes(folder: Path, min_per_class: int | None) -> Classes:
    found: Classes = {}
    small: list[str] = []
    for child in _class_folders(folder):
        files = sorted(file for file in child.iterdir() if _is_image(file))
        if min_per_class is None and not files:
            inside = ", ".join(folder.name for folder in _class_folders(child)[:_NAMED])
            but = f" but the folders {inside}" if inside else ""
            raise ValueError(
                f"{child} has no images{but}: put some in, or set data.min_per_class=1 to leave "
                "out such folders"
            )
        if len(files) >= (min_per_class or 1):
            found[child.name] = files
        else:
            small.append(child.name)
    if not found:
        least = "" if min_per_class is None else f" with {min_per_class} images or more"
        raise ValueError(
            f"{folder} has no class folders{least}: one folder for each class is expected"
        )
    if small:
        classes = f"{len(small)} of {len(small) + len(found)} classes"
        warn_once(
            f"{folder}: data.min_per_class={min_per_class} leaves out {classes}: "
            f"{first_of(small, _NAMED)}"
        )
    return found


def _class_folders(folder: Path) -> list[Path]:
    return sorted(
        child
        for child in folder.iterdir()
        if child.is_dir() and not child.name.startswith((".", "__"))
    )


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in suffixes() and not file.name.startswith(".")


def _tell_other_files(root: Path, folders: Iterable[Path]) -> None:
    """Warn of what class folders have besides images: folders by name, files by their number."""
    others = [
        file
        for folder in folders
        for child in _class_folders(folder)
        for file in sorted(child.iterdir())
        if not file.name.startswith(".") and not _is_image(file)
    ]
    inside = [file.relative_to(root).as_posix() for file in others if file.is_dir()]
    if inside:
        warn_once(f"{root}: folders in class folders are not read: {first_of(inside, _NAMED)}")
    kinds = Counter(f.suffix.lower() or "no suffix" for f in others if not f.is_dir())
    if kinds:
        total = sum(kinds.values())
        ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
        listed = first_of([f"{kind}: {count}" for kind, count in ordered], _NAMED)
        what = f"{total} {'entry' if total == 1 else 'entries'}"
        warn_once(f"{root}: {what} of class folders left out, not images ({listed})")


def _with_val(
    splits: dict[Split, Classes], base: Path, val_fraction: float
) -> dict[Split, Classes]:
    """Cut the classes of val from those of train, by a hash of their names."""
    classes = splits["train"]
    num_val = max(2, round(val_fraction * len(classes)))
    if len(classes) < num_val + 2:
        raise ValueError(
            f"data.root={base} has no val/, and {len(classes)} classes in train/: 4 or more are "
            "needed to take some for validation"
        )
    order = hashed_order(classes)
    warn_once(
        f"{base} has no val/: {num_val} of the {len(classes)} classes of train/ are taken for "
        f"validation ({first_of(sorted(order[:num_val]), _NAMED)})"
    )
    return {
        "train": _only(classes, order[num_val:]),
        "val": _only(classes, order[:num_val]),
        "test": splits["test"],
    }


def _only(classes: Classes, names: Iterable[str]) -> Classes:
    return {name: classes[name] for name in sorted(names)}
