"""The picture at the end of a run: learning curves, and what the trained network does with one held-out image."""

from functools import lru_cache
from pathlib import Path

import jax
import matplotlib
import numpy as np
from flax import nnx

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from snnfuse.data.loader import load  # noqa: E402
from snnfuse.nn import Recurrent, monitor  # noqa: E402
from snnfuse.nn.padded import split  # noqa: E402

STEPS = 48  # longer than in training, so that there is something to see
LAYERS = 5  # in the raster, from the first to the last
NEURONS = 50  # of each layer there
GAP = 5  # between two layers there, in neurons
TRACED_RATES = (0.08, 0.2, 0.35, 0.5)  # the membranes of the neurons whose rates are nearest to these are shown
COLOURS = ["#3b6fb6", "#2a9d8f", "#e08e29", "#c8553d", "#7a5195"]


def draw(path: Path, rows: list[dict], config, model, source) -> Path:
    figure = plt.figure(figsize=(14, 8.3), constrained_layout=True)
    accuracy = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row][-1]
    figure.suptitle(
        f"{path.parent}: {accuracy:.1%} of {len(source):,} held-out samples in {config.model.T} time steps"
        + (f" ({config.data.note})" if config.data.note else "")
    )
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    loss, accuracy, image = top.subplots(1, 3, width_ratios=(2, 2, 1))
    _curves(loss, rows, "loss", "cross-entropy")
    loss.set_yscale("log")
    _curves(accuracy, rows, "accuracy", "accuracy")
    accuracy.set_ylim(min(0.8, min(r["eval_accuracy"] for r in rows if "eval_accuracy" in r) - 0.02), 1.005)
    raster, membranes, outputs = bottom.subplots(1, 3)
    _activity(config, model, source, image, raster, membranes, outputs)
    for axes in (loss, accuracy, raster, membranes, outputs):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_mistakes(path: Path, rows: list[dict], config, model, source, logits, labels) -> Path:
    """A figure: the confusion matrix, pictures of the worst mistakes, the firing rates over training, and the energy of a sample."""
    figure = plt.figure(figsize=(14, 8.6), constrained_layout=True)
    wrong = int((logits.argmax(-1) != labels).sum())
    figure.suptitle(f"{path.parent}: {wrong:,} of {len(labels):,} held-out samples are wrong")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    rates = {name.removeprefix("eval_rate "): [] for row in rows for name in row if name.startswith("eval_rate ")}
    confusion, *others = top.subplots(1, 2 + bool(rates), width_ratios=(1.1, 1, 1)[: 2 + bool(rates)])
    _confusions(confusion, logits.argmax(-1), labels, config.data.labels)
    _energy(others[-1], config, model, source)
    if rates:
        _rates(others[0], rows, list(rates))
    _worst(bottom, config, source, logits, labels)
    for axes in others:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _confusions(axes, answers, labels, names):
    n = len(names)
    counts = np.zeros((n, n), int)
    np.add.at(counts, (labels, answers), 1)
    part = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(part, cmap="Blues", vmin=0, vmax=1)
    if n <= 20:
        axes.set_xticks(range(n), [name[:12] for name in names], rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(n), [name[:12] for name in names], fontsize=8)
        for i, j in np.argwhere(counts):
            axes.text(
                j, i, counts[i, j], ha="center", va="center", fontsize=7, color="white" if part[i, j] > 0.5 else "black"
            )
    axes.set(xlabel="answer", ylabel="class", title="confusions")


def _rates(axes, rows, paths):
    for i, path in enumerate(paths):
        steps, rate = np.array(
            [(row["step"], row[f"eval_rate {path}"]) for row in rows if f"eval_rate {path}" in row]
        ).T
        axes.plot(steps, rate, "o-", ms=3, color=plt.cm.viridis(i / max(1, len(paths) - 1)), label=path)
    axes.set(xlabel="step", ylabel="spikes a step", ylim=(0, None), title="firing rates of layers, held out")
    if len(paths) <= 8:
        axes.legend(frameon=False, fontsize=8)


def _energy(axes, config, model, source):
    """Draw the energy that `monitor.operations` estimates for one sample: 45 nm CMOS, without memory access."""
    xs = _encoder(config, config.model.T)(_one(config, source[0]))
    found = {path: of for path, of in monitor.operations(model, xs).items() if of.acs + of.macs}
    names, joules = list(found), np.array([of.joules for of in found.values()])
    spikes = np.array([monitor.Operations(of.acs).joules for of in found.values()])
    axes.barh(names, spikes * 1e6, color=COLOURS[1], label="additions: inputs are spikes")
    axes.barh(
        names, (joules - spikes) * 1e6, left=spikes * 1e6, color=COLOURS[3], label="multiplications: they are not"
    )
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set(
        xlabel="microjoules, an estimate without memory", title=f"one sample: {joules.sum() * 1e6:.3g} microjoules"
    )
    axes.legend(frameon=False, fontsize=8)


def _worst(figure, config, source, logits, labels, count=10):
    """The mistakes with the largest loss; without mistakes, the samples with the largest loss."""
    shifted = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(labels)), labels]
    wrong = logits.argmax(-1) != labels
    order = np.lexsort((-losses, ~wrong))[:count]
    names = config.data.labels
    figure.suptitle(
        "worst mistakes: class, and answer" if wrong.any() else "no mistake; the samples with the largest loss"
    )
    axes = figure.subplots(2, -(-len(order) // 2), squeeze=False).ravel()
    for cell, index in zip(axes, order, strict=False):
        batch = _one(config, source[int(index)])
        xs = np.asarray(_encoder(config, config.model.T)(batch))[:, 0]
        strip = _strip(xs) if hasattr(config.data, "bins") else _picture(batch.get("image", xs))
        cell.imshow(strip, cmap="gray_r", aspect="auto" if xs.ndim < 4 else "equal", interpolation="nearest")
        cell.set_title(f"{names[labels[index]]}, {names[int(logits[index].argmax())]}", fontsize=9)
    for cell in axes:
        cell.set(xticks=[], yticks=[])
        cell.set_frame_on(False)


def _strip(xs, parts=4):
    """Events [T, H, W, P] as four pictures, one after another, two by two; more events are darker, OFF and ON red and blue."""
    frames = np.stack([part.sum(0) for part in np.array_split(xs, parts)])  # [4, H, W, P]
    top = max(np.percentile(frames[frames > 0], 95), 1e-6) if frames.any() else 1.0
    ink = np.clip(frames / top, 0, 1)
    off, on = ink[..., 0], ink[..., min(1, ink.shape[-1] - 1)]
    colours = np.stack([1 - on, 1 - np.maximum(on, off), 1 - off], -1)
    colours[:, [0, -1]], colours[:, :, [0, -1]] = 0.8, 0.8  # a frame
    return np.concatenate([np.concatenate(colours[i : i + 2], 1) for i in (0, 2)])


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


def _activity(config, model, source, image_axes, raster, membranes, outputs):
    T = max(STEPS, config.model.T)
    batch = _one(config, source[len(source) // 3])
    label, names = int(batch["label"][0]), config.data.labels
    xs, outs, hidden, states = _recorded(config, model, batch, T)
    outs, answer = np.asarray(outs)[:, 0], int(np.asarray(outs)[:, 0].mean(0).argmax())
    xs = np.asarray(xs)[:, 0]
    image_axes.imshow(_picture(batch.get("image", xs)), cmap="gray_r", aspect="auto" if xs.ndim < 4 else "equal")
    image_axes.set(xticks=[], yticks=[], title=f"a held-out {names[label]}, read as {names[answer]}")

    layers, last = _shown(hidden)
    flat = lambda x: np.asarray(x, np.float32)[:, 0].reshape(T, -1)
    _raster(raster, {name: flat(hidden[path]) for name, path in layers.items()}, T)
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    layer = modules[last]
    threshold = float(np.mean((layer.neuron if isinstance(layer, Recurrent) else layer).threshold))
    _membranes(membranes, flat(hidden[last]), flat(states.v), threshold)

    heights = _apart(outs[-1], 0.045 * (outs.max() - outs.min()))
    for k in range(outs.shape[1]):
        right = k == label
        outputs.plot(outs[:, k], color=COLOURS[3] if right else "0.7", lw=2.2 if right else 1, zorder=2 if right else 1)
        outputs.text(T, heights[k], names[k], fontsize=9, va="center", color=COLOURS[3] if right else "0.5")
    outputs.set(xlabel="time step", xlim=(-1, T + 2), title="outputs")


def _apart(heights, gap):
    """The same heights, moved up until no two labels are nearer than `gap`."""
    heights, order = np.array(heights), np.argsort(heights)
    for below, above in zip(order, order[1:], strict=False):
        heights[above] = max(heights[above], heights[below] + gap)
    return heights


def _picture(xs):
    """The mean over time of the input [T, H, W, C], or an image [1, H, W, C]; two polarities become red and green. Bands [T, N] or [T, N, C] over time."""
    if xs.ndim < 4:
        return xs.reshape(*xs.shape[:2], -1).sum(-1).T[::-1]
    mean = xs.mean(0) / max(xs.mean(0).max(), 1e-6)
    return mean[..., 0] if mean.shape[-1] == 1 else np.pad(mean, ((0, 0), (0, 0), (0, 3 - mean.shape[-1])))


def _shown(hidden):
    """({name: path} of at most LAYERS hidden layers, the path of the last one). A block with several shows its last layer."""
    blocks = {}
    for path in hidden:  # layers.3.join.neuron, layers.3.main.layers.1.neuron: the block's own has the shorter path
        block = int(path.split(".")[1])
        blocks[block] = min(blocks.get(block, path), path, key=len)
    paths = [blocks[block] for block in sorted(blocks)]
    chosen = np.unique(np.linspace(0, len(paths) - 1, LAYERS).astype(int))
    return {f"layer {i + 1}": paths[i] for i in chosen}, paths[-1]


def _recorded(config, model, batch, T):
    """(inputs, outputs, {path of a hidden layer: spikes}, the states of the last layer shown)."""

    @jax.jit
    def run(state, batch):
        model = nnx.merge(graphdef, state)
        xs = _encoder(config, T)(batch)
        (outs, _), hidden = monitor.record(model, xs)
        last = _shown(sorted(hidden))[1]  # in the order in which `jit` returns them
        return xs, outs, hidden, monitor.record(model, xs, layers=[last], what="state")[1][last]

    graphdef, state = nnx.split(model)
    return run(state, batch)


def _raster(axes, layers, T):
    base = 0
    for i, (name, spikes) in enumerate(layers.items()):
        firing = np.flatnonzero(spikes.any(0))
        shown = firing[np.linspace(0, len(firing) - 1, min(NEURONS, len(firing))).astype(int)]
        t, neuron = np.nonzero(spikes[:, shown])
        height = max(len(shown), NEURONS // 4)  # room for its name
        axes.plot(t, base + (height - len(shown)) / 2 + neuron, "|", color=COLOURS[i], ms=2.2, mew=1.1)
        axes.text(T, base + height / 2, f"{name}\n{spikes.mean():.0%}", color=COLOURS[i], va="center", fontsize=9)
        base += height + GAP
    top = base - GAP - 1
    axes.set(xlabel="time step", ylabel="neurons that fire", yticks=[], xlim=(-1, T), ylim=(-0.05 * top, 1.05 * top))
    axes.set_title("spikes of hidden layers, the mean rate beside each")


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


def _one(config, sample):
    """A batch of this sample alone, as NumPy arrays."""
    return next(iter(load([sample], config.data.example(), batch=1, shuffle=False, device=False)))


@lru_cache  # one program for all samples of a figure
def _encoder(config, T):
    """A function of a batch of samples: what the network takes, at T steps."""

    @jax.jit
    def encode(batch):
        return split(config.data.encode(jax.random.key(config.seed), batch, T))[0]

    return encode
