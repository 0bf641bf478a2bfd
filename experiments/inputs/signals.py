"""Signals of several channels, such as muscles."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from config import needs
from jax import Array

from inputs.reading import Batch, Labelled, Name, Sources, in_memory, train_and_test
from snnfuse.data import archives, encoders, signals
from snnfuse.data import loader as load


@dataclass(frozen=True)
class Signals(Labelled):
    """Signals of several channels, kept in memory; sliding windows, or spikes of them, are made on the device."""

    note: ClassVar[str] = ""
    name: Name
    size: int = 350
    """steps of each signal; a longer one is cut, a shorter one is followed by zeros"""
    width: int = 40
    """steps of a sliding window; --model.T windows cover the signal"""
    relative_to: tuple[str, ...] = ()
    """columns, such as subject and session: each channel is divided by its root mean square over the recordings that agree in
    them, without looking at labels; of the held-out recordings too"""
    code: str = "level"
    """level: the log of each window's root mean square; level_crossing: its level crossings; lif: spikes of LIF neurons that the
    root mean square drives"""
    threshold: Annotated[float, needs(code="level_crossing")] = 0.2
    """of a level crossing"""
    gain: float = 0.0
    """each channel of a training signal is up to this part stronger or weaker"""
    noise: float = 0.0
    """noise in training signals, up to this part of their root mean square"""
    early: int = 0
    """training signals begin up to this many steps later"""

    def __post_init__(self):
        if self.code not in ("level", "level_crossing", "lif"):
            raise ValueError(f"--data.code must be level, level_crossing or lif; got {self.code!r}")
        for name in ("size", "width", "threshold"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--data.{name} must be above 0; got {getattr(self, name)}")
        if self.width > self.size:
            raise ValueError(f"--data.width must be at most --data.size, {self.size}; got {self.width}")
        for name in ("gain", "noise", "early"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"--data.{name} must be at least 0 and finite; got {getattr(self, name)}")

    def sources(self) -> Sources:
        both = [in_memory(source, self.name) for source in train_and_test(self.name)]
        if unknown := [column for column in self.relative_to if column not in both[0][0]]:
            raise archives.Missing(f"--data.relative_to must be columns of {self.name}; got {unknown[0]!r}")
        group = lambda sample: tuple(str(sample[column]) for column in self.relative_to)
        squares = {}
        for sample in (*both[0], *both[1]):
            squares.setdefault(group(sample), []).append(np.square(sample["signal"].astype(np.float64)))
        scale = {key: np.sqrt(np.concatenate(parts).mean(0)) + 1e-12 for key, parts in squares.items()}
        if not self.relative_to:  # one scale for all channels, from the training signals
            scale[()] = np.sqrt(np.mean([np.square(s["signal"].astype(np.float64)).mean() for s in both[0]]))
            if not scale[()] > 0:
                raise archives.Missing(f"the training signals of {self.name} are all 0: there is nothing to learn")
        scaled = lambda s: s | {"signal": (s["signal"] / scale[group(s)]).astype(np.float32)}
        return tuple([scaled(sample) for sample in source] for source in both)

    def example(self) -> load.Signals:
        return load.Signals(self.size + self.early)

    def augment(self, key: Array, batch: Batch, targets: Array) -> tuple[Batch, Array]:
        start, louder, hiss = jax.random.split(key, 3)
        xs = signals.piece(start, batch["signal"], self.size)
        if self.gain:
            xs = signals.gain(louder, xs, self.gain)
        if self.noise:
            xs = signals.noise(hiss, xs, self.noise)
        return batch | {"signal": xs}, targets

    def encode(self, key: Array, batch: Batch, T: int) -> Array:
        xs, room = jnp.asarray(batch["signal"])[:, : self.size], self.size - self.width
        if T - 1 > room:
            raise ValueError(f"--model.T must be at most --data.size - --data.width + 1, {room + 1}; got {T}")
        level = signals.log_rms(xs, self.width, max(1, room // max(T - 1, 1)))[:T]
        if self.code == "level":
            return level
        if self.code == "lif":
            return encoders.lif(jnp.exp(level))  # LIF neurons are driven by the root mean square itself
        return encoders.level_crossing(level, self.threshold)
