"""`metarun bench`: the speed of meta-learning on this machine, relative to other implementations.

Each step is timed in the same process as its baselines, in alternating rounds, so that other load
on the machine affects all of them. `workloads` lists what is timed. `implementations` creates our
step and `baselines` theirs. `measuring` and `memory` measure, `tables` and `drawing` present.
"""
