"""Cached images equal decoded ones, and an invalid cache is rebuilt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metarun.core.types import SPLITS
from metarun.data import image_files
from metarun.data.folder import Folder
from metarun.data.storage import prepared_images as prepared_module
from tests.data.sources import make_source, sizes, write_class_folders

NAMES = [f"class{number}" for number in range(12)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a folder with enough images for the cache."""
    monkeypatch.setenv("METARUN_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(prepared_module, "KEPT_FROM", 48)
    write_class_folders(tmp_path / "photos", dict.fromkeys(NAMES, 4))
    return tmp_path / "photos"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the list of the files that are decoded from now on."""
    seen: list[Path] = []
    read = image_files.open_image

    def counted(path: Path) -> Any:
        seen.append(path)
        return read(path)

    monkeypatch.setattr(image_files, "open_image", counted)
    return seen


def load(root: Path, **options: Any) -> Folder:
    small = {"sizes": sizes(way=2, shot=1, query=2), "image_size": 8}
    return make_source(Folder, root=str(root), **(small | options))


def stores(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "data" / "prepared").iterdir())


def alike(one: Folder, other: Folder) -> bool:
    batches = [(one.batch(split, 3, 2), other.batch(split, 3, 2)) for split in SPLITS]
    return one.fingerprint() == other.fingerprint() and all(
        torch.equal(a.support_x, b.support_x) and torch.equal(a.query_x, b.query_x)
        for a, b in batches
    )


def test_pictures_are_decoded_once(
    root: Path, decoded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(root)
    assert len(decoded) == 48
    again = load(root)
    assert len(decoded) == 48
    monkeypatch.setattr(prepared_module, "KEPT_FROM", 49)
    config = load(root)
    assert len(decoded) == 96
    assert alike(first, config)
    assert alike(again, config)


def test_what_is_kept_is_mapped_from_the_disk(root: Path, tmp_path: Path) -> None:
    load(root)
    (place,) = stores(tmp_path)
    store = prepared_module.open_store(place)
    assert store is not None
    kept = prepared_module._kept(place, store.facts["listing"])
    assert kept is not None
    assert all(isinstance(kept.images[split], np.memmap) for split in SPLITS)


def test_few_pictures_are_not_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_module, "KEPT_FROM", 49)
    load(root)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("change", ["written", "added", "renamed"])
def test_changed_pictures_are_decoded_again(
    root: Path, tmp_path: Path, decoded: list[Path], change: str
) -> None:
    load(root)
    picture = sorted((root / NAMES[0]).iterdir())[0]
    if change == "written":
        other = sorted((root / NAMES[1]).iterdir())[0]
        stat = picture.stat()
        picture.write_bytes(other.read_bytes())
        os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "added":
        (root / NAMES[0] / "new.png").write_bytes(picture.read_bytes())
    else:
        picture.rename(picture.with_stem("zzz"))
    decoded.clear()
    load(root)
    assert len(decoded) == 48 + (change == "added")
    assert len(stores(tmp_path)) == 1


def test_what_cannot_be_read_is_left_out_of_the_cache_too(
    root: Path, decoded: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    bad = root / NAMES[3] / "0001.png"
    bad.write_bytes(b"no image")
    first = load(root, skip_unreadable=True)
    assert len(decoded) == 48
    again = load(root, skip_unreadable=True)
    assert len(decoded) == 48
    assert alike(first, again)
    assert "1 of 48 images cannot be read (class3/0001.png) and are left out" in caplog.text
    with pytest.raises(ValueError, match="skip_unreadable=true to go on without it"):
        load(root)


def test_another_size_is_kept_beside(root: Path, tmp_path: Path, decoded: list[Path]) -> None:
    load(root)
    load(root, image_size=9)
    load(root, grayscale=True)
    load(root, val_fraction=0.3)
    assert len(stores(tmp_path)) == 4
    decoded.clear()
    assert load(root).spec.input_shape == (3, 8, 8)
    assert load(root, image_size=9).spec.input_shape == (3, 9, 9)
    assert load(root, grayscale=True).spec.input_shape == (1, 8, 8)
    assert not decoded


@pytest.mark.parametrize("damage", ["cut", "meta", "header", "facts"])
def test_what_is_damaged_is_made_again(
    root: Path, tmp_path: Path, decoded: list[Path], damage: str
) -> None:
    first = load(root)
    (place,) = stores(tmp_path)
    array = place / "val.npy"
    if damage in ("cut", "header"):
        content = array.read_bytes()
        # Not in its place, because the first process still reads it.
        array.unlink()
        array.write_bytes(b"short" if damage == "cut" else bytes(64) + content[64:])
    else:
        meta = (place / "meta.json").read_text()
        facts = meta.replace('"mean"', '"meen"')
        (place / "meta.json").write_text("{" if damage == "meta" else facts)
    decoded.clear()
    assert alike(load(root), first)
    assert len(decoded) == 48
    assert alike(load(root), first)
    assert len(decoded) == 48


def test_a_place_that_cannot_be_written_is_done_without(
    root: Path, tmp_path: Path, decoded: list[Path]
) -> None:
    (tmp_path / "data").write_text("a file where the folder would be")
    first = load(root)
    assert alike(load(root), first)
    assert len(decoded) == 96


def test_a_picture_that_is_gone_is_named(root: Path) -> None:
    (root / NAMES[0] / "zzz.png").symlink_to(root / "nowhere.png")
    with pytest.raises(ValueError, match=r"zzz\.png"):
        load(root)


def test_what_another_process_kept_meanwhile_stays(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(root)
    (place,) = stores(tmp_path)
    born = place.stat().st_ino
    found = prepared_module._kept
    answers = iter([None])
    monkeypatch.setattr(prepared_module, "_kept", lambda *args: next(answers, found(*args)))
    assert alike(load(root), first)
    assert place.stat().st_ino == born
