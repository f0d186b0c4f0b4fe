"""`metarun predict`: label a folder of images from a few examples of each class.

What is typed is checked first, and the CSV is written last, whole: what fails leaves nothing.

Shapes: N images, W classes.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from metarun.cli.parser import Parser
from metarun.core.console import Screen, warnings_held
from metarun.core.errors import EXIT_OK
from metarun.core.files import write_new
from metarun.data.storage.image_files import SUFFIXES
from metarun.runs.folder import RunFolder

if TYPE_CHECKING:
    from metarun.inference.learner import Learner

USAGE = "metarun predict RUN --support DIR --query DIR"
DEFAULT_CSV = "predictions.csv"

_AT_ONCE = 250
_ROWS_ON_A_TERMINAL = 30
_NAMED = 3
_NARROWEST, _WIDEST = 40, 100
_FOR_SECOND_BEST = 60
_PERCENT = len("100.0 %")
_GAP = 2
_NOT_MEANT = frozenset(("thumbs.db", "desktop.ini", "__macosx"))

Probabilities = npt.NDArray[np.float64]
Identity = tuple[int, int]
"""Device and number of a file: the same under each of its names."""


@dataclass(frozen=True, slots=True)
class Examples:
    """The images of each class, and what else lies there.

    Attributes:
        files: In the order of their classes.
        labels: The class of each.
        left_out: Files and folders that are not read and may be meant.
    """

    files: list[Path]
    labels: list[str]
    left_out: list[Path]

    @property
    def classes(self) -> list[str]:
        """Each class once, sorted."""
        return sorted(set(self.labels))


@dataclass(frozen=True, slots=True)
class Queries:
    """The images to label, and what else lies there.

    Attributes:
        root: The folder, or the one file's.
        files: In the order of their names.
        left_out: As in `Examples`.
    """

    root: Path
    files: list[Path]
    left_out: list[Path]

    @property
    def names(self) -> list[str]:
        """The files as seen from the folder."""
        return [file.relative_to(self.root).as_posix() for file in self.files]

    def labels(self, classes: Sequence[str]) -> list[str] | None:
        """The name of each image's folder, where every one is a class; else None."""
        inside = all(file.parent != self.root for file in self.files)
        known = inside and all(file.parent.name in classes for file in self.files)
        return [file.parent.name for file in self.files] if known else None


def run(argv: Sequence[str]) -> int:
    """Answer `metarun predict RUN --support DIR --query DIR`; returns the exit code.

    Raises:
        ValueError: Something that was typed does not suit; nothing has been written.
    """
    args = _parser().parse_args(list(argv))
    folder = RunFolder.open(args.run)
    support, query = find_examples(args.support), find_queries(args.query)
    place = _place(args.csv)
    with warnings.catch_warnings():
        # What is odd in a file that Pillow can read all the same.
        warnings.filterwarnings("ignore", module="PIL")
        with warnings_held():
            learner = _learner(folder, args.device, transductive=args.transductive)
            learner.fit(support.files, support.labels)
        answers = probabilities(learner, query.files)
    if not np.isfinite(answers).all():
        raise ValueError(f"{folder.path} answers with numbers that are not finite: train it anew")
    place = _write(place, as_csv(query.names, support.classes, answers), fixed=args.csv is not None)
    for note in _notes(folder, learner, args.transductive, support, query):
        print(f"note: {note}", file=sys.stderr)
    _show(folder, learner, support, query, answers, place)
    return EXIT_OK


def _parser() -> Parser:
    parser = Parser(
        prog="metarun predict",
        usage=f"{USAGE}\n       [--csv FILE] [--transductive] [--device DEVICE]",
        description="Label your own images from a few examples of each class.",
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run on images")
    parser.add_argument(
        "--support",
        metavar="DIR",
        type=Path,
        required=True,
        help="a folder for each class, with a few images in it; its name is the label",
    )
    parser.add_argument(
        "--query",
        metavar="DIR",
        type=Path,
        required=True,
        help="the images to label, also in folders below; or one image",
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        type=Path,
        help=f"where to write all probabilities: a new file (default: {DEFAULT_CSV} in the "
        "current folder, with a number where that is there already)",
    )
    parser.add_argument(
        "--transductive",
        action="store_true",
        help="batch norm over all queries together, so that an answer depends on the others",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


# What is there.


def find_examples(root: Path) -> Examples:
    """Find the images of each class, without reading any.

    Raises:
        ValueError: The folder is not laid out as one folder for each class.
    """
    folders, files, left_out = _contents(_folder("--support", root))
    if files:
        raise ValueError(
            f"{files[0]} lies in --support itself: expected a folder for each class, as in "
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
                f"{folder} has no images{_others([*others, *below])}: put a few in, or remove "
                "the folder"
            )
        images += own
        labels += [folder.name] * len(own)
        left_out += [*others, *below]
    return Examples(images, labels, left_out)


def find_queries(root: Path) -> Queries:
    """Find the images in and below a folder, without reading any; one file is itself.

    Raises:
        ValueError: There are none.
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
            f"--query {root} has no images{_others(left_out)}: expected files named "
            f"{', '.join(f'*{suffix}' for suffix in sorted(SUFFIXES))}"
        )
    return Queries(root, sorted(files), left_out)


def _folder(option: str, path: Path) -> Path:
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{option} {path} {what}: expected a folder")
    return path


def _walk(folder: Path, met: set[Identity]) -> Iterator[tuple[list[Path], list[Path]]]:
    """Images and what is left out, in each folder; links are followed, each folder once."""
    own = _identity(folder)
    if own in met:
        return
    met.add(own)
    folders, files, left_out = _contents(folder)
    yield files, left_out
    for child in folders:
        yield from _walk(child, met)


def _contents(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Folders, images and others in a folder, sorted, without what nobody put there."""
    folders: list[Path] = []
    files: list[Path] = []
    others: list[Path] = []
    for child in sorted(folder.iterdir()):
        if child.name.startswith(".") or child.name.lower() in _NOT_MEANT:
            continue
        if child.is_dir():
            folders.append(child)
        # A link to nowhere is somebody's image that is missing; a pipe would never end.
        elif child.suffix.lower() in SUFFIXES and (child.is_file() or not child.exists()):
            files.append(child)
        else:
            others.append(child)
    return folders, files, others


def _identity(path: Path) -> Identity:
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def _others(left_out: Sequence[Path]) -> str:
    return f" (there is {_named(left_out)})" if left_out else ""


def _named(paths: Sequence[Path]) -> str:
    """The names of some paths and the number of the others."""
    names = ", ".join(printable(path.name) for path in paths[:_NAMED])
    return names if len(paths) <= _NAMED else f"{names} and {len(paths) - _NAMED:,} more"


def _place(typed: Path | None) -> Path:
    """Where the CSV is to be, refused before any work where it cannot be written."""
    path = Path(DEFAULT_CSV) if typed is None else typed
    option = "the current folder" if typed is None else f"--csv {typed}"
    if typed is not None and (path.exists() or path.is_symlink()):
        what = "is a folder" if path.is_dir() else "is there already"
        raise ValueError(f"{option} {what}: name a new file")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {path.parent}: make it, or name another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        hint = "name another file" if typed is not None else "name a file elsewhere by --csv FILE"
        raise ValueError(f"{option} cannot be written: {hint}")
    return path


# What is answered.


def _learner(folder: RunFolder, device: str, *, transductive: bool) -> Learner:
    # Late, for torch: a mistake in what was typed is answered at once.
    from metarun.inference.learner import load

    learner = load(folder.path, bn="transductive" if transductive else None, device=device)
    if not learner.labels_images:
        data = folder.configuration()["names"]["data"]
        raise ValueError(
            f"{folder.path} has not learned to label images, but data={data}: expected a run "
            "such as that of `metarun algo=protonet data=omniglot_small`"
        )
    return learner


def probabilities(learner: Learner, files: Sequence[Path]) -> Probabilities:
    """(N, W) the probability of each class for each image, with a bar on a terminal.

    Images that are answered independently are read some at a time, so that memory bears any
    number of them.
    """
    size = len(files) if learner.transductive else _AT_ONCE
    parts: list[Probabilities] = []
    screen = Screen()
    with screen.attached(), screen.bar("labeling", len(files)) as bar:
        for first in range(0, len(files), size):
            parts.append(learner.predict_proba(files[first : first + size]))
            bar.to(first + len(parts[-1]))
    return np.concatenate(parts)


def as_csv(names: Sequence[str], classes: Sequence[str], answers: Probabilities) -> bytes:
    """A row for each image: its file, its class, and all probabilities."""
    text = io.StringIO()
    # Names in quotes, since a bare carriage return in one would end the row.
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    # In brackets: a class may be called `file`.
    writer.writerow(["file", "class", "probability", *(f"p({name})" for name in classes)])
    for name, row in zip(names, answers, strict=True):
        best = int(row.argmax())
        writer.writerow([name, classes[best], *(float(f"{p:.6g}") for p in (row[best], *row))])
    # A name that is not UTF-8 would be none in any reader.
    return text.getvalue().encode("utf-8", "backslashreplace")


def _write(path: Path, data: bytes, *, fixed: bool) -> Path:
    """Write a new file, where the name is not fixed the first of `a.csv`, `a-2.csv` … to be free.

    Raises:
        OSError: It cannot be written; nothing is there.
    """
    others = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    for place in itertools.chain([path], others):
        try:
            return write_new(place, data)
        except FileExistsError:
            if fixed:
                raise
        except OSError as error:
            # Not of the temporary file.
            raise OSError(error.errno, error.strerror, str(place)) from None
    raise AssertionError("names never end")


# What is told.


def _notes(
    folder: RunFolder, learner: Learner, transductive: bool, support: Examples, query: Queries
) -> Iterator[str]:
    state = folder.status().get("state")
    if state != "finished":
        yield f"{folder.path} is not finished ({state}): what it has learned so far answers"
    if transductive and not learner.transductive:
        yield "--transductive changes nothing: the run's network has no batch norm"
    elif transductive and (own := folder.configuration()["bn"]) != "transductive":
        yield f"--transductive is not how the run was tested, which was with bn={own}"
    left_out = [*support.left_out, *query.left_out]
    if left_out:
        yield f"left out, neither images nor class folders: {_named(left_out)}"


def _show(
    folder: RunFolder,
    learner: Learner,
    support: Examples,
    query: Queries,
    answers: Probabilities,
    place: Path,
) -> None:
    names, classes = folder.configuration()["names"], support.classes
    columns = shutil.get_terminal_size((80, 24)).columns
    console = Console(width=max(_NARROWEST, min(_WIDEST, columns)), highlight=False)
    many = len(query.files)
    # Not `console.is_terminal`, which variables for colored logs turn on.
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
    print(f"all {many:,} in {printable(str(place))}, with the probability of every class")


def _table(
    names: Sequence[str], classes: Sequence[str], answers: Probabilities, width: int
) -> Table:
    """File, class and probability, and the second-best class where there is room."""
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
        # As `Text`, since a name may look like markup.
        table.add_row(*map(Text, [_tail(name, file), *itertools.chain(*cells)]))
    return table


def _accuracy(
    support: Examples, query: Queries, labels: Sequence[str], answers: Probabilities
) -> str:
    """How many answers are the names of the images' folders; examples are not counted."""
    examples = set(map(_identity, support.files))
    new = np.array([_identity(file) not in examples for file in query.files])
    classes: npt.NDArray[Any] = np.array(support.classes)
    right = classes[answers.argmax(1)] == np.array(labels)
    if not new.any():
        return "accuracy: none, since every image is one of the examples"
    apart = "" if new.all() else f", {(~new).sum():,} examples not counted"
    return (
        f"accuracy {100 * right[new].mean():.1f} %: {right[new].sum():,} of {new.sum():,} are in "
        f"the folder of that name{apart}"
    )


def printable(text: str) -> str:
    """A name on one line, with what cannot be shown as its escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _tail(text: str, width: int) -> str:
    """The end of a text that is too wide, which tells files apart more than the beginning."""
    if cell_len(text) <= width:
        return text
    text = text[-width:]
    while cell_len(text) > width - 1:
        text = text[1:]
    return f"…{text}"
