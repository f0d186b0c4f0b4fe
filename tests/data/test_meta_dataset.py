"""Meta-Dataset's rule of ways and shots, against an independent count in numpy.

The reference follows section 3.2 of Triantafillou et al. (2020), drawn by numpy for one task at a
time. The two are compared by their distributions.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from metarun.core.sizes import Range
from metarun.core.types import SPLITS, TaskBatch, VaryingSize
from metarun.data.episodes import ClassEpisodes
from metarun.data.omniglot import OmniglotSmall
from tests.data.sources import CPU, assert_same, make_source, numbered, numbered_table, sizes

RULE = VaryingSize(Range(5, 5), Range(1, 1), Range(1, 1), "meta_dataset")
EQUAL = (20,) * 62
UNEQUAL = tuple(int(n) for n in np.random.default_rng(5).integers(2, 160, 23))


def by_rule(counts: tuple[int, ...] = EQUAL, **how: Any) -> ClassEpisodes:
    values: dict[str, Any] = {"tables": dict.fromkeys(SPLITS, numbered_table(counts))}
    values |= {"varying": dict.fromkeys(SPLITS, RULE), "sizes": sizes()}
    return numbered(**(values | how))


def reference(counts: tuple[int, ...], draw: np.random.Generator) -> tuple[int, int, list[int]]:
    """Return way, queries of a class and support rows of each class of one task."""
    way = int(draw.integers(5, min(50, len(counts)) + 1))
    sizes = np.array(counts)[draw.permutation(len(counts))[:way]]
    query = min(10, min(int(size) // 2 for size in sizes))
    beta = 1.0 - draw.random()
    total = min(500, sum(int(np.ceil(beta * min(100, size - query))) for size in sizes))
    share = np.exp(draw.uniform(np.log(0.5), np.log(2.0), way)) * sizes
    share /= share.sum()
    rows = [
        min(int(part * (total - way)) + 1, int(n) - query)
        for part, n in zip(share, sizes, strict=True)
    ]
    return way, query, rows


def drawn(source: ClassEpisodes, index: int) -> tuple[int, int, list[int]]:
    """Return the same of an episode, counted in its labels."""
    task = source.batch("test", index, 1)
    support, query = (np.bincount(y[0].numpy()) for y in (task.support_y, task.query_y))
    assert len(set(query.tolist())) == 1
    assert len(support) == len(query)
    return len(support), int(query[0]), support.tolist()


def gap(one: list[float], other: list[float]) -> float:
    """Return the Kolmogorov-Smirnov distance of two samples, in units of its 0.1 % quantile."""
    both = np.sort([*one, *other])
    shares = [np.searchsorted(np.sort(own), both, "right") / len(own) for own in (one, other)]
    limit = 1.95 * np.sqrt((len(one) + len(other)) / (len(one) * len(other)))
    return float(np.abs(shares[0] - shares[1]).max() / limit)


@pytest.mark.parametrize("counts", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_ways_queries_and_shots_have_the_distribution_of_the_paper(counts: tuple[int, ...]) -> None:
    source, draw = by_rule(counts), np.random.default_rng(0)
    ours = [drawn(source, index) for index in range(400)]
    naive = [reference(counts, draw) for _ in range(6000)]
    summaries = {
        "way": lambda task: task[0],
        "queries": lambda task: task[1],
        "support": lambda task: sum(task[2]),
        "greatest shot": lambda task: max(task[2]),
        "smallest shot": lambda task: min(task[2]),
        "imbalance": lambda task: float(np.std(task[2]) / np.mean(task[2])),
    }
    for name, of in summaries.items():
        assert gap([of(t) for t in ours], [of(t) for t in naive]) < 1.0, name
    # The comparison would notice another rule: balanced shots, or one way less.
    assert gap([0.0 for _ in ours], [summaries["imbalance"](t) for t in naive]) > 1.0
    assert gap([t[0] - 2 for t in ours], [t[0] for t in naive]) > 1.0


def test_every_way_from_5_to_50_is_equally_likely() -> None:
    source = by_rule()
    ways = Counter(source.layout("test", index).way for index in range(920))  # type: ignore[attr-defined]
    assert sorted(ways) == list(range(5, 51))
    # Chi-square with 45 degrees of freedom exceeds 80.1 with probability 0.001.
    assert sum((count - 20) ** 2 / 20 for count in ways.values()) < 80.1


def test_no_image_is_twice_in_a_task_and_each_is_of_its_class() -> None:
    source = by_rule(UNEQUAL)
    for index in range(40):
        task = source.batch("test", index, 1)
        assert task.class_ids is not None
        rows = torch.cat([task.support_x, task.query_x], 1)[0, :, 0, 0, :2].mul(255).round().long()
        assert len(rows.unique(dim=0)) == len(rows)
        labels = torch.cat([task.support_y, task.query_y], 1)[0]
        assert torch.equal(rows[:, 0] - 1, task.class_ids[0][labels])
        counts = torch.tensor(UNEQUAL)[rows[:, 0] - 1]
        assert (rows[:, 1] <= counts).all()


def test_images_of_a_class_are_support_and_query_equally_often() -> None:
    source = by_rule((8,) * 5)
    seen = torch.zeros(2, 8)
    for index in range(400):
        task = source.batch("test", index, 1)
        for number, x in enumerate((task.support_x, task.query_x)):
            places = x[0, :, 0, 0, 1].mul(255).round().long() - 1
            seen[number] += torch.bincount(places, minlength=8)
    for counts in seen:
        expected = counts.sum() / 8
        # Chi-square with 7 degrees of freedom exceeds 24.3 with probability 0.001.
        assert float((counts - expected).square().sum() / expected) < 24.3


def test_tasks_of_a_step_share_sizes_and_differ_in_classes_and_shots() -> None:
    source = by_rule(UNEQUAL, tasks_per_step=3)
    for step in range(12):
        whole = source.batch("train", 3 * step, 3)
        parts = [source.batch("train", 3 * step, 1), source.batch("train", 3 * step + 1, 2)]
        assert_same(whole, TaskBatch.joined(parts))
        assert whole.class_ids is not None
        assert not torch.equal(whole.class_ids[0], whole.class_ids[1])
        shots = [torch.bincount(y) for y in whole.support_y]
        assert min(int(own.min()) for own in shots) >= 1


def test_classes_of_a_task_are_of_one_alphabet_where_there_are_alphabets() -> None:
    groups = ("a",) * 9 + ("b",) * 40 + ("c",) * 4
    table = numbered_table((20,) * 53)
    own = type(table)(table.images, table.names, table.counts, groups)
    source = by_rule(tables=dict.fromkeys(SPLITS, own), episodes="within_alphabet")
    ways: dict[str, set[int]] = {}
    for index in range(300):
        task = source.batch("test", index, 1)
        assert task.class_ids is not None
        names = {groups[i] for i in task.class_ids[0].tolist()}
        assert len(names) == 1
        ways.setdefault(names.pop(), set()).add(task.class_ids.shape[1])
    # An alphabet of four has too few classes.
    assert {name: (min(own), max(own)) for name, own in ways.items()} == {"a": (5, 9), "b": (5, 40)}


def test_the_device_has_no_part_in_the_sizes() -> None:
    source = by_rule(UNEQUAL)
    assert source._composition("test", 3).shots.device == CPU


def test_a_rotation_of_its_own_turns_each_class_as_a_whole() -> None:
    source = by_rule((12,) * 6, rotations_eval="per_task")
    task = source.batch("test", 0, 1)
    assert task.support_x.shape[1] >= 5


@pytest.mark.parametrize(
    ("counts", "how", "message"),
    [
        (
            (9,) * 4,
            {},
            r"sizes=meta_dataset needs 5 classes or more, but there are 4 in n",
        ),
        ((9, 9, 1, 9, 9), {}, r"needs 2 images of each class or more, but class c2 has 1"),
    ],
)
def test_data_that_the_rule_does_not_fit_are_refused(
    counts: tuple[int, ...], how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        by_rule(counts, **how)


def test_tasks_are_of_one_alphabet_by_default() -> None:
    """As in section 3.1 of the paper, for data sets that have groups of classes."""

    def alphabets(**how: Any) -> set[int]:
        source = make_source(OmniglotSmall, **how)
        names = source.class_names("test")
        tasks = (source.batch("test", index, 1).class_ids for index in range(12))
        return {
            len({names[number].split("/")[0] for number in ids.flatten().tolist()})
            for ids in tasks
            if ids is not None
        }

    ruled = dict.fromkeys(SPLITS, RULE)
    assert alphabets(varying=ruled) == {1}
    assert alphabets(varying=ruled, episodes="any") == {2}
    assert 2 in alphabets()
    source = by_rule()
    assert source.batch("test", 0, 1).class_ids is not None  # without groups: any classes
