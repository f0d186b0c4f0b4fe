"""MAML with a dense network on Omniglot's characters: 5-way 1-shot, and one task by hand."""

import metarun

words = ("data=omniglot_small", "backbone=mlp_omniglot", "way=5", "shot=1")
run = metarun.run("algo=maml", *words)
print(f"test accuracy {run.results['test']['mean']:.3f}")

task = next(metarun.episodes(*words, split="test"))
learner = run.learner().fit(task.support_x[0], task.support_y[0])
print(f"accuracy {learner.score(task.query_x[0], task.query_y[0]):.3f} on one task")
