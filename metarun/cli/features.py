"""`metarun features`: write the features that a network computes for a data set."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from metarun.core.errors import EXIT_OK

_SUFFIX = ".npz"


def run(args: argparse.Namespace) -> int:
    """Run `metarun features [RUN] [KEY=VALUE …] --output F.npz` and return the exit code.

    Raises:
        ValueError: An argument is invalid; no file has been written.
    """
    runs = [word for word in args.words if "=" not in word]
    words = [word for word in args.words if "=" in word]
    if len(runs) > 1:
        raise ValueError(f"{runs[1]}: features are of one run, {runs[0]}: expected KEY=VALUE")
    if not args.words:
        raise ValueError("expected a run, or settings such as backbone=conv4 data=omniglot_small")
    _check_output(args.output)
    from metarun.jobs.features import write_features

    text = write_features(runs[0] if runs else None, words, args.output, args.config_dir)
    print(f"{args.output}: {text}")
    print(f"next: `metarun algo=protonet data=features data.file={args.output}`")
    return EXIT_OK


def _check_output(path: Path) -> None:
    if path.suffix.lower() != _SUFFIX:
        raise ValueError(f"--output {path}: expected a file {_SUFFIX}, such as features{_SUFFIX}")
    if os.path.lexists(path):
        raise ValueError(f"--output {path} already exists: choose a new file name")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}: create it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--output {path} cannot be written: choose a file in another folder")
