"""`init=`: a run starts from the encoder of another run, or from a file of weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from metarun.config.build import build_experiment
from metarun.config.initialization import with_path_of_init
from metarun.config.naming import digest
from metarun.core.weights import hash_of_file
from tests.conftest import Command
from tests.helpers import composed

SMALL = [
    "data=omniglot_small", "way=3", "query=2", "backbone.filters=4", "train.steps=2",
    "train.tasks_per_step=2", "eval.episodes=4", "eval.val_episodes=4", "eval.curve_steps=1",
    "device=cpu", "threads=1",
]  # fmt: skip


def runs() -> list[Path]:
    """The folders of all runs, the oldest first."""
    found = Path("outputs").rglob("status.json")
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime)]


def encoder(init: Path | str, *words: str) -> dict[str, torch.Tensor]:
    made = build_experiment(composed(*SMALL, f"init={init}", *words))
    return dict(made.algorithm.net.body.state_dict())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The encoder of conv4 with every number 0.5, as a file."""
    made = build_experiment(composed("algo=maml", *SMALL))
    state = {
        f"module.{n}": torch.full_like(v, 0.5)
        for n, v in made.algorithm.net.body.state_dict().items()
    }
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({**state, "fc.weight": torch.zeros(2, 3)}, path)
    return path


@pytest.mark.parametrize(
    "algo", ["protonet", "maml", "relation", "metalstm", "mixture", "baseline", "metagan_maml"]
)
def test_the_encoder_of_any_learner_starts_from_a_file(algo: str, file: Path) -> None:
    made = build_experiment(composed(f"algo={algo}", *SMALL, f"init={file}"))
    bodies = [v for n, v in made.algorithm.state_dict().items() if ".convs." in n and "net" in n]
    assert bodies
    assert any((v == 0.5).all() for v in bodies)
    plain = build_experiment(composed(f"algo={algo}", *SMALL)).algorithm.state_dict()
    heads = [n for n in plain if n.endswith("head.weight")]
    assert all(plain[n].equal(made.algorithm.state_dict()[n]) for n in heads)


def test_two_commands_are_meta_baseline(metarun: Command) -> None:
    """Chen et al. 2021: a classifier of all training classes, then meta-learning from its body."""
    assert metarun("algo=baseline", *SMALL).code == 0
    (pretrained,) = runs()
    before = torch.load(pretrained / "checkpoints/best.pt", weights_only=True)["state"]
    answer = metarun("algo=protonet", *SMALL, "init=last")
    assert answer.code == 0, answer.err
    *_, run = runs()
    record = json.loads((run / "results.json").read_text())["init"]
    assert record["path"] == str(pretrained / "checkpoints/best.pt")
    assert record["sha256"] == hash_of_file(pretrained / "checkpoints/best.pt")
    assert record == json.loads((run / "environment.json").read_text())["init"]
    assert record["left_out"] == ["classifier.bias", "classifier.weight"]
    assert f"init={pretrained}" in (run / "overrides.yaml").read_text()
    assert "its encoder starts from" in (run / "metarun.log").read_text()
    made = build_experiment(composed("algo=protonet", *SMALL, f"init={pretrained}"))
    for name, value in made.algorithm.net.body.state_dict().items():
        assert value.equal(before[f"net.body.{name}"])
    # The run needs the other one no more.
    shutil.rmtree(pretrained)
    answer = metarun(f"resume={run}", "train.steps=3")
    assert answer.code == 0, answer.err
    assert json.loads((run / "results.json").read_text())["init"] == record
    assert metarun(f"test={run}", "shot=2").code == 0
    for verb in ("resume", "test"):
        answer = metarun(f"{verb}={run}", "init=null")
        assert (answer.code, "init cannot change in a" in answer.err) == (2, True)


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_its_weights(
    metarun: Command, file: Path
) -> None:
    assert metarun("algo=protonet", *SMALL, f"init={file}").code == 0
    (run,) = runs()
    last = torch.load(run / "checkpoints/last.pt", weights_only=True)["state"]
    for name in ("checkpoints", "results.json", "metrics.jsonl", "environment.json"):
        shutil.rmtree(run / name) if name == "checkpoints" else (run / name).unlink()
    (run / "checkpoints").mkdir()
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "running", "step": 0}))
    assert metarun(f"resume={run}").code == 0
    again = torch.load(run / "checkpoints/last.pt", weights_only=True)["state"]
    assert all(again[n].equal(v) for n, v in last.items() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init={file}", "backbone.filters=5"], "(4, 1, 3, 3) there and (5, 1, 3, 3) here"),
        (["init={file}", "backbone=resnet12"], "none of its names (fc.weight, module.convs.0"),
        (["init={file}", "backbone=resnet12", "init_strict=false"], "none of its names"),
        (["init={file}", "backbone.blocks=3"], "type init_strict=false to take what fits"),
        (["init=none.pth"], "init=none.pth: there is no such file"),
        (["init=none"], "init=none: expected a run or a file of weights: none: there is no such"),
        (["init=3"], "init=3: expected a run or a file of weights"),
    ],
)
def test_weights_that_do_not_fit_are_one_line_and_nothing_is_made(
    words: list[str], message: str, metarun: Command, file: Path
) -> None:
    wide = "backbone.filters=4" if "backbone=resnet12" in words else ""
    small = [word for word in SMALL if word != wide]
    answer = metarun("algo=protonet", *small, *(word.format(file=file) for word in words))
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert message in answer.err
    assert not Path("outputs").exists()


def test_lenient_takes_what_fits_and_lists_the_rest(file: Path) -> None:
    words = [f"init={file}", "init_strict=false", "backbone.blocks=3"]
    made = build_experiment(composed("algo=protonet", *SMALL, *words))
    record: dict[str, Any] = made.run_info["init"]
    assert "module.convs.3.weight" in record["left_out"]
    assert record["not_found"] == []
    assert (made.algorithm.net.body.convs[2].weight == 0.5).all()


def test_names_of_runs_become_paths_and_are_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain-a1b2", "algo=maml,seed=1-c3d4"):
        (Path("outputs") / name).mkdir(parents=True)
        for file in ("status.json", "config.yaml"):
            (Path("outputs") / name / file).write_text("{}")
    assert with_path_of_init(["seed=1", "init=a1b2"]) == ["seed=1", "init=outputs/plain-a1b2"]
    quoted = '"outputs/algo=maml,seed=1-c3d4"'
    assert with_path_of_init(["init=outputs/algo=maml,seed=1-c3d4"]) == [f"init={quoted}"]
    both = with_path_of_init(["init=a1b2,c3d4,null,w.pth"])
    assert both == [f"init=outputs/plain-a1b2,{quoted},null,w.pth"]
    for word in ("init=null", "init='a b'", "init="):
        assert with_path_of_init([word]) == [word]


def test_a_run_without_it_keeps_the_name_that_it_had_before() -> None:
    config = composed("algo=maml", *SMALL)
    older = {key: value for key, value in config.items() if not key.startswith("init")}
    assert digest(config) == digest(older)
    assert digest({**config, "init": "x"}) != digest(config)
