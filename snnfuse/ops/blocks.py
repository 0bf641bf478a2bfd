"""Lanes a program owns, warps that run it, steps it takes at a time: the heuristic, each number with its measurement.

Measured on an H100, rows in benchmarks/results/tune.jsonl; `size` is the length of the step's pullback, which bounds what
a chunk costs in registers and in compile time.
"""

from typing import NamedTuple

from snnfuse.ops.problem import Problem


class Blocks(NamedTuple):
    """`lanes` must be a power of two; `chunk` is K, the steps between two checkpoints."""

    lanes: int
    warps: int
    chunk: int


def triton_blocks(problem: Problem) -> Blocks:
    size = len(problem.full_pullback((32,)).jaxpr.eqns)  # 24 for LIF, 29 for adaptive LIF, 60 for Izhikevich
    if problem.M >= 2**16:
        # LIF: best or within 1 % of it at T = 32 and 256, M = 2^17 to 2^24; chunks of 32 spill (0.5 of the speed)
        return Blocks(256, 4, _chunk(problem.T, max(1, min(16, 512 // size))))
    # LIF, T = 500, M = 8192: 82 us; chunks of 10 take 128 us, 128 lanes 88 us: latency counts here, not bandwidth
    return Blocks(32, 1, _chunk(problem.T, max(1, min(32, 768 // size))))


def interpreter_blocks(problem: Problem) -> Blocks:
    return Blocks(128, 4, _chunk(problem.T, 4))  # short chunks: XLA for CPU takes long over unrolled ones


def _chunk(T: int, most: int) -> int:
    """The longest chunk up to `most` that divides T, so that no short chunk is compiled beside it; `most` if all are short."""
    if T <= most:
        return T
    return next((k for k in range(most, most // 2, -1) if T % k == 0), most)
