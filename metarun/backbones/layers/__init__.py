"""Layers that are correct under per-task functional calls and `torch.vmap`."""
