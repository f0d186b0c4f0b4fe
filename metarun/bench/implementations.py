"""Our implementation of a workload: its tasks, its algorithm and one step.

Small grayscale images are the characters of the package. Other images are random numbers, since
miniImageNet cannot ship with the package and the content of an image does not affect the time.

Shapes: T tasks, S support rows, Q query rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metarun.algorithms.base import Algorithm, LearnerSetup
from metarun.algorithms.memory.mann import MANN
from metarun.algorithms.metric.protonet import ProtoNet
from metarun.algorithms.optimization.maml import MAML
from metarun.algorithms.outer_optimizer import OuterOptimizer
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP, Flat
from metarun.backbones.network import set_mixed
from metarun.backbones.resnet12 import ResNet12
from metarun.bench.networks import resnet_widths
from metarun.bench.workloads import Variant, Workload
from metarun.core.types import (
    EpisodeSize,
    EpisodeSource,
    Progress,
    SourceSetup,
    Split,
    TaskBatch,
    TaskSpec,
)
from metarun.data.omniglot import OmniglotSmall
from metarun.data.synthetic import Sinusoid
from metarun.evaluation.episodes import evaluate
from metarun.execution.engine import Engine
from metarun.training.run_state import RunState
from metarun.training.tasks import TrainingTasks
from metarun.training.updates import Updates

Step = Callable[[], object]

EPISODES_AT_ONCE = 25
"""Episodes per batch of an evaluation, as in `eval.tasks_per_batch`."""

_NO_PROGRESS = Progress(0, 1)
_ENDLESS = 10**9
# The time of a step does not depend on the rate, and this one hardly changes the weights.
_OUTER_LR = 1e-7


def has_source(workload: Workload) -> bool:
    """Return whether the package has the workload's data; a character has 20 drawings."""
    return workload.backbone == "mlp" or (
        workload.channels == 1 and workload.image <= 105 and workload.shot + workload.query <= 20
    )


def source_of(
    workload: Workload, device: torch.device, dtype: torch.dtype = torch.float32
) -> EpisodeSource:
    """Return the source of the workload's tasks, for data that the package has."""
    size = EpisodeSize(workload.way, workload.shot, workload.query)
    sizes: dict[Split, EpisodeSize] = {"train": size, "val": size, "test": size}
    setup = SourceSetup(sizes=sizes, seed=0, eval_seed=0, device=device, dtype=dtype)
    if workload.backbone == "mlp":
        return Sinusoid(setup)
    return OmniglotSmall(setup, image_size=workload.image)


def spec_of(workload: Workload) -> TaskSpec:
    """Return the task specification of a workload."""
    if workload.backbone == "mlp":
        return TaskSpec("regression", (1,), 1, 1)
    shape = (workload.channels, workload.image, workload.image)
    return TaskSpec("classification", shape, workload.way, workload.way)


def batch_of(workload: Workload, device: torch.device, dtype: torch.dtype) -> TaskBatch:
    """Return the tasks of a training step."""
    if has_source(workload):
        return source_of(workload, device, dtype).batch("train", 0, workload.tasks)
    draw = torch.Generator().manual_seed(0)
    shape = spec_of(workload).input_shape

    def rows(of_a_class: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(workload.way).repeat(of_a_class).expand(workload.tasks, -1)
        images = torch.randn(*labels.shape, *shape, generator=draw)
        return images.to(device, dtype), labels.contiguous().to(device)

    return TaskBatch(*rows(workload.shot), *rows(workload.query))


def algorithm_of(
    workload: Workload,
    variant: Variant,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    outer_lr: float = _OUTER_LR,
    threads: int | None = None,
) -> Algorithm:
    """Return the algorithm of a workload; repeated calls give the same weights.

    Args:
        workload: Workload of training steps or of an evaluation.
        variant: Engine, precision and memory options.
        device: Device of the parameters.
        dtype: Type of the parameters.
        outer_lr: Learning rate of the outer SGD.
        threads: Threads of the engine; None uses one for each core.
    """
    setup = LearnerSetup(
        spec=spec_of(workload),
        backbone=_backbone(workload),
        optim=(
            partial(OuterOptimizer, method="adam")
            if workload.method == "training"
            else partial(OuterOptimizer, method="sgd", lr=outer_lr)
        ),
        engine=Engine(**variant.engine_options, threads=threads),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        algorithm: Algorithm
        if workload.method == "protonet":
            algorithm = ProtoNet(setup)
        elif workload.method == "mann":
            algorithm = MANN(setup)
        else:
            algorithm = MAML(
                setup,
                inner_lr=workload.inner_lr,
                inner_steps=workload.steps,
                second_order_from=None if workload.first_order else 0,
                recompute=variant.memory == "lean",
            )
    if variant.precision == "mixed":
        set_mixed(algorithm)
    return algorithm.to(device, dtype)


def our_step(
    workload: Workload, variant: Variant, device: torch.device, *, threads: int | None = None
) -> tuple[Step, str]:
    """Return one step of our implementation, and the name of the resolved engine."""
    if workload.method == "sampling":
        source = source_of(workload, device)
        return lambda: source.batch("train", 0, workload.tasks), ""
    algorithm = algorithm_of(workload, variant, device, threads=threads)
    kind = algorithm.resolved_engine().kind
    if workload.method == "evaluation":
        source = source_of(workload, device)
        return lambda: evaluate(
            algorithm, source, "test", workload.tasks, EPISODES_AT_ONCE, measurements=()
        ), kind
    if workload.method == "training":
        return _training(workload, algorithm, source_of(workload, device)), kind
    batch = batch_of(workload, device, torch.float32)
    return lambda: algorithm.update(batch, _NO_PROGRESS), kind


def _training(workload: Workload, algorithm: Algorithm, source: EpisodeSource) -> Step:
    """Return a call of several training steps, each as in a run between two lines of its log."""
    state = RunState(workload.tasks)
    updates = Updates(algorithm, TrainingTasks(source, workload.tasks), _ENDLESS, seed=0)

    def step() -> None:
        end = state.step + workload.updates
        while state.step < end:
            updates.make(state, end - state.step)

    return step


def our_gradient(
    workload: Workload, variant: Variant, device: torch.device
) -> tuple[dict[str, Tensor], Algorithm]:
    """Return the gradient by parameter name, and the algorithm before the step.

    The precision is float64, or float32 for networks that compute in bfloat16.
    """
    dtype = torch.float32 if variant.precision == "mixed" else torch.float64
    # With an outer rate of 1 a step of SGD is the gradient itself.
    algorithm = algorithm_of(workload, variant, device, dtype, outer_lr=1.0)
    before = algorithm_of(workload, variant, device, dtype)
    algorithm.update(batch_of(workload, device, dtype), _NO_PROGRESS)
    after = dict(algorithm.net.named_parameters())
    moved = {n: p.detach() - after[n].detach() for n, p in before.net.named_parameters()}
    return moved, before


def our_answers(
    workload: Workload, variant: Variant, device: torch.device
) -> tuple[Tensor, Algorithm]:
    """Return predictions (T, Q, W) for the first test episodes, and the algorithm.

    The precision is that of `our_gradient`.
    """
    dtype = torch.float32 if variant.precision == "mixed" else torch.float64
    algorithm = algorithm_of(workload, variant, device, dtype)
    batch = source_of(workload, device, dtype).batch("test", 0, workload.tasks)
    answers = algorithm.predict(batch.support_x, batch.support_y, batch.query_x)
    return answers.outputs.detach(), algorithm


def _backbone(workload: Workload) -> Any:
    if workload.backbone == "mlp":
        return partial(MLP, hidden=(40, 40))
    if workload.backbone == "resnet12":
        return partial(ResNet12, widths=resnet_widths(workload.filters), drop_rate=0.0)
    if workload.backbone == "flat":
        return Flat
    return partial(Conv4, filters=workload.filters)
