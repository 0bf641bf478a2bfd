"""Events: what a recording is, how it is checked, and how it becomes frames, on the host.

A recording is a dict of equally long arrays: `t` in whole microseconds, never decreasing; `x` and `y` in pixels; `p`, 0
for OFF and 1 for ON (-1 and +1 are converted). `y` may be missing if the sensor is one row, `p` if it has one polarity.
A recording without events is sound: its frames are empty. Frames are [T, H, W, P], where P counts the polarities.

Every function here checks the recording it is given. It raises BadSample, which names the event and the column, or
Unsorted if times go back; `on_unsorted="sort"` sorts the events instead, and keeps the order of events with equal times.

Everything here is NumPy; `packed.py` makes the same frames on the device. Each event falls into one bin, and bins are
summed. So no event is lost or counted twice, except those outside a window that the caller asks for.
"""

import operator
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
    """A sample that is not what its format promises; the message begins with the sample's name."""

    def __init__(self, name: str, why: str):
        super().__init__(f"{name}: {why}")
        self.name, self.why = name, why

    def renamed(self, name: str) -> "BadSample":
        return type(self)(name, self.why)

    def __reduce__(self):
        return type(self), (self.name, self.why)


class Unsorted(BadSample):
    """Timestamps that go back; every event may still be sound."""


LATEST = 2**62  # microseconds: differences of two times then fit 64 bits
ON_UNSORTED = ("raise", "sort")


def check(events: Events, sensor: Sensor | None, name: str = "events", *, on_unsorted: str = "raise") -> Events:
    """The recording, with polarity 0 and 1, whole numbers as integers, and times in order.

    Without a sensor, x, y and p may be any whole numbers. Raises BadSample, or Unsorted if that is the only fault.
    """
    if on_unsorted not in ON_UNSORTED:
        raise ValueError(f"on_unsorted must be 'raise' or 'sort'; got {on_unsorted!r}")
    events = _columns(events, sensor, name)
    t = events["t"]
    if not np.any(back := t[1:] < t[:-1]):
        return events
    if on_unsorted == "sort":
        order = np.argsort(t, kind="stable")
        return {column: values[order] for column, values in events.items()}
    i = int(back.argmax()) + 1
    raise Unsorted(name, f"event {i} has t = {t[i]}, before {t[i - 1]}; {int(back.sum())} such steps back")


def _columns(events: Events, sensor: Sensor | None, name: str) -> Events:
    """`check`, whatever the order of the times."""
    needed = "t" if sensor is None else sensor.columns
    if missing := [column for column in needed if column not in events]:
        raise BadSample(name, f"no column {', '.join(missing)}; it has {', '.join(events)}")
    events = {column: np.asarray(values) for column, values in events.items()}
    shapes = {column: values.shape for column, values in events.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) != 1:
        raise BadSample(name, f"columns of different lengths: {shapes}; each must be [number of events]")
    events = {column: _whole(values, column, name) for column, values in events.items()}
    _within(events["t"], -LATEST, LATEST, "t", name)
    if sensor is None or not len(events["t"]):
        return events
    for column, limit in (("x", sensor.width), ("y", sensor.height)):
        if column in events:
            _within(events[column], 0, limit - 1, column, name)
    if "p" in events and sensor.polarities > 1:
        p = events["p"]
        if p.dtype != np.bool_ and p.min() < 0:
            if np.any(bad := np.abs(p.astype(np.int64)) != 1):
                i = int(bad.argmax())
                raise BadSample(name, f"event {i} has p = {p[i]}, but others have -1; p must be 0 and 1, or -1 and +1")
            events["p"] = p > 0
        _within(events["p"], 0, 1, "p", name)
    return events


def _whole(values: np.ndarray, column: str, name: str) -> np.ndarray:
    if values.dtype.kind in "biu":
        return values
    if not len(values):
        return values.astype(np.int64)
    if values.dtype.kind != "f":
        raise BadSample(name, f"column {column} must be whole numbers; got dtype {values.dtype}")
    if np.any(bad := ~(np.isfinite(values) & (values == np.rint(values)))):
        i = int(bad.argmax())
        unit = "; t must be whole microseconds: multiply seconds by 1e6 and round" if column == "t" else ""
        raise BadSample(name, f"event {i} has {column} = {values[i]}, which is no whole number{unit}")
    _within(values, -LATEST, LATEST, column, name)
    return values.astype(np.int64)


def _within(values: np.ndarray, low: int, high: int, column: str, name: str) -> None:
    if len(values) and (values.min() < low or values.max() > high):
        i = int(((values < low) | (values > high)).argmax())
        raise BadSample(name, f"event {i} has {column} = {values[i]}, outside {low}..{high}")


def at_least(name: str, value: int, least: int) -> int:
    """The number as an int. Raises TypeError if it is none, ValueError if it is too small."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number; got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}")
    return number


def _times(t: np.ndarray) -> np.ndarray:
    return check({"t": t}, None)["t"].astype(np.int64)


def split_by_number(t: np.ndarray, T: int) -> np.ndarray:
    """Bins of n // T events each; the last bin takes the rest: SpikingJelly's split_by='number'.

    bin[i] = min(i // (n // T), T - 1);   T - 1 where n < T
    """
    n, T = len(_times(t)), at_least("T", T, 1)
    return np.minimum(np.arange(n) // (n // T), T - 1) if n // T else np.full(n, T - 1)


def split_by_time(t: np.ndarray, T: int) -> np.ndarray:
    """T bins of equal duration; the last bin takes the rest: SpikingJelly's split_by='time'.

        bin[i] = min((t[i] - t[0]) // dt, T - 1),   dt = (t[n-1] - t[0]) // T;   T - 1 where dt is 0

    A bin without events is an empty frame (SpikingJelly raises IndexError there).
    """
    t, T = _times(t), at_least("T", T, 1)
    since = t - t[:1]
    dt = since[-1] // T if len(t) else 0
    return np.minimum(since // dt, T - 1) if dt else np.full(len(t), T - 1)


def split_by_dt(t: np.ndarray, dt: int, T: int | None = None, start: int | None = None) -> np.ndarray:
    """Bins of `dt` microseconds from `start` (default t[0]).

        bin[i] = (t[i] - start) // dt

    Without T there are max(1, ceil((t[n-1] - t[0]) / dt)) bins, and an event exactly at the end falls into the last one,
    as in SpikingJelly's integrate_events_by_fixed_duration. With T, events after bin T - 1, or before `start`, get a bin
    outside 0..T-1, which `count_events` leaves out.
    """
    t, dt = _times(t), at_least("dt", dt, 1)
    since = t - (t[:1] if start is None else operator.index(start))
    if T is not None or not len(t):
        return since // dt
    return np.minimum(since // dt, max(1, -(-int(since[-1]) // dt)) - 1)


def addresses(events: Events, sensor: Sensor) -> np.ndarray:
    """(y W + x) P + p of each event: its place in a flattened frame. One row has no y, one polarity no p."""
    return _addresses(_columns(events, sensor, "events"), sensor)


def _addresses(events: Events, sensor: Sensor) -> np.ndarray:
    place = _pixels(events, sensor)
    return place if sensor.polarities == 1 else place * sensor.polarities + (events["p"] != 0)


def _pixels(events: Events, sensor: Sensor) -> np.ndarray:
    x = events["x"].astype(np.int64)
    return x if sensor.height == 1 else events["y"].astype(np.int64) * sensor.width + x


def count_events(events: Events, bins: np.ndarray, T: int, sensor: Sensor) -> np.ndarray:
    """[T, H, W, P] int64: the number of events of each bin, pixel and polarity. Bins outside 0..T-1 are left out."""
    events, T, bins = _columns(events, sensor, "events"), at_least("T", T, 1), np.asarray(bins)
    if bins.shape != events["t"].shape or bins.dtype.kind not in "iu":
        raise ValueError(f"bins must be {len(events['t'])} whole numbers; got {bins.dtype} {bins.shape}")
    return _count(events, bins.astype(np.int64), T, sensor)


def _count(events: Events, bins: np.ndarray, T: int, sensor: Sensor) -> np.ndarray:
    place = bins * sensor.size + _addresses(events, sensor)
    inside = (bins >= 0) & (bins < T)
    counts = np.bincount(place if inside.all() else place[inside], minlength=T * sensor.size)
    return counts.reshape(T, *sensor)


def to_frames(
    events: Events,
    sensor: Sensor,
    T: int | None = None,
    *,
    split: str = "number",
    dt: int | None = None,
    on_unsorted: str = "raise",
) -> np.ndarray:
    """[T, H, W, P] int64 counts; `split` is "number" or "time" (both need T), or "dt" (needs dt; T cuts or pads)."""
    T = check_split(split, T, dt)
    events = check(events, sensor, on_unsorted=on_unsorted)
    if split == "dt":
        bins = split_by_dt(events["t"], dt, T)
        T = int(bins.max(initial=0)) + 1 if T is None else T
    else:
        bins = (split_by_number if split == "number" else split_by_time)(events["t"], T)
    return _count(events, bins, T, sensor)


def check_split(split: str, T: int | None, dt: int | None) -> int | None:
    """T as an int. Raises ValueError or TypeError for a split without what it needs."""
    if split not in ("number", "time", "dt"):
        raise ValueError(f"split must be 'number', 'time' or 'dt'; got {split!r}")
    if split == "dt":
        if dt is None:
            raise ValueError("split='dt' needs dt, in microseconds")
        at_least("dt", dt, 1)
    elif T is None:
        raise ValueError(f"split={split!r} needs T")
    return T if T is None else at_least("T", T, 1)


def to_uint8(counts: np.ndarray, *, saturate: bool = False) -> np.ndarray:
    """Counts as bytes. A count above 255 is an OverflowError, or becomes 255 with `saturate`."""
    if (top := int(counts.max(initial=0))) > 255 and not saturate:
        raise OverflowError(f"{top} events in one place do not fit a byte: use more frames, or saturate=True")
    return np.minimum(counts, 255).astype(np.uint8)


def voxel_grid(events: Events, sensor: Sensor, T: int, *, on_unsorted: str = "raise") -> np.ndarray:
    """[T, H, W, 1] float32: each polarity (+1 ON, -1 OFF) is shared by the two nearest of T instants.

        V[k] = sum_i p[i] max(0, 1 - |k - s[i]|),   s[i] = (T - 1) (t[i] - t[0]) / (t[n-1] - t[0])

    Its sum is the sum of the polarities. Zhu et al. 2019, https://arxiv.org/abs/1812.08156.
    """
    T, events = at_least("T", T, 1), check(events, sensor, on_unsorted=on_unsorted)
    if not len(events["t"]):
        return np.zeros((T, sensor.height, sensor.width, 1), np.float32)
    t = events["t"].astype(np.int64)
    since = (t - t[0]).astype(np.float64)
    s = (T - 1) * (since / max(since[-1], 1.0))
    left = np.floor(s).astype(np.int64)
    place, pixels = _pixels(events, sensor), sensor.height * sensor.width
    sign = np.where(events["p"] != 0, 1.0, -1.0) if sensor.polarities > 1 else 1.0
    grid = np.bincount(left * pixels + place, sign * (1 - (s - left)), minlength=(T + 1) * pixels)
    grid += np.bincount((left + 1) * pixels + place, sign * (s - left), minlength=(T + 1) * pixels)
    return grid[: T * pixels].reshape(T, sensor.height, sensor.width, 1).astype(np.float32)


def time_surface(
    events: Events, sensor: Sensor, T: int, dt: int, tau: float, *, on_unsorted: str = "raise"
) -> np.ndarray:
    """[T, H, W, P] float32: how recent the last event of each place is at the end of each bin of `dt` microseconds.

        S[k] = exp(-(t[0] + (k + 1) dt - last[k]) / tau),   0 where there was none

    `tau` in microseconds, above 0. Lagorce et al. 2017, "HOTS: a hierarchy of event-based time-surfaces".
    """
    T, dt = at_least("T", T, 1), at_least("dt", dt, 1)
    if not 0 < tau < np.inf:
        raise ValueError(f"tau must be positive and finite, in microseconds; got {tau}")
    events = check(events, sensor, on_unsorted=on_unsorted)
    t = events["t"].astype(np.int64)
    bins, place, since = split_by_dt(t, dt, T), _addresses(events, sensor), (t - t[:1]).astype(np.float64)
    last = np.full(sensor.size, -np.inf)
    surfaces = np.empty((T, sensor.size), np.float32)
    edges = np.searchsorted(bins, np.arange(T + 1))
    for k in range(T):
        of = slice(edges[k], edges[k + 1])
        last[place[of]] = since[of]  # in order: the last one of a place stays
        surfaces[k] = np.exp(-((k + 1) * dt - last) / tau)
    return surfaces.reshape(T, *sensor)
