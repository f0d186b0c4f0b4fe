"""Predictions averaged over views, against torch's affine maps and simple learners."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from metarun.algorithms.metric.protonet import ProtoNet
from metarun.core.types import Adapted, Prediction, TaskSpec
from metarun.data.augmentation import view
from metarun.evaluation.test_time_augmentation import predict
from tests.helpers import linear_backbone, make


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def test_the_first_view_is_the_image_itself(images: Tensor) -> None:
    assert view(images, 0) is images


def test_a_view_is_one_affine_map_for_all_images(images: Tensor) -> None:
    ramps = torch.stack([torch.linspace(-1, 1, 12).expand(12, 12), torch.ones(12, 12)])[:, None]
    column, inside = view(ramps, 3)[:, 0]
    row = view(ramps.transpose(2, 3), 3)[0, 0]
    # Pixel values in the middle of the image show where they came from: a plane in each direction.
    places = torch.stack([column, row])[:, 4:8, 4:8]
    torch.testing.assert_close(inside[4:8, 4:8], torch.ones(4, 4))
    for change in (places.diff(dim=1), places.diff(dim=2)):
        torch.testing.assert_close(
            change, change.mean((1, 2), keepdim=True).expand_as(change), rtol=0, atol=1e-5
        )
    # Linear ramps over pixel centers: 11 pixels from -1 to 1, in an image 12 pixels wide.
    a, b = places.diff(dim=2).mean((1, 2)) * 11 / 2, places.diff(dim=1).mean((1, 2)) * 11 / 2
    middle = (places[:, 1:3, 1:3].mean((1, 2)) * 11 / 12)[:, None]
    theta = torch.cat([a[:, None], b[:, None], middle], 1)
    rows = images.flatten(0, 1)
    grid = functional.affine_grid(theta[None].expand(6, 2, 3), list(rows.shape), False)
    expected = functional.grid_sample(rows, grid, align_corners=False)
    torch.testing.assert_close(view(images, 3).flatten(0, 1), expected, rtol=0, atol=1e-4)


def test_a_view_and_the_next_are_opposite_maps() -> None:
    ramp = torch.linspace(-1, 1, 24).expand(1, 1, 24, 24)
    there, back = view(ramp, 1), view(view(ramp, 1), 2)
    middle = (..., slice(8, 16), slice(8, 16))
    assert (back - ramp)[middle].abs().mean() < 0.3 * (there - ramp)[middle].abs().mean()


def test_answers_are_the_mean_over_views_of_support_and_query(images: Tensor) -> None:
    spec = TaskSpec("classification", (1, 12, 12), 3, 3)
    pixels = make(ProtoNet, spec, linear_backbone)
    support_x, support_y = images, torch.arange(3).expand(2, 3)
    query_x = images.flip(1) * 0.9
    # On pixels the prototype of one shot is the image itself.
    expected = torch.zeros(2, 3, 3)
    for number in range(4):
        a, b = view(support_x, number).flatten(2), view(query_x, number).flatten(2)
        expected -= torch.cdist(b, a).square() / 4
    answer = predict(pixels, support_x, support_y, query_x, 4)
    torch.testing.assert_close(answer.outputs, expected, rtol=1e-4, atol=1e-3)
    once = predict(pixels, support_x, support_y, query_x)
    torch.testing.assert_close(once.outputs, pixels.predict(support_x, support_y, query_x).outputs)


class Chooser:
    """Predicts the means of the rows; its strategies are multiples of them."""

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:  # noqa: ARG002
        return {"shares": support_x.flatten(1).mean(1, keepdim=True)}

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        means = query_x.flatten(2).mean(2, keepdim=True)
        return Prediction(
            means,
            responsibilities=adapted["shares"],
            strategies={"twice": 2.0 * means},
            alternatives={"thrice": 3.0 * means},
        )


def test_ways_of_learning_are_averaged_over_the_same_views(images: Tensor) -> None:
    answer = predict(Chooser(), images, torch.zeros(2, 3), images, 3)  # type: ignore[arg-type]
    assert answer.strategies is not None
    assert answer.alternatives is not None
    torch.testing.assert_close(answer.strategies["twice"], 2.0 * answer.outputs)
    torch.testing.assert_close(answer.alternatives["thrice"], 3.0 * answer.outputs)
    seen = torch.stack([view(images, number).flatten(1).mean(1) for number in range(3)]).mean(0)
    torch.testing.assert_close(answer.responsibilities, seen[:, None])
