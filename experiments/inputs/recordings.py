"""Recordings of events."""

import itertools
from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from config import needs
from jax import Array

from inputs.reading import Batch, Labelled, Name, Sources, in_memory, train_and_test
from snnfuse.data import catalog, event_augment, packed
from snnfuse.data import loader as load
from snnfuse.data.events import Sensor


@dataclass(frozen=True)
class Recordings(Labelled):
    """Recordings of events, read from disk and made into frames: by the loader, or on the device."""

    note: ClassVar[str] = ""
    name: Name
    bins: int = 32
    """frames of a recording"""
    split: str = "number"
    """number: every frame has equally many events; time: every frame has the same duration"""
    store: str = "bytes"
    """bytes: frames are counts of events, at most 255; bits: 1 where there was any event; events: the device makes frames
    of counts, in training from events that were changed at random"""
    channels: int | None = None
    """channels of a frame, if more than the sensor has polarities; the others stay empty"""
    events: Annotated[int, needs(store="events")] = 8192
    """room for the events of a recording, with --data.store events"""
    size: Annotated[int | None, needs(store="events")] = None
    """frames have this many pixels on each side, with --data.store events; None: those of the sensor"""
    hold: bool = False
    """steps after the last frame show it again; without, they are empty"""
    log: bool = False
    """a frame holds ln(1 + count), so that pixels with many events, as of an edge that moves fast, count for less"""
    shift: Annotated[float, needs(store="events")] = 0.0
    """training recordings move by up to this many pixels of the sensor each way"""
    flip: Annotated[bool, needs(store="events")] = False
    """half of the training recordings are mirrored"""
    scale: Annotated[float, needs(store="events")] = 0.0
    """training recordings become larger or smaller by up to this part"""
    turn: Annotated[float, needs(store="events")] = 0.0
    """training recordings are turned by up to this many degrees"""
    drop: Annotated[float, needs(store="events")] = 0.0
    """training recordings lose up to this part of their events"""
    longer: Annotated[float | None, needs(store="events")] = None
    """training on random stretches of two windows that follow one another, up to this part longer than a window, so that motion
    seems faster; for recordings that were cut into windows. None: on the windows themselves"""

    def __post_init__(self):
        for name in ("bins", "events") + ("size",) * (self.size is not None):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--data.{name} must be at least 1; got {value}")
        for name, known in (("split", ("number", "time")), ("store", ("bytes", "bits", "events"))):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"--data.{name} must be one of {', '.join(known)}; got {value!r}")
        polarities = catalog.data_set(self.name).SENSOR.polarities
        if self.channels is not None and self.channels < polarities:
            raise ValueError(f"--data.channels must be at least {polarities}; got {self.channels}")
        for name, most in (("shift", 1e6), ("scale", 1e3), ("turn", 180), ("drop", 1)):
            if not 0 <= (value := getattr(self, name)) <= most:
                raise ValueError(f"--data.{name} must be at least 0, and at most {most:g}; got {value}")
        if self.longer is not None and not (0 <= self.longer <= 1 and catalog.data_set(self.name).WINDOW):
            raise ValueError(
                f"--data.longer must be None or in [0, 1], and for recordings cut into windows; got {self.longer} for {self.name}"
            )

    def sources(self) -> Sources:
        train, test = train_and_test(self.name)
        if self.longer is not None:
            train = two_windows(in_memory(train, f"{self.name}, train"), catalog.data_set(self.name).WINDOW)
        return train, test

    @property
    def sensor(self) -> Sensor:
        return catalog.data_set(self.name).SENSOR

    def example(self) -> load.Frames | load.PackedFrames:
        if self.store == "events":
            return load.PackedFrames(self.sensor, self.bins, self.events, split=self.split)
        return load.Frames(self.sensor, self.bins, split=self.split, store=self.store, saturate=True)

    def augment(self, key: Array, batch: Batch, targets: Array) -> tuple[Batch, Array]:
        move, drop = jax.random.split(key)
        if self.longer is not None:
            cut, length = jax.random.fold_in(key, 1), catalog.data_set(self.name).WINDOW
            batch = batch | {"frames": event_augment.piece(cut, batch["frames"], length, self.longer)}
        if self.shift or self.flip or self.scale or self.turn:
            changes = dict(shift=self.shift, flip=0.5 * self.flip, scale=self.scale, turn=self.turn)
            batch = batch | {"frames": event_augment.move(move, batch["frames"], self.sensor, **changes)}
        if self.drop:
            batch = batch | {"frames": event_augment.drop(drop, batch["frames"], self.drop)}
        return batch, targets

    def encode(self, key: Array, batch: Batch, T: int) -> Array:
        """Nothing is random here."""
        if T < self.bins:
            raise ValueError(f"--model.T must be at least --data.bins, {self.bins}; got {T}")
        if self.size:
            events = event_augment.resize(jnp.asarray(batch["frames"]), self.sensor, self.size, self.size)
            small = self.sensor._replace(height=self.size, width=self.size)
            xs = packed.bin_events(events, small, self.bins, split=self.split)
        else:
            xs = self.example().unpack(jnp.asarray(batch["frames"]))
        if self.log:
            xs = jnp.log1p(xs)
        empty = 0 if self.channels is None else self.channels - xs.shape[-1]
        xs = jnp.pad(xs, (*((0, 0),) * 4, (0, empty)))
        return jnp.pad(xs, ((0, T - self.bins), *((0, 0),) * 4), mode="edge" if self.hold else "constant")


def two_windows(samples: list[dict], length: int) -> list[dict]:
    """Each window of a recording together with the one that begins `length` microseconds later, where there is one."""
    made = []
    for a, b in itertools.pairwise(samples):
        if a["label"] == b["label"] and b["start"] - a["start"] == length:
            events = {c: np.concatenate([a["events"][c], b["events"][c]]) for c in a["events"]}
            later = b["events"]["t"].astype(np.int64) + length
            made.append(a | {"events": events | {"t": np.concatenate([a["events"]["t"].astype(np.int64), later])}})
    return made
