"""The baseline and oracle: the step under `jax.lax.scan`, its gradient by JAX."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from snnfuse.ops.packing import Packed, pack
from snnfuse.ops.partition import varying
from snnfuse.ops.problem import Leaves, Problem


@dataclass(frozen=True)
class Scan:
    """The implementation "scan": it runs every valid call, on any device."""

    def why_not(self, problem: Problem) -> None:
        return None

    def blocks(self, problem: Problem) -> None:
        return None

    def candidates(self, problem: Problem) -> list:
        return []

    def passes(self, problem: Problem, blocks: None = None) -> "ScanPasses":
        return ScanPasses(problem)

    def run(self, problem: Problem, params: Leaves, state: Leaves, xs: Leaves) -> tuple[Leaves, Leaves]:
        return _scan(problem, params, state, xs)


SCAN = Scan()


@partial(jax.jit, static_argnums=0)  # outside of `jit`, an equal call, or its gradient, reuses the compiled loop
def _scan(problem: Problem, params: Leaves, state: Leaves, xs: Leaves) -> tuple[Leaves, Leaves]:
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


@dataclass(frozen=True)
class ScanPasses:
    """The `fused.Passes` that JAX derives from the scan. `kept` is the pullback that `jax.vjp` returns."""

    problem: Problem

    def forward(self, params, state, xs, *, save):
        def run(*args):
            outs, final = _scan(self.problem, *args)
            return (self._differentiable(outs), final), outs

        if not save:
            return *_scan(self.problem, params, state, xs), ()
        (_, final), pullback, outs = jax.vjp(run, params, state, xs, has_aux=True)
        return outs, final, pullback

    def backward(self, params, state, pullback, xs, d_outs, d_state, wanted):
        shape = self.problem.lane_shape
        d_outs = tuple(
            jnp.zeros((self.problem.T, *shape), dtype) if d is None else d
            for d, dtype in zip(*map(self._differentiable, (d_outs, self.problem.out_dtypes)), strict=True)
        )
        d_state = tuple(jnp.zeros(shape, self.problem.dtype) if d is None else d for d in d_state)
        cotangents, _ = varying(((d_outs, d_state), xs))
        return tuple(
            tuple(d if want else None for d, want in zip(group, which, strict=True))
            for group, which in zip(pullback(cotangents), vars(wanted).values(), strict=True)
        )

    def _differentiable(self, outs):
        return tuple(o for o, live in zip(outs, self.problem.differentiable, strict=True) if live)
