"""Tests of sizes that vary: ranges, and Meta-Dataset's rule."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from metarun.core.sizes import Range, chance
from metarun.core.types import EpisodeSize, Split, TaskBatch, VaryingSize
from metarun.data.episodes import ClassEpisodes
from tests.data.sources import assert_same, numbered, numbered_table, sizes

STEP = 4
"""Training tasks that share a size."""


def ranges(
    way: tuple[int, int] = (2, 5),
    shot: tuple[int, int] = (1, 3),
    query: tuple[int, int] = (1, 2),
    *splits: Split,
    **how: Any,
) -> ClassEpisodes:
    own = VaryingSize(Range(*way), Range(*shot), Range(*query))
    chosen: tuple[Split, ...] = splits or ("train", "val", "test")
    largest = dict.fromkeys(chosen, own.largest)
    values: dict[str, Any] = {
        "sizes": {**sizes(), **largest},
        "varying": dict.fromkeys(chosen, own),
        "tasks_per_step": STEP,
    }
    return numbered(**(values | how))


def size_of(batch: TaskBatch) -> EpisodeSize:
    """Return the size of the first task, counted in its labels."""
    support, query = (Counter(y[0].tolist()) for y in (batch.support_y, batch.query_y))
    assert sorted(support) == sorted(query) == list(range(len(support)))
    assert len(set(support.values())) == len(set(query.values())) == 1
    return EpisodeSize(len(support), support[0], query[0])


def test_every_size_of_the_ranges_comes_equally_often_and_independently() -> None:
    source = ranges()
    drawn = Counter(source.layout("test", index) for index in range(9600))
    assert len(drawn) == 4 * 3 * 2
    # The chi-square statistic has 23 degrees of freedom; 49.7 has probability 0.001.
    assert sum((count - 400) ** 2 / 400 for count in drawn.values()) < 49.7


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_tasks_have_the_size_that_was_drawn_and_distinct_images(split: Split) -> None:
    source = ranges()
    for index in range(0, 60, STEP):
        batch = source.batch(split, index, 1)
        assert size_of(batch) == source.layout(split, index)
        rows = torch.cat([batch.support_x, batch.query_x], 1)[0, :, 0, 0, :2]
        assert len(rows.unique(dim=0)) == len(rows)
        assert batch.class_ids is not None
        assert len(batch.class_ids[0].unique()) == batch.class_ids.shape[1]


def test_the_tasks_of_a_step_share_a_size_and_are_the_same_however_they_are_cut() -> None:
    source = ranges()
    assert len({source.layout("train", index) for index in range(10 * STEP)}) > 3
    for step in range(10):
        first = step * STEP
        whole = source.batch("train", first, STEP)
        assert_same(
            whole, TaskBatch.joined([source.batch("train", first + i, 1) for i in range(STEP)])
        )
        parts = [source.batch("train", first, 1), source.batch("train", first + 1, STEP - 1)]
        assert_same(whole, TaskBatch.joined(parts))


def test_a_batch_of_two_sizes_is_refused() -> None:
    source = ranges()
    index = next(i for i in range(99) if source.layout("test", i) != source.layout("test", i + 1))
    with pytest.raises(ValueError, match="tasks of different sizes make no batch"):
        source.batch("test", index, 2)


def test_a_size_is_another_with_another_seed_and_the_same_in_another_source() -> None:
    def first(**how: Any) -> list[Any]:
        source = ranges(**how)
        return [source.layout("train", STEP * step) for step in range(20)]

    assert first() == first()
    assert first() != first(seed=1)
    assert first() == first(eval_seed=7)


def test_a_split_with_one_size_keeps_its_episodes_bit_for_bit() -> None:
    varied, fixed = ranges((2, 5), (1, 3), (1, 2), "train"), numbered()
    assert varied.layout("test", 0) is None
    assert_same(varied.batch("test", 3, 5), fixed.batch("test", 3, 5))


def test_a_way_within_an_alphabet_takes_alphabets_with_enough_classes() -> None:
    groups = ("a", "a", "b", "b", "b", "b", "b")
    source = ranges((2, 5), groups=groups, episodes="within_alphabet")
    seen = set()
    for index in range(80):
        ids = source.batch("test", index, 1).class_ids
        assert ids is not None
        names = {groups[i] for i in ids[0].tolist()}
        assert len(names) == 1
        seen.add((*names, ids.shape[1]))
    assert seen == {("a", 2), ("b", 2), ("b", 3), ("b", 4), ("b", 5)}


def test_meta_val_lowers_a_range_of_ways_to_its_classes(caplog: pytest.LogCaptureFixture) -> None:
    many, few = numbered_table((9,) * 6), numbered_table((9,) * 3)
    source = ranges((2, 5), tables={"train": many, "val": few, "test": many})
    assert "meta-val runs with way 2..3" in caplog.text
    assert {source.layout("val", i).way for i in range(40)} == {2, 3}  # type: ignore[attr-defined]


def test_the_spec_has_the_largest_ways_and_says_that_they_vary() -> None:
    spec = ranges((2, 5)).spec
    assert (spec.output_dim, spec.train_way, spec.train_shot) == (5, 5, None)
    assert spec.ways_vary
    assert not spec.shots_differ
    assert not ranges((3, 3)).spec.ways_vary
    assert not numbered().spec.ways_vary


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"way": (2, 8)}, r"way=2..8 is more than the 7 classes in numbered's test split"),
        ({"way": (1, 4)}, r"way=1: expected 2 or more"),
        ({"shot": (1, 5)}, r"class test0 has 6 images, 5\+2 are needed"),
        ({"query": (0, 2)}, r"query=0: expected 1 or more"),
    ],
)
def test_a_range_that_the_data_do_not_bear_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranges(**how)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("50..5", r"way=50..5 is an empty range: expected 5..50"),
        ("5...50", r"way=5...50: expected a whole number, or a range such as 5..50"),
        ("five", r"way=five: expected a whole number, or a range such as 5..50"),
        ("-1..5", r"way=-1..5: expected a whole number, or a range"),
    ],
)
def test_what_is_no_range_is_refused_in_one_line(typed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        Range.of("way", typed)
    assert "\n" not in str(refused.value)


def test_a_range_of_one_number_is_that_number() -> None:
    assert Range.of("way", "5..5") == Range.of("way", 5)
    assert Range.of("way", "5..5").typed == 5
    assert Range.of("way", " 5 .. 50 ").typed == "5..50"


def test_chance_is_the_mean_over_the_ways() -> None:
    assert chance("2..4") == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 4]))
    assert chance(5) == 0.2
