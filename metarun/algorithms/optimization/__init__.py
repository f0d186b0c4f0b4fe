"""Algorithms that adapt weights to a task: gradient steps, learned updates or closed form."""
