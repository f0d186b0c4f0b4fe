"""OML: online-aware meta-learning (Javed & White 2019; code khurramjaved96/mrcl)."""

from __future__ import annotations

from typing import Any, ClassVar

from metarun.algorithms.base import LearnerSetup
from metarun.algorithms.continual.trajectory import TrajectoryLearner


class OML(TrajectoryLearner):
    """Learns a representation on which online learning causes little interference.

    The representation network (the backbone's body) is constant along a trajectory. The
    prediction network (the head) takes a gradient step on each step of the trajectory. Its
    initialization is learned with the representation (Javed & White 2019, eq. 3). The default is
    the corrected code, with gradients of second order; see `TrajectoryLearner`.

    Args:
        second_order_from: Update from which inner gradients are differentiated; None never does,
            as in the code before July 2020, from which the published figures are.
        **options: Options of `TrajectoryLearner`.
    """

    inside: ClassVar[tuple[str, ...]] = ("head.",)

    def __init__(
        self, setup: LearnerSetup, *, second_order_from: int | None = 0, **options: Any
    ) -> None:
        super().__init__(setup, second_order_from=second_order_from, **options)
