"""Hydra as metarun opens it: where YAML files are searched, and how they are read and merged.

Everything that composes goes through `opened`, so that a check, a run and `--cfg` agree. The two
classes below change Hydra's composition in two points, and both are pickled with a sweep's runs.
"""

from __future__ import annotations

import copy
import json
import secrets
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.core_plugins import file_config_source
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from metarun.config.catalogue import conf_dir
from metarun.config.naming import job_name
from metarun.config.overrides import check_added
from metarun.config.schema import Config
from metarun.config.search_path import own_folders, refuse_shipped_names
from metarun.config.suggestions import nearest
from metarun.core.nested import flat

HYDRA_VERSION_BASE = "1.3"

PARTS = "parts"
"""Node of a data set that is made of others, with the node of each by its name."""
FOR_BACKBONE = "for_backbone"
"""Node of a recipe with values for one backbone each: `for_backbone: {conv4: {filters: 32}}`."""


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's reader of YAML files, without the `reference` of an experiment.

    What we measured is part of no configuration: other experiments that build on the file must
    not inherit it, and the hash of a run must not change with it.

    Attributes:
        known: Every file that was read, by its path, time and size. Reading is half of the time
            of composing, and each run of a sweep is composed from the same files.
    """

    known: ClassVar[dict[tuple[str, int, int], ConfigResult]] = {}

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path) / self._normalize_file_name(config_path)
        if not file.is_file():
            return super().load_config(config_path)
        stat = file.stat()
        key = str(file), stat.st_mtime_ns, stat.st_size
        if key not in self.known:
            loaded = super().load_config(config_path)
            if config_path.startswith("experiment/") and isinstance(loaded.config, DictConfig):
                loaded.config.pop("reference", None)
            self.known[key] = loaded
        # A copy: Hydra changes what it merges.
        return copy.deepcopy(self.known[key])


class ConfigLoader(ConfigLoaderImpl):
    """Hydra's loader; what a recipe says of a backbone is merged only into that backbone.

    The latest configuration is kept: several checks in a row, and then Hydra, ask for the same.
    """

    _latest: tuple[Hashable, DictConfig] | None = None

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose a configuration; a data set made of others (`sources`) has their nodes, too."""
        asked = config_name, tuple(overrides), run_mode
        if self._latest is None or self._latest[0] != asked:
            made = self._composed(
                config_name, overrides, run_mode, from_shell, validate_sweep_overrides
            )
            self._latest = asked, made
        # A copy: Hydra writes into it.
        return copy.deepcopy(self._latest[1])

    def _composed(self, config_name: str | None, overrides: list[str], *how: Any) -> DictConfig:
        cfg = super().load_configuration(config_name, overrides, *how)
        data = cfg.get("data")
        if isinstance(data, DictConfig) and PARTS in data and isinstance(data.sources, ListConfig):
            names = [str(name) for name in data.sources]
            own = cast("Config", OmegaConf.to_container(data).get("options") or {})  # type: ignore[union-attr]
            for name in own:
                if name not in names:
                    raise ConfigCompositionException(
                        f"data.options.{name}: data.sources has {', '.join(names)} alone"
                    )
            parts = {name: self._part(config_name, name, own.get(name) or {}) for name in names}
            with open_dict(cfg):
                data[PARTS] = parts
        return cfg

    def _part(self, config_name: str | None, name: str, options: Config) -> Config:
        """Return the node of a data set by its name, with some options set.

        Raises:
            ConfigCompositionException: There is no such data set or option.
        """
        known = self.repository.get_group_options("data", ObjectType.CONFIG)
        if name not in known:
            raise ConfigCompositionException(
                f"data.sources: there is no data set {name}{nearest(name, known)}"
            )
        words = [f"data={name}", "backbone=mlp", "~recipe"]
        node = super().load_configuration(config_name, words, RunMode.RUN).data
        made = cast("Config", OmegaConf.to_container(node, resolve=True))
        try:
            check_added(f"data.options.{name}.", options, made)
        except ValueError as error:
            raise ConfigCompositionException(str(error)) from None
        return cast("Config", OmegaConf.to_container(OmegaConf.merge(made, options)))

    def _compose_config_from_defaults_list(
        self, defaults: list[ResultDefault], repo: IConfigRepository
    ) -> DictConfig:
        self._backbone = _chosen_backbone(defaults, repo)
        return super()._compose_config_from_defaults_list(defaults, repo)

    def _load_single_config(self, default: ResultDefault, repo: IConfigRepository) -> ConfigResult:
        loaded = super()._load_single_config(default, repo)
        if not str(default.config_path).startswith("recipe/") or FOR_BACKBONE not in loaded.config:
            return loaded
        config = cast("DictConfig", copy.deepcopy(loaded.config))
        own = config.pop(FOR_BACKBONE)
        if not isinstance(own, DictConfig):
            raise ConfigCompositionException(
                f"{default.config_path}.yaml: {FOR_BACKBONE}={own}: expected names of backbones, "
                "each with keys and values"
            )
        if self._backbone in own:
            OmegaConf.update(config, "backbone", own[self._backbone], merge=True)
        # A copy: Hydra keeps the loaded file.
        loaded = copy.copy(loaded)
        loaded.config = config
        return loaded


def _chosen_backbone(defaults: Sequence[ResultDefault], repo: IConfigRepository) -> str:
    files = [d for d in defaults if str(d.config_path).startswith("backbone/")]
    # The files that a choice builds on have that choice as their parent.
    choice = next((d for d in files if not str(d.parent).startswith("backbone/")), None)
    if choice is None:
        return ""
    found = (target_in(repo.load_config(str(d.config_path)), "backbone") for d in files)
    target = next((target for target in found if target is not None), "")
    return backbone_name(str(choice.config_path).removeprefix("backbone/"), target)


def target_in(loaded: ConfigResult | None, group: str) -> str | None:
    """Return the class that a group's file sets, without those that the file builds on."""
    if loaded is None:
        return None
    keys = ("_target_", f"{group}._target_")
    found = (OmegaConf.select(loaded.config, key) for key in keys)
    return next((str(target) for target in found if target is not None), None)


def backbone_name(choice: str, target: str) -> str:
    """Return the name of a chosen backbone; `for_<data>` is replaced by the network's class."""
    return target.rpartition(".")[2].lower() if choice.startswith("for_") else choice


def left_out(recipe: ConfigResult | None, backbone: str) -> list[str]:
    """Return a line for each backbone that a recipe has values for, if `backbone` is not one."""
    own = OmegaConf.select(recipe.config, FOR_BACKBONE, default={}) if recipe else {}
    return [] if backbone in own else [_left_out(name, own[name]) for name in own]


def _left_out(name: str, values: DictConfig) -> str:
    leaves = flat(cast("Config", OmegaConf.to_container(values)))
    typed = {key: json.dumps(value, separators=(",", ":")) for key, value in leaves.items()}
    words = ", ".join(f"backbone.{key}={text.strip(chr(34))}" for key, text in typed.items())
    verbs = ("is", "was") if len(typed) == 1 else ("are", "were")
    return f"recipe: {words} {verbs[0]} for backbone={name} and {verbs[1]} left out"


def register_resolvers() -> None:
    """Register what the files in conf/ need: resolvers of OmegaConf, and how Hydra reads files."""
    Plugins.instance()  # Registers Hydra's own readers of files first.
    SourcesRegistry.instance().types["file"] = FileConfigSource
    # Cached, so that a folder keeps its name when it is resolved again.
    OmegaConf.register_new_resolver(
        "metarun_unique", lambda: secrets.token_hex(3), replace=True, use_cache=True
    )
    OmegaConf.register_new_resolver("metarun_job", _job_name, replace=True)


def _job_name(*, _root_: DictConfig) -> str:
    """Return the name of a sweep's run; `_root_` is its configuration with Hydra's node."""
    config = plain(_root_)
    hydra = HydraConfig.get()
    config["names"] = names_of(cast("Config", dict(hydra.runtime.choices)), config)
    parser = OverridesParser.create()
    words = [parser.parse_override(str(word)) for word in hydra.overrides.task]
    pool = Path(str(hydra.sweep.dir))
    return job_name([_as_hydra_writes(word) for word in words], config, pool)


def _as_hydra_writes(override: Override) -> str:
    """Normalize an override as Hydra does in a sweep: `seed=1e3` becomes `seed=1000.0`."""
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def plain(cfg: DictConfig) -> Config:
    """Return a configuration as plain, resolved values, without Hydra's node."""
    task = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    return cast("Config", OmegaConf.to_container(task, resolve=True, throw_on_missing=True))


def names_of(choices: Config, config: Config) -> dict[str, str]:
    """Return the chosen names of a run's components."""
    names = {node: str(choices[node]) for node in ("algo", "data")}
    target = str(config["backbone"].get("_target_"))
    names["backbone"] = backbone_name(str(choices.get("backbone")), target)
    if choices.get("experiment"):
        names["experiment"] = str(choices["experiment"])
    return names


@contextmanager
def opened(config_dir: str | None = None, conf: str | None = None) -> Iterator[Hydra]:
    """Open Hydra on the shipped configurations and those of the user's folders `config_dir`.

    Raises:
        ValueError: A folder does not exist, or a user's file has the name of a shipped one.
    """
    shipped = Path(conf).resolve() if conf else conf_dir()
    if not shipped.is_dir():
        raise ValueError(f"--config-path {conf}: there is no such folder; check the path")
    folders = own_folders(config_dir)
    refuse_shipped_names(folders, shipped)
    register_resolvers()
    setbase(HYDRA_VERSION_BASE)
    search_path = create_config_search_path(str(shipped))
    for folder in folders:
        search_path.prepend(
            provider="command-line",
            path=f"file://{folder.resolve()}",
            anchor=SearchPathQuery(provider="schema"),
        )
    instance = GlobalHydra.instance()
    instance.clear()
    hydra = Hydra(task_name="metarun", config_loader=ConfigLoader(search_path))
    instance.initialize(hydra)
    try:
        yield hydra
    finally:
        instance.clear()
