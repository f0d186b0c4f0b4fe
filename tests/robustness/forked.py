"""Command lines and functions in forked processes, for the harnesses of this folder.

A fork of this process, which has imported what a run needs, costs no start of Python and torch. It
can be killed anywhere, hang, exhaust its memory or leave anything behind in its own modules.
"""

from __future__ import annotations

import os

# Before torch is imported: its threads would not survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import contextlib
import importlib
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MAX_SECONDS = 10
"""Seconds of processor time after which a command line counts as hanging."""
MAX_WAIT = 300
"""The same in seconds of waiting, as for a lock; more, since the machine may be busy."""
MAX_BYTES = 8 * 2**30

_IMPORTED = (
    "torch._dynamo", "matplotlib.figure", "metarun.cli.main", "metarun.cli.compare",
    "metarun.cli.predict", "metarun.cli.report", "metarun.cli.table", "metarun.jobs.checks",
    "metarun.jobs.meta_test", "metarun.jobs.resume", "metarun.training.trainer",
    "metarun.inference.learner", "metarun.algorithms.optimization.maml",
    "metarun.backbones.conv4", "metarun.backbones.mlp", "metarun.data.omniglot",
    "metarun.data.synthetic", "metarun.data.streams",
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a process did: its exit code (-9 if it was killed), stdout and stderr."""

    code: int
    out: str
    err: str

    def errors(self) -> list[str]:
        """The lines that say what is wrong."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def reasons(self) -> list[str]:
        """These without the last one of several runs, which advises to repeat the command."""
        end = "repeat the command to try it again"
        return [line for line in self.errors() if not line.endswith(end)]

    def fault(self) -> str | None:
        """What no command line may do, whatever it was given."""
        if self.code in (-signal.SIGXCPU, -signal.SIGALRM):
            return "it hangs"
        if "Traceback (most recent call last)" in self.out + self.err:
            return "a traceback: " + self.err.strip().splitlines()[-1]
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if self.code and not any(map(_says_error, self.err.splitlines())):
            return f"exit code {self.code} without a line that says why"
        return None


def _says_error(line: str) -> bool:
    return line.startswith(("error: ", "usage: "))


def warm() -> None:
    """Import what runs need, so that no fork has to."""
    for name in _IMPORTED:
        importlib.import_module(name)
    from metarun.data.omniglot import small_tables

    # The images of most runs of golden.yaml, which take half their time.
    small_tables("antialias", 14)


@dataclass(frozen=True)
class Process:
    """A fork of this process at work on a function."""

    number: int
    streams: tuple[IO[bytes], IO[bytes]]

    @classmethod
    def start(cls, work: Callable[[], int], folder: Path, seconds: int = MAX_SECONDS) -> Process:
        """Call a function in a fork of this process, in a folder, with so much processor time."""
        sys.stdout.flush()
        sys.stderr.flush()
        streams = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - until the end
        number = os.fork()
        if number == 0:
            os.dup2(streams[0].fileno(), 1)
            os.dup2(streams[1].fileno(), 2)
            os._exit(_code_of(work, folder, seconds))
        return cls(number, streams)

    def end(self) -> Answer:
        """Wait for the end and return what the function did."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        texts = []
        for file in self.streams:
            with file:
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        return Answer(code, *texts)


def forked(work: Callable[[], int], folder: Path, seconds: int = MAX_SECONDS) -> Answer:
    """Call a function in a fork of this process, in a folder, and return what it did."""
    return Process.start(work, folder, seconds).end()


def _code_of(work: Callable[[], int], folder: Path, seconds: int) -> int:
    code = 1
    try:
        os.chdir(folder)
        signal.alarm(MAX_WAIT)
        resource.setrlimit(resource.RLIMIT_CPU, (_cpu_seconds() + seconds, -1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        code = work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
    return code


def _cpu_seconds() -> int:
    return int(time.process_time()) + 1


def metarun(words: list[str], folder: Path, seconds: int = MAX_SECONDS) -> Answer:
    """Answer a command line in a fork."""
    from metarun.cli.main import main

    return forked(lambda: main(words), folder, seconds)


Case = tuple[str, str | None, int]
"""What was tried, what was wrong with the answer, and its exit code."""


def report(name: str, try_cases: Callable[[Sequence[int], int, Path], Iterator[Case]]) -> int:
    """Try cases as the arguments of this process say, print the figures; return an exit code.

    Args:
        name: Module of the harness.
        try_cases: Takes indices of cases, a seed and an empty folder, and yields the cases.
    """
    parser = argparse.ArgumentParser(prog=f"{name}.py")
    parser.add_argument("--number", type=int, default=20, help="cases to try")
    parser.add_argument("--seed", type=int, default=0, help="chooses the cases")
    parser.add_argument("--only", type=int, help="this case alone")
    args = parser.parse_args()
    warm()
    indices = range(args.number) if args.only is None else [args.only]
    failed, codes, began = 0, Counter[int](), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        cases = try_cases(indices, args.seed, Path(folder))
        for index, (what, fault, code) in zip(indices, cases, strict=True):
            codes[code] += 1
            if fault is not None:
                failed += 1
                print(f"FAILED --seed {args.seed} --only {index}: {what}\n    {fault}", flush=True)
    seconds = time.perf_counter() - began
    print(f"{name}: {len(indices)} tried, {failed} failed, seed {args.seed}, {seconds:.0f} s")
    print("exit codes:", ", ".join(f"{code} {codes[code]} times" for code in sorted(codes)))
    return min(failed, 1)


def draw_of(seed: int, index: int) -> random.Random:
    """The draws of one case, which do not depend on the other cases."""
    return random.Random(f"{seed}-{index}")
