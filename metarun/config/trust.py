"""What a configuration may name as code: the gate before anything is imported or called.

A configuration that the user types, on the command line or in the files of `--config-dir`, is the
user's word. One that is stored in a run's folder may come from somebody else: what it names is
imported only if it is part of metarun or of an installed plug-in, or if the user has named it
(`trust=PACKAGE`, METARUN_TRUST, or a typed configuration that names the same). Either way a class
is checked before it is called.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import yaml

from metarun.config.catalogue import load
from metarun.config.naming import root_of
from metarun.config.search_path import add_current_folder, own_folders, plugins
from metarun.config.suggestions import nearest
from metarun.core.errors import one_line

WORD = "trust="
VARIABLE = "METARUN_TRUST"

_OURS = "metarun"
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")

_log = logging.getLogger(__name__)

_packages: ContextVar[tuple[str, ...]] = ContextVar("packages", default=())
"""What the user has named by `trust=`."""
_typed: ContextVar[frozenset[str] | None] = ContextVar("typed", default=None)
"""While a stored configuration is built, all texts that the user has typed; else None."""


# Whose word it is.


@contextmanager
def trusting(packages: Sequence[str]) -> Iterator[None]:
    """Trust packages, or single classes by their dotted names, in all stored configurations.

    Raises:
        ValueError: A word is no such name.
    """
    for package in packages:
        if not _DOTTED.fullmatch(package):
            raise ValueError(
                f"{WORD}{package}: expected names of packages, such as {WORD}my_package,other"
            )
    before = _packages.set((*_packages.get(), *packages))
    try:
        yield
    finally:
        _packages.reset(before)


def taken_from(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the packages of its words `trust=` and all other words."""
    packages = [p for w in argv if w.startswith(WORD) for p in w.removeprefix(WORD).split(",")]
    return packages, [word for word in argv if not word.startswith(WORD)]


@contextmanager
def stored(typed: Any = None, config_dir: str | None = None) -> Iterator[None]:
    """Declare that what is built inside comes from a stored configuration.

    Args:
        typed: Nested values that the user has typed; what they name is the user's word.
        config_dir: The user's folders of YAML files; what these name is, too.
    """
    before = _typed.set(frozenset(_texts_in([typed, *_contents(config_dir)])))
    try:
        yield
    finally:
        _typed.reset(before)


def _contents(config_dir: str | None) -> Iterator[Any]:
    for folder in own_folders(config_dir):
        for path in sorted(folder.rglob("*.yaml")):
            with suppress(yaml.YAMLError):  # It is explained when it is composed.
                yield load(path)


def _texts_in(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        node = list(node.values())
    if isinstance(node, list):
        for part in node:
            yield from _texts_in(part)
    elif isinstance(node, str):
        yield node


def _may_import(path: str) -> bool:
    typed = _typed.get()
    if typed is None or path in typed or path.startswith(f"{_OURS}."):
        return True
    packages = (*_packages.get(), *os.environ.get(VARIABLE, "").split(","), *plugins())
    return any(path.startswith(f"{package}.") for package in packages if package)


def check_stored_words(words: Sequence[str]) -> None:
    """Check the stored overrides of a run, before they are composed.

    Raises:
        ValueError: One of them is an option of Hydra, or has an interpolation.
    """
    for word in words:
        if "${" in word:
            raise ValueError(f"{word}: an interpolation that is stored in a run is not resolved")
        if root_of(word.strip()) == "hydra" or word.strip().startswith("-"):
            raise ValueError(f"{word}: an option of Hydra that is stored in a run is not applied")


def without_places(name: str, node: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a node of the configuration without what a stored one may not name outside its run.

    Args:
        name: Key of the node.
        node: `_target_` and the options.

    Raises:
        ValueError: A stored tracker would send results to a place that the user has not typed.
    """
    typed, kind = _typed.get(), name.partition(".")[0]
    if typed is None:
        return node
    if kind == "algo" and node.get("cache") not in (None, *typed):
        _log.warning("algo.cache=%s: the cache of a stored run is not used", node["cache"])
        return {**node, "cache": None}
    for key in ("uri", "mode") if kind == "logger" else ():
        value = node.get(key)
        if str(value) not in typed and _leads_outside(key, value):
            raise ValueError(
                f"{name}.{key}={value}: the run would send its results there: type the same again, "
                "or logger=[] to use no tracker"
            )
    return node


def _leads_outside(key: str, value: Any) -> bool:
    """Whether a tracker with this option connects to another machine, or makes files elsewhere."""
    if key == "mode":
        return bool(value == "online")
    _, database, path = str(value).partition("sqlite:///")
    return value not in (None, "env") and not (database and Path(path).exists())


# From a name to a class.


def locate(key: str, path: str, base: type | None = None) -> Callable[..., Any]:
    """Import a class by its dotted name, and check that it is of the kind of its key.

    Args:
        key: Key of the configuration: its first part is the kind (`algo`, `logger`, …).
        path: Dotted name.
        base: Class that it has to be derived from as well; None is any.

    Raises:
        ValueError: It does not exist, cannot be imported, is of another kind, or a stored
            configuration names it and the user has not named its package.
    """
    module, _, name = path.rpartition(".")
    if not module or not _DOTTED.fullmatch(path):
        raise ValueError(f"{key}={path}: expected the dotted name of a class, such as module.Class")
    if not _may_import(path):
        raise ValueError(
            f"{key}={path}: the run names code outside metarun, which is not imported: type "
            f"{WORD}{path.partition('.')[0]} if you trust it"
        )
    found: Callable[..., Any] | None = getattr(_imported(key, path, module), name, None)
    if not callable(found):
        near = nearest(name, dir(sys.modules[module]))
        raise ValueError(f"{key}={path}: {module} has no {name}{near}")
    otherwise, fits = _KINDS[key.partition(".")[0]]
    # What one of our modules has imported is no component.
    borrowed = path.startswith(f"{_OURS}.") and not is_ours(found)
    if borrowed or not fits(found) or (base is not None and not _below(found, base)):
        raise ValueError(f"{key}={path} {otherwise}")
    return found


def _imported(key: str, path: str, module: str) -> Any:
    if not module.startswith(f"{_OURS}."):
        add_current_folder()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module + ".").startswith(error.name + "."):
            raise ValueError(
                f"{key}={path}: there is no module {error.name} in the current folder or among "
                "the installed packages"
            ) from error
        raise ValueError(f"{key}={path}: importing {module} failed: {error}") from error
    # Importing a user's module may raise any exception.
    except Exception as error:
        summary = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{key}={path}: importing {module} failed: {summary}") from error


# The kinds of components.


def is_ours(found: Any) -> bool:
    """Return whether a class or function is part of metarun."""
    return str(getattr(found, "__module__", None)).startswith(f"{_OURS}.")


def _below(found: Any, base: type) -> bool:
    return inspect.isclass(found) and issubclass(found, base)


def _is_algorithm(found: Any) -> bool:
    from metarun.algorithms.base import Algorithm

    return _below(found, Algorithm)


def _is_data(found: Any) -> bool:
    methods = ("batch", "fingerprint")
    return _below(found, object) and all(callable(getattr(found, m, None)) for m in methods)


def _is_backbone(found: Any) -> bool:
    """Whether it is a module, or a function that says that it returns one.

    The word of a user who types the name of a function is enough.
    """
    from torch import nn

    from metarun.backbones.network import Network

    if not inspect.isfunction(found):
        return _below(found, Network if is_ours(found) else nn.Module)
    if is_ours(found):
        return False
    try:
        returned = typing.get_type_hints(found).get("return")
    except Exception:  # A hint may name anything.
        returned = None
    return _below(returned, nn.Module) or (returned is None and _typed.get() is None)


def _is_optimizer(found: Any) -> bool:
    from metarun.algorithms.outer_optimizer import OuterOptimizer

    return _below(found, OuterOptimizer)


def _is_tracker(found: Any) -> bool:
    from metarun.trackers.base import Tracker

    return _below(found, Tracker)


def _is_measure(found: Any) -> bool:
    from metarun.evaluation.measures import MeasureEntry

    return isinstance(found, MeasureEntry)


def _is_callback(found: Any) -> bool:
    from hydra.experimental.callback import Callback

    return _below(found, Callback)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "algo": ("is not a subclass of metarun's Algorithm", _is_algorithm),
    "data": ("is no data set: expected a class with the methods of EpisodeSource", _is_data),
    "backbone": (
        "is not a torch.nn.Module, nor a function that is annotated to return one",
        _is_backbone,
    ),
    "optim": ("is not a subclass of metarun's OuterOptimizer", _is_optimizer),
    "logger": ("is not a subclass of metarun's Tracker", _is_tracker),
    "eval": (
        "is no measure: expected a function with the decorator @measure of "
        "metarun.evaluation.measures",
        _is_measure,
    ),
    "hydra": ("is not a subclass of Hydra's Callback", _is_callback),
}
"""What is said of something that is no component of a kind, and the check of what it is."""
