"""Names of run folders: the overrides of a run and a hash of what it computes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

QUICK_START = "quick_start"
"""The experiment that a bare `metarun` runs."""

HOW_TASKS_RUN = ("device", "engine", "tasks_per_chunk", "threads", "graph")
"""Root keys that set where and how the tasks of a batch are computed."""

HOW_IT_RUNS = (*HOW_TASKS_RUN, "debug", "sweep", "published", "paper", "hydra", "logger")
"""Root keys that do not change the results of a run and are left out of its hash."""

_NEWER_AT_THE_ROOT: Mapping[str, Any] = {"init": None, "init_strict": True}
_NEWER: Mapping[str, Mapping[str, Any]] = {
    "train": {"patience": None, "rehearse": None},
    "eval": {"temperature": "none", "measures": []},
}
"""Keys that are newer than the hash; it leaves them out at their default, so that the runs of
earlier sweeps are found."""


def slug(words: Sequence[str], longest: int) -> str:
    """Join words into a name that is valid on any file system; possibly empty."""
    return re.sub(r"[^\w.=-]+", "_", ",".join(words)).strip("_.,")[:longest]


def hashed_slug(words: Sequence[str], longest: int) -> str:
    """Return `slug`, cut to `longest`, followed by an eight-digit hash of all words."""
    own = hashlib.blake2b(" ".join(words).encode(), digest_size=4).hexdigest()
    return f"{slug(words, longest)}-{own}"


def digest(config: Mapping[str, Any]) -> str:
    """Return an eight-digit hexadecimal hash of the keys that determine the results.

    Args:
        config: A resolved configuration, including `names`.
    """
    hashed = {key: value for key, value in config.items() if key not in HOW_IT_RUNS}
    for key, value in _NEWER_AT_THE_ROOT.items():
        if hashed.get(key, value) == value:
            hashed.pop(key, None)
    for node, newer in _NEWER.items():
        kept = hashed.get(node, {}).items()
        hashed[node] = {k: v for k, v in kept if k not in newer or v != newer[k]}
    # It only says when a run pauses.
    hashed["train"].pop("max_minutes", None)
    hashed["names"] = {key: config["names"][key] for key in ("algo", "data", "backbone")}
    text = json.dumps(hashed, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


_SHORT, _EARLIER = 60, 160
"""Longest overrides in a folder's name, now and in earlier versions."""


def job_name(words: Sequence[str], config: Mapping[str, Any], pool: Path) -> str:
    """Return the folder name of a sweep's run: its sorted overrides, cut short, and its hash.

    Order of the overrides, device and engine are not part of the name, so that an equivalent
    command finds the same run. The experiment comes first and is not cut: two experiments may
    compute the same, and each has a run of its own.

    Args:
        words: Overrides `KEY=VALUE` of the run, with values as Hydra writes them.
        config: Resolved configuration of the run, including `names`.
        pool: Folder of the sweep's runs; a run there with the longer name that earlier versions
            gave it keeps that name.
    """
    named_words = sorted(word for word in words if not _only_how(word))
    first = [word for word in named_words if root_of(word) == "experiment"]
    ordered = first + [word for word in named_words if word not in first]
    hashed = digest(config)

    def named(some: Sequence[str], longest: int) -> str:
        text = slug(some, longest) or f"{config['names']['algo']}_{config['names']['data']}"
        return f"{text}-{hashed}"

    name = named(ordered, max(_SHORT, len(slug(first, _EARLIER))))
    earlier = named(named_words, _EARLIER)
    return earlier if (pool / earlier).is_dir() and not (pool / name).is_dir() else name


def _only_how(word: str) -> bool:
    """Return whether an override changes how a run is executed, and not its results."""
    return root_of(word) in HOW_IT_RUNS or word.lstrip("+").startswith("train.max_minutes=")


def root_of(word: str) -> str:
    """Return the first component of the key of `KEY=VALUE`."""
    return re.split(r"[.=/@]", word.lstrip("+~"))[0]
