"""Execution of tasks: the engine and the replay of traced operators."""
