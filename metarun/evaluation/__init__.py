"""Evaluation of algorithms on episodes and along streams."""
