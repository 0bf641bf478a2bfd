"""Augmentations of events: pure functions of a recording and a NumPy generator, on the host, before frames are made.

They invent no event, and they do not change the recording that they are given. Each checks it, see `events.check`.
"""

from dataclasses import dataclass, replace

import numpy as np

from snnfuse.data.events import Events, Sensor, check


def keep(events: Events, chosen: np.ndarray) -> Events:
    return {column: values[chosen] for column, values in events.items()}


def flip(events: Events, sensor: Sensor) -> Events:
    """Left and right exchanged: x becomes W - 1 - x."""
    events = check(events, sensor)
    x = events["x"]
    return events | {"x": (sensor.width - 1 - x.astype(np.int64)).astype(x.dtype)}


def shift(events: Events, sensor: Sensor, dx: int, dy: int) -> Events:
    """Every event moved by (dx, dy) pixels; those that leave the sensor are dropped. One row moves by dx only."""
    events = check(events, sensor)
    return _window(events, sensor.height, sensor.width, -dy if sensor.height > 1 else 0, -dx)


def crop(events: Events, height: int, width: int, top: int, left: int) -> Events:
    """The events of a window, whose corner becomes the origin; give the frames Sensor(height, width)."""
    return _window(check(events, None), height, width, top, left)


def _window(events: Events, height: int, width: int, top: int, left: int) -> Events:
    moved = events
    inside = np.ones(len(events["t"]), bool)
    for column, size, start in (("x", width, left), ("y", height, top)):
        if column in events:
            values = events[column].astype(np.int64) - start
            inside &= (values >= 0) & (values < size)
            moved = moved | {column: values.astype(events[column].dtype)}
    return moved if inside.all() else keep(moved, inside)


def jitter(events: Events, rng: np.random.Generator, sd: float) -> Events:
    """Each time moved by a normal draw of `sd` microseconds, kept within the recording, and sorted again (stably)."""
    if not 0 <= sd < np.inf:
        raise ValueError(f"sd must be at least 0 and finite; got {sd}")
    events = check(events, None)
    if not len(events["t"]):
        return events
    first, since = int(events["t"][0]), events["t"].astype(np.int64) - int(events["t"][0])
    moved = np.clip(np.rint(since + rng.normal(0, sd, len(since))), 0, since[-1]).astype(np.int64)
    order = np.argsort(moved, kind="stable")
    return keep(events | {"t": (first + moved).astype(events["t"].dtype)}, order)


def drop(events: Events, rng: np.random.Generator, rate: float) -> Events:
    """Each event dropped with probability `rate`, but never all of them."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1]; got {rate}")
    events = check(events, None)
    chosen = rng.random(len(events["t"])) >= rate
    if len(chosen) and not chosen.any():
        chosen[rng.integers(len(chosen))] = True
    return keep(events, chosen)


@dataclass(frozen=True)
class Augment:
    """A random change of a recording, in this order.

    Args:
      flip: the probability that left and right are exchanged.
      shift: events move by up to this many pixels each way. A shift that would leave no event is not done.
      crop: (height, width) of a window, cut out at a random place. If it has no event, the window moves to the first one.
      jitter: times move by a normal draw of this standard deviation, in microseconds.
      drop: a random fraction of the events is dropped, at most this one.
    """

    flip: float = 0.0
    shift: int = 0
    crop: tuple[int, int] | None = None
    jitter: float = 0.0
    drop: float = 0.0

    def __post_init__(self):
        for name in ("flip", "drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1]; got {getattr(self, name)}")
        for name in ("shift", "jitter"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be at least 0 and finite; got {getattr(self, name)}")
        if self.crop is not None and (len(self.crop) != 2 or min(self.crop) < 1):
            raise ValueError(f"crop must be (height, width), each at least 1; got {self.crop}")

    def sensor(self, sensor: Sensor) -> Sensor:
        """The sensor of the result."""
        return sensor if self.crop is None else sensor._replace(height=self.crop[0], width=self.crop[1])

    def __call__(self, events: Events, sensor: Sensor, rng: np.random.Generator) -> Events:
        events = check(events, sensor)
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
        if len(events["t"]) and not len(cut["t"]):
            top = min(int(events["y"][0]), sensor.height - height) if "y" in events else 0
            left = min(int(events["x"][0]), sensor.width - width)
            cut = crop(events, height, width, top, left)
        return cut


NONE = Augment()


def without(augment: Augment) -> Augment:
    """The part that is not random, for held-out data: the size of the crop."""
    return replace(NONE, crop=augment.crop)
