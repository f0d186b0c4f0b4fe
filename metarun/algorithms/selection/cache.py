"""The cache of base-learner predictions on disk: arrays, since the folder may be anybody's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarun.algorithms.selection.portfolio import Study, study
from metarun.core.archives import read_arrays
from metarun.core.files import inner_folder, to_npz, write_atomically

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedStudy:
    """`portfolio.study`, whose results are kept in a folder, one file for each task.

    Attributes:
        folder: The folder; None keeps nothing.
    """

    folder: Path | None

    def __call__(self, **task: Any) -> Study:
        """Return the predictions on a task, from the folder if they are there."""
        if self.folder is None:
            return study(**task)
        from joblib import hash as digest

        path = inner_folder(self.folder) / f"{digest(task)}.npz"
        try:
            if path.exists():
                return Study(**read_arrays(path))
        except (ValueError, TypeError) as error:
            _log.warning("%s is computed again: %s", path.name, error)
        made = study(**task)
        write_atomically(path, to_npz(made._asdict()))
        return made
