"""Errors that end a run early, as its status and one line that says how to continue."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch

from metarun.algorithms.outer_optimizer import NonFiniteError
from metarun.core import distributed
from metarun.core.console import FILE_ONLY
from metarun.core.distributed import ProcessLost
from metarun.core.errors import Interrupted, OutOfTime, RunError, is_full
from metarun.core.files import full_disk
from metarun.core.memory import shortage
from metarun.runs.folder import Run, RunFolder
from metarun.training.signals import OutOfTimeError, Signals, StopRequestedError

_log = logging.getLogger(__name__)


class Standing(Protocol):
    """The progress of a run.

    Attributes:
        step: Number of updates done.
        saved: Step of the last checkpoint; None before the first.
    """

    step: int
    saved: int | None


@contextmanager
def outcome(run: Run, signals: Signals, at: Standing) -> Iterator[None]:
    """Write the status of a run if the block ends early, and raise an error of one line.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP was received.
        RunError: The user can fix the cause: a value is not finite, the disk or the memory is
            full, or another process has ended.
        OutOfTime: Training has taken `train.max_minutes`.
    """
    try:
        yield
    except (StopRequestedError, KeyboardInterrupt) as stop:
        signum = signals.signum or int(signal.SIGINT)
        saved = _in_folder(run, at) if isinstance(stop, KeyboardInterrupt) else at.saved
        run.set_status("interrupted", step=saved, signal=signum)
        kept = "nothing is saved" if saved is None else f"saved at step {saved}"
        text = f"{kept}; `metarun resume={run.path}` continues"
        _log.info(text, extra=FILE_ONLY)
        raise Interrupted(signum, text) from None
    except OutOfTimeError as stop:
        over = f"train.max_minutes={stop.minutes:g} is over: saved at step {at.saved}"
        text = f"{over}; `metarun resume={run.path}` continues"
        run.set_status("interrupted", step=at.saved, why=text)
        _log.info(text, extra=FILE_ONLY)
        raise OutOfTime(text) from None
    except ValueError as error:
        _fail(run, at, str(error))
        raise
    except Exception as error:
        advice = _advice(error, run)
        if advice is None:
            _fail(run, at, f"{type(error).__name__}: {error}")
            raise
        what, remedy = advice
        kept = "nothing is saved" if at.saved is None else f"step {at.saved} is saved"
        text = f"step {at.step}: {what}; {kept}: {remedy}"
        _fail(run, at, text)
        raise _known_to_processes(RunError(text), error, run) from error


def _in_folder(run: Run, at: Standing) -> int | None:
    """Return the step of the checkpoint in the folder.

    It is newer than `at.saved` if a signal came between the writing and the note of it.
    """
    with suppress(OSError, ValueError):
        checkpoint = run.load_last()
        return at.saved if checkpoint is None else int(checkpoint["step"])
    return at.saved


def _advice(error: Exception, run: Run) -> tuple[str, str] | None:
    """Return the cause and the remedy of an error that a user can fix; None for others."""
    go_on = f"`metarun resume={run.path}`"
    if isinstance(error, ProcessLost):
        return (
            "another process of the run is gone (killed, or out of memory)",
            f"{go_on} continues",
        )
    if isinstance(error, NonFiniteError):
        known = error.clip_norm
        clip = "optim.clip_norm=10" if known is None else f"an optim.clip_norm below {known:g}"
        return str(error), f"start again with a lower optim.lr or algo.inner_lr, or with {clip}"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "out of GPU memory",
            "set tasks_per_chunk to fewer tasks, or start again with a lower train.tasks_per_step",
        )
    if (short := shortage(error)) is not None:
        return short, "start again with smaller sizes (train.tasks_per_step, way, shot, query)"
    if is_full(error):
        what, remedy = full_disk(run.path)
        return what, f"{remedy} and run {go_on}"
    return None


def _known_to_processes(error: RunError, cause: Exception, run: Run) -> Exception:
    """Return the error, marked if every process has it: then only the main process reports it."""
    if isinstance(cause, NonFiniteError):
        # Gradients are averaged, so every process has the error.
        return distributed.mark_reported(error)
    if not isinstance(cause, ProcessLost):
        return error
    # If the main process was killed, the next one reports the error.
    killed = False
    if distributed.rank() == 1:
        with suppress(OSError, ValueError):
            killed = RunFolder(run.path).status().get("state") == "running"
    return error if killed else distributed.mark_reported(error)


def _fail(run: Run, at: Standing, why: str) -> None:
    _log.info("failed: %s", why, extra=FILE_ONLY, exc_info=True)
    try:
        run.set_status("failed", step=at.saved, why=why)
    except OSError as error:
        _log.warning("%s/status.json cannot be written: %s", run.path, error)
