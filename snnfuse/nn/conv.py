"""Convolutions for spiking networks: channels last, kernels as the GPU reads them, spikes kept as bits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from snnfuse.nn.precision import PrecisionPolicy
from snnfuse.nn.spikes import Spikes, values
from snnfuse.nn.temporal import Timeless
from snnfuse.ops.packing import unpack

_he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal", in_axis=-1, out_axis=0)
_torch_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv(Timeless):
    """A 2-D convolution, [..., H, W, I] -> [..., H', W', O] with any axes before; H' = (H + 2 padding - size) // stride + 1.

    Args:
      size: of the kernel, both ways. `stride`, `padding` likewise; padding None is (size - 1) // 2.
      precision: the dtype of inputs, outputs and products; parameters are float32 (see `PrecisionPolicy`).
      kernel_init: by default normal of variance 2 / (size^2 O), as the ResNets of PyTorch and SpikingJelly.

    `kernel` is [O, size, size, I], in memory as cuDNN reads it beside channels-last inputs: none is transposed. Called on
    `Spikes`, it keeps their bits for the backward pass, not the values: the gradients are the same.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        use_bias: bool = False,
        precision: PrecisionPolicy | str = "float32",
        kernel_init: Callable = _he_normal,
        rngs: nnx.Rngs,
    ):
        given = dict(in_features=in_features, out_features=out_features, size=size, stride=stride)
        for name, value in given.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of 1 or more, the same both ways; got {value!r}")
        if padding is not None and (not isinstance(padding, int) or not 0 <= padding < size):
            raise ValueError(f"padding must be an integer in 0..{size - 1}, less than the kernel; got {padding!r}")
        self.stride = stride
        self.padding = (size - 1) // 2 if padding is None else padding
        self.precision = PrecisionPolicy(precision)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (out_features, size, size, in_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if use_bias else None

    def __call__(self, x: Array | Spikes) -> Array:
        shape, features = values(x).shape, self.kernel.shape[-1]
        if len(shape) < 4 or shape[-1] != features:
            raise ValueError(f"x must be [..., H, W, {features}], of rank 4 or more; got {shape}")
        f = partial(_fold, partial(conv, stride=self.stride, padding=self.padding, precision=self.precision.lax))
        y = linear_in(f, x, self.kernel[...], self.precision)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...].astype(y.dtype), y.shape)


class Linear(Timeless):
    """A dense layer, [..., I] -> [..., O]: `nnx.Linear` with the precisions and the kept bits of `Conv`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        precision: PrecisionPolicy | str = "float32",
        kernel_init: Callable = _torch_uniform,
        rngs: nnx.Rngs,
    ):
        self.precision = PrecisionPolicy(precision)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), jnp.float32))
        bound = in_features**-0.5
        bias = partial(jax.random.uniform, shape=(out_features,), dtype=jnp.float32, minval=-bound, maxval=bound)
        self.bias = nnx.Param(bias(rngs.params())) if use_bias else None

    def __call__(self, x: Array | Spikes) -> Array:
        shape, features = values(x).shape, self.kernel.shape[0]
        if shape[-1:] != (features,):
            raise ValueError(f"x must be [..., {features}]; got {shape}")
        f = lambda x, kernel: jnp.matmul(x.astype(kernel.dtype), kernel, precision=self.precision.lax)
        y = linear_in(f, x, self.kernel[...], self.precision)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...].astype(y.dtype), y.shape)


def linear_in(f: Callable, x: Array | Spikes, kernel: Array, precision: PrecisionPolicy) -> Array:
    """f(x, kernel), bilinear, in the dtype of `precision`; of `Spikes` the bits alone are kept for the gradient.

    f casts what is smaller (bool, uint8) itself, where it needs it.
    """
    kernel = kernel.astype(precision.dtype)
    if not isinstance(x, Spikes):
        return f(x if x.dtype.itemsize < kernel.dtype.itemsize else x.astype(kernel.dtype), kernel)
    return _of_spikes(f, x.values.shape[0], x.values.astype(precision.dtype), x.bits, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_spikes(f, T, x, bits, kernel):
    return f(x, kernel)


def _of_spikes_forward(f, T, x, bits, kernel):
    return f(x, kernel), (bits, kernel)


def _of_spikes_backward(f, T, residuals, d_y):
    bits, kernel = residuals
    d_x, d_kernel = jax.vjp(f, unpack(bits, T, kernel.dtype), kernel)[1](d_y)
    return d_x, np.zeros(bits.shape, jax.dtypes.float0), d_kernel


_of_spikes.defvjp(_of_spikes_forward, _of_spikes_backward)


def _fold(f, x, kernel):
    y = f(x.reshape(-1, *x.shape[-3:]), kernel)
    return y.reshape(*x.shape[:-3], *y.shape[1:])


def conv(x: Array, kernel: Array, *, stride: int = 1, padding: int = 0, precision: Any = None) -> Array:
    """x [n, H, W, I], kernel [O, k, l, I] -> [n, H', W', O], in the cheapest of four forms that are equal.

    On a map so small that the kernel mostly meets padding, and for a 1 x 1 kernel, it is a product of matrices. With few
    channels (images) and a stride, stride x stride pixels become channels first: three do not fill the matrix units.
    """
    (features, *taps, inputs), (H, W) = kernel.shape, x.shape[1:3]
    outs = [(size + 2 * padding - t) // stride + 1 for size, t in zip((H, W), taps, strict=True)]
    if min(outs) < 1:
        raise ValueError(f"x must be as large as the kernel, {taps}, with padding {padding}; got a map of {H} x {W}")
    slide = partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "OHWI", "NHWC"), precision=precision)
    small = 2 * H * W <= taps[0] * taps[1] and padding < min(taps)
    if stride > 1 and inputs * stride**2 <= 16 and H % stride == W % stride == 0 and not small and max(taps) > 1:

        @jax.checkpoint  # x is kept for the backward pass, and not what is made of it here, which is larger
        def of_blocks(x, kernel):
            x, kernel, pads = _space_to_depth(x.astype(kernel.dtype), kernel, stride, padding, outs)
            return slide(x, kernel, (1, 1), pads)

        return of_blocks(x, kernel)
    x = x.astype(kernel.dtype)
    if small:
        matrix = _dense(kernel, (H, W), outs, stride, padding)
        return jnp.matmul(x.reshape(len(x), -1), matrix.T, precision=precision).reshape(len(x), *outs, features)
    if (*taps, padding) == (1, 1, 0):
        return jnp.matmul(x[:, ::stride, ::stride], kernel.reshape(features, inputs).T, precision=precision)
    return slide(x, kernel, (stride, stride), [(padding, padding)] * 2)


def _dense(kernel, sizes, outs, stride, padding):
    """The convolution as a matrix [H' W' O, H W I]: for each output, the taps that the map lies under."""
    (H, W), (h, w) = sizes, outs
    wide = jnp.pad(kernel, ((0, 0), (stride * h, H), (stride * w, W), (0, 0)))
    rows = []
    for i in range(h):
        for j in range(w):
            top, left = stride * (h - i) + padding, stride * (w - j) + padding
            rows.append(wide[:, top : top + H, left : left + W])
    return jnp.stack(rows).reshape(h * w * len(kernel), -1)


def _space_to_depth(x, kernel, stride, padding, outs):
    """(x [n, H / stride, W / stride, I stride^2], kernel, pads) of the same convolution with stride 1."""
    features, *taps, inputs = kernel.shape
    before = -padding % stride  # taps of zero, for the padding to be whole blocks
    blocks = [-(-(t + before) // stride) for t in taps]
    after = [b * stride - t - before for b, t in zip(blocks, taps, strict=True)]
    kernel = jnp.pad(kernel, ((0, 0), (before, after[0]), (before, after[1]), (0, 0)))
    kernel = kernel.reshape(features, blocks[0], stride, blocks[1], stride, inputs).transpose(0, 1, 3, 2, 4, 5)
    channels = inputs * stride**2
    fill = -channels % 8  # what the matrix units take at a time
    kernel = jnp.pad(kernel.reshape(features, *blocks, channels), ((0, 0),) * 3 + ((0, fill),))
    parts = [x[:, a::stride, b::stride] for a in range(stride) for b in range(stride)]
    x = jnp.pad(jnp.concatenate(parts, -1), ((0, 0),) * 3 + ((0, fill),))
    low = (padding + before) // stride
    return x, kernel, [(low, out - 1 + b - s - low) for out, b, s in zip(outs, blocks, x.shape[1:3], strict=True)]
