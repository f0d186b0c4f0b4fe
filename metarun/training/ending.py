"""When training ends or pauses before its last step: patience, a rehearsal, a limit of time."""

from __future__ import annotations

import time

from metarun.core import distributed
from metarun.core.console import duration
from metarun.core.settings import TrainSettings
from metarun.core.words import number_of
from metarun.training.run_state import RunState
from metarun.training.signals import OutOfTimeError


def has_ended(settings: TrainSettings, state: RunState) -> bool:
    """Return whether no further update follows; all processes call it together."""
    return state.step >= settings.steps or early_end(settings, state) is not None


def early_end(settings: TrainSettings, state: RunState) -> str | None:
    """Return why training ends before its last step; None if it goes on.

    It depends on the state alone, so that a run that was killed ends at the same step.
    """
    if settings.patience is not None and state.validated > 0:
        last = 0 if state.best is None else state.best["step"]
        if state.validated - last >= settings.patience * settings.eval_every:
            return f"no better on meta-val for {number_of(settings.patience, 'evaluation')}"
    if settings.rehearse is not None:
        seconds = state.train_seconds + state.window_seconds
        if distributed.maximum(int(seconds >= settings.rehearse)):
            return f"rehearsed for {duration(settings.rehearse)}"
    return None


def check_time(settings: TrainSettings, began: float) -> None:
    """Raise OutOfTimeError if `train.max_minutes` have passed in this process.

    Args:
        settings: Settings of meta-training.
        began: Time at which training began, of `time.perf_counter`.
    """
    if settings.max_minutes is None:
        return
    minutes = (time.perf_counter() - began) / 60.0
    if distributed.maximum(int(minutes >= settings.max_minutes)):
        raise OutOfTimeError(settings.max_minutes)
