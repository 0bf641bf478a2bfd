"""A data set that lives on the device: batches are gathered inside the compiled step, and no call transfers data."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from snnfuse.core.neuron import PyTree
from snnfuse.parallel.step import data_axes, fold_key


class Stored(nnx.Variable):
    """An array of the data set, or the order of an epoch's samples. Checkpoints need none of them: keep `Position`."""


class Position(nnx.Variable):
    """The number of batches taken."""


class DeviceData(nnx.Module):
    """Batches of arrays that stay on the device, as an object of a `compiled_step`.

        data = training.DeviceData((images, labels), batch=64, seed=0)        # uint8 images: a quarter of float32

        @training.compiled_step
        def train_step(model, optimizer, data):
            (images, labels), key = data.next()
            xs = sf.data.rate_code(key, images / 255, T)                      # encoding and augmentation run here too
            ...

        losses = train_step.scan(model, optimizer, data, steps=len(data))     # an epoch in one call

    Every epoch has its own order. Batch k and its key depend on the seed and on k alone, so a run that is resumed by
    setting `data.position[...] = k` (or from `nnx.state(data, training.Position)`) repeats what it would have been.
    Packed bits (`np.packbits(x, axis=-1)`) take an eighth of uint8: unpack the batch by `jnp.unpackbits(bits, axis=-1)`.
    Inside a step over a mesh, `next` returns this device's part of the batch, and a key of its own.

    Args:
      arrays: a tree of arrays, each with the samples along its first axis.
      batch: samples in a batch. What remains of an epoch after its last whole batch is left out of that epoch.
      shuffle: whether epochs are shuffled; otherwise each goes through the samples in their order.
    """

    def __init__(self, arrays: PyTree, batch: int, *, seed: int = 0, shuffle: bool = True):
        leaves, self.tree = jax.tree.flatten(arrays)
        sizes = {np.shape(x)[0] if np.ndim(x) else 0 for x in leaves}
        if len(sizes) != 1 or not 1 <= batch <= max(sizes):
            raise ValueError(
                f"arrays must hold one number of samples, at least batch; got {sorted(sizes)} samples, batch {batch}"
            )
        self.samples, self.batch, self.seed, self.shuffle = sizes.pop(), batch, seed, shuffle
        self.arrays = nnx.List([Stored(jnp.asarray(x)) for x in leaves])
        self.order = Stored(jnp.arange(self.samples, dtype=jnp.int32))
        self.epoch_of_order = Stored(jnp.int32(-1))
        self.position = Position(jnp.int32(0))

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.samples // self.batch

    def next(self) -> tuple[PyTree, Array]:
        """The next batch, and its key."""
        position, key = self.position[...], jax.random.key(self.seed)
        epoch, index = position // len(self), position % len(self)
        if self.shuffle:
            shuffled = lambda: jax.random.permutation(jax.random.fold_in(key, epoch), self.samples).astype(jnp.int32)
            self.order[...] = lax.cond(self.epoch_of_order[...] == epoch, lambda: self.order[...], shuffled)
            self.epoch_of_order[...] = epoch
        self.position[...] = position + 1
        rows, device = _part_of_batch(self.batch)
        indices = lax.dynamic_slice(self.order[...], (index * self.batch + device * rows,), (rows,))
        batch = self.tree.unflatten([x[...][indices] for x in self.arrays])
        return batch, fold_key(jax.random.fold_in(jax.random.fold_in(key, 2**31), position), data_axes())


def _part_of_batch(batch):
    """How many rows of the batch this device takes, and which device it is."""
    axes = data_axes()
    devices = math.prod(lax.axis_size(axis) for axis in axes)
    if batch % devices:
        raise ValueError(f"batch must be a multiple of the {devices} devices; got {batch}")
    return batch // devices, lax.axis_index(axes) if axes else 0
