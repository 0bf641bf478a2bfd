"""`compiled_step`: a step on nnx objects as one `jax.jit` of a flat list of arrays, found again without walking the objects.

A call to `nnx.jit` walks every object (split), hashes the result, and walks again (merge). For a ResNet-18 and its Adam
that takes 14 ms or more on the host, twice what the GPU needs for the step. A compiled step walks the objects in its first call only. It keeps

    variables   the nnx.Variables in the order in which the compiled function takes their arrays
    contents    the attributes of every module, to see in a later call that none has been replaced

Each later call reads the variables' arrays, hands them over as donated buffers, and puts the new arrays into the same
variables. So the objects are never out of date. An array that someone else holds as well, as after
`best = nnx.clone(model)`, is copied and not donated: what was taken from a model stays as it was.

This file holds what happens in each call. `program.py` holds the function that is traced and compiled once.
"""

import functools
import itertools
import operator
import sys
import weakref
from collections import deque
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import graphlib
from jax.extend.core import get_opaque_trace_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snnfuse import parallel
from snnfuse.core.neuron import PyTree
from snnfuse.parallel.step import ALONG_DATA
from snnfuse.training.program import Program

# The array of a Variable, past the checks of `Variable.__setattr__`: 0.1 in place of 0.6 microseconds for each array.
_array_of = operator.attrgetter("_raw_value")
_set_array = nnx.Variable._raw_value.__set__

_TOP = get_opaque_trace_state(convention="nnx")
ALONE = max(map(sys.getrefcount, [object()])) + 1  # references to an array that only a list and its variable hold
CHECK_EVERY = 64  # calls; by then the flag's copy has long arrived and reading it does not wait


def compiled_step(
    step: Callable | None = None,
    *,
    mesh: Mesh | None = None,
    batch: PyTree = ALONG_DATA,
    check_finite: bool = False,
) -> "CompiledStep":
    """Compile `step(model, optimizer, ..., xs, labels)`, which changes its objects in place, as `nnx.jit` does.

    Use it as a decorator, with or without options. The leading arguments are nnx objects: a model, an optimizer, metrics,
    `nnx.Rngs`, an `nnx.EMA`. All other arguments are arrays, or trees of arrays.

    Args:
      step: the function. It may change the objects' variables; it may not add or remove one, nor change a shape or dtype.
        Switches that it sets, as `model.train()` does, hold inside the step only.
      mesh: train data parallel over this mesh (`parallel.make_mesh`). The step then averages its gradients with
        `parallel.mean_gradients`; see `parallel.data_parallel` for keys, batch statistics and returned metrics.
      batch: with a mesh, how the arguments after the objects are cut: a PartitionSpec for all that have an axis, or a
        tuple with one for each argument. An argument whose entry is `PartitionSpec()` is the same on every device.
      check_finite: raise a FloatingPointError if a returned float is NaN or infinite. A flag on the device remembers the
        first bad step; it is read every 64 calls without waiting, or at once by `train_step.check()`.

    Returns:
      A `CompiledStep`: call it like the function. `train_step.scan` takes K steps in one call.
    """
    if step is None:
        return functools.partial(compiled_step, mesh=mesh, batch=batch, check_finite=check_finite)
    return CompiledStep(step, mesh, batch, check_finite)


class CompiledStep:
    """A compiled training step, made by `compiled_step`."""

    def __init__(self, step: Callable, mesh: Mesh | None, batch: PyTree, check_finite: bool):
        functools.update_wrapper(self, step)
        self.step, self.mesh, self.batch, self.check_finite = step, mesh, batch, check_finite
        self.name = getattr(step, "__name__", "step")
        self.programs: dict[graphlib.GraphDef, Program] = {}
        self.bindings: dict[tuple[int, ...], _Binding] = {}  # by the ids of the objects
        self.num_objects = 0  # in the last call

    def __call__(self, *args, **kwargs):
        """Take one step. Returns what the function returns."""
        args, binding = self._bind(args)
        return binding.call(binding.program.one, args, kwargs, 1)

    def scan(self, *args, steps: int | None = None, **kwargs):
        """Take K steps in one call, for networks whose step is shorter than a call.

        Every array after the objects has a leading axis K, and so has every returned one. `steps` is K where there is no
        such array, because the batches come from an object such as `DeviceData`.
        """
        args, binding = self._bind(args)
        lengths = {np.shape(leaf)[0] if np.ndim(leaf) else "no axis" for leaf in jax.tree.leaves((args, kwargs))}
        lengths |= {steps} - {None}
        if len(lengths) != 1 or "no axis" in lengths:
            found = ", ".join(sorted(map(str, lengths))) or "no array and no steps="
            raise ValueError(f"{self.name}.scan wants one number of steps, the first axis of every array; got {found}")
        (steps,) = lengths
        return binding.call(binding.program.many(steps), args, kwargs, steps)

    def lower(self, *args, **kwargs) -> jax.stages.Lowered:
        """The program of one step before it is compiled, as `jax.jit(f).lower` gives it; no step is taken.

        `lower(...).compile().memory_analysis()` tells the memory that a step needs. A call afterwards does not compile again.
        Objects may hold shapes (`jax.ShapeDtypeStruct`) in place of arrays, as `nnx.eval_shape` makes them, so that a step can
        compile before its model has weights. If the later arrays are committed to a device, as after `jax.device_put`, the
        shapes must name their sharding; otherwise a call compiles again. With a mesh a shape needs none.
        """
        args, binding = self._bind(args)
        arrays = binding.shapes(args, kwargs) if binding.is_abstract() else binding.take(args, kwargs)
        return binding.program.one.lower(arrays, binding.constants, binding.flag_for(arrays), args, kwargs)

    def check(self):
        """Wait for the steps so far; raise a FloatingPointError if one returned a NaN or infinity (`check_finite`)."""
        for binding in list(self.bindings.values()):
            binding.check(binding.flag)

    def _bind(self, args):
        """The arguments after the objects, and the binding of the objects."""
        if get_opaque_trace_state(convention="nnx") != _TOP:
            raise RuntimeError(f"{self.name} was called while JAX traces; inside jit call {self.name}.__wrapped__")
        key = tuple(map(id, args[: self.num_objects]))
        binding = self.bindings.get(key)
        if binding is None or not binding.same():
            self.num_objects = sum(1 for _ in itertools.takewhile(graphlib.is_graph_node, args))
            objects = args[: self.num_objects]
            key = tuple(map(id, objects))
            binding = self.bindings[key] = self._new_binding(objects, key, self.bindings.get(key))
        return args[self.num_objects :], binding

    def _new_binding(self, objects, key, before):
        if not objects:
            raise TypeError(f"{self.name} wants nnx objects first, such as a model and an optimizer; got none")
        graphdef, flat = graphlib.flatten(objects, graph=True)
        program = self.programs.get(graphdef)
        if program is None:
            program = self.programs[graphdef] = Program(self, objects, graphdef, flat)
        return _Binding(self, objects, program, flat.leaves, key, before)


_DELETED = (
    "{name} lost its array: {step} gives the arrays to the device, and a step that failed gave none back (or other code "
    "donated them). Restore the objects from a checkpoint"
)


class _Binding:
    """Objects that a program was called with: their variables, and what they consisted of."""

    def __init__(self, step, objects, program, leaves, key, before):
        self.step, self.program = step, program
        self.variables = [leaf for leaf in leaves if isinstance(leaf, nnx.Variable)]
        self.constants = [leaf for leaf in leaves if not isinstance(leaf, nnx.Variable)]
        if step.mesh:
            self.constants = parallel.shard(self.constants, step.mesh)
        self.arrays = [None] * len(self.variables)  # what the last call put there
        self.contents = _contents(objects)
        self.parts = list(itertools.chain.from_iterable(self.contents))
        # A binding dies with its objects; it holds their attributes, and not the objects.
        bindings = weakref.ref(step)
        forget = lambda _: (owner := bindings()) and owner.bindings.pop(key, None)
        self.alive = [weakref.ref(x, forget) for x in objects]
        self.flag, self.pending, self.calls, self.checked = (), None, 0, 0
        if before:  # the same objects, changed
            self.flag, self.pending, self.calls, self.checked = (
                before.flag,
                before.pending,
                before.calls,
                before.checked,
            )

    def same(self) -> bool:
        """Whether every module still holds the very attributes that it held when it was walked."""
        parts = list(itertools.chain.from_iterable(self.contents))
        return len(parts) == len(self.parts) and all(map(operator.is_, parts, self.parts))

    def call(self, run, args, kwargs, steps):
        arrays = self.take(args, kwargs)
        try:
            new, self.flag, out = run(arrays, self.constants, self.flag_for(arrays), args, kwargs)
        except Exception as error:
            self._explain_deleted(arrays, error)
            raise
        deque(map(_set_array, self.variables, new), maxlen=0)
        self.arrays = new
        if self.step.check_finite:
            self._check_late(steps)
        return out

    def flag_for(self, arrays):
        """The flag of `check_finite`, a new one before the first call; () without `check_finite`."""
        return _new_flag(arrays) if self.step.check_finite and not len(self.flag) else self.flag

    def is_abstract(self) -> bool:
        """Whether some variables hold the shape of an array, and no array."""
        return any(isinstance(_array_of(variable), jax.ShapeDtypeStruct) for variable in self.variables)

    def shapes(self, args, kwargs):
        """The arguments of `lower`: a shape for each variable that holds a shape, an array for each other one."""
        arrays = list(map(_array_of, self.variables))
        commit = _committed(arrays, args, kwargs)
        return [
            _on(self.step.mesh, x) if isinstance(x, jax.ShapeDtypeStruct) else self._place(x, name, commit)
            for x, name in zip(arrays, self.program.names, strict=True)
        ]

    def take(self, args, kwargs):
        """The variables' arrays, ready to be donated."""
        arrays = list(map(_array_of, self.variables))
        if not all(map(operator.is_, arrays, self.arrays)):  # some come from elsewhere
            commit = _committed(arrays, args, kwargs)
            arrays = [
                now if now is last else self._place(now, name, commit)
                for now, last, name in zip(arrays, self.arrays, self.program.names, strict=True)
            ]
            arrays = _without_shared_buffers(arrays)
        self.arrays = [None] * len(arrays)
        if max(map(sys.getrefcount, arrays), default=0) > ALONE:
            references = list(map(sys.getrefcount, arrays))
            arrays = [jnp.copy(x) if n > ALONE else x for x, n in zip(arrays, references, strict=True)]
        return arrays

    def _explain_deleted(self, arrays, error):
        for name, array in zip(self.program.names, arrays, strict=True):
            if array.is_deleted():
                raise RuntimeError(_DELETED.format(name=name, step=self.step.name)) from error

    def _place(self, array, name, commit):
        """A jax.Array for one that comes from elsewhere, on the mesh if there is one.

        Results are committed to their device if an argument is. Were the first step's arrays not, the second would compile
        again.
        """
        mesh = self.step.mesh
        if isinstance(array, jax.Array):
            if array.is_deleted():
                raise RuntimeError(_DELETED.format(name=name, step=self.step.name))
            on_mesh = mesh and isinstance(array.sharding, NamedSharding)  # one device may be a mesh, too
            if array.committed and not mesh or on_mesh and array.sharding.device_set == set(mesh.devices.flat):
                return array
        if isinstance(array, jax.ShapeDtypeStruct):
            raise TypeError(f"{name} must hold an array in a call of {self.step.name}; got the shape of one, {array}")
        if mesh:
            return parallel.shard(jnp.array(array, copy=True), mesh)
        if not isinstance(array, jax.Array):
            array = jnp.array(array)
        return jax.device_put(array, array.sharding, may_alias=False) if commit else array

    def _check_late(self, steps):
        self.calls += steps
        if self.calls - self.checked >= CHECK_EVERY:
            self.check(self.pending)
            self.pending, self.checked = self.flag, self.calls
            self.pending.copy_to_host_async()

    def check(self, flag):
        if flag is None or not len(flag):
            return
        count, first, which = map(int, np.asarray(flag))
        if first < 0:
            return
        self.flag, self.pending = (), None
        names = [name for i, name in enumerate(self.program.floats) if i >= 31 or which >> i & 1]
        raise FloatingPointError(
            f"{self.step.name} returned a NaN or infinity in {', '.join(names)} at step {first + 1} of the {count} checked"
        )


def _committed(arrays, args=(), kwargs=None) -> bool:
    """Whether an argument of the call is committed to a device, or a shape says that it will be."""
    is_committed = lambda x: x.sharding if isinstance(x, jax.ShapeDtypeStruct) else getattr(x, "committed", False)
    return any(is_committed(x) for x in [*arrays, *jax.tree.leaves((args, kwargs))])


def _on(mesh, shape):
    """The shape of an array that a step over this mesh has on every device; the same shape if it says where it is."""
    if mesh is None or shape.sharding:
        return shape
    return jax.ShapeDtypeStruct(
        shape.shape, shape.dtype, sharding=NamedSharding(mesh, PartitionSpec()), weak_type=shape.weak_type
    )


def _without_shared_buffers(arrays):
    """The arrays, with a copy of each one whose buffer an earlier one has, since no buffer can be donated twice.

    `nnx.clone` copies no arrays, and `jax.device_put` makes new ones around the same buffer.
    """
    seen, out = set(), []
    for array in arrays:
        buffer = array.addressable_data(0).unsafe_buffer_pointer() if array.size else None
        out.append(jnp.copy(array) if buffer in seen else array)
        seen |= {buffer} - {None}
    return out


def _new_flag(arrays):
    """[steps, the first bad step or -1, a bit for each bad float of it], where the arrays are."""
    flag, sharding = jnp.array([0, -1, 0], jnp.int32), arrays[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.device_put(flag, sharding) if _committed(arrays[:1]) else flag


def _contents(objects) -> list:
    """Live views of what each module, and each list or dict of one, holds. The state of optax is no module of ours."""
    views, states = [], set()
    for path, node in reversed(list(graphlib.iter_graph(objects, graph=True))):  # parents first
        if isinstance(node, nnx.State) or path[:-1] in states:
            states.add(path)
        elif isinstance(node, dict):
            views.append(node.values())
        elif isinstance(node, list):
            views.append(node)
        elif graphlib.is_graph_node(node) and not isinstance(node, nnx.Variable):
            views.append(vars(node).values())
    return views
