"""snnTorch's neurons with their own reset, for `snnfuse.unroll`, `snnfuse.nn.Spiking` and NIR files of snnTorch.

snnTorch 1.0 resets at the start of the next step and keeps the reset out of the gradient:

    R[t] = v[t-1] >= threshold, a constant in the gradient
    u[t] = decay v[t-1] + x[t] - R[t] threshold;   s[t] = u[t] >= threshold
    v[t] = u[t]                              with reset_delay
    v[t] = u[t] - (s[t] - R[t]) threshold    without

The state v is the membrane that snnTorch returns. Every gradient is snnTorch's: of x, of the first v, of decay and threshold.
Without the delay this equals `SoftReset()` only while v[t-1] < threshold. snnTorch clamps a decay to [0, 1] in each step;
here the parameter itself must stay there. snnTorch spikes above the threshold, not at it; on continuous
inputs this makes no difference.
For `Leaky` with reset_mechanism="zero" use `HardReset(detach=True)` if the reset is delayed, and `HardReset()` if it is not.

    layer = nn.Spiking(snntorch.Leaky(), sf.LIFParams(decay=0.9))      # snn.Leaky(beta=0.9)
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from snnfuse.core.neurons import CubaLIFParams, CubaLIFState, LIFParams, LIFState
from snnfuse.core.surrogate import ATan, Surrogate, spike

__all__ = ["Leaky", "Synaptic"]


@dataclass(frozen=True)
class Leaky:
    """snnTorch's Leaky with reset_mechanism="subtract". Its parameters are `LIFParams`, its state is `LIFState`."""

    reset_delay: bool = True
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return LIFState(jnp.zeros(shape, jnp.float32))

    def step(self, params: LIFParams, state: LIFState, x: Array):
        v, s = _fire(self, state.v, params.decay * state.v + x, params.threshold)
        return LIFState(v), s


@dataclass(frozen=True)
class Synaptic:
    """snnTorch's Synaptic, "subtract": i[t] = decay_syn i[t-1] + x[t], and `Leaky` of i. `CubaLIFParams`, `CubaLIFState`."""

    reset_delay: bool = True
    surrogate: Surrogate = ATan()

    def init_state(self, shape):
        return CubaLIFState(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

    def step(self, params: CubaLIFParams, state: CubaLIFState, x: Array):
        i = params.decay_syn * state.i + x
        v, s = _fire(self, state.v, params.decay * state.v + i, params.threshold)
        return CubaLIFState(i, v), s


def _fire(neuron, before, charged, threshold):
    reset = (before - threshold >= 0).astype(before.dtype)  # a comparison has no gradient
    u = charged - reset * threshold
    s = spike(u - threshold, neuron.surrogate)
    return (u if neuron.reset_delay else u - (s - reset) * threshold), s
