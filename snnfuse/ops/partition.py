"""The fused kernels at the caller's shapes, [T, *B, N]: on lanes sharded over any devices, and under `vmap`.

A kernel knows one device and flat lanes [M]. `jit` cannot split a kernel: it would gather the operands. So each call is
wrapped in `custom_partitioning`. Its rule says that every axis of [*B, N] may be sharded, and that time may not. Each
device then runs the same kernel on its own lanes, without communication. The gradient of a parameter that several lanes
share is a sum over lanes. A kernel returns parts of this sum; they are added on each device, then over the devices.

`vmap` only adds an axis of lanes, so its rule calls the same kernel with one more axis in *B.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from snnfuse.ops.device import device_count


def on_lanes(method, kernels, params, *groups, shared=(), **options):
    """`kernels.method(*shared, params, *groups, **options)`, which takes and returns flat lanes, for arrays that are not.

    Leaves of `params` are [*B, N], where any axis may be 1. Leaves of `groups` and results are [*B, N] or [time, *B, N],
    but the gradient of a parameter has the shape of that parameter. Each device runs the kernels for its own lanes. The
    block sizes stay the same, so forward and backward agree on K. Every device gets the whole of the arrays in `shared`.
    If `kernels.whole_last_axis`, axis N is not sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if left := [a for a in mesh.axis_names if mesh.manual_axes and a not in mesh.manual_axes and mesh.shape[a] > 1]:
        raise NotImplementedError(  # XLA would abort the process
            f"a fused kernel in a shard_map over {mesh.manual_axes} needs {left} there too, all axes of the mesh; "
            "implementation='scan' does not need them"
        )
    leaves, tree = jax.tree.flatten(varying((shared, params, groups)))
    wanted = options["wanted"].params if method == "backward" else (False,) * len(params)
    sums = tuple(p.shape for p, want in zip(params, wanted, strict=True) if want)
    rank = len(kernels.problem.lane_shape)
    call = _Lanes(method, options, kernels, tree, len(shared), len(params), rank, sums)
    lanes = jax.typeof(leaves[-1]).sharding
    if not lanes.mesh.explicit_axes:
        return call(*leaves)
    for leaf in leaves[len(shared) + len(params) :]:
        if leaf.ndim > call.rank and (time := jax.typeof(leaf).sharding.spec[0]) is not None:
            raise ValueError(
                f"the time axis of a sequence must not be sharded; got {leaf.shape} with it along {time!r}"
            )
    return call.with_explicit_axes(lanes)(*leaves)


def varying(tree):
    """In `jax.shard_map`, mark every leaf as varying over each mesh axis that any leaf varies over. A kernel needs one type."""
    axes = {a for leaf in jax.tree.leaves(tree) for a in _varies(leaf)}

    def cast(leaf):
        more = tuple(sorted(axes - set(_varies(leaf))))
        return jax.lax.pcast(leaf, more, to="varying") if more else leaf

    return jax.tree.map(cast, tree)


def _varies(leaf):
    return jax.typeof(leaf).manual_axis_type.varying


def like(d, primal):
    """Give a cotangent the type of its primal: cast it, and shard it like the primal."""
    d = d.astype(primal.dtype)
    if not (mesh := jax.typeof(d).sharding.mesh).explicit_axes:
        return d
    return jax.sharding.reshard(d, NamedSharding(mesh, jax.typeof(primal).sharding.spec))


@dataclass(frozen=True)
class _Lanes:
    """One call of `on_lanes`, over a flat list of leaves: `num_shared` shared ones, then `num_params` params, then lanes.

    `rank` is the rank of [*B, N]. The first results are gradients of params; `sums` has the shape of each, with 1 for an
    axis that it is summed over.
    """

    method: str
    options: dict
    kernels: Any
    tree: Any
    num_shared: int
    num_params: int
    rank: int
    sums: tuple[tuple[int, ...], ...]

    @property
    def whole_last_axis(self):
        return getattr(self.kernels, "whole_last_axis", False)

    def lanes_of(self, spec):
        """The axes of a mesh that each axis of [*B, N] is sharded along, given the spec of an array that ends in [*B, N]."""
        lanes = tuple(spec)[-self.rank :]
        return (*lanes[:-1], None) if self.whole_last_axis else lanes

    def __call__(self, *leaves):
        sharded = self.on_one_device
        if device_count() > 1:  # one device needs no split, and JAX 0.12 cannot lower a split without a device
            sharded = custom_partitioning(self.on_one_device)
            sharded.def_partition(partition=self.partition, sharding_rule=self.sharding_rule)
        call = custom_vmap(sharded)
        call.def_vmap(self.vmap)
        return call(*leaves)

    def with_explicit_axes(self, like):
        """The same under a mesh with explicit axes: the results are sharded like the lanes of `like`."""
        lanes = self.lanes_of(like.spec)

        def sharding(i, struct):
            axes = self._kept(i, lanes)
            return NamedSharding(like.mesh, PartitionSpec(*[None] * (struct.ndim - self.rank), *axes))

        def call(*leaves):
            structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves]
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                results = jax.eval_shape(self.on_one_device, *structs)
            structs, tree = jax.tree.flatten(results)
            out = tree.unflatten([sharding(i, struct) for i, struct in enumerate(structs)])
            return jax.sharding.auto_axes(
                lambda *leaves: self(*leaves), axes=like.mesh.explicit_axes, out_sharding=out
            )(*leaves)

        return call

    def _kept(self, i, axes, summed=None):
        """`axes` of [*B, N], one entry for each, with `summed` for those that result `i` is summed over."""
        shape = self.sums[i] if i < len(self.sums) else (None,) * self.rank
        return tuple(summed if n == 1 else axis for n, axis in zip(shape, axes, strict=True))

    def on_one_device(self, *leaves):
        shared, params, groups = self.tree.unflatten(leaves)
        shape = leaves[-1].shape[-self.rank :]
        problem = replace(self.kernels.problem, lane_shape=shape, param_shapes=tuple(p.shape for p in params))
        flat = lambda a: a.reshape(*a.shape[: a.ndim - self.rank], problem.M)
        kernels = getattr(replace(self.kernels, problem=problem), self.method)
        sums = [self._kept(i, shape, 1) for i in range(len(self.sums))]
        periods = dict(periods=tuple(period(s, shape) for s in sums)) if self.method == "backward" else {}
        params = tuple(periodic(p, shape) for p in params)
        results = kernels(*shared, params, *jax.tree.map(flat, groups), **self.options, **periods)
        _, results = varying((leaves, results))  # some kinds of kernel call do not mark their results
        results, tree = jax.tree.flatten(results)
        summed = [total(a, s, shape) for a, s in zip(results, sums, strict=False)]
        return tree.unflatten(summed + [a.reshape(*a.shape[:-1], *shape) for a in results[len(sums) :]])

    def sharding_rule(self, mesh, operands, results):
        """An axis of lanes has one factor in all arrays; a time axis and an axis of length 1 in params have their own."""
        lanes = [f"lane{i}" for i in range(self.rank)]
        whole = {lanes[-1]} if self.whole_last_axis else set()
        terms = []
        for i, t in enumerate((*operands, *results)):
            if i < self.num_shared:
                axes = [f"shared{i}x{j}" for j in range(len(t.shape))]
                whole.update(axes)
            else:
                axes = [f"one{i}x{j}" if self.is_param(i) and t.shape[j] == 1 else lanes[j] for j in range(self.rank)]
                if len(t.shape) > self.rank:
                    axes.insert(0, f"time{i}")
                    whole.add(f"time{i}")
            terms.append(axes)
        n = len(operands)
        for i in range(len(self.sums)):
            terms[n + i] = [axis or f"sum{i}x{j}" for j, axis in enumerate(self._kept(i, lanes))]
        ordered = dict.fromkeys(axis for axes in terms for axis in axes if axis in whole)  # as XLA wants them
        terms = [" ".join(axes) for axes in terms]
        return f"{', '.join(terms[:n])} -> {', '.join(terms[n:])}", {"need_replication_factors": tuple(ordered)}

    def is_param(self, i):
        return self.num_shared <= i < self.num_shared + self.num_params

    def partition(self, mesh, operands, results):
        shardings = jax.tree.leaves(operands, is_leaf=lambda s: hasattr(s, "sharding"))
        lanes = tuple(shardings[-1].sharding.spec)
        lanes = self.lanes_of(lanes + (None,) * (len(shardings[-1].shape) - len(lanes)))

        def sharding(i, struct):
            if i < self.num_shared:
                return NamedSharding(mesh, PartitionSpec())
            axes = [
                None if self.is_param(i) and n == 1 else s
                for n, s in zip(struct.shape[-self.rank :], lanes, strict=True)
            ]
            return NamedSharding(mesh, PartitionSpec(*[None] * (len(struct.shape) - self.rank), *axes))

        args = tuple(sharding(i, s) for i, s in enumerate(shardings))
        outs, tree = jax.tree.flatten(jax.tree.map(lambda s: sharding(len(shardings), s), results))
        for i in range(len(self.sums)):
            outs[i] = NamedSharding(mesh, PartitionSpec(*self._kept(i, lanes)))

        def run(*leaves):
            results, tree = jax.tree.flatten(self.on_one_device(*leaves))
            for i in range(len(self.sums)):
                kept = self._kept(i, lanes)
                over = [axis for axis, keep in zip(lanes, kept, strict=True) if axis is not None and keep is None]
                names = tuple(name for axis in over for name in (axis if isinstance(axis, tuple) else (axis,)))
                results[i] = jax.lax.psum(results[i], names) if names else results[i]
            return tree.unflatten(results)

        return mesh, run, tree.unflatten(outs), args

    def vmap(self, size, batched, *leaves):
        """The mapped axis becomes the first of *B: [V, time, *B, N] is [time, V, *B, N] to the kernels.

        If a shared array is mapped, the kernels run once for each of its elements, one after the other.
        """
        if any(batched[: self.num_shared]):
            put = lambda values: [next(values) if mapped else a for a, mapped in zip(leaves, batched, strict=True)]
            given = [a for a, mapped in zip(leaves, batched, strict=True) if mapped]
            results = jax.lax.map(lambda values: self(*put(iter(values))), given)
            return results, jax.tree.map(lambda _: True, results)

        def lead(i, leaf, mapped):
            if i < self.num_shared:
                return leaf
            if not mapped:
                leaf = leaf[None] if self.is_param(i) else jnp.broadcast_to(leaf, (size, *leaf.shape))
            return jnp.moveaxis(leaf, 0, leaf.ndim - 1 - self.rank)

        leaves = [lead(i, leaf, mapped) for i, (leaf, mapped) in enumerate(zip(leaves, batched, strict=True))]
        sums = tuple((size, *shape) for shape in self.sums)  # each of the mapped calls has its own gradient
        results = replace(self, rank=self.rank + 1, sums=sums)(*leaves)
        results = jax.tree.map(lambda a: jnp.moveaxis(a, a.ndim - 1 - self.rank, 0), results)
        return results, jax.tree.map(lambda _: True, results)


def period(shape, lanes):
    """After how many lanes of `lanes`, the shape [*B, N], the elements of a parameter of this shape repeat."""
    covered = shape
    while covered and covered[0] == 1:
        covered = covered[1:]
    return math.prod(covered if covered == lanes[len(lanes) - len(covered) :] else lanes)


def periodic(p, shape):
    """A parameter flattened to one period of the lanes: [1], [M], or the trailing axes that it covers completely."""
    return (p if p.size == period(p.shape, shape) else jnp.broadcast_to(p, shape)).reshape(-1)


def total(parts, shape, lanes):
    """The sum of the parts that a kernel returns, a whole number of periods of a parameter of this shape."""
    once = parts.reshape(-1, period(shape, lanes)).sum(0)
    if once.size == math.prod(shape):
        return once.reshape(shape)
    return once.reshape(lanes).sum([i for i, n in enumerate(shape) if n == 1], keepdims=True)
