"""The convolution algorithms: `convolve` computes one convolution in the cheapest of four equal forms."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def convolve(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    pads: Sequence[tuple[int, int]],
    *,
    input_dilation: Sequence[int] | None = None,
    kernel_dilation: Sequence[int] | None = None,
    groups: int = 1,
    precision: Any = None,
) -> Array:
    """x [n, *space, I], kernel [*taps, I / groups, O] -> [n, *space', O]; one stride and one (low, high) padding per axis.

    The four forms:
    * a product of matrices, for a 1 x 1 kernel;
    * a product of matrices, for a map so small that most taps of the kernel meet padding;
    * pixels moved into channels, for few input channels (images) and a stride: three channels do not fill the matrix units;
    * `lax.conv_general_dilated`, for everything else, and always with dilation, groups, or other than two axes of space.

    A 1 x 1 kernel, and any kernel on a map of 1 x 1, is used as it is stored: on small images those are most of a ResNet's
    weights. Elsewhere O goes to the front of the kernel, as cuDNN reads it beside channels-last inputs.
    """
    *taps, inputs, features = kernel.shape
    space, ones = x.shape[1:-1], (1,) * len(taps)
    input_dilation, kernel_dilation = tuple(input_dilation or ones), tuple(kernel_dilation or ones)
    outs = []
    for size, t, stride, pad, d, k in zip(space, taps, strides, pads, input_dilation, kernel_dilation, strict=True):
        outs.append(((size - 1) * d + sum(pad) - (t - 1) * k) // stride + 1)
    if min(outs) < 1:
        raise ValueError(
            f"x must be as large as the kernel, {tuple(taps)}, with padding {list(pads)}; got a map of {space}"
        )
    spec = (0, x.ndim - 1, *range(1, x.ndim - 1))
    convolution = partial(
        lax.conv_general_dilated,
        lhs_dilation=input_dilation,
        rhs_dilation=kernel_dilation,
        dimension_numbers=lax.ConvDimensionNumbers(spec, spec, spec),
        feature_group_count=groups,
        precision=precision,
    )
    slide = lambda x, kernel, *window: convolution(x, _features_first(kernel), *window)
    dilated = input_dilation + kernel_dilation != 2 * ones
    if len(taps) != 2 or dilated or groups > 1 or min(map(min, pads)) < 0:
        return slide(x.astype(kernel.dtype), kernel, strides, pads)
    (H, W), low = space, [pad[0] for pad in pads]
    small = 2 * H * W <= taps[0] * taps[1] and all(pad < t for pad, t in zip(low, taps, strict=True))
    blocks = strides[0] * strides[1]
    whole = all(size % stride == 0 for size, stride in zip(space, strides, strict=True))
    if blocks > 1 and inputs * blocks <= 16 and whole and not small and max(taps) > 1:

        @jax.checkpoint  # the backward pass stores x, not the larger array that is made from it here
        def of_blocks(x, kernel):
            x, kernel, pads = _space_to_depth(x.astype(kernel.dtype), kernel, strides, low, outs)
            return slide(x, kernel, ones, pads)

        return of_blocks(x, kernel)
    x = x.astype(kernel.dtype)
    if small:
        matrix = _dense(kernel, space, outs, strides, low)
        return jnp.matmul(x.reshape(len(x), -1), matrix, precision=precision).reshape(len(x), *outs, features)
    if taps == [1, 1] and not any(map(any, pads)):
        x = x[:, :: strides[0], :: strides[1]]
        return jnp.matmul(x, kernel.reshape(inputs, features), precision=precision)
    return slide(x, kernel, strides, pads)


@jax.custom_jvp
def _features_first(kernel):
    """[*taps, I, O] -> [O, *taps, I].

    The barrier keeps the gradient's transpose out of the optimizer's update. An update that also transposes cannot write over
    the donated arrays, so XLA copied the parameter and both moments of Adam for each such kernel. The barrier is on a flat
    array, because on any other XLA would choose a layout in which nothing has been transposed yet.
    """
    return jnp.moveaxis(kernel, -1, 0)


@_features_first.defjvp
def _features_first_jvp(primals, tangents):
    (d_kernel,) = tangents
    flat = lax.optimization_barrier(d_kernel.reshape(-1))
    return _features_first(*primals), jnp.moveaxis(flat.reshape(d_kernel.shape), -1, 0)


def _dense(kernel, space, outs, strides, low):
    """The convolution as a matrix [H W I, H' W' O]: each output's columns hold the taps that lie over the map."""
    (H, W), (h, w), (down, right) = space, outs, strides
    corner = lambda i, j: (down * (h - i) + low[0], right * (w - j) + low[1])
    around = (down * h, H), (right * w, W)
    if h * w == 1:
        top, left = corner(0, 0)
        wide = jnp.pad(kernel, (*around, (0, 0), (0, 0)))
        return wide[top : top + H, left : left + W].reshape(-1, kernel.shape[-1])
    # To join windows along O would take a small copy for each. With O first it is one kernel.
    wide = jnp.pad(_features_first(kernel), ((0, 0), *around, (0, 0)))
    rows = []
    for i in range(h):
        for j in range(w):
            top, left = corner(i, j)
            rows.append(wide[:, top : top + H, left : left + W])
    return jnp.stack(rows).reshape(h * w * kernel.shape[-1], -1).T


def _space_to_depth(x, kernel, strides, low, outs):
    """(x [n, H / stride, W / stride, I stride^2], kernel, pads) of the same convolution with stride 1."""
    *taps, inputs, features = kernel.shape
    down, right = strides
    before = [-pad % s for pad, s in zip(low, strides, strict=True)]  # taps of zero make the padding whole blocks
    blocks = [-(-(t + b) // s) for t, b, s in zip(taps, before, strides, strict=True)]
    fill = [(b, n * s - t - b) for n, s, t, b in zip(blocks, strides, taps, before, strict=True)]
    kernel = jnp.pad(kernel, (*fill, (0, 0), (0, 0)))
    kernel = kernel.reshape(blocks[0], down, blocks[1], right, inputs, features).transpose(0, 2, 1, 3, 4, 5)
    channels = inputs * down * right
    extra = (0, -channels % 8)  # the matrix units take 8 channels at a time
    kernel = jnp.pad(kernel.reshape(*blocks, channels, features), ((0, 0), (0, 0), extra, (0, 0)))
    parts = [x[:, a::down, b::right] for a in range(down) for b in range(right)]
    x = jnp.pad(jnp.concatenate(parts, -1), ((0, 0),) * 3 + (extra,))
    pads = []
    for pad, b, s, out, n, size in zip(low, before, strides, outs, blocks, x.shape[1:3], strict=True):
        first = (pad + b) // s
        pads.append((first, out - 1 + n - size - first))
    return x, kernel, pads
