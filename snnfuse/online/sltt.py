"""Spatial learning through time (SLTT): the gradient of a step passes through the layers, and never to an earlier step.

        u[t] = decay v[t-1] + W s[t],   dW = sum_t d[t] s[t]^T,   d[t] = dL[t]/du[t] with v[t-1] held constant

Meng et al. 2023, https://arxiv.org/abs/2302.14311.
"""

from dataclasses import dataclass
from typing import TypeVar

from flax import nnx
from jax import lax

from snnfuse.core.neuron import Neuron
from snnfuse.nn.delay import Delay, DelayedLinear
from snnfuse.nn.psn import PSN, SlidingPSN
from snnfuse.nn.recurrent import Feedback, Recurrent
from snnfuse.nn.spiking import Spiking
from snnfuse.nn.time_conv import TimeConv
from snnfuse.online.eprop import Eprop

ACROSS_STEPS = (Recurrent, Feedback, Delay, DelayedLinear, TimeConv, PSN, SlidingPSN, Eprop)
Model = TypeVar("Model", bound=nnx.Module)


@dataclass(frozen=True)
class Instant:
    """A neuron whose gradient does not pass to the state before: it has the outputs of `inner`, and its fused kernels."""

    inner: Neuron

    def init_state(self, shape):
        return self.inner.init_state(shape)

    def step(self, params, state, x):
        return self.inner.step(params, lax.stop_gradient(state), x)


def sltt(model: Model) -> Model:
    """A copy of a network that learns by SLTT: every neuron becomes `Instant`.

    A layer whose own gradient passes between steps raises NotImplementedError: recurrent layers, delays, convolutions along time,
    parallel neurons and `Eprop`. `ottt` takes `nn.Recurrent`.
    """
    model = nnx.clone(model)
    for path, module in nnx.iter_modules(model):
        if isinstance(module, ACROSS_STEPS):
            raise NotImplementedError(
                f"model must have no recurrent layer, or another that carries a gradient between steps; got a "
                f"{type(module).__name__} at {'.'.join(map(str, path)) or 'the top'}"
            )
        if isinstance(module, Spiking):
            module.neuron = Instant(module.neuron)
    return model
