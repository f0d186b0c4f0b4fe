"""R2-D2 against least squares on augmented rows, and finite differences through the solver."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.optimization.r2d2 import R2D2, ridge
from metarun.core.types import Progress, TaskBatch, TaskSpec
from tests.helpers import (
    TINY_BACKBONES,
    image_batch,
    image_spec,
    linear_backbone,
    make,
    moved,
    regression_batch,
    regression_spec,
)

VECTORS = TaskSpec("classification", (4,), 3, 3)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least_squares(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Solve ridge regression as least squares with a row of sqrt(penalty) for each weight."""
    size = x.shape[1]
    rows = torch.cat([x, math.sqrt(penalty) * torch.eye(size, dtype=x.dtype)])
    values = torch.cat([y, torch.zeros(size, y.shape[1], dtype=y.dtype)])
    return torch.linalg.lstsq(rows, values, driver="gelsd").solution


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


@pytest.mark.parametrize("solver", ["auto", "primal", "dual"])
@pytest.mark.parametrize("rows", [3, 4, 20])
def test_every_solver_gives_the_least_squares_with_a_penalty(rows: int, solver: Any) -> None:
    x, y = draw(rows, 4), draw(rows, 2, seed=1)
    ours = ridge(x, y, torch.tensor(0.3, dtype=torch.float64), solver)
    torch.testing.assert_close(ours, least_squares(x, y, 0.3), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("per_row", [True, False])
def test_regression_answers_are_the_adjusted_predictions_of_ridge(per_row: bool) -> None:
    batch = regression_batch(regression_spec(), tasks=3)
    options = {"init_lambda": 0.2, "lambda_per_row": per_row, "init_scale": 3.0}
    algorithm = make(R2D2, regression_spec(), linear_backbone, **options)
    with torch.no_grad():
        algorithm.net.bias.fill_(0.7)
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    for i in range(3):
        x = with_ones(batch.support_x[i])
        weights = least_squares(x, batch.support_y[i], 0.2 * (len(x) if per_row else 1))
        expected = 3 * with_ones(batch.query_x[i]) @ weights + 0.7
        torch.testing.assert_close(outputs[i], expected)


def test_classification_regresses_on_one_hot_labels() -> None:
    batch = image_batch(VECTORS, tasks=1)
    algorithm = make(R2D2, VECTORS, linear_backbone, init_scale=1.0)
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    targets = nn.functional.one_hot(batch.support_y[0], 3).double()
    weights = least_squares(with_ones(batch.support_x[0]), targets, 50.0 * 6)
    torch.testing.assert_close(outputs[0], with_ones(batch.query_x[0]) @ weights)


def test_without_a_penalty_a_line_is_found_exactly() -> None:
    x = draw(2, 8, 3)
    y = x.sum(-1, keepdim=True) + 2
    batch = TaskBatch(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:])
    options = {"init_lambda": 1e-12, "init_scale": 1.0}
    algorithm = make(R2D2, regression_spec(), linear_backbone, **options)
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    torch.testing.assert_close(outputs, batch.query_y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("name", ["net.log_lambda", "net.scale", "net.bias", "a weight"])
def test_the_meta_gradient_is_that_of_finite_differences(name: str, solver: str) -> None:
    batch = regression_batch(regression_spec())
    backbone = TINY_BACKBONES["mlp with batch norm"]
    options = {"init_lambda": 0.1, "learn_lambda": True, "init_scale": 1.5, "solver": solver}
    name = "net.features.body.linears.0.weight" if name == "a weight" else name

    def loss(shift: float) -> float:
        algorithm = make(R2D2, regression_spec(), backbone, **options)
        with torch.no_grad():
            dict(algorithm.named_parameters())[name].view(-1)[0] += shift
        return float(algorithm.update(batch, Progress(0, 1))["loss"])

    gradient = moved(make(R2D2, regression_spec(), backbone, **options), batch)[name]
    expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert expected != 0.0
    assert float(gradient.view(-1)[0]) == pytest.approx(expected, rel=1e-6)


def test_in_classification_the_scale_is_learned_and_the_bias_has_no_effect() -> None:
    gradient = moved(make(R2D2, VECTORS, linear_backbone), image_batch(VECTORS))
    assert gradient["net.scale"].abs() > 0
    assert gradient["net.bias"].abs() < 1e-12


@pytest.mark.parametrize("learned", [False, True])
def test_the_penalty_is_learned_if_asked_and_kept_either_way(learned: bool) -> None:
    algorithm = make(R2D2, VECTORS, linear_backbone, init_lambda=2.0, learn_lambda=learned)
    assert ("net.log_lambda" in dict(algorithm.named_parameters())) == learned
    assert ("net.log_lambda" in algorithm.optimizer.targets) == learned
    before = algorithm.state_dict()["net.log_lambda"].clone()
    assert float(before) == pytest.approx(math.log(2.0))
    moved(algorithm, image_batch(VECTORS))
    assert torch.equal(algorithm.state_dict()["net.log_lambda"], before) != learned


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("engine", ["vmap", "threads"])
def test_the_engines_agree(engine: str, solver: str) -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=4)
    backbone = TINY_BACKBONES["resnet12"]
    options = {"solver": solver, "learn_lambda": True, "init_lambda": 0.5}
    expected = moved(make(R2D2, spec, backbone, **options), batch)
    gradient = moved(make(R2D2, spec, backbone, engine=engine, **options), batch)
    for key, value in expected.items():
        torch.testing.assert_close(gradient[key], value, rtol=1e-10, atol=1e-10)


def test_it_can_be_differentiated_twice_under_vmap() -> None:
    x, y = draw(3, 4, 2), draw(3, 4, 1, seed=1)

    def mean(x: Tensor) -> Tensor:
        penalty = torch.tensor(0.5, dtype=x.dtype)
        return torch.vmap(lambda a, b: ridge(a, b, penalty))(x, y).square().sum()

    assert torch.autograd.gradgradcheck(mean, x.requires_grad_())


def test_training_sees_support_and_query_in_one_pass_and_gathers_statistics() -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=1)
    algorithm = make(R2D2, spec, TINY_BACKBONES["conv4 max-pool"], bn="running")
    body = algorithm.net.features.body
    first = body.convs[0](torch.cat([batch.support_x[0], batch.query_x[0]])).mean((0, 2, 3))
    moved(algorithm, batch)
    torch.testing.assert_close(body.norms[0].running_mean, 0.1 * first)


def test_training_may_have_more_ways_than_testing() -> None:
    train, test = image_spec(3, train_way=6), image_spec(4)
    algorithm = make(R2D2, train, TINY_BACKBONES["mlp"])
    moved(algorithm, image_batch(train))
    batch = image_batch(test)
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    assert outputs.shape == (3, 8, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lambda": 0.0}, "algo.init_lambda=0.0: expected a positive number"),
        ({"init_scale": 0.0}, "algo.init_scale=0.0: expected a number other than 0"),
    ],
)
def test_what_is_out_of_range_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(R2D2, VECTORS, linear_backbone, **options)
