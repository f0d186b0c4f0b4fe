"""Main memory: requests that cannot fit into this machine's, and errors of those that did not."""

from __future__ import annotations

import os
import re

from metarun.core.files import size_text
from metarun.core.once import warn_once

_PART = 4
"""A request for more than one part in so many may not fit: a gradient or an average takes several
times its data."""


def total() -> int | None:
    """Return the memory of this machine in bytes; None where the system does not tell."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(needed: int, what: str, remedy: str) -> None:
    """Refuse a request that needs more memory than this machine has; warn of one that may.

    Args:
        needed: Lower bound in bytes.
        what: What takes the memory, as the subject of a sentence in the plural.
        remedy: What to type instead.

    Raises:
        ValueError: The machine has less.
    """
    available = total()
    if available is not None and needed > available:
        raise ValueError(
            f"{what} take {size_text(needed)} or more, and this machine has "
            f"{size_text(available)}: {remedy}"
        )
    if available is not None and _PART * needed > available:
        warn_once(
            f"{what} take {size_text(needed)} or more of this machine's {size_text(available)}, "
            f"and computing with them several times as much: if memory runs out, {remedy}"
        )


def shortage(error: BaseException) -> str | None:
    """Return in words that memory of the CPU was refused; None for other errors."""
    asked = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", str(error))
    if asked:
        return f"out of memory: {size_text(int(asked[1]))} were asked for at once"
    return "out of memory" if isinstance(error, MemoryError) else None
