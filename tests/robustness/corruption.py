"""Corrupts one file of a run and gives the run to the words that read runs.

    python -m tests.robustness.corruption --number 200 --seed 0

A case takes a finished or a killed run, a file, a harm and a word. Nothing may hang or end with a
traceback. Exit code 0 is wrong where a figure is not that of the intact run and no line of the
output says why. A text file that is still valid, with a value of the same type in place of
another, is what a user may have typed: such a case counts as passed. Logs of the same run with
another seed are not tried either: nothing in them says whose they are.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from tests.robustness.forked import Answer, Case, draw_of, forked, metarun, report
from tests.robustness.kills import _counted, _killed, _without_times

NAME = "protonet"


def _pictures() -> tuple[Any, Any]:
    images = np.random.default_rng(0).random((4, 14, 14), dtype=np.float32)
    return images, np.array(["a", "b", "c", "a"])


def _load() -> int:
    """Print what a learner that is loaded from the run predicts."""
    from metarun import load

    images, labels = _pictures()
    try:
        print(load("run").fit(images, labels).predict_proba(images))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


WORDS: dict[str, list[str]] = {
    "test": ["test=run"],
    "resume": ["resume=run"],
    "table": ["table", "run"],
    "report": ["report", "run"],
    "compare": ["compare", "--table", "--dir", "."],
    "predict": ["predict", "run", "--support", "pictures", "--query", "pictures"],
    "load": [],
}
"""All words that read runs."""


# Harms: each takes the bytes of a file, those of the same file of another run, and draws.


def truncated(data: bytes, _: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(max(len(data), 1))]


def flipped(data: bytes, _: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 20]) if data else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def emptied(_: bytes, __: bytes, ___: random.Random) -> bytes:
    return b""


def garbage(data: bytes, _: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(max(len(data), 1))


def zeroed(data: bytes, _: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(max(len(data), 1))
    return data[:at] + bytes(len(data) - at)


def deleted(_: bytes, __: bytes, ___: random.Random) -> None:
    return None


def swapped(_: bytes, other: bytes, __: random.Random) -> bytes:
    return other


HARMS: tuple[Callable[[bytes, bytes, random.Random], bytes | None], ...] = (
    truncated, flipped, emptied, garbage, zeroed, deleted, swapped,
)  # fmt: skip


class Request(NamedTuple):
    """A word for a run, and what it answers and writes if nothing is harmed."""

    word: str
    answer: Answer
    figures: dict[str, Any]


def try_harms(indices: Sequence[int], seed: int, folder: Path) -> Iterator[Case]:
    """Yield a case for each index."""
    _make_runs(folder)
    for index in indices:
        draw = draw_of(seed, index)
        kind = draw.choice(["finished", "killed"])
        word = draw.choice([w for w in WORDS if (kind, w) != ("killed", "compare")])
        run = folder / kind
        files = sorted(p.relative_to(run) for p in run.rglob("*") if p.is_file())
        name = draw.choice(files)
        harm = draw.choice(HARMS)
        other = folder / draw.choice(["stranger", "sibling"]) / name
        if not other.exists() or (other.parts[len(folder.parts)] == "sibling" and not _says(name)):
            other = run / name
        before = (run / name).read_bytes()
        after = harm(before, other.read_bytes(), draw)
        place = _place(folder, kind, str(index))
        harmed = place / "run" / name
        if after is None:
            harmed.unlink()
        else:
            harmed.write_bytes(after)
        what = f"{word} of a {kind} run, {name} {harm.__name__}"
        intact = _intact(word, kind, folder)
        answer = _answer(word, place, folder)
        fault = _fault(intact, answer, place, name)
        if fault and "without a word" in fault and _still_valid(name, before, after):
            fault = None
        yield what, fault, answer.code
        shutil.rmtree(place)


def _make_runs(folder: Path) -> None:
    from PIL import Image

    for label in "ab":
        (folder / "pictures" / label).mkdir(parents=True)
        Image.new("L", (14, 14), 200 * (label == "a")).save(folder / f"pictures/{label}/1.png")
    words = _words(NAME)
    _done(forked(lambda: _counted([*words, "hydra.run.dir=finished"]), folder))
    lines = json.loads((folder / "counts.json").read_text())["last.pt"]
    killed = [*words, "hydra.run.dir=killed"]
    forked(lambda: _killed(killed, "last.pt", lines * 5 // 8), folder)
    _done(metarun([*_words("maml"), "hydra.run.dir=stranger"], folder))
    _done(metarun([*words, "seed=7", "hydra.run.dir=sibling"], folder))


def _says(name: Path) -> bool:
    """Whether a file says whose it is."""
    return name.suffix in (".pt", ".npz") or name.name == "results.json"


def _words(name: str) -> list[str]:
    from tests.golden import words_of

    words = [*words_of(name), "graph=none"]
    # `compare` takes no word that deletes.
    return [word for word in words if not word.startswith("~")]


def _done(answer: Answer) -> None:
    assert answer.code == 0, answer.err


def _place(folder: Path, kind: str, name: str) -> Path:
    place = folder / "cases" / name
    shutil.copytree(folder / kind, place / "run")
    shutil.copytree(folder / "pictures", place / "pictures")
    return place


@cache
def _intact(word: str, kind: str, folder: Path) -> Request:
    place = _place(folder, kind, f"{word}-{kind}")
    answer = _answer(word, place, folder)
    return Request(word, answer, _figures(word, answer, place))


def _answer(word: str, place: Path, folder: Path) -> Answer:
    if word == "load":
        return forked(_load, place)
    if word == "compare":
        (place / "run").rename(place / _compared(folder))
        return metarun([*WORDS[word], *_words(NAME)], place)
    return metarun(WORDS[word], place)


@cache
def _compared(_: Path) -> str:
    from metarun.config.composition import composer
    from metarun.jobs.comparison import folder_name

    with composer() as compose:
        return folder_name(compose.jobs(_words(NAME), sweep=True)[0])


def _figures(word: str, answer: Answer, place: Path) -> dict[str, Any]:
    """What a word says or writes that a reader takes for a result."""
    if word == "report":
        pages = list(place.rglob("report.html"))
        return {"page": [_numbers_of(path.read_text()) for path in pages]}
    if word not in ("test", "resume"):
        return {"out": answer.out}
    found = {}
    for path in sorted(place.rglob("results.json")):
        if word == "resume" or "tests" in path.parts:
            found[str(path.relative_to(place))] = _without_times(json.loads(path.read_bytes()))
    log = place / "run/metrics.jsonl"
    if word == "resume":
        found["metrics.jsonl"] = log.read_bytes() if log.exists() else b""
    return found


def _numbers_of(page: str) -> list[str]:
    """The lines of a page with a measured value."""
    return [line for line in page.splitlines() if "±" in line]


def _fault(intact: Request, answer: Answer, place: Path, name: Path) -> str | None:
    if fault := answer.fault():
        return fault
    if answer.code != 0 or _says_why(intact.answer, answer, name):
        return None
    if intact.answer.code != 0:
        return "exit code 0, unlike the intact run"
    try:
        figures = _figures(intact.word, answer, place)
    except (OSError, ValueError) as error:
        return f"exit code 0 without results: {error}"
    if figures == intact.figures:
        return None
    changed = [
        k for k in figures.keys() | intact.figures.keys() if figures.get(k) != intact.figures.get(k)
    ]
    return f"a figure changed without a word: {', '.join(changed)}"


def _says_why(intact: Answer, answer: Answer, name: Path) -> bool:
    """Whether the output has a warning that the intact run's has not."""
    known = {*intact.out.splitlines(), *intact.err.splitlines()}
    words = ("warning", "WARNING", "damaged", "missing", "left out", "note: ", name.name)
    lines = [line for line in (answer.out + "\n" + answer.err).splitlines() if line not in known]
    return any(word in line for line in lines for word in words)


def _still_valid(name: Path, before: bytes, after: bytes | None) -> bool:
    """Whether a text file has values in place of others, all of the same types."""
    if after is None or name.suffix not in (".yaml", ".json", ".jsonl"):
        return False
    try:
        return _shape(name, before) == _shape(name, after)
    except (ValueError, yaml.YAMLError):
        return False


def _shape(name: Path, data: bytes) -> Any:
    text = data.decode()
    if name.suffix == ".jsonl":
        return [_types(json.loads(line)) for line in text.splitlines()]
    return _types(yaml.safe_load(text) if name.suffix == ".yaml" else json.loads(text))


def _types(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _types(value) for key, value in node.items()}
    if isinstance(node, list):
        return list(map(_types, node))
    return type(node)


if __name__ == "__main__":
    sys.exit(report("corruption", try_harms))
