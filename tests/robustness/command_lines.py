"""Gives `metarun` command lines with one to three hostile words.

    python -m tests.robustness.command_lines --number 300 --seed 0

A case takes a tiny run of `tests/golden.yaml`, reads its configuration from `--cfg job`, and adds
words with mutated keys or values. Nothing may hang or end with a traceback, exit code 2 may write
nothing, and exit code 0 is wrong where a word is nonsense: its type is not that of the value it
replaces, a number is not finite, or a count is negative.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.robustness.forked import Answer, Case, draw_of, metarun, report

TINY = ["train.steps=2", "eval.episodes=2", "eval.val_episodes=2", "graph=none"]

_NOT_MUTATED = ("resume", "test", "published", "logger", "data.root")
"""Keys that name runs and files of the user, or that may hold anything."""


class Word(NamedTuple):
    """A hostile word, and whether it cannot mean anything."""

    text: str
    nonsense: bool


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if name in _NOT_MUTATED:
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{name}.")
        elif not str(key).startswith("_"):
            yield name, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def wrong_type(key: str, value: Any, draw: random.Random) -> Word:
    words = ["[1,[2]]", "{a:1}", "{a:{b:[1,{c:null}]}}", "abc", "true", "3.5", "''", "null"]
    word = draw.choice(words)
    other = yaml.safe_load(word.replace(":", ": "))
    if value is None or isinstance(value, str | list):
        # Its type is not known from one value, and a text may look like anything.
        return Word(f"{key}={word}", False)
    number_for_number = _is_number(value) and _is_number(other) and isinstance(value, float)
    unknown = other is None or number_for_number or type(other) is type(value)
    # A rate may be a list or a word as well as a number.
    unknown |= isinstance(value, float) and isinstance(other, list | str)
    return Word(f"{key}={word}", not unknown)


def huge(key: str, value: Any, draw: random.Random) -> Word:
    digits = draw.choice([10, 19, 30, 400, 5000])
    return Word(f"{key}={draw.choice(['', '-'])}{'9' * digits}", isinstance(value, bool))


def negative(key: str, value: Any, draw: random.Random) -> Word:
    count = isinstance(value, int)
    return Word(f"{key}={draw.choice(['-1', '-7', '-2147483649'])}", count)


def not_finite(key: str, value: Any, draw: random.Random) -> Word:
    word = draw.choice(["nan", "inf", "-inf", "1e999"])
    return Word(f"{key}={word}", _is_number(value) or isinstance(value, bool))


def strange_text(key: str, value: Any, draw: random.Random) -> Word:
    texts = [
        "５",
        "٣",
        "オムニ",
        "\ud800",
        "\u202e1",
        "1\0",
        "\0",
        "é" * 300,
        "\x1b[31m",
        "a\nb",
        "'",
        '"',
    ]
    texts += [
        "[",
        "{",
        "$",
        "${",
        "\\",
        "a,b",
        "1,2",
        "range(3)",
        "glob(*)",
        "\u00a01",
        "1_0",
        "0x10",
    ]
    word = draw.choice(texts)
    return Word(f"{key}={word}", _is_number(value) and word in texts[:9])


def interpolation(key: str, value: Any, draw: random.Random) -> Word:
    inner = draw.choice(
        [key, "nothing", "oc.env:HOME", "oc.env:NOTHING", "algo", "a.b.c", "", "now:%Y"]
    )
    inner = draw.choice([inner, inner, "${" + inner + "}"])
    return Word(f"{key}=${{{inner}}}", _is_number(value) and not inner.startswith("now"))


def deleted(key: str, _: Any, draw: random.Random) -> Word:
    return Word(draw.choice([f"~{key}", f"~{key}=1", f"~{key.partition('.')[0]}"]), False)


def misspelt(key: str, value: Any, draw: random.Random) -> Word:
    at = draw.randrange(len(key))
    name = draw.choice(
        [key[:at] + key[at + 1 :], key[:at] + "q" + key[at:], key + ".x", key.upper()]
    )
    return Word(
        f"{draw.choice(['', '+', '++'])}{name}={value}", name.lower() != key or name == key + ".x"
    )


def duplicated(key: str, value: Any, draw: random.Random) -> Word:
    return Word(f"{key}={draw.choice(['=', '==1', f'{value}={value}', ' ', ''])}", False)


def without_value(key: str, _: Any, draw: random.Random) -> Word:
    return Word(draw.choice([key, f"={key}", "=", "", " ", "--", f"-{key}", f"--{key}=1"]), False)


MUTATIONS = (
    wrong_type, huge, negative, not_finite, strange_text, interpolation, deleted, misspelt,
    duplicated, without_value,
)  # fmt: skip


@cache
def _configuration(words: tuple[str, ...], folder: Path) -> dict[str, Any]:
    answer = metarun([*words, "--cfg", "job", "--resolve"], folder)
    assert answer.code == 0, answer.err
    return dict(_leaves(yaml.safe_load(answer.out)))


def try_lines(indices: Sequence[int], seed: int, folder: Path) -> Iterator[Case]:
    """Yield a case for each index."""
    from tests.golden import RUNS, words_of

    for index in indices:
        draw = draw_of(seed, index)
        name = draw.choice(sorted(RUNS))
        base = [*words_of(name), *TINY]
        place = folder / str(index)
        place.mkdir()
        keys = _configuration(tuple(base), folder)
        hostile = []
        for _ in range(draw.choice([1, 1, 2, 3])):
            key = draw.choice(sorted(keys))
            hostile.append(draw.choice(MUTATIONS)(key, keys[key], draw))
        answer = metarun([*base, *(word.text for word in hostile)], place)
        what = f"{name} {[word.text[:80] for word in hostile]}"
        yield what, _fault(answer, hostile, place), answer.code


def _fault(answer: Answer, hostile: list[Word], place: Path) -> str | None:
    # `debug=true` asks for the traceback of what is wrong.
    asked = any(word.text.lower() == "debug=true" for word in hostile)
    if (fault := answer.fault()) and not (asked and fault.startswith("a traceback: ValueError")):
        return fault
    if answer.code == 2 and any(place.iterdir()):
        return f"exit code 2 has written {[p.name for p in place.iterdir()]}"
    last = {word.text.partition("=")[0]: word for word in hostile}
    if answer.code == 0 and any(word.nonsense for word in last.values()):
        return "exit code 0"
    return None


if __name__ == "__main__":
    sys.exit(report("command_lines", try_lines))
