"""OML: a representation that does not forget (Javed & White 2019; code khurramjaved96/mrcl)."""

from __future__ import annotations

from typing import ClassVar

from metarun.algorithms.continual.trajectory import TrajectoryLearner


class OML(TrajectoryLearner):
    """Learns a representation on which online learning interferes little with what was learned.

    The representation network (the backbone's body) stays as it is along a trajectory; the
    prediction network (the head) takes a gradient step on each step of it, from a start that is
    learned with the representation (Javed & White 2019, eq. 3). See `TrajectoryLearner`.
    """

    inside: ClassVar[tuple[str, ...]] = ("head.",)
