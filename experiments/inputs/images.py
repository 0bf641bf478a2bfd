"""Static images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from config import needs
from jax import Array

from inputs.reading import Batch, Labelled, Name, Sources, in_memory, train_and_test
from snnfuse.data import archives, encoders, image_augment
from snnfuse.data import loader as load

STATISTICS = {  # as published: the mean and the standard deviation of each channel over the training images
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


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
    scale: float = 0.0
    """training images become larger or smaller by up to this part"""
    turn: float = 0.0
    """training images are turned by up to this many degrees"""
    cutout: int = 0
    """side of a square, in pixels, that is erased in every training image"""
    rand_augment: int = 0
    """transforms of RandAugment in every training image"""
    magnitude: Annotated[float, needs("rand_augment")] = 0.3
    """their strength, in [0, 1]"""
    mixup: float = 0.0
    """training images are mixed in pairs, by a share drawn from Beta(mixup, mixup)"""
    cutmix: float = 0.0
    """a rectangle of each training image comes from another one; its size is drawn from Beta(cutmix, cutmix)"""
    normalise: Annotated[bool, needs(encoding="direct")] = False
    """channels get mean 0 and deviation 1; with --data.encoding direct"""
    mean: Annotated[tuple[float, ...] | None, needs("normalise"), needs("deviation")] = None
    """of each channel, from 0 to 1, with --data.normalise. None: as published, or else that of the training images"""
    deviation: Annotated[tuple[float, ...] | None, needs("mean")] = None
    """the same, the standard deviation"""
    repeat: int = 1
    """copies of the image, each as its own channels with its own noise"""

    def __post_init__(self):
        if self.encoding not in ("direct", "bernoulli"):
            raise ValueError(f"--data.encoding must be direct or bernoulli; got {self.encoding!r}")
        for name in ("shift", "cutout", "rand_augment", "mixup", "cutmix"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"--data.{name} must be at least 0; got {value}")
        for name, most in (("scale", 1e3), ("turn", 180)):
            if not 0 <= (value := getattr(self, name)) <= most:
                raise ValueError(f"--data.{name} must be at least 0, and at most {most:g}; got {value}")
        if not 0 <= self.magnitude <= 1:
            raise ValueError(f"--data.magnitude must be in [0, 1]; got {self.magnitude}")
        if None not in (self.mean, self.deviation) and not (
            len(self.mean) == len(self.deviation) > 0
            and np.isfinite(self.mean + self.deviation).all()
            and min(self.deviation) > 0
        ):
            raise ValueError(
                f"--data.mean and --data.deviation must have a finite number for each channel, deviations above 0; got {self.mean} "
                f"and {self.deviation}"
            )
        if self.repeat < 1:
            raise ValueError(f"--data.repeat must be at least 1; got {self.repeat}")

    def sources(self) -> Sources:
        train, test = train_and_test(self.name)
        return in_memory(train, f"{self.name}, train"), in_memory(test, f"{self.name}, test")

    def measured(self, train: Sequence[dict]) -> "Images":
        if not self.normalise or self._statistics:
            return self
        total = squares = count = 0.0
        for at in range(0, len(train), 100):
            images = np.stack([sample["image"] for sample in train[at : at + 100]]) / 255
            total, squares = total + images.sum((0, 1, 2)), squares + np.square(images).sum((0, 1, 2))
            count += images[..., 0].size
        mean = total / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        if not deviation.min() > 1e-3:
            raise archives.Missing(
                f"--data.normalise divides by the standard deviation of each channel; channel {deviation.argmin()} of the "
                f"training images of {self.name} has the same value everywhere"
            )
        rounded = lambda numbers: tuple(round(float(x), 5) for x in numbers)
        return replace(self, mean=rounded(mean), deviation=rounded(deviation))

    @property
    def _statistics(self):
        """(mean, standard deviation) of each channel; None if they are not known yet."""
        return (self.mean, self.deviation) if self.mean is not None else STATISTICS.get(self.name)

    def example(self) -> load.Images:
        return load.Images()

    def augment(self, key: Array, batch: Batch, targets: Array) -> tuple[Batch, Array]:
        keys, images = iter(jax.random.split(key, 7)), self.example().unpack(batch["image"])
        if self.shift:
            images = image_augment.crop(next(keys), images, self.shift)
        if self.flip:
            images = image_augment.flip(next(keys), images)
        if self.scale or self.turn:
            changes = dict(scale=self.scale, turn=self.turn)
            images = image_augment.move(next(keys), images, **changes)
        if self.rand_augment:
            images = image_augment.rand_augment(next(keys), images, self.rand_augment, self.magnitude)
        if self.cutout:
            mean, _ = self._statistics or (0.0, 1.0)
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
            if not self._statistics:
                raise ValueError(
                    f"{self.name} has no published mean: use `measured(train)` of this data set, or --data.mean"
                )
            mean, deviation = map(jnp.asarray, self._statistics)
            if len(mean) != images.shape[-1]:
                raise ValueError(
                    f"--data.mean must have a number for each of {images.shape[-1]} channels; got {mean.tolist()}"
                )
            images = (images - mean) / deviation
        images = jnp.tile(images, self.repeat)
        if self.encoding == "bernoulli":
            return encoders.bernoulli(key, images, T)
        return encoders.direct(images, T)
