"""The neurons and inputs that the contract tests share."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import snnfuse as sf
from snnfuse.core.compose import counted


class AffineParams(NamedTuple):
    scale: jax.Array
    shift: jax.Array
    lif: sf.LIFParams


@dataclass(frozen=True)
class AffineResidualLIF:
    """A neuron the library does not have: two input leaves, three kinds of parameter, built on another neuron."""

    lif: sf.LIF = sf.LIF(sf.SoftReset())

    def init_state(self, shape):
        return self.lif.init_state(shape)

    def step(self, params, state, x):
        x, residual = x
        return self.lif.step(params.lif, state, params.scale * x + params.shift + residual)


@dataclass(frozen=True)
class TwoOutputs:
    """Spikes and membrane potential, as a dictionary, from a state that is a dictionary."""

    lif: sf.LIF = sf.LIF(sf.HardReset(0.1, detach=True), decay_input=True)

    def init_state(self, shape):
        return {"membrane": self.lif.init_state(shape)}

    def step(self, params, state, x):
        lif, s = self.lif.step(params, state["membrane"], x["current"])
        return {"membrane": lif}, {"spike": s, "v": lif.v}


class Case(NamedTuple):
    """A neuron, learned params (every leaf an array), a random initial state, and inputs that make it fire."""

    neuron: Any
    params: Any
    state: Any
    xs: Any
    rtol: float


# name: (neuron, params, scale of x, mean of x / scale, tolerance). Params are scalars here; `make` gives them shapes.
NEURONS = {
    "if": (sf.IF(), sf.IFParams(1.0), 0.5, 0.3, 1e-5),
    "lif": (sf.LIF(), sf.LIFParams(0.7, 1.0), 1.0, 0.1, 1e-5),
    "lif_soft": (sf.LIF(sf.SoftReset(), True, surrogate=sf.Sigmoid()), sf.LIFParams(0.5, 1.0), 2.0, 0.1, 1e-5),
    "lif_paper": (sf.LIF(surrogate=sf.Rectangle()), sf.LIFParams(0.2, 0.3), 0.5, -0.2, 1e-5),
    "lif_none": (sf.LIF(sf.NoReset(), v_rest=0.1, surrogate=sf.Gaussian()), sf.LIFParams(0.5, 1.0), 1.0, -0.2, 1e-5),
    "lif_fast": (sf.LIF(sf.SoftReset(True), surrogate=sf.FastSigmoid()), sf.LIFParams(0.9, 1.0), 0.8, 0.1, 1e-5),
    "lif_triangle": (sf.LIF(surrogate=sf.Triangle()), sf.LIFParams(0.9, 1.0), 0.8, 0.1, 1e-5),
    "lif_leaky": (sf.LIF(surrogate=sf.LeakyReLU()), sf.LIFParams(0.5, 1.0), 1.0, 0.0, 1e-5),
    "cuba": (sf.CubaLIF(sf.SoftReset()), sf.CubaLIFParams(0.5, 0.7, 1.0), 0.6, 0.1, 1e-5),
    "adaptive": (sf.AdaptiveLIF(sf.SoftReset(True)), sf.AdaptiveLIFParams(0.9, 0.95, 0.2, 1.0), 0.6, 0.2, 1e-5),
    "exp": (sf.ExpIF(), sf.ExpIFParams(0.5, 0.8, 1.0, 1.0), 1.0, 0.3, 1e-3),  # exp differs in its last bits
    "izhikevich": (sf.Izhikevich(), sf.IzhikevichParams(), 20.0, 0.5, 1e-4),  # mV: the squares cancel to 1e-2
    "li": (sf.LI(decay_input=True), sf.LIParams(0.8), 1.0, 0.0, 1e-5),
    "affine": (AffineResidualLIF(), AffineParams(1.2, -0.1, sf.LIFParams(0.6, 1.0)), 1.0, 0.0, 1e-5),
    "counted": (counted(sf.CubaLIF()), sf.CubaLIFParams(0.5, 0.7, 1.0), 0.6, 0.1, 1e-5),
    "outputs": (TwoOutputs(), sf.LIFParams(0.5, 1.0), 2.0, 0.1, 1e-5),
}


def normal(key, shape, dtype=jnp.float32):
    """`jax.random.normal(key, shape, dtype)`, an array of NumPy up to 2**16 numbers.

    It then draws more numbers than it needs: otherwise every shape compiles a program of its own.
    """
    size = math.prod(shape)
    if size > 2**16:
        return jax.random.normal(key, shape, dtype)
    with jax.ensure_compile_time_eval():
        drawn = jax.random.normal(key, (2**12 if size <= 2**12 else 2**16,), dtype)
    return np.asarray(drawn)[:size].reshape(shape)


def make(name, T=12, lanes=(3, 50), dtype=jnp.float32, seed=0) -> Case:
    """The case `name`. Its parameters take the shapes that broadcast, in turn: scalar, [N], [*B, N], [B, 1, ...]."""
    neuron, params, scale, mean, rtol = NEURONS[name]
    keys = iter(jax.random.split(jax.random.key(seed), 20))
    shapes = [(), lanes[-1:], lanes, (*lanes[:1], *(1,) * (len(lanes) - 1))]
    array = lambda x, dtype=jnp.float32: jnp.asarray(np.asarray(x, np.float32), dtype)

    def param(i, value):
        return array(np.float32(value) * (1 + np.float32(0.02) * normal(next(keys), shapes[i % 4])))

    values, tree = jax.tree.flatten(params)
    params = tree.unflatten([param(i, v) for i, v in enumerate(values)])
    state = jax.tree.map(
        lambda leaf: array(leaf + np.float32(0.1) * normal(next(keys), leaf.shape)), neuron.init_state(lanes)
    )
    sequence = lambda: array(np.float32(scale) * (normal(next(keys), (T, *lanes)) + np.float32(mean)), dtype)
    xs = {"affine": lambda: (sequence(), sequence()), "outputs": lambda: {"current": sequence()}}.get(name, sequence)()
    return Case(neuron, params, state, xs, rtol)


def cotangents(like, seed=0):
    """Random cotangents for a tree of arrays (or their shapes)."""
    leaves, tree = jax.tree.flatten(like)
    with jax.ensure_compile_time_eval():
        keys = [*jax.random.split(jax.random.key(seed + 100), 20)]  # a shorter split gives the same
    return tree.unflatten(
        [jnp.asarray(normal(k, leaf.shape, leaf.dtype)) for k, leaf in zip(keys, leaves, strict=False)]
    )
