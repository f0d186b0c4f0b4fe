"""Stores of whole image data sets, made of small files in the real layouts."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metarun.data.storage import image_sets
from metarun.data.storage.cache import Store
from metarun.data.storage.image_sets import ImageSet, import_images, moments, published_split

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
GRAYS = RNG.integers(0, 256, (12, 28, 28), dtype=np.uint8)
LABELS = [2, 0, 1, 2, 0, 1, 0, 0, 1, 2, 1, 2]
NAMES = ("apple", "bear", "can")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets of three classes."""
    for name, known in image_sets.SETS.items():
        few = ImageSet(known.side, known.channels, 3, known.forms)
        monkeypatch.setitem(image_sets.SETS, name, few)


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def check(store: Store, images: Any) -> None:
    """Compare a store with the images by their labels; halves keep their order in a class."""
    assert store.facts["classes"] == list(NAMES)
    assert store.facts["counts"] == [LABELS.count(label) for label in range(3)]
    expected = [images[i] for label in range(3) for i in range(12) if LABELS[i] == label]
    shown = np.stack(expected)
    shown = shown[:, None] if shown.ndim == 3 else shown.transpose(0, 3, 1, 2)
    assert (store.array("images") == shown).all()
    store.verify()


def cifar(folder: Path) -> Path:
    """The two halves as the official pickles of Python 2, whose strings are bytes."""
    rows = COLORS.transpose(0, 3, 1, 2).reshape(12, -1)
    base = folder / "cifar-100-python"
    base.mkdir(parents=True)
    for part, own in (("train", slice(0, 8)), ("test", slice(8, 12))):
        content = {b"data": rows[own], b"fine_labels": LABELS[own], b"batch_label": b"x"}
        (base / part).write_bytes(pickle.dumps(content, protocol=2))
    names = {b"fine_label_names": [name.encode() for name in NAMES]}
    (base / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return folder


def class_folders(folder: Path) -> Path:
    for i, label in enumerate(LABELS):
        place = folder / ("train" if i < 8 else "zest") / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:02d}.png").write_bytes(png(COLORS[i]))
    (folder / "readme.txt").write_text("no image")
    return folder


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path


def tarred(folder: Path) -> Path:
    path = folder.with_suffix(".tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return path


def as_it_is(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize("pack", [as_it_is, zipped, tarred])
@pytest.mark.parametrize("layout", [cifar, class_folders])
def test_cifar_100_is_read_from_all_its_layouts(layout: Any, pack: Any, tmp_path: Path) -> None:
    store = import_images("cifar100", pack(layout(tmp_path / "source")), tmp_path / "root")
    check(store, COLORS)


def test_an_archive_that_is_alone_in_its_folder_is_opened(tmp_path: Path) -> None:
    packed = zipped(class_folders(tmp_path / "source"))
    (tmp_path / "alone").mkdir()
    packed.rename(tmp_path / "alone" / packed.name)
    check(import_images("cifar100", tmp_path / "alone", tmp_path / "root"), COLORS)


def idx(folder: Path, images: Any, prefix: str = "", suffix: str = "") -> Path:
    folder.mkdir()
    for half, own in (("train", slice(0, 8)), ("test" if prefix else "t10k", slice(8, 12))):
        labels = np.array(LABELS[own], dtype=np.uint8)
        for what, array in (("images-idx3", images[own]), ("labels-idx1", labels)):
            dims = struct.pack(f">{array.ndim}i", *array.shape)
            data = bytes([0, 0, 8, array.ndim]) + dims + array.tobytes()
            path = folder / f"{prefix}{half}-{what}-ubyte{suffix}"
            path.write_bytes(gzip.compress(data) if suffix else data)
    return folder


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_idx_files_are_read(name: str, suffix: str, tmp_path: Path) -> None:
    store = import_images(name, idx(tmp_path / "source", GRAYS, "", suffix), tmp_path / "root")
    assert store.facts["classes"] == ["0", "1", "2"]
    rows = [i for label in range(3) for i in range(8) if LABELS[i] == label]
    # The first class has four rows of training, then one of the test.
    assert (store.array("images")[:4, 0] == GRAYS[rows[:4]]).all()
    assert store.array("images").shape == (12, 1, 28, 28)
    assert store.facts["test_counts"] == [LABELS[8:].count(label) for label in range(3)]


def test_characters_of_emnist_are_turned_upright(tmp_path: Path) -> None:
    turned = GRAYS.transpose(0, 2, 1).copy()
    source = idx(tmp_path / "source", turned, "emnist-balanced-")
    store = import_images("emnist", source, tmp_path / "root")
    assert (store.array("images")[0, 0] == GRAYS[LABELS.index(0)]).all()


def tiered(folder: Path, *, python2: bool) -> Path:
    folder.mkdir()
    for label, part in enumerate(("train", "val", "test")):
        own = [i for i in range(12) if LABELS[i] == label]
        images = [np.frombuffer(png(COLORS[i]), np.uint8) for i in own]
        labels: dict[Any, Any] = {
            "label_specific": np.zeros(len(own), dtype=np.int64),
            "label_specific_str": [f"n{label}"],
        }
        if python2:
            labels = {key.encode(): value for key, value in labels.items()}
        (folder / f"{part}_images_png.pkl").write_bytes(pickle.dumps(images, protocol=2))
        (folder / f"{part}_labels.pkl").write_bytes(pickle.dumps(labels, protocol=2))
    return folder


@pytest.mark.parametrize("python2", [False, True])
def test_tiered_imagenet_keeps_its_splits(python2: bool, tmp_path: Path) -> None:
    source = tiered(tmp_path / "source", python2=python2)
    store = import_images("tiered_imagenet", source, tmp_path / "root")
    assert store.facts["classes"] == ["test/n2", "train/n0", "val/n1"]
    found = published_split("tiered_imagenet", store.facts["classes"])
    assert found == {"train": ["train/n0"], "val": ["val/n1"], "test": ["test/n2"]}
    assert store.array("images").shape == (12, 3, 84, 84)


def test_moments_are_those_of_the_classes_that_are_asked_for(tmp_path: Path) -> None:
    store = import_images("cifar100", cifar(tmp_path / "source"), tmp_path / "root")
    mean, std = moments(store, [0, 2])
    rows = COLORS[[i for i in range(12) if LABELS[i] != 1]] / 255.0
    np.testing.assert_allclose(mean, rows.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, rows.std(axis=(0, 1, 2)), rtol=1e-9)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


@pytest.mark.parametrize(
    ("name", "files", "says"),
    [
        ("cifar100", {}, "no files of cifar100 are recognized: cifar-100-python or its .tar.gz"),
        ("cifar100", {"a/1.png": png(COLORS[0])}, "has 1 classes, cifar100 has 3"),
        ("cifar100", {c: pickle.dumps(Evil()) for c in ("meta", "train", "test")}, "would run"),
        ("cifar100", dict.fromkeys(("meta", "train", "test"), b"x"), "is not a complete pickle"),
        ("cifar100", dict.fromkeys(("meta", "train", "test"), pickle.dumps({})), "not those of"),
        ("cub", {"a/1.png": png(COLORS[0]), "b/1.png": b"", "c/1.png": b""}, "b/1.png cannot be"),
        ("mnist", {"train-images-idx3-ubyte": b"\x00\x00\x08\x03"}, "labels of train-images-idx3"),
        (
            "mnist",
            {"t-images-idx3-ubyte": b"\x00\x00\x08\x03", "t-labels-idx1-ubyte": b""},
            "t-images-idx3-ubyte is not a complete idx file",
        ),
        ("tiered_imagenet", {"train_labels.pkl": b""}, "has no test_images_png.pkl"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_and_no_store_is_left(
    name: str, files: dict[str, bytes], says: str, tmp_path: Path, capsys: Any
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path, data in files.items():
        (source / path).parent.mkdir(exist_ok=True)
        (source / path).write_bytes(data)
    with pytest.raises(ValueError, match=says) as caught:
        import_images(name, source, tmp_path / "root")
    assert "\n" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out
    assert not list(tmp_path.glob("root/*"))


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="neither a folder nor a complete zip or tar file"):
        import_images("cifar100", tmp_path / "a.zip", tmp_path / "root")
    with pytest.raises(ValueError, match="there is no such file or folder"):
        import_images("cifar100", tmp_path / "b.zip", tmp_path / "root")


def test_published_splits_have_their_sizes() -> None:
    lists = json.loads((image_sets.FILES / "class_splits.json").read_text())
    sizes = {
        name: [len(of[part]) for part in ("train", "val", "test")] for name, of in lists.items()
    }
    assert sizes == {
        "cifar_fs": [64, 16, 20],
        "fc100": [60, 20, 20],
        "aircraft": [70, 15, 15],
        "dtd": [33, 7, 7],
        "flowers": [71, 15, 16],
    }
    for of in lists.values():
        names = [name for part in of.values() for name in part]
        assert len(names) == len(set(names))
    assert {*lists["cifar_fs"]["train"], *lists["cifar_fs"]["val"], *lists["cifar_fs"]["test"]} == {
        *lists["fc100"]["train"], *lists["fc100"]["val"], *lists["fc100"]["test"],
    }  # fmt: skip


def test_fc100_splits_superclasses_and_chen_every_second_species() -> None:
    groups = image_sets.groups_of("cifar100")
    assert len(groups) == 100
    lists = json.loads((image_sets.FILES / "class_splits.json").read_text())["fc100"]
    of = {part: {groups[name] for name in names} for part, names in lists.items()}
    assert [len(of[part]) for part in ("train", "val", "test")] == [12, 4, 4]
    assert not of["train"] & of["val"] | of["train"] & of["test"] | of["val"] & of["test"]
    names = [f"{i:03d}.Bird" for i in range(1, 201)]
    found = published_split("cub", names)
    assert [len(found[part]) for part in ("train", "val", "test")] == [100, 50, 50]
    assert (found["train"][1], found["val"][1], found["test"][1]) == (
        "003.Bird", "006.Bird", "008.Bird",
    )  # fmt: skip
