"""Warnings and records of what has changed between the start of a run and its continuation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

from metarun.algorithms.base import Algorithm
from metarun.core import environment
from metarun.core.nested import finite
from metarun.core.types import EpisodeSource, Record
from metarun.runs.folder import Run

_COMPARED = ("data_fingerprint", "versions", "device", "engine", "torch_threads", "processes")
_log = logging.getLogger(__name__)


def surroundings(
    algorithm: Algorithm, source: EpisodeSource, run_info: Mapping[str, Any]
) -> Record:
    """Return what `environment.json` holds: versions, machine, engine, data, initial weights."""
    return {
        **environment.describe(str(algorithm.device)),
        "engine": algorithm.resolved_engine().describe(),
        "data_fingerprint": source.fingerprint(),
        **({"init": run_info["init"]} if "init" in run_info else {}),
    }


def began_with(run: Run) -> Record:
    """Return the entry `init` of a run that goes on: the weights it began with, if any."""
    found = run.read_json("environment.json") if run.has("environment.json") else {}
    return {"init": found["init"]} if "init" in found else {}


def note_changes(run: Run, step: int, here: Record) -> None:
    """Warn if the environment has changed, and add the current one to `environment.json`.

    Args:
        run: Folder of the run.
        step: Step from which the run continues.
        here: The current `surroundings`.
    """
    record = run.read_json("environment.json") if run.has("environment.json") else {}
    before = {"processes": 1, **(record.get("resumed") or [record])[-1]}
    for key in _COMPARED:
        if key in before and before[key] != finite(here[key]):
            was, now = _differing(before[key], finite(here[key]))
            _log.warning(
                "%s: %s when the run began, %s now: the numbers will differ from those of "
                "an uninterrupted run",
                key.replace("_", " "),
                was,
                now,
            )
    record["resumed"] = [*record.get("resumed", []), {"step": step, **here}]
    run.write_json("environment.json", record)


def _differing(was: Any, now: Any) -> tuple[Any, Any]:
    """Return two values for a message; of two records only the entries that differ."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return was, now
    then, here = cast("Record", was), cast("Record", now)
    keys = [key for key in {**then, **here} if then.get(key) != here.get(key)]
    return _listed(then, keys), _listed(here, keys)


def _listed(record: Record, keys: list[str]) -> str:
    return ", ".join(f"{key} {record.get(key, 'absent')}" for key in keys)
