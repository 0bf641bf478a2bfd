"""How each library is called: one function per library, which imports it and returns a `Library`.

A `way` names how the library is asked to run. Every `lif` has tau 2 (decay 0.5) and threshold 1, every `readout` decay 0.9.
Libraries differ in small things, so `TABLE` names the neuron of ours that computes the same.
"""

import importlib
import math
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple
from unittest import mock


class Library(NamedTuple):
    """`lif(way, dtype)` and `readout(way)` give functions of [T, ..., N]."""

    version: str
    lif: Callable
    readout: Callable | None


def not_needed(*names):
    """Replace missing packages that a library imports only for its readers of files."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = mock.MagicMock(__spec__=None)


def snnfuse():
    """A way is an `implementation`, perhaps with the name of a neuron behind it."""
    import neurons

    import snnfuse as sf

    def run(neuron, params, way):
        return lambda xs: sf.unroll(neuron, params, None, xs, implementation=way.partition(" ")[0])[0]

    lif = lambda way, dtype: run(*neurons.NEURONS[way.partition(" ")[2] or "lif"], way)
    return Library(sf.__version__, lif, lambda way: run(sf.LI(), sf.LIParams(0.9), way))


NODE = dict(tau=2.0, decay_input=False, v_reset=0.0, step_mode="m")


def spikingjelly():
    """SpikingJelly 2: `LIFNode`, and for 16-bit input `functional.lif_multi_step` with a float32 state.

    `LIFNode` keeps its state in the dtype of its input, and with a 16-bit state it runs a loop of Torch operations; the
    function with a float32 state runs the fused kernels. Ways: "triton" (what the wheel runs), "native" (a build from
    source), "storage" (the function with the state stored in the input's dtype), "cast" (the input cast to float32). The
    readout is a LIF that never spikes, because the kernels can return the membranes.
    """
    import torch
    from spikingjelly._ops.lif import _selection
    from spikingjelly.activation_based import functional, neuron, surrogate

    def provide(way):
        """The same as setting SJ_LIF_CUDA_IMPLEMENTATION before the import."""
        wanted = "cuda" if way == "native" else "triton"
        _selection._requested = wanted
        _selection._selections.clear()
        _selection._compiled_selections.clear()
        if torch.cuda.is_available():
            runs = functional.neuron_implementation("lif", torch.device("cuda", 0))["implementation"]
            if wanted not in runs:
                raise RuntimeError(f"{way!r} would run {runs!r}")

    def multi_step(xs, tau=2.0, threshold=1.0, **options):
        state = torch.zeros_like(xs[0], dtype=options.pop("state", torch.float32))  # in the layout of the input
        return functional.lif_multi_step(xs, state, tau, False, threshold, 0.0, surrogate.ATan(), False, **options)

    def lif(way, dtype):
        provide(way)
        if way == "storage":
            kind = getattr(torch, dtype)
            return lambda xs: multi_step(xs, state=kind, neuron_storage=kind)[0]
        if way != "cast" and dtype != "float32":
            return lambda xs: multi_step(xs)[0]
        return _node(neuron.LIFNode(**NODE, surrogate_function=surrogate.ATan()), torch.float32)

    def readout(way):
        provide(way)
        return lambda xs: multi_step(xs, tau=10.0, threshold=1e9, store_v_seq=True)[2]

    return Library(version("spikingjelly"), lif, readout)


def _node(layer, dtype):
    def run(xs):
        layer.reset()
        return layer(xs.to(dtype))

    return run


def snntorch():
    """`Leaky`, one step at a time. It spikes at u > threshold and keeps the spike out of the reset's gradient."""
    import snntorch
    import torch
    from snntorch import surrogate

    def over_time(layer, xs, which):
        layer = layer.to(xs.device)
        membrane, outs = layer.reset_mem(), []
        for x in xs:
            spike, membrane = layer(x, membrane)
            outs.append((spike, membrane)[which])
        return torch.stack(outs)

    leaky = snntorch.Leaky(0.5, spike_grad=surrogate.atan(alpha=2.0), reset_mechanism="zero")
    integrator = snntorch.Leaky(0.9, reset_mechanism="none")
    lif = lambda way, dtype: lambda xs: over_time(leaky, xs, 0)
    return Library(snntorch.__version__, lif, lambda way: lambda xs: over_time(integrator, xs, 1))


def norse():
    """`LIFBoxCell`, one step at a time. It scales its input (so it gets twice as much), spikes at u > threshold, has no ATan."""
    import torch

    not_needed("h5py")
    import norse.torch as nt

    def over_time(cell, state, xs):
        cell, outs = cell.to(xs.device), []
        for x in xs:
            out, state = cell(x, state)
            outs.append(out)
        return torch.stack(outs)

    zeros = lambda xs: torch.zeros_like(xs[0])
    cell = nt.LIFBoxCell(nt.LIFBoxParameters(tau_mem_inv=torch.tensor(0.5), alpha=torch.tensor(1.0)), dt=1.0)
    integrator = nt.LIBoxCell(nt.LIBoxParameters(tau_mem_inv=torch.tensor(0.1)), dt=1.0)
    lif = lambda way, dtype: lambda xs: over_time(cell, nt.LIFBoxFeedForwardState(v=zeros(xs)), 2 * xs)
    readout = lambda way: lambda xs: over_time(integrator, nt.LIBoxState(v=zeros(xs)), 10 * xs)
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
    """`unroll` of `LIF`. It scales its input (so it gets twice as much) and spikes at u > threshold. Way "remat" recomputes a step."""
    import jaxpike

    run = lambda layer, gain, way: lambda xs: jaxpike.unroll(layer, gain * xs, remat_step=way == "remat")[0]
    layer = jaxpike.LIF(1 / math.log(2), reset="zero", surrogate=jaxpike.ATan())
    integrator = jaxpike.LeakyIntegrator(-1 / math.log(0.9))
    lif = lambda way, dtype: run(layer, 2, way)
    return Library(jaxpike.__version__, lif, lambda way: run(integrator, 10, way))


def sparx():
    """`pip install sparxml`: its Flax layers. A way is the number of steps in one iteration of its loop.

    Its import sets XLA's --xla_allow_excess_precision=false, only in its own process, as its users have it.
    """
    import sparx

    steps = lambda way: int(way.removeprefix("unroll "))
    apply = lambda layer: lambda xs: layer.apply({}, xs)
    lif = lambda way, dtype: apply(sparx.nn.LIF(tau=1 / math.log(2), reset="zero", unroll=steps(way)))
    return Library(sparx.__version__, lif, lambda way: apply(sparx.nn.LI(tau=-1 / math.log(0.9), unroll=steps(way))))


TABLE = {  # library: (the module that times it, the neuron of ours that computes the same)
    "snnfuse": ("with_jax", "lif"),
    "spikingjelly": ("with_torch", "lif"),
    "snntorch": ("with_torch", "above, reset detached"),
    "norse": ("with_torch", "above, super"),
    "spyx": ("with_jax", "late"),
    "jaxpike": ("with_jax", "above"),
    "sparx": ("with_jax", "lif"),
}
