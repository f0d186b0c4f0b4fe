"""`metarun report`: one HTML page for a run, for several, or for a sweep.

What a run has written is read, not measured again; some single test tasks are looked at once
more, to be drawn. A run without some of it shows what it has.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context

from metarun import papers
from metarun.intervals import quiet
from metarun.launch import EXIT_FAILED, EXIT_OK, describe, warnings_held
from metarun.papers import DAMAGED, Group, Run
from metarun.report import (
    classes,
    curves,
    presentations,
    samples,
    strategies,
    streams,
    together,
)
from metarun.report.drawing import DASHES, STYLE, Panel, colours
from metarun.report.files import RunFiles
from metarun.report.page import Cell, Code, Page, Row, Section, Table, is_ours, render
from metarun.report.together import Entry
from metarun.runs import RunFolder, write_atomically
from metarun.screen import duration
from metarun.screen import figure as shown
from metarun.tables import STREAM_HEADS, Figure, Line, figure_of

if TYPE_CHECKING:
    from metarun.report.tasks import Learned

FILE = "report.html"


def run(argv: Sequence[str]) -> int:
    """Answer `metarun report PATH… [--output DIR]`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="metarun report",
        description="One HTML page for a run, for several, or for a sweep; it needs no network.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="run folders, or folders of them")
    parser.add_argument(
        "--output", metavar="DIR", help=f"the folder of {FILE} and figures/: that of the runs"
    )
    parser.add_argument("--config-dir", help="your own YAML files beside the shipped ones")
    args = parser.parse_args(list(argv))
    if not args.paths:
        raise ValueError("metarun report needs a folder, as in `metarun report outputs/sweeps`")
    found = list(papers.read_runs(map(Path, args.paths)))
    damaged = papers.tell_damaged(found)
    whole = [run for run in found if run.status["state"] != DAMAGED]
    if not whole:
        raise ValueError(f"{args.paths[0]}: there is no run in it that can be read")
    folder = Path(args.output) if args.output else _home(args.paths, whole)
    place = folder / FILE
    if place.exists() and not is_ours(place):
        raise ValueError(f"{place} is not a page that metarun made: type --output DIR")
    _write(whole, folder, args.config_dir)
    print(place)
    return EXIT_FAILED if damaged else EXIT_OK


@quiet
def _write(runs: Sequence[Run], folder: Path, config_dir: str | None) -> None:
    """Write the page and its figures."""
    with rc_context(STYLE):
        page = _single(runs[0]) if len(runs) == 1 else _several(runs, config_dir)
        folder.mkdir(parents=True, exist_ok=True)
        html = render(page, folder / "figures")
    write_atomically(folder / FILE, html.encode())


def _home(paths: Sequence[str], runs: Sequence[Run]) -> Path:
    """Where a page goes by itself: the folder typed, or the one that holds all of them."""
    if len(runs) == 1:
        return runs[0].path
    if len(paths) == 1:
        return Path(paths[0])
    return Path(os.path.commonpath([Path(path).absolute() for path in paths]))


# One run.


def _single(found: Run) -> Page:
    files = RunFiles.read(found.path)
    sections, note = _sections(files)
    title = _title(files)
    state = files.status["state"]
    if state != "finished":
        why = f": {files.status['why']}" if files.status.get("why") else ""
        stands = f"The run is {state} at step {files.status.get('step')}{why}."
        note = f"{stands} {note}".strip()
    return Page(title, _facts(files), [_again(files), *sections, _tests(files)], note)


def _title(files: RunFiles) -> str:
    results = files.results or {}
    size = f"{files.plain['shot']} points"
    if "layout" in results:
        size = f"{max(results['layout']['visits']) + 1} tasks"
    elif results.get("kind") == "classification" or int(files.plain["way"]) > 1:
        size = f"{files.plain['way']}-way {files.plain['shot']}-shot"
    names = files.plain["names"]
    named = f"{names['experiment']}: " if names.get("experiment") else ""
    return f"{named}{names['algo']} on {names['data']}, {size}, seed {files.plain['seed']}"


def _facts(files: RunFiles) -> list[tuple[str, str]]:
    results = files.results
    if results is None:
        return [
            ("state", str(files.status["state"])),
            ("step", f"{files.status.get('step', 0)} of {files.plain['train']['steps']}"),
            ("folder", str(files.path)),
        ]
    metric, test, val = results["metric"], results["test"], results.get("val")
    facts = [
        (
            f"meta-test {metric}",
            f"{shown(metric, test['mean'], test['ci95'])}, {test['episodes']} episodes",
        )
    ]
    if val:
        facts.append(
            (
                f"meta-val {metric}",
                f"{shown(metric, val['mean'], val['ci95'])}, step {val['step']} "
                f"of {results['steps']}",
            )
        )
    if "log_likelihood" in results:
        likely, covered = results["log_likelihood"], results["coverage"]
        facts += [
            ("log-likelihood", shown("log_likelihood", likely["mean"], likely["ci95"])),
            ("within the 95 % band", shown("accuracy", covered["mean"], covered["ci95"])),
        ]
    return [
        *facts,
        ("batch norm at test", str(results["bn_statistics"])),
        ("parameters", f"{results['parameters']:,}"),
        ("time", _time(results)),
        ("device", str(results["device"])),
        ("folder", str(files.path)),
    ]


def _time(results: Mapping[str, Any]) -> str:
    rate = results.get("tasks_per_second")
    return duration(results["seconds"]) + (f", {rate:,.0f} tasks/s" if rate else "")


def _again(files: RunFiles) -> Section:
    """What was run, and how to run it again."""
    here = files.environment
    git = here.get("git") or {}
    typed = " ".join(["metarun", *map(shlex.quote, files.words)])
    lines = [typed]
    if git.get("commit"):
        dirty = ", with changes that were not committed" if git.get("dirty") else ""
        lines.insert(0, f"# in a clone at {git['commit'][:12]}{dirty}")
    versions = "  ".join(f"{name} {v}" for name, v in (here.get("versions") or {}).items())
    machine = "  ".join(
        f"{key} {here[key]}"
        for key in ("device_name", "cores", "torch_threads", "platform")
        if key in here
    )
    codes = [Code("Command", "\n".join(lines))]
    more = [f"metarun test={files.path} shot=…    # another setting, or data=…"]
    if files.status["state"] != "finished":
        more.insert(0, f"metarun resume={files.path}")
    codes.append(Code("Go on", "\n".join(more)))
    if versions:
        codes.append(Code("Versions and machine", f"{versions}\n{machine}", folded=True))
    text = RunFolder(files.path).config_text()
    codes.append(Code("Configuration", text, folded=True))
    return Section("again", "Run it again", codes=codes)


def _sections(files: RunFiles) -> tuple[list[Section], str]:
    """The parts of a page that are about one run, and why some are missing."""
    learned, note = _learned(files)
    own = {panel.name: panel for panel in curves.panels(files)}
    along = [own[name] for name in ("learning", "loss") if name in own]
    reached = [own[name] for name in ("adaptation", "episodes") if name in own]
    reached += [*presentations.panels(files), *strategies.panels(files)]
    single: list[Panel] = []
    inside: list[Panel] = []
    grouped: list[Panel] = []
    if learned is not None:
        from metarun.report import adapting, tasks

        figures = files.arrays[str(files.metric)]
        single = tasks.panels(learned, figures)
        inside = adapting.panels(learned, figures)
    if files.results is not None and "stream" not in files.results:
        from metarun.report import groups

        grouped = groups.panels(files, learned)
    return [
        Section(
            "reached",
            "Learning and meta-test",
            panels=[*along, *reached],
            tables=_published(files),
        ),
        Section(
            "tasks",
            "Single tasks",
            "Three test tasks: at 5, 50 and 95 % of the way from the best to the worst.",
            panels=single,
        ),
        Section("classes", "Classes", panels=classes.panels(files)),
        Section("adaptation", "Inside the network", panels=inside),
        Section("groups", "Tasks as points", panels=grouped),
        Section("samples", "What was made", panels=samples.panels(files)),
        Section("stream", "Along the stream", panels=streams.panels(files), tables=_stream(files)),
    ], note


def _learned(files: RunFiles) -> tuple[Learned | None, str]:
    """What the run has learned; None where there is nothing to look at, and why if it matters."""
    metric = files.metric
    if files.results is None or "stream" in files.results or metric not in files.arrays:
        return None, ""
    from metarun.predict import restored
    from metarun.report.tasks import Learned

    try:
        with warnings_held():
            experiment = restored(RunFolder(files.path), dict(files.plain))
    # Of a user's own algorithm anything; the rest of the page does not need it.
    except Exception as error:
        return None, f"No single tasks are shown: {describe(error)}."
    return Learned(experiment.algorithm.eval(), experiment.source, files.colour), ""


def _published(files: RunFiles) -> list[Table]:
    if not files.plain.get("published") or files.results is None:
        return []
    lines = [
        line
        for group in papers.group(papers.read_runs([files.path]))
        for line in papers.published_lines(group)
    ]
    return [_table("Published against measured", lines)]


def _stream(files: RunFiles) -> list[Table]:
    """The figures of lifelong learning."""
    results = files.results
    if results is None or "stream" not in results:
        return []
    accuracy = results["metric"] == "accuracy"
    lines: list[Line] = []
    for name, value in results["stream"].items():
        percent = accuracy and not name.startswith(("cumulative_loss", "rows_to"))
        scale = 100.0 if percent else 1.0
        mean = math.nan if value["mean"] is None else scale * value["mean"]
        width = None if value["ci95"] is None else scale * value["ci95"]
        head = STREAM_HEADS.get(name, name) + (", %" if percent else "")
        lines.append({"figure": head, "mean ± 95 % interval over lifetimes": Figure(mean, width)})
    text = "Defined, with their sources, in metarun/continual.py."
    return [replace(_table("Figures", lines), text=text)] if lines else []


def _tests(files: RunFiles) -> Section:
    """Later meta-tests of the run."""
    lines: list[Line] = []
    for path in sorted((files.path / "tests").glob("*/results.json")):
        results = RunFolder(path.parent).read_json("results.json")
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
    tables = [_table("Meta-tests in other settings", lines)] if lines else []
    return Section("tests", "Later meta-tests", tables=tables)


# Several runs.


def _several(runs: Sequence[Run], config_dir: str | None) -> Page:
    groups = papers.group(runs)
    clusters = _clusters(groups)
    looks = _looks(groups)
    entries = {title: _entries(members, looks) for title, members in clusters.items()}
    keys = {e.label: e for members in entries.values() for e in members}
    tables = [_table(title, lines, keys) for title, lines in papers.parts(groups, config_dir)]
    unfinished = [run for run in runs if run.result is None]
    sections = [Section("runs", "Results", tables=[*tables, *_unfinished(unfinished)])]
    for number, (title, members) in enumerate(entries.items()):
        name = "together" if not number else f"together-{number + 1}"
        panels = together.panels(members, str(members[0].runs[0].metric))
        if number:
            panels = [replace(panel, name=f"{panel.name}-{number + 1}") for panel in panels]
        sections.append(Section(name, title, panels=panels))
    facts = [("runs", str(len(runs))), ("finished", str(len(runs) - len(unfinished)))]
    note = ""
    if entries:
        best = next(e for e in next(iter(entries.values())) if e.best)
        chosen = best.runs[0]
        own, note = _sections(chosen)
        again = _again(chosen)
        about = Section(
            "best",
            "The best run",
            f"Chosen on meta-val: {best.label}, {_title(chosen)}. What follows is about it alone.",
            codes=again.codes,
        )
        sections += [about, *(replace(part, title=f"Best: {part.title}") for part in own)]
        facts.append(("best on meta-val", best.label))
        facts += _facts(chosen)[:2]
    return Page(_heading(runs), facts, sections, note)


def _heading(runs: Sequence[Run]) -> str:
    names = {
        word: list(dict.fromkeys(str(run.plain["names"][word]) for run in runs))
        for word in ("algo", "data")
    }
    parts = [
        ", ".join(found) if len(found) <= 4 else f"{len(found)} {what}"
        for found, what in ((names["algo"], "algorithms"), (names["data"], "data sets"))
    ]
    return f"{len(runs)} runs: {' on '.join(parts)}"


def _clusters(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Groups whose figures can stand on one axis, most first, each best on meta-val first."""
    together_: dict[str, list[Group]] = {}
    for group in groups:
        results = group.results[0].record
        plain = group.plain
        size = f"{plain['way']}-way {plain['shot']}-shot"
        if results["kind"] == "regression":
            size = f"{plain['shot']} points"
        if "layout" in results:
            size = "lifetimes"
        together_.setdefault(f"{size} on {plain['names']['data']}", []).append(group)
    ordered = sorted(together_.items(), key=lambda item: -len(item[1]))
    return {title: papers.ranked(members) for title, members in ordered}


def _looks(groups: Sequence[Group]) -> dict[str, str]:
    """The colour of each algorithm."""
    found = colours(str(group.plain["names"]["algo"]) for group in groups)
    return {name: colour for name, (colour, _) in found.items()}


def _entries(groups: Sequence[Group], looks: Mapping[str, str]) -> list[Entry]:
    """The groups of a figure; line styles tell those of one algorithm apart."""
    met: dict[str, int] = {}
    made: list[Entry] = []
    first = next((n for n, g in enumerate(groups) if papers.val_of(g) is not None), 0)
    for number, group in enumerate(groups):
        algo = str(group.plain["names"]["algo"])
        place = met[algo] = met.get(algo, -1) + 1
        measured, val = figure_of(group.results), papers.val_of(group)
        runs = [replace(RunFiles.read(run.path), colour=looks[algo]) for run in group.runs]
        words = (word.partition("=") for word in group.runs[0].told)
        made.append(
            Entry(
                f"entry{number}",
                group.label,
                runs,
                {key: value for key, _, value in words},
                measured.mean,
                measured.ci95,
                math.nan if val is None else val,
                looks[algo],
                DASHES[place % len(DASHES)],
                number == first,
            )
        )
    return made


def _unfinished(runs: Sequence[Run]) -> list[Table]:
    lines: list[Line] = [
        {
            "run": str(run.path),
            "state": str(run.status.get("state")),
            "step": str(run.status.get("step", "")),
            "why": str(run.status.get("why", "")),
        }
        for run in runs
    ]
    return [_table("Not finished", lines)] if lines else []


def _table(title: str, lines: Sequence[Line], entries: Mapping[str, Entry] | None = None) -> Table:
    """Lines as a table whose columns can be sorted; columns without any content are left out."""
    heads = [head for head in lines[0] if any(str(line[head]) for line in lines)]
    return Table(title, heads, [_row(line, heads, entries or {}) for line in lines])


def _row(line: Line, heads: Sequence[str], entries: Mapping[str, Entry]) -> Row:
    entry = entries.get(str(line.get("run", "")))
    cells = [_cell(line[head]) for head in heads]
    if entry is not None and heads[0] == "run":
        cells[0] = replace(cells[0], colour=entry.colour)
    return Row(cells, None if entry is None else entry.key)


def _cell(value: str | Figure) -> Cell:
    if isinstance(value, Figure):
        return Cell(str(value), value.mean)
    try:
        return Cell(value, float(value.replace(",", "")))
    except ValueError:
        return Cell(value)
