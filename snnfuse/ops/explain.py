"""Says which implementation `unroll` would run for a call, why, and how many bytes it would move."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from snnfuse.core.neuron import Neuron, PyTree
from snnfuse.ops import implementations, recurrent
from snnfuse.ops.check import check_call
from snnfuse.ops.packing import Packed
from snnfuse.ops.problem import Problem


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns; print it.

    `implementation`: the one that would run. `why_not`: the reason for each other one, None if it could run too.
    `blocks`: the block sizes of the kernels, None for scan. `forward_bytes`, `backward_bytes`: what the fused kernels move
    through memory in training. `kept_bytes`: what is stored from forward to backward, besides the inputs. `source`: the
    Triton text of both kernels, if it was asked for. `before`: what `nn.NormSpiking` computes before the kernel.
    """

    implementation: str
    why_not: dict[str, str | None]
    blocks: tuple | None
    forward_bytes: int
    backward_bytes: int
    kept_bytes: int
    bandwidth: float
    source: str | None = None
    before: tuple[str, ...] = ()

    @property
    def milliseconds(self) -> float | None:
        """Time of forward and backward at `bandwidth`. None for scan, which moves more bytes than are counted here."""
        return None if self.blocks is None else (self.forward_bytes + self.backward_bytes) / self.bandwidth * 1e3

    def __str__(self):
        mega = lambda n: f"{n / 2**20:.1f} MiB"
        lines = [f"{self.implementation!r} runs" + (f", {self.blocks}" if self.blocks else "")]
        lines += [f"  {name!r} " + (f"does not: {why}" if why else "could") for name, why in self.why_not.items()]
        lines += [f"before it, {what}" for what in self.before]
        if self.blocks:
            lines += [
                f"forward moves {mega(self.forward_bytes)}, backward {mega(self.backward_bytes)}, "
                f"{mega(self.kept_bytes)} are stored between them besides the inputs",
                f"at {self.bandwidth / 1e12:.2f} TB/s that takes {self.milliseconds:.4f} ms",
            ]
        return "\n".join(lines + ([self.source] if self.source else []))


def explain(
    neuron: Neuron,
    params: PyTree,
    state: PyTree | None,
    xs: PyTree,
    *,
    implementation: str | None = None,
    out_dtype=None,
    weight: Array | None = None,
    feedback: int = 0,
    precision: str = "float32",
    bandwidth: float = 2.9e12,
    source: bool = False,
) -> Explanation:
    """What `unroll` would run for these arguments on this device, why, and the bytes it would move.

    It takes the arguments of `unroll` and raises the same errors; an array may be a `jax.ShapeDtypeStruct`. With `weight`
    it explains `unroll_recurrent`, and `state` is None or a `RecurrentState`. A recurrent layer takes longer than its bytes:
    each step waits for the one before. `bandwidth` is in bytes a second; a copy reaches about 2.9e12 on an H100. With `source`
    the result also holds the text of the
    kernels that "triton" would compile, even if another implementation runs, so that you can read the generated code.
    Nothing is run or compiled.
    """
    leaves, tree = jax.tree.flatten((params, state, xs, weight))
    arrays = [leaf for leaf in leaves if hasattr(leaf, "shape")]
    found = []

    def check(arrays):
        arrays = iter(arrays)
        filled = tree.unflatten([next(arrays) if hasattr(leaf, "shape") else leaf for leaf in leaves])
        *given, weight = filled
        if weight is None:
            found.append((check_call(neuron, *given, out_dtype)[0], None))
        else:
            found.append(recurrent.check_call_with_weight(neuron, *given, weight, feedback, precision, out_dtype)[:2])

    jax.eval_shape(check, arrays)
    problem, recurrence = found[0]
    if recurrence is not None:
        return _explain_recurrent(problem, recurrence, implementation, bandwidth, source)
    said = _explain(problem, implementation, bandwidth)
    if not source:
        return said
    from snnfuse.ops import triton

    if (why := triton.why_not_kernels(problem)) is not None:
        raise NotImplementedError(f"source: {why}")
    return replace(said, source=triton.source(problem))


def _explain(problem: Problem, implementation, bandwidth):
    name = implementations.choose(problem, implementation)
    why_not = {n: implementations.get(n).why_not(problem) for n in implementations.NAMES if n != name}
    return _count(problem, name, why_not, implementations.get(name).blocks(problem), bandwidth)


def _explain_recurrent(problem, recurrence, implementation, bandwidth, source):
    from snnfuse.ops import recurrent_triton

    name = recurrent.choose(problem, recurrence, implementation)
    why_not = {n: recurrent.module(n).why_not(problem, recurrence) for n in recurrent.PREFERENCE if n != name}
    blocks = recurrent_triton.blocks(problem, recurrence) if name == "triton" else None
    said = _count(problem, name, why_not, blocks, bandwidth)
    current = 4 * problem.T * problem.M * (blocks is not None)  # written forward, read backward in place of x
    x = problem.T * problem.M * problem.x_dtypes[0].itemsize * (blocks is not None)
    said = replace(
        said,
        forward_bytes=said.forward_bytes + current,
        backward_bytes=said.backward_bytes + current - x,
        kept_bytes=said.kept_bytes + current,
    )
    if not source:
        return said
    if (why := recurrent_triton.why_not_kernels(problem, recurrence)) is not None:
        raise NotImplementedError(f"source: {why}")
    return replace(said, source=recurrent_triton.source(problem, recurrence))


def _count(problem: Problem, name, why_not, blocks, bandwidth):
    T, M = problem.T, problem.M
    size = lambda d: problem.out_struct(d).shape[0] * (d.word if isinstance(d, Packed) else jnp.dtype(d)).itemsize
    xs, outs = sum(map(size, problem.x_dtypes)), sum(map(size, problem.out_dtypes))
    d_outs = sum(size(d) for d, live in zip(problem.out_dtypes, problem.differentiable, strict=True) if live)
    state = 4 * problem.num_state
    given = 0 if problem.initial is not None else state
    params = 4 * sum(shape == problem.lane_shape for shape in problem.param_shapes)
    d_params = 4 * len(problem.param_shapes)
    kept = state * blocks.checkpoints(T) if blocks else 0
    return Explanation(
        implementation=name,
        why_not=why_not,
        blocks=blocks,
        forward_bytes=M * (xs + outs + params + given + state + kept),
        backward_bytes=M * (xs + d_outs + xs + params + d_params + given + kept + given),
        kept_bytes=M * kept,
        bandwidth=bandwidth,
    )
