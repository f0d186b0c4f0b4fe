"""Tests of `resume=` and `test=`: the stored configuration applies, only some keys may change."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from metarun import load
from metarun.cli.main import main
from tests.cli.test_main import own
from tests.conftest import Command

TINY = [
    "train.steps=4", "train.tasks_per_step=2", "train.checkpoint_every=2", "train.eval_every=2",
    "eval.episodes=4", "eval.val_episodes=4", "eval.curve_steps=1", "device=cpu",
]  # fmt: skip


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of MAML on sinusoids."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("finished")
        patch.chdir(folder)
        assert main(["algo=maml", "data=sinusoid", *TINY, "hydra.run.dir=run"]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stored(folder: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))


def state(folder: Path) -> str:
    return str(json.loads((folder / "status.json").read_text())["state"])


def edit(folder: Path, key: str, value: object) -> None:
    """Change a stored value, as if the shipped YAML had been different when the run started."""
    cfg = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(cfg, key, value)
    OmegaConf.save(cfg, folder / "config.yaml")


def test_a_finished_run_says_so_and_stays_as_it_is(metarun: Command, run: Path) -> None:
    before = files(run)
    for words in ([], ["train.steps=3"], ["train.log_every=7"]):
        answer = metarun(f"resume={run}", *words)
        assert answer.code == 0
        assert "is finished after 4 steps: type a larger train.steps" in answer.out
    assert files(run) == before


def test_the_run_that_last_stands_for_is_called_so_at_its_end(metarun: Command) -> None:
    answer = metarun("algo=maml", "data=sinusoid", *TINY)
    assert "next: `metarun report last` draws it, `metarun test=last shot=10` tests" in answer.out


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("train.patience", 2, "train.patience=2 ended it: type a larger one to continue it"),
        ("train.rehearse", 9.0, "it was a rehearsal: repeat its command without --rehearse"),
    ],
)
def test_a_run_that_ended_early_is_not_continued_by_more_steps(
    metarun: Command, run: Path, key: str, value: float, told: str
) -> None:
    edit(run, "train.steps", 100)
    edit(run, key, value)
    before = files(run)
    for words in ([], ["train.steps=200"]):
        answer = metarun(f"resume={run}", *words)
        assert answer.code == 0
        assert f"is finished after 4 steps: {told}, or test={run}" in answer.out
    assert files(run) == before


def test_a_run_that_its_patience_ended_goes_on_by_a_larger_one_alone(
    metarun: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # At this rate no evaluation is better than the first.
    words = ["optim.lr=1e-9", "train.steps=8", "train.eval_every=1", "train.patience=2"]
    words = [word for word in TINY if not word.startswith("train.")] + words
    answer = metarun("algo=maml", "data=sinusoid", *words, f"hydra.run.dir={folder}")
    assert answer.code == 0, answer.err
    made = json.loads((folder / "results.json").read_text())["steps"]
    assert made < 8
    before = files(folder)
    for patience in (1, 2):
        answer = metarun(f"resume={folder}", f"train.patience={patience}")
        assert answer.code == 0
        assert "train.patience=2 ended it: type a larger one to continue it" in answer.out
    assert files(folder) == before
    answer = metarun(f"resume={folder}", "train.patience=3")
    assert answer.code == 0, answer.err
    assert json.loads((folder / "results.json").read_text())["steps"] == made + 1
    assert metarun(f"resume={folder}", "train.patience=null").code == 0
    assert json.loads((folder / "results.json").read_text())["steps"] == 8


def test_damaged_results_of_a_finished_run_are_made_again(metarun: Command, run: Path) -> None:
    before = json.loads((run / "results.json").read_text())
    for name in ("results.json", "episodes.npz"):
        (run / name).write_bytes((run / name).read_bytes()[:100])
        answer = metarun("table", str(run))
        assert answer.code == 1
        assert f"{name} is damaged" in answer.err or f"{name}: " in answer.err
        assert f"`metarun resume={run}` makes its meta-test again" in answer.err
        assert "remove the folder" not in answer.err
        answer = metarun(f"resume={run}")
        assert answer.code == 0, answer.err
        assert answer.err.count("the meta-test is made again") == 1
        after = json.loads((run / "results.json").read_text())
        assert {**after, "seconds": 0} == {**before, "seconds": 0}
        assert metarun("table", str(run)).code == 0
    (run / "results.json").unlink()
    assert "results.json is missing: the meta-test is made" in metarun(f"resume={run}").err
    assert json.loads((run / "results.json").read_text())["test"] == before["test"]


@pytest.fixture(scope="session")
def sibling(finished: Path) -> Path:
    """The same run with another seed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished.parent)
        words = ["algo=maml", "data=sinusoid", *TINY, "seed=7", "hydra.run.dir=sibling"]
        assert main(words) == 0
    return finished.parent / "sibling"


@pytest.mark.parametrize("name", ["results.json", "episodes.npz"])
def test_results_of_the_same_run_with_another_seed_are_not_taken(
    metarun: Command, run: Path, sibling: Path, name: str
) -> None:
    before = json.loads((run / "results.json").read_text())
    shutil.copy(sibling / name, run / name)
    answer = metarun("table", str(run))
    assert answer.code == 1
    whose = "is of another run: its seed is 7, that of this run 0"
    assert f"{name} {whose if name == 'results.json' else 'is damaged: results.json has'}" in (
        answer.err
    )
    assert "the meta-test is made again" in metarun(f"resume={run}").err
    assert json.loads((run / "results.json").read_text())["test"] == before["test"]


def test_checkpoints_of_the_same_run_with_another_seed_are_not_taken(
    metarun: Command, run: Path, sibling: Path
) -> None:
    before = json.loads((run / "results.json").read_text())
    shutil.copy(sibling / "checkpoints/best.pt", run / "checkpoints/best.pt")
    answer = metarun(f"test={run}")
    assert "best.pt is of another run: its seed is 7, that of this run 0" in answer.out
    found = json.loads((run / "tests/same/results.json").read_text())
    assert found["test"] == before["test"]
    for name in ("best.pt", "last.pt", "previous.pt"):
        shutil.copy(sibling / "checkpoints/last.pt", run / f"checkpoints/{name}")
    answer = metarun(f"test={run}")
    assert answer.code == 2
    assert "last.pt is of another run" in answer.err.splitlines()[-1]


def test_a_test_that_fails_leaves_no_folder_so_that_the_next_has_its_name(
    metarun: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("metarun.training.meta_test.meta_test", full)
        assert metarun(f"test={run}").code == 1
    assert not list((run / "tests").iterdir())
    assert metarun(f"test={run}").code == 0
    assert [path.name for path in (run / "tests").iterdir()] == ["same"]


def test_results_of_a_newer_version_are_not_made_again(metarun: Command, run: Path) -> None:
    record = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**record, "format": 99}))
    assert "is finished after 4 steps" in metarun(f"resume={run}").out


def test_a_finished_run_with_a_damaged_log_says_so(metarun: Command, run: Path) -> None:
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"step"', b"damage", 1))
    answer = metarun(f"resume={run}")
    assert "is finished after 4 steps" in answer.out
    assert answer.err == f"warning: {log}: 1 damaged line left out\n"


def test_lines_that_a_report_leaves_out_are_counted_once(metarun: Command, run: Path) -> None:
    log = run / "metrics.jsonl"
    first, rest = log.read_bytes().split(b"\n", 1)
    log.write_bytes(first[:-9] + b"\n" + rest + b"garbage")
    answer = metarun("report", str(run))
    assert answer.code == 0, answer.err
    assert answer.err == f"warning: {log}: 2 damaged lines left out\n"
    log.write_bytes(first + b"\n")
    step = json.loads(first)["step"]
    assert metarun("report", str(run)).err == f"warning: {log}: nothing after step {step} of 4\n"


def test_a_finished_run_goes_on_to_more_steps_and_remembers_them(
    metarun: Command, run: Path
) -> None:
    answer = metarun(f"resume={run}", "train.steps=6")
    assert answer.code == 0, answer.err
    assert json.loads((run / "results.json").read_text())["steps"] == 6
    assert stored(run)["train"]["steps"] == 6
    assert OmegaConf.to_container(OmegaConf.load(run / "overrides.yaml"))[-1] == "train.steps=6"
    assert "after 6 steps" in metarun(f"resume={run}").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("way=3", "way cannot change in a resumed run: only train.steps"),
        ("algo=anil", "algo cannot change in a resumed run"),
        ("algo.inner_lr=0.3", "algo.inner_lr cannot change in a resumed run"),
        ("train.stpes=9", "there is no key train.stpes: did you mean train.steps?"),
        ("train.steps=many", "train.steps=many: expected a whole number"),
        ("train.steps=5,6", "has several values"),
        ("+train.steps=5", "accept only KEY=VALUE"),
        ("engine=vamp", "engine=vamp: expected auto, vmap, loop or threads"),
        ("device=gpu", "device=gpu: expected auto"),
    ],
)
def test_what_may_not_change_is_refused_and_nothing_changes(
    words: str, message: str, metarun: Command, run: Path
) -> None:
    before = files(run)
    answer = metarun(f"resume={run}", words)
    assert answer.code == 2
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert message in answer.err
    assert files(run) == before


def test_fewer_steps_than_were_made_are_refused(metarun: Command, run: Path) -> None:
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "interrupted"}))
    before = files(run)
    answer = metarun(f"resume={run}", "train.steps=2")
    assert answer.code == 2
    assert "train.steps=2: the run has already made 4 steps: expected more" in answer.err
    assert {k: v for k, v in files(run).items() if k != "lock"} == before


def test_a_value_that_differs_by_now_is_named_and_the_runs_own_is_kept(
    metarun: Command, run: Path
) -> None:
    edit(run, "algo.inner_lr", 0.5)
    answer = metarun(f"resume={run}", "train.steps=5")
    assert answer.code == 0, answer.err
    lines = [line for line in answer.err.splitlines() if "the run's value is kept" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: algo.inner_lr is now 0.01 in the configuration but was")
    assert stored(run)["algo"]["inner_lr"] == 0.5


def test_how_tasks_run_stays_as_resolved_unless_overridden(metarun: Command, run: Path) -> None:
    edit(run, "engine", "loop")
    assert metarun(f"resume={run}", "train.steps=5").code == 0
    assert stored(run)["engine"] == "loop"
    assert metarun(f"resume={run}", "train.steps=6", "engine=vmap").code == 0
    assert stored(run)["engine"] == "vmap"


def test_a_run_whose_words_mean_nothing_any_more_goes_on_by_its_stored_configuration(
    metarun: Command, run: Path
) -> None:
    (run / "overrides.yaml").write_text("- algo=renamed\n")
    answer = metarun(f"resume={run}", "train.steps=5")
    assert answer.code == 0
    assert "warning: the run's overrides no longer compose" in answer.err


@pytest.mark.parametrize("verb", ["resume", "test"])
@pytest.mark.parametrize("content", [None, {}, {"config.yaml": "[", "status.json": "{}"}])
def test_what_is_no_run_folder_is_refused(
    verb: str, content: dict[str, str] | None, metarun: Command, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "folder").mkdir()
        for name, text in content.items():
            (tmp_path / "folder" / name).write_text(text)
    before = files(tmp_path)
    answer = metarun(f"{verb}=folder")
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert files(tmp_path) == before


def test_a_path_may_hold_what_hydras_grammar_does_not_read(
    metarun: Command, run: Path, tmp_path: Path
) -> None:
    strange = run.rename(tmp_path / "a run, (mine)=1")
    assert "is finished" in metarun(f"resume={strange}").out


def results(run: Path) -> dict[str, Any]:
    """Return the results of each meta-test of a run, by the name of its folder."""
    paths = sorted(run.glob("tests/*/results.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def test_a_meta_test_repeats_the_runs_own_figure(metarun: Command, run: Path) -> None:
    assert metarun(f"test={run}").code == 0
    own = json.loads((run / "results.json").read_text())
    assert results(run)["same"]["test"] == own["test"]


def test_each_meta_test_has_a_folder_of_its_own(metarun: Command, run: Path) -> None:
    for _ in range(2):
        assert metarun(f"test={run}", "shot=3").code == 0
    assert list(results(run)) == ["shot=3", "shot=3-2"]


def test_a_meta_test_takes_other_data_and_keeps_what_was_learned(
    metarun: Command, run: Path
) -> None:
    before = files(run)
    answer = metarun(f"test={run}", "data=linear", "data.noise=0.1", "shot=3")
    assert answer.code == 0, answer.err
    (found,) = results(run).values()
    assert (found["algo"], found["data"], found["shot"]) == ("maml", "linear", 3)
    assert {k: v for k, v in files(run).items() if not k.startswith("tests/")} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.steps=3"], "train.steps cannot change in a meta-test"),
        (["algo=anil"], "algo cannot change in a meta-test"),
        (["data=lienar"], "data=lienar: did you mean linear?"),
        (["data.nosie=1"], "there is no key data.nosie: did you mean data.noise?"),
        (["data=omniglot_small"], "way=1: expected 2 or more"),
        (["data=omniglot_small", "way=5"], "way=5: the run has a fixed head for regression"),
        (["way=5"], "way=5 has no meaning in a regression"),
        (["eval.episodes=1"], "eval.episodes=1: expected 2 or more"),
    ],
)
def test_a_meta_test_that_cannot_be_is_refused_and_nothing_changes(
    words: list[str], message: str, metarun: Command, run: Path
) -> None:
    before = files(run)
    answer = metarun(f"test={run}", *words)
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert message in answer.err
    assert files(run) == before


def test_a_run_without_a_checkpoint_cannot_be_tested(metarun: Command, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    answer = metarun(f"test={run}")
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert "to test" in answer.err
    assert not list(run.glob("tests/*"))


def test_a_metric_method_is_tested_on_more_ways_than_it_learned(
    metarun: Command, tmp_path: Path
) -> None:
    words = ["algo=protonet", "data=omniglot_small", *TINY, "way=5", "train.way=5"]
    assert metarun(*words, "train.query=2", "query=2", "hydra.run.dir=run").code == 0
    answer = metarun("test=run", "way=8")
    assert answer.code == 0, answer.err
    assert results(tmp_path / "run")["way=8"]["way"] == 8


@pytest.mark.slow
def test_a_run_of_ones_own_algorithm_takes_the_users_word(
    metarun: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = own(tmp_path)
    assert metarun(*conf, "algo=mine", "data=sinusoid", *TINY, "hydra.run.dir=run").code == 0
    module = stored(tmp_path / "run")["algo"]["_target_"].partition(".")[0]
    refusal = (
        f"algo._target_={module}.Mine: the run names code outside metarun, which is not imported: "
        f"type trust={module} if you trust it"
    )
    for verb in ("test=run", "resume=run"):
        answer = metarun(verb, *(["train.steps=5"] if verb == "resume=run" else []))
        assert (answer.code, answer.err.splitlines()[-1]) == (2, f"error: {refusal}")
    with pytest.raises(ValueError, match=f"type trust={module} if"):
        load("run")
    assert metarun("report", "run").code == 0
    assert refusal in (tmp_path / "run/report.html").read_text()
    for words in ([f"trust={module}"], conf, [*conf, "algo=mine"]):
        assert metarun("test=run", *words).code == 0
    assert metarun("resume=run", "train.steps=5", *conf, "algo=mine").code == 0
    assert metarun("test=run", *conf, "algo=maml").code == 2
    assert metarun("report", "run", *conf).code == 0
    assert refusal not in (tmp_path / "run/report.html").read_text()
    load("run", trust=module)
    monkeypatch.setenv("METARUN_TRUST", module)
    load("run")
    assert metarun("test=run").code == 0


def test_a_measure_of_ones_own_is_typed_again_or_trusted(metarun: Command, run: Path) -> None:
    edit(run, "eval.measures", ["tests.evaluation.own_measure.bias"])
    answer = metarun(f"test={run}")
    assert (answer.code, "type trust=tests if you trust it" in answer.err) == (2, True)
