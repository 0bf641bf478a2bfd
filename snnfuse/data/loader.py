"""The loader: a Grain pipeline from a source to batches on the device, which resumes exactly where it was.

    batches = load(source, Frames(sensor, T=16), batch=100, seed=0, workers=2)
    iterator = iter(batches)
    batch = next(iterator)                    # on the device, packed
    xs = frames.unpack(batch["frames"])       # inside the jitted step: [T, B, H, W, P]
    position = iterator.get_state()           # bytes or a dict: checkpoint it; iterator.set_state(position) resumes

Order and augmentation are a function of the seed and the position alone: not of the workers, nor of the prefetching.
With workers > 0 guard the program with `if __name__ == "__main__"`, for they are started afresh.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from snnfuse.data import events as ev
from snnfuse.data import packed as pk
from snnfuse.data.augment import NONE, Augment
from snnfuse.data.events import Sensor
from snnfuse.data.optional import require

Example = Callable[[dict, np.random.Generator], dict[str, np.ndarray]]


def _augmented(sample: dict, sensor: Sensor, augment: Augment, rng: np.random.Generator) -> ev.Events:
    return sample["events"] if augment == NONE else augment(sample["events"], sensor, rng)


@dataclass(frozen=True)
class Frames:
    """Samples of events as frames made by the workers, and transferred as bits (whether there was an event) or bytes.

    `frames` is [T, n] of bits or [T, H, W, P] of counts, and [T, B, ...] in a batch. `split` and `dt` as in
    `to_frames`. With store "bytes", counts over 255 are an error, unless they may `saturate`.
    """

    sensor: Sensor
    T: int
    split: str = "time"
    dt: int | None = None
    store: str = "bits"
    saturate: bool = False
    augment: Augment = NONE

    def __post_init__(self):
        if self.store not in ("bits", "bytes"):
            raise ValueError(f"store must be 'bits' or 'bytes'; got {self.store!r}")

    @property
    def shape(self) -> Sensor:
        return self.augment.sensor(self.sensor)

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        events = _augmented(sample, self.sensor, self.augment, rng)
        counts = ev.to_frames(events, self.shape, self.T, split=self.split, dt=self.dt)
        stored = pk.pack_bits(counts) if self.store == "bits" else ev.to_uint8(counts, saturate=self.saturate)
        return {"frames": stored, "label": np.int32(sample["label"])}

    def unpack(self, frames: Array, dtype=jnp.float32) -> Array:
        """[T, B, H, W, P] on the device, from a batch's `frames`; call it inside the jitted step."""
        if self.store == "bits":
            return pk.unpack_bits(frames, tuple(self.shape), dtype=dtype)
        return frames.astype(dtype)


@dataclass(frozen=True)
class PackedFrames:
    """Samples of events as they are, padded to `size` of them, and binned on the device: 8 bytes an event.

    Cheaper than `Frames` where T is large and events few, and for the workers, which do not bin.
    """

    sensor: Sensor
    T: int
    size: int
    split: str = "time"
    dt: int | None = None
    augment: Augment = NONE

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        events = _augmented(sample, self.sensor, self.augment, rng)
        packed = pk.pack_events(events, self.augment.sensor(self.sensor), self.size)
        return {"frames": packed, "label": np.int32(sample["label"])}

    def unpack(self, frames: Array, dtype=jnp.float32) -> Array:
        """[T, B, H, W, P] on the device, from a batch's `frames` [B, size, 2]; call it inside the jitted step."""
        sensor = self.augment.sensor(self.sensor)
        return pk.bin_events(frames, sensor, self.T, split=self.split, dt=self.dt, dtype=dtype)


@dataclass(frozen=True)
class Images:
    """Static images as bytes, [B, H, W, C] in a batch; an encoder makes time of them, on the device.

    With `flip` they are mirrored with that probability, with `pad` moved by up to so many pixels over black.
    """

    flip: float = 0.0
    pad: int = 0

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = sample["image"]
        if rng.random() < self.flip:
            image = image[:, ::-1]
        if self.pad:
            (height, width, _), (dy, dx) = image.shape, rng.integers(0, 2 * self.pad + 1, 2)
            image = np.pad(image, ((self.pad, self.pad), (self.pad, self.pad), (0, 0)))[
                dy : dy + height, dx : dx + width
            ]
        return {"image": np.ascontiguousarray(image), "label": np.int32(sample["label"])}

    def unpack(self, images: Array, dtype=jnp.float32) -> Array:
        """[B, H, W, C] in [0, 1], for an encoder."""
        return images.astype(dtype) / 255


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count) if shuffle else np.arange(count)


@dataclass(frozen=True)
class _Fetch:
    """Batch number to batch. Whole batches, because what Grain and tfds do for each element costs more than a small image."""

    source: Sequence[dict]
    example: Example
    batch: int
    seed: int
    shuffle: bool
    used: int  # samples an epoch, of all shards
    shard: tuple[int, int]
    batches: int  # an epoch, of this shard

    def __call__(self, number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        epoch, at = divmod(int(number), self.batches)
        mine = _order(len(self.source), self.seed, epoch, self.shuffle)[: self.used][self.shard[0] :: self.shard[1]]
        indices = mine[at * self.batch : (at + 1) * self.batch].tolist()
        read = getattr(self.source, "__getitems__", lambda wanted: [self.source[i] for i in wanted])
        samples = [self.example(sample, rng) for sample in read(indices)]
        time_major = not isinstance(self.example, PackedFrames)
        axis = {name: 1 if time_major and name == "frames" else 0 for name in samples[0]}
        return {name: np.stack([sample[name] for sample in samples], axis[name]) for name in samples[0]}


def load(
    source: Sequence[dict],
    example: Example,
    *,
    batch: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = True,
    shard: tuple[int, int] | None = None,
    workers: int = 0,
    threads: int = 4,
    ahead: int = 2,
    device: Any = None,
) -> Any:
    """Batches of `example(sample, rng)`, on the device, as a grain IterDataset.

    `epochs` None never ends; each epoch has its own order. `shard` is (this process, how many), by default JAX's own:
    with `drop_remainder` all shards have equally many batches, of different samples. `workers` are processes (0: none),
    `threads` read in each; `ahead` batches wait on the device. `device` is a jax.Device or Sharding (of a batch, which
    is time-major where it has time); None is the default device, False leaves batches in NumPy.
    """
    grain = require("grain")
    index, count = shard or (jax.process_index(), jax.process_count())
    if not 0 <= index < count:
        raise ValueError(f"shard must be (i, n) with 0 <= i < n; got {(index, count)}")
    if drop_remainder and len(source) // count < batch:
        raise ValueError(f"batch is {batch}, but a shard has {len(source) // count} of {len(source)} samples")
    used = len(source) // count * count if drop_remainder else len(source)
    mine = len(range(index, used, count))
    each = mine // batch if drop_remainder else -(-mine // batch)
    fetch = _Fetch(source, example, batch, seed, shuffle, used, (index, count), each)
    numbers = grain.MapDataset.range(each * (2**31 if epochs is None else epochs)).seed(seed)
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = numbers.random_map(fetch).to_iter_dataset(reading)
    if workers:
        flags = require("absl.flags").FLAGS
        if not flags.is_parsed():  # grain hands its flags to its workers, also in a program that has none
            flags.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    if device is False:
        return batches
    place = jax.local_devices()[0] if device is None else device
    return require("grain.experimental").device_put(batches, place, cpu_buffer_size=ahead, device_buffer_size=ahead)
