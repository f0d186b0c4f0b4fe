"""Lets the back ends of trackers fail under a run, which has to be the same as without them.

    python -m tests.robustness.failing_trackers --number 40 --seed 0

A case takes a tracker with its real package, a fault, and a line of the tracker's module at which
the fault begins: its folder vanishes, becomes read-only or full, its files become garbage, a call
of the package raises, its service is killed. A service that cannot be reached fails from the
start. The exit code has to be 0, at most one line may say that the tracker is dropped, and the
results and metrics have to equal those of a run without a tracker, bit for bit. A tracker may fail
to notice what happened to its files.

Packages that are not installed are left out. The disks are real ones, see `disks.py`.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from tests.robustness.disks import Disk, enter
from tests.robustness.forked import Answer, Case, draw_of, forked, metarun, report
from tests.robustness.full_disks import run_words
from tests.robustness.kills import _act_at, _trace, differences

NAME = "maml"
TRACKERS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
"""Packages by the names of the trackers."""

_MAX_SECONDS = 60
"""Seconds of processor time: the packages take several on their own, more on a busy machine."""

_DROPPED = "has failed and is dropped"

Fault = Callable[[Path, random.Random], None]
"""Does something to the folder of a tracker."""


def vanishes(store: Path, _: random.Random) -> None:
    shutil.rmtree(store, ignore_errors=True)


def read_only(store: Path, _: random.Random) -> None:
    subprocess.run(["mount", "--bind", str(store), str(store)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(store)], check=True)


def full(store: Path, draw: random.Random) -> None:
    kept = store.with_name("kept")
    shutil.copytree(store, kept)
    # Mounted until the run has ended.
    disk = Disk(store).__enter__()
    shutil.copytree(kept, store, dirs_exist_ok=True)
    shutil.rmtree(kept)
    disk.leave(num_bytes=draw.choice([0, 0, 4096, 65536]))


def garbage(store: Path, draw: random.Random) -> None:
    for path in sorted(store.rglob("*")):
        if path.is_file():
            path.write_bytes(draw.randbytes(path.stat().st_size))


def raises(_: Path, draw: random.Random) -> None:
    # Raised in the traced line, as if a call there had raised it.
    errors = [OSError(5, "I/O"), RuntimeError("a\nb"), SystemExit(3), KeyError("x"), MemoryError()]
    raise draw.choice(errors)


def service_killed(_: Path, __: random.Random) -> None:
    """Kill the processes that this one has started."""
    me = Path(f"/proc/{os.getpid()}")
    for task in me.glob("task/*/children"):
        for number in task.read_text().split():
            os.kill(int(number), signal.SIGKILL)


FAULTS: tuple[Fault, ...] = (vanishes, read_only, full, garbage, raises)
UNREACHABLE = {
    "mlflow": ["logger.mlflow.uri=http://127.0.0.1:9"],
    "wandb": ["logger.wandb.mode=online"],
}
"""Words for a service that nobody runs; the port is closed."""


def _used(frame: FrameType) -> bool:
    """Whether a line is of a tracker at work: what fails in an import is no fault of use."""
    code = frame.f_code
    return bool(code.co_flags & inspect.CO_OPTIMIZED) and code.co_name != "__init__"


def _run(words: list[str], name: str, line: int, act: Callable[[], None]) -> int:
    """Answer a command line, and act at a line of a tracker's module."""
    from metarun.cli.main import main

    _act_at(_used, line, act, [f"trackers/{name}.py"])
    return main(words)


def _counted(words: list[str], name: str) -> int:
    """Answer a command line, and note how many lines of a tracker's module it takes."""
    from metarun.cli.main import main

    count = 0

    def on_line(frame: FrameType) -> None:
        nonlocal count
        count += _used(frame)

    _trace(on_line, [f"trackers/{name}.py"])
    code = main(words)
    sys.settrace(None)
    Path("lines.json").write_text(json.dumps(count))
    return code


def _typed(name: str | None) -> list[str]:
    words = [*run_words(NAME), "hydra.run.dir=run"]
    return words if name is None else [*words, f"logger={name}"]


@cache
def _alone(folder: Path) -> Path:
    """Make the run without a tracker."""
    place = folder / "alone"
    place.mkdir()
    answer = metarun(_typed(None), place)
    assert answer.code == 0, (answer.code, answer.err)
    return place / "run"


@cache
def _lines(name: str, folder: Path) -> int:
    """Return the number of lines of a tracker's module in a run without a fault."""
    place = folder / f"whole-{name}"
    place.mkdir()
    answer = forked(partial(_counted, _typed(name), name), place, _MAX_SECONDS)
    assert answer.code == 0, (answer.code, answer.err)
    assert "has failed" not in answer.err, answer.err
    return int(json.loads((place / "lines.json").read_text()))


def try_faults(indices: Sequence[int], seed: int, folder: Path) -> Iterator[Case]:
    """Yield a case for each index; neighboring indices have different trackers."""
    os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"
    os.environ["WANDB_API_KEY"] = "0" * 40
    names = [name for name, package in TRACKERS.items() if find_spec(package)]
    if "mlflow" in names:
        import mlflow  # noqa: F401 - so that no fork has to
        import sqlalchemy  # noqa: F401
    for index in indices:
        name, draw = names[index % len(names)], draw_of(seed, index)
        place = folder / "cases" / str(index)
        place.mkdir(parents=True)
        if name in UNREACHABLE and draw.random() < 0.15:
            words = [*_typed(name), *UNREACHABLE[name]]
            answer = metarun(words, place, _MAX_SECONDS)
            what = f"{name}, not reachable"
        else:
            faults = (*FAULTS, service_killed) if name == "wandb" else FAULTS
            fault, line = draw.choice(faults), draw.randint(1, _lines(name, folder))
            what = f"{name}, {fault.__name__} at line {line} of {_lines(name, folder)}"
            act = partial(_act, fault, place / "run" / name, draw)
            work = partial(_run, _typed(name), name, line, act)
            answer = forked(work, place, _MAX_SECONDS)
            _unmount(place / "run" / name)
        yield what, _fault(answer, place, folder), answer.code


def _act(fault: Fault, store: Path, draw: random.Random) -> None:
    """Let a fault happen to the folder of a tracker, which may not be there yet."""
    store.mkdir(parents=True, exist_ok=True)
    fault(store, draw)


def _unmount(store: Path) -> None:
    subprocess.run(["umount", "-l", str(store)], capture_output=True, check=False)


def _fault(answer: Answer, place: Path, folder: Path) -> str | None:
    if fault := answer.fault():
        return fault
    if answer.code != 0:
        return f"exit code {answer.code}: {answer.err.strip()[-300:]}"
    said = [line for line in (answer.out + answer.err).splitlines() if _DROPPED in line]
    # The run without a tracker has a note, too.
    others = [line for line in answer.err.splitlines() if not line.startswith("note: ")]
    others = [line for line in others if _DROPPED not in line]
    if len(said) > 1 or others:
        return f"more than one line: {said + others}"[:600]
    return "; ".join(differences(_alone(folder), place / "run")) or None


if __name__ == "__main__":
    enter()
    sys.exit(report("failing_trackers", try_faults))
