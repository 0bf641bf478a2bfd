"""Block sizes: the lanes that a program owns, the warps that run it, and the steps of a chunk.

If `snnfuse.autotune` has timed a call on this device, its result is used; otherwise a heuristic decides. Each number of
the heuristic carries its measurement on an H100; the rows are in benchmarks/results/tune.jsonl. `size` is the number of
equations of the step's pullback; it bounds the registers and the compile time of a chunk.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from snnfuse.ops import tuning
from snnfuse.ops.packing import Packed
from snnfuse.ops.problem import Problem


class Blocks(NamedTuple):
    """`lanes` is a power of two; `chunk` is K, the steps between two checkpoints; with `prefetch` the next chunk is loaded early."""

    lanes: int
    warps: int
    chunk: int
    prefetch: bool = False

    def checkpoints(self, T: int) -> int:
        """The number of checkpoints: the states before each chunk, without the first."""
        return -(-T // self.chunk) - 1


class MosaicBlocks(NamedTuple):
    """A program owns `rows` of 256 lanes; `chunk` is K, which divides T; `stages` chunks are in flight at once."""

    rows: int
    chunk: int
    stages: int

    def checkpoints(self, T: int) -> int:
        """The number of checkpoints: the states before each chunk, if there is more than one chunk."""
        return T // self.chunk if T > self.chunk else 0


def mosaic_blocks(problem: Problem) -> MosaicBlocks:
    return _tuned(problem, MosaicBlocks) or _mosaic_heuristic(problem)


def mosaic_candidates(problem: Problem) -> list[MosaicBlocks]:
    height = -(-problem.M // 256)
    chunks = [k for k in (4, 5, 8, 10, 16) if problem.T % k == 0] or [1]
    return [MosaicBlocks(r, k, s) for r in (1, 2, 4, 8) for k in chunks for s in (2, 3, 4) if height % r == 0]


def _mosaic_heuristic(problem):
    """Tiles of 4 kB: float32 [8, 2, 256] is best of 7 at T = 32, M = 2^20, bfloat16 [8, 4, 256] too: 0.87 and 0.82
    of the copy rate."""
    height = -(-problem.M // 256)
    sequences = [*problem.x_dtypes, *problem.x_dtypes, *(d for d in problem.out_dtypes if not isinstance(d, Packed))]
    wide = max(jnp.dtype(d).itemsize for d in sequences) == 4
    rows = next(r for r in (2, 1) if height % r == 0) if wide else next(r for r in (4, 2, 1) if height % r == 0)
    chunk = next(k for k in (8, 7, 6, 5, 4, 3, 2, 1) if problem.T % k == 0)
    stage = chunk * rows * 256 * sum(jnp.dtype(d).itemsize for d in sequences) + rows * 1024 * problem.num_state
    return MosaicBlocks(rows, chunk, max(1, min(3 if wide else 2, 200_000 // stage)))


def triton_blocks(problem: Problem) -> Blocks:
    return _tuned(problem, Blocks) or _triton_heuristic(problem)


def triton_candidates(problem: Problem) -> list[Blocks]:
    chunks = sorted({_chunk(problem, k) for k in (4, 8, 16, 24)})
    shapes = [
        (lanes, warps) for lanes in (32, 64, 128, 256, 512) for warps in (1, 2, 4, 8) if 1 <= lanes // warps // 32 <= 4
    ]
    return [Blocks(*shape, k, ahead) for shape in shapes for k in chunks for ahead in (False, True)]


def _triton_heuristic(problem):
    size = len(problem.full_pullback_jaxpr((32,)).jaxpr.eqns)  # 20 for LIF, 32 for adaptive LIF, 55 for Izhikevich
    fit = lambda most, room: _chunk(problem, max(1, min(most, room // size)))
    if is_long(problem):
        # LIF, T = 500, M = 8192, us and seconds to compile: 65 and 4.8; without the prefetch 90 and 3.0; chunks of 10: 85
        # and 1.2, of 16 (and one of 4): 71 and 4.4, of 25: 56 and 8.0. Latency counts here, not bandwidth.
        return Blocks(32, 1, fit(20, 768), prefetch=True)
    if problem.M < 2**15:
        return Blocks(64, 2, fit(8, 512), prefetch=True)
    if all(jnp.dtype(d).itemsize == 2 for d in problem.x_dtypes):
        # LIF, T = 32, us: (256, 2, 8), then these with the prefetch. M = 2^24: 2010, 2043; 2^22 (T = 8): 126.3, 126.6;
        # 2^20: 138, 133; 2^17: 46, (128, 1) 38, (128, 2) 24; T = 256, 2^17: 162, 139.
        if problem.M >= 2**22:
            return Blocks(256, 2, fit(8, 512))
        return Blocks(128, 2 if problem.M < 2**19 else 1, fit(8, 512), prefetch=True)
    # LIF: best or within 1 % of it at T = 32 and 256, M = 2^17 to 2^24. Chunks of 32 are not faster; with 8 lanes
    # a thread they are half as fast or less. Adaptive LIF is measured with chunks of 8.
    return Blocks(256, 4, fit(16, 500))


def is_long(problem: Problem) -> bool:
    """Whether a call takes many steps on few lanes, so that latency counts and not bandwidth.

    Chunks of 16 with a prefetch take 7 times as long to compile as chunks of 8. With T = 32, where they are not faster in a
    ResNet-18, its last layers took most of the time to compile.
    """
    return problem.M < 2**16 and problem.T > 64


def interpreter_blocks(problem: Problem) -> Blocks:
    # short chunks: XLA for CPU takes long over unrolled ones
    return _tuned(problem, Blocks) or Blocks(128, 4, _chunk(problem, 4))


PROGRAMS = 1024  # at least so many are left if programs run several blocks: 8 for each of 132 processors


def param_groups(problem: Problem, blocks: Blocks, periods: tuple[int, ...]) -> int:
    """How many blocks of lanes a backward program runs in turn. They share their params, whose gradients it adds.

    `periods`: after how many lanes each param repeats; none if no param needs a gradient. More blocks write fewer parts of
    the gradients, but leave fewer programs. On an H100, with 64 channels and M = 2^25 / T, 16 blocks were fastest at T = 4, 8 at
    T = 8 and one at T = 16 and 32. The times at T = 4 are in benchmarks/results/core.jsonl ("lif learned", "normalised lif").
    """
    if not periods or problem.T > 8:
        return 1
    unit = math.lcm(blocks.lanes, *periods)
    most = min(16, 64 // problem.T, problem.M // blocks.lanes // PROGRAMS)
    return next((n for n in range(most, 1, -1) if problem.M % (unit * n) == 0), 1)


def _tuned(problem: Problem, kind: type):
    found = tuning.read().get(tuning.key(problem, kind.__name__))
    return None if found is None else kind(*found)


def _chunk(problem: Problem, most: int) -> int:
    """The longest chunk up to `most` that divides T, or `most` if only short chunks divide it.

    If K divides T, no second kernel for a shorter last chunk is compiled. With packed outputs K is a whole number of words.
    """
    T, unit = problem.T, problem.chunk_unit
    if max(most, unit) >= T:
        return T
    if unit > 1:
        return unit * max(1, most // unit)
    return next((k for k in range(most, most // 2, -1) if T % k == 0), most)
