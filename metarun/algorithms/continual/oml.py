"""OML: online-aware meta-learning (Javed & White 2019; code khurramjaved96/mrcl)."""

from __future__ import annotations

from typing import ClassVar

from metarun.algorithms.continual.trajectory import TrajectoryLearner


class OML(TrajectoryLearner):
    """Learns a representation on which online learning causes little interference.

    The representation network (the backbone's body) is constant along a trajectory. The
    prediction network (the head) takes a gradient step on each step of the trajectory. Its
    initialization is learned with the representation (Javed & White 2019, eq. 3). See
    `TrajectoryLearner`.
    """

    inside: ClassVar[tuple[str, ...]] = ("head.",)
