"""Spyx: `nn.run` of `nn.LIF`. No hard reset: it subtracts the threshold, a step late, so it is compared with that neuron."""

import jax.numpy as jnp
from flax import nnx

from adapters import not_needed

not_needed("grain", "grain.python", "h5py")

import spyx  # noqa: E402
import spyx.axn  # noqa: E402
import spyx.nn  # noqa: E402

SIDE = "jax"
REFERENCE = "late"
ATAN = spyx.axn.custom(lambda u: 1 / (1 + (jnp.pi * u) ** 2))  # its own arctan has another slope


def version():
    return spyx.__version__


def lif(way, dtype):
    def run(xs):
        layer = spyx.nn.LIF(xs.shape[2:], beta=0.5, activation=ATAN, rngs=nnx.Rngs(0))
        return spyx.nn.run(layer, xs)[0]

    return run


def readout(way):
    return lambda xs: spyx.nn.run(spyx.nn.LI(xs.shape[2:], beta=0.9, rngs=nnx.Rngs(0)), xs)[0]
