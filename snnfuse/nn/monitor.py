"""What a model does inside: spikes and states of its layers, firing rates, operations and their energy.

`record` and `operations` run a copy of the model whose layers report what they compute. They do not change the model itself,
nor its BatchNorm statistics. `watch` records while the model itself runs, in training too. A run without a monitor costs
nothing. Layers are named by their path: `layers.2`,
`block1.neuron`. A `Remat` runs as the layer inside it. A monitor cannot see into a transform that the model itself applies,
such as `nnx.jit` or `nnx.scan`: apply such a transform to the function that calls the monitor.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.extend.core import get_opaque_trace_state

from snnfuse.core import neurons
from snnfuse.core.compose import CountedState, Twice, WithMembrane, counted
from snnfuse.core.neuron import PyTree, WithState
from snnfuse.nn.linear import padding, per_axis
from snnfuse.nn.padded import split
from snnfuse.nn.recurrent import Feedback, Recurrent
from snnfuse.nn.spikes import refuse_gradient, values
from snnfuse.nn.spiking import Spiking
from snnfuse.nn.temporal import Pieces, Remat, Timeless
from snnfuse.ops.packing import Packed, unpack
from snnfuse.ops.recurrent import RecurrentState

MAC, AC = 4.6e-12, 0.9e-12  # joules, see `Operations`


def record(
    model: nnx.Module, *args: Any, layers: Sequence[str] | None = None, what: str = "spikes", **kwargs: Any
) -> tuple[Any, dict[str, PyTree]]:
    """Call `model(*args, **kwargs)` and record its neurons: (what the model returned, {path: record}).

    Args:
      layers: paths of the `Spiking`, `Recurrent` and `Feedback` layers to record. None records all of them; `LI`, which never
        spikes, only if `what` is "state". `PSN`, `SlidingPSN` and `online.Eprop` are recorded too, for "spikes" and "counts".
      what: "spikes" records the outputs [T, *B, N] of a layer; "state" records its states after every step, a tree of
        float32 [T, *B, N] (`.v` is the membrane after the reset); "membrane" records the membrane before the reset, float32
        [T, *B, N], which is what is compared with the threshold. A neuron needs a field `reset` for it. "counts" records how
        often each neuron spiked, float32 [*B, N]: the kernel adds up spikes and stores none of them.

    A `NormSpiking` with connect="add" adds the shortcut inside its kernel, so its recorded outputs include the shortcut; its
    counts do not. If a layer is called more than once, its records are joined along time, and its counts are added. This works
    under `jax.jit`.

    Raises:
      ValueError: `what` is none of the four, or a path in `layers` is not that of a spiking layer.
      TypeError: it is called in a function that is differentiated with regard to the model. The copy draws the dropout mask
        of the next call, and the BatchNorm statistics of the model would not change: use `watch` there.
    """
    copy = nnx.clone(model)
    why = "record must not be differentiated, because it runs a copy of the model; use snnfuse.nn.monitor.watch"
    nnx.update(copy, refuse_gradient(why, nnx.state(copy, nnx.Param)))
    with watch(copy, layers=layers, what=what) as records:
        returned = copy(*args, **kwargs)
    return returned, records


@contextmanager
def watch(
    model: nnx.Module, *, layers: Sequence[str] | None = None, what: str = "spikes"
) -> Iterator[dict[str, PyTree]]:
    """Record the neurons of `model` while it runs, in training too: for a rate penalty, or rates beside the loss.

        with monitor.watch(model, what="counts") as counts:
            outs, state = model(xs)
        loss += 0.1 * training.rate_penalty(counts, T, upper=0.2)  # its gradient reaches the model

    The dictionary {path: record} is filled at the end of the block; `layers`, `what` and the records are those of `record`.
    The whole block must lie inside of one transform, such as the function that `nnx.grad` takes. In the block a `Remat`
    or `Pieces` runs as the layer inside it, on all T, so it stores more memory.
    """
    if what not in ("spikes", "state", "membrane", "counts"):
        raise ValueError(f"what must be 'spikes', 'state', 'membrane' or 'counts'; got {what!r}")
    found = _layers(model, Spiking | Recurrent | Feedback)
    others = {path: m for path, m in _layers(model, nnx.Module).items() if getattr(m, "emits_spikes", False)}
    inside = {f"{path}.neuron".strip(".") for path, m in (found | others).items() if not isinstance(m, Spiking)}
    found = {path: m for path, m in found.items() if path not in inside}
    if layers is None:
        layers = [p for p, m in found.items() if what == "state" or not isinstance(_innermost(m.neuron), neurons.LI)]
        layers += [*others] if what in ("spikes", "counts") else []
    elif not isinstance(layers, str) and what in ("state", "membrane") and (bad := [p for p in layers if p in others]):
        raise ValueError(
            f"what must be 'spikes' or 'counts' for {bad[0]!r}, a {type(others[bad[0]]).__name__}; got {what!r}"
        )
    elif isinstance(layers, str) or (unknown := [path for path in layers if path not in found | others]):
        got = layers if isinstance(layers, str) else unknown[0]
        raise ValueError(f"layers must be a list of paths of spiking layers, from {list(found | others)}; got {got!r}")
    calls, records = {path: [] for path in layers}, {}
    changed = [*_layers(model, Remat | Pieces).values(), *(others[path] for path in layers if path in others)]
    changed = [(layer, type(layer)) for layer in changed]
    unrolled = [path for path in layers if path in found]
    own = {path: vars(found[path]).get("unroll") for path in unrolled}  # `parallel.over_time` may have set one
    try:
        for layer, kind in changed:
            if issubclass(kind, Remat | Pieces):
                _run_inside(layer)
        for path in layers:
            if path in others:
                _intercept(others[path], partial(_keep_outputs, what, calls[path].append))
        for path in unrolled:
            object.__setattr__(found[path], "unroll", _recording(found[path].unroll, what, calls[path].append))
        yield records
    finally:
        for layer, kind in changed:
            object.__setattr__(layer, "__class__", kind)
        for path in unrolled:
            if own[path] is None and "unroll" in vars(found[path]):
                object.__delattr__(found[path], "unroll")
            elif own[path] is not None:
                object.__setattr__(found[path], "unroll", own[path])
    join = (lambda *pieces: sum(pieces)) if what == "counts" else (lambda *pieces: jnp.concatenate(pieces))
    records |= {path: jax.tree.map(join, *r) for path, r in calls.items() if r}


def _keep_outputs(what, keep, call, *args, **kwargs):
    returned = call(*args, **kwargs)
    outs = values(split(returned[0] if isinstance(returned, tuple) else returned)[0])
    keep(outs if what == "spikes" else outs.sum(0, dtype=jnp.float32))
    return returned


def _innermost(neuron):
    """The neuron inside of what wraps it, such as `online.Instant`."""
    while hasattr(neuron, "inner"):
        neuron = neuron.inner
    return neuron


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
    """{path: operations} of every Linear, Conv, Recurrent and Feedback in one call of `model(*args, **kwargs)`.

    If the input of a layer holds only 0 and 1, its spikes are counted; any other input counts as dense. The fan-out of an
    input is the number of products that the layer makes from it, exact at the borders of a convolution too. Products of
    two activations, as in a `SelfAttention`, are not counted. Of a `Recurrent`, the products that feed back are counted; a
    connection that its mask removes counts too. Of a `Feedback`, every Linear and Conv inside is counted, under its own path.

    The model runs as one compiled program, which an equal call uses again. (Not if an attribute of the model, or an argument,
    cannot be hashed.) So no branch of the model may depend on the value of an array.

    Raises:
      ValueError: it is called under `jax.jit` or another transform, where there are no values to count, or the model itself
        applies such a transform.
    """
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)}
    others = tuple((i, x) for i, x in enumerate(leaves) if i not in arrays)
    _refuse_tracer(*jax.tree.leaves(state), *leaves)
    try:
        program = _counting_program(graphdef, others, tree)
    except (
        TypeError
    ):  # an attribute or argument has no hash, such as a NumPy array: a later call cannot find the program
        program = _counting_program.__wrapped__(graphdef, others, tree)
    found = program(state, arrays)
    _refuse_tracer(*jax.tree.leaves(found))
    counts, layers = {}, _layers(model, nnx.Linear | nnx.Conv | Recurrent)
    for path, calls in jax.device_get(found).items():
        acs = macs = 0
        for binary, rows, spikes in calls:
            fan_out = _fan_out(layers[path], spikes.shape)
            if binary:
                acs += int(np.sum(spikes * fan_out))
            else:
                macs += int(rows) * int(fan_out.sum())
        counts[path] = Operations(acs, macs)
    return {path: counts[path] for path in layers if path in counts}


@lru_cache
def _counting_program(graphdef, others, tree):
    return jax.jit(partial(_counted, graphdef, others, tree))


def _counted(graphdef, others, tree, state, arrays):
    """{path: (whether all inputs are 0 or 1, the number of inputs, how often each feature of them is not 0) of each call}."""
    copy, counts = nnx.merge(graphdef, state), {}
    args, kwargs = tree.unflatten([x for _, x in sorted([*arrays.items(), *others], key=lambda pair: pair[0])])
    for layer in _layers(copy, Remat | Pieces).values():
        _run_inside(layer)
    for path, loop in _layers(copy, Feedback).items():
        # inside of its scan a count cannot leave: its layer runs once more, on all steps
        layer = nnx.clone(loop.layer)
        _count_calls(layer, counts, f"{path}.layer".strip("."))
        loop.unroll = _after_unroll(loop.unroll, partial(_run_on_all_steps, layer))
    _count_calls(copy, counts)
    for path, layer in _layers(copy, Recurrent).items():
        counts[path] = []
        layer.unroll = _after_unroll(layer.unroll, _counting_rows(counts[path], 1))
    copy(*args, **kwargs)
    return counts


def _count_calls(model: nnx.Module, counts: dict[str, list], prefix: str = "") -> None:
    """Every Linear and Conv of the model that is not in `counts` already adds each of its calls to its list there."""
    for path, layer in _layers(model, nnx.Linear | nnx.Conv).items():
        if (path := f"{prefix}.{path}".strip(".")) not in counts:
            counts[path] = []
            _intercept(layer, _counting(counts[path], _axes(layer)))


def _run_on_all_steps(layer: nnx.Module, rows: Array) -> None:
    layer(rows if isinstance(layer, Timeless) else rows.reshape(-1, *rows.shape[2:]))


def _run_inside(layer: Remat | Pieces) -> None:
    _intercept(layer, lambda call, xs, state=None: layer.layer(xs, state))


def _intercept(layer: nnx.Module, around: Callable) -> None:
    """From now on layer(*args) returns around(call, *args), where `call` is the layer's own.

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
        keep(_unpacked(spikes, len(jax.tree.leaves(xs)[0]), out_dtype))
        return outs, final

    def states(neuron, params, state, xs, *, out_dtype=None, **options):
        first = jax.tree.leaves(xs)[0]
        float32 = jax.tree.map(lambda _: jnp.float32, jax.eval_shape(lambda: neuron.init_state(first.shape[1:])))
        both = (out_dtype or first.dtype, float32)
        (outs, kept), final = unroll(WithState(neuron), params, state, xs, out_dtype=both, **options)
        keep(kept)
        return outs, final

    def membranes(neuron, params, state, xs, *, out_dtype=None, **options):
        both = (out_dtype or jax.tree.leaves(xs)[0].dtype, jnp.float32)
        (outs, kept), final = unroll(WithMembrane(neuron), params, state, xs, out_dtype=both, **options)
        keep(kept)
        return outs, final

    def counts(neuron, params, state, xs, **options):
        recurrent = isinstance(state, RecurrentState)
        if state is not None:
            inner = state.neuron if recurrent else state
            inner = CountedState(inner, jnp.zeros(jax.tree.leaves(xs)[0].shape[1:], jnp.float32))
            state = state._replace(neuron=inner) if recurrent else inner
        outs, final = unroll(counted(neuron), params, state, xs, **options)
        kept = final.neuron if isinstance(final, RecurrentState) else final
        keep(kept.count)
        return outs, final._replace(neuron=kept.inner) if isinstance(final, RecurrentState) else kept.inner

    return {"spikes": spikes, "state": states, "membrane": membranes, "counts": counts}[what]


def _unpacked(spikes, T, out_dtype):
    if not isinstance(out_dtype, Packed):
        return spikes
    return unpack(spikes, T, jnp.int16 if out_dtype.graded else jnp.bool_, lowest=out_dtype.lowest)


def _after_unroll(unroll: Callable, count: Callable) -> Callable:
    """The `unroll` of a recurrent layer, which also passes what feeds back, [T, *B, H], to `count`."""

    def counted(neuron, params, state, xs, *, out_dtype=None, **options):
        outs, final = unroll(neuron, params, state, xs, out_dtype=out_dtype, **options)
        first = jax.tree.leaves(xs)[0]
        fed = unpack(outs, len(first), jnp.float32) if isinstance(out_dtype, Packed) else outs
        before = jnp.zeros((1, *fed.shape[1:])) if state is None else state.fed[None]
        count(jnp.concatenate([before, fed[:-1].astype(jnp.float32)]))
        return outs, final

    return counted


def _counting_rows(calls: list, axes: int) -> Callable:
    """A function that counts in x, whose last `axes` axes are one input of the layer, and adds the counts to `calls`."""
    outside = get_opaque_trace_state(convention="nnx")

    def count(x):
        if get_opaque_trace_state(convention="nnx") != outside:
            _refuse()  # a count could not leave the transform that the model applies here
        rows = x.reshape(-1, *x.shape[x.ndim - axes :])
        binary = jnp.all((rows == 0) | (rows == 1))
        calls.append((binary, jnp.int32(len(rows)), jnp.sum(rows != 0, 0, dtype=jnp.int32)))

    return count


def _counting(calls: list, axes: int) -> Callable:
    count = _counting_rows(calls, axes)

    def counted(call, x, *args, **kwargs):
        count(values(x))
        return call(x, *args, **kwargs)

    return counted


def _refuse_tracer(*arrays):
    if any(isinstance(a, jax.core.Tracer) for a in arrays):
        _refuse()


def _refuse():
    raise ValueError(
        "operations must be called outside of jax.jit and other transforms: it counts values; got a tracer"
    )


def _axes(layer: nnx.Linear | nnx.Conv) -> int:
    """How many of the last axes of x are one input of the layer."""
    return 1 if isinstance(layer, nnx.Linear) else len(layer.kernel_size) + 1


def _fan_out(layer: nnx.Linear | nnx.Conv | Recurrent, shape: tuple[int, ...]) -> np.ndarray:
    """How many products the layer makes from each feature of an input of this shape, as int64."""
    if not isinstance(layer, nnx.Conv):
        outs = layer.weight.shape[-1] if isinstance(layer, Recurrent) else layer.kernel.shape[-1]
        return np.full(shape, outs, np.int64)
    *taps, inputs, outs = layer.kernel.shape
    kernel = np.ones(layer.kernel.shape) if layer.mask is None else np.asarray(layer.mask, np.float64)
    groups = layer.feature_group_count
    products = kernel.reshape(*taps, inputs, groups, outs // groups).sum(-1)
    products = np.moveaxis(products, -1, -2).reshape(*taps, groups * inputs)
    for axis, reads in enumerate(_reads(layer, shape[:-1])):
        products = np.moveaxis(np.tensordot(reads, products, (1, axis)), 0, axis)
    return np.rint(products).astype(np.int64)


def _reads(layer: nnx.Conv, space: tuple[int, ...]) -> Iterator[np.ndarray]:
    """For each axis [size, taps]: how many outputs read each place of the input through each tap."""
    mode, pads = padding(layer, space)
    axes = (
        per_axis(name, getattr(layer, name), len(space)) for name in ("strides", "input_dilation", "kernel_dilation")
    )
    for size, taps, (low, high), stride, apart, dilation in zip(space, layer.kernel_size, pads, *axes, strict=True):
        places = np.full((size - 1) * apart + 1, -1)  # -1: a zero between the places of the input, or in the padding
        places[::apart] = np.arange(size)
        fill = dict(constant_values=-1) if mode == "constant" else {}
        places = np.pad(places, (max(low, 0), max(high, 0)), mode=mode, **fill)[max(-low, 0) :]
        outs = (len(places) - max(-high, 0) - (taps - 1) * dilation - 1) // stride + 1
        under = places[stride * np.arange(outs)[:, None] + dilation * np.arange(taps)]  # [outs, taps]
        reads = np.zeros((size + 1, taps))
        np.add.at(reads, (under, np.arange(taps)), 1)
        yield reads[:-1]
