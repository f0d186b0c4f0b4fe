"""Attacks: each is a function that fills the folder of a run with hostile content.

Every command that an attack names would create the file PWNED, and every module that it brings
would do so when it is imported.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

COMMAND = "touch PWNED"
CODE = "import pathlib\npathlib.Path('PWNED').touch()\n"
POPEN = {"_target_": "subprocess.Popen", "args": ["touch", "PWNED"]}
PAGER = {"_target_": "pydoc.pipepager", "_partial_": True, "text": "x", "cmd": COMMAND}

Attack = Callable[[Path, Path], None]
"""Takes the folder of the run, and a file and a folder of the user next to it: `outside`."""

ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function
    return function


class Pickled:
    """An object whose pickle runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (COMMAND,)


def change(run: Path, **values: Any) -> None:
    """Change values of the stored configuration; `__` separates the keys."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in values.items():
        *path, leaf = key.split("__")
        node = config
        for part in path:
            node = node[part]
        node[leaf] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@attack
def a_command_as_algorithm(run: Path, _: Path) -> None:
    change(run, algo=PAGER)


@attack
def a_command_as_data_set(run: Path, _: Path) -> None:
    change(run, data=POPEN)


@attack
def a_command_as_backbone(run: Path, _: Path) -> None:
    change(run, backbone=PAGER)


@attack
def a_command_as_optimizer(run: Path, _: Path) -> None:
    change(run, optim=PAGER)


@attack
def a_command_as_tracker(run: Path, _: Path) -> None:
    change(run, logger={"x": POPEN})


@attack
def a_tracker_of_another_machine(run: Path, _: Path) -> None:
    change(run, logger={"x": {"_target_": "metarun.trackers.mlflow.MLflow", "uri": "http://[::1]"}})


@attack
def a_function_of_metarun(run: Path, outside: Path) -> None:
    target = "metarun.core.files.write_atomically"
    change(run, optim={"_target_": target, "path": str(outside / "mine"), "data": "x"})


@attack
def a_nested_command(run: Path, _: Path) -> None:
    learner = {"_target_": "metarun.algorithms.generative.metagan.MetaGAN"}
    change(run, algo={**learner, "learner": "subprocess.Popen", "args": ["touch", "PWNED"]})


@attack
def modules_in_the_folder(run: Path, _: Path) -> None:
    for name in ("evil", "sklearn", "wandb", "mlflow", "tensorboard", "joblib", "h5py"):
        (run / f"{name}.py").write_text(CODE)
    for name in ("hydra_plugins/evil", "evil_conf"):
        (run / name).mkdir(parents=True)
        (run / name / "__init__.py").write_text(CODE)
    (run / "hydra_plugins/evil/plugin.py").write_text(CODE)
    words = ["hydra.searchpath=[pkg://evil_conf]", "--config-dir=evil_conf"]
    (run / "overrides.yaml").write_text(json.dumps(words))
    change(run, algo___target_="evil.Mine", eval__measures=["evil.mine"])


@attack
def a_measure_of_the_folder(run: Path, _: Path) -> None:
    (run / "evil.py").write_text(CODE)
    change(run, eval__measures=["evil.mine"])


@attack
def an_interpolation(run: Path, _: Path) -> None:
    change(run, data__root="${oc.env:SECRET}", names__algo="${oc.env:SECRET}")


@attack
def an_interpolation_in_the_words(run: Path, _: Path) -> None:
    (run / "overrides.yaml").write_text(json.dumps(["data=${oc.env:SECRET}", "hydra/launcher=x"]))


@attack
def tags_of_python(run: Path, _: Path) -> None:
    text = f"!!python/object/apply:os.system ['{COMMAND}']\n"
    for name in ("config.yaml", "overrides.yaml"):
        (run / name).write_text(f"names: {text}")


@attack
def aliases_that_expand(run: Path, _: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (run / "config.yaml").write_text("\n".join([*lines, "names: *a11\n"]))


@attack
def pickles_in_place_of_arrays(run: Path, _: Path) -> None:
    for path in [*run.rglob("*.pt"), *run.rglob("*.npz")]:
        path.write_bytes(pickle.dumps(Pickled()))


@attack
def pickles_in_the_zips(run: Path, _: Path) -> None:
    (run / "checkpoints/best.pt").unlink(missing_ok=True)
    for path in (run / "checkpoints").glob("*.pt"):
        with zipfile.ZipFile(path) as old:
            parts = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w") as new:
            for name, data in parts.items():
                hostile = pickle.dumps(Pickled(), protocol=2)
                new.writestr(name, hostile if name.endswith("data.pkl") else data)
    np.savez(run / "episodes.npz", accuracy=np.array([Pickled()], dtype=object))


@attack
def zips_that_expand(run: Path, _: Path) -> None:
    for path in [*run.rglob("*.pt"), *run.rglob("*.npz")]:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("accuracy.npy", bytes(10**8))


@attack
def links_to_files_of_the_user(run: Path, outside: Path) -> None:
    (run / "lock").symlink_to(outside / "mine")
    for name in ("metarun.log", "metrics.jsonl", "timing.jsonl", "report.html", "trackers.json"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside / "mine")
    for name in ("tests", "figures", "tensorboard", "mlflow", "wandb"):
        (run / name).symlink_to(outside)


@attack
def a_link_in_place_of_the_checkpoints(run: Path, outside: Path) -> None:
    (run / "checkpoints").rename(outside / "checkpoints")
    (run / "checkpoints").symlink_to(outside / "checkpoints")


@attack
def a_cache_outside(run: Path, outside: Path) -> None:
    target = "metarun.algorithms.selection.selector.Selector"
    change(run, algo={"_target_": target, "cache": str(outside)}, bn="running")


@attack
def a_repository_whose_settings_name_programs(run: Path, _: Path) -> None:
    for words in (
        ["init", "-q"],
        ["config", "user.email", "a@b"],
        ["config", "user.name", "a"],
        ["add", "config.yaml"],
        ["commit", "-qm", "x"],
        ["config", "core.fsmonitor", COMMAND],
    ):
        subprocess.run(["git", *words], cwd=run, check=True, capture_output=True)
    hook = run / ".git/hooks/post-index-change"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\n{COMMAND}\n")
    hook.chmod(0o755)


@attack
def words_for_a_shell_and_a_browser(run: Path, _: Path) -> None:
    html = "<script>fetch('http://evil.example')</script>"
    names = {"algo": html, "data": f"'; {COMMAND}; '"}
    change(run, names__algo=names["algo"], names__data=names["data"])
    if (run / "results.json").exists():
        results = json.loads((run / "results.json").read_text())
        (run / "results.json").write_text(json.dumps({**results, **names}))
    facts = {"git": {"commit": f"\n{COMMAND}"}, "command": ["metarun", "--config-dir", html]}
    (run / "environment.json").write_text(json.dumps(facts))
