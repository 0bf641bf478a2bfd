"""Readouts: one value per neuron from its whole sequence, [T, *B, N] -> [*B, N]."""

import jax
import jax.numpy as jnp
from jax import Array

from snnfuse.nn.spikes import Spikes, values


def _steps(name: str, sequence: Array | Spikes) -> Array:
    sequence = jnp.asarray(values(sequence))
    if not sequence.ndim or not len(sequence):
        raise ValueError(f"{name} must be [T, *B, N] with T >= 1; got shape {sequence.shape}")
    return sequence


def spike_rate(spikes: Array | Spikes) -> Array:
    """Spikes per step, in float32; the spikes may have any dtype, bool and int8 too.

    An unsigned integer above 1 is no spike, but a word of a `Packed` output: it raises ValueError, and inside of `jit`, where
    there is no value to look at, its rate is NaN.
    """
    x = _steps("spikes", spikes)
    rate = jnp.mean(x, axis=0, dtype=jnp.float32)
    if not jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return rate
    words = jnp.max(x, axis=0) > 1
    if not isinstance(words, jax.core.Tracer) and words.any():
        raise ValueError(
            f"spikes in {x.dtype} must be 0 or 1; got {x.max()}. Unpack a Packed output with snnfuse.unpack(words, T); "
            "cast counts to float32"
        )
    return jnp.where(words, jnp.nan, rate)


def membrane_mean(v: Array) -> Array:
    """The mean of v over T, in float32."""
    return jnp.mean(_steps("v", v), axis=0, dtype=jnp.float32)


def membrane_max(v: Array) -> Array:
    """The largest v over T."""
    return jnp.max(_steps("v", v), axis=0)


def membrane_last(v: Array) -> Array:
    """v at the last step."""
    return _steps("v", v)[-1]
