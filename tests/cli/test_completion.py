"""Tests of Tab completion: each word of the command line, and no errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metarun.cli.completion import answer, completions
from metarun.cli.parser import PARSERS
from metarun.runs import sweeps
from metarun.runs.folder import RunFolder
from tests.conftest import Command


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with runs below q/ and a backbone of the user's own."""
    monkeypatch.chdir(tmp_path)
    for name in ("q/one", "q/two", "mine/backbone"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "q/file.txt").touch()
    (tmp_path / "mine/backbone/mynet.yaml").write_text("# My network\ndefaults:\n  - mlp\n")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("li", ["list"]),
        ("re", ["recipe=", "report", "resume="]),
        ("report q/", ["q/one/", "q/two/"]),
        ("report q/one --out", ["--output"]),
        ("report --output q/t", ["q/two/"]),
        ("report --output q/one q/t", ["q/two/"]),
        ("report --output=q/t", ["--output=q/two/"]),
        ("data omni", ["omniglot", "omniglot_small"]),
        ("data omniglot omni", []),
        ("data omniglot --from q/f", ["q/file.txt"]),
        ("data --from q omni", ["omniglot", "omniglot_small"]),
        ("compare data=omniglot algo=proton", ["algo=protonet"]),
        ("compare --against proton", ["protonet"]),
        ("compare --config-dir mine backbone=my", ["backbone=mynet"]),
        ("table --format c", ["csv"]),
        ("table --paper finn2017_sin", ["finn2017_sinusoid"]),
        ("list al", ["algo"]),
        ("list algo proton", ["protonet"]),
        ("list backbone --config-dir mine my", ["mynet"]),
        ("list algo maml proton", ["protonet"]),
        ("list algo maml opt", []),
        ("predict q/o", ["q/one/"]),
        ("predict q/one --support q/t", ["q/two/"]),
        ("predict q/one q/t", []),
        ("export q/o", ["q/one/"]),
        ("export q/one --format on", ["onnx"]),
        ("export q/one --support q/t", ["q/two/"]),
        ("bench --workload sinu", ["sinusoid", "sinusoid-training"]),
        ("bench --workload conv4-1 sinu", ["sinusoid", "sinusoid-training"]),
        ("resume=q/", ["resume=q/one/", "resume=q/two/"]),
        ("test=q/o", ["test=q/one/"]),
        ("init=q/o", ["init=q/one/"]),
        ("resume=q/one train.st", ["train.steps="]),
        ("algo=protonet algo.dist", ["algo.distance="]),
        ("-m algo=proton", ["algo=protonet"]),
        ("backbone=mlp", ["backbone=mlp", "backbone=mlp_omniglot"]),
        ("backbone=for_", []),
        ("--config-dir mine backbone=my", ["backbone=mynet"]),
        ("hydra.searchpath=[file://mine] backbone=my", ["backbone=mynet"]),
        ("--config-dir mi", ["mine/"]),
        ("--cfg jo", ["job"]),
        ("--config-d", ["--config-dir"]),
        ("algo=nonsense algo.inner", []),
        ("[", []),
    ],
)
def test_a_word_is_completed(line: str, expected: list[str]) -> None:
    assert completions(line.split()) == expected


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_of_a_subcommand_is_offered(name: str) -> None:
    offered = completions([name, "--"])
    assert offered == sorted(word for word in PARSERS[name]().options() if word.startswith("--"))
    assert "--help" in offered
    assert name in completions([""])


@pytest.mark.parametrize("command", ["metarun", "/opt/metarun/bin/metarun", "python -m metarun"])
def test_the_question_of_a_shell_is_answered(
    command: str, metarun: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COMP_LINE", f"{command} report q/")
    assert metarun("-sc", "query=bash") == (0, "q/one/ q/two/\n", "")
    assert answer("fish") == "q/one/\nq/two/"
    monkeypatch.setenv("COMP_LINE", f"{command} report ")
    assert metarun("-sc", "query=zsh") == (0, "mine/ q/\n", "")


def test_names_of_runs_and_sweeps_are_offered_where_a_run_is_named(folder: Path) -> None:
    for name in ("12-00-00-maml-linear-aaaaaa", "12-30-00-maml-linear-bbbbbb"):
        run = RunFolder.create(folder / "outputs/2026-11-21" / name, config="names: {}\n")
        run.set_status("finished")
    sweeps.Sweep("rates", "", [], []).store()
    for line in ("table ", "predict ", "diff ", "diff last "):
        assert {"last", "rates", "q/"} <= set(completions([*line.split(" ")[:-1], ""]))
    assert completions(["test=la"]) == ["test=last"]
    assert completions(["report", "12-3"]) == ["12-30-00-maml-linear-bbbbbb"]
    assert completions(["list", "run"]) == ["runs"]
    assert completions(["list", "runs", ""]) == []


WORDS = st.sampled_from([*PARSERS, "--config-dir", "algo=", "--", "resume=", "nowhere/", "-m"])
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0 "), max_size=6)


@given(words=st.lists(WORDS | TEXT, min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_no_line_is_an_error(words: list[str]) -> None:
    assert all(offer.startswith(words[-1]) for offer in completions(words))
