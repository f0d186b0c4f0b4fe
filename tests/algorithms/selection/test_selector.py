"""The selector: predictions of the base-learners, inputs of the LSTM, and the choice."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from metarun.algorithms.metric.protonet import ProtoNet
from metarun.algorithms.outer_optimizer import OuterOptimizer
from metarun.algorithms.selection import portfolio
from metarun.algorithms.selection.portfolio import study
from metarun.algorithms.selection.selector import Selector, _picked, task_features
from metarun.core.types import SPLITS, EpisodeSize, LearnedState, Progress, TaskBatch, TaskSpec
from metarun.evaluation.episodes import evaluate
from tests.helpers import TINY_BACKBONES, image_batch, image_spec, linear_backbone, make

FEW = ["centroid", "ridge", "mlp_0.1"]
TABLE = TaskSpec("classification", (3,), 2, 2)
VALUES = TaskSpec("regression", (3,), 1, 1)


def selector(spec: TaskSpec = TABLE, **options: Any) -> Any:
    return make(Selector, spec, linear_backbone, **{"processes": 1, "learners": FEW} | options)


def rows(seed: int = 0, num: int = 12, ways: int | None = 3, features: int = 4) -> Any:
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((num, features))
    y = draw.standard_normal((num, 1)) if ways is None else np.arange(num) % ways
    if ways is not None:
        x = x + y[:, None]
    return x, y, draw.standard_normal((5, features))


def learn(
    names: list[str], x: Any, y: Any, asked: Any, ways: int | None = 3, folds: int = 4
) -> Any:
    return study(x, y, asked, ways=ways, names=names, folds=folds)


def standard(x: Any, by: Any) -> Any:
    return (x - by.mean(0)) / by.std(0)


def test_ridge_is_its_closed_form() -> None:
    x, y, asked = rows(ways=None)
    z, q = standard(x, x), standard(asked, x)
    target = y - y.mean()
    weights = np.linalg.solve(z.T @ z + 0.1 * len(x) * np.eye(4), z.T @ target)
    found = learn(["ridge"], x, y, asked, None)
    np.testing.assert_allclose(found.answers[0], q @ weights + y.mean(), atol=1e-10)


def test_centroid_answers_with_the_nearest_mean() -> None:
    x, y, asked = rows()
    z, q = standard(x, x), standard(asked, x)
    means = np.stack([z[y == label].mean(0) for label in range(3)])
    nearest = ((q[:, None] - means) ** 2).sum(2).argmin(1)
    found = learn(["centroid"], x, y, asked)
    assert (found.answers[0].argmax(1) == nearest).all()


def test_neighbors_are_weighed_by_their_distance() -> None:
    x, y, asked = rows(ways=None)
    z, q = standard(x, x), standard(asked, x)
    found = learn(["knn"], x, y, asked, None).answers[0]
    for row, answer in zip(q, found, strict=True):
        distance = np.sqrt(((z - row) ** 2).sum(1))
        near = distance.argsort()[:5]
        expected = (y[near, 0] / distance[near]).sum() / (1.0 / distance[near]).sum()
        np.testing.assert_allclose(answer, expected, atol=1e-10)


@pytest.mark.parametrize("ways", [3, None])
def test_networks_descend_as_torch_does(ways: int | None) -> None:
    x, y, asked = rows(ways=ways)
    order = np.lexsort(x.T[::-1])
    z = torch.tensor(standard(x, x)[order])
    draws = np.random.default_rng(0)
    outputs = ways or 1
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, outputs)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(draws.standard_normal((4, 32)) / 2.0).T)
        for part in (net[0].bias, net[2].weight, net[2].bias):
            part.zero_()
    descent = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    labels = torch.tensor(y[order])
    for _ in range(50):
        descent.zero_grad()
        if ways is None:
            wanted = (labels - labels.mean()) / labels.std(correction=0)
            loss = (net(z) - wanted).square().mean() / 2.0
        else:
            loss = nn.functional.cross_entropy(net(z), labels)
        loss.backward()
        descent.step()
    raw = net(torch.tensor(standard(asked, x))).detach()
    found = learn(["mlp_0.1"], x, y, asked, ways).answers[0]
    if ways is None:
        expected = raw * labels.std(correction=0) + labels.mean()
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-9)
    else:
        floored = raw.softmax(1).clamp(min=1e-3)
        np.testing.assert_allclose(
            found, (floored / floored.sum(1, keepdim=True)).numpy(), atol=1e-9
        )


def test_a_network_that_diverges_still_answers_with_numbers() -> None:
    x, y, asked = rows(ways=None, num=40)
    found = learn(["mlp_1000", "mean"], x, y, 100.0 * asked, None)
    assert np.isfinite(found.answers).all()
    assert np.abs(found.answers[0] - y.mean()).max() <= 10.0 * y.std() + 1e-9


@pytest.mark.parametrize("ways", [3, None])
def test_a_held_out_answer_knows_nothing_of_its_own_fold(ways: int | None) -> None:
    names = portfolio.known("regression" if ways is None else "classification")
    x, y, asked = rows(ways=ways)
    before = learn(names, x, y, asked, ways)
    order = np.lexsort(x.T[::-1])
    if ways is None:
        own = order[np.arange(len(x)) % 4 == 2]
        changed = y.copy()
        changed[own] += 5.0
        after = learn(names, x, changed, asked, ways)
        np.testing.assert_allclose(after.held_out[:, own], before.held_out[:, own], atol=1e-10)
        assert not np.allclose(after.answers, before.answers)
    # A held-out prediction is that of a learner trained on the other folds.
    fold = _fold_of(order[0], x, y, ways)
    kept = np.setdiff1d(np.arange(len(x)), fold)
    alone = learn(names, x[kept], y[kept], x[fold], ways, folds=2)
    np.testing.assert_allclose(alone.answers, before.held_out[:, fold], atol=1e-8)


def _fold_of(row: int, x: Any, y: Any, ways: int | None) -> Any:
    """Return the rows of one fold by the rule: sorted, class after class, in turn."""
    order = np.lexsort(x.T[::-1])
    if ways is not None:
        first = {label: int(np.flatnonzero(y[order] == label)[0]) for label in range(ways)}
        order = np.array(sorted(order, key=lambda r: (first[int(y[r])], list(order).index(r))))
    place = list(order).index(row)
    return order[np.arange(len(x)) % 4 == place % 4]


def test_equal_rows_of_a_regression_have_no_order_either() -> None:
    x, y, asked = rows(ways=None)
    x = x.round()[:, :1]
    reference = learn(["knn", "ridge"], x, y, asked[:, :1], None)
    turn = np.random.default_rng(2).permutation(len(x))
    turned = learn(["knn", "ridge"], x[turn], y[turn], asked[:, :1], None)
    assert np.array_equal(turned.held_out, reference.held_out[:, turn])


@pytest.mark.parametrize("ways", [3, None])
def test_neither_order_nor_names_of_classes_have_a_meaning(ways: int | None) -> None:
    names = portfolio.known("regression" if ways is None else "classification")
    x, y, asked = rows(ways=ways)
    reference = learn(names, x, y, asked, ways)
    turn = np.random.default_rng(1).permutation(len(x))
    turned = learn(names, x[turn], y[turn], asked, ways)
    assert np.array_equal(turned.answers, reference.answers)
    assert np.array_equal(turned.held_out, reference.held_out[:, turn])
    if ways is not None:
        new = np.array([2, 0, 1])
        renamed = learn(names, x, new[y], asked, ways)
        assert np.array_equal(renamed.answers[..., new], reference.answers)
        assert np.array_equal(renamed.held_out[..., new], reference.held_out)


def test_an_answer_does_not_depend_on_the_other_queries() -> None:
    names = portfolio.known("classification")
    x, y, asked = rows()
    whole, one = learn(names, x, y, asked), learn(names, x, y, asked[2:3])
    np.testing.assert_allclose(one.answers[:, 0], whole.answers[:, 2], atol=1e-12)


def test_rows_that_are_all_alike_are_answered_by_how_often_each_class_is() -> None:
    names = portfolio.known("classification")
    x, y = np.ones((9, 2)), np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])
    found = learn(names[:-3], x, y, np.ones((2, 2)), 2, folds=3)
    np.testing.assert_allclose(found.answers, np.broadcast_to([2 / 3, 1 / 3], (6, 2, 2)))


def test_one_row_of_a_class_cannot_be_held_out() -> None:
    x, _, asked = rows(num=3)
    with pytest.raises(ValueError, match="two rows of each class: use shot=2"):
        learn(["ridge"], x, np.array([0, 0, 1]), asked, 2)


def table_batch(tasks: int = 3, shot: int = 6, query: int = 4, seed: int = 0) -> TaskBatch:
    draw = torch.Generator().manual_seed(seed)

    def part(per_class: int) -> tuple[Any, Any]:
        y = torch.arange(2).repeat(per_class).expand(tasks, -1).contiguous()
        x = torch.randn(tasks, 2 * per_class, 3, generator=draw, dtype=torch.float64)
        return x + y[..., None], y

    return TaskBatch(*part(shot), *part(query))


def value_batch(tasks: int = 3, seed: int = 0) -> TaskBatch:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, 16, 3, generator=draw, dtype=torch.float64)
    y = x.sum(2, keepdim=True) + torch.randn(tasks, 16, 1, generator=draw, dtype=torch.float64)
    return TaskBatch(x[:, :10], y[:, :10], x[:, 10:], y[:, 10:])


@pytest.mark.parametrize("batch", [table_batch(), value_batch()], ids=["classes", "values"])
def test_features_of_a_task_are_those_of_scipy(batch: TaskBatch) -> None:
    kind = "classification" if batch.support_y.dim() == 2 else "regression"
    x = torch.cat([batch.support_x, torch.full_like(batch.support_x[..., :1], 2.0)], 2)
    found = task_features(kind, x, batch.support_y).numpy()
    for task in range(3):
        own, y = batch.support_x[task].numpy(), batch.support_y[task].numpy()
        if kind == "classification":
            shares = [
                sum(
                    (y == c).mean() * (own[y == c, f].mean() - own[:, f].mean()) ** 2
                    for c in (0, 1)
                )
                / own[:, f].var()
                for f in range(3)
            ]
        else:
            shares = [stats.pearsonr(own[:, f], y[:, 0])[0] ** 2 for f in range(3)]
        pairs = [np.corrcoef(own.T)[a, b] ** 2 for a in range(3) for b in range(3) if a != b]
        expected = [
            np.log(len(own)) / 3.0,
            np.log(3) / 3.0,
            np.mean(shares),
            np.max(shares),
            np.mean(pairs),
            np.abs(stats.skew(own)).mean(),
            stats.kurtosis(own).mean() / 3.0,
        ]
        np.testing.assert_allclose(found[task], expected, atol=1e-10)


def test_what_it_is_told_of_a_learner_is_how_it_did() -> None:
    batch = table_batch()
    algorithm = selector()
    held_out, _, _ = algorithm.studied(batch.support_x, batch.support_y, batch.query_x)
    evidence = algorithm.performances(held_out, batch.support_y).numpy()
    for task in range(3):
        y = batch.support_y[task].numpy()
        answers = held_out[task].numpy()
        right = (answers.argmax(2) == y).astype(float)
        losses = np.minimum(-np.log(answers[:, np.arange(12), y]), 5.0)
        for one in range(3):
            apart = right - right.mean(0)
            error = np.sqrt((apart**2).mean() / 12)
            agree = np.mean(
                [(answers[one].argmax(1) == other.argmax(1)).mean() for other in answers]
            )
            expected = [
                right[one].mean(),
                (right[one].mean() - right.mean()) / (error + 1e-6),
                losses[one].mean(),
                losses[one].std(ddof=1),
                agree,
            ]
            np.testing.assert_allclose(evidence[task, one], expected, atol=1e-9)


def test_it_picks_the_greatest_score_and_weighs_by_their_softmax() -> None:
    batch = table_batch()
    rows = (batch.support_x, batch.support_y, batch.query_x)
    for choice in ("pick", "weigh"):
        algorithm = selector(choice=choice)
        nn.init.normal_(algorithm.score.bias)
        found = algorithm.predict(*rows)
        study_of = [found.strategies[name] for name in FEW]
        scores = found.embedding
        assert torch.allclose(scores, algorithm.score.bias.expand(3, -1))
        if choice == "pick":
            expected = study_of[int(scores[0].argmax())]
        else:
            weights = scores[0].softmax(0)
            expected = sum(weight * own for weight, own in zip(weights, study_of, strict=True))
        torch.testing.assert_close(found.outputs.exp(), expected)
        torch.testing.assert_close(found.alternatives["committee"], torch.stack(study_of).mean(0))


def test_the_winner_of_cross_validation_has_the_most_right_out_of_fold() -> None:
    batch = table_batch(tasks=8, seed=3)
    found = selector().predict(batch.support_x, batch.support_y, batch.query_x)
    for task in range(8):
        own = study(
            batch.support_x[task].numpy(), batch.support_y[task].numpy(),
            batch.query_x[task].numpy(), ways=2, names=FEW, folds=5,
        )  # fmt: skip
        y = batch.support_y[task].numpy()
        right = (own.held_out.argmax(2) == y).mean(1)
        losses = -np.log(own.held_out[:, np.arange(len(y)), y]).mean(1)
        won = max(range(3), key=lambda one: (right[one], -losses[one]))
        np.testing.assert_allclose(found.alternatives["cv_winner"][task].numpy(), own.answers[won])


def test_equal_accuracies_are_told_apart_by_the_loss_in_single_precision_too() -> None:
    held_out = torch.full((1, 2, 10, 2), 0.5)
    for learner, sure in enumerate((0.60, 0.61)):
        held_out[0, learner, :, 0], held_out[0, learner, :, 1] = sure, 1.0 - sure
    labels = torch.zeros(1, 10, dtype=torch.int64)
    labels[0, 0] = 1
    algorithm = selector(learners=["knn", "tree"]).float()
    scores = algorithm.validated(held_out, labels)
    right = -held_out.gather(3, labels[:, None, :, None].expand(1, 2, 10, 1)).log().mean((2, 3))
    assert int(scores.argmax()) == int(right.argmin())
    assert scores[0, 0] != scores[0, 1]


def test_cross_validation_of_values_counts_every_error_in_full() -> None:
    labels = torch.linspace(-1.0, 1.0, 10, dtype=torch.float64)[None, :, None]
    steady, wild = labels + 1.5, labels.clone()
    wild[0, 0] += 30.0
    algorithm = selector(VALUES, learners=["knn", "tree"])
    held_out = torch.stack([wild, steady], 1)
    assert int(algorithm.validated(held_out, labels).argmax()) == 1
    assert algorithm.performances(held_out, labels)[0, 0].abs().max() < 10.0


def test_what_never_varies_in_training_does_not_blow_up_elsewhere() -> None:
    algorithm = selector(optim=partial(OuterOptimizer, method="adam", lr=0.01))
    for step in range(100):
        algorithm.update(table_batch(seed=step % 3), Progress(step, 100))
    few = table_batch(shot=3)
    held_out, _, rows = algorithm.studied(few.support_x, few.support_y, few.query_x)
    evidence = algorithm.evidence(held_out, rows, few.support_y)
    scaled = (evidence - algorithm.evidence_mean) / (algorithm.evidence_variance + 0.01).sqrt()
    # The number of rows, log(6) / 3 for log(12) / 3.
    assert algorithm.evidence_variance[5] < 1e-4
    assert scaled[..., 5].abs().max() < 3.0
    assert torch.equal(algorithm.scores(evidence), algorithm.predict(
        few.support_x, few.support_y, few.query_x
    ).embedding)  # fmt: skip


class TwoKinds:
    """Tasks of two kinds: classes separated by a line, or by whether two signs agree."""

    def __init__(self) -> None:
        self.spec = TABLE
        self.sizes = {split: EpisodeSize(2, 12, 20) for split in SPLITS}
        self.device = torch.device("cpu")

    def batch(self, split: str, index: int, num_tasks: int) -> TaskBatch:
        parts = []
        for number in range(index, index + num_tasks):
            draw = torch.Generator().manual_seed(hash((split == "test", number)) % 2**31)
            x = torch.randn(400, 3, generator=draw, dtype=torch.float64)
            score = x[:, 0] * x[:, 1] if number % 2 else x[:, 0] + x[:, 1] + x[:, 2]
            score = score + 0.1 * torch.randn(400, generator=draw, dtype=torch.float64)
            rows = torch.cat([(score > 0).nonzero()[:32, 0], (score <= 0).nonzero()[:32, 0]])
            rows = rows.reshape(2, 32)
            label = torch.arange(2)[:, None]
            parts.append(
                (x[rows[:, :12]].flatten(0, 1), label.expand(-1, 12).flatten(),
                 x[rows[:, 12:]].flatten(0, 1), label.expand(-1, 20).flatten())
            )  # fmt: skip
        return TaskBatch(*(torch.stack(own) for own in zip(*parts, strict=True)))

    def fingerprint(self) -> str:
        return ""


@pytest.mark.parametrize("choice", ["pick", "weigh"])
def test_it_learns_which_learner_suits_which_tasks(choice: str) -> None:
    source = TwoKinds()
    adam = partial(OuterOptimizer, method="adam", lr=0.01)
    algorithm = selector(learners=["ridge", "tree"], choice=choice, optim=adam)
    for step in range(60):
        algorithm.update(source.batch("train", 16 * (step % 6), 16), Progress(step, 60))
    measured = evaluate(algorithm, source, "test", 100, 25)  # type: ignore[arg-type]
    for name in ("ridge", "tree"):
        gain = measured.values - measured.strategies[name]
        assert gain.mean() > 3.0 * gain.std() / 10.0, name
    # Each kind of task has its own base-learner.
    assert measured.embeddings is not None
    ridge = measured.embeddings[:, 0] - measured.embeddings[:, 1]
    assert ((ridge > np.median(ridge)) == (np.arange(100) % 2 == 0)).mean() > 0.85


def test_a_task_costs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = table_batch()
    rows = (batch.support_x, batch.support_y, batch.query_x)
    first = selector(cache=str(tmp_path))
    expected = first.predict(*rows).outputs

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was computed again")

    monkeypatch.setattr(portfolio, "_networks", refuse)
    assert torch.equal(first.predict(*rows).outputs, expected)
    # Another process finds the result on disk.
    assert torch.equal(selector(cache=str(tmp_path)).predict(*rows).outputs, expected)
    with pytest.raises(AssertionError, match="computed again"):
        selector().predict(*rows)


def test_more_processes_answer_bit_for_bit_alike() -> None:
    batch = table_batch(tasks=4)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    one, two = (
        selector(learners=None, processes=number).predict(*rows).strategies for number in (1, 2)
    )
    assert len(one) == 9
    assert all(torch.equal(two[name], own) for name, own in one.items())


def test_images_are_seen_through_the_network_of_a_run() -> None:
    spec, batch = image_spec(), image_batch(image_spec(), shot=3)
    backbone = TINY_BACKBONES["conv4 max-pool"]
    trained = make(ProtoNet, spec, backbone, seed=3)
    learned = LearnedState("run", trained.state_dict())
    few: dict[str, Any] = {"learners": FEW, "processes": 1, "bn": "running"}
    there = make(Selector, spec, backbone, features=learned, **few)
    reference = make(Selector, replace_shape(spec), backbone, **few)

    def seen(x: Any) -> Any:
        with torch.no_grad():
            from metarun.backbones.layers.context import ForwardContext

            return trained.net(x.flatten(0, 1), ForwardContext(running=True)).unflatten(
                0, x.shape[:2]
            )

    found = there.predict(batch.support_x, batch.support_y, batch.query_x).strategies
    expected = reference.predict(
        seen(batch.support_x), batch.support_y, seen(batch.query_x)
    ).strategies
    for name in FEW:
        torch.testing.assert_close(found[name], expected[name])
    # The network is not trained.
    before = [p.clone() for p in there.net.parameters()]
    there.update(batch, Progress(0, 10))
    assert all(torch.equal(a, b) for a, b in zip(before, there.net.parameters(), strict=True))
    with pytest.raises(ValueError, match="its network does not fit"):
        make(Selector, spec, TINY_BACKBONES["resnet12"], features=learned, **few)
    with pytest.raises(ValueError, match=r"bn=support: algo\.features processes rows separately"):
        make(Selector, spec, backbone, features=learned, **(few | {"bn": "support"}))


def replace_shape(spec: TaskSpec) -> TaskSpec:
    return TaskSpec(spec.kind, (12,), spec.output_dim, spec.train_way)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learners": ["ridge", "svm"]}, "svm is not a base-learner for classification"),
        ({"learners": ["ridge", "mean"]}, "mean is not a base-learner for classification"),
        ({"learners": ["ridge", "mlp_fast"]}, "mlp_fast is not a base-learner for classification"),
        ({"learners": ["ridge"]}, "two or more names, each once"),
        ({"learners": ["ridge", "ridge"]}, "two or more names, each once"),
        ({"choice": "vote"}, "algo.choice=vote"),
        ({"folds": 1}, "algo.folds=1"),
        ({"processes": 0}, "algo.processes=0"),
        ({"hidden": 0}, "algo.hidden=0"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selector(**options)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install '.\[sklearn\]'"):
        selector()


def test_regressions_are_chosen_among_too() -> None:
    batch = value_batch(tasks=6)
    for choice in ("pick", "weigh"):
        algorithm = selector(VALUES, learners=None, choice=choice)
        algorithm.update(batch, Progress(0, 10))
        found = algorithm.predict(batch.support_x, batch.support_y, batch.query_x)
        assert found.outputs.shape == batch.query_y.shape
        assert list(found.strategies)[:4] == ["mean", "knn", "ridge", "tree"]
        error = {n: float((o - batch.query_y).square().mean()) for n, o in found.strategies.items()}
        assert error["ridge"] < error["mean"]


def test_of_scores_that_differ_by_rounding_the_first_is_picked() -> None:
    answers = torch.arange(4.0).view(1, 4, 1, 1).expand(3, 4, 1, 1)
    scores = torch.tensor([[0.1, 0.3, 0.3, 0.2], [0.3, 0.1, 0.4, 0.4], [-2.0, -1.0, -3.0, -1.0]])
    for nudge in (0.0, 1.0):
        near = scores * (1.0 + nudge * torch.tensor([0.0, 0.0, 0.0, 2e-7]))
        near[0, 2] *= 1.0 + nudge * 2e-7
        assert _picked(near, answers).flatten().tolist() == [1.0, 2.0, 1.0]
