"""Data sets: tasks, episodes and streams as pure functions of (seed, split, index)."""
