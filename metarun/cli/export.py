"""`metarun export`: an encoder, or a classifier adapted to a support set, for use without metarun.

All is checked and compared in memory first. The file and its model card are written at the end,
atomically, so that a failure leaves no file.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

from metarun.cli.predict import Examples, find_examples
from metarun.core.console import busy, warnings_held
from metarun.core.errors import EXIT_OK
from metarun.core.files import size_text, write_new
from metarun.core.streams import printable, say
from metarun.core.types import Record
from metarun.reporting.model_card import model_card
from metarun.runs.folder import RESULTS, RunFolder

if TYPE_CHECKING:
    from metarun.inference.export import Exported
    from metarun.inference.learner import Learner

_DATA = "data.json"


def run(args: argparse.Namespace) -> int:
    """Run `metarun export RUN --format FORMAT` and return the exit code.

    Raises:
        ValueError: An argument is invalid, or the exported answers differ; nothing was written.
    """
    folder = RunFolder.open(args.run)
    support = None if args.support is None else find_examples(args.support)
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
                learner, made = _exported(folder, args.format, support)
    card = _card(folder, learner, args.format, place, made, support)
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


def _exported(folder: RunFolder, kind: str, support: Examples | None) -> tuple[Learner, Exported]:
    import torch

    from metarun.inference.export import export_classifier, export_encoder
    from metarun.inference.learner import load

    if support is None:
        learner = load(folder.path, bn="running", device="cpu")
        return learner, export_encoder(learner, kind, folder.configuration())  # type: ignore[arg-type]
    learner = load(folder.path, device="cpu")
    if not learner.labels_images:
        data = folder.configuration()["names"]["data"]
        raise ValueError(
            f"{folder.path} was trained on data={data} and cannot label images: leave out "
            "--support to export its encoder"
        )
    learner.fit(support.files, support.labels)
    rows = torch.from_numpy(learner.rows(support.files))
    return learner, export_classifier(learner, kind, rows)  # type: ignore[arg-type]


def _card(
    folder: RunFolder,
    learner: Learner,
    kind: str,
    place: Path,
    made: Exported,
    support: Examples | None,
) -> str:
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
        classes=[] if support is None else [str(name) for name in learner.classes_],
        support=0 if support is None else len(support.files),
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
