"""Lets a disk have no room for more files under a word that writes, see `full_disks.py`.

python -m tests.robustness.no_inodes --number 50 --seed 0
"""

from __future__ import annotations

import sys

from tests.robustness.disks import enter
from tests.robustness.forked import report
from tests.robustness.full_disks import try_inodes

if __name__ == "__main__":
    enter()
    sys.exit(report("no_inodes", try_inodes))
