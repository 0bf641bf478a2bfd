"""Temporal fusion: the parts common to every fused implementation.

A sequence [T, *B, N] is flattened to [T, M] lanes (a lane is one neuron of one sample). A program of the kernel owns a
block of lanes and runs them over time in chunks of K steps. In training the forward kernel also stores a checkpoint: the
state at the start of each chunk. The backward kernel visits the chunks in reverse. It loads the inputs of a chunk again,
recomputes its states from the checkpoint, and pulls the cotangents back step by step. So two things are stored for the
backward pass: the inputs, and the checkpoints, which take 1/K of a float32 tensor for each leaf of the state. A
cotangent that is zero is not read, a gradient that is not wanted is not written, and a constant initial state is
compiled in.

Bytes per element and step, forward + backward, one input and one output: x and s forward, x, ds and dx backward. That is
5 x itemsize (20 in float32, 10 in bfloat16), plus 8 / K for the checkpoints, which are written once and read once.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex

from snnfuse.ops.partition import like, on_lanes, varying
from snnfuse.ops.problem import Leaves, Problem


@jax.tree_util.register_static
@dataclass(frozen=True)
class Wanted:
    """Which arguments need a gradient. No gradient is computed for the others."""

    params: tuple[bool, ...]
    state: tuple[bool, ...]
    xs: tuple[bool, ...]


class Kernels(Protocol):
    """A forward and a backward kernel over flat lanes. Hashable.

    `params` are [P], where P divides M: lane m reads element m % P. `state` is () if the initial state is constant
    (`problem.initial`). There are `blocks.checkpoints(T)` checkpoints. None stands for a cotangent that is zero and for
    a gradient that is not wanted.
    """

    problem: Problem

    def forward(self, params: Leaves, state: Leaves, xs: Leaves, *, save: bool) -> tuple[Leaves, Leaves, Leaves]:
        """(outs [T, M], final state [M], checkpoints [_, M], none unless `save`)."""

    def backward(self, params, state, checkpoints, xs, d_outs, d_state, *, wanted: Wanted, periods: tuple[int, ...]):
        """(d_params; d_state [M]; d_xs [T, M]).

        `periods` has an entry P for each wanted param. Its gradient [P] is returned in parts, float32 [n P] for any n:
        lane m of the parts belongs to element m % P, and the sum of the n parts is the gradient.
        """


class Passes(Protocol):
    """The same pair of functions as `Kernels`, for arrays [T, *B, N]. Hashable.

    `kept` is what `forward` stores for `backward`.
    """

    problem: Problem

    def forward(self, params: Leaves, state: Leaves, xs: Leaves, *, save: bool) -> tuple[Leaves, Leaves, Any]:
        """(outs, final state, kept). `kept` is empty unless `save`."""

    def backward(self, params, state, kept, xs, d_outs, d_state, wanted: Wanted):
        """(d_params, d_state, d_xs), with None for each gradient that is not wanted."""


@dataclass(frozen=True)
class KernelPasses:
    """The passes made of a pair of kernels. On several devices, each device runs the kernels on its own lanes."""

    kernels: Kernels

    @property
    def problem(self) -> Problem:
        return self.kernels.problem

    def forward(self, params, state, xs, *, save):
        return on_lanes("forward", self.kernels, params, state, xs, save=save)

    def backward(self, params, state, checkpoints, xs, d_outs, d_state, wanted):
        groups = state, checkpoints, xs, d_outs, d_state
        grads = on_lanes("backward", self.kernels, params, *groups, wanted=wanted)
        return jax.tree.map(lambda p, d: None if d is None else like(d, p), (params, state, xs), grads)


class Fused:
    """The methods that all fused implementations share. A subclass defines `why_not`, `blocks`, `candidates` and `kernels`."""

    def kernels(self, problem: Problem, blocks: tuple) -> Kernels:
        raise NotImplementedError

    def passes(self, problem: Problem, blocks: tuple | None = None) -> Passes:
        return KernelPasses(self.kernels(problem, blocks or self.blocks(problem)))

    def run(self, problem: Problem, params: Leaves, state: Leaves, xs: Leaves) -> tuple[Leaves, Leaves]:
        return run(self.passes(problem), params, state, xs)


def run(passes: Passes, params: Leaves, state: Leaves, xs: Leaves) -> tuple[Leaves, Leaves]:
    return _run(passes, *varying((params, state, xs)))


@partial(jax.jit, static_argnums=0)
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(passes, params, state, xs):
    outs, state, _ = passes.forward(params, state, xs, save=False)
    return outs, state


def _run_forward(passes, *args):
    values = jax.tree.map(lambda a: a.value, args)
    wanted = Wanted(*jax.tree.map(lambda a: a.perturbed, args))
    outs, final, kept = passes.forward(*values, save=True)
    return (outs, final), (values, kept, wanted)


def _run_backward(passes, residuals, cotangents):
    (params, state, xs), kept, wanted = residuals
    d_outs, d_state = (tuple(None if isinstance(d, SymbolicZero) else d for d in group) for group in cotangents)
    d_outs = tuple(d if live else None for d, live in zip(d_outs, passes.problem.differentiable, strict=True))
    return passes.backward(params, state, kept, xs, d_outs, d_state, wanted)


_run.__wrapped__.defvjp(_run_forward, _run_backward, symbolic_zeros=True)


def chunk_forward(problem: Problem, params: Leaves, state: Leaves, xs: list[Leaves]) -> tuple[Leaves, list[Leaves]]:
    """Run K steps; `xs` holds the inputs of each. Returns (state after the chunk, the outputs of each step)."""
    outs = []
    for x in xs:
        state, out = _step(problem, params, state, x)
        outs.append(out)
    return state, outs


def chunk_backward(
    problem: Problem, pullback, params, state, xs: list[Leaves], d_outs: list[Leaves], d_params, d_state
):
    """Pull cotangents back through K steps, given the state before the chunk.

    Returns (d_params, d_state before the chunk, the d_x of each step). `pullback` is `problem.pullback_jaxpr` for the
    wanted gradients; `d_params` and each d_x hold only those.
    """
    pullback = _function(pullback)
    states = [state]
    for x in xs[:-1]:
        states.append(_step(problem, params, states[-1], x)[0])
    d_xs = [None] * len(xs)
    for k in reversed(range(len(xs))):
        d = pullback(*params, *states[k], *_float(problem, xs[k]), *d_state, *_float(problem, d_outs[k]))
        d_state, here, d_xs[k] = split(d, len(state), len(d_params))
        d_params = tuple(total + d_p for total, d_p in zip(d_params, here, strict=True))
    return d_params, d_state, d_xs


@lru_cache
def _function(jaxpr):
    """A jaxpr as a function that is traced once: in a chunk of K steps it is called K times."""
    return jax.jit(jex.jaxpr_as_fun(jaxpr))


def _step(problem, params, state, x):
    out = _function(problem.step_jaxpr(jnp.shape(x[0])))(*params, *state, *_float(problem, x))
    return tuple(out[: len(state)]), tuple(out[len(state) :])


def _float(problem, leaves):
    """Cast to the dtype of the arithmetic. It is called just before each use, because 16-bit inputs take half the registers until they are cast."""
    return tuple(leaf.astype(problem.dtype) for leaf in leaves)


def results_of_forward(problem: Problem, results) -> tuple[Leaves, Leaves, Leaves]:
    """(outs, final state, checkpoints) from the flat results of a forward kernel."""
    return split(results, len(problem.out_dtypes), problem.num_state)


def shapes_of_backward(problem: Problem, xs: Leaves, wanted: Wanted, groups: int = 1) -> list[jax.ShapeDtypeStruct]:
    """The flat results of a backward kernel: the wanted d_params, float32 [M / groups] each, because a program adds those
    of `groups` blocks of lanes; the wanted d_state, float32 [M] each; then the wanted d_xs."""
    lanes = lambda count: jax.ShapeDtypeStruct((count,), problem.dtype)
    d_xs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x, want in zip(xs, wanted.xs, strict=True) if want]
    d_params = [lanes(problem.M // groups)] * sum(wanted.params)
    return d_params + [lanes(problem.M)] * sum(wanted.state) + d_xs


def given(leaves) -> Leaves:
    """The leaves that are not None."""
    return tuple(leaf for leaf in leaves if leaf is not None)


def reused(problem: Problem, inputs, out_shape) -> dict[int, int]:
    """{argument: result} of a backward kernel: with `reuse_cotangents` one d_x is written over one cotangent.

    That is safe because a kernel reads a chunk before it writes it. `inputs`: the groups of arguments; the fifth holds the
    cotangents of the outputs.
    """
    if not problem.reuse_cotangents:
        return {}
    like = lambda a: (a.shape, a.dtype)
    first = sum(map(len, inputs[:4]))
    pairs = [(first + i, o) for i, d in enumerate(inputs[4]) for o, a in enumerate(out_shape) if like(a) == like(d)]
    return dict(pairs[:1])


def results_of_backward(results, wanted: Wanted):
    """(d_params, d_state, d_xs) from the flat results of a backward kernel, with None for every gradient not wanted."""
    results = iter(results)
    return tuple(tuple(next(results) if want else None for want in group) for group in vars(wanted).values())


def split(leaves, *sizes):
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(tuple(leaves[a:b]) for a, b in zip([0, *ends], [*ends, len(leaves)], strict=True))
