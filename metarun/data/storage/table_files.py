"""Files of numbers and texts, by column: CSV, Parquet, and numpy's `.npz` and `.npy`.

Files may come from somebody else: nothing in them is executed, and no object is unpickled. Torch is
not imported.

Shapes: N rows, F features.
"""

from __future__ import annotations

import csv
import difflib
import importlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from metarun.core import memory
from metarun.core.archives import read_arrays

Numbers = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]

TABLES = ("csv", "parquet")
"""Formats of files with columns of several types, by the ending of their names."""
MATRICES = ("npz", "npy", *TABLES)
"""Formats of files with a matrix of numbers and labels."""

FEATURES, CLASSES, WEIGHTS = "features", "classes", "weights"
"""Arrays of an `.npz` file of features beside those of labels and splits: the matrix, the names of
the labels 0, 1, …, and a hash of the network that computed the features."""

_BEGINNINGS = {b"PAR1": "parquet", b"PK\x03\x04": "npz", b"\x93NUMPY": "npy"}
_MISSING = frozenset(("", "na", "n/a", "nan", "null"))
_AT_ONCE = 20_000


@dataclass(frozen=True, slots=True)
class Texts:
    """A column of texts.

    Attributes:
        names: The distinct texts; the empty one is a missing value.
        codes: (N,) the position of each row's text among them.
    """

    names: tuple[str, ...]
    codes: Codes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Texts:
        return Texts(self.names, self.codes[rows])

    def values(self) -> npt.NDArray[np.object_]:
        """Return the (N,) texts."""
        return np.array(self.names, dtype=object)[self.codes]

    def first_text(self) -> tuple[int, str]:
        """Return the number (from 1) and the text of the first row that is no number."""
        found = self.first(n for n in self.names if not is_number(n) and not _is_missing(n))
        return found or self.first(self.names) or (0, "")

    def first(self, wanted: Iterable[str]) -> tuple[int, str] | None:
        """Return the number (from 1) and the text of the first row with a wanted text, if any."""
        names = set(wanted)
        chosen = [place for place, name in enumerate(self.names) if name in names]
        rows = np.flatnonzero(np.isin(self.codes, chosen))
        return (int(rows[0]) + 1, self.names[self.codes[rows[0]]]) if len(rows) else None


Column = Numbers | Texts
"""A column of numbers, with NaN where a value is missing, or of texts."""
Columns = dict[str, Column]


def read_table(file: str | Path, key: str, *, text: Sequence[str] = ()) -> Columns:
    """Read a table with named columns.

    A column is one of numbers if all its values are, apart from missing ones: an empty cell, NA,
    N/A, NaN or null. Dates of Parquet become texts.

    Args:
        file: CSV file with a header, in UTF-8 and with commas, or Parquet file.
        key: What named the file, for messages, such as `data.file`.
        text: Columns whose values are names, even if they are numbers.

    Raises:
        ValueError: There is no such file, it is empty or damaged, or of another format; rows have
            different lengths; two columns have one name; or an optional package is missing.
    """
    path = _existing(file, key, TABLES)
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, key, frozenset(text))
    texts = set(text)
    while True:
        try:
            return _read_csv(path, key, texts)
        except _TextFound as found:
            # The columns are read again, since 007 is a text other than 7.
            texts |= found.columns


def read_matrix(file: str | Path, key: str, *, text: Sequence[str]) -> dict[str, Any]:
    """Read the arrays of a file with a matrix of features, by name.

    Args:
        file: `.npz` file with an array `features` (N, F) and others; `.npy` file with one matrix,
            whose last column holds labels; or a table whose other columns are the features.
        key: What named the file, for messages.
        text: Columns of a table that are no features, in order: that of the labels, ….

    Returns:
        `features` (N, F) float64, the arrays of an `.npz` file, and the named columns of a table
        that exist, as `Texts`.

    Raises:
        ValueError: As `read_table`, or there is no matrix of numbers.
    """
    path = _existing(file, key, MATRICES)
    suffix = path.suffix.lower()[1:]
    if suffix in TABLES:
        columns = read_table(path, key, text=text)
        found = {name: columns.pop(name) for name in text if name in columns}
        numbers: list[Numbers] = []
        for name, column in columns.items():
            if isinstance(column, Texts):
                row, value = column.first_text()
                raise ValueError(
                    f"{key}={file}: column {name} has the text {value!r} in row {row}: features "
                    "are numbers"
                )
            numbers.append(column)
        if not numbers:
            raise ValueError(f"{key}={file} has no column of features beside {', '.join(found)}")
        return {**found, FEATURES: np.stack(numbers, 1)}
    if suffix == "npz":
        return read_arrays(path)
    try:
        matrix = np.load(path, allow_pickle=False, mmap_mode="r")
    except ValueError as error:
        objects = "Object arrays" in str(error) or "object" in str(error)
        why = "holds Python objects, which are never unpickled" if objects else "is damaged"
        raise ValueError(f"{key}={file} {why}: expected a matrix of numbers") from error
    if matrix.ndim != 2 or matrix.shape[1] < 2 or matrix.dtype.kind not in "iuf":
        raise ValueError(
            f"{key}={file} has an array of shape {matrix.shape} and type {matrix.dtype}: expected "
            "a matrix of numbers, with labels in its last column"
        )
    memory.check_fits(8 * matrix.size, f"{file} in memory", "take fewer rows")
    return {FEATURES: np.array(matrix[:, :-1]), text[0]: np.array(matrix[:, -1])}


def as_texts(values: Any) -> Texts:
    """Return an array of texts or numbers as texts; whole numbers are written without a point."""
    if isinstance(values, Texts):
        return values
    array = np.asarray(values)
    if array.dtype.kind == "f":
        cells = [_name(number) for number in array.tolist()]
    else:
        cells = [str(value) for value in array.tolist()]
    return _texts(cells)


def in_order(names: Iterable[str]) -> list[str]:
    """Return names sorted by their numbers if all are numbers, else as texts."""
    listed = list(names)
    if all(map(is_number, listed)):
        return sorted(listed, key=lambda name: (float(name), name))
    return sorted(listed)


def is_number(text: str) -> bool:
    """Return whether a text is a number, and not a missing or infinite one."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_missing(text: str) -> bool:
    return text.strip().lower() in _MISSING


def _name(number: float) -> str:
    if math.isnan(number):
        return ""
    return str(int(number)) if number.is_integer() else repr(number)


def _texts(cells: Iterable[str]) -> Texts:
    places: dict[str, int] = {}
    codes = np.fromiter((places.setdefault(cell, len(places)) for cell in cells), dtype=np.int64)
    return Texts(tuple(places), codes)


def _existing(file: str | Path, key: str, formats: Sequence[str]) -> Path:
    """Return the path of a file whose content agrees with the ending of its name."""
    path = Path(file).expanduser()
    listed = f"{', '.join(f'.{one}' for one in formats[:-1])} or .{formats[-1]}"
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{key}={file} {what}: expected a file {listed}")
    suffix = path.suffix.lower()[1:]
    if suffix not in formats:
        raise ValueError(f"{key}={file}: expected a file {listed}")
    with path.open("rb") as opened:
        head = opened.read(1024)
    if not head.strip():
        raise ValueError(f"{key}={file} is empty: expected a header and rows")
    found = next((f for begins, f in _BEGINNINGS.items() if head.startswith(begins)), None)
    if found is None and b"\0" in head:
        found = "binary"
    if found != (None if suffix == "csv" else suffix):
        what = {
            None: "text, such as a CSV",
            "binary": "no format that is known here",
            "npz": "a zip archive, such as .npz or .xlsx",
        }.get(found, f"a .{found} file")
        raise ValueError(f"{key}={file} is not what its name says, its content is {what}")
    return path


class _TextFound(Exception):  # noqa: N818 - no error: the file is read again
    """Columns of texts were found that had been taken for numbers."""

    def __init__(self, columns: set[str]) -> None:
        super().__init__(columns)
        self.columns = columns


def _read_csv(path: Path, key: str, texts: set[str]) -> Columns:
    """Read a CSV file, of which some columns are texts.

    Raises:
        _TextFound: Others are texts, too.
        ValueError: See `read_table`.
    """
    where = f"{key}={path}"
    try:
        with path.open(newline="", encoding="utf-8-sig") as opened:
            lines = filter(None, csv.reader(opened, strict=True))
            names = _header(next(lines, []), where)
            return _parsed(names, lines, where, texts)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not text in UTF-8: save it as such") from error
    except csv.Error as error:
        raise ValueError(f"{where} is damaged: {error}") from error


def _header(cells: Sequence[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not names:
        raise ValueError(f"{where} is empty: expected a header and rows")
    for separator in (";", "\t"):
        if len(names) == 1 and separator in names[0]:
            raise ValueError(f"{where} has its columns apart by {separator!r}: expected commas")
    if all(map(is_number, names)):
        raise ValueError(f"{where} begins with numbers: expected the names of the columns")
    _check_names(names, where)
    return names


def _check_names(names: Sequence[str], where: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{where} has two columns {twice[0]!r}: expected different names")


def _parsed(names: Sequence[str], lines: Any, where: str, texts: set[str]) -> Columns:
    places: dict[str, dict[str, int]] = {name: {} for name in names if name in texts}
    parts: dict[str, list[Any]] = {name: [] for name in names}
    done = 0
    while chunk := list(itertools.islice(lines, _AT_ONCE)):
        lengths = set(map(len, chunk))
        if lengths != {len(names)}:
            row, cells = next((n, c) for n, c in enumerate(chunk) if len(c) != len(names))
            raise ValueError(
                f"{where}: row {done + row + 1} has {len(cells)} cells, the header {len(names)}"
            )
        found: set[str] = set()
        for name, cells in zip(names, zip(*chunk, strict=True), strict=True):
            if name in places:
                known = places[name]
                codes = (known.setdefault(cell, len(known)) for cell in cells)
                parts[name].append(np.fromiter(codes, dtype=np.int64, count=len(cells)))
            else:
                numbers = _as_numbers(cells)
                found |= {name} if numbers is None else set()
                parts[name].append(numbers)
        if found:
            raise _TextFound(found)
        done += len(chunk)
    if not done:
        raise ValueError(f"{where} has a header and no rows")
    columns: Columns = {}
    for name in names:
        values = np.concatenate(parts[name])
        columns[name] = Texts(tuple(places[name]), values) if name in places else values
    return columns


def _as_numbers(cells: Sequence[str]) -> Numbers | None:
    """Return cells as numbers; None if one of them is none."""
    try:
        return np.fromiter(map(float, cells), dtype=np.float64, count=len(cells))
    except ValueError:
        pass
    known = ("nan" if _is_missing(cell) else cell for cell in cells)
    try:
        return np.fromiter(map(float, known), dtype=np.float64, count=len(cells))
    except ValueError:
        return None


def _read_parquet(path: Path, key: str, texts: frozenset[str]) -> Columns:
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(
            f"{key}={path}: Parquet needs pyarrow: pip install 'metarun[parquet]'"
        ) from None
    try:
        opened = parquet.ParquetFile(path)
        size = 8 * opened.metadata.num_rows * opened.metadata.num_columns
        memory.check_fits(size, f"{path} in memory", "take fewer rows or columns")
        table = opened.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{key}={path} is damaged: {str(error).splitlines()[0]}") from error
    _check_names(table.column_names, f"{key}={path}")
    if not table.num_rows:
        raise ValueError(f"{key}={path} has no rows")
    return {
        name: _from_arrow(pyarrow, table.column(name), name, f"{key}={path}", name in texts)
        for name in table.column_names
    }


def _from_arrow(pyarrow: Any, column: Any, name: str, where: str, is_text: bool) -> Column:
    types, kind = pyarrow.types, column.type
    if types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    if number and not is_text:
        values = column.cast(pyarrow.float64()).to_numpy()
        return np.array(values, dtype=np.float64)
    if types.is_floating(kind):
        return as_texts(column.to_numpy())
    try:
        cells = column.cast(pyarrow.string()).to_pylist()
    except pyarrow.ArrowException:
        raise ValueError(
            f"{where}: column {name} has the type {kind}: expected numbers or texts"
        ) from None
    return _texts("" if cell is None else cell for cell in cells)


def check_names(wanted: Mapping[str, str | None], columns: Mapping[str, Any], where: str) -> None:
    """Check that a file has columns.

    Args:
        wanted: Name of a column, by the key that named it; None is not checked.
        columns: The columns of the file.
        where: The file, for messages.

    Raises:
        ValueError: It lacks one; the message names the nearest.
    """
    for key, name in wanted.items():
        if name is None or name in columns:
            continue
        lower = {other.lower(): other for other in columns}
        near = difflib.get_close_matches(name.lower(), lower, n=1)
        listed = list(columns)
        shown = ", ".join(listed[:8]) + (" …" if len(listed) > 8 else "")
        hint = f"did you mean {lower[near[0]]}?" if near else f"it has {shown}"
        raise ValueError(f"{key}={name}: {where} has no such column: {hint}")


def is_table(path: Path) -> bool:
    """Return whether a file is a table, by the ending of its name."""
    return path.suffix.lower()[1:] in TABLES
