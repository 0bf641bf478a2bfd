"""Weights of few bits in training: rounded in the forward pass, with the gradient of the weights that are not rounded."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from snnfuse.nn.spikes import Spikes
from snnfuse.nn.temporal import Folded, Timeless


class Quantised(Timeless):
    """A linear layer or convolution with weights of a few bits: [T, B, ...] -> [T, B, ...].

        weight = step round(kernel / step),   step = max |kernel| / (2^(bits - 1) - 1) for each output channel

    The gradient passes straight through the rounding: that of `weight` moves `kernel`. A bias stays as it is.

    Args:
      layer: an `nn.Linear`, `nn.Conv`, `nnx.Linear` or `nnx.Conv`, whose kernel is trained.
      bits: 2 to 8; 8 by default.

    Bengio, Leonard and Courville 2013, https://arxiv.org/abs/1308.3432.
    """

    def __init__(self, layer: nnx.Linear | nnx.Conv, bits: int = 8):
        if not isinstance(layer, nnx.Linear | nnx.Conv):
            raise TypeError(f"layer must be an nnx.Linear or nnx.Conv; got {type(layer).__name__}")
        if not isinstance(bits, int | np.integer) or isinstance(bits, bool) or not 2 <= bits <= 8:
            raise ValueError(f"bits must be a whole number from 2 to 8; got {bits!r}")
        self.layer, self.bits = layer, int(bits)

    def integers(self) -> tuple[Array, Array]:
        """(the weights as int8, the step of each output channel): weight = step times integer."""
        kernel, most = lax.stop_gradient(self.layer.kernel[...]), 2 ** (self.bits - 1) - 1
        largest = jnp.abs(kernel).max(tuple(range(kernel.ndim - 1)))
        step = jnp.where(largest > 0, largest, 1) / most
        return jnp.round(kernel / step).astype(jnp.int8), step

    def __call__(self, xs: Array | Spikes) -> Array:
        integers, step = self.integers()
        layer, kernel = nnx.clone(self.layer), self.layer.kernel[...]
        layer.kernel[...] = kernel + lax.stop_gradient(integers.astype(kernel.dtype) * step - kernel)
        return layer(xs) if isinstance(layer, Timeless) else Folded(layer)(xs)
