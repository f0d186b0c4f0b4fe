"""Composition of checked configurations from command-line overrides, before anything runs.

Hydra alone reports a mistake in several lines, sometimes after it has created a folder, and
sometimes (`+key`) not at all. Every override is looked up here first. No torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra.core.default_element import ConfigDefault
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from metarun.config.loading import left_out, names_of, opened, plain, target_in
from metarun.config.naming import hashed_slug
from metarun.config.overrides import check_added, has_key, leaves, read_words, text_of
from metarun.config.schema import NODES, Config
from metarun.config.suggestions import nearest, unknown_key
from metarun.config.sweeps import SweepMethod, corners, product
from metarun.core.errors import one_line

_EXTRAS = {
    "joblib": "joblib",
    "submitit_local": "slurm",
    "submitit_slurm": "slurm",
    "optuna": "optuna",
}
"""Optional dependency (pip extra) that provides each launcher or sweeper."""

SEVERAL = ("logger",)
"""Groups that accept a list: a run may have several choices or none."""

_FOLDER_OF_A_RUN = "hydra.sweep.subdir"
_FILES_OF_HYDRA = ("hydra.output_subdir", "hydra/job_logging", "hydra/hydra_logging")


@dataclass(frozen=True)
class Job:
    """One requested run.

    Attributes:
        overrides: Overrides of this run, each with a single value.
        config: Resolved configuration.
        folder: Folder that the run will create.
        has_recipe: Whether the pair of algorithm and data set has a recipe.
        left_out: What the recipe says of other backbones, a line for each.
        may_be_there: Whether the folder may already exist, since a hash of what the run
            computes is part of its name.
    """

    overrides: list[str]
    config: Config
    folder: Path
    has_recipe: bool
    left_out: list[str]
    may_be_there: bool = False


@contextmanager
def composer(
    config_dir: str | None = None, conf: str | None = None, config_name: str | None = None
) -> Iterator[Composer]:
    """Open the shipped configurations and those of the user's folder `config_dir`.

    Raises:
        ValueError: A folder does not exist, or a user's file has the name of a shipped one.
    """
    with opened(config_dir, conf) as hydra:
        yield Composer(hydra, config_name or "config")


class Composer:
    """Composes configurations; its errors suggest the most similar name."""

    def __init__(self, hydra: Hydra, config_name: str) -> None:
        self._hydra = hydra
        loader = cast("ConfigLoaderImpl", hydra.config_loader)
        self._repository = loader.repository
        self._config_name = config_name
        self._parser = OverridesParser.create(config_loader=loader)
        self._options: dict[str, list[str]] = {}
        self._bases: dict[tuple[str, ...], Config] = {}
        self._sweeps: dict[tuple[str, ...], DictConfig] = {}
        self._latest: tuple[tuple[tuple[str, ...], RunMode], DictConfig] | None = None
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
        return self._repository.get_group_options(group, kind)

    def target(self, group: str, name: str) -> str:
        """Return the class of a choice, from its file or from a file in its defaults.

        Raises:
            ValueError: The choice has to be composed and cannot be.
        """
        try:
            found = self._repository.load_config(f"{group}/{name}")
        except Exception:  # A user's file may be invalid: composing it explains the error.
            found = None
        if found is not None:
            target = target_in(found, group)
            if target is not None:
                return target
            for default in found.defaults_list or ():
                if isinstance(default, ConfigDefault) and not default.is_self():
                    return self.target(group, str(default.path))
        # The file may set it by other means, such as an interpolation.
        return str(self.job([f"{group}={name}", "~recipe"]).config[group]["_target_"])

    @cached_property
    def groups(self) -> list[str]:
        """All config groups; nested ones are written `outer/inner`."""
        return list(self._groups_in(""))

    def _groups_in(self, parent: str) -> Iterator[str]:
        for name in self._in_group(parent, ObjectType.GROUP):
            group = f"{parent}/{name}" if parent else name
            yield group
            yield from self._groups_in(group)

    def is_sweep(self, overrides: Sequence[str], multirun: bool) -> bool:
        """Return whether a request is a sweep, by `-m` or by its configuration.

        Raises:
            ValueError: An override has several values and the request is no sweep.
        """
        if multirun:
            return True
        parsed = self._parse(overrides)
        swept = [o for o in parsed if o.is_sweep_override()]
        simple = self._one_of_each(parsed)
        self._check_words(simple)
        if self._compose(simple, RunMode.RUN).hydra.mode == RunMode.MULTIRUN:
            return True
        if swept:
            raise ValueError(
                f"{text_of(swept[0])} has several values: add -m to run each, or quote a value "
                "that contains a comma"
            )
        return False

    def sweep_method(self, overrides: Sequence[str]) -> SweepMethod:
        """Return Hydra's launcher and sweeper for these overrides.

        Raises:
            ValueError: The launcher would start several processes for one run.
        """
        hydra = self._sweep_node(self._one_of_each(self._parse(overrides)))
        choices = hydra.runtime.choices
        number = hydra.launcher.get("tasks_per_node") or 1
        if number > 1:
            raise ValueError(
                f"hydra.launcher.tasks_per_node={number}: expected 1, since each run of a sweep "
                "is one process; use torchrun to start one run in several"
            )
        direction = hydra.sweeper.get("direction")
        return SweepMethod(
            str(choices["hydra/launcher"]),
            str(choices["hydra/sweeper"]),
            None if direction is None else str(getattr(direction, "name", direction)),
        )

    def _one_of_each(self, parsed: Sequence[Override]) -> list[str]:
        """Return the overrides without swept ones, except the first choice of a swept group.

        The chosen groups determine which keys exist; those of each run are checked with it.
        """
        words: list[str] = []
        for override in parsed:
            if not override.is_sweep_override():
                words.append(text_of(override))
            elif override.key_or_group in self.groups and override.is_choice_sweep():
                first = next(iter(override.sweep_string_iterator()), None)
                words += [] if first is None else [f"{override.key_or_group}={first}"]
        return words

    def _sweep_node(self, simple: Sequence[str]) -> DictConfig:
        """Return Hydra's node of a sweep, composed from overrides with single values."""
        words = tuple(simple)
        if words not in self._sweeps:
            self._sweeps[words] = self._compose(words, RunMode.MULTIRUN).hydra
        return self._sweeps[words]

    def sweep_words(self, overrides: Sequence[str]) -> list[str]:
        """Return the overrides of a sweep, completed with those that a search needs.

        Optuna writes its result into the sweep's folder, so each search gets a folder of its
        own, and it would stop at the first failed run without a failure rate.
        """
        self._check_words(self._one_of_each(self._parse(overrides)))
        if not self.sweep_method(overrides).searches:
            return list(overrides)
        typed = {override.key_or_group for override in self._parse(overrides)}
        named_words = sorted(word for word in overrides if not word.startswith("hydra"))
        added = {
            "hydra.sweep.dir": f"outputs/sweeps/{hashed_slug(named_words, 60)}",
            "hydra.sweeper.max_failure_rate": "1.0",
        }
        more = [f"{key}='{value}'" for key, value in added.items() if key not in typed]
        return [*overrides, *more]

    def jobs(self, overrides: Sequence[str], sweep: bool) -> list[Job]:
        """Compose and check every run of a request.

        For a search, whose sweeper chooses values while it runs, the returned runs cover every
        listed value and both ends of every interval.

        Raises:
            ValueError: An override is invalid, or a sweep selects no run or too many.
        """
        if not sweep:
            return [self.job(overrides, sweep)]
        parsed = self._parse(overrides)
        simple = self._one_of_each(parsed)
        self._check_words(simple)
        searches = self.sweep_method(overrides).searches
        for override in parsed:
            if override.is_sweep_override() and not searches:
                self._check_sweep_key(override)
            elif override.is_sweep_override() and override.key_or_group == "seed":
                raise ValueError(
                    f"{text_of(override)}: a search would choose the luckiest seed; search with "
                    "one seed, then repeat the best run with seed=0,1,2"
                )
        sweeper = self._sweep_node(simple).sweeper
        params = cast("dict[str, Any]", OmegaConf.to_container(sweeper)).get("params") or {}
        parsed = [*self._parse([f"{key}={value}" for key, value in params.items()]), *parsed]
        combine = corners if searches else product
        return [self.job(list(words), sweep) for words in combine(parsed)]

    def job(self, overrides: Sequence[str], sweep: bool = False) -> Job:
        """Compose, check and resolve one run.

        Raises:
            ValueError: An override is invalid, or the configuration cannot be composed.
        """
        base = self._check_words(overrides)
        cfg = self._compose(overrides, RunMode.RUN)
        check_added("", _structure(cfg), base)
        choices = cast("dict[str, Any]", OmegaConf.to_container(cfg.hydra.runtime.choices))
        if not cfg.get("backbone"):
            raise ValueError(
                f"data={choices['data']} has no default backbone: type backbone=NAME, "
                f"{self._one_of('backbone')}"
            )
        config, folder = _resolve(cfg, "sweep" if sweep else "run")
        config["names"] = names_of(choices, config)
        recipes = self.options("recipe") if "recipe" in self.groups else []
        has_recipe = choices.get("recipe") in recipes
        others: list[str] = []
        if has_recipe:
            recipe = self._repository.load_config(f"recipe/{choices['recipe']}")
            others = left_out(recipe, config["names"]["backbone"])
        return Job(list(overrides), config, folder, has_recipe, others, sweep)

    def _check_words(self, overrides: Sequence[str]) -> Config:
        """Check every group and key; return the configuration composed from the groups alone."""
        parsed = self._parse(overrides)
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
        groups = set(self.groups)
        in_groups = [o for o in parsed if o.key_or_group in groups]
        for override in in_groups:
            self._check_group(override)
        words = tuple(text_of(o) for o in in_groups)
        if words not in self._bases:
            self._bases[words] = _structure(self._compose(words, RunMode.RUN))
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
            hint = f"expected {self._one_of(group)}" if group in NODES else none
            raise ValueError(f"{group}=null: {hint}")
        self._check_choice(group, value)
        if override.is_force_add() or (override.is_add() and group in self._default_groups()):
            raise ValueError(f"{override.input_line}: type {group}={value} without +")

    def _check_choice(self, group: str, value: Any) -> None:
        if not isinstance(value, str) or value not in self.options(group):
            _check_plugin(group, str(value))
            near = nearest(str(value), self.options(group))
            raise ValueError(f"{group}={value}: " + (near[2:] or f"expected {self._one_of(group)}"))

    def _check_sweep_key(self, override: Override) -> None:
        """Check a swept override; unknown keys and groups are reported with the single jobs."""
        if override.key_or_group in SEVERAL:
            raise ValueError(
                f"{override.input_line}: these runs would be identical and share a folder; to use "
                f"several in one run, type {override.key_or_group}=[A,B]"
            )
        if override.key_or_group not in self.groups and not override.is_discrete_sweep():
            raise ValueError(
                f"{override.input_line}: expected a list, range() or glob(); interval() needs "
                "hydra/sweeper=optuna"
            )

    def _check_key(self, override: Override, base: Config, known: list[str]) -> None:
        key = override.key_or_group
        if override.package is not None or "/" in key:
            group = key.partition("@")[0]
            raise ValueError(f"there is no group {group}{nearest(group, self.groups)}")
        if key.startswith("hydra.") and override.is_add():
            return  # Hydra's own nodes contain open dictionaries, such as hydra.job.env_set.
        if not has_key(base, key.split(".")):
            raise unknown_key(key, known)
        if override.is_delete():
            raise ValueError(f"~{key}: a key cannot be removed; set it to another value or null")
        if override.is_add():
            raise ValueError(f"{override.input_line}: {key} already exists; type it without +")

    def _default_groups(self) -> set[str]:
        cfg = self._compose([], RunMode.RUN)
        return {str(group) for group in cfg.hydra.runtime.choices}

    def _one_of(self, group: str) -> str:
        return "one of " + ", ".join(o for o in self.options(group) if not o.startswith("for_"))

    def _parse(self, overrides: Sequence[str]) -> list[Override]:
        return read_words(self._parser, overrides)

    def _compose(self, overrides: Sequence[str], mode: RunMode) -> DictConfig:
        """Return the configuration of these overrides, not to be modified.

        The latest one is cached, since several checks in a row need it.
        """
        asked = tuple(overrides), mode
        if self._latest is None or self._latest[0] != asked:
            self._latest = asked, self._composed(overrides, mode)
        return self._latest[1]

    def _composed(self, overrides: Sequence[str], mode: RunMode) -> DictConfig:
        try:
            return self._hydra.compose_config(
                config_name=self._config_name,
                overrides=list(overrides),
                run_mode=mode,
                from_shell=False,
                validate_sweep_overrides=False,
            )
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(_explain(error)) from error
        # A user's YAML file may raise any exception.
        except Exception as error:
            raise ValueError(f"the configuration cannot be composed: {one_line(error)}") from error


def _check_plugin(group: str, value: str) -> None:
    """Raise an error that names the pip extra if a Hydra plugin is missing."""
    if group in ("hydra/launcher", "hydra/sweeper") and value in _EXTRAS:
        raise ValueError(
            f"{group}={value} needs a plugin: type pip install 'metarun[{_EXTRAS[value]}]'"
        )


def _structure(cfg: DictConfig) -> Config:
    return cast("Config", OmegaConf.to_container(cfg, resolve=False))


def _resolve(cfg: DictConfig, mode: Literal["run", "sweep"]) -> tuple[Config, Path]:
    """Return the resolved configuration and the folder that Hydra will create for it.

    Raises:
        ValueError: A value is missing, or an interpolation cannot be resolved.
    """
    holder = HydraConfig.instance()
    before = holder.cfg
    holder.set_config(cfg)
    try:
        config = plain(cfg)
        folder = Path(str(cfg.hydra[mode].dir))
        return config, folder / str(cfg.hydra.sweep.subdir) if mode == "sweep" else folder
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} is missing: type {error.full_key}=…") from error
    except InterpolationResolutionError as error:
        raise ValueError(f"{error.full_key}: {_first_line(error)}") from error
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error)) from error
    except RecursionError as error:
        raise ValueError("a value refers to itself through ${…}: remove the cycle") from error
    finally:
        holder.cfg = before


def _explain(error: BaseException) -> str:
    """Return the message of an error of Hydra or OmegaConf and that of its cause, on one line."""
    parts = [_first_line(error)]
    if error.__cause__ is not None:
        parts.append(_first_line(error.__cause__))
    return ": ".join(parts)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


def to_yaml(config: Any) -> str:
    """Write plain values as YAML that OmegaConf reads back unchanged."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config))
