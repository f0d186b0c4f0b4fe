"""Starts a second command in the folder of one that is at work.

    python -m tests.robustness.pairs --number 60 --seed 0

A case takes two commands, a line of Python at which the first one stops, and a line of the second.
The second starts when the first has stopped, and stops at its own line. Then one of them goes on
to its end, and the other one after it, so that a case repeats exactly. Where a command would wait
for some time, the other one goes on. What is done in the end has to equal, bit for bit, what one
command alone leaves; a command that fails has to say why in one line.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from tests.robustness.forked import Answer, Case, Process, draw_of, forked, report
from tests.robustness.full_disks import run_words, torn, unlike
from tests.robustness.kills import POINTS, _act_at, _counted, _killed

NAME = "maml"

_MODULES = (
    "core/files.py", "runs/checkpoints.py", "runs/folder.py", "runs/lock.py", "runs/records.py",
    "runs/sweeps.py", "jobs/comparison.py", "jobs/ensure.py", "jobs/meta_test.py",
    "jobs/resume.py", "jobs/sweep.py", "jobs/train.py", "reporting/writing.py",
    "training/trainer.py", "training/meta_test.py", "training/results.py",
)  # fmt: skip


class Pair(NamedTuple):
    """Two commands for one folder, and the state of the run that is there before."""

    first: str
    second: str
    run: str | None = None


PAIRS = (
    Pair("train", "train"),
    Pair("train", "resume"),
    Pair("train", "report"),
    Pair("train", "test"),
    Pair("resume", "resume", "stopped"),
    Pair("sweep", "other sweep"),
    Pair("sweep", "sweep"),
    Pair("compare", "compare"),
)


def _typed(command: str) -> list[str]:
    words = run_words(NAME)
    whole = [word for word in words if not word.startswith("~")]
    others = [word for word in words if not word.startswith("seed=")]
    return {
        "train": [*words, "hydra.run.dir=run"],
        "resume": ["resume=run"],
        "report": ["report", "run"],
        "test": ["test=run", "eval.episodes=3"],
        "sweep": ["-m", *others, "seed=3,4", "sweep.name=one"],
        "other sweep": ["-m", *others, "seed=4,5", "sweep.name=two"],
        "compare": ["compare", "--dir", "compared", *whole],
    }[command]


def _held(words: list[str], point: str, line: int, talk: socket.socket) -> int:
    """Answer a command line that stops at a line of a point, and where it would wait."""
    from types import SimpleNamespace

    from metarun.cli.main import main
    from metarun.jobs import ensure

    def stop(*_: object) -> None:
        talk.send(b"!")
        talk.recv(1)

    # A process that waits for the other one lets it go on.
    ensure.time = SimpleNamespace(time=ensure.time.time, sleep=stop)  # type: ignore[assignment]
    _act_at(POINTS[point], line, stop, _MODULES)
    return main(words)


class Held(NamedTuple):
    """A command that stops and goes on when it is told to."""

    process: Process
    talk: socket.socket

    @classmethod
    def start(cls, command: str, point: str, line: int, place: Path) -> Held:
        """Start a command and return when it has stopped or ended."""
        here, there = socket.socketpair()
        process = Process.start(partial(_held, _typed(command), point, line, there), place)
        there.close()
        held = cls(process, here)
        here.recv(1)
        return held

    def go_on(self) -> bool:
        """Let the command go on until it stops again; return whether it has ended."""
        try:
            self.talk.send(b"!")
            return self.talk.recv(1) == b""
        except OSError:
            return True


def _to_the_end(commands: Sequence[Held]) -> list[Answer]:
    """Let the first command go on until it waits or ends, then the other, and so on."""
    left = list(commands)
    while left:
        ended = left[0].go_on()
        left = left[1:] if ended else [*left[1:], left[0]]
    return [held.process.end() for held in commands]


@cache
def _lines(command: str, state: str | None, folder: Path) -> dict[str, int]:
    """Make what a command alone leaves; return the number of lines of each point."""
    place = folder / "alone" / command
    _fill(place, state, folder)
    answer = forked(lambda: _counted(_typed(command), _MODULES), place)
    assert answer.code == 0, (answer.code, answer.err)
    counts = json.loads((place / "counts.json").read_text())
    (place / "counts.json").unlink()
    return {point: counts[point] for point in counts}


def _fill(place: Path, state: str | None, folder: Path) -> None:
    """Make the folder of a case, with a run that is whole or stopped, if any."""
    place.mkdir(parents=True)
    if state is not None:
        shutil.copytree(_run_before(state, folder), place / "run")


@cache
def _run_before(state: str, folder: Path) -> Path:
    if state == "whole":
        _lines("train", None, folder)
        return folder / "alone/train/run"
    place = folder / "stopped"
    place.mkdir()
    line = _lines("train", None, folder)["last.pt"] * 5 // 8
    forked(lambda: _killed(_typed("train"), "last.pt", line), place)
    return place / "run"


def _line_of(command: str, state: str | None, folder: Path) -> dict[str, int]:
    # Alone, a test or a report needs a run that is there.
    needs = {"report": "whole", "test": "whole", "resume": "stopped"}
    return _lines(command, state or needs.get(command), folder)


def try_pairs(indices: Sequence[int], seed: int, folder: Path) -> Iterator[Case]:
    """Yield a case for each index; neighboring indices have different pairs."""
    for index in indices:
        pair, draw = PAIRS[index % len(PAIRS)], draw_of(seed, index)
        places = []
        for command in pair[:2]:
            lines = _line_of(command, pair.run, folder)
            point = draw.choice(sorted(lines))
            places.append((command, point, draw.randint(1, lines[point])))
        place = folder / "cases" / str(index)
        _fill(place, pair.run, folder)
        held = [Held.start(*what, place) for what in places]
        order = draw.choice([1, -1])
        answers = _to_the_end(held[::order])[::order]
        what = " and ".join(f"{command} at {point} {line}" for command, point, line in places)
        goes = "first" if order == 1 else "second"
        yield (
            f"{what}, the {goes} one goes on",
            _fault(pair, answers, place, folder),
            max(answer.code for answer in answers),
        )
        shutil.rmtree(place)


def _fault(pair: Pair, answers: Sequence[Answer], place: Path, folder: Path) -> str | None:
    for command, answer in zip(pair[:2], answers, strict=True):
        if fault := answer.fault() or _unclear(answer):
            return f"{command}: {fault}"
    if all(answer.code for answer in answers):
        return "both have failed: " + "; ".join(answer.err.strip()[-200:] for answer in answers)
    if wrong := "; ".join(torn(place)):
        return wrong
    for command, answer in zip(pair[:2], answers, strict=True):
        # What a reader sees of a run at work is not what it sees later.
        if command in ("report", "test"):
            continue
        _line_of(command, pair.run, folder)
        whole = folder / "alone" / command
        if (answer.code == 0 or _both_complete(pair)) and (wrong := _unlike(whole, place, answer)):
            return f"{command}: {wrong}"
    return None


def _both_complete(pair: Pair) -> bool:
    """Whether the one that has failed is done by the other one."""
    return pair.second not in ("other sweep", "test", "report")


def _unlike(whole: Path, place: Path, answer: Answer) -> str:
    # A run that another process has at work is missing in a table.
    tables = {path.name for path in whole.rglob("*.md")} if answer.code else ()
    # Hydra stores the words of the last sweep; the test of a run is one of its openings.
    found = unlike(whole, place, ("multirun.yaml", *tables))
    return "; ".join(text for text in found if not text.endswith("differs in test_openings"))


def _unclear(answer: Answer) -> str | None:
    errors = answer.reasons()
    if answer.code and len(errors) != 1:
        return f"{len(errors)} lines say why: {errors}"
    return None


if __name__ == "__main__":
    sys.exit(report("pairs", try_pairs))
