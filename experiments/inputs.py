"""Data sets by name: those of `snnfuse.data`, and `random`. One is a frozen dataclass of choices with

    sources() -> (train, test)                the samples: `source[i]` and `len(source)`
    example() -> Frames, Images, Sound, ...   what the loader does with a sample, on the host
    augment(key, batch, targets)              -> the same, changed at random; targets are [B, classes]; training only
    encode(key, batch, T)                     -> [T, B, ...], or `nn.Padded` of it
    classes, labels, note                     how many classes; their names; a remark for every result

`augment` and `encode` run on the device, inside the compiled step.

`python -m snnfuse.data list` says where each comes from. Your own data, prepared under a name, are a data set of that name.
`random` has the shapes of another data set, for timing.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from tqdm import tqdm

from snnfuse import nn
from snnfuse.data import archives, audio, catalog, encoders, event_augment, image_augment, packed, signals
from snnfuse.data import loader as load
from snnfuse.data.builders.audio import AudioSet
from snnfuse.data.builders.base import EventSet
from snnfuse.data.builders.images import ImageSet
from snnfuse.data.builders.signals import SignalSet
from snnfuse.data.events import Sensor

Name = Annotated[str, tyro.conf.arg(name="data", prefix_name=False, metavar="NAME")]
Sources = tuple[Sequence[dict], Sequence[dict]]
Batch = dict[str, Array]
STATISTICS = {  # the mean and the standard deviation of each channel over the training images
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class Labelled:
    """The names of the classes of a data set in snnfuse.data."""

    @property
    def classes(self) -> int:
        return catalog.data_set(self.name).classes()

    @property
    def labels(self) -> list[str]:
        names = catalog.data_set(self.name).LABELS
        return list(map(str, range(names) if isinstance(names, int) else names))


@dataclass(frozen=True)
class Images(Labelled):
    """Static images, kept in memory and turned into spikes on the device."""

    note: ClassVar[str] = ""
    name: Name
    encoding: str = "bernoulli"
    """bernoulli: each step spikes with probability equal to the pixel value; direct: the pixel value at every step"""
    shift: int = 0
    """training images move by up to this many pixels each way"""
    flip: bool = False
    """half of the training images are mirrored"""
    cutout: int = 0
    """side of a square, in pixels, that is erased in every training image"""
    rand_augment: int = 0
    """transforms of RandAugment in every training image"""
    magnitude: float = 0.3
    """their strength, in [0, 1]"""
    mixup: float = 0.0
    """training images are mixed in pairs, by a share drawn from Beta(mixup, mixup)"""
    cutmix: float = 0.0
    """a rectangle of each training image comes from another one; its size is drawn from Beta(cutmix, cutmix)"""
    normalise: bool = False
    """channels get mean 0 and deviation 1; with --data.encoding direct"""
    repeat: int = 1
    """copies of the image, each as its own channels with its own noise"""

    def __post_init__(self):
        if self.encoding not in ("direct", "bernoulli"):
            raise ValueError(f"--data.encoding must be direct or bernoulli; got {self.encoding!r}")
        for name in ("shift", "cutout", "rand_augment", "mixup", "cutmix"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"--data.{name} must be at least 0; got {value}")
        if not 0 <= self.magnitude <= 1:
            raise ValueError(f"--data.magnitude must be in [0, 1]; got {self.magnitude}")
        if self.normalise and (self.encoding != "direct" or self.name not in STATISTICS):
            raise ValueError(
                f"--data.normalise needs --data.encoding direct, and one of {', '.join(STATISTICS)}; "
                f"got {self.encoding!r} and {self.name!r}"
            )
        if self.repeat < 1:
            raise ValueError(f"--data.repeat must be at least 1; got {self.repeat}")

    def sources(self) -> Sources:
        train, test = _sources(self.name)
        return in_memory(train, f"{self.name}, train"), in_memory(test, f"{self.name}, test")

    def example(self) -> load.Images:
        return load.Images()

    def augment(self, key: Array, batch: Batch, targets: Array) -> tuple[Batch, Array]:
        keys, images = iter(jax.random.split(key, 6)), self.example().unpack(batch["image"])
        if self.shift:
            images = image_augment.crop(next(keys), images, self.shift)
        if self.flip:
            images = image_augment.flip(next(keys), images)
        if self.rand_augment:
            images = image_augment.rand_augment(next(keys), images, self.rand_augment, self.magnitude)
        if self.cutout:
            mean, _ = STATISTICS.get(self.name, (0.0, 1.0))
            images = image_augment.cutout(next(keys), images, self.cutout, jnp.asarray(mean))
        if self.mixup:
            images, targets = image_augment.mixup(next(keys), images, targets, self.mixup)
        if self.cutmix:
            images, targets = image_augment.cutmix(next(keys), images, targets, self.cutmix)
        return batch | {"image": images}, targets

    def encode(self, key: Array, batch: Batch, T: int) -> Array:
        images = (
            batch["image"]
            if jnp.issubdtype(batch["image"].dtype, jnp.floating)
            else self.example().unpack(batch["image"])
        )
        if self.normalise:
            mean, deviation = map(jnp.asarray, STATISTICS[self.name])
            images = (images - mean) / deviation
        images = jnp.tile(images, self.repeat)
        if self.encoding == "bernoulli":
            return encoders.bernoulli(key, images, T)
        return encoders.direct(images, T)


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
    events: int = 8192
    """room for the events of a recording, with --data.store events"""
    size: int | None = None
    """frames have this many pixels on each side, with --data.store events; None: those of the sensor"""
    sum: bool = False
    """a frame also counts the events of the frames before it, so that the last one shows the whole recording"""
    hold: bool = False
    """steps after the last frame show it again; without, they are empty"""
    log: bool = False
    """a frame holds ln(1 + count), so that pixels with many events, as of an edge that moves fast, count for less"""
    shift: float = 0.0
    """training recordings move by up to this many pixels of the sensor each way"""
    flip: bool = False
    """half of the training recordings are mirrored"""
    scale: float = 0.0
    """training recordings become larger or smaller by up to this part"""
    turn: float = 0.0
    """training recordings are turned by up to this many degrees"""
    drop: float = 0.0
    """training recordings lose up to this part of their events"""
    longer: float | None = None
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
        changed = [name for name in ("size", "shift", "flip", "scale", "turn", "drop") if getattr(self, name)]
        changed += ["longer"] * (self.longer is not None)
        if changed and self.store != "events":
            raise ValueError(f"--data.{changed[0]} needs --data.store events; got {self.store!r}")

    def sources(self) -> Sources:
        train, test = _sources(self.name)
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
        if self.sum:
            xs = jnp.cumsum(xs, 0)
        if self.log:
            xs = jnp.log1p(xs)
        empty = 0 if self.channels is None else self.channels - xs.shape[-1]
        xs = jnp.pad(xs, (*((0, 0),) * 4, (0, empty)))
        return jnp.pad(xs, ((0, T - self.bins), *((0, 0),) * 4), mode="edge" if self.hold else "constant")


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
    threshold: float = 0.2
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
        both = [in_memory(source, self.name) for source in _sources(self.name)]
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
    quiet: float = 0.3
    """with --data.fit: the loud part is from the first to the last step with a band above this, in [0, 1]"""
    envelope: int = 0
    """keep this many slow cosines of the spectrum of each step, which leaves out the harmonics of the voice; 0: keep all"""
    code: str = "bands"
    """bands: numbers; level_crossing or lif: spikes of them"""
    threshold: float = 0.1
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
    mask_steps: int = 0
    """longest stretch of time steps that is hidden in a training recording"""
    mask_bands: int = 0
    """most bands next to each other that are hidden"""
    masks: int = 1
    """stretches of each kind"""
    noise: float | None = None
    """white noise in training recordings, from 60 decibels below the loudest sample up to this many below; None: none"""
    mixup: float = 0.0
    """training recordings are mixed in pairs, by a share drawn from Beta(mixup, mixup)"""
    held_out: str | None = None
    """a speaker, such as theo: test on all recordings of this one, train on all others"""
    relative_to: tuple[str, ...] = ()
    """columns, such as speaker: a filter gives the recordings that agree in them the mean spectrum of all, without looking at
    labels; the held-out recordings too, and those of --data.also as one group"""
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
        train, test = (in_memory(source, self.name) for source in _sources(self.name))
        more = self._more() if self.also else []
        if unknown := [column for column in self.relative_to if column not in train[0]]:
            raise archives.Missing(f"--data.relative_to must be columns of {self.name}; got {unknown[0]!r}")
        if self.relative_to:
            groups = [str([s[column] for column in self.relative_to]) for s in train + test] + ["also"] * len(more)
            every = self._equalised(train + test + more, groups)
            train, test, more = (
                every[i:j] for i, j in itertools.pairwise(np.cumsum([0, *map(len, (train, test, more))]))
            )
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
        samples = in_memory(_split(self.also, "train"), f"{self.also}, train")
        if not (found := [s | {"label": label[int(s["label"])]} for s in samples if int(s["label"]) in label]):
            raise archives.Missing(f"--data.also must have labels of {self.name}; {self.also} has none of them")
        return found

    def _equalised(self, samples, groups):
        """The samples, those of each group filtered to the mean spectrum of all groups."""
        size, window = round(self.seconds * self.rate), round(0.032 * self.rate)
        spectrum = jax.jit(lambda sound: self._spectrum(sound, window))
        filled = [np.pad(s["audio"][:size], (0, max(0, size - len(s["audio"])))) for s in samples]
        parts = [spectrum(np.stack(filled[i : i + 100])) for i in range(0, len(filled), 100)]
        spectra, names = np.concatenate([np.asarray(part) for part in parts]), np.array(groups)
        means = {name: spectra[names == name].mean(0) for name in dict.fromkeys(groups)}
        whole, middles = np.mean(list(means.values()), 0), audio.band_middles(self.rate, self.bands, self.low)

        def filtered(sample, group):
            n = len(sample["audio"])
            gain = np.interp(np.fft.rfftfreq(n, 1 / self.rate), middles, np.clip((whole - means[group]) / 2, -2, 2))
            sound = np.fft.irfft(np.fft.rfft(sample["audio"].astype(np.float64)) * np.exp(gain), n)
            return sample | {"audio": np.rint(sound * (30_000 / max(1, np.abs(sound).max()))).astype(np.int16)}

        return list(map(filtered, samples, groups))

    def _spectrum(self, sound, window):
        """The mean of the log bands [B, K], in which loud steps count more."""
        log = audio.log_mel(sound, self.rate, window=window, hop=window // 2, bands=self.bands, low=self.low)
        weight = jnp.square(audio.loudness(log, self.range).mean(-1, keepdims=True))
        return (log * weight).sum(0) / weight.sum(0)

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


@dataclass(frozen=True)
class Random:
    """Random samples like those of another data set, with random labels: they say nothing about learning."""

    name: Name = "random"
    like: str = "mnist"
    """the data set"""
    examples: int = 200
    """samples to train on; half as many are held out"""
    events: int = 4000
    """events of a recording"""
    note: ClassVar[str] = "random input"

    def __post_init__(self):
        if self.like not in DATASETS or self.like == self.name:
            known = ", ".join(name for name in DATASETS if name != self.name)
            raise ValueError(f"--data.like must be one of {known}; got {self.like!r}")
        for name in ("examples", "events"):
            if (value := getattr(self, name)) < 1 + (name == "examples"):
                raise ValueError(f"--data.{name} must be at least {1 + (name == 'examples')}; got {value}")

    @property
    def classes(self) -> int:
        return DATASETS[self.like].classes

    @property
    def labels(self) -> list[str]:
        return DATASETS[self.like].labels

    def sources(self) -> Sources:
        rng = np.random.default_rng(0)
        return tuple([self._sample(rng) for _ in range(n)] for n in (self.examples, self.examples // 2))

    def _sample(self, rng):
        like, label = catalog.data_set(DATASETS[self.like].name), int(rng.integers(self.classes))
        if issubclass(like, AudioSet):
            return {"audio": rng.integers(-(2**12), 2**12, like.RATE // 2).astype(np.int16), "label": label}
        if issubclass(like, SignalSet):
            return {"signal": rng.normal(0, 1, (400, like.CHANNELS)).astype(np.float32), "label": label}
        if not issubclass(like, EventSet):
            return {"image": rng.integers(0, 256, like.SHAPE, np.uint8), "label": label}
        tops = {"x": like.SENSOR.width, "y": like.SENSOR.height, "p": like.SENSOR.polarities}
        columns = {
            column: rng.integers(0, tops[column], self.events) for column in like.SENSOR.columns if column != "t"
        }
        return {"events": columns | {"t": np.sort(rng.integers(0, 300_000, self.events))}, "label": label}

    def example(self):
        return DATASETS[self.like].example()

    def augment(self, key: Array, batch: Batch, targets: Array) -> tuple[Batch, Array]:
        return DATASETS[self.like].augment(key, batch, targets)

    def encode(self, key: Array, batch: Batch, T: int) -> Array:
        return DATASETS[self.like].encode(key, batch, T)


def two_windows(samples: list[dict], length: int) -> list[dict]:
    """Each window of a recording together with the one that begins `length` microseconds later, where there is one."""
    made = []
    for a, b in itertools.pairwise(samples):
        if a["label"] == b["label"] and b["start"] - a["start"] == length:
            events = {c: np.concatenate([a["events"][c], b["events"][c]]) for c in a["events"]}
            later = b["events"]["t"].astype(np.int64) + length
            made.append(a | {"events": events | {"t": np.concatenate([a["events"]["t"].astype(np.int64), later])}})
    return made


def in_memory(source: Sequence[dict], name: str) -> list[dict]:
    samples, everything = [], list(range(len(source)))
    with tqdm(everything, f"{name}: reading", leave=False) as bar:
        while len(samples) < len(source):
            some = load.read(source, everything[len(samples) :][:1000])
            samples += some
            bar.update(len(some))
    return samples


def _sources(name):
    """The splits train and test."""
    return tuple(_split(name, split) for split in ("train", "test"))


def _split(name, split):
    """A split of a data set. Raises archives.Missing, which says what to get and where to put it."""
    try:
        return catalog.source(name, split)
    except ImportError as e:
        raise archives.Missing(f"{e}, then: python -m snnfuse.data prepare {name}") from e
    except archives.Missing as e:
        folder = catalog.data_dir() / "downloads" / "manual" / name
        files = "; ".join(f"{archive.file} from {archive.url}" for archive in catalog.data_set(name).ARCHIVES)
        raise archives.Missing(f"{e}. It needs, in {folder}: {files}") from e
    except ValueError as e:  # your own data may have other splits
        raise archives.Missing(f"training needs the splits train and test: {e}") from e


def _default(name):
    found = catalog.data_set(name)
    kinds = ((EventSet, Recordings), (AudioSet, Audio), (SignalSet, Signals), (ImageSet, Images))
    return next(kind(name) for data_set, kind in kinds if issubclass(found, data_set))


DATASETS = {name: _default(name) for name in (*catalog.CATALOG, *catalog.own_names())} | {
    "mnist5k": Images("mnist5k", shift=2),
    "mnist": Images("mnist", repeat=3),  # three channels, as in the temporal fusion paper
    "nmnist": Recordings("nmnist", channels=3),  # a third, empty channel, as there
    "dvs128_gesture": Recordings("dvs128_gesture", channels=3),
    "speech_commands": Audio("speech_commands", seconds=1.0),
    "synthetic_saccades": Recordings("synthetic_saccades", bins=12, split="time", store="bits"),
}
DATASETS["random"] = Random()
