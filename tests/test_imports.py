"""Tests that imports follow the ranks of the folders and that torch is imported late."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import slow
from tests.imports import MODULES, PACKAGE, RANK, direct, folder_of, imported, name_of

INSIDE = [path for path in MODULES if path.parent != PACKAGE]
FAMILIES = {path.name for path in (PACKAGE / "algorithms").iterdir() if path.is_dir()}
SHARED = {
    "base",
    "capabilities",
    "functional",
    "outer_optimizer",
    "outer_program",
    "update_rules",
    "common",
}
"""What every family of algorithms may import from `algorithms`."""
INTERFACES = {"base", "capabilities", "outer_optimizer", "common"}
"""What training and evaluation may import from `algorithms`: no family, so no algorithm."""

GENERAL = {"augmentation", "recorded", "storage"}
"""What they may import from `data`: no data set."""


def test_every_module_is_in_a_folder_that_has_a_rank() -> None:
    flat = {path.name for path in MODULES if path.parent == PACKAGE}
    assert flat == {"__init__.py", "__main__.py"}
    assert {folder_of(name_of(path)) for path in INSIDE} == set(RANK)


@pytest.mark.parametrize("path", INSIDE, ids=name_of)
def test_a_module_imports_only_from_lower_ranks_or_its_own_folder(path: Path) -> None:
    own = folder_of(name_of(path))
    for name in imported(path):
        other = folder_of(name)
        if other.startswith("__version"):
            continue
        assert other in RANK, f"{other} has no rank"
        assert other == own or RANK[other] < RANK[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", INSIDE, ids=name_of)
def test_data_and_algorithms_never_import_each_other(path: Path) -> None:
    own = folder_of(name_of(path))
    others = {folder_of(name) for name in imported(path)}
    forbidden = {"data": {"algorithms", "backbones"}, "algorithms": {"data"}, "backbones": {"data"}}
    assert not others & forbidden.get(own, set())


def test_a_family_imports_what_is_shared_and_itself() -> None:
    for path in sorted((PACKAGE / "algorithms").rglob("*.py")):
        family = path.relative_to(PACKAGE / "algorithms").parts[0]
        allowed = SHARED | ({family} if family in FAMILIES else set())
        for name in imported(path):
            if folder_of(name) == "algorithms":
                assert name.split(".")[1] in allowed, f"{path.name} imports {name}"


def test_no_algorithm_imports_another() -> None:
    # Algorithms are the modules named in conf/algo; other modules of a family may be shared.
    algorithms = {
        line.split()[-1].removeprefix("metarun.").rpartition(".")[0]
        for path in (PACKAGE.parent / "conf" / "algo").glob("*.yaml")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith("_target_: metarun.")
    }
    assert len(algorithms) > 25
    for path in sorted((PACKAGE / "algorithms").rglob("*.py")):
        if name_of(path) in algorithms:
            others = {".".join(name.split(".")[:3]) for name in imported(path)}
            assert not others & (algorithms - {name_of(path)}), f"{path.name} imports {others}"


def test_the_loops_know_no_algorithm_and_no_data_set() -> None:
    for folder in ("evaluation", "training", "config", "execution", "inference"):
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            for name in imported(path):
                part, _, rest = name.partition(".")
                first = rest.partition(".")[0]
                if part == "algorithms":
                    assert first in INTERFACES, f"{folder} imports {name}"
                if part == "data":
                    assert first in GENERAL, f"{folder} imports {name}"


@pytest.mark.parametrize(
    "words",
    [
        ["--version"], ["--help"], ["--cfg", "job"], ["list"], ["list", "algo", "maml"],
        ["algo=mml"], ["--info", "defaults"], ["data=omniglot", "way=0"],
        ["table", "--paper", "zintgraf2019_sinusoid"],
        ["bench", "--list"], ["bench", "--help"], ["bench", "--workload", "snusoid"],
        ["predict", "nowhere", "--support", "a", "--query", "b"],
        ["export", "nowhere", "--format", "onnx"], ["algo=protonet", "init=nowhere"],
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


def test_a_run_imports_no_compiler_and_nothing_that_draws(tmp_path: Path) -> None:
    """Each takes a second; `torch.func.grad` imports the compiler for learners that adapt."""
    late = ["torch._dynamo", "sympy", "torchvision", "sklearn", "matplotlib", "pandas", "scipy"]
    words = ["algo=protonet", "data=omniglot_small", "device=cpu", "threads=1", "train.steps=1"]
    words += ["train.way=5", "eval.episodes=2", "eval.val_episodes=2", "hydra.run.dir=run"]
    code = (
        "import sys; from metarun.cli.main import main; assert main(sys.argv[1:]) == 0; "
        f"print('late', [name for name in {late} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("late []"), done.stdout + done.stderr


def test_the_picture_leaves_out_what_a_chain_of_arrows_says() -> None:
    found = [("cli", "jobs"), ("jobs", "core"), ("cli", "core"), ("cli", "data"), ("data", "core")]
    assert direct(found) == [
        ("cli", "data"), ("cli", "jobs"), ("data", "core"), ("jobs", "core"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["replay", slow("compile")])
def test_the_first_calls_of_a_process_are_replayed(kind: str, tmp_path: Path) -> None:
    """torch imports parts of itself in its first gradient, which is no part of a step."""
    words = ["algo=maml", "data=sinusoid", "~recipe", f"graph={kind}", "hydra.run.dir=run"]
    few = ["train.steps=5", "eval.episodes=2", "eval.val_episodes=2"]
    code = (
        "import sys; from metarun.cli.main import main; import metarun.execution.graph_replay as g;"
        "made = []; inner = g._replay; g._replay = lambda *a: made.append(inner(*a)) or made[-1]; "
        "assert main(sys.argv[1:]) == 0; print('made', len(made))"
    )
    command = [sys.executable, "-c", code, *words, *few]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "made 0" not in done.stdout, done.stderr
