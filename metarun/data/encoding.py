"""How the columns of a table become inputs and targets, fitted on the rows of training tasks.

A fitted encoding is plain values, which a run records: new rows are encoded without the training
data, and without scikit-learn.

Shapes: N rows, F features, D targets.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from metarun.core.types import Record
from metarun.data.storage.table_files import (
    Column,
    Columns,
    Numbers,
    Texts,
    as_texts,
    check_names,
    is_number,
)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class NumberInput:
    """A column of numbers: a missing one is the median, then (x - mean) / std.

    Attributes:
        name: Name of the column.
        median, mean, std: Of the training rows, in the units of the column; the latter two after
            missing values are filled.
    """

    name: str
    median: float
    mean: float
    std: float

    @property
    def width(self) -> int:
        """Number of features."""
        return 1

    def encode(self, column: Column, where: str) -> Numbers:
        """Return (N, 1) features."""
        values = as_numbers(self.name, column, where)
        infinite = np.flatnonzero(np.isinf(values))
        if len(infinite):
            raise ValueError(f"{where}: column {self.name} is infinite in row {infinite[0] + 1}")
        filled = np.where(np.isnan(values), self.median, values)
        return ((filled - self.mean) / self.std)[:, None]


@dataclass(frozen=True, slots=True)
class CategoryInput:
    """A column of categories: one feature for each, 1 where it is that of the row.

    Attributes:
        name: Name of the column.
        categories: Those that have a feature; the empty one is a missing value.
        others: Whether all other categories have one feature together, as the last. Without it
            they have zeros.
    """

    name: str
    categories: tuple[str, ...]
    others: bool

    @property
    def width(self) -> int:
        """Number of features."""
        return len(self.categories) + self.others

    def encode(self, column: Column, where: str) -> Numbers:  # noqa: ARG002
        """Return (N, categories) features."""
        texts = as_texts(column)
        places = {name: place for place, name in enumerate(self.categories)}
        # The last row is that of unknown categories.
        features = np.eye(len(self.categories) + 1, self.width)
        known = np.array([places.get(name, len(places)) for name in texts.names], dtype=np.int64)
        return features[known[texts.codes]]


Input = NumberInput | CategoryInput


@dataclass(frozen=True, slots=True)
class Target:
    """A target of a regression, which learners see as (y - mean) / std.

    Attributes:
        name: Name of the column.
        mean, std: Of the training rows, in the units of the column.
    """

    name: str
    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class TableEncoding:
    """A fitted encoding.

    Attributes:
        inputs: Columns of the inputs, in their order.
        targets: Targets of a regression; empty in a classification.
        label: Column of the labels; None in a regression.
        task: Column that says the task of a row; None if there is none.
    """

    inputs: tuple[Input, ...]
    targets: tuple[Target, ...]
    label: str | None
    task: str | None

    @property
    def width(self) -> int:
        """Number of features F."""
        return sum(one.width for one in self.inputs)

    @property
    def target_names(self) -> tuple[str, ...]:
        """Columns of the targets, or that of the labels."""
        names = tuple(target.name for target in self.targets)
        return names if self.label is None else (self.label,)

    @property
    def texts(self) -> list[str]:
        """Columns that are read as texts."""
        named = (self.label, self.task)
        categories = [one.name for one in self.inputs if isinstance(one, CategoryInput)]
        return [*categories, *(name for name in named if name is not None)]

    def encode(self, table: Any, where: str = "inputs") -> Numbers:
        """Return the features (N, F) of rows.

        Args:
            table: Columns by name: a mapping to sequences, or a data frame. Others are ignored.
            where: Where they come from, for messages.

        Raises:
            ValueError: A column is missing, or a number is a text or infinite.
        """
        names = {f"column {place + 1}": one.name for place, one in enumerate(self.inputs)}
        check_names(names, dict.fromkeys(table), where)
        found = [one.encode(as_column(table[one.name]), where) for one in self.inputs]
        return np.concatenate(found, 1)

    def scaled(self, values: Numbers) -> Numbers:
        """Return values (N, D) of the targets as learners see them."""
        return (values - self._moment("mean")) / self._moment("std")

    def restored(self, values: Numbers) -> Numbers:
        """Return values (N, D) that a learner has predicted in the units of the targets."""
        return values * self._moment("std") + self._moment("mean")

    def spread(self, values: Numbers) -> Numbers:
        """Return standard deviations (N, D) in the units of the targets."""
        return values * self._moment("std")

    def _moment(self, name: str) -> Numbers:
        return np.array([asdict(target)[name] for target in self.targets])

    def record(self) -> Record:
        """Return the encoding as plain values."""
        return {
            "inputs": [asdict(one) for one in self.inputs],
            "targets": [asdict(one) for one in self.targets],
            "label": self.label,
            "task": self.task,
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> TableEncoding:
        """Return the encoding that `record` describes; `ValueError` or `TypeError` if none."""
        inputs: list[Input] = []
        for one in record["inputs"]:
            if "categories" in one:
                inputs.append(CategoryInput(one["name"], tuple(one["categories"]), one["others"]))
            else:
                inputs.append(NumberInput(**one))
        targets = tuple(Target(**one) for one in record["targets"])
        numbers = [n for one in (*inputs, *targets) for n in asdict(one).values()]
        if not all(math.isfinite(n) for n in numbers if isinstance(n, float)):
            raise ValueError("a number of the encoding is not finite")
        return cls(tuple(inputs), targets, record["label"], record["task"])

    def as_text(self) -> str:
        """Return the record as one line, in which no configuration finds an interpolation."""
        return json.dumps(self.record()).replace("$", "\\u0024")

    @classmethod
    def from_text(cls, text: str) -> TableEncoding:
        """Return the encoding of `as_text`.

        Raises:
            ValueError: The text is none.
        """
        try:
            return cls.of(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"data.encoding is damaged: {error}: leave it at null") from error


def fit_inputs(
    columns: Columns,
    names: Sequence[str],
    rows: Mask,
    where: str,
    *,
    categorical: Sequence[str],
    max_categories: int,
    standardize: bool,
) -> tuple[Input, ...]:
    """Fit the encoding of the inputs by scikit-learn.

    Args:
        columns: Columns of the table.
        names: Those of the inputs.
        rows: (N,) whether a row is of a training task.
        where: The file, for messages.
        categorical: Columns that are categories even if they are numbers.
        max_categories: Largest number of features of a column; all rarer categories share the
            last one.
        standardize: Whether numbers are standardized.

    Raises:
        ValueError: scikit-learn is missing, or a column has numbers and texts.
    """
    try:
        impute: Any = importlib.import_module("sklearn.impute")
        preprocessing: Any = importlib.import_module("sklearn.preprocessing")
    except ImportError:
        raise ValueError("data=csv needs scikit-learn: pip install 'metarun[sklearn]'") from None
    found: list[Input] = []
    for name in names:
        column = columns[name]
        if isinstance(column, Texts) or name in categorical:
            if name not in categorical:
                _check_texts(name, column, where)
            values = as_texts(column)[rows].values()[:, None]
            fitted = preprocessing.OneHotEncoder(
                max_categories=max_categories, handle_unknown="infrequent_if_exist"
            ).fit(values)
            rare = fitted.infrequent_categories_[0]
            kept = [n for n in fitted.categories_[0].tolist() if rare is None or n not in rare]
            found.append(CategoryInput(name, tuple(kept), rare is not None))
            continue
        given = column[rows][:, None]
        given = np.where(np.isinf(given), np.nan, given)
        if np.isnan(given).all():
            # Refused, or left out, as a constant column.
            found.append(NumberInput(name, 0.0, 0.0, 1.0))
            continue
        imputer = impute.SimpleImputer(strategy="median").fit(given)
        scaler = preprocessing.StandardScaler().fit(imputer.transform(given))
        moments = (scaler.mean_[0], scaler.scale_[0]) if standardize else (0.0, 1.0)
        found.append(NumberInput(name, float(imputer.statistics_[0]), *map(float, moments)))
    return tuple(found)


def fit_targets(names: Sequence[str], values: Numbers, rows: Mask) -> tuple[Target, ...]:
    """Fit the targets (N, D) of a regression on the training rows."""
    found: list[Target] = []
    for place, name in enumerate(names):
        own = values[rows, place].copy()
        std = float(own.std())
        found.append(Target(name, float(own.mean()), std if std > 0.0 else 1.0))
    return tuple(found)


def is_constant(column: Column, rows: Mask) -> bool:
    """Return whether a column has one value in all of some rows, missing ones left out."""
    if isinstance(column, Texts):
        return len(np.unique(column.codes[rows])) < 2
    values = column[rows]
    values = values[~np.isnan(values)]
    return len(values) == 0 or bool((values == values[0]).all())


def as_numbers(name: str, column: Column, where: str) -> Numbers:
    """Return a column as numbers (N,).

    Raises:
        ValueError: It has a text.
    """
    if not isinstance(column, Texts):
        return column
    row, text = column.first_text()
    raise ValueError(f"{where}: column {name} has the text {text!r} in row {row}: expected numbers")


def as_column(values: Any) -> Column:
    """Return a sequence of a user's as a column of numbers or texts."""
    if isinstance(values, Texts):
        return values
    array = np.asarray(values)
    if array.dtype.kind in "iuf":
        return np.asarray(array, dtype=np.float64)
    if array.dtype.kind == "b":
        return as_texts(array)
    cells = ["" if v is None or v != v else v for v in array.tolist()]
    if all(v == "" or isinstance(v, int | float) for v in cells):
        return np.array([math.nan if v == "" else float(v) for v in cells])
    return as_texts(np.array(list(map(str, cells)), dtype=object))


def _check_texts(name: str, column: Column, where: str) -> None:
    """Check that a column of texts is not one of numbers with a few texts in it."""
    assert isinstance(column, Texts)
    numbers = [n for n in column.names if is_number(n)]
    if 2 * len(numbers) > len(column.names):
        row, text = column.first_text()
        raise ValueError(
            f"{where}: column {name} has numbers and the text {text!r} in row {row}: correct it, "
            f"or type data.categorical=[{name}] to take all its values as categories"
        )
