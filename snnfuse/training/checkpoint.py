"""Checkpoints that also keep the numbers and choices that are not arrays, and compare them when they are restored.

A neuron's `decay=0.9` or `reset=SoftReset()` that is not learned is compiled in. It is in no array, so a checkpoint of
arrays could be loaded into a network with another decay, and nothing would warn.
"""

import dataclasses
import hashlib
import os
import re
from numbers import Real
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import graphlib
from jax import Array

# How a layer runs, and not what it computes (`tx` is optax's functions): these attributes may differ.
NOT_COMPARED = ("implementation", "unroll", "deterministic", "use_running_average", "tx")


def save(path: str | os.PathLike, *objects: Any) -> None:
    """Write the arrays and the `settings` of nnx objects, such as a model and an optimizer, to a new folder.

    It returns when all is written. Needs Orbax (the extra `train`).

    Raises:
      ValueError: the folder exists.
    """
    _check_objects(objects)
    ocp = _orbax()
    arrays = to_arrays(*objects)
    described = {"settings": settings(*objects), "arrays": {name: _shape(x) for name, x in arrays.items()}}
    content = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), described=ocp.args.JsonSave(described))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(Path(path).absolute(), content)


def restore(path: str | os.PathLike, *objects: Any) -> None:
    """Put the arrays that `save` wrote into objects that were built in the same way.

    Raises:
      ValueError: the settings differ, or a variable is missing, is left over, or has another shape or dtype. The message
        names it, and the objects stay as they were.
      FileNotFoundError: there is no such checkpoint.
    """
    _check_objects(objects)
    ocp, path = _orbax(), Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if not (path / "described").is_dir():
        raise ValueError(f"path must be a folder that training.save wrote; {path} is not, or it is incomplete")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        saved = checkpointer.restore(path, ocp.args.Composite(described=ocp.args.JsonRestore()))["described"]
        compare_settings(saved["settings"], settings(*objects))
        like = to_arrays(*objects)
        _check_arrays(saved["arrays"], {name: _shape(x) for name, x in like.items()}, path)
        found = checkpointer.restore(path, ocp.args.Composite(arrays=ocp.args.StandardRestore(like)))
    from_arrays(found["arrays"], *objects)


def _check_objects(objects):
    if not objects:
        raise TypeError("objects: give at least one nnx object, such as a model")


def settings(*objects: Any) -> dict[str, str]:
    """The numbers and choices of a model that are not arrays: {path: value}, as text. Functions are compared by name only.

        training.settings(nn.LIF(decay=0.9))    {"": "LIF", "decay": "0.9", "neuron.reset": "HardReset", ...}

    These are the types of modules and neurons, and their attributes that are not variables. The settings of an optimizer are
    inside of optax's functions and are not listed. With several objects, paths begin with 0, 1, ...
    """
    found = {}
    for path, value in graphlib.iter_graph(objects, graph=True):
        names = path[len(objects) == 1 :]
        name = ".".join(map(str, names))
        if any(str(n).startswith("_pytree__") or n in NOT_COMPARED for n in names) or isinstance(value, nnx.Variable):
            continue
        if isinstance(value, nnx.Module | nnx.Optimizer):
            found[name] = type(value).__name__
        elif not graphlib.is_node(value):
            found |= _described(name, value)
    return found


def compare_settings(saved: dict[str, str], now: dict[str, str]) -> None:
    """Compare what `settings` gave earlier with what it gives now. Raises ValueError that names what differs.

    An attribute that only one of the two has is not compared, so that a later version may add one.
    """
    differ = [name for name in sorted(saved.keys() & now.keys()) if saved[name] != now[name]]
    faults = [f"{name or 'the model'} was {saved[name]} and is {now[name]}" for name in differ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"the checkpoint was saved with other settings: {'; '.join(faults[:5])}{more}")


def to_arrays(*objects: Any) -> dict[str, Array]:
    """{path: array} of all variables of nnx objects. Random keys become their bits."""
    return {name: _bits(variable.get_raw_value()) for name, variable in _variables(objects)}


def from_arrays(arrays: dict[str, Array], *objects: Any) -> None:
    """Put what `to_arrays` gave into the variables of objects of the same structure."""
    for name, variable in _variables(objects):
        now, new = variable.get_raw_value(), arrays[name]
        variable.set_raw_value(jax.random.wrap_key_data(new, impl=jax.random.key_impl(now)) if _is_key(now) else new)


def _variables(objects):
    _, flat = graphlib.flatten(objects if len(objects) > 1 else objects[0], graph=True)
    named = zip(flat.paths, flat.leaves, strict=True)
    return [(".".join(map(str, path)), leaf) for path, leaf in named if isinstance(leaf, nnx.Variable)]


def _described(name, value):
    if isinstance(value, np.ndarray | jax.Array):
        text = (
            f"{value.dtype}{list(value.shape)} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:8]}"
        )
    elif isinstance(value, Real) and not isinstance(value, bool):
        text = repr(float(value)).removesuffix(".0")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [_described(f"{name}.{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)]
        return {name: type(value).__name__} | {key: text for part in parts for key, text in part.items()}
    else:
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return {name: text}


def _check_arrays(saved, now, path):
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            was, has = saved.get(name, "missing"), now.get(name, "missing")
            raise ValueError(f"variable {name} is {was} in the checkpoint {path}, and {has} in the objects")


def _shape(x):
    return f"{jnp.result_type(x).name}{list(np.shape(x))}"


def _is_key(x):
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _bits(x):
    return jax.random.key_data(x) if _is_key(x) else x


def _orbax():
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(f'a checkpoint needs Orbax ({error}): pip install "snnfuse[train]"') from error
    return ocp
