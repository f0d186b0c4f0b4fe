"""What a class of algorithms can do, and optional interfaces that only some of them have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Description of a class of algorithms; a class states what differs from the defaults.

    An instance whose settings change a capability replaces the description of its class.

    Attributes:
        kinds: Kinds of task that the algorithm can learn.
        accepts_any_way: Whether an evaluation task may have a different number of ways than a
            training task.
        label_equivariant: Whether permuting the labels of a task permutes the predictions in the
            same way.
        order_free: Whether predictions are independent of the order of the support rows.
        needs_equal_shots: Whether every class of a task needs the same number of support rows.
        least_shot: Smallest number of support rows per class, or per regression task.
        meta_trains: Whether the algorithm learns anything from training tasks.
        learns_online: Whether the tasks are streams, on which the algorithm is evaluated while it
            learns.
        needs_task_ids: Whether the algorithm requires known task ids of streams.
        answers_depend_on_task: Whether a prediction on a stream depends on the task of its row, if
            task ids are known.
        package: Optional package that the algorithm requires; None where it requires none.
        needs_whole_batch: Reason why processes cannot share the tasks of an update; None where
            they can. Sharing is exact where an update is a mean over independent tasks. Then
            gradients go to an `OuterOptimizer` and moments to `update_running_statistics`, and
            random draws have keys from `progress.first_task`. Code that needs all tasks of a batch
            gets those of the other processes from `distributed.gather_rows` or
            `distributed.mean`.
    """

    kinds: tuple[str, ...] = ("classification", "regression")
    accepts_any_way: bool = False
    label_equivariant: bool = False
    order_free: bool = True
    needs_equal_shots: bool = False
    least_shot: int = 1
    meta_trains: bool = True
    learns_online: bool = False
    needs_task_ids: bool = False
    answers_depend_on_task: bool = False
    package: str | None = None
    needs_whole_batch: str | None = None


@runtime_checkable
class HasOptions(Protocol):
    """An algorithm with candidate settings, from which meta-validation chooses."""

    @property
    def options(self) -> Sequence[Mapping[str, float]]:
        """Candidate settings by name; may be empty."""
        ...

    def choose(self, option: Mapping[str, float]) -> None:
        """Use one of `options` from now on; without entries, the first values."""
        ...


@runtime_checkable
class MatchesShapes(Protocol):
    """An algorithm with parameters whose shapes depend on the training data."""

    def match_shapes(self, state: Mapping[str, Any]) -> None:
        """Resize these parameters to those of a state, before it is loaded.

        A meta-test may use another data set, with another number of training classes.

        Args:
            state: A `state_dict`, which may come from another algorithm or other options.
        """
        ...


@runtime_checkable
class Generative(Protocol):
    """An algorithm that can generate rows for tasks."""

    @property
    def generates(self) -> bool:
        """Whether it does so with its settings."""
        ...

    def generated(self, support_x: Tensor, count: int) -> Tensor:
        """Return rows generated for T tasks, (T, count, *input_shape), if `generates` is true."""
        ...
