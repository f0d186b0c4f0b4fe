"""Your own table: its columns encoded, its rows divided into tasks and splits.

Shapes: N rows, F features, D targets, G groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metarun.core import memory, seeding
from metarun.core.checks import at_least
from metarun.core.once import warn_once
from metarun.core.types import SPLITS, EpisodeSize, SourceSetup, Split
from metarun.core.words import first_of
from metarun.data.encoding import (
    CategoryInput,
    TableEncoding,
    Target,
    as_numbers,
    fit_inputs,
    fit_targets,
    is_constant,
)
from metarun.data.features import stated_splits
from metarun.data.splits import check_disjoint, check_fractions, hashed_order, hashed_split
from metarun.data.storage.table_files import (
    Codes,
    Columns,
    Numbers,
    Texts,
    as_texts,
    check_names,
    in_order,
    read_table,
)

Constant = Literal["refuse", "drop", "keep"]

_NAMED = 5
_SIZE_KEYS: dict[Split, str] = {"train": "train.", "val": "", "test": ""}


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows of a split, sorted by group: the rows of a task, or those of a class of a task.

    Attributes:
        tasks: Names of the tasks, in the order of their hashes.
        first, number: (tasks,) first group and number of groups of each task.
        starts, counts: (G,) first row and number of rows of each group.
        class_ids: (G,) class of each group; zeros in a regression.
        x: (N, F) inputs.
        y: (N, D) targets of a regression, as learners see them, or (N,) labels.
    """

    tasks: tuple[str, ...]
    first: Tensor
    number: Tensor
    starts: Tensor
    counts: Tensor
    class_ids: Tensor
    x: Tensor
    y: Tensor


class TableRows:
    """A table whose rows belong to tasks, each task to one split.

    With `task`, a task is all rows with one value of that column. Without it, a classification has
    tasks of random classes and a regression of random rows. `way` decides which it is: with
    `way=1` the targets are numbers.

    The encoding of the columns is fitted on the rows of training tasks: missing numbers are the
    median, numbers are standardized, and categories have one feature each (a missing one is a
    category). It is recorded with a run.

    Args:
        setup: Sizes, seeds, device and precision.
        file: CSV or Parquet file with named columns, or the three files of train, val and test.
        target: Column of the labels or values, or several columns of values.
        task: Column that says the task of a row; None makes tasks of classes, or of rows.
        split: Column that says train, val or test. Without it, tasks (else classes, else rows) are
            split by a hash of their names.
        order: Column by which the rows of a task are in order.
        columns: Columns of the inputs; None takes all that have no other purpose.
        categorical: Columns that are categories even if they are numbers.
        max_categories: Largest number of features of one column; the rarest categories share one.
        constant: What is done about a column with one value in all training rows: `refuse`,
            `drop` or `keep` it.
        skip_small: Whether tasks, or classes, with too few rows are left out.
        val_fraction, test_fraction: Share of the tasks for val and for test, without `split`.
        encoding: Encoding of a run, as text; None fits it.

    Raises:
        ValueError: The file cannot be read, a column does not exist or has unsuitable values, a
            task is in two splits, or tasks have too few rows.
    """

    found_in_files: ClassVar[Sequence[str]] = ("encoding",)
    """Options that are worked out from the file where they are null."""
    _common_columns = True
    """Whether columns mean the same in all tasks. Otherwise numbers are not standardized here, and
    files may have different columns. A subclass sets it first."""

    def __init__(
        self,
        setup: SourceSetup,
        *,
        file: str | list[str] | None = None,
        target: str | list[str] | None = None,
        task: str | None = None,
        split: str = "split",
        order: str | None = None,
        columns: list[str] | None = None,
        categorical: Sequence[str] = (),
        max_categories: int = 20,
        constant: Constant = "refuse",
        skip_small: bool = False,
        val_fraction: float = 0.2,
        test_fraction: float = 0.25,
        encoding: str | None = None,
    ) -> None:
        at_least("data", 2, max_categories=max_categories)
        check_fractions(val_fraction, test_fraction)
        self._dtype = setup.dtype
        self._seeds = setup.seeds
        self.sizes = dict(setup.sizes)
        self.device = setup.device
        self._task, self._order, self._skip_small = task, order, skip_small
        self._targets = _target_names(target, self.sizes)
        self._classifies = self.sizes["test"].way > 1
        self._where = _where(file)
        known = None if encoding is None else TableEncoding.from_text(encoding)
        texts = [*([task] if task else []), *(self._targets if self._classifies else []), split]
        texts += [*categorical, *(known.texts if known else [])]
        table, files, self._columns_of = read_files(file, texts, common=self._common_columns)
        named = {"data.task": task, "data.order": order}
        named |= {f"data.columns[{n}]": name for n, name in enumerate(columns or ())}
        named |= {f"data.categorical[{n}]": name for n, name in enumerate(categorical)}
        if split != "split":
            named["data.split"] = split
        for name in self._targets:
            check_names({"data.target": name}, table, self._where)
        check_names(named, table, self._where)
        self.labels, values = self._read_targets(table)
        self._ranks = None if order is None else _ranks(table[order], order, self._where)
        unit = self._units(table)
        splits = self._splits(table, files, split, unit, val_fraction, test_fraction)
        training = splits == 0
        if known is None:
            used = _inputs(table, [*self._targets, task, order, split], columns)
            used = _without_constants(
                table, used, self._columns_of["train"], training, constant, self._where
            )
            inputs = fit_inputs(
                table,
                used,
                training,
                self._where,
                categorical=categorical,
                max_categories=max_categories,
                standardize=self._common_columns,
            )
            targets: tuple[Target, ...] = ()
            if values is not None:
                targets = fit_targets(self._targets, values, training)
            label = self._targets[0] if self._classifies else None
            known = TableEncoding(inputs, targets, label, task)
        self._check_encoding(known)
        self._encoding = known
        rows = len(splits)
        memory.check_fits(
            8 * rows * known.width, f"{rows:,} rows of {known.width} features", "name fewer columns"
        )
        self._splits_of_rows = splits
        self._x = known.encode(table, self._where)
        self._y = np.empty((rows, 0)) if values is None else known.scaled(values)
        self._tasks = as_texts(table[task]) if task else None
        self.resolved_options: dict[str, Any] = {"encoding": known.as_text()}

    @property
    def encoding(self) -> TableEncoding | None:
        """How columns become inputs and targets; None if tasks have columns of their own."""
        return self._encoding if self._common_columns else None

    def class_names(self, split: Split) -> tuple[str, ...]:
        """Return the names of the classes that `class_ids` numbers; none in a regression."""
        return () if self.labels is None else self._classes_of(split)

    def _classes_of(self, split: Split) -> tuple[str, ...]:
        """Return the classes of a split; with a column of tasks, all splits have the same."""
        assert self.labels is not None
        if self._task is not None:
            return self.labels.names
        own = np.unique(self.labels.codes[self._splits_of_rows == SPLITS.index(split)])
        return tuple(self.labels.names[code] for code in own)

    def fingerprint(self) -> str:
        """Return a hash of every split's rows, tasks and classes."""
        facts = (self._task, self._order, self._targets, self.class_names("train"))
        digest = hashlib.sha256(repr((facts, self._encoding.record())).encode())
        for array in (self._x, self._y, self._splits_of_rows, self._ranks):
            if array is not None and array.size:
                digest.update(np.ascontiguousarray(array).data)
        for texts in (self.labels, self._tasks):
            if texts is not None:
                digest.update(repr(texts.names).encode())
                digest.update(np.ascontiguousarray(texts.codes).data)
        return digest.hexdigest()[:16]

    def groups(
        self, needed: dict[Split, int], ways: dict[Split, int], *, by_class: bool
    ) -> dict[Split, Groups]:
        """Return the rows of each split by task, and in a classification by class.

        Args:
            needed: Rows that a group needs.
            ways: Groups that a task needs; all groups of a split without a column of tasks.
            by_class: Whether the rows of a class of a task are a group; else those of a task.

        Raises:
            ValueError: A task is too small, unless `skip_small`; or none is left.
        """
        found: dict[Split, Groups] = {}
        small: list[tuple[Split, str, str]] = []
        total = 0
        for split in SPLITS:
            made, few = self._grouped(split, needed[split], ways[split], by_class=by_class)
            found[split] = made
            small += [(split, *one) for one in few]
            whole = len(made.tasks) if self._task else len(made.starts)
            total += len(few) + whole
        if small:
            self._tell_small(small, total, needed)
        for split, made in found.items():
            if not len(made.starts):
                raise ValueError(
                    f"{self._where}: no {self._noun} of {split} has {needed[split]} rows: lower "
                    f"{_SIZE_KEYS[split]}shot or {_SIZE_KEYS[split]}query"
                )
        return found

    @property
    def _noun(self) -> str:
        return self._task or ("class" if self._classifies else "split")

    def _tell_small(
        self, small: list[tuple[Split, str, str]], total: int, needed: dict[Split, int]
    ) -> None:
        remain = f"{total - len(small):,} of {total:,} remain"
        if self._skip_small:
            names = first_of([name for _, name, _ in small], _NAMED)
            warn_once(f"{self._where}: {self._noun} with too few rows left out ({names}): {remain}")
            return
        split, name, why = small[0]
        size, key = self.sizes[split], _SIZE_KEYS[split]
        skip = f"type data.skip_small=true to leave out such ones ({remain})"
        if self._task is None and not self._classifies:
            skip = "give more rows"
        raise ValueError(
            f"{self._where}: {self._noun} {name} has {why}, {needed[split]} are needed in {split} "
            f"({key}shot={size.shot}, {key}query={size.query}): lower them, or {skip}"
        )

    def _grouped(
        self, split: Split, needed: int, ways: int, *, by_class: bool
    ) -> tuple[Groups, list[tuple[str, str]]]:
        """Return the groups of a split, and the names of small tasks with what they have."""
        rows = np.flatnonzero(self._splits_of_rows == SPLITS.index(split))
        names: tuple[str, ...] = (split,)
        task = np.zeros(len(rows), dtype=np.int64)
        if self._tasks is not None:
            own, task = np.unique(self._tasks.codes[rows], return_inverse=True)
            names = tuple(self._tasks.names[code] for code in own)
            # In the order of their hashes, not of the file.
            order = hashed_order(names)
            places = {name: number for number, name in enumerate(order)}
            task = np.array([places[name] for name in names], dtype=np.int64)[task]
            names = tuple(order)
        label = np.zeros_like(task)
        if self.labels is not None and by_class:
            classes = {name: code for code, name in enumerate(self._classes_of(split))}
            codes = np.array([classes.get(name, -1) for name in self.labels.names])
            label = codes[self.labels.codes[rows]]
        ranks = np.arange(len(rows)) if self._ranks is None else self._ranks[rows]
        rows = rows[by := np.lexsort((ranks, label, task))]
        several = max(int(label.max(initial=0)) + 1, 1)
        group, starts, counts = np.unique(
            (task * several + label)[by], return_index=True, return_counts=True
        )
        large = counts >= needed
        per_task = np.bincount(group[large] // several, minlength=len(names))
        enough = per_task >= ways
        if self._tasks is None:
            few = [
                (self._classes_of(split)[g] if by_class else names[0], f"{c} rows")
                for g, c in zip(group[~large] % several, counts[~large], strict=True)
            ]
            enough = per_task > 0
        else:
            biggest = np.zeros(len(names), dtype=np.int64)
            np.maximum.at(biggest, group // several, counts)
            few = [
                (names[n], f"{biggest[n]} rows" if ways == 1 else f"{per_task[n]} of {ways} classes"
                 " with enough rows")
                for n in np.flatnonzero(~enough)
            ]  # fmt: skip
        kept = large & enough[group // several]
        numbers = per_task[enough]

        def tensor(values: Any) -> Tensor:
            return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self.device)

        groups = Groups(
            tasks=tuple(name for name, whole in zip(names, enough, strict=True) if whole),
            first=tensor(numbers.cumsum() - numbers),
            number=tensor(numbers),
            starts=tensor(starts[kept]),
            counts=tensor(counts[kept]),
            class_ids=tensor(group[kept] % several),
            x=self._tensor(self._x[rows]),
            y=tensor(self.labels.codes[rows])
            if self.labels is not None
            else self._tensor(self._y[rows]),
        )
        return groups, few

    def _tensor(self, values: Numbers) -> Tensor:
        return torch.from_numpy(values).to(self.device, self._dtype)

    def _read_targets(self, table: Columns) -> tuple[Texts | None, Numbers | None]:
        """Return the labels, with classes in order, or the values (N, D)."""
        columns = [table[name] for name in self._targets]
        if self._classifies:
            labels = as_texts(columns[0])
            missing = labels.first([""])
            if missing is not None:
                raise ValueError(
                    f"{self._where}: target {self._targets[0]} is missing in row {missing[0]}"
                )
            return _sorted(labels), None
        found: list[Numbers] = []
        for name, column in zip(self._targets, columns, strict=True):
            if isinstance(column, Texts):
                try:
                    as_numbers(name, column, self._where)
                except ValueError as error:
                    raise ValueError(
                        f"{error}, or type way=N with the classes of a task"
                    ) from error
            values = as_numbers(name, column, self._where)
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                what = "missing" if np.isnan(values[bad[0]]) else "infinite"
                raise ValueError(
                    f"{self._where}: target {name} is {what} in row {bad[0] + 1}: expected a "
                    "number in every row"
                )
            found.append(values)
        return None, np.stack(found, 1)

    def _units(self, table: Columns) -> Texts | None:
        """Return what belongs to one split as a whole: tasks, or classes; None if rows do."""
        if self._task is None:
            return self.labels
        tasks = as_texts(table[self._task])
        missing = tasks.first([""])
        if missing is not None:
            raise ValueError(f"{self._where}: {self._task} is missing in row {missing[0]}")
        return tasks

    def _splits(
        self,
        table: Columns,
        files: Codes | None,
        split: str,
        unit: Texts | None,
        val_fraction: float,
        test_fraction: float,
    ) -> Codes:
        """Return (N,) positions in `SPLITS`."""
        noun = self._task or "class"
        if files is None and split not in table:
            if unit is None:
                return self._hashed_rows(
                    len(next(iter(table.values()))), val_fraction, test_fraction
                )
            many = "classes" if self._task is None else f"values of {self._task}"
            least = 2 if self._task is None else 1
            names = hashed_split(
                unit.names, self._where, val_fraction, test_fraction, what=many, least=least
            )
            chosen = {name: SPLITS.index(s) for s, own in names.items() for name in own}
            return np.array([chosen[name] for name in unit.names])[unit.codes]
        stated = files
        if stated is None:
            stated = stated_splits(as_texts(table[split]), self._where, split)
        for place, one in enumerate(SPLITS):
            if not (stated == place).any():
                raise ValueError(f"{self._where}: no row has {split}={one}")
        if unit is not None:
            parts = {
                one: [unit.names[c] for c in np.unique(unit.codes[stated == place])]
                for place, one in enumerate(SPLITS)
            }
            way_out = f"correct its {split}" if files is None else "correct the files"
            check_disjoint(parts, self._where, way_out, what=noun)
        return stated

    def _hashed_rows(self, num: int, val_fraction: float, test_fraction: float) -> Codes:
        """Split rows: by their order if they have one, else by a hash of their numbers."""
        order = self._ranks
        if order is None:
            key = torch.tensor(seeding.key("rows"))
            order = seeding.bits(key, 0, (num,)).argsort(stable=True).argsort().numpy()
        share = (order + 0.5) / num
        train = 1.0 - val_fraction - test_fraction
        return np.digitize(share, [train, train + val_fraction]).astype(np.int64)

    def _check_encoding(self, encoding: TableEncoding) -> None:
        if encoding.target_names != tuple(self._targets):
            raise ValueError(
                f"data.target={','.join(self._targets)}: the run was trained on "
                f"{','.join(encoding.target_names)}"
            )
        if not encoding.inputs:
            raise ValueError(f"{self._where} has no column of inputs beside those named")

    def _summary(self, groups: dict[Split, Groups]) -> str:
        """Return what the table holds, in one line."""
        inputs = self._encoding.inputs
        categories = sum(isinstance(one, CategoryInput) for one in inputs)
        counts = [len(groups[s].tasks if self._task else groups[s].starts) for s in SPLITS]
        rows = torch.cat([groups[split].counts for split in SPLITS])
        what = f"{'/'.join(map(str, counts))} train/val/test {self._noun} of "
        if self._task is None and not self._classifies:
            what = "/".join(str(int(groups[s].counts[0])) for s in SPLITS)
            return (
                f"{self._where}: {len(inputs)} inputs ({categories} of categories) as "
                f"{self._encoding.width} features, target {', '.join(self._targets)}; {what} "
                "train/val/test rows"
            )
        return (
            f"{self._where}: {len(inputs)} inputs ({categories} of categories) as "
            f"{self._encoding.width} features, target {', '.join(self._targets)}; {what}"
            f"{int(rows.min())} to {int(rows.max())} rows"
        )


def read_files(
    file: str | list[str] | None, texts: Sequence[str], *, common: bool
) -> tuple[Columns, Codes | None, dict[Split, list[str]]]:
    """Read one table, or those of train, val and test.

    Args:
        file: Name of the file, or of three.
        texts: Columns that are read as texts.
        common: Whether all files need the columns of the first. Otherwise a column that a file
            lacks is missing in all its rows.

    Returns:
        The columns, (N,) positions in `SPLITS` of the rows (None for one table), and the columns
        that the rows of each split have.

    Raises:
        ValueError: There are other than one or three files, or their columns differ.
    """
    if file is None:
        raise ValueError(
            "data.file=FILE is missing: expected a .csv or .parquet with named columns"
        )
    if isinstance(file, str):
        table = read_table(file, "data.file", text=texts)
        return table, None, {split: list(table) for split in SPLITS}
    if len(file) != len(SPLITS):
        raise ValueError(
            f"data.file names {len(file)} files: expected one, or the three of train, val and test"
        )
    tables = [read_table(one, "data.file", text=texts) for one in file]
    for one, table in zip(file[1:], tables[1:], strict=True):
        for name in tables[0] if common else ():
            check_names({f"a column of {file[0]}": name}, table, one)
    lengths = [len(next(iter(table.values()))) for table in tables]
    columns: Columns = {}
    for name in dict.fromkeys(name for table in tables for name in table):
        parts = [
            table.get(name, np.full(length, np.nan))
            for table, length in zip(tables, lengths, strict=True)
        ]
        numbers = [part for part in parts if not isinstance(part, Texts)]
        if len(numbers) == len(parts):
            columns[name] = np.concatenate(numbers)
        else:
            columns[name] = as_texts(np.concatenate([as_texts(part).values() for part in parts]))
    there = {split: list(table) for split, table in zip(SPLITS, tables, strict=True)}
    return columns, np.repeat(np.arange(len(SPLITS)), lengths), there


def _where(file: str | list[str] | None) -> str:
    return str(file if not isinstance(file, list) else ",".join(file))


def _target_names(target: str | list[str] | None, sizes: dict[Split, EpisodeSize]) -> list[str]:
    if not target:
        raise ValueError("data.target=COLUMN is missing: expected the column to predict")
    names = [target] if isinstance(target, str) else list(target)
    if len(names) > 1 and sizes["test"].way > 1:
        raise ValueError(
            f"data.target={','.join(names)}: expected one column of labels, as way="
            f"{sizes['test'].way} is a classification"
        )
    return names


def _sorted(labels: Texts) -> Texts:
    """Return labels whose names are in order."""
    order = in_order(labels.names)
    place = {name: number for number, name in enumerate(order)}
    codes = np.array([place[name] for name in labels.names], dtype=np.int64)
    return Texts(tuple(order), codes[labels.codes])


def _inputs(table: Columns, others: Sequence[str | None], columns: list[str] | None) -> list[str]:
    if columns is None:
        return [name for name in table if name not in others]
    for name in columns:
        if name in others[:-2]:
            raise ValueError(f"data.columns: {name} is the target or the task, and no input")
    return columns


def _without_constants(
    table: Columns,
    names: Sequence[str],
    there: Sequence[str],
    rows: npt.NDArray[np.bool_],
    constant: Constant,
    where: str,
) -> list[str]:
    checked = [] if constant == "keep" else [name for name in names if name in there]
    found = [name for name in checked if is_constant(table[name], rows)]
    if found and constant == "refuse":
        raise ValueError(
            f"{where}: {first_of(found, _NAMED)}: one value in all training rows: type "
            "data.constant=drop to leave out such columns, or keep"
        )
    if found:
        warn_once(f"{where}: left out, one value in all training rows: {first_of(found, _NAMED)}")
    return [name for name in names if name not in found]


def _ranks(column: Any, name: str, where: str) -> Codes:
    """Return the (N,) places of rows in order; texts such as 2024-01-31 are in order as texts."""
    values = column
    if isinstance(column, Texts):
        order = in_order(column.names)
        place = {text: number for number, text in enumerate(order)}
        values = np.array([place[text] for text in column.names])[column.codes]
        missing = column.first([""])
        row = None if missing is None else missing[0]
    else:
        bad = np.flatnonzero(np.isnan(column))
        row = bad[0] + 1 if len(bad) else None
    if row is not None:
        raise ValueError(f"{where}: {name} is missing in row {row}: expected an order of all rows")
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")
