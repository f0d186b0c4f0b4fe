"""Workloads of the bench, and variants of our implementation. This module imports no torch."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from typing import Any, Literal

Method = Literal["maml", "training", "protonet", "mann", "evaluation", "sampling"]
Backbone = Literal["mlp", "conv4", "resnet12", "flat"]


@dataclass(frozen=True)
class Workload:
    """A workload, described by its sizes.

    Attributes:
        name: Name on the command line.
        about: Description in one line.
        method: Kind of step. `maml`, `protonet` and `mann` are one meta-update on given tasks;
            `training` is MAML's whole training step, with new tasks, Adam and the sums of the
            metrics; `evaluation` is MAML's predictions for test episodes; `sampling` creates a
            batch of episodes.
        backbone: Network.
        tasks: Tasks per batch, or episodes of an evaluation.
        way, shot, query: Classes per task, and support and query rows per class.
        steps: Inner steps.
        first_order: Whether inner gradients are constants.
        channels, image: Channels and side length of an image; unused by `mlp`.
        filters: Channels of each convolution of `conv4`, or of the first block of `resnet12`.
        inner_lr: Inner learning rate.
        updates: Training steps of one call; times are those of one step.
        slow: Whether the workload runs only if it is named.
    """

    name: str
    about: str
    method: Method
    backbone: Backbone
    tasks: int
    way: int = 5
    shot: int = 1
    query: int = 1
    steps: int = 1
    first_order: bool = False
    channels: int = 1
    image: int = 28
    filters: int = 64
    inner_lr: float = 0.1
    updates: int = 1
    slow: bool = False

    @property
    def support_rows(self) -> int:
        return self.way * self.shot

    @property
    def query_rows(self) -> int:
        return self.way * self.query

    @property
    def small(self) -> Workload:
        """The same workload on two tasks with one query per class, for exact comparisons."""
        return replace(self, tasks=min(2, self.tasks), query=1)


WORKLOADS: tuple[Workload, ...] = (
    Workload(
        "sinusoid", "MAML, MLP 40-40 on sinusoids: 25 tasks, 10+10 points, 1 step",
        "maml", "mlp", 25, way=1, shot=10, query=10, inner_lr=0.01,
    ),
    Workload(
        "sinusoid-training", "the same with new tasks, Adam and metrics: whole training steps",
        "training", "mlp", 25, way=1, shot=10, query=10, inner_lr=0.01, updates=100,
    ),
    Workload(
        "conv4-1", "MAML, Conv4-64, 28x28: 32 tasks, 5+5 images, 1 step",
        "maml", "conv4", 32,
    ),
    Workload(
        "conv4-15", "MAML, Conv4-64, 28x28: 32 tasks, 5+75 images, 1 step",
        "maml", "conv4", 32, query=15,
    ),
    Workload(
        "conv4-1-5steps", "MAML, Conv4-64, 28x28: 32 tasks, 5+5 images, 5 steps",
        "maml", "conv4", 32, steps=5,
    ),
    Workload(
        "conv4-15-5steps", "MAML, Conv4-64, 28x28: 32 tasks, 5+75 images, 5 steps",
        "maml", "conv4", 32, query=15, steps=5, slow=True,
    ),
    Workload(
        "mini", "MAML, Conv4-32, 84x84x3: 4 tasks, 25+75 images, 5 steps",
        "maml", "conv4", 4, shot=5, query=15, steps=5, channels=3, image=84, filters=32,
        inner_lr=0.01, slow=True,
    ),
    Workload(
        "mini-first", "first-order MAML, Conv4-32, 84x84x3: 4 tasks, 25+75 images, 5 steps",
        "maml", "conv4", 4, shot=5, query=15, steps=5, first_order=True, channels=3, image=84,
        filters=32, inner_lr=0.01, slow=True,
    ),
    Workload(
        "protonet", "ProtoNet, Conv4-64, 28x28: 8 tasks, 25+75 images",
        "protonet", "conv4", 8, shot=5, query=15,
    ),
    Workload(
        "protonet-resnet12", "ProtoNet, ResNet-12, 84x84x3: 1 task, 25+75 images",
        "protonet", "resnet12", 1, shot=5, query=15, channels=3, image=84, slow=True,
    ),
    Workload(
        "mann", "MANN on pixels, 20x20: 16 sequences of 5 classes, 10 images of each",
        "mann", "flat", 16, shot=9, image=20,
    ),
    Workload(
        "evaluation", "MAML's answers to 600 episodes, Conv4-64, 28x28, 5+75 images, 1 step",
        "evaluation", "conv4", 600, query=15, slow=True,
    ),
    Workload(
        "sampling", "32 episodes of 5+75 Omniglot images, 28x28",
        "sampling", "flat", 32, query=15,
    ),
)  # fmt: skip
"""Every workload, in the order in which they are timed."""

BASELINES: dict[str, tuple[Method, ...]] = {
    "functional": ("maml", "training", "evaluation"),
    "jax": ("training",),
    "learn2learn": ("maml", "evaluation"),
    "higher": ("maml",),
    "plain": ("protonet", "mann"),
    "PIL": ("sampling",),
}
"""Baselines, and the methods for which they are available."""

GROWTH: dict[str, tuple[int, ...]] = {
    "tasks": (1, 2, 4, 8, 16, 32, 64),
    "shots": (1, 2, 5, 10, 20),
    "steps": (1, 2, 3, 5, 10),
    "image": (28, 42, 56, 70, 84),
    "processes": (1, 2, 4, 8),
}
"""Values of each size in a growth curve."""

TF32 = ("convolutions", "all", "none")
"""Which products of float32 numbers a GPU may round to TF32; the first is torch's default."""


@dataclass(frozen=True)
class Variant:
    """Options of our implementation; each field is an option of the command with its name.

    Attributes:
        engine: Argument `kind` of `Engine`.
        precision: Precision of the networks; `mixed` computes them in bfloat16.
        graph: Argument `graph` of `Engine`; `auto` resolves to `replay` in a run.
        memory: Memory option; with `lean`, each thread runs one task at a time and MAML
            recomputes its inner steps.
    """

    engine: str = field(
        default="auto", metadata={"words": ("auto", "vmap", "loop", "threads"), "keyword": "kind"}
    )
    precision: str = field(default="float32", metadata={"words": ("float32", "mixed")})
    graph: str = field(
        default="replay", metadata={"words": ("replay", "none", "compile"), "keyword": "graph"}
    )
    memory: str = field(default="plain", metadata={"words": ("plain", "lean")})

    @property
    def name(self) -> str:
        """The values that differ from the defaults; empty if none does."""
        return ", ".join(
            str(getattr(self, option.name))
            for option in fields(self)
            if getattr(self, option.name) != option.default
        )

    @property
    def engine_options(self) -> dict[str, Any]:
        """Keyword arguments of `Engine`."""
        own = asdict(self)
        chosen = {
            option.metadata["keyword"]: own[option.name]
            for option in fields(self)
            if "keyword" in option.metadata
        }
        return chosen | ({"tasks_per_chunk": 1} if self.memory == "lean" else {})


def variants(words: dict[str, Sequence[str]]) -> list[Variant]:
    """Return all combinations of the given values of the options.

    Args:
        words: Values by option name, for all options.

    Raises:
        ValueError: A value is not allowed for its option.
    """
    for option in fields(Variant):
        if not words[option.name]:
            allowed = ", ".join(option.metadata["words"])
            raise ValueError(f"--{option.name} has no value: expected {allowed}")
        for word in words[option.name]:
            known(f"--{option.name}", word, option.metadata["words"])
    names = [option.name for option in fields(Variant)]
    chosen = (dict.fromkeys(words[name]) for name in names)
    return [Variant(**dict(zip(names, one, strict=True))) for one in product(*chosen)]


def select(words: Sequence[str]) -> list[Workload]:
    """Return the workloads that match names or patterns, in the order of `WORKLOADS`.

    Without names, all workloads that are not slow are returned.

    Raises:
        ValueError: A name or pattern matches no workload.
    """
    names = [workload.name for workload in WORKLOADS]
    for word in words:
        if not fnmatch.filter(names, word):
            known("--workload", word, names)
    if not words:
        return [workload for workload in WORKLOADS if not workload.slow]
    return [w for w in WORKLOADS if any(fnmatch.fnmatchcase(w.name, word) for word in words)]


def grows(workload: Workload, size: str) -> bool:
    """Return whether a workload has a given size."""
    if size == "steps":
        return workload.method in ("maml", "training", "evaluation")
    if size == "image":
        return workload.backbone != "mlp"
    return True


def grown(workload: Workload, size: str, value: int) -> Workload:
    """Return a workload with another size; each of several processes does the same work."""
    fields_by_size: dict[str, dict[str, Any]] = {
        "tasks": {"tasks": value},
        "shots": {"shot": value},
        "steps": {"steps": value},
        "image": {"image": value},
    }
    return replace(workload, **fields_by_size.get(size, {}))


def known(option: str, word: str, allowed: Sequence[str]) -> None:
    """Check that a word is allowed; the error suggests the nearest spelling.

    Raises:
        ValueError: The word is not allowed.
    """
    if word in allowed:
        return
    near = difflib.get_close_matches(word, allowed, n=1)
    hint = f": did you mean {near[0]}?" if near else f": expected {', '.join(allowed)}"
    raise ValueError(f"{option} {word}{hint}")
