"""Mixtures of initializations: EM computed by hand, its likelihood, and MAML with one component."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metarun.algorithms.optimization.maml import MAML
from metarun.algorithms.outer_optimizer import OuterOptimizer
from metarun.algorithms.probabilistic.mixture import Mixture
from metarun.core.types import Progress, TaskBatch
from tests.helpers import (
    TINY_BACKBONES,
    image_batch,
    image_spec,
    linear_backbone,
    make,
    moved,
    regression_batch,
    regression_spec,
    slow,
)


def mixture(components: int = 3, backbone: Any = linear_backbone, **options: Any) -> Any:
    return make(Mixture, regression_spec(), backbone, components=components, **options)


def believed(algorithm: Any, fits: Tensor, rows: int, *, opening: bool = False) -> Tensor:
    """Return responsibilities with the algorithm's current prior and temperature."""
    prior = algorithm.log_prior(opening=opening)
    found: Tensor = algorithm.responsibilities(fits, rows, prior, algorithm.temperature)
    return found


@pytest.mark.parametrize("backbone", list(TINY_BACKBONES))
@pytest.mark.parametrize("assign", ["soft", "hard"])
def test_one_component_is_maml(backbone: str, assign: str) -> None:
    batch, spec = image_batch(image_spec()), image_spec()
    options = {"inner_lr": 0.2, "inner_steps": 2}
    one = make(Mixture, spec, TINY_BACKBONES[backbone], components=1, assign=assign, **options)
    maml = make(MAML, spec, TINY_BACKBONES[backbone], **options)
    for name, parameter in maml.net.named_parameters():
        dict(one.net[0].named_parameters())[name].data.copy_(parameter)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    torch.testing.assert_close(
        one.predict(*rows).outputs.softmax(-1), maml.predict(*rows).outputs.softmax(-1)
    )
    ours, theirs = moved(one, batch), moved(maml, batch)
    for name, gradient in theirs.items():
        assert torch.equal(ours[name.replace("net.", "net.0.")], gradient)
    found, expected = one.trace(*rows, 3), maml.trace(*rows, 3)
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1))


def naive(algorithm: Any, batch: TaskBatch, task: int, lr: float) -> tuple[list[Any], list[Any]]:
    """Return the losses of one task's components of a linear model after one inner step."""
    fits, losses = [], []
    x, y = batch.support_x[task], batch.support_y[task]
    for net in algorithm.net:
        weight, bias = net.head.weight, net.head.bias
        loss = (F.linear(x, weight, bias) - y).square().mean()
        grads = torch.autograd.grad(loss, [weight, bias], create_graph=True)
        adapted = [p - lr * g for p, g in zip((weight, bias), grads, strict=True)]
        fits.append((F.linear(x, *adapted) - y).square().mean())
        answers = F.linear(batch.query_x[task], *adapted)
        losses.append((answers - batch.query_y[task]).square().mean())
    return fits, losses


@pytest.mark.parametrize("engine", ["vmap", "loop", "threads"])
@pytest.mark.parametrize("assign", ["soft", "hard"])
def test_a_step_is_the_gradient_of_the_losses_by_hand_computed_responsibilities(
    engine: str, assign: str
) -> None:
    options: dict[str, Any] = {"inner_lr": 0.1, "temperature": 2.5, "assign": assign}
    algorithm, batch = mixture(engine=engine, **options), regression_batch(regression_spec())
    total = torch.zeros((), dtype=torch.float64)
    expected_shares = []
    for task in range(4):
        fits, losses = naive(algorithm, batch, task, 0.1)
        weights = [math.exp(-5 * fit.item() / 2.5) for fit in fits]
        shares = [weight / sum(weights) for weight in weights]
        if assign == "hard":
            shares = [float(share == max(shares)) for share in shares]
        expected_shares.append(shares)
        total = total + sum(s * loss for s, loss in zip(shares, losses, strict=True)) / 4
    names, values = zip(
        *((n, p) for n, p in algorithm.net.named_parameters() if "head" in n), strict=True
    )
    expected = torch.autograd.grad(total, values)
    answer = algorithm.predict(batch.support_x, batch.support_y, batch.query_x)
    torch.testing.assert_close(answer.embedding, torch.tensor(expected_shares).double())
    torch.testing.assert_close(answer.embedding.sum(1), torch.ones(4).double())
    found = moved(algorithm, batch)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[f"net.{name}"], gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(algorithm.counts, torch.tensor(expected_shares).double().sum(0))


def likelihood(algorithm: Any, batch: TaskBatch, sigma: float) -> float:
    """Return the log-likelihood of the tasks' values under a mixture of lines with normal noise."""
    total = 0.0
    for x, y in zip(batch.support_x.numpy(), batch.support_y.numpy(), strict=True):
        terms = []
        for net in algorithm.net:
            line = net.head.weight.detach().numpy()[0], net.head.bias.detach().numpy()
            residuals = y[:, 0] - (x @ line[0] + line[1])
            densities = -0.5 * (residuals / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi))
            terms.append(densities.sum() - math.log(len(algorithm.net)))
        total += np.logaddexp.reduce(terms)
    return total


@pytest.mark.parametrize("assign", ["soft", slow("hard")])
def test_on_linear_gaussian_tasks_the_likelihood_never_falls_and_the_lines_are_found(
    assign: str,
) -> None:
    draw = torch.Generator().manual_seed(4)
    lines = torch.tensor([[2.0, 0.0, 1.0], [-1.0, 1.5, 0.0], [0.0, -2.0, -1.0]]).double()
    truth = torch.arange(30) % 3
    x = torch.randn(30, 6, 3, generator=draw, dtype=torch.float64)
    noise = 0.2 * torch.randn(30, 6, 1, generator=draw, dtype=torch.float64)
    y = torch.einsum("trf,tf->tr", x, lines[truth])[..., None] + noise
    # Support and query are the same rows, so an update is a generalized EM step.
    batch = TaskBatch(x, y, x, y)
    slow = partial(OuterOptimizer, method="sgd", lr=0.05)
    algorithm = mixture(inner_steps=0, temperature=2 * 0.5**2, assign=assign, optim=slow, seed=1)
    reached = [likelihood(algorithm, batch, 0.5)]
    for step in range(150):
        algorithm.update(batch, Progress(step, 150))
        reached.append(likelihood(algorithm, batch, 0.5))
    if assign == "soft":
        assert all(after >= before - 1e-9 for before, after in pairwise(reached))
    assert reached[-1] > reached[0]
    shares = algorithm.predict(x, y, x).embedding
    groups = [set(shares.argmax(1)[truth == k].tolist()) for k in range(3)]
    assert sorted(map(len, groups)) == [1, 1, 1]
    assert len(set.union(*groups)) == 3


def test_a_prior_that_is_learned_is_the_share_of_tasks_with_one_more_each() -> None:
    algorithm = mixture(prior="learned", memory=0.5)
    assert algorithm.log_prior(opening=False).tolist() == [0.0, 0.0, 0.0]
    algorithm._seat(torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]).double())
    algorithm._seat(torch.tensor([[0.0, 0.0, 1.0]]).double())
    counts = torch.tensor([0.75, 0.25, 1.0]).double()
    torch.testing.assert_close(algorithm.counts, counts)
    shares = algorithm.log_prior(opening=True).softmax(0)
    torch.testing.assert_close(shares, (counts + 1) / (counts + 1).sum())
    fits = torch.tensor([1.0, 2.0, 3.0]).double()
    scores = (counts + 1) * torch.exp(-4 * fits)
    torch.testing.assert_close(believed(algorithm, fits, 4), scores / scores.sum())


def test_a_restaurant_begins_with_one_table_and_opens_the_next_when_it_is_likeliest() -> None:
    algorithm = mixture(prior="crp", concentration=2.0)
    near, far = torch.tensor([0.0, 9.0, 9.0]).double(), torch.tensor([9.0, 0.0, 0.0]).double()
    given = partial(believed, algorithm, rows=5, opening=True)
    assert given(far).tolist() == [1.0, 0.0, 0.0]
    algorithm._seat(given(torch.stack([near, near, near])))
    # Three tasks at the first table and concentration 2: weights 3 and 2, and none for a third.
    flat = torch.zeros(3).double()
    torch.testing.assert_close(given(flat), torch.tensor([0.6, 0.4, 0.0]).double())
    # At evaluation no component opens.
    assert believed(algorithm, far, 5).tolist() == [1.0, 0.0, 0.0]
    assert int(algorithm.grown) == 1
    algorithm._seat(given(far[None]))
    assert int(algorithm.grown) == 2
    torch.testing.assert_close(given(flat), torch.tensor([3 / 6, 1 / 6, 2 / 6]).double())
    torch.testing.assert_close(
        believed(algorithm, flat, 5), torch.tensor([3 / 4, 1 / 4, 0]).double()
    )
    for _ in range(2):
        algorithm._seat(torch.tensor([[0.0, 0.0, 1.0]]).double())
    assert int(algorithm.grown) == 3
    again = mixture(prior="crp", concentration=2.0)
    again.load_state_dict(algorithm.state_dict())
    assert torch.equal(again.log_prior(opening=True), algorithm.log_prior(opening=True))


@pytest.mark.parametrize("engine", ["vmap", "loop", "threads"])
@pytest.mark.parametrize("assign", ["soft", "hard"])
def test_updates_open_components_and_leave_those_that_are_not_open(
    engine: str, assign: str
) -> None:
    options = {"prior": "crp", "assign": assign, "engine": engine, "temperature": 0.01}
    algorithm, batch = mixture(**options, inner_lr=0.01), regression_batch(regression_spec())
    gradient = moved(algorithm, batch)
    assert gradient["net.0.head.weight"].abs().max() > 0.0
    assert all(not gradient[f"net.{k}.head.weight"].any() for k in (1, 2))
    assert int(algorithm.grown) == 1
    # The second component fits these tasks exactly, so they are not the third's.
    second = algorithm.net[1].head
    y = F.linear(batch.support_x, second.weight, second.bias).detach()
    task = replace(batch, support_y=y, query_y=batch.query_y)
    gradient = moved(algorithm, task)
    assert gradient["net.1.head.weight"].abs().max() > 0.0
    assert not gradient["net.2.head.weight"].any()
    assert int(algorithm.grown) == 2


def test_a_component_that_is_forgotten_stays_possible() -> None:
    algorithm = mixture(prior="crp", memory=0.0)
    algorithm.grown.fill_(2)
    algorithm._seat(torch.tensor([[1.0, 0.0, 0.0]]).double())
    best_of_second = torch.tensor([9.0, 0.0, 9.0]).double()
    assert believed(algorithm, best_of_second, 5).argmax() == 1


@pytest.mark.parametrize("assign", ["soft", "hard"])
def test_a_trace_ends_with_the_answers(assign: str) -> None:
    options = {"assign": assign, "inner_steps": 2, "temperature": 3.0}
    algorithm, batch = mixture(**options), regression_batch(regression_spec())
    rows = (batch.support_x, batch.support_y, batch.query_x)
    torch.testing.assert_close(algorithm.trace(*rows, 2)[-1], algorithm.predict(*rows).outputs)


def test_classes_are_answered_by_the_mixture_of_their_probabilities() -> None:
    spec = image_spec()
    algorithm = make(Mixture, spec, linear_backbone, components=2)
    answers = torch.randn(2, 5, 3, dtype=torch.float64)
    shares = torch.tensor([0.3, 0.7]).double()
    expected = 0.3 * answers[0].softmax(1) + 0.7 * answers[1].softmax(1)
    torch.testing.assert_close(algorithm.mixed(answers, shares).exp(), expected)
    alone = algorithm.mixed(answers, torch.tensor([1.0, 0.0]).double())
    torch.testing.assert_close(alone.exp(), answers[0].softmax(1))


def test_components_are_not_alike_at_the_start() -> None:
    heads = [net.head.weight for net in mixture().net]
    assert not torch.equal(heads[0], heads[1])


def test_support_rows_count_by_their_number() -> None:
    """Duplicated rows square the odds of the components."""
    algorithm, batch = mixture(inner_steps=0, temperature=20.0), regression_batch(regression_spec())
    twice = replace(
        batch, support_x=batch.support_x.repeat(1, 2, 1), support_y=batch.support_y.repeat(1, 2, 1)
    )
    once, more = (
        algorithm.predict(b.support_x, b.support_y, b.query_x).embedding for b in (batch, twice)
    )
    squared = once.square()
    torch.testing.assert_close(more, squared / squared.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"components": 0}, "algo.components=0: expected 1 to 1000"),
        ({"temperature": 0.0}, "algo.temperature=0.0: expected a positive number"),
        ({"temperature": (2.0, 0.0)}, "algo.temperature=0.0: expected a positive number"),
        ({"anneal": 0.0}, "algo.anneal=0.0: expected a positive number"),
        ({"concentration": -1.0}, "algo.concentration=-1.0: expected a positive number"),
        ({"memory": 2.0}, "algo.memory=2.0: expected 0 to 1"),
        ({"inner_lr": 0.0}, "algo.inner_lr=0.0: expected a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mixture(**{"components": 3, **options})


def test_the_temperature_falls_by_the_same_factor_and_stays_at_its_end() -> None:
    algorithm, batch = (
        mixture(temperature=(16.0, 1.0), anneal=0.8),
        regression_batch(regression_spec()),
    )
    seen = []
    for step in range(0, 100, 20):
        algorithm.update(batch, Progress(step, 100))
        seen.append(float(algorithm.temperature))
    np.testing.assert_allclose(seen, [16.0, 8.0, 4.0, 2.0, 1.0])
    # The temperature is part of the state: a restored algorithm predicts with the saved one.
    again = mixture(temperature=(16.0, 1.0))
    again.load_state_dict(algorithm.state_dict())
    fits = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.equal(believed(again, fits, 2), believed(algorithm, fits, 2))
    expected = (-2.0 * fits).softmax(1)
    torch.testing.assert_close(believed(again, fits, 2), expected)


@pytest.mark.slow
def test_a_balanced_prior_lets_no_component_starve() -> None:
    spec = regression_spec()
    frozen = partial(OuterOptimizer, method="sgd", lr=1e-9)
    options: dict[str, Any] = {"inner_steps": 0, "temperature": 5.0, "optim": frozen}
    config, balanced = mixture(**options), mixture(prior="balanced", **options)
    for algorithm in (config, balanced):
        with torch.no_grad():
            # One component predicts all tasks better than the others.
            for number, net in enumerate(algorithm.net):
                for parameter in net.parameters():
                    parameter.fill_(0.3 * number)
        for step in range(400):
            algorithm.update(regression_batch(spec, tasks=8, seed=step), Progress(step, 400))
    batch = regression_batch(spec, tasks=200, seed=999)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    shares = [own.predict(*rows).responsibilities.mean(0) for own in (config, balanced)]
    assert shares[0].max() > 0.45
    torch.testing.assert_close(shares[1], torch.full_like(shares[1], 1 / 3), atol=0.08, rtol=0.0)
