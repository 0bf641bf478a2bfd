"""The table of implementations: what each one offers, where it lives, and which one a call runs.

An implementation is imported when a call names it, or when `implementation=None` tries it. So snnfuse also runs on a
JAX that lacks what one implementation needs: the others still work.
"""

import importlib
from functools import cache
from typing import Protocol

from snnfuse.ops.fused import Passes
from snnfuse.ops.problem import Leaves, Problem


class Implementation(Protocol):
    """One way to run a neuron over time. A fused one inherits `passes` and `run` from `snnfuse.ops.fused.Fused`."""

    def why_not(self, problem: Problem) -> str | None:
        """The reason why this implementation cannot run `problem` on this device, or None if it can."""

    def blocks(self, problem: Problem) -> tuple | None:
        """The block sizes that a call runs with; None for an implementation without blocks."""

    def candidates(self, problem: Problem) -> list[tuple]:
        """The block sizes that `autotune` tries; empty for an implementation without blocks."""

    def passes(self, problem: Problem, blocks: tuple | None = None) -> Passes:
        """The forward and the backward pass, with these block sizes; None means those of `self.blocks(problem)`."""

    def run(self, problem: Problem, params: Leaves, state: Leaves, xs: Leaves) -> tuple[Leaves, Leaves]:
        """(outs, final state), differentiable."""


# name: (module, the implementation in it)
_TABLE = {
    "pallas": ("snnfuse.ops.pallas_triton", "PALLAS"),
    "mosaic": ("snnfuse.ops.pallas_mosaic", "MOSAIC"),
    "triton": ("snnfuse.ops.triton", "TRITON"),
    "scan": ("snnfuse.ops.scan", "SCAN"),
    "interpret": ("snnfuse.ops.pallas_triton", "INTERPRET"),
}
NAMES = tuple(_TABLE)


def preference(problem: Problem) -> tuple[str, ...]:
    """The implementations that `implementation=None` tries, in this order.

    A single step is one elementwise function: XLA fuses it with its neighbours, and a kernel would prevent that. From two steps on
    "pallas" is the fastest, or within 5 %, in most layers that take 50 us or more (benchmarks/results/choice.jsonl and choice.png).
    Long sequences take "triton" if jax-triton is installed: with 1,000 steps it is faster by 3 to 29 %, with 500 steps by up to
    20 % if the parameters are constant, and by 5 to 11 % if they are learned and the neuron has two states. With fewer steps and
    few lanes it takes up to three times as long, because XLA starts its own kernels faster than those of jax-triton. With 32 steps,
    constant parameters and 2^20 + 1 lanes it is faster by 9 to 14 %; with 4 steps it is slower, and fewer lanes of an odd number
    were not measured there. A ResNet-18 (T = 32) takes the same memory and time with both. "mosaic" is slower with gradients of
    parameters and with odd numbers of lanes.
    Later versions of JAX will drop the lowering that "pallas" needs; then "triton" is next.
    """
    if problem.T == 1:
        return ("scan",)
    if problem.param_shapes:  # some are arrays; Python numbers among the params have no shape here
        long = problem.T >= (500 if problem.num_state > 1 else 1000)
    else:
        long = problem.T >= (32 if problem.M % 2 and problem.M > 2**20 else 500)
    return ("triton", "pallas", "mosaic", "scan") if long else ("pallas", "triton", "mosaic", "scan")


@cache
def get(name: str) -> Implementation:
    """The implementation called `name`, one of `NAMES`."""
    module, attribute = _TABLE[name]
    return getattr(importlib.import_module(module), attribute)


def choose(problem: Problem, name: str | None) -> str:
    """`name` if that implementation can run `problem`; if `name` is None, the first of `preference` that can.

    Raises ValueError for an unknown name, and NotImplementedError with every reason if none can run.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"implementation must be None or one of {sorted(NAMES)}; got {name!r}")
    reasons = []
    for candidate in (name,) if name else preference(problem):
        if (why := get(candidate).why_not(problem)) is None:
            return candidate
        reasons.append(f"implementation {candidate!r}: {why}")
    raise NotImplementedError("; ".join(reasons))
