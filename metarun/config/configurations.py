"""What there is to choose from, and what overrides compose to; nothing is checked here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from metarun.config.overrides import read_words
from metarun.config.suggestions import one_of
from metarun.core.errors import one_line


class Configurations:
    """The YAML files of an opened Hydra.

    Attributes:
        repository: Hydra's files of all folders.
    """

    def __init__(self, hydra: Hydra, config_name: str) -> None:
        self._hydra = hydra
        self._config_name = config_name
        loader = cast("ConfigLoaderImpl", hydra.config_loader)
        self.repository = loader.repository
        self._parser = OverridesParser.create(config_loader=loader)
        self._options: dict[str, list[str]] = {}
        if config_name not in self._in_group("", ObjectType.CONFIG):
            raise ValueError(
                f"--config-name {config_name}: there is no {config_name}.yaml in the config path"
            )

    def options(self, group: str) -> list[str]:
        """Return the names that a group can be set to, sorted."""
        if group not in self._options:
            self._options[group] = sorted(self._in_group(group, ObjectType.CONFIG))
        return self._options[group]

    def _in_group(self, group: str, kind: ObjectType) -> list[str]:
        """Return the names in a group, from Hydra's repository.

        Hydra's loader copies all loaded files to find them, which takes as long as composing.
        """
        return self.repository.get_group_options(group, kind)

    @cached_property
    def groups(self) -> list[str]:
        """All config groups; nested ones are written `outer/inner`."""
        return list(self._groups_in(""))

    def _groups_in(self, parent: str) -> Iterator[str]:
        for name in self._in_group(parent, ObjectType.GROUP):
            group = f"{parent}/{name}" if parent else name
            yield group
            yield from self._groups_in(group)

    def one_of(self, group: str) -> str:
        """Return the names to type for a group, in words."""
        names = [option for option in self.options(group) if not option.startswith("for_")]
        return one_of(names, f"metarun list {group}")

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Parse overrides by Hydra's grammar."""
        return read_words(self._parser, overrides)

    def compose(self, overrides: Sequence[str], mode: RunMode) -> DictConfig:
        """Return the configuration of these overrides."""
        try:
            return self._hydra.compose_config(
                config_name=self._config_name,
                overrides=list(overrides),
                run_mode=mode,
                from_shell=False,
                validate_sweep_overrides=False,
            )
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explain(error)) from error
        # A user's YAML file may raise any exception.
        except Exception as error:
            raise ValueError(f"the configuration cannot be composed: {one_line(error)}") from error


def explain(error: BaseException) -> str:
    """Return the message of an error of Hydra or OmegaConf and that of its cause, on one line."""
    parts = [first_line(error)]
    if error.__cause__ is not None:
        parts.append(first_line(error.__cause__))
    return ": ".join(parts)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
