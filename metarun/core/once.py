"""Warnings that are said once, however often what they warn of is read or built."""

from __future__ import annotations

import functools
import logging

_log = logging.getLogger("metarun")


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, unless this process has logged the same text before."""
    _log.warning("%s", text)
