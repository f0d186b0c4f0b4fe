"""Basics without dependencies on the rest: types, settings, seeding, files, console, errors."""
