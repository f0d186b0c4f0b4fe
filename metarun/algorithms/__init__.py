"""Meta-learning algorithms: the shared interface, and one package per family."""
