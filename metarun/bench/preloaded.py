"""Imports that a process of the bench starts with, so that its steps import nothing more."""

import torch._dynamo  # noqa: F401  torch itself imports it with its first transform

import metarun.bench.memory  # noqa: F401
from metarun.bench.baselines import why_missing
from metarun.bench.workloads import BASELINES

for name in BASELINES:
    why_missing(name)
