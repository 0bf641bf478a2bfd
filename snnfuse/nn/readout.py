"""Readouts: one value per neuron from its whole sequence, [T, *B, N] -> [*B, N]."""

import jax.numpy as jnp
from jax import Array

from snnfuse.nn.spikes import Spikes, values


def spike_rate(spikes: Array | Spikes) -> Array:
    """Spikes per step, in float32; the spikes may have any dtype, bool and int8 too."""
    return jnp.mean(values(spikes), axis=0, dtype=jnp.float32)


def membrane_mean(v: Array) -> Array:
    """The mean of v over T, in float32."""
    return jnp.mean(v, axis=0, dtype=jnp.float32)


def membrane_max(v: Array) -> Array:
    """The largest v over T."""
    return jnp.max(v, axis=0)


def membrane_last(v: Array) -> Array:
    """v at the last step."""
    return v[-1]
