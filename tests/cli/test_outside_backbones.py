"""`backbone=module` and `backbone=torchvision` from the command line, and what a run records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml

import metarun as package
from metarun.config.build import build_experiment
from metarun.config.composition import composer
from tests.cli.test_own_backbone import WORDS, own, results, state
from tests.conftest import Command

SMALL = [word for word in WORDS if word not in ("--config-dir", "conf", "backbone=mine")]


def runs() -> list[Path]:
    return [path.parent for path in sorted(Path("outputs").rglob("status.json"))]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of weights of torchvision's SqueezeNet, which is small."""
    net = torchvision.models.squeezenet1_1(weights=None)
    torch.save(net.state_dict(), tmp_path / "squeeze.pth")
    return tmp_path / "squeeze.pth"


def test_a_part_is_left_out_by_the_yaml(metarun: Command, tmp_path: Path) -> None:
    own(tmp_path, "my_parts", _without_="layers")
    assert metarun(*WORDS, "algo=protonet").code == 0
    # 9 weights of each of 4 filters, their biases, and batch norm.
    assert [found["parameters"] for found in results(tmp_path)] == [4 * 9 + 4 + 2 * 4]
    (tmp_path / "conf/backbone/mine.yaml").write_text(
        "# Mine\n_target_: my_parts.Net\n_without_: fc\n"
    )
    answer = metarun(*WORDS, "algo=protonet")
    assert (answer.code, "backbone._without_=fc: the module has no such part" in answer.err) == (
        2,
        1,
    )


def test_a_module_is_a_backbone_by_its_name_and_needs_trust_once_it_is_stored(
    metarun: Command, tmp_path: Path
) -> None:
    own(tmp_path, "my_typed_net")
    words = [*SMALL, "backbone=module", "backbone.target=my_typed_net.Net", "algo=maml"]
    answer = metarun(*words, "backbone.options={width: 5}", "backbone.freeze=1")
    assert answer.code == 0, answer.err
    (found,) = results(tmp_path)
    assert found["parameters"] - found["trainable_parameters"] == 5 * 9 + 5 + 2 * 5
    (run,) = runs()
    answer = metarun(f"test={run}")
    assert (answer.code, "type trust=my_typed_net if you trust it" in answer.err) == (2, True)
    assert metarun(f"test={run}", "trust=my_typed_net").code == 0
    assert package.load(run, trust="my_typed_net").input_shape == (1, 28, 28)


def test_a_run_records_its_preprocessing_and_needs_the_file_of_weights_no_more(
    metarun: Command, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    place = tmp_path / "hub/checkpoints"
    place.mkdir(parents=True)
    entry = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    weights.rename(place / Path(entry.url).name)
    words = ["backbone=torchvision", "backbone.name=squeezenet1_1", "backbone.weights=DEFAULT"]
    answer = metarun(
        *SMALL, *words, "backbone.input_size=40", "algo=simpleshot", "backbone.freeze=8"
    )
    assert answer.code == 2
    assert "backbone.freeze=8: expected all, body, or 1 to 1: the parts are features" in answer.err
    answer = metarun(*SMALL, *words, "backbone.input_size=40", "algo=protonet", "bn=running")
    assert answer.code == 0, answer.err
    (run,) = runs()
    node = yaml.safe_load((run / "config.yaml").read_text())["backbone"]
    assert (node["input_size"], node["crop"], node["std"]) == (40, 0.875, [0.229, 0.224, 0.225])
    before = state(tmp_path)
    (place / Path(entry.url).name).unlink()
    monkeypatch.setattr("torch.hub.download_url_to_file", pytest.fail)
    answer = metarun(f"resume={run}", "train.steps=3")
    assert answer.code == 0, answer.err
    assert "backbone" not in answer.err
    assert metarun(f"test={run}", "shot=2").code == 0
    assert package.load(run).input_shape == (1, 28, 28)
    assert before.keys() == state(tmp_path).keys()


@pytest.mark.parametrize(
    ("algo", "steps"), [("maml", 2), ("r2d2", 2), ("simpleshot", 0), ("protonet", 0)]
)
def test_a_frozen_encoder_is_evaluated_and_trains_only_what_else_there_is(
    algo: str, steps: int, metarun: Command, tmp_path: Path
) -> None:
    own(tmp_path, "my_frozen_encoder")
    words = [*SMALL, "backbone=module", "backbone.target=my_frozen_encoder.Net", f"algo={algo}"]
    answer = metarun(*words, "backbone.freeze=body")
    assert answer.code == 0, answer.err
    (found,) = results(tmp_path)
    assert found["steps"] == steps
    body = {name: v for name, v in state(tmp_path).items() if name.startswith("net.body.")}
    made = build_experiment(yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text()))
    first = made.algorithm.state_dict()
    assert all(value.equal(first[name]) for name, value in body.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["backbone=module"], "backbone.target=null: expected the class or function that makes"),
        (["backbone=module", "backbone.target=os.getcwd"], "backbone.target=os.getcwd"),
        (["backbone=module", "backbone.target=nowhere.Net"], "there is no module nowhere"),
        (["backbone=module", "backbone.target=torch.nn.Liner"], "did you mean Linear?"),
        (["backbone=module", "backbone.target=torch.Tensor"], "is not a torch.nn.Module"),
        (["backbone=torchvision", "backbone.name=resnet_18"], "did you mean resnet18?"),
        (["backbone=torchvision", "backbone.freeze=some"], "backbone.freeze=some: expected all or"),
        (
            ["backbone=torchvision", "backbone.weights=no.pth"],
            "backbone.weights=no.pth: there is no",
        ),
        (
            ["backbone=torchvision", "backbone.name=squeezenet1_0", "backbone.weights=squeeze.pth"],
            "backbone.weights=squeeze.pth does not fit the network: features.0.weight is (64, 3, 3",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_made(
    words: list[str], message: str, metarun: Command, weights: Path
) -> None:
    assert weights.exists()
    answer = metarun(*SMALL, "algo=protonet", *words)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert message in answer.err
    assert not Path("outputs").exists()


def test_weights_are_resolved_from_the_words_alone(weights: Path) -> None:
    with composer() as compose:
        config: Any = compose.job(
            [*SMALL, "algo=protonet", "backbone=torchvision", "backbone.name=squeezenet1_1",
             f"backbone.weights={weights}"]
        ).config  # fmt: skip
    made = build_experiment(config)
    first = torch.load(weights, weights_only=True)["features.0.weight"]
    assert made.algorithm.net.body.features[0].weight.equal(first)
