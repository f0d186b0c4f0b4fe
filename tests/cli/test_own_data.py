"""A stranger's image data set: a class and a YAML in a folder of their own, and a run of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Command

SHAPES = """\
from metarun.data.image_files import ImageFiles

class Shapes(ImageFiles):
    def list_images(self, root):
        numbers = {"train": range(3), "val": range(3, 5), "test": range(5, 7)}
        return {s: {str(n): sorted(root.glob(f"{n}_*")) for n in of} for s, of in numbers.items()}
"""
YAML = """\
# @package _global_
# Shapes
defaults:
  - /augmentation@data.augmentation: none
data:
  _target_: my_shapes.Shapes
  root: images
  image_size: 16
"""
WORDS = [
    "--config-dir", "conf", "data=shapes", "algo=protonet", "backbone=conv4", "backbone.filters=4",
    "way=2", "query=2", "train.steps=2", "train.tasks_per_step=2", "eval.episodes=4",
    "eval.val_episodes=4", "device=cpu", "threads=1",
]  # fmt: skip


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with seven kinds of images, the class and its YAML."""
    (tmp_path / "images").mkdir()
    for kind in range(7):
        for number in range(4):
            picture = Image.new("RGB", (20, 24), (30 * kind, 9 * number, 0))
            picture.save(tmp_path / f"images/{kind}_{number}.png")
    (tmp_path / "conf/data").mkdir(parents=True)
    (tmp_path / "conf/data/shapes.yaml").write_text(YAML)
    (tmp_path / "my_shapes.py").write_text(SHAPES)
    return tmp_path


def test_a_stranger_writes_a_class_that_lists_images_and_runs_it(
    metarun: Command, own: Path
) -> None:
    answer = metarun(*WORDS, "data.augmentation.flip=true")
    assert answer.code == 0, answer.err
    (path,) = (own / "outputs").rglob("results.json")
    found = json.loads(path.read_text())
    assert (found["data"], found["way"], found["test"]["episodes"]) == ("shapes", 2, 4)
    assert json.loads(path.with_name("environment.json").read_text())["data_fingerprint"]
    # Ten lines or fewer, and no private name.
    assert len([line for line in SHAPES.splitlines() if line]) <= 10
    assert "._" not in SHAPES


def test_a_class_with_too_few_images_is_one_line(metarun: Command, own: Path) -> None:
    (own / "images/6_3.png").unlink()
    (own / "images/6_2.png").unlink()
    answer = metarun(*WORDS)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert "class 6 has 2 images, 1+2 are needed: lower query to 1" in answer.err
    assert "min_per_class" not in answer.err


def test_a_folder_that_is_not_there_is_one_line(metarun: Command, own: Path) -> None:
    answer = metarun(*WORDS, "data.root=pictures")
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert "data.root=pictures: expected the folder of the images" in answer.err
    assert not (own / "outputs").exists()
