"""`metarun features`: the file, the same accuracy as the run itself, and bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import metarun as package
from tests.conftest import Command
from tests.data.sources import write_class_folders

RUN = [
    "algo=protonet", "data=omniglot_small", "backbone.filters=8", "backbone.blocks=2", "query=4",
    "data.image_size=16", "train.steps=3", "train.eval_every=3", "eval.val_episodes=4",
    "eval.episodes=30", "device=cpu",
]  # fmt: skip
ON_FEATURES = ["algo=protonet", "data=features", "query=4", "eval.val_episodes=4",
               "eval.episodes=30", "device=cpu"]  # fmt: skip


def accuracies(run: str) -> list[float]:
    with np.load(Path(run) / "episodes.npz") as arrays:
        return arrays["accuracy"].tolist()


def test_a_metric_learner_on_features_answers_as_the_run_itself(metarun: Command) -> None:
    # In validation each rotation is a class, in test none is.
    assert metarun(*RUN, "hydra.run.dir=run").code == 0
    answer = metarun("features", "run", "--output", "f.npz")
    assert answer.code == 0, answer.err
    assert "`metarun algo=protonet data=features data.file=f.npz`" in answer.out
    assert metarun(*ON_FEATURES, "data.file=f.npz", "hydra.run.dir=again").code == 0
    assert accuracies("again") == accuracies("run")
    # Validation: rotations are classes there, with names of their own.
    with np.load("f.npz") as arrays:
        assert arrays["features"].dtype == np.float32
        assert len(set(arrays["classes"])) == len(arrays["classes"])
        val = arrays["label"][arrays["split"] == "val"]
        assert len(np.unique(val)) == len(np.unique(arrays["classes"][val]))


def test_a_run_on_features_needs_no_file_any_more(metarun: Command) -> None:
    label = np.repeat(np.arange(6), 4)
    features = np.random.default_rng(0).normal(size=(24, 3)) + label[:, None]
    np.savez("f.npz", features=features, label=label)
    words = [*ON_FEATURES, "backbone=mlp", "train.steps=2", "way=2", "query=2", "data.file=f.npz"]
    answer = metarun(*words, "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    learner = package.load("run", device="cpu")
    before = learner.fit(features[:8], label[:8]).predict_proba(features[8:])
    Path("f.npz").unlink()
    again = package.load("run", device="cpu").fit(features[:8], label[:8])
    np.testing.assert_array_equal(again.predict_proba(features[8:]), before)


def test_features_of_photos_say_which_file_they_are_of(metarun: Command) -> None:
    write_class_folders(Path("photos"), dict.fromkeys("abcdefgh", 3))
    words = ["backbone=conv4", "backbone.filters=4", "data=folder", "data.root=photos", "seed=3"]
    answer = metarun("features", *words, "--output", "f.npz")
    assert answer.code == 0, answer.err
    with np.load("f.npz") as arrays:
        names = arrays["classes"][arrays["label"]]
        assert {Path("photos") / file for file in arrays["files"]} == set(Path().glob("photos/*/*"))
        assert [file.partition("/")[0] for file in arrays["files"]] == names.tolist()
        assert arrays["weights"].shape == ()
    again = metarun("features", *words, "--output", "g.npz")
    other = metarun("features", *words[:-1], "seed=4", "--output", "h.npz")
    assert (
        again.out.partition(":")[2].splitlines()[0] == answer.out.partition(":")[2].splitlines()[0]
    )
    assert other.out.split("weights ")[1][:16] != answer.out.split("weights ")[1][:16]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "expected a run, or settings such as"),
        (["data=omniglot_small", "--output", "f.csv"], "--output f.csv: expected a file .npz"),
        (["data=omniglot_small", "--output", "no/f.npz"], "there is no folder no"),
        (["data=omniglot_small", "--output", "there.npz"], "there.npz already exists"),
        (["nowhere", "--output", "f.npz"], "nowhere"),
        (["a", "b", "--output", "f.npz"], "b: features are of one run, a"),
        (["data=tables"], "data=tables has no rows of classes"),
        (["data=omniglot_smal"], "did you mean omniglot_small?"),
        (["data=omniglot_small", "bn=support"], "type bn=running"),
    ],
)
def test_bad_input_is_answered_in_one_line(words: list[str], says: str, metarun: Command) -> None:
    Path("there.npz").touch()
    if "--output" not in words:
        words = [*words, "--output", "f.npz"]
    answer = metarun("features", *words)
    assert answer.code == 2
    assert answer.out == ""
    (line,) = answer.err.splitlines()
    assert says in line
    assert sorted(path.name for path in Path().iterdir()) == ["there.npz"]
