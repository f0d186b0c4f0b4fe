"""Composition of checked configurations from command-line overrides, before anything runs.

Every override is looked up first, then each run is composed and resolved. No torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from hydra._internal.hydra import Hydra
from hydra.core.default_element import ConfigDefault
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from metarun.config.configurations import Configurations, explain, first_line
from metarun.config.loading import left_out, names_of, opened, plain, target_in
from metarun.config.override_checks import OverrideChecks, structure
from metarun.config.overrides import check_added, text_of
from metarun.config.schema import Config
from metarun.config.sweeps import (
    SweepMethod,
    check_swept,
    completed,
    corners,
    method_of,
    one_of_each,
    product,
)
from metarun.config.trust import locate


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
    """Composes and checks the runs of a request.

    Attributes:
        hydra: Hydra that composes them, and may start them.
        groups: All config groups; nested ones are written `outer/inner`.
        options: Returns the names that a group can be set to, sorted.
    """

    def __init__(self, hydra: Hydra, config_name: str) -> None:
        self.hydra = hydra
        self._known = configurations = Configurations(hydra, config_name)
        self._checks = OverrideChecks(configurations)
        self._sweeps: dict[tuple[str, ...], DictConfig] = {}
        self.groups = configurations.groups
        self.options = configurations.options

    def target(self, group: str, name: str) -> str:
        """Return the class of a choice, from its file or from a file in its defaults.

        Raises:
            ValueError: The choice has to be composed and cannot be.
        """
        try:
            found = self._known.repository.load_config(f"{group}/{name}")
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

    def is_sweep(self, overrides: Sequence[str], multirun: bool) -> bool:
        """Return whether a request is a sweep, by `-m` or by its configuration.

        Raises:
            ValueError: An override has several values and the request is no sweep.
        """
        if multirun:
            return True
        simple = self._one_of_each(overrides)
        if self._known.compose(simple, RunMode.RUN).hydra.mode == RunMode.MULTIRUN:
            return True
        for override in self._known.parse(overrides):
            if override.is_sweep_override():
                raise ValueError(
                    f"{text_of(override)} has several values: add -m to run each, or quote a "
                    "value that contains a comma"
                )
        return False

    def sweep_method(self, overrides: Sequence[str]) -> SweepMethod:
        """Return Hydra's launcher and sweeper for these overrides.

        Raises:
            ValueError: The launcher cannot start the processes of a run.
        """
        return method_of(self._sweep_node(self._one_of_each(overrides)))

    def sweep_words(self, overrides: Sequence[str]) -> list[str]:
        """Return the overrides of a sweep, completed with those that a search needs."""
        if not self.sweep_method(overrides).searches:
            return list(overrides)
        return completed(overrides, {o.key_or_group for o in self._known.parse(overrides)})

    def _one_of_each(self, overrides: Sequence[str]) -> list[str]:
        """Return a sweep's overrides with single values, checked."""
        simple = one_of_each(self._known.parse(overrides), self.groups)
        self._checks.check(simple)
        return simple

    def _sweep_node(self, simple: Sequence[str]) -> DictConfig:
        """Return Hydra's node of a sweep, composed from overrides with single values."""
        words = tuple(simple)
        if words not in self._sweeps:
            self._sweeps[words] = self._known.compose(words, RunMode.MULTIRUN).hydra
        return self._sweeps[words]

    def jobs(self, overrides: Sequence[str], sweep: bool) -> list[Job]:
        """Compose and check every run of a request.

        For a search, whose sweeper chooses values while it runs, the returned runs cover every
        listed value and both ends of every interval.

        Raises:
            ValueError: An override is invalid, or a sweep selects no run or too many.
        """
        if not sweep:
            return [self.job(overrides, sweep)]
        hydra = self._sweep_node(self._one_of_each(overrides))
        searches = method_of(hydra).searches
        parsed = self._known.parse(overrides)
        check_swept(parsed, self.groups, searches=searches)
        params = cast("Config", OmegaConf.to_container(hydra.sweeper)).get("params") or {}
        parsed = [*self._known.parse([f"{key}={v}" for key, v in params.items()]), *parsed]
        combine = corners if searches else product
        return [self.job(list(words), sweep) for words in combine(parsed)]

    def job(self, overrides: Sequence[str], sweep: bool = False) -> Job:
        """Compose, check and resolve one run.

        Raises:
            ValueError: An override is invalid, or the configuration cannot be composed.
        """
        base = self._checks.check(overrides)
        cfg = self._known.compose(overrides, RunMode.RUN)
        check_added("", structure(cfg), base)
        _check_callbacks(structure(cfg.hydra).get("callbacks") or {})
        choices = cast("dict[str, Any]", OmegaConf.to_container(cfg.hydra.runtime.choices))
        if not cfg.get("backbone"):
            raise ValueError(
                f"data={choices['data']} has no default backbone: type backbone=NAME, "
                f"{self._known.one_of('backbone')}"
            )
        config, folder = _resolve(cfg, "sweep" if sweep else "run")
        config["names"] = names_of(choices, config)
        recipes = self.options("recipe") if "recipe" in self.groups else []
        # With `~recipe` there is no choice.
        has_recipe = choices.get("recipe", f"{choices['algo']}-{choices['data']}") in recipes
        others: list[str] = []
        if has_recipe and "recipe" in choices:
            recipe = self._known.repository.load_config(f"recipe/{choices['recipe']}")
            others = left_out(recipe, config["names"]["backbone"])
        return Job(list(overrides), config, folder, has_recipe, others, sweep)


def _check_callbacks(callbacks: Config) -> None:
    """Check that Hydra would call nothing but its own callbacks; it calls whatever is named.

    Raises:
        ValueError: One is something else.
    """
    for name, node in callbacks.items():
        target = node.get("_target_") if isinstance(node, dict) else node
        locate(f"hydra.callbacks.{name}._target_", str(target))


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
        raise ValueError(f"{error.full_key}: {first_line(error)}") from error
    except OmegaConfBaseException as error:
        raise ValueError(explain(error)) from error
    except RecursionError as error:
        raise ValueError("a value refers to itself through ${…}: remove the cycle") from error
    finally:
        holder.cfg = before


def to_yaml(config: Any) -> str:
    """Write plain values as YAML that OmegaConf reads back unchanged."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config))
