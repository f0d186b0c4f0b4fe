"""Streams of the same images rotated, permuted and colored."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metarun.core.types import SPLITS, EpisodeSize, Split, TaskBatch
from metarun.data.gray_images import digits
from metarun.data.storage.image_sets import Arrays, groups_of, published_split, store_images
from metarun.data.transformed_streams import PermutedStream, RainbowStream, RotatedStream
from tests.data.sources import assert_same, make_source, sizes

KINDS: Any = [RotatedStream, PermutedStream, RainbowStream]


def stream(kind: Any, way: int = 4, shot: int = 3, query: int = 2, **how: Any) -> Any:
    how = {"tasks": 5, "pool": 6, "rows": 4, "dtype": torch.float64} | how
    train = EpisodeSize(way, *how.pop("train_size", (3, 2)))
    return make_source(kind, sizes=sizes(way, shot, query, train=train), **how)


def by_task(x: Tensor, tasks: int = 5) -> Tensor:
    """Reshape rows (T, J R, …) to those of each task, (T, J, R, …)."""
    return x.unflatten(1, (tasks, -1))


def config(source: Any, batch_of: Any) -> TaskBatch:
    """Return the same streams without transformations of the images."""
    source.change = lambda images, keys: images  # noqa: ARG005
    return batch_of()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_trajectories_are_pure_and_cut_anyhow(kind: Any, split: Split) -> None:
    source = stream(kind)
    whole = source.batch(split, 2, 3)
    for number in range(3):
        assert_same(whole[number : number + 1], source.batch(split, 2 + number, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_each_task_shows_every_class_and_holds_out_what_no_task_shows(kind: Any) -> None:
    source = stream(kind)
    batch = config(source, lambda: source.batch("test", 0, 2))
    assert batch.support_x.shape[1] == 5 * 12
    assert batch.query_x.shape[1] == 5 * 8
    labels = by_task(batch.support_y)
    assert all(row.bincount().tolist() == [3] * 4 for row in labels.flatten(0, 1))
    assert any(not torch.equal(labels[0, 0], other) for other in labels[0, 1:])
    for task in range(2):
        shown = {tuple(row.flatten().tolist()) for row in batch.support_x[task]}
        held = by_task(batch.query_x)[task]
        assert not shown & {tuple(row.flatten().tolist()) for row in held[0]}
        assert all(torch.equal(held[0], other) for other in held[1:])
        # No more images than the pool has, and more than one task shows.
        assert 12 < len(shown) <= 4 * 6


def test_a_label_is_the_same_class_in_every_task() -> None:
    source = stream(PermutedStream, source="omniglot_small", pool=4, query=2)
    batch = config(source, lambda: source.batch("test", 0, 1))
    of_class: dict[int, set[int]] = {}
    images = source._tables["test"].images.flatten(1).double() / 255.0
    for row, label in zip(batch.support_x[0], batch.support_y[0], strict=True):
        place = int((images == row.flatten()).all(1).nonzero()[0])
        of_class.setdefault(int(label), set()).add(place // 20)
    assert batch.class_ids is not None
    assert of_class == {label: {int(c)} for label, c in enumerate(batch.class_ids[0])}


def test_a_task_turns_all_its_images_by_one_angle_that_grows() -> None:
    source = stream(RotatedStream, tasks=4)
    keys = torch.arange(3)
    bar = torch.zeros(3, 4, 2, 1, 17, 17, dtype=torch.float64)
    bar[..., 8, 8:] = 1.0
    turned = source.change(bar, keys)
    assert torch.equal(turned[:, :, 0], turned[:, :, 1])
    x = torch.arange(17.0).double() - 8
    mass = turned[:, :, 0, 0]
    across, down = (mass * x).sum((2, 3)), (mass * x[:, None]).sum((2, 3))
    angle = torch.rad2deg(torch.atan2(down, across)).abs()
    for task in range(4):
        assert (angle[:, task] > 45 * task - 3).all()
        assert (angle[:, task] < 45 * (task + 1) + 3).all()
    assert angle[:, 1].std() > 1.0


def test_a_task_shuffles_all_its_images_in_one_order_of_its_own() -> None:
    source = stream(PermutedStream, tasks=3)
    numbers = torch.arange(36.0).view(6, 6)
    images = numbers.expand(2, 3, 2, 1, 6, 6)
    shuffled = source.change(images, torch.arange(2)).flatten(-2)
    assert torch.equal(shuffled[:, :, 0], shuffled[:, :, 1])
    orders = shuffled[:, :, 0, 0].flatten(0, 1)
    assert all(torch.equal(order.sort().values, numbers.flatten()) for order in orders)
    assert len(orders.unique(dim=0)) == 6


def test_a_rainbow_has_56_looks_each_once() -> None:
    source = stream(RainbowStream, tasks=56)
    image = torch.zeros(1, 56, 1, 1, 16, 16, dtype=torch.float64)
    image[..., 4:12, 6:12] = 1.0
    image[..., 2:4, 6:8] = 1.0
    looks = source.change(image, torch.tensor([5]))[0, :, 0]
    assert looks.shape == (56, 3, 16, 16)
    assert len((looks * 1000).round().flatten(1).unique(dim=0)) == 56
    corners = looks[:, :, 0, 0]
    assert len(corners.unique(dim=0)) == 7
    # Ink is white, and half of the transformations have a quarter of it.
    ink = (looks.amin(1) > 0.95).sum((1, 2)).sort().values
    assert ink[:28].max() * 3 < ink[28:].min()


def test_the_digits_are_all_there_in_parts_that_share_none() -> None:
    tables = digits()
    rows = torch.cat([tables[split].images.flatten(1) for split in SPLITS])
    assert len(rows) == 1797
    assert all(len(table.names) == 10 for table in tables.values())
    sets = [{row.numpy().tobytes() for row in tables[split].images} for split in SPLITS]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'metarun\[sklearn\]'"):
        stream(RotatedStream)
    digits.cache_clear()


COUNTS = {"0": 50, "1": 41, "2": 60}
TESTS = {"0": 11, "1": 12, "2": 13}


def numbered_digits(root: Path, num_test: int) -> str:
    """Store images of three classes whose first pixels are their numbers in the source."""
    train = [name for name, count in COUNTS.items() for _ in range(count - TESTS[name])]
    names = train + [name for name, count in TESTS.items() for _ in range(count)]
    images = np.zeros((len(names), 28, 28), np.uint8)
    images[:, 0, 0] = np.arange(len(names))
    store_images("mnist", Arrays("", names, list(images), num_test), root, 28, 1, "")
    return str(root)


def numbers_of(source: Any) -> list[set[int]]:
    return [set(source._tables[split].images[:, 0, 0, 0].tolist()) for split in SPLITS]


def test_a_published_test_half_is_for_test_streams_alone(tmp_path: Path) -> None:
    root = numbered_digits(tmp_path, sum(TESTS.values()))
    source = stream(RotatedStream, way=2, rows=2, source="mnist", root=root)
    train, val, test = numbers_of(source)
    everyone = sum(COUNTS.values())
    assert test == set(range(everyone - sum(TESTS.values()), everyone))
    assert not train & val
    assert train | val | test == set(range(everyone))
    assert source._tables["test"].counts == (11, 12, 13)
    # A fifth of 39, 29 and 47.
    assert source._tables["val"].counts == (8, 6, 9)
    assert not source.notes_for_user
    assert all(source.class_names(split) == ("0", "1", "2") for split in SPLITS)


@pytest.mark.parametrize("num_test", [0, sum(TESTS.values())])
def test_rows_are_divided_by_their_numbers_where_no_half_decides(
    num_test: int, tmp_path: Path
) -> None:
    root = numbered_digits(tmp_path, num_test)
    how: dict[str, Any] = {"source": "mnist", "root": root, "way": 2, "rows": 2}
    how |= {"val_fraction": 0.3, "test_fraction": 0.5}
    source = stream(RotatedStream, split="rows", **how)
    parts = numbers_of(source)
    assert sum(map(len, parts)) == len(set.union(*parts)) == sum(COUNTS.values())
    assert source._tables["val"].counts == (15, 12, 18)
    assert source._tables["test"].counts == (25, 20, 30)
    other = stream(RotatedStream, **how)
    assert bool(other.notes_for_user) == (num_test == 0)
    assert (other.fingerprint() == source.fingerprint()) == (num_test == 0)
    fewer = stream(RotatedStream, split="rows", **{**how, "val_fraction": 0.25})
    assert fewer.fingerprint() != source.fingerprint()


@pytest.mark.parametrize("kind", KINDS)
def test_streams_of_photographs_are_gray_with_the_published_classes(
    kind: Any, tmp_path: Path
) -> None:
    names = sorted(groups_of("cifar100"))
    pixels = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    store_images("cifar100", Arrays("", names * 8, list(pixels) * 8), tmp_path, 32, 3, "")
    source = stream(kind, source="cifar_fs", root=str(tmp_path), image_size=20)
    for split, expected in published_split("cifar_fs", names).items():
        assert set(source.class_names(split)) == set(expected)
    batch = source.batch("test", 0, 2)
    assert batch.support_x.shape == (2, 5 * 12, source.channels, 20, 20)
    assert 0.0 <= batch.support_x.min() <= batch.support_x.max() <= 1.0
    how: dict[str, Any] = {"source": "cifar_fs", "root": str(tmp_path), "split": "rows"}
    how |= {"way": 100, "shot": 1, "query": 1, "train_size": (1, 1), "pool": 1, "rows": 100}
    every = stream(kind, **how, test_fraction=0.3, val_fraction=0.3)
    assert every.class_names("train") == tuple(names)


def test_what_is_not_stored_is_named_with_the_command(tmp_path: Path) -> None:
    for source, command in (("mnist", "mnist"), ("EuroSAT", "torchvision EuroSAT")):
        line = rf"data.source={source} is not in .*: fetch it with `metarun data {command} --root"
        with pytest.raises(ValueError, match=line):
            stream(RotatedStream, source=source, root=str(tmp_path))
    with pytest.raises(ValueError, match=r"data.source=minst: did you mean mnist\?"):
        stream(RotatedStream, source="minst")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"split": "rows"}, "data.source=digits has one split: use data.split=published"),
        ({"source": "omniglot_small", "image_size": 200}, "image_size=200: expected 8 to 105"),
        ({"way": 11}, "way=11 is more than the 10 classes in digits's test split"),
        ({"tasks": 0}, "data.tasks=0: expected 1 or more"),
        ({"kind": RainbowStream, "tasks": 57}, "data.tasks=57: expected 56 or fewer"),
        ({"shot": 9}, "shot=9 is more than the 6 images of a class that the tasks share"),
        ({"rows": 5}, "data.rows=5 does not divide the 12 rows of a task"),
    ],
)
def test_what_cannot_be_streamed_is_refused_in_one_line(how: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        stream(how.pop("kind", RotatedStream), **how)
