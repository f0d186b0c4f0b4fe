"""Difference of our gradients and predictions from a baseline's, on two tasks in float64.

Shapes: T tasks, Q query rows, W ways.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from metarun.bench.baselines import ANSWERS, BACKWARD, network
from metarun.bench.implementations import batch_of, our_answers, our_gradient, source_of
from metarun.bench.networks import paired
from metarun.bench.workloads import Variant, Workload


def differences(
    workload: Workload, variant: Variant, baselines: list[str], device: torch.device
) -> dict[str, float]:
    """Return the largest difference from each baseline, relative to our largest number.

    Gradients are compared, or predictions for an evaluation. A `mixed` variant is not exact; it
    is compared in its own precision with baselines in float64. The result is empty if there is
    nothing to compare.

    Args:
        workload: Workload, which is run in its small size.
        variant: Variant of our implementation.
        baselines: Names of the baselines.
        device: Device of the computation.
    """
    small = workload.small
    if workload.method == "sampling" or not baselines:
        return {}
    # The gradient of a training step is that of its tasks.
    small = replace(small, method="maml") if small.method == "training" else small
    if workload.method == "evaluation":
        return _of_answers(small, variant, baselines, device)
    ours, algorithm = our_gradient(small, variant, device)
    found = {}
    for name in baselines:
        net = network(small, device, torch.float64)
        BACKWARD[workload.method][name](net, small, batch_of(small, device, torch.float64))
        names = (
            [(n, p) for n, p in net.named_parameters()]
            if small.method == "mann"
            else list(paired(algorithm.net, net))
        )
        theirs = {n: p.grad for n, p in names if p.grad is not None}
        found[name] = _largest([ours[n] for n in theirs], list(theirs.values()))
    return found


def _of_answers(
    workload: Workload, variant: Variant, baselines: list[str], device: torch.device
) -> dict[str, float]:
    ours, _ = our_answers(workload, variant, device)
    batch = source_of(workload, device, torch.float64).batch("test", 0, workload.tasks)
    net = network(workload, device, torch.float64)
    return {name: _largest([ours], [ANSWERS[name](net, workload, batch)]) for name in baselines}


def _largest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    size = max(float(value.abs().max()) for value in ours)
    apart = max(
        float((mine.double() - other).abs().max()) for mine, other in zip(ours, theirs, strict=True)
    )
    return apart / size
