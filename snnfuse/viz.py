"""Figures of spikes, membranes, rates and events: functions of arrays that return matplotlib Axes. Needs the extra `viz`.

Time is in steps, or in ms if `dt` is given, the milliseconds per step. Without `ax`, a new figure is made.
"""

from pathlib import Path
from typing import Any

import numpy as np

from snnfuse.data.show import strip

COLOURS = ("#3b6fb6", "#c8553d", "#2a9d8f", "#e08e29", "#7a5195", "#6b6b6b")
INK, FAINT = "#222222", "#b0b0b0"


def raster(spikes, ax=None, *, dt: float | None = None):
    """A bar for each spike: time on the x axis, neurons on the y axis. `spikes` [T, N]; every value except 0 is a spike."""
    spikes = _array("spikes", spikes, "[T, N]", 2)
    T, N = spikes.shape
    ax = _axes(ax)
    t, neuron = np.nonzero(spikes)
    half = max(0.4, N / 400)  # rows high; long enough to be visible with many neurons
    ax.vlines(t * (dt or 1), neuron - half, neuron + half, color=INK, lw=1)
    ax.set(ylabel="neuron", ylim=(-0.6, N - 0.4))
    _whole_numbers(ax)
    return _over_time(ax, T, dt)


def traces(v, ax=None, *, threshold: float | None = None, spikes=None, dt: float | None = None):
    """Membrane potentials `v` [T, N]: one row per neuron, the first at the top. Choose a few neurons, as in v[:, :5].

    All rows have the same scale. `threshold` adds a dashed line to each row, and `spikes` [T, N] a bar above each spike.
    """
    v = _array("v", v, "[T, N]", 2)
    T, N = v.shape
    if spikes is not None:
        spikes = _array("spikes", spikes, "[T, N]", 2)
        if spikes.shape != v.shape:
            raise ValueError(f"spikes must have the shape of v, {v.shape}; got {spikes.shape}")
    ax = _axes(ax)
    low, high = min(0.0, v.min()), max(v.max(), threshold if threshold is not None else v.max())
    span = (high - low) or 1.0
    marks = [0.0] if threshold is None else [0.0, threshold]
    time, ticks = np.arange(T) * (dt or 1), []
    for n in range(N):
        base = (N - 1 - n) * 1.35 * span
        ax.plot(time, base + v[:, n], color=COLOURS[n % len(COLOURS)], lw=1.3)
        if threshold is not None:
            ax.axhline(base + threshold, color=FAINT, lw=0.8, ls="--", zorder=0)
        if spikes is not None:
            t = time[spikes[:, n] != 0]
            ax.vlines(t, base + high + 0.05 * span, base + high + 0.17 * span, color=INK, lw=1.2)
        if N > 1:
            ax.annotate(
                f"neuron {n}", (1.01, base + 0.5 * (low + high)), xycoords=ax.get_yaxis_transform(), va="center"
            )
        ticks += [(base + mark, f"{mark:g}") for mark in marks]
    ax.set_yticks(*zip(*ticks, strict=True))
    ax.set_ylabel("membrane potential" + (" (dashes: threshold)" if threshold is not None else ""))
    return _over_time(ax, T, dt)


def rate_histogram(spikes, ax=None, *, dt: float | None = None, bins: int = 20):
    """A histogram of the neurons' firing rates; the legend counts the neurons that never fire. `spikes` [T, ..., N].

    The rate is in spikes per step, or in Hz if `dt` is given, the milliseconds per step. It is averaged over all axes between
    T and N.
    """
    spikes = _array("spikes", spikes, "[T, ..., N]", 2, more=True)
    rates = (spikes != 0).mean(axis=tuple(range(spikes.ndim - 1))) * (1e3 / dt if dt else 1)
    ax = _axes(ax)
    ax.hist(rates[rates > 0], bins=bins, color=COLOURS[0], rwidth=0.92)
    ax.set(xlabel="firing rate (Hz)" if dt else "firing rate (spikes per step)", ylabel="neurons")
    ax.set_xlim(left=0)
    _whole_numbers(ax)
    unit = "Hz" if dt else "per step"
    ax.plot([], [], " ", label=f"mean {rates.mean():.3g} {unit}; {np.mean(rates == 0):.0%} never fire")
    ax.legend(frameon=False, handlelength=0, handletextpad=0)
    return _plain(ax)


def rates_over_training(rates: dict[str, Any], ax=None, *, steps=None):
    """The firing rate of each layer over training: `rates` {layer: [K]}, at the training steps `steps` [K], or at 0..K-1."""
    curves = {name: _array(f"rates[{name!r}]", r, "[K]", 1) for name, r in rates.items()}
    if not curves:
        raise ValueError(f"rates must have at least one layer; got {rates!r}")
    K = len(next(iter(curves.values())))
    steps = np.arange(K) if steps is None else _array("steps", steps, "[K]", 1)
    ax = _axes(ax)
    for i, (name, curve) in enumerate(curves.items()):
        if len(curve) != len(steps):
            raise ValueError(f"rates[{name!r}] must have one value per step, so length {len(steps)}; got {len(curve)}")
        ax.plot(steps, curve, color=COLOURS[i % len(COLOURS)], lw=1.6, label=name)
    ax.set(xlabel="training step", ylabel="firing rate (spikes per step)")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return _plain(ax)


def frames(counts, ax=None, *, most: int = 8, dt: float | None = None):
    """Event frames `counts` [T, H, W, P] side by side: ON events blue, OFF events red (P = 2: OFF, ON). A stronger colour is more events.

    If T is larger than `most`, `most` evenly spaced frames are shown.
    """
    pictures, T = _pictures(counts)
    shown = np.unique(np.linspace(0, T - 1, min(most, T)).round().astype(int))
    H, W = pictures[0].shape[:2]
    gap = max(1, W // 16)
    wide = np.full((H, len(shown) * (W + gap) - gap, 3), 255, np.uint8)
    ax = _axes(ax, (1.5 * len(shown), 1.5 * H / W + 0.6))
    for i, t in enumerate(shown):
        left = i * (W + gap)
        wide[:, left : left + W] = pictures[t]
        ax.add_patch(_pyplot().Rectangle((left - 0.5, -0.5), W, H, fill=False, ec=FAINT, lw=0.8))
    ax.imshow(wide, interpolation="nearest")
    ax.set_xlim(-1, wide.shape[1])
    ax.set_ylim(H, -1)
    ax.set_xticks(np.arange(len(shown)) * (W + gap) + (W - 1) / 2, [f"{t * (dt or 1):g}" for t in shown])
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("time (ms)" if dt else "time (steps)")
    return ax


def spike_video(counts, path: str | Path | None = None, *, fps: float = 10.0, dt: float | None = None):
    """Event frames `counts` [T, H, W, P] as a matplotlib Animation, coloured as in `frames`. `path`, a .gif, saves it.

    In Jupyter, `matplotlib.rc("animation", html="jshtml")` shows the returned animation.
    """
    pictures, T = _pictures(counts)
    if path is not None and Path(path).suffix != ".gif":
        raise ValueError(f"path must end in .gif; got {str(path)!r}")
    pyplot = _pyplot()
    from matplotlib.animation import FuncAnimation, PillowWriter

    H, W = pictures[0].shape[:2]
    ax = _axes(None, (3.2, 3.2 * H / W + 0.4))
    image = ax.imshow(pictures[0], interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_color(FAINT)

    def show(t):
        image.set_data(pictures[t])
        ax.set_title(f"{t * dt:g} ms" if dt else f"step {t}", fontsize=10, color=INK)
        return (image,)

    video = FuncAnimation(ax.figure, show, frames=T, interval=1e3 / fps)
    pyplot.close(ax.figure)  # otherwise a notebook also shows the still figure
    if path is not None:
        video.save(path, writer=PillowWriter(fps=fps))
    return video


def _pyplot():
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f'snnfuse.viz needs matplotlib ({error}): pip install "snnfuse[viz]"') from error
    return pyplot


def _axes(ax, size=(6.4, 3.6)):
    return _pyplot().subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _whole_numbers(ax):
    from matplotlib.ticker import MaxNLocator

    ax.yaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _plain(ax):
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _over_time(ax, T, dt):
    step = dt or 1
    ax.set(xlabel="time (ms)" if dt else "time (steps)", xlim=(-0.5 * step, (T - 0.5) * step))
    return _plain(ax)


def _pictures(counts):
    counts = _array("counts", counts, "[T, H, W, P]", 4)
    if counts.shape[-1] not in (1, 2):
        raise ValueError(f"counts must be [T, H, W, P] with P 1 or 2 polarities; got shape {counts.shape}")
    return strip(counts, 1), len(counts)


def _array(name, value, wanted, rank, more=False):
    value = np.asarray(value)
    if value.ndim < rank or (value.ndim > rank and not more) or value.size == 0:
        raise ValueError(f"{name} must be {wanted}, and not empty; got shape {value.shape}")
    return value.astype(np.float32) if value.dtype.kind not in "biuf" else value  # bfloat16
