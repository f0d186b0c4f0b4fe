"""Algorithms that read a task as a sequence of labeled rows."""
