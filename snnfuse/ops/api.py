"""`unroll`: check the call once, choose an implementation, run it."""

from typing import Any

from snnfuse.core.neuron import Neuron, PyTree
from snnfuse.ops import implementations
from snnfuse.ops.check import check_call


def unroll(
    neuron: Neuron,
    params: PyTree,
    state: PyTree | None,
    xs: PyTree,
    *,
    implementation: str | None = None,
    out_dtype: Any = None,
    reuse_cotangents: bool = False,
) -> tuple[PyTree, PyTree]:
    """Run a neuron over time: state[t], outs[t] = neuron.step(params, state[t-1], xs[t]) for t = 1..T.

    Args:
      neuron: the step; any hashable object with `init_state` and `step` (see `snnfuse.Neuron`).
      params: a tree of arrays and Python numbers. An array broadcasts from the right against [*B, N] and gets a
        gradient; a number is compiled in and gets none.
      state: a tree of float32 [*B, N] like `neuron.init_state([*B, N])`, or None for exactly that (a constant initial
        state is then compiled in, and is not read from memory). A sequence may be run in pieces, each from the final
        state of the piece before: the result equals that of the whole sequence.
      xs: a tree of [T, *B, N], T >= 1, in float32, bfloat16 or float16. float64 works only with "scan".
      implementation: "pallas" (one fused GPU kernel forward, one backward, by Pallas through Triton), "mosaic" (the same
        through Mosaic GPU, for compute capability 9.0 and later), "triton" (the same, as Triton source called through
        jax-triton), "scan" (`jax.lax.scan`, the baseline), "interpret" (the "pallas" kernels in the interpreter of
        Pallas). A named one runs or raises. None picks "scan" for a single step, and otherwise the first of "pallas",
        "triton", "mosaic" and "scan" that can run. For long sequences "triton" comes before "pallas": from 1,000 steps on; from 500
        if all params are numbers or the neuron has several states; from 32 if all params are numbers and the number of lanes is odd
        and above 2^20. `snnfuse.explain` says which one runs, and why.
      out_dtype: the dtype of the outputs, one for all or a tree like the outputs. None means that of xs (float32 if its
        leaves differ). Outputs in an integer dtype or bool carry no gradient.
      reuse_cotangents: "pallas" and "triton" may write the gradient of an input into the buffer of an output's cotangent, if the two
        have one dtype. Where something else needs that cotangent, XLA copies it first.

    Returns:
      (outs, final_state): outs is a tree of [T, *B, N]; final_state is float32.

    Raises:
      ValueError: a rank, shape, structure or value is wrong, or the implementation is unknown.
      TypeError: a dtype is wrong, or the neuron is not one.
      NotImplementedError: the call is valid, but not for this implementation, or not on this device.

    State and arithmetic are float32 whatever the dtype of xs. Reverse-mode gradients reach params, state and xs.
    For the backward pass the fused kernels store xs and one float32 state every K steps, with K from about 8 to 32
    (`snnfuse.ops.fused` says how). Temporal fusion: Li et al., ICANN 2024, https://arxiv.org/abs/2408.00280.
    """
    problem, params, state, xs = check_call(neuron, params, state, xs, out_dtype, reuse_cotangents)
    chosen = implementations.get(implementations.choose(problem, implementation))
    outs, state = chosen.run(problem, params, state, xs)
    return problem.out_tree.unflatten(outs), problem.step.state_tree.unflatten(state)
