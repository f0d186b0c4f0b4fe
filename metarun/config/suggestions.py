"""What was probably meant by a word that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(word: str, known: Iterable[str]) -> str:
    """A question after the nearest spelling, or nothing where nothing is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f": did you mean {found[0]}?" if found else ""


def unknown_key(key: str, known: Sequence[str]) -> ValueError:
    """The error for a key that does not exist, with the one that was probably meant."""
    leaf = key.rpartition(".")[2]
    same_leaf = [other for other in known if other.rpartition(".")[2] == leaf]
    hint = f": did you mean {' or '.join(same_leaf[:3])}?" if same_leaf else ""
    # A key is never meant as the node that it is in.
    others = [other for other in known if not key.startswith(f"{other}.")]
    if not same_leaf and others:
        likeness, _, best = max((*_likeness(key, other), other) for other in others)
        hint = f": did you mean {best}?" if likeness > 0.6 else ""
    return ValueError(f"there is no key {key}{hint or ' (`metarun --cfg job` lists them)'}")


def _likeness(key: str, other: str) -> tuple[float, float]:
    """Of two dotted keys, by their last words or as a whole, and as a whole; in [0, 1]."""
    whole = difflib.SequenceMatcher(None, key, other).ratio()
    last = difflib.SequenceMatcher(None, key.rpartition(".")[2], other.rpartition(".")[2]).ratio()
    return max(whole, last), whole
