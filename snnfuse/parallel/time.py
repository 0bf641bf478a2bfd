"""Time over devices: each owns T/G consecutive steps of every layer, and a neuron runs in rounds until its start is right.

Layers without time need nothing: their [T/G * B, ...] are on the device. A neuron needs the state before its first
step, which is the one after the last step of the device before. So every device runs its steps for the state alone, s,
and hands the state, [B, N] and nothing of size T, to the next. After g such rounds device g starts from the right one,
after G - 1 every device does, and runs once with outputs, o:

    device 0   s s o          G = 3 devices: s reads x, o reads x and writes the outputs
    device 1   s s o
    device 2   s s o

The gradient goes from the last device to the first: each hands the cotangent of its start to the one before. One part of
it comes from the device's own outputs, and is made once, of x and their cotangents; the other is linear in what the
device was handed, and takes G - 2 rounds that read x alone. One run then has the right cotangent at its end, and writes
the gradients.

In sequences moved, that is (G + 1) / G forward and (G + 3) / G backward, against 2 and 3 on one device, and the memory
is 1 / G. Everything here runs inside of `shard_map` over the axis, such as in a step of `data_parallel`.

Temporal fusion over several GPUs (forward only there): Li et al., ICANN 2024, https://arxiv.org/abs/2408.00280.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from snnfuse import nn
from snnfuse.core.neuron import Neuron, PyTree
from snnfuse.ops import fused, implementations
from snnfuse.ops.api import unroll
from snnfuse.ops.check import check_call
from snnfuse.ops.problem import Leaves
from snnfuse.parallel.step import TIME, axes_here


def unroll_over_time(
    neuron: Neuron,
    params: PyTree,
    state: PyTree | None,
    xs: PyTree,
    *,
    axis: str = TIME,
    implementation: str | None = None,
    out_dtype: Any = None,
    reuse_cotangents: bool = False,
) -> tuple[PyTree, PyTree]:
    """`snnfuse.unroll` of a sequence whose time is cut over the devices along `axis`.

    xs is [T/G, *B, N], this device's steps; so are the outputs. `state`, the one before the first step of all, and the
    final state, after the last one, are the same on every device. The other options are those of `unroll`.
    """
    if axis not in axes_here():
        raise ValueError(f"axis must be one of those that the code runs on, {axes_here()}; got {axis!r}")
    problem, *leaves = check_call(neuron, params, state, xs, out_dtype, reuse_cotangents)
    if (G := lax.axis_size(axis)) == 1 or not problem.num_state:
        options = dict(implementation=implementation, out_dtype=out_dtype, reuse_cotangents=reuse_cotangents)
        return unroll(neuron, params, state, xs, **options)
    if problem.T % problem.chunk_unit:
        raise ValueError(f"packed outputs need a multiple of {problem.chunk_unit} steps a device; got {problem.T}")
    params, state, xs = leaves
    if problem.initial is not None:  # where this device starts is not constant
        state = tuple(jnp.full(problem.lane_shape, value, problem.dtype) for value in problem.initial)
        problem = replace(problem, initial=None)
    passes = lambda p: implementations.get(implementations.choose(p, implementation)).passes(p)
    whole, state_only = passes(problem), passes(problem.state_only)
    outs, end = fused.run(Rounds(whole, state_only, axis), params, state, xs)
    final = [lax.psum(jnp.where(lax.axis_index(axis) == G - 1, leaf, 0), axis) for leaf in end]
    return problem.out_tree.unflatten(outs), problem.step.state_tree.unflatten(final)


@dataclass(frozen=True)
class Rounds:
    """`fused.Passes` of this device's steps, from what the other devices hand it."""

    whole: fused.Passes
    state_only: fused.Passes
    axis: str

    @property
    def problem(self):
        return self.whole.problem

    def forward(self, params, state, xs, *, save):
        """`state` is the one before the first step of all, the final state the one after this device's last."""

        def once(_, start):
            _, end, _ = self.state_only.forward(params, start, xs, save=False)
            return jax.tree.map(self._if_first, state, self._hand(end, 1))

        start = lax.fori_loop(0, lax.axis_size(self.axis) - 1, once, state)
        outs, end, kept = self.whole.forward(params, start, xs, save=save)
        return outs, end, (start, kept)

    def backward(self, params, state, kept, xs, d_outs, d_state, wanted):
        start, kept = kept
        state_alone = fused.Wanted((False,) * len(params), (True,) * len(start), (False,) * len(xs))

        def back(d_outs, d_end, wanted):
            return self.whole.backward(params, start, kept, xs, d_outs, d_end, wanted)

        own = back(d_outs, d_state, state_alone)[1]

        def once(_, handed):
            through = back((None,) * len(d_outs), handed, state_alone)[1]
            return self._hand(_sum(own, through), -1)

        handed = lax.fori_loop(0, lax.axis_size(self.axis) - 2, once, self._hand(own, -1))
        d_params, d_start, d_xs = back(d_outs, _sum(d_state, handed), wanted)
        # the state before all steps is that of the first device; the others' start is not their argument
        d_state = tuple(None if d is None else self._if_first(d, jnp.zeros_like(d)) for d in d_start)
        return d_params, d_state, d_xs

    def _hand(self, state: Leaves, by: int) -> Leaves:
        """To the next device (1) or to the one before (-1); zeros come to the device that nobody hands anything."""
        G = lax.axis_size(self.axis)
        return lax.ppermute(state, self.axis, [(i, i + by) for i in range(G) if 0 <= i + by < G])

    def _if_first(self, a, b):
        return jnp.where(lax.axis_index(self.axis) == 0, a, b)


def _sum(ours, handed):
    """Where None stands for zero."""
    return tuple(h if o is None else o + h for o, h in zip(ours, handed, strict=True))


@dataclass(frozen=True)
class OverTime:
    """`unroll_over_time` along `axis`, for the attribute `unroll` of a `snnfuse.nn.Spiking`."""

    axis: str = TIME

    def __call__(self, neuron, params, state, xs, **options):
        return unroll_over_time(neuron, params, state, xs, axis=self.axis, **options)


def over_time(model: nnx.Module, *, axis: str = TIME) -> nnx.Module:
    """Let every spiking layer of `model`, changed in place, run over the devices along `axis`.

    The model then takes and returns a device's T/G steps, inside of `data_parallel`; read its outputs by `readout`, and
    `synchronise_batch_norm(model, ("data", "time"))` for the statistics of one device.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nn.Spiking):
            module.unroll = OverTime(axis)
    return model


def readout(kind: Any, outs: Array, *, axis: str = TIME) -> Array:
    """`kind(outs)` over all of time, the same on each of its devices; `kind` is a readout of `snnfuse.nn`."""
    if kind not in _JOINED:
        raise ValueError(f"kind must be one of {', '.join(k.__name__ for k in _JOINED)}; got {kind!r}")
    return _JOINED[kind](kind(outs), axis)


def _last(x, axis):
    return lax.psum(jnp.where(lax.axis_index(axis) == lax.axis_size(axis) - 1, x, 0), axis)


_JOINED = {
    nn.spike_rate: lax.pmean,
    nn.membrane_mean: lax.pmean,
    nn.membrane_max: lambda x, axis: lax.all_gather(x, axis).max(0),
    nn.membrane_last: _last,
}
