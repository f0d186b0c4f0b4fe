"""`metarun compare`: every algorithm on one data set, each with its recipe, in one table.

A run's folder is named after its sizes and a hash of its configuration. Repeating the command
therefore skips finished runs, continues stopped ones and starts missing ones. The table also
has the result of each learner before any training, on the same test episodes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from metarun.config.build import build_experiment, build_source
from metarun.config.catalogue import method_name
from metarun.config.composition import Composer, Job, composer
from metarun.config.naming import digest, hashed_slug, slug
from metarun.config.trust import locate
from metarun.core.console import Screen, busy
from metarun.core.errors import EXIT_FAILED, EXIT_OK
from metarun.core.files import write_atomically
from metarun.core.sizes import least, size_text
from metarun.core.statistics import interval_record
from metarun.core.streams import say, unbroken_streams
from metarun.jobs.checks import check_jobs
from metarun.jobs.ensure import ensure_finished, is_finished
from metarun.reporting.comparison_tables import (
    Row,
    comparison,
    stream_comparison,
    without_marks,
)
from metarun.reporting.references import folders_of
from metarun.reporting.results import UNTRAINED, Result, read_result
from metarun.reporting.tables import Style, Table, render
from metarun.runs.folder import RunFolder


@unbroken_streams()
def compare(
    words: Sequence[str],
    folder: Path,
    config_dir: str | None,
    *,
    against: str | None,
    table_only: bool,
    only_estimate: bool = False,
    measures: Sequence[str] = (),
    style: Style = "terminal",
) -> int:
    """Start the missing runs, print the table and write it; return the exit code.

    Args:
        words: Overrides `KEY=VALUE`, as for a sweep.
        folder: Folder of the runs and the table.
        config_dir: Folder of the user's YAML files.
        against: On a stream, the algorithm that regret is relative to.
        table_only: Whether to print the existing results only, without running or writing.
        only_estimate: Whether to print what the missing runs would take, and start none.
        measures: Names of measures that have a column of their own.
        style: Format of the printed table; the file is in Markdown.

    Raises:
        ValueError: An argument is invalid; no run has been started.
    """
    with busy("composing the runs"), composer(config_dir) as compose:
        jobs = compose.jobs(with_algorithms(compose, words), sweep=True)
    plan = [replace(job, folder=folder / folder_name(job)) for job in jobs]
    _check_against(against, plan)
    _check_measures(measures, plan)
    if only_estimate:
        missing = [job for job in plan if not is_finished(job.folder)]
        check_jobs([job for job in missing if not job.folder.exists()])
        from metarun.jobs.estimate import print_estimates

        return print_estimates(missing)
    # What is written for another program is nothing but the table.
    progress = contextlib.redirect_stdout(sys.stdout if style == "terminal" else sys.stderr)
    with progress:
        failed = [] if table_only else _run_missing(plan, config_dir)
    tables = _tables(plan, against, measures, folders_of(config_dir))
    printed = tables if style == "markdown" else list(map(without_marks, tables))
    if not table_only and style == "terminal":
        print()
    print(render(style, printed), end="")
    if not table_only:
        path = folder / f"{_file_name(words, against)}.md"
        write_atomically(path, render("markdown", tables).encode())
        written = [path, *_figures(plan, path)]
        with progress:
            print(f"\nwritten to {', '.join(map(str, written))}")
    for failure in failed:
        say("error", f"{failure} failed: repeat the command to try it again")
    return EXIT_FAILED if failed else EXIT_OK


def folder_name(job: Job) -> str:
    """Return the name of a run's folder: algorithm, data, sizes and a hash of what it computes."""
    config = job.config
    names = config["names"]
    sizes = f"{config['way']}way-{config['shot']}shot"
    sizes = f"{config.get('sizes') or sizes}-seed{config['seed']}"
    return slug([f"{names['algo']}-{names['data']}-{sizes}-{digest(config)}"], 120)


def with_algorithms(compose: Composer, words: Sequence[str]) -> list[str]:
    """Return the overrides, completed with all algorithms that fit the data if none is given."""
    if any(word.partition("=")[0] == "algo" for word in words):
        return list(words)
    jobs = [job.config for job in compose.jobs(words, sweep=True)]
    spec = build_source(jobs[0]).spec
    shot = min(
        1 if own.get("sizes") else least(own["shot"])
        for config in jobs
        for own in (config, config["train"])
    )
    streams = spec.streams is not None
    task_ids_known = spec.streams is None or spec.streams["test"].task_ids_known
    suited: list[str] = []
    for name in compose.options("algo"):
        target = locate("algo._target_", compose.target("algo", name))
        can = getattr(target, "capabilities", None)
        if can is None or (can.needs_task_ids and not task_ids_known):
            continue
        if can.least_shot > shot:
            say("warning", f"algo={name} is left out: it needs shot={can.least_shot} or more")
            continue
        if can.package is not None and find_spec(can.package) is None:
            missing = f"the package {can.package} is not installed"
            say("warning", f"algo={name} is left out: {missing}")
            continue
        fixed = spec.ways_vary and not can.accepts_any_way
        if fixed or (spec.shots_differ and can.needs_equal_shots):
            continue
        if spec.kind in can.kinds and can.learns_online == streams:
            suited.append(name)
    return [f"algo={','.join(suited)}", *words]


def result_of(job: Job) -> Result | None:
    """Return the result of a run; None if it is not finished."""
    return read_result(RunFolder(job.folder)) if job.folder.is_dir() else None


def _run_missing(plan: Sequence[Job], config_dir: str | None) -> list[Path]:
    """Start or continue all unfinished runs; return the folders of those that failed."""
    missing = [job for job in plan if not is_finished(job.folder)]
    check_jobs([job for job in missing if not job.folder.exists()])
    print(f"{len(plan) - len(missing)} of {len(plan)} runs are finished", flush=True)
    failed: list[Path] = []
    for number, job in enumerate(missing, 1):
        print(f"\nrun {number} of {len(missing)}: {job.folder}", flush=True)
        if _run(job, config_dir) != EXIT_OK:
            failed.append(job.folder)
    for job in plan:
        result = result_of(job)
        if result is not None and result.untrained is None and "stream" not in result.record:
            _measure_untrained(job)
    return failed


def _run(job: Job, config_dir: str | None) -> int:
    """Train and test one run; return its exit code.

    Raises:
        SystemExit: The run was interrupted.
    """
    outcome = ensure_finished(job.config, job.folder, job.overrides, config_dir, Screen())
    if outcome.state == "finished":
        return EXIT_OK
    say("error", outcome.why)
    if outcome.state == "interrupted":
        raise SystemExit(128 + outcome.signum)
    return EXIT_FAILED


def _measure_untrained(job: Job) -> None:
    """Test a learner with its initial parameters on the run's test episodes; store the result."""
    from metarun.evaluation.episodes import evaluate

    made = build_experiment(job.config)
    measured = evaluate(
        made.algorithm,
        made.source,
        "test",
        made.eval.episodes,
        made.eval.tasks_per_batch,
        views=made.eval.views,
        measurements=(),
    )
    record = {**interval_record(measured.values), "episodes": made.eval.episodes}
    RunFolder(job.folder).write_json(UNTRAINED, record)


def _check_against(name: str | None, plan: Sequence[Job]) -> None:
    """Check the comparator of regret.

    Raises:
        ValueError: The data are not a stream, or the comparator is not among the algorithms.
    """
    if name is None:
        return
    names = list(dict.fromkeys(job.config["names"]["algo"] for job in plan))
    if not _on_streams(plan):
        raise ValueError("--against needs a stream: type data=stream_…, see `metarun list data`")
    if name not in names:
        raise ValueError(f"--against {name} is not compared: expected one of {', '.join(names)}")


def _check_measures(names: Sequence[str], plan: Sequence[Job]) -> None:
    """Check that the runs compute the measures that are to be shown.

    Raises:
        ValueError: No run will have a measure of a name.
    """
    if not names:
        return
    from metarun.evaluation.measures import chosen

    known = {m.shown.name: m for job in plan for m in chosen(job.config["eval"]["measures"])}
    for name in names:
        if name not in known:
            raise ValueError(f"--columns {name}: expected one of {', '.join(known)}")


def _on_streams(plan: Sequence[Job]) -> bool:
    target = locate("algo._target_", plan[0].config["algo"]["_target_"])
    can = getattr(target, "capabilities", None)
    return can is not None and bool(can.learns_online)


def _tables(
    plan: Sequence[Job], against: str | None, measures: Sequence[str], folders: Sequence[Path]
) -> list[Table]:
    """Return a table with a row for each algorithm and a column for each setting.

    Seeds are pooled. Streams have many metrics, so each setting gets a table of its own.
    """
    columns = _by_setting(plan)
    names = list(dict.fromkeys(job.config["names"]["algo"] for job in plan))
    rows = {
        name: Row(
            name,
            method_name(folders, name),
            [_results(jobs, name) for jobs in columns.values()],
            [_failed(jobs, name) for jobs in columns.values()],
        )
        for name in names
    }
    if not _on_streams(plan):
        return [comparison(list(rows.values()), list(columns), measures)]
    tables: list[Table] = []
    for number, column in enumerate(columns):
        here = {
            name: replace(row, cells=[row.cells[number]], failed=[row.failed[number]])
            for name, row in rows.items()
        }
        title = column if len(columns) > 1 else ""
        learners = list(here.values())
        tables.append(stream_comparison(learners, here.get(against or ""), measures, title))
    return tables


def _results(jobs: Sequence[Job], name: str) -> list[Result]:
    """Return the results of an algorithm's finished runs among these jobs, one for each seed."""
    found = [result_of(job) for job in jobs if job.config["names"]["algo"] == name]
    return [result for result in found if result is not None]


def _failed(jobs: Sequence[Job], name: str) -> int:
    """Return how many of an algorithm's runs among these jobs failed."""
    own = [job.folder for job in jobs if job.config["names"]["algo"] == name]
    return sum(f.is_dir() and RunFolder(f).status().get("state") == "failed" for f in own)


def _figures(plan: Sequence[Job], table: Path) -> list[Path]:
    """Draw the curves of all learners along the same streams; return the files."""
    if not _on_streams(plan):
        return []
    from metarun.reporting.figures import streams

    columns = _by_setting(plan)
    paths: list[Path] = []
    for number, jobs in enumerate(columns.values(), 1):
        folders: dict[str, list[Path]] = {}
        for job in jobs:
            if result_of(job) is not None:
                folders.setdefault(job.config["names"]["algo"], []).append(job.folder)
        name = table.name.removesuffix(".md") + ("" if len(columns) == 1 else f"-{number}")
        paths += streams.draw_together(folders, table.with_name(name)) if folders else []
    return paths


def _by_setting(plan: Sequence[Job]) -> dict[str, list[Job]]:
    """Group the jobs by size and by the overrides that not all jobs share.

    Jobs of a group differ in algorithm and seed only.
    """
    apart = ("algo", "seed", "way", "shot")
    words = [[w for w in job.overrides if w.partition("=")[0] not in apart] for job in plan]
    common = set(words[0]).intersection(*words)
    found: dict[str, list[Job]] = {}
    for job, own in zip(plan, words, strict=True):
        setting = ", ".join([_size_name(job), *(word for word in own if word not in common)])
        found.setdefault(setting, []).append(job)
    return found


def _size_name(job: Job) -> str:
    config = job.config
    if config["way"] == 1:
        return f"{config['shot']} points"
    return size_text(config)


def _file_name(words: Sequence[str], against: str | None) -> str:
    """Return the overrides as a file name, shortened with a hash if they are too long."""
    said = [*words, *([] if against is None else [f"against={against}"])]
    if len(whole := slug(said, 1000)) <= 120:
        return whole or "all"
    return hashed_slug(said, 110)
