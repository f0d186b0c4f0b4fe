"""Tests of `metarun diff`, and of the names by which words of the command line take runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from metarun.reporting.difference import Side, tables
from metarun.reporting.tables import Figure, Table
from metarun.runs.folder import RunFolder
from tests.conftest import Command
from tests.reporting.test_tables import result

SMALL = [
    "data=linear", "train.steps=2", "train.tasks_per_step=2", "eval.episodes=6",
    "eval.val_episodes=4", "train.log_every=1", "device=cpu", "threads=1",
]  # fmt: skip


def side(values: list[float] | None, config: dict[str, Any] | None = None, **facts: Any) -> Side:
    facts = {"metric": "mse", "episodes_hash": "one", **facts}
    found = None if values is None else result(values, **facts)
    return Side(Path("outputs/run"), config or {}, {}, "finished", found)


def verdict_of(one: Side, other: Side) -> Table:
    return tables(one, other)[1]


def test_two_runs_are_compared_by_settings_data_and_paired_metric(
    metarun: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert metarun("-m", "algo=maml", "optim.lr=0.001,0.5", *SMALL).code == 0
    one, other = sorted((tmp_path / "outputs/sweeps").glob("algo=maml*"))
    environment = json.loads((other / "environment.json").read_text())
    environment["versions"]["torch"] = "1.0"
    (other / "environment.json").write_text(json.dumps(environment))
    answer = metarun("diff", one.name[-8:], str(other), "--format", "json")
    assert answer.code == 0, answer.err
    runs, measured, settings, versions = json.loads(answer.out)
    assert [row["folder"] for row in runs["rows"]] == [str(one.relative_to(tmp_path)), str(other)]
    rates = [json.dumps(RunFolder(run).configuration()["optim"]["lr"]) for run in (one, other)]
    assert settings["rows"] == [{"key": "optim.lr", "A": rates[0], "B": rates[1]}]
    assert [row["key"] for row in versions["rows"]] == ["versions.torch"]
    here, there = (np.load(run / "episodes.npz")["mse"] for run in (one, other))
    difference = measured["rows"][0]["A - B"]
    assert difference["mean"] == pytest.approx(np.mean(here - there))
    assert difference["ci95"] == pytest.approx(stats.t.ppf(0.975, 5) * stats.sem(here - there))
    assert measured["text"].startswith("The test episodes are the same. ")
    assert "optim.lr" in metarun("diff", str(one), str(other)).out


def test_the_better_run_is_named_and_no_other() -> None:
    low, high = [1.0, 1.1, 0.9, 1.0], [2.0, 2.2, 1.8, 2.1]
    assert "A is better on these episodes" in verdict_of(side(low), side(high)).text
    assert "B is better on these episodes" in verdict_of(side(high), side(low)).text
    better = verdict_of(side(low, metric="accuracy"), side(high, metric="accuracy"))
    assert "B is better on these episodes" in better.text
    assert isinstance(better.lines[0]["A - B"], Figure)
    noisy = [0.0, 2.1, -1.0, 3.0]
    assert "Neither run is shown to be better" in verdict_of(side(low), side(noisy)).text
    assert "Neither run is shown to be better" in verdict_of(side(low), side(low)).text


def test_other_episodes_have_no_paired_difference() -> None:
    for other in (side([1.0, 2.0], episodes_hash="two"), side([1.0, 2.0, 3.0])):
        found = verdict_of(side([1.0, 2.0]), other)
        assert "The test episodes are not the same." in found.text
        assert set(found.lines[0]) == {"A", "B"}


def test_runs_that_cannot_be_compared_say_why() -> None:
    assert verdict_of(side([1.0, 2.0]), side(None)).lines == [
        {"run": "B", "meta-test": "no result yet"}
    ]
    found = verdict_of(side([0.5, 0.5], metric="accuracy"), side([1.0, 2.0]))
    assert found.text == "A has the accuracy, B the mse."
    assert "A run diverged" in verdict_of(side([1.0, float("nan")]), side([1.0, 2.0])).text


def test_a_key_of_one_run_alone_differs_and_the_name_of_a_sweep_does_not() -> None:
    one = {"algo": {"_target_": "metarun.a.MAML", "inner_lr": 0.1}, "sweep": {"name": "x"}, "b": 1}
    other = {"algo": {"_target_": "metarun.b.ProtoNet"}, "sweep": {"name": None}, "b": 1}
    _, _, settings = tables(side([1.0, 2.0], one), side([1.0, 2.0], other))
    assert settings.lines == [
        {"key": "algo._target_", "A": "MAML", "B": "ProtoNet"},
        {"key": "algo.inner_lr", "A": "0.1", "B": "–"},
    ]


def test_equal_runs_say_that_they_are_equal() -> None:
    first, measured = tables(side([1.0, 2.0]), side([1.0, 2.0]))
    said = "The settings are the same. The versions, machine and data are the same."
    assert first.text == said
    assert str(measured.lines[0]["A - B"]) == "0.00 ± 0.00"


def test_every_word_takes_the_last_run_and_a_part_of_its_name(
    metarun: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda place: opened.append(place) or True)
    assert metarun(*SMALL, "algo=maml").code == 0
    (run,) = (path.parent for path in tmp_path.rglob("status.json"))
    shown = str(run.relative_to(tmp_path))
    answer = metarun("report", "--open")
    assert answer.code == 0
    assert answer.err == f"note: the last run is {shown}\n"
    assert answer.out == f"{shown}/report.html\n"
    assert opened == [(run / "report.html").as_uri()]
    for name in ("last", run.name[-6:]):
        assert metarun("table", name).out == metarun("table", shown).out
        assert metarun(f"resume={name}").out.startswith(f"{shown} is finished after 2 steps")
        assert f"are the same run, {shown}: expected" in metarun("diff", name, shown).err
        assert metarun("predict", name, "--support", ".", "--query", ".").code == 2
    assert metarun("test=last", "shot=3", "eval.episodes=4").code == 0
    assert (run / "tests/shot=3_eval.episodes=4/results.json").exists()


def test_a_learner_is_loaded_by_the_name_of_its_run(metarun: Command) -> None:
    from metarun.inference.learner import load

    assert metarun(*SMALL, "algo=maml").code == 0
    x = np.linspace(0.0, 1.0, 5)[:, None]
    assert load("last").fit(x, x).predict(x).shape == (5, 1)


def test_without_a_browser_the_page_is_named(
    metarun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webbrowser.open", lambda _: False)
    assert metarun(*SMALL, "algo=maml").code == 0
    answer = metarun("report", "last", "--open")
    assert answer.code == 0
    assert answer.err == "note: no browser was found: open the page by hand\n"
