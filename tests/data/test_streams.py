"""Streams: order of the rows, held-out rows, and determinism."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.core.types import SPLITS, EpisodeSize, Split, Stream
from metarun.data.episodes import ClassTable
from metarun.data.storage.image_files import photograph
from metarun.data.streams import ClassStream, LinearStream, OmniglotSmallStream, SinusoidStream
from tests.data.sources import assert_same, make_source, numbered_table, sizes


def lines(shot: int = 6, query: int = 4, **how: Any) -> LinearStream:
    how = {"tasks": 3, "dtype": torch.float64} | how
    return make_source(LinearStream, sizes=sizes(1, shot, query), **how)


def characters(**how: Any) -> ClassStream:
    """Numbered images: the first pixel encodes the class, the second the image."""
    counts = (6, 9, 7, 20, 8, 6, 11)
    tables: dict[Split, ClassTable] = {split: numbered_table(counts) for split in SPLITS}
    train = EpisodeSize(2, 3, 2)
    options: dict[str, Any] = {
        "name": "numbered",
        "tables": tables,
        "sizes": sizes(4, 3, 2, train=train),
        "prepare": lambda image: photograph(image, 4, crop=True, grayscale=True),
    }
    return make_source(ClassStream, **options | how)


def stream(source: Any, split: Split = "test") -> Stream:
    return source.spec.streams[split]  # type: ignore[no-any-return]


def fitted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope and offset of the line through rows (R, 1), which have to be collinear."""
    design = torch.cat([x, torch.ones_like(x)], 1)
    found = torch.linalg.lstsq(design, y).solution[:, 0]
    torch.testing.assert_close(design @ found[:, None], y)
    return found[0], found[1]


SOURCES = {
    "once": lambda: lines(rows=2),
    "returning": lambda: lines(order="returning", visits=2),
    "drifting": lambda: lines(order="drifting", noise=0.1),
    "indexed": lambda: lines(indexed=True, functions=5),
    "classes": lambda: characters(rows=3, remember=5),
    "mixed classes": lambda: characters(classes_per_task=2, rotations="classes"),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("split", SPLITS)
def test_trajectories_are_pure_and_cut_anyhow(kind: str, split: Split) -> None:
    source = SOURCES[kind]()
    whole = source.batch(split, 3, 4)
    parts = [source.batch(split, 3 + i, 1) for i in range(4)]
    for number, part in enumerate(parts):
        assert_same(whole[number : number + 1], part)
    assert_same(SOURCES[kind]().batch(split, 3, 4), whole)


@pytest.mark.parametrize("kind", SOURCES)
def test_the_rows_are_as_many_as_the_layout_says(kind: str) -> None:
    source = SOURCES[kind]()
    layout = stream(source)
    batch = source.batch("test", 0, 2)
    assert batch.support_x.shape[1] == layout.num_steps * layout.rows
    assert batch.query_x.shape[1] == layout.num_tasks * layout.queries
    assert batch.support_x.shape[2:] == source.spec.input_shape
    assert list(dict.fromkeys(layout.visits)) == list(range(layout.num_tasks))


def test_a_task_of_a_line_stream_is_one_line_and_its_held_out_rows_are_on_it() -> None:
    source = lines(order="returning", visits=3)
    batch = source.batch("test", 0, 2)
    layout = stream(source)
    assert Counter(layout.visits) == {0: 3, 1: 3, 2: 3}
    assert all(a != b for a, b in zip(layout.visits, layout.visits[1:], strict=False))
    for task in range(2):
        x, y = (
            batch.support_x[task].unflatten(0, (9, 6)),
            batch.support_y[task].unflatten(0, (9, 6)),
        )
        held_x = batch.query_x[task].unflatten(0, (3, 4))
        held_y = batch.query_y[task].unflatten(0, (3, 4))
        found = [fitted(held_x[j], held_y[j]) for j in range(3)]
        for visit, j in enumerate(layout.visits):
            torch.testing.assert_close(fitted(x[visit], y[visit]), found[j])
        assert len({round(float(slope), 9) for slope, _ in found}) == 3
        # Each visit has new rows of the task.
        assert len(x.unique()) == x.numel()


def test_a_drifting_line_goes_in_equal_steps_to_where_the_held_out_rows_are() -> None:
    source = lines(shot=5, order="drifting", tasks=2, x=[1.0, 1.0 + 1e-12])
    batch = source.batch("test", 0, 1)
    # At x = 1 a line is a + b, so its values show the drift of the parameters.
    values = batch.support_y[0, :, 0]
    steps = values[1:] - values[:-1]
    torch.testing.assert_close(steps[:4], steps[:1].expand(4))
    torch.testing.assert_close(steps[5:], steps[5:6].expand(4))
    torch.testing.assert_close(values[4] + steps[3], values[5])
    torch.testing.assert_close(batch.query_y[0, :4, 0], values[5].expand(4))


def test_an_indexed_input_says_which_function_it_is_of() -> None:
    source = lines(indexed=True, rows=3)
    batch = source.batch("test", 0, 2)
    assert source.spec.input_shape == (4,)
    assert batch.support_x[0, :, :3].argmax(-1).tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert batch.query_x[1, :, :3].argmax(-1).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert batch.support_x[..., :3].sum(-1).eq(1).all()


def test_training_meets_no_more_functions_than_it_is_given() -> None:
    source = lines(functions=4, tasks=3)
    slopes: set[float] = set()
    for task in range(6):
        batch = source.batch("train", task, 1)
        own = [
            float(
                fitted(batch.query_x[0, 4 * j : 4 * j + 4], batch.query_y[0, 4 * j : 4 * j + 4])[0]
            )
            for j in range(3)
        ]
        assert len({round(slope, 9) for slope in own}) == 3
        slopes |= {round(slope, 9) for slope in own}
    assert len(slopes) == 4


def test_sinusoids_stream_as_lines_do() -> None:
    source = make_source(SinusoidStream, tasks=4, sizes=sizes(1, 3, 5))
    batch = source.batch("test", 0, 2)
    assert batch.support_x.shape == (2, 12, 1)
    assert batch.query_y.abs().max() <= 5.0


def test_classes_arrive_one_after_another_each_once() -> None:
    source = characters()
    batch = source.batch("test", 0, 3)
    assert batch.class_ids is not None
    for task in range(3):
        assert batch.support_y[task].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        assert batch.query_y[task].tolist() == [0] * 2 + [1] * 2 + [2] * 2 + [3] * 2
        shown = (batch.support_x[task, :, 0, 0, 0] * 255).round().long() - 1
        assert torch.equal(shown, batch.class_ids[task][batch.support_y[task]])
        assert len(batch.class_ids[task].unique()) == 4
        drawn = [
            tuple((row[0, 0, :2] * 255).round().long().tolist())
            for row in (*batch.support_x[task], *batch.query_x[task])
        ]
        assert len(set(drawn)) == len(drawn), "an image is held out and learned from"


def test_classes_of_a_task_arrive_mixed() -> None:
    source = characters(classes_per_task=2, sizes=sizes(4, 4, 2))
    assert stream(source).visits == (0, 1)
    labels = source.batch("test", 0, 8).support_y
    assert set(labels[:, :8].unique().tolist()) == {0, 1}
    assert set(labels[:, 8:].unique().tolist()) == {2, 3}
    assert any(row.tolist() != sorted(row.tolist()) for row in labels[:, :8])


def test_training_labels_are_numbers_of_classes_and_remembered_rows_are_of_any() -> None:
    source = characters(remember=40, rotations="classes")
    assert source.spec.num_train_classes == 28
    assert source.spec.output_dim == 28
    batch = source.batch("train", 0, 4)
    assert batch.class_ids is not None
    assert batch.query_x.shape[1] == 2 * 2 + 40
    for task in range(4):
        assert set(batch.support_y[task].tolist()) == set(batch.class_ids[task].tolist())
        # The first rotation leaves the first pixel, which encodes the class.
        upright = batch.query_y[task] < 7
        shown = (batch.query_x[task, :, 0, 0, 0] * 255).round().long() - 1
        assert torch.equal(shown[upright], batch.query_y[task][upright])
    assert len(batch.query_y[:, 4:].unique()) > 20


def test_the_alphabets_that_ship_stream_to_the_last_class() -> None:
    source = make_source(OmniglotSmallStream, sizes=sizes(89, 15, 5))
    batch = source.batch("test", 0, 1)
    assert batch.support_x.shape == (1, 89 * 15, 1, 28, 28)
    assert stream(source, "val").num_tasks == 17
    assert source.spec.output_dim == 136


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: lines(tasks=0), "data.tasks=0: expected 1 or more"),
        (lambda: lines(rows=4), "data.rows=4 does not divide the 6 rows of a visit"),
        (lambda: lines(functions=2), "data.functions=2 is fewer than data.tasks=3"),
        (lambda: lines(functions=9, order="drifting"), "does not apply to data.order=drifting"),
        (lambda: characters(classes_per_task=3), "per_task=3 does not divide the 4 classes"),
        (lambda: characters(remember=-1), "data.remember=-1: expected 0 or more"),
        (lambda: characters(rows=2), "data.rows=2 does not divide the 3 rows of a visit"),
    ],
)  # fmt: skip
def test_what_cannot_be_streamed_is_refused_in_one_line(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_the_fingerprint_knows_the_layout() -> None:
    prints = {lines(**how).fingerprint() for how in ({}, {"rows": 2}, {"order": "drifting"})}
    assert len(prints) == 3
    assert characters().fingerprint() != characters(rows=3).fingerprint()


@pytest.mark.parametrize("tasks", [3, 4, 5, 8])
def test_tasks_return_in_another_order_each_time(tasks: int) -> None:
    rounds = 4
    visits = stream(lines(order="returning", visits=rounds, tasks=tasks)).visits
    orders = [visits[first : first + tasks] for first in range(0, rounds * tasks, tasks)]
    assert all(sorted(order) == list(range(tasks)) for order in orders)
    assert all(before != after for before, after in pairwise(orders))
    assert all(one != other for one, other in pairwise(visits))
