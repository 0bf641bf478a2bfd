"""NIR, the Neuromorphic Intermediate Representation: `from_nir` makes a model of a graph, `to_nir` a graph of a model.

NIR's neurons are equations in continuous time, which every simulator steps in its own way; and not all that a simulator
does is in its files. A `Dialect` says how: `NIR` is the definition, forward Euler at 0.1 ms, the others are what the
exporters of that name write (read in snnTorch 1.0, SpikingJelly 2.0, Norse 1.1, sinabs 2.0). With u the membrane before
and v after the reset, a node steps as

    LIF      u[t] = v_leak + decay (v[t-1] - v_leak) + (1 - decay) r x[t],   decay = 1 - dt / tau or exp(-dt / tau)
    LI       the same, v = u its output
    CubaLIF  i[t] = decay_syn i[t-1] + (1 - decay_syn) w_in x[t], and LIF of i[t];   CubaLI likewise
    IF, I    u[t] = v[t-1] + dt r x[t]
    spike    s[t] = u[t] > v_threshold;   v[t] = (1 - s[t]) u[t] + s[t] v_reset

from i = 0, v = v_leak (IF, I: 0). Pedersen et al. 2024, https://doi.org/10.1038/s41467-024-52259-9. Extra `nir`.

Layout. NIR's signals are [C, H, W], [C, L] or [N]; here [T, B, H, W, C], [T, B, L, C] or [T, B, N]. Weights and parameters
are turned around accordingly. `Flatten` keeps NIR's order, so the weights after it are as in the file; `to_nir` turns
those after `snnfuse.nn.flatten`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from snnfuse import nn
from snnfuse.core import neurons
from snnfuse.core.neuron import PyTree
from snnfuse.core.reset import HardReset, SoftReset
from snnfuse.core.surrogate import ATan, Surrogate, spike


@dataclass(frozen=True)
class Dialect:
    """How a simulator steps NIR's equations, and what its files leave out. Change one by `dataclasses.replace`.

    Args:
      dt: of a step, in the unit of the file's time constants (NIR: seconds).
      decay: "euler", 1 - dt / tau, or "exponential", exp(-dt / tau).
      reset: "hard" (NIR's: v = v_reset), "soft" (v = u - v_threshold; v_reset is not looked at), or "late" (soft, but
        after the decay of the next step: u[t] = decay u[t-1] + ... - v_threshold s[t-1]).
      fires: ">" (NIR's) or ">=" the threshold. Exact in both: float32 has a next number.
      jumps: types of nodes whose input is added whole, not integrated over dt: of "LIF", "LI", "IF" and "I" (gain r),
        "CubaLIF" and "CubaLI" (gain w_in).
    """

    dt: float = 1e-4
    decay: Literal["euler", "exponential"] = "euler"
    reset: Literal["hard", "soft", "late"] = "hard"
    fires: Literal[">", ">="] = ">"
    jumps: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.dt > 0:
            raise ValueError(f"dt must be above 0; got {self.dt}")
        for name, choices in {
            "decay": ("euler", "exponential"),
            "reset": ("hard", "soft", "late"),
            "fires": (">", ">="),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}; got {getattr(self, name)!r}")
        if unknown := set(self.jumps) - {"LIF", "LI", "IF", "I", "CubaLIF", "CubaLI"}:
            raise ValueError(f"jumps must name types of NIR neurons; got {sorted(unknown)}")


NIR = Dialect()
# Leaky and Synaptic as they are made by default; reset_delay=False is reset="soft", Leaky's reset_mechanism="zero" "hard"
SNNTORCH = Dialect(reset="late")
SPIKINGJELLY = Dialect(fires=">=")
# Norse's exporter multiplies tau by its dt, 1 ms, where its importer does not: to export to it, Dialect(dt=1e-3, jumps=("IF",))
NORSE = Dialect(dt=1e-6, jumps=("IF", "CubaLIF"))
# LIF, IAF and ExpLeak with spike_fn=SingleSpike and no min_v_mem; LIF(norm_input=False) is jumps=("LIF", "LI"). tau in steps
SINABS = Dialect(dt=1.0, decay="exponential", reset="soft", fires=">=", jumps=("LI",))


def from_nir(graph: Any, dialect: Dialect = NIR, *, surrogate: Surrogate = ATan()) -> nn.Temporal:  # noqa: B008
    """The model of a NIR graph: a `snnfuse.nn.Sequential`, or a `Graph` where connections skip.

    Args:
      graph: a `nir.NIRGraph`, or the path of a .nir file; feed-forward, with one Input and one Output. Edges into one
        node are summed. Subgraphs are opened.
      dialect: how its neurons step; `NIR`, or the exporter that wrote it: `SNNTORCH`, `SPIKINGJELLY`, `NORSE`, `SINABS`.
      surrogate: of every spiking layer.

    A neuron parameter that is the same everywhere becomes a number, another an array by channel or neuron; v_leak and
    v_reset must be the same everywhere. Where the gain of the input is neither 1 nor 1 - decay, a `Scale` stands before
    the neuron.

    Raises:
      NotImplementedError: a node or connection that has no counterpart here, by name.
      ValueError: the graph is not one: loose ends, another number of Inputs or Outputs than one.
    """
    nir = _nir()
    if isinstance(graph, str | Path):
        graph = nir.read(graph, type_check=False)
    if not isinstance(graph, nir.NIRGraph):
        raise TypeError(f"graph must be a nir.NIRGraph or the path of a .nir file; got {type(graph).__name__}")
    nodes, edges, entry, exit = _open(nir, graph)
    before = {name: [a for a, b in edges if b == name] for name in nodes}
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError as error:
        loop = " -> ".join(reversed(error.args[1]))
        raise NotImplementedError(f"graph: recurrent connections are not supported; got {loop}") from None
    layers, sources, made = [], [], {entry: (-1,)}
    for name in order:
        came = tuple(i for a in before[name] for i in made[a]) if name != entry else (-1,)
        if not came or (name != exit and not any(name == a for a, _ in edges)):
            raise ValueError(f"graph: nothing comes {'from' if came else 'to'} node {name!r}")
        if isinstance(nodes[name], nir.Input | nir.Output):
            made[name] = came
            continue
        for layer in _layers(name, nodes[name], dialect, surrogate):
            layers.append(layer)
            sources.append(came)
            came = (len(layers) - 1,)
        made[name] = came
    sources.append(made[exit])
    if sources == _chain(layers):
        return nn.Sequential(*layers)
    return Graph(layers, sources)


def to_nir(model: nn.Sequential, input_shape: Sequence[int], dialect: Dialect = NIR) -> Any:
    """The `nir.NIRGraph` of a model, as it is in evaluation; `nir.write(path, graph)` makes a file of it.

    Args:
      model: a `snnfuse.nn.Sequential` or `Graph` of nnx.Linear, nnx.Conv (1d, 2d), IF, LIF, ParametricLIF, CubaLIF, LI,
        `snnfuse.nn.flatten`, partial(nnx.avg_pool, ...), the layers of this file, and nnx.BatchNorm right after a Conv
        or Linear, whose weights take it in.
      input_shape: of one sample in one step, channels last: (H, W, C), (L, C) or (N,).
      dialect: of who is to read it. Its reset must be that of the model.

    Raises:
      NotImplementedError: a layer that NIR, or the dialect, has no word for, by its place in the model.
    """
    nir = _nir()
    layers, sources = _flat(model)
    users = [sum(s.count(i) for s in sources) for i in range(len(layers))]
    at = {-1: _Signal("input", tuple(input_shape))}
    nodes, edges = {"input": nir.Input(_first(input_shape))}, []
    for i, layer in enumerate(layers):
        came = [at[s] for s in sources[i]]
        signal, shape = came[0], came[0].shape
        name = f"{_name(layer).lower()}_{i}"
        _check_same(came, f"layer {i} ({_name(layer)})")
        if isinstance(layer, nnx.BatchNorm):
            if len(came) > 1 or sources[i][0] < 0 or users[sources[i][0]] > 1:
                raise NotImplementedError(
                    f"layer {i} (BatchNorm) must follow one Conv or Linear, and be alone to do so"
                )
            nodes[signal.name] = _normalised(nir, nodes[signal.name], layer, f"layer {i} (BatchNorm)")
            at[i] = signal
            continue
        node, order = _node(nir, layer, signal, dialect, f"layer {i} ({_name(layer)})")
        xs = jax.ShapeDtypeStruct((1, 1, *shape), jnp.float32)
        run = layer if isinstance(layer, nn.Temporal) else nn.Folded(layer)
        outs = nnx.eval_shape(lambda layer, xs: layer(xs), run, xs)
        shape = (outs[0] if isinstance(layer, nn.Temporal) else outs).shape[2:]
        if node is None:  # a flatten of what is flat
            at[i] = _Signal(signal.name, shape, order)
            continue
        nodes[name] = node
        edges += [(s.name, name) for s in came]
        at[i] = _Signal(name, shape, order)
    came = [at[s] for s in sources[-1]]
    _check_same(came, "the output")
    if came[0].order is not None:
        raise NotImplementedError(
            "the output is in the order of snnfuse.nn.flatten: put a Linear, or nir.Flatten, there"
        )
    nodes["output"] = nir.Output(_first(came[0].shape))
    return nir.NIRGraph(nodes, [*edges, *((s.name, "output") for s in came)])


class Graph(nn.Temporal):
    """Layers of which each is fed the sum of what its sources made. The state is a tuple, one entry a temporal layer.

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
        before = iter([None] * count if state is None else state)
        made, after = [xs], []
        for layer, places in zip(self.layers, self.sources, strict=False):
            x = sum(made[place + 1] for place in places[1:]) + made[places[0] + 1]
            if isinstance(layer, nn.Temporal):
                x, s = layer(x, next(before))
                after.append(s)
            else:
                x = layer(x)
            made.append(x)
        return sum(made[place + 1] for place in self.sources[-1]), tuple(after)


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


@dataclass(frozen=True)
class LateSoftReset:
    """v = u - s threshold / decay: the threshold is taken off after the next decay, as snnTorch's reset_delay=True does."""

    decay: float

    def __call__(self, u, s, threshold):
        return u - s * (threshold / self.decay)


# Reading: a node as layers.


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
    if not leakless and np.allclose(gain, 1 - decay, rtol=1e-5, atol=0):
        options["decay_input"] = True
    elif not np.allclose(gain, 1, rtol=1e-5, atol=0):
        before = [Scale(gain)]
    decay = _number(decay)
    if kind in ("I", "LI", "CubaLI"):
        synapse = [nn.LI(decay=_number(decay_syn))] if kind == "CubaLI" else []
        return [*before, *synapse, nn.LI(decay=decay, **options)]
    options |= {"threshold": _number(_firing(_last(node.v_threshold), dialect)), "surrogate": surrogate}
    if dialect.reset == "hard":
        options["reset"] = HardReset(_same(name, "v_reset", node.v_reset))
    elif dialect.reset == "soft":
        options["reset"] = SoftReset()
    elif not isinstance(decay, float) or decay == 0:
        raise NotImplementedError(f"node {name!r}: the late reset needs one decay above 0 for all neurons; got {decay}")
    else:
        options["reset"] = LateSoftReset(decay)
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
    found = []
    for kind in (nir.Input, nir.Output):
        names = [prefix + name for name, node in graph.nodes.items() if isinstance(node, kind)]
        if len(names) != 1:
            where = f"subgraph {prefix[:-1]!r}" if prefix else "graph"
            raise ValueError(f"{where} must have one {kind.__name__}; got {len(names)}: {names}")
        found += names
    return nodes, edges, *found


def _chain(layers):
    return [(i - 1,) for i in range(len(layers) + 1)]


# Writing: a layer as a node.


@dataclass(frozen=True)
class _Signal:
    """What node `name` puts out: [*shape] here; `order`[k] is the place in NIR of our k-th, None where it is the same."""

    name: str
    shape: tuple[int, ...]
    order: np.ndarray | None = None


def _flat(model):
    """The layers of nested Sequentials, with their sources."""
    if isinstance(model, Graph):
        return [layer.layer if isinstance(layer, nn.Folded) else layer for layer in model.layers], model.sources
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"model must be a snnfuse.nn.Sequential or a Graph; got {type(model).__name__}")
    layers = []
    for layer in model.layers:
        layer = layer.layer if isinstance(layer, nn.Folded) else layer
        layers += _flat(layer)[0] if isinstance(layer, nn.Sequential) else [layer]
    return layers, _chain(layers)


def _node(nir, layer, signal, dialect, where):
    """(the node, the order of what it puts out)."""
    shape, order = signal.shape, signal.order
    if isinstance(layer, nn.Spiking):
        return _neuron_node(nir, layer, signal, dialect, where), order
    if isinstance(layer, nnx.Linear):
        return _linear_node(nir, layer, signal, where), None
    if isinstance(layer, Scale):
        return nir.Scale(_nir_layout(layer.scale[...], signal)), order
    if isinstance(layer, Threshold):
        return nir.Threshold(_nir_layout(_above(layer.threshold[...], dialect), signal)), order
    if layer is nn.flatten:
        if len(shape) < 2:
            return None, order
        places = np.moveaxis(np.arange(np.prod(shape)).reshape(_first(shape)), 0, -1)
        return nir.Flatten(_first(shape), 0, -1), places.ravel()
    if isinstance(layer, Flatten):
        return nir.Flatten(_first(shape), layer.start_dim, layer.end_dim), order
    if isinstance(layer, nnx.Conv) and len(shape) in (2, 3):
        return _conv_node(nir, layer, shape, where), None
    if isinstance(layer, Pool):
        kind = nir.SumPool2d if layer.kind == "sum" else nir.AvgPool2d
        return kind(*map(np.array, (layer.window, layer.stride, layer.padding))), None
    if isinstance(layer, partial) and layer.func is nnx.avg_pool and len(shape) == 3:
        return _pool_node(nir, layer, shape, where), None
    raise NotImplementedError(f"{where}: NIR has no node for it on {shape}")


def _neuron_node(nir, layer, signal, dialect, where):
    neuron, params = layer.neuron, layer.params
    kind = type(neuron).__name__
    if type(neuron) not in (neurons.IF, neurons.LIF, neurons.CubaLIF, neurons.LI):
        raise NotImplementedError(f"{where}: NIR has no node for the neuron {kind}")
    fill = lambda value: _nir_layout(value, signal)
    jumps, fields = kind in dialect.jumps, {}
    if kind == "IF":
        fields["r"] = fill(1.0 if jumps else 1 / dialect.dt)
    else:
        decay = np.asarray(params.decay, np.float64)
        cuba = kind == "CubaLIF"
        gain = 1 - decay if neuron.decay_input else np.ones_like(decay)
        fields["tau_mem" if cuba else "tau"] = fill(_tau(decay, dialect, where))
        fields["r"] = fill(gain if jumps and not cuba else gain / (1 - decay))
        fields["v_leak"] = fill(neuron.v_rest)
        if cuba:
            decay = np.asarray(params.decay_syn, np.float64)
            fields["tau_syn"] = fill(_tau(decay, dialect, where))
            fields["w_in"] = fill(1.0 if jumps else 1 / (1 - decay))
    if kind != "LI":
        names = {"hard": HardReset, "soft": SoftReset, "late": LateSoftReset}
        if type(neuron.reset) is not names[dialect.reset]:
            raise NotImplementedError(
                f"{where}: its reset is {neuron.reset}, that of the dialect {dialect.reset!r}. NIR itself knows only the "
                f"hard one; dataclasses.replace(dialect, reset=...) writes another, for who reads it so"
            )
        fields["v_threshold"] = fill(_above(params.threshold, dialect))
        fields["v_reset"] = fill(getattr(neuron.reset, "v_reset", 0.0))
    return getattr(nir, kind)(**fields)


def _tau(decay, dialect, where):
    least = decay >= 0 if dialect.decay == "euler" else decay > 0
    if not np.all(least & (decay < 1)):
        raise NotImplementedError(f"{where}: decay must be in (0, 1) for a time constant; got {decay}")
    return dialect.dt / (1 - decay) if dialect.decay == "euler" else -dialect.dt / np.log(decay)


def _above(threshold, dialect):
    """The float32 threshold for `fires`, such that it fires where ours, at or above, does."""
    threshold = np.asarray(threshold, np.float32)
    return np.nextafter(threshold, np.float32(-np.inf)) if dialect.fires == ">" else threshold


def _linear_node(nir, layer, signal, where):
    if len(signal.shape) != 1:
        raise NotImplementedError(
            f"{where}: NIR's Affine takes vectors; its input is {signal.shape}. Flatten, or nnx.Conv"
        )
    weight = np.array(layer.kernel[...], np.float32).T
    if signal.order is not None:
        ours, weight = weight, np.empty_like(weight)
        weight[:, signal.order] = ours
    if layer.bias is None:
        return nir.Linear(np.ascontiguousarray(weight))
    return nir.Affine(np.ascontiguousarray(weight), np.array(layer.bias[...], np.float32))


def _conv_node(nir, layer, shape, where):
    dims = len(layer.kernel_size)
    strides, dilation, input_dilation = (
        _tuple(1 if a is None else a, dims) for a in (layer.strides, layer.kernel_dilation, layer.input_dilation)
    )
    if len(shape) != dims + 1 or input_dilation != (1,) * dims or layer.mask is not None:
        raise NotImplementedError(f"{where}: NIR has no node for it on {shape}, with input_dilation {input_dilation}")
    weight = np.moveaxis(np.array(layer.kernel[...], np.float32), (-1, -2), (0, 1))
    padding = _padding(layer.padding, shape[:-1], layer.kernel_size, strides, dilation, where)
    if any(low != high for low, high in padding):  # NIR pads alike on both sides: zeros in the kernel make up for it
        if dilation != (1,) * dims:
            raise NotImplementedError(f"{where}: NIR has no padding {padding} with kernel_dilation {dilation}")
        weight = np.pad(weight, [(0, 0)] * 2 + [(max(high - low, 0), max(low - high, 0)) for low, high in padding])
    padding = tuple(max(pair) for pair in padding)
    bias = np.zeros(weight.shape[0], np.float32) if layer.bias is None else np.array(layer.bias[...], np.float32)
    if dims == 1:
        return nir.Conv1d(shape[0], weight, strides[0], padding[0], dilation[0], layer.feature_group_count, bias)
    return nir.Conv2d(tuple(shape[:2]), weight, strides, padding, dilation, layer.feature_group_count, bias)


def _padding(padding, size, window, strides, dilation, where):
    """(low, high) of each axis."""
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise NotImplementedError(f"{where}: NIR has no padding {padding!r}")
        window = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
        return [tuple(map(int, pair)) for pair in jax.lax.padtype_to_pads(size, window, strides, padding.upper())]
    padding = [padding] * len(size) if isinstance(padding, int) else padding
    return [(p, p) if isinstance(p, int) else tuple(p) for p in padding]


def _pool_node(nir, layer, shape, where):
    options = dict(zip(("window_shape", "strides", "padding", "count_include_pad"), layer.args, strict=False))
    options |= layer.keywords
    window = tuple(options["window_shape"])
    strides = tuple(options.get("strides") or (1, 1))
    padding = _padding(options.get("padding", "VALID"), shape[:2], window, strides, (1, 1), where)
    if any(low != high for low, high in padding) or not options.get("count_include_pad", True):
        raise NotImplementedError(f"{where}: NIR's AvgPool2d pads alike on both sides and counts it; got {options}")
    return nir.AvgPool2d(np.array(window), np.array(strides), np.array([low for low, _ in padding]))


def _normalised(nir, node, norm, where):
    """The node of a Linear or Conv with a BatchNorm in evaluation taken in."""
    if type(node) not in (nir.Affine, nir.Linear, nir.Conv1d, nir.Conv2d):
        raise NotImplementedError(f"{where} must follow a Conv or Linear; it follows a {type(node).__name__}")
    scale = 1 / np.sqrt(np.asarray(norm.var[...], np.float64) + norm.epsilon)
    scale = scale * (1 if norm.scale is None else np.asarray(norm.scale[...]))
    bias = (getattr(node, "bias", 0) - np.asarray(norm.mean[...])) * scale
    bias = _float32(bias + (0 if norm.bias is None else np.asarray(norm.bias[...])))
    weight = _float32(node.weight * scale.reshape(-1, *(1,) * (node.weight.ndim - 1)))
    if isinstance(node, nir.Affine | nir.Linear):
        return nir.Affine(weight, bias)
    return type(node)(node.input_shape, weight, node.stride, node.padding, node.dilation, node.groups, bias)


def _nir_layout(value, signal):
    """A parameter that broadcasts against our `signal` in full, in NIR's layout."""
    value = np.asarray(value)
    while value.ndim > len(signal.shape) and value.shape[0] == 1:
        value = value[0]
    full = np.array(np.broadcast_to(value, signal.shape))
    if signal.order is not None:
        ours, full = full, np.empty_like(full)
        full[signal.order] = ours
    return np.ascontiguousarray(np.moveaxis(full, -1, 0))


def _first(shape):
    """A shape of ours, channels first."""
    return (shape[-1], *shape[:-1])


def _check_same(came, where):
    for other in came[1:]:
        if not np.array_equal(other.order, came[0].order) or other.shape != came[0].shape:
            raise NotImplementedError(f"{where}: its sources are of different shapes, or flattened in different orders")


def _name(layer):
    return getattr(layer, "__name__", type(layer).__name__)


def _nir():
    try:
        import nir
    except ImportError as error:
        raise ImportError(f'snnfuse.interop.nir needs nir ({error}): pip install "snnfuse[nir]"') from error
    return nir
