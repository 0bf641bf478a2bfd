"""What the cost model predicts for a Spiking-ResNet-18 on 1 to 4,096 devices: a table and benchmarks/results/scaling_plan.png.

    python benchmarks/scaling_plan.py [PNG]

No device is needed and none is timed. All of it is a prediction from the rates in `snnfuse.parallel.plan.H100`, those
between hosts assumed.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import resnet18

from snnfuse.parallel.plan import H100, hand_over, plan_meshes, predict, rounds

BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#d9772b", "#3a8f5c", "#b33a3a", "#777777"
T, BATCH, SIZE = 2048, 16, 128
DEVICES = [2**i for i in range(13)]


def best(layers, devices, which):
    kept = [p for p in plans(layers, devices) if which(p)]
    return kept[0] if kept else None


def plans(layers, devices):
    try:
        return plan_meshes(layers, T, BATCH, devices, synchronised=True, exactly=True)
    except ValueError:  # too few to hold it, or too many to divide it
        return []


def draw_rounds(ax):
    """The neurons of three layers, forward and backward, with time over G devices of a host or of several."""
    Gs = [G for G in DEVICES if G <= T]
    for index, colour in ((1, BLUE), (9, ORANGE), (16, GREY)):
        layer = resnet18(SIZE)[index]
        unit = 2 * layer.neurons * T * BATCH / H100.memory
        hand = [hand_over(4 * layer.neurons * BATCH, H100, G) for G in Gs]
        seconds = [rounds(G, unit, H100.launch, h) for G, h in zip(Gs, hand, strict=True)]
        ax.plot(Gs, [1e3 * s for s in seconds], "o-", color=colour, ms=4, label=f"{layer.neurons:,} neurons")
    ax.set(xscale="log", yscale="log", xlabel="devices along time, G", ylabel="forward and backward, ms (predicted)")
    ax.set_title("A layer's neurons: (2 G + 4) / G passes over the\nsequence, and 2 (G - 1) hand-overs", fontsize=10)
    ax.legend(frameon=False, fontsize=9)


def draw_scaling(ax, layers):
    one = predict(layers, T, BATCH, 1, 1, synchronised=True).seconds
    curves = (
        ("both, the best", lambda p: True, BLUE),
        ("time alone", lambda p: p.data == 1, ORANGE),
        ("data alone", lambda p: p.time == 1, GREY),
    )
    for name, which, colour in curves:
        points = [(n, p) for n in DEVICES if (p := best(layers, n, which))]
        ax.plot([n for n, _ in points], [1e3 * p.seconds for _, p in points], "o-", color=colour, ms=4, label=name)
    ax.plot(DEVICES, [1e3 * one / n for n in DEVICES], color="k", lw=0.8, ls="--", label="ideal")
    ax.set(xscale="log", yscale="log", xlabel="devices", ylabel="step, ms (predicted)")
    ax.set_title(f"Spiking-ResNet-18, {SIZE}x{SIZE}, T = {T}, batch {BATCH}\nof the whole cluster", fontsize=10)
    ax.legend(frameon=False, fontsize=9)


def draw_parts(ax, layers):
    points = [(n, p) for n in DEVICES if (p := best(layers, n, lambda p: True))]
    bottom = [0.0] * len(points)
    for part, colour in (("dense", BLUE), ("neurons", ORANGE), ("gradients", GREEN), ("statistics", RED)):
        share = [100 * getattr(p, part) / p.seconds for _, p in points]
        ax.bar(range(len(points)), share, bottom=bottom, color=colour, label=part)
        bottom = [b + s for b, s in zip(bottom, share, strict=True)]
    ax.set_xticks(
        range(len(points)),
        [f"{n}\n\n{p.data}x{p.time}" if i % 2 else f"{n}\n{p.data}x{p.time}" for i, (n, p) in enumerate(points)],
        fontsize=6,
    )
    ax.set(ylabel="share of the step, %", xlabel="devices, and the best mesh (data x time)", ylim=(0, 118))
    ax.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", handlelength=1, columnspacing=1)
    ax.set_title("Where the time goes on the best mesh", fontsize=10)


def main(path=Path(__file__).parent / "results" / "scaling_plan.png"):
    layers = resnet18(SIZE)
    for n in DEVICES:
        found = plans(layers, n)
        print(f"{n:5d} devices: {found[0] if found else 'no mesh divides the batch and T and fits'}")
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    draw_rounds(axes[0])
    draw_scaling(axes[1], layers)
    draw_parts(axes[2], layers)
    for ax in axes[:2]:
        ax.grid(alpha=0.3)
    figure.suptitle("Predicted by the cost model, not measured", fontsize=11)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
