"""How the parts of a run are made from its configuration.

A configuration is a plain, resolved dictionary here, as it stands in a run's `config.yaml`.
This is the only place that instantiates components.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from metarun.config.checks import check_config, convert
from metarun.config.schema import Config, Settings
from metarun.config.suggestions import nearest, unknown_key
from metarun.core import distributed
from metarun.core.errors import one_line
from metarun.core.settings import EvalSettings, TrainSettings
from metarun.core.types import LearnedState
from metarun.execution.allocator import keep_large_blocks
from metarun.runs.folder import RunFolder

if TYPE_CHECKING:
    import torch

    from metarun.algorithms.base import Algorithm
    from metarun.core.types import EpisodeSource
    from metarun.trackers.base import Tracker


@dataclass(frozen=True)
class Experiment:
    """The parts of a run, made and checked against each other.

    Attributes:
        algorithm: On its device, in its precision.
        source: The data set.
        train, eval: The trainer's settings.
        run_info: What the records say of the run: names, sizes, seed, device, engine …
        record: The configuration with everything settled, to store as `config.yaml`.
    """

    algorithm: Algorithm
    source: EpisodeSource
    train: TrainSettings
    eval: EvalSettings
    run_info: Config
    record: Config
    seed: int


def build_experiment(config: Mapping[str, Any]) -> Experiment:
    """Make the parts of a run, and nothing on disk.

    Args:
        config: A resolved configuration, as stored in a run folder.

    Raises:
        ValueError: Something is wrong in the configuration, or its parts do not suit each other.
    """
    settings = check_config(config)
    source = _source(settings)
    if source.spec.kind == "classification":
        for key, way in (("way", settings.way), ("train.way", settings.train.way)):
            if way < 2 and source.spec.streams is None:
                raise ValueError(f"{key}={way} is out of range: a classification needs 2 or more")
    if settings.eval.views > 1 and len(source.spec.input_shape) != 3:
        raise ValueError(
            f"eval.views={settings.eval.views} is for images, and data={settings.names['data']} "
            "has none: use eval.views=1"
        )
    proficiency = settings.eval.proficiency
    if proficiency is not None and source.spec.kind == "classification" and proficiency > 1.0:
        raise ValueError(
            f"eval.proficiency={proficiency}: an accuracy is a fraction; expected 1 or less"
        )
    device = source.device
    if device.type == "cpu":
        keep_large_blocks()
    algorithm = _algorithm(settings, source).to(device, _dtype(settings))
    for key, shot in (("shot", settings.shot), ("train.shot", settings.train.shot)):
        if shot < algorithm.least_shot:
            name = settings.names["algo"]
            raise ValueError(
                f"{key}={shot} is out of range: algo={name} needs {algorithm.least_shot} or more"
            )
    train = _training(settings, algorithm)
    engine = algorithm.resolved_engine().describe()
    record = {**config, **engine, "device": str(device)}
    record["train"] = {**config["train"], "steps": train.steps}
    run_info = {
        **settings.names,
        "way": settings.way,
        "shot": settings.shot,
        "query": settings.query,
        "seed": settings.seed,
        "bn": settings.bn,
        "precision": settings.precision,
        "device": str(device),
        **engine,
    }
    # The source may have lowered the ways on meta-val; the records say what was done.
    evaluation = replace(settings.eval, val_way=source.sizes["val"].way)
    return Experiment(algorithm, source, train, evaluation, run_info, record, settings.seed)


def check_shares(experiment: Experiment) -> None:
    """Refuse a meta-training that the processes at hand cannot share.

    Raises:
        ValueError: They are more than the tasks of an update, or these are not to be shared.
    """
    train, number = experiment.train, distributed.size()
    if number == 1 or not train.steps:
        return
    if train.tasks_per_step < number:
        raise ValueError(
            f"train.tasks_per_step={train.tasks_per_step} is fewer than the {number} processes: "
            "expected one task or more for each"
        )
    why = experiment.algorithm.needs_whole_batch
    if why is not None:
        name = experiment.run_info["algo"]
        raise ValueError(f"algo={name} cannot share its tasks over {number} processes: {why}")


def _training(settings: Settings, algorithm: Algorithm) -> TrainSettings:
    """The meta-training that an algorithm has: no steps where it has nothing to meta-learn."""
    if not algorithm.meta_trains:
        return replace(settings.train, steps=0)
    if not settings.train.steps:
        raise ValueError(
            f"train.steps=0: algo={settings.names['algo']} learns from training tasks: "
            "expected 1 or more"
        )
    return settings.train


def build_trackers(config: Mapping[str, Any]) -> dict[str, Tracker]:
    """Make the trackers of a configuration, none of which opens anything yet.

    They are no part of `build_experiment`: a run is read, and tested, where its trackers are not
    installed.

    Raises:
        ValueError: An option is wrong, or a package is missing.
    """
    from metarun.trackers.base import Tracker

    made: dict[str, Tracker] = {}
    for name, node in (check_config(config).logger or {}).items():
        made[name] = _component(f"logger.{name}", node)()
        if not isinstance(made[name], Tracker):
            raise ValueError(
                f"logger.{name}._target_={node['_target_']} is not a subclass of metarun's Tracker"
            )
    return made


def build_source(config: Mapping[str, Any]) -> EpisodeSource:
    """Make the data set of a configuration alone.

    Raises:
        ValueError: Something is wrong in the configuration, or the data are not here.
    """
    return _source(check_config(config))


def _source(settings: Settings) -> EpisodeSource:
    return _cached_source(_source_key(settings), _device(settings.device), _dtype(settings))


def _dtype(settings: Settings) -> torch.dtype:
    import torch

    return torch.float64 if settings.precision == "float64" else torch.float32


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    local = distributed.local_rank()
    if local is not None:
        # Whatever number is typed: a run that is resumed has that of its first process.
        device = torch.device("cuda", local)
        if torch.cuda.device_count() < distributed.local_size():
            raise ValueError(
                f"device={name}: {distributed.local_size()} processes need a GPU each, and this "
                f"machine has {torch.cuda.device_count()}: start fewer, or use device=cpu"
            )
        torch.cuda.set_device(device)
    if not torch.cuda.is_available():
        raise ValueError(f"device={name}: no GPU is available here: use device=cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={name}: this machine has {torch.cuda.device_count()} GPU(s), "
            "counted from cuda:0"
        )
    return device


def _algorithm(settings: Settings, source: EpisodeSource) -> Algorithm:
    import torch

    from metarun.algorithms.base import Algorithm
    from metarun.backbones.network import set_mixed
    from metarun.execution.engine import Engine

    injected = {
        "spec": source.spec,
        "backbone": _component("backbone", settings.backbone),
        "optim": _component("optim", settings.optim),
        "engine": Engine(
            settings.engine, settings.tasks_per_chunk, settings.threads, graph=settings.graph
        ),
        "bn": settings.bn,
        "eval_inner_steps": settings.eval.inner_steps,
        "seed": settings.seed,
    }
    make = _component("algo", settings.algo, injected)
    # The initial parameters are the seed's, whatever was drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        algorithm = make()
    if not isinstance(algorithm, Algorithm):
        target = settings.algo["_target_"]
        raise ValueError(f"algo._target_={target} is not a subclass of metarun's Algorithm")
    if settings.precision == "mixed" and not set_mixed(algorithm):
        raise ValueError(
            "precision=mixed needs a network (metarun.backbones.network.Network), and "
            f"algo={settings.names['algo']} has none: use precision=float32"
        )
    return algorithm


def _source_key(settings: Settings) -> str:
    """Everything that a source is made of, as text, so that it can be cached."""
    train = settings.train
    return json.dumps(
        {
            "data": settings.data,
            # Evaluation first: what is wrong there is typed as `way`, not `train.way`.
            "sizes": {
                "val": [settings.eval.val_way or settings.way, settings.shot, settings.query],
                "test": [settings.way, settings.shot, settings.query],
                "train": [train.way, train.shot, train.query],
            },
            "seed": settings.seed,
            "eval_seed": settings.eval.seed,
            "val_way": settings.eval.val_way,
        }
    )


# One: the check before a run and the run itself meet the same one, and a large one is let go.
@functools.lru_cache(maxsize=1)
def _cached_source(key: str, device: torch.device, dtype: torch.dtype) -> EpisodeSource:
    from metarun.core.types import EpisodeSize

    made_of = json.loads(key)
    injected = {
        "sizes": {split: EpisodeSize(*size) for split, size in made_of["sizes"].items()},
        "seed": made_of["seed"],
        "eval_seed": made_of["eval_seed"],
        "val_way": made_of["val_way"],
        "device": device,
        "dtype": dtype,
    }
    source: EpisodeSource = _component("data", made_of["data"], injected)()
    return source


def _component(
    name: str, node: Mapping[str, Any], injected: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The class of a node with its options filled in, checked against its signature."""
    target = locate(f"{name}._target_", node["_target_"])
    hints = option_hints(name, node)
    given = injected or {}
    for key in given:
        if key not in hints:
            raise ValueError(
                f"{node['_target_']} does not take {key}: let its constructor accept **common "
                "and hand it to super().__init__"
            )
    options: Config = {}
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        if key not in hints or key in given:
            known = [f"{name}.{other}" for other in hints if other not in given]
            raise unknown_key(f"{name}.{key}", known)
        if LearnedState in typing.get_args(hints[key]):
            options[key] = None if value is None else _learned_state(f"{name}.{key}", value)
        elif _names_a_class(hints[key]):
            options[key] = locate(f"{name}.{key}", str(value))
        else:
            options[key] = convert(f"{name}.{key}", value, hints[key])
    return functools.partial(target, **options, **given)


def option_hints(name: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a node may have, with their type hints.

    They are the keywords of its class and, where one of these names a class itself (a learner
    that gets an adversary), those of that class too: its options stand beside the others.
    """
    hints = keywords(locate(f"{name}._target_", node["_target_"]))
    for key, hint in list(hints.items()):
        if _names_a_class(hint) and key in node:
            hints = {**keywords(locate(f"{name}.{key}", str(node[key]))), **hints}
    return hints


def _learned_state(key: str, run: Any) -> LearnedState:
    """What the run of a folder has learned.

    Raises:
        ValueError: It is no folder of a run with checkpoints.
    """
    found = RunFolder(Path(str(run))).load_learned()
    if found is None:
        raise ValueError(f"{key}={run}: expected the folder of a run with checkpoints")
    return LearnedState(str(run), found[1]["state"])


def _names_a_class(hint: Any) -> bool:
    return typing.get_origin(hint) is type


def locate(key: str, path: str) -> Callable[..., Any]:
    """Import a class by its dotted name.

    Raises:
        ValueError: It cannot be found, or its module cannot be imported.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"{key}={path}: expected the dotted name of a class, as in module.Class")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise ValueError(
                f"{key}={path}: there is no module {error.name} in the current folder or among "
                "the installed packages"
            ) from error
        raise ValueError(f"{key}={path}: importing {module_name} failed: {error}") from error
    # A user's module may fail in any way; the answer is the same line.
    except Exception as error:
        summary = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{key}={path}: importing {module_name} failed: {summary}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{key}={path}: {module_name} has no {name}{nearest(name, dir(module))}")
    return cast("Callable[..., Any]", found)


def keywords(target: Callable[..., Any]) -> dict[str, Any]:
    """Keywords that a constructor takes, with their type hints.

    A `**common` is followed to the classes that it is handed on to.
    """
    found: dict[str, Any] = {}
    inits: list[Any] = [target]
    if inspect.isclass(target):
        inits = [c.__dict__["__init__"] for c in target.__mro__ if "__init__" in c.__dict__]
    for init in inits:
        try:
            hints = typing.get_type_hints(init)
        except Exception:  # A hint that cannot be evaluated only costs us its check.
            hints = {}
        parameters = inspect.signature(init).parameters.values()
        for parameter in parameters:
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                found.setdefault(parameter.name, hints.get(parameter.name, Any))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    found.pop("self", None)
    return found
