"""`unroll_recurrent`: a neuron whose output at one step is part of its input at the next step, through a weight matrix."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from snnfuse.core.neuron import Neuron, PyTree
from snnfuse.ops import implementations
from snnfuse.ops.check import check_call
from snnfuse.ops.packing import Packed, pack
from snnfuse.ops.problem import Leaves, Problem

PRECISIONS = ("float32", "bfloat16")


class RecurrentState(NamedTuple):
    """The state of the neuron, and the output [*B, H] of the last step that feeds back, both float32."""

    neuron: PyTree
    fed: Array


def unroll_recurrent(
    neuron: Neuron,
    params: PyTree,
    state: RecurrentState | None,
    xs: PyTree,
    weight: Array,
    *,
    feedback: int = 0,
    precision: str = "float32",
    implementation: str | None = None,
    out_dtype: Any = None,
) -> tuple[PyTree, RecurrentState]:
    """Run a recurrent layer over time: state[t], s[t] = neuron.step(params, state[t-1], x[t] + s[t-1] @ weight).

    Args:
      neuron, params, xs, out_dtype: as in `snnfuse.unroll`, for arrays [T, *B, H]. If xs has several leaves, the product
        is added to the first one.
      state: `RecurrentState(neuron, fed)`, or None: the neuron's initial state, and zeros for s[0].
      weight: float [H, H], from row to column: weight[i, j] connects neuron i to neuron j. Or [heads, H / heads,
        H / heads]: neurons connect within their head, and head k owns the neurons from k H / heads on.
      feedback: which output feeds back, if the neuron has several: an index into the flat outputs. Default: the first.
        The value that feeds back is the float32 output, before the cast to `out_dtype`.
      precision: "float32" uses the weight as it is; "bfloat16" rounds it to bfloat16. Products and sums are float32, and
        the gradient of the weight is not rounded.
      implementation: "scan" (`jax.lax.scan`). None also runs "scan": no fused kernel exists yet.

    Returns:
      (outs, state): outs is a tree of [T, *B, H]; state is the `RecurrentState` after the last step.

    Raises: what `snnfuse.unroll` raises, and ValueError or TypeError for a wrong weight, feedback or precision.

    Gradients reach params, state, xs and weight.
    """
    if state is not None and not isinstance(state, RecurrentState):
        raise TypeError(f"state must be None or RecurrentState(neuron, fed); got {type(state).__name__}")
    given = None if state is None else state.neuron
    problem, params, leaves, xs = check_call(neuron, params, given, xs, out_dtype)
    if implementation not in (None, *implementations.NAMES):
        raise ValueError(
            f"implementation must be None or one of {sorted(implementations.NAMES)}; got {implementation!r}"
        )
    if implementation not in (None, "scan"):
        raise NotImplementedError(f"implementation {implementation!r} has no recurrent kernel; use 'scan' or None")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}; got {precision!r}")
    _check_feedback(problem, params, feedback)
    weight = _check_weight(weight, problem.lane_shape[-1])
    fed = _check_fed(state, problem)
    outs, final, fed = _scan(problem, feedback, precision, params, leaves, fed, xs, weight)
    return problem.out_tree.unflatten(outs), RecurrentState(problem.step.state_tree.unflatten(final), fed)


def _check_weight(weight, width):
    weight = jnp.asarray(weight)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(f"weight must be a float array; got {weight.dtype}")
    heads = weight.shape[0] if weight.ndim == 3 else 1
    if heads == 0 or width % heads or weight.shape not in ((width, width), (heads, width // heads, width // heads)):
        raise ValueError(
            f"weight must be [H, H] or [heads, H / heads, H / heads] for H = {width}; got shape {weight.shape}"
        )
    return weight.reshape(heads, width // heads, width // heads)


def _check_fed(state, problem):
    if state is None:
        return jnp.zeros(problem.lane_shape, problem.dtype)
    fed = jnp.asarray(state.fed)
    if fed.shape != problem.lane_shape:
        raise ValueError(f"state.fed must be [*B, H] = {problem.lane_shape}, as xs is without T; got {fed.shape}")
    if fed.dtype != problem.dtype:
        raise TypeError(f"state.fed must be {problem.dtype}; got {fed.dtype}")
    return fed


def _check_feedback(problem, params, feedback):
    count = problem.out_tree.num_leaves
    if not isinstance(feedback, int) or not 0 <= feedback < count:
        raise ValueError(f"feedback must be an index of one of the {count} outputs; got {feedback!r}")
    lanes = (jax.ShapeDtypeStruct(problem.lane_shape, problem.dtype),)
    structs = tuple(jax.ShapeDtypeStruct(p.shape, problem.dtype) for p in params)
    states = lanes * problem.step.state_tree.num_leaves
    out = jax.eval_shape(problem.step, structs, states, lanes * len(problem.x_dtypes))[1][feedback]
    if out.dtype != problem.dtype:
        raise TypeError(f"the output that feeds back must be {problem.dtype}, to carry a gradient; got {out.dtype}")


def product(fed: Array, weight: Array) -> Array:
    """fed [*B, H] times a block-diagonal weight [heads, H / heads, H / heads]."""
    heads, size, _ = weight.shape
    split = fed.reshape(*fed.shape[:-1], heads, size)
    return jnp.einsum("...hi,hij->...hj", split, weight, precision="highest").reshape(fed.shape)


def rounded(weight: Array, precision: str) -> Array:
    """The weight as the product uses it. The gradient passes the rounding unchanged."""
    if precision == "float32":
        return weight
    return weight + jax.lax.stop_gradient(jax.lax.reduce_precision(weight, 8, 7) - weight)


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _scan(problem: Problem, feedback, precision, params: Leaves, state: Leaves, fed, xs: Leaves, weight):
    params = tuple(p.astype(problem.dtype) for p in params)
    weight = rounded(weight.astype(problem.dtype), precision)
    if problem.initial is not None:
        state = tuple(jnp.full(problem.lane_shape, value, problem.dtype) for value in problem.initial)

    def body(carry, x):
        state, fed = carry
        current, *others = (leaf.astype(problem.dtype) for leaf in x)
        state, outs = problem.step(params, state, (current + product(fed, weight), *others))
        pairs = zip(outs, problem.out_dtypes, strict=True)
        return (state, outs[feedback]), tuple((o != 0) if isinstance(d, Packed) else o.astype(d) for o, d in pairs)

    (state, fed), outs = jax.lax.scan(body, (state, fed), xs)
    pairs = zip(outs, problem.out_dtypes, strict=True)
    return tuple(pack(o, d.steps) if isinstance(d, Packed) else o for o, d in pairs), state, fed
