"""Import of miniImageNet into a store, from the layouts in which it is distributed. No torch.

A layout is recognized by the contents of the folder. The split is that of Ravi & Larochelle
(2017): 64, 16 and 20 classes of 600 images.

Shapes: N images, C H W.
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from metarun.core.types import SPLITS, Split
from metarun.data.storage.cache import Pixels, Store, build_store, open_store
from metarun.data.storage.download import file_hash, need_space
from metarun.data.storage.image_files import open_image, photograph, suffixes
from metarun.data.storage.pickles import read_pickle

SIZE = 84
NUM_CLASSES: dict[Split, int] = {"train": 64, "val": 16, "test": 20}
IMAGES_PER_CLASS = 600
CSV_MD5: dict[Split, str] = {
    "train": "9525e1538f67719f18f1936bf8d0782d",
    "val": "ce315ce99b41fbf84fa6acd69315d918",
    "test": "5b89df877c6cbe5d291e43118a2a9591",
}
_SHAPE = (3, SIZE, SIZE)
_WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val", "validation", "valid"),
    "test": ("test",),
}
_SPARE = 100_000_000
FORMS = (
    "train.csv, val.csv, test.csv and images/; folders train/, val/, test/ of class folders; "
    "mini-imagenet-cache-*.pkl; *_data.hdf5; or parquet files of GATE-engine/mini_imagenet"
)


def import_miniimagenet(source: Path, root: Path) -> Store:
    """Build the store from files of the user, which are only read.

    Args:
        source: Folder with the files.
        root: Folder of the data sets.

    Raises:
        ValueError: The layout is unknown, or the files are damaged or not miniImageNet. No
            partial store is left.
    """
    layout = recognize(source)
    classes = {split: layout.classes(split) for split in SPLITS}
    _check(layout, classes)
    totals = {split: sum(counts.values()) for split, counts in classes.items()}
    need_space(root, sum(totals.values()) * 3 * SIZE * SIZE + _SPARE)
    folder = root / "miniimagenet"
    with build_store(folder) as writer:
        for split in SPLITS:
            with writer.array(split, (totals[split], *_SHAPE)) as out:
                _fill(out, layout, split, classes[split])
        writer.facts = {
            "name": "miniimagenet",
            "source": str(source.absolute()),
            "form": layout.title,
            "classes": {split: sorted(counts) for split, counts in classes.items()},
            "counts": {
                split: [counts[n] for n in sorted(counts)] for split, counts in classes.items()
            },
            **layout.facts(),
        }
    store = open_store(folder)
    assert store is not None
    return store


class Layout(ABC):
    """Layout in which miniImageNet is distributed.

    Attributes:
        title: Name of the layout in messages.
        base: Folder with the files.
    """

    title: str

    def __init__(self, base: Path) -> None:
        self.base = base

    @abstractmethod
    def classes(self, split: Split) -> dict[str, int]:
        """Return the number of images of each class of a split."""

    @abstractmethod
    def rows(self, split: Split) -> Iterator[tuple[str, Pixels]]:
        """Yield the class and the pixels of every image of a split, in any order of classes."""

    def facts(self) -> dict[str, Any]:
        """Return additional entries for the description of the store."""
        return {}


def recognize(source: Path) -> Layout:
    """Recognize the layout of miniImageNet in a folder.

    Raises:
        ValueError: No layout is recognized, or the files are known to be another data set.
    """
    if not source.exists():
        raise ValueError(f"--from {source}: there is no such folder")
    base = source if source.is_dir() else source.parent
    for place in _places(base):
        _refuse_known(place)
        for layout in (_Csv, _Pickles, _Hdf5, _Parquet, _Folders):
            found = layout.find(place)
            if found is not None:
                return found
    raise ValueError(f"--from {source}: no layout of miniImageNet is recognized; known are {FORMS}")


def _places(base: Path) -> Iterator[Path]:
    yield base
    for name in (
        "miniimagenet",
        "mini-imagenet",
        "miniImageNet",
        "mini_imagenet",
        "data",
        "default",
    ):
        if (base / name).is_dir():
            yield base / name


def _refuse_known(place: Path) -> None:
    """Raise an error for files that are often mistaken for miniImageNet's."""
    if any(place.glob("miniImageNet_category_split_*.pickle")):
        raise ValueError(
            f"{place} holds miniImageNet_category_split_*.pickle, the files of Gidaris & Komodakis "
            f"with a fourth split of the training classes; known are {FORMS}"
        )
    if any(place.glob("*_images_png.pkl")):
        raise ValueError(f"{place} holds *_images_png.pkl: that is tieredImageNet")
    packed = [*place.glob("*.zip"), *place.glob("*.tar"), *place.glob("*.tar.*")]
    if packed and not any(path.is_dir() for path in place.iterdir()):
        raise ValueError(f"{packed[0]} is an archive: unpack it, then import the folder")


def _check(layout: Layout, classes: dict[Split, dict[str, int]]) -> None:
    """Check that classes and counts agree with the split of Ravi & Larochelle."""
    owner: dict[str, Split] = {}
    if set(classes["train"]) == set(classes["val"]) == set(classes["test"]):
        raise ValueError(
            f"{layout.base} has every class in every split, as timm/mini-imagenet has: that is a "
            "split for ordinary classification; get GATE-engine/mini_imagenet instead"
        )
    for split, counts in classes.items():
        for name in counts:
            if name in owner:
                raise ValueError(
                    f"{layout.base}: class {name} is in {owner[name]} and in {split}; "
                    "miniImageNet's splits share no class"
                )
            owner[name] = split
    for split, counts in classes.items():
        if len(counts) != NUM_CLASSES[split]:
            raise ValueError(
                f"{layout.base} ({layout.title}) has {len(counts)} {split} classes, miniImageNet "
                f"has {NUM_CLASSES[split]}"
            )
        for name, count in sorted(counts.items()):
            if count != IMAGES_PER_CLASS:
                raise ValueError(
                    f"{layout.base} ({layout.title}): class {name} has {count} images, "
                    f"miniImageNet has {IMAGES_PER_CLASS} of each"
                )


def _fill(out: Pixels, layout: Layout, split: Split, counts: dict[str, int]) -> None:
    """Write every image to the next row of its class; classes are in alphabetical order."""
    place: dict[str, int] = {}
    end: dict[str, int] = {}
    row = 0
    for name in sorted(counts):
        place[name] = row
        row += counts[name]
        end[name] = row
    for name, pixels in tqdm(layout.rows(split), desc=split, total=len(out), unit="image"):
        assert place[name] < end[name]
        out[place[name]] = pixels
        place[name] += 1
    assert place == end


class _Csv(Layout):
    """Ravi's lists and one folder of images."""

    title = "train.csv, val.csv, test.csv and images/"

    @classmethod
    def find(cls, place: Path) -> Layout | None:
        """Return this layout if its files are in a folder, else None."""
        lists = [place / f"{split}.csv" for split in SPLITS]
        if not any(path.is_file() for path in lists):
            return None
        for path in lists:
            if not path.is_file():
                raise ValueError(f"{path} is missing: miniImageNet has three lists")
        if not (place / "images").is_dir():
            raise ValueError(f"{place / 'images'} is missing: the folder of the files in the lists")
        return cls(place)

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self._lists: dict[Split, list[tuple[str, str]]] = {
            split: self._read(base / f"{split}.csv") for split in SPLITS
        }
        present = {path.name for path in (base / "images").iterdir()}
        wanted = [file for rows in self._lists.values() for file, _ in rows]
        absent = [file for file in wanted if file not in present]
        if absent:
            raise ValueError(
                f"{base / 'images'} lacks {len(absent)} of the {len(wanted)} images in the lists; "
                f"the first is {absent[0]}"
            )

    def classes(self, split: Split) -> dict[str, int]:
        return dict(Counter(label for _, label in self._lists[split]))

    def rows(self, split: Split) -> Iterator[tuple[str, Pixels]]:
        for file, label in self._lists[split]:
            yield label, photograph(open_image(self.base / "images" / file), SIZE, crop=False)

    def facts(self) -> dict[str, Any]:
        same = all(file_hash(self.base / f"{s}.csv", "md5") == CSV_MD5[s] for s in SPLITS)
        return {"lists_are_ravis": same}

    @staticmethod
    def _read(path: Path) -> list[tuple[str, str]]:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                header, *rows = list(csv.reader(file)) or [[]]
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not a text file: expected filename,label lines") from None
        if header != ["filename", "label"]:
            raise ValueError(f"{path} begins with {','.join(header)!r}: expected filename,label")
        for number, row in enumerate(rows, start=2):
            if len(row) != 2 or not all(row) or "/" in row[0] or "\\" in row[0]:
                raise ValueError(
                    f"{path}, line {number}: expected filename,label, found {','.join(row)!r}"
                )
        return [(row[0], row[1]) for row in rows]


class _Folders(Layout):
    """One folder for each split, with class folders."""

    title = "folders train/, val/, test/"

    @classmethod
    def find(cls, place: Path) -> Layout | None:
        """Return this layout if its files are in a folder, else None."""
        found: dict[Split, Path] = {}
        for split, words in _WORDS.items():
            for word in words:
                if (place / word).is_dir():
                    found[split] = place / word
                    break
        if not found:
            return None
        for split in SPLITS:
            if split not in found:
                raise ValueError(
                    f"{place} has {' and '.join(f'{p.name}/' for p in found.values())} but no "
                    f"{split}/: miniImageNet has three splits"
                )
        return cls(place, found)

    def __init__(self, base: Path, folders: dict[Split, Path]) -> None:
        super().__init__(base)
        self._files: dict[Split, dict[str, list[Path]]] = {
            split: {
                child.name: sorted(f for f in child.iterdir() if f.suffix.lower() in suffixes())
                for child in sorted(folder.iterdir())
                if child.is_dir() and not child.name.startswith(".")
            }
            for split, folder in folders.items()
        }

    def classes(self, split: Split) -> dict[str, int]:
        return {name: len(files) for name, files in self._files[split].items()}

    def rows(self, split: Split) -> Iterator[tuple[str, Pixels]]:
        for name, files in self._files[split].items():
            for file in files:
                yield name, photograph(open_image(file), SIZE, crop=False)


class _Pickles(Layout):
    """Ren's pickled dictionaries of arrays, which learn2learn also uses."""

    title = "mini-imagenet-cache-*.pkl"

    @classmethod
    def find(cls, place: Path) -> Layout | None:
        """Return this layout if its files are in a folder, else None."""
        found = _by_split(place, "mini-imagenet-cache-{}.pkl")
        return None if found is None else cls(place, found)

    def __init__(self, base: Path, files: dict[Split, Path]) -> None:
        super().__init__(base)
        self._files = files
        self._split: Split | None = None
        self._content: tuple[Pixels, dict[str, list[int]]] | None = None

    def classes(self, split: Split) -> dict[str, int]:
        return {name: len(rows) for name, rows in self._load(split)[1].items()}

    def rows(self, split: Split) -> Iterator[tuple[str, Pixels]]:
        images, classes = self._load(split)
        for name, rows in classes.items():
            for row in rows:
                yield name, images[row].transpose(2, 0, 1)

    def _load(self, split: Split) -> tuple[Pixels, dict[str, list[int]]]:
        # Only one split is kept in memory: train alone is 0.8 GB.
        if self._content is None or self._split != split:
            self._content = None
            self._content = read_cache_pickle(self._files[split])
            self._split = split
        return self._content


class _Hdf5(Layout):
    """HDF5 files of torchmeta."""

    title = "*_data.hdf5"

    @classmethod
    def find(cls, place: Path) -> Layout | None:
        """Return this layout if its files are in a folder, else None."""
        found = _by_split(place, "{}_data.hdf5")
        return None if found is None else cls(place, found)

    def __init__(self, base: Path, files: dict[Split, Path]) -> None:
        super().__init__(base)
        self._files = files
        try:
            import h5py
        except ImportError:
            raise ValueError(
                f"{base} holds HDF5 files, which need an extra: pip install 'metarun[hdf5]'"
            ) from None
        self._h5py = h5py
        self._counts = {split: self._read(split) for split in SPLITS}

    def classes(self, split: Split) -> dict[str, int]:
        return self._counts[split]

    def rows(self, split: Split) -> Iterator[tuple[str, Pixels]]:
        with self._h5py.File(self._files[split], "r") as file:
            for name in self._counts[split]:
                try:
                    images = np.asarray(file["datasets"][name])
                except OSError:
                    raise ValueError(
                        f"{self._files[split]} is damaged at {name}: get it again"
                    ) from None
                for image in images:
                    yield name, image.transpose(2, 0, 1)

    def _read(self, split: Split) -> dict[str, int]:
        path = self._files[split]
        try:
            with self._h5py.File(path, "r") as file:
                group = file.get("datasets")
                if not isinstance(group, self._h5py.Group):
                    raise ValueError(f"{path} has no group `datasets`: it is not torchmeta's file")
                return {name: self._count(path, name, group[name]) for name in group}
        except OSError:
            raise ValueError(f"{path} is not a complete HDF5 file: get it again") from None

    def _count(self, path: Path, name: str, data: Any) -> int:
        shape: tuple[int, ...] = tuple(getattr(data, "shape", ()))
        if shape[1:] != (SIZE, SIZE, 3) or data.dtype != np.uint8:
            raise ValueError(
                f"{path}: {name} is {getattr(data, 'dtype', 'a group')} of shape {shape}, "
                "uint8 of shape (N, 84, 84, 3) is expected"
            )
        return shape[0]


class _Parquet(Layout):
    """Files of the Hugging Face hub with columns `image` and `label`."""

    title = "parquet files"

    @classmethod
    def find(cls, place: Path) -> Layout | None:
        """Return this layout if its files are in a folder, else None."""
        found: dict[Split, list[Path]] = {}
        for split, words in _WORDS.items():
            for word in words:
                files = sorted([*place.glob(f"{word}-*.parquet"), *place.glob(f"{word}/*.parquet")])
                if files:
                    found[split] = files
                    break
        if not found:
            return None
        _need_three(place, found, "parquet files")
        return cls(place, found)

    def __init__(self, base: Path, files: dict[Split, list[Path]]) -> None:
        super().__init__(base)
        self._files = files
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise ValueError(
                f"{base} holds parquet files, which need an extra: pip install 'metarun[parquet]'"
            ) from None
        self._parquet = parquet
        self._error = pyarrow.ArrowException
        for split_files in files.values():
            self._check_shards(split_files)
        self._names = {split: self._label_names(paths[0]) for split, paths in files.items()}
        self._counts = {split: self._count(split) for split in SPLITS}

    def classes(self, split: Split) -> dict[str, int]:
        return self._counts[split]

    def rows(self, split: Split) -> Iterator[tuple[str, Pixels]]:
        for path in self._files[split]:
            number = 0
            for batch in self._open(path).iter_batches(batch_size=256, columns=["image", "label"]):
                for row in batch.to_pylist():
                    content = row["image"]
                    data = content.get("bytes") if isinstance(content, dict) else content
                    if not isinstance(data, bytes):
                        raise ValueError(f"{path}, row {number}: there is no image in it")
                    image = open_image(data, f"{path}, row {number}")
                    yield self._name(split, row["label"]), photograph(image, SIZE, crop=False)
                    number += 1

    def _count(self, split: Split) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for path in self._files[split]:
            labels = self._open(path).read(columns=["label"]).column("label").to_pylist()
            counts.update(self._name(split, label) for label in labels)
        return dict(counts)

    def _open(self, path: Path) -> Any:
        try:
            file = self._parquet.ParquetFile(path)
        except (self._error, OSError):
            raise ValueError(f"{path} is not a complete parquet file: get it again") from None
        columns = set(file.schema_arrow.names)
        if not {"image", "label"} <= columns:
            raise ValueError(
                f"{path} has the columns {', '.join(sorted(columns))}: image and label are expected"
            )
        return file

    def _label_names(self, path: Path) -> list[str] | None:
        """Return the names of the labels from the file's metadata, or None without them."""
        metadata = self._open(path).schema_arrow.metadata or {}
        try:
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            return [str(name) for name in features["label"]["names"]]
        except (KeyError, TypeError, ValueError):
            return None

    def _name(self, split: Split, label: Any) -> str:
        names = self._names[split]
        if names is not None and isinstance(label, int) and 0 <= label < len(names):
            return names[label]
        return str(label)

    @staticmethod
    def _check_shards(files: list[Path]) -> None:
        """Check the number of files against names such as `train-00000-of-00006-….parquet`."""
        for path in files:
            pieces = path.name.split("-")
            if len(pieces) >= 4 and pieces[2] == "of":
                total = int(pieces[3].split(".")[0])
                if total != len(files):
                    raise ValueError(
                        f"{path.parent} has {len(files)} of {total} {pieces[0]} files: "
                        "get the others"
                    )


def read_cache_pickle(path: Path) -> tuple[Pixels, dict[str, list[int]]]:
    """Read the images (N, 84, 84, 3) and the rows of each class from one of Ren's pickles.

    Raises:
        ValueError: The file is damaged, or contains anything but images.
    """
    with path.open("rb") as file:
        content = read_pickle(file, str(path))
    keys = {_text(k): v for k, v in content.items()} if isinstance(content, dict) else {}
    images, classes = keys.get("image_data"), keys.get("class_dict")
    if not isinstance(images, np.ndarray) or not isinstance(classes, dict):
        raise ValueError(f"{path} has no `image_data` and `class_dict`: it is not Ren's pickle")
    if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(
            f"{path}: image_data is {images.dtype} of shape {images.shape}, uint8 of shape "
            "(N, 84, 84, 3) is expected"
        )
    rows = {_text(name): [int(row) for row in places] for name, places in classes.items()}
    flat = [row for places in rows.values() for row in places]
    if sorted(flat) != list(range(len(images))):
        raise ValueError(
            f"{path}: class_dict names {len(set(flat))} different rows, image_data has "
            f"{len(images)}"
        )
    return images, rows


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _by_split(place: Path, pattern: str) -> dict[Split, Path] | None:
    """Return the file of each split by a name pattern; None if no split has one."""
    found: dict[Split, Path] = {}
    for split, words in _WORDS.items():
        for word in words:
            if (place / pattern.format(word)).is_file():
                found[split] = place / pattern.format(word)
                break
    if not found:
        return None
    _need_three(place, found, pattern.format("*"))
    return found


def _need_three(place: Path, found: dict[Split, Any], what: str) -> None:
    for split in SPLITS:
        if split not in found:
            raise ValueError(f"{place} has {what} but none for {split}: get all three splits")
