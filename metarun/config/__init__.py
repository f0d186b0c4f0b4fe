"""Configurations: composition, checks, and construction of components."""
