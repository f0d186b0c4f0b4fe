"""Import of Omniglot's original files into a store, and the list of its characters. No torch."""

from __future__ import annotations

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from metarun.core.types import SPLITS, Split
from metarun.data.storage.cache import Pixels, Store, build_store, open_store
from metarun.data.storage.download import download, file_hash, need_space
from metarun.data.storage.image_files import DRAWING_SIZE, Resize, drawing, open_image

FILES = Path(__file__).parents[1] / "files"
NUM_DRAWINGS = 20
PARTS = ("images_background", "images_evaluation")
ORIGINAL_SIDE = 105
_PACKED_BYTES = -(-(ORIGINAL_SIDE**2) // 8)
_BYTES_NEEDED = 150_000_000


@dataclass(frozen=True, slots=True)
class Character:
    """One of Omniglot's 1,623 characters.

    Attributes:
        part: Name of the archive that contains it.
        alphabet: Name of its alphabet.
        number: Number of the character in the alphabet, from 1.
        vinyals: Part to which it belongs in the split of Vinyals et al. (2016).
    """

    part: str
    alphabet: str
    number: int
    vinyals: Split

    @property
    def name(self) -> str:
        """Name of the form `Alphabet/characterNN`."""
        return f"{self.alphabet}/character{self.number:02d}"


@lru_cache(maxsize=1)
def characters() -> tuple[Character, ...]:
    """Return all characters in the order of the store: by part, alphabet and number."""
    found: list[Character] = []
    text = (FILES / "omniglot_characters.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        part, alphabet, first, last, split = line.split()
        assert split in SPLITS
        found.extend(
            Character(f"images_{part}", alphabet, number, split)
            for number in range(int(first), int(last) + 1)
        )
    return tuple(found)


def fetch_omniglot(
    root: Path, *, prefix: str | None = None, md5: Mapping[str, str] | None = None
) -> Store:
    """Download the two official archives and build the store from them.

    Args:
        root: Folder of the data sets.
        prefix: URL of the archives without their names; by default from torchvision.
        md5: Hashes of the archives; by default from torchvision.

    Raises:
        ValueError: An archive cannot be downloaded.
    """
    if prefix is None or md5 is None:
        from torchvision.datasets import Omniglot

        prefix, md5 = Omniglot.download_url_prefix, Omniglot.zips_md5
    need_space(root, _BYTES_NEEDED)
    folder = root / "omniglot-download"
    for part in PARTS:
        download(f"{prefix}/{part}.zip", folder / f"{part}.zip", md5=md5[part])
    store = import_omniglot(folder, root)
    for part in PARTS:
        (folder / f"{part}.zip").unlink()
    folder.rmdir()
    return store


def import_omniglot(source: Path, root: Path) -> Store:
    """Build the store from files of the user.

    Args:
        source: Folder with the two official zip files or their extracted folders, possibly in
            torchvision's `omniglot-py` or the original repository's `python`; or the path of
            one of the two.
        root: Folder of the data sets.

    Raises:
        ValueError: Files are missing, damaged or unexpected; no partial store is left.
    """
    readers = _find(source)
    for reader in readers.values():
        reader.check()
    need_space(root, _BYTES_NEEDED)
    everyone = characters()
    shape = (len(everyone) * NUM_DRAWINGS, DRAWING_SIZE, DRAWING_SIZE)
    folder = root / "omniglot"
    with build_store(folder) as writer:
        with (
            writer.array("paper", shape) as paper,
            writer.array("antialias", shape) as smooth,
            writer.array("originals", (shape[0], _PACKED_BYTES)) as originals,
        ):
            row = 0
            for character in tqdm(everyone, desc="omniglot", unit="character"):
                for name, data in readers[character.part].drawings(character.name):
                    image = open_image(data, name)
                    if image.size != (ORIGINAL_SIDE, ORIGINAL_SIDE):
                        raise ValueError(
                            f"{name} is {image.width} x {image.height}, Omniglot's drawings are "
                            "105 x 105: import the original files"
                        )
                    paper[row] = drawing(image, "paper")
                    smooth[row] = drawing(image, "antialias")
                    originals[row] = np.packbits(drawing(image, "paper", ORIGINAL_SIDE) > 0)
                    row += 1
        assert row == len(paper)
        writer.facts = {
            "name": "omniglot",
            "source": {part: str(reader.path) for part, reader in readers.items()},
            "md5": {part: reader.md5() for part, reader in readers.items()},
            "classes": len(everyone),
            "images": shape[0],
        }
    store = open_store(folder)
    assert store is not None
    return store


def resized(store: Store, resize: Resize, side: int) -> Pixels:
    """Return all drawings of a store with side x side pixels, (N, side, side).

    Raises:
        ValueError: An earlier version built the store, without the original drawings.
    """
    if side == DRAWING_SIZE:
        return store.array(resize)
    if "originals" not in store.files:
        raise ValueError(
            f"data.image_size={side} needs the original drawings, which {store.folder} does not "
            f"hold: delete it and run `metarun data {store.folder.name}` again"
        )
    ink = np.unpackbits(store.array("originals"), axis=1, count=ORIGINAL_SIDE**2)
    paper = (1 - ink).view(bool).reshape(-1, ORIGINAL_SIDE, ORIGINAL_SIDE)
    return np.stack([drawing(Image.fromarray(one), resize, side) for one in paper])


class _Reader(ABC):
    """Reader of the drawings of one part, from an archive or a folder."""

    def __init__(self, path: Path, part: str) -> None:
        self.path = path
        self._part = part
        self._files: dict[str, list[str]] = {}
        for name in self._names():
            pieces = name.split("/")
            hidden = any(piece.startswith((".", "__MACOSX")) for piece in pieces)
            if len(pieces) < 3 or hidden or not pieces[-1].lower().endswith(".png"):
                continue
            self._files.setdefault("/".join(pieces[-3:-1]), []).append(name)

    def check(self) -> None:
        """Check the names of the characters and the number of drawings of each."""
        expected = {c.name for c in characters() if c.part == self._part}
        found = set(self._files)
        if found != expected:
            odd = sorted(expected - found) or sorted(found - expected)
            what = "is missing" if expected - found else "does not belong there"
            raise ValueError(
                f"{self.path} has {len(found)} characters, Omniglot's {self._part} has "
                f"{len(expected)}: {odd[0]} {what}; get a complete copy"
            )
        for character, files in self._files.items():
            if len(files) != NUM_DRAWINGS:
                raise ValueError(
                    f"{self.path}: {character} has {len(files)} drawings, {NUM_DRAWINGS} are "
                    "expected; get a complete copy"
                )

    def drawings(self, character: str) -> Iterable[tuple[str, bytes]]:
        """Yield the files of a character as (name, bytes), sorted by name."""
        for name in sorted(self._files[character]):
            yield f"{self.path}/{name}", self._read(name)

    def md5(self) -> str | None:
        """Return the hash of an archive; None for a folder."""
        return None

    @abstractmethod
    def _names(self) -> Iterable[str]:
        """Return the relative paths of all files, with slashes."""

    @abstractmethod
    def _read(self, name: str) -> bytes:
        """Return the content of a file."""


class _ZipReader(_Reader):
    def __init__(self, path: Path, part: str) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile:
            raise ValueError(
                f"{path} is not a complete zip file: it is truncated or of another type; get it "
                "again"
            ) from None
        super().__init__(path, part)

    def _names(self) -> Iterable[str]:
        return self._zip.namelist()

    def _read(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError):
            raise ValueError(f"{self.path} is damaged at {name}: get it again") from None

    def md5(self) -> str | None:
        return file_hash(self.path, "md5")


class _FolderReader(_Reader):
    def _names(self) -> Iterable[str]:
        return [path.relative_to(self.path).as_posix() for path in self.path.glob("*/*/*")]

    def _read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


def _find(source: Path) -> dict[str, _Reader]:
    """Find both parts in a folder, in its usual subfolders, or next to a given part."""
    if not source.exists():
        raise ValueError(f"--from {source}: there is no such file or folder")
    inside = source.is_file() or source.name in PARTS
    base = source.absolute().parent if inside else source
    places = [base, *(base / name for name in ("omniglot-py", "omniglot", "python"))]
    places.append(base / "omniglot" / "python")
    found: dict[str, _Reader] = {}
    for part in PARTS:
        for place in places:
            reader = _reader(place, part)
            if reader is not None:
                found[part] = reader
                break
    absent = [part for part in PARTS if part not in found]
    if absent:
        small = any(base.glob("images_background_small*"))
        raise ValueError(
            f"--from {source}: there is neither {absent[0]}.zip nor a folder {absent[0]}"
            + (
                "; the small sets there ship with metarun as data=omniglot_small"
                if small
                else ": name the folder that holds Omniglot's two zips, or what they unpack to"
            )
        )
    return found


def _reader(place: Path, part: str) -> _Reader | None:
    if (place / f"{part}.zip").is_file():
        return _ZipReader(place / f"{part}.zip", part)
    for folder in (place / part / part, place / part):
        if folder.is_dir():
            return _FolderReader(folder, part)
    return None
