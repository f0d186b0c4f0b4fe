"""Tests of `metarun compare` through its command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from metarun.cli.main import main
from metarun.config.composition import composer
from metarun.jobs.comparison import _file_name, folder_name, with_algorithms

TINY = [
    "train.steps=2", "train.tasks_per_step=2", "eval.episodes=4", "eval.val_episodes=4",
    "eval.tasks_per_batch=4", "eval.curve_steps=1", "device=cpu",
]  # fmt: skip
WORDS = ["data=linear", "algo=maml,fomaml", "shot=2,3", *TINY]


def results(folder: Path) -> dict[str, int]:
    """Return the modification time of each run's results, by the name of its folder."""
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.rglob("results.json")}


def test_it_trains_every_combination_and_the_second_time_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *WORDS, "--format", "markdown"]) == 0
    first = results(tmp_path)
    assert len(first) == 4
    table = capsys.readouterr().out
    assert "| `maml` | MAML (Finn 2017) |" in table
    assert "2 points: MSE" in table
    assert "not run" not in table
    assert main(["compare", *WORDS]) == 0
    assert results(tmp_path) == first
    assert "4 of 4 runs are finished" in capsys.readouterr().out
    assert [p.read_text() in table for p in tmp_path.rglob("*.md")] == [True]


def test_what_is_missing_is_said_and_not_blank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--table", *WORDS, "--format", "markdown"]) == 0
    assert "| not run | not run |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_untrained_line_is_the_learner_with_its_initial_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metarun.config.build import build_experiment
    from metarun.evaluation.episodes import evaluate

    monkeypatch.chdir(tmp_path)
    words = ["data=linear", "algo=maml", *TINY]
    assert main(["compare", *words]) == 0
    stored = json.loads(next(tmp_path.rglob("untrained.json")).read_text())
    with composer() as compose:
        made = build_experiment(compose.job(words).config)
    values = evaluate(made.algorithm, made.source, "test", 4, 4).values
    assert stored["mean"] == pytest.approx(values.mean(), rel=1e-12)


def test_an_algorithm_whose_package_is_missing_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metarun.jobs.comparison.find_spec", lambda _: None)
    with composer() as compose:
        words = with_algorithms(compose, ["data=linear"])
    assert "gp_exact" not in words[0].removeprefix("algo=").split(",")
    assert "algo=gp_exact is left out: the package sklearn" in capsys.readouterr().err


def test_an_algorithm_that_needs_more_shots_is_left_out_and_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with composer() as compose:
        words = with_algorithms(compose, ["data=omniglot_small", "shot=5,1"])
        assert "selector" not in words[0].removeprefix("algo=").split(",")
        assert "algo=selector is left out: it needs shot=2 or more" in capsys.readouterr().err
        words = with_algorithms(compose, ["data=omniglot_small", "shot=5,2"])
        assert "selector" in words[0].removeprefix("algo=").split(",")


def test_all_algorithms_that_can_learn_the_data_take_part() -> None:
    with composer() as compose:
        words = with_algorithms(compose, ["data=linear", "shot=2"])
        assert with_algorithms(compose, ["algo=maml"]) == ["algo=maml"]
    assert words[1:] == ["data=linear", "shot=2"]
    names = words[0].removeprefix("algo=").split(",")
    assert "reptile" in names
    assert "gp_exact" in names
    assert "protonet" not in names
    assert "oml" not in names
    with composer() as compose:
        words = with_algorithms(compose, ["data=stream_linear"])
    names = words[0].removeprefix("algo=").split(",")
    assert {"oml", "ftml", "lamaml", "online", "replay"} <= set(names)
    assert not {"maml", "pretrained"} & set(names)


def test_a_folder_is_named_after_what_a_run_computes_and_not_how() -> None:
    def name(*words: str) -> str:
        with composer() as compose:
            return folder_name(compose.job(["algo=maml", "data=linear", *words]))

    assert name() == name("threads=1", "engine=loop", "device=cpu")
    assert len({name(), name("seed=1"), name("algo.inner_lr=0.5"), name("train.steps=7")}) == 4


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    words = ["data=linear", "algo=maml", *TINY[1:], "train.steps=1000", "train.log_every=10"]
    command = [sys.executable, "-m", "metarun", "compare", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.rglob("metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 130, errors
    status = json.loads(next(tmp_path.rglob("status.json")).read_text())
    assert status["state"] == "interrupted"
    assert 0 < status["step"] < 1000
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"from step {status['step']}" in again.stdout
    assert len(results(tmp_path)) == 1


def test_a_failed_run_leaves_the_others_alone_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["data=linear", "algo=maml", "algo.inner_lr=1e30,0.01", *TINY]
    assert main(["compare", *words]) == 1
    assert len(results(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "failed: repeat the command to try it again" in said


def test_recipes_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "data=linear", "algo=maml", *TINY, "~recipe"]) == 0
    assert "there is no recipe" not in capsys.readouterr().err
    (config,) = tmp_path.rglob("config.yaml")
    # The recipe of this pair has five inner steps, and the defaults have one.
    assert yaml.safe_load(config.read_text())["algo"]["inner_steps"] == 1
    assert main(["compare", "data=linear", "algo=maml", *TINY]) == 0
    steps = [
        yaml.safe_load(p.read_text())["algo"]["inner_steps"] for p in tmp_path.rglob("config.yaml")
    ]
    assert sorted(steps) == [1, 5]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["linear"], "'linear' is not KEY=VALUE"),
        (["data=linaer"], "did you mean linear?"),
        (["data=linear", "algo=mml"], "did you mean maml?"),
        (["data=linear", "shot=0"], "shot=0: expected 1 or more"),
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(
    words: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert part in said
    assert not list(tmp_path.iterdir())


def test_a_table_on_a_terminal_fits_it_and_the_file_is_in_markdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    words = ["data=linear", "algo=maml,fomaml", *TINY]
    assert main(["compare", *words]) == 0
    table = capsys.readouterr().out.split("batch norm: none")[1].partition("written to")[0]
    assert max(map(len, table.splitlines())) <= 60
    assert "`" not in table
    assert re.search(
        r"^maml\n  method +MAML \(Finn 2017\)\n  5 points: MSE +\d", table, re.MULTILINE
    )
    (file,) = tmp_path.rglob("*.md")
    assert "| `maml` | MAML (Finn 2017) |" in file.read_text()
    # The progress is no part of what another program reads.
    assert main(["compare", *words, "--format", "json"]) == 0
    answer = capsys.readouterr()
    (record,) = json.loads(answer.out)
    assert "2 of 2 runs are finished" in answer.err
    assert {row["algo"] for row in record["rows"]} == {"maml", "fomaml"}
    assert all(row["5 points: MSE"]["episodes"] == 4 for row in record["rows"])


STREAM = [
    "data=stream_linear", "data.tasks=3", "shot=4", "query=3", "backbone.hidden=[6]",
    "algo=online,replay,joint_hindsight", "seed=0,1", "eval.episodes=5", "eval.val_episodes=2",
    "eval.proficiency=0.05", "device=cpu", "threads=1", "algo.online_lr=0.03", "algo.updates=5",
]  # fmt: skip


@pytest.mark.slow
def test_learners_on_a_stream_are_held_against_each_other_and_against_hindsight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*STREAM, "--against", "joint_hindsight", "--format", "markdown"]
    assert main(["compare", *words]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    heads = [head.strip() for head in lines[0].split("|")]
    rows = {line.split("`")[1]: [c.strip() for c in line.split("|")] for line in lines[2:]}
    assert set(rows) == {"online", "replay", "joint_hindsight"}
    assert {"backward transfer", "rows to proficiency", "cumulative loss"} <= set(heads)
    regret = heads.index("regret against `joint_hindsight`")
    assert rows["joint_hindsight"][regret] == "–"

    losses = {"online": [], "joint_hindsight": []}
    for folder in sorted((tmp_path / "outputs/compare").glob("*/")):
        algo = folder.name.partition("-")[0]
        if algo in losses:
            losses[algo].append(np.load(folder / "episodes.npz")["incoming_loss"].sum(1))
        assert not (folder / "untrained.json").exists()
    by_hand = np.subtract(losses["online"], losses["joint_hindsight"]).mean()
    assert float(rows["online"][regret].split(" ± ")[0]) == pytest.approx(by_hand, rel=0.02)
    assert "over 2 seeds" in rows["online"][regret]
    pictures = sorted((tmp_path / "outputs/compare").glob("*.??g"))
    assert [path.suffix for path in pictures] == [".png", ".svg"]
    svg = pictures[1].read_text()
    assert all(f">{name}<" in svg for name in rows)
    for text in ("Along the stream", "stream_linear: means over ", " test streams and 2 seeds"):
        assert text in svg
    # In the style of all figures, the legend has no frame.
    assert 'id="patch_' not in svg.partition('id="legend_1"')[2].partition('id="text_')[0]
    table = pictures[0].with_suffix(".csv").read_text()
    assert {line.partition(",")[0] for line in table.splitlines()[1:]} == set(rows)


@pytest.mark.slow
def test_regret_is_counted_against_one_of_the_learners_on_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *STREAM, "--against", "joint"]) == 2
    said = capsys.readouterr().err
    assert "--against joint is not compared: expected one of online, replay" in said
    assert main(["compare", *WORDS, "--against", "maml"]) == 2
    assert "--against needs a stream" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_differs_but_in_the_seed_stands_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for word in STREAM if not word.startswith(("algo=", "data.tasks"))]
    words += ["algo=online,joint_hindsight", "data.tasks=2,3"]
    assert main(["compare", *words, "--against", "joint_hindsight", "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    first, second = (out.index(f"**4 points, data.tasks={tasks}**") for tasks in (2, 3))
    for part in (out[first:second], out[second:]):
        assert part.count("| `online` |") == part.count("| `joint_hindsight` |") == 1
        assert "over 2 seeds" in part
    assert len(list((tmp_path / "outputs/compare").glob("*.png"))) == 2
    # A comparator that lacks a seed is reported, not left out.
    config = [word for word in words if not word.startswith(("seed", "data.tasks", "algo="))]
    assert main(["compare", *config, "data.tasks=2", "algo=online", "seed=0,1,2"]) == 0
    capsys.readouterr()
    more = [*config, "data.tasks=2", "algo=online,joint_hindsight", "seed=0,1,2", "--table"]
    assert main(["compare", *more, "--against", "joint_hindsight", "--format", "markdown"]) == 0
    assert "no `joint_hindsight` with seed 2" in capsys.readouterr().out


@pytest.mark.slow
def test_a_diverged_run_is_said_in_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for word in STREAM if not word.startswith(("algo", "seed="))]
    words += ["algo=online", "seed=0", "algo.online_lr=1e6", "--format", "markdown"]
    assert main(["compare", *words]) == 0
    answer = capsys.readouterr()
    (line,) = [line for line in answer.out.splitlines() if line.startswith("| `online`")]
    assert line.count("not finite") == 6
    assert "Warning" not in answer.err


def test_learners_that_need_task_ids_are_left_out_where_ids_are_unknown() -> None:
    with composer() as compose:
        known = with_algorithms(compose, ["data=stream_linear"])[0]
        unknown = with_algorithms(compose, ["data=stream_linear", "data.task_ids_known=false"])[0]
    apart = {"ewc", "ftml", "ftml_hindsight", "ftl", "toe", "from_scratch", "maml_frozen"}
    assert set(known.split("=")[1].split(",")) - set(unknown.split("=")[1].split(",")) == apart


def test_long_commands_that_differ_at_their_end_write_different_files() -> None:
    words = [f"algo.word_{number}=long_value" for number in range(9)]
    names = {_file_name([*words, last], None) for last in ("seed=1", "seed=2")}
    names.add(_file_name([*words, "seed=1"], "joint"))
    assert len(names) == 3
    assert max(map(len, names)) <= 120
    assert _file_name(["data=linear"], None) == "data=linear"
