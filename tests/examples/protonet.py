"""ProtoNet: classes it has never seen, from five examples of each, and their prototypes."""

import metarun

words = ("algo=protonet", "data=omniglot_small", "shot=5")
run = metarun.run(*words)
task = next(metarun.episodes(*words, split="test"))
learner = run.learner().fit(task.support_x[0], task.support_y[0])
print(f"accuracy {learner.score(task.query_x[0], task.query_y[0]):.3f} on one task")
print({name: tuple(tensor.shape) for name, tensor in learner.adapted.items()})
print("features", learner.embed(task.query_x[0]).shape)
print("report", run.report())
