"""Time over devices: each device owns T/G consecutive steps of every layer. Devices repeat a state-only pass until each
one has the right starting state.

Layers without a state along time need no exchange: their [T/G * B, ...] are on the device. A neuron needs the state
before its first step, which is the state after the last step of the device before. So every device first runs its steps
for the state only (s below), and passes the final state, [B, N], to the next device. Nothing of size T is sent. After g
such rounds device g has the right starting state. After G - 1 rounds every device has it, and runs once with outputs (o):

    device 0   s s o          G = 3 devices: s reads x, o reads x and writes the outputs
    device 1   s s o
    device 2   s s o

The gradient goes from the last device to the first: each device passes the cotangent of its starting state to the device
before. This cotangent has two parts. The first comes from the device's own outputs; it is computed once, from x and the
cotangents of the outputs. The second is linear in the cotangent that the device received; it takes G - 2 rounds, which read
only x. A last run then has the right cotangent at its end, and writes the gradients.

Counted in sequences moved, that is (G + 1) / G forward and (G + 3) / G backward, where one device moves 2 and 3. The memory
is 1 / G. All of this runs inside of `shard_map` over the axis, for example in a step of `data_parallel`.

Temporal fusion over several GPUs, forward only: Li et al., ICANN 2024, https://arxiv.org/abs/2408.00280.
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
    """`snnfuse.unroll` for a sequence that is cut along time over the devices of `axis`.

    xs and the outputs are this device's steps, [T/G, *B, N]. `state` is the state before the first step of the whole
    sequence, and the final state is the one after its last step. Both are the same on every device. The other options are
    those of `unroll`.
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
    if problem.initial is not None:  # the starting state of a device is not constant
        state = tuple(jnp.full(problem.lane_shape, value, problem.dtype) for value in problem.initial)
        problem = replace(problem, initial=None)
    passes = lambda p: implementations.get(implementations.choose(p, implementation)).passes(p)
    whole, state_only = passes(problem), passes(problem.state_only)
    outs, end = fused.run(Rounds(whole, state_only, axis), params, state, xs)
    final = [lax.psum(jnp.where(lax.axis_index(axis) == G - 1, leaf, 0), axis) for leaf in end]
    return problem.out_tree.unflatten(outs), problem.step.state_tree.unflatten(final)


@dataclass(frozen=True)
class Rounds:
    """`fused.Passes` of this device's steps, with the states that the other devices pass to it."""

    whole: fused.Passes
    state_only: fused.Passes
    axis: str

    @property
    def problem(self):
        return self.whole.problem

    def forward(self, params, state, xs, *, save):
        """`state` is before the first step of the whole sequence; the final state is after this device's last step."""

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
        # only the first device starts from the argument `state`; the others start from what they were passed
        d_state = tuple(None if d is None else self._if_first(d, jnp.zeros_like(d)) for d in d_start)
        return d_params, d_state, d_xs

    def _hand(self, state: Leaves, by: int) -> Leaves:
        """Pass to the next device (1) or to the one before (-1). A device that is passed nothing gets zeros."""
        G = lax.axis_size(self.axis)
        return lax.ppermute(state, self.axis, [(i, i + by) for i in range(G) if 0 <= i + by < G])

    def _if_first(self, a, b):
        return jnp.where(lax.axis_index(self.axis) == 0, a, b)


def _sum(ours, handed):
    """The sum of both, where None stands for zero."""
    return tuple(h if o is None else o + h for o, h in zip(ours, handed, strict=True))


@dataclass(frozen=True)
class OverTime:
    """`unroll_over_time` along `axis`, as the attribute `unroll` of a `snnfuse.nn.Spiking`."""

    axis: str = TIME

    def __call__(self, neuron, params, state, xs, **options):
        return unroll_over_time(neuron, params, state, xs, axis=self.axis, **options)


def over_time(model: nnx.Module, *, axis: str = TIME) -> nnx.Module:
    """Make every spiking layer of `model` run over the devices along `axis`. Changes `model` in place.

    The model then takes and returns the T/G steps of one device, inside of `data_parallel`. Read its outputs by `readout`.
    To normalise as on one device, call `synchronise_batch_norm(model, ("data", "time"))`.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nn.Spiking):
            module.unroll = OverTime(axis)
    return model


def readout(kind: Any, outs: Array, *, axis: str = TIME) -> Array:
    """`kind(outs)` over the whole sequence, the same on each device. `kind` is a readout of `snnfuse.nn`."""
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
