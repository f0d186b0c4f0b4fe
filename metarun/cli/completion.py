"""Tab completion: the words that may replace the last one of a command line.

The shell function comes from Hydra (`metarun --hydra-help`); its question `-sc query=SHELL` is
answered here, for subcommands, too. A line that cannot be completed has no answer and no error.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from metarun.cli.parser import PARSERS, Parser, application


def answer(shell: str) -> str:
    """Return the completions of the line in `$COMP_LINE`, as the shell expects them."""
    line = os.environ.get("COMP_LINE", "")
    command, *words = line.split() or [""]
    if Path(command).name.startswith("python") and "metarun" in words:
        words = words[words.index("metarun") + 1 :]
    found = completions(words if words and not line.endswith(" ") else [*words, ""])
    return ("\n" if shell == "fish" else " ").join(found)


def completions(words: Sequence[str]) -> list[str]:
    """Return what may replace the last word, sorted.

    Args:
        words: The words behind `metarun`; the last one may be empty.
    """
    *before, word = words
    if before and before[0] in PARSERS:
        found = _offers(PARSERS[before[0]](), before[1:], word)
    else:
        found = [*_offers(application(), before, word), *([] if before else PARSERS)]
    return sorted({offer for offer in found if offer.startswith(word)})


def _offers(parser: Parser, before: Sequence[str], word: str) -> list[str]:
    option, equals, value = word.partition("=")
    action = parser.find(option) if equals and word.startswith("-") else None
    if action is not None:
        return [f"{option}={offer}" for offer in _values(parser, action, before, value)]
    action = _expected(parser, before)
    if action is None and word.startswith("-"):
        return parser.options()
    action = action or _positional(parser, before)
    return [] if action is None else list(_values(parser, action, before, word))


def _values(
    parser: Parser, action: argparse.Action, before: Sequence[str], word: str
) -> Iterable[str]:
    if action.choices is not None:
        return map(str, action.choices)
    offers = parser.candidates.get(action.dest)
    # Half a command line may fail in any way, and the next word may mend it.
    try:
        return [] if offers is None else offers(word, before)
    except Exception:
        return []


def _expected(parser: Parser, before: Sequence[str]) -> argparse.Action | None:
    """Return the option that the next word is a value of."""
    options = [place for place, word in enumerate(before) if word.startswith("-")]
    action = parser.find(before[options[-1]]) if options else None
    if action is None or action.nargs == 0:
        return None
    given = len(before) - options[-1] - 1
    return action if action.nargs in ("*", "+") or given == 0 else None


def _positional(parser: Parser, before: Sequence[str]) -> argparse.Action | None:
    """Return the positional argument that the next word belongs to."""
    values = {second for first, second in pairwise(before) if _expected(parser, [first])}
    given = sum(not word.startswith("-") and word not in values for word in before)
    for action in parser.positionals():
        if action.nargs in ("*", "+") or given == 0:
            return action
        given -= 1
    return None
