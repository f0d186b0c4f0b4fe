"""`metarun list`: what there is to choose from, one choice with its keys, and what was run."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from rich.text import Text

from metarun.cli.candidates import OF_RUNS
from metarun.config.catalogue import GROUPS, entries, find, header, keys, load, recipes
from metarun.config.naming import HOW_IT_RUNS, root_of
from metarun.config.search_path import refuse_shipped_names
from metarun.config.suggestions import nearest
from metarun.core.console import INDENT, definitions, table_console
from metarun.core.measures import figure
from metarun.core.streams import printable, tell, terminal_columns, wrapped
from metarun.reporting.references import (
    folders_of,
    is_unverified,
    read_published,
    read_reference,
    reference_figures,
)
from metarun.runs import sweeps
from metarun.runs.find import OUTPUTS, endings, newest_first, run_folders, when
from metarun.runs.folder import RunFolder

_NEWEST = 20
"""Number of runs and sweeps that are listed without `--all`."""

EXAMPLES = {
    "algo": "algo={name} data={recipe}",
    "data": "algo={recipe} data={name}",
    "backbone": "algo=protonet data=omniglot_small backbone={name}",
    "optim": "algo=maml data=sinusoid optim={name}",
    "experiment": "experiment={name}",
    "paper": "paper={name}",
    "logger": "algo=maml data=sinusoid logger={name}",
}
"""A command to try for a choice of each group."""


_FITTING = {"continual": "stream_rotated", "metric": "omniglot_small"}
"""Data sets for families of algorithms without a recipe that do not learn regressions."""


def run(args: argparse.Namespace) -> int:
    """Answer `metarun list [GROUP…]`, `list GROUP NAME…`, `list runs` and `list sweeps`.

    Returns:
        The exit code.
    """
    folders = folders_of(args.config_dir)
    refuse_shipped_names(folders[1:], folders[0])
    words = [_group(word) or word for word in args.words[:1]] + args.words[1:]
    if words and words[0] in OF_RUNS:
        if len(words) > 1:
            raise ValueError(f"list {' '.join(words)}: expected `metarun list {words[0]}` alone")
        if words[0] == "runs":
            _show_runs(newest_first(run_folders(OUTPUTS)), every=args.all)
        else:
            _show_rows(sweeps.stored(), _sweep_row, "sweeps", every=args.all)
        return 0
    if words and words[0] in GROUPS and any(word not in GROUPS for word in words[1:]):
        paths = [_path(folders, words[0], name) for name in words[1:]]
        for path in paths:
            _show_choice(folders, path)
        return 0
    for word in words:
        if word not in GROUPS:
            expected = ", ".join([*GROUPS, *OF_RUNS])
            raise ValueError(f"list {word}: unknown group, expected one of {expected}")
    if not words:
        _show_counts(folders)
    for group in words or GROUPS:
        _show_group(folders, group)
    return 0


def _group(word: str) -> str | None:
    """Return what is meant by the name or the title of a group, in singular or plural."""
    if f"{word}s" in OF_RUNS:
        return f"{word}s"
    for group, title in GROUPS.items():
        names = {group, f"{group}s", title, title.replace(" ", ""), title.split()[-1]}
        if word in names or f"{word}s" in names:
            return group
    return None


def _show_counts(folders: Sequence[Path]) -> None:
    """How many choices each group has."""
    console = table_console()
    counts = [f"{len(entries(folders, group))} {title}" for group, title in GROUPS.items()]
    text = f"{', '.join(counts)}; `metarun list algo` shows one group"
    for line in wrapped(text, console.width):
        console.print(Text(line), soft_wrap=True)
    console.print()


_FIRST = {"runs": "metarun", "sweeps": "metarun -m algo=maml,anil data=sinusoid"}
"""A command for the first item of each list."""

Item = TypeVar("Item")
Row = tuple[Sequence[str], str]
"""The cells of a line, and a text that stands behind them or, if it is too long, below."""


def _show_rows(
    items: Sequence[Item], row_of: Callable[[Item], Row], what: str, *, every: bool
) -> None:
    """The newest of all items in columns; only these are read."""
    shown = [row_of(item) for item in (items if every else items[:_NEWEST])]
    left = len(items) - len(shown)
    if not shown:
        tell(f"no {what} below {OUTPUTS}/ yet: `{_FIRST[what]}` makes the first")
        return
    cells = [list(map(printable, row)) for row, _ in shown]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    width = terminal_columns()
    side_by_side = sum(widths) + 2 * len(widths) + max(len(text) for _, text in shown) <= width
    for row, (_, text) in zip(cells, shown, strict=True):
        line = "  ".join(map(str.ljust, row, widths))
        print(f"{line}  {printable(text)}".rstrip() if side_by_side else line.rstrip())
        for part in [] if side_by_side else wrapped(text, width, " " * INDENT):
            print(part)
    if left:
        print(f"and {left} older: metarun list {what} --all")


def _show_runs(runs: Sequence[Path], *, every: bool) -> None:
    """The newest of all runs, each with a name to type and with what was typed for it."""
    shown = runs if every else runs[:_NEWEST]
    names = dict(zip(shown, endings(shown, runs), strict=True))
    _show_rows(runs, lambda run: _run_row(run, names[run]), "runs", every=every)
    if runs:
        name = names[runs[0]]
        tell(f"a run is named by the end of its folder, as shown: `metarun report {name}`")


def _run_row(folder: Path, name: str) -> Row:
    """When a run was at work last, its name, algorithm, data, figure or state, and overrides."""
    algo, data, stands, words = "–", "–", "damaged", ""
    # A damaged run hides no other.
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        algo, data, stands = _described(RunFolder(folder))
        typed = map(str, RunFolder(folder).overrides())
        apart = ("algo=", "data=")
        words = " ".join(
            w for w in typed if root_of(w) not in HOW_IT_RUNS and not w.startswith(apart)
        )
    return (_minute(when(folder)), name, algo, data, stands), words


def _described(run: RunFolder) -> tuple[str, str, str]:
    status = run.status()
    if status["state"] == "finished" and run.has("results.json"):
        results = run.read_results()
        metric, test = results["metric"], results["test"]
        stands = f"{metric} {figure(metric, test['mean'], test['ci95'])}"
        return str(results["algo"]), str(results["data"]), stands
    config = run.configuration()
    names, steps = config["names"], status.get("steps") or config["train"]["steps"]
    # A process that was killed could not change the state.
    killed = status["state"] == "running" and not run.is_in_use()
    state = "stopped" if killed else status["state"]
    return str(names["algo"]), str(names["data"]), f"{state} at {status['step']:,} of {steps:,}"


def _sweep_row(sweep: sweeps.Sweep) -> Row:
    """When a sweep was started last, its name, how many runs are finished, and its command."""
    done = sum(_is_finished(Path(run)) for run in sweep.runs)
    finished = f"{done} of {len(sweep.runs)} finished"
    return (_minute(sweep.time), sweep.name, finished), f"metarun {shlex.join(sweep.command)}"


def _is_finished(folder: Path) -> bool:
    with suppress(OSError, ValueError, AttributeError):
        return bool(RunFolder(folder).status().get("state") == "finished")
    return False


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def _path(folders: Sequence[Path], group: str, name: str) -> Path:
    path = find(folders, group, name)
    if path is None:
        hint = nearest(name, entries(folders, group)) or f" (`metarun list {group}`)"
        raise ValueError(f"list {group} {name}: there is no {group}={name}{hint}")
    return path


def _show_group(folders: Sequence[Path], group: str) -> None:
    found = entries(folders, group)
    if not found:
        return
    console = table_console()
    console.print(Text(f"{GROUPS[group]} ({group}=…)", style="italic"))
    if group == "experiment":
        found = {name: f"{text}{_measured(folders, name)}" for name, text in found.items()}
    for line in definitions(found, console.width):
        console.print(line, soft_wrap=True)
    console.print()


def _measured(folders: Sequence[Path], name: str) -> str:
    """What a description lacks: whether its published values are unverified, and our reference."""
    published = read_published(folders, name)
    if published is None:
        return ""
    unverified = [is_unverified(published, cell) for cell in published.cells]
    parts = []
    if any(unverified):
        parts.append(" (unverified)" if all(unverified) else " (partly unverified)")
    figures = [f for f in reference_figures(read_reference(folders, name), published) if f]
    if figures:
        values = " / ".join(f"{figure.mean:.{figure.places}f}" for figure in figures)
        words = ", ".join(dict.fromkeys(figure.mark for figure in figures))
        parts.append(f"; here {values} ({words})")
    return "".join(parts)


def _show_choice(folders: Sequence[Path], path: Path) -> None:
    """The description of a choice, its keys with their defaults, and a command to try."""
    console = table_console()
    group, name = path.parent.name, path.stem

    def show(text: str, indent: int = 0) -> None:
        margin = " " * indent
        for line in wrapped(text, console.width, margin):
            console.print(Text(line), soft_wrap=True)

    first, *others = header(path) or [""]
    console.print(Text(f"{group}={name}", style="bold"))
    show(first)
    for paragraph in _paragraphs(others):
        show(paragraph)
    if group not in ("experiment", "paper"):
        for key in keys(path):
            console.print()
            console.print(Text.assemble((f" {key.name}", "bold"), f" = {key.default}"))
            show(key.comment, INDENT)
    console.print()
    known = recipes(folders, group, name)
    if group in ("algo", "data"):
        show(f"recipes: {', '.join(known) or 'none'}")
    console.print(Text(f"try: metarun {example(folders, group, name)}\n"), soft_wrap=True)


def example(folders: Sequence[Path], group: str, name: str) -> str:
    """Return what to type behind `metarun` to try a choice."""
    other = _best_known(recipes(folders, group, name))
    if group == "data":
        other = other or ("online" if name.startswith("stream_") else "maml")
    elif other is None and (path := find(folders, group, name)) is not None:
        content = load(path)
        target = str(content.get("algo", content).get("_target_"))
        other = next((data for name, data in _FITTING.items() if f".{name}." in target), "sinusoid")
    words = EXAMPLES[group].format(name=name, recipe=other)
    return f"{words} data.root=PATH" if words.endswith("data=folder") else words


def _paragraphs(lines: Sequence[str]) -> list[str]:
    """Return the texts between empty lines; without a command, which is shown at the end."""
    found = [""]
    for line in lines:
        if not line or "://" in line:
            found += [line, ""]
        elif not line.startswith("metarun"):
            found[-1] += f" {line}"
    return [text.strip() for text in found if text.strip()]


def _best_known(known: Sequence[str]) -> str | None:
    """Of the recipes the one that a reader expects."""
    usual = ("omniglot_small", "sinusoid", "protonet", "maml", "online")
    return next((name for name in usual if name in known), known[0] if known else None)
