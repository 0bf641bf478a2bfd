"""Pooling over space, channels last."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def mean_pool(x: Array) -> Array:
    """[..., H, W, C] -> [..., C]: the mean over space, in float32."""
    return x.mean((-3, -2), dtype=jnp.float32)


def max_pool(x: Array, window: int = 3, stride: int = 2, padding: int = 1) -> Array:
    """The largest of each window x window, [n, H, W, C] -> [n, H', W', C] with H' = (H + 2 padding - window) // stride + 1.

    The gradient goes to the first of equal values, row by row (as in PyTorch; among spikes most are equal). For the
    backward pass one byte an output is kept, the place of that value, instead of x and the output. `lax.reduce_window`
    has the same values, and its gradient takes a scatter: 2.4 and 2.5 times as long on an H100, rows in
    benchmarks/results/pool.jsonl.
    """
    if x.ndim != 4 or not 0 <= padding < window <= min(x.shape[1:3]) + 2 * padding or stride < 1:
        raise ValueError(
            f"max_pool: x must be [n, H, W, C] with padding < window <= H + 2 padding, and stride >= 1; "
            f"got {x.shape}, window {window}, stride {stride}, padding {padding}"
        )
    return _max_pool((window, stride, padding), x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _max_pool(how, x):
    return _forward(how, x)[0]


def _forward(how, x):
    window, stride, padding = how
    n, H, W, C = x.shape
    h, w = ((size + 2 * padding - window) // stride + 1 for size in (H, W))
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=-jnp.inf)
    best = place = None
    for k in range(window * window):
        i, j = divmod(k, window)
        seen = jax.lax.slice(
            padded, (0, i, j, 0), (n, i + stride * (h - 1) + 1, j + stride * (w - 1) + 1, C), (1, stride, stride, 1)
        )
        if best is None:
            best, place = seen, jnp.zeros(seen.shape, jnp.uint8)
        else:
            larger = seen > best
            best, place = jnp.where(larger, seen, best), jnp.where(larger, jnp.uint8(k), place)
    return best, (place, jnp.zeros((0, H, W), x.dtype))


def _backward(how, residuals, d_out):
    """Each input looks at the windows over it, at most ceil(window / stride) an axis: a gather, where none need be added up."""
    window, stride, padding = how
    place, like = residuals
    h, w = place.shape[1:3]
    H, W = like.shape[1:]
    d_x = jnp.zeros((place.shape[0], H, W, place.shape[3]), jnp.float32)
    for a in range(-(-window // stride)):
        for b in range(-(-window // stride)):
            rows, columns = (_cover(H, h, a, stride, padding), _cover(W, w, b, stride, padding))
            (up_h, i, real_i), (up_w, j, real_j) = rows, columns
            spread = lambda y, up_h=up_h, up_w=up_w: up_w(up_h(y, 1), 2)
            mine = (i < window)[:, None] & (j < window)[None] & real_i[:, None] & real_j[None]
            offset = (i[:, None] * window + j[None]).astype(jnp.uint8)
            hit = (spread(place) == offset[None, :, :, None]) & mine[None, :, :, None]
            d_x = d_x + jnp.where(hit, spread(d_out), 0)
    return (d_x.astype(like.dtype),)


def _cover(size, windows, back, stride, padding):
    """For each position of an axis: its window, `back` windows before the last that may cover it.

    (spread y from windows to positions, the offset of the position in the window, whether there is such a window)
    """
    position = jnp.arange(size) + padding
    window = position // stride - back
    offset = position - window * stride

    def spread(y, axis):  # position p of y is window p // stride - back, by repeating: a slice, no gather
        y = jnp.repeat(y, stride, axis)
        start = padding - back * stride
        before, after = max(0, -start), max(0, start + size - windows * stride)
        pads = [(0, 0)] * y.ndim
        pads[axis] = (before, after)
        y = jnp.pad(y, pads)
        return jax.lax.slice_in_dim(y, start + before, start + before + size, axis=axis)

    return spread, offset, (window >= 0) & (window < windows)


_max_pool.defvjp(_forward, _backward)
