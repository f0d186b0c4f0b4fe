"""Meta-learning experiments: run them with `metarun` or `run`, use the learner with `load`.

The first use of a function imports torch, so that the command line starts without delay.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metarun.inference.learner import load as load
    from metarun.jobs.from_python import episodes as episodes
    from metarun.jobs.from_python import run as run

__version__ = "0.1.0"
__all__ = ["__version__", "episodes", "load", "run"]

_HOMES = {
    "load": "metarun.inference.learner",
    "run": "metarun.jobs.from_python",
    "episodes": "metarun.jobs.from_python",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'metarun' has no attribute {name!r}")
