"""Lets the disk become full under a word that writes, frees it, and repeats the word.

    python -m tests.robustness.full_disks --number 100 --seed 0

A case takes a word and one of a few algorithms, and a disk on which the word may write fewer bytes
than it needs. It has to end with one line that says that the disk is full and what to do, and
may neither change what was there before nor leave half a file. Most cases hide the space from the
checks at the start, as if it went later. Once the disk has space again, the run is
resumed or the word repeated, and all results have to equal those of a disk that was never full.

The disks are real ones, see `disks.py`; `no_inodes.py` does the same with a disk that has space
but can hold no more files.
"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from tests.robustness.disks import PAGE, Disk, enter
from tests.robustness.forked import Answer, Case, draw_of, forked, report
from tests.robustness.kills import _counted, _killed, differences

NAMES = ("protonet", "maml", "replay")
"""Runs of `golden.yaml` that write different files: of images, of values, of a stream."""


class Word(NamedTuple):
    """What is typed, what the disk holds before, and for which algorithms it can be typed."""

    words: list[str]
    run: str | None = None
    names: tuple[str, ...] = NAMES


WORDS = {
    "train": Word(["hydra.run.dir=run"]),
    "resume": Word(["resume=run"], "stopped"),
    "test": Word(["test=run", "eval.episodes=3"], "whole"),
    "report": Word(["report", "run"], "whole"),
    "sweep": Word(["-m", "seed=3,4", "sweep.name=two"]),
    "data": Word(["data", "omniglot", "--from", "../zips", "--root", "root"], None, NAMES[:1]),
    "predict": Word(
        ["predict", "run", "--support", "../pictures", "--query", "../pictures"],
        "whole",
        NAMES[:1],
    ),
    "compare": Word(["compare", "--dir", "compared"], None, NAMES[:1]),
}

_WITH_RUN = ("train", "sweep", "compare")
"""Words that are typed with the settings of a run."""


def run_words(name: str) -> list[str]:
    """Return the words of a run of `golden.yaml`."""
    from tests.golden import words_of

    return [*words_of(name), "graph=none"]


def _typed(word: str, name: str) -> list[str]:
    words = WORDS[word].words
    if word not in _WITH_RUN:
        return words
    # `compare` takes no word that deletes, and the sweep has seeds of its own.
    without = {"compare": "~", "sweep": "seed="}.get(word, "-")
    return [*words, *(w for w in run_words(name) if not w.startswith(without))]


def _answered(words: list[str], *, checked: bool) -> int:
    """Answer a command line, with or without its checks of free space."""
    from metarun.cli.main import main
    from metarun.data import omniglot
    from metarun.data.storage import omniglot_files
    from tests.data.test_omniglot import TINY

    for module in (omniglot, omniglot_files):
        module.characters = lambda: TINY  # type: ignore[assignment]
    if not checked:
        usage = shutil.disk_usage("/")
        shutil.disk_usage = lambda _: usage._replace(free=2**50)
    return main(words)


def try_disks(indices: Sequence[int], seed: int, folder: Path, *, inodes: bool) -> Iterator[Case]:
    """Yield a case for each index."""
    _make_pictures(folder)
    for index in indices:
        draw = draw_of(seed, index)
        word = draw.choice(sorted(WORDS))
        name = draw.choice(WORDS[word].names)
        whole = _whole(word, name, inodes, folder)
        left = draw.randrange(whole.needed if inodes else whole.needed // PAGE)
        checked = draw.random() < 0.15
        with Disk(folder / "disk") as disk:
            yield _case(word, name, left, whole, disk, checked=checked, inodes=inodes)


def _make_pictures(folder: Path) -> None:
    from PIL import Image

    from tests.data import sources
    from tests.data.test_omniglot import TINY

    with patch.object(sources, "characters", return_value=TINY):
        sources.write_omniglot_zips(folder / "zips")
    for label in "ab":
        (folder / "pictures" / label).mkdir(parents=True)
        Image.new("L", (14, 14), 200 * (label == "a")).save(folder / f"pictures/{label}/1.png")


class Whole(NamedTuple):
    """What a word leaves on a disk with space, and how much of it it needs at most."""

    files: Path
    needed: int


@cache
def _run_before(name: str, kind: str, folder: Path) -> Path:
    """Make a whole run, and the same run killed when it saves a checkpoint."""
    place = folder / "before" / name
    if not place.exists():
        place.mkdir(parents=True)
        words = [w for w in _typed("train", name) if not w.startswith("hydra.run.dir=")]
        _done(forked(lambda: _counted([*words, "hydra.run.dir=whole"]), place))
        lines = json.loads((place / "counts.json").read_text())["last.pt"]
        stopped = [*words, "hydra.run.dir=stopped"]
        forked(lambda: _killed(stopped, "last.pt", lines * 5 // 8), place)
    return place / kind


def _done(answer: Answer) -> None:
    assert answer.code == 0, (answer.code, answer.err)


@cache
def _whole(word: str, name: str, inodes: bool, folder: Path) -> Whole:
    files = folder / "never-full" / f"{word}-{name}"
    with Disk(folder / "disk") as disk:
        _fill(disk, word, name, folder)
        before = disk.used()[inodes]
        _done(forked(partial(_answered, _typed(word, name), checked=True), disk.path))
        needed = disk.used()[inodes] - before
        if not files.exists():
            shutil.copytree(disk.path, files)
    # A file that replaces another needs both for a moment.
    return Whole(files, needed + (2 if inodes else 16 * PAGE))


def _fill(disk: Disk, word: str, name: str, folder: Path) -> None:
    kind = WORDS[word].run
    if kind is not None:
        shutil.copytree(_run_before(name, kind, folder), disk.path / "run")


def _case(
    word: str, name: str, left: int, whole: Whole, disk: Disk, *, checked: bool, inodes: bool
) -> Case:
    folder = disk.path.parent
    _fill(disk, word, name, folder)
    before = contents(disk.path)
    disk.leave(**({"num_inodes": left} if inodes else {"num_bytes": left * PAGE}))
    answer = forked(partial(_answered, _typed(word, name), checked=checked), disk.path)
    unit = "inodes" if inodes else f"of {whole.needed // PAGE} pages"
    what = f"{word} of {name}, {left} {unit} left{'' if checked else ', unchecked'}"
    fault = answer.fault() or unclear(answer) or lost(before, disk.path, word, whole.files)
    fault = fault or "; ".join(torn(disk.path)) or None
    disk.free()
    if fault is None:
        fault = _on_a_free_disk(word, name, answer, whole, disk)
    return what, fault, answer.code


def unclear(answer: Answer) -> str | None:
    """What is wrong with the words about a full disk."""
    if answer.code == 0:
        return None
    errors = answer.errors()
    for line in answer.reasons() or errors:
        if not any(word in line for word in ("no space", "no room", " free")):
            return f"no word of a full disk: {line}"
        if "free some" not in line and "remove some" not in line:
            return f"no word of what to do: {line}"
    return None if len(set(errors)) == len(errors) else f"one line twice: {errors[0]}"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


_GROW = ("metarun.log", "metrics.jsonl", "timing.jsonl")


def lost(before: dict[Path, bytes], disk: Path, word: str, whole: Path) -> str | None:
    """Name a file that a word has removed or changed, but for those that it has to change."""
    now = contents(disk)
    for path, data in before.items():
        if path not in now:
            if path.name != "lock" and "checkpoints" not in path.parts:
                return f"{path.name} is gone"
        elif word != "resume" and path.name not in _GROW and now[path] != data:
            wanted = whole / path.relative_to(disk)
            if word == "report" and wanted.read_bytes() == now[path]:
                continue
            return f"{path.name} has changed"
    return None


def torn(folder: Path) -> Iterator[str]:
    """Name files that are half written; the lines of logs are whole or are cut by a resume."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.name.endswith(".tmp") or path.name == "lock":
            yield f"{name} is left behind"
        elif not _WHOLE.get(path.suffix, bool)(path):
            yield f"{name} is torn"
        elif path.suffix in (".html", ".csv", ".png", ".svg", ".md") and not path.stat().st_size:
            yield f"{name} is empty"


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


_WHOLE: dict[str, Callable[[Path], bool]] = {
    ".json": _is_json,
    ".npz": zipfile.is_zipfile,
    ".pt": zipfile.is_zipfile,
}
"""Whether a file of a suffix is whole."""


def _on_a_free_disk(word: str, name: str, answer: Answer, whole: Whole, disk: Disk) -> str | None:
    """Go on as a user does; return what differs from a disk that was never full."""
    go = _typed(word, name)
    if word in ("train", "resume"):
        go = ["resume=run"]
        if not (disk.path / "run").exists():
            go = _typed("train", name)
    if answer.code != 0:
        again = forked(partial(_answered, go, checked=True), disk.path)
        if fault := again.fault():
            return f"then {fault}"
        if again.code != 0:
            return f"then exit code {again.code}: {again.err.strip()[-300:]}"
    # A run keeps its results where its figures or its log found no space, with a warning; a sweep
    # that ends because of a later run keeps them, too.
    kept = answer.code == 0 or word == "sweep"
    optional = ("figures",) if kept and "warning" in answer.err else ()
    return "; ".join(unlike(whole.files, disk.path, optional)) or None


_NOT_COMPARED = (
    "metarun.log", "timing.jsonl", "environment.json", "status.json", "config.yaml",
    "overrides.yaml", "results.json", "metrics.jsonl", "report.html",
)  # fmt: skip


def unlike(whole: Path, other: Path, optional: Sequence[str] = ()) -> Iterator[str]:
    """Name what differs between two folders of runs, pages and tables, but for times."""
    for path in sorted(whole.rglob("*")):
        name = path.relative_to(whole)
        found = other / name
        if set(name.parts) & {*optional, ".index"}:
            continue
        if path.is_file() and not found.exists():
            yield f"{name} is missing"
        elif path.name == "checkpoints":
            yield from (f"{name.parent}: {text}" for text in differences(path.parent, found.parent))
        elif path.is_file() and not _same_file(path, found):
            yield f"{name} differs"


def _same_file(one: Path, other: Path) -> bool:
    # Tables have columns of seconds.
    if one.name in _NOT_COMPARED or one.suffix in (".pt", ".md"):
        # The timing of a stream is empty.
        return other.stat().st_size > 0 or not one.stat().st_size
    return one.read_bytes() == other.read_bytes()


try_bytes: Callable[[Sequence[int], int, Path], Iterator[Case]] = partial(try_disks, inodes=False)
try_inodes: Callable[[Sequence[int], int, Path], Iterator[Case]] = partial(try_disks, inodes=True)

if __name__ == "__main__":
    enter()
    sys.exit(report("full_disks", try_bytes))
