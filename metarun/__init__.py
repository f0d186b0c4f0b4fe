"""Meta-learning experiments: run them with `metarun`, use the trained learner with `load`.

The first use of `load` imports torch, so that the command line starts without delay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metarun.inference.learner import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from metarun.inference.learner import load

        return load
    raise AttributeError(f"module 'metarun' has no attribute {name!r}")
