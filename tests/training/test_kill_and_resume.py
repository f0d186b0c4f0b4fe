"""A run that is killed and resumed equals an uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from metarun.runs.checkpoints import read_checkpoint
from metarun.runs.folder import RunFolder
from tests.tiny_run import go, make_algorithm, same_state

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the tiny run forks")

TIMES = ("seconds", "train_seconds", "tasks_per_second")
REPOSITORY = Path(__file__).parents[2]


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for name in ("last.pt", "best.pt"):
        states = [read_checkpoint(path / "checkpoints" / name) for path in (one, other)]
        for key in ("state", "step", "sums", "count", "validated", "mean"):
            assert same_state(states[0].get(key), states[1].get(key)), f"{name} differs in {key}"
    results = [RunFolder.open(path).read_json("results.json") for path in (one, other)]
    for record in results:
        for key in TIMES:
            del record[key]
    assert results[0] == results[1]
    episodes = [np.load(path / "episodes.npz") for path in (one, other)]
    for key in ("mse", "curve"):
        np.testing.assert_array_equal(episodes[0][key], episodes[1][key])


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_run_killed_at_random_lines_equals_the_whole_run(seed: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.tiny_run", str(tmp_path), str(seed)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 3
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    times = (tmp_path / "killed" / "timing.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in times] == [*range(7, 60, 7), 60]


class StopError(Exception):
    pass


def stop_at(step: int, path: Path) -> None:
    """Stop a run in this process without any clean-up, as a kill does."""

    def on_batch(split: str, index: int) -> None:
        if split == "train" and index == 2 * step:
            raise StopError

    from tests.tiny_run import Watched

    with pytest.raises(StopError):
        go(path, Watched(on_batch))


def test_half_a_line_is_cut_and_written_again(tmp_path: Path) -> None:
    go(tmp_path / "whole")
    stop_at(33, tmp_path / "killed")
    for name in ("metrics.jsonl", "timing.jsonl"):
        with (tmp_path / "killed" / name).open("a") as file:
            file.write('{"step": 35, "tr')
    go(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_broken_last_checkpoint_costs_time_and_nothing_else(tmp_path: Path) -> None:
    go(tmp_path / "whole")
    stop_at(33, tmp_path / "killed")
    last = tmp_path / "killed" / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-30])
    go(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert "continuing from previous.pt" in (tmp_path / "killed" / "metarun.log").read_text()


def test_a_best_of_a_future_that_is_lost_is_not_kept(tmp_path: Path) -> None:
    stop_at(33, tmp_path)
    best = tmp_path / "checkpoints" / "best.pt"
    saved = best.read_bytes()
    best.write_bytes(b"of step 50, say")
    stop_at(34, tmp_path)
    assert read_checkpoint(best)["step"] == 30
    assert same_state(read_checkpoint(best)["state"], _state(saved, tmp_path))


def _state(data: bytes, tmp_path: Path) -> object:
    path = tmp_path / "copy.pt"
    path.write_bytes(data)
    return read_checkpoint(path)["state"]


def test_a_longer_run_takes_up_a_finished_one(tmp_path: Path) -> None:
    go(tmp_path, steps=20)
    results = go(tmp_path, steps=30)
    assert results["steps"] == 30
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [7, 14, 20, 21, 28, 30]


def test_a_checkpoint_of_another_algorithm_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    stop_at(33, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a checkpoint of algo=noisy, which algo=maml"):
        go(tmp_path, run_info={"algo": "maml"})
    with pytest.raises(ValueError, match=r"body.*weight is \(6, 1\) there and \(7, 1\) here"):
        go(tmp_path, algorithm=make_algorithm(hidden=7))
    with pytest.raises(ValueError, match="only this algorithm has rates"):
        go(tmp_path, algorithm=make_algorithm(rates="tensor"))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_what_has_changed_since_the_run_began_is_said_once(tmp_path: Path) -> None:
    stop_at(13, tmp_path)
    run = RunFolder.open(tmp_path)
    record = run.read_json("environment.json")
    record["versions"]["torch"] = "1.0"
    run.write_json("environment.json", record)
    stop_at(23, tmp_path)
    go(tmp_path)
    log = (tmp_path / "metarun.log").read_text()
    assert log.count("WARNING") == 1
    here = torch.__version__.partition("+")[0]
    assert f"versions: torch 1.0 when the run began, torch {here} now" in log
    assert [entry["step"] for entry in run.read_json("environment.json")["resumed"]] == [9, 18]
