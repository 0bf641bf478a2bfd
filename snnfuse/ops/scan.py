"""The baseline and oracle: the step under `jax.lax.scan`, its gradient by JAX."""

import jax
import jax.numpy as jnp

from snnfuse.ops.problem import Leaves, Problem


def why_not(problem: Problem) -> str | None:
    return None


def unroll(problem: Problem, params: Leaves, state: Leaves, xs: Leaves) -> tuple[Leaves, Leaves]:
    params = tuple(p.astype(problem.dtype) for p in params)
    if problem.initial is not None:
        state = tuple(jnp.full(problem.lane_shape, value, problem.dtype) for value in problem.initial)

    def body(state, x):
        state, outs = problem.step(params, state, tuple(leaf.astype(problem.dtype) for leaf in x))
        return state, tuple(o.astype(d) for o, d in zip(outs, problem.out_dtypes, strict=True))

    state, outs = jax.lax.scan(body, state, xs)
    return outs, state
