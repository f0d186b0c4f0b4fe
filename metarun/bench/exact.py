"""How far our gradients and answers are from a rival's, on two tasks of a workload in float64.

Shapes: T tasks, Q query rows, W ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metarun.bench.baselines import ANSWERS, BACKWARD, network
from metarun.bench.implementations import batch_of, our_answers, our_gradient, source_of
from metarun.bench.networks import paired
from metarun.bench.workloads import Variant, Workload


def differences(
    workload: Workload, variant: Variant, baselines: list[str], device: torch.device
) -> dict[str, float]:
    """The largest difference from each rival, relative to the largest of our numbers.

    Of gradients, and of an evaluation of the answers; a `mixed` variant, which is not exact,
    is compared as it is with rivals in float64. Empty where there is nothing to compare.

    Args:
        workload: Taken in its small size.
        variant: Of ours.
        baselines: By name.
        device: Where.
    """
    small = workload.small
    if workload.method == "sampling" or not baselines:
        return {}
    if workload.method == "evaluation":
        return _of_answers(small, variant, baselines, device)
    ours, algorithm = our_gradient(small, variant, device)
    found = {}
    for name in baselines:
        net = network(small, device, torch.float64)
        BACKWARD[small.method][name](net, small, batch_of(small, device, torch.float64))
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
