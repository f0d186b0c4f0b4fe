"""Import of miniImageNet from all layouts: small sets with the real names and structure."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metarun.core.types import SPLITS, EpisodeSize, Split
from metarun.data.augmentation import Augmentation
from metarun.data.miniimagenet import MEAN, STD, MiniImageNet
from metarun.data.storage import miniimagenet_files
from metarun.data.storage.cache import Pixels
from metarun.data.storage.image_files import photograph
from metarun.data.storage.miniimagenet_files import (
    NUM_CLASSES,
    import_miniimagenet,
    read_cache_pickle,
    recognize,
)
from tests.data.sources import make_source, png

COUNT = 3
Sets = dict[Split, dict[str, Pixels]]


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce miniImageNet to three images of each class instead of six hundred."""
    monkeypatch.setattr(miniimagenet_files, "IMAGES_PER_CLASS", COUNT)


@pytest.fixture(scope="module")
def sets() -> Sets:
    """Return (COUNT, 84, 84, 3) images of each class."""
    generator = np.random.default_rng(0)
    found: Sets = {}
    number = 0
    for split in SPLITS:
        found[split] = {}
        for _ in range(NUM_CLASSES[split]):
            number += 1
            coarse = generator.integers(0, 256, (COUNT, 4, 4, 3), dtype=np.uint8)
            # Ordered by hash, so that the names are not sorted.
            found[split][f"n{(number * 7919) % 100000000:08d}"] = coarse.repeat(21, 1).repeat(21, 2)
    return found


def rows(images: Pixels) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images]


def write_csv(folder: Path, sets: Sets) -> None:
    (folder / "images").mkdir(parents=True)
    for split, classes in sets.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["filename", "label"])
            for name, images in classes.items():
                for place, image in enumerate(rows(images)):
                    # Ravi's images are JPEGs; PNG data under that name keeps the pixels exact.
                    filename = f"{name}{place:08d}.jpg"
                    (folder / "images" / filename).write_bytes(png(image))
                    writer.writerow([filename, name])


def write_folders(folder: Path, sets: Sets, *, val: str = "val") -> None:
    for split, classes in sets.items():
        for name, images in classes.items():
            place = folder / (val if split == "val" else split) / name
            place.mkdir(parents=True)
            for number, image in enumerate(rows(images)):
                (place / f"{name}{number:08d}.png").write_bytes(png(image))


def cache_content(classes: dict[str, Pixels]) -> tuple[Pixels, dict[str, list[int]]]:
    images = np.concatenate(list(classes.values()))
    places = {
        name: list(range(number * COUNT, (number + 1) * COUNT))
        for number, name in enumerate(classes)
    }
    return images, places


def write_pickles(folder: Path, sets: Sets, *, val: str = "val", protocol: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, classes in sets.items():
        images, places = cache_content(classes)
        content = {"image_data": images, "class_dict": places}
        word = val if split == "val" else split
        data = pickle.dumps(content, protocol=protocol)
        (folder / f"mini-imagenet-cache-{word}.pkl").write_bytes(data)


def python2_pickle(images: Pixels, classes: dict[str, list[int]]) -> bytes:
    """Return the opcodes that Python 2's pickle writes for the same dictionary."""

    def text(value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    shape = b"(" + b"".join(number(side) for side in images.shape) + b"t"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + number(0) + number(1) + b"tR"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t"
    array += (
        text(b"b") + b"tR(" + number(1) + shape + dtype + b"I00\n" + text(images.tobytes()) + b"tb"
    )
    lists = b"".join(
        text(name.encode()) + b"](" + b"".join(map(number, places)) + b"e"
        for name, places in classes.items()
    )
    items = text(b"image_data") + array + text(b"class_dict") + b"}(" + lists + b"u"
    return b"\x80\x02}(" + items + b"u."


def write_python2_pickles(folder: Path, sets: Sets) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, classes in sets.items():
        data = python2_pickle(*cache_content(classes))
        (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(data)


def write_hdf5(folder: Path, sets: Sets) -> None:
    h5py = pytest.importorskip("h5py")
    folder.mkdir(parents=True, exist_ok=True)
    for split, classes in sets.items():
        with h5py.File(folder / f"{split}_data.hdf5", "w") as file:
            group = file.create_group("datasets")
            for name, images in classes.items():
                group.create_dataset(name, data=images)
        (folder / f"{split}_labels.json").write_text(json.dumps(sorted(classes)))


def write_parquet(folder: Path, sets: Sets, *, named: bool = True) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = sorted(name for classes in sets.values() for name in classes)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    (folder / "data").mkdir(parents=True)
    for split, classes in sets.items():
        word = "validation" if split == "val" else split
        table = [
            {"image": {"bytes": png(image), "path": None}, "label": names.index(name)}
            for name, images in classes.items()
            for image in rows(images)
        ]
        # The hub divides a split into files without regard to classes.
        for shard, part in enumerate((table[::2], table[1::2])):
            arrow = pyarrow.Table.from_pylist(part)
            if named:
                arrow = arrow.replace_schema_metadata(metadata)
            path = folder / "data" / f"{word}-{shard:05d}-of-00002-0123456789abcdef.parquet"
            parquet.write_table(arrow, path)


FORMS: dict[str, Callable[[Path, Sets], None]] = {
    "ravi's lists": write_csv,
    "folders": write_folders,
    "folders with validation": lambda folder, sets: write_folders(folder, sets, val="validation"),
    "ren's pickles": write_pickles,
    "pickles of protocol 2": lambda folder, sets: write_pickles(folder, sets, protocol=2),
    "pickles of protocol 5": lambda folder, sets: write_pickles(folder, sets, protocol=5),
    "pickles of Python 2": write_python2_pickles,
    "learn2learn's pickles": lambda folder, sets: write_pickles(folder, sets, val="validation"),
    "torchmeta's HDF5": write_hdf5,
    "parquet of the hub": write_parquet,
}


@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS.keys())
def test_every_form_gives_the_same_set(
    write: Callable[[Path, Sets], None], sets: Sets, tmp_path: Path
) -> None:
    write(tmp_path / "theirs", sets)
    store = import_miniimagenet(tmp_path / "theirs", tmp_path / "root")
    store.verify()
    for split in SPLITS:
        names = sorted(sets[split])
        assert store.facts["classes"][split] == names
        assert store.facts["counts"][split] == [COUNT] * NUM_CLASSES[split]
        images = store.array(split).reshape(len(names), COUNT, 3, 84, 84)
        for name, found in zip(names, images, strict=True):
            expected = sets[split][name].transpose(0, 3, 1, 2)
            assert sorted(map(bytes, found)) == sorted(map(bytes, np.ascontiguousarray(expected)))
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["miniimagenet"]


def test_the_users_files_are_left_alone(sets: Sets, tmp_path: Path) -> None:
    write_pickles(tmp_path / "theirs", sets)
    before = {path: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    import_miniimagenet(tmp_path / "theirs", tmp_path / "root")
    assert {path: path.read_bytes() for path in (tmp_path / "theirs").iterdir()} == before


def test_a_folder_around_the_files_and_a_file_among_them_will_do(
    sets: Sets, tmp_path: Path
) -> None:
    write_pickles(tmp_path / "miniimagenet", sets)
    for source in (tmp_path, tmp_path / "miniimagenet" / "mini-imagenet-cache-val.pkl"):
        assert recognize(source).base == tmp_path / "miniimagenet"


def test_the_source_gives_normalized_photographs(sets: Sets, tmp_path: Path) -> None:
    write_pickles(tmp_path / "theirs", sets)
    import_miniimagenet(tmp_path / "theirs", tmp_path)
    three = dict.fromkeys(SPLITS, EpisodeSize(5, 1, 2))
    source = make_source(MiniImageNet, root=str(tmp_path), sizes=three)
    assert source.spec.input_shape == (3, 84, 84)
    batch = source.batch("test", 0, 3)
    assert batch.class_ids is not None
    names = source.class_names("test")
    for x, label in zip(batch.query_x[1], batch.query_y[1], strict=True):
        pixels = x * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        found = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert any(
            (found == image).all() for image in sets["test"][names[batch.class_ids[1, label]]]
        )
    config = make_source(MiniImageNet, root=str(tmp_path), normalize=False, sizes=three)
    assert config.batch("train", 0, 1).support_x.min() >= 0.0
    more = Augmentation(flip=True, color=0.4)
    changed = make_source(MiniImageNet, root=str(tmp_path), augmentation=more, sizes=three)
    assert not torch.equal(
        changed.batch("train", 0, 1).support_x, source.batch("train", 0, 1).support_x
    )
    assert torch.equal(changed.batch("val", 0, 1).support_x, source.batch("val", 0, 1).support_x)
    assert changed.fingerprint() == source.fingerprint()


def test_pictures_of_other_sizes_are_stretched_to_84() -> None:
    image = Image.new("RGB", (168, 84), "red")
    image.paste("blue", (84, 0, 168, 84))
    pixels = photograph(image, 84, crop=False)
    assert pixels.shape == (3, 84, 84)
    assert pixels[:, 40, 5].tolist() == [255, 0, 0]
    assert pixels[:, 40, 80].tolist() == [0, 0, 255]


def test_without_the_data_the_message_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metarun data miniimagenet --from PATH --root"):
        make_source(MiniImageNet, root=str(tmp_path))


def refuse(source: Path, message: str) -> None:
    root = source.parent / "root"
    with pytest.raises(ValueError, match=message):
        import_miniimagenet(source, root)
    assert not root.exists() or not list(root.iterdir())


def test_timms_split_is_refused_by_name(sets: Sets, tmp_path: Path) -> None:
    mixed: Sets = {split: dict(sets["train"]) for split in SPLITS}
    write_folders(tmp_path / "theirs", mixed)
    refuse(tmp_path / "theirs", "every class in every split, as timm/mini-imagenet has")


def test_timms_parquet_is_refused_by_name(sets: Sets, tmp_path: Path) -> None:
    few = dict(list(sets["train"].items())[:5])
    write_parquet(tmp_path / "theirs", dict.fromkeys(SPLITS, few))
    refuse(tmp_path / "theirs", "as timm/mini-imagenet has")


def test_splits_that_share_a_class_are_refused(sets: Sets, tmp_path: Path) -> None:
    shared = next(iter(sets["train"]))
    write_folders(
        tmp_path / "theirs", sets | {"test": sets["test"] | {shared: sets["train"][shared]}}
    )
    refuse(tmp_path / "theirs", f"class {shared} is in train and in test")


def test_wrong_counts_are_named_with_both_numbers(sets: Sets, tmp_path: Path) -> None:
    fewer = dict(list(sets["val"].items())[1:])
    write_pickles(tmp_path / "theirs", sets | {"val": fewer})
    refuse(tmp_path / "theirs", "has 15 val classes, miniImageNet has 16")
    name, images = next(iter(sets["test"].items()))
    write_folders(tmp_path / "folders", sets | {"test": sets["test"] | {name: images[:2]}})
    refuse(tmp_path / "folders", f"class {name} has 2 images, miniImageNet has 3 of each")


def test_a_missing_split_is_named(sets: Sets, tmp_path: Path) -> None:
    write_pickles(tmp_path / "a", sets)
    (tmp_path / "a" / "mini-imagenet-cache-test.pkl").unlink()
    refuse(tmp_path / "a", r"mini-imagenet-cache-\*\.pkl but none for test")
    write_folders(tmp_path / "b", {"train": sets["train"], "test": sets["test"]})
    refuse(tmp_path / "b", "has train/ and test/ but no val/")
    write_csv(tmp_path / "c", sets)
    (tmp_path / "c" / "val.csv").unlink()
    refuse(tmp_path / "c", r"val\.csv is missing")


def test_lists_that_are_not_ravis_form_are_named(sets: Sets, tmp_path: Path) -> None:
    write_csv(tmp_path / "a", sets)
    path = tmp_path / "a" / "train.csv"
    original = path.read_text()
    path.write_text("image,class\n" + original.split("\n", 1)[1])
    refuse(tmp_path / "a", r"begins with 'image,class': expected filename,label")
    path.write_text(original.replace(".jpg,", ".jpg;", 1))
    refuse(tmp_path / "a", r"train\.csv, line 2: expected filename,label")
    path.write_text(original.replace("\nn", "\n../n", 1))
    refuse(tmp_path / "a", r"train\.csv, line 2: expected filename,label")
    path.write_text(original)
    (tmp_path / "a" / "images" / f"{next(iter(sets['val']))}00000001.jpg").unlink()
    refuse(tmp_path / "a", "lacks 1 of the 300 images in the lists; the first is n0")


def test_other_sets_and_archives_are_refused_by_name(tmp_path: Path) -> None:
    for file, message in (
        ("miniImageNet_category_split_train_phase_train.pickle", "files of Gidaris & Komodakis"),
        ("train_images_png.pkl", "that is tieredImageNet"),
        ("mini-imagenet.zip", "is an archive: unpack it"),
        ("notes.txt", "no layout of miniImageNet is recognized; known are train.csv"),
    ):
        folder = tmp_path / file.replace(".", "_")
        folder.mkdir()
        (folder / file).write_bytes(b"")
        refuse(folder, message)
    refuse(tmp_path / "nowhere", "there is no such folder")


def test_an_unreadable_picture_is_named(sets: Sets, tmp_path: Path) -> None:
    write_folders(tmp_path / "theirs", sets)
    path = next((tmp_path / "theirs" / "val").glob("*/*.png"))
    path.write_bytes(path.read_bytes()[:60])
    refuse(tmp_path / "theirs", f"{path.name} cannot be read as an image")


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


def test_a_pickle_that_would_run_something_is_refused_and_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mini-imagenet-cache-train.pkl"
    for protocol in (0, 2, 4):
        path.write_bytes(pickle.dumps({"image_data": _Harm(), "class_dict": {}}, protocol=protocol))
        with pytest.raises(
            ValueError, match=r"would run \w+\.system: it is not a pickle of images"
        ):
            read_cache_pickle(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_damaged_and_foreign_pickles_are_named(sets: Sets, tmp_path: Path) -> None:
    write_pickles(tmp_path, sets)
    path = tmp_path / "mini-imagenet-cache-test.pkl"
    whole = path.read_bytes()
    images, classes = cache_content(sets["test"])
    for data, message in (
        (whole[: len(whole) // 2], "is not a complete pickle"),
        (b"", "is not a complete pickle"),
        (b"<!DOCTYPE html>", "is not a complete pickle"),
        (pickle.dumps([1, 2]), "has no `image_data` and `class_dict`"),
        (pickle.dumps({"data": images, "labels": [1]}), "has no `image_data` and `class_dict`"),
        (
            pickle.dumps({"image_data": images / 255.0, "class_dict": classes}),
            "image_data is float64 of shape",
        ),
        (
            pickle.dumps({"image_data": images[:-1], "class_dict": classes}),
            "class_dict names 60 different rows, image_data has 59",
        ),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_cache_pickle(path)


def test_damaged_hdf5_and_parquet_are_named(sets: Sets, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    write_hdf5(tmp_path / "h", sets)
    path = tmp_path / "h" / "val_data.hdf5"
    path.write_bytes(path.read_bytes()[:2000])
    refuse(tmp_path / "h", r"val_data\.hdf5 is not a complete HDF5 file")
    with h5py.File(path, "w") as file:
        file.create_group("other")
    refuse(tmp_path / "h", "has no group `datasets`")
    write_parquet(tmp_path / "p", sets)
    path = next((tmp_path / "p" / "data").glob("val*-00001-*"))
    path.write_bytes(path.read_bytes()[:500])
    refuse(tmp_path / "p", "is not a complete parquet file")
    path.unlink()
    refuse(tmp_path / "p", "has 1 of 2 validation files")


@pytest.mark.parametrize(
    ("module", "file", "extra"),
    [("h5py", "{}_data.hdf5", "hdf5"), ("pyarrow", "{}-00000-of-00001.parquet", "parquet")],
)
def test_a_missing_extra_is_named_with_the_command(
    module: str, file: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "theirs").mkdir()
    for split in SPLITS:
        (tmp_path / "theirs" / file.format(split)).write_bytes(b"")
    refuse(tmp_path / "theirs", rf"which need an extra: pip install 'metarun\[{extra}\]'")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no system that shows mappings")
def test_processes_share_the_images_which_nothing_alters(sets: Sets, tmp_path: Path) -> None:
    write_pickles(tmp_path / "theirs", sets)
    store = import_miniimagenet(tmp_path / "theirs", tmp_path / "root")
    sizes: dict[Split, EpisodeSize] = {split: EpisodeSize(5, 1, 2) for split in SPLITS}
    source = make_source(MiniImageNet, root=str(tmp_path / "root"), sizes=sizes)
    for split in SPLITS:
        source.batch(split, 0, 4)
        mapping = mapped(tmp_path / "root" / "miniimagenet" / f"{split}.npy")
        # The pages were read, and none is a private copy of this process.
        assert mapping["Rss"] > 0
        assert mapping["Anonymous"] == mapping["Private_Dirty"] == 0
    store.verify()


def mapped(path: Path) -> dict[str, int]:
    """Return the sizes of a file's mapping in this process, in kB by name."""
    text = Path("/proc/self/smaps").read_text()
    (found,) = re.findall(rf"{re.escape(str(path))}\n((?:\w+: .*\n)+)", text)
    return {name: int(size) for name, size in re.findall(r"(\w+): +(\d+) kB", found)}
