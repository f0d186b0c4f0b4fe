"""A run is used without the data it was trained on: load, predict, report, resume elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import metarun as package
from metarun.cli.main import main
from metarun.config import build
from metarun.core.types import EpisodeSize
from metarun.data.omniglot import OmniglotSmall
from metarun.data.recorded import Recorded, record_of, suffices
from metarun.data.streams import LinearStream, OmniglotSmallStream
from metarun.data.synthetic import Sinusoid
from metarun.data.transformed_streams import TransformedStream
from tests.conftest import Command
from tests.data.sources import CPU, make_source, numbered, sizes, write_class_folders

WORDS = [
    "algo=protonet", "data=folder", "data.root=photos", "way=2", "query=2",
    "train.way=2", "train.query=2", "train.steps=3", "train.tasks_per_step=1",
    "train.checkpoint_every=1", "train.eval_every=3", "eval.episodes=4", "eval.val_episodes=4",
    "backbone.filters=4", "backbone.blocks=2", "device=cpu", "hydra.run.dir=run",
]  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on photos, and the photos."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trained")
        patch.chdir(folder)
        write_class_folders(folder / "photos", dict.fromkeys("abcdefgh", 4))
        assert main(WORDS) == 0
    return folder


@pytest.fixture
def there(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run and the photos in the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


@pytest.fixture(autouse=True)
def read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read photos anew each time, as each process does."""
    monkeypatch.setattr(build, "_cached_source", build._cached_source.__wrapped__)


def answers(folder: Path) -> np.ndarray:
    """Return what the run predicts for photos of two classes."""
    photos = sorted(folder.glob("[ab]/*.png"))
    learner = package.load("run", device="cpu")
    labels = [path.parent.name for path in photos]
    return learner.fit(photos, labels).predict_proba(photos)


def test_a_run_answers_bit_for_bit_alike_without_its_photos(there: Path) -> None:
    record = (there / "run/data.json").read_bytes()
    (there / "run/data.json").unlink()
    by_data = answers(Path("photos"))
    (there / "run/data.json").write_bytes(record)
    np.testing.assert_array_equal(answers(Path("photos")), by_data)
    (there / "photos").rename(there / "elsewhere")
    np.testing.assert_array_equal(answers(Path("elsewhere")), by_data)
    (there / "run/data.json").unlink()
    with pytest.raises(ValueError, match=r"data\.root=photos: there is no such folder"):
        answers(Path("elsewhere"))


def test_a_run_on_photos_begins_with_what_there_is(metarun: Command, there: Path) -> None:
    answer = metarun(*WORDS, f"hydra.run.dir={there / 'again'}")
    assert answer.code == 0
    assert answer.err.count("note: photos: 32 images of 8 classes (4/2/2 train/val/test)") == 1
    assert "no recipe" not in answer.err


def test_predict_and_report_need_no_photos(metarun: Command, there: Path) -> None:
    (there / "photos").rename(there / "new")
    asked = ["--support", "new", "--query", "new/a", "--device", "cpu"]
    answer = metarun("predict", "run", *asked)
    assert answer.code == 0, answer.err
    assert metarun("report", "run").code == 0
    page = (there / "run/report.html").read_text()
    assert "No single tasks are shown: data.root=photos: there is no such folder" in page
    assert "Traceback" not in page


def test_a_report_draws_no_tasks_of_other_photos(metarun: Command, there: Path) -> None:
    assert metarun("report", "run").code == 0
    assert "No single tasks" not in (there / "run/report.html").read_text()
    write_class_folders(there / "photos", dict.fromkeys("zabcdefgh", 3))
    assert metarun("report", "run").code == 0
    shown = (there / "run/report.html").read_text()
    assert "No single tasks are shown: the data are no longer those of the run" in shown


def test_a_run_is_resumed_where_its_photos_have_moved(metarun: Command, there: Path) -> None:
    (there / "photos").rename(there / "moved")
    write_class_folders(there / "other", dict.fromkeys("abcdefgh", 5))
    answer = metarun("resume=run", "train.steps=4", "data.root=other")
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert "data.root=other: its fingerprint is" in answer.err
    assert "type where the same data are now" in answer.err
    answer = metarun("resume=run", "train.steps=4", "data.root=moved")
    assert (answer.code, answer.err) == (0, "")
    assert "root: moved" in (there / "run/config.yaml").read_text()
    assert json.loads((there / "run/results.json").read_text())["steps"] == 4


def test_the_record_says_what_the_data_were(there: Path) -> None:
    record = json.loads((there / "run/data.json").read_text())
    environment = json.loads((there / "run/environment.json").read_text())
    assert record["fingerprint"] == environment["data_fingerprint"]
    assert (record["kind"], record["loss"], record["metric"]) == (
        "classification", "cross_entropy", "accuracy",
    )  # fmt: skip
    assert record["input_shape"] == [3, 28, 28]
    assert "image_size: 28" in (there / "run/config.yaml").read_text()
    assert record["sizes"]["train"] == {"way": 2, "shot": 1, "query": 2}
    assert sorted(n for names in record["classes"].values() for n in names) == list("abcdefgh")
    assert record["preparation"]["kind"] == "photograph"
    assert len(record["preparation"]["mean"]) == 3


STREAM = {"train": EpisodeSize(2, 2, 1), "val": EpisodeSize(2, 2, 1), "test": EpisodeSize(2, 2, 1)}


@pytest.mark.parametrize(
    "source",
    [
        make_source(Sinusoid, sizes=sizes(1, 5, 5)),
        make_source(OmniglotSmall, rotations="classes"),
        make_source(LinearStream, sizes=sizes(1, 3, 4), tasks=3),
        make_source(OmniglotSmallStream, sizes=STREAM),
    ],
    ids=lambda source: type(source).__name__,
)
def test_a_data_set_comes_back_from_its_record(source: Any) -> None:
    record = json.loads(json.dumps(record_of(source)))
    assert suffices(record)
    found = Recorded(record, CPU, torch.float32)
    assert (found.spec, found.sizes) == (source.spec, source.sizes)
    assert found.fingerprint() == source.fingerprint()
    assert hasattr(found, "prepare") == hasattr(source, "prepare")
    if hasattr(source, "prepare"):
        drawn = np.random.default_rng(0).integers(0, 256, (3, 40, 30), dtype=np.uint8)
        assert torch.equal(found.prepare(drawn), source.prepare(drawn))
    with pytest.raises(ValueError, match="tasks 0 to 1 of test need the data"):
        found.batch("test", 0, 2)


def test_a_gray_image_is_repeated_for_each_channel_of_a_rainbow() -> None:
    pytest.importorskip("sklearn")
    from metarun.data.transformed_streams import RainbowStream

    source: TransformedStream = make_source(RainbowStream, sizes=sizes(2, 2, 2), tasks=2, rows=2)
    found = Recorded(record_of(source), CPU, torch.float32)
    drawn = np.random.default_rng(0).integers(0, 256, (2, 9, 9), dtype=np.uint8)
    assert found.prepare(drawn).shape[1] == source.channels == 3
    assert torch.equal(found.prepare(drawn), source.prepare(drawn))


def test_a_preparation_of_the_users_own_needs_the_data() -> None:
    assert not suffices(record_of(numbered()))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"input_shape": [3, -1, 20]}, "inputs of shape"),
        ({"kind": "else"}, "kind 'else'"),
        ({"sizes": {}}, "it has no 'train'"),
        ({"preparation": {"kind": "os.system", "mean": None, "std": None}}, "'os.system' is none"),
        ({"preparation": {"kind": "photograph", "size": 10**6, "crop": True, "mean": None,
                          "std": None}}, "size=1000000: expected 1 to 4096"),
        ({"preparation": {"kind": "drawing", "run": "x", "mean": None, "std": None}}, "'run'"),
        ({"streams": [1]}, "list"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_named(change: dict[str, Any], why: str, there: Path) -> None:
    path = there / "run/data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"data\.json is damaged, .*: remove it") as error:
        package.load("run", device="cpu")
    assert why in str(error.value)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"data\.json is damaged, it is no record: remove it"):
        package.load("run", device="cpu")
