"""Tests of `metarun.load` and its learner: fit, predict, predict_proba."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import metarun
from metarun.config.build import build_experiment, build_source
from metarun.config.composition import to_yaml
from metarun.inference.learner import Learner, NotFittedError
from metarun.runs.folder import RunFolder
from metarun.training import trainer
from tests.helpers import composed
from tests.tiny_run import silent

Picture = Image.Image

COMMON = ["device=cpu", "eval.episodes=2", "eval.val_episodes=2", "train.tasks_per_step=1",
          "query=2", "train.query=2"]  # fmt: skip


def trained(path: Path, words: Sequence[str], **run_info: str) -> Path:
    """Train a run of a few steps, as the command line does, and return its folder."""
    experiment = build_experiment(composed(*COMMON, *words))
    run = RunFolder.create(path, to_yaml(experiment.record), words)
    trainer.train(
        experiment.algorithm,
        experiment.source,
        experiment.train,
        experiment.eval,
        run,
        {**experiment.run_info, **run_info},
        silent(),
        experiment.seed,
    )
    return path


@pytest.fixture(scope="module")
def protonet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(
        tmp_path_factory.mktemp("runs") / "protonet",
        ["algo=protonet", "data=omniglot_small", "train.way=5", "train.steps=60"],
    )


@pytest.fixture(scope="module")
def maml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(
        tmp_path_factory.mktemp("runs") / "maml",
        ["algo=maml", "data=omniglot_small", "way=3", "train.steps=2"],
    )


@pytest.fixture(scope="module")
def sinusoid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(
        tmp_path_factory.mktemp("runs") / "sinusoid",
        ["algo=maml", "data=sinusoid", "train.steps=20"],
    )


@pytest.fixture(scope="module")
def pictures() -> list[list[Picture]]:
    """Twenty drawings of each of six Sanskrit characters, which no run has trained on."""
    archive = Path(metarun.__file__).parent / "data" / "files" / "images_background_small2.zip"
    with zipfile.ZipFile(archive) as file:
        names = sorted(n for n in file.namelist() if "Sanskrit" in n and n.endswith(".png"))
        by_character: dict[str, list[Picture]] = {}
        for name in names:
            drawn = by_character.setdefault(name.rpartition("/")[0], [])
            drawn.append(Image.open(BytesIO(file.read(name))))
    return list(by_character.values())[:6]


def test_labels_of_new_drawings_are_mostly_right(
    protonet: Path, pictures: list[list[Picture]]
) -> None:
    words = ["ka", "kha", "ga", "gha", "nga", "cha"]
    learner = metarun.load(protonet, device="cpu")
    support = [drawing for drawings in pictures for drawing in drawings[:5]]
    labels = [word for word in words for _ in range(5)]
    assert learner.fit(support, labels) is learner
    assert list(learner.classes_) == sorted(words)
    query = [drawing for drawings in pictures for drawing in drawings[5:15]]
    right = learner.predict(query) == np.repeat(words, 10)
    assert right.mean() > 0.4, "chance is 0.17"


def test_probabilities_are_those_of_the_classes_in_order(
    protonet: Path, pictures: list[list[Picture]]
) -> None:
    learner = metarun.load(protonet, device="cpu")
    learner.fit([drawings[0] for drawings in pictures], [30, 10, 20, 60, 50, 40])
    query = [drawings[1] for drawings in pictures]
    probabilities = learner.predict_proba(query)
    assert probabilities.shape == (6, 6)
    np.testing.assert_allclose(probabilities.sum(1), 1.0)
    np.testing.assert_array_equal(learner.classes_, [10, 20, 30, 40, 50, 60])
    np.testing.assert_array_equal(learner.predict(query), learner.classes_[probabilities.argmax(1)])


def test_paths_arrays_and_pictures_are_the_same(
    protonet: Path, pictures: list[list[Picture]], tmp_path: Path
) -> None:
    learner = metarun.load(protonet, device="cpu")
    drawings = [drawings[0] for drawings in pictures[:3]]
    learner.fit(drawings, ["a", "b", "c"])
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, drawing in zip(paths, drawings, strict=True):
        drawing.save(path)
    # As arrays of gray levels, ink dark, as PIL gives them.
    arrays = [np.asarray(drawing.convert("L")) for drawing in drawings]
    expected = learner.predict_proba(drawings)
    np.testing.assert_array_equal(learner.predict_proba(paths), expected)
    assert learner.predict_proba(arrays).argmax(1).tolist() == expected.argmax(1).tolist()
    assert list(learner.predict(drawings)) == ["a", "b", "c"]


def test_an_answer_does_not_depend_on_the_other_rows_unless_asked(
    maml: Path, pictures: list[list[Picture]]
) -> None:
    support = [drawings[0] for drawings in pictures[:3]]
    query = [drawing for drawings in pictures[:3] for drawing in drawings[1:6]]

    def shift(learner: Learner) -> float:
        learner.fit(support, ["a", "b", "c"])
        alone, together = learner.predict_proba(query[:1]), learner.predict_proba(query)[:1]
        return float(np.abs(alone - together).max())

    assert shift(metarun.load(maml, device="cpu")) < 1e-5
    assert shift(metarun.load(maml, device="cpu", bn="transductive")) > 1e-4


def test_a_head_of_fixed_width_wants_its_number_of_classes(
    maml: Path, pictures: list[list[Picture]]
) -> None:
    learner = metarun.load(maml, device="cpu")
    says = "fit got 4 classes, but this MAML was trained on 3 ways"
    with pytest.raises(ValueError, match=says):
        learner.fit([drawings[0] for drawings in pictures[:4]], list("abcd"))
    with pytest.raises(ValueError, match="examples of 1 class: expected 2 or more"):
        learner.fit(pictures[0][:2], ["a", "a"])


def test_a_new_fit_forgets_the_one_before(protonet: Path, pictures: list[list[Picture]]) -> None:
    query = [drawings[1] for drawings in pictures[:2]]
    once = metarun.load(protonet, device="cpu")
    once.fit([drawings[0] for drawings in pictures[:2]], ["x", "y"])
    twice = metarun.load(protonet, device="cpu")
    twice.fit([drawings[0] for drawings in pictures], list("abcdef"))
    twice.fit([drawings[0] for drawings in pictures[:2]], ["x", "y"])
    np.testing.assert_array_equal(once.predict_proba(query), twice.predict_proba(query))


def test_a_regression_takes_numbers_and_gives_them(sinusoid: Path) -> None:
    learner = metarun.load(sinusoid, device="cpu")
    x = np.linspace(-5.0, 5.0, 10)
    learner.fit(x, np.sin(x))
    answers = learner.predict(x)
    assert answers.shape == (10,)
    np.testing.assert_array_equal(learner.predict(x[:, None]), answers)
    learner.fit(x[:, None], np.sin(x)[:, None])
    assert learner.predict(x).shape == (10, 1)
    np.testing.assert_array_equal(learner.predict(x)[:, 0], answers)
    with pytest.raises(ValueError, match="a regression has no class probabilities"):
        learner.predict_proba(x)
    assert not hasattr(learner, "classes_")


def test_it_adapts_as_the_meta_test_does(sinusoid: Path) -> None:
    learner = metarun.load(sinusoid, device="cpu")
    algorithm: Any = learner._algorithm
    batch = build_source(RunFolder.open(sinusoid).configuration()).batch("test", 0, 1)
    expected = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs[0]
    learner.fit(batch.support_x[0].numpy(), batch.support_y[0].numpy())
    np.testing.assert_allclose(learner.predict(batch.query_x[0].numpy()), expected, rtol=1e-5)


def test_many_rows_are_answered_as_few_are(sinusoid: Path) -> None:
    learner = metarun.load(sinusoid, device="cpu").fit([0.0, 1.0], [0.0, 1.0])
    x = np.linspace(-5.0, 5.0, 601)
    parts = [learner.predict(x[start : start + 100]) for start in range(0, 601, 100)]
    np.testing.assert_allclose(learner.predict(x), np.concatenate(parts), rtol=1e-5)


def test_predicting_leaves_the_callers_generator_alone(sinusoid: Path) -> None:
    learner = metarun.load(sinusoid, device="cpu").fit([0.0, 1.0], [0.0, 1.0])
    before = torch.get_rng_state()
    learner.predict([0.5])
    assert torch.equal(before, torch.get_rng_state())


def test_predict_before_fit_says_what_to_call(sinusoid: Path) -> None:
    learner = metarun.load(sinusoid, device="cpu")
    assert repr(learner) == "Learner(MAML, regression, not fitted)"
    with pytest.raises(NotFittedError, match=r"call fit\(inputs, targets\) first"):
        learner.predict([0.5])


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ([1.0, 2.0], [1.0], "2 inputs and 1 targets"),
        ([1.0, 2.0], 1.0, "2 inputs and one target"),
        ([], [], "inputs are empty"),
        ([[1.0, 2.0]], [1.0], r"inputs have shape \(1, 2\): expected \(N, 1\)"),
        ([1.0], [[1.0, 2.0]], r"targets have shape \(1, 2\): expected \(N, 1\)"),
        (["one"], [1.0], "inputs are not numbers"),
        ([1.0], ["one"], "targets are not numbers"),
        ([float("nan")], [1.0], "inputs contain values that are not finite"),
    ],
)
def test_bad_examples_are_named_in_one_line(
    inputs: Any, targets: Any, message: str, sinusoid: Path
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        metarun.load(sinusoid, device="cpu").fit(inputs, targets)
    assert "\n" not in str(error.value)


def test_an_unreadable_picture_is_named(
    protonet: Path, pictures: list[list[Picture]], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png"):
        metarun.load(protonet, device="cpu").fit(
            [pictures[0][0], tmp_path / "broken.png"], ["a", "b"]
        )


def spied(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return a list that receives the support targets whenever the algorithm adapts."""
    adapt, seen = learner._algorithm.adapt, []

    def noting(x: torch.Tensor, y: torch.Tensor) -> Any:
        seen.append(y)
        return adapt(x, y)

    monkeypatch.setattr(learner._algorithm, "adapt", noting)
    return seen


def test_it_adapts_once_and_predicts_what_the_algorithm_predicts(
    maml: Path, protonet: Path, pictures: list[list[Picture]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = [drawing for drawings in pictures[:3] for drawing in drawings[:2]]
    labels = [name for name in "abc" for _ in range(2)]
    asked = [drawings[7] for drawings in pictures[:3]]
    for run in (maml, protonet):
        learner = metarun.load(run, device="cpu")
        seen = spied(learner, monkeypatch)
        found = [learner.fit(shown, labels).predict_proba(asked)]
        found += [np.concatenate([learner.predict_proba([one]) for one in asked])]
        assert len(seen) == 1
        support, query = (learner._prepared(images)[None] for images in (shown, asked))
        outputs = learner._algorithm.predict(support, seen[0], query).outputs[0]
        for probabilities in found:
            np.testing.assert_allclose(probabilities, outputs.softmax(1), rtol=1e-4, atol=1e-6)


def test_a_learner_that_minds_the_order_gets_examples_in_random_order(
    tmp_path: Path, pictures: list[list[Picture]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["algo=mann", "data=omniglot_small", "way=3", "shot=4", "train.steps=2"]
    learner = metarun.load(trained(tmp_path / "mann", words), device="cpu")
    shown = [drawing for drawings in pictures[:3] for drawing in drawings[:4]]
    labels = [name for name in "abc" for _ in range(4)]
    seen = spied(learner, monkeypatch)
    learner.fit(shown, labels)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    kept = seen[0][0]
    assert torch.equal(kept, torch.arange(3).repeat_interleave(4)[order])
    assert len(set(kept[:5].tolist())) > 1
    answers = [learner.fit(shown, labels).predict_proba(pictures[0][5:7]) for _ in range(2)]
    assert np.array_equal(*answers)


def test_what_is_no_run_or_has_nothing_yet_cannot_be_loaded(tmp_path: Path, maml: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        metarun.load(tmp_path / "nothing")
    RunFolder.create(tmp_path / "new", RunFolder.open(maml).config_text())
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        metarun.load(tmp_path / "new", device="cpu")
    RunFolder.create(tmp_path / "odd", "{a: [")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        metarun.load(tmp_path / "odd")


@pytest.mark.parametrize("wrong", [{"device": "gpu"}, {"device": "cuda:99"}, {"bn": "none"}])
def test_a_wrong_option_is_not_taken_for_a_damaged_file(
    protonet: Path, wrong: dict[str, str]
) -> None:
    ((key, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"^{key}={value}: "):
        metarun.load(protonet, **wrong)


def test_a_run_loads_in_a_process_of_its_own(sinusoid: Path) -> None:
    program = (
        "import sys, metarun\n"
        "print(metarun.load(sys.argv[1]).fit([0., 1.], [0., 1.]).predict([0.5]).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(sinusoid)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "(1,)\n"), done.stderr


def test_the_score_of_labels_is_their_accuracy(
    protonet: Path, pictures: list[list[Picture]]
) -> None:
    learner = metarun.load(protonet, device="cpu")
    learner.fit([drawings[0] for drawings in pictures[:3]], list("abc"))
    query = [drawing for drawings in pictures[:3] for drawing in drawings[1:5]]
    labels = np.repeat(list("abc"), 4)
    assert learner.score(query, labels) == (learner.predict(query) == labels).mean()
    with pytest.raises(ValueError, match=r"targets have shape \(2,\): expected \(12,\)"):
        learner.score(query, labels[:2])


def test_the_score_of_values_is_that_of_scikit_learn(sinusoid: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    learner = metarun.load(sinusoid, device="cpu").fit([0.0, 1.0, 2.0], [0.0, 0.8, 0.9])
    x = np.linspace(-5.0, 5.0, 21)
    for targets in (np.sin(x), 3.0 * x, np.full(21, 0.4)):
        expected = metrics.r2_score(targets, learner.predict(x))
        assert learner.score(x, targets) == pytest.approx(expected)
    assert learner.score(x, learner.predict(x)) == 1.0
    constant = learner.predict(np.zeros(4))
    assert learner.score(np.zeros(4), constant) == 1.0


def test_features_of_examples_average_to_the_prototypes(
    protonet: Path, pictures: list[list[Picture]]
) -> None:
    learner = metarun.load(protonet, device="cpu")
    shown = [drawing for drawings in pictures[:3] for drawing in drawings[:4]]
    with pytest.raises(NotFittedError, match=r"call fit\(inputs, targets\) first"):
        _ = learner.adapted
    features = learner.embed(shown)  # Running statistics need no examples.
    learner.fit(shown, np.repeat(list("abc"), 4))
    np.testing.assert_allclose(learner.embed(shown), features, rtol=1e-5, atol=1e-6)
    means = features.reshape(3, 4, -1).mean(1)
    prototypes = [tensor for tensor in learner.adapted.values() if tensor.shape == means.shape]
    assert len(prototypes) == 1
    np.testing.assert_allclose(prototypes[0], means, rtol=1e-4, atol=1e-5)


def test_features_with_the_statistics_of_the_examples_need_these(
    protonet: Path, pictures: list[list[Picture]]
) -> None:
    shown = [drawings[0] for drawings in pictures[:3]]
    learner = metarun.load(protonet, bn="support", device="cpu")
    with pytest.raises(NotFittedError):
        learner.embed(shown)
    one = learner.fit(shown, list("abc")).embed(shown)
    other = learner.fit(shown[:2], list("ab")).embed(shown)
    assert one.shape == other.shape
    assert np.abs(one - other).max() > 1e-4


def test_learners_without_features_say_so(
    protonet: Path, maml: Path, pictures: list[list[Picture]]
) -> None:
    shown = [drawings[0] for drawings in pictures[:3]]
    with pytest.raises(ValueError, match="this MAML has no features of single rows: use"):
        metarun.load(maml, device="cpu").embed(shown)
    with pytest.raises(ValueError, match="of single rows with bn=transductive: use a learner"):
        metarun.load(protonet, bn="transductive", device="cpu").embed(shown)


def test_what_was_adapted_are_the_tensors_of_the_task(
    maml: Path, pictures: list[list[Picture]]
) -> None:
    learner = metarun.load(maml, device="cpu")
    learner.fit([drawings[0] for drawings in pictures[:3]], list("abc"))
    names = dict(learner._algorithm.net.named_parameters())
    adapted = learner.adapted
    assert any(tuple(t.shape) == tuple(p.shape) for t in adapted.values() for p in names.values())
    assert all(isinstance(tensor, torch.Tensor) for tensor in adapted.values())


@pytest.mark.parametrize("bn", ["running", "support", "transductive"])
def test_the_adapted_network_is_a_module_that_answers_as_the_learner(
    bn: str, maml: Path, pictures: list[list[Picture]]
) -> None:
    learner = metarun.load(maml, bn=bn, device="cpu")
    with pytest.raises(NotFittedError):
        _ = learner.network
    learner.fit([drawings[0] for drawings in pictures[:3]], list("abc"))
    shown = [drawing for drawings in pictures[:3] for drawing in drawings[1:4]]
    network = learner.network
    logits = network(torch.from_numpy(learner.rows(shown)))
    expected = learner.predict_proba(shown)
    np.testing.assert_allclose(logits.softmax(1).detach(), expected, rtol=1e-4, atol=1e-5)
    # Training it does not change the learner.
    for parameter in network.parameters():
        parameter.data.zero_()
    np.testing.assert_array_equal(learner.predict_proba(shown), expected)


def test_a_learner_that_adapts_no_network_says_so(
    protonet: Path, pictures: list[list[Picture]]
) -> None:
    learner = metarun.load(protonet, device="cpu")
    learner.fit([drawings[0] for drawings in pictures[:3]], list("abc"))
    with pytest.raises(ValueError, match="ProtoNet adapts no weights of a network: `adapted` has"):
        _ = learner.network
