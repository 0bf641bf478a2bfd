"""A synthetic event camera in NumPy: it makes events from a still picture that moves as in N-MNIST.

Only the motion is that of N-MNIST. There is no noise, no refractory period, no screen and no lens.
"""

from dataclasses import dataclass

import numpy as np

from snnfuse.data.events import Events, Sensor

SACCADE = 105_000  # microseconds, each of three; N-MNIST's stabilising code has 105e3
# Where the picture stands, in pixels (x, y), at the start and after each saccade: Orchard's `stabilize`, inverted.
CORNERS = np.array([[0.0, 0.0], [3.5, 7.0], [7.0, 0.0], [0.0, 0.0]])


def position(t: np.ndarray) -> np.ndarray:
    """The offset (x, y) of the picture at microsecond t, [..., 2]: three straight saccades around a triangle."""
    at = np.arange(len(CORNERS)) * SACCADE
    return np.stack([np.interp(t, at, CORNERS[:, axis]) for axis in (0, 1)], -1)


def _shift_matrices(offsets: np.ndarray, size: int, length: int) -> np.ndarray:
    """Matrices [k, size, length]. Each one shifts a line of pixels by a fractional offset, by linear interpolation."""
    at = np.arange(size)[:, None] - np.arange(length) - offsets[:, None, None]
    return np.maximum(0, 1 - np.abs(at))


@dataclass(frozen=True)
class Camera:
    """An ideal event camera. A pixel stores the log light of its last event, and fires when the log light differs by `contrast`.

        L = log(dark + light);   while |L - memory| >= contrast: event of that sign, memory moves by contrast

    The light is sampled every `step` microseconds, and an event's time interpolated between samples, as in Rebecq,
    Gehrig and Scaramuzza 2018, "ESIM: an open event camera simulator".
    """

    sensor: Sensor = Sensor(34, 34)
    contrast: float = 0.5
    dark: float = 0.1
    step: int = 5_000

    def record(self, image: np.ndarray) -> Events:
        """The events of a picture [h, w], with light in 0..1, over the three saccades. They are sorted by time, then by pixel."""
        if image.ndim != 2 or image.min() < 0 or image.max() > 1:
            raise ValueError(f"image must be [h, w] in [0, 1]; got shape {image.shape}, {image.min()}..{image.max()}")
        times = np.arange(0, 3 * SACCADE + 1, self.step)
        x, y = position(times).T
        rows = _shift_matrices(y, self.sensor.height, image.shape[0])
        columns = _shift_matrices(x, self.sensor.width, image.shape[1])
        level = np.log(self.dark + rows @ image @ columns.swapaxes(1, 2))
        # Pixels start out of step, each at its own place: else all that ends as it began would end on a threshold.
        phase = np.random.default_rng(0).uniform(-0.5, 0.5, level[0].shape)
        memory, found = level[0] + self.contrast * phase, []
        for k in range(1, len(times)):
            before, after = level[k - 1], level[k]
            crossed = np.where(after == before, 0, np.trunc((after - memory) / self.contrast))
            for n in range(1, int(np.abs(crossed).max(initial=0)) + 1):
                y, x = np.nonzero(np.abs(crossed) >= n)
                sign = np.sign(crossed[y, x])
                reached = memory[y, x] + sign * n * self.contrast
                part = np.clip((reached - before[y, x]) / (after - before)[y, x], 0, 1)
                t = times[k - 1] + np.minimum(part * self.step, self.step - 1)
                found.append(np.stack([t.astype(np.int64), x, y, (sign > 0).astype(np.int64)]))
            memory += crossed * self.contrast
        t, x, y, p = np.concatenate(found, 1) if found else np.empty((4, 0), np.int64)
        order = np.lexsort((p, x, y, t))
        return {"t": t[order], "x": x[order], "y": y[order], "p": p[order]}
