"""Weights & Biases: offline in the run's folder, to be sent by `wandb sync`; online if asked."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from metarun.trackers.base import Start, State, Tracker, Values, pictures, require

_BLOCK, _HEADER, _PREFIX = 32768, 7, 7
_SECONDS_TO_BEGIN, _SECONDS_TO_END = 30.0, 60.0


class WandB(Tracker):
    """A run of W&B under the same id after every resume.

    Every line is a row of its own with the step as a value beside it, `step`, since W&B's own
    counter never goes back. No option takes a key: W&B has its own login.

    Args:
        mode: `offline` writes files and touches no network.
        project, entity, group: Where W&B files the run.
        tags: Words that W&B can filter by.

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
        """Begin a file of the run; what its earlier files hold is read from them.

        A kill costs the last seconds of a file, whose end is not known otherwise.
        """
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        held: dict[str, int] = {}
        for row in rows(start.folder):
            self._rows += 1
            held |= {name: int(row["step"]) for name in row if "step" in row and name != "step"}
        if self.mode == "online" and not wandb.login(prompt=False):
            raise ValueError("W&B knows no key: run `wandb login`, or set WANDB_API_KEY")
        self._run = wandb.init(
            id=start.id,
            name=start.folder.name,
            project=self.project,
            entity=self.entity,
            group=self.group,
            tags=self.tags,
            mode=self.mode,
            # Its own process may have been started in another folder.
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
        self._log({"step": step, **values})

    def figures(self, step: int, paths: Sequence[Path]) -> None:
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
        with _service():
            self._run.summary.update({**values, "results": dict(results), "step": step})

    def close(self, state: State) -> None:
        with _service():
            self._run.finish(exit_code=0 if state == "finished" else 1)

    def _log(self, row: Mapping[str, Any]) -> None:
        # Numbered through all files of the run, which are put together by these numbers.
        with _service():
            self._run.log(row, step=self._rows, commit=True)
        self._rows += 1


@contextmanager
def _service() -> Iterator[None]:
    """Talk to W&B's own process; where that has died, end what would fail when we exit."""
    try:
        yield
    except ConnectionError:
        import wandb

        with suppress(Exception):
            wandb.teardown()
        raise


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows in the files that W&B has written for a run, in their order.

    The package cannot read its own files, which are logs as LevelDB has them: after 7 bytes, blocks
    of 32 KiB with records of checksum, length, type and data; types 1 to 4 are whole, first, middle
    and last.
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
