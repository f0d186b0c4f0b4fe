"""Predictions averaged over several views of the images of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.core.types import Prediction
from metarun.data.augmentation import view


def predict(
    algorithm: Algorithm, support_x: Tensor, support_y: Tensor, query_x: Tensor, views: int = 1
) -> Prediction:
    """Return `algorithm.predict`, averaged over views of the support and query images.

    Each view applies to support and query. Outputs, predictions along a sequence,
    responsibilities, strategies and alternatives are averaged; the rest is that of the first view.

    Args:
        algorithm: Learner that adapts to each view of the tasks and predicts its queries.
        support_x: (T, S, C, H, W) images, or rows of any shape if `views` is 1.
        support_y: (T, S) labels.
        query_x: (T, Q, C, H, W) images, or rows of any shape if `views` is 1.
        views: Number of views; the first is the unchanged task.
    """
    answers = [
        algorithm.predict(view(support_x, number), support_y, view(query_x, number))
        for number in range(views)
    ]
    if views == 1:
        return answers[0]
    outputs = torch.stack([answer.outputs for answer in answers]).mean(0)
    shares = [a.responsibilities for a in answers if a.responsibilities is not None]
    along = [answer.sequence for answer in answers if answer.sequence is not None]
    sequence = torch.stack(along).mean(0) if along else None
    return replace(
        answers[0],
        outputs=outputs,
        sequence=sequence,
        responsibilities=torch.stack(shares).mean(0) if shares else None,
        strategies=_averaged([answer.strategies for answer in answers]),
        alternatives=_averaged([answer.alternatives for answer in answers]),
    )


def _averaged(answers: Sequence[Mapping[str, Tensor] | None]) -> dict[str, Tensor] | None:
    """Return the mean over views for each name; None if no prediction has named outputs."""
    named = [own for own in answers if own is not None]
    if not named:
        return None
    return {name: torch.stack([own[name] for own in named]).mean(0) for name in named[0]}
