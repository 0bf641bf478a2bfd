"""`unroll_recurrent`: a neuron whose output at one step is part of its input at the next step, through a weight matrix."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from snnfuse.core.neuron import Neuron, PyTree
from snnfuse.ops import implementations
from snnfuse.ops.check import check_call
from snnfuse.ops.packing import Packed, pack
from snnfuse.ops.partition import varying
from snnfuse.ops.problem import PARTS, Leaves, Problem, Recurrence

# `implementation=None` tries these in this order. Each is a module with `why_not` and `run`, imported when it is needed.
PREFERENCE = {"triton": "snnfuse.ops.recurrent_triton", "scan": "snnfuse.ops.recurrent"}


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
      precision: how exact the product with the weight is; products are summed in float32.
        "float32": the weight as it is. "bfloat16x2": the weight as the sum of two bfloat16 numbers, which have 16 bits of
        mantissa (tf32 has 11). "bfloat16": the weight rounded to bfloat16, which has 8. The gradient of the weight is that
        of the weight before rounding. In the backward pass "triton" rounds d_current, the gradient of x[t] + s[t-1] @
        weight, to as many bfloat16 numbers before it multiplies it; "scan" does not round it.
      implementation: "triton" (one fused GPU kernel forward, one backward, through jax-triton) or "scan" (`jax.lax.scan`).
        "triton" runs up to 1024 neurons a head (512 with "float32"), for a neuron whose fed-back output is 0 or 1; a head
        of more than 256 neurons (128 without "bfloat16") needs compute capability 9 or 10. A named one runs or raises. None
        picks "triton" if it can run, else "scan"; `snnfuse.explain` says why.

    Returns:
      (outs, state): outs is a tree of [T, *B, H]; state is the `RecurrentState` after the last step.

    Raises: what `snnfuse.unroll` raises, and ValueError or TypeError for a wrong weight, feedback or precision.

    Gradients reach params, state, xs and weight.
    """
    checked = check_call_with_weight(neuron, params, state, xs, weight, feedback, precision, out_dtype)
    problem, recurrence, *arrays = checked
    outs, final, fed = module(choose(problem, recurrence, implementation)).run(problem, recurrence, *arrays)
    return problem.out_tree.unflatten(outs), RecurrentState(problem.step.state_tree.unflatten(final), fed)


def choose(problem: Problem, recurrence: Recurrence, name: str | None) -> str:
    """`name` if that implementation can run this call; the first of `PREFERENCE` that can, if `name` is None."""
    if name is not None and name not in implementations.NAMES:
        raise ValueError(f"implementation must be None or one of {sorted(implementations.NAMES)}; got {name!r}")
    if name is not None and name not in PREFERENCE:
        raise NotImplementedError(
            f"implementation {name!r} has no recurrent kernel; use one of {list(PREFERENCE)} or None"
        )
    reasons = []
    for candidate in (name,) if name else PREFERENCE:
        if (why := module(candidate).why_not(problem, recurrence)) is None:
            return candidate
        reasons.append(f"implementation {candidate!r}: {why}")
    raise NotImplementedError("; ".join(reasons))


def module(name: str):
    """The module of an implementation in `PREFERENCE`."""
    return importlib.import_module(PREFERENCE[name])


def check_call_with_weight(neuron, params, state, xs, weight, feedback, precision, out_dtype):
    """(problem, recurrence, params, state, () or (s[0],), xs, the weight as [heads, H / heads, H / heads])."""
    problem, params, leaves, fed, xs = _check_state(neuron, params, state, xs, out_dtype)
    if precision not in PARTS:
        raise ValueError(f"precision must be one of {list(PARTS)}; got {precision!r}")
    _check_feedback(problem, params, feedback)
    weight = _check_weight(weight, problem.lane_shape[-1])
    return problem, Recurrence(feedback, precision, weight.shape[0], bool(fed)), params, leaves, fed, xs, weight


def _check_state(neuron, params, state, xs, out_dtype):
    if state is not None and not isinstance(state, RecurrentState):
        raise TypeError(f"state must be None or RecurrentState(neuron, fed); got {type(state).__name__}")
    given = None if state is None else state.neuron
    if any(isinstance(d, Packed) and d.graded for d in jax.tree.leaves(out_dtype)):
        raise NotImplementedError(f"out_dtype: a recurrent layer packs spikes of 0 and 1 only; got {out_dtype}")
    problem, params, leaves, xs = check_call(neuron, params, given, xs, out_dtype)
    return problem, params, leaves, () if state is None else (_check_fed(state, problem),), xs


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
    near, rest = 0.0, jax.lax.stop_gradient(weight)
    for _ in range(PARTS[precision]):
        part = jax.lax.reduce_precision(rest, 8, 7)
        near, rest = near + part, rest - part
    return weight + (near - jax.lax.stop_gradient(weight))


def why_not(problem: Problem, recurrence: Recurrence) -> None:
    """None: "scan" runs every valid call, on any device."""
    return None


@partial(jax.jit, static_argnums=(0, 1))
def run(problem: Problem, recurrence: Recurrence, params: Leaves, state: Leaves, fed: Leaves, xs: Leaves, weight):
    """The implementation "scan": (outs, final state, the output that feeds back at the last step)."""
    params = tuple(p.astype(problem.dtype) for p in params)
    weight = rounded(weight.astype(problem.dtype), recurrence.precision)
    state, fed = _first(problem, state, fed)
    params, state, fed, xs, weight = varying((params, state, fed, xs, weight))
    return loop(problem, recurrence.feedback, lambda fed: product(fed, weight), params, state, fed, xs)


def _first(problem, state, fed):
    """The state and the output that feeds back before the first step."""
    if problem.initial is not None:
        state = tuple(jnp.full(problem.lane_shape, value, problem.dtype) for value in problem.initial)
    (fed,) = fed or (jnp.zeros(problem.lane_shape, problem.dtype),)
    return state, fed


def loop(problem: Problem, feedback: int, back: Callable, params: Leaves, state: Leaves, fed: Array, xs: Leaves):
    """The neuron over time, its input plus `back` of the output `feedback` at the step before: (outs, final state, fed)."""

    def body(carry, x):
        state, fed = carry
        current, *others = (leaf.astype(problem.dtype) for leaf in x)
        state, outs = problem.step(params, state, (current + back(fed), *others))
        pairs = zip(outs, problem.out_dtypes, strict=True)
        return (state, outs[feedback]), tuple((o != 0) if isinstance(d, Packed) else o.astype(d) for o, d in pairs)

    (state, fed), outs = jax.lax.scan(body, (state, fed), xs)
    pairs = zip(outs, problem.out_dtypes, strict=True)
    return tuple(pack(o, d.steps) if isinstance(d, Packed) else o for o, d in pairs), state, fed


def unroll_through(
    neuron: Neuron,
    params: PyTree,
    state: RecurrentState | None,
    xs: PyTree,
    *,
    connect: Callable[[PyTree, Array], Array],
    weights: PyTree,
    feedback: int = 0,
    out_dtype: Any = None,
) -> tuple[PyTree, RecurrentState]:
    """`unroll_recurrent` with any function in place of the product: state[t], s[t] = step(x[t] + connect(weights, s[t-1])).

    `connect` must be hashable and keep the shape [*B, H]. It runs by `jax.lax.scan`. Gradients reach params, state, xs and weights.
    """
    problem, params, leaves, fed, xs = _check_state(neuron, params, state, xs, out_dtype)
    _check_feedback(problem, params, feedback)
    struct = jax.ShapeDtypeStruct(problem.lane_shape, problem.dtype)
    if (got := jax.eval_shape(connect, weights, struct).shape) != problem.lane_shape:
        raise ValueError(
            f"the layer that feeds back must keep the shape {problem.lane_shape} of a step; it returns {got}"
        )
    outs, final, fed = _run_through(problem, connect, feedback, params, leaves, fed, xs, weights)
    return problem.out_tree.unflatten(outs), RecurrentState(problem.step.state_tree.unflatten(final), fed)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run_through(problem, connect, feedback, params, state, fed, xs, weights):
    params = tuple(p.astype(problem.dtype) for p in params)
    state, fed = _first(problem, state, fed)
    params, state, fed, xs, weights = varying((params, state, fed, xs, weights))
    back = lambda fed: connect(weights, fed).astype(problem.dtype)
    return loop(problem, feedback, back, params, state, fed, xs)
