"""A sweep: Hydra chooses and starts the runs; this module tracks them and prints a summary.

Hydra's launchers execute runs one after another in this process, in several processes, or on a
cluster. All of them share the file system. The runs of a sweep therefore report their state in
a journal next to their folders, with one line for each start and each end.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import secrets
import shlex
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from metarun.config.build import build_source
from metarun.config.composition import Job
from metarun.config.loading import register_resolvers
from metarun.config.naming import slug
from metarun.config.sweeps import SweepMethod
from metarun.core import distributed, streams
from metarun.core.console import Screen
from metarun.core.errors import EXIT_FAILED, EXIT_OK, describe_error
from metarun.core.measures import figure, number
from metarun.core.results import Results, validation_of
from metarun.jobs.ensure import Outcome, ensure_finished, is_finished
from metarun.jobs.train import from_hydra
from metarun.reporting import published
from metarun.runs import sweeps
from metarun.runs.folder import RunFolder
from metarun.runs.lines import Lines
from metarun.training.signals import HANGUP, received_by, say

if TYPE_CHECKING:
    from omegaconf import DictConfig

Line = dict[str, Any]


class Journal:
    """A file in which the runs of a sweep, in any process, record their start and end.

    Each thread reads it by a journal of its own, which keeps what it has read.

    Attributes:
        path: The file, next to the folders of the runs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._length = 0
        self._ends: dict[str, Line] = {}
        self._running: dict[str, Line] = {}
        self._stopped = False

    def add(self, event: str, **facts: Any) -> None:
        """Append a line in one write, so that lines of several processes do not mix.

        The journal is deleted when the sweep ends; nothing is written after that.
        """
        line = json.dumps({"event": event, **facts}) + "\n"
        if self.path.exists():
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode())

    def _read(self) -> None:
        """Read the complete lines that are new: all of them for each run would be quadratic."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._length)
            whole, end, _ = file.read().rpartition(b"\n")
            for line in map(json.loads, whole.splitlines()):
                if line["event"] == "start":
                    self._running[line["folder"]] = line
                elif line["event"] == "end":
                    self._running.pop(line["folder"], None)
                    self._ends[line["folder"]] = line
                elif line["event"] == "stop":
                    self._stopped = True
            self._length += len(whole + end)

    def ends(self) -> dict[str, Line]:
        """Return the last end of each folder, in chronological order."""
        self._read()
        return self._ends

    def running(self) -> dict[str, Line]:
        """Return the start of each folder whose run has not ended."""
        self._read()
        return self._running

    def stopped(self) -> bool:
        """Return whether no further run may start."""
        self._read()
        return self._stopped


class Worker:
    """The callable that Hydra calls for each run, in this process or pickled in another.

    Args:
        journal: File of the sweep's journal.
        config_dir: Folder of the user's YAML files.
        number: Number of runs; None if the sweeper determines it while searching.
        bound: Whether other processes are children of this one and end with it.
        processes: Number of processes of each run, all of which call this.
    """

    def __init__(
        self,
        journal: Path,
        config_dir: str | None,
        number: int | None,
        *,
        bound: bool = False,
        processes: int = 1,
    ) -> None:
        self._processes = processes
        self._bound = bound
        self._journal = Journal(journal)
        self._config_dir = config_dir
        self._number = number
        self._quiet = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set up a copy in another process: no output, and signals go to the sweep's process."""
        self.__dict__.update(state)
        self._quiet = True
        if self._bound:
            _end_with_parent()
        register_resolvers()
        logging.getLogger("metarun").addHandler(logging.NullHandler())

    def run(self, cfg: DictConfig) -> float | None:
        """Start or resume one run.

        Returns:
            The best metric on meta-val, which a search optimizes; None if there is none, which
            Optuna counts as a failed trial.
        """
        config, folder, words = from_hydra(cfg)
        place = distributed.place_from_submitit() if self._processes > 1 else distributed.Place()
        distributed.start(place)
        try:
            if not distributed.on_main(self._journal.stopped):
                self._run(config, folder, words)
        finally:
            distributed.stop()
        if place.rank > 0:
            return None
        with suppress(OSError):
            folder.rmdir()  # Hydra creates it even for a run that never started.
        return _val(folder)

    def _run(self, config: Any, folder: Path, words: Sequence[str]) -> None:
        if self._quiet:
            _leave_terminal()
        name = str(folder)
        if not self._quiet:
            of = "" if self._number is None else f" of {self._number}"
            streams.tell(f"\nrun {len(self._journal.ends()) + 1}{of}: {' '.join(words)}")
        if distributed.is_main():
            self._journal.add("start", folder=name, host=socket.gethostname(), process=os.getpid())
        screen = Screen(Console(quiet=True)) if self._quiet else Screen()
        _at_work.set()
        try:
            # In this process, a signal may have come since the last look.
            if not self._quiet and self._journal.stopped():
                raise KeyboardInterrupt
            outcome = ensure_finished(config, folder, words, self._config_dir, screen)
        except KeyboardInterrupt:
            outcome = Outcome("interrupted", "stopped before it started", signal.SIGTERM)
        finally:
            _at_work.clear()
        if not distributed.is_main():
            return
        self._journal.add(
            "end", folder=name, state=outcome.state, why=outcome.why, signum=outcome.signum
        )
        # Runs out of their time are told at the end.
        if not self._quiet and outcome.state not in ("finished", "paused"):
            _say(f"{folder}: {_described(outcome.state, outcome.why)}")
        if outcome.state == "interrupted" or (
            outcome.state == "failed" and config["sweep"]["fail_fast"]
        ):
            self._journal.add("stop")


def run(
    plan: Sequence[Job],
    method: SweepMethod,
    words: Sequence[str],
    config_dir: str | None,
    hand_over: Callable[[Callable[[Any], Any]], int],
) -> int:
    """Run a sweep, print its summary and tables, and return the exit code.

    Args:
        plan: The runs; for a search, representatives of them.
        method: Hydra's sweeper and launcher.
        words: The command line, for the hint how to continue.
        config_dir: Folder of the user's YAML files.
        hand_over: Starts Hydra with the function to call for each run; returns its exit code.
    """
    folders = [] if method.searches else [str(job.folder) for job in plan]
    name = _name(plan, folders)
    place = plan[0].folder.parent
    place.mkdir(parents=True, exist_ok=True)
    _store(name, words, folders)
    journal = Journal(place / f".sweep-{secrets.token_hex(4)}.jsonl")
    journal.path.touch()
    count = None if method.searches else len(plan)
    bound = method.launcher == "joblib"
    worker = Worker(journal.path, config_dir, count, bound=bound, processes=method.processes)
    try:
        with _stopping(journal, detached=method.launcher == "submitit_slurm") as stop:
            monitor = _Monitor(journal.path, count).showing() if method.parallel else nullcontext()
            with monitor:
                failed = _handed_over(hand_over, worker)
        if method.searches:
            folders = list(journal.ends())
            _store(name, words, folders)
        code = _sum_up(journal, folders, words, stop.signum, failed)
        shown = _show_tables([Path(folder) for folder in folders], config_dir)
        streams.tell(f"\nsweep {name}: see `metarun table {name}` and `metarun report {name}`")
        return code or shown
    finally:
        journal.path.unlink(missing_ok=True)


def _name(plan: Sequence[Job], folders: Sequence[str]) -> str:
    """Return the name of a sweep: the one typed, or the date and the keys that vary."""
    typed = (plan[0].config.get("sweep") or {}).get("name")
    if typed is not None:
        return str(typed)
    words = [dict(word.partition("=")[::2] for word in job.overrides) for job in plan]
    varying = [key for key in words[0] if len({own.get(key) for own in words}) > 1]
    names = plan[0].config["names"]
    about = varying or [names["algo"], names["data"]]
    name = slug([f"{sweeps.now()[:10]}-{'-'.join(about)}"], 60)
    return sweeps.free_name(name, folders)


def _store(name: str, words: Sequence[str], folders: Sequence[str]) -> None:
    """Write which runs a sweep has; without this file they are found by their folders alone."""
    try:
        sweeps.Sweep(name, sweeps.now(), list(words), list(folders)).store()
    except OSError as error:
        streams.say("warning", f"the sweep has no name: {describe_error(error)}")


def check_direction(method: SweepMethod, job: Job) -> None:
    """Check that a search optimizes the metric in the right direction.

    Raises:
        ValueError: The direction of the sweeper would search for the worst value.
    """
    if method.direction is None:
        return
    spec = build_source(job.config).spec
    wanted = "maximize" if spec.higher_is_better else "minimize"
    if method.direction != wanted:
        raise ValueError(
            f"hydra.sweeper.direction={method.direction} searches for the worst {spec.metric}: "
            f"type hydra.sweeper.direction={wanted}"
        )


def _handed_over(hand_over: Callable[[Callable[[Any], Any]], int], worker: Worker) -> str:
    """Start Hydra; return an error that occurred outside the runs, or an empty string."""
    try:
        with warnings.catch_warnings():
            # joblib replaces a process whose memory has grown, which is usual with torch.
            warnings.filterwarnings("ignore", message="A worker stopped while some jobs")
            code = hand_over(worker.run)
    except KeyboardInterrupt:
        return "stopped at once"
    # A launcher or sweeper may raise any exception.
    except Exception as error:
        return f"Hydra's sweeper or launcher failed: {describe_error(error)}"
    return "" if code == EXIT_OK else f"Hydra's sweeper or launcher failed with exit code {code}"


def _sum_up(
    journal: Journal, folders: Sequence[str], words: Sequence[str], signum: int, failed: str
) -> int:
    """Print how many runs are finished, which failed and why; return the exit code."""
    ends = journal.ends()
    kept = sum(ends.get(folder, {}).get("state") == "kept" for folder in folders)
    done = sum(is_finished(Path(folder)) for folder in folders)
    before = f", {kept} of them before" if kept else ""
    print(f"\n{done} of {len(folders)} runs are finished{before}")
    for folder, end in ends.items():
        if end["state"] == "paused":
            _say(f"{folder}: {end['why']}")
        elif end["state"] in ("failed", "elsewhere"):
            streams.say("error", f"{folder}: {_described(end['state'], end['why'])}")
    # If every run of a search failed, the sweeper's own error repeats theirs.
    if failed and not (ends and all(end["state"] == "failed" for end in ends.values())):
        streams.say("error", failed)
    signum = signum or next((end["signum"] for end in ends.values() if end["signum"]), 0)
    left = len(folders) - len(ends)
    if journal.stopped() and left > 0 and not signum:
        _say(f"stopped at the first failure: {left} runs were not started")
    if done < len(folders) or failed:
        verb = "interrupted; " if signum else ""
        _say(f"{verb}to complete the sweep, repeat the command: metarun {shlex.join(words)}")
    if signum:
        return 128 + signum
    return EXIT_FAILED if failed or done < len(folders) else EXIT_OK


def _show_tables(folders: Sequence[Path], config_dir: str | None) -> int:
    """Print the tables of the runs' results; return the exit code."""
    try:
        found = list(published.read_runs([folder for folder in folders if folder.is_dir()]))
        if any(run.result is not None for run in found):
            print(f"\n{published.report(found, config_dir=config_dir)}", end="", flush=True)
        return EXIT_FAILED if published.tell_damaged(found) else EXIT_OK
    # The runs themselves are complete: only report the error.
    except (ValueError, OSError) as error:
        streams.say("error", describe_error(error))
        return EXIT_FAILED


def _described(state: str, why: str) -> str:
    return {"kept": "finished before", "failed": f"failed: {why}"}.get(state, why)


def _say(text: str) -> None:
    streams.tell(text, sys.stderr)


def _results(folder: Path) -> Results | None:
    """Return the results of a finished run; None for any other."""
    with suppress(OSError, ValueError):
        if is_finished(folder):
            return RunFolder(folder).read_results()
    return None


def _val(folder: Path) -> float | None:
    """Return the metric on meta-val by which a finished run selected its checkpoint."""
    val = validation_of(_results(folder))
    return None if val is None or not math.isfinite(val["mean"]) else val["mean"]


def _leave_terminal() -> None:
    """Deliver Ctrl-C to the sweep's process only, which stops its runs by SIGTERM."""
    with suppress(OSError, AttributeError):
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)
    with suppress(ValueError):  # Python sets signal handlers in the main thread only.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


_at_work = threading.Event()
"""Set while a run is executed in this process."""


@functools.cache
def _end_with_parent() -> None:
    """End this process with the sweep's process; it would otherwise wait for work forever.

    The current run is saved first, as after a signal.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        if _at_work.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
        while _at_work.is_set():
            time.sleep(0.1)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class _Stop:
    """State of an interrupt.

    Attributes:
        signum: The signal received; 0 if none.
    """

    def __init__(self) -> None:
        self.signum = 0


@contextmanager
def _stopping(journal: Journal, *, detached: bool) -> Iterator[_Stop]:
    """Save and stop all runs at the first SIGINT, SIGTERM or SIGHUP; stop at once at the second.

    Args:
        journal: Journal of the sweep.
        detached: Whether the runs are jobs of a cluster, which continue: only the waiting ends.
    """
    stop = _Stop()

    def receive(signum: int, _: FrameType | None) -> None:
        if stop.signum and signum == HANGUP:  # a terminal that closes may send several
            return
        if stop.signum or detached:
            stop.signum = signum
            if detached:
                say("no longer waiting: the cluster's jobs continue (scancel stops them)")
            raise KeyboardInterrupt
        stop.signum = signum
        say("saving and stopping all runs; repeat the signal to stop at once")
        journal.add("stop")
        # The signal may have come while `journal` is being read.
        for start in Journal(journal.path).running().values():
            if start["host"] == socket.gethostname() and start["process"] != os.getpid():
                with suppress(OSError):
                    os.kill(start["process"], signal.SIGTERM)
        # A run of this process that trains receives signals itself: this one is being built.
        if _at_work.is_set():
            raise KeyboardInterrupt

    with received_by(receive):
        yield stop


class _Monitor:
    """Shows runs of other processes: a line for each ended run, and a live table on a terminal."""

    def __init__(self, journal: Path, number: int | None) -> None:
        self._journal = Journal(journal)
        self._number = number
        self._told: set[str] = set()
        self._over = threading.Event()
        self._console = Console(highlight=False)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Watch the journal while the runs are executed."""
        thread = threading.Thread(target=self._watch, name="sweep monitor", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(timeout=5)

    def _watch(self) -> None:
        from rich.live import Live

        live = self._console.is_terminal and self._console.file.isatty()
        if not live:
            while not self._over.wait(0.5):
                self._tell()
            self._tell()
            return
        with Live(console=self._console, refresh_per_second=2, transient=True) as screen:
            while not self._over.wait(0.5):
                self._tell()
                screen.update(self._table())
        self._tell()

    def _tell(self) -> None:
        """Print a line for each run that has ended since the last call."""
        for folder, end in self._journal.ends().items():
            if folder not in self._told:
                self._told.add(folder)
                of = "" if self._number is None else f" of {self._number}"
                text = _reached(Path(folder)) or _described(end["state"], end["why"])
                self._console.print(f"{len(self._told)}{of}  {folder}  {text}", soft_wrap=True)

    def _table(self) -> Any:
        from rich.table import Table

        of = "" if self._number is None else f" of {self._number}"
        table = Table(
            "run", "step", "now", box=None, title=f"{len(self._told)}{of} runs have ended"
        )
        for folder in self._journal.running():
            step, text = _progress(Path(folder))
            table.add_row(Path(folder).name, step, text)
        return table


def _reached(folder: Path) -> str:
    """Return a finished run's test result in one line; empty if there is none."""
    results = _results(folder)
    if results is None:
        return ""
    test, metric = results["test"], results["metric"]
    return f"test {metric} {figure(metric, test['mean'], test['ci95'])}"


def _progress(folder: Path) -> tuple[str, str]:
    """Return the progress of a run, such as `500/4000`, and its last line of metrics."""
    with suppress(OSError, ValueError, IndexError):
        steps = RunFolder(folder).status().get("steps", "?")
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            line = Lines.of(file.read()).records[-1]
        shown = [f"{k} {number(v)}" for k, v in line.items() if k != "step" and v is not None]
        return f"{line['step']}/{steps}", "  ".join(shown)
    return "", "starting"
