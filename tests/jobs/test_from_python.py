"""Runs and tasks from Python: `metarun.run` and `metarun.episodes`."""

from __future__ import annotations

import io
import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import metarun
from metarun.core.console import Screen
from metarun.core.errors import RunError
from tests.conftest import Answer, Command

TINY = [
    "algo=maml", "data=sinusoid", "train.steps=4", "train.tasks_per_step=2", "train.log_every=1",
    "train.eval_every=2", "eval.episodes=4", "eval.val_episodes=4", "eval.curve_steps=1",
    "device=cpu", "threads=1",
]  # fmt: skip


def numbers(folder: Path) -> object:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_python_is_that_of_the_command(
    metarun: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    import metarun as package

    answer: Answer = metarun(*TINY, "hydra.run.dir=command")
    assert answer.code == 0, answer.err
    run = package.run(*TINY, "hydra.run.dir=python")
    assert "step 4/4" in capsys.readouterr().out
    assert repr(run) == "TrainedRun('python')"
    assert numbers(run.path) == numbers(Path("command"))
    for name in ("config.yaml", "overrides.yaml"):
        assert (run.path / name).read_text() == Path("command", name).read_text()
    assert run.results["test"]["episodes"] == 4
    steps, values = run.metrics["val/mse"]
    assert steps.tolist() == [0, 2, 4] or steps.tolist() == [2, 4]
    assert values.shape == steps.shape
    assert run.metrics["train/loss"][0].tolist() == [1, 2, 3, 4]
    assert run.report() == Path("python/report.html")
    assert run.learner(device="cpu").fit([0.0, 1.0], [0.0, 1.0]).predict([0.5]).shape == (1,)


def test_two_runs_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {metarun.run(*TINY, quiet=True).path for _ in range(2)}
    assert len(paths) == 2
    assert all(path.parent.parent == Path("outputs") for path in paths)


def test_a_quiet_run_shows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    metarun.run(*TINY, quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algo=mamml"], "mamml"),
        (["way=2,3"], "has several values"),
        (["paper=finn2017_sinusoid"], "a sweep has several runs: start it on the command line"),
        (["resume=outputs"], "resume=outputs: a stored run is used by metarun.load"),
        (["data=folder", "algo=protonet"], "data=folder needs data.root=PATH"),
        (["train.steps=0"], "train.steps=0"),
    ],
)
def test_a_mistake_is_a_value_error_before_any_file(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        metarun.run(*words)
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_is_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"the gradient of .* is nan; step 0 is saved"):
        metarun.run(*TINY, "optim.lr=1e30", "train.steps=50", quiet=True)


def test_episodes_are_the_tasks_of_a_run() -> None:
    words = ["data=omniglot_small", "way=3", "shot=2", "query=4", "device=cpu", "~recipe"]
    first, second = itertools.islice(metarun.episodes(*words, split="test", num_tasks=2), 2)
    assert first.support_x.shape == (2, 6, 1, 28, 28)
    assert first.query_y.shape == (2, 12)
    (again,) = itertools.islice(metarun.episodes(*words, split="test", start=3), 1)
    assert torch.equal(again.support_x[0], second.support_x[1])
    (other,) = itertools.islice(metarun.episodes(*words), 1)
    assert not torch.equal(other.support_x[0], first.support_x[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": "all"}, "split='all': expected 'train', 'val' or 'test'"),
        ({"num_tasks": 0}, "num_tasks=0"),
        ({"start": -1}, "start=-1"),
    ],
)
def test_wrong_arguments_of_episodes_are_named_at_once(
    given: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metarun.episodes("data=sinusoid", **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean data"):
        metarun.episodes("data.amplitud=3")


def test_a_notebook_shows_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    screen = Screen(Console(file=file, force_jupyter=True, highlight=False))
    with screen.attached(), screen.bar("train", 3) as bar:
        bar.to(1)
        logging.getLogger("metarun.test").info("step 1/3", extra={"bar_shows_it": True})
    assert file.getvalue() == "step 1/3\n"


def test_values_are_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = metarun.run(*TINY, quiet=True)
    assert all(isinstance(part, np.ndarray) for pair in run.metrics.values() for part in pair)


def test_words_in_a_list_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"is no text: give words such as 'algo=maml' one by one"):
        metarun.run(["algo=maml"])  # type: ignore[arg-type]
