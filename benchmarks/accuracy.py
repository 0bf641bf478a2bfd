"""One run of experiments/paper.py by two implementations from the same seed: loss curves side by side, and a row for each.

    python benchmarks/accuracy.py mnist5k r18                              pallas and scan
    python benchmarks/accuracy.py cifar10 r50 pallas                       one alone
    python benchmarks/accuracy.py mnist5k r18 mosaic scan --steps 200      further keys are those of train.py

Rows go to results/accuracy.jsonl, the curves to results/accuracy_<data>_<model>.png, the runs to runs/<data>-<model>-<time>.
Both see the same batches and the same noise. Their curves part all the same: where two roundings of one sum lie on either
side of a threshold there is a spike in one of them alone, and what follows from it. What must agree is how well they learn.
"""

import importlib.metadata
import json
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path

import matplotlib
import measure
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

PAPER = Path(__file__).parent.parent / "experiments" / "paper.py"
SMOOTH = 50  # steps: the final loss is their mean, as is every point of the smooth curves
COLOURS = ("#3b6fb6", "#c8553d")


def compare(data: str, model: str, implementations: list[str], overrides: list[str], out: Path) -> None:
    runs = []
    for i, implementation in enumerate(implementations):
        name = f"{i + 1}-{implementation}"
        status = run(
            [data, model, *overrides, f"--model.implementation={implementation}", f"--out={out}", f"--name={name}"]
        )
        if status:
            row = dict(case=f"{data} {model}", implementation=implementation, status=f"exit {status}")
            measure.record("accuracy", **row)
        else:
            runs.append((implementation, out / name))
    curves = [_losses(path) for _, path in runs]
    rows = []
    for (implementation, path), curve in zip(runs, curves, strict=True):
        config, summary = (json.loads((path / name).read_text()) for name in ("config.json", "summary.json"))
        rows.append(
            dict(
                case=f"{data} {model}",
                implementation=implementation,
                input=summary.get("note", "real data"),
                T=config["model.T"],
                B=config["batch"],
                precision=config["model.policy"],
                mesh=config["mesh"],
                seed=config["seed"],
                steps=config["steps"],
                held_out_accuracy=summary["held_out_accuracy"],
                final_loss=float(curve[-SMOOTH:].mean()),
                seconds=summary["seconds"],
                ms_a_step=1e3 * config["batch"] / summary["samples_per_s"],
                **(_differences(*curves) if len(curves) == 2 else {}),
                flax=importlib.metadata.version("flax"),
                optax=importlib.metadata.version("optax"),
                status="ok",
            )
        )
        measure.record("accuracy", **rows[-1])
    if rows:
        draw(measure.RESULTS / f"accuracy_{data}_{model}.png", rows, curves)


def run(arguments: list[str]) -> int:
    """Exit status of the run, in a process of its own: this one takes no memory of the GPU before they end."""
    return subprocess.run([sys.executable, PAPER, *arguments]).returncode


def _losses(path):
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return np.array([row["loss"] for row in rows if "loss" in row])


def _differences(a, b):
    apart = np.abs(a - b)
    return dict(
        first_step_difference=float(apart[0]),
        largest_difference=float(apart.max()),
        largest_difference_of_means=float(np.abs(_smooth(a) - _smooth(b)).max()),
    )


def _smooth(curve):
    width = min(SMOOTH, len(curve))
    return np.convolve(curve, np.ones(width) / width, mode="valid")


def draw(path: Path, rows: list[dict], curves: list[np.ndarray]) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for i, (row, curve) in enumerate(zip(rows, curves, strict=True)):
        smooth, steps = _smooth(curve), np.arange(1, len(curve) + 1)
        label = f"{row['implementation']}: {row['held_out_accuracy']:.2%} held out, {row['ms_a_step']:.1f} ms a step"
        axes.plot(steps, curve, color=COLOURS[i], alpha=0.2, lw=0.8)
        axes.plot(steps[-len(smooth) :], smooth, color=COLOURS[i], lw=2 - i, ls="-" if i == 0 else "--", label=label)
    axes.set(yscale="log", xlabel="step", ylabel=f"training loss, and its mean of {min(SMOOTH, len(curves[0]))} steps")
    axes.set_title(f"{rows[0]['case']}, T = {rows[0]['T']}, {rows[0]['precision']} ({rows[0]['input']})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def main(argv: list[str]) -> int:
    named = list(takewhile(lambda word: not word.startswith("--"), argv))
    if not 2 <= len(named) <= 4:
        print(f"{__doc__}\nerror: expected DATA MODEL [IMPLEMENTATION [ANOTHER]]; got {named}", file=sys.stderr)
        return 2
    out = Path("runs") / f"{named[0]}-{named[1]}-{time.strftime('%Y%m%d-%H%M%S')}"
    compare(*named[:2], named[2:] or ["pallas", "scan"], argv[len(named) :], out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
