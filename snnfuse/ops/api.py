"""`unroll`: check the call once, choose an implementation, run it."""

from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snnfuse.core.neuron import Neuron, PyTree
from snnfuse.ops import fused, pallas_mosaic, pallas_triton, scan, triton
from snnfuse.ops.packing import Packed
from snnfuse.ops.problem import Problem, Step

IMPLEMENTATIONS = {
    "pallas": pallas_triton,
    "mosaic": pallas_mosaic,
    "triton": triton,
    "scan": scan,
    "interpret": pallas_triton.interpreted,
}
# What `implementation=None` tries, in this order. On an H100 the Triton lowering is faster than Mosaic GPU (LIF, T = 32,
# M = 2^20: 0.93 and 0.87 of the copy rate in float32, 0.84 and 0.82 in bfloat16), while JAX has it.
PREFERENCE = ("pallas", "mosaic", "triton", "scan")


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
      params: a tree of arrays, each broadcasting from the right against [*B, N], and of Python numbers, which are
        compiled in and get no gradient.
      state: a tree of float32 [*B, N] like `neuron.init_state([*B, N])`, or None for just that (a constant one is then
        compiled in, and costs no memory traffic). A sequence run in pieces, each from the final state of the one
        before, equals the whole.
      xs: a tree of [T, *B, N], T >= 1, in float32, bfloat16 or float16. float64 works with "scan" alone.
      implementation: "pallas" (one fused GPU kernel forward, one backward, by Pallas through Triton), "mosaic" (the same
        through Mosaic GPU, for compute capability 9.0 and later), "triton" (the same, as Triton source called through
        jax-triton), "scan" (`jax.lax.scan`, the baseline), "interpret" (the "pallas" kernels in the interpreter of
        Pallas). A named one runs or raises; None takes the first of "pallas", "mosaic", "triton", "scan" that can run.
        `snnfuse.explain` says which, and why.
      out_dtype: the dtype of the outputs, one for all or a tree like the outputs; None is that of xs (float32 if its
        leaves differ). Outputs in an integer dtype or bool carry no gradient.
      reuse_cotangents: "pallas" writes the gradient of an input over the cotangent of an output of the same dtype, so that
        the two share a buffer; where something else needs that cotangent XLA copies it first.

    Returns:
      (outs, final_state): outs is a tree of [T, *B, N]; final_state is float32.

    Raises:
      ValueError: a rank, shape, structure or value is wrong, or the implementation is unknown.
      TypeError: a dtype is wrong, or the neuron is not one.
      NotImplementedError: the call is valid, but not for this implementation, or not on this device.

    State and arithmetic are float32 whatever the dtype of xs. Reverse-mode gradients reach params, state and xs.
    The fused kernels keep for the backward pass xs and one float32 state every K steps, K about 8 to 32 (for how, see
    `snnfuse.ops.fused`). Temporal fusion: Li et al., ICANN 2024, https://arxiv.org/abs/2408.00280.
    """
    problem, params, state, xs = _check(neuron, params, state, xs, out_dtype, reuse_cotangents)
    outs, state = _choose(problem, implementation).unroll(problem, params, state, xs)
    return problem.out_tree.unflatten(outs), problem.step.state_tree.unflatten(state)


def _choose(problem: Problem, implementation: str | None):
    if implementation is not None and implementation not in tuple(IMPLEMENTATIONS):
        raise ValueError(f"implementation must be None or one of {sorted(IMPLEMENTATIONS)}; got {implementation!r}")
    reasons = []
    for name in (implementation,) if implementation else PREFERENCE:
        if (why := IMPLEMENTATIONS[name].why_not(problem)) is None:
            return IMPLEMENTATIONS[name]
        reasons.append(f"implementation {name!r}: {why}")
    raise NotImplementedError("; ".join(reasons))


def passes(problem: Problem, implementation: str | None) -> fused.Passes:
    """Forward and backward of the implementation that `unroll` would run."""
    chosen = _choose(problem, implementation)
    if chosen is scan:
        return scan.ScanPasses(problem)
    return fused.KernelPasses(chosen.kernels(problem, chosen.blocks(problem)))


def _check(neuron, params, state, xs, out_dtype, reuse_cotangents=False):
    _check_neuron(neuron)
    xs, x_tree, shape, dtype = _check_xs(xs)
    params, params_tree, constants = _check_params(params, shape)
    state, state_tree, initial = _check_state(neuron, state, shape, dtype)
    step = Step(neuron, params_tree, state_tree, x_tree, constants)
    out_struct, out_tree = _check_step(step, params, xs, shape, dtype)
    problem = Problem(
        step=step,
        T=xs[0].shape[0],
        lane_shape=shape,
        param_shapes=tuple(p.shape for p in params),
        x_dtypes=tuple(x.dtype for x in xs),
        out_dtypes=_out_dtypes(out_dtype, out_struct, xs),
        out_tree=out_tree,
        dtype=dtype,
        initial=initial,
        reuse_cotangents=reuse_cotangents,
    )
    return problem, params, state, xs


def _check_neuron(neuron):
    if isinstance(neuron, type):
        raise TypeError(f"neuron must be an instance; got the class {neuron.__name__}: write {neuron.__name__}()")
    missing = [m for m in ("init_state", "step") if not callable(getattr(neuron, m, None))]
    if missing:
        raise TypeError(f"neuron must be an object with init_state and step; got {neuron!r}, without {missing}")
    try:
        hash(neuron)
    except TypeError as e:
        raise TypeError(f"neuron must be hashable (a frozen dataclass of hashable choices); got {neuron!r}: {e}") from e


def _array(name, leaf):
    try:
        return jnp.asarray(leaf)
    except (TypeError, ValueError) as e:
        raise TypeError(f"{name} must be an array; got {leaf!r}") from e


def _check_xs(xs):
    paths, tree = jax.tree_util.tree_flatten_with_path(xs)
    if not paths:
        raise ValueError(f"xs must have at least one array [T, *B, N]; got {xs!r}")
    allowed = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)
    leaves = []
    for path, leaf in paths:
        name = "xs" + jax.tree_util.keystr(path)
        leaves.append(leaf := _array(name, leaf))
        if leaf.dtype not in allowed:
            raise TypeError(f"{name} must be float32, bfloat16 or float16 (float64 with 'scan'); got {leaf.dtype}")
        if leaf.ndim < 2:
            raise ValueError(f"{name} must be [T, *B, N], of rank 2 or more; got shape {leaf.shape}")
        if leaf.size == 0:
            raise ValueError(f"{name} must have T >= 1 and no empty axis; got shape {leaf.shape}")
    leaves = tuple(leaves)
    if any(x.shape != leaves[0].shape for x in leaves):
        raise ValueError(f"xs must have one shape in all its leaves; got {[leaf.shape for leaf in leaves]}")
    dtype = jnp.dtype(jnp.float64 if any(x.dtype == jnp.float64 for x in leaves) else jnp.float32)
    return leaves, tree, leaves[0].shape[1:], dtype


def _check_params(params, shape):
    paths, tree = jax.tree_util.tree_flatten_with_path(params)
    arrays, constants = [], []
    for path, leaf in paths:
        name = "params" + jax.tree_util.keystr(path)
        constant, given = isinstance(leaf, Real), leaf
        if not constant:
            leaf = _array(name, leaf)
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(f"{name} must be a number or a float array; got {leaf.dtype}")
            padded = (1,) * (len(shape) - leaf.ndim) + leaf.shape
            if len(padded) != len(shape) or any(p not in (1, s) for p, s in zip(padded, shape, strict=True)):
                raise ValueError(f"{name} must broadcast from the right against [*B, N] = {shape}; got {leaf.shape}")
            arrays.append(leaf.reshape(padded))
        if not isinstance(given, jax.core.Tracer) and np.isnan(given).any():  # under jit there is no value to look at
            raise ValueError(f"{name} must not be NaN; got {given}")
        constants.append(leaf if constant else None)
    return tuple(arrays), tree, tuple(constants)


def _check_state(neuron, state, shape, dtype):
    """(leaves, tree, None), or ((), tree, values) if the state is not given and each leaf of the initial one is constant."""
    jaxpr, like = jax.make_jaxpr(lambda: neuron.init_state(shape), return_shape=True)()
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        if leaf.shape != shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
            error = ValueError if leaf.shape != shape else TypeError
            raise error(
                f"neuron {type(neuron).__name__}.init_state must return state{jax.tree_util.keystr(path)} in float32 "
                f"of shape [*B, N] = {shape}; got {leaf.dtype}{leaf.shape}"
            )
    if state is None:
        if (values := _constants(jaxpr, shape)) is not None:
            return (), jax.tree.structure(like), values
        state = jax.tree.map(lambda leaf: leaf.astype(dtype), neuron.init_state(shape))
    if jax.tree.structure(state) != jax.tree.structure(like):
        raise ValueError(
            f"state must have the structure of neuron.init_state, {jax.tree.structure(like)}; "
            f"got {jax.tree.structure(state)}"
        )
    paths, tree = jax.tree_util.tree_flatten_with_path(state)
    leaves = []
    for path, leaf in paths:
        name = "state" + jax.tree_util.keystr(path)
        leaf = _array(name, leaf)
        if leaf.shape != shape:
            raise ValueError(f"{name} must be [*B, N] = {shape}, as xs is without T; got {leaf.shape}")
        if leaf.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}; got {leaf.dtype}")
        leaves.append(leaf)
    return tuple(leaves), tree, None


def _constants(closed, shape):
    """The value of each output of a jaxpr without inputs, if all are one number broadcast to `shape`; else None."""
    made = {v: e for e in closed.jaxpr.eqns for v in e.outvars}
    values = []
    for out in closed.jaxpr.outvars:
        eqn = made.get(out)
        if eqn is None or eqn.primitive.name != "broadcast_in_dim" or not hasattr(eqn.invars[0], "val"):
            return None
        values.append(float(eqn.invars[0].val))
    return tuple(values)


def _check_step(step, params, xs, shape, dtype):
    name = type(step.neuron).__name__
    structs = tuple(jax.ShapeDtypeStruct(p.shape, dtype) for p in params)
    lanes = (jax.ShapeDtypeStruct(shape, dtype),)
    try:
        returned = jax.eval_shape(step.trees, structs, lanes * step.state_tree.num_leaves, lanes * len(xs))
    except Exception as e:  # the neuron's own error goes on as it is, and says what its step was given
        e.add_note(
            f"in neuron {name}.step(params, state, x), given params {step.params_tree}, state {step.state_tree} "
            f"and x {step.x_tree}"
        )
        raise
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ValueError(f"neuron {name}.step must return (state, out); got {returned}")
    new_state, out = returned
    if jax.tree.structure(new_state) != step.state_tree:
        raise ValueError(
            f"neuron {name}.step must return the state in its own structure, {step.state_tree}; "
            f"got {jax.tree.structure(new_state)}"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(new_state):
        where = f"neuron {name}.step must return state{jax.tree_util.keystr(path)}"
        if leaf.shape != shape:
            raise ValueError(f"{where} of shape [*B, N] = {shape}; got {leaf.shape}")
        if leaf.dtype != dtype:
            raise TypeError(f"{where} in {dtype}; got {leaf.dtype}")
    outs = jax.tree.leaves(out)
    if not outs or any(o.shape != shape for o in outs):
        raise ValueError(f"neuron {name}.step must return outputs of shape [*B, N] = {shape}; got {out}")
    return out, jax.tree.structure(out)


def _out_dtypes(out_dtype, out, xs):
    if out_dtype is None:
        out_dtype = xs[0].dtype if all(x.dtype == xs[0].dtype for x in xs) else jnp.float32
    treedef = jax.tree.structure(out)
    wanted = f"out_dtype must be a dtype, or a tree of them like the outputs {treedef}; got {out_dtype!r}"
    if jax.tree_util.all_leaves([out_dtype]):
        dtypes = [out_dtype] * treedef.num_leaves
    elif jax.tree.structure(out_dtype) == treedef:
        dtypes = jax.tree.leaves(out_dtype)
    else:
        raise TypeError(wanted)
    try:
        dtypes = tuple(d if isinstance(d, Packed) else jnp.dtype(d) for d in dtypes)
    except TypeError as e:
        raise TypeError(wanted) from e
    for d in dtypes:
        if isinstance(d, Packed):
            continue
        if not (jnp.issubdtype(d, jnp.floating) or jnp.issubdtype(d, jnp.integer) or d == jnp.bool_):
            raise TypeError(f"out_dtype must be a floating, integer or bool dtype; got {d}")
        if jax.dtypes.canonicalize_dtype(d) != d:
            raise TypeError(f"out_dtype {d} needs 64-bit types (jax.enable_x64); here it would be cut to 32")
    return dtypes
