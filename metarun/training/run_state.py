"""The state of a training loop: all that the next step depends on, besides the parameters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metarun.core import distributed
from metarun.core.types import Metrics, Record

_STORED = ("step", "validated", "best", "count", "train_seconds", "window_seconds")
"""Attributes that a checkpoint holds under their own names."""


@dataclass
class RunState:
    """The state of a run.

    Attributes:
        share: Number of tasks of this process in an update.
        step: Number of updates done.
        saved: Step of the last checkpoint; None before the first.
        validated: Step of the last evaluation on meta-val, 0 before the first; -1 if there are no
            training steps, so that one evaluation still takes place.
        best: Step, mean, interval and state of the best evaluation on meta-val.
        trained: State of the algorithm at the end of training; None until the best parameters
            replace it.
        test: State of the meta-test; None before it begins, or if it cannot be continued.
        sums, count: Sums of the metrics since the last line, on the device, and the number of
            updates.
        train_seconds, window_seconds: Seconds of all updates, and of those since the last line.
        began: Time at which the run began, minus the seconds before it resumed.
    """

    share: int
    step: int = 0
    saved: int | None = None
    validated: int = 0
    best: Record | None = None
    trained: Record | None = None
    test: Record | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    train_seconds: float = 0.0
    window_seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds of the run, without pauses."""
        return time.perf_counter() - self.began

    def add(self, metrics: Metrics) -> None:
        """Count an update and add its metrics."""
        for name, value in metrics.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1
        self.step += 1

    def means(self) -> dict[str, float]:
        """Return the means of the metrics since the last line.

        Only this call waits for the device.
        """
        self._average()
        values = torch.stack(list(self.sums.values())) / self.count
        return dict(zip(self.sums, values.tolist(), strict=True))

    def begin_line(self) -> None:
        """Start the next line of metrics."""
        self.train_seconds += self.window_seconds
        self.sums, self.count, self.window_seconds = {}, 0, 0.0

    def record(self, tasks_per_step: int) -> Record:
        """Return the entries of the results: updates, and the time that they took."""
        return {
            "steps": self.step,
            "tasks_per_step": tasks_per_step,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "tasks_per_second": self.step * tasks_per_step / max(self.train_seconds, 1e-9),
        }

    def state_dict(self) -> Record:
        """Return the entries of a checkpoint; all processes call it together."""
        self._average()
        return {
            **{name: getattr(self, name) for name in _STORED},
            "sums": self.sums,
            "seconds": self.seconds,
            "rollouts": self.test,
        }

    def load_state_dict(self, checkpoint: Mapping[str, object], device: torch.device) -> None:
        """Take over the entries of a checkpoint, as `state_dict` returns them.

        Args:
            checkpoint: The checkpoint.
            device: Device on which the algorithm computes.
        """
        stored: Record = dict(checkpoint)
        for name in _STORED:
            setattr(self, name, stored[name])
        self.saved = self.step
        self.sums = {name: value.to(device) for name, value in stored["sums"].items()}
        self.began -= stored["seconds"]
        self.test = stored.get("rollouts")

    def _average(self) -> None:
        """Average the sums of the metrics over the processes."""
        if self.sums:
            self.sums = distributed.mean(self.sums, self.share)
