"""Baselines: classifiers, nearest neighbors and the mean of single-task models."""
