"""A train step written for one device, on all devices of a mesh.

    def step(state, batch, key):
        loss, grads = jax.value_and_grad(loss_of)(...)
        grads = snnfuse.parallel.mean_gradients(grads)        # on one device: the same grads
        ...
        return state, {"loss": loss}

    parallel_step = jax.jit(data_parallel(step, make_mesh("data=4")))

Every device runs the step on its own part of the batch, with its own random keys and, but for `mean_gradients`, alone. The
gradients move once and nothing else does but scalars and batch statistics.
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
    """The names of the device axes that the code being traced runs on, () outside of `data_parallel` (or `shard_map`)."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def data_axes() -> tuple[str, ...]:
    """Those of `axes_here` whose devices hold different samples: all but "time"."""
    return tuple(axis for axis in axes_here() if axis != TIME)


# Bytes of a sum, not searched for: one of 4 MB is little more than its latency, of 64 MB little more than its bytes.
LAST = 2**22  # of the one that only the update can hide, see `flatten_optimizer`
PIECE = 2**26  # of each of the others, about


def mean_gradients(
    tree: PyTree, axes: tuple[str, ...] | None = None, dtype: jax.typing.DTypeLike | None = None
) -> PyTree:
    """The mean over devices: over `axes`, or all there are. On one device, outside of `data_parallel`, the tree itself.

    A collective costs much before its first byte, so the leaves are joined into few. Gradients are known from the last
    layer to the first: the last leaves come first, and their sum runs beside the rest of the backward pass; the first
    leaves' sum, which is small, runs beside the update of the others, if `flatten_optimizer` allows it, or beside nothing.

    Args:
      dtype: what floats travel and are added in, or None: their own. In bfloat16 half the bytes of float32 travel. Where
        a network is computed in it, the gradients of weights were rounded to it before, and their sum is once more.

    Raises:
      ValueError: if `dtype` is not of floats.
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
        # 0 of whatever number, NaN too, but not before this sum is known: the next one takes it along, or else the compiler
        # may well begin with the smallest
        after[kind] = [(flat[:1] > jnp.inf).astype(flat.dtype)]
        sums.append(flat.astype(kind))
    return treedef.unflatten(_split(sums, pieces, leaves))


def _pmean(x, axes):
    """lax.pmean. Two devices hand each other theirs: the same bytes, without a kernel that adds them."""
    if lax.axis_size(axes) == 2:
        return (x + lax.ppermute(x, axes, [(0, 1), (1, 0)])) * 0.5
    return lax.pmean(x, axes)


def flatten_optimizer(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optax.flatten` with an array for each sum of `mean_gradients`, not one for all: of an optimizer that works elementwise.

    Its state is then in few arrays, which a call hands to every device one by one, and the update of what is summed
    first hides the sum of the rest.

    Raises:
      ValueError: by `update`, if a gradient is not of its parameter's dtype.
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
    """The leaves again, of an array for each of `pieces`; what comes after a piece's leaves is left out."""
    out = [None] * len(leaves)
    for array, piece in zip(arrays, pieces, strict=True):
        ends = np.cumsum([jnp.size(leaves[i]) for i in piece])
        for i, part in zip(piece, jnp.split(array, ends), strict=False):
            out[i] = part.reshape(jnp.shape(leaves[i]))
    return out


def _pieces(leaves):
    """Lists of leaves' indices: floats of one dtype about PIECE bytes each, the last first, the first LAST; others alone."""
    of_dtype, pieces = {}, []
    for i, leaf in enumerate(leaves):
        kind = jnp.result_type(leaf)
        of_dtype.setdefault(kind if jnp.issubdtype(kind, jnp.floating) else i, []).append(i)
    for indices in of_dtype.values():
        sizes = [jnp.size(leaves[i]) * jnp.result_type(leaves[i]).itemsize for i in indices]
        pieces += [[indices[k] for k in piece] for piece in _cut(sizes)]
    return pieces


def _cut(sizes):
    """Ranges of `sizes`, the last first, each of about PIECE bytes, but the one at the front of LAST."""
    pieces, stop, held = [], len(sizes), 0
    for i in reversed(range(len(sizes))):
        before, held = sum(sizes[:i]), held + sizes[i]
        if i == 0 or held >= PIECE or before <= LAST < before + sizes[i]:
            pieces.append(range(i, stop))
            stop, held = i, 0
    return pieces


def fold_key(key: jax.Array, axes: tuple[str, ...] | None = None) -> jax.Array:
    """The key of this device: `key` with its index along `axes` folded in. Outside of `data_parallel`, `key` itself."""
    axes = axes_here() if axes is None else axes
    return jax.random.fold_in(key, lax.axis_index(axes)) if axes else key


def synchronise_batch_norm(model: nnx.Module, axes: str | tuple[str, ...]) -> nnx.Module:
    """Let every nnx.BatchNorm of `model`, changed in place, take its statistics over the devices along `axes` too.

    Training then equals one device with the whole batch, and the model trains only inside of `data_parallel`.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.axis_name = axes
    return model


def data_parallel(step: Callable, mesh: Mesh, *, batch: PyTree = ALONG_DATA) -> Callable:
    """`step(state, batch, *rest) -> (state, metrics)` for one device, as the same function of global arrays on `mesh`.

    Args:
      step: it must pass its gradients through `mean_gradients`. `rest` is the same on every device, but for random keys.
      batch: a PartitionSpec, or a tree of them: how the leaves of the batch are cut. With a time axis (see
        `over_time`), PartitionSpec("time", "data") for sequences [T, B, ...].

    Random keys, in `rest` and in the state, have the device's index folded in (but along an axis `time`: its devices
    share their samples); the state keeps the keys it came with. Metrics that are floats are averaged, integers summed
    (over samples: not along `time`).
    Every device has its own batch statistics unless `synchronise_batch_norm` says otherwise; what the state keeps of
    them (`nnx.BatchStat`) is averaged. All other leaves of the state are the same on every device because the
    gradients are.

    The batch must divide by the devices. The step is traced with `check_vma=False`.
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
    """`data_parallel` by `jax.pmap`, for code built on it: every argument and result has a leading axis of devices.

    JAX keeps `pmap` (as a wrapper of `shard_map` and `jit`) but develops it no more: prefer `data_parallel`, which
    takes global arrays, several axes, and donates and shards as `jit` does.
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
    """Keys as they were; nnx.BatchStat averaged; what an nnx.Metric gained on each device, added up."""
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
