"""Eligibility propagation (e-prop) for a convolution: one trace for each input, which all positions and weights share.

        e[p, k, t] = psi[p, t] a[p + k, t];   a[t] = decay a[t-1] + x[t];   dW[k] = sum over p, t of L[p, t] e[p, k, t]

p: the position of a neuron, k: a weight of the kernel, psi: the derivative of its spike by its input within the step, L: the learning
signal. The product holds if dv[t]/dv[t-1] is the same number for all neurons: LIF, IF or LI whose reset is soft and has no gradient. An
adaptive neuron, a hard reset or a filter of e (`decay_out` of `Eprop`) would need a trace for each weight at each position, as many as
the products of a step: for these, write the convolution as an `Eprop` with a dense kernel. Bellec et al. 2020,
https://doi.org/10.1038/s41467-020-17236-y.
"""

from flax import nnx
from jax import Array

from snnfuse.core.neuron import PyTree
from snnfuse.core.neurons import LI
from snnfuse.core.reset import NoReset, SoftReset
from snnfuse.nn.spikes import Spikes, values
from snnfuse.nn.spiking import Spiking
from snnfuse.nn.temporal import Temporal
from snnfuse.online.ottt import Traced, _decay
from snnfuse.online.sltt import Instant


class EpropConv(Temporal):
    """A convolution and its neurons that learn by e-prop: xs [T, B, *space, I] -> (spikes [T, B, *space', O], state).

    The gradient of the kernel is the module's equation; that of xs is the one within a step. It equals backpropagation through time for
    this layer alone. The trace and the neurons run in fused kernels.

    Args:
      layer: `nn.Conv`, `nnx.Conv`, `nn.Linear` or `nnx.Linear`, without a bias.
      neuron: `nn.LIF`, `IF` or `LI` with one decay that is not trained, and `SoftReset(detach=True)` or `NoReset()`.
    """

    def __init__(self, layer: nnx.Conv | nnx.Linear, neuron: Spiking):
        if not isinstance(neuron, Spiking):
            raise TypeError(f"neuron must be a module such as nn.LIF(tau=2.0); got {neuron!r}")
        decay, reset = _decay(neuron), getattr(neuron.neuron, "reset", None)
        if not (isinstance(neuron.neuron, LI) or reset in (NoReset(), SoftReset(detach=True))):
            raise NotImplementedError(
                f"neuron must have reset SoftReset(detach=True) or NoReset(), so that one trace for each input suffices; got {reset}"
            )
        self.traced, self.neuron = Traced(layer, decay), nnx.clone(neuron)
        if layer.bias is not None:
            raise ValueError("layer must have no bias: use_bias=False")
        self.neuron.neuron = Instant(neuron.neuron)

    def init_state(self, xs: Array | Spikes) -> tuple[Array, PyTree]:
        xs = values(xs, "EpropConv")
        currents, _ = nnx.eval_shape(lambda traced, xs: traced(xs), self.traced, xs)
        return self.traced.init_state(xs), self.neuron.init_state(currents)

    def __call__(self, xs: Array | Spikes, state: tuple | None = None) -> tuple[Array, tuple]:
        xs = values(xs, "EpropConv")
        trace, before = (None, None) if state is None else state
        currents, trace = self.traced(xs, trace)
        outs, after = self.neuron(currents, before)
        return outs, (trace, after)
