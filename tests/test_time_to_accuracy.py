"""Tests of time_to_accuracy.py: what its lines say, its evaluation, and two steps of each loop."""

from __future__ import annotations

import json
import math
import multiprocessing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import Command
from tests.time_to_accuracy import (
    RIVALS,
    TASKS,
    Log,
    adapted_figure,
    draw,
    first_at,
    nearest_mean_accuracy,
    read,
    run_metarun,
    run_rival,
    table,
    tasks_of,
)

FEW = ("eval.val_episodes=20", "train.steps=2", "train.eval_every=1", "train.log_every=1")
SINUSOID = TASKS["sinusoid"]


def lines(folder: Path, contender: str, seed: int, *points: tuple[float, float]) -> Path:
    """Write the lines of a sinusoid run, of (seconds, figure)."""
    path = folder / f"{contender}-{seed}.jsonl"
    facts = {"contender": contender, "task": "sinusoid", "seed": seed}
    made = [
        {**facts, "step": n, "seconds": s, "processor_seconds": s / 2, "figure": figure}
        for n, (s, figure) in enumerate(points)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in made))
    return path


def test_the_first_figure_at_the_threshold_counts_and_errors_and_accuracies_differ() -> None:
    figures = [math.nan, 0.9, 0.4, 0.95, 0.3]
    rows = [{"seconds": n, "figure": figure} for n, figure in enumerate(figures)]
    found = [first_at(TASKS[name], rows) for name in ("sinusoid", "maml", "protonet")]
    assert [line and line["seconds"] for line in found] == [2, 3, None]


def test_the_table_has_the_seconds_of_every_seed_and_says_which_did_not_arrive(
    tmp_path: Path,
) -> None:
    paths = [
        lines(tmp_path, "fast", 0, (1.0, 2.0), (4.0, 0.4), (6.0, 0.9)),
        lines(tmp_path, "fast", 1, (1.0, 2.0), (8.0, 0.1)),
        lines(tmp_path, "slow", 0, (1.0, 2.0), (9.0, 0.5), (12.0, math.nan)),
    ]
    found = read(paths)
    *_, fast, slow = table(found).splitlines()
    goal = "Sinusoids, 5 points: MSE 0.400"
    # Of an even number of seeds, the later one: half of them had arrived by then.
    assert fast == f"| {goal} | fast | 0: 4.0, 1: 8.0 | 8.0 | 4.0 | – |"
    assert slow == f"| {goal} | slow | 0: not in 12 (0.500) | – | – | – |"
    draw(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_rival_is_evaluated_at_its_first_steps_and_at_its_last(tmp_path: Path) -> None:
    log = Log(tmp_path / "lines.jsonl", contender="one", task="sinusoid", seed=0)
    steps = ((number, lambda n=number: n / 10) for number in range(1, 1000))
    run_rival(steps, log, minutes=math.inf)
    (found,) = read([log.path]).values()
    assert [line["step"] for line in found[0]][:2] == [1, 2]
    assert found[0][-1]["step"] == 999
    assert found[0][-1]["figure"] == 99.9


def test_the_time_that_is_over_ends_a_rival_with_an_evaluation(tmp_path: Path) -> None:
    log = Log(tmp_path / "lines.jsonl", contender="one", task="sinusoid", seed=0)
    run_rival(((number, lambda: 0.5) for number in range(1, 1000)), log, minutes=0.0)
    assert [line["step"] for line in read([log.path])["sinusoid", "one"][0]] == [1]


def test_metarun_reports_what_the_rivals_evaluation_finds(metarun: Command, tmp_path: Path) -> None:
    del metarun  # It enters an empty folder.
    words = (*FEW, "threads=1", "device=cpu")
    log = Log(tmp_path / "lines.jsonl", contender="metarun", task="sinusoid", seed=0)
    assert run_metarun(SINUSOID, 0, tmp_path / "run", log, 1.0, *words) == 0
    found = read([log.path])["sinusoid", "metarun"][0]
    assert [line["step"] for line in found] == [1, 2]
    assert 0.0 < found[0]["seconds"] <= found[1]["seconds"]
    stored = torch.load(tmp_path / "run" / "checkpoints" / "best.pt", weights_only=True)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    values = [value for name, value in stored["state"].items() if name.startswith("net.")]
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), values, strict=True):
            parameter.copy_(value)
    tasks = tasks_of(replace(SINUSOID, words=(*SINUSOID.words, *FEW)))
    assert len(tasks["query_x"]) == 20
    figure = adapted_figure(net, tasks, lr=0.01, steps=10, at_once=7)
    assert figure == pytest.approx(stored["mean"], rel=1e-4)


def test_one_gradient_step_of_a_line_is_the_one_of_the_closed_form() -> None:
    draws = np.random.default_rng(0)
    names = ("support_x", "support_y", "query_x", "query_y")
    tasks = {name: draws.normal(size=(3, 4, 1)).astype(np.float32) for name in names}
    net = nn.Linear(1, 1, bias=False)
    weight = net.weight.item()
    x, y = tasks["support_x"], tasks["support_y"]
    adapted = weight - 0.1 * 2 * ((weight * x - y) * x).mean((1, 2), keepdims=True)
    expected = ((adapted * tasks["query_x"] - tasks["query_y"]) ** 2).mean()
    assert adapted_figure(net, tasks, lr=0.1, steps=1) == pytest.approx(expected, rel=1e-5)


def test_the_nearest_mean_of_pixels_is_found_by_hand() -> None:
    pixels = np.array([0.0, 2.0, 5.0, 7.0, 10.0, 12.0], np.float32).reshape(6, 1, 1, 1)
    index = np.array([[0, 1, 4, 5, 0, 2, 3, 5]])
    labels = np.array([[0, 0, 1, 1]])
    wrong_at_the_third = np.array([[0, 0, 0, 1]])
    tasks = {"unique": pixels, "index": index, "support_y": labels}
    net = nn.Flatten()
    assert nearest_mean_accuracy(net, tasks | {"query_y": labels}, channels=3) == 1.0
    assert nearest_mean_accuracy(net, tasks | {"query_y": wrong_at_the_third}) == 0.75


def two_figures(name: str) -> None:
    """Take two steps of a rival."""
    tasks = tasks_of(replace(SINUSOID, words=(*SINUSOID.words, *FEW)))
    steps = RIVALS["sinusoid"][name](tasks, 0)
    figures = [next(steps)[1]() for _ in range(2)]
    assert all(0.0 < figure < 20.0 for figure in figures)
    assert figures[0] != figures[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", RIVALS["sinusoid"])
def test_two_steps_of_a_rival_give_a_figure(name: str) -> None:
    """In a process of its own: one that has imported JAX warns at every later fork."""
    if find_spec({"jax": "optax"}.get(name, name)) is None:
        pytest.skip(f"{name} is not installed")
    process = multiprocessing.get_context("spawn").Process(target=two_figures, args=(name,))
    process.start()
    process.join(300)
    assert process.exitcode == 0
