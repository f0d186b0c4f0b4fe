"""Warnings and records of what has changed between the start of a run and its continuation."""

from __future__ import annotations

import logging
from typing import Any, cast

from metarun.core.nested import finite
from metarun.core.types import Record
from metarun.runs.folder import Run

_COMPARED = ("data_fingerprint", "versions", "device", "engine", "torch_threads", "processes")
_log = logging.getLogger(__name__)


def note_changes(run: Run, step: int, here: Record) -> None:
    """Warn if the environment has changed, and add the current one to `environment.json`.

    Args:
        run: Folder of the run.
        step: Step from which the run continues.
        here: Current versions, machine, engine and data.
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
