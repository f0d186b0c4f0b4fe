"""Choosing among five learners on Iris, by a selector that has never seen Iris."""

import metarun

run = metarun.run("experiment=iris")
print(f"selector: test accuracy {run.results['test']['mean']:.3f}")
for name, strategy in run.results["strategies"].items():
    print(f"{name}: {strategy['mean']:.3f}")
