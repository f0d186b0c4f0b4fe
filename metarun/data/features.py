"""Episodes from a file of features, which somebody has computed for the rows of classes.

Shapes: N rows, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metarun.core.types import SPLITS, SourceSetup, Split
from metarun.data.episodes import ClassRows, ClassTable
from metarun.data.splits import WORDS, check_disjoint, check_fractions, hashed_split
from metarun.data.storage.table_files import (
    CLASSES,
    FEATURES,
    WEIGHTS,
    Texts,
    as_texts,
    check_names,
    in_order,
    read_matrix,
)


class Features(ClassRows):
    """Episodes from a matrix of features, a row for each example of a class.

    The file is an `.npz` with arrays `features` (N, F), `label` (N,) and perhaps `split` (N,) and
    `classes`, the names of the labels 0, 1, …; a CSV or Parquet file with a column `label`, perhaps
    one `split`, and features as the others; or an `.npy` matrix whose last column holds labels.
    Features are taken as they are. `metarun features` writes such a file.

    Args:
        setup: See `ClassRows`.
        file: The file.
        label: Array or column of the labels.
        split: Array or column that says train, val or test. Without it, classes are split by a hash
            of their names, as those of a folder of images are.
        val_fraction, test_fraction: Share of the classes for val and for test, without `split`.

    Raises:
        ValueError: The file cannot be read, a class is in two splits or has too few rows, or a
            feature is not finite.
    """

    noun: ClassVar[str] = "rows"

    def __init__(
        self,
        setup: SourceSetup,
        *,
        file: str | None = None,
        label: str = "label",
        split: str = "split",
        val_fraction: float = 0.2,
        test_fraction: float = 0.25,
    ) -> None:
        if file is None:
            raise ValueError(
                "data=features needs data.file=FILE, a file .npz, .npy, .parquet, .csv"
            )
        check_fractions(val_fraction, test_fraction)
        arrays = read_matrix(file, "data.file", text=(label, split))
        check_names({"data.label": label}, arrays, file)
        if split != "split":
            check_names({"data.split": split}, arrays, file)
        matrix = _matrix(arrays, file)
        labels = _labels(arrays, label, file)
        for name, column in ((label, labels), (split, arrays.get(split))):
            if column is not None and len(column) != len(matrix):
                raise ValueError(
                    f"data.file={file}: {len(matrix)} rows of features and {len(column)} of {name}"
                )
        where = f"data.file={file}"
        splits = (
            _stated_split(labels, as_texts(arrays[split]), where, split)
            if split in arrays
            else hashed_split(labels.names, where, val_fraction, test_fraction)
        )
        tables = {name: _table(matrix, labels, splits[name]) for name in SPLITS}
        super().__init__(setup, name=Path(file).name, tables=tables)
        counts = "/".join(str(self.num_classes(name)) for name in SPLITS)
        made = f", by the network {arrays[WEIGHTS]}" if WEIGHTS in arrays else ""
        self.notes_for_user = (
            f"{file}: {len(matrix):,} rows of {matrix.shape[1]} features{made}; {counts} "
            "train/val/test classes",
        )

    def prepared(self, rows: Tensor) -> Tensor:
        return rows.to(self._dtype)


def _matrix(arrays: Mapping[str, Any], file: str) -> Any:
    matrix = arrays.get(FEATURES)
    if matrix is None or matrix.ndim != 2 or matrix.dtype.kind not in "iuf" or not matrix.size:
        found = "no array" if matrix is None else f"{matrix.dtype} of shape {matrix.shape}"
        raise ValueError(
            f"data.file={file}: expected {FEATURES}, a matrix of numbers with a row for each "
            f"example, but there is {found}"
        )
    bad = np.argwhere(~np.isfinite(matrix))
    if len(bad):
        row, column = bad[0] + 1
        raise ValueError(
            f"data.file={file}: feature {column} of row {row} is {matrix[row - 1, column - 1]}: "
            "expected finite numbers"
        )
    return matrix


def _labels(arrays: Mapping[str, Any], label: str, file: str) -> Texts:
    """Return the classes of the rows, in their order."""
    found = arrays[label]
    if not isinstance(found, Texts) and found.ndim != 1:
        raise ValueError(
            f"data.file={file}: {label} has shape {found.shape}: expected one label for each row"
        )
    column, classes = as_texts(found), arrays.get(CLASSES)
    missing = column.first([""])
    if missing is not None:
        raise ValueError(f"data.file={file}: row {missing[0]} has no {label}")
    order = in_order(column.names)
    places = np.array([order.index(name) for name in column.names])
    if classes is None:
        return Texts(tuple(order), places[column.codes])
    if not all(name.isdigit() and int(name) < len(classes) for name in order):
        raise ValueError(
            f"data.file={file}: a {label} is no number from 0 to {len(classes) - 1}, which "
            f"{CLASSES} names"
        )
    names = [str(classes[int(name)]) for name in order]
    if len(set(names)) < len(names):
        raise ValueError(f"data.file={file}: two {CLASSES} have one name")
    return Texts(tuple(names), places[column.codes])


def _stated_split(labels: Texts, stated: Texts, where: str, column: str) -> dict[Split, list[str]]:
    """Return the classes of each split, in the order of their numbers."""
    splits = stated_splits(stated, where, column)
    found: dict[Split, list[str]] = {}
    for split in SPLITS:
        numbers = np.unique(labels.codes[splits == SPLITS.index(split)])
        found[split] = [labels.names[number] for number in numbers]
        if not found[split]:
            raise ValueError(f"{where}: no row has {column}={split}")
    check_disjoint(found, where, f"correct its {column}, or leave it out for a split by hash")
    return found


def stated_splits(stated: Texts, where: str, column: str) -> Any:
    """Return (N,) positions in `SPLITS` of rows that say their split.

    Raises:
        ValueError: A row says something else.
    """
    places = {word: place for place, split in enumerate(SPLITS) for word in WORDS[split]}
    known = [places.get(name.strip().lower(), -1) for name in stated.names]
    other = [name for name, place in zip(stated.names, known, strict=True) if place < 0]
    wrong = stated.first(other)
    if wrong is not None:
        raise ValueError(
            f"{where}: {column} is {wrong[1]!r} in row {wrong[0]}: expected train, val or test"
        )
    return np.array(known)[stated.codes]


def _table(matrix: Any, labels: Texts, names: list[str]) -> ClassTable:
    places = [labels.names.index(name) for name in names]
    rows = [np.flatnonzero(labels.codes == place) for place in places]
    chosen = np.ascontiguousarray(matrix[np.concatenate(rows)])
    if chosen.dtype not in (np.float32, np.float64):
        chosen = chosen.astype(np.float32)
    return ClassTable(
        images=torch.from_numpy(chosen), names=tuple(names), counts=tuple(map(len, rows))
    )
