"""One run of paper.py by two implementations from the same seed: their loss curves side by side, and a row for each.

    python experiments/compare_runs.py mnist5k r18                              pallas and scan
    python experiments/compare_runs.py mnist5k r18 mosaic scan --steps 200      further keys are those of train.py

Writes runs/<data>-<model>-compare.png and appends to benchmarks/results/accuracy.jsonl. Both see the same batches and the
same noise. Their curves part all the same: where two roundings of one sum lie on either side of a threshold there is a
spike in one of them alone, and what follows from it. What must agree is how well they learn.
"""

import json
import sys
from pathlib import Path

import config as configuration
import flax
import matplotlib
import numpy as np
import optax
import paper
import train
from checkpoints import Stopped

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import measure  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SMOOTH = 50  # steps: the final loss is their mean, as is every point of the smooth curves
COLOURS = ("#3b6fb6", "#c8553d")


def compare(data: str, model: str, implementations: list[str], overrides: list[str]) -> list[dict]:
    """The two rows. Raises as `train.train` does, and ValueError for a bad key."""
    curves, summaries, rows = {}, {}, []
    for i, implementation in enumerate(implementations):
        name = f"--name={data}-{model}-{implementation}"
        given = [*paper.arguments(data, model), name, *overrides, f"--model.implementation={implementation}"]
        config = configuration.parse(given, train.Config(), train.CHOICES)
        summary = train.train(config)
        metrics = (Path(summary["report"]).parent / "metrics.jsonl").read_text().splitlines()
        curves[i] = np.array([row["loss"] for row in map(json.loads, metrics) if "loss" in row])
        summaries[i] = summary
    apart = np.abs(curves[0] - curves[1])
    for i, implementation in enumerate(implementations):
        row = dict(
            case=f"{data} {model}",
            implementation=implementation,
            input=summaries[i].get("note", "real data"),
            T=config.model.T,
            B=config.batch,
            precision=config.model.precision,
            steps=config.steps,
            held_out_accuracy=summaries[i]["held_out_accuracy"],
            final_loss=float(curves[i][-SMOOTH:].mean()),
            seconds=summaries[i]["seconds"],
            ms_a_step=1e3 * config.batch / summaries[i]["samples_per_s"],
            first_step_difference=float(apart[0]),
            largest_difference=float(apart.max()),
            largest_difference_of_means=float(np.abs(_smooth(curves[0]) - _smooth(curves[1])).max()),
            flax=flax.__version__,
            optax=optax.__version__,
            status="ok",
        )
        measure.record("accuracy", **row)
        rows.append(row)
    path = Path(config.out) / f"{data}-{model}-compare.png"
    _draw(path, implementations, curves, rows)
    print(path)
    return rows


def _smooth(curve):
    width = min(SMOOTH, len(curve))
    return np.convolve(curve, np.ones(width) / width, mode="valid")


def _draw(path, implementations, curves, rows):
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for i, implementation in enumerate(implementations):
        smooth = _smooth(curves[i])
        steps = np.arange(1, len(curves[i]) + 1)
        label = f"{implementation}: {rows[i]['held_out_accuracy']:.2%} held out"
        axes.plot(steps, curves[i], color=COLOURS[i], alpha=0.2, lw=0.8)
        axes.plot(steps[-len(smooth) :], smooth, color=COLOURS[i], lw=2 - i, ls="-" if i == 0 else "--", label=label)
    axes.set(
        yscale="log", xlabel="step", ylabel=f"training loss, and its mean of {len(curves[0]) - len(smooth) + 1} steps"
    )
    axes.set_title(f"{rows[0]['case']}, T = {rows[0]['T']}, {rows[0]['precision']} ({rows[0]['input']})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> int:
    named = [word for word in argv[:4] if not word.startswith("--")]
    named = named[: next((i for i, word in enumerate(argv) if word.startswith("--")), len(named))]
    if len(named) not in (2, 4) or named[0] not in paper.DATA or named[1] not in paper.DEPTHS:
        print(f"{__doc__}\nerror: expected DATA MODEL [IMPLEMENTATION IMPLEMENTATION]; got {named}", file=sys.stderr)
        return 2
    try:
        compare(*named[:2], named[2:] or ["pallas", "scan"], argv[len(named) :])
    except (ValueError, Stopped, NotImplementedError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
