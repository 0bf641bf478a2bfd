"""A convolution along time, whose state is the last few steps of its input."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from snnfuse.nn.padded import join, split
from snnfuse.nn.spikes import Spikes, values
from snnfuse.nn.temporal import Temporal, last_steps, with_past


class TimeConv(Temporal):
    """A causal convolution over time and space: xs [T, B, *space, I] -> (outs [T, B, *space', O], the last K - 1 inputs).

        outs[t] = bias + sum_{k < K} taps[k] * xs[t - (K - 1) + k];   xs before the first step is 0

    Here taps[k] * x is a convolution over space, or a product where there is none. So a step sees itself and the K - 1 steps
    before it. A sequence in pieces, each from the last state, gives the same as the whole.

        nn.TimeConv(1, 32, (5, 3), strides=(2,), rngs=rngs)      # mel bands [T, B, 40, 1] -> [T, B, 20, 32]

    Args:
      inputs, features: I and O.
      kernel: (K, *taps of each axis of space); odd taps. Space is padded with zeros by half of the taps.
      strides: one for each axis of space, 1 by default. Time has none.
      use_bias: False by default, because a normalisation usually follows.
      dtype: of the computation and the output; default: what xs and the parameters promote to.
      rngs: `nnx.Rngs`.
    """

    def __init__(
        self,
        inputs: int,
        features: int,
        kernel: Sequence[int],
        *,
        strides: Sequence[int] | None = None,
        use_bias: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if isinstance(kernel, int):
            raise TypeError(f"kernel must be (K, *taps), such as (5,) where there is no space; got {kernel}")
        length, *taps = kernel
        strides = (1,) * len(taps) if strides is None else tuple(strides)
        if length < 1 or any(tap < 1 or tap % 2 == 0 for tap in taps):
            raise ValueError(f"kernel must be (K, *taps), K at least 1 and each of the others odd; got {tuple(kernel)}")
        if len(strides) != len(taps):
            raise ValueError(f"strides must have one number for each of {len(taps)} axes of space; got {strides}")
        padding = ((0, 0), *((tap // 2, tap // 2) for tap in taps))
        self.conv = nnx.Conv(
            inputs,
            features,
            tuple(kernel),
            (1, *strides),
            padding=padding,
            use_bias=use_bias,
            dtype=dtype,
            rngs=rngs,
        )

    def init_state(self, xs: Array | Spikes) -> Array:
        xs = values(split(xs)[0])
        return jnp.zeros((self.conv.kernel_size[0] - 1, *xs.shape[1:]), xs.dtype)

    def __call__(self, xs: Array | Spikes, state: Array | None = None) -> tuple[Array, Array]:
        xs, lengths = split(xs)
        axes = len(self.conv.kernel_size) + 2
        if (xs := values(xs)).ndim != axes:
            raise ValueError(f"xs must be [T, B, *space, I], of rank {axes} for this kernel; got shape {xs.shape}")
        joined = with_past(xs, state, self.conv.kernel_size[0] - 1)
        outs = self.conv(jnp.moveaxis(joined, 0, 1))
        return join(jnp.moveaxis(outs, 1, 0), lengths), last_steps(joined, self.conv.kernel_size[0] - 1, lengths)
