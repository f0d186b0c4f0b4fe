"""Tracker for TensorBoard, with event files in the run's folder.

`tensorboard --logdir outputs` shows all runs.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metarun.core.files import inner_folder, open_inside
from metarun.core.nested import flat
from metarun.trackers.base import Start, State, Tracker, Values, pictures, require


class TensorBoard(Tracker):
    """Event files in `tensorboard/`: scalars, images, the configuration and its hyperparameters.

    Every record is written synchronously. The library's own writer uses a thread, which hangs on a
    full disk and loses its queue at a kill.
    """

    def __init__(self) -> None:
        require("tensorboard", "tensorboard")
        self.notes: Mapping[str, Any] = {}
        self._file = Path()

    def begin(self, start: Start) -> Mapping[str, int]:
        """Open a new file, which invalidates the records of earlier files from `start.step` on."""
        # If TensorFlow is installed, torch imports it, and it prints information on the CPU.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from torch.utils.tensorboard.summary import hparams, text

        folder = inner_folder(start.folder / "tensorboard")
        earlier = list(folder.glob("events.out.tfevents.*"))
        # Readers sort files by name.
        stamp = max([int(time.time()), *(int(path.name.split(".")[3]) + 1 for path in earlier)])
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = folder / name
        self._write(file_version="brain.Event:2")
        held: dict[str, int] = {}
        if earlier:
            self._write(start.step, session_log=SessionLog(status=SessionLog.START))
            for step, values in start.lines:
                held |= dict.fromkeys(values, step) if step < start.step else {}
        self._write(start.step, summary=text("config", _as_text(flat(start.config))))
        for summary in hparams(_hyperparameters(start.config), {start.metric: 0.0}):
            self._write(start.step, summary=summary)
        return held

    def metrics(self, step: int, values: Values) -> None:
        """Write metrics as scalars."""
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._write(step, summary=scalar(name, value))

    def figures(self, step: int, paths: Sequence[Path]) -> None:
        """Write figures that are raster images."""
        from torch.utils.tensorboard.summary import image

        for path in pictures(paths):
            pixels = np.asarray(Image.open(path).convert("RGB"))
            self._write(
                step, summary=image(f"figures/{path.stem}", pixels, rescale=1, dataformats="HWC")
            )

    def finish(self, step: int, values: Values, results: Mapping[str, Any]) -> None:
        """Write the final values as scalars and the results as text."""
        from torch.utils.tensorboard.summary import text

        self.metrics(step, values)
        self._write(step, summary=text("results", _as_text(flat(results))))

    def close(self, state: State) -> None:
        """Do nothing: no file is open, and TensorBoard has no status of a run."""

    def _write(self, step: int = 0, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        event = Event(wall_time=time.time(), step=step, **content)
        with open_inside(self._file, "ab") as file:
            RecordWriter(file).write(event.SerializeToString())


def _as_text(values: Mapping[str, Any]) -> str:
    """Return a Markdown table of keys and values."""
    lines = [f"| {key} | {str(value).replace('|', '&#124;')} |" for key, value in values.items()]
    return "\n".join(["| key | value |", "|---|---|", *lines])


def _hyperparameters(config: Mapping[str, Any]) -> dict[str, bool | str | float]:
    """Return the values for the page of hyperparameters: numbers, strings, lists as strings."""
    found = {key: value for key, value in flat(config).items() if value is not None}
    plain = (bool, int, float, str)
    return {key: value if isinstance(value, plain) else str(value) for key, value in found.items()}
