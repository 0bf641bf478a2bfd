"""Readouts: one value per neuron from its whole sequence, [T, *B, N] -> [*B, N].

If the sequences of a batch end at different steps, give `Padded`, or `lengths` [B]: their numbers of steps, integers from 1 to T. Then a
readout is what it would be for each sequence alone, whatever follows its end. B is the first axis after T. A length of 0 raises
ValueError. Inside of `jit`, where there is no value to look at, its readout is NaN, and so is the loss.
"""

import jax
import jax.numpy as jnp
from jax import Array

from snnfuse.nn.padded import Padded, real_steps, split
from snnfuse.nn.spikes import Spikes, values


def _steps(name: str, sequence: Array | Spikes | Padded, lengths: Array | None) -> tuple[Array, Array | None]:
    sequence, lengths = split(sequence, lengths)
    sequence = jnp.asarray(values(sequence))
    if not sequence.ndim or not len(sequence):
        raise ValueError(f"{name} must be [T, *B, N] with T >= 1; got shape {sequence.shape}")
    return sequence, lengths


def _mean(x, lengths):
    """The mean over the real steps, in float32."""
    if (real := real_steps(lengths, x.shape)) is None:
        return jnp.mean(x, axis=0, dtype=jnp.float32)
    # a select and no product: what follows the end may be infinite
    return jnp.sum(jnp.where(real, x, jnp.zeros((), x.dtype)), axis=0, dtype=jnp.float32) / real.sum(0)


def spike_rate(spikes: Array | Spikes | Padded, lengths: Array | None = None) -> Array:
    """Spikes per step, in float32; the spikes may have any dtype, bool and int8 too.

    An unsigned integer above 1 is no spike, but a word of a `Packed` output: it raises ValueError, and inside of `jit`, where
    there is no value to look at, its rate is NaN.
    """
    x, lengths = _steps("spikes", spikes, lengths)
    rate = _mean(x, lengths)
    if not jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return rate
    words = jnp.max(x, axis=0) > 1
    if not isinstance(words, jax.core.Tracer) and words.any():
        raise ValueError(
            f"spikes in {x.dtype} must be 0 or 1; got {x.max()}. Unpack a Packed output with snnfuse.unpack(words, T); "
            "cast counts to float32"
        )
    return jnp.where(words, jnp.nan, rate)


def membrane_mean(v: Array | Padded, lengths: Array | None = None) -> Array:
    """The mean of v over T, in float32."""
    return _mean(*_steps("v", v, lengths))


def membrane_max(v: Array | Padded, lengths: Array | None = None) -> Array:
    """The largest v over T."""
    v, lengths = _steps("v", v, lengths)
    if (real := real_steps(lengths, v.shape)) is None:
        return jnp.max(v, axis=0)
    return _nan_without_steps(jnp.max(jnp.where(real, v, v[:1]), axis=0), real)


def membrane_last(v: Array | Padded, lengths: Array | None = None) -> Array:
    """v at the last step."""
    v, lengths = _steps("v", v, lengths)
    if (real := real_steps(lengths, v.shape)) is None:
        return v[-1]
    last = jnp.broadcast_to(jnp.maximum(real.sum(0, keepdims=True) - 1, 0), (1, *v.shape[1:]))
    return _nan_without_steps(jnp.take_along_axis(v, last, axis=0)[0], real)


def _nan_without_steps(outs, real):
    return jnp.where(real[0], outs, jnp.nan)
