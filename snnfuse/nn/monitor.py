"""What a model does inside: spikes and states of its layers, firing rates, operations and their energy.

A monitor runs a copy of the model whose layers report what they compute. It does not change the model itself, nor its
BatchNorm statistics, and a run without a monitor costs nothing. Layers are named by their path: `layers.2`,
`block1.neuron`. A `Remat` runs as the layer inside it. A monitor cannot see into a transform that the model itself applies,
such as `nnx.jit` or `nnx.scan`: apply such a transform to the function that calls the monitor.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from snnfuse.core import neurons
from snnfuse.core.compose import Twice
from snnfuse.core.neuron import PyTree, WithState
from snnfuse.nn.recurrent import Recurrent
from snnfuse.nn.spikes import values
from snnfuse.nn.spiking import Spiking
from snnfuse.nn.temporal import Remat
from snnfuse.ops.packing import Packed, unpack

MAC, AC = 4.6e-12, 0.9e-12  # joules, see `Operations`


def record(
    model: nnx.Module, *args: Any, layers: Sequence[str] | None = None, what: str = "spikes", **kwargs: Any
) -> tuple[Any, dict[str, PyTree]]:
    """Call `model(*args, **kwargs)` and record its neurons: (what the model returned, {path: record}).

    Args:
      layers: paths of the `Spiking` and `Recurrent` layers to record. None records all of them, except `LI` for "spikes", which never spikes.
      what: "spikes" records the outputs [T, *B, N] of a layer; "state" records its states after every step, a tree of
        float32 [T, *B, N] (`.v` is the membrane after the reset).

    A `NormSpiking` with connect="add" adds the shortcut inside its kernel, so its recorded outputs include the shortcut.
    If a layer is called more than once, its records are joined along time. This works under `jax.jit`.

    Raises:
      ValueError: `what` is neither of the two, or a path in `layers` is not that of a spiking layer.
    """
    if what not in ("spikes", "state"):
        raise ValueError(f"what must be 'spikes' or 'state'; got {what!r}")
    copy = _copy(model)
    found = _layers(copy, Spiking | Recurrent)
    inside = {f"{path}.neuron" for path, m in found.items() if isinstance(m, Recurrent)}
    found = {path: m for path, m in found.items() if path not in inside}
    if layers is None:
        layers = [p for p, m in found.items() if what == "state" or not isinstance(m.neuron, neurons.LI)]
    elif isinstance(layers, str) or (unknown := [path for path in layers if path not in found]):
        got = layers if isinstance(layers, str) else unknown[0]
        raise ValueError(f"layers must be a list of paths of spiking layers, from {list(found)}; got {got!r}")
    records = {path: [] for path in layers}
    for path in layers:
        found[path].unroll = _recording(found[path].unroll, what, records[path].append)
    returned = copy(*args, **kwargs)
    joined = {path: jax.tree.map(lambda *calls: jnp.concatenate(calls), *r) for path, r in records.items() if r}
    return returned, joined


def firing_rates(spikes: dict[str, Array]) -> dict[str, Array]:
    """{path: spikes per neuron and step} from the records of `record(..., what="spikes")`: scalars, float32."""
    return {path: jnp.mean(s, dtype=jnp.float32) for path, s in spikes.items()}


def dead_neurons(spikes: dict[str, Array]) -> dict[str, Array]:
    """{path: fraction of the neurons that never fire, in any step of any sample}; spikes [T, B, ..., N]."""
    for path, s in spikes.items():
        if s.ndim < 3:
            raise ValueError(f"spikes of {path!r} must be [T, B, ..., N], of rank 3 or more; got shape {s.shape}")
    return {path: jnp.mean(~jnp.any(s != 0, axis=(0, 1)), dtype=jnp.float32) for path, s in spikes.items()}


class Operations(NamedTuple):
    """What one layer computes, summed over T and B.

    `acs` counts synaptic operations: one accumulation for each input spike and each weight it meets (spikes x fan-out).
    `macs` counts multiply-accumulates of inputs that are not spikes. The energy in 45 nm CMOS, 32-bit float, is

        joules = 4.6 pJ macs + 0.9 pJ acs

    with 3.7 pJ for a multiplication and 0.9 pJ for an addition: Horowitz, ISSCC 2014,
    https://doi.org/10.1109/ISSCC.2014.6757323. It does not include memory traffic, biases and the neurons themselves.
    """

    acs: int = 0
    macs: int = 0

    @property
    def joules(self) -> float:
        return MAC * self.macs + AC * self.acs


def operations(model: nnx.Module, *args: Any, **kwargs: Any) -> dict[str, Operations]:
    """{path: operations} of every Linear, Conv and Recurrent in one call of `model(*args, **kwargs)`.

    If the input of a layer holds only 0 and 1, its spikes are counted; any other input counts as dense. The fan-out of an
    input is the number of products that the layer makes from it, exact at the borders of a convolution too. Products of
    two activations, as in a `SelfAttention`, are not counted. Of a `Recurrent`, the products that feed back are counted; a
    connection that its mask removes counts too.

    Raises:
      ValueError: it is called under `jax.jit` or another transform, where there are no values to count.
    """
    copy = _copy(model)
    counts = {}
    for path, layer in _layers(copy, nnx.Linear | nnx.Conv).items():
        counts[path] = []
        _intercept(layer, _counting(layer, counts[path].append))
    for path, layer in _layers(copy, Recurrent).items():
        counts[path] = []
        layer.unroll = _counting_feedback(layer.unroll, layer.weight.shape[-1], counts[path].append)
    copy(*args, **kwargs)
    return {path: Operations(*map(sum, zip((0, 0), *calls, strict=True))) for path, calls in counts.items()}


def _copy(model: nnx.Module) -> nnx.Module:
    copy = nnx.clone(model)
    for layer in _layers(copy, Remat).values():
        _intercept(layer, lambda call, xs, state=None, layer=layer: layer.layer(xs, state))
    return copy


def _intercept(layer: nnx.Module, around: Callable) -> None:
    """From now on layer(*args) returns around(call, *args), where `call` is the layer's own; `layer` must be a copy.

    `nnx.capture` cannot do this: it sows what a method returns, and counting needs what a layer is given. It also wraps only
    the methods that a class defines itself: it sees no neuron, as they inherit `__call__`.
    """
    own = type(layer)

    class Watched(own):
        def __call__(self, *args, **kwargs):
            return around(lambda *args, **kwargs: own.__call__(self, *args, **kwargs), *args, **kwargs)

    object.__setattr__(layer, "__class__", Watched)


def _layers(model, kind) -> dict[str, nnx.Module]:
    return {".".join(map(str, path)): m for path, m in nnx.iter_modules(model) if isinstance(m, kind)}


def _recording(unroll: Callable, what: str, keep: Callable) -> Callable:
    """The layer's `unroll`, which also passes its outputs or states to `keep`."""

    def spikes(neuron, params, state, xs, *, out_dtype=None, **options):
        outs, final = unroll(neuron, params, state, xs, out_dtype=out_dtype, **options)
        spikes = outs[0] if isinstance(neuron, Twice) else outs
        keep(unpack(spikes, len(jax.tree.leaves(xs)[0])) if isinstance(out_dtype, Packed) else spikes)
        return outs, final

    def states(neuron, params, state, xs, *, out_dtype=None, **options):
        first = jax.tree.leaves(xs)[0]
        float32 = jax.tree.map(lambda _: jnp.float32, jax.eval_shape(lambda: neuron.init_state(first.shape[1:])))
        both = (out_dtype or first.dtype, float32)
        (outs, kept), final = unroll(WithState(neuron), params, state, xs, out_dtype=both, **options)
        keep(kept)
        return outs, final

    return spikes if what == "spikes" else states


def _counting_feedback(unroll: Callable, fan_out: int, keep: Callable) -> Callable:
    """The `unroll` of a recurrent layer, which also passes (acs, macs) of the product with its weight to `keep`."""

    def counted(neuron, params, state, xs, *, out_dtype=None, **options):
        outs, final = unroll(neuron, params, state, xs, out_dtype=out_dtype, **options)
        first = jax.tree.leaves(xs)[0]
        fed = unpack(outs, len(first), jnp.float32) if isinstance(out_dtype, Packed) else outs
        _refuse_tracer(fed)
        fed = [fed[:-1].astype(jnp.float32), *([] if state is None else [state.fed[None]])]
        rows = jnp.concatenate(fed).astype(jnp.float32)
        if bool(jnp.all((rows == 0) | (rows == 1))):
            keep((int(np.asarray(rows, np.float64).sum()) * fan_out, 0))
        else:
            keep((0, first.size * fan_out))
        return outs, final

    return counted


def _refuse_tracer(*arrays):
    if any(isinstance(a, jax.core.Tracer) for a in arrays):
        raise ValueError(
            "operations must be called outside of jax.jit and other transforms: it counts values; got a tracer"
        )


def _counting(layer: nnx.Module, keep: Callable) -> Callable:
    """Passes (acs, macs) of each call to `keep`. With weights of 1, the fan-out is the gradient of the sum of all outputs."""
    ones = nnx.clone(layer)
    ones.kernel[...] = jnp.ones_like(ones.kernel[...], jnp.float32)
    ones.dtype, ones.precision = jnp.float32, "highest"
    axes = 1 if isinstance(layer, nnx.Linear) else ones.kernel[...].ndim - 1  # of one sample

    def counted(call, x, *args, **kwargs):
        sample = jnp.zeros((1, *values(x).shape[-axes:]))
        _refuse_tracer(values(x), sample)
        fan_out = np.asarray(jax.grad(lambda x: ones(x).sum())(sample), np.float64).round().ravel()
        rows = values(x).reshape(-1, fan_out.size).astype(jnp.float32)
        if bool(jnp.all((rows == 0) | (rows == 1))):
            keep((int(np.asarray(rows.sum(0), np.float64) @ fan_out), 0))
        else:
            keep((0, len(rows) * int(fan_out.sum())))
        return call(x, *args, **kwargs)

    return counted
