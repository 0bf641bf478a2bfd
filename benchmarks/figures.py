"""Draws the figures from the rows in results/: python benchmarks/figures.py [--check]

A figure's file stores which rows it shows, so `--check` can tell if they have changed.
"""

import hashlib
import json
import sys

import matplotlib
from core import cells
from matplotlib import pyplot as plt
from PIL import Image
from runner import RESULTS, rows

matplotlib.use("Agg")
OURS, SCAN, OTHER = "#2a6f97", "#bb4430", "#8d99ae"
NAMES = {"pallas": "fused", "scan": "lax.scan", "relu": "ReLU for neurons"}
BOTH = (("scan", SCAN), ("pallas", OURS))


def shown_rows():
    core = [row for row in rows("core") if row["status"] == "ok" and row["case"] == "lif"]
    steps = [row for row in rows("resnet") if row["status"] == "ok" and row["case"] == "spiking-resnet-18"]
    steps = [row for row in steps if (row["size"], row["dtype"]) == (28, "bfloat16")]
    baseline = {row["device"] for row in steps if row["implementation"] == "scan"}
    return core, [row for row in steps if row["device"] in baseline]  # all bars are of one GPU


def layers_and_resnet():
    lif, steps = shown_rows()
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    figure, ((over_T, over_lanes), below) = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for name, colour in BOTH:
        mine = [r for r in lif if r["implementation"] == name and r["dtype"] == "float32" and r["T"] * r["M"] <= 2**25]
        points = sorted((r["T"], 1e6 * r["ms"] / (r["T"] * r["M"])) for r in mine)
        over_T.loglog(*zip(*points, strict=True), "o-", color=colour, label=NAMES[name])
        for dtype, marker in (("float32", "o"), ("bfloat16", "s")):
            mine = [r for r in lif if (r["implementation"], r["dtype"]) == (name, dtype)]
            points = sorted((r["M"], r["of_copy_rate"]) for r in mine)
            over_lanes.plot(*zip(*points, strict=True), marker, color=colour, label=f"{NAMES[name]}, {dtype}")
    over_T.set(xlabel="time steps T (2^25 / T lanes up to T = 256, then fewer)", ylabel="ns per lane and step")
    over_T.set_title("LIF, forward and backward, float32", loc="left")
    over_T.legend(frameon=False)
    over_lanes.axhline(1, color="0.6", lw=0.8)
    over_lanes.text(2**12, 1.02, "x + 1, moving the same bytes", color="0.4", fontsize=8)
    over_lanes.set_xscale("log", base=2)
    over_lanes.set(xlabel="lanes", ylabel="share of the copy rate", ylim=(0, 1.12))
    over_lanes.set_title("The same, as a share of the copy rate", loc="left")
    over_lanes.legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.62))
    labels = [", ".join(filter(None, (NAMES[r["implementation"]], r["memory"]))) for r in steps]
    colours = [dict(BOTH).get(r["implementation"], OTHER) for r in steps]
    for ax, key, what in zip(below, ("ms", "peak_mb"), ("ms per training step", "peak memory, MB"), strict=True):
        values = [r[key] for r in steps]
        bars = ax.barh(labels, values, color=colours)
        ax.bar_label(bars, fmt="%.3g" if max(values) < 100 else "%.0f", padding=3)
        ax.invert_yaxis()
        ax.set(xlabel=what, xlim=(0, 1.12 * max(values)))
    below[0].set_title("Spiking-ResNet-18, T = 32, 100 x 3 x 28 x 28, bfloat16", loc="left")
    once = lambda key: ", ".join(sorted({row[key] for row in [*lif, *steps]}))
    figure.suptitle(f"{once('device')}, JAX {once('jax')}, {once('date')}", x=0.01, ha="left", fontsize=8)
    return figure


def choice():
    """A map for each neuron and dtype: the time of None's choice over that of the fastest, whose first letter it shows if they differ."""
    found = cells()
    steps, lanes = (sorted({getattr(cell, name) for cell in found}) for name in ("T", "M"))
    names, dtypes = (list(dict.fromkeys(getattr(cell, name) for cell in found)) for name in ("case", "dtype"))
    options = dict(layout="constrained", squeeze=False, sharex=True, sharey=True)
    figure, grid = plt.subplots(len(dtypes), len(names), figsize=(3.2 * len(names), 6.5), **options)
    for dtype, line in zip(dtypes, grid, strict=True):
        for name, ax in zip(names, line, strict=True):
            over = [[float("nan")] * len(lanes) for _ in steps]
            for cell in found:
                if (cell.case, cell.dtype) == (name, dtype):
                    at = lanes.index(cell.M), steps.index(cell.T)
                    over[at[1]][at[0]] = cell.over
                    if cell.over > 1.05:
                        ax.text(*at, cell.fastest[0], ha="center", va="center", fontsize=8)
            image = ax.imshow(over, aspect="auto", origin="lower", cmap="Oranges", vmin=1, vmax=1.5)
            ax.set_title(f"{name}, {dtype}", loc="left", fontsize=9)
            ax.set_yticks(range(len(steps)), steps)
            ax.set_xticks(range(len(lanes)), [_power(m) for m in lanes], rotation=90)
    figure.supxlabel("lanes")
    figure.supylabel("time steps T")
    figure.colorbar(image, ax=grid, label="time of None's choice over that of the fastest implementation")
    return figure


def conversion_rows():
    return [row for row in rows("conversion") if row["status"] == "ok"]


def conversion():
    """Accuracy of the converted network over T, and that of the ReLU network."""
    shown = conversion_rows()
    figure, both = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    for note, ax in zip(dict.fromkeys(row["note"] for row in shown), both, strict=True):
        for case, colour in zip(dict.fromkeys(row["case"] for row in shown), (OURS, SCAN, OTHER), strict=True):
            mine = [row for row in shown if (row["note"], row["case"]) == (note, case)]
            points = sorted((row["T"], 100 * row["held_out_accuracy"]) for row in mine)
            ax.plot(*zip(*points, strict=True), "o-", color=colour, label=case)
        ax.axhline(100 * shown[0]["relu_accuracy"], color="0.4", lw=0.8, ls="--", label="ReLU network")
        ax.set_xscale("log", base=2)
        ax.set(xlabel="time steps T", title=note.replace("left out", "of the steps left out"))
    both[0].set_ylabel("held-out digits, %")
    both[0].legend(frameon=False)
    return figure


def _power(m):
    extra = m - 2 ** (m.bit_length() - 1)
    return f"$2^{{{m.bit_length() - 1}}}{f'+{extra}' if extra else ''}$"


FIGURES = {"figures.png": (shown_rows, layers_and_resnet), "choice.png": (cells, choice)}  # file: (what it shows, how)
FIGURES["conversion.png"] = conversion_rows, conversion


def main(argv):
    if "--help" in argv:
        return print(__doc__)
    for name, (shown, draw) in FIGURES.items():
        path, mark = RESULTS / name, hashlib.sha256(json.dumps(shown(), sort_keys=True).encode()).hexdigest()[:16]
        if "--check" not in argv:
            draw().savefig(path, dpi=110, metadata={"Description": mark})
            continue
        with Image.open(path) as image:
            if image.text.get("Description") != mark:
                sys.exit(f"{name} does not show the rows in benchmarks/results: run python benchmarks/figures.py")


if __name__ == "__main__":
    main(sys.argv[1:])
