"""Figures hold the given data on the given axes, and errors name what cannot be drawn."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

from snnfuse import viz  # noqa: E402
from snnfuse.data.show import strip  # noqa: E402

rng = np.random.default_rng(0)
SPIKES = rng.random((30, 7)) < 0.2
COUNTS = rng.poisson(0.3, (12, 5, 6, 2))


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_raster():
    ax = viz.raster(jnp.asarray(SPIKES, jnp.bfloat16), dt=2.0)
    bars = ax.collections[0].get_segments()
    drawn = {(bar[0, 0] / 2.0, bar[:, 1].mean().round(6)) for bar in bars}
    assert drawn == set(zip(*np.nonzero(SPIKES), strict=True)) and len(bars) == SPIKES.sum()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time (ms)", "neuron")
    assert ax.get_xlim() == (-1, 59)
    viz.raster(np.zeros((4, 3)))  # no spikes at all can be drawn too


def test_traces():
    v = rng.normal(size=(30, 3))
    ax = viz.traces(v, threshold=0.8, spikes=SPIKES[:, :3])
    rows = [line for line in ax.lines if len(line.get_ydata()) == 30]
    thresholds = [line.get_ydata()[0] for line in ax.lines if len(line.get_ydata()) == 2]
    assert len(rows) == len(thresholds) == 3
    for n, (row, threshold) in enumerate(zip(rows, thresholds, strict=True)):
        np.testing.assert_allclose(row.get_ydata() - threshold, v[:, n] - 0.8, atol=1e-9)
    assert sum(len(bars.get_segments()) for bars in ax.collections) == SPIKES[:, :3].sum()
    assert thresholds == sorted(thresholds, reverse=True) and ax.get_xlabel() == "time (steps)"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "0.8"] * 3


def test_rate_histogram():
    spikes = np.zeros((10, 2, 4))
    spikes[:5, :, 0], spikes[:2, 0, 1] = 1, 1
    ax = viz.rate_histogram(spikes, dt=2.0)
    assert sum(bar.get_height() for bar in ax.patches) == 2, "those that never fire are no bar"
    assert ax.get_legend().get_texts()[0].get_text() == "mean 75 Hz; 50% never fire"
    assert ax.get_xlabel() == "firing rate (Hz)"


def test_rates_over_training():
    ax = viz.rates_over_training({"layers.1": [0.1, 0.2, 0.3], "layers.4": jnp.arange(3.0)}, steps=[0, 10, 20])
    assert [line.get_label() for line in ax.lines] == ["layers.1", "layers.4"]
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 0.1], [10, 0.2], [20, 0.3]])


def test_frames():
    ax = viz.frames(COUNTS, most=4)
    picture, want = ax.images[0].get_array(), strip(COUNTS, 1)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "4", "7", "11"]
    for i, t in enumerate((0, 4, 7, 11)):
        np.testing.assert_array_equal(picture[:, 7 * i : 7 * i + 6], want[t])


def test_spike_video(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    video = viz.spike_video(COUNTS, tmp_path / "events.gif", fps=20, dt=10.0)
    with Image.open(tmp_path / "events.gif") as gif:
        assert gif.n_frames == 12 and gif.info["duration"] == 50
    assert "<img" in video.to_jshtml()  # what a notebook shows
    assert plt.get_fignums() == []


def test_a_figure_is_drawn_where_it_is_told():
    figure, (a, b) = plt.subplots(2)
    assert viz.raster(SPIKES, a) is a and viz.traces(rng.normal(size=(9, 1)), b) is b
    assert viz.frames(COUNTS, a) is a and viz.rate_histogram(SPIKES, b) is b
    assert viz.rates_over_training({"a": [1.0]}, a) is a and plt.get_fignums() == [figure.number]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: viz.raster(SPIKES[0]), r"spikes must be \[T, N\], and not empty; got shape \(7,\)"),
        (lambda: viz.traces(SPIKES[None]), r"v must be \[T, N\], and not empty; got shape \(1, 30, 7\)"),
        (lambda: viz.traces(SPIKES, spikes=SPIKES[:3]), r"spikes must have the shape of v, \(30, 7\); got \(3, 7\)"),
        (lambda: viz.rate_histogram(np.zeros((0, 3))), r"spikes must be \[T, ..., N\], and not empty"),
        (lambda: viz.rates_over_training({}), "rates must have at least one layer; got {}"),
        (
            lambda: viz.rates_over_training({"a": [1.0]}, steps=[1, 2]),
            r"rates\['a'\] must have one value per step, so length 2; got 1",
        ),
        (lambda: viz.frames(COUNTS[0]), r"counts must be \[T, H, W, P\], and not empty; got shape \(5, 6, 2\)"),
        (lambda: viz.frames(np.zeros((2, 3, 3, 4))), "with P 1 or 2 polarities"),
        (lambda: viz.spike_video(COUNTS, "events.mp4"), "path must end in .gif; got 'events.mp4'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with pytest.raises(ImportError, match=r'snnfuse.viz needs matplotlib .*pip install "snnfuse\[viz\]"'):
        viz.raster(SPIKES)
