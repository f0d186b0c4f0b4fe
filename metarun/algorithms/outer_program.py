"""Several meta-updates in one call: a compiled program of a whole update.

An update is the tasks' gradient, clipping and the step of the optimizer. Where the gradient is
compiled, so is all of this, and several updates run without any other code between them. The
program of an update is the same however many of them run in a call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from metarun.algorithms.outer_optimizer import OuterOptimizer
from metarun.core.types import Progress
from metarun.execution.engine import Engine, TaskFunction
from metarun.execution.graph_replay import layouts

OuterTask = tuple[TaskFunction, tuple[Tensor, ...]]
"""The function of one task and the rows of T tasks, as `Algorithm.outer_step` takes them."""


def updates(
    engine: Engine,
    net: nn.Module,
    optimizer: OuterOptimizer,
    planned: Iterator[tuple[TaskFunction, tuple[Tensor, ...], Progress]],
) -> list[tuple[Tensor, Tensor]]:
    """Perform as many of the planned updates as one program can.

    It ends before an update whose gradient is not finite, and before one of another function or
    with rows of other shapes.

    Args:
        engine: Engine that is resolved.
        net: Network of the tasks, without batch norm.
        optimizer: Optimizer whose state changes.
        planned: Function, rows and progress of each update, at least one.

    Returns:
        Mean loss and task metric of each update that was made.
    """
    function, rows, progress = first = next(planned)
    params = {name: param.detach() for name, param in optimizer.targets.items()}
    leaves = tuple(params.values())
    moments = tuple(optimizer.rule.moments(leaves))
    factors = optimizer.rule.factors([optimizer.rate(progress)])
    number = len(leaves)

    def then(
        leaves: Sequence[Tensor],
        grads: Sequence[Tensor],
        extras: tuple[Tensor, Tensor, Any],
        more: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        losses, scores, _ = extras
        after, moved, norm = optimizer.moved(leaves, grads, more[:-1], more[-1])
        return (*after, *moved, norm, losses.mean(), scores.mean())

    more = (*moments, factors[0])
    program = engine.program(function, net, params, more, rows, then, optimizer.settings)
    if program is None:
        return []
    every = [first, *planned]
    factors = optimizer.rule.factors([optimizer.rate(progress) for _, _, progress in every])
    state: tuple[Tensor, ...] = (*leaves, *moments)
    laid_out = layouts(state)
    figures: list[tuple[Tensor, Tensor]] = []
    for (function, rows, _), own in zip(every, factors.unbind(), strict=True):
        if not program.fits(function, rows):
            break
        *after, norm, loss, score = program(state[:number], (*state[number:], own), rows)
        if not math.isfinite(norm.item()):
            break
        state = tuple(after)
        figures.append((loss, score))
        # The results are the next arguments, and the program takes only tensors laid out as these.
        if len(figures) == 1 and layouts(state) != laid_out:
            break
    optimizer.take(state[:number], state[number:], len(figures))
    return figures
