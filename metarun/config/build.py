"""Construction of the components of a run from its configuration.

A configuration is a plain, resolved dictionary here, as stored in a run's `config.yaml`.
No other module instantiates components.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import os
import shutil
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarun.config.checks import check_config, check_numbers, convert
from metarun.config.initialization import Initialized
from metarun.config.schema import Config, Settings
from metarun.config.suggestions import unknown_key
from metarun.config.trust import is_ours, locate, without_places
from metarun.core import distributed, memory
from metarun.core.nested import flat
from metarun.core.once import warn_once
from metarun.core.settings import EvalSettings, TrainSettings
from metarun.core.sizes import Range, least, varies
from metarun.core.types import (
    BackboneSetup,
    LearnedState,
    Parts,
    Record,
    SourceSetup,
    Split,
    VaryingSize,
)
from metarun.execution.allocator import keep_large_blocks
from metarun.runs.folder import RunFolder

if TYPE_CHECKING:
    import torch

    from metarun.algorithms.base import Algorithm, LearnerSetup
    from metarun.core.types import EpisodeSource
    from metarun.trackers.base import Tracker


@dataclass(frozen=True)
class Experiment:
    """The components of a run, built and checked against each other.

    Attributes:
        algorithm: The learner, on its device and in its precision.
        source: The data set.
        train, eval: Settings of the trainer.
        run_info: Facts for the records: names, sizes, seed, device, engine, ….
        record: The configuration with automatic values resolved, to store as `config.yaml`.
        seed: Seed of the run.
    """

    algorithm: Algorithm
    source: EpisodeSource
    train: TrainSettings
    eval: EvalSettings
    run_info: Config
    record: Config
    seed: int


def build_experiment(
    config: Mapping[str, Any], source: EpisodeSource | None = None, *, fresh: bool = True
) -> Experiment:
    """Build the components of a run; write nothing to disk.

    Args:
        config: A resolved configuration, as stored in a run folder.
        source: The data set if it is there already, such as that of `recorded_source`; nothing is
            trained then. None builds it.
        fresh: Whether the run begins. If not, a checkpoint replaces all parameters: weights that
            the run began with (`init`, `backbone.weights`) are not read again.

    Raises:
        ValueError: The configuration is invalid, or its components do not fit together.
    """
    from metarun.evaluation.measures import chosen

    settings = check_config(config)
    trains = source is None
    source = source or _source(settings)
    if source.spec.kind == "classification":
        for key, way in (("way", settings.way), ("train.way", settings.train.way)):
            if least(way) < 2 and source.spec.streams is None:
                raise ValueError(f"{key}={way} is out of range: classification needs 2 or more")
    if settings.eval.views > 1 and len(source.spec.input_shape) != 3:
        raise ValueError(
            f"eval.views={settings.eval.views} needs images, but data={settings.names['data']} "
            "has none: use eval.views=1"
        )
    for path in settings.eval.measures:
        locate("eval.measures", path)
    chosen(settings.eval.measures)
    if settings.eval.temperature == "val" and (
        source.spec.kind != "classification" or source.spec.streams is not None
    ):
        raise ValueError(
            f"eval.temperature=val needs episodes of classification, which "
            f"data={settings.names['data']} has not: use eval.temperature=none"
        )
    proficiency = settings.eval.proficiency
    if proficiency is not None and source.spec.kind == "classification" and proficiency > 1.0:
        raise ValueError(
            f"eval.proficiency={proficiency}: expected an accuracy as a fraction, 1 or less"
        )
    device = source.device
    if device.type == "cpu":
        keep_large_blocks()
        if trains:
            _check_memory(settings, source)
    backbone = _backbone(settings, source, fresh=fresh)
    algorithm = _algorithm(settings, source, backbone, fresh=fresh)
    if isinstance(backbone, Initialized):
        backbone.load_again()
    algorithm = algorithm.to(device, _dtype(settings))
    for key, shot, rule in (
        ("shot", settings.shot, settings.sizes),
        ("train.shot", settings.train.shot, settings.train.sizes),
    ):
        needed = algorithm.capabilities.least_shot
        if (least(shot) if rule is None else 1) < needed:
            name = settings.names["algo"]
            typed = f"{key}={shot}" if rule is None else f"{key.replace('shot', 'sizes')}={rule}"
            raise ValueError(f"{typed} is out of range: algo={name} needs {needed} or more shots")
    train = _training(settings, algorithm)
    engine = algorithm.resolved_engine().describe()
    record = {**config, **engine, "device": str(device)}
    record["train"] = {**config["train"], "steps": train.steps}
    # Options that the data set has worked out from its files.
    record["data"] = {**config["data"], **getattr(source, "resolved_options", {})}
    for net in algorithm.modules():
        # How a backbone prepares images may follow from its weights.
        record["backbone"] = {**record["backbone"], **getattr(net, "resolved_options", {})}
    run_info: Config = {
        **settings.names,
        **_size_info(settings, source),
        "seed": settings.seed,
        "bn": settings.bn,
        "precision": settings.precision,
        "device": str(device),
        **engine,
    }
    # Two folders, or two sets of torchvision, have the same name of `data`.
    which = {key: config["data"].get(key) for key in ("root", "name", "file", "classes")}
    run_info["data_options"] = {key: value for key, value in which.items() if value is not None}
    if isinstance(backbone, Initialized):
        if "tensors" not in backbone.record:
            name = settings.names["algo"]
            raise ValueError(f"init={settings.init}: algo={name} has no network of the backbone")
        run_info["init"] = backbone.record
    # The source may have lowered the ways on meta-val; the records hold the actual number.
    evaluation = settings.eval
    if settings.sizes is None and not varies(settings.way):
        evaluation = replace(settings.eval, val_way=source.sizes["val"].way)
    return Experiment(algorithm, source, train, evaluation, run_info, record, settings.seed)


def _size_info(settings: Settings, source: EpisodeSource) -> Record:
    """Return the size of the test's tasks; with a rule, its limits."""
    if settings.sizes is None:
        return {"way": settings.way, "shot": settings.shot, "query": settings.query}
    size = source.sizes["test"]
    numbers = {"way": Range(5, size.way), "shot": Range(1, 500), "query": Range(1, size.query)}
    return {"sizes": settings.sizes, **{name: own.typed for name, own in numbers.items()}}


def _check_memory(settings: Settings, source: EpisodeSource) -> None:
    """Refuse batches of tasks whose rows alone exceed the memory of this machine."""
    together = min(settings.eval.tasks_per_batch, settings.eval.episodes)
    batches: dict[Split, tuple[str, int]] = {
        "train": ("train.tasks_per_step", settings.train.tasks_per_step),
        "test": ("eval.tasks_per_batch", together),
    }
    for split, (key, tasks) in batches.items():
        size = source.sizes[split]
        rows = size.way * (size.shot + size.query)
        memory.check_fits(
            4 * tasks * rows * math.prod(source.spec.input_shape),
            f"{key}={tasks} tasks of {rows} rows",
            f"lower {key}, way, shot or query",
        )


def check_shares(experiment: Experiment, processes: int | None = None) -> None:
    """Check that the tasks of an update can be divided among the processes.

    Args:
        experiment: The run.
        processes: Number of its processes; None for those of the present run.

    Raises:
        ValueError: There are more processes than tasks, or the algorithm needs the whole batch.
    """
    train, number = experiment.train, processes or distributed.size()
    if number == 1 or not train.steps:
        return
    if train.tasks_per_step < number:
        raise ValueError(
            f"train.tasks_per_step={train.tasks_per_step} is fewer than the {number} processes: "
            "expected at least one task for each process"
        )
    why = experiment.algorithm.capabilities.needs_whole_batch
    if why is not None:
        name = experiment.run_info["algo"]
        raise ValueError(f"algo={name} cannot share its tasks over {number} processes: {why}")


def _training(settings: Settings, algorithm: Algorithm) -> TrainSettings:
    """Return the training settings, with zero steps if the algorithm does not meta-train.

    Raises:
        ValueError: The algorithm meta-trains and `train.steps` is 0.
    """
    if not algorithm.capabilities.meta_trains:
        return replace(settings.train, steps=0)
    if not settings.train.steps:
        raise ValueError(
            f"train.steps=0: algo={settings.names['algo']} needs meta-training: expected 1 or more"
        )
    return settings.train


def build_trackers(config: Mapping[str, Any]) -> dict[str, Tracker]:
    """Build the trackers of a configuration; none of them opens a connection or a file yet.

    They are not part of `build_experiment`, so that a run can be loaded and tested on a machine
    where its trackers are not installed.

    Raises:
        ValueError: An option is invalid, or a package is missing.
    """
    made: dict[str, Tracker] = {}
    for name, node in (check_config(config).logger or {}).items():
        made[name] = _component(f"logger.{name}", node)()
    return made


def build_source(config: Mapping[str, Any]) -> EpisodeSource:
    """Build only the data set of a configuration.

    Raises:
        ValueError: The configuration is invalid, or the data are missing.
    """
    return _source(check_config(config))


def options_in_files(data: Mapping[str, Any]) -> Sequence[str]:
    """Return the options of a data set that its class works out from files where they are null.

    Args:
        data: The node `data` of a configuration.

    Raises:
        ValueError: There is no such class, or it may not be imported, see `locate`.
    """
    found: Sequence[str] = getattr(locate("data._target_", data["_target_"]), "found_in_files", ())
    return found


def recorded_source(config: Mapping[str, Any], record: Record, file: Path) -> EpisodeSource | None:
    """Build the data set of a run from its record alone; it prepares images and has no tasks.

    Args:
        config: Configuration of the run.
        record: Its record of the data.
        file: File of the record, for messages.

    Returns:
        The data set; None if the record does not suffice and the data are needed.

    Raises:
        ValueError: The configuration is invalid, or the record is damaged.
    """
    from metarun.data.recorded import Recorded, suffices

    settings = check_config(config)
    device, dtype = _device(settings.device), _dtype(settings)
    try:
        return Recorded(record, device, dtype) if suffices(record) else None
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged, {error}: remove it to load the run by its data"
        ) from error


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
        # Overrides the configured number: a resumed run has stored that of its first process.
        device = torch.device("cuda", local)
        if torch.cuda.device_count() < distributed.local_size():
            raise ValueError(
                f"device={name}: {distributed.local_size()} processes need one GPU each, but this "
                f"machine has {torch.cuda.device_count()}: start fewer or use device=cpu"
            )
        torch.cuda.set_device(device)
    if not torch.cuda.is_available():
        raise ValueError(f"device={name}: no GPU is available here: use device=cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={name}: this machine has {torch.cuda.device_count()} GPUs, counted from cuda:0"
        )
    return device


def _algorithm(
    settings: Settings, source: EpisodeSource, backbone: Callable[..., Any], *, fresh: bool
) -> Algorithm:
    import torch

    from metarun.algorithms.base import LearnerSetup
    from metarun.backbones.network import set_mixed
    from metarun.execution.engine import Engine

    optim = _component("optim", settings.optim)
    # Checks the options, which a learner that only adapts never reads.
    optim([("parameter", torch.nn.Parameter(torch.zeros(1)))])
    setup = LearnerSetup(
        spec=source.spec,
        backbone=backbone,
        optim=optim,
        engine=Engine(
            settings.engine, settings.tasks_per_chunk, settings.threads, graph=settings.graph
        ),
        bn=settings.bn,
        eval_inner_steps=settings.eval.inner_steps,
        seed=settings.seed,
    )
    make = _component("algo", settings.algo, setup)
    # The initial parameters depend on the seed alone, not on earlier random draws.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        try:
            algorithm: Algorithm = make()
        except (RuntimeError, MemoryError) as error:
            if (short := memory.shortage(error)) is None:
                raise
            raise ValueError(f"{short}: lower {_largest(settings)}") from error
    _test_foreign(algorithm, settings)
    _choose_graph(algorithm, settings, fresh=fresh)
    _choose_threads(algorithm, settings)
    if settings.precision == "mixed" and not set_mixed(algorithm):
        raise ValueError(
            "precision=mixed needs a network (metarun.backbones.network.Network), but "
            f"algo={settings.names['algo']} has none: use precision=float32"
        )
    return algorithm


def _largest(settings: Settings) -> str:
    """Return the largest number of the learner and its network, as KEY=VALUE."""
    nodes = flat({"algo": settings.algo, "backbone": settings.backbone})
    numbers = {
        key: [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]
        for key, value in nodes.items()
    }
    key = max(numbers, key=lambda key: max(numbers[key], default=0))
    return f"{key}={nodes[key]}".replace(" ", "")


def _backbone(settings: Settings, source: EpisodeSource, *, fresh: bool) -> Callable[..., Any]:
    """Return the factory of the networks, from one of our classes or from any `nn.Module`."""
    from metarun.backbones.adapter import AnyBackbone

    node = settings.backbone
    moments = getattr(getattr(source, "preparation", None), "moments", None)
    own = _component("backbone", node, BackboneSetup(moments, fresh))
    make: Callable[..., Any] = own
    if not is_ours(own.func):
        make = AnyBackbone(node["_target_"], own, node.get("_without_"))
    if settings.init is None or not fresh:
        return make
    return Initialized(make, settings.init, strict=settings.init_strict)


_NO_OPTIONS = ("_target_", "_partial_", "_without_")

_REASONS: dict[str, str | None] = {}
"""Results of `reason_for_loop` by network."""


def _test_foreign(algorithm: Algorithm, settings: Settings) -> None:
    """Run tasks in a loop, and say why, if `torch.vmap` is wrong for a network that is not ours."""
    from metarun.algorithms.common.episodic import EpisodicLearner
    from metarun.execution.vmap_check import reason_for_loop

    if (algorithm.engine.kind, algorithm.engine.graph) == ("loop", "none"):
        return
    for net in algorithm.modules():
        shape = getattr(net, "foreign_input", None)
        if shape is None:
            continue
        sizes = [list(parameter.shape) for parameter in net.parameters()]
        adapts = not isinstance(algorithm, EpisodicLearner)
        key = json.dumps([settings.backbone, shape, sizes, adapts])
        if key not in _REASONS:
            _REASONS[key] = reason_for_loop(net, shape, adapts=adapts)
        if _REASONS[key] is not None:
            name = settings.names["backbone"]
            warn_once(f"backbone={name} takes engine=loop: {_REASONS[key]}")
            _set_engine(algorithm, kind="loop", graph="none")


_STEPS_TO_COMPILE = 50_000
"""Number of updates from which on a compilation pays: it takes 15 s, and saves half a millisecond
of each update of a small network (measured with MAML on sinusoids)."""

_SMALL_DENSE = 20_000
"""Number of parameters up to which a dense network is computed by one thread."""


def _choose_graph(algorithm: Algorithm, settings: Settings, *, fresh: bool) -> None:
    """Decide whether `graph=auto` compiles the training step.

    It depends on the request and the machine alone, so that a repeated run computes the same. A run
    that continues keeps what it began with.

    Raises:
        ValueError: There is no compiler, and one is needed.
    """
    if not fresh or _device(settings.device).type != "cpu":
        return
    dense = _is_dense(algorithm)
    separate = algorithm.spec.streams is None and settings.precision == "float32"
    long = settings.train.steps >= _STEPS_TO_COMPILE and settings.train.rehearse is None
    # The engine has no graph any more if a network has to run in a loop.
    pays = algorithm.engine.graph == "auto" and dense and separate and long
    if not pays and settings.graph != "compile":
        return
    if not (shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")):
        if settings.graph == "compile":
            raise ValueError("graph=compile needs a C++ compiler, such as g++: use graph=replay")
    elif pays:
        _set_engine(algorithm, graph="compile")


def _choose_threads(algorithm: Algorithm, settings: Settings) -> None:
    """Set the number of threads of torch's operators in this process.

    More than one make small dense networks no faster, but keep a second core busy.
    """
    import torch

    most, threads = _default_threads(), settings.threads
    size = sum(parameter.numel() for parameter in algorithm.parameters())
    small = _is_dense(algorithm) and 0 < size <= _SMALL_DENSE
    if threads is None and small and _device(settings.device).type == "cpu":
        threads = 1
        _set_engine(algorithm, threads=1)
    torch.set_num_threads(threads or most)


@functools.cache
def _default_threads() -> int:
    import torch

    return torch.get_num_threads()


def _is_dense(algorithm: Algorithm) -> bool:
    return not any(parameter.dim() > 2 for parameter in algorithm.parameters())


def _set_engine(algorithm: Algorithm, **changes: Any) -> None:
    """Change the engine of an algorithm, and of those that it is made of."""
    from metarun.algorithms.base import Algorithm

    for part in algorithm.modules():
        if isinstance(part, Algorithm):
            part.engine = replace(part.engine, **changes)


def _source_key(settings: Settings) -> str:
    """Return all arguments of a source as a string, the key of its cache."""
    train, val_way = settings.train, settings.eval.val_way
    own = settings.shot, settings.query, settings.sizes
    sizes: dict[str, list[Any]] = {
        # Evaluation first, so that an error names `way`, not `train.way`.
        "val": [settings.way if val_way is None else val_way, *own],
        "test": [settings.way, *own],
        "train": [train.way, train.shot, train.query, train.sizes],
    }
    varying = [split for split, own in sizes.items() if own[3] or any(map(varies, own[:3]))]
    if varying:
        target = locate("data._target_", settings.data["_target_"])
        if not getattr(target, "sizes_may_vary", False):
            name = settings.names["data"]
            raise ValueError(
                f"{_first_varying(sizes[varying[-1]])}: the tasks of data={name} have one size: "
                "expected one number for way, shot and query"
            )
    return json.dumps(
        {
            "data": settings.data,
            "sizes": sizes,
            "varying": varying,
            "tasks_per_step": train.tasks_per_step,
            "seed": settings.seed,
            "eval_seed": settings.eval.seed,
            "val_way": val_way,
        }
    )


def _first_varying(size: Sequence[Any]) -> str:
    """Return what makes a size vary, as a user typed it."""
    named = dict(zip(("way", "shot", "query", "sizes"), size, strict=True))
    if named["sizes"] is not None:
        return f"sizes={named['sizes']}"
    return next(f"{key}={own}" for key, own in named.items() if own is not None and varies(own))


# Size one: the check before a run and the run share a source, and large sources are freed.
@functools.lru_cache(maxsize=1)
def _cached_source(key: str, device: torch.device, dtype: torch.dtype) -> EpisodeSource:
    made_of = json.loads(key)
    drawn: dict[Split, VaryingSize] = {
        split: VaryingSize(
            Range.of("way", way), Range.of("shot", shot), Range.of("query", query), rule
        )
        for split, (way, shot, query, rule) in made_of["sizes"].items()
    }
    setup = SourceSetup(
        sizes={split: size.largest for split, size in drawn.items()},
        seed=made_of["seed"],
        eval_seed=made_of["eval_seed"],
        device=device,
        dtype=dtype,
        val_way=made_of["val_way"],
        varying={split: size for split, size in drawn.items() if split in made_of["varying"]},
        tasks_per_step=made_of["tasks_per_step"],
    )
    source: EpisodeSource = _component("data", made_of["data"], setup)()
    return source


def _component(
    name: str,
    node: Mapping[str, Any],
    setup: LearnerSetup | SourceSetup | BackboneSetup | None = None,
) -> functools.partial[Any]:
    """Return the class of a node with its options bound, checked against its signature.

    Args:
        name: Key of the node, for messages.
        node: `_target_` and the options.
        setup: What the class takes besides its options, as its first argument.

    Raises:
        ValueError: The class cannot be imported or does not take the setup, or an option is
            unknown or of the wrong type.
    """
    node = without_places(name, node)
    target = locate(f"{name}._target_", node["_target_"])
    hints = option_hints(name, node)
    given = {} if setup is None else {"setup": setup}
    if name == "backbone" and not (is_ours(target) and "setup" in hints):
        given = {}
    elif name != "backbone" and given and not _takes_setup(target):
        raise ValueError(
            f"{name}._target_={node['_target_']}: expected a constructor of the form "
            "def __init__(self, setup, *, …), which calls super().__init__(setup)"
        )
    # A user's constructor of a network may hand its **kwargs to any other one.
    passes_on = name == "backbone" and takes_any_keyword(target)
    known = {key: hint for key, hint in hints.items() if key not in given}
    own = {key: value for key, value in node.items() if key not in _NO_OPTIONS}
    more = {key: own.pop(key) for key in list(own) if passes_on and key not in known}
    return functools.partial(target, **_options(name, own, known), **more, **given)


def _options(name: str, node: Mapping[str, Any], hints: Mapping[str, Any]) -> Config:
    """Return the options of a node, each converted to the type of its hint.

    Raises:
        ValueError: An option is unknown or of the wrong type.
    """
    options: Config = {}
    for key, value in node.items():
        if key not in hints:
            raise unknown_key(f"{name}.{key}", [f"{name}.{other}" for other in hints])
        hint, path = hints[key], f"{name}.{key}"
        if LearnedState in typing.get_args(hint):
            options[key] = None if value is None else _learned_state(path, value)
        elif _names_a_function(hint):
            options[key] = None if value is None else locate(path, str(value))
        elif Parts in typing.get_args(hint):
            nodes = convert(path, value or {}, Mapping[str, Any])
            made = {name: _component(f"{path}.{name}", own) for name, own in nodes.items()}
            options[key] = Parts(made) if value else None
        elif _names_a_class(hint):
            options[key] = locate(path, str(value), *typing.get_args(hint))
        elif inspect.isclass(hint) and dataclasses.is_dataclass(hint):
            below = convert(path, value, Mapping[str, Any])
            options[key] = hint(**_options(path, below, typing.get_type_hints(hint)))
        else:
            options[key] = convert(path, value, hint)
            check_numbers(path, options[key])
    return options


def option_hints(name: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a node accepts, with their type hints.

    They are the keywords of its class. If an option is itself a class (such as the learner
    that MetaGAN holds), the keywords of that class are accepted in the same node.
    """
    hints = keywords(locate(f"{name}._target_", node["_target_"]))
    for key, hint in list(hints.items()):
        if _names_a_class(hint) and key in node:
            option = locate(f"{name}.{key}", str(node[key]), *typing.get_args(hint))
            hints = {**keywords(option), **hints}
    return hints


def _learned_state(key: str, run: Any) -> LearnedState:
    """Load the learned state of another run.

    Raises:
        ValueError: The folder is not a run with checkpoints.
    """
    found = RunFolder(Path(str(run))).load_learned()
    if found is None:
        raise ValueError(f"{key}={run}: expected the folder of a run with checkpoints")
    return LearnedState(str(run), found[1]["state"])


def _names_a_class(hint: Any) -> bool:
    return typing.get_origin(hint) is type


def _names_a_function(hint: Any) -> bool:
    """Whether the value of an option is the dotted name of a class or function."""
    return any(typing.get_origin(h) is Callable for h in (hint, *typing.get_args(hint)))


def keywords(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the keywords that a constructor accepts, with their type hints.

    The keywords behind `**options` are those of the base classes that it is passed to.
    """
    found: dict[str, Any] = {}
    for init in _initializers(target):
        try:
            hints = typing.get_type_hints(init)
        except Exception:  # Without the hint, the value of an option is not checked.
            hints = {}
        for parameter in inspect.signature(init).parameters.values():
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                found.setdefault(parameter.name, hints.get(parameter.name, Any))
    found.pop("self", None)
    return found


def _takes_setup(target: Callable[..., Any]) -> bool:
    """Return whether the first argument of a constructor, after `self`, is the setup."""
    return "setup" in list(inspect.signature(_initializers(target)[0]).parameters)[:2]


def takes_any_keyword(target: Callable[..., Any]) -> bool:
    """Return whether a constructor hands unknown keywords to something that is not a base class."""
    return _takes_more(_initializers(target)[-1])


def _initializers(target: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return a constructor, and those of the base classes that its `**options` is passed to."""
    found: list[Any] = [target]
    if inspect.isclass(target):
        found = [c.__dict__["__init__"] for c in target.__mro__ if "__init__" in c.__dict__]
    for number, init in enumerate(found):
        if not _takes_more(init):
            return found[: number + 1]
    return found


def _takes_more(init: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(init).parameters.values())
