"""What NIR has and `snnfuse.nn` has not: layers of one node each, and layers in a graph."""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from snnfuse import nn
from snnfuse.core.neuron import PyTree
from snnfuse.core.surrogate import ATan, Surrogate, spike


class Graph(nn.Temporal):
    """Layers of which each is fed the sum of what its sources made. The state is a tuple, one entry per Temporal layer.

    `sources`: for each layer, and at last for the output, the places of layers before it; -1 is the input.
    """

    def __init__(self, layers: Sequence[Callable], sources: Sequence[Sequence[int]]):
        if len(sources) != len(layers) + 1:
            raise ValueError(
                f"sources must be one for each layer and the output, {len(layers) + 1}; got {len(sources)}"
            )
        for i, places in enumerate(sources):
            if not places or not all(-1 <= place < i for place in places):
                raise ValueError(f"sources[{i}] must be places in -1..{i - 1}; got {places}")
        self.layers = nnx.List(layer if isinstance(layer, nn.Temporal) else nn.Folded(layer) for layer in layers)
        self.sources = tuple(map(tuple, sources))

    def init_state(self, xs: PyTree) -> tuple:
        made, state = [xs], []
        for layer, places in zip(self.layers, self.sources, strict=False):
            if temporal := isinstance(layer, nn.Temporal):
                state.append(layer.init_state(made[places[0] + 1]))
            outs = nnx.eval_shape(lambda layer, xs: layer(xs), layer, made[places[0] + 1])
            made.append(outs[0] if temporal else outs)
        return tuple(state)

    def __call__(self, xs: Array, state: tuple | None = None) -> tuple[Array, tuple]:
        count = sum(isinstance(layer, nn.Temporal) for layer in self.layers)
        before = [None] * count if state is None else list(state)
        if len(before) != count:
            raise ValueError(f"state must have {count} entries, one per Temporal layer; got {len(before)}")
        made, after = [xs], []
        for layer, places in zip(self.layers, self.sources, strict=False):
            x = _sum(made, places)
            if isinstance(layer, nn.Temporal):
                x, s = layer(x, before[len(after)])
                after.append(s)
            else:
                x = layer(x)
            made.append(x)
        return _sum(made, self.sources[-1]), tuple(after)


class Shift(nnx.Module):
    """x plus a constant: the bias of a recurrent Affine, which every step adds."""

    def __init__(self, shift: Any):
        self.shift = nnx.Param(jnp.asarray(shift, jnp.float32))

    def __call__(self, x: Array) -> Array:
        return x + self.shift[...].astype(x.dtype)


class Scale(nnx.Module):
    """x * scale, elementwise; `scale` broadcasts against [*B, N] from the right."""

    def __init__(self, scale: Any):
        self.scale = nnx.Param(jnp.asarray(scale, jnp.float32))

    def __call__(self, x: Array) -> Array:
        return x * self.scale[...]


class Threshold(nnx.Module):
    """1 where x >= threshold, else 0, with a surrogate gradient."""

    def __init__(self, threshold: Any, surrogate: Surrogate = ATan()):  # noqa: B008
        self.threshold, self.surrogate = nn.Fixed(jnp.asarray(threshold, jnp.float32)), surrogate

    def __call__(self, x: Array) -> Array:
        return spike(x - self.threshold[...], self.surrogate)


class Flatten(nnx.Module):
    """Axes `start_dim` to `end_dim` of [C, H, W] as one, in NIR's order, of [B, H, W, C]."""

    def __init__(self, start_dim: int = 0, end_dim: int = -1):
        self.start_dim, self.end_dim = start_dim, end_dim

    def __call__(self, x: Array) -> Array:
        x = jnp.moveaxis(x, -1, 1)
        start, end = (d % (x.ndim - 1) + 1 for d in (self.start_dim, self.end_dim))
        x = x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])
        return jnp.moveaxis(x, 1, -1)


class Pool(nnx.Module):
    """Sum or mean over windows of [B, H, W, C]; padding (rows, columns) of zeros, which count in the mean."""

    def __init__(self, kind: Literal["sum", "mean"], window, stride, padding):
        self.kind, self.window, self.stride, self.padding = kind, window, stride, padding

    def __call__(self, x: Array) -> Array:
        padding = [(p, p) for p in self.padding]
        total = nnx.pool(x, 0.0, jax.lax.add, self.window, self.stride, padding)
        return total if self.kind == "sum" else total / np.prod(self.window)


def chain(layers):
    """The sources of layers in turn, for `Graph`."""
    return [(i - 1,) for i in range(len(layers) + 1)]


def _sum(made, places):
    return reduce(add, (made[place + 1] for place in places))
