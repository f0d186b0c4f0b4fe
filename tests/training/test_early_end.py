"""Training that ends or pauses before its last step: patience, a rehearsal, a limit of time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metarun.core.errors import OutOfTime
from metarun.core.types import Metrics, Progress, Split, TaskBatch
from metarun.runs.folder import RunFolder
from tests.tiny_run import NoisyMAML, Watched, go, make_algorithm


class Still(NoisyMAML):
    """Learns nothing, so that no evaluation is better than the first."""

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:  # noqa: ARG002
        return {"loss": torch.ones(()), "mse": torch.ones(())}


def still() -> NoisyMAML:
    algorithm = make_algorithm()
    algorithm.__class__ = Still
    return algorithm


def steps_logged(path: Path) -> list[int]:
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "train/loss" in line]


def test_training_ends_when_meta_val_has_not_improved_for_long(tmp_path: Path) -> None:
    results = go(tmp_path, algorithm=still(), patience=2)
    # The best evaluation is the first, at step 10.
    assert results["steps"] == 30
    assert results["parameters_step"] == 10
    assert RunFolder.open(tmp_path).status()["state"] == "finished"
    assert steps_logged(tmp_path) == [7, 14, 21, 28, 30]
    text = (tmp_path / "metarun.log").read_text()
    assert "step 30/60  no better on meta-val for 2 evaluations: training ends here" in text


def test_a_run_that_ended_early_and_was_stopped_in_its_test_does_not_train_again(
    tmp_path: Path,
) -> None:
    def stop(split: Split, _: int) -> None:
        if split == "test":
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        go(tmp_path, Watched(stop), still(), patience=2)
    source = Watched()
    assert go(tmp_path, source, still(), patience=2)["steps"] == 30
    assert "train" not in {split for split, _ in source.asked}


def test_a_smaller_patience_ends_a_stopped_run_after_one_more_evaluation(tmp_path: Path) -> None:
    def stop(split: Split, index: int) -> None:
        if split == "train" and index >= 88:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        go(tmp_path, Watched(stop), still(), patience=5)
    # Two evaluations were no better than the first, at step 10.
    saved = RunFolder.open(tmp_path).status()["step"]
    assert 30 < saved < 60
    assert go(tmp_path, algorithm=still(), patience=1)["steps"] == saved
    text = (tmp_path / "metarun.log").read_text()
    assert f"step {saved}/60  no better on meta-val for 1 evaluation: training ends here" in text


def test_a_rehearsal_validates_and_tests_what_was_trained_in_its_seconds(tmp_path: Path) -> None:
    results = go(tmp_path, rehearse=1e-9, eval_every=1000)
    assert results["steps"] == 1
    assert results["val"]["step"] == 1
    assert steps_logged(tmp_path) == [1]


def test_a_limit_of_time_saves_the_run_and_the_rest_equals_a_run_without_it(tmp_path: Path) -> None:
    go(tmp_path / "whole")
    with pytest.raises(OutOfTime, match=r"max_minutes=1e-09 is over: saved at step 0; `metarun re"):
        go(tmp_path / "run", max_minutes=1e-9)
    status = RunFolder.open(tmp_path / "run").status()
    assert (status["state"], status["step"]) == ("interrupted", 0)
    go(tmp_path / "run")
    for name in ("metrics.jsonl", "episodes.npz"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
