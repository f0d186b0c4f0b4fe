"""Tests of `test=RUN experiment=OTHER`: one training serves several published cells."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import yaml

from metarun.cli.main import main
from tests.conftest import Command

TINY = [
    "train.steps=2", "train.tasks_per_step=2", "eval.episodes=6", "eval.val_episodes=4",
    "threads=1", "device=cpu",
]  # fmt: skip
TRAINED, OTHER = "raghu_5shot", "raghu_10shot"


def write_experiments(folder: Path) -> None:
    """Two cells that differ at evaluation only, and one that trains differently."""
    (folder / "experiment").mkdir(parents=True)
    base = (
        "# @package _global_\n# MAML on sinusoids\ndefaults:\n  - override /algo: maml\n"
        "  - override /data: sinusoid\npublished:\n  paper: A 2020\n  table: Table 1\n"
        "  row: MAML\n  cells:\n    - {value: 1.0}\n  steps: 8\n  confidence: verified\n"
        "  source: paper\nshot: 5\ntrain:\n  shot: 10\n  steps: 8\neval:\n  episodes: 20\n"
    )
    (folder / f"experiment/{TRAINED}.yaml").write_text(base)
    child = "# @package _global_\n# More points\ndefaults:\n  - raghu_5shot\n  - _self_\n"
    (folder / f"experiment/{OTHER}.yaml").write_text(
        f"{child}published:\n  cells:\n    - {{inner_steps: 2, value: 0.5}}\nshot: 10\n"
        "eval:\n  inner_steps: 2\n  episodes: 12\n"
    )
    (folder / "experiment/raghu_rate.yaml").write_text(f"{child}algo:\n  inner_lr: 0.5\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a sweep over two seeds, whose runs are meta-tested in the setting of another cell."""
    folder = tmp_path_factory.mktemp("shared")
    write_experiments(folder / "mine")
    words = ["-m", f"experiment={TRAINED}", "seed=0,1", *TINY, "hydra.sweep.dir=runs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["--config-dir", "mine", *words]) == 0
    return folder


@pytest.fixture
def trained(made: Path, metarun: Command, tmp_path: Path) -> Path:  # noqa: ARG001
    """Return the sweep in the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs"


def test_a_finished_run_is_tested_in_the_setting_of_another_experiment(
    metarun: Command, trained: Path
) -> None:
    for run in sorted(trained.glob("experiment=*")):
        answer = metarun("--config-dir", "mine", f"test={run}", f"experiment={OTHER}")
        assert answer.code == 0, answer.err
        # The end compares it with the published value of that experiment.
        assert f"{OTHER}: A 2020, Table 1" in answer.out
        folder = run / f"tests/experiment={OTHER}"
        found = json.loads((folder / "results.json").read_text())
        assert (found["experiment"], found["shot"], found["test"]["episodes"]) == (OTHER, 10, 12)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        # The episodes typed for the run are evaluation's; its steps are training's.
        assert (config["eval"]["inner_steps"], config["train"]["steps"]) == (2, 2)
        assert config["train"]["shot"] == 10
    answer = metarun("table", "runs", "--format", "csv", "--config-dir", "mine")
    assert answer.code == 0, answer.err
    rows = {row["experiment"]: row for row in csv.DictReader(io.StringIO(answer.out))}
    assert rows[OTHER]["task"] == "10 points, 2 steps"
    assert (rows[OTHER]["seeds"], rows[OTHER]["episodes"]) == ("2", "12")
    assert rows[OTHER]["steps"] == "2 of 8"
    assert rows[OTHER]["ours mark"] == "partial"
    assert rows[OTHER]["note"] == f"trained and chosen on meta-val as {TRAINED}; changed: " + (
        "train.tasks_per_step=2"
    )
    assert rows[TRAINED]["seeds"] == "2"
    # The report of one run has both rows.
    assert metarun("report", str(run), "--config-dir", "mine").code == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    assert f"trained and chosen on meta-val as {TRAINED}" in text


def test_the_same_parameters_are_tested(metarun: Command, trained: Path) -> None:
    run = min(trained.glob("experiment=*"))
    words = ["shot=10", "eval.inner_steps=2", "eval.episodes=12"]
    for more in ([f"experiment={OTHER}"], words):
        assert metarun("--config-dir", "mine", f"test={run}", *more).code == 0
    one, other = (json.loads(path.read_text()) for path in run.glob("tests/*/results.json"))
    assert one["test"] == other["test"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["experiment=raghu_rate"],
            "experiment=raghu_rate trains differently from this run: algo.inner_lr is 0.5 there "
            "and 0.01 in the run; train a run of its own",
        ),
        (["experiment=raghu"], "experiment=raghu: did you mean"),
        ([f"experiment={OTHER}", "data=linear"], "experiment= and data= exclude each other"),
        ([f"experiment={OTHER}", "train.steps=9"], "train.steps cannot change in a meta-test"),
    ],
)
def test_an_experiment_that_trains_differently_is_refused(
    words: list[str], message: str, metarun: Command, trained: Path
) -> None:
    run = min(trained.glob("experiment=*"))
    answer = metarun("--config-dir", "mine", f"test={run}", *words)
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert message in answer.err
    assert not (run / "tests").exists()


def test_a_run_that_is_not_finished_serves_no_experiment(metarun: Command, trained: Path) -> None:
    run = min(trained.glob("experiment=*"))
    (run / "status.json").write_text('{"state": "interrupted", "step": 1}')
    answer = metarun("--config-dir", "mine", f"test={run}", f"experiment={OTHER}")
    assert answer.code == 2
    assert "the run is not finished: type resume=" in answer.err
