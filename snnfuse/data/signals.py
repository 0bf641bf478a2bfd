"""Signals of several channels on the device, such as muscle activity: sliding windows, and random changes. Pure and jitted.

A signal is `xs` [B, n, C]: n steps of C channels. What comes of it is time first, [T, B, ...]. `encoders.level_crossing`,
`encoders.lif` and `encoders.delta` turn it into spikes.

    level = signals.log_rms(xs, width=40, hop=20)        # [T, B, C]
    spikes = encoders.level_crossing(level, 0.2)         # [T, B, C, 2]
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from snnfuse.data.events import at_least


def _check(xs: Array, **least: float) -> Array:
    xs = jnp.asarray(xs)
    if xs.ndim != 3 or not xs.size or not jnp.issubdtype(xs.dtype, jnp.floating):
        raise ValueError(f"xs must be floating [B, n, C], each at least 1; got {xs.dtype} of shape {xs.shape}")
    for name, value in least.items():
        if not 0 <= value < np.inf:
            raise ValueError(f"{name} must be at least 0 and finite; got {value}")
    return xs


@partial(jax.jit, static_argnames=("width", "hop"))
def windows(xs: Array, width: int, hop: int) -> Array:
    """Sliding windows of `width` steps, each `hop` after the one before: [T, B, width, C], T = 1 + (n - width) // hop.

    out[t, b] = xs[b, t hop : t hop + width]
    """
    xs, width, hop = _check(xs), at_least("width", width, 1), at_least("hop", hop, 1)
    if width > xs.shape[1]:
        raise ValueError(f"width must be at most the {xs.shape[1]} steps of xs; got {width}")
    T = 1 + (xs.shape[1] - width) // hop
    return jnp.moveaxis(xs[:, np.arange(T)[:, None] * hop + np.arange(width)], 1, 0)


@partial(jax.jit, static_argnames=("width", "hop", "floor"))
def log_rms(xs: Array, width: int, hop: int, floor: float = 1e-2) -> Array:
    """The log of the root mean square of sliding windows, [T, B, C].

    out[t] = ln(floor + sqrt(mean_i w[t, i]^2)),   w the `windows` of xs
    """
    if not floor > 0:
        raise ValueError(f"floor must be above 0; got {floor}")
    return jnp.log(floor + jnp.sqrt(jnp.square(windows(xs, width, hop)).mean(2)))


@partial(jax.jit, static_argnames=("size", "random"))
def piece(key: Array, xs: Array, size: int, random: bool = True) -> Array:
    """`size` steps of each signal, [B, size, C]: from a random step on, or the ones in the middle."""
    xs, size = _check(xs), at_least("size", size, 1)
    if (left := xs.shape[1] - size) < 0:
        raise ValueError(f"size must be at most the {xs.shape[1]} steps of xs; got {size}")
    start = jax.random.randint(key, (len(xs),), 0, left + 1) if random else jnp.full(len(xs), left // 2)
    return jax.vmap(lambda one, at: jax.lax.dynamic_slice_in_dim(one, at, size))(xs, start)


@partial(jax.jit, static_argnames=("most",))
def gain(key: Array, xs: Array, most: float) -> Array:
    """Each channel of each signal times a random factor: ln(factor) is uniform in -ln(1 + most) .. ln(1 + most)."""
    xs, top = _check(xs, most=most), float(np.log1p(most))
    return xs * jnp.exp(jax.random.uniform(key, (len(xs), 1, xs.shape[2]), minval=-top, maxval=top))


@partial(jax.jit, static_argnames=("part",))
def noise(key: Array, xs: Array, part: float) -> Array:
    """White noise on each signal, with a deviation of up to `part` of the signal's root mean square."""
    level, draw = jax.random.split(key)
    xs = _check(xs, part=part)
    scale = jax.random.uniform(level, (len(xs), 1, 1), maxval=part) * jnp.sqrt(
        jnp.square(xs).mean((1, 2), keepdims=True)
    )
    return xs + scale * jax.random.normal(draw, xs.shape)
