"""`metarun export`: an encoder, or a classifier adapted to a support set, for use without metarun.

All is checked and compared in memory first. The file and its model card are written at the end,
atomically, so that a failure leaves no file.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy.typing as npt

from metarun.cli.predict import Examples, find_examples
from metarun.core.console import busy, warnings_held
from metarun.core.errors import EXIT_OK
from metarun.core.files import size_text, write_new
from metarun.core.streams import printable, say
from metarun.core.types import Record
from metarun.data.storage.table_files import is_table
from metarun.reporting.model_card import model_card
from metarun.runs.folder import RESULTS, RunFolder

if TYPE_CHECKING:
    from metarun.inference.export import Exported, Format
    from metarun.inference.learner import Learner

_DATA = "data.json"


def run(args: argparse.Namespace) -> int:
    """Run `metarun export RUN --format FORMAT` and return the exit code.

    Raises:
        ValueError: An argument is invalid, or the exported answers differ; nothing was written.
    """
    folder = RunFolder.open(args.run)
    typed: Path | None = args.support
    support = typed if typed is None or is_table(typed) else find_examples(typed)
    # Imported late, since torch takes long: invalid arguments are reported before.
    with busy("exporting"):
        from metarun.inference.export import SUFFIXES, check_packages

        check_packages(args.format)
        what = "encoder" if support is None else "classifier"
        place = _place(args.output or Path(f"{what}{SUFFIXES[args.format]}"), SUFFIXES[args.format])
        with warnings.catch_warnings():
            # Pillow warns about irregular files that it can read nevertheless.
            warnings.filterwarnings("ignore", module="PIL")
            with warnings_held():
                learned = _learned(folder, support)
                made = _exported(learned, args.format, folder)
    card = _card(folder, learned, args.format, place, made)
    write_new(place, made.data)
    try:
        write_new(_card_of(place), card.encode("utf-8", "backslashreplace"))
    except OSError:
        place.unlink()
        raise
    if not folder.has(RESULTS):
        say("note", f"{folder.path} is not finished: its best checkpoint so far is used")
    rows = "any number of rows" if made.batch else "one row at a time"
    print(
        f"{what} to {printable(str(place))}: {size_text(len(made.data))}, {rows}, answers equal to "
        f"{max(made.difference, 1e-9):.0e}"
    )
    print(f"what it is and how to load it: {printable(str(_card_of(place)))}")
    return EXIT_OK


@dataclass(frozen=True, slots=True)
class _Learned:
    """A learner, and the support set that it is adapted to.

    Attributes:
        rows: The support as the network receives it, (N, …); None for an encoder.
        classes: Its classes in the order of the outputs; empty in a regression.
    """

    learner: Learner
    rows: npt.NDArray[Any] | None = None
    classes: Sequence[str] = ()


def _learned(folder: RunFolder, support: Examples | Path | None) -> _Learned:
    from metarun.inference.learner import load
    from metarun.inference.table_predictions import fit_table

    if support is None:
        return _Learned(load(folder.path, bn="running", device="cpu"))
    learner = load(folder.path, device="cpu")
    is_images = not isinstance(support, Path)
    if is_images != learner.labels_images or (not is_images and learner.encoding is None):
        data = folder.configuration()["names"]["data"]
        wanted = "images" if learner.labels_images else "tables" if learner.encoding else "neither"
        raise ValueError(
            f"{folder.path} was trained on data={data}, which has {wanted}: --support takes a "
            "folder of images for the one and a table for the other; leave it out to export the "
            "encoder"
        )
    if isinstance(support, Path):
        classes, rows = fit_table(learner, support)
        return _Learned(learner, rows, classes)
    learner.fit(support.files, support.labels)
    return _Learned(learner, learner.rows(support.files), list(map(str, learner.classes_)))


def _exported(learned: _Learned, kind: Format, folder: RunFolder) -> Exported:
    import torch

    from metarun.inference.export import export_classifier, export_encoder

    if learned.rows is None:
        return export_encoder(learned.learner, kind, folder.configuration())
    return export_classifier(learned.learner, kind, torch.from_numpy(learned.rows))


def _card(folder: RunFolder, learned: _Learned, kind: str, place: Path, made: Exported) -> str:
    return model_card(
        file=place.name,
        kind=kind,
        outputs=made.outputs,
        shape=made.shape,
        batch=made.batch,
        difference=made.difference,
        versions=made.versions,
        config=folder.configuration(),
        overrides=folder.overrides(),
        results=cast("Record", folder.read_results()) if folder.has(RESULTS) else None,
        data=folder.read_json(_DATA) if folder.has(_DATA) else None,
        classes=learned.classes,
        support=0 if learned.rows is None else len(learned.rows),
    )


def _card_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.md")


def _place(path: Path, suffix: str) -> Path:
    """Return the path of the file.

    Raises:
        ValueError: No file can be written there, or its name is that of another format.
    """
    if path.suffix.lower() != suffix:
        raise ValueError(f"--output {path}: expected a name that ends with {suffix}")
    for taken in (path, _card_of(path)):
        if os.path.lexists(taken):
            raise ValueError(f"{taken} already exists: choose a new file with --output")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}: create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--output {path}: the folder {path.parent} cannot be written")
    return path
