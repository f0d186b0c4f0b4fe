"""Runs on streams: training, choice of rates, rollouts, and resuming after a kill."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metarun import load
from metarun.evaluation.stream_rollouts import Rollouts
from metarun.runs.checkpoints import read_checkpoint
from tests.conftest import Command
from tests.helpers import slow

TINY = (
    "data=stream_linear", "data.tasks=3", "shot=4", "query=3", "backbone.hidden=[6]",
    "eval.episodes=5", "eval.val_episodes=2", "eval.tasks_per_batch=2", "device=cpu", "threads=1",
    "train.steps=3", "train.checkpoint_every=5", "eval.proficiency=0.05",
)  # fmt: skip
TIMES = ("seconds", "train_seconds", "tasks_per_second")


def folder() -> Path:
    (found,) = Path("outputs").glob("*/*")
    return found


def results(path: Path) -> dict[str, Any]:
    record = json.loads((path / "results.json").read_text())
    return {key: value for key, value in record.items() if key not in TIMES}


def test_a_run_on_a_stream_writes_its_figures_and_curves(metarun: Command) -> None:
    answer = metarun("algo=online", *TINY)
    assert answer.code == 0, answer.err
    record = results(folder())
    assert record["test"]["episodes"] == 5
    assert record["steps"] == 0
    assert set(record["stream"]) == {
        "average", "anytime", "cumulative_loss", "backward_transfer", "forward_transfer",
        "forgetting", "rows_to_proficiency",
    }  # fmt: skip
    assert all(entry["ci95"] > 0 for entry in record["stream"].values())
    arrays = np.load(folder() / "episodes.npz")
    assert arrays["matrix"].shape == (5, 4, 3)
    assert arrays["incoming"].shape == arrays["current"].shape == (5, 12)
    assert arrays["untrained"].shape == (5, 3)
    np.testing.assert_allclose(arrays["mse"], arrays["matrix"][:, -1].mean(1))
    assert record["test"]["mean"] == pytest.approx(record["stream"]["average"]["mean"])
    with (folder() / "stream.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert float(rows[-1]["seen"]) == pytest.approx(record["test"]["mean"], rel=1e-5)


def test_meta_val_chooses_the_learning_rate_of_a_lifetime(metarun: Command) -> None:
    assert metarun("algo=online", *TINY, "algo.online_lr=[1e-6,0.1,1e3]").code == 0
    (line,) = (json.loads(text) for text in (folder() / "metrics.jsonl").read_text().splitlines())
    assert line["val/online_lr"] == 0.1
    state = read_checkpoint(folder() / "checkpoints" / "best.pt")["state"]
    assert float(state["rate"]) == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algo", "steps"), [("replay", 3), ("replay", 31), ("oml", 17), ("ftml", 17), ("lamaml", 17)]
)
def test_a_run_killed_in_the_midst_of_a_stream_goes_on_exactly(
    algo: str, steps: int, metarun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"algo={algo}", *TINY)
    assert metarun(*words, "hydra.run.dir=whole").code == 0
    steps_done = 0

    class Killed(BaseException):
        pass

    def killed(self: Rollouts) -> None:
        nonlocal steps_done
        if self._follow and steps_done == steps:
            raise Killed
        steps_done += self._follow
        advance(self)

    advance = Rollouts.advance
    monkeypatch.setattr(Rollouts, "advance", killed)
    with pytest.raises(Killed):
        metarun(*words, "hydra.run.dir=killed")
    monkeypatch.setattr(Rollouts, "advance", advance)
    saved = read_checkpoint(Path("killed/checkpoints/last.pt"))["rollouts"]
    assert (saved is None) == (steps < 5)
    answer = metarun("resume=killed")
    assert answer.code == 0, answer.err
    assert results(Path("whole")) == results(Path("killed"))
    for name in ("metrics.jsonl", "stream.csv"):
        assert (Path("whole") / name).read_bytes() == (Path("killed") / name).read_bytes()
    one, other = (np.load(f"{name}/episodes.npz") for name in ("whole", "killed"))
    assert sorted(one) == sorted(other)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_what_was_learned_is_tested_on_another_stream(metarun: Command) -> None:
    assert metarun("algo=oml", *TINY).code == 0
    run = folder()
    answer = metarun(f"test={run}", "data.order=returning")
    assert answer.code == 0, answer.err
    (tested,) = (run / "tests").glob("*/results.json")
    assert json.loads(tested.read_text())["stream"]["average"]["mean"] > 0
    assert (tested.parent / "stream.csv").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("algo=maml", "data=stream_linear"),
            "the data set is a stream, but MAML learns separate tasks",
        ),
        (
            ("algo=oml", "data=sinusoid"),
            "OML learns from streams, but the data set is not a stream",
        ),
        (
            ("algo=oml", *TINY, "train.steps=0"),
            "train.steps=0: algo=oml needs meta-training: expected 1 or more",
        ),
        (("algo=ewc", *TINY, "data.task_ids_known=false"), "use data.task_ids_known=true"),
        (
            ("algo=online", "data=stream_omniglot_small", "backbone=mlp_omniglot"),
            "use backbone.norm=none or instance, or backbone.batch_norm=false",
        ),
    ],
)
def test_what_does_not_suit_a_stream_is_one_line(
    words: tuple[str, ...], says: str, metarun: Command
) -> None:
    answer = metarun(*words)
    assert answer.code == 2
    assert says in answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert not Path("outputs").exists()


def test_a_run_on_a_stream_of_images_learns_ones_own_in_the_order_given(metarun: Command) -> None:
    words = [word for word in TINY if not word.startswith(("data.", "data=", "shot", "backbone"))]
    data = ("data=stream_rainbow", "data.tasks=2", "way=3", "data.rows=3", "shot=4")
    answer = metarun("algo=online", *data, "train.shot=4", *words)
    assert answer.code == 0, answer.err
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 255, (16, 16), dtype=np.uint8) for _ in range(6)]
    learner = load(folder()).fit(images, ["a", "b", "c"] * 2)
    assert learner.predict_proba(images).shape == (6, 3)
    assert set(learner.predict(images)) <= {"a", "b", "c"}
    with pytest.raises(ValueError, match="fit got 4 classes: expected at most 3"):
        load(folder()).fit(images[:4], list("abcd"))


def test_a_stream_is_drawn(metarun: Command) -> None:
    assert metarun("algo=oml", *TINY).code == 0
    names = {f"{name}.{kind}" for name in ("matrix", "stream") for kind in ("png", "svg", "csv")}
    assert {path.name for path in (folder() / "figures").iterdir()} == names
    assert metarun(f"test={folder()}", "data.tasks=2").code == 0
    (tested,) = (folder() / "tests").glob("*/figures")
    assert {path.name for path in tested.iterdir()} == names
    for name in ("matrix", "stream"):
        svg = (tested / f"{name}.svg").read_text()
        assert svg.count("oml on stream_linear, 2 tasks, seed 0") == 1
    text = (tested / "stream.svg").read_text()
    assert "cumulative loss" in text


@pytest.mark.parametrize("algo", ["task_memory", slow("ftml")])
def test_learners_that_map_over_tasks_live_on_images_too(metarun: Command, algo: str) -> None:
    words = ("way=3", "shot=2", "query=1", "train.way=1", "train.shot=2", "train.query=1")
    small = ("backbone.filters=4", "eval.episodes=2", "eval.val_episodes=2", "threads=1")
    less = ("algo.meta_lr=0.001", "algo.inner_lr=0.01", "algo.meta_updates=1")
    few = less if algo == "ftml" else ("algo.online_lr=0.01", "algo.updates=1")
    answer = metarun(f"algo={algo}", "data=stream_omniglot_small", *words, *small, *few)
    assert answer.code == 0, answer.err


def test_the_gate_of_anml_may_have_another_width(metarun: Command) -> None:
    words = ("algo=anml", "algo.gate.hidden=[3]", "algo.inner_lr=0.001", "algo.online_lr=0.01")
    answer = metarun(*words, *TINY)
    assert answer.code == 0, answer.err
    # Six hidden units with two parameters each, a gate of widths 1-3-6, and the last layer.
    assert results(folder())["parameters"] == 6 * 2 + (3 * 2 + 6 * 4) + 7


@pytest.mark.parametrize("threshold", ["-1", "0", "nan"])
def test_proficiency_is_something_that_can_be_reached(metarun: Command, threshold: str) -> None:
    answer = metarun("algo=online", *TINY, f"eval.proficiency={threshold}")
    assert answer.code == 2
    assert "eval.proficiency=" in answer.err
