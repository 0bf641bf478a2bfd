"""The neurons of the benchmarks: the library's, one that a user could write, and those that compute what other libraries do."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

import snnfuse as sf
from snnfuse import papers
from snnfuse.core.compose import Affine, AffineParams

ABOVE = float(np.nextafter(np.float32(1), np.float32(2)))  # u > 1 is u >= ABOVE
number = jnp.float32


@dataclass(frozen=True)
class Resonator:
    """A damped oscillator that spikes, and inhibits itself by a trace of its spikes."""

    def init_state(self, shape):
        return jnp.zeros(shape, number), jnp.zeros(shape, number)

    def step(self, params, state, x):
        v, trace = state
        u = params["decay"] * v - 0.3 * trace + params["gain"] * x
        s = sf.spike(u - 1.0, sf.FastSigmoid())
        return (u * (1 - s), params["decay"] * trace + u * 0.1 + s), s


@dataclass(frozen=True)
class Late:
    """Spyx's LIF: it spikes one step after the membrane passed the threshold, and subtracts 1 then."""

    def init_state(self, shape):
        return jnp.zeros(shape, number)

    def step(self, params, v, x):
        s = sf.spike(v - ABOVE, sf.ATan())
        return 0.5 * v + x - s, s


NEURONS = {  # name: (neuron, params); arrays among the params get gradients
    "lif": (sf.LIF(), sf.LIFParams()),
    "lif learned tau": (sf.LIF(), sf.LIFParams(number(0.5))),
    "lif learned": (sf.LIF(), sf.LIFParams(jnp.linspace(0.3, 0.8, 64), jnp.linspace(0.8, 1.2, 64))),  # for each channel
    "normalised lif": (
        Affine(sf.LIF()),
        AffineParams(sf.LIFParams(), (jnp.linspace(0.5, 1.5, 64),), jnp.linspace(-0.1, 0.1, 64)),
    ),
    "adaptive lif": (sf.AdaptiveLIF(), sf.AdaptiveLIFParams(*map(number, (0.9, 0.95, 0.2, 1.0)))),
    "constant adaptive lif": (sf.AdaptiveLIF(), sf.AdaptiveLIFParams(0.9, 0.95, 0.2, 1.0)),
    "izhikevich": (sf.Izhikevich(), sf.IzhikevichParams()),
    "own neuron": (Resonator(), dict(decay=number(0.8), gain=number(1.0))),
    "above": (sf.LIF(), sf.LIFParams(threshold=ABOVE)),
    "above, reset detached": (sf.LIF(reset=sf.HardReset(detach=True)), sf.LIFParams(threshold=ABOVE)),
    "above, super": (sf.LIF(surrogate=sf.FastSigmoid(1.0)), sf.LIFParams(threshold=ABOVE)),
    "late": (Late(), ()),
}
PAPERS = "AdLIF SEAdLIF RF BRF TCLIF GLIF CLIF KLIF QuadraticIF ILIF TernaryLIF".split()
NEURONS |= {name: (getattr(papers, name)(), getattr(papers, f"{name}Params")()) for name in PAPERS}
SCALE = dict(
    izhikevich=20.0, AdLIF=12.0, SEAdLIF=12.0, RF=25.0, BRF=100.0, TCLIF=0.4, KLIF=2.5, QuadraticIF=2.0
)  # of the input
