"""Types the commands of a new user on a terminal and keeps what each shows.

    python tests/screens.py SCREENS [--columns 80 140] [--only WORDS]

Runs screens.txt in a new folder for each width, on a pseudo terminal. SCREENS gets a text file
for each width: each command, its exit code, the seconds until its first output and its end, and
its last screen. A traceback, or a line wider than the terminal, is named at the end.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import random
import re
import select
import shlex
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import NamedTuple

from PIL import Image

COMMANDS = Path(__file__).with_suffix(".txt")
_CODES = re.compile(r"(\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>()][A-Z0-9]?)|\r|\n)")
_LONGEST = 300.0
_LINES = 200


class Shown(NamedTuple):
    """What a command did: exit code, seconds to the first output and to the end, and its text."""

    code: int
    first: float
    whole: float
    text: str

    def faults(self, columns: int) -> list[str]:
        """Name what no command may show."""
        found = ["a traceback"] if "Traceback (most recent" in self.text else []
        wide = [line for line in self.text.splitlines() if len(line) > columns]
        # A path is not broken, so that it can be copied.
        if any(" " in line.strip() and "/" not in line for line in wide):
            found.append(f"a line of {max(map(len, wide))} columns")
        return found


def typed(command: str, folder: Path, columns: int) -> Shown:
    """Run a command on a terminal of its own."""
    words = shlex.split(command)
    began, first, parts = time.perf_counter(), 0.0, []
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        os.environ.pop("COLUMNS", None)
        os.execv(sys.executable, [sys.executable, "-m", *words])
    while time.perf_counter() - began < _LONGEST:
        ready, _, _ = select.select([terminal], [], [], 1.0)
        try:
            data = os.read(terminal, 65536) if ready else None
        except OSError:
            break
        if data == b"":
            break
        if data:
            first = first or time.perf_counter() - began
            parts.append(data)
    else:
        os.kill(process, 9)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.close(terminal)
    return Shown(code, first, time.perf_counter() - began, _screen(b"".join(parts)))


def _screen(data: bytes) -> str:
    """Return the last lines as a reader sees them, without bars and spinners that were erased."""
    lines, row, column = [""], 0, 0
    for part in _CODES.split(data.decode(errors="replace")):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part.startswith("\x1b"):
            row -= min(row, int(part[2:-1] or 1)) if part.endswith("A") else 0
            lines[row] = "" if part.endswith("K") else lines[row]
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return "\n".join([line.rstrip() for line in lines if line.strip()][-_LINES:])


def _photographs(folder: Path) -> None:
    """Write class folders of images, and one that cannot be read, for the words that need some."""
    draw = random.Random(0)
    for name in (f"{group}/class{c}" for group in ("photos", "examples") for c in range(12)):
        (folder / name).mkdir(parents=True)
        color = [draw.randrange(256) for _ in range(3)]
        for number in range(16 if name.startswith("photos") else 2):
            image = Image.effect_noise((48, 40), 60).convert("RGB")
            tinted = Image.blend(image, Image.new("RGB", image.size, tuple(color)), 0.5)
            tinted.save(folder / name / f"{number}.png")
    (folder / "examples/class0/broken.png").write_bytes(b"?")


def main() -> int:
    """Type all commands at each width; return 1 if something was wrong with one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("screens", type=Path, help="folder for what is shown")
    parser.add_argument("--columns", type=int, nargs="+", default=[80, 140], help="widths")
    parser.add_argument("--only", default="", help="commands that contain these words")
    args = parser.parse_args()
    commands = [line for line in COMMANDS.read_text().splitlines() if line.startswith("metarun")]
    args.screens.mkdir(parents=True, exist_ok=True)
    faults = []
    for columns in args.columns:
        with (
            tempfile.TemporaryDirectory() as folder,
            (args.screens / f"{columns}.txt").open("w") as file,
        ):
            _photographs(Path(folder))
            for command in commands:
                if args.only not in command:
                    continue
                shown = typed(command, Path(folder), columns)
                times = f"first {shown.first:.1f} s, whole {shown.whole:.1f} s"
                file.write(f"$ {command}\n[{shown.code}, {times}]\n{shown.text}\n\n")
                file.flush()
                faults += [f"{columns}: {command}: {fault}" for fault in shown.faults(columns)]
    print("\n".join(faults) or "no faults")
    return min(len(faults), 1)


if __name__ == "__main__":
    sys.exit(main())
