"""Run a training step that is written for one device on all devices of a mesh.

    def step(state, batch, key):
        loss, grads = jax.value_and_grad(loss_of)(...)
        grads = snnfuse.parallel.mean_gradients(grads)        # on one device: the same grads
        ...
        return state, {"loss": loss}

    parallel_step = jax.jit(data_parallel(step, make_mesh("data=4")))

Each device runs the step on its own part of the batch, with its own random keys. Devices exchange the gradients once, in
`mean_gradients`. Apart from that they exchange only scalars and batch statistics.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from snnfuse.core.neuron import PyTree
from snnfuse.parallel.mesh import EVERYWHERE, check_axes, check_divisible

TIME = "time"
ALONG_DATA = PartitionSpec("data")


def axes_here() -> tuple[str, ...]:
    """The mesh axes over which the code being traced is divided; () outside of `data_parallel` and `shard_map`."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def data_axes() -> tuple[str, ...]:
    """The axes among `axes_here` along which devices hold different samples: all except "time"."""
    return tuple(axis for axis in axes_here() if axis != TIME)


# Bytes of one sum. These were not tuned. Sending 4 MB takes little longer than the latency alone; for 64 MB the latency is small.
LAST = 2**22  # about the size of the last sum, which can only run beside the update; see `flatten_optimizer`
PIECE = 2**26  # about the size of each of the others


def mean_gradients(
    tree: PyTree, axes: tuple[str, ...] | None = None, dtype: jax.typing.DTypeLike | None = None
) -> PyTree:
    """Average over devices, along `axes` or along all axes. Outside of `data_parallel` it returns the tree itself.

    A collective has a high latency, so the leaves are joined into a few buffers. The backward pass finds the gradients of
    the last layer first. So the last leaves are summed first, while the backward pass of the other layers still runs. The
    first leaves make a small buffer. Its sum runs beside the update of the others if the optimizer is in
    `flatten_optimizer`.

    Args:
      dtype: the dtype in which floats are sent and added; None keeps their own. bfloat16 halves the bytes of float32. A
        network that computes in bfloat16 has already rounded the gradients of its weights; this rounds their sum again.

    Raises:
      ValueError: if `dtype` is not a float dtype.
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be one of floats; got {jnp.dtype(dtype).name}")
    axes = axes_here() if axes is None else axes
    if not axes:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    pieces = _pieces(leaves)
    sums, after = [], {}
    for piece in pieces:
        kind = jnp.result_type(leaves[piece[0]])
        if not jnp.issubdtype(kind, jnp.floating):
            sums.append(lax.pmean(leaves[piece[0]], axes).ravel())
            continue
        flat = jnp.concatenate([_join(leaves, piece).astype(dtype or kind), *after.get(kind, ())])
        flat = _pmean(flat, axes)
        # A zero that depends on this sum, even if the sum is NaN. Adding it to the next buffer fixes the order of the sums.
        # Without it the compiler may begin with the smallest.
        after[kind] = [(flat[:1] > jnp.inf).astype(flat.dtype)]
        sums.append(flat.astype(kind))
    return treedef.unflatten(_split(sums, pieces, leaves))


def _pmean(x, axes):
    """lax.pmean. Two devices exchange their arrays instead: this sends the same bytes and needs no kernel of its own to add."""
    if lax.axis_size(axes) == 2:
        return (x + lax.ppermute(x, axes, [(0, 1), (1, 0)])) * 0.5
    return lax.pmean(x, axes)


def flatten_optimizer(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Join the parameters of an elementwise optimizer into one array for each buffer of `mean_gradients`.

    It is `optax.flatten` with a few arrays in place of one. A call then passes fewer arrays to each device, and the update
    of the first buffer runs while the next one is summed.

    Raises:
      ValueError: in `update`, if a gradient does not have the dtype of its parameter.
    """

    def joined(tree):
        leaves = jax.tree.leaves(tree)
        return [_join(leaves, piece) for piece in _pieces(leaves)]

    def update(grads, state, params=None):
        leaves, treedef = jax.tree.flatten(grads)
        kinds = lambda tree: [jnp.result_type(leaf).name for leaf in jax.tree.leaves(tree)]
        if params is not None and kinds(params) != kinds(grads):
            raise ValueError(f"grads must be of the dtypes of params, {kinds(params)}; got {kinds(grads)}")
        updates, state = optimizer.update(joined(grads), state, None if params is None else joined(params))
        return treedef.unflatten(_split(updates, _pieces(leaves), leaves)), state

    return optax.GradientTransformation(lambda params: optimizer.init(joined(params)), update)


def _join(leaves, piece):
    return jnp.concatenate([jnp.ravel(leaves[i]) for i in piece])


def _split(arrays, pieces, leaves):
    """The leaves, cut out of `arrays`, which has one array for each piece. Numbers after a piece's last leaf are dropped."""
    out = [None] * len(leaves)
    for array, piece in zip(arrays, pieces, strict=True):
        ends = np.cumsum([jnp.size(leaves[i]) for i in piece])
        for i, part in zip(piece, jnp.split(array, ends), strict=False):
            out[i] = part.reshape(jnp.shape(leaves[i]))
    return out


def _pieces(leaves):
    """Lists of the indices of leaves, the last leaves first.

    The leaves of a list are floats of one dtype and have about PIECE bytes together. A leaf that is no float has its own list.
    """
    of_dtype, pieces = {}, []
    for i, leaf in enumerate(leaves):
        kind = jnp.result_type(leaf)
        of_dtype.setdefault(kind if jnp.issubdtype(kind, jnp.floating) else i, []).append(i)
    for indices in of_dtype.values():
        sizes = [jnp.size(leaves[i]) * jnp.result_type(leaves[i]).itemsize for i in indices]
        pieces += [[indices[k] for k in piece] for piece in _cut(sizes)]
    return pieces


def _cut(sizes):
    """Ranges of `sizes`, the last first, each of about PIECE bytes. The range of the first sizes has about LAST bytes."""
    pieces, stop, held = [], len(sizes), 0
    for i in reversed(range(len(sizes))):
        before, held = sum(sizes[:i]), held + sizes[i]
        if i == 0 or held >= PIECE or before <= LAST < before + sizes[i]:
            pieces.append(range(i, stop))
            stop, held = i, 0
    return pieces


def fold_key(key: jax.Array, axes: tuple[str, ...] | None = None) -> jax.Array:
    """Fold this device's index along `axes` into the key. Outside of `data_parallel` it returns the key itself."""
    axes = axes_here() if axes is None else axes
    return jax.random.fold_in(key, lax.axis_index(axes)) if axes else key


def synchronise_batch_norm(model: nnx.Module, axes: str | tuple[str, ...]) -> nnx.Module:
    """Make every nnx.BatchNorm of `model` average its statistics over the devices along `axes`. Changes `model` in place.

    Training then equals training on one device with the whole batch. The model can only train inside of `data_parallel`.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.axis_name = axes
    return model


def data_parallel(step: Callable, mesh: Mesh, *, batch: PyTree = ALONG_DATA) -> Callable:
    """Turn `step(state, batch, *rest) -> (state, metrics)` for one device into the same function of global arrays on `mesh`.

    (`snnfuse.training.compiled_step(mesh=...)` does this for a step on nnx objects, and is easier to use.)

    Args:
      step: it must average its gradients with `mean_gradients`. Every device gets the same `rest`, except for random keys.
      batch: how the arrays of the batch are divided: a PartitionSpec, or a tree of them. With a time axis (see
        `over_time`) it is PartitionSpec("time", "data") for sequences [T, B, ...].

    What devices share:

    * Random keys, in `rest` and in the state: the device's index is folded in. Devices along an axis `time` share their
      samples, so they share their keys. The returned state has the keys that came in.
    * Returned metrics: floats are averaged, integers are summed over samples (not along `time`).
    * Batch statistics: each device normalises by its own, unless `synchronise_batch_norm` says otherwise. The running
      averages in the state (`nnx.BatchStat`) are averaged.
    * The variables of an nnx.Metric in the state: what each device added is summed over samples.
    * All other leaves of the state are the same on every device, because the gradients are.

    The size of the batch must be a multiple of the number of devices. The step is traced with `check_vma=False`.
    """
    check_axes(mesh, batch, "batch")

    @wraps(step)
    def parallel_step(state, data, *rest):
        check_divisible(mesh, data, batch, "batch")
        return jax.shard_map(
            _on_each_device(step, mesh.axis_names),
            mesh=mesh,
            in_specs=(EVERYWHERE, batch, *[EVERYWHERE] * len(rest)),
            out_specs=(EVERYWHERE, EVERYWHERE),
            check_vma=False,
        )(state, data, *rest)

    return parallel_step


def pmapped(step: Callable, axis: str = "data", devices: Any = None) -> Callable:
    """`data_parallel` through `jax.pmap`, for code that uses it: every argument and result has a leading axis of devices.

    JAX still has `pmap` but no longer develops it. Prefer `data_parallel`: it takes global arrays and several axes, and
    donates and shards as `jit` does.
    """
    return jax.pmap(_on_each_device(step, (axis,)), axis_name=axis, devices=devices)


def _on_each_device(step, axes):
    apart = tuple(a for a in axes if a != TIME)

    def run(state, data, *rest):
        mine = lambda tree: jax.tree.map(lambda x: fold_key(x, apart) if apart and _is_key(x) else x, tree)
        new, metrics = step(mine(state), data, *mine(rest))
        return _same_everywhere(new, state, axes, apart), jax.tree.map(lambda x: _reduce(x, axes, apart), metrics)

    return run


def _same_everywhere(new, old, axes, apart):
    """The new state, made the same on all devices: old keys, averaged nnx.BatchStat, and summed gains of each nnx.Metric."""
    keys = {p: x for p, x in jax.tree_util.tree_leaves_with_path(old) if _is_key(x)}
    new = jax.tree_util.tree_map_with_path(lambda p, x: keys.get(p, x) if _is_key(x) else x, new)
    is_variable = lambda v: isinstance(v, nnx.Variable)
    variables, treedef = jax.tree.flatten(new, is_leaf=is_variable)
    statistics = iter(mean_gradients([v for v in variables if isinstance(v, nnx.BatchStat)], axes))
    gained = lambda now, was: was + lax.psum(now - was, apart) if apart else now

    def joined(now, was):
        if isinstance(now, nnx.BatchStat):
            return next(statistics)
        return jax.tree.map(gained, now, was) if isinstance(now, nnx.metrics.MetricState) else now

    return treedef.unflatten(map(joined, variables, jax.tree.leaves(old, is_leaf=is_variable)))


def _reduce(x, axes, apart):
    if jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return lax.pmean(x, axes)
    return lax.psum(x, apart) if apart else x


def _is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key) if isinstance(x, jax.Array) else False
