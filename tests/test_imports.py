"""Imports go one way through the house, and torch only comes in where it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import metarun

PACKAGE = Path(metarun.__file__).parent

RANKS = {
    "types": -1, "settings": 0, "seeding": 0, "allocator": 0, "naming": 0, "intervals": 0,
    "parsing": 0, "processes": 0,
    "continual": 1, "clusters": 1, "data": 1, "backbones": 1, "runs": 1, "screen": 1,
    "environment": 1,
    "algorithms": 2, "trackers": 2,
    "views": 3, "lifetimes": 3,
    "evaluate": 4,
    "trainer": 5, "tables": 5, "report": 5,
    "config": 6,
    "request": 7, "listing": 7,
    "launch": 8, "predict": 8,
    "papers": 9, "labeling": 9, "bench": 9,
    "again": 9,
    "jobs": 10, "reporting": 10,
    "compare": 11, "sweep": 11,
    "cli": 12,
    "__main__": 13,
}  # fmt: skip

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> Iterator[str]:
    """What a module imports from metarun, by its name below `metarun.`, late imports included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("metarun."):
                yield name.removeprefix("metarun.")


def part(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_lower_ranks_or_its_own_part(path: Path) -> None:
    own = part(name_of(path))
    for name in imported(path):
        other = part(name)
        if other.startswith("__version"):
            continue
        assert other in RANKS, f"{other} has no rank"
        assert other == own or RANKS[other] < RANKS[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_data_and_algorithms_never_see_each_other(path: Path) -> None:
    own = part(name_of(path))
    others = {part(name) for name in imported(path)}
    forbidden = {"data": {"algorithms", "backbones"}, "algorithms": {"data"}, "backbones": {"data"}}
    assert not others & forbidden.get(own, set())


def test_no_algorithm_imports_another() -> None:
    shared = {
        "adapting", "base", "inner", "outer", "engine", "episodic", "graphs", "metagan",
        "portfolio", "pretraining", "online", "rules", "sequential", "trajectory",
    }  # fmt: skip
    for path in sorted((PACKAGE / "algorithms").glob("*.py")):
        for name in imported(path):
            if part(name) == "algorithms":
                module = name.split(".")[1]
                assert module in shared, f"{path.name} imports {name}"


def test_the_trainer_knows_no_algorithm_by_name() -> None:
    shared = {"base", "outer", "engine", "online"}
    for module in ("trainer", "evaluate"):
        for name in imported(PACKAGE / f"{module}.py"):
            if part(name) == "algorithms":
                assert name.split(".")[1] in shared, f"{module} imports {name}"


@pytest.mark.parametrize(
    "words",
    [
        ["--version"], ["--help"], ["--cfg", "job"], ["list"], ["algo=mml"],
        ["--info", "defaults"], ["data=omniglot", "way=0"],
        ["table", "--paper", "zintgraf2019_sinusoid"],
        ["bench", "--list"], ["bench", "--help"], ["bench", "--workload", "snusoid"],
        ["predict", "nowhere", "--support", "a", "--query", "b"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_runs_nothing_imports_no_torch(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from metarun.cli.main import main; main(sys.argv[1:]); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
