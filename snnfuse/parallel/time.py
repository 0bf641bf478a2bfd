"""Time over devices: each owns T/G consecutive steps of every layer, and a neuron runs as a wavefront over them.

Layers without time need nothing: their [T/G * B, ...] are on the device. A neuron needs the state before its first
step, from the device before. So the batch is cut into m microbatches; in tick k device g runs microbatch k - g and hands
the state after it, [B/m, N] and nothing of size T, to device g + 1:

    device 0   0 1 2 3 . .          m = 4 microbatches, G = 3 devices, m + G - 1 ticks
    device 1   . 0 1 2 3 .
    device 2   . . 0 1 2 3

The gradient is the same wavefront from the last device to the first, the transpose of this one. Everything here runs
inside of `shard_map` over the axis, such as in a step of `data_parallel`.

Temporal fusion over several GPUs (forward only there): Li et al., ICANN 2024, https://arxiv.org/abs/2408.00280.
"""

from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from snnfuse import nn
from snnfuse.core.neuron import Neuron, PyTree
from snnfuse.ops.api import unroll
from snnfuse.ops.packing import Packed
from snnfuse.parallel.step import TIME


def unroll_over_time(
    neuron: Neuron,
    params: PyTree,
    state: PyTree | None,
    xs: PyTree,
    *,
    axis: str = TIME,
    microbatches: int | None = None,
    implementation: str | None = None,
    out_dtype: Any = None,
    reuse_cotangents: bool = False,
) -> tuple[PyTree, PyTree]:
    """`snnfuse.unroll` of a sequence whose time is cut over the devices along `axis`.

    xs is [T/G, B, ..., N], this device's steps; so are the outputs. `state`, the one before the first step of all, and
    the final state, after the last one, are the same on every device. `microbatches` divides the first axis after time;
    None takes one a device where that divides, else as many as do. The other options are those of `unroll`.
    """
    _check_packed(out_dtype, xs)
    G = lax.axis_size(axis)
    options = dict(implementation=implementation, out_dtype=out_dtype, reuse_cotangents=reuse_cotangents)
    run = partial(unroll, neuron, **options)
    if G == 1 and microbatches in (None, 1):
        return run(params, state, xs)
    B = _batch(xs)
    m = microbatches or max(m for m in range(1, min(G, B) + 1) if B % m == 0)
    if B % m:
        raise ValueError(f"microbatches must divide the batch; got {m} for xs of shape {jax.tree.leaves(xs)[0].shape}")
    lanes = jax.tree.leaves(xs)[0].shape[1:]
    initial = neuron.init_state(lanes) if state is None else state
    g = lax.axis_index(axis)
    ticks = m + G - 1

    def cut(a):  # [T, B, ...] -> [m, T, B/m, ...]
        return jnp.moveaxis(a.reshape(a.shape[0], m, B // m, *a.shape[2:]), 1, 0)

    def join(a):
        return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], B, *a.shape[3:])

    def skewed(a):  # [m, ...] -> [ticks, ...], microbatch j at tick j + g, zeros before and after
        return lax.dynamic_update_slice_in_dim(jnp.zeros((ticks, *a.shape[1:]), a.dtype), a, g, 0)

    def unskewed(a):
        return lax.dynamic_slice_in_dim(a, g, m, 0)

    rows = lambda a: a.reshape(m, B // m, *a.shape[1:])  # [B, ...] -> [m, B/m, ...]
    initial = jax.tree.map(rows, initial)
    shared, own = _split_params(params, lanes, rows)

    def tick(received, now):
        x, first, p, k = now
        running = (k >= g) & (k < g + m)
        start = jax.tree.map(lambda f, r: jnp.where((g == 0) | ~running, f, r), first, received)
        outs, final = run(shared(p), start, x)
        handed = jax.tree.map(lambda s: lax.ppermute(s, axis, [(i, i + 1) for i in range(G - 1)]), final)
        return handed, (outs, final)

    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape[1:], s.dtype), initial)
    sequence = (jax.tree.map(lambda a: skewed(cut(a)), xs), jax.tree.map(skewed, initial), jax.tree.map(skewed, own))
    _, (outs, final) = lax.scan(tick, nothing, (*sequence, jnp.arange(ticks)))
    final = jax.tree.map(lambda s: unskewed(s).reshape(B, *s.shape[2:]), final)
    final = jax.tree.map(lambda s: lax.psum(jnp.where(g == G - 1, s, 0), axis), final)
    return jax.tree.map(lambda a: join(unskewed(a)), outs), final


def _check_packed(out_dtype, xs):
    T = jax.tree.leaves(xs)[0].shape[0]
    for dtype in jax.tree.leaves(out_dtype):
        if isinstance(dtype, Packed) and T % dtype.steps:
            raise ValueError(f"packed outputs need a multiple of {dtype.steps} steps a device; got {T}")


def _batch(xs):
    shape = jax.tree.leaves(xs)[0].shape
    if len(shape) < 2:
        raise ValueError(f"xs must be [T, *B, N], of rank 2 or more; got shape {shape}")
    return shape[1]


def _split_params(params, lanes, rows):
    """(whole, own): `own` are the leaves with a value for each microbatch, and whole(part of them) the params of one."""
    leaves, tree = jax.tree.flatten(params)
    cut = [not isinstance(p, Real) and jnp.ndim(p) == len(lanes) and jnp.shape(p)[0] == lanes[0] > 1 for p in leaves]

    def whole(part):
        part = iter(part)
        return tree.unflatten([next(part) if c else p for p, c in zip(leaves, cut, strict=True)])

    return whole, [rows(jnp.asarray(p)) for p, c in zip(leaves, cut, strict=True) if c]


@dataclass(frozen=True)
class OverTime:
    """`unroll_over_time` with these choices, for the attribute `unroll` of a `snnfuse.nn.Spiking`."""

    axis: str = TIME
    microbatches: int | None = None

    def __call__(self, neuron, params, state, xs, **options):
        return unroll_over_time(neuron, params, state, xs, axis=self.axis, microbatches=self.microbatches, **options)


def over_time(model: nnx.Module, *, axis: str = TIME, microbatches: int | None = None) -> nnx.Module:
    """Let every spiking layer of `model`, changed in place, run over the devices along `axis`.

    The model then takes and returns a device's T/G steps, inside of `data_parallel`; read its outputs by `readout`, and
    `synchronise_batch_norm(model, ("data", "time"))` for the statistics of one device.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nn.Spiking):
            module.unroll = OverTime(axis, microbatches)
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
