"""The first state of every neuron of a paper."""

import jax.numpy as jnp


def zeros(kind, shape):
    return kind(*(jnp.zeros(shape, jnp.float32) for _ in kind._fields))
