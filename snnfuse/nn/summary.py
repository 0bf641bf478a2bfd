"""`nnx.tabulate` for modules that return a named tuple or a dataclass within a tuple.

Flax 0.12.8 raises TypeError on those, and then leaves its wrappers on the methods of every class in the model, so that later
calls fail too. Neurons return such states, and some layers `Spikes`. Importing this module makes Flax print them as
dictionaries.
"""

import dataclasses
from typing import Any

from flax.nnx import summary

_to_dicts = getattr(summary, "_maybe_pytree_to_dict", None)  # private: a later Flax may not have it, nor the fault


def plain(tree: Any) -> Any:
    """`tree` with its named tuples and dataclasses as dictionaries, and all else as it is."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {field.name: plain(getattr(tree, field.name)) for field in dataclasses.fields(tree)}
    if hasattr(tree, "_fields"):
        return {name: plain(getattr(tree, name)) for name in tree._fields}
    if isinstance(tree, dict):
        return {name: plain(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(plain, tree))
    return tree


if _to_dicts is not None:
    summary._maybe_pytree_to_dict = lambda tree: _to_dicts(plain(tree))
