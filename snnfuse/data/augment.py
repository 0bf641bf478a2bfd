"""Augmentations of events: pure functions of a recording and a NumPy generator, on the host, before any frame is made.

None invents an event, and none changes the recording it is given. An empty result is left to the caller: see `Augment`.
"""

from dataclasses import dataclass, replace

import numpy as np

from snnfuse.data.events import Events, Sensor


def keep(events: Events, chosen: np.ndarray) -> Events:
    return {column: values[chosen] for column, values in events.items()}


def flip(events: Events, sensor: Sensor) -> Events:
    """Left and right exchanged: x becomes W - 1 - x."""
    x = events["x"]
    return events | {"x": (sensor.width - 1 - x.astype(np.int64)).astype(x.dtype)}


def shift(events: Events, sensor: Sensor, dx: int, dy: int) -> Events:
    """Every event moved by (dx, dy) pixels; those that leave the sensor are dropped."""
    x, y = events["x"].astype(np.int64) + dx, events["y"].astype(np.int64) + dy
    inside = (x >= 0) & (x < sensor.width) & (y >= 0) & (y < sensor.height)
    moved = events | {"x": x.astype(events["x"].dtype), "y": y.astype(events["y"].dtype)}
    return moved if inside.all() else keep(moved, inside)


def crop(events: Events, height: int, width: int, top: int, left: int) -> Events:
    """The events of a window, whose corner becomes the origin; give the frames Sensor(height, width)."""
    x, y = events["x"].astype(np.int64) - left, events["y"].astype(np.int64) - top
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return keep(events | {"x": x.astype(events["x"].dtype), "y": y.astype(events["y"].dtype)}, inside)


def jitter(events: Events, rng: np.random.Generator, sd: float) -> Events:
    """Each time moved by a normal draw of `sd` microseconds, kept within the recording, and sorted again (stably)."""
    t = events["t"].astype(np.float64)
    t = np.clip(np.rint(t + rng.normal(0, sd, len(t))), t[0], t[-1]).astype(events["t"].dtype)
    order = np.argsort(t, kind="stable")
    return keep(events | {"t": t}, order)


def drop(events: Events, rng: np.random.Generator, rate: float) -> Events:
    """Each event dropped with probability `rate`, but never all of them."""
    chosen = rng.random(len(events["t"])) >= rate
    if not chosen.any():
        chosen[rng.integers(len(chosen))] = True
    return keep(events, chosen)


@dataclass(frozen=True)
class Augment:
    """A random change of a recording: flipped with probability `flip`, moved by up to `shift` pixels each way, a window
    of `crop` = (height, width) cut out at a random place, times jittered by `jitter` microseconds (standard
    deviation), a fraction of up to `drop` of the events dropped.

    A shift or crop that would leave no event is not done (a crop then takes the corner with the first event).
    """

    flip: float = 0.0
    shift: int = 0
    crop: tuple[int, int] | None = None
    jitter: float = 0.0
    drop: float = 0.0

    def sensor(self, sensor: Sensor) -> Sensor:
        """That of the result."""
        return sensor if self.crop is None else sensor._replace(height=self.crop[0], width=self.crop[1])

    def __call__(self, events: Events, sensor: Sensor, rng: np.random.Generator) -> Events:
        if rng.random() < self.flip:
            events = flip(events, sensor)
        if self.shift:
            moved = shift(events, sensor, *rng.integers(-self.shift, self.shift + 1, 2).tolist())
            events = moved if len(moved["t"]) else events
        if self.crop is not None:
            events = self._crop(events, sensor, rng)
        if self.jitter:
            events = jitter(events, rng, self.jitter)
        return drop(events, rng, rng.random() * self.drop) if self.drop else events

    def _crop(self, events: Events, sensor: Sensor, rng: np.random.Generator) -> Events:
        height, width = self.crop
        if height > sensor.height or width > sensor.width:
            raise ValueError(f"crop {self.crop} is larger than the sensor {sensor}")
        top, left = rng.integers(sensor.height - height + 1), rng.integers(sensor.width - width + 1)
        cut = crop(events, height, width, top, left)
        if not len(cut["t"]):
            top = min(int(events["y"][0]), sensor.height - height)
            left = min(int(events["x"][0]), sensor.width - width)
            cut = crop(events, height, width, top, left)
        return cut


NONE = Augment()


def without(augment: Augment) -> Augment:
    """What of it is no chance: for held-out data, the crop size alone."""
    return replace(NONE, crop=augment.crop)
