"""Audio on the device: recordings to mel bands over time, and random changes of both. Pure and jitted, for the training step.

A recording is `sound` [*B, n]: n samples at `rate` hertz, int16 (divided by 2^15 here) or floating in [-1, 1]. Bands come time
first, [T, *B, bands]. `encoders.level_crossing`, `encoders.lif` and `encoders.delta` turn bands into spikes.

    bands = audio.loudness(audio.log_mel(sound, 8000))      # in [0, 1]
    spikes = encoders.level_crossing(bands, 0.1)            # [T, *B, bands, 2]
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from snnfuse.data.draws import beta_share
from snnfuse.data.events import at_least


def _number(name: str, value: float, low: float = 0.0, above: bool = False) -> float:
    """The number. Raises ValueError if it is not finite, below `low`, or equal to it where it must be above."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not (low < value if above else low <= value) or not value < 1e30:
        raise ValueError(f"{name} must be {'above' if above else 'at least'} {low:g} and finite; got {value}")
    return float(value)


def _check(name: str, array: Array, axes: str) -> Array:
    array = jnp.asarray(array)
    if array.ndim != axes.count(",") + 1 or not array.size:
        raise ValueError(f"{name} must be [{axes}], each at least 1; got shape {array.shape}")
    return array


def mel_filters(rate: float, window: int, bands: int = 40, low: float = 0.0, high: float | None = None) -> np.ndarray:
    """Triangles that are equally wide on the mel scale, [window // 2 + 1, bands], for the power of a Fourier transform.

        mel(f) = 2595 log10(1 + f / 700);   p[0] .. p[bands + 1] equally spaced in mel from `low` to `high`
        M[f, k] = max(0, min((f - p[k]) / (p[k+1] - p[k]), (p[k+2] - f) / (p[k+2] - p[k+1])))

    f and p in hertz; `high` is rate / 2 by default. O'Shaughnessy 1987, "Speech communication"; the same as torchaudio's
    melscale_fbanks and as librosa's filters.mel with htk=True and norm=None.
    """
    window, bands = at_least("window", window, 2), at_least("bands", bands, 1)
    _, p = _mel_places(rate, bands, low, high)
    f = np.arange(window // 2 + 1)[:, None] * (rate / window)
    rise, fall = (f - p[:-2]) / (p[1:-1] - p[:-2]), (p[2:] - f) / (p[2:] - p[1:-1])
    filters = np.maximum(0, np.minimum(rise, fall))
    if len(empty := np.flatnonzero(filters.max(0) == 0)):
        raise ValueError(
            f"band {empty[0]} of {bands} has no frequency of a window of {window} samples: use fewer bands, a longer window, "
            f"or a higher low"
        )
    return filters.astype(np.float32)


def _mel_places(rate, bands, low, high) -> tuple[np.ndarray, np.ndarray]:
    """p[0] .. p[bands + 1], in mel and in hertz."""
    rate, low = _number("rate", rate, above=True), _number("low", low)
    high = rate / 2 if high is None else _number("high", high)
    if not low < high <= rate / 2:
        raise ValueError(f"low and high must be 0 <= low < high <= rate / 2 = {rate / 2:g}; got {low:g} and {high:g}")
    mel = np.linspace(*(2595 * np.log10(1 + np.array([low, high]) / 700)), bands + 2)
    return mel, 700 * (10 ** (mel / 2595) - 1)


def samples(sound: Array) -> Array:
    """The samples in float32; int16 becomes [-1, 1)."""
    sound = jnp.asarray(sound)
    if sound.dtype == jnp.int16:
        return sound.astype(jnp.float32) / 2**15
    if not jnp.issubdtype(sound.dtype, jnp.floating):
        raise TypeError(f"sound must be int16 or floating; got {sound.dtype}")
    return sound.astype(jnp.float32)


@partial(jax.jit, static_argnames=("rate", "window", "hop", "bands", "low", "high", "floor"))
def log_mel(
    sound: Array,
    rate: float,
    *,
    window: int = 256,
    hop: int = 80,
    bands: int = 40,
    low: float = 0.0,
    high: float | None = None,
    floor: float = 1e-6,
) -> Array:
    """The log of the power in mel bands, float32 [T, *B, bands], T = 1 + (n - window) // hop.

        out[t, k] = ln(floor + sum_f |F[t, f]|^2 M[f, k])
        F[t, f] = sum_j hann[j] sound[t hop + j] exp(-2 pi i f j / window);   hann[j] = sin(pi j / window)^2

    M is `mel_filters`. Davis and Mermelstein 1980, https://doi.org/10.1109/TASSP.1980.1163420.
    """
    sound, n = samples(sound), np.shape(sound)[-1] if np.ndim(sound) else 0
    window, hop, floor = at_least("window", window, 2), at_least("hop", hop, 1), _number("floor", floor, above=True)
    if not window <= n:
        raise ValueError(f"window must be at most the {n} samples of sound [*B, n]; got {window}")
    steps = 1 + (n - window) // hop
    frames = sound[..., np.arange(steps)[:, None] * hop + np.arange(window)]  # [*B, T, window]
    hann = np.sin(np.pi * np.arange(window) / window).astype(np.float32) ** 2
    spectrum = jnp.fft.rfft(frames * hann)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    filters = mel_filters(rate, window, bands, low, high)
    return jnp.moveaxis(jnp.log(floor + jnp.matmul(power, filters, precision="highest")), -2, 0)


def steps(length: Array, window: int, hop: int) -> Array:
    """How many windows of `log_mel` lie inside of recordings of `length` samples, at least 1: integers like `length`."""
    return jnp.maximum(1, 1 + (jnp.asarray(length) - window) // hop)


@partial(jax.jit, static_argnames=("range",))
def loudness(bands: Array, range: float = 7.0) -> Array:
    """Log bands [T, *B, K] in [0, 1]: 1 is the loudest place of a recording, 0 is `range` below it, or lower.

        out = max(0, 1 - (max(bands) - bands) / range)

    `range` in nepers of power: 7 is 30 dB. The maximum is over the whole recording, T and K: it takes the recording's gain out.
    """
    bands, range = jnp.asarray(bands), _number("range", range, above=True)
    if bands.ndim < 2 or not bands.size or not jnp.issubdtype(bands.dtype, jnp.floating):
        raise ValueError(f"bands must be floating [T, *B, K], each at least 1; got {bands.dtype} {bands.shape}")
    top = bands.max((0, -1), keepdims=True)
    return jnp.maximum(0, 1 - (top - bands) / range)


@partial(jax.jit, static_argnames=("part",))
def centre(bands: Array, part: float = 1.0) -> Array:
    """Bands [T, *B, K] less the spectrum of their recording, which takes out what a microphone or a voice adds to all steps.

        out[t, k] = bands[t, k] - part m[k];   m[k] = sum_t w[t] bands[t, k] / sum_t w[t];   w[t] = (mean_k bands[t, k])^2

    Loud steps count more, so that silence after a word does not matter. `part` in [0, 1]. Atal 1974, "Effectiveness of linear
    prediction characteristics of the speech wave for automatic speaker identification and verification" (cepstral means).
    """
    bands, part = jnp.asarray(bands), _number("part", part)
    if bands.ndim < 2 or not bands.size or not jnp.issubdtype(bands.dtype, jnp.floating):
        raise ValueError(f"bands must be floating [T, *B, K], each at least 1; got {bands.dtype} {bands.shape}")
    if part > 1:
        raise ValueError(f"part must be in [0, 1]; got {part}")
    w = jnp.square(bands.mean(-1, keepdims=True, dtype=jnp.float32))
    mean = (bands * w).sum(0, keepdims=True) / jnp.maximum(w.sum(0, keepdims=True), 1e-30)
    return bands - part * mean


@partial(jax.jit, static_argnames=("steps", "quiet"))
def fit(bands: Array, steps: int, quiet: float = 0.3) -> Array:
    """The part of each recording [T, B, K] from its first to its last loud step, played so fast that it takes `steps` steps.

        out[t, k] = bands[a + t (b - a) / (steps - 1), k], linearly interpolated

    a and b are the first and the last step with a band above `quiet`. So words of fast and of slow speakers get equally long.
    A recording without such a step is taken whole.
    """
    bands, steps = _check("bands", bands, "T, B, K"), at_least("steps", steps, 2)
    loud = bands.max(-1) > _number("quiet", quiet)
    first, last = loud.argmax(0), len(bands) - 1 - loud[::-1].argmax(0)
    part = np.arange(steps, dtype=np.float32) / (steps - 1)
    return _interpolated(bands, first[:, None] + (last - first)[:, None] * part, 0)


@partial(jax.jit, static_argnames=("count",))
def envelope(bands: Array, count: int) -> Array:
    """Bands [..., K] made of their first `count` cosines: the shape of the mouth, without the harmonics of the voice.

        out = C^T C bands;   C[i, k] = a[i] cos(pi i (k + 1/2) / K), i < count;   a[0] = sqrt(1 / K), else sqrt(2 / K)

    C bands is the mel cepstrum. Davis and Mermelstein 1980, https://doi.org/10.1109/TASSP.1980.1163420.
    """
    bands, count = jnp.asarray(bands), at_least("count", count, 1)
    if not bands.ndim or count > (K := bands.shape[-1]):
        raise ValueError(f"count must be at most the number of bands, the last axis; got {count} for {bands.shape}")
    C = np.cos(np.pi / K * np.arange(count)[:, None] * (np.arange(K) + 0.5)) * np.sqrt(2 / K)
    C[0] = np.sqrt(1 / K)
    return jnp.matmul(bands, (C.T @ C).astype(np.float32), precision="highest")


@partial(jax.jit, static_argnames=("most",))
def shift(key: Array, sound: Array, most: int) -> Array:
    """Each recording of [B, n] starts up to `most` samples later, or earlier; silence comes in."""
    sound, most = _check("sound", sound, "B, n"), at_least("most", most, 0)
    B, n = sound.shape
    start = jax.random.randint(key, (B,), 0, 2 * most + 1)
    padded = jnp.pad(sound, ((0, 0), (most, most)))
    return jax.vmap(lambda one, at: jax.lax.dynamic_slice(one, (at,), (n,)))(padded, start)


@partial(jax.jit, static_argnames=("most",))
def speed(key: Array, sound: Array, most: float) -> Array:
    """Each recording of [B, n] is played faster or slower by a random factor, which moves its pitch too: float32 [B, n].

        out[i] = sound[factor i], linearly interpolated;   ln(factor) uniform in -ln(1 + most) .. ln(1 + most)

    Ko et al. 2015, "Audio augmentation for speech recognition".
    """
    sound = samples(_check("sound", sound, "B, n"))
    (B, n), top = sound.shape, float(np.log1p(_number("most", most)))
    factor = jnp.exp(jax.random.uniform(key, (B, 1), minval=-top, maxval=top))
    return jax.vmap(lambda at, one: jnp.interp(at, np.arange(n, dtype=np.float32), one, right=0.0))(
        factor * np.arange(n, dtype=np.float32), sound
    )


@partial(jax.jit, static_argnames=("low", "high"))
def noise(key: Array, sound: Array, low: float, high: float) -> Array:
    """White noise on each recording of [B, n], `low` to `high` decibels below its loudest sample: float32 [B, n]."""
    level, draw = jax.random.split(key)
    sound = samples(_check("sound", sound, "B, n"))
    if not _number("low", low, -100) <= _number("high", high, -100):
        raise ValueError(f"low must be at most high; got {low} and {high} decibels")
    decibels = jax.random.uniform(level, (len(sound), 1), minval=low, maxval=high)
    scale = jnp.abs(sound).max(-1, keepdims=True) * 10 ** (-decibels / 20)
    return sound + scale * jax.random.normal(draw, sound.shape)


@partial(jax.jit, static_argnames=("alpha",))
def mixup(key: Array, sound: Array, targets: Array, alpha: float = 0.3) -> tuple[Array, Array]:
    """Recordings [B, n] and targets [B, classes], mixed in pairs, each pair with a share of its own: float32.

        share ~ Beta(alpha, alpha);   sound = share sound_1 + (1 - share) sound_2;   the same for targets

    The partner is the recording at the same place from the end of the batch, so batches must be shuffled. Zhang et al. 2018,
    https://arxiv.org/abs/1710.09412.
    """
    sound, alpha = samples(_check("sound", sound, "B, n")), _number("alpha", alpha, above=True)
    if targets.ndim != 2 or len(targets) != len(sound):
        raise ValueError(f"targets must be [B, classes], B = {len(sound)}; got shape {targets.shape}")
    share = beta_share(key, alpha, (len(sound), 1))
    return share * sound + (1 - share) * sound[::-1], share * targets + (1 - share) * targets[::-1]


@partial(jax.jit, static_argnames=("steps", "pitch"))
def stretch(key: Array, bands: Array, steps: float = 0.0, pitch: float = 0.0) -> Array:
    """Bands [T, B, K], each recording slower or faster by up to the part `steps`, and moved by up to `pitch` bands.

        out[t, k] = bands[factor t, k + p], linearly interpolated;   ln(factor) uniform in -ln(1 + steps) .. ln(1 + steps)

    Outside of the recording the last place is repeated. Unlike `speed`, it changes tempo and pitch on their own.
    """
    bands, steps, pitch = _check("bands", bands, "T, B, K"), _number("steps", steps), _number("pitch", pitch)
    T, B, K = bands.shape
    tempo, move = jax.random.split(key)
    top = float(np.log1p(steps))
    at = jnp.exp(jax.random.uniform(tempo, (B, 1), minval=-top, maxval=top)) * np.arange(T, dtype=np.float32)
    to = jax.random.uniform(move, (B, 1), minval=-pitch, maxval=pitch) + np.arange(K, dtype=np.float32)
    return _interpolated(_interpolated(bands, at, 0), to, -1)


@partial(jax.jit, static_argnames=("most", "rate", "low", "high"))
def warp(key: Array, bands: Array, most: float, rate: float, *, low: float = 0.0, high: float | None = None) -> Array:
    """Bands [T, B, K] of `log_mel`, each recording as if of a speaker with a longer or a shorter vocal tract.

        out[t, k] = bands at the frequency factor f[k];   ln(factor) uniform in -ln(1 + most) .. ln(1 + most)

    f[k] is the middle of band k; between the middles it interpolates linearly. `rate`, `low` and `high` are those of `log_mel`.
    Jaitly and Hinton 2013, "Vocal tract length perturbation (VTLP) improves speech recognition".
    """
    bands, top = _check("bands", bands, "T, B, K"), float(np.log1p(_number("most", most)))
    _, B, K = bands.shape
    mel, p = _mel_places(rate, K, low, high)
    factor = jnp.exp(jax.random.uniform(key, (B, 1), minval=-top, maxval=top))
    at = 2595 * jnp.log10(1 + factor * p[1:-1].astype(np.float32) / 700)
    return _interpolated(bands, (at - mel[1]) / (mel[1] - mel[0]), -1)


def _interpolated(bands, at, axis):
    """bands [T, B, K] at the places `at` [B, T or K] of time (axis 0) or of bands (axis -1)."""
    size = bands.shape[axis]
    at = jnp.clip(at, 0, size - 1)
    low = jnp.minimum(jnp.floor(at), max(size - 2, 0)).astype(jnp.int32)
    part = at - low
    if axis == 0:
        low, part = low.T[:, :, None], part.T[:, :, None]
    else:
        low, part = low[None], part[None]
    take = lambda i: jnp.take_along_axis(bands, jnp.minimum(i, size - 1), axis)
    return (1 - part) * take(low) + part * take(low + 1)


@partial(jax.jit, static_argnames=("steps", "width", "count"))
def mask(key: Array, bands: Array, steps: int = 0, width: int = 0, count: int = 1) -> Array:
    """Bands [T, B, K] with random stretches set to 0: in each recording `count` of up to `steps` steps, and of up to `width` bands.

    Park et al. 2019, "SpecAugment", https://arxiv.org/abs/1904.08779.
    """
    bands, count = _check("bands", bands, "T, B, K"), at_least("count", count, 0)
    T, B, K = bands.shape
    for most, axis, size in ((at_least("steps", steps, 0), 0, T), (at_least("width", width, 0), 2, K)):
        for _ in range(count if most else 0):
            key, long, start = jax.random.split(key, 3)
            length = jax.random.randint(long, (B,), 0, min(most, size) + 1)
            first = jnp.floor(jax.random.uniform(start, (B,)) * (size - length + 1)).astype(jnp.int32)
            place = jnp.arange(size)[:, None]
            hidden = (place >= first) & (place < first + length)  # [size, B]
            bands = jnp.where(hidden[:, :, None] if axis == 0 else hidden.T[None], 0, bands)
    return bands
