"""The checks of one call: each argument of `unroll` is looked at once, here, before anything runs.

Every check raises an error that names the argument, says what was wanted, and says what was got.
"""

import warnings
from functools import lru_cache, partial
from numbers import Real

import jax
import jax.numpy as jnp
import numpy as np

from snnfuse.core.compose import Connect
from snnfuse.ops.packing import Packed, Planes, packed_for
from snnfuse.ops.problem import Problem, Step


def check_call(neuron, params, state, xs, out_dtype, reuse_cotangents=False):
    check_neuron(neuron)
    xs, x_tree, shape, dtype = check_xs(xs)
    params, params_tree, constants = check_params(params, shape)
    state, state_tree, initial = check_state(neuron, state, shape, dtype)
    step = Step(neuron, params_tree, state_tree, x_tree, constants)
    out_struct, out_tree = check_step(step, params, xs, shape, dtype)
    if not all(jnp.issubdtype(o.dtype, jnp.integer) for o in jax.tree.leaves(out_struct)):  # counts have no gradient
        warn_without_gradient(step, len(params), len(xs), len(shape), dtype)
    out_dtypes = check_out_dtype(out_dtype, out_struct, xs)
    check_packed(neuron, out_dtypes)
    formats = tuple(d if isinstance(d, Packed) and d.graded else None for d in out_dtypes)
    if any(formats):
        step = Step(Planes(neuron, formats), params_tree, state_tree, x_tree, constants)
        out_struct, out_tree = check_step(step, params, xs, shape, dtype)
        each = [(Packed(d.steps),) * d.bits if f else (d,) for d, f in zip(out_dtypes, formats, strict=True)]
        out_dtypes = sum(each, ())
    problem = Problem(
        step=step,
        T=xs[0].shape[0],
        lane_shape=shape,
        param_shapes=tuple(p.shape for p in params),
        x_dtypes=tuple(x.dtype for x in xs),
        out_dtypes=out_dtypes,
        out_tree=out_tree,
        dtype=dtype,
        initial=initial,
        reuse_cotangents=reuse_cotangents,
    )
    return problem, params, state, xs


def check_neuron(neuron):
    if isinstance(neuron, type):
        raise TypeError(f"neuron must be an instance; got the class {neuron.__name__}: write {neuron.__name__}()")
    for name in ("reset", "surrogate"):
        check_choice(name, getattr(neuron, name, None))
    missing = [m for m in ("init_state", "step") if not callable(getattr(neuron, m, None))]
    if missing:
        raise TypeError(f"neuron must be an object with init_state and step; got {neuron!r}, without {missing}")
    try:
        hash(neuron)
    except TypeError as e:
        raise TypeError(f"neuron must be hashable (a frozen dataclass of hashable choices); got {neuron!r}: {e}") from e


def check_choice(name, value):
    """`value` is a reset or a surrogate of a neuron: an object that can be called, not its name or its class."""
    if value is not None and (isinstance(value, type) or not callable(value)):
        known = {"reset": "SoftReset() or HardReset()", "surrogate": "ATan() or Sigmoid()"}[name]
        raise TypeError(f"{name} must be an object such as snnfuse.{known}; got {value!r}")


def _array(name, leaf):
    try:
        return jnp.asarray(leaf)
    except (TypeError, ValueError) as e:
        raise TypeError(f"{name} must be an array; got {leaf!r}") from e


def check_xs(xs):
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


def check_params(params, shape):
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
        if not isinstance(given, jax.core.Tracer) and np.isnan(given).any():  # a traced value cannot be looked at
            raise ValueError(f"{name} must not be NaN; got {given}")
        constants.append(leaf if constant else None)
    return tuple(arrays), tree, tuple(constants)


# Never run, as `_trees` below.
@partial(jax.jit, static_argnums=(0, 1))
def _first_state(neuron, shape):
    return neuron.init_state(shape)


def check_state(neuron, state, shape, dtype):
    """(leaves, tree, None); or ((), tree, values) if no state is given and each leaf of the initial state is one number."""
    traced = _first_state.trace(neuron, shape)
    like = traced.out_info
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        if leaf.shape != shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
            error = ValueError if leaf.shape != shape else TypeError
            raise error(
                f"neuron {type(neuron).__name__}.init_state must return state{jax.tree_util.keystr(path)} in float32 "
                f"of shape [*B, N] = {shape}; got {leaf.dtype}{leaf.shape}"
            )
    if state is None:
        if (values := _constants(traced.jaxpr, shape)) is not None:
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


# Never run: `eval_shape` and `trace` of a jitted function look at equal arguments once.
@partial(jax.jit, static_argnums=0)
def _trees(step, params, state, x):
    return step.trees(params, state, x)


def check_step(step, params, xs, shape, dtype):
    name = type(step.neuron).__name__
    structs = tuple(jax.ShapeDtypeStruct(p.shape, dtype) for p in params)
    lanes = (jax.ShapeDtypeStruct(shape, dtype),)
    try:
        returned = _trees.eval_shape(step, structs, lanes * step.state_tree.num_leaves, lanes * len(xs))
    except Exception as e:  # the neuron's own error is raised, with a note on what its step was given
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


@lru_cache(maxsize=1024)
def warn_without_gradient(step, num_params, num_xs, rank, dtype):
    """Warn if no output of a step has a gradient, as when it compares `v >= threshold` and does not call `snnfuse.spike`.

    The cache makes it one warning for each step, rank and dtype. One lane is enough to see it.
    """
    leaves = lambda n: (jax.ShapeDtypeStruct((1,) * rank, dtype),) * n

    def pullback(params, state, x, d_out):
        def outs(*args):
            return tuple(o for o in step(*args)[1] if jnp.issubdtype(o.dtype, jnp.floating))

        got, vjp = jax.vjp(outs, params, state, x)
        return vjp((d_out,) * len(got))

    try:
        jaxpr = jax.make_jaxpr(pullback)(
            *map(leaves, (num_params, step.state_tree.num_leaves, num_xs)), *leaves(1)
        ).jaxpr
    except Exception:  # a step without a gradient, such as one with a loop: the gradient itself raises, if it is taken
        return
    reached = {jaxpr.invars[-1]}
    for eqn in jaxpr.eqns:
        if any(v in reached for v in eqn.invars if not hasattr(v, "val")):
            reached.update(eqn.outvars)
    if not any(v in reached for v in jaxpr.outvars if not hasattr(v, "val")):
        warnings.warn(
            f"neuron {type(step.neuron).__name__}: the gradient of its outputs is zero, so nothing before it can be trained. "
            "A comparison has no gradient; snnfuse.spike(u, surrogate) has one",
            stacklevel=4,
        )


def check_packed(neuron, out_dtypes):
    """One `Packed` output of a neuron with graded spikes must hold them all; with several outputs, the first is the spikes."""
    wanted, given, inside = packed_for(neuron), out_dtypes[0], neuron
    if not isinstance(given, Packed):
        return
    while hasattr(inside, "inner"):
        if isinstance(inside, Connect) and (inside.how == "add" or wanted.graded):
            raise ValueError(
                f"out_dtype must not be Packed for {'graded ' if wanted.graded else ''}spikes that are joined with a shortcut by "
                f"{inside.how!r}, because it would lose their {'sum' if inside.how == 'add' else 'product'}: give a dtype such as "
                f"float32; got {given}"
            )
        inside = inside.inner
    if not given.lowest <= wanted.lowest < wanted.highest <= given.highest:
        raise ValueError(
            f"out_dtype must be Packed({given.steps}, {wanted.lowest}, {wanted.highest}) for the graded spikes of "
            f"{type(neuron).__name__}; got {given}"
        )


def check_out_dtype(out_dtype, out, xs):
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
            raise TypeError(f"out_dtype {d} needs 64-bit types (jax.enable_x64); without them it would become 32-bit")
    return dtypes
