"""Names of folders: what was asked for in words, and a hash of what is computed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

HOW_IT_RUNS = (
    "device", "engine", "tasks_per_chunk", "threads", "graph", "debug", "sweep", "published",
    "paper", "hydra", "logger",
)  # fmt: skip
"""Root keys that do not change what a run computes: left out of its hash."""


def slug(words: Sequence[str], longest: int) -> str:
    """Words as one that any file system takes; empty if nothing is left of them."""
    return re.sub(r"[^\w.=-]+", "_", ",".join(words)).strip("_.,")[:longest]


def hashed_slug(words: Sequence[str], longest: int) -> str:
    """As much of `slug` as is allowed, and eight hexadecimal digits of all the words."""
    own = hashlib.blake2b(" ".join(words).encode(), digest_size=4).hexdigest()
    return f"{slug(words, longest)}-{own}"


def digest(config: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of what a configuration computes.

    Args:
        config: A resolved configuration, with `names`.
    """
    hashed = {key: value for key, value in config.items() if key not in HOW_IT_RUNS}
    hashed["names"] = {key: config["names"][key] for key in ("algo", "data", "backbone")}
    text = json.dumps(hashed, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def job_name(words: Sequence[str], config: Mapping[str, Any]) -> str:
    """The folder of a sweep's run: its words in alphabetical order, and its hash.

    The order of the words and how the run is run are not part of the name, so that the same run
    asked for in another way is found again.

    Args:
        words: `KEY=VALUE` of the run, as Hydra writes values.
        config: Its resolved configuration, with `names`.
    """
    named_words = sorted(word for word in words if root_of(word) not in HOW_IT_RUNS)
    named = slug(named_words, 160) or f"{config['names']['algo']}_{config['names']['data']}"
    return f"{named}-{digest(config)}"


def root_of(word: str) -> str:
    """The first part of the key of `KEY=VALUE`."""
    return re.split(r"[.=/@]", word.lstrip("+~"))[0]


HOW_TASKS_RUN = ("device", "engine", "tasks_per_chunk", "threads", "graph")
