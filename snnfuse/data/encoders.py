"""Encoders: from an image, or a signal, to spikes over time, on the device and inside the jitted step.

All are pure and jitted (T, dtype and the other choices are static), and those that draw take a key first. Spikes come
time first, [T, *images.shape], in `dtype`: any numeric type or bool, so that spikes may leave as bytes.
`images` are floating, in [0, 1]: divide bytes by 255 first (an integer image is a TypeError, for it would saturate).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def _jit(*static: str):
    return partial(jax.jit, static_argnames=("T", "dtype", *static))


def _check(images: Array, T: int, name: str = "images") -> None:
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating, in [0, 1]; got dtype {images.dtype}")
    if T < 1:
        raise ValueError(f"T must be at least 1; got {T}")


@_jit()
def direct(images: Array, T: int, dtype=jnp.float32) -> Array:
    """The image itself at every step, for a first layer that turns it into spikes.

        out[t] = image

    Rathi and Roy 2020, https://arxiv.org/abs/2008.03658.
    """
    _check(images, T)
    return jnp.broadcast_to(images.astype(dtype), (T, *images.shape))


@partial(jax.jit, static_argnames="dtype")
def paper(images: Array, rand: Array, dtype=jnp.float32) -> Array:
    """The temporal fusion paper's protocol on given draws: a spike where the image is greater than the draw.

        s[t] = image > rand[t]

    `rand` [T, *images.shape], in [0, 1). With torch's draws the spikes are the paper's, bit for bit; with draws of
    jax.random.uniform they are `bernoulli`'s, so the two differ only in the generator. Li et al. 2024,
    https://arxiv.org/abs/2408.00280.
    """
    _check(images, 1)
    if rand.ndim == 0 or rand.shape[1:] != images.shape:
        raise ValueError(f"rand must be [T, *images.shape] = [T, *{images.shape}]; got shape {rand.shape}")
    return (images > rand).astype(dtype)


@_jit()
def bernoulli(key: Array, images: Array, T: int, dtype=jnp.float32) -> Array:
    """Rate code: an independent coin a step, of probability the intensity.

        s[t] ~ Bernoulli(image)   as   image > u[t],   u[t] uniform in [0, 1)

    A 0 never spikes, a 1 always does. It is `paper(images, jax.random.uniform(key, (T, *images.shape)))`.
    """
    _check(images, T)
    return paper(images, jax.random.uniform(key, (T, *images.shape)), dtype)


@_jit()
def poisson(key: Array, images: Array, T: int, rate: Array | float = 1.0, dtype=jnp.float32) -> Array:
    """Rate code with counts: the number of spikes of a Poisson process in each step.

        n[t] ~ Poisson(rate * image)

    `rate`, spikes a step at intensity 1. Counts may exceed 1: for at most one spike a step give `bernoulli` the
    probability 1 - exp(-rate * image). Heeger 2000, "Poisson model of spike generation".
    """
    _check(images, T)
    return jax.random.poisson(key, rate * images.astype(jnp.float32), (T, *images.shape)).astype(dtype)


def _at(steps: Array, T: int, dtype) -> Array:
    times = jnp.arange(T).reshape(T, *(1,) * steps.ndim)
    return (times == steps).astype(dtype)


@_jit("curve", "silent_to")
def latency(images: Array, T: int, *, curve: str = "linear", silent_to: float = 0.0, dtype=jnp.float32) -> Array:
    """Time-to-first-spike code: one spike a pixel, the brighter the earlier.

        linear   t = round((T - 1) (1 - image))
        log      t = round((T - 1) - ln(1 + (e^(T-1) - 1) image))

    Pixels of intensity <= `silent_to` do not spike; a negative one gives SpikingJelly's LatencyEncoder, where a 0
    spikes at the last step.
    """
    _check(images, T)
    images = jnp.clip(images.astype(jnp.float32), 0, 1)
    if curve == "linear":
        steps = (T - 1) * (1 - images)
    elif curve == "log":  # ln(1 - image + e^(T-1) image), which does not overflow
        steps = (T - 1) - jnp.logaddexp(jnp.log1p(-images), (T - 1) + jnp.log(images))
    else:
        raise ValueError(f"curve must be 'linear' or 'log'; got {curve!r}")
    steps = jnp.where(images > silent_to, jnp.round(steps), T)
    return _at(steps, T, dtype)


@partial(jax.jit, static_argnames=("threshold", "two_sided", "dtype"))
def delta(xs: Array, threshold: float, *, two_sided: bool = True, dtype=jnp.float32) -> Array:
    """Change code of a signal that already runs over time.

        on[t] = xs[t] - xs[t-1] >= threshold;   off[t] = xs[t-1] - xs[t] >= threshold;   xs[-1] = xs[0]

    xs [T, ...] gives [T, ..., 2], the last axis (on, off); without `two_sided`, on alone, [T, ...].
    snnTorch's spikegen.delta has the same steps, off as -1.
    """
    if xs.ndim < 1:
        raise ValueError(f"xs must be [T, ...]; got shape {xs.shape}")
    if not threshold > 0:
        raise ValueError(f"threshold must be positive; got {threshold}")
    step = jnp.diff(xs.astype(jnp.float32), axis=0, prepend=xs[:1].astype(jnp.float32))
    on, off = step >= threshold, -step >= threshold
    return (jnp.stack([on, off], -1) if two_sided else on).astype(dtype)


@_jit("neurons", "silent_to")
def population(images: Array, T: int, neurons: int = 8, *, silent_to: float = 0.1, dtype=jnp.float32) -> Array:
    """Population code: Gaussian receptive fields over [0, 1], each answering by the latency of its activation.

        a[k] = exp(-(image - mu[k])^2 / (2 sigma^2));   mu[k] = (k - 1/2) / (K - 2);   sigma = 1 / (1.5 (K - 2))
        one spike at t = round((T - 1) (1 - a[k])), none where a[k] <= silent_to

    [T, *images.shape, K], K = `neurons` >= 3, k from 0. Bohte, Kok and La Poutre 2002, "Error-backpropagation in
    temporally encoded networks of spiking neurons".
    """
    _check(images, T)
    if neurons < 3:
        raise ValueError(f"neurons must be at least 3; got {neurons}")
    centres = (jnp.arange(neurons) - 0.5) / (neurons - 2)
    distance = (images.astype(jnp.float32)[..., None] - centres) * (1.5 * (neurons - 2))
    return latency(jnp.exp(-0.5 * distance**2), T, silent_to=silent_to, dtype=dtype)


@_jit("bits")
def phase(images: Array, T: int, bits: int = 8, dtype=jnp.float32) -> Array:
    """Phase code: the binary digits of the intensity, most significant first, repeated with period `bits`.

        s[t] = digit t mod bits of q,   q = min(floor(2^bits image), 2^bits - 1)

    Over a period, sum_t s[t] phase_weights[t] = q / 2^bits. Kim et al. 2018, "Deep neural networks with weighted
    spikes".
    """
    _check(images, T)
    if not 1 <= bits <= 24:
        raise ValueError(f"bits must be 1 to 24, what a float32 holds; got {bits}")
    top = 2**bits
    q = jnp.clip(jnp.floor(images.astype(jnp.float32) * top), 0, top - 1).astype(jnp.int32)
    shift = bits - 1 - jnp.arange(T, dtype=jnp.int32) % bits
    return ((q >> shift.reshape(T, *(1,) * q.ndim)) & 1).astype(dtype)


def phase_weights(T: int, bits: int = 8) -> Array:
    """[T], the worth of a spike at each step of a phase code: 2^-(1 + t mod bits)."""
    return 2.0 ** -(1.0 + jnp.arange(T) % bits)
