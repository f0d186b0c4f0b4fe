"""Tests of tasks from several data sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from metarun.config.build import build_experiment, build_source
from metarun.core.sizes import Range
from metarun.core.types import SPLITS, Parts, SourceSetup, Split, TaskBatch, VaryingSize
from metarun.data.episodes import ClassEpisodes, ClassTable
from metarun.data.mixed import Mixed
from metarun.data.recorded import record_of
from metarun.data.storage.image_files import Photograph
from metarun.data.synthetic import Sinusoid
from metarun.evaluation.episodes import evaluate
from tests.data.sources import assert_same, make_source
from tests.helpers import composed

STEP = 3
SHADES = {"dark": 40, "light": 200, "color": 120}


class Plain(ClassEpisodes):
    """Classes of uniform images; the red of a class tells it, and all images have its shade."""

    def __init__(
        self, setup: SourceSetup, *, shade: int, classes: int = 6, channels: int = 1, side: int = 8
    ) -> None:
        images = torch.full((classes * 9, channels, side, side), shade, dtype=torch.uint8)
        images += torch.arange(classes).repeat_interleave(9).byte()[:, None, None, None]
        names = tuple(f"c{number}" for number in range(classes))
        table = ClassTable(images, names, (9,) * classes)
        convert = Photograph(side, crop=True, grayscale=channels == 1)
        tables = dict.fromkeys(SPLITS, table)
        super().__init__(setup, name="plain", tables=tables, prepare=convert)


def parts(**more: Any) -> Parts:
    made: dict[str, Any] = {
        "dark": partial(Plain, shade=SHADES["dark"]),
        "light": partial(Plain, shade=SHADES["light"], classes=7),
        "color": partial(Plain, shade=SHADES["color"], channels=3, side=12),
    }
    return Parts({**made, **more})


def mixture(**how: Any) -> Mixed:
    own = parts(**how.pop("more", {}))
    values: dict[str, Any] = {"parts": own, "sources": list(own), "image_size": 16}
    made: Mixed = make_source(Mixed, **(values | {"tasks_per_step": STEP} | how))
    return made


def sources_in(batch: TaskBatch) -> set[str]:
    """Return the sources of the images, by their shades: rows are pixels in [-1, 1]."""
    shades = (batch.support_x.mean((2, 3, 4)) + 1.0) * 127.5
    names = list(SHADES)
    nearest = [min(names, key=lambda n: abs(SHADES[n] - float(s))) for s in shades.flatten()]
    return set(nearest)


def test_each_step_takes_its_tasks_from_one_source_and_all_have_a_share() -> None:
    source = mixture()
    seen: Counter[str] = Counter()
    for step in range(60):
        batch = source.batch("train", step * STEP, STEP)
        (name,) = sources_in(batch)
        assert name == source.names[source.source_of("train", step * STEP)]
        seen[name] += 1
    assert set(seen) == set(SHADES)


def test_sources_are_drawn_by_their_weights() -> None:
    source = mixture(weights=[1.0, 0.0, 3.0])
    drawn = Counter(source.source_of("train", STEP * step) for step in range(4000))
    assert set(drawn) == {0, 2}
    # Four standard deviations of a binomial.
    assert abs(drawn[0] - 1000) < 4 * np.sqrt(4000 * 0.25 * 0.75)


def test_tasks_are_the_same_however_they_are_cut() -> None:
    source = mixture()
    whole = source.batch("train", 0, 4 * STEP)
    for cut in (1, 2, STEP, 5):
        starts = range(0, 4 * STEP, cut)
        pieces = [source.batch("train", at, min(cut, 4 * STEP - at)) for at in starts]
        assert_same(whole, TaskBatch.joined(pieces))
    again = mixture()
    assert_same(whole, again.batch("train", 0, 4 * STEP))
    assert_same(source.batch("test", 1, 5), again.batch("test", 1, 5))


def test_episodes_of_a_test_are_of_each_source_in_turn_as_its_own() -> None:
    source = mixture()
    own = make_source(parts()["light"].func, shade=SHADES["light"], classes=7)
    for index in range(9):
        assert source.source_of("test", index) == index % 3
    ours, theirs = source.batch("test", 3 * 4 + 1, 1), own.batch("test", 4, 1)
    assert torch.equal(ours.support_y, theirs.support_y)
    assert ours.class_ids is not None
    assert theirs.class_ids is not None
    assert torch.equal(ours.class_ids - 6, theirs.class_ids)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_one_size_and_number_of_channels(channels: int) -> None:
    source = mixture(channels=channels, image_size=10)
    assert source.spec.input_shape == (channels, 10, 10)
    for index in range(3):
        x = source.batch("test", index, 1).support_x
        assert x.shape[2:] == (channels, 10, 10)
        assert float(x.min()) >= -1.0
        assert sources_in(source.batch("test", index, 1)) == {source.names[index]}


def test_classes_are_numbered_over_all_sources() -> None:
    source = mixture()
    assert source.num_classes("train") == source.spec.num_train_classes == 6 + 7 + 6
    assert source.class_names("test")[6] == "light/c0"
    assert source.counts("val") == (9,) * 19
    assert sum(len(rows) for rows in source.all_rows("test")) == 9 * 19
    seen = torch.cat(
        [i for k in range(90) if (i := source.batch("train", k, 1).class_ids) is not None]
    )
    assert set(seen.flatten().tolist()) == set(range(19))


def test_sizes_of_a_mixture_may_vary() -> None:
    own = VaryingSize(Range(2, 5), Range(1, 3), Range(1, 2))
    varied: Mapping[str, Any] = {
        "varying": dict.fromkeys(SPLITS, own),
        "sizes": dict.fromkeys(SPLITS, own.largest),
    }
    source = mixture(**varied)
    steps = [source.batch("train", step * STEP, STEP) for step in range(20)]
    shapes = {(len(sources_in(b)), b.support_x.shape[1]) for b in steps}
    assert {number for number, _ in shapes} == {1}
    assert len(shapes) > 3
    assert len({source.layout("test", index) for index in range(60)}) > 12


def test_two_mixtures_differ_in_their_fingerprint() -> None:
    one, other = mixture(), mixture(more={"dark": partial(Plain, shade=41)})
    assert one.fingerprint() == mixture().fingerprint() != other.fingerprint()


def test_the_record_of_a_mixture_prepares_images_as_it_does() -> None:
    described = record_of(mixture())["preparation"]
    assert described["mean"] == described["std"] == [0.5] * 3
    assert (described["size"], described["grayscale"]) == (16, False)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"sources": None}, r"data=mixed needs data.sources=\[NAME,NAME,…\]"),
        ({"sources": ["dark", "dark"]}, r"data.sources has dark twice"),
        ({"weights": [1.0]}, r"data.weights=\[1\]: expected 3 numbers of 0 or more"),
        ({"weights": [1.0, -1.0, 2.0]}, r"data.weights=\[1,-1,2\]: expected 3 numbers"),
        ({"weights": [0.0, 0.0, 0.0]}, r"not all 0"),
        ({"more": {"wave": partial(Sinusoid)}}, r"data.sources: wave has no classes of images"),
        ({"image_size": 4}, r"data.image_size=4: expected 8 to 512"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(**how)


WORDS = [
    "data=mixed", "data.sources=[omniglot_small,stream]", "data.image_size=14", "algo=protonet",
    "device=cpu", "backbone.filters=2", "backbone.blocks=2", "way=3", "query=2",
]  # fmt: skip


def test_names_of_sources_become_their_configurations() -> None:
    one = "data.sources=[omniglot_small]"
    config = composed(WORDS[0], one, "data.options={omniglot_small:{rotations:classes}}")
    node = config["data"]["parts"]["omniglot_small"]
    assert node["rotations"] == "classes"
    assert node == {**composed("data=omniglot_small", "~recipe")["data"], "rotations": "classes"}
    source = build_source(
        composed(*WORDS, one, "data.options={omniglot_small:{rotations:classes}}")
    )
    assert source.spec.num_train_classes == 4 * 136
    assert source.spec.input_shape == (3, 14, 14)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.sources=[omniglot_smal]"], "there is no data set omniglot_smal: did you mean"),
        (["data.sources=omniglot"], "data.sources=omniglot: expected a list"),
        (["data.sources=[omniglot_small,sinusoid]"], "sinusoid has no classes of images"),
        (["data.sources=[omniglot_small,mixed]"], "mixed has no classes of images"),
        (
            ["data.sources=[omniglot_small]", "data.options={omniglot_small:{rotation:none}}"],
            "there is no key data.options.omniglot_small.rotation: did you mean",
        ),
        (
            ["data.sources=[omniglot_small]", "data.options={mnist:{}}"],
            "data.options.mnist: data.sources has omniglot_small alone",
        ),
        (["data.sources=[omniglot_small]", "way=5..90"], "way=5..90 is more than the 89 classes"),
    ],
)
def test_sources_that_there_are_not_are_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        build_source(composed("data=mixed", *words))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_results_are_told_by_source() -> None:
    made = build_experiment(composed(*WORDS, "data.sources=[omniglot_small]", "data.image_size=14"))
    own = mixture(image_size=14, sizes=made.source.sizes)
    found = evaluate(made.algorithm, own, "test", 11, 4)
    places = np.arange(11) % 3
    assert found.arrays["source"].tolist() == places.tolist()
    means = []
    for number, name in enumerate(own.names):
        record = found.record["sources"][name]
        means.append(found.values[places == number].mean())
        assert record["mean"] == pytest.approx(means[-1])
        assert record["episodes"] == int((places == number).sum())
    assert found.record["mean_of_sources"]["mean"] == pytest.approx(np.mean(means))
    assert found.digest == evaluate(made.algorithm, own, "test", 11, 1).digest


def test_a_learner_of_other_images_is_tested_on_a_mixture() -> None:
    source = mixture()
    other = make_source(Plain, shade=7)
    seen = source.as_for((1, 8, 8), other.preparation)
    split: Split = "test"
    x = seen.batch(split, 0, 1).support_x
    assert x.shape[2:] == (1, 8, 8)
    # The other normalization: pixels in [0, 1].
    assert float(x.min()) >= 0.0
    assert source.spec.input_shape == (3, 16, 16)
