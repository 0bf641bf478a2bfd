"""Spatial learning through time (SLTT): the gradient of a step passes through the layers, and never to an earlier step.

        u[t] = decay v[t-1] + W s[t],   dW = sum_t d[t] s[t]^T,   d[t] = dL[t]/du[t] with v[t-1] held constant

Meng et al. 2023, https://arxiv.org/abs/2302.14311.
"""

from dataclasses import dataclass
from typing import TypeVar

from flax import nnx
from jax import lax

from snnfuse.core.neuron import Neuron
from snnfuse.nn.recurrent import Feedback, Recurrent
from snnfuse.nn.spiking import Spiking

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
    """A copy of a network that learns by SLTT: every neuron becomes `Instant`. Recurrent layers are refused; `ottt` takes them."""
    model = nnx.clone(model)
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Recurrent | Feedback):
            raise NotImplementedError(
                f"model must have no recurrent layer, whose spikes carry a gradient to the step before; got a "
                f"{type(module).__name__} at {'.'.join(map(str, path)) or 'the top'}"
            )
        if isinstance(module, Spiking):
            module.neuron = Instant(module.neuron)
    return model
