"""Small sources and files in the real layouts, for the tests of the data."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from metarun.core.types import SPLITS, EpisodeSize, SourceSetup, Split, TaskBatch
from metarun.data.augmentation import Augmentation
from metarun.data.episodes import ClassEpisodes, ClassTable
from metarun.data.storage.image_files import photograph
from metarun.data.storage.omniglot_files import NUM_DRAWINGS, PARTS, characters

CPU = torch.device("cpu")
FIELDS = ("support_x", "support_y", "query_x", "query_y")


def sizes(
    way: int = 5, shot: int = 1, query: int = 3, *, train: EpisodeSize | None = None
) -> dict[Split, EpisodeSize]:
    everywhere = EpisodeSize(way, shot, query)
    return {"train": train or everywhere, "val": everywhere, "test": everywhere}


def make_source(kind: Any, **given: Any) -> Any:
    """Build a source. What `SourceSetup` has a name for is its setup, the rest are its options."""
    values = {"sizes": sizes(), "seed": 0, "eval_seed": 1, "device": CPU, "dtype": torch.float32}
    values |= given
    named = {field.name for field in fields(SourceSetup)} & values.keys()
    setup = SourceSetup(**{name: values.pop(name) for name in named})
    return kind(setup, **values)


def numbered_table(counts: tuple[int, ...], side: int = 4, prefix: str = "c") -> ClassTable:
    """Return images whose first pixels encode class, image number and orientation."""
    images = torch.zeros(sum(counts), 1, side, side, dtype=torch.uint8)
    row = 0
    for number, count in enumerate(counts):
        for place in range(count):
            images[row, 0, 0, :3] = torch.tensor([number + 1, place + 1, 255], dtype=torch.uint8)
            row += 1
    names = tuple(f"{prefix}{number}" for number in range(len(counts)))
    return ClassTable(images, names, counts)


def numbered(
    counts: tuple[int, ...] = (6, 9, 7, 20, 8, 6, 11),
    groups: tuple[str, ...] | None = None,
    **how: Any,
) -> ClassEpisodes:
    """Return episodes from `numbered_table`, with a different table for each split."""
    tables: dict[Split, ClassTable] = {}
    for split in SPLITS:
        table = numbered_table(counts, prefix=split)
        tables[split] = ClassTable(table.images, table.names, table.counts, groups)
    options: dict[str, Any] = {
        "name": "numbered",
        "tables": tables,
        "prepare": lambda image: photograph(image, 4, crop=True, grayscale=True),
    }
    return make_source(ClassEpisodes, **(options | how))  # type: ignore[no-any-return]


def augmented(**how: Any) -> ClassEpisodes:
    augmentation = Augmentation(
        degrees=20.0,
        translate=0.2,
        scale=0.3,
        shear=10.0,
        elastic=0.05,
        flip=True,
        color=0.4,
    )
    return numbered(augmentation=augmentation, **how)


def assert_same(a: TaskBatch, b: TaskBatch) -> None:
    for field in FIELDS:
        torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=0.0, atol=0.0)
    assert (a.class_ids is None) == (b.class_ids is None)
    if a.class_ids is not None and b.class_ids is not None:
        assert torch.equal(a.class_ids, b.class_ids)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def omniglot_drawings() -> Iterator[tuple[str, str, bytes]]:
    """Yield (part, path inside it, bytes) of a generated set in Omniglot's full layout."""
    pool = []
    generator = np.random.default_rng(0)
    for _ in range(64):
        pixels = np.ones((105, 105), dtype=bool)
        top, left = generator.integers(5, 60, 2)
        pixels[top : top + 30, left : left + 12] = False
        pool.append(png(Image.fromarray(pixels)))
    for number, character in enumerate(characters(), start=1):
        for place in range(1, NUM_DRAWINGS + 1):
            path = f"{character.name}/{number:04d}_{place:02d}.png"
            yield character.part, path, pool[(number * 7 + place) % len(pool)]


def write_omniglot_zips(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    archives = {part: zipfile.ZipFile(folder / f"{part}.zip", "w") for part in PARTS}
    for part, path, data in omniglot_drawings():
        archives[part].writestr(f"{part}/{path}", data)
    for archive in archives.values():
        archive.close()


def write_photos(folder: Path, count: int, shade: int = 0, side: int = 12) -> None:
    """Write uniform images of different brightness."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(count):
        color = (shade % 256, (place * 20) % 256, 128)
        Image.new("RGB", (side + 3, side), color).save(folder / f"{place:04d}.png")


def write_class_folders(root: Path, counts: dict[str, int]) -> None:
    for number, (name, count) in enumerate(counts.items()):
        write_photos(root / name, count, shade=number * 25)
