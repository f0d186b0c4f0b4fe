"""Data sets from a store of all their images: splits, channels, sizes, normalization."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metarun.core.types import SPLITS
from metarun.data.augmentation import Augmentation
from metarun.data.storage.image_sets import (
    FILES,
    Arrays,
    groups_of,
    published_split,
    store_images,
)
from metarun.data.stored_images import StoredImages, TorchvisionImages
from tests.conftest import Command
from tests.data.sources import make_source, sizes

RNG = np.random.default_rng(1)
NAMES = [f"k{number:02d}" for number in range(12)]
PIXELS = RNG.integers(0, 256, (12, 6, 10, 10, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A folder with a data set of 12 classes of 6 images in color, and its gray twin."""
    names = [name for name in NAMES for _ in range(6)]
    store_images("birds", Arrays("", names, PIXELS.reshape(72, 10, 10, 3)), tmp_path, 10, 3, "")
    gray = [np.asarray(Image.fromarray(one).convert("L")) for one in PIXELS.reshape(72, 10, 10, 3)]
    store_images("gray", Arrays("", names, gray), tmp_path, 10, 1, "")
    return str(tmp_path)


def made(root: str, name: str = "birds", **options: Any) -> StoredImages:
    how = {"sizes": sizes(way=2, shot=2, query=3)} | options
    return make_source(StoredImages, name=name, root=root, **how)  # type: ignore[no-any-return]


def test_classes_are_split_by_their_names_and_rows_are_the_stored_ones(root: str) -> None:
    source = made(root)
    parts = [source.class_names(split) for split in SPLITS]
    assert [len(part) for part in parts] == [7, 2, 3]
    assert sorted(name for part in parts for name in part) == NAMES
    batch = source.batch("test", 0, 4)
    own = [NAMES.index(name) for name in source.class_names("train")]
    mean, std = PIXELS[own].mean(axis=(0, 1, 2, 3)), PIXELS[own].std(axis=(0, 1, 2, 3))
    assert batch.class_ids is not None
    for task in range(4):
        for x, label in zip(batch.query_x[task], batch.query_y[task], strict=True):
            name = source.class_names("test")[batch.class_ids[task, label]]
            pixels = x.numpy().transpose(1, 2, 0) * std + mean
            assert any(np.allclose(pixels, one, atol=0.01) for one in PIXELS[NAMES.index(name)])


def test_all_classes_are_in_each_part_if_they_are_asked_for(root: str) -> None:
    source = made(root, classes="all")
    assert all(source.class_names(split) == tuple(NAMES) for split in SPLITS)
    assert "all 12 classes" in source.notes_for_user[0]
    with pytest.raises(ValueError, match="way=13 is more than the 12 classes in birds"):
        made(root, classes="all", sizes=sizes(way=13))


def test_colors_become_the_gray_levels_of_pillow_and_back(root: str) -> None:
    one, other = made(root, channels=1), made(root, "gray")
    assert one.spec.input_shape == other.spec.input_shape == (1, 10, 10)
    difference = one._tables["train"].images.int() - other._tables["train"].images.int()
    # Pillow truncates, we round.
    assert difference.abs().max() <= 1
    colors = made(root, "gray", channels=3)._tables["train"].images
    assert torch.equal(colors, other._tables["train"].images.expand(-1, 3, -1, -1))


def test_images_are_resized_as_by_torchvision(root: str) -> None:
    source = made(root, image_size=20)
    assert source.spec.input_shape == (3, 20, 20)
    name = source.class_names("train")[0]
    first = source._tables["train"].images[0].permute(1, 2, 0).numpy()
    expected = Image.fromarray(PIXELS[NAMES.index(name)][0]).resize(
        (20, 20), Image.Resampling.BILINEAR
    )
    assert np.abs(first.astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert source.fingerprint() != made(root).fingerprint()


def test_only_training_tasks_are_augmented(root: str) -> None:
    plain, flipped = made(root), made(root, augmentation=Augmentation(flip=True))
    for split, same in (("train", False), ("val", True), ("test", True)):
        a, b = plain.batch(split, 0, 2), flipped.batch(split, 0, 2)
        assert torch.equal(a.support_x, b.support_x) is same


def test_a_class_that_a_published_split_does_not_know_is_named(root: str) -> None:
    with pytest.raises(ValueError, match="the classes are not those of cifar_fs: apple is only"):
        made(root, split="cifar_fs")


def test_superclasses_are_groups_of_adjacent_classes(tmp_path: Path) -> None:
    groups = groups_of("cifar100")
    names = sorted(groups)
    pixels = [np.zeros((32, 32, 3), np.uint8)] * 500
    labels = [name for name in names for _ in range(5)]
    store_images("cifar100", Arrays("", labels, pixels), tmp_path, 32, 3, "")
    source = made(str(tmp_path), "cifar100", split="fc100")
    assert set(source.class_names("test")) == set(published_split("fc100", names)["test"])
    found = source._tables["test"].groups
    assert found is not None
    assert [groups[name] for name in source.class_names("test")] == list(found)
    assert len({*found}) == sum(a != b for a, b in itertools.pairwise(found)) + 1 == 4


def test_a_data_set_that_is_not_there_is_named_with_the_command(metarun: Command) -> None:
    answer = metarun("algo=protonet", "data=cifar_fs")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "fetch it with `metarun data cifar_fs` (170 MB), or import files you have" in answer.err
    answer = metarun("algo=protonet", "data=tiered_imagenet")
    assert "import files you have with `metarun data tiered_imagenet --from PATH`" in answer.err


def eurosat(folder: Path) -> Path:
    """Files as torchvision's EuroSAT has them: class folders of pictures of 64 pixels."""
    for number, name in enumerate(NAMES):
        place = folder / "eurosat/2750" / name
        place.mkdir(parents=True)
        for one in range(6):
            Image.fromarray(PIXELS[number, one]).resize((64, 64)).save(place / f"{name}_{one}.png")
    return folder


def dtd(folder: Path) -> Path:
    """Files as torchvision's DTD has them: pictures, and a list of each part."""
    base = folder / "dtd/dtd"
    everyone = _dtd_names()
    for number, name in enumerate(everyone):
        place = base / "images" / name
        place.mkdir(parents=True)
        for one in range(3):
            Image.fromarray(PIXELS[number % 12, one]).save(place / f"{name}_{one}.jpg")
    (base / "labels").mkdir()
    for one, part in enumerate(("train", "val", "test")):
        lines = "".join(f"{name}/{name}_{one}.jpg\n" for name in everyone)
        (base / f"labels/{part}1.txt").write_text(lines)
    return folder


def _dtd_names() -> list[str]:
    lists = json.loads((FILES / "class_splits.json").read_text())["dtd"]
    return sorted(name for names in lists.values() for name in names)


def test_data_sets_of_torchvision_are_imported_by_its_own_classes(
    metarun: Command, tmp_path: Path
) -> None:
    root = str(tmp_path / "root")
    words = ["--from", str(eurosat(tmp_path / "a")), "--root", root]
    answer = metarun("data", "torchvision", "EuroSAT", *words)
    assert answer.code == 0, answer.err
    assert "torchvision_eurosat: 12 classes, 72 images" in answer.out
    words = ["--from", str(dtd(tmp_path / "b")), "--root", root]
    assert metarun("data", "torchvision", "DTD", *words).code == 0
    source = make_source(
        TorchvisionImages, name="DTD", root=root, sizes=sizes(way=2, shot=1, query=1)
    )
    assert [len(source.class_names(split)) for split in SPLITS] == [33, 7, 7]
    assert source.spec.input_shape == (3, 84, 84)
    assert "banded" in source.class_names("test")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data", "torchvision"], "type `metarun data torchvision CLASS`, one of Caltech101"),
        (["data", "torchvision", "dtd"], "data.name=dtd: did you mean DTD?"),
        (["data", "torchvision", "DTD", "--from", "no"], "DTD is not complete in no"),
        (["data=torchvision", "algo=protonet"], "data.name=null: expected the name of a data set"),
        (
            ["data=torchvision", "algo=protonet", "data.name=DTD"],
            "data=torchvision data.name=DTD is not in",
        ),
    ],
)
def test_what_torchvision_cannot_give_is_one_line(
    metarun: Command, words: list[str], says: str
) -> None:
    answer = metarun(*words)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert says in answer.err


def test_images_of_another_size_and_color_become_those_of_a_learner(root: str) -> None:
    learner, target = made(root), made(root, "gray")
    seen = target.as_for((3, 10, 10), learner.preparation)
    assert seen.spec.input_shape == (3, 10, 10)
    own = target.batch("test", 0, 2)
    batch = seen.batch("test", 0, 2)
    assert torch.equal(batch.query_y, own.query_y)
    record = learner.preparation.record()
    assert record is not None
    mean, std = torch.tensor(record["mean"]), torch.tensor(record["std"])
    gray = target.preparation.record()
    assert gray is not None
    shown = own.query_x * gray["std"][0] + gray["mean"][0]
    expected = (shown.expand(-1, -1, 3, -1, -1) - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(batch.query_x, expected, rtol=1e-4, atol=1e-5)
    assert target.spec.input_shape == (1, 10, 10)
    smaller = made(root).as_for((1, 8, 8), target.preparation).batch("val", 0, 1)
    assert smaller.support_x.shape == (1, 4, 1, 8, 8)


def test_a_test_on_other_images_does_not_depend_on_their_training_split(
    metarun: Command, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METARUN_DATA", root)
    names = [name for name in NAMES for _ in range(6)]
    words = [
        "algo=protonet", "data=omniglot_small", "~recipe", "backbone=conv4", "backbone.filters=4",
        "backbone.blocks=2", "way=2", "query=2", "train.steps=1", "eval.episodes=4",
        "eval.val_episodes=2", "device=cpu", "threads=1", "hydra.run.dir=run",
    ]  # fmt: skip
    assert metarun(*words).code == 0
    found = []
    for dark in (False, True):
        pixels = PIXELS.reshape(72, 10, 10, 3).copy()
        source = made(root)
        if dark:
            train = [i for i, name in enumerate(names) if name in source.class_names("train")]
            pixels[train] = 0
        place = Path(root) / f"new{dark}"
        store_images("kmnist", Arrays("", names, pixels), place, 10, 3, "")
        answer = metarun("test=run", "data=kmnist", f"data.root={place}")
        assert answer.code == 0, answer.err
        (file,) = Path("run/tests").glob("*/results.json")
        found.append(json.loads(file.read_text())["test"])
        shutil.rmtree("run/tests")
    assert found[0] == found[1]


EXPERIMENT = """\
# @package _global_
# First
defaults:
  - override /algo: protonet
  - override /data: kmnist
  - override /recipe: null
  - _self_
published:
  paper: A 2020
  table: Table 1
  row: ours
  cells: [{value: 50.0}]
  steps: 1
  confidence: verified
  source: a test
way: 2
shot: 1
query: 2
train: {steps: 1, shot: 1}
eval: {episodes: 4, val_episodes: 2}
backbone: {filters: 4, blocks: 2}
"""


def test_what_the_files_gave_is_no_difference_between_two_experiments(
    metarun: Command, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METARUN_DATA", root)
    names = [name for name in NAMES for _ in range(6)]
    store_images("kmnist", Arrays("", names, PIXELS.reshape(72, 10, 10, 3)), Path(root), 10, 3, "")
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/first.yaml").write_text(EXPERIMENT)
    second = "# @package _global_\n# Second\ndefaults: [first, _self_]\nshot: 2\n"
    Path("mine/experiment/second.yaml").write_text(second)
    own = ["--config-dir", "mine"]
    answer = metarun(*own, "experiment=first", "device=cpu", "threads=1", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    answer = metarun(*own, "test=run", "experiment=second")
    assert answer.code == 0, answer.err
    assert "second: A 2020, Table 1" in answer.out
