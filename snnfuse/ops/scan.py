"""The baseline and oracle: the step under `jax.lax.scan`, its gradient by JAX."""

import jax
import jax.numpy as jnp

from snnfuse.ops.packing import Packed, pack
from snnfuse.ops.partition import varying
from snnfuse.ops.problem import Leaves, Problem


def why_not(problem: Problem) -> str | None:
    return None


def unroll(problem: Problem, params: Leaves, state: Leaves, xs: Leaves) -> tuple[Leaves, Leaves]:
    params = tuple(p.astype(problem.dtype) for p in params)
    if problem.initial is not None:
        state = tuple(jnp.full(problem.lane_shape, value, problem.dtype) for value in problem.initial)

    params, state, xs = varying((params, state, xs))

    def body(state, x):
        state, outs = problem.step(params, state, tuple(leaf.astype(problem.dtype) for leaf in x))
        steps = (
            (o != 0) if isinstance(d, Packed) else o.astype(d) for o, d in zip(outs, problem.out_dtypes, strict=True)
        )
        return state, tuple(steps)

    state, outs = jax.lax.scan(body, state, xs)
    pairs = zip(outs, problem.out_dtypes, strict=True)
    return tuple(pack(o, d.steps) if isinstance(d, Packed) else o for o, d in pairs), state
