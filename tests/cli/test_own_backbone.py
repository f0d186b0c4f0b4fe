"""A stranger's network: a module and a YAML in a folder of their own, run by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import Command

WORDS = [
    "--config-dir", "conf", "backbone=mine", "data=omniglot_small", "way=3", "query=2",
    "train.steps=2", "train.tasks_per_step=2", "eval.episodes=4", "eval.val_episodes=4",
    "eval.tasks_per_batch=4", "eval.curve_steps=1", "device=cpu", "threads=1",
]  # fmt: skip

NET = """\
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int = 8, freeze: bool = False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 4), nn.BatchNorm2d(width))
        self.stem.requires_grad_(not freeze)
        self.layers = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.2), {layer})

    def forward(self, x):
        return self.layers(self.stem(x))

def needs(depth):
    return Net()
"""


def own(folder: Path, module: str, layer: str = "nn.MaxPool2d(3)", **node: Any) -> None:
    """Write a user's network into a folder."""
    (folder / "conf/backbone").mkdir(parents=True)
    (folder / f"{module}.py").write_text(NET.format(layer=layer))
    node = {"_target_": f"{module}.Net", "width": 4, **node}
    lines = [f"{key}: {json.dumps(value)}" for key, value in node.items()]
    (folder / "conf/backbone/mine.yaml").write_text("\n".join(["# Mine", *lines, ""]))


def results(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "outputs").rglob("results.json"))
    return [json.loads(path.read_text()) for path in paths]


def state(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "outputs").rglob("last.pt")
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state"]
    return found


@pytest.mark.slow
def test_a_stranger_writes_a_module_and_a_yaml_and_runs_them(tmp_path: Path) -> None:
    own(tmp_path, "my_net", freeze=True)
    command = [sys.executable, "-m", "metarun", *WORDS, "algo=maml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "engine=loop" not in done.stderr
    left_out = "backbone.downsample=stride is for backbone=conv4 and was left out"
    assert (done.stdout + done.stderr).count(left_out) == 1
    (found,) = results(tmp_path)
    frozen = 4 * 9 + 4 + 2 * 4
    assert found["parameters"] - found["trainable_parameters"] == frozen
    assert found["bn_statistics"] == "transductive"
    (log,) = (tmp_path / "outputs").rglob("metarun.log")
    assert log.read_text().count(f"{found['parameters']} parameters, {frozen} of them frozen") == 1


def test_a_resumed_run_keeps_what_is_frozen(metarun: Command, tmp_path: Path) -> None:
    own(tmp_path, "my_frozen_net", freeze=True)
    assert metarun(*WORDS, "algo=maml", "optim.weight_decay=0.1").code == 0
    before = state(tmp_path)
    (run,) = (path.parent for path in (tmp_path / "outputs").rglob("results.json"))
    answer = metarun(f"resume={run}", "train.steps=4")
    assert (answer.code, "type trust=my_frozen_net if you trust it" in answer.err) == (2, True)
    typed = ["--config-dir", "conf", "backbone=mine"]
    assert metarun(f"resume={run}", "train.steps=4", *typed).code == 0
    after = state(tmp_path)
    same = {n for n, v in before.items() if isinstance(v, torch.Tensor) and v.equal(after[n])}
    stem = {f"net.body.stem.{n}" for n in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert stem <= same
    assert "net.head.weight" not in same
    assert "net.body.stem.1.running_mean" not in same


def test_a_network_that_vmap_gets_wrong_takes_the_loop_and_says_so_once(
    metarun: Command, tmp_path: Path
) -> None:
    own(tmp_path, "my_layer_norm", layer="nn.LayerNorm([4, 7, 7])")
    answer = metarun(*WORDS, "algo=maml", "engine=vmap")
    assert answer.code == 0, answer.err
    line = "backbone=mine takes engine=loop: its results under torch.vmap differ by"
    assert (answer.out + answer.err).count(line) == 1
    (found,) = results(tmp_path)
    assert (found["engine"], found["graph"]) == ("loop", "none")


@pytest.mark.parametrize(
    ("number", "node", "words", "message"),
    [
        (
            0,
            {"_target_": "needs"},
            [],
            "missing 1 required positional argument: 'depth': expected a torch.nn.Module with",
        ),
        (1, {"widht": 4}, [], "there is no key backbone.widht: did you mean backbone.width?"),
        (2, {}, ["data=sinusoid", "way=1"], "in a pass of inputs of shape [1]"),
        (3, {"width": "wide"}, [], "backbone.width=wide: expected a whole number"),
    ],
)
def test_a_network_that_does_not_fit_is_one_line(
    number: int,
    node: dict[str, Any],
    words: list[str],
    message: str,
    metarun: Command,
    tmp_path: Path,
) -> None:
    module = f"my_misfit_{number}"
    if "_target_" in node:
        node = {"_target_": f"{module}.{node['_target_']}"}
    own(tmp_path, module, **node)
    if "_target_" in node:
        (tmp_path / "conf/backbone/mine.yaml").write_text(f"# Mine\n_target_: {node['_target_']}\n")
    answer = metarun(*WORDS, "algo=maml", *words)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert message in answer.err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("algo", ["protonet", "maml"])
def test_torchvisions_resnet18_is_a_backbone_by_its_yaml_alone(
    algo: str, metarun: Command, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(0)
    for split in ("train", "val", "test"):
        for number in range(3):
            folder = tmp_path / "images" / split / f"{split}{number}"
            folder.mkdir(parents=True)
            for name in range(4):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=draw, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")
    (tmp_path / "conf/backbone").mkdir(parents=True)
    (tmp_path / "conf/backbone/mine.yaml").write_text(
        "# ResNet-18\n_target_: torchvision.models.resnet18\nweights: null\nnum_classes: 16\n"
    )
    words = [w for w in WORDS if "omniglot" not in w]
    folder_words = ["data=folder", "data.root=images", "data.image_size=32", "train.query=2"]
    answer = metarun(*words, f"algo={algo}", *folder_words)
    assert answer.code == 0, answer.err
    (found,) = results(tmp_path)
    body = 11_176_512 + 512 * 16 + 16
    assert found["parameters"] == body + (16 * 3 + 3 if algo == "maml" else 0)
