"""Does a run of experiments/paper.py learn equally well with two implementations, from the same seed?

    python benchmarks/accuracy.py --data mnist5k --model r18                              pallas and scan
    python benchmarks/accuracy.py --data cifar10 --model r50 --implementations pallas
    python benchmarks/accuracy.py --implementations mosaic,scan --more='--steps=200'      further keys of train.py

Rows go to results/accuracy.jsonl, the loss curves to results/accuracy_<data>_<model>.png, the runs to runs/. Both runs see
the same batches and the same noise. The curves differ all the same: if two roundings of a sum lie on either side of a
threshold, only one run has a spike there, and it influences all that follows. What must agree is the accuracy.
"""

import importlib.metadata
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import runner
from runner import Case, main, question, split

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

PAPER = Path(__file__).parent.parent / "experiments" / "paper.py"
SMOOTH = 50  # steps: the final loss is the mean of the last ones, and the smooth curves are running means
COLOURS = ("#3b6fb6", "#c8553d")


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
    done = []
    for i, implementation in enumerate(split(args.implementations)):
        arguments = [args.data, args.model, *shlex.split(args.more), f"--model.implementation={implementation}"]
        key = dict(case=f"{args.data} {args.model}", implementation=implementation)
        yield Case(key, measure, (arguments, out / f"{i + 1}-{implementation}", done))
    if done:
        draw(runner.RESULTS / f"accuracy_{args.data}_{args.model}.png", key["case"], done)


def run(arguments: list[str]) -> int:
    """The exit status of a run in a process of its own; this process takes no memory of the GPU before that."""
    return subprocess.run([sys.executable, PAPER, *arguments]).returncode


def measure(arguments, path, done):
    if status := run([*arguments, f"--out={path.parent}", f"--name={path.name}"]):
        return dict(status=f"exit {status}")
    config, summary = (json.loads((path / name).read_text()) for name in ("config.json", "summary.json"))
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    curve = np.array([row["loss"] for row in rows if "loss" in row])
    row = dict(
        input=summary.get("note", "real data"),
        T=config["model.T"],
        B=config["batch"],
        dtype=config["model.policy"],
        mesh=config["mesh"],
        seed=config["seed"],
        steps=config["steps"],
        held_out_accuracy=summary["held_out_accuracy"],
        final_loss=float(curve[-SMOOTH:].mean()),
        seconds=summary["seconds"],
        ms_a_step=1e3 * config["batch"] / summary["samples_per_s"],
        flax=importlib.metadata.version("flax"),
        optax=importlib.metadata.version("optax"),
    )
    done.append((path.name.partition("-")[2], row, curve))
    if len(done) == 2:
        (_, _, a), (_, _, b) = done
        row |= dict(first_step_difference=float(abs(a[0] - b[0])), largest_difference=float(np.abs(a - b).max()))
        row |= dict(largest_difference_of_means=float(np.abs(smooth(a) - smooth(b)).max()))
    return row


def smooth(curve):
    width = min(SMOOTH, len(curve))
    return np.convolve(curve, np.ones(width) / width, mode="valid")


def draw(path, case, done):
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for i, (implementation, row, curve) in enumerate(done):
        mean, steps = smooth(curve), np.arange(1, len(curve) + 1)
        label = f"{implementation}: {row['held_out_accuracy']:.2%} held out, {row['ms_a_step']:.1f} ms per step"
        axes.plot(steps, curve, color=COLOURS[i], alpha=0.2, lw=0.8)
        axes.plot(steps[-len(mean) :], mean, color=COLOURS[i], lw=2 - i, ls="-" if i == 0 else "--", label=label)
    axes.set(yscale="log", xlabel="step", ylabel=f"training loss, and its mean of {min(SMOOTH, len(curve))} steps")
    axes.set_title(f"{case}, T = {row['T']}, {row['dtype']} ({row['input']})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(__doc__, "accuracy")
