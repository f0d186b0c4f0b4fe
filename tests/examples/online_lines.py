"""A stream of lines, learned online: gradient descent alone, and with a meta-learned start."""

import metarun

for algo in ("online", "ftml"):
    run = metarun.run(f"algo={algo}", "data=stream_linear")
    print(f"{algo}: MSE {run.results['test']['mean']:.3f}")
    for name, figure in run.results["stream"].items():
        print(f"  {name}: {figure['mean']}")
