"""Run folders: configuration, status, metrics, checkpoints and the lock of a run."""
