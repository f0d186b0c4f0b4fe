"""The folder of a run by what a user types: its path, `last`, or a part of its name.

Runs are looked for below `outputs/` of the current folder. Torch is not imported.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from metarun.runs import sweeps

OUTPUTS = Path("outputs")
LAST = "last"
_MOST_LISTED = 5
_SHORTEST = 6
"""Letters of the shortest end of a name that is shown; fewer may be a part of many names."""


def find_run(name: str | Path) -> Path:
    """Return the folder of the run that a word stands for; an existing path stands for itself.

    Args:
        name: A path, `last` (the run at work last), or a part of the name of one run's folder.
            A part with a slash is looked for in the whole path.

    Raises:
        ValueError: No run or several have this name.
    """
    word = str(name)
    if Path(name).exists():
        return Path(name)
    runs = run_folders(OUTPUTS)
    if word == LAST:
        if not runs:
            raise ValueError(f"{LAST}: there is no run below {OUTPUTS}/: type the folder of a run")
        return newest_first(runs)[0]
    found = [run for run in runs if word.rstrip("/") in (str(run) if "/" in word else run.name)]
    found = [run for run in found if run.name == word] or found
    if len(found) == 1:
        return found[0]
    if not found and sweeps.find(word) is not None:
        raise ValueError(f"{word} is a sweep: expected one run; see `metarun table {word}`")
    if not found:
        near = difflib.get_close_matches(word, [run.name for run in runs], n=3, cutoff=0.4)
        hint = f", such as {', '.join(near)}" if near else ""
        raise ValueError(
            f"{word}: there is no such folder: expected the folder of a run, `{LAST}`, or a part "
            f"of the name of one below {OUTPUTS}/{hint}"
        )
    listed = [*map(str, newest_first(found)[:_MOST_LISTED])]
    rest = f" and {len(found) - len(listed)} older ones" * (len(found) > len(listed))
    raise ValueError(
        f"{word} is a part of the names of {len(found)} runs: type more of one: "
        f"{', '.join(listed)}{rest}"
    )


def find_runs(word: str) -> list[Path]:
    """Return the folders that a word stands for where several runs may be meant.

    Args:
        word: As for `find_run`, a folder that contains runs, or the name of a sweep.

    Raises:
        ValueError: Nothing has this name, or several runs.
    """
    if not Path(word).exists() and (sweep := sweeps.find(word)) is not None:
        return sweep.existing()
    return [find_run(word)]


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of all runs in and below a folder, sorted by path."""
    found = (status.parent for status in folder.rglob("status.json"))
    return sorted(run for run in found if (run / "config.yaml").exists())


def endings(shown: Iterable[Path], runs: Sequence[Path]) -> list[str]:
    """Return the shortest end of each run's name that stands for it alone, or its path.

    Args:
        shown: Folders of the runs to name.
        runs: Folders of all runs, among them those.
    """
    shown = list(shown)
    names = Counter(run.name for run in runs)
    wanted = {end for run in shown for end in _ends(run.name)}
    lengths = {len(end) for end in wanted}
    # Parts of names are looked up: to compare all pairs of names would take minutes for a big pool.
    having: Counter[str] = Counter()
    for name, times in names.items():
        parts = {name[i : i + size] for size in lengths for i in range(len(name) - size + 1)}
        having.update(dict.fromkeys(parts & wanted, times))

    def name_of(run: Path) -> str:
        for end in _ends(run.name):
            if having[end] == 1 and not Path(end).exists():
                return end
        return run.name if names[run.name] == 1 and not Path(run.name).exists() else str(run)

    return [name_of(run) for run in shown]


def _ends(name: str) -> list[str]:
    """Return the ends of a name that follow a dash or an underscore, the shortest first."""
    starts = [found.end() for found in re.finditer("[-_]", name)]
    return [name[start:] for start in reversed(starts) if len(name) - start >= _SHORTEST]


def newest_first(runs: Iterable[Path]) -> list[Path]:
    """Return run folders by the time of their last status, the newest first."""
    return sorted(runs, key=lambda run: (when(run), _modified(run)), reverse=True)


def when(run: Path) -> str:
    """Return the time of a run's last status, as `2026-11-21T09:30:00`."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        time = json.loads((run / "status.json").read_text(encoding="utf-8"))["time"]
        return datetime.fromisoformat(time).replace(tzinfo=None).isoformat(timespec="seconds")
    return datetime.fromtimestamp(_modified(run) / 1e9).isoformat(timespec="seconds")


def _modified(run: Path) -> int:
    return (run / "status.json").stat().st_mtime_ns
