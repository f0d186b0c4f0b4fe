"""Parts of a meta-test that hold more than one number for an episode.

Each is one entry: what it takes from a batch (`of`), and what it adds to `episodes.npz` and
`results.json` (`summary`). `DETAILS` lists them.

Shapes: T tasks, S support rows, Q query rows, W ways, N episodes, P points of the adaptation curve,
E dimensions of an embedding, K presentations of a class, M pairs of classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from metarun.core.statistics import interval_record, wilson_interval
from metarun.evaluation import task_clusters
from metarun.evaluation.measures import Answers, Joined, Measurement, Summary
from metarun.evaluation.task_clusters import Labels

_BASE, _RULE = "base-learner ", "rule "
"""Prefixes of the names of the two kinds of strategies."""


class Curve:
    """The metric after 0 … P - 1 inner steps: `curve`, (P, N)."""

    def of(self, answers: Answers) -> Mapping[str, Tensor]:
        """Return the curve of each task, (T, P)."""
        return {} if answers.trace is None else {"curve": answers.metric(answers.trace).T}

    def summary(self, joined: Joined) -> Summary:
        """Return the curve with an interval at each point."""
        curve = np.ascontiguousarray(joined.arrays["curve"].T)
        points = [{"steps": at, **interval_record(here)} for at, here in enumerate(curve)]
        return Summary({"curve": curve}, {"curve": points})


class Embeddings:
    """The vector that the algorithm computes for each task: `embeddings`, (N, E)."""

    def of(self, answers: Answers) -> Mapping[str, Tensor]:
        """Return the vectors (T, E)."""
        found = answers.prediction.embedding
        return {} if found is None else {"embeddings": found.double()}

    def summary(self, joined: Joined) -> Summary:
        """Return the vectors."""
        return Summary(joined.arrays, {})


class Queries:
    """What classes are taken for: `confusions`, (M, 3).

    These are the true class, the predicted class and the number of queries of each pair that
    occurs, by the numbers of the data set. There is nothing where a label is not a single class.
    """

    def of(self, answers: Answers) -> Mapping[str, Tensor]:
        """Return the true and the predicted class of each query, (T * Q, 2)."""
        ids = answers.batch.class_ids
        if ids is None or answers.spec.num_train_classes is None:
            return {}
        labels = (answers.targets, answers.prediction.outputs.argmax(-1))
        pairs = torch.stack([ids.gather(1, local) for local in labels], -1)
        return {"confusions": pairs.flatten(0, 1)}

    def summary(self, joined: Joined) -> Summary:
        """Return the pairs, and the number of queries with the binomial interval of the error.

        The interval takes queries for independent trials, which those of one task are not quite.
        """
        pairs, counts = np.unique(joined.arrays["confusions"], axis=0, return_counts=True)
        arrays = {"confusions": np.concatenate([pairs, counts[:, None]], 1)}
        names = getattr(joined.source, "class_names", None)
        if names is not None:
            arrays["class_names"] = np.array(names("test"), dtype=str)
        total, wrong = int(counts.sum()), int(counts[pairs[:, 0] != pairs[:, 1]].sum())
        low, high = wilson_interval(wrong, total)
        queries = {"number": total, "wrong": wrong, "error": wrong / total}
        return Summary(arrays, {"queries": {**queries, "low": low, "high": high}})


class Presentations:
    """The accuracy at each presentation of a class along the support: `presentations`, (N, K)."""

    def of(self, answers: Answers) -> Mapping[str, Tensor]:
        """Return the accuracies (T, K)."""
        sequence = answers.prediction.sequence
        if sequence is None:
            return {}
        return {"presentations": by_presentation(sequence, answers.batch.support_y)}

    def summary(self, joined: Joined) -> Summary:
        """Return the accuracies with an interval for each presentation."""
        # Tasks with fewer shots have no later presentations.
        columns = joined.arrays["presentations"].T
        shown = [interval_record(own[~np.isnan(own)]) for own in columns]
        return Summary(joined.arrays, {"presentations": shown})


def by_presentation(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the accuracy (T, K) at the first to the K-th presentation of a class.

    Santoro et al. (2016) report these.

    Args:
        outputs: (T, S, W) predictions along a sequence, each given the labels of earlier rows.
        labels: (T, S) labels, each class K times.
    """
    same = labels[:, :, None] == labels[:, None]
    presentation = same.tril(-1).sum(2)
    right = (outputs.argmax(2) == labels).double()
    times = torch.arange(int(presentation.max()) + 1, device=labels.device)
    at = (presentation[:, None] == times[:, None]).double()
    return (at * right[:, None]).sum(2) / at.sum(2)


class Families:
    """How well a learner's groups of tasks agree with the families of the tasks.

    `families` (N,) is the family of each task. `groups` (N,) is the component of a mixture with
    the greatest responsibility. For other learners, groups come from a Gaussian mixture over the
    embeddings, with one component for each family. Without families or groups there is no record.
    """

    def of(self, answers: Answers) -> Mapping[str, Tensor]:
        """Return families (T,), groups (T,) and embeddings (T, E), as far as there are any."""
        ids, shares = answers.batch.class_ids, answers.prediction.responsibilities
        found: dict[str, Tensor] = {}
        if ids is not None and not answers.classification:
            found["families"] = ids[:, 0]
            if answers.prediction.embedding is not None:
                found["embeddings"] = answers.prediction.embedding.double()
        if shares is not None:
            found["groups"] = shares.argmax(1)
        return found

    def summary(self, joined: Joined) -> Summary:
        """Return families and groups, and their agreement."""
        arrays = {name: own for name, own in joined.arrays.items() if name != "embeddings"}
        if "families" not in joined.arrays:
            return Summary(arrays, {})
        families, by = joined.arrays["families"], "responsibilities"
        groups: Labels | None = joined.arrays.get("groups")
        if groups is None:
            by = "a mixture of normals over embeddings"
            if "embeddings" in joined.arrays:
                number = int(families.max()) + 1
                groups = task_clusters.gaussian_mixture(joined.arrays["embeddings"], number)
        if groups is None:
            return Summary(arrays, {})
        table = task_clusters.counts(families, groups)
        index = task_clusters.adjusted_rand_index(table)
        record = {"adjusted_rand_index": index, "by": by, "counts": table.tolist()}
        return Summary(arrays, {"families": record})


class Strategies:
    """The metric of each base-learner of a selector and of other rules: `strategy_…`, (N,)."""

    def of(self, answers: Answers) -> Mapping[str, Tensor]:
        """Return the metrics (T,)."""
        single, rules = answers.prediction.strategies, answers.prediction.alternatives
        named = {f"{_BASE}{name}": outputs for name, outputs in (single or {}).items()}
        named |= {f"{_RULE}{name}": outputs for name, outputs in (rules or {}).items()}
        return {name: answers.metric(outputs) for name, outputs in named.items()}

    def summary(self, joined: Joined) -> Summary:
        """Return the metric of each base-learner and rule, and the learner's gain over each.

        `oracle` is the best base-learner of each episode, by its queries.
        """
        best = np.max if joined.source.spec.higher_is_better else np.min
        sign = 1.0 if joined.source.spec.higher_is_better else -1.0
        single = [own for name, own in joined.arrays.items() if name.startswith(_BASE)]
        named = {
            name.removeprefix(_BASE).removeprefix(_RULE): own for name, own in joined.arrays.items()
        }
        arrays = {f"strategy_{name}": own for name, own in named.items()}
        oracle = {"oracle": best(np.stack(single), axis=0)} if single else {}
        record = {
            name: {**interval_record(own), "gain": interval_record(sign * (joined.values - own))}
            for name, own in {**named, **oracle}.items()
        }
        return Summary(arrays, {"strategies": record})


DETAILS: tuple[Measurement, ...] = (
    Curve(),
    Embeddings(),
    Queries(),
    Presentations(),
    Families(),
    Strategies(),
)
