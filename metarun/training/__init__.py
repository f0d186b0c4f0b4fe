"""The training loop, meta-validation, meta-test and results of a run."""
