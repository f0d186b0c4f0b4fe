"""The multi-task baseline against torch's own networks, Adam and least squares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.baselines.multitask import MultiTask
from metarun.algorithms.functional import flatten
from metarun.algorithms.outer_optimizer import NonFiniteError
from metarun.core.types import Progress, TaskBatch
from tests.helpers import (
    TINY_BACKBONES,
    image_spec,
    linear_backbone,
    make,
    regression_batch,
    regression_spec,
)

SPEC = regression_spec()
MLP = TINY_BACKBONES["mlp"]


def mean_of(algorithm: Any) -> Tensor:
    return flatten(dict(algorithm.net.named_parameters())).detach().clone()


def trained(batch: TaskBatch, *, backbone: Any = MLP, tasks: int = 4, **options: Any) -> Tensor:
    """Return the mean model after all tasks of a batch, with `tasks` in each update."""
    algorithm = make(MultiTask, SPEC, backbone, **options)
    for step, chunk in enumerate(batch.chunks(tasks)):
        algorithm.update(chunk, Progress(step, 10))
    return mean_of(algorithm)


def starts(backbone: Any = MLP, count: int = 4, seed: int = 0) -> list[Tensor]:
    return list(make(MultiTask, SPEC, backbone, seed=seed)._starts(0, count))


def torch_fit(start: Tensor, x: Tensor, y: Tensor, anchor: Tensor, decay: float) -> Tensor:
    """Fit by twenty steps of torch's Adam on torch's layers, with the penalty in the loss."""
    net = nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)
    ).double()
    nn.utils.vector_to_parameters(start, net.parameters())
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(1, 21):
        # TensorFlow's form of eps, which is ours, in terms of torch's.
        adam.param_groups[0]["eps"] = 1e-8 / (1 - 0.999**step) ** 0.5
        theta = nn.utils.parameters_to_vector(net.parameters())
        loss = nn.functional.mse_loss(net(x), y) + decay / 2 * (theta - anchor).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def sequential(batch: TaskBatch, penalty: str, decay: float) -> Tensor:
    """Fit by the paper's definition: one model after another, each with the penalty."""
    x = torch.cat([batch.support_x, batch.query_x], 1)
    y = torch.cat([batch.support_y, batch.query_y], 1)
    ends: list[Tensor] = []
    for i, start in enumerate(starts()):
        towards_mean = penalty == "mean" and ends
        anchor = torch.stack(ends).mean(0) if towards_mean else torch.zeros_like(start)
        pull = 0.0 if penalty == "none" or (penalty == "mean" and not ends) else decay
        ends.append(torch_fit(start, x[i], y[i], anchor, pull))
    return torch.stack(ends).mean(0)


@pytest.mark.parametrize("penalty", ["none", "l2", "mean"])
def test_it_is_the_mean_of_models_that_torch_fits_one_after_another(penalty: str) -> None:
    batch = regression_batch(SPEC)
    options = {"fit_steps": 20, "fit_lr": 0.01, "penalty": penalty, "decay": 0.1}
    mean = trained(batch, tasks=1, **options)
    torch.testing.assert_close(mean, sequential(batch, penalty, 0.1))
    without = sequential(batch, "none", 0.1)
    assert torch.allclose(mean, without, atol=1e-4) == (penalty == "none")


def test_without_training_it_is_the_mean_of_the_starts() -> None:
    mean = trained(regression_batch(SPEC), tasks=2, fit_steps=0)
    torch.testing.assert_close(mean, torch.stack(starts()).mean(0))


def test_the_starts_are_the_backbones_own_and_each_another() -> None:
    draws = torch.stack(starts(linear_backbone, 2000))
    # nn.Linear of three inputs draws from U(-1/sqrt(3), 1/sqrt(3)), of variance 1/9; the
    # parameter before its four is the helper's zero.
    assert draws.shape == (2000, 5)
    assert not draws[:, 0].any()
    assert draws[:, 1:].abs().max() <= 3**-0.5
    assert draws[:, 1:].mean(0).abs().max() < 4 * (1 / 9 / 2000) ** 0.5
    torch.testing.assert_close(draws[:, 1:].var(), torch.tensor(1 / 9).double(), rtol=0.05, atol=0)
    assert len(draws.unique(dim=0)) == 2000
    assert not torch.equal(draws[:2], torch.stack(starts(linear_backbone, 2, seed=1)))


def test_the_starts_neither_read_nor_move_the_global_generator() -> None:
    algorithm = make(MultiTask, SPEC, MLP)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one = algorithm._starts(0, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(8)
    assert torch.equal(algorithm._starts(0, 2), one)
    assert torch.equal(algorithm._starts(1, 1), one[1:])


@pytest.mark.parametrize("penalty", ["none", "l2"])
def test_the_number_of_tasks_in_an_update_is_without_meaning(penalty: str) -> None:
    batch = regression_batch(SPEC)
    means = [trained(batch, tasks=tasks, fit_steps=9, penalty=penalty) for tasks in (1, 3, 4)]
    torch.testing.assert_close(means[1], means[0])
    torch.testing.assert_close(means[2], means[0])


def test_a_linear_model_of_one_task_ends_at_least_squares() -> None:
    batch = regression_batch(SPEC, tasks=1)
    mean = trained(batch, backbone=linear_backbone, fit_steps=3000, fit_lr=0.01)
    x = torch.cat([batch.support_x, batch.query_x], 1)[0]
    y = torch.cat([batch.support_y, batch.query_y], 1)[0]
    exact = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution[:, 0]
    torch.testing.assert_close(mean[1:], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_huge_decay_draws_the_models_to_zero() -> None:
    options = {"fit_steps": 1000, "fit_lr": 0.01, "penalty": "l2", "decay": 1e6}
    assert trained(regression_batch(SPEC), **options).abs().max() < 1e-4


@pytest.mark.slow
def test_a_huge_decay_draws_the_models_to_their_mean() -> None:
    batch = regression_batch(SPEC)
    algorithm = make(MultiTask, SPEC, MLP, fit_steps=1000, fit_lr=0.01, penalty="mean", decay=1e6)
    algorithm.update(batch[:1], Progress(0, 10))
    first = mean_of(algorithm)
    assert first.abs().max() > 0.1
    algorithm.update(batch[1:], Progress(1, 10))
    torch.testing.assert_close(mean_of(algorithm), first, rtol=0, atol=1e-4)


def test_the_models_of_one_update_share_the_mean_before_it() -> None:
    batch = regression_batch(SPEC)
    options = {"fit_steps": 9, "penalty": "mean", "decay": 1.0}
    first = trained(batch[:2], **options)
    none = trained(batch[:2], fit_steps=9)
    torch.testing.assert_close(first, none)
    assert not torch.allclose(trained(batch, tasks=2, **options), trained(batch, fit_steps=9))


def test_the_reported_loss_is_that_of_the_models_on_all_rows() -> None:
    batch = regression_batch(SPEC, tasks=1)
    algorithm = make(MultiTask, SPEC, MLP, fit_steps=9)
    metrics = algorithm.update(batch, Progress(0, 10))
    x = torch.cat([batch.support_x, batch.query_x], 1)[0]
    y = torch.cat([batch.support_y, batch.query_y], 1)[0]
    # The mean of one model is the model.
    expected = nn.functional.mse_loss(algorithm.net(x), y).detach()
    torch.testing.assert_close(metrics["loss"], expected)
    torch.testing.assert_close(metrics["mse"], expected)


def test_predictions_are_those_of_the_mean_after_plain_gradient_descent() -> None:
    batch = regression_batch(SPEC)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    algorithm = make(MultiTask, SPEC, linear_backbone, fit_steps=5, inner_lr=0.05, inner_steps=3)
    algorithm.update(batch, Progress(0, 10))
    trace = algorithm.trace(*rows, 3)
    for i in range(batch.num_tasks):
        weights = mean_of(algorithm)[1:]
        x = torch.cat([batch.support_x[i], torch.ones(5, 1)], 1)
        query = torch.cat([batch.query_x[i], torch.ones(5, 1)], 1)
        for step in range(4):
            torch.testing.assert_close(trace[step, i, :, 0], query @ weights)
            residual = x @ weights - batch.support_y[i, :, 0]
            weights = weights - 0.05 * 2 * x.T @ residual / 5
    torch.testing.assert_close(algorithm.predict(*rows).outputs, trace[3])


def test_the_running_statistics_are_the_mean_of_the_models_own() -> None:
    batch = regression_batch(SPEC)
    backbone = TINY_BACKBONES["mlp with batch norm"]
    algorithm = make(MultiTask, SPEC, backbone, fit_steps=0)
    for step, chunk in enumerate(batch.chunks(3)):
        algorithm.update(chunk, Progress(step, 10))
    x = torch.cat([batch.support_x, batch.query_x], 1)
    # The first six rows of three and six biases are the first layer.
    seen = [x[i] @ start[:18].view(6, 3).T + start[18:24] for i, start in enumerate(starts(MLP))]
    torch.testing.assert_close(
        algorithm.net.body.norms[0].running_mean, torch.stack([s.mean(0) for s in seen]).mean(0)
    )


@pytest.mark.parametrize("engine", ["vmap", "threads"])
@pytest.mark.parametrize("backbone", ["mlp", "mlp with batch norm"])
def test_the_engines_agree(engine: str, backbone: str) -> None:
    batch = regression_batch(SPEC)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    answers = []
    for kind in ("loop", engine):
        algorithm = make(
            MultiTask, SPEC, TINY_BACKBONES[backbone], engine=kind, fit_steps=9, penalty="l2"
        )
        algorithm.update(batch, Progress(0, 10))
        answers.append(algorithm.predict(*rows).outputs)
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-8, atol=1e-8)


def test_an_infinite_loss_changes_nothing() -> None:
    batch = regression_batch(SPEC)
    bad = replace(batch, support_y=batch.support_y * float("inf"))
    algorithm = make(MultiTask, SPEC, MLP, fit_steps=2)
    before = mean_of(algorithm)
    with pytest.raises(NonFiniteError, match="loss is"):
        algorithm.update(bad, Progress(0, 10))
    assert torch.equal(mean_of(algorithm), before)
    assert algorithm.models == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fit_steps": -1}, "algo.fit_steps=-1"),
        ({"fit_lr": 0.0}, "algo.fit_lr=0.0"),
        ({"decay": -0.1}, "algo.decay=-0.1"),
        ({"inner_lr": 0.0}, "algo.inner_lr=0.0"),
        ({"inner_steps": -1}, "algo.inner_steps=-1"),
    ],
)
def test_bad_numbers_and_words_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(MultiTask, SPEC, MLP, **options)


def test_it_learns_regressions_alone() -> None:
    with pytest.raises(ValueError, match="MultiTask learns regression"):
        make(MultiTask, image_spec(), MLP)
