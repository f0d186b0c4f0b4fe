"""`metarun bench`: the speed of meta-learning on this machine, as ratios to the usual loops.

Every figure is taken side by side with its rivals' in one process, turn by turn, so that what else
the machine does falls on all of them. `catalogue` says what is timed, `sides` makes our step and
`baselines` theirs, `measuring` and `memory` take the figures, `tables` and `drawing` show them.
"""
