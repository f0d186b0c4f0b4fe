"""`metarun bench`: measure speed and memory, print tables, and write files.

Arguments are checked before torch is imported. Files are written at the end, atomically. Ctrl-C
stops measuring and shows the results so far.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from metarun.bench.results import Curve, Result, record
from metarun.bench.workloads import (
    BASELINES,
    GROWTH,
    TF32,
    WORKLOADS,
    Variant,
    Workload,
    grows,
    known,
    select,
    variants,
)
from metarun.cli.parser import TO_GROW
from metarun.core.console import definitions, table_console
from metarun.core.errors import EXIT_INTERRUPTED, EXIT_OK, describe_error
from metarun.core.files import write_new

if TYPE_CHECKING:
    import argparse

    import torch

    from metarun.bench.suite import Suite

_TO_LEAK = "sinusoid"
_SUFFIXES = (".png", ".svg")
_WIDEST = 110


@dataclass
class _Report:
    """Results measured so far."""

    results: list[Result] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    leak: float | None = None
    interrupted: bool = False


def run(args: argparse.Namespace) -> int:
    """Run `metarun bench …` and return the exit code.

    Raises:
        ValueError: An argument is invalid; nothing has been measured.
    """
    if args.list:
        _list()
        return EXIT_OK
    if args.from_record is not None:
        return _draw_again(args)
    workloads = select(_words(args.workload))
    chosen = variants({o.name: _words([getattr(args, o.name)]) for o in _options()})
    against = _known("--against", args.against, list(BASELINES))
    growth = _known("--growth", args.growth, list(GROWTH)) or []
    grown = select(_words(args.workload) or [TO_GROW]) if growth else []
    _check(args, growth, grown)
    device = _device(args.device)
    return _measure(
        args, workloads, chosen, against, [(w, s) for w in grown for s in growth], device
    )


def _draw_again(args: argparse.Namespace) -> int:
    """Draw the figure of an earlier run; nothing is measured."""
    if args.figure is None:
        raise ValueError(f"--from {args.from_record}: type --figure FILE, which it draws")
    _check_figure(args.figure)
    record = _read(args.from_record)
    from metarun.bench.drawing import picture

    try:
        content = picture(record, args.figure.suffix.removeprefix("."))
    except (LookupError, TypeError, AttributeError):
        raise ValueError(
            f"--from {args.from_record}: expected a file that `metarun bench --json` has written"
        ) from None
    write_new(args.figure, content)
    return EXIT_OK


def _read(path: Path) -> Any:
    """Return the contents of a JSON file.

    Raises:
        ValueError: There is no such file, or it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--from {path}: {describe_error(error)}") from None


def _options() -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(Variant)


def _words(typed: Sequence[str]) -> list[str]:
    """Split arguments at commas; blanks have already been split by the shell."""
    return [word for part in typed for word in part.split(",") if word]


def _known(option: str, typed: str | None, allowed: Sequence[str]) -> list[str] | None:
    if typed is None:
        return None
    words = _words([typed])
    for word in words:
        known(option, word, allowed)
    return words


def _check(args: argparse.Namespace, growth: Sequence[str], grown: Sequence[Workload]) -> None:
    """Check numbers, sizes and output files.

    Raises:
        ValueError: One of them is invalid.
    """
    if not (args.seconds > 0 and math.isfinite(args.seconds)):
        raise ValueError(f"--seconds {args.seconds}: expected a positive number")
    if args.memory_steps < 0:
        raise ValueError(f"--memory-steps {args.memory_steps}: expected 0 or more")
    for size in growth:
        if not any(grows(workload, size) for workload in grown):
            names = ", ".join(workload.name for workload in grown)
            raise ValueError(
                f"--growth {size} does not apply to {names}: choose another --workload"
            )
    if "processes" in growth and args.device != "cpu":
        raise ValueError("--growth processes is measured on a CPU: use --device cpu")
    known("--tf32", args.tf32, TF32)
    _check_file("--json", args.json)
    _check_figure(args.figure)


def _check_figure(path: Path | None) -> None:
    _check_file("--figure", path)
    if path is not None and path.suffix not in _SUFFIXES:
        raise ValueError(f"--figure {path}: expected a file name ending in .svg or .png")


def _check_file(option: str, path: Path | None) -> None:
    if path is None:
        return
    if os.path.lexists(path):
        what = "is a folder" if path.is_dir() else "already exists"
        raise ValueError(f"{option} {path} {what}: choose a new file name")
    if not path.parent.is_dir():
        raise ValueError(
            f"{option} {path}: there is no folder {path.parent}: create it or choose another"
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path} cannot be written: choose a file in another folder")


def _device(word: str) -> torch.device:
    """Return the torch device with this name.

    Raises:
        ValueError: The name is invalid, or this machine has no such device.
    """
    import torch

    try:
        device = torch.device(word)
    except RuntimeError:
        raise ValueError(f"--device {word}: expected cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {word}: expected cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {word}: this machine has {torch.cuda.device_count()} GPUs, counted from "
            "cuda:0; use --device cpu"
        )
    return device


def _list() -> None:
    console = table_console()
    found = {w.name: f"{w.about} (slow)" if w.slow else w.about for w in WORKLOADS}
    for line in definitions(found, console.width):
        console.print(line, soft_wrap=True)
    console.print("slow workloads run only if --workload names them", style="dim")


def _measure(
    args: argparse.Namespace,
    workloads: Sequence[Workload],
    chosen: Sequence[Variant],
    against: Sequence[str] | None,
    growth: Sequence[tuple[Workload, str]],
    device: torch.device,
) -> int:
    from metarun.bench.measuring import set_tf32
    from metarun.bench.suite import Suite
    from metarun.execution.allocator import keep_large_blocks

    keep_large_blocks()
    set_tf32(args.tf32)
    console = Console(highlight=False)
    report = _Report()
    with console.status("…") as status:
        suite = Suite(
            chosen, against, args.seconds, device,
            with_memory=not args.no_memory, tell=lambda text: status.update(text),
        )  # fmt: skip
        try:
            for workload in workloads:
                report.results += suite.measure(workload)
            for workload, size in growth:
                if grows(workload, size):
                    report.curves += suite.grow(workload, size)
            if args.memory_steps and not args.no_memory:
                report.leak = suite.leak(select([_TO_LEAK])[0], args.memory_steps)
        except KeyboardInterrupt:
            report.interrupted = True
    _show(console, args, report, suite, device)
    _write(args, report, suite, device)
    if report.interrupted:
        print("interrupted: the results above are those measured so far", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_OK


def _show(
    console: Console, args: argparse.Namespace, report: _Report, suite: Suite, device: torch.device
) -> None:
    from metarun.bench import tables

    console.print(Text(tables.machine(_machine(device), suite.peaks)), soft_wrap=True)
    width = min(console.width, _WIDEST)
    if args.markdown and report.results:
        console.print(Text(tables.markdown(report.results)), soft_wrap=True)
    elif report.results:
        console.print(tables.terminal(report.results), width=width)
    for curves in _by_sweep(report.curves):
        console.print(tables.growth(curves), width=width)
    if report.leak is not None:
        console.print(
            f"memory growth: {report.leak:+.1f} MiB over {args.memory_steps} sinusoid steps"
        )
    for name, why in _missing():
        console.print(Text(f"not compared with {name}: {why}"), soft_wrap=True)


def _write(args: argparse.Namespace, report: _Report, suite: Suite, device: torch.device) -> None:
    if args.json is None and args.figure is None:
        return
    content = record(
        _machine(device),
        suite.peaks,
        report.results,
        report.curves,
        seconds=args.seconds,
        tf32=args.tf32 if device.type == "cuda" else None,
        memory_growth_mib=report.leak,
        memory_steps=args.memory_steps,
        without=dict(_missing()),
        interrupted=report.interrupted,
    )
    if args.json is not None:
        write_new(args.json, (json.dumps(content, indent=2) + "\n").encode())
    if args.figure is not None and (report.results or report.curves):
        from metarun.bench.drawing import picture

        write_new(args.figure, picture(content, args.figure.suffix.removeprefix(".")))


def _by_sweep(curves: Sequence[Curve]) -> Iterator[list[Curve]]:
    for key in dict.fromkeys((curve.workload, curve.size) for curve in curves):
        yield [curve for curve in curves if (curve.workload, curve.size) == key]


def _missing() -> list[tuple[str, str]]:
    """Return the baselines that cannot be measured, each with the reason."""
    from metarun.bench.baselines import why_missing

    found = [(name, why_missing(name)) for name in BASELINES]
    return [(name, why) for name, why in found if why is not None]


def _machine(device: torch.device) -> dict[str, Any]:
    from metarun.core.environment import describe

    return {
        **describe(str(device)),
        "processor": _processor(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """Return the model name of the CPU, or its architecture if the system has no name."""
    import platform

    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
