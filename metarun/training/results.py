"""What a run says of itself: one line at its start, and the files of its meta-test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from metarun.algorithms.base import Algorithm
from metarun.core import distributed, environment
from metarun.core.files import to_npz
from metarun.core.nested import finite
from metarun.core.results import Results
from metarun.core.settings import TrainSettings
from metarun.core.types import EpisodeSource, Record
from metarun.core.words import first_of, number_of
from metarun.evaluation.evaluation import Evaluated
from metarun.runs.folder import EPISODES, RESULTS, Run
from metarun.runs.formats import FORMAT
from metarun.runs.records import METRICS, hash_of


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
        "trainable_parameters": sum(p.numel() for p in algorithm.parameters() if p.requires_grad),
        "processes": distributed.size(),
        "data_fingerprint": source.fingerprint(),
        "versions": environment.versions(),
    }


def plan(
    algorithm: Algorithm, run_info: Mapping[str, Any], settings: TrainSettings, folder: Path
) -> str:
    """Return in one line what will run."""
    counts = [(p.numel(), p.requires_grad) for p in algorithm.parameters()]
    total, frozen = sum(n for n, _ in counts), sum(n for n, learns in counts if not learns)
    steps = number_of(settings.steps, "step")
    parts = [
        f"{run_info.get('algo')} on {run_info.get('data')}",
        f"{run_info.get('backbone')} with {total:,} parameters"
        + (f", {frozen:,} of them frozen" if frozen else ""),
        f"{algorithm.device}, {number_of(torch.get_num_threads(), 'thread')}",
        f"{steps} of {number_of(settings.tasks_per_step, 'task')}"
        if settings.steps
        else "no meta-training",
        *(
            [f"its encoder starts from {_init_text(run_info['init'])}"]
            if "init" in run_info
            else []
        ),
        f"files in {folder}",
    ]
    return "; ".join(parts)


_NAMED = 5


def _init_text(init: Mapping[str, Any]) -> str:
    """Return where the first weights are from, and what was not taken."""
    taken = f"{init['path']} ({number_of(init['tensors'], 'tensor')}"
    out, absent = init["left_out"], init["not_found"]
    left = f", without {first_of(out, _NAMED)}" if out else ""
    lacks = f", at random: {first_of(absent, _NAMED)}" if absent else ""
    return f"{taken}{left}{lacks})"


def write_results(run: Run, record: Record, evaluated: Evaluated) -> Results:
    """Write all files of a meta-test and return the content of its `results.json`.

    Args:
        run: Folder of the run or of the test.
        record: Entries of `results.json`; numbers that are not finite become None.
        evaluated: The results of the evaluation, which writes the other files.
    """
    files = {EPISODES: to_npz(evaluated.arrays), **evaluated.files}
    # The log is not written to after the meta-test.
    log = {METRICS: (run.path / METRICS).read_bytes()} if run.has(METRICS) else {}
    hashes = {name: hash_of(data) for name, data in {**files, **log}.items()}
    record = {**record, "files": hashes}
    results: Results = finite(record)
    for name, data in files.items():
        run.write_bytes(name, data)
    run.write_json(RESULTS, record)
    return results
