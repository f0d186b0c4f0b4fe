"""A run's report of the base-learners that its learner chose among."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from metarun.cli.main import main


def test_a_run_reports_each_base_learner_the_rivals_and_the_oracle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["algo=selector", "data=tables", "device=cpu", "threads=1", "algo.processes=1"]
    words += ["algo.learners=[centroid,knn,tree]", "train.steps=2", "train.tasks_per_step=4"]
    words += ["eval.episodes=12", "eval.val_episodes=4", f"hydra.run.dir={tmp_path / 'run'}"]
    assert main(words) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    with np.load(tmp_path / "run/episodes.npz") as arrays:
        own = arrays["accuracy"]
        single = {n: arrays[f"strategy_{n}"] for n in ("centroid", "knn", "tree")}
        alternatives = {n: arrays[f"strategy_{n}"] for n in ("committee", "cv_winner")}
    # The learner and cross-validation each pick one base-learner; the committee is their mean.
    every = np.stack(list(single.values()))
    assert (every == own).any(0).all()
    assert (every == alternatives["cv_winner"]).any(0).all()
    theirs = {**single, **alternatives, "oracle": every.max(0)}
    reported = results["strategies"]
    assert list(reported) == list(theirs)
    for name, values in theirs.items():
        assert reported[name]["mean"] == pytest.approx(values.mean())
        assert reported[name]["gain"]["mean"] == pytest.approx((own - values).mean())
    assert reported["oracle"]["gain"]["mean"] <= 0.0
    out = capsys.readouterr().out
    assert all(name in out for name in theirs)
