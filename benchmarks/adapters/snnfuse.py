"""snnfuse: a way is an `implementation`. Here are also the neurons that the other libraries' are compared with."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

import snnfuse as sf

SIDE = "jax"
REFERENCE = "lif"
ABOVE = float(np.nextafter(np.float32(1), np.float32(2)))  # u > 1 is u >= ABOVE


@dataclass(frozen=True)
class Late:
    """Spyx's LIF: it spikes a step after the membrane passed the threshold, and subtracts what then has not leaked."""

    def init_state(self, shape):
        return jnp.zeros(shape, jnp.float32)

    def step(self, params, v, x):
        s = sf.spike(v - ABOVE, sf.ATan())
        return 0.5 * v + x - s, s


NEURONS = {
    "lif": (sf.LIF(), sf.LIFParams()),
    "above": (sf.LIF(), sf.LIFParams(threshold=ABOVE)),
    "above, reset detached": (sf.LIF(reset=sf.HardReset(detach=True)), sf.LIFParams(threshold=ABOVE)),
    "above, super": (sf.LIF(surrogate=sf.FastSigmoid(1.0)), sf.LIFParams(threshold=ABOVE)),
    "late": (Late(), ()),
}


def version():
    return sf.__version__


def unroll(neuron, xs, implementation="scan"):
    return sf.unroll(*neuron, None, xs, implementation=implementation)[0]


def lif(way, dtype):
    return lambda xs: unroll(NEURONS["lif"], xs, way)


def readout(way):
    return lambda xs: unroll((sf.LI(), sf.LIParams(0.9)), xs, way)


def resnet(way, dtype, T, B, size):
    import resnet

    step, state = resnet.training(resnet.build(way, 18, dtype))
    return step, state, list(resnet.batches(T, B, size, 2)), resnet.timed
