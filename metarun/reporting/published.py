"""`metarun table`: published results compared with measured results.

Each row shows a published figure, our reference, and the runs of its experiment, averaged over
seeds. Runs without a published figure are listed by their command-line overrides.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast
from zipfile import is_zipfile

import numpy as np
from omegaconf import OmegaConf

from metarun.config.checks import check_config
from metarun.config.composition import composer
from metarun.config.naming import HOW_IT_RUNS, digest, root_of
from metarun.config.schema import Config
from metarun.core.console import duration
from metarun.core.errors import one_line
from metarun.core.measures import Measure
from metarun.core.results import Results, validation_of
from metarun.core.settings import Published, PublishedCell
from metarun.core.sizes import most, size_text
from metarun.core.streams import say
from metarun.reporting.across import across_data
from metarun.reporting.references import (
    NOT_RUN,
    decimals,
    folders_of,
    is_accuracy,
    outcome_of,
    published_figure,
    read_reference,
    reference_figures,
    words_of,
)
from metarun.reporting.results import (
    Result,
    figure_of,
    measure_figure,
    measures_on_request,
    paired,
    read_figures,
    read_result,
)
from metarun.reporting.source_tables import by_source
from metarun.reporting.tables import Figure, Line, Style, Table, render, shown
from metarun.runs.find import find_runs, run_folders
from metarun.runs.folder import RunFolder

_log = logging.getLogger(__name__)

DAMAGED = "damaged"
"""State of a run whose files cannot be read."""


@dataclass(frozen=True)
class Run:
    """A run folder and its contents.

    Attributes:
        path: Path of the folder.
        config: Configuration of the run.
        words: Command-line overrides of the run.
        result: Result of the run; None until it is finished.
        status: Contents of `status.json`.
        trained_as: For a meta-test of a run in the setting of another experiment, the name of
            the run; else None.
    """

    path: Path
    config: Config
    words: tuple[str, ...]
    result: Result | None
    status: Mapping[str, Any]
    trained_as: str | None = None

    @property
    def typed(self) -> tuple[str, ...]:
        """The overrides except the seed, the experiment and those of how it is executed."""
        apart = {"seed", "experiment", *HOW_IT_RUNS}
        return tuple(word for word in self.words if root_of(word) not in apart)


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        runs: Finished runs, one for each seed.
        config: Configuration of the first run, or of the experiment if there is no run.
        label: Name of the group in tables and figures.
    """

    runs: tuple[Run, ...]
    config: Config
    label: str

    @property
    def experiment(self) -> str | None:
        """The value of `experiment`; None without one."""
        return _experiment(self.config)

    @property
    def trained_as(self) -> str | None:
        """Name of the runs that were meta-tested in the setting of this experiment, if any."""
        return self.runs[0].trained_as if self.runs else None

    @property
    def results(self) -> list[Result]:
        """The results of the runs."""
        return [run.result for run in self.runs if run.result is not None]


def tell_damaged(runs: Iterable[Run]) -> int:
    """Print an error for each run whose files cannot be read, and return their number."""
    damaged = [run for run in runs if run.status["state"] == DAMAGED]
    for run in damaged:
        say("error", f"{run.path} is damaged: {run.status['why']}: {run.status['remedy']}")
    return len(damaged)


def read_runs(paths: Iterable[Path]) -> Iterator[Run]:
    """Yield the runs in and below folders, sorted by name and without duplicates.

    Raises:
        ValueError: A folder does not exist.
    """
    met: set[Path] = set()
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path}: there is no such folder")
        for folder in run_folders(path):
            if folder.resolve() not in met:
                met.add(folder.resolve())
                yield _read(folder)


def named(words: Sequence[str]) -> list[Run]:
    """Return the runs that words of the command line stand for.

    Args:
        words: Folders of runs, folders that contain runs, names of sweeps, or what else stands
            for a run, see `find_run`.

    Raises:
        ValueError: A word stands for nothing, or there is no run in what it stands for.
    """
    found = list(read_runs(path for word in words for path in find_runs(word)))
    if not found:
        raise ValueError(f"{words[0]} contains no run: expected a run folder or a folder of runs")
    return found


def _read(folder: Path) -> Run:
    run = RunFolder(folder)
    try:
        words = tuple(run.overrides())
        return Run(folder, run.configuration(), words, read_result(run), run.status())
    # YAML, numpy and json raise errors of many unrelated classes.
    except Exception as error:
        why = " ".join(str(error).split()).removeprefix(f"{folder}/")
        return Run(folder, {}, (), None, {"state": DAMAGED, "why": why, "remedy": _remedy(run)})


def _remedy(run: RunFolder) -> str:
    """Return what to type for a damaged run."""
    remove = "remove the folder and repeat the command that created it"
    with suppress(OSError, ValueError):
        run.configuration()
        finished = run.status().get("state") == "finished"
        # Torch is not imported to read the checkpoint, which a resume does.
        if finished and run.damage_of_results() and is_zipfile(run.path / "checkpoints/last.pt"):
            return f"`metarun resume={run.path}` makes its meta-test again"
    return remove


def with_shared(runs: Iterable[Run]) -> Iterator[Run]:
    """Yield each run, followed by its meta-tests in the settings of other experiments."""
    for run in runs:
        yield run
        if run.result is not None:
            yield from _shared(run, run.result)


def _shared(run: Run, trained: Result) -> Iterator[Run]:
    """Yield the finished meta-tests `test=RUN experiment=OTHER` of a run."""
    for results in sorted((run.path / "tests").glob("*/results.json")):
        folder = RunFolder(results.parent)
        # Other meta-tests have no file of overrides.
        if not folder.has("overrides.yaml"):
            continue
        try:
            result, config = read_figures(folder), folder.configuration()
        except Exception as error:  # As in `_read`: many classes of errors.
            _log.warning("%s is damaged and left out: %s", results.parent, one_line(error))
            continue
        of_training = {key: trained.record.get(key) for key in ("val", "steps", "seconds")}
        time = datetime.fromtimestamp(results.stat().st_mtime).isoformat(timespec="seconds")
        yield Run(
            results.parent,
            config,
            tuple(folder.overrides()),
            replace(result, record=cast("Results", {**result.record, **of_training})),
            {"state": "finished", "time": time},
            trained_as=_name(run.config),
        )


def report(
    runs: Iterable[Run],
    style: Style = "terminal",
    config_dir: str | None = None,
    paper: str | None = None,
    measures: Sequence[str] = (),
) -> str:
    """Return all tables that the runs belong to, as text.

    Args:
        runs: Finished and unfinished runs.
        style: Output format.
        config_dir: Folder of the user's YAML files.
        paper: Name of a paper's table to show in full, including cells that were not run.
        measures: Names of measures that have a column of their own.

    Raises:
        ValueError: No run has a measure of this name.
    """
    runs = list(runs)
    written = render(style, parts(group(with_shared(runs)), config_dir, paper, measures))
    unfinished = [run for run in runs if run.result is None and run.status["state"] != DAMAGED]
    if unfinished and style in ("terminal", "markdown"):
        written += ("\n" if written else "") + render(style, [unfinished_table(unfinished)])
    return written


_LONGEST_WHY = 70
"""Letters of a reason in the table of unfinished runs; the whole is in the run's log."""


def unfinished_table(runs: Sequence[Run]) -> Table:
    """Return a table of one or more runs that are not finished: how far, and why."""
    lines: list[Line] = []
    for run in runs:
        status = run.status
        of = f" of {run.config['train']['steps']:,}" if run.config else ""
        at = f" at step {status['step']:,}{of}" if status.get("step") is not None else ""
        # What follows says what to type, for this run alone.
        why = str(status.get("why") or "").partition("; ")[0]
        lines.append(
            {
                "run": str(run.path),
                "state": f"{status.get('state')}{at}",
                "why": textwrap.shorten(why, _LONGEST_WHY, placeholder=" …"),
            }
        )
    return Table("not finished", lines, "`metarun resume=RUN` continues a run; its log says more")


def parts(
    groups: Sequence[Group],
    config_dir: str | None = None,
    paper: str | None = None,
    measures: Sequence[str] = (),
) -> list[Table]:
    """Return the tables that groups of runs belong to."""
    labeled = ranked(groups)
    asked = measures_on_request([result for g in groups for result in g.results], measures)
    own = [g for g in labeled if not g.config.get("published")]
    cells = [g for g in groups if g.config.get("published")]
    made: list[Table] = []
    for title, names in _papers({str(g.experiment) for g in cells}, config_dir, paper):
        rows = _rows(names, cells, config_dir)
        lines = [line for g in rows for line in published_lines(g, config_dir, asked)]
        made += [Table(title, lines), *_pairs(rows)]
    if own:
        made += [Table("runs", [own_line(g, asked) for g in own]), *_pairs(own)]
    return [*made, *by_source(labeled), *across_data(labeled)]


def ranked(groups: Sequence[Group]) -> list[Group]:
    """Return groups labeled by their differing overrides, best on meta-val first.

    The test figures have no influence on the order.
    """
    return sorted(_labeled(groups), key=_by_val)


def group(runs: Iterable[Run]) -> list[Group]:
    """Group finished runs whose configurations are equal except for the seed."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.result is not None:
            name = f"{_experiment(run.config)} {run.trained_as}"
            name += f" {digest({**run.config, 'seed': None})}"
            found.setdefault(name, []).append(run)
    return [
        Group(tuple(_seeds(together)), together[0].config, _name(together[0].config))
        for together in found.values()
    ]


def _experiment(config: Config) -> str | None:
    found = config["names"].get("experiment")
    return None if found is None else str(found)


def _name(config: Config) -> str:
    return _experiment(config) or f"algo={config['names']['algo']} data={config['names']['data']}"


def _seeds(runs: Sequence[Run]) -> list[Run]:
    """Return one run for each seed: the newest if a seed was run more than once."""
    newest = {run.config["seed"]: run for run in sorted(runs, key=lambda r: r.status["time"])}
    return [newest[seed] for seed in sorted(newest)]


def published_lines(
    group: Group, config_dir: str | None = None, measures: Sequence[Measure] = ()
) -> list[Line]:
    """Return a line for each published figure of an experiment."""
    published = check_config(group.config).published
    assert published is not None
    reference = read_reference(folders_of(config_dir), str(group.experiment))
    return [
        _published_line(group, published, cell, ours, measures)
        for cell, ours in zip(published.cells, reference_figures(reference, published), strict=True)
    ]


def at_the_end(run: Path, folder: Path, config_dir: str | None) -> str:
    """Return the table that ends a run of an experiment: published, our reference, and this run.

    Args:
        run: Folder of the run.
        folder: The same, or that of its meta-test in the setting of an experiment.
        config_dir: Folder of the user's YAML files.
    """
    (found,) = (r for r in with_shared(read_runs([run])) if r.path == folder)
    published = check_config(found.config).published
    assert published is not None
    heads = {"task": "task", "published": "published", "reference": "reference", "ours": "this run"}
    lines: list[Line] = [
        {column: line[head] for head, column in heads.items()}
        for line in published_lines(Group((found,), found.config, ""), config_dir)
    ]
    title = f"{found.config['names']['experiment']}: {published.paper}, {published.table}"
    return render("terminal", [Table(title, lines)]).rstrip()


def _published_line(
    group: Group,
    published: Published,
    cell: PublishedCell,
    reference: Figure | None,
    measures: Sequence[Measure],
) -> Line:
    accuracy = is_accuracy(group.config)
    printed = published_figure(published, cell, accuracy=accuracy)
    line: dict[str, str | Figure] = {
        "experiment": str(group.experiment),
        "method": published.row,
        "task": task(group.config, cell),
        "published": printed,
        "reference": reference or NOT_RUN,
        "ours": NOT_RUN,
        "difference": "",
        **{measure.head: measure_figure(group.results, measure) for measure in measures},
        "seeds": "",
        "episodes": "",
        "batch norm": "",
        "split": _split(group.config),
        "steps": f"0 of {published.steps:,}",
        "time": "",
        "note": "",
    }
    if not group.runs:
        return line
    record = group.results[0].record
    steps = int(record["steps"])
    line |= {
        "seeds": str(len(group.runs)),
        "batch norm": str(record["bn_statistics"]),
        "steps": f"{steps:,} of {published.steps:,}",
        "time": _time(group),
        "note": _note(group),
    }
    try:
        ours = figure_of(group.results, cell.inner_steps, cell.presentation)
    except LookupError as error:
        return line | {"ours": str(error)}
    outcome = outcome_of(ours, cell, steps, published.steps, accuracy=accuracy)
    # The steps have a column of their own.
    mark = words_of(outcome, steps, published.steps).partition(": ")[0]
    return line | {
        "ours": replace(ours, places=decimals(cell.value), mark=mark),
        "episodes": str(ours.episodes),
        "difference": f"{ours.mean - cell.value:+.{decimals(cell.value)}f}",
    }


def _note(group: Group) -> str:
    """Describe how runs differ from the recipe of their experiment."""
    changed = [word for word in group.runs[0].typed if not word.startswith("train.steps=")]
    notes = [f"changed: {' '.join(changed)}"] if changed else []
    if group.trained_as is not None:
        notes.insert(0, f"trained and chosen on meta-val as {group.trained_as}")
    return "; ".join(notes)


def own_line(group: Group, measures: Sequence[Measure] = ()) -> Line:
    """Return the line of runs without a published figure."""
    record, measured, val = group.results[0].record, figure_of(group.results), val_of(group)
    return {
        "run": group.label,
        "task": task(group.config),
        "metric": "accuracy, %" if record["metric"] == "accuracy" else "mse, lower is better",
        "meta-val": "–" if val is None else shown(val, accuracy=record["metric"] == "accuracy"),
        "meta-test": measured,
        **{measure.head: measure_figure(group.results, measure) for measure in measures},
        "seeds": str(measured.seeds),
        "episodes": str(measured.episodes),
        "batch norm": str(record["bn_statistics"]),
        "split": _split(group.config),
        "steps": _steps(group),
        "time": _time(group),
    }


def _steps(group: Group) -> str:
    """Return the number of steps, and of how many if training ended before them."""
    made, planned = group.results[0].record["steps"], group.config["train"]["steps"]
    return f"{made:,} of {planned:,}" if made < planned else f"{made:,}"


def _time(group: Group) -> str:
    return duration(float(np.mean([result.record["seconds"] for result in group.results])))


def val_of(group: Group) -> float | None:
    """Return the mean over seeds of the best figure on meta-val; None if one lacks it."""
    found = [validation_of(result.record) for result in group.results]
    means = [val["mean"] for val in found if val is not None]
    return float(np.mean(means)) if len(means) == len(found) else None


def _by_val(group: Group) -> float:
    val = val_of(group)
    if val is None:
        return np.inf
    return -val if group.results[0].record["metric"] == "accuracy" else val


def _labeled(groups: Sequence[Group]) -> list[Group]:
    """Return groups labeled by the overrides that are not common to all of them."""
    common = set.intersection(*(set(g.runs[0].typed) for g in groups)) if groups else set()
    return [
        replace(
            g, label=" ".join(word for word in g.runs[0].typed if word not in common) or g.label
        )
        for g in groups
    ]


def _pairs(groups: Sequence[Group]) -> list[Table]:
    """Return a table that compares the best group by meta-val with each other group.

    Only groups with the same test episodes are compared.
    """
    together: dict[str, list[Group]] = {}
    for g in groups:
        if g.runs:
            record = g.results[0].record
            key = f"{record['metric']} {record['episodes_hash']} {len(g.results[0].episodes)}"
            together.setdefault(key, []).append(g)
    lines = [line for members in together.values() for line in _against_best(members)]
    title = "on the same episodes, paired: mean difference ± 95 % interval"
    return [Table(title, lines)] if lines else []


def _against_best(groups: Sequence[Group]) -> list[Line]:
    best, *others = sorted(groups, key=_by_val)
    lines: list[Line] = []
    for other in others:
        difference = paired(best.results, other.results)
        told_apart = not difference.meets(Figure(0.0))
        lines.append(
            {
                "best on meta-val": best.label,
                "other": other.label,
                "best - other": difference,
                "leaves out zero": "yes" if told_apart else "no",
                "episodes": str(difference.episodes),
            }
        )
    return lines


def _papers(
    experiments: set[str], config_dir: str | None, paper: str | None
) -> Iterator[tuple[str, list[str]]]:
    """Yield the papers' tables that have a run, with the names of their experiments."""
    left = set(experiments)
    files = _paper_files(config_dir)
    if paper is not None and paper not in files:
        raise ValueError(f"--paper {paper}: expected one of {', '.join(files)}")
    for name in [paper] if paper is not None else files if experiments else ():
        names = _experiments_of(files[name])
        if name == paper or experiments & set(names):
            left -= set(names)
            yield name, names
    if left and paper is None:
        yield "experiments", sorted(left)


def _paper_files(config_dir: str | None) -> dict[str, Path]:
    paths = [p for folder in folders_of(config_dir) for p in (folder / "paper").glob("*.yaml")]
    return {path.stem: path for path in sorted(paths, key=lambda path: path.stem)}


def _experiments_of(path: Path) -> list[str]:
    """Return the experiments in a paper's sweep; the file is not composed, to save seconds."""
    listed = OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params.experiment")
    return [name.strip() for name in str(listed or "").split(",") if name.strip()]


def _rows(names: Sequence[str], groups: Sequence[Group], config_dir: str | None) -> list[Group]:
    """Return the groups of a paper's experiments in its order; missing ones have no runs."""
    rows: list[Group] = []
    with composer(config_dir) as compose:
        for name in names:
            found = [g for g in groups if g.experiment == name]
            rows += found or [Group((), compose.job([f"experiment={name}"]).config, name)]
    return rows


def task(config: Mapping[str, Any], cell: PublishedCell | None = None) -> str:
    """Describe the size of the tasks, and the point at which a published value was measured."""
    size = f"{config['shot']} points"
    if most(config["way"]) > 1:
        size = size_text(config)
    if cell is not None and cell.inner_steps is not None:
        size += f", {cell.inner_steps} step{'s' * (cell.inner_steps != 1)}"
    if cell is not None and cell.presentation is not None:
        size += f", presentation {cell.presentation}"
    return size


def _split(config: Config) -> str:
    data = str(config["names"]["data"])
    split = config["data"].get("split")
    return data if split is None else f"{data}/{split}"
