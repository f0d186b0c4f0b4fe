"""Runs command lines under an audit hook: `python -P -m tests.robustness.watched < requests.json`.

A request has a `folder`, which is the current one, an `argv`, and `allowed`, the folders that may
be written. The answers are JSON as well: `code`, `text` (what was printed) and `events`, what
happened that may not.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn"}
CONNECTS = {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"}
OWN = {"git", "uname", "ldconfig", "fc-list", "system_profiler"}
"""Programs that metarun, Python and Matplotlib start to describe the machine."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """The audit hook, which records while a request runs."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.folder = Path()
        self.allowed: list[Path] = []
        self.active = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        self.active = False
        try:
            if self._is_bad(event, args):
                self.events.append(f"{event} {args[:2]!r}"[:300])
        finally:
            self.active = True

    def _is_bad(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "subprocess.Popen":
            return Path(next(iter(args[1]))).name not in OWN
        if event in STARTS or event in CONNECTS:
            return True
        if event == "exec":
            return Path(getattr(args[0], "co_filename", "")).is_relative_to(self.folder)
        if event == "open":
            path, _, flags = args
            return bool(flags & WRITES) and self._is_outside(path)
        return event in CHANGES and any(map(self._is_outside, args[: 1 + (event == "os.rename")]))

    def _is_outside(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        # A link itself may be replaced or removed; what it points at may not be written.
        real = Path(os.path.realpath(os.fsdecode(path)))
        return real != Path(os.devnull) and not any(map(real.is_relative_to, self.allowed))


def main() -> None:
    """Answer the requests on stdin."""
    import metarun
    from metarun.cli.main import main as command

    watch = Watch()
    sys.addaudithook(watch)
    answers = []
    for request in json.load(sys.stdin):
        os.chdir(request["folder"])
        watch.folder = Path(request["folder"])
        watch.allowed = [Path(path).resolve() for path in request["allowed"]]
        watch.events = []
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            watch.active = True
            try:
                if request["argv"][0] == "load":
                    metarun.load(request["argv"][1])
                    code = 0
                else:
                    code = command(request["argv"])
            except SystemExit as stop:
                code = int(stop.code or 0)
            except Exception as error:
                code = 1
                print(f"{type(error).__name__}: {error}")
            finally:
                watch.active = False
        answers.append({"code": code, "text": text.getvalue(), "events": watch.events})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
