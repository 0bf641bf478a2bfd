"""Make meshes, put arrays onto them, and join the hosts of a cluster."""

import math
import os

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snnfuse.core.neuron import PyTree

EVERYWHERE = PartitionSpec()


def make_mesh(axes: str | dict[str, int], devices=None) -> Mesh:
    """Make a mesh from text such as `data=4` or `data=2,time=4`.

    It takes the first devices of `devices`, which is `jax.devices()` by default. Neighbours differ in the last axis. The
    axes are of JAX's kind Auto: the compiler propagates shardings.
    """
    axes = _parse(axes) if isinstance(axes, str) else dict(axes)
    devices = jax.devices() if devices is None else list(devices)
    if not axes or any(not isinstance(n, int) or n < 1 for n in axes.values()):
        raise ValueError(f"mesh must give every axis a size of at least 1, as in data=2,time=4; got {axes}")
    n = math.prod(axes.values())
    if n > len(devices):
        text = ",".join(f"{name}={size}" for name, size in axes.items())
        raise ValueError(f"mesh {text} needs {n} devices; there are {len(devices)} ({devices[0].platform})")
    return Mesh(np.array(devices[:n]).reshape(tuple(axes.values())), tuple(axes))


def _parse(text):
    axes = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if not (equals and name.isidentifier() and size.strip().isdecimal()) or name in axes:
            raise ValueError(f"mesh must be like data=4 or data=2,time=4, each axis once; got {text!r}")
        axes[name] = int(size)
    return axes


def check_axes(mesh: Mesh, spec: PyTree, what: str):
    """Raise a ValueError if a PartitionSpec in the tree `spec` names an axis that `mesh` does not have."""
    for p in jax.tree.leaves(spec, is_leaf=lambda s: isinstance(s, PartitionSpec)):
        for name in spec_axes(p):
            if name not in mesh.axis_names:
                raise ValueError(f"{what} {p} names the axis {name!r}; the mesh has {dict(mesh.shape)}")


def spec_axes(spec: PartitionSpec) -> tuple[str, ...]:
    return tuple(name for part in spec if part for name in (part if isinstance(part, tuple) else (part,)))


def check_divisible(mesh: Mesh, tree: PyTree, specs: PyTree, what: str):
    """Raise a ValueError if an array in `tree` cannot be cut evenly as `specs` says. `specs` is a prefix of `tree`."""

    def check(prefix, spec, part):
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            name = what + jax.tree_util.keystr((*prefix, *path))
            shape = np.shape(leaf)
            if len(spec) > len(shape):
                raise ValueError(f"{name} must have an axis for each of {spec}; got shape {shape}")
            for i, names in enumerate(spec):
                n = math.prod(mesh.shape[a] for a in spec_axes(PartitionSpec(names)))
                if shape[i] % n:
                    raise ValueError(
                        f"{name}: axis {i} of shape {shape} must be a multiple of {n}, the devices along {names!r}; "
                        f"got {shape[i]}"
                    )

    jax.tree_util.tree_map_with_path(check, specs, tree, is_leaf=lambda s: isinstance(s, PartitionSpec))


def shard(tree: PyTree, mesh: Mesh, spec: PartitionSpec = EVERYWHERE) -> PyTree:
    """Put arrays onto the mesh: replicated, or cut as `spec` says. Every host must hold the whole arrays."""
    check_axes(mesh, spec, "spec")
    check_divisible(mesh, tree, spec, "array")
    sharding = NamedSharding(mesh, spec)

    def put(x):
        if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
            return jax.device_put(x, sharding)
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


# ---- several hosts


def initialise(coordinator: str | None = None, num_hosts: int | None = None, host: int | None = None):
    """Join the hosts. Call it before any other function of JAX. On a cluster that JAX knows, no argument is needed.

    `coordinator` is host:port of host 0. On CPUs the hosts communicate by Gloo.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu" or jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_hosts, host)


def host_rows(batch: int, hosts: int | None = None, host: int | None = None) -> slice:
    """The rows of a global batch that this host should load. Each host gets an equal, contiguous part, in the order of hosts."""
    hosts = jax.process_count() if hosts is None else hosts
    host = jax.process_index() if host is None else host
    if batch % hosts:
        raise ValueError(f"batch must be a multiple of the {hosts} hosts; got {batch}")
    return slice(host * (batch // hosts), (host + 1) * (batch // hosts))


def global_batch(tree: PyTree, mesh: Mesh, spec: PartitionSpec) -> PyTree:
    """Make global arrays from the rows that each host loaded (`host_rows`). No host holds the whole batch."""
    check_axes(mesh, spec, "spec")
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)
