"""Writing: a model as a graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnfuse import nn
from snnfuse.core import neurons
from snnfuse.core.reset import HardReset, SoftReset
from snnfuse.interop import snntorch
from snnfuse.interop.nir.dialect import NIR, Dialect, require
from snnfuse.interop.nir.layers import Flatten, Graph, Pool, Scale, Shift, Threshold
from snnfuse.models.resnet import MembraneResidual, Residual
from snnfuse.ops.packing import Packed


def to_nir(model: nn.Temporal, input_shape: Sequence[int], dialect: Dialect = NIR) -> Any:
    """The `nir.NIRGraph` of a model, as it is in evaluation; `nir.write(path, graph)` makes a file of it.

    Args:
      model: a `snnfuse.nn.Sequential`, `Graph`, `snnfuse.models.Residual` ("sum", "add") or `MembraneResidual`, nested at will, of
        Linear and Conv (of nnx, 1d and 2d, and of snnfuse.nn), IF, LIF, ParametricLIF, CubaLIF, LI, Recurrent, NormSpiking,
        `snnfuse.nn.flatten` and `mean_pool`, partial(nnx.avg_pool, ...), the layers of this package, and BatchNorm. If only a
        BatchNorm follows a Conv or Linear, their weights take it in. Elsewhere it is a node of its own: a convolution of 1 x 1, or
        for vectors a diagonal matrix.
      input_shape: of one sample in one step, channels last: (H, W, C), (L, C) or (N,).
      dialect: of who is to read it. Its reset must be that of the model.

    Raises:
      NotImplementedError: a layer that NIR, or the dialect, has no word for, by its place in the order of the layers.
      ValueError: `input_shape` is no shape, or not one that the layers take.
    """
    nir = require()
    _check_shape(input_shape)
    layers, sources = _flat(model)
    users = [sum(s.count(i) for s in sources) for i in range(len(layers))]
    at = {-1: _Signal("input", tuple(input_shape))}
    nodes, edges = {"input": nir.Input(_shape(input_shape))}, []
    for i, layer in enumerate(layers):
        came = [at[s] for s in sources[i]]
        signal, shape = came[0], came[0].shape
        name = f"{_name(layer).lower()}_{i}"
        _check_same(came, f"layer {i} ({_name(layer)})")
        if isinstance(layer, nnx.BatchNorm):
            if layer.num_features != shape[-1]:
                raise ValueError(
                    f"input_shape must fit layer {i} (BatchNorm), which has {layer.num_features} features; got {input_shape}, of which "
                    f"it is given {shape}"
                )
            weights = type(nodes[signal.name]) in (nir.Affine, nir.Linear, nir.Conv1d, nir.Conv2d)
            if weights and len(came) == 1 and users[sources[i][0]] == 1:
                nodes[signal.name] = _normalised(nir, nodes[signal.name], layer)
                at[i] = signal
                continue
            node, order = _normalised(nir, _identity_node(nir, signal, f"layer {i} (BatchNorm)"), layer), None
        else:
            _check_fits(layer, shape, input_shape, f"layer {i} ({_name(layer)})")
            try:
                node, order = _node(nir, layer, signal, dialect, f"layer {i} ({_name(layer)})")
                shape = _shape_after(layer, shape)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"input_shape must fit layer {i} ({_name(layer)}); got {input_shape}, of which it is given {shape}: {error}"
                ) from error
        if node is None:  # a flatten of what is flat
            at[i] = _Signal(signal.name, shape, order)
            continue
        # NIR's own inference takes every kernel for square
        node.input_type, node.output_type = {"input": _shape(signal.shape)}, {"output": _shape(shape)}
        nodes[name] = node
        edges += [(s.name, name) for s in came]
        if isinstance(layer, nn.Recurrent):
            back = f"{name}_back"
            nodes[back] = _feedback_node(nir, layer, order)
            edges += [(name, back), (back, name)]
        at[i] = _Signal(name, shape, order)
    came = [at[s] for s in sources[-1]]
    _check_same(came, "the output")
    if came[0].order is not None:
        raise NotImplementedError(
            "the output is in the order of snnfuse.nn.flatten: put a Linear, or nir.Flatten, there"
        )
    nodes["output"] = nir.Output(_shape(came[0].shape))
    return nir.NIRGraph(nodes, [*edges, *((s.name, "output") for s in came)])


@dataclass(frozen=True)
class _Signal:
    """What node `name` puts out: [*shape] here; `order`[k] is the place in NIR of our k-th, None where it is the same."""

    name: str
    shape: tuple[int, ...]
    order: np.ndarray | None = None


def _flat(model):
    """(the layers of what is nested, in order, and what each is fed: the `sources` of a `Graph`)."""
    layers, sources = [], []

    def put(layer, came):
        if isinstance(layer, nn.Folded | nn.Remat):
            return put(layer.layer, came)
        if isinstance(layer, nn.PackSpikes):
            return came
        if isinstance(layer, nn.Sequential):
            for inner in layer.layers:
                came = put(inner, came)
            return came
        if isinstance(layer, Graph):
            made = [came]
            for inner, places in zip(layer.layers, layer.sources, strict=False):
                made.append(put(inner, sum((made[p + 1] for p in places), ())))
            return sum((made[p + 1] for p in layer.sources[-1]), ())
        if isinstance(layer, nn.NormSpiking) and layer.connect == "sum" and layer.shortcut_norm is None:
            return put(layer.neuron, put(layer.norm, came))
        if isinstance(layer, Residual) and layer.join.connect in ("sum", "add"):
            join, inner = layer.join, put(layer.join.norm, put(layer.main, came))
            beside = came if layer.shortcut is None else put(layer.shortcut, came)
            beside = beside if join.shortcut_norm is None else put(join.shortcut_norm, beside)
            return put(join.neuron, inner + beside) if join.connect == "sum" else put(join.neuron, inner) + beside
        if isinstance(layer, MembraneResidual):
            spikes = put(layer.first, came)
            return put(layer.main, spikes) + (came if layer.shortcut is None else put(layer.shortcut, spikes))
        if layer is nn.mean_pool:
            return put(nn.flatten, put(_mean, came))
        layers.append(layer)
        sources.append(came)
        return (len(layers) - 1,)

    output = put(model, (-1,))
    return layers, [*sources, output]


def _mean(x):
    return x.mean((-3, -2), keepdims=True)


def _shape_after(layer, shape):
    xs = jax.ShapeDtypeStruct((1, 1, *shape), jnp.float32)
    run = layer if isinstance(layer, nn.Temporal) else nn.Folded(layer)
    outs = nnx.eval_shape(lambda layer, xs: layer(xs), run, xs)
    return (outs[0] if isinstance(layer, nn.Temporal) else outs).shape[2:]


def _node(nir, layer, signal, dialect, where):
    """(the node, the order of what it puts out)."""
    shape, order = signal.shape, signal.order
    if isinstance(layer, nn.Spiking):
        return _neuron_node(nir, layer, signal, dialect, where), order
    if isinstance(layer, nn.Recurrent):
        return _neuron_node(nir, layer.neuron, signal, dialect, where), order
    if isinstance(layer, Shift):
        shift = _nir_layout(layer.shift[...], signal)
        return nir.Affine(np.eye(len(shift), dtype=np.float32), shift), order
    if isinstance(layer, nnx.Linear):
        return _linear_node(nir, layer, signal, where), None
    if isinstance(layer, Scale):
        return nir.Scale(_nir_layout(layer.scale[...], signal)), order
    if isinstance(layer, Threshold):
        return nir.Threshold(_nir_layout(_above(layer.threshold[...], dialect), signal)), order
    if layer is nn.flatten:
        if len(shape) < 2:
            return None, order
        order = np.moveaxis(np.arange(np.prod(shape)).reshape(_shape(shape)), 0, -1).ravel()
        return nir.Flatten(_shape(shape), 0, -1), None if (np.diff(order) == 1).all() else order
    if isinstance(layer, Flatten):
        return nir.Flatten(_shape(shape), layer.start_dim, layer.end_dim), order
    if isinstance(layer, nnx.Conv) and len(shape) in (2, 3):
        return _conv_node(nir, layer, shape, where), None
    if layer is _mean:
        return nir.AvgPool2d(np.array(shape[:2]), np.ones(2, int), np.zeros(2, int)), None
    if isinstance(layer, Pool):
        kind = nir.SumPool2d if layer.kind == "sum" else nir.AvgPool2d
        return kind(*map(np.array, (layer.window, layer.stride, layer.padding))), None
    if isinstance(layer, partial) and layer.func is nnx.avg_pool and len(shape) == 3:
        return _pool_node(nir, layer, shape, where), None
    raise NotImplementedError(f"{where}: NIR has no node for it on {shape}")


def _neuron_node(nir, layer, signal, dialect, where):
    neuron, params = layer.neuron, layer.params
    kind = type(neuron).__name__
    if of_snntorch := isinstance(neuron, snntorch.Leaky | snntorch.Synaptic):
        kind = "LIF" if isinstance(neuron, snntorch.Leaky) else "CubaLIF"
    elif type(neuron) not in (neurons.IF, neurons.LIF, neurons.CubaLIF, neurons.LI):
        raise NotImplementedError(f"{where}: NIR has no node for the neuron {kind}")
    if isinstance(layer.out_dtype, Packed):
        raise NotImplementedError(f"{where}: its out_dtype is {layer.out_dtype}, and NIR's spikes are not packed")
    fill = lambda value: _nir_layout(value, signal)
    jumps, fields = kind in dialect.jumps, {}
    if kind == "IF":
        fields["r"] = fill(1.0 if jumps else 1 / dialect.dt)
    else:
        decay = np.asarray(params.decay, np.float64)
        cuba = kind == "CubaLIF"
        gain = 1 - decay if getattr(neuron, "decay_input", False) else np.ones_like(decay)
        fields["tau_mem" if cuba else "tau"] = fill(_tau(decay, dialect, where))
        fields["r"] = fill(gain if jumps and not cuba else gain / (1 - decay))
        fields["v_leak"] = fill(getattr(neuron, "v_rest", 0.0))
        if cuba:
            decay = np.asarray(params.decay_syn, np.float64)
            fields["tau_syn"] = fill(_tau(decay, dialect, where))
            fields["w_in"] = fill(1.0 if jumps else 1 / (1 - decay))
    if kind != "LI":
        if of_snntorch:
            reset, name = None, "late" if neuron.reset_delay else "prompt"
        else:
            reset = neuron.reset
            name = {HardReset: "hard", SoftReset: "soft"}.get(type(reset))
        if name != dialect.reset:
            raise NotImplementedError(
                f"{where}: its reset is {reset or name}, that of the dialect {dialect.reset!r}. NIR itself knows only the "
                f"hard one; dataclasses.replace(dialect, reset=...) writes another, for who reads it so"
            )
        fields["v_threshold"] = fill(_above(params.threshold, dialect))
        fields["v_reset"] = fill(getattr(reset, "v_reset", 0.0))
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


def _feedback_node(nir, layer, order):
    weight = layer.weight[...] if layer.mask is None else layer.weight[...] * layer.mask[...]
    weight = np.array(weight if weight.ndim == 2 else jax.scipy.linalg.block_diag(*weight), np.float32).T
    if order is not None:
        ours, weight = weight, np.empty_like(weight)
        weight[np.ix_(order, order)] = ours
    return nir.Linear(np.ascontiguousarray(weight))


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
        tuple(np.broadcast_to(1 if a is None else a, dims).tolist())
        for a in (layer.strides, layer.kernel_dilation, layer.input_dilation)
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
    bias = _bias(layer, len(weight))
    if dims == 1:
        return nir.Conv1d(shape[0], weight, strides[0], padding[0], dilation[0], layer.feature_group_count, bias)
    return nir.Conv2d(tuple(shape[:2]), weight, strides, padding, dilation, layer.feature_group_count, bias)


def _bias(layer, features):
    return np.zeros(features, np.float32) if layer.bias is None else np.array(layer.bias[...], np.float32)


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


def _identity_node(nir, signal, where):
    """A node with a weight for each channel, all 1."""
    *size, features = signal.shape
    if signal.order is not None or len(size) > 2:
        raise NotImplementedError(f"{where}: NIR has no node for it on {signal.shape}, or after snnfuse.nn.flatten")
    ones, zeros = np.ones((features, 1, *(1,) * len(size)), np.float32), np.zeros(features, np.float32)
    if not size:
        return nir.Linear(np.eye(features, dtype=np.float32))
    return (nir.Conv1d, nir.Conv2d)[len(size) - 1](
        size[0] if len(size) == 1 else tuple(size), ones, 1, 0, 1, features, zeros
    )


def _normalised(nir, node, norm):
    """The node of a Linear or Conv with a BatchNorm in evaluation taken in."""
    scale = getattr(norm, "gain", 1.0) / np.sqrt(np.asarray(norm.var[...], np.float64) + norm.epsilon)
    scale = scale * (1 if norm.scale is None else np.asarray(norm.scale[...]))
    bias = (getattr(node, "bias", 0) - np.asarray(norm.mean[...])) * scale
    bias = np.asarray(bias + (0 if norm.bias is None else np.asarray(norm.bias[...])), np.float32)
    weight = np.asarray(node.weight * scale.reshape(-1, *(1,) * (node.weight.ndim - 1)), np.float32)
    if isinstance(node, nir.Affine | nir.Linear):
        return nir.Affine(weight, bias)
    node.weight, node.bias = weight, bias
    return node


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


def _shape(shape):
    """A shape of ours, channels first."""
    return np.array([shape[-1], *shape[:-1]])


def _check_shape(input_shape):
    sizes = input_shape if isinstance(input_shape, Sequence) else ()
    if not sizes or not all(isinstance(n, Integral) and n > 0 for n in sizes):
        raise ValueError(
            f"input_shape must be the sizes (H, W, C), (L, C) or (N,) of one sample in one step; got {input_shape!r}"
        )


def _check_fits(layer, shape, input_shape, where):
    if isinstance(layer, nnx.Linear):
        axes, features = "", layer.kernel.shape[0]
    elif isinstance(layer, nnx.Conv) and len(layer.kernel_size) < 3:
        axes, features = "L, " if len(layer.kernel_size) == 1 else "H, W, ", layer.in_features
    else:
        return
    if shape[-1] != features or (axes and len(shape) != axes.count(",") + 1):
        raise ValueError(
            f"input_shape must be such that {where} is given ({axes}{features}); got {input_shape}, of which it is given {shape}"
        )


def _check_same(came, where):
    if len({signal.name for signal in came}) < len(came):
        raise NotImplementedError(
            f"{where}: one of its sources is there twice, for which NIR has no edge; scale it by 2"
        )
    for other in came[1:]:
        if not np.array_equal(other.order, came[0].order) or other.shape != came[0].shape:
            raise NotImplementedError(f"{where}: its sources are of different shapes, or flattened in different orders")


def _name(layer):
    return getattr(layer, "__name__", type(layer).__name__)
