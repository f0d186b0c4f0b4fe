"""Feature map reconstruction against inverses, loops and least squares."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from metarun.algorithms.metric.frn import FRN, reconstruction_errors
from metarun.backbones.conv4 import Conv4
from metarun.backbones.layers.context import BATCH_STATISTICS as CTX
from tests.helpers import TINY_BACKBONES, image_batch, image_spec, make, moved

CONV = partial(Conv4, filters=[4, 5], blocks=2)


def drawn(*shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.rand(*shape, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("depth", [5, 20])
def test_errors_are_those_of_the_paper_written_with_an_inverse(depth: int) -> None:
    support, query = drawn(4, 12, depth), drawn(6, 3, depth)
    alpha, beta = torch.tensor([0.3, -0.2], dtype=torch.float64)
    errors = reconstruction_errors(support, query, alpha.exp(), beta.exp())
    for number, rows in enumerate(support):
        system = rows @ rows.T + (12 / depth * alpha.exp() + 1e-6) * torch.eye(
            12, dtype=torch.float64
        )
        hat = beta.exp() * rows.T @ torch.linalg.inv(system) @ rows
        for own, found in zip(query, errors[:, number], strict=True):
            torch.testing.assert_close((own - own @ hat).square().sum(1).mean(), found)


def test_without_a_penalty_the_error_is_the_distance_from_the_span() -> None:
    support, query = drawn(2, 3, 8), drawn(4, 2, 8)
    errors = reconstruction_errors(support, query, torch.tensor(1e-9), torch.tensor(1.0))
    for number, rows in enumerate(support):
        fitted = torch.linalg.lstsq(rows.T, query.flatten(0, 1).T).solution.T @ rows
        expected = (query.flatten(0, 1) - fitted).square().sum(1).view(4, 2).mean(1)
        torch.testing.assert_close(errors[:, number], expected, rtol=1e-4, atol=1e-5)


def test_a_class_is_the_features_of_all_positions_of_its_rows_in_any_order() -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=1, shot=2)
    algorithm = make(FRN, spec, CONV, scale=3.0)
    with torch.no_grad():
        algorithm.net.alpha.fill_(0.4)
        algorithm.net.beta.fill_(0.1)
    support_x, support_y, query_x = batch.support_x[0], batch.support_y[0], batch.query_x[0]
    maps = algorithm.net.features(torch.cat([support_x, query_x]))
    assert maps.shape[1:] == (5, 2, 2)
    rows = maps.flatten(2).transpose(1, 2) / math.sqrt(5)
    support = torch.stack([rows[:6][support_y == label].flatten(0, 1) for label in range(3)])
    errors = reconstruction_errors(
        support, rows[6:], torch.tensor(0.4).exp(), torch.tensor(0.1).exp()
    )
    for order in (torch.arange(6), torch.tensor([5, 2, 0, 1, 4, 3])):
        found = algorithm.predict(support_x[None, order], support_y[None, order], query_x[None])
        torch.testing.assert_close(found.outputs[0], -3.0 * errors, rtol=1e-4, atol=1e-6)


def test_all_pairs_are_the_tasks_with_every_set_as_support() -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=1, shot=1, query=2)
    one = make(FRN, spec, CONV, all_pairs=True)
    x = torch.cat([batch.support_x[0], batch.query_x[0]])
    y = torch.cat([batch.support_y[0], batch.query_y[0]])
    net, params = one.net, dict(one.net.named_parameters())
    outputs, targets = one.outputs_and_targets(net, params, x[:3], y[:3], x[3:], y[3:], 3, CTX)
    expected, labels = [], []
    for first in (0, 3, 6):
        support = torch.arange(first, first + 3)
        others = [row for row in range(9) if row not in support]
        # Batch norm normalizes all rows together, so they pass in one batch.
        features = net.features(x).flatten(2).transpose(1, 2) / math.sqrt(5)
        ones = torch.ones(2, dtype=torch.float64)
        expected.append(-reconstruction_errors(features[support], features[others], *ones))
        labels.append(y[others])
    loss = torch.nn.functional.cross_entropy(torch.cat(expected), torch.cat(labels))
    torch.testing.assert_close(torch.nn.functional.cross_entropy(outputs, targets), loss)
    assert len(targets) == 3 * 3 * 2


def test_its_gradients_are_those_of_finite_differences() -> None:
    inputs = (drawn(2, 3, 4), drawn(3, 2, 4), drawn(1)[0] + 0.5, drawn(2)[0] + 0.5)
    assert torch.autograd.gradcheck(
        reconstruction_errors, tuple(each.requires_grad_() for each in inputs)
    )


def test_the_penalty_the_factor_and_the_scale_are_learned() -> None:
    spec = image_spec()
    gradient = moved(make(FRN, spec, CONV), image_batch(spec, tasks=1))
    assert all(gradient[f"net.{name}"] != 0 for name in ("alpha", "beta", "gamma"))


@pytest.mark.parametrize("engine", ["vmap", "threads"])
@pytest.mark.parametrize("all_pairs", [True, False])
def test_the_engines_agree(engine: str, all_pairs: bool) -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=4, shot=1)
    expected = moved(make(FRN, spec, CONV, all_pairs=all_pairs), batch)
    found = moved(make(FRN, spec, CONV, engine=engine, all_pairs=all_pairs), batch)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"algo\.scale=0: expected a positive number"):
        make(FRN, image_spec(), CONV, scale=0)
    batch = image_batch(image_spec())
    with pytest.raises(ValueError, match="FRN needs the same number of support rows of each class"):
        make(FRN, image_spec(), CONV).predict(
            batch.support_x[:, :5], batch.support_y[:, :5], batch.query_x
        )
    spec = replace(image_spec(), train_shot=2)
    with pytest.raises(ValueError, match=r"all_pairs=true needs one support row .* train\.shot=1"):
        make(FRN, spec, CONV, all_pairs=True)
    with pytest.raises(ValueError, match=r"FRN compares feature maps.*conv4"):
        make(FRN, image_spec(), TINY_BACKBONES["mlp"])
