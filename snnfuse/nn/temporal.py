"""Layers that run along time, and how all other layers run once on [T*B, ...]."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from snnfuse.core.neuron import PyTree
from snnfuse.nn.padded import Padded, join, real_steps, split, take
from snnfuse.nn.spikes import Spikes, values
from snnfuse.ops.packing import Packed


def whole(name: str, value: int, of: str = "") -> int:
    """A size as an int. Raises ValueError unless it is a whole number, at least 1."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number{of}, at least 1; got {value!r}")
    return int(value)


def whole_steps(name: str, value: int) -> int:
    """A number of steps as an int. Raises ValueError unless it is a whole number, at least 1."""
    return whole(name, value, " of steps")


def with_past(xs: Array, state: Array | None, steps: int) -> Array:
    """xs [T, ...] after the `steps` steps before it, which are `state`, or 0 if that is None: [steps + T, ...]."""
    wanted = (steps, *xs.shape[1:])
    state = jnp.zeros(wanted, xs.dtype) if state is None else state
    if getattr(state, "shape", None) != wanted:
        got = getattr(state, "shape", f"a {type(state).__name__}")
        raise ValueError(f"state must be the input of the last {steps} steps, {wanted}; got {got}")
    return jnp.concatenate([state.astype(xs.dtype), xs])


def last_steps(window: Array, steps: int, lengths: Array | None) -> Array:
    """The last `steps` steps of each sequence of `with_past`, [steps, ...]: the state after it."""
    return window[len(window) - steps :] if lengths is None else take(window, lengths, steps)


class Temporal(nnx.Module):
    """A layer that runs along time: it takes xs [T, B, ...] and a state, and returns outputs and the state after the last step.

        outs, state = layer(xs, state)    state None: the state before the first step

    Running the pieces of a sequence one after another, each from the last state, gives the same as running the whole.
    """

    def init_state(self, xs: PyTree) -> PyTree:
        """The state before the first step of `xs` (arrays or shapes), for a scan's carry."""
        raise NotImplementedError(f"{type(self).__name__} must define init_state(xs)")

    def __call__(self, xs: PyTree, state: PyTree | None = None) -> tuple[PyTree, PyTree]:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(xs, state)")


class Timeless(nnx.Module):
    """A layer without a state along time that takes [T, B, ...] whole, or `Spikes`: [..., in] -> [..., out].

    One that sets `mixes_steps`, such as BatchNorm, looks at several steps at once; in a `Sequential` it is given `Padded` as it is.
    """

    mixes_steps = False


class Folded(nnx.Module):
    """A layer without time (nnx.Conv, nnx.BatchNorm, a function), which runs once on [T*B, ...]: [T, B, ...] -> [T, B, ...]."""

    def __init__(self, layer: Callable):
        if isinstance(layer, Temporal):
            raise TypeError(f"Folded takes a layer without time; {type(layer).__name__} runs along time itself")
        self.layer = layer

    def __call__(self, xs: PyTree, *args, **kwargs) -> PyTree:
        return _fold(self.layer, xs, *args, **kwargs)


class Sequential(Temporal):
    """Layers one after another: `Temporal` ones with their state, all others on [T*B, ...] (see `Folded`).

    The state is a tuple with one entry per `Temporal` layer. A layer that looks at the whole batch, like BatchNorm in training,
    sees all of T*B; with such a layer, running a sequence in pieces does not equal running it whole. `nnx.Dropout` draws a new
    mask at each step, because it runs on [T*B, ...] too; `Dropout` draws one for all steps.
    """

    def __init__(self, *layers: Callable):
        for i, layer in enumerate(layers):
            if not callable(layer):
                raise TypeError(f"layer {i} must be callable; got {layer!r}")
            packed = _packed_output(layer)
            if packed is not None and i < len(layers) - 1:
                raise ValueError(
                    f"out_dtype of layer {i} must not be Packed, because layer {i + 1} would take its words for numbers; got "
                    f"{packed}. nn.PackSpikes() after layer {i} stores bits and keeps the values"
                )
        self.layers = nnx.List(layers)

    def init_state(self, xs: PyTree) -> tuple:
        state = []
        for layer in self.layers:
            if isinstance(layer, Temporal):
                state.append(layer.init_state(xs))
                xs, _ = nnx.eval_shape(lambda layer, xs: layer(xs), layer, xs)
            else:
                xs = nnx.eval_shape(lambda holder, xs: _fold(holder.layer, xs), Folded(layer), xs)
        return tuple(state)

    def __call__(self, xs: PyTree, state: tuple | None = None) -> tuple[PyTree, tuple]:
        temporal = [layer for layer in self.layers if isinstance(layer, Temporal)]
        before = [None] * len(temporal) if state is None else list(state)
        if len(before) != len(temporal):
            raise ValueError(f"state must have {len(temporal)} entries, one per Temporal layer; got {len(before)}")
        after = []
        for i, layer in enumerate(self.layers):
            _check_features(i, layer, xs)
            if isinstance(layer, Temporal):
                xs, s = layer(xs, before[len(after)])
                after.append(s)
            else:
                xs = _fold(layer, xs)
        return xs, tuple(after)


def flatten(x: Array) -> Array:
    """[B, ...] -> [B, N]."""
    return x.reshape(x.shape[0], -1)


class PackSpikes(Timeless):
    """Packs values of 0 and 1 into `Spikes`, so that the next layer stores only their bits.

    Graded spikes are whole numbers from `lowest` to `highest`; they take as many bits as these need.
    """

    def __init__(self, lowest: int = 0, highest: int = 1):
        self.packed = Packed(8, lowest, highest)

    def __call__(self, xs: Array | Spikes) -> Spikes:
        return xs if isinstance(xs, Spikes) else Spikes.of(xs, self.packed)


class Dropout(Timeless, nnx.Dropout):
    """Dropout with one mask for all steps: [T, B, ...] -> [T, B, ...].

    `nnx.Dropout` in a `Sequential` runs on [T*B, ...], so it draws another mask at each step.

    Args:
      rate: the part that is dropped.
      rngs, deterministic, rng_collection: as in `nnx.Dropout`; so are `train()` and `eval()`.
      broadcast_dims: axes that share the mask; (0,), which is time, by default.
    """

    def __init__(self, rate: float, *, broadcast_dims: tuple[int, ...] = (0,), **options):
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be in [0, 1]; got {rate}")
        super().__init__(rate, broadcast_dims=broadcast_dims, **options)

    def __call__(self, xs: Array | Spikes, **options) -> Array:
        return super().__call__(values(xs), **options)


class Remat(Temporal):
    """A lean layer: it stores only its input (only the bits of `Spikes`), and the backward pass recomputes the layer."""

    def __init__(self, layer: Temporal):
        self.layer = layer

    def init_state(self, xs: PyTree) -> PyTree:
        return self.layer.init_state(xs)

    def __call__(self, xs: PyTree, state: PyTree | None = None) -> tuple[PyTree, PyTree]:
        def run(layer, xs, state):
            xs, lengths = split(xs)
            return layer(join(xs.from_bits() if isinstance(xs, Spikes) else xs, lengths), state)

        return nnx.remat(run)(self.layer, xs, state)


class Pieces(Temporal):
    """Runs a layer over pieces of the sequence, and stores only the states between them: memory that hardly grows with T.

    The backward pass recomputes one piece at a time, so outputs and gradients are those of the layer itself, up to the order
    of sums. Beside the input and the outputs, it stores the state of every `length` steps, and what one piece needs.

        model = nn.Pieces(nn.Sequential(nn.Linear(700, 256, rngs=rngs), nn.LIF(tau=20.0), ...), length=500)
        outs, state = model(xs)                            # xs [T, B, 700]; T need not be a multiple of 500

    Random streams start anew in every piece, so `nn.Dropout` keeps its mask over all T.

    Args:
      layer: a `Temporal` layer, such as a `Sequential` of a whole network.
      length: the steps of a piece. `piece_length` chooses it from a memory budget.
      statistics: "refuse" (the default) raises ValueError if a BatchNorm in the layer takes the statistics of its batch, because
        those of a piece are not those of the sequence. "piece" takes those of each piece, and averages them all into the
        running ones. To freeze them, set `use_running_average` of the norms; then both are exact.
      truncate: False by default. True cuts the gradient between pieces: truncated backpropagation through time, where the loss
        at a step moves the weights of the steps of its piece alone.

    Chen et al. 2016, https://arxiv.org/abs/1604.06174.
    """

    def __init__(self, layer: Temporal, length: int, *, statistics: str = "refuse", truncate: bool = False):
        if not isinstance(layer, Temporal):
            raise TypeError(f"layer must run along time, such as nn.Sequential(...); got {layer!r}")
        length = whole_steps("length", length)
        if statistics not in ("refuse", "piece"):
            raise ValueError(f"statistics must be 'refuse' or 'piece'; got {statistics!r}")
        self.layer, self.length, self.statistics, self.truncate = layer, length, statistics, truncate

    def init_state(self, xs: PyTree) -> PyTree:
        return self.layer.init_state(xs)

    def __call__(self, xs: PyTree, state: PyTree | None = None) -> tuple[PyTree, PyTree]:
        self._check_statistics()
        if (packed := _packed_output(self.layer)) is not None:
            raise ValueError(
                f"out_dtype of layer must not be Packed, because words of pieces cannot be joined; got {packed}. "
                "nn.PackSpikes() after nn.Pieces stores bits"
            )
        xs, lengths = split(xs)
        if lengths is not None:
            self._check_padded()
        xs = values(xs)
        sizes = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(xs)}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"xs must be arrays [T, B, ...] of one T, at least 1; got lengths {sorted(sizes)}")
        T = sizes.pop()
        state = self.init_state(jax.tree.map(lambda x: x[: self.length], xs)) if state is None else state
        graphdef, params, random, others = nnx.split(self.layer, nnx.Param, nnx.RngState, ...)

        @partial(jax.checkpoint, prevent_cse=False)
        def run(carry, piece):
            state, others, _ = carry
            state = lax.stop_gradient(state) if self.truncate else state
            here = jax.tree.map(lambda x: x, (params, random))  # variables of this trace
            layer = nnx.merge(graphdef, *here, others)
            outs, state = layer(join(*piece), state)
            outs, steps = split(outs)[0], jax.tree.leaves(piece)[0].shape[0]
            if bad := [x.shape for x in jax.tree.leaves(values(outs)) if x.shape[:1] != (steps,)]:
                raise ValueError(f"layer must return arrays [T, B, ...], with T = {steps} in a piece; got {bad[0]}")
            _, random_after, others = nnx.state(layer, nnx.Param, nnx.RngState, ...)
            return (state, others, random_after), outs

        carry, parts, count = (state, others, random), [], T // self.length
        begins = jnp.arange(count + 1)[:, None] * self.length
        left = (
            None if lengths is None else jnp.clip(jnp.asarray(lengths) - begins, 0, self.length)
        )  # steps in each piece
        if count:
            cut = lambda x: x[: count * self.length].reshape(count, self.length, *x.shape[1:])
            carry, outs = lax.scan(run, carry, (jax.tree.map(cut, xs), None if left is None else left[:-1]))
            parts.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outs))
        if T % self.length:
            rest = jax.tree.map(lambda x: x[count * self.length :], xs)
            carry, outs = run(carry, (rest, None if left is None else left[-1]))
            parts.append(outs)
        state, others, random = carry
        nnx.update(self.layer, random, others)
        outs = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        if isinstance(outs, Spikes):
            # a byte of bits holds 8 steps, which need not end where a piece ends: the bits are packed anew
            highest = 1 if not isinstance(outs.bits, tuple) else outs.lowest + 2 ** len(outs.bits) - 1
            outs = Spikes.of(outs.values, Packed(8, outs.lowest, highest))
        return join(outs, lengths), state

    def _check_padded(self):
        """A piece after the end of all sequences has no statistics, which Flax's own layer would make NaN of, or take from what follows."""
        for path, module in nnx.iter_modules(self.layer):
            if (
                isinstance(module, nnx.BatchNorm)
                and not isinstance(module, Timeless)
                and not module.use_running_average
            ):
                raise NotImplementedError(
                    f"nnx.BatchNorm at {'.'.join(map(str, path))}: Pieces of nn.Padded need nn.BatchNorm in its place"
                )

    def _check_statistics(self):
        for path, module in nnx.iter_modules(self.layer) if self.statistics == "refuse" else ():
            if isinstance(module, nnx.BatchNorm) and not module.use_running_average:
                raise ValueError(
                    f"{'.'.join(map(str, path)) or 'layer'} takes the statistics of its batch, and those of a piece are not those "
                    "of the sequence: statistics='piece' takes them all the same, use_running_average=True freezes them"
                )


def piece_length(layer: Temporal, xs: PyTree, budget: int) -> int:
    """The most steps of a piece whose backward pass stores at most `budget` bytes, at most T; for `Pieces`.

    `xs` are arrays [T, B, ...] or their shapes; nothing is computed. What the backward pass of a piece stores grows by the same
    amount with each step, up to rounding to chunks. Raises ValueError if not even one step fits; the message says how much
    it needs.
    """
    T = jax.tree.leaves(xs)[0].shape[0]
    shapes = lambda L: jax.tree.map(lambda x: jax.ShapeDtypeStruct((L, *x.shape[1:]), x.dtype), xs)

    def stored(L):
        graphdef, params, others = nnx.split(layer, nnx.Param, ...)
        call = lambda params, xs: nnx.merge(graphdef, params, others)(xs)[0]
        kept = jax.eval_shape(lambda params, xs: jax.vjp(lambda p: call(p, xs), params)[1], params, shapes(L))
        weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
        return max(1, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) - weights)

    best, low, high = 0, 1, T
    while low <= high:
        middle = (low + high) // 2
        if stored(middle) <= budget:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    if not best:
        raise ValueError(f"budget must be at least {stored(1):,} bytes, for a piece of one step; got {budget:,}")
    return best


def _fold(layer, xs, *args, **kwargs):
    xs, lengths = split(xs)
    if lengths is not None and not getattr(layer, "mixes_steps", False):
        if isinstance(layer, nnx.BatchNorm):
            real = real_steps(lengths, values(xs).shape)
            kwargs = kwargs | dict(mask=real.reshape(-1, *real.shape[2:]))
        return Padded(_fold(layer, xs, *args, **kwargs), lengths)
    xs = join(xs, lengths)
    if isinstance(layer, Timeless):
        return layer(xs, *args, **kwargs)
    xs = values(xs)
    shapes = [x.shape for x in jax.tree.leaves(xs)]
    if any(len(s) < 3 or s[:2] != shapes[0][:2] for s in shapes):
        raise ValueError(
            f"xs must be [T, B, ...], of rank 3 or more, to run {_name(layer)} on [T*B, ...]; got {shapes}"
        )
    T, B = shapes[0][:2]
    outs = layer(jax.tree.map(lambda x: x.reshape(T * B, *x.shape[2:]), xs), *args, **kwargs)
    if bad := [o.shape for o in jax.tree.leaves(outs) if o.shape[:1] != (T * B,)]:
        raise ValueError(f"{_name(layer)} must keep the first axis, T*B = {T * B}; it returned {bad[0]}")
    return jax.tree.map(lambda o: o.reshape(T, B, *o.shape[1:]), outs)


def _check_features(i, layer, xs):
    """Flax's own error about a wrong number of features names no layer."""
    wanted = getattr(layer, "in_features", getattr(layer, "num_features", None))
    shapes = [x.shape for x in jax.tree.leaves(values(split(xs)[0]))]
    if isinstance(wanted, int) and getattr(layer, "axis", -1) == -1 and shapes and shapes[0][-1:] != (wanted,):
        raise ValueError(f"layer {i}, {_name(layer)}, takes {wanted} features, the last axis; its input is {shapes[0]}")


def _packed_output(layer):
    """The `Packed` that a layer returns its spikes in, or None."""
    if isinstance(layer, Remat | Pieces):
        return _packed_output(layer.layer)
    if isinstance(layer, Sequential):
        return _packed_output(layer.layers[-1]) if len(layer.layers) else None
    neurons = layer, getattr(layer, "neuron", None)  # of NormSpiking and Recurrent
    return next((n.out_dtype for n in neurons if isinstance(getattr(n, "out_dtype", None), Packed)), None)


def _name(layer):
    return getattr(layer, "__name__", type(layer).__name__)
