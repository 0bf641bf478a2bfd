"""The fused kernels at the caller's shapes, [T, *B, N]: on lanes sharded over any devices, and under `vmap`.

A kernel knows one device and flat lanes [M]. `jit` cannot split a kernel: it would gather the operands. So each call is
wrapped in `custom_partitioning`. Its rule says that every axis of [*B, N] may be sharded, and that time may not. Each
device then runs the same kernel on its own lanes, without communication. The kernels return the gradient of a parameter
lane by lane, and XLA sums it over lanes and devices.

`vmap` only adds an axis of lanes, so its rule calls the same kernel with one more axis in *B.
"""

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

    Leaves of `params` are [*B, N], where any axis may be 1. Leaves of `groups` and results are [*B, N] or [time, *B, N].
    Each device runs the kernels for its own lanes. The block sizes stay the same, so forward and backward agree on K.
    Every device gets the whole of the arrays in `shared`. If `kernels.whole_last_axis`, axis N is not sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if left := [a for a in mesh.axis_names if mesh.manual_axes and a not in mesh.manual_axes and mesh.shape[a] > 1]:
        raise NotImplementedError(  # XLA would abort the process
            f"a fused kernel in a shard_map over {mesh.manual_axes} needs {left} there too, all axes of the mesh; "
            "implementation='scan' does not need them"
        )
    leaves, tree = jax.tree.flatten(varying((shared, params, groups)))
    call = _Lanes(method, options, kernels, tree, len(shared), len(params), len(kernels.problem.lane_shape))
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
    """Give a cotangent the type of its primal: sum it over broadcast lanes, cast it, and shard it like the primal."""
    axes = [i for i, (n, m) in enumerate(zip(d.shape, primal.shape, strict=True)) if n != m]
    d = (d.sum(axes, keepdims=True) if axes else d).astype(primal.dtype)
    if not (mesh := jax.typeof(d).sharding.mesh).explicit_axes:
        return d
    return jax.sharding.reshard(d, NamedSharding(mesh, jax.typeof(primal).sharding.spec))


@dataclass(frozen=True)
class _Lanes:
    """One call of `on_lanes`, over a flat list of leaves: `num_shared` shared ones, then `num_params` params, then lanes.

    `rank` is the rank of [*B, N].
    """

    method: str
    options: dict
    kernels: Any
    tree: Any
    num_shared: int
    num_params: int
    rank: int

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

        def sharding(struct):
            return NamedSharding(like.mesh, PartitionSpec(*[None] * (struct.ndim - self.rank), *lanes))

        def call(*leaves):
            structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves]
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                results = jax.eval_shape(self.on_one_device, *structs)
            out = jax.tree.map(sharding, results)
            return jax.sharding.auto_axes(
                lambda *leaves: self(*leaves), axes=like.mesh.explicit_axes, out_sharding=out
            )(*leaves)

        return call

    def on_one_device(self, *leaves):
        shared, params, groups = self.tree.unflatten(leaves)
        shape = leaves[-1].shape[-self.rank :]
        problem = replace(self.kernels.problem, lane_shape=shape, param_shapes=tuple(p.shape for p in params))
        flat = lambda a: a.reshape(*a.shape[: a.ndim - self.rank], problem.M)
        kernels = getattr(replace(self.kernels, problem=problem), self.method)
        results = kernels(
            *shared, tuple(periodic(p, shape) for p in params), *jax.tree.map(flat, groups), **self.options
        )
        _, results = varying((leaves, results))  # some kinds of kernel call do not mark their results
        return jax.tree.map(lambda a: a.reshape(*a.shape[:-1], *shape), results)

    def sharding_rule(self, mesh, operands, results):
        """An axis of lanes has one factor in all arrays; a time axis and an axis of length 1 in params have their own."""
        lanes = [f"lane{i}" for i in range(self.rank)]
        whole = lanes[-1:] if self.whole_last_axis else []
        terms = []
        for i, t in enumerate((*operands, *results)):
            if i < self.num_shared:
                axes = [f"shared{i}x{j}" for j in range(len(t.shape))]
                whole += axes
            else:
                axes = [f"one{i}x{j}" if self.is_param(i) and t.shape[j] == 1 else lanes[j] for j in range(self.rank)]
                if len(t.shape) > self.rank:
                    whole.append(f"time{i}")
                    axes.insert(0, whole[-1])
            terms.append(" ".join(axes))
        n = len(operands)
        return f"{', '.join(terms[:n])} -> {', '.join(terms[n:])}", {"need_replication_factors": tuple(whole)}

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
        outs = jax.tree.map(lambda s: sharding(len(shardings), s), results)
        return mesh, self.on_one_device, outs, args

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
        results = replace(self, rank=self.rank + 1)(*leaves)
        results = jax.tree.map(lambda a: jnp.moveaxis(a, a.ndim - 1 - self.rank, 0), results)
        return results, jax.tree.map(lambda _: True, results)


def periodic(p, shape):
    """A parameter flattened to one period of the lanes: [1], [M], or the trailing axes that it covers completely."""
    covered = p.shape
    while covered and covered[0] == 1:
        covered = covered[1:]
    if covered == shape[len(shape) - len(covered) :]:
        return p.reshape(-1)
    return jnp.broadcast_to(p, shape).reshape(-1)
