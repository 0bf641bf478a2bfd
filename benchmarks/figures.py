"""The README's figure from the rows in results/: python benchmarks/figures.py [--check]

It remembers which rows it shows, so that `--check` can tell when they have changed.
"""

import argparse
import hashlib
import json
import pathlib
import sys

RESULTS = pathlib.Path(__file__).parent / "results"
FIGURE = RESULTS / "figures.png"
OURS, SCAN, OTHER = "#2a6f97", "#bb4430", "#8d99ae"
NAMES = {"pallas": "fused", "scan": "lax.scan", "relu": "ReLU for neurons", "flax_relu": "ReLU, flax's layers"}


def rows(name):
    return [
        row for row in map(json.loads, (RESULTS / f"{name}.jsonl").read_text().splitlines()) if row["status"] == "ok"
    ]


def fingerprint(*tables):
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()[:16]


def draw(core, resnet):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    lif = [row for row in core if row["case"] == "lif"]
    _time_against_T(axes[0, 0], [row for row in lif if row["dtype"] == "float32"])
    _roofline(axes[0, 1], lif)
    steps = [r for r in resnet if (r["case"], r["size"], r["precision"]) == ("spiking-resnet-18", 28, "bfloat16")]
    last = {(NAMES[r["implementation"]], r["memory"]): r for r in steps}
    labels = [f"{name}, {memory}" if memory else name for name, memory in last]
    colours = [OURS if name == "fused" else SCAN if name == "lax.scan" else OTHER for name, _ in last]
    _bars(axes[1, 0], labels, [r["ms"] for r in last.values()], colours, "ms a training step")
    _bars(axes[1, 1], labels, [r["peak_mb"] for r in last.values()], colours, "peak memory, MB")
    axes[1, 0].set_title("Spiking-ResNet-18, T = 32, 100 x 3 x 28 x 28, bfloat16", loc="left")
    once = lambda key: ", ".join(sorted({row[key] for row in [*core, *resnet]}))
    figure.suptitle(f"{once('device')}, JAX {once('jax')}, {once('date')}", x=0.01, ha="left", fontsize=8)
    figure.savefig(FIGURE, dpi=110, metadata={"Description": fingerprint(core, resnet)})


def _time_against_T(ax, lif):
    for name, colour in (("scan", SCAN), ("pallas", OURS)):
        mine = [r for r in lif if r["implementation"] == name and r["T"] * r["M"] <= 2**25]
        points = sorted((r["T"], 1e6 * r["ms"] / (r["T"] * r["M"])) for r in mine)
        ax.loglog(*zip(*points, strict=True), "o-", color=colour, label=NAMES[name])
    ax.set(xlabel="time steps T (2^25 / T lanes up to T = 256, then fewer)", ylabel="ns per lane and step")
    ax.set_title("LIF, forward and backward, float32", loc="left")
    ax.legend(frameon=False)


def _roofline(ax, lif):
    for dtype, marker in (("float32", "o"), ("bfloat16", "s")):
        for name, colour in (("scan", SCAN), ("pallas", OURS)):
            chosen = sorted(
                (r["M"], r["of_copy_rate"]) for r in lif if (r["implementation"], r["dtype"]) == (name, dtype)
            )
            ax.plot(*zip(*chosen, strict=True), marker, color=colour, label=f"{NAMES[name]}, {dtype}")
    ax.axhline(1, color="0.6", lw=0.8)
    ax.text(2**12, 1.02, "as fast as x + 1 moves the same bytes", color="0.4", fontsize=8)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="lanes N", ylabel="of the copy rate", ylim=(0, 1.12))
    ax.set_title("LIF, forward and backward: the roofline", loc="left")
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.62))


def _bars(ax, labels, values, colours, what):
    bars = ax.barh(labels, values, color=colours)
    ax.bar_label(bars, fmt="%.3g" if max(values) < 100 else "%.0f", padding=3)
    ax.invert_yaxis()
    ax.set_xlabel(what)
    ax.set_xlim(0, 1.12 * max(values))


def shown():
    """The fingerprint of the rows that the figure shows."""
    from PIL import Image

    with Image.open(FIGURE) as image:
        return image.text.get("Description")


def main(check):
    core, resnet = [row for row in rows("core") if row["case"] != "compile"], rows("resnet")
    if not check:
        draw(core, resnet)
    elif shown() != fingerprint(core, resnet):
        sys.exit(f"{FIGURE.name} does not show what benchmarks/results says: run python benchmarks/figures.py")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the figure is of other rows, and change nothing")
    main(parser.parse_args().check)
