"""Checks of every job of a request before any folder is created."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from metarun.config.build import build_experiment, build_trackers, check_shares
from metarun.config.checks import check_config
from metarun.config.schema import Config
from metarun.core import distributed
from metarun.core.console import busy, warnings_held
from metarun.core.files import check_space
from metarun.core.streams import say

if TYPE_CHECKING:
    from metarun.config.composition import Job


def check_jobs(jobs: Sequence[Job], processes: int | None = None) -> None:
    """Check that all jobs can run; write nothing to disk.

    It prints what recipes leave out, and what data sets say of themselves (`notes_for_user`).

    Args:
        jobs: The runs.
        processes: Number of processes of each run; None for those of the present one.

    Raises:
        ValueError: A job cannot run.
    """
    for job in jobs:
        check_config(job.config)
        _check_folder(job)
    for job in jobs:
        check_data(job.config)
        build_trackers(job.config)
    from metarun.training.state import required_bytes

    told = [line for job in jobs for line in job.left_out]
    with warnings_held(), busy("checking what was asked for"):
        for job in jobs:
            experiment = build_experiment(job.config)
            check_shares(experiment, processes)
            check_space(job.folder, required_bytes(experiment.algorithm))
            told += getattr(experiment.source, "notes_for_user", ())
    if not distributed.is_main():
        return
    for line in dict.fromkeys(told):
        say("note", line)
    # An experiment is itself a recipe.
    untuned = (j for j in jobs if not j.has_recipe and "experiment" not in j.config["names"])
    for pair in dict.fromkeys(_pair(job) for job in untuned):
        say(
            "note",
            f"there is no recipe for {pair}: default values are used, which are not tuned for this "
            "pair",
        )


def _pair(job: Job) -> str:
    names = job.config["names"]
    return f"algo={names['algo']} data={names['data']}"


def check_data(config: Config) -> None:
    """Check that the data set is available, without importing torch.

    Raises:
        ValueError: It is missing; the message says how to get it.
    """
    from metarun.data.storage import registry

    options = config["data"]
    for name, own in {config["names"]["data"]: options, **(options.get("parts") or {})}.items():
        message = registry.missing(name, own.get("root"), own.get("file"))
        if message is not None:
            raise ValueError(message)
        if name in registry.TRANSFORMED:
            registry.store_of_source(own.get("source"), own.get("root"))


def _check_folder(job: Job) -> None:
    folder = job.folder
    in_the_way = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if in_the_way and not job.may_be_there:
        raise ValueError(
            f"{folder} exists and is not empty: expected a new or empty folder for the run"
        )
    parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{folder} cannot be created: {parent} is not a writable folder")
