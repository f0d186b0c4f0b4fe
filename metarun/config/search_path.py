"""The user's folders of YAML files: `--config-dir`, Hydra's `hydra.searchpath`, and plug-ins.

A `--config-dir` may name several folders, separated as in PATH. `hydra.searchpath` is turned into
it before anything else reads the command line, so that both find the same files everywhere.

A plug-in is an installed package with an entry point of the group `metarun.plugins`: its folder
`conf/` is searched as if it were typed, and what its files name is trusted.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

_log = logging.getLogger(__name__)

KEY = "hydra.searchpath"
OPTIONS = ("--config-dir", "-cd")


PLUGINS = "metarun.plugins"
"""Group of the entry points of plug-ins; the value of one is the name of its package."""


@functools.cache
def plugins() -> dict[str, Path]:
    """Return the folder `conf/` of each installed plug-in, by the name of its package.

    The package is not imported. One without such a folder is left out, with a warning.
    """
    found: dict[str, Path] = {}
    for point in sorted(entry_points(group=PLUGINS), key=lambda point: point.value):
        top, *below = point.value.partition(":")[0].split(".")
        spec = find_spec(top)
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        folders = [Path(place, *below, "conf") for place in places]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            _log.warning("plug-in %s: its package %s has no folder conf/", point.name, point.value)
        else:
            found[top] = folder
    return found


def own_folders(config_dir: str | Path | None) -> list[Path]:
    """Return the folders of plug-ins, and those of a `--config-dir`.

    Raises:
        ValueError: One of them does not exist.
    """
    folders = [Path(name) for name in str(config_dir or "").split(os.pathsep) if name]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--config-dir {folder}: there is no such folder; check the path")
    return [*plugins().values(), *folders]


def refuse_shipped_names(folders: Sequence[Path], shipped: Path) -> None:
    """Check that no file of the user has the name of a shipped one, which would take precedence.

    Raises:
        ValueError: There is such a file.
    """
    for folder in folders:
        if folder.resolve() == shipped:
            continue
        for path in sorted(folder.rglob("*.yaml")):
            if (shipped / path.relative_to(folder)).exists():
                raise ValueError(
                    f"{path} has the name of a shipped file, which would take precedence: rename it"
                )


def add_current_folder() -> None:
    """Let modules be imported from the current folder, which the installed command does not.

    It is done only for modules that the user has named: an optional package that is missing, or a
    plugin of Hydra, must not be found in a folder that comes from somebody else.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def as_config_dir(argv: Sequence[str]) -> list[str]:
    """Return a command line with `--config-dir` in place of `hydra.searchpath=[…]`.

    Raises:
        ValueError: The value is no list, or one of its places does not exist.
    """
    if not any(word.startswith(f"{KEY}=") for word in argv):
        return list(argv)
    words: list[str] = []
    folders: list[str] = []
    given = iter(argv)
    for word in given:
        option, _, value = word.partition("=")
        if option == KEY:
            folders += _folders(word)
        elif option in OPTIONS:
            folders.append(value or next(given, ""))
        else:
            words.append(word)
    return [*words, "--config-dir", os.pathsep.join(folders)] if folders else words


def _folders(word: str) -> list[str]:
    """Return the folders of an override `hydra.searchpath=[…]`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from metarun.config.overrides import read_words

    places = read_words(OverridesParser.create(), [word])[0].value()
    if not isinstance(places, list):
        raise ValueError(f"{word}: expected a list, such as {KEY}=[file://my_conf]")
    return [folder for place in places for folder in _folder(str(place))]


def _folder(place: str) -> list[str]:
    """Return the folder of a place, or the folders of a package."""
    scheme, found, path = place.partition("://")
    if not found or scheme == "file":
        folder = path if found else place
        if Path(folder).is_dir():
            return [folder]
        raise ValueError(f"{KEY}: there is no folder {folder}; check the path")
    if scheme != "pkg":
        raise ValueError(f"{KEY}: cannot read {place}: expected file://FOLDER or pkg://PACKAGE")
    add_current_folder()
    try:
        spec = find_spec(path)
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise ValueError(
            f"{KEY}: there is no package {path} in the current folder or among the installed ones"
        )
    return folders
