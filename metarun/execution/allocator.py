"""Settings of the C library's memory allocator, which have an effect only on Linux with glibc."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3


def keep_large_blocks() -> None:
    """Make the process keep the memory of freed large tensors instead of returning it.

    By default glibc maps and unmaps every block of some MiB separately. The resulting page faults
    cost a quarter of a convolutional meta-step on a CPU.
    """
    _call("mallopt", _M_MMAP_THRESHOLD, 1 << 30)
    _call("mallopt", _M_TRIM_THRESHOLD, (1 << 31) - 1)
    _call("mallopt", _M_TOP_PAD, 1 << 28)


def return_blocks() -> None:
    """Make the process return the memory of each freed tensor of a page or more at once.

    Its memory is then that in use, without gaps between tensors. It is slower.
    """
    _call("mallopt", _M_MMAP_THRESHOLD, 4096)


def trim() -> None:
    """Return all free memory to the system."""
    _call("malloc_trim", 0)


def _call(name: str, *numbers: int) -> None:
    """Call a function of the C library, if it has it."""
    if sys.platform.startswith("linux"):
        function = getattr(ctypes.CDLL(None), name, None)
        if function is not None:
            function(*numbers)
