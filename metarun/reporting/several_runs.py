"""The page of several runs: their tables, their curves in shared figures, and the best run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from metarun.core.results import validation_of
from metarun.core.sizes import size_text
from metarun.reporting import published, single_run
from metarun.reporting.figures import comparison
from metarun.reporting.figures.comparison import Entry
from metarun.reporting.figures.drawing import DASHES, Panel, colors
from metarun.reporting.page import Code, Page, Section
from metarun.reporting.published import Group, Run
from metarun.reporting.results import figure_of
from metarun.reporting.run_files import RunFiles
from metarun.reporting.tables import RowSeries
from metarun.runs.folder import RunFolder

_MOST_COMMANDS = 5
"""Largest number of commands that the page lists."""


def page(runs: Sequence[Run], config_dir: str | None) -> Page:
    """Return the page of several runs; figures of a single run are shown for the best only.

    Args:
        runs: Finished and unfinished runs.
        config_dir: Folder of the user's YAML files.
    """
    groups = published.group(runs)
    clusters = _clusters(groups)
    named = _by_name(entry for members in clusters.values() for entry in members)
    in_tables = published.group(published.with_shared(runs))
    tables = [replace(table, series=named) for table in published.parts(in_tables, config_dir)]
    unfinished = [run for run in runs if run.result is None]
    facts = [("runs", str(len(runs))), ("finished", str(len(runs) - len(unfinished)))]
    tables += [published.unfinished_table(unfinished)] if unfinished else []
    sections = [Section("runs", "Results", tables=tables)]
    for number, (title, members) in enumerate(clusters.items()):
        name = "together" if not number else f"together-{number + 1}"
        sections.append(Section(name, title, panels=_panels(members, number)))
    note = ""
    if clusters:
        title, members = next(iter(clusters.items()))
        about, own, note = _best(members, title, config_dir)
        facts += own
        sections += about
    return Page(_heading(runs), facts, [*sections, _reproduce(runs)], note)


def _reproduce(runs: Sequence[Run]) -> Section:
    """Return the commands that started the runs, unless there are too many.

    A sweep has a single command.
    """
    typed = (single_run.command(RunFolder(run.path).environment()) for run in runs)
    commands = dict.fromkeys(filter(None, typed))
    codes = [Code("Command", "\n".join(commands))] if 0 < len(commands) <= _MOST_COMMANDS else []
    return Section("again", "Reproduce", codes=codes)


def _panels(members: Sequence[Entry], number: int) -> list[Panel]:
    """Return the figures of a cluster; names are numbered from the second cluster on."""
    panels = comparison.panels(members, str(members[0].runs[0].metric))
    if not number:
        return panels
    return [replace(panel, name=f"{panel.name}-{number + 1}") for panel in panels]


def _best(
    members: Sequence[Entry], title: str, config_dir: str | None
) -> tuple[list[Section], list[tuple[str, str]], str]:
    """Return the sections and facts of the run that meta-val selects, and a note of gaps."""
    entry = next((entry for entry in members if entry.best), None)
    if entry is None:
        return [], [(f"best, {title}", "no meta-val figure to select by")], ""
    chosen = _chosen_seed(entry)
    own, note = single_run.sections(chosen, config_dir=config_dir)
    about = Section(
        "best",
        "The best run",
        f"Run and seed were selected on meta-val among the runs of {title}: {entry.label}, "
        f"{chosen.title}. The sections below describe this run only.",
        codes=single_run.reproduce(chosen).codes,
    )
    facts = [(f"best on meta-val, {title}", entry.label)]
    facts += [
        (f"its {name}, seed {chosen.config['seed']}", value)
        for name, value in (single_run.reached(chosen.results) if chosen.results else [])
    ]
    return [about, *(replace(part, title=f"Best: {part.title}") for part in own)], facts, note


def _chosen_seed(entry: Entry) -> RunFiles:
    def figure(run: RunFiles) -> float:
        val = validation_of(run.results)
        assert val is not None
        return -val["mean"] if run.metric == "accuracy" else val["mean"]

    return min(entry.runs, key=figure)


def _heading(runs: Sequence[Run]) -> str:
    names = {
        word: list(dict.fromkeys(str(run.config["names"][word]) for run in runs))
        for word in ("algo", "data")
    }
    parts = [
        ", ".join(found) if len(found) <= 4 else f"{len(found)} {what}"
        for found, what in ((names["algo"], "algorithms"), (names["data"], "data sets"))
    ]
    return f"{len(runs)} runs: {' on '.join(parts)}"


def _clusters(groups: Sequence[Group]) -> dict[str, list[Entry]]:
    """Return entries by the axis that they can share, the largest cluster first.

    Within a cluster, the best entry on meta-val comes first.
    """
    found: dict[str, list[Group]] = {}
    for group in published.ranked(groups):
        found.setdefault(_axis(group), []).append(group)
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    looks = colors(str(group.config["names"]["algo"]) for group in groups)
    first = 0
    clusters: dict[str, list[Entry]] = {}
    for title, members in ordered:
        clusters[title] = _entries(members, looks, first)
        first += len(members)
    return clusters


def _axis(group: Group) -> str:
    """Describe the tasks of a group; groups with the same description share an axis."""
    results, config = group.results[0].record, group.config
    size = size_text(config)
    if "layout" in results:
        layout = results["layout"]
        steps = len(layout["visits"]) * int(layout["steps"])
        size = f"{max(layout['visits']) + 1} tasks in {steps} steps of {layout['rows']} rows"
        if len(set(layout["visits"])) < len(layout["visits"]):
            size += f", order {json.dumps(layout['visits'][:8])}…"
    elif results["kind"] == "regression":
        size = f"{config['shot']} points"
    return f"{size} on {config['names']['data']}"


def _entries(
    groups: Sequence[Group], looks: Mapping[str, tuple[str, str]], first: int
) -> list[Entry]:
    """Return the entries of a figure; entries of the same algorithm differ in line style.

    Args:
        groups: Groups of runs, best on meta-val first.
        looks: Color and line style of each algorithm.
        first: Number of the first entry on the page.
    """
    met: Counter[str] = Counter()
    made: list[Entry] = []
    for number, group in enumerate(groups):
        algo = str(group.config["names"]["algo"])
        color, dash = looks[algo]
        style = DASHES[(DASHES.index(dash) + met[algo]) % len(DASHES)]
        met[algo] += 1
        measured, val = figure_of(group.results), published.val_of(group)
        words = (word.partition("=") for word in group.runs[0].typed)
        made.append(
            Entry(
                f"entry{first + number}",
                group.label,
                [RunFiles(r.path, r.config, r.words, r.status, color) for r in group.runs],
                {key: value for key, _, value in words},
                measured.mean,
                measured.ci95,
                math.nan if val is None else val,
                color,
                style,
                number == 0 and val is not None,
            )
        )
    return made


def _by_name(entries: Iterable[Entry]) -> dict[str, RowSeries]:
    """Return the series of entries by their label in tables, except labels that two share."""
    listed = list(entries)
    shared = Counter(entry.label for entry in listed)
    return {e.label: RowSeries(e.key, e.color) for e in listed if shared[e.label] == 1}
