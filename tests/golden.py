"""Compare the numbers of two git commits bit for bit: a refactoring has to leave them as they are.

    python tests/golden.py BASE HEAD [--algo NAME ...] [--graph none,replay]

Each commit makes the same short runs in one process with one thread, the two side by side; HEAD
may be `.` for the working tree. No number is stored, and nothing of metarun is imported here:
runs are made by its command line and read from their folders.

A name that changes gets an entry in `RENAMED`, old to new: `"data.greyscale": "data.grayscale"`
or `"algo=old": "algo=new"` under `words`, `"untaught": "untrained"` under `arrays`. It stands for
what is below it, too: `"net.body": "net.features"` under `parameters` for `net.body.0.weight`.
The runs, in golden.yaml, keep the old words; a commit whose `conf/` has the new one is given that.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

RENAMED: dict[str, dict[str, str]] = {
    # Of command lines: KEY, or GROUP=NAME.
    "words": {
        "data.normalise": "data.normalize",
        "data.colour": "data.color",
        "data.grey": "data.grayscale",
        "data.affine_degrees": "data.augmentation.degrees",
        "data.affine_translate": "data.augmentation.translate",
        "data.affine_scale": "data.augmentation.scale",
        "data.affine_shear": "data.augmentation.shear",
        "data.elastic": "data.augmentation.elastic",
        "data.told": "data.task_ids_known",
        "algo.judged": "algo.loss_of",
    },
    # Of metrics.jsonl.
    "metrics": {},
    # Of results.json, by dotted names.
    "results": {"layout.told": "layout.task_ids_known"},
    # Of episodes.npz.
    "arrays": {"untaught": "untrained"},
    # Of the state in checkpoints/last.pt; MetaGAN holds its learner.
    "parameters": {
        "told_mean": "evidence_mean",
        "told_variance": "evidence_variance",
        "net": "learner.net",
        "rates": "learner.rates",
        "optimizer": "learner.optimizer",
    },
}

NOT_COMPARED = (
    "format",
    "seconds",
    "train_seconds",
    "tasks_per_second",
    "threads",
    "tasks_per_chunk",
)
"""Fields of results.json that say how a run was made and written, and not what it found."""

TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
FAMILIES, RUNS, TESTED = TABLE["families"], TABLE["runs"], TABLE["tested"]

ADDED = ("measures", "temperature", "test_openings", "nll", "ece")
"""Entries of results.json and arrays of episodes.npz that BASE may lack."""

Numbers = dict[str, "np.ndarray[Any, Any]"]
_LAST_LINES, _MOST_DIFFERENCES = 8, 10


def main(argv: list[str]) -> int:
    """Compare two commits; returns 0 if every run was made and no number differs."""
    parser = argparse.ArgumentParser(prog="golden.py", description=__doc__.partition("\n")[0])
    parser.add_argument("base", metavar="BASE", help="a git commit")
    parser.add_argument("head", metavar="HEAD", help="another, or . for the working tree")
    parser.add_argument("--algo", nargs="+", metavar="NAME", help="these algorithms alone")
    parser.add_argument("--graph", default="none,replay", help="default: %(default)s")
    args = parser.parse_args(argv)
    # As Ctrl-C does, so that neither processes nor folders stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary, contextlib.ExitStack() as ends:
        sides = [Path(temporary, "base"), Path(temporary, "head")]
        for side, commit in zip(sides, (args.base, args.head), strict=True):
            check_out(commit, side / "checkout")
        names = chosen(known_words(sides[0] / "checkout/conf"), args.algo)
        runs = [(name, graph) for name in names for graph in args.graph.split(",")]
        processes = [start(side, runs) for side in sides]
        for process in processes:
            ends.callback(process.wait)
            ends.callback(process.kill)
        return report([f"{name}-{graph}" for name, graph in runs], sides, processes)


def check_out(commit: str, checkout: Path) -> None:
    """Copy the package and its configurations, as of a commit or as they stand."""
    root = Path(__file__).resolve().parent.parent
    if commit in (".", "WORKTREE"):
        for part in ("metarun", "conf"):
            shutil.copytree(root / part, checkout / part)
    else:
        words = ["git", "archive", commit, "metarun", "conf"]
        archive = subprocess.run(words, cwd=root, stdout=subprocess.PIPE)
        if archive.returncode != 0:
            sys.exit(f"{commit} is no commit of {root}")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(checkout, filter="data")
    # By it the package finds the configurations beside it.
    (checkout / "pyproject.toml").touch()


def known_words(conf: Path) -> set[str]:
    """Every dotted key of the YAMLs of a folder, and `GROUP=NAME` for every YAML of a group."""
    found: set[str] = set()
    for path in conf.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        group = ".".join(path.relative_to(conf).parts[:-1])
        found.add(f"{group}={path.stem}")
        found |= set(_keys(yaml.safe_load(text), "" if "@package _global_" in text else group))
    return found


def _keys(node: Any, above: str) -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        name = f"{above}.{key}".lstrip(".")
        yield name
        yield from _keys(value, name)


def chosen(known: set[str], algorithms: list[str] | None) -> list[str]:
    """Names of the runs of the algorithms that a commit has, or of those asked for.

    Raises:
        SystemExit: An algorithm has no run here, or one that was asked for is not there.
    """
    there = {word.removeprefix("algo=") for word in known if word.startswith("algo=")}
    algorithm_of = {run: _spelled(f"algo={run.split('-')[0]}", known)[5:] for run in RUNS}
    if without := sorted(there - set(algorithm_of.values())):
        sys.exit(f"golden.yaml has no run of {', '.join(without)}")
    if unknown := sorted(set(algorithms or ()) - there):
        sys.exit(f"--algo: BASE has no conf/algo of {', '.join(unknown)}")
    wanted = there if algorithms is None else set(algorithms)
    return [run for run, algorithm in algorithm_of.items() if algorithm in wanted]


def start(side: Path, runs: list[tuple[str, str]]) -> subprocess.Popen[bytes]:
    """Start the process that makes the runs of a commit."""
    folder, known = side / "runs", known_words(side / "checkout/conf")
    folder.mkdir()
    plan = {f"{name}-{graph}": commands(name, graph, folder, known) for name, graph in runs}
    (folder / "plan.json").write_text(json.dumps(plan))
    environment = {"PYTHONPATH": str(side / "checkout"), "PYTHONHASHSEED": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # -P: what lies beside this file is not to be imported.
    words = [sys.executable, "-P", __file__, "--make", str(side / "checkout")]
    with (folder / "process.log").open("wb") as log:
        return subprocess.Popen(
            words, cwd=folder, env=os.environ | environment, stdout=log, stderr=log
        )


def commands(name: str, graph: str, folder: Path, known: set[str]) -> list[list[str]]:
    """The command lines of a run, in the words that a commit knows."""
    run = folder / f"{name}-{graph}"
    words = expanded(f"algo={name.split('-')[0]} every {RUNS[name]} graph={graph}")
    lines = [[*(_spelled(word, known) for word in words.values()), f"hydra.run.dir={run}"]]
    if name in TESTED:
        words = expanded(TESTED[name])
        lines.append([f"test={run}", *(_spelled(word, known) for word in words.values())])
    return lines


def expanded(text: str) -> dict[str, str]:
    """Words by their keys, with those of families in their places."""
    words: dict[str, str] = {}
    for word in text.split():
        words |= expanded(FAMILIES[word]) if word in FAMILIES else {word.partition("=")[0]: word}
    return words


def words_of(name: str) -> list[str]:
    """The words of a run, as the configurations of this repository spell them."""
    known = _known_here()
    words = expanded(f"algo={name.split('-')[0]} every {RUNS[name]}")
    return [_spelled(word, known) for word in words.values()]


@cache
def _known_here() -> set[str]:
    return known_words(Path(__file__).parents[1] / "conf")


def _spelled(word: str, known: set[str]) -> str:
    """A word by its new name, where the commit knows that."""
    key, sign, value = word.partition("=")
    new_key, new_word = renamed("words", key), renamed("words", word)
    if new_word != word and new_word in known:
        return new_word
    return f"{new_key}{sign}{value}" if new_key in known else word


def renamed(kind: str, name: str) -> str:
    """The new name of something, or the one it has."""
    for old, new in RENAMED[kind].items():
        rest = name.removeprefix(old)
        if rest != name and rest[:1] in ("", ".", "/"):
            return new + rest
    return name


def make(checkout: Path) -> None:
    """Make the runs of `plan.json` here, one after another: what the process of a commit does."""
    import metarun

    assert Path(metarun.__file__).is_relative_to(checkout), metarun.__file__
    for run, lines in json.loads(Path("plan.json").read_text()).items():
        with (
            Path(f"{run}.log").open("w") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            code = next((code for words in lines if (code := _command(words))), 0)
        Path("code").write_text(str(code))
        Path("code").rename(f"{run}.code")


def _command(words: list[str]) -> int:
    """Answer a command line; returns the exit code."""
    sys.argv = ["metarun", *words]
    try:
        runpy.run_module("metarun", run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def report(runs: list[str], sides: list[Path], processes: list[subprocess.Popen[bytes]]) -> int:
    """Print what differs, run by run as they are made; returns the exit code."""
    began, count, num_wrong = time.monotonic(), 0, 0
    for run in runs:
        wrong = [
            f"failed in {side.name}: {why}"
            for side, process in zip(sides, processes, strict=True)
            if (why := failure(side / "runs", process, run)) is not None
        ]
        if not wrong:
            base, head = (numbers(side / "runs" / run) for side in sides)
            wrong = list(differences(base, head))
            count += sum(array.size for array in base.values())
        num_wrong += bool(wrong)
        if len(wrong) > _MOST_DIFFERENCES:
            wrong[_MOST_DIFFERENCES:] = [f"and {len(wrong) - _MOST_DIFFERENCES} more"]
        for line in wrong:
            print(f"{run}: {line}", flush=True)
    outcome = f"{num_wrong} runs differ or failed" if num_wrong else "all are equal"
    seconds = time.monotonic() - began
    print(f"{len(runs)} runs, {count} numbers compared in {seconds:.0f} s: {outcome}")
    return 1 if num_wrong else 0


def failure(folder: Path, process: subprocess.Popen[bytes], run: str) -> str | None:
    """Wait for a run; returns its exit code and its last lines if it failed."""
    code, logs = folder / f"{run}.code", [folder / "process.log", folder / f"{run}.log"]
    while not code.exists() and process.poll() is None:
        time.sleep(0.05)
    text = code.read_text() if code.exists() else f"{process.returncode} of the process"
    if text == "0":
        return None
    lines = [line for log in logs if log.exists() for line in log.read_text().splitlines()]
    return "\n    ".join([f"exit code {text}", *lines[-_LAST_LINES:]])


def numbers(run: Path) -> Numbers:
    """Every number in the folder of a run, by the new name of what it is."""
    import torch

    found: Numbers = {}
    records: dict[str, list[Any]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            records.setdefault(f"metric {renamed('metrics', name)}", []).append(value)
    # The run's own are the first.
    for at, place in enumerate(sorted(path.parent for path in run.rglob("results.json"))):
        of = f" of test {at}" if at else ""
        for name, value in _leaves(json.loads((place / "results.json").read_text())):
            if name not in NOT_COMPARED:
                records[f"result {renamed('results', name)}{of}"] = [value]
        with np.load(place / "episodes.npz") as arrays:
            for name in arrays:
                if arrays[name].dtype.kind != "U":
                    found[f"array {renamed('arrays', name)}{of}"] = arrays[name]
    saved = torch.load(run / "checkpoints/last.pt", weights_only=True, map_location="cpu")
    for name, value in _leaves(saved["state"]):
        array = value.numpy() if isinstance(value, torch.Tensor) else np.array(value, dtype=float)
        found[f"parameter {renamed('parameters', name)}"] = array
    # What is not finite is null in JSON, and NaN here.
    return found | {name: np.array(values, dtype=float) for name, values in records.items()}


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What a nest of dictionaries and lists holds but text, by dotted names."""
    if isinstance(node, (dict, list, tuple)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, f"{name}.{key}".lstrip("."))
    elif not isinstance(node, str):
        yield name, node


def differences(base: Numbers, head: Numbers) -> Iterator[str]:
    """A line about each quantity that is not the same, bit for bit."""
    for name in base | head:
        if name not in base or name not in head:
            if name in base or name.split()[1].partition(".")[0] not in ADDED:
                yield f"{name} is only in {'base' if name in base else 'head'}"
            continue
        one, other = base[name], head[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            yield f"{name} is {one.dtype} {one.shape} against {other.dtype} {other.shape}"
            continue
        same = one == other
        if one.dtype.kind == "f":
            same = same & (np.signbit(one) == np.signbit(other)) | np.isnan(one) & np.isnan(other)
        if not same.all():
            one, other = one[~same].astype(float), other[~same].astype(float)
            with np.errstate(all="ignore"):
                gap = np.abs(one - other)
                relative = gap / np.maximum(np.abs(one), np.abs(other))
            yield f"{name} differs by {gap.max():.3g}, relatively by {relative.max():.3g}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]))
    else:
        sys.exit(main(sys.argv[1:]))
