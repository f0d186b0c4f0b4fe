"""The evaluations of a run, from its settings: on meta-val and on the test split.

Episodes and streams have the same three verbs; see `Evaluation`.
"""

from __future__ import annotations

from metarun.algorithms.base import Algorithm
from metarun.core.settings import EvalSettings
from metarun.core.types import EpisodeSource
from metarun.evaluation.details import DETAILS
from metarun.evaluation.episodes import EpisodeEvaluation
from metarun.evaluation.evaluation import Evaluation
from metarun.evaluation.measures import chosen
from metarun.evaluation.stream_rollouts import StreamEvaluation


def meta_validation(
    algorithm: Algorithm, source: EpisodeSource, settings: EvalSettings
) -> Evaluation:
    """Return the evaluation of the metric on meta-val."""
    episodes, together = settings.val_episodes, settings.tasks_per_batch
    if source.spec.streams is not None:
        return StreamEvaluation(algorithm, source, "val", episodes, together, follow=False)
    return EpisodeEvaluation(algorithm, source, "val", episodes, together, measurements=())


def meta_test(
    algorithm: Algorithm, source: EpisodeSource, settings: EvalSettings, temperature: float = 1.0
) -> Evaluation:
    """Return the evaluation on the test split, with all measures and details.

    Args:
        algorithm: The trained learner.
        source: The data set.
        settings: Number of episodes, further measures and others.
        temperature: Divisor of a classifier's logits in its measures.
    """
    episodes, together = settings.episodes, settings.tasks_per_batch
    measures = chosen(settings.measures)
    if source.spec.streams is not None:
        return StreamEvaluation(
            algorithm,
            source,
            "test",
            episodes,
            together,
            proficiency=settings.proficiency,
            measures=measures,
        )
    return EpisodeEvaluation(
        algorithm,
        source,
        "test",
        episodes,
        together,
        views=settings.views,
        curve_steps=settings.curve_steps,
        measurements=(*DETAILS, *measures),
        temperature=temperature,
    )
