"""MAML on sinusoids (Finn et al. 2017): an initialization that ten points adapt."""

import numpy as np

import metarun

run = metarun.run("algo=maml", "data=sinusoid", "shot=10")
print(f"test MSE {run.results['test']['mean']:.3f}")

x, new = np.linspace(-5, 5, 10), np.linspace(-5, 5, 100)
learner = run.learner().fit(x, 3 * np.sin(x + 1))
print(f"R2 {learner.score(new, 3 * np.sin(new + 1)):.3f} on a new sinusoid")
