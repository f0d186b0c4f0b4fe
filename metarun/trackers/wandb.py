"""Tracker for Weights & Biases.

By default it writes offline files to the run's folder, which `wandb sync` uploads.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from metarun.core.files import refuse_link
from metarun.trackers.base import Start, State, Tracker, Values, pictures, require

_BLOCK, _HEADER, _PREFIX = 32768, 7, 7
_SECONDS_TO_BEGIN, _SECONDS_TO_END = 30.0, 60.0


class WandB(Tracker):
    """Run of W&B, which keeps its id after every resume.

    Every line of metrics is a separate row with the step as the value `step`, because W&B's own
    counter cannot go back. There is no option for an API key: use W&B's login.

    Args:
        mode: `offline` writes files without network access; `online` uploads the run.
        project, entity, group: Project, entity and group of the run in W&B.
        tags: Tags for filtering in W&B.

    Raises:
        ValueError: W&B is not installed.
    """

    def __init__(
        self,
        *,
        mode: Literal["offline", "online"] = "offline",
        project: str = "metarun",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        require("wandb", "wandb")
        self.mode = mode
        self.project = project
        self.entity = entity
        self.group = group
        self.tags = list(tags)
        self.notes: Mapping[str, Any] = {}
        self._run: Any = None
        self._rows = 0

    def begin(self, start: Start) -> Mapping[str, int]:
        """Open a new file of the run, after reading the rows of its earlier files.

        A kill loses the last seconds of a file, so only reading it shows where it ends.
        """
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        refuse_link(start.folder / "wandb")
        settings = start.folder / "wandb" / "settings"
        if settings.exists():
            raise ValueError(f"{settings} could change where W&B sends the run: remove it")
        held: dict[str, int] = {}
        for row in rows(start.folder):
            self._rows += 1
            held |= {name: int(row["step"]) for name in row if "step" in row and name != "step"}
        if self.mode == "online" and not wandb.login(prompt=False):
            raise ValueError("W&B has no API key: run `wandb login`, or set WANDB_API_KEY")
        self._run = wandb.init(
            id=start.id,
            name=start.folder.name,
            project=self.project,
            entity=self.entity,
            group=self.group,
            tags=self.tags,
            mode=self.mode,
            # Absolute, because W&B's service process may run in another folder.
            dir=str(start.folder.resolve()),
            config=dict(start.config),
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                console="off",
                allow_val_change=True,
                init_timeout=_SECONDS_TO_BEGIN,
                finish_timeout=_SECONDS_TO_END,
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        return held

    def metrics(self, step: int, values: Values) -> None:
        """Log metrics as one row."""
        self._log({"step": step, **values})

    def figures(self, step: int, paths: Sequence[Path]) -> None:
        """Log raster images as images and save other figures as files."""
        import wandb

        shown = pictures(paths)
        if shown:
            images = {f"figures/{path.stem}": wandb.Image(str(path)) for path in shown}
            self._log({"step": step, **images})
        with _service():
            for path in paths:
                if path not in shown:
                    self._run.save(str(path), base_path=str(path.parent.parent), policy="now")

    def finish(self, step: int, values: Values, results: Mapping[str, Any]) -> None:
        """Write the final values and the results to the summary."""
        with _service():
            self._run.summary.update({**values, "results": dict(results), "step": step})

    def close(self, state: State) -> None:
        """Finish the run; its exit code is 0 for a finished run and 1 otherwise."""
        with _service():
            self._run.finish(exit_code=0 if state == "finished" else 1)

    def _log(self, row: Mapping[str, Any]) -> None:
        # W&B merges the files of a run by row number, so numbering continues across files.
        with _service():
            self._run.log(row, step=self._rows, commit=True)
        self._rows += 1


@contextmanager
def _service() -> Iterator[None]:
    """Call W&B's service process; if it has died, tear down handlers that would fail at exit."""
    try:
        yield
    except ConnectionError:
        import wandb

        with suppress(Exception):
            wandb.teardown()
        raise


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows in the files that W&B has written for a run, in order.

    The wandb package cannot read its own files. They are logs in LevelDB's format: after 7 bytes,
    blocks of 32 KiB with records of checksum, length, type and data. Types 1 to 4 are a whole
    record and the first, a middle and the last part of one.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    for path in sorted((folder / "wandb").glob("*run-*/run-*.wandb")):
        data, at, parts = path.read_bytes(), _HEADER, b""
        while at + _PREFIX <= len(data):
            left = _BLOCK - at % _BLOCK
            if left < _PREFIX:
                at += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, at)
            at += _PREFIX + length
            if kind == 0 or at > len(data):
                break
            parts += data[at - length : at]
            if kind in (1, 4):
                record = Record.FromString(parts)
                parts = b""
                if record.WhichOneof("record_type") == "history":
                    items = record.history.item
                    yield {
                        item.key or item.nested_key[0]: json.loads(item.value_json)
                        for item in items
                    }
