"""A run that is killed and resumed equals an uninterrupted run, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from metarun.core.errors import Interrupted, RunError
from metarun.runs import lock, records
from metarun.runs.checkpoints import read_checkpoint
from metarun.runs.folder import RunFolder
from metarun.training import failures, trainer
from tests.helpers import slow
from tests.tiny_run import Watched, go, make_algorithm, same_state

pytest.importorskip("fcntl")
pytest.importorskip("termios")

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


@pytest.mark.parametrize("seed", [0, slow(1), slow(2), slow(3)])
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


COMMAND = [sys.executable, "-m", "metarun", "algo=maml", "data=sinusoid", "device=cpu"]
COMMAND += ["hydra.run.dir=run", "train.tasks_per_step=1", "train.log_every=10"]
COMMAND += ["eval.episodes=4", "eval.val_episodes=4", "train.eval_every=1000000"]
SHORT, ENDLESS = "train.steps=200", "train.steps=1000000"
ON_A_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""


def until_it_trains(process: subprocess.Popen[Any], run: Path) -> None:
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.parametrize("nohup", [False, True])
@pytest.mark.slow
def test_a_closed_terminal_saves_a_run_or_does_not_touch_it(nohup: bool, tmp_path: Path) -> None:
    ours, theirs = os.openpty()

    # Not `preexec_fn`: it forks this process, which the threads of JAX do not survive.
    on_hangup, steps = ("SIG_IGN", SHORT) if nohup else ("SIG_DFL", ENDLESS)
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, on_hangup, *COMMAND, steps],
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    until_it_trains(process, tmp_path / "run")
    os.close(ours)
    code = process.wait(timeout=300)
    status = RunFolder.open(tmp_path / "run").status()
    if nohup:
        assert (code, status["state"], status["step"]) == (0, "finished", 200)
    else:
        assert (code, status["state"], status["signal"]) == (129, "interrupted", 1)
        text = f"saved at step {status['step']}; `metarun resume=run` continues"
        assert status["step"] >= 10
        assert text in (tmp_path / "run" / "metarun.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("output", [">/dev/full 2>&1", ">&-", ">&- 2>&-"])
def test_a_screen_that_fails_ends_no_run(output: str, tmp_path: Path) -> None:
    done = subprocess.run(
        f"{shlex.join([*COMMAND, SHORT])} {output}",
        shell=True,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr
    assert RunFolder.open(tmp_path / "run").status()["state"] == "finished"


@pytest.mark.slow
def test_eight_quick_signals_leave_a_state_that_is_true(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, ENDLESS], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    until_it_trains(process, tmp_path / "run")
    for _ in range(8):
        process.send_signal(signal.SIGINT)
        time.sleep(0.002)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert b"Traceback" not in err
    status = RunFolder.open(tmp_path / "run").status()
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"]
    assert (status["state"], status["step"]) == ("interrupted", saved)


def test_a_signal_at_every_line_leaves_a_state_that_is_true(tmp_path: Path) -> None:
    modules = {trainer.__file__, failures.__file__, records.__file__, lock.__file__}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in modules:
            return None
        if event == "line":
            os.kill(os.getpid(), signal.SIGINT)
        return trace

    def on_batch(split: str, index: int) -> None:
        if (split, index) == ("train", 2 * 33):
            os.kill(os.getpid(), signal.SIGTERM)
            sys.settrace(trace)
            raise OSError(errno.ENOSPC, "No space left on device")

    before = sys.gettrace()
    try:
        with pytest.raises((Interrupted, RunError)):
            go(tmp_path, Watched(on_batch))
    finally:
        sys.settrace(before)
    assert RunFolder.open(tmp_path).status()["state"] in ("interrupted", "failed")
    assert not (tmp_path / "lock").exists()
    go(tmp_path)


def test_a_second_signal_right_after_a_checkpoint_says_that_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunFolder.save_last

    def save_and_stop(run: RunFolder, checkpoint: dict[str, Any]) -> None:
        save(run, checkpoint)
        if checkpoint["step"]:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunFolder, "save_last", save_and_stop)
    with pytest.raises(Interrupted, match=r"saved at step [1-9]\d*;"):
        go(tmp_path)
    status = RunFolder.open(tmp_path).status()
    saved = read_checkpoint(tmp_path / "checkpoints" / "last.pt")["step"]
    assert (status["state"], status["step"]) == ("interrupted", saved)


class StopError(Exception):
    pass


def stop_at(step: int, path: Path) -> None:
    """Stop a run in this process without any clean-up, as a kill does."""

    def on_batch(split: str, index: int) -> None:
        if split == "train" and index == 2 * step:
            raise StopError

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


def cut_in_a_line(data: bytes) -> bytes:
    return data[: len(data) // 2]


def emptied(_: bytes) -> bytes:
    return b""


def garbled(data: bytes) -> bytes:
    first, rest = data.split(b"\n", 1)
    return b"\xff\0[{" + bytes(len(first) - 4) + b"\n" + rest


def a_line_short(data: bytes) -> bytes:
    first, _, rest = data.split(b"\n", 2)
    return first + b"\n" + rest


@pytest.mark.parametrize("name", ["metrics.jsonl", slow("timing.jsonl")])
@pytest.mark.parametrize("harm", [cut_in_a_line, emptied, garbled, a_line_short])
def test_a_damaged_log_is_told_and_goes_on_with_its_whole_lines(
    name: str, harm: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    go(tmp_path / "whole")
    stop_at(33, tmp_path / "killed")
    log = tmp_path / "killed" / name
    before = log.read_bytes()
    log.write_bytes(harm(before))
    go(tmp_path / "killed")
    assert "was damaged after step 27 was saved (" in warning_of(tmp_path / "killed")
    aside = list((tmp_path / "killed").glob("*.damaged*"))
    assert [path.read_bytes() for path in aside] == [harm(before)] * bool(harm(before))
    saved = {line for line in before.split(b"\n") if line and json.loads(line)["step"] <= 27}
    kept = {line for line in harm(before).split(b"\n") if line in saved}
    found = log.read_bytes().splitlines()
    assert set(found[: len(kept)]) == kept
    if name == "metrics.jsonl":
        later = (tmp_path / "whole" / name).read_bytes().splitlines()[len(saved) :]
        assert found[len(kept) :] == later
    else:
        assert [json.loads(line)["step"] for line in found[len(kept) :]] == [28, 35, 42, 49, 56, 60]


def test_lines_lost_before_lines_of_later_steps_are_noticed(tmp_path: Path) -> None:
    stop_at(33, tmp_path)
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(a_line_short(log.read_bytes()) + b'{"step": 99, "train/loss": 0.125}\n' * 9)
    go(tmp_path)
    assert "was damaged" in warning_of(tmp_path)
    steps = [line["step"] for line in RunFolder(tmp_path).read_lines("metrics.jsonl")]
    assert steps == [7, 14, 20, 21, 28, 30, 35, 40, 42, 49, 50, 56, 60, 60]


def test_a_mended_log_is_not_told_again(tmp_path: Path) -> None:
    stop_at(33, tmp_path)
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(cut_in_a_line(log.read_bytes()))
    stop_at(28, tmp_path)
    go(tmp_path)
    assert (tmp_path / "metarun.log").read_text().count("was damaged") == 1
    assert len(list(tmp_path.glob("*.damaged*"))) == 1


def warning_of(run: Path) -> str:
    lines = (run / "metarun.log").read_text().splitlines()
    (line,) = (line for line in lines if "WARNING" in line)
    return line


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
