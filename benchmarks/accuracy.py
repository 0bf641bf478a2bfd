"""Does a run of an experiment learn equally well with two implementations, from the same seed?

    python benchmarks/accuracy.py --data mnist5k --model r18                              pallas and scan
    python benchmarks/accuracy.py --data cifar10 --model r50 --implementations pallas
    python benchmarks/accuracy.py --implementations mosaic,scan --more='--steps=200'      further keys of train.py
    python benchmarks/accuracy.py --recipe cifar10 --more='--seed=1'                      a recipe of recipes.py
    python benchmarks/accuracy.py --script spoken_digits --implementations triton,scan --more='--data.held_out=theo'

Rows go to results/accuracy.jsonl, the runs with their loss curves to runs/. Both runs see the same batches and the same
noise. Their losses differ all the same: if two roundings of a sum lie on either side of a threshold, only one run has a
spike there, and it influences all that follows. What must agree is the accuracy.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from runner import Case, main, question, split

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
LAST = 50  # steps: the final loss is their mean


@question(
    "accuracy",
    script=("paper", "a script of experiments/"),
    recipe=("", "a recipe of recipes.py, in place of script, data and model"),
    data=("mnist5k", "a data set that paper.py names"),
    model=("r18", "a model that paper.py names"),
    implementations=("pallas,scan", "one or two"),
    more=("", "further arguments of the script; all but --steps and --seed become part of the row's case"),
    runs=("", "the folder of the runs; default runs/<data>-<model>-<time>"),
)
def accuracy(args):
    more, script = shlex.split(args.more), "recipes" if args.recipe else args.script
    names = {"recipes": [args.recipe], "paper": [args.data, args.model]}.get(script, [])
    case = " ".join([*(names or [script]), *([] if script == "paper" else _choices(more))])
    out = Path(args.runs or f"runs/{case.replace(' ', '-')}-{time.strftime('%Y%m%d-%H%M%S')}")
    curves = []
    for i, implementation in enumerate(split(args.implementations)):
        arguments = [*names, *more, f"--model.implementation={implementation}"]
        key = dict(case=case, implementation=implementation)
        yield Case(key, measure, (script, arguments, out / f"{i + 1}-{implementation}", curves))


def _choices(more):
    """The options of model and data with their values, without "--model." and "--data."."""
    kept, said = False, []
    for word in more:
        kept = word.startswith(("--model.", "--data.")) or kept and not word.startswith("--")
        said += [word.removeprefix("--model.").removeprefix("--data.")] * kept
    return said


def run(script: str, arguments: list[str]) -> int:
    """The exit status of a run in a process of its own; this process takes no memory of the GPU before that."""
    return subprocess.run([sys.executable, EXPERIMENTS / f"{script}.py", *arguments]).returncode


def measure(script, arguments, path, curves):
    if status := run(script, [*arguments, f"--out={path.parent}", f"--name={path.name}"]):
        return dict(status=f"exit {status}")
    import jax  # noqa: F401  # now that the run has given the GPU back: the row says which device and version it had

    config, summary = (json.loads((path / name).read_text()) for name in ("config.json", "summary.json"))
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    curves.append(np.array([row["loss"] for row in rows if "loss" in row]))
    row = dict(input=summary.get("note", "real data"), T=config["model.T"], B=config["batch"])
    row |= dict(dtype=config.get("model.policy", "float32"))
    row |= {key: config[key] for key in ("mesh", "seed", "steps") if config[key] is not None}
    row |= {key: summary[key] for key in ("held_out_accuracy", "seconds")}
    row |= dict(final_loss=float(curves[-1][-LAST:].mean()), ms_a_step=1e3 * config["batch"] / summary["samples_per_s"])
    if len(curves) == 2:
        row |= dict(largest_difference=float(np.abs(curves[0] - curves[1]).max()))
    return row


if __name__ == "__main__":
    main(__doc__, "accuracy")
