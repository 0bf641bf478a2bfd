"""Reading: a graph as a model."""

import warnings
from collections import Counter
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnfuse import nn
from snnfuse.core import neurons
from snnfuse.core.reset import HardReset, SoftReset
from snnfuse.core.surrogate import ATan, Surrogate
from snnfuse.interop import snntorch
from snnfuse.interop.nir.dialect import Dialect, require
from snnfuse.interop.nir.layers import Flatten, Graph, Pool, Scale, Shift, Threshold, chain


def from_nir(graph: Any, dialect: Dialect, *, surrogate: Surrogate = ATan()) -> nn.Temporal:  # noqa: B008
    """The model of a NIR graph: a `snnfuse.nn.Sequential`, or a `Graph` where connections skip.

    Args:
      graph: a `nir.NIRGraph`, or the path of a .nir file, with one Input and one Output. Edges into one node are summed.
        Subgraphs are opened. A loop may go from an IF, LIF or CubaLIF through one Linear or Affine back to it: that is a
        `snnfuse.nn.Recurrent`. Other loops are refused.
      dialect: how its neurons step: `SNNTORCH`, `SPIKINGJELLY`, `NORSE` or `SINABS`, the exporter that wrote it; or `NIR` or a
        `Dialect(dt=...)`. It has no default: a file holds no dt, and with a wrong one a network may never spike.
      surrogate: of every spiking layer.

    A neuron parameter that is the same everywhere becomes a number, another an array by channel or neuron; v_leak and
    v_reset must be the same everywhere. Where the gain of the input is neither 1 nor 1 - decay, a `Scale` stands before
    the neuron.

    Warns:
      UserWarning: a neuron node that no 0/1 input to the layer before it can make spike within 1,000 steps. Often dt is wrong.

    Raises:
      NotImplementedError: a node or connection that has no counterpart here, by name.
      ValueError: the graph is not one: loose ends, an edge that is there twice, another number of Inputs or Outputs than
        one, a parameter that is NaN or infinite; or the file cannot be read.
    """
    nir = require()
    if isinstance(graph, str | Path):
        graph = _read(nir, graph)
    if not isinstance(graph, nir.NIRGraph):
        raise TypeError(f"graph must be a nir.NIRGraph or the path of a .nir file; got {type(graph).__name__}")
    nodes, edges, entry, exit = _open(nir, graph)
    before = {name: [a for a, b in edges if b == name] for name in nodes}
    for name, node in nodes.items():
        _check_finite(name, node)
        _warn_if_silent(name, node, [nodes[a] for a in before[name]], dialect)
    loops = _loops(nir, nodes, before)
    for neuron, w in loops.items():
        before[neuron].remove(w)
        del before[w]
    edges = [(a, b) for a, b in edges if a in before and b in before]
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError as error:
        loop = " -> ".join(reversed(error.args[1]))
        raise NotImplementedError(
            f"graph: a loop must go from an IF, LIF or CubaLIF through one Linear or Affine back to it; got {loop}"
        ) from None
    layers, sources, made = [], [], {entry: (-1,)}
    for name in order:
        came = tuple(i for a in before[name] for i in made[a]) if name != entry else (-1,)
        if not came or (name != exit and not any(name == a for a, _ in edges)):
            raise ValueError(f"graph: nothing comes {'from' if came else 'to'} node {name!r}")
        if isinstance(nodes[name], nir.Input | nir.Output):
            made[name] = came
            continue
        made_here = _layers(name, nodes[name], dialect, surrogate)
        if name in loops:
            made_here = _recurrent(loops[name], nodes[loops[name]], made_here)
        for layer in made_here:
            layers.append(layer)
            sources.append(came)
            came = (len(layers) - 1,)
        made[name] = came
    sources.append(made[exit])
    if sources == chain(layers):
        return nn.Sequential(*layers)
    return Graph(layers, sources)


def _loops(nir, nodes, before):
    """{neuron: the Linear or Affine through which its spikes come back to it}."""
    after = {name: [b for b in nodes if name in before[b]] for name in nodes}
    linear = [name for name, node in nodes.items() if isinstance(node, nir.Linear | nir.Affine)]
    around = {before[w][0]: w for w in linear if len(before[w]) == 1 and before[w] == after[w]}
    return {a: w for a, w in around.items() if isinstance(nodes[a], nir.IF | nir.LIF | nir.CubaLIF)}


def _recurrent(name, node, layers):
    """The layers of a neuron, with the feedback through `node`. A `Scale` before the neuron also scales what comes back."""
    *scales, neuron = layers
    weight, gain = _float32(node.weight), 1.0
    for scale in scales:
        gain = gain * np.asarray(scale.scale[...])
    if weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
        raise ValueError(f"node {name!r}: the weight of a loop must be [N, N]; got shape {weight.shape}")
    bias = getattr(node, "bias", None)
    shifts = [] if bias is None or not np.any(bias) else [Shift(gain * _float32(bias))]
    layer = nn.Recurrent(neuron, len(weight), rngs=nnx.Rngs(0))
    layer.weight[...] = jnp.asarray(weight.T * gain, jnp.float32)
    return [*scales, *shifts, layer]


def _read(nir, path):
    try:
        return nir.read(path, type_check=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # h5py and nir raise OSError, TypeError, AssertionError, KeyError, ... without the path
        raise ValueError(f"{path} cannot be read as a NIR graph: {type(error).__name__}: {error}") from error


def _check_finite(name, node):
    for field, value in vars(node).items():
        if isinstance(value, np.ndarray | float) and np.issubdtype(np.asarray(value).dtype, np.floating):
            if bad := int(np.sum(~np.isfinite(value))):
                raise ValueError(
                    f"node {name!r}: {field} must be finite; got {bad} NaN or infinite of {np.size(value)}"
                )


STEPS_TO_SPIKE = 1000


def _warn_if_silent(name, node, sources, dialect):
    """Warn where every neuron needs more than `STEPS_TO_SPIKE` steps of the strongest input, each source fed 0 or 1."""
    kind = type(node).__name__
    known = ("Affine", "Linear", "Conv1d", "Conv2d")
    if kind not in ("IF", "LIF") or not sources or any(type(source).__name__ not in known for source in sources):
        return
    drive = 0.0
    for source in sources:
        weight = np.asarray(source.weight, np.float64)
        bias = getattr(source, "bias", None)
        strongest = np.maximum(weight, 0).sum(tuple(range(1, weight.ndim))) + (0 if bias is None else np.asarray(bias))
        drive = drive + strongest.max()
    jumps = kind in dialect.jumps
    if kind == "IF":
        rest, one_step = 0.0, 1.0 if jumps else dialect.dt
        total = STEPS_TO_SPIKE * one_step
    else:
        decay = _decay(name, node.tau, dialect)
        rest, one_step = np.max(node.v_leak), 1.0 if jumps else 1 - decay.min()
        total = np.sum(decay.max() ** np.arange(STEPS_TO_SPIKE)) if jumps else 1 - decay.min() ** STEPS_TO_SPIKE
    drive, threshold = np.max(node.r) * drive, np.min(node.v_threshold)
    if rest + drive * total < threshold:
        warnings.warn(
            f"node {name!r} cannot spike within {STEPS_TO_SPIKE} steps on any 0/1 input: one step adds at most "
            f"{drive * one_step:.3g} to a membrane whose threshold is {threshold:.3g}. Is dt = {dialect.dt:g} the exporter's?",
            stacklevel=3,
        )


def _layers(name: str, node: Any, dialect: Dialect, surrogate: Surrogate) -> list[Callable]:
    kind = type(node).__name__
    if kind in ("Affine", "Linear"):
        return [_linear(name, node)]
    if kind in ("Conv1d", "Conv2d"):
        return [_conv(node, int(kind[4]))]
    if kind in ("SumPool2d", "AvgPool2d"):
        window, stride, padding = (_tuple(a, 2) for a in (node.kernel_size, node.stride, node.padding))
        return [Pool("sum" if kind == "SumPool2d" else "mean", window, stride, padding)]
    if kind == "Flatten":
        return [Flatten(int(node.start_dim), int(node.end_dim))]
    if kind == "Scale":
        return [Scale(_last(node.scale))]
    if kind == "Threshold":
        return [Threshold(_firing(_last(node.threshold), dialect), surrogate)]
    if kind in ("IF", "I", "LIF", "LI", "CubaLIF", "CubaLI"):
        return _neuron(name, kind, node, dialect, surrogate)
    raise NotImplementedError(f"node {name!r}: {kind} is not supported")


def _linear(name, node):
    weight = _float32(node.weight)
    if weight.ndim != 2:
        raise NotImplementedError(f"node {name!r}: weight must be [out, in]; got shape {weight.shape}")
    bias = getattr(node, "bias", None)
    return nnx.Linear(
        *weight.shape[::-1],
        use_bias=bias is not None,
        kernel_init=lambda *_: jnp.asarray(weight.T),
        bias_init=lambda *_: jnp.asarray(_float32(bias)),
        rngs=nnx.Rngs(0),
    )


def _conv(node, dims):
    weight = _float32(node.weight)  # [out, in / groups, *kernel]
    padding = node.padding.decode() if isinstance(node.padding, bytes) else node.padding
    return nnx.Conv(
        weight.shape[1] * int(node.groups),
        weight.shape[0],
        weight.shape[2:],
        strides=_tuple(node.stride, dims),
        padding=padding.upper() if isinstance(padding, str) else [(p, p) for p in _tuple(padding, dims)],
        kernel_dilation=_tuple(node.dilation, dims),
        feature_group_count=int(node.groups),
        use_bias=node.bias is not None,
        kernel_init=lambda *_: jnp.asarray(np.moveaxis(weight, (0, 1), (-1, -2))),
        bias_init=lambda *_: jnp.asarray(_float32(node.bias)),
        rngs=nnx.Rngs(0),
    )


def _neuron(name, kind, node, dialect, surrogate):
    jumps, options, before = kind in dialect.jumps, {}, []
    if leakless := kind in ("IF", "I"):
        decay, gain = 1.0, _last(node.r) * (1.0 if jumps else dialect.dt)
    else:
        decay = _decay(name, node.tau_mem if "Cuba" in kind else node.tau, dialect)
        gain = _last(node.r) * (1.0 if jumps and "Cuba" not in kind else 1 - decay)
        options["v_rest"] = _same(name, "v_leak", node.v_leak)
    if "Cuba" in kind:
        decay_syn = _decay(name, node.tau_syn, dialect)
        gain = gain * (
            _last(node.w_in) * (1.0 if jumps else 1 - decay_syn)
        )  # i is linear: its gains are one, before it
    of_snntorch = dialect.reset in ("late", "prompt") and kind in ("IF", "LIF", "CubaLIF")
    if of_snntorch and options.pop("v_rest", 0.0) != 0:
        raise NotImplementedError(f"node {name!r}: snnTorch's neurons leak to 0; got v_leak {_number(node.v_leak)}")
    if not (leakless or of_snntorch) and np.allclose(gain, 1 - decay, rtol=1e-5, atol=0):
        options["decay_input"] = True
    elif not np.allclose(gain, 1, rtol=1e-5, atol=0):
        before = [Scale(gain)]
    decay = _number(decay)
    if kind in ("I", "LI", "CubaLI"):
        synapse = [nn.LI(decay=_number(decay_syn))] if kind == "CubaLI" else []
        return [*before, *synapse, nn.LI(decay=decay, **options)]
    options |= {"threshold": _number(_firing(_last(node.v_threshold), dialect)), "surrogate": surrogate}
    if of_snntorch:
        choices = {"reset_delay": dialect.reset == "late", "surrogate": surrogate}
        if kind == "CubaLIF":
            params = neurons.CubaLIFParams(_number(decay_syn), decay, options["threshold"])
            return [*before, nn.Spiking(snntorch.Synaptic, params, **choices)]
        return [*before, nn.Spiking(snntorch.Leaky, neurons.LIFParams(decay, options["threshold"]), **choices)]
    if dialect.reset == "hard":
        options["reset"] = HardReset(_same(name, "v_reset", node.v_reset), dialect.detach)
    else:
        options["reset"] = SoftReset(dialect.detach)
    if kind == "IF":
        return [*before, nn.IF(**options)]
    if kind == "LIF":
        return [*before, nn.LIF(decay=decay, **options)]
    return [*before, nn.CubaLIF(decay_syn=_number(decay_syn), decay=decay, **options)]


def _decay(name, tau, dialect):
    tau = _last(tau)
    if not np.all(tau > 0) or (dialect.decay == "euler" and not np.all(tau >= dialect.dt * (1 - 1e-6))):
        least = "above 0" if dialect.decay == "exponential" else f"at least dt = {dialect.dt:g}"
        raise ValueError(f"node {name!r}: time constants must be {least}; got {tau.min():g}. Is dt of another unit?")
    return np.maximum(1 - dialect.dt / tau, 0) if dialect.decay == "euler" else np.exp(-dialect.dt / tau)


def _firing(threshold, dialect):
    """The float32 threshold at or above which it fires."""
    threshold = np.asarray(threshold, np.float32)
    return np.nextafter(threshold, np.float32(np.inf)) if dialect.fires == ">" else threshold


def _last(value):
    """A parameter [C, H, W] or [N] of NIR, channels last, float64."""
    value = np.asarray(value, np.float64)
    return np.moveaxis(value, 0, -1) if value.ndim > 1 else value


def _number(value):
    """A float where all are the same, else a float32 array."""
    value = np.asarray(value)
    return float(value.flat[0]) if (value == value.flat[0]).all() else jnp.asarray(value, jnp.float32)


def _same(name, field, value):
    value = _number(np.asarray(value, np.float64))
    if not isinstance(value, float):
        raise NotImplementedError(
            f"node {name!r}: {field} must be the same for all neurons; got {value.ravel()[:4]}..."
        )
    return value


def _tuple(value, dims):
    return tuple(int(v) for v in np.broadcast_to(np.asarray(value), dims))


def _float32(value):
    return np.asarray(value, np.float32)


def _open(nir, graph, prefix=""):
    """All nodes of a graph and its subgraphs by name, the edges, and the names of its Input and its Output."""
    nodes, edges, ends = {}, [], {}
    for name, node in graph.nodes.items():
        if isinstance(node, nir.NIRGraph):
            inner, inner_edges, *ends[name] = _open(nir, node, f"{prefix}{name}.")
            nodes |= inner
            edges += inner_edges
        else:
            nodes[prefix + name] = node
    for a, b in graph.edges:
        if missing := [n for n in (a, b) if n not in graph.nodes]:
            raise ValueError(f"graph: the edge {prefix}{a} -> {prefix}{b} names no node {missing[0]!r}")
        edges.append((ends[a][1] if a in ends else prefix + a, ends[b][0] if b in ends else prefix + b))
    if twice := [edge for edge, count in Counter(edges).items() if count > 1]:
        raise ValueError(f"graph: the edge {twice[0][0]} -> {twice[0][1]} is there twice")
    found = []
    for kind in (nir.Input, nir.Output):
        names = [prefix + name for name, node in graph.nodes.items() if isinstance(node, kind)]
        if len(names) != 1:
            where = f"subgraph {prefix[:-1]!r}" if prefix else "graph"
            raise ValueError(f"{where} must have one {kind.__name__}; got {len(names)}: {names}")
        found += names
    return nodes, edges, *found
