"""Examples: what the loader makes of one sample, on the host, and how a compiled step unpacks a batch of them.

    Frames, PackedFrames    recordings of events, as frames from the host, or as events that the device makes frames of
    Images                  images as bytes; an encoder makes spikes of them
    Sound, Signals          recordings of sound, and of several channels, of equal length

Your own example is a function (sample, rng) -> {name: array}; `rng` draws what is random.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from snnfuse.data import events as ev
from snnfuse.data import packed as pk
from snnfuse.data.augment import NONE, Augment
from snnfuse.data.events import Sensor

Example = Callable[[dict, np.random.Generator], dict[str, np.ndarray]]


def _augmented(options, sample: dict, rng: np.random.Generator) -> ev.Events:
    events = ev.check(sample["events"], options.sensor, on_unsorted=options.on_unsorted)
    return events if options.augment == NONE else options.augment(events, options.sensor, rng)


def _with_length(options, made: dict, steps: int) -> dict[str, np.ndarray]:
    return made | ({"length": np.int32(max(steps, 1))} if options.lengths else {})


def _frames_of(options, events: ev.Events) -> int:
    """The number of frames from the first event to the last."""
    if options.split != "dt" or not len(events["t"]):
        return options.T
    return min(options.T, int(ev.split_by_dt(events["t"], options.dt, None).max()) + 1)


def _check_options(options) -> None:
    ev.check_split(options.split, options.T, options.dt)
    ev.at_least("T", options.T, 1)
    if options.on_unsorted not in ev.ON_UNSORTED:
        raise ValueError(f"on_unsorted must be 'raise' or 'sort'; got {options.on_unsorted!r}")


@dataclass(frozen=True)
class Frames:
    """Recordings as frames. The workers make the frames; they travel to the device as bits or as bytes.

    `store="bits"` keeps whether there was an event: `frames` is [T, B, n] in a batch. `store="bytes"` keeps how many
    there were: [T, B, H, W, P]. More than 255 are an error, or become 255 with `saturate`. `split`, `dt` and `on_unsorted`
    are those of `to_frames`. With `lengths` a batch also has `length` [B], the frames up to the last event, for `nn.Padded`.
    """

    axes: ClassVar[dict[str, int]] = {"frames": 1}  # where the batch axis is, if it is not the first
    sensor: Sensor
    T: int
    split: str = "time"
    dt: int | None = None
    store: str = "bits"
    saturate: bool = False
    augment: Augment = NONE
    on_unsorted: str = "raise"
    lengths: bool = False

    def __post_init__(self):
        if self.store not in ("bits", "bytes"):
            raise ValueError(f"store must be 'bits' or 'bytes'; got {self.store!r}")
        _check_options(self)

    @property
    def shape(self) -> Sensor:
        return self.augment.sensor(self.sensor)

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        events = _augmented(self, sample, rng)
        counts = ev.to_frames(events, self.shape, self.T, split=self.split, dt=self.dt)
        stored = pk.pack_bits(counts) if self.store == "bits" else ev.to_uint8(counts, saturate=self.saturate)
        made = {"frames": stored, "label": np.int32(sample["label"])}
        return _with_length(self, made, _frames_of(self, events))

    def unpack(self, frames: Array, dtype=jnp.float32) -> Array:
        """[T, B, H, W, P] on the device, from a batch's `frames`; call it inside the jitted step."""
        if self.store == "bits":
            return pk.unpack_bits(frames, tuple(self.shape), dtype=dtype)
        return frames.astype(dtype)


@dataclass(frozen=True)
class PackedFrames:
    """Recordings as events, padded to `size` events. The device makes the frames. An event takes 8 bytes.

    It is cheaper than `Frames` if T is large and events are few, and it needs less of the workers' time. `lengths` as there.
    """

    sensor: Sensor
    T: int
    size: int
    split: str = "time"
    dt: int | None = None
    augment: Augment = NONE
    on_unsorted: str = "raise"
    lengths: bool = False

    def __post_init__(self):
        _check_options(self)
        ev.at_least("size", self.size, 0)

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        events = _augmented(self, sample, rng)
        packed = pk.pack_events(events, self.augment.sensor(self.sensor), self.size)
        made = {"frames": packed, "label": np.int32(sample["label"])}
        return _with_length(self, made, _frames_of(self, events))

    def unpack(self, frames: Array, dtype=jnp.float32) -> Array:
        """[T, B, H, W, P] on the device, from a batch's `frames` [B, size, 2]; call it inside the jitted step."""
        sensor = self.augment.sensor(self.sensor)
        return pk.bin_events(frames, sensor, self.T, split=self.split, dt=self.dt, dtype=dtype)


@dataclass(frozen=True)
class Images:
    """Static images as bytes, [B, H, W, C] in a batch. An encoder turns them into spikes over time, on the device.

    An image is mirrored with probability `flip`, and moved by up to `pad` pixels each way; the border is black.
    """

    flip: float = 0.0
    pad: int = 0

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = sample["image"]
        if rng.random() < self.flip:
            image = image[:, ::-1]
        if self.pad:
            (height, width, _), (dy, dx) = image.shape, rng.integers(0, 2 * self.pad + 1, 2)
            padded = np.zeros((height + 2 * self.pad, width + 2 * self.pad, image.shape[2]), image.dtype)
            padded[self.pad : self.pad + height, self.pad : self.pad + width] = image
            image = padded[dy : dy + height, dx : dx + width]
        return {"image": np.ascontiguousarray(image), "label": np.int32(sample["label"])}

    def unpack(self, images: Array, dtype=jnp.float32) -> Array:
        """[B, H, W, C] in [0, 1], for an encoder."""
        return images.astype(dtype) / 255


@dataclass(frozen=True)
class Sound:
    """Recordings of sound, cut after `size` samples or filled with silence: int16 [B, size] in a batch.

    `snnfuse.data.audio` makes mel bands of them on the device, and changes them at random in training. With `lengths` a batch also
    has `length` [B], the samples of each recording; `audio.steps` makes steps of them.
    """

    size: int
    lengths: bool = False

    def __post_init__(self):
        ev.at_least("size", self.size, 1)

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        audio = sample["audio"][: self.size]
        made = {"audio": np.pad(audio, (0, self.size - len(audio))), "label": np.int32(sample["label"])}
        return _with_length(self, made, len(audio))


@dataclass(frozen=True)
class Signals:
    """Signals of several channels, cut after `size` steps or followed by zeros: float32 [B, size, C] in a batch.

    `snnfuse.data.signals` makes windows of them on the device, and changes them at random in training. With `lengths` a batch also has
    `length` [B], the steps of each signal.
    """

    size: int
    lengths: bool = False

    def __post_init__(self):
        ev.at_least("size", self.size, 1)

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        signal = sample["signal"][: self.size].astype(np.float32)
        padded = np.pad(signal, ((0, self.size - len(signal)), (0, 0)))
        return _with_length(self, {"signal": padded, "label": np.int32(sample["label"])}, len(signal))
