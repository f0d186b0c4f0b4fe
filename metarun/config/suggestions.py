"""Suggestions for misspelled names and keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from metarun.core.words import first_of

_PART = 3
"""Letters from which on a word may be a part of a name."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `: did you mean X?` for the most similar known name, or an empty string.

    If none is similar, names that contain the word are listed. Upper and lower case are the same.
    """
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    if not found and len(word) >= _PART:
        found = [name for name in names if word.lower() in name]
    return f": did you mean {first_of([names[name] for name in found], 3)}?" if found else ""


def one_of(names: Sequence[str], more: str, most: int = 12) -> str:
    """Return the names in words, or the first ones and `more`, a command that lists all of them."""
    shown = names if len(names) <= most else names[:5]
    rest = f" or {len(names) - len(shown)} more (`{more}`)" if len(shown) < len(names) else ""
    return f"one of {', '.join(shown)}{rest}"


def unknown_key(key: str, known: Sequence[str]) -> ValueError:
    """Return the error for a key that does not exist, with the most similar known key."""
    leaf = key.rpartition(".")[2]
    same_leaf = [other for other in known if other.rpartition(".")[2] == leaf]
    hint = f": did you mean {' or '.join(same_leaf[:3])}?" if same_leaf else ""
    # The node that contains the key is never a useful suggestion.
    others = [other for other in known if not key.startswith(f"{other}.")]
    if not same_leaf and others:
        likeness, _, best = max((*_likeness(key, other), other) for other in others)
        hint = f": did you mean {best}?" if likeness > 0.6 else ""
    return ValueError(f"there is no key {key}{hint or '; `metarun --cfg job` lists all keys'}")


def _likeness(key: str, other: str) -> tuple[float, float]:
    """Return two similarities of dotted keys in [0, 1].

    The first is the larger of the similarities of the last components and of the whole keys;
    the second is that of the whole keys and decides between equal first ones.
    """
    whole = difflib.SequenceMatcher(None, key, other).ratio()
    last = difflib.SequenceMatcher(None, key.rpartition(".")[2], other.rpartition(".")[2]).ratio()
    return max(whole, last), whole
