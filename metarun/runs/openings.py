"""How often the test split of a run has been opened, by its own meta-test and by later ones.

The more often the test split is looked at, the less a choice between its figures is worth. Each
`results.json` holds the number of meta-tests so far. A meta-test on other data does not count, nor
does one that was stopped before it gave results.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from metarun.core.once import warn_once
from metarun.core.results import Results
from metarun.runs.folder import RESULTS, Run, RunFolder


def openings(path: Path) -> int:
    """Return the number of meta-tests on the own test split of the run in a folder."""
    own = _results(path)
    tests = [found for one in sorted((path / "tests").glob("*")) if (found := _results(one))]
    fingerprint = _fingerprint(RunFolder(path), own)
    here = [test for test in tests if test.get("data_fingerprint") == fingerprint]
    every = [*tests, own] if own else tests
    # The stored numbers remain right if the folder of an earlier meta-test was removed.
    return max([len(here) + (own is not None), *(results["test_openings"] for results in every)])


def openings_with(run: RunFolder, fingerprint: str) -> int:
    """Return the number after one more meta-test, on data with a fingerprint."""
    results = _results(run.path)
    if results is None and run.has(RESULTS):
        warn_once(f"{run.path / RESULTS} is damaged: test_openings leaves its meta-test out")
    own = _fingerprint(run, results)
    if own is None:
        warn_once(f"{run.path} does not say what its data are: test_openings leaves this one out")
    return openings(run.path) + (fingerprint == own)


def openings_after_training(run: Run, step: int) -> int:
    """Return the number after the meta-test at the end of training.

    Args:
        run: The run.
        step: Its number of steps. If the run has results after as many, their meta-test is
            repeated, after a kill, and does not count again.
    """
    own = _results(run.path)
    before = openings(run.path)
    return before if own is not None and own.get("steps") == step else before + 1


def _fingerprint(run: RunFolder, results: Results | None) -> str | None:
    """Return the fingerprint of the run's own data."""
    if results is not None:
        return results.get("data_fingerprint")
    return run.environment().get("data_fingerprint")


def _results(path: Path) -> Results | None:
    """Return the results in a folder; None if there are none, or if they are damaged."""
    with suppress(OSError, ValueError):
        if (path / RESULTS).exists():
            return RunFolder(path).read_results()
    return None
