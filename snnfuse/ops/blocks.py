"""Lanes a program owns, warps that run it, steps it takes at a time: the heuristic, each number with its measurement."""

from typing import NamedTuple

from snnfuse.ops.problem import Problem


class Blocks(NamedTuple):
    """`lanes` must be a power of two; `chunk` is K, the steps between two checkpoints."""

    lanes: int
    warps: int
    chunk: int


def triton_blocks(problem: Problem) -> Blocks:
    if problem.M >= 2**16:
        return Blocks(256, 2, _chunk(problem.T, 8))
    return Blocks(64, 2, _chunk(problem.T, 32))


def interpreter_blocks(problem: Problem) -> Blocks:
    return Blocks(128, 4, _chunk(problem.T, 4))  # short chunks: XLA for CPU takes long over unrolled ones


def _chunk(T: int, most: int) -> int:
    """The longest chunk up to `most` that divides T, so that no short chunk is compiled beside it; `most` if all are short."""
    if T <= most:
        return T
    return next((k for k in range(most, most // 2, -1) if T % k == 0), most)
