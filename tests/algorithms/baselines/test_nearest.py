"""The nearest neighbor against a search over pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metarun.algorithms.baselines.nearest import Nearest
from metarun.core.types import Progress
from tests.helpers import (
    TINY_BACKBONES,
    image_batch,
    image_spec,
    make,
    regression_batch,
    regression_spec,
)

MLP = TINY_BACKBONES["mlp"]


def distance(distance: str, one: Tensor, other: Tensor) -> float:
    one, other = one.flatten(), other.flatten()
    if distance == "cosine":
        return 1.0 - float(one @ other / (one.norm() * other.norm()))
    return float((one - other).square().sum())


@pytest.mark.parametrize("kind", ["squared_euclidean", "cosine"])
def test_a_class_is_as_far_as_its_nearest_row(kind: str) -> None:
    batch = image_batch(image_spec(), tasks=4, shot=3)
    algorithm = make(Nearest, image_spec(), MLP, distance=kind)
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    for task in range(4):
        rows = list(zip(batch.support_x[task], batch.support_y[task].tolist(), strict=True))
        for q, query in enumerate(batch.query_x[task]):
            pairs = [(distance(kind, query, x), label) for x, label in rows]
            for k in range(3):
                expected = -min(d for d, label in pairs if label == k)
                assert float(outputs[task, q, k]) == pytest.approx(expected)
            assert int(outputs[task, q].argmax()) == min(pairs)[1]


def test_a_regression_answers_with_the_value_of_the_nearest_row() -> None:
    spec = regression_spec(outputs=2)
    batch = regression_batch(spec)
    algorithm = make(Nearest, spec, MLP)
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    for task in range(4):
        for q, query in enumerate(batch.query_x[task]):
            d = [distance("squared_euclidean", query, x) for x in batch.support_x[task]]
            assert torch.equal(outputs[task, q], batch.support_y[task, d.index(min(d))])


def test_a_row_of_the_support_is_answered_with_its_own_label_or_value() -> None:
    batch = image_batch(image_spec())
    algorithm = make(Nearest, image_spec(), MLP)
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.support_x).outputs
    assert torch.equal(outputs.argmax(-1), batch.support_y)
    assert torch.equal(outputs.amax(-1), torch.zeros(3, 6, dtype=torch.float64))
    spec = regression_spec()
    lines = regression_batch(spec)
    answers = make(Nearest, spec, MLP).predict(lines.support_x, lines.support_y, lines.support_x)
    assert torch.equal(answers.outputs, lines.support_y)


def test_there_is_nothing_to_learn_and_an_update_reports_what_is_reached() -> None:
    batch = image_batch(image_spec())
    algorithm = make(Nearest, image_spec(), MLP)
    assert not list(algorithm.parameters())
    assert not algorithm.state_dict()
    assert algorithm.dtype == torch.float64
    assert algorithm.device == torch.device("cpu")
    metrics = algorithm.update(batch, Progress(0, 1))
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    right = (outputs.argmax(-1) == batch.query_y).double().mean()
    torch.testing.assert_close(metrics["accuracy"], right)
    assert torch.isfinite(metrics["loss"])


def test_the_angle_of_single_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"algo\.distance=cosine: the inputs are single numbers"):
        make(Nearest, regression_spec(features=1), MLP, distance="cosine")
