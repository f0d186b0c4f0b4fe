"""What completes a word of the command line: files, names, settings.

Each function takes the beginning of a word and the words before it, and returns whole words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from metarun.config.catalogue import GROUPS, conf_dir, entries
from metarun.config.search_path import OPTIONS, as_config_dir, own_folders
from metarun.runs import sweeps
from metarun.runs.find import LAST, OUTPUTS, newest_first, run_folders

OF_RUNS = ("runs", "sweeps")
"""What `metarun list` shows besides the groups."""


def words(allowed: Collection[str]) -> Callable[[str, Sequence[str]], list[str]]:
    """Return what offers these words; behind a comma, those that are missing."""

    def offers(word: str, _: Sequence[str]) -> list[str]:
        head, comma, _last = word.rpartition(",")
        typed = head.split(",")
        return [f"{head}{comma}{name}" for name in allowed if name not in typed]

    return offers


def names(group: str) -> Callable[[str, Sequence[str]], list[str]]:
    """Return what offers the choices of a group."""
    return lambda _, before: list(entries(_folders(before), group))


def listed(_: str, before: Sequence[str]) -> list[str]:
    """Offer the words of `metarun list`: groups, or names behind a group."""
    typed = [word for word in before if not word.startswith("-")]
    if typed[:1] and typed[0] in OF_RUNS:
        return []
    chosen = [word for word in typed if word in GROUPS]
    found = list(entries(_folders(before), chosen[0])) if chosen[:1] == typed[:1] != [] else []
    return found if len(typed) > len(chosen) else [*GROUPS, *([] if typed else OF_RUNS), *found]


def paths(word: str, _: Sequence[str] = ()) -> list[str]:
    """Offer files and folders; folders end with a slash."""
    folder, _, _name = word.rpartition("/")
    head = f"{folder}/" if "/" in word else ""
    place = Path(head or ".").expanduser()
    found = sorted(place.iterdir()) if place.is_dir() else []
    return [f"{head}{path.name}{'/' * path.is_dir()}" for path in found]


def folders(word: str, _: Sequence[str] = ()) -> list[str]:
    """Offer folders."""
    return [path for path in paths(word) if path.endswith("/")]


def runs(word: str, _: Sequence[str] = ()) -> list[str]:
    """Offer folders, `last`, names of sweeps and, once a word has begun, names of runs' folders."""
    found = newest_first(run_folders(OUTPUTS)) if "/" not in word else []
    names = [*([LAST] if found else []), *(sweep.name for sweep in sweeps.stored())]
    return [*folders(word), *names, *(run.name for run in found if word)]


def settings(word: str, before: Sequence[str]) -> Iterable[str]:
    """Offer overrides KEY=VALUE, by Hydra; `resume=`, `test=` and `init=` take a run."""
    key, equals, value = word.partition("=")
    if equals and key == "init":
        return [f"{key}={name}" for name in dict.fromkeys([*paths(value), *runs(value)])]
    if equals and key in ("resume", "test"):
        return [f"{key}={name}" for name in runs(value)]
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin

    from metarun.config.loading import opened

    typed = [w for w in before if "=" in w and not w.startswith(("resume=", "test=", "-"))]
    with opened(_config_dir(before)) as hydra:
        plugin = DefaultCompletionPlugin(hydra.config_loader)
        found = plugin._query(config_name="config", line=" ".join([*typed, word]))
    return [offer for offer in found if "=for_" not in offer]


def runs_and_settings(word: str, before: Sequence[str]) -> list[str]:
    """Offer runs, and overrides KEY=VALUE."""
    return [*([] if "=" in word else runs(word)), *settings(word, before)]


def _folders(before: Sequence[str]) -> list[Path]:
    return [conf_dir(), *own_folders(_config_dir(before))]


def _config_dir(before: Sequence[str]) -> str | None:
    typed = as_config_dir(before)
    places = [place for option, place in pairwise(typed) if option in OPTIONS]
    return os.pathsep.join(places) or None
