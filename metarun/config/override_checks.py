"""Checks of every override before anything is composed for a run.

Hydra alone reports a mistake in several lines, sometimes after it has created a folder, and
sometimes (`+key`) not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from metarun.config.configurations import Configurations
from metarun.config.overrides import has_key, leaves, text_of
from metarun.config.schema import NODES, SEVERAL, Config
from metarun.config.suggestions import nearest, unknown_key

_EXTRAS = {
    "joblib": "joblib",
    "ray": "ray",
    "submitit_local": "slurm",
    "submitit_slurm": "slurm",
    "optuna": "optuna",
}
"""Optional dependency (pip extra) that provides each launcher or sweeper."""

_FOLDER_OF_A_RUN = "hydra.sweep.subdir"
_FILES_OF_HYDRA = ("hydra.output_subdir", "hydra/job_logging", "hydra/hydra_logging")


class OverrideChecks:
    """Looks up the groups, choices and keys of overrides; errors suggest the most similar name."""

    def __init__(self, configurations: Configurations) -> None:
        self._known = configurations
        self._bases: dict[tuple[str, ...], Config] = {}

    def check(self, overrides: Sequence[str]) -> Config:
        """Check every group and key; return the configuration composed from the groups alone."""
        parsed = self._known.parse(overrides)
        for override in parsed:
            if override.key_or_group in _FILES_OF_HYDRA:
                raise ValueError(
                    f"{text_of(override)} cannot be changed: metarun writes a run's files and log"
                )
            if override.key_or_group == _FOLDER_OF_A_RUN:
                raise ValueError(
                    f"{text_of(override)} cannot be changed: metarun names each run's folder; type "
                    "hydra.sweep.dir=DIR to move the whole sweep"
                )
        groups = set(self._known.groups)
        in_groups = [o for o in parsed if o.key_or_group in groups]
        for override in in_groups:
            self._check_group(override)
        words = tuple(text_of(o) for o in in_groups)
        if words not in self._bases:
            self._bases[words] = structure(self._known.compose(words, RunMode.RUN))
        base = self._bases[words]
        known = [*leaves(base), *sorted(g for g in groups if not g.startswith("hydra"))]
        for override in parsed:
            if override not in in_groups:
                self._check_key(override, base, known)
        return base

    def _check_group(self, override: Override) -> None:
        group, value = override.key_or_group, override.value()
        if override.is_delete():
            if group in NODES:
                raise ValueError(f"~{group}: every run needs this group; type {group}=NAME")
            return
        if group in SEVERAL and isinstance(value, list):
            for word in value:
                self._check_choice(group, word)
            return
        if value is None:
            none = f"type {group}=[] to use none" if group in SEVERAL else f"type ~{group} instead"
            hint = f"expected {self._known.one_of(group)}" if group in NODES else none
            raise ValueError(f"{group}=null: {hint}")
        self._check_choice(group, value)
        if override.is_force_add() or (override.is_add() and group in self._default_groups()):
            raise ValueError(f"{override.input_line}: type {group}={value} without +")

    def _check_choice(self, group: str, value: Any) -> None:
        if not isinstance(value, str) or value not in self._known.options(group):
            _check_plugin(group, str(value))
            near = nearest(str(value), self._known.options(group))
            raise ValueError(
                f"{group}={value}: " + (near[2:] or f"expected {self._known.one_of(group)}")
            )

    def _check_key(self, override: Override, base: Config, known: list[str]) -> None:
        key = override.key_or_group
        if override.package is not None or "/" in key:
            group = key.partition("@")[0]
            raise ValueError(f"there is no group {group}{nearest(group, self._known.groups)}")
        if key.startswith("hydra.") and override.is_add():
            return  # Hydra's own nodes contain open dictionaries, such as hydra.job.env_set.
        if not has_key(base, key.split(".")):
            raise unknown_key(key, known)
        if override.is_delete():
            raise ValueError(f"~{key}: a key cannot be removed; set it to another value or null")
        if override.is_add():
            raise ValueError(f"{override.input_line}: {key} already exists; type it without +")

    def _default_groups(self) -> set[str]:
        cfg = self._known.compose([], RunMode.RUN)
        return {str(group) for group in cfg.hydra.runtime.choices}


def _check_plugin(group: str, value: str) -> None:
    """Raise an error that names the pip extra if a Hydra plugin is missing."""
    if group in ("hydra/launcher", "hydra/sweeper") and value in _EXTRAS:
        raise ValueError(
            f"{group}={value} needs a plugin: type pip install 'metarun[{_EXTRAS[value]}]'"
        )


def structure(cfg: DictConfig) -> Config:
    """Return a configuration as nested dictionaries; interpolations stay text."""
    return cast("Config", OmegaConf.to_container(cfg, resolve=False))
