"""jaxpike: `unroll` of `LIF`. It scales its input (fed twice as much), spikes at u > threshold, and rounds the decay.

Ways: "unroll", and "remat", which computes a step again in the backward pass.
"""

import math

import jaxpike

SIDE = "jax"
REFERENCE = "above"


def version():
    return jaxpike.__version__


def lif(way, dtype):
    layer = jaxpike.LIF(1 / math.log(2), reset="zero", surrogate=jaxpike.ATan())
    return lambda xs: jaxpike.unroll(layer, 2 * xs, remat_step=way == "remat")[0]


def readout(way):
    layer = jaxpike.LeakyIntegrator(-1 / math.log(0.9))
    return lambda xs: jaxpike.unroll(layer, 10 * xs, remat_step=way == "remat")[0]
