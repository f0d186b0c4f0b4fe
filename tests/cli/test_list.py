"""`metarun list GROUP NAME`: one choice with its keys, as a user meets it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from metarun.config.build import build_experiment
from metarun.config.catalogue import conf_dir, entries
from metarun.runs import sweeps
from metarun.runs.find import find_run
from metarun.runs.folder import RunFolder
from tests.conftest import Command
from tests.helpers import composed


def test_a_choice_is_shown_with_its_paper_its_keys_its_recipes_and_a_command(
    metarun: Command,
) -> None:
    answer = metarun("list", "algo", "anil")
    assert answer.code == 0, answer.err
    assert "ANIL (Raghu 2020)" in answer.out
    assert "https://arxiv.org/abs/1909.09157" in answer.out
    # Its own key, and one of what it builds on.
    assert " algo.adapt = head\n" in answer.out
    assert " algo.inner_lr = 0.01\n" in answer.out
    assert "recipes: cifar_fs, linear, omniglot, omniglot_small, sinusoid" in answer.out
    assert answer.out.rstrip().endswith("try: metarun algo=anil data=omniglot_small")
    assert all(len(line) <= 80 for line in answer.out.splitlines())


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("data", "sinusoid"), "data.amplitude = [0.1, 5.0]"),
        (("backbone", "conv4"), "backbone.filters = "),
        (("optim", "sgd"), "optim.method = sgd"),
        (("logger", "wandb"), "logger.wandb.project = metarun"),
        (("experiment", "quick_start"), "try: metarun experiment=quick_start"),
        (("paper", "finn2017_omniglot"), "try: metarun paper=finn2017_omniglot"),
    ],
)
def test_every_group_has_choices_to_show(
    words: tuple[str, str], shown: str, metarun: Command
) -> None:
    answer = metarun("list", *words)
    assert answer.code == 0, answer.err
    assert shown in answer.out


def test_an_explanation_fits_the_terminal_and_its_command_is_given_once(
    metarun: Command,
) -> None:
    answer = metarun("list", "experiment", "finn2017_sinusoid_5shot")
    assert max(map(len, answer.out.splitlines())) <= 80
    assert answer.out.count("metarun experiment=") == 1
    assert "has as many rows as the support. The inner rate" in " ".join(answer.out.split())


def test_a_part_of_names_is_answered_with_names_that_have_it(metarun: Command) -> None:
    answer = metarun("experiment=snell")
    assert answer.code == 2
    assert answer.err.startswith("error: experiment=snell: did you mean snell2017_")


def test_an_unknown_choice_is_one_line_with_the_nearest(metarun: Command) -> None:
    answer = metarun("list", "algo", "malm")
    assert answer.code == 2
    assert answer.err == "error: list algo malm: there is no algo=malm: did you mean maml?\n"


def test_the_command_to_try_can_be_composed(metarun: Command, tmp_path: Path) -> None:
    for words in (("algo", "r2d2"), ("algo", "oml"), ("data", "stream_sinusoid")):
        line = metarun("list", *words).out.rstrip().splitlines()[-1]
        typed = line.removeprefix("try: metarun ").split()
        assert metarun(*typed, "--cfg", "job").code == 0
    # These have no recipe: the other half has to fit nevertheless.
    for words in (("algo", "frn"), ("algo", "cmaml"), ("data", "stream_linear")):
        line = metarun("list", *words).out.rstrip().splitlines()[-1]
        assert build_experiment(composed(*line.removeprefix("try: metarun ").split()))
    assert list(tmp_path.iterdir()) == []


# What was run.


def test_the_groups_are_counted_first(metarun: Command) -> None:
    first, second, *_ = metarun("list").out.splitlines()
    assert f"{len(entries([conf_dir()], 'algo'))} algorithms, " in first
    assert "`metarun list algo`" in first + second


@pytest.mark.parametrize(
    ("word", "group"),
    [("optimizers", "optim"), ("optimizer", "optim"), ("trackers", "logger"), ("algos", "algo"),
     ("algorithms", "algo"), ("datasets", "data"), ("experiments", "experiment")],
)  # fmt: skip
def test_a_group_is_found_by_its_title(word: str, group: str, metarun: Command) -> None:
    assert metarun("list", word) == metarun("list", group)


def test_a_folder_of_ones_own_stands_anywhere(metarun: Command, tmp_path: Path) -> None:
    (tmp_path / "mine/backbone").mkdir(parents=True)
    (tmp_path / "mine/backbone/mynet.yaml").write_text("# My network\ndefaults:\n  - mlp\n")
    answers = {
        metarun(*words)
        for words in (
            ("--config-dir", "mine", "list", "backbone"),
            ("--config-dir=mine", "list", "backbone"),
            ("list", "--config-dir", "mine", "backbone"),
            ("list", "backbone", "--config-dir=mine"),
        )
    }
    (answer,) = answers
    assert "My network" in answer.out


def a_run(folder: str, time: str, state: str = "finished", **facts: Any) -> None:
    run = RunFolder.create(folder, config="names: {algo: anil, data: linear}\n")
    run.write_json("status.json", {"state": state, "step": 3, "steps": 9, "time": time, **facts})
    if state == "finished":
        figures = {"mean": 0.5, "ci95": 0.25, "episodes": 6}
        names = {"format": 1, "algo": "anil", "data": "linear", "metric": "accuracy"}
        run.write_json("results.json", {**names, "test": figures})


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_runs_are_listed_newest_first_with_figure_or_state(
    columns: int, metarun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    a_run("outputs/2026-11-21/09-00-00-anil-linear-aaaaaa", "2026-11-21T09:05:00")
    a_run("outputs/sweeps/algo=anil-12345678", "2026-11-23T09:05:00", "failed")
    a_run("outputs/2026-11-22/09-00-00-anil-linear-bbbbbb", "2026-11-22T09:05:00", "running")
    typed = ["algo=anil", "seed=1", "train.steps=100", "algo.inner_lr=0.05", "data=linear"]
    typed += ["data.noise=0.1", "eval.episodes=1000", "sweep.name=rates"]
    Path("outputs/sweeps/algo=anil-12345678/overrides.yaml").write_text(json.dumps(typed))
    a_run("outputs/2026-11-22/08-00-00-anil-linear-cccccc", "2026-11-22T08:05:00", "running")
    # That of the parent of this process, which certainly runs.
    lock = Path("outputs/2026-11-22/09-00-00-anil-linear-bbbbbb/lock")
    lock.write_text(f"{socket.gethostname()} {os.getppid()}\n")
    a_run("outputs/sweeps/damaged", "2026-11-20T09:05:00", "failed")
    Path("outputs/sweeps/damaged/config.yaml").write_text("{")
    answer = metarun("list", "runs")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= columns
    rows = [" ".join(line.split()) for line in lines if line.startswith("2026")]
    assert rows[0].startswith("2026-11-23 09:05 12345678 anil linear failed at 3 of 9")
    assert rows[1].startswith("2026-11-22 09:05 bbbbbb anil linear running at 3 of 9")
    # Its process was killed.
    assert rows[2].startswith("2026-11-22 08:05 cccccc anil linear stopped at 3 of 9")
    assert rows[3].startswith("2026-11-21 09:05 aaaaaa anil linear accuracy 50.00 ± 25.00 %")
    assert rows[4].startswith("2026-11-20 09:05 damaged – – damaged")
    # What was typed stands below where there is no room behind.
    kept = "seed=1 train.steps=100 algo.inner_lr=0.05 data.noise=0.1 eval.episodes=1000"
    assert rows[0].endswith(kept) == (columns > 100)
    assert kept in " ".join(answer.out.split())
    # Any of these words stands for its run.
    assert all(find_run(row.split()[2]).name.endswith(row.split()[2]) for row in rows)


def test_the_newest_runs_are_listed_unless_all_are_asked_for(metarun: Command) -> None:
    none = "no runs below outputs/ yet: `metarun` makes the first\n"
    assert metarun("list", "runs").out == none
    for number in range(23):
        a_run(f"outputs/run-{number}", f"2026-11-21T09:{number:02}:00")
    lines = metarun("list", "runs").out.splitlines()
    assert lines[-2] == "and 3 older: metarun list runs --all"
    assert lines[-1].endswith(": `metarun report run-22`")
    assert lines[0].split()[2] == "run-22"
    assert len(metarun("list", "runs", "--all").out.splitlines()) == 24


def test_sweeps_are_listed_with_what_is_finished(metarun: Command) -> None:
    assert metarun("list", "sweeps").out.startswith("no sweeps below outputs/ yet: `metarun -m ")
    a_run("outputs/sweeps/one", "2026-11-21T09:05:00")
    runs = ["outputs/sweeps/one", "outputs/sweeps/other"]
    sweeps.Sweep("rates", "2026-11-21T09:00:00", ["-m", "seed=1,2"], runs).store()
    assert metarun("list", "sweeps").out == (
        "2026-11-21 09:00  rates  1 of 2 finished  metarun -m seed=1,2\n"
    )


@pytest.mark.parametrize("word", ["run", "sweep"])
def test_runs_and_sweeps_are_found_in_the_singular_too(metarun: Command, word: str) -> None:
    assert metarun("list", word).out.startswith(f"no {word}s below outputs/ yet: ")
