"""The page of one run, and its sections."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metarun.core.console import duration, warnings_held
from metarun.core.errors import describe_error
from metarun.core.measures import figure as shown
from metarun.core.results import Results, measures_of
from metarun.reporting import published
from metarun.reporting.comparison_tables import STREAM_HEADS
from metarun.reporting.figures import classes, curves, presentations, samples, strategies, streams
from metarun.reporting.figures.drawing import Panel
from metarun.reporting.page import Code, Page, Section
from metarun.reporting.run_files import RunFiles
from metarun.reporting.tables import Figure, Line, Table
from metarun.runs.folder import RunFolder
from metarun.runs.openings import openings

if TYPE_CHECKING:
    from metarun.core.types import EpisodeSource
    from metarun.reporting.figures.tasks import Learned

_OWN = (curves, presentations, strategies)
_ABOUT_STREAMS = "Defined, with sources, in metarun/evaluation/continual_metrics.py."
_ABOUT_TASKS = "Three test tasks: those at 5, 50 and 95 % of the ranking from best to worst."
_OF_REGRESSION = " Their errors are relative to the variance of the task's targets."


class _Notes:
    """Reasons why parts of a page are missing, each listed once."""

    def __init__(self, first: str = "") -> None:
        self._texts = [first] if first else []

    def panels(self, what: str, make: Callable[[], Sequence[Panel]]) -> Sequence[Panel]:
        """Return figures; on an exception return none and note the reason.

        A user-defined algorithm may raise any exception.
        """
        try:
            return make()
        except Exception as error:
            self.add(f"No {what}: {describe_error(error)}.")
            return []

    def add(self, text: str) -> None:
        """Add a reason, unless it is listed already."""
        if text not in self._texts:
            self._texts.append(text)

    def __str__(self) -> str:
        return " ".join(self._texts)


def page(files: RunFiles, note: str = "", config_dir: str | None = None) -> Page:
    """Return the page of one finished or unfinished run."""
    stands = ""
    if files.status["state"] != "finished":
        at = f" at step {files.status['step']}" if "step" in files.status else ""
        # The trainer's reason begins with the step, which is already shown.
        reason = str(files.status.get("why") or "").removeprefix(
            f"step {files.status.get('step')}: "
        )
        why = f": {reason}" if reason else ""
        # A killed process leaves its status at "running".
        killed = ", or was killed since" if files.status["state"] == "running" else ""
        stands = f"The run is {files.status['state']}{at}{killed}{why}."
    parts, missing = sections(files, " ".join(filter(None, [stands, note])), config_dir)
    return Page(files.title, facts(files), [*parts, reproduce(files)], missing, about(files))


def facts(files: RunFiles) -> list[tuple[str, str]]:
    """Return names and values of the most important figures."""
    results = files.results
    if results is None:
        return [
            ("state", str(files.status["state"])),
            ("step", f"{files.status.get('step', 0)} of {files.config['train']['steps']}"),
            ("folder", str(files.path)),
        ]
    return [
        *reached(results),
        *(
            (measure.title, measure.text(value["mean"], value["ci95"]))
            for measure, value in measures_of(results)
            if measure.by_default
        ),
    ]


def about(files: RunFiles) -> list[tuple[str, str]]:
    """Return names and values of what else identifies a finished run."""
    results = files.results
    if results is None:
        return []
    rate = results.get("tasks_per_second")
    return [
        ("meta-tests on its test split", str(openings(files.path))),
        ("batch norm at test", str(results["bn_statistics"])),
        ("parameters", f"{results['parameters']:,}"),
        ("time", duration(results["seconds"]) + (f", {rate:,.0f} tasks/s" if rate else "")),
        ("device", str(results["device"])),
        ("folder", str(files.path)),
    ]


def reached(results: Results) -> list[tuple[str, str]]:
    """Return the figures of meta-test and of the best step on meta-val."""
    metric, test, val = results["metric"], results["test"], results.get("val")
    figure = shown(metric, test["mean"], test["ci95"])
    found = [(f"meta-test {metric}", f"{figure}, {test['episodes']} episodes")]
    if val:
        figure = shown(metric, val["mean"], val["ci95"])
        found.append((f"meta-val {metric}", f"{figure}, step {val['step']} of {results['steps']}"))
    return found


def reproduce(files: RunFiles) -> Section:
    """Return the section with the commands, versions and configuration of a run."""
    here = files.environment
    git = here.get("git") or {}
    words = [*_config_dir(here.get("command") or []), *files.words]
    lines = [" ".join(["metarun", *map(shlex.quote, words)])]
    # In a block to be copied to a shell, nothing but a hash may stand here.
    if re.fullmatch(r"[0-9a-f]{7,64}", str(git.get("commit"))):
        dirty = ", with uncommitted changes" if git.get("dirty") else ""
        lines.insert(0, f"# in a clone at {git['commit'][:12]}{dirty}")
    finished = files.status["state"] == "finished"
    verb = shlex.quote(f"{'test' if finished else 'resume'}={files.path}")
    more = f"metarun {verb}" + ("  # add other settings, such as shot=…" if finished else "")
    codes = [Code("Command", "\n".join(lines)), Code("Continue or test", more)]
    if here.get("versions"):
        versions = "  ".join(f"{name} {v}" for name, v in here["versions"].items())
        keys = ("device_name", "cores", "torch_threads", "platform")
        machine = "  ".join(f"{key} {here[key]}" for key in keys if key in here)
        codes.append(Code("Versions and machine", f"{versions}\n{machine}", folded=True))
    text = RunFolder(files.path).config_text()
    return Section("again", "Reproduce", codes=[*codes, Code("Configuration", text, folded=True)])


def command(environment: Mapping[str, Any]) -> str:
    """Return the command that started a run; empty if it resumed or tested one."""
    words = list(map(str, environment.get("command") or []))[1:]
    if not words or any(word.startswith(("resume=", "test=")) for word in words):
        return ""
    return " ".join(["metarun", *map(shlex.quote, words)])


def _config_dir(command: Sequence[str]) -> list[str]:
    """Return the words of a command that name the user's folders of YAML files."""
    words: list[str] = []
    for place, word in enumerate(command):
        if word in ("--config-dir", "-cd"):
            words += ["--config-dir", *command[place + 1 : place + 2]]
        elif word.startswith(("--config-dir=", "hydra.searchpath=")):
            words.append(word)
    return words


def sections(
    files: RunFiles, note: str = "", config_dir: str | None = None
) -> tuple[list[Section], str]:
    """Return the sections about one run, and the reasons why some are missing."""
    notes = _Notes(note)
    learned = _learned(files, notes, config_dir)
    own = [panel for source in _OWN for panel in source.panels(files)]
    tasks, *others = _looked_at(files, learned, notes)
    parts = [
        tasks,
        # The picture of a stream is the one along it; it has no single tasks.
        Section("stream", "Along the stream", panels=streams.panels(files), tables=_stream(files)),
        Section(
            "reached",
            "Learning and meta-test",
            panels=own,
            tables=[*_published(files, config_dir), *_measures(files)],
        ),
        *others,
        Section("samples", "Generated samples", panels=samples.panels(files)),
        Section("tests", "Later meta-tests", tables=_tests(files, notes)),
    ]
    return parts, str(notes)


def _looked_at(files: RunFiles, learned: Learned | None, notes: _Notes) -> list[Section]:
    """Return the sections about test tasks, which run the trained learner, and about classes."""
    single: Sequence[Panel] = []
    inside: list[Panel] = []
    if files.results is not None and "stream" not in files.results:
        from metarun.reporting.figures import adaptation, task_groups, tasks

        if learned is not None:
            figures = files.arrays[str(files.metric)]
            single = notes.panels("single tasks", lambda: tasks.panels(learned, figures))
            inside += notes.panels(
                "view of the network", lambda: adaptation.panels(learned, figures)
            )
        inside += notes.panels("tasks as points", lambda: task_groups.panels(files, learned))
    scaled = _OF_REGRESSION if files.metric == "mse" else ""
    return [
        Section("tasks", "Single tasks", _ABOUT_TASKS + scaled, panels=single),
        Section("classes", "Classes", panels=classes.panels(files)),
        Section("adaptation", "Inside the network, and tasks as points", panels=inside),
    ]


def _learned(files: RunFiles, notes: _Notes, config_dir: str | None) -> Learned | None:
    """Restore the trained learner; None if the run has no test tasks to draw."""
    if files.results is None or "stream" in files.results or files.metric not in files.arrays:
        return None
    from metarun.inference.learner import restored
    from metarun.reporting.figures.tasks import Learned

    try:
        with warnings_held():
            experiment = restored(RunFolder(files.path), dict(files.config), config_dir)
        _check_data(files, experiment.source)
    # A user-defined algorithm may raise anything; the rest of the page does not need it.
    except Exception as error:
        notes.add(f"No single tasks are shown: {describe_error(error)}.")
        return None
    algorithm, views = experiment.algorithm.eval(), experiment.eval.views
    return Learned(algorithm, experiment.source, files.color, views)


def _check_data(files: RunFiles, source: EpisodeSource) -> None:
    """Check that the test tasks are those of the run.

    Raises:
        ValueError: The data have changed since.
    """
    last = (files.environment.get("resumed") or [files.environment])[-1]
    if last.get("data_fingerprint") not in (None, source.fingerprint()):
        raise ValueError(f"the data are no longer those of the run, {last['data_fingerprint']}")


def _published(files: RunFiles, config_dir: str | None) -> list[Table]:
    """Return the published values of the experiments that a run and its meta-tests belong to."""
    lines = [
        line
        for group in published.group(published.with_shared(published.read_runs([files.path])))
        if group.config.get("published")
        for line in published.published_lines(group, config_dir)
    ]
    return [Table("Published against measured", lines)] if lines else []


def _measures(files: RunFiles) -> list[Table]:
    """Return the table of the measures of the meta-test."""
    results = files.results
    if results is None:
        return []
    lines: list[Line] = [
        {
            "measure": measure.head,
            "mean ± 95 % interval": Figure(
                measure.scale * (math.nan if value["mean"] is None else value["mean"]),
                None if value["ci95"] is None else measure.scale * value["ci95"],
                places=measure.places,
            ),
            "better": measure.better or "",
            "definition": measure.about,
        }
        for measure, value in measures_of(results)
    ]
    temperature = results["temperature"]
    text = f"Logits are divided by {temperature:.4g}, fitted on meta-val." * (temperature != 1.0)
    return [Table("Measures of the meta-test", lines, text)] if lines else []


def _stream(files: RunFiles) -> list[Table]:
    """Return the table of a stream's figures."""
    results = files.results
    if results is None or not results.get("stream"):
        return []
    accuracy = results["metric"] == "accuracy"
    lines: list[Line] = []
    for name, value in results["stream"].items():
        percent = accuracy and not name.startswith(("cumulative_loss", "rows_to"))
        scale = 100.0 if percent else 1.0
        mean = math.nan if value["mean"] is None else scale * value["mean"]
        width = None if value["ci95"] is None else scale * value["ci95"]
        head = STREAM_HEADS.get(name, name) + (", %" if percent else "")
        lines.append({"figure": head, "mean ± 95 % interval over streams": Figure(mean, width)})
    return [
        Table(
            "Figures",
            lines,
            text="Defined, with sources, in metarun/evaluation/continual_metrics.py.",
        )
    ]


def _tests(files: RunFiles, notes: _Notes) -> list[Table]:
    """Return the table of later meta-tests of the run."""
    lines: list[Line] = []
    for path in sorted((files.path / "tests").glob("*/results.json")):
        try:
            results = RunFolder(path.parent).read_results()
        except ValueError as error:
            notes.add(f"A later meta-test is left out: {error}.")
            continue
        test = results["test"]
        lines.append(
            {
                "test": path.parent.name,
                "data": str(results["data"]),
                "way": str(results["way"]),
                "shot": str(results["shot"]),
                "figure": shown(results["metric"], test["mean"], test["ci95"]),
                "episodes": str(test["episodes"]),
                "batch norm": str(results["bn_statistics"]),
            }
        )
    return [Table("Meta-tests in other settings", lines)] if lines else []
