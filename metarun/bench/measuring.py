"""Alternating time measurements, operation counts, and the machine's peak performance."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from metarun.bench.baselines import ANSWERS, BACKWARD, network
from metarun.bench.implementations import Step, spec_of
from metarun.bench.results import Times
from metarun.bench.workloads import Workload
from metarun.core.types import TaskBatch
from metarun.execution.graph_replay import CALLS_BEFORE_REPLAY

Key = TypeVar("Key", bound=Hashable)

LEAST_ROUNDS = 3
_MOST_REPEATS = 20
_TURN_SECONDS = 0.1
_SIZES = (512, 1024, 2048)
_SIZES_ON_GPU = (2048, 4096, 8192)


def interleave(
    steps: Mapping[Key, Step], seconds: float, device: torch.device, updates: int = 1
) -> dict[Key, Times]:
    """Time steps in alternating rounds, for about `seconds` each and at least `LEAST_ROUNDS`.

    A round runs several short steps in a row, as training does. A single step would find the
    caches in the state left by the other implementation. Of calls of several `updates` the time
    of one is returned.
    """
    first = {name: _first(step, device) for name, step in steps.items()}
    # The first steps include imports, traces and compilation, so the one after gives the speed.
    again = {name: _seconds(step, 1, device) for name, step in steps.items()}
    repeats = {name: max(1, min(_MOST_REPEATS, int(_TURN_SECONDS / again[name]))) for name in steps}
    times: dict[Key, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds * len(steps)
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        for name, step in steps.items():
            times[name].append(_seconds(step, repeats[name], device))
        rounds += 1
    return {
        name: Times(first[name], tuple(value / updates for value in values))
        for name, values in times.items()
    }


def _first(step: Step, device: torch.device) -> float:
    """Return the seconds of the first step, and make those after which it is replayed."""
    seconds = _seconds(step, 1, device)
    for _ in range(CALLS_BEFORE_REPLAY - 1):
        step()
    return seconds


def _seconds(step: Step, repeats: int, device: torch.device) -> float:
    """Return the seconds of one step, as the mean over consecutive repeats."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def operations(workload: Workload) -> int | None:
    """Return the floating-point operations of one step of the plain loop.

    Matrix products and convolutions count; a multiplication and an addition are two operations.
    They are counted on one task of meta tensors, without computation. None for sampling.
    """
    if workload.method == "sampling":
        return None
    one = replace(workload, tasks=1)
    meta = torch.device("meta")
    net = network(one, meta)
    batch = _shapes(one)
    with FlopCounterMode(display=False) as counter:
        if workload.method == "evaluation":
            ANSWERS["functional"](net, one, batch)
        else:
            next(iter(BACKWARD[workload.method].values()))(net, one, batch)
    return workload.tasks * int(counter.get_total_flops())


def _shapes(workload: Workload) -> TaskBatch:
    """Return tasks of meta tensors, which have shapes but no values."""
    spec = spec_of(workload)
    rows = (workload.support_rows, workload.query_rows)

    def inputs(count: int) -> torch.Tensor:
        return torch.empty(workload.tasks, count, *spec.input_shape, device="meta")

    def targets(count: int) -> torch.Tensor:
        if spec.kind == "regression":
            return torch.empty(workload.tasks, count, 1, device="meta")
        return torch.empty(workload.tasks, count, dtype=torch.int64, device="meta")

    return TaskBatch(inputs(rows[0]), targets(rows[0]), inputs(rows[1]), targets(rows[1]))


def set_tf32(word: str) -> None:
    """Say which products of float32 numbers a GPU may round to TF32, for the whole process.

    Args:
        word: `none`, `convolutions` (torch's default), or `all`: those of matrices, too.
    """
    torch.backends.cudnn.allow_tf32 = word != "none"
    torch.backends.cuda.matmul.allow_tf32 = word == "all"


@contextmanager
def _rounded_as_convolutions() -> Iterator[None]:
    """Let products of matrices be in TF32 where convolutions are."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@_rounded_as_convolutions()
def peak(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.3, most: int | None = None
) -> float:
    """Return the operations per second of the fastest square matrix product on a device.

    On a GPU in the arithmetic that convolutions have, which a step that comes near it is made of.

    Args:
        device: Device to measure.
        dtype: Type of the matrices.
        seconds: Time for each size.
        most: The only side length to measure; None measures several.
    """
    sizes = _SIZES_ON_GPU if device.type == "cuda" else _SIZES
    best = 0.0
    for size in sizes if most is None else [most]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        product = partial(torch.mm, left, right, out=out)
        _seconds(product, 2, device)
        end = time.perf_counter() + seconds
        while True:
            best = max(best, 2 * size**3 / _seconds(product, 3, device))
            if time.perf_counter() >= end:
                break
    return best
