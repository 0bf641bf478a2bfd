"""Recordings of sound."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from config import needs
from jax import Array

from inputs.reading import Batch, Labelled, Name, Sources, in_memory, one_split, train_and_test
from snnfuse import nn
from snnfuse.data import archives, audio, catalog, encoders
from snnfuse.data import loader as load


@dataclass(frozen=True)
class Audio(Labelled):
    """Recordings of sound, kept in memory; mel bands, or spikes of them, are made on the device."""

    note: ClassVar[str] = ""
    name: Name
    seconds: float = 0.8
    """of each recording; a longer one is cut, a shorter one is followed by silence"""
    bands: int = 40
    low: float = 100.0
    """hertz, where the lowest band begins"""
    range: float = 15.0
    """nepers of power between the loudest place, 1, and what is taken for silence, 0"""
    centre: float = 0.5
    """part of a recording's mean spectrum that is taken out of it"""
    lengths: bool = False
    """a recording ends with its own last step: readout, statistics and states leave out the silence after it"""
    fit: bool = False
    """the loud part of a recording takes all time steps, so words of fast and of slow speakers get equally long"""
    quiet: Annotated[float, needs("fit")] = 0.3
    """with --data.fit: the loud part is from the first to the last step with a band above this, in [0, 1]"""
    envelope: int = 0
    """keep this many slow cosines of the spectrum of each step, which leaves out the harmonics of the voice; 0: keep all"""
    code: str = "bands"
    """bands: numbers; level_crossing or lif: spikes of them"""
    threshold: Annotated[float, needs(code="level_crossing")] = 0.1
    """of a level crossing"""
    shift: float = 0.0
    """training recordings start up to this many seconds earlier or later"""
    speed: float = 0.0
    """training recordings are played up to this part faster or slower"""
    tempo: float = 0.0
    """the same, without a change of pitch"""
    pitch: float = 0.0
    """training recordings move up or down by up to this many bands"""
    warp: float = 0.0
    """frequencies of training recordings are multiplied by a factor up to this much above or below 1, as by another throat"""
    mask_steps: Annotated[int, needs("masks")] = 0
    """longest stretch of time steps that is hidden in a training recording"""
    mask_bands: Annotated[int, needs("masks")] = 0
    """most bands next to each other that are hidden"""
    masks: Annotated[int, needs("mask_steps", "mask_bands")] = 1
    """stretches of each kind"""
    noise: float | None = None
    """white noise in training recordings, from 60 decibels below the loudest sample up to this many below; None: none"""
    mixup: float = 0.0
    """training recordings are mixed in pairs, by a share drawn from Beta(mixup, mixup)"""
    held_out: str | None = None
    """a speaker, such as theo: test on all recordings of this one, train on all others"""
    also: str | None = None
    """a further prepared set of recordings: those of its training split whose label this set has are for training too"""

    def __post_init__(self):
        if self.code not in ("bands", "level_crossing", "lif"):
            raise ValueError(f"--data.code must be bands, level_crossing or lif; got {self.code!r}")
        for name in ("seconds", "bands", "range", "threshold"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--data.{name} must be above 0; got {getattr(self, name)}")
        if not 0 <= self.centre <= 1:
            raise ValueError(f"--data.centre must be in [0, 1]; got {self.centre}")
        zero = "low quiet envelope shift speed tempo pitch warp mask_steps mask_bands masks mixup"
        for name in [*zero.split(), *["noise"] * (self.noise is not None)]:
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"--data.{name} must be at least 0 and finite; got {getattr(self, name)}")
        changed = [name for name in ("fit", "shift", "speed", "tempo", "mixup") if getattr(self, name)]
        if self.lengths and changed:
            raise ValueError(f"--data.lengths goes without --data.{changed[0]}, which changes when a recording ends")
        for name, most in (("quiet", 1), ("envelope", self.bands)):
            if getattr(self, name) > most:
                raise ValueError(f"--data.{name} must be at most {most}; got {getattr(self, name)}")

    @property
    def rate(self) -> int:
        """Samples a second of what is prepared, which may have been resampled."""
        path = catalog.prepared_in(self.name)
        return (path and catalog.sound_rate(path)) or catalog.data_set(self.name).RATE

    def sources(self) -> Sources:
        train, test = (in_memory(source, self.name) for source in train_and_test(self.name))
        more = self._more() if self.also else []
        if self.held_out is None:
            return train + more, test
        every, column = train + test, "speaker" if "speaker" in train[0] else "group"
        if (wanted := self.held_out.encode()) not in (found := {sample.get(column) for sample in every}):
            known = ", ".join(sorted(speaker.decode() for speaker in found if speaker))[:200]
            raise archives.Missing(
                f"--data.held_out must be a speaker of {self.name}, such as {known}; got {self.held_out!r}"
            )
        train, test = ([s for s in every if (s[column] == wanted) == test] for test in (False, True))
        return train + more, test

    def _more(self):
        """The samples of --data.also, with the labels of this set."""
        other = Audio(self.also)
        if other.rate != self.rate:
            raise archives.Missing(
                f"--data.also must have the rate of {self.name}, {self.rate}: prepare it with --rate {self.rate}; "
                f"{self.also} has {other.rate}"
            )
        label = {i: self.labels.index(name) for i, name in enumerate(other.labels) if name in self.labels}
        samples = in_memory(one_split(self.also, "train"), f"{self.also}, train")
        if not (found := [s | {"label": label[int(s["label"])]} for s in samples if int(s["label"]) in label]):
            raise archives.Missing(f"--data.also must have labels of {self.name}; {self.also} has none of them")
        return found

    def example(self) -> load.Sound:
        return load.Sound(round(self.seconds * self.rate), lengths=self.lengths)

    def augment(self, key: Array, batch: Batch, targets: Array) -> tuple[Batch, Array]:
        move, play, later = jax.random.split(key, 3)
        hiss, mix = jax.random.split(jax.random.fold_in(key, 1))
        sound = batch["audio"]
        if self.shift:
            sound = audio.shift(move, sound, round(self.shift * self.rate))
        if self.speed:
            sound = audio.speed(play, sound, self.speed)
        if self.noise is not None:
            sound = audio.noise(hiss, sound, self.noise, max(60.0, self.noise))
        if self.mixup:
            sound, targets = audio.mixup(mix, sound, targets, self.mixup)
        return batch | {
            "audio": sound,
            "key": later,
        }, targets  # `encode` changes the bands: it knows how many steps they have

    def encode(self, key: Array, batch: Batch, T: int) -> Array:
        sound, window = batch["audio"], round(0.032 * self.rate)
        steps = 3 * T if self.fit else T  # finer than the steps, as a short word is played slower
        hop = (sound.shape[-1] - window) // max(steps - 1, 1)
        log = audio.log_mel(sound, self.rate, window=window, hop=hop, bands=self.bands, low=self.low)[:steps]
        bands = audio.loudness(log, self.range)
        if self.fit:
            bands = audio.fit(bands, T, self.quiet)
        if self.envelope:
            bands = audio.envelope(bands, self.envelope)
        bands = audio.centre(bands, self.centre)
        if "key" in batch:
            stretch, mask, warp = jax.random.split(batch["key"], 3)
            if self.warp:
                bands = audio.warp(warp, bands, self.warp, self.rate, low=self.low)
            bands = audio.stretch(stretch, bands, self.tempo, self.pitch)
            bands = audio.mask(mask, bands, self.mask_steps, self.mask_bands, self.masks)
        if self.code != "bands":
            bands = encoders.lif(bands) if self.code == "lif" else encoders.level_crossing(bands, self.threshold)
        if not self.lengths:
            return bands
        return nn.Padded(bands, jnp.minimum(audio.steps(batch["length"], window, hop), len(bands)))
