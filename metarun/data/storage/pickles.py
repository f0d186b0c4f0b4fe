"""Pickles of arrays from elsewhere, read without running any code in them."""

from __future__ import annotations

import pickle
from typing import IO, Any

import numpy as np


def read_pickle(file: IO[bytes], name: str) -> Any:
    """Read dictionaries, lists, numbers, strings and arrays.

    Args:
        file: Open file. Strings of Python 2 become bytes.
        name: Name of the file, for messages.

    Raises:
        ValueError: The file is damaged, or contains anything else.
    """
    try:
        return _ArrayUnpickler(file, encoding="bytes").load()
    except _RefusedError as error:
        raise ValueError(f"{name} would run {error}: it is not a pickle of images") from None
    except MemoryError:
        raise ValueError(f"{name} does not fit into memory, or is damaged") from None
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        ImportError,
        OverflowError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is not a complete pickle ({reason}): get it again") from None


class _RefusedError(Exception):
    """A pickle refers to an object that is not allowed in a file of arrays."""


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SCALAR = np.int64(0).__reduce__()[0]
_FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _RECONSTRUCT for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _SCALAR for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FROM_BUFFER for core in ("core", "_core")},
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of dictionaries, lists, numbers, strings and arrays, which runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None


def _encode(text: str, encoding: str) -> bytes:
    """Encode text as bytes: Python 3 pickles bytes for Python 2 as latin1 text."""
    if encoding != "latin1":
        raise _RefusedError(f"the codec {encoding}")
    return text.encode("latin1")
