"""Sequences of other lengths in one batch: each layer gives what it would give for every sequence alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from snnfuse.core.compose import Until, UntilParams, UntilState
from snnfuse.core.neuron import PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Padded:
    """Sequences that end at different steps: `values` [T, B, ...], and `lengths` [B], their numbers of steps, integers from 1 to T.

        outs, state = model(nn.Padded(xs, lengths))      # outs is Padded too
        logits = nn.membrane_mean(outs)

    The steps after the end of a sequence have no influence, if their values are finite. The returned state is that of each
    sequence after its own last step. BatchNorm takes its statistics from the steps before the end; readouts and
    `training.temporal_cross_entropy` use only these. Outputs of neurons are 0 after the end. A layer that cannot do this raises
    NotImplementedError.
    """

    values: PyTree
    lengths: Array

    def __len__(self) -> int:
        return jax.tree.leaves(self.values)[0].shape[0]


def split(xs: PyTree, lengths: Array | None = None) -> tuple[PyTree, Array | None]:
    """(values, lengths) of `Padded`; (xs, `lengths`) of anything else."""
    if not isinstance(xs, Padded):
        return xs, lengths
    if lengths is not None:
        raise ValueError("lengths must be None where the sequences are nn.Padded, which has its own")
    return xs.values, _checked(xs.lengths, jax.tree.leaves(xs.values)[0].shape)


def check_same(name: str, lengths: Array | None, wanted: Array | None) -> None:
    """Raise ValueError if the lengths of the sequences in argument `name` differ from those of xs. Inside of `jit` nothing is known."""
    known = lengths is not None and not any(isinstance(x, jax.core.Tracer) for x in (lengths, wanted))
    if known and (lengths != wanted).any():
        raise ValueError(f"{name} must have the lengths of xs, {wanted.tolist()}; got {lengths.tolist()}")


def join(values: PyTree, lengths: Array | None) -> PyTree:
    """`Padded` if there are lengths."""
    return values if lengths is None else Padded(values, lengths)


def real_steps(lengths: Array | None, shape: tuple[int, ...]) -> Array | None:
    """[T, B, 1, ...], whether each step of [T, B, ...] comes before the end of its sequence; None without `lengths`.

    Lengths outside of 1..T raise ValueError. Inside of `jit` there is no value to look at; there, a length above T counts as T, and a
    sequence of length 0 has no real step. So has one that ends before a piece of `nn.Pieces`.
    """
    if lengths is None:
        return None
    lengths = _checked(lengths, shape)
    t = jnp.arange(shape[0])[:, None]
    return (t < lengths).reshape(*shape[:2], *(1,) * (len(shape) - 2))


def _checked(lengths, shape):
    lengths = jnp.asarray(lengths)
    if len(shape) < 2 or lengths.shape != shape[1:2] or not jnp.issubdtype(lengths.dtype, jnp.integer):
        wanted = f"integers of shape {shape[1:2]}, one for each sequence of {shape}"
        raise ValueError(f"lengths must be {wanted}; got {lengths.dtype} of shape {lengths.shape}")
    if isinstance(lengths, jax.core.Tracer):
        return jnp.minimum(lengths, shape[0])
    if ((lengths < 1) | (lengths > shape[0])).any():
        raise ValueError(f"lengths must be from 1 to T = {shape[0]}; got {int(lengths.min())} to {int(lengths.max())}")
    return lengths


def until_end(unroll: Callable, lengths: Array | None) -> Callable:
    """`unroll`, which stops at the end of each sequence."""
    return unroll if lengths is None else partial(_until_end, unroll, lengths)


def _until_end(unroll, lengths, neuron, params, state, xs, **options):
    batch = jax.tree.leaves(xs)[0].shape[1:]
    real = jnp.asarray(lengths).astype(jnp.float32).reshape(-1, *(1,) * (len(batch) - 1))
    zero = None if state is None else jnp.zeros(batch, jax.tree.leaves(state)[0].dtype)
    start = None if state is None else UntilState(state, zero)
    outs, after = unroll(Until(neuron), UntilParams(params, jax.lax.stop_gradient(real)), start, xs, **options)
    return outs, after.inner


def ends(xs: Array, before: Array, lengths: Array | None) -> Array:
    """xs [T, B, ...] at the last step of each sequence, [B, ...]; `before` for sequences of 0 steps."""
    if lengths is None:
        return xs[-1]
    return take(jnp.concatenate([before[None].astype(xs.dtype), xs]), lengths, 1)[0]


def take(xs: Array, start: Array, steps: int) -> Array:
    """[steps, B, ...]: the steps of xs [T, B, ...] that follow `start` [B], another one for each sequence."""
    place = jnp.arange(steps)[:, None] + start
    return jnp.take_along_axis(xs, place.reshape(*place.shape, *(1,) * (xs.ndim - 2)), axis=0)
