"""Small networks, batches and algorithms that the tests share."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, LearnerSetup
from metarun.algorithms.outer_optimizer import OuterOptimizer
from metarun.backbones.conv4 import Conv4
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.mlp import MLP
from metarun.backbones.network import Network
from metarun.backbones.resnet12 import ResNet12
from metarun.backbones.resnet18 import ResNet18
from metarun.backbones.vit import ViT
from metarun.backbones.wrn28_10 import WRN28x10
from metarun.config.composition import Composer, composer
from metarun.config.schema import Config
from metarun.core.types import TaskBatch, TaskSpec
from metarun.execution.engine import Engine

TINY_BACKBONES: dict[str, Any] = {
    "mlp": partial(MLP, hidden=[6, 5]),
    "mlp with batch norm": partial(MLP, hidden=[6, 5], batch_norm=True, activation="tanh"),
    "conv4 max-pool": partial(Conv4, filters=3, blocks=2),
    # Its first block has as many filters as a patch has values, and is computed from patches.
    "conv4 of patches": partial(Conv4, filters=[9, 3], blocks=2),
    "conv4 stride": partial(Conv4, filters=3, blocks=2, downsample="stride", pool="mean"),
    "conv4 as in MAML++": partial(
        Conv4, filters=3, blocks=2, activation="leaky_relu", init="xavier_uniform"
    ),
    "conv4 rounding up": partial(Conv4, filters=3, blocks=2, downsample="max_pool_ceil"),
    "conv4 instance norm": partial(Conv4, filters=3, blocks=2, norm="instance"),
    "resnet12": partial(ResNet12, widths=[2, 3], drop_rate=0.2, block_size=3),
    "resnet18": partial(ResNet18, widths=[2, 3, 3, 3]),
    "resnet18 imagenet": partial(ResNet18, widths=[2, 3, 3, 3], stem="imagenet"),
    "wrn28_10": partial(WRN28x10, width=1, blocks=1, drop_rate=0.2),
    "vit": partial(ViT, width=6, depth=1, heads=2, hidden=5, drop_rate=0.2),
}


@cache
def _shipped() -> Composer:
    with composer() as made:
        return made


@cache
def _composed(*words: str) -> Config:
    return _shipped().job(words).config


def composed(*words: str) -> Config:
    """Return the configuration of the words of a run; what was read is kept for all tests."""
    return deepcopy(_composed(*words))


class Identity(nn.Module):
    """A body that returns its input, so that the network is its linear head."""

    def __init__(self) -> None:
        super().__init__()
        # A network without a head needs at least one parameter to be trained.
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # noqa: ARG002
        return x.flatten(1)


def linear_backbone(input_shape: tuple[int, ...], output_dim: int | None) -> Network:
    return Network(Identity(), input_shape, output_dim)


def regression_spec(features: int = 3, outputs: int = 1) -> TaskSpec:
    return TaskSpec("regression", (features,), outputs, 1)


def image_spec(ways: int = 3, train_way: int | None = None, side: int = 8) -> TaskSpec:
    return TaskSpec("classification", (1, side, side), ways, train_way or ways)


def side_for(backbone: str) -> int:
    """Return a side of images at which rounding hardly changes the gradients of a tiny backbone.

    Smaller images leave a stem for ImageNet maps of one pixel. Batch norm of a few numbers then
    magnifies the rounding of an input, and that of an engine, by up to 1e8.
    """
    return 64 if "imagenet" in backbone else 8


def regression_batch(spec: TaskSpec, tasks: int = 4, rows: int = 5, seed: int = 0) -> TaskBatch:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, 2 * rows, *spec.input_shape, generator=draw, dtype=torch.float64)
    y = torch.randn(tasks, 2 * rows, spec.output_dim, generator=draw, dtype=torch.float64)
    return TaskBatch(x[:, :rows], y[:, :rows], x[:, rows:], y[:, rows:])


def image_batch(
    spec: TaskSpec, tasks: int = 3, shot: int = 2, query: int = 2, seed: int = 0
) -> TaskBatch:
    draw = torch.Generator().manual_seed(seed)
    ways = spec.train_way

    def rows(per_class: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(ways).repeat(per_class).expand(tasks, -1)
        x = torch.randn(tasks, y.shape[1], *spec.input_shape, generator=draw, dtype=torch.float64)
        return x, y.contiguous()

    support_x, support_y = rows(shot)
    query_x, query_y = rows(query)
    return TaskBatch(support_x, support_y, query_x, query_y)


def labeled_spec(ways: int = 3) -> TaskSpec:
    """Images of seven training classes."""
    return replace(image_spec(ways), num_train_classes=7)


def labeled_batch(tasks: int = 3, shot: int = 2, query: int = 2, seed: int = 0) -> TaskBatch:
    """Tasks of three of the seven training classes each."""
    ids = torch.stack([torch.arange(7).roll(2 * task)[:3] for task in range(tasks)])
    return replace(image_batch(labeled_spec(), tasks, shot, query, seed), class_ids=ids)


def make(
    kind: type[Algorithm],
    spec: TaskSpec,
    backbone: Any,
    *,
    engine: str = "loop",
    optim: Any = None,
    seed: int = 0,
    bn: Any = "transductive",
    eval_inner_steps: int | None = None,
    **options: Any,
) -> Any:
    """Build an algorithm in float64, by default with plain SGD and learning rate 1."""
    torch.manual_seed(seed)
    setup = LearnerSetup(
        spec=spec,
        backbone=backbone,
        optim=optim or partial(OuterOptimizer, method="sgd", lr=1.0),
        engine=Engine(engine, threads=2),  # type: ignore[arg-type]
        bn=bn,
        eval_inner_steps=eval_inner_steps,
        seed=seed,
    )
    return kind(setup, **options).double()


def moved(algorithm: Algorithm, batch: TaskBatch, step: int = 0) -> dict[str, Tensor]:
    """Return what one update subtracts from each parameter: the gradient, for SGD with rate 1."""
    from metarun.core.types import Progress

    before = {name: p.detach().clone() for name, p in algorithm.named_parameters()}
    algorithm.update(batch, Progress(step, 100))
    return {name: before[name] - p.detach() for name, p in algorithm.named_parameters()}


def slow(*values: Any) -> Any:
    """Parameters with which a test takes long, and is run by `pytest -m slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)
