"""Eligibility propagation (e-prop) for any neuron: one trace for each synapse and each number of the neuron's state.

        E[t] = dh[t]/dh[t-1] E[t-1] + dh[t]/dW        h: the state of a neuron, W: the weights of its inputs and of the spikes
        e[t] = ds[t]/dh[t-1] E[t-1] + ds[t]/dW        that come back to it, which are inputs, and constants, of the next step
        dW   = sum_t L[t] f[t],   f[t] = decay_out f[t-1] + e[t]

L[t], the learning signal, is the gradient that reaches the spikes s[t] from the layers after. `RandomFeedback` is a readout that sends
it back through fixed random weights. Bellec et al. 2020, https://doi.org/10.1038/s41467-020-17236-y.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from snnfuse.core.neuron import PyTree
from snnfuse.nn.spikes import Spikes, values
from snnfuse.nn.spiking import Fixed, Spiking
from snnfuse.nn.temporal import Temporal, Timeless, whole


class EpropState(NamedTuple):
    """The neurons' state, their last spikes [B, H], E for each number of the state, and f, both [B, I + H, H]."""

    neuron: PyTree
    fed: Array
    traces: PyTree
    eligibility: Array


class Eprop(Temporal):
    """Neurons with input and recurrent weights that learn by e-prop: xs [T, B, I] -> (spikes [T, B, H], `EpropState`).

        s[t] = neuron(xs[t] @ kernel + s[t-1] @ weight)      the diagonal of weight counts as 0: no neuron feeds itself

    The gradient of `kernel` [I, H] and `weight` [H, H] is the module's equation; that of xs is the one within a step. Parameters of the
    neuron are not trained. Without recurrence the gradient is that of backpropagation through time. It runs step by step, by `lax.scan`.

    Args:
      neuron: a neuron module, such as `nn.AdaptiveLIF(tau=20.0, tau_adapt=200.0)`. The paper's reset has no gradient:
        `reset=snnfuse.SoftReset(detach=True)`.
      in_features, features: I and H.
      recurrent: True by default; False has no `weight`.
      decay_out: 0.0 by default; the decay of the readout after the layer, if the gradient does not pass through the readout's
        state: with `online.gradients` in pieces of one step, which raises ValueError for longer ones: the decay would count twice.
      rngs: draws the weights; a neuron has none to itself.
    """

    emits_spikes = True  # a monitor records its outputs

    def __init__(
        self,
        neuron: Spiking,
        in_features: int,
        features: int,
        *,
        recurrent: bool = True,
        decay_out: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if not isinstance(neuron, Spiking):
            raise TypeError(f"neuron must be a module such as nn.LIF(tau=2.0); got {neuron!r}")
        in_features, features = whole("in_features", in_features), whole("features", features)
        if not 0 <= decay_out <= 1:
            raise ValueError(f"decay_out must be in [0, 1]; got {decay_out}")
        self.neuron, self.in_features, self.features, self.decay_out = neuron, in_features, features, float(decay_out)
        draw = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(draw(rngs.params(), (in_features, features), jnp.float32))
        self.weight = nnx.Param(draw(rngs.params(), (features, features), jnp.float32)) if recurrent else None

    def init_state(self, xs: Array | Spikes) -> EpropState:
        B, dtype = values(xs, "Eprop").shape[1], self.kernel[...].dtype
        neuron = jax.tree.map(lambda x: x.astype(dtype), self.neuron.neuron.init_state((B, self.features)))
        synapses = self.in_features + (0 if self.weight is None else self.features)
        zeros = lambda *shape: jnp.zeros((B, *shape, self.features), dtype)
        return EpropState(neuron, zeros(), jax.tree.map(lambda _: zeros(synapses), neuron), zeros(synapses))

    def __call__(self, xs: Array | Spikes, state: EpropState | None = None) -> tuple[Array, EpropState]:
        xs = values(xs, "Eprop")
        if (
            xs.ndim != 3
            or not xs.size
            or xs.shape[-1] != self.in_features
            or not jnp.issubdtype(xs.dtype, jnp.floating)
        ):
            raise ValueError(
                f"xs must be floats [T, B, {self.in_features}] without an empty axis; got {xs.dtype}{xs.shape}"
            )
        state = self.init_state(xs) if state is None else state
        weights = self.kernel[...]
        if self.weight is not None:
            weights = jnp.concatenate([weights, self.weight[...] * (1 - jnp.eye(self.features, dtype=weights.dtype))])
        constants = jax.tree.map(lax.stop_gradient, (self.neuron.params, state))
        return _eprop((self.neuron.neuron, self.in_features, self.decay_out), weights, xs, *constants)


def _step(how, weights, params, state, x):
    """(the state after a step, (spikes, their derivative ds/dx)); x is [B, I]."""
    neuron, _, decay_out = how
    synapses = x if len(weights) == x.shape[1] else jnp.concatenate([x, state.fed.astype(x.dtype)], 1)
    current = synapses.astype(weights.dtype) @ weights
    leaves, tree = jax.tree.flatten(state.neuron)

    def local(leaves, current):
        after, out = neuron.step(params, tree.unflatten(leaves), current)
        return jax.tree.leaves(after), out

    def slope(i):
        """The derivative of state and spikes by number i of the state before, or by the current."""
        tangents = [jnp.full_like(leaf, i == j) for j, leaf in enumerate(leaves)]
        return jax.jvp(local, (leaves, current), (tangents, jnp.full_like(current, i == len(leaves))))[1]

    after, out = local(leaves, current)
    slopes = [slope(i) for i in range(len(leaves) + 1)]
    before = [*jax.tree.leaves(state.traces), synapses[:, :, None].astype(current.dtype)]
    spread = lambda pick: sum(pick(d)[:, None] * E for d, E in zip(slopes, before, strict=True))
    traces = [spread(lambda d, a=a: d[0][a]) for a in range(len(leaves))]
    eligibility = decay_out * state.eligibility + spread(lambda d: d[1])
    return EpropState(tree.unflatten(after), out, tree.unflatten(traces), eligibility), (out, slopes[-1][1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _eprop(how, weights, xs, params, state):
    state, (outs, _) = lax.scan(partial(_step, how, weights, params), state, xs)
    return outs.astype(xs.dtype), state


def _forward(how, *kept):
    return _eprop(how, *kept), kept


def _backward(how, kept, cotangents):
    """The steps run once more, forward in time, beside the learning signals; no trace of an earlier step is stored."""
    (weights, xs, params, state), (signals, _) = kept, cotangents

    def step(carry, now):
        state, d_weights = carry
        x, signal = now
        state, (out, slope) = _step(how, weights, params, state, x)
        signal = signal.astype(out.dtype)
        d_weights = d_weights + jnp.einsum("bh,bih->ih", signal, state.eligibility)
        return (state, d_weights), ((signal * slope) @ weights[: how[1]].T).astype(xs.dtype)

    (_, d_weights), d_xs = lax.scan(step, (state, jnp.zeros_like(weights)), (xs, signals))
    return d_weights, d_xs, *jax.tree.map(jnp.zeros_like, (params, state))


_eprop.defvjp(_forward, _backward)


class RandomFeedback(Timeless):
    """A linear layer whose gradient goes back through fixed random weights: xs [T, B, I] -> outs [T, B, O].

        outs = xs @ kernel + bias;   d_xs = d_outs @ feedback^T

    Lillicrap et al. 2016, https://doi.org/10.1038/ncomms13276.
    """

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        draw = nnx.initializers.lecun_normal()
        self.in_features, self.out_features = in_features, out_features
        self.kernel = nnx.Param(draw(rngs.params(), (in_features, out_features), jnp.float32))
        self.feedback = Fixed(draw(rngs.params(), (in_features, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32))

    def __call__(self, xs: Array | Spikes) -> Array:
        xs: Any = values(xs, "RandomFeedback")
        if xs.shape[-1:] != (self.in_features,) or not jnp.issubdtype(xs.dtype, jnp.floating):
            raise ValueError(f"xs must be floats [..., {self.in_features}]; got {xs.dtype}{xs.shape}")
        kernel, feedback, bias = (x[...].astype(xs.dtype) for x in (self.kernel, self.feedback, self.bias))
        back = (xs - lax.stop_gradient(xs)) @ lax.stop_gradient(feedback)  # 0, with the gradient of xs
        return lax.stop_gradient(xs) @ kernel + back + bias
