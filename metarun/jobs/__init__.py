"""Runs, sweeps and comparisons, from checked configurations."""
