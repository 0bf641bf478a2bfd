"""Pooling over space, channels last."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from snnfuse.nn.spikes import Spikes, values


def mean_pool(x: Array | Spikes) -> Array:
    """[..., H, W, C] -> [..., C]: the mean over space, in float32."""
    x = values(x, "mean_pool")
    if x.ndim < 3 or 0 in x.shape[-3:-1]:
        raise ValueError(f"mean_pool: x must be [..., H, W, C] with H and W above 0; got {x.shape}")
    return x.mean((-3, -2), dtype=jnp.float32)


def max_pool(x: Array, window: int = 3, stride: int = 2, padding: int = 1) -> Array:
    """The maximum of each window, in the dtype of x (bool and integers too): [n, H, W, C] -> [n, H', W', C] with H' = (H + 2 padding - window) // stride + 1.

    Among equal values the gradient goes to the first, row by row, as in PyTorch; most spikes are equal. The backward pass
    stores the place of that value, one byte per output, and neither x nor the output. `lax.reduce_window` returns the same
    values, but its gradient needs a slow scatter.
    """
    if x.ndim != 4 or not 0 <= padding < window <= min(15, *(s + 2 * padding for s in x.shape[1:3])) or stride < 1:
        raise ValueError(
            f"max_pool: x must be [n, H, W, C] with padding < window <= H + 2 padding, window <= 15, and stride >= 1; "
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
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=_lowest(x.dtype))
    best = place = None
    for k in range(window * window):
        i, j = divmod(k, window)
        seen = jax.lax.slice(
            padded, (0, i, j, 0), (n, i + stride * (h - 1) + 1, j + stride * (w - 1) + 1, C), (1, stride, stride, 1)
        )
        if best is None:
            best, place = seen, jnp.zeros(seen.shape, jnp.uint8)
        else:
            larger = (seen > best) | (seen != seen)  # a NaN is passed on
            best, place = jnp.where(larger, seen, best), jnp.where(larger, jnp.uint8(k), place)
    return best, (place, jnp.zeros((0, H, W), x.dtype))


def _lowest(dtype):
    if dtype == jnp.bool_:
        return False
    return jnp.iinfo(dtype).min if jnp.issubdtype(dtype, jnp.integer) else -jnp.inf


def _backward(how, residuals, d_out):
    """Along an axis, the windows over input stride m + r differ only by m: compute one plane for each r, then interleave them."""
    window, stride, padding = how
    place, like = residuals
    H, W = like.shape[1:]
    M, L = -(-H // stride), -(-W // stride)
    planes = []
    for rows in _covering(window, stride, padding):
        for columns in _covering(window, stride, padding):
            d_x = jnp.zeros((place.shape[0], M, L, place.shape[3]), jnp.float32)
            for (up, i), (left, j) in ((row, column) for row in rows for column in columns):
                hit = _shifted(place, (up, left), (M, L), 255) == i * window + j
                d_x = d_x + jnp.where(hit, _shifted(d_out, (up, left), (M, L), 0), 0)
            planes.append(d_x.astype(like.dtype))
    n, C = place.shape[0], place.shape[3]
    rows = [jnp.stack(planes[r : r + stride], 3) for r in range(0, len(planes), stride)]
    return (jnp.stack(rows, 2).reshape(n, M * stride, L * stride, C)[:, :H, :W],)


def _covering(window, stride, padding):
    """For each r < stride, the windows over input stride m + r: pairs (index of the window - m, position inside the window)."""
    for r in range(stride):
        last, offset = divmod(r + padding, stride)
        yield [(last - back, offset + back * stride) for back in range(window) if offset + back * stride < window]


def _shifted(y, shifts, sizes, fill):
    """y[:, shift : shift + size] along both axes of space, with `fill` outside of y."""
    pads = [(-shift, shift + size - have) for shift, size, have in zip(shifts, sizes, y.shape[1:3], strict=True)]
    config = [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)]
    return jax.lax.pad(y, jnp.asarray(fill, y.dtype), config)


_max_pool.defvjp(_forward, _backward)
