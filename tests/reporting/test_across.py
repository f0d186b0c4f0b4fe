"""The table of what runs were trained on and tested on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import Command

SMALL = [
    "algo=maml", "train.steps=2", "train.tasks_per_step=2", "eval.episodes=4",
    "eval.val_episodes=2", "eval.curve_steps=0", "device=cpu", "threads=1",
]  # fmt: skip


def figure(folder: str) -> float:
    record = json.loads(Path(folder, "results.json").read_text())
    return float(record["test"]["mean"])


def test_runs_are_set_against_what_they_were_tested_on(metarun: Command) -> None:
    for data, other in (("sinusoid", "linear"), ("linear", "sinusoid")):
        assert metarun(*SMALL, f"data={data}", f"hydra.run.dir=runs/{data}").code == 0
        alone = metarun("table", f"runs/{data}", "--format", "json")
        assert "tested on" not in alone.out
        assert metarun(f"test=runs/{data}", f"data={other}").code == 0
    # A later test of the same takes the place of an earlier one; another setting has its own table.
    assert metarun("test=runs/linear", "data=sinusoid", "eval.episodes=6").code == 0
    assert metarun("test=runs/linear", "shot=3").code == 0
    tables = json.loads(metarun("table", "runs", "--format", "json").out)
    (matrix,) = [table for table in tables if "tested on" in table["title"]]
    rows = {row["trained on"]: row for row in matrix["rows"]}
    assert set(rows) == {"sinusoid", "linear"}
    assert all(row["learner"] == "maml" for row in rows.values())
    expected = {
        ("sinusoid", "sinusoid"): "runs/sinusoid",
        ("linear", "linear"): "runs/linear",
        ("sinusoid", "linear"): "runs/sinusoid/tests/data=linear",
        ("linear", "sinusoid"): "runs/linear/tests/data=sinusoid_eval.episodes=6",
    }
    for (trained, tested), folder in expected.items():
        assert rows[trained][tested]["mean"] == figure(folder), (trained, tested)
    assert "trained on one, tested on another: 1-way" in metarun("table", "runs").out


def test_folders_are_told_apart_by_their_names(metarun: Command) -> None:
    far = "an/animal_pictures_whose_path_is_longer_than_the_name_of_a_test/pets"
    for root in ("letters", far):
        for number in range(6):
            (folder := Path(root, str(number))).mkdir(parents=True)
            for row in range(3):
                pixels = np.full((28, 28), 40 * number + row, np.uint8)
                Image.fromarray(pixels).save(folder / f"{row}.png")
    words = ["data=folder", "way=2", "shot=1", "query=1", "backbone.filters=2"]
    assert metarun(*SMALL, *words, "data.root=letters", "hydra.run.dir=run").code == 0
    for root in ("letters", far):
        assert metarun("test=run", "data=folder", f"data.root={root}", "data.classes=all").code == 0
    (matrix,) = json.loads(metarun("table", "run", "--format", "json").out)[1:]
    (row,) = matrix["rows"]
    heads = {"folder letters", "folder letters, all classes", "folder pets, all classes"}
    assert set(row) - {"learner", "trained on"} == heads


def test_a_damaged_test_is_left_out_and_told(metarun: Command) -> None:
    assert metarun(*SMALL, "data=sinusoid", "hydra.run.dir=run").code == 0
    assert metarun("test=run", "data=linear").code == 0
    Path("run/tests/data=linear/results.json").write_text("{")
    answer = metarun("table", "run")
    assert "tested on another" not in answer.out
    assert "run/tests/data=linear is damaged and left out" in answer.err
