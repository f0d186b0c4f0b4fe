"""The training loop: its use of the splits, its files, and how it stops."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from metarun.algorithms.outer_optimizer import NonFiniteError
from metarun.core.console import Screen
from metarun.core.errors import Interrupted, RunError
from metarun.core.settings import EvalSettings
from metarun.core.statistics import interval
from metarun.core.types import Adapted, Metrics, Prediction, Progress, TaskBatch
from metarun.evaluation.episodes import evaluate
from metarun.runs.checkpoints import read_checkpoint
from metarun.runs.folder import RunFolder
from metarun.training import trainer
from metarun.training.meta_test import meta_test
from tests.tiny_run import (
    RUN_INFO,
    STEPS,
    NoisyMAML,
    Watched,
    go,
    make_algorithm,
    same_state,
    silent,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    go(path)
    return path


def lines(path: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def test_the_folder_holds_everything_of_the_run(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "checkpoints", "config.yaml", "data.json", "environment.json", "episodes.npz",
        "metarun.log", "metrics.jsonl", "overrides.yaml", "results.json", "status.json",
        "timing.jsonl",
    }  # fmt: skip
    assert RunFolder.open(finished).status()["state"] == "finished"


def test_metrics_hold_steps_and_metrics_alone(finished: Path) -> None:
    train = [line for line in lines(finished) if "train/loss" in line]
    val = [line for line in lines(finished) if "val/mse" in line]
    assert [line["step"] for line in train] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert [line["step"] for line in val] == [10, 20, 30, 40, 50, 60]
    assert all(line.keys() == {"step", "train/loss", "train/mse"} for line in train)
    assert all(line.keys() == {"step", "val/mse", "val/mse_ci95"} for line in val)
    assert len(train) + len(val) == len(lines(finished))
    assert all("tasks_per_second" in line for line in lines(finished, "timing.jsonl"))


def test_an_update_and_an_evaluation_take_no_stack_trace_to_be_seeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = make_algorithm()

    def slow(*_: object, **__: object) -> list[str]:
        raise AssertionError("a stack trace was requested")

    monkeypatch.setattr("traceback.format_stack", slow)
    go(tmp_path, algorithm=algorithm, steps=10)
    assert RunFolder.open(tmp_path).status()["state"] == "finished"


def test_a_line_is_the_mean_over_its_updates(tmp_path: Path) -> None:
    seen: list[float] = []

    class Noted(NoisyMAML):
        def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
            metrics = super().update(batch, progress)
            seen.append(float(metrics["loss"]))
            return metrics

    algorithm = make_algorithm()
    algorithm.__class__ = Noted
    go(tmp_path, algorithm=algorithm, steps=10)
    first, last = (line for line in lines(tmp_path) if "train/loss" in line)
    assert first["train/loss"] == pytest.approx(np.mean(seen[:7]), rel=1e-12)
    assert last["train/loss"] == pytest.approx(np.mean(seen[7:]), rel=1e-12)


def test_the_test_split_is_opened_once_and_after_training(tmp_path: Path) -> None:
    source = Watched()
    go(tmp_path, source)
    splits = [split for split, _ in source.asked]
    first = splits.index("test")
    assert splits[first:] == ["test"] * 3
    train = [index for split, index in source.asked if split == "train"]
    assert train == list(range(0, 2 * STEPS, 2))


def test_the_best_by_meta_val_is_what_is_tested(tmp_path: Path) -> None:
    class Worse(NoisyMAML):
        """Learns for 20 steps, then forgets."""

        def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
            metrics = super().update(batch, progress)
            if progress.step >= 20:
                with torch.no_grad():
                    for parameter in self.net.parameters():
                        parameter.mul_(1.5)
            return metrics

    algorithm = make_algorithm()
    algorithm.__class__ = Worse
    results = go(tmp_path, algorithm=algorithm)
    val = {line["step"]: line["val/mse"] for line in lines(tmp_path) if "val/mse" in line}
    best = min(val, key=val.__getitem__)
    assert best < STEPS
    assert results["val"]["step"] == results["parameters_step"] == best
    assert results["val"]["mean"] == val[best]
    assert results["parameters_from"] == "best"
    again = make_algorithm()
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "best.pt")
    again.load_state_dict(checkpoint["state"])
    values = evaluate(again, Watched(), "test", 6, 2).values
    np.testing.assert_array_equal(np.load(tmp_path / "episodes.npz")["mse"], values)
    assert (results["test"]["mean"], results["test"]["ci95"]) == interval(values)


def test_however_rare_evaluations_are_there_is_one_at_the_end(tmp_path: Path) -> None:
    assert go(tmp_path, steps=5)["val"]["step"] == 5


def test_without_a_finite_meta_val_the_last_parameters_are_tested(tmp_path: Path) -> None:
    class Mute(NoisyMAML):
        def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
            return Prediction(super().answer(adapted, query_x).outputs * math.nan)

    algorithm = make_algorithm()
    algorithm.__class__ = Mute
    screen = io.StringIO()
    results = go(tmp_path, algorithm=algorithm, steps=12, screen=Screen(Console(file=screen)))
    assert results["val"] is None
    assert (results["parameters_from"], results["parameters_step"]) == ("last", 12)
    assert results["test"] == {"mean": None, "ci95": None, "episodes": 6}
    assert "warning: 6 of 6 test episodes have no finite mse" in screen.getvalue()
    assert not (tmp_path / "checkpoints" / "best.pt").exists()


def test_the_results_say_what_was_run_and_what_came_out(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    for key, value in RUN_INFO.items():
        assert results[key] == value
    assert results["metric"] == "mse"
    assert results["transductive"] is False
    assert results["bn_statistics"] == "none"
    assert results["test"].keys() == {"mean", "ci95", "episodes"}
    assert results["test"]["episodes"] == 6
    assert [point["steps"] for point in results["curve"]] == [0, 1, 2]
    assert results["steps"] == STEPS
    assert results["parameters"] == 6 + 6 + 6 + 1
    assert results["seconds"] >= results["train_seconds"] > 0
    assert results["tasks_per_second"] > 0
    assert results["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert results["data_fingerprint"] == Watched().fingerprint()


def test_one_test_episode_has_a_mean_and_no_interval(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "")
    algorithm, source = make_algorithm(), Watched()
    go(tmp_path / "trained", steps=2)
    evaluation = EvalSettings(episodes=1, curve_steps=1)
    folder = run.test_folder("one")
    trained = RunFolder.open(tmp_path / "trained")
    meta_test(algorithm, source, evaluation, trained, folder, RUN_INFO, silent())
    record = json.loads((folder / "results.json").read_text())
    assert record["test"]["mean"] > 0
    assert record["test"]["ci95"] is None


def test_a_meta_test_gives_what_the_run_gave_and_leaves_the_run_alone(finished: Path) -> None:
    run = RunFolder.open(finished)
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    folder = run.test_folder("same")
    evaluation = EvalSettings(episodes=6, curve_steps=2, tasks_per_batch=2)
    results = meta_test(make_algorithm(), Watched(), evaluation, run, folder, RUN_INFO, silent())
    assert results["test"] == run.read_json("results.json")["test"]
    assert results["episodes_hash"] == run.read_json("results.json")["episodes_hash"]
    assert json.loads((folder / "results.json").read_text()) == results
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_meta_test_that_does_not_fit_leaves_no_folder(finished: Path) -> None:
    run = RunFolder.open(finished)
    folder = run.test_folder("wider")
    with pytest.raises(ValueError, match="does not fit"):
        meta_test(
            make_algorithm(hidden=9), Watched(), EvalSettings(), run, folder, RUN_INFO, silent()
        )
    assert not folder.exists()


# Stopping.


def raising(step: int, act: Callable[[], None]) -> Watched:
    def on_batch(split: str, index: int) -> None:
        if split == "train" and index == 2 * step:
            act()

    return Watched(on_batch)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_update_saves_and_the_run_can_go_on(
    signum: int, tmp_path: Path, finished: Path, request: pytest.FixtureRequest
) -> None:
    # A process that was started by nohup ignores SIGHUP, and so does its run.
    before = signal.signal(signum, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signum, before))
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as stop:
        go(tmp_path, raising(33, lambda: os.kill(os.getpid(), signum)))
    assert stop.value.exit_code == 128 + signum
    assert f"saved at step 34; `metarun resume={tmp_path}` continues" in str(stop.value)
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    status = RunFolder.open(tmp_path).status()
    assert (status["state"], status["step"]) == ("interrupted", 34)
    assert not (tmp_path / "lock").exists()
    go(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_signal_within_an_evaluation_is_heard_at_once(
    split: str, tmp_path: Path, finished: Path
) -> None:
    def on_batch(asked: str, index: int) -> None:
        if (asked, index) == (split, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    source = Watched(on_batch)
    with pytest.raises(Interrupted):
        go(tmp_path, source)
    assert source.asked[-1] == (split, 2)
    go(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    results = [json.loads((path / "results.json").read_text()) for path in (tmp_path, finished)]
    assert results[0]["test"] == results[1]["test"]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    after: list[str] = []

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        after.append("the update went on")

    with pytest.raises(Interrupted) as stop:
        go(tmp_path, raising(33, twice))
    assert not after
    assert stop.value.exit_code == 130
    status = RunFolder.open(tmp_path).status()
    assert (status["state"], status["step"]) == ("interrupted", 27)


def test_it_runs_outside_the_main_thread_too(tmp_path: Path) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(go(tmp_path, steps=3)))
    thread.start()
    thread.join()
    assert results[0]["steps"] == 3


class Diverging(NoisyMAML):
    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        if progress.step == 33:
            raise NonFiniteError("loss", math.inf)
        return super().update(batch, progress)


def test_a_loss_that_is_not_finite_fails_with_step_value_and_what_to_try(tmp_path: Path) -> None:
    algorithm = make_algorithm()
    algorithm.__class__ = Diverging
    with pytest.raises(RunError) as error:
        go(tmp_path, algorithm=algorithm)
    text = str(error.value)
    assert text.startswith("step 33: loss is inf; step 27 is saved: start again with a lower optim")
    assert "\n" not in text
    status = RunFolder.open(tmp_path).status()
    assert (status["state"], status["why"]) == ("failed", text)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.pt")["step"] == 27
    assert "Traceback" in (tmp_path / "metarun.log").read_text()


@pytest.mark.parametrize(
    ("bound", "advice"),
    [(None, "or with optim.clip_norm=10"), (2.0, "or with an optim.clip_norm below 2")],
)
def test_the_advice_names_a_bound_of_the_gradient_that_is_not_set_yet(
    tmp_path: Path, bound: float | None, advice: str
) -> None:
    algorithm = make_algorithm(inner_lr=1e200)
    algorithm.optimizer.clip_norm = bound
    with pytest.raises(RunError, match=f"{advice}$"):
        go(tmp_path, algorithm=algorithm)


def test_a_real_divergence_is_caught(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"step \d+: .* is (nan|inf|-inf)"):
        go(tmp_path, algorithm=make_algorithm(inner_lr=1e200))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    code: int, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    source = raising(33, lambda: monkeypatch.setattr(os, "fsync", full))
    with pytest.raises(RunError, match=r"step 36: no space is left .* step 27 is saved: free some"):
        go(tmp_path, source)
    monkeypatch.setattr(os, "fsync", fsync)
    assert RunFolder.open(tmp_path).status()["state"] == "failed"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best.pt", "last.pt", "previous.pt",
    ]  # fmt: skip
    go(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_a_disk_without_room_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Watched()
    monkeypatch.setattr(trainer, "required_bytes", lambda _: 10**18)
    with pytest.raises(ValueError, match="free some space"):
        go(tmp_path, source)
    assert source.asked == []
    assert RunFolder.open(tmp_path).status()["state"] == "failed"


def test_any_other_error_is_recorded_and_passed_on(tmp_path: Path) -> None:
    def act() -> None:
        raise KeyError("surprise")

    with pytest.raises(KeyError):
        go(tmp_path, raising(33, act))
    assert RunFolder.open(tmp_path).status()["why"] == "KeyError: 'surprise'"
    assert "in act" in (tmp_path / "metarun.log").read_text()


def test_a_finished_run_says_so_and_is_left_alone(finished: Path) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"is finished: use a larger train\.steps"):
        go(finished)
    with pytest.raises(ValueError, match=r"train\.steps=50: the run has already made 60 steps"):
        go(finished, steps=50)
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_run_that_is_under_way_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import sys, time; from metarun.runs.folder import RunFolder\n"
        "with RunFolder.open(sys.argv[1]).locked(): print('held', flush=True); time.sleep(60)"
    )
    RunFolder.create(tmp_path, "")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"is in use by process {other.pid}"):
            go(tmp_path)
        other.kill()
    go(tmp_path, steps=2)


def test_the_global_generator_does_not_matter(tmp_path: Path, finished: Path) -> None:
    torch.manual_seed(1234)
    go(tmp_path)
    states = [read_checkpoint(p / "checkpoints" / "last.pt")["state"] for p in (tmp_path, finished)]
    assert same_state(*states)


def test_the_log_says_what_the_screen_says(tmp_path: Path) -> None:
    file = io.StringIO()
    go(tmp_path, screen=Screen(Console(file=file)))
    log = (tmp_path / "metarun.log").read_text()
    for line in file.getvalue().splitlines():
        assert line in log
    assert "step 7/60  " in log
    assert "val mse" in file.getvalue()
    assert str(tmp_path) in file.getvalue().splitlines()[-2]
