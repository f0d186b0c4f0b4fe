"""What is done once, however often it is asked for: warnings, and questions about a network."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import nn

Answer = TypeVar("Answer")

_log = logging.getLogger("metarun")


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, unless this process has logged the same text before."""
    _log.warning("%s", text)


def once_per_network(function: Callable[[nn.Module], Answer]) -> Callable[[nn.Module], Answer]:
    """Keep the results of a function of a network, whose answer never changes.

    A walk over the modules of a network takes as long as several operators of a small one.
    """
    known: WeakKeyDictionary[nn.Module, Answer] = WeakKeyDictionary()

    @functools.wraps(function)
    def answer(net: nn.Module) -> Answer:
        if net not in known:
            known[net] = function(net)
        return known[net]

    return answer
