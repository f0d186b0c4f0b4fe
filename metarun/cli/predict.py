"""`metarun predict`: label a folder of images, or the rows of a table, from a few examples.

Arguments are checked first. The CSV file and the page are written at the end, atomically, so that
a failure leaves no file.

Shapes: N images, W classes.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from metarun.cli.parser import DEFAULT_CSV
from metarun.core.console import Screen, busy, table_console, warnings_held
from metarun.core.errors import EXIT_OK
from metarun.core.files import csv_cell, write_new
from metarun.core.streams import printable, say
from metarun.core.words import first_of, number_of
from metarun.data.storage.image_files import has_colors, open_image, size_of, suffixes
from metarun.data.storage.table_files import is_table
from metarun.runs.folder import RunFolder

if TYPE_CHECKING:
    from metarun.inference.learner import Learner


_AT_ONCE = 250
_ROWS_ON_A_TERMINAL = 30
_NAMED = 3
_LOOKED_AT = 20
"""Number of images of the support and of the queries that decide whether they suit the run."""
_ON_THE_PAGE = 200
PAGE = ".html"
"""Suffix of the page beside the CSV file."""
_FOR_SECOND_BEST = 60
_PERCENT = len("100.0 %")
_GAP = 2
_NOT_MEANT = frozenset(("thumbs.db", "desktop.ini", "__macosx"))

Probabilities = npt.NDArray[np.float64]
Identity = tuple[int, int]
"""Device and inode number of a file: equal for all links to it."""


@dataclass(frozen=True, slots=True)
class Examples:
    """The support images, their classes, and what is ignored in their folders.

    Attributes:
        files: Image files, sorted by class.
        labels: Class of each file.
        left_out: Ignored files and folders that the user may have meant to include.
    """

    files: list[Path]
    labels: list[str]
    left_out: list[Path]

    @property
    def classes(self) -> list[str]:
        """Distinct classes, sorted."""
        return sorted(set(self.labels))


@dataclass(frozen=True, slots=True)
class Queries:
    """The images to label, and what is ignored in their folders.

    Attributes:
        root: The query folder, or the folder of a single query file.
        files: Image files, sorted by name.
        left_out: Ignored files that the user may have meant to include.
    """

    root: Path
    files: list[Path]
    left_out: list[Path]

    @property
    def names(self) -> list[str]:
        """Paths of the files relative to `root`."""
        return [file.relative_to(self.root).as_posix() for file in self.files]

    def labels(self, classes: Sequence[str]) -> list[str] | None:
        """Return the folder name of each image, or None if one of them is not in `classes`."""
        inside = all(file.parent != self.root for file in self.files)
        known = inside and all(file.parent.name in classes for file in self.files)
        return [file.parent.name for file in self.files] if known else None


def run(args: argparse.Namespace) -> int:
    """Run `metarun predict RUN --support DIR --query DIR` and return the exit code.

    Raises:
        ValueError: An argument is invalid; no file has been written.
    """
    folder = RunFolder.open(args.run)
    if is_table(args.support) or _is_of_table(folder):
        return _predict_rows(folder, args)
    support, query = find_examples(args.support), find_queries(args.query)
    place = _place(args.csv)
    with warnings.catch_warnings():
        # Pillow warns about irregular files that it can read nevertheless.
        warnings.filterwarnings("ignore", module="PIL")
        with warnings_held():
            with busy("loading the run"):
                learner = _learner(folder, args.device, transductive=args.transductive)
            learner.fit(support.files, support.labels)
        answers, bad = probabilities(learner, query.files)
        query = replace(query, files=[file for file in query.files if file not in bad])
        if not np.isfinite(answers).all():
            raise ValueError(
                f"{folder.path} predicts probabilities that are not finite: train a new run"
            )
        page = _page(folder, learner, support, query, answers)
    place = _write(place, as_csv(query.names, support.classes, answers), fixed=args.csv is not None)
    # A file of this name may have been made meanwhile; it is not overwritten.
    try:
        write_new(place.with_suffix(PAGE), page.encode("utf-8", "backslashreplace"))
    except OSError:
        # Otherwise the command could not be repeated with the same --csv.
        place.unlink()
        raise
    for note in [*_unread(bad, query), *_notes(folder, learner, args.transductive, support, query)]:
        say("note", note)
    _show(folder, learner, support, query, answers, place)
    return EXIT_OK


# Tables.


def _is_of_table(folder: RunFolder) -> bool:
    """Return whether a run was trained on a table with common columns."""
    data = folder.configuration()["data"]
    return bool(data.get("encoding")) and data.get("features") is None


def _predict_rows(folder: RunFolder, args: argparse.Namespace) -> int:
    """Predict the rows of a table, write them as CSV, and return the exit code."""
    if not _is_of_table(folder):
        raise ValueError(
            f"--support {args.support} is a table, but {folder.path} was trained on data="
            f"{folder.configuration()['names']['data']}: expected a run on data=csv whose tasks "
            "share their columns"
        )
    place = _place(args.csv)
    from metarun.inference.learner import load
    from metarun.inference.table_predictions import predict_table

    with warnings_held():
        bn = "transductive" if args.transductive else None
        learner = load(folder.path, bn=bn, device=args.device)
        answers = predict_table(learner, args.support, args.query)
    numbers = [cell for row in answers.rows for cell in row if isinstance(cell, float)]
    if not np.isfinite(numbers).all():
        raise ValueError(f"{folder.path} predicts numbers that are not finite: train a new run")
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerows([list(map(csv_cell, answers.header)), *answers.rows])
    place = _write(place, text.getvalue().encode(), fixed=args.csv is not None)
    names = folder.configuration()["names"]
    tasks = number_of(answers.tasks, "task")
    print(f"{names['algo']} on {names['data']}: {tasks} from {answers.examples:,} examples")
    if answers.error:
        print(answers.error)
    print(f"all {len(answers.rows):,} predictions: {printable(str(place))}")
    return EXIT_OK


# Input files.


def find_examples(root: Path) -> Examples:
    """Find the image files of each class; the files are not read.

    Raises:
        ValueError: The folder does not have one subfolder with images for each class.
    """
    folders, files, left_out = _contents(_folder("--support", root))
    if files:
        raise ValueError(
            f"{files[0]} is directly in --support: expected one folder per class, as in "
            f"{root / 'CLASS' / files[0].name}"
        )
    if len(folders) < 2:
        found = f"one class folder, {folders[0].name}" if folders else "no class folders"
        raise ValueError(
            f"--support {root} has {found}: expected two or more, each named after its class, "
            "with a few images in it"
        )
    images: list[Path] = []
    labels: list[str] = []
    for folder in folders:
        below, own, others = _contents(folder)
        if not own:
            raise ValueError(
                f"{folder} has no images{_others([*others, *below])}: add a few images or remove "
                "the folder"
            )
        images += own
        labels += [folder.name] * len(own)
        left_out += [*others, *below]
    return Examples(images, labels, left_out)


def find_queries(root: Path) -> Queries:
    """Find the image files in and below a folder, or take a single file; nothing is read.

    Raises:
        ValueError: There is no image.
    """
    if root.is_file():
        return Queries(root.parent, [root], [])
    files: list[Path] = []
    left_out: list[Path] = []
    for own, others in _walk(_folder("--query", root), set()):
        files += own
        left_out += others
    if not files:
        raise ValueError(
            f"--query {root} has no images{_others(left_out)}: expected files such as "
            "*.png and *.jpg"
        )
    return Queries(root, sorted(files), left_out)


def _folder(option: str, path: Path) -> Path:
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{option} {path} {what}: expected a folder")
    return path


def _walk(folder: Path, met: set[Identity]) -> Iterator[tuple[list[Path], list[Path]]]:
    """Yield the images and the ignored files of each folder; follow links, each folder once."""
    own = _identity(folder)
    if own in met:
        return
    met.add(own)
    folders, files, left_out = _contents(folder)
    yield files, left_out
    for child in folders:
        yield from _walk(child, met)


def _contents(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Return subfolders, images and other files, sorted, without hidden and system files."""
    folders: list[Path] = []
    files: list[Path] = []
    others: list[Path] = []
    for child in sorted(folder.iterdir()):
        if child.name.startswith(".") or child.name.lower() in _NOT_MEANT:
            continue
        if child.is_dir():
            folders.append(child)
        # A broken link counts as an image, so that it is reported; reading a pipe would block.
        elif child.suffix.lower() in suffixes() and (child.is_file() or not child.exists()):
            files.append(child)
        else:
            others.append(child)
    return folders, files, others


def _identity(path: Path) -> Identity:
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def _others(left_out: Sequence[Path]) -> str:
    return f" (found only {_named(left_out)})" if left_out else ""


def _named(paths: Sequence[Path]) -> str:
    """Return the names of the first paths and the number of the remaining ones."""
    return first_of([printable(path.name) for path in paths], _NAMED)


def _place(typed: Path | None) -> Path:
    """Return the path of the CSV file.

    Raises:
        ValueError: No file can be written there.
    """
    path = Path(DEFAULT_CSV) if typed is None else typed
    option = "the current folder" if typed is None else f"--csv {typed}"
    if typed is not None and (path.exists() or path.is_symlink()):
        what = "is a folder" if path.is_dir() else "already exists"
        raise ValueError(f"{option} {what}: choose a new file name")
    if path.suffix.lower() == PAGE:
        raise ValueError(
            f"{option}: its page has the same name: choose one such as predictions.csv"
        )
    if typed is not None and os.path.lexists(path.with_suffix(PAGE)):
        raise ValueError(
            f"{option}: its page {path.with_suffix(PAGE)} already exists: choose a new file name"
        )
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {path.parent}: create it or choose another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        hint = (
            "choose a file in another folder"
            if typed is not None
            else "type --csv FILE with a file in another folder"
        )
        raise ValueError(f"{option} cannot be written: {hint}")
    return path


# Predictions.


def _learner(folder: RunFolder, device: str, *, transductive: bool) -> Learner:
    # Imported late, since torch takes long: invalid arguments are reported before.
    from metarun.inference.learner import load

    learner = load(folder.path, bn="transductive" if transductive else None, device=device)
    if not learner.labels_images:
        data = folder.configuration()["names"]["data"]
        raise ValueError(
            f"{folder.path} was trained on data={data} and cannot label images: expected a run "
            "such as that of `metarun algo=protonet data=omniglot_small`"
        )
    return learner


def probabilities(learner: Learner, files: Sequence[Path]) -> tuple[Probabilities, dict[Path, str]]:
    """Return the class probabilities (N, W) of all images that can be read, and all others.

    Images are read in chunks if predictions are independent, so that memory stays bounded. A
    progress bar is shown on a terminal.

    Raises:
        ValueError: No image can be read.
    """
    size = len(files) if learner.transductive else _AT_ONCE
    parts: list[Probabilities] = []
    bad: dict[Path, str] = {}
    screen = Screen()
    with screen.attached(), screen.bar("labeling", len(files)) as bar:
        for first in range(0, len(files), size):
            part, own = _answers(learner, files[first : first + size])
            parts += part
            bad |= own
            bar.to(first + size)
    if not parts:
        raise ValueError(next(iter(bad.values())))
    return np.concatenate(parts), bad


def _answers(
    learner: Learner, files: Sequence[Path]
) -> tuple[list[Probabilities], dict[Path, str]]:
    """Return the probabilities of the images that can be read, if any, and all others."""
    from metarun.data.image_files import unreadable

    try:
        return [learner.predict_proba(files)], {}
    except ValueError:
        bad = unreadable(files)
        if not bad:
            raise
    whole = [file for file in files if file not in bad]
    return [learner.predict_proba(whole)] if whole else [], bad


def _page(
    folder: RunFolder, learner: Learner, support: Examples, query: Queries, answers: Probabilities
) -> str:
    """Return the HTML page of the first queries, each with its nearest example."""
    from metarun.reporting.predictions import Line, render

    files, classes = query.files[:_ON_THE_PAGE], support.classes
    nearest, space = _nearest(learner, support.files, files)
    lines = [
        Line(
            path=file,
            file=printable(name),
            label=printable(classes[int(row.argmax())]),
            share=f"{100 * row.max():.1f} %",
            example_path=support.files[near],
            example=printable(f"{support.labels[near]}/{support.files[near].name}"),
        )
        for file, name, row, near in zip(files, query.names, answers, nearest, strict=False)
    ]
    names, many = folder.configuration()["names"], len(query.files)
    which = "All" if many <= _ON_THE_PAGE else f"The first {_ON_THE_PAGE} of"
    return render(
        f"Predictions of {names['algo']} on {names['data']}",
        f"{which} {many:,} queries, with {len(classes)} classes from {len(support.files)} "
        f"examples. The nearest example is that of the smallest Euclidean distance {space}.",
        lines,
    )


def _nearest(
    learner: Learner, support: Sequence[Path], files: Sequence[Path]
) -> tuple[list[int], str]:
    """Return the number of the nearest example of each image, and where it is nearest."""
    try:
        shown, asked, space = learner.embed(support), learner.embed(files), "of features"
    except ValueError:  # A learner without features of single images.
        shown, asked, space = learner.rows(support), learner.rows(files), "of pixels"
    flat = [rows.reshape(len(rows), -1).astype(np.float64) for rows in (shown, asked)]
    distances = [np.square(flat[0] - row).sum(1) for row in flat[1]]
    return [int(row.argmin()) for row in distances], space


def as_csv(names: Sequence[str], classes: Sequence[str], answers: Probabilities) -> bytes:
    """Return the CSV: one row per image with its file, its class and all probabilities."""
    text = io.StringIO()
    # Names are quoted, since a bare carriage return in a name would end the row.
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    # `p(name)`, not `name`, since a class may be called `file`.
    writer.writerow(["file", "class", "probability", *(f"p({name})" for name in classes)])
    named = [csv_cell(name) for name in classes]
    for name, row in zip(names, answers, strict=True):
        best = int(row.argmax())
        writer.writerow(
            [csv_cell(name), named[best], *(float(f"{p:.6g}") for p in (row[best], *row))]
        )
    # A name that is not UTF-8 would make the file unreadable.
    return text.getvalue().encode("utf-8", "backslashreplace")


def _write(path: Path, data: bytes, *, fixed: bool) -> Path:
    """Write a new file and return its path.

    If the name is not fixed, the first of `a.csv`, `a-2.csv`, … is taken that is free for the page
    as well.

    Raises:
        OSError: The file cannot be written; no partial file remains.
    """
    others = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    for place in itertools.chain([path], others):
        if not fixed and os.path.lexists(place.with_suffix(PAGE)):
            continue
        try:
            return write_new(place, data)
        except FileExistsError:
            if fixed:
                raise
        except OSError as error:
            # The message must name this file, not the temporary one.
            raise OSError(error.errno, error.strerror, str(place)) from None
    raise AssertionError("itertools.count is infinite")


# Output on the screen.


def _notes(
    folder: RunFolder, learner: Learner, transductive: bool, support: Examples, query: Queries
) -> Iterator[str]:
    state = folder.status().get("state")
    if state != "finished":
        yield f"{folder.path} is not finished ({state}): its best checkpoint so far is used"
    if transductive and not learner.transductive:
        yield "--transductive has no effect: the run's network has no batch norm"
    elif transductive and (own := folder.configuration()["bn"]) != "transductive":
        yield f"--transductive differs from the run's own test, which used bn={own}"
    yield from _unsuitable(learner, _spread(support.files), _spread(query.files))
    left_out = [*support.left_out, *query.left_out]
    if left_out:
        yield f"ignored, neither images nor class folders: {_named(left_out)}"


def _unread(bad: Mapping[Path, str], query: Queries) -> Iterator[str]:
    """Yield a line about the queries that cannot be read, if any."""
    if bad:
        total = len(bad) + len(query.files)
        yield f"{len(bad):,} of {total:,} queries cannot be read, and have no row: " + _named(
            list(bad)
        )


def _spread(files: Sequence[Path]) -> Sequence[Path]:
    """Return some files, evenly spaced."""
    return files[:: max(1, len(files) // _LOOKED_AT)][:_LOOKED_AT]


def _unsuitable(learner: Learner, support: Sequence[Path], query: Sequence[Path]) -> Iterator[str]:
    """Yield a line where images differ in kind from those of the run."""
    if len(learner.input_shape) != 3:
        return
    channels, side, _ = learner.input_shape
    files = [*support, *query]
    colored = [file for file in files if channels == 1 and has_colors(open_image(file))]
    if 2 * len(colored) > len(files):
        yield (
            f"the run was trained on gray images of {side} x {side} pixels, and these are in "
            f"color ({_named(colored[:1])}): expect little, and train on images like them "
            "(data=folder)"
        )
    sides = sorted(min(size_of(file)) for file in files)
    if 2 * sides[len(sides) // 2] < side:
        yield (
            f"the run was trained on images of {side} x {side} pixels, and these have about "
            f"{sides[len(sides) // 2]}: they are enlarged"
        )


def _show(
    folder: RunFolder,
    learner: Learner,
    support: Examples,
    query: Queries,
    answers: Probabilities,
    place: Path,
) -> None:
    names, classes = folder.configuration()["names"], support.classes
    console = table_console()
    many = len(query.files)
    # Not `console.is_terminal`, which environment variables for colored logs turn on.
    shown = min(many, _ROWS_ON_A_TERMINAL) if sys.stdout.isatty() else many
    console.print(
        f"{names['algo']} on {names['data']}: {len(classes)} classes from {len(support.files)} "
        f"examples, batch norm: {learner.bn}",
        markup=False,
    )
    console.print(_table(query.names[:shown], classes, answers[:shown], console.width))
    if shown < many:
        print(f"… and {many - shown:,} more")
    labels = query.labels(classes)
    if labels is not None:
        console.print(_accuracy(support, query, labels, answers), markup=False)
    print(f"all {many:,} predictions with all probabilities: {printable(str(place))}")
    print(f"with images and their nearest examples: {printable(str(place.with_suffix(PAGE)))}")


def _table(
    names: Sequence[str], classes: Sequence[str], answers: Probabilities, width: int
) -> Table:
    """Return a table of file, class and probability; wide screens add the second-best class."""
    files, labels = [printable(n) for n in names], [printable(n) for n in classes]
    second = width >= _FOR_SECOND_BEST
    times = 2 if second else 1
    label = min(max(5, *map(cell_len, labels)), width // 5)
    room = width - times * (label + _PERCENT + 2 * _GAP)
    file = min(max(4, *map(cell_len, files)), room)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    table.add_column("file", width=file, no_wrap=True)
    for head in ("class", "next")[:times]:
        table.add_column(head, width=label, no_wrap=True, overflow="ellipsis")
        table.add_column("prob.", width=_PERCENT, no_wrap=True, justify="right")
    for name, row in zip(files, answers, strict=True):
        best = row.argsort(kind="stable")[::-1][:times]
        cells = [(labels[k], f"{100 * row[k]:.1f} %") for k in best]
        # As `Text`, since rich would interpret a name such as `[red]x` as markup.
        table.add_row(*map(Text, [_tail(name, file), *itertools.chain(*cells)]))
    return table


def _accuracy(
    support: Examples, query: Queries, labels: Sequence[str], answers: Probabilities
) -> str:
    """Return a line with the share of labels equal to the folder names, without the examples."""
    examples = set(map(_identity, support.files))
    new = np.array([_identity(file) not in examples for file in query.files])
    classes: npt.NDArray[Any] = np.array(support.classes)
    right = classes[answers.argmax(1)] == np.array(labels)
    if not new.any():
        return "accuracy: not available, since every query is also a support image"
    apart = "" if new.all() else f", {(~new).sum():,} support images not counted"
    return (
        f"accuracy {100 * right[new].mean():.1f} %: {right[new].sum():,} of {new.sum():,} labels "
        f"equal the folder name{apart}"
    )


def _tail(text: str, width: int) -> str:
    """Shorten a text to its end, which distinguishes files better than the beginning."""
    if cell_len(text) <= width:
        return text
    text = text[-width:]
    while cell_len(text) > width - 1:
        text = text[1:]
    return f"…{text}"
