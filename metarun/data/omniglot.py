"""Omniglot (Lake et al. 2015): handwritten characters, 20 drawings of each.

`OmniglotSmall` is the part of it that ships with the package; `Omniglot` is the full set.
Ink is 1 and paper is 0, as in the papers.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from metarun.data.augmentation import Augmentation
from metarun.data.images import ClassEpisodes, ClassTable, Episodes, Rotations, on_paper
from metarun.types import EpisodeSize, Split

Resize = Literal["paper", "antialias"]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

SIZE = 28
FILES = Path(__file__).parent / "files"
_SMALL_ARCHIVES = ("images_background_small1", "images_background_small2")
_SMALL_SPLITS: dict[Split, dict[str, str]] = {
    "train": dict.fromkeys(
        ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"), "images_background_small1"
    ),
    "val": {"Tagalog": "images_background_small2"},
    "test": dict.fromkeys(("Japanese_(katakana)", "Sanskrit"), "images_background_small2"),
}


class OmniglotSmall(ClassEpisodes):
    """Eight alphabets that ship with the package.

    Train: Balinese, Early Aramaic, Greek, Korean and Latin (136 characters); val: Tagalog (17);
    test: Japanese (katakana) and Sanskrit (89).

    Args:
        resize: `paper` takes every 3.75th pixel, as the code of MAML and ProtoNet did (Pillow
            resamples 1-bit pictures so, whatever filter is named); `antialias` averages to greys.
        rotations, rotations_eval, episodes: See `ClassEpisodes`.
        affine_degrees, affine_translate, affine_scale, affine_shear: See `Augmentation`.
    """

    def __init__(
        self,
        *,
        resize: Resize = "paper",
        rotations: Rotations = "none",
        rotations_eval: Rotations = "none",
        episodes: Episodes = "any",
        affine_degrees: float = 0.0,
        affine_translate: float = 0.0,
        affine_scale: float = 0.0,
        affine_shear: float = 0.0,
        sizes: Mapping[Split, EpisodeSize],
        seed: int,
        eval_seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        val_way: int | None = None,
    ) -> None:
        check_resize(resize)
        super().__init__(
            name="omniglot_small",
            tables=_small_tables(resize),
            sizes=sizes,
            val_way=val_way,
            seed=seed,
            eval_seed=eval_seed,
            device=device,
            dtype=dtype,
            rotations=rotations,
            rotations_eval=rotations_eval,
            episodes=episodes,
            augmentation=Augmentation(
                affine_degrees=affine_degrees,
                affine_translate=affine_translate,
                affine_scale=affine_scale,
                affine_shear=affine_shear,
            ),
            prepare=lambda image: prepare(image, resize)[None],
        )


def check_resize(resize: str) -> None:
    if resize not in ("paper", "antialias"):
        raise ValueError(f"data.resize={resize} is unknown: choose paper or antialias")


def prepare(image: Image.Image, resize: Resize) -> Pixels:
    """A drawing of any size as (28, 28) uint8, ink 255 and paper 0."""
    if image.mode != "1":
        image = on_paper(image, "L")
    if resize == "antialias":
        image = image.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        return 255 - np.asarray(image, dtype=np.uint8)
    if image.mode != "1":
        image = image.convert("1", dither=Image.Dither.NONE)
    image = image.resize((SIZE, SIZE), Image.Resampling.NEAREST)
    return np.where(np.asarray(image), 0, 255).astype(np.uint8)


@lru_cache(maxsize=2)
def _small_tables(resize: Resize) -> dict[Split, ClassTable]:
    archives = {name: _read_archive(FILES / f"{name}.zip", resize) for name in _SMALL_ARCHIVES}
    return {
        split: make_table(
            (character, drawings)
            for alphabet, archive in alphabets.items()
            for character, drawings in archives[archive].items()
            if character.startswith(f"{alphabet}/")
        )
        for split, alphabets in _SMALL_SPLITS.items()
    }


def _read_archive(path: Path, resize: Resize) -> dict[str, list[Pixels]]:
    """The drawings of each character, `Alphabet/characterNN`, in the order of their names."""
    characters: dict[str, list[Pixels]] = {}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".png")):
            _, alphabet, character, _ = name.split("/")
            with Image.open(io.BytesIO(archive.read(name))) as image:
                pixels = prepare(image, resize)
            characters.setdefault(f"{alphabet}/{character}", []).append(pixels)
    return characters


def make_table(characters: Iterable[tuple[str, list[Pixels]]]) -> ClassTable:
    """A split's table from its characters, which stand sorted by alphabet."""
    names, drawings = zip(*characters, strict=True)
    images = np.stack([pixels for character in drawings for pixels in character])
    return ClassTable(
        images=torch.from_numpy(images)[:, None],
        names=names,
        counts=tuple(len(character) for character in drawings),
        groups=tuple(name.split("/")[0] for name in names),
    )
