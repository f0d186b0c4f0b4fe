"""The files that a meta-test writes: `results.json`, `episodes.npz`, `stream.csv`, `samples.npz`.

Shapes: N episodes, K presentations of a class.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from metarun.algorithms.base import Algorithm
from metarun.algorithms.capabilities import Generative
from metarun.core import distributed, environment
from metarun.core.files import write_atomically
from metarun.core.nested import finite
from metarun.core.settings import EvalSettings
from metarun.core.statistics import Floats, interval, wilson_interval
from metarun.core.types import EpisodeSource, Record, TaskSpec
from metarun.evaluation import continual_metrics, task_clusters
from metarun.evaluation.measures import EpisodeMetrics
from metarun.evaluation.task_clusters import Labels
from metarun.runs.folder import RESULTS, RunFolder
from metarun.runs.formats import FORMAT

_SAMPLED_TASKS = 8

_SAMPLES = 10
"""Rows generated for each of these tasks, and the largest number of support rows shown."""


def about(algorithm: Algorithm, source: EpisodeSource, run_info: Mapping[str, Any]) -> Record:
    """Return the entries of `results.json` that describe the run and its environment."""
    return {
        "format": FORMAT,
        **run_info,
        "kind": source.spec.kind,
        "metric": source.spec.metric,
        "transductive": algorithm.transductive,
        "bn_statistics": algorithm.bn_statistics,
        "parameters": sum(parameter.numel() for parameter in algorithm.parameters()),
        "processes": distributed.size(),
        "data_fingerprint": source.fingerprint(),
        "versions": environment.versions(),
    }


def test_record(measured: EpisodeMetrics, spec: TaskSpec, figures: Mapping[str, Floats]) -> Record:
    """Return the entries of `results.json` with the metrics, as means and 95 % intervals."""
    record: Record = {
        "test": {**_interval_record(measured.values), "episodes": len(measured.values)},
        "curve": None
        if measured.curve is None
        else [
            {"steps": steps, **_interval_record(values)}
            for steps, values in enumerate(measured.curve)
        ],
        "episodes_hash": measured.digest,
        **{name: _interval_record(values) for name, values in measured.extra.items()},
    }
    if measured.confusions is not None:
        record["queries"] = _queries_record(measured.confusions)
    if measured.presentations is not None:
        record["presentations"] = [_interval_record(v) for v in measured.presentations.T]
    found = _families_record(measured)
    if found is not None:
        record["families"] = found
    if measured.strategies:
        record["strategies"] = _strategies_record(measured, spec)
    if spec.streams is not None:
        record["layout"] = asdict(spec.streams["test"])
        record["stream"] = {name: _interval_record(values) for name, values in figures.items()}
    return record


def _queries_record(confusions: Labels) -> Record:
    """Return the number of queries, of wrong answers, and the binomial interval of the error.

    The interval takes queries for independent trials, which those of one task are not quite.

    Args:
        confusions: See `EpisodeMetrics.confusions`.
    """
    true, predicted, counts = confusions.T
    total, wrong = int(counts.sum()), int(counts[true != predicted].sum())
    low, high = wilson_interval(wrong, total)
    return {"number": total, "wrong": wrong, "error": wrong / total, "low": low, "high": high}


def _families_record(measured: EpisodeMetrics) -> Record | None:
    """Return how well the learner's groups agree with the families of the tasks.

    Groups are those of the greatest responsibility of a mixture. For other learners they come
    from a Gaussian mixture over the embeddings, with one component for each family. Returns None
    if there are no families or no groups.
    """
    families, groups = measured.families, measured.groups
    if families is None:
        return None
    by = "responsibilities"
    if groups is None:
        by = "a mixture of normals over embeddings"
        if measured.embeddings is None:
            return None
        groups = task_clusters.gaussian_mixture(measured.embeddings, int(families.max()) + 1)
        if groups is None:
            return None
    table = task_clusters.counts(families, groups)
    index = task_clusters.adjusted_rand_index(table)
    return {"adjusted_rand_index": index, "by": by, "counts": table.tolist()}


def _strategies_record(measured: EpisodeMetrics, spec: TaskSpec) -> Record:
    """Return the metric of each base-learner and rule, and the learner's gain over each.

    `oracle` is the best base-learner of each episode, by its queries.
    """
    best = np.max if spec.higher_is_better else np.min
    sign = 1.0 if spec.higher_is_better else -1.0
    oracle = best(np.stack(list(measured.strategies.values())), axis=0)
    return {
        name: {
            **_interval_record(values),
            "gain": _interval_record(sign * (measured.values - values)),
        }
        for name, values in {
            **measured.strategies,
            **measured.alternatives,
            "oracle": oracle,
        }.items()
    }


def stream_figures(
    measured: EpisodeMetrics, spec: TaskSpec, evaluation: EvalSettings
) -> dict[str, Floats]:
    """Return the metrics of streams, (N,) arrays over rollouts; empty if tasks are not streams."""
    if measured.stream_record is None or spec.streams is None:
        return {}
    return continual_metrics.summary(
        measured.stream_record,
        spec.streams["test"],
        higher=spec.higher_is_better,
        proficiency=evaluation.proficiency,
    )


def _interval_record(values: Floats) -> Record:
    mean, ci95 = interval(values)
    return {"mean": mean, "ci95": ci95}


def write_results(
    run: RunFolder,
    record: Record,
    algorithm: Algorithm,
    source: EpisodeSource,
    measured: EpisodeMetrics,
    figures: Mapping[str, Floats],
) -> Record:
    """Write all files of a meta-test and return the content of its `results.json`.

    Args:
        run: Folder of the run or of the test.
        record: Entries of `results.json`; numbers that are not finite become None.
        algorithm: The learner that was tested.
        source: The data set.
        measured: Its metrics on the test episodes.
        figures: As `stream_figures` returns them.
    """
    results: Record = finite(record)
    _write_episodes(run.path, source, measured, figures)
    run.write_json(RESULTS, results)
    _write_samples(run.path, algorithm, source)
    return results


def _write_episodes(
    folder: Path, source: EpisodeSource, measured: EpisodeMetrics, figures: Mapping[str, Floats]
) -> None:
    """Write the measurements of every test episode to `episodes.npz`, and curves of streams."""
    spec = source.spec
    arrays: dict[str, Any] = {spec.metric: measured.values}
    arrays |= {**(measured.stream_record or {}), **measured.extra}
    arrays |= {f"{continual_metrics.FIGURE}{name}": values for name, values in figures.items()}
    if measured.curve is not None:
        arrays["curve"] = measured.curve
    if measured.embeddings is not None:
        arrays["embeddings"] = measured.embeddings
    if measured.presentations is not None:
        arrays["presentations"] = measured.presentations
    for name, labels in (("families", measured.families), ("groups", measured.groups)):
        if labels is not None:
            arrays[name] = labels
    if measured.confusions is not None:
        arrays["confusions"] = measured.confusions
        names = getattr(source, "class_names", None)
        if names is not None:
            arrays["class_names"] = np.array(names("test"), dtype=str)
    theirs = {**measured.strategies, **measured.alternatives}
    arrays |= {f"strategy_{name}": values for name, values in theirs.items()}
    _write_arrays(folder / "episodes.npz", arrays)
    if measured.stream_record is not None and spec.streams is not None:
        table = continual_metrics.curves(measured.stream_record, spec.streams["test"])
        write_atomically(folder / "stream.csv", table.encode())


def _write_samples(folder: Path, algorithm: Algorithm, source: EpisodeSource) -> None:
    """Write the rows that a generative algorithm makes for the first test tasks, with support."""
    if not isinstance(algorithm, Generative) or not algorithm.generates:
        return
    support = source.batch("test", 0, _SAMPLED_TASKS).support_x
    made = algorithm.generated(support, _SAMPLES)
    # Evenly spaced, so that the rows are of many classes.
    shown = support[:, :: -(-support.shape[1] // _SAMPLES)]
    arrays = {"support": shown.cpu().numpy(), "made": made.cpu().numpy()}
    _write_arrays(folder / "samples.npz", arrays)


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getbuffer())
