"""`metarun list GROUP NAME`: one choice with its keys, as a user meets it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from metarun.config.catalogue import conf_dir, entries
from metarun.runs import sweeps
from metarun.runs.folder import RunFolder
from tests.conftest import Command


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
    assert "recipes: linear, omniglot, omniglot_small, sinusoid" in answer.out
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


def test_an_unknown_choice_is_one_line_with_the_nearest(metarun: Command) -> None:
    answer = metarun("list", "algo", "malm")
    assert answer.code == 2
    assert answer.err == "error: list algo malm: there is no algo=malm: did you mean maml?\n"


def test_the_command_to_try_can_be_composed(metarun: Command, tmp_path: Path) -> None:
    for words in (("algo", "r2d2"), ("algo", "oml"), ("data", "stream_sinusoid")):
        line = metarun("list", *words).out.rstrip().splitlines()[-1]
        typed = line.removeprefix("try: metarun ").split()
        assert metarun(*typed, "--cfg", "job").code == 0
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
    folders = [line.split()[-1] for line in lines if "outputs/" in line]
    assert rows[0].startswith("2026-11-23 09:05 anil linear failed at 3 of 9")
    assert rows[1].startswith("2026-11-22 09:05 anil linear running at 3 of 9")
    # Its process was killed.
    assert rows[2].startswith("2026-11-22 08:05 anil linear stopped at 3 of 9")
    assert rows[3].startswith("2026-11-21 09:05 anil linear accuracy 50.00 ± 25.00 %")
    assert rows[4].startswith("2026-11-20 09:05 – – damaged")
    assert [folder[-4:] for folder in folders] == ["5678", "bbbb", "cccc", "aaaa", "aged"]
    # The folders stand below where there is no room behind.
    assert len(lines) == (5 if columns > 100 else 10)


def test_the_newest_runs_are_listed_unless_all_are_asked_for(metarun: Command) -> None:
    assert metarun("list", "runs").out == "no runs below outputs/ yet\n"
    for number in range(23):
        a_run(f"outputs/run-{number}", f"2026-11-21T09:{number:02}:00")
    lines = metarun("list", "runs").out.splitlines()
    assert lines[-1] == "and 3 older: metarun list runs --all"
    assert lines[0].endswith("outputs/run-22")
    assert len(metarun("list", "runs", "--all").out.splitlines()) == 23


def test_sweeps_are_listed_with_what_is_finished(metarun: Command) -> None:
    assert metarun("list", "sweeps").out == "no sweeps below outputs/ yet\n"
    a_run("outputs/sweeps/one", "2026-11-21T09:05:00")
    runs = ["outputs/sweeps/one", "outputs/sweeps/other"]
    sweeps.Sweep("rates", "2026-11-21T09:00:00", ["-m", "seed=1,2"], runs).store()
    assert metarun("list", "sweeps").out == (
        "2026-11-21 09:00  rates  1 of 2 finished  metarun -m seed=1,2\n"
    )


@pytest.mark.parametrize("word", ["run", "sweep"])
def test_runs_and_sweeps_are_found_in_the_singular_too(metarun: Command, word: str) -> None:
    assert metarun("list", word).out == f"no {word}s below outputs/ yet\n"
