"""The gradient of a long sequence, piece by piece, in memory that does not depend on T."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from snnfuse.core.neuron import PyTree
from snnfuse.nn.spikes import values
from snnfuse.nn.temporal import Temporal, whole_steps


def gradients(
    model: Temporal, loss: Callable, xs: PyTree, *targets: PyTree, state: PyTree | None = None, length: int = 1
) -> tuple[Array, nnx.State, PyTree]:
    """(loss, gradients of all `nnx.Param`, state after the last step), summed over pieces of `length` steps.

        sum over pieces of grad loss(outs of the piece, *targets of the piece)

    No gradient passes from a piece to the one before, so nothing of the earlier pieces is stored. With the networks of `sltt` and
    `ottt` the result is the same for every `length`. With other networks this is truncated backpropagation through time. Give
    the gradients to `optimizer.update(model, grads)`. BatchNorm takes the statistics of each piece, and dropout draws a mask for each.

    Args:
      model: a network along time.
      loss: a function of outputs [length, B, ...] and targets that returns a number, such as a sum over steps.
      xs: the input, a tree of arrays [T, B, ...]. targets: trees of arrays [T, ...].
      state: the state before the first step; None (the default) starts a sequence.
      length: the steps of a piece, 1 by default. T need not be a multiple of it.
    """
    if not isinstance(model, Temporal):
        raise TypeError(f"model must run along time, such as nn.Sequential(...); got {model!r}")
    length = whole_steps("length", length)
    xs = values(xs)
    everything = (xs, *targets)
    steps = {jnp.shape(x)[0] if jnp.ndim(x) else 0 for x in jax.tree.leaves(everything)}
    if len(steps) != 1 or 0 in steps:
        raise ValueError(f"xs and targets must be arrays [T, ...] of one T, at least 1; got lengths {sorted(steps)}")
    (T,) = steps
    length = min(length, T)
    state = model.init_state(jax.tree.map(lambda x: x[:length], xs)) if state is None else state
    graphdef, params, others = nnx.split(model, nnx.Param, ...)

    def piece(carry, part):
        state, others, total, grads = carry

        def run(params):
            layer = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, others))
            outs, after = layer(part[0], state)
            return loss(outs, *part[1:]), (after, nnx.state(layer, nnx.Not(nnx.Param)))

        (value, (state, others)), more = jax.value_and_grad(run, has_aux=True)(params)
        return (state, others, total + value.astype(jnp.float32), jax.tree.map(jnp.add, grads, more)), None

    carry = state, others, jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)
    whole = T - T % length
    cut = lambda x: x[:whole].reshape(-1, length, *x.shape[1:])
    carry, _ = lax.scan(piece, carry, jax.tree.map(cut, everything))
    if whole < T:
        carry, _ = piece(carry, jax.tree.map(lambda x: x[whole:], everything))
    state, others, total, grads = carry
    nnx.update(model, others)
    return total, grads, state
