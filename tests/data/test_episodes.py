"""Class episodes: determinism, disjointness, counts and the processing of every pixel."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metarun.core import seeding
from metarun.core.types import SPLITS, EpisodeSize, Split
from metarun.data.augmentation import Augmentation
from metarun.data.episodes import ClassEpisodes, sample
from tests.data.sources import assert_same, augmented, numbered, numbered_table, sizes

SOURCES = {
    "plain": numbered(),
    "rotations are classes": numbered(rotations="classes", rotations_eval="classes"),
    "rotations per task": numbered(rotations="per_task", rotations_eval="per_task"),
    "augmented": augmented(),
    "within groups": numbered(
        groups=("a", "a", "a", "b", "b", "b", "b"), episodes="within_alphabet", sizes=sizes(way=3)
    ),
    "drawers apart": numbered(
        (8,) * 4, groups=("a",) * 4, episodes="within_alphabet", drawers="apart", sizes=sizes(way=3)
    ),
}


def identities(x: Tensor) -> Tensor:
    """Return the (…, 2) class and image number encoded in numbered images."""
    return (x[..., 0, :2] * 255).round().long() - 1


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
@pytest.mark.parametrize("split", SPLITS)
def test_a_batch_is_the_stack_of_its_tasks(source: ClassEpisodes, split: Split) -> None:
    batch = source.batch(split, 5, 12)
    for place in range(12):
        assert_same(batch[place : place + 1], source.batch(split, 5 + place, 1))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 30), st.data())
def test_any_cut_of_a_batch_gives_the_same_tasks(
    index: int, count: int, data: st.DataObject
) -> None:
    source = SOURCES["augmented"]
    cut = data.draw(st.integers(0, count))
    whole = source.batch("train", index, count)
    assert_same(whole[:cut], source.batch("train", index, cut))
    assert_same(whole[cut:], source.batch("train", index + cut, count - cut))


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(5, 12), min_size=3, max_size=8),
    shot=st.integers(1, 3),
    query=st.integers(1, 2),
    index=st.integers(0, 10**6),
    data=st.data(),
)
def test_an_episode_is_well_formed(
    counts: list[int], shot: int, query: int, index: int, data: st.DataObject
) -> None:
    way = data.draw(st.integers(2, len(counts)))
    source = numbered(tuple(counts), sizes=sizes(way, shot, query))
    batch = source.batch("test", index, 4)
    assert batch.class_ids is not None
    for task in range(4):
        classes = batch.class_ids[task]
        assert len(set(classes.tolist())) == way
        support, query_rows = (
            identities(batch.support_x[task, :, 0]),
            identities(batch.query_x[task, :, 0]),
        )
        assert torch.equal(classes[batch.support_y[task]], support[:, 0])
        assert torch.equal(classes[batch.query_y[task]], query_rows[:, 0])
        assert batch.support_y[task].bincount(minlength=way).tolist() == [shot] * way
        assert batch.query_y[task].bincount(minlength=way).tolist() == [query] * way
        rows = [tuple(row) for row in torch.cat([support, query_rows]).tolist()]
        assert len(set(rows)) == way * (shot + query)


def test_every_image_has_the_same_chance() -> None:
    source = numbered((6, 12, 6), sizes=sizes(2, 1, 2))
    batch = source.batch("train", 0, 6000)
    seen = identities(batch.query_x[:, :, 0])
    for number, count in enumerate((6, 12, 6)):
        places = seen[seen[..., 0] == number][:, 1].bincount(minlength=count).double()
        assert (places / places.mean() - 1).abs().max() < 0.15
    assert batch.class_ids is not None
    first = batch.class_ids[:, 0].bincount(minlength=3).double()
    assert (first / 2000 - 1).abs().max() < 0.08


def test_local_labels_and_the_order_of_rows_are_shuffled() -> None:
    source = numbered(sizes=sizes(way=3, shot=2, query=2))
    batch = source.batch("train", 0, 500)
    assert batch.class_ids is not None
    assert (batch.class_ids.diff(dim=1) < 0).any(dim=1).float().mean() > 0.5
    assert len(batch.support_y.unique(dim=0)) > 60
    assert len(batch.query_y.unique(dim=0)) > 60


def test_sampling_is_without_replacement_and_even() -> None:
    keys = seeding.task_keys(0, "train", 0, 20000, torch.device("cpu"))
    drawn = sample(keys, 0, torch.full((20000,), 5), 3)
    assert (drawn.sort(dim=1).values.diff(dim=1) > 0).all()
    triples = (2**drawn).sum(dim=1).bincount()
    assert (triples > 0).sum() == 10
    assert (triples[triples > 0].double() / 2000 - 1).abs().max() < 0.1


def test_rotations_as_classes_turn_every_image_of_a_class_alike() -> None:
    source = numbered(rotations="classes", sizes=sizes(train=EpisodeSize(20, 2, 2)))
    assert source.num_classes("train") == 28
    assert source.num_classes("test") == 7
    batch = source.batch("train", 0, 30)
    assert batch.class_ids is not None
    turns = batch.class_ids // 7
    assert set(turns.flatten().tolist()) == {0, 1, 2, 3}
    for task in range(30):
        for x, label in zip(batch.support_x[task], batch.support_y[task], strict=True):
            class_id = int(batch.class_ids[task, label])
            upright = x.rot90(-(class_id // 7), dims=(-2, -1))
            assert identities(upright[0])[0] == class_id % 7
    assert source.class_names("train")[8] == "train1/rot090"


def test_an_alphabet_can_be_turned_as_one() -> None:
    source = numbered(
        groups=("a", "a", "a", "b", "b", "b", "b"),
        rotations="mirrored",
        episodes="within_turned_alphabet",
        sizes=sizes(way=3),
    )
    ids = source.batch("train", 0, 400).class_ids
    assert ids is not None
    turns, classes = ids // 7, ids % 7
    assert (turns == turns[:, :1]).all()
    assert ((classes < 3) == (classes[:, :1] < 3)).all()
    assert turns[:, 0].bincount(minlength=8).min() > 25
    assert all(len(set(task)) == 3 for task in classes.tolist())
    with pytest.raises(ValueError, match=r"train\.way=5 is more than the 4 classes in an alphabet"):
        numbered(
            groups=("a", "a", "a", "b", "b", "b", "b"),
            rotations="classes",
            episodes="within_turned_alphabet",
            sizes=sizes(way=4, train=EpisodeSize(5, 1, 1)),
        )


def test_one_person_draws_the_support_of_a_task_and_another_the_query() -> None:
    source = numbered(
        (8,) * 7,
        groups=("a", "a", "a", "b", "b", "b", "b"),
        episodes="within_alphabet",
        drawers="apart",
        sizes=sizes(way=3, shot=1, query=2),
    )
    for split in SPLITS:
        batch = source.batch(split, 0, 300)
        support = identities(batch.support_x[:, :, 0])[..., 1]
        query = identities(batch.query_x[:, :, 0])[..., 1]
        assert (support == support[:, :1]).all()
        persons = query.sort(dim=1).values.unflatten(1, (2, 3))
        assert (persons == persons[:, :, :1]).all()
        assert (persons[:, 0, 0] < persons[:, 1, 0]).all()
        assert not (query == support[:, :1]).any()
        assert len(torch.stack([support[:, 0], persons[:, 0, 0]], 1).unique(dim=0)) > 30


def test_mirrored_classes_are_the_mirror_images_of_the_turned_ones() -> None:
    source = numbered(rotations="mirrored", sizes=sizes(train=EpisodeSize(20, 2, 2)))
    names = source.class_names("train")
    assert (names[8], names[29]) == ("train1/rot090", "train1/mirror_rot000")
    batch = source.batch("train", 0, 30)
    assert batch.class_ids is not None
    assert int(batch.class_ids.max()) >= 28
    for task in range(30):
        for x, label in zip(batch.support_x[task], batch.support_y[task], strict=True):
            turn, class_id = divmod(int(batch.class_ids[task, label]), 7)
            upright = x.rot90(-(turn % 4), dims=(-2, -1))
            upright = upright.flip(-1) if turn >= 4 else upright
            assert identities(upright[0])[0] == class_id


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ({}, 7),
        ({"rotations": "classes"}, 28),
        ({"rotations": "mirrored"}, 56),
        ({"rotations": "per_task"}, 7),
    ],
    ids=["upright", "rotations are classes", "mirrors are classes", "rotations per task"],
)
def test_class_ids_number_the_training_classes_that_the_spec_counts(
    options: dict[str, Any], classes: int
) -> None:
    source = numbered(**options)
    assert source.spec.num_train_classes == classes
    ids = source.batch("train", 0, 200).class_ids
    assert ids is not None
    assert ids.unique().tolist() == list(range(classes))


def test_a_row_has_its_class_behind_its_local_label() -> None:
    batch = numbered().batch("train", 0, 50)
    assert batch.class_ids is not None
    for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
        assert torch.equal(batch.class_ids.gather(1, y), identities(x[..., 0, :, :])[..., 0])


def test_a_rotation_per_task_turns_a_class_in_support_and_query_alike() -> None:
    source = numbered(rotations="per_task", sizes=sizes(way=4, shot=1, query=1))
    batch = source.batch("train", 0, 100)
    seen = set()
    for task in range(100):
        for label in range(4):
            support = batch.support_x[task, batch.support_y[task] == label][0, 0]
            query = batch.query_x[task, batch.query_y[task] == label][0, 0]
            # The mark (a full pixel) is next to the upper corner.
            places = [int((image == 1.0).flatten().int().argmax()) for image in (support, query)]
            assert places[0] == places[1]
            seen.add(places[0])
    assert len(seen) == 4
    assert source.num_classes("train") == 7
    upright = source.batch("test", 0, 20).support_x
    assert (upright[..., 0, 2] == 1.0).all()


def test_within_groups_a_task_stays_in_one_group_that_is_large_enough() -> None:
    groups = ("a", "a", "b", "b", "b", "c", "c")
    source = numbered(groups=groups, episodes="within_alphabet", sizes=sizes(way=3))
    ids = source.batch("train", 0, 50).class_ids
    assert ids is not None
    assert set(ids.flatten().tolist()) == {2, 3, 4}
    both = numbered(groups=groups, episodes="within_alphabet", sizes=sizes(way=2))
    ids = both.batch("train", 0, 200).class_ids
    assert ids is not None
    assert {tuple(groups[i] for i in task) for task in ids.tolist()} == {
        ("a", "a"),
        ("b", "b"),
        ("c", "c"),
    }


def test_training_images_alone_are_augmented() -> None:
    changed, config = augmented(), numbered()
    assert not torch.equal(
        changed.batch("train", 0, 3).support_x, config.batch("train", 0, 3).support_x
    )
    for split in ("val", "test"):
        assert_same(changed.batch(split, 0, 3), config.batch(split, 0, 3))


def test_evaluation_does_not_depend_on_the_seed_of_training() -> None:
    one, other = numbered(seed=1), numbered(seed=2)
    assert_same(one.batch("test", 0, 5), other.batch("test", 0, 5))
    assert not torch.equal(one.batch("train", 0, 5).support_x, other.batch("train", 0, 5).support_x)


def test_normalization_is_per_channel() -> None:
    config = numbered().batch("test", 0, 2).support_x
    scaled = numbered(mean=[0.25], std=[0.5]).batch("test", 0, 2).support_x
    torch.testing.assert_close(scaled, (config - 0.25) / 0.5)


class Divisors(TorchDispatchMode):
    """Notes what tensors are divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            self.found.append(args[1])
        return func(*args, **(kwargs or {}))


def test_pixels_are_divided_by_a_tensor_which_every_device_does_alike() -> None:
    with Divisors() as divisors:
        numbered().batch("test", 0, 2)
    assert divisors.found
    # CUDA multiplies by the reciprocal of a number.
    assert all(isinstance(value, Tensor) for value in divisors.found)


def test_training_may_do_without_query_rows() -> None:
    source = augmented(sizes=sizes(train=EpisodeSize(5, 3, 0)))
    batch = source.batch("train", 0, 2)
    assert batch.query_x.shape == (2, 0, 1, 4, 4)
    assert batch.query_y.shape == (2, 0)


def test_the_way_of_training_may_differ() -> None:
    source = numbered(sizes=sizes(way=3, train=EpisodeSize(7, 1, 2)))
    assert (source.spec.output_dim, source.spec.train_way) == (3, 7)
    assert source.batch("train", 0, 1).support_y.max() == 6


def test_too_few_classes_in_val_lower_its_way_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    tables = dict(numbered()._tables)
    tables["val"] = numbered_table((9, 9, 9))
    with caplog.at_level(logging.WARNING):
        source = numbered(tables=tables)
    assert source.sizes["val"].way == 3
    assert source.sizes["test"].way == 5
    assert "val has 3 classes, fewer than way=5" in caplog.text
    assert source.batch("val", 0, 1).support_y.shape == (1, 3)
    with pytest.raises(ValueError, match=r"eval\.val_way=5 is more than the 3 classes"):
        numbered(tables=tables, val_way=5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"sizes": sizes(way=8)}, "way=8 is more than the 7 classes in numbered's test split: "
         "set way=7 or less"),
        ({"sizes": sizes(shot=2, query=15)}, r"class test0 has 6 images, 2\+15 are needed: "
         r"lower query to 4$"),
        ({"sizes": sizes(shot=8)}, r"class test0 has 6 images, 8\+3 are needed: lower shot "
         r"to 5 and query to 1$"),
        ({"sizes": sizes(query=15), "can_drop": True}, r"lower query to 5 or set "
         r"data.min_per_class=16 to drop it"),
        ({"sizes": sizes(way=1)}, r"^way=1: expected 2 or more"),
        ({"sizes": sizes(train=EpisodeSize(5, 0, 1))}, r"train.shot=0: expected 1 or more"),
        ({"sizes": sizes(query=0, train=EpisodeSize(5, 1, 0))}, r"query=0: expected 1 or more"),
        ({"episodes": "within_alphabet"}, "needs alphabets, numbered has none"),
        ({"drawers": "apart"}, "drawers=apart needs classes of one alphabet.*within_alphabet"),
        ({"episodes": "within_turned_alphabet", "rotations": "per_task"}, "turns all classes of a"),
        ({"episodes": "within_alphabet", "groups": ("a", "a", "b", "b", "b", "c", "c"),
          "sizes": sizes(way=4)}, "^way=4 is more than the 3 classes in an alphabet of"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_with_both_numbers(
    how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        numbered(**how)


def test_a_fingerprint_follows_the_images() -> None:
    assert numbered().fingerprint() == numbered().fingerprint()
    assert numbered().fingerprint() != numbered((6, 9, 7, 20, 8, 6, 12)).fingerprint()
    tables = dict(numbered()._tables)
    tables["test"].images[3, 0, 2, 2] = 9
    assert numbered(tables=tables).fingerprint() != numbered().fingerprint()


@pytest.mark.parametrize(
    "key",
    ["degrees", "translate", "scale", "shear", "color", "elastic", "crop"],
)
def test_augmentation_out_of_range_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.augmentation\.{key}=-0\.1: expected 0 to "):
        Augmentation(**{key: -0.1})
    with pytest.raises(ValueError, match=rf"data\.augmentation\.{key}=1000\.0: expected 0 to "):
        Augmentation(**{key: 1000.0})


def drawn(augmentation: Augmentation, image: Tensor, count: int = 200) -> Tensor:
    """Return the augmented copies of one (C, H, W) image."""
    keys = seeding.task_keys(0, "train", 0, count, torch.device("cpu"))
    return augmentation(image.expand(count, 1, *image.shape).clone(), keys)[:, 0]


def centroid(images: Tensor) -> Tensor:
    """Return the (…, 2) mean row and column of the ink, in pixels."""
    ink = images.sum(dim=1)
    rows = torch.arange(ink.shape[1], dtype=ink.dtype)
    total = ink.sum(dim=(1, 2))
    return (
        torch.stack([(ink.sum(2) * rows).sum(1), (ink.sum(1) * rows).sum(1)], dim=1)
        / total[:, None]
    )


def test_a_shift_moves_by_up_to_its_fraction_of_the_side() -> None:
    image = torch.zeros(1, 40, 40)
    image[0, 18:22, 18:22] = 1.0
    moved = centroid(drawn(Augmentation(translate=0.1), image)) - 19.5
    assert moved.abs().max() <= 4.01
    assert moved.abs().max() > 3.8
    assert moved.mean(dim=0).abs().max() < 0.4


def test_a_turn_keeps_lengths_and_angles_stay_in_range() -> None:
    image = torch.zeros(1, 41, 41)
    image[0, 4:7, 19:22] = 1.0
    arm = centroid(drawn(Augmentation(degrees=30.0), image)) - 20.0
    torch.testing.assert_close(arm.norm(dim=1), torch.full((200,), 15.0), rtol=0.0, atol=0.1)
    angles = torch.rad2deg(torch.atan2(arm[:, 1], -arm[:, 0]))
    assert 28.0 < angles.abs().max() < 30.2
    assert angles.min() < -25.0 < 25.0 < angles.max()


def test_a_scale_changes_the_area_by_its_square() -> None:
    image = torch.zeros(1, 40, 40)
    image[0, 12:28, 12:28] = 1.0
    area = drawn(Augmentation(scale=0.2), image).sum(dim=(1, 2, 3)) / 256
    assert 0.63 < area.min() < 0.68
    assert 1.38 < area.max() < 1.46


def test_a_shear_keeps_the_area() -> None:
    image = torch.zeros(1, 40, 40)
    image[0, 12:28, 18:22] = 1.0
    changed = drawn(Augmentation(shear=20.0), image)
    torch.testing.assert_close(
        changed.sum(dim=(1, 2, 3)), torch.full((200,), 64.0), rtol=0.02, atol=0.0
    )
    assert not torch.allclose(changed[0], image, atol=0.1)


def test_an_elastic_change_moves_parts_apart_and_none_farther_than_its_fraction() -> None:
    parts = []
    for corner in (4, 30):
        image = torch.zeros(1, 41, 41)
        image[0, corner : corner + 5, corner : corner + 5] = 1.0
        changed = drawn(Augmentation(elastic=0.05), image)
        parts.append(centroid(changed) - (corner + 2))
    # Bicubic interpolation overshoots its control points a little.
    assert torch.cat(parts).abs().max() < 1.2 * 0.05 * 41
    assert torch.cat(parts).abs().max() > 1.0
    assert (parts[0] - parts[1]).abs().mean() > 0.5
    assert torch.stack(parts).mean(dim=(0, 1)).abs().max() < 0.2


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    image = torch.arange(12.0).reshape(1, 3, 4) / 12
    changed = drawn(Augmentation(flip=True), image)
    mirrored = (changed == image.flip(-1)).all(dim=3).all(dim=2).all(dim=1)
    same = (changed == image).all(dim=3).all(dim=2).all(dim=1)
    assert (mirrored ^ same).all()
    assert 70 < mirrored.sum() < 130


@pytest.mark.parametrize("padding", ["zeros", "reflection"])
def test_a_crop_is_a_window_of_the_padded_image(padding: Any) -> None:
    image = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0))
    changed = drawn(Augmentation(crop=2, padding=padding), image, 400)
    mode = "reflect" if padding == "reflection" else "constant"
    padded = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)), mode)
    windows = [padded[:, y : y + 6, x : x + 5] for y in range(5) for x in range(5)]
    counts = [sum(np.array_equal(one.numpy(), window) for one in changed) for window in windows]
    # Each of the 25 places is drawn about 16 times, and nothing else is.
    assert sum(counts) == 400
    assert min(counts) > 3
    assert max(counts) < 40


def test_color_changes_stay_in_range_and_leave_black_alone() -> None:
    image = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    changed = drawn(Augmentation(color=0.4), image)
    assert changed.min() >= 0.0
    assert changed.max() <= 1.0
    assert changed.std(dim=0).mean() > 0.05
    assert drawn(Augmentation(color=0.4), torch.zeros(3, 6, 6)).abs().max() == 0.0


def test_pictures_of_every_kind_are_prepared_alike(tmp_path: Path) -> None:
    source = numbered()
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    image = Image.fromarray(pixels)
    image.save(tmp_path / "one.png")
    kinds: list[Any] = [
        image,
        tmp_path / "one.png",
        str(tmp_path / "one.png"),
        pixels,
        pixels[:, :, None],
        pixels[None],
        np.repeat(pixels[:, :, None], 3, axis=2),
        pixels / 255.0,
        torch.from_numpy(pixels.copy()),
    ]
    rows = source.prepare(kinds)
    assert rows.shape == (len(kinds), 1, 4, 4)
    for row in rows:
        torch.testing.assert_close(row[0], torch.from_numpy(pixels) / 255.0)
    assert source.prepare(rows) is rows


def test_what_cannot_be_prepared_is_named(tmp_path: Path) -> None:
    source = numbered()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    for images, message in (
        ([tmp_path / "broken.png"], "broken.png cannot be read as an image"),
        ([tmp_path / "none.png"], "there is no image .*none.png"),
        ([np.full((4, 4), 7.0)], r"image 0 has values outside \[0, 1\]"),
        ([np.full((4, 4), 300)], "image 0 has values outside 0 to 255"),
        ([np.zeros((2, 4, 4, 4))], "image 0 is an array of shape"),
        ([np.zeros((4, 4, 7))], "image 0 is an array of shape"),
        ([], "no images were passed"),
        (tmp_path / "one.png", "one image was passed, a list is expected"),
        (torch.zeros(3, 1, 5, 5), r"images have shape \(3, 1, 5, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            source.prepare(images)
