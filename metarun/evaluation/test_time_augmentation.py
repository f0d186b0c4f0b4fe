"""Predictions averaged over several views of the images of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.core.types import Adapted, Prediction
from metarun.data.augmentation import view


def adapt(
    algorithm: Algorithm, support_x: Tensor, support_y: Tensor, views: int = 1
) -> list[Adapted]:
    """Return what an algorithm learns from each view of the support of T tasks.

    Args:
        algorithm: Learner that adapts to the tasks.
        support_x: (T, S, C, H, W) images, or rows of any shape if `views` is 1.
        support_y: (T, S) labels.
        views: Number of views; the first is the unchanged task.
    """
    return [algorithm.adapt(view(support_x, number), support_y) for number in range(views)]


def answer(algorithm: Algorithm, adapted: Sequence[Adapted], query_x: Tensor) -> Prediction:
    """Return the predictions averaged over views, each of the support and of the queries.

    Outputs, predictions along a sequence, responsibilities, strategies and alternatives are
    averaged; the rest is that of the first view.

    Args:
        algorithm: Learner that has adapted.
        adapted: Result of `adapt`, one entry for each view.
        query_x: (T, Q, C, H, W) images, or rows of any shape with one view.
    """
    answers = [algorithm.answer(own, view(query_x, n)) for n, own in enumerate(adapted)]
    if len(answers) == 1:
        return answers[0]
    outputs = torch.stack([one.outputs for one in answers]).mean(0)
    shares = [one.responsibilities for one in answers if one.responsibilities is not None]
    along = [one.sequence for one in answers if one.sequence is not None]
    sequence = torch.stack(along).mean(0) if along else None
    return replace(
        answers[0],
        outputs=outputs,
        sequence=sequence,
        responsibilities=torch.stack(shares).mean(0) if shares else None,
        strategies=_averaged([one.strategies for one in answers]),
        alternatives=_averaged([one.alternatives for one in answers]),
    )


def predict(
    algorithm: Algorithm, support_x: Tensor, support_y: Tensor, query_x: Tensor, views: int = 1
) -> Prediction:
    """Return `answer` after `adapt`."""
    return answer(algorithm, adapt(algorithm, support_x, support_y, views), query_x)


def _averaged(answers: Sequence[Mapping[str, Tensor] | None]) -> dict[str, Tensor] | None:
    """Return the mean over views for each name; None if no prediction has named outputs."""
    named = [own for own in answers if own is not None]
    if not named:
        return None
    return {name: torch.stack([own[name] for own in named]).mean(0) for name in named[0]}
