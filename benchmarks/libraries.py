"""How each library is called: one function per library, which imports it and returns a `Library`.

A `way` names how the library runs; only ours has several. Every `lif` has tau 2 (decay 0.5) and threshold 1, every `readout` decay 0.9.
Libraries differ in small things, so `TABLE` names the neuron of ours that computes the same.
"""

import math
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple
from unittest import mock


class Library(NamedTuple):
    """`lif(way, dtype)` and `readout(way)` give functions of [T, ..., N], `recurrent(way)` one of [T, B, N] and a weight."""

    version: str
    lif: Callable
    readout: Callable | None
    recurrent: Callable | None = None


def not_needed(*names):
    """Stands in for packages that a library imports only for its readers of files."""
    sys.modules.update({name: mock.MagicMock(__spec__=None) for name in names})


def snnfuse():
    """A way is an `implementation`, perhaps with the name of a neuron behind it."""
    import neurons

    import snnfuse as sf

    def run(neuron, params, way):
        return lambda xs: sf.unroll(neuron, params, None, xs, implementation=way.partition(" ")[0])[0]

    def recurrent(way):
        how, _, neuron = way.partition(" ")
        options = dict(implementation=how, precision="float32" if how == "scan" else "bfloat16x2")
        made = neurons.NEURONS[neuron or "lif"]
        return lambda xs, weight: sf.unroll_recurrent(*made, None, xs, weight, **options)[0]

    lif = lambda way, dtype: run(*neurons.NEURONS[way.partition(" ")[2] or "lif"], way)
    return Library(sf.__version__, lif, lambda way: run(sf.LI(), sf.LIParams(0.9), way), recurrent)


def spikingjelly():
    """SpikingJelly 2: `LIFNode`, and for 16-bit input `functional.lif_multi_step` with a float32 state, by its Triton kernels.

    `LIFNode` keeps its state in the dtype of its input, and with a 16-bit state it runs a loop of Torch operations; the
    function with a float32 state runs the fused kernels. The readout is a LIF that never spikes, because the kernels can
    return the membranes.
    """
    os.environ["SJ_LIF_CUDA_IMPLEMENTATION"] = "triton"  # what the wheel runs; an error if it cannot
    import torch
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    def multi_step(xs, tau=2.0, threshold=1.0, **options):
        state = torch.zeros_like(xs[0], dtype=torch.float32)  # in the layout of the input
        return functional.lif_multi_step(xs, state, tau, False, threshold, 0.0, surrogate.ATan(), False, **options)

    options = dict(tau=2.0, decay_input=False, v_reset=0.0, step_mode="m")
    node = neuron.LIFNode(**options, surrogate_function=surrogate.ATan())

    def run(xs):
        node.reset()
        return node(xs.float())

    lif = lambda way, dtype: run if dtype == "float32" else lambda xs: multi_step(xs)[0]

    def recurrent(way):
        def run(xs, weight):
            one_step = neuron.LIFNode(**options | dict(step_mode="s"), surrogate_function=surrogate.ATan())
            return layer.ElementWiseRecurrentContainer(one_step, lambda s, x: x + s @ weight, step_mode="m")(xs)

        return run

    readout = lambda way: lambda xs: multi_step(xs, tau=10.0, threshold=1e9, store_v_seq=True)[2]
    return Library(version("spikingjelly"), lif, readout, recurrent)


def loop(cell, state, xs):
    """A PyTorch cell, one step at a time."""
    import torch

    outs = []
    for x in xs:
        out, state = cell(x, state)
        outs.append(out)
    return torch.stack(outs)


def snntorch():
    """`Leaky`. It spikes at u > threshold and keeps the spike out of the reset's gradient."""
    import snntorch
    import torch
    from snntorch import surrogate
    from with_torch import ON

    leaky = snntorch.Leaky(0.5, spike_grad=surrogate.atan(alpha=2.0), reset_mechanism="zero").to(ON)
    integrator = snntorch.Leaky(0.9, reset_mechanism="none").to(ON)
    membranes = lambda x, membrane: (integrator(x, membrane)[1],) * 2

    def recurrent(way):
        def run(xs, weight):
            def cell(x, state):
                spikes, membrane = leaky(x + state[0] @ weight, state[1])
                return spikes, (spikes, membrane)

            return loop(cell, (torch.zeros_like(xs[0]),) * 2, xs)

        return run

    lif = lambda way, dtype: lambda xs: loop(leaky, leaky.reset_mem(), xs)
    readout = lambda way: lambda xs: loop(membranes, integrator.reset_mem(), xs)
    return Library(snntorch.__version__, lif, readout, recurrent)


def norse():
    """`LIFBoxCell`. It scales its input (so it gets twice as much), spikes at u > threshold, has no ATan."""
    import torch
    from with_torch import ON

    not_needed("h5py")
    import norse.torch as nt

    zeros = lambda xs: torch.zeros_like(xs[0])
    cell = nt.LIFBoxCell(nt.LIFBoxParameters(tau_mem_inv=torch.tensor(0.5), alpha=torch.tensor(1.0)), dt=1.0).to(ON)
    integrator = nt.LIBoxCell(nt.LIBoxParameters(tau_mem_inv=torch.tensor(0.1)), dt=1.0).to(ON)
    lif = lambda way, dtype: lambda xs: loop(cell, nt.LIFBoxFeedForwardState(v=zeros(xs)), 2 * xs)
    readout = lambda way: lambda xs: loop(integrator, nt.LIBoxState(v=zeros(xs)), 10 * xs)
    return Library(version("norse"), lif, readout)


def spyx():
    """`nn.run` of `nn.LIF`. It subtracts the threshold one step late, so it is compared with that neuron."""
    import jax.numpy as jnp
    from flax import nnx

    not_needed("grain", "grain.python", "h5py")
    import spyx
    import spyx.axn
    import spyx.nn

    atan = spyx.axn.custom(lambda u: 1 / (1 + (jnp.pi * u) ** 2))  # its own arctan has another slope
    layer = lambda xs: spyx.nn.LIF(xs.shape[2:], beta=0.5, activation=atan, rngs=nnx.Rngs(0))
    lif = lambda way, dtype: lambda xs: spyx.nn.run(layer(xs), xs)[0]
    readout = lambda way: lambda xs: spyx.nn.run(spyx.nn.LI(xs.shape[2:], beta=0.9, rngs=nnx.Rngs(0)), xs)[0]
    return Library(spyx.__version__, lif, readout)


def jaxpike():
    """`unroll` of `LIF`. It scales its input (so it gets twice as much) and spikes at u > threshold."""
    import jaxpike

    run = lambda layer, gain: lambda xs: jaxpike.unroll(layer, gain * xs)[0]
    layer = jaxpike.LIF(1 / math.log(2), reset="zero", surrogate=jaxpike.ATan())
    integrator = jaxpike.LeakyIntegrator(-1 / math.log(0.9))
    return Library(jaxpike.__version__, lambda way, dtype: run(layer, 2), lambda way: run(integrator, 10))


def sparx():
    """`pip install sparxml`: its Flax layers, with 8 steps in one iteration of their loop.

    Its import sets XLA's --xla_allow_excess_precision=false, only in its own process, as its users have it.
    """
    import sparx

    apply = lambda layer: lambda xs: layer.apply({}, xs)
    lif = sparx.nn.LIF(tau=1 / math.log(2), reset="zero", unroll=8)
    integrator = sparx.nn.LI(tau=-1 / math.log(0.9), unroll=8)
    return Library(sparx.__version__, lambda way, dtype: apply(lif), lambda way: apply(integrator))


TABLE = {  # library: (the module that times it, the neuron of ours that computes the same, its ways)
    "snnfuse": ("with_jax", "lif", ("pallas", "triton")),
    "spikingjelly": ("with_torch", "lif", ("triton",)),
    "snntorch": ("with_torch", "above, reset detached", ("loop",)),
    "norse": ("with_torch", "above, super", ("loop",)),
    "spyx": ("with_jax", "late", ("run",)),
    "jaxpike": ("with_jax", "above", ("unroll",)),
    "sparx": ("with_jax", "lif", ("unroll 8",)),
}
