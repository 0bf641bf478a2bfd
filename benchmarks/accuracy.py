"""Does a run of experiments/paper.py learn equally well with two implementations, from the same seed?

    python benchmarks/accuracy.py --data mnist5k --model r18                              pallas and scan
    python benchmarks/accuracy.py --data cifar10 --model r50 --implementations pallas
    python benchmarks/accuracy.py --implementations mosaic,scan --more='--steps=200'      further keys of train.py

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

PAPER = Path(__file__).parent.parent / "experiments" / "paper.py"
LAST = 50  # steps: the final loss is their mean


@question(
    "accuracy",
    data=("mnist5k", "a data set that paper.py names"),
    model=("r18", "a model that paper.py names"),
    implementations=("pallas,scan", "one or two"),
    more=("", "further arguments of paper.py"),
    runs=("", "the folder of the runs; default runs/<data>-<model>-<time>"),
)
def accuracy(args):
    out = Path(args.runs or f"runs/{args.data}-{args.model}-{time.strftime('%Y%m%d-%H%M%S')}")
    curves = []
    for i, implementation in enumerate(split(args.implementations)):
        arguments = [args.data, args.model, *shlex.split(args.more), f"--model.implementation={implementation}"]
        key = dict(case=f"{args.data} {args.model}", implementation=implementation)
        yield Case(key, measure, (arguments, out / f"{i + 1}-{implementation}", curves))


def run(arguments: list[str]) -> int:
    """The exit status of a run in a process of its own; this process takes no memory of the GPU before that."""
    return subprocess.run([sys.executable, PAPER, *arguments]).returncode


def measure(arguments, path, curves):
    if status := run([*arguments, f"--out={path.parent}", f"--name={path.name}"]):
        return dict(status=f"exit {status}")
    config, summary = (json.loads((path / name).read_text()) for name in ("config.json", "summary.json"))
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    curves.append(np.array([row["loss"] for row in rows if "loss" in row]))
    row = dict(
        input=summary.get("note", "real data"), T=config["model.T"], B=config["batch"], dtype=config["model.policy"]
    )
    row |= {key: config[key] for key in ("mesh", "seed", "steps")}
    row |= {key: summary[key] for key in ("held_out_accuracy", "seconds")}
    row |= dict(final_loss=float(curves[-1][-LAST:].mean()), ms_a_step=1e3 * config["batch"] / summary["samples_per_s"])
    if len(curves) == 2:
        row |= dict(largest_difference=float(np.abs(curves[0] - curves[1]).max()))
    return row


if __name__ == "__main__":
    main(__doc__, "accuracy")
