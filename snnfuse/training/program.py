"""The function that a `compiled_step` traces and compiles: arrays in, the step on nnx objects built from them, arrays out.

While JAX traces it, it checks that the step changed only the arrays of variables: no structure, no attribute, no shape or dtype.
"""

import inspect
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import graphlib
from jax import lax
from jax.sharding import PartitionSpec

from snnfuse import parallel
from snnfuse.parallel.step import data_axes


class Program:
    """The compiled function of all objects of one structure: `one` step in a call, or `many(steps)`."""

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


def _is_nnx(x) -> bool:
    return graphlib.is_graph_node(x) or isinstance(x, nnx.Variable)


def _is_key(x) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _is_array(x) -> bool:
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic | int | float | complex)


def _describe(x) -> str:
    return f"{jnp.result_type(x).name}{list(np.shape(x))}"


def _check_metrics(objects):
    for _, node in graphlib.iter_graph(objects, graph=True):
        if isinstance(node, nnx.Metric) and not isinstance(node, nnx.metrics.Average | nnx.MultiMetric):
            raise NotImplementedError(
                f"over a mesh only sums add up, as in nnx.metrics.Average; got a {type(node).__name__}"
            )
