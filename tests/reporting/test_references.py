"""Tests of references: the word for a measured value, and where it is read and shown."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import pytest
import yaml

from metarun.config.catalogue import conf_dir, experiment, load
from metarun.config.composition import composer
from metarun.config.naming import digest
from metarun.core.settings import Outcome, PublishedCell, Reference, ReferenceCell
from metarun.reporting.references import (
    decimals,
    is_accuracy,
    outcome_of,
    read_published,
    read_reference,
    words_of,
)
from metarun.reporting.tables import Figure
from tests.conftest import Command
from tests.references import PAGE, block_of, page, queue, with_reference

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
MEASURED = [name for name in EXPERIMENTS if read_reference([conf_dir()], name) is not None]


@pytest.mark.parametrize(
    ("value", "published", "word"),
    [
        # Half a point is always within, as a computer calculates 99.2 - 98.7 too.
        (Figure(99.2, 0.1), PublishedCell(98.7), "reproduced"),
        (Figure(98.2, 0.1), PublishedCell(98.7), "reproduced"),
        (Figure(99.21, 0.1), PublishedCell(98.7), "above"),
        (Figure(98.19, 0.1), PublishedCell(98.7), "below"),
        # sqrt(0.6^2 + 0.8^2) + 0.05 = 1.05.
        (Figure(97.65, 0.6), PublishedCell(98.7, ci95=0.8), "reproduced"),
        (Figure(97.64, 0.6), PublishedCell(98.7, ci95=0.8), "below"),
        # A spread over runs is no interval.
        (Figure(97.65, 0.6), PublishedCell(98.7, spread=0.8), "below"),
        # Two seeds are too few: the interval over episodes counts, 0.7 + 0.05.
        (Figure(97.95, 0.7, seeds=2, seeds_ci95=9.0), PublishedCell(98.7), "reproduced"),
        (Figure(97.94, 0.7, seeds=2, seeds_ci95=9.0), PublishedCell(98.7), "below"),
        # Of three seeds the wider one: 2 + 0.05, and 2 + 0.05 again.
        (Figure(96.65, 0.7, seeds=3, seeds_ci95=2.0), PublishedCell(98.7), "reproduced"),
        (Figure(96.64, 0.7, seeds=3, seeds_ci95=2.0), PublishedCell(98.7), "below"),
        (Figure(96.65, 2.0, seeds=3, seeds_ci95=0.7), PublishedCell(98.7), "reproduced"),
        (Figure(96.64, 2.0, seeds=3, seeds_ci95=0.7), PublishedCell(98.7), "below"),
        (Figure(math.nan), PublishedCell(98.7), "below"),
    ],
)
def test_the_word_for_an_accuracy(value: Figure, published: PublishedCell, word: str) -> None:
    assert outcome_of(value, published, 100, 100, accuracy=True) == word


@pytest.mark.parametrize(
    ("value", "published", "word"),
    [
        # sqrt(0.03^2 + 0.04^2) + 0.005 = 0.055; a low error is good.
        (Figure(0.405, 0.03), PublishedCell(0.35, ci95=0.04), "reproduced"),
        (Figure(0.406, 0.03), PublishedCell(0.35, ci95=0.04), "below"),
        (Figure(0.294, 0.03), PublishedCell(0.35, ci95=0.04), "above"),
        # 5.6 is printed as 5.60, so half of the last digit is 0.005.
        (Figure(5.605), PublishedCell(5.6), "reproduced"),
        (Figure(5.606), PublishedCell(5.6), "below"),
        (Figure(0.0354), PublishedCell(0.035), "reproduced"),
        (Figure(0.0356), PublishedCell(0.035), "below"),
    ],
)
def test_the_word_for_an_error_has_no_points(
    value: Figure, published: PublishedCell, word: str
) -> None:
    assert outcome_of(value, published, 100, 100, accuracy=False) == word


@pytest.mark.parametrize(
    ("value", "word"), [(98.1, "partial"), (98.2, "reached"), (99.9, "reached")]
)
def test_fewer_steps_than_the_recipes_have_their_own_words(value: float, word: Outcome) -> None:
    cell = PublishedCell(98.7)
    assert outcome_of(Figure(value, 0.1), cell, 99, 100, accuracy=True) == word
    # Learners without meta-training make no step.
    assert outcome_of(Figure(value, 0.1), cell, 0, 0, accuracy=True) not in ("partial", "reached")


def test_the_words_name_the_steps() -> None:
    assert words_of("reached", 2000, 60000) == "reached at 2,000 of 60,000 steps"
    assert words_of("partial", 2000, 60000) == "partial: 2,000 of 60,000 steps"
    assert words_of("below", 60000, 60000) == "below"


@pytest.mark.parametrize("name", MEASURED)
def test_a_reference_fits_its_published_values(name: str) -> None:
    folders = [conf_dir()]
    reference, published = read_reference(folders, name), read_published(folders, name)
    assert reference is not None
    assert published is not None
    assert len(reference.cells) == len(published.cells)
    assert len(set(reference.seeds)) == len(reference.seeds) > 0
    assert 0 <= reference.steps <= published.steps
    accuracy = is_accuracy(experiment(folders, name))
    for ours, cell in zip(reference.cells, published.cells, strict=True):
        assert (ours.over_seeds is None) == (len(reference.seeds) == 1)
        figure = Figure(
            ours.value, ours.ci95, seeds=len(reference.seeds), seeds_ci95=ours.over_seeds
        )
        steps = (reference.steps, published.steps)
        assert outcome_of(figure, cell, *steps, accuracy=accuracy) == ours.outcome


@pytest.mark.slow
def test_the_command_of_every_reference_composes() -> None:
    with composer() as compose:
        for name in MEASURED:
            reference = read_reference([conf_dir()], name)
            assert reference is not None
            program, *words = shlex.split(reference.command)
            several = words[0] == "-m"
            jobs = compose.jobs(words[several:], several)
            assert program == "metarun"
            assert [job.config["seed"] for job in jobs] == reference.seeds
            trained = {job.config["names"]["experiment"] for job in jobs}
            assert trained == {reference.trained_as or name}
            # The values that are read without composing are those of a run.
            values, config = experiment([conf_dir()], name), jobs[0].config
            if reference.trained_as is None:
                assert values["published"] == config["published"]
                assert (values["way"], values["shot"]) == (config["way"], config["shot"])


def test_a_reference_is_no_part_of_a_configuration_and_is_not_inherited(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    parent = (conf_dir() / "experiment/finn2017_sinusoid_5shot.yaml").read_text(encoding="utf-8")
    reference = Reference([ReferenceCell(0.5, 0.1, "above")], 600, [0], 70000, "metarun")
    (folder / "parent.yaml").write_text(with_reference(parent, reference))
    (folder / "child.yaml").write_text(
        "# @package _global_\ndefaults:\n  - parent\n  - _self_\npublished:\n  row: other\n"
    )
    folders = [conf_dir(), tmp_path]
    assert read_reference(folders, "parent") == reference
    assert read_reference(folders, "child") is None
    published = read_published(folders, "child")
    assert published is not None
    assert (published.row, published.paper) == ("other", "Finn et al. 2017")
    with composer(str(tmp_path)) as compose:
        with_it = compose.job(["experiment=parent"]).config
        child = compose.job(["experiment=child"]).config
        without = compose.job(["experiment=finn2017_sinusoid_5shot"]).config
        with pytest.raises(ValueError, match=r"there is no key reference\.note"):
            compose.job(["experiment=parent", "reference.note=x"])
    assert "reference" not in with_it
    assert "reference" not in child
    assert digest(with_it) == digest(without)


def test_the_printed_configuration_has_no_reference(metarun: Command) -> None:
    answer = metarun("experiment=finn2017_sinusoid_5shot", "--cfg", "job")
    assert answer.code == 0, answer.err
    assert "published:" in answer.out
    assert "reference:" not in answer.out


def test_a_list_of_experiments_has_references_and_marks_what_is_unverified(
    metarun: Command,
) -> None:
    lines = " ".join(metarun("list", "experiment").out.split())
    assert "MSE 0.67 / 0.38 / 0.35 after 1 / 5 / 10 steps; here 0." in lines
    assert "MSE 0.53 +- 0.09 (unverified); here 0." in lines


TEXT = """\
# @package _global_
# A title

defaults:
  - override /algo: maml
published:
  cells:
    - {value: 0.5}
  # A comment.
  steps: 3
# Of the task.
shot: 5
"""


def test_a_reference_is_written_after_what_is_published_and_all_else_stays() -> None:
    note = "A long note, " * 30 + "with: a colon # and a hash"
    cell = ReferenceCell(0.5, 0.1, "reproduced", 0.2)
    reference = Reference([cell], 600, [0, 1], 3, "metarun -m seed=0,1", 1.5, "A, 1 thread",
                          "0.1.0 (abc)", "other", note)  # fmt: skip
    written = with_reference(TEXT, reference)
    before, _, after = TEXT.partition("# Of the task.")
    assert written == before + block_of(reference) + "# Of the task." + after
    read = yaml.safe_load(written)["reference"]
    assert read["note"] == note
    assert read["cells"] == [
        {"value": 0.5, "ci95": 0.1, "over_seeds": 0.2, "outcome": "reproduced"}
    ]
    assert (read["seeds"], read["minutes"], read["trained_as"]) == ([0, 1], 1.5, "other")
    # Again, and with another value.
    assert with_reference(written, reference) == written
    other = Reference([cell], 600, [7], 3, "metarun")
    assert with_reference(written, other) == with_reference(TEXT, other)


def test_what_is_measured_keeps_its_block_in_every_file() -> None:
    for name in MEASURED:
        path = conf_dir() / "experiment" / f"{name}.yaml"
        reference = read_reference([conf_dir()], name)
        assert reference is not None
        text = path.read_text(encoding="utf-8")
        assert with_reference(text, reference) == text, f"{name}: not as `collect` writes it"


def test_the_page_is_the_one_that_the_references_give() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python tests/references.py page"


def test_the_queue_names_experiments_once() -> None:
    trainings = queue()
    named = [name for training in trainings for name in (training.experiment, *training.also)]
    assert set(named) <= set(EXPERIMENTS)
    assert len(set(named)) == len(named)
    for training in trainings:
        published = read_published([conf_dir()], training.experiment)
        assert published is not None
        assert training.steps is None or training.steps < published.steps


def test_the_decimals_are_those_that_are_printed() -> None:
    assert [decimals(value) for value in (0.9, 0.67, 0.035, 98.0)] == [2, 2, 3, 2]


def test_unknown_keys_of_a_reference_are_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    path = tmp_path / "experiment/mine.yaml"
    path.write_text("reference: {cells: [], episodes: 1, seeds: [0], steps: 1, comand: x}\n")
    with pytest.raises(ValueError, match=r"reference\.comand"):
        read_reference([tmp_path], "mine")
    assert "reference" in load(path)
