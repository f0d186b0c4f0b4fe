"""Kills runs of every algorithm by SIGKILL, resumes them, and compares them with whole runs.

    python -m tests.robustness.kills --number 51 --seed 0

A case takes an algorithm, makes the tiny run of `tests/golden.yaml` with it, and kills the same
run at a line of Python at one of `POINTS`, every other time once more while it resumes. Once
resumed to its end, it has to equal the whole run bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from tests.robustness.forked import Answer, Case, draw_of, forked, report

TIMES = ("seconds", "train_seconds", "tasks_per_second", "window_seconds")

_MODULES = (
    "core/files.py", "runs/checkpoints.py", "runs/folder.py", "runs/lock.py", "runs/records.py",
    "training/trainer.py", "training/run_state.py", "training/meta_test.py",
    "training/results.py", "training/ending.py", "evaluation/evaluation.py",
    "evaluation/episodes.py",
)  # fmt: skip
_WRITES = ("prepared_file", "write_atomically", "save_last", "save_best")


def _writes(name: str) -> Callable[[FrameType], bool]:
    save = "save_last" if name == "last.pt" else "save_best"

    def applies(frame: FrameType) -> bool:
        function = frame.f_code.co_name
        path = frame.f_locals.get("path")
        return function == save or (function in _WRITES and Path(path or "").name == name)

    return applies


def _in(*names: str) -> Callable[[FrameType], bool]:
    return lambda frame: (
        frame.f_code.co_name in names or Path(frame.f_code.co_filename).stem in names
    )


POINTS: dict[str, Callable[[FrameType], bool]] = {
    "start-up": _in("create", "restore", "begin", "locked", "cut"),
    "last.pt": _writes("last.pt"),
    "best.pt": _writes("best.pt"),
    "meta-test": _in("meta_test", "results", "evaluation", "episodes", "finish"),
    "any": lambda _: True,
}
"""Which lines of the modules above belong to a point."""


def _trace(on_line: Callable[[FrameType], None], modules: Sequence[str] = _MODULES) -> None:
    """Call a function at every line of Python of some modules."""
    import metarun

    root = Path(metarun.__file__).parent
    files = {str(root / name) for name in modules}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            on_line(frame)
        return trace

    sys.settrace(trace)


def _act_at(
    on: Callable[[FrameType], bool],
    line: int,
    act: Callable[[], None],
    modules: Sequence[str] = _MODULES,
) -> None:
    """Call a function once, at the given one of the lines of a kind."""
    left = line

    def on_line(frame: FrameType) -> None:
        nonlocal left
        if on(frame):
            left -= 1
            if left == 0:
                act()

    _trace(on_line, modules)


def _counted(words: list[str], modules: Sequence[str] = _MODULES) -> int:
    """Run a command line and write the number of lines of each point beside the run."""
    from metarun.cli.main import main

    counts: Counter[str] = Counter()
    names = POINTS.items()
    _trace(lambda frame: counts.update(name for name, on in names if on(frame)), modules)
    code = main(words)
    sys.settrace(None)
    Path("counts.json").write_text(json.dumps(counts))
    return code


def _killed(words: list[str], point: str, line: int) -> int:
    """Run a command line that is killed at the given line of a point."""
    from metarun.cli.main import main

    _act_at(POINTS[point], line, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return main(words)


def try_kills(indices: Sequence[int], seed: int, folder: Path) -> Iterator[Case]:
    """Yield a case for each index; neighboring indices have different algorithms."""
    from tests.golden import RUNS, words_of

    names = [name for name in sorted(RUNS) if "-" not in name]
    random.Random(seed).shuffle(names)
    for index in indices:
        name = names[index % len(names)]
        place = folder / name
        words = [*words_of(name), "graph=none"]
        draw = draw_of(seed, index)
        yield _case(name, words, place, draw)


def _case(name: str, words: list[str], place: Path, draw: random.Random) -> Case:
    if not place.exists():
        place.mkdir()
        whole = forked(lambda: _counted([*words, "hydra.run.dir=whole"]), place)
        if whole.code != 0:
            shutil.rmtree(place)
            return name, f"the whole run failed: {whole.err.strip()[-300:]}", whole.code
    counts = json.loads((place / "counts.json").read_text())
    run = place / "killed"
    shutil.rmtree(run, ignore_errors=True)
    what = name
    start = [*words, "hydra.run.dir=killed"]
    go: list[str] = start
    kills = [draw.choice(sorted(counts))] + ["any"] * draw.randrange(2)
    for point in kills:
        line = draw.randint(1, counts[point] // (1 if go is start else 2))
        answer = forked(lambda go=go, point=point, line=line: _killed(go, point, line), place)
        what += f", killed at {point} {line}/{counts[point]}"
        if answer.code not in (0, -signal.SIGKILL):
            return what, _unfinished(answer), answer.code
        go = _next(run, start)
    answer = forked(lambda: _resumed(go), place)
    if fault := answer.fault() or _unfinished(answer):
        return what, fault, answer.code
    return what, "; ".join(differences(place / "whole", run)) or None, 0


def _next(run: Path, start: list[str]) -> list[str]:
    """How a user goes on: a folder without a status holds no run yet, as `resume=` says."""
    if (run / "status.json").exists():
        return ["resume=killed"]
    shutil.rmtree(run, ignore_errors=True)
    return start


def _resumed(words: list[str]) -> int:
    from metarun.cli.main import main

    return main(words)


def _unfinished(answer: Answer) -> str | None:
    return f"exit code {answer.code}: {answer.err.strip()[-300:]}" if answer.code else None


def differences(whole: Path, killed: Path) -> Iterator[str]:
    """Name the files of two runs that are not the same, but for times."""
    import numpy as np

    from metarun.runs.checkpoints import read_checkpoint
    from metarun.runs.folder import RunFolder
    from tests.tiny_run import same_state

    if (whole / "metrics.jsonl").read_bytes() != (killed / "metrics.jsonl").read_bytes():
        yield "metrics.jsonl differs"
    for name in ("last.pt", "best.pt"):
        one, other = (path / "checkpoints" / name for path in (whole, killed))
        if one.exists() != other.exists():
            yield f"{name} is in one run alone"
        elif one.exists():
            states = [_without_times(read_checkpoint(path)) for path in (one, other)]
            for key in states[0].keys() | states[1].keys():
                if not same_state(states[0].get(key), states[1].get(key)):
                    yield f"{name} differs in {key}"
    results = [_without_times(RunFolder.open(path).read_results()) for path in (whole, killed)]
    yield from (
        f"results.json differs in {k}" for k in results[0] if results[0][k] != results[1].get(k)
    )
    with np.load(whole / "episodes.npz") as one, np.load(killed / "episodes.npz") as other:
        for name in {*one, *other}:
            if name not in one or name not in other or one[name].tobytes() != other[name].tobytes():
                yield f"episodes.npz differs in {name}"


def _without_times(record: Any) -> dict[str, Any]:
    # The lengths of the logs contain that of timing.jsonl.
    return {key: value for key, value in record.items() if key not in (*TIMES, "lengths")}


if __name__ == "__main__":
    sys.exit(report("kills", try_kills))
