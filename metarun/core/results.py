"""The type of `results.json`, the record of a finished run or meta-test. Torch is not imported.

`RunFolder.read_results` is the one reader. It completes files of older versions, so every reader of
results finds the keys that are not `NotRequired`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NotRequired, TypedDict, cast

from metarun.core.measures import WITHOUT_DESCRIPTION, Measure


class Interval(TypedDict):
    """A mean over episodes and the half-width of its 95 % interval; None if not finite."""

    mean: float | None
    ci95: float | None


class EpisodesInterval(Interval):
    """An interval with its number of episodes."""

    episodes: int


class Validation(TypedDict):
    """The evaluation on meta-val that chose the parameters, and its step; its mean is finite."""

    mean: float
    ci95: float | None
    episodes: int
    step: int


class CurvePoint(Interval):
    """The metric after a number of inner steps."""

    steps: int


class Queries(TypedDict):
    """Queries, wrong answers, their share, and its binomial interval."""

    number: int
    wrong: int
    error: float
    low: float
    high: float


class Families(TypedDict):
    """Agreement of a learner's groups of tasks with the families of the tasks."""

    adjusted_rand_index: float
    by: str
    counts: list[list[int]]


class Strategy(Interval):
    """The metric of a strategy, and the learner's paired gain over it."""

    gain: Interval


class Measured(Interval):
    """A measure: its value and its description; see `core.measures.Measure`."""

    title: str
    unit: str
    better: str | None
    places: int | None
    by_default: bool
    about: str


class Results(TypedDict):
    """Contents of `results.json`.

    Entries that trace a run (`backbone`, `engine`, `versions`, …) are not listed.
    """

    format: int
    algo: str
    data: str
    data_options: NotRequired[dict[str, str]]
    """Which data they are: folder, name, file and classes, as far as the data set has them."""
    way: int
    shot: int
    seed: int
    kind: str
    metric: str
    device: str
    transductive: bool
    bn_statistics: str
    parameters: int
    data_fingerprint: str
    episodes_hash: str
    seconds: float
    test: EpisodesInterval
    curve: list[CurvePoint] | None
    measures: dict[str, Measured]
    temperature: float
    """Temperature that divides the logits; 1 unless `eval.temperature=val` fitted it."""
    files: NotRequired[dict[str, str]]
    """SHA-256 of the files that were written with this record, by name."""
    test_openings: int
    """Meta-tests on the run's own test split so far, with this one; 1 in older files."""
    # Of the run itself, not of a later meta-test.
    val: NotRequired[Validation | None]
    steps: NotRequired[int]
    tasks_per_step: NotRequired[int]
    train_seconds: NotRequired[float]
    tasks_per_second: NotRequired[float]
    parameters_from: NotRequired[str]
    parameters_step: NotRequired[int]
    # Where the data or the learner have them.
    queries: NotRequired[Queries]
    presentations: NotRequired[list[Interval]]
    families: NotRequired[Families]
    strategies: NotRequired[dict[str, Strategy]]
    sources: NotRequired[dict[str, EpisodesInterval]]
    mean_of_sources: NotRequired[Interval]
    layout: NotRequired[dict[str, Any]]
    stream: NotRequired[dict[str, Interval]]


def completed(record: Mapping[str, Any]) -> Results:
    """Return a record with the entries that its version of metarun did not write."""
    older = {
        name: {**record[name], **measure.stored()}
        for name, measure in WITHOUT_DESCRIPTION.items()
        if name in record
    }
    added = {"measures": older, "temperature": 1.0, "test_openings": 1}
    return cast("Results", {**added, **record})


def validation_of(results: Results | None) -> Validation | None:
    """Return the evaluation on meta-val that chose the parameters, if there is one."""
    return None if results is None else results.get("val")


def measures_of(results: Results) -> Iterator[tuple[Measure, Interval]]:
    """Yield the description and the value of each measure of a record."""
    for name, entry in completed(results)["measures"].items():
        yield Measure.of(name, entry), entry
