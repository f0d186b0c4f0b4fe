"""Algorithms with a generator of additional rows."""
