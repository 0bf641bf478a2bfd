"""Events: what one is, what is wrong with some, and how a recording of them becomes frames, on the host.

A recording is a dict of equally long arrays: `t` in microseconds, never decreasing; `x` and `y` in pixels; `p`, 0 for
OFF and 1 for ON. `y` may be missing where the sensor is one row, `p` where it has one polarity. Frames are [T, H, W, P], P the polarities. Everything here is NumPy; `packed.py` bins on the device.

Every way of making frames is a bin for each event, and one sum: no event is lost or counted twice, unless a window
was asked for that ends before the recording does.
"""

from typing import NamedTuple

import numpy as np

Events = dict[str, np.ndarray]


class Sensor(NamedTuple):
    """Height and width in pixels, and 2 polarities, or 1 where events have none (an audio cochlea: 1 x 700 x 1)."""

    height: int
    width: int
    polarities: int = 2

    @property
    def size(self) -> int:
        return self.height * self.width * self.polarities

    @property
    def columns(self) -> str:
        """The columns that say something: no y in one row, no p for one polarity."""
        return "tx" + "y" * (self.height > 1) + "p" * (self.polarities > 1)


class BadSample(ValueError):
    """A sample, named, that is not what its format promises."""

    def __init__(self, name: str, why: str):
        super().__init__(f"{name}: {why}")
        self.name, self.why = name, why

    def __reduce__(self):
        return BadSample, (self.name, self.why)


class Unsorted(BadSample):
    """Timestamps that go back; every event may still be sound."""

    def __reduce__(self):
        return Unsorted, (self.name, self.why)


def check(events: Events, sensor: Sensor, name: str) -> None:
    """Raises BadSample, or Unsorted for that fault alone, unless `events` is a recording by `sensor`."""
    lengths = {column: len(events[column]) for column in sensor.columns}
    if len(set(lengths.values())) != 1:
        raise BadSample(name, f"columns of different lengths: {lengths}")
    if lengths["t"] == 0:
        raise BadSample(name, "no events")
    for column, limit in (("x", sensor.width), ("y", sensor.height), ("p", sensor.polarities)):
        if column not in sensor.columns:
            continue
        values = np.asarray(events[column]).astype(np.int64)
        if np.any(bad := (values < 0) | (values >= limit)):
            i = int(bad.argmax())
            raise BadSample(name, f"event {i} has {column} = {values[i]}, outside 0..{limit - 1}")
    t = np.asarray(events["t"])
    if not np.all(np.isfinite(t)):
        raise BadSample(name, f"event {int((~np.isfinite(t)).argmax())} has t = {t[(~np.isfinite(t)).argmax()]}")
    if np.any(back := t[1:] < t[:-1]):
        i = int(back.argmax()) + 1
        raise Unsorted(name, f"event {i} has t = {t[i]}, before {t[i - 1]}; {int(back.sum())} such steps back")


def split_by_number(t: np.ndarray, T: int) -> np.ndarray:
    """Bins of n // T events each, the last taking the rest: SpikingJelly's split_by='number'.

    bin[i] = min(i // (n // T), T - 1);   T - 1 where n < T
    """
    per = len(t) // T
    return np.minimum(np.arange(len(t)) // per, T - 1) if per else np.full(len(t), T - 1)


def split_by_time(t: np.ndarray, T: int) -> np.ndarray:
    """T bins of equal duration, the last taking the rest: SpikingJelly's split_by='time'.

        bin[i] = min((t[i] - t[0]) // dt, T - 1),   dt = (t[n-1] - t[0]) // T;   T - 1 where dt is 0

    A bin without events, where SpikingJelly raises IndexError, is an empty frame.
    """
    since = t.astype(np.int64) - int(t[0])
    dt = since[-1] // T
    return np.minimum(since // dt, T - 1) if dt else np.full(len(t), T - 1)


def split_by_dt(t: np.ndarray, dt: int, T: int | None = None, start: int | None = None) -> np.ndarray:
    """Bins of `dt` microseconds from `start` (default t[0]).

        bin[i] = (t[i] - start) // dt

    Without T there are max(1, ceil((t[n-1] - t[0]) / dt)), and an event exactly at the end falls in the last, as in
    SpikingJelly's integrate_events_by_fixed_duration. With T, bins T and later (and negative ones, where the window
    starts late) are outside the window, which `count_events` leaves out.
    """
    if dt < 1:
        raise ValueError(f"dt must be at least 1 microsecond; got {dt}")
    since = t.astype(np.int64) - int(t[0] if start is None else start)
    bins = since // dt
    return bins if T is not None else np.minimum(bins, max(1, -(-int(since[-1]) // dt)) - 1)


def addresses(events: Events, sensor: Sensor) -> np.ndarray:
    """(y W + x) P + p of each event, its place in a flattened frame; p is left out where P is 1."""
    place = _pixels(events, sensor)
    return place if sensor.polarities == 1 else place * sensor.polarities + (events["p"] != 0)


def _pixels(events: Events, sensor: Sensor) -> np.ndarray:
    x = events["x"].astype(np.int64)
    return x if sensor.height == 1 else events["y"].astype(np.int64) * sensor.width + x


def count_events(events: Events, bins: np.ndarray, T: int, sensor: Sensor) -> np.ndarray:
    """[T, H, W, P] int64: how many events of each bin, pixel and polarity; bins outside 0..T-1 are left out."""
    place = bins * sensor.size + addresses(events, sensor)
    inside = (bins >= 0) & (bins < T)
    counts = np.bincount(place if inside.all() else place[inside], minlength=T * sensor.size)
    return counts.reshape(T, *sensor)


def to_frames(
    events: Events, sensor: Sensor, T: int | None = None, *, split: str = "number", dt: int | None = None
) -> np.ndarray:
    """[T, H, W, P] int64 counts, split "number", "time" (both need T) or "dt" (needs dt; T cuts or pads)."""
    if split == "dt":
        if dt is None:
            raise ValueError("split='dt' needs dt, in microseconds")
        bins = split_by_dt(events["t"], dt, T)
        T = int(bins[-1]) + 1 if T is None else T
    elif split in ("number", "time"):
        if T is None or T < 1:
            raise ValueError(f"split={split!r} needs T of at least 1; got {T}")
        bins = (split_by_number if split == "number" else split_by_time)(events["t"], T)
    else:
        raise ValueError(f"split must be 'number', 'time' or 'dt'; got {split!r}")
    return count_events(events, bins, T, sensor)


def to_uint8(counts: np.ndarray, *, saturate: bool = False) -> np.ndarray:
    """Counts as bytes. More than 255 events in a place is an OverflowError, unless they may `saturate`."""
    if (top := int(counts.max(initial=0))) > 255 and not saturate:
        raise OverflowError(f"{top} events in one place do not fit a byte: use more frames, or saturate=True")
    return np.minimum(counts, 255).astype(np.uint8)


def voxel_grid(events: Events, sensor: Sensor, T: int) -> np.ndarray:
    """[T, H, W, 1] float32: polarities (+1 ON, -1 OFF), shared by the two nearest of T instants.

        V[k] = sum_i p[i] max(0, 1 - |k - s[i]|),   s[i] = (T - 1) (t[i] - t[0]) / (t[n-1] - t[0])

    Its sum is that of the polarities. Zhu et al. 2019, https://arxiv.org/abs/1812.08156.
    """
    since = events["t"].astype(np.float64) - float(events["t"][0])
    s = (T - 1) * since / max(since[-1], 1.0)
    left = np.floor(s).astype(np.int64)
    place, pixels = _pixels(events, sensor), sensor.height * sensor.width
    sign = np.where(events["p"] != 0, 1.0, -1.0) if sensor.polarities > 1 else 1.0
    grid = np.bincount(left * pixels + place, sign * (1 - (s - left)), minlength=(T + 1) * pixels)
    grid += np.bincount((left + 1) * pixels + place, sign * (s - left), minlength=(T + 1) * pixels)
    return grid[: T * pixels].reshape(T, sensor.height, sensor.width, 1).astype(np.float32)


def time_surface(events: Events, sensor: Sensor, T: int, dt: int, tau: float) -> np.ndarray:
    """[T, H, W, P] float32: how fresh the last event of each place is at the end of each bin of `dt` microseconds.

        S[k] = exp(-(t[0] + (k + 1) dt - last[k]) / tau),   0 where there was none

    `tau` in microseconds. Lagorce et al. 2017, "HOTS: a hierarchy of event-based time-surfaces".
    """
    bins, place = split_by_dt(events["t"], dt, T), addresses(events, sensor)
    last = np.full(sensor.size, -np.inf)
    surfaces = np.empty((T, sensor.size), np.float32)
    edges = np.searchsorted(bins, np.arange(T + 1))
    for k in range(T):
        of = slice(edges[k], edges[k + 1])
        last[place[of]] = events["t"][of]  # in order: the last one of a place stays
        surfaces[k] = np.exp(-(float(events["t"][0]) + (k + 1) * dt - last) / tau)
    return surfaces.reshape(T, *sensor)
