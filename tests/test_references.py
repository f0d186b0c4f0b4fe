"""Tests of references.py: the queue of trainings, and references from finished runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from metarun.config.catalogue import conf_dir
from metarun.config.composition import composer
from metarun.core.settings import Reference
from metarun.jobs.meta_test import training_keys
from metarun.reporting.published import group, read_runs
from metarun.reporting.references import read_reference
from tests import references
from tests.conftest import Command
from tests.references import Runner, Training, collect, differences, queue, reference_of

CELL = "zintgraf2019_sinusoid_2context"


@pytest.fixture
def runs(metarun: Command, tmp_path: Path) -> Path:
    """One update of a published cell with two seeds."""
    words = [f"experiment={CELL}", "seed=0,1", "train.steps=1", "threads=1"]
    assert metarun("-m", *words, "hydra.sweep.dir=runs").code == 0
    return tmp_path / "runs"


def test_finished_runs_give_a_reference(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: dict[str, Reference] = {}
    monkeypatch.setattr(references, "write", written.__setitem__)
    # One update does not replace a reference of the whole recipe.
    collect(runs, None, None)
    assert not written
    assert f"{CELL}: kept" in capsys.readouterr().out
    collect(runs, "abcdefg", "A processor", replace=True)
    (found,) = written.values()
    assert list(written) == [CELL]
    assert (found.episodes, found.seeds, found.steps) == (1000, [0, 1], 1)
    assert found.command == f"metarun -m experiment={CELL} seed=0,1 train.steps=1 threads=1"
    assert found.processor == "A processor"
    assert [cell.outcome for cell in found.cells] == ["partial"]
    (measured,) = group(read_runs([runs]))
    mean = sum(float(r.record["test"]["mean"]) for r in measured.results) / 2
    assert found.cells[0].value == pytest.approx(mean, abs=5e-5)
    assert found.cells[0].over_seeds is not None
    # A note that stands in the file stays.
    noted = "zintgraf2019_sinusoid_maml"
    before = read_reference([conf_dir()], noted)
    assert before is not None
    assert before.note is not None
    assert reference_of(noted, measured).note == before.note
    capsys.readouterr()
    # A run with another setting is not the recipe.
    for path in runs.glob("*/overrides.yaml"):
        path.write_text(path.read_text() + '- "algo.inner_lr=0.5"\n')
    written.clear()
    collect(runs, None, None, replace=True)
    assert not written
    assert "left out, since it is not the recipe: algo.inner_lr=0.5" in capsys.readouterr().out


def test_a_recipe_that_changed_since_is_noticed() -> None:
    source = {"_target_": "metarun.data.folder.Folder", "image_size": None, "root": "a"}
    then = {"names": {}, "threads": 1, "train": {"steps": 3}, "algo": {"inner_lr": 0.1}}
    now = {"names": {}, "threads": 2, "train": {"steps": 3}, "algo": {"inner_lr": 0.2, "new": 1}}
    # What is worked out from the files is null in the recipe.
    then["data"], now["data"] = {**source, "image_size": 32}, source
    assert differences(then, now) == ["algo.inner_lr"]
    assert differences({**now, "algo": {"inner_lr": 0.2}}, now) == []
    # A learner without meta-training has stored 0 steps.
    assert differences({**now, "train": {"steps": 0}}, now) == []


def test_what_the_queue_shares_trains_alike() -> None:
    with composer() as compose:
        for training in (training for training in queue() if training.also):
            names = (training.experiment, *training.also)
            one, *others = (compose.job([f"experiment={name}"]).config for name in names)
            for other in others:
                assert training_keys(other) == training_keys(one), other["names"]


class Recorded(Runner):
    """A runner that calls nothing."""

    def __init__(self, runs: Path, minutes: float | None = None) -> None:
        super().__init__(runs, None, minutes)
        self.calls: list[tuple[str, ...]] = []

    def call(self, *words: str) -> str:
        self.calls.append(words)
        return "finished"


def test_a_training_is_a_sweep_and_then_the_tests_that_it_serves(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = Recorded(runs)
    assert runner.run([Training(CELL, [0, 1], ["other"], steps=1)]) == 0
    # Both runs are finished after one step.
    tests = runner.calls
    assert [words[1] for words in tests] == ["experiment=other"] * 2
    assert {Path(words[0].removeprefix("test=")) for words in tests} == set(runs.glob("exp*"))
    assert capsys.readouterr().out.startswith(f"{CELL}, seed 0, 1: finished, ")
    assert Training(CELL, [0, 1], steps=1).words([0, 1]) == [
        f"experiment={CELL}", "seed=0,1", "threads=1", "train.steps=1",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_training_that_is_given_up_is_continued_where_it_stopped(runs: Path) -> None:
    stopped = min(runs.glob("exp*"))
    (stopped / "status.json").write_text('{"state": "interrupted", "step": 70}')
    (stopped / "overrides.yaml").write_text(f"- experiment={CELL}\n- seed=0\n- threads=1\n")
    for steps, expected in ((100, 100), (50, 70)):
        runner = Recorded(runs)
        assert runner.make(Training(CELL, [0, 1], steps=steps)) == "finished"
        resumed, sweep = runner.calls
        assert resumed == (f"resume={stopped}", f"train.steps={expected}")
        assert "seed=1" in sweep
    # Another stop while it is continued.
    with (stopped / "overrides.yaml").open("a") as file:
        file.write("- train.steps=100\n")
    runner = Recorded(runs)
    runner.make(Training(CELL, [0], steps=100))
    assert runner.calls == [(f"resume={stopped}",)]


@pytest.mark.slow
def test_a_rehearsal_serves_no_cell(runs: Path) -> None:
    runner = Recorded(runs)
    runner.make(Training(CELL, [0, 1], ["other"]))
    assert [words[0] for words in runner.calls] == ["-m"]


def test_nothing_starts_after_the_time(tmp_path: Path) -> None:
    runner = Recorded(tmp_path / "runs", minutes=0.0)
    assert runner.run([Training(CELL)]) == 1
    assert runner.calls == []


def test_a_call_that_is_out_of_time_is_saved(tmp_path: Path) -> None:
    runner = Runner(tmp_path, None, 0.0)
    words = [f"experiment={CELL}", f"hydra.run.dir={tmp_path / 'run'}"]
    assert runner.call(*words) == "stopped, the time is over"
    assert f"$ metarun experiment={CELL}" in (tmp_path / "references.log").read_text()


@pytest.mark.slow
def test_a_cell_is_measured_again(metarun: Command, tmp_path: Path) -> None:
    """The cheapest cell on data that ship, with its recipe and one of the reference's seeds.

    The interval over n seeds is t s / sqrt(n). A further seed differs from the mean of the n by
    less than t s sqrt(1 + 1/n) with a probability of 95 %, which is sqrt(n + 1) times as much.
    All seeds meet the same test tasks, so that the interval over tasks does not matter.
    """
    name = "finn2017_sinusoid_multitask_5shot"
    reference = read_reference([conf_dir()], name)
    assert reference is not None
    words = [f"experiment={name}", f"seed={reference.seeds[0]}", "threads=1"]
    assert metarun(*words, "hydra.run.dir=run").code == 0
    (measured,) = group(read_runs([tmp_path / "run"]))
    again = reference_of(name, measured)
    assert again.episodes == reference.episodes
    for cell, before in zip(again.cells, reference.cells, strict=True):
        assert before.over_seeds is not None
        rounding = 0.01
        width = (len(reference.seeds) + 1) ** 0.5 * before.over_seeds + rounding
        assert cell.value == pytest.approx(before.value, abs=width)
