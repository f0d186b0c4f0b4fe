"""Where data sets are, and which are present. No torch, so that listing is fast."""

from __future__ import annotations

import os
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
    "folder": "folder",
    "features": "file",
    "csv": "file",
}
"""Where the files of data sets are. All others are made."""

FILES_OF = {
    "features": "FILE, an .npz, .npy, .parquet or .csv with features and labels",
    "csv": "FILE, a .csv or .parquet with named columns",
}
"""What the file of a data set is, by its name."""

_FETCH = {
    "omniglot": "fetch it with `metarun data omniglot{root}` (14 MB), or import files you have "
    "with `metarun data omniglot --from PATH{root}`",
    "miniimagenet": "import files you have with `metarun data miniimagenet --from PATH{root}`",
}


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
    base = resolve_root(root)
    if open_store(base / name) is not None:
        return None
    typed = "" if root is None else f" --root {root}"
    return f"data={name} is not in {base}: {_FETCH[name].format(root=typed)}"


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
        return f"data.root={root}: there is no such folder: type data.root=PATH, where they are now"
    return None
