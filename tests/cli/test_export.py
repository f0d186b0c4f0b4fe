"""`metarun export`: files that answer as metarun does, in a process that cannot import it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image

import metarun as package
from metarun.inference import export
from tests.conftest import Command

SMALL = [
    "data=omniglot_small", "way=3", "query=2", "backbone.filters=4", "train.steps=2",
    "train.tasks_per_step=2", "eval.episodes=4", "eval.val_episodes=4", "eval.curve_steps=1",
    "device=cpu", "threads=1",
]  # fmt: skip

BARE = """\
import json, sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {refused}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np
inputs = np.load("inputs.npy")
{code}
np.save("answers.npy", np.asarray(answers))
"""
CODES = {
    "torch": """import torch
program = torch.export.load("{file}").module()
answers = program(torch.from_numpy(inputs)).detach()""",
    "onnx": """import onnxruntime
session = onnxruntime.InferenceSession("{file}")
answers = session.run(None, {{"inputs": inputs}})[0]""",
}
REFUSED = {"torch": ("metarun", "torchvision", "hydra"), "onnx": ("metarun", "torch", "onnx")}


def answers(file: str, kind: str, inputs: Any) -> Any:
    """What a file answers in a process that has torch, or an ONNX runtime, alone."""
    np.save("inputs.npy", inputs)
    code = BARE.format(refused=REFUSED[kind], code=CODES[kind].format(file=file))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load("answers.npy")


@pytest.fixture
def support(tmp_path: Path) -> Path:
    """Drawings of three classes of two examples each."""
    draw = np.random.default_rng(0)
    for name in ("cat", "dog", "hen"):
        for number in range(2):
            folder = tmp_path / "support" / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (draw.random((28, 28)) > 0.5).astype("uint8") * 255
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "support"


@pytest.fixture
def pixels() -> Any:
    return np.random.default_rng(1).random((20, 1, 28, 28), dtype=np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algo", "kind"),
    [("protonet", "torch"), ("protonet", "onnx"), ("maml", "torch"), ("maml", "onnx")],
)
def test_a_classifier_answers_as_predict_where_metarun_cannot_be_imported(
    algo: str, kind: str, metarun: Command, support: Path, pixels: Any
) -> None:
    assert metarun(f"algo={algo}", *SMALL).code == 0
    answer = metarun("export", "last", "--format", kind, "--support", "support")
    assert answer.code == 0, answer.err
    file = "classifier" + export.SUFFIXES[kind]  # type: ignore[index]
    found = answers(file, kind, pixels)
    learner = package.load(next(Path("outputs").rglob("status.json")).parent)
    files = sorted(support.rglob("*.png"))
    learner.fit(files, [path.parent.name for path in files])
    np.testing.assert_allclose(found, learner.predict_proba(torch.from_numpy(pixels)), atol=1e-5)
    assert found.shape == (20, 3)
    card = Path(f"{file}.md").read_text()
    assert "0. `cat`\n1. `dog`\n2. `hen`" in card
    assert "adapted to 6 examples of 3 classes" in card
    # The card's own code prepares an image as the learner does, and loads the file.
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    space: dict[str, Any] = {}
    exec(code[code.index("import numpy") :], space)
    prepared = np.stack([space["prepared"](path) for path in files])
    np.testing.assert_allclose(prepared, learner.rows(files), atol=1e-6)


@pytest.mark.parametrize(
    "kind",
    ["safetensors", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("torch", "onnx"))],
)
def test_an_encoder_answers_as_embed_and_can_be_started_from(
    kind: str, metarun: Command, pixels: Any
) -> None:
    assert metarun("algo=protonet", *SMALL, "bn=running").code == 0
    assert (
        metarun("export", "last", "--format", kind, "--output", f"e{export.SUFFIXES[kind]}").code
        == 0
    )  # type: ignore[index]
    run = next(Path("outputs").rglob("status.json")).parent
    learner = package.load(run)
    if kind != "safetensors":
        found = answers(f"e{export.SUFFIXES[kind]}", kind, pixels)  # type: ignore[index]
        expected = learner.embed(torch.from_numpy(pixels))
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, abs(expected).max()))
        return
    weights = safetensors.torch.load_file("e.safetensors")
    state = torch.load(run / "checkpoints/best.pt", weights_only=True)["state"]
    assert all(value.equal(state[f"net.body.{name}"]) for name, value in weights.items())
    with safetensors.safe_open("e.safetensors", framework="pt") as opened:
        described = json.loads(opened.metadata()["backbone"])
    assert described["filters"] == 4
    assert metarun("algo=maml", *SMALL, "init=e.safetensors").code == 0


def test_answers_that_differ_are_refused_and_nothing_is_left(
    metarun: Command, support: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert support.exists()
    assert metarun("algo=protonet", *SMALL).code == 0
    before = sorted(Path().iterdir())
    run = export._run_torch
    monkeypatch.setattr(export, "_run_torch", lambda data: lambda x: run(data)(x) + 1e-4)
    answer = metarun("export", "last", "--format", "torch", "--support", "support")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "the exported answers differ from metarun's by" in answer.err
    assert sorted(Path().iterdir()) == before


@pytest.mark.slow
def test_a_regression_exports_its_encoder(metarun: Command) -> None:
    words = ["train.steps=2", "eval.episodes=4", "eval.val_episodes=4", "device=cpu"]
    assert metarun("algo=maml", "data=sinusoid", *words).code == 0
    answer = metarun("export", "last", "--format", "torch")
    assert answer.code == 0, answer.err
    assert answers("encoder.pt2", "torch", np.zeros((3, 1), np.float32)).shape == (3, 40)
    answer = metarun("export", "last", "--format", "torch", "--support", "outputs")
    assert answer.code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["last", "--format", "tflite"], "invalid choice: 'tflite'"),
        (["nowhere", "--format", "onnx"], "nowhere: there is no such folder"),
        (
            ["last", "--format", "torch", "--output", "a.onnx"],
            "expected a name that ends with .pt2",
        ),
        (["last", "--format", "torch", "--output", "x/a.pt2"], "there is no folder x"),
        (["last", "--format", "torch", "--output", "there.pt2"], "there.pt2 already exists"),
        (["last", "--format", "safetensors", "--support", "support"], "weights and no function"),
        (["last", "--format", "torch", "--support", "none"], "--support none does not exist"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, metarun: Command, support: Path
) -> None:
    assert support.exists()
    assert metarun("algo=protonet", *SMALL).code == 0
    Path("there.pt2").touch()
    answer = metarun("export", *words)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert message in answer.err


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"--format safetensors needs safetensors: type pip insta"):
        export.check_packages("safetensors")
    with pytest.raises(ValueError, match=r"needs onnx, onnxruntime, onnxscript: type pip install"):
        export.check_packages("onnx")
    export.check_packages("torch")
