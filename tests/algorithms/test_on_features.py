"""Every learner of classes that needs no pixels learns from features in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from metarun.config.build import build_experiment
from metarun.config.catalogue import conf_dir
from metarun.config.trust import locate
from metarun.core.types import Progress
from tests.helpers import composed

IMAGES = {"frn", "relation", "metagan_maml", "metagan_relation"}
"""Learners of feature maps, or of images."""
ALONE = {"protonet", "protomaml", "matching", "nearest"}
"""Learners without parameters of their own, which features as they are leave nothing to learn."""


def learners() -> list[str]:
    found: list[str] = []
    for path in sorted((conf_dir() / "algo").glob("*.yaml")):
        target = composed(f"algo={path.stem}", "data=linear", "~recipe")["algo"]["_target_"]
        can = locate("algo._target_", target).capabilities  # type: ignore[attr-defined]
        if "classification" in can.kinds and not can.learns_online:
            found.append(path.stem)
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "f.npz"
    draw, label = np.random.default_rng(0), np.repeat(np.arange(20), 10)
    centers = 3.0 * draw.normal(size=(20, 6))
    np.savez(path, features=draw.normal(size=(200, 6)) + centers[label], label=label)
    return path


@pytest.mark.parametrize("backbone", ["mlp", "identity"])
@pytest.mark.parametrize("algo", learners())
def test_a_learner_trains_and_predicts_on_features(algo: str, backbone: str, file: Path) -> None:
    words = [f"algo={algo}", "data=features", f"data.file={file}", f"backbone={backbone}", "way=3",
             "shot=4", "query=3", "train.tasks_per_step=2", "device=cpu", "~recipe"]  # fmt: skip
    refused = algo in IMAGES or (backbone == "identity" and algo in ("boil", "cavia"))
    if refused:
        with pytest.raises(ValueError, match=r"maps|images|backbone|body"):
            build_experiment(composed(*words))
        return
    made = build_experiment(composed(*words))
    assert bool(made.train.steps) == (algo != "nearest" and not (
        backbone == "identity" and algo in ALONE
    ))  # fmt: skip
    if made.train.steps:
        made.algorithm.update(made.source.batch("train", 0, 2), Progress(0, 10))
    test = made.source.batch("test", 0, 3)
    outputs = made.algorithm.eval().predict(test.support_x, test.support_y, test.query_x).outputs
    assert outputs.shape == (3, 9, 3)
    assert outputs.isfinite().all()
