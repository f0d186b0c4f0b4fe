"""Continual and online learning along streams."""
