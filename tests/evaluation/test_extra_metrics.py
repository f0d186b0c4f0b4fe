"""Metrics in addition to the main one: presentations of a class, log-likelihood and coverage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metarun.cli.main import main
from metarun.core.console import summary
from metarun.core.measures import figure
from metarun.core.results import completed
from metarun.reporting import run_figures
from tests.helpers import slow

TINY = [
    "data=omniglot_small", "way=3", "shot=6", "query=1", "backbone.filters=4", "train.steps=2",
    "train.tasks_per_step=2", "eval.episodes=6", "eval.val_episodes=2", "eval.tasks_per_batch=4",
    "device=cpu",
]  # fmt: skip


@pytest.mark.parametrize("words", [["algo=mann", "algo.locations=8"], ["algo=snail"]])
def test_accuracy_by_presentation_is_written_drawn_and_said(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words, *TINY]) == 0
    run = next(tmp_path.rglob("results.json")).parent
    results = json.loads((run / "results.json").read_text())
    episodes = np.load(run / "episodes.npz")["presentations"]
    assert episodes.shape == (6, 6)
    written = [each["mean"] for each in results["presentations"]]
    np.testing.assert_allclose(written, episodes.mean(0))
    said = capsys.readouterr().out
    for number in (1, 2, 5, 6):
        assert f"presentation {number}" in said
    assert f"{100 * written[1]:.2f} ±" in said
    svg = (run / "figures" / "presentations.svg").read_text()
    assert svg.count(" on omniglot_small, 3-way 6-shot, seed 0") == 1
    with Image.open(run / "figures" / "presentations.png") as picture:
        # The plot, and a title above it.
        assert picture.size == (720, 547)
    assert main([f"test={run}", "shot=2", "eval.episodes=3"]) == 0
    tested = json.loads(next((run / "tests").rglob("results.json")).read_text())
    assert len(tested["presentations"]) == 2


def test_a_learner_without_memory_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["algo=protonet", *TINY]) == 0
    run = next(tmp_path.rglob("results.json")).parent
    assert "presentations" not in json.loads((run / "results.json").read_text())
    assert "presentation" not in capsys.readouterr().out
    assert not (run / "figures").exists()


@pytest.mark.parametrize("algo", [slow("metagan_maml"), "metagan_relation"])
def test_what_is_made_for_a_task_is_written_and_drawn(
    algo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"algo={algo}", "algo.filters=2", "train.query=1", *TINY]
    assert main(words) == 0
    run = next(tmp_path.rglob("results.json")).parent
    with np.load(run / "samples.npz") as arrays:
        assert arrays["support"].shape == (8, 9, 1, 28, 28)
        assert arrays["made"].shape == (8, 10, 1, 28, 28)
        assert arrays["support"].min() <= arrays["made"].min()
        assert arrays["made"].max() <= arrays["support"].max()
    svg = (run / "figures" / "samples.svg").read_text()
    assert svg.count(f"{algo} on omniglot_small, ") == 1
    with Image.open(run / "figures" / "samples.png") as picture:
        assert picture.size[0] > picture.size[1]
    assert main([f"test={run}", "eval.episodes=3"]) == 0
    assert (next((run / "tests").rglob("samples.npz")).parent / "figures" / "samples.png").exists()
    assert main([*words, "algo.fakes=0", "hydra.run.dir=off"]) == 0
    assert not (tmp_path / "off" / "samples.npz").exists()
    assert not (tmp_path / "off" / "figures").exists()


def test_how_sure_a_regression_is_is_written_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["algo=anp", "data=gp", "algo.width=16", "train.steps=2", "eval.episodes=6"]
    assert main([*words, "eval.val_episodes=2", "device=cpu"]) == 0
    run = next(tmp_path.rglob("results.json")).parent
    results = json.loads((run / "results.json").read_text())
    with np.load(run / "episodes.npz") as episodes:
        for name in ("log_likelihood", "coverage"):
            assert episodes[name].shape == (6,)
            assert results[name]["mean"] == pytest.approx(episodes[name].mean())
    said = capsys.readouterr().out
    here, covered = results["log_likelihood"], results["coverage"]
    assert figure("log_likelihood", here["mean"], here["ci95"]) in said
    assert figure("accuracy", covered["mean"], covered["ci95"]) in said
    assert "within the 95 % band" in said


def test_a_regression_that_diverged_is_summed_up_and_drawn(tmp_path: Path) -> None:
    nothing = {"mean": None, "ci95": None}
    results = {
        "format": 1, "algo": "anp", "data": "gp", "seed": 0, "way": 5, "shot": 2,
        "metric": "mse", "seconds": 1.0,
        "test": {**nothing, "episodes": 6}, "log_likelihood": nothing, "coverage": nothing,
        "presentations": [nothing, nothing],
    }  # fmt: skip
    assert "log-likelihood" in summary(completed(results), "here")
    (tmp_path / "results.json").write_text(json.dumps(results))
    run_figures.draw_figures(tmp_path)
    assert (tmp_path / "figures" / "presentations.csv").exists()
