"""Selection among base-learners for each task."""
