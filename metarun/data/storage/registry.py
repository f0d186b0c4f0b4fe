"""Which data sets there are and whether they are here; no torch, so that the answer is quick."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metarun.data.storage.cache import open_store


@dataclass(frozen=True, slots=True)
class DataSet:
    """A line of the catalogue.

    Attributes:
        name: As typed after `data=`.
        line: What it is.
        place: `made` on the fly, `shipped` with the package, a `store` that has to be fetched
            or imported, or the user's own `folder`.
    """

    name: str
    line: str
    place: Literal["made", "shipped", "store", "folder"]


DATASETS: dict[str, DataSet] = {
    entry.name: entry
    for entry in (
        DataSet("sinusoid", "regression on y = A sin(x - phi)", "made"),
        DataSet("linear", "regression on y = a x + b", "made"),
        DataSet("gp", "regression on curves of a Gaussian process", "made"),
        DataSet("multimodal", "regression on functions of five families", "made"),
        DataSet("tables", "classification by parts of scikit-learn's tables", "made"),
        DataSet("diabetes", "regression by parts of scikit-learn's table of patients", "made"),
        DataSet("omniglot_small", "242 handwritten characters of 8 alphabets", "shipped"),
        DataSet("omniglot", "all 1,623 handwritten characters of 50 alphabets", "store"),
        DataSet("miniimagenet", "60,000 photographs of 100 classes, 84 x 84", "store"),
        DataSet("folder", "your own images: a folder of class folders", "folder"),
    )
}

_FETCH = {
    "omniglot": "fetch it with `metarun data omniglot{root}` (14 MB), or import files you have "
    "with `metarun data omniglot --from PATH{root}`",
    "miniimagenet": "import files you have with `metarun data miniimagenet --from PATH{root}`",
}


def default_root() -> Path:
    """Where data sets live: `$METARUN_DATA`, or `~/.cache/metarun`."""
    named = os.environ.get("METARUN_DATA")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "metarun"


def resolve_root(root: str | os.PathLike[str] | None) -> Path:
    """The root that was typed, or the default one."""
    return default_root() if root is None else Path(root).expanduser()


def missing(name: str, root: str | os.PathLike[str] | None = None) -> str | None:
    """What to do about a data set that is not here, in one line; None if it is.

    A stream is here where the data set is that it goes through.

    Raises:
        ValueError: It is here but damaged.
    """
    name = name.removeprefix("stream_")
    entry = DATASETS.get(name)
    if entry is None or entry.place in ("made", "shipped"):
        return None
    if entry.place == "folder":
        return _missing_folder(root)
    base = resolve_root(root)
    if open_store(base / name) is not None:
        return None
    typed = "" if root is None else f" --root {root}"
    return f"data={name} is not in {base}: {_FETCH[name].format(root=typed)}"


def _missing_folder(root: str | os.PathLike[str] | None) -> str | None:
    if root is None:
        return "data=folder needs data.root=PATH, a folder with one folder of images for each class"
    path = Path(root).expanduser()
    if not path.is_dir():
        return f"data.root={root}: there is no such folder"
    return None
