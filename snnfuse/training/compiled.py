"""`compiled_step`: a step on nnx objects as one `jax.jit` of a flat list of arrays, found again without walking the objects.

A call to `nnx.jit` walks every object (split), hashes the result, and walks again (merge). For a ResNet-18 and its Adam
that takes 14 ms or more on the host, twice what the GPU needs for the step. A compiled step walks the objects in its first call only. It keeps

    variables   the nnx.Variables in the order in which the compiled function takes their arrays
    contents    the attributes of every module, to see in a later call that none has been replaced

Each later call reads the variables' arrays, hands them over as donated buffers, and puts the new arrays into the same
variables. So the objects are never out of date. An array that someone else holds as well, as after
`best = nnx.clone(model)`, is copied and not donated: what was taken from a model stays as it was.
"""

import functools
import inspect
import itertools
import operator
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import graphlib
from jax import lax
from jax.extend.core import get_opaque_trace_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snnfuse import parallel
from snnfuse.core.neuron import PyTree
from snnfuse.parallel.step import ALONG_DATA, data_axes

# The array of a Variable, past the checks of `Variable.__setattr__`: 0.1 in place of 0.6 microseconds for each array.
_array_of = operator.attrgetter("_raw_value")
_set_array = nnx.Variable._raw_value.__set__


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
        self.programs: dict[graphlib.GraphDef, _Program] = {}
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
        """
        args, binding = self._bind(args)
        arrays = binding.take(args, kwargs)
        return binding.program.one.lower(arrays, binding.constants, binding.flag, args, kwargs)

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
            program = self.programs[graphdef] = _Program(self, objects, graphdef, flat)
        return _Binding(self, objects, program, flat.leaves, key, before)


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
        if self.step.check_finite and not len(self.flag):
            self.flag = _new_flag(arrays)
        try:
            new, self.flag, out = run(arrays, self.constants, self.flag, args, kwargs)
        except Exception as error:
            self.program.explain_deleted(arrays, error)
            raise
        deque(map(_set_array, self.variables, new), maxlen=0)
        self.arrays = new
        if self.step.check_finite:
            self._check_late(steps)
        return out

    def take(self, args, kwargs):
        """The variables' arrays, ready to be donated."""
        arrays = list(map(_array_of, self.variables))
        if not all(map(operator.is_, arrays, self.arrays)):  # some come from elsewhere
            commit = any(getattr(x, "committed", False) for x in [*arrays, *jax.tree.leaves((args, kwargs))])
            arrays = [
                now if now is last else self.program.place(now, name, commit)
                for now, last, name in zip(arrays, self.arrays, self.program.names, strict=True)
            ]
            arrays = _without_shared_buffers(arrays)
        self.arrays = [None] * len(arrays)
        if max(map(sys.getrefcount, arrays), default=0) > ALONE:
            references = list(map(sys.getrefcount, arrays))
            arrays = [jnp.copy(x) if n > ALONE else x for x, n in zip(arrays, references, strict=True)]
        return arrays

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


class _Program:
    """The compiled function of all objects of one structure."""

    def __init__(self, step, objects, graphdef, flat):
        self.step, self.graphdef, self.paths = weakref.proxy(step), graphdef, flat.paths
        self.parameters = list(inspect.signature(step.step).parameters)
        self.is_variable = [isinstance(leaf, nnx.Variable) for leaf in flat.leaves]
        self.kinds = [(leaf.var_type, leaf.get_metadata()) for leaf in flat.leaves if isinstance(leaf, nnx.Variable)]
        self.names = [self._name(p) for p, is_variable in zip(flat.paths, self.is_variable, strict=True) if is_variable]
        self.num_objects = len(objects)
        self.floats, self.signatures, self.scans = [], {}, {}
        for name, leaf in zip(map(self._name, flat.paths), flat.leaves, strict=True):
            if isinstance(leaf, nnx.Variable) and not _is_array(leaf.get_raw_value()):
                raise TypeError(f"{name} must hold one array; got a {type(leaf.get_raw_value()).__name__}")
        if step.mesh:
            _check_metrics(objects)

        def one(*args):
            self._note("", *args)
            return self._step(*args)

        one.__name__ = one.__qualname__ = step.name
        self.one = jax.jit(one, donate_argnums=0)

    def many(self, steps: int):
        if steps not in self.scans:

            def many(arrays, constants, flag, args, kwargs):
                self._note(".scan", arrays, constants, flag, args, kwargs)

                def body(carry, batch):
                    arrays, flag, out = self._step(carry[0], constants, carry[1], *batch)
                    return (arrays, flag), out

                (arrays, flag), outs = lax.scan(body, (arrays, flag), (args, kwargs), length=steps)
                return arrays, flag, outs

            many.__name__ = many.__qualname__ = f"{self.step.name}_scan"
            self.scans[steps] = jax.jit(many, donate_argnums=0)
        return self.scans[steps]

    # ---- what is traced

    def _step(self, arrays, constants, flag, args, kwargs):
        run, mesh = self._on_one_device, self.step.mesh
        state = [kind.from_metadata(a, metadata) for a, (kind, metadata) in zip(arrays, self.kinds, strict=True)]
        if mesh:
            specs = self._specs(args), jax.tree.map(self._default_spec, kwargs)
            run = parallel.data_parallel(run, mesh, batch=(*specs, [PartitionSpec()] * len(constants)))
        state, out = run(state, (args, kwargs, constants))
        return [v.get_raw_value() for v in state], self._raise_flag(flag, out), out

    def _on_one_device(self, state, batch):
        args, kwargs, constants = batch
        if self.step.mesh:
            own = lambda x: parallel.fold_key(x, data_axes()) if _is_key(x) and not x.ndim else x
            args, kwargs = jax.tree.map(own, (args, kwargs))
        self._refuse((args, kwargs), _is_nnx, "takes nnx objects first, and other arguments without them; got")
        before, constants_left = iter(state), iter(constants)
        leaves = [next(before) if is_variable else next(constants_left) for is_variable in self.is_variable]
        arrays = [v.get_raw_value() for v in state]
        objects = graphlib.unflatten(self.graphdef, leaves)
        attributes = self._attributes(objects)
        out = self.step.step(*objects, *args, **kwargs)
        self._refuse(out, graphlib.is_graph_node, "must return arrays, for its objects change in place; it returned")
        _, flat = graphlib.flatten(objects, graph=True)
        self._check_structure(flat, leaves, constants)
        self._check_attributes(attributes, self._attributes(objects))
        new = [leaf for leaf in flat.leaves if isinstance(leaf, nnx.Variable)]
        for name, was, now in zip(self.names, arrays, new, strict=True):
            if (a := _describe(was)) != (b := _describe(now.get_raw_value())):
                raise TypeError(f"{self.step.name} may not change the shape or dtype of {name}: it was {a}, and is {b}")
        return new, out

    def _default_spec(self, x):
        return self.step.batch if np.ndim(x) else PartitionSpec()

    def _specs(self, args):
        batch = self.step.batch
        if isinstance(batch, PartitionSpec):
            return jax.tree.map(self._default_spec, args)
        if len(batch) != len(args):
            raise ValueError(
                f"batch must have a PartitionSpec for each of the {len(args)} arguments after the objects; got {batch}"
            )
        return tuple(batch)

    def _raise_flag(self, flag, out):
        if not self.step.check_finite:
            return flag
        floats = [
            (p, x)
            for p, x in jax.tree_util.tree_leaves_with_path(out)
            if jnp.issubdtype(jnp.result_type(x), jnp.floating)
        ]
        if not floats:
            raise ValueError(
                f"check_finite needs a float, such as the loss, that {self.step.name} returns; it returns none"
            )
        self.floats = [f"its result{jax.tree_util.keystr(p)}" if p else "its result" for p, _ in floats]
        bad = jnp.stack([~jnp.isfinite(x).all() for _, x in floats])
        bits = sum(jnp.where(b, 1 << i, 0) for i, b in enumerate(bad[:31]))
        count, first, which = flag
        is_first = (first < 0) & bad.any()
        first, which = jnp.where(is_first, count, first), jnp.where(is_first, bits, which)
        return jnp.stack([count + 1, first, which]).astype(jnp.int32)

    # ---- errors and notes

    def _name(self, path):
        first, *rest = path
        name = self.parameters[first] if first < len(self.parameters) else f"argument {first}"
        return name + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in rest)

    def _note(self, kind, arrays, constants, flag, args, kwargs):
        """Say which argument has a new shape when the function is compiled once more."""
        names = self.parameters[self.num_objects :]
        rest = {names[i] if i < len(names) else f"argument {i}": arg for i, arg in enumerate(args)} | kwargs
        now = {
            name + jax.tree_util.keystr(path): "weak " * getattr(leaf, "weak_type", False) + _describe(leaf)
            for name, tree in rest.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        } | dict(zip(self.names, map(_describe, arrays), strict=True))
        before, self.signatures[kind] = self.signatures.get(kind), now
        if before is not None:
            changed = [
                f"{name} was {before.get(name, 'absent')} and is {now.get(name, 'absent')}"
                for name in sorted(before.keys() | now.keys())
                if before.get(name) != now.get(name)
            ]
            what = "; ".join(changed[:3]) or "a variable has another weak type, or an array another sharding"
            warnings.warn(f"{self.step.name}{kind} is compiled again: {what}", stacklevel=2)

    def _refuse(self, tree, is_wrong, what):
        for leaf in jax.tree.leaves(tree, is_leaf=is_wrong):
            if is_wrong(leaf):
                raise TypeError(f"{self.step.name} {what} a {type(leaf).__name__}")

    def _check_structure(self, flat, leaves, constants):
        now, was = dict(zip(flat.paths, flat.leaves, strict=True)), dict(zip(self.paths, leaves, strict=True))
        for path in was.keys() ^ now.keys():
            verb = "remove" if path in was else "add"
            raise ValueError(f"{self.step.name} may not {verb} a variable: it did {verb} {self._name(path)}")
        for path, leaf in now.items():
            if type(leaf) is not type(was[path]) and isinstance(leaf, nnx.Variable):
                a, b = type(was[path]).__name__, type(leaf).__name__
                raise ValueError(
                    f"{self.step.name} may not change the kind of {self._name(path)}: it was a {a}, is a {b}"
                )
            if not isinstance(leaf, nnx.Variable) and leaf is not was[path]:
                raise ValueError(
                    f"{self.step.name} changed {self._name(path)}, which is an array and no nnx.Variable: "
                    "only variables carry over to the next step"
                )

    def _attributes(self, objects):
        return {
            path: value
            for path, value in graphlib.iter_graph(objects, graph=True)
            if path
            and not str(path[-1]).startswith("_pytree__")
            and not (
                graphlib.is_node(value) or isinstance(value, nnx.Variable) or isinstance(value, jax.Array | np.ndarray)
            )
        }

    def _check_attributes(self, before, after):
        for path in before.keys() | after.keys():
            was, now = before.get(path), after.get(path)
            if was is now or isinstance(was, bool) and isinstance(now, bool) or bool(was == now):
                continue
            raise ValueError(
                f"{self.step.name} changed {self._name(path)} from {was!r} to {now!r}: only variables carry over to the "
                "next step; make it an nnx.Variable"
            )

    def explain_deleted(self, arrays, error):
        for name, array in zip(self.names, arrays, strict=True):
            if array.is_deleted():
                raise RuntimeError(_DELETED.format(name=name, step=self.step.name)) from error

    def place(self, array, name, commit):
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
        if mesh:
            return parallel.shard(jnp.array(array, copy=True), mesh)
        if not isinstance(array, jax.Array):
            array = jnp.array(array)
        return jax.device_put(array, array.sharding, may_alias=False) if commit else array


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


_DELETED = (
    "{name} lost its array: {step} gives the arrays to the device, and a step that failed gave none back (or other code "
    "donated them). Restore the objects from a checkpoint"
)
_TOP = get_opaque_trace_state(convention="nnx")


def _is_nnx(x) -> bool:
    return graphlib.is_graph_node(x) or isinstance(x, nnx.Variable)


def _is_key(x) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _is_array(x) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | int | float | complex)


def _describe(x) -> str:
    return f"{jnp.result_type(x).name}{list(np.shape(x))}"


def _new_flag(arrays):
    """[steps, the first bad step or -1, a bit for each bad float of it], where the arrays are."""
    flag, sharding = jnp.array([0, -1, 0], jnp.int32), arrays[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.device_put(flag, sharding) if arrays[0].committed else flag


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


def _check_metrics(objects):
    for _, node in graphlib.iter_graph(objects, graph=True):
        if isinstance(node, nnx.Metric) and not isinstance(node, nnx.metrics.Average | nnx.MultiMetric):
            raise NotImplementedError(
                f"over a mesh only sums add up, as in nnx.metrics.Average; got a {type(node).__name__}"
            )
