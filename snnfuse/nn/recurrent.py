"""Recurrent layers: neurons whose spikes are part of their own input at the next step, through a matrix or any layer."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from snnfuse.nn.padded import ends, join, split, until_end
from snnfuse.nn.spikes import differentiable, values
from snnfuse.nn.spiking import Fixed, Spiking
from snnfuse.nn.temporal import Temporal, Timeless
from snnfuse.ops.problem import PARTS
from snnfuse.ops.recurrent import RecurrentState, unroll_recurrent, unroll_through


class Recurrent(Temporal):
    """A recurrent layer: xs [T, *B, H] -> (outs [T, *B, H], `RecurrentState`). `layer.weight` is trained.

        s[t] = neuron(x[t] + s[t-1] @ weight)

    Its neurons may differ. This layer of 128 has 64 neurons that adapt and 64 that do not, as the LSNN of Bellec et al. 2018:

        beta = jnp.where(jnp.arange(128) < 64, 0.0, 1.8)
        nn.Recurrent(nn.AdaptiveLIF(tau=20.0, tau_adapt=200.0, beta=beta), 128, rngs=rngs)

    Args:
      neuron: a neuron module, such as `nn.LIF(tau=2.0)`. Its parameters, `implementation` and `out_dtype` are used.
      features: H, the number of neurons.
      heads: 1 by default. Neurons connect only within their head; heads must divide features.
      self_connections: True by default; False removes the weight from each neuron to itself.
      mask: an array of zeros and ones with the shape of the weight, [H, H] or, with several heads, [heads, H / heads,
        H / heads]; 0 removes a connection.
      precision: "float32" by default; "bfloat16" and "bfloat16x2" round the weight, see `snnfuse.unroll_recurrent`.
        "bfloat16" is the fastest: 0.33 ms where "float32" takes 0.65 (T = 256, B = 256, H = 128, with the gradients).
      scale: 1.0 by default; each head's weight starts as an orthogonal matrix times this.
      rngs: `nnx.Rngs`; the stream `params` draws the weight.
    """

    def __init__(
        self,
        neuron: Spiking,
        features: int,
        *,
        heads: int = 1,
        self_connections: bool = True,
        mask: Array | None = None,
        precision: str = "float32",
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if not isinstance(neuron, Spiking):
            raise TypeError(f"neuron must be a module such as nn.LIF(tau=2.0); got {neuron!r}")
        if features < 1 or heads < 1 or features % heads:
            raise ValueError(f"features must be a positive multiple of heads; got features={features}, heads={heads}")
        if precision not in PARTS:
            raise ValueError(f"precision must be one of {list(PARTS)}; got {precision!r}")
        size = features // heads
        shape = (size, size) if heads == 1 else (heads, size, size)
        if mask is not None and jnp.shape(mask) != shape:
            raise ValueError(f"mask must have the shape of the weight, {shape}; got {jnp.shape(mask)}")
        blocks = jax.vmap(lambda key: nnx.initializers.orthogonal(scale)(key, (size, size), jnp.float32))
        self.neuron = neuron
        self.precision = precision
        self.weight = nnx.Param(blocks(jax.random.split(rngs.params(), heads)).reshape(shape))
        self.mask = _mask(mask, self_connections, shape)

    unroll = staticmethod(partial(unroll_recurrent))  # this runs the layer; a monitor replaces it

    def init_state(self, xs: Array) -> RecurrentState:
        return RecurrentState(self.neuron.init_state(xs), jnp.zeros(values(split(xs)[0]).shape[1:], jnp.float32))

    def __call__(self, xs: Array, state: RecurrentState | None = None) -> tuple[Array, RecurrentState]:
        weight = self.weight[...] if self.mask is None else self.weight[...] * self.mask[...]
        xs, lengths = split(xs)
        inputs = self.neuron.params, state, values(xs), weight
        params, state, xs, weight = differentiable(self.neuron.out_dtype, inputs)
        options = dict(precision=self.precision, implementation=self.neuron.implementation)
        options |= dict(weight=weight, out_dtype=self.neuron.out_dtype)
        return _unroll(self.unroll, lengths, self.neuron.neuron, params, state, xs, **options)


class Feedback(Temporal):
    """A recurrent layer through any layer: xs [T, B, ...] -> (outs [T, B, ...], `RecurrentState`).

        s[t] = neuron(x[t] + layer(s[t-1]))

    With a convolution, each neuron hears its neighbours on the map:

        nn.Feedback(nn.LIF(tau=2.0), nnx.Conv(8, 8, (3, 3), rngs=rngs))     # xs [T, B, H, W, 8]

    It runs step by step, by `jax.lax.scan`. For a matrix, `Recurrent` is the faster layer: it has a fused kernel.

    Args:
      neuron: a neuron module, such as `nn.LIF(tau=2.0)`. Its parameters and `out_dtype` are used; its `implementation` must be
        None or "scan".
      layer: a layer without time that keeps the shape, such as `nnx.Conv`, `nnx.Linear`, `nn.Conv` or an `nnx.Sequential` of
        them: [B, ...] -> [B, ...]. It may hold parameters, but nothing that changes in a call: no BatchNorm and no dropout.
    """

    def __init__(self, neuron: Spiking, layer: nnx.Module):
        if not isinstance(neuron, Spiking):
            raise TypeError(f"neuron must be a module such as nn.LIF(tau=2.0); got {neuron!r}")
        if neuron.implementation not in (None, "scan"):
            raise NotImplementedError(
                f"implementation must be None or 'scan', which runs any layer that feeds back; got {neuron.implementation!r}"
            )
        if not isinstance(layer, nnx.Module) or isinstance(layer, Temporal):
            raise TypeError(f"layer must be a module without time, such as nnx.Conv; got {type(layer).__name__}")
        for _, variable in nnx.to_flat_state(nnx.state(layer)):
            if not isinstance(variable, nnx.Param | Fixed):
                raise ValueError(
                    f"layer must hold parameters only; got a {type(variable).__name__}, which a call may change"
                )
        self.neuron = neuron
        self.layer = layer

    unroll = staticmethod(partial(unroll_through))  # this runs the layer; a monitor replaces it

    def init_state(self, xs: Array) -> RecurrentState:
        return RecurrentState(self.neuron.init_state(xs), jnp.zeros(values(split(xs)[0]).shape[1:], jnp.float32))

    def __call__(self, xs: Array, state: RecurrentState | None = None) -> tuple[Array, RecurrentState]:
        graph, weights = nnx.split(self.layer)
        xs, lengths = split(xs)
        inputs = self.neuron.params, state, values(xs), nnx.to_pure_dict(weights)
        params, state, xs, weights = differentiable(self.neuron.out_dtype, inputs)
        options = dict(connect=_Layer(graph), weights=weights, out_dtype=self.neuron.out_dtype)
        return _unroll(self.unroll, lengths, self.neuron.neuron, params, state, xs, **options)


def _unroll(unroll, lengths, neuron, params, state, xs, **options):
    if lengths is None:
        return unroll(neuron, params, state, xs, **options)
    fed = jnp.zeros(xs.shape[1:], jnp.float32) if state is None else state.fed

    def inside(neuron, params, given, xs, **options):
        outs, after = unroll(neuron, params, None if state is None else RecurrentState(given, fed), xs, **options)
        return outs, after.neuron

    outs, after = until_end(inside, lengths)(neuron, params, None if state is None else state.neuron, xs, **options)
    return join(outs, lengths), RecurrentState(after, ends(outs, fed, lengths).astype(fed.dtype))


@dataclass(frozen=True)
class _Layer:
    """A layer as a function of its parameters; equal layers compile once."""

    graph: Any

    def __call__(self, weights, fed):
        layer = nnx.merge(self.graph, weights)
        return layer(fed[None])[0] if isinstance(layer, Timeless) else layer(fed)


def _mask(mask, self_connections, shape):
    if mask is None and self_connections:
        return None
    keep = jnp.ones(shape, jnp.float32) if mask is None else jnp.asarray(mask, jnp.float32)
    return Fixed(keep if self_connections else keep * (1 - jnp.broadcast_to(jnp.eye(shape[-1]), shape)))
