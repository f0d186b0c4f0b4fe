"""Reading and preparing single images, without torch."""

from __future__ import annotations

import functools
import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from metarun.core.checks import within
from metarun.data.storage.cache import Pixels

Resize = Literal["paper", "antialias"]

_NOT_READ = ("EPS", "MPEG")
"""Formats that Pillow opens and we do not: it runs Ghostscript for one, and cannot read the
pictures of the other."""

DRAWING_SIZE = 28
_LARGEST_SIDE = 4096
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, struct.error)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that makes an image upright, by the orientation in its EXIF data."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Return the formats of images that Pillow can read here, in the order in which it tries."""
    Image.init()
    stubs = {  # Formats that Pillow recognizes, without a decoder.
        name
        for name, (kind, _) in Image.OPEN.items()
        if isinstance(kind, type) and issubclass(kind, ImageFile.StubImageFile)
    }
    return tuple(n for n in Image.ID if n in Image.OPEN and n not in stubs and n not in _NOT_READ)


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of files that are taken as images, in lower case, such as `.png`."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in formats())


def open_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """Read an image completely, from a file or from its bytes.

    Args:
        source: Path or content of the file.
        name: Name for messages; by default the path.

    Raises:
        ValueError: The file is missing, truncated, no image, or one of more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`; the message names it.
    """
    with _opened(source, name) as image:
        image.load()
        return image


def size_of(path: Path) -> tuple[int, int]:
    """Return width and height of an image file in pixels, without decoding it; see `open_image`."""
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(source: str | Path | bytes, name: str | None = None) -> Iterator[Image.Image]:
    name = name or (str(source) if isinstance(source, str | Path) else "an image")
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=formats()) as image:
            # Pillow only warns of these, and reads them: a small file may hold gigabytes.
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(f"its size is {image.width} x {image.height} pixels")
            yield image
    except FileNotFoundError:
        raise ValueError(f"there is no image {name}: check the path") from None
    # Pillow raises many kinds of exceptions for damaged files.
    except (*_DAMAGED, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{name} cannot be read as an image ({reason}): replace or remove it"
        ) from None


def drawing(image: Image.Image, resize: Resize, side: int = DRAWING_SIZE) -> Pixels:
    """Convert a drawing to (side, side) uint8, with ink 255 and paper 0.

    `resize=paper` keeps 1-bit images at 1 bit and takes the nearest pixel. Pillow does this to
    1-bit images with any filter, so the code of MAML and ProtoNet did it too. `resize=antialias`
    gives gray levels.
    """
    size = (side, side)
    if image.mode != "1":
        image = on_paper(image, "L")
    if resize == "antialias":
        image = image.convert("L").resize(size, Image.Resampling.LANCZOS)
        return 255 - np.asarray(image, dtype=np.uint8)
    if image.mode != "1":
        image = image.convert("1", dither=Image.Dither.NONE)
    return np.where(np.asarray(image.resize(size, Image.Resampling.NEAREST)), 0, 255).astype(
        np.uint8
    )


def photograph(image: Image.Image, size: int, *, crop: bool, grayscale: bool = False) -> Pixels:
    """Convert a photograph to (C, size, size) uint8.

    Args:
        image: Image of any size and mode.
        size: Side of the result in pixels.
        crop: Whether to crop to the largest central square instead of stretching the image.
        grayscale: Whether the result has one channel instead of three.
    """
    image = upright(image)
    image = on_paper(image, "L" if grayscale else "RGB")
    if image.size != (size, size):
        filter_ = Image.Resampling.LANCZOS
        square = (size, size)
        image = ImageOps.fit(image, square, filter_) if crop else image.resize(square, filter_)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if grayscale else np.ascontiguousarray(pixels.transpose(2, 0, 1))


@dataclass(frozen=True, slots=True)
class Photograph:
    """`photograph` with its options bound, which a run can record."""

    size: int
    crop: bool
    grayscale: bool = False

    def __post_init__(self) -> None:
        within("", f"[1, {_LARGEST_SIDE}]", size=self.size)

    def __call__(self, image: Image.Image) -> Pixels:
        """Convert one image to (C, size, size) uint8."""
        return photograph(image, self.size, crop=self.crop, grayscale=self.grayscale)


@dataclass(frozen=True, slots=True)
class Drawing:
    """`drawing` with its options bound, which a run can record."""

    resize: Resize
    side: int = DRAWING_SIZE

    def __post_init__(self) -> None:
        within("", f"[1, {_LARGEST_SIDE}]", side=self.side)
        if self.resize not in get_args(Resize):
            raise ValueError(f"resize={self.resize}: expected one of {get_args(Resize)}")

    def __call__(self, image: Image.Image) -> Pixels:
        """Convert one image to (1, side, side) uint8."""
        return drawing(image, self.resize, self.side)[None]


def upright(image: Image.Image) -> Image.Image:
    """Rotate an image as its EXIF data says.

    `exif_transpose` is not used because it also writes EXIF data, which fails on invalid data.
    """
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def on_paper(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to a mode, with transparent areas on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in ("I", "I;16", "I;16B", "F"):
        image = _to_bytes(image)
    return image.convert(mode)


def has_colors(image: Image.Image) -> bool:
    """Return whether one pixel in a hundred differs between its channels by a fifth or more."""
    small = np.asarray(on_paper(image, "RGB").resize((32, 32)), dtype=np.int64)
    return bool(((small.max(2) - small.min(2)) > 51).mean() > 0.01)


def picture(image: Any, position: int) -> Image.Image:
    """Convert a path, a PIL image or an array to a PIL image.

    Args:
        image: Image given by the user.
        position: Index of the image, for messages.

    Raises:
        ValueError: The image is none of these, or its values are out of range.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        return open_image(image)
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    is_picture = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not is_picture or array.dtype.kind not in "buif" or array.size == 0:
        raise ValueError(
            f"image {position} is an array of shape {np.shape(image)} and type {array.dtype}: "
            "numbers of shape (H, W), (H, W, C) or (C, H, W) are expected"
        )
    return Image.fromarray(_as_bytes(array, position))


def _as_bytes(array: np.ndarray[Any, Any], position: int) -> Pixels:
    if array.dtype.kind in "bf":
        array = array.astype(np.float64)
        if not (np.isfinite(array).all() and array.min() >= 0.0 and array.max() <= 1.0):
            raise ValueError(f"image {position} has values outside [0, 1]: scale it, or use uint8")
        array = np.rint(array * 255.0)
    elif array.min() < 0 or array.max() > 255:
        raise ValueError(f"image {position} has values outside 0 to 255: scale it")
    return np.ascontiguousarray(array.astype(np.uint8))


def _to_bytes(image: Image.Image) -> Image.Image:
    """Scale gray values beyond 8 bits, which Pillow's own conversion would clip at 255."""
    values = np.asarray(image, dtype=np.float64)
    most = 65535.0 if values.max(initial=0.0) > 255.0 else 255.0
    return Image.fromarray(np.clip(values * (255.0 / most), 0.0, 255.0).astype(np.uint8))
