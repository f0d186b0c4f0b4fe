"""Probabilistic methods: neural processes, Gaussian processes, mixtures of initializations."""
