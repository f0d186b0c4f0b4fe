"""SimpleShot against nearest neighbors, hand computation and the exact mean feature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from metarun.algorithms.baselines.simpleshot import SimpleShot
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Progress
from tests.helpers import TINY_BACKBONES, labeled_batch, labeled_spec, linear_backbone, make

CONV = TINY_BACKBONES["conv4 max-pool"]


def test_with_one_shot_and_l2_it_is_the_nearest_neighbor_by_cosine() -> None:
    batch = labeled_batch(tasks=20, shot=1, query=5)
    algorithm = make(SimpleShot, labeled_spec(), linear_backbone, transform="l2")
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    similarity = nn.functional.cosine_similarity(
        batch.query_x.flatten(2)[:, :, None], batch.support_x.flatten(2)[:, None], dim=-1
    )
    nearest = batch.support_y.gather(1, similarity.argmax(-1))
    assert torch.equal(outputs.argmax(-1), nearest)
    # |a - b|^2 = 2 - 2 cos(a, b) of unit vectors; labels are 0, 1, 2 in order here.
    torch.testing.assert_close(outputs, 2 * similarity - 2)


@pytest.mark.parametrize("transform", ["none", "l2", "cl2"])
def test_a_logit_is_minus_the_squared_distance_to_the_mean_of_transformed_features(
    transform: str,
) -> None:
    batch = labeled_batch(tasks=2, shot=3)
    algorithm = make(SimpleShot, labeled_spec(), linear_backbone, transform=transform)
    algorithm.feature_mean.copy_(torch.linspace(-1.0, 1.0, 64))
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs

    def changed(x: Any) -> Any:
        x = x.flatten() - (algorithm.feature_mean if transform == "cl2" else 0.0)
        return x if transform == "none" else x / x.square().sum().sqrt()

    for task in range(2):
        for k in range(3):
            rows = batch.support_x[task][batch.support_y[task] == k]
            center = sum(changed(row) for row in rows) / 3
            for q, row in enumerate(batch.query_x[task]):
                expected = -(changed(row) - center).square().sum()
                torch.testing.assert_close(outputs[task, q, k], expected)


def test_the_mean_feature_is_gathered_under_running_statistics_after_each_update() -> None:
    algorithm = make(SimpleShot, labeled_spec(), CONV, mean_momentum=0.25)
    expected = torch.zeros(12, dtype=torch.float64)
    for step, weight in enumerate([1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 4, 1 / 4]):
        batch = labeled_batch(seed=step)
        algorithm.update(batch, Progress(step, 6))
        rows = torch.cat([batch.support_x, batch.query_x], 1).flatten(0, 1)
        mean = algorithm.net(rows, ForwardContext(running=True)).mean(0).detach()
        expected = (1 - weight) * expected + weight * mean
        torch.testing.assert_close(algorithm.feature_mean, expected)


def test_the_mean_feature_is_part_of_the_state() -> None:
    algorithm = make(SimpleShot, labeled_spec(), CONV)
    assert "feature_mean" in algorithm.state_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean_momentum": 0.0}, "algo.mean_momentum=0.0"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(SimpleShot, labeled_spec(), CONV, **options)
