"""Encoders: from an image, or a signal, to spikes over time, on the device and inside the jitted step.

All are pure and jitted (T, dtype and the other choices are static). The random ones take a key first. Spikes come time
first, [T, *images.shape], in `dtype`: any numeric type or bool, so that spikes can be stored as bytes.

`images` are floating, in [0, 1]: divide bytes by 255 first (an integer image is a TypeError). A value outside the range,
or NaN, raises ValueError. Inside `jit` there is no value to look at: there, values are clipped to [0, 1], and NaN counts
as 0. `direct`, `delta`, `level_crossing` and `lif` take any finite value, and pass others on.
"""

import functools
import inspect
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from snnfuse.core.neurons import LIF, LIFParams
from snnfuse.core.reset import SoftReset
from snnfuse.ops.api import unroll

MOST = 2.0**20  # spikes a step: the largest rate, far below what a Poisson draw of 32 bits can hold


def _encoder(*static: str, **ranges: tuple[float, float]):
    """A jitted encoder that raises if a named argument has a value outside its range (low, high)."""

    def wrap(f):
        signature, run = inspect.signature(f), jax.jit(f, static_argnames=static)

        @functools.wraps(f)
        def encode(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            for name, (low, high) in ranges.items():
                if name in bound.arguments:
                    bound.arguments[name] = _in_range(name, bound.arguments[name], low, high)
            return run(*bound.args, **bound.kwargs)

        return encode

    return wrap


def _in_range(name, values, low, high):
    values = values if isinstance(values, jax.Array | np.ndarray) else np.asarray(values)
    if isinstance(values, jax.core.Tracer) or not jnp.issubdtype(values.dtype, jnp.floating) or not values.size:
        return values
    with jax.ensure_compile_time_eval():  # a constant can be looked at inside jit too
        sound = bool(jnp.all((values >= low) & (values <= high)))
    if not sound:
        values = np.asarray(values, np.float64)
        where = np.unravel_index(int((~((values >= low) & (values <= high))).argmax()), values.shape)
        wanted = "finite" if np.isinf(low) or high > 3e38 else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {wanted}; got {values[where]:g} at {tuple(map(int, where))}")
    return values


UNIT = (0.0, 1.0)
FINITE = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))


def _check(images: Array, T: int, name: str = "images") -> None:
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating, in [0, 1]; got dtype {images.dtype}")
    if T < 1:
        raise ValueError(f"T must be at least 1; got {T}")


def _unit(images: Array) -> Array:
    return jnp.clip(jnp.nan_to_num(images.astype(jnp.float32), nan=0.0), 0, 1)


def _counts(counts: Array, dtype) -> Array:
    """In `dtype`, which holds at most its largest value (bool: whether there was any spike)."""
    if jnp.issubdtype(dtype, jnp.integer):
        counts = jnp.minimum(counts, min(jnp.iinfo(dtype).max, 2**31 - 1))
    return counts.astype(dtype)


@_encoder("T", "dtype", images=FINITE)
def direct(images: Array, T: int, dtype=jnp.float32) -> Array:
    """The image itself at every step, for a first layer that turns it into spikes.

        out[t] = image

    Rathi and Roy 2020, https://arxiv.org/abs/2008.03658.
    """
    _check(images, T)
    return jnp.broadcast_to(images.astype(dtype), (T, *images.shape))


@_encoder("dtype", images=UNIT, rand=UNIT)
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


@_encoder("T", "dtype", images=UNIT)
def bernoulli(key: Array, images: Array, T: int, dtype=jnp.float32) -> Array:
    """Rate code: each step spikes with probability equal to the intensity, independently.

        s[t] ~ Bernoulli(image)   as   image > u[t],   u[t] uniform in [0, 1)

    A 0 never spikes, a 1 always does. It is `paper(images, jax.random.uniform(key, (T, *images.shape)))`.
    """
    _check(images, T)
    return paper(images, jax.random.uniform(key, (T, *images.shape)), dtype)


@_encoder("T", "dtype", images=UNIT, rate=(0.0, MOST))
def poisson(key: Array, images: Array, T: int, rate: Array | float = 1.0, dtype=jnp.float32) -> Array:
    """Rate code with counts: the number of spikes of a Poisson process in each step.

        n[t] ~ Poisson(rate * image)

    `rate` is in spikes a step at intensity 1, from 0 to 2^20; inside `jit` it is clipped to that. Counts may exceed 1: an
    integer dtype holds at most its largest value. For at most one spike a step give `bernoulli` the probability
    1 - exp(-rate * image). Heeger 2000, "Poisson model of spike generation".
    """
    _check(images, T)
    rate = jnp.clip(jnp.nan_to_num(jnp.asarray(rate, jnp.float32), nan=0.0), 0, MOST)
    return _counts(jax.random.poisson(key, rate * _unit(images), (T, *images.shape)), dtype)


def _at(steps: Array, T: int, dtype) -> Array:
    times = jnp.arange(T).reshape(T, *(1,) * steps.ndim)
    return (times == steps).astype(dtype)


@_encoder("T", "dtype", "curve", "silent_to", images=UNIT)
def latency(images: Array, T: int, *, curve: str = "linear", silent_to: float = 0.0, dtype=jnp.float32) -> Array:
    """Time-to-first-spike code: one spike a pixel, the brighter the earlier.

        linear   t = round((T - 1) (1 - image))
        log      t = round((T - 1) - ln(1 + (e^(T-1) - 1) image))

    Pixels of intensity <= `silent_to` do not spike; a negative one gives SpikingJelly's LatencyEncoder, where a 0
    spikes at the last step.
    """
    _check(images, T)
    images = _unit(images)
    if curve == "linear":
        steps = (T - 1) * (1 - images)
    elif curve == "log":  # ln(1 - image + e^(T-1) image), which does not overflow
        steps = (T - 1) - jnp.logaddexp(jnp.log1p(-images), (T - 1) + jnp.log(images))
    else:
        raise ValueError(f"curve must be 'linear' or 'log'; got {curve!r}")
    steps = jnp.where(images > silent_to, jnp.round(steps), T)
    return _at(steps, T, dtype)


def _check_signal(xs: Array, threshold: float) -> None:
    if xs.ndim < 1:
        raise ValueError(f"xs must be [T, ...]; got shape {xs.shape}")
    if not len(xs):
        raise ValueError(f"xs must have at least one step; got shape {xs.shape}")
    if not 0 < threshold < float("inf"):
        raise ValueError(f"threshold must be positive and finite; got {threshold}")


@_encoder("threshold", "two_sided", "dtype", xs=FINITE)
def delta(xs: Array, threshold: float, *, two_sided: bool = True, dtype=jnp.float32) -> Array:
    """Change code of a signal that already runs over time.

        on[t] = xs[t] - xs[t-1] >= threshold;   off[t] = xs[t-1] - xs[t] >= threshold;   xs[-1] = xs[0]

    xs [T, ...] gives [T, ..., 2], the last axis (on, off); without `two_sided`, on alone, [T, ...].
    snnTorch's spikegen.delta has the same steps, off as -1.
    """
    _check_signal(xs, threshold)
    step = jnp.diff(xs.astype(jnp.float32), axis=0, prepend=xs[:1].astype(jnp.float32))
    on, off = step >= threshold, -step >= threshold
    return (jnp.stack([on, off], -1) if two_sided else on).astype(dtype)


@dataclass(frozen=True)
class _Follower:
    """A neuron whose state follows the signal in whole steps: it puts out how many, upwards and downwards."""

    def init_state(self, shape):
        return jnp.zeros(shape, jnp.float32)

    def step(self, step, level, x):
        up, down = jnp.floor((x - level) / step), jnp.floor((level - x) / step)
        on, off = jnp.maximum(up, 0.0), jnp.maximum(down, 0.0)
        return level + step * (on - off), (on.astype(jnp.int32), off.astype(jnp.int32))


@_encoder("threshold", "two_sided", "dtype", xs=FINITE)
def level_crossing(xs: Array, threshold: float, *, two_sided: bool = True, dtype=jnp.float32) -> Array:
    """Change code that forgets nothing: a level follows the signal in steps of `threshold`, and each step is a spike.

        on[t] = max(0, floor((xs[t] - level[t-1]) / threshold));   off[t] = max(0, floor((level[t-1] - xs[t]) / threshold))
        level[t] = level[t-1] + threshold (on[t] - off[t]);   level[-1] = xs[0]

    xs [T, ...] gives [T, ..., 2], the last axis (on, off); without `two_sided`, on alone, [T, ...]. A slow change spikes here,
    and does not in `delta`. Counts may exceed 1. Also known as send-on-delta. Its loop over time is `snnfuse.unroll`. Miskowicz
    2006, https://doi.org/10.3390/s6010049.
    """
    _check_signal(xs, threshold)
    lanes = xs.reshape(len(xs), -1).astype(jnp.float32)
    (on, off), _ = unroll(_Follower(), jnp.float32(threshold), lanes[0], lanes)
    return _counts(jnp.stack([on, off], -1) if two_sided else on, dtype).reshape(*xs.shape, *(2,) * two_sided)


@_encoder("decay", "threshold", "dtype", xs=FINITE)
def lif(xs: Array, decay: float = 0.9, threshold: float = 1.0, dtype=jnp.float32) -> Array:
    """A LIF neuron on each value of a signal that already runs over time: [T, ...], at most one spike a step.

    u[t] = decay v[t-1] + xs[t];   s[t] = u[t] >= threshold;   v[t] = u[t] - threshold s[t];   v[-1] = 0
    """
    _check_signal(xs, threshold)
    lanes, params = xs.reshape(len(xs), -1), LIFParams(jnp.float32(decay), jnp.float32(threshold))
    spikes, _ = unroll(LIF(reset=SoftReset()), params, None, lanes.astype(jnp.float32))
    return spikes.reshape(xs.shape).astype(dtype)


@_encoder("T", "dtype", "neurons", "silent_to", images=UNIT)
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
    distance = (_unit(images)[..., None] - centres) * (1.5 * (neurons - 2))
    return latency(jnp.exp(-0.5 * distance**2), T, silent_to=silent_to, dtype=dtype)


@_encoder("T", "dtype", "bits", images=UNIT)
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
    q = jnp.clip(jnp.floor(_unit(images) * top), 0, top - 1).astype(jnp.int32)
    shift = bits - 1 - jnp.arange(T, dtype=jnp.int32) % bits
    return ((q >> shift.reshape(T, *(1,) * q.ndim)) & 1).astype(dtype)


def phase_weights(T: int, bits: int = 8) -> Array:
    """[T], the weight of a spike at each step of a phase code: 2^-(1 + t mod bits)."""
    return 2.0 ** -(1.0 + jnp.arange(T) % bits)
