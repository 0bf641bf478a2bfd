"""The gradient of a long sequence, piece by piece, in memory that does not depend on T."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from snnfuse.core.neuron import PyTree
from snnfuse.nn.spikes import values
from snnfuse.nn.temporal import Temporal, whole_steps


class Window(NamedTuple):
    """The steps before, which a gradient reaches: the state before them, the input of their pieces, and which pieces begin a sequence."""

    state: PyTree
    xs: tuple
    begins: tuple


def gradients(
    model: Temporal,
    loss: Callable,
    xs: PyTree,
    *targets: PyTree,
    state: PyTree | None = None,
    length: int = 1,
    reach: int | None = None,
    begins: Array | None = None,
    has_aux: bool = False,
) -> tuple[Array, nnx.State, PyTree]:
    """(loss, gradients of all `nnx.Param`, state after the last step), summed over pieces of `length` steps.

        sum over pieces of grad loss(outs of the piece, *targets of the piece)

    The gradient of a piece reaches back to the step `reach` steps before its end, so nothing earlier is stored. With the networks of
    `sltt` and `ottt` the result is the same for every `length` and `reach`. With other networks this is truncated backpropagation
    through time, whose k1 is `length` and k2 is `reach`. Give the gradients to `optimizer.update(model, grads)`. BatchNorm takes the
    statistics of each piece, and dropout draws a mask for each; steps that are reached again run again, with new ones.

    Args:
      model: a network along time.
      loss: a function of outputs [length, B, ...] and targets that returns a number, such as a sum over steps.
      xs: the input, a tree of arrays [T, B, ...]. targets: trees of arrays [T, ...].
      state: what an earlier call returned; None (the default) starts a sequence.
      length: the steps of a piece, 1 by default. T need not be a multiple of it, unless `reach` or `begins` is given.
      reach: a multiple of `length`, by default `length` itself.
      begins: bool [T / length, B], where a piece begins another sequence: the state before it is the first one.
      has_aux: True: loss returns (a number, aux), and the result is ((loss, aux), gradients, state), aux with an axis of pieces.

    Williams and Peng 1990, https://doi.org/10.1162/neco.1990.2.4.490.
    """
    if not isinstance(model, Temporal):
        raise TypeError(f"model must run along time, such as nn.Sequential(...); got {model!r}")
    length = whole_steps("length", length)
    xs = values(xs, "online.gradients")  # `begins` is for recordings of other lengths
    everything = (xs, *targets)
    steps = {jnp.shape(x)[0] if jnp.ndim(x) else 0 for x in jax.tree.leaves(everything)}
    if len(steps) != 1 or 0 in steps:
        raise ValueError(f"xs and targets must be arrays [T, ...] of one T, at least 1; got lengths {sorted(steps)}")
    (T,) = steps
    reach = length if reach is None else whole_steps("reach", reach)
    if reach % length:
        raise ValueError(f"reach must be a multiple of length, {length}; got {reach}")
    past, flagged = reach // length - 1, reach > length or begins is not None
    if flagged and T % length:
        raise ValueError(f"length must divide T = {T} where reach or begins is given; got {length}")
    length = min(length, T)
    first = model.init_state(jax.tree.map(lambda x: x[:length], xs))
    count, B = T // length, jax.tree.leaves(xs)[0].shape[1]
    if flagged:
        begins = jnp.zeros((count, B), bool) if begins is None else jnp.asarray(begins)
        if begins.shape != (count, B) or begins.dtype != bool:
            raise ValueError(f"begins must be bool [T / length, B] = {(count, B)}; got {begins.dtype}{begins.shape}")
        begins = begins if state is not None else begins.at[0].set(True)
    if state is None:
        nothing = jax.tree.map(lambda x: jnp.zeros((length, *x.shape[1:]), x.dtype), xs)
        state = Window(first, (nothing,) * past, (jnp.zeros(B, bool),) * past) if past else first
    if past and not (isinstance(state, Window) and len(state.xs) == past):
        raise ValueError(f"state must be what a call with reach={reach} returned, or None; got {type(state).__name__}")
    before = state if past else Window(state, (), ())
    axes = _batch_axes(model, xs, length) if flagged else None
    counted = [path for path, module in nnx.iter_modules(model) if getattr(module, "decay_out", 0)]
    if counted and reach > 1:
        raise ValueError(
            f"length and reach must be 1 for an Eprop with decay_out, whose decay would count twice; got {length} and {reach} for "
            f"{'.'.join(map(str, counted[0])) or 'the model'}"
        )
    graphdef, params, others = nnx.split(model, nnx.Param, ...)

    def reset(state, flag):
        """The state, and the first one where `flag` [B] is True."""
        if flag is None:
            return state
        choose = lambda axis, new, old: jnp.where(
            flag.reshape(*(1,) * axis, -1, *(1,) * (old.ndim - axis - 1)), new, old
        )
        return jax.tree.map(choose, axes, first, state)

    def piece(carry, part):
        before, others, total, grads = carry
        (x, *now), begin = part
        inputs, flags = (*before.xs, x), (*before.begins, begin)

        def run(params):
            layer = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, others))
            state, states = before.state, []
            for x, flag in zip(inputs, flags, strict=True):
                outs, state = layer(x, reset(state, flag))
                states.append(state)
            value = loss(outs, *now)
            value, aux = value if has_aux else (value, None)
            return value, (aux, states[0], nnx.state(layer, nnx.Not(nnx.Param)))

        (value, (aux, after, others)), more = jax.value_and_grad(run, has_aux=True)(params)
        before = Window(after, inputs[1:], flags[1:])
        return (before, others, total + value.astype(jnp.float32), jax.tree.map(jnp.add, grads, more)), aux

    carry = before, others, jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)
    whole = T - T % length
    cut = lambda x: x[:whole].reshape(-1, length, *x.shape[1:])
    carry, aux = lax.scan(piece, carry, (jax.tree.map(cut, everything), begins))
    if whole < T:
        carry, last = piece(carry, (jax.tree.map(lambda x: x[whole:], everything), None))
        aux = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), aux, last)
    before, others, total, grads = carry
    nnx.update(model, others)
    return (total, aux) if has_aux else total, grads, before if past else before.state


def _batch_axes(model, xs, length):
    """Which axis of each array of the state is the batch: the one that grows with it."""
    shapes = lambda more: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((length, x.shape[1] + more, *x.shape[2:]), x.dtype), xs
    )
    small, large = (jax.eval_shape(model.init_state, shapes(more)) for more in (0, 1))
    grown = lambda a, b: next((i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n), None)
    axes = jax.tree.map(grown, small, large, is_leaf=lambda x: hasattr(x, "shape"))
    if None in jax.tree.leaves(axes, is_leaf=lambda x: x is None):
        raise NotImplementedError("reach and begins need a state with a batch axis in each of its arrays")
    return axes
