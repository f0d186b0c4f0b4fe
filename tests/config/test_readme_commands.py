"""The commands of every README, as a reader would type them: each composes, or is read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from metarun.cli.main import SUBCOMMANDS
from metarun.config.composition import Composer, composer

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for folder in (ROOT, ROOT / "conf", ROOT / "metarun", ROOT / "tests")
    for path in (folder.glob("*.md") if folder == ROOT else folder.rglob("*.md"))
)
_BLOCK = re.compile(r"^```(?:bash|)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(metarun [^`]+)`")
_PLACEHOLDER = re.compile(r"…|\.\.\.|\b[A-Z]{3,}\b|outputs/|photos|examples|my_|=mine|\$|PATH")
_SEEDS = re.compile(r"^(seed=\d+),[\d,]+$")


def commands(path: Path) -> Iterator[str]:
    """The command lines that begin with `metarun`, in code blocks and in the text."""
    text = path.read_text(encoding="utf-8")
    for block in _BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith("metarun "):
                yield " ".join(line.split(" #")[0].split())
    for inline in _INLINE.findall(text):
        yield " ".join(inline.split())


TYPED = sorted({c for path in FILES for c in commands(path) if not _PLACEHOLDER.search(c)})


@pytest.fixture(scope="module")
def compose() -> Iterator[Composer]:
    with composer() as made:
        yield made


def test_the_readmes_have_commands() -> None:
    assert len(TYPED) > 60


@pytest.mark.parametrize("command", TYPED)
def test_a_command_of_a_readme_composes(command: str, compose: Composer) -> None:
    # One seed stands for several, which are composed alike.
    words = [_SEEDS.sub(r"\1", word) for word in shlex.split(command)[1:]]
    if words and words[0] == "compare":
        words = _compared(words[1:])
        assert compose.jobs(words, sweep=True)
        return
    if not words or words[0] in (*SUBCOMMANDS, "help", "version") or words[0].startswith("--"):
        return  # read by argparse; the tests of cli/ type them
    if "--cfg" in words:
        words = words[: words.index("--cfg")]
    words = [word for word in words if word not in ("-m", "--multirun")]
    assert compose.jobs(words, "-m" in command.split() or compose.is_sweep(words, False))


def _compared(words: list[str]) -> list[str]:
    """The words that `compare` composes: one algorithm stands for all where none is named."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip or word == "--table":
            skip = False
        elif word in ("--against", "--dir", "--config-dir"):
            skip = True
        else:
            kept.append(word)
    if not any(word.startswith("algo=") for word in kept):
        stream = any(word.startswith("data=stream") for word in kept)
        kept.insert(0, "algo=online" if stream else "algo=nearest")
    return kept
