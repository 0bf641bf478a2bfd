"""sparx (`pip install sparxml`): its Flax layers. A way is the number of steps in one iteration of its loop.

What it imports sets XLA's --xla_allow_excess_precision=false, in its own process alone, as its users have it.
"""

import math

import sparx

SIDE = "jax"
REFERENCE = "lif"


def version():
    return sparx.__version__


def lif(way, dtype):
    layer = sparx.nn.LIF(tau=1 / math.log(2), reset="zero", unroll=int(way.removeprefix("unroll ")))
    return lambda xs: layer.apply({}, xs)


def readout(way):
    layer = sparx.nn.LI(tau=-1 / math.log(0.9), unroll=int(way.removeprefix("unroll ")))
    return lambda xs: layer.apply({}, xs)
