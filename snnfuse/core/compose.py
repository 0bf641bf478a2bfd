"""Neurons that wrap a neuron: a normalisation or residual before it, a shortcut after it, all in the same kernel."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from snnfuse.core.neuron import Neuron, PyTree
from snnfuse.core.reset import NoReset


class AffineParams(NamedTuple):
    """Parameters of `Affine`: those of the inner neuron, one scale [N] for each input (None means 1), and one shift [N]."""

    inner: PyTree
    scales: tuple[Array | None, ...]
    shift: Array


@dataclass(frozen=True)
class Affine:
    """A neuron driven by a weighted sum of its inputs. x is a tuple (x_1, x_2, ...), one entry for each of `params.scales`.

        s[t] = inner(scale_1 * x_1[t] + shift + scale_2 * x_2[t] + ...)

    Batch normalisation has this form: its scale and shift come from the statistics. A residual is a second input.
    """

    inner: Neuron

    def init_state(self, shape):
        return self.inner.init_state(shape)

    def step(self, params, state, x):
        scaled = [x_i if scale is None else scale * x_i for scale, x_i in zip(params.scales, x, strict=True)]
        current = scaled[0] + params.shift
        for more in scaled[1:]:
            current = current + more
        return self.inner.step(params.inner, state, current)


CONNECTIONS = {
    "add": lambda s, r: s + r,
    "and": lambda s, r: s * r,
    "iand": lambda s, r: (1 - s) * r,
}


@dataclass(frozen=True)
class Connect:
    """A neuron whose output combines its spike s with a shortcut r: x is (x of inner, r), and out = g(s, r).

    g(s, r) is s + r ("add"), s r ("and") or (1 - s) r ("iand"). Fang et al. 2021, https://arxiv.org/abs/2102.04159.
    """

    inner: Neuron
    how: str = "add"

    def __post_init__(self):
        if self.how not in CONNECTIONS:
            raise ValueError(f"how must be one of {', '.join(CONNECTIONS)}; got {self.how!r}")

    def init_state(self, shape):
        return self.inner.init_state(shape)

    def step(self, params, state, x):
        x, shortcut = x
        state, s = self.inner.step(params, state, x)
        return state, CONNECTIONS[self.how](s, shortcut)


class GatedParams(NamedTuple):
    """Parameters of `Gated`: those of the inner neuron, and a factor for its output."""

    inner: PyTree
    gate: Array


@dataclass(frozen=True)
class Gated:
    """A neuron whose output is multiplied by a gate, the same at every step: out[t] = gate inner_out[t]."""

    inner: Neuron

    def init_state(self, shape):
        return self.inner.init_state(shape)

    def step(self, params, state, x):
        state, s = self.inner.step(params.inner, state, x)
        return state, params.gate * s


@dataclass(frozen=True)
class Twice:
    """The same neuron with its output returned twice, so that a kernel can store it as numbers and as bits."""

    inner: Neuron

    def init_state(self, shape):
        return self.inner.init_state(shape)

    def step(self, params, state, x):
        state, out = self.inner.step(params, state, x)
        return state, (out, out)


class UntilParams(NamedTuple):
    """Parameters of `Until`: those of the inner neuron, and the number of steps, as floats."""

    inner: PyTree
    length: Array


class UntilState(NamedTuple):
    """The state of the neuron, and the steps so far."""

    inner: PyTree
    t: Array


@dataclass(frozen=True)
class Until:
    """A neuron that stops after `params.length` steps: from then on its state stays as it is, and its outputs are 0."""

    inner: Neuron

    def init_state(self, shape):
        return UntilState(self.inner.init_state(shape), jnp.zeros(shape, jnp.float32))

    def step(self, params, state, x):
        goes = state.t < params.length
        choose = lambda new, old: jnp.where(goes, new, old)
        x = jax.tree.map(lambda x: choose(x, jnp.zeros_like(x)), x)  # what follows the end may be infinite
        after, out = self.inner.step(params.inner, state.inner, x)
        out = jax.tree.map(lambda out: choose(out, jnp.zeros_like(out)), out)
        return UntilState(jax.tree.map(choose, after, state.inner), state.t + 1), out


class CountedState(NamedTuple):
    """The state of the neuron, and the sum of its outputs so far."""

    inner: PyTree
    count: Array


@dataclass(frozen=True)
class Counted:
    """The same neuron, which also adds up its outputs in its state, so that a kernel counts spikes without storing them.

        count[t] = count[t-1] + s[t]

    The count after the last step has a gradient, so a loss may use it. Of several outputs, the first one counts.
    """

    inner: Neuron

    def init_state(self, shape):
        return CountedState(self.inner.init_state(shape), jnp.zeros(shape, jnp.float32))

    def step(self, params, state, x):
        inner, out = self.inner.step(params, state.inner, x)
        return CountedState(inner, state.count + jax.tree.leaves(out)[0]), out


def counted(neuron: Neuron) -> Neuron:
    """The neuron, counted inside of what wraps it.

    The count is of its own spikes: without the shortcut of a `Connect`, and before the gate of a `Gated`.
    """
    if isinstance(neuron, Affine | Connect | Gated | Twice):
        return replace(neuron, inner=counted(neuron.inner))
    return Counted(neuron)


@dataclass(frozen=True)
class StateOnly:
    """The same neuron without outputs: a kernel then computes the final state and stores nothing else."""

    inner: Neuron

    def init_state(self, shape):
        return self.inner.init_state(shape)

    def step(self, params, state, x):
        return self.inner.step(params, state, x)[0], ()


@dataclass(frozen=True)
class WithMembrane:
    """The same neuron with its membrane before the reset as a second output: out[t] = (inner out[t], u[t]).

    u is the v of one step of the same neuron with `NoReset()`; XLA and the kernels drop what the two steps have in common.
    """

    inner: Neuron

    def init_state(self, shape):
        return self.inner.init_state(shape)

    def step(self, params, state, x):
        after, out = self.inner.step(params, state, x)
        return after, (out, _without_reset(self.inner).step(params, state, x)[0].v)


def _without_reset(neuron):
    fields = getattr(neuron, "__dataclass_fields__", {})
    if "reset" in fields:
        return replace(neuron, reset=NoReset())
    if "inner" in fields:
        return replace(neuron, inner=_without_reset(neuron.inner))
    raise ValueError(
        f"{type(neuron).__name__} has no field `reset`, so its membrane before the reset cannot be recorded"
    )
