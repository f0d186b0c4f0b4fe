"""Episodes from files of features: formats, splits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metarun.core.types import SPLITS
from metarun.data.features import Features
from metarun.data.folder import Folder
from tests.data.sources import assert_same, make_source, sizes, write_class_folders

NAMES = [f"class{number}" for number in range(12)]


def arrays(**changed: Any) -> dict[str, Any]:
    """Features that hold the class and the number of each row."""
    label = np.repeat(np.arange(12), 5)
    features = np.column_stack([label, np.tile(np.arange(5), 12)]).astype(np.float32)
    return {"features": features, "label": label, "classes": np.array(NAMES)} | changed


def source(file: Path, **options: Any) -> Features:
    return make_source(Features, sizes=sizes(2, 1, 3), file=str(file), **options)


def saved(path: Path, **changed: Any) -> Path:
    np.savez(path, **{name: v for name, v in arrays(**changed).items() if v is not None})
    return path


def test_a_row_keeps_its_features_and_its_label(tmp_path: Path) -> None:
    made = source(saved(tmp_path / "a.npz"))
    batch = made.batch("test", 0, 30)
    names = made.class_names("test")
    for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
        classes = batch.class_ids.gather(1, y)  # type: ignore[union-attr]
        assert [names[c] for c in classes.flatten()] == [NAMES[int(k)] for k in x[..., 0].flatten()]
    rows = torch.cat([batch.support_x, batch.query_x], 1)
    apart = torch.cdist(rows, rows) + 9 * torch.eye(rows.shape[1])
    assert apart.amin() >= 1.0


def test_classes_are_split_as_those_of_a_folder_of_images(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "photos", dict.fromkeys(NAMES, 4))
    images = make_source(Folder, root=str(tmp_path / "photos"), sizes=sizes(2, 1, 3), image_size=8)
    made = source(saved(tmp_path / "a.npz"))
    for split in SPLITS:
        assert set(made.class_names(split)) == set(images.class_names(split))


def test_a_stated_split_is_taken_and_rows_may_be_in_any_order(tmp_path: Path) -> None:
    split = np.repeat(["train"] * 6 + ["validation"] * 3 + ["test"] * 3, 5)
    made = source(saved(tmp_path / "a.npz", split=split))
    assert made.class_names("val") == ("class6", "class7", "class8")
    # Reversing whole classes keeps the rows of each class in order.
    order = np.arange(60).reshape(12, 5)[::-1].ravel()
    shuffled = {
        name: value[order] for name, value in arrays(split=split).items() if len(value) == 60
    }
    again = source(saved(tmp_path / "b.npz", **shuffled))
    for split_name in SPLITS:
        assert_same(made.batch(split_name, 3, 4), again.batch(split_name, 3, 4))
    assert made.fingerprint() == again.fingerprint()


@pytest.mark.parametrize(
    ("changed", "options", "says"),
    [
        ({}, {"label": "lable"}, "{file} has no such column: did you mean label?"),
        ({}, {"split": "fold"}, "data.split=fold: {file} has no such column"),
        ({"features": None}, {}, "expected features, a matrix of numbers"),
        ({"features": np.zeros(60)}, {}, "float64 of shape (60,)"),
        ({"features": np.zeros((59, 2))}, {}, "59 rows of features and 60 of label"),
        ({"features": np.full((60, 2), np.nan)}, {}, "feature 1 of row 1 is nan"),
        ({"split": np.array(["train"] * 59 + ["tset"])}, {}, "split is 'tset' in row 60"),
        (
            {"split": np.array(["train"] * 30 + ["val"] * 10 + ["test"] * 18 + ["val"] * 2)},
            {},
            "class class11 is in val and in test, but splits must not share classes",
        ),
        ({"split": np.array(["train"] * 30 + ["test"] * 30)}, {}, "no row has split=val"),
        ({"classes": np.array(["a", "b"])}, {}, "a label is no number from 0 to 1"),
        ({"label": np.array(["a"] * 59 + [""]), "classes": None}, {}, "row 60 has no label"),
        ({}, {"val_fraction": 0.7, "test_fraction": 0.3}, "leave no class to train on"),
    ],
)  # fmt: skip
def test_bad_features_are_answered_in_one_line(
    changed: Any, options: Any, says: str, tmp_path: Path
) -> None:
    file = saved(tmp_path / "a.npz", **changed)
    with pytest.raises(ValueError) as caught:
        source(file, **options)
    assert says.format(file=file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_rows_of_a_class_are_named(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"has 5 rows, 1\+9 are needed: lower"):
        make_source(Features, sizes=sizes(2, 1, 9), file=str(file))
