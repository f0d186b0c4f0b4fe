"""The examples of the README run, with few steps."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

import metarun

FOLDER = Path(__file__).parents[1] / "examples"
FEW = {
    "maml_sinusoid": ["train.steps=4"],
    "online_lines": ["data.tasks=3"],
    "omniglot_mlp": ["train.steps=2"],
    "protonet": ["train.steps=2"],
    "iris": ["train.steps=2"],
}
TINY = ["train.tasks_per_step=2", "eval.episodes=4", "eval.val_episodes=4", "eval.curve_steps=0",
        "threads=1", "device=cpu"]  # fmt: skip


def test_every_example_is_short_and_has_few_steps() -> None:
    files = [path for path in FOLDER.glob("*.py") if path.stem != "__init__"]
    assert {path.stem for path in files} == FEW.keys()
    assert all(len(path.read_text().splitlines()) <= 15 for path in files)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_an_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "iris":
        pytest.importorskip("sklearn")
    whole, runs = metarun.run, []

    def with_few_steps(*words: str, **options: Any) -> Any:
        runs.append(whole(*words, *TINY, *FEW[name], **options))
        return runs[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metarun, "run", with_few_steps)
    runpy.run_path(str(FOLDER / f"{name}.py"))
    assert runs
    shown = capsys.readouterr().out
    assert any(f"{run.results['test']['mean']:.3f}" in shown for run in runs) or name == "protonet"
