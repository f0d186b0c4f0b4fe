"""Tasks from tables: the origin of their rows, and disjoint splits."""

from __future__ import annotations

import sys
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import datasets

from metarun.core.types import SPLITS, EpisodeSize
from metarun.data.tables import Diabetes, Tables
from tests.data.sources import assert_same, make_source, sizes

WHOLE = {"train": ["digits:0-6", "wine"], "val": ["digits:7-9"], "test": ["iris", "breast_cancer"]}
ONE: dict[str, Any] = {"train": ["wine"], "val": ["digits"], "test": ["iris"]}


def tables(way: int = 2, shot: int = 5, query: int = 5, **options: Any) -> Tables:
    return make_source(Tables, sizes=sizes(way, shot, query), **(WHOLE | options))


def diabetes(**options: Any) -> Diabetes:
    one = {split: EpisodeSize(1, 12, 8) for split in SPLITS}
    return make_source(Diabetes, sizes=one, **options)


@pytest.mark.parametrize("make", [tables, diabetes])
def test_a_batch_is_its_tasks_drawn_one_by_one(make: Any) -> None:
    source = make()
    for split in SPLITS:
        whole = source.batch(split, 3, 5)
        for place in range(5):
            assert_same(source.batch(split, 3 + place, 1), whole[place : place + 1])


@pytest.mark.parametrize("make", [tables, diabetes])
def test_training_tasks_come_again_after_their_number(make: Any) -> None:
    source = make(tasks=7)
    assert_same(source.batch("train", 7, 7), source.batch("train", 0, 7))
    assert_same(source.batch("train", 5, 4)[2:], source.batch("train", 0, 2))
    first, again = source.batch("test", 0, 7), source.batch("test", 7, 7)
    assert not torch.equal(first.support_x, again.support_x)


def test_features_are_scaled_by_the_support_and_the_rest_is_zero() -> None:
    batch = tables(features=(2, 40), shot=10).batch("test", 0, 200)
    mean = batch.support_x.mean(1)
    deviation = batch.support_x.std(1, correction=0)
    seen = (deviation > 0.5).sum(1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0.0)
    used = deviation[deviation > 0.5]
    torch.testing.assert_close(used, torch.ones_like(used), atol=1e-5, rtol=0.0)
    assert (deviation[deviation <= 0.5] < 1e-6).all()
    # Iris has four columns, breast cancer thirty.
    iris = batch.class_ids[:, 0] < 3  # type: ignore[index]
    assert set(seen[iris].tolist()) == {2, 3, 4}
    assert seen[~iris].max() > 25
    assert seen.min() >= 2
    assert batch.query_x[..., 30:].abs().max() == 0.0
    # A feature that is constant in the support carries no information on a query.
    constant = (deviation < 1e-6)[:, None].expand_as(batch.query_x)
    assert batch.query_x[constant].abs().max() == 0.0


def test_a_task_has_rows_of_one_table_with_the_labels_of_their_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("metarun.data.tables.scaled", lambda support, query: (support, query))
    source = tables(**ONE, features=(4, 4), classes=(2, 3))
    bunch = datasets.load_iris()
    batch = source.batch("test", 0, 20)
    for task in range(20):
        seen = torch.cat([batch.support_x[task], batch.query_x[task]]).numpy()
        labels = torch.cat([batch.support_y[task], batch.query_y[task]]).numpy()
        assert (np.bincount(labels) == 10).all()
        # Columns may come in any order, the same for all rows.
        orders = [
            order
            for order in permutations(range(4))
            if {tuple(row) for row in seen} <= set(map(tuple, bunch.data[:, order].astype("f")))
        ]
        assert orders
        table = bunch.data[:, orders[0]].astype("f")
        classes = [set(bunch.target[(table == row).all(1)]) for row in seen]
        of_label = [
            set().union(*(c for c, own in zip(classes, labels, strict=True) if own == label))
            for label in (0, 1)
        ]
        assert not of_label[0] & of_label[1]


def test_no_class_is_in_two_splits_and_so_no_row() -> None:
    source = tables()
    names = {split: set(source.class_names(split)) for split in SPLITS}
    assert not names["train"] & names["val"]
    assert not (names["train"] | names["val"]) & names["test"]
    assert names["val"] == {"digits/7", "digits/8", "digits/9"}
    kept = {split: source._held[split] for split in SPLITS}
    digits = datasets.load_digits()
    for split, classes in (("train", range(7)), ("val", range(7, 10))):
        own = kept[split][0].rows.numpy()  # type: ignore[index]
        expected = digits.data[np.isin(digits.target, list(classes))]
        assert sorted(map(tuple, own)) == sorted(map(tuple, expected))


def test_patients_of_the_splits_are_apart_and_all_there() -> None:
    source = diabetes()
    rows = [tuple(row) for split in SPLITS for row in source._rows[split].numpy()]
    assert sorted(rows) == sorted(map(tuple, datasets.load_diabetes().data))
    assert [len(source._rows[split]) for split in SPLITS] == [265, 88, 89]
    targets = source._targets["train"]
    torch.testing.assert_close(targets.mean(), torch.zeros_like(targets.mean()), atol=1e-9, rtol=0)


def test_support_and_query_share_no_row() -> None:
    source = tables(
        **(ONE | {"test": ["digits"], "val": ["iris"]}), features=(64, 64), classes=(2, 6)
    )
    batch = source.batch("test", 0, 30)
    rows = torch.cat([batch.support_x, batch.query_x], 1)
    apart = torch.cdist(rows, rows) + 1e3 * torch.eye(rows.shape[1])
    # All 1,797 digits differ.
    assert apart.amin() > 1e-3


def test_a_way_takes_its_rows_from_its_classes_by_turns() -> None:
    # A column encodes the class.
    source = tables(
        **(ONE | {"train": ["digits"], "val": ["wine"]}), classes=(2, 10), features=(64, 64)
    )
    held = source._held["train"][0]
    numbered = torch.zeros_like(held.rows)
    numbered[:, 0] = torch.arange(10).repeat_interleave(held.counts)
    object.__setattr__(held, "rows", numbered)
    drawn: list[int] = []
    for task in range(40):
        keys = source._keys("train", task, 1)
        rows, first = source._draw(held, keys, source.sizes["train"])
        column = rows[0].abs().sum(-1).long()
        heaps = [set(way.tolist()) for way in column]
        assert not heaps[0] & heaps[1]
        assert [int(first[0, way]) in heaps[way] for way in range(2)] == [True, True]
        for way, heap in zip(column, heaps, strict=True):
            counts = torch.stack([(way == number).sum() for number in heap])
            assert counts.max() - counts.min() <= 1
        drawn.append(len(heaps[0]) + len(heaps[1]))
    assert set(drawn) >= {2, 3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": ["irises"]}, "table irises is unknown"),
        ({"test": []}, r"data.test=\[\]: expected names"),
        ({"test": ["digits:7"], "val": ["iris"]}, "1 classes of digits, a task needs 2"),
        ({"test": ["digits:5-12"]}, "does not name classes of digits"),
        ({"test": ["digits:a"]}, "does not name classes of digits"),
        ({"test": ["digits:6-8"], "val": ["iris"]}, "digits/6 is in data.train and in data.test"),
        ({"test": ["iris", "iris"]}, "iris/setosa is in data.test twice"),
        ({"shot": 45}, "of wine has 48 rows"),
        ({"features": (0, 3)}, r"data.features=\[0,3\]"),
        ({"classes": (3, 2)}, r"data.classes=\[3,2\]"),
        ({"tasks": 0}, "data.tasks=0"),
        (
            {"way": 3, "classes": (2, 2)},
            r"way=3 is more than the 2 classes .* data.classes=\[3,3\]",
        ),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables(**options)


def test_regressions_have_one_way_and_enough_patients() -> None:
    with pytest.raises(ValueError, match="way=2 has no meaning"):
        make_source(Diabetes, sizes=sizes(2, 5, 5))
    with pytest.raises(ValueError, match="val has 88 patients"):
        make_source(Diabetes, sizes=sizes(1, 80, 20))


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from metarun.data.tables import table

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    table.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'metarun\[sklearn\]'"):
        tables()
    table.cache_clear()


def test_a_fingerprint_changes_with_what_tasks_are_drawn_from() -> None:
    marks = {
        tables().fingerprint(), tables(classes=(2, 3)).fingerprint(),
        tables(test=["iris"]).fingerprint(), diabetes().fingerprint(),
    }  # fmt: skip
    assert len(marks) == 4
    assert tables().fingerprint() == tables().fingerprint()
