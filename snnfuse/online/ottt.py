"""Online training through time (OTTT): the gradient of a weight is the error of this step times a trace of the input.

        u[t] = decay v[t-1] + W s[t];   a[t] = decay a[t-1] + s[t];   dW = sum_t d[t] a[t]^T

d[t] = dL[t]/du[t] with v[t-1] held constant, as in SLTT. The trace is one number for each input, so the layer stores no more
than its input. For one layer of LIF neurons whose reset carries no gradient, this is the exact gradient. The trace a is a leaky
integrator, which runs in a fused kernel. Xiao et al. 2022, https://arxiv.org/abs/2210.04195.
"""

from functools import partial
from numbers import Real

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from snnfuse.core.neurons import IF, LI, LIF, LIParams
from snnfuse.nn.psn import PSN
from snnfuse.nn.recurrent import Recurrent
from snnfuse.nn.spikes import Spikes, values
from snnfuse.nn.spiking import Spiking
from snnfuse.nn.temporal import Folded, Sequential, Temporal, Timeless
from snnfuse.online.sltt import Instant
from snnfuse.ops.api import unroll

INSIDE = (nnx.Linear, nnx.Conv, PSN)  # these may not be inside of another layer


class Traced(Temporal):
    """A linear layer whose weight gradient takes a trace of the input: xs [T, B, ...] -> (layer(xs), trace [B, ...]).

        a[t] = decay a[t-1] + xs[t];   d_weight = sum_t of the gradient of layer(a[t])

    Args:
      layer: a layer that is linear in its input, such as `nn.Linear` or `nnx.Conv`.
      decay: of the trace, that of the neurons after the layer.
    """

    def __init__(self, layer: nnx.Module, decay: float):
        if not isinstance(layer, nnx.Linear | nnx.Conv):
            raise TypeError(f"layer must be linear, an nnx.Linear or nnx.Conv; got {type(layer).__name__}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1]; got {decay}")
        self.layer, self.decay = layer, float(decay)

    def init_state(self, xs: Array | Spikes) -> Array:
        return jnp.zeros(values(xs, type(self).__name__).shape[1:], jnp.float32)

    def __call__(self, xs: Array | Spikes, state: Array | None = None) -> tuple[Array, Array]:
        xs = values(xs, type(self).__name__)
        trace, state = _trace(self.decay, xs, state)
        graphdef, params, others = nnx.split(self.layer, nnx.Param, ...)

        def apply(params, xs):
            layer = nnx.merge(graphdef, params, others)
            return layer(xs) if isinstance(layer, Timeless) else Folded(layer)(xs)

        return _traced(apply, params, xs, trace), state


def _trace(decay, xs, state):
    """The trace of every step in the dtype of xs, and the one after the last in float32; no gradient."""
    state = None if state is None else LI().init_state(state.shape)._replace(v=lax.stop_gradient(state))
    trace, state = unroll(LI(), LIParams(decay), state, lax.stop_gradient(xs))
    return trace, state.v


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _traced(apply, params, xs, trace):
    """apply(params, xs), whose gradient for the params is that of apply(params, trace)."""
    return apply(params, xs)


def _traced_backward(apply, kept, d_outs):
    params, xs, trace = kept
    _, of_params = jax.vjp(lambda params: apply(params, trace), params)
    _, of_xs = jax.vjp(lambda xs: apply(params, xs), xs)
    return *of_params(d_outs), *of_xs(d_outs), jnp.zeros_like(trace)


_traced.defvjp(lambda apply, *kept: (apply(*kept[:2]), kept), _traced_backward)


class TracedRecurrent(Temporal):
    """`nn.Recurrent` whose weight gradient takes a trace of the spikes: xs [T, B, H] -> (outs [T, B, H], (state, trace)).

        a[t] = decay a[t-1] + s[t];   d_weight = sum_t a[t-1]^T d[t]

    The gradient does not pass through the recurrent weight to the step before. This is e-prop for LIF neurons: Bellec et al. 2020,
    https://doi.org/10.1038/s41467-020-17236-y. The fused recurrent kernel makes the spikes, and the neuron's own kernel the gradient.
    """

    def __init__(self, layer: Recurrent):
        if layer.weight[...].ndim != 2:
            raise NotImplementedError(f"layer must have one head; its weight has shape {layer.weight[...].shape}")
        self.layer, self.decay = layer, _decay(layer.neuron)

    def init_state(self, xs: Array) -> tuple:
        return self.layer.init_state(xs), jnp.zeros(values(xs, type(self).__name__).shape[1:], jnp.float32)

    def __call__(self, xs: Array, state: tuple | None = None) -> tuple[Array, tuple]:
        xs, (before, trace) = values(xs, type(self).__name__), (None, None) if state is None else state
        outs, after = jax.tree.map(lax.stop_gradient, self.layer(xs, before))
        first = jnp.zeros_like(outs[:1]) if before is None else before.fed[None].astype(outs.dtype)
        fed = jnp.concatenate([first, outs[:-1]])
        traces, trace = _trace(self.decay, fed, trace)
        weight = self.layer.weight[...] if self.layer.mask is None else self.layer.weight[...] * self.layer.mask[...]
        apply = lambda weight, fed: fed @ weight.astype(fed.dtype)
        neuron, start = self.layer.neuron, None if before is None else before.neuron
        current = xs + _traced(apply, weight, lax.stop_gradient(fed), traces)
        again, _ = unroll(Instant(neuron.neuron), neuron.params, start, current, implementation=neuron.implementation)
        return again + lax.stop_gradient(outs - again), (after, trace)


def ottt(model: Sequential) -> Sequential:
    """A copy of a network that learns by OTTT.

    Every `nn.LIF`, `IF` and `LI` becomes `Instant`, a linear layer or convolution right before it becomes `Traced`, and `nn.Recurrent`
    becomes `TracedRecurrent`. A neuron with another recursion raises NotImplementedError, because its trace is not one number for
    each input; so does a linear layer that something other than a neuron follows, such as BatchNorm.
    """
    if not isinstance(model, Sequential):
        raise TypeError(f"model must be an nn.Sequential; got {type(model).__name__}")
    layers, after = [], [*nnx.clone(model).layers]
    for i, layer in enumerate(after):
        follows = after[i + 1] if i + 1 < len(after) else None
        if isinstance(layer, nnx.Linear | nnx.Conv):
            neuron = follows.neuron if isinstance(follows, Recurrent) else follows
            if not isinstance(neuron, Spiking):
                raise NotImplementedError(
                    f"layer {i}, a {type(layer).__name__}, must come right before a neuron; got {follows!r}"
                )
            layer = Traced(layer, _decay(neuron))
        elif isinstance(layer, Recurrent):
            layer = TracedRecurrent(layer)
        elif isinstance(layer, Temporal) and not isinstance(layer, Spiking):
            raise NotImplementedError(f"layer {i} must be linear, a neuron or Recurrent; got a {type(layer).__name__}")
        elif isinstance(layer, nnx.Module) and not isinstance(layer, Spiking):
            kinds = {type(part).__name__ for _, part in nnx.iter_modules(layer) if isinstance(part, INSIDE)}
            if kinds:
                raise NotImplementedError(
                    f"layer {i}, a {type(layer).__name__}, must have no {', '.join(sorted(kinds))} inside, whose gradient "
                    "would not be that of OTTT"
                )
        layers.append(layer)
    for layer in after:
        if isinstance(layer, Spiking):
            _decay(layer)
            layer.neuron = Instant(layer.neuron)
    return Sequential(*layers)


def _decay(layer):
    """The decay of a neuron whose membrane is a leaky sum of its input."""
    neuron = layer.neuron.inner if isinstance(layer.neuron, Instant) else layer.neuron
    if isinstance(neuron, IF):
        return 1.0
    decay = layer.params.decay if isinstance(neuron, LIF | LI) else None
    if not isinstance(decay, Real):
        raise NotImplementedError(
            f"neurons must be IF, LIF or LI with one decay that is not trained, so that a trace of the input suffices; got {layer!r}"
        )
    return float(decay)
