"""Where data sets are, and which are present. No torch, so that listing is fast."""

from __future__ import annotations

import difflib
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path

from metarun.data.storage.cache import open_store

Place = Literal["made", "shipped", "store", "folder", "file"]
"""Origin of a data set. `made`: generated, or loaded from a library; `shipped`: part of the
package; `store`: to be downloaded or imported; `folder`: files of the user; `file`: one file of the
user, or one for each split."""

PLACES: dict[str, Place] = {
    "omniglot_small": "shipped",
    "omniglot": "store",
    "miniimagenet": "store",
    "cifar_fs": "store",
    "fc100": "store",
    "tiered_imagenet": "store",
    "cub": "store",
    "mnist": "store",
    "fashion_mnist": "store",
    "kmnist": "store",
    "emnist": "store",
    "torchvision": "store",
    "folder": "folder",
    "features": "file",
    "csv": "file",
}
"""Where the files of data sets are. All others are made."""

TRANSFORMED = ("stream_rotated", "stream_permuted", "stream_rainbow")
"""Streams of the images of any of `SOURCES`, or of a data set of torchvision: `data.source`."""

_READY = ("digits", "omniglot_small")
SOURCES = (*_READY, *(n for n, p in PLACES.items() if p == "store" and n != "torchvision"))

_STORES = {"cifar_fs": "cifar100", "fc100": "cifar100"}
"""Names of stores that are not those of the data sets."""

FILES_OF = {
    "features": "FILE, an .npz, .npy, .parquet or .csv with features and labels",
    "csv": "FILE, a .csv or .parquet with named columns",
}
"""What the file of a data set is, by its name."""

_DOWNLOADS = {
    "omniglot": "14 MB",
    "cifar100": "170 MB",
    "cub": "1.2 GB",
    "mnist": "12 MB",
    "fashion_mnist": "31 MB",
    "kmnist": "21 MB",
    "emnist": "562 MB",
}
"""Sizes of what is downloaded. Others can only be imported."""


def default_root() -> Path:
    """Return the default folder of the data sets: `$METARUN_DATA`, or the system's for caches.

    On Linux that is `$XDG_CACHE_HOME/metarun` or `~/.cache/metarun`. The latter is also used
    elsewhere if it exists, since earlier versions stored the data sets there.
    """
    named = os.environ.get("METARUN_DATA")
    if named:
        return Path(named).expanduser()
    earlier = Path.home() / ".cache" / "metarun"
    return earlier if earlier.is_dir() else user_cache_path("metarun", appauthor=False)


def resolve_root(root: str | os.PathLike[str] | None) -> Path:
    """Return the folder of the data sets that the user set, or the default."""
    return default_root() if root is None else Path(root).expanduser()


def place_of(name: str) -> Place:
    """Return where the files of a data set are; a stream uses the images of another data set."""
    return PLACES.get(name.removeprefix("stream_"), "made")


def missing(
    name: str, root: str | os.PathLike[str] | None = None, file: object = None
) -> str | None:
    """Return a one-line instruction to get a missing data set; None if it is present.

    A stream is present if the data set of its images is.

    Args:
        name: Name of the data set.
        root: Its option `data.root`.
        file: Its option `data.file`: None, a name or several.

    Raises:
        ValueError: The data set is present but damaged.
    """
    typed_name, name, place = name, name.removeprefix("stream_"), place_of(name)
    if place in ("made", "shipped"):
        return None
    if place == "folder":
        return _missing_folder(typed_name, root)
    if place == "file":
        return _missing_file(typed_name, file)
    if name == "torchvision":
        # Many data sets; the source knows which one.
        return None
    return missing_store(store_of(name), root, name)


def store_of(name: str) -> str:
    """Return the name of a data set's store."""
    return _STORES.get(name.removeprefix("stream_"), name.removeprefix("stream_"))


def store_of_source(source: object, root: str | os.PathLike[str] | None = None) -> str | None:
    """Return the store of the images of a stream's `data.source`; None if they need none.

    Args:
        source: One of `SOURCES`, or the name of a class of torchvision.
        root: Folder of the data sets.

    Raises:
        ValueError: There is no such data set, or it is not stored.
    """
    name = str(source)
    if name in _READY:
        return None
    if name in SOURCES:
        store, words = store_of(name), name
    else:
        from metarun.data.storage.torchvision_sets import PARTS, store_name

        if name not in PARTS:
            known = {one.lower(): one for one in (*SOURCES, *PARTS)}
            near = difflib.get_close_matches(name.lower(), known, n=1)
            every = ", ".join(known.values())
            others = f"did you mean {known[near[0]]}?" if near else f"choose from {every}"
            raise ValueError(f"data.source={name}: {others}")
        store, words = store_name(name), f"torchvision {name}"
    absent = missing_store(store, root, words, f"data.source={name}")
    if absent is not None:
        raise ValueError(absent)
    return store


def stored_sources(root: str | os.PathLike[str] | None = None) -> list[str]:
    """Return the names that `data.source` may have without a download or an import."""
    from metarun.data.storage.torchvision_sets import PARTS

    found = []
    for name in (*SOURCES, *PARTS):
        # A damaged store is none.
        with suppress(ValueError):
            store_of_source(name, root)
            found.append(name)
    return found


def missing_store(
    store: str,
    root: str | os.PathLike[str] | None = None,
    name: str | None = None,
    typed: str | None = None,
) -> str | None:
    """Return a one-line instruction to get a missing store; see `missing`.

    Args:
        store: Name of the store.
        root: Folder of the data sets.
        name: Name of the data set that needs it, as in `metarun data NAME`; by default the same.
        typed: What was typed for it; by default `data=NAME`.
    """
    base = resolve_root(root)
    if open_store(base / store) is not None:
        return None
    word = f"metarun data {name or store}"
    where = "" if root is None else f" --root {root}"
    how = f"import files you have with `{word} --from PATH{where}`"
    if store in _DOWNLOADS or store.startswith("torchvision_"):
        how = f"fetch it with `{word}{where}` ({_DOWNLOADS.get(store, 'size varies')}), or {how}"
    return f"{typed or f'data={name or store}'} is not in {base}: {how}"


def _missing_file(name: str, file: object) -> str | None:
    if file is None:
        return f"data={name} needs data.file={FILES_OF[name.removeprefix('stream_')]}"
    for one in file if isinstance(file, list | tuple) else [file]:
        if not Path(str(one)).expanduser().exists():
            return f"data.file={one} does not exist: type data.file=FILE, where it is now"
    return None


def _missing_folder(name: str, root: str | os.PathLike[str] | None) -> str | None:
    if root is None:
        return (
            f"data={name} needs data.root=PATH, a folder with one folder of images for each class"
        )
    path = Path(root).expanduser()
    if not path.is_dir():
        return f"data.root={root}: there is no such folder: type data.root=PATH of your images"
    return None
