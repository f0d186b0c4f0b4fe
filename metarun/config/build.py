"""What a configuration may say, where conf/ is, and how the parts of a run are made.

A configuration is a plain, resolved dictionary here, as it stands in a run's `config.yaml`.
`check` needs no torch; `build` is the only place that instantiates components.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, cast

from metarun.core import distributed
from metarun.core.settings import EvalSettings, Published, SweepSettings, TrainSettings
from metarun.execution.allocator import keep_large_blocks

if TYPE_CHECKING:
    import torch

    from metarun.algorithms.base import Algorithm
    from metarun.core.types import EpisodeSource
    from metarun.trackers.base import Tracker

Plain = dict[str, Any]

NODES = ("algo", "data", "backbone", "optim")
"""The nodes that name a class and its options."""

_LARGEST = 2**31 - 1
_BOUNDS: dict[str, tuple[int, int]] = {
    "way": (1, _LARGEST),
    "shot": (1, _LARGEST),
    "query": (1, _LARGEST),
    "seed": (0, 2**63 - 1),
    "tasks_per_chunk": (1, _LARGEST),
    "threads": (1, 1024),
    # Learners that live along a stream from the start train on nothing before.
    "train.steps": (0, _LARGEST),
    "train.tasks_per_step": (1, _LARGEST),
    "train.way": (1, _LARGEST),
    "train.shot": (1, _LARGEST),
    # Reptile learns from support rows alone.
    "train.query": (0, _LARGEST),
    "train.log_every": (1, _LARGEST),
    "train.eval_every": (1, _LARGEST),
    "train.checkpoint_every": (1, _LARGEST),
    # One episode has no interval.
    "eval.episodes": (2, _LARGEST),
    "eval.val_episodes": (2, _LARGEST),
    "eval.val_way": (1, _LARGEST),
    "eval.inner_steps": (0, _LARGEST),
    "eval.curve_steps": (0, _LARGEST),
    "eval.tasks_per_batch": (1, _LARGEST),
    "eval.views": (1, 1000),
    "eval.seed": (0, 2**63 - 1),
}
"""Least and greatest value of every whole number."""

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Settings:
    """The typed root of a configuration.

    Attributes:
        algo, data, backbone, optim: `_target_` and options of a component.
        way, shot, query: Size of a task at evaluation.
        seed: Of the initial parameters, the training tasks and every other draw of a run.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: Of parameters and data; `mixed` is float32 with networks that compute in
            bfloat16.
        bn: Where batch norm takes its statistics from at evaluation.
        engine, tasks_per_chunk, threads, graph: How the tasks of a batch run.
        train, eval: See `TrainSettings` and `EvalSettings`.
        names: The words chosen for `algo`, `data` and `backbone`, for the records.
        debug: Show where an error came from.
        sweep: See `SweepSettings`.
        published: What a paper reports for these very settings.
        logger: `_target_` and options of each tracker, by its name.
        resume, test: Always None here: they are requests about another run.
    """

    algo: Plain
    data: Plain
    backbone: Plain
    optim: Plain
    way: int
    shot: int
    query: int
    seed: int
    device: str
    precision: Literal["float32", "float64", "mixed"]
    bn: Literal["transductive", "support", "running"]
    engine: Literal["auto", "vmap", "loop", "threads"]
    tasks_per_chunk: int | None
    threads: int | None
    graph: Literal["auto", "none", "replay", "compile"]
    train: TrainSettings
    eval: EvalSettings
    names: dict[str, str]
    debug: bool = False
    sweep: SweepSettings | None = None
    published: Published | None = None
    logger: Plain | None = None
    resume: str | None = None
    test: str | None = None


@dataclass(frozen=True)
class Experiment:
    """The parts of a run, made and checked against each other.

    Attributes:
        algorithm: On its device, in its precision.
        source: The data set.
        train, eval: The trainer's settings.
        facts: What the records say of the run: names, sizes, seed, device, engine …
        record: The configuration with everything settled, to store as `config.yaml`.
    """

    algorithm: Algorithm
    source: EpisodeSource
    train: TrainSettings
    eval: EvalSettings
    facts: Plain
    record: Plain
    seed: int


def conf_dir() -> Path:
    """The folder of YAML files: the repository's where there is one, else the package's."""
    package = Path(__file__).resolve().parents[1]
    repository = package.parent
    if (repository / "pyproject.toml").is_file() and (repository / "conf/config.yaml").is_file():
        return repository / "conf"
    return package / "conf"


def nearest(word: str, known: Iterable[str]) -> str:
    """A question after the nearest spelling, or nothing where nothing is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f": did you mean {found[0]}?" if found else ""


def unknown_key(key: str, known: Sequence[str]) -> ValueError:
    """The error for a key that does not exist, with the one that was probably meant."""
    leaf = key.rpartition(".")[2]
    same_leaf = [other for other in known if other.rpartition(".")[2] == leaf]
    hint = f": did you mean {' or '.join(same_leaf[:3])}?" if same_leaf else ""
    # A key is never meant as the node that it is in.
    others = [other for other in known if not key.startswith(f"{other}.")]
    if not same_leaf and others:
        likeness, _, best = max((*_likeness(key, other), other) for other in others)
        hint = f": did you mean {best}?" if likeness > 0.6 else ""
    return ValueError(f"there is no key {key}{hint or ' (`metarun --cfg job` lists them)'}")


def _likeness(key: str, other: str) -> tuple[float, float]:
    """Of two dotted keys, by their last words or as a whole, and as a whole; in [0, 1]."""
    whole = difflib.SequenceMatcher(None, key, other).ratio()
    last = difflib.SequenceMatcher(None, key.rpartition(".")[2], other.rpartition(".")[2]).ratio()
    return max(whole, last), whole


def check(plain: Mapping[str, Any]) -> Settings:
    """Check keys, types and ranges; imports no torch.

    Raises:
        ValueError: The first thing that is wrong, by its key.
    """
    settings: Settings = _structure("", plain, Settings)
    for key, (least, greatest) in _BOUNDS.items():
        value = functools.reduce(getattr, key.split("."), cast(Any, settings))
        if value is not None and not least <= value <= greatest:
            expected = f"{least} or more" if value < least else f"at most {greatest}"
            raise ValueError(f"{key}={value} is out of range: expected {expected}")
    threshold = settings.eval.proficiency
    if threshold is not None and not 0.0 < threshold < math.inf:
        raise ValueError(f"eval.proficiency={threshold}: expected a positive number")
    if not _DEVICE.fullmatch(settings.device):
        raise ValueError(
            f"device={settings.device}: expected auto, cpu, cuda or cuda:N with a number N"
        )
    for name in NODES:
        if not isinstance(getattr(settings, name).get("_target_"), str):
            raise ValueError(f"{name}._target_ is missing: it names the class to make")
    for name, node in (settings.logger or {}).items():
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise ValueError(f"logger.{name}._target_ is missing: it names the class to make")
    return settings


def build(plain: Mapping[str, Any]) -> Experiment:
    """Make the parts of a run, and nothing on disk.

    Args:
        plain: A resolved configuration, as stored in a run folder.

    Raises:
        ValueError: Something is wrong in the configuration, or its parts do not suit each other.
    """
    settings = check(plain)
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
    engine = algorithm.settled_engine().describe()
    record = {**plain, **engine, "device": str(device)}
    record["train"] = {**plain["train"], "steps": train.steps}
    facts = {
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
    return Experiment(algorithm, source, train, evaluation, facts, record, settings.seed)


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
        name = experiment.facts["algo"]
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


def trackers(plain: Mapping[str, Any]) -> dict[str, Tracker]:
    """Make the trackers of a configuration, none of which opens anything yet.

    They are no part of `build`: a run is read, and tested, where its trackers are not installed.

    Raises:
        ValueError: An option is wrong, or a package is missing.
    """
    from metarun.trackers.base import Tracker

    made: dict[str, Tracker] = {}
    for name, node in (check(plain).logger or {}).items():
        made[name] = _component(f"logger.{name}", node)()
        if not isinstance(made[name], Tracker):
            raise ValueError(
                f"logger.{name}._target_={node['_target_']} is not a subclass of metarun's Tracker"
            )
    return made


def source(plain: Mapping[str, Any]) -> EpisodeSource:
    """Make the data set of a configuration alone.

    Raises:
        ValueError: Something is wrong in the configuration, or the data are not here.
    """
    return _source(check(plain))


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

    facts = json.loads(key)
    injected = {
        "sizes": {split: EpisodeSize(*size) for split, size in facts["sizes"].items()},
        "seed": facts["seed"],
        "eval_seed": facts["eval_seed"],
        "val_way": facts["val_way"],
        "device": device,
        "dtype": dtype,
    }
    source: EpisodeSource = _component("data", facts["data"], injected)()
    return source


def _component(
    name: str, node: Mapping[str, Any], injected: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The class of a node with its options filled in, checked against its signature."""
    target = locate(f"{name}._target_", node["_target_"])
    hints = keywords(target)
    given = injected or {}
    for key in given:
        if key not in hints:
            raise ValueError(
                f"{node['_target_']} does not take {key}: let its constructor accept **common "
                "and hand it to super().__init__"
            )
    options: Plain = {}
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        if key not in hints or key in given:
            known = [f"{name}.{other}" for other in hints if other not in given]
            raise unknown_key(f"{name}.{key}", known)
        options[key] = convert(f"{name}.{key}", value, hints[key])
    return functools.partial(target, **options, **given)


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
    return cast(Callable[..., Any], found)


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


def convert(key: str, value: Any, hint: Any) -> Any:
    """A value from a configuration as the type that a hint asks for.

    Raises:
        ValueError: It is not of that type; the message names the key and the type.
    """
    try:
        return _convert(value, hint)
    except TypeError:
        typed = "null" if value is None else json.dumps(value) if _nested(value) else value
        typed = str(typed).lower() if isinstance(typed, bool) else typed
        raise ValueError(f"{key}={typed}: expected {describe(hint)}") from None


def _convert(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args)
    if origin is Literal:
        return value if value in args else _refuse()
    if origin is tuple and args[-1:] != (...,):
        items = _items(value)
        return tuple(map(_convert, items, args)) if len(items) == len(args) else _refuse()
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Mapping):
        return value if isinstance(value, dict) else _refuse()
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence):
        converted = [_convert(item, args[0]) for item in _items(value)]
        return tuple(converted) if origin is tuple else converted
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (bool, int, float, str, types.NoneType):
        wanted = types.NoneType if hint is None else hint
        return value if type(value) is wanted else _refuse()
    return value


def _convert_union(value: Any, options: tuple[Any, ...]) -> Any:
    for option in options:
        try:
            return _convert(value, option)
        except TypeError:
            continue
    return _refuse()


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else _refuse()


def _refuse() -> NoReturn:
    raise TypeError


def _nested(value: Any) -> bool:
    return isinstance(value, (list, dict))


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "null",
}


def describe(hint: Any) -> str:
    """A type hint in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, args))
    if origin is Literal:
        words = [str(word) for word in args]
        return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
    if origin is tuple and args[-1:] != (...,):
        return f"a list of {len(args)}, as [{','.join(map(describe, args))}]"
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Mapping):
        return "keys and values"
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence):
        return f"a list, each item {describe(args[0])}"
    if is_dataclass(hint):
        return "keys and values"
    return getattr(hint, "__name__", str(hint))


def _structure(prefix: str, plain: Any, kind: Any) -> Any:
    """A dataclass from a dictionary, recursively; `prefix` is its own key."""
    if not isinstance(plain, Mapping):
        raise ValueError(f"{prefix}={plain}: expected keys and values, as {prefix}.key=value")
    given = cast("Mapping[str, Any]", plain)
    hints = typing.get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    dotted = prefix + "." if prefix else ""
    for key in given:
        if key not in known:
            raise unknown_key(f"{dotted}{key}", [dotted + other for other in known])
    values: Plain = {}
    for field in fields(kind):
        key, hint = f"{dotted}{field.name}", hints[field.name]
        if field.name not in given:
            # A run that is older than a setting goes on with the setting's default.
            if field.default is not MISSING:
                continue
            raise ValueError(f"{key} is missing: type {key}=…")
        values[field.name] = _typed(key, given[field.name], hint)
    return kind(**values)


def _typed(key: str, value: Any, hint: Any) -> Any:
    """A value as its hint asks for, where X, X | None or list[X] may be a dataclass X."""
    options = [option for option in (hint, *typing.get_args(hint)) if is_dataclass(option)]
    if not options or (value is None and options[0] is not hint):
        return convert(key, value, hint)
    if typing.get_origin(hint) is list:
        items = convert(key, value, list[Any])
        return [_structure(f"{key}[{i}]", item, options[0]) for i, item in enumerate(items)]
    return _structure(key, value, options[0])


def one_line(error: BaseException) -> str:
    """The message of an exception, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
