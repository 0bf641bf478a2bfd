"""The picture at the end of a run: learning curves, and what the trained network does with one held-out image."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from snnfuse import nn  # noqa: E402

STEPS = 48  # the network is shown the image for longer than in training, for there to be something to see
NEURONS = 50  # of each layer, in the raster
TRACED_RATES = (0.08, 0.2, 0.35, 0.5)  # the membranes shown are of the neurons that fire most nearly so
COLOURS = ["#3b6fb6", "#2a9d8f", "#e08e29", "#c8553d", "#7a5195"]


def draw(path: Path, rows: list[dict], config, model, data) -> Path:
    figure = plt.figure(figsize=(14, 8.3), constrained_layout=True)
    accuracy = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row][-1]
    figure.suptitle(
        f"{path.parent}: {accuracy:.1%} of {len(data.test_labels):,} held-out images in {config.model.T} time steps"
    )
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    loss, accuracy, image = top.subplots(1, 3, width_ratios=(2, 2, 1))
    _curves(loss, rows, "loss", "cross-entropy")
    loss.set_yscale("log")
    _curves(accuracy, rows, "accuracy", "accuracy")
    accuracy.set_ylim(min(0.8, min(r["eval_accuracy"] for r in rows if "eval_accuracy" in r) - 0.02), 1.005)
    raster, membranes, outputs = bottom.subplots(1, 3)
    _activity(config, model, data, image, raster, membranes, outputs)
    for axes in (loss, accuracy, raster, membranes, outputs):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _curves(axes, rows, name, label):
    steps, values = np.array([(r["step"], r[name]) for r in rows if name in r]).T
    axes.plot(steps, values, color=COLOURS[0], alpha=0.25, lw=0.8)
    width = max(1, min(25, len(values) // 4))
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color=COLOURS[0], label=f"training (mean of {width} steps)")
    held_out = np.array([(r["step"], r[f"eval_{name}"]) for r in rows if f"eval_{name}" in r]).T
    axes.plot(*held_out, "o-", color=COLOURS[3], ms=4, label=f"held out (last {held_out[1, -1]:.4g})")
    axes.set(xlabel="step", title=label)
    axes.legend(frameon=False, fontsize=9)


def _activity(config, model, data, image_axes, raster, membranes, outputs):
    T = max(STEPS, config.model.T)
    chosen = len(data.test_labels) // 3
    image, label = data.test_images[chosen : chosen + 1], int(data.test_labels[chosen])
    (outs, traces), _ = _traced(config, model, image, T)
    outs, answer = np.asarray(outs)[:, 0], int(np.asarray(outs)[:, 0].mean(0).argmax())
    image_axes.imshow(image[0].squeeze(), cmap="gray_r")
    image_axes.set(xticks=[], yticks=[], title=f"a held-out {label}, read as {answer}")

    hidden = [(np.asarray(spikes)[:, 0].reshape(T, -1), states) for spikes, states in traces[:-1]]
    _raster(raster, [spikes for spikes, _ in hidden], T)
    spikes, states = hidden[-1]
    threshold = float(np.mean([layer for layer in model.layers if isinstance(layer, nn.Spiking)][-2].threshold))
    _membranes(membranes, spikes, np.asarray(states.v)[:, 0].reshape(T, -1), threshold)

    heights = _apart(outs[-1], 0.045 * (outs.max() - outs.min()))
    for k in range(outs.shape[1]):
        right = k == label
        outputs.plot(outs[:, k], color=COLOURS[3] if right else "0.7", lw=2.2 if right else 1, zorder=2 if right else 1)
        outputs.text(T, heights[k], str(k), fontsize=9, va="center", color=COLOURS[3] if right else "0.5")
    outputs.set(xlabel="time step", xlim=(-1, T + 2), title="membranes of the outputs")


def _apart(heights, gap):
    """The same heights, moved up until no two labels are nearer than `gap`."""
    heights, order = np.array(heights), np.argsort(heights)
    for below, above in zip(order, order[1:], strict=False):
        heights[above] = max(heights[above], heights[below] + gap)
    return heights


def _traced(config, model, images, T):
    @jax.jit
    def run(state, images):
        key = jax.random.key(config.seed)
        return nnx.merge(graphdef, state).trace(config.data.encode(key, jnp.asarray(images), T, train=False))

    graphdef, state = nnx.split(model)
    return run(state, images)


def _raster(axes, layers, T):
    base = 0
    for i, spikes in enumerate(layers):
        firing = np.flatnonzero(spikes.any(0))
        shown = firing[np.linspace(0, len(firing) - 1, min(NEURONS, len(firing))).astype(int)]
        t, neuron = np.nonzero(spikes[:, shown])
        axes.plot(t, base + neuron, "|", color=COLOURS[i], ms=2.2, mew=1.1)
        axes.text(
            T, base + NEURONS / 2, f"layer {i + 1}\n{spikes.mean():.0%}", color=COLOURS[i], va="center", fontsize=9
        )
        base += NEURONS + 5
    axes.set(xlabel="time step", ylabel="neurons that fire", yticks=[], xlim=(-1, T))
    axes.set_title("spikes of each hidden layer, its mean rate beside it")


def _membranes(axes, spikes, v, threshold):
    T = len(v)
    rates = spikes.mean(0)
    shown = [int(np.abs(rates - wanted).argmin()) for wanted in TRACED_RATES]
    for row, n in enumerate(shown):
        low, colour = v[:, n].min(), COLOURS[row]
        y = lambda v, low=low, row=row: 1.3 * row + (v - low) / (threshold - low + 1e-6)
        axes.axhline(y(threshold), color="0.8", lw=0.8, ls="--")
        axes.plot(y(v[:, n]), color=colour, lw=1.4)
        (t,) = np.nonzero(spikes[:, n])
        axes.plot(t, np.full(len(t), y(threshold) + 0.09), "|", color="black", ms=6)
        axes.text(T, y(threshold), f"{rates[n]:.0%}", color=colour, va="center", fontsize=9)
    axes.set(xlabel="time step", yticks=[], xlim=(-1, T))
    axes.set_title(
        "membranes in the last hidden layer, after reset\n(bars are spikes, dashes the threshold)", fontsize=10
    )
