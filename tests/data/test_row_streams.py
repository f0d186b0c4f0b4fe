"""Streams of the rows of a table and of the images of a folder: what is shown, in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metarun.core.types import SPLITS, EpisodeSize
from metarun.data.row_streams import RowStream
from metarun.data.streams import FolderStream
from tests.data.example_tables import write
from tests.data.sources import assert_same, make_source, sizes, write_class_folders


def series(path: Path, assets: int = 12, days: int = 30) -> Path:
    """Write assets in any order of the days; the input says asset and day, the target the day."""
    lines = [
        (f"asset{asset}", f"2024-{1 + day // 28:02d}-{1 + day % 28:02d}", 1000 * asset + day, day)
        for asset in range(assets)
        for day in np.random.default_rng(asset).permutation(days + asset)
    ]
    return write(path, [("asset", "day", "x", "y"), *lines])


def stream(file: Path, shot: int = 6, query: int = 3, **options: Any) -> RowStream:
    usual = {"target": "y", "order": "day", "task": "asset", "tasks": 2, "rows": 3}
    size = sizes(options.pop("way", 1), shot, query)
    return make_source(RowStream, file=str(file), sizes=size, **(usual | options))


def units(source: RowStream, x: torch.Tensor) -> np.ndarray:
    column: Any = source._encoding.inputs[0]
    return np.rint(x[..., 0].double().numpy() * column.std + column.mean).astype(int)


def test_a_visit_shows_rows_in_order_and_holds_out_those_that_follow(tmp_path: Path) -> None:
    source = stream(series(tmp_path / "a.csv"), dtype=torch.float64)
    met: dict[str, set[int]] = {}
    for split in SPLITS:
        batch = source.batch(split, 0, 30)
        shown = units(source, batch.support_x).reshape(30, 2, 6)
        held = units(source, batch.query_x).reshape(30, 2, 3)
        rows = np.concatenate([shown, held], 2)
        assert (np.diff(rows, axis=2) == 1).all()
        assert (rows // 1000 == rows[..., :1] // 1000).all()
        assert (rows[:, 0, 0] // 1000 != rows[:, 1, 0] // 1000).all()
        target = source._encoding.targets[0]
        days = batch.support_y[..., 0].numpy() * target.std + target.mean
        np.testing.assert_allclose(days.reshape(30, 2, 6), shown % 1000, atol=1e-6)
        met[split] = set((rows // 1000).ravel().tolist())
        assert source.spec.streams is not None
        layout = source.spec.streams[split]
        assert (layout.visits, layout.steps, layout.rows, layout.queries) == ((0, 1), 2, 3, 3)
    assert sum(map(len, met.values())) == len(set.union(*met.values()))


def test_a_batch_is_its_streams_drawn_one_by_one(tmp_path: Path) -> None:
    source = stream(series(tmp_path / "a.csv"))
    whole = source.batch("test", 3, 5)
    for place in range(5):
        assert_same(source.batch("test", 3 + place, 1), whole[place : place + 1])


def test_without_tasks_the_splits_of_a_series_follow_each_other(tmp_path: Path) -> None:
    file = series(tmp_path / "a.csv", assets=1, days=100)
    source = stream(file, task=None, columns=["x"], dtype=torch.float64)
    days = {split: units(source, source.batch(split, 0, 200).support_x).ravel() for split in SPLITS}
    assert days["train"].max() < days["val"].min() <= days["val"].max() < days["test"].min()


def test_labels_of_a_stream_are_those_of_the_table(tmp_path: Path) -> None:
    text = series(tmp_path / "a.csv").read_text().splitlines()
    lines = [line.split(",") for line in text]
    lines = [[*line, "kind" if not n else "abc"[int(line[3]) % 3]] for n, line in enumerate(lines)]
    file = write(tmp_path / "b.csv", lines)
    source = stream(file, way=3, target="kind", columns=["x"], dtype=torch.float64)
    batch = source.batch("train", 0, 8)
    assert source.spec.output_dim == 3
    assert batch.support_y.dtype == torch.int64
    np.testing.assert_array_equal(batch.support_y, units(source, batch.support_x) % 1000 % 3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"order": None}, "data.order=COLUMN is missing"),
        ({"tasks": 9}, "data.tasks=9 is more than the 7 values of asset in train"),
        ({"rows": 4}, "data.rows=4 does not divide train.shot=6"),
        ({"way": 2}, "way=2: the table has"),
        ({"shot": 40}, "asset asset"),
    ],
)
def test_a_bad_stream_is_answered_in_one_line(options: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        stream(series(tmp_path / "a.csv"), **options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("together", "tasks"), [(1, 4), (2, 2), (None, 1)])
def test_images_of_a_folder_come_class_after_class_or_shuffled(
    together: int | None, tasks: int, tmp_path: Path
) -> None:
    names = [f"class{number}" for number in range(16)]
    write_class_folders(tmp_path / "photos", dict.fromkeys(names, 8))
    source = make_source(
        FolderStream,
        root=str(tmp_path / "photos"),
        sizes={split: EpisodeSize(1 if split == "train" else 4, 5, 3) for split in SPLITS},
        val_fraction=0.25,
        image_size=8,
        classes_per_task=together,
    )
    batch = source.batch("test", 0, 6)
    assert source.spec.streams["test"].num_tasks == tasks
    labels = batch.support_y
    if together == 1:
        assert torch.equal(labels, torch.arange(4).repeat_interleave(5).expand(6, -1))
    else:
        assert (labels.diff(dim=1) < 0).any(1).all()
    assert all((own.bincount() == 5).all() for own in labels)
    assert source.spec.streams["train"].num_tasks == 1
