"""Image data sets that are stored as a whole, and the published splits of their classes. No torch.

A store has the array `images`, sorted by class. Several data sets may use the same one: `cifar_fs`
and `fc100` split the classes of CIFAR-100. A source is recognized by its files.

Shapes: N images, C H W.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from metarun.core.errors import one_line
from metarun.core.types import SPLITS, Split
from metarun.data.storage.cache import Pixels, Store, build_store, open_store
from metarun.data.storage.download import download, need_space
from metarun.data.storage.file_trees import FileTree, damaged, open_tree
from metarun.data.storage.image_files import open_image, photograph, suffixes
from metarun.data.storage.pickles import read_pickle

FILES = Path(__file__).parents[1] / "files"
IMAGES = "images"
"""Name of the array of a store."""
TEST_COUNTS = "test_counts"
"""Name of the fact how many images of each class are of the published test half, the last ones."""
_SPARE = 100_000_000
_TOGETHER = 1024
"""Images that are decoded together, in threads."""


@dataclass(frozen=True, slots=True)
class ImageSet:
    """What is known of a data set.

    Attributes:
        side: Side of the stored images in pixels.
        channels: Number of channels.
        num_classes: Number of classes.
        forms: Layouts that are read besides folders and archives of class folders.
    """

    side: int
    channels: int
    num_classes: int
    forms: str = ""


SETS = {
    "cifar100": ImageSet(32, 3, 100, "cifar-100-python or its .tar.gz"),
    "cub": ImageSet(84, 3, 200),
    "tiered_imagenet": ImageSet(84, 3, 608, "*_images_png.pkl and *_labels.pkl"),
    "mnist": ImageSet(28, 1, 10, "idx files"),
    "fashion_mnist": ImageSet(28, 1, 10, "idx files"),
    "kmnist": ImageSet(28, 1, 10, "idx files"),
    "emnist": ImageSet(28, 1, 47, "the idx files of emnist-balanced"),
}
"""The data sets by the names of their stores."""


class Images(ABC):
    """The images of a source.

    Attributes:
        form: Layout, for the description of the store.
        names: Name of the class of each image.
        num_test: Number of images of the published test half, which are the last ones; 0 if the
            source does not say.
    """

    form: str
    names: Sequence[str]
    num_test: int = 0

    @abstractmethod
    def read(self, side: int, channels: int) -> Iterator[tuple[int, Pixels]]:
        """Yield each image's number and its pixels (C, side, side), in any order.

        Raises:
            ValueError: An image cannot be read; the message names it.
        """


class Arrays(Images):
    """Images (H, W) or (H, W, C) in memory."""

    def __init__(
        self, form: str, names: Sequence[str], images: Sequence[Pixels], num_test: int = 0
    ) -> None:
        self.form, self.names, self._images, self.num_test = form, names, images, num_test

    def read(self, side: int, channels: int) -> Iterator[tuple[int, Pixels]]:
        for number, pixels in enumerate(self._images):
            if pixels.shape[:2] == (side, side) and (pixels.ndim == 2) == (channels == 1):
                yield number, pixels.reshape(side, side, channels).transpose(2, 0, 1)
            else:
                yield number, _converted(Image.fromarray(pixels), side, channels)


class Files(Images):
    """Image files below one folder for each class; folders above these do not matter."""

    form = "class folders"

    def __init__(self, tree: FileTree, paths: Sequence[str]) -> None:
        self._tree, self._paths = tree, paths
        self.names = [PurePosixPath(path).parent.name for path in paths]

    def read(self, side: int, channels: int) -> Iterator[tuple[int, Pixels]]:
        numbers = {path: number for number, path in enumerate(self._paths)}
        opened = self._tree.open(self._paths)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            while some := [
                (path, file.read()) for path, file in itertools.islice(opened, _TOGETHER)
            ]:
                decode = partial(self._decoded, side=side, channels=channels)
                for (path, _), pixels in zip(some, pool.map(decode, some), strict=True):
                    yield numbers[path], pixels

    def _decoded(self, file: tuple[str, bytes], side: int, channels: int) -> Pixels:
        path, data = file
        return _converted(open_image(data, f"{self._tree.path}/{path}"), side, channels)


def _converted(image: Image.Image, side: int, channels: int) -> Pixels:
    return photograph(image, side, crop=True, grayscale=channels == 1)


def import_images(name: str, source: Path, root: Path) -> Store:
    """Build the store of a data set from files of the user.

    Args:
        name: Name of the store, one of `SETS`.
        source: Folder or archive with the files.
        root: Folder of the data sets.

    Raises:
        ValueError: The files are not recognized, damaged, or another data set. No partial store is
            left.
    """
    tree = open_tree(source)
    try:
        images = _recognized(name, tree)
        known = SETS[name]
        found = sorted(set(images.names))
        if len(found) != known.num_classes:
            raise ValueError(
                f"{source} has {len(found)} classes, {name} has {known.num_classes}: "
                f"expected its complete files, as {_forms(name)}"
            )
        return store_images(name, images, root, known.side, known.channels, str(source.absolute()))
    except (zlib.error, EOFError) as error:
        raise damaged(source, error) from error


_TORCHVISION = {
    "cifar100": "CIFAR100",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "emnist": "EMNIST",
}
"""Data sets that torchvision downloads."""
_CUB = (
    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
    "97eceeb196236b17998738112f37df78",
)


def fetch_images(name: str, root: Path) -> Store:
    """Download a data set and build its store.

    Args:
        name: Name of the store, one of `SETS`.
        root: Folder of the data sets.

    Raises:
        ValueError: It cannot be downloaded.
    """
    if name == "cub":
        url, md5 = _CUB
        source = download(url, root / "cub-download" / url.rpartition("/")[2], md5=md5)
    elif name in _TORCHVISION:
        source = _from_torchvision(name, root / f"{name}-download")
    else:
        raise ValueError(
            f"{name} cannot be downloaded: import files you have with --from PATH, as "
            f"{_forms(name)}"
        )
    store = import_images(name, source, root)
    shutil.rmtree(root / f"{name}-download")
    return store


def _from_torchvision(name: str, folder: Path) -> Path:
    from torchvision import datasets

    more = {"split": "balanced"} if name == "emnist" else {}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        getattr(datasets, _TORCHVISION[name])(str(folder), download=True, **more)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{name} cannot be downloaded ({one_line(error)}): try again later, or import files "
            f"you have with --from PATH, as {_forms(name)}"
        ) from error
    return folder


def store_images(
    name: str, images: Images, root: Path, side: int, channels: int, source: str
) -> Store:
    """Build a store of images, sorted by class; within a class they keep their order."""
    counts = Counter(images.names)
    names = sorted(counts)
    ends = np.cumsum([counts[name] for name in names])
    place = dict(zip(names, (ends - [counts[name] for name in names]).tolist(), strict=True))
    rows = []
    for one in images.names:
        rows.append(place[one])
        place[one] += 1
    need_space(root, len(rows) * channels * side * side + _SPARE)
    folder = root / name
    with build_store(folder) as writer:
        with writer.array(IMAGES, (len(rows), channels, side, side)) as out:
            read = images.read(side, channels)
            for number, pixels in tqdm(read, desc=name, total=len(rows), unit="image"):
                out[rows[number]] = pixels
            parts = np.split(out, ends[:-1])
            sums = [_sums(part) for part in parts]
        writer.facts = {
            "name": name,
            "source": source,
            "form": images.form,
            "classes": names,
            "counts": [counts[name] for name in names],
            TEST_COUNTS: _last_of_each(images, names),
            "sums": [total for total, _ in sums],
            "squares": [total for _, total in sums],
        }
    store = open_store(folder)
    assert store is not None
    return store


def _last_of_each(images: Images, names: Sequence[str]) -> list[int] | None:
    """Return the number of images of each class in the test half; None if it is unknown."""
    if not images.num_test:
        return None
    counts = Counter(images.names[-images.num_test :])
    return [counts[name] for name in names]


def _sums(images: Pixels) -> tuple[list[int], list[int]]:
    """Return the sums of pixels and of their squares, by channel."""
    totals = np.zeros((2, images.shape[1]), dtype=np.int64)
    for start in range(0, len(images), _TOGETHER):
        values = images[start : start + _TOGETHER].astype(np.int64)
        totals += [values.sum(axis=(0, 2, 3)), (values * values).sum(axis=(0, 2, 3))]
    return totals[0].tolist(), totals[1].tolist()


def moments(store: Store, classes: Sequence[int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel of some classes, in [0, 1] units."""
    facts = store.facts
    side = store.array(IMAGES).shape[-1]
    pixels = sum(facts["counts"][i] for i in classes) * side**2
    total, squares = (
        np.sum([facts[key][i] for i in classes], axis=0) for key in ("sums", "squares")
    )
    mean = total / pixels
    # Blank images have deviation 0: the bound avoids a division by zero.
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 1.0))
    return tuple((mean / 255.0).tolist()), tuple((std / 255.0).tolist())


@cache
def _lists(name: str) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = json.loads((FILES / f"{name}.json").read_text())
    return found


def published_split(split: str, names: Sequence[str]) -> dict[Split, list[str]]:
    """Return the classes of each part of a published split.

    Args:
        split: `cub` is that of Chen et al. (2019): of the sorted classes every second one is for
            training, and the others in turn for val and test. `tiered_imagenet` is in the names
            of the classes. Others are lists, see `class_splits.json`.
        names: Sorted names of all classes.

    Raises:
        ValueError: The classes are others.
    """
    if split == "cub":
        return {"train": list(names[0::2]), "val": list(names[1::4]), "test": list(names[3::4])}
    if split == "tiered_imagenet":
        return {part: [n for n in names if n.startswith(f"{part}/")] for part in SPLITS}
    lists = _lists("class_splits")[split]
    found: dict[Split, list[str]] = {part: lists[part] for part in SPLITS}
    if odd := {*itertools.chain(*found.values())} ^ set(names):
        raise ValueError(f"the classes are not those of {split}: {min(odd)} is only in one of both")
    return found


def groups_of(store: str) -> dict[str, str]:
    """Return the superclass of each class of a data set; empty if it has none."""
    groups = _lists("class_groups").get(store, {})
    return {name: group for group, names in groups.items() for name in names}


def _forms(name: str) -> str:
    other = SETS[name].forms
    return f"{other}{', or ' if other else ''}a folder or an archive with a folder for each class"


def _recognized(name: str, tree: FileTree) -> Images:
    """Return the images of a source.

    Raises:
        ValueError: No layout is recognized.
    """
    paths = tree.names()
    for look in (_cifar, _idx, _tiered):
        if (found := look(name, tree, paths)) is not None:
            return found
    inside = [path for path in paths if PurePosixPath(path).suffix.lower() in suffixes()]
    inside = [path for path in inside if "/" in path]
    if not inside:
        raise ValueError(f"--from {tree.path}: no files of {name} are recognized: {_forms(name)}")
    return Files(tree, inside)


def _cifar(name: str, tree: FileTree, paths: Sequence[str]) -> Images | None:
    """CIFAR-100's pickles: `meta` names the classes, `train` and `test` have the rows."""
    parts = {part: p for p in paths for part in ("meta", "train", "test") if _is(p, part)}
    if name != "cifar100" or len(parts) < 3:
        return None
    content = _pickles(tree, list(parts.values()))
    try:
        classes = [_text(name) for name in content["meta"]["fine_label_names"]]
        halves = [content["train"], content["test"]]
        labels = [label for half in halves for label in half["fine_labels"]]
        rows = np.concatenate([half["data"] for half in halves])
        images = rows.reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
        names = [classes[label] for label in labels]
        return Arrays("cifar-100-python", names, list(images), len(content["test"]["fine_labels"]))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise ValueError(f"{tree.path}: these pickles are not those of CIFAR-100") from None


def _is(path: str, name: str) -> bool:
    return PurePosixPath(path).name == name


def _idx(name: str, tree: FileTree, paths: Sequence[str]) -> Images | None:
    """The format of MNIST: one file of images and one of labels for each half."""
    only = "emnist-balanced-" if name == "emnist" else ""
    named = {
        PurePosixPath(path).name.removesuffix(".gz").replace(".idx", "-idx"): path for path in paths
    }
    pairs = [
        (path, named.get(key.replace("images-idx3", "labels-idx1")))
        for key, path in sorted(named.items(), reverse=True)
        if key.startswith(only) and key.endswith("images-idx3-ubyte")
    ]
    if SETS[name].forms.find("idx") < 0 or not pairs:
        return None
    for path, labels in pairs:
        if labels is None:
            raise ValueError(f"{tree.path}: the labels of {path} are missing: get both files")
    content: dict[str, Pixels] = {}
    for path, file in tree.open([p for pair in pairs for p in pair if p is not None]):
        content[path] = _idx_array(file, f"{tree.path}/{path}")
    images = np.concatenate([content[path] for path, _ in pairs])
    found = np.concatenate([content[path] for _, path in pairs if path is not None])
    if images.ndim != 3 or found.shape != images.shape[:1]:
        raise ValueError(f"{tree.path} has {len(images)} images and {len(found)} labels")
    if name == "emnist":
        # These are stored mirrored and turned.
        images = images.transpose(0, 2, 1)
    digits = len(str(int(found.max(initial=0))))
    names = [f"{label:0{digits}d}" for label in found.tolist()]
    # The training half comes first, if there are both.
    last = PurePosixPath(pairs[-1][0]).name
    is_test = len(pairs) == 2 and ("t10k" in last or "test" in last)
    return Arrays("idx files", names, list(images), len(content[pairs[-1][0]]) * is_test)


def _idx_array(file: IO[bytes], name: str) -> Pixels:
    data = file.read()
    with suppress(OSError, EOFError):
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    dims = data[3] if data[:3] == b"\x00\x00\x08" else 0
    shape = tuple(np.frombuffer(data, ">i4", dims, 4).tolist()) if len(data) >= 4 + 4 * dims else ()
    if not dims or np.prod(shape) != len(data) - 4 - 4 * dims:
        raise ValueError(f"{name} is not a complete idx file of bytes: get it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _tiered(name: str, tree: FileTree, paths: Sequence[str]) -> Images | None:
    """Ren's pickles: the PNG of each image, and the class of each; the classes of splits differ."""
    found = {p.name: str(p) for p in map(PurePosixPath, paths) if p.suffix == ".pkl"}
    wanted = {f"{part}_{what}.pkl" for part in SPLITS for what in ("images_png", "labels")}
    if name != "tiered_imagenet" or not wanted & found.keys():
        return None
    if absent := sorted(wanted - found.keys()):
        raise ValueError(f"{tree.path} has no {absent[0]}: tieredImageNet has six files")
    content = _pickles(tree, [found[key] for key in sorted(wanted)])
    names: list[str] = []
    pictures: list[bytes] = []
    for part in SPLITS:
        labels, images = content[f"{part}_labels.pkl"], content[f"{part}_images_png.pkl"]
        try:
            texts = labels["label_specific_str"]
            own = [f"{part}/{_text(texts[label])}" for label in labels["label_specific"]]
            png = [bytes(np.asarray(image, dtype=np.uint8)) for image in images]
        except (KeyError, TypeError, ValueError, IndexError):
            raise ValueError(
                f"{tree.path}: these pickles are not those of tieredImageNet"
            ) from None
        if len(own) != len(png):
            raise ValueError(f"{tree.path}: {part} has {len(png)} images and {len(own)} labels")
        names += own
        pictures += png
    return _Encoded("*_images_png.pkl", names, pictures)


class _Encoded(Images):
    """Images as the bytes of files."""

    def __init__(self, form: str, names: Sequence[str], pictures: Sequence[bytes]) -> None:
        self.form, self.names, self._pictures = form, names, pictures

    def read(self, side: int, channels: int) -> Iterator[tuple[int, Pixels]]:
        def decoded(number: int) -> Pixels:
            image = open_image(self._pictures[number], f"{self.form}, image {number}")
            return _converted(image, side, channels)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for start in range(0, len(self._pictures), _TOGETHER):
                some = range(start, min(start + _TOGETHER, len(self._pictures)))
                yield from zip(some, pool.map(decoded, some), strict=True)


def _pickles(tree: FileTree, paths: Sequence[str]) -> dict[str, Any]:
    """Return the contents of pickles by the names of the files; keys of dictionaries are texts."""
    found: dict[str, Any] = {}
    for path, file in tree.open(paths):
        content = read_pickle(file, f"{tree.path}/{path}")
        if isinstance(content, dict):
            content = {_text(key): value for key, value in content.items()}
        found[PurePosixPath(path).name] = content
    return found


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
