"""Measure the published cells, and keep what was measured beside the published values.

    python tests/references.py run RUNS [--core N] [--minutes M]
    python tests/references.py collect RUNS [--commit HASH] [--processor TEXT] [--replace]
    python tests/references.py page

`run` goes through the queue in references.yaml. Every training is a sweep over its seeds in the
folder RUNS; then its runs are meta-tested in the settings of the other experiments that it serves.
Finished runs are skipped and stopped ones continue, so the same command again goes on after a
kill, and after the M minutes.

`collect` writes the block `reference:` of every experiment that has finished runs in RUNS, and
leaves all else in its file as it is, an existing `note` included. A reference of more steps or more
seeds is kept, unless the recipe has changed since: `--replace`. `page` writes conf/paper/README.md
from these blocks.

A recipe is frozen before its test split is opened, and the split is opened once. A training that
is too long for this machine is therefore tested only when it is given up, by an explicit `steps:`
in the queue. Where it stopped before, it is continued up to that step.
"""

from __future__ import annotations

import argparse
import platform
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from metarun.config.build import options_in_files
from metarun.config.catalogue import conf_dir, description, experiment, header, load
from metarun.config.composition import composer
from metarun.config.naming import HOW_IT_RUNS, root_of
from metarun.core.console import duration
from metarun.core.nested import flat
from metarun.core.settings import Published, PublishedCell, Reference, ReferenceCell
from metarun.reporting.published import Group, Run, group, read_runs, task, with_shared
from metarun.reporting.references import (
    NOT_RUN,
    is_accuracy,
    is_unverified,
    outcome_of,
    published_figure,
    read_published,
    read_reference,
    reference_figures,
)
from metarun.reporting.results import figure_of
from metarun.reporting.tables import Figure, markdown
from metarun.runs.folder import RunFolder

HERE = Path(__file__).resolve().parent
QUEUE = HERE / "references.yaml"
TEMPLATE = HERE / "references.md"
PAGE = conf_dir() / "paper" / "README.md"
_WIDTH = 100
_HARMLESS = ("train.steps=", "train.log_every=", "train.checkpoint_every=")
"""Overrides with which a run is still one of the recipe, or of the first part of it."""


def main(argv: Sequence[str]) -> int:
    """Run one of the three commands and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="references.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train and test what the queue lists")
    runner.add_argument("runs", type=Path, metavar="RUNS", help="folder of the runs")
    runner.add_argument("--core", type=int, help="processor core to use (taskset)")
    runner.add_argument("--minutes", type=float, help="stop after this time; default: at the end")
    collector = commands.add_parser("collect", help="write the references of finished runs")
    collector.add_argument("runs", type=Path, metavar="RUNS", help="folder of the runs")
    collector.add_argument("--commit", help="of the runs, if they have not recorded it")
    collector.add_argument("--processor", help="of the runs; default: this machine's, if it is")
    collector.add_argument("--replace", action="store_true", help="also references of more seeds")
    commands.add_parser("page", help=f"write {PAGE.relative_to(conf_dir().parent)}")
    args = parser.parse_args(argv)
    # As Ctrl-C does, so that the run at work is saved.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.command == "run":
        return Runner(args.runs, args.core, args.minutes).run(queue())
    if args.command == "collect":
        collect(args.runs, args.commit, args.processor, replace=args.replace)
    else:
        PAGE.write_text(page(), encoding="utf-8")
        print(PAGE)
    return 0


# The queue.


@dataclass(frozen=True)
class Training:
    """An entry of the queue.

    Attributes:
        experiment: Experiment to train.
        seeds: Its seeds.
        also: Experiments in whose settings the runs are meta-tested, too.
        steps: Number of updates after which the training is given up; None for the recipe's.
        overrides: Further overrides that leave the results alone.
    """

    experiment: str
    seeds: list[int] = field(default_factory=lambda: [0])
    also: list[str] = field(default_factory=list)
    steps: int | None = None
    overrides: list[str] = field(default_factory=list)

    def words(self, seeds: Sequence[int]) -> list[str]:
        """The overrides of a sweep over some of the seeds."""
        steps = [] if self.steps is None else [f"train.steps={self.steps}"]
        listed = ",".join(map(str, seeds))
        named = [f"experiment={self.experiment}", f"seed={listed}", "threads=1"]
        return [*named, *steps, *self.overrides]


def queue() -> list[Training]:
    """The trainings in the order of the file."""
    return [Training(**entry) for entry in load(QUEUE)["trainings"]]


class Runner:
    """Makes the runs of a queue in a folder, one process at a time."""

    def __init__(self, runs: Path, core: int | None, minutes: float | None) -> None:
        self.runs = runs
        self.prefix = [] if core is None else ["taskset", "-c", str(core)]
        self.end = None if minutes is None else time.monotonic() + 60.0 * minutes

    def run(self, trainings: Iterable[Training]) -> int:
        """Make the runs and return 0 if all of them are finished."""
        self.runs.mkdir(parents=True, exist_ok=True)
        complete = True
        for training in trainings:
            if self.left() == 0.0:
                print("the time is over: the same command again goes on")
                return 1
            began = time.monotonic()
            state = self.make(training)
            complete &= state == "finished"
            seeds = ", ".join(map(str, training.seeds))
            took = duration(time.monotonic() - began)
            print(f"{training.experiment}, seed {seeds}: {state}, {took}", flush=True)
        return 0 if complete else 1

    def left(self) -> float | None:
        """The seconds that are left; None without a limit."""
        return None if self.end is None else max(0.0, self.end - time.monotonic())

    def make(self, training: Training) -> str:
        """Train and test one entry; returns how it ended."""
        state, seeds = "finished", list(training.seeds)
        if training.steps is not None:
            state, seeds = self.give_up(training, training.steps)
        if seeds and state == "finished":
            state = self.call("-m", *training.words(seeds), f"hydra.sweep.dir={self.runs}")
        for run in self.finished(training):
            tested = {shared.config["names"]["experiment"] for shared in with_shared([run])}
            for other in training.also:
                if other not in tested and state == "finished":
                    state = self.call(f"test={run.path}", f"experiment={other}")
        return state

    def give_up(self, training: Training, steps: int) -> tuple[str, list[int]]:
        """Continue stopped runs up to a number of steps and test them.

        Returns:
            How it ended, and the seeds without a run.
        """
        seeds = set(training.seeds) - {run.config["seed"] for run in self.finished(training)}
        for run in self.found(training):
            if run.result is None and run.config["seed"] in seeds:
                seeds.remove(run.config["seed"])
                step = max(steps, int(run.status.get("step") or 0))
                typed = list(run.typed) != _not_steps(run.typed)
                more = [] if typed else [f"train.steps={step}"]
                state = self.call(f"resume={run.path}", *more)
                if state != "finished":
                    return state, []
        return "finished", sorted(seeds)

    def found(self, training: Training) -> Iterator[Run]:
        """The runs of an experiment and its seeds, with any number of steps."""
        for run in read_runs([self.runs]):
            names = run.config.get("names", {})
            others = set(_not_steps(run.typed)) - set(training.overrides)
            same = names.get("experiment") == training.experiment and not others
            if same and run.config["seed"] in training.seeds:
                yield run

    def finished(self, training: Training) -> list[Run]:
        """The finished runs of an entry: rehearsals with fewer steps are none."""
        published = read_published([conf_dir()], training.experiment)
        assert published is not None
        fewest = published.steps if training.steps is None else training.steps
        runs = [(run, run.result) for run in self.found(training)]
        return [run for run, result in runs if result and result.record["steps"] >= fewest]

    def call(self, *words: str) -> str:
        """Call metarun, at most for the time that is left; returns how it ended."""
        command = [*self.prefix, sys.executable, "-m", "metarun", *words]
        with (self.runs / "references.log").open("ab") as log:
            log.write(f"\n$ metarun {shlex.join(words)}\n".encode())
            log.flush()
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                code = process.wait(self.left())
            except subprocess.TimeoutExpired:
                _stop(process)
                return "stopped, the time is over"
            except KeyboardInterrupt:
                _stop(process)
                sys.exit("interrupted: the same command again goes on")
        return "finished" if code == 0 else f"exit code {code}, see {self.runs / 'references.log'}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a process save its run, and wait for it."""
    process.terminate()
    process.wait()


def _not_steps(words: Sequence[str]) -> list[str]:
    return [word for word in words if not word.startswith("train.steps=")]


# From finished runs to references.


def collect(
    runs: Path, commit: str | None, processor: str | None, *, replace: bool = False
) -> None:
    """Write the reference of every experiment that has finished runs, and print what changed."""
    candidates: dict[str, list[Group]] = {}
    with composer() as compose:
        for found in group(with_shared(read_runs([runs]))):
            name = found.experiment
            path = conf_dir() / "experiment" / f"{name}.yaml"
            if name is None or not path.exists() or not found.config.get("published"):
                continue
            words = [w for w in found.runs[0].words if root_of(w) not in ("seed", *HOW_IT_RUNS)]
            if changed := [w for w in found.runs[0].typed if not w.startswith(_HARMLESS)]:
                print(f"{name}: left out, since it is not the recipe: {' '.join(changed)}")
            elif changed := differences(found.config, compose.job(words).config):
                print(f"{name}: left out, its file has changed since: {', '.join(changed)}")
            else:
                candidates.setdefault(name, []).append(found)
    for name, groups in sorted(candidates.items()):
        best = max(groups, key=_preference)
        new, before = (
            reference_of(name, best, commit, processor),
            read_reference([conf_dir()], name),
        )
        if before is None or replace or _extent(new) >= _extent(before):
            write(name, new)
        else:
            print(f"{name}: kept, since its reference has more steps or seeds")


def _extent(reference: Reference) -> tuple[int, int]:
    return reference.steps, len(reference.seeds)


def _preference(found: Group) -> tuple[int, int, bool]:
    """More steps are better, then more seeds, then a training of its own."""
    steps = int(found.results[0].record["steps"])
    return steps, len(found.runs), found.trained_as is None


def differences(stored: dict[str, Any], today: dict[str, Any]) -> list[str]:
    """The keys with influence on the results that differ; those that are newer are not compared."""
    apart = (*HOW_IT_RUNS, "names", "seed")
    then, now = (
        {k: v for k, v in flat(config).items() if root_of(k) not in apart}
        for config in (stored, today)
    )
    # A learner without meta-training has stored 0 steps.
    then["train.steps"] = then["train.steps"] or now["train.steps"]
    # A run stores what its data set has worked out from the files.
    for option in options_in_files(today["data"]):
        if now[f"data.{option}"] is None:
            then[f"data.{option}"] = None
    return [key for key in sorted(then) if key not in now or then[key] != now[key]]


def reference_of(
    name: str, found: Group, commit: str | None = None, processor: str | None = None
) -> Reference:
    """Return the reference that a group of runs gives, with the note of the present one."""
    published = read_published([conf_dir()], name)
    assert published is not None
    records = [result.record for result in found.results]
    steps = int(records[0]["steps"])
    cells = [_cell(found, cell, steps, published) for cell in published.cells]
    before = read_reference([conf_dir()], name)
    trained = found.trained_as or name
    seeds = [int(run.config["seed"]) for run in found.runs]
    extra = [word for word in found.runs[0].typed if word.startswith("train.steps=")]
    threads = records[0].get("threads")
    extra += [] if threads is None else [f"threads={threads}"]
    several = "-m " if len(seeds) > 1 else ""
    listed = ",".join(map(str, seeds))
    facts = [_environment(run) for run in found.runs]
    return Reference(
        cells=cells,
        episodes=len(found.results[0].episodes),
        seeds=seeds,
        steps=steps,
        command=" ".join([f"metarun {several}experiment={trained} seed={listed}", *extra]),
        minutes=_rounded(float(np.mean([r["seconds"] for r in records])) / 60.0),
        processor=processor or _joined(map(_processor_of, facts)),
        version=_joined(_version_of(fact, commit) for fact in facts),
        trained_as=found.trained_as,
        note=None if before is None else before.note,
    )


def _cell(found: Group, cell: PublishedCell, steps: int, published: Published) -> ReferenceCell:
    accuracy = found.results[0].record["metric"] == "accuracy"
    exact = figure_of(found.results, cell.inner_steps, cell.presentation)
    places = 2 if accuracy else 4
    over_seeds = None if exact.seeds_ci95 is None else round(exact.seeds_ci95, places)
    ours = Figure(
        round(exact.mean, places),
        round(float(exact.ci95 or 0.0), places),
        seeds=exact.seeds,
        seeds_ci95=over_seeds,
    )
    # Of the rounded values, so that the rule gives the same for what stands in the file.
    outcome = outcome_of(ours, cell, steps, published.steps, accuracy=accuracy)
    return ReferenceCell(ours.mean, float(ours.ci95 or 0.0), outcome, over_seeds)


def _rounded(minutes: float) -> float:
    return round(minutes, 2 if minutes < 1.0 else 1)


def _environment(run: Run) -> dict[str, Any]:
    """The environment of the training; a meta-test lies two folders below its run."""
    folder = run.path if run.trained_as is None else run.path.parent.parent
    return RunFolder(folder).read_json("environment.json")


def _processor_of(environment: dict[str, Any]) -> str:
    name = str(environment["device_name"])
    info = Path("/proc/cpuinfo")
    here = environment["platform"] == platform.platform() and environment["device"] == "cpu"
    if here and info.exists():
        found = re.search(r"model name\s*: (.+)", info.read_text())
        name = name if found is None else found.group(1).strip()
    threads = int(environment["torch_threads"])
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


def _version_of(environment: dict[str, Any], commit: str | None) -> str:
    version = str(environment["versions"]["metarun"])
    git = environment.get("git")
    if git is not None:
        commit = str(git["commit"])[:7] + (", changed" if git.get("dirty") else "")
    return version if commit is None else f"{version} ({commit})"


def _joined(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def write(name: str, reference: Reference) -> None:
    """Write a reference to the file of its experiment, and print whether it changed."""
    path = conf_dir() / "experiment" / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    changed = with_reference(text, reference)
    words = ", ".join(cell.outcome for cell in reference.cells)
    if changed == text:
        print(f"{name}: unchanged, {words}")
        return
    path.write_text(changed, encoding="utf-8")
    print(f"{name}: written, {words}")


def with_reference(text: str, reference: Reference) -> str:
    """Return the text of an experiment with its reference after `published:`.

    Every other byte stays as it is.
    """
    lines = text.splitlines(keepends=True)
    old = _block(lines, "reference")
    del lines[old]
    at = _block(lines, "published").stop
    lines[at:at] = [block_of(reference)]
    return "".join(lines)


def _block(lines: Sequence[str], key: str) -> slice:
    """Return the place of a root key with everything below it; an empty one if it is absent."""
    starts = [n for n, line in enumerate(lines) if line.startswith(f"{key}:")]
    if not starts:
        return slice(0, 0)
    ends = (n for n, line in enumerate(lines) if n > starts[0] and not line.startswith(" "))
    return slice(starts[0], next(ends, len(lines)))


def block_of(reference: Reference) -> str:
    """Return the block of a reference as YAML; values that are None are left out."""
    lines = ["reference:", "  cells:"]
    for cell in reference.cells:
        order = ("value", "ci95", "over_seeds", "outcome")
        values = {key: getattr(cell, key) for key in order}
        listed = ", ".join(f"{key}: {v}" for key, v in values.items() if v is not None)
        lines.append(f"    - {{{listed}}}")
    order = ("episodes", "seeds", "steps", "minutes", "processor", "version", "trained_as")
    for key in (*order, "command", "note"):
        value = getattr(reference, key)
        if key == "note" and value is not None:
            wrapped = textwrap.wrap(
                value, _WIDTH - 4, break_long_words=False, break_on_hyphens=False
            )
            lines += ["  note: >-", *(f"    {line}" for line in wrapped)]
        elif value is not None:
            lines.append(f"  {key}: {value if isinstance(value, list) else _scalar(value)}")
    assert {f.name for f in fields(Reference)} == {"cells", "command", "note", *order}
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """Return a scalar as YAML in one line."""
    return yaml.safe_dump(value, width=10_000, allow_unicode=True).splitlines()[0]


# The page.


@dataclass(frozen=True)
class Cell:
    """One published cell with what was measured for it."""

    experiment: str
    published: Published
    cell: PublishedCell
    setting: str
    printed: str
    reference: Reference | None
    ours: Figure | None

    @property
    def unverified(self) -> bool:
        """Whether the published value is from memory."""
        return is_unverified(self.published, self.cell)

    @property
    def outcome(self) -> str:
        """The word for it."""
        return NOT_RUN if self.ours is None else self.ours.mark


def page() -> str:
    """Return the text of conf/paper/README.md."""
    folder = conf_dir() / "paper"
    papers = {path: list(_cells(path)) for path in sorted(folder.glob("*.yaml"))}
    measured = {path for path, cells in papers.items() if any(cell.ours for cell in cells)}
    tables = [_measured(path, papers[path]) for path in papers if path in measured]
    others = {path: cells for path, cells in papers.items() if path not in measured}
    every = {(c.experiment, c.setting): c for cells in papers.values() for c in cells}
    text = TEMPLATE.read_text(encoding="utf-8")
    parts = {"counts": _counts(list(every.values())), "measured": "\n\n".join(tables)}
    for key, part in {**parts, "not_run": _not_run(others)}.items():
        text = text.replace(f"<!-- {key} -->", part)
    return text


def _cells(paper: Path) -> Iterator[Cell]:
    """Yield the cells of a paper's experiments."""
    folders = [conf_dir()]
    listed = load(paper)["hydra"]["sweeper"]["params"]["experiment"]
    for name in (word.strip() for word in listed.split(",")):
        published, reference = read_published(folders, name), read_reference(folders, name)
        assert published is not None
        figures = reference_figures(reference, published)
        values = experiment(folders, name)
        for cell, ours in zip(published.cells, figures, strict=True):
            printed = str(published_figure(published, cell, accuracy=is_accuracy(values)))
            yield Cell(name, published, cell, task(values, cell), printed, reference, ours)


def _counts(cells: Sequence[Cell]) -> str:
    """Say how many cells have a reference, and how many of them are reproduced."""
    run = [cell for cell in cells if cell.ours is not None]
    verified = [cell for cell in run if not cell.unverified]

    def count(word: str) -> int:
        return sum(cell.outcome.startswith(word) for cell in verified)

    words = ("reproduced", "above", "reached", "below", "partial")
    listed = ", ".join(f"{count(word)} {word}" for word in words if count(word))
    return textwrap.fill(
        f"**{len(run)} of {len(cells)} cells have a reference.** Of the {len(verified)} whose "
        f"published value is verified: {listed}.",
        120,
    )


def _title(paper: Path) -> str:
    """Return the description of a paper's table, with a link."""
    links = [line for line in header(paper) if line.startswith("https://")]
    text = description(paper)
    if not links:
        return text
    return re.sub(r"\((.+?\d{4})(.*)\)$", rf"([\1]({links[0]})\2)", text)


def _measured(paper: Path, cells: Sequence[Cell]) -> str:
    """Return the section of a paper with at least one reference."""
    heads = ["`experiment=`", "method", "setting", "published", "reference", "outcome", "steps"]
    heads += ["minutes"]
    rows: list[list[str]] = []
    before = ""
    for cell in cells:
        name = "" if cell.experiment == before else f"`{cell.experiment}`"
        method = cell.published.row if name else ""
        before = cell.experiment
        steps = minutes = ""
        if cell.reference is not None and name:
            steps = f"{cell.reference.steps:,} of {cell.published.steps:,}"
            minutes = f"{cell.reference.minutes or '–'}"
        ours = NOT_RUN if cell.ours is None else _without_mark(cell.ours)
        outcome = "" if cell.ours is None else cell.outcome.partition(": ")[0]
        if cell.ours is not None and cell.unverified:
            outcome += "*"
        texts = [name, method, cell.setting, cell.printed, ours, outcome, steps, minutes]
        rows.append(texts)
    notes = [*_facts(cells), *_notes(cells)]
    return "\n\n".join(
        [f"### `paper={paper.stem}`", f"{_title(paper)}.", markdown(heads, rows), *notes]
    )


def _without_mark(figure: Figure) -> str:
    return str(replace(figure, mark=""))


def _facts(cells: Sequence[Cell]) -> list[str]:
    """Return how the references were measured, once for all that were measured alike."""
    alike: dict[str, list[str]] = {}
    for cell in cells:
        if cell.reference is not None:
            names = alike.setdefault(_fact(cell.reference), [])
            names += [] if cell.experiment in names else [cell.experiment]
    if len(alike) == 1:
        return [_filled(f"{next(iter(alike))}.")]
    items = [_filled(f"- {_listed(names)}: {fact}.", "  ") for fact, names in alike.items()]
    return ["\n".join(items)] if items else []


def _fact(reference: Reference) -> str:
    seeds = ", ".join(map(str, reference.seeds))
    parts = [
        f"{reference.episodes:,} test tasks",
        f"seed{'s' * (len(reference.seeds) > 1)} {seeds}",
    ]
    if reference.trained_as is not None:
        parts.append(
            f"a meta-test of the runs of `{reference.trained_as}`, whose checkpoint was "
            "chosen in their setting"
        )
    parts.append(reference.processor or "time and processor were not recorded")
    if reference.version is not None:
        parts.append(f"metarun {reference.version}")
    return "; ".join(parts)


def _notes(cells: Sequence[Cell]) -> list[str]:
    """Return the notes of a paper's experiments, each once."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        if cell.reference is not None and cell.reference.note is not None:
            names = found.setdefault(cell.reference.note, [])
            names += [] if cell.experiment in names else [cell.experiment]
    items = [_filled(f"- {_listed(names)}: {note}", "  ") for note, names in found.items()]
    return ["\n".join(items)] if items else []


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _not_run(papers: dict[Path, list[Cell]]) -> str:
    """Return one table of all papers without a reference."""
    heads = ("`experiment=`", "method", "published")
    rows: list[tuple[str, str, str]] = []
    for paper, cells in papers.items():
        rows.append((f"**{_title(paper)}**", f"`paper={paper.stem}`", ""))
        for name in dict.fromkeys(cell.experiment for cell in cells):
            own = [cell for cell in cells if cell.experiment == name]
            printed = "<br>".join(
                c.printed if len(own) == 1 else f"{c.setting}: {c.printed}" for c in own
            )
            rows.append((f"`{name}`", own[0].published.row, printed))
    return markdown(heads, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
