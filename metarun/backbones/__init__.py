"""Backbones: networks of a body and an optional head."""
