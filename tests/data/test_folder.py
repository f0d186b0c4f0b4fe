"""Folders of a user's images: layouts, checks of counts, and pixels."""

from __future__ import annotations

import re
import shutil
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metarun.core.types import SPLITS, EpisodeSize
from metarun.data.folder import Folder, list_folder
from metarun.data.storage.image_files import open_image, photograph
from tests.data.sources import make_source, sizes, write_class_folders, write_photos

NAMES = [f"class{number}" for number in range(12)]


def folder(root: Path, **options: Any) -> Folder:
    small = {"sizes": sizes(way=2, shot=1, query=2), "image_size": 8}
    return make_source(Folder, root=str(root), **(small | options))


@pytest.fixture
def one_folder(tmp_path: Path) -> Path:
    write_class_folders(tmp_path / "all", dict.fromkeys(NAMES, 4))
    return tmp_path / "all"


@pytest.fixture
def split_folders(tmp_path: Path) -> Path:
    for number, word in enumerate(("train", "val", "test")):
        write_class_folders(tmp_path / "s" / word, dict.fromkeys(NAMES[number * 4 :][:4], 4))
    return tmp_path / "s"


def test_one_folder_is_split_by_a_hash_of_the_names(one_folder: Path, tmp_path: Path) -> None:
    source = folder(one_folder)
    names = {split: set(source.class_names(split)) for split in SPLITS}
    assert [len(names[split]) for split in SPLITS] == [7, 2, 3]
    assert set.union(*names.values()) == set(NAMES)
    moved = one_folder.rename(tmp_path / "elsewhere")
    (moved / "notes.txt").write_text("not a class")
    again = folder(moved)
    assert {split: set(again.class_names(split)) for split in SPLITS} == names
    assert again.fingerprint() == source.fingerprint()


def test_shares_of_the_split_can_be_set(one_folder: Path) -> None:
    source = folder(one_folder, val_fraction=0.25, test_fraction=0.5)
    assert [source.num_classes(split) for split in SPLITS] == [3, 3, 6]


def test_split_folders_are_taken_as_they_are(split_folders: Path) -> None:
    source = folder(split_folders)
    assert [source.class_names(split) for split in SPLITS] == [
        tuple(NAMES[:4]),
        tuple(NAMES[4:8]),
        tuple(sorted(NAMES[8:])),
    ]
    (split_folders / "val").rename(split_folders / "validation")
    assert folder(split_folders).class_names("val") == tuple(NAMES[4:8])


def test_rows_are_the_pictures_cut_square_and_normalized(split_folders: Path) -> None:
    source = folder(split_folders)
    batch = source.batch("train", 0, 200)
    assert batch.support_x.shape == (200, 2, 3, 8, 8)
    images = source._tables["train"].images
    expected = photograph(Image.open(split_folders / "train" / "class1" / "0002.png"), 8, crop=True)
    np.testing.assert_array_equal(images[4 + 2].numpy(), expected)
    everything = source._normalize(images / 255.0)
    # Within a class, images differ only in green.
    assert everything[:, 1].mean().abs() < 1e-4
    assert everything[:, 1].std(correction=0) == pytest.approx(1.0, abs=1e-3)


def test_gray_pictures_have_one_channel(one_folder: Path) -> None:
    assert folder(one_folder, grayscale=True).spec.input_shape == (1, 8, 8)


def test_a_users_picture_is_prepared_as_the_data_were(split_folders: Path) -> None:
    source = folder(split_folders)
    path = split_folders / "val" / "class5" / "0001.png"
    row = source.prepare([path])[0]
    images = source._tables["val"].images
    torch.testing.assert_close(row, source._normalize(images[4 + 1] / 255.0))


def test_a_photograph_is_turned_as_the_camera_says() -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))
    image.getexif()[0x0112] = 6  # the camera was rotated: rotate the image by 90 degrees clockwise
    pixels = photograph(image, 8, crop=True, grayscale=True)[0]
    assert (pixels[:, 4:] == 255).all()
    assert (pixels[:, :4] == 0).all()


def test_a_photograph_with_odd_exif_data_is_turned_all_the_same() -> None:
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    resolution = struct.pack("<HHI4s", 0x011A, 2, 2, b"a")  # text instead of a ratio
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + turned + resolution + bytes(4)
    drawn = Image.new("L", (32, 32), 255)
    drawn.paste(0, (0, 0, 16, 32))
    drawn.save(file := BytesIO(), "JPEG", exif=exif)
    pixels = photograph(Image.open(file), 32, crop=True, grayscale=True)[0]
    assert pixels[:8].max() < 50
    assert pixels[-8:].min() > 200


def test_deep_grays_keep_their_contrast() -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    pixels = photograph(Image.fromarray(values), 8, crop=True, grayscale=True)[0]
    np.testing.assert_allclose(pixels, values / 257.0, atol=1.0)


def test_a_class_with_too_few_images_is_named_before_any_is_read(split_folders: Path) -> None:
    write_photos(split_folders / "train" / "rare", 1)
    (split_folders / "train" / "rare" / "0000.png").write_bytes(b"unreadable")
    with pytest.raises(
        ValueError, match=r"class rare has 1 images, 1\+2 are needed: add images or set data\.min"
    ):
        folder(split_folders)
    write_photos(split_folders / "train" / "rare", 3)
    own = sizes(way=2, shot=1, query=2, train=EpisodeSize(2, 1, 3))
    with pytest.raises(
        ValueError,
        match=r"class rare has 3 images, 1\+3 are needed: lower train.query to 2 "
        r"or set data\.min_per_class=4 to drop it",
    ):
        folder(split_folders, sizes=own)


def test_classes_too_small_for_evaluation_too_name_the_key_that_was_typed(
    one_folder: Path,
) -> None:
    # As with `query=9` on the command line, from which train.query takes its value.
    size = EpisodeSize(2, 1, 9)
    own = {"val": size, "test": size, "train": size}
    with pytest.raises(ValueError, match=r"1\+9 are needed: lower query to 3$"):
        folder(one_folder, sizes=own)


def test_small_classes_can_be_dropped(split_folders: Path) -> None:
    write_photos(split_folders / "train" / "rare", 1)
    source = folder(split_folders, min_per_class=3)
    assert "rare" not in source.class_names("train")


def test_what_is_left_out_is_counted_once(
    split_folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = split_folders / "train" / "class1"
    for name in ("a.txt", "b.TXT", "film.mpg", "page.eps", "README", ".hidden"):
        (place / name).write_text("no image")
    (place / "more").mkdir()
    for _ in range(2):
        folder(split_folders)
    assert [record.getMessage() for record in caplog.records] == [
        f"{split_folders}: folders in class folders are not read: train/class1/more",
        f"{split_folders}: 5 entries of class folders left out, not images "
        "(.txt: 2, .eps: 1, .mpg: 1, no suffix: 1)",
    ]
    caplog.clear()
    write_photos(split_folders / "train" / "rare", 1)
    write_photos(split_folders / "train" / "odd", 2)
    for _ in range(2):
        folder(split_folders, min_per_class=3)
    assert [record.getMessage() for record in caplog.records] == [
        f"{split_folders / 'train'}: data.min_per_class=3 leaves out 2 of 6 classes: odd, rare"
    ]


@pytest.mark.parametrize("suffix", [".jfif", ".AVIF", ".jp2", ".tga", ".png", ".Webp"])
def test_images_of_every_suffix_that_pillow_reads_are_taken(
    suffix: str, split_folders: Path
) -> None:
    if suffix.lower() not in Image.registered_extensions():
        pytest.skip("this Pillow does not read it")
    file = split_folders / "train" / "class1" / f"one{suffix}"
    Image.new("RGB", (8, 8), "red").save(file)
    images = [image for group in list_folder(split_folders)["train"].values() for image in group]
    assert file in images
    assert open_image(file).size == (8, 8)


def test_postscript_is_not_run_even_under_the_name_of_an_image(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        open_image(tmp_path / "a.png")


def test_an_unreadable_picture_is_named(one_folder: Path) -> None:
    path = one_folder / "class3" / "0001.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"class3/0001\.png cannot be read as an image"):
        folder(one_folder)


def broken(root: Path, count: int) -> list[Path]:
    """Damage some images of a folder."""
    paths = sorted(root.rglob("0003.png"))[:count]
    for path in paths:
        path.write_bytes(path.read_bytes()[:50])
    return paths


def test_all_unreadable_pictures_are_named_at_once(one_folder: Path) -> None:
    names = [f"{path.parent.name}/0003.png" for path in broken(one_folder, 7)]
    with pytest.raises(ValueError, match="7 of 48 images cannot be read") as error:
        folder(one_folder)
    assert sum(name in str(error.value) for name in names) == 5
    assert str(error.value).endswith(
        "and 2 more): replace or remove them, or set data.skip_unreadable=true to go on without "
        "them"
    )


def test_unreadable_pictures_can_be_left_out(
    one_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = broken(one_folder, 3)
    source = folder(one_folder, skip_unreadable=True)
    assert "3 of 48 images cannot be read (" in caplog.text
    with pytest.raises(ValueError, match=r"has 3 images, 1\+3 are needed"):
        folder(one_folder, skip_unreadable=True, sizes=sizes(way=2, shot=1, query=3))
    for path in bad:
        path.unlink()
    assert folder(one_folder).fingerprint() == source.fingerprint()


def test_other_layouts_are_refused_with_what_to_do(one_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_class_folders(tmp_path / "few", dict.fromkeys(NAMES[:5], 3))
    write_class_folders(tmp_path / "half" / "train", dict.fromkeys(NAMES[:3], 3))
    write_class_folders(tmp_path / "half" / "val", dict.fromkeys(NAMES[3:6], 3))
    (one_folder / "hollow").mkdir()
    for root, message in (
        (tmp_path / "empty", "has no class folders"),
        (tmp_path / "few", "has 5 classes, 6 or more are needed"),
        (tmp_path / "half", "has train/ and val/ but no test/"),
        (one_folder, r"hollow has no images: put some in, or set data.min_per_class=1"),
    ):
        with pytest.raises(ValueError, match=message):
            list_folder(root)
    for missing, message in (
        (None, "data=folder needs data.root=PATH"),
        (str(tmp_path / "none"), "there is no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            make_source(Folder, root=missing)
    write_class_folders(tmp_path / "half" / "test", dict.fromkeys(NAMES[:3], 3))
    with pytest.raises(ValueError, match="class class0 is in train and in test"):
        list_folder(tmp_path / "half")
    write_class_folders(tmp_path / "flat" / "train" / "class0", dict.fromkeys("abcdefg", 3))
    with pytest.raises(ValueError, match="class0 has no images but the folders a, b, c, d, e: put"):
        list_folder(tmp_path / "flat" / "train")


def test_classes_for_validation_are_cut_from_train_where_there_are_none(
    split_folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for image in (split_folders / "val").iterdir():
        image.rename(split_folders / "train" / image.name)
    (split_folders / "val").rmdir()
    found = list_folder(split_folders, val_fraction=0.3)
    assert [len(found[split]) for split in SPLITS] == [6, 2, 4]
    assert found["train"].keys() | found["val"].keys() == set(NAMES[:8])
    named = ", ".join(sorted(found["val"]))
    assert f"has no val/: 2 of the 8 classes of train/ are taken for validation ({named})" in (
        caplog.text
    )
    moved = split_folders.rename(split_folders.with_name("moved"))
    again = list_folder(moved, val_fraction=0.3)
    assert {split: list(again[split]) for split in SPLITS} == {
        split: list(found[split]) for split in SPLITS
    }
    for name in [*found["train"], *found["val"]][3:]:
        (moved / "train" / name).rename(moved / "test" / name)
    with pytest.raises(ValueError, match="has no val/, and 3 classes in train/: 4 or more"):
        list_folder(moved)


def test_the_smallest_class_is_named_with_what_would_do(split_folders: Path) -> None:
    write_photos(split_folders / "test" / "scarce", 3)
    write_photos(split_folders / "train" / "rare", 2)
    own = sizes(way=2, shot=1, query=15, train=EpisodeSize(2, 1, 5))
    with pytest.raises(
        ValueError,
        match=r"scarce has 3 images, 1\+15 are needed: lower query to 2 and train\.query to 1$",
    ):
        folder(split_folders, sizes=own)
    own = sizes(way=2, shot=3, query=1, train=EpisodeSize(2, 1, 2))
    with pytest.raises(
        ValueError, match=r"lower shot to 2 and .* or set data.min_per_class=4 to drop 2 of 14 cl"
    ):
        folder(split_folders, sizes=own)


def test_the_side_is_the_median_of_the_shorter_sides_between_28_and_84(tmp_path: Path) -> None:
    for side, expected in ((12, 28), (40, 40), (300, 84)):
        root = tmp_path / str(side)
        for name in NAMES[:6]:
            write_photos(root / name, 4, side=side)
        write_photos(root / NAMES[0], 1, side=999)
        source = folder(root, image_size=None)
        assert source.resolved_options == {"image_size": expected}
        assert source.spec.input_shape == (3, expected, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 4}, "data.image_size=4: expected 8 to 512"),
        ({"min_per_class": 0}, "data.min_per_class=0: expected 1 or more"),
        ({"val_fraction": 0.0}, "data.val_fraction=0.0: expected a number in (0, 1)"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave no class to train on"),
    ],
)
def test_impossible_options_are_refused(
    one_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        folder(one_folder, **options)


def test_pictures_that_do_not_fit_into_memory_are_counted_first(
    one_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda _: 90)
    with pytest.raises(ValueError, match=r"48 images of 8 x 8 take .* lower data.image_size"):
        folder(one_folder)


def test_pictures_that_may_not_fit_into_memory_are_warned_of(
    one_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("os.sysconf", lambda _: 150)
    folder(one_folder)
    assert "48 images of 8 x 8 take" in caplog.text
    assert "several times as much: if memory runs out, lower data.image_size" in caplog.text


def test_a_folder_says_what_it_has_and_what_to_expect(one_folder: Path) -> None:
    (note,) = folder(one_folder, image_size=None).notes_for_user
    assert note.startswith(
        f"{one_folder}: 48 images of 12 classes (7/2/3 train/val/test), taken as 28 x 28 pixels; "
        "chance is 50 % (on CIFAR-100, 5-way 1-shot, algo=protonet reached 36 % with 11 "
    )


def test_all_classes_of_a_small_folder_are_a_test(one_folder: Path) -> None:
    for number, child in enumerate(sorted(one_folder.iterdir())):
        if number >= 3:
            shutil.rmtree(child)
    with pytest.raises(ValueError, match="has 3 classes, 6 or more are needed"):
        folder(one_folder)
    source = folder(one_folder, classes="all", sizes=sizes(way=3, shot=1, query=1))
    names = tuple(sorted(child.name for child in one_folder.iterdir()))
    assert all(source.class_names(split) == names for split in SPLITS)
    assert source._tables["val"] is source._tables["train"]
    assert "3 classes (all of them in each split)" in source.notes_for_user[0]
    batch = source.batch("test", 0, 2)
    assert batch.class_ids is not None
    assert batch.class_ids.sort(dim=1).values.tolist() == [[0, 1, 2]] * 2
