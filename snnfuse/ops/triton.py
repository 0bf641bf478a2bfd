"""The fused kernels in Triton, called through jax-triton. Their source is generated from the neuron's step.

GPUs of compute capability 8.x will need this one when JAX drops the Triton lowering of Pallas. jax-triton 0.3.1 (with
Triton 3.6) and 0.4 (with Triton 3.7 and later) both work. Neither is imported before a kernel is called.
"""

import hashlib
import importlib.util
import inspect
import linecache
import math
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from snnfuse.ops import fused, triton_source
from snnfuse.ops.blocks import Blocks, is_long, param_groups, triton_blocks, triton_candidates
from snnfuse.ops.device import compute_capability, platform
from snnfuse.ops.fused import Wanted
from snnfuse.ops.packing import Packed
from snnfuse.ops.partition import periodic
from snnfuse.ops.problem import Problem


class Triton(fused.Fused):
    """The implementation "triton"."""

    def why_not(self, problem: Problem) -> str | None:
        return why_not_here() or why_not_kernels(problem)

    def blocks(self, problem: Problem) -> Blocks:
        return triton_blocks(problem)

    def candidates(self, problem: Problem) -> list[Blocks]:
        return triton_candidates(problem)

    def kernels(self, problem: Problem, blocks: Blocks) -> fused.Kernels:
        return TritonKernels(problem, blocks)


TRITON = Triton()


def why_not_here() -> str | None:
    """None if this machine can run Triton kernels."""
    if platform() != "gpu":
        return f"it needs a GPU, the device is a {platform()}"
    if any(importlib.util.find_spec(name) is None for name in ("triton", "jax_triton")):
        return 'it needs jax-triton: pip install "snnfuse[triton]"'
    return _why_no_import()


@cache
def _why_no_import() -> str | None:
    try:
        importlib.import_module("jax_triton")
    except ImportError as e:  # a version that does not fit this JAX
        return f"jax-triton cannot be imported: {e}"
    return None


def why_not_kernels(problem: Problem) -> str | None:
    """None if Triton kernels can be generated for this problem. Triton need not be installed."""
    if (why := why_not_dtypes(problem)) is not None:
        return why
    if (why := problem.why_not_lanewise((32,))) is not None:  # first: the block sizes depend on the traced step
        return why
    lanes = triton_blocks(problem).lanes
    return problem.why_not_lanewise((lanes,)) or triton_source.why_not(problem, (lanes,))


def why_not_dtypes(problem: Problem) -> str | None:
    """None if the kernels can read and write the dtypes of this problem."""
    if problem.dtype != jnp.float32:
        return f"it computes in float32; xs is {problem.dtype}"
    dtypes = [d for d in problem.out_dtypes if not isinstance(d, Packed)]
    if unknown := [str(d) for d in dtypes if jnp.dtype(d).name not in _DTYPES]:
        return f"it has no output dtype {', '.join(unknown)}"
    return None


_DTYPES = frozenset(
    "float64 float32 bfloat16 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool".split()
)  # float8 is not on every GPU


def source(problem: Problem) -> str:
    """The text of both kernels that are compiled for this problem."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in problem.param_shapes]
    params = [jax.eval_shape(lambda p: periodic(p, problem.lane_shape), s) for s in shapes]
    return triton_source.module_text(problem, triton_blocks(problem), _periods(params))


def _periods(params) -> triton_source.Periods:
    return tuple(p.shape[0] for p in params)


@dataclass(frozen=True)
class TritonKernels:
    """`fused.Kernels` for one problem."""

    problem: Problem
    blocks: Blocks

    def forward(self, params, state, xs, *, save):
        problem, T, K = self.problem, self.problem.T, self.blocks.chunk
        results = self._call(
            "snn_forward",
            triton_source.forward_text(problem, self.blocks, _periods(params), save),
            params,
            (*state, *xs),
            [problem.out_struct(d, problem.M) for d in problem.out_dtypes]
            + [self._float(problem.M)] * problem.num_state
            + [self._float(self.blocks.checkpoints(T), problem.M)] * (problem.num_state if save and T > K else 0),
        )
        return fused.results_of_forward(problem, results)

    def backward(self, params, state, checkpoints, xs, d_outs, d_state, *, wanted: Wanted, periods):
        live_outs, live_state = (tuple(d is not None for d in group) for group in (d_outs, d_state))
        inputs = (params, state, checkpoints, xs, fused.given(d_outs), fused.given(d_state))
        groups = param_groups(self.problem, self.blocks, (*_periods(params), *periods) if periods else ())
        out_shape = fused.shapes_of_backward(self.problem, xs, wanted, groups)
        results = self._call(
            "snn_backward",
            triton_source.backward_text(self.problem, self.blocks, _periods(params), wanted, live_outs, live_state),
            params,
            sum(inputs[1:], ()),
            out_shape,
            fused.reused(self.problem, inputs, out_shape),
            GROUPS=groups,
        )
        return fused.results_of_backward(results, wanted)

    def _float(self, *shape):
        return jax.ShapeDtypeStruct(shape, self.problem.dtype)

    def _call(self, name, text, params, args, out_shape, reused=None, **constants):
        lanes, K, T, M = self.blocks.lanes, self.blocks.chunk, self.problem.T, self.problem.M
        part = M // constants.get("GROUPS", 1)
        # M is compiled in if a call is long: with M as an argument LIF takes 61 us and not 56 at T = 500, M = 2^13. It is also
        # compiled in if a program runs several blocks: learned LIF, T = 4, bfloat16 then takes 64 registers and not 80, so
        # that all programs fit on an H100 at once.
        unit = part if is_long(self.problem) or part < M else math.gcd(part, lanes)
        constants |= dict(UNIT=unit, K=K, TAIL=T % K, BLOCK=lanes)
        wraps = [period - 1 for period in triton_source.wraps(self.problem, _periods(params))]
        args = (*params, *args, T // K, part // unit, *wraps)
        return triton_call(
            name, text, args, out_shape, (math.ceil(part / lanes),), self.blocks.warps, constants, reused=reused
        )


def triton_call(name, text, args, out_shape, grid, warps, constants, zeroed=(), reused=None):
    """Run the kernel `name` of a module's text through jax-triton.

    The outputs `zeroed` are zeros when it starts. `reused` is {argument: result that is written over it}.
    """
    import jax_triton

    known = inspect.signature(jax_triton.triton_call).parameters
    fusion = {"enable_fp_fusion": True}  # fused multiply-adds; Triton 3.10 changes the default
    return jax_triton.triton_call(
        *args,
        kernel=kernel(text, name),
        grid=grid,
        name=name,
        num_warps=warps,
        num_stages=1,
        compute_capability=round(10 * compute_capability()) or None,
        zeroed_outputs=zeroed,
        input_output_aliases=reused or {},
        **constants,
        **{"out_type" if "out_type" in known else "out_shape": out_shape},
        **({"backend_options": fusion} if "backend_options" in known else fusion),
    )


@cache
def kernel(text: str, name: str):
    """The kernel `name` in a module's text. Equal texts give the same function, so it is compiled once."""
    filename = f"<snnfuse {name} {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)  # Triton asks for the source
    module = {"__name__": f"snnfuse.ops.{name}"}
    exec(compile(text, filename, "exec"), module)
    return module[name]
