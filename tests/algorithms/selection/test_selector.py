"""The selector: predictions of the base-learners, its residual, and the choice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from metarun.algorithms.metric.protonet import ProtoNet
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


def expected_results(held_out: Any, y: Any, ways: int | None) -> Any:
    """Return the results (B, 5) of out-of-fold predictions (B, S, D) of one task, one by one."""
    mean = held_out.mean(0)
    results = []
    for answers in held_out:
        if ways is None:
            unit = y.var()
            losses = ((answers - y) ** 2).mean(1) / unit
            right, error = -losses, losses
        else:
            unit = 1.0
            losses = -np.log(answers[np.arange(len(y)), y])
            right = (answers.argmax(1) == y).astype(float)
            error = ((answers - np.eye(ways)[y]) ** 2).sum(1)
        far = ((answers - mean) ** 2).sum(1) / unit
        losses, error, far = (np.minimum(part, 5.0) for part in (losses, error, far))
        right = np.maximum(right, -5.0)
        results.append([right.mean(), losses.mean(), error.mean(), far.mean(), losses.std(ddof=1)])
    return np.array(results)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_what_it_is_told_of_a_learner_is_how_it_did(kind: str) -> None:
    classify = kind == "classification"
    batch = table_batch() if classify else value_batch()
    algorithm = selector(TABLE if classify else VALUES, learners=["knn", "ridge", "mlp_0.1"])
    held_out, _, rows = algorithm.studied(batch.support_x, batch.support_y, batch.query_x)
    performances = algorithm.performances(held_out, batch.support_y).numpy()
    evidence = algorithm.evidence(held_out, rows, batch.support_y).numpy()
    features = task_features(kind, rows, batch.support_y).numpy()
    assert evidence.shape == (3, 3, 5 + 3 * 8)
    for task in range(3):
        y = batch.support_y[task].numpy()
        expected = expected_results(held_out[task].numpy(), y, 2 if classify else None)
        np.testing.assert_allclose(performances[task], expected, atol=1e-9)
        np.testing.assert_allclose(evidence[task, :, :5], expected - expected.mean(0), atol=1e-9)
        named = np.kron(np.eye(3) - 1 / 3, [1.0, *features[task]])
        np.testing.assert_allclose(evidence[task, :, 5:], named, atol=1e-9)


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("choice", ["pick", "weigh"])
def test_untrained_it_is_cross_validation(kind: str, choice: str) -> None:
    classify = kind == "classification"
    batch = table_batch(tasks=6) if classify else value_batch(tasks=6)
    algorithm = selector(TABLE if classify else VALUES, learners=None, choice=choice)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    held_out, answers, _ = algorithm.studied(*rows)
    found = algorithm.predict(*rows)
    scores = algorithm.validated(held_out, batch.support_y)
    assert torch.equal(found.embedding, scores)
    torch.testing.assert_close(found.alternatives["committee"], answers.mean(1))
    if choice == "pick":
        expected = found.alternatives["cv_winner"]
        assert torch.equal(found.outputs, expected.log() if classify else expected)
    else:
        y = batch.support_y.numpy()
        own = held_out.numpy()
        if classify:
            right = (own.argmax(3) == y[:, None]).astype(float)
        else:
            right = -((own - y[:, None]) ** 2).mean(3) / y.var((1, 2))[:, None, None]
        right = np.maximum(right, -5.0)
        apart = right - right.mean(1, keepdims=True)
        error = np.sqrt((apart**2).mean((1, 2)) / right.shape[2])
        weights = (scores / torch.tensor(error + 1e-6)[:, None]).softmax(1)
        expected = (weights[:, :, None, None] * answers).sum(1)
        torch.testing.assert_close(found.outputs.exp() if classify else found.outputs, expected)


def test_the_residual_is_a_ridge_regression_on_all_tasks_weighed_by_its_variance() -> None:
    algorithm = selector(prior=5.0)
    inputs, targets = [], []
    for seed, tasks in ((0, 3), (1, 7)):
        batch = table_batch(tasks=tasks, seed=seed)
        algorithm.update(batch, Progress(seed, 2))
        held_out, answers, rows = algorithm.studied(batch.support_x, batch.support_y, batch.query_x)
        evidence = algorithm.evidence(held_out, rows, batch.support_y).numpy()
        gained = (answers.argmax(3) == batch.query_y[:, None]).double().mean(2).numpy()
        validated = (held_out.argmax(3) == batch.support_y[:, None]).double().mean(2).numpy()
        residual = gained - validated
        inputs += list(evidence)
        targets += list(residual - residual.mean(1, keepdims=True))
    x, y = np.concatenate(inputs), np.concatenate(targets)
    scale = np.sqrt((x**2).mean(0))
    x = x / scale
    # A task weighs 1, so each of its three rows weighs a third.
    inverse = np.linalg.inv(x.T @ x / 3 + 5.0 * np.eye(x.shape[1]))
    weights = inverse @ x.T @ y / 3
    usual = np.mean([row @ inverse @ row for row in x])
    new = table_batch(tasks=5, seed=9)
    held_out, _, rows = algorithm.studied(new.support_x, new.support_y, new.query_x)
    evidence = algorithm.evidence(held_out, rows, new.support_y)
    found = algorithm.residual(evidence).numpy()
    for task, own in enumerate(evidence.numpy() / scale):
        variance = np.mean([row @ inverse @ row for row in own])
        np.testing.assert_allclose(found[task], min(1.0, usual / variance) * (own @ weights))
    assert np.abs(found).max() > 1e-3
    scores = algorithm.predict(new.support_x, new.support_y, new.query_x).embedding
    validated = algorithm.validated(held_out, new.support_y)
    np.testing.assert_allclose(scores - validated, found, atol=1e-12)


def twins(tasks: int, seed: int) -> TaskBatch:
    """Return noisy tasks whose support rows come in pairs, one of which is in another fold.

    To cross-validation a tree seems perfect: it has learned the twin's label.
    """
    draw = torch.Generator().manual_seed(seed)

    def part(per_class: int) -> tuple[Any, Any]:
        y = torch.arange(2).repeat(per_class).expand(tasks, -1)
        x = torch.randn(tasks, 2 * per_class, 3, generator=draw, dtype=torch.float64)
        return x + 0.8 * y[..., None], y

    x, y = part(8)
    return TaskBatch(torch.cat([x, x], 1), torch.cat([y, y], 1), *part(20))


def test_it_learns_where_cross_validation_is_wrong() -> None:
    algorithm = selector(learners=["tree", "centroid"], folds=4)
    for step in range(3):
        algorithm.update(twins(20, step), Progress(step, 3))
    new = twins(60, 9)
    found = algorithm.predict(new.support_x, new.support_y, new.query_x)

    def right(probabilities: Any) -> Any:
        return (probabilities.argmax(2) == new.query_y).double().mean(1)

    gain = right(found.outputs) - right(found.alternatives["cv_winner"])
    assert gain.mean() > 4.0 * gain.std() / 60**0.5 > 0.0
    # A strong prior keeps it at cross-validation.
    algorithm.prior = 1e18
    kept = algorithm.predict(new.support_x, new.support_y, new.query_x)
    assert torch.equal(kept.outputs, kept.alternatives["cv_winner"].log())


def test_far_from_its_training_it_is_cross_validation() -> None:
    algorithm = selector(learners=["tree", "centroid"], folds=4)
    for step in range(3):
        algorithm.update(twins(20, step), Progress(step, 3))
    new = twins(30, 9)
    held_out, _, rows = algorithm.studied(new.support_x, new.support_y, new.query_x)
    evidence = algorithm.evidence(held_out, rows, new.support_y)
    near = algorithm.residual(evidence).abs().amax()
    for times in (100.0, 1000.0):
        # The residual itself grows with the distance, the trust falls with its square.
        assert algorithm.residual(times * evidence).abs().amax() < 10.0 * near / times
    # Tasks of another size, whose columns are equal and skewed.
    draw = torch.Generator().manual_seed(5)
    y = torch.arange(2).repeat(4).expand(30, -1)
    x = torch.randn(30, 8, 1, generator=draw, dtype=torch.float64).mul(2.0).exp()
    held_out, _, rows = algorithm.studied(x.expand(-1, -1, 3), y, x.expand(-1, -1, 3))
    evidence = algorithm.evidence(held_out, rows, y)
    assert algorithm.residual(evidence).abs().amax() < near / 10.0
    found = algorithm.predict(x.expand(-1, -1, 3), y, x.expand(-1, -1, 3))
    assert torch.equal(found.outputs, found.alternatives["cv_winner"].log())


def test_single_precision_learns_the_same_residual() -> None:
    double, single = selector(), selector().float()
    for step in range(4):
        batch = table_batch(tasks=5, seed=step)
        for algorithm in (double, single):
            algorithm.update(batch, Progress(step, 4))
    rows = (batch.support_x, batch.support_y, batch.query_x)
    one, other = (algorithm.predict(*rows).embedding for algorithm in (double, single))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0.0)


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


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["pick", "weigh"])
def test_it_learns_which_learner_suits_which_tasks(choice: str) -> None:
    source = TwoKinds()
    algorithm = selector(learners=["ridge", "tree"], choice=choice)
    for step in range(6):
        algorithm.update(source.batch("train", 16 * step, 16), Progress(step, 6))
    measured = evaluate(algorithm, source, "test", 100, 25)  # type: ignore[arg-type]
    for name in ("ridge", "tree"):
        gain = measured.values - measured.arrays[f"strategy_{name}"]
        assert gain.mean() > 3.0 * gain.std() / 10.0, name
    # Each kind of task has its own base-learner.
    ridge = measured.arrays["embeddings"][:, 0] - measured.arrays["embeddings"][:, 1]
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


def test_a_cache_holds_arrays_and_a_poisoned_one_is_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch = table_batch()
    rows = (batch.support_x, batch.support_y, batch.query_x)
    expected = selector(cache=str(tmp_path)).predict(*rows).outputs
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == batch.num_tasks
    assert {path.suffix for path in files} == {".npz"}
    before = files[0].read_bytes()
    poison = b"cbuiltins\nexec\n(S'raise SystemExit'\ntR."
    files[0].write_bytes(poison)
    np.savez(files[1], held_out=np.array([{}], dtype=object))
    assert torch.equal(selector(cache=str(tmp_path)).predict(*rows).outputs, expected)
    assert f"{files[0].name} is computed again" in caplog.text
    assert files[0].read_bytes() == before


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
        ({"folds": 1}, "algo.folds=1"),
        ({"processes": 0}, "algo.processes=0"),
        ({"prior": 0.0}, "algo.prior=0.0"),
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
