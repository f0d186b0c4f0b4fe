"""Description of the environment of a run: versions, machine and state of the code."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import metarun
from metarun.core import distributed

PACKAGES = ("torch", "torchvision", "numpy", "hydra-core", "omegaconf")


def versions() -> dict[str, str]:
    """Return the versions of Python, metarun and the packages that affect the results."""
    found = {"python": platform.python_version(), "metarun": metarun.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe(device: str) -> dict[str, Any]:
    """Describe the machine, the process and the state of the code.

    Args:
        device: Device in torch's notation, `cpu` or `cuda:0`.
    """
    import torch

    on_gpu = device.startswith("cuda")
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "processes": distributed.size(),
        "command": sys.argv,
        "git": _git(),
    }


def _git() -> dict[str, Any] | None:
    """Return the commit of the current folder and whether the working tree differs from it.

    The folder may come from somebody else. A repository whose own settings name programs, which
    `git status` would run, is asked for its commit alone.
    """
    commit = _ask_git("rev-parse", "HEAD")
    if not commit:
        return None
    settings = _ask_git("config", "--show-scope", "--get-regexp", r"^(filter\.|core\.fsmonitor)")
    if any(line.startswith(("local", "worktree")) for line in (settings or "").splitlines()):
        return {"commit": commit, "dirty": None}
    quiet = ("-c", f"core.hooksPath={os.devnull}")
    changes = _ask_git(*quiet, "status", "--porcelain", "--ignore-submodules=all")
    return {"commit": commit, "dirty": bool(changes)}


def _ask_git(*words: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", *words],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            env={**os.environ, "GIT_NO_LAZY_FETCH": "1"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
